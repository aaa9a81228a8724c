"""bench/mutations.py on a program of a few lines: what it changes and leaves alone, and what it says of the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPO

sys.path.insert(0, str(REPO))
from bench import mutations

PROGRAM = '''"""A program — with one function in a section."""

def unrelated(a: int = 3) -> int:
    return a + 4


def lr_scale_at(step, first, second):
    """Nothing in 1 + 2 here changes."""
    log.row("lr", step=step + 10)
    if step < 3:
        raise ValueError(f"{step + 20} is less than {3 + 30}")
    return max(step, 5) - pick(first, second) * 7


def pick(first, second):
    return first
'''
TEST = """
import types

import train_gpt

train_gpt.log = types.SimpleNamespace(row=lambda *args, **fields: None)

def test_values():
    assert train_gpt.lr_scale_at(6, 2, 3) == 6 - 14
"""


def faults_of(program: str, name: str = "lr_scale_at") -> list[mutations.Fault]:
    return [fault for fault in mutations.Finder(program.encode()).faults if fault.name == name]


def test_each_kind_is_found_and_texts_are_left_alone():
    found = {(fault.kind, fault.segment, fault.replacement) for fault in faults_of(PROGRAM)}
    result, product = "max(step, 5) - pick(first, second) * 7", "pick(first, second) * 7"
    assert found == {
        ("comparison", "step < 3", "step <= 3"),
        ("comparison", "step < 3", "step > 3"),
        ("constant", "3", "4"),
        ("constant", "5", "6"),
        ("constant", "7", "8"),
        ("term", result, "max(step, 5)"),
        ("sign", result, "max(step, 5) + pick(first, second) * 7"),
        ("term", product, "pick(first, second)"),
        ("term", product, "7"),
        ("minmax", "max(step, 5)", "min(step, 5)"),
        ("arguments", "pick(first, second)", "pick(second, first)"),
    }


def test_nothing_but_the_segment_changes():
    for fault in faults_of(PROGRAM):
        changed = fault.put_into(PROGRAM.encode()).decode()
        assert changed != PROGRAM
        head, tail = changed.split(fault.replacement, 1) if changed.count(fault.replacement) == 1 else ("", "")
        assert not head or head + fault.segment + tail == PROGRAM


def test_only_sections_are_drawn_and_one_seed_draws_the_same():
    drawn = [mutations.Finder(PROGRAM.encode()).draw(seed, 3, []) for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert {fault.name for faults in drawn for fault in faults} == {"lr_scale_at"}
    assert len({tuple(faults) for faults in drawn}) > 1


@pytest.mark.parametrize(
    ("old", "new", "placed"),
    [
        ("def unrelated", "\n\ndef unrelated", True),  # moved
        ("def lr_scale_at", "def renamed", True),  # the statement stands elsewhere
        ("    return max(step, 5) - pick", "    return 1 + max(step, 5) - pick", True),  # same function
        ("pick(first, second) * 7", "pick(first,\n             second) * 7", True),  # laid out in another way
        ("pick(first, second)", "pick(first, third)", False),
    ],
)
def test_a_recorded_fault_finds_its_place_in_a_changed_program(old, new, placed):
    fault = next(fault for fault in faults_of(PROGRAM) if fault.kind == "arguments")
    changed = PROGRAM.replace(old, new).encode()
    found = mutations.Finder(changed).place(fault.record())
    assert (found is not None) == placed
    if found is not None:
        assert found.section == "optimizers"
        assert "pick(second,first)*7" in found.put_into(changed).decode().replace(" ", "").replace("\n", "")


def test_what_is_to_be_changed_is_in_the_program():
    finder = mutations.Finder((REPO / mutations.PROGRAM).read_bytes())
    assert set(finder.section_of) <= finder.defined


def mutate(root: Path, out: Path, *options: str) -> dict:
    script = str(REPO / "bench" / "mutations.py")
    command = [sys.executable, script, "--root", str(root), "--out", str(out), "--count", "9", *options]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    last = json.loads(process.stdout.splitlines()[-1])
    assert {key: value for key, value in json.loads(out.read_text()).items() if key in last} == last
    return json.loads(out.read_text())


def test_outcomes_are_those_of_the_tests(tmp_path):
    """One fault a statement; then a reason is written beside each."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "train_gpt.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "tests" / "test_values.py").write_text(TEST, encoding="utf-8")
    first = mutate(tmp_path, tmp_path / "first.json")
    assert len({row["statement"] for row in first["faults"]}) == len(first["faults"]) == 2
    unseen = {("step < 3", "step <= 3"), ("3", "4"), ("5", "6")}  # with step = 6
    for row in first["faults"]:
        survives = (row["segment"], row["replacement"]) in unseen
        assert row["caught_by"] == ("" if survives else "tests/test_values.py::test_values")
    assert first["outcomes"]["caught"] == sum(row["caught_by"] != "" for row in first["faults"])
    assert first["outcomes"]["caught"] + first["outcomes"]["survived"] == 2
    for row in first["faults"]:
        row["equivalent"] = "for the sake of the test"
    (tmp_path / "judged.json").write_text(json.dumps(first), encoding="utf-8")
    again = mutate(tmp_path, tmp_path / "again.json", "--replay", str(tmp_path / "judged.json"))
    assert again["outcomes"] == dict(section="all", caught=0, survived=0, equivalent=2)
