"""tools/run_report.py: the page says what the logs say, whatever they hold, and stands alone in a browser."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import assert_refused

import train_gpt
from tools import run_report

Row = dict[str, Any]
STAGES = ("before quantization", "from the artifact", "sliding window", "test-time training", "mixed with n-grams")


def log_rows(seed: int = 1, bpb: float = 2.0, **settings: Any) -> list[Row]:
    """A whole run in rows: 20 steps, two validations, three votes, five stages, four chunks."""
    source = np.random.default_rng(seed)
    config = dict(recipe="demo", seed=seed, run_id=f"r{seed}", out_dir="runs", swarm_enabled=True, ttt_enabled=True)
    config |= dict(mixer="backoff", matrix_lr=0.027, ve_layers=[2], compile=None) | settings
    rows: list[Row] = [
        dict(event="environment", python="3.11", torch="2.13", hardware="a CPU", world_size=1),
        dict(event="config", **config),
        dict(event="validation", targets=7500, bytes=18_400, digest="0123456789abcdef"),
        dict(event="track", track="adaptive"),
    ]
    for step in range(1, 21):
        clock = dict(step=step, steps=20, train_time_ms=31.5 * step, step_avg_ms=31.5)
        loss, speed = 2 + 4 * math.exp(-step / 5) + source.normal(0, 0.02), 66_000 + source.normal(0, 500)
        rows.append(dict(event="step", train_loss=loss, tokens_per_s=speed, lr_scale=1.0, **clock))
        if step % 10 == 0:
            rows.append(dict(event="step_validation", val_loss=loss + 0.1, val_bpb=loss / 1.7, **clock))
        if step in (5, 12, 15):
            cast = {"qat_agent": dict(vote="veto" if step == 5 else "abstain", confidence=0.8)}
            change = dict(agent="clip_agent", parameter="clip_norm", old=0.3, new=0.25, confidence=0.7)
            rows.append(dict(event="vote", step=step, reason="calm", votes=cast, passed=step != 5, **change))
    shift = source.normal(0, 0.01)
    scores = [bpb + shift, bpb + shift + 0.004, bpb + shift - 0.01, bpb + shift - 0.02, bpb + shift - 0.4]
    scored = [dict(val_loss=1.7 * score, val_bpb=score, eval_time_ms=1200.0) for score in scores]
    rows += [
        dict(event="memory", peak_mib=612),
        dict(event="diagnostic", weights="post_ema", **scored[0]),
        dict(event="tensor_bytes", bytes={"mlp": 3000, "tok_emb": 1000}, codec={"mlp": "int6", "tok_emb": "int8"}),
        dict(event="artifact_bytes", bytes=4321),
        dict(event="code_bytes", bytes=250_000),
        dict(event="total_bytes", bytes=254_321, limit=16_000_000),
        dict(event="final_int6_roundtrip", stage="roundtrip", **scored[1]),
        dict(event="evaluation_projected", total_s=9.0, budget_s=600.0),
        dict(event="final_int6_sliding_window", stage="sliding_window", **scored[2]),
    ]
    for chunk in range(4):
        value = bpb + source.normal(0, 0.1)
        fields = dict(targets=2000 * (chunk + 1), val_loss=1.7 * value, val_bpb=value, val_bpb_so_far=value + 0.01)
        rows.append(dict(event="ttt_chunk", chunk=chunk, chunks=4, lr=0.01, **fields))
    mass = dict(mass=0.999999987, worst=1.5e-7, gap=2.5e-8, valid=True)
    rows += [
        dict(event="legal_ttt", stage="ttt", **scored[3]),
        dict(event="sampled_targets", seed=77, count=79),
        dict(event="final_mixed", stage="mixed", **scored[4], **mass),
        dict(event="evaluation", total_s=8.25, budget_s=600.0),
        dict(event="final_int8_zlib_roundtrip_exact", val_loss=1.7 * scores[4], val_bpb=scores[4], valid=True),
    ]
    return [{"time": f"2026-01-01T00:00:{n // 2 % 60:02d}.{n % 2}00Z"} | row for n, row in enumerate(rows)]


def without(rows: Sequence[Row], *events: str) -> list[Row]:
    return [row for row in rows if row["event"] not in events]


def changed(rows: Sequence[Row], event: str, **fields: Any) -> list[Row]:
    assert any(row["event"] == event for row in rows)
    return [row | fields if row["event"] == event else row for row in rows]


def write_log(path: Path, rows: Sequence[Row], tail: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


class Page(html.parser.HTMLParser):
    """A page's tables by title, all its text, and every tag with its attributes."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.title, self.text, self.where = "", "", [""]
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.where.append(tag)
        if tag == "table":
            self.table: list[list[str]] = []
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.table[-1].append("")
        elif dict(attrs).get("role") == "region":
            self.title = str(dict(attrs)["aria-label"])

    def handle_endtag(self, tag: str) -> None:
        if tag in self.where:
            while self.where.pop() != tag:
                pass
        if tag == "table":
            self.tables[self.title] = self.table

    def handle_data(self, data: str) -> None:
        if self.where[-1] in ("td", "th"):
            self.table[-1][-1] += data
        if self.where[-1] not in ("style", "title"):
            self.text += data

    def words(self) -> str:
        return " ".join(self.text.split())

    def column(self, table: str, name: str) -> list[str]:
        head, *rows = self.tables[table]
        return [row[head.index(name)] for row in rows]


