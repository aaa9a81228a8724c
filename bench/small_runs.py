"""What comparisons of training settings share: whole runs of one small model, some at a time, and their spread."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import common

SMALL = dict(
    NUM_LAYERS=4, MODEL_DIM=128, NUM_HEADS=2, NUM_KV_HEADS=1, VE_LAYERS="2,3", VE_DIM=32, BIGRAM_DIM=64,
    XSA_LAST_N=1, TRAIN_SEQ_LEN=256, ROPE_TRAIN_LEN=256, EVAL_SEQ_LEN=256, EVAL_STRIDE=256, TRAIN_BATCH_TOKENS=2048,
    MICRO_BATCH_TOKENS=2048, WARMUP_STEPS=0, MAX_WALLCLOCK_SECONDS=0, MUON_MOMENTUM=0.95,
    MUON_MOMENTUM_WARMUP_START=0.85, MUON_MOMENTUM_WARMUP_STEPS=60, EMA_DECAY=0.95, CHECKPOINT_SECONDS=0,
    VAL_LOSS_EVERY=0, TRAIN_LOG_EVERY=50, TTT_ENABLED=0, MIXER="none",
)  # fmt: skip


def arguments(doc: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with the options that all of these scripts have."""
    parser = argparse.ArgumentParser(description=str(doc).partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with *_train_*.bin and *_val_*.bin")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", default=out, help=f"folder of the runs (default {out})")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--val-tokens", type=int, default=200_000)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    return parser


def run_one(name: str, settings: Mapping[str, Any], seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train and score one model; its bits per byte before (`averaged`) and after quantization (`artifact`)."""
    folder = Path(args.out).resolve() / name.replace(" ", "_") / str(seed)
    given = dict(
        DATA_PATH=Path(args.data).resolve(), TOKENIZER_PATH=Path(args.tokenizer).resolve(), OUT_DIR=folder,
        RUN_ID="run", SEED=seed, ITERATIONS=args.steps, WARMDOWN_ITERS=args.steps // 2, VAL_TOKENS=args.val_tokens,
    )  # fmt: skip
    values = {key: str(value) for key, value in (SMALL | given | dict(settings)).items()}
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **values}
    script = [sys.executable, str(common.REPO / "train_gpt.py")]
    process = subprocess.run(script, env=environ, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{name}, seed {seed}: {process.stderr.strip()}")
    rows = [json.loads(line) for line in (folder / "logs" / "run.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = {row["event"]: row["val_bpb"] for row in rows if "val_bpb" in row}
    return {"averaged": scores["diagnostic"], "artifact": scores["final_int6_roundtrip_exact"]}


def run_all(variants: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every variant with every seed; for each variant the spread of both figures over the seeds."""
    jobs = [(name, seed) for seed in range(1, args.seeds + 1) for name in variants]
    with ThreadPoolExecutor(args.jobs) as pool:
        outcomes = list(pool.map(lambda job: run_one(job[0], variants[job[0]], job[1], args), jobs))
    found: dict[str, dict[str, Any]] = {}
    for name in variants:
        rows = [outcome for (variant, _), outcome in zip(jobs, outcomes) if variant == name]
        found[name] = {kind: spread([row[kind] for row in rows]) for kind in rows[0]}
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def print_table(found: Mapping[str, Mapping[str, Any]], title: str) -> None:
    print(f"{title:<20} {'averaged weights':>20} {'artifact':>20}")
    for name, kinds in found.items():
        cells = [f"{kinds[kind]['mean']:.4f} ± {kinds[kind]['std']:.4f}" for kind in ("averaged", "artifact")]
        print(f"{name:<20} {cells[0]:>20} {cells[1]:>20}")
