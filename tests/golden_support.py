"""Small models and a data-free trainer, for tests of the model, the optimizers and the artifact."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train_gpt
from bench.golden import GOLDEN as GOLDEN
from bench.golden import REPO as REPO
from bench.golden import golden_arrays as golden_arrays
from bench.golden import golden_config as golden_config
from bench.golden import golden_json as golden_json
from bench.golden import golden_model as golden_model
from bench.golden import golden_parameter as golden_parameter
from bench.golden import golden_state as golden_state
from bench.golden import golden_tensor as golden_tensor
from bench.golden import golden_values as golden_values
from bench.golden import make_config as make_config

torch.set_num_threads(1)



def shared_file(*parts: str) -> Path:
    """A file of the folder of shared corpora: SHARED_DIR, else `shared` beside the repository."""
    return Path(os.environ.get("SHARED_DIR", REPO.parent / "shared")).joinpath(*parts)


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
        repeat_layers=(1, 2)[: len(full.repeat_layers)],
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

    def batch_failed(self, step: int) -> bool:  # noqa: ARG002 (nothing is read)
        return False


def make_trainer(model: train_gpt.GPT, config: train_gpt.Config) -> train_gpt.Trainer:
    """A trainer without files: its log and validation split are absent, so only `train_step` may be called."""
    absent: Any = None
    batches: Any = RandomBatches(config)
    return train_gpt.Trainer(config, make_runtime(config), absent, model, batches, absent)
