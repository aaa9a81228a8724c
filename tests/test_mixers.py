"""Mixers: distributions, causal, never much worse than the neural model, and as published where meant so.

Run from the repository root: `python -m pytest tests/test_mixers.py`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import golden_backoff
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt as m

VOCAB_SIZE = 12
BLOCK = 50


def make(mixer: str = "backoff", ngram_order: int = 5, min_tokens: int = 100, **settings: Any) -> m.Mixer:
    """A mixer as a config makes it; hedge with fewer targets left to the neural model than its 10,000."""
    made = m.make_mixer(m.Config(mixer=mixer, ngram_order=ngram_order, **{"vocab_size": VOCAB_SIZE, **settings}))
    assert made is not None
    if isinstance(made, m.HedgeMixer):
        made.min_tokens = min_tokens
    return made


def default_mixer(ngram_order: int = 10) -> m.BackoffNgramMixer:
    return m.BackoffNgramMixer(m.Config(ngram_order=ngram_order))


class SeesItsTarget(m.BackoffNgramMixer):
    """Counts each target before it is scored: C + 1 and F + 1. What the probe finds anew knows nothing of it."""

    def counts(self, tokens: Tensor, probe: m.MassProbe | None = None) -> Iterator[m.NgramCounts]:
        own = 1 if probe is None else 0
        for seen, followed, distinct in super().counts(tokens, probe):
            yield m.NgramCounts(seen + own, followed + own, distinct)


MAKERS: dict[str, Callable[[], m.Mixer]] = {
    "default": lambda: make("backoff"),
    "published, exact": lambda: make("backoff-published"),
    "published, exact, min count 2": lambda: make("backoff-published", ngram_min_count=2),
    "hedge": lambda: make("hedge"),
}
VIOLATORS: dict[str, Callable[[], m.Mixer]] = {
    "published, hashed": lambda: make("backoff-published", ngram_counts="hashed", ngram_buckets=16, ngram_block=20),
    "hedge with the entropy expert": lambda: make("hedge", entropy_expert=True),
}
ALL = {**MAKERS, **VIOLATORS}


class Scored(NamedTuple):
    """A stream with the neural model's whole distributions (N, V) for tokens[1:]."""

    tokens: np.ndarray
    scores: np.ndarray

    @property
    def logp(self) -> np.ndarray:
        return self.scores[np.arange(len(self.scores)), self.tokens[1:]].astype(np.float32)

    @property
    def entropy(self) -> np.ndarray:
        return -(np.exp(self.scores) * self.scores).sum(1).astype(np.float32)

    def mix(self, mixer: m.Mixer, probe: m.MassProbe | None = None) -> np.ndarray:
        return m.mix_scores(mixer, torch.from_numpy(self.tokens), self.logp, self.entropy, probe, BLOCK)

    def probe(self, position: np.ndarray) -> m.MassProbe:
        return m.MassProbe(position, self.scores[position - 1], self.entropy[position - 1])


