"""tools/make_submission.py: what it writes is what the logs say, and logs that make no submission are refused."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_support import REPO, make_runtime
from scipy import stats
from support import Run, assert_refused

import train_gpt

sys.path.insert(0, str(REPO / "tools"))
import make_submission

LOSSES = {1337: 1.9021, 42: 1.9034, 2025: 1.9008}
OPTIONS = ["--name", "Swarm", "--blurb", "four agents", "--date", "2026-11-21", "--author", "A", "--github-id", "a-b"]


def write_log(folder: Path, seed: int, change: Callable[[list[dict[str, Any]]], None] | None = None) -> Path:
    """A finished run's log, written by the run's own code; `change` edits its rows."""
    config = train_gpt.Config(seed=seed, run_id=f"seed{seed}", out_dir=str(folder), device="cpu")
    runtime = make_runtime(config)
    log = train_gpt.RunLog(config, runtime)
    log.row("environment", **runtime.describe(), attention="sdpa")
    log.row("config", **{name: getattr(config, name) for name in train_gpt.Config.__annotations__})
    log.row("validation", targets=62_021_632, bytes=151_069_000, digest="0123456789abcdef")
    log.row("track", track="adaptive")
    log.row("step", step=7000, train_loss=2.0, train_time_ms=598_000.0, step_avg_ms=85.4)
    log.row("step_validation", step=7020, val_loss=2.0, val_bpb=1.2, train_time_ms=599_800.0, step_avg_ms=85.44)
    log.row("artifact_bytes", bytes=15_800_000)
    log.row("code_bytes", bytes=150_000)
    log.row("total_bytes", bytes=15_950_000, limit=train_gpt.SIZE_LIMIT_BYTES)
    log.row("evaluation", total_s=412.5, budget_s=600.0)
    bpb = LOSSES.get(seed, 1.9) / 1.69
    log.row("final_int8_zlib_roundtrip_exact", val_loss=LOSSES.get(seed, 1.9), val_bpb=bpb, valid=True)
    log.close()
    path = folder / "logs" / f"seed{seed}.jsonl"
    if change is not None:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def logs(tmp_path: Path) -> list[Path]:
    return [write_log(tmp_path, seed) for seed in LOSSES]


def command(logs: list[Path], out: Path, *more: object) -> list[str]:
    return [str(item) for item in (*logs, *OPTIONS, "--out", out, *more)]


def make(logs: list[Path], out: Path, *more: object) -> dict[str, Any]:
    assert make_submission.main(command(logs, out, *more)) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_figure_comes_from_the_logs(logs: list[Path], tmp_path: Path):
    found = make(logs, tmp_path / "s.json")
    assert list(found["seeds"]) == ["42", "1337", "2025"]
    for seed, loss in LOSSES.items():
        assert found["seeds"][str(seed)] == dict(
            val_loss=loss, val_bpb=loss / 1.69, steps=7020, step_avg_ms=85.44, train_time_s=599.8, eval_time_s=412.5,
            artifact_bytes=15_800_000, bytes_total=15_950_000, valid=True,
        )  # fmt: skip
    assert found["val_loss"] == dict(mean=statistics.fmean(LOSSES.values()), std=statistics.stdev(LOSSES.values()))
    assert (found["record"], found["partial"], found["bytes_total"]) == (True, False, 15_950_000)
    assert (found["author"], found["github_id"], found["scoring"]) == ("A", "a-b", "adaptive")
    assert found["hardware"] == f"1 × {train_gpt.cpu_name()}"
    assert found["versions"]["torch"].startswith("2.")
    assert "comparison" not in found


def test_comparison_is_a_one_sided_welch_test_against_the_threshold(logs: list[Path], tmp_path: Path):
    baseline = [1.911, 1.9095, 1.9102, 1.912]
    found = make(logs, tmp_path / "s.json", "--baseline-nats", *baseline)["comparison"]
    ours = list(LOSSES.values())
    gap = statistics.fmean(baseline) - 0.005 - statistics.fmean(ours)
    variances = [statistics.variance(values) / len(values) for values in (ours, baseline)]
    degrees = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 3)
    assert found["welch_p"] == pytest.approx(stats.t.sf(gap / sum(variances) ** 0.5, degrees), rel=1e-9)
    assert found["gain_nats"] == pytest.approx(statistics.fmean(baseline) - statistics.fmean(ours))
    same = make(logs, tmp_path / "b.json", "--baseline", tmp_path / "s.json")["comparison"]
    assert same["gain_nats"] == pytest.approx(0)
    assert same["welch_p"] > 0.9


def test_calibration_counts_as_training(tmp_path: Path):
    logs = [
        write_log(tmp_path, seed, lambda rows: rows.insert(6, dict(event="calibration", train_and_calibration_s=599.9)))
        for seed in LOSSES
    ]
    assert make(logs, tmp_path / "s.json")["seeds"]["42"]["train_time_s"] == 599.9


def test_fewer_seeds_and_partial_scores_are_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_log(tmp_path, 42, lambda rows: rows[-1].update(note="partial"))
    out = tmp_path / "s.json"
    assert_refused(capsys, make_submission.main, command([path], out), "1 seeds given", "--non-record")
    found = make([path], out, "--non-record")
    assert (found["record"], found["partial"], found["val_bpb"]["std"]) == (False, True, None)
    three = [path, *(write_log(tmp_path, seed, lambda rows: rows[-1].update(note="partial")) for seed in (1, 2))]
    assert_refused(capsys, make_submission.main, command(three, out), str(path.parent), "VAL_TOKENS")
    two = [path, write_log(tmp_path, 3)]
    assert_refused(capsys, make_submission.main, command(two, out, "--non-record"), "same part")


def row_of(rows: list[dict[str, Any]], event: str) -> dict[str, Any]:
    return next(row for row in rows if row["event"] == event)


SPOILT: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], tuple[str, ...]]] = {
    "mass": (lambda rows: rows[-1].update(valid=False), ("valid:False", "do not sum to 1")),
    "size": (lambda rows: row_of(rows, "total_bytes").update(bytes=16_000_001), ("16000001 bytes",)),
    "training": (lambda rows: rows[5].update(train_time_ms=600_200.0), ("600.2 s of training",)),
    "evaluation": (lambda rows: row_of(rows, "evaluation").update(total_s=601.0), ("601.0 s of evaluation",)),
    "hardware": (lambda rows: row_of(rows, "environment").update(hardware="TPU"), ("hardware=", "'TPU'")),
    "versions": (lambda rows: row_of(rows, "environment").update(torch="9.9"), ("torch=", "'9.9'")),
    "ranks": (lambda rows: row_of(rows, "environment").update(world_size=77), ("world_size=", "77")),
    "code": (lambda rows: row_of(rows, "code_bytes").update(bytes=7), ("code bytes=", "7")),
    "no number": (lambda rows: rows[-1].update(val_loss=math.nan), ("val_loss", "nan", "no finite number")),
    "text": (lambda rows: row_of(rows, "total_bytes").update(bytes="many"), ("bytes", "'many'", "no finite number")),
    "setting": (lambda rows: row_of(rows, "config").update(matrix_lr=0.5), ("MATRIX_LR=0.027", "has 0.5")),
    "setting absent": (lambda rows: row_of(rows, "config").pop("beta1"), ("BETA1=0.9", "has None")),
    "unfinished": (lambda rows: rows.pop(), ("did not finish",)),
    "empty": (lambda rows: rows.clear(), ("did not finish",)),
    "no versions": (lambda rows: rows.pop(0), ("environment",)),
    "no config": (lambda rows: rows.pop(1), ("config",)),
    "no steps": (lambda rows: [rows.pop(4), rows.pop(4)], ("'step",)),
    "other targets": (lambda rows: row_of(rows, "validation").update(targets=5087), ("validation targets=", "5087")),
    "other bytes": (lambda rows: row_of(rows, "validation").update(bytes=77), ("validation bytes=", "has 77")),
    "other text": (lambda rows: row_of(rows, "validation").update(digest="f" * 16), ("digest=", "'ffffffffffffffff'")),
    "unknown text": (lambda rows: rows.remove(row_of(rows, "validation")), ("no row 'validation'",)),
    "no size": (lambda rows: rows.remove(row_of(rows, "artifact_bytes")), ("artifact_bytes",)),
    "no evaluation": (lambda rows: rows.remove(row_of(rows, "evaluation")), ("evaluation",)),
}


@pytest.mark.parametrize("name", SPOILT)
def test_logs_that_make_no_submission_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    change, words = SPOILT[name]
    logs = [write_log(tmp_path, 1337), write_log(tmp_path, 2025), write_log(tmp_path, 42, change)]
    if name == "no versions":
        for seed, path in ((1337, logs[0]), (2025, logs[1])):
            assert path == write_log(tmp_path, seed, change)
    assert_refused(capsys, make_submission.main, command(logs, tmp_path / "s.json"), ".jsonl", *words)
    assert not (tmp_path / "s.json").exists()


def test_damaged_and_missing_logs_are_refused(logs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "s.json"
    twice = [*logs[:2], logs[1]]
    assert_refused(capsys, make_submission.main, command(twice, out), "seed 42", "more than once")
    assert_refused(capsys, make_submission.main, command([*logs[:2], tmp_path / "gone.jsonl"], out), "gone.jsonl")
    whole = logs[2].read_text()
    for damage in (whole[:-40], whole.replace("{", "[", 1), whole + "3\n"):
        logs[2].write_text(damage)
        assert_refused(capsys, make_submission.main, command(logs, out), f"{logs[2]}:")
    logs[2].write_bytes(b"\xff\xfe")
    assert_refused(capsys, make_submission.main, command(logs, out), str(logs[2]), "UTF-8")
    nowhere = command(logs[:2], tmp_path / "no" / "s.json", "--non-record")
    assert_refused(capsys, make_submission.main, nowhere, "cannot write")
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    assert_refused(capsys, make_submission.main, command(logs[:2], out, "--non-record", "--baseline", bad), "bad.json")
    for date in ("today", "2026-99-99", "2026-1-3", "20260131"):
        assert_refused(capsys, make_submission.main, [*command(logs[:2], out, "--non-record"), "--date", date], date)


def test_author_is_never_invented(logs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    settings = tmp_path / "gitconfig"
    settings.write_text("[user]\n\tname = Some One\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    monkeypatch.chdir(tmp_path)
    argv = [str(path) for path in logs] + OPTIONS[:6] + ["--out", str(tmp_path / "s.json")]
    assert_refused(capsys, make_submission.main, argv, "--github-id", "github.user")
    subprocess.run(["git", "config", "--file", settings, "github.user", "someone"], check=True)
    assert make_submission.main(argv) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["author"], found["github_id"]) == ("Some One", "someone")


def test_a_real_runs_log_is_enough(tiny_run: Run, tmp_path: Path):
    found = make([tiny_run.out_dir / "logs" / "run.jsonl"], tmp_path / "s.json", "--non-record")
    seed = found["seeds"]["1337"]
    assert seed["steps"] == 20
    assert seed["artifact_bytes"] == tiny_run.artifact.stat().st_size
    assert f"val_bpb:{seed['val_bpb']:.8f} valid:True" in tiny_run.process.stdout.splitlines()[-1]
    assert found["recipe"] == "leaky"


def test_the_committed_submission_is_that_of_the_committed_logs(tmp_path: Path):
    committed = json.loads((REPO / "submission.json").read_text(encoding="utf-8"))
    argv = [str(REPO / path) for path in committed["logs"]]
    for option in ("author", "name", "blurb", "date"):
        argv += [f"--{option}", committed[option]]
    argv += ["--github-id", committed["github_id"], "--track", committed["track"], "--out", str(tmp_path / "s.json")]
    argv += [] if committed["record"] else ["--non-record"]
    assert make_submission.main(argv) == 0
    again = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert again | {"logs": committed["logs"]} == committed
