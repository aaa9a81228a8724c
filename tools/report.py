"""Write what docs/ says in figures from bench/results/, logs/ and train_gpt.Config, and README's picture.

    python tools/report.py             # print the tables
    python tools/report.py --recipes   # print what each recipe sets
    python tools/report.py --write     # put them into docs/, each between the two markers of its name

docs/settings.md is made whole. In the other pages the lines <!-- NAME --> and <!-- /NAME --> mark where the table of
that name stands. For each device the newest file bench/results/<device>-*.json counts; the scores of the recipes, and
the picture of them, are those of the logs logs/docs_*.jsonl, what ten minutes reach on several processors those of
logs/clock_*.jsonl. Drawing needs matplotlib (requirements-tools.txt).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(REPO))
import train_gpt  # noqa: E402
from bench import common  # noqa: E402
from tools import run_figures  # noqa: E402
from tools.record_logs import LogError, SeedRun, difference, read_run  # noqa: E402
from tools.sweep_report import holm, welch_p  # noqa: E402

RESULTS = REPO / "bench" / "results"
PICTURE = "docs/results.svg"
STAGES = {  # by a part of the name that the log has for them
    "roundtrip": "artifact", "sliding_window": "sliding window", "legal_ttt": "+ TTT", "mixed": "+ mixer",
}  # fmt: skip
PROCESSORS = {  # of two cores each, by a part of the log's name
    "zen5": "AMD EPYC with AVX512-BF16", "xeon": "Intel Xeon with AVX-512", "zen3": "AMD EPYC with AVX2",
}  # fmt: skip
CONTEST_TARGETS, RECORD_BATCH_TOKENS = 62_021_632, 786_432
UTILISATIONS = (0.25, 0.35)  # of the data sheet's peak; 0.27 is what 85 ms a step on eight H100s mean
GPU_GIB = (16, 24, 40, 80, 141)


class ReportError(Exception):
    """Results or a page that no table can be made from or put into; the text says what to do."""


# Speed ------------------------
def newest_results(folder: Path) -> list[dict[str, Any]]:
    """The newest whole run of each device, CPU first. Raises ReportError when there is none."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(run, dict) and {"scripts", "device", "date"} <= set(run):
            if run["quick"] or run.get("only"):
                continue
            earlier = newest.get(run["device"])
            if earlier is None or earlier["date"] < run["date"]:
                newest[run["device"]] = run
    if not newest:
        raise ReportError(f"no results of a whole run in {folder}; run bench/run_all.py --device cpu")
    return [newest[device] for device in sorted(newest)]


def describe(run: dict[str, Any]) -> str:
    """Where and when, in one line."""
    machines = [row["result"]["machine"] for row in run["scripts"] if "result" in row]
    found = max(machines, key=lambda machine: machine["threads"])  # some scripts measure one core
    chip = found.get("gpu", f"{found['cpu']}, {found['cores']} cores")
    when = f"commit {run['commit']}, {run['date'][:10]}, load before the start {run['load_before']:g}"
    return f"{run['device'].upper()}: {chip}, {found['threads']} threads, torch {found['torch']}, {when}"


def figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def speed_of(run: dict[str, Any]) -> list[str]:
    """The lines of one device's table; scripts without a result are named below it."""
    rows = []
    for row in run["scripts"]:
        for line in row.get("result", {}).get("headlines", []):
            limit = ""
            if "limit" in line:
                verdict = "" if line["kept"] else ", missed"
                limit = f"{'≥' if line['at_least'] else '≤'} {figure(line['limit'])}{verdict}"
            rows.append([line["what"], f"{figure(line['value'])} {line['unit']}", limit, f"`bench/{row['script']}.py`"])
    failed = [f"`bench/{row['script']}.py` ({row['error']})" for row in run["scripts"] if "error" in row]
    without = ["", f"Without a whole result: {', '.join(failed)}."] if failed else []
    return [describe(run), "", *table(["what", "measured", "limit", "by"], rows), *without]


def performance(folder: Path = RESULTS) -> list[str]:
    """The tables of all devices."""
    return [line for run in newest_results(folder) for line in ["", *speed_of(run)]][1:]


