"""Runs that are interrupted and go on: the same to the bit at the same world size, the same trajectory at another."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build_kg
import pytest
import torch
from ranks import run_whole
from support import (
    TINY_VOCAB,
    Run,
    event,
    numbers,
    read_events,
    results,
    tiny_environ,
    tokenizer_pieces,
    train_rows,
    train_tokenizer,
)

import train_gpt

RESUMABLE = dict(CHECKPOINT_SECONDS=1e-9, RESUME="auto", TTT_CHUNK_TOKENS=300, TTT_EPOCHS=1)


def signal_self(number: int = signal.SIGTERM) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory) -> dict[str, Run]:
    """Uninterrupted runs of three recipes' mechanisms."""
    runs = {}
    for name, overrides in MECHANISMS.items():
        environ = tiny_environ(tiny_data, tmp_path_factory.mktemp(name), **overrides)
        process = run_whole(environ)
        assert process.returncode == 0, process.stderr
        runs[name] = Run(environ, process)
    return runs


MECHANISMS: dict[str, dict[str, Any]] = {
    "ema": dict(TTT_CHUNK_TOKENS=300, TTT_EPOCHS=1, LATE_QAT_THRESHOLD=0.5, WARMUP_STEPS=1),
    "swarm": dict(
        SWARM_ENABLED=1, SWARM_EVERY=3, LATE_QAT_THRESHOLD=0, MTP_NUM_HEADS=2, WEIGHT_AVERAGE="swa", SWA_EVERY=2,
        SWA_START_SCALE=0.9, TTT_ENABLED=0, MIXER="backoff",
    ),
    "frontier": dict(
        MIN_LR=0.1, MUON_EQ_ROWS=1, PARALLEL_RESIDUAL_FROM=2, REPEAT_LAYERS="1,2", REPEAT_FROM=0.5, QUANTIZER="gptq",
        CALIBRATION_TOKENS=384, LATE_QAT_THRESHOLD=0.5, TTT_ENABLED=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "step", "number"),
    [("ema", 7, signal.SIGTERM), ("swarm", 14, signal.SIGINT), ("frontier", 8, signal.SIGTERM)],
)
def test_a_signal_saves_and_the_rest_is_the_same_to_the_bit(
    whole, run_main, tmp_path, at_line, name, step, number
):
    """Model, momentum, moments, average, swarm, controls and position: whatever was lost would show in the bytes."""
    uninterrupted = whole[name]
    environ = uninterrupted.environ | dict(OUT_DIR=str(tmp_path), RESUME="auto")
    at_line(f"step:{step}/20 ", signal_self(number))
    outcome = run_main(environ)
    assert (outcome.returncode, outcome.stderr) == (128 + number, "")
    last = outcome.stdout.splitlines()[-1]
    saved = f"{tmp_path}/checkpoints/run/000001_step{step}.safetensors"
    assert last.startswith(f"stopped signal:{number.name} step:{step} checkpoint:{saved} ")
    assert not (tmp_path / "final_model.int6.ptz").exists()

    outcome = run_main(environ)
    assert outcome.returncode == 0, outcome.stderr
    assert f"resumed step:{step} from:{saved} " in outcome.stdout
    assert (tmp_path / "final_model.int6.ptz").read_bytes() == uninterrupted.artifact.read_bytes()
    rows = read_events(tmp_path / "logs" / "run.jsonl")
    assert numbers(rows) == numbers(uninterrupted.events)
    assert results(rows) == results(uninterrupted.events)
    assert [row["step"] for row in train_rows(rows)] == [*range(1, 21)]  # one log, no repeats
    text = (tmp_path / "logs" / "run.txt").read_text(encoding="utf-8")
    assert text.count("===== train_gpt.py =====") == 1
    if name == "swarm":
        cycles = [line for line in text.splitlines() if line.startswith("swarm cycle:")]
        assert [line.split()[1] for line in cycles] == [f"cycle:{n}" for n in range(1, 7)]
    times = [row["train_time_ms"] for row in train_rows(rows)]
    assert times == sorted(times)  # the training clock goes on where it stood


