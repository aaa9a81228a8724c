"""Helpers of the tests: shards and text on disk, settings of a run that takes seconds, and ways to start one."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from bench.tiny import REPO as REPO
from bench.tiny import SCRIPT as SCRIPT
from bench.tiny import TINY_VOCAB as TINY_VOCAB
from bench.tiny import artifact_of as artifact_of
from bench.tiny import artifact_parts as artifact_parts
from bench.tiny import artifact_payload as artifact_payload
from bench.tiny import make_documents as make_documents
from bench.tiny import save_artifact as save_artifact
from bench.tiny import sealed as sealed
from bench.tiny import tiny_environ as tiny_environ
from bench.tiny import tokenizer_pieces as tokenizer_pieces
from bench.tiny import torchrun as torchrun
from bench.tiny import train_tokenizer as train_tokenizer
from bench.tiny import write_shard as write_shard

VAL_TARGETS = 1100  # targets of the tiny validation split; no multiple of any window or stride used here


def run_script(
    environ: dict[str, str], nproc: int = 1, timeout_s: float = 120, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Start train_gpt.py as a user does: by itself, or for several ranks under torchrun on this machine.

    `ranks.run_whole` does the same in a third of the time where the start is not what is tested.
    """
    command = torchrun(nproc, SCRIPT) if nproc > 1 else [sys.executable, str(SCRIPT)]
    return subprocess.run(
        command, env=environ, cwd=cwd, capture_output=True, encoding="utf-8", timeout=timeout_s, check=False
    )


def run_two_nodes(environs: Sequence[dict[str, str]], timeout_s: float = 120) -> list[subprocess.CompletedProcess[str]]:
    """One rank on each of two nodes that share no disk: two torchruns on this machine that meet at a store."""
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{meeting.port}", "--rdzv-conf=is_host=0"]
    command = torchrun(1, SCRIPT, options=["--nnodes=2", *place])
    pipe, deadline = subprocess.PIPE, time.monotonic() + timeout_s
    nodes = [subprocess.Popen(command, env=e, stdout=pipe, stderr=pipe, encoding="utf-8") for e in environs]
    with ThreadPoolExecutor(len(nodes)) as pool:
        try:
            said = list(pool.map(lambda node: node.communicate(timeout=deadline - time.monotonic()), nodes))
        finally:
            for node in nodes:
                node.kill()
    return [subprocess.CompletedProcess(command, node.returncode, *texts) for node, texts in zip(nodes, said)]


# A rank's process runs the script after some lines of Python, which have something done at a known place.
PATCHED = """
import os, signal, sys, time
sys.path[:0] = [{repo!r}, {tests!r}]
import torch, train_gpt
from console import at_backward, at_line, slow_backward
rank, attempt = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
{patch}
code = train_gpt.main()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


def start(environ: dict[str, str], patch: str, tmp_path: Path, nproc: int = 0, restarts: int = 0) -> subprocess.Popen:
    """The script after these lines, under torchrun with so many processes, or without it."""
    script = tmp_path / "patched.py"
    script.write_text(PATCHED.format(repo=str(REPO), tests=str(REPO / "tests"), patch=patch))
    command = torchrun(nproc, script, restarts=restarts) if nproc else [sys.executable, str(script)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environ, stdout=pipe, stderr=pipe, encoding="utf-8")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def modules_replaced(modules: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """Imports of these names give these modules in this process; a name with None cannot be imported.

    Other modules that are first imported meanwhile stay. `patch.dict` would drop them, and some of torch's cannot be
    imported twice in a process: every later test would fail that needs them.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


def numbers(rows: Iterable[dict[str, Any]]) -> dict[int, tuple]:
    """What training computed at each step; of a step taken twice, what it gave the last time."""
    names = ("train_loss", "grad_norm", "lr_scale", "qat")
    return {row["step"]: tuple(row[name] for name in names) for row in train_rows(rows)}


def results(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    return {row["event"]: row["val_loss"] for row in rows if row["event"].endswith("_exact")}


class Run(NamedTuple):
    """A finished run: the environment it had and what its process left."""

    environ: dict[str, str]
    process: subprocess.CompletedProcess[str]

    @property
    def out_dir(self) -> Path:
        return Path(self.environ["OUT_DIR"])

    @property
    def artifact(self) -> Path:
        return self.out_dir / "final_model.int6.ptz"

    @property
    def log(self) -> str:
        return (self.out_dir / "logs" / "run.txt").read_text(encoding="utf-8")

    @property
    def events(self) -> list[dict[str, Any]]:
        return read_events(self.out_dir / "logs" / "run.jsonl")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def events_of(environ: dict[str, str]) -> list[dict]:
    return read_events(Path(environ["OUT_DIR"]) / "logs" / "run.jsonl")


def event(events: Iterable[dict[str, Any]], name: str) -> dict[str, Any]:
    """The only row of that name."""
    found = [row for row in events if row["event"] == name]
    assert len(found) == 1, f"{len(found)} rows {name!r}"
    return found[0]


def train_rows(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of training steps."""
    return [row for row in events if "train_loss" in row]


def _shared_folders() -> list[Path]:
    """Where files may lie that are not part of the repository: $SHARED_DIR, or ../shared."""
    named = [Path(os.environ["SHARED_DIR"])] if "SHARED_DIR" in os.environ else []
    return [folder for root in (*named, REPO.parent / "shared") for folder in (root, root / "data", root.parent)]


def shared_data(name: str) -> Path | None:
    """A data file that is not part of the repository."""
    return next((folder / name for folder in _shared_folders() if (folder / name).exists()), None)


def assert_refused(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], argv: Sequence[object], *words: str
) -> None:
    """The command ends with exit code 2 and one line on stderr that holds all of `words`."""
    capsys.readouterr()
    assert main([str(arg) for arg in argv]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr
