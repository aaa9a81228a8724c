"""What a run's log says, for submission.json and for a reviewer: from the JSONL file, or from any text of the contest.

A text log is read by the line names that the contest's scripts share (`step:N/M … train_time:…ms`, `Serialized model …:
N bytes`, `NAME_exact val_loss:… val_bpb:…`); what it does not say stays None. `judge` holds runs against the rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SIZE_LIMIT_BYTES = 16_000_000
BUDGET_S = 600.0
RECORD_SEEDS = 3
RECORD_TARGETS = 62_021_632  # of the published validation shards, 1,024 pieces, sequences of 2,048
RECORD_VOCABULARY = 1024
MASS_TOLERANCE = 1e-4
LARGEST = 1e100  # no figure comes near it; integers of hundreds of digits overflow in a quotient
FINAL = "final_int8_zlib_roundtrip_exact"
# Settings in which the runs of one configuration may differ: the seed, where files lie, and how a process behaves.
OF_THE_RUN = frozenset({
    "seed", "data_path", "tokenizer_path", "kg_path", "out_dir", "artifact", "run_id", "checkpoint_seconds",
    "checkpoint_keep", "resume", "join_seconds",
})  # fmt: skip
LOG_STARTS = "===== log =====\n"  # what follows the sources in a text log of this project


class LogError(Exception):
    """A log that is missing, damaged or of a run that did not end; the text names the file and what was expected."""


class Finding(NamedTuple):
    """One thing that was looked at: `ok`, `unknown` or `REFUSED`, of what, and what was found, expected, to be done."""

    verdict: str
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:8} {self.what}: {self.text}"


def ok(what: object, text: str) -> Finding:
    return Finding("ok", str(what), text)


def unknown(what: object, text: str) -> Finding:
    return Finding("unknown", str(what), text)


def refused(what: object, text: str) -> Finding:
    return Finding("REFUSED", str(what), text)


@dataclass
class SeedRun:
    """One seed's run; None is what its log does not say. Losses in nats, times in seconds."""

    path: Path
    seed: int | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)  # val_loss and val_bpb of each stage
    valid: bool | None = None
    mass_error: float | None = None
    partial: bool = False
    text: dict[str, Any] = field(default_factory=dict)  # targets, bytes, digest
    steps: int | None = None
    step_avg_ms: float | None = None
    train_s: float | None = None  # with calibration
    eval_s: float | None = None
    artifact_bytes: int | None = None
    code_bytes: int | None = None
    total_bytes: int | None = None
    settings: list[dict[str, Any]] = field(default_factory=list)  # of the start, then of each restart
    environment: dict[str, Any] = field(default_factory=dict)
    scoring: str = ""  # adaptive or fixed_predictor
    sources: str | None = None  # the code that the text log begins with
    finished: bool = False

    @property
    def largest_bytes(self) -> int:
        """What the log counts against the limit, 0 where it counts nothing."""
        return max(self.total_bytes or 0, (self.artifact_bytes or 0) + (self.code_bytes or 0))


def read_run(path: Path) -> SeedRun:
    """The run of a log, JSONL or text; a text beside a JSONL file adds the sources. Raises LogError."""
    if path.suffix != ".jsonl":
        return run_of_text(path, read_text(path))
    run = run_of_rows(path, read_rows(path))
    beside = [path.with_suffix(suffix) for suffix in (".log", ".txt")]
    text = next((other for other in beside if other.is_file()), None)
    if text:
        run.sources = run_of_text(text, read_text(text)).sources
    return run


def read_text(path: Path) -> str:
    """Raises LogError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise LogError(f"cannot read the log {path}: {reason}") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL log, with fixed event names. Raises LogError."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LogError(f"{path}:{number} is no JSON; take the log as the run wrote it") from error
        if not isinstance(row, dict) or not isinstance(row.get("event"), str):
            raise LogError(f"{path}:{number} is no row of a run's log")
        rows.append(with_a_fixed_name(row))
    return rows


def with_a_fixed_name(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it is, or of older code, which wrote `step:7/20` and `track:adaptive` as names of events."""
    name, _, value = row["event"].partition(":")
    if name == "step" and (step := re.match(rf"{WHOLE}(?:/|$)", value)):
        return {**row, "event": "step", "step": int(step[1])}
    return {**row, "event": "track", "track": value} if name == "track" and value else row


