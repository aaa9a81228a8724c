"""Measures what the swarm costs a whole run: microseconds of 8 voting cycles, controls fed back.

    python bench/swarm_overhead.py [--runs 200]

Each run is timed from outside, logging apart, and by the mesh itself. The first run has cold caches, as in
training.
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common
from swarm_agents import TrainingMetrics, VotingMesh

GOAL_US = 300  # of a whole run
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
    parser = common.arguments(__doc__, threads=1)
    parser.add_argument("--runs", type=common.positive, default=200, help="how many runs to time (%(default)s)")
    args = parser.parse_args()
    runs = [vote_through_a_run() for _ in range(10 if args.quick else max(1, args.runs))]
    outside = [microseconds for microseconds, _ in runs]
    print(*runs[0][1].summary(), sep="\n")
    headline = common.Headline(
        "the swarm, a whole run of 8 votes", statistics.median(outside), "µs", GOAL_US, at_least=False
    )
    logged = [sum(us for _, us, _ in mesh.state_dict()["cycles"]) for _, mesh in runs]
    common.report(
        "swarm_overhead", [headline], None, 1, first_us=outside[0], run_us=common.spread(outside),
        logged_us=common.spread(logged),
    )  # fmt: skip
    return int(statistics.median(outside) > GOAL_US)


if __name__ == "__main__":
    sys.exit(main())
