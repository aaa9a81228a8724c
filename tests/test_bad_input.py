"""Input a user can mend: one line on stderr that says what to do, exit code 2, no traceback, no hang."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_whole
from support import TINY_VOCAB, run_script, tiny_environ, train_tokenizer, write_shard

from train_gpt import TokenStream


def assert_one_error_line(code: int, stdout: str, stderr: str, *mentioned: object) -> str:
    """Exit code 2 and exactly one line, which begins `error: ` and names what is wrong."""
    assert code == 2, stderr or stdout
    assert "Traceback" not in stdout + stderr
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    for text in mentioned:
        assert str(text) in lines[0]
    return lines[0]


@pytest.fixture
def data(tiny_data, tmp_path) -> Path:
    """A copy of the tiny data that a test may damage."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


@pytest.mark.parametrize(
    ("variable", "value", "mentioned"),
    [
        ("ITERATIONS", "ten", "whole number"),
        ("TIE_EMBEDDINGS", "perhaps", "true or false"),
        ("MUON_MOMENTUM", "99", "from 0 to 0.9999"),
        ("NUM_KV_HEADS", "3", "NUM_HEADS=4"),
        ("EVAL_STRIDE", "33", "EVAL_SEQ_LEN=32"),
        ("RECIPE", "leeky", "leaky"),
        ("ITERATION", "10", "ITERATIONS"),
        ("matrix_lr", "0.1", "MATRIX_LR"),
        ("ATTENTION", "fa3", "ATTENTION=auto"),
        ("ATTENTION", "cudnn", "ATTENTION=auto"),
        ("DATA_PATH", "/no/such/folder", "prepare.py"),
        ("TOKENIZER_PATH", "/no/such/tokenizer.model", "prepare.py"),
        ("VOCAB_SIZE", str(TINY_VOCAB + 1), f"{TINY_VOCAB} pieces"),
    ],
)
def test_a_wrong_setting(run_main, tiny_data, tmp_path, variable, value, mentioned):
    outcome = run_main(tiny_environ(tiny_data, tmp_path, **{variable: value}))
    line = assert_one_error_line(*outcome, variable, mentioned)
    assert value in line or "did you mean" in line
    assert not (tmp_path / "final_model.int6.ptz").exists()


@pytest.mark.parametrize(
    "launcher",
    [
        dict(RANK=5), dict(RANK=-1), dict(WORLD_SIZE=0), dict(WORLD_SIZE=2), dict(WORLD_SIZE=2, RANK=0),
        dict(WORLD_SIZE=2, RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT="abc"), dict(WORLD_SIZE="two"),
    ],
    ids=str,
)  # fmt: skip
def test_a_launcher_that_makes_no_sense(run_main, tiny_data, tmp_path, launcher):
    code, stdout, stderr = run_main(tiny_environ(tiny_data, tmp_path, **launcher))
    assert_one_error_line(code, stdout, stderr)
    assert re.search("RANK|WORLD_SIZE|MASTER_ADDR|abc", stderr)
    assert not (tmp_path / "final_model.int6.ptz").exists()


def test_cuda_where_there_is_none(run_main, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_error_line(*run_main(tiny_environ(tiny_data, tmp_path, DEVICE="cuda")), "DEVICE=cuda", "DEVICE=cpu")


# ---- data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_shards(run_main, data, tmp_path, split):
    for path in data.glob(f"*_{split}_*.bin"):
        path.unlink()
    assert_one_error_line(*run_main(tiny_environ(data, tmp_path)), f"no {split} shards", data, "prepare.py")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "wrong magic", "wrong version", "missing tokens"])
