"""Processes that die, are told to stop, or fail: what is left, what is said, and how long it takes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import SCRIPT, Run, free_port, read_events, tiny_environ
from test_resume import numbers, results

import train_gpt

# A rank's process runs the script after a patch: what a fault would do is done at a known place.
PATCHED = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
import train_gpt
rank, attempt = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
{patch}
code = train_gpt.main()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


def start(environ: dict[str, str], patch: str, tmp_path: Path, nproc: int = 1, restarts: int = 0) -> subprocess.Popen:
    """The patched script by itself, or under torchrun."""
    script = tmp_path / "patched.py"
    script.write_text(PATCHED.format(folder=str(SCRIPT.parent), patch=patch))
    command = [sys.executable]
    if nproc > 1:
        command += ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={nproc}"]
        command += [f"--max-restarts={restarts}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, str(script)], env=environ, stdout=pipe, stderr=pipe, encoding="utf-8")


AT_STEP = """
one_step = train_gpt.Trainer.one_step
def stepped(trainer):
    if (trainer.step, rank, attempt) in {faults}:
        {action}
    one_step(trainer)
train_gpt.Trainer.one_step = stepped
"""


def test_killed_ranks_under_torchrun_cost_only_what_came_after_the_last_checkpoint(tiny_run: Run, tmp_path):
    """Rank 1 dies at step 7, rank 0 of the restarted job at step 13; the loss curve is the uninterrupted one."""
    environ = tiny_run.environ | dict(OUT_DIR=str(tmp_path), RESUME="auto", CHECKPOINT_SECONDS="1e-9")
    patch = AT_STEP.format(faults={(7, 1, 0), (13, 0, 1)}, action="os.kill(os.getpid(), signal.SIGKILL)")
    process = start(environ, patch, tmp_path, nproc=2, restarts=2)
    _, stderr = process.communicate(timeout=150)
    assert process.returncode == 0, stderr
    rows = read_events(tmp_path / "logs" / "run.jsonl")
    assert len([row for row in rows if row["event"] == "resumed"]) == 2
    ours, theirs = numbers(rows), numbers(tiny_run.events)
    assert list(ours) == list(theirs)
    for name, (loss, *_) in ours.items():
        assert loss == pytest.approx(theirs[name][0], abs=1e-4)
    for name, loss in results(rows).items():
        assert loss == pytest.approx(results(tiny_run.events)[name], abs=1e-3)


SAVING = """
def fail(*arguments):
    raise train_gpt.ArtifactError("the disk is full")
train_gpt.save_artifact = fail
"""


@pytest.mark.parametrize(
    ("patch", "line", "traceback"),
    [
        (AT_STEP.format(faults={(3, 1, 0)}, action="raise train_gpt.DataError('a shard is gone')"),
         "error: rank 1: a shard is gone", False),
        (AT_STEP.format(faults={(3, 1, 0)}, action="raise ZeroDivisionError('by zero')"),
         "error: rank 1: ZeroDivisionError: by zero", True),
        (SAVING, "error: rank 0: the disk is full", False),  # rank 0's, while the other one waits for the artifact
        (AT_STEP.format(faults={(3, 0, 0), (3, 1, 0)}, action="raise train_gpt.DataError('all shards are gone')"),
         "error: rank 0: all shards are gone", False),
    ],
    ids=["data on rank 1", "bug on rank 1", "artifact on rank 0", "both ranks"],
)  # fmt: skip
def test_a_rank_that_fails_ends_the_job_with_one_error(tiny_data, tmp_path, patch, line, traceback):
    environ = tiny_environ(tiny_data, tmp_path, ITERATIONS=5)
    began = time.monotonic()
    process = start(environ, patch, tmp_path, nproc=2)
    _, stderr = process.communicate(timeout=90)
    assert time.monotonic() - began < 30 + 15  # thirty seconds from the error on, and what a start takes
    assert process.returncode != 0
    assert [text for text in stderr.splitlines() if "error: " in text and "torch" not in text] == [line]
    assert ("ZeroDivisionError" in stderr) == traceback
    assert len(re.findall('train_gpt.py", line', stderr)) < (9 if traceback else 1)


def test_a_shard_that_one_rank_cannot_read_costs_no_step(tiny_data, tmp_path):
    """Rank 1 alone fails to read ahead; both ranks save the state of that step before the job ends."""
    patch = """
read = train_gpt.TokenLoader._read
def torn(loader, step):
    if (rank, step) == (1, 6):
        raise train_gpt.DataError("a shard is gone")
    return read(loader, step)