def test_one_clock_over_a_restart(tiny_data, run_main, tmp_path, at_line, monkeypatch):
    """Time that a run spent before it was interrupted counts against the cap."""
    environ = tiny_environ(
        tiny_data, tmp_path, RESUME="auto", MAX_WALLCLOCK_SECONDS=4, ITERATIONS=10**6, TTT_ENABLED=0, WARMUP_STEPS=1,
        COMPILE=1,
    )  # fmt: skip
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    at_line("step:5/", lambda: (time.sleep(3), signal_self()()))
    assert run_main(environ).returncode == 143
    outcome = run_main(environ)
    assert outcome.returncode == 0, outcome.stderr
    rows = read_events(tmp_path / "logs" / "run.jsonl")
    resumed = event(rows, "resumed")
    assert resumed["train_time_ms"] > 3000
    assert 4000 <= event(rows, "stopping_early: wallclock_cap")["train_time_ms"] < 4700
    names = [row["event"] for row in rows]
    again = names.index("resumed")
    steps = [number for number, name in enumerate(names) if name == "step" and number > again]
    assert names.index("warmup", again) < min(steps)  # compiled before the clock runs


@pytest.mark.parametrize(("name", "before", "after"), [("ema", 2, 1), ("ema", 1, 4), ("frontier", 1, 2)])
def test_another_world_size_goes_on_with_the_same_trajectory(whole, tmp_path, name, before, after):
    """Banks have 3 or 6 rows, so two and four ranks pad and cut them differently."""
    plan = whole[name]
    environ = plan.environ | dict(OUT_DIR=str(tmp_path), RESUME="auto", CHECKPOINT_SECONDS="1e-9", CHECKPOINT_KEEP="99")
    process = run_whole(environ, before)
    assert process.returncode == 0, process.stderr
    for path in (tmp_path / "checkpoints" / "run").iterdir():
        if not path.name.startswith("000008_"):
            path.unlink()
    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "final_model.int6.ptz").unlink()
    process = run_whole(environ, after)
    assert process.returncode == 0, process.stderr
    rows = read_events(tmp_path / "logs" / "run.jsonl")
    assert (event(rows, "resumed")["step"], event(rows, "resumed")["saved_by_ranks"]) == (7, before)
    ours, theirs = numbers(rows), numbers(plan.events)
    assert list(ours) == [*range(8, 21)]
    for step, (loss, norm, lr_scale, qat) in ours.items():
        expected = theirs[step]
        assert loss == pytest.approx(expected[0], abs=2e-3 if qat else 1e-4)
        assert norm == pytest.approx(expected[1], rel=2e-2 if qat else 1e-3)
        assert (lr_scale, qat) == expected[2:]


