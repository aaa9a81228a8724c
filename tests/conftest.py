"""Fixtures that several test files share. The folder of train_gpt.py is put on the path for all of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tools")]

import audit  # noqa: E402
import build_kg  # noqa: E402
import console  # noqa: E402
from console import Console  # noqa: E402
from support import (  # noqa: E402
    TINY_VOCAB,
    VAL_TARGETS,
    Run,
    make_documents,
    run_script,
    tiny_environ,
    tokenizer_pieces,
    train_tokenizer,
    write_shard,
)

import train_gpt  # noqa: E402


class Outcome(NamedTuple):
    """What a run within this process left: exit code and both streams."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Matrices this small are fastest on one thread, and one thread adds in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of TINY_VOCAB pieces, two train shards and two validation shards."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tiny_data")
    train_tokenizer(folder / "tokenizer.model", TINY_VOCAB)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    def tokens(seed: int, count: int) -> np.ndarray:
        return np.concatenate([[1, *tokenizer.encode(text)] for text in make_documents(seed, count)])

    train, val = tokens(1, 240), tokens(2, 60)
    write_shard(folder / "tiny_train_000000.bin", train[: len(train) // 3])
    write_shard(folder / "tiny_train_000001.bin", train[len(train) // 3 :])
    assert len(train) > 20 * 12 * 32
    assert len(val) > VAL_TARGETS
    write_shard(folder / "tiny_val_000000.bin", val[:700])
    write_shard(folder / "tiny_val_000001.bin", val[700 : VAL_TARGETS + 1])
    return folder


@pytest.fixture(scope="session")
def blob(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blob for the tiny tokenizer, whose importance grows with the id."""
    pieces = tokenizer_pieces(tiny_data / "tokenizer.model")
    path = tmp_path_factory.mktemp("kg") / "blob.txt"
    path.write_text(build_kg.pack({i: i / len(pieces) for i in range(4, len(pieces))}, pieces))
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whole run of the tiny settings in a process of its own; tests read it and leave it as it is."""
    environ = tiny_environ(tiny_data, tmp_path_factory.mktemp("tiny_run"), VAL_LOSS_EVERY=10)
    process = run_script(environ)
    assert process.returncode == 0, process.stderr
    return Run(environ, process)


@pytest.fixture
def at_line(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], object]], None]:
    """Have something done within a run of this process, after the first line of its log that begins so."""
    return lambda start, action: monkeypatch.setattr(sys, "stdout", Console(sys.stdout, start, action))


@pytest.fixture
def at_backward(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, Any], Any]], None]:
    """Have something done before each backward pass of this process, or another loss gone back from."""

    def arrange(action: Callable[[int, Any], Any]) -> None:
        monkeypatch.setattr(torch.Tensor, "backward", torch.Tensor.backward)  # put back when the test is over
        console.at_backward(action)

    return arrange


@pytest.fixture
def run_main(capfd: pytest.CaptureFixture[str]) -> Callable[[dict[str, str]], Outcome]:
    """train_gpt.main() in this process, with exactly the environment given."""

    def run(environ: dict[str, str]) -> Outcome:
        capfd.readouterr()
        with patch.dict(os.environ, environ, clear=True):
            code = train_gpt.main()
        streams = capfd.readouterr()
        return Outcome(code, streams.out, streams.err)

    return run


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> audit.Rehearsal:
    """What the audit trains for itself: a small artifact with TTT and a mixer, and the shards that it came from."""
    recipe = train_gpt.Config.from_env({"RECIPE": "swarm", "DEVICE": "cpu", "COMPUTE_DTYPE": "fp32"})
    made = audit.Rehearsal.prepare(tmp_path_factory.mktemp("rehearsal"), recipe)
    made.train(7)
    return made


@pytest.fixture(scope="module")
def config(rehearsal: audit.Rehearsal) -> train_gpt.Config:
    """Its settings; test files of other subjects have settings of their own under this name."""
    return rehearsal.config


@pytest.fixture(scope="module")
def model(config: train_gpt.Config) -> train_gpt.GPT:
    return train_gpt.load_artifact(config.artifact_path)[0]
