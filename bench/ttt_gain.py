"""What does test-time training gain, by its settings and by the weights that it starts from?

    python bench/ttt_gain.py --artifact FILE --data DIR --tokenizer FILE [--checkpoint FILE] [--targets 65536]
    python bench/ttt_gain.py ... --setting "faster: TTT_LR=0.01" --setting "TTT_EPOCHS=1"
    python bench/ttt_gain.py ... --documents

Each row scores the first targets by a sliding window, then by score-first test-time training with the settings of the
artifact's config, chunks of 8,192 targets and 8 sequences an update of the whole model, but for those named; with
--documents the study is one of training by document. With the last checkpoint of the run that made the artifact the
first row is also tried on the weights after the last step (raw), on their average, and on the average rounded as in
pull request 1081, whose scales have a floor of 1/31 (floor): what rounding has taken may be what training gives back.
A row at a time is printed; the last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common
from tools.sweep import SweepError, parse_variant

SETTINGS = (
    "published: TTT_LR=0.002", "rate × 5: TTT_LR=0.01", "6 epochs: TTT_EPOCHS=6", "nothing frozen: TTT_FREEZE_BLOCKS=0",
    "2 sequences an update: TTT_BATCH_SEQS=2", "AdamW, rate 1e-4: TTT_OPTIMIZER=adamw TTT_LR=1e-4",
    "AdamW, rate 3e-4: TTT_OPTIMIZER=adamw TTT_LR=3e-4",
    "AdamW, rate 1e-3, 1 epoch: TTT_OPTIMIZER=adamw TTT_LR=1e-3 TTT_EPOCHS=1",
)  # fmt: skip
RANK_RATE_CHUNK = (
    (8, 0.001, 128), (8, 0.002, 128), (64, 0.0005, 128), (64, 0.001, 128), (64, 0.002, 128), (128, 0.0007, 128),
    (64, 0.001, 256), (64, 0.001, 64),
)  # fmt: skip
BY_DOCUMENT = (
    "whole model, 1 epoch: TTT_LR=0.002 TTT_EPOCHS=1",
    *(f"rank {r}, rate {lr}, chunk {n}: TTT_RANK={r} TTT_LR={lr} TTT_CHUNK_TOKENS={n}" for r, lr, n in RANK_RATE_CHUNK),
)


def floored(weight: torch.Tensor) -> torch.Tensor:
    """Rows on 63 levels, clipped at their 0.9999 quantile, with a step of 1/31 at least (pull request 1081)."""
    step = (weight.abs().quantile(0.9999, dim=-1, keepdim=True) / 31).clamp_min(1 / 31)
    return (weight / step).round().clamp(-31, 31) * step


def starting_points(artifact: str, checkpoint: str) -> dict[str, train_gpt.GPT]:
    """The model with the weights of the artifact and, by the checkpoint, with those before rounding.

    Raises ArtifactError and CheckpointError for files that cannot be used.
    """
    points = {"artifact": train_gpt.load_artifact(artifact)[0]}
    if checkpoint:
        state = train_gpt.read_state(Path(checkpoint).read_bytes(), checkpoint)
        averaged = state["average"]["shadow"]
        kinds = dict(raw=state["model"], average=averaged)
        kinds["floor"] = {n: floored(w) if n in train_gpt.BANK_NAMES else w for n, w in averaged.items()}
        for name, weights in kinds.items():
            points[name] = train_gpt.load_artifact(artifact)[0]
            points[name].load_state_dict({n: w for n, w in weights.items() if not n.startswith("mtp_heads")})
    return points


def main() -> int:
    parser = common.arguments(__doc__, threads=1)
    parser.add_argument("--artifact", required=True)
    parser.add_argument("--checkpoint", default="", help="of the run that made it, after its last step")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--targets", type=common.positive, default=65_536)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--stride", type=common.positive, default=128)
    parser.add_argument("--documents", action="store_true", help="the study of training by document")
    parser.add_argument("--setting", action="append", help="name: A=1 B=2 (default: those of the study)")
    args = parser.parse_args()
    try:
        return study(args)
    except (train_gpt.UserError, SweepError, OSError) as error:
        parser.error(str(error))


def study(args: argparse.Namespace) -> int:
    _, stored, _ = train_gpt.load_artifact(args.artifact)
    own = {name.upper(): train_gpt.as_variable(value) for name, value in dataclasses.asdict(stored).items()}
    own |= dict(
        DATA_PATH=args.data, TOKENIZER_PATH=args.tokenizer, VAL_TOKENS=str(args.targets), EVAL_STRIDE=str(args.stride),
        TTT_ENABLED="1", TTT_RANK="0", MIXER="none", TTT_CHUNK_TOKENS="8192", TTT_BATCH_SEQS="8",
    )  # fmt: skip
    configs = {}
    for text in args.setting or (BY_DOCUMENT if args.documents else SETTINGS):
        variant = parse_variant(text, "--setting")
        configs[variant.name] = train_gpt.Config.from_env(own | dict(variant.settings))
    config = next(iter(configs.values()))
    runtime = common.open_runtime(args, config)
    validation = train_gpt.ValidationSet(config, train_gpt.Tokenizer(args.tokenizer, config.vocab_size))
    rows: list[dict[str, Any]] = []
    for kind, model in starting_points(args.artifact, args.checkpoint).items():
        model.compute_dtype = train_gpt.COMPUTE_DTYPES[args.dtype]
        logp = train_gpt.score_stream(model, config, runtime, validation, config.eval_stride).logp
        sliding = train_gpt.score_of(logp, validation).val_bpb
        for name, settings in configs.items() if kind == "artifact" else [next(iter(configs.items()))]:
            began = time.perf_counter()
            logp = train_gpt.score_then_adapt(model, settings, runtime, validation).logp
            adapted = train_gpt.score_of(logp, validation).val_bpb
            row = dict(weights=kind, settings=name, sliding=sliding, ttt=adapted, gain=sliding - adapted)
            rows.append(row | dict(seconds=time.perf_counter() - began))
            print(f"{kind:<10} {name:<44} {sliding:.4f} {adapted:.4f} {sliding - adapted:+.4f}", flush=True)
    scored = dict(targets=validation.num_targets, stride=args.stride, dtype=args.dtype)
    common.report("ttt_gain", [], runtime.device, args.threads, rows=rows, **scored)
    return 0


if __name__ == "__main__":
    sys.exit(main())
