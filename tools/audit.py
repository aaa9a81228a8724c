"""Check that a score is what it claims to be: black-box tests of train_gpt.py's own scoring, and the contest's limits.

    python tools/audit.py --quick                                    a small model, trained on the spot
    python tools/audit.py --artifact final_model.int6.ptz            that artifact too, under its own settings
    python tools/audit.py --artifact FILE --data DIR --tokenizer FILE --log logs/RUN.jsonl --json audit.json
    python tools/audit.py --artifact FILE --data DIR --tokenizer FILE --decode --decode-at 0.7 --decode-tokens 200

The scorers get short streams in the place of the validation text, and all lengths are cut to match: context, stride,
TTT chunk, the blocks between two updates of a mixer, and with them NGRAM_BUCKETS, so that a bucket is as full as it
would be on the whole split. Every other setting is the artifact's, overridden by variables of the environment as in
a run (`MIXER=hedge ENTROPY_EXPERT=1 python tools/audit.py`). Without --artifact the recipe's settings apply (RECIPE).

--decode does nothing else and cuts nothing: audit_decode.py has a bare process get a stretch of the real validation
text back from the bits that the run's last score says it takes. The checks test; this proves, for that stretch.

Exit code: 0 when all holds, 1 when something is violated, 2 when the input cannot be used.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import audit_decode

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
CLAIM_TOLERANCE = 1e-5  # how far a probability may be from the one in the distribution that the scorer states
TRACE_EVENTS = ("open", "socket.connect", "pickle.find_class")

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

    def __init__(self, progress: bool = False):
        self.findings: list[Finding] = []
        self.sentences: list[str] = []  # on what was decoded
        self.progress = progress

    def add(self, check: str, condition: str, subject: str, test: Callable[[], Verdict]) -> None:
        """Run one check. A scorer that breaks down on legal input violates the condition under test."""
        began = time.perf_counter()
        if self.progress:
            sys.stderr.write(f"\r{check}: {subject}".ljust(78)[:78])
            sys.stderr.flush()
        try:
            ok, figure = test()
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            ok, figure = False, f"raised {type(error).__name__}: {error}"
        finally:
            if self.progress:
                sys.stderr.write("\r" + " " * 78 + "\r")
        self.findings.append(Finding(check, condition, subject, ok, figure, time.perf_counter() - began))

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
    """A scorer under audit. `claim` gives the distribution (V,) that the scorer states for one target, if it does."""

    name: str
    score: Score
    vocab_size: int
    claim: Callable[[np.ndarray, int], np.ndarray] | None = None


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

    def claim(self, tokens: np.ndarray, target: int) -> np.ndarray:
        """The prediction (V,) kept for the run's own check of its mass; `target` must be one of those sampled."""
        row = np.searchsorted(train_gpt.sample_targets(len(tokens) - 1), target)
        return np.exp(self.run(tokens).sampled[row].astype(np.float64))


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

    def claim(self, tokens: np.ndarray, target: int) -> np.ndarray:
        scores = self.neural.run(tokens)
        row = np.searchsorted(train_gpt.sample_targets(len(tokens) - 1), [target])
        probe = train_gpt.MassProbe(np.array([target + 1]), scores.sampled[row], scores.entropy[[target]])
        self.mix(tokens, scores.logp, scores.entropy, probe)
        return probe.distributions[0]


def make_stages(model: train_gpt.GPT, config: train_gpt.Config) -> list[Stage]:
    """The stages of `config`'s evaluation, and every mixer on the sliding window."""
    vocab_size = config.vocab_size
    sliding = Neural(model, config, ttt=False)
    stages = [Stage("sliding", sliding.score, vocab_size, sliding.claim)]
    last = sliding
    if config.ttt_enabled:
        last = Neural(model, config, ttt=True)
        stages.append(Stage("ttt", last.score, vocab_size, last.claim))
        if config.mixer != "none":
            mixed = Mixed(last, config)
            stages.append(Stage(f"ttt+{config.mixer}", mixed.score, vocab_size, mixed.claim))
    return stages + mixer_stages(sliding, config)


