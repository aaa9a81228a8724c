"""Is the model right on this GPU, and how fast is it? One command of under ten minutes on one Hopper GPU.

    python bench/gpu_check.py [--budget-s 480] [--only NAME …] [--out FILE]
    python bench/gpu_check.py --device cpu --quick        # its plumbing, on a CPU

Correctness first, at full size: logits in fp32 against the recorded vectors and against the CPU, bf16 against fp32,
every attention backend against SDPA in fp32, compiled against eager with QAT off and on, fake quantization bit for bit,
and the record's training step with no recompilation and no host synchronisation. Then the rates: the training step with
each attention backend and micro-batch size, its memory and where its time goes, evaluation, test-time training and
counts, with the seconds that they take on eight GPUs. A check that fails or cannot run here is named, the others go on;
the exit code is 1 when one failed. What does not fit into the budget any more is skipped, and said to be.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common, evaluation, golden, train_step, ttt
from bench.counts import synthetic_tokens
from bench.evaluation import CONTEST_TARGETS

WORLD = 8  # GPUs that a projection is for
BACKENDS = ("fa3", "cudnn", "sdpa", "blocks")
# Tolerances. fp32 sums in another order: 1e-4 of the norm. bf16 keeps 8 bits, a relative error of 2^-9 a rounding;
# over 11 layers the logits may move by 5 % of their norm and the mean loss by 0.02 nats. A backend rounds its
# probabilities and its output once: 1 %. Fusing in fp32 moves roundings alone, in bf16 it leaves some out.
FP32_LIMIT, BF16_LIMIT, BF16_NATS, ATTENTION_LIMIT = 1e-4, 0.05, 0.02, 0.01
COMPILED_LIMIT = {torch.float32: 1e-4, torch.bfloat16: BF16_LIMIT}


class SkipCheck(Exception):
    """This check cannot run here; the text says why."""


@dataclasses.dataclass
class Finding:
    """One line of the outcome; `ok` is None for a plain measurement."""

    what: str
    value: float
    unit: str = ""
    limit: float | None = None
    ok: bool | None = None

    @classmethod
    def within(cls, what: str, value: float, limit: float, unit: str = "") -> Finding:
        return cls(what, value, unit, limit, value <= limit)  # NaN is not within anything


@dataclasses.dataclass
class Bench:
    """What the checks share: settings, device, a folder with a random train shard."""

    args: argparse.Namespace
    config: train_gpt.Config
    runtime: train_gpt.Runtime
    folder: Path
    ends_at: float

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def need_cuda(self, why: str) -> None:
        if not self.on_cuda:
            raise SkipCheck(why)

    def left_s(self) -> float:
        return self.ends_at - time.perf_counter()

    def randomized(self, backend: str = "auto") -> train_gpt.GPT:
        """A model of the config whose every parameter is away from where training starts."""
        model = train_gpt.GPT(self.config, train_gpt.choose_attention(backend, self.device)[1])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                width = parameter.size(-1) if parameter.ndim > 1 else 25
                parameter.add_(torch.randn(parameter.shape, generator=generator) / width**0.5)
        return model.to(self.device)

    def tokens(self, rows: int) -> tuple[Tensor, Tensor]:
        """ids and targets of random text, (rows, train_seq_len)."""
        generator = torch.Generator().manual_seed(2)
        shape = (rows, self.config.train_seq_len + 1)
        ids = torch.randint(4, self.config.vocab_size, shape, generator=generator).to(self.device)
        return ids[:, :-1], ids[:, 1:]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64 on the host; NaN where anything is."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


# ----------------------------------------------------------------------------------------------------------
# Correctness
# ----------------------------------------------------------------------------------------------------------
def check_golden(bench: Bench) -> Iterator[Finding]:
    """Logits of the recorded 11-layer model, fp32, on this device."""
    torch.set_float32_matmul_precision("highest")
    arrays = golden.golden_arrays("model_1081")
    model = golden.golden_model().to(bench.device)
    model.compute_dtype = torch.float32
    with torch.no_grad():
        logits = model.logits(torch.tensor(arrays["x"]).to(bench.device)).cpu()
    rows = logits[tuple(arrays["positions"].T)]
    error = float((rows - torch.tensor(arrays["logits_rows"])).abs().max())
    yield Finding.within("recorded logits, fp32, largest difference", error, 5e-4)


def check_fp32(bench: Bench) -> Iterator[Finding]:
    """Logits at full size, fp32, on this device against the CPU."""
    bench.need_cuda("it would compare the CPU with itself")
    torch.set_float32_matmul_precision("highest")
    model, (ids, _) = bench.randomized("sdpa"), bench.tokens(1)
    model.compute_dtype = torch.float32
    with torch.no_grad():
        found = model.logits(ids)
        expected = model.cpu().logits(ids.cpu())
    yield Finding.within("fp32 logits at full size against the CPU", relative_error(found, expected), FP32_LIMIT)


def check_bf16(bench: Bench) -> Iterator[Finding]:
    """bf16 matrix products against fp32 ones."""
    torch.set_float32_matmul_precision("highest")
    model, (ids, targets) = bench.randomized("sdpa"), bench.tokens(2)
    outcomes = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_dtype = dtype
        with torch.no_grad():
            outcomes[dtype] = (model.logits(ids), float(model.training_losses(ids, targets, False)[0]))
    (exact, exact_loss), (rounded, rounded_loss) = outcomes[torch.float32], outcomes[torch.bfloat16]
    yield Finding.within("bf16 logits against fp32", relative_error(rounded, exact), BF16_LIMIT)
    yield Finding.within("bf16 loss against fp32", abs(rounded_loss - exact_loss), BF16_NATS, "nats")


def available_backends(bench: Bench) -> dict[str, train_gpt.Attention]:
    """The attention backends that can be chosen on this device."""
    found = {}
    for name in BACKENDS:
        try:
            found[name] = train_gpt.choose_attention(name, bench.device)[1]
        except train_gpt.ConfigError as error:
            print(f"  SKIPPED attention {name}: {error}")
    return found


def check_attention(bench: Bench) -> Iterator[Finding]:
    """Each backend's output and gradients against SDPA in fp32, and its time."""
    config, dtype = bench.config, torch.bfloat16 if bench.on_cuda else torch.float32
    rows = max(1, config.micro_batch_tokens // config.train_seq_len) if bench.on_cuda else 1
    generator = torch.Generator(device=bench.device).manual_seed(3)
    widths = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    shapes = [(rows, config.train_seq_len, heads, config.head_dim) for heads in widths]
    inputs = [torch.randn(shape, generator=generator, device=bench.device).to(dtype) for shape in shapes]

    def run(attend: train_gpt.Attention, values: list[Tensor]) -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in values]
        out = attend(*leaves)
        out.float().square().sum().backward()
        gradients = [leaf.grad for leaf in leaves]
        return [out, *(gradient for gradient in gradients if gradient is not None)]

    few = [value[:2] for value in inputs]
    expected = run(train_gpt.sdpa_attention, [value.float() for value in few])
    for name, attend in available_backends(bench).items():
        found = run(attend, few)
        worst = max(map(relative_error, found, expected))
        yield Finding.within(f"attention {name} against SDPA in fp32, output and gradients", worst, ATTENTION_LIMIT)
        seconds = common.timed(lambda attend=attend: run(attend, inputs), 2, 5, bench.device)
        what = f"attention {name}, forward and backward, {rows}×{config.train_seq_len}"
        yield Finding(what, 1e3 * min(seconds), "ms")


