"""How fast is a training step, and where does its time go?

    python bench/train_step.py [--device cuda] [--recipe swarm] [--batch-tokens N] [--micro-batch-tokens N] [--world 8]

The step is the trainer's own: batch from shards on disk, forward, backward, clipping, Muon, AdamW, weight average. On
CUDA the batch is the record's and utilisation is against the data sheet's bf16 peak; on a CPU the batch is small and
utilisation is against a matrix product measured in the same run. The shares are of the step's time: the phases are
timed apart, and forward and backward are divided by torch.profiler. Batches of several sizes show the growth.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common

# Of the passes alone, in which only attention by blocks has batched products and a softmax.
ATTENTION_NAMES = ("attention", "flash", "fmha", "sdpa", "aten::bmm", "aten::baddbmm", "aten::_softmax")
GEMM_NAMES = ("aten::mm", "aten::addmm", "gemm", "cutlass", "nvjet", "xmma", "cublas")
QUICK = dict(
    num_layers=2, model_dim=64, num_heads=2, num_kv_heads=1, ve_layers=(1,), ve_dim=16, bigram_dim=16, xsa_last_n=1,
    bigram_vocab_size=64, train_seq_len=64, eval_seq_len=64, eval_stride=16, mtp_num_heads=0,
    repeat_layers=(), ttt_freeze_blocks=0,
)  # fmt: skip


def bench_config(recipe: str, folder: Path, **values: Any) -> train_gpt.Config:
    """The recipe as it runs in mid-training, with its files in `folder` and nothing logged."""
    config = train_gpt.Config.from_env({"RECIPE": recipe})
    quiet: dict[str, Any] = dict(
        data_path=str(folder), out_dir=str(folder), run_id="bench", train_log_every=10**9, val_loss_every=0,
        swarm_every=10**9, repeat_from=0.0,
    )  # fmt: skip
    return dataclasses.replace(config, **quiet, **values).validate()


def write_random_shard(folder: Path, config: train_gpt.Config, tokens: int) -> None:
    """One train shard of random tokens; what they say changes no time."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, tokens
    ids = np.random.default_rng(0).integers(4, config.vocab_size, tokens).astype("<u2")
    (folder / "bench_train_000000.bin").write_bytes(header.tobytes() + ids.tobytes())


def make_trainer(config: train_gpt.Config, runtime: train_gpt.Runtime, attention: str = "auto") -> train_gpt.Trainer:
    """A trainer past the steps that are always logged, on the shards of the config's folder."""
    attend = train_gpt.choose_attention(attention, runtime.device)[1]
    model = train_gpt.GPT(config, attend).to(runtime.device)
    stream = train_gpt.TokenStream(train_gpt.find_shards(config.data_path, "train"), config.vocab_size)
    loader = train_gpt.TokenLoader(stream, config, runtime)
    validation: Any = None  # never asked for: VAL_LOSS_EVERY is 0 and `train` is not called
    importance = torch.rand(config.vocab_size, device=runtime.device) if config.kg_enabled else None
    log = train_gpt.RunLog(config, runtime)
    trainer = train_gpt.Trainer(config, runtime, log, model, loader, validation, importance)
    trainer.step = 11
    return trainer


def close(trainer: train_gpt.Trainer) -> None:
    trainer.loader.close()
    trainer.log.close()


