"""What finished runs of a sweep say together: means, differences, tests, and a table, JSON and picture of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from tools.record_logs import FINAL, LogError, read_run

STAGES = {
    "roundtrip": r"final_int[0-9_]+_roundtrip_exact", "sliding_window": r"final_int[0-9_]+_sliding_window_exact",
    "ttt": "legal_ttt_exact", "mixed": "final_mixed_exact", "final": "final_int8_zlib_roundtrip_exact",
}  # fmt: skip
SAME_TIME = 0.01  # relative difference of training seconds that counts as none
BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito's colours, which everybody can tell apart


def read_figures(path: Path, stage: str) -> dict[str, Any]:
    """What is compared of a finished run: `val_bpb` of the stage, steps done and planned, seconds and bytes.

    Raises LogError for a log that is missing, damaged, not finished, lacks a row, or has no such stage.
    """
    run = read_run(path)
    reached = {**run.scores, FINAL: (run.val_loss, run.val_bpb)}
    val_bpb = next((pair[1] for name, pair in reached.items() if re.fullmatch(STAGES[stage], name)), None)
    settings = run.settings[0] if run.settings else {}
    planned = dict(iterations=settings.get("iterations"), warmdown=settings.get("warmdown_iters"))
    needed = dict(steps=run.steps, seconds=run.train_s, bytes=run.total_bytes, evaluation=run.eval_s, **planned)
    missing = [name for name, value in needed.items() if value is None]
    if not run.finished or missing:
        lacks = f"lacks {' and '.join(missing)}" if missing else "is of no finished run"
        raise LogError(f"{path} {lacks}; run it again")
    if val_bpb is None:
        raise LogError(f"{path} has no score of the stage {stage}; compare another stage")
    assert run.train_s is not None
    # Where it is `auto` the machine decides, and the row `config` says how; a restart may have decided otherwise.
    dtypes = sorted({str(each["compute_dtype"]) for each in run.settings if "compute_dtype" in each})
    environment = run.environment | ({"compute_dtype": "+".join(dtypes)} if dtypes else {})
    return dict(
        val_bpb=val_bpb, steps=run.steps, train_time_s=run.train_s, eval_time_s=run.eval_s, valid=run.valid,
        bytes_total=run.total_bytes, step_s=run.train_s / max(run.steps or 0, 1), environment=environment,
        validation=run.text, **planned,
    )  # fmt: skip


def welch_p(values: Sequence[float], baseline: Sequence[float]) -> float | None:
    """Two-sided p of equal means without the assumption of equal variances; None for fewer than two values a side."""
    if min(len(values), len(baseline)) < 2:
        return None
    if len({*values}) == len({*baseline}) == 1:  # no spread on either side, where the statistic is 0 or infinite
        return float(values[0] == baseline[0])
    return float(np.asarray(stats.ttest_ind(values, baseline, equal_var=False))[1])


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Each p corrected for the number of comparisons (Holm's step-down); None stays None and is no comparison."""
    corrected: list[float | None] = [None] * len(p_values)
    ordered = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    largest = 0.0
    for rank, (p, index) in enumerate(ordered):
        corrected[index] = largest = max(largest, min(1.0, (len(ordered) - rank) * p))
    return corrected


@dataclass
class Outcome:
    """The finished runs of one variant, by seed, as `read_figures` has them."""

    name: str
    settings: Mapping[str, str]
    seeds: dict[int, dict[str, Any]] = field(default_factory=dict)

    def values(self, name: str) -> list[float]:
        """One figure of all seeds."""
        return [figures[name] for figures in self.seeds.values()]


