"""Causal n-gram counts, and probability mixtures of a neural model with n-gram experts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

# ----------------------------------------------------------------------------------------------------
# Counts: sort packed (context, token, position) and read off ranks. No table, no collision.
# ----------------------------------------------------------------------------------------------------

Array = Any  # here a NumPy array, or a torch tensor on any device
HASH_MULTIPLIERS = (36313, 27191, 51647, 81929, 131071, 174763, 233017)  # PR 1094


class NgramCounts(NamedTuple):
    """What earlier blocks say about each target under one n-gram order; (N,) int32 each."""

    context_count: Array  # C, occurrences of the target's context
    target_count: Array  # F, those of them that the target followed
    distinct: Array  # T, different tokens that followed; None for hashed counts


def _module(array: Array) -> Any:
    return torch if isinstance(array, torch.Tensor) else np


def _host(array: Array) -> np.ndarray:
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else array


def _arange(length: int, like: Array) -> Array:
    if isinstance(like, torch.Tensor):
        return torch.arange(length, dtype=torch.int32, device=like.device)
    return np.arange(length, dtype=np.int32)


def _wide(array: Array) -> Array:
    return _module(array).asarray(array, dtype=_module(array).int64)


def _cumsum(values: Array) -> Array:
    return _module(values).cumsum(values, 0, dtype=_module(values).int32)


def _scatter(values: Array, position: Array, length: int) -> Array:
    placed = _arange(length, values) * 0
    placed[position] = _module(values).asarray(values, dtype=placed.dtype)
    return placed


def _heads(values: Array) -> Array:
    """True where a run of equal values starts."""
    head = values == values  # all true
    head[1:] = values[1:] != values[:-1]
    return head


def _sort_runs(values: Array, head: Array | None) -> Array:
    """Sort int64 values; runs that start at `head`, if given, are in order among themselves already."""
    if isinstance(values, torch.Tensor):
        return torch.sort(values).values
    starts = np.zeros(1, np.int64) if head is None else np.flatnonzero(head)
    # NumPy sorts a piece that fits the cache three times as fast: cut at about every 8,192nd value.
    cuts = np.unique(starts[np.searchsorted(starts, np.arange(0, len(values), 8192), side="right") - 1])
    for start, stop in itertools.pairwise([*cuts, len(values)]):
        values[start:stop].sort()
    return values


class _Groups(NamedTuple):
    """Positions (M,) sorted by (group, position), and True where a group starts."""

    position: Array
    head: Array
    packed: Array  # group << bits | position
    bits: int

    @classmethod
    def sort(cls, group: Array, position: Array, length: int, head: Array | None = None) -> _Groups:
        """Sort positions < length by (group, position), overwriting `group`; `head` as in `_sort_runs`."""
        bits = length.bit_length()
        if bits > 31 or (len(group) and int(group.max()).bit_length() + bits > 63):
            raise ValueError(f"{length} tokens of this vocabulary overflow 63-bit keys: count fewer at once")
        group <<= bits
        group |= position  # values alone get sorted, positions travel in the low bits
        packed = _sort_runs(group, head)
        position = _module(packed).asarray(packed & ((1 << bits) - 1), dtype=position.dtype)
        return cls(position, _heads(packed >> bits), packed, bits)

    def earlier(self, block_of: Array | None, weight: Array | None, length: int) -> list[Array]:
        """Per position, how many of its group lie in earlier blocks, and their `weight` (N,) where given.

        `block_of` (N,) ascends; None stands for blocks of one token.
        """
        index = _arange(len(self.head), self.head)

        def run_start(head: Array) -> Array:
            return index[head][_cumsum(head) - 1]

        first = run_start(self.head)
        own = index if block_of is None else run_start(self.head | _heads(block_of[self.position]))
        counts = [_scatter(own - first, self.position, length)]
        if weight is not None:
            weight = weight[self.position]
            total = _cumsum(weight) - weight
            counts.append(_scatter(total[own] - total[first], self.position, length))
        return counts

    def lookup(self, group: Array, before: Array, weight: Array) -> Array:
        """Summed weight (N,) that any `group` holds at positions below `before`."""
        limits = ((group << self.bits) | x for x in (before * 0, before))
        start, end = (_module(group).searchsorted(self.packed, limit) for limit in limits)
        total = _arange(len(self.packed) + 1, weight) * 0
        total[1:] = _cumsum(weight[self.position])
        return total[end] - total[start]


def causal_ngram_counts(tokens: Array, max_order: int, block: int = 1) -> list[NgramCounts]:
    """All orders of `iter_ngram_counts` at once, which holds 12 bytes per token and order."""
    return list(iter_ngram_counts(tokens, max_order, block))


def iter_ngram_counts(
    tokens: Array, max_order: int, block: int = 1, probe: MassProbe | None = None
) -> Iterator[NgramCounts]:
    """Yield exact C, F and T of orders 1..max_order for every target tokens[i].

    The context is the order-1 tokens before i. Only targets j with j//block < i//block count: block 1
    means every j < i. Targets with too few predecessors get zeros. Tokens are non-negative integers (in a
    tensor, int32 or int64). Raises ValueError where (context, token, position) exceeds 63 bits.
    """
    position = _arange(len(tokens), tokens)
    contexts = _Groups(position, position == 0, None, 0)
    for _ in range(max_order):
        counts, targets = _count_order(tokens, contexts, block, probe)
        yield counts
        # A group of one (context, token) is one context of the next order; a group of one never recurs.
        recurs = ~targets.head
        recurs[:-1] |= ~targets.head[1:]
        recurs &= targets.position < len(tokens) - 1
        contexts = _Groups(targets.position[recurs] + 1, targets.head[recurs], None, 0)


def _count_order(
    tokens: Array, contexts: _Groups, block: int, probe: MassProbe | None
) -> tuple[NgramCounts, _Groups]:
    """C, F and T of the targets at contexts.position, and these grouped by (context, target)."""
    n = len(tokens)
    block_of = None if block == 1 else _arange(n, tokens) // block
    token_bits = max(int(tokens.max()), probe.vocab_size - 1 if probe else 0).bit_length() if n else 0
    context = _cumsum(contexts.head) - 1
    group = _wide(context) << token_bits
    group |= tokens[contexts.position]
    targets = _Groups.sort(group, contexts.position, n, contexts.head)
    is_new = _scatter(targets.head, targets.position, n)
    (target_count,) = targets.earlier(block_of, None, n)
    context_count, distinct = contexts.earlier(block_of, is_new, n)
    counts = NgramCounts(context_count, target_count, distinct)
    if probe:
        at = probe.at(tokens)
        own = _wide(_scatter(context + 1, contexts.position, n)[at]) - 1  # negative where it never recurs
        every = (own << token_bits) | _arange(probe.vocab_size, tokens)
        probe.record(counts, targets.lookup(every, at // block * block, is_new * 0 + 1))
    return counts, targets._replace(packed=None)


def iter_hashed_counts(
    tokens: Array, max_order: int, buckets: int, block: int, probe: MassProbe | None = None
) -> Iterator[NgramCounts]:
    """Yield the colliding counts of PR 1094: C of context buckets, F of context+target buckets.

    Target tokens[i], i >= 1, is scored in block (i-1)//block; an n-gram counts from the next block on, and
    only if one block added all its tokens. C and F come from different hashes, so F/C is no probability.
    Raises ValueError unless `buckets` is a power of two.
    """
    if buckets & (buckets - 1):
        raise ValueError(f"buckets must be a power of two, got {buckets}")
    n, position, wide = len(tokens), _arange(len(tokens), tokens), _wide(tokens)
    block_of = (position - 1 + (position == 0)) // block
    added_from = block_of * block + (block_of > 0)  # first token that the block adds
    for order in range(1, max_order + 1):
        context, multiplier = wide * 0, HASH_MULTIPLIERS[(order - 1) % 7]
        for k in range(order - 1):
            context[order - 1 :] ^= wide[k : k + max(n - order + 1, 0)] * HASH_MULTIPLIERS[k % 7]
        counted = position * 0 + (position - (order - 1) >= added_from)
        hashes = (context & (buckets - 1), (context ^ (wide * multiplier)) & (buckets - 1))
        groups = [_Groups.sort(bucket[order - 1 :], position[order - 1 :], n) for bucket in hashes]
        counts = NgramCounts(*[group.earlier(block_of, counted, n)[1] for group in groups], distinct=None)
        if probe:
            at = probe.at(tokens)
            every = (context[at] ^ (_arange(probe.vocab_size, tokens) * multiplier)) & (buckets - 1)
            probe.record(counts, groups[1].lookup(every, added_from[at], counted))
        yield counts


# ----------------------------------------------------------------------------------------------------
# Mixers: expert probabilities of each target, and weights that only its past decides.
# ----------------------------------------------------------------------------------------------------


class Evidence(NamedTuple):
    """Per target: the neural log-probability and entropy in nats (N,), and one row (N,) per n-gram expert.

    `expert` rows hold the target's probability; `bucket` rows depend on the context alone, never on it.
    """

    logp: np.ndarray
    entropy: np.ndarray
    expert: Any
    bucket: Any

    def part(self, span: slice) -> Evidence:
        rows = (np.stack([row[span] for row in rows]) for rows in (self.expert, self.bucket))
        return Evidence(self.logp[span], self.entropy[span], *rows)


Rows = tuple[list[np.ndarray], list[np.ndarray]]  # expert and bucket rows


class Mixer(Protocol):
    """`counts` and `experts` make the evidence; `mix` scores a block (B,), `update` then learns from it."""

    guarded: bool

    def counts(self, tokens: Array, probe: MassProbe | None) -> Iterator[NgramCounts]: ...
    def experts(self, counts: Iterable[NgramCounts]) -> Rows: ...
    def mix(self, block: Evidence) -> np.ndarray: ...
    def update(self, block: Evidence) -> None: ...


def _bin(values: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    """How many of the edges each value reaches."""
    return np.add.reduce([values >= edge for edge in edges], 0, dtype=np.uint8)


class BackoffNgramMixer:
    """The default: a chain of two-way mixtures from the neural model q_0 through order 1 to max_order.

    q_k = (1 - w) q_{k-1} + w F/C: each order takes the share it earned and leaves the rest to the lower
    ones; where C = 0, w = 0. Online EM learns w per order and bucket of C, T/C and neural entropy, all known
    before the target, so every q_k is a distribution. `guard` bounds the loss against q_0.
    """

    guarded = True
    count_edges = (1, 2, 3, 5, 10, 30, 100, 1000)
    novelty_edges = (0.03, 0.1, 0.2, 0.35, 0.6, 1.0)
    entropy_edges = (1.0, 2.0, 3.0, 4.0, 5.0)

    def __init__(self, max_order: int = 10, block: int = 1, prior: tuple[float, float] = (0.1, 1.0)) -> None:
        self.max_order, self.block = max_order, block
        self.novelty_bins = len(self.novelty_edges) + 2  # one more where T = C, one where T = 1
        contexts = (len(self.count_edges) + 1) * self.novelty_bins
        shape = (max_order, contexts, len(self.entropy_edges) + 1)
        self.reached = np.full(shape, sum(prior))  # targets that no higher order explained
        self.taken = np.full(shape, prior[0])  # those of them that this order did
        self.taken[:, : self.novelty_bins] = 0.0  # C = 0: nothing to take from

    def counts(self, tokens: Array, probe: MassProbe | None = None) -> Iterator[NgramCounts]:
        return iter_ngram_counts(tokens, self.max_order, self.block, probe)

    def experts(self, counts: Iterable[NgramCounts]) -> Rows:
        shares, buckets = [], []
        for seen, followed, distinct in counts:
            total = np.maximum(seen, 1)
            shares.append(np.divide(followed, total, dtype=np.float32))
            novelty = _bin(np.divide(distinct, total, dtype=np.float32), self.novelty_edges)
            novelty = np.where(distinct == 1, self.novelty_bins - 1, novelty)
            buckets.append((_bin(seen, self.count_edges) * self.novelty_bins + novelty).astype(np.uint8))
        return shares, buckets

    def _chain(self, block: Evidence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each order's table cell and weight (K, B), and the target's q_0..q_K (K + 1, B)."""
        orders, contexts, entropies = self.taken.shape
        cell = np.arange(orders)[:, None] * contexts + block.bucket
        cell = cell * entropies + _bin(block.entropy, self.entropy_edges)
        weight = self.taken.take(cell) / self.reached.take(cell)
        chain = np.empty((self.max_order + 1, len(block.logp)))
        chain[0] = np.exp(block.logp)
        for k in range(self.max_order):
            chain[k + 1] = chain[k] + weight[k] * (block.expert[k] - chain[k])
        return cell, weight, chain

    def mix(self, block: Evidence) -> np.ndarray:
        return np.log(self._chain(block)[2][-1])

    def update(self, block: Evidence) -> None:
        cell, weight, chain = self._chain(block)
        explained = weight * block.expert / chain[1:]  # posterior that order k made a target that reached it
        reached = np.ones_like(explained)
        reached[:-1] = np.cumprod(1 - explained[:0:-1], 0)[::-1]
        for tally, amount in ((self.reached, reached), (self.taken, reached * explained)):
            tally += np.bincount(cell.ravel(), amount.ravel(), tally.size).reshape(tally.shape)


