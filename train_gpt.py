"""Parameter Golf record: train an 11-layer int6 GPT for 600 s, pack it under 16 MB, score it in bits per byte.

    torchrun --nproc_per_node=8 train_gpt.py          # eight GPUs; SEED=1337, RECIPE=…, any field of Config
    python train_gpt.py                               # one GPU, or a CPU
    EVAL_ONLY=1 ARTIFACT=final_model.int6.ptz python train_gpt.py

One direction of flow: environment → Config → Runtime → TokenLoader, ValidationSet → GPT → Optimizers → train →
averaged weights → artifact → fresh GPT → token scores → bits per byte. Importing this file starts nothing.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import hashlib
import importlib
import itertools
import json
import math
import mmap
import os
import platform
import re
import signal
import sys
import time
import traceback
import types
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

import kg_data
import swarm_agents

BOS_ID = 1  # every document begins with it, in the contest's shards and in those of data/prepare.py
SIZE_LIMIT_BYTES = 16_000_000  # decimal megabytes: code plus artifact
MASS_TOLERANCE = 1e-4  # how far a distribution's sum may be from 1
STAGE_BUDGET_S = 600.0  # the contest's limit for training, and again for evaluation
CODE_FILES = ("train_gpt.py", "swarm_agents.py", "kg_data.py")
CODE_DIR = Path(__file__).resolve().parent


class UserError(Exception):
    """Something the user can put right; its text says what was found, what was expected and what to do."""


class ConfigError(UserError, ValueError):
    """A variable, or a combination of variables, that cannot work."""


class DataError(UserError):
    """A shard, tokenizer or validation split that cannot be used."""


class ArtifactError(UserError):
    """An artifact that is missing, damaged, foreign or too large."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another run."""


class TrainingError(UserError):
    """Gradients that stay non-finite, or a loss that ran away."""


class Stopped(Exception):
    """SIGTERM or SIGINT ended the run at a boundary, its progress saved; the argument is the signal's number."""


def require(package: str, purpose: str) -> types.ModuleType:
    """Import an optional package where it is first needed. Raises UserError: which one is missing and for what."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        built_in = name in sys.stdlib_module_names  # not every Python is built with lzma
        advice = "use a Python that was built with it" if built_in else f"pip install {name}"
        raise UserError(f"{purpose} needs the package {name!r} ({error}): {advice}") from error


# ----------------------------------------------------------------------------------------------------------
# 1. Config: every setting, in one frozen object. Value = environment variable, else recipe, else default.
# ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run; field `matrix_lr` is read from the variable MATRIX_LR."""

    recipe: str = "swarm"
    seed: int = 1337
    run_id: str = ""  # empty: recipe, seed and start time
    out_dir: str = "."  # artifact and logs/ go there
    data_path: str = "./data/datasets/fineweb10B_sp1024"
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"
    device: str = "auto"
    attention: str = "auto"
    compile: bool | None = None  # auto: on CUDA only
    checkpoint_seconds: float = 120.0  # 0: only at a signal and at the end of training
    checkpoint_keep: int = 2  # as many of the newest stay on disk
    resume: str = ""  # auto: from the newest whole checkpoint in out_dir, if there is one; or a checkpoint's path
    eval_only: bool = False
    artifact: str = ""  # empty: final_model.int6.ptz in out_dir

    vocab_size: int = 1024
    num_layers: int = 11
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: float = 3.0
    leaky_slope: float = 0.75  # 0 is plain ReLU; the activation is squared either way
    tie_embeddings: bool = True
    tied_embed_init_std: float = 0.005
    logit_softcap: float = 30.0
    qk_gain_init: float = 1.5
    bigram_vocab_size: int = 2048
    bigram_dim: int = 128
    bigram_start_bucket: bool = True  # of its own for position 0; else the token before it counts as 0
    zero_init_out: bool = True  # output and down projections; else orthogonal, divided by √(2·NUM_LAYERS)
    smear_bos_mask: bool = True
    xsa_last_n: int = 4
    rope_dims: int = 16  # 0: all dimensions of a head
    rope_base: float = 10_000.0
    rope_train_len: int = 1024  # longer sequences rescale the base (NTK); 0: never
    ln_scale: bool = True
    ve_dim: int = 128
    ve_layers: tuple[int, ...] = (9, 10)
    mtp_num_heads: int = 0
    mtp_loss_weight: float = 0.1

    train_batch_tokens: int = 786_432
    micro_batch_tokens: int = 98_304  # upper bound of one forward pass on one rank
    train_seq_len: int = 2048
    iterations: int = 20_000
    max_wallclock_seconds: float = 600.0  # 0: no cap
    warmup_steps: int = 20  # primes compilation; weights and data position are restored afterwards
    warmdown_iters: int = 3700
    matrix_lr: float = 0.027
    tied_embed_lr: float = 0.035
    embed_lr: float = 0.6  # token embedding when TIE_EMBEDDINGS=0
    head_lr: float = 0.008  # MTP heads, and the output head when TIE_EMBEDDINGS=0
    scalar_lr: float = 0.025
    muon_momentum: float = 0.99
    muon_momentum_warmup_start: float = 0.92
    muon_momentum_warmup_steps: int = 1500
    muon_steps: int = 5
    muon_wd: float = 0.04
    adam_wd: float = 0.04
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    grad_clip_norm: float = 0.3  # 0: no clipping
    swarm_enabled: bool = False
    swarm_every: int = 800  # steps between votes
    kg_enabled: bool = False
    kg_init_scale: float = 0.1  # tok_emb[id] *= 1 + KG_INIT_SCALE · importance
    kg_weight: float = 0.3  # token weight in the training loss: 1 + KG_WEIGHT · importance, at mean 1
    kg_path: str = ""  # a file with the 976 characters; empty: the blob in kg_data.py
    weight_average: str = "ema"
    ema_decay: float = 0.997
    swa_every: int = 50
    swa_start_scale: float = 0.5  # SWA collects while the LR scale is below this
    qat_bits: int = 6  # of the banks, in training and in the artifact; 0: no QAT, and 6 bits in the artifact
    attn_bits: int = 0  # of the attention banks; 0: as QAT_BITS says
    mlp_bits: int = 0  # of the MLP banks; 0: as QAT_BITS says
    embed_bits: int = 8  # of embeddings, output head and tables over 65,536 elements; 16: fp16
    crown_q_lambda: float = 0.0  # weight of the CROWN-Q penalty while QAT is on; 0: none
    late_qat_threshold: float = 0.15  # QAT begins when the LR scale falls below this; 1: from the start
    compressor: str = "zstd"  # of the artifact; its first bytes tell the loader
    fit_bytes: bool = False  # an artifact above the limit is quantized anew, coarser, until it fits
    val_loss_every: int = 4000  # 0: only at the end
    train_log_every: int = 500
    quantizer: str = "lite"  # or gptq, calibrated on training data
    train_reserve_seconds: float = 0.0  # the part of MAX_WALLCLOCK_SECONDS that is kept for calibration
    calibration_tokens: int = 262_144  # over all ranks, right after those of the last training step
    clip_std: float = 0.0  # banks are clipped at this many standard deviations of a row; 0: best quantile of each row
    embed_clip_std: float = 0.0  # the same for embeddings, output head and tables
    prune_fraction: float = 0.0  # of every bank, the smallest weights become zero
    val_tokens: int = 0  # 0: all; otherwise only the first N targets, and every result says `partial`

    eval_seq_len: int = 2048
    eval_stride: int = 64
    eval_batch_seqs: int = 32
    ttt_enabled: bool = False  # score-first test-time training
    ttt_optimizer: str = "sgd"
    ttt_lr: float = 0.002
    ttt_lr_ramp: float = 1.0  # the cosine's factor grows from 1 to this over the first 30 % of the chunks
    ttt_momentum: float = 0.9
    ttt_epochs: int = 3
    ttt_chunk_tokens: int = 32_768
    ttt_freeze_blocks: int = 2
    ttt_scope: str = "all"  # last: matrices of unfrozen blocks and every gain and scale, no tables
    ttt_batch_seqs: int = 32
    ttt_grad_clip: float = 1.0  # 0: no clipping
    ttt_byte_weighted: bool = False
    ttt_temperature: float = 1.0  # of a token predicted with certainty; 1: none
    polyak_decay: float = 0.0  # 0: score with the trained weights themselves
    mixer: str = "none"  # on the stream of token scores; backoff-published and hedge are those of 1094 and 700
    mixer_eta: float = 0.1
    ngram_order: int = 10
    ngram_counts: str = "exact"  # hashed, as published: the result is no probability, and is labelled INVALID
    ngram_buckets: int = 4_194_304
    ngram_block: int = 8192  # hashed counts take in this many targets at a time: 128 windows at stride 64
    ngram_min_count: int = 1
    alpha_base: float = 0.20
    alpha_range: float = 0.55
    alpha_center: float = 3.0
    entropy_expert: bool = False  # hedge's published fifth expert, which is no distribution

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """Read and validate the settings. Raises ConfigError: the variable, its value, what is allowed."""
        recipe = environ.get("RECIPE", cls.recipe)
        if recipe not in RECIPES:
            raise ConfigError(f"RECIPE={recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
        hints = typing.get_type_hints(cls)
        _reject_misspelt(environ, {name.upper() for name in hints} | {"RECIPE"})
        values: dict[str, Any] = dict(RECIPES[recipe], recipe=recipe)
        for name, kind in hints.items():
            if name.upper() in environ:
                values[name] = _parse(name.upper(), environ[name.upper()], kind)
        return cls(**values).validate()

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The config stored in an artifact. Raises ConfigError: damaged, other fields, another type, out of range."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the stored config is no JSON: {error}") from None
        known = typing.get_type_hints(cls)
        if not isinstance(values, dict) or set(values) != set(known):
            odd = sorted(set(known).symmetric_difference(values)) if isinstance(values, dict) else type(values).__name__
            raise ConfigError(f"the stored config does not have this version's fields; they differ in {odd}")
        for name, value in values.items():
            if not _stored_as(value, known[name]):
                wanted = cls.__annotations__[name]
                raise ConfigError(f"the stored config has {name.upper()}={value!r:.80}: expected {wanted}")
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values).validate()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def validate(self) -> Config:
        """Check ranges and combinations; returns self. Raises ConfigError."""
        for name, (low, high) in FIELD_RANGES.items():
            _expect(low <= getattr(self, name) <= high, self, name, f"a value from {low:g} to {high:g}")
        for name, allowed in FIELD_CHOICES.items():
            _expect(getattr(self, name) in allowed, self, name, "one of " + ", ".join(map(str, allowed)))
        heads, layers, width = self.num_heads, self.num_layers, self.head_dim
        rotated, window, seq_len = self.rope_dims or width, self.eval_seq_len, self.train_seq_len
        hashed, chunk = self.ngram_counts == "hashed", self.ttt_chunk_tokens if self.ttt_enabled else window
        frozen = self.ttt_freeze_blocks if self.ttt_enabled else 0
        cap, reserve = self.max_wallclock_seconds, self.max_wallclock_seconds and self.train_reserve_seconds
        rules = (
            (self.model_dim % heads == 0, "model_dim", f"a multiple of NUM_HEADS={heads}"),
            (self.head_dim % 2 == 0, "num_heads", "heads of an even width (MODEL_DIM / NUM_HEADS)"),
            (heads % self.num_kv_heads == 0, "num_kv_heads", f"a divisor of NUM_HEADS={heads}"),
            (self.mlp_mult * self.model_dim % 1 == 0, "mlp_mult", "MLP_MULT × MODEL_DIM to be whole"),
            (rotated in range(4, width + 1, 2), "rope_dims", f"0 (all) or an even number from 4 to {width}"),
            (self.xsa_last_n <= layers, "xsa_last_n", f"at most NUM_LAYERS={layers}"),
            (set(self.ve_layers) <= set(range(layers)), "ve_layers", f"layers from 0 to {layers - 1}"),
            (len(set(self.ve_layers)) == len(self.ve_layers), "ve_layers", "no layer twice"),
            (self.eval_stride <= window, "eval_stride", f"at most EVAL_SEQ_LEN={window}"),
            # A shorter chunk would be trained on before all of it is scored.
            (chunk >= window, "ttt_chunk_tokens", f"at least EVAL_SEQ_LEN={window}"),
            (self.alpha_base + self.alpha_range <= 1, "alpha_range", f"at most 1 - ALPHA_BASE={self.alpha_base:g}"),
            (self.ngram_buckets & (self.ngram_buckets - 1) == 0, "ngram_buckets", "a power of two"),
            (reserve == 0 or reserve < cap, "train_reserve_seconds", f"less than MAX_WALLCLOCK_SECONDS={cap:g}"),
            (reserve > 0 or not cap or self.quantizer == "lite", "train_reserve_seconds", "above 0 for QUANTIZER=gptq"),
            (frozen <= layers, "ttt_freeze_blocks", f"at most NUM_LAYERS={layers}"),
            (self.mtp_num_heads < seq_len, "mtp_num_heads", f"less than TRAIN_SEQ_LEN={seq_len}"),
            (self.train_batch_tokens % seq_len == 0, "train_batch_tokens", f"a multiple of TRAIN_SEQ_LEN={seq_len}"),
            (not hashed or self.mixer in ("none", "backoff-published"), "ngram_counts", "exact with this MIXER"),
        )
        for ok, name, allowed in rules:
            _expect(ok, self, name, allowed)
        return self

    def without(self, *names: str) -> Config:
        """The same with the defaults of the named fields."""
        defaults = Config()
        return dataclasses.replace(self, **{name: getattr(defaults, name) for name in names})

    def portable(self) -> Config:
        """The config that goes into an artifact: no MTP heads, and nothing of the machine and the process."""
        return dataclasses.replace(self.without(*PATH_FIELDS, "run_id", *RESTART_FIELDS), mtp_num_heads=0)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def training_seconds(self) -> float:
        """What the cap leaves for the training loop; 0: no cap."""
        return self.max_wallclock_seconds and self.max_wallclock_seconds - self.train_reserve_seconds

    @property
    def bank_bits(self) -> dict[str, int]:
        """Bits of each bank's weights in the artifact."""
        attention, mlp = (bits or self.qat_bits or 6 for bits in (self.attn_bits, self.mlp_bits))
        return dict(mlp_up_bank=mlp, mlp_down_bank=mlp, qo_bank=attention, kv_bank=attention)

    @property
    def bits_label(self) -> str:
        """What result lines call the banks' bits: `int6`, or `int5_6` where attention and MLP differ."""
        return "int" + "_".join(str(bits) for bits in sorted(set(self.bank_bits.values())))

    @property
    def artifact_path(self) -> Path:
        return Path(self.artifact) if self.artifact else Path(self.out_dir) / "final_model.int6.ptz"


PATH_FIELDS = ("data_path", "tokenizer_path", "kg_path", "out_dir", "artifact")
RESTART_FIELDS = ("checkpoint_seconds", "checkpoint_keep", "resume")
# A resumed run may differ in fields that begin like this: they do not change what training computes.
NOT_TRAINING = (
    *RESTART_FIELDS, *PATH_FIELDS, "run_id", "device", "attention", "compile", "warmup_steps", "micro_batch_tokens",
    "train_log_every", "val_", "eval_", "ttt_", "polyak_decay", "mixer", "ngram_", "alpha_", "entropy_expert",
    "quantizer", "calibration_tokens", "prune_fraction", "fit_bytes", "compressor",
)  # fmt: skip

# What a recipe sets beyond the defaults above.
RECIPES: dict[str, dict[str, Any]] = {
    "swarm": dict(  # pull request 1081
        mtp_num_heads=2, swarm_enabled=True, kg_enabled=True, fit_bytes=True, ttt_enabled=True, mixer="backoff",
    ),
    "backoff": dict(mtp_num_heads=2, fit_bytes=True, mixer="backoff-published", ngram_counts="hashed"),  # 1094
    "leaky": dict(fit_bytes=True, ttt_enabled=True),  # 977
    "hedge": dict(  # 700
        num_kv_heads=8, mlp_mult=3.5, leaky_slope=0.5, bigram_vocab_size=6144, xsa_last_n=11, matrix_lr=0.025,
        warmdown_iters=3500, qat_bits=5, late_qat_threshold=0.5, crown_q_lambda=0.01, quantizer="gptq",
        prune_fraction=0.03, train_reserve_seconds=18.0, fit_bytes=True, ttt_enabled=True, ttt_optimizer="adamw",
        ttt_lr=1e-4, ttt_lr_ramp=3.0, ttt_epochs=4, ttt_chunk_tokens=131_072, ttt_freeze_blocks=9, ttt_scope="last",
        polyak_decay=0.998, ttt_byte_weighted=True, ttt_temperature=0.98, mixer="hedge",
    ),
    "smear": dict(  # 150
        leaky_slope=0.0, bigram_start_bucket=False, zero_init_out=False, xsa_last_n=0, rope_dims=0, rope_base=50_000.0,
        rope_train_len=0, ln_scale=False, ve_layers=(), matrix_lr=0.025, warmdown_iters=3000, late_qat_threshold=1.0,
        weight_average="swa", embed_bits=16, fit_bytes=True, ttt_enabled=True,
    ),
    "demo": dict(
        data_path="./runs/demo/data", tokenizer_path="./runs/demo/data/tokenizer.model", out_dir="./runs/demo",
        num_layers=3, model_dim=128, num_heads=2, num_kv_heads=1, ve_layers=(2,), ve_dim=32, bigram_dim=64,
        xsa_last_n=1, rope_train_len=256, mtp_num_heads=1, train_seq_len=256, train_batch_tokens=2048,
        micro_batch_tokens=2048, iterations=500, warmdown_iters=250, warmup_steps=1, max_wallclock_seconds=80.0,
        muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=60, ema_decay=0.95,
        val_loss_every=250, train_log_every=50, eval_seq_len=256, eval_stride=64, swarm_enabled=True, swarm_every=50,
        kg_enabled=True, kg_path="./runs/demo/kg_blob.txt", ttt_enabled=True, ttt_epochs=1, ttt_chunk_tokens=8192,
        ttt_freeze_blocks=1, ttt_batch_seqs=8, ttt_lr=0.01, mixer="backoff",
    ),
}  # fmt: skip

FIELD_RANGES: dict[str, tuple[float, float]] = dict(
    seed=(0, 2**63 - 1), vocab_size=(2, 65_535), num_layers=(1, 64), model_dim=(8, 8192), num_heads=(1, 128),
    num_kv_heads=(1, 128), mlp_mult=(0.125, 16), leaky_slope=(0, 1), tied_embed_init_std=(1e-6, 1),
    logit_softcap=(1, 1000), qk_gain_init=(0.01, 100), bigram_vocab_size=(2, 2**24), bigram_dim=(1, 4096),
    xsa_last_n=(0, 64), rope_dims=(0, 512), rope_base=(10, 1e8), rope_train_len=(0, 2**20), ve_dim=(1, 4096),
    mtp_num_heads=(0, 8), mtp_loss_weight=(0, 1), train_batch_tokens=(1, 2**30), micro_batch_tokens=(1, 2**30),
    train_seq_len=(2, 2**20), iterations=(1, 10**9), max_wallclock_seconds=(0, 1e7), warmup_steps=(0, 1000),
    warmdown_iters=(0, 10**9), matrix_lr=(0, 10), tied_embed_lr=(0, 10), embed_lr=(0, 10), head_lr=(0, 10),
    scalar_lr=(0, 10), muon_momentum=(0, 0.9999), muon_momentum_warmup_start=(0, 0.9999), muon_steps=(1, 20),
    muon_momentum_warmup_steps=(0, 10**9), muon_wd=(0, 1), adam_wd=(0, 1), beta1=(0, 0.9999), beta2=(0, 0.999999),
    adam_eps=(1e-20, 1), grad_clip_norm=(0, 1e6), checkpoint_seconds=(0, 1e7), checkpoint_keep=(1, 1000),
    swarm_every=(1, 10**9), kg_init_scale=(0, 10), kg_weight=(0, 1), ema_decay=(0, 0.999999), swa_every=(1, 10**9),
    swa_start_scale=(0, 1), late_qat_threshold=(0, 1), crown_q_lambda=(0, 1e12), train_reserve_seconds=(0, 1e7),
    calibration_tokens=(1, 2**40), clip_std=(0, 1000), embed_clip_std=(0, 1000), prune_fraction=(0, 0.95),
    val_loss_every=(0, 10**9), train_log_every=(1, 10**9),
    val_tokens=(0, 2**40), eval_seq_len=(2, 2**20), eval_stride=(1, 2**20), eval_batch_seqs=(1, 65_536),
    ttt_lr=(0, 10), ttt_lr_ramp=(0, 100), ttt_momentum=(0, 0.9999), ttt_epochs=(1, 1000), polyak_decay=(0, 0.999999),
    ttt_chunk_tokens=(1, 2**40), ttt_freeze_blocks=(0, 64), ttt_batch_seqs=(1, 65_536), ttt_grad_clip=(0, 1e6),
    ttt_temperature=(0.9, 1.05), mixer_eta=(0, 100), ngram_order=(2, 20), ngram_buckets=(1, 2**32),
    ngram_block=(1, 2**40), ngram_min_count=(1, 10**9), alpha_base=(0, 1), alpha_range=(0, 1), alpha_center=(0, 100),
)  # fmt: skip
FIELD_CHOICES: dict[str, tuple[Any, ...]] = {
    "device": ("auto", "cpu", "cuda"),
    "attention": ("auto", "fa3", "fa2", "cudnn", "sdpa"),
    "weight_average": ("ema", "swa", "none"),
    "qat_bits": (0, 5, 6, 7, 8),
    "attn_bits": (0, 5, 6, 7, 8),
    "mlp_bits": (0, 5, 6, 7, 8),
    "embed_bits": (5, 6, 7, 8, 16),
    "quantizer": ("lite", "gptq"),
    "compressor": ("zstd", "brotli", "lzma"),
    "ttt_optimizer": ("sgd", "adamw"),
    "ttt_scope": ("all", "last"),
    "mixer": ("none", "backoff", "backoff-published", "hedge"),
    "ngram_counts": ("exact", "hashed"),
}