def summarize(outcomes: Sequence[Outcome], baseline: str) -> list[dict[str, Any]]:
    """A row for each variant that has a finished run, the baseline first, which the others are compared with.

    Figures are means over seeds; `std` is the sample deviation, None for one seed. Without a finished run of the
    baseline differences and p values are None.
    """
    ordered = sorted((each for each in outcomes if each.seeds), key=lambda each: each.name != baseline)
    base = next((each for each in ordered if each.name == baseline), None)
    rows: list[dict[str, Any]] = []
    for each in ordered:
        row: dict[str, Any] = dict(name=each.name, settings=dict(each.settings), n=len(each.seeds))
        values = each.values("val_bpb")
        row |= dict(mean=fmean(values), std=stdev(values) if len(values) > 1 else None)
        row |= {name: fmean(each.values(name)) for name in ("steps", "step_s", "train_time_s", "bytes_total")}
        compared = base is not None and each is not base
        row["difference"] = row["mean"] - fmean(base.values("val_bpb")) if base and compared else None
        row["welch_p"] = welch_p(each.values("val_bpb"), base.values("val_bpb")) if base and compared else None
        row["seeds"] = {
            str(seed): {name: value for name, value in figures.items() if not isinstance(value, dict)}
            for seed, figures in each.seeds.items()
        }
        rows.append(row)
    for row, p in zip(rows, holm([row["welch_p"] for row in rows])):
        row["holm_p"] = p
    return rows


def scored_unlike(outcomes: Sequence[Outcome], kind: str) -> list[str]:
    """Fields of `kind` ("environment", "validation") in which finished runs differ, with the values found."""
    found: dict[str, set[str]] = {}
    for figures in (figures for each in outcomes for figures in each.seeds.values()):
        for name, value in figures[kind].items():
            found.setdefault(name, set()).add(str(value))
    return [f"{name}: {' and '.join(sorted(values))}" for name, values in found.items() if len(values) > 1]


def _p_text(p: float | None) -> str:
    return "" if p is None else f"{p:.1g}" if p < 0.001 else f"{p:.3f}"


def render_markdown(rows: Sequence[Mapping[str, Any]], stage: str, notes: Sequence[str]) -> str:
    """The table, and below it what has to be said about it."""
    lines = [
        f"| variant | n | val_bpb, {stage} | difference | Welch p | Holm p | steps | ms a step | training s | bytes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        value = f"{row['mean']:.4f}" + ("" if row["std"] is None else f" ± {row['std']:.4f}")
        difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        p_values = f"{_p_text(row['welch_p'])} | {_p_text(row['holm_p'])}"
        time = f"{1000 * row['step_s']:,.1f} | {row['train_time_s']:,.1f}"
        work = f"{row['steps']:,.0f} | {time} | {row['bytes_total']:,.0f}"
        name = row["name"].replace("|", "\\|")
        lines.append(f"| {name} | {row['n']} | {value} | {difference} | {p_values} | {work} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def plot(rows: Sequence[Mapping[str, Any]], stage: str, path: Path) -> None:
    """A dot for each seed and a bar for the mean of every variant, beside the seconds that a step took."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    height = 1.2 + 0.34 * len(rows)
    figure, panels = plt.subplots(1, 2, figsize=(9, height), layout="constrained", sharey=True, width_ratios=(2, 1))
    for axes, name, label in zip(panels, ("val_bpb", "step_s"), (f"bits per byte, {stage}", "seconds a step")):
        for place, row in enumerate(rows):
            values = [figures[name] for figures in row["seeds"].values()]
            colour = BLUE if place else ORANGE
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, markersize=5)
            axes.plot([fmean(values)], [place], "|", color="black", markersize=16)
        axes.axvline(fmean([figures[name] for figures in rows[0]["seeds"].values()]), color=ORANGE, linewidth=0.8)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    panels[0].invert_yaxis()
    figure.suptitle("a dot for each seed, a black bar for the mean; orange: the first row", fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(folder: Path, rows: Sequence[Mapping[str, Any]], stage: str, about: Mapping[str, Any]) -> str:
    """Write report.md, report.json and report.png into `folder`; returns the Markdown. Raises OSError.

    Without matplotlib there is no picture, which the Markdown says.
    """
    text, picture = render_markdown(rows, stage, about["notes"]), folder / "report.png"
    picture.unlink(missing_ok=True)
    try:
        if rows:
            plot(rows, stage, picture)
    except ImportError as error:
        text += f"- no picture ({error}): pip install matplotlib, and start the same command again\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    content = dict(bench="sweep", stage=stage, variants=list(rows), **about)
    (folder / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return text
