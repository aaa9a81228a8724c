"""What do the knowledge graph, the swarm and the MTP heads contribute at equal steps on real text?

    python bench/ablation.py --data DIR --tokenizer FILE --kg-blob FILE [--seeds 3] [--steps 250] [--jobs 2]

DIR holds shards made by data/prepare.py. Every variant trains the same small model for the same steps on the same
batches; only the named switches differ from the full recipe. The figure is the bits per byte of the averaged
weights before quantization and of the artifact, windows without overlap, mean ± sample standard deviation over
seeds. A table for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

REPO = common.REPO
SMALL = dict(
    RECIPE="swarm", NUM_LAYERS=4, MODEL_DIM=128, NUM_HEADS=2, NUM_KV_HEADS=1, VE_LAYERS="2,3", VE_DIM=32, BIGRAM_DIM=64,
    XSA_LAST_N=1, TRAIN_SEQ_LEN=256, ROPE_TRAIN_LEN=256, EVAL_SEQ_LEN=256, EVAL_STRIDE=256, TRAIN_BATCH_TOKENS=2048,
    MICRO_BATCH_TOKENS=2048, WARMUP_STEPS=0, MAX_WALLCLOCK_SECONDS=0, MUON_MOMENTUM=0.95,
    MUON_MOMENTUM_WARMUP_START=0.85, MUON_MOMENTUM_WARMUP_STEPS=60, EMA_DECAY=0.95,
    VAL_LOSS_EVERY=0, TRAIN_LOG_EVERY=50, TTT_ENABLED=0, MIXER="none",
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "all on": {},
    "no KG init": dict(KG_INIT_SCALE=0),
    "no KG loss weight": dict(KG_WEIGHT=0),
    "no KG at all": dict(KG_ENABLED=0),
    "no swarm": dict(SWARM_ENABLED=0),
    "no MTP": dict(MTP_NUM_HEADS=0),
    "all off": dict(KG_ENABLED=0, SWARM_ENABLED=0, MTP_NUM_HEADS=0),
}


def run_one(variant: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train and score one model; returns its bits per byte before and after quantization."""
    folder = Path(args.out).resolve() / variant.replace(" ", "_") / str(seed)
    settings = SMALL | dict(
        DATA_PATH=Path(args.data).resolve(), TOKENIZER_PATH=Path(args.tokenizer).resolve(),
        KG_PATH=Path(args.kg_blob).resolve(), OUT_DIR=folder, RUN_ID="run", SEED=seed, ITERATIONS=args.steps,
        WARMDOWN_ITERS=args.steps // 2, SWARM_EVERY=max(1, args.steps // 10), VAL_TOKENS=args.val_tokens,
    ) | VARIANTS[variant]  # fmt: skip
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in settings.items()}}
    script = [sys.executable, str(REPO / "train_gpt.py")]
    process = subprocess.run(script, env=environ, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{variant}, seed {seed}: {process.stderr.strip()}")
    rows = [json.loads(line) for line in (folder / "logs" / "run.jsonl").read_text().splitlines()]
    scores = {row["event"]: row["val_bpb"] for row in rows if "val_bpb" in row}
    return {"averaged": scores["DIAGNOSTIC post_ema"], "artifact": scores["final_int6_roundtrip_exact"]}


def summarize(results: list[dict[str, float]], kind: str) -> dict[str, float]:
    values = [result[kind] for result in results]
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with *_train_*.bin and *_val_*.bin")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--kg-blob", required=True, help="file that tools/build_kg.py blob wrote for that tokenizer")
    parser.add_argument("--out", default="runs/ablation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--val-tokens", type=int, default=200_000)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    jobs = [(variant, seed) for seed in range(1, args.seeds + 1) for variant in VARIANTS]
    with ThreadPoolExecutor(args.jobs) as pool:
        outcomes = list(pool.map(lambda job: run_one(job[0], job[1], args), jobs))
    table = {}
    print(f"{'variant':<20} {'averaged weights':>20} {'artifact':>20}")
    for variant in VARIANTS:
        rows = [outcome for (name, _), outcome in zip(jobs, outcomes) if name == variant]
        table[variant] = {kind: summarize(rows, kind) for kind in ("averaged", "artifact")}
        cells = [f"{table[variant][kind]['mean']:.4f} ± {table[variant][kind]['std']:.4f}" for kind in table[variant]]
        print(f"{variant:<20} {cells[0]:>20} {cells[1]:>20}")
    common.report("ablation", [], None, 1, seeds=args.seeds, steps=args.steps, bpb=table)


if __name__ == "__main__":
    main()
