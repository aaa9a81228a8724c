"""How long does a step's batch take to be read from a disk, in random order and front to back?

    python bench/reading.py [--gb 1.0] [--steps 10] [--folder DIR]

Writes shards of 200 MB with drawn tokens into DIR (default: a temporary folder), drops them from the page cache before
each batch, and reads batches of 786,432 tokens as one rank alone does: 384 sequences of 2,049 tokens, one after the
other. Of eight ranks each reads an eighth. A thread reads a batch while the step before it is computed, so it costs
nothing while it takes less than a step. What a disk's own cache holds is not dropped.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common
from bench.tiny import write_shard

SHARD_TOKENS = 100_000_000


def drop_from_cache(paths: list[Path]) -> None:
    """Have the system forget what it holds of these files' pages."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, shuffle: bool, cold: bool, steps: int) -> dict[str, Any]:
    """Milliseconds of each batch, one after the other."""
    config = train_gpt.Config.from_env({"DATA_PATH": str(folder), "SHUFFLE": str(int(shuffle)), "DEVICE": "cpu"})
    paths = train_gpt.find_shards(str(folder), "train")
    stream = train_gpt.TokenStream(paths, config.vocab_size)
    seqs = train_gpt.BatchPlan.of(config, 1).rank_seqs

    def read(step: int) -> float:
        """By a loader that has read nothing ahead."""
        loader, began = train_gpt.TokenLoader(stream, config, train_gpt.Runtime(config, {})), time.perf_counter()
        loader.batch(step)
        milliseconds = 1000 * (time.perf_counter() - began)
        loader.close()
        return milliseconds

    times = []
    for step in range(steps):
        if cold:
            drop_from_cache(paths)
        else:
            read(step)
        times.append(read(step))
    order = "random" if shuffle else "front to back"
    row = dict(order=order, cache="cold" if cold else "warm", sequences=seqs)
    return row | dict(median_ms=statistics.median(times), most_ms=max(times))


def main() -> None:
    parser = common.arguments(__doc__, threads=1)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--steps", type=common.positive, default=10)
    parser.add_argument("--folder", help="on the disk in question")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report(args, Path(folder))


def report(args: argparse.Namespace, folder: Path) -> None:
    draw = np.random.default_rng(0)
    tokens, steps = (2_000_000, 2) if args.quick else (int(args.gb * 5e8), args.steps)
    for number, first in enumerate(range(0, tokens, SHARD_TOKENS)):
        count = min(SHARD_TOKENS, tokens - first)
        write_shard(folder / f"drawn_train_{number:06}.bin", draw.integers(3, 1024, count, dtype=np.uint16))
    rows = [measure(folder, shuffle, cold, steps) for cold in (True, False) for shuffle in (False, True)]
    what = "a batch of 786,432 tokens, {cache} cache, {order}"
    headlines = [common.Headline(what.format(**row), row["median_ms"], "ms") for row in rows]
    common.report("reading", headlines, None, 1, gigabytes=2 * tokens / 1e9, rows=rows)


if __name__ == "__main__":
    main()