def test_a_damaged_shard(run_main, data, tmp_path, split, damage):
    path = data / f"tiny_{split}_000001.bin"
    content = path.read_bytes()
    tokens = np.frombuffer(content[1024:], dtype="<u2")
    if damage in ("truncated", "empty"):
        path.write_bytes(content[:-10] if damage == "truncated" else b"")
    elif damage == "missing tokens":
        write_shard(path, tokens, count=len(tokens) + 1)
    else:
        write_shard(path, tokens, **({"magic": 7} if damage == "wrong magic" else {"version": 7}))
    assert_one_error_line(*run_main(tiny_environ(data, tmp_path)), path, "prepare.py")


@pytest.mark.parametrize("split", ["train", "val"])
def test_token_ids_beyond_the_vocabulary(run_main, data, tmp_path, split):
    write_shard(data / f"tiny_{split}_000001.bin", np.full(500, TINY_VOCAB))
    line = assert_one_error_line(*run_main(tiny_environ(data, tmp_path)), f"token id {TINY_VOCAB}", "VOCAB_SIZE")
    assert str(data) in line


def test_a_token_id_that_only_the_training_finds(run_main, data, tmp_path, monkeypatch):
    """Behind the part of a shard that is checked when it is opened: the batch that holds it is refused."""
    monkeypatch.setattr(TokenStream, "CHECKED_AT_OPEN", 1000)
    tokens = np.full(12 * 32 * 10, 270)
    tokens[12 * 32 * 3 + 5] = TINY_VOCAB
    write_shard(data / "tiny_train_000000.bin", tokens)
    outcome = run_main(tiny_environ(data, tmp_path, SHUFFLE=0))
    assert_one_error_line(*outcome, data / "tiny_train_000000.bin", f"token id {TINY_VOCAB}")
    assert "step:1/20 " in outcome.stdout
    assert "step:4/20 " not in outcome.stdout


@pytest.mark.parametrize("tokens", [[], [1], [1, 1, 1]])
def test_an_empty_validation_split(run_main, data, tmp_path, tokens):
    (data / "tiny_val_000001.bin").unlink()
    write_shard(data / "tiny_val_000000.bin", tokens)
    assert_one_error_line(*run_main(tiny_environ(data, tmp_path)), "validation split", data)


def test_an_empty_train_split(run_main, data, tmp_path):
    (data / "tiny_train_000001.bin").unlink()
    write_shard(data / "tiny_train_000000.bin", [])
    assert_one_error_line(*run_main(tiny_environ(data, tmp_path)), data)


@pytest.mark.parametrize("content", [b"", b"garbage " * 100, None])
def test_a_file_that_is_no_tokenizer(run_main, data, tmp_path, content):
    path = data / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    assert_one_error_line(*run_main(tiny_environ(data, tmp_path)), "TOKENIZER_PATH", path)


def test_a_folder_is_no_tokenizer(run_main, tiny_data, tmp_path):
    assert_one_error_line(*run_main(tiny_environ(tiny_data, tmp_path, TOKENIZER_PATH=tiny_data)), "TOKENIZER_PATH")


# ---- output ------------------------------------------------------------------------------------------------------


