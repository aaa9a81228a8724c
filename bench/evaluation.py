"""How many windows and targets does the sliding-window scorer take in a second?

    python bench/evaluation.py [--device cuda] [--seq-len 2048] [--stride 64] [--batches 4] [--world 8]

The full-size model with random weights scores a random stream through the scorer that a run uses. Shorter windows and
a stride of the whole window show the growth: there every position gets logits, elsewhere only the scored tail.
The projection is for the contest's 62,021,632 targets on `--world` such devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common
from bench.train_step import QUICK

CONTEST_TARGETS = 62_021_632  # of the published validation split


def random_tokens(config: train_gpt.Config, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(4, config.vocab_size, count).astype(np.uint16)


def make_scorer(config: train_gpt.Config, runtime: train_gpt.Runtime, num_tokens: int) -> train_gpt.WindowScorer:
    attend = train_gpt.choose_attention(config.attention, runtime.device)[1]
    model = train_gpt.GPT(dataclasses.replace(config, mtp_num_heads=0), attend).to(runtime.device)
    return train_gpt.WindowScorer(model, config, runtime, random_tokens(config, num_tokens))


def measure(config: train_gpt.Config, runtime: train_gpt.Runtime, batches: int, repeats: int) -> dict[str, Any]:
    """Windows and targets a second over `batches` full batches of windows that score `eval_stride` targets each."""
    windows_timed = batches * config.eval_batch_seqs
    num_targets = config.eval_seq_len + windows_timed * config.eval_stride
    windows = train_gpt.plan_windows(num_targets, config.eval_seq_len, config.eval_stride)
    scorer = make_scorer(config, runtime, num_targets + 1)
    # All but the first window, which scores all it sees.
    seconds = common.timed(lambda: scorer.score_all(windows, 1, windows_timed + 1), 1, repeats, runtime.device)
    rate = windows_timed / statistics.median(seconds)
    row: dict[str, Any] = dict(seq_len=config.eval_seq_len, stride=config.eval_stride, batch=config.eval_batch_seqs)
    return row | dict(windows_per_s=rate, targets_per_s=rate * config.eval_stride, **common.spread(seconds))


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--seq-len", type=common.positive, help="default 2048; 1024 on a CPU")
    parser.add_argument("--stride", type=common.positive, default=64)
    parser.add_argument("--batch-seqs", type=common.positive, help="windows at a time (default: recipe's; 1 on a CPU)")
    parser.add_argument("--batches", type=common.positive, help="timed at a time (default 4; 2 on a CPU)")
    parser.add_argument("--world", type=common.positive, default=8)
    args = parser.parse_args()
    report(args, train_gpt.Config.from_env({"RECIPE": "leaky"}))


def report(args: argparse.Namespace, config: train_gpt.Config) -> None:
    runtime = common.open_runtime(args, config)
    on_cuda = runtime.device.type == "cuda"
    batches, repeats = args.batches or (4 if on_cuda else 2), 5 if on_cuda else 2
    values: dict[str, Any] = dict(
        eval_seq_len=args.seq_len or (2048 if on_cuda else 1024), eval_stride=args.stride,
        eval_batch_seqs=args.batch_seqs or (config.eval_batch_seqs if on_cuda else 1),
    )  # fmt: skip
    config = dataclasses.replace(config, **values | (QUICK if args.quick else {}))
    shapes = [(config.eval_seq_len, config.eval_stride)]
    shapes += [(config.eval_seq_len // 2, config.eval_stride), (config.eval_seq_len, config.eval_seq_len)]
    rows = [
        measure(dataclasses.replace(config, eval_seq_len=length, eval_stride=stride), runtime, batches, repeats)
        for length, stride in shapes
    ]
    first = rows[0]
    shape = f"windows of {first['seq_len']}, stride {first['stride']}"
    headlines = [
        common.Headline(f"sliding window, {shape}", first["windows_per_s"], "windows/s"),
        common.Headline(f"sliding window, {shape}", first["targets_per_s"], "scored tokens/s"),
    ]
    if on_cuda and not args.quick:
        what = f"scoring the contest's split, {args.world} such GPUs (projected)"
        projected_s = CONTEST_TARGETS / first["targets_per_s"] / args.world
        headlines.append(common.Headline(what, projected_s, "s"))
    common.report(
        "evaluation", headlines, runtime.device, args.threads, windows=rows, compiled=on_cuda,
        peak_memory_mib=common.peak_memory_mib(runtime.device),
    )  # fmt: skip


if __name__ == "__main__":
    main()
