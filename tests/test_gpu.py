"""Short checks on a CUDA device; `python bench/gpu_check.py` is the long one."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Any]:
    """The state that the checks share, at the small size."""
    gpu_check = importlib.import_module("bench.gpu_check")
    args = argparse.Namespace(device="cuda", threads=2, quick=True)
    config = gpu_check.bench_config(args, tmp_path)
    runtime = gpu_check.common.open_runtime(args, config)
    gpu_check.train_step.write_random_shard(tmp_path, config, 8 * config.train_batch_tokens + 1)
    yield gpu_check.Bench(args, config, runtime, tmp_path, time.perf_counter() + 300)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["golden", "fp32", "bf16", "attention", "grid", "compiled", "step", "counts"])
def test_check_passes(name: str, bench: Any):
    """Tolerances and what is compared are those of bench/gpu_check.py."""
    row = importlib.import_module("bench.gpu_check").run_check(name, bench)
    assert row["status"] == "done", row
    assert row["findings"]
