"""One HTML page about one run, or several side by side, from the JSONL logs that train_gpt.py writes.

    python tools/run_report.py logs/RUN_ID.jsonl [MORE.jsonl …] --out report.html [--follow [--every 10]]

The page stands alone: no script, no font, nothing from a network. Runs whose settings differ in nothing but the seed
and in places of files are one configuration: their curves get a mean and a band of one standard deviation (of a
sample: n - 1). A log may be read while its run goes on; --follow writes the page again whenever a log has grown, until
every run has its final row or Ctrl-C is pressed. Needs matplotlib and jinja2 (requirements-tools.txt).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(REPO))
from tools import run_figures as figures  # noqa: E402
from tools.record_logs import OF_THE_RUN  # noqa: E402
from tools.run_figures import Line  # noqa: E402
from tools.run_log import FINAL, STAGES, LogError, Points, Run, number, points, shown, whole  # noqa: E402

STAGE_NAMES = {
    "diagnostic": "before quantization", "roundtrip": "from the artifact", "sliding_window": "sliding window",
    "ttt": "test-time training", "mixed": "mixed with n-grams",
}  # fmt: skip
BUDGET_S = 600.0  # the contest's, for training and again for evaluation
LIMIT_BYTES = 16_000_000
RECORD_TARGETS = 62_021_632  # of the contest's validation split
MOST_ROWS, MOST_POINTS, MOST_BARS, MOST_LABELS = 200, 1500, 16, 12
SMALLEST_BAR = 0.005  # of all tensors' bytes; smaller ones share a bar
NONE = "—"


class ReportError(Exception):
    """Logs, or a place for the page, that cannot be used; the text says what to do."""


UNUSABLE = (ReportError, LogError)


# Words and numbers ------------------------
def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly chosen, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[index] for index in np.linspace(0, len(rows) - 1, most).astype(int)]


def fixed(value: float | None, digits: int = 4) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def short(text: str, most: int = 26) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def one_or_many(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("s" if count != 1 else "")


def names_of(runs: Iterable[Run]) -> str:
    return ", ".join(run.name for run in runs)


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample of at least two."""
    return float(np.mean(values)), float(np.std(values, ddof=1))


# What stands on the page ------------------------
class Table(NamedTuple):
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False

    @property
    def wide(self) -> bool:
        """Whether it takes more than half a desktop's window."""
        longest = [max(map(len, column)) for column in zip(self.head, *self.rows)]
        return self.folded or sum(longest) + 2 * len(longest) > 75


class Picture(NamedTuple):
    title: str
    svg: str
    tables: Sequence[Table]  # the numbers behind it


@dataclass
class Section:
    title: str
    text: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


class Check(NamedTuple):
    name: str
    kept: bool | None  # None: not decided, or for people to judge
    text: str


@dataclass
class Configuration:
    """Runs that differ in nothing but OF_THE_RUN, and how the pictures show them."""

    letter: str
    runs: list[Run]
    label: str = ""
    alone: bool = True  # no other configuration is on the page
    index: int = 0

    def style(self, position: int) -> tuple[str, Any]:
        """Colour and dashes of a run: its own, or its configuration's where there are several of these."""
        return figures.style_of(position if self.alone else self.index)

    def run_label(self, run: Run) -> str:
        """A run's name in a legend; the mean stands for several runs of one configuration among others."""
        return short(run.name) if self.alone else self.label if len(self.runs) == 1 else ""

    @property
    def mean_color(self) -> str:
        return figures.BLACK if self.alone else figures.style_of(self.index)[0]

    @property
    def mean_label(self) -> str:
        return "mean ± s.d." if self.alone else self.label