# Scores ------------------------
def read_results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def committed_runs(named: str = "docs") -> dict[str, list[SeedRun]]:
    """The runs on the documentation corpus by recipe, in the program's order. Raises ReportError."""
    runs = [read_run(path) for path in sorted((REPO / "logs").glob(f"{named}_*_seed*.jsonl"))]
    if unfinished := [run for run in runs if not (run.finished and run.settings)]:
        raise ReportError(f"{unfinished[0].path} is no finished run's log; take it out of logs/, or finish the run")
    found = {recipe: [run for run in runs if run.settings[0]["recipe"] == recipe] for recipe in train_gpt.RECIPES}
    return {recipe: runs for recipe, runs in found.items() if runs}


def scores_at(runs: Sequence[SeedRun], stage: str) -> list[float]:
    """bpb of each run at this stage, nothing where the recipe has none."""
    return [bpb for run in runs for name, (_, bpb) in run.scores.items() if stage in name]


def spread(values: Sequence[float], digits: int = 4, sign: str = "") -> str:
    """Mean and sample standard deviation; of nothing, nothing."""
    deviation = f" ± {stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):{sign},.{digits}f}{deviation}" if values else ""


def stage_cells(runs: Sequence[SeedRun]) -> list[str]:
    cells = [spread(scores_at(runs, stage)) for stage in STAGES]
    return cells if all(run.valid for run in runs) else [*cells[:-1], f"{cells[-1]} INVALID"]


def recipes() -> list[str]:
    """What each recipe scored, stage by stage."""
    rows = []
    for recipe, runs in committed_runs().items():
        steps, total = ([getattr(run, name) for run in runs] for name in ("steps", "total_bytes"))
        rows.append([f"`{recipe}`", f"{len(runs)}", spread(steps, 0), *stage_cells(runs), spread(total, 0)])
    return table(["recipe", "seeds", "steps", *STAGES.values(), "bytes with the code"], rows)


def by_the_clock() -> list[str]:
    """What ten minutes of training reached on two cores of each processor, and how long the evaluation took."""
    rows = []
    for name, processor in PROCESSORS.items():
        for recipe, runs in committed_runs(f"clock_{name}").items():
            settings = runs[0].settings[0]
            for run in runs:
                if problem := difference(run.settings[0], settings):
                    raise ReportError(f"{run.path} has other settings than {runs[0].path}: {problem}; take one out")
            parallel = settings["parallel_residual_from"] < settings["num_layers"]
            what = f"`{recipe}`" + " with parallel residuals" * parallel
            steps, seconds = (spread([getattr(run, name) for run in runs], 0) for name in ("steps", "eval_s"))
            cells = [f"{len(runs)}", steps, *stage_cells(runs), seconds]
            rows.append([processor, what, settings["compute_dtype"], *cells])
    return table(["two cores of", "recipe", "dtype", "seeds", "steps", *STAGES.values(), "evaluation, s"], rows)


def draw_recipes() -> str:
    """The same as an SVG file: a row for each recipe, a dot for each stage from the sliding window on."""
    found = committed_runs()
    lines = []
    for n, stage in enumerate([*STAGES][1:]):
        for valid in (True, False):  # hollow where the probabilities do not sum to 1
            scored = {
                row: values for row, runs in enumerate(found.values())
                if valid == (stage != "mixed" or all(run.valid for run in runs)) and (values := scores_at(runs, stage))
            }  # fmt: skip
            if scored:
                lines.append(run_figures.Line(
                    STAGES[stage] + ("" if valid else ", INVALID"), [*map(fmean, scored.values())], [*scored],
                    run_figures.style_of(n)[0], marker="os^"[n], filled=valid,
                    spread=[stdev(values) if len(values) > 1 else 0.0 for values in scored.values()],
                ))  # fmt: skip
    ends = "; ".join(f"{recipe} {spread([run.val_bpb or 0.0 for run in runs])}" for recipe, runs in found.items())
    alt = f"Bits per byte of each recipe by stage, mean and deviation of its seeds. At the end: {ends}"
    svg = run_figures.draw_dots([*found], lines, run_figures.Chart("bits per byte", "", 2.6), alt)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg ", f'<svg {spaces} width="640" font-family="sans-serif" ', 1) + "\n"