def scored_stream(num_tokens: int = 400, seed: int = 0) -> Scored:
    """Text in which phrases recur, and a neural model that knows little."""
    rng = np.random.default_rng(seed)
    phrases = rng.integers(0, VOCAB_SIZE, (6, 9))
    tokens = np.concatenate([phrases[rng.integers(6)] for _ in range(num_tokens // 9 + 1)])[:num_tokens]
    noise = rng.random(num_tokens) < 0.1
    tokens[noise] = rng.integers(0, VOCAB_SIZE, noise.sum())
    logits = rng.normal(size=(num_tokens - 1, VOCAB_SIZE)) * rng.choice([0.3, 3.0], (num_tokens - 1, 1))
    return Scored(tokens, logits - np.logaddexp.reduce(logits, 1, keepdims=True))


def uniform_scores(num_targets: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    nats = np.full(num_targets, np.log(vocab_size), np.float32)
    return -nats, nats


# ---- condition 2: a distribution over the vocabulary


@pytest.mark.parametrize("name", MAKERS)
def test_mass_is_one_before_and_after_updates(name: str) -> None:
    stream = scored_stream()
    probe = stream.probe(np.arange(1, len(stream.tokens)))
    stream.mix(MAKERS[name](), probe)
    np.testing.assert_allclose(probe.mass, 1, atol=1e-6)


@pytest.mark.parametrize("name", VIOLATORS)
def test_the_probe_exposes_violators(name: str) -> None:
    stream = scored_stream()
    probe = stream.probe(np.arange(150, 400, 10))
    stream.mix(VIOLATORS[name](), probe)
    assert np.abs(probe.mass - 1).max() > 0.1


@pytest.mark.parametrize("name", MAKERS)
def test_the_stream_scores_what_the_probe_states(name: str) -> None:
    stream = scored_stream()
    probe = stream.probe(np.arange(1, len(stream.tokens)))
    mixed = stream.mix(MAKERS[name](), probe)
    assert probe.gap.max() < m.GAP_TOLERANCE
    came = probe.distributions[np.arange(len(mixed)), stream.tokens[1:]]
    np.testing.assert_allclose(probe.gap, np.abs(np.log(came) - mixed), atol=1e-12)


def test_a_mixer_that_counts_its_own_target_has_mass_one_and_a_gap() -> None:
    """The distributions found anew add up, but they are not what the stream was scored by."""
    stream = scored_stream()
    probe = stream.probe(np.arange(1, 400, 5))
    mixed = stream.mix(SeesItsTarget(m.Config(ngram_order=5)), probe)
    assert mixed.mean() > stream.mix(MAKERS["default"]()).mean() + 0.1
    assert np.abs(probe.mass - 1).max() < 1e-6
    assert probe.gap.max() > 1000 * m.GAP_TOLERANCE
    assert np.median(probe.gap) > 1000 * m.GAP_TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_the_probe_answers_what_a_changed_text_would_score(name: str) -> None:
    """Each token really put in place of the target, everything counted anew."""
    stream = scored_stream(260)
    position = np.array([1, 2, 60, 101, 219, 259])
    probe = stream.probe(position)
    mixed = stream.mix(ALL[name](), probe)
    masses = []
    for at in position:
        answers = []
        for token in range(VOCAB_SIZE):
            tokens = stream.tokens.copy()
            tokens[at] = token
            answers.append(stream._replace(tokens=tokens).mix(ALL[name]())[at - 1])
        assert answers[stream.tokens[at]] == mixed[at - 1]
        masses.append(np.exp(answers).sum())
    np.testing.assert_allclose(probe.mass, masses, rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_probe_changes_nothing(name: str) -> None:
    stream = scored_stream()
    np.testing.assert_array_equal(
        stream.mix(ALL[name](), stream.probe(np.array([7, 300]))), stream.mix(ALL[name]())
    )


def test_a_stream_without_targets_mixes_to_nothing() -> None:
    nothing = np.zeros(0, np.float32)
    assert m.mix_scores(default_mixer(), torch.tensor([1]), nothing, nothing).shape == (0,)


# ---- conditions 1 and 3: only the past decides, and a block is scored before it is learned from


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("at", [1, 99, 100, 101, 250, 398])
def test_changing_a_target_changes_nothing_before_it(name: str, at: int) -> None:
    stream = scored_stream()
    tokens = stream.tokens.copy()
    tokens[at:] = (tokens[at:] + 1 + np.arange(len(tokens) - at) % 5) % VOCAB_SIZE
    before, after = stream.mix(ALL[name]()), stream._replace(tokens=tokens).mix(ALL[name]())
    np.testing.assert_array_equal(before[: at - 1], after[: at - 1])
    assert not np.array_equal(before, after)


def test_each_block_is_mixed_before_the_update() -> None:
    calls = []

    class Spy(m.BackoffNgramMixer):
        def mix(self, block: m.Evidence) -> np.ndarray:
            calls.append(("mix", len(block.logp), self.taken.sum()))
            return super().mix(block)

        def update(self, block: m.Evidence) -> None:
            calls.append(("update", len(block.logp), self.taken.sum()))
            super().update(block)

    scored_stream(131).mix(Spy(m.Config(ngram_order=5)))
    assert [call[:2] for call in calls] == [
        (name, size) for size in (50, 50, 30) for name in ("mix", "update")
    ]
    learned = [call[2] for call in calls]
    assert learned[0] == learned[1] < learned[2] == learned[3] < learned[4] == learned[5]


def test_buckets_ignore_the_target() -> None:
    mixer = default_mixer(4)
    counts = list(mixer.counts(torch.from_numpy(scored_stream().tokens)))
    blind = [order._replace(target_count=order.target_count * 0) for order in counts]
    np.testing.assert_array_equal(mixer.experts(counts)[1], mixer.experts(blind)[1])


# ---- never much worse than the neural model, better on repeats


@given(st.lists(st.integers(0, 3), min_size=2, max_size=300), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_any_text_costs_at_most_one_bit_more_than_the_neural_model(tokens: list[int], seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(len(tokens) - 1, VOCAB_SIZE)) * 2
    stream = Scored(np.array(tokens), logits - np.logaddexp.reduce(logits, 1, keepdims=True))
    mixed = m.mix_scores(default_mixer(4), torch.from_numpy(stream.tokens), stream.logp, stream.entropy, block=10)
    assert stream.logp.sum(dtype=np.float64) - mixed.sum() <= np.log(2) + 1e-5


def test_a_text_that_turns_against_the_counts_costs_at_most_one_bit() -> None:
    rng = np.random.default_rng(1)
    tokens = np.concatenate([np.tile(rng.integers(0, 256, 300), 2), rng.integers(0, 256, 20_000)])
    tokens[600::2] = tokens[600]  # a context that never keeps its promise
    logp, entropy = uniform_scores(len(tokens) - 1, 256)
    mixed = m.mix_scores(default_mixer(), torch.from_numpy(tokens), logp, entropy)
    assert logp.sum(dtype=np.float64) - mixed.sum() <= np.log(2) + 1e-5


def test_random_tokens_cost_nothing() -> None:
    tokens = np.random.default_rng(0).integers(0, 1024, 100_001)
    logp, entropy = uniform_scores(100_000, 1024)
    mixed = m.mix_scores(default_mixer(), torch.from_numpy(tokens), logp, entropy)
    assert (logp - mixed).mean() / np.log(2) / 2.4 < 0.00001


def test_repeated_text_is_learned() -> None:
    tokens = np.tile(np.random.default_rng(0).integers(0, 1024, 20_001), 2)
    logp, entropy = uniform_scores(len(tokens) - 1, 1024)
    mixed = m.mix_scores(default_mixer(), torch.from_numpy(tokens), logp, entropy)
    assert -mixed[20_100:].mean() < 0.05 * np.log(1024)


def test_a_perfect_neural_model_is_kept() -> None:
    tokens = golden_backoff.text(6000)
    logp = np.full(5999, -0.01, np.float32)
    mixed = m.mix_scores(default_mixer(), torch.from_numpy(tokens), logp, np.full(5999, 0.05, np.float32))
    assert logp.sum(dtype=np.float64) - mixed.sum() <= np.log(2) + 1e-5


def test_a_target_that_the_neural_model_ruled_out_does_not_spoil_the_rest() -> None:
    """Its probability is 0 in fp32, and no count has seen it either."""
    stream = scored_stream()
    stream.tokens[200] = VOCAB_SIZE - 1
    stream.tokens[:200][stream.tokens[:200] == VOCAB_SIZE - 1] = 0
    logp = stream.logp
    logp[199] = -120.0
    mixed = m.mix_scores(default_mixer(), torch.from_numpy(stream.tokens), logp, stream.entropy, block=BLOCK)
    assert np.isfinite(mixed).all()
    assert logp.sum(dtype=np.float64) - mixed.sum() <= np.log(2) + 1e-5


def test_guard_is_the_bayesian_mixture_of_two_sequence_models() -> None:
    neural, learned = np.log(np.random.default_rng(0).random((2, 200)))
    blended = m.blend(neural, learned, m.guard(neural, learned))
    total = np.logaddexp(neural.cumsum(), learned.cumsum()) - np.log(2)
    np.testing.assert_allclose(blended.cumsum(), total)


# ---- the arithmetic


def test_chain_and_em_by_hand() -> None:
    """Two orders, one target: q_1 = .8 q_0 + .2 g_1, q_2 = .7 q_1 + .3 g_2."""
    mixer = default_mixer(2)
    mixer.reached[:] = 10.0
    mixer.taken[0], mixer.taken[1] = 2.0, 3.0
    counts = [m.NgramCounts(*(np.array([x], np.int32) for x in triple)) for triple in ((8, 2, 4), (4, 3, 2))]
    expert, bucket = mixer.experts(counts)
    block = m.Evidence(np.log([0.1]), np.array([2.5]), expert, bucket).part(slice(None))
    q_1 = 0.8 * 0.1 + 0.2 * 0.25
    q_2 = 0.7 * q_1 + 0.3 * 0.75
    np.testing.assert_allclose(mixer.mix(block), np.log([q_2]))
    mixer.update(block)
    by_2 = 0.3 * 0.75 / q_2
    by_1 = (1 - by_2) * 0.2 * 0.25 / q_1
    np.testing.assert_allclose(mixer.taken.max((1, 2)), [2 + by_1, 3 + by_2])
    np.testing.assert_allclose(mixer.reached.max((1, 2)), [10 + 1 - by_2, 11])


COUNT_EDGES = (1, 2, 3, 5, 10, 30, 100, 1000)  # of C
NOVELTY_EDGES = [Fraction(edge) for edge in ("0.03", "0.1", "0.2", "0.35", "0.6", "1")]  # of T/C
ENTROPY_EDGES = (1.0, 2.0, 3.0, 4.0, 5.0)  # nats


class Counted(NamedTuple):
    """C, F and T of one target under one order."""

    context: int
    target: int
    distinct: int

    def bucket(self, entropy: float) -> tuple[int, int, int]:
        """How many edges C, T/C and the entropy reach; T = 1 has a place of its own."""
        novelty = sum(Fraction(self.distinct, max(self.context, 1)) >= edge for edge in NOVELTY_EDGES)
        certain = len(NOVELTY_EDGES) + 1 if self.distinct == 1 else novelty
        return sum(self.context >= edge for edge in COUNT_EDGES), certain, sum(entropy >= e for e in ENTROPY_EDGES)


def count_slowly(tokens: list[int], max_order: int) -> list[list[Counted]]:
    """For each target tokens[1:], what the tokens before it say of it, a row of orders 1 to max_order."""
    followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    rows = []
    for i, token in enumerate(tokens):
        contexts = [tuple(tokens[i - reach : i]) for reach in range(min(max_order, i + 1))]
        told = [followers[context] for context in contexts]
        row = [Counted(seen.total(), seen[token], len(+seen)) for seen in told]
        rows.append(row + [Counted(0, 0, 0)] * (max_order - len(row)))
        for seen in told:
            seen[token] += 1
    return rows[1:]


def mix_slowly(stream: Scored, max_order: int, block: int) -> list[float]:
    """The default mixer target by target: EM over which order, or the neural model, a target came from.

    A target is asked for from the highest order down: order k gives it from its counts with probability w_k, else the
    next lower one is asked, and the neural model last.
    """
    counts = count_slowly(stream.tokens.tolist(), max_order)
    reached: dict[Any, float] = defaultdict(lambda: 1.1)
    taken: dict[Any, float] = defaultdict(lambda: 0.1)
    mixed, neural_total, learned_total = [], 0.0, 0.0
    for start in range(0, len(counts), block):
        stop = min(start + block, len(counts))
        tallies = []
        for i in range(start, stop):
            cells = [(k, *order.bucket(stream.entropy[i])) for k, order in enumerate(counts[i])]
            share = [taken[cell] / reached[cell] if order.context else 0.0 for cell, order in zip(cells, counts[i])]
            came_from, passed_on = [0.0] * max_order, 1.0
            for k in reversed(range(max_order)):
                came_from[k] = passed_on * share[k] * counts[i][k].target / max(counts[i][k].context, 1)
                passed_on *= 1 - share[k]
            from_neural = passed_on * math.exp(stream.logp[i])
            total = from_neural + sum(came_from)
            for k, cell in enumerate(cells):
                tallies.append((cell, (from_neural + sum(came_from[: k + 1])) / total, came_from[k] / total))
            before = np.logaddexp(neural_total, learned_total)  # of two sequence models with prior 1/2 each
            neural_total += float(stream.logp[i])
            learned_total += math.log(total)
            mixed.append(float(np.logaddexp(neural_total, learned_total) - before))
        for cell, asked, gave in tallies:
            reached[cell] += asked
            taken[cell] += gave
    return mixed


@pytest.mark.parametrize("max_order", [1, 3, 6])
def test_the_default_mixer_is_online_em_over_the_order_that_a_target_came_from(max_order: int) -> None:
    stream = scored_stream(1200, seed=2)
    mixed = stream.mix(make("backoff", ngram_order=max_order))
    np.testing.assert_allclose(mixed, mix_slowly(stream, max_order, BLOCK), rtol=0, atol=1e-5)
    assert mixed.sum() > stream.logp.sum() + 100  # enough was learned for the tolerance to mean something


def test_hedge_weights_by_hand() -> None:
    mixer = make("hedge", vocab_size=4, min_tokens=0)
    assert isinstance(mixer, m.HedgeMixer)
    expert = np.array([[0.5, 0.25], [0.1, 0.2], [0.3, 0.4], [0.6, 0.7]])
    logp, entropy = np.log([0.2, 0.8]), np.array([1.0, 0.5])
    block = m.Evidence(logp, entropy, expert, np.ones((1, 2), bool))
    p = np.vstack([np.exp(logp), expert])
    weight = np.exp([2.0, 0, 0, 0, 0]) / np.exp([2.0, 0, 0, 0, 0]).sum()
    np.testing.assert_allclose(mixer.mix(block), np.log(weight @ p))
    mixer.update(block)
    np.testing.assert_allclose(mixer.log_weight, np.array([2.0, 0, 0, 0, 0]) + 0.1 * np.log(p).mean(1))
    published = make("hedge", vocab_size=4, min_tokens=0, entropy_expert=True)
    p[4] = np.exp(-entropy)
    np.testing.assert_allclose(published.mix(block), np.log(weight @ p))


def test_hedge_leaves_the_neural_model_alone_at_first() -> None:
    stream = scored_stream()
    mixer = make("hedge", min_tokens=200)
    assert isinstance(mixer, m.HedgeMixer)
    mixed = stream.mix(mixer)
    np.testing.assert_array_equal(mixed[:199], stream.logp[:199].astype(np.float64))
    assert (mixed[199:] != stream.logp[199:]).all()
    assert m.HedgeMixer(m.Config()).log_weight[0] == 2.0 != mixer.log_weight[0]


@pytest.mark.parametrize("buckets", [4096, 4194304])
def test_hashed_rule_agrees_with_the_published_numbers(buckets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the reference a context never reaches back beyond the 1,000 inputs of its block."""
    tokens = golden_backoff.text()
    position = np.arange(len(tokens))
    block_start = (position - 1) // golden_backoff.BLOCK * golden_backoff.BLOCK
    counts = []
    for order, (seen, followed, _) in enumerate(
        m.iter_hashed_counts(torch.from_numpy(tokens), 10, buckets, golden_backoff.BLOCK), start=1
    ):
        inside = position - (order - 1) >= block_start if order > 1 else True
        counts.append(m.NgramCounts(seen * inside, followed))
    mixer = make("backoff-published", vocab_size=1024, ngram_counts="hashed", ngram_buckets=buckets)
    expert, _ = mixer.experts(counts)
    with np.load(golden_backoff.ARCHIVE) as golden:
        np.testing.assert_allclose(
            expert[0][1:], golden[f"buckets{buckets}/min_tokens0/ngram_p_alpha1"], rtol=1e-6, atol=2e-12
        )
        logp, entropy = golden_backoff.neural_scores(tokens)
        monkeypatch.setattr(mixer, "counts", lambda _: iter(counts))
        nll = -m.mix_scores(mixer, torch.from_numpy(tokens), logp, entropy, block=golden_backoff.BLOCK)
        min_tokens = 5000 if buckets == 4096 else 0  # counted before the published rule was used at all
        nll = np.where(counts[0].context_count[1:] >= min_tokens, nll, -logp)
        recorded = golden[f"buckets{buckets}/min_tokens{min_tokens}/nll"]
        np.testing.assert_allclose(nll, recorded, rtol=1e-4, atol=2e-5)