def test_an_out_dir_that_is_a_file(run_main, tiny_data, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert_one_error_line(*run_main(tiny_environ(tiny_data, path)), "OUT_DIR", path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_out_dir_without_write_permission(run_main, tiny_data, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_one_error_line(*run_main(tiny_environ(tiny_data, tmp_path / "locked")), "OUT_DIR", tmp_path / "locked")


def test_a_run_id_that_names_a_missing_folder(run_main, tiny_data, tmp_path):
    assert_one_error_line(*run_main(tiny_environ(tiny_data, tmp_path, RUN_ID="no/such")), "RUN_ID")


def test_an_artifact_path_that_is_a_folder(run_main, tiny_data, tmp_path):
    (tmp_path / "taken").mkdir()
    environ = tiny_environ(tiny_data, tmp_path, ARTIFACT=tmp_path / "taken", ITERATIONS=1)
    assert_one_error_line(*run_main(environ), "artifact", tmp_path / "taken")


# ---- EVAL_ONLY ---------------------------------------------------------------------------------------------------


def altered(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    return {
        "empty": b"",
        "text": b"no artifact at all\n" * 50,
        "truncated": content[:-7],
        "half": content[:middle],
        "extended": content + b"\0" * 16,
        "bit flipped": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
    }[how]


@pytest.mark.parametrize("how", ["empty", "text", "truncated", "half", "extended", "bit flipped"])
def test_an_artifact_that_is_none(run_main, tiny_run, tiny_data, tmp_path, how):
    path = tmp_path / "odd.ptz"
    path.write_bytes(altered(tiny_run.artifact.read_bytes(), how))
    outcome = run_main(tiny_environ(tiny_data, tmp_path, EVAL_ONLY=1, ARTIFACT=path))
    assert_one_error_line(*outcome, path)
    assert "final_" not in outcome.stdout


@pytest.mark.parametrize("named", [True, False])
def test_an_artifact_that_is_missing(run_main, tiny_data, tmp_path, named):
    path = tmp_path / ("there.ptz" if named else "final_model.int6.ptz")
    environ = tiny_environ(tiny_data, tmp_path, EVAL_ONLY=1, ARTIFACT=path if named else None)
    assert_one_error_line(*run_main(environ), "ARTIFACT", path)


def test_an_artifact_of_another_tokenizer(run_main, tiny_run, data, tmp_path):
    train_tokenizer(data / "tokenizer.model", TINY_VOCAB, split_digits=False, max_sentencepiece_length=3)
    outcome = run_main(tiny_environ(data, tmp_path, EVAL_ONLY=1, ARTIFACT=tiny_run.artifact))
    assert_one_error_line(*outcome, tiny_run.artifact, "tokenizer")


# ---- real processes ----------------------------------------------------------------------------------------------


def test_process_wrong_value(tiny_data, tmp_path):
    process = run_script(tiny_environ(tiny_data, tmp_path, ITERATIONS="-5"))
    assert_one_error_line(process.returncode, process.stdout, process.stderr, "ITERATIONS=-5", "from 1 to")


def test_process_truncated_shard(data, tmp_path):
    path = data / "tiny_train_000000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    process = run_script(tiny_environ(data, tmp_path))
    assert_one_error_line(process.returncode, process.stdout, process.stderr, path)


def test_process_with_an_empty_environment_says_what_is_missing(tmp_path):
    """Nothing set, in a folder without data: what a newcomer meets first."""
    environ = tiny_environ(tmp_path, tmp_path, DATA_PATH=None, VOCAB_SIZE=None, TOKENIZER_PATH=tmp_path / "none.model")
    process = run_script(environ)
    assert_one_error_line(process.returncode, process.stdout, process.stderr, "TOKENIZER_PATH", "data/prepare.py")


@pytest.mark.parametrize(
    ("overrides", "mentioned"),
    [
        ({"ATTENTION": "fa3"}, "ATTENTION=fa3"),  # every rank raises
        ({"TRAIN_BATCH_TOKENS": 13 * 32}, f"use {12 * 32}"),  # only with more than one rank is it an error
        ({"OUT_DIR": "{file}"}, "OUT_DIR"),  # rank 0 alone raises, the other one waits for it
    ],
)
def test_two_ranks_end_with_the_line_and_do_not_hang(tiny_data, tmp_path, overrides, mentioned):
    (tmp_path / "file").touch()
    overrides = {k: str(v).format(file=tmp_path / "file") for k, v in overrides.items()}
    process = run_whole(tiny_environ(tiny_data, tmp_path / "out", **overrides), 2, timeout_s=60)
    assert process.returncode == 2
    lines = [line for line in process.stderr.splitlines() if re.match(r"(\[rank\d\]:)?error: ", line)]
    assert 1 <= len(lines) <= 2
    assert mentioned in lines[0]  # of rank 0; the other one may get to say that it is gone
    assert "Traceback" not in process.stderr
