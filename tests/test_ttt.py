"""Test-time training: the earlier submission's numbers, a plain loop's numbers, and what may never happen.

`golden/ttt.json` holds what the earlier submission's own evaluation gives for a model and a stream that formulas
define: cumulative losses before each chunk's training and how far every parameter had moved at the end.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_support import golden_json, golden_parameter, golden_state
from ranks import call_in_ranks
from support import save_artifact
from torch import Tensor

import train_gpt
from train_gpt import GPT, ChunkTrainer, Config, ConfigError, Runtime, TokenScores

GOLDEN = Path(__file__).resolve().parent / "golden"

# 300 targets, chunks of 72, windows of 24: four chunks of three sequences (a batch of two, a batch of one), and a rest.
CONFIG = Config(
    vocab_size=61, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2, bigram_vocab_size=53,
    bigram_dim=8, xsa_last_n=1, rope_dims=4, rope_train_len=24, ve_dim=8, ve_layers=(1, 2), train_seq_len=24,
    train_batch_tokens=24, eval_seq_len=24, eval_stride=7, eval_batch_seqs=4, ttt_enabled=True, ttt_lr=0.05,
    ttt_epochs=2, ttt_chunk_tokens=72, ttt_batch_seqs=2, ttt_freeze_blocks=1, device="cpu",
).validate()  # fmt: skip
NUM_TARGETS = 300
CHUNKS = [(0, 72), (72, 144), (144, 216), (216, 288), (288, 300)]


def lively_model(config: Config = CONFIG) -> GPT:
    """A model whose every parameter is non-zero, so that each part of it can move."""
    model = GPT(config, initialize=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center, amp = (1.0, 0.3) if parameter.ndim < 2 else (0.0, math.sqrt(3 / parameter.shape[-1]))
            parameter.copy_(golden_parameter(name, tuple(parameter.shape), center, amp))
    return model


def make_stream(tokens: np.ndarray, sizes: np.ndarray | None = None) -> Any:
    """A validation split of these tokens; `sizes` are the bytes of its targets."""
    sizes = np.ones(len(tokens) - 1, dtype=np.int16) if sizes is None else sizes
    return SimpleNamespace(tokens=tokens, bytes=sizes, num_targets=len(tokens) - 1)


def make_tokens(seed: int = 0) -> np.ndarray:
    """Tokens of which the second half repeats the first, and the bytes of the targets would matter."""
    half = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, NUM_TARGETS // 2 + 1)
    return np.concatenate([half, half])[: NUM_TARGETS + 1]


STREAM = make_stream(make_tokens(), np.random.default_rng(1).integers(0, 6, NUM_TARGETS).astype(np.int16))


def adapt(config: Config, model: GPT | None = None, stream: Any = STREAM) -> tuple[TokenScores, dict[str, Tensor]]:
    """The scores, and the weights as they were when the last chunk was scored."""
    model = lively_model(config) if model is None else model
    trainers: list[ChunkTrainer] = []

    class Remembered(ChunkTrainer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            trainers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "ChunkTrainer", Remembered)
        scores = train_gpt.score_then_adapt(model, config, Runtime(config, {}), stream)
    return scores, trainers[0].model.state_dict()


# ---- the earlier submission --------------------------------------------------------------------------------------


def golden_parameters() -> dict[str, Tensor]:
    recorded = golden_json("model_1081")["params"]
    state = {name: value for name, value in golden_state().items() if not name.startswith("mtp_heads")}
    for name, value in state.items():
        assert hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16] == recorded[name]["sha256"]
    return state


def golden_stream() -> Any:
    with np.load(GOLDEN / "sliding.npz") as arrays:
        tokens, silent = arrays["tokens"].astype(np.int64), arrays["is_boundary"]
        spaces = arrays["has_leading_space"][tokens[1:]] & ~silent[tokens[:-1]]
        return make_stream(tokens, arrays["base_bytes"][tokens[1:]] + spaces)


@pytest.fixture(scope="module", params=["main", "lr_x50"])
def golden_run(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Our numbers and the recorded ones, with the earlier submission's idea of a frozen block."""
    config = Config(
        num_layers=11, model_dim=64, num_heads=4, num_kv_heads=2, mlp_mult=3, bigram_dim=32, rope_dims=8, ve_dim=16,
        smear_bos_mask=False, eval_seq_len=96, eval_stride=16, ttt_enabled=True, ttt_epochs=2, ttt_chunk_tokens=512,
        ttt_lr=0.002 if request.param == "main" else 0.1, device="cpu",
    ).validate()  # fmt: skip
    model = GPT(config, initialize=False)
    before = golden_parameters()
    model.load_state_dict(before)
    with pytest.MonkeyPatch.context() as patch:
        # It froze the gains of the first two blocks alone: their matrices, which lie in the banks, went on moving.
        patch.setattr(ChunkTrainer, "_zero_frozen_slices", lambda _: None)
        scores, after = adapt(config, model, golden_stream())
    moved = {name: (after[name] - before[name]).double() for name in before}
    recorded = json.loads((GOLDEN / "ttt.json").read_text())[request.param]
    return {"scores": scores, "moved": moved, "recorded": recorded}


