"""Two nodes without a common disk: two torchruns that meet at a port, each with folders of its own."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from golden_support import make_config
from ranks import run_ranks
from support import Run, event, read_events, run_two_nodes, start, tiny_environ, train_rows, write_shard

import train_gpt


def node_environs(tiny_data: Path, folder: Path, **overrides: object) -> list[dict[str, str]]:
    """The tiny settings on two nodes, each with a copy of the data under its own path."""
    environs = []
    for node in ("first", "second"):
        shutil.copytree(tiny_data, folder / node / "data")
        environs.append(tiny_environ(folder / node / "data", folder / node / "out", **overrides))
    return environs


def test_two_nodes_follow_one_node_and_score_the_artifact_of_the_first(tiny_run: Run, tiny_data: Path, tmp_path: Path):
    environs = node_environs(tiny_data, tmp_path, VAL_LOSS_EVERY=10)
    nodes = run_two_nodes(environs)
    assert [node.returncode for node in nodes] == [0, 0], nodes[0].stderr + nodes[1].stderr
    rows = read_events(tmp_path / "first" / "out" / "logs" / "run.jsonl")
    assert event(rows, "environment")["world_size"] == 2
    losses, expected = ([row["train_loss"] for row in train_rows(r)] for r in (rows, tiny_run.events))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    last = "final_int8_zlib_roundtrip_exact"
    assert event(rows, last)["val_bpb"] == pytest.approx(event(tiny_run.events, last)["val_bpb"], rel=1e-3)
    assert not (tmp_path / "second" / "out" / "final_model.int6.ptz").exists()


def test_nodes_with_other_settings_end_before_the_first_step(tiny_data: Path, tmp_path: Path):
    environs = node_environs(tiny_data, tmp_path)
    environs[1]["SEED"] = "2"
    nodes = run_two_nodes(environs, timeout_s=60)
    assert all(node.returncode != 0 for node in nodes)
    (error,) = {line for line in nodes[0].stderr.splitlines() if line.startswith("error: ")}
    assert error.startswith("error: rank 0: the ranks have different settings or code; ")
    assert "step:1/" not in nodes[0].stdout
    assert all('train_gpt.py", line' not in node.stderr for node in nodes)


def changed_shard(folder: Path, split: str, tokens: slice) -> None:
    path = max(folder.glob(f"*_{split}_*.bin"))
    write_shard(path, train_gpt.read_shard(path)[tokens].copy())


@pytest.mark.parametrize(
    ("change", "differ"),
    [
        (lambda _: None, ""),
        (lambda e: e.update(ITERATIONS="21"), "settings or code"),
        (lambda e: e.update(CHECKPOINT_SECONDS="7"), "settings or code"),
        (lambda e: changed_shard(Path(e["DATA_PATH"]), "val", slice(-9)), "validation shards"),
        (lambda e: changed_shard(Path(e["DATA_PATH"]), "train", slice(None, None, -1)), "training shards"),
    ],
    ids=["other paths alone", "iterations", "checkpoints", "validation", "training"],
)
def test_what_ranks_must_have_in_common(tiny_data: Path, tmp_path: Path, change, differ: str):
    """Both ranks end before the first step, each with one line."""
    environs = node_environs(tiny_data, tmp_path, ITERATIONS=1, TTT_ENABLED=0)
    change(environs[1])
    ended = run_ranks(environs, timeout_s=60)
    assert ended.returncode == (2 if differ else 0), ended.stderr
    assert ("step:1/" in ended.stdout) == (not differ)
    lines = [f"error: rank {rank}: the ranks have different {differ}" for rank in (0, 1)] if differ else []
    assert [line.partition(" (")[0].partition(";")[0] for line in ended.stderr.splitlines()] == lines


def test_ranks_on_different_devices_do_not_wait_for_each_other(tiny_data: Path, tmp_path: Path):
    """Where CUDA fails on one node, DEVICE=auto would choose backends that never meet."""
    patch = """
if rank == 1:
    torch.cuda.set_device = lambda device: None
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 8
"""
    process = start(tiny_environ(tiny_data, tmp_path, DEVICE="auto"), patch, tmp_path, nproc=2)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    (error,) = [line for line in stderr.splitlines() if line.startswith("error: rank 0: ")]
    assert "some ranks have a CUDA device" in error
    assert "network interface" not in error
    assert "DEVICE=cuda" in error


def test_the_cause_of_a_broken_connection_is_told(monkeypatch, capfd):
    """What NCCL says of itself and what another rank's end looks like are the same kind of exception."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    told = []
    nccl = dist.DistBackendError("NCCL error in: x.cpp:1,\nunhandled cuda error")
    for error in (nccl, RuntimeError("[gloo] closed")):
        runtime = train_gpt.Runtime(make_config(), {})
        runtime.rank, runtime.world_size = 1, 2
        runtime.__exit__(type(error), error, None)
        told.append(capfd.readouterr().err)
    assert told == [
        "rank 1 stops: another rank has ended, or: NCCL error in: x.cpp:1, unhandled cuda error\n",
        "rank 1 stops: another rank has ended\n",
    ]
    assert codes == [1, 1]


def test_ranks_that_cannot_join_are_told_of_network_interfaces(tiny_data: Path, tmp_path: Path, run_main):
    """Rank 0 would listen where another program does already."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=taken.getsockname()[1])
        outcome = run_main(tiny_environ(tiny_data, tmp_path, RANK=0, WORLD_SIZE=2, **place))
    assert outcome.returncode == 2
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: rank 0: cannot join the other ranks: ")
    assert "GLOO_SOCKET_IFNAME" in line
