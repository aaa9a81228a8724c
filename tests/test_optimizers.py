"""Muon, AdamW, clipping, schedules and weight averages against reference numbers and plain re-computations."""

import copy
import math

import numpy as np
import pytest
import torch
from golden_support import (
    golden_arrays,
    golden_tensor,
    golden_values,
    grad_of,
    make_runtime,
    make_trainer,
    random_ids,
    randomize,
    tiny_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def exact_newton_schulz(matrix: np.ndarray, steps: int) -> np.ndarray:
    """The recursion in float64, written out for one matrix."""
    a, b, c = COEFFICIENTS
    x = matrix.astype(np.float64)
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / (np.sqrt((x * x).sum()) + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


# Newton–Schulz --------------------------------------------------------------------------------------------
SHAPES = ("tall", "wide", "square", "batch_wide", "batch_tall")


@pytest.mark.parametrize("steps", [5, 10])
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_against_the_recorded_results(shape, steps):
    """fp32 against the float64 recursion; bf16 against it no further away than the earlier scripts' bf16 was."""
    matrices, exact = golden_tensor("muon", f"ns/in/{shape}"), golden_tensor("muon", f"ns/f64/{shape}/steps{steps}")
    batch = matrices if matrices.ndim == 3 else matrices[None]
    ours = train_gpt.newton_schulz(batch, steps).view_as(matrices)
    # The quintic amplifies rounding by up to 3.4445 a step.
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-5 if steps == 5 else 5e-4)
    low = train_gpt.newton_schulz(batch.bfloat16(), steps).view_as(matrices)
    assert low.dtype == torch.bfloat16
    recorded = golden_tensor("muon", f"ns/1081_bf16/{shape}/steps{steps}")
    assert (low.double() - exact).abs().max() < 2 * (recorded.double() - exact).abs().max()
    torch.testing.assert_close(low.float(), recorded, rtol=0, atol=0.08)


def test_newton_schulz_treats_each_matrix_of_a_bank_by_itself():
    bank = torch.stack([torch.tensor(golden_values(f"m{i}", 60)).view(6, 10).float() * 10.0**i for i in range(-3, 4)])
    together = train_gpt.newton_schulz(bank, 5)
    for matrix, update in zip(bank, together):
        np.testing.assert_allclose(update.numpy(), exact_newton_schulz(matrix.numpy(), 5), rtol=0, atol=2e-5)
    singular = torch.linalg.svdvals(together)
    assert 0.3 < singular.min() < singular.max() < 1.3
    assert torch.isfinite(train_gpt.newton_schulz(torch.zeros(2, 4, 3), 5)).all()


def test_newton_schulz_multiplies_matrices_of_the_shorter_side():
    """A tall matrix takes as many FLOP as its transpose: five times X·Xᵀ, its square, and the product with X."""
    for rows, columns in ((64, 16), (16, 64)):
        with FlopCounterMode(display=False) as counter:
            train_gpt.newton_schulz(torch.ones(3, rows, columns), 5)
        assert counter.get_total_flops() == 3 * 5 * 2 * 16 * 16 * (64 + 16 + 64)


# Muon -----------------------------------------------------------------------------------------------------
def drive_muon(
    start: Tensor, grads: list[Tensor], lr: float, momentum: float, wd: float
) -> tuple[list[Tensor], Tensor]:
    """Weights after each step, and the last momentum, of one bank at world size 1."""
    config = tiny_config(muon_wd=wd, muon_steps=5)
    parameter = nn.Parameter(start.clone())
    muon = train_gpt.Muon([parameter], config, make_runtime(config), torch.float32)
    weights = []
    for grad in grads:
        grad_of(parameter).copy_(grad)
        muon.step(lr, momentum, torch.tensor(True))
        weights.append(parameter.detach().clone())
    return weights, muon.shards[0].momentum


@pytest.mark.parametrize("bank", "ABC")
@pytest.mark.parametrize("script", ["muon1081", "muon700", "muon150"])
def test_muon_follows_the_recorded_trajectory(script, bank):
    """The scripts iterate in bf16, hence lr·0.05 a step; 1081 keeps its momentum in bf16 too, the others in fp32.

    Only the end of the trajectory was recorded: the arrays w1 and w2 hold the same numbers as w3. The steps between
    are checked by `test_muon_is_decay_first_then_a_scaled_orthogonal_step`.
    """
    arrays = golden_arrays("muon")

    def recorded(what: str) -> Tensor:
        tensor = torch.tensor(arrays[f"{script}/{bank}/{what}"])
        return tensor if tensor.ndim == 3 else tensor[None]

    lr, momentum, wd = 0.02, 0.95, 0.04
    weights, last = drive_muon(recorded("w0"), [recorded(f"grad{t}") for t in range(3)], lr, momentum, wd)
    torch.testing.assert_close(weights[-1], recorded("w3"), rtol=0, atol=3 * lr * 0.05)
    assert (recorded("w0") - recorded("w3")).abs().max() > lr  # many times the tolerance
    torch.testing.assert_close(last, recorded("momentum3"), rtol=0, atol=3e-3 if script == "muon1081" else 1e-6)


@pytest.mark.parametrize("shape", [(3, 12, 20), (2, 24, 10), (2, 8, 8)])
def test_muon_is_decay_first_then_a_scaled_orthogonal_step(shape):
    """float64 by hand, with settings large enough that the order of decay and step shows."""
    lr, momentum, wd = 0.5, 0.9, 0.6
    count = int(np.prod(shape))
    start = golden_values("start", count).reshape(shape)
    grads = [0.1 * golden_values(f"grad{t}", count).reshape(shape) for t in range(3)]
    tensors = [torch.tensor(x).float() for x in (start, *grads)]
    weights, _ = drive_muon(tensors[0], tensors[1:], lr, momentum, wd)
    expected, buffer = start, np.zeros(shape)
    for grad, ours in zip(grads, weights):
        buffer = momentum * buffer + grad
        nesterov = grad + momentum * buffer
        update = np.stack([exact_newton_schulz(matrix, 5) for matrix in nesterov])
        expected = expected * (1 - lr * wd) - lr * max(1.0, shape[1] / shape[2]) ** 0.5 * update
        np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=5e-5)