def report(folder: Path, *logs: Path) -> Page:
    out = folder / "report.html"
    assert run_report.main([*map(str, logs), "--out", str(out)]) == 0
    return Page(out)


def page_of(folder: Path, rows: Sequence[Row], tail: str = "") -> Page:
    return report(folder, write_log(folder / "run.jsonl", rows, tail))


def last(rows: Sequence[Row], event: str) -> Row:
    return [row for row in rows if row["event"] == event][-1]


# What the page says ------------------------
def assert_says(page: Page, rows: Sequence[Row]) -> None:
    """The numbers of a finished run's rows stand on its page."""
    steps = [row for row in rows if row["event"] == "step"]
    assert page.column("Loss by step: The numbers", "step") == [str(row["step"]) for row in steps]
    assert page.column("Loss by step: The numbers", "nats per token") == [f"{row['train_loss']:.4f}" for row in steps]
    seconds = page.column("Loss by time: The numbers", "training time, s")
    assert seconds == [f"{row['train_time_ms'] / 1000:.3f}" for row in steps]
    checks = [row for row in rows if row["event"] == "step_validation"]
    assert page.column("Validation while training", "bits per byte") == [f"{row['val_bpb']:.4f}" for row in checks]
    stages = [row for row in rows if (row["event"] == "diagnostic" or "stage" in row) and "eval_time_ms" in row]
    assert page.column("Scores", "bits per byte") == [f"{row['val_bpb']:.6f}" for row in stages]
    assert page.column("Scores", "seconds") == [f"{row['eval_time_ms'] / 1000:.1f}" for row in stages]
    final, total = last(rows, "final_int8_zlib_roundtrip_exact"), last(rows, "total_bytes")
    words = page.words()
    assert f"{final['val_bpb']:.4f} bits per byte" in words
    assert f"{total['bytes']:,} of {total['limit']:,}" in words
    (sizes,) = page.tables["Artifact and code"][1:]
    parts = [last(rows, name)["bytes"] for name in ("artifact_bytes", "code_bytes", "total_bytes")]
    assert sizes[:3] == [f"{size:,}" for size in parts]
    assert f"{last(rows, 'evaluation')['total_s']:.1f} s of 600 s" in words
    assert f"{last(rows, 'validation')['targets']:,} targets" in words
    shown = dict(page.tables["All settings"][1:])
    for name, value in last(rows, "config").items():
        if name not in ("event", "time"):
            assert shown[name] == (value if isinstance(value, str) else json.dumps(value))


