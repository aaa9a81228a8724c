"""Stands in for train_gpt.py where a test is about the sweep: the rows of a run's log, out of a formula of settings.

LEAKY_SLOPE moves the score, QK_GAIN_INIT the seconds of a step, FAKE_BEGIN_MS is spent before the first; and as there
MAX_WALLCLOCK_SECONDS ends the steps. FAKE_FAILS names a seed that fails, FAKE_STOPS a file that is made when the run
has begun, after which it waits until it is told to end, FAKE_MEETS a folder where it waits for another run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any


def number(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


def main() -> int:
    seed, steps, folder = os.environ["SEED"], int(number("ITERATIONS", 100)), Path(os.environ["OUT_DIR"])
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    saved = folder / "checkpoints" / "saved"
    step_ms, begin_ms = 10.0 * number("QK_GAIN_INIT", 1.5), number("FAKE_BEGIN_MS", 0.0)
    with (folder / "logs" / f"{os.environ['RUN_ID']}.jsonl").open("a", encoding="utf-8") as log:

        def row(event: str, **fields: Any) -> None:
            log.write(json.dumps(dict(event=event, time="2026-01-01T00:00:00.000Z", **fields)) + "\n")
            log.flush()

        resumed = os.environ["RESUME"] == "auto" and saved.exists()
        row("environment", python="3", torch="2", world_size=1, threads=int(os.environ["OMP_NUM_THREADS"]))
        dtype = os.environ.get("FAKE_DTYPE", "fp32")
        plan = dict(iterations=steps, warmdown_iters=int(number("WARMDOWN_ITERS", 50)))
        row("config", seed=int(seed), compute_dtype=dtype, **plan)
        sys.stdout.write(f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
        if meeting := os.environ.get("FAKE_MEETS"):
            Path(meeting, seed).touch()
            while len(list(Path(meeting).iterdir())) < 2:
                time.sleep(0.01)
        steps = min(steps, int(1000 * number("MAX_WALLCLOCK_SECONDS", 1e6) / step_ms))
        row("validation", targets=1000, bytes=2400, digest=os.environ.get("FAKE_TEXT", "0123456789abcdef"))
        if resumed:
            row("resumed", step=1)
        if (stops := os.environ.get("FAKE_STOPS")) and not Path(stops).exists():
            signal.signal(signal.SIGTERM, lambda *_: (saved.write_text("x"), sys.exit(143)))
            Path(stops).write_text(str(os.getpid()))
            time.sleep(60)
        if os.environ.get("FAKE_FAILS") == seed:
            sys.stderr.write("a line before\nerror: the disk is full\n")
            return 2
        noise = random.Random(int(seed)).gauss(0, 0.001)
        bpb = 2.0 + 0.1 * number("LEAKY_SLOPE", 0.5) + noise + 0.01 * (100 - steps) / 100
        time_ms = begin_ms + steps * step_ms
        row("step", step=steps, steps=steps, train_loss=1.0, train_time_ms=time_ms, step_avg_ms=step_ms)
        row("artifact_bytes", bytes=1000)
        row("total_bytes", bytes=201_000, limit=16_000_000)
        score = dict(val_loss=bpb / 2)
        row("final_int6_roundtrip_exact", val_bpb=bpb + 0.5, stage="roundtrip", **score)
        row("final_int6_sliding_window_exact", val_bpb=bpb + 0.25, stage="sliding_window", **score)
        row("evaluation", total_s=1.0, budget_s=600.0)
        row("final_int8_zlib_roundtrip_exact", val_bpb=bpb, valid=True, **score)
    return 0


if __name__ == "__main__":
    sys.exit(main())
