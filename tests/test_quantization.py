"""The integer grid, alone, under training and against reference numbers."""

import dataclasses
import functools
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from golden_support import (
    golden_arrays,
    golden_tensor,
    golden_values,
    grad_of,
    make_trainer,
    random_ids,
    randomize,
    search_scale,
    tiny_config,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import event, events_of, save_artifact, tiny_environ, train_rows
from torch import Tensor

import train_gpt

BITS = (5, 6, 7, 8)
SMALLEST_NORMAL = 2.0**-14  # of fp16; smaller scales are coarse


@st.composite
def banks(draw: st.DrawFn) -> Tensor:
    """Weights (…, rows, columns) of 10^-9 … 10^9, with rows that are constant, zero or hold one outlier."""
    shape = draw(st.sampled_from([(1, 1), (3, 7), (2, 5, 33), (4, 128)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-9, 9))
    kind = draw(st.sampled_from(["plain", "constant", "zero row", "all zero", "outlier", "mixed sizes"]))
    if kind == "constant":
        weight = torch.full(shape, weight.flatten()[0].item())
    elif kind == "zero row":
        weight[..., 0, :] = 0
    elif kind == "all zero":
        weight = torch.zeros(shape)
    elif kind == "outlier":
        weight[..., 0, 0] = 1000 * weight.abs().max()
    elif kind == "mixed sizes":
        weight = weight * 10.0 ** torch.randint(-6, 7, (*shape[:-1], 1), generator=generator)
    return weight


def amax_scale(grid: train_gpt.Grid, weight: Tensor) -> Tensor:
    return grid.scale(weight.abs().amax(dim=-1, keepdim=True))


def own_scale(grid: train_gpt.Grid, weight: Tensor) -> Tensor:
    """By the rule of the grid: the largest weight of a row, or so many of its root mean squares."""
    if not grid.clip_std:
        return amax_scale(grid, weight)
    return grid.scale(grid.clip_std * weight.square().mean(-1, keepdim=True).sqrt())


@settings(max_examples=200, deadline=None)
@given(weight=banks(), bits=st.sampled_from(BITS), clip_std=st.sampled_from([0.0, 1.0, 3.5, 12.85]))
@example(weight=torch.full((2, 3), torch.finfo(torch.float32).max), bits=6, clip_std=0.0)
@example(weight=torch.full((2, 3), torch.finfo(torch.float32).max), bits=6, clip_std=4.0)
@example(weight=torch.full((2, 3), 1e-45), bits=8, clip_std=0.0)
@example(weight=torch.full((2, 3), 1e-45), bits=8, clip_std=4.0)
def test_fake_quantization_is_decode_of_encode_bit_for_bit(weight, bits, clip_std):
    grid = train_gpt.Grid(bits, clip_std)
    scale = own_scale(grid, weight)
    levels = grid.encode(weight, scale)
    decoded = grid.decode(levels, scale)
    faked: Tensor = train_gpt.fake_quantize(weight, bits, clip_std)  # pyright: ignore[reportAssignmentType]
    assert torch.equal(faked, decoded)
    assert faked.shape == weight.shape
    assert (levels.dtype, scale.dtype, decoded.dtype) == (torch.int8, torch.float16, torch.float32)
    assert scale.shape == (*weight.shape[:-1], 1)
    assert torch.isfinite(decoded).all()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert levels.abs().max() <= grid.qmax == 2 ** (bits - 1) - 1
    assert torch.equal(decoded == 0, levels == 0)
    assert (decoded * weight >= 0).all()  # no sign turns


@pytest.mark.parametrize("bits", BITS)
def test_rows_at_the_ends_of_what_fp16_scales_can_say(bits):
    """Zero rows stay zero, constant rows stay constant, rows too small vanish, rows too large end at a finite bound."""
    grid = train_gpt.Grid(bits)
    pattern = torch.tensor([1.0, -0.5, 0.25, 0.0])
    sizes = torch.tensor([0.0, 1e-12, 2.0**-25, 1e-6 * grid.qmax, 0.3, 1e4, 1e9])
    weight = torch.cat([sizes[:, None] * pattern, torch.full((1, 4), -0.3)])
    zero, nothing, half, small, usual, large, huge, constant = grid.round_trip(weight)
    assert torch.equal(zero, torch.zeros(4))
    assert torch.equal(nothing, torch.zeros(4))
    assert torch.equal(half, torch.zeros(4))  # half the least scale: to even
    assert ((small - weight[3]).abs() <= 2.0**-24 * (0.5 + grid.qmax / 2)).all()  # its scale, 1e-6, keeps 4 bits
    for row, original in ((usual, weight[4]), (large, weight[5])):
        assert ((row - original).abs() <= original.abs().max() * (0.5 / grid.qmax + 2.0**-11)).all()
    assert huge.tolist() == [65_504.0 * grid.qmax, -65_504.0 * grid.qmax, 65_504.0 * grid.qmax, 0.0]
    assert len(set(constant.tolist())) == 1
    assert constant[0].item() == pytest.approx(-0.3, rel=2.0**-11)


@settings(max_examples=150, deadline=None)
@given(weight=banks(), bits=st.sampled_from(BITS))
def test_quantization_error_is_half_a_level(weight, bits):
    """And quantizing again changes nothing. Both hold where fp16 can hold the scale to its full precision."""
    grid = train_gpt.Grid(bits)
    scale = amax_scale(grid, weight)
    normal = ((scale > SMALLEST_NORMAL) & (scale < 65_504)).expand_as(weight)
    once = grid.round_trip(weight)
    # The scale is rounded to 11 bits: the outermost level may miss the largest weight by qmax·2^-11 of a level.
    allowed = scale.float() * (0.5 + grid.qmax * 2.0**-11)
    assert ((once - weight).abs() <= allowed)[normal].all()
    assert torch.equal(grid.round_trip(once)[normal], once[normal])
    # The largest weight of a row takes the outermost level: none is wasted.
    largest = grid.encode(weight, scale).abs().amax(-1, keepdim=True)
    assert (largest == grid.qmax)[normal[..., :1]].all()


@settings(max_examples=100, deadline=None)
@given(weight=banks(), bits=st.sampled_from(BITS))
def test_rows_are_independent(weight, bits):
    grid = train_gpt.Grid(bits)
    flat = weight.view(-1, weight.size(-1))
    one_by_one = torch.stack([grid.round_trip(row[None])[0] for row in flat]).view_as(weight)
    assert torch.equal(grid.round_trip(weight), one_by_one)
    assert torch.equal(grid.round_trip(-weight), -grid.round_trip(weight))


def test_rounding_is_half_to_even_and_clamped_on_both_sides():
    grid = train_gpt.Grid(5)
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 14.5, 15.5, 99.0, -15.5, -99.0]])
    levels = grid.encode(weight, torch.ones(1, 1, dtype=torch.float16))
    assert levels.tolist() == [[0, 2, 2, 0, -2, 14, 15, 15, -15, -15]]


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_passes_straight_through(bits):
    weight = torch.tensor(golden_values("weight", 60)).float().view(3, 20).requires_grad_()
    upstream = torch.tensor(golden_values("upstream", 60)).float().view(3, 20)
    faked: Tensor = train_gpt.fake_quantize(weight, bits)  # pyright: ignore[reportAssignmentType]
    (faked * upstream).sum().backward()
    assert torch.equal(grad_of(weight), upstream)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs the C++ compiler g++")