def test_the_numbers_of_a_log_are_those_on_its_page(tmp_path):
    rows = log_rows()
    page = page_of(tmp_path, rows)
    assert_says(page, rows)
    assert page.column("Proposals", "outcome") == ["failed", "passed", "passed"]
    assert page.column("Proposals", "change") == ["0.3 → 0.25"] * 3
    assert "qat_agent veto (0.80)" in page.column("Proposals", "votes")[0]
    chunks = [row for row in rows if row["event"] == "ttt_chunk"]
    table = "Bits per byte of all chunks so far: The numbers"
    assert page.column(table, "so far") == [f"{row['val_bpb_so_far']:.4f}" for row in chunks]
    tensors = page.tables["Bytes by tensor, run: The numbers"][1:]
    assert tensors[:2] == [["mlp", "int6", "3,000", "75.0%"], ["tok_emb", "int8", "1,000", "25.0%"]]
    mixture = dict(zip(*page.tables["The mixture at sampled targets"]))
    assert (mixture["mean mass"], mixture["gap to the stream"]) == ("0.999999987", "2.50e-08")
    assert (mixture["targets checked"], mixture["their seed"], mixture["valid"]) == ("79", "77", "yes")
    machine = dict(zip(*page.tables["Machine"]))
    speeds = [row["tokens_per_s"] for row in rows if row["event"] == "step"]
    assert (machine["peak MiB"], machine["tokens/s, median"]) == ("612", f"{np.median(speeds):,.0f}")
    assert "valid, and within every budget" in page.words()


def test_the_numbers_of_a_real_run_are_those_on_its_page(tiny_run, tmp_path):
    page = report(tmp_path, tiny_run.out_dir / "logs" / "run.jsonl")
    assert_says(page, tiny_run.events)
    assert "✓ valid, and within every budget" in page.words()
    tensors = page.tables["Bytes by tensor, run: The numbers"][1:]
    listed = last(tiny_run.events, "tensor_bytes")
    assert {row[0]: (row[1], row[2]) for row in tensors[:-1]} == {
        name: (listed["codec"][name], f"{size:,}") for name, size in listed["bytes"].items()
    }
    chunks = [row for row in tiny_run.events if row["event"] == "ttt_chunk"]
    table = "Bits per byte of all chunks so far: The numbers"
    assert page.column(table, "so far") == [f"{row['val_bpb_so_far']:.4f}" for row in chunks]
    assert dict(zip(*page.tables["Machine"]))["peak MiB"] == f"{last(tiny_run.events, 'memory')['peak_mib']:,}"


def test_seeds_get_mean_and_standard_deviation(tmp_path):
    runs = {seed: log_rows(seed) for seed in (1, 2, 3)}
    page = report(tmp_path, *(write_log(tmp_path / f"seed{seed}.jsonl", rows) for seed, rows in runs.items()))
    finals = [last(rows, "final_int8_zlib_roundtrip_exact")["val_bpb"] for rows in runs.values()]
    said = f"{np.mean(finals):.4f} ± {np.std(finals, ddof=1):.4f} bits per byte"
    assert f"{said}, mean and standard deviation of 3 runs (seeds 1, 2, 3)" in page.words()
    summary = page.tables["Mean and spread, bits per byte"][1:]
    assert [row[0] for row in summary] == list(STAGES)
    assert summary[-1][1:] == [f"{np.mean(finals):.6f}", f"{np.std(finals, ddof=1):.6f}", "3"]
    losses = np.array([[row["train_loss"] for row in rows if row["event"] == "step"] for rows in runs.values()])
    table = "Loss by step: The numbers"
    assert page.column(table, "mean") == [f"{value:.4f}" for value in losses.mean(0)]
    assert page.column(table, "s.d.") == [f"{value:.4f}" for value in losses.std(0, ddof=1)]
    assert page.column("Settings in which the runs differ", "setting") == ["seed", "run_id"]


def test_a_run_that_is_behind_is_averaged_as_far_as_it_came(tmp_path):
    whole, behind = log_rows(1), [row for row in log_rows(2) if row.get("step", 0) <= 7][:15]
    page = report(tmp_path, write_log(tmp_path / "a.jsonl", whole), write_log(tmp_path / "b.jsonl", behind))
    came = max(row["step"] for row in behind if row["event"] == "step")
    means = page.column("Loss by step: The numbers", "mean")
    assert [value != "—" for value in means] == [step <= came for step in range(1, 21)]