def mixer_stages(sliding: Neural, config: train_gpt.Config, whole: bool = False) -> list[Stage]:
    """Every mixer on the sliding window: the one in use with its options, the others with their defaults."""
    stages = []
    for name in MIXERS:
        own = dataclasses.replace(config, mixer=name)
        if name != config.mixer:
            own = dataclasses.replace(own, ngram_counts="exact", entropy_expert=False)
        mixed = Mixed(sliding, own, whole)
        label = f"sliding+{name}" + (", own blocks" if whole else "")
        stages.append(Stage(label, mixed.score, own.vocab_size, mixed.claim))
    return stages


def shorten(config: train_gpt.Config, num_targets: int) -> train_gpt.Config:
    """`config` with every length cut for streams of `num_targets`. The lengths do not divide one another."""
    per_target = config.ngram_buckets / VALIDATION_TARGETS
    buckets = 2 ** max(0, round(math.log2(per_target * num_targets)))
    return dataclasses.replace(
        config, eval_seq_len=24, eval_stride=7, eval_batch_seqs=4, ttt_chunk_tokens=50, ttt_batch_seqs=2,
        ngram_block=MIX_BLOCK, ngram_buckets=buckets, compile=False, eval_only=False,
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


def judge_mass(stage: Stage, tokens: np.ndarray, asked: dict[int, Counterfactual]) -> Verdict:
    """Over the whole vocabulary the counterfactual probabilities sum to 1, at every position asked.

    They must also be those of the distribution that the run itself would check, or its label means nothing.
    """
    masses = {target: float(answer.probabilities.sum()) for target, answer in asked.items()}
    worst = max(masses, key=lambda target: abs(masses[target] - 1))
    figure = f"mass {masses[worst]:.7f} (worst of {len(masses)}; {stage.vocab_size} tokens each)"
    ok = abs(masses[worst] - 1) <= train_gpt.MASS_TOLERANCE
    if stage.claim is None:
        return ok, figure
    stated = {target: stage.claim(tokens, target) for target in asked}
    gap = max(float(np.abs(stated[target] - answer.probabilities).max()) for target, answer in asked.items())
    return ok and gap <= CLAIM_TOLERANCE, f"{figure}; the run's own check is off by {gap:.1e}"


def judge_claim(stage: Stage, tokens: np.ndarray, asked: dict[int, tuple[np.ndarray, Counterfactual]]) -> Verdict:
    """The stated distribution sums to 1, and the tokens sampled from it get just that probability."""
    assert stage.claim is not None
    gaps, errors = [], []
    for target, (candidates, answer) in asked.items():
        stated = stage.claim(tokens, target)
        errors.append(abs(float(stated.sum()) - 1))
        gaps.append(float(np.abs(stated[candidates] - answer.probabilities).max()))
    sampled = sum(len(candidates) for candidates, _ in asked.values())
    figure = f"stated mass off by {max(errors):.1e}; {sampled} tokens asked are off by {max(gaps):.1e}"
    return max(errors) <= train_gpt.MASS_TOLERANCE and max(gaps) <= CLAIM_TOLERANCE, figure


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


def pick_candidates(stage: Stage, tokens: np.ndarray, target: int, count: int) -> np.ndarray:
    """Token ids to ask about: half the likeliest, the true one, and some of the rest."""
    assert stage.claim is not None
    ranked = np.argsort(-stage.claim(tokens, target))
    rest = np.random.default_rng(target).permutation(ranked[count // 2 :])[: count - count // 2 - 1]
    return np.unique([*ranked[: count // 2], *rest, tokens[target + 1]])


def check_predictions(
    report: Report, stage: Stage, tokens: np.ndarray, targets: Sequence[int], sampled: int = 0
) -> None:
    """Conditions 1 to 3 at some targets: by every token of the vocabulary, or by `sampled` of them."""
    asked: dict[int, tuple[np.ndarray, Counterfactual]] = {}

    def normalised() -> Verdict:
        for target in targets:
            whole = np.arange(stage.vocab_size)
            candidates = pick_candidates(stage, tokens, target, sampled) if sampled else whole
            asked[target] = candidates, ask_counterfactuals(stage, tokens, target, candidates)
        if sampled:
            return judge_claim(stage, tokens, asked)
        return judge_mass(stage, tokens, {target: answer for target, (_, answer) in asked.items()})

    report.add("counterfactual mass", NORMALISED, stage.name, normalised)
    answers = [answer for _, answer in asked.values()]
    report.add("next token unknown", CAUSAL, stage.name, lambda: judge_earlier(answers))
    report.add("own target unknown", SCORE_FIRST, stage.name, lambda: judge_own_target(answers))


@contextlib.contextmanager
def watched_training(keep: Callable[[range], bool]) -> Iterator[list[range]]:
    """Record the targets of every round of test-time training; rounds that `keep` refuses are left out."""
    original, seen = train_gpt.TestTimeTrainer.train_on, []

    def train_on(self: train_gpt.TestTimeTrainer, scorer: Any, targets: range, lr: float) -> None:
        seen.append(targets)
        if keep(targets):
            original(self, scorer, targets, lr)

    with mock.patch.object(train_gpt.TestTimeTrainer, "train_on", train_on):
        yield seen


def check_training_order(stage: Stage, tokens: np.ndarray, chunk: int) -> Verdict:
    """Training on targets a … b-1 may only touch scores from b on, and the last chunk is never trained on."""
    with watched_training(lambda _: True) as rounds:
        reported = stage.score(tokens)
    num_targets = len(tokens) - 1
    last_start = (num_targets - 1) // chunk * chunk
    late = [targets for targets in rounds if targets.stop > last_start]
    if late:
        return False, f"trains on targets {late[0].start}…{late[0].stop - 1}, the last chunk begins at {last_start}"
    acts = 0
    for start in sorted({targets.start for targets in rounds}):
        stop = min(targets.stop for targets in rounds if targets.start == start)
        with watched_training(lambda targets, start=start: targets.start < start):
            without = stage.score(tokens)
        differs = first_difference(reported, without, stop)
        if differs is not None:
            return False, f"target {differs} was scored after training on targets {start}…{stop - 1}"
        acts += first_difference(reported, without, num_targets) is not None
    return True, f"{len(rounds)} rounds of training, {acts} of them change later scores and none an earlier one"


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


def check_summary(logp: np.ndarray, stream: Any) -> Verdict:
    """val_loss and val_bpb are the sums they are named for; `stream` has tokens, bytes and num_targets."""
    result = train_gpt.summarize(train_gpt.TokenScores(logp, np.zeros_like(logp)), stream)
    total, total_bytes = -math.fsum(logp.tolist()), int(stream.bytes.astype(np.int64).sum())
    expected = total / len(logp), total / math.log(2) / total_bytes
    gap = max(abs(a / b - 1) for a, b in zip((result.val_loss, result.val_bpb), expected))
    ok = gap < 1e-9 and (result.tokens, result.bytes) == (stream.num_targets, total_bytes)
    return ok, f"{result.tokens} targets, {result.bytes} bytes; relative error {gap:.1e}"


# ----------------------------------------------------------------------------------------------------------
# Bytes, size, time.
# ----------------------------------------------------------------------------------------------------------
class PieceTable(train_gpt.Tokenizer):
    """A tokenizer made of a list of pieces, with no SentencePiece model behind it; ids 0 to 3 are control tokens."""

    def __init__(self, pieces: Sequence[str]):
        self.pieces, self.strips_all = list(pieces), False
        self.digest = train_gpt.digest_of("\n".join(pieces))[:16]
        self.is_boundary = np.arange(len(pieces)) < 4
        sizes = [len(piece.removeprefix("▁").encode()) for piece in pieces]
        self.base_bytes = np.where(self.is_boundary, 0, sizes).astype(np.int16)
        self.has_leading_space = np.array([p.startswith("▁") for p in pieces]) & ~self.is_boundary

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of one document, whose first piece has no space before it."""
        return "".join(self.pieces[token].replace("▁", " ") for token in tokens if token > 3).removeprefix(" ")


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
    """Training, and calibration on training data; the step that meets the limit may end."""
    steps = [row for row in rows if row["event"].startswith("step:") and "train_time_ms" in row]
    if not steps:
        return True, "the log is of an evaluation alone"
    seconds, step_s = steps[-1]["train_time_ms"] / 1000, steps[-1].get("step_avg_ms", 0.0) / 1000
    calibration = sum(row.get("time_s", 0.0) for row in rows if row["event"] == "calibration")
    figure = f"{seconds + calibration:.1f} s, of which {calibration:.1f} s calibration; a step takes {step_s:.2f} s"
    return seconds + calibration <= train_gpt.STAGE_BUDGET_S + step_s, figure


def check_evaluation_time(rows: Sequence[dict[str, Any]]) -> Verdict:
    """The evaluation's total, which must not be less than the sum of its stages."""
    totals = [row["total_s"] for row in rows if row["event"] == "evaluation"]
    if not totals:
        return False, "the log has no evaluation total: the run did not end"
    names = ("final_", "legal_ttt")
    stages = [row for row in rows if row["event"].startswith(names) and "eval_time_ms" in row]
    seconds = max(sum(totals), sum(row["eval_time_ms"] for row in stages) / 1000)
    return seconds <= train_gpt.STAGE_BUDGET_S, f"{seconds:.1f} s in {len(stages)} stages"


def check_log_validity(rows: Sequence[dict[str, Any]]) -> Verdict:
    """No result in the log is marked invalid, or has a mass that is not 1."""
    masses = [row for row in rows if "mass" in row]
    worst = max([0.0, *(row["worst"] if "worst" in row else abs(row["mass"] - 1) for row in masses)])
    invalid = [row["event"] for row in rows if row.get("valid") is False]
    figure = f"logged mass off by {worst:.1e}" + (f"; marked invalid: {invalid[0]}" if invalid else "")
    return worst <= train_gpt.MASS_TOLERANCE and not invalid, figure


def check_logged_size(rows: Sequence[dict[str, Any]]) -> Verdict:
    totals = [row["bytes"] for row in rows if row["event"] == "total_bytes"]
    if not totals:
        return True, "the log is of an evaluation alone"
    return max(totals) <= train_gpt.SIZE_LIMIT_BYTES, f"{max(totals):,} bytes in the log"


# ----------------------------------------------------------------------------------------------------------
# A bare process, and training without validation data.
# ----------------------------------------------------------------------------------------------------------
CHILD = """
import dataclasses, json, os, sys, types
folder, artifact, home = sys.argv[1:4]
libraries = sys.prefix + os.sep  # of a virtual environment, which may lie inside the project
sys.path.insert(0, folder)
seen = []
def hook(event, args):
    ours = event == "open" and str(args[0]).startswith(home) and not str(args[0]).startswith(libraries)
    if ours or event in ("socket.connect", "pickle.find_class"):
        seen.append(f"{event} {args[0]} {args[1]}")
import numpy as np, torch, train_gpt
asked = json.loads(sys.stdin.read())
torch.set_num_threads(asked["threads"])
sys.addaudithook(hook)
model, config, _ = train_gpt.load_artifact(artifact)
config = dataclasses.replace(config, **asked["settings"])
runtime = train_gpt.Runtime(config, {})
tokens = np.array(asked["tokens"], dtype=np.int64)
sizes = np.ones(len(tokens) - 1, dtype=np.int16)
stream = types.SimpleNamespace(tokens=tokens, num_targets=len(sizes), bytes=sizes)
model.to(runtime.device)
scores = [train_gpt.score_stream(model, config, runtime, stream, config.eval_stride)]
if config.ttt_enabled:
    scores.append(train_gpt.score_then_adapt(model, config, runtime, stream))
seen = list(seen)
print(json.dumps({"logp": [s.logp.tolist() for s in scores], "seen": seen, "code": train_gpt.__file__}))
"""


def check_bare_process(artifact: Path, config: train_gpt.Config, tokens: np.ndarray) -> Verdict:
    """A new process with the code files alone loads the artifact and gives the same scores, bit for bit.

    It runs in an empty folder with an empty environment, and may open nothing of this project's own, nor
    connect to anything, nor unpickle a class.
    """
    model, stored, _ = train_gpt.load_artifact(artifact)
    device = train_gpt.Runtime(config, {}).device.type
    config = dataclasses.replace(config, device=device)
    model.to(device)
    expected = [Neural(model, config, ttt=False).run(tokens).logp]
    if config.ttt_enabled:
        expected.append(Neural(model, config, ttt=True).run(tokens).logp)
    before, after = dataclasses.asdict(stored), dataclasses.asdict(config)
    settings = {name: value for name, value in after.items() if value != before[name]}
    asked = {"settings": settings, "tokens": tokens.tolist(), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as elsewhere:
        for path in train_gpt.code_paths():
            shutil.copy(path, folder)
        copy = shutil.copy(artifact, Path(elsewhere) / "artifact")
        home = str(train_gpt.CODE_DIR) + os.sep
        process = subprocess.run(
            [sys.executable, "-I", "-c", CHILD, folder, str(copy), home], cwd=elsewhere, env={"PATH": os.defpath},
            input=json.dumps(asked), capture_output=True, encoding="utf-8", check=False, timeout=600,
        )  # fmt: skip
    if process.returncode:
        return False, f"fails: {process.stderr.strip().splitlines()[-1]}"
    answer = json.loads(process.stdout)
    if answer["seen"]:
        return False, f"reaches outside: {answer['seen'][0]}"
    same = all(np.array_equal(np.float32(a), b) for a, b in zip(answer["logp"], expected, strict=True))
    return same, f"{len(tokens) - 1} targets, {len(expected)} scorers: {'same bits' if same else 'other scores'}"


class OpenRecorder:
    """Names of files opened by this process while `names` is a list. An audit hook can never be taken away again."""

    names: list[str] | None = None
    installed = False

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.names is not None and event == "open":
            cls.names.append(str(arguments[0]))

    @classmethod
    @contextlib.contextmanager
    def recording(cls) -> Iterator[list[str]]:
        if not cls.installed:
            sys.addaudithook(cls.hook)
            cls.installed = True
        cls.names = names = []
        try:
            yield names
        finally:
            cls.names = None


@dataclass
class Rehearsal:
    """Two short trainings that differ in their validation shards alone; files are in `folder`."""

    folder: Path
    config: train_gpt.Config
    tokenizer: PieceTable

    @classmethod
    def prepare(cls, folder: Path, recipe: train_gpt.Config) -> Rehearsal:
        """Synthetic train shards and settings: the recipe's evaluation, a model small enough for seconds."""
        letters = "aeinorstlu"
        words = [a + b for a, b in itertools.product(letters, "énts")]
        pieces = ["<pad>", "<s>", "</s>", "<unk>", *(f"▁{word}" for word in words[::2]), *letters, *words[1::2]][:32]
        config = dataclasses.replace(
            recipe, vocab_size=len(pieces), num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2.0,
            bigram_vocab_size=64, bigram_dim=8, xsa_last_n=1, rope_dims=8, rope_train_len=32, ve_dim=8, ve_layers=(1,),
            mtp_num_heads=1, train_seq_len=32, train_batch_tokens=512, micro_batch_tokens=512, iterations=30,
            warmup_steps=0, warmdown_iters=15, max_wallclock_seconds=0.0, muon_momentum_warmup_steps=10, ema_decay=0.8,
            matrix_lr=0.05, tied_embed_lr=0.1, val_loss_every=0, train_log_every=1000, kg_enabled=False, swarm_every=10,
            ttt_freeze_blocks=min(recipe.ttt_freeze_blocks, 1), weight_average="ema", data_path=str(folder),
            tokenizer_path="", out_dir=str(folder), artifact="", run_id="rehearsal", val_tokens=0,
            quantizer="gptq", calibration_tokens=2048,  # whatever the recipe has: calibration reads data too
            resume="",  # or the second training would take over what the first one left
        )  # fmt: skip
        rehearsal = cls(folder, shorten(config, STREAM_TARGETS), PieceTable(pieces))
        rehearsal.write("train", seed=1, count=20_000)
        return rehearsal

    def write(self, split: str, seed: int, count: int) -> None:
        tokens = make_stream(zipf_material(self.config.vocab_size, count, seed), count, seed)
        tokens = np.where(tokens < 4, tokens + 4, tokens)
        tokens[::61] = train_gpt.BOS_ID
        header = np.zeros(256, dtype="<i4")
        header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, count
        path = self.folder / f"audit_{split}_000000.bin"
        path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())

    def validation(self) -> train_gpt.ValidationSet:
        return train_gpt.ValidationSet(self.config, self.tokenizer)

    def train(self, validation_seed: int) -> tuple[bytes, list[str]]:
        """The artifact's bytes, and the names of all files that training opened."""
        self.write("val", validation_seed, count=500)
        runtime = train_gpt.Runtime(self.config, {})
        with contextlib.redirect_stdout(io.StringIO()):
            log = train_gpt.RunLog(self.config, runtime)
            validation = self.validation()
            with OpenRecorder.recording() as opened:
                checkpoints = train_gpt.Checkpoints(self.config, runtime, log)
                train_gpt.train_artifact(self.config, runtime, log, self.tokenizer, validation, checkpoints)
            log.close()
        return self.config.artifact_path.read_bytes(), opened


def check_shards_untouched(opened: Sequence[str]) -> Verdict:
    """Training opened train shards, so the record works, and no validation shard."""
    train = [name for name in opened if "_train_" in Path(name).name]
    val = [name for name in opened if "_val_" in Path(name).name]
    if val:
        return False, f"training opened {Path(val[0]).name}"
    return bool(train), f"{len(opened)} files opened, {len(train)} times a train shard and never a validation shard"


def unpack(artifact: bytes) -> tuple[dict[str, str], bytes]:
    """Metadata and tensor bytes; safetensors writes the former in an order of its own."""
    payload = train_gpt.unpack_artifact(artifact)[0]
    stop = 8 + int.from_bytes(payload[:8], "little")
    return json.loads(payload[8:stop]), payload[stop:]


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
STREAM_TARGETS = 181  # four chunks of 50, the last one short
DECODED = 0.58, 24  # from target 289 on: across the border of two chunks at 300
LONG_TARGETS = 12_700  # seven blocks of a mixer; Hedge has learned from one of them


class Effort(NamedTuple):
    """How much of everything; `targets` of the stages that train, the others are asked about more."""

    cuts: int
    targets: int
    strides: tuple[int, ...]


QUICK, FULL = Effort(8, 2, (7,)), Effort(32, 6, (1, 7, 24))


def pick_cuts(num_targets: int, config: train_gpt.Config, count: int) -> list[int]:
    """Targets after which to change everything: borders of windows, chunks and mixer blocks, and random ones."""
    seq_len, stride, chunk = config.eval_seq_len, config.eval_stride, config.ttt_chunk_tokens
    borders = [seq_len, chunk, seq_len + stride, 2 * chunk, MIX_BLOCK, 3 * chunk]
    rng = np.random.default_rng(2)
    cuts = [edge - 1 for edge in borders] + [0, num_targets - 2, *rng.integers(1, num_targets - 2, count).tolist()]
    return list(dict.fromkeys(cuts))[:count]


def pick_targets(num_targets: int, config: train_gpt.Config, count: int) -> list[int]:
    """Targets to ask about, among those whose whole prediction a run keeps.

    Late ones come first, for all that has been learned by then, but soon early ones too: only there is the contest
    between a mixer and the neural model still open, so that the odds between them matter.
    """
    chunk = config.ttt_chunk_tokens
    wanted = [num_targets - 5, 2 * chunk + 1, 40, 20, num_targets - 20, chunk, 30, 10, 0]
    kept = train_gpt.sample_targets(num_targets)
    nearest = [int(kept[np.abs(kept - target).argmin()]) for target in wanted]
    return list(dict.fromkeys(nearest))[:count]


def audit_stages(
    report: Report, stages: Sequence[Stage], config: train_gpt.Config, tokens: np.ndarray, effort: Effort
) -> None:
    """Conditions 1 to 4 on every stage, by every token of the vocabulary."""
    num_targets, chunk = len(tokens) - 1, config.ttt_chunk_tokens
    cuts, targets = pick_cuts(num_targets, config, effort.cuts), pick_targets(num_targets, config, 9)
    lengths = [1, 2, config.eval_seq_len - 1, config.eval_seq_len, config.eval_seq_len + 1, chunk, chunk + 1, 133]
    for stage in stages:
        report.add("future invariance", CAUSAL, stage.name, lambda stage=stage: check_future(stage, tokens, cuts))
    for stage in stages:
        slow = "ttt" in stage.name  # training on every chunk takes a dozen times as long as scoring
        check_predictions(report, stage, tokens, targets[: effort.targets] if slow else targets)
    for stage in stages:
        if stage.name.endswith("ttt"):
            test = functools.partial(check_training_order, stage, tokens, chunk)
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
        report.add("every target once", SINGLE_PASS, name, lambda n=neural: check_single_pass(n.run, tokens, lengths))


def audit_own_blocks(report: Report, model: train_gpt.GPT, recipe: train_gpt.Config) -> None:
    """Conditions 1 to 3 on the mixers with blocks of the length that a run has; windows do not overlap here."""
    config = dataclasses.replace(
        shorten(recipe, LONG_TARGETS), eval_stride=24, eval_batch_seqs=64, ngram_block=recipe.ngram_block
    )
    tokens = make_stream(zipf_material(config.vocab_size, 12_000, 4), LONG_TARGETS + 1)
    targets = train_gpt.sample_targets(LONG_TARGETS)[-2:-1].tolist()
    for stage in mixer_stages(Neural(model, config, ttt=False), config, whole=True):
        report.add("future invariance", CAUSAL, stage.name, lambda s=stage: check_future(s, tokens, (2047, 10_500)))
        check_predictions(report, stage, tokens, targets)


def audit_own_model(report: Report, recipe: train_gpt.Config, effort: Effort) -> None:
    """All checks on a model trained here, where every token of a small vocabulary can be tried."""
    with tempfile.TemporaryDirectory() as folder:
        rehearsal = Rehearsal.prepare(Path(folder), recipe)
        runs: list[tuple[bytes, list[str]]] = []

        def train() -> Verdict:
            runs.extend(rehearsal.train(seed) for seed in (7, 8))
            return check_shards_untouched([name for _, opened in runs for name in opened])

        report.add("files opened", NO_VALIDATION, "short training", train)
        if len(runs) < 2:
            return
        (first, _), (second, _) = runs
        report.add("other shards", NO_VALIDATION, "short training", lambda: check_same_artifact(first, second))
        config = rehearsal.config
        model, _, _ = train_gpt.load_artifact(config.artifact_path)
        model.to(train_gpt.Runtime(config, {}).device)
        tokens = make_stream(zipf_material(config.vocab_size, 400, 3), STREAM_TARGETS + 1)
        audit_stages(report, make_stages(model, config), config, tokens, effort)
        audit_coverage(report, model, config, tokens, effort)
        own_blocks = dataclasses.replace(config, ngram_block=recipe.ngram_block, ngram_buckets=recipe.ngram_buckets)
        audit_own_blocks(report, model, own_blocks)
        validation = rehearsal.validation()
        audit_accounting(report, validation, rehearsal.tokenizer.decode, model, config)
        audit_file(report, config.artifact_path, config, tokens)
        audit_decoding(report, config.artifact_path, config, own_source(rehearsal, validation), DECODED)


def own_source(rehearsal: Rehearsal, validation: train_gpt.ValidationSet) -> audit_decode.Source:
    text = functools.partial(text_of, rehearsal.tokenizer.decode)
    return audit_decode.Source(validation.tokens, rehearsal.tokenizer, text, (rehearsal.folder,))


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
        tokenizer = train_gpt.Tokenizer(str(arguments.tokenizer), recipe.vocab_size)
        validation = train_gpt.ValidationSet(dataclasses.replace(recipe, data_path=str(arguments.data)), tokenizer)
        text = functools.partial(text_of, functools.partial(decode_document, tokenizer.model))
        source = audit_decode.Source(validation.tokens, tokenizer, text, (arguments.data,))
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


def audit_artifact(report: Report, artifact: Path, arguments: argparse.Namespace) -> None:
    """The same on a given artifact; quickly, by samples of its vocabulary instead of all of it."""
    model, config, _ = train_gpt.load_artifact(artifact)
    config = shorten(overridden(config, os.environ), STREAM_TARGETS)
    model.to(train_gpt.Runtime(config, {}).device)
    material = zipf_material(config.vocab_size, 400, 3)
    validation = None
    if arguments.data:
        tokenizer = train_gpt.Tokenizer(str(arguments.tokenizer), config.vocab_size)
        data_config = dataclasses.replace(config, data_path=str(arguments.data), val_tokens=0)
        validation = train_gpt.ValidationSet(data_config, tokenizer)
        material = validation.tokens[:400].astype(np.int64)
        decode = functools.partial(decode_document, tokenizer.model)
        audit_accounting(report, validation, decode, model, config)
    if len(material) < STREAM_TARGETS + 1:
        raise train_gpt.UserError(f"--data {arguments.data} has {len(material)} validation tokens; 400 are needed")
    tokens = make_stream(material, STREAM_TARGETS + 1)
    audit_file(report, artifact, config, tokens)
    effort = QUICK if arguments.quick else FULL
    cuts = pick_cuts(STREAM_TARGETS, config, effort.cuts)
    targets = pick_targets(STREAM_TARGETS, config, arguments.positions)
    for stage in (dataclasses.replace(s, name=f"artifact, {s.name}") for s in make_stages(model, config)):
        report.add("future invariance", CAUSAL, stage.name, lambda s=stage: check_future(s, tokens, cuts))
        check_predictions(report, stage, tokens, targets, sampled=24 if arguments.quick else 0)
        if stage.name.endswith("ttt"):
            test = functools.partial(check_training_order, stage, tokens, config.ttt_chunk_tokens)
            report.add("training after scoring", SCORE_FIRST, stage.name, test)


def audit_log(report: Report, path: Path) -> None:
    """What a run logged about its time, size and mass."""
    rows = read_log(path)
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
    report = Report(progress=sys.stderr.isatty())
    recipe = train_gpt.Config.from_env(os.environ)
    if arguments.artifact:
        recipe = overridden(train_gpt.load_artifact(arguments.artifact)[1], os.environ)
    if arguments.decode:
        decode_alone(report, recipe, arguments)
        return report
    if arguments.log:
        audit_log(report, arguments.log)
    if arguments.artifact:
        audit_artifact(report, arguments.artifact, arguments)
    audit_own_model(report, recipe, QUICK if arguments.quick else FULL)
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
    parser.add_argument("--quick", action="store_true", help="fewer positions; an artifact by samples, not whole")
    parser.add_argument("--positions", type=int, default=2, help="targets of the artifact to ask about (2)")
    parser.add_argument("--decode", action="store_true", help="only decode a stretch; an artifact's needs --data")
    parser.add_argument("--decode-at", type=float, default=0.7, help="where it begins: a fraction of the split (0.7)")
    parser.add_argument("--decode-tokens", type=int, default=200, help="how many targets it has (200)")
    parser.add_argument("--json", type=Path, help="write the findings there")
    arguments = parser.parse_args(words)
    if bool(arguments.data) != bool(arguments.tokenizer) or (arguments.data and not arguments.artifact):
        parser.error("--data and --tokenizer go together, with --artifact")
    if arguments.decode and arguments.artifact and not arguments.data:
        parser.error("--decode --artifact needs --data and --tokenizer: the text to decode")
    if not 0 <= arguments.decode_at <= 1 or arguments.decode_tokens < 1:
        parser.error("--decode-at is a fraction from 0 to 1, and --decode-tokens at least 1")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Audit, print the table, write the JSON. Returns the exit code."""
    arguments = parse_arguments(words)
    torch.set_num_threads(1)  # matrices this small are fastest on one thread
    began = time.perf_counter()
    try:
        report = audit(arguments)
        if arguments.json:
            result = {
                "valid": not report.violations,
                "artifact": str(arguments.artifact or ""),
                "code": train_gpt.code_digest(),
                "violated": list(dict.fromkeys(finding.condition for finding in report.violations)),
                "findings": [finding._asdict() for finding in report.findings],
            }
            arguments.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except (train_gpt.UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print("\n".join(report.lines()))
    if arguments.decode:
        print("\n".join(report.sentences))
    print(f"{report.conclusion()} ({time.perf_counter() - began:.0f} s)")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
