"""How fast is one forward and backward pass of the full 11-layer model?

    python bench/forward_backward.py [--seqs 1] [--seq-len 512] [--threads 2] [--compile] [--recipe leaky]

Burn-in apart from timing; a table for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt


def measure(config: train_gpt.Config, args: argparse.Namespace) -> list[float]:
    """Seconds of each timed pass over (seqs, seq_len) random tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, attend = train_gpt.choose_attention("auto", device)
    model = train_gpt.GPT(config, attend).to(device)
    losses = torch.compile(model.training_losses, dynamic=False) if args.compile else model.training_losses
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, config.vocab_size, (args.seqs, args.seq_len + 1), generator=generator).to(device)
    seconds = []
    for i in range(args.burn_in + args.passes):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        _, weighted, further = losses(tokens[:, :-1], tokens[:, 1:], args.qat)
        (weighted + config.mtp_loss_weight * further).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= args.burn_in:
            seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--recipe", default="leaky", choices=sorted(train_gpt.RECIPES))
    parser.add_argument("--seqs", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--burn-in", type=int, default=2)
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--qat", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = train_gpt.Config.from_env({"RECIPE": args.recipe})
    config = dataclasses.replace(config, train_seq_len=args.seq_len)
    seconds = measure(config, args)
    tokens = args.seqs * args.seq_len
    result = {
        "bench": "forward_backward",
        "recipe": args.recipe,
        "tokens": tokens,
        "threads": args.threads,
        "compiled": args.compile,
        "qat": args.qat,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "median_s": statistics.median(seconds),
        "best_s": min(seconds),
        "tokens_per_s": tokens / statistics.median(seconds),
        "best_tokens_per_s": tokens / min(seconds),
    }
    print(f"{args.recipe}: {tokens} tokens a pass, {args.threads} threads, compiled={args.compile}, qat={args.qat}")
    print(f"median {result['tokens_per_s']:.0f} tokens/s, best {result['best_tokens_per_s']:.0f} tokens/s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