def test_old_checkpoints_are_removed_and_the_cost_is_logged(tiny_data, run_main, tmp_path):
    environ = tiny_environ(tiny_data, tmp_path, CHECKPOINT_SECONDS=1e-9, CHECKPOINT_KEEP=3, ITERATIONS=6, TTT_ENABLED=0)
    assert run_main(environ).returncode == 0
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*/*.safetensors"))
    assert names == ["000006_step5.safetensors", "000007_step6.safetensors", "000008_step6.safetensors"]
    rows = [row for row in read_events(tmp_path / "logs" / "run.jsonl") if row["event"] == "checkpoint"]
    saved = [row for row in rows if "step" in row["file"]]
    assert len(saved) == 8  # of every step, and at the end before and after the validation
    assert all(row["stall_ms"] > 0 and row["write_s"] > 0 and row["bytes"] > 10_000 for row in saved)
    plain = tiny_environ(tiny_data, tmp_path / "plain", CHECKPOINT_SECONDS=0, ITERATIONS=6)
    assert run_main(plain).returncode == 0
    names = sorted(path.name for path in (tmp_path / "plain" / "checkpoints" / "run").glob("*_step*"))
    assert names == ["000001_step6.safetensors", "000002_step6.safetensors"]


class Killed(BaseException):
    """What no code catches."""


def kill_in_validation(run_main: Callable[[dict[str, str]], Any], environ: dict[str, str]) -> None:
    """Run until the first validation, and no further."""

    def killed(_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Trainer, "validation_score", killed)
        with pytest.raises(Killed):
            run_main(environ)


@pytest.mark.parametrize("every", [0, 3])
def test_a_kill_during_a_validation_costs_no_step(tiny_data, run_main, tmp_path, every):
    """Neither in one on the way, nor in that behind the last step."""
    environ = tiny_environ(
        tiny_data, tmp_path, RESUME="auto", CHECKPOINT_SECONDS=0, ITERATIONS=6, VAL_LOSS_EVERY=every, TTT_ENABLED=0
    )
    kill_in_validation(run_main, environ)
    outcome = run_main(environ)
    assert outcome.returncode == 0, outcome.stderr
    assert f"resumed step:{every or 6} " in outcome.stdout
    steps = [row["step"] for row in train_rows(read_events(tmp_path / "logs" / "run.jsonl"))]
    assert steps == [*range(1, 7)]


@pytest.mark.parametrize(("every", "compiles"), [(3, 0), (0, 1)])
def test_a_restart_within_a_validation_scores_with_the_layers_of_then(
    tiny_data, run_main, tmp_path, monkeypatch, every, compiles
):
    """At step 3 none is repeated yet, behind the last step all are; priming for the compiler leaves no other."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    options = dict(
        RESUME="auto", CHECKPOINT_SECONDS=0, ITERATIONS=6, VAL_LOSS_EVERY=every, TTT_ENABLED=0, COMPILE=compiles,
        WARMUP_STEPS=1, REPEAT_LAYERS="1,2", REPEAT_FROM=0.7, QUANTIZER="gptq", CALIBRATION_TOKENS=384,
    )  # fmt: skip
    uninterrupted, killed = (tiny_environ(tiny_data, tmp_path / name, **options) for name in ("whole", "killed"))
    assert run_main(uninterrupted).returncode == 0
    kill_in_validation(run_main, killed)
    assert run_main(killed).returncode == 0
    folders = [Path(environ["OUT_DIR"]) for environ in (killed, uninterrupted)]
    for event_name in ("step_validation", "diagnostic"):
        scored, expected = (
            [row["val_bpb"] for row in read_events(folder / "logs" / "run.jsonl") if row["event"] == event_name]
            for folder in folders
        )
        assert scored == expected
    artifact, expected = ((folder / "final_model.int6.ptz").read_bytes() for folder in folders)
    assert artifact == expected


def test_training_goes_on_while_a_checkpoint_is_written(
    tiny_data, run_main, tmp_path, monkeypatch, at_line, at_backward
):
    """The disk is done with the first checkpoint only when two more steps are taken; none is due in between."""
    fsync, passed = os.fsync, threading.Event()
    waited: list[bool] = []

    def slow(descriptor: int) -> None:
        if not waited:
            waited.append(passed.wait(timeout=20))
        fsync(descriptor)

    def first_takes_long(number: int, loss: torch.Tensor) -> torch.Tensor:
        time.sleep(0 if number else 1.5)
        return loss

    monkeypatch.setattr(os, "fsync", slow)
    at_backward(first_takes_long)
    at_line("step:3/4 ", passed.set)
    environ = tiny_environ(tiny_data, tmp_path, CHECKPOINT_SECONDS=1.4, ITERATIONS=4, TTT_ENABLED=0)
    assert run_main(environ).returncode == 0
    assert waited == [True]
    names = [path.name for path in sorted((tmp_path / "checkpoints").glob("*/*_step*"))]
    assert names == ["000002_step4.safetensors", "000003_step4.safetensors"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tiny_data, run_main, tmp_path):
    """The library fills a file of its own making before it takes the name it was given."""
    folder = tmp_path / "checkpoints" / "run"
    folder.mkdir(parents=True)
    (folder / ".tmpabc123").write_bytes(b"half a checkpoint")
    assert run_main(tiny_environ(tiny_data, tmp_path, ITERATIONS=1, TTT_ENABLED=0, RESUME="auto")).returncode == 0
    names = {path.name for path in folder.iterdir()}
    assert "000001_step1.safetensors" in names
    assert not [name for name in names if name.startswith(".")]


