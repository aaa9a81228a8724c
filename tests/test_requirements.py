"""What README's commands need is in requirements.txt, and pip and uv find the same in pyproject.toml."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import REPO, make_documents
from test_readme import README, commands

# Needed by single settings or inputs, imported where those are met, and missed in one line that names the remedy.
OPTIONAL = {"pyarrow", "brotli", "igraph", "matplotlib", "jinja2", "flash_attn", "flash_attn_interface", "triton"}
REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(>=[0-9.]+)\s*(#.*)?")


def module_name(distribution: str) -> str:
    return distribution.lower().replace("-", "_")


def requirements(name: str) -> list[str]:
    """The requirements of a file of the repository, without comments. Fails on a line that is none."""
    lines = [line for line in (REPO / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    found = [REQUIREMENT.fullmatch(line) for line in lines]
    assert all(found), f"{name}: not NAME>=VERSION: {lines[found.index(None)]}"
    return [match[1] + match[2] for match in found if match]


DECLARED = {module_name(requirement.partition(">=")[0]) for requirement in requirements("requirements.txt")}
SCRIPTS = sorted({word for line in commands(README) for word in line.split() if re.fullmatch(r"[\w/]+\.py", word)})
RECORD_PATH = [script for script in SCRIPTS if script.partition("/")[0] in ("train_gpt.py", "data", "tools")]


def imports(tree: ast.AST, called: bool = False) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether a function imports it) of every import, by statement or by name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, called) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, called
            yield from ((f"{node.module}.{alias.name}", called) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("require", "importlib.import_module"):
            yield from ((str(arg.value), called) for arg in node.args[:1] if isinstance(arg, ast.Constant))
        yield from imports(node, called or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def third_party_imports(script: Path) -> Iterator[tuple[Path, str, bool]]:
    """(file, package, whether a function imports it) of a program and of all of the project that it imports."""
    waiting, seen = [script], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name, called in imports(ast.parse(path.read_text(encoding="utf-8"))):
            folders = (path.parent, REPO, REPO / "data", REPO / "tools")
            files = [folder / (name.replace(".", "/") + ".py") for folder in folders]
            own = next((file for file in files if file.is_file()), None)
            package = name.partition(".")[0]
            beside = any((folder / each).exists() for folder in folders for each in (package, f"{package}.py"))
            if own:
                waiting.append(own)
            elif not beside and package not in sys.stdlib_module_names:
                yield path, package, called


@pytest.mark.parametrize("script", RECORD_PATH)
def test_a_command_of_readme_imports_what_requirements_txt_names(script):
    for path, package, called in third_party_imports(REPO / script):
        known = DECLARED | OPTIONAL if called else DECLARED
        assert package in known, f"{path.relative_to(REPO)} imports {package}, which requirements.txt does not name"


def test_imports_are_followed_to_where_they_are():
    found = {(path.name, package, called) for path, package, called in third_party_imports(REPO / "data/prepare.py")}
    assert {("prepare.py", "tqdm", False), ("train_gpt.py", "torch", False), ("documents.py", "pyarrow", True)} <= found
    assert {"data/fetch_fineweb.py", "data/prepare.py", "train_gpt.py"} < set(RECORD_PATH)


def distributions_needed() -> set[str]:
    """What installing requirements.txt brings, by the installed packages' own metadata."""
    waiting, found = sorted(DECLARED), set()
    while waiting:
        name = module_name(waiting.pop())
        if name not in found:
            found.add(name)
            try:
                needs = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:  # of another platform
                continue
            waiting += [re.split(r"[^A-Za-z0-9_.-]", need)[0] for need in needs if "extra ==" not in need]
    return found


# Runs the program that its arguments name in a process that finds no package but those that requirements.txt brings.
ALONE = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Absent())
del sys.argv[0]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    needed = distributions_needed()
    installed = importlib.metadata.packages_distributions()
    absent = {module for module, names in installed.items() if not needed & set(map(module_name, names))}
    assert {"pytest", "hypothesis"} <= absent
    command = [sys.executable, "-c", ALONE.format(absent=absent), str(REPO / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("script", ["data/fetch_fineweb.py", "tools/record.py", "tools/build_kg.py"])
def test_a_program_starts_with_requirements_txt_alone(script):
    done = run_alone(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage:")


def test_text_is_prepared_with_requirements_txt_alone(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(make_documents(1, 400)), encoding="utf-8")
    arguments = [tmp_path / "a.txt", "--out", tmp_path / "out", "--train-tokenizer", 400, "--workers", 1]
    done = run_alone("data/prepare.py", *map(str, arguments))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "manifest.json").is_file()
    (tmp_path / "b.parquet").write_bytes(b"")
    done = run_alone("data/prepare.py", str(tmp_path / "b.parquet"), "--out", str(tmp_path / "out2"))
    assert done.returncode == 2
    assert "pip install pyarrow" in done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("setuptools"), reason="setuptools is not installed")
def test_pip_and_uv_find_the_requirements_files_in_pyproject(tmp_path):
    names = sorted(path.name for path in REPO.glob("requirements*.txt"))
    for name in [*names, "pyproject.toml"]:
        shutil.copy(REPO / name, tmp_path)
    code = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    (folder,) = tmp_path.glob("*.dist-info")
    metadata = importlib.metadata.PathDistribution(folder)
    found = {re.sub(r"\s", "", line) for line in metadata.requires or []}
    expected = set(requirements("requirements.txt"))
    for extra in ("tools", "dev"):
        expected |= {f'{line};extra=="{extra}"' for line in requirements(f"requirements-{extra}.txt")}
    assert found == expected
    assert names == ["requirements-dev.txt", "requirements-tools.txt", "requirements.txt"]
    assert set(metadata.metadata["Requires-Python"].split(",")) == {">=3.10", "<3.14"}


def test_make_installs_every_requirements_file():
    listed = subprocess.run(["make", "-n", "-B"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert {path.name for path in REPO.glob("requirements*.txt")} == set(re.findall(r"-r (\S+)", listed))
