"""Audit anybody's submission through an adapter: a short Python file that says how to score a stream of tokens.

    python tools/audit.py --submission ADAPTER.py
    python tools/audit.py --submission ADAPTER.py --seconds 300 --seed 7 --json findings.json

The adapter has VOCAB_SIZE and score(tokens): tokens (N + 1,) int64 → (logp, index), log-probabilities in nats in the
order of scoring, and the target 0 … N - 1 that each belongs to (target t is tokens[t + 1]). It may have more; see
docs/audit_submissions.md, and tools/adapters/ for templates. It runs in a process of its own, in which nothing of this
project can be imported by accident, so that a submission's modules may have any names.

The checks test at positions drawn by a seed; they prove nothing about the positions that were not drawn.

Exit code: 0 when all holds, 1 when a check fails, 2 when the adapter cannot be used or the time was too short.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

PASS, FAIL, NOT_TESTED, REPORTED = "PASS", "FAIL", "NOT TESTED", "REPORTED"
MASS_TOLERANCE = 1e-4
REPEAT_LIMIT = 1e-4  # the share of targets that may be scored twice
ENOUGH_FAULTS = 3  # positions at which a check fails before it stops looking
CONFIDENCE = 0.95
FUNCTIONS = ("score", "distributions", "bytes_of", "text_of")  # what an adapter may define, besides its constants

Scores = tuple[np.ndarray, np.ndarray]  # logp (M,) float64 and index (M,) int64, in the order of scoring


class AdapterError(Exception):
    """An adapter that cannot be used. The message is one line: file, function, what came back, what was expected."""


class OutOfTime(Exception):
    """The time limit came before the answer."""


# ----------------------------------------------------------------------------------------------------------
# The adapter's process. It speaks on the pipe that was its standard output; what the submission prints goes to a log.
# ----------------------------------------------------------------------------------------------------------
def pack(header: dict[str, Any], *arrays: np.ndarray) -> bytes:
    """One message: a length of 8 bytes, a line of JSON, then the arrays' bytes."""
    described = {**header, "arrays": [[array.dtype.str, list(array.shape)] for array in arrays]}
    body = json.dumps(described).encode() + b"\n" + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    return len(body).to_bytes(8, "little") + body


def unpack(body: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The header and the arrays of a message without its length."""
    line, _, data = body.partition(b"\n")
    header, arrays, offset = json.loads(line), [], 0
    for dtype, shape in header["arrays"]:
        count = math.prod(shape)
        arrays.append(np.frombuffer(data, dtype, count, offset).reshape(shape).copy())
        offset += arrays[-1].nbytes
    return header, arrays


def described(value: Any) -> str:
    """A returned value in a few words."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"an array of shape {tuple(shape)} and type {getattr(value, 'dtype', '?')}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r:.60}" if isinstance(value, (int, float, str, bytes, type(None))) else f"a {type(value).__name__}"


