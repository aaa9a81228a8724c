"""How fast is one forward and backward pass of the full 11-layer model, and what is left of the machine's peak?

    python bench/forward_backward.py [--seqs 1] [--seq-len 512] [--threads 2] [--no-compile] [--recipe leaky]

Eager and compiled passes take turns in one process. The peak is the best rate of a 1024×1024 matrix product in the
same process. On a CPU the passes also run shorter and shallower, which shows how the time grows.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common
from bench.train_step import QUICK

EARLIER_TOKENS_PER_S = 473  # of the earlier submissions on two such cores, eager


def one_pass(
    model: train_gpt.GPT, losses: Callable[..., tuple[torch.Tensor, ...]], seqs: int, seq_len: int, qat: bool
) -> Callable[[], None]:
    """An action: forward and backward of fixed random tokens (seqs, seq_len)."""
    config, device = model.config, model.tok_emb.weight.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, config.vocab_size, (seqs, seq_len + 1), generator=generator).to(device)

    def run() -> None:
        _, weighted, further = losses(tokens[:, :-1], tokens[:, 1:], qat)
        (weighted + config.mtp_loss_weight * further).backward()

    return run


def growth(args: argparse.Namespace, config: train_gpt.Config, runtime: train_gpt.Runtime) -> list[dict]:
    """Eager passes over fewer tokens and through fewer layers."""
    rows = []
    shapes = [(config.num_layers, args.seq_len // part) for part in (4, 2, 1)]
    shapes += [(layers, args.seq_len) for layers in (3, 6)] if config.num_layers > 6 else []
    for layers, seq_len in shapes:
        ve_layers = tuple(layer for layer in config.ve_layers if layer < layers)
        xsa = min(layers, config.xsa_last_n)
        repeated = tuple(layer for layer in config.repeat_layers if layer < layers)
        shape = dataclasses.replace(
            config, num_layers=layers, ve_layers=ve_layers, xsa_last_n=xsa, repeat_layers=repeated
        )
        model = train_gpt.GPT(shape, initialize=False).to(runtime.device)
        torch.nn.init.normal_(model.tok_emb.weight)
        for name in train_gpt.BANK_NAMES:
            torch.nn.init.normal_(model.get_parameter(name), std=0.02)
        run = one_pass(model, model.training_losses, args.seqs, seq_len, args.qat)
        seconds = common.timed(run, 1, 1 if args.quick else 3, runtime.device)
        tokens, best = args.seqs * seq_len, min(seconds)
        each = 1e6 * best / tokens / layers
        rows.append(dict(layers=layers, tokens=tokens, ms=1e3 * best, us_per_token_and_layer=each))
    return rows


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--recipe", default="leaky", choices=sorted(train_gpt.RECIPES))
    parser.add_argument("--seqs", type=common.positive, default=1)
    parser.add_argument("--seq-len", type=common.positive, default=512)
    parser.add_argument("--burn-in", type=int, default=2)
    parser.add_argument("--passes", type=common.positive, default=9)
    parser.add_argument("--no-compile", action="store_true", help="eager only")
    parser.add_argument("--qat", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.seq_len, args.passes, args.burn_in = 32, 1, 1
    config = train_gpt.Config.from_env({"RECIPE": args.recipe})
    shape: dict[str, Any] = QUICK if args.quick else {}
    config = dataclasses.replace(config, **shape | dict(train_seq_len=args.seq_len))
    runtime = common.open_runtime(args, config)
    device = runtime.device
    model = train_gpt.GPT(config, train_gpt.choose_attention("auto", device)[1]).to(device)
    peak = common.gemm_flops_per_second(device, model.dtype, 256 if args.quick else 1024)
    losses: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {"eager": model.training_losses}
    actions = {"eager": one_pass(model, losses["eager"], args.seqs, args.seq_len, args.qat)}
    compile_s = None
    if not args.no_compile:
        cache = tempfile.TemporaryDirectory()  # of this run alone: what an earlier one compiled would be found again
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
        losses["compiled"] = torch.compile(model.training_losses, dynamic=False, fullgraph=True)
        actions["compiled"] = one_pass(model, losses["compiled"], args.seqs, args.seq_len, args.qat)
        began = time.perf_counter()
        actions["compiled"]()
        compile_s = time.perf_counter() - began
    queued = {name: lambda action=action: (action(), common.synchronize(device)) for name, action in actions.items()}
    times = common.timed_in_turn(queued, args.burn_in, args.passes, time.perf_counter)
    tokens, flops = args.seqs * args.seq_len, common.train_flops_per_token(config, args.seq_len)
    rows, headlines = [], []
    for name, seconds in times.items():
        rate = tokens / statistics.median(seconds)
        share = rate * flops / peak
        rows.append(dict(kind=name, tokens_per_s=rate, share_of_gemm_peak=share, **common.spread(seconds)))
        what = f"forward and backward, {args.seqs}×{args.seq_len}, {name}"
        floor = EARLIER_TOKENS_PER_S * (1.0 if name == "eager" else 1.15)
        at_that_shape = device.type == "cpu" and (args.seqs, args.seq_len, args.recipe) == (1, 512, "leaky")
        headlines.append(common.Headline(what, rate, "tokens/s", floor if at_that_shape else None))
    if compile_s is not None:
        ratio = statistics.median(times["eager"]) / statistics.median(times["compiled"])
        headlines.append(common.Headline("compiled against eager, forward and backward", ratio, "×"))
        headlines.append(common.Headline("compiling forward and backward", compile_s, "s"))
    common.report(
        "forward_backward", headlines, device, args.threads, recipe=args.recipe, tokens=tokens, qat=args.qat,
        gemm_gflops=peak / 1e9, mflop_per_token=flops / 1e6, passes=rows, growth=growth(args, config, runtime),
        peak_memory_mib=common.peak_memory_mib(device),
    )  # fmt: skip


if __name__ == "__main__":
    main()