def test_fake_quantization_is_decode_of_encode_when_compiled():
    weight = torch.tensor(golden_values("weight", 3000)).float().view(3, 20, 50)
    torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
    faked = torch.compile(lambda w: train_gpt.fake_quantize(w, 6), dynamic=False)(weight)
    grid = train_gpt.Grid(6)
    scale = amax_scale(grid, weight)
    assert torch.equal(faked, grid.decode(grid.encode(weight, scale), scale))


# Scale search ---------------------------------------------------------------------------------------------
def square_error(grid: train_gpt.Grid, weight: Tensor, scale: Tensor) -> Tensor:
    return (grid.decode(grid.encode(weight, scale), scale) - weight).double().square().sum(-1)


def quantile_scale(grid: train_gpt.Grid, weight: Tensor, quantile: float) -> Tensor:
    return grid.scale(torch.quantile(weight.abs(), quantile, dim=-1, keepdim=True))


@settings(max_examples=100, deadline=None)
@given(weight=banks(), bits=st.sampled_from(BITS))
def test_searched_scale_is_the_best_of_the_quantiles_for_every_row(weight, bits):
    grid = train_gpt.Grid(bits)
    scale = search_scale(weight, grid)
    assert scale.shape == (*weight.shape[:-1], 1)
    assert scale.dtype == torch.float16
    found = square_error(grid, weight, scale)
    for quantile in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        other = square_error(grid, weight, quantile_scale(grid, weight, quantile))
        assert (found <= other * (1 + 1e-3) + 1e-40).all(), quantile


