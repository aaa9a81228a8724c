"""Whole runs in processes of their own that have torch loaded already: forks of a server, one for each test process.

A fresh interpreter spends three seconds on imports before a tiny run of one; a rank under torchrun as well. Tests that
are about the process itself (its launcher, its signals, how it starts) use `run_script` and `start` of support.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from bench.tiny import REPO, SCRIPT

SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["train_gpt", "torch._dynamo.utils", "safetensors.torch", "sentencepiece", "zstandard", "ranks"]


def _start_server() -> None:
    """Have the server import what every run does; it is started once, later calls find it."""
    from multiprocessing import forkserver

    path = os.pathsep.join([str(REPO), str(REPO / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    SERVER.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONUTF8="1"):
        forkserver.ensure_running()


def _child(environ: dict[str, str], folder: str, function: Callable[..., int | None], *args: Any) -> None:
    """Call the function with this environment and end with the exit code it returns, 1 after an exception."""
    import torch

    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    code: int | None = 1
    try:
        code = function(*args)
    except BaseException as error:  # noqa: BLE001 (what a fresh interpreter does at its end)
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def call_in_ranks(
    environs: Sequence[Mapping[str, str]], function: Callable[..., int | None], *args: Any, timeout_s: float = 120
) -> list[subprocess.CompletedProcess[str]]:
    """Call a function of a module in a process for each environment, as ranks of one job when there are several.

    They meet at a store of this process, so no port is chosen before it is taken. Raises TimeoutExpired.
    """
    _start_server()
    nproc, ended, shared = len(environs), [], {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if nproc > 1:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
            shared = dict(WORLD_SIZE=str(nproc), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
            shared |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
        processes = []
        for rank, environ in enumerate(environs):
            place = Path(folder) / str(rank)
            place.mkdir()
            own = {**environ, **shared} | (dict(RANK=str(rank), LOCAL_RANK=str(rank)) if shared else {})
            process = SERVER.Process(target=_child, args=(own, str(place), function, *args), daemon=True)
            process.start()
            stack.callback(process.kill)
            processes.append(process)
        deadline = time.monotonic() + timeout_s
        for rank, process in enumerate(processes):
            process.join(deadline - time.monotonic())
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(function.__name__, timeout_s)
            texts = [(Path(folder) / str(rank) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
            ended.append(subprocess.CompletedProcess([function.__name__], process.exitcode, *texts))
    return ended


def _main() -> int:
    import train_gpt

    sys.argv = [str(SCRIPT)]
    return train_gpt.main()


def run_ranks(
    environs: Sequence[Mapping[str, str]], timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """A whole run, a rank for each environment: the first exit code that is not 0, and what all of them have said."""
    ranks = call_in_ranks(environs, _main, timeout_s=timeout_s)
    code = next((rank.returncode for rank in ranks if rank.returncode), 0)
    said = ("".join(rank.stdout for rank in ranks), "".join(rank.stderr for rank in ranks))
    return subprocess.CompletedProcess([str(SCRIPT)], code, *said)


def run_whole(environ: Mapping[str, str], nproc: int = 1, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """A whole run of so many ranks, all with exactly this environment."""
    return run_ranks([environ] * nproc, timeout_s)