def test_settings_that_differ_make_configurations_of_their_own(tmp_path):
    seeds, others = {1: 2.0, 2: 2.0}, dict(matrix_lr=0.05, ve_layers=[1, 2])
    logs = [write_log(tmp_path / f"a{seed}.jsonl", log_rows(seed, bpb)) for seed, bpb in seeds.items()]
    logs.append(write_log(tmp_path / "b1.jsonl", log_rows(1, 2.5, **others)))
    page = report(tmp_path, logs[0], logs[2], logs[1])  # the order of the logs does not matter
    head, *rows = page.tables["Settings in which the runs differ"]
    assert head == ["setting", "A: a1", "A: a2", "B: b1"]
    assert ["matrix_lr", "0.027", "0.027", "0.05"] in rows
    assert ["ve_layers", "[2]", "[2]", "[1, 2]"] in rows
    assert {row[0] for row in rows} == {"seed", "run_id", "matrix_lr", "ve_layers"}
    assert set(page.column("Mean and spread, bits per byte", "configuration")) == {"A"}
    assert "B: matrix_lr=0.05" in page.words()


def test_runs_on_another_text_are_not_averaged(tmp_path):
    rows = changed(log_rows(2), "validation", digest="f" * 16)
    page = report(tmp_path, write_log(tmp_path / "a.jsonl", log_rows(1)), write_log(tmp_path / "b.jsonl", rows))
    assert "Mean and spread, bits per byte" not in page.tables
    assert "±" not in page.words()


def test_the_seed_and_places_of_files_are_all_that_one_configuration_may_differ_in():
    assert {"seed", *train_gpt.PLACE_FIELDS, *train_gpt.PROCESS_FIELDS} == run_report.OF_THE_RUN


BUDGETS = {  # event: field, the most that is allowed, unit of the excess
    "total_bytes": ("bytes", 16_000_000, 1),
    "evaluation": ("total_s", 600.0, 0.1),
    "step_validation": ("train_time_ms", 600_031.5, 0.1),  # the step in which the time ends is within it
}


def test_the_verdict_names_all_that_is_broken(tmp_path):
    rows = changed(changed(log_rows(), "validation", note="partial"), "final_int8_zlib_roundtrip_exact", valid=False)
    for event, (name, most, unit) in BUDGETS.items():
        rows = changed(rows, event, **{name: most + unit})
    broken = "valid, text, training time, evaluation time, bytes"
    assert f"✗ falls short in: {broken} " in page_of(tmp_path, rows).words()


def test_budgets_just_kept_are_kept(tmp_path):
    rows = log_rows()
    for event, (name, most, _) in BUDGETS.items():
        rows = changed(rows, event, **{name: most})
    assert "✓ valid, and within every budget" in page_of(tmp_path, rows).words()


# Logs that are not whole ------------------------
@pytest.mark.parametrize("count", [1, 12, 33, 43])
def test_a_run_that_still_goes_on_is_shown_as_far_as_it_came(count, tmp_path):
    rows = log_rows()[:count]
    words = page_of(tmp_path, rows, '{"event": "step", "st').words()
    assert "not decided: the run has no final row yet" in words
    assert "no final score yet" in words
    assert "run: the last line is not finished" in words
    assert ("step training" in words or "No training step in this log so far" in words) == (count < 5)
    assert ("No score in this log so far" in words) == (count < 32)
    assert ("projected" in words) == (count >= 39)


def test_stages_that_are_not_there_yet_are_named_and_those_not_asked_for_are_not(tmp_path):
    rows = without(log_rows(), "legal_ttt", "final_mixed", "ttt_chunk", "final_int8_zlib_roundtrip_exact")
    words = page_of(tmp_path, rows).words()
    assert "Not scored in run: test-time training, mixed with n-grams." in words
    plain = changed(rows, "config", ttt_enabled=False, mixer="none", swarm_enabled=False)
    words = page_of(tmp_path, without(plain, "vote")).words()
    assert "Not scored" not in words
    assert "no mixer" in words
    assert "Test-time training" not in words
    assert "swarm's votes" not in words