@dataclass
class PublishedBackoffMixer:
    """PR 1094: p = (1 - a) p_neural + a F/C of the highest order, 2..max_order, with C >= min_count.

    a = alpha_base + alpha_range sigmoid(2 (H - alpha_center)). Nothing is learned; the neural model is alone
    until min_tokens were counted. `buckets` > 0 takes the published hashed counts, added every `block`
    targets: then the result is no distribution.
    """

    vocab_size: int
    max_order: int = 10
    min_count: int = 1
    alpha_base: float = 0.20
    alpha_range: float = 0.55
    alpha_center: float = 3.0
    buckets: int = 0
    block: int = 1
    min_tokens: int = 0
    guarded = False

    def counts(self, tokens: Array, probe: MassProbe | None = None) -> Iterator[NgramCounts]:
        if self.buckets:
            return iter_hashed_counts(tokens, self.max_order, self.buckets, self.block, probe)
        return iter_ngram_counts(tokens, self.max_order, self.block, probe)

    def experts(self, counts: Iterable[NgramCounts]) -> Rows:
        total, followed, _ = next(counts := iter(counts))
        expert, ready = (followed + 0.5) / (total + 0.5 * self.vocab_size), total >= self.min_tokens
        for seen, followed, _ in counts:
            share = np.minimum(followed, seen) / np.maximum(seen, 1)
            expert = np.where(seen >= max(self.min_count, 1), share, expert)
        return [expert], [ready]

    def mix(self, block: Evidence) -> np.ndarray:
        alpha = self.alpha_base + self.alpha_range / (1 + np.exp(-2 * (block.entropy - self.alpha_center)))
        alpha = alpha * block.bucket[0]
        return np.log(np.maximum((1 - alpha) * np.exp(block.logp) + alpha * block.expert[0], 1e-12))

    def update(self, block: Evidence) -> None:
        """Only the counts adapt."""


