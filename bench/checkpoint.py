"""What does a checkpoint cost: the training step's wait, the thread's writing, and reading it back?

    python bench/checkpoint.py [--device cpu|cuda] [--threads 1] [--repeats 4] [--quick]

The record's model with its optimizers' state, saved to a temporary folder. `stall` is what training waits for its
copies; writing goes on beside it, and `pause` is the longest that it keeps the training thread from the interpreter
meanwhile. A table for people, one JSON line last.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common, train_step


def main() -> None:
    parser = common.arguments(__doc__, threads=1)
    parser.add_argument("--repeats", type=common.positive, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes: dict[str, Any] = dict(train_batch_tokens=2048, compile=False) | (train_step.QUICK if args.quick else {})
        config = train_step.bench_config("swarm", Path(folder), **sizes)
        runtime = common.open_runtime(args, config)
        train_step.write_random_shard(Path(folder), config, 10_000)
        trainer = train_step.make_trainer(dataclasses.replace(config, device=args.device), runtime)
        trainer.checkpoints = checkpoints = train_gpt.Checkpoints(config, runtime, trainer.log)
        trainer.optimizers.step(0.0, 0.9, 0.0)  # so that AdamW has its moments
        rows = []
        for _ in range(args.repeats + 1):
            trainer.save()
            writing = checkpoints.pending
            assert writing is not None
            pause_ms = 1000 * common.longest_pause_s(lambda writing=writing: not writing.done())
            checkpoints.finish()
            began = time.perf_counter()
            path = checkpoints.numbered()[-1]
            train_gpt.read_state(path.read_bytes(), path)
            cost = checkpoints.cost
            read_s = time.perf_counter() - began
            kept = {name: cost[name] for name in ("stall_ms", "write_s", "bytes")}
            rows.append(kept | dict(pause_ms=pause_ms, read_s=read_s))
        train_step.close(trainer)
    rows = rows[1:]  # the first one meets cold caches
    names = ("stall_ms", "write_s", "pause_ms", "read_s")
    stall, write, pause, read = (common.spread([row[name] for row in rows]) for name in names)
    name = f"checkpoint of {rows[0]['bytes'] / 1e6:.0f} MB"
    headlines = [
        common.Headline(f"{name}: training waits", stall["median"], "ms"),
        common.Headline(f"{name}: written beside training", write["median"], "s"),
        common.Headline(f"{name}: longest pause of training meanwhile", pause["median"], "ms"),
        common.Headline(f"{name}: read and verified", read["median"], "s"),
    ]
    common.report("checkpoint", headlines, runtime.device, args.threads, saves=rows)


if __name__ == "__main__":
    main()
