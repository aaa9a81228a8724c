"""Test whether a score is what it claims to be: train_gpt.py's own scoring as a black box, and the contest's limits.

    python tools/audit.py --quick                                    a small model, trained on the spot
    python tools/audit.py --artifact final_model.int6.ptz            that artifact too, under its own settings
    python tools/audit.py --artifact FILE --data DIR --tokenizer FILE --log logs/RUN.jsonl --html audit.html
    python tools/audit.py --artifact FILE --data DIR --tokenizer FILE --decode --decode-at 0.7 --decode-tokens 200
    python tools/audit.py --submission ADAPTER.py                    anybody's submission (audit_submission.py)

The scorers get streams in the place of the validation text: short ones, for which all lengths are cut to match
(context, stride, TTT chunk, the blocks between two updates of a mixer, and with them NGRAM_BUCKETS, so that a bucket is
as full as it would be on the whole split), long ones, and one with a run's own windows. Every other setting is the
artifact's, overridden by variables of the environment as in a run (`MIXER=hedge ENTROPY_EXPERT=1 python
tools/audit.py`). Without --artifact the recipe's settings apply (RECIPE). audit_run.py runs the real command besides.
What is asked about is drawn anew each time; --seed repeats an audit. docs/validity.md lists the checks, and what no
test of this kind can see.

--decode does nothing else and cuts nothing: audit_decode.py has a bare process get a stretch of the real validation
text back from the bits that the run's last score says it takes. The checks test; this proves, for that stretch.

Exit code: 0 when all holds, 1 when something is violated, 2 when the input cannot be used.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic  # taken before the audited code could put another in its place
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__" and any(word.split("=")[0] == "--submission" for word in sys.argv[1:]):
    import audit_submission  # before anything of this project's record, which it does without

    sys.exit(audit_submission.main())

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import audit_decode
import audit_page
import audit_run
import audit_watch
import run_log

import train_gpt

CAUSAL = "1 causal: a prediction follows from the artifact and earlier tokens alone"
NORMALISED = "2 normalised: a prediction is a distribution over the vocabulary"
SCORE_FIRST = "3 score before update"
SINGLE_PASS = "4 single pass: each target once, over the bytes of the text"
SIZE = f"size: artifact and code within {train_gpt.SIZE_LIMIT_BYTES:,} bytes"
TIME = f"time: {train_gpt.STAGE_BUDGET_S:.0f} s of training, {train_gpt.STAGE_BUDGET_S:.0f} s of evaluation"
SELF_CONTAINED = "self-contained: the artifact and the code files are enough"
NO_VALIDATION = "no validation data in training"
DECODES = "code length: a stretch of text comes back from its bits"

VALIDATION_TARGETS = 62_021_632  # of the contest's split at sequence length 2048
MIX_BLOCK = 32  # targets between two updates of a mixer; a run has 2,048
MIXERS = ("backoff", "backoff-published", "hedge")
CLAIM_TOLERANCE = 1e-4  # nats from a score to the entry of the distribution that the scorer states; honest: 1e-6

Scores = tuple[np.ndarray, ...]  # per target, (N,): log-probability, then entropy, then whatever else is reported
Score = Callable[[np.ndarray], Scores]  # tokens (N + 1,) → scores of the N targets tokens[1:]
Verdict = tuple[bool, str]  # whether the condition holds, and the figure that shows it


class Finding(NamedTuple):
    """The outcome of one check."""

    check: str
    condition: str
    subject: str
    ok: bool
    figure: str
    seconds: float


class Report:
    """Findings in the order of the checks."""

    def __init__(self, progress: bool = False, seed: int = 0):
        """`progress`: say on stderr what is being checked. `seed`: of everything that is drawn."""
        self.findings: list[Finding] = []
        self.sentences: list[str] = []  # on what was decoded
        self.progress, self.seed = progress, seed

    def add(self, check: str, condition: str, subject: str, test: Callable[[], Verdict]) -> None:
        """Run one check. A scorer that breaks down on legal input violates the condition under test."""
        began = monotonic()
        self._say(f"{check}: {subject} … ")
        try:
            ok, figure = test()
        except train_gpt.UserError:
            raise
        except Exception as error:  # noqa: BLE001 (of the code under test, which may raise anything)
            ok, figure = False, f"raised {type(error).__name__}: {error}"
        seconds = monotonic() - began
        self._say(f"{'ok' if ok else 'FAIL'} {seconds:.1f} s\n")
        self.findings.append(Finding(check, condition, subject, ok, figure, seconds))

    def _say(self, text: str) -> None:
        """One line a check, its end when the check ends, on a terminal and in a pipe alike."""
        if self.progress:
            sys.stderr.write(text)
            sys.stderr.flush()

    def rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *purpose])

    @property
    def violations(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.ok]

    def lines(self) -> list[str]:
        """The table for people."""
        rows = [("", "check", "of", "figure", "s")]
        rows += [("ok" if f.ok else "FAIL", f.check, f.subject, f.figure, f"{f.seconds:.1f}") for f in self.findings]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines, condition = [], ""
        for finding, row in zip([None, *self.findings], rows):
            if finding is not None and finding.condition != condition:
                condition = finding.condition
                lines.append(f"-- {condition}")
            padded = "  ".join(text.ljust(width) for text, width in zip(row, widths))
            lines.append(f"{padded}  {row[4]:>5}  {row[3]}")
        return lines

    def conclusion(self) -> str:
        """One line: what is violated, by the names of the conditions."""
        if not self.violations:
            return f"valid: all {len(self.findings)} checks hold"
        broken = dict.fromkeys(finding.condition for finding in self.violations)
        return f"INVALID: {len(self.violations)} of {len(self.findings)} checks fail: " + "; ".join(broken)


# ----------------------------------------------------------------------------------------------------------
# The scoring path of train_gpt.py as functions of the tokens.
# ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stage:
    """A scorer under audit. `claims` gives the distributions (S, V) it states for S ascending targets, if it does."""

    name: str
    score: Score
    vocab_size: int
    claims: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


class Stream:
    """Tokens in the place of a validation split; every target counts for one byte."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens
        self.num_targets = len(tokens) - 1
        self.bytes = np.ones(self.num_targets, dtype=np.int16)