def _expect(ok: bool, config: Config, name: str, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name.upper()}={getattr(config, name)!s:.80} cannot be used: expected {allowed}")


def _parse(variable: str, text: str, kind: Any) -> Any:
    """One environment value to its field's type. Raises ConfigError."""
    words = {"0": False, "false": False, "1": True, "true": True}
    try:
        if kind == bool | None and text.lower() == "auto":
            return None
        if kind in (bool, bool | None):
            return words[text.strip().lower()]
        if kind == tuple[int, ...]:
            return tuple(int(part) for part in text.split(",") if part.strip())
        value = kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        shown = {int: "a whole number", float: "a finite number", bool: "0, 1, true or false"}
        wanted = shown.get(kind, "auto, 0 or 1" if kind == bool | None else "whole numbers with commas between")
        raise ConfigError(f"{variable}={text!r} cannot be read: expected {wanted}") from None


def _stored_as(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON may fill a field of that type. A float may be whole; true is no number."""
    if kind == tuple[int, ...]:
        return isinstance(value, list) and all(type(item) is int for item in value)
    return type(value) in (typing.get_args(kind) or (kind, int if kind is float else kind))


def _reject_misspelt(environ: Mapping[str, str], known: set[str]) -> None:
    """A variable that is nearly a field's name would be ignored in silence, so it is an error."""
    squeezed = {name.replace("_", ""): name for name in known}
    for name in sorted(set(environ) - known - {"COMPILER", "NUM_THREADS"}):  # near, and in ordinary use
        upper = name.upper()
        exact = squeezed.get(upper.replace("_", ""))
        close = [exact] if exact else difflib.get_close_matches(upper, sorted(known), n=1, cutoff=0.88)
        if close:
            text = f"{name}={environ[name]!r}"
            raise ConfigError(f"{text} is no setting of this program; did you mean {close[0]}? Rename or unset it")


# ----------------------------------------------------------------------------------------------------------
# 2. Runtime: process group, device, signals, log, checkpoints. World size 1 is the same without communication.
# ----------------------------------------------------------------------------------------------------------
class Runtime:
    """Rank, device, collectives and signals of this process; a context manager that joins and leaves the group."""

    TIMEOUT = datetime.timedelta(minutes=15)  # longer than whatever rank 0 does while the others wait
    GRACE_S = 25  # torchrun kills 30 s after its signal
    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, config: Config, environ: Mapping[str, str]):
        self.rank = _parse("RANK", environ.get("RANK", "0"), int)
        self.local_rank = _parse("LOCAL_RANK", environ.get("LOCAL_RANK", "0"), int)
        self.world_size = _parse("WORLD_SIZE", environ.get("WORLD_SIZE", "1"), int)
        if not 0 <= self.rank < self.world_size:
            found = f"RANK={self.rank} with WORLD_SIZE={self.world_size}"
            raise ConfigError(f"{found} cannot be: torchrun sets RANK from 0 to WORLD_SIZE - 1; unset both without it")
        self.attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.device = self._pick_device(config.device)
        self.control_group: Any = None
        self.signal, self.signalled_at = 0, 0.0
        self.former_handlers: list[Any] = []

    @staticmethod
    def label(environ: Mapping[str, str]) -> str:
        """Which rank an error is of, where there are several."""
        return f"rank {environ['RANK']}: " if "RANK" in environ and environ.get("WORLD_SIZE", "1") != "1" else ""

    def _pick_device(self, choice: str) -> torch.device:
        available = torch.cuda.is_available()
        if choice == "cuda" and not available:
            raise ConfigError("DEVICE=cuda, but torch finds no CUDA device; unset it or use DEVICE=cpu")
        if choice == "cpu" or not available:
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ConfigError(f"local rank {self.local_rank}, but {count} GPUs; lower --nproc_per_node")
        return torch.device("cuda", self.local_rank)

    def __enter__(self) -> Runtime:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world_size > 1:
            try:
                self._join()
            except (RuntimeError, OSError, ValueError) as error:  # gone before this one was there, or an odd address
                advice = "of several network interfaces, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose one"
                raise UserError(f"cannot join the other ranks: {error}; {advice}") from error
        self.former_handlers = [signal.signal(number, self._on_signal) for number in self.SIGNALS]
        return self

    def _join(self) -> None:
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        device_id = self.device if backend == "nccl" else None
        # torchrun may keep its store over a restart, with the addresses of processes that are gone.
        store = dist.PrefixStore(f"attempt{self.attempt}", next(rendezvous("env://", timeout=self.TIMEOUT))[0])
        store.set(f"device{self.rank}", self.device.type)
        if len({store.get(f"device{rank}") for rank in range(self.world_size)}) > 1:  # waits for all of them
            advice = "set DEVICE=cuda to learn on which node CUDA fails, or DEVICE=cpu on all"
            raise ConfigError(f"some ranks have a CUDA device, others none (this one: {self.device.type}); {advice}")
        place: dict[str, Any] = dict(store=store, rank=self.rank, world_size=self.world_size)
        dist.init_process_group(backend, **place, device_id=device_id, timeout=self.TIMEOUT)
        # The clock travels over CPU, so that no rank waits for its GPU to learn what rank 0 decided.
        self.control_group = dist.group.WORLD if backend == "gloo" else dist.new_group(None, self.TIMEOUT, "gloo")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        for number, handler in zip(self.SIGNALS, self.former_handlers):
            signal.signal(number, handler)
        if self.world_size > 1 and error is None:
            dist.barrier()  # no rank leaves while another still uses the connection
            self.control_group = None
            dist.destroy_process_group()
        elif self.world_size > 1 and not isinstance(error, (UserError, Stopped)):
            # Ranks that wait for this one go on only when its process is gone, so it does not wait for them.
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                cause = "" if "gloo" in str(error) else f", or: {' '.join(str(error).split())[:600]}"
                sys.stderr.write(f"rank {self.rank} stops: another rank has ended{cause}\n")
            else:
                traceback.print_exception(kind, error, trace)
                sys.stderr.write(f"error: rank {self.rank}: {type(error).__name__}: {error}\n")
            sys.stderr.flush()
            os._exit(1)

    def _on_signal(self, number: int, _frame: object) -> None:
        """Ask for a stop at the next boundary; a second signal ends the process at once.

        A launcher passes on what the system has sent to every process already: there only a signal a second later
        is a second one, and a rank that cannot stop, since another is gone, is ended by its alarm.
        """
        if self.world_size == 1:
            for each in self.SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        elif not self.signal:
            signal.alarm(self.GRACE_S)
        elif time.monotonic() > self.signalled_at + 1:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.signalled_at = number, time.monotonic()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> dist.Work:
        """Start summing `full` over ranks into this rank's `shard`; wait on the result before reading."""
        operation = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # renamed in torch 2.13
        return typing.cast(dist.Work, operation(shard, full, async_op=True))

    def all_gather(self, full: Tensor, shard: Tensor) -> dist.Work:
        """Start collecting every rank's `shard`, in rank order, into `full`."""
        operation = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        return typing.cast(dist.Work, operation(full, shard, async_op=True))

    def from_main(self, *values: float) -> list[float]:
        """Rank 0's numbers, on every rank."""
        if self.world_size == 1:
            return list(values)
        carrier = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(carrier, src=0, group=self.control_group)
        return carrier.tolist()

    def agree(self, from_main: float, *largest: float) -> list[float]:
        """Rank 0's first number and the largest over all ranks of each further one, on every rank."""
        if self.world_size == 1:
            return [from_main, *largest]
        carrier = torch.tensor([from_main if self.is_main else -math.inf, *largest], dtype=torch.float64)
        dist.all_reduce(carrier, dist.ReduceOp.MAX, group=self.control_group)
        return carrier.tolist()

    def bytes_from_main(self, content: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""
        size = int(self.from_main(len(content))[0])
        if self.world_size == 1 or size == 0:
            return content
        carrier = torch.frombuffer(bytearray(content or size), dtype=torch.uint8)
        dist.broadcast(carrier, src=0, group=self.control_group)
        return carrier.numpy().tobytes()

    def require_same(self, what: str, text: str) -> None:
        """Raises ConfigError, on every rank, unless the text is the same on all: nodes may differ."""
        number = int(digest_of(text)[:12], 16)
        _, largest, smallest = self.agree(0.0, number, -number)
        if largest != -smallest:
            raise ConfigError(f"the ranks have different {what}; give every node the same variables, data and code")

    def share(self, count: int) -> range:
        """This rank's contiguous part of range(count)."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def gather_parts(self, part: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate 1-D parts of the given per-rank sizes in rank order, on every rank."""
        if self.world_size == 1:
            return part
        padded = part.new_zeros(max(sizes))
        padded[: len(part)] = part
        full = part.new_empty(self.world_size, max(sizes))
        self.all_gather(full.view(-1), padded).wait()
        return torch.cat([row[:size] for row, size in zip(full, sizes)])

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def describe(self) -> dict[str, Any]:
        """Versions and hardware."""
        on_cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if on_cuda else cpu_name()
        return dict(
            python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
            world_size=self.world_size, device=self.device.type, hardware=name, threads=torch.get_num_threads(),
        )  # fmt: skip

    def peak_memory_line(self) -> str:
        if self.device.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            return f"peak memory allocated: {allocated >> 20} MiB reserved: {reserved >> 20} MiB"
        import resource  # absent on Windows, and only needed here

        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return f"peak memory allocated: {kib >> 10} MiB (process, resident)"


def cpu_name() -> str:
    """The processor's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class RunLog:
    """Greppable `key:value` lines on the console and in logs/<run>.txt, and the same numbers as JSONL.

    Only rank 0 writes. A progress bar is drawn on a terminal and never reaches a file.
    """

    def __init__(self, config: Config, runtime: Runtime):
        self.active = runtime.is_main
        self.bar_width = 0
        self.failed: set[str] = set()  # files that could not be written
        if not self.active:
            return
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.run_id = config.run_id or f"{config.recipe}_seed{config.seed}_{stamp}"
        folder = Path(config.out_dir) / "logs"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.text_file = self._open(folder / f"{self.run_id}.txt", bool(config.resume))
            self.json_file = self._open(folder / f"{self.run_id}.jsonl", bool(config.resume))
        except OSError as error:
            raise ConfigError(f"cannot write logs to {folder} (OUT_DIR, RUN_ID): {error.strerror}") from error
        if not (folder / f"{self.run_id}.txt").stat().st_size:
            sources = [f"===== {path.name} =====\n{path.read_text(encoding='utf-8')}\n" for path in code_paths()]
            self._write(self.text_file, "".join([*sources, "===== log =====\n"]))

    @staticmethod
    def _open(path: Path, resumed: bool) -> TextIO:
        """A new file; a resumed run goes on with its old one, but for a line that a killed process left unfinished."""
        if resumed and path.is_file():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        return path.open("a" if resumed else "w", encoding="utf-8")

    def line(self, text: str) -> None:
        """Text for people alone."""
        if not self.active:
            return
        self._clear_bar()
        for file in (sys.stdout, self.text_file):
            self._write(file, text + "\n")

    def _write(self, stream: TextIO, text: str) -> None:
        """A log that cannot be written, console included, must not cost the run: say so once and go on."""
        encoding = stream.encoding or "utf-8"  # a path may hold what the console cannot show, or bytes that are no text
        try:
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()
        except OSError as error:
            if stream.name not in self.failed:
                sys.stderr.write(f"warning: cannot write the log {stream.name}: {error.strerror}; the run goes on\n")
            self.failed.add(stream.name)

    def row(self, event: str, note: str = "", text: str = "", **fields: Any) -> None:
        """One event: `event key:value … note` (or `text`) for people, the same numbers as JSON for machines.

        Units are in the names: `train_time_ms=1.0` prints as `train_time:1ms`, `…_s` as seconds.
        """
        if not self.active:
            return
        digits = 8 if event.endswith("_exact") else 4
        parts = [event, *(_key_value(name, value, digits) for name, value in fields.items()), note]
        self.line(text or " ".join(part for part in parts if part))
        record = {"event": event, **fields} | ({"note": note} if note else {})
        self._write(self.json_file, json.dumps(record) + "\n")

    def progress(self, done: int, total: int, text: str) -> None:
        """Redraw the bar, on a terminal only."""
        if not self.active or not sys.stderr.isatty():
            return
        filled = 30 * done // max(total, 1)
        bar = f"[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {text}"
        sys.stderr.write("\r" + bar.ljust(self.bar_width))
        sys.stderr.flush()
        self.bar_width = len(bar)

    def _clear_bar(self) -> None:
        if self.bar_width:
            sys.stderr.write("\r" + " " * self.bar_width + "\r")
            sys.stderr.flush()
            self.bar_width = 0

    def close(self) -> None:
        if not self.active:
            return
        self._clear_bar()
        for file in (self.text_file, self.json_file):
            with contextlib.suppress(OSError):  # what could not be flushed was already reported
                file.close()


def _key_value(name: str, value: Any, digits: int) -> str:
    if name.endswith("_ms"):
        return f"{name[:-3]}:{value:.2f}ms" if name == "step_avg_ms" else f"{name[:-3]}:{value:.0f}ms"
    if name.endswith("_s"):
        return f"{name[:-2]}:{value:.1f}s"
    if isinstance(value, float):
        tiny = 0 < abs(value) < 10.0**-digits
        return f"{name}:{value:.3g}" if tiny else f"{name}:{value:.{digits}f}"
    return f"{name}:{value}"


def code_paths() -> list[Path]:
    """The files that count as code."""
    return [CODE_DIR / name for name in CODE_FILES if (CODE_DIR / name).exists()]


def code_bytes() -> int:
    return sum(path.stat().st_size for path in code_paths())


def write_whole(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write a file that is never seen in part, nor lost once it is there, or let `content` do it. Raises OSError."""
    temporary = path.with_name(path.name.partition("_step")[0] + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


State = tuple[dict[str, Tensor], dict[str, Any]]  # what a checkpoint holds: tensors on the CPU, and JSON
BLANK_DIGEST = "0" * 64
MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # what reading odd JSON and odd tensors can raise


def write_state(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """safetensors with one metadata entry; in it the SHA-256 of the whole, taken with zeros in its place.

    All that takes long here lets other threads run. Raises OSError.
    """
    library = require("safetensors.torch", "a checkpoint")
    for left in path.parent.glob(".tmp*"):  # the library's own, where a run was killed while it wrote
        left.unlink()
    try:
        library.save_file(dict(tensors), path, {"train_gpt": json.dumps({"sha256": BLANK_DIGEST, **meta})})
    except importlib.import_module("safetensors").SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error
    with open(path, "rb+") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            place, digest = content.find(BLANK_DIGEST.encode()), hashlib.sha256(content).hexdigest()
        file.seek(place)
        file.write(digest.encode())


def unpack_state(content: bytes, source: object) -> State:
    """Raises CheckpointError, naming the source, when any byte is missing or altered."""
    safetensors = require("safetensors.torch", "a checkpoint")
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        meta = json.loads(header["__metadata__"]["train_gpt"])
        digest = meta.pop("sha256")
        blank = content.replace(digest.encode(), BLANK_DIGEST.encode(), 1)
        if hashlib.sha256(blank).hexdigest() != digest:
            raise ValueError("the checksum differs")
        return safetensors.load(content), meta
    except (*MALFORMED, RecursionError, importlib.import_module("safetensors").SafetensorError):
        raise CheckpointError(f"{source} is torn, altered or no checkpoint of this project") from None


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Copies on the CPU, which later steps leave alone, of the tensors of nested mappings: `outer/inner/name`."""
    flat: dict[str, Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value.detach().to("cpu", copy=True).contiguous()
    return flat


def nest(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """The nested mappings that `flatten` took, empty ones left out; all names are text now."""
    tree: dict[str, Any] = {}
    for path, tensor in flat.items():
        *outer, name = path.split("/")
        node = tree
        for part in outer:
            node = node.setdefault(part, {})
        node[name] = tensor
    return tree


def same_kinds(template: Any, value: Any) -> None:
    """Raises KeyError, TypeError unless the value has the template's keys and kinds of leaves."""
    if isinstance(template, dict):
        for name, inner in template.items():
            same_kinds(inner, value[name])
    elif type(value) is not type(template) and not {type(value), type(template)} <= {int, float}:
        raise TypeError(f"{value!r} where something like {template!r} is expected")


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Take over the state of parameters by their index."""
    numbered = {int(index): dict(entry) for index, entry in state.items()}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


class Checkpoints:
    """The checkpoints in OUT_DIR/checkpoints, written by a thread of rank 0; what cannot be written is reported.

    Training leaves `NNNNNN_stepS.safetensors`, numbered in the order of writing, the newest CHECKPOINT_KEEP of them.
    """

    def __init__(self, config: Config, runtime: Runtime, log: RunLog):
        self.config, self.runtime, self.log = config, runtime, log
        self.folder = Path(config.out_dir) / "checkpoints"
        self.evaluation_path = self.folder / "evaluation.safetensors"
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.cost: dict[str, Any] = {}
        self.newest = ""  # path of the last one that is whole

    def numbered(self) -> list[tuple[int, Path]]:
        """Training's files in the order in which they were written."""
        matches = ((re.fullmatch(r"(\d+)_step\d+\.safetensors", path.name), path) for path in self.folder.glob("*"))
        return sorted((int(match[1]), path) for match, path in matches if match)

    def training(self) -> list[Path]:
        """The files that RESUME allows to go on from, the newest first."""
        if self.config.resume == "auto":
            return [path for _, path in reversed(self.numbered())]
        return [Path(self.config.resume)] if self.config.resume else []

    def evaluation(self) -> list[Path]:
        return [self.evaluation_path] if self.config.resume and self.evaluation_path.exists() else []

    def forget_evaluation(self) -> None:
        """It is done, and its file has served."""
        self.finish()
        if not self.runtime.is_main:
            return
        with contextlib.suppress(OSError):
            self.evaluation_path.unlink()
            self.folder.rmdir()  # which fails where training has left something

    def save(self, tensors: Mapping[str, Tensor], meta: dict[str, Any], began: float) -> None:
        """Begin to write, once the file before is written; since `began` the caller has waited for its copies."""
        self.finish()
        meta = json.loads(json.dumps(meta))  # as it is now: the run goes on while the thread writes
        number = 1 + max((number for number, _ in self.numbered()), default=0)
        of_step = self.folder / f"{number:06d}_step{meta.get('step')}.safetensors"
        path = of_step if "step" in meta else self.evaluation_path
        self.cost = dict(stall_ms=1000 * (time.perf_counter() - began), file=str(path))
        self.pending = self.writer.submit(self._write, path, tensors, meta)

    def _write(self, path: Path, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        began = time.perf_counter()
        write_whole(path, lambda temporary: write_state(temporary, tensors, meta))
        for _, old in self.numbered()[: -self.config.checkpoint_keep]:
            old.unlink()
        self.cost |= dict(bytes=path.stat().st_size, write_s=time.perf_counter() - began)

    def finish(self) -> None:
        """Wait for what is being written, and log what it cost."""
        if self.pending is None:
            return
        try:
            self.pending.result()
        except OSError as error:
            self.log.row("checkpoint_failed", f"{error.strerror}: free space, or set OUT_DIR", file=self.cost["file"])
        else:
            self.newest = self.cost["file"]
            self.log.row("checkpoint", **self.cost)
        self.pending = None

    def read(self, path: Path) -> tuple[bytes, State]:
        """The bytes of a whole checkpoint and what they hold. Raises CheckpointError."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read the checkpoint {path} (RESUME): {error.strerror}") from error
        return content, unpack_state(content, path)

    def find(self, candidates: Iterable[Path]) -> State | None:
        """The first whole one of the files, on every rank. Raises CheckpointError when the one RESUME names is none."""
        content, state = b"", None
        for path in candidates if self.runtime.is_main else ():
            try:
                (content, state), self.newest = self.read(path), str(path)
                break
            except CheckpointError as error:
                if str(path) == self.config.resume:
                    raise
                self.log.row("checkpoint_skipped", str(error))
        content = self.runtime.bytes_from_main(content)
        return state if self.runtime.is_main or not content else unpack_state(content, "rank 0's checkpoint")

    def stop(self, number: int, **where: Any) -> None:
        """Finish writing, say where the run stands, and raise Stopped."""
        self.finish()
        self.runtime.from_main(0.0)  # a launcher ends the others when the first rank leaves
        note = "RESUME=auto goes on from there"
        self.log.row("stopped", note, signal=signal.Signals(number).name, **where, checkpoint=self.newest or "none")
        raise Stopped(number)


# ----------------------------------------------------------------------------------------------------------
# 3. Data: shards on disk, batches for training, the validation stream with its byte counts.
# ----------------------------------------------------------------------------------------------------------
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def read_shard(path: Path) -> np.ndarray:
    """Memory-map the uint16 tokens of one shard, shape (tokens,). Raises DataError naming the file."""
    advice = "make it again with data/prepare.py or data/fetch_fineweb.py"
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=256)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from error
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        found = f"magic {header[0]}, version {header[1]}" if len(header) > 1 else f"{size} bytes"
        raise DataError(f"{path} is no token shard ({found}; expected magic {SHARD_MAGIC}, version 1); {advice}")
    count = int(header[2])
    if size != SHARD_HEADER_BYTES + 2 * count:
        raise DataError(f"{path} is damaged: {count} tokens promised, {size} bytes found; {advice}")
    if count == 0:
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


def find_shards(folder: str, split: str) -> list[Path]:
    """Shards `*_{split}_*.bin` of a data folder, sorted. Raises DataError when there are none."""
    paths = sorted(Path(folder).glob(f"*_{split}_*.bin")) if os.path.isdir(folder) else []
    if not paths:
        raise DataError(
            f"no {split} shards (*_{split}_*.bin) in DATA_PATH={folder}; "
            "run data/fetch_fineweb.py, or data/prepare.py on your own text"
        )
    return paths


def check_vocabulary(tokens: np.ndarray, vocab_size: int, source: object) -> None:
    """Raise DataError when a token id has no embedding row."""
    largest = int(tokens.max(initial=0))
    if largest >= vocab_size:
        raise DataError(
            f"{source} holds token id {largest}, but VOCAB_SIZE={vocab_size}; use the tokenizer it was made with"
        )


def shard_identity(path: Path) -> list[Any]:
    """Name, bytes and a checksum of both ends, by which a changed shard is recognised. Raises OSError."""
    with path.open("rb") as file:
        head, size = file.read(2**16), file.seek(0, os.SEEK_END)
        file.seek(max(size - 2**16, 0))
        return [path.name, size, zlib.crc32(file.read(), zlib.crc32(head))]


class TokenStream:
    """All shards of a split as one endless sequence of tokens; a read past the end begins again."""

    CHECKED_AT_OPEN = 1_000_000  # tokens a shard; every batch is checked again when it is read

    def __init__(self, paths: Sequence[Path], vocab_size: int):
        self.paths, self.vocab_size = list(paths), vocab_size
        self.shards = [read_shard(path) for path in paths]
        for path, shard in zip(self.paths, self.shards):
            check_vocabulary(shard[: self.CHECKED_AT_OPEN], vocab_size, path)
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.identity = [shard_identity(path) for path in self.paths]
        self.modified_ns = [path.stat().st_mtime_ns for path in self.paths]
        if len(self) < 2:
            raise DataError(f"the train split in {self.paths[0].parent} is empty: {len(self)} tokens of 2")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start … start+count-1 (positions modulo the length), uint16, shape (count,)."""
        out = np.empty(count, dtype=np.uint16)
        filled = 0
        while filled < count:
            position = (start + filled) % len(self)
            index = int(np.searchsorted(self.ends, position, side="right"))
            offset = position - (int(self.ends[index]) - len(self.shards[index]))
            piece = self._piece(index, offset, min(count - filled, int(self.ends[index]) - position))
            check_vocabulary(piece, self.vocab_size, self.paths[index])
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        return out

    def _piece(self, index: int, offset: int, count: int) -> np.ndarray:
        """Read, not mapped: touching the map of a file that has shrunk ends the process without a word."""
        path, advice = self.paths[index], "restore it, then RESUME=auto goes on"
        try:
            same = path.stat().st_mtime_ns == self.modified_ns[index] or shard_identity(path) == self.identity[index]
            piece = np.fromfile(path, "<u2", count, offset=SHARD_HEADER_BYTES + 2 * offset)
        except OSError as error:
            raise DataError(f"cannot read the shard {path} any more: {error.strerror}; {advice}") from error
        if not same or len(piece) < count:
            raise DataError(f"{path} has changed during the run; {advice}")
        return piece


class BatchPlan(NamedTuple):
    """How one global batch is cut: sequences on a rank, in how many equal micro-batches."""

    rank_seqs: int
    grad_accum_steps: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> BatchPlan:
        """The fewest equal micro-batches within MICRO_BATCH_TOKENS. Raises ConfigError when nothing divides."""
        seqs = config.train_batch_tokens // config.train_seq_len
        if seqs % world_size:
            below = seqs // world_size * world_size * config.train_seq_len
            raise ConfigError(
                f"TRAIN_BATCH_TOKENS={config.train_batch_tokens} is {seqs} sequences and cannot be shared by "
                f"{world_size} ranks; use {max(below, world_size * config.train_seq_len)}"
            )
        rank_seqs = seqs // world_size
        largest = max(1, config.micro_batch_tokens // config.train_seq_len)
        steps = next(n for n in range(1, rank_seqs + 1) if rank_seqs % n == 0 and rank_seqs // n <= largest)
        return cls(rank_seqs, steps)


class TokenLoader:
    """This rank's micro-batches of any step; the next step's are read ahead by a thread into pinned memory.

    A batch is a function of its step alone, so every world size sees the same global batch, and a run
    resumes by naming the step.
    """

    def __init__(self, stream: TokenStream, config: Config, runtime: Runtime):
        self.stream, self.runtime, self.seq_len = stream, runtime, config.train_seq_len
        self.plan = BatchPlan.of(config, runtime.world_size)
        self.batch_tokens = config.train_batch_tokens
        on_cuda = runtime.device.type == "cuda"  # where a thread pins memory by the device it is set to
        place: dict[str, Any] = dict(initializer=torch.cuda.set_device, initargs=(runtime.device,)) if on_cuda else {}
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader", **place)
        self.ahead: dict[int, Future[Tensor]] = {}  # by step, one at most

    def _read(self, step: int) -> Tensor:
        rank_tokens = self.plan.rank_seqs * self.seq_len
        start = step * self.batch_tokens + self.runtime.rank * rank_tokens
        tokens = torch.from_numpy(self.stream.read(start, rank_tokens + 1))
        return tokens.pin_memory() if self.runtime.device.type == "cuda" else tokens

    def batch(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """(ids, targets) of each micro-batch, int64, shape (sequences, train_seq_len)."""
        ready = self.ahead.get(step)
        tokens = self._read(step) if ready is None else ready.result()
        self.ahead = {step + 1: self.reader.submit(self._read, step + 1)}
        tokens = tokens.to(self.runtime.device, non_blocking=True).to(torch.int64)
        ids = tokens[:-1].view(self.plan.grad_accum_steps, -1, self.seq_len)
        targets = tokens[1:].view(self.plan.grad_accum_steps, -1, self.seq_len)
        return list(zip(ids, targets))

    def failing(self, step: int) -> bool:
        """Whether that step's batch was read ahead, in vain."""
        ready = self.ahead.get(step)
        return ready is not None and ready.exception() is not None

    def close(self) -> None:
        self.reader.shutdown(wait=True, cancel_futures=True)


class Tokenizer:
    """What scoring needs of a SentencePiece model: how many bytes of text each token stands for."""

    def __init__(self, path: str, vocab_size: int):
        sentencepiece = require("sentencepiece", "counting the bytes of the validation text")
        if not os.path.isfile(path):  # false for names that no system can hold, where Path.is_file raises
            advice = "run data/fetch_fineweb.py or data/prepare.py"
            raise DataError(f"no tokenizer at TOKENIZER_PATH={path}; {advice}")
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
        except (RuntimeError, OSError, ValueError) as error:  # ValueError: names that are no UTF-8
            raise DataError(f"TOKENIZER_PATH={path} is not a readable SentencePiece model") from error
        if model.vocab_size() != vocab_size:
            pieces = model.vocab_size()
            raise ConfigError(f"TOKENIZER_PATH={path} has {pieces} pieces, but VOCAB_SIZE={vocab_size}")
        self.model = model
        silent = [model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in range(vocab_size)]
        texts = [piece.removeprefix("▁").replace("▁", " ") for piece in self.pieces]
        sizes = [1 if model.is_byte(i) else len(text.encode()) for i, text in enumerate(texts)]
        self.is_boundary = np.array(silent)
        self.base_bytes = np.where(self.is_boundary, 0, np.array(sizes)).astype(np.int16)
        self.has_leading_space = np.array([p.startswith("▁") for p in self.pieces]) & ~self.is_boundary

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over the pieces."""
        return hashlib.sha256("\n".join(self.pieces).encode()).hexdigest()[:16]

    def target_bytes(self, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """UTF-8 bytes of each target after its previous token, int16, same shape as `targets`.

        A leading space counts unless the previous token is a control token, which begins a text.
        """
        spaces = self.has_leading_space[targets] & ~self.is_boundary[previous]
        return self.base_bytes[targets] + spaces.astype(np.int16)


class ValidationSet:
    """The validation split: tokens (N+1,) uint16 and the bytes of each of the N targets."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        paths = find_shards(config.data_path, "val")
        tokens = np.concatenate([read_shard(path) for path in paths])
        check_vocabulary(tokens, config.vocab_size, paths[0].parent)
        if len(tokens) < 2:
            raise DataError(f"the validation split in {paths[0].parent} is empty: {len(tokens)} tokens of 2")
        self.partial = 0 < config.val_tokens < len(tokens) - 1
        self.tokens = tokens[: config.val_tokens + 1] if self.partial else tokens
        self.bytes = tokenizer.target_bytes(self.tokens[:-1], self.tokens[1:])
        if int(self.bytes.sum(dtype=np.int64)) == 0:
            raise DataError(f"the validation split in {paths[0].parent} holds no text, only control tokens")

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1

    @property
    def note(self) -> str:
        """Put behind every result that does not cover the whole split."""
        return "partial" if self.partial else ""


# ----------------------------------------------------------------------------------------------------------
# 4. Quantization grid: the one place that knows levels and scales, for QAT and for export alike.
# ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Grid:
    """Symmetric integers of `bits` bits with one fp16 scale a row; rows are the last axis, any number of axes."""

    bits: int
    clip_std: float = 0.0  # rows are clipped at this many of their standard deviations; 0: at their largest weight
    SMALLEST_SCALE = 2.0**-24  # the least positive fp16: only keeps an all-zero row from dividing by zero

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def clip(self, weight: Tensor) -> Tensor:
        """Where each row is clipped, (…, 1). A standard deviation is taken about zero, as the levels are."""
        if self.clip_std:
            return self.clip_std * weight.float().square().mean(dim=-1, keepdim=True).sqrt()
        return weight.float().abs().amax(dim=-1, keepdim=True)

    def scale(self, clip: Tensor) -> Tensor:
        """fp16 scale for rows clipped at `clip` (…, 1): the clip value lands on level qmax."""
        return (clip.float() / self.qmax).clamp(self.SMALLEST_SCALE, 65_504.0).half()

    def encode(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Nearest levels (half to even), int8, same shape as `weight`; `scale` has shape (…, 1)."""
        return torch.round(weight.float() / scale.float()).clamp(-self.qmax, self.qmax).to(torch.int8)

    def decode(self, levels: Tensor, scale: Tensor) -> Tensor:
        return levels.float() * scale.float()

    def round_trip(self, weight: Tensor) -> Tensor:
        """decode(encode(weight)) by this grid's own clip."""
        scale = self.scale(self.clip(weight))
        return self.decode(self.encode(weight, scale), scale)


@torch.library.custom_op(
    "train_gpt::fake_quantize", mutates_args=(), schema="(Tensor weight, int bits, float clip_std=0.0) -> Tensor"
)
def fake_quantize(weight: Tensor, bits: int, clip_std: float = 0.0) -> Tensor:
    """The weight as the artifact would hold it; the gradient passes straight through (arXiv 1308.3432).

    An operator of its own, so that no compiler fuses the rounding of the scale to fp16 away, and not written as
    w + (q - w).detach(): that sum rounds. Either way the value would no longer be the decoded one.
    """
    return Grid(bits, clip_std).round_trip(weight).to(weight.dtype)


@fake_quantize.register_fake  # pyright: ignore[reportFunctionMemberAccess]
def _fake_quantize_shape(weight: Tensor, bits: int, clip_std: float = 0.0) -> Tensor:  # noqa: ARG001 (its signature)
    return torch.empty_like(weight)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ARG001
    return grad, None, None


torch.library.register_autograd("train_gpt::fake_quantize", _straight_through)

PASSTHROUGH_MAX_ELEMENTS = 65_536  # smaller tensors are kept in fp16, vectors and scalars in fp32


def export_plan(model: GPT) -> dict[str, str]:
    """How the artifact stores each tensor: `int5`…`int8`, `fp16` or `fp32`; QAT follows it. No MTP heads."""
    bank_bits, embed_bits = model.config.bank_bits, model.config.embed_bits
    embedding = "fp16" if embed_bits == 16 else f"int{embed_bits}"
    plan = {}
    for name, role in model.parameter_roles().items():
        shape = model.get_parameter(name).shape
        small = shape.numel() <= PASSTHROUGH_MAX_ELEMENTS and role not in EMBEDDING_ROLES
        if role == "bank":
            plan[name] = f"int{bank_bits[name]}"
        elif role != "mtp_head":
            plan[name] = embedding if not small else "fp32" if len(shape) < 2 else "fp16"
    return plan


def grid_of(codec: str, clip_std: float = 0.0) -> Grid | None:
    """The grid of a codec `intN`; None where no integers are stored."""
    return Grid(int(codec.removeprefix("int")), clip_std) if codec.startswith("int") else None


@dataclass(frozen=True)
class QuantizeOptions:
    """What may still be chosen when the plan is fixed; the fields are those of Config."""

    clip_std: float = 0.0
    embed_clip_std: float = 0.0
    prune_fraction: float = 0.0

    @classmethod
    def of(cls, config: Config) -> QuantizeOptions:
        return cls(config.clip_std, config.embed_clip_std, config.prune_fraction)

    def grid(self, name: str, codec: str) -> Grid | None:
        return grid_of(codec, self.clip_std if name in BANK_NAMES else self.embed_clip_std)


EMBEDDING_ROLES = ("tied_embedding", "untied_embedding", "output_head")


# ----------------------------------------------------------------------------------------------------------
# 5. Model. State-dict names are those of the earlier submissions, so their checkpoints load.
# ----------------------------------------------------------------------------------------------------------
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B,T,H,Dh), k and v (B,T,Hkv,Dh) → (B,T,H,Dh), causal
RMS_EPS = torch.finfo(torch.float32).eps


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal grouped-query attention by torch's own kernels."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return out.transpose(1, 2)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same through cuDNN, which wants as many key heads as query heads."""
    groups = q.size(2) // k.size(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _flash_attention(module_name: str) -> Attention:
    flash = importlib.import_module(module_name).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return attend


def choose_attention(choice: str, device: torch.device) -> tuple[str, Attention]:
    """Name and function of the backend: FlashAttention 3, then 2, then cuDNN, then SDPA, the first that is there.

    Raises ConfigError when the one asked for cannot run here.
    """
    if device.type == "cpu":
        if choice in ("auto", "sdpa"):
            return "sdpa", sdpa_attention
        raise ConfigError(f"ATTENTION={choice} needs CUDA, and this run is on the CPU; use sdpa or auto")
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    for name, module in (("fa3", "flash_attn_interface"), ("fa2", "flash_attn")):
        if choice not in ("auto", name) or (name == "fa3" and not hopper):
            continue
        try:
            return name, _flash_attention(module)
        except ImportError as error:
            if choice == name:
                raise ConfigError(f"ATTENTION={name} needs the package {module!r}: {error}") from error
    if choice == "fa3":
        raise ConfigError("ATTENTION=fa3 needs a Hopper GPU; use ATTENTION=auto")
    if choice == "cudnn" or (choice == "auto" and torch.backends.cudnn.is_available() and hopper):
        return "cudnn", cudnn_attention
    return "sdpa", sdpa_attention


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def rope_tables(config: Config, seq_len: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each (1, T, 1, rotated/2). Beyond ROPE_TRAIN_LEN the base grows (NTK-aware scaling)."""
    rotated = config.rope_dims or config.head_dim
    base = config.rope_base
    if config.rope_train_len and seq_len > config.rope_train_len:
        base *= (seq_len / config.rope_train_len) ** (rotated / (rotated - 2))
    exponents = torch.arange(0, rotated, 2, device=like.device, dtype=torch.float32) / rotated
    angles = torch.outer(torch.arange(seq_len, device=like.device, dtype=torch.float32), base**-exponents)
    return angles.cos().to(like.dtype)[None, :, None], angles.sin().to(like.dtype)[None, :, None]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2·cos.size(-1) dimensions of each head, pairing first half with second half."""
    half = cos.size(-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)


def remove_own_value(y: Tensor, v: Tensor) -> Tensor:
    """XSA: take from each head's output y (B,T,H,Dh) its projection on that position's value v (B,T,Hkv,Dh)."""
    B, T, H, Dh = y.shape
    grouped = y.view(B, T, v.size(2), -1, Dh)
    direction = F.normalize(v, dim=-1).unsqueeze(3)
    return (grouped - (grouped * direction).sum(-1, keepdim=True) * direction).view(B, T, H, Dh)


class LayerWeights(NamedTuple):
    """One layer's slices of the banks, in the compute dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    up: Tensor
    down: Tensor


Probe = Callable[[str, int, Tensor], None]  # (name of an input of matrices, layer, the input (B, T, in))


class LayerContext(NamedTuple):
    """What a layer needs besides its input and weights."""

    cos: Tensor
    sin: Tensor
    value_embed: Tensor | None
    attend: Attention
    layer: int
    probe: Probe | None  # None leaves no trace in a compiled graph

    def show(self, name: str, x: Tensor) -> None:
        """Let the probe see what a matrix is about to be multiplied with."""
        if self.probe is not None:
            self.probe(name, self.layer, x)


class BigramHash(nn.Module):
    """Embedding of (previous, current) token pairs through a hash into B-1 buckets.

    Position 0 has bucket B-1 to itself, or takes its previous token for 0 (pull request 150).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.buckets, self.start_bucket = config.bigram_vocab_size, config.bigram_start_bucket
        self.embed = nn.Embedding(self.buckets, config.bigram_dim)
        self.proj = nn.Linear(config.bigram_dim, config.model_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def bucket(self, ids: Tensor) -> Tensor:
        """Bucket of every position, same shape as `ids` (B, T)."""
        narrow = ids.to(torch.int32)
        previous = F.pad(narrow[:, :-1], (1, 0))
        mixed = torch.bitwise_xor(36313 * narrow, 27191 * previous) % (self.buckets - 1)
        return F.pad(mixed[:, 1:], (1, 0), value=self.buckets - 1) if self.start_bucket else mixed


class SmearGate(nn.Module):
    """(1-g)·x[i] + g·x[i-1] with a learned gate per channel; nothing is taken across a document's start."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.model_dim))
        self.bos_mask = config.smear_bos_mask

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate.to(x.dtype))
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        if self.bos_mask:
            previous = previous * (ids != BOS_ID).unsqueeze(-1).to(x.dtype)
        return torch.lerp(x, previous, gate)


class ValueEmbedding(nn.Module):
    """A table shared by VE_LAYERS that adds token identity to the values."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.ve_dim)
        self.proj = nn.Linear(config.ve_dim, config.kv_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.1))


class SelfAttention(nn.Module):
    """The attention of one layer; its matrices live in the banks."""

    def __init__(self, config: Config, use_xsa: bool):
        super().__init__()
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.head_dim, self.use_xsa = config.head_dim, use_xsa

    def forward(self, x: Tensor, weights: LayerWeights, context: LayerContext) -> Tensor:
        B, T, _ = x.shape
        context.show("attn_in", x)
        q = F.linear(x, weights.q).view(B, T, -1, self.head_dim)
        k = F.linear(x, weights.k).view(B, T, -1, self.head_dim)
        v = F.linear(x, weights.v)
        v = (v if context.value_embed is None else v + context.value_embed).view(B, T, -1, self.head_dim)
        q = apply_rope(rms_norm(q), context.cos, context.sin) * self.q_gain.to(x.dtype)[:, None]
        k = apply_rope(rms_norm(k), context.cos, context.sin)
        y = context.attend(q, k, v)
        if self.use_xsa:
            y = remove_own_value(y, v)
        y = y.reshape(B, T, -1)
        context.show("attn_out", y)
        return F.linear(y, weights.out)


class Block(nn.Module):
    """Attention then MLP, each on a normalised input, each with a learned gain per channel."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.attn = SelfAttention(config, use_xsa=layer >= config.num_layers - config.xsa_last_n)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(config.model_dim), torch.zeros(config.model_dim)]))
        self.norm_scale = 1 / math.sqrt(layer + 1) if config.ln_scale else 1.0
        self.leaky_slope = config.leaky_slope

    def forward(self, x: Tensor, x0: Tensor, weights: LayerWeights, context: LayerContext) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        attended = self.attn(rms_norm(x) * self.norm_scale, weights, context)
        x = x + self.attn_scale.to(x.dtype) * attended
        mlp_in = rms_norm(x) * self.norm_scale
        context.show("mlp_in", mlp_in)
        hidden = F.leaky_relu(F.linear(mlp_in, weights.up), self.leaky_slope).square()
        context.show("mlp_hidden", hidden)
        return x + self.mlp_scale.to(x.dtype) * F.linear(hidden, weights.down)


class GPT(nn.Module):
    """U-net GPT with its matrices in four banks (design: pull requests 1081, 977, 700).

    Banks are (rows of layers, out, in): `qo_bank` Q then output, `kv_bank` K then V, `mlp_up_bank`, `mlp_down_bank`.
    Master weights are fp32; matrix products run in bf16 on CUDA and fp32 on CPU unless `compute_dtype` is set.
    """

    def __init__(self, config: Config, attend: Attention = sdpa_attention, initialize: bool = True):
        super().__init__()
        L, D = config.num_layers, config.model_dim
        self.config, self.attend = config, attend
        self.compute_dtype: torch.dtype | None = None
        self.num_encoder_layers = L // 2
        self.skip_weights = nn.Parameter(torch.ones(L // 2, D))
        self.qo_bank = nn.Parameter(torch.empty(2 * L, D, D))
        self.kv_bank = nn.Parameter(torch.empty(2 * L, config.kv_dim, D))
        self.mlp_up_bank = nn.Parameter(torch.empty(L, config.mlp_dim, D))
        self.mlp_down_bank = nn.Parameter(torch.empty(L, D, config.mlp_dim))
        self.tok_emb = nn.Embedding(config.vocab_size, D)
        self.bigram = BigramHash(config)
        self.smear = SmearGate(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(L))
        if config.ve_layers:
            self.ve_shared = ValueEmbedding(config)
            self.ve_layer_scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in config.ve_layers)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        self.mtp_heads = nn.ModuleList(
            nn.Linear(D, config.vocab_size, bias=False) for _ in range(config.mtp_num_heads)
        )
        self.plan = export_plan(self)
        options = QuantizeOptions.of(config)
        self.grids = {name: options.grid(name, codec) for name, codec in self.plan.items()}
        if initialize:
            self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Embeddings normal(TIED_EMBED_INIT_STD); Q, K, V, MLP-up and the bigram projection orthogonal; output and
        down projections as ZERO_INIT_OUT says; the bigram table, the VE projection and the heads zero. A product of
        two factors starts with only one of them at zero: with both, neither would ever receive a gradient."""
        generator = torch.Generator().manual_seed(self.config.seed)
        L = self.config.num_layers
        for bank in (self.qo_bank, self.kv_bank, self.mlp_up_bank):
            for matrix in bank:
                nn.init.orthogonal_(matrix, generator=generator)
        if self.config.zero_init_out:
            self.qo_bank[L:].zero_()
            self.mlp_down_bank.zero_()
        else:
            for matrix in self.mlp_down_bank:
                nn.init.orthogonal_(matrix, generator=generator)
            for bank in (self.qo_bank[L:], self.mlp_down_bank):
                bank.div_(math.sqrt(2 * L))
        self.tok_emb.weight.normal_(std=self.config.tied_embed_init_std, generator=generator)
        nn.init.orthogonal_(self.bigram.proj.weight, generator=generator)
        self.bigram.embed.weight.zero_()
        if self.config.ve_layers:
            self.ve_shared.embed.weight.normal_(std=0.01, generator=generator)
            self.ve_shared.proj.weight.zero_()
        if not self.config.tie_embeddings:
            self.lm_head.weight.zero_()
        for parameter in self.mtp_heads.parameters():
            parameter.zero_()

    def load_earlier(self, state: Mapping[str, Tensor]) -> None:
        """Load a checkpoint of pull requests 1081 and 977 (banks), or 700 and 150 (one matrix a layer).

        Raises DataError that names what is missing, left over or of another shape.
        """
        renamed = {name.replace("bigram_hash.emb.", "bigram.embed."): tensor for name, tensor in state.items()}
        renamed = {name.replace("bigram_hash.", "bigram."): tensor for name, tensor in renamed.items()}
        for bank, parts in BANK_PARTS.items():
            names = [f"blocks.{layer}.{part}.weight" for part in parts for layer in range(self.config.num_layers)]
            if all(name in renamed for name in names):
                renamed[bank] = torch.stack([renamed.pop(name) for name in names])
        try:
            self.load_state_dict(renamed)
        except RuntimeError as error:
            what = " ".join(str(error).split())
            raise DataError(f"this checkpoint is of another model than RECIPE={self.config.recipe}: {what}") from error

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        on_cuda = self.tok_emb.weight.is_cuda
        return self.compute_dtype or (torch.bfloat16 if on_cuda else torch.float32)

    def _weight(self, name: str, qat: bool) -> Tensor:
        """A matrix in the compute dtype; with QAT as the artifact's integers would give it back."""
        weight, grid = self.get_parameter(name), self.grids[name]
        if qat and grid is not None:
            weight = fake_quantize(weight, grid.bits, grid.clip_std)
        return weight.to(self.dtype)

    def _layer_weights(self, qat: bool) -> list[LayerWeights]:
        """Slices by unbind, whose backward writes each bank's gradient once (indexing would add L full banks)."""
        L = self.config.num_layers
        up, down, qo, kv = (self._weight(name, qat).unbind() for name in BANK_NAMES)
        return [LayerWeights(qo[i], kv[i], kv[L + i], qo[L + i], up[i], down[i]) for i in range(L)]

    def _embed(self, ids: Tensor, token_table: Tensor, qat: bool) -> Tensor:
        bigram = F.embedding(self.bigram.bucket(ids), self._weight("bigram.embed.weight", qat))
        bigram = F.linear(bigram, self._weight("bigram.proj.weight", qat)) * self.bigram.scale.to(self.dtype)
        return self.smear(rms_norm(F.embedding(ids, token_table) + bigram), ids)

    def _value_embeds(self, ids: Tensor, qat: bool) -> dict[int, Tensor]:
        if not self.config.ve_layers:
            return {}
        embedded = F.embedding(ids, self._weight("ve_shared.embed.weight", qat))
        shared = F.linear(embedded, self._weight("ve_shared.proj.weight", qat)) * self.ve_shared.scale.to(self.dtype)
        scales = zip(self.config.ve_layers, self.ve_layer_scales)
        return {layer: shared * scale.to(self.dtype) for layer, scale in scales}

    def forward_hidden(self, ids: Tensor, qat: bool = False, probe: Probe | None = None) -> tuple[Tensor, Tensor]:
        """The trunk: ids (B, T) → normalised hidden states (B, T, D) and the output matrix (V, D)."""
        token_table = self._weight("tok_emb.weight", qat)
        x = x0 = self._embed(ids, token_table, qat)
        value_embeds = self._value_embeds(ids, qat)
        cos, sin = rope_tables(self.config, ids.size(1), x)
        weights = self._layer_weights(qat)
        skips: list[Tensor] = []
        skip_weights = self.skip_weights.to(x.dtype).unbind()
        for layer, block in enumerate(self.blocks):
            if layer >= self.num_encoder_layers and skips:
                x = x + skip_weights[layer - self.num_encoder_layers] * skips.pop()
            context = LayerContext(cos, sin, value_embeds.get(layer), self.attend, layer, probe)
            x = block(x, x0, weights[layer], context)
            if layer < self.num_encoder_layers:
                skips.append(x)
        head = token_table if self.config.tie_embeddings else self._weight("lm_head.weight", qat)
        return rms_norm(x), head

    def _softcapped(self, hidden: Tensor, head: Tensor) -> Tensor:
        cap = self.config.logit_softcap
        return cap * torch.tanh(F.linear(hidden, head).float() / cap)

    def logits(self, ids: Tensor, qat: bool = False) -> Tensor:
        """ids (B, T) → softcapped logits (B, T, V), fp32."""
        return self._softcapped(*self.forward_hidden(ids, qat))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T) given ids (B, T)."""
        return F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten())

    def training_losses(
        self, ids: Tensor, targets: Tensor, qat: bool, token_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean main cross-entropy, the same with each target's weight, and the mean over MTP heads; in nats.

        `token_weights` (V,) weighs targets by token; None weighs all alike. Head k predicts k+1 further ahead.
        """
        hidden, head = self.forward_hidden(ids, qat)
        flat = targets.flatten()
        nll = F.cross_entropy(self._softcapped(hidden, head).flatten(0, 1), flat, reduction="none")
        main = nll.mean()
        weighted = main if token_weights is None else (nll * token_weights[flat]).mean()
        further = main.new_zeros(())
        for k in range(self.config.mtp_num_heads):
            mtp_head = self.get_parameter(f"mtp_heads.{k}.weight").to(hidden.dtype)
            logits = self._softcapped(hidden[:, : -k - 1], mtp_head)
            further = further + F.cross_entropy(logits.flatten(0, 1), targets[:, k + 1 :].flatten())
        return main, weighted, further / max(1, len(self.mtp_heads))

    def crown_q(self) -> Tensor:
        """CROWN-Q (pull request 700): w²·δ²/12, the mean over all weights of the banks, δ = clip/qmax the row's step.

        One mean over all, so that a weight counts the same in every bank. δ is not detached: the row's largest weight
        sets the step of all the others, and the gradient that shrinks it is the part that makes rows cheaper to round.
        """
        grids = [(name, grid) for name, grid in self.grids.items() if grid is not None and name in BANK_NAMES]
        banks = [(self.get_parameter(name).float(), grid) for name, grid in grids]
        sums = [(w.square().sum(-1, keepdim=True) * (grid.clip(w) / grid.qmax).square()).sum() for w, grid in banks]
        return torch.stack(sums).sum() / (12 * sum(w.numel() for w, _ in banks))

    def token_scores(
        self, ids: Tensor, targets: Tensor, tail: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For the last `tail` targets their log-probability and the entropy before them, (B, tail) fp32 in nats,
        and the whole prediction (B, tail, V).

        Logits exist for the scored tail only. `temperature` is that of a certain prediction; a uniform one has 1.
        """
        hidden, head = self.forward_hidden(ids)
        logits = self._softcapped(hidden[:, -tail:], head)
        logp = F.log_softmax(logits, dim=-1)
        if temperature != 1.0:
            certainty = 1 + (logp.exp() * logp).sum(-1, keepdim=True) / math.log(self.config.vocab_size)
            logp = F.log_softmax(logits / (1 - (1 - temperature) * certainty).clamp(0.9, 1.05), dim=-1)
        chosen = logp.gather(-1, targets[:, -tail:].unsqueeze(-1)).squeeze(-1)
        return chosen, -(logp.exp() * logp).sum(-1), logp

    def parameter_roles(self) -> dict[str, str]:
        """Role of every parameter; optimizer groups and the quantization plan are both made from it."""
        roles = {
            **dict.fromkeys(BANK_NAMES, "bank"),
            "tok_emb.weight": "tied_embedding" if self.config.tie_embeddings else "untied_embedding",
            "bigram.embed.weight": "table",
            "ve_shared.embed.weight": "table",
            "lm_head.weight": "output_head",
        }
        roles |= {f"mtp_heads.{k}.weight": "mtp_head" for k in range(self.config.mtp_num_heads)}
        return {name: roles.get(name, "control") for name, _ in self.named_parameters()}


BANK_PARTS = dict(  # largest bank first, with what its parts were called where every layer had its own matrices
    mlp_up_bank=("mlp.fc",), mlp_down_bank=("mlp.proj",),
    qo_bank=("attn.c_q", "attn.proj"), kv_bank=("attn.c_k", "attn.c_v"),
)  # fmt: skip
BANK_NAMES = tuple(BANK_PARTS)


# ----------------------------------------------------------------------------------------------------------
# 6. Optimizers: Parallel Muon on the banks, AdamW on the rest, and the schedules.
# ----------------------------------------------------------------------------------------------------------
ADAMW_LR_FIELDS = {  # role → field of Config; banks are Muon's, with MATRIX_LR
    "tied_embedding": "tied_embed_lr",
    "untied_embedding": "embed_lr",
    "table": "tied_embed_lr",
    "output_head": "head_lr",
    "mtp_head": "head_lr",
    "control": "scalar_lr",
}


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Push the singular values of each matrix (N, rows, cols) towards 1, in the input's dtype.

    Quintic iteration of Muon (Keller Jordan, 2024), coefficients 3.4445, −4.7750, 2.0315.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(-2) > matrices.size(-1)
    X = matrices.mT if tall else matrices
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


class BankShard:
    """One bank's storage, padded to the world size, and this rank's slice of its gradient and momentum.

    The parameter and its gradient become views of padded buffers, so the collectives need no copies.
    """

    def __init__(self, parameter: nn.Parameter, runtime: Runtime):
        rows = parameter.size(0)
        self.per_rank = -(-rows // runtime.world_size)
        padded = (self.per_rank * runtime.world_size, *parameter.shape[1:])
        self.values = parameter.new_zeros(padded)
        self.values[:rows].copy_(parameter.detach())
        parameter.data = self.values[:rows]
        self.grads = torch.zeros_like(self.values)
        parameter.grad = self.grads[:rows]
        first = runtime.rank * self.per_rank
        self.own_values = self.values[first : first + self.per_rank]
        self.own_grad = torch.zeros_like(self.own_values) if runtime.world_size > 1 else self.grads
        self.momentum = torch.zeros_like(self.own_values)
        self.lr_ratio = max(1.0, parameter.size(-2) / parameter.size(-1)) ** 0.5
        self.rows, self.first = rows, first

    def whole_momentum(self, runtime: Runtime) -> Tensor:
        """The momentum of every rank, without padding, shape of the parameter."""
        whole = torch.zeros_like(self.values)
        whole[self.first : self.first + self.per_rank] = self.momentum
        return runtime.all_reduce_sum(whole)[: self.rows]

    def load_momentum(self, whole: Tensor) -> None:
        own = whole[self.first : self.first + self.per_rank]
        self.momentum[: len(own)] = own.to(self.momentum.device)


class Muon:
    """Parallel Muon (pull request 977): each rank owns 1/world_size of every bank's matrices.

    `reduce_gradients` starts the reduce-scatters, largest bank first; `step` updates the owned slices and gathers
    each bank while the next one is being updated.
    """

    def __init__(self, banks: Sequence[nn.Parameter], config: Config, runtime: Runtime, compiled: bool):
        self.runtime, self.config = runtime, config
        self.shards = [BankShard(bank, runtime) for bank in banks]
        self.newton_schulz = torch.compile(newton_schulz, dynamic=False) if compiled else newton_schulz
        # bf16 halves the time on CUDA; on a CPU fp32 keeps every world size on the same trajectory.
        self.dtype = torch.bfloat16 if runtime.device.type == "cuda" else torch.float32

    def reduce_gradients(self) -> list[dist.Work]:
        if self.runtime.world_size == 1:
            return []
        return [self.runtime.reduce_scatter(shard.own_grad, shard.grads) for shard in self.shards]

    @torch.no_grad()
    def step(self, lr: float, momentum: float, finite: Tensor) -> None:
        gathers: list[dist.Work] = []
        for shard in self.shards:
            momentum_now = shard.momentum.mul(momentum).add_(shard.own_grad)
            shard.momentum = torch.where(finite, momentum_now, shard.momentum)
            nesterov = shard.own_grad.add(momentum_now, alpha=momentum)
            update = self.newton_schulz(nesterov.to(self.dtype), self.config.muon_steps)
            updated = shard.own_values * (1 - lr * self.config.muon_wd)
            updated.add_(update.to(updated.dtype), alpha=-lr * shard.lr_ratio)
            updated = torch.where(finite, updated, shard.own_values)
            if self.runtime.world_size == 1:
                shard.own_values.copy_(updated)
            else:
                gathers.append(self.runtime.all_gather(shard.values, updated))
        for work in gathers:
            work.wait()


def flatten_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One buffer whose views are the parameters' gradients: a single all-reduce serves them all."""
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    offset = 0
    for parameter in parameters:
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    return flat


class Optimizers:
    """Every parameter in exactly one group: banks under Muon, the rest under AdamW with one flat gradient buffer."""

    def __init__(self, model: GPT, config: Config, runtime: Runtime, compiled: bool = False):
        self.config, self.runtime = config, runtime
        parameters = dict(model.named_parameters())
        roles = model.parameter_roles()
        banks = [name for name in BANK_NAMES if roles[name] == "bank"]
        rest = [name for name in parameters if name not in banks]
        self.muon = Muon([parameters[name] for name in banks], config, runtime, compiled)
        self.flat_grad = flatten_gradients([parameters[name] for name in rest])
        self.adamw = self._build_adamw({name: parameters[name] for name in rest}, roles)
        self.skipped = torch.zeros(2, device=self.flat_grad.device)  # updates left out: in a row, in all

    def _build_adamw(self, parameters: Mapping[str, nn.Parameter], roles: Mapping[str, str]) -> torch.optim.AdamW:
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            groups.setdefault(ADAMW_LR_FIELDS[roles[name]], []).append(parameter)
        wd = self.config.adam_wd
        rows = [
            dict(params=members, base_lr=getattr(self.config, field_name), weight_decay=wd)
            for field_name, members in groups.items()
        ]
        betas, eps = (self.config.beta1, self.config.beta2), self.config.adam_eps
        return torch.optim.AdamW(rows, lr=0.0, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, lr_scale: float, muon_momentum: float, clip_norm: float) -> Tensor:
        """Average gradients over ranks, clip by their global norm, update. Returns that norm (before clipping).

        The clip needs every gradient first, so AdamW cannot begin while the banks are still being reduced. A norm that
        is not finite leaves weights and optimizers as they are, on every rank alike and without asking the host.
        """
        pending = self.muon.reduce_gradients()
        self.runtime.all_reduce_sum(self.flat_grad)
        for work in pending:
            work.wait()
        own = [shard.own_grad for shard in self.muon.shards]
        bank_square = torch.stack([grad.square().sum() for grad in own]).sum()
        norm = (self.runtime.all_reduce_sum(bank_square) + self.flat_grad.square().sum()).sqrt()
        finite = torch.isfinite(norm)
        left_out, (in_a_row, in_all) = (~finite).float(), self.skipped
        self.skipped = torch.stack([(in_a_row + 1) * left_out, in_all + left_out])
        if clip_norm > 0:
            coefficient = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for grad in (*own, self.flat_grad):
                grad.mul_(coefficient)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.muon.step(self.config.matrix_lr * lr_scale, muon_momentum, finite)
        vars(self.adamw)["found_inf"] = left_out  # the fused kernel's own switch, which gradient scalers use
        self.adamw.step()
        return norm

    def zero_grad(self) -> None:
        self.flat_grad.zero_()
        for shard in self.muon.shards:
            shard.grads.zero_()

    def reset(self) -> None:
        """Forget momentum and moments, as if no step had been taken."""
        for shard in self.muon.shards:
            shard.momentum.zero_()
        self.adamw.state.clear()
        self.skipped.zero_()


def lr_scale_at(config: Config, step: int, elapsed_s: float) -> float:
    """1, then linear to 0 over the last WARMDOWN_ITERS steps that iterations and wallclock leave room for."""
    remaining = float(config.iterations - step)
    if config.training_seconds > 0 and step > 0 and elapsed_s > 0:
        remaining = min(remaining, (config.training_seconds - elapsed_s) / (elapsed_s / step))
    return min(1.0, max(remaining, 0.0) / max(config.warmdown_iters, 1))


def muon_momentum_at(config: Config, step: int) -> float:
    fraction = min(step / max(config.muon_momentum_warmup_steps, 1), 1.0)
    return (1 - fraction) * config.muon_momentum_warmup_start + fraction * config.muon_momentum


# ----------------------------------------------------------------------------------------------------------
# 7. Training.
# ----------------------------------------------------------------------------------------------------------
@dataclass
class Controls:
    """All that may change the training step while a run goes on; the step reads each of them every time."""

    qat: bool
    kg_weight: float  # 0 where there is no knowledge graph
    mtp_weight: float  # 0 where there are no MTP heads
    clip_norm: float

    def apply(self, values: Mapping[str, float]) -> None:
        """Set controls by name. Raises ValueError for an unknown name or a value out of bounds."""
        for name, value in values.items():
            swarm_agents.check_value(name, value)
            setattr(self, name, bool(value) if name == "qat" else value)


class WeightAverage:
    """EMA with a ramped decay, the mean of snapshots (SWA), or nothing; fp32, without the MTP heads."""

    def __init__(self, model: GPT, config: Config):
        self.config = config
        self.count = 0
        self.sources = [p for name, p in model.named_parameters() if not name.startswith("mtp_heads.")]
        self.shadow = [p.detach().clone() for p in self.sources] if config.weight_average != "none" else []

    @torch.no_grad()
    def update(self, step: int, lr_scale: float) -> None:
        """Take in the weights after step `step` (counted from 1)."""
        kind = self.config.weight_average
        if kind == "ema":
            decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        elif kind == "swa" and lr_scale < self.config.swa_start_scale and step % self.config.swa_every == 0:
            decay = self.count / (self.count + 1)
        else:
            return
        self.count += 1
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.sources], 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average into the model, if there is one."""
        if self.count:
            torch._foreach_copy_([p.detach() for p in self.sources], self.shadow)


class Clock:
    """Training time: runs while training, stands still while validating."""

    def __init__(self, runtime: Runtime):
        self.runtime, self.total_s, self.started_at = runtime, 0.0, None

    def start(self) -> None:
        self.runtime.synchronize()
        self.started_at = time.perf_counter()

    def pause(self) -> None:
        self.runtime.synchronize()
        self.total_s = self._now()
        self.started_at = None

    def _now(self) -> float:
        return self.total_s + (time.perf_counter() - self.started_at if self.started_at is not None else 0.0)

    def agreed(self, *largest: float) -> list[float]:
        """Rank 0's training time in seconds and the largest of each further number, the same on every rank."""
        return self.runtime.agree(self._now(), *largest)


@dataclass
class Health:
    """Watches every step's loss and the updates left out; `problem` says when going on makes no sense."""

    MAX_SKIPPED_IN_A_ROW = 5
    MAX_LOST_STEPS = 200

    skipped_in_a_row: int = 0
    skipped: int = 0
    smoothed: float = 0.0  # mean loss over about 50 steps, nats
    best: float = math.inf
    lost_steps: int = 0  # so many in a row undid half of what was learned, against a uniform guess

    def observe(self, in_a_row: float, skipped: float, loss: float, vocab_size: int) -> None:
        """Take in one step; a loss of 0 stands for one that was not finite, or for no step yet."""
        self.skipped_in_a_row, self.skipped = int(in_a_row), int(skipped)
        if loss > 0:
            self.smoothed = loss if self.best == math.inf else 0.98 * self.smoothed + 0.02 * loss
            self.best = min(self.best, self.smoothed)
            limit = self.best + max(1.0, (math.log(vocab_size) - self.best) / 2)
            self.lost_steps = self.lost_steps + 1 if self.smoothed > limit else 0

    def problem(self) -> str:
        if self.skipped_in_a_row >= self.MAX_SKIPPED_IN_A_ROW:
            return f"{self.skipped_in_a_row} updates in a row had gradients that are not finite"
        if self.lost_steps >= self.MAX_LOST_STEPS:
            return f"the loss was {self.best:.3f} and has been about {self.smoothed:.3f} for {self.lost_steps} steps"
        return ""


@dataclass
class Trainer:
    """One training run: model, data and optimizers, and what changes from step to step."""

    SETTLED_S = 3.0

    config: Config
    runtime: Runtime
    log: RunLog
    model: GPT
    loader: TokenLoader
    validation: ValidationSet
    importance: Tensor | None = None  # (V,) of the knowledge graph, 0 for tokens outside it
    checkpoints: Checkpoints | None = None
    identity: dict[str, Any] = field(default_factory=dict)  # of data and tokenizer: what a resumed run must have too
    step: int = 0
    elapsed_s: float = 0.0
    saved_at_s: float = 0.0
    health: Health = field(default_factory=Health)
    controls: Controls = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.compiled = wants_compile(config, self.runtime)
        self.optimizers = Optimizers(self.model, config, self.runtime, self.compiled)
        self.average = WeightAverage(self.model, config)
        self.clock = Clock(self.runtime)
        mtp_weight = config.mtp_loss_weight if config.mtp_num_heads else 0.0
        kg_weight = 0.0 if self.importance is None else config.kg_weight
        self.controls = Controls(self.qat_due(1.0), kg_weight, mtp_weight, config.grad_clip_norm)
        self.swarm = swarm_agents.VotingMesh(config.swarm_every) if config.swarm_enabled else None
        self.loss_history: list[float] = []
        losses = self.model.training_losses
        self.losses = torch.compile(losses, dynamic=False, fullgraph=True) if self.compiled else losses
        crown_q = self.model.crown_q
        self.crown_q = torch.compile(crown_q, dynamic=False, fullgraph=True) if self.compiled else crown_q
        self.train_loss = torch.zeros((), device=self.runtime.device)
        self.crown_q_loss: Tensor | None = None  # CROWN_Q_LAMBDA times the penalty; None where QAT is off
        # What the host may look at between steps: copied without waiting, so on CUDA it can be some steps old.
        self.seen = torch.zeros(3, pin_memory=self.runtime.device.type == "cuda")

    def qat_due(self, lr_scale: float) -> bool:
        threshold = self.config.late_qat_threshold
        return self.config.qat_bits > 0 and (lr_scale < threshold or threshold >= 1)

    def token_weights(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
        """1 + kg_weight · importance, divided by its mean over the global batch's targets; (V,) or None."""
        if self.importance is None:
            return None
        total = torch.stack([self.importance[targets].sum() for _, targets in batches]).sum()
        mean = self.runtime.all_reduce_sum(total) / self.config.train_batch_tokens
        kg_weight = self.controls.kg_weight
        return (1 + kg_weight * self.importance) / (1 + kg_weight * mean)

    def train_step(self, step: int, lr_scale: float) -> Tensor:
        """Forward, backward and update on global batch `step`. Returns the gradient's global norm.

        The losses stay on the device; `train_loss` is this rank's mean main cross-entropy.
        """
        self.optimizers.zero_grad()
        batches = self.loader.batch(step)
        share = 1.0 / (len(batches) * self.runtime.world_size)
        token_weights = self.token_weights(batches)
        train_loss = torch.zeros((), device=self.runtime.device)
        for ids, targets in batches:
            main, weighted, further = self.losses(ids, targets, self.controls.qat, token_weights)
            ((weighted + self.controls.mtp_weight * further) * share).backward()
            train_loss += main.detach() / len(batches)
        self.train_loss, self.crown_q_loss = train_loss, None
        if self.controls.qat and self.config.crown_q_lambda > 0:  # a graph of its own, and once a step
            crown_q = self.config.crown_q_lambda * self.crown_q()
            (crown_q / self.runtime.world_size).backward()
            self.crown_q_loss = crown_q.detach()
        momentum = muon_momentum_at(self.config, step)
        return self.optimizers.step(lr_scale, momentum, self.controls.clip_norm)

    def warm_up(self) -> None:
        """Run steps with QAT off and on so that every graph is compiled, then restore weights and optimizers."""
        config = self.config
        if config.warmup_steps == 0:
            return
        began = time.perf_counter()
        saved = {name: value.clone() for name, value in self.model.state_dict().items()}
        switch = self.controls.qat
        for step in range(config.warmup_steps):
            self.log.progress(step, config.warmup_steps, "warm-up")
            for self.controls.qat in (False, True) if config.qat_bits else (False,):
                self.train_step(step, lr_scale=1.0)
        self.controls.qat = switch
        self.model.load_state_dict(saved)
        self.optimizers.reset()
        self.log.row("warmup", steps=config.warmup_steps, time_s=time.perf_counter() - began)

    def validate(self) -> None:
        """Score the validation split without overlap and log it; not part of training time."""
        scores = score_stream(self.model, self.config, self.runtime, self.validation, self.config.eval_seq_len)
        result = summarize(scores, self.validation)
        self.log.row(
            f"step:{self.step}/{self.config.iterations}", result.note,
            **result.headline(), **self._timing(),
        )  # fmt: skip

    def _timing(self) -> dict[str, Any]:
        train_time_ms = 1000 * self.elapsed_s
        return dict(train_time_ms=train_time_ms, step_avg_ms=train_time_ms / max(self.step, 1))

    def log_qat(self, lr_scale: float) -> None:
        self.log.row("qat_on", step=self.step, lr_scale=lr_scale, codec=self.config.bits_label)

    def log_step(self, grad_norm: Tensor, lr_scale: float) -> None:
        """Read the losses back and log them: with the swarm's votes, a step's only host synchronisation."""
        controls: dict[str, Any] = dataclasses.asdict(self.controls) | {"qat": int(self.controls.qat)}
        if self.crown_q_loss is not None:
            controls["crown_q"] = self.crown_q_loss.item()
        self.log.row(
            f"step:{self.step}/{self.config.iterations}", train_loss=self.global_train_loss(),
            **self._timing(), lr_scale=lr_scale, grad_norm=grad_norm.item(), **controls,
        )  # fmt: skip

    def global_train_loss(self) -> float:
        """The last step's main cross-entropy over all ranks, nats per token."""
        return self.runtime.all_reduce_sum(self.train_loss.clone()).item() / self.runtime.world_size

    def vote(self, mesh: swarm_agents.VotingMesh, grad_norm: Tensor, lr_scale: float) -> None:
        """One cycle of the swarm: rank 0 votes on global metrics, every rank applies the outcome."""
        config, controls = self.config, self.controls
        self.loss_history.append(self.global_train_loss())
        metrics = swarm_agents.TrainingMetrics(
            step=self.step, total_steps=config.iterations, train_loss=self.loss_history[-1],
            loss_history=tuple(self.loss_history), grad_norm=grad_norm.item(),
            elapsed_ms=1000 * self.elapsed_s, max_wallclock_ms=1000 * config.training_seconds,
            current_lr_scale=lr_scale, qat_enabled=controls.qat, kg_weight=controls.kg_weight,
            mtp_weight=controls.mtp_weight, clip_norm=controls.clip_norm, qat_available=config.qat_bits > 0,
        )  # fmt: skip
        before: dict[str, float] = dataclasses.asdict(controls)
        values = before | {decision.parameter: decision.new for decision in mesh.vote(metrics)}
        agreed = self.runtime.from_main(*values.values())
        controls.apply({name: new for (name, old), new in zip(before.items(), agreed) if new != old})
        for line in mesh.log_lines():
            self.log.line(line)

    def save(self, finished: bool = False) -> None:
        """Copy all that a resumed run needs to rank 0's memory; a thread writes it while training goes on."""
        if self.checkpoints is None:
            return
        began = time.perf_counter()
        self.saved_at_s = self.elapsed_s
        momentum = [shard.whole_momentum(self.runtime) for shard in self.optimizers.muon.shards]
        if not self.runtime.is_main:
            return
        tensors = dict(
            model=self.model.state_dict(), muon=dict(zip(BANK_NAMES, momentum)), rng=torch.get_rng_state(),
            adamw=self.optimizers.adamw.state_dict()["state"], average=dict(enumerate(self.average.shadow)),
        )  # fmt: skip
        self.checkpoints.save(flatten(tensors), self._progress(finished), began)

    def _progress(self, finished: bool = False) -> dict[str, Any]:
        """All of a checkpoint but its tensors."""
        return dict(
            step=self.step, elapsed_s=self.elapsed_s, finished=finished, controls=dataclasses.asdict(self.controls),
            health=dataclasses.asdict(self.health), average_count=self.average.count, loss_history=self.loss_history,
            swarm=None if self.swarm is None else self.swarm.state_dict(), world_size=self.runtime.world_size,
            identity=self.identity, config=dataclasses.asdict(self.config),
        )  # fmt: skip

    def restore(self, state: State, source: str) -> None:
        """Stand where `save` stood, at any world size. Raises ConfigError, CheckpointError."""
        try:
            tensors, meta = nest(state[0]), state[1]
            self._check_same_run(meta, source)
            compared = {name: value for name, value in self._progress().items() if name not in ("config", "swarm")}
            same_kinds(compared, meta)
            if not (0 <= meta["step"] <= self.config.iterations and meta["elapsed_s"] >= 0):
                raise ValueError("impossible step or time")
            self.model.load_state_dict(tensors["model"])
            for name, shard in zip(BANK_NAMES, self.optimizers.muon.shards):
                shard.load_momentum(tensors["muon"][name])
            load_optimizer(self.optimizers.adamw, tensors.get("adamw", {}))
            for index, shadow in enumerate(self.average.shadow):
                shadow.copy_(tensors["average"][str(index)])
            torch.set_rng_state(tensors["rng"])
            self.controls, self.health = Controls(**meta["controls"]), Health(**meta["health"])
            skipped = self.health.skipped_in_a_row, self.health.skipped
            self.optimizers.skipped = self.optimizers.skipped.new_tensor(skipped)
            self.seen[:2] = self.optimizers.skipped
            self.step, self.average.count, self.loss_history = meta["step"], meta["average_count"], meta["loss_history"]
            self.elapsed_s = self.saved_at_s = self.clock.total_s = meta["elapsed_s"]
            if self.swarm is not None:
                self.swarm.load_state_dict(meta["swarm"])
                self.swarm.summary()  # reads all of it
            saved_by = meta["world_size"]
            self.log.row("resumed", step=self.step, **{"from": source}, **self._timing(), saved_by_ranks=saved_by)
        except (*MALFORMED, RuntimeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise CheckpointError(f"{source} has unexpected content ({type(error).__name__}: {error})") from error

    def _check_same_run(self, meta: Mapping[str, Any], source: str) -> None:
        ours, theirs = (json.loads(json.dumps(fields)) for fields in (dataclasses.asdict(self.config), meta["config"]))
        names = [name for name in ours if not name.startswith(NOT_TRAINING) and ours[name] != theirs[name]]
        odd = [f"{name.upper()}={theirs[name]} (now {ours[name]})" for name in names]
        odd += [name for name, value in self.identity.items() if meta["identity"][name] != value]
        if odd:
            advice = "set them back, or RESUME= to train from the beginning"
            raise ConfigError(f"{source} was trained with another {', '.join(odd)}; {advice}")

    def look_around(self) -> tuple[int, bool]:
        """Agree with all ranks on clock and health; the signal to stop for, or 0, and whether a rank lacks its batch.

        Raises TrainingError.
        """
        left_s = self.config.training_seconds - self.elapsed_s
        if 0 < left_s < self.SETTLED_S:
            self.runtime.synchronize()  # the last seconds are counted with the work that the device still has queued
        before = self.health.skipped
        own = self.runtime.signal, self.loader.failing(self.step), *self.seen.tolist()
        self.elapsed_s, signalled, failing, in_a_row, skipped, loss = self.clock.agreed(*own)
        self.health.observe(in_a_row, skipped, loss, self.config.vocab_size)
        if self.health.skipped > before:
            self.log.row("update_skipped", "gradient not finite", step=self.step, in_all=self.health.skipped)
        if problem := self.health.problem():
            if self.checkpoints is not None:
                self.checkpoints.finish()
            last = self.checkpoints.newest if self.checkpoints is not None else ""
            advice = f"the last good checkpoint is {last or 'none'}; lower MATRIX_LR or GRAD_CLIP_NORM"
            raise TrainingError(f"{problem}, at step {self.step}: {advice}")
        return int(signalled), bool(failing)

    def train(self, state: State | None = None, source: str = "") -> None:
        """Train until ITERATIONS or the wallclock cap, validating on the way and at the end; or go on from `state`."""
        config = self.config
        finished = state is not None and state[1].get("finished", False)
        if not finished:
            self.warm_up()
        if state is not None:
            self.restore(state, source)
        if finished:
            return
        if self.controls.qat and self.step == 0:
            self.log_qat(1.0)
        compiles = compile_count()
        self.clock.start()
        while True:
            signalled, failing = self.look_around()
            capped = 0 < config.training_seconds <= self.elapsed_s
            last = self.step >= config.iterations or capped
            due = config.val_loss_every and self.step % config.val_loss_every == 0 and self.step > 0
            if last or due:
                self.clock.pause()
                self.elapsed_s = self.clock.agreed()[0]
                before = compile_count()
                self.validate()
                compiles += compile_count() - before  # validation stands outside the timed window
            if last:
                break
            if due:
                self.clock.start()
            calm = self.health.skipped_in_a_row == self.health.lost_steps == 0
            timely = 0 < config.checkpoint_seconds <= self.elapsed_s - self.saved_at_s
            if signalled or failing or (calm and timely):
                self.save()
            if signalled and self.checkpoints is not None:
                self.checkpoints.stop(signalled, step=self.step)
            if failing:
                self.loader.batch(self.step)  # raises where the batch is missing
                self.runtime.agree(0.0)  # and here elsewhere, on the CPU: no GPU waits for a rank that is gone
            self.one_step()
        if capped:
            self.log.row("stopping_early: wallclock_cap", train_time_ms=1000 * self.elapsed_s, step=self.step)
        self.log.row("compilations_in_timed_window", count=compile_count() - compiles)
        for line in self.swarm.summary() if self.swarm is not None else ():
            self.log.line(line)
        self.save(finished=True)

    def one_step(self) -> None:
        """Decide, train, average, and log when due."""
        config = self.config
        lr_scale = lr_scale_at(config, self.step, self.elapsed_s)
        if not self.controls.qat and self.qat_due(lr_scale):
            self.controls.qat = True
            self.log_qat(lr_scale)
        grad_norm = self.train_step(self.step, lr_scale)
        loss = self.train_loss.nan_to_num(0.0, 0.0, 0.0)
        self.seen.copy_(torch.cat([self.optimizers.skipped, loss[None]]), non_blocking=True)
        self.step += 1
        self.average.update(self.step, lr_scale)
        if self.swarm is not None and self.swarm.due(self.step):
            self.vote(self.swarm, grad_norm, lr_scale)
        self.log.progress(self.step, config.iterations, f"{self.elapsed_s:.0f}s")
        if self.step <= 10 or self.step % config.train_log_every == 0:
            self.elapsed_s = self.clock.agreed()[0]
            self.log_step(grad_norm, lr_scale)


def wants_compile(config: Config, runtime: Runtime) -> bool:
    """Raises UserError where compiling is wanted and Triton is missing."""
    on_cuda = runtime.device.type == "cuda"
    wanted = on_cuda if config.compile is None else config.compile
    if wanted and on_cuda:
        require("triton", "compiling for CUDA (COMPILE=0 runs without)")
    return wanted


def compile_count() -> int:
    """Graphs compiled so far in this process."""
    import torch._dynamo.utils as dynamo_utils  # slow to import, and only needed here

    return dynamo_utils.counters["stats"]["unique_graphs"]


# ----------------------------------------------------------------------------------------------------------
# 8. Artifact: averaged weights → integers and scales → coded levels → safetensors → one zstd frame; and back.
# ----------------------------------------------------------------------------------------------------------
ARTIFACT_FORMAT = 2
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
DAMPING = (0.01, 0.1, 1.0)  # of the mean diagonal, tried in turn
GPTQ_BLOCK = 128  # columns whose errors reach the rest of the matrix together
MAX_UNPACKED_BYTES = 2**30  # an artifact that claims more is not one of ours
LZMA_MAGIC, BROTLI_MAGIC = b"\xfd7zXZ\0", b"\xce\xb2\xcf\x81"  # the latter ours to write: brotli has none
DIGEST_FRAME = b"P*M\x18" + (32).to_bytes(4, "little")  # a zstd frame that decoders skip: SHA-256 of all before it
SIZE_CLASSES = 48  # of levels: their expected size from 1/8 up in quarters of a doubling
ANS_BITS = 14  # probabilities are multiples of 2^-14
SMALLER_MODEL = "use fewer layers, a smaller MLP_MULT or BIGRAM_VOCAB_SIZE, or fewer QAT_BITS"
ANS_FLOOR = 2**16  # a coder's state lies in [2^16, 2^32); 16-bit words enter and leave it


def candidate_scales(weight: Tensor, grid: Grid) -> Iterator[Tensor]:
    """The fp16 scales (…, 1) that a row may take: that of CLIP_STD, or one for each quantile of its sizes."""
    if grid.clip_std:
        yield grid.scale(grid.clip(weight))
        return
    ordered = weight.abs().sort(dim=-1).values
    last = ordered.size(-1) - 1
    for quantile in CLIP_QUANTILES:
        low = math.floor(quantile * last)
        clip = torch.lerp(ordered[..., low], ordered[..., min(low + 1, last)], quantile * last - low)
        yield grid.scale(clip.unsqueeze(-1))


Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]  # scale (…, 1) → levels, and each row's error (…, 1)


def best_rounding(weight: Tensor, grid: Grid, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """(levels, scale) with, for each row, the scale that loses least."""
    scales = candidate_scales(weight, grid)
    scale = next(scales)
    levels, error = rounding(scale)
    for other_scale in scales:
        other_levels, other_error = rounding(other_scale)
        better = other_error < error
        levels, scale = torch.where(better, other_levels, levels), torch.where(better, other_scale, scale)
        error = torch.minimum(error, other_error)
    return levels, scale


def round_plainly(weight: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Nearest levels (`lite`), and the sum of each row's square errors."""
    levels = grid.encode(weight, scale)
    return levels, (grid.decode(levels, scale) - weight).square().sum(-1, keepdim=True)


class HessianFactor(NamedTuple):
    """What GPTQ needs of the second moments of matrices' inputs."""

    order: Tensor  # (matrices, in): columns by descending second moment
    upper: Tensor  # (matrices, in, in): U, upper triangular, with UᵀU the inverse of the ordered, damped moments
    damping: Tensor  # (matrices,) in units of the mean diagonal; inf: no factor was found, U = 1 is plain rounding


Hessians = Mapping[str, HessianFactor]  # by bank


def factorize(moments: Tensor) -> HessianFactor:
    """Factor the second moments (matrices, in, in) of matrices' inputs; where fp32 fails, with more damping.

    With reversed rows and columns, moments = A·Aᵀ for an upper A, so U is A's inverse: the Cholesky factor of the
    inverse without inverting first.
    """
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    rows = order.unsqueeze(-1).expand_as(moments)
    ordered = moments.gather(-2, rows).gather(-1, rows.mT)
    identity = torch.eye(moments.size(-1), device=moments.device).expand_as(moments)
    mean = diagonal.mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    upper, damping = identity.clone(), torch.full_like(mean, math.inf)
    for share in DAMPING:
        damped = ordered + (share * mean)[:, None, None] * identity
        lower, info = torch.linalg.cholesky_ex(damped.flip(-2, -1))
        found = torch.linalg.solve_triangular(lower.flip(-2, -1), identity, upper=True)
        sound = found.isfinite().all(-1).all(-1) & (found.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
        fits = damping.isinf() & (info == 0) & sound
        upper[fits], damping[fits] = found[fits], share
    return HessianFactor(order, upper, damping)


def round_by_hessian(
    weight: Tensor, scale: Tensor, grid: Grid, pruned: Tensor, factor: HessianFactor
) -> tuple[Tensor, Tensor]:
    """GPTQ (arXiv 2210.17323): round column after column, each error made good by the columns still to come.

    `weight` and `pruned` (matrices, out, in), `scale` (matrices, out, 1). Returns levels and each row's error
    e·H·eᵀ, (matrices, out, 1), with the damped moments H.
    """
    columns = factor.order.unsqueeze(-2).expand_as(weight)
    open_weights, kept = weight.gather(-1, columns), ~pruned.gather(-1, columns)
    levels = torch.empty_like(open_weights, dtype=torch.int8)
    total = torch.zeros_like(scale, dtype=torch.float32)
    for start in range(0, weight.size(-1), GPTQ_BLOCK):
        stop = min(start + GPTQ_BLOCK, weight.size(-1))
        errors = torch.empty_like(open_weights[..., start:stop])
        for column in range(start, stop):
            here = slice(column, column + 1)
            levels[..., here] = grid.encode(open_weights[..., here], scale) * kept[..., here]
            error = open_weights[..., here] - grid.decode(levels[..., here], scale)
            error /= factor.upper[:, here, here]
            open_weights[..., column:stop] -= error * factor.upper[:, here, column:stop]
            errors[..., column - start] = error[..., 0]
        open_weights[..., stop:] -= errors @ factor.upper[:, start:stop, stop:]
        total += errors.square().sum(-1, keepdim=True)
    return torch.empty_like(levels).scatter_(-1, columns, levels), total


def smallest(weight: Tensor, fraction: float) -> Tensor:
    """Mask of that fraction of a tensor's elements, those nearest zero."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    chosen = weight.abs().flatten().topk(int(fraction * weight.numel()), largest=False, sorted=False).indices
    mask.view(-1)[chosen] = True
    return mask


@torch.no_grad()
def quantize(
    state: Mapping[str, Tensor], plan: Mapping[str, str], options: QuantizeOptions, hessians: Hessians | None = None
) -> dict[str, Tensor]:
    """The artifact's tensors: `<name>.levels` and `<name>.scale` where the plan says intN, else `<name>`; on the CPU.

    Banks are pruned; those that have a Hessian are rounded by GPTQ, everything else to the nearest level.
    """
    tensors: dict[str, Tensor] = {}
    for name, codec in plan.items():
        weight = state[name].detach().float()
        grid = options.grid(name, codec)
        if grid is None:
            tensors[name] = weight.half() if codec == "fp16" else weight
            continue
        pruned = smallest(weight, options.prune_fraction if name in BANK_NAMES else 0.0)
        if hessians and name in hessians:
            rounding = functools.partial(round_by_hessian, weight, grid=grid, pruned=pruned, factor=hessians[name])
        else:
            weight = weight.masked_fill(pruned, 0)
            rounding = functools.partial(round_plainly, weight, grid=grid)
        tensors[f"{name}.levels"], tensors[f"{name}.scale"] = best_rounding(weight, grid, rounding)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def dequantize(tensors: Mapping[str, Tensor], plan: Mapping[str, str]) -> dict[str, Tensor]:
    """The state dict that `quantize` stored, fp32. Raises KeyError for a missing tensor, ValueError for odd scales."""
    state = {}
    for name, codec in plan.items():
        grid = grid_of(codec)
        if grid is not None:
            levels, scale = tensors[f"{name}.levels"], tensors[f"{name}.scale"]
            if scale.shape != (*levels.shape[:-1], 1):
                raise ValueError(f"{name} has levels of shape {tuple(levels.shape)}, scales of {tuple(scale.shape)}")
            state[name] = grid.decode(levels, scale)
        else:
            state[name] = tensors[name].float()
    return state


BANK_INPUTS = dict(  # what the rows of a bank are multiplied with, by the names that the model shows to a probe
    qo_bank=("attn_in", "attn_out"), kv_bank=("attn_in", "attn_in"),
    mlp_up_bank=("mlp_in",), mlp_down_bank=("mlp_hidden",),
)  # fmt: skip


@torch.no_grad()
def calibrate(trainer: Trainer) -> Hessians:
    """Hessians X·Xᵀ of every bank from the training tokens right after those of the last step, over all ranks.

    Reading training data runs on the training clock: no batch is begun that, as long as the one before, would not end
    within MAX_WALLCLOCK_SECONDS. Where not even one fits, the result is empty and rounding stays plain.
    """
    config, runtime, clock = trainer.config, trainer.runtime, trainer.clock
    sums: dict[str, Tensor] = {}

    def probe(name: str, layer: int, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        if name not in sums:
            sums[name] = rows.new_zeros(config.num_layers, rows.size(-1), rows.size(-1))
        sums[name][layer].addmm_(rows.mT, rows)

    batches = (ids for step in itertools.count(trainer.step) for ids, _ in trainer.loader.batch(step))
    clock.start()
    began_s = now_s = clock.agreed()[0]
    batch_s, tokens = began_s / max(trainer.step, 1), 0  # a training step is longer than one forward pass
    while tokens < config.calibration_tokens and now_s + batch_s <= (config.max_wallclock_seconds or math.inf):
        ids = next(batches)
        trainer.model.forward_hidden(ids, probe=probe)
        tokens += ids.numel() * runtime.world_size
        runtime.synchronize()
        before_s, now_s = now_s, clock.agreed()[0]
        batch_s = now_s - before_s
    moments = {name: runtime.all_reduce_sum(total) / max(tokens, 1) for name, total in sums.items()}
    clock.pause()  # what follows reads no training data
    factors_began, banks = time.perf_counter(), BANK_INPUTS.items() if tokens else ()
    factors = {bank: factorize(torch.cat([moments[name] for name in inputs])) for bank, inputs in banks}
    runtime.synchronize()
    damping = torch.cat([factor.damping for factor in factors.values()]) if factors else torch.empty(0)
    trainer.log.row(
        "calibration", tokens=tokens, time_s=clock.total_s - began_s, train_and_calibration_s=clock.total_s,
        budget_s=config.max_wallclock_seconds, factors_s=time.perf_counter() - factors_began,
        more_damping=int((damping > DAMPING[0]).sum()), without_factor=int(damping.isinf().sum()),
    )  # fmt: skip
    return factors


def size_classes(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Class of each level, flat, by the size codes of its row (…, R, 1) and, relative to that, its column (…, 1, C)."""
    return (rows.astype(np.int16) + columns - 12).clip(0, SIZE_CLASSES - 1).astype(np.uint16).reshape(-1)


def ans_tables(frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Width and start of the slots of each class·256 + level byte."""
    widths = frequencies.astype(np.int64)
    return widths.reshape(-1), (widths.cumsum(axis=1) - widths).reshape(-1)


def encode_levels(levels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All levels (each (…, R, C) int8) as one code with a histogram for each size class, and the sizes.

    Range asymmetric numeral systems (arXiv 1311.2540): a level costs what its histogram says, where zstd's Huffman
    codes are whole bits. Thousands of interleaved lanes (arXiv 1402.3392) make each step one of numpy's.
    """
    arrays, keys = {}, []
    for name, level in sorted(levels.items()):
        energy = np.square(level, dtype=np.float32)
        for axis, side in ((-1, "rows"), (-2, "columns")):
            mean = energy.mean(axis=axis, keepdims=True).clip(min=2.0**-6)
            arrays[f"{name}.{side}"] = (np.rint(2 * np.log2(mean)) + 12).astype(np.uint8)
            energy = energy / mean
        classes = size_classes(arrays[f"{name}.rows"], arrays[f"{name}.columns"])
        keys.append(classes << 8 | level.reshape(-1).view(np.uint8))
    key = np.concatenate(keys)
    counts = np.bincount(key, minlength=SIZE_CLASSES * 256).reshape(SIZE_CLASSES, 256)
    spare = 2**ANS_BITS - (counts > 0).sum(axis=1, keepdims=True)
    frequencies = counts * spare // counts.sum(axis=1, keepdims=True).clip(min=1) + (counts > 0)
    frequencies[np.arange(SIZE_CLASSES), counts.argmax(axis=1)] += 2**ANS_BITS - frequencies.sum(axis=1)
    widths, starts = ans_tables(frequencies)
    lanes = min(max(len(key) // 8192, 64), 4096)
    states, words = np.full(lanes, ANS_FLOOR), [np.empty(0, np.uint16)]
    for begin in reversed(range(0, len(key), lanes)):
        step = key[begin : begin + lanes]
        state, width = states[: len(step)], widths[step]
        full = state >> (32 - ANS_BITS) >= width
        words.append(state[full].astype(np.uint16))
        state[full] >>= 16
        quotient, rest = np.divmod(state, width)
        state[:] = (quotient << ANS_BITS) + rest + starts[step]
    arrays |= {"ans.frequencies": frequencies.astype(np.uint16), "ans.states": states.astype(np.uint32)}
    return arrays | {"ans.words": np.concatenate(words[::-1])}


def decode_levels(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, torch.Size]) -> dict[str, np.ndarray]:
    """Undo `encode_levels`. Raises KeyError, IndexError or ValueError for what it cannot have made."""
    sizes = {name: (arrays[f"{name}.rows"], arrays[f"{name}.columns"]) for name in sorted(shapes)}
    for name, (rows, columns) in sizes.items():
        if np.broadcast_shapes(rows.shape, columns.shape) != shapes[name]:
            raise ValueError(f"{name} has levels of another shape than the model")
    classes = np.concatenate([size_classes(*sides) for sides in sizes.values()])
    if (arrays["ans.frequencies"].sum(axis=1) != 2**ANS_BITS).any():
        raise ValueError("the histograms of the levels do not add up")
    widths, starts = ans_tables(arrays["ans.frequencies"])
    symbols = np.repeat(np.tile(np.arange(256, dtype=np.uint8), SIZE_CLASSES), widths)
    states, words, position = arrays["ans.states"].astype(np.int64), arrays["ans.words"].astype(np.int64), 0
    flat = np.empty(len(classes), np.uint8)
    for begin in range(0, len(classes), len(states)):
        step = classes[begin : begin + len(states)].astype(np.int64)
        state = states[: len(step)]
        slot = state & (2**ANS_BITS - 1)
        flat[begin : begin + len(step)] = symbol = symbols[step << ANS_BITS | slot]
        key = step << 8 | symbol
        state[:] = widths[key] * (state >> ANS_BITS) + slot - starts[key]
        low = np.flatnonzero(state < ANS_FLOOR)
        state[low] = state[low] << 16 | words[position : position + len(low)]
        position += len(low)
    if position != len(words) or (states != ANS_FLOOR).any():
        raise ValueError("the code of the levels does not come out even")
    parts = np.split(flat.view(np.int8), np.cumsum([shapes[name].numel() for name in sizes])[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(sizes, parts)}


def entropy_bound(tensors: Mapping[str, Tensor]) -> float:
    """Bytes of the integers at their order-0 entropy: one histogram for each tensor, itself free of charge."""
    bound = 0.0
    for tensor in tensors.values():
        if tensor.dtype == torch.int8:
            counts = np.bincount(tensor.numpy().reshape(-1).view(np.uint8))
            bound += float((counts * np.log2(tensor.numel() / counts.clip(min=1))).sum()) / 8
    return bound


def compress(payload: bytes, compressor: str) -> bytes:
    """The payload at the compressor's highest level."""
    if compressor == "brotli":
        return BROTLI_MAGIC + require("brotli", "COMPRESSOR=brotli").compress(payload, quality=11, lgwin=24)
    if compressor == "lzma":
        lzma = require("lzma", "COMPRESSOR=lzma")
        return lzma.compress(payload, preset=9 | lzma.PRESET_EXTREME)
    zstandard = require("zstandard", "packing the artifact")
    return zstandard.ZstdCompressor(level=22, write_checksum=True).compress(payload)


def decompress(stream: bytes) -> bytes:
    """Undo `compress`, whichever compressor it was. Raises ValueError, also above MAX_UNPACKED_BYTES."""
    most, purpose = MAX_UNPACKED_BYTES + 1, "reading this artifact"
    fault: type[Exception] = ValueError
    try:
        if stream.startswith(LZMA_MAGIC):
            lzma = require("lzma", purpose)
            fault = lzma.LZMAError
            payload = lzma.LZMADecompressor(memlimit=2**28).decompress(stream, most)
        elif stream.startswith(BROTLI_MAGIC):
            brotli = require("brotli", purpose)
            fault = brotli.error
            payload = brotli.Decompressor().process(stream[len(BROTLI_MAGIC) :], output_buffer_limit=most)
        else:
            zstandard = require("zstandard", purpose)
            fault = zstandard.ZstdError
            claimed = zstandard.get_frame_parameters(stream).content_size
            payload = zstandard.ZstdDecompressor().decompress(stream) if claimed < most else b""
    except fault as error:
        raise ValueError(str(error)) from error
    if not 0 < len(payload) < most:
        raise ValueError(f"it is empty, or claims more than {MAX_UNPACKED_BYTES} bytes of content")
    return payload


def seal(stream: bytes) -> bytes:
    """Add what tells every changed, missing or added byte, for compressors without a checksum too."""
    return stream + DIGEST_FRAME + hashlib.sha256(stream).digest()


def shuffle_bytes(array: np.ndarray, undo: bool = False) -> np.ndarray:
    """The same shape and type with bytes of one significance side by side, where a compressor profits from them."""
    parts = array.reshape(-1).view(np.uint8).reshape((array.itemsize, -1) if undo else (-1, array.itemsize))
    return parts.T.copy().reshape(-1).view(array.dtype).reshape(array.shape)


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], compressor: str) -> bytes:
    """The artifact's bytes for what `quantize` made: the same for the same tensors."""
    safetensors = require("safetensors.numpy", "packing the artifact")
    levels = {name: tensor.numpy() for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items() if name not in levels}
    arrays |= encode_levels(levels) if levels else {}
    # One entry: safetensors writes several in a random order, and the same weights would make different files.
    header = {"train_gpt": json.dumps(metadata, sort_keys=True)}
    payload = safetensors.save({name: shuffle_bytes(array) for name, array in arrays.items()}, header)
    return seal(compress(payload, compressor))


def fit_artifact(
    make: Callable[[QuantizeOptions], dict[str, Tensor]],
    pack: Callable[[Mapping[str, Tensor]], bytes],
    options: QuantizeOptions,
    limit: int,
    log: RunLog | None = None,
) -> tuple[QuantizeOptions, dict[str, Tensor], bytes]:
    """`options` if their artifact has at most `limit` bytes, else the next coarser that do: clips widened step by
    step to 2.7 times the width, then up to 90 % of the weights pruned as well.

    Entropy compares candidates, packing only confirms. Raises ArtifactError when even the coarsest are too large.
    """
    # Below about 5 deviations a clip cuts outliers off and saves nothing: both the error and the entropy grow.
    widths = [(options.clip_std or 5.0) * 1.01**rung for rung in range(1, 101)]
    fractions = [percent / 100 for percent in range(1, 91) if percent / 100 > options.prune_fraction]
    ladder = [dataclasses.replace(options, clip_std=width) for width in widths]
    ladder += [dataclasses.replace(ladder[-1], prune_fraction=fraction) for fraction in fractions]
    tensors, rung = make(options), -1
    packed = pack(tensors)
    while len(packed) > limit:
        if options == ladder[-1]:
            too_much = f"{len(packed) - limit} bytes too many of the {limit} left for the artifact"
            raise ArtifactError(f"FIT_BYTES=1 leaves {too_much} even with {options}; {SMALLER_MODEL}")
        allowed = entropy_bound(tensors) - (len(packed) - limit)
        fits = functools.partial(lambda most, coarser: entropy_bound(make(coarser)) <= most, allowed)
        rung = bisect.bisect_left(ladder[:-1], True, rung + 1, key=fits)
        options = ladder[rung]
        tensors = make(options)
        before, packed = len(packed), pack(tensors)
        if log is not None:
            log.row("fit_bytes", before=before, after=len(packed), limit=limit, **dataclasses.asdict(options))
    return options, tensors, packed


def save_artifact(
    model: GPT, tokenizer_digest: str, path: Path, hessians: Hessians | None = None, log: RunLog | None = None
) -> int:
    """Quantize, pack and write atomically. Returns the file's bytes. Raises ArtifactError."""
    config = model.config
    metadata = {
        "format": ARTIFACT_FORMAT,
        "config": config.portable().to_json(),
        "plan": model.plan,
        "tokenizer": tokenizer_digest,
        "code": code_digest(),
    }
    make = functools.partial(quantize, model.state_dict(), model.plan, hessians=hessians)
    pack = functools.partial(pack_tensors, metadata=metadata, compressor=config.compressor)
    limit = SIZE_LIMIT_BYTES - code_bytes() if config.fit_bytes else sys.maxsize
    options, tensors, packed = fit_artifact(make, pack, QuantizeOptions.of(config), limit, log)
    if log is not None:
        bound = entropy_bound(tensors)
        share = len(packed) - len(pack({name: t for name, t in tensors.items() if t.dtype != torch.int8}))
        shown = {"payload": share, "entropy_bound": round(bound), "ratio": share / max(bound, 1.0)}
        log.row("packing", **shown, **dataclasses.asdict(options))
    try:
        write_whole(path, packed)
    except OSError as error:
        advice = "free space or set OUT_DIR"
        raise ArtifactError(f"cannot write the artifact {path}: {error.strerror}; {advice}") from error
    return len(packed)


def read_artifact(path: str | Path) -> bytes:
    """Raises ArtifactError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read the artifact {path} (ARTIFACT): {error.strerror}") from error


def load_artifact(
    path: str | Path, attend: Attention = sdpa_attention, content: bytes | None = None
) -> tuple[GPT, Config, dict[str, Any]]:
    """(model on CPU, its config, metadata) of the file, or of its `content`. Raises ArtifactError."""
    safetensors = require("safetensors.numpy", "reading the artifact")
    advice = "it is truncated, altered, or no artifact of this version; train again or fetch it again"
    packed = read_artifact(path) if content is None else content
    stream = packed[: -len(seal(b""))]
    if seal(stream) != packed:
        raise ArtifactError(f"{path} does not end in its own SHA-256: {advice}")
    try:
        payload = decompress(stream)
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        metadata = json.loads(header["__metadata__"]["train_gpt"])
        if metadata["format"] != ARTIFACT_FORMAT:
            raise ArtifactError(f"{path} has format {metadata['format']}; this code reads {ARTIFACT_FORMAT}")
        if not all(isinstance(metadata[name], str) for name in ("tokenizer", "code")):
            raise TypeError("digests that are no text")
        config = Config.from_json(metadata["config"])
        with torch.device("meta"):  # shapes alone: a config that asks for too much must cost nothing
            model = GPT(config, attend, initialize=False)
        if metadata["plan"] != model.plan:
            raise ArtifactError(f"{path} stores its tensors in another way than its config asks for: {advice}")
        shapes = {name: model.get_parameter(name).shape for name in model.plan}
        if sum(shape.numel() for shape in shapes.values()) > MAX_UNPACKED_BYTES:
            raise ArtifactError(f"{path} claims more than {MAX_UNPACKED_BYTES} weights; {advice}")
        arrays = {name: shuffle_bytes(a, undo=True) for name, a in safetensors.load(payload).items()}
        coded = {f"{name}.levels": shapes[name] for name, codec in model.plan.items() if grid_of(codec)}
        arrays |= decode_levels(arrays, coded)
        state = dequantize({name: torch.from_numpy(array) for name, array in arrays.items()}, model.plan)
        model.load_state_dict(state, assign=True)
    except importlib.import_module("safetensors").SafetensorError as error:
        raise ArtifactError(f"{path} cannot be decoded: {advice}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ArtifactError(f"{path} has unexpected content ({what}): {advice}") from error
    return model, config, metadata


def code_digest() -> str:
    """First 16 hex digits of the SHA-256 over the code files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in code_paths())).hexdigest()[:16]


def log_ledger(log: RunLog, artifact_bytes: int, label: str) -> None:
    """Log what counts against the limit. Raises ArtifactError, before any evaluation, when it is too much."""
    code = code_bytes()
    total = code + artifact_bytes
    log.row("artifact_bytes", text=f"Serialized model {label}: {artifact_bytes} bytes", bytes=artifact_bytes)
    log.row("code_bytes", text=f"Code size: {code} bytes", bytes=code, files=[p.name for p in code_paths()])
    log.row("total_bytes", text=f"Total submission size {label}: {total} bytes", bytes=total, limit=SIZE_LIMIT_BYTES)
    if total > SIZE_LIMIT_BYTES:
        raise ArtifactError(
            f"the submission is {total - SIZE_LIMIT_BYTES} bytes over {SIZE_LIMIT_BYTES}; set FIT_BYTES=1 for coarser "
            f"integers, or {SMALLER_MODEL}"
        )


# ----------------------------------------------------------------------------------------------------------
# 9. Scoring: windows over the validation stream, every target once, one stream of token scores.
# ----------------------------------------------------------------------------------------------------------
class Windows(NamedTuple):
    """Windows of `length` tokens; window i begins at starts[i] and scores its last tails[i] targets."""

    length: int
    starts: np.ndarray
    tails: np.ndarray


def plan_windows(num_targets: int, seq_len: int, stride: int, chunk: int = 0) -> Windows:
    """Full-length windows that together score each of `num_targets` targets exactly once, in order.

    The first window scores all it sees; each further one its last `stride`, or less where a chunk of `chunk`
    targets (0: no chunks) ends; the last one is shifted left so that it is full-length too.
    """
    length = min(seq_len, num_targets)
    ends = np.append(np.arange(length, num_targets, stride), num_targets)
    if chunk:
        ends = np.union1d(ends, np.arange(-(-length // chunk) * chunk, num_targets, chunk))
    return Windows(length, ends - length, np.diff(ends, prepend=0))


class TokenScores(NamedTuple):
    """Per target, in stream order: log-probability and the prediction's entropy, nats, fp32, shape (targets,).

    `sampled` (S, V) holds the whole prediction at the targets `sample_targets`, by which validity is checked.
    """

    logp: np.ndarray
    entropy: np.ndarray
    sampled: np.ndarray = np.zeros((0, 0), np.float32)


class Score(NamedTuple):
    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    tokens: int
    bytes: int
    partial: bool  # VAL_TOKENS cut the validation split
    valid: bool = True  # false: the probabilities do not sum to 1, and the number is no code length

    @property
    def note(self) -> str:
        """Put behind the result wherever it is written."""
        return " ".join(["partial"] * self.partial + ["INVALID"] * (not self.valid))

    def headline(self) -> dict[str, Any]:
        """What every result line shows."""
        return dict(val_loss=self.val_loss, val_bpb=self.val_bpb)


def summarize(scores: TokenScores, validation: ValidationSet) -> Score:
    """The score of a stream, summed in float64."""
    return score_of(float(scores.logp.sum(dtype=np.float64)), validation)


def score_of(total_logp: float, validation: ValidationSet, valid: bool = True) -> Score:
    """Bits per byte: Σ nll / (ln 2 · Σ bytes)."""
    tokens, total_bytes = validation.num_targets, int(validation.bytes.sum(dtype=np.int64))
    bpb = -total_logp / (math.log(2) * total_bytes)
    return Score(-total_logp / tokens, bpb, tokens, total_bytes, validation.partial, valid)


def sample_targets(num_targets: int) -> np.ndarray:
    """Where the mixture's mass is checked, ascending: 64 targets spread evenly over the stream and its first 16.

    A mixer that has seen what it should not stands out most before the counts are large.
    """
    spread = np.linspace(0, num_targets - 1, 64).astype(np.int64)
    return np.union1d(spread, np.arange(min(16, num_targets)))


class WindowScorer:
    """Scores batches of windows with the model as it is now; compiled on CUDA for the common window shape."""

    temperature = 1.0

    def __init__(self, model: GPT, config: Config, runtime: Runtime, tokens: np.ndarray):
        self.model, self.runtime, self.batch_seqs = model, runtime, config.eval_batch_seqs
        self.samples = sample_targets(len(tokens) - 1)
        self.sampled = torch.zeros(len(self.samples), config.vocab_size, device=runtime.device)
        self.tokens = torch.from_numpy(np.ascontiguousarray(tokens).astype(np.int32)).to(runtime.device)
        compiled = wants_compile(config, runtime)
        self.compiled = torch.compile(model.token_scores, dynamic=False) if compiled else model.token_scores

    def sequences(self, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        """ids and targets of the sequences that begin at `starts`, each (len(starts), length), int64."""
        positions = torch.from_numpy(starts).to(self.tokens.device)[:, None]
        rows = self.tokens[positions + torch.arange(length + 1, device=self.tokens.device)].long()
        return rows[:, :-1], rows[:, 1:]

    @torch.inference_mode()
    def score(self, windows: Windows, part: range) -> tuple[Tensor, Tensor]:
        """logp and entropy of the targets that windows `part` score, in order, on the device."""
        empty = torch.zeros(0, device=self.tokens.device)
        columns: list[tuple[Tensor, Tensor]] = [(empty, empty)]
        first, target = part.start, int(windows.tails[: part.start].sum())
        while first < part.stop:
            tail = int(windows.tails[first])
            stop = first + 1
            while stop < min(part.stop, first + self.batch_seqs) and windows.tails[stop] == tail:
                stop += 1
            forward = self.compiled if stop - first == self.batch_seqs else self.model.token_scores
            ids, targets = self.sequences(windows.starts[first:stop], windows.length)
            logp, entropy, every = forward(ids, targets, tail, self.temperature)
            columns.append((logp.flatten(), entropy.flatten()))
            low, high = np.searchsorted(self.samples, (target, target + logp.numel()))
            rows = torch.from_numpy(self.samples[low:high] - target).to(every.device)
            self.sampled[low:high] = every.flatten(0, 1)[rows]
            first, target = stop, target + logp.numel()
        logps, entropies = zip(*columns)
        return torch.cat(logps), torch.cat(entropies)

    def score_all(self, windows: Windows, first: int = 0, stop: int | None = None) -> list[np.ndarray]:
        """logp and entropy of windows first … stop-1, sharded over ranks in contiguous parts, whole on every rank."""
        stop = len(windows.starts) if stop is None else stop
        world_size, rank = self.runtime.world_size, self.runtime.rank
        edges = [first + (stop - first) * r // world_size for r in range(world_size + 1)]
        sizes = [int(windows.tails[low:high].sum()) for low, high in itertools.pairwise(edges)]
        parts = self.score(windows, range(edges[rank], edges[rank + 1]))
        return [self.runtime.gather_parts(part, sizes).cpu().numpy() for part in parts]

    def finish(self, logp: np.ndarray, entropy: np.ndarray) -> TokenScores:
        """The stream's scores with the sampled predictions, which lie on different ranks until now."""
        return TokenScores(logp, entropy, self.runtime.all_reduce_sum(self.sampled).cpu().numpy())


class Progress:
    """How far an evaluation has come, kept in OUT_DIR/checkpoints/evaluation.safetensors while it lasts.

    It holds the results of finished stages and, of the one that runs, the scores so far and what test-time training
    has made of the model. `identity` says of what artifact, text, settings, code and world size. Without
    `checkpoints` it keeps nothing.
    """

    def __init__(self, checkpoints: Checkpoints | None = None, identity: str = ""):
        self.checkpoints, self.identity = checkpoints, identity
        state = checkpoints.find(checkpoints.evaluation()) if checkpoints is not None else None
        flat, meta = state if state is not None and state[1].get("identity") == identity else ({}, {})
        self.restored = nest(flat)
        self.results: list[list[float]] = meta.get("results", [])  # summed logp and seconds of each finished stage
        self.pieces: int = meta.get("pieces", 0)  # of the stage that runs
        self.saved_at_s: float = meta.get("elapsed_s", 0.0)
        self.began = time.perf_counter() - self.saved_at_s
        if meta and checkpoints is not None:
            checkpoints.log.row("resumed_evaluation", stages=len(self.results), pieces=self.pieces)

    def elapsed_s(self) -> float:
        """Seconds of evaluation, those before a restart included."""
        return time.perf_counter() - self.began

    def resume(self, scorer: WindowScorer, trainer: TestTimeTrainer | None = None) -> list[list[np.ndarray]]:
        """Put scorer and trainer where they stood; scores of the first `pieces` pieces, of which all stand in one."""
        state, self.restored = self.restored, {}
        if not state:
            self.pieces = 0
            return []
        try:
            if scorer.runtime.is_main:
                scorer.sampled.copy_(state["sampled"])
            if trainer is not None:
                trainer.load_state(state)
            return [[state["logp"].numpy(), state["entropy"].numpy()]]
        except (*MALFORMED, RuntimeError) as error:
            name = "OUT_DIR/checkpoints/evaluation.safetensors"
            raise CheckpointError(f"unexpected content of {name} ({error}): remove it") from error

    def advance(
        self, scores: list[list[np.ndarray]], scorer: WindowScorer, trainer: TestTimeTrainer | None = None
    ) -> None:
        """After each piece: save when it is time, stop when a signal came."""
        self.pieces += 1
        if self.checkpoints is None:
            return
        runtime, every = scorer.runtime, self.checkpoints.config.checkpoint_seconds
        now_s, signalled = runtime.agree(self.elapsed_s(), runtime.signal)
        if signalled or 0 < every <= now_s - self.saved_at_s:
            began, self.saved_at_s = time.perf_counter(), now_s
            logp, entropy = (torch.from_numpy(np.concatenate(column)) for column in zip(*scores))
            state = dict(logp=logp, entropy=entropy, sampled=runtime.all_reduce_sum(scorer.sampled.clone()))
            meta = dict(identity=self.identity, results=self.results, pieces=self.pieces, elapsed_s=now_s)
            if runtime.is_main:
                self.checkpoints.save(flatten(state | (trainer.state() if trainer is not None else {})), meta, began)
        if signalled:
            self.checkpoints.stop(int(signalled), stage=len(self.results) + 1, pieces=self.pieces)


PIECE_BATCHES = 64  # batches a rank scores between two looks at signals and clock


def score_stream(
    model: GPT, config: Config, runtime: Runtime, validation: ValidationSet, stride: int,
    progress: Progress | None = None,
) -> TokenScores:  # fmt: skip
    """The neural scores of the whole validation stream by a sliding window, complete on every rank."""
    windows = plan_windows(validation.num_targets, config.eval_seq_len, stride)
    scorer = WindowScorer(model, config, runtime, validation.tokens)
    size = PIECE_BATCHES * config.eval_batch_seqs * runtime.world_size
    edges = [*range(0, len(windows.starts), size), len(windows.starts)]
    progress = progress or Progress()
    scores = progress.resume(scorer)
    for first, stop in itertools.pairwise(edges[progress.pieces :]):
        scores.append(scorer.score_all(windows, first, stop))
        progress.advance(scores, scorer)
    return scorer.finish(*(np.concatenate(column) for column in zip(*scores)))


class TestTimeTrainer:
    """Trains the model on text that is already scored (pull requests 1081 and 700).

    The first TTT_FREEZE_BLOCKS blocks do not move, their slices of the banks included. Every rank takes a share
    of each batch and the gradients are summed, so the outcome does not depend on the number of ranks.
    """

    __test__ = False  # the name is the method's, not a test case's

    def __init__(self, model: GPT, config: Config, runtime: Runtime, validation: ValidationSet):
        self.model, self.config, self.runtime = model, config, runtime
        self.bytes = torch.from_numpy(validation.bytes.astype(np.float32)).to(runtime.device)
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
        trained = [model.get_parameter(name) for name in self._trained_names()]
        for parameter in trained:
            parameter.requires_grad_()
        self.grads = flatten_gradients(trained)
        if config.ttt_optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, config.ttt_lr, config.ttt_momentum)
        else:
            self.optimizer = torch.optim.AdamW(trained, config.ttt_lr, weight_decay=0.0)
        self.trained = [p.detach() for p in trained]
        self.polyak = [p.clone() for p in self.trained] if config.polyak_decay else []

    def _trained_names(self) -> list[str]:
        """Parameters that move; of the banks only the slices of unfrozen blocks keep their gradient."""
        frozen = tuple(f"blocks.{layer}." for layer in range(self.config.ttt_freeze_blocks))
        every = [name for name, role in self.model.parameter_roles().items() if role != "mtp_head"]
        if self.config.ttt_scope == "last":
            vectors = {name for name in every if self.model.get_parameter(name).ndim < 2}
            gains = {name for name in every if name.endswith(("resid_mix", "skip_weights"))} | vectors
            return [name for name in every if name in BANK_NAMES or name in gains]
        return [name for name in every if not name.startswith(frozen)]

    def _zero_frozen_slices(self) -> None:
        L, count = self.model.config.num_layers, self.config.ttt_freeze_blocks
        for name in BANK_NAMES:
            grad = self.model.get_parameter(name).grad
            assert grad is not None
            for half in range(grad.size(0) // L):
                grad[half * L : half * L + count] = 0

    def learning_rate(self, chunk: int, num_chunks: int) -> float:
        """Cosine over the chunks, times the ramp."""
        cosine = 0.5 * (1 + math.cos(math.pi * chunk / max(num_chunks - 1, 1)))
        ramp = 1 + (self.config.ttt_lr_ramp - 1) * min(chunk / (0.3 * num_chunks), 1)
        return self.config.ttt_lr * cosine * ramp

    def train_on(self, scorer: WindowScorer, targets: range, lr: float) -> None:
        """TTT_EPOCHS passes over the whole sequences in a range of scored targets."""
        seq_len, batch_seqs = min(self.config.eval_seq_len, len(self.bytes)), self.config.ttt_batch_seqs
        starts = np.arange(targets.start, targets.stop - seq_len + 1, seq_len)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for _ in range(self.config.ttt_epochs):
            for first in range(0, len(starts), batch_seqs):
                self._step(scorer, starts[first : first + batch_seqs], seq_len)

    def _step(self, scorer: WindowScorer, starts: np.ndarray, seq_len: int) -> None:
        self.grads.zero_()
        weights = self.bytes[torch.from_numpy(starts)[:, None] + torch.arange(seq_len)]
        if not self.config.ttt_byte_weighted:
            weights = torch.ones_like(weights)
        share = self.runtime.share(len(starts))
        if len(share):
            ids, targets = scorer.sequences(starts[share.start : share.stop], seq_len)
            logits = self.model.logits(ids).flatten(0, 1)
            nll = F.cross_entropy(logits, targets.flatten(), reduction="none")
            ((nll * weights[share.start : share.stop].flatten()).sum() / weights.sum().clamp_min(1)).backward()
        self.runtime.all_reduce_sum(self.grads)
        self._zero_frozen_slices()
        if self.config.ttt_grad_clip > 0:
            self.grads.mul_((self.config.ttt_grad_clip / (self.grads.norm() + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        if self.polyak:
            torch._foreach_lerp_(self.polyak, self.trained, 1 - self.config.polyak_decay)

    def state(self) -> dict[str, Any]:
        """What training has changed so far."""
        weights = dict(trained=dict(enumerate(self.trained)), polyak=dict(enumerate(self.polyak)))
        return weights | {"optimizer": self.optimizer.state_dict()["state"]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for kind, targets in (("trained", self.trained), ("polyak", self.polyak)):
            for index, target in enumerate(targets):
                target.copy_(state[kind][str(index)])
        load_optimizer(self.optimizer, state.get("optimizer", {}))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model holds the Polyak average, if there is one."""
        if not self.polyak:
            yield
            return
        current = [p.clone() for p in self.trained]
        torch._foreach_copy_(self.trained, self.polyak)
        try:
            yield
        finally:
            torch._foreach_copy_(self.trained, current)


def score_then_adapt(
    model: GPT, config: Config, runtime: Runtime, validation: ValidationSet, progress: Progress | None = None
) -> TokenScores:
    """Legal TTT: score a chunk, then train on it; the last chunk is never trained on. Leaves the model as it was."""
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    windows = plan_windows(validation.num_targets, config.eval_seq_len, config.eval_stride, config.ttt_chunk_tokens)
    scorer = WindowScorer(model, config, runtime, validation.tokens)
    scorer.temperature = config.ttt_temperature
    window_ends = np.cumsum(windows.tails)
    chunk_starts = range(0, validation.num_targets, config.ttt_chunk_tokens)
    try:
        trainer = TestTimeTrainer(model, config, runtime, validation)
        progress = progress or Progress()
        scores = progress.resume(scorer, trainer)
        for chunk in range(progress.pieces, len(chunk_starts)):
            start = chunk_starts[chunk]
            stop = min(start + config.ttt_chunk_tokens, validation.num_targets)
            first, last = np.searchsorted(window_ends, (start, stop), side="right")
            with trainer.averaged():
                scores.append(scorer.score_all(windows, int(first), int(last)))
            if stop < validation.num_targets:
                trainer.train_on(scorer, range(start, stop), trainer.learning_rate(chunk, len(chunk_starts)))
            progress.advance(scores, scorer, trainer)
    finally:
        model.load_state_dict(saved)
        for parameter, requires_grad, grad in gradients:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
    return scorer.finish(*(np.concatenate(column) for column in zip(*scores)))


# ----------------------------------------------------------------------------------------------------------
# 10. Counts: sort packed (context, token, position) and read off ranks. No table, no collision.
# ----------------------------------------------------------------------------------------------------------

Array = Any  # here a NumPy array, or a torch tensor on any device
HASH_MULTIPLIERS = (36313, 27191, 51647, 81929, 131071, 174763, 233017)  # PR 1094


class NgramCounts(NamedTuple):
    """What earlier blocks say about each target under one n-gram order; (N,) int32 each."""

    context_count: Array  # C, occurrences of the target's context
    target_count: Array  # F, those of them that the target followed
    distinct: Array  # T, different tokens that followed; None for hashed counts


def _module(array: Array) -> Any:
    return torch if isinstance(array, torch.Tensor) else np


def _host(array: Array) -> np.ndarray:
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else array


def _arange(length: int, like: Array) -> Array:
    if isinstance(like, torch.Tensor):
        return torch.arange(length, dtype=torch.int32, device=like.device)
    return np.arange(length, dtype=np.int32)


def _wide(array: Array) -> Array:
    return _module(array).asarray(array, dtype=_module(array).int64)


def _cumsum(values: Array) -> Array:
    return _module(values).cumsum(values, 0, dtype=_module(values).int32)


def _scatter(values: Array, position: Array, length: int) -> Array:
    placed = _arange(length, values) * 0
    placed[position] = _module(values).asarray(values, dtype=placed.dtype)
    return placed


def _heads(values: Array) -> Array:
    """True where a run of equal values starts."""
    head = values == values  # all true
    head[1:] = values[1:] != values[:-1]
    return head


def _sort_runs(values: Array, head: Array | None) -> Array:
    """Sort int64 values; runs that start at `head`, if given, are in order among themselves already."""
    if isinstance(values, torch.Tensor):
        return torch.sort(values).values
    starts = np.zeros(1, np.int64) if head is None else np.flatnonzero(head)
    # NumPy sorts a piece that fits the cache three times as fast: cut at about every 8,192nd value.
    cuts = np.unique(starts[np.searchsorted(starts, np.arange(0, len(values), 8192), side="right") - 1])
    for start, stop in itertools.pairwise([*cuts, len(values)]):
        values[start:stop].sort()
    return values


class _Groups(NamedTuple):
    """Positions (M,) sorted by (group, position), and True where a group starts."""

    position: Array
    head: Array
    packed: Array  # group << bits | position
    bits: int

    @classmethod
    def sort(cls, group: Array, position: Array, length: int, head: Array | None = None) -> _Groups:
        """Sort positions < length by (group, position), overwriting `group`; `head` as in `_sort_runs`."""
        bits = length.bit_length()
        if bits > 31 or (len(group) and int(group.max()).bit_length() + bits > 63):
            raise ValueError(f"{length} tokens of this vocabulary overflow 63-bit keys: count fewer at once")
        group <<= bits
        group |= position  # values alone get sorted, positions travel in the low bits
        packed = _sort_runs(group, head)
        position = _module(packed).asarray(packed & ((1 << bits) - 1), dtype=position.dtype)
        return cls(position, _heads(packed >> bits), packed, bits)

    def earlier(self, block_of: Array | None, weight: Array | None, length: int) -> list[Array]:
        """Per position, how many of its group lie in earlier blocks, and their `weight` (N,) where given.

        `block_of` (N,) ascends; None stands for blocks of one token.
        """
        index = _arange(len(self.head), self.head)

        def run_start(head: Array) -> Array:
            return index[head][_cumsum(head) - 1]

        first = run_start(self.head)
        own = index if block_of is None else run_start(self.head | _heads(block_of[self.position]))
        counts = [_scatter(own - first, self.position, length)]
        if weight is not None:
            weight = weight[self.position]
            total = _cumsum(weight) - weight
            counts.append(_scatter(total[own] - total[first], self.position, length))
        return counts

    def lookup(self, group: Array, before: Array, weight: Array) -> Array:
        """Summed weight (N,) that any `group` holds at positions below `before`."""
        limits = ((group << self.bits) | x for x in (before * 0, before))
        start, end = (_module(group).searchsorted(self.packed, limit) for limit in limits)
        total = _arange(len(self.packed) + 1, weight) * 0
        total[1:] = _cumsum(weight[self.position])
        return total[end] - total[start]


def causal_ngram_counts(tokens: Array, max_order: int, block: int = 1) -> list[NgramCounts]:
    """All orders of `iter_ngram_counts` at once, which holds 12 bytes per token and order."""
    return list(iter_ngram_counts(tokens, max_order, block))


def iter_ngram_counts(
    tokens: Array, max_order: int, block: int = 1, probe: MassProbe | None = None
) -> Iterator[NgramCounts]:
    """Yield exact C, F and T of orders 1..max_order for every target tokens[i].

    The context is the order-1 tokens before i. Only targets j with j//block < i//block count: block 1
    means every j < i. Targets with too few predecessors get zeros. Tokens are non-negative integers (in a
    tensor, int32 or int64). Raises ValueError where (context, token, position) exceeds 63 bits.
    """
    position = _arange(len(tokens), tokens)
    contexts = _Groups(position, position == 0, None, 0)
    for _ in range(max_order):
        counts, targets = _count_order(tokens, contexts, block, probe)
        yield counts
        # A group of one (context, token) is one context of the next order; a group of one never recurs.
        recurs = ~targets.head
        recurs[:-1] |= ~targets.head[1:]
        recurs &= targets.position < len(tokens) - 1
        contexts = _Groups(targets.position[recurs] + 1, targets.head[recurs], None, 0)


def _count_order(
    tokens: Array, contexts: _Groups, block: int, probe: MassProbe | None
) -> tuple[NgramCounts, _Groups]:
    """C, F and T of the targets at contexts.position, and these grouped by (context, target)."""
    n = len(tokens)
    block_of = None if block == 1 else _arange(n, tokens) // block
    token_bits = max(int(tokens.max()), probe.vocab_size - 1 if probe else 0).bit_length() if n else 0
    context = _cumsum(contexts.head) - 1
    group = _wide(context) << token_bits
    group |= tokens[contexts.position]
    targets = _Groups.sort(group, contexts.position, n, contexts.head)
    is_new = _scatter(targets.head, targets.position, n)
    (target_count,) = targets.earlier(block_of, None, n)
    context_count, distinct = contexts.earlier(block_of, is_new, n)
    counts = NgramCounts(context_count, target_count, distinct)
    if probe:
        at = probe.at(tokens)
        own = _wide(_scatter(context + 1, contexts.position, n)[at]) - 1  # negative where it never recurs
        every = (own << token_bits) | _arange(probe.vocab_size, tokens)
        probe.record(counts, targets.lookup(every, at // block * block, is_new * 0 + 1))
    return counts, targets._replace(packed=None)


def iter_hashed_counts(
    tokens: Array, max_order: int, buckets: int, block: int, probe: MassProbe | None = None
) -> Iterator[NgramCounts]:
    """Yield the colliding counts of PR 1094: C of context buckets, F of context+target buckets.

    Target tokens[i], i >= 1, is scored in block (i-1)//block; an n-gram counts from the next block on, and
    only if one block added all its tokens. C and F come from different hashes, so F/C is no probability.
    Raises ValueError unless `buckets` is a power of two.
    """
    if buckets & (buckets - 1):
        raise ValueError(f"buckets must be a power of two, got {buckets}")
    n, position, wide = len(tokens), _arange(len(tokens), tokens), _wide(tokens)
    block_of = (position - 1 + (position == 0)) // block
    added_from = block_of * block + (block_of > 0)  # first token that the block adds
    for order in range(1, max_order + 1):
        context, multiplier = wide * 0, HASH_MULTIPLIERS[(order - 1) % 7]
        for k in range(order - 1):
            context[order - 1 :] ^= wide[k : k + max(n - order + 1, 0)] * HASH_MULTIPLIERS[k % 7]
        counted = position * 0 + (position - (order - 1) >= added_from)
        hashes = (context & (buckets - 1), (context ^ (wide * multiplier)) & (buckets - 1))
        groups = [_Groups.sort(bucket[order - 1 :], position[order - 1 :], n) for bucket in hashes]
        counts = NgramCounts(*[group.earlier(block_of, counted, n)[1] for group in groups], distinct=None)
        if probe:
            at = probe.at(tokens)
            every = (context[at] ^ (_arange(probe.vocab_size, tokens) * multiplier)) & (buckets - 1)
            probe.record(counts, groups[1].lookup(every, added_from[at], counted))
        yield counts


# ----------------------------------------------------------------------------------------------------------
# 11. Mixers: expert probabilities of each target, and weights that only its past decides.
# ----------------------------------------------------------------------------------------------------------


class Evidence(NamedTuple):
    """Per target: the neural log-probability and entropy in nats (N,), and one row (N,) per n-gram expert.

    `expert` rows hold the target's probability; `bucket` rows depend on the context alone, never on it.
    """

    logp: np.ndarray
    entropy: np.ndarray
    expert: Any
    bucket: Any

    def part(self, span: slice) -> Evidence:
        rows = (np.stack([row[span] for row in rows]) for rows in (self.expert, self.bucket))
        return Evidence(self.logp[span], self.entropy[span], *rows)


Rows = tuple[list[np.ndarray], list[np.ndarray]]  # expert and bucket rows


class Mixer(Protocol):
    """`counts` and `experts` make the evidence; `mix` scores a block (B,), `update` then learns from it."""

    guarded: bool

    def counts(self, tokens: Array, probe: MassProbe | None) -> Iterator[NgramCounts]: ...
    def experts(self, counts: Iterable[NgramCounts]) -> Rows: ...
    def mix(self, block: Evidence) -> np.ndarray: ...
    def update(self, block: Evidence) -> None: ...


def _bin(values: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    """How many of the edges each value reaches."""
    return np.add.reduce([values >= edge for edge in edges], 0, dtype=np.uint8)


class BackoffNgramMixer:
    """The default: a chain of two-way mixtures from the neural model q_0 through order 1 to max_order.

    q_k = (1 - w) q_{k-1} + w F/C: each order takes the share it earned and leaves the rest to the lower
    ones; where C = 0, w = 0. Online EM learns w per order and bucket of C, T/C and neural entropy, all known
    before the target, so every q_k is a distribution. `guard` bounds the loss against q_0.
    """

    guarded = True
    count_edges = (1, 2, 3, 5, 10, 30, 100, 1000)
    novelty_edges = (0.03, 0.1, 0.2, 0.35, 0.6, 1.0)
    entropy_edges = (1.0, 2.0, 3.0, 4.0, 5.0)

    def __init__(self, max_order: int = 10, block: int = 1, prior: tuple[float, float] = (0.1, 1.0)) -> None:
        self.max_order, self.block = max_order, block
        self.novelty_bins = len(self.novelty_edges) + 2  # one more where T = C, one where T = 1
        contexts = (len(self.count_edges) + 1) * self.novelty_bins
        shape = (max_order, contexts, len(self.entropy_edges) + 1)
        self.reached = np.full(shape, sum(prior))  # targets that no higher order explained
        self.taken = np.full(shape, prior[0])  # those of them that this order did
        self.taken[:, : self.novelty_bins] = 0.0  # C = 0: nothing to take from

    def counts(self, tokens: Array, probe: MassProbe | None = None) -> Iterator[NgramCounts]:
        return iter_ngram_counts(tokens, self.max_order, self.block, probe)

    def experts(self, counts: Iterable[NgramCounts]) -> Rows:
        shares, buckets = [], []
        for seen, followed, distinct in counts:
            total = np.maximum(seen, 1)
            shares.append(np.divide(followed, total, dtype=np.float32))
            novelty = _bin(np.divide(distinct, total, dtype=np.float32), self.novelty_edges)
            novelty = np.where(distinct == 1, self.novelty_bins - 1, novelty)
            buckets.append((_bin(seen, self.count_edges) * self.novelty_bins + novelty).astype(np.uint8))
        return shares, buckets

    def _chain(self, block: Evidence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each order's table cell and weight (K, B), and the target's q_0..q_K (K + 1, B)."""
        orders, contexts, entropies = self.taken.shape
        cell = np.arange(orders)[:, None] * contexts + block.bucket
        cell = cell * entropies + _bin(block.entropy, self.entropy_edges)
        weight = self.taken.take(cell) / self.reached.take(cell)
        chain = np.empty((self.max_order + 1, len(block.logp)))
        chain[0] = np.exp(block.logp)
        for k in range(self.max_order):
            chain[k + 1] = chain[k] + weight[k] * (block.expert[k] - chain[k])
        return cell, weight, chain

    def mix(self, block: Evidence) -> np.ndarray:
        return np.log(self._chain(block)[2][-1])

    def update(self, block: Evidence) -> None:
        cell, weight, chain = self._chain(block)
        explained = weight * block.expert / chain[1:]  # posterior that order k made a target that reached it
        reached = np.ones_like(explained)
        reached[:-1] = np.cumprod(1 - explained[:0:-1], 0)[::-1]
        for tally, amount in ((self.reached, reached), (self.taken, reached * explained)):
            tally += np.bincount(cell.ravel(), amount.ravel(), tally.size).reshape(tally.shape)


@dataclass
class PublishedBackoffMixer:
    """PR 1094: p = (1 - a) p_neural + a F/C of the highest order, 2..max_order, with C >= min_count.

    a = alpha_base + alpha_range sigmoid(2 (H - alpha_center)). Nothing is learned; the neural model is alone
    until min_tokens were counted. `buckets` > 0 takes the published hashed counts, added every `block`
    targets: then the result is no distribution.
    """

    vocab_size: int
    max_order: int = 10
    min_count: int = 1
    alpha_base: float = 0.20
    alpha_range: float = 0.55
    alpha_center: float = 3.0
    buckets: int = 0
    block: int = 1
    min_tokens: int = 0
    guarded = False

    def counts(self, tokens: Array, probe: MassProbe | None = None) -> Iterator[NgramCounts]:
        if self.buckets:
            return iter_hashed_counts(tokens, self.max_order, self.buckets, self.block, probe)
        return iter_ngram_counts(tokens, self.max_order, self.block, probe)

    def experts(self, counts: Iterable[NgramCounts]) -> Rows:
        total, followed, _ = next(counts := iter(counts))
        expert, ready = (followed + 0.5) / (total + 0.5 * self.vocab_size), total >= self.min_tokens
        for seen, followed, _ in counts:
            share = np.minimum(followed, seen) / np.maximum(seen, 1)
            expert = np.where(seen >= max(self.min_count, 1), share, expert)
        return [expert], [ready]

    def mix(self, block: Evidence) -> np.ndarray:
        alpha = self.alpha_base + self.alpha_range / (1 + np.exp(-2 * (block.entropy - self.alpha_center)))
        alpha = alpha * block.bucket[0]
        return np.log(np.maximum((1 - alpha) * np.exp(block.logp) + alpha * block.expert[0], 1e-12))

    def update(self, block: Evidence) -> None:
        """Only the counts adapt."""


@dataclass
class HedgeMixer:
    """PR 700: five experts weighted by exp(-eta · summed block-mean loss), neural alone for min_tokens.

    Neural model (log-weight 2 at the start), unigram and bigram (+0.1), trigram on 65,536 hashed rows
    (+0.01), and as fifth the Witten-Bell interpolation of orders 1-5. With `entropy_expert` the fifth is, as
    published, the neural entropy taken for a log-loss: then the result is no distribution.
    """

    vocab_size: int
    eta: float = 0.1
    min_tokens: int = 10_000
    entropy_expert: bool = False
    log_weight: np.ndarray = field(default_factory=lambda: np.array([2.0, 0.0, 0.0, 0.0, 0.0]))
    guarded = False

    def counts(self, tokens: Array, probe: MassProbe | None = None) -> Iterator[NgramCounts]:
        wide = _wide(tokens)
        row = wide * 0
        row[1:] = 27191 * wide[:-1]
        row[2:] ^= 36313 * wide[:-2]
        rows = _Groups.sort(row & 65535, _arange(len(tokens), tokens), len(tokens))
        yield _count_order(tokens, rows, 1, probe)[0]
        yield from iter_ngram_counts(tokens, 5, probe=probe)

    def experts(self, counts: Iterable[NgramCounts]) -> Rows:
        trigram, *orders = counts
        smoothed = zip((0.1, 0.1, 0.01), (orders[0], orders[1], trigram), strict=True)
        experts = [(followed + add) / (seen + add * self.vocab_size) for add, (seen, followed, _) in smoothed]
        fifth = np.asarray(1 / self.vocab_size)
        for seen, followed, distinct in orders:
            fifth = (followed + np.maximum(distinct, seen == 0) * fifth) / np.maximum(seen + distinct, 1)
        return [*experts, fifth], [orders[0].context_count >= self.min_tokens]

    def _losses(self, block: Evidence) -> np.ndarray:
        counted = -np.log(block.expert)
        return np.stack([-block.logp, *counted[:3], block.entropy if self.entropy_expert else counted[3]])

    def mix(self, block: Evidence) -> np.ndarray:
        log_weight = self.log_weight - np.logaddexp.reduce(self.log_weight)
        mixed = np.logaddexp.reduce(log_weight[:, None] - self._losses(block), 0)
        return np.where(block.bucket[0], mixed, block.logp)

    def update(self, block: Evidence) -> None:
        if block.bucket[0].all():
            self.log_weight = self.log_weight - self.eta * self._losses(block).mean(1)


def guard(neural: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Log-odds (N,) of `learned` against `neural` at each target, from the targets before it."""
    gain = learned - neural.astype(np.float64)
    return np.concatenate([[0.0], np.cumsum(gain)])[:-1]


def blend(neural: np.ndarray, learned: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
    """Log-probability of the two-model mixture at the given odds.

    With those of `guard` it is the exact Bayesian mixture of two sequence models, prior 1/2 each: on any text
    the summed loss exceeds neither model's by more than ln 2 nats, one bit in all.
    """
    return np.logaddexp(neural - np.logaddexp(0, log_odds), learned - np.logaddexp(0, -log_odds))


def mix_stream(
    mixer: Mixer, evidence: Evidence, block: int = 2048, probe: MassProbe | None = None
) -> np.ndarray:
    """Mixed log-probability (N,) of every target; each block is scored before the mixer learns from it."""
    learned = np.empty(len(evidence.logp))
    for start in range(0, len(learned), block):
        part = evidence.part(slice(start, start + block))
        learned[start : start + block] = mixer.mix(part)
        if probe:
            probe.score(mixer, start, start + block)
        mixer.update(part)
    log_odds = guard(evidence.logp, learned) if mixer.guarded else np.full(len(learned), np.inf)
    if probe:
        probe.finish(log_odds)
    return blend(evidence.logp, learned, log_odds)


def mix_scores(
    mixer: Mixer,
    tokens: Array,
    logp: np.ndarray,
    entropy: np.ndarray,
    probe: MassProbe | None = None,
    block: int = 2048,
) -> np.ndarray:
    """Mix the neural scores (N,) of targets tokens[1:]; float64 log-probabilities (N,) in nats."""
    orders = mixer.counts(tokens, probe)
    counts = (NgramCounts(*(c if c is None else _host(c)[1:] for c in order)) for order in orders)
    return mix_stream(mixer, Evidence(logp, entropy, *mixer.experts(counts)), block, probe)


class MassProbe:
    """Counterfactual mass: every token in turn takes the place of a sampled target, and the answers add up.

    `position` (S,) ≥ 1 indexes tokens; `logp` (S, V) and `entropy` (S,) are the neural model's there. After
    `mix_scores`, `mass` (S,) is 1 for a valid mixer. No normalisation is assumed: C and T are the target's
    own, F of every token is looked up in the sorted keys, the rest is the mixer's own code.
    """

    def __init__(self, position: np.ndarray, logp: np.ndarray, entropy: np.ndarray) -> None:
        self.position, self.logp, self.entropy = position, logp, entropy
        self.vocab_size = logp.shape[1]
        self.counts: list[NgramCounts] = []
        self.learned, self.mass = np.empty(logp.shape), np.empty(len(position))

    def at(self, like: Array) -> Array:
        """`position` (S, 1) as the kind of array that `like` is."""
        position = self.position[:, None]
        return torch.as_tensor(position, device=like.device) if _module(like) is torch else position

    def record(self, counts: NgramCounts, target_count: Array) -> None:
        """Keep one order's C and T (S, 1) at the samples, with F (S, V) of every token."""
        seen, _, distinct = (c if c is None else _host(c[self.position])[:, None] for c in counts)
        self.counts.append(NgramCounts(seen, _host(target_count), distinct))

    def score(self, mixer: Mixer, start: int, stop: int) -> None:
        """Let the mixer, as it stands, score every token at the samples among targets start..stop-1."""
        for row in np.flatnonzero((self.position > start) & (self.position <= stop)):
            counts = [NgramCounts(*(c if c is None else c[row] for c in order)) for order in self.counts]
            rows = ([np.broadcast_to(r, self.vocab_size) for r in rows] for rows in mixer.experts(counts))
            entropy = self.entropy[row].repeat(self.vocab_size)
            self.learned[row] = mixer.mix(Evidence(self.logp[row], entropy, *rows).part(slice(None)))

    def finish(self, log_odds: np.ndarray) -> None:
        """Add up the probabilities, blended at the log-odds (N,) of the stream."""
        self.mass = np.exp(blend(self.logp, self.learned, log_odds[self.position - 1, None])).sum(1)


# ----------------------------------------------------------------------------------------------------------
# 12. Evaluation: the recipe's stages on one stream of scores.
# ----------------------------------------------------------------------------------------------------------
def make_mixer(config: Config) -> Mixer | None:
    """The mixer that MIXER names."""
    hashed = config.ngram_counts == "hashed"
    if config.mixer == "backoff":
        return BackoffNgramMixer(config.ngram_order)
    if config.mixer == "backoff-published":
        return PublishedBackoffMixer(
            config.vocab_size, config.ngram_order, config.ngram_min_count,
            config.alpha_base, config.alpha_range, config.alpha_center,
            buckets=config.ngram_buckets if hashed else 0, block=config.ngram_block if hashed else 1,
        )  # fmt: skip
    if config.mixer == "hedge":
        return HedgeMixer(config.vocab_size, config.mixer_eta, entropy_expert=config.entropy_expert)
    return None


def log_result(log: RunLog, name: str, result: Score, seconds: float, **extra: Any) -> None:
    """An evaluation stage's two lines: to be read, with its seconds, and exact."""
    fields = result.headline() | extra
    log.row(name, result.note, **fields, eval_time_ms=1000 * seconds)
    log.row(f"{name}_exact", result.note, **fields)


def log_mixed(mixer: Mixer, scores: TokenScores, runtime: Runtime, log: RunLog, validation: ValidationSet) -> Score:
    """Mix the stream once, on rank 0, and log the score with the mass that shows whether it is one."""
    began = time.perf_counter()
    sums = [0.0] * 3
    if runtime.is_main:
        samples = sample_targets(validation.num_targets)
        probe = MassProbe(samples + 1, scores.sampled, scores.entropy[samples])
        tokens = validation.tokens.astype(np.int64)
        on_device = torch.from_numpy(tokens).to(runtime.device) if runtime.device.type == "cuda" else tokens
        logp = mix_scores(mixer, on_device, scores.logp, scores.entropy, probe)
        sums = [float(logp.sum()), float(probe.mass.mean()), float(np.abs(probe.mass - 1).max())]
    total_logp, mass, worst = runtime.from_main(*sums)
    result = score_of(total_logp, validation, valid=worst <= MASS_TOLERANCE)
    seconds = time.perf_counter() - began
    log_result(log, "final_mixed", result, seconds, mass=mass, worst=worst, valid=result.valid)
    return result


def evaluate(
    model: GPT, config: Config, runtime: Runtime, log: RunLog, validation: ValidationSet, progress: Progress
) -> Score:
    """Every evaluation stage of the recipe, each with its seconds; returns the last one's score."""
    sizes = f"final_{model.config.bits_label}"
    arguments, stride = (model, config, runtime, validation), config.eval_stride
    stages: list[tuple[str, Callable[[], TokenScores], dict[str, Any]]] = [
        (f"{sizes}_roundtrip", lambda: score_stream(*arguments, config.eval_seq_len, progress), {}),
        (f"{sizes}_sliding_window", lambda: score_stream(*arguments, stride, progress), {"stride": stride}),
    ]
    if config.ttt_enabled:
        shown = {"epochs": config.ttt_epochs, "chunk": config.ttt_chunk_tokens}
        stages.append(("legal_ttt", lambda: score_then_adapt(*arguments, progress), shown))
    scores, result = None, None
    for index, (name, stage, extra) in enumerate(stages):
        if index == len(progress.results):
            scores = stage()
            seconds = progress.elapsed_s() - sum(before for _, before in progress.results)
            progress.results.append([float(scores.logp.sum(dtype=np.float64)), seconds])
        total_logp, seconds = progress.results[index]
        result = score_of(total_logp, validation)
        log_result(log, name, result, seconds, **extra)
    assert scores is not None
    assert result is not None
    mixer = make_mixer(config)
    if mixer is not None:
        result = log_mixed(mixer, scores, runtime, log, validation)
    log.row("evaluation", total_s=progress.elapsed_s(), budget_s=STAGE_BUDGET_S)
    return result


# ----------------------------------------------------------------------------------------------------------
# 13. Main.
# ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def seed_embeddings(model: GPT, tokenizer: Tokenizer, log: RunLog) -> Tensor:
    """Scale the embeddings of important tokens; returns the importance of every token, (V,) in [0, 1].

    The input embedding is normalised right after the lookup, so this acts through the tied output head alone.
    Raises ConfigError when the blob was made for another tokenizer, or KG_PATH cannot be read.
    """
    config = model.config
    try:
        blob = kg_data.read_blob(config.kg_path) if config.kg_path else kg_data.BLOB
        entries = kg_data.decode(tokenizer.pieces, blob)
    except (OSError, ValueError) as error:
        raise ConfigError(f"KG_ENABLED=1, but the knowledge-graph blob cannot be used: {error}") from error
    importance = torch.zeros(config.vocab_size)
    importance[list(entries)] = torch.tensor(list(entries.values()))
    model.tok_emb.weight.mul_(1 + config.kg_init_scale * importance[:, None])
    log.row("knowledge_graph", tokens=len(entries), init_scale=config.kg_init_scale, weight=config.kg_weight)
    return importance


def digest_of(*parts: Any) -> str:
    """SHA-256 over files, arrays, tensors on the CPU, and text."""
    total = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        total.update(content if isinstance(content, bytes) else content.tobytes())
    return total.hexdigest()


def train_artifact(
    config: Config, runtime: Runtime, log: RunLog, tokenizer: Tokenizer, validation: ValidationSet,
    checkpoints: Checkpoints,
) -> None:  # fmt: skip
    """Train a model, average its weights and write the artifact; from a checkpoint only what is missing of that."""
    stream = TokenStream(find_shards(config.data_path, "train"), config.vocab_size)
    loader = TokenLoader(stream, config, runtime)
    model = GPT(config, choose_attention(config.attention, runtime.device)[1])
    importance = seed_embeddings(model, tokenizer, log) if config.kg_enabled else None
    model.to(runtime.device)
    log.row("train_shards", count=len(stream.shards), tokens=len(stream))
    log.row("model", parameters=sum(p.numel() for p in model.parameters()))
    log.row("batch", tokens=config.train_batch_tokens, grad_accum_steps=loader.plan.grad_accum_steps)
    if importance is not None:
        importance = importance.to(runtime.device)
    graph = "" if importance is None else digest_of(importance.cpu().numpy())
    identity = {"tokenizer": tokenizer.digest, "knowledge_graph": graph, "train_shards": stream.identity}
    runtime.require_same("training shards (DATA_PATH) or knowledge graphs (KG_PATH)", json.dumps(identity))
    trainer = Trainer(config, runtime, log, model, loader, validation, importance, checkpoints, identity)
    state = checkpoints.find(checkpoints.training())
    if config.resume and state is None:
        log.row("resume", f"no whole checkpoint in {checkpoints.folder}: training from the beginning")
    trainer.train(state, checkpoints.newest)
    log.line(runtime.peak_memory_line())
    trainer.average.apply()
    began = time.perf_counter()
    result = summarize(score_stream(model, config, runtime, validation, config.eval_seq_len), validation)
    average = f"post_{config.weight_average}" if trainer.average.count else "last_weights"
    seconds = time.perf_counter() - began
    log.row(f"DIAGNOSTIC {average}", result.note, **result.headline(), eval_time_ms=1000 * seconds)
    write_artifact(trainer, tokenizer, checkpoints)
    loader.close()


def write_artifact(trainer: Trainer, tokenizer: Tokenizer, checkpoints: Checkpoints) -> None:
    """Calibrate, quantize and pack what was trained, unless the run that goes on here has done so already."""
    config, runtime, log = trainer.config, trainer.runtime, trainer.log
    path, record = config.artifact_path, checkpoints.folder / "artifact.txt"
    weights = [value.cpu().numpy() for value in trainer.model.state_dict().values()]
    source = digest_of(*weights, config.portable().to_json(), *code_paths())
    checkpoints.finish()
    known = record.read_bytes() if record.is_file() else b""
    own = path.is_file() and known == f"{source} {digest_of(path)}".encode() and config.resume != ""
    reused = bool(runtime.from_main(own)[0])
    hessians = calibrate(trainer) if config.quantizer == "gptq" and not reused else None
    if runtime.is_main:
        began = time.perf_counter()
        if not reused:
            save_artifact(trainer.model, tokenizer.digest, path, hessians, log)
            with contextlib.suppress(OSError):
                write_whole(record, f"{source} {digest_of(path)}".encode())
        shown: dict[str, Any] = dict(quantizer="gptq" if hessians else "lite", artifact=str(path), reused=reused)
        log.row("quantization", time_s=time.perf_counter() - began, **shown)
        log_ledger(log, path.stat().st_size, f"{config.bits_label}+{config.compressor}")
    runtime.from_main(0.0)  # nobody reads the artifact before it is whole


def run(config: Config, runtime: Runtime, log: RunLog, checkpoints: Checkpoints) -> Score:
    """The whole job: train (unless EVAL_ONLY), reload the artifact into a fresh model, score it."""
    backend, attend = choose_attention(config.attention, runtime.device)
    log.row("environment", **runtime.describe(), attention=backend)
    log.row("config", **dataclasses.asdict(config))
    everywhere = config.without(*PATH_FIELDS, "run_id", "resume")  # on another node files may lie at another place
    runtime.require_same("settings or code", everywhere.to_json() + code_digest())
    tokenizer = Tokenizer(config.tokenizer_path, config.vocab_size)
    validation = ValidationSet(config, tokenizer)
    text = digest_of(validation.tokens, validation.bytes, tokenizer.digest)
    runtime.require_same("validation shards (DATA_PATH) or tokenizers (TOKENIZER_PATH)", text)
    total_bytes = int(validation.bytes.sum(dtype=np.int64))
    log.row("validation", validation.note, targets=validation.num_targets, bytes=total_bytes)
    adaptive = config.ttt_enabled or config.mixer != "none"
    log.row("track:adaptive" if adaptive else "track:fixed_predictor")
    if not config.eval_only:
        for package in ("safetensors", "zstandard" if config.compressor == "zstd" else config.compressor):
            require(package, "writing the artifact")  # said now, not after the training
        train_artifact(config, runtime, log, tokenizer, validation, checkpoints)
    content = runtime.bytes_from_main(read_artifact(config.artifact_path) if runtime.is_main else b"")  # of its disk
    model, _, metadata = load_artifact(config.artifact_path, attend, content)
    if metadata["tokenizer"] != tokenizer.digest:
        raise ArtifactError(f"{config.artifact_path} needs another tokenizer than {config.tokenizer_path}")
    if metadata["code"] != code_digest():
        log.line(f"note: other code wrote this artifact ({metadata['code']}) than reads it ({code_digest()})")
    settings = f"{config.portable().to_json()} {runtime.world_size}"
    identity = digest_of(content, text, settings, *code_paths())
    progress = Progress(checkpoints, identity)
    result = evaluate(model.to(runtime.device), config, runtime, log, validation, progress)
    checkpoints.forget_evaluation()
    log.row("final_int8_zlib_roundtrip_exact", result.note, **result.headline(), valid=result.valid)
    return result


def main() -> int:
    """Run as the environment says; errors a user can mend end in one line and exit code 2, signals in 128 + number."""
    label = Runtime.label(os.environ)
    try:
        config = Config.from_env(os.environ)
        with contextlib.ExitStack() as stack:
            runtime = stack.enter_context(Runtime(config, os.environ))
            log = stack.enter_context(contextlib.closing(RunLog(config, runtime)))
            checkpoints = Checkpoints(config, runtime, log)
            stack.callback(checkpoints.finish)  # however the run ends, what is being written gets its time
            run(config, runtime, log, checkpoints)
    except Stopped as stop:
        return 128 + stop.args[0]
    except UserError as error:
        # What every rank finds is for rank 0 to say: its launcher then ends the others.
        time.sleep(0.0 if label in ("", "rank 0: ") else 2.0)
        sys.stderr.write(f"error: {label}{' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    exit_code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a console that takes nothing more was already reported
            stream.flush()
    os._exit(exit_code)  # gloo's threads can abort a process whose work is done while the interpreter is taken down