def test_golden_losses(golden_run: dict[str, Any]) -> None:
    """Summed loss and bytes up to each chunk's end, before it is trained on.

    The record's last rows are not compared: behind target 2,992 the earlier evaluation cut its last window short, to
    the 88 targets from 2,912 (here it is shifted left and stays whole), and it counted the stream's last 80 targets
    again. All of that lies in the last chunk, which begins at 2,560.
    """
    nll = -golden_run["scores"].logp.astype(np.float64)
    sizes = golden_stream().bytes
    rows = golden_run["recorded"]["per_chunk_cumulative_before_training"]
    assert [row["token_count"] for row in rows] == [512, 1024, 1536, 2048, 2560]
    for row in rows:
        count = int(row["token_count"])
        assert nll[:count].sum() == pytest.approx(row["loss_sum"], rel=2e-6)
        assert sizes[:count].sum() == row["byte_count"]
    assert nll.mean() == pytest.approx(golden_run["recorded"]["val_loss"], abs=3e-3)


def test_golden_movement(golden_run: dict[str, Any]) -> None:
    """How far each parameter, and each slice of the banks, has moved after five chunks."""
    moved, recorded = golden_run["moved"], golden_run["recorded"]
    assert set(moved) == set(recorded["param_delta_norm"])
    for name, norm in recorded["param_delta_norm"].items():
        assert moved[name].norm().item() == pytest.approx(norm, rel=5e-3, abs=1e-7), name
    for name, norms in recorded["bank_slice_delta_norm"].items():
        np.testing.assert_allclose(moved[name].flatten(1).norm(dim=1).numpy(), norms, rtol=5e-3, err_msg=name)


# ---- against a plain loop ----------------------------------------------------------------------------------------


def zero_frozen(model: GPT, config: Config) -> None:
    """Gradients of the frozen layers' matrices to zero: Q, K, V, output, up and down."""
    L, count = config.num_layers, config.ttt_freeze_blocks
    for bank in (model.qo_bank, model.kv_bank, model.mlp_up_bank, model.mlp_down_bank):
        for layer in range(count):
            assert bank.grad is not None
            bank.grad[layer::L] = 0


def plain_scores(model: GPT, config: Config, start: int, stop: int) -> list[float]:
    """log-probability of the targets start … stop-1, each from the window that the stride says, one at a time."""
    out: list[float] = []
    tokens = torch.from_numpy(STREAM.tokens)
    ends = [*range(24, NUM_TARGETS, config.eval_stride), *range(72, NUM_TARGETS, 72), NUM_TARGETS]
    for target in range(start, stop):
        end = min(e for e in ends if e > target)
        window = tokens[end - 24 : end + 1]
        with torch.no_grad():
            logits = model.logits(window[None, :-1])[0, target - (end - 24)]
        if config.ttt_temperature != 1:
            p = torch.softmax(logits, -1)
            entropy = -(p * torch.log(p)).sum()
            temperature = 1 - (1 - config.ttt_temperature) * (1 - entropy / math.log(61))
            logits = logits / temperature.clamp(0.9, 1.05)
        out.append(torch.log_softmax(logits, -1)[tokens[target + 1]].item())
    return out


