"""`make lint` keeps the programs on Python 3.10: what came later is caught, as syntax by ruff, as library by vermin."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPO

import train_gpt

LATER = [
    ("ruff", "try:\n    pass\nexcept* ValueError:\n    pass\n"),  # 3.11
    ("ruff", "a = b = {}\nprint(a[*b])\n"),  # 3.11
    ("ruff", "class Box[T]:\n    pass\n"),  # 3.12
    ("ruff", 'x = {}\nprint(f"{x["a"]}")\n'),  # 3.12
    ("vermin", "import tomllib\n"),  # 3.11
    ("vermin", "from typing import Self\n"),  # 3.11
    ("vermin", "import datetime\nprint(datetime.UTC)\n"),  # 3.11
    ("vermin", "import hashlib\nprint(hashlib.file_digest)\n"),  # 3.11
    ("vermin", "import itertools\nprint(itertools.batched('abc', 2))\n"),  # 3.12
]


def lint_command(tool: str, programs: str) -> list[str]:
    """The tool's line in the Makefile, with the paths to look at filled in."""
    lines = (REPO / "Makefile").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line.startswith(f"\t$(BIN)/{tool} ")]
    assert len(found) == 1, f"{tool} stands {len(found)} times in the Makefile"
    program, *arguments = shlex.split(found[0].replace("$(PROGRAMS)", programs))
    return [program.replace("$(BIN)", str(Path(sys.executable).parent)), *arguments]


def checked_programs() -> str:
    """What the Makefile calls PROGRAMS."""
    lines = (REPO / "Makefile").read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("PROGRAMS := ") for line in lines if line.startswith("PROGRAMS := "))


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("tool", "code"), LATER)
def test_newer_python_is_caught(tool, code, tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text(code, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_bytes((REPO / "pyproject.toml").read_bytes())
    result = run(lint_command(tool, planted.name), tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "3.1" in result.stdout


def test_the_programs_need_no_more_than_3_10():
    programs = checked_programs()
    assert {*train_gpt.CODE_FILES, "data", "tools", "bench"} <= set(programs.split())
    result = run(lint_command("vermin", programs), REPO)
    assert result.returncode == 0, result.stdout
    assert "could not be combined" not in result.stdout, "vermin gave up on a file"