def configurations(runs: Sequence[Run]) -> list[Configuration]:
    """The runs by configuration and validation text, in the order in which they were given."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        kept = {name: value for name, value in run.settings().items() if name not in OF_THE_RUN}
        text = [run.last.get("validation", {}).get(name) for name in ("targets", "bytes", "digest")]
        key = json.dumps([kept, text], sort_keys=True) if kept else run.name  # without settings nothing is alike
        found.setdefault(key, []).append(run)
    groups = [Configuration(letters(index), group, index=index) for index, group in enumerate(found.values())]
    firsts = [group.runs[0] for group in groups]
    differ = [row for row in differing(firsts, "config") if row[0] not in OF_THE_RUN]
    for index, group in enumerate(groups):
        group.alone = len(groups) == 1
        values = ", ".join(f"{row[0]}={row[1 + index]}" for row in differ)
        group.label = short(f"{group.letter}: {values or group.runs[0].name}", 40)
    return groups


def letters(index: int) -> str:
    """A, B, …, Z, AA, …"""
    return (letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def differing(runs: Sequence[Run], event: str) -> list[list[str]]:
    """Rows (name, value in each run) of the settings that are not the same in all."""
    names = dict.fromkeys(name for run in runs for name in run.settings(event))
    rows = [[name, *(shown(run.settings(event).get(name, NONE)) for run in runs)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


# Verdict ------------------------
def where_it_stands(run: Run) -> Check:
    if run.finished:
        return Check("State", True, "finished")
    if "stopped" in run.last:
        row = run.last["stopped"]
        return Check("State", None, f"stopped by {shown(row.get('signal', 'a signal'))}; RESUME=auto goes on")
    rows = run.steps | run.validations
    at = ""
    if rows:
        step = max(rows)
        of = number(rows[step], "steps")
        at = f", step {step:,}" + (f" of {of:,.0f} ({step / of:.0%})" if of else "")
    done = [name for stage, name in STAGE_NAMES.items() if stage in run.stages]
    at = f", scored: {done[-1]}" if done else at
    return Check("State", None, f"no final row: still going on, or ended early{at}; newest row {shown(run.newest)}")


def checks(run: Run) -> list[Check]:
    """Every question that decides whether the run's score may stand, with what the log says."""
    final, text = run.last.get(FINAL, {}), run.last.get("validation", {})
    bpb = number(final, "val_bpb")
    score = NONE if bpb is None else f"{bpb:.4f} bits per byte ({fixed(number(final, 'val_loss'))} nats per token)"
    valid = (final or run.stages.get("mixed", {})).get("valid")
    words = {True: "valid: the probabilities add up to 1", False: "INVALID: no code length"}
    valid = valid if isinstance(valid, bool) else None
    targets = whole(text, "targets")
    whole_text = None if targets is None else not run.partial
    said = NONE
    if targets is not None:
        said = f"{targets:,} targets, {fixed(number(text, 'bytes'), 0)} bytes, {'a part' if run.partial else 'all'} of "
        said += "the contest's split" if targets == RECORD_TARGETS else f"the split (the contest's: {RECORD_TARGETS:,})"
        said += f", digest {shown(text['digest'])}" if "digest" in text else ""
    track = shown(run.last.get("track", {}).get("track", NONE)).replace("_", " ")
    return [
        where_it_stands(run), Check("Score", None if bpb is None else True, score),
        Check("Valid", valid, words.get(valid, "not known yet") if valid is not None else "not known yet"),
        Check("Text", whole_text, said), Check("Track", True if "track" in run.last else None, track),
        training_check(run), evaluation_check(run), bytes_check(run),
    ]  # fmt: skip


def training_check(run: Run) -> Check:
    """A run ends with the step in which its time ends, so one step more is within the budget."""
    seconds, name = run.train_s, "Training time"
    if seconds is None:
        return Check(name, None, "no training step in this log")
    rows = run.steps | run.validations
    one_step_s = (number(rows[max(rows)], "step_avg_ms") or 0.0) / 1000 if rows else 0.0
    over = seconds > BUDGET_S + one_step_s
    done = "diagnostic" in run.stages or run.finished
    text = f"{seconds:,.1f} s of {BUDGET_S:.0f} s" + ("" if done else " so far")
    return Check(name, False if over else True if done else None, text)


def evaluation_check(run: Run) -> Check:
    for event, known in (("evaluation", True), ("evaluation_projected", False)):
        total, budget = run.get(event, "total_s"), run.get(event, "budget_s") or BUDGET_S
        if total is not None:
            text = f"{total:,.1f} s of {budget:.0f} s" + ("" if known else ", projected")
            return Check("Evaluation time", total <= budget if known else None, text)
    return Check("Evaluation time", None, "not known yet")


def bytes_check(run: Run) -> Check:
    total, limit = run.get("total_bytes", "bytes"), run.get("total_bytes", "limit") or LIMIT_BYTES
    if total is None:
        return Check("Bytes", None, "not packed yet")
    return Check("Bytes", total <= limit, f"{total:,.0f} of {limit:,.0f} ({total / limit:.1%}), code counted")


def verdict(run: Run) -> tuple[bool | None, str]:
    """Does the score stand (None: not decided yet), and in words why."""
    found = checks(run)
    broken = [each.name.lower() for each in found if each.kept is False]
    if broken:
        return False, f"falls short in: {', '.join(broken)}"
    if not run.finished:
        return None, "not decided: the run has no final row yet"
    still_open = [each.name.lower() for each in found if each.kept is None]
    return (None, f"not decided: {', '.join(still_open)}") if still_open else (True, "valid, and within every budget")


def headline(group: Configuration) -> str:
    """One configuration's score in a sentence."""
    scores = [(run.seed, bpb) for run in group.runs if (bpb := run.get(FINAL, "val_bpb")) is not None]
    before = "" if group.alone else f"{group.label}: "
    if not scores:
        return f"{before}no final score yet"
    if len(scores) == 1:
        return f"{before}{scores[0][1]:.4f} bits per byte"
    mean, sd = mean_and_sd([bpb for _, bpb in scores])
    seeds = ", ".join(seed for seed, _ in scores)
    what = f"mean and standard deviation of {len(scores)} runs (seeds {seeds})"
    return f"{before}{mean:.4f} ± {sd:.4f} bits per byte, {what}"