def as_array(value: Any, dtype: type) -> np.ndarray:
    """`value`, which may be a list, an array or a tensor, as an array; ValueError where it is none."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    if array.dtype.kind not in ("fiu" if dtype is np.float64 else "iu"):
        raise ValueError(f"{described(value)} holds {array.dtype}")
    return array.astype(dtype)


def read_scores(value: Any, num_targets: int) -> list[np.ndarray]:
    wanted = "(logp, index), two arrays of one length"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"returned {described(value)}; expected {wanted}")
    try:
        logp, index = as_array(value[0], np.float64), as_array(value[1], np.int64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"returned values that are no numbers ({error}); expected floats and integers") from None
    if logp.ndim != 1 or logp.shape != index.shape:
        raise ValueError(f"returned logp {logp.shape} and index {index.shape}; expected {wanted}")
    if len(index) and (index.min() < 0 or index.max() >= num_targets):
        raise ValueError(f"returned indices {index.min()} to {index.max()}; expected 0 to {num_targets - 1}")
    return [logp, index]


def read_distributions(value: Any, num_targets: int, vocab_size: int) -> list[np.ndarray]:
    table = as_array(value, np.float64)
    if table.shape != (num_targets, vocab_size):
        raise ValueError(f"returned {described(value)}; expected log-probabilities ({num_targets}, {vocab_size})")
    return [table]


def read_bytes(value: Any, num_targets: int) -> list[np.ndarray]:
    counts = as_array(value, np.float64)
    if counts.shape != (num_targets,):
        raise ValueError(f"returned {described(value)}; expected one count per target, ({num_targets},)")
    return [counts]


def read_text(value: Any) -> list[np.ndarray]:
    if not isinstance(value, (str, bytes)):
        raise ValueError(f"returned {described(value)}; expected str or bytes")
    return [np.frombuffer(value.encode() if isinstance(value, str) else value, np.uint8)]


def read_value(function: str, value: Any, num_targets: int, vocab_size: int) -> list[np.ndarray]:
    """What `function` of an adapter gave, as arrays. Raises ValueError for what is of no use."""
    if function == "score":
        return read_scores(value, num_targets)
    if function == "distributions":
        return read_distributions(value, num_targets, vocab_size)
    return read_bytes(value, num_targets) if function == "bytes_of" else read_text(value)


def read_facts(module: ModuleType) -> dict[str, Any]:
    """The constants of an adapter; ValueError names the one that is missing or of no use."""
    vocab_size = getattr(module, "VOCAB_SIZE", None)
    if not isinstance(vocab_size, int) or vocab_size < 2:
        raise ValueError(f"VOCAB_SIZE is {described(vocab_size)}; expected an integer of at least 2")
    if not callable(getattr(module, "score", None)):
        raise ValueError("defines no score; expected score(tokens) → (logp, index)")
    lengths = getattr(module, "LENGTHS", ())
    if not all(isinstance(length, int) and length >= 8 for length in lengths):
        raise ValueError(f"LENGTHS is {lengths!r}; expected integers of at least 8")
    facts: dict[str, Any] = {"vocab_size": vocab_size, "lengths": list(lengths)}
    for name, default in (("TOLERANCE", 1e-6), ("DRAW_FROM", 0), ("SPLIT_TARGETS", 0), ("CUT", 1)):
        facts[name.lower()] = getattr(module, name, default)
        if not isinstance(facts[name.lower()], (int, float)) or facts[name.lower()] < 0:
            raise ValueError(f"{name} is {described(facts[name.lower()])}; expected a number of at least 0")
    facts["functions"] = [name for name in FUNCTIONS if callable(getattr(module, name, None))]
    return facts


def load_adapter(path: Path) -> ModuleType:
    """Import the file at `path`. Its folder comes first in the search for modules, that of the templates last."""
    sys.path[0] = str(path.parent)  # it was this program's, whose modules have names such as report
    sys.path.append(str(Path(__file__).resolve().parent / "adapters"))
    spec = importlib.util.spec_from_file_location("submission_adapter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def complaint(error: BaseException, path: Path) -> str:
    """`error` in one line; of an error raised in the adapter or below it, also where in the adapter."""
    text = " ".join(str(error).split())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    own = isinstance(error, SyntaxError) and error.filename == str(path)
    where = f" (line {lines[-1]})" if lines and not own else ""
    return f"raised {type(error).__name__}{': ' if text else ''}{text:.300}{where}"


def serve(path: Path) -> int:
    """The adapter's process: import it, say what it has, then answer requests until the pipe closes."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a submission prints as it likes

    def reply(header: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        replies.write(pack(header, *arrays))
        replies.flush()

    try:
        module = load_adapter(path)
    except BaseException as error:  # noqa: BLE001  whatever it is, SystemExit included, a person reads one line
        traceback.print_exc()
        reply({"error": complaint(error, path)})
        return 1
    try:
        reply(read_facts(module))
    except ValueError as error:
        reply({"error": str(error)})
        return 1
    while size := sys.stdin.buffer.read(8):
        header, (tokens,) = unpack(sys.stdin.buffer.read(int.from_bytes(size, "little")))
        try:
            value = getattr(module, header["function"])(tokens)
        except BaseException as error:  # noqa: BLE001
            traceback.print_exc()
            reply({"error": complaint(error, path)})
            continue
        try:
            reply({}, read_value(header["function"], value, len(tokens) - 1, module.VOCAB_SIZE))
        except (ValueError, TypeError) as error:
            reply({"error": str(error)})
    return 0


# ----------------------------------------------------------------------------------------------------------
# The auditor's side.
# ----------------------------------------------------------------------------------------------------------
def printable(text: str) -> str:
    """A submission's text without the characters that steer a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


class Adapter:
    """An adapter in its own process. `deadline` is a time of `time.monotonic`, after which no answer is waited for."""

    def __init__(self, path: Path, deadline: float):
        self.path, self.deadline = path, deadline
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        program = [sys.executable, str(Path(__file__).resolve()), "--serve", str(path.resolve())]
        environ = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environ.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environ, start_new_session=True
        )

    def start(self) -> dict[str, Any]:
        """Wait until the adapter is imported, and return its constants. Comes before any call."""
        return self.receive("import")[0]

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and with it whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()

    def printed(self) -> str:
        """What the submission printed, tracebacks included."""
        self.log.seek(0)
        return printable(self.log.read().decode(errors="replace"))

    def call(self, function: str, tokens: np.ndarray) -> list[np.ndarray]:
        """What the adapter's `function` gives. Raises AdapterError, and OutOfTime at the deadline."""
        asked, pipe = f"{function}(tokens of {len(tokens)})", self.process.stdin
        assert pipe is not None
        self.time_left(asked)  # a process that still works on the call before would not empty the pipe
        with contextlib.suppress(BrokenPipeError):  # then the answer is the end of the process
            pipe.write(pack({"function": function}, np.ascontiguousarray(tokens, dtype=np.int64)))
            pipe.flush()
        return self.receive(asked)[1]

    def receive(self, asked: str) -> tuple[dict[str, Any], list[np.ndarray]]:
        size = int.from_bytes(self.read(8, asked), "little")
        header, arrays = unpack(self.read(size, asked))
        if "error" in header:
            raise AdapterError(f"{self.path}: {asked} {printable(str(header['error']))}")
        return header, arrays

    def time_left(self, asked: str) -> float:
        if (left := self.deadline - time.monotonic()) <= 0:
            raise OutOfTime(f"{self.path}: {asked} gave no answer within the time limit; raise --seconds")
        return left

    def read(self, size: int, asked: str) -> bytes:
        assert self.process.stdout is not None
        descriptor, parts, missing = self.process.stdout.fileno(), [], size
        while missing:
            if not select.select([descriptor], [], [], self.time_left(asked))[0]:
                continue
            part = os.read(descriptor, min(missing, 1 << 20))
            if not part:
                code = self.process.wait()
                how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                raise AdapterError(f"{self.path}: {asked} ended its process ({how}); expected an answer")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


class Outcome(NamedTuple):
    """What came of one check."""

    result: str
    found: str


class Finding(NamedTuple):
    """One line of the report."""

    check: str
    result: str
    asked: str
    found: str
    seconds: float


@dataclass(frozen=True, eq=False)
class Base:
    """A stream that checks change, and its scores."""

    tokens: np.ndarray
    logp: np.ndarray
    index: np.ndarray

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1


def make_stream(length: int, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    """`length` + 1 tokens int64, skewed, about half of them copies of earlier spans, so that counts and caches matter.

    The first is the last of the vocabulary: whoever takes its size from the text finds the same one in every stream.
    """
    weights = 1.0 / np.arange(1, vocab_size + 1)
    by_rank = rng.permutation(vocab_size)
    tokens = [vocab_size - 1]
    while len(tokens) <= length:
        size = int(rng.integers(3, 16))
        if len(tokens) > 24 and rng.random() < 0.5:
            start = int(rng.integers(0, len(tokens) - size))
            tokens += tokens[start : start + size]
        else:
            tokens += by_rank[rng.choice(vocab_size, size, p=weights / weights.sum())].tolist()
    return np.array(tokens[: length + 1], dtype=np.int64)


def findable(count: int) -> str:
    """What `count` positions drawn at random are good for."""
    if not count:
        return "no position"
    share = 1 - (1 - CONFIDENCE) ** (1 / count)
    return f"{count} positions (a fault at {share:.1%} of them is found with {CONFIDENCE:.0%})"


class Auditor:
    """The checks of one adapter. What is drawn follows from `seed`."""

    def __init__(self, adapter: Adapter, facts: dict[str, Any], seed: int, positions: int):
        self.adapter, self.facts, self.positions = adapter, facts, positions
        self.rng = np.random.default_rng(seed)
        self.vocab_size: int = facts["vocab_size"]
        self.tolerance: float = facts["tolerance"]
        first = int(self.rng.integers(300, 401))
        self.lengths: list[int] = facts["lengths"] or [first, 2 * first]
        self.bases: list[Base] = []
        self.call_s = 0.0  # the last call at the first length

    def score(self, tokens: np.ndarray) -> Scores:
        began = time.monotonic()
        logp, index = self.adapter.call("score", tokens)
        if len(tokens) == self.lengths[0] + 1:
            self.call_s = time.monotonic() - began
        return logp, index

    def score_until(self, end: float, tokens: np.ndarray) -> Scores | None:
        """The scores, unless the answer would likely come after `end`."""
        if time.monotonic() + self.call_s > end:
            return None
        try:
            return self.score(tokens)
        except OutOfTime:
            return None

    def time_left(self) -> float:
        return self.adapter.deadline - time.monotonic()

    def changed_from(self, tokens: np.ndarray, first: int) -> np.ndarray:
        """`tokens` with another one, drawn at random, in each place from `first` on."""
        changed = tokens.copy()
        changed[first:] += self.rng.integers(1, self.vocab_size, len(changed[first:]))
        return changed % self.vocab_size

    def draw(self, last: int) -> list[tuple[Base, int]]:
        """Targets to look at, but for the last `last` of a stream: three of four in the first, the others elsewhere."""
        chosen = []
        for number in range(self.positions):
            base = self.bases[0]
            if number % 4 == 3:
                base = self.bases[int(self.rng.integers(len(self.bases)))]
            first = min(int(self.facts["draw_from"]), base.num_targets - 1 - last)
            chosen.append((base, int(self.rng.integers(first, base.num_targets - last))))
        return chosen

    def differences(self, one: Scores, other: Scores) -> str:
        """How the scores of two calls differ, or nothing."""
        if not np.array_equal(one[1], other[1]):
            return "the targets, or the order in which they are scored, differ"
        apart = np.abs(one[0] - other[0])
        if len(apart) and not apart.max() <= self.tolerance:
            return f"target {one[1][apart.argmax()]} differs by {apart.max():.3g} nats"
        return ""

    # -- the checks, in the order in which they run ------------------------------------------------------------
    def check_values(self) -> Outcome:
        for length in self.lengths:
            tokens = make_stream(length, self.vocab_size, self.rng)
            self.bases.append(Base(tokens, *self.score(tokens)))
        for base in self.bases:
            bad = ~(np.isfinite(base.logp) & (base.logp <= self.tolerance))
            if bad.any():
                target, value = base.index[bad][0], base.logp[bad][0]
                return Outcome(FAIL, f"{bad.sum()} of {len(bad)}, the first at target {target}: logp {value:.4g}")
        mean = -self.bases[0].logp.mean() if len(self.bases[0].logp) else math.nan
        counts = ", ".join(str(len(base.logp)) for base in self.bases)
        uniform = math.log(self.vocab_size)
        return Outcome(PASS, f"{counts} log-probabilities; {mean:.3f} nats a target, uniform {uniform:.3f}")

    def check_determinism(self) -> Outcome:
        base = self.bases[0]
        first = base.logp, base.index
        self.score(make_stream(base.num_targets, self.vocab_size, self.rng))
        if difference := self.differences(first, self.score(base.tokens)):
            return Outcome(FAIL, f"after another stream in between, {difference}; score must start afresh each time")
        with Adapter(self.adapter.path, self.adapter.deadline) as fresh:
            fresh.start()
            logp, index = fresh.call("score", base.tokens)
        if difference := self.differences(first, (logp, index)):
            return Outcome(FAIL, f"in a new process, {difference}")
        return Outcome(PASS, "the same, also after another stream and in a new process")

    def check_coverage(self) -> Outcome:
        parts, failed, border = [], False, 0
        repeats = [np.flatnonzero(np.bincount(b.index, minlength=b.num_targets) > 1) for b in self.bases]
        width = min((b.num_targets - int(r.min(initial=b.num_targets)) for b, r in zip(self.bases, repeats)), default=0)
        split = int(self.facts["split_targets"])
        for base, repeated in zip(self.bases, repeats):
            missing = base.num_targets - len(np.unique(base.index))
            extra = len(base.index) + missing - base.num_targets
            share = len(repeated) / base.num_targets
            # A repetition that stays at the end however long the stream is the work of the last windows.
            at_end = len(repeated) and repeated.min() >= base.num_targets - width and 4 * width <= base.num_targets
            parts.append(f"{base.num_targets} targets: {missing} missing, {len(repeated)} scored again ({share:.2%})")
            if at_end and split and len(self.bases) > 1:
                border = max(border, extra)
            else:
                failed |= share > REPEAT_LIMIT
            failed |= missing > 0
        found = "; ".join(parts)
        if border:
            of_split = border * self.facts["cut"] / split
            failed |= of_split > REPEAT_LIMIT
            found += f"; only within the last {width}, which is {of_split:.4%} of a split of {split:,} targets"
        return Outcome(FAIL if failed else PASS, found)

    def check_causality(self, seconds: float) -> Outcome:
        end, faults, tried = time.monotonic() + seconds, [], 0
        for base, target in self.draw(last=1):
            tokens = self.changed_from(base.tokens, target + 2)
            if (scores := self.score_until(end, tokens)) is None:
                break
            logp, index = scores
            kept, expected = index <= target, base.index <= target
            tried += 1
            difference = self.differences((base.logp[expected], base.index[expected]), (logp[kept], index[kept]))
            if difference:
                faults.append(f"with other tokens after target {target} of {base.num_targets}, {difference}")
            if len(faults) == ENOUGH_FAULTS:
                break
        if faults:
            return Outcome(FAIL, f"{len(faults)} of {tried} positions: {faults[0]}")
        if not tried:
            return Outcome(NOT_TESTED, "the time is too short for one position; raise --seconds")
        return Outcome(PASS, f"nothing changes, {findable(tried)}")

    def token_order(self, base: Base) -> np.ndarray:
        """The vocabulary, the tokens that the stream has most of first: a sum above 1 shows the soonest."""
        counts = np.bincount(base.tokens, minlength=self.vocab_size)
        return np.argsort(-counts + self.rng.random(self.vocab_size), kind="stable")

    def mass_at(self, base: Base, target: int, end: float) -> tuple[np.ndarray, int]:
        """Sums of exp(logp) of the tokens put at `target`, one sum per time it is scored; and how many were tried."""
        tokens, sums = base.tokens.copy(), np.zeros(0)
        for tried, token in enumerate(self.token_order(base)):
            tokens[target + 1] = token
            if (scores := self.score_until(end, tokens)) is None:
                return sums, tried
            logp, index = scores
            entries = np.exp(logp[index == target])
            if tried and len(entries) != len(sums):
                return np.array([np.nan]), tried + 1
            sums = entries + (sums if tried else 0.0)
            if len(sums) and sums.max() > 1 + MASS_TOLERANCE and time.monotonic() + self.call_s * self.vocab_size > end:
                return sums, tried + 1  # more tokens only add to it
        return sums, self.vocab_size

    def check_mass(self, seconds: float) -> Outcome:
        end = time.monotonic() + seconds
        masses: list[float] = []
        faults, undecided = 0, ""
        for base, target in self.draw(last=0):
            sums, tried = self.mass_at(base, target, end)
            worst = float(sums[np.abs(sums - 1).argmax()]) if len(sums) else math.nan
            if tried < self.vocab_size and not worst > 1 + MASS_TOLERANCE:
                undecided = f"; at target {target} {tried:,} of {self.vocab_size:,} tokens sum to {worst:.3f} so far"
                break
            if math.isnan(worst):  # the target is not scored, or not as often for every token
                return Outcome(FAIL, f"target {target} is not scored equally often for each token put there")
            masses.append(worst)
            faults += abs(worst - 1) > MASS_TOLERANCE
            if faults == ENOUGH_FAULTS:
                break
        if not masses:
            return Outcome(NOT_TESTED, f"the time is too short for one position{undecided}; raise --seconds")
        span = f"mass {min(masses):.6g} to {max(masses):.6g}"
        if faults:
            return Outcome(FAIL, f"{span}, not 1 at {faults} of {len(masses)} positions{undecided}")
        return Outcome(PASS, f"{span}, {findable(len(masses))} of {self.positions} wanted{undecided}")

    def check_distributions(self, seconds: float) -> Outcome:
        """Every position's sum and entry; at those drawn, that other tokens there and later leave it as it was."""
        tables = []
        for base in self.bases:
            (table,) = self.adapter.call("distributions", base.tokens)
            off = np.abs(np.exp(table).sum(1) - 1)
            if not off.max() <= MASS_TOLERANCE:
                return Outcome(FAIL, f"mass {np.exp(table).sum(1)[off.argmax()]:.6g} at target {off.argmax()}")
            if fault := self.entry_fault(base.tokens, table, (base.logp, base.index)):
                return Outcome(FAIL, fault)
            tables.append(table)
        end, tried = time.monotonic() + seconds, 0
        for base, target in self.draw(last=0):
            if tried and time.monotonic() + 2 * self.call_s > end:
                break
            tokens = self.changed_from(base.tokens, target + 1)
            (table,) = self.adapter.call("distributions", tokens)
            (before,) = (known for known, other in zip(tables, self.bases) if other is base)
            apart = np.abs(np.exp(table[: target + 1]) - np.exp(before[: target + 1])).max()
            if not apart <= MASS_TOLERANCE:
                return Outcome(FAIL, f"other tokens from target {target} on change it by {apart:.3g} up to there")
            if fault := self.entry_fault(tokens, table, self.score(tokens)):
                return Outcome(FAIL, fault)
            tried += 1
        return Outcome(PASS, f"mass 1 at all {sum(len(table) for table in tables):,}; {findable(tried)}")

    def entry_fault(self, tokens: np.ndarray, table: np.ndarray, scores: Scores) -> str:
        logp, index = scores
        apart = np.abs(table[index, tokens[index + 1]] - logp)
        if len(apart) and not apart.max() <= MASS_TOLERANCE:
            return f"target {index[apart.argmax()]} was scored {apart.max():.3g} nats off its stated entry"
        return ""

    def check_vocabulary(self) -> Outcome:
        """Whether a token that is nowhere else, as the stream's last, changes what came before."""
        tokens = make_stream(self.lengths[0], self.vocab_size, self.rng) // 2
        last, without = len(tokens) - 2, []
        for token in (0, self.vocab_size - 1):
            tokens[-1] = token
            try:
                logp, index = self.score(tokens)
            except AdapterError as error:
                return Outcome(REPORTED, f"{error}: not every token of the vocabulary may be absent from the text")
            without.append((logp[index < last], index[index < last]))
        if difference := self.differences(*without):
            return Outcome(REPORTED, f"{difference}: the size of the vocabulary seems to be taken from the text")
        return Outcome(PASS, "nothing changes")

    def check_bytes(self) -> Outcome:
        if not {"bytes_of", "text_of"} <= set(self.facts["functions"]):
            return Outcome(NOT_TESTED, "the adapter has no bytes_of and text_of")
        total = 0.0
        for base in self.bases:
            (counts,), (text,) = (self.adapter.call(name, base.tokens) for name in ("bytes_of", "text_of"))
            if counts.sum() != len(text) or not (counts >= 0).all():
                found = f"{counts.sum():,.10g} bytes counted for a text of {len(text):,}, {base.num_targets} targets"
                return Outcome(FAIL, found)
            total += counts.sum()
        return Outcome(PASS, f"{total:,.10g} bytes counted, as many as the text has")


def run_checks(auditor: Auditor, show: Callable[[Finding], None]) -> list[Finding]:
    """All checks in turn. One that the time does not reach, or that makes no sense after another's failure, says so."""
    vocabulary, tolerance = auditor.vocab_size, auditor.tolerance
    checks: list[tuple[str, str, Callable[[], Outcome]]] = [
        ("log-probabilities", "finite and at most 0?", auditor.check_values),
        ("determinism", f"the same tokens twice: the same within {tolerance:g} nats?", auditor.check_determinism),
        ("every target once", f"none missing, at most {REPEAT_LIMIT:.2%} scored twice?", auditor.check_coverage),
        (
            "causality",
            f"other tokens after a target: does anything up to it change by more than {tolerance:g} nats?",
            lambda: auditor.check_causality(0.3 * auditor.time_left()),
        ),
        ("vocabulary", "does a token that is new in the last place change earlier scores?", auditor.check_vocabulary),
        ("bytes", "are the counted bytes those of the text?", auditor.check_bytes),
    ]
    if "distributions" in auditor.facts["functions"]:
        asked = f"sum 1 within {MASS_TOLERANCE:g}, the entry that was scored, unmoved by its own target?"
        checks.append(("stated distributions", asked, lambda: auditor.check_distributions(0.5 * auditor.time_left())))
    asked = (
        f"each of {vocabulary:,} tokens in turn at a target: does the sum differ from 1 by {MASS_TOLERANCE:g} at most?"
    )
    checks.append(("mass", asked, lambda: auditor.check_mass(auditor.time_left() - 2 * auditor.call_s)))
    findings: list[Finding] = []
    results: dict[str, str] = {}
    for name, asked, check in checks:
        began = time.monotonic()
        if results.get("determinism", PASS) != PASS:
            outcome = Outcome(NOT_TESTED, "the scores are not the same twice, which comes first")
        elif name == "vocabulary" and results["causality"] == FAIL:
            outcome = Outcome(NOT_TESTED, "later tokens change earlier scores anyway")
        else:
            try:
                outcome = check()
            except OutOfTime as error:
                if name == "log-probabilities":
                    raise
                outcome = Outcome(NOT_TESTED, str(error))
        results[name] = outcome.result
        findings.append(Finding(name, outcome.result, asked, outcome.found, time.monotonic() - began))
        show(findings[-1])
    return findings


def show_finding(finding: Finding) -> None:
    print(f"{finding.result:<10}  {finding.check}  ({finding.seconds:.1f} s)")
    print(f"{'':<12}{finding.asked}\n{'':<12}{finding.found}", flush=True)


def verdict(findings: Sequence[Finding]) -> tuple[int, str]:
    """The exit code and one line."""
    failed = [finding.check for finding in findings if finding.result == FAIL]
    optional = {"bytes"}
    if any(finding.check == "stated distributions" and finding.result == PASS for finding in findings):
        optional.add("mass")  # the same by other means, for vocabularies too large to go through
    untested = [f.check for f in findings if f.result == NOT_TESTED and f.check not in optional]
    if failed:
        return 1, f"INVALID: {', '.join(failed)}"
    if untested:
        return 2, f"undecided: {', '.join(untested)} not tested"
    return 0, "no fault found at what was tested"


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--submission", type=Path, metavar="ADAPTER.py", required=True, help="the adapter")
    parser.add_argument("--seed", type=int, help="what positions and streams are drawn by (drawn, and printed)")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit for all checks together (60)")
    parser.add_argument("--positions", type=int, default=120, help="targets to look at, as the time allows (120)")
    parser.add_argument("--json", type=Path, help="write the findings there")
    parser.add_argument("--traceback", action="store_true", help="after an error, what the submission printed")
    arguments = parser.parse_args(words)
    if not arguments.seconds > 0 or arguments.positions < 1:
        parser.error("--seconds and --positions must be greater than 0")
    if arguments.seed is not None and arguments.seed < 0:
        parser.error("--seed must be at least 0")
    return arguments


def audit(arguments: argparse.Namespace, seed: int) -> list[Finding]:
    """Run the checks on the adapter and print them. Raises AdapterError or OutOfTime for one that cannot be used."""
    path: Path = arguments.submission
    if not path.is_file():
        raise AdapterError(f"{path}: no such file; expected an adapter, such as a copy of one in tools/adapters/")
    deadline = time.monotonic() + arguments.seconds
    with Adapter(path, deadline) as adapter:
        try:
            auditor = Auditor(adapter, adapter.start(), seed, arguments.positions)
            lengths = " and ".join(str(length) for length in auditor.lengths)
            size = f"vocabulary of {auditor.vocab_size:,}, streams of {lengths} targets"
            print(f"{path}: {size}, --seed {seed}", flush=True)
            return run_checks(auditor, show_finding)
        except (AdapterError, OutOfTime):
            if arguments.traceback:
                sys.stderr.write(adapter.printed())
            raise


def main(words: Sequence[str] | None = None) -> int:
    """Audit the adapter, print the findings, write the JSON. Returns the exit code."""
    arguments = parse_arguments(words)
    seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
    began = time.monotonic()
    try:
        findings = audit(arguments, seed)
        code, line = verdict(findings)
        if arguments.json:
            result = {"adapter": str(arguments.submission), "seed": seed, "exit_code": code, "verdict": line}
            result["findings"] = [finding._asdict() for finding in findings]
            arguments.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except (AdapterError, OutOfTime, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    print(f"{line} ({time.monotonic() - began:.0f} s, --seed {seed})")
    return code


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[2])) if sys.argv[1:2] == ["--serve"] else main())