@pytest.fixture(scope="module")
def trained(tiny_data, blob, tmp_path_factory) -> tuple[dict[str, str], Path]:
    """A finished short run with the checkpoints of its three last steps, of the last one two; tests copy it."""
    folder = tmp_path_factory.mktemp("trained")
    environ = tiny_environ(tiny_data, folder, **RESUMABLE, CHECKPOINT_KEEP=4, ITERATIONS=8, KG_ENABLED=1, KG_PATH=blob)
    process = run_whole(environ)
    assert process.returncode == 0, process.stderr
    return environ, folder


@pytest.fixture
def copy(trained, tmp_path) -> dict[str, str]:
    environ, folder = trained
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "logs")
    return environ | {"OUT_DIR": str(tmp_path / "copy")}


def checkpoint_paths(environ: dict[str, str]) -> list[Path]:
    return sorted((Path(environ["OUT_DIR"]) / "checkpoints").glob("*/*_step*.safetensors"))


def test_the_newest_whole_checkpoint_is_taken_and_torn_ones_are_named(copy, trained, run_main):
    after, torn, altered, good = reversed(checkpoint_paths(copy))
    after.unlink()
    torn.write_bytes(torn.read_bytes()[:-100])
    content = bytearray(altered.read_bytes())
    content[-5] ^= 1
    altered.write_bytes(content)
    for path in Path(copy["OUT_DIR"]).rglob("final_model.int6.ptz"):
        path.unlink()
    outcome = run_main(copy)
    assert outcome.returncode == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    skipped = [line for line in lines if line.startswith("checkpoint_skipped ")]
    assert [str(torn) in skipped[0], str(altered) in skipped[1], len(skipped)] == [True, True, 2]
    assert f"resumed step:6 from:{good}" in outcome.stdout
    same = (Path(copy["OUT_DIR"]) / "final_model.int6.ptz").read_bytes()
    assert same == (trained[1] / "final_model.int6.ptz").read_bytes()
    for path in checkpoint_paths(copy):
        path.write_bytes(b"")
    outcome = run_main(copy)
    assert outcome.returncode == 0
    assert "training from the beginning" in outcome.stdout
    assert "step:1/8 " in outcome.stdout


def test_a_named_checkpoint(copy, run_main, tmp_path):
    middle = checkpoint_paths(copy)[1]
    outcome = run_main(copy | {"RESUME": str(middle)})
    assert outcome.returncode == 0, outcome.stderr
    assert f"resumed step:7 from:{middle}" in outcome.stdout
    middle.write_bytes(b"no checkpoint")
    for path in (middle, tmp_path / "absent.safetensors", tmp_path, "./absent.safetensors"):
        outcome = run_main(copy | {"RESUME": str(path)})
        assert (outcome.returncode, outcome.stderr.count("\n")) == (2, 1)
        assert outcome.stderr.startswith("error: ")
        assert str(path).removeprefix("./") in outcome.stderr


def test_files_that_no_run_named_are_neither_read_nor_removed(copy, run_main):
    *_, newest = checkpoint_paths(copy)
    names = ("000099_step99_best.safetensors", "3b_step1.safetensors", "notes_step.safetensors")
    kept = [newest.with_name(name) for name in names]
    for path in kept:
        path.write_bytes(b"somebody's own")
    newest.unlink()
    outcome = run_main(copy | {"CHECKPOINT_KEEP": "1"})
    assert outcome.returncode == 0, outcome.stderr
    assert "checkpoint_skipped" not in outcome.stdout
    assert all(path.read_bytes() == b"somebody's own" for path in kept)


