"""Write submission.json from the logs of several seeds, or say why these logs are no submission.

    python tools/make_submission.py logs/a.jsonl logs/b.jsonl logs/c.jsonl --name "Swarm" --blurb "…" --github-id me

Every figure is read from the logs; author and GitHub id come from the options or from `git config user.name` and
`git config github.user`. Refused are: fewer than three seeds or partial validation (unless --non-record), settings,
machines or code that differ between seeds, a seed given twice, a score that is no code length, more than 16,000,000
bytes, more than 600 s of training or of evaluation, and a log that is missing, damaged or not finished. Exit code 0, or
2 with one line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

SIZE_LIMIT_BYTES = 16_000_000
BUDGET_S = 600.0
RECORD_SEEDS = 3
THRESHOLD_NATS = 0.005  # by which a record has to beat the one before
OF_A_STEP = "step|step_validation"
OF_THE_SEED = ("SEED", "RUN_ID", "OUT_DIR", "RESUME")  # settings that may differ between the runs of a submission


def without_values_in_names(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose event has a fixed name; in logs of older code it was `step:7000/20000` or `track:adaptive`."""
    name, _, value = row["event"].partition(":")
    if name == "step" and value:
        return {**row, "event": "step", "step": int(value.partition("/")[0])}
    return {**row, "event": "track", "track": value} if name == "track" and value else row


class SubmissionError(Exception):
    """Logs that make no submission; the text names the file, the figure and what was expected."""


@dataclass
class SeedRun:
    """What one run's JSONL log says."""

    path: Path
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> SeedRun:
        """Raises SubmissionError for a log that is missing, damaged or of a run that did not end."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
            raise SubmissionError(f"cannot read the log {path}: {reason}") from error
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SubmissionError(f"{path}:{number} is no JSON; take the log as the run wrote it") from error
            if not isinstance(row, dict) or not isinstance(row.get("event"), str):
                raise SubmissionError(f"{path}:{number} is no row of a run's log")
            rows.append(without_values_in_names(row))
        run = cls(path, rows)
        if not rows or rows[-1]["event"] != "final_int8_zlib_roundtrip_exact":
            raise SubmissionError(f"{path} does not end in final_int8_zlib_roundtrip_exact: the run did not finish")
        return run

    def last(self, pattern: str, *names: str) -> list[Any]:
        """Fields of the last row that has them and whose event matches. Raises SubmissionError without one."""
        for row in reversed(self.rows):
            if re.fullmatch(pattern, row["event"]) and set(names) <= set(row):
                return [row[name] for name in names]
        raise SubmissionError(f"{self.path} has no row {pattern!r} with {', '.join(names)}")

    @property
    def config(self) -> dict[str, Any]:
        row = next((row for row in self.rows if row["event"] == "config"), None)
        if row is None:
            raise SubmissionError(f"{self.path} has no row 'config'")
        return {name: value for name, value in row.items() if name not in ("event", "time")}

    @property
    def environment(self) -> dict[str, Any]:
        row = next((row for row in self.rows if row["event"] == "environment"), None)
        if row is None:
            raise SubmissionError(f"{self.path} has no row 'environment' (versions and hardware)")
        return {name: value for name, value in row.items() if name not in ("event", "time")}

    @property
    def text(self) -> dict[str, Any]:
        """What was scored: targets, bytes, and the digest of text and tokenizer, absent from logs of older code."""
        row = next((row for row in self.rows if row["event"] == "validation"), None)
        if row is None:
            raise SubmissionError(f"{self.path} has no row 'validation' (targets and bytes that were scored)")
        return {f"validation {name}": row.get(name) for name in ("targets", "bytes", "digest")}

    @property
    def partial(self) -> bool:
        return "partial" in str(self.rows[-1].get("note", ""))

    def numbers(self, pattern: str, *names: str) -> list[float]:
        """As `last`, of finite numbers. Raises SubmissionError for anything else."""
        values = self.last(pattern, *names)
        for name, value in zip(names, values):
            if type(value) not in (int, float) or not math.isfinite(value):
                raise SubmissionError(f"{self.path}: {name} of {pattern!r} is {value!r}, no finite number")
        return values

    def figures(self) -> dict[str, Any]:
        """This seed's entry in submission.json."""
        final = "final_int8_zlib_roundtrip_exact"
        (val_loss, val_bpb), (valid,) = self.numbers(final, "val_loss", "val_bpb"), self.last(final, "valid")
        steps, train_ms, step_avg_ms = self.numbers(OF_A_STEP, "step", "train_time_ms", "step_avg_ms")
        train_s = train_ms / 1000
        if any(row["event"] == "calibration" for row in self.rows):
            (train_s,) = self.numbers("calibration", "train_and_calibration_s")
        (artifact_bytes,) = self.numbers("artifact_bytes", "bytes")
        (bytes_total,) = self.numbers("total_bytes", "bytes")
        (eval_s,) = self.numbers("evaluation", "total_s")
        return dict(
            val_loss=val_loss, val_bpb=val_bpb, steps=steps, step_avg_ms=step_avg_ms, train_time_s=train_s,
            eval_time_s=eval_s, artifact_bytes=artifact_bytes, bytes_total=bytes_total, valid=valid,
        )  # fmt: skip