@dataclass
class HedgeMixer:
    """PR 700: five experts weighted by exp(-eta · summed block-mean loss), neural alone for min_tokens.

    Neural model (log-weight 2 at the start), unigram and bigram (+0.1), trigram on 65,536 hashed rows
    (+0.01), and as fifth the Witten-Bell interpolation of orders 1-5. With `entropy_expert` the fifth is, as
    published, the neural entropy taken for a log-loss: then the result is no distribution.
    """

    vocab_size: int
    eta: float = 0.1
    min_tokens: int = 10_000
    entropy_expert: bool = False
    log_weight: np.ndarray = field(default_factory=lambda: np.array([2.0, 0.0, 0.0, 0.0, 0.0]))
    guarded = False

    def counts(self, tokens: Array, probe: MassProbe | None = None) -> Iterator[NgramCounts]:
        wide = _wide(tokens)
        row = wide * 0
        row[1:] = 27191 * wide[:-1]
        row[2:] ^= 36313 * wide[:-2]
        rows = _Groups.sort(row & 65535, _arange(len(tokens), tokens), len(tokens))
        yield _count_order(tokens, rows, 1, probe)[0]
        yield from iter_ngram_counts(tokens, 5, probe=probe)

    def experts(self, counts: Iterable[NgramCounts]) -> Rows:
        trigram, *orders = counts
        smoothed = zip((0.1, 0.1, 0.01), (orders[0], orders[1], trigram), strict=True)
        experts = [(followed + add) / (seen + add * self.vocab_size) for add, (seen, followed, _) in smoothed]
        fifth = np.asarray(1 / self.vocab_size)
        for seen, followed, distinct in orders:
            fifth = (followed + np.maximum(distinct, seen == 0) * fifth) / np.maximum(seen + distinct, 1)
        return [*experts, fifth], [orders[0].context_count >= self.min_tokens]

    def _losses(self, block: Evidence) -> np.ndarray:
        counted = -np.log(block.expert)
        return np.stack([-block.logp, *counted[:3], block.entropy if self.entropy_expert else counted[3]])

    def mix(self, block: Evidence) -> np.ndarray:
        log_weight = self.log_weight - np.logaddexp.reduce(self.log_weight)
        mixed = np.logaddexp.reduce(log_weight[:, None] - self._losses(block), 0)
        return np.where(block.bucket[0], mixed, block.logp)

    def update(self, block: Evidence) -> None:
        if block.bucket[0].all():
            self.log_weight = self.log_weight - self.eta * self._losses(block).mean(1)


