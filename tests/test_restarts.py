"""Processes that die, are told to stop, or fail: what is left, what is said, and how long it takes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support import Run, numbers, read_events, results, run_script, start, tiny_environ, train_rows


def own_pid(folder: Path) -> str:
    """A patch by which every rank tells its process."""
    return f"open({str(folder)!r} + f'/pid{{rank}}', 'w').write(str(os.getpid()))\n"


def test_killed_ranks_under_torchrun_cost_only_what_came_after_the_last_checkpoint(tiny_run: Run, tmp_path):
    """Rank 1 dies at step 7, rank 0 of the restarted job at step 13; the loss curve is the uninterrupted one."""
    environ = tiny_run.environ | dict(OUT_DIR=str(tmp_path), RESUME="auto", CHECKPOINT_SECONDS="1e-9")
    patch = own_pid(tmp_path) + f"""
if (rank, attempt) == (0, 0):
    at_line("step:7/20 ", lambda: os.kill(int(open({str(tmp_path)!r} + "/pid1").read()), signal.SIGKILL))
if (rank, attempt) == (0, 1):
    at_line("step:13/20 ", lambda: os.kill(os.getpid(), signal.SIGKILL))
"""
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


# Each rank reads shards of its own, as on nodes that share no disk.
OWN_DATA = """
os.environ["DATA_PATH"] = {folder!r} + f"/data{{rank}}"
def damage(*ranks):
    for number in ranks:
        os.truncate({folder!r} + f"/data{{number}}/tiny_train_000000.bin", 2000)