def run_of_rows(path: Path, rows: Sequence[dict[str, Any]]) -> SeedRun:
    """The run of a JSONL log. Raises LogError where a figure is none."""

    def value(row: dict[str, Any], name: str, *kinds: type) -> Any:
        """A field of one of these kinds, or None where there is none."""
        found = row.get(name)
        is_number, fits = type(found) in (int, float), type(found) in kinds
        if found is None or (fits and (not is_number or abs(found) < LARGEST)):
            return found
        wanted = "finite number" if float in kinds or fits else kinds[0].__name__
        raise LogError(
            f"{path}: {name} of {row['event']!r} is {found!r:.40}, no {wanted}; take the log as it was written"
        )

    def last(events: str, name: str, *kinds: type) -> Any:
        row = next((row for row in reversed(rows) if re.fullmatch(events, row["event"]) and name in row), None)
        return value(row, name, *kinds) if row else None

    def plain(event: str) -> list[dict[str, Any]]:
        found = [row for row in rows if row["event"] == event]
        return [{name: each for name, each in row.items() if name not in ("event", "time")} for row in found]

    scored = [row for row in rows if row["event"].endswith("_exact") and {"val_loss", "val_bpb"} <= set(row)]
    scores = {row["event"]: tuple(value(row, name, int, float) for name in ("val_loss", "val_bpb")) for row in scored}
    val_loss, val_bpb = scores.pop(FINAL, (None, None))
    masses = [abs(value(row, "mass", int, float) - 1) for row in rows if row.get("mass") is not None]
    masses += [value(row, "worst", int, float) for row in rows if row.get("worst") is not None]
    steps, step = "step|step_validation", ("train_time_ms", "step_avg_ms")
    train_ms, step_avg_ms = (last(steps, name, int, float) for name in step)
    calibrated_s = last("calibration", "train_and_calibration_s", int, float)
    texts = [row for row in rows if row["event"] == "validation"]
    kinds = {"targets": int, "bytes": int, "digest": str}
    return SeedRun(
        path=path, finished=bool(rows) and rows[-1]["event"] == FINAL, seed=last("config", "seed", int),
        val_loss=val_loss, val_bpb=val_bpb, scores={name: pair for name, pair in scores.items() if None not in pair},
        valid=last(FINAL, "valid", bool), mass_error=max(masses, default=None),
        partial=bool(rows) and "partial" in str(rows[-1].get("note", "")),
        text={name: value(texts[0], name, kind) for name, kind in kinds.items()} if texts else {},
        steps=last(steps, "step", int), step_avg_ms=step_avg_ms,
        train_s=calibrated_s if calibrated_s is not None else train_ms and train_ms / 1000,
        eval_s=last("evaluation", "total_s", int, float), artifact_bytes=last("artifact_bytes", "bytes", int),
        code_bytes=last("code_bytes", "bytes", int), total_bytes=last("total_bytes", "bytes", int),
        settings=plain("config"), environment=(plain("environment") or [{}])[0],
        scoring=last("track", "track", str) or "",
    )  # fmt: skip


WHOLE, NUMBER = r"(\d{1,15})", r"(\d{1,15}(?:\.\d+)?)"  # bounded: int() refuses thousands of digits
STEP = re.compile(rf"^step:{WHOLE}/\d+ .*?train_time:{NUMBER}ms(?: step_avg:{NUMBER}ms)?", re.M)
SCORE = re.compile(rf"^(?!step:)(\w+) val_loss:{NUMBER} val_bpb:{NUMBER}(.*)$", re.M)
STAGE_MS = re.compile(rf"^(?!step:|DIAGNOSTIC)\w+ val_loss:.*eval_time:{NUMBER}ms", re.M)
RULE = re.compile(r"^={20,}$", re.M)  # other scripts' logs have one behind the source and one behind the versions
PAIR = re.compile(r"(\w+):(.*?)(?= \w+:|$)", re.M)
MEASURED = re.compile(r"time:|warmup_step:|stall:")  # lines before the first step that hold no setting


