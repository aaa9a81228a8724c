"""Get a stretch of the validation text back out of the bits that its score says it takes; `tools/audit.py --decode`.

An encoder writes the stretch with the run's own predictions. A decoder in a bare process reads it back: it has the
artifact, the code files, the tokens before the stretch, the bytes of each token of the vocabulary and the length of
the stream. Both sides run train_gpt.py's own `score_stream` or `score_then_adapt`, unmodified, on a stream that is
blank from the stretch on. Where these ask the model about a target that is not known yet, they are held until it is:
the whole prediction is taken, mixed, given to the coder, and the token that comes back is put into the stream.

The prefix is scored once on each side, a target of the stretch costs a forward pass: of its window, or where rounding
is coarse (bf16, CUDA) of the whole batch that it stands in, so that EVAL_BATCH_SEQS=1 is quickest on a CPU in bf16.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import audit_watch
import numpy as np
import torch

import train_gpt

GAP_TOLERANCE = 1e-4  # nats between a target's entry in the prediction taken here and what the run's stream scored
MIX_BLOCK = 2048  # targets between two updates of a run's mixer
BYTE_RULE = ("strips_all", "is_boundary", "base_bytes", "has_leading_space")  # what Tokenizer.target_bytes needs
Take = Callable[[int, np.ndarray], int]  # target, its distribution (V,) float64 → the token that comes
Answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of GPT.token_scores


class DecodingError(train_gpt.UserError):
    """The stretch cannot be written or read: what is predicted is no distribution, or no prediction was asked for."""


class Complete(Exception):
    """Every target of the stretch is known: no error, but the way out of a scorer that would go on to the end."""


@dataclass(frozen=True)
class Known:
    """What encoder and decoder both have. The stretch is targets start … stop-1; target t is token t + 1."""

    config: train_gpt.Config
    num_targets: int  # of the whole stream; windows and the learning rates of TTT depend on it
    prefix: np.ndarray  # (start + 1,) int64, every token before the stretch
    count: int  # targets of the stretch
    byte_rule: dict[str, Any]  # for TTT that weighs targets by their bytes
    mix_block: int = MIX_BLOCK

    @property
    def start(self) -> int:
        return len(self.prefix) - 1

    @property
    def stop(self) -> int:
        return self.start + self.count

    def target_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes (N,) int16 of the targets tokens[1:]."""
        tokenizer = object.__new__(train_gpt.Tokenizer)
        vars(tokenizer).update(self.byte_rule)
        return tokenizer.target_bytes(tokens[:-1], tokens[1:])