# Groups and gradients -------------------------------------------------------------------------------------
ROLES = {
    "mlp_up_bank": None, "mlp_down_bank": None, "qo_bank": None, "kv_bank": None,
    "tok_emb.weight": "tied_embed_lr",
    "bigram.embed.weight": "tied_embed_lr", "ve_shared.embed.weight": "tied_embed_lr",
    "mtp_heads.0.weight": "head_lr", "mtp_heads.1.weight": "head_lr", "lm_head.weight": "head_lr",
}  # fmt: skip


def expected_lr(config: train_gpt.Config, name: str) -> float:
    field = ROLES.get(name, "scalar_lr") or "matrix_lr"
    return config.embed_lr if name == "tok_emb.weight" and not config.tie_embeddings else getattr(config, field)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_exactly_one_optimizer_and_its_learning_rate(tied):
    config = tiny_config(tie_embeddings=tied, adam_wd=0.03)
    model = train_gpt.GPT(config)
    optimizers = train_gpt.Optimizers(model, config, make_runtime(config))
    owners: dict[int, list[float]] = {}
    for group in optimizers.adamw.param_groups:
        assert group["weight_decay"] == 0.03
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)
        for parameter in group["params"]:
            owners.setdefault(id(parameter), []).append(group["base_lr"])
    for name, parameter in model.named_parameters():
        under_muon = [s for s in optimizers.muon.shards if s.values.data_ptr() == parameter.data_ptr()]
        if ROLES.get(name, "") is None:
            assert (len(under_muon), id(parameter) in owners) == (1, False), name
        else:
            assert under_muon == [], name
            assert owners.pop(id(parameter)) == [expected_lr(config, name)], name
    assert owners == {}
    assert len(optimizers.muon.shards) == 4


def backward(model: train_gpt.GPT, seed: int = 0) -> None:
    ids = random_ids(model.config, 2, 25, seed)
    main, _, further = model.training_losses(ids[:, :-1], ids[:, 1:], qat=False)
    (main + 0.1 * further).backward()


def test_backward_writes_into_the_shared_buffers():
    """What is reduced over ranks and clipped is the buffers; a gradient elsewhere would be neither."""
    config = tiny_config()
    model = randomize(train_gpt.GPT(config))
    twin = copy.deepcopy(model)
    optimizers = train_gpt.Optimizers(model, config, make_runtime(config))
    for _ in range(2):
        optimizers.zero_grad()
        backward(model)
    backward(twin)
    buffers = [optimizers.flat_grad, *(shard.grads for shard in optimizers.muon.shards)]
    ranges = [(b.data_ptr(), b.data_ptr() + 4 * b.numel()) for b in buffers]
    taken = set()
    for (name, parameter), (_, expected) in zip(model.named_parameters(), twin.named_parameters()):
        start = grad_of(parameter).data_ptr()
        assert any(low <= start and start + 4 * parameter.numel() <= high for low, high in ranges), name
        taken.add(start)
        torch.testing.assert_close(grad_of(parameter), grad_of(expected), rtol=1e-5, atol=1e-8, msg=name)
    assert len(taken) == len(list(model.parameters()))
    optimizers.zero_grad()
    assert all(grad_of(p).abs().max() == 0 for p in model.parameters())