class HostReads(TorchDispatchMode):
    """Counts operations that make the host wait for a device: values read back, shapes that depend on values."""

    NAMES = ("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.count += name in self.NAMES or by_mask
        return func(*args, **(kwargs or {}))


def kind_of(name: str) -> str:
    lower = name.lower()
    if lower.startswith("triton_"):  # what Inductor fused, named after all the operations in it
        return "pointwise"
    if any(part in lower for part in ATTENTION_NAMES):
        return "attention"
    return "GEMM" if any(part in lower for part in GEMM_NAMES) else "pointwise"


def kernel_shares(action: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Shares of attention, GEMM and everything else in an action's kernels, by torch.profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_cuda = device.type == "cuda"
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        action()
        common.synchronize(device)
    spent: dict[str, float] = dict.fromkeys(("attention", "GEMM", "pointwise"), 0.0)
    for event in profiler.key_averages():
        if on_cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue  # an operation, whose kernels are listed by themselves
        spent[kind_of(event.key)] += event.self_device_time_total if on_cuda else event.self_cpu_time_total
    total = sum(spent.values()) or 1.0
    return {name: value / total for name, value in spent.items()}


def phase_shares(trainer: train_gpt.Trainer, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds and share of each part of one step."""
    config, device = trainer.config, trainer.runtime.device
    batches = trainer.loader.batch(0)

    def passes() -> None:
        trainer.optimizers.zero_grad()
        token_weights = trainer.token_weights(batches)
        for ids, targets in batches:
            _, weighted, further = trainer.losses(ids, targets, trainer.controls.qat, token_weights)
            (weighted + trainer.controls.mtp_weight * further).backward()

    def optimizers() -> None:
        trainer.optimizers.step(1e-3, 0.9, config.grad_clip_norm)
        trainer.average.update(100, 1.0)

    steps = iter(range(1, 10**9))
    actions = dict(passes=passes, optimizer=optimizers, data=lambda: trainer.loader.batch(next(steps)))
    seconds = {name: min(common.timed(action, 1, repeats, device)) for name, action in actions.items()}
    kernels = kernel_shares(passes, device)
    parts = {name: share * seconds["passes"] for name, share in kernels.items()}
    parts |= {"optimizer": seconds["optimizer"], "data": seconds["data"]}
    total = sum(parts.values())
    return [dict(part=name, ms=1e3 * value, share=value / total) for name, value in parts.items()]


def measure(trainer: train_gpt.Trainer, burn_in: int, repeats: int) -> list[float]:
    """Seconds of whole steps."""
    return common.timed(trainer.one_step, burn_in, repeats, trainer.runtime.device)


def growth(args: argparse.Namespace, config: train_gpt.Config, runtime: train_gpt.Runtime) -> list[dict[str, Any]]:
    """Steps on smaller batches."""
    rows = []
    for part in (4, 2):
        tokens = max(config.train_seq_len, config.train_batch_tokens // part)
        smaller = dataclasses.replace(config, train_batch_tokens=tokens)
        trainer = make_trainer(smaller, runtime)
        best = min(measure(trainer, 1, args.repeats))
        close(trainer)
        rows.append(dict(batch_tokens=tokens, ms=1e3 * best, us_per_token=1e6 * best / tokens))
    return rows


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--recipe", default="swarm", choices=sorted(train_gpt.RECIPES))
    parser.add_argument("--batch-tokens", type=common.positive, help="of a step (default: the recipe's; 2048 on a CPU)")
    parser.add_argument("--micro-batch-tokens", type=common.positive)
    parser.add_argument("--world", type=common.positive, default=1, help="run the share of one of so many ranks alone")
    parser.add_argument("--repeats", type=common.positive, default=2)
    args = parser.parse_args()
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    values: dict[str, Any] = dict(train_batch_tokens=2048, train_seq_len=512) if on_cpu else {}
    values |= QUICK | dict(train_batch_tokens=512) if args.quick else {}
    given = dict(train_batch_tokens=args.batch_tokens, micro_batch_tokens=args.micro_batch_tokens)
    values |= {name: value for name, value in given.items() if value}
    with tempfile.TemporaryDirectory() as folder:
        config = bench_config(args.recipe, Path(folder), **values)
        config = dataclasses.replace(config, train_batch_tokens=config.train_batch_tokens // args.world)
        run(args, config, Path(folder))


def run(args: argparse.Namespace, config: train_gpt.Config, folder: Path) -> None:
    runtime = common.open_runtime(args, config)
    device = runtime.device
    write_random_shard(folder, config, 8 * config.train_batch_tokens + 1)
    trainer = make_trainer(config, runtime)
    began = time.perf_counter()
    trainer.one_step()
    common.synchronize(device)
    first_s = time.perf_counter() - began
    seconds = measure(trainer, 1, args.repeats)
    memory_mib = common.peak_memory_mib(device)
    shares = phase_shares(trainer, max(1, args.repeats - 1))
    dtype = trainer.model.dtype
    close(trainer)
    measured = common.gemm_flops_per_second(device, dtype, 8192 if device.type == "cuda" else 1024)
    peak = common.datasheet_peak(device) or measured
    rate = config.train_batch_tokens / statistics.median(seconds)
    flops = common.train_flops_per_token(config, config.train_seq_len)
    shape = f"{config.train_batch_tokens:,} tokens"
    where = "data-sheet bf16 peak" if peak != measured else f"{str(dtype).removeprefix('torch.')} GEMM of the same run"
    headlines = [
        common.Headline(f"training step, {shape}", rate, "tokens/s"),
        common.Headline(f"utilisation in the training step, of the {where}", 100 * rate * flops / peak, "%"),
        common.Headline("peak memory of the training step", memory_mib, "MiB"),
        *(common.Headline(f"training step: {row['part']}", 100 * row["share"], "% of its time") for row in shares),
    ]
    common.report(
        "train_step", headlines, device, args.threads, recipe=config.recipe, batch_tokens=config.train_batch_tokens,
        seq_len=config.train_seq_len, compiled=train_gpt.wants_compile(config, runtime), first_step_s=first_s,
        step_s=common.spread(seconds), mflop_per_token=flops / 1e6, peak_tflops=peak / 1e12,
        gemm_tflops=measured / 1e12, shares=shares, growth=growth(args, config, runtime),
    )  # fmt: skip


if __name__ == "__main__":
    main()
