"""Reference numbers of the earlier submissions, and the models whose weights a formula gives.

Tests compare with them on the CPU, `gpu_check.py` on a GPU. The numbers lie in tests/golden, where a README says what
each file holds.
"""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import train_gpt

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO / "tests" / "golden"


@cache
def golden_json(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@cache
def golden_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return dict(archive)


def golden_tensor(archive: str, key: str) -> Tensor:
    return torch.tensor(golden_arrays(archive)[key])


def golden_values(name: str, count: int) -> np.ndarray:
    """`count` numbers in [-1, 1), float64, that depend on the name alone."""
    x = (np.arange(count, dtype=np.uint64) + zlib.crc32(name.encode())) % (1 << 32)
    for _ in range(2):
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x045D9F3B)) % (1 << 32)
    x = x ^ (x >> np.uint64(16))
    return x / 2.0**31 - 1


def golden_parameter(name: str, shape: tuple[int, ...], center: float | None, amp: float) -> Tensor:
    """center + amp·value; no center is a `resid_mix`: row 0 around 1, row 1 around 0."""
    count = int(np.prod(shape))
    middle = np.repeat([1.0, 0.0], count // 2) if center is None else np.full(count, center)
    return torch.tensor((middle + amp * golden_values(name, count)).astype(np.float32)).view(shape)


def make_config(*layers: dict[str, Any]) -> train_gpt.Config:
    """A valid Config from tables of fields; later ones win."""
    values: dict[str, Any] = {}
    for layer in layers:
        values |= layer
    return train_gpt.Config(**values).validate()


def golden_config(source: str = "model_1081", **overrides: Any) -> train_gpt.Config:
    """The configuration behind `model_1081` or `model_700`, from its own record."""
    recorded = golden_json(source)["config"]
    fields = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "bigram_vocab_size",
              "bigram_dim", "xsa_last_n", "rope_dims", "rope_base", "ln_scale", "ve_dim")  # fmt: skip
    values = {name: recorded[name] for name in fields}
    own = {"model_1081": dict(mtp_num_heads=2, leaky_slope=0.75), "model_700": dict(leaky_slope=0.5)}
    rest = dict(smear_bos_mask=False, device="cpu") | own[source]
    return make_config(values, dict(ve_layers=tuple(recorded["ve_layers"])), rest, overrides)


def golden_state(source: str = "model_1081") -> dict[str, Tensor]:
    """The reference weights, under the names that the submission gave them."""
    record = golden_json(source)
    return {
        name: golden_parameter(name, tuple(record["state_dict"][name]), row["center"], row["amp"])
        for name, row in record["params"].items()
    }


def golden_model(**overrides: Any) -> train_gpt.GPT:
    """`model_1081` with its reference weights."""
    model = train_gpt.GPT(golden_config(**overrides))
    state = golden_state()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model
