"""Make README's performance table from what bench/run_all.py wrote, and docs/settings.md from train_gpt.Config.

    python tools/report.py             # print the performance table
    python tools/report.py --recipes   # print what each recipe sets
    python tools/report.py --write     # put the table between README's two markers, and write docs/settings.md

For each device the newest file bench/results/<device>-*.json counts. README marks the place by the lines
<!-- performance --> and <!-- /performance -->.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
SETTINGS = REPO / "docs" / "settings.md"
sys.path.insert(1, str(REPO))
import train_gpt  # noqa: E402

RESULTS = REPO / "bench" / "results"
MARKERS = ("<!-- performance -->", "<!-- /performance -->")


class ReportError(Exception):
    """Results or a README that no table can be made from; the text says what to do."""


def newest_results(folder: Path) -> list[dict[str, Any]]:
    """The newest whole run of each device, CPU first. Raises ReportError when there is none."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(run, dict) and {"scripts", "device", "date"} <= set(run) and not run.get("quick"):
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


def table(run: dict[str, Any]) -> list[str]:
    """The lines of one device's table; scripts without a result are named below it."""
    lines = [describe(run), "", "| what | measured | limit | by |", "|---|---|---|---|"]
    for row in run["scripts"]:
        for line in row.get("result", {}).get("headlines", []):
            limit = ""
            if "limit" in line:
                verdict = "" if line["kept"] else ", missed"
                limit = f"{'≥' if line['at_least'] else '≤'} {figure(line['limit'])}{verdict}"
            measured = f"{figure(line['value'])} {line['unit']}"
            lines.append(f"| {line['what']} | {measured} | {limit} | `bench/{row['script']}.py` |")
    failed = [f"`bench/{row['script']}.py` ({row['error']})" for row in run["scripts"] if "error" in row]
    return [*lines, "", *([f"Without a whole result: {', '.join(failed)}.", ""] if failed else [])]


def render(folder: Path = RESULTS) -> str:
    """The tables of all devices, markers included."""
    lines = [line for run in newest_results(folder) for line in table(run)]
    return "\n".join([MARKERS[0], *lines[:-1], MARKERS[1]])


def between_markers(text: str) -> tuple[int, int]:
    """Where README's table begins and ends, markers included. Raises ReportError without one pair of markers."""
    first, last = (text.find(marker) for marker in MARKERS)
    if first < 0 or last < first or text.count(MARKERS[0]) != 1 or text.count(MARKERS[1]) != 1:
        raise ReportError(f"README.md needs one line {MARKERS[0]} and after it one line {MARKERS[1]}")
    return first, last + len(MARKERS[1])


def recipe_table(recipes: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a recipe: the settings that it makes beyond the defaults."""
    lines = ["| recipe | sets beyond the defaults |", "|---|---|"]
    for recipe, values in recipes.items():
        shown = (f"`{name.upper()}={train_gpt.as_variable(value)}`" for name, value in values.items())
        lines.append(f"| `{recipe}` | {' '.join(shown)} |")
    return "\n".join(lines)


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="change README.md and docs/settings.md")
    parser.add_argument("--recipes", action="store_true", help="print the recipe table instead")
    args = parser.parse_args(argv)
    if args.recipes:
        print(recipe_table(train_gpt.RECIPES))
        return 0
    readme = REPO / "README.md"
    try:
        rendered = render()
        if args.write:
            text = readme.read_text(encoding="utf-8")
            first, last = between_markers(text)
            readme.write_text(text[:first] + rendered + text[last:], encoding="utf-8")
            SETTINGS.parent.mkdir(exist_ok=True)
            SETTINGS.write_text(settings_page(), encoding="utf-8")
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {readme} and {SETTINGS}" if args.write else rendered)
    return 0


if __name__ == "__main__":
    sys.exit(main())