def test_search_prefers_clipping_one_outlier_to_losing_the_row():
    row = torch.tensor(golden_values("row", 4096)).float()[None]
    row[0, 7] = 2.0
    grid = train_gpt.Grid(6)
    found, unclipped = search_scale(row, grid), amax_scale(grid, row)
    assert found.item() < 0.9 * unclipped.item()
    assert square_error(grid, row, found).item() < 0.9 * square_error(grid, row, unclipped).item()


def test_a_clip_of_so_many_standard_deviations_takes_the_place_of_the_search():
    weight = torch.tensor(golden_values("rows", 4 * 256)).float().view(1, 4, 256)
    for clip_std in (1.5, 3.0, 12.85):
        grid = train_gpt.Grid(6, clip_std)
        rms = (weight.double() ** 2).mean(-1, keepdim=True).sqrt()
        assert torch.equal(search_scale(weight, grid), (clip_std * rms / 31).half())
        used = grid.encode(weight, search_scale(weight, grid)).abs().amax()
        assert used == min(31, round(31 * weight.abs().max().item() / (clip_std * rms.min().item())))
    constant = torch.full((1, 2, 16), 0.25)
    torch.testing.assert_close(train_gpt.Grid(6, 1.0).round_trip(constant), constant, rtol=2.0**-11, atol=0)


# Reference numbers ----------------------------------------------------------------------------------------
CODECS = {"1081_clip31": 6, "700_clip31": 6, "700_clip15": 5}
MATRICES = ("W1", "W2", "W3")


@pytest.mark.parametrize("matrix", [*MATRICES, "v"])
@pytest.mark.parametrize("codec", CODECS)
def test_encoding_with_the_recorded_scales_gives_the_recorded_levels(codec, matrix):
    weight, scale = golden_tensor("quant", f"in/{matrix}"), golden_tensor("quant", f"{codec}/{matrix}/scale")
    levels = train_gpt.Grid(CODECS[codec]).encode(weight, scale.unsqueeze(-1))
    assert torch.equal(levels, golden_tensor("quant", f"{codec}/{matrix}/q"))


def split_at_floor(codec: str, matrix: str) -> tuple[train_gpt.Grid, Tensor, Tensor, Tensor]:
    """(grid, weight, recorded scale (rows, 1), rows at the earlier submissions' floor of 1/qmax)."""
    grid = train_gpt.Grid(CODECS[codec])
    scale = golden_tensor("quant", f"{codec}/{matrix}/scale")[:, None]
    floor = torch.tensor(1 / grid.qmax).half()
    return grid, golden_tensor("quant", f"in/{matrix}"), scale, scale[:, 0] == floor


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("codec", CODECS)
def test_scales_above_the_floor_are_the_recorded_ones(codec, matrix):
    """The reference took one quantile for the whole matrix (0.999 in each of these); the scale rule is the same."""
    grid, weight, recorded, at_floor = split_at_floor(codec, matrix)
    ours = quantile_scale(grid, weight, 0.999)
    assert torch.equal(ours[~at_floor], recorded[~at_floor])
    assert at_floor.sum() == {"W1": 9, "W2": 0, "W3": 48}[matrix]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("codec", CODECS)
def test_scale_floor_differs_from_the_reference_on_purpose(codec, matrix):
    """The earlier submissions let no scale fall below 1/qmax, so a row whose largest weight is below 1 lost levels:
    W3, with weights up to 0.08, kept 5 of 63 at 6 bits. Here a scale is bounded by the least positive fp16 alone."""
    grid, weight, recorded, at_floor = split_at_floor(codec, matrix)
    ours = search_scale(weight, grid)
    assert (ours[at_floor] < recorded[at_floor]).all()
    better, theirs = square_error(grid, weight, ours), square_error(grid, weight, recorded)
    assert (better <= theirs * (1 + 1e-6)).all()
    assert (better[at_floor] < theirs[at_floor]).all()
    if matrix == "W3":
        assert golden_tensor("quant", f"{codec}/W3/q").abs().max() <= 2
        assert (grid.encode(weight, ours).abs().amax(-1) == grid.qmax).all()
        assert better.sum() < 0.01 * theirs.sum()