def run_of_text(path: Path, whole: str) -> SeedRun:
    """The run of a text log: of this project, with its sources, or of any script of the contest."""
    whole = whole.replace("\r", "")
    sources, own, log = whole.partition(LOG_STARTS)
    if not own:
        rule = RULE.search(whole)
        with_code = rule is not None and "import torch" in whole[: rule.start()]
        sources, log = (whole[: rule.start()], whole[rule.end() :]) if rule and with_code else ("", whole)

    def last(pattern: str) -> str | None:
        found = re.findall(pattern, log, re.M)
        return found[-1] if found else None

    def whole_number(pattern: str) -> int | None:
        found = last(pattern)
        return int(found) if found else None

    steps = STEP.findall(log)
    step, train_ms, step_avg_ms = steps[-1] if steps else ("", "", "")
    scores = {name: (float(loss), float(bpb), rest) for name, loss, bpb, rest in SCORE.findall(log)}
    exact = [name for name in scores if name.endswith("_exact")] or [*scores]
    name = FINAL if own else (exact or [""])[-1]
    val_loss, val_bpb, rest = scores.get(name, (None, None, ""))
    calibrated_s, stages_ms = last(rf"^calibration .*train_and_calibration:{NUMBER}s"), STAGE_MS.findall(log)
    eval_s = last(rf"^evaluation total:{NUMBER}s") or (str(sum(map(float, stages_ms)) / 1000) if stages_ms else None)
    masses = re.findall(rf"^final_mixed.* mass:{NUMBER}", log, re.M)
    settings = settings_of_text(log, bool(own))
    seed = last(rf"^(?:config .*)?\bseed:{WHOLE}\b") or "".join(re.findall(rf"seed_?{WHOLE}", path.stem)[-1:])
    return SeedRun(
        path=path, finished=val_bpb is not None and (not own or log.rstrip().split("\n")[-1].startswith(FINAL)),
        seed=int(seed) if seed else None, val_loss=val_loss, val_bpb=val_bpb,
        scores={each: scores[each][:2] for each in exact if each != FINAL},
        valid=True if "valid:True" in rest else False if "valid:False" in rest else None,
        mass_error=max((abs(float(mass) - 1) for mass in masses), default=None), partial="partial" in rest,
        text=dict(
            targets=whole_number(rf"^validation targets:{WHOLE}") or whole_number(rf"^val_loader:.* tokens:{WHOLE}"),
            bytes=whole_number(rf"^validation targets:\d+ bytes:{WHOLE}"), digest=last(r"^validation .*digest:(\w+)"),
        ),
        steps=int(step) if step else None, step_avg_ms=float(step_avg_ms) if step_avg_ms else None,
        train_s=float(calibrated_s) if calibrated_s else float(train_ms) / 1000 if train_ms else None,
        eval_s=float(eval_s) if eval_s else None,
        artifact_bytes=whole_number(rf"^Serialized model.*: {WHOLE} bytes"),
        code_bytes=whole_number(rf"^Code size: {WHOLE} bytes"),
        total_bytes=whole_number(rf"^Total submission size.*: {WHOLE} bytes"),
        settings=[settings] if settings else [], environment=dict(PAIR.findall(last(r"^environment (.*)$") or "")),
        scoring=last(r"^track:(\w+)") or "", sources=sources or None,
    )  # fmt: skip


def settings_of_text(log: str, own: bool) -> dict[str, Any]:
    """What stands as `name:value` before the first step of a log without its source; of our own, the line `config`."""
    found = STEP.search(log)
    before = RULE.split(log[: found.start()] if found else log)[-1]
    if own:
        before = "\n".join(re.findall(r"^config (.*)$", before, re.M)[:1])
    lines = [line for line in before.splitlines() if not MEASURED.search(line)]
    settings: dict[str, Any] = dict(PAIR.findall("\n".join(lines)))
    if "vocab_size" not in settings and (found := re.search(rf"_{WHOLE}\w*_bpe\.model", before)):
        settings["vocab_size"] = found[1]
    return settings


# ---- the contest's rules ------------------------------------------------------------------------------------------


def judge(runs: Sequence[SeedRun], record: bool) -> Iterator[Finding]:
    """Hold the runs, each and together, against the rules; of a record more is expected."""
    for run in runs:
        yield from judge_run(run, record)
    if record and len(runs) < RECORD_SEEDS:
        advice = "run more seeds, or submit to the track non_record_16mb"
        yield refused("seeds", f"{len(runs)} given, a record has at least {RECORD_SEEDS}; {advice}")
    elif record:
        yield ok("seeds", f"{len(runs)} runs")
    yield from judge_together(runs)


