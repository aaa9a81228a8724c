"""Reads the JSONL log of a run, also while the run goes on and where lines of it are damaged.

Rows are taken as they come: unknown events, missing fields and values of another kind than expected cost nothing but
what they would have shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FINAL = "final_int8_zlib_roundtrip_exact"
STAGES = ("diagnostic", "roundtrip", "sliding_window", "ttt", "mixed")  # `stage` of a row, in the order of a run
LARGEST_LOG = 512 << 20
Row = dict[str, Any]
Points = Sequence[tuple[float, float]]


class LogError(Exception):
    """A file that is no log, or cannot be read; the text says what to do."""


@dataclass
class Run:
    """What one log says. Of a step that was taken twice, before and after a restart, the last time counts."""

    path: Path
    name: str  # unlike that of every other run of the page
    last: dict[str, Row] = field(default_factory=dict)  # the newest row of every event
    steps: dict[int, Row] = field(default_factory=dict)
    validations: dict[int, Row] = field(default_factory=dict)
    votes: dict[tuple[int, str, str], Row] = field(default_factory=dict)  # by step, agent, parameter
    stages: dict[str, Row] = field(default_factory=dict)
    chunks: dict[int, Row] = field(default_factory=dict)
    decoded: list[Row] = field(default_factory=list)
    newest: str = ""  # when the newest row was written
    damaged: int = 0
    unfinished: bool = False  # the last line is cut off

    @classmethod
    def read(cls, path: Path, name: str, may_be_empty: bool = False) -> Run:
        """Raises LogError for what cannot be read or is no log; damaged lines are counted and left out."""
        try:
            if path.exists() and not path.is_file():
                raise LogError(f"{path} is no regular file; give the log of a run, logs/RUN_ID.jsonl")
            size = path.stat().st_size
            if size > LARGEST_LOG:
                raise LogError(f"{path} has {size:,} bytes, too many for a run's log ({LARGEST_LOG:,})")
            *lines, tail = path.read_bytes().split(b"\n")
        except OSError as error:
            raise LogError(f"cannot read the log {path}: {error.strerror}") from error
        run = cls(path, name)
        for line in filter(bytes.strip, lines):
            row = parse(line)
            if row is None:
                run.damaged += 1
            else:
                run.take(row)
        if tail.strip():
            row = parse(tail)
            run.unfinished = row is None
            if row is not None:
                run.take(row)
        if not run.newest and not (may_be_empty and not lines):
            why = "it is empty so far; --follow waits for its first row"
            if lines or tail:
                why = 'no line is a row with "event" and "time"; give logs/RUN_ID.jsonl of a run of this train_gpt.py'
            raise LogError(f"{path} is no log: {why}")
        return run

    def take(self, row: Row) -> None:
        """Note one row; unknown events cost nothing."""
        event, step, chunk = row["event"], whole(row, "step"), whole(row, "chunk")
        if event == "environment":  # a new process: how an earlier one ended is over
            for ended in ("stopped", FINAL):
                self.last.pop(ended, None)
        elif event == "resumed" and step is not None:
            self.steps, self.validations = (
                {number: each for number, each in taken.items() if number <= step}
                for taken in (self.steps, self.validations)
            )
            self.votes = {key: each for key, each in self.votes.items() if key[0] <= step}
        elif event == "step" and step is not None:
            self.steps[step] = row
        elif event == "step_validation" and step is not None:
            self.validations[step] = row
        elif event == "vote" and step is not None:
            self.votes[step, shown(row.get("agent")), shown(row.get("parameter"))] = row
        elif event == "ttt_chunk" and chunk is not None:
            self.chunks[chunk] = row
        elif event == "decode":
            self.decoded.append(row)
        stage = "diagnostic" if event == "diagnostic" else row.get("stage")
        if isinstance(stage, str) and stage in STAGES:
            self.stages[stage] = self.stages.get(stage, {}) | row
        self.last[event] = row
        if isinstance(row.get("time"), str):
            self.newest = row["time"]

    def get(self, event: str, name: str) -> float | None:
        """A number of the newest row of that event, if both are there."""
        return number(self.last.get(event, {}), name)

    def bpb(self, stage: str) -> float | None:
        return number(self.stages.get(stage, {}), "val_bpb")

    def settings(self, event: str = "config") -> Row:
        return {name: value for name, value in self.last.get(event, {}).items() if name not in ("event", "time")}

    @property
    def finished(self) -> bool:
        return FINAL in self.last

    @property
    def partial(self) -> bool:
        rows = (self.last.get("validation", {}), self.last.get(FINAL, {}))
        return any("partial" in str(row.get("note", "")) for row in rows)

    @property
    def seed(self) -> str:
        return shown(self.settings().get("seed"))

    @property
    def train_s(self) -> float | None:
        """Seconds of the training clock so far, calibration included."""
        rows = (*self.steps.values(), *self.validations.values())
        clock = [ms / 1000 for row in rows if (ms := number(row, "train_time_ms")) is not None]
        calibrated = self.get("calibration", "train_and_calibration_s")
        return max(clock + ([] if calibrated is None else [calibrated]), default=None)


def parse(line: bytes) -> Row | None:
    """The row on a line, or None where the line is no JSON object with an event."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("event"), str) else None


def number(row: Row, name: str) -> float | None:
    """A finite number, or None for anything else."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole(row: Row, name: str) -> int | None:
    value = number(row, name)
    return int(value) if value is not None and value == int(value) else None


def points(rows: dict[int, Row], y: str, x: str = "", unit: float = 1.0) -> Points:
    """(x / unit, y) of the rows that have both, in the order of their keys, which are x where it has no name."""
    found = [(number(row, x) if x else float(key), number(row, y)) for key, row in sorted(rows.items())]
    return [(a / unit, b) for a, b in found if a is not None and b is not None]


def shown(value: Any) -> str:
    """Any value of a log as text that a page can hold."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