def plain_train(model: GPT, optimizer: torch.optim.Optimizer, config: Config, chunk: range) -> Iterator[None]:
    """One step for every batch of sequences in the chunk, in every epoch; yields after each."""
    tokens, sizes = torch.from_numpy(STREAM.tokens), torch.from_numpy(STREAM.bytes).float()
    starts = list(range(chunk.start, chunk.stop - 24 + 1, 24))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(config.ttt_epochs):
        for first in range(0, len(starts), config.ttt_batch_seqs):
            batch = starts[first : first + config.ttt_batch_seqs]
            losses = torch.stack([
                F.cross_entropy(model.logits(tokens[s : s + 24][None])[0], tokens[s + 1 : s + 25], reduction="none")
                for s in batch
            ])  # fmt: skip
            weights = torch.stack([sizes[s : s + 24] for s in batch])
            loss = (losses * weights).sum() / weights.sum() if config.ttt_byte_weighted else losses.mean()
            model.zero_grad()
            loss.backward()
            zero_frozen(model, config)
            if config.ttt_grad_clip:
                torch.nn.utils.clip_grad_norm_(trained, config.ttt_grad_clip)
            optimizer.step()
            yield


def plain_loop(config: Config) -> np.ndarray:
    """Score-first TTT in the plainest way: log-probabilities of all targets."""
    model = lively_model(config)
    trainer = ChunkTrainer(copy.deepcopy(model), config, Runtime(config, {}), STREAM)
    trained = [model.get_parameter(name) for name, p in trainer.model.named_parameters() if p.requires_grad]
    sgd = config.ttt_optimizer == "sgd"
    optimizer = (
        torch.optim.SGD(trained, lr=1.0, momentum=config.ttt_momentum)
        if sgd
        else torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0)
    )
    average = copy.deepcopy(model)
    logp: list[float] = []
    for chunk, (start, stop) in enumerate(CHUNKS):
        logp += plain_scores(average if config.polyak_decay else model, config, start, stop)
        if chunk == len(CHUNKS) - 1:
            break
        ramp = 1 + (config.ttt_lr_ramp - 1) * min(chunk / (0.3 * len(CHUNKS)), 1)
        lr = config.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / (len(CHUNKS) - 1))) * ramp
        optimizer.param_groups[0]["lr"] = lr
        for _ in plain_train(model, optimizer, config, range(start, stop)):
            for mean, now in zip(average.parameters(), model.parameters()):
                mean.data.mul_(config.polyak_decay).add_(now.data, alpha=1 - config.polyak_decay)
    return np.array(logp)


@pytest.fixture(scope="module")
def default_scores() -> TokenScores:
    return adapt(CONFIG)[0]


OPTIONS: list[dict[str, Any]] = [
    {"ttt_epochs": 1},
    {"ttt_momentum": 0.0},
    {"ttt_grad_clip": 0.0, "ttt_lr": 0.002},
    {"ttt_freeze_blocks": 0},
    {"ttt_optimizer": "adamw", "ttt_lr": 0.003},
    {"polyak_decay": 0.8},
    {"ttt_byte_weighted": True},
    {"ttt_temperature": 0.95},
    {"ttt_lr_ramp": 3.0},
    {"ttt_scope": "last", "ttt_freeze_blocks": 2},
    {
        "ttt_optimizer": "adamw", "ttt_lr": 0.001, "polyak_decay": 0.9, "ttt_byte_weighted": True, "ttt_lr_ramp": 3.0,
        "ttt_temperature": 0.98, "ttt_scope": "last",
    },
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=lambda options: "-".join(options) or "default")
def test_scores_are_those_of_a_plain_loop(options: dict[str, Any], default_scores: TokenScores) -> None:
    config = dataclasses.replace(CONFIG, **options).validate()
    scores = adapt(config)[0].logp
    np.testing.assert_allclose(scores, plain_loop(config), rtol=0, atol=2e-4)
    if options:  # the option acts, and only where it can: the first chunk is scored before anything was learned
        difference = np.abs(scores - default_scores.logp)
        assert difference[72:].max() > 1e-3
        assert (difference[:72].max() > 1e-6) == ("ttt_temperature" in options)


