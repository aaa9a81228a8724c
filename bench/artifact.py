"""How long do packing the full-size model's artifact and loading it again take?

    python bench/artifact.py [--layers 3 11]

From weights to file as a run does it, quantization included, and back into a model on the CPU. Weights are drawn, so
the bytes are no prediction of a trained model's. Fewer layers show the growth.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common
from bench.train_step import QUICK


def measure(config: train_gpt.Config, layers: int, folder: Path) -> dict[str, Any]:
    """Wall and CPU seconds of saving and of loading a model of so many layers."""
    shape = dict(num_layers=layers, ve_layers=(layers - 1,), xsa_last_n=min(layers, config.xsa_last_n), mtp_num_heads=0)
    model = train_gpt.GPT(dataclasses.replace(config, **shape))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    path = folder / f"{layers}.ptz"
    row: dict[str, Any] = dict(layers=layers, parameters=sum(p.numel() for p in model.parameters()))
    for name, action in (
        ("save", lambda: train_gpt.save_artifact(model, "", path)), ("load", lambda: train_gpt.load_artifact(path)),
    ):  # fmt: skip
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        row |= {f"{name}_s": time.perf_counter() - wall, f"{name}_cpu_s": time.process_time() - cpu}
    return row | dict(bytes=path.stat().st_size)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 11])
    args = parser.parse_args()
    config = dataclasses.replace(train_gpt.Config(), **(QUICK if args.quick else {}))
    runtime = common.open_runtime(args, config)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(config, layers, Path(folder)) for layers in ([2] if args.quick else args.layers)]
    last = rows[-1]
    what = f"artifact of {last['parameters'] / 1e6:.1f}M drawn weights"
    limits = (None, None) if args.quick else (60, 3)
    headlines = [
        common.Headline(f"{what}: quantizing and packing", last["save_s"], "s", limits[0], at_least=False),
        common.Headline(f"{what}: unpacking", last["load_s"], "s", limits[1], at_least=False),
    ]
    common.report("artifact", headlines, runtime.device, args.threads, sizes=rows)


if __name__ == "__main__":
    main()
