"""The integer grid, alone, under training and against reference numbers."""

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
    tiny_config,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
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


@settings(max_examples=150, deadline=None)
@given(weight=banks(), bits=st.sampled_from(BITS))
@example(weight=torch.full((2, 3), torch.finfo(torch.float32).max), bits=6)
@example(weight=torch.full((2, 3), 1e-45), bits=8)
def test_fake_quantization_is_decode_of_encode_bit_for_bit(weight, bits):
    grid = train_gpt.Grid(bits)
    scale = amax_scale(grid, weight)
    levels = grid.encode(weight, scale)
    decoded = grid.decode(levels, scale)
    faked: Tensor = train_gpt.fake_quantize(weight, bits)  # pyright: ignore[reportAssignmentType]
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
    scale = train_gpt.search_scale(weight, grid)
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
    found, unclipped = train_gpt.search_scale(row, grid), amax_scale(grid, row)
    assert found.item() < 0.9 * unclipped.item()
    assert square_error(grid, row, found).item() < 0.9 * square_error(grid, row, unclipped).item()


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
    ours = train_gpt.search_scale(weight, grid)
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
    ours = train_gpt.search_scale(golden_tensor("quant", f"in/{matrix}"), train_gpt.Grid(5))[:, 0]
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


@pytest.mark.parametrize("tables", [{}, LARGE_TABLES, LARGE_TABLES | dict(tie_embeddings=False)])
def test_qat_quantizes_only_what_the_artifact_quantizes(tables):
    """A table that the export keeps in half precision must not be trained as if it lost bits."""
    model = randomize(train_gpt.GPT(tiny_config(**tables)))
    ids = random_ids(model.config, 2, 24)
    state = model.state_dict()
    for name, codec in train_gpt.export_plan(model).items():
        if codec.startswith("int"):
            state[name] = train_gpt.Grid(int(codec.removeprefix("int"))).round_trip(state[name])
    stored = train_gpt.GPT(model.config)
    stored.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(model.logits(ids, qat=True), stored.logits(ids))


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
    assert trainer.controls.qat == bool(expected[0])


def test_the_training_step_obeys_the_qat_switch():
    config = tiny_config()
    losses = []
    for qat in (False, True):
        trainer = make_trainer(randomize(train_gpt.GPT(config)), config)
        trainer.controls.qat = qat
        trainer.train_step(0, lr_scale=1.0)
        losses.append(trainer.train_loss.item())
    assert losses[0] != losses[1]


def test_reference_arrays_are_all_there():
    assert {f"in/{name}" for name in (*MATRICES, "v")} <= set(golden_arrays("quant"))
    assert np.isfinite(golden_arrays("quant")["in/W1"]).all()
