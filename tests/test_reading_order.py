"""train_gpt.py reads from the top: its table of contents is true, and what is called stands below its caller."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from golden_support import REPO

SOURCE = (REPO / "train_gpt.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
TITLE = re.compile(r"^# (\d+)\. (.+?) -+$")
Definition = ast.FunctionDef | ast.ClassDef


def sections() -> dict[int, tuple[str, int]]:
    """Number → title and line of every section."""
    found = ((TITLE.match(line), number) for number, line in enumerate(SOURCE.splitlines(), start=1))
    return {int(match[1]): (match[2], number) for match, number in found if match}


def test_the_table_of_contents_is_true():
    header = ast.get_docstring(TREE, clean=True) or ""
    listed = re.findall(r"(\d+)\. ([A-Z][a-z]+(?: and [a-z]+)?)", header)
    assert [(number, title) for number, (title, _) in sections().items()] == [(int(n), title) for n, title in listed]
    assert list(sections()) == list(range(1, len(listed) + 1))
    assert len(listed) >= 8


def definitions() -> Iterator[tuple[int, Definition]]:
    """Every function and class at the top level with the number of its section; 0 is the header."""
    starts = [(line, number) for number, (_, line) in sections().items()]
    for node in TREE.body:
        if isinstance(node, Definition):
            yield max((number for line, number in starts if line < node.lineno), default=0), node


def calls_of(node: Definition) -> set[str]:
    """Names that the functions in a definition call; what runs when the module is imported does not count."""
    members = [node] if isinstance(node, ast.FunctionDef) else node.body
    functions = [member for member in members if isinstance(member, ast.FunctionDef)]
    calls = [call for function in functions for part in function.body for call in ast.walk(part)]
    return {call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}


def test_every_function_stands_below_the_first_that_calls_it_in_its_section():
    section_of = {node.name: number for number, node in definitions() if isinstance(node, ast.FunctionDef)}
    first_caller: dict[str, Definition] = {}
    for number, node in definitions():
        for name in calls_of(node) - {node.name}:
            if section_of.get(name) == number > 0:
                first_caller.setdefault(name, node)
    lines = {node.name: node.lineno for _, node in definitions()}
    upwards = [
        f"{name} (line {lines[name]}) stands above {caller.name} (line {caller.lineno})"
        for name, caller in first_caller.items()
        if lines[name] < caller.lineno
    ]
    assert not upwards, "\n".join(upwards)
    assert len(first_caller) > 40
