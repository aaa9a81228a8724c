"""What the recipe frontier adds to the five submissions: each part against its formula, off without its variable."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from golden_support import make_runtime, make_trainer, random_ids, randomize, tiny_config
from torch import Tensor, nn

import train_gpt

LENGTH = 24


def outputs_of_layers(model: train_gpt.GPT, ids: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """The layers in the order in which they are run, each with its input and its output."""
    seen: list[tuple[int, Tensor, Tensor]] = []

    def watch(layer: int) -> Any:
        def hook(_block: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
            seen.append((layer, given[0], result))

        return model.blocks[layer].register_forward_hook(hook)

    hooks = [watch(layer) for layer in range(len(model.blocks))]
    with torch.no_grad():
        model.logits(ids)
    for hook in hooks:
        hook.remove()
    return seen


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()


# The floor of the learning rate -----------------------------------------------------------------------------
def test_the_learning_rate_falls_in_a_line_to_its_floor():
    config = tiny_config(iterations=40, warmdown_iters=20, min_lr=0.1)
    scales = [train_gpt.lr_scale_at(config, step, 0.0) for step in range(41)]
    assert scales[:21] == [1.0] * 21
    expected = [1.0 - 0.9 * (step - 20) / 20 for step in range(20, 41)]
    assert scales[20:] == pytest.approx(expected)
    assert train_gpt.lr_scale_at(tiny_config(iterations=40, warmdown_iters=20), 40, 0.0) == 0.0


def test_the_clock_leads_to_the_same_floor():
    config = tiny_config(iterations=10**6, warmdown_iters=100, max_wallclock_seconds=60.0, min_lr=0.05)
    assert train_gpt.lr_scale_at(config, 600, 60.0) == pytest.approx(0.05)
    assert train_gpt.lr_scale_at(config, 600, 57.0) == pytest.approx(0.05 + 0.95 * (3 / (57 / 600)) / 100)


# MuonEq-R ---------------------------------------------------------------------------------------------------
def updates(grad: Tensor, **settings: Any) -> Tensor:
    """How Muon moves a bank of zeros by one gradient."""
    config = tiny_config(muon_wd=0.0, **settings)
    parameter = nn.Parameter(torch.zeros_like(grad))
    muon = train_gpt.Muon([parameter], config, make_runtime(config), torch.float32)
    assert parameter.grad is not None
    parameter.grad.copy_(grad)
    muon.step(1.0, 0.9, torch.tensor(True))
    return parameter.detach()


@pytest.mark.parametrize("shape", [(2, 12, 20), (3, 16, 8)])
def test_rows_count_alike_whatever_their_gradients_size(shape):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    scaled = grad * torch.logspace(-2, 2, shape[1])[:, None]
    torch.testing.assert_close(updates(grad, muon_eq_rows=True), updates(scaled, muon_eq_rows=True))
    assert (updates(grad) - updates(scaled)).abs().max() > 0.1
    by_hand = train_gpt.newton_schulz(grad / grad.square().sum(-1, keepdim=True).sqrt(), 5)
    ratio = max(1.0, shape[1] / shape[2]) ** 0.5
    torch.testing.assert_close(updates(grad, muon_eq_rows=True), -ratio * by_hand)


def test_a_row_without_gradient_stays_where_it_is():
    grad = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(3))
    grad[0, 2] = 0
    moved = updates(grad, muon_eq_rows=True)
    assert torch.isfinite(moved).all()
    assert not moved[0, 2].any()


# Parallel residuals -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("first", [0, 2, 4])
def test_attention_and_mlp_read_one_input_from_a_layer_on(first):
    config = tiny_config(parallel_residual_from=first)
    model = randomize(train_gpt.GPT(config))
    ids = random_ids(config, 2, LENGTH)
    attended: dict[int, Tensor] = {}
    for layer, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda _m, _given, result, layer=layer: attended.update({layer: result}))
    seen = outputs_of_layers(model, ids)
    x0 = seen[0][1]
    for layer, x, result in seen:
        block: Any = model.blocks[layer]
        x = block.resid_mix[0] * x + block.resid_mix[1] * x0
        after = x + block.attn_scale * attended[layer]
        read = norm(x if layer >= first else after) / (layer + 1) ** 0.5
        z = read @ model.mlp_up_bank[layer].T
        hidden = torch.where(z > 0, z, config.leaky_slope * z) ** 2
        expected = after + block.mlp_scale * (hidden @ model.mlp_down_bank[layer].T)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == config.num_layers


# Repeated layers --------------------------------------------------------------------------------------------
REPEATS = {(1, 2): [0, 1, 2, 1, 2, 3], (3,): [0, 1, 2, 3, 3], (0, 1, 2, 3): [0, 1, 2, 3, 0, 1, 2, 3], (): [0, 1, 2, 3]}


@pytest.mark.parametrize("repeated", REPEATS)
def test_layers_are_run_again_behind_their_last_one(repeated):
    """In order, each on what the one before gave; a skip joins where a layer is run for the first time alone."""
    model = randomize(train_gpt.GPT(tiny_config(repeat_layers=repeated)))
    seen = outputs_of_layers(model, random_ids(model.config, 2, LENGTH))
    assert [layer for layer, _, _ in seen] == REPEATS[repeated]
    for (_, _, before), (layer, given, _), visited in zip(seen, seen[1:], range(1, len(seen))):
        first_time = layer not in REPEATS[repeated][:visited]
        assert torch.equal(given, before) == (not first_time or layer < 2)
    model.repeated = ()
    once = outputs_of_layers(model, random_ids(model.config, 2, LENGTH))
    assert [layer for layer, _, _ in once] == [0, 1, 2, 3]


def test_a_second_run_is_of_the_same_weights_and_no_parameter_is_added():
    plain, repeated = (train_gpt.GPT(tiny_config(**parts)) for parts in ({}, dict(repeat_layers=(1, 2))))
    assert {name: p.shape for name, p in plain.named_parameters()} == {
        name: p.shape for name, p in repeated.named_parameters()
    }


def test_training_repeats_layers_from_its_share_on(monkeypatch):
    """By steps, by the clock, whichever is further; the finished model repeats them always."""
    config = tiny_config(repeat_layers=(1, 2), repeat_from=0.5, iterations=8, max_wallclock_seconds=10.0)
    trainer = make_trainer(randomize(train_gpt.GPT(config)), config)
    assert trainer.model.repeated == (1, 2)
    silent: Any = type("Silent", (), {"row": lambda *_, **__: None})()
    trainer.log = silent
    monkeypatch.setattr(trainer, "log_step", lambda *_, **__: None)
    monkeypatch.setattr(trainer.average, "update", lambda *_: None)
    repeated, elapsed = [], iter([0, 1, 6, 6, 2, 2, 2])
    monkeypatch.setattr(trainer, "global_train_loss", lambda: 0.0)
    monkeypatch.setattr(trainer.clock, "agreed", lambda: (next(elapsed), False))
    for _ in range(7):
        trainer.one_step()
        repeated.append(trainer.model.repeated == (1, 2))
    assert repeated == [False, False, False, True, True, True, True]


def test_a_repeated_layer_changes_the_score_and_training_reaches_through_both_runs():
    config = tiny_config(repeat_layers=(1, 2), mtp_num_heads=0)
    model = randomize(train_gpt.GPT(config))
    once = copy.deepcopy(model)
    once.repeated = ()
    ids = random_ids(config, 2, LENGTH + 1)
    losses = [each.training_losses(ids[:, :-1], ids[:, 1:], False)[0] for each in (model, once)]
    assert abs(losses[0].item() - losses[1].item()) > 1e-3
    # The gradient of a weight is the sum over both runs: a small step along it changes the loss by as much.
    losses[0].backward()
    direction = model.mlp_up_bank.grad
    assert direction is not None
    step = 1e-3 / direction.norm()
    with torch.no_grad():
        model.mlp_up_bank.add_(direction, alpha=step.item())
        moved = model.training_losses(ids[:, :-1], ids[:, 1:], False)[0]
    assert (moved - losses[0]).item() == pytest.approx(1e-3 * direction.norm().item(), rel=0.05)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("REPEAT_LAYERS", "2,1"), ("REPEAT_LAYERS", "1,3"), ("REPEAT_LAYERS", "10,11"), ("REPEAT_LAYERS", "3,3"),
     ("MIN_LR", "1.5"), ("REPEAT_FROM", "-0.1"), ("PARALLEL_RESIDUAL_FROM", "-1"), ("MUON_EQ_ROWS", "some")],
)  # fmt: skip
def test_what_cannot_be_used_is_named(variable, value):
    with pytest.raises(train_gpt.ConfigError, match=variable):
        train_gpt.Config.from_env({variable: value})


# The recipe -------------------------------------------------------------------------------------------------
def test_the_five_submissions_have_none_of_it():
    off = dict(min_lr=0.0, muon_eq_rows=False, parallel_residual_from=64, repeat_layers=())
    for recipe in ("swarm", "backoff", "leaky", "hedge", "smear"):
        config = train_gpt.Config.from_env({"RECIPE": recipe})
        assert {name: getattr(config, name) for name in off} == off, recipe