def check_run(run: SeedRun, figures: dict[str, Any], record: bool) -> None:
    """Raise SubmissionError for a run that breaks a rule of the contest."""
    if figures["valid"] is not True:
        raise SubmissionError(f"{run.path}: valid:{figures['valid']}, the probabilities do not sum to 1")
    if figures["bytes_total"] > SIZE_LIMIT_BYTES:
        raise SubmissionError(f"{run.path}: {figures['bytes_total']} bytes, at most {SIZE_LIMIT_BYTES} are allowed")
    over_by_a_step = figures["step_avg_ms"] / 1000  # a run ends with the step in which its time ends
    for name, what, more in (("train_time_s", "training", over_by_a_step), ("eval_time_s", "evaluation", 0.0)):
        if figures[name] > BUDGET_S + more:
            raise SubmissionError(f"{run.path}: {figures[name]:.1f} s of {what}, at most {BUDGET_S:.0f} are allowed")
    if record and run.partial:
        raise SubmissionError(f"{run.path} scores a part of the validation split (VAL_TOKENS); --non-record allows it")
    if record and run.text["validation digest"] is None:
        raise SubmissionError(f"{run.path} does not say which text it scored (no digest); --non-record allows it")


def check_alike(run: SeedRun, first: SeedRun, fields_of: Callable[[SeedRun], dict[str, Any]]) -> None:
    """Raise SubmissionError for a field in which two runs differ, unless it is one of the seed."""
    ours, theirs = fields_of(run), fields_of(first)
    for name in sorted(set(ours) | set(theirs)):
        if name not in OF_THE_SEED and ours.get(name) != theirs.get(name):
            found, expected = f"{ours.get(name)!r:.80}", f"{theirs.get(name)!r:.80}"
            raise SubmissionError(f"{run.path}: {name}={found}, but {first.path} has {expected}")


def check_together(runs: Sequence[SeedRun], record: bool) -> None:
    """Raise SubmissionError for runs that are not repetitions of one another, or too few."""
    if record and len(runs) < RECORD_SEEDS:
        raise SubmissionError(f"{len(runs)} seeds given, {RECORD_SEEDS} needed; --non-record allows fewer")
    seeds = [run.config.get("seed") for run in runs]
    for run, seed in zip(runs, seeds):
        if seeds.count(seed) > 1:
            raise SubmissionError(f"{run.path}: seed {seed} is given more than once")
    first, *others = runs
    for run in others:
        check_alike(run, first, lambda each: {name.upper(): value for name, value in each.config.items()})
        check_alike(run, first, lambda each: each.environment)
        check_alike(run, first, lambda each: each.text)
        check_alike(run, first, lambda each: dict(zip(("code bytes",), each.last("code_bytes", "bytes"))))
        if run.partial != runs[0].partial:
            raise SubmissionError(f"{run.path} and {runs[0].path} do not score the same part of the validation split")


def from_git(setting: str, option: str, given: str | None) -> str:
    """The option, else git's setting. Raises SubmissionError: neither is ever invented."""
    if given:
        return given
    try:
        done = subprocess.run(["git", "config", setting], capture_output=True, encoding="utf-8", check=False)
        found = done.stdout.strip()
    except OSError:
        found = ""
    if not found:
        raise SubmissionError(f"no {option}, and `git config {setting}` has none; name it with {option}")
    return found


