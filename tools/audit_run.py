"""The real command, `EVAL_ONLY=1 python train_gpt.py`, on a small validation split: a part of tools/audit.py.

Its last line is compared with what the audit finds for itself in the shard and in the scorer's distributions. It runs
in a clean folder as a user starts it; then among the files of that first run, with the variables that torchrun sets
and under audit_watch.py; and for a whole audit as two ranks. A clock outside it measures what it says about its time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic  # taken before the audited code could put another in its place
from typing import NamedTuple

import audit_watch
import numpy as np
import torch

import train_gpt

TIMEOUT_S = 1800.0  # of a command that does not end
GRACE_S = 60.0  # then, for a launcher to end its ranks: they have sessions of their own, and hold the pipe
# How far, relative to it, the printed score may be from the audit's. One process on a CPU adds in the same order as
# the audit, in bf16 too; several ranks and CUDA may round otherwise, in bf16 by more, and TTT carries that on.
SAME_ORDER, OTHER_ORDER = 1e-5, 2e-3
SLOWEST_CLOCK, SLACK_S = 0.9, 0.3  # of the seconds outside, what must be claimed, but for lines that arrive late
EVALUATION = re.compile(r"(?:final_|legal_ttt)\S* .*eval_time:([\d.]+)ms")
TRAINING = re.compile(r"step:\d+/\d+ train_loss.* train_time:([\d.]+)ms")
RESULT = re.compile(r"final_int8_zlib_roundtrip_exact val_loss:(\S+) val_bpb:(\S+)")
SPLIT = re.compile(r"^validation targets:(\d+) bytes:(\d+) ", re.MULTILINE)


class Truth(NamedTuple):
    """What an honest evaluation of a split says, found without the command."""

    targets: int
    bytes: int  # of the decoded text
    bpb: float
    mass_error: float  # the largest, of all its distributions

    @classmethod
    def of(cls, tokens: np.ndarray, stated: np.ndarray, text: str) -> Truth:
        """`stated` (N, V): the distribution of every target of `tokens` (N + 1,); `text` is what they decode to."""
        came = stated[np.arange(len(stated)), tokens[1:].astype(np.int64)].astype(np.float64)
        size = len(text.encode())
        return cls(len(stated), size, float(-np.log2(came).sum()) / size, float(np.abs(stated.sum(1) - 1).max()))


class Small(NamedTuple):
    """A small split on disk, the artifact and the settings to score it with, and what is true of it."""

    folder: Path  # for everything the command reads and writes, but for what follows
    artifact: Path
    tokenizer: Path
    config: train_gpt.Config
    truth: Truth


class Said(NamedTuple):
    """What a command printed, each line with the seconds at which it arrived, and how it ended."""

    lines: list[tuple[float, str]]
    returncode: int
    errors: str

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)


class Arrivals:
    """A stream for text that notes when each line came, by a clock that the audited code cannot reach."""

    name, encoding = "<audit>", "utf-8"

    def __init__(self) -> None:
        self.lines: list[tuple[float, str]] = []

    def write(self, text: str) -> int:
        now = monotonic()
        self.lines += [(now, line) for line in text.splitlines()]
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


def write_split(folder: Path, tokens: np.ndarray, digest: str) -> None:
    """`tokens` (N + 1,) as the validation split of a folder named like the contest's, of the tokenizer `digest`."""
    folder.mkdir(parents=True)
    header = np.zeros(256, dtype="<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
    (folder / "fineweb_val_000000.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    (folder / "manifest.json").write_text(json.dumps({"tokenizer_hash": digest}))


def data_folder(small: Small) -> Path:
    return small.folder / "datasets" / "fineweb10B_sp1024"


def environment(small: Small, out: Path, **more: str) -> dict[str, str]:
    """Every setting as a variable, so that no recipe decides one, and folders of the command's own to write to."""
    places = dict(data_path=data_folder(small), tokenizer_path=small.tokenizer, out_dir=out, artifact=small.artifact)
    config = dataclasses.replace(
        small.config, **{name: str(path.absolute()) for name, path in places.items()},
        eval_only=True, val_tokens=0, run_id="", resume="", kg_path="",
    )  # fmt: skip
    own = {name: small.folder / name.lower() for name in ("HOME", "TMPDIR")}
    for path in own.values():
        path.mkdir(exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "CUDA_VISIBLE_DEVICES") if name in os.environ}
    kept |= {name: str(path) for name, path in own.items()}
    kept |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | {name.upper(): train_gpt.as_variable(value) for name, value in vars_of(config).items()} | more


def vars_of(config: train_gpt.Config) -> dict[str, object]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def start(environ: Mapping[str, str], cwd: Path, before: Sequence[str] = (), ranks: int = 1) -> Said:
    """The command, by itself or under torchrun; `before` are words that start another program."""
    script = str(train_gpt.CODE_DIR / "train_gpt.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={ranks}"]
    command = [*before, sys.executable, *(launcher if ranks > 1 else []), script]
    arrivals = Arrivals()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors, subprocess.Popen(
        command, env=dict(environ), cwd=cwd, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace"
    ) as process:  # fmt: skip
        timers = [threading.Timer(TIMEOUT_S, process.terminate), threading.Timer(TIMEOUT_S + GRACE_S, process.kill)]
        for timer in timers:
            timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            arrivals.write(line)
        code = process.wait()
        for timer in timers:
            timer.cancel()
        errors.seek(0)
        return Said(arrivals.lines, code, errors.read())


def check_result(said: Said, small: Small, tolerance: float) -> tuple[bool, str]:
    """Targets, bytes and the last line's bits per byte are those that the audit found."""
    if said.returncode:
        return False, f"ends with exit code {said.returncode}: {(said.errors.strip().splitlines() or ['no word'])[-1]}"
    truth, found = small.truth, SPLIT.search(said.text)
    last = RESULT.match(said.lines[-1][1] if said.lines else "")
    if not found or not last:
        return False, "prints no line `validation targets:…`, or does not end with its result"
    targets, size, loss, bpb = int(found[1]), int(found[2]), float(last[1]), float(last[2])
    expected_loss = truth.bpb * np.log(2) * truth.bytes / truth.targets
    figure = f"{targets:,} targets, {size:,} bytes, {bpb:.6f} bpb"
    if (targets, size) != (truth.targets, truth.bytes):
        return False, f"{figure}; the shard has {truth.targets:,} targets and decodes to {truth.bytes:,} bytes"
    off = max(abs(bpb / truth.bpb - 1), abs(loss / expected_loss - 1))
    if not off <= tolerance:
        return False, f"{figure}; the distributions and the decoded text give {truth.bpb:.6f} bpb"
    ok = truth.mass_error <= train_gpt.MASS_TOLERANCE
    return ok, f"{figure}, off by {off:.1e}; the masses of all its distributions by {truth.mass_error:.1e}"


def check_clock(lines: Sequence[tuple[float, str]], pattern: re.Pattern[str], total: bool) -> tuple[bool, str]:
    """What is claimed between the first and the last line that tells a time, against the seconds between them.

    `total`: each line tells the time since the beginning, else that of its own stage.
    """
    told = [(at, float(match[1]) / 1000) for at, line in lines if (match := pattern.match(line))]
    if len(told) < 2:
        return False, "fewer than two lines tell a time"
    outside = told[-1][0] - told[0][0]
    claimed = told[-1][1] - told[0][1] if total else sum(seconds for _, seconds in told[1:])
    figure = f"{claimed:.2f} s claimed for what took {outside:.2f} s"
    return claimed >= SLOWEST_CLOCK * outside - SLACK_S, figure


class Notes(NamedTuple):
    """What a watched command reached outside: files among the code, and all else."""

    code: list[str]
    other: list[str]


def watched(small: Small, out: Path) -> tuple[Said, Notes]:
    """The command with torchrun's variables, without a network, every file and connection noted."""
    folder = small.folder / "watch"
    folder.mkdir()
    shutil.copy(audit_watch.__file__, folder / "sitecustomize.py")
    notes, code = folder / "notes", [str(path) for path in train_gpt.code_paths()]
    caches = [importlib.util.cache_from_source(path) for path in code]
    allowed = [*code, *caches, *(str(path.absolute()) for path in (small.folder, small.artifact, small.tokenizer))]
    (folder / audit_watch.LIMITS).write_text(json.dumps({"notes": str(notes), "allowed": allowed}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rank = dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "TORCHELASTIC_RESTART_COUNT"), "0")
    rank |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"), "1")
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none", "COMPILE": "0"}
    said = start(environment(small, out, **rank, PYTHONPATH=str(folder)), out, audit_watch.no_network())
    noted = list(dict.fromkeys(notes.read_text().splitlines())) if notes.exists() else ["nothing: no hook was set"]
    beside = [line for line in noted if line.startswith(f"open {os.path.realpath(train_gpt.CODE_DIR)}{os.sep}")]
    return said, Notes(beside, [line for line in noted if line not in beside])