def reference_adamw(start: np.ndarray, grads: list[np.ndarray], lr: float, wd: float) -> np.ndarray:
    """Decoupled weight decay (Loshchilov and Hutter, 2017), float64."""
    w, m, v = start.astype(np.float64), 0.0, 0.0
    for t, grad in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        w = w * (1 - lr * wd)
        w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
    return w


@pytest.mark.parametrize("tied", [True, False])
def test_adamw_steps_equal_the_formula_and_leave_the_banks_to_muon(tied):
    config = tiny_config(tie_embeddings=tied, adam_wd=0.2, grad_clip_norm=0.0, scalar_lr=0.03)
    model = randomize(train_gpt.GPT(config))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = train_gpt.Optimizers(model, config, make_runtime(config))
    grads: dict[str, list[np.ndarray]] = {name: [] for name in start}
    for step in range(3):
        optimizers.zero_grad()
        backward(model, step)
        for name, parameter in model.named_parameters():
            grads[name].append(grad_of(parameter).double().numpy().copy())
        optimizers.step(lr_scale=0.7, muon_momentum=0.9, clip_norm=0.0)
    for name, parameter in model.named_parameters():
        lr = 0.7 * expected_lr(config, name)
        if ROLES.get(name, "") is None:
            steps = [torch.tensor(grad).float() for grad in grads[name]]
            weights, _ = drive_muon(start[name], steps, lr, 0.9, config.muon_wd)
            torch.testing.assert_close(parameter.detach(), weights[-1], rtol=0, atol=0, msg=name)
        else:
            expected = reference_adamw(start[name].numpy(), grads[name], lr, wd=0.2)
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("clip_norm", [0.0, 0.01, 0.3, 1e3])
def test_clipping_by_the_global_norm_equals_torchs(clip_norm):
    config = tiny_config()
    model = randomize(train_gpt.GPT(config))
    twin = copy.deepcopy(model)
    optimizers = train_gpt.Optimizers(model, config, make_runtime(config))
    backward(model)
    backward(twin)
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), clip_norm if clip_norm else math.inf)
    norm = optimizers.step(lr_scale=1.0, muon_momentum=0.9, clip_norm=clip_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    assert norm > 0.3
    for (name, parameter), (_, reference) in zip(model.named_parameters(), twin.named_parameters()):
        torch.testing.assert_close(grad_of(parameter), grad_of(reference), rtol=1e-5, atol=1e-9, msg=name)


def test_loading_the_state_of_the_beginning_forgets_every_step():
    config = tiny_config()
    used, fresh = (train_gpt.GPT(config) for _ in range(2))
    trainer, other = make_trainer(used, config), make_trainer(fresh, config)
    start = train_gpt.copied_to_cpu(trainer.state_dict())
    for step in range(3):
        trainer.train_step(step, lr_scale=1.0)
    trainer.load_state_dict(start)
    for step in range(2):
        trainer.train_step(step, lr_scale=1.0)
        other.train_step(step, lr_scale=1.0)
    for name, tensor in used.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_gradient_accumulation_equals_one_large_batch():
    models = []
    for micro in (24, 48, 96):
        config = tiny_config(micro_batch_tokens=micro)
        model = randomize(train_gpt.GPT(config))
        trainer = make_trainer(model, config)
        assert trainer.loader.plan.grad_accum_steps == 96 // micro
        norm = trainer.train_step(0, lr_scale=1.0)
        models.append((model, norm, trainer.train_loss))
    for model, norm, loss in models[1:]:
        torch.testing.assert_close(norm, models[0][1], rtol=1e-4, atol=0)
        torch.testing.assert_close(loss, models[0][2], rtol=1e-5, atol=0)
        for name, parameter in model.named_parameters():
            reference = models[0][0].get_parameter(name)
            torch.testing.assert_close(grad_of(parameter), grad_of(reference), rtol=1e-3, atol=1e-7, msg=name)


# Schedules ------------------------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(iterations=st.integers(1, 5000), warmdown=st.integers(0, 5000))
def test_lr_scale_without_a_clock(iterations, warmdown):
    config = tiny_config(iterations=iterations, warmdown_iters=warmdown, max_wallclock_seconds=0.0)
    scale = [train_gpt.lr_scale_at(config, step, 1e9) for step in (*range(0, iterations, 37), iterations)]
    assert scale[-1] == 0
    assert scale[0] == (1 if iterations >= warmdown else pytest.approx(iterations / warmdown))
    assert all(0 <= after <= before <= 1 for before, after in zip(scale, scale[1:]))  # noqa: RUF007
    if warmdown and iterations >= warmdown:
        assert train_gpt.lr_scale_at(config, iterations - warmdown, 0.0) == 1
        assert train_gpt.lr_scale_at(config, iterations - warmdown // 2, 0.0) == pytest.approx(warmdown // 2 / warmdown)


@settings(max_examples=200, deadline=None)
@given(step_s=st.floats(0.001, 10), cap_s=st.floats(1, 1000), warmdown=st.integers(1, 3000))
def test_lr_scale_with_a_wallclock_cap(step_s, cap_s, warmdown):
    """At a constant pace the cap acts as so many iterations: linear to 0 over the last `warmdown` of them."""
    config = tiny_config(iterations=10**9, warmdown_iters=warmdown, max_wallclock_seconds=cap_s)
    assert [train_gpt.lr_scale_at(config, step, cap_s) for step in range(5)] == [1] * 5  # no pace is known yet
    last = int(cap_s / step_s)
    scales = []
    for step in sorted(step for step in {5, last // 3, last // 2, last - 1, last} if step > 4):
        remaining = (cap_s - step * step_s) / step_s
        scales.append(train_gpt.lr_scale_at(config, step, step * step_s))
        assert scales[-1] == pytest.approx(min(1.0, max(remaining, 0) / warmdown), abs=1e-6)
    assert scales == sorted(scales, reverse=True)
    assert train_gpt.lr_scale_at(config, last + 5, cap_s) == 0
    assert train_gpt.lr_scale_at(config, last + 6, 2 * cap_s) == 0


def test_lr_scale_takes_the_earlier_end():
    config = tiny_config(iterations=100, warmdown_iters=50, max_wallclock_seconds=60.0)
    assert train_gpt.lr_scale_at(config, 90, 9.0) == pytest.approx(10 / 50)  # iterations end first
    assert train_gpt.lr_scale_at(config, 10, 40.0) == pytest.approx((20 / 4) / 50)  # the clock ends first


def test_muon_momentum_warms_up_linearly():
    config = tiny_config(muon_momentum=0.99, muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500)
    for step, expected in ((0, 0.92), (750, 0.955), (1500, 0.99), (20_000, 0.99)):
        assert train_gpt.muon_momentum_at(config, step) == pytest.approx(expected)
    none = tiny_config(muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=0)
    assert train_gpt.muon_momentum_at(none, 1) == pytest.approx(0.95)


# Weight averages ------------------------------------------------------------------------------------------
def walk(model: train_gpt.GPT, average: train_gpt.WeightAverage, lr_scales: list[float]) -> list[dict[str, Tensor]]:
    """Random weights after each step, shown to the average; returns them, with the start first."""
    history = [{name: p.detach().double().clone() for name, p in model.named_parameters()}]
    for step, lr_scale in enumerate(lr_scales, start=1):
        randomize(model, seed=step)
        average.update(step, lr_scale)
        history.append({name: p.detach().double().clone() for name, p in model.named_parameters()})
    return history


def assert_averaged(model: train_gpt.GPT, expected: dict[str, Tensor], last: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith("mtp_heads."):
            torch.testing.assert_close(parameter.detach().double(), last[name], rtol=0, atol=0)
        else:
            torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)
            assert not torch.equal(parameter.detach().double(), last[name]), name


@pytest.mark.parametrize(("decay", "steps"), [(0.5, 12), (0.997, 30)])
def test_ema_with_a_ramped_decay(decay, steps):
    config = tiny_config(weight_average="ema", ema_decay=decay)
    model = train_gpt.GPT(config)
    average = train_gpt.WeightAverage(model, config)
    history = walk(model, average, [1.0] * steps)
    expected = history[0]
    for step, weights in enumerate(history[1:], start=1):
        d = min(decay, (1 + step) / (10 + step))
        expected = {name: d * expected[name] + (1 - d) * weights[name] for name in weights}
    assert average.count == steps
    average.apply()
    assert_averaged(model, expected, history[-1])


def test_swa_is_the_mean_of_snapshots_while_the_learning_rate_is_low():
    config = tiny_config(weight_average="swa", swa_every=3, swa_start_scale=0.5)
    model = train_gpt.GPT(config)
    average = train_gpt.WeightAverage(model, config)
    scales = [1.0] * 5 + [0.6, 0.5, 0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.05]
    history = walk(model, average, scales)
    taken = [step for step, scale in enumerate(scales, start=1) if scale < 0.5 and step % 3 == 0]
    assert taken == [9, 12, 15]
    assert average.count == 3
    average.apply()
    expected = {name: torch.stack([history[t][name] for t in taken]).mean(0) for name in history[0]}
    assert_averaged(model, expected, history[-1])


@pytest.mark.parametrize("kind", ["none", "swa"])
def test_without_a_snapshot_the_last_weights_stay(kind):
    config = tiny_config(weight_average=kind, swa_every=3)
    model = train_gpt.GPT(config)
    average = train_gpt.WeightAverage(model, config)
    history = walk(model, average, [1.0] * 4)
    average.apply()
    assert average.count == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach().double(), history[-1][name])
