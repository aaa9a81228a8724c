"""What do attention by blocks, and an allocator that keeps freed memory, do for a training step on a CPU?

    python bench/cpu_step.py [--recipe laptop] [--threads 2] [--rounds 3] [--steps 6]

First attention alone, forward and backward, by blocks and by SDPA in turn, over sequences of several lengths. Then
whole steps of the recipe, each way in a process of its own, since what the C library was told to keep it keeps to the
end; the processes take turns. A step's time is the shortest of its process, a ratio that of the rounds' medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common, train_step

WAYS = {"as runs do": ("blocks", True), "memory given back": ("blocks", False), "sdpa": ("sdpa", True)}
TOKENS = 4096  # of one pass, what a CPU takes by default
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64  # those of RECIPE=laptop


def attention_rows(dtype: torch.dtype, lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of TOKENS tokens by both ways, for sequences of each length."""
    rows = []
    for length in lengths:
        shapes = [(TOKENS // length, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
        upstream = torch.randn(shapes[0]).to(dtype)

        def run(name: str, values: list[torch.Tensor] = inputs, gradient: torch.Tensor = upstream) -> None:
            attend = train_gpt.choose_attention(name, torch.device("cpu"))[1]
            torch.autograd.grad(attend(*values), values, gradient)

        seconds = common.timed_in_turn({name: lambda name=name: run(name) for name in ("blocks", "sdpa")}, 2, repeats)
        best_ms = {f"{name}_ms": 1e3 * min(spent) for name, spent in seconds.items()}
        rows.append(dict(dtype=str(dtype)[6:], length=length, **best_ms))
    return rows


def step_seconds(args: Any) -> None:
    """In a child: print the shortest of some training steps, one way."""
    with tempfile.TemporaryDirectory() as folder:
        shape = train_step.QUICK | dict(train_batch_tokens=512) if args.quick else {}
        config = train_step.bench_config(args.recipe, Path(folder), compute_dtype=args.dtype, **shape)
        attention, keeps = WAYS[args.as_way]
        if not keeps:
            train_gpt.keep_freed_memory = lambda: None
        runtime = common.open_runtime(args, config)
        train_step.write_random_shard(Path(folder), config, 8 * config.train_batch_tokens + 1)
        trainer = train_step.make_trainer(config, runtime, attention)
        seconds = train_step.measure(trainer, 2, args.steps)
        train_step.close(trainer)
    print(json.dumps(min(seconds)), flush=True)
    os._exit(0)


def child_seconds(args: Any, way: str, dtype: str) -> float:
    words = [f"--as-way={way}", f"--dtype={dtype}", f"--recipe={args.recipe}", f"--steps={args.steps}"]
    words += [f"--threads={args.threads}", "--device=cpu", *["--quick"] * args.quick]
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--recipe", default="laptop", choices=sorted(train_gpt.RECIPES))
    parser.add_argument("--rounds", type=common.positive, default=3)
    parser.add_argument("--steps", type=common.positive, default=6)
    parser.add_argument("--as-way", choices=WAYS, help="for the processes that this script starts")
    parser.add_argument("--dtype", default="fp32", help="for them too")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps = 1, 2
    if args.as_way:
        step_seconds(args)
    torch.set_num_threads(args.threads)
    bf16_pays = train_gpt.bf16_pays(torch.device("cpu"))
    dtypes = ["bf16", "fp32"] if bf16_pays else ["fp32"]
    lengths = [256] if args.quick else [256, 512, 1024, 2048]
    attention, steps, headlines = [], [], []
    for dtype in dtypes:
        attention += attention_rows(train_gpt.COMPUTE_DTYPES[dtype], lengths, 3 if args.quick else 10)
        spent: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, seconds in spent.items():
                seconds.append(child_seconds(args, way, dtype))
        medians = {way: statistics.median(seconds) for way, seconds in spent.items()}
        steps += [dict(dtype=dtype, way=way, ms=1e3 * median) for way, median in medians.items()]
        for row in attention[-len(lengths) :]:
            what = f"attention over {row['length']} tokens by SDPA against blocks, {dtype}"
            headlines.append(common.Headline(what, row["sdpa_ms"] / row["blocks_ms"], "×"))
        before = f"step of {args.recipe}, {dtype}"
        others = {"by SDPA against blocks": "sdpa", "memory given back against kept": "memory given back"}
        for what, way in others.items():
            headlines.append(common.Headline(f"{before}: {what}", medians[way] / medians["as runs do"], "×"))
    common.report("cpu_step", headlines, None, args.threads, recipe=args.recipe, attention=attention, steps=steps)


if __name__ == "__main__":
    main()
