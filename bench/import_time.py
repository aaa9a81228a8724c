"""How much longer does `import train_gpt` take than `import torch`?

    python bench/import_time.py [--pairs 7]

The two imports run in turn as whole processes, so that a drift of the machine's speed meets both; a table for
people, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def seconds_to_import(module: str) -> float:
    """Wall seconds of a fresh Python that imports one module and ends."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], cwd=REPO, check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    seconds_to_import("train_gpt")  # burn-in: byte code and page cache
    pairs = [(seconds_to_import("torch"), seconds_to_import("train_gpt")) for _ in range(args.pairs)]
    ratios = [own / base for base, own in pairs]
    result = {
        "bench": "import_time",
        "pairs": args.pairs,
        "torch_s": statistics.median(base for base, _ in pairs),
        "train_gpt_s": statistics.median(own for _, own in pairs),
        "median_ratio": statistics.median(ratios),
        "best_ratio": min(ratios),
    }
    print(f"import torch {result['torch_s']:.2f} s, import train_gpt {result['train_gpt_s']:.2f} s")
    print(f"ratio: median {result['median_ratio']:.3f}, best {result['best_ratio']:.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
