"""How long exact causal n-gram counts take, and how time and memory grow with the stream.

Run from the repository root: `python -m bench.counts [--tokens N] [--quick]`. The stream is synthetic: many
Markov chains with heavy-tailed steps, some of them repeated, so that every order finds contexts again.
Seconds are this process's CPU time on one core, wall time beside it; peak memory is of the whole process.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as m

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
    tokens = synthetic_tokens(num_tokens)
    wall, cpu = time.perf_counter(), time.process_time()
    matched = [int((counts.context_count > 0).sum()) for counts in m.iter_ngram_counts(tokens, max_order)]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "tokens": num_tokens,
        "cpu_s": round(cpu, 3),
        "wall_s": round(wall, 3),
        "us_per_token": round(cpu / num_tokens * 1e6, 3),
        "peak_mib": round(peak_mib),
        "highest_order_matched": round(matched[-1] / num_tokens, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4_000_000, help="longest stream (default 4,000,000)")
    parser.add_argument("--max-order", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="400,000 tokens")
    args = parser.parse_args()
    longest = 400_000 if args.quick else args.tokens
    rows = [measure(longest // part, args.max_order) for part in (8, 4, 2, 1)]
    print(f"exact counts, orders 1-{args.max_order}, one core")
    print(" ".join(f"{name:>22}" for name in rows[0]))
    for row in rows:
        print(" ".join(f"{value:>22,}" for value in row.values()))
    versions = {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
    print(json.dumps({"bench": "counts", "max_order": args.max_order, "growth": rows, **versions}))


if __name__ == "__main__":
    main()
