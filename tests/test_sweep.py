"""tools/sweep.py: which runs it makes, that it goes on where it was, and what its table says about them."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support import REPO, SCRIPT, assert_refused, tiny_environ

import train_gpt
from tools import sweep
from tools.sweep_report import holm, welch_p

FAKE = REPO / "tests" / "fake_train_gpt.py"


@pytest.fixture(autouse=True)
def _no_settings_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in sweep.FIELDS:
        monkeypatch.delenv(name, raising=False)


def run(out: Path, *options: object, seeds: str = "1,2,3") -> int:
    argv = ["--script", FAKE, "--out", out, "--seeds", seeds, "--threads", 1, *options]
    return sweep.main([str(word) for word in argv])


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report(out)["variants"]}


def settings_of(*options: str) -> dict[str, dict[str, str]]:
    args = sweep.build_parser().parse_args(["--out", "x", *options])
    return {variant.name: dict(variant.settings) for variant in sweep.choose_variants(args)}


# ----------------------------------------------------------------------------------------------------------
# Variants
# ----------------------------------------------------------------------------------------------------------
def test_a_grid_has_every_combination_and_common_settings() -> None:
    found = settings_of("--recipe", "swarm", "--set", "A=1,2", "--set", "B=x,y", "--env", "C=3", "D=4")
    common = dict(RECIPE="swarm", C="3", D="4")
    assert found == {f"A={a} B={b}": {**common, "A": a, "B": b} for a, b in itertools.product("12", "xy")}


def test_an_ablation_has_each_part_alone_and_each_left_out() -> None:
    found = settings_of("--part", "one: A=1 B=2", "--part", "C=3", "--part", "D='4 5'")
    one, c, d = dict(A="1", B="2"), dict(C="3"), dict(D="4 5")
    assert found == {
        "none": {}, "one alone": one, "C=3 alone": c, "D=4 5 alone": d, "all": one | c | d,
        "all but one": c | d, "all but C=3": one | d, "all but D=4 5": one | c,
    }  # fmt: skip
    assert next(iter(found)) == "none"
    assert list(settings_of("--part", "A=1", "--part", "B=2")) == ["none", "A=1 alone", "B=2 alone", "all"]


def test_variants_of_a_file_share_its_star_line_and_the_baseline_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "variants.txt"
    path.write_text("# a comment\n*: A=1 B=2\n\nfirst: B=3  # another\nsecond: VE_LAYERS=1,2\n")
    monkeypatch.setenv("SWARM_EVERY", "7")
    found = settings_of("--variants", str(path), "--variant", "RECIPE=leaky", "--baseline", "second")
    common = dict(SWARM_EVERY="7", A="1", B="2")
    assert list(found) == ["second", "RECIPE=leaky", "first"]
    assert found["first"] == {**common, "B": "3"}
    assert found["second"] == {**common, "VE_LAYERS": "1,2"}
    assert found["RECIPE=leaky"] == {**common, "RECIPE": "leaky"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--set"]), (["--set", "A"], ["'A'"]), (["--variant", "x: a=1"], ["'a=1'"]),
        (["--set", "SEED=1,2"], ["--seeds"]), (["--variant", "x: A=1", "--variant", "x: A=2"], ["'x'", "twice"]),
        (["--set", "A=1", "--baseline", "B"], ["A=1"]), (["--variants", "nowhere.txt"], ["nowhere.txt"]),
        (["--variant", "x: A='"], ["quot"]), (["--jobs", "0"], ["--jobs"]),
        (["--variant", "x: A=1 A=2"], ["A", "twice"]), (["--set", "A=1", "--seeds", "1,1"], ["--seeds"]),
        (["--stage", "best"], ["sliding_window"]), (["--part", ""], ["--part"]),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line(
    options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, sweep.main, ["--out", tmp_path / "out", *options], *words)
    assert not (tmp_path / "out").exists()


def test_a_setting_that_train_gpt_refuses_is_found_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", "LEAKY_SLOPE=0.5,steep"]
    assert_refused(capsys, sweep.main, ["--out", tmp_path / "out", *options], "LEAKY_SLOPE", "steep")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [("a b", "a_b"), ("x" * 60 + "1", "x" * 60 + "2")])
def test_two_variants_never_share_a_folder(
    names: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = [f"{name}: KG_PATH=place{number}" for number, name in enumerate(names)]
    options = ["--script", FAKE, "--out", tmp_path / "out", "--variant", variants[0], "--variant", variants[1]]
    assert_refused(capsys, sweep.main, options, *map(repr, names), "name")
    assert not (tmp_path / "out").exists()
    settings = [f"{name}: LEAKY_SLOPE=0.{number}" for number, name in enumerate(names)]  # these have their own
    assert run(tmp_path / "out", "--variant", settings[0], "--variant", settings[1], seeds="1") == 0
    assert len(list((tmp_path / "out").rglob("run.jsonl"))) == 2


@pytest.mark.parametrize("path", sorted((REPO / "bench").glob("*.txt")), ids=lambda path: path.stem)
def test_the_studies_that_are_kept_are_made_of_settings_that_exist(path: Path) -> None:
    for settings in settings_of("--variants", str(path)).values():
        assert train_gpt.Config.from_env(settings)


# ----------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------
def test_welch_is_its_textbook_formula_and_says_nothing_about_single_values() -> None:
    source = random.Random(3)
    for sizes in ((3, 3), (2, 5), (4, 3)):
        a, b = ([source.gauss(2, 1 + place) for _ in range(size)] for place, size in enumerate(sizes))
        squares = [stdev(each) ** 2 / len(each) for each in (a, b)]
        t = (fmean(a) - fmean(b)) / math.sqrt(sum(squares))
        freedom = sum(squares) ** 2 / sum(square**2 / (len(each) - 1) for square, each in zip(squares, (a, b)))
        assert welch_p(a, b) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-9)
    assert welch_p([1.0], [1.0, 2.0]) is None
    assert welch_p([1.0, 1.0], [1.0, 1.0]) == 1
    assert welch_p([1.0, 1.0], [2.0, 2.0]) == 0


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    """At every level: sorted p are compared with level / (m - rank) until the first that is not below it."""
    source = random.Random(4)
    for count in (1, 2, 5, 8):
        p_values = [source.random() ** 3 for _ in range(count)]
        corrected = holm(p_values)
        for level in (0.001, 0.01, 0.05, 0.2, 0.5, 0.9):
            rejected, ordered = set(), sorted(range(count), key=lambda index: p_values[index])
            for rank, index in enumerate(ordered):
                if p_values[index] > level / (count - rank):
                    break
                rejected.add(index)
            assert {index for index, p in enumerate(corrected) if p is not None and p <= level} == rejected
    assert holm([None, 0.01, None, 0.04]) == [None, 0.02, None, 0.04]
    assert holm([]) == []


# ----------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------
def test_the_report_has_what_the_logs_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--set", "LEAKY_SLOPE=0.5,0.75,0.9", "--jobs", 2) == 0
    scores: dict[str, list[float]] = {}
    for path in sorted(tmp_path.glob("*/seed*/logs/run.jsonl")):
        scores.setdefault(path.parts[-4].rpartition("-")[0], []).append(
            json.loads(path.read_text().splitlines()[-1])["val_bpb"]
        )
    rows = rows_of(tmp_path)
    assert list(rows) == ["LEAKY_SLOPE=0.5", "LEAKY_SLOPE=0.75", "LEAKY_SLOPE=0.9"]
    base = scores["LEAKY_SLOPE=0.5"]
    tests = [float(np.asarray(stats.ttest_ind(scores[name], base, equal_var=False))[1]) for name in list(rows)[1:]]
    for name, row in rows.items():
        assert (row["n"], row["steps"], row["bytes_total"]) == (3, 100, 201_000)
        assert row["mean"] == pytest.approx(fmean(scores[name]))
        assert row["std"] == pytest.approx(stdev(scores[name]))
        assert row["step_s"] == pytest.approx(0.015)
    for row, p in zip(list(rows.values())[1:], tests):
        assert row["difference"] == pytest.approx(row["mean"] - fmean(base))
        assert row["welch_p"] == pytest.approx(p)
        assert row["holm_p"] == pytest.approx(max(min(1, 2 * min(tests)), p if p > min(tests) else 0))
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert table in printed
    assert "[9/9]" in printed
    assert f"| LEAKY_SLOPE=0.75 | 3 | {rows['LEAKY_SLOPE=0.75']['mean']:.4f} ± " in table
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "9 of 9" in table
    assert "MIXED" not in table


@pytest.mark.parametrize(("stage", "more"), [("final", 0.0), ("sliding_window", 0.25), ("roundtrip", 0.5)])
def test_the_stage_that_is_asked_for_is_compared(stage: str, more: float, tmp_path: Path) -> None:
    assert run(tmp_path, "--variant", "LEAKY_SLOPE=0", "--stage", stage, seeds="5") == 0
    row = rows_of(tmp_path)["LEAKY_SLOPE=0"]
    assert row["mean"] == pytest.approx(2 + more, abs=0.01)
    assert row["std"] is None


def test_only_what_is_missing_is_run_and_other_settings_are_other_runs(tmp_path: Path) -> None:
    assert run(tmp_path, "--set", "LEAKY_SLOPE=0.5,0.75", seeds="1") == 0
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.jsonl")}
    assert run(tmp_path, "--set", "LEAKY_SLOPE=0.5,0.75,0.9", seeds="1,2") == 0
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.jsonl")}
    assert len(times) == 2
    assert len(logs) == 6
    assert times.items() <= logs.items()
    assert run(tmp_path, "--set", "LEAKY_SLOPE=0.5,0.75", "--env", "ITERATIONS=7", seeds="1") == 0
    assert len(list(tmp_path.rglob("run.jsonl"))) == 8
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_failed_run_is_named_with_its_last_line_the_others_go_on_and_it_is_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "2")
    assert run(tmp_path, "--set", "LEAKY_SLOPE=0.5,0.75") == 1
    printed = capsys.readouterr().out
    assert "LEAKY_SLOPE=0.75, seed 2: FAILED, exit code 2: error: the disk is full" in printed
    assert "missing: LEAKY_SLOPE=0.5, seed 2: exit code 2: error: the disk is full" in printed
    assert {name: row["n"] for name, row in rows_of(tmp_path).items()} == {"LEAKY_SLOPE=0.5": 2, "LEAKY_SLOPE=0.75": 2}
    assert len(report(tmp_path)["missing"]) == 2
    monkeypatch.delenv("FAKE_FAILS")
    assert run(tmp_path, "--set", "LEAKY_SLOPE=0.5,0.75") == 0
    assert "[6/6]" in capsys.readouterr().out
    assert report(tmp_path)["missing"] == []


def test_what_a_failed_run_was_made_of_does_not_bind_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    data.mkdir()
    options = ["--variant", "LEAKY_SLOPE=0.5", "--env", f"DATA_PATH={data}"]
    monkeypatch.setenv("FAKE_FAILS", "1")
    assert run(out, *options, seeds="1") == 1
    monkeypatch.delenv("FAKE_FAILS")
    (data / "text_train_000000.bin").write_bytes(b"tokens")
    assert run(out, *options, seeds="1") == 0
    (record,) = out.rglob("sweep.json")
    assert len(json.loads(record.read_text())["data"]) == 1


def test_without_matplotlib_the_table_says_that_it_has_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, "--variant", "LEAKY_SLOPE=0.5", seeds="1") == 0
    assert (tmp_path / "report.png").is_file()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(tmp_path, "--variant", "LEAKY_SLOPE=0.5", seeds="1") == 0
    printed = capsys.readouterr().out
    assert "pip install matplotlib" in printed
    assert (tmp_path / "report.md").read_text(encoding="utf-8") in printed
    assert not (tmp_path / "report.png").exists()


@pytest.mark.parametrize("absent", ["data", "tokenizer", "script"])
def test_what_every_run_would_miss_is_said_before_the_first(
    absent: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tiny_environ(tiny_data, tmp_path)
    changed = {"data": dict(DATA_PATH=tmp_path / "no"), "tokenizer": dict(TOKENIZER_PATH=tmp_path / "no")}
    environ = there | {name: str(value) for name, value in changed.get(absent, {}).items()}
    settings = [f"{name}={value}" for name, value in environ.items() if name in sweep.FIELDS - sweep.OWN]
    script = ["--script", tmp_path / "no"] if absent == "script" else []
    words = ["--out", tmp_path / "out", "--env", *settings, "--variant", "LEAKY_SLOPE=0.5", *script]
    assert_refused(capsys, sweep.main, words, str(tmp_path / "no"))
    assert not (tmp_path / "out").exists()


def test_a_variable_that_train_gpt_does_not_know_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--set", "NOSUCH=1,2", seeds="1") == 0
    assert "NOSUCH" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("event", ["total_bytes", "config"])
def test_a_finished_run_whose_log_lacks_a_row_is_run_again(
    event: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--variant", "LEAKY_SLOPE=0.5", seeds="1,2") == 0
    bad, good = sorted(tmp_path.rglob("run.jsonl"))
    lines = [line for line in bad.read_text().splitlines(keepends=True) if json.loads(line)["event"] != event]
    bad.write_text("".join(lines))
    written = good.stat().st_mtime_ns
    capsys.readouterr()
    assert run(tmp_path, "--variant", "LEAKY_SLOPE=0.5", "--list", seeds="1,2") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]] == ["unusable", "done"]
    assert run(tmp_path, "--variant", "LEAKY_SLOPE=0.5", seeds="1,2") == 0
    assert rows_of(tmp_path)["LEAKY_SLOPE=0.5"]["n"] == 2
    (aside,) = tmp_path.glob("*/unusable1-seed1/logs/run.jsonl")
    assert aside.read_text() == "".join(lines)
    assert good.stat().st_mtime_ns == written


def test_a_stage_that_no_run_has_is_said_and_nothing_is_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--variant", "LEAKY_SLOPE=0.5", seeds="1") == 0
    (log,) = tmp_path.rglob("run.jsonl")
    written = log.stat().st_mtime_ns
    assert run(tmp_path, "--variant", "LEAKY_SLOPE=0.5", "--stage", "ttt", seeds="1") == 1
    assert "compare another stage" in capsys.readouterr().out
    assert log.stat().st_mtime_ns == written


def test_the_list_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--set", "LEAKY_SLOPE=0.5,0.75", seeds="1") == 0
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert run(tmp_path, "--set", "LEAKY_SLOPE=0.5,0.75", "--recipe", "", "--list", seeds="1,2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["done", "done", "missing", "missing"]
    assert "2 of 4" in lines[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_of_other_code_or_data_are_refused_or_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, data = tmp_path / "train.py", tmp_path / "data"
    script.write_bytes(FAKE.read_bytes())
    data.mkdir()
    out = tmp_path / "out"
    argv = [
        "--script",
        script,
        "--out",
        out,
        "--variant",
        "LEAKY_SLOPE=0.5",
        "--env",
        f"DATA_PATH={data}",
        "--seeds",
        "1",
    ]
    words = [str(word) for word in argv]
    assert sweep.main(words) == 0
    (data / "text_train_000000.bin").write_bytes(b"others")
    assert_refused(capsys, sweep.main, words, "LEAKY_SLOPE=0.5, seed 1", "data", "--mixed")
    (data / "text_train_000000.bin").unlink()
    assert sweep.main(words) == 0
    script.write_text(script.read_text() + "\n")
    assert_refused(capsys, sweep.main, words, "code", sweep.code_digest(script), "--mixed")
    words[words.index("1")] = "1,2"
    assert sweep.main([*words, "--mixed"]) == 0
    assert "MIXED: LEAKY_SLOPE=0.5, seed 1 has code" in (out / "report.md").read_text(encoding="utf-8")
    assert len(report(out)["code"]) == 2


@pytest.mark.parametrize(
    ("what", "edit"),
    [("code", "Path(__file__).open('a').write('#')"), ("data", "Path(os.environ['DATA_PATH'], 'x.bin').touch()")],
)
def test_a_run_does_not_begin_with_other_code_or_data_than_the_sweep(
    what: str, edit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, data, out = tmp_path / "train.py", tmp_path / "data", tmp_path / "out"
    ending = "sys.exit(main())"
    text = FAKE.read_text(encoding="utf-8")
    assert text.count(ending) == 1
    script.write_text(text.replace(ending, f"code = main()\n    {edit}\n    sys.exit(code)"), encoding="utf-8")
    data.mkdir()
    options = ["--variant", "LEAKY_SLOPE=0.5", "--env", f"DATA_PATH={data}", "--script", script]
    assert run(out, *options, seeds="1,2") == 1
    assert f"seed 2: FAILED, changed since the sweep began: {what} was " in capsys.readouterr().out
    assert [path.parent.name for path in out.rglob("sweep.json")] == ["seed1"]
    assert rows_of(out)["LEAKY_SLOPE=0.5"]["n"] == 1


def test_runs_of_another_text_machine_or_dtype_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, "--variant", "LEAKY_SLOPE=0.5", seeds="1") == 0
    monkeypatch.setenv("FAKE_TEXT", "f" * 16)
    monkeypatch.setenv("FAKE_DTYPE", "bf16")
    assert run(tmp_path, "--variant", "LEAKY_SLOPE=0.5", "--threads", 2, seeds="1,2") == 0
    notes = report(tmp_path)["notes"]
    assert any(note.startswith("MIXED") and "f" * 16 in note for note in notes)
    assert any("threads: 1 and 2" in note for note in notes)
    assert any("compute_dtype: bf16 and fp32" in note for note in notes)


def test_equal_time_gives_a_slower_variant_fewer_steps(tmp_path: Path) -> None:
    options = ["--set", "QK_GAIN_INIT=1.5,3", "--equal-time"]
    assert run(tmp_path, *options, seeds="1,2") == 0
    rows = rows_of(tmp_path)
    again = rows["QK_GAIN_INIT=3 at equal time"]
    assert next(iter(rows)) == "QK_GAIN_INIT=1.5"
    assert len(rows) == 3
    assert (again["steps"], again["n"]) == (50, 2)
    assert again["settings"]["WARMDOWN_ITERS"] == "25"
    assert again["train_time_s"] == pytest.approx(rows["QK_GAIN_INIT=1.5"]["train_time_s"])
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.jsonl")}
    assert run(tmp_path, *options, seeds="1,2") == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run.jsonl")} == logs


def test_a_time_that_is_another_one_after_all_is_said(tmp_path: Path) -> None:
    options = ["--set", "QK_GAIN_INIT=1.5,3", "--env", "FAKE_BEGIN_MS=1000", "--equal-time"]
    assert run(tmp_path, *options, seeds="1,2") == 0
    rows = rows_of(tmp_path)
    assert rows["QK_GAIN_INIT=3 at equal time"]["train_time_s"] > 1.1 * rows["QK_GAIN_INIT=1.5"]["train_time_s"]
    (note,) = [note for note in report(tmp_path)["notes"] if "QK_GAIN_INIT=3" in note]
    assert "QK_GAIN_INIT=3 at equal time (2.9 s)" in note
    assert "QK_GAIN_INIT=1.5" not in note


def test_what_the_clock_ended_is_not_run_again_with_more_steps(tmp_path: Path) -> None:
    variants = [f"--variant=MAX_WALLCLOCK_SECONDS={seconds}" for seconds in (0.9, 0.8)]
    assert run(tmp_path, *variants, "--equal-time", seeds="1") == 0
    assert [row["steps"] for row in rows_of(tmp_path).values()] == [60, 53]
    assert any("MAX_WALLCLOCK_SECONDS=0.8 (0.8 s)" in note for note in report(tmp_path)["notes"])


@pytest.mark.parametrize(("visible", "used"), [("3,GPU-5", {"3", "GPU-5"}), ("7", {"7"}), ("", {""}), (None, {"None"})])
def test_runs_at_a_time_have_gpus_of_their_own(
    visible: str | None, used: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None and torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    monkeypatch.setenv("FAKE_MEETS", str(meeting))
    assert run(tmp_path / "out", "--variant", "LEAKY_SLOPE=0.5", "--jobs", 2, seeds="1,2") == 0
    consoles = [path.read_text(encoding="utf-8").split("\n") for path in (tmp_path / "out").rglob("console.txt")]
    assert {line.removeprefix("GPU").strip() for lines in consoles for line in lines if line.startswith("GPU")} == used


def test_a_bar_in_a_name_makes_no_cell_of_the_table(tmp_path: Path) -> None:
    assert run(tmp_path, "--variant", "one|two: LEAKY_SLOPE=0.5", seeds="1") == 0
    head, _, row = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()[:3]
    assert len(re.findall(r"(?<!\\)\|", row)) == head.count("|")


def test_the_record_of_a_run_that_is_no_record_is_none(tmp_path: Path) -> None:
    assert run(tmp_path, "--variant", "LEAKY_SLOPE=0.5", seeds="1") == 0
    (path,) = tmp_path.rglob("sweep.json")
    path.write_text("[]")
    assert run(tmp_path, "--variant", "LEAKY_SLOPE=0.5", seeds="1") == 0
    assert report(tmp_path)["missing"] == []


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_sweep_goes_on_in_the_middle_of_a_run(
    ended_by: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "begun"
    monkeypatch.setenv("FAKE_STOPS", str(begun))
    out = tmp_path / "out"
    options = ["--script", FAKE, "--out", out, "--set", "LEAKY_SLOPE=0.5,0.75", "--seeds", "1", "--threads", "1"]
    command = [sys.executable, str(REPO / "tools" / "sweep.py"), *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    wait_for(begun)
    process.send_signal(ended_by)
    said = process.communicate(timeout=60)[1]
    words = [str(word) for word in options]
    if ended_by == signal.SIGKILL:  # the run goes on by itself, and nobody else may write into its folder
        assert_refused(capsys, sweep.main, words, str(out), "goes on there")
        os.kill(int(begun.read_text()), signal.SIGTERM)
        with (out / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
    else:
        assert process.returncode == 128 + ended_by
        assert said == "interrupted; the same command goes on from here\n"
        assert "0 of 2" in (out / "report.md").read_text(encoding="utf-8")
    assert sweep.main(words) == 0
    resumed = ["resumed" in path.read_text() for path in sorted(out.rglob("run.jsonl"))]
    assert sorted(resumed) == [False, True]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    argv = ["--script", FAKE, "--variant", "A=1", "--out", tmp_path / "file" / "out"]
    assert_refused(capsys, sweep.main, argv, "file")


def test_real_runs_are_made_compared_and_told_apart_by_their_settings(tiny_data: Path, tmp_path: Path) -> None:
    machine = tiny_environ(tiny_data, tmp_path, ITERATIONS=3, EVAL_STRIDE=32, TTT_ENABLED=0, MIXER="none")
    env = [f"{name}={value}" for name, value in machine.items() if name in sweep.FIELDS - sweep.OWN]
    argv = ["--out", tmp_path / "out", "--env", *env, "--set", "LEAKY_SLOPE=0.5,0.9", "--seeds", "1"]
    assert sweep.main([*map(str, argv), "--threads", "1", "--jobs", "2", "--stage", "roundtrip"]) == 0
    rows = rows_of(tmp_path / "out")
    assert rows["LEAKY_SLOPE=0.5"]["mean"] != rows["LEAKY_SLOPE=0.9"]["mean"]
    for name, row in rows.items():
        (log,) = (tmp_path / "out").glob(f"{name}-*/seed1/logs/run.jsonl")
        events = {each["event"]: each for each in map(json.loads, log.read_text().splitlines())}
        assert row["mean"] == events["final_int6_roundtrip_exact"]["val_bpb"]
        assert events["config"]["leaky_slope"] == float(name.partition("=")[2])
        assert row["steps"] == 3
        assert row["bytes_total"] == events["total_bytes"]["bytes"]
    assert report(tmp_path / "out")["code"] == [train_gpt.code_digest()] == [sweep.code_digest(SCRIPT)]
    assert str(tmp_path) not in (tmp_path / "out" / "report.json").read_text()