# ----------------------------------------------------------------------------------------------------------
# What both sides do.
# ----------------------------------------------------------------------------------------------------------
class Walk:
    """The run's scoring over the prefix and then, token by token, over the stretch."""

    def __init__(self, model: train_gpt.GPT, known: Known, take: Take):
        self.model, self.given, self.take = model, known, take
        self.tokens = np.zeros(known.num_targets + 1, dtype=np.int64)
        self.tokens[: len(known.prefix)] = known.prefix
        self.known, self.scored = known.start, 0  # how many targets are known, and how many the scorer has asked for
        self.logp = np.zeros(known.num_targets, dtype=np.float32)  # of the neural model, where known
        self.entropy = np.zeros(known.num_targets, dtype=np.float32)
        self.mixture: Mixture | None = None
        self.stream = torch.zeros(0)  # the scorer's own copy of the tokens, once it has made it
        self.starts = np.zeros(0, dtype=np.int64)  # of the windows that it has asked about last

    def run(self) -> np.ndarray:
        """The tokens (count,) of the stretch. Raises DecodingError."""
        config, scorer_sequences = self.given.config, train_gpt.WindowScorer.sequences
        token_scores, train_on = train_gpt.GPT.token_scores, train_gpt.ChunkTrainer.train_on

        def sequences(scorer: train_gpt.WindowScorer, starts: np.ndarray, length: int) -> Any:
            self.stream, self.starts = scorer.tokens, starts
            return scorer_sequences(scorer, starts, length)

        def answer(model: train_gpt.GPT, *asked: Any) -> Answer:
            return self.answer(functools.partial(token_scores, model), *asked)

        def train(trainer: train_gpt.ChunkTrainer, scorer: Any, targets: range, lr: float) -> None:
            if config.ttt_byte_weighted and targets.stop > self.given.start:
                weights = self.given.target_bytes(self.tokens[: targets.stop + 1])[targets.start :]
                trainer.weights[targets.start : targets.stop] = torch.from_numpy(weights.astype(np.float32))
            train_on(trainer, scorer, targets, lr)

        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(Complete))
            stack.enter_context(mock.patch.object(train_gpt.WindowScorer, "sequences", sequences))
            stack.enter_context(mock.patch.object(train_gpt.GPT, "token_scores", answer))
            stack.enter_context(mock.patch.object(train_gpt.ChunkTrainer, "train_on", train))
            neural_scores(self.model, config, self.tokens, self.given.target_bytes(self.tokens))
        if self.known < self.given.stop:
            raise DecodingError(f"the run's scorer never asked about target {self.known}, so it cannot be decoded")
        return self.tokens[self.given.start + 1 : self.given.stop + 1]

    def answer(
        self, ask: Callable[..., Answer], ids: torch.Tensor, targets: torch.Tensor, tail: int, *rest: Any
    ) -> Answer:
        """In the place of `GPT.token_scores`: find those of the targets that are scored which are not known.

        These are the last `tail` ones of each row or, where a document is by itself, its next ones up to its end.
        """
        answer = ask(ids, targets, tail, *rest)
        first, config = self.scored, self.given.config
        by_document = config.ttt_enabled and config.ttt_rank > 0
        before = first - int(self.starts[0]) if by_document else 0  # columns of the answer ahead of target `first`
        self.scored += min(config.ttt_chunk_tokens, ids.size(1)) if by_document else ids.size(0) * tail
        if by_document:
            self.scored = min(self.scored, self.given.num_targets)
            ends = np.flatnonzero(self.tokens[first + 1 : self.scored + 1] == train_gpt.BOS_ID)
            self.scored = first + 1 + int(ends[0]) if len(ends) else self.scored
        for kept, column in zip((self.logp, self.entropy), answer):
            fresh = kept[first : min(self.scored, self.known)]
            fresh[:] = column.detach().flatten()[before : before + len(fresh)].float().cpu().numpy()
        if self.scored <= self.known:
            return answer
        position = torch.from_numpy(self.starts)[:, None] + torch.arange(ids.size(1))  # target of each column
        position = position.to(ids.device)
        for target in range(max(first, self.known), self.scored):
            row, column = divmod(target - first + before, tail)
            # A batch of another shape rounds otherwise; only in fp32 on a CPU does the row alone give the same to 1e-6.
            whole = self.model.dtype == torch.bfloat16 or ids.is_cuda
            part, place = (slice(None), (row, column)) if whole else (slice(row, row + 1), (0, column))
            with torch.no_grad():
                _, entropy, every = ask(ids[part], targets[part], tail, *rest)
            token = self.find(target, every[place].float().cpu().numpy(), float(entropy[place]))
            self.stream[target + 1] = token
            targets[position == target] = token
            ids[position == target + 1] = token
            if self.known == self.given.stop:
                raise Complete
            if by_document and token == train_gpt.BOS_ID:
                self.scored = target + 1
                break
        return ask(ids, targets, tail, *rest)

    def find(self, target: int, logp: np.ndarray, entropy: float) -> int:
        """The token of the first unknown target, whose neural prediction is `logp` (V,) fp32."""
        known, last = self.given, logp
        if known.config.mixer != "none":
            if self.mixture is None:
                self.mixture = Mixture(known, self.logp[:target], self.entropy[:target])
            last = self.mixture.predict(self.tokens[: target + 2], logp, entropy)
        probabilities = np.exp(last.astype(np.float64))
        mass = float(probabilities.sum())
        if not abs(mass - 1) <= train_gpt.MASS_TOLERANCE:
            raise DecodingError(
                f"no distribution: at target {target} the probabilities of all tokens sum to {mass:.6g}"
            )
        token = self.take(target, probabilities)
        self.tokens[target + 1], self.logp[target], self.entropy[target] = token, logp[token], entropy
        self.known += 1
        if self.mixture:
            self.mixture.learn(token)
        return token