def mixers() -> list[str]:
    """On the scores of the sliding window."""
    rows = []
    for row in read_results("cpu-mixing_quality.json")["rows"]:
        if row["stream"] == "sliding window":
            mass = f"{row['mass']:.4f}" if row["valid"] else f"{row['mass']:.2f}"
            rows.append([row["mixer"], f"{row['bpb']:.4f}", mass, "" if row["valid"] else "INVALID"])
    return table(["on the sliding-window scores", "bpb", "mass", ""], rows)


def quantization() -> list[str]:
    """What rounding costs in bpb, by bits and method, with and without QAT before it."""
    rows = [row for row in read_results("cpu-quantization.json")["rows"] if not row["soft_rounding"]]
    kept = {(row["qat"], row["quantizer"], row["bits"]): row for row in rows if row["crown_q_lambda"] == 0}
    methods = [(qat, quantizer) for qat in (False, True) for quantizer in ("lite", "gptq")]
    lines = []
    for bits in sorted({row["bits"] for row in rows}):
        taxes = [f"{kept[(*method, bits)]['tax']:+.4f}" for method in methods]
        divergences = [f"{1000 * kept[(*method, bits)]['divergence']:.2f}" for method in methods[:2]]
        lines.append([f"{bits}", *taxes, *divergences, f"{kept[False, 'lite', bits]['artifact_bytes']:,}"])
    return table(["bits", "lite", "gptq", "QAT, lite", "QAT, gptq", "KL lite", "KL gptq", "bytes"], lines)


def ablation() -> list[str]:
    rows = [
        [name, *(f"{row['mean']:.4f} ± {row['std']:.4f}" for row in kinds.values())]
        for name, kinds in read_results("cpu-ablation.json")["bpb"].items()
    ]
    return table(["what is on", "averaged weights", "artifact"], rows)


def frontier(sweep: str, **later: str) -> list[str]:
    """Each variant against the first after the sliding window; `later`, what comes behind it in the same runs."""
    stages = [read_results(f"cpu-{name}.json")["variants"] for name in (sweep, *later.values())]
    rows = []
    for row, *others in zip(*stages):
        scores = [f"{each['mean']:.4f} ± {each['std']:.4f}" for each in (row, *others)]
        difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        p = "" if row["holm_p"] is None else f"{row['holm_p']:.1g}"
        steps, seconds, size = (f"{row[name]:,.0f}" for name in ("steps", "train_time_s", "bytes_total"))
        rows.append([row["name"], steps, seconds, scores[0], difference, p, *scores[1:], size])
    behind = [f"+ {stage}" for stage in later]
    head = ["variant", "steps", "training s", "sliding window", "difference", "p", *behind, "bytes with the code"]
    return table(head, rows)


PART_COLUMNS = {  # of the table of parts: the sweep, and whether a part is added to nothing or to all others
    "alone, 240": ("cpu-frontier_parts_alone.json", True), "last, 240": ("cpu-frontier_parts.json", False),
    "alone, 1,000": ("cpu-frontier_parts_1000.json", True), "last, 1,000": ("cpu-frontier_parts_1000.json", False),
}  # fmt: skip


def scores_by_variant(file: str) -> dict[str, list[float]]:
    """Of a sweep's report: by seed."""
    rows = read_results(file)["variants"]
    return {row["name"]: [each["val_bpb"] for _, each in sorted(row["seeds"].items())] for row in rows}


def compute_dtypes() -> list[str]:
    """What bf16 changes: by seed, mean and deviation."""
    all_in_bf16, rows = scores_by_variant("cpu-frontier_parts.json"), []
    for name, fp32 in scores_by_variant("cpu-frontier_parts_fp32.json").items():
        bf16 = all_in_bf16.get(name, [])
        rows.append([name, spread(fp32), spread(bf16), spread([y - x for x, y in zip(fp32, bf16)], sign="+")])
    return table(["variant", "fp32", "bf16", "difference"], rows)


