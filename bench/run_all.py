"""Run the benchmarks of one device and write bench/results/<device>-<commit>.json, all within eight minutes.

    python bench/run_all.py --device cpu|cuda [--quick] [--only NAME …] [--out FILE]

Each script runs in a process of its own with seconds of its own. One that fails, or is not done by then, is named in
the file with what it printed last, and the others go on; the exit code is 1 when there was one. The performance
table in docs/results.md is made from the file by tools/report.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

FOLDER = common.REPO / "bench"
TOTAL_S = 480.0


class Job(NamedTuple):
    """One script with its arguments and the seconds it may take."""

    script: str
    seconds: float
    arguments: tuple[str, ...] = ()


JOBS: dict[str, tuple[Job, ...]] = {
    "cpu": (
        Job("import_time", 60, ("--pairs", "5")),
        Job("swarm_overhead", 10),
        Job("forward_backward", 200),
        Job("train_step", 120),
        Job("evaluation", 30),
        Job("ttt", 30),
        Job("counts", 15),
        Job("mixing", 40),
        Job("startup", 25),
        Job("data_preparation", 25),
        Job("reading", 30),
        Job("muon", 25),
        Job("artifact", 160),
        Job("checkpoint", 30),
        Job("build_kg", 60),
        Job("cpu_step", 150, ("--rounds", "1", "--steps", "3")),  # last: on a slow machine it gets what is left
    ),
    "cuda": (
        Job("forward_backward", 90, ("--seqs", "16", "--seq-len", "2048")),
        Job("train_step", 150),
        Job("evaluation", 90),
        Job("ttt", 60),
        Job("startup", 30),
        Job("artifact", 100),
        Job("checkpoint", 30),
    ),
}


def run_job(job: Job, arguments: list[str], seconds: float, folder: Path = FOLDER) -> dict[str, Any]:
    """The script's last line as a result, or why there is none, and the seconds it took."""
    command = [sys.executable, str(folder / f"{job.script}.py"), *arguments]
    began = time.perf_counter()
    row: dict[str, Any] = dict(script=job.script, arguments=arguments)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        row["error"] = f"not done within {seconds:.0f} s"
    else:
        if done.returncode:
            row["error"] = f"exit code {done.returncode}"
        try:
            row["result"] = json.loads(done.stdout.strip().splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            row["error"] = f"exit code {done.returncode}, no result line; it ended with: {' '.join(last)}"
    return row | dict(seconds=round(time.perf_counter() - began, 1))


def run_all(jobs: tuple[Job, ...], extra: list[str], folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Every job whose script exists, in order, none past its own seconds or the total."""
    rows, ends_at = [], time.perf_counter() + TOTAL_S
    for job in jobs:
        if not (folder / f"{job.script}.py").exists():
            continue
        left_s = ends_at - time.perf_counter()
        print(f"{job.script} …", flush=True)
        row = run_job(job, [*job.arguments, *extra], max(1.0, min(job.seconds, left_s)), folder)
        rows.append(row)
        headlines = row.get("result", {}).get("headlines", [])
        for line in headlines:
            missed = "  MISSED" if line.get("kept") is False else ""
            print(f"  {line['what']}: {line['value']:,} {line['unit']}{missed}")
        print(f"  {row['seconds']} s" + (f", FAILED: {row['error']}" if "error" in row else ""), flush=True)
    return rows


def main() -> int:
    parser = common.arguments(__doc__)
    names = sorted({job.script for jobs in JOBS.values() for job in jobs})
    parser.add_argument("--only", nargs="+", choices=names, default=[], help="these scripts alone")
    parser.add_argument("--out", type=Path, help="instead of <device>-<commit>.json in bench/results/, or in runs/ "
                        "with --quick or --only")  # fmt: skip
    args = parser.parse_args()
    device = pick_device(args)
    jobs = tuple(job for job in JOBS[device] if not args.only or job.script in args.only)
    commit = common.git_commit()
    folder = common.REPO / "runs" if args.quick or args.only else FOLDER / "results"
    out = args.out or folder / f"{device}-{commit}.json"
    began = time.perf_counter()
    load_before = os.getloadavg()[0]
    extra = ["--device", device, "--threads", str(args.threads)] + ["--quick"] * args.quick
    rows = run_all(jobs, extra)
    failed = [row["script"] for row in rows if "error" in row]
    whole = dict(
        device=device, commit=commit, quick=args.quick, only=args.only,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        load_before=round(load_before, 2), seconds=round(time.perf_counter() - began, 1), failed=failed, scripts=rows,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [line for row in rows for line in row.get("result", {}).get("headlines", [])]
    missed = [line["what"] for line in lines if line.get("kept") is False]
    print(f"wrote {out}: {len(rows)} scripts, {whole['seconds']} s, failed: {failed or 'none'}")
    print(f"limits missed: {'; '.join(missed) or 'none'}")
    print(json.dumps(dict(bench="run_all", device=device, commit=commit, failed=failed, missed=missed, file=str(out))))
    return int(bool(failed or missed))


def pick_device(args: argparse.Namespace) -> str:
    if args.device != "auto":
        return args.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