@pytest.mark.parametrize("matrix", MATRICES)
def test_search_by_row_agrees_with_the_recorded_search_by_row(matrix):
    recorded = golden_tensor("quant", f"700_best_row_scales15/{matrix}")
    ours = search_scale(golden_tensor("quant", f"in/{matrix}"), train_gpt.Grid(5))[:, 0]
    free = recorded > 1.001 / 15  # the rest sits at the floor that is no longer there
    assert torch.equal(ours[free], recorded[free].half())
    assert (ours[~free] < recorded[~free]).all()


@pytest.mark.parametrize(("recorded", "bits", "floored"), [("1081_ste_int6", 6, True), ("150_ste_int6", 6, False)])
def test_fake_quantization_against_the_recorded_training_weights(recorded, bits, floored):
    """They kept the scale in fp32, so values differ by its rounding to fp16, and a weight near a tie by one level.
    Rows with a largest weight below 1 sat at the floor in 1081 and are no comparison."""
    weight = golden_tensor("quant", "in/W1").requires_grad_()
    faked: Tensor = train_gpt.fake_quantize(weight, bits)  # pyright: ignore[reportAssignmentType]
    (faked.T * golden_tensor("quant", "fq/upstream")).sum().backward()
    assert torch.equal(grad_of(weight), golden_tensor("quant", f"fq/{recorded}/w_grad"))
    amax = weight.detach().abs().amax(-1, keepdim=True)
    in_levels = (faked.detach() - golden_tensor("quant", f"fq/{recorded}/w_eff")).abs() / (amax / 31)
    in_levels = in_levels[amax[:, 0] > 1] if floored else in_levels
    assert in_levels.size(0) == (7 if floored else 16)
    assert in_levels.max() < 1.02
    assert (in_levels < 0.02).float().mean() > 0.995


def reference_scale(weight: Tensor, grid: train_gpt.Grid, quantile: float) -> Tensor:
    """The rule of the earlier submissions: one quantile of each row's sizes, not below 1/qmax, in fp32."""
    return (torch.quantile(weight.abs(), quantile, dim=-1, keepdim=True) / grid.qmax).clamp_min(1 / grid.qmax)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(("codec", "bits"), [("1081_int8", 8), ("150_int6", 6)])
def test_encoding_with_scales_that_are_not_yet_rounded_gives_the_recorded_levels(codec, bits, matrix):
    """These two rounded weights by the fp32 scale and stored it in fp16 afterwards, which is why ours does not."""
    weight, grid = golden_tensor("quant", f"in/{matrix}"), train_gpt.Grid(bits)
    scale, stored = reference_scale(weight, grid, 0.9999984), golden_tensor("quant", f"{codec}/{matrix}/scale")
    levels = golden_tensor("quant", f"{codec}/{matrix}/q")
    assert torch.equal(grid.encode(weight, scale), levels)
    assert torch.equal(scale[:, 0].half(), stored)
    theirs, ours = (square_error(grid, weight, each).sum() for each in (stored[:, None], search_scale(weight, grid)))
    assert ours <= theirs


@pytest.mark.parametrize(("recorded", "bits"), [("700_ste_int5", 5), ("700_ste_int6", 6)])
def test_recorded_training_weights_of_a_clip_at_one_quantile(recorded, bits):
    weight, grid = golden_tensor("quant", "in/W1").requires_grad_(), train_gpt.Grid(bits)
    with torch.no_grad():
        scale = reference_scale(weight, grid, 0.9995)
        decoded = grid.decode(grid.encode(weight, scale), scale)
    torch.testing.assert_close(decoded, golden_tensor("quant", f"fq/{recorded}/w_eff"), rtol=0, atol=1e-6)
    faked: Tensor = train_gpt.fake_quantize(weight, bits)  # pyright: ignore[reportAssignmentType]
    (faked.T * golden_tensor("quant", "fq/upstream")).sum().backward()
    assert torch.equal(grad_of(weight), golden_tensor("quant", f"fq/{recorded}/w_grad"))