train_gpt.TokenLoader._read = torn
"""
    process = start(tiny_environ(tiny_data, tmp_path), patch, tmp_path, nproc=2)
    _, stderr = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "error: rank 1: a shard is gone" in stderr.splitlines()
    (saved,) = (tmp_path / "checkpoints").glob("*_step*")
    assert saved.name == "000001_step6.safetensors"
    assert train_gpt.unpack_state(saved.read_bytes(), saved)[1]["step"] == 6


def wait_for(process: subprocess.Popen, path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (path.is_file() and text in path.read_text(encoding="utf-8")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


SLOW = "{0} = train_gpt.Trainer.{0}\ntrain_gpt.Trainer.{0} = lambda *a: (time.sleep({1}), {0}(*a))[1]\n"


def test_a_second_signal_ends_a_process_at_once(tiny_data, tmp_path):
    """Even one that is busy where no boundary comes."""
    environ = tiny_environ(tiny_data, tmp_path)
    process = start(environ, SLOW.format("validate", 60).replace("validate", "one_step"), tmp_path)
    wait_for(process, tmp_path / "logs" / "run.txt", "train_shards")
    time.sleep(0.5)
    for number in (signal.SIGTERM, signal.SIGINT):
        assert process.poll() is None
        process.send_signal(number)
        time.sleep(0.3)
    assert process.wait(timeout=5) == -signal.SIGINT  # 130 for a shell
    process.communicate()


def own_pid(folder: Path) -> str:
    """A patch by which every rank tells its process."""
    return f"open({str(folder)!r} + f'/pid{{rank}}', 'w').write(str(os.getpid()))"


def test_a_second_signal_ends_a_rank_at_once_and_its_alarm_the_other(tiny_data, tmp_path):
    """Rank 1 gets two signals; rank 0 then one of torchrun, and both are where no boundary comes."""
    environ = tiny_environ(tiny_data, tmp_path)
    busy = AT_STEP.format(faults={(0, 0, 0), (0, 1, 0)}, action=own_pid(tmp_path) + "; time.sleep(60)")
    process = start(environ, busy + "train_gpt.Runtime.GRACE_S = 3\n", tmp_path, nproc=2)
    for rank in (0, 1):
        wait_for(process, tmp_path / f"pid{rank}", "")
    time.sleep(0.3)
    for pause in (1.3, 0.0):  # a second signal within a second is the launcher's copy of the first
        os.kill(int((tmp_path / "pid1").read_text()), signal.SIGTERM)
        time.sleep(pause)
    began = time.monotonic()
    _, stderr = process.communicate(timeout=50)
    assert time.monotonic() - began < 15
    cause = stderr.partition("Root Cause")[2]
    assert re.search(r"rank +: 1 ", cause)
    assert re.search(r"exitcode +: 143 ", cause)


def test_ranks_stop_together_when_one_is_told_to(tiny_data, tmp_path):
    environ = tiny_environ(tiny_data, tmp_path, RESUME="auto", ITERATIONS=10_000, TRAIN_LOG_EVERY=10_000)
    patch = SLOW.format("one_step", 0.05) + own_pid(tmp_path) + "\n"
    process = start(environ, patch, tmp_path, nproc=2)
    wait_for(process, tmp_path / "logs" / "run.txt", "step:3/10000")
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=40)
    assert "stopped signal:SIGTERM step:" in stdout
    assert re.search(r"exitcode +: 143", stderr)
    assert len(list((tmp_path / "checkpoints").glob("*_step*.safetensors"))) == 1
    assert 'train_gpt.py", line' not in stderr


@pytest.mark.parametrize(("number", "everybody"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_to_torchrun_saves_the_run(tiny_data, tmp_path, number: signal.Signals, everybody: bool):
    """To the launcher alone, as by kill, or to it and all ranks at once, as by a scheduler."""
    environ = tiny_environ(tiny_data, tmp_path, RESUME="auto", ITERATIONS=10_000, TRAIN_LOG_EVERY=10_000)
    patch = SLOW.format("one_step", 0.05) + own_pid(tmp_path) + "\n"
    process = start(environ, patch, tmp_path, nproc=2)
    wait_for(process, tmp_path / "logs" / "run.txt", "step:3/10000")
    ranks = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    for pid in [*ranks, process.pid] if everybody else [process.pid]:
        os.kill(pid, number)
    stdout, stderr = process.communicate(timeout=40)
    assert process.returncode != 0
    assert f"stopped signal:{number.name} step:" in stdout
    assert len(list((tmp_path / "checkpoints").glob("*_step*.safetensors"))) == 1
    assert 'train_gpt.py", line' not in stderr