def test_repeated_text_is_learned(default_scores: TokenScores) -> None:
    """The second half repeats the first, so a model that was trained on the first predicts it better."""
    frozen = adapt(dataclasses.replace(CONFIG, ttt_lr=0.0))[0]
    assert default_scores.logp[150:].mean() > frozen.logp[150:].mean() + 0.05


# ---- the parts ---------------------------------------------------------------------------------------------------


def trainer_of(**options: Any) -> ChunkTrainer:
    config = dataclasses.replace(CONFIG, **options).validate()
    return ChunkTrainer(lively_model(config), config, Runtime(config, {}), STREAM)


def test_learning_rate_is_a_cosine_times_a_ramp() -> None:
    trainer = trainer_of(ttt_lr=2.0)
    assert [trainer.learning_rate(c, 5) for c in range(5)] == pytest.approx([2, 1 + 2**-0.5, 1, 1 - 2**-0.5, 0])
    ramped = trainer_of(ttt_lr=2.0, ttt_lr_ramp=3.0)
    ratios = [ramped.learning_rate(c, 20) / trainer.learning_rate(c, 20) for c in range(19)]
    assert ratios == pytest.approx([1, 4 / 3, 5 / 3, 2, 7 / 3, 8 / 3, *[3] * 13])  # 30 % of 20 chunks: 6
    assert trainer.learning_rate(0, 1) == 2


@pytest.mark.parametrize("tau", [0.9, 0.98, 1.05])
def test_temperature_of_certain_and_uniform_predictions(tau: float) -> None:
    """Logits are divided by 1 - (1 - tau)(1 - H/ln V): tau where the model is certain, 1 where it knows nothing."""
    model = lively_model()
    ids = torch.from_numpy(make_tokens())[None, :24]
    logits = torch.zeros(1, 24, 61)
    logits[0, :12, 5] = 29.0
    logits[0, 12:18] = torch.linspace(-3, 3, 61)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(model, "_softcapped", lambda hidden, _: logits[:, -hidden.size(1) :])
        _, entropy, logp = model.token_scores(ids, ids, 24, tau)
    p = torch.log_softmax(logits, -1).exp()
    before = -(p * torch.log(p.clamp_min(1e-30))).sum(-1, keepdim=True)
    expected = torch.log_softmax(logits / (1 - (1 - tau) * (1 - before / math.log(61))), -1)
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logp[0, 0, 4] - logp[0, 0, 5], torch.tensor(-29 / tau), rtol=1e-4, atol=0)
    torch.testing.assert_close(logp[0, 20], torch.full((61,), -math.log(61)))
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), rtol=1e-4, atol=1e-6)


def test_the_polyak_average_scores() -> None:
    """After two steps at decay 0.5 it is start/4 + first/4 + second/2; without a decay the model itself scores."""
    once, twice = trainer_of(polyak_decay=0.5, ttt_epochs=1), trainer_of(polyak_decay=0.5, ttt_epochs=2)
    start = [p.detach().clone() for p in once.model.parameters()]
    for trainer in (once, twice):
        scorer = train_gpt.WindowScorer(trainer.average, trainer.config, trainer.runtime, STREAM.tokens)
        trainer.train_on(scorer, range(0, 24), 0.1)
    moved = 0
    for a, b, c, mean in zip(start, *(m.parameters() for m in (once.model, twice.model, twice.average))):
        torch.testing.assert_close(mean, a / 4 + b / 4 + c / 2)
        moved += not torch.equal(a, mean)
    assert moved
    assert (plain := trainer_of()).average is plain.model