# Quantization-aware training ------------------------------------------------------------------------------
LARGE_TABLES: dict[str, Any] = dict(vocab_size=600, bigram_vocab_size=8192, ve_dim=128)  # stored as 8 bits


@pytest.fixture(scope="module")
def model():
    return randomize(train_gpt.GPT(tiny_config(**LARGE_TABLES)))


def quantized_copy(model: train_gpt.GPT, leave_out: str = "") -> train_gpt.GPT:
    """Banks at QAT_BITS and embedding tables at 8 bits, except one."""
    copy = train_gpt.GPT(model.config)
    state = model.state_dict()
    for name in state:
        if name != leave_out and (name in train_gpt.BANK_NAMES or name in EMBEDDINGS):
            bits = model.config.qat_bits if name in train_gpt.BANK_NAMES else 8
            state[name] = train_gpt.Grid(bits).round_trip(state[name])
    copy.load_state_dict(state)
    return copy


EMBEDDINGS = ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight")


def test_qat_forward_is_the_forward_of_the_quantized_weights(model):
    ids = random_ids(model.config, 2, 24)
    with torch.no_grad():
        qat = model.logits(ids, qat=True)
        assert torch.equal(qat, quantized_copy(model).logits(ids))
        assert (qat - model.logits(ids)).abs().max() > 1e-2


ROLES: list[dict[str, Any]] = [
    {}, LARGE_TABLES, LARGE_TABLES | dict(tie_embeddings=False), LARGE_TABLES | dict(embed_bits=5, attn_bits=8),
    LARGE_TABLES | dict(embed_bits=16, mlp_bits=5, tie_embeddings=False), dict(qat_bits=0, attn_bits=7),
]  # fmt: skip


@pytest.mark.parametrize("choice", ROLES)
def test_qat_quantizes_only_what_the_artifact_quantizes(choice):
    """A table that the export keeps in half precision must not be trained as if it lost bits."""
    model = randomize(train_gpt.GPT(tiny_config(**choice)))
    ids = random_ids(model.config, 2, 24)
    state = model.state_dict()
    for name, codec in train_gpt.export_plan(model).items():
        if codec.startswith("int"):
            state[name] = train_gpt.Grid(int(codec.removeprefix("int"))).round_trip(state[name])
    stored = train_gpt.GPT(model.config)
    stored.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model.logits(ids, qat=True), stored.logits(ids))


def test_each_role_has_its_bits():
    def codecs(**changes: Any) -> dict[str, str]:
        return train_gpt.export_plan(train_gpt.GPT(tiny_config(**LARGE_TABLES, tie_embeddings=False, **changes)))

    attention, mlp = ("qo_bank", "kv_bank"), ("mlp_up_bank", "mlp_down_bank")
    embeddings = (*EMBEDDINGS, "lm_head.weight")
    plain, mixed, half = codecs(), codecs(attn_bits=5, mlp_bits=7, embed_bits=6), codecs(qat_bits=5, embed_bits=16)
    untrained = codecs(qat_bits=0, mlp_bits=8)
    for names, expected in (
        (attention, ("int6", "int5", "int5", "int6")), (mlp, ("int6", "int7", "int5", "int8")),
        (embeddings, ("int8", "int6", "fp16", "int8")), (("bigram.proj.weight",), ("fp16",) * 4),
        (("smear.gate",), ("fp32",) * 4),
    ):  # fmt: skip
        for name in names:
            assert tuple(plan[name] for plan in (plain, mixed, half, untrained)) == expected, name
    assert tiny_config(qat_bits=5).bits_label == "int5"
    assert tiny_config(attn_bits=7, mlp_bits=5).bits_label == "int5_7"