# Sections ------------------------
def missing(runs: Sequence[Run], has: Callable[[Run], Any], what: str) -> list[str]:
    """A sentence that names the runs without something, or none."""
    lacking = [run for run in runs if not has(run)]
    if not lacking:
        return []
    where = "this log" if len(runs) == 1 else f"the log of {names_of(lacking)}"
    return [f"No {what} in {where}{'' if all(run.finished for run in lacking) else ' so far'}."]


def curve_lines(groups: Sequence[Configuration], curve: Callable[[Run], Points]) -> list[Line]:
    """Every run's line, and for configurations of several runs the mean with its spread where all have a point."""
    lines = []
    for group in groups:
        curves = [curve(run) for run in group.runs]
        several = len([each for each in curves if each]) > 1
        for position, (run, found) in enumerate(zip(group.runs, curves)):
            color, dashes = group.style(position)
            x, y = split(thinned(found, MOST_POINTS))
            width, alpha = (1.0, 0.75 if group.alone else 0.35) if several else (1.5, 1.0)
            label = group.run_label(run) if found else ""
            lines.append(figures.Line(label, x, y, color, dashes, width=width, alpha=alpha))
        x, mean, sd = mean_curve(curves)
        if x:
            kept = thinned(list(zip(x, mean, sd)), MOST_POINTS)
            x, mean, sd = ([each[part] for each in kept] for part in range(3))
            dashes = "solid" if group.alone else group.style(0)[1]
            lines.append(figures.Line(group.mean_label, x, mean, group.mean_color, dashes, width=1.8, spread=sd))
    return lines


def mean_curve(curves: Sequence[Points]) -> tuple[list[float], list[float], list[float]]:
    """x, mean and standard deviation where all curves that have points at all have one; empty for fewer than two."""
    tables = [dict(curve) for curve in curves if curve]
    if len(tables) < 2:
        return [], [], []
    common = sorted(set.intersection(*(set(table) for table in tables)))
    pairs = [mean_and_sd([table[x] for table in tables]) for x in common]
    return common, [mean for mean, _ in pairs], [sd for _, sd in pairs]