def check_compiled(bench: Bench) -> Iterator[Finding]:
    """Compiled losses and gradients against eager ones, QAT off and on."""
    model, (ids, targets) = bench.randomized(), bench.tokens(2)
    compiled = torch.compile(model.training_losses, dynamic=False, fullgraph=True)

    def run(losses: Callable[..., tuple[Tensor, ...]], qat: bool) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        main, weighted, further = losses(ids, targets, qat)
        (weighted + 0.1 * further).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return main.detach(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])

    limit = COMPILED_LIMIT[model.dtype]
    losses = {}
    for qat in (False, True):
        (loss, gradient), (own_loss, own_gradient) = run(model.training_losses, qat), run(compiled, qat)
        losses[qat] = float(loss)
        label = f"compiled against eager, QAT {'on' if qat else 'off'}"
        yield Finding.within(f"{label}, loss", abs(float(own_loss) - float(loss)), limit, "nats")
        yield Finding.within(f"{label}, gradients", relative_error(own_gradient, gradient), limit)
    moved = abs(losses[True] - losses[False])
    yield Finding("what QAT moves the loss by (0 would mean that it does nothing)", moved, "nats", None, moved > 0)


def check_grid(bench: Bench) -> Iterator[Finding]:
    """QAT's value against decode(encode) on the CPU, bit for bit, eager and compiled."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(8, 96, 512, generator=generator) * torch.logspace(-6, 2, 96)[:, None]
    compiled = torch.compile(train_gpt.fake_quantize, dynamic=False)
    for bits in (5, 6, 7, 8):
        expected = train_gpt.Grid(bits).round_trip(weight)
        for function in (train_gpt.fake_quantize, compiled):
            differing = int((function(weight.to(bench.device), bits).cpu() != expected).sum())
            kind = "compiled" if function is compiled else "eager"
            yield Finding.within(f"int{bits} fake quantization, {kind}, values unlike the artifact's", differing, 0)


def check_step(bench: Bench) -> Iterator[Finding]:
    """Steps of the trainer with QAT off and on: recompilations and host synchronisations in the timed window."""
    trainer = train_step.make_trainer(bench.config, bench.runtime)
    trainer.config = dataclasses.replace(bench.config, warmup_steps=2)
    trainer.warm_up()
    before = train_gpt.compile_count()
    syncs, steps = 0, 6
    reads = train_step.HostReads()
    for number in range(steps):
        trainer.controls.qat = number >= steps // 2
        if number % (steps // 2) == 0:
            bench.runtime.synchronize()
        if bench.on_cuda:
            torch.cuda.set_sync_debug_mode("error")
            try:
                trainer.one_step()
            except RuntimeError as error:
                if "synchroniz" not in str(error).lower():
                    raise
                syncs += 1
                print(f"  a step synchronised: {str(error).splitlines()[0]}")
            finally:
                torch.cuda.set_sync_debug_mode("default")
        else:
            with reads:
                trainer.one_step()
    recompiled = train_gpt.compile_count() - before
    train_step.close(trainer)
    if train_gpt.wants_compile(trainer.config, trainer.runtime):
        yield Finding.within(f"recompilations in {steps} steps, QAT off and on", recompiled, 0)
    else:
        print("  SKIPPED recompilations: nothing is compiled on a CPU unless COMPILE=1")
    how = "torch's sync debug mode" if bench.on_cuda else "operations that read values back"
    yield Finding.within(f"host synchronisations in {steps} steps, by {how}", syncs + reads.count, 0)


# ----------------------------------------------------------------------------------------------------------
# Rates
# ----------------------------------------------------------------------------------------------------------
def measure_step(bench: Bench, backend: str, micro_batch_tokens: int) -> Iterator[Finding]:
    """Rate, utilisation, memory of the record's step on one device."""
    config = dataclasses.replace(bench.config, micro_batch_tokens=micro_batch_tokens)
    if bench.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer = train_step.make_trainer(config, bench.runtime, backend)
    began = time.perf_counter()
    trainer.one_step()
    common.synchronize(bench.device)
    first_s = time.perf_counter() - began
    seconds = train_step.measure(trainer, 2, 5 if bench.on_cuda else 2)
    rate = config.train_batch_tokens / common.spread(seconds)["median"]
    label = f"training step, {backend}, micro-batches of {micro_batch_tokens:,}"
    yield Finding(label, rate, "tokens/s")
    flops, peak = common.train_flops_per_token(config, config.train_seq_len), common.datasheet_peak(bench.device)
    if peak:
        utilisation = 100 * rate * flops / peak
        yield Finding(f"{label}, utilisation at {flops / 1e6:.0f} MFLOP a token", utilisation, "% of bf16 peak")
    yield Finding(f"{label}, peak memory", common.peak_memory_mib(bench.device), "MiB")
    yield Finding(f"{label}, first step", first_s, "s")
    if backend == chosen_backend(bench) and micro_batch_tokens == bench.config.micro_batch_tokens:
        for row in train_step.phase_shares(trainer, 2):
            yield Finding(f"{label}: {row['part']}", 100 * row["share"], "% of the step")
    train_step.close(trainer)


