"""What mixing costs per scored token, counts included, and what it gains; beside a table-based mixer.

    python bench/mixing.py [--tokens N] [--quick]

The neural model is a
stand-in that knows the synthetic stream's Markov steps only roughly. The table-based mixer follows the
description of PR 1094, token by token, over fewer tokens. Microseconds are CPU time of this process, on
one core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as m
from bench import common
from bench.counts import synthetic_tokens

VOCAB_SIZE = 1024
BUCKETS = 1 << 22
COUNT_BLOCK = 8192  # 128 windows of stride 64
MIXERS: dict[str, dict[str, Any]] = {
    "default": dict(mixer="backoff"),
    "published, exact counts": dict(mixer="backoff-published"),
    "published, hashed counts": dict(
        mixer="backoff-published", ngram_counts="hashed", ngram_buckets=BUCKETS, ngram_block=COUNT_BLOCK
    ),
    "hedge": dict(mixer="hedge"),
}


class TableMixer:
    """Hash tables per order, asked and filled one token at a time."""

    def __init__(self, max_order: int = 10) -> None:
        self.orders = range(max_order, 1, -1)
        self.context_table = {order: np.zeros(BUCKETS, np.uint32) for order in self.orders}
        self.target_table = {order: np.zeros(BUCKETS, np.uint32) for order in self.orders}
        self.unigrams = np.zeros(VOCAB_SIZE, np.int64)

    def buckets(self, tokens: np.ndarray, i: int, order: int) -> tuple[int, int]:
        context = 0
        for k in range(order - 1):
            context ^= int(tokens[i - order + 1 + k]) * m.HASH_MULTIPLIERS[k % 7]
        target = context ^ int(tokens[i]) * m.HASH_MULTIPLIERS[(order - 1) % 7]
        return context & (BUCKETS - 1), target & (BUCKETS - 1)

    def probability(self, tokens: np.ndarray, i: int) -> float:
        for order in self.orders:
            if i >= order - 1:
                context, target = self.buckets(tokens, i, order)
                seen = int(self.context_table[order][context])
                if seen:
                    return min(int(self.target_table[order][target]), seen) / seen
        return (self.unigrams[tokens[i]] + 0.5) / (self.unigrams.sum() + 0.5 * VOCAB_SIZE)

    def add(self, tokens: np.ndarray, start: int, stop: int) -> None:
        self.unigrams += np.bincount(tokens[start:stop], minlength=VOCAB_SIZE)
        for order in self.orders:
            for i in range(start + order - 1, stop):
                context, target = self.buckets(tokens, i, order)
                self.context_table[order][context] += 1
                self.target_table[order][target] += 1

    def mix(self, tokens: np.ndarray, logp: np.ndarray, entropy: np.ndarray) -> np.ndarray:
        mixed = np.empty(len(logp))
        for start in range(1, len(tokens), COUNT_BLOCK):
            stop = min(start + COUNT_BLOCK, len(tokens))
            for i in range(start, stop):
                alpha = 0.20 + 0.55 / (1 + np.exp(-2 * (entropy[i - 1] - 3.0)))
                p = (1 - alpha) * np.exp(logp[i - 1]) + alpha * self.probability(tokens, i)
                mixed[i - 1] = np.log(max(p, 1e-12))
            self.add(tokens, start if start > 1 else 0, stop)
        return mixed


def stand_in_scores(tokens: np.ndarray, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability and entropy (N - 1,) of a smoothed bigram model, fitted to half the stream's pairs."""
    rng = np.random.default_rng(seed)
    sample = rng.random(len(tokens) - 1) < 0.5
    pairs = tokens[:-1].astype(np.int64) * VOCAB_SIZE + tokens[1:]
    table = np.bincount(pairs[sample], minlength=VOCAB_SIZE**2).reshape(VOCAB_SIZE, VOCAB_SIZE) + 1.0
    table /= table.sum(1, keepdims=True)
    entropy = -(table * np.log(table)).sum(1)
    return np.log(table.ravel()[pairs]).astype(np.float32), entropy[tokens[:-1]].astype(np.float32)


def timed(mix: Callable[[], np.ndarray], name: str, neural: np.ndarray) -> dict[str, float | str]:
    cpu, wall = time.process_time(), time.perf_counter()
    mixed = mix()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "mixer": name,
        "tokens": len(mixed),
        "us_per_token": cpu / len(mixed) * 1e6,
        "wall_us_per_token": wall / len(mixed) * 1e6,
        "neural_bits": round(float(-neural[: len(mixed)].mean(dtype=np.float64) / np.log(2)), 4),
        "mixed_bits": round(float(-mixed.mean() / np.log(2)), 4),
    }


def main() -> None:
    parser = common.arguments(__doc__, threads=1)
    parser.add_argument("--tokens", type=common.positive, default=4_000_000, help="scored tokens (default 4,000,000)")
    parser.add_argument("--table-tokens", type=common.positive, default=50_000, help="tokens for the table-based mixer")
    args = parser.parse_args()
    num_tokens, table_tokens = (400_000, 10_000) if args.quick else (args.tokens, args.table_tokens)
    tokens = synthetic_tokens(num_tokens + 1)
    logp, entropy = stand_in_scores(tokens)

    ids, rows = torch.from_numpy(tokens.astype(np.int64)), []
    for name, settings in MIXERS.items():
        mixer = m.make_mixer(m.Config(vocab_size=VOCAB_SIZE, **settings))
        assert mixer is not None
        rows.append(timed(lambda mixer=mixer: m.mix_scores(mixer, ids, logp, entropy), name, logp))
    few = slice(table_tokens)
    rows.append(
        timed(lambda: TableMixer().mix(tokens[: table_tokens + 1], logp[few], entropy[few]), "tables", logp)
    )
    default, tables = rows[0], rows[-1]
    what = "mixing with its counts, a scored token"
    headlines = [
        common.Headline(what, float(default["us_per_token"]), "µs of CPU", 2.5, at_least=False),
        common.Headline(f"{what}, by tables token by token", float(tables["us_per_token"]), "µs of CPU"),
    ]
    print("bits are per token; those of hashed counts and tables are no code lengths")
    common.report("mixing", headlines, None, 1, mixers=rows)


if __name__ == "__main__":
    main()