def test_damaged_lines_and_unknown_rows_cost_only_themselves(tmp_path):
    rows = log_rows()
    good = page_of(tmp_path, rows)
    lines = [json.dumps(row) for row in rows]
    damage = ["", "{", "[1]", "\x00\x01", '{"event": 3}', "[" * 100_000, "1" * 5000]
    unknown = ['{"event": "news", "time": "x", "step": {"a": []}}']
    path = tmp_path / "run.jsonl"
    path.write_bytes("\n".join(lines[:9] + damage + unknown + lines[9:]).encode() + b"\n\xff\xfe\n")
    page = report(tmp_path, path)
    assert "run: 7 damaged lines left out." in page.words()
    assert page.tables == good.tables


def test_after_a_restart_the_steps_taken_again_count(tmp_path):
    rows = log_rows()
    twelfth = next(n for n, row in enumerate(rows) if row.get("step") == 12)
    again = [row | dict(train_loss=9.0) if row["event"] == "step" else row for row in rows[:twelfth]]
    stopped = dict(event="stopped", time="x", signal="SIGTERM", step=11)
    resumed = [*rows[:4], dict(event="resumed", time="x", step=3)]
    fourth = next(n for n, row in enumerate(rows) if row.get("step") == 4)
    page = page_of(tmp_path, [*again, stopped])
    assert "stopped by SIGTERM" in page.words()
    assert set(page.tables["Loss by step: The numbers"][1]) == {"1", "9.0000"}
    page = page_of(tmp_path, [*again, stopped, *resumed])
    assert len(page.tables["Loss by step: The numbers"]) == 1 + 3
    page = page_of(tmp_path, [*rows[:fourth], *again[fourth:], stopped, *resumed, *rows[fourth:]])
    assert_says(page, rows)
    assert "valid, and within every budget" in page.words()


@pytest.mark.parametrize("odd", [None, {"a": {}}, math.nan, 10**400, 0, "\ud800\0<b>"])
def test_values_of_any_kind_end_in_a_page(odd, tmp_path):
    rows = [{name: row[name] if name in ("event", "stage") else odd for name in row} for row in log_rows()]
    for number, row in enumerate(rows):
        if number % 3 or row["event"] == "config":
            row["time"] = "2026-01-01T00:00:00.000Z"
            row["step"] = number
    page = page_of(tmp_path, rows)
    assert "Settings" in page.words()
    assert "<b>" not in page.source


# What is refused ------------------------
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty", "--follow"]),
        (b"PK\x03\x04\x00\xff", ["no log"]),
        (b'{"a": 1}\n[]\n', ["no log"]),
        (b'{"event": "step:1/20", "train_loss": 6.9}\n', ["no log", '"time"']),
        (None, ["No such file"]),
        ("folder", ["no regular file"]),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(content, words, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    good = write_log(tmp_path / "good.jsonl", log_rows())
    arguments = [good, path, "--out", tmp_path / "r.html"]
    assert_refused(capsys, run_report.main, arguments, "x.jsonl", *words)
    assert not (tmp_path / "r.html").exists()


def test_a_log_is_never_written_over_and_given_once(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", log_rows())
    before = log.read_bytes()
    assert_refused(capsys, run_report.main, [log, "--out", log], ".html")
    assert_refused(capsys, run_report.main, [log, tmp_path / "." / "run.jsonl", "--out", tmp_path / "r.html"], "once")
    (tmp_path / "file").write_text("")
    assert_refused(capsys, run_report.main, [log, "--out", tmp_path / "file" / "r.html"], "cannot write", "r.html")
    assert log.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run.jsonl"]


# Following ------------------------
def test_a_run_is_followed_until_its_final_row(tmp_path, monkeypatch, capsys):
    rows, log, out = log_rows(), tmp_path / "run.jsonl", tmp_path / "report.html"
    log.touch()
    waiting, pages = [rows[:10], [], rows[10:30], rows[30:]], []

    def sleep(seconds: float) -> None:
        assert seconds == 3
        pages.append((out.read_text(encoding="utf-8"), out.stat().st_mtime_ns))
        with log.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in waiting.pop(0))

    monkeypatch.setattr(run_report.time, "sleep", sleep)
    assert run_report.main([str(log), "--out", str(out), "--follow", "--every", "3"]) == 0
    assert [page.count("No training step") for page, _ in pages] == [1, 0, 0, 0]
    assert pages[1] == pages[2]  # nothing new was written
    assert all('http-equiv="refresh" content="3"' in page for page, _ in pages)
    assert 'http-equiv="refresh"' not in out.read_text(encoding="utf-8")
    assert_says(Page(out), rows)
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {out}"


@pytest.mark.parametrize("moment", ["after the first look", "before the second"])
def test_the_final_row_is_on_the_page_whenever_it_comes(moment, tmp_path, monkeypatch):
    """Also where the log grows between the look at its size and the reading of its rows."""
    rows, out = log_rows(), tmp_path / "report.html"
    log, read, looks = write_log(tmp_path / "run.jsonl", rows[:12]), run_report.read_runs, []

    def reading(paths, may_be_empty=False):
        looks.append(len(looks))
        if moment == "before the second" and len(looks) == 2:
            write_log(log, rows)
        runs = read(paths, may_be_empty)
        if moment == "after the first look" and len(looks) == 1:
            write_log(log, rows)
        return runs

    monkeypatch.setattr(run_report, "read_runs", reading)
    monkeypatch.setattr(run_report.time, "sleep", lambda _: None)
    assert run_report.main([str(log), "--out", str(out), "--follow"]) == 0
    assert len(looks) == 2
    assert_says(Page(out), rows)


def test_following_ends_at_an_interrupt(tmp_path, monkeypatch, capsys):
    log, out = write_log(tmp_path / "run.jsonl", log_rows()[:12]), tmp_path / "report.html"

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_report.time, "sleep", interrupted)
    assert run_report.main([str(log), "--out", str(out), "--follow"]) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert "no final score yet" in Page(out).words()


