"""How many megabytes of text does one core turn into token shards in a second?

    python bench/data_preparation.py [--mb 12] [--workers 1 2]

The text is the documentation inside this Python, repeated to the size asked for. The tokenizer is trained beforehand
and does not count. The rate is of text bytes over the CPU seconds of `data/prepare.py` and its workers, so that a busy
machine changes it little; wall seconds stand beside it. Half the text and a second worker show the growth.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common


def call(script: str, *words: str) -> None:
    """Run one of the data programs; its output is shown only where it fails."""
    command = [sys.executable, str(common.REPO / "data" / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} failed: {done.stderr.strip()}")


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def write_corpus(path: Path, lines: list[str], text_bytes: float) -> float:
    """Repeat documents until they hold so much text; returns the megabytes written."""
    written, number = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < text_bytes:
            text = json.loads(lines[number % len(lines)])["text"]
            text = f"{text}\n{number}"  # equal documents would meet the same side of the split
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            number += 1
    return written / 1e6


def measure(folder: Path, lines: list[str], megabytes: float, workers: int) -> dict[str, Any]:
    corpus, out = folder / "corpus.jsonl", folder / f"out_{megabytes}_{workers}"
    written_mb = write_corpus(corpus, lines, megabytes * 1e6)
    tokenizer = str(folder / "base" / "tokenizer.model")
    cpu, wall = cpu_seconds_of_children(), time.perf_counter()
    call("prepare.py", str(corpus), "--out", str(out), "--tokenizer", tokenizer, "--workers", str(workers))
    cpu, wall = cpu_seconds_of_children() - cpu, time.perf_counter() - wall
    return dict(text_mb=written_mb, workers=workers, cpu_s=cpu, wall_s=wall, mb_per_cpu_s=written_mb / cpu)


def main() -> None:
    parser = common.arguments(__doc__, threads=1)
    parser.add_argument("--mb", type=float, default=12.0, help="megabytes of text (default 12)")
    parser.add_argument("--workers", type=common.positive, nargs="+", default=[1, 2])
    args = parser.parse_args()
    megabytes = 1.0 if args.quick else args.mb
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call("demo_corpus.py", "--out", str(folder / "documents.jsonl"))
        lines = (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()
        call("prepare.py", str(folder / "documents.jsonl"), "--out", str(folder / "base"), "--train-tokenizer", "1024")
        rows = [measure(folder, lines, megabytes / 2, args.workers[0])]
        rows += [measure(folder, lines, megabytes, workers) for workers in args.workers]
    limit = None if args.quick else 1.5
    what = "text to token shards, one worker"
    headline = common.Headline(what, rows[1]["mb_per_cpu_s"], "MB per CPU second", limit)
    common.report("data_preparation", [headline], None, 1, sizes=rows)


if __name__ == "__main__":
    main()
