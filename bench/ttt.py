"""How many tokens a second does test-time training take, scoring apart?

    python bench/ttt.py [--device cuda] [--seq-len 2048] [--seqs 32] [--world 8]

The full-size model adapts to random text through the trainer that a run uses: forward, backward, clipping and update of
every unfrozen block. Tokens count once an epoch. Batches of several sizes show the growth. The projection is for the
contest's split, each token trained on TTT_EPOCHS times, on `--world` such devices. Training by document, as in
RECIPE=frontier, scores a chunk and trains on its window in one pass, so there targets count, scoring included.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common
from bench.evaluation import CONTEST_TARGETS, make_scorer, random_tokens
from bench.train_step import QUICK


class RandomText:
    """What the adapting trainer asks of a validation split."""

    def __init__(self, num_targets: int):
        self.bytes = np.ones(num_targets, np.int16)


def measure(
    config: train_gpt.Config, runtime: train_gpt.Runtime, seqs: int, repeats: int, compiled: bool = False
) -> dict[str, Any]:
    """Tokens a second of one epoch over `seqs` sequences; the run's own trainer is eager."""
    num_targets = seqs * config.eval_seq_len
    scorer = make_scorer(config, runtime, num_targets + 1)
    if compiled:
        logits: Any = torch.compile(scorer.model.logits, dynamic=False)
        scorer.model.logits = logits
    text: Any = RandomText(num_targets)
    trainer = train_gpt.ChunkTrainer(scorer.model, dataclasses.replace(config, ttt_epochs=1), runtime, text)
    epoch = range(num_targets)
    (first_s,) = common.timed(lambda: trainer.train_on(scorer, epoch, 1e-4), 0, 1, runtime.device)
    seconds = common.timed(lambda: trainer.train_on(scorer, epoch, 1e-4), 0, repeats, runtime.device)
    rate = num_targets / statistics.median(seconds)
    row = dict(seqs=seqs, seq_len=config.eval_seq_len, tokens_per_s=rate, first_s=first_s)
    return row | common.spread(seconds)


def measure_by_document(config: train_gpt.Config, runtime: train_gpt.Runtime, chunks: int) -> dict[str, Any]:
    """Targets a second of a document of so many chunks, the second time that it is scored."""
    model, num_targets = make_scorer(config, runtime, 2).model, chunks * config.ttt_chunk_tokens
    text: Any = SimpleNamespace(tokens=random_tokens(config, num_targets + 1), num_targets=num_targets)
    adapt = functools.partial(train_gpt.adapt_by_document, model, config, runtime, text)
    (seconds,) = common.timed(adapt, 1, 1, runtime.device)
    return dict(window=config.eval_seq_len, chunk=config.ttt_chunk_tokens, targets_per_s=num_targets / seconds)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--seq-len", type=common.positive, help="default 2048; 512 on a CPU")
    parser.add_argument("--seqs", type=common.positive, help="at a time (default: the recipe's; 4 on a CPU)")
    parser.add_argument("--world", type=common.positive, default=8)
    args = parser.parse_args()
    report(args, train_gpt.Config.from_env({"RECIPE": "leaky"}))


def report(args: argparse.Namespace, config: train_gpt.Config) -> None:
    runtime = common.open_runtime(args, config)
    on_cuda = runtime.device.type == "cuda"
    seqs = args.seqs or (config.ttt_batch_seqs if on_cuda else 4)
    length = args.seq_len or (config.eval_seq_len if on_cuda else 512)
    values: dict[str, Any] = dict(eval_seq_len=length, ttt_batch_seqs=seqs)
    config = dataclasses.replace(config, **values | (QUICK if args.quick else {}))
    repeats = 5 if on_cuda else 2
    rows = [measure(config, runtime, count, repeats) for count in sorted({max(1, seqs // 4), seqs})]
    whole = rows[-1]
    shape = f"{whole['seqs']}×{whole['seq_len']}"
    frontier = train_gpt.Config.from_env({"RECIPE": "frontier"})
    sizes: dict[str, Any] = dict(eval_seq_len=length) | (QUICK | dict(ttt_chunk_tokens=16) if args.quick else {})
    frontier = dataclasses.replace(frontier, **sizes)
    documents = measure_by_document(frontier, runtime, 64 if on_cuda else 4)
    what = f"scoring and training by document, 1×{frontier.eval_seq_len}"
    headlines = [
        common.Headline(f"test-time training, {shape}", whole["tokens_per_s"], "tokens/s"),
        common.Headline(what, documents["targets_per_s"], "targets/s"),
    ]
    if on_cuda and not args.quick:
        projected_s = CONTEST_TARGETS * config.ttt_epochs / whole["tokens_per_s"] / args.world
        what = f"training on the contest's split, {config.ttt_epochs} epochs, {args.world} such GPUs (projected)"
        headlines.append(common.Headline(what, projected_s, "s"))
        projected_s = CONTEST_TARGETS / documents["targets_per_s"] / args.world
        what = f"the contest's split by document, {args.world} such GPUs (projected)"
        headlines.append(common.Headline(what, projected_s, "s"))
    common.report(
        "ttt", headlines, runtime.device, args.threads, batches=rows, epochs=config.ttt_epochs, documents=documents,
        peak_memory_mib=common.peak_memory_mib(runtime.device),
    )  # fmt: skip


if __name__ == "__main__":
    main()