def judge_run(run: SeedRun, record: bool) -> Iterator[Finding]:
    """One run against the limits."""
    name = run.path.name
    if not run.finished:
        yield refused(name, f"has no final score ({FINAL}): the run did not finish; run this seed to its end")
    if changed := next((found for other in run.settings[1:] if (found := difference(other, run.settings[0]))), ""):
        yield refused(name, f"went on with other settings: {changed} at its start; run this seed anew, all with one")
    if run.valid is False or (run.mass_error or 0) > MASS_TOLERANCE:
        shown = f"valid:{run.valid}" + (f", mass off by {run.mass_error:.1e}" if run.mass_error else "")
        yield refused(name, f"{shown}: the probabilities do not sum to 1; use a mixer that is a distribution")
    elif run.valid is None:
        yield unknown(name, "whether the probabilities sum to 1: its log does not say")
    else:
        yield ok(name, "the log says that the probabilities sum to 1")
    over_by_a_step = (run.step_avg_ms or 0) / 1000  # a run ends with the step in which its time ends
    limits = (
        ("bytes in all", run.largest_bytes or None, SIZE_LIMIT_BYTES, 0.0, "FIT_BYTES=1 or a smaller model"),
        ("s of training", run.train_s, BUDGET_S, over_by_a_step, "lower MAX_WALLCLOCK_SECONDS"),
        ("s of evaluation", run.eval_s, BUDGET_S, 0.0, "score in fewer windows, or train less on them"),
    )
    for what, value, limit, more, advice in limits:
        if value is None:
            yield unknown(name, f"{what}: its log does not say")
            continue
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.1f}"
        verdict = f"{shown} {what}, at most {limit:,.0f} are allowed"
        yield refused(name, f"{verdict}; {advice}") if value > limit + more else ok(name, verdict)
    if record:
        yield from judge_text(run)


def judge_text(run: SeedRun) -> Iterator[Finding]:
    """Whether a record's run scored the whole published split."""
    name, targets = run.path.name, run.text.get("targets")
    vocabulary = run.settings[0].get("vocab_size") if run.settings else None
    if run.partial:
        yield refused(name, "scores a part of the validation split (VAL_TOKENS); score all of it")
    elif targets == RECORD_TARGETS:
        yield ok(name, f"{targets:,} validation targets")
    elif targets is None:
        yield unknown(name, f"how many targets were scored: its log does not say (all are {RECORD_TARGETS:,})")
    elif vocabulary is not None and str(vocabulary) != str(RECORD_VOCABULARY):
        yield unknown(name, f"{targets:,} targets: whether that is all of the text, with {vocabulary} pieces")
    else:
        expected = f"the published split has {RECORD_TARGETS:,} at sequences of 2,048"
        yield refused(name, f"{targets:,} validation targets, {expected}; score that split, all of it and nothing else")


def judge_together(runs: Sequence[SeedRun]) -> Iterator[Finding]:
    """Whether the runs are repetitions of one another."""
    seeds = [run.seed for run in runs]
    if twice := [run for run in runs if run.seed is not None and seeds.count(run.seed) > 1]:
        names = " and ".join(run.path.name for run in twice if run.seed == twice[0].seed)
        yield refused(names, f"seed {twice[0].seed} more than once; keep the run that counts, and say why it does")
    if None in seeds:
        yield unknown(runs[seeds.index(None)].path.name, "its seed: its log does not say")
    kinds: tuple[tuple[str, Callable[[SeedRun], dict[str, Any]]], ...] = (
        ("settings", lambda run: {n.upper(): value for n, value in (run.settings or [{}])[0].items()}),
        ("machine and versions", lambda run: run.environment),
        ("validation text", lambda run: {f"validation {n}": v for n, v in run.text.items() if v is not None}),
        ("part of the validation split", lambda run: {"partial": run.partial}),
        ("code", lambda run: {"code bytes": run.code_bytes} if run.code_bytes is not None else {}),
    )
    for what, facts_of in kinds:
        facts = [facts_of(run) for run in runs]
        empty = [run.path.name for run, fact in zip(runs, facts) if not fact]
        differing = [(run, found) for run, fact in zip(runs, facts) if (found := difference(fact, facts[0]))]
        if empty:
            yield unknown(what, f"whether they are the same in all runs: {empty[0]} does not say")
        elif differing:
            run, found = differing[0]
            yield refused(what, f"{run.path.name}: {found} in {runs[0].path.name}; run all seeds alike")
        elif len(runs) > 1:
            yield ok(what, "the same in all runs")


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The first field in which two differ, unless it is one of OF_THE_RUN; empty where they are alike."""
    for name in sorted(set(ours) | set(theirs)):
        our, their = ours.get(name), theirs.get(name)
        may_differ = name.lower() in OF_THE_RUN
        if name.lower() == "kg_path":  # a path is another place, none is another graph: the one in kg_data.py
            may_differ = bool(our) == bool(their)
        if our != their and not may_differ:
            return f"{name}={our!r:.80}, but {their!r:.80}"
    return ""
