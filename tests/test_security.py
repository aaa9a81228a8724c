"""No network, no pickles, no path out of the folders named, and dependencies that are pinned."""

from __future__ import annotations

import ast
import json
import pickle
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import REPO, Run, artifact_of, artifact_parts, tiny_environ

import train_gpt

NETWORK = {"socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}
DENIED = NETWORK | {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
WATCHERS: list[list[str]] = []  # an audit hook cannot be removed, so this one is armed and disarmed


def _hook(event: str, _arguments: tuple[Any, ...]) -> None:
    if WATCHERS and event in DENIED:
        WATCHERS[-1].append(event)
        raise PermissionError(f"{event} is denied here")


@pytest.fixture
def denied() -> Iterator[list[str]]:
    """Within the test nobody connects, resolves a name, unpickles, or starts a program."""
    if not hasattr(_hook, "armed"):
        sys.addaudithook(_hook)
        _hook.armed = True  # pyright: ignore[reportFunctionMemberAccess]
    events: list[str] = []
    WATCHERS.append(events)
    yield events
    WATCHERS.pop()


def test_the_watch_sees_what_it_should(denied):
    with pytest.raises(PermissionError):
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    with pytest.raises(PermissionError):
        pickle.loads(b"cos\nsystem\n.")
    assert set(denied) == {"socket.getaddrinfo", "pickle.find_class"}


def test_training_resuming_and_scoring_use_no_network_and_no_pickle(denied, tiny_data, run_main, tmp_path):
    environ = tiny_environ(
        tiny_data, tmp_path, ITERATIONS=4, TTT_CHUNK_TOKENS=300, MIXER="backoff", SWARM_ENABLED=1, SWARM_EVERY=2,
        CHECKPOINT_SECONDS=1e-9, RESUME="auto", WARMUP_STEPS=1,
    )  # fmt: skip
    assert run_main(environ).returncode == 0
    assert "resumed step:4" in run_main(environ).stdout
    assert denied == []


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_names_inside_an_artifact_lead_nowhere(tiny_run: Run, tiny_data, run_main, tmp_path):
    escape = tmp_path / "escape"
    config = dict.fromkeys(("out_dir", "artifact", "data_path", "tokenizer_path", "kg_path", "resume"), str(escape))
    path = tmp_path / "model.ptz"
    metadata, tensors = artifact_parts(tiny_run.artifact.read_bytes())
    stored = json.loads(metadata["config"]) | config | {"run_id": "escape"}
    path.write_bytes(artifact_of(metadata | {"config": json.dumps(stored)}, tensors))
    environ = tiny_environ(
        tiny_data, tmp_path / "deep" / "out", EVAL_ONLY=1, ARTIFACT=path, CHECKPOINT_SECONDS=1e-9, TTT_ENABLED=0
    )
    assert run_main(environ).returncode == 0
    logs = {tmp_path / "deep" / "out" / "logs" / f"run.{suffix}" for suffix in ("txt", "jsonl")}
    assert tree(tmp_path) == {path, *logs}


def test_names_inside_a_checkpoint_lead_nowhere(tiny_data, run_main, tmp_path):
    environ = tiny_environ(tiny_data, tmp_path / "deep" / "out", ITERATIONS=2, TTT_ENABLED=0, RESUME="auto")
    assert run_main(environ).returncode == 0
    folder = tmp_path / "deep" / "out" / "checkpoints"
    path = max(folder.glob("*/*_step*"))
    state = train_gpt.read_state(path.read_bytes(), path)
    (tmp_path / "deep" / "out" / "final_model.int6.ptz").unlink()
    before = tree(tmp_path)
    state["../../../escape"] = torch.zeros(3)
    state["config"] |= {"OUT_DIR": "../../escape", "RUN_ID": "../../escape", "ARTIFACT": "../escape"}
    train_gpt.write_state(path, state)
    (path.parent / "..000009_step9.safetensors").write_bytes(b"not a name that a run gives")
    assert run_main(environ).returncode == 0
    added = {str(each.relative_to(tmp_path / "deep" / "out")) for each in tree(tmp_path) - before}
    assert added == {"final_model.int6.ptz", "checkpoints/run/..000009_step9.safetensors"}


def name_of(requirement: str) -> str:
    return requirement.lower().replace("-", "_")


def required() -> set[str]:
    lines = [line for file in REPO.glob("requirements*.txt") for line in file.read_text().splitlines()]
    return {name_of(found[0]) for found in map(re.compile(r"[A-Za-z0-9_.-]+").match, lines) if found}


def test_every_requirement_is_pinned_to_one_version():
    pin = re.compile(r'([A-Za-z0-9_.-]+)==[0-9][\w.+]*(?:; python_version >= "3\.11")?')
    lines = [line.strip() for line in (REPO / "constraints.txt").read_text().splitlines()]
    pins = [pin.fullmatch(line) for line in lines if line and not line.startswith("#")]
    assert all(pins), f"not a pin: {lines[pins.index(None)]}"
    names = [name_of(found[1]) for found in pins if found]
    assert len(set(names)) == len(names)
    assert set(names) >= required()


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_every_package_that_is_imported_is_required():
    # A package that happens to be installed hides the missing line until somebody starts from nothing.
    files = [path for folder in (".", "data", "tools", "bench", "tests") for path in (REPO / folder).glob("*.py")]
    own = {path.stem for path in files} | {"bench", "tools", "data", "tests"}
    optional = {"flash_attn", "flash_attn_interface", "triton"}
    for path in files:
        missing = imported(path) - sys.stdlib_module_names - own - optional - required()
        assert not missing, f"{path.relative_to(REPO)} imports {missing}, which no requirements file names"