def parts() -> list[str]:
    """What adding each part of frontier changes, to nothing and to all others: by seed, mean and deviation.

    A star: Welch's p is below 0.05 after Holm's correction for the column.
    """
    columns: dict[str, list[str]] = {}
    names: list[str] = []
    for title, (file, alone) in PART_COLUMNS.items():
        scores = scores_by_variant(file)
        names = names or [name.removesuffix(" alone") for name in scores if name.endswith(" alone")]
        pairs = [("none", f"{part} alone") if alone else (f"all but {part}", "all") for part in names]
        differences = [[y - x for x, y in zip(scores[before], scores[after])] for before, after in pairs]
        p_values = holm([welch_p(scores[before], scores[after]) for before, after in pairs])
        columns[title] = [
            spread(values, sign="+") + (" *" if p is not None and p < 0.05 else "")
            for values, p in zip(differences, p_values)
        ]
    return table(["part", *columns], [[part, *cells] for part, *cells in zip(names, *columns.values())])


def ttt(name: str) -> list[str]:
    """What test-time training gains, by settings and by the weights that it starts from."""
    rows = [
        [row["settings"], row["weights"], f"{row['sliding']:.4f}", f"{row['ttt']:.4f}", f"{row['gain']:+.4f}",
         f"{row['seconds']:.0f}"]
        for row in read_results(name)["rows"]
    ]  # fmt: skip
    return table(["settings", "weights", "sliding", "with TTT", "gain", "seconds"], rows)


def faults() -> list[str]:
    cases = read_results("cpu-fault_campaign.json")["cases"]
    names = list(next(iter(cases.values())))
    rows = [[fault, str(sum(row.values())), *(str(row[name]) for name in names)] for fault, row in cases.items()]
    return table(["fault", "cases", *names], rows)


# One GPU ------------------------
def memory() -> list[str]:
    """MICRO_BATCH_TOKENS that the program takes by itself, and the micro-batches of a step that follow."""
    recipes = [each for each in map(config_of, train_gpt.RECIPES) if each.train_batch_tokens == RECORD_BATCH_TOKENS]
    rows = []
    for gib in GPU_GIB:
        cells = []
        for config in recipes:
            tokens = fitting_tokens(config, gib)
            plan = train_gpt.BatchPlan.of(dataclasses.replace(config, micro_batch_tokens=tokens), 1)
            cells.append(f"{tokens:,} ({plan.grad_accum_steps})")
        rows.append([f"{gib} GiB", *cells])
    return table(["memory of the GPU", *(f"`{config.recipe}`" for config in recipes)], rows)


def config_of(recipe: str) -> train_gpt.Config:
    """Its settings away from any data."""
    return train_gpt.Config.from_env({"RECIPE": recipe, "DATA_PATH": "no such folder"})


def fitting_tokens(config: train_gpt.Config, gib: float) -> int:
    """What train_gpt.py takes in bf16 on a GPU of that memory, which need not be there."""
    runtime: Any = SimpleNamespace(device=torch.device("cuda"), local_world_size=1)
    device = SimpleNamespace(total_memory=gib * 2**30)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=device):
        return train_gpt.fitting_tokens(config, runtime, itemsize=2)


def step_times() -> list[str]:
    """Estimates from FLOPs alone, for a part of the peak."""
    config = config_of("swarm")
    flops = common.train_flops_per_token(config, config.train_seq_len)
    forwards = train_gpt.projected_seconds(dataclasses.replace(config, mixer="none"), CONTEST_TARGETS, 1.0)
    rows = []
    for gpu, peak in common.DATASHEET_PEAKS.items():
        steps = [flops * config.train_batch_tokens / (peak * share) for share in UTILISATIONS]
        scoring = [flops / 3 * CONTEST_TARGETS * forwards / (peak * share) for share in UTILISATIONS]
        cells = [steps, [600 / step for step in steps], scoring]
        shown = [" to ".join(f"{value:.2g}" if value < 10 else f"{value:,.0f}" for value in cell) for cell in cells]
        rows.append([gpu, f"{peak / 1e12:.0f} TFLOP/s", *shown])
    return table(["GPU", "bf16 peak", "seconds a step", "steps in 600 s", "seconds of scoring, all stages"], rows)


