"""What was made fast stays fast: own fast paths against plain ones in this process, in CPU time, with wide limits.

Each limit is about a third of the ratio seen on an idle core; best of several alternating repeats.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from golden_support import make_runtime, make_trainer, randomize, tiny_config
from support import REPO
from test_ngram_counts import dictionary_counts

import train_gpt
from bench import common
from bench.counts import synthetic_tokens
from bench.mixing import TableMixer, stand_in_scores
from bench.train_step import QUICK, HostReads, bench_config, close, kernel_shares, write_random_shard
from bench.train_step import make_trainer as make_bench_trainer


def ratio(fast: Any, plain: Any, repeats: int = 5) -> float:
    """How many times as long the plain way takes."""
    seconds = common.timed_in_turn({"fast": fast, "plain": plain}, 1, repeats)
    return min(seconds["plain"]) / max(min(seconds["fast"]), 1e-9)


def test_counting_by_sorting_beats_dictionaries():
    tokens, orders = synthetic_tokens(12_000), 6

    def sorting() -> list[train_gpt.NgramCounts]:
        return list(train_gpt.iter_ngram_counts(torch.as_tensor(tokens).long(), orders))

    exact = sorting()[orders - 1]
    expected = dictionary_counts(tokens.tolist(), orders)
    np.testing.assert_array_equal([exact.context_count, exact.target_count], expected[:2])

    def plain() -> None:
        for order in range(1, orders + 1):
            dictionary_counts(tokens.tolist(), order)

    assert ratio(sorting, plain, 3) > 4


def test_mixing_beats_a_loop_over_tokens():
    tokens = synthetic_tokens(20_001)
    logp, entropy = stand_in_scores(tokens)
    few = 1000

    def plain() -> None:
        TableMixer().mix(tokens[: few + 1], logp[:few], entropy[:few])

    mixer = train_gpt.BackoffNgramMixer(train_gpt.Config())

    def fast() -> None:
        train_gpt.mix_scores(mixer, torch.from_numpy(tokens).long(), logp, entropy)

    assert ratio(fast, plain, 3) * (len(logp) / few) > 8  # a token


def test_the_scored_tail_costs_less_than_every_position():
    model = randomize(train_gpt.GPT(tiny_config(vocab_size=1024, num_layers=1, ve_layers=(), xsa_last_n=1)))
    ids = torch.randint(4, 1024, (2, 512))
    with torch.inference_mode():
        assert ratio(lambda: model.token_scores(ids, ids, 32), lambda: model.token_scores(ids, ids, 512)) > 1.5


def test_averaging_all_weights_at_once_beats_a_loop():
    model = train_gpt.GPT(dataclasses.replace(tiny_config(), num_layers=24, ve_layers=(), xsa_last_n=2))
    average = train_gpt.WeightAverage(model, model.config)
    shadow = [parameter.detach().clone() for parameter in average.sources]

    def plain() -> None:  # as an earlier submission did, name by name
        with torch.no_grad():
            for own, (_, parameter) in zip(shadow, model.named_parameters()):
                own.mul_(0.997).add_(parameter.detach(), alpha=0.003)

    assert ratio(lambda: average.update(10**6, 1.0), plain, 20) > 1.3


def test_slices_of_a_bank_have_one_backward_pass():
    model = train_gpt.GPT(tiny_config(model_dim=128, num_layers=16, ve_layers=(), xsa_last_n=2))
    bank, layers = model.mlp_up_bank, model.config.num_layers

    def fast() -> None:
        torch.stack([weights.up.sum() for weights in model._layer_weights(False)]).sum().backward()

    def plain() -> None:  # each index adds a whole bank to the gradient
        torch.stack([bank[layer].sum() for layer in range(layers)]).sum().backward()

    assert ratio(fast, plain, 10) > 1.3


def test_adamw_is_fused():
    model = train_gpt.GPT(tiny_config(model_dim=64, num_layers=16, ve_layers=(), xsa_last_n=2))
    own = train_gpt.Optimizers(model, model.config, make_runtime(model.config)).adamw
    members = [parameter for group in own.param_groups for parameter in group["params"]]
    plain = torch.optim.AdamW(members, 0.0, foreach=False)
    assert ratio(own.step, plain.step, 10) > 2


@pytest.fixture
def trainer(tmp_path: Path):
    settings = QUICK | dict(train_batch_tokens=512, micro_batch_tokens=256, mtp_num_heads=1, device="cpu")
    config = bench_config("swarm", tmp_path, **settings)
    write_random_shard(tmp_path, config, 10_000)
    trainer = make_bench_trainer(config, train_gpt.Runtime(config, {}))
    yield trainer
    close(trainer)


@pytest.mark.parametrize("qat", [False, True])
def test_no_step_between_log_lines_reads_a_value_back(trainer: train_gpt.Trainer, qat: bool):
    trainer.controls.qat = qat
    with HostReads() as reads:
        for _ in range(3):
            trainer.one_step()
    assert reads.count == 0
    assert trainer.step == 14


@pytest.mark.parametrize("qat", [False, True])
def test_no_step_makes_tensors_of_python_values(trainer: train_gpt.Trainer, monkeypatch: Any, qat: bool):
    """On a GPU that would be a copy from pageable memory, for which the host waits; the loader has a thread for it."""
    trainer.controls.qat = qat
    made: list[str] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                made.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch, "from_numpy"), (torch.Tensor, "new_tensor")):
        watch(owner, name)
    trainer.one_step()
    made.clear()  # the first batch has not been read ahead
    trainer.one_step()
    assert made == []


def test_a_log_line_reads_values_back_and_is_counted(trainer: train_gpt.Trainer):
    trainer.config = dataclasses.replace(trainer.config, train_log_every=trainer.step + 1)
    with HostReads() as reads:
        trainer.one_step()
    assert reads.count == 2  # loss and gradient norm


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: float(x.sum()), lambda x: bool(x.any()), lambda x: x[x > 0],
        lambda x: x.nonzero(), lambda x: x.masked_select(x > 0), lambda x: x.unique(), lambda x: torch.equal(x, x),
    ],
)  # fmt: skip
def test_the_counter_sees_every_way_to_read_a_value(read):
    x = torch.arange(4.0)
    with HostReads() as reads:
        read(x)
    assert reads.count >= 1


def longest_pause_s(action: Callable[[], object]) -> float:
    """The longest that this thread waits for the interpreter while another one works."""
    thread = threading.Thread(target=action)
    thread.start()
    return common.longest_pause_s(thread.is_alive)


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path: Path):
    """The library's `save` would hold every other thread up for as long as it takes."""
    tensors = {str(index): torch.randn(4_000_000) for index in range(8)}
    ours = functools.partial(train_gpt.write_state, tmp_path / "state", tensors)
    theirs = functools.partial(safetensors.torch.save, tensors)
    pauses, reference = (min(longest_pause_s(action) for _ in range(3)) for action in (ours, theirs))
    assert pauses < reference / 2


def test_the_profiler_finds_every_kind_of_kernel():
    config = tiny_config()
    trainer = make_trainer(randomize(train_gpt.GPT(config)), config)
    shares = kernel_shares(lambda: trainer.train_step(0, 1.0), torch.device("cpu"))
    assert set(shares) == {"attention", "GEMM", "pointwise"}
    assert all(share > 0 for share in shares.values())
    assert sum(shares.values()) == pytest.approx(1)


FAULTS = """
import resource, train_gpt, torch
with train_gpt.Runtime(train_gpt.Config(device="cpu"), {}):
    weight, faults = torch.ones(2**24, requires_grad=True), []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        (2 * weight).exp().square().sum().backward()
        weight.grad = None
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[2:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides by itself")
def test_freed_memory_is_kept():
    """Forward and backward over blocks of 64 MiB: each page that comes from the system anew is a fault."""

    def faults(script: str) -> int:
        done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert 3 * faults(FAULTS) < faults("import train_gpt\ntrain_gpt.keep_freed_memory = bool\n" + FAULTS)
