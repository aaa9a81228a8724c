"""Runs that share a folder leave each other alone, and a run does not depend on how its streams and paths are made."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import SCRIPT, read_events, tiny_environ

import train_gpt

SHORT = dict(RUN_ID=None, ITERATIONS=6, VAL_TOKENS=200, EVAL_STRIDE=32)


@contextmanager
def running(environ: dict[str, str], until: str) -> Iterator[subprocess.Popen[str]]:
    """The script in a process of its own, which has printed a line that begins so; it is killed at the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, str(SCRIPT)], env=environ, stdout=pipe, encoding="utf-8") as process:
        assert process.stdout is not None
        assert any(line.startswith(until) for line in process.stdout)
        yield process
        process.kill()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_stopped_run_goes_on_after_other_runs_in_its_folder(tiny_data, run_main, tmp_path):
    """Its checkpoint outlives two seeds that keep one checkpoint each, and RESUME=auto finds it among theirs."""
    settings = SHORT | dict(ITERATIONS=40, CHECKPOINT_KEEP=1)
    with running(tiny_environ(tiny_data, tmp_path, **settings), "step:5/") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    (stopped,) = (tmp_path / "checkpoints").iterdir()
    (left,) = names_in(stopped)
    for seed in (42, 2025):
        environ = tiny_environ(tiny_data, tmp_path, **settings, SEED=seed, CHECKPOINT_SECONDS=1e-9)
        assert run_main(environ).returncode == 0
    outcome = run_main(tiny_environ(tiny_data, tmp_path, **settings, RESUME="auto"))
    assert outcome.returncode == 0, outcome.stderr
    assert f"from:{stopped / left}" in outcome.stdout
    logs = {path.stem: read_events(path) for path in (tmp_path / "logs").glob("*.jsonl")}
    assert len(logs) == 3
    assert all(rows[-1]["event"] == "final_int8_zlib_roundtrip_exact" for rows in logs.values())
    assert [row["event"] for row in logs[stopped.name]].count("environment") == 2  # one log for both of its parts
    artifacts = {path: path.read_bytes() for path in (tmp_path / "checkpoints").glob("*/final_model.int6.ptz")}
    assert len(set(artifacts.values())) == 3
    assert (tmp_path / "final_model.int6.ptz").read_bytes() == artifacts[stopped / "final_model.int6.ptz"]  # the newest


@pytest.mark.parametrize("run_id", [None, "same"])
def test_two_runs_of_one_name_at_once_write_two_logs(tiny_data, tmp_path, run_id):
    environ = tiny_environ(tiny_data, tmp_path, **SHORT | dict(RUN_ID=run_id))
    both = [subprocess.Popen([sys.executable, str(SCRIPT)], env=environ, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(90) for process in both] == [0, 0]
    logs = sorted((tmp_path / "logs").glob("*.jsonl"))
    assert len(logs) == 2
    for log in logs:
        events = [row["event"] for row in read_events(log)]
        assert events.count("environment") == events.count("final_int8_zlib_roundtrip_exact") == 1
        assert log.with_suffix(".txt").read_text().count("final_int8_zlib_roundtrip_exact val") == 1
    assert len(names_in(tmp_path / "checkpoints")) == 2


def test_a_run_that_goes_on_elsewhere_is_not_continued(tiny_data, tmp_path):
    endless = dict(RESUME="auto", CHECKPOINT_SECONDS=1e-9, ITERATIONS=100_000)
    environ = tiny_environ(tiny_data, tmp_path, **SHORT | endless)
    with running(environ, "checkpoint ") as first, running(environ, "checkpoint "):
        assert first.poll() is None
        assert len(names_in(tmp_path / "checkpoints")) == 2
    with running(environ, "resumed "):  # both are gone
        assert len(names_in(tmp_path / "checkpoints")) == 2


def claimed(out: Path, **settings: Any) -> str:
    config = train_gpt.Config(out_dir=str(out), recipe="swarm", **settings)
    name, log = train_gpt.claim_run(config, out / "logs")
    log.close()
    return name


def leave(out: Path, name: str, file: str, age_s: float) -> Path:
    """What a run of that name left: a log of that age, and a file in the folder of its checkpoints."""
    folder = out / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / file).touch()
    log = out / "logs" / f"{name}.txt"
    log.touch()
    changed_s = time.time() - age_s
    os.utime(log, (changed_s, changed_s))
    return folder / file