# The page itself ------------------------
HOSTILE = "<script>alert(1)</script><img src=x onerror=y>'\"&amp; $x^2$ {{ 7*7 }} ]]> --> 東"


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page of runs in which every text is hostile, file names included."""
    folder = tmp_path_factory.mktemp("hostile")
    logs = []
    for seed in (1, 2):
        rows = changed(log_rows(seed, matrix_lr=f"{HOSTILE}{seed}"), "vote", agent=HOSTILE, parameter=HOSTILE)
        rows = changed(changed(rows, "vote", reason=HOSTILE), "environment", hardware=HOSTILE)
        rows = changed(rows, "tensor_bytes", bytes={HOSTILE: 5}, codec={HOSTILE: HOSTILE})
        rows = changed(changed(rows, "validation", digest=HOSTILE), "config", **{HOSTILE: seed})
        logs.append(write_log(folder / f"{HOSTILE.replace('/', '_')}{seed}.jsonl", rows))
    return report(folder, *logs)


def test_what_comes_from_a_log_is_text(hostile_page):
    assert {"script", "img"}.isdisjoint(tag for tag, _ in hostile_page.tags)
    assert not [attrs for _, attrs in hostile_page.tags if any(name.startswith("on") for name in attrs)]
    assert HOSTILE in hostile_page.column("Proposals", "reason")
    assert [HOSTILE, "1", "2"] in hostile_page.tables["Settings in which the runs differ"]
    assert HOSTILE in hostile_page.tables["Machine"][1]


def test_the_page_refers_to_nothing_outside_itself(hostile_page):
    for tag, attrs in hostile_page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "image", "img", "style@import")
        for name, value in attrs.items():
            if name in ("src", "srcset", "data", "action", "poster", "background", "ping"):
                pytest.fail(f"<{tag} {name}={value}>")
            if name in ("href", "xlink:href"):
                assert str(value).startswith("#")
            assert not re.search(r"url\((?!#)", str(value)) or name == "aria-label"
    (style,) = re.findall(r"<style>(.*?)</style>", hostile_page.source, re.DOTALL)
    assert "@import" not in style
    assert "url(" not in style
    assert not re.search(r"https?://", hostile_page.source)


def test_every_picture_has_words_and_a_table_and_ids_are_unique(hostile_page):
    pictures = [attrs for tag, attrs in hostile_page.tags if tag == "svg"]
    assert len(pictures) >= 6
    assert all(attrs["role"] == "img" and len(str(attrs["aria-label"])) > 40 for attrs in pictures)
    sections = hostile_page.source.split("<h2>")[1:]
    assert all(section.count("<table") >= section.count("<svg") for section in sections)
    ids = Counter(attrs["id"] for _, attrs in hostile_page.tags if "id" in attrs)
    assert set(ids.values()) <= {1}
    named = {str(attrs["xlink:href"])[1:] for _, attrs in hostile_page.tags if "xlink:href" in attrs}
    assert named <= set(ids)


def test_axes_begin_where_the_data_are(tmp_path):
    rows = [row | dict(train_loss=2.0 + 0.001 * row["step"]) if row["event"] == "step" else row for row in log_rows()]
    rows = [row | dict(val_loss=2.01) if row["event"] == "step_validation" else row for row in rows]
    picture = page_of(tmp_path, rows).source.partition("Loss by step")[2].partition("</svg>")[0]
    ticks = [float(text) for text in re.findall(r"text-anchor: end[^>]*>([\d.]+)</text>", picture)]
    assert len(ticks) >= 3
    assert min(ticks) > 1.995
    assert max(ticks) < 2.025


def test_a_long_run_stays_a_small_page(tmp_path):
    template = next(row for row in log_rows() if row["event"] == "step")
    steps = [template | dict(step=step, train_time_ms=85.0 * step) for step in range(1, 6001)]
    chunk = next(row for row in log_rows() if row["event"] == "ttt_chunk")
    chunks = [chunk | dict(chunk=number) for number in range(600)]
    page = page_of(tmp_path, [*without(log_rows(), "step", "ttt_chunk"), *steps, *chunks])
    assert len(page.source) < 600_000
    shown = page.column("Loss by step: The numbers (200 of 6,000 rows)", "step")
    assert (len(shown), shown[0], shown[-1]) == (200, "1", "6,000")


# In a browser ------------------------
MEASURE = """
<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre>
<iframe id="page" style="border: 0; width: {width}px; height: 900px"></iframe>
<script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const inner = frame.contentDocument, box = each => each.getBoundingClientRect();
  for (const each of inner.querySelectorAll("details")) each.open = true;
  const wide = [...inner.body.querySelectorAll("*")].filter(
    each => box(each).right > {width} + 1 && !each.closest(".wide") && !each.closest("svg"));
  const root = inner.documentElement, letters = [...inner.querySelectorAll("svg text")];
  document.getElementById("found").textContent = JSON.stringify({{
    width: frame.contentWindow.innerWidth, scroll: root.scrollWidth,
    wide: wide.map(each => each.outerHTML.slice(0, 90)),
    pictures: [...inner.querySelectorAll("svg")].map(each => [box(each).width, box(each).height]),
    smallest: Math.min(...letters.map(each => parseFloat(getComputedStyle(each).fontSize)
      * box(each.ownerSVGElement).width / each.ownerSVGElement.viewBox.baseVal.width)),
    outside: letters.filter(each => box(each).left < box(each.ownerSVGElement).left - 2
      || box(each).right > box(each.ownerSVGElement).right + 2).map(each => each.textContent),
    tables: inner.querySelectorAll("table").length }});
}};
frame.srcdoc = {page};
</script>
"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def in_browser(page: Page, width: int, folder: Path) -> dict[str, Any]:
    """What Chromium lays out at that width, and what it says on its console."""
    measure, content = folder / "measure.html", json.dumps(page.source).replace("</", "<\\/")
    measure.write_text(MEASURE.format(width=width, page=content), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    command = [str(CHROMIUM), *options, f"--window-size={max(width, 600)},900", "--dump-dom", measure.as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=180, check=True)
    (found,) = re.findall(r'<pre id="found">(\{.*?\})</pre>', done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found)) | dict(console=console)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: the page is not looked at in a browser")
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_its_window(width, hostile_page, tmp_path):
    found = in_browser(hostile_page, width, tmp_path)
    assert found["console"] == []
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["wide"] == []
    pictures = [attrs for tag, attrs in hostile_page.tags if tag == "svg"]
    assert len(found["pictures"]) == len(pictures)
    assert all(300 < across <= 640 and high > 120 for across, high in found["pictures"])
    assert found["smallest"] >= 7.5
    assert found["outside"] == []
    assert found["tables"] == hostile_page.source.count("<table")
