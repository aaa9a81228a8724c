"""What a run takes from the machine that it is on: the dtype of its products, its micro-batch, its time and memory."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from support import Run, event, numbers, read_events, results, run_script, tiny_environ, train_rows

import train_gpt

Start = Callable[..., tuple[Outcome, list[dict[str, Any]]]]


@pytest.fixture
def start(run_main: Callable[[dict[str, str]], Outcome], tiny_data: Path, tmp_path: Path) -> Start:
    """A run in this process with the tiny settings, changed as asked: what it said, and its log."""
    counter = itertools.count()

    def run(**overrides: object) -> tuple[Outcome, list[dict[str, Any]]]:
        out_dir = tmp_path / str(next(counter))
        outcome = run_main(tiny_environ(tiny_data, out_dir, **overrides))
        return outcome, read_events(out_dir / "logs" / "run.jsonl")

    return run


# ---- bf16 --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cost_of_bf16(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A processor on which a product of bf16 matrices takes so many times as long as one of fp32 matrices."""

    def take(cost: float) -> None:
        now, honest = itertools.count(), train_gpt.F.linear
        clock = [0.0]

        def linear(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
            clock[0] += (cost if rows.dtype == torch.bfloat16 else 1.0) * (1 + next(now) % 3)  # now and then disturbed
            return honest(rows, matrix)

        def pays(device: torch.device) -> bool:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train_gpt.F, "linear", linear)
                patch.setattr(train_gpt.time, "perf_counter", lambda: clock[0])
                return measured(device)

        monkeypatch.setattr(train_gpt, "bf16_pays", pays)

    measured = train_gpt.bf16_pays
    return take


@pytest.mark.parametrize(("cost", "dtype"), [(0.5, "bf16"), (0.9, "fp32"), (1.9, "fp32")])
def test_bf16_is_taken_where_it_was_measured_to_pay(start: Start, cost_of_bf16, cost: float, dtype: str):
    cost_of_bf16(cost)
    outcome, rows = start(COMPUTE_DTYPE=None, ITERATIONS=1, TTT_ENABLED=0)
    assert outcome.returncode == 0, outcome.stderr
    assert event(rows, "machine")["compute_dtype"] == dtype
    assert event(rows, "machine")["bf16_pays"] == int(dtype == "bf16")
    assert event(rows, "config")["compute_dtype"] == dtype  # which a resumed run is held to


def test_a_dtype_that_is_set_goes_before_what_was_measured(start: Start, cost_of_bf16):
    cost_of_bf16(2.0)
    _, rows = start(COMPUTE_DTYPE="bf16", ITERATIONS=1, TTT_ENABLED=0)
    assert event(rows, "machine")["compute_dtype"] == "bf16"


def test_training_scoring_and_ttt_in_bf16_stay_near_fp32(start: Start, tiny_run: Run):
    """Products lose 16 of 24 bits; losses of a tiny model move by some thousandths, and no weight is stored in bf16."""
    outcome, rows = start(COMPUTE_DTYPE="bf16")
    again, repeated = start(COMPUTE_DTYPE="bf16")
    assert outcome.returncode == again.returncode == 0, outcome.stderr
    in_fp32 = train_rows(tiny_run.events)
    for row, other in zip(train_rows(rows), in_fp32, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=0.02)
    assert [row["train_loss"] for row in train_rows(rows)] != [row["train_loss"] for row in in_fp32]
    scored, expected = results(rows), results(tiny_run.events)
    assert scored.keys() == expected.keys()
    assert scored == {name: pytest.approx(value, abs=0.03) for name, value in expected.items()}
    assert results(repeated) == scored  # bit for bit