def moved_names(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def layer_slices(model: GPT, state: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    L = model.config.num_layers
    banks = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
    return {f"{name}[{row}]": state[name][row] for name in banks for row in range(layer, state[name].size(0), L)}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_frozen_blocks_do_not_move(optimizer: str, count: int) -> None:
    """Neither their gains nor their matrices, momentum or not; all others do."""
    model = lively_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = dataclasses.replace(CONFIG, ttt_freeze_blocks=count, ttt_optimizer=optimizer, ttt_lr=0.003)
    _, after = adapt(config, model)
    moved = moved_names(before, after)
    for layer in range(3):
        slices = layer_slices(model, before, layer)
        assert len(slices) == 6
        expected = set(slices) if layer >= count else set()
        assert moved_names(slices, layer_slices(model, after, layer)) == expected
        gains = {name for name in before if name.startswith(f"blocks.{layer}.")}
        assert len(gains) == 4
        assert moved & gains == (gains if layer >= count else set())
    assert {"tok_emb.weight", "bigram.embed.weight", "smear.gate", "skip_weights", "ve_shared.scale"} <= moved


def test_last_scope_moves_late_matrices_and_every_gain() -> None:
    model = lively_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, after = adapt(dataclasses.replace(CONFIG, ttt_scope="last", ttt_freeze_blocks=2), model)
    moved = moved_names(before, after)
    assert {name for name in before if name.startswith("blocks.")} <= moved
    assert {"smear.gate", "bigram.scale", "ve_shared.scale", "ve_layer_scales.0"} <= moved
    tables = {name for name in before if name.endswith("embed.weight") or "proj" in name or name == "tok_emb.weight"}
    assert len(tables) == 5
    assert not tables & moved
    for layer in range(3):
        still = moved_names(layer_slices(model, before, layer), layer_slices(model, after, layer)) == set()
        assert still == (layer < 2)


# ---- what may never happen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"polyak_decay": 0.9}, {"ttt_optimizer": "adamw", "ttt_scope": "last"}])
def test_model_is_restored_bit_for_bit(options: dict[str, Any]) -> None:
    model = lively_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = dataclasses.replace(CONFIG, **options)
    first = train_gpt.score_then_adapt(model, config, Runtime(config, {}), STREAM)
    assert moved_names(before, model.state_dict()) == set()
    second = train_gpt.score_then_adapt(model, config, Runtime(config, {}), STREAM)
    assert np.array_equal(first.logp, second.logp)
    assert np.array_equal(first.entropy, second.entropy)


def test_artifact_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.ptz"
    save_artifact(lively_model(), "", path)
    content, modified = path.read_bytes(), path.stat().st_mtime_ns
    model, _, _ = train_gpt.load_artifact(path)
    adapt(CONFIG, model)
    assert path.read_bytes() == content
    assert path.stat().st_mtime_ns == modified
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.ptz"]


@contextlib.contextmanager
def recorded_calls(owner: type, name: str, note: Callable[..., Any]) -> Iterator[list[Any]]:
    """What `note` makes of each call's arguments."""
    original, notes = getattr(owner, name), []

    def call(self: Any, *arguments: Any) -> Any:
        notes.append(note(*arguments))
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield notes


def test_every_chunk_but_the_last_is_trained_on_once() -> None:
    with recorded_calls(ChunkTrainer, "train_on", lambda _, targets, lr: (targets, lr)) as rounds:
        adapt(CONFIG)
    assert [(targets.start, targets.stop) for targets, _ in rounds] == CHUNKS[:-1]
    assert [lr for _, lr in rounds] == pytest.approx([0.05 * (1 + math.cos(math.pi * c / 4)) / 2 for c in range(4)])


def test_sequences_are_whole_and_inside_their_chunk() -> None:
    config = dataclasses.replace(CONFIG, ttt_chunk_tokens=70)  # 22 targets of a chunk are left over
    with recorded_calls(ChunkTrainer, "_step", lambda _, starts, length: (starts.tolist(), length)) as steps:
        adapt(config)
    assert steps == [([start, start + 24], 24) for start in (0, 70, 140, 210) for _ in range(config.ttt_epochs)]


def test_scoring_comes_before_training() -> None:
    events: list[tuple[str, int, int]] = []
    with (
        recorded_calls(ChunkTrainer, "train_on", lambda _, t, __: events.append(("train", t.start, t.stop))),
        recorded_calls(train_gpt.WindowScorer, "score_all", lambda w, a, b: events.append(scored(w, a, b))),
    ):
        adapt(CONFIG)
    expected = [(kind, *chunk) for chunk in CHUNKS for kind in ("score", "train")]
    assert events == expected[:-1]


def scored(windows: train_gpt.Windows, first: int, stop: int) -> tuple[str, int, int]:
    ends = np.cumsum(windows.tails)
    return "score", int(ends[first] - windows.tails[first]), int(ends[stop - 1])


def test_last_chunk_leaves_no_trace_in_the_weights() -> None:
    changed = STREAM.tokens.copy()
    changed[290:] = 3
    _, after = adapt(CONFIG)
    scores, other = adapt(CONFIG, stream=make_stream(changed, STREAM.bytes))
    assert moved_names(after, other) == set()
    assert np.array_equal(scores.logp[:289], adapt(CONFIG)[0].logp[:289])
    changed[280] = 3
    assert moved_names(after, adapt(CONFIG, stream=make_stream(changed, STREAM.bytes))[1])


def test_first_chunk_is_scored_by_the_artifact_itself(default_scores: TokenScores) -> None:
    sliding = train_gpt.score_stream(lively_model(), CONFIG, Runtime(CONFIG, {}), STREAM, CONFIG.eval_stride)
    assert np.array_equal(default_scores.logp[:66], sliding.logp[:66])  # the window that ends at 73 is cut at 72
    assert not np.allclose(default_scores.logp[72:], sliding.logp[72:], atol=1e-3)


def test_chunk_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"TTT_CHUNK_TOKENS=23 .*EVAL_SEQ_LEN=24"):
        dataclasses.replace(CONFIG, ttt_chunk_tokens=23).validate()
    with pytest.raises(ConfigError, match=r"TTT_CHUNK_TOKENS=1024 .*EVAL_SEQ_LEN=2048"):
        Config.from_env({"TTT_CHUNK_TOKENS": "1024"})


# ---- ranks -------------------------------------------------------------------------------------------------------

def save_scores(folder: str, cases: dict[str, dict[str, Any]]) -> None:
    with train_gpt.Runtime(CONFIG, os.environ) as runtime:
        for name, options in cases.items():
            config = dataclasses.replace(CONFIG, **options)
            scores = train_gpt.score_then_adapt(lively_model(config), config, runtime, STREAM)
            np.savez(f"{folder}/{name}{runtime.rank}.npz", **scores._asdict())


def test_two_ranks_score_as_one(tmp_path: Path) -> None:
    """Batches of two sequences and of one: each rank takes one, then one rank none."""
    cases: dict[str, dict[str, Any]] = {
        "sgd": {},
        "adamw": {"ttt_optimizer": "adamw", "ttt_lr": 0.003, "ttt_byte_weighted": True, "polyak_decay": 0.8},
    }
    ranks = call_in_ranks([os.environ] * 2, save_scores, str(tmp_path), cases)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    for name, options in cases.items():
        alone = adapt(dataclasses.replace(CONFIG, **options))[0]
        for rank in range(2):
            with np.load(tmp_path / f"{name}{rank}.npz") as together:
                for column, values in alone._asdict().items():
                    np.testing.assert_allclose(together[column], values, rtol=0, atol=1e-5, err_msg=column)