def test_a_named_checkpoint_goes_on_in_its_own_run(tmp_path):
    """Not in another one of the same settings, which a newer log may have; nor, from elsewhere, in any."""
    (tmp_path / "logs").mkdir()
    base = claimed(tmp_path)
    leave(tmp_path, f"{base}_3", "000002_step9.safetensors", 0)
    own = leave(tmp_path, f"{base}_2", "000001_step5.safetensors", 60)
    assert claimed(tmp_path, resume="auto") == f"{base}_3"
    assert claimed(tmp_path, resume=str(own)) == f"{base}_2"
    elsewhere = tmp_path / "elsewhere" / "checkpoints" / "another" / own.name
    assert claimed(tmp_path, resume=str(elsewhere)) not in (base, f"{base}_2", f"{base}_3")


def test_training_and_evaluation_go_on_where_each_left_something(tmp_path):
    (tmp_path / "logs").mkdir()
    base = claimed(tmp_path)
    leave(tmp_path, f"{base}_2", "000001_step5.safetensors", 60)
    leave(tmp_path, f"{base}_3", "evaluation_0123456789abcdef.safetensors", 0)
    assert claimed(tmp_path, resume="auto") == f"{base}_2"
    assert claimed(tmp_path, resume="auto", eval_only=True) == f"{base}_3"


def test_a_run_id_means_that_run_alone(tiny_data, run_main, tmp_path):
    """Also where a later run's name looks like one that got a number."""
    for run_id, seed in (("exp", 1), ("exp_2", 2)):
        assert run_main(tiny_environ(tiny_data, tmp_path, **SHORT | dict(RUN_ID=run_id, SEED=seed))).returncode == 0
    outcome = run_main(tiny_environ(tiny_data, tmp_path, **SHORT | dict(RUN_ID="exp", SEED=1, RESUME="auto")))
    assert outcome.returncode == 0, outcome.stderr
    assert f"from:{tmp_path}/checkpoints/exp/" in outcome.stdout


@pytest.mark.parametrize("run_id", ["..", ".", "a/b", "a\\b"])
def test_a_run_id_is_the_name_of_a_file(run_id):
    with pytest.raises(train_gpt.ConfigError, match="RUN_ID"):
        train_gpt.Config.from_env({"RUN_ID": run_id})


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_like_a_full_console(tiny_data, tmp_path, closed):
    environ = tiny_environ(tiny_data, tmp_path, **SHORT | dict(RUN_ID="run", WARMUP_STEPS=1))
    shell = ["sh", "-c", f'exec "$0" "$1" {closed}', sys.executable, str(SCRIPT)]
    assert subprocess.run(shell, env=environ, capture_output=True, timeout=60, check=False).returncode == 0
    events = read_events(tmp_path / "logs" / "run.jsonl")
    assert events[-1]["event"] == "final_int8_zlib_roundtrip_exact"
    text = (tmp_path / "logs" / "run.txt").read_text(encoding="utf-8")
    assert len(re.findall("^final_int8_zlib_roundtrip_exact val", text, re.M)) == 1


def test_an_address_without_meaning_is_told_and_waited_for_no_longer_than_asked(tiny_data, tmp_path):
    launcher = dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="no-such-host.invalid", MASTER_PORT=29400)
    environ = tiny_environ(tiny_data, tmp_path, JOIN_SECONDS=3, **launcher)
    began = time.monotonic()
    pipe = subprocess.PIPE
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environ, stdout=pipe, stderr=pipe, encoding="utf-8",
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode == 2
    assert time.monotonic() - began < 40
    first = next(line for line in done.stderr.splitlines() if line.startswith("rank 1 waits"))
    assert "no-such-host.invalid" in first
    assert "3 s at most (JOIN_SECONDS)" in first
    assert done.stderr.splitlines()[-1].startswith("error: rank 1: cannot join the other ranks")


def test_an_artifact_behind_a_link_is_written_where_the_link_points(tiny_data, run_main, tmp_path):
    target, link = tmp_path / "elsewhere" / "model.ptz", tmp_path / "final_model.int6.ptz"
    target.parent.mkdir()
    link.symlink_to(target)
    outcome = run_main(tiny_environ(tiny_data, tmp_path, **SHORT))
    assert outcome.returncode == 0, outcome.stderr
    assert link.is_symlink()
    assert not target.is_symlink()
    train_gpt.load_artifact(target)


@pytest.mark.parametrize("option", ["-I", "-P"] if sys.version_info >= (3, 11) else ["-I"])
def test_isolated_starts_find_the_siblings(option, tmp_path):
    command = [sys.executable, option, str(SCRIPT), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for name in train_gpt.Config.__annotations__:
        assert re.search(rf"^ +{name.upper()}=", done.stdout, re.M), name
    for name in train_gpt.RECIPES:
        assert re.search(rf"^ +{name}\b", done.stdout, re.M), name


@pytest.mark.parametrize("arguments", [["--nproc", "8"], ["MATRIX_LR=0.02"], ["--help", "x"]])
def test_other_arguments_are_refused(arguments, capsys):
    assert train_gpt.main(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
    assert arguments[0] in streams.err
    assert "environment variables" in streams.err