class Mixture:
    """The state in which `mix_scores` stands before a target: its mixer's, and the log-odds of the guard."""

    def __init__(self, known: Known, logp: np.ndarray, entropy: np.ndarray):
        """`logp` and `entropy` (start,) are the neural model's on the prefix."""
        mixer = train_gpt.make_mixer(known.config)
        assert mixer is not None
        self.mixer, self.block, self.log_odds = mixer, known.mix_block, 0.0
        self.open: list[train_gpt.Evidence] = []  # of the block under way, from which the mixer has not learned
        kinds = mixer.experts(mixer.counts(torch.from_numpy(known.prefix)))
        evidence = train_gpt.Evidence(logp, entropy, *([row[1:] for row in rows] for rows in kinds))
        for start in range(0, len(logp), self.block):
            self._add(part := evidence.part(slice(start, start + self.block)), mixer.mix(part))

    def _add(self, part: train_gpt.Evidence, learned: np.ndarray) -> None:
        """Count scored targets, and learn from a block once it is whole."""
        self.log_odds += float((learned - part.logp).sum(dtype=np.float64))
        self.open.append(part)
        if sum(len(each.logp) for each in self.open) == self.block:
            self.mixer.update(train_gpt.Evidence(*(np.concatenate(rows, -1) for rows in zip(*self.open))))
            self.open = []

    def predict(self, tokens: np.ndarray, logp: np.ndarray, entropy: float) -> np.ndarray:
        """The mixed log-probabilities (V,) of the last of `tokens`, which itself is blank.

        The neural prediction is `logp` (V,).
        """
        target = len(tokens) - 2
        self.probe = train_gpt.MassProbe(np.array([target + 1]), logp[None], np.array([entropy], np.float32))
        self.probe.recount(self.mixer, torch.from_numpy(tokens))
        self.probe.score(self.mixer, target, target + 1)
        log_odds = np.array(self.log_odds if self.mixer.guarded else math.inf)
        return train_gpt.blend(logp, self.probe.learned[0], log_odds)

    def learn(self, token: int) -> None:
        """What came at the target predicted last."""
        here = slice(token, token + 1)
        self._add(self.probe.evidence.part(here), self.probe.learned[0, here])


def as_run(config: train_gpt.Config) -> train_gpt.Config:
    """The config with the precision that a run with it decides on, on this machine."""
    if config.compute_dtype != "auto":
        return config
    pays = train_gpt.bf16_pays(train_gpt.Runtime(config, {}).device)
    return dataclasses.replace(config, compute_dtype="bf16" if pays else "fp32")


def load_model(artifact: Path, config: train_gpt.Config) -> train_gpt.GPT:
    """The artifact's model as a run with this config has it: its device, its precision."""
    model, _, _ = train_gpt.load_artifact(artifact)
    model.compute_dtype = train_gpt.COMPUTE_DTYPES[as_run(config).compute_dtype]
    return model.to(train_gpt.Runtime(config, {}).device)


def neural_scores(
    model: train_gpt.GPT, config: train_gpt.Config, tokens: np.ndarray, target_bytes: np.ndarray
) -> train_gpt.TokenScores:
    """The last neural stage of the run: TTT where there is one, else the sliding window."""
    stream: Any = types.SimpleNamespace(tokens=tokens, num_targets=len(tokens) - 1, bytes=target_bytes)
    runtime = train_gpt.Runtime(config, {})
    if config.ttt_enabled:
        return train_gpt.score_then_adapt(model, config, runtime, stream)
    return train_gpt.score_stream(model, config, runtime, stream, config.eval_stride)


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Have torch add in the same order each time; TTT on CUDA does not by itself."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def coder() -> tuple[Any, Callable[[np.ndarray], Any]]:
    """The coders of the library, and its 24-bit model of a distribution, which both sides make in the same way."""
    stream = train_gpt.require("constriction", "decoding a stretch of text").stream
    return stream.queue, functools.partial(stream.model.Categorical, perfect=False)