@pytest.mark.parametrize("changes", [dict(clip_std=3.0), dict(embed_clip_std=6.0), dict(clip_std=2.5, qat_bits=5)])
def test_with_clips_by_standard_deviation_qat_sees_the_very_artifact(changes, tmp_path):
    model = randomize(train_gpt.GPT(tiny_config(**LARGE_TABLES, mtp_num_heads=0, **changes)))
    ids = random_ids(model.config, 2, 24)
    save_artifact(model, "0" * 16, tmp_path / "m.ptz")
    loaded, _, _ = train_gpt.load_artifact(tmp_path / "m.ptz")
    names = train_gpt.BANK_NAMES if "clip_std" in changes else EMBEDDINGS
    for name in names:
        grid = model.grids[name]
        assert torch.equal(loaded.get_parameter(name), grid.round_trip(model.get_parameter(name)))
        plain = train_gpt.Grid(grid.bits).round_trip(model.get_parameter(name))
        assert not torch.equal(loaded.get_parameter(name), plain)
    if "embed_clip_std" not in changes:
        state = {name: value for name, value in loaded.state_dict().items() if name in train_gpt.BANK_NAMES}
        twin = train_gpt.GPT(dataclasses.replace(model.config))
        twin.load_state_dict(quantized_copy(model).state_dict() | state)
        with torch.no_grad():
            assert torch.equal(twin.logits(ids), model.logits(ids, qat=True))


@pytest.mark.parametrize("name", [*train_gpt.BANK_NAMES, *EMBEDDINGS])
def test_qat_reaches_every_bank_and_table(model, name):
    ids = random_ids(model.config, 2, 24)
    with torch.no_grad():
        assert not torch.equal(model.logits(ids, qat=True), quantized_copy(model, leave_out=name).logits(ids))


@pytest.mark.parametrize("bits", BITS)
def test_qat_gradient_reaches_the_master_weights(bits):
    """It is the gradient at the quantized weights, every element of it."""
    model = randomize(train_gpt.GPT(tiny_config(qat_bits=bits, **LARGE_TABLES)))
    other = quantized_copy(model)
    ids = random_ids(model.config, 2, 25)
    qat, _, _ = model.training_losses(ids[:, :-1], ids[:, 1:], qat=True)
    plain, _, _ = model.training_losses(ids[:, :-1], ids[:, 1:], qat=False)
    assert qat.item() != plain.item()
    qat.backward()
    other.training_losses(ids[:, :-1], ids[:, 1:], qat=False)[0].backward()
    for name in (*train_gpt.BANK_NAMES, *EMBEDDINGS):
        gradient = grad_of(model.get_parameter(name))
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, grad_of(other.get_parameter(name)), rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("bits", "threshold", "expected"),
    [(0, 0.15, [0, 0, 0]), (0, 1.0, [0, 0, 0]), (6, 0.15, [0, 0, 1]), (6, 1.0, [1, 1, 1]), (6, 0.0, [0, 0, 0])],
)
def test_qat_begins_below_its_threshold(bits, threshold, expected):
    config = tiny_config(qat_bits=bits, late_qat_threshold=threshold)
    trainer = make_trainer(train_gpt.GPT(config), config)
    assert [trainer.qat_due(scale) for scale in (1.0, 0.15, 0.149)] == [bool(due) for due in expected]


def test_the_training_step_obeys_the_qat_switch():
    config = tiny_config()
    losses = []
    for qat in (False, True):
        trainer = make_trainer(randomize(train_gpt.GPT(config)), config)
        trainer.controls.qat = qat
        trainer.train_step(0, lr_scale=1.0)
        losses.append(trainer.train_loss.item())
    assert losses[0] != losses[1]


# CROWN-Q --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [(5, 7), (6, 6)])
def test_crown_q_by_brute_force(bits):
    """Mean over all bank weights of w²·(row's largest / qmax)²/12, and its gradient, δ's part of it included."""
    model = randomize(train_gpt.GPT(tiny_config(attn_bits=bits[0], mlp_bits=bits[1])))
    penalty = model.crown_q()
    penalty.backward()
    count = sum(model.get_parameter(name).numel() for name in train_gpt.BANK_NAMES)
    total = 0.0
    for name in train_gpt.BANK_NAMES:
        qmax = 2 ** (bits[name.startswith("mlp")] - 1) - 1
        weight = model.get_parameter(name).detach().double()
        step = weight.abs().amax(-1, keepdim=True) / qmax
        total += (weight**2 * step**2).sum().item()
        largest = (weight.abs() == weight.abs().amax(-1, keepdim=True)).double()
        through_step = largest * weight.sign() * 2 * step / qmax * (weight**2).sum(-1, keepdim=True)
        expected = (2 * weight * step**2 + through_step) / (12 * count)
        gradient = grad_of(model.get_parameter(name)).double()
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    assert penalty.item() == pytest.approx(total / (12 * count), rel=1e-5)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in train_gpt.BANK_NAMES)