def split(curve: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def without(table: Table, column: str) -> Table:
    """The table without a column that would say the same in every row."""
    if column not in table.head:
        return table
    at = list(table.head).index(column)
    head, *rows = ([*row[:at], *row[at + 1 :]] for row in (table.head, *table.rows))
    return table._replace(head=head, rows=rows)


def described(title: str, runs: Sequence[Run], curve: Callable[[Run], Points]) -> str:
    """What somebody who does not see a line chart should know of it."""
    parts = []
    for run in runs[:8]:
        found = curve(run)
        if found:
            (x0, y0), (x1, y1) = found[0], found[-1]
            parts.append(f"{run.name} goes from {y0:.4g} at {x0:,.6g} to {y1:.4g} at {x1:,.6g}")
    more = f"; and {len(runs) - 8} more" if len(runs) > 8 else ""
    return f"Line chart. {title}: {'; '.join(parts) or 'no points'}{more}. The numbers follow in a table."


def curve_table(
    groups: Sequence[Configuration], curve: Callable[[Run], Points], axes: tuple[str, str], digits: int = 4
) -> Table:
    """A column a run, then mean and standard deviation of each configuration of several; `axes`: labels of x and y."""
    runs = [run for group in groups for run in group.runs]
    x, y = axes
    columns: dict[str, dict[float, float]] = {run.name if len(runs) > 1 else y: dict(curve(run)) for run in runs}
    for group in groups:
        at, mean, sd = mean_curve([curve(run) for run in group.runs])
        if at:
            which = "" if group.alone else f" {group.letter}"
            columns |= {f"mean{which}": dict(zip(at, mean)), f"s.d.{which}": dict(zip(at, sd))}
    every = sorted({at for column in columns.values() for at in column})
    rows = [
        [fixed(at, 0 if at == int(at) else 3), *(fixed(column.get(at), digits) for column in columns.values())]
        for at in thinned(every, MOST_ROWS)
    ]
    cut = f" ({MOST_ROWS} of {len(every):,} rows)" if len(every) > MOST_ROWS else ""
    return Table(f"The numbers{cut}", [x, *columns], rows, folded=True)


def train_loss(run: Run) -> Points:
    return points(run.steps, "train_loss")


def validation_loss(run: Run) -> Points:
    return points(run.validations, "val_loss")


def train_loss_by_time(run: Run) -> Points:
    return points(run.steps, "train_loss", "train_time_ms", 1000)


def validation_loss_by_time(run: Run) -> Points:
    return points(run.validations, "val_loss", "train_time_ms", 1000)


def learning(groups: Sequence[Configuration]) -> Section:
    """Loss curves with the swarm's proposals on them."""
    runs = [run for group in groups for run in group.runs]
    section = Section("Training", missing(runs, train_loss, "training step"))
    bad = {run.name: len(run.steps) - len(train_loss(run)) for run in runs}
    section.text += [f"{count} steps of {name} have no finite loss." for name, count in bad.items() if count]
    if not any(map(train_loss, runs)):
        return section
    kinds = [
        ("Loss by step", "step", train_loss, validation_loss, ""),
        ("Loss by time", "training time, s", train_loss_by_time, validation_loss_by_time, "train_time_ms"),
    ]
    for title, xlabel, train, validation, clock in kinds:
        section.pictures.append(loss_picture(groups, title, (xlabel, clock), train, validation))
    half = max(x for run in runs for x, _ in (*train_loss(run), *validation_loss(run))) / 2

    def later(curve: Callable[[Run], Points]) -> Callable[[Run], Points]:
        return lambda run: [(x, y) for x, y in curve(run) if x >= half]

    if max(len(later(train_loss)(run)) for run in runs) >= 5:
        picture = loss_picture(groups, "Loss, last half", ("step", ""), later(train_loss), later(validation_loss))
        section.pictures.append(picture)
    section.tables += validation_tables(runs)
    return section


def loss_picture(
    groups: Sequence[Configuration], title: str, axis: tuple[str, str],
    train: Callable[[Run], Points], validation: Callable[[Run], Points],
) -> Picture:  # fmt: skip
    """Train loss, validation loss and the swarm's proposals; `axis`: its label, and the field of a step it shows."""
    xlabel, clock = axis
    runs = [run for group in groups for run in group.runs]
    lines, events = curve_lines(groups, train), []
    marks: dict[str, Line] = {}
    for group in groups:
        for position, run in enumerate(group.runs):
            color = group.style(position)[0]
            x, y = split(validation(run))
            if x:
                lines.append(figures.Line("", x, y, color, "none", "s"))
                marks["validation"] = figures.Line("validation", [], [], figures.GREY, "none", "s")
            for passed, marker in ((True, "^"), (False, "v")):
                x, y = split(on_the_curve(run, passed, train, clock))
                name = "vote passed" if passed else "vote failed"
                if x:
                    lines.append(figures.Line("", x, y, color, "none", marker, filled=passed))
                    marks[name] = figures.Line(name, [], [], figures.GREY, "none", marker, filled=passed)
    if len(runs) == 1:
        events = decisions(runs[0], train, clock)
    # Entries for the marks come after those of the runs.
    chart = figures.Chart(xlabel, "nats per token", events=events)
    svg = figures.draw_lines([*lines, *marks.values()], chart, described(title, runs, train))
    return Picture(title, svg, [curve_table(groups, train, (xlabel, chart.ylabel))])


def at_step(run: Run, step: int, clock: str) -> float:
    """Where a step lies on the axis: itself, or the seconds of the training clock, read between the rows around it."""
    if not clock:
        return float(step)
    times = points(run.steps | run.validations, clock)
    return float(np.interp(step, *split(times))) / 1000 if times else math.nan


def on_the_curve(run: Run, passed: bool, curve: Callable[[Run], Points], clock: str) -> Points:
    """Where the proposals that passed, or did not, stand on the curve of the training loss."""
    found = curve(run)
    steps = sorted({step for (step, _, _), row in run.votes.items() if (row.get("passed") is True) == passed})
    places = [at_step(run, step, clock) for step in steps]
    return [(x, float(np.interp(x, *split(found)))) for x in places if found and found[0][0] <= x <= found[-1][0]]


def decisions(run: Run, curve: Callable[[Run], Points], clock: str) -> list[tuple[float, str]]:
    """Upright lines for what was decided, the settings' names on them, unless they would be too many to read."""
    found: dict[int, list[str]] = {}
    for (step, _, parameter), row in run.votes.items():
        if row.get("passed") is True:
            found.setdefault(step, []).append(parameter)
    qat = whole(run.last.get("qat_on", {}), "step")
    if qat is not None and "qat" not in found.get(qat, []):
        found.setdefault(qat, []).append("QAT on")
    shown_from = curve(run)[0][0] if curve(run) else 0.0
    lines = [(at_step(run, step, clock), short(", ".join(names), 34)) for step, names in sorted(found.items())]
    return [line for line in lines if line[0] >= shown_from] if len(lines) <= MOST_LABELS else []


def validation_tables(runs: Sequence[Run]) -> list[Table]:
    rows = [
        [run.name, f"{step:,}", fixed(number(row, "val_loss")), fixed(number(row, "val_bpb")),
         fixed(seconds / 1000, 1) if (seconds := number(row, "train_time_ms")) is not None else NONE]
        for run in runs for step, row in sorted(run.validations.items())
    ]  # fmt: skip
    head = ["run", "step", "loss, nats per token", "bits per byte", "training time, s"]
    table = Table("Validation while training", head, thinned(rows, MOST_ROWS), folded=len(rows) > 12)
    return [table] if rows else []


def swarm(runs: Sequence[Run]) -> Section | None:
    """Every proposal with its votes. None where no run has a swarm."""
    with_swarm = [run for run in runs if run.votes or run.settings().get("swarm_enabled")]
    if not with_swarm:
        return None
    section = Section("The swarm's votes", missing(with_swarm, lambda run: run.votes, "proposal of the swarm"))
    rows, counts = [], []
    for run in with_swarm:
        passed = sum(row.get("passed") is True for row in run.votes.values())
        if run.votes:
            before = f"{run.name}: " if len(runs) > 1 else ""
            counts.append(f"{before}{one_or_many(len(run.votes), 'proposal')}, {passed} passed")
        for (step, agent, parameter), row in sorted(run.votes.items(), key=lambda item: item[0]):
            change = f"{shown(row.get('old', NONE))} → {shown(row.get('new', NONE))}"
            outcome = "passed" if row.get("passed") is True else "failed"
            votes = ballots(row.get("votes"))
            reason = shown(row.get("reason", NONE))
            rows.append([run.name, f"{step:,}", agent, parameter, change, outcome, votes, reason])
    if rows:
        section.text.append("; ".join(counts) + ".")
        head = ["run", "step", "agent", "parameter", "change", "outcome", "votes", "reason"]
        section.tables.append(Table("Proposals", head, rows, folded=len(rows) > 12))
    return section


def ballots(votes: Any) -> str:
    """`agent vote (confidence)` of every agent that did not abstain."""
    if not isinstance(votes, dict):
        return NONE
    cast = [(agent, vote) for agent, vote in votes.items() if isinstance(vote, dict) and vote.get("vote") != "abstain"]
    texts = [f"{shown(a)} {shown(v.get('vote'))} ({fixed(number(v, 'confidence'), 2)})" for a, v in cast]
    return ", ".join(texts) or "all abstained"


def scores(groups: Sequence[Configuration]) -> Section:
    """Bits per byte after every stage."""
    runs = [run for group in groups for run in group.runs]
    section = Section("Score by stage", missing(runs, lambda run: run.stages, "score"))
    for run in runs:
        absent = [STAGE_NAMES[stage] for stage in expected_stages(run) if stage not in run.stages]
        if absent and run.stages:
            section.text.append(f"Not scored in {run.name}: {', '.join(absent)}.")
    stages = [stage for stage in STAGES if any(run.bpb(stage) is not None for run in runs)]
    if not stages:
        return section
    lines, summary = [], []
    for group in groups:
        for position, run in enumerate(group.runs):
            x, y = split([(bpb, row) for row, stage in enumerate(stages) if (bpb := run.bpb(stage)) is not None])
            lines.append(figures.Line(group.run_label(run), x, y, group.style(position)[0]))
        for row, stage in enumerate(stages):
            values = [bpb for run in group.runs if (bpb := run.bpb(stage)) is not None]
            if len(values) > 1:
                mean, sd = mean_and_sd(values)
                label = group.mean_label if not summary or summary[-1][0] != group.letter else ""
                at = row + 0.25 + 0.12 * group.index
                lines.append(figures.Line(label, [mean], [at], group.mean_color, marker="D", spread=[sd]))
                summary.append([group.letter, STAGE_NAMES[stage], fixed(mean, 6), fixed(sd, 6), str(len(values))])
    rows = [
        [STAGE_NAMES[stage], run.name, fixed(number(row, "val_loss"), 6), fixed(number(row, "val_bpb"), 6),
         fixed(ms / 1000, 1) if (ms := number(row, "eval_time_ms")) is not None else NONE]
        for stage in stages for run in runs if (row := run.stages.get(stage))
    ]  # fmt: skip
    head = ["stage", "run", "loss, nats per token", "bits per byte", "seconds"]
    chart = figures.Chart("bits per byte", "", height_in=0.9 + 0.45 * len(stages))
    said = "; ".join(f"{row[0]} of {row[1]} {row[3]}" for row in rows[:12])
    alt = f"Dot chart of bits per byte by stage: {said}. The numbers follow in a table."
    names = [STAGE_NAMES[stage] for stage in stages]
    section.pictures.append(Picture("Bits per byte", figures.draw_dots(names, lines, chart, alt), []))
    if summary:
        columns = ["configuration", "stage", "mean", "standard deviation", "runs"]
        mean_table = Table("Mean and spread, bits per byte", columns, summary)
        section.tables.append(without(mean_table, "configuration") if groups[0].alone else mean_table)
    section.tables.append(Table("Scores", head, rows, folded=len(rows) > 12))
    return section


def expected_stages(run: Run) -> list[str]:
    """The stages that a run's settings ask for."""
    config = run.settings()
    optional = {
        "diagnostic": not config.get("eval_only"), "ttt": bool(config.get("ttt_enabled")),
        "mixed": config.get("mixer", "none") != "none",
    }  # fmt: skip
    return [stage for stage in STAGES if optional.get(stage, True)]


def chunk_bpb(run: Run) -> Points:
    return points(run.chunks, "val_bpb")


def running_bpb(run: Run) -> Points:
    return points(run.chunks, "val_bpb_so_far")


def adaptation(groups: Sequence[Configuration]) -> Section | None:
    """The chunks of test-time training. None where no run has that stage."""
    every = [(run, run.settings()) for group in groups for run in group.runs]
    # TTT by document has no chunks that all of the stream goes through.
    runs = [run for run, of in every if run.chunks or (of.get("ttt_enabled") and not of.get("ttt_rank"))]
    if not runs:
        return None
    section = Section("Test-time training", missing(runs, lambda run: run.chunks, "chunk of test-time training"))
    if not any(map(running_bpb, runs)):
        return section
    lines = curve_lines(groups, running_bpb)
    if len(runs) == 1:
        x, y = split(thinned(chunk_bpb(runs[0]), MOST_POINTS))
        lines[0].label = "so far"
        lines.append(figures.Line("of the chunk", x, y, figures.PALETTE[1], "none", "o", alpha=0.6))
    title = "Bits per byte of all chunks so far"
    svg = figures.draw_lines(lines, figures.Chart("chunk", "bits per byte"), described(title, runs, running_bpb))
    rows = [
        [run.name, f"{chunk:,}", fixed(number(row, "targets"), 0), fixed(number(row, "val_loss")),
         fixed(number(row, "val_bpb")), fixed(number(row, "val_bpb_so_far")), shown(row.get("lr", NONE))]
        for run in runs for chunk, row in thinned(sorted(run.chunks.items()), MOST_ROWS)
    ]  # fmt: skip
    head = ["run", "chunk", "targets so far", "loss, nats per token", "bits per byte", "so far", "learning rate"]
    section.pictures.append(Picture(title, svg, [Table("The numbers", head, rows, folded=True)]))
    return section


def sizes(groups: Sequence[Configuration]) -> Section:
    """Bytes of artifact and code, and of every tensor of each configuration's first packed run."""
    runs = [run for group in groups for run in group.runs]
    section = Section("Bytes", missing(runs, lambda run: "total_bytes" in run.last, "size"))
    rows = []
    for run in runs:
        total, limit = run.get("total_bytes", "bytes"), run.get("total_bytes", "limit") or LIMIT_BYTES
        if total is not None:
            parts = [run.get("artifact_bytes", "bytes"), run.get("code_bytes", "bytes"), total, limit, limit - total]
            rows.append([run.name, *(fixed(part, 0) for part in parts)])
    if rows:
        head = ["run", "artifact", "code", "together", "limit", "left"]
        section.tables.append(Table("Artifact and code", head, rows))
    for group in groups:
        run = next((run for run in group.runs if tensor_bytes(run)), None)
        if run is not None:
            section.pictures.append(tensor_picture(run, group))
    section.text += missing(runs, tensor_bytes, "size of single tensors") if rows else []
    return section


def tensor_bytes(run: Run) -> dict[str, float]:
    """Packed bytes by tensor, the largest first."""
    found = run.last.get("tensor_bytes", {}).get("bytes")
    known = {name: number(found, name) for name in found} if isinstance(found, dict) else {}
    return dict(sorted(((name, size) for name, size in known.items() if size is not None), key=lambda pair: -pair[1]))


def tensor_picture(run: Run, group: Configuration) -> Picture:
    found, codecs = tensor_bytes(run), run.last["tensor_bytes"].get("codec")
    codec = {name: shown(codecs.get(name, NONE)) if isinstance(codecs, dict) else NONE for name in found}
    total = sum(found.values()) or 1.0
    seen = [name for name, size in found.items() if size >= SMALLEST_BAR * total][:MOST_BARS]
    bars = [(short(shown(name), 22), found[name], short(codec[name], 12)) for name in seen]
    others = list(found.values())[len(seen) :]
    if others:
        bars.append((one_or_many(len(others), "other"), sum(others), "several"))
    code = run.get("code_bytes", "bytes")
    if code is not None:
        bars.append(("code", code, "code"))
    title = f"Bytes by tensor, {run.name if group.alone else group.label}"
    said = ", ".join(f"{name} {size:,.0f}" for name, size, _ in bars[:6])
    names, values, kinds = zip(*bars)
    chart = figures.Chart("bytes", "", height_in=1.2 + 0.24 * len(bars))
    alt = f"Bar chart. {title}: {said}. The numbers follow in a table."
    rows = [[shown(name), codec[name], fixed(size, 0), f"{size / total:.1%}"] for name, size in found.items()]
    rows.append(["all tensors", "", fixed(sum(found.values()), 0), ""])
    table = Table("The numbers", ["tensor", "codec", "bytes", "share"], rows, folded=True)
    return Picture(title, figures.draw_bars(names, values, kinds, chart, alt), [table])


def soundness(runs: Sequence[Run]) -> Section:
    """Mass of the mixture, its gap to the stream that was scored, and what a decoder read back."""
    section = Section("Is it a code length?")
    rows = []
    for run in runs:
        row, sampled = run.stages.get("mixed", {}), run.last.get("sampled_targets", {})
        if row:
            parts = [f"{value:.9f}" if (value := number(row, "mass")) is not None else NONE]
            parts += [f"{value:.2e}" if (value := number(row, name)) is not None else NONE for name in ("worst", "gap")]
            where = fixed(number(sampled, "count"), 0), shown(sampled.get("seed", NONE))
            rows.append([run.name, *parts, *where, {True: "yes", False: "NO"}.get(row.get("valid") is True, NONE)])
    if rows:
        head = ["run", "mean mass", "farthest from 1", "gap to the stream", "targets checked", "their seed", "valid"]
        section.tables.append(Table("The mixture at sampled targets", head, rows))
    unmixed = [run for run in runs if "mixed" not in expected_stages(run)]
    if unmixed:
        section.text.append(f"{names_of(unmixed)}: no mixer; the score is that of the model's softmax alone.")
    mixing = [run for run in runs if run not in unmixed]
    section.text += missing(mixing, lambda run: "mixed" in run.stages, "mixture") if mixing else []
    decoded = [(run, row) for run in runs for row in run.decoded]
    if decoded:
        skip = ("event", "time")
        rows = [[run.name, *("; ".join(f"{shown(k)} {shown(v)}" for k, v in row.items() if k not in skip),)]
                for run, row in decoded]  # fmt: skip
        section.tables.append(Table("Decoded", ["run", "what was read back"], rows))
    else:
        section.text.append("Nothing was decoded in these logs; tools/audit.py --decode reads a stretch of text back.")
    return section


def throughput(run: Run) -> Points:
    return points(run.steps, "tokens_per_s")


def machine(groups: Sequence[Configuration]) -> Section:
    """Tokens per second and memory."""
    runs = [run for group in groups for run in group.runs]
    section = Section("Speed and memory", missing(runs, throughput, "speed"))
    if any(map(throughput, runs)):
        title = "Tokens per second"
        alt = described(title, runs, throughput)
        lines = curve_lines(groups, throughput)
        svg = figures.draw_lines(lines, figures.Chart("step", "tokens per second"), alt)
        table = curve_table(groups, throughput, ("step", "tokens per second"), digits=0)
        section.pictures.append(Picture(title, svg, [table]))
    rows = []
    for run in runs:
        speeds = [speed for _, speed in throughput(run)]
        newest = run.steps[max(run.steps)] if run.steps else {}
        rows.append([
            run.name, fixed(float(np.median(speeds)) if speeds else None, 0), fixed(number(newest, "step_avg_ms"), 2),
            fixed(run.get("memory", "peak_mib"), 0), fixed(run.get("memory", "reserved_mib"), 0),
            *(shown(run.settings("environment").get(name, NONE)) for name in ("hardware", "world_size")),
        ])  # fmt: skip
    head = ["run", "tokens/s, median", "ms per step", "peak MiB", "reserved MiB", "hardware", "ranks"]
    section.tables.append(Table("Machine", head, rows))
    section.text += missing(runs, lambda run: "memory" in run.last, "memory reading")
    return section


def settings_section(groups: Sequence[Configuration]) -> Section:
    """What differs between the runs, then every setting."""
    runs = [run for group in groups for run in group.runs]
    section = Section("Settings", missing(runs, Run.settings, "settings"))
    if len(runs) > 1:
        different = differing(runs, "config")
        names = [f"{'' if group.alone else group.letter + ': '}{run.name}" for group in groups for run in group.runs]
        section.tables.append(Table("Settings in which the runs differ", ["setting", *names], different))
        if not different:
            section.text.append("The runs have the same settings.")
        others = differing(runs, "environment")
        if others:
            section.tables.append(Table("Machines and versions in which they differ", ["", *names], others))
    for title, event in (("All settings", "config"), ("Machine and versions", "environment")):
        keys = dict.fromkeys(name for run in runs for name in run.settings(event))
        rows = [[shown(name), " | ".join(dict.fromkeys(shown(run.settings(event).get(name, NONE)) for run in runs))]
                for name in keys]  # fmt: skip
        if rows:
            section.tables.append(Table(title, ["setting", "value"], rows, folded=True))
    return section


# The page ------------------------
def damage(runs: Sequence[Run]) -> list[str]:
    """What of the logs could not be read."""
    lines = [f"{run.name}: {one_or_many(run.damaged, 'damaged line')} left out." for run in runs if run.damaged]
    cut = [run for run in runs if run.unfinished]
    return lines + [f"{run.name}: the last line is not finished and was left out." for run in cut]


def page(runs: Sequence[Run], refresh_s: float = 0.0) -> str:
    """The whole page; with `refresh_s` a browser loads it again after so many seconds while a run is not finished.

    Raises ReportError where a package is missing.
    """
    try:
        import jinja2
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise ReportError(f"the page needs {error.name}: pip install -r requirements-tools.txt") from error
    groups = configurations(runs)
    ordered = [run for group in groups for run in group.runs]
    sections = [
        learning(groups), scores(groups), swarm(ordered), adaptation(groups), sizes(groups), soundness(ordered),
        machine(groups), settings_section(groups),
    ]  # fmt: skip
    sections = [section for section in sections if section]
    if len(runs) == 1:
        for section in sections:
            section.tables = [without(table, "run") for table in section.tables]
            section.pictures = [
                each._replace(tables=[without(table, "run") for table in each.tables]) for each in section.pictures
            ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    found = [(run, verdict(run), checks(run)) for run in ordered]
    return environment.get_template("run_report.html").render(
        title=", ".join(short(run.name, 40) for run in ordered[:4]) + (" …" if len(ordered) > 4 else ""),
        headlines=[headline(group) for group in groups],
        found=found,
        damage=damage(ordered),
        sections=sections,
        refresh_s=refresh_s if not all(run.finished for run in runs) else 0,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        logs=[shown(str(run.path)) for run in ordered],
    )


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A name for each log: its file's, with as many folders before it as tell it from the others."""
    names = []
    for path in paths:
        parts, others = path.with_suffix("").parts, [other.with_suffix("").parts for other in paths if other != path]
        count = next((n for n in range(1, len(parts)) if parts[-n:] not in [o[-n:] for o in others]), len(parts))
        names.append(shown("/".join(parts[-count:])))
    return names


def read_runs(paths: Sequence[Path], may_be_empty: bool = False) -> list[Run]:
    """Raises LogError for a log that is none, ReportError for one that is given twice."""
    distinct = list(dict.fromkeys(path.resolve() for path in paths))
    if len(distinct) < len(paths):
        raise ReportError("a log is given more than once; give each run's log once")
    return [Run.read(path, name, may_be_empty) for path, name in zip(paths, unique_names(paths))]


def write_page(content: str, out: Path) -> None:
    """Replace the page in one step, so that a browser never sees half of it. Raises ReportError."""
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content.encode("utf-8", "replace"))
        part.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise ReportError(f"cannot write {out}: {error.strerror}") from error


def write_report(paths: Sequence[Path], out: Path) -> None:
    """The page about these logs. Raises ReportError or LogError."""
    write_page(page(read_runs(paths)), out)


def follow(paths: Sequence[Path], out: Path, every_s: float) -> list[Run]:
    """Write the page whenever a log has grown, until every run has its final row. Raises ReportError or LogError."""
    before: list[int] = []
    while True:
        # Taken before the logs are read: a row that comes in between changes them at the next look.
        now = [path.stat().st_size if path.is_file() else 0 for path in paths]
        runs = read_runs(paths, may_be_empty=True)
        finished = all(run.finished for run in runs)
        if now != before or finished:  # a final row may have come since the sizes were taken
            write_page(page(runs, every_s), out)
        if finished:
            return runs
        before = now
        time.sleep(every_s)


def seconds_between(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} s; allowed: 0.1 to 3600")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", metavar="RUN.jsonl", help="logs/RUN_ID.jsonl of each run")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    parser.add_argument("--follow", action="store_true", help="write it again while the runs go on")
    parser.add_argument("--every", type=seconds_between, default=10.0, metavar="SECONDS", help="how often it looks")
    args = parser.parse_args(argv)
    try:
        if args.out.suffix.lower() not in (".html", ".htm"):
            raise ReportError(f"--out {args.out} does not end in .html; name the page, not a log")
        if args.follow:
            print(f"following; {args.out} is written while the runs go on, Ctrl-C ends it", flush=True)
            follow(args.logs, args.out, args.every)
        else:
            write_report(args.logs, args.out)
    except UNUSABLE as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nno longer followed: {args.out} is what it was last", file=sys.stderr)
        return 130
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
