"""Measures what the swarm costs a whole run: microseconds of 8 voting cycles, controls fed back.

    python bench/swarm_overhead.py [--runs 200]

Each run is timed from outside, logging apart, and by the mesh itself. The first run has cold caches, as in
training. The table is for people, the last line is JSON.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from swarm_agents import TrainingMetrics, VotingMesh

STEPS, STEP_MS, WARMDOWN = 7000, 85.7, 3700  # a run of 600 s on eight GPUs


def vote_through_a_run() -> tuple[float, VotingMesh]:
    """Return the microseconds that the votes of one run take, seen from outside, and the mesh."""
    mesh = VotingMesh(every=800)
    metrics = TrainingMetrics(
        step=0,
        total_steps=20_000,
        train_loss=2.5,
        grad_norm=0.3,
        elapsed_ms=0.0,
        max_wallclock_ms=600_000.0,
        current_lr_scale=1.0,
        qat_enabled=False,
        kg_weight=0.3,
        mtp_weight=0.1,
        clip_norm=0.3,
    )
    spent_ns = 0
    for step in range(mesh.every, STEPS, mesh.every):
        metrics = replace(
            metrics,
            step=step,
            grad_norm=3.0 if step == 2400 else 0.3,
            elapsed_ms=step * STEP_MS,
            current_lr_scale=min(1.0, (STEPS - step) / WARMDOWN),
        )
        start_ns = time.perf_counter_ns()
        decisions = mesh.vote(metrics)
        spent_ns += time.perf_counter_ns() - start_ns
        for decision in decisions:
            field = "qat_enabled" if decision.parameter == "qat" else decision.parameter
            value = bool(decision.new) if decision.parameter == "qat" else decision.new
            metrics = replace(metrics, **{field: value})
    return spent_ns / 1000, mesh


def main() -> int:
    """Time the runs and print the result; exit code 1 when even the median is over the goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200, help="how many runs to time (%(default)s)")
    runs = [vote_through_a_run() for _ in range(max(1, parser.parse_args().runs))]
    outside = [microseconds for microseconds, _ in runs]
    print(*runs[0][1].summary(), sep="\n")
    result = {
        "bench": "swarm_overhead",
        "cycles": 8,
        "runs": len(runs),
        "first_us": round(outside[0], 1),
        "median_us": round(statistics.median(outside), 1),
        "max_us": round(max(outside), 1),
        "median_logged_us": round(statistics.median(mesh.total_us for _, mesh in runs), 1),
        "goal_us": 300,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {platform.processor()}".strip(),
    }
    for name, value in result.items():
        print(f"{name:>16}: {value}")
    print(json.dumps(result))
    return int(result["median_us"] > result["goal_us"])


if __name__ == "__main__":
    sys.exit(main())
