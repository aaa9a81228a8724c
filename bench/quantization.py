"""What does quantization cost, and what do QAT, CROWN-Q, soft rounding and GPTQ give back?

    python bench/quantization.py --data DIR --tokenizer FILE [--steps 600] [--out FILE.json] [--quick]

DIR holds shards made by data/prepare.py. One small model is trained up to the step where QAT would begin. From that
point the last steps are run again for every choice of QAT, bits and CROWN-Q, each time from the same weights, moments
and data; QAT also with soft rounding, which exists here alone. Every outcome is exported by `lite` and by `gptq` into
the real artifact. The tax is the bits per byte of the artifact minus those of the averaged weights that it was made
from, windows without overlap; beside it stands how far the predictions moved. A table for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import math
import sys
import tempfile
import time
import types
import unittest.mock
from pathlib import Path
from typing import Any, NamedTuple

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import train_gpt  # noqa: E402
from bench import common  # noqa: E402

SMALL: dict[str, Any] = dict(
    recipe="leaky", ve_dim=32, bigram_dim=64, warmup_steps=0, max_wallclock_seconds=0.0, muon_momentum=0.95,
    muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=60, ema_decay=0.95, val_loss_every=0,
    ttt_enabled=False,
)  # fmt: skip
QUICK: dict[str, Any] = dict(
    steps=12, layers=2, dim=32, seq_len=32, batch_tokens=128, val_tokens=600, bits=[6], qat_threshold=0.5,
    calibration_tokens=1024,
)  # fmt: skip


def make_config(args: argparse.Namespace) -> train_gpt.Config:
    import sentencepiece

    try:
        vocab_size = sentencepiece.SentencePieceProcessor(model_file=args.tokenizer).vocab_size()
    except (RuntimeError, OSError) as error:
        raise train_gpt.DataError(f"--tokenizer {args.tokenizer} is no readable SentencePiece model") from error
    shape = dict(
        vocab_size=vocab_size, num_layers=args.layers, model_dim=args.dim, num_heads=max(2, args.dim // 64),
        num_kv_heads=max(1, args.dim // 128), rope_dims=min(16, args.dim // max(2, args.dim // 64)),
        ve_layers=(args.layers - 1,), xsa_last_n=1, train_seq_len=args.seq_len, eval_seq_len=args.seq_len,
        eval_stride=args.seq_len, rope_train_len=args.seq_len, train_batch_tokens=args.batch_tokens,
        micro_batch_tokens=args.batch_tokens, iterations=args.steps, warmdown_iters=args.steps // 2,
        train_log_every=max(1, args.steps // 20), val_tokens=args.val_tokens, data_path=args.data,
        tokenizer_path=args.tokenizer, calibration_tokens=args.calibration_tokens,
    )  # fmt: skip
    return train_gpt.Config(**{**SMALL, **shape}).validate()


def quiet_log(verbose: bool) -> Any:
    """What a Trainer asks of a log: steps go to standard error, everything else nowhere."""

    def row(event: str, *_: Any, **fields: Any) -> None:
        if verbose:
            sys.stderr.write(f"{event} {fields}\n")

    return types.SimpleNamespace(row=row, tell=row, line=lambda text: None)  # noqa: ARG005


def soft_round(x: torch.Tensor, sharpness: float) -> torch.Tensor:
    """A rounding with a gradient (arXiv 2006.09952): nearly the identity at a sharpness of 1, nearly `round` at 16."""
    rest = x - x.floor() - 0.5
    return x.floor() + 0.5 + 0.5 * torch.tanh(sharpness * rest) / math.tanh(sharpness / 2)


class SoftRounding:
    """Takes the place of `fake_quantize`: the same grid and scales, soft levels, and no straight-through gradient."""

    def __init__(self) -> None:
        self.sharpness = 1.0

    def __call__(self, weight: torch.Tensor, bits: int, clip_std: float = 0.0) -> torch.Tensor:
        grid = train_gpt.Grid(bits, clip_std)
        scale = grid.scale(grid.clip(weight.detach())).float()
        return soft_round(weight / scale, self.sharpness).clamp(-grid.qmax, grid.qmax) * scale


class Way(NamedTuple):
    """How the last steps are trained."""

    qat: bool
    crown_q_lambda: float = 0.0
    soft_rounding: bool = False


class Outcome(NamedTuple):
    """One way to have ended training, and what its exports share."""

    trainer: train_gpt.Trainer
    hessians: train_gpt.Hessians
    fields: dict[str, Any]


class Bench:
    """The shared beginning of training, and ways to end it."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.config = args, make_config(args)
        self.runtime = train_gpt.Runtime(self.config, {})
        self.tokenizer = train_gpt.Tokenizer(args.tokenizer, self.config.vocab_size)
        self.validation = train_gpt.ValidationSet(self.config, self.tokenizer)
        shards = train_gpt.find_shards(args.data, "train")
        self.stream = train_gpt.TokenStream(shards, self.config.vocab_size)
        scales = [train_gpt.lr_scale_at(self.config, step, 0.0) for step in range(args.steps)]
        self.branch_step = next(step for step, scale in enumerate(scales) if scale < args.qat_threshold)
        self.trunk = self.trainer(late_qat_threshold=0.0)
        self.advance(self.trunk, self.branch_step)

    def trainer(self, **changes: Any) -> train_gpt.Trainer:
        config = dataclasses.replace(self.config, **changes).validate()
        loader = train_gpt.TokenLoader(self.stream, config, self.runtime)
        _, attend = train_gpt.choose_attention("auto", self.runtime.device)
        model = train_gpt.GPT(config, attend).to(self.runtime.device)
        log = quiet_log(self.args.verbose)
        return train_gpt.Trainer(config, self.runtime, log, model, loader, self.validation)

    def advance(self, trainer: train_gpt.Trainer, until: int) -> None:
        while trainer.step < until:
            trainer.one_step()
        self.runtime.progress()  # away with the bar

    def branch(self, **changes: Any) -> train_gpt.Trainer:
        """A trainer at the branch step, with the trunk's weights, moments and average."""
        trunk, trainer = self.trunk, self.trainer(**changes)
        trainer.step = trunk.step
        trainer.model.load_state_dict(trunk.model.state_dict())
        for own, other in zip(trainer.optimizers.muon.shards, trunk.optimizers.muon.shards):
            own.momentum.copy_(other.momentum)
        trainer.optimizers.adamw.load_state_dict(copy.deepcopy(trunk.optimizers.adamw.state_dict()))
        trainer.average.count = trunk.average.count
        torch._foreach_copy_(trainer.average.shadow, trunk.average.shadow)
        return trainer

    def bpb(self, model: train_gpt.GPT) -> float:
        arguments = (model, self.config, self.runtime, self.validation, self.config.eval_seq_len)
        return train_gpt.score_of(train_gpt.score_stream(*arguments).logp, self.validation).val_bpb

    @torch.no_grad()
    def divergence(self, before: train_gpt.GPT, after: train_gpt.GPT, windows: int = 64) -> float:
        """Mean Kullback-Leibler divergence of the predictions on the first windows, nats a token.

        It sees every change of a prediction, where changes for better and worse cancel in the bits per byte.
        """
        T = self.config.eval_seq_len
        windows = min(windows, len(self.validation.tokens) // T)
        ids = torch.from_numpy(self.validation.tokens[: windows * T].astype("int64")).view(windows, T)
        total = 0.0
        for batch in ids.to(self.runtime.device).split(8):
            old, new = (torch.log_softmax(model.logits(batch), dim=-1) for model in (before, after))
            total += (old.exp() * (old - new)).sum().item()
        return total / ids.numel()

    def advance_softly(self, trainer: train_gpt.Trainer) -> None:
        """The last steps, with the sharpness of the rounding growing from 1 to 16 in equal ratios."""
        rounding, remaining = SoftRounding(), self.args.steps - trainer.step
        with unittest.mock.patch.object(train_gpt, "fake_quantize", rounding):
            for done in range(remaining):
                rounding.sharpness = 16 ** (done / max(remaining - 1, 1))
                trainer.one_step()

    def finish(self, way: Way, bits: int) -> Outcome:
        """Train to the end in one way, average, calibrate."""
        threshold = self.args.qat_threshold if way.qat else 0.0
        trainer = self.branch(qat_bits=bits, late_qat_threshold=threshold, crown_q_lambda=way.crown_q_lambda)
        if way.soft_rounding:
            self.advance_softly(trainer)
        self.advance(trainer, self.args.steps)
        trainer.average.apply()
        began = time.perf_counter()
        hessians = train_gpt.calibrate(trainer)
        seconds = time.perf_counter() - began
        trainer.loader.close()
        fields = way._asdict() | dict(before=self.bpb(trainer.model), calibration_s=seconds)
        return Outcome(trainer, hessians, fields)

    def export(self, outcome: Outcome, bits: int, quantizer: str) -> dict[str, Any]:
        """Write the artifact, read it back, score it."""
        trained = outcome.trainer.model
        config = dataclasses.replace(outcome.trainer.config, qat_bits=bits)
        model = train_gpt.GPT(config, trained.attend, initialize=False).to(self.runtime.device)
        model.load_state_dict(trained.state_dict())
        hessians = outcome.hessians if quantizer == "gptq" else None
        began = time.perf_counter()
        train_gpt.quantize(model.state_dict(), model.plan, config, hessians)
        seconds = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.ptz"
            size = path.write_bytes(train_gpt.pack_artifact(model, self.tokenizer.digest, hessians))
            stored, _, _ = train_gpt.load_artifact(path, model.attend)
        after = self.bpb(stored.to(self.runtime.device))
        tax, divergence = after - outcome.fields["before"], self.divergence(trained, stored)
        shown = dict(bits=bits, quantizer=quantizer, after=after, tax=tax, divergence=divergence)
        return outcome.fields | shown | dict(artifact_bytes=size, quantize_s=seconds)


def measure(bench: Bench) -> list[dict[str, Any]]:
    bits = bench.args.bits
    with_qat = [*(Way(True, value) for value in bench.args.crown_q), Way(True, soft_rounding=True)]
    ways: list[tuple[Way, list[int]]] = [(Way(False), bits)]
    ways += [(way, [b]) for way in with_qat for b in bits]
    rows = []
    for way, exported in ways:
        outcome = bench.finish(way, exported[0])
        rows += [bench.export(outcome, b, quantizer) for b, quantizer in itertools.product(exported, ("lite", "gptq"))]
    return rows


def conditions(bench: Bench) -> dict[str, Any]:
    """What was measured, on what, at which commit."""
    settings = {name: value for name, value in vars(bench.args).items() if name not in ("out", "verbose")}
    settings |= {name: Path(settings[name]).name for name in ("data", "tokenizer")}  # not where they lie here
    return dict(
        bench="quantization", machine=bench.runtime.describe(),
        commit=common.git_commit(), parameters=sum(p.numel() for p in bench.trunk.model.parameters()),
        branch_step=bench.branch_step, validation_targets=bench.validation.num_targets, settings=settings,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with *_train_*.bin and *_val_*.bin")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--steps", type=common.positive, default=600)
    parser.add_argument("--layers", type=common.positive, default=4)
    parser.add_argument("--dim", type=common.positive, default=128)
    parser.add_argument("--seq-len", type=common.positive, default=256)
    parser.add_argument("--batch-tokens", type=common.positive, default=2048)
    parser.add_argument("--val-tokens", type=common.positive, default=100_000)
    parser.add_argument("--calibration-tokens", type=common.positive, default=65_536)
    parser.add_argument("--qat-threshold", type=float, default=0.15, help="LR scale below which QAT begins")
    parser.add_argument("--bits", type=common.positive, nargs="+", default=[5, 6, 7, 8])
    parser.add_argument("--crown-q", type=float, nargs="+", default=[0.0, 0.01, 1e5], help="values of CROWN_Q_LAMBDA")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, to try the script")
    parser.add_argument("--verbose", action="store_true", help="training steps on standard error")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    began = time.perf_counter()
    try:
        bench = Bench(args)
    except train_gpt.UserError as error:
        parser.error(str(error))
    rows = measure(bench)
    print("QAT   CROWN-Q bits by      before    after      tax  KL mnats      bytes      s")
    for row in rows:
        qat = "soft" if row["soft_rounding"] else "on" if row["qat"] else "off"
        print(
            f"{qat:<4} {row['crown_q_lambda']:>8g} {row['bits']:>4} {row['quantizer']:<5} {row['before']:>8.4f} "
            f"{row['after']:>8.4f} {row['tax']:>+8.4f} "
            f"{1000 * row['divergence']:>9.3f} {row['artifact_bytes']:>10,} {row['quantize_s']:>6.1f}"
        )
    result = json.dumps(conditions(bench) | dict(seconds=time.perf_counter() - began, rows=rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(result + "\n", encoding="utf-8")
    print(result)


if __name__ == "__main__":
    main()