# Pages ------------------------
PAGES = {
    "docs/results.md": dict(
        recipes=recipes, by_the_clock=by_the_clock, mixers=mixers, quantization=quantization, ablation=ablation,
        performance=performance, parts=parts,
        frontier=partial(frontier, "frontier", TTT="frontier_ttt", mixer="frontier_mixed"),
        frontier_in_time=partial(frontier, "frontier_in_time"), compute_dtypes=compute_dtypes,
        ttt=partial(ttt, "cpu-ttt_gain.json"), ttt_documents=partial(ttt, "cpu-ttt_documents.json"),
    ),
    "docs/faults.md": dict(faults=faults),
    "docs/one_gpu.md": {"memory": memory, "step times": step_times},
}  # fmt: skip


def written(part: str, write: Callable[[], list[str]]) -> list[str]:
    """The lines of one table. Raises ReportError, LogError, also where a file of results is absent or no such one."""
    try:
        return write()
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        problem = f"the table {part} cannot be made ({type(error).__name__}: {error})"
        raise ReportError(f"{problem}; is a file of bench/results/ or logs/ missing or damaged?") from error


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" if row else "|---" * len(head) + "|" for row in (head, [], *rows)]


def filled(page: str, name: str, lines: Sequence[str]) -> str:
    """The page's text with these lines between the markers of that name. Raises ReportError without one such pair."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = page.partition(f"{start}\n")
    _, closed, after = rest.partition(end)
    if not (found and closed) or start in rest or end in before + after:
        raise ReportError(f"needs one line {start} and after it one line {end}")
    return before + "\n".join([start, *lines, end]) + after


def recipe_table(recipes: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a recipe: the settings that it makes beyond the defaults."""
    rows = [
        [f"`{recipe}`", " ".join(f"`{name.upper()}={train_gpt.as_variable(value)}`" for name, value in values.items())]
        for recipe, values in recipes.items()
    ]
    return "\n".join(table(["recipe", "sets beyond the defaults"], rows))


def settings_page() -> str:
    """docs/settings.md: every setting with its default, its range and its meaning, and what the recipes set."""
    lines = ["# Settings", "", "Made by `python tools/report.py --write` from `Config` in `train_gpt.py`; the same as"]
    lines += ["`python train_gpt.py --help`. Each is read from the environment variable of its name.", ""]
    lines += ["| variable | default | what it may be | what it means |", "|---|---|---|---|"]
    for each in dataclasses.fields(train_gpt.Config):
        default, allowed = train_gpt.as_variable(each.default), train_gpt.allowed_text(each)
        cells = f"`{each.name.upper()}`", default and f"`{default}`", allowed, each.metadata["meaning"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "## Recipes", "", recipe_table(train_gpt.RECIPES), ""])


def pages(folder: Path) -> dict[str, str]:
    """Every file that is made here, or partly, as it should be; what is not made stands in `folder`.

    Raises ReportError.
    """
    made = {}
    for name, parts in PAGES.items():
        try:
            text = (folder / name).read_text(encoding="utf-8")
            for part, write in parts.items():
                text = filled(text, part, written(part, write))
        except (OSError, ReportError) as error:
            raise ReportError(f"{name}: {error}") from error
        made[name] = text
    return made | {"docs/settings.md": settings_page(), PICTURE: draw_recipes()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="change the pages")
    parser.add_argument("--recipes", action="store_true", help="print the recipe table alone")
    parser.add_argument("--folder", type=Path, default=REPO, help="where docs/ lies (default: this repository)")
    args = parser.parse_args(argv)
    if args.recipes:
        print(recipe_table(train_gpt.RECIPES))
        return 0
    try:
        if not args.write:
            tables = [written(name, write) for parts in PAGES.values() for name, write in parts.items()]
            print("\n\n".join("\n".join(lines) for lines in tables))
            return 0
        made = pages(args.folder)
    except (ReportError, LogError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, text in made.items():
        path = args.folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