"""
DIVIDES = """
def divide(number, loss):
    return loss * (6 // (6 - number))  # fails at the seventh pass
if rank == 1:
    at_backward(divide)
"""


def errors_of(stderr: str) -> list[str]:
    """Lines of an error, those of torchrun apart."""
    return [text for text in stderr.splitlines() if text.startswith("error: ")]


def last_words(stderr: str) -> str:
    """The last line that is more than a rule, without the name that torchrun gives it."""
    return [text for text in stderr.splitlines() if re.search("[a-z]", text)][-1].strip().removeprefix("traceback : ")


def run_with_own_data(tiny_data: Path, folder: Path, *damaged: int) -> str:
    """Two ranks, of which these find a shard cut short at the fourth step; what was written to stderr."""
    for rank in range(2):
        shutil.copytree(tiny_data, folder / f"data{rank}")
    patch = OWN_DATA.format(folder=str(folder)) + f"if rank == 0: at_line('step:4/20 ', lambda: damage(*{damaged}))\n"
    began = time.monotonic()
    process = start(tiny_environ(tiny_data, folder / "out"), patch, folder, nproc=2)
    _, stderr = process.communicate(timeout=90)
    assert time.monotonic() - began < 30 + 15  # thirty seconds from the error on, and what a start takes
    assert process.returncode != 0
    assert 'train_gpt.py", line' not in stderr
    return stderr


def test_a_shard_that_one_rank_cannot_read_costs_no_step(tiny_data, tmp_path):
    """Rank 1 alone fails to read ahead; both ranks save the state of that step before the job ends with one error."""
    stderr = run_with_own_data(tiny_data, tmp_path, 1)
    (error,) = errors_of(stderr)
    assert last_words(stderr) == error
    assert error.startswith(f"error: rank 1: {tmp_path}/data1/tiny_train_000000.bin ")
    assert "has changed during the run" in error
    rows = read_events(tmp_path / "out" / "logs" / "run.jsonl")
    (saved,) = (tmp_path / "out" / "checkpoints").glob("*/*_step*")
    assert saved.name == f"000001_step{len(train_rows(rows))}.safetensors"
    assert 4 <= len(train_rows(rows)) < 9


def test_a_fault_of_all_ranks_is_told_once(tiny_data, tmp_path):
    stderr = run_with_own_data(tiny_data, tmp_path, 0, 1)
    (error,) = errors_of(stderr)
    assert last_words(stderr) == error
    assert error.startswith(f"error: rank 0: {tmp_path}/data0/tiny_train_000000.bin ")


def test_a_bug_on_one_rank_ends_the_job_with_its_traceback(tiny_data, tmp_path):
    process = start(tiny_environ(tiny_data, tmp_path, ITERATIONS=5), DIVIDES, tmp_path, nproc=2)
    _, stderr = process.communicate(timeout=45)
    assert process.returncode != 0
    (error,) = errors_of(stderr)
    assert error.startswith("error: rank 1: ZeroDivisionError: ")
    assert 0 < len(re.findall('train_gpt.py", line', stderr)) < 9


def test_an_artifact_that_cannot_be_written_ends_the_job(tiny_data, tmp_path):
    """The error is rank 0's, while the other rank waits for the artifact."""
    (tmp_path / "final_model.int6.ptz" / "in the way").mkdir(parents=True)
    process = run_script(tiny_environ(tiny_data, tmp_path, ITERATIONS=2), nproc=2, timeout_s=45)
    assert process.returncode != 0
    (error,) = errors_of(process.stderr)
    assert last_words(process.stderr) == error
    assert error.startswith(f"error: rank 0: cannot write the artifact {tmp_path}/final_model.int6.ptz: ")
    assert 'train_gpt.py", line' not in process.stderr


@pytest.mark.parametrize("wrong", [dict(ITERATIONS="-5"), dict(TOKENIZER_PATH="absent.model")])
def test_under_torchrun_a_users_error_is_the_last_thing_said(tiny_data, tmp_path, wrong):
    process = run_script(tiny_environ(tiny_data, tmp_path, **wrong), nproc=2, timeout_s=45)
    assert process.returncode != 0
    (error,) = errors_of(process.stderr)
    assert error.startswith("error: rank 0: ")
    assert str(*wrong.values()) in error
    assert last_words(process.stderr) == error
    assert len(re.findall(r"exitcode *: 2 ", process.stderr)) == 1  # torchrun ended the other rank


def wait_for(process: subprocess.Popen, path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (path.is_file() and text in path.read_text(encoding="utf-8")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def busy(folder: Path) -> str:
    """A patch by which the first backward pass tells the process and then takes a minute."""
    return f"""
def wait_a_minute(number, loss):
    {own_pid(folder)}
    time.sleep(60)
at_backward(wait_a_minute)
"""


def test_a_second_signal_ends_a_process_at_once(tiny_data, tmp_path):
    """Even one that is busy where no boundary comes."""
    environ = tiny_environ(tiny_data, tmp_path)
    process = start(environ, busy(tmp_path), tmp_path)
    wait_for(process, tmp_path / "pid0", "")
    time.sleep(0.3)
    for number in (signal.SIGTERM, signal.SIGINT):
        assert process.poll() is None
        process.send_signal(number)
        time.sleep(1)
    assert process.wait(timeout=15) == -signal.SIGINT  # 130 for a shell
    process.communicate()


def test_a_second_signal_ends_a_rank_at_once_and_its_alarm_the_other(tiny_data, tmp_path):
    """Rank 1 gets two signals; rank 0 then one of torchrun, and both are where no boundary comes."""
    environ = tiny_environ(tiny_data, tmp_path)
    process = start(environ, busy(tmp_path) + "train_gpt.Runtime.GRACE_S = 3\n", tmp_path, nproc=2)
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
    patch = "slow_backward(0.05)\n" + own_pid(tmp_path)
    process = start(environ, patch, tmp_path, nproc=2)
    wait_for(process, tmp_path / "logs" / "run.txt", "step:3/10000")
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=40)
    assert "stopped signal:SIGTERM step:" in stdout
    assert re.search(r"exitcode +: 143", stderr)
    assert len(list((tmp_path / "checkpoints").glob("*/*_step*.safetensors"))) == 1
    assert 'train_gpt.py", line' not in stderr


@pytest.mark.parametrize(
    ("number", "everybody", "nproc"), [(signal.SIGTERM, False, 2), (signal.SIGINT, True, 2), (signal.SIGTERM, True, 1)]
)
def test_a_signal_to_torchrun_saves_the_run(tiny_data, tmp_path, number: signal.Signals, everybody: bool, nproc: int):
    """To the launcher alone, as by kill, or to it and all ranks at once, as by a scheduler."""
    environ = tiny_environ(tiny_data, tmp_path, RESUME="auto", ITERATIONS=10_000, TRAIN_LOG_EVERY=10_000)
    patch = "slow_backward(0.05)\n" + own_pid(tmp_path)
    process = start(environ, patch, tmp_path, nproc=nproc)
    wait_for(process, tmp_path / "logs" / "run.txt", "step:3/10000")
    ranks = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(nproc)]
    for pid in [*ranks, process.pid] if everybody else [process.pid]:
        os.kill(pid, number)
    stdout, stderr = process.communicate(timeout=40)
    assert process.returncode != 0
    assert f"stopped signal:{number.name} step:" in stdout
    assert len(list((tmp_path / "checkpoints").glob("*/*_step*.safetensors"))) == 1
    assert 'train_gpt.py", line' not in stderr