def test_crown_q_has_a_gradient_where_rows_are_zero():
    """New output and down projections are, and clips by deviation have a root."""
    model = train_gpt.GPT(tiny_config(clip_std=5.0))
    assert not model.mlp_down_bank.any()
    model.crown_q().backward()
    assert all(grad_of(model.get_parameter(name)).isfinite().all() for name in train_gpt.BANK_NAMES)


def penalty_after(crown_q_lambda: float, qat: bool) -> tuple[float, list[float], train_gpt.Trainer]:
    """Penalty after five steps, and the losses printed on the way."""
    config = tiny_config(crown_q_lambda=crown_q_lambda, matrix_lr=0.01, grad_clip_norm=0.0)
    trainer = make_trainer(randomize(train_gpt.GPT(config)), config)
    trainer.controls.qat = qat
    losses = []
    for step in range(5):
        trainer.train_step(step, lr_scale=1.0)
        losses.append(trainer.train_loss.item())
    return trainer.model.crown_q().item(), losses, trainer


def test_crown_q_acts_while_qat_is_on_and_stays_out_of_the_train_loss():
    plain, plain_losses, plain_trainer = penalty_after(0.0, qat=True)
    strong, strong_losses, trainer = penalty_after(1e8, qat=True)
    assert strong < 0.9 * plain
    assert strong_losses[0] == plain_losses[0]  # the same weights: the penalty is no part of what is printed
    assert strong_losses[1:] != plain_losses[1:]
    assert trainer.crown_q_loss is not None
    assert trainer.crown_q_loss.item() > 0
    assert plain_trainer.crown_q_loss is None
    without, off_losses, _ = penalty_after(0.0, qat=False)
    assert penalty_after(1e8, qat=False)[:2] == (without, off_losses)


def compilations(run_main: Any, environ: dict[str, str]) -> int:
    torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
    outcome = run_main(environ)
    assert outcome.returncode == 0, outcome.stderr
    rows = events_of(environ)
    assert {row["qat"] for row in train_rows(rows)} == {0, 1}
    on, penalized = zip(*((row["qat"] == 1, "crown_q" in row) for row in train_rows(rows)))
    assert penalized in (on, (False, *on[:-1]))  # a vote acts from the next step on; nothing is left of the warm-up
    return event(rows, "compilations_in_timed_window")["count"]


@pytest.mark.parametrize("swarm", [False, True])
def test_no_compilation_when_something_begins_later(run_main, tiny_data, blob, tmp_path, monkeypatch, swarm):
    """Graphs are counted where they are traced, so a back end that does nothing with them serves.

    The LR scale or the swarm switches QAT; the swarm also changes the weights of the knowledge graph and MTP losses.
    The layer is run twice from the middle on where the swarm is.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    environ = tiny_environ(
        tiny_data, tmp_path, COMPILE=1, WARMUP_STEPS=1, ITERATIONS=6, WARMDOWN_ITERS=6, LATE_QAT_THRESHOLD=0.5,
        CROWN_Q_LAMBDA=1.0, NUM_LAYERS=1, VE_LAYERS=0, MTP_NUM_HEADS=0, TTT_ENABLED=0, EVAL_STRIDE=32,
    )  # fmt: skip
    if swarm:
        changes = dict(SWARM_ENABLED=1, SWARM_EVERY=1, LATE_QAT_THRESHOLD=0, KG_ENABLED=1, KG_PATH=blob, ITERATIONS=20)
        changes |= dict(REPEAT_LAYERS=0, REPEAT_FROM=0.5)
        environ |= {name: str(value) for name, value in (changes | dict(MTP_NUM_HEADS=1)).items()}
    assert compilations(run_main, environ) == 0
    changed = [{row[name] for row in train_rows(events_of(environ))} for name in ("kg_weight", "mtp_weight")]
    assert all((len(values) > 1) == swarm for values in changed)
    if not swarm:
        unprimed = environ | dict(WARMUP_STEPS="0", OUT_DIR=str(tmp_path / "unprimed"))
        assert compilations(run_main, unprimed) >= 3  # QAT off, QAT on, the penalty


def test_reference_arrays_are_all_there():
    assert {f"in/{name}" for name in (*MATRICES, "v")} <= set(golden_arrays("quant"))
    assert np.isfinite(golden_arrays("quant")["in/W1"]).all()
