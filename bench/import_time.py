"""How much longer does `import train_gpt` take than `import torch`?

    python bench/import_time.py [--pairs 7]

The two imports run in turn as whole processes, so that a drift of the machine's speed meets both.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common


def seconds_to_import(module: str) -> float:
    """Wall seconds of a fresh Python that imports one module and ends."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], cwd=common.REPO, check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = common.arguments(__doc__, threads=1)
    parser.add_argument("--pairs", type=common.positive, default=7)
    args = parser.parse_args()
    seconds_to_import("train_gpt")  # burn-in: byte code and page cache
    count = 1 if args.quick else args.pairs
    pairs = [(seconds_to_import("torch"), seconds_to_import("train_gpt")) for _ in range(count)]
    ratios = [own / base for base, own in pairs]
    headline = common.Headline(
        "`import train_gpt` against `import torch`", statistics.median(ratios), "×", 1.15, at_least=False
    )
    torch_s, own_s = (common.spread(column) for column in zip(*pairs))
    common.report("import_time", [headline], None, 1, torch_s=torch_s, train_gpt_s=own_s, ratio=common.spread(ratios))


if __name__ == "__main__":
    main()
