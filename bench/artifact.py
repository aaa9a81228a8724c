"""How long do packing the full-size model's artifact and loading it again take?

    python bench/artifact.py [--layers 3 11] [--recipe swarm]

From weights to file as a run does it, quantization included, and back into a model on the CPU; then GPTQ with the
factors of drawn inputs, and the same where FIT_BYTES has to search. Weights are drawn, so the bytes are no prediction
of a trained model's. Fewer layers show the growth.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common, tiny
from bench.train_step import QUICK


def draw_moments(config: train_gpt.Config) -> dict[str, torch.Tensor]:
    """Second moments of every bank's inputs, (matrices, in, in), that twice as many drawn inputs might have left."""
    model, moments = train_gpt.GPT(config, initialize=False), {}
    for bank in train_gpt.BANK_NAMES:
        matrices, _, width = model.get_parameter(bank).shape
        inputs = torch.randn(matrices, 2 * width, width) * torch.randn(matrices, 1, width).exp()
        moments[bank] = inputs.mT @ inputs / (2 * width)
    return moments


def timed(name: str, action: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Wall and CPU seconds of one call, and what it returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    returned = action()
    return {f"{name}_s": time.perf_counter() - wall, f"{name}_cpu_s": time.process_time() - cpu}, returned


def measure(config: train_gpt.Config, layers: int, folder: Path) -> dict[str, Any]:
    """Seconds of every way from a model of so many layers to its artifact, and of the way back."""
    torch.manual_seed(config.seed)
    config = dataclasses.replace(
        config, num_layers=layers, ve_layers=(layers - 1,), xsa_last_n=min(layers, config.xsa_last_n), mtp_num_heads=0,
        repeat_layers=(), ttt_freeze_blocks=0,
    )  # fmt: skip
    model, path = train_gpt.GPT(config), folder / f"{layers}.ptz"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    row: dict[str, Any] = dict(layers=layers, parameters=sum(p.numel() for p in model.parameters()))
    save = functools.partial(tiny.save_artifact, model, "", path)
    spent, row["bytes"] = timed("save", save)
    row |= spent | timed("load", lambda: train_gpt.load_artifact(path))[0]
    moments = draw_moments(config)
    spent, factors = timed("factorize", lambda: {bank: train_gpt.factorize(m) for bank, m in moments.items()})
    row |= spent | timed("gptq_save", lambda: save(factors))[0]
    # The contest's limit, which the full-size model misses, or one that a smaller model misses: both have to search.
    limit = min(train_gpt.SIZE_LIMIT_BYTES, int(0.95 * path.stat().st_size) + train_gpt.code_bytes())
    model.config = dataclasses.replace(config, fit_bytes=True)
    with unittest.mock.patch.object(train_gpt, "SIZE_LIMIT_BYTES", limit):
        spent, row["fit_bytes"] = timed("gptq_fit", lambda: save(factors))
    return row | spent | dict(limit_bytes=limit, fit_and_code_bytes=row["fit_bytes"] + train_gpt.code_bytes())


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--layers", type=common.positive, nargs="+", default=[3, 11])
    parser.add_argument("--recipe", default="swarm", choices=sorted(train_gpt.RECIPES))
    args = parser.parse_args()
    config = train_gpt.Config.from_env({"RECIPE": args.recipe, "DATA_PATH": "none"})
    config = dataclasses.replace(config, **(QUICK if args.quick else {}))
    runtime = common.open_runtime(args, config)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(config, layers, Path(folder)) for layers in ([2] if args.quick else args.layers)]
    last = rows[-1]
    what = f"artifact of {last['parameters'] / 1e6:.1f}M drawn weights"
    limits = (None, None) if args.quick else (60, 3)
    total = (last["fit_and_code_bytes"], "bytes", last["limit_bytes"])
    gptq_s = last["factorize_s"] + last["gptq_save_s"]
    headlines = [
        common.Headline(f"{what}: quantizing and packing", last["save_s"], "s", limits[0], at_least=False),
        common.Headline(f"{what}: factors, GPTQ and packing", gptq_s, "s", limits[0], at_least=False),
        common.Headline(f"{what}: GPTQ and the search for a clip that fits", last["gptq_fit_s"], "s"),
        common.Headline(f"{what}: with the code, after that search", *total, at_least=False),
        common.Headline(f"{what}: unpacking", last["load_s"], "s", limits[1], at_least=False),
    ]
    common.report("artifact", headlines, runtime.device, args.threads, sizes=rows)


if __name__ == "__main__":
    main()
