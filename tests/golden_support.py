"""Reference numbers, small models and a data-free trainer, for tests of the model, the optimizers and the artifact."""

from __future__ import annotations

import functools
import json
import os
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import train_gpt

torch.set_num_threads(1)

REPO = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"


def shared_file(*parts: str) -> Path:
    """A file of the folder of shared corpora: SHARED_DIR, else `shared` beside the repository."""
    return Path(os.environ.get("SHARED_DIR", REPO.parent / "shared")).joinpath(*parts)


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


SMALL: dict[str, Any] = dict(
    device="cpu", vocab_size=96, num_layers=4, model_dim=32, num_heads=4, bigram_vocab_size=64, bigram_dim=16,
    ve_dim=8, rope_train_len=16, train_seq_len=24, train_batch_tokens=96, micro_batch_tokens=48, eval_seq_len=24,
    eval_stride=8, warmup_steps=0, max_wallclock_seconds=0.0, val_tokens=0,
)  # fmt: skip


def tiny_config(**overrides: Any) -> train_gpt.Config:
    """A model of milliseconds with every part switched on: GQA, XSA, VE, MTP, bigram, smear, partial RoPE, NTK."""
    parts = dict(num_kv_heads=2, mlp_mult=2.0, ve_layers=(2, 3), xsa_last_n=2, rope_dims=4, mtp_num_heads=2)
    return make_config(SMALL, parts, overrides)


def tiny_recipe(name: str) -> train_gpt.Config:
    """A recipe with the parts that it switches on, at the size of `tiny_config`."""
    values = train_gpt.RECIPES[name] | dict(recipe=name)
    full = make_config(values)
    parts = dict(
        num_kv_heads=max(1, SMALL["num_heads"] * full.num_kv_heads // full.num_heads),
        ve_layers=(2, 3)[: len(full.ve_layers)],
        xsa_last_n=min(full.xsa_last_n, SMALL["num_layers"]),
        rope_dims=min(full.rope_dims, 4),
        rope_train_len=min(full.rope_train_len, SMALL["rope_train_len"]),
        ttt_freeze_blocks=min(full.ttt_freeze_blocks, SMALL["num_layers"] - 2),
        train_reserve_seconds=0.0,
    )
    return make_config(values, SMALL, parts)


def randomize(model: train_gpt.GPT, seed: int = 0) -> train_gpt.GPT:
    """Move every parameter away from where it starts, so that no part is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            width = parameter.size(-1) if parameter.ndim > 1 else 25
            parameter.add_(torch.randn(parameter.shape, generator=generator) / width**0.5)
    return model


def search_scale(weight: Tensor, grid: train_gpt.Grid) -> Tensor:
    """The scale that `lite` picks for each row."""
    rounding = functools.partial(train_gpt.round_plainly, weight, grid=grid)
    return train_gpt.best_rounding(weight, grid, rounding)[1]


def random_ids(config: train_gpt.Config, rows: int, length: int, seed: int = 0) -> Tensor:
    """Ids (rows, length) without BOS."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(train_gpt.BOS_ID + 1, config.vocab_size, (rows, length), generator=generator)


def grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def make_runtime(config: train_gpt.Config) -> train_gpt.Runtime:
    return train_gpt.Runtime(config, {})


class RandomBatches:
    """Stands in for the loader: the batch of a step depends on the step alone."""

    def __init__(self, config: train_gpt.Config):
        self.config, self.plan = config, train_gpt.BatchPlan.of(config, 1)

    def batch(self, step: int) -> list[tuple[Tensor, Tensor]]:
        config = self.config
        ids = random_ids(config, self.plan.rank_seqs, config.train_seq_len + 1, seed=1000 + step)
        pieces = ids.chunk(self.plan.grad_accum_steps)
        return [(piece[:, :-1], piece[:, 1:]) for piece in pieces]

    def failing(self, step: int) -> bool:  # noqa: ARG002 (nothing is read)
        return False


def make_trainer(model: train_gpt.GPT, config: train_gpt.Config) -> train_gpt.Trainer:
    """A trainer without files: its log and validation split are absent, so only `train_step` may be called."""
    absent: Any = None
    batches: Any = RandomBatches(config)
    return train_gpt.Trainer(config, make_runtime(config), absent, model, batches, absent)