class Neural:
    """The neural stage: sliding window, or score-first TTT. It remembers the scores of the streams it has seen."""

    def __init__(self, model: train_gpt.GPT, config: train_gpt.Config, ttt: bool):
        self.model, self.config, self.ttt = model, config, ttt
        self.runtime = train_gpt.Runtime(config, {})
        self.memory: dict[bytes, Scores] = {}
        self.stated: tuple[bytes, train_gpt.TokenScores] | None = None

    def run(self, tokens: np.ndarray) -> train_gpt.TokenScores:
        stream: Any = Stream(tokens)
        if self.ttt:
            return train_gpt.score_then_adapt(self.model, self.config, self.runtime, stream)
        return train_gpt.score_stream(self.model, self.config, self.runtime, stream, self.config.eval_stride)

    def score(self, tokens: np.ndarray) -> Scores:
        """logp and entropy (N,), computed anew."""
        scores = self.run(tokens)
        # The first scores of a stream are the real ones: `check_training_order` leaves training out later.
        self.memory.setdefault(tokens.tobytes(), (scores.logp, scores.entropy))
        return scores.logp, scores.entropy

    def recall(self, tokens: np.ndarray) -> Scores:
        """The same from memory where it is there: the mixers all work on one neural stream."""
        return self.memory.get(tokens.tobytes()) or self.score(tokens)

    def claims(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The whole predictions (S, V) that a run would keep for its own check, had it drawn these targets."""
        return np.exp(self.run_stating(tokens, targets).sampled.astype(np.float64))

    def run_stating(self, tokens: np.ndarray, targets: np.ndarray) -> train_gpt.TokenScores:
        """The scores with the whole predictions at these ascending targets in the place of those that a run draws.

        The last such run is remembered, for all the mixers that work on it.
        """
        key = tokens.tobytes() + targets.tobytes()
        if self.stated is None or self.stated[0] != key:
            with mock.patch.object(train_gpt, "sample_targets", return_value=targets):
                self.stated = key, self.run(tokens)
        return self.stated[1]


class Mixed:
    """A mixer on a neural stage; unless `whole`, its blocks are cut for short streams."""

    def __init__(self, neural: Neural, config: train_gpt.Config, whole: bool = False):
        self.neural, self.config, self.whole = neural, config, whole

    def mix(self, tokens: np.ndarray, logp: np.ndarray, entropy: np.ndarray, probe: Any = None) -> np.ndarray:
        mixer = train_gpt.make_mixer(self.config)
        assert mixer is not None
        ids = torch.from_numpy(tokens.astype(np.int64))
        if self.whole:
            return train_gpt.mix_scores(mixer, ids, logp, entropy, probe)
        if isinstance(mixer, train_gpt.HedgeMixer):  # it leaves its first 10,000 targets to the neural model
            mixer.min_tokens = MIX_BLOCK
        return train_gpt.mix_scores(mixer, ids, logp, entropy, probe, MIX_BLOCK)

    def score(self, tokens: np.ndarray) -> Scores:
        """Mixed logp, neural entropy and neural logp, (N,)."""
        logp, entropy = self.neural.recall(tokens)
        return self.mix(tokens, logp, entropy), entropy, logp

    def claims(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        scores = self.neural.run_stating(tokens, targets)
        probe = train_gpt.MassProbe(targets + 1, scores.sampled, scores.entropy[targets])
        self.mix(tokens, scores.logp, scores.entropy, probe)
        return probe.distributions


def make_stages(model: train_gpt.GPT, config: train_gpt.Config) -> list[Stage]:
    """The stages of `config`'s evaluation, and every mixer on the sliding window."""
    vocab_size = config.vocab_size
    sliding = Neural(model, config, ttt=False)
    stages = [Stage("sliding", sliding.score, vocab_size, sliding.claims)]
    last = sliding
    if config.ttt_enabled:
        last = Neural(model, config, ttt=True)
        stages.append(Stage("ttt", last.score, vocab_size, last.claims))
        if config.mixer != "none":
            mixed = Mixed(last, config)
            stages.append(Stage(f"ttt+{config.mixer}", mixed.score, vocab_size, mixed.claims))
    return stages + mixer_stages(sliding, config)


def mixer_stages(sliding: Neural, config: train_gpt.Config, whole: bool = False) -> list[Stage]:
    """Every mixer on the sliding window."""
    mixers = make_mixers(sliding, config, whole)
    return [Stage(f"sliding+{n}", mixed.score, config.vocab_size, mixed.claims) for n, mixed in mixers.items()]


def make_mixers(neural: Neural, config: train_gpt.Config, whole: bool = False) -> dict[str, Mixed]:
    """Every mixer: the one in use with its options, the others with their defaults."""
    mixers = {}
    for name in MIXERS:
        own = dataclasses.replace(config, mixer=name)
        if name != config.mixer:
            own = dataclasses.replace(own, ngram_counts="exact", entropy_expert=False)
        mixers[name] = Mixed(neural, own, whole)
    return mixers


def shorten(config: train_gpt.Config, num_targets: int) -> train_gpt.Config:
    """`config` with every length cut for streams of `num_targets`. The lengths do not divide one another."""
    per_target = config.ngram_buckets / VALIDATION_TARGETS
    buckets = 2 ** max(0, round(math.log2(per_target * num_targets)))
    return dataclasses.replace(
        config, eval_seq_len=24, eval_stride=7, eval_batch_seqs=4, ttt_chunk_tokens=5 if config.ttt_rank else 50,
        ttt_batch_seqs=2, ngram_block=MIX_BLOCK, ngram_buckets=buckets, compile=False, eval_only=False,
    ).validate()  # fmt: skip


def make_stream(material: np.ndarray, length: int, seed: int = 0) -> np.ndarray:
    """`length` tokens int64 of which about half repeat earlier spans, so that counts of every order matter."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    fresh = 0
    while len(tokens) < length:
        size = int(rng.integers(4, 16))
        if len(tokens) > 40 and rng.random() < 0.5:
            start = int(rng.integers(0, len(tokens) - size))
            tokens += tokens[start : start + size]
        else:
            tokens += material[fresh : fresh + size].tolist()
            fresh += size
    return np.array(tokens[:length], dtype=np.int64)


def zipf_material(vocab_size: int, length: int, seed: int = 0) -> np.ndarray:
    """Tokens of falling frequency by rank, int64; no text is needed for it."""
    share = 1 / (np.arange(vocab_size) + 3)
    return np.random.default_rng(seed).choice(vocab_size, length, p=share / share.sum())


# ----------------------------------------------------------------------------------------------------------
# Conditions 1 to 4.
# ----------------------------------------------------------------------------------------------------------
def first_difference(left: Scores, right: Scores, stop: int) -> int | None:
    """The first target before `stop` of which any reported value differs in any bit."""
    differs = np.zeros(stop, dtype=bool)
    for a, b in zip(left, right, strict=True):
        a, b = np.ascontiguousarray(a[:stop]), np.ascontiguousarray(b[:stop])
        width = a.dtype.itemsize
        differs |= (a.view(np.uint8).reshape(-1, width) != b.view(np.uint8).reshape(-1, width)).any(1)
    return int(np.argmax(differs)) if differs.any() else None


def other_futures(tokens: np.ndarray, cut: int, vocab_size: int) -> Iterator[np.ndarray]:
    """The stream with every token after target `cut` replaced: by others, by that target, by the one before it."""
    later = slice(cut + 2, None)
    shifts = np.random.default_rng(cut).integers(1, vocab_size, len(tokens[later]))
    for future in ((tokens[later] + shifts) % vocab_size, tokens[cut + 1], tokens[cut]):
        changed = tokens.copy()
        changed[later] = future
        yield changed


def check_future(stage: Stage, tokens: np.ndarray, cuts: Sequence[int]) -> Verdict:
    """Change every token after target i: all that is reported for targets ≤ i stays the same, bit for bit."""
    reported = stage.score(tokens)
    for cut in cuts:
        for changed in other_futures(tokens, cut, stage.vocab_size):
            differs = first_difference(reported, stage.score(changed), cut + 1)
            if differs is not None:
                return False, f"target {differs} changes when only tokens after target {cut} do"
    differs = first_difference(reported, stage.score(tokens), len(tokens) - 1)
    if differs is not None:
        return False, f"target {differs} changes when the same tokens are scored again"
    return True, f"{len(cuts)} cuts, three futures each, no bit changes"


def check_prefixes(mixed: Mixed, tokens: np.ndarray, lengths: Sequence[int]) -> Verdict:
    """On the same neural scores a mixer gives the first targets what it gives them where nothing follows.

    Odds or weights of the end may be the same whatever follows, as soon as one side leads by far: this finds them.
    """
    logp, entropy = mixed.neural.recall(tokens)
    whole = mixed.mix(tokens, logp, entropy)
    for length in lengths:
        alone = mixed.mix(tokens[: length + 1], logp[:length], entropy[:length])
        differs = first_difference((whole[:length],), (alone,), length)
        if differs is not None:
            return False, f"target {differs} changes when nothing follows the first {length}"
    return True, f"the first {', '.join(f'{length:,}' for length in lengths)} targets by themselves, no bit changes"


class Counterfactual(NamedTuple):
    """What a scorer reports when each candidate token in turn takes the place of one target."""

    probabilities: np.ndarray  # (candidates,) float64, of each candidate where it stands
    entropy_moves: float | None  # between candidates, nats; None: no entropy reported
    earlier: int | None  # an earlier target whose scores depended on the candidate


def ask_counterfactuals(stage: Stage, tokens: np.ndarray, target: int, candidates: np.ndarray) -> Counterfactual:
    logps, entropies, first, earlier = [], [], None, None
    for candidate in candidates:
        changed = tokens.copy()
        changed[target + 1] = candidate
        scores = stage.score(changed)
        first = first or scores
        differs = first_difference(first, scores, target)
        earlier = differs if earlier is None else earlier
        logps.append(float(scores[0][target]))
        entropies += [float(column[target]) for column in scores[1:2]]
    moves = max(entropies) - min(entropies) if entropies else None
    return Counterfactual(np.exp(np.array(logps)), moves, earlier)


def judge_mass(stage: Stage, asked: dict[int, Counterfactual]) -> Verdict:
    """Over the whole vocabulary the counterfactual probabilities sum to 1, at every position asked."""
    masses = {target: float(answer.probabilities.sum()) for target, answer in asked.items()}
    worst = list(masses)[int(np.argmax(np.abs(np.array(list(masses.values())) - 1)))]  # NaN before all others
    figure = f"mass {masses[worst]:.7f} (worst of {len(masses)}; {stage.vocab_size} tokens each)"
    ok = abs(masses[worst] - 1) <= train_gpt.MASS_TOLERANCE
    return ok, figure


def judge_own_target(answers: Sequence[Counterfactual]) -> Verdict:
    """The prediction of a target is made before the target is known, so its entropy cannot depend on it."""
    moves = [answer.entropy_moves for answer in answers if answer.entropy_moves is not None]
    if not moves:
        return True, "no entropy reported: the mass decides"
    if max(moves) > 0:
        return False, f"the prediction's entropy moves by {max(moves):.1e} nats with its own target"
    asked = sum(len(answer.probabilities) for answer in answers)
    return True, f"the prediction's entropy is the same for each of {asked} tokens"


def judge_earlier(answers: Sequence[Counterfactual]) -> Verdict:
    """Whatever token comes next, nothing changes in what was reported before it."""
    earlier = [answer.earlier for answer in answers if answer.earlier is not None]
    if earlier:
        return False, f"target {earlier[0]} changes with a later one"
    return True, f"{sum(len(answer.probabilities) for answer in answers)} next tokens tried, no earlier bit changes"


def check_predictions(report: Report, stage: Stage, tokens: np.ndarray, targets: Sequence[int]) -> None:
    """Conditions 1 to 3 at some targets of a scorer that states no distribution: by every token of the vocabulary."""
    asked: dict[int, Counterfactual] = {}

    def normalised() -> Verdict:
        for target in targets:
            asked[target] = ask_counterfactuals(stage, tokens, target, np.arange(stage.vocab_size))
        return judge_mass(stage, asked)

    report.add("counterfactual mass", NORMALISED, stage.name, normalised)
    report.add("next token unknown", CAUSAL, stage.name, lambda: judge_earlier([*asked.values()]))
    report.add("own target unknown", SCORE_FIRST, stage.name, lambda: judge_own_target([*asked.values()]))


class Interview(NamedTuple):
    """A stream, the targets whose whole distributions are asked for, and changed streams that put them to the test."""

    tokens: np.ndarray  # (N + 1,)
    targets: np.ndarray  # (S,), ascending, those of the changes among them
    changes: list[tuple[int, np.ndarray]]  # the target that has another token, and the stream (N + 1,)

    @classmethod
    def draw(
        cls, tokens: np.ndarray, vocab_size: int, count: int, rng: np.random.Generator, stated: int = 10**9
    ) -> Interview:
        """`count` targets drawn, each with another token, and what follows it left, replaced or made to repeat."""
        num_targets = len(tokens) - 1
        every = rng.permutation(num_targets)
        changes = []
        for number, target in enumerate(every[:count].tolist()):
            changed, later = tokens.copy(), slice(target + 2, None)
            token = rng.integers(vocab_size) if number % 2 else tokens[rng.integers(len(tokens))]
            changed[target + 1] = token if token != tokens[target + 1] else (token + 1) % vocab_size
            shifts = rng.integers(1, vocab_size, len(tokens[later]))
            futures = (tokens[later] + shifts) % vocab_size, changed[target + 1], changed[target], tokens[later]
            changed[later] = futures[number % 4]
            changes.append((target, changed))
        return cls(tokens, np.sort(every[: max(stated, count)]), changes)


def worse(one: float, other: Any) -> float:
    """The larger, or NaN where one of them is."""
    return float(np.maximum(one, other))


@dataclass
class Answers:
    """What a scorer answered in interviews: the worst of each kind."""

    stated: int = 0  # distributions
    asked: int = 0  # changed streams
    mass: float = 0.0  # how far the sum of a stated distribution is from 1
    scored: float = 0.0  # nats from a stated entry to what the stream scored at the token that came
    changed: float = 0.0  # nats from a stated entry to what the token that it is of scored in that token's place
    entropy: float | None = None  # how far a prediction's entropy moves with its own target and later ones, nats
    earlier: str = ""  # an earlier target whose score moves with a later token

    def hear(self, stage: Stage, interview: Interview) -> None:
        """Add a scorer's answers in one more interview."""
        assert stage.claims is not None
        tokens, targets = interview.tokens, interview.targets
        reported, stated = stage.score(tokens), stage.claims(tokens, targets)
        rows = {target: row for row, target in enumerate(targets.tolist())}
        self.stated += len(targets)
        self.mass = worse(self.mass, np.abs(stated.sum(1) - 1).max())
        with np.errstate(divide="ignore"):
            stated = np.log(stated)
        came = stated[np.arange(len(targets)), tokens[targets + 1]]
        self.scored = worse(self.scored, np.abs(came - reported[0][targets]).max())
        for target, changed in interview.changes:
            scores = stage.score(changed)
            self.asked += 1
            gap = stated[rows[target], changed[target + 1]] - scores[0][target]
            self.changed = worse(self.changed, np.abs(gap))
            for column, before in zip(scores[1:2], reported[1:2]):
                self.entropy = worse(self.entropy or 0.0, np.abs(column[target] - before[target]))
            differs = first_difference(reported, scores, target)
            if differs is not None and not self.earlier:
                self.earlier = f"target {differs} changes with target {target} and what follows"

    def judge_mass(self) -> Verdict:
        ok = self.mass <= train_gpt.MASS_TOLERANCE and worse(self.scored, self.changed) <= CLAIM_TOLERANCE
        return ok, (
            f"{self.stated} distributions: mass off by {self.mass:.1e}; scored {self.scored:.1e} nats off them, "
            f"and {self.changed:.1e} with another token in {self.asked} places"
        )

    def judge_earlier(self) -> Verdict:
        return not self.earlier, self.earlier or f"{self.asked} other tokens and futures, no earlier bit changes"

    def judge_own_target(self) -> Verdict:
        if self.entropy is None:
            return True, "no entropy reported: the mass decides"
        asked = f"in {self.asked} places"
        if self.entropy != 0:
            return False, f"a prediction's entropy moves by {self.entropy:.1e} nats with its own target, {asked}"
        return True, f"no prediction's entropy moves with its own target, {asked}"


def check_interviews(report: Report, stage: Stage, interviews: Callable[[], Iterable[Interview]]) -> None:
    """Conditions 1 to 3 of a scorer that states its distributions, at targets that are drawn anew each time.

    Stated distributions sum to 1; the token that came is scored by its entry, and so is another token in its place,
    whatever follows. A fault at 2.5 % of targets is missed by 119 drawn ones once in twenty times.
    """
    answers = Answers()

    def ask() -> Verdict:
        for interview in interviews():
            answers.hear(stage, interview)
        return answers.judge_mass()

    report.add("counterfactual mass", NORMALISED, stage.name, ask)
    report.add("next token unknown", CAUSAL, stage.name, answers.judge_earlier)
    report.add("own target unknown", SCORE_FIRST, stage.name, answers.judge_own_target)


@contextlib.contextmanager
def watched_training(keep: Callable[[range], bool]) -> Iterator[tuple[list[range], list[range]]]:
    """Record the targets of every round of test-time training, and of those that trained on some not scored before.

    Rounds that `keep` refuses are left out.
    """
    original, step, seen, early = train_gpt.ChunkTrainer.train_on, train_gpt.DocumentTrainer.learn, [], []
    sequences, take, scored, window = train_gpt.WindowScorer.sequences, train_gpt.WindowScorer.keep, 0, 0

    def saw(targets: range) -> bool:
        seen.append(targets)
        if targets.stop > scored:
            early.append(targets)
        return keep(targets)

    def train_on(self: train_gpt.ChunkTrainer, scorer: Any, targets: range, lr: float) -> None:
        if saw(targets):
            original(self, scorer, targets, lr)

    def learn(self: train_gpt.DocumentTrainer, logp: torch.Tensor) -> None:
        first = window + logp.storage_offset()  # logp is a part of the window's
        if saw(range(first, first + len(logp))):
            step(self, logp)

    def look(self: train_gpt.WindowScorer, starts: np.ndarray, length: int) -> Any:
        nonlocal window
        window = int(starts[0])
        return sequences(self, starts, length)

    def note(self: train_gpt.WindowScorer, first: int, logp: torch.Tensor, *rest: Any) -> None:
        nonlocal scored
        scored = first + len(logp)
        take(self, first, logp, *rest)

    with (
        mock.patch.object(train_gpt.ChunkTrainer, "train_on", train_on),
        mock.patch.object(train_gpt.DocumentTrainer, "learn", learn),
        mock.patch.object(train_gpt.WindowScorer, "sequences", look),
        mock.patch.object(train_gpt.WindowScorer, "keep", note),
    ):
        yield seen, early


def chunk_of(config: train_gpt.Config) -> int:
    """What `check_training_order` asks: targets of a chunk, 0 where documents are trained on by themselves."""
    return 0 if config.ttt_rank else config.ttt_chunk_tokens


def check_training_order(stage: Stage, tokens: np.ndarray, chunk: int) -> Verdict:
    """Training is on scored targets, touches later scores alone, and is never on the last chunk.

    `chunk` is 0 where documents are trained on by themselves: their last chunks are not trained on either.
    """
    with watched_training(lambda _: True) as (rounds, early):
        reported = stage.score(tokens)
    if early:
        return False, f"trains on targets {early[0].start}…{early[0].stop - 1} before they are scored"
    num_targets = len(tokens) - 1
    last_start = (num_targets - 1) // chunk * chunk if chunk else num_targets - 1
    late = [targets for targets in rounds if targets.stop > last_start]
    if late:
        return False, f"trains on targets {late[0].start}…{late[0].stop - 1}, the last chunk begins at {last_start}"
    acts, stops = 0, sorted({targets.stop for targets in rounds})
    tried = stops[:: -(-len(stops) // MOST_ROUNDS) or 1]
    for stop in tried:
        with watched_training(lambda targets, stop=stop: targets.stop < stop):
            without = stage.score(tokens)
        differs = first_difference(reported, without, stop)
        if differs is not None:
            return False, f"target {differs} was scored after training on targets up to {stop - 1}"
        acts += first_difference(reported, without, num_targets) is not None
    return True, f"{len(tried)} rounds of training left out, {acts} change later scores and none an earlier one"


def check_lengths(stage: Stage, tokens: np.ndarray, lengths: Sequence[int]) -> Verdict:
    """Streams of awkward lengths: one finite log-probability for every target."""
    for count in lengths:
        scores = stage.score(tokens[: count + 1])
        for column in scores:
            if column.shape != (count,):
                return False, f"{column.shape[0]} scores for {count} targets"
            if not np.isfinite(column).all():
                return False, f"{(~np.isfinite(column)).sum()} of {count} scores are not finite"
        if (scores[0] > 1e-6).any():
            return False, "a probability above 1"
    return True, f"lengths {', '.join(map(str, lengths))}: one score a target"


def check_single_pass(score: Score, tokens: np.ndarray, lengths: Sequence[int]) -> Verdict:
    """The model is asked for every target exactly once, from left to right."""
    original, asked = train_gpt.GPT.token_scores, []

    def token_scores(self: train_gpt.GPT, ids: torch.Tensor, targets: torch.Tensor, tail: int, *rest: Any) -> Any:
        asked.append(targets[:, -tail:].flatten())
        return original(self, ids, targets, tail, *rest)

    for count in lengths:
        asked.clear()
        with mock.patch.object(train_gpt.GPT, "token_scores", token_scores):
            score(tokens[: count + 1])
        order = torch.cat(asked).cpu().numpy()
        if len(order) != count:
            return False, f"{len(order)} targets scored where there are {count}"
        if not np.array_equal(order, tokens[1 : count + 1]):
            return False, f"{count} targets, not scored in their order"
    return True, f"{len(lengths)} lengths, every target once and in order"


def check_kept_once(score: Score, tokens: np.ndarray, lengths: Sequence[int]) -> Verdict:
    """Where windows reach beyond a document's end: of what the model answers, each target's score is kept once."""
    original, kept = train_gpt.WindowScorer.keep, []

    def keep(self: train_gpt.WindowScorer, first: int, logp: torch.Tensor, *rest: Any) -> None:
        kept.extend(range(first, first + len(logp)))
        original(self, first, logp, *rest)

    for count in lengths:
        kept.clear()
        with mock.patch.object(train_gpt.WindowScorer, "keep", keep):
            score(tokens[: count + 1])
        if sorted(kept) != [*range(count)]:
            return False, f"{len(kept)} scores kept, of {len({*kept})} targets out of {count}"
    return True, f"{len(lengths)} lengths, one score kept of every target"


def check_summary(logp: np.ndarray, stream: Any) -> Verdict:
    """val_loss and val_bpb are the sums they are named for; `stream` has tokens, bytes and num_targets."""
    result = train_gpt.score_of(logp, stream)
    total, total_bytes = -math.fsum(logp.tolist()), int(stream.bytes.astype(np.int64).sum())
    expected = total / len(logp), total / math.log(2) / total_bytes
    gap = max(abs(a / b - 1) for a, b in zip((result.val_loss, result.val_bpb), expected))
    ok = gap < 1e-9 and (result.tokens, result.bytes) == (stream.num_targets, total_bytes)
    return ok, f"{result.tokens} targets, {result.bytes} bytes; relative error {gap:.1e}"


# ----------------------------------------------------------------------------------------------------------
# Bytes, size, time.
# ----------------------------------------------------------------------------------------------------------
def split_documents(tokens: np.ndarray) -> list[list[int]]:
    """The tokens between one BOS and the next."""
    edges = [0, *np.flatnonzero(tokens == train_gpt.BOS_ID).tolist(), len(tokens)]
    documents = [tokens[start:stop].tolist() for start, stop in itertools.pairwise(edges)]
    return [[token for token in document if token != train_gpt.BOS_ID] for document in documents]


def decode_document(model: Any, document: Sequence[int]) -> str:
    """Text of a document's tokens by SentencePiece's own decoder, which knows nothing of the rule that a run counts by.

    Unknown tokens, whose text is lost, cut it in parts; a space mark that byte tokens spell out is a space.
    """
    parts = itertools.groupby(document, key=lambda token: token == model.unk_id())
    return "".join(model.decode(list(part)) for unknown, part in parts if not unknown).replace("▁", " ")


def check_bytes(validation: Any, decode: Callable[[list[int]], str]) -> Verdict:
    """The bytes that scores are divided by are those of the decoded text."""
    documents = split_documents(validation.tokens)
    text_bytes = sum(len(decode(document).encode()) for document in documents)
    counted = int(validation.bytes.sum(dtype=np.int64))
    figure = f"{counted} bytes counted, {text_bytes} in the decoded text of {len(documents) - 1} documents"
    return counted == text_bytes, figure


def check_ledger(artifact: Path, code: Sequence[Path]) -> Verdict:
    """The artifact's file and all code files together."""
    code_bytes = sum(path.stat().st_size for path in code)
    total = artifact.stat().st_size + code_bytes
    spare = train_gpt.SIZE_LIMIT_BYTES - total
    figure = f"{total:,} bytes ({code_bytes:,} of code in {len(code)} files), {abs(spare):,} "
    return spare >= 0, figure + ("to spare" if spare >= 0 else "too many")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's JSONL file. Raises UserError."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise train_gpt.UserError(f"--log {path} is no JSONL log of a run: {error}") from error
    if not rows or not all(isinstance(row, dict) and "event" in row for row in rows):
        raise train_gpt.UserError(f"--log {path} is no JSONL log of a run: rows without an event")
    return rows


def check_training_time(rows: Sequence[dict[str, Any]]) -> Verdict:
    """Training, and calibration on training data, the last one; the step that meets the limit may end."""
    steps = [row for row in rows if row["event"] in ("step", "step_validation") and "train_time_ms" in row]
    if not steps:
        return True, "the log is of an evaluation alone"
    seconds, step_s = steps[-1]["train_time_ms"] / 1000, steps[-1].get("step_avg_ms", 0.0) / 1000
    calibration = ([0.0] + [row.get("time_s", 0.0) for row in rows if row["event"] == "calibration"])[-1]
    figure = f"{seconds + calibration:.1f} s, of which {calibration:.1f} s calibration; a step takes {step_s:.2f} s"
    return seconds + calibration <= train_gpt.STAGE_BUDGET_S + step_s, figure


def check_evaluation_time(rows: Sequence[dict[str, Any]]) -> Verdict:
    """The evaluation's total, which must not be less than the sum of its stages; of a resumed run the last rows."""
    totals = [row["total_s"] for row in rows if row["event"] == "evaluation"]
    if not totals:
        return False, "the log has no evaluation total: the run did not end"
    names = ("final_", "legal_ttt")
    scored = [row for row in rows if row["event"].startswith(names) and "eval_time_ms" in row]
    stages = {row["event"]: row["eval_time_ms"] for row in scored}
    seconds = max(totals[-1], sum(stages.values()) / 1000)
    return seconds <= train_gpt.STAGE_BUDGET_S, f"{seconds:.1f} s in {len(stages)} stages"


def check_log_validity(rows: Sequence[dict[str, Any]]) -> Verdict:
    """No result in the log is marked invalid, or has a mass that is not 1."""
    masses = [row for row in rows if "mass" in row]
    worst = np.max([0.0, *(row["worst"] if "worst" in row else abs(row["mass"] - 1) for row in masses)])  # NaN stays
    invalid = [row["event"] for row in rows if row.get("valid") is False]
    figure = f"logged mass off by {worst:.1e}" + (f"; marked invalid: {invalid[0]}" if invalid else "")
    return bool(worst <= train_gpt.MASS_TOLERANCE) and not invalid, figure


def check_logged_split(rows: Sequence[dict[str, Any]], targets: int, text_bytes: int) -> Verdict:
    """The whole split was scored, and divided by the bytes of its text; the last line is that division."""
    found = [row for row in rows if row["event"] == "validation"]
    last = [row for row in rows if row["event"] == "final_int8_zlib_roundtrip_exact"]
    if not found or not last:
        return False, "the log tells no validation split, or no final score"
    figure = f"{found[-1]['targets']:,} targets and {found[-1]['bytes']:,} bytes in the log"
    if (found[-1]["targets"], found[-1]["bytes"]) != (targets, text_bytes):
        partial = found[-1].get("note") == "partial"
        advice = "; VAL_TOKENS cut the split, so this is no score of the whole" if partial else ""
        return False, f"{figure}, {targets:,} and {text_bytes:,} in the shards{advice}"
    bpb = last[-1]["val_loss"] * targets / math.log(2) / text_bytes
    return abs(bpb / last[-1]["val_bpb"] - 1) < 1e-6, f"{figure} and in the shards; {last[-1]['val_bpb']:.4f} bpb"


def check_logged_size(rows: Sequence[dict[str, Any]]) -> Verdict:
    totals = [row["bytes"] for row in rows if row["event"] == "total_bytes"]
    if not totals:
        return True, "the log is of an evaluation alone"
    return max(totals) <= train_gpt.SIZE_LIMIT_BYTES, f"{max(totals):,} bytes in the log"


# ----------------------------------------------------------------------------------------------------------
# A bare process, and training without validation data.
# ----------------------------------------------------------------------------------------------------------
CHILD = """
import sys
folder, elsewhere = sys.argv[1:]
sys.path[:0] = [folder, elsewhere]
import audit_watch
seen = []
audit_watch.install(audit_watch.Watch([folder, elsewhere], classes=True), seen.append)
import dataclasses, json, os, types
import numpy as np, torch, train_gpt
asked = json.loads(sys.stdin.read())
torch.set_num_threads(asked["threads"])
model, config, _ = train_gpt.load_artifact(os.path.join(elsewhere, "artifact"))
config = dataclasses.replace(config, **asked["settings"])
model.compute_dtype = train_gpt.COMPUTE_DTYPES[config.compute_dtype]
runtime = train_gpt.Runtime(config, {})
tokens = np.array(asked["tokens"], dtype=np.int64)
sizes = np.ones(len(tokens) - 1, dtype=np.int16)
stream = types.SimpleNamespace(tokens=tokens, num_targets=len(sizes), bytes=sizes)
model.to(runtime.device)
scores = [train_gpt.score_stream(model, config, runtime, stream, config.eval_stride)]
if config.ttt_enabled:
    scores.append(train_gpt.score_then_adapt(model, config, runtime, stream))
print(json.dumps({"logp": [s.logp.tolist() for s in scores], "seen": seen}))
"""


def check_bare_process(artifact: Path, config: train_gpt.Config, tokens: np.ndarray) -> Verdict:
    """A new process with the code files alone loads the artifact and gives the same scores, bit for bit.

    It runs in an empty folder with an empty environment and, where the system lets it, no network. From before its
    first import on it may open nothing but libraries and what is copied for it, start or connect to nothing, and
    unpickle no class.
    """
    config = dataclasses.replace(audit_decode.as_run(config), device=train_gpt.Runtime(config, {}).device.type)
    stored, model = train_gpt.load_artifact(artifact)[1], audit_decode.load_model(artifact, config)
    expected = [Neural(model, config, ttt=False).run(tokens).logp]
    if config.ttt_enabled:
        expected.append(Neural(model, config, ttt=True).run(tokens).logp)
    before, after = dataclasses.asdict(stored), dataclasses.asdict(config)
    settings = {name: value for name, value in after.items() if value != before[name]}
    asked = {"settings": settings, "tokens": tokens.tolist(), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as elsewhere:
        for path in train_gpt.code_paths():
            shutil.copy(path, folder)
        shutil.copy(artifact, Path(elsewhere) / "artifact")
        shutil.copy(audit_watch.__file__, elsewhere)
        command = [*audit_watch.no_network(), sys.executable, "-I", "-c", CHILD, folder, elsewhere]
        process = subprocess.run(
            command, cwd=elsewhere, env={"PATH": os.defpath, "TMPDIR": elsewhere},
            input=json.dumps(asked), capture_output=True, encoding="utf-8", check=False, timeout=600,
        )  # fmt: skip
    if process.returncode:
        return False, f"fails: {process.stderr.strip().splitlines()[-1]}"
    answer = json.loads(process.stdout)
    if answer["seen"]:
        return False, f"reaches outside: {answer['seen'][0]}"
    same = all(np.array_equal(np.float32(a), b) for a, b in zip(answer["logp"], expected, strict=True))
    return same, f"{len(tokens) - 1} targets, {len(expected)} scorers: {'same bits' if same else 'other scores'}"


class Recorder:
    """What this process opens, and what it reaches outside, while it is on. Its hook can never be taken away again."""

    current: Recorder | None = None
    installed = False

    def __init__(self, allowed: Sequence[Path]):
        self.watch, self.opened, self.problems = audit_watch.Watch(map(str, allowed)), list[str](), list[str]()

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if (recorder := cls.current) is not None:
            if event == "open":
                recorder.opened.append(str(arguments[0]))
            if problem := recorder.watch.problem(event, arguments):
                recorder.problems.append(problem)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        if not Recorder.installed:
            sys.addaudithook(Recorder.hook)
            Recorder.installed = True
        Recorder.current = self
        try:
            yield
        finally:
            Recorder.current = None


class Training(NamedTuple):
    """What a short training left."""

    artifact: bytes
    opened: list[str]
    problems: list[str]  # what it reached besides train shards, its own folder, code and libraries
    lines: list[tuple[float, str]]  # of its log, with the seconds at which each came


@dataclass
class Rehearsal:
    """Two short trainings that differ in their validation shards alone; files are in `folder`."""

    folder: Path
    config: train_gpt.Config
    tokenizer: train_gpt.Tokenizer

    @classmethod
    def prepare(cls, folder: Path, recipe: train_gpt.Config) -> Rehearsal:
        """Synthetic train shards and settings: the recipe's evaluation, a model small enough for seconds."""
        words = [a + b for a, b in itertools.product("aeinorstluh", "énts")]
        sentencepiece = train_gpt.require("sentencepiece", "making a small tokenizer")
        with (folder / "tokenizer.model").open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(words), model_writer=file, model_type="bpe", vocab_size=32, pad_id=0, bos_id=1,
                eos_id=2, unk_id=3, character_coverage=1.0, num_threads=1, minloglevel=2,
            )  # fmt: skip
        tokenizer = train_gpt.Tokenizer(str(folder / "tokenizer.model"), 32)
        config = dataclasses.replace(
            recipe, vocab_size=32, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2.0,
            bigram_vocab_size=64, bigram_dim=8, xsa_last_n=1, rope_dims=8, rope_train_len=32, ve_dim=8, ve_layers=(1,),
            parallel_residual_from=2 * recipe.parallel_residual_from // recipe.num_layers,
            repeat_layers=(0, 1) if recipe.repeat_layers else (), mtp_num_heads=1, train_seq_len=32,
            train_batch_tokens=512, micro_batch_tokens=512, iterations=130,
            warmup_steps=0, warmdown_iters=40, max_wallclock_seconds=0.0, muon_momentum_warmup_steps=10, ema_decay=0.8,
            matrix_lr=0.05, tied_embed_lr=0.1, val_loss_every=0, train_log_every=10, kg_enabled=False, swarm_every=10,
            ttt_freeze_blocks=min(recipe.ttt_freeze_blocks, 1), weight_average="ema", data_path=str(folder),
            tokenizer_path=str(folder / "tokenizer.model"), out_dir=str(folder), artifact="", run_id="rehearsal",
            val_tokens=0,
            quantizer="gptq", calibration_tokens=2048,  # whatever the recipe has: calibration reads data too
            resume="",  # or the second training would take over what the first one left
        )  # fmt: skip
        rehearsal = cls(folder, shorten(config, STREAM_TARGETS), tokenizer)
        rehearsal.write("train", rehearsal.documents(seed=1, count=20_000))
        return rehearsal

    def documents(self, seed: int, count: int) -> np.ndarray:
        """`count` tokens in documents of 60."""
        tokens = make_stream(zipf_material(self.config.vocab_size, count, seed), count, seed)
        tokens = np.where(tokens < 4, tokens + 4, tokens)
        tokens[::61] = train_gpt.BOS_ID
        return tokens

    def write(self, split: str, tokens: np.ndarray) -> None:
        header = np.zeros(256, dtype="<i4")
        header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
        path = self.folder / f"audit_{split}_000000.bin"
        path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())

    def validation(self) -> train_gpt.ValidationSet:
        return train_gpt.ValidationSet(self.config, self.tokenizer)

    def train(self, validation_seed: int | None) -> Training:
        """Train with such a validation split; None: with one of a single token, again and again."""
        tokens = self.documents(validation_seed or 0, count=500)
        if validation_seed is None:
            tokens[tokens != train_gpt.BOS_ID] = 4
        self.write("val", tokens)
        runtime = train_gpt.Runtime(self.config, {})
        recorder = Recorder([self.folder, *train_gpt.code_paths(), Path(__file__).parent])
        arrivals = audit_run.Arrivals()
        with contextlib.redirect_stdout(arrivals):  # pyright: ignore[reportArgumentType]
            log = train_gpt.RunLog(self.config, runtime)
            validation = self.validation()
            with recorder.recording():
                checkpoints = train_gpt.Checkpoints(self.config, runtime, log)
                objects = self.config, runtime, log, self.tokenizer, validation, checkpoints
                train_gpt.train_artifact(train_gpt.make_trainer(*objects))
            log.close()
        return Training(self.config.artifact_path.read_bytes(), recorder.opened, recorder.problems, arrivals.lines)


def check_shards_untouched(trainings: Sequence[Training]) -> Verdict:
    """Training opened train shards, so the record works, and no validation shard, nor anything that is not its own."""
    opened = [name for training in trainings for name in training.opened]
    train = [name for name in opened if "_train_" in Path(name).name]
    val = [name for name in opened if "_val_" in Path(name).name]
    if val:
        return False, f"training opened {Path(val[0]).name}"
    for training in trainings:
        if training.problems:
            return False, f"training reaches outside: {training.problems[0]}"
    return bool(train), f"{len(opened)} files opened, {len(train)} times a train shard and never a validation shard"


def unpack(artifact: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Metadata, and the bytes of each tensor; safetensors writes the former in an order of its own."""
    tensors, metadata = train_gpt.unpack_artifact(artifact)
    return metadata, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def check_same_artifact(first: bytes, second: bytes) -> Verdict:
    """Byte for byte, or at least tensor for tensor and with the same metadata."""
    if first == second:
        return True, f"{len(first)} bytes, the same with other validation shards"
    if unpack(first) == unpack(second):
        return True, "the same tensors and metadata with other validation shards, metadata in another order"
    return False, "training gives another artifact with other validation shards"


# ----------------------------------------------------------------------------------------------------------
# The audit.
# ----------------------------------------------------------------------------------------------------------
STREAM_TARGETS = 181  # four chunks of 50, the last one short; an audit adds up to 20, drawn
DECODED = 0.58, 24  # from target 289 on: across the border of two chunks at 300
LONG_TARGETS = 100_000  # of streams for the mixers; Hedge learns from 10,000 on
MOST_ROUNDS = 24  # of test-time training that are left out, each in a pass of its own
SMALL_TARGETS = 2400  # least targets of the split for the real command
SHORTEST, LONGEST_SHORT = 6, 60  # targets of short streams
QUICK_POSITIONS = 24  # drawn targets of an artifact's stages that train, where that is to be quick


class Effort(NamedTuple):
    """How much of everything: `targets` for scorers that state no distribution, `drawn` for all that do."""

    cuts: int  # after which everything is changed
    targets: int  # asked by every token of the vocabulary, of a stage that trains
    strides: tuple[int, ...]
    drawn: int = 120  # targets asked with another token in their place
    shorts: int = 4  # short streams
    long: int = 6  # drawn targets of long streams
    ttt_targets: int = 7000  # of a long stream for test-time training
    ranks: tuple[int, ...] = ()  # of further runs of the real command


QUICK = Effort(8, 2, (7,))
FULL = Effort(32, 6, (1, 7, 24), drawn=160, shorts=16, long=24, ttt_targets=60_000, ranks=(2,))


def pick_cuts(
    num_targets: int, config: train_gpt.Config, count: int, rng: np.random.Generator | None = None
) -> list[int]:
    """Targets after which to change everything: borders of windows, chunks and mixer blocks, and random ones."""
    seq_len, stride, chunk = config.eval_seq_len, config.eval_stride, config.ttt_chunk_tokens
    borders = [seq_len, chunk, seq_len + stride, 2 * chunk, MIX_BLOCK, 3 * chunk]
    drawn = (rng or np.random.default_rng(2)).integers(1, num_targets - 2, count).tolist()
    return list(dict.fromkeys([edge - 1 for edge in borders] + [0, num_targets - 2, *drawn]))[:count]


def pick_targets(num_targets: int, config: train_gpt.Config, count: int) -> list[int]:
    """Targets to ask about by every token of the vocabulary.

    Late ones come first, for all that has been learned by then, but soon early ones too: only there is the contest
    between a mixer and the neural model still open, so that the odds between them matter.
    """
    chunk = config.ttt_chunk_tokens
    wanted = [num_targets - 5, 2 * chunk + 1, 40, 20, num_targets - 20, chunk, 30, 10, 0]
    return list(dict.fromkeys(min(target, num_targets - 1) for target in wanted))[:count]


def short_interviews(
    tokens: np.ndarray, vocab_size: int, count: int, rng: np.random.Generator, asked: int = 10
) -> Iterator[Interview]:
    """Short pieces of a stream: rules may change with the length."""
    for length in rng.integers(SHORTEST, LONGEST_SHORT, count, endpoint=True).tolist():
        start = int(rng.integers(len(tokens) - length))
        yield Interview.draw(tokens[start : start + length + 1].copy(), vocab_size, min(asked, length), rng)


def audit_stages(
    report: Report, stages: Sequence[Stage], config: train_gpt.Config, tokens: np.ndarray, effort: Effort
) -> None:
    """Conditions 1 to 4 on every stage, by streams that are changed in one place or from one place on."""
    num_targets, chunk = len(tokens) - 1, config.ttt_chunk_tokens
    cuts = pick_cuts(num_targets, config, effort.cuts, report.rng(1))
    targets = pick_targets(num_targets, config, 9)
    lengths = [1, 2, config.eval_seq_len - 1, config.eval_seq_len, config.eval_seq_len + 1, chunk, chunk + 1, 133]
    for stage in stages:
        report.add("future invariance", CAUSAL, stage.name, lambda stage=stage: check_future(stage, tokens, cuts))
    for stage in stages:
        if stage.claims is None:
            slow = "ttt" in stage.name  # training on every chunk takes a dozen times as long as scoring
            check_predictions(report, stage, tokens, targets[: effort.targets] if slow else targets)
            continue

        def interviews(stage: Stage = stage) -> Iterator[Interview]:
            yield Interview.draw(tokens, stage.vocab_size, effort.drawn, report.rng(2))
            yield from short_interviews(tokens, stage.vocab_size, effort.shorts, report.rng(3))

        check_interviews(report, stage, interviews)
    for stage in stages:
        if stage.name.endswith("ttt"):
            test = functools.partial(check_training_order, stage, tokens, chunk_of(config))
            report.add("training after scoring", SCORE_FIRST, stage.name, test)
    for stage in stages:
        report.add("awkward lengths", SINGLE_PASS, stage.name, functools.partial(check_lengths, stage, tokens, lengths))


def audit_coverage(
    report: Report, model: train_gpt.GPT, config: train_gpt.Config, tokens: np.ndarray, effort: Effort
) -> None:
    """Condition 4 on the neural stages: what the model is asked for, at several strides."""
    lengths = [1, 23, 24, 25, 49, 50, 51, 100, 133, len(tokens) - 1]
    for stride, ttt in itertools.product(effort.strides, (False, True) if config.ttt_enabled else (False,)):
        neural = Neural(model, dataclasses.replace(config, eval_stride=stride), ttt)
        name = f"{'ttt' if ttt else 'sliding'}, stride {stride}"
        check = check_kept_once if ttt and config.ttt_rank else check_single_pass
        test = functools.partial(check, neural.run, tokens, lengths)
        report.add("every target once", SINGLE_PASS, name, test)


def audit_long_streams(report: Report, model: train_gpt.GPT, recipe: train_gpt.Config, effort: Effort) -> None:
    """Conditions 1 to 3 where a scorer has seen much: mixers with blocks as long as a run's, and TTT by long chunks.

    Windows are short here and do not overlap.
    """
    rng = report.rng(4)
    config = dataclasses.replace(
        shorten(recipe, LONG_TARGETS), eval_stride=24, eval_batch_seqs=64, ngram_block=recipe.ngram_block,
        ttt_chunk_tokens=24 if recipe.ttt_rank else int(rng.integers(400, 600)), ttt_batch_seqs=32,
    )  # fmt: skip

    def check(stages: list[Stage], num_targets: int) -> np.ndarray:
        tokens = make_stream(zipf_material(config.vocab_size, num_targets, 4), num_targets + 1)
        interview = Interview.draw(tokens, config.vocab_size, effort.long, rng, stated=128)
        for stage in stages:
            named = dataclasses.replace(stage, name=f"{stage.name}, {num_targets:,} targets")
            check_interviews(report, named, lambda: [interview])
        return tokens

    many, short = LONG_TARGETS + int(rng.integers(1000)), rng.integers(SHORTEST, LONGEST_SHORT, 3, endpoint=True)
    sliding = Neural(model, config, ttt=False)
    tokens = check(mixer_stages(sliding, config, whole=True), many)
    for name, mixed in make_mixers(sliding, config, whole=True).items():
        test = functools.partial(check_prefixes, mixed, tokens, [*sorted(short.tolist()), int(rng.integers(many))])
        report.add("prefix alone", CAUSAL, f"sliding+{name}, {many:,} targets", test)
    if config.ttt_enabled:
        ttt = Neural(model, config, ttt=True)
        check([Stage("ttt", ttt.score, config.vocab_size, ttt.claims)], effort.ttt_targets + int(rng.integers(500)))


def run_shape(config: train_gpt.Config, recipe: train_gpt.Config) -> tuple[train_gpt.Config, int]:
    """`config` with the windows, batches and compilation of a real run, and a length that fills such a batch.

    Only the chunks of TTT are cut, so that there are three of them.
    """
    length = max(SMALL_TARGETS, recipe.eval_seq_len + recipe.eval_stride * (recipe.eval_batch_seqs + 2))
    chunk = min(recipe.ttt_chunk_tokens, max(recipe.eval_seq_len, length // 3))
    shape = dict(
        eval_seq_len=recipe.eval_seq_len, eval_stride=recipe.eval_stride, eval_batch_seqs=recipe.eval_batch_seqs,
        ttt_batch_seqs=recipe.ttt_batch_seqs, compile=recipe.compile, ngram_block=recipe.ngram_block,
    )  # fmt: skip
    return dataclasses.replace(config, **shape, ttt_chunk_tokens=chunk), length


def last_stage(model: train_gpt.GPT, config: train_gpt.Config) -> Stage:
    """The stage that a run's last score is of, with blocks of a mixer as long as a run's."""
    neural = Neural(model, config, config.ttt_enabled)
    scorer = neural if config.mixer == "none" else Mixed(neural, config, whole=True)
    return Stage(audit_decode.stage_name(config), scorer.score, config.vocab_size, scorer.claims)


@dataclass(frozen=True)
class Submission:
    """An artifact, settings with which to score it, and a split that is small enough to be scored again and again."""

    artifact: Path
    config: train_gpt.Config
    tokenizer: train_gpt.Tokenizer
    tokenizer_path: Path
    tokens: np.ndarray  # (N + 1,)

    def text(self, tokens: np.ndarray) -> str:
        return text_of(functools.partial(decode_document, self.tokenizer.model), tokens)


def audit_run_shape(report: Report, given: Submission, model: train_gpt.GPT, effort: Effort) -> None:
    """A run's own windows, in this process; then the real command on the same split."""
    stage, tokens = last_stage(model, given.config), given.tokens.astype(np.int64)
    named = dataclasses.replace(stage, name=f"{stage.name}, a run's windows")
    interview = Interview.draw(tokens, stage.vocab_size, 3, report.rng(5))
    check_interviews(report, named, lambda: [interview])
    assert stage.claims is not None
    stated = stage.claims(tokens, interview.targets)
    truth = audit_run.Truth.of(tokens, stated, given.text(tokens))
    with tempfile.TemporaryDirectory() as folder:
        small = audit_run.Small(Path(folder), given.artifact, given.tokenizer_path, given.config, truth)
        audit_command(report, small, given, effort)


def audit_command(report: Report, small: audit_run.Small, given: Submission, effort: Effort) -> None:
    """The real command: its result, its clock, what it reaches, and the files that it needs."""
    audit_run.write_split(audit_run.data_folder(small), given.tokens, given.tokenizer.digest)
    out = small.folder / "out"
    out.mkdir()
    on_cpu = train_gpt.Runtime(small.config, {}).device.type == "cpu"
    tolerance = audit_run.SAME_ORDER if on_cpu else audit_run.OTHER_ORDER
    said: list[audit_run.Said] = []

    def clean() -> Verdict:
        said.append(audit_run.start(audit_run.environment(small, out), out))
        return audit_run.check_result(said[0], small, tolerance)

    report.add("real command", SINGLE_PASS, "clean folder", clean)
    clock = functools.partial(audit_run.check_clock, said[0].lines, audit_run.EVALUATION, total=False)
    report.add("evaluation seconds from outside", TIME, "clean folder", clock)
    notes: list[audit_run.Notes] = []

    def dirty() -> Verdict:
        again, noted = audit_run.watched(small, out)
        notes.append(noted)
        return audit_run.check_result(again, small, tolerance)

    report.add("real command", SINGLE_PASS, "folder of an earlier run, torchrun's variables", dirty)
    for found, check, condition in zip(notes[0], ("code files", "files and network"), (SIZE, SELF_CONTAINED)):
        figure = f"reaches outside: {found[0]}" if found else "nothing but code files, libraries, its own files"
        report.add(check, condition, "real command", lambda found=found, figure=figure: (not found, figure))
    for ranks in effort.ranks:
        folder = small.folder / f"ranks{ranks}"
        folder.mkdir()

        def several(ranks: int = ranks, folder: Path = folder) -> Verdict:
            together = audit_run.start(audit_run.environment(small, folder), folder, ranks=ranks)
            return audit_run.check_result(together, small, audit_run.OTHER_ORDER)

        report.add("real command", SINGLE_PASS, f"{ranks} ranks", several)


def audit_training(report: Report, rehearsal: Rehearsal) -> bool:
    """Two short trainings with different validation splits; whether there is an artifact now."""
    trainings: list[Training] = []

    def train() -> Verdict:
        trainings.extend(rehearsal.train(seed) for seed in (None, 7))
        return check_shards_untouched(trainings)

    report.add("files opened", NO_VALIDATION, "short training", train)
    if len(trainings) < 2:
        return False
    first, second = trainings
    same = functools.partial(check_same_artifact, first.artifact, second.artifact)
    report.add("other shards", NO_VALIDATION, "short training", same)
    clock = functools.partial(audit_run.check_clock, second.lines, audit_run.TRAINING, total=True)
    report.add("training seconds from outside", TIME, "short training", clock)
    return True


def audit_own_model(report: Report, recipe: train_gpt.Config, effort: Effort, command_too: bool = True) -> None:
    """All checks on a model trained here, whose scoring is quick enough for many questions.

    Without `command_too` it is left out of what has been done on a given artifact and its own text: the real command
    with a run's windows, and decoding.
    """
    with tempfile.TemporaryDirectory() as folder:
        rehearsal = Rehearsal.prepare(Path(folder), recipe)
        if not audit_training(report, rehearsal):
            return
        config = rehearsal.config
        model = audit_decode.load_model(config.artifact_path, config)
        length = STREAM_TARGETS + int(report.rng(0).integers(20))
        tokens = make_stream(zipf_material(config.vocab_size, 400, 3), length + 1, report.seed)
        audit_stages(report, make_stages(model, config), config, tokens, effort)
        audit_coverage(report, model, config, tokens, effort)
        own_blocks = dataclasses.replace(config, ngram_block=recipe.ngram_block, ngram_buckets=recipe.ngram_buckets)
        audit_long_streams(report, model, own_blocks, effort)
        validation = rehearsal.validation()
        decode = functools.partial(decode_document, rehearsal.tokenizer.model)
        audit_accounting(report, validation, decode, model, config)
        audit_file(report, config.artifact_path, config, tokens)
        if not command_too:
            return
        audit_decoding(report, config.artifact_path, config, own_source(rehearsal, validation), DECODED)
        shaped, length = run_shape(config, recipe)
        split = rehearsal.documents(seed=9, count=length + 1)
        tokenizer = rehearsal.tokenizer
        given = Submission(config.artifact_path, shaped, tokenizer, rehearsal.folder / "tokenizer.model", split)
        audit_run_shape(report, given, model, effort)


def own_source(rehearsal: Rehearsal, validation: train_gpt.ValidationSet) -> audit_decode.Source:
    text = functools.partial(text_of, functools.partial(decode_document, rehearsal.tokenizer.model))
    return audit_decode.Source(validation.tokens, rehearsal.tokenizer, text)


def text_of(decode: Callable[[list[int]], str], tokens: np.ndarray) -> str:
    return "".join(decode(document) for document in split_documents(tokens))


def audit_decoding(
    report: Report, artifact: Path, config: train_gpt.Config, source: audit_decode.Source, where: tuple[float, int]
) -> None:
    """Decode `where`: from a fraction of the stream on, so many targets."""

    def decode() -> Verdict:
        known = source.stretch(config, *where)
        ok, figure, sentence = audit_decode.check_decoding(artifact, source, known)
        report.sentences.append(sentence)
        return ok, figure

    report.add("decoding", DECODES, audit_decode.stage_name(config), decode)


def decode_alone(report: Report, recipe: train_gpt.Config, arguments: argparse.Namespace) -> None:
    """`--decode`: the given artifact on its validation split, or a small model trained here."""
    where = arguments.decode_at, arguments.decode_tokens
    if arguments.artifact:
        tokenizer, validation = read_split(arguments, recipe)
        text = functools.partial(text_of, functools.partial(decode_document, tokenizer.model))
        source = audit_decode.Source(validation.tokens, tokenizer, text)
        audit_decoding(report, arguments.artifact, recipe, source, where)
        return
    with tempfile.TemporaryDirectory() as folder:
        rehearsal = Rehearsal.prepare(Path(folder), recipe)
        rehearsal.train(7)
        source = own_source(rehearsal, rehearsal.validation())
        audit_decoding(report, rehearsal.config.artifact_path, rehearsal.config, source, where)


def audit_accounting(
    report: Report, validation: Any, decode: Callable[[list[int]], str], model: train_gpt.GPT, config: train_gpt.Config
) -> None:
    """Condition 4: bytes of the text, and the sums that a result is made of."""
    report.add("bytes of the text", SINGLE_PASS, "validation", lambda: check_bytes(validation, decode))
    if validation.num_targets > 10_000:  # the sums are the same at any length, and scoring takes its time
        return

    def summary() -> Verdict:
        runtime = train_gpt.Runtime(config, {})
        scores = train_gpt.score_stream(model, config, runtime, validation, config.eval_stride)
        return check_summary(scores.logp, validation)

    report.add("sums", SINGLE_PASS, "sliding", summary)


def audit_file(report: Report, artifact: Path, config: train_gpt.Config, tokens: np.ndarray) -> None:
    """The artifact as a file: its size, and whether it is complete."""
    report.add("ledger", SIZE, artifact.name, lambda: check_ledger(artifact, train_gpt.code_paths()))
    report.add("bare process", SELF_CONTAINED, artifact.name, lambda: check_bare_process(artifact, config, tokens))


def audit_artifact(report: Report, recipe: train_gpt.Config, arguments: argparse.Namespace) -> None:
    """The same on a given artifact; quickly, at fewer targets of the stages that train."""
    artifact, effort = arguments.artifact, QUICK if arguments.quick else FULL
    config = shorten(recipe, STREAM_TARGETS)
    model = audit_decode.load_model(artifact, config)
    material, given = zipf_material(config.vocab_size, 400, 3), None
    if arguments.data:
        tokenizer, validation = read_split(arguments, recipe)
        if validation.num_targets < 400:
            raise train_gpt.UserError(f"--data {arguments.data} has {validation.num_targets} validation targets of 400")
        material = validation.tokens[:400].astype(np.int64)
        audit_accounting(report, validation, functools.partial(decode_document, tokenizer.model), model, config)
        shaped, length = run_shape(recipe, recipe)
        part = audit_decode.first_tokens(validation.tokens, length + 1, tokenizer)
        given = Submission(artifact, shaped, tokenizer, arguments.tokenizer, part)
    tokens = make_stream(material, STREAM_TARGETS + 1, report.seed)
    audit_file(report, artifact, config, tokens)
    cuts = pick_cuts(STREAM_TARGETS, config, effort.cuts, report.rng(6))
    for stage in (dataclasses.replace(s, name=f"artifact, {s.name}") for s in make_stages(model, config)):
        report.add("future invariance", CAUSAL, stage.name, lambda s=stage: check_future(s, tokens, cuts))
        slow = arguments.quick and config.ttt_enabled
        count = arguments.positions or (QUICK_POSITIONS if slow and "ttt" in stage.name else effort.drawn)

        def interviews(stage: Stage = stage, count: int = count) -> Iterator[Interview]:
            yield Interview.draw(tokens, stage.vocab_size, count, report.rng(7))
            yield from short_interviews(tokens, stage.vocab_size, effort.shorts, report.rng(8), asked=4)

        check_interviews(report, stage, interviews)
        if stage.name.endswith("ttt"):
            test = functools.partial(check_training_order, stage, tokens, chunk_of(config))
            report.add("training after scoring", SCORE_FIRST, stage.name, test)
    if given:
        audit_run_shape(report, given, model, effort)
        # A part, since each side scores what precedes the stretch.
        few = audit_decode.first_tokens(given.tokens, SMALL_TARGETS // 2, given.tokenizer)
        source = audit_decode.Source(few, given.tokenizer, given.text)
        audit_decoding(report, artifact, given.config, source, (float(report.rng(9).random()), DECODED[1]))


def read_split(
    arguments: argparse.Namespace, config: train_gpt.Config
) -> tuple[train_gpt.Tokenizer, train_gpt.ValidationSet]:
    """The tokenizer and the whole validation split that the arguments name. Raises UserError."""
    tokenizer = train_gpt.Tokenizer(str(arguments.tokenizer), config.vocab_size)
    whole = dataclasses.replace(config, data_path=str(arguments.data), val_tokens=0)
    return tokenizer, train_gpt.ValidationSet(whole, tokenizer)


def audit_log(report: Report, recipe: train_gpt.Config, arguments: argparse.Namespace) -> None:
    """What a run logged about its time, size and mass, and where the shards are given, about what it scored."""
    path: Path = arguments.log
    rows = read_log(path)
    if arguments.data:
        tokenizer, split = read_split(arguments, recipe)
        text = text_of(functools.partial(decode_document, tokenizer.model), split.tokens)
        test = functools.partial(check_logged_split, rows, split.num_targets, len(text.encode()))
        report.add("logged split", SINGLE_PASS, path.name, test)
    report.add("training seconds", TIME, path.name, lambda: check_training_time(rows))
    report.add("evaluation seconds", TIME, path.name, lambda: check_evaluation_time(rows))
    report.add("logged bytes", SIZE, path.name, lambda: check_logged_size(rows))
    report.add("logged mass", NORMALISED, path.name, lambda: check_log_validity(rows))


def overridden(config: train_gpt.Config, environ: Any) -> train_gpt.Config:
    """`config` with the fields that the environment names, but for RECIPE, which stands for many."""
    wanted = train_gpt.Config.from_env(environ)
    names = [field.name for field in dataclasses.fields(config) if field.name.upper() in environ]
    names = [name for name in names if name != "recipe"]
    return dataclasses.replace(config, **{name: getattr(wanted, name) for name in names}).validate()


def audit(arguments: argparse.Namespace) -> Report:
    """Every check that the arguments ask for. Raises UserError for input that cannot be used."""
    report = Report(progress=True, seed=arguments.seed)
    recipe = train_gpt.Config.from_env(os.environ)
    if arguments.artifact:
        recipe = overridden(train_gpt.load_artifact(arguments.artifact)[1], os.environ)
    recipe = audit_decode.as_run(recipe)
    if arguments.decode:
        decode_alone(report, recipe, arguments)
        return report
    if arguments.log:
        audit_log(report, recipe, arguments)
    if arguments.artifact:
        audit_artifact(report, recipe, arguments)
    audit_own_model(report, recipe, QUICK if arguments.quick else FULL, command_too=not arguments.data)
    report.findings.sort(key=lambda finding: (finding.condition, finding.check))
    return report


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n")[0], epilog="Settings of the evaluation come from the environment."
    )
    parser.add_argument("--artifact", type=Path, help="the file to audit; without it, a small model trained here")
    parser.add_argument("--data", type=Path, help="folder of validation shards; with --artifact and --tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="the shards' SentencePiece model")
    parser.add_argument("--log", type=Path, help="a run's logs/RUN.jsonl: check its seconds, bytes and mass")
    parser.add_argument("--quick", action="store_true", help="a minute: fewer targets, short streams for TTT, one rank")
    parser.add_argument("--positions", type=int, default=0, help="targets of the artifact to ask about (120 and more)")
    parser.add_argument("--seed", type=int, default=None, help="of what is drawn: an earlier audit's, to repeat it")
    parser.add_argument("--decode", action="store_true", help="only decode a stretch; an artifact's needs --data")
    parser.add_argument("--decode-at", type=float, default=0.7, help="where it begins: a fraction of the split (0.7)")
    parser.add_argument("--decode-tokens", type=int, default=200, help="how many targets it has (200)")
    parser.add_argument("--submission", metavar="ADAPTER.py", help="audit another submission; has options of its own")
    parser.add_argument("--json", type=Path, help="write the findings there")
    parser.add_argument("--html", type=Path, help="write a page for people there")
    arguments = parser.parse_args(words)
    if arguments.submission:
        parser.error("--submission is a command of its own: write it in full, see tools/audit_submission.py --help")
    if bool(arguments.data) != bool(arguments.tokenizer) or (arguments.data and not arguments.artifact):
        parser.error("--data and --tokenizer go together, with --artifact")
    if arguments.decode and arguments.artifact and not arguments.data:
        parser.error("--decode --artifact needs --data and --tokenizer: the text to decode")
    if arguments.positions < 0 or (arguments.seed or 0) < 0:
        parser.error("--positions and --seed are not negative")
    if arguments.seed is None:
        arguments.seed = secrets.randbits(32)
    if not 0 <= arguments.decode_at <= 1 or arguments.decode_tokens < 1:
        parser.error("--decode-at is a fraction from 0 to 1, and --decode-tokens at least 1")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Audit, print the table, write the JSON. Returns the exit code."""
    arguments = parse_arguments(words)
    torch.set_num_threads(1)  # matrices this small are fastest on one thread
    began = monotonic()
    try:
        report = audit(arguments)
        # First: what was found must not be lost for a file that cannot be written.
        print("\n".join(map(run_log.shown, report.lines())))  # names and errors may be foreign
        if arguments.decode:
            print("\n".join(map(run_log.shown, report.sentences)))
        print(f"{report.conclusion()} ({monotonic() - began:.0f} s; drawn by --seed {report.seed})")
        if arguments.json or arguments.html:
            result = {
                "valid": not report.violations,
                "artifact": str(arguments.artifact or ""),
                "seed": report.seed,
                "seconds": monotonic() - began,
                "code": train_gpt.code_digest(),
                "violated": list(dict.fromkeys(finding.condition for finding in report.violations)),
                "findings": [finding._asdict() for finding in report.findings],
                "decoded": report.sentences,
            }
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            if arguments.html:
                arguments.html.write_text(audit_page.page(result), encoding="utf-8")
    except (train_gpt.UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
