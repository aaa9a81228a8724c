"""How long exact causal n-gram counts take, and how time and memory grow with the stream.

    python bench/counts.py [--tokens N] [--full] [--quick]

`--full` takes the contest's 62M targets. The stream is synthetic: many
Markov chains with heavy-tailed steps, some of them repeated, so that every order finds contexts again.
Seconds are this process's CPU time on one core, wall time beside it; peak memory is of the whole process.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as m
from bench import common

CHAIN_TOKENS = 4096


def synthetic_tokens(num_tokens: int, vocab_size: int = 1024, seed: int = 0) -> np.ndarray:
    """(num_tokens,) uint16: chains of 4,096 tokens, each step a heavy-tailed jump or a fresh draw."""
    rng = np.random.default_rng(seed)
    chains = -(-num_tokens // CHAIN_TOKENS)
    tokens = np.empty((CHAIN_TOKENS, chains), np.uint16)
    previous = rng.integers(0, vocab_size, chains)
    for row in tokens:
        jump = np.minimum(rng.pareto(1.0, chains), vocab_size).astype(np.int64)
        fresh = (vocab_size * rng.random(chains) ** 3).astype(np.int64)
        previous = np.where(rng.random(chains) < 0.85, (37 * previous + 11 + 101 * jump) % vocab_size, fresh)
        row[:] = previous
    repeated = np.flatnonzero(rng.random(chains) < 0.1)
    tokens[:, repeated] = tokens[:, rng.integers(0, chains, len(repeated))]
    return np.ascontiguousarray(tokens.T).reshape(-1)[:num_tokens]


def measure(num_tokens: int, max_order: int) -> dict[str, float]:
    tokens = torch.from_numpy(synthetic_tokens(num_tokens).astype(np.int64))
    wall, cpu = time.perf_counter(), time.process_time()
    matched = [int((counts.context_count > 0).sum()) for counts in m.iter_ngram_counts(tokens, max_order)]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "tokens": num_tokens,
        "cpu_s": cpu,
        "wall_s": wall,
        "us_per_token": cpu / num_tokens * 1e6,
        "peak_mib": common.peak_memory_mib(),
        "highest_order_matched": matched[-1] / num_tokens,
    }


def main() -> None:
    parser = common.arguments(__doc__, threads=1)
    parser.add_argument("--tokens", type=common.positive, default=4_000_000, help="longest stream (default 4,000,000)")
    parser.add_argument("--full", action="store_true", help="62,021,632 tokens: minutes, and some GiB")
    parser.add_argument("--max-order", type=common.positive, default=10)
    args = parser.parse_args()
    longest = 400_000 if args.quick else 62_021_632 if args.full else args.tokens
    rows = [measure(longest // part, args.max_order) for part in (8, 4, 2, 1)]
    last, at_full_size = rows[-1], longest >= 62_000_000
    limit = 150 if at_full_size else 6 if longest == 4_000_000 else None
    what = f"exact counts, orders 1-{args.max_order}, {longest / 1e6:g}M tokens"
    headlines = [
        common.Headline(what, last["cpu_s"], "s of CPU, one core", limit, at_least=False),
        common.Headline(
            "cost a token of those counts, against an eighth of the stream",
            last["us_per_token"] / rows[0]["us_per_token"], "×",
        ),
    ]  # fmt: skip
    if at_full_size:
        headlines.append(common.Headline(f"{what}, peak memory", last["peak_mib"], "MiB", 8192, at_least=False))
    common.report("counts", headlines, None, 1, max_order=args.max_order, growth=rows)


if __name__ == "__main__":
    main()
