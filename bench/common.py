"""What the benchmarks share: where a figure was measured, how repeats become one, and how results are printed.

Every script ends with `report`: a table for people, then one JSON line with the figures, the machine and the commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    import train_gpt

REPO = Path(__file__).resolve().parents[1]
# Dense bf16 peaks of the data sheets, FLOP/s; the first name that a device's name holds counts.
DATASHEET_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}


@dataclasses.dataclass(frozen=True)
class Headline:
    """One figure for the performance table, with the limit it has to keep where there is one."""

    what: str
    value: float
    unit: str
    limit: float | None = None
    at_least: bool = True  # whether the limit is a floor

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = dict(what=self.what, value=round_figure(self.value), unit=self.unit)
        if self.limit is not None:
            kept = self.value >= self.limit if self.at_least else self.value <= self.limit
            row |= dict(limit=self.limit, at_least=self.at_least, kept=kept)
        return row


def round_figure(value: Any, digits: int = 4) -> Any:
    """So many significant digits; whole numbers and everything else as they are."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None  # JSON has no other word for it


def positive(text: str) -> int:
    """A whole number above 0, as an option's type: argparse says the ValueError in a line."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def arguments(doc: str | None, threads: int = 2) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark of the model has."""
    parser = argparse.ArgumentParser(
        description=str(doc), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=positive, default=threads, help=f"of torch on the CPU (default {threads})")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    return parser


def open_runtime(args: argparse.Namespace, config: train_gpt.Config) -> train_gpt.Runtime:
    """The runtime of one rank on the device asked for, with its threads set; without that device the end."""
    import torch

    import train_gpt

    torch.set_num_threads(args.threads)
    try:
        runtime = train_gpt.Runtime(dataclasses.replace(config, device=args.device), {})
    except train_gpt.UserError as error:
        raise SystemExit(f"error: {error}") from error
    return runtime.__enter__()  # one rank joins no group, so there is nothing to leave


# ----------------------------------------------------------------------------------------------------------
# Where
# ----------------------------------------------------------------------------------------------------------
def git_commit(root: Path = REPO) -> str:
    """Short hash of the commit that the code is at, `-dirty` where tracked files differ; "unknown" outside git."""
    try:
        commit = _git(root, "rev-parse", "--short=10", "HEAD")
        # Results and the pages made from them are no code: writing them must not change the name of the code.
        unseen = ":!bench/results", ":!*.md", ":!docs"
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *unseen)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine(device: torch.device | None = None, threads: int | None = None) -> dict[str, Any]:
    """Device, processor, cores, threads, load of the last minute, and versions."""
    import numpy as np
    import torch

    import train_gpt

    found: dict[str, Any] = dict(
        device=device.type if device else "cpu", cpu=train_gpt.cpu_name(), cores=os.cpu_count(), threads=threads or 1,
        load=round(os.getloadavg()[0], 2), python=platform.python_version(), torch=torch.__version__,
        numpy=np.__version__, system=f"{platform.system()} {platform.machine()}",
    )  # fmt: skip
    if device is not None and device.type == "cuda":
        memory_gib = round(torch.cuda.get_device_properties(device).total_memory / 2**30)
        found |= dict(gpu=torch.cuda.get_device_name(device), gpu_memory_gib=memory_gib, cuda=torch.version.cuda)
    return found


def peak_memory_mib(device: torch.device | None = None) -> int:
    """Most memory held so far: allocated on the GPU, else resident in this process."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) >> 20
    import resource

    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


# ----------------------------------------------------------------------------------------------------------
# How long
# ----------------------------------------------------------------------------------------------------------
def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, minimum and maximum of repeats."""
    figures = dict(median=statistics.median(values), min=min(values), max=max(values))
    return {name: float(value) for name, value in figures.items()} | dict(repeats=len(values))


def synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def timed(
    action: Callable[[], Any], burn_in: int, repeats: int, device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:  # fmt: skip
    """Seconds of each of `repeats` runs after `burn_in` that do not count; the device's queue is empty at both ends."""
    seconds = []
    for number in range(burn_in + repeats):
        synchronize(device)
        began = clock()
        action()
        synchronize(device)
        if number >= burn_in:
            seconds.append(clock() - began)
    return seconds


def longest_pause_s(busy: Callable[[], bool]) -> float:
    """The longest that this thread, which asks for nothing, waits for the interpreter while others are busy."""
    longest, before = 0.0, time.perf_counter()
    while busy():
        time.sleep(0.0005)
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    return longest


def timed_in_turn(
    actions: dict[str, Callable[[], Any]], burn_in: int, repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each action, run alternately, so that a drift of the machine's speed meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(burn_in + repeats):
        for name, action in actions.items():
            began = clock()
            action()
            if number >= burn_in:
                seconds[name].append(clock() - began)
    return seconds


# ----------------------------------------------------------------------------------------------------------
# How much
# ----------------------------------------------------------------------------------------------------------
def train_flops_per_token(config: train_gpt.Config, seq_len: int) -> int:
    """FLOP that forward and backward of one token take: 6 a weight of every matrix product, causal attention once.

    MTP heads are left out, since the model that is kept has none: 229 million at the record's shape, length 2048.
    Layers that are run twice count twice, as from REPEAT_FROM on.
    """
    D, L = config.model_dim, config.num_layers + len(config.repeat_layers)
    weights = L * (2 * D * D + 2 * config.kv_dim * D + 2 * config.mlp_dim * D)
    weights += config.vocab_size * D + config.bigram_dim * D
    weights += config.ve_dim * config.kv_dim if config.ve_layers else 0
    return 6 * (weights + L * D * seq_len)


def gemm_flops_per_second(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 7) -> float:
    """The best rate of a square matrix product here and now: the peak that a share of it is stated against."""
    import torch

    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / min(timed(lambda: left @ right, 2, repeats, device))


def datasheet_peak(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that the maker states for this GPU, if it is in the table."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in DATASHEET_PEAKS.items() if part in name), None)


# ----------------------------------------------------------------------------------------------------------
# What comes out
# ----------------------------------------------------------------------------------------------------------
def table(rows: Iterable[dict[str, Any]]) -> str:
    """Rows with the same keys, in columns."""
    rows = [{name: _shown(value) for name, value in row.items()} for row in rows]
    if not rows:
        return ""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [{name: name for name in widths}, *rows]
    return "\n".join("  ".join(line[name].rjust(width) for name, width in widths.items()) for line in lines)


def _is_table(rows: Any) -> bool:
    """Whether these are rows of plain values."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return False
    return not any(isinstance(value, (dict, list)) for row in rows for value in row.values())


def _rounded(value: Any) -> Any:
    """The same structure with six significant digits everywhere."""
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else round_figure(value, 6)


def _shown(value: Any) -> str:
    value = round_figure(value)
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def report(
    bench: str, headlines: Sequence[Headline], device: torch.device | None = None, threads: int | None = None,
    **figures: Any,
) -> dict[str, Any]:  # fmt: skip
    """Print what was measured, for people and as the last line for machines, and return the latter."""
    for name, rows in figures.items():
        if _is_table(rows):
            print(f"{bench}, {name}:", table(rows), sep="\n")
    for headline in headlines:
        row = headline.row()
        bound = f" (limit: at {'least' if headline.at_least else 'most'} {headline.limit:,})" if "limit" in row else ""
        print(f"{row['what']}: {row['value']:,} {row['unit']}{bound}")
    result = dict(
        bench=bench, headlines=[headline.row() for headline in headlines], **_rounded(figures),
        machine=machine(device, threads), commit=git_commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip
    print(json.dumps(result), flush=True)
    return result
