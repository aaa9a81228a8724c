"""Which negative slope of the squared leaky ReLU is best?

    python bench/slope_sweep.py --data DIR --tokenizer FILE [--seeds 3] [--steps 250] [--plot PNG] [--write JSON]

The sweep behind pull request 977: slopes 0.3 to 0.9 (LEAKY_SLOPE; the activation is squared, 0 would be ReLU²), every
slope with the same seeds, steps and batches. The figure is the bits per byte of the artifact, windows without overlap,
mean ± sample standard deviation over seeds; the best slope is compared with every other by a Welch test. A table for
people, one JSON line last.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common, small_runs

SLOPES = tuple(round(0.1 * tenth, 1) for tenth in range(3, 10))


def against_best(found: Mapping[str, Mapping[str, Any]], seeds: int) -> dict[str, float | None]:
    """Two-sided Welch p of each slope against the one with the lowest mean; None for a single seed."""
    best = min(found, key=lambda name: found[name]["artifact"]["mean"])
    top = found[best]["artifact"]
    p_values: dict[str, float | None] = {}
    for name, kinds in found.items():
        own = kinds["artifact"]
        test = stats.ttest_ind_from_stats(
            own["mean"], own["std"], seeds, top["mean"], top["std"], seeds, equal_var=False
        )
        p_values[name] = float(np.asarray(test)[1]) if seeds > 1 else None
    return p_values


def plot(found: Mapping[str, Mapping[str, Any]], path: Path, caption: str) -> None:
    """Mean and error bar of every slope."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    means, errors = ([kinds["artifact"][which] for kinds in found.values()] for which in ("mean", "std"))
    axes.errorbar([float(name) for name in found], means, errors, marker="o", capsize=4)
    axes.set(xlabel="negative slope", ylabel="bits per byte", title=caption)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = small_runs.arguments(__doc__, "runs/slope_sweep")
    parser.add_argument("--slopes", type=float, nargs="+", default=SLOPES)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--write", type=Path, help="write the JSON there too")
    args = parser.parse_args(argv)
    variants = {f"{slope:g}": dict(RECIPE="leaky", LEAKY_SLOPE=slope) for slope in args.slopes}
    found = small_runs.run_all(variants, args)
    small_runs.print_table(found, "slope")
    p_values = against_best(found, args.seeds)
    different = [name for name, p_value in p_values.items() if p_value is not None and p_value < 0.05]
    print(f"differ from the best with p < 0.05: {', '.join(different) or 'none'}")
    if args.plot:
        plot(found, args.plot, f"{args.steps} steps, {args.seeds} seeds, mean ± standard deviation")
    result = common.report(
        "slope_sweep", [], None, 1, seeds=args.seeds, steps=args.steps, bpb=found, p_against_best=p_values
    )
    if args.write:
        args.write.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
