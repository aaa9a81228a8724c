"""Bad numbers, full disks, vanishing files, jumping clocks: what stops a run, what does not, and what it says."""

from __future__ import annotations

import ast
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_support import make_trainer, tiny_config
from support import SCRIPT, event, events_of, run_script, tiny_environ, train_rows, write_shard

import train_gpt
from train_gpt import Trainer


def one_error(outcome: Any, *mentioned: object) -> None:
    assert outcome.returncode == 2, outcome.stderr or outcome.stdout
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert "Traceback" not in outcome.stdout
    for text in mentioned:
        assert str(text) in outcome.stderr


# ---- numbers -----------------------------------------------------------------------------------------------------


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    tensors |= {f"momentum {i}": shard.momentum.clone() for i, shard in enumerate(trainer.optimizers.muon.shards)}
    moments = trainer.optimizers.adamw.state_dict()["state"].items()
    return tensors | {f"{name} {number}": value.clone() for number, row in moments for name, value in row.items()}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    config = tiny_config()
    trainer, plain = (make_trainer(train_gpt.GPT(config), config) for _ in range(2))
    losses = trainer.losses
    for each in (trainer, plain):
        each.train_step(0, 1.0)
    before = state_of(trainer)
    vars(trainer)["losses"] = lambda *a: tuple(loss * bad for loss in losses(*a))
    assert not math.isfinite(trainer.train_step(1, 1.0))
    after = state_of(trainer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert trainer.optimizers.skipped.tolist() == [1, 1]
    trainer.train_step(1, 1.0)
    assert trainer.optimizers.skipped.tolist() == [2, 2]
    trainer.losses = losses
    for each in (trainer, plain):
        each.train_step(1, 1.0)
    assert trainer.optimizers.skipped.tolist() == [0, 2]
    expected = state_of(plain)  # as if the bad steps had never been
    assert [name for name, value in state_of(trainer).items() if not torch.equal(value, expected[name])] == []


@pytest.fixture
def poison(at_backward) -> Callable[[range], None]:
    """Make the gradients of these steps NaN, of runs of three micro-batches a step."""

    def arrange(steps: range) -> None:
        at_backward(lambda number, loss: loss * math.nan if number // 3 in steps else loss)

    return arrange


def test_skipped_updates_are_counted_and_logged(tiny_data, run_main, tmp_path, poison):
    poison(range(4, 8))
    environ = tiny_environ(tiny_data, tmp_path, TTT_ENABLED=0, CHECKPOINT_SECONDS=1e-9, CHECKPOINT_KEEP=99)
    outcome = run_main(environ)
    assert outcome.returncode == 0, outcome.stderr
    assert event(events_of(environ), "batch")["grad_accum_steps"] == 3
    rows = [row for row in events_of(environ) if row["event"] == "update_skipped"]
    assert [(row["step"], row["in_all"]) for row in rows] == [(5, 1), (6, 2), (7, 3), (8, 4)]
    steps = {int(path.stem.partition("_step")[2]) for path in (tmp_path / "checkpoints").glob("*/*_step*")}
    assert steps == set(range(21)) - {5, 6, 7, 8}  # nothing is saved while something is wrong
    assert math.isfinite(event(events_of(environ), "final_int8_zlib_roundtrip_exact")["val_bpb"])


def test_what_was_skipped_before_a_restart_counts(tiny_data, run_main, tmp_path, poison, at_line):
    """Three updates in a row before the restart and two after it are five."""
    poison(range(6, 99))
    environ = tiny_environ(tiny_data, tmp_path, RESUME="auto", CHECKPOINT_SECONDS=0)
    at_line("step:9/20 ", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_main(environ).returncode == 143
    one_error(run_main(environ), "5 updates in a row", "at step 11", "000001_step9.safetensors")
    assert [row["in_all"] for row in events_of(environ) if row["event"] == "update_skipped"] == [1, 2, 3, 4, 5]


def test_updates_skipped_in_a_row_end_the_run_and_name_the_last_checkpoint(tiny_data, run_main, tmp_path, poison):
    poison(range(6, 99))
    outcome = run_main(tiny_environ(tiny_data, tmp_path, CHECKPOINT_SECONDS=1e-9))
    one_error(outcome, "5 updates in a row", "at step 11", f"{tmp_path}/checkpoints/run/000007_step6.safetensors")
    assert not (tmp_path / "final_model.int6.ptz").exists()


# ---- disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_costs_no_step(small_disk, tiny_data, run_main):
    (small_disk / "ballast").write_bytes(bytes(1_000_000))
    environ = tiny_environ(tiny_data, small_disk, TTT_ENABLED=0, CHECKPOINT_SECONDS=1e-9)
    outcome = run_main(environ)
    assert outcome.returncode == 2
    errors = [line for line in outcome.stderr.splitlines() if not line.startswith("warning: cannot write the log ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: cannot write the artifact ")
    assert "No space left" in errors[0]
    assert "OUT_DIR" in errors[0]
    assert "step:20/20 train_loss" in outcome.stdout
    assert "checkpoint_failed" in outcome.stdout
    assert not list((small_disk / "checkpoints").rglob("*.partial"))
    (small_disk / "ballast").unlink()
    assert run_main(environ | {"RESUME": "auto"}).returncode == 0


def test_a_read_only_folder_is_an_error_before_anything_is_done(small_disk, tiny_data, run_main):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    one_error(run_main(tiny_environ(tiny_data, small_disk)), small_disk, "OUT_DIR", "Read-only file system")


def test_a_failed_artifact_is_written_by_the_next_run_from_the_last_checkpoint(tiny_data, run_main, tmp_path):
    environ = tiny_environ(tiny_data, tmp_path, TTT_ENABLED=0, RESUME="auto")
    own, newest = tmp_path / "checkpoints" / "run" / "final_model.int6.ptz", tmp_path / "final_model.int6.ptz"
    for path in (own, newest):
        (path / "in the way").mkdir(parents=True)
    one_error(run_main(environ), newest, "cannot write the artifact")
    for path in (own, newest):
        shutil.rmtree(path)
    outcome = run_main(environ)
    assert outcome.returncode == 0, outcome.stderr
    assert "train_loss" not in outcome.stdout
    expected = tiny_environ(tiny_data, tmp_path / "plain", TTT_ENABLED=0)
    assert run_main(expected).returncode == 0
    artifact = (tmp_path / "final_model.int6.ptz").read_bytes()
    assert artifact == (tmp_path / "plain" / "final_model.int6.ptz").read_bytes()
    for damaged in (own, newest):
        damaged.write_bytes(artifact[:-1])
        assert run_main(environ).returncode == 0
        assert damaged.read_bytes() == artifact


def test_an_artifact_does_not_depend_on_the_folder_of_the_checkpoints(tiny_data, run_main, tmp_path):
    (tmp_path / "checkpoints").write_bytes(b"a file in the way")
    outcome = run_main(tiny_environ(tiny_data, tmp_path, ITERATIONS=2, TTT_ENABLED=0))
    assert outcome.returncode == 0, outcome.stderr
    assert "checkpoint_failed" in outcome.stdout
    assert outcome.stdout.splitlines()[-1].startswith("final_int8_zlib_roundtrip_exact ")
    train_gpt.load_artifact(tmp_path / "final_model.int6.ptz")


def test_a_console_that_cannot_show_a_name_does_not_stop_a_run(tiny_data, tmp_path):
    out = tmp_path / "caf\u00e9"
    environ = tiny_environ(tiny_data, out, ITERATIONS=1, TTT_ENABLED=0, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    process = run_script(environ)
    assert (process.returncode, process.stderr) == (0, "")
    assert "caf\\xe9/final_model.int6.ptz" in process.stdout
    assert "caf\u00e9/final_model.int6.ptz" in (out / "logs" / "run.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_log_disks_do_not_stop_a_run(tiny_data, tmp_path):
    """Both log files and the console."""
    (tmp_path / "logs").mkdir()
    for suffix in ("txt", "jsonl"):
        (tmp_path / "logs" / f"run.{suffix}").symlink_to("/dev/full")
    environ = tiny_environ(tiny_data, tmp_path, ITERATIONS=3, TTT_ENABLED=0, RESUME="auto")  # goes on with these logs
    environ |= dict(PYTHONDEVMODE="1", PYTHONWARNINGS="ignore")  # tells of failures to close before Python 3.13 too
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, str(SCRIPT)], env=environ, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "final_model.int6.ptz").exists()
    lines = process.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("warning: cannot write the log ") and "No space left" in line for line in lines)


def test_a_console_that_is_gone_does_not_stop_a_run(tiny_data, tmp_path):
    """As behind `2>&1 | head`: neither stream can be written, not even the warning that says so."""
    environ = tiny_environ(tiny_data, tmp_path, ITERATIONS=3, TTT_ENABLED=0)
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([sys.executable, str(SCRIPT)], env=environ, stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert process.returncode == 0
    assert events_of(environ)[-1]["event"] == "final_int8_zlib_roundtrip_exact"
    assert "\nenvironment python:" in (tmp_path / "logs" / "run.txt").read_text(encoding="utf-8")


# ---- shards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "mentioned"),
    [
        (lambda path: path.unlink(), "any more: No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "has changed during the run"),
        (lambda path: path.write_bytes(b""), "has changed during the run"),
        (lambda path: write_shard(path, np.full((path.stat().st_size - 1024) // 2, 300)), "has changed during the run"),
    ],
    ids=["vanished", "truncated", "emptied", "rewritten"],
)
def test_a_shard_that_vanishes_or_changes(tiny_data, run_main, tmp_path, at_line, damage, mentioned):
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    path = data / "tiny_train_000000.bin"
    at_line("step:4/20 ", lambda: damage(path))
    outcome = run_main(tiny_environ(data, tmp_path / "out", TRAIN_BATCH_TOKENS=12 * 32))
    one_error(outcome, path, mentioned)
    assert "step:4/20" in outcome.stdout
    assert "step:7/20" not in outcome.stdout


def test_a_shard_that_comes_back_costs_no_step(tiny_data, run_main, tmp_path, monkeypatch, at_line):
    """No checkpoint is due when the shard goes: that of the last step taken is written for it, by a slow disk."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(tiny_data, data)
    path, fsync = data / "tiny_train_000000.bin", os.fsync
    at_line("step:4/20 ", lambda: path.rename(tmp_path / "away"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.15), fsync(descriptor)))
    environ = tiny_environ(data, out, RESUME="auto", TTT_ENABLED=0)
    outcome = run_main(environ)
    one_error(outcome, path, "RESUME=auto goes on")
    (saved,) = (out / "checkpoints").glob("*/*_step*")
    done = int(saved.stem.partition("_step")[2])
    assert f"step:{done}/20 " in outcome.stdout
    assert f"step:{done + 1}/20 " not in outcome.stdout
    (tmp_path / "away").rename(path)
    assert f"resumed step:{done} " in run_main(environ).stdout
    assert run_main(tiny_environ(tiny_data, tmp_path / "plain", TTT_ENABLED=0)).returncode == 0
    names = [folder / "final_model.int6.ptz" for folder in (out, tmp_path / "plain")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_shard_that_was_only_touched(tiny_data, run_main, tmp_path, at_line):
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    at_line("step:4/6 ", (data / "tiny_train_000000.bin").touch)
    assert run_main(tiny_environ(data, tmp_path / "out", ITERATIONS=6, TTT_ENABLED=0)).returncode == 0


# ---- clocks ------------------------------------------------------------------------------------------------------


def test_jumps_of_the_wall_clock_change_nothing(tiny_data, run_main, tmp_path, monkeypatch):
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(0, 4e9))
    environ = tiny_environ(tiny_data, tmp_path, MAX_WALLCLOCK_SECONDS=100, TTT_ENABLED=0, CHECKPOINT_SECONDS=1e-9)
    assert run_main(environ).returncode == 0
    rows = train_rows(events_of(environ))
    assert len(rows) == 20
    times = [row["train_time_ms"] for row in rows]
    assert times == sorted(times)
    assert 0 < times[-1] < 60_000
    names = [path.name for path in sorted((tmp_path / "checkpoints" / "run").glob("*_step*"))]
    assert names[-1] == "000022_step20.safetensors"


def test_no_decision_reads_the_wall_clock():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names = {node.attr for node in attributes if ast.unparse(node.value) == "time"}
    assert names <= {"perf_counter", "monotonic", "sleep", "strftime"}


@pytest.mark.parametrize("reserve", [0.0, 40.0])
def test_the_last_seconds_before_the_cap_count_queued_work(monkeypatch, reserve):
    """On CUDA the host runs ahead of the device: near the end of training it waits for it, elsewhere never."""
    config = tiny_config(max_wallclock_seconds=100.0 + reserve, train_reserve_seconds=reserve)
    trainer = make_trainer(train_gpt.GPT(config), config)
    waited: list[float] = []
    monkeypatch.setattr(trainer.runtime, "synchronize", lambda: waited.append(trainer.elapsed_s))
    for elapsed in (0.0, 50.0, 96.9, 97.5, 99.9, 100.0):
        trainer.elapsed_s = trainer.clock.total_s = elapsed
        trainer.agree_with_ranks()
    assert waited == [97.5, 99.9]