# ----------------------------------------------------------------------------------------------------------
# Either side.
# ----------------------------------------------------------------------------------------------------------
def encode(model: train_gpt.GPT, known: Known, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stretch of `tokens` (N + 1,) as 32-bit words (uint32), and the nats (count,) its targets took.

    Zero words at the end are left out: the decoder reads zeros where nothing is left. Raises DecodingError.
    """
    queue, quantized = coder()
    encoder, nats = queue.RangeEncoder(), []

    def take(target: int, probabilities: np.ndarray) -> int:
        token = int(tokens[target + 1])
        encoder.encode(token, quantized(probabilities))
        nats.append(-math.log(max(probabilities[token], sys.float_info.min)))
        return token

    with reproducible():
        Walk(model, known, take).run()
    return np.trim_zeros(encoder.get_compressed(), "b"), np.array(nats)


def decode(model: train_gpt.GPT, known: Known, words: np.ndarray) -> np.ndarray:
    """The tokens (count,) int64 of the stretch. Raises DecodingError: the bits do not belong to these predictions."""
    queue, quantized = coder()
    decoder = queue.RangeDecoder(words)

    def take(target: int, probabilities: np.ndarray) -> int:
        try:
            return int(decoder.decode(quantized(probabilities)))
        except AssertionError as error:  # the library's way to say so
            raise DecodingError(f"at target {target} the bits are none that these predictions could write") from error

    with reproducible():
        return Walk(model, known, take).run()


BARE = """
import sys
folder = sys.argv[1]
sys.path.insert(0, folder)
import audit_watch
def refuse(problem):
    raise PermissionError(f"the decoder may not do this: {problem}")
audit_watch.install(audit_watch.Watch([folder]), refuse)
import audit_decode
audit_decode.answer_in_bare_process(folder)
"""
DECODING_S = 3600  # after which a decoder is taken to hang


def decode_in_bare_process(artifact: Path, known: Known, words: np.ndarray) -> np.ndarray:
    """`decode` with an empty environment and no network; it may open what lies in its own folder, and libraries.

    Raises DecodingError.
    """
    stored = dataclasses.asdict(train_gpt.load_artifact(artifact)[1])
    settings = {name: value for name, value in dataclasses.asdict(known.config).items() if value != stored[name]}
    asked = {
        "settings": settings, "num_targets": known.num_targets, "count": known.count, "mix_block": known.mix_block,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    environ = {"PATH": os.defpath} | {k: v for k, v in os.environ.items() if k == "CUDA_VISIBLE_DEVICES"}
    with tempfile.TemporaryDirectory() as folder:
        for path in (*train_gpt.code_paths(), Path(__file__), Path(audit_watch.__file__)):
            shutil.copy(path, folder)
        shutil.copy(artifact, Path(folder, "artifact"))
        np.savez(Path(folder, "known.npz"), prefix=known.prefix, words=words, **known.byte_rule)
        command = [*audit_watch.no_network(), sys.executable, "-I", "-c", BARE, folder]
        try:
            process = subprocess.run(
                command, cwd=folder, env=environ | {"TMPDIR": folder}, input=json.dumps(asked), capture_output=True,
                encoding="utf-8", check=False, timeout=DECODING_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DecodingError(f"the decoder has not ended after {DECODING_S} s") from error
    if process.returncode:
        raise DecodingError((process.stderr.strip().splitlines() or ["no word from the decoder"])[-1])
    return np.array(json.loads(process.stdout), dtype=np.int64)


def answer_in_bare_process(folder: str) -> None:
    """The decoder's side of `decode_in_bare_process`."""
    asked = json.loads(sys.stdin.read())
    torch.set_num_threads(asked["threads"])
    artifact = Path(folder, "artifact")
    config = dataclasses.replace(train_gpt.load_artifact(artifact)[1], **asked["settings"])
    model = load_model(artifact, config)
    with np.load(Path(folder, "known.npz")) as arrays:
        rule = {name: arrays[name] for name in BYTE_RULE}
        prefix, words = arrays["prefix"], arrays["words"]
    known = Known(config, asked["num_targets"], prefix, asked["count"], rule, asked["mix_block"])
    sys.stdout.write(json.dumps(decode(model, known, words).tolist()))


# ----------------------------------------------------------------------------------------------------------
# The check.
# ----------------------------------------------------------------------------------------------------------
class Source(NamedTuple):
    """A validation stream, and how its text is read."""

    tokens: np.ndarray  # (N + 1,)
    tokenizer: Any  # has what BYTE_RULE names
    text: Callable[[np.ndarray], str]  # of whole documents

    def stretch(self, config: train_gpt.Config, fraction: float, count: int, mix_block: int = MIX_BLOCK) -> Known:
        """`count` targets, or as many as there are, from `fraction` of the stream on, or before its end."""
        num_targets = len(self.tokens) - 1
        count = min(count, num_targets)
        start = min(int(fraction * num_targets), num_targets - count)
        rule = {name: np.asarray(getattr(self.tokenizer, name)) for name in BYTE_RULE}
        # A compiled forward pass cannot be held. The device is the one in use here, whatever the process chooses.
        config = dataclasses.replace(as_run(config), compile=False, device=train_gpt.Runtime(config, {}).device.type)
        return Known(config, num_targets, self.tokens[: start + 1].astype(np.int64), count, rule, mix_block)


def first_tokens(tokens: np.ndarray, count: int, tokenizer: train_gpt.Tokenizer) -> np.ndarray:
    """The first `count` tokens, or some fewer where byte tokens of one character would be torn apart."""

    def goes_on(token: int) -> bool:
        return tokenizer.model.is_byte(token) and 0x80 <= int(tokenizer.model.id_to_piece(token)[3:5], 16) < 0xC0

    while count < len(tokens) and goes_on(int(tokens[count])):
        count -= 1
    return tokens[:count]


def stage_name(config: train_gpt.Config) -> str:
    """The stage that the run's last score is of."""
    return ("ttt" if config.ttt_enabled else "sliding") + (f"+{config.mixer}" if config.mixer != "none" else "")


def own_scores(model: train_gpt.GPT, known: Known, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities (N,) in nats of the whole stream by the run's own functions, nothing held or replaced."""
    config, ids = known.config, tokens.astype(np.int64)
    with reproducible():
        scores = neural_scores(model, config, ids, known.target_bytes(ids))
    mixer = train_gpt.make_mixer(config)
    if mixer is None:
        return scores.logp
    return train_gpt.mix_scores(mixer, torch.from_numpy(ids), scores.logp, scores.entropy, None, known.mix_block)


def check_decoding(artifact: Path, source: Source, known: Known) -> tuple[bool, str, str]:
    """Whether the stretch comes back, the figures, and in one sentence what that proves. Raises UserError."""
    began = time.perf_counter()
    model = load_model(artifact, known.config)
    start, stop = known.start, known.stop
    stretch = f"targets {start:,} to {stop - 1:,} of {known.num_targets:,}"
    scored = -own_scores(model, known, source.tokens)[start:stop].astype(np.float64)
    failed = f"No code length is proved for {stretch} ({stage_name(known.config)})."
    try:
        words, nats = encode(model, known, source.tokens)
        gaps = np.abs(nats - scored)
        if not gaps.max() <= GAP_TOLERANCE:
            target = int(np.argmax(gaps))
            had = f"{scored[target]:.6f} nats where its prediction from the tokens before has {nats[target]:.6f}"
            raise DecodingError(f"the run scored target {start + target} with {had}")
        decoded = decode_in_bare_process(artifact, known, words)
    except DecodingError as error:
        return False, f"{stretch}: {error}", failed
    bits, scored_bits = 32 * len(words), scored.sum() / math.log(2)
    figure = f"{known.count} tokens, {bits:,} bits written, {scored_bits:,.1f} scored, worst gap {gaps.max():.1e} nats"
    wrong = np.flatnonzero(decoded != source.tokens[start + 1 : stop + 1])
    problems = [f"target {start + wrong[0]} decodes to another token"] if len(wrong) else []
    if abs(bits - scored_bits) > 0.001 * scored_bits + 32:
        problems.append("the bits are not as many as the run scored")
    problems += text_problems(source, known, decoded)
    sentence = (
        f"{stretch} ({stage_name(known.config)}) came back from the artifact, the code, the tokens before them, the "
        f"stream's length and {bits:,} bits, in {time.perf_counter() - began:.0f} s: their score is a code length; "
        "of other targets this says nothing."
    )
    return not problems, "; ".join([f"{stretch}: {figure}", *problems]), failed if problems else sentence


def text_problems(source: Source, known: Known, decoded: np.ndarray) -> list[str]:
    """What is wrong with the text of the documents that the stretch lies in, with the decoded tokens in their place."""
    begins = np.flatnonzero(source.tokens == train_gpt.BOS_ID)
    low = int(max([0, *begins[begins <= known.start + 1]]))
    high = int(min([len(source.tokens), *begins[begins > known.stop]]))
    tokens = source.tokens[low:high].astype(np.int64)
    rebuilt = tokens.copy()
    rebuilt[known.start + 1 - low : known.stop + 1 - low] = decoded
    text, counted = source.text(tokens), int(known.target_bytes(tokens).sum(dtype=np.int64))
    problems = [] if source.text(rebuilt) == text else ["the decoded text is not the source's"]
    if len(text.encode()) != counted:
        problems.append(f"its documents are {len(text.encode())} bytes of text, counted as {counted}")
    return problems