def guard(neural: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Log-odds (N,) of `learned` against `neural` at each target, from the targets before it."""
    gain = learned - neural.astype(np.float64)
    return np.concatenate([[0.0], np.cumsum(gain)])[:-1]


def blend(neural: np.ndarray, learned: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
    """Log-probability of the two-model mixture at the given odds.

    With those of `guard` it is the exact Bayesian mixture of two sequence models, prior 1/2 each: on any text
    the summed loss exceeds neither model's by more than ln 2 nats, one bit in all.
    """
    return np.logaddexp(neural - np.logaddexp(0, log_odds), learned - np.logaddexp(0, -log_odds))


def mix_stream(
    mixer: Mixer, evidence: Evidence, block: int = 2048, probe: MassProbe | None = None
) -> np.ndarray:
    """Mixed log-probability (N,) of every target; each block is scored before the mixer learns from it."""
    learned = np.empty(len(evidence.logp))
    for start in range(0, len(learned), block):
        part = evidence.part(slice(start, start + block))
        learned[start : start + block] = mixer.mix(part)
        if probe:
            probe.score(mixer, start, start + block)
        mixer.update(part)
    log_odds = guard(evidence.logp, learned) if mixer.guarded else np.full(len(learned), np.inf)
    if probe:
        probe.finish(log_odds)
    return blend(evidence.logp, learned, log_odds)


def mix_scores(
    mixer: Mixer,
    tokens: Array,
    logp: np.ndarray,
    entropy: np.ndarray,
    probe: MassProbe | None = None,
    block: int = 2048,
) -> np.ndarray:
    """Mix the neural scores (N,) of targets tokens[1:]; float64 log-probabilities (N,) in nats."""
    orders = mixer.counts(tokens, probe)
    counts = (NgramCounts(*(c if c is None else _host(c)[1:] for c in order)) for order in orders)
    return mix_stream(mixer, Evidence(logp, entropy, *mixer.experts(counts)), block, probe)


class MassProbe:
    """Counterfactual mass: every token in turn takes the place of a sampled target, and the answers add up.

    `position` (S,) ≥ 1 indexes tokens; `logp` (S, V) and `entropy` (S,) are the neural model's there. After
    `mix_scores`, `mass` (S,) is 1 for a valid mixer. No normalisation is assumed: C and T are the target's
    own, F of every token is looked up in the sorted keys, the rest is the mixer's own code.
    """

    def __init__(self, position: np.ndarray, logp: np.ndarray, entropy: np.ndarray) -> None:
        self.position, self.logp, self.entropy = position, logp, entropy
        self.vocab_size = logp.shape[1]
        self.counts: list[NgramCounts] = []
        self.learned, self.mass = np.empty(logp.shape), np.empty(len(position))

    def at(self, like: Array) -> Array:
        """`position` (S, 1) as the kind of array that `like` is."""
        position = self.position[:, None]
        return torch.as_tensor(position, device=like.device) if _module(like) is torch else position

    def record(self, counts: NgramCounts, target_count: Array) -> None:
        """Keep one order's C and T (S, 1) at the samples, with F (S, V) of every token."""
        seen, _, distinct = (c if c is None else _host(c[self.position])[:, None] for c in counts)
        self.counts.append(NgramCounts(seen, _host(target_count), distinct))

    def score(self, mixer: Mixer, start: int, stop: int) -> None:
        """Let the mixer, as it stands, score every token at the samples among targets start..stop-1."""
        for row in np.flatnonzero((self.position > start) & (self.position <= stop)):
            counts = [NgramCounts(*(c if c is None else c[row] for c in order)) for order in self.counts]
            rows = ([np.broadcast_to(r, self.vocab_size) for r in rows] for rows in mixer.experts(counts))
            entropy = self.entropy[row].repeat(self.vocab_size)
            self.learned[row] = mixer.mix(Evidence(self.logp[row], entropy, *rows).part(slice(None)))

    def finish(self, log_odds: np.ndarray) -> None:
        """Add up the probabilities, blended at the log-odds (N,) of the stream."""
        self.mass = np.exp(blend(self.logp, self.learned, log_odds[self.position - 1, None])).sum(1)
