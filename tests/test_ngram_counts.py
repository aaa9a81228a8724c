"""Causal n-gram counts, and what a probe counts anew, against brute force and by truncation.

Run from the repository root: `python -m pytest tests/test_ngram_counts.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import golden_backoff
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as m

torch.set_num_threads(1)

SHORT_STREAMS = st.integers(1, 4).flatmap(lambda top: st.lists(st.integers(0, top), min_size=0, max_size=40))


def brute_force(tokens: np.ndarray, order: int) -> np.ndarray:
    """(3, N) C, F and T by definition."""
    counts = np.zeros((3, len(tokens)), int)
    for i in range(order - 1, len(tokens)):
        context = list(tokens[i - order + 1 : i])
        followers = [
            tokens[j]
            for j in range(order - 1, i)
            if list(tokens[j - order + 1 : j]) == context
        ]
        counts[:, i] = len(followers), followers.count(tokens[i]), len(set(followers))
    return counts


def dictionary_counts(tokens: np.ndarray, order: int) -> np.ndarray:
    """(3, N) C, F and T by a dictionary of followers."""
    counts, followers = np.zeros((3, len(tokens)), int), defaultdict(lambda: defaultdict(int))
    for i in range(order - 1, len(tokens)):
        seen = followers[tuple(tokens[i - order + 1 : i])]
        counts[:, i] = sum(seen.values()), seen.get(tokens[i], 0), len(seen)
        seen[tokens[i]] += 1
    return counts


def as_arrays(counts: Iterable[m.NgramCounts]) -> np.ndarray:
    return np.array([[array for array in order if array is not None] for order in counts])


def exact_counts(tokens: np.ndarray, max_order: int) -> list[m.NgramCounts]:
    return list(m.iter_ngram_counts(torch.as_tensor(tokens).long(), max_order))


def probe_of(positions: Sequence[int], vocab_size: int) -> m.MassProbe:
    return m.MassProbe(np.array(positions), np.zeros((len(positions), vocab_size)), np.zeros(len(positions)))


def check_recounts(
    recounted: Iterable[m.NgramCounts], probe: m.MassProbe, tokens: np.ndarray,
    count: Callable[[np.ndarray], np.ndarray],
) -> None:  # fmt: skip
    """They are those that `count`, (orders, 2 or 3, N), finds in texts with each token in the place of a target."""
    recounted = list(recounted)
    for row, position in enumerate(probe.position):
        for token in range(probe.vocab_size):
            changed = tokens.copy()
            changed[position] = token
            expected = count(changed)[:, :, position]
            found = [(c[row, 0], f[row, token], *(() if t is None else t[row])) for c, f, t in recounted]
            np.testing.assert_array_equal(found, expected)


@given(SHORT_STREAMS)
@settings(max_examples=60, deadline=None)
def test_equals_brute_force(stream: list[int]) -> None:
    tokens = np.array(stream, np.int64)
    counts = as_arrays(exact_counts(tokens, 5))
    np.testing.assert_array_equal(counts, [brute_force(tokens, order) for order in range(1, 6)])


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.data())
@settings(max_examples=30, deadline=None)
def test_a_probe_counts_as_brute_force_does(stream: list[int], data: st.DataObject) -> None:
    tokens = np.array(stream, np.int64)
    positions = st.lists(st.integers(1, len(tokens) - 1), min_size=1, max_size=3, unique=True)
    probe = probe_of(sorted(data.draw(positions)), 5)
    counts = m.iter_ngram_counts(torch.from_numpy(tokens), 6, probe=probe)
    check_recounts(
        counts, probe, tokens, lambda text: np.array([brute_force(text, order) for order in range(1, 7)])
    )


def test_equal_groups_are_recounted_by_definition() -> None:
    rng = np.random.default_rng(0)
    tokens, group = rng.integers(0, 4, 60), rng.integers(0, 3, 60)
    probe = probe_of([1, 30, 59], 4)
    seen, followed, distinct = m.recount_group(torch.from_numpy(tokens), torch.from_numpy(group), probe)
    for row, position in enumerate(probe.position):
        followers = tokens[:position][group[:position] == group[position]]
        np.testing.assert_array_equal(followed[row], [(followers == token).sum() for token in range(4)])
        assert (seen[row], distinct[row]) == (len(followers), len(set(followers)))


@pytest.mark.parametrize("kind", ["markov", "repeated", "constant"])
def test_long_streams_equal_dictionaries(kind: str) -> None:
    """Longer than the pieces in which runs are sorted."""
    rng = np.random.default_rng(0)
    tokens = {
        "markov": golden_backoff.text(),
        "repeated": np.tile(rng.integers(0, 1024, 9000), 2),
        "constant": np.zeros(9000, np.int64),
    }[kind].astype(np.uint16)
    counts = as_arrays(exact_counts(tokens, 6))
    for order in (1, 2, 3, 6):
        np.testing.assert_array_equal(counts[order - 1], dictionary_counts(tokens, order))


def test_results_are_int32_and_unpack() -> None:
    context_count, target_count, distinct = exact_counts(np.array([3, 3, 3, 1], np.uint16), 2)[1]
    assert {array.dtype for array in (context_count, target_count, distinct)} == {np.dtype(np.int32)}
    assert list(context_count) == [0, 0, 1, 2]
    assert list(target_count) == [0, 0, 1, 0]
    assert list(distinct) == [0, 0, 1, 1]


@given(SHORT_STREAMS, st.data())
@settings(max_examples=60, deadline=None)
def test_nothing_depends_on_the_target_or_later(stream: list[int], data: st.DataObject) -> None:
    """C and T ignore the target and everything after it; F only compares the target with the past."""
    tokens = np.array([*stream, 0], np.int64)
    cut = data.draw(st.integers(0, len(tokens) - 1))
    changed = tokens.copy()
    changed[cut:] = data.draw(
        st.lists(st.integers(0, 9), min_size=len(tokens) - cut, max_size=len(tokens) - cut)
    )
    before, after = (as_arrays(exact_counts(x, 4)) for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :, :cut], after[:, :, :cut])
    np.testing.assert_array_equal(before[:, [0, 2], cut], after[:, [0, 2], cut])
    truncated = as_arrays(exact_counts(tokens[: cut + 1], 4))
    np.testing.assert_array_equal(before[:, :, : cut + 1], truncated)
    assert before[0, 0, cut] == cut


def test_streams_too_large_for_a_key_are_refused() -> None:
    with pytest.raises(ValueError, match="63-bit keys"):
        exact_counts(np.arange(5000) + (1 << 50), 2)


def hashed_brute_force(tokens: np.ndarray, order: int, buckets: int, block: int) -> np.ndarray:
    """(2, N) C and F of two count tables that each block fills after it was scored."""
    tables, counts = np.zeros((2, buckets), int), np.zeros((2, len(tokens)), int)

    def entries(i: int) -> list[int]:
        gram = [int(t) * m.HASH_MULTIPLIERS[k % 7] for k, t in enumerate(tokens[i - order + 1 : i + 1])]
        context = int(np.bitwise_xor.reduce(gram[:-1])) if gram[:-1] else 0
        return [context % buckets, (context ^ gram[-1]) % buckets]

    for start in range(1, len(tokens), block):
        stop = min(start + block, len(tokens))
        for i in range(max(start, order - 1), stop):
            counts[:, i] = tables[[0, 1], entries(i)]
        added = 0 if start == 1 else start
        for i in range(added + order - 1, stop):
            tables[[0, 1], entries(i)] += 1
    return counts


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.sampled_from([4, 64]), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_hashed_counts_equal_tables(stream: list[int], buckets: int, block: int) -> None:
    tokens = np.array(stream, np.int64)
    counts = as_arrays(m.iter_hashed_counts(torch.from_numpy(tokens), 9, buckets, block))
    np.testing.assert_array_equal(
        counts, [hashed_brute_force(tokens, order, buckets, block) for order in range(1, 10)]
    )


@pytest.mark.parametrize(("buckets", "block"), [(4, 1), (64, 7), (64, 100)])
def test_a_probe_asks_the_hash_tables_as_the_stream_does(buckets: int, block: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 5, 60)
    probe = probe_of([1, 2, 8, 30, 59], 6)
    counts = m.iter_hashed_counts(torch.from_numpy(tokens), 9, buckets, block, probe)
    check_recounts(
        counts, probe, tokens,
        lambda text: np.array([hashed_brute_force(text, order, buckets, block) for order in range(1, 10)]),
    )  # fmt: skip
