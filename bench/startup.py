"""How long from the command to the first step: import, model, first pass?

    python bench/startup.py [--device cuda]

A fresh process imports the script and builds the full-size model, orthogonal initialisation included; then models of
fewer layers show the growth. Compilation is timed by `bench/forward_backward.py`, which needs it anyway, and
`bench/train_step.py` gives the first step; importing against `import torch` alone is `bench/import_time.py`.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common


def fresh_process_s() -> float:
    """Wall seconds of a new Python that reads its settings and does nothing with them."""
    code = "import train_gpt; train_gpt.Config.from_env({})"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=common.REPO, check=True)
    return time.perf_counter() - began


def main() -> None:
    args = common.arguments(__doc__).parse_args()
    config = train_gpt.Config.from_env({"RECIPE": "leaky"})
    runtime = common.open_runtime(args, config)
    repeats = 1 if args.quick else 3
    process_s = common.timed(fresh_process_s, 1, repeats)
    rows = []
    for layers in (3, 11) if args.quick else (3, 6, 11):
        shape = dataclasses.replace(config, num_layers=layers, ve_layers=(), xsa_last_n=min(layers, 4))
        seconds = common.timed(lambda shape=shape: train_gpt.GPT(shape).to(runtime.device), 0, repeats, runtime.device)
        rows.append(dict(layers=layers, **common.spread(seconds)))
    small = train_gpt.GPT(dataclasses.replace(config, num_layers=2, ve_layers=(), xsa_last_n=2, train_seq_len=64))
    ids = torch.full((1, 64), 5)
    first, *later = common.timed(lambda: small.training_losses(ids, ids, False)[0].backward(), 0, 4)
    headlines = [
        common.Headline("a fresh process to a validated config", common.spread(process_s)["median"], "s"),
        common.Headline("building the full-size model", rows[-1]["median"], "s"),
    ]
    common.report(
        "startup", headlines, runtime.device, args.threads, process_s=common.spread(process_s), models=rows,
        first_pass_ms=1e3 * first, later_pass_ms=1e3 * min(later),
    )  # fmt: skip


if __name__ == "__main__":
    main()