def test_a_run_that_goes_on_elsewhere_keeps_the_dtype_it_began_with(
    run_main: Callable[[dict[str, str]], Outcome], tiny_data: Path, tmp_path: Path, cost_of_bf16, at_line
):
    """Also over a second restart: the rest of the run is that of an uninterrupted one, bit for bit."""
    cost_of_bf16(0.5)
    settings: dict[str, Any] = dict(COMPUTE_DTYPE=None, TTT_ENABLED=0)
    assert run_main(tiny_environ(tiny_data, tmp_path / "whole", **settings)).returncode == 0
    whole = read_events(tmp_path / "whole" / "logs" / "run.jsonl")
    environ = tiny_environ(tiny_data, tmp_path / "parts", **settings, RESUME="auto")
    for step in (6, 12):
        at_line(f"step:{step}/20 ", lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_main(environ).returncode == 128 + signal.SIGTERM
        cost_of_bf16(2.0)
    assert run_main(environ).returncode == 0
    parts = read_events(tmp_path / "parts" / "logs" / "run.jsonl")
    assert [row["compute_dtype"] for row in parts if row["event"] == "machine"] == ["bf16", "fp32", "fp32"]
    assert [row["compute_dtype"] for row in parts if row["event"] == "resumed"] == ["bf16", "bf16"]
    assert numbers(parts) == numbers(whole)


def test_a_dtype_that_is_set_for_the_rest_of_a_run_goes_on_with_it(
    run_main: Callable[[dict[str, str]], Outcome], tiny_data: Path, tmp_path: Path, at_line
):
    """A run without a name of its own is found again, and keeps what it began with."""
    environ = tiny_environ(tiny_data, tmp_path, RUN_ID="", RESUME="auto", ITERATIONS=4, TTT_ENABLED=0)
    at_line("step:2/4 ", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_main(environ).returncode == 128 + signal.SIGTERM
    outcome = run_main(environ | {"COMPUTE_DTYPE": "bf16"})
    assert outcome.returncode == 0, outcome.stderr
    assert " compute_dtype:fp32\n" in outcome.stdout[outcome.stdout.index("resumed step:2 ") :]


def test_masters_gradients_and_logits_stay_fp32_in_a_bf16_model():
    config = train_gpt.Config(
        vocab_size=64, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4, ve_layers=(1,)
    )
    model = train_gpt.GPT(config)
    model.compute_dtype = torch.bfloat16
    ids = torch.randint(64, (2, 8))
    hidden, head = model.forward_hidden(ids)
    assert (hidden.dtype, head.dtype) == (torch.bfloat16, torch.bfloat16)
    assert model.logits(ids).dtype == torch.float32
    model.training_losses(ids, ids, False)[0].backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters() if p.grad is not None}
    assert model.qo_bank.dtype == torch.float32


# ---- micro-batches -----------------------------------------------------------------------------------------------


def test_a_micro_batch_is_what_memory_allows(start: Start, monkeypatch, tiny_run: Run):
    """A smaller machine cuts the batch into more parts, and computes the same."""
    found = {}
    for gibibytes in (16, 0.00025):
        monkeypatch.setattr(train_gpt, "cpu_memory", lambda size=gibibytes: size * 2**30)
        outcome, rows = start(MICRO_BATCH_TOKENS=0, TTT_ENABLED=0)
        assert outcome.returncode == 0, outcome.stderr
        found[gibibytes] = event(rows, "machine")["micro_batch_tokens"], event(rows, "batch")["grad_accum_steps"]
        for row, other in zip(train_rows(rows), train_rows(tiny_run.events), strict=True):
            assert row["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
    assert found[16][1] == 1  # the whole batch at once
    assert found[0.00025][1] > 1
    assert 32 <= found[0.00025][0] < found[16][0] == 4096


def test_ranks_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(train_gpt, "cpu_memory", lambda: 4 * 2.0**30)
    config = train_gpt.Config(device="cpu", train_seq_len=256)
    tokens = []
    for ranks in ("1", "4"):
        runtime = train_gpt.Runtime(config, {"LOCAL_WORLD_SIZE": ranks})
        tokens.append(train_gpt.fitting_tokens(config, runtime, 4))
    assert tokens[0] == pytest.approx(4 * tokens[1], abs=4)
    assert train_gpt.fitting_tokens(config, train_gpt.Runtime(config, {}), 2) > tokens[0]  # bf16 takes less


# ---- time and memory that run out --------------------------------------------------------------------------------


def test_nothing_is_primed_where_nothing_is_compiled(start: Start):
    _, rows = start(WARMUP_STEPS=20, ITERATIONS=1, TTT_ENABLED=0)
    assert "warmup" not in {row["event"] for row in rows}


@pytest.mark.parametrize(("cap_s", "said"), [(0.01, True), (1000, False), (0, False)])
def test_a_cap_that_leaves_next_to_no_steps_is_said_in_the_first_one(start: Start, cap_s: float, said: bool):
    outcome, rows = start(MAX_WALLCLOCK_SECONDS=cap_s, ITERATIONS=3, TTT_ENABLED=0, MICRO_BATCH_TOKENS=32)
    assert outcome.returncode == 0, outcome.stderr
    names = [row["event"] for row in rows]
    assert ("few_steps" in names) == said
    if said:
        assert names.index("few_steps") < names.index("step")
        assert event(rows, "few_steps")["expected"] < 20
        assert "RECIPE=laptop" in outcome.stdout


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 79 GiB"),
    ],
)
def test_memory_that_runs_out_ends_in_one_line(start: Start, monkeypatch, error: Exception):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(train_gpt.GPT, "training_losses", fail)
    outcome, _ = start()
    assert outcome.returncode == 2
    [line] = [line for line in outcome.stderr.splitlines() if line]
    assert line.startswith("error: out of memory")
    assert "MICRO_BATCH_TOKENS" in line


def test_a_compiler_that_is_missing_ends_in_one_line(tiny_data: Path, tmp_path: Path):
    environ = tiny_environ(tiny_data, tmp_path, COMPILE=1, WARMUP_STEPS=1, CXX="no-such-compiler")
    outcome = run_script(environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})  # nothing is compiled yet
    assert outcome.returncode == 2
    [line] = [line for line in outcome.stderr.splitlines() if line]
    assert line.startswith("error: compiling failed")
    assert "COMPILE=0" in line


def test_another_failure_is_not_taken_for_memory(start: Start, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train_gpt.GPT, "training_losses", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        start()