def baseline_losses(path: Path) -> list[float]:
    """val_loss of every seed in another submission.json. Raises SubmissionError."""
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
        return [float(seed["val_loss"]) for seed in other["seeds"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SubmissionError(f"{path} is no submission.json with a val_loss for each seed") from error


def compare(losses: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """One-sided Welch test that the mean is more than THRESHOLD_NATS below the baseline's; losses in nats a token."""
    if min(len(losses), len(baseline)) < 2:
        raise SubmissionError("a comparison needs two seeds at least on both sides")
    shifted = [loss - THRESHOLD_NATS for loss in baseline]
    _, p_value = np.asarray(stats.ttest_ind(losses, shifted, equal_var=False, alternative="less"))
    return dict(
        baseline_mean=statistics.fmean(baseline), gain_nats=statistics.fmean(baseline) - statistics.fmean(losses),
        threshold_nats=THRESHOLD_NATS, welch_p=float(p_value),
    )  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float | None]:
    return dict(mean=statistics.fmean(values), std=statistics.stdev(values) if len(values) > 1 else None)


def submission(args: argparse.Namespace) -> dict[str, Any]:
    """The content of submission.json. Raises SubmissionError."""
    runs = sorted((SeedRun.read(path) for path in args.logs), key=lambda run: run.config.get("seed", 0))
    check_together(runs, record=not args.non_record)
    seeds = {}
    for run in runs:
        seeds[str(run.config["seed"])] = figures = run.figures()
        check_run(run, figures, record=not args.non_record)
    environment = runs[0].environment
    tracks = {row["track"] for run in runs for row in run.rows if row["event"] == "track"}
    result: dict[str, Any] = dict(
        author=from_git("user.name", "--author", args.author),
        github_id=from_git("github.user", "--github-id", args.github_id),
        name=args.name, blurb=args.blurb, date=args.date, record=not args.non_record, partial=runs[0].partial,
        track=args.track, scoring=" and ".join(sorted(tracks)), recipe=runs[0].config["recipe"],
        hardware=f"{environment['world_size']} × {environment['hardware']}",
        versions={name: environment[name] for name in ("python", "torch", "cuda")}, logs=[str(p) for p in args.logs],
        val_loss=spread([seed["val_loss"] for seed in seeds.values()]),
        val_bpb=spread([seed["val_bpb"] for seed in seeds.values()]),
        bytes_total=max(seed["bytes_total"] for seed in seeds.values()), seeds=seeds,
    )  # fmt: skip
    baseline = args.baseline_nats or (baseline_losses(args.baseline) if args.baseline else None)
    if baseline:
        result["comparison"] = compare([seed["val_loss"] for seed in seeds.values()], baseline)
    return result


def check_date(text: str) -> None:
    """Raise SubmissionError for anything but YYYY-MM-DD."""
    try:
        shown = datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        shown = ""
    if shown != text:
        raise SubmissionError(f"--date {text!r} is no date like 2026-01-31")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="logs/RUN_ID.jsonl of each seed")
    parser.add_argument("--name", required=True)
    parser.add_argument("--blurb", required=True, help="what it is, in a sentence or two")
    parser.add_argument("--date", required=True, help="of the submission, YYYY-MM-DD")
    parser.add_argument("--author")
    parser.add_argument("--github-id")
    parser.add_argument("--track", default="10min_16mb")
    parser.add_argument("--non-record", action="store_true", help="allow few seeds and partial validation, and say so")
    parser.add_argument("--baseline", type=Path, help="another submission.json to compare with")
    parser.add_argument("--baseline-nats", type=float, nargs="+", help="or its val_loss of each seed")
    parser.add_argument("--out", type=Path, default=Path("submission.json"))
    args = parser.parse_args(argv)
    try:
        check_date(args.date)
        text = json.dumps(submission(args), indent=2, ensure_ascii=False) + "\n"
        args.out.write_text(text, encoding="utf-8")
    except SubmissionError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"error: cannot write {args.out}: {error.strerror}\n")
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