def chosen_backend(bench: Bench) -> str:
    return train_gpt.choose_attention("auto", bench.device)[0]


def check_rates(bench: Bench) -> Iterator[Finding]:
    """The chosen backend first, then other micro-batch sizes with it, then the other backends."""
    base = bench.config.micro_batch_tokens
    chosen = chosen_backend(bench)
    cases = [(chosen, base), (chosen, 2 * base), (chosen, base // 2)]
    cases += [(name, base) for name in available_backends(bench) if name != chosen]
    reserve_s = 90 if bench.on_cuda else 0  # for evaluation, test-time training and counts
    longest_s = 0.0
    for backend, micro_batch_tokens in cases:
        if bench.left_s() < reserve_s + longest_s:
            print(f"  SKIPPED {backend}, micro-batches of {micro_batch_tokens:,}: no time left")
            continue
        began = time.perf_counter()
        try:
            yield from measure_step(bench, backend, micro_batch_tokens)
        except torch.OutOfMemoryError:
            print(f"  SKIPPED {backend}, micro-batches of {micro_batch_tokens:,}: out of memory")
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            yield Finding(f"{backend}, micro-batches of {micro_batch_tokens:,}: {reason}", math.nan, ok=False)
        torch.compiler.reset()  # each shape compiles anew; none shall run into the limit of recompilations
        gc.collect()
        longest_s = max(longest_s, time.perf_counter() - began)


def check_evaluation(bench: Bench) -> Iterator[Finding]:
    """Scored tokens a second of the sliding window, and seconds for the contest's split."""
    config = dataclasses.replace(bench.config, mtp_num_heads=0)
    row = evaluation.measure(config, bench.runtime, 4 if bench.on_cuda else 1, 3)
    shape = f"windows of {config.eval_seq_len}, stride {config.eval_stride}"
    yield Finding(f"sliding window, {shape}", row["targets_per_s"], "scored tokens/s")
    if bench.on_cuda:
        what, seconds = f"scoring the contest's split on {WORLD} GPUs", CONTEST_TARGETS / row["targets_per_s"] / WORLD
        yield Finding.within(f"{what} (projected)", seconds, train_gpt.STAGE_BUDGET_S, "s")


def check_ttt(bench: Bench) -> Iterator[Finding]:
    """Tokens a second of test-time training, and seconds for the contest's split."""
    config = dataclasses.replace(bench.config, mtp_num_heads=0)
    seqs = config.ttt_batch_seqs if bench.on_cuda else 2
    row = ttt.measure(config, bench.runtime, seqs, 3)
    yield Finding("test-time training", row["tokens_per_s"], "tokens/s")
    if bench.on_cuda:
        compiled = ttt.measure(config, bench.runtime, seqs, 3, compiled=True)
        yield Finding("test-time training if it were compiled", compiled["tokens_per_s"], "tokens/s")
        yield Finding("test-time training if it were compiled, first batch", compiled["first_s"], "s")
        seconds = CONTEST_TARGETS * config.ttt_epochs / row["tokens_per_s"] / WORLD
        what = f"training on the contest's split, {config.ttt_epochs} epochs, {WORLD} GPUs (projected)"
        yield Finding.within(what, seconds, train_gpt.STAGE_BUDGET_S, "s")
    recipe = train_gpt.FRONTIER
    chunk = min(recipe["ttt_chunk_tokens"], config.eval_seq_len)
    config = dataclasses.replace(config, ttt_rank=recipe["ttt_rank"], ttt_chunk_tokens=chunk)
    row = ttt.measure_by_document(config, bench.runtime, 64 if bench.on_cuda else 4)
    yield Finding("scoring and training by document", row["targets_per_s"], "targets/s")
    if bench.on_cuda:
        seconds = CONTEST_TARGETS / row["targets_per_s"] / WORLD
        what = f"the contest's split by document, {WORLD} GPUs (projected)"
        yield Finding.within(what, seconds, train_gpt.STAGE_BUDGET_S, "s")


def check_counts(bench: Bench) -> Iterator[Finding]:
    """Exact counts on this device: equal to the host's, and how long they take."""
    few = torch.from_numpy(synthetic_tokens(20_000).astype(np.int64))
    both = zip(train_gpt.iter_ngram_counts(few.to(bench.device), 10), train_gpt.iter_ngram_counts(few, 10))
    differing = sum(int((a != b).sum()) for own, reference in both for a, b in zip(own, reference))
    yield Finding.within("counts of 20,000 tokens that differ from the host's", differing, 0)
    for size in (4_000_000, 62_021_632) if bench.on_cuda else (50_000,):
        tokens = torch.from_numpy(synthetic_tokens(size).astype(np.int64)).to(bench.device)
        common.synchronize(bench.device)
        began = time.perf_counter()
        for _ in train_gpt.iter_ngram_counts(tokens, 10):
            pass
        common.synchronize(bench.device)
        yield Finding(f"exact counts, orders 1-10, {size:,} tokens", time.perf_counter() - began, "s")


CHECKS: dict[str, Callable[[Bench], Iterator[Finding]]] = {
    "golden": check_golden,
    "fp32": check_fp32,
    "bf16": check_bf16,
    "attention": check_attention,
    "grid": check_grid,
    "compiled": check_compiled,
    "step": check_step,
    "rates": check_rates,
    "evaluation": check_evaluation,
    "ttt": check_ttt,
    "counts": check_counts,
}


def run_check(name: str, bench: Bench) -> dict[str, Any]:
    """One check's findings and how it ended; a failure of one loses none of the others."""
    row: dict[str, Any] = dict(check=name, status="done", findings=[])
    began = time.perf_counter()
    print(f"{name}: {(CHECKS[name].__doc__ or '').strip()}", flush=True)
    try:
        for finding in CHECKS[name](bench):
            verdict = {True: "ok", False: "FAILED", None: ""}[finding.ok]
            bound = f" (at most {finding.limit:g})" if finding.limit is not None else ""
            print(f"  {finding.what}: {finding.value:,.6g} {finding.unit}{bound} {verdict}".rstrip(), flush=True)
            row["findings"].append(dataclasses.asdict(finding))
            if finding.ok is False:
                row["status"] = "failed"
    except SkipCheck as reason:
        row |= dict(status="skipped", reason=str(reason))
        print(f"  SKIPPED: {reason}")
    except (RuntimeError, ValueError, ImportError, AssertionError, AttributeError, train_gpt.UserError) as error:
        row |= dict(status="failed", reason=f"{type(error).__name__}: {error}")
        print(f"  FAILED: {row['reason'].splitlines()[0]}", flush=True)
    if bench.on_cuda:
        torch.set_float32_matmul_precision("high")
        torch.cuda.empty_cache()
    return row | dict(seconds=round(time.perf_counter() - began, 1))


def bench_config(args: argparse.Namespace, folder: Path) -> train_gpt.Config:
    """The record's configuration; with --quick one that takes seconds on a CPU."""
    values: dict[str, Any] = {}
    if args.quick:
        values = train_step.QUICK | dict(
            train_batch_tokens=512, mtp_num_heads=1, eval_batch_seqs=4, ttt_chunk_tokens=64, ttt_freeze_blocks=1,
        )  # fmt: skip
    return train_step.bench_config("swarm", folder, device=args.device, **values)


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--budget-s", type=float, default=480.0, help="what would begin later is skipped (default 480)")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), metavar="NAME", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--out", type=Path, help="write the last line to this file as well")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.quick:
        parser.error("torch finds no CUDA device; --device cpu --quick tries the script itself")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        config = bench_config(args, Path(name))
        runtime = common.open_runtime(args, config)
        # As a run chooses it; twice and half as many are tried too.
        fitting = min(train_gpt.fitting_tokens(config, runtime, itemsize=2), config.train_batch_tokens)
        config = dataclasses.replace(config, micro_batch_tokens=fitting)
        train_step.write_random_shard(Path(name), config, 4 * config.train_batch_tokens + 1)
        bench = Bench(args, config, runtime, Path(name), began + args.budget_s)
        rows = []
        for check in args.only or CHECKS:
            if bench.left_s() > 0:
                rows.append(run_check(check, bench))
            else:
                rows.append(dict(check=check, status="skipped", reason="no time left", findings=[], seconds=0.0))
                print(f"{check}:\n  SKIPPED: no time left")
    print(common.table({name: row[name] for name in ("check", "status", "seconds")} for row in rows))
    skipped = [row["check"] for row in rows if row["status"] == "skipped"]
    failed = [row["check"] for row in rows if row["status"] == "failed"]
    print(f"skipped: {', '.join(skipped) or 'none'}; failed: {', '.join(failed) or 'none'}")
    if not bench.on_cuda:
        print("this ran on a CPU: it shows that the script works and says nothing about a GPU")
    result = common.report("gpu_check", [], runtime.device, args.threads, quick=args.quick, failed=failed, checks=rows)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