@pytest.mark.parametrize(
    ("overrides", "mentioned"),
    [
        (dict(MATRIX_LR="0.5"), "MATRIX_LR=0.027 (now 0.5)"),
        (dict(ITERATIONS="9"), "ITERATIONS=8 (now 9)"),
        (dict(DATA_PATH="{data}"), "train_shards"),
        (dict(TOKENIZER_PATH="{data}/other.model", KG_ENABLED="0"), "tokenizer, knowledge_graph;"),
        (dict(KG_PATH="{data}/other.txt"), "another knowledge_graph;"),
    ],
)
def test_another_run_is_not_continued(copy, run_main, tiny_data, tmp_path, overrides, mentioned):
    """Another setting of training, a shard whose last token differs, another tokenizer or graph."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    shard = data / "tiny_train_000001.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\5\0")
    train_tokenizer(data / "other.model", TINY_VOCAB, max_sentencepiece_length=3)
    pieces = tokenizer_pieces(tiny_data / "tokenizer.model")
    (data / "other.txt").write_text(build_kg.pack({i: 1 - i / len(pieces) for i in range(4, len(pieces))}, pieces))
    outcome = run_main(copy | {name: value.format(data=data) for name, value in overrides.items()})
    assert (outcome.returncode, outcome.stderr.count("\n")) == (2, 1)
    assert mentioned in outcome.stderr
    assert "RESUME=" in outcome.stderr


def test_what_does_not_change_training_may_change(copy, run_main, tiny_data, tmp_path):
    data = tmp_path / "elsewhere"
    shutil.copytree(tiny_data, data)
    overrides = dict(
        DATA_PATH=data, TOKENIZER_PATH=data / "tokenizer.model", EVAL_STRIDE=16, RUN_ID="other", SAMPLE_SEED=5,
        RESUME=checkpoint_paths(copy)[1],
    )  # fmt: skip
    outcome = run_main(copy | {name: str(value) for name, value in overrides.items()})
    assert outcome.returncode == 0, outcome.stderr
    assert "resumed step:7 " in outcome.stdout


def test_a_log_goes_on_after_its_last_whole_line(copy, run_main):
    logs = Path(copy["OUT_DIR"]) / "logs"
    logs.mkdir()
    (logs / "run.txt").write_text("first line\nsecond li")
    (logs / "run.jsonl").write_text('{"event": "first"}\n{"event": "sec')
    assert run_main(copy).returncode == 0
    assert [row["event"] for row in read_events(logs / "run.jsonl")][:2] == ["first", "environment"]
    assert (logs / "run.txt").read_text(encoding="utf-8").startswith("first line\nenvironment python:")


def test_calibration_after_a_restart_sees_the_same_tokens(tiny_data, run_main, tmp_path):
    """GPTQ rounds by Hessians of the tokens after the last step, so a run that goes on must read on from there."""
    environ = tiny_environ(
        tiny_data, tmp_path, **RESUMABLE, ITERATIONS=6, QUANTIZER="gptq", CALIBRATION_TOKENS=600, TTT_ENABLED=0,
        MIXER="none",
    )  # fmt: skip
    assert run_main(environ).returncode == 0
    artifact = tmp_path / "final_model.int6.ptz"
    first = artifact.read_bytes()
    for path in (artifact, tmp_path / "checkpoints" / "run" / artifact.name):
        path.unlink()
    outcome = run_main(environ)
    assert outcome.returncode == 0, outcome.stderr
    assert "quantizer:gptq" in outcome.stdout
    assert "train_loss" not in outcome.stdout.partition("resumed step:6 ")[2]
    assert artifact.read_bytes() == first
