"""Parameter Golf record: train an 11-layer int6 GPT for 600 s, pack it under 16 MB, score it in bits per byte.

    torchrun --nproc_per_node=8 train_gpt.py          # eight GPUs; SEED=1337, RECIPE=…, any field of Config
    python train_gpt.py                               # one GPU, or a CPU
    EVAL_ONLY=1 ARTIFACT=final_model.int6.ptz python train_gpt.py
    python train_gpt.py --help                        # recipes and settings

Importing this file starts nothing. It has ten sections: 1. Spine, which is the whole job, 2. Config, 3. Data,
4. Grid and model, 5. Optimizers, 6. Training, 7. Artifact, 8. Scoring, 9. Counts and mixers, 10. Machinery. The head
of each says what goes in and what comes out, and within it what is called stands below its caller.
"""

from __future__ import annotations

import bisect
import copy
import ctypes
import dataclasses
import datetime
import difflib
import errno
import fcntl
import hashlib
import importlib
import itertools
import json
import math
import os
import platform
import re
import resource
import signal
import sys
import textwrap
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

CODE_FILES = ("train_gpt.py", "swarm_agents.py", "kg_data.py")
CODE_DIR = Path(__file__).resolve().parent
if str(CODE_DIR) not in sys.path:  # python -I and -P leave a script's own folder out
    sys.path.insert(0, str(CODE_DIR))

import kg_data  # noqa: E402
import swarm_agents  # noqa: E402

BOS_ID = 1  # every document begins with it
SIZE_LIMIT_BYTES = 16_000_000  # code plus artifact
MASS_TOLERANCE = 1e-4  # how far the sum of a distribution may be from 1
GAP_TOLERANCE = 1e-6  # nats that an entry in it may be from the stream's score
STAGE_BUDGET_S = 600.0  # the contest's, for training and evaluation


class UserError(Exception):
    """What the user can put right; its text says what was found, what expected, and what to do."""


class ConfigError(UserError, ValueError):
    """A variable, or a combination of them, that cannot work."""


class DataError(UserError):
    """A shard, tokenizer or validation split that cannot be used."""


class ArtifactError(UserError):
    """An artifact that is missing, damaged, foreign or too large."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another run."""


class Stopped(BaseException):  # no library may take it for a failure
    """SIGTERM or SIGINT ended the run, its progress saved; the argument is the signal's number."""


def require(package: str, purpose: str) -> Any:
    """An optional package. Raises UserError: which one is missing and for what."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise UserError(f"{purpose} needs the package {name!r} ({error}): pip install {name}") from error


# 1. Spine ----
# In: the environment. Out: one score, its log, and the artifact.
def main(arguments: Sequence[str] = ()) -> int:
    """Returns the exit code: 2 after an error that a user can mend, said in one line; 128 + number after a signal."""
    replace_closed_streams()
    try:
        if [*arguments] in (["--help"], ["-h"]):
            sys.stdout.write(help_text())
            return 0
        if arguments:
            raise ConfigError(f"unknown argument {arguments[0]!r}: settings are environment variables, see --help")
        config = Config.from_env(os.environ)
        with Runtime(config, os.environ) as runtime, closing(RunLog(config, runtime)) as log:
            checkpoints = Checkpoints(config, runtime, log)
            try:
                run(config, runtime, log, checkpoints)
            except (MemoryError, RuntimeError) as error:
                problem, advice = "out of memory", "lower MICRO_BATCH_TOKENS or EVAL_/TTT_BATCH_SEQS"
                if isinstance(error, RuntimeError) and "allocate" not in str(error):  # how torch and CUDA put it
                    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                        raise
                    problem, advice = "compiling failed", "COMPILE=0 runs without"
                raise UserError(f"{problem} ({error!s:.200}); {advice}") from error
            finally:
                checkpoints.finish()  # what is being written gets its time
    except Stopped as stop:
        return 128 + stop.args[0]
    except UserError as error:
        Runtime.tell_error(" ".join(str(error).split()), os.environ)
        return 2
    return 0


def run(config: Config, runtime: Runtime, log: RunLog, checkpoints: Checkpoints) -> Score:
    """The whole job: train (unless EVAL_ONLY), reload the artifact into a fresh model, score it."""
    backend, attend = choose_attention(config.attention, runtime.device)
    log.row("environment", **runtime.describe(), attention=backend)
    everywhere = config.without(*PLACE_FIELDS, "resume")  # other nodes may have files elsewhere
    runtime.require_same("settings or code", everywhere.to_json() + code_digest())
    config = follow_machine(config, runtime, log)
    log.row("config", **asdict(config))
    tokenizer = Tokenizer(config.tokenizer_path, config.vocab_size)
    validation = ValidationSet(config, tokenizer)
    if validation.named_tokenizer is None:
        log.line(f"note: {config.data_path}/manifest.json names no tokenizer: are the shards of this one?")
    targets, total, digest = validation.num_targets, validation.total_bytes, validation.digest
    log.row("validation", "partial" * validation.partial, targets=targets, bytes=total, digest=digest[:16])
    track = "adaptive" if config.ttt_enabled or config.mixer != "none" else "fixed_predictor"
    log.row("track", head=f"track:{track}", told={"track": track})
    runtime.require_same("validation shards (DATA_PATH) or tokenizers (TOKENIZER_PATH)", digest)
    path = config.artifact_path
    if not config.eval_only:
        for package in ("safetensors", "zstandard" if config.compressor == "zstd" else config.compressor):
            require(package, "writing the artifact")  # said now, not after training
        path = train_artifact(make_trainer(config, runtime, log, tokenizer, validation, checkpoints))
    content = runtime.bytes_from_main(read_artifact(path) if runtime.is_main else b"")
    model, _, metadata = load_artifact(path, attend, content)
    if metadata["tokenizer"] != tokenizer.digest:
        raise ArtifactError(f"{path} needs another tokenizer than {config.tokenizer_path}")
    if metadata["code"] != code_digest():
        log.line(f"note: other code wrote this artifact ({metadata['code']}) than reads it ({code_digest()})")
    seed = config.sample_seed or 1 + int(digest_of(content, digest)[:12], 16)  # a restart's is the same
    config = replace(config, sample_seed=seed)
    log.row("sampled_targets", seed=seed, count=len(sample_targets(targets, seed)))
    model.compute_dtype = COMPUTE_DTYPES[config.compute_dtype]
    settings = f"{config.portable().to_json()} {config.compute_dtype} {runtime.world_size}"
    finished = FinishedStages(checkpoints, digest_of(content, digest, settings, *code_paths()))
    result = evaluate(model.to(runtime.device), config, runtime, log, validation, finished)
    finished.forget()
    log.row("final_int8_zlib_roundtrip_exact", result.note, **result.headline(), valid=result.valid)
    return result


def train_artifact(trainer: Trainer) -> Path:
    """Train, average and write the artifact; from a checkpoint only what is missing of that."""
    config, log, checkpoints = trainer.config, trainer.log, trainer.checkpoints
    named = [Path(config.resume)] if config.resume else []
    state = checkpoints.find(checkpoints.numbered()[::-1] if config.resume == "auto" else named)
    if state is not None:
        trainer.resume(state, checkpoints.newest)
    elif config.resume:
        log.row("resume", f"no whole checkpoint in {checkpoints.folder}: training from the beginning")
    trainer.train()
    line, mib = trainer.runtime.peak_memory()
    log.row("memory", head=line, told=mib)
    trainer.average.apply()
    began, result = time.perf_counter(), trainer.validation_score()
    label = f"post_{config.weight_average}" if trainer.average.count else "last_weights"
    shown = dict(**result.headline(), eval_time_ms=1000 * (time.perf_counter() - began))
    log.row("diagnostic", result.note, f"DIAGNOSTIC {label}", {"weights": label}, **shown)
    path = write_artifact(trainer)
    trainer.loader.close()
    return path


def write_artifact(trainer: Trainer) -> Path:
    """Calibrate, quantize and pack, after a restart again. Returns this run's file; ARTIFACT is the newest run's."""
    config, runtime, log = trainer.config, trainer.runtime, trainer.log
    path = trainer.checkpoints.folder / ARTIFACT_NAME
    trainer.checkpoints.finish()
    hessians = calibrate(trainer) if config.quantizer == "gptq" else None
    if runtime.is_main:
        began = time.perf_counter()
        packed = pack_artifact(trainer.model, trainer.identity["tokenizer"], hessians, log)
        try:
            write_artifact_file(path, packed)
        except ArtifactError as error:  # nothing trained is lost for a folder
            log.line(f"note: {error}")
            path = config.artifact_path
        write_artifact_file(config.artifact_path, packed)
        time_s, quantizer = time.perf_counter() - began, "gptq" if hessians else "lite"
        log.row("quantization", time_s=time_s, quantizer=quantizer, artifact=str(config.artifact_path))
        log_ledger(log, len(packed), f"{config.bits_label}+{config.compressor}")
    return path


def evaluate(
    model: GPT, config: Config, runtime: Runtime, log: RunLog, validation: ValidationSet, finished: FinishedStages
) -> Score:
    """The evaluation's stages that no earlier start finished; returns the last one's score."""
    arguments, stride = (model, config, runtime, validation), config.eval_stride
    stages = [
        ("roundtrip", lambda: score_stream(*arguments, config.eval_seq_len), {}),
        ("sliding_window", lambda: score_stream(*arguments, stride), {"stride": stride}),
    ]
    if config.ttt_enabled:
        shown = dict(rank=config.ttt_rank, chunk=config.ttt_chunk_tokens)
        stages.append(("ttt", lambda: score_then_adapt(*arguments, log), shown))
    for index, (stage, score, extra) in enumerate(stages):
        if index == len(finished.results):
            began = time.perf_counter()
            with finished.stopping_at_once():
                scores = score()
            finished.add(scores, time.perf_counter() - began)
        total_logp, seconds = finished.results[index]
        prefix = "legal_" if stage == "ttt" else f"final_{model.config.bits_label}_"
        log_result(log, prefix, stage, score_of(total_logp, validation), seconds, **extra)
        if index == 0:
            total_s = projected_seconds(config, validation.num_targets, seconds)
            note = "above what the contest allows" * (total_s > STAGE_BUDGET_S)
            log.row("evaluation_projected", note, total_s=total_s, budget_s=STAGE_BUDGET_S)
    mixer, began, result = make_mixer(config), time.perf_counter(), score_of(finished.results[-1][0], validation)
    if mixer:
        with finished.stopping_at_once():
            result = log_mixed(mixer, finished.scores, runtime, log, validation)
    total_s = sum(seconds for _, seconds in finished.results) + time.perf_counter() - began
    log.row("evaluation", total_s=total_s, budget_s=STAGE_BUDGET_S)
    return result


def projected_seconds(config: Config, num_targets: int, first_s: float) -> float:
    """Of all stages, if training on a window costs as much as scoring three, and mixing 2.5 µs a target."""
    overlap, ttt = config.eval_seq_len / config.eval_stride, config.ttt_enabled
    windows = max(config.eval_seq_len / config.ttt_chunk_tokens, 1)
    trained = 4 * windows if config.ttt_rank else overlap + 3 * config.ttt_epochs
    return first_s * (1 + overlap + ttt * trained) + 2.5e-6 * num_targets * (config.mixer != "none")


def log_result(log: RunLog, prefix: str, stage: str, result: Score, seconds: float, **extra: Any) -> None:
    """A stage's two lines: rounded, with its seconds, and exact."""
    fields, told = result.headline() | extra, {"stage": stage}
    log.row(prefix + stage, result.note, told=told, **fields, eval_time_ms=1000 * seconds)
    log.row(f"{prefix}{stage}_exact", result.note, told=told, **fields)


# 2. Config ----
# In: environment variables. Out: one frozen object, checked before anything starts: of each setting the variable's
# value, else the recipe's, else what lies in DATA_PATH, else the default below.


def number(default: float, meaning: str, low: float = 0, high: float = 10**9) -> Any:
    return setting(default, meaning, f"a value from {low:g} to {high:g}", lambda value: low <= value <= high)


def choice(default: Any, meaning: str, *choices: Any) -> Any:
    return setting(default, meaning, f"one of {', '.join(map(str, choices))}", choices.__contains__)


def setting(default: Any, meaning: str, allowed: str = "", fits: Callable[[Any], bool] = lambda _: True) -> Any:
    """A field of Config; `allowed` says which values fit, "": all of its type."""
    return field(default=default, metadata=dict(meaning=meaning, allowed=allowed, fits=fits))


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings; `matrix_lr` is the variable MATRIX_LR."""

    recipe: str = setting("swarm", "sets what has no variable of its own", "a recipe's name")
    seed: int = number(1337, "of weights, order, TTT's adapters", 0, 2**63 - 1)
    run_id: str = setting("", "of logs and checkpoints; empty: made of the settings")
    out_dir: str = setting(".", "of the artifact, checkpoints/ and logs/")
    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "*_train_*.bin and *_val_*.bin")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model")
    device: str = choice("auto", "auto: a GPU if there is one", "auto", "cpu", "cuda")
    attention: str = choice("auto", "auto: the fastest there is", "auto", "fa3", "cudnn", "sdpa", "blocks")
    compile: bool | None = setting(None, "auto: on CUDA only")
    compute_dtype: str = choice("auto", "of matrix products; auto: bf16 where faster", "auto", "bf16", "fp32")
    join_seconds: float = number(900.0, "how long ranks wait for each other", 1)
    checkpoint_seconds: float = number(120.0, "between checkpoints; 0: at signals and validations")
    checkpoint_keep: int = number(2, "newest ones that stay on disk", 1)
    resume: str = setting("", "auto: the newest whole checkpoint, if any; or a path")
    eval_only: bool = setting(False, "score ARTIFACT without training")
    artifact: str = setting("", "its path; empty: final_model.int6.ptz in OUT_DIR")

    vocab_size: int = number(1024, "pieces of the tokenizer", 2, 65_535)
    num_layers: int = number(11, "blocks", 1, 64)
    model_dim: int = number(512, "width of the residual stream", 8, 8192)
    num_heads: int = number(8, "query heads", 1)
    num_kv_heads: int = number(4, "key and value heads", 1)
    mlp_mult: float = number(3.0, "width of the MLP / MODEL_DIM", 0.125, 16)
    leaky_slope: float = number(0.75, "of the squared leaky ReLU", 0, 1)
    tie_embeddings: bool = setting(True, "one matrix for embedding and output head")
    tied_embed_init_std: float = number(0.005, "of the first token embedding", 1e-6, 1)
    logit_softcap: float = number(30.0, "c in c·tanh(logit / c)", 1, 1000)
    qk_gain_init: float = number(1.5, "first gain of a head's queries", 0.01, 100)
    bigram_vocab_size: int = number(2048, "buckets of hashed token pairs", 2, 2**24)
    bigram_dim: int = number(128, "width of their table", 1, 4096)
    bigram_start_bucket: bool = setting(True, "position 0 has its own; else token 0 precedes it")
    zero_init_out: bool = setting(True, "output and down projections start at 0, else small")
    smear_bos_mask: bool = setting(True, "SmearGate stops at a document's start")
    parallel_residual_from: int = number(64, "from this layer on attention and MLP read one input")
    repeat_layers: tuple[int, ...] = setting((), "neighbouring layers that are run twice")
    repeat_from: float = number(0.4, "share of the training before that", 0, 0.99)
    xsa_last_n: int = number(4, "last layers with exclusive self-attention (XSA)")
    rope_dims: int = number(16, "rotated dimensions of a head; 0: all")
    rope_base: float = number(10_000.0, "of the rotary angles", 10, 1e8)
    rope_train_len: int = number(1024, "longer sequences rescale it (NTK); 0: never")
    ln_scale: bool = setting(True, "divides norms of layer i by √(i + 1)")
    ve_dim: int = number(128, "width of value embeddings", 1, 4096)
    ve_layers: tuple[int, ...] = setting((9, 10), "layers that have them")
    mtp_num_heads: int = number(0, "heads that predict further ahead in training", 0, 8)
    mtp_loss_weight: float = number(0.1, "of their mean loss", 0, 1)

    train_batch_tokens: int = number(786_432, "of one step, over all ranks", 1)
    micro_batch_tokens: int = number(0, "of a rank's forward pass; 0: what memory allows")
    shuffle: bool = setting(True, "sequences in random order; 0: front to back")
    train_seq_len: int = number(2048, "tokens of a training sequence", 2, 2**20)
    iterations: int = number(20_000, "steps", 1)
    max_wallclock_seconds: float = number(600.0, "cap of training and calibration; 0: none")
    warmup_steps: int = number(20, "that compile and are then undone")
    warmdown_iters: int = number(3700, "last steps, in which the LR scale falls")
    min_lr: float = number(0.0, "LR scale at the end", 0, 1)
    matrix_lr: float = number(0.027, "of the banks (Muon)")
    tied_embed_lr: float = number(0.035, "of the tied token embedding and the tables")
    embed_lr: float = number(0.6, "of an untied token embedding")
    head_lr: float = number(0.008, "of MTP heads and an untied output head")
    scalar_lr: float = number(0.025, "of gains, scales and small projections")
    muon_momentum: float = number(0.99, "of Muon", 0, 0.9999)
    muon_momentum_warmup_start: float = number(0.92, "its first value", 0, 0.9999)
    muon_momentum_warmup_steps: int = number(1500, "steps until it is MUON_MOMENTUM")
    muon_steps: int = number(5, "Newton–Schulz iterations", 1, 20)
    muon_eq_rows: bool = setting(False, "normalises rows before them (MuonEq-R)")
    muon_wd: float = number(0.04, "weight decay of Muon", 0, 1)
    adam_wd: float = number(0.04, "weight decay of AdamW", 0, 1)
    beta1: float = number(0.9, "of AdamW", 0, 0.9999)
    beta2: float = number(0.95, "of AdamW", 0, 0.999999)
    adam_eps: float = number(1e-8, "of AdamW", 1e-20, 1)
    grad_clip_norm: float = number(0.3, "largest gradient norm; 0: any")
    swarm_enabled: bool = setting(False, "agents vote on QAT, clipping, KG and MTP weight")
    swarm_every: int = number(800, "steps between votes", 1)
    kg_enabled: bool = setting(False, "use the knowledge-graph blob")
    kg_init_scale: float = number(0.1, "tok_emb[id] *= 1 + KG_INIT_SCALE · importance", 0, 10)
    kg_weight: float = number(0.3, "loss weights 1 + KG_WEIGHT · importance, at mean 1", 0, 1)
    kg_path: str = setting("", "of the blob; empty: the one in kg_data.py")
    weight_average: str = choice("ema", "of the artifact's weights", "ema", "swa", "none")
    ema_decay: float = number(0.997, "of the EMA, less in the first steps", 0, 0.999999)
    swa_every: int = number(50, "steps between SWA's snapshots", 1)
    swa_start_scale: float = number(0.5, "LR scale below which they begin", 0, 1)
    qat_bits: int = choice(6, "of the banks; 0: no QAT, 6 in the artifact", 0, 5, 6, 7, 8)
    attn_bits: int = choice(0, "of the attention banks; 0: as QAT_BITS says", 0, 5, 6, 7, 8)
    mlp_bits: int = choice(0, "of the MLP banks; 0: as QAT_BITS says", 0, 5, 6, 7, 8)
    embed_bits: int = choice(8, "of embeddings, output head and large tables; 16: fp16", 5, 6, 7, 8, 16)
    crown_q_lambda: float = number(0.0, "of the CROWN-Q penalty while QAT is on")
    late_qat_threshold: float = number(0.15, "LR scale below which QAT begins, above MIN_LR; 1: at once", 0, 1)
    val_loss_every: int = number(4000, "steps between validations; 0: at the end")
    train_log_every: int = number(500, "steps between log lines", 1)

    compressor: str = choice("zstd", "of the artifact", "zstd", "brotli")
    fit_bytes: bool = setting(True, "coarser integers where the limit is passed")
    quantizer: str = choice("lite", "gptq is calibrated on training data", "lite", "gptq")
    train_reserve_seconds: float = number(0.0, "of MAX_WALLCLOCK_SECONDS, for calibration")
    calibration_tokens: int = number(262_144, "over all ranks, after the last step's", 1)
    clip_std: float = number(0.0, "of banks, in row deviations; 0: best quantile")
    embed_clip_std: float = number(0.0, "of embeddings, output head and tables")
    prune_fraction: float = number(0.0, "of a bank's weights, the smallest, become 0", 0, 0.95)

    val_tokens: int = number(0, "first targets to score; 0: all")
    sample_seed: int = number(0, "of the targets where mass and gap are checked; 0: by artifact", 0, 2**63 - 1)
    eval_seq_len: int = number(2048, "tokens of a scoring window", 2, 2**20)
    eval_stride: int = number(64, "new targets of a sliding window", 1)
    eval_batch_seqs: int = number(32, "windows of one forward pass", 1)
    ttt_enabled: bool = setting(False, "score-first test-time training")
    ttt_rank: int = number(0, "of adapters, new in each document, by Adagrad; 0: trains the model", 0, 256)
    ttt_optimizer: str = choice("sgd", "of test-time training", "sgd", "adamw")
    ttt_lr: float = number(0.002, "its first learning rate")
    ttt_lr_ramp: float = number(1.0, "factor that it reaches over 30 % of the chunks")
    ttt_momentum: float = number(0.9, "of SGD", 0, 0.9999)
    ttt_epochs: int = number(3, "passes over a scored chunk", 1)
    ttt_chunk_tokens: int = number(32_768, "targets scored before they are trained on", 1)
    ttt_freeze_blocks: int = number(2, "first blocks that are not trained")
    ttt_scope: str = choice("all", "last: banks of unfrozen blocks, all gains, no tables", "all", "last")
    ttt_batch_seqs: int = number(32, "sequences of one update", 1)
    ttt_grad_clip: float = number(1.0, "largest gradient norm; 0: any")
    ttt_byte_weighted: bool = setting(False, "targets weigh as their bytes")
    ttt_temperature: float = number(1.0, "of a certain prediction; 1: none", 0.9, 1.05)
    polyak_decay: float = number(0.0, "of the average that scores; 0: none", 0, 0.999999)
    mixer: str = choice("none", "of the scores with n-gram counts", "none", "backoff", "backoff-published", "hedge")
    mixer_eta: float = number(0.1, "learning rate of hedge's weights")
    ngram_order: int = number(10, "longest n-gram", 2, 20)
    ngram_counts: str = choice("exact", "hashed: as published, INVALID", "exact", "hashed")
    ngram_buckets: int = number(4_194_304, "of hashed counts", 1, 2**32)
    ngram_block: int = number(8192, "targets that they take in at once", 1)
    ngram_min_count: int = number(1, "of a context, for the published rule", 1)
    alpha_base: float = number(0.20, "least share of n-grams in the published rule", 0, 1)
    alpha_range: float = number(0.55, "what a high neural entropy adds to it", 0, 1)
    alpha_center: float = number(3.0, "entropy in nats at which it adds half")
    entropy_expert: bool = setting(False, "hedge's fifth as published, no distribution")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """Raises ConfigError: the variable, its value, what is allowed."""
        fields = {each.name.upper(): each for each in dataclasses.fields(cls)}
        reject_typos(environ, set(fields))
        recipe = environ.get("RECIPE", cls.recipe)
        if recipe not in RECIPES:
            raise ConfigError(f"RECIPE={recipe!r} is none of {', '.join(RECIPES)}")
        given = {each.name: parse(name, environ[name], each.type) for name, each in fields.items() if name in environ}
        values = RECIPES[recipe] | given
        return cls(**prepared_with(values.get("data_path", cls.data_path)) | values).validate()

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Raises ConfigError."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the stored config is no JSON: {error}") from None
        kinds = {each.name: each.type for each in dataclasses.fields(cls)}
        odd = set(kinds).symmetric_difference(values) if isinstance(values, dict) else {type(values).__name__}
        if odd:
            raise ConfigError(f"the stored config has other fields than this version: {sorted(odd)}")
        return cls(**{name: parse(name.upper(), as_variable(values[name]), kinds[name]) for name in kinds}).validate()

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def validate(self) -> Config:
        """Returns self. Raises ConfigError for a value out of its range or at odds with another."""
        for each in dataclasses.fields(self):
            self._expect(each.metadata["fits"](getattr(self, each.name)), each.name, allowed_text(each))
        layers, width, seq_len, ttt = self.num_layers, self.head_dim, self.train_seq_len, self.ttt_enabled
        cap, reserve, embedded = self.max_wallclock_seconds, self.train_reserve_seconds, self.ve_layers
        exact, stack, rotated = self.ngram_counts == "exact", [*range(layers)], self.rope_dims or width
        again, whole = self.repeat_layers, ttt and not self.ttt_rank
        rules = (
            (self.model_dim % self.num_heads == 0, "model_dim", "a multiple of NUM_HEADS"),
            (width % 2 == 0, "num_heads", "heads of an even width (MODEL_DIM / NUM_HEADS)"),
            (self.num_heads % self.num_kv_heads == 0, "num_kv_heads", "a divisor of NUM_HEADS"),
            (self.mlp_mult * self.model_dim % 1 == 0, "mlp_mult", "a whole product with MODEL_DIM"),
            (rotated in range(4, width + 1, 2), "rope_dims", f"0 (all) or an even number from 4 to {width}"),
            (self.xsa_last_n <= layers, "xsa_last_n", "at most NUM_LAYERS"),
            (len({*stack} & {*embedded}) == len(embedded), "ve_layers", f"different layers from 0 to {layers - 1}"),
            ([*again] == stack[again[0] :][: len(again)] if again else True, "repeat_layers", "neighbours"),
            (self.eval_stride <= self.eval_seq_len, "eval_stride", "at most EVAL_SEQ_LEN"),
            # A shorter chunk would be trained on before all of it is scored.
            (not whole or self.ttt_chunk_tokens >= self.eval_seq_len, "ttt_chunk_tokens", "at least EVAL_SEQ_LEN"),
            (self.alpha_base + self.alpha_range <= 1, "alpha_range", "at most 1 - ALPHA_BASE"),
            (self.ngram_buckets & (self.ngram_buckets - 1) == 0, "ngram_buckets", "a power of two"),
            (not cap or reserve < cap, "train_reserve_seconds", "less than MAX_WALLCLOCK_SECONDS"),
            (not cap or reserve or self.quantizer == "lite", "train_reserve_seconds", "above 0 with this QUANTIZER"),
            (not ttt or self.ttt_freeze_blocks <= layers, "ttt_freeze_blocks", "at most NUM_LAYERS"),
            (self.mtp_num_heads < seq_len, "mtp_num_heads", "less than TRAIN_SEQ_LEN"),
            (self.train_batch_tokens % seq_len == 0, "train_batch_tokens", "a multiple of TRAIN_SEQ_LEN"),
            (exact or self.mixer in ("none", "backoff-published"), "ngram_counts", "exact with this MIXER"),
            (self.run_id not in (".", "..") and not set(self.run_id) & set("/\\\0"), "run_id", "a file's name"),
        )
        for rule in rules:
            self._expect(*rule)
        return self

    def _expect(self, fits: object, name: str, allowed: str) -> None:
        """Raises ConfigError unless it fits; variables that `allowed` names are shown with their values."""
        if not fits:
            with_values = re.sub("[A-Z_]{5,}", lambda match: f"{match[0]}={getattr(self, match[0].lower())}", allowed)
            raise ConfigError(f"{name.upper()}={getattr(self, name)!s:.80} cannot be used: expected {with_values}")

    def without(self, *names: str) -> Config:
        """This config with the named fields' defaults."""
        return replace(self, **{name: getattr(Config, name) for name in names})

    def portable(self) -> Config:
        """The config in an artifact."""
        return self.without(*PLACE_FIELDS, *PROCESS_FIELDS, "compute_dtype", "micro_batch_tokens", "mtp_num_heads")

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
        """In the artifact."""
        attention, mlp = (bits or self.qat_bits or 6 for bits in (self.attn_bits, self.mlp_bits))
        return dict(mlp_up_bank=mlp, mlp_down_bank=mlp, qo_bank=attention, kv_bank=attention)

    @property
    def coarseness(self) -> dict[str, Any]:
        """How coarse the artifact is."""
        return {name: getattr(self, name) for name in ("clip_std", "embed_clip_std", "prune_fraction")}

    @property
    def bits_label(self) -> str:
        """`int6`, or `int5_6` where attention and MLP differ."""
        return "int" + "_".join(map(str, sorted(set(self.bank_bits.values()))))

    @property
    def artifact_path(self) -> Path:
        return Path(self.artifact or os.path.join(self.out_dir, ARTIFACT_NAME))


PLACE_FIELDS = ("data_path", "tokenizer_path", "kg_path", "out_dir", "artifact", "run_id")
PROCESS_FIELDS = ("checkpoint_seconds", "checkpoint_keep", "resume", "join_seconds")
# Fields that begin like this may differ in a resumed run.
NOT_TRAINING = (
    *PROCESS_FIELDS, *PLACE_FIELDS, "device", "attention", "compile", "compute_dtype", "warmup_steps",
    "micro_batch_tokens", "train_log_every", "val_", "eval_", "ttt_", "polyak_decay", "mixer", "ngram_", "alpha_",
    "entropy_expert", "quantizer", "calibration_tokens", "prune_fraction", "fit_bytes", "compressor", "sample_seed",
)

SMALL = dict(  # for a CPU
    bigram_dim=64, muon_momentum_warmup_steps=60, swarm_enabled=True, kg_enabled=True, ttt_enabled=True,
    ttt_chunk_tokens=8192, ttt_batch_seqs=8, eval_batch_seqs=8, mixer="backoff", ema_decay=0.95, muon_momentum=0.95,
    train_log_every=50,
)
FRONTIER = dict(  # what later public work found; QAT clips as the full-size artifact has to
    bigram_vocab_size=3072, bigram_dim=112, min_lr=0.05, muon_eq_rows=True, quantizer="gptq", clip_std=5.0,
    eval_stride=256, ttt_enabled=True, ttt_rank=64, ttt_lr=0.001, ttt_chunk_tokens=256, mixer="backoff",
)

# What a recipe sets beyond the defaults above.
RECIPES: dict[str, dict[str, Any]] = {
    "swarm": dict(mtp_num_heads=2, swarm_enabled=True, kg_enabled=True, ttt_enabled=True, mixer="backoff"),  # 1081
    "backoff": dict(mtp_num_heads=2, mixer="backoff-published", ngram_counts="hashed"),  # pull request 1094
    "leaky": dict(ttt_enabled=True),  # 977
    "hedge": dict(  # 700
        num_kv_heads=8, mlp_mult=3.5, leaky_slope=0.5, bigram_vocab_size=6144, xsa_last_n=11, matrix_lr=0.025,
        warmdown_iters=3500, qat_bits=5, late_qat_threshold=0.5, crown_q_lambda=0.01, quantizer="gptq",
        prune_fraction=0.03, train_reserve_seconds=18.0, ttt_enabled=True, ttt_optimizer="adamw", ttt_lr=1e-4,
        ttt_lr_ramp=3.0, ttt_epochs=4, ttt_chunk_tokens=131_072, ttt_freeze_blocks=9, ttt_scope="last",
        polyak_decay=0.998, ttt_byte_weighted=True, ttt_temperature=0.98, mixer="hedge",
    ),
    "smear": dict(  # 150
        leaky_slope=0.0, bigram_start_bucket=False, zero_init_out=False, xsa_last_n=0, rope_dims=0, rope_base=50_000.0,
        rope_train_len=0, ln_scale=False, ve_layers=(), matrix_lr=0.025, warmdown_iters=3000, late_qat_threshold=1.0,
        weight_average="swa", embed_bits=16, ttt_enabled=True,
    ),
    "frontier": FRONTIER | dict(
        repeat_layers=(4, 5), xsa_last_n=11, muon_momentum=0.97, ema_decay=0.9965, train_reserve_seconds=8.0,
    ),
    "laptop": SMALL | FRONTIER | dict(
        num_layers=6, model_dim=256, num_heads=4, num_kv_heads=2, xsa_last_n=6, ve_dim=64, ve_layers=(4, 5),
        train_seq_len=512, train_batch_tokens=4096, warmdown_iters=400, train_reserve_seconds=10.0,
        calibration_tokens=16_384, val_loss_every=0, swarm_every=80, val_tokens=262_144,
        eval_seq_len=512, ttt_chunk_tokens=128,
    ),
    "demo": dict(
        **SMALL, data_path="./runs/demo/data", out_dir="./runs/demo", num_layers=3, model_dim=128, num_heads=2,
        num_kv_heads=1, ve_layers=(2,), ve_dim=32, xsa_last_n=1, rope_train_len=256, mtp_num_heads=1,
        train_seq_len=256, train_batch_tokens=2048, iterations=500, warmdown_iters=250,
        max_wallclock_seconds=80.0, muon_momentum_warmup_start=0.85,
        val_loss_every=250, eval_seq_len=256, swarm_every=50, ttt_epochs=1, ttt_freeze_blocks=1,
        ttt_lr=0.01,
    ),
}


def help_text() -> str:
    lines = [*(__doc__ or "").splitlines()[:6], "", "RECIPE sets what has no variable of its own:", ""]
    for name, values in RECIPES.items():
        text = " ".join(f"{key.upper()}={as_variable(value)}" for key, value in values.items())
        lines += textwrap.wrap(f"{name:8} {text}", 116, initial_indent="  ", subsequent_indent=" " * 11)
    lines += ["", "Name and default, what it may be, what it means:", ""]
    for each in dataclasses.fields(Config):
        name = f"{each.name.upper()}={as_variable(each.default)}"
        lines.append(f"  {name}  ({allowed_text(each)})  {each.metadata['meaning']}")
    return "\n".join(lines) + "\n"


def allowed_text(each: dataclasses.Field[Any]) -> str:
    return each.metadata["allowed"] or KINDS[each.type][1]


def as_variable(value: Any) -> str:
    """A value as its environment variable would have it."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return "auto" if value is None else str(int(value)) if isinstance(value, bool) else str(value)


FLAGS = {"0": False, "false": False, "1": True, "true": True}

# Annotation of a field: how its text is read, and what it may be.
KINDS: dict[Any, tuple[Callable[[str], Any], str]] = {
    "str": (str, "text"),
    "int": (int, "a whole number"),
    "float": (float, "a finite number"),
    "bool": (lambda text: FLAGS[text.strip().lower()], "0, 1, true or false"),
    "bool | None": (lambda text: {"auto": None, **FLAGS}[text.strip().lower()], "auto, 0 or 1"),
    "tuple[int, ...]": (lambda text: tuple(map(int, filter(str.strip, text.split(",")))), "whole numbers with commas"),
}


def parse(variable: str, text: str, kind: object) -> Any:
    """Its value. Raises ConfigError where the text is none of that kind."""
    read, wanted = KINDS[kind]
    try:
        value = read(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        raise ConfigError(f"{variable}={text!r:.80} cannot be read: expected {wanted}") from None


def prepared_with(folder: str) -> dict[str, Any]:
    """Tokenizer, its size and knowledge graph where data/prepare.py put them beside the shards."""
    if not isinstance(vocab_size := read_manifest(folder).get("vocab_size"), int):
        return {}
    files = dict(tokenizer_path=f"{folder}/tokenizer.model", kg_path=f"{folder}/kg_blob.txt")
    return dict(vocab_size=vocab_size) | {name: path for name, path in files.items() if os.path.isfile(path)}


def reject_typos(environ: Mapping[str, str], known: set[str]) -> None:
    """Raises ConfigError for a variable that is nearly a field's."""
    for name in sorted(set(environ) - known - {"COMPILER", "NUM_THREADS", "SWA_ENABLED"}):  # near, and in use elsewhere
        if close := difflib.get_close_matches(name.upper(), sorted(known), n=1, cutoff=0.88):
            raise ConfigError(f"{name}={environ[name]!r} is no setting; did you mean {close[0]}? Rename or unset it")


# 3. Data ----
# In: token shards and a SentencePiece model. Out: the batches of any training step, and the validation targets with
# their bytes. All is checked before use.
MOST_TOKENS = 98_304  # more gain nothing on a GPU with 80 GB
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
MAKE_DATA = "run data/fetch_fineweb.py, or data/prepare.py on your own text"


class TokenLoader:
    """This rank's micro-batches of any step, on which alone they depend; a thread reads the next step's ahead."""

    def __init__(self, stream: TokenStream, config: Config, runtime: Runtime):
        self.stream, self.config, self.runtime = stream, config, runtime
        self.plan = BatchPlan.of(config, runtime.world_size)
        set_device = partial(torch.cuda.set_device, runtime.device) if runtime.on_cuda else None
        self.reader = ThreadPoolExecutor(1, "loader", set_device)  # pinned for a thread's device
        self.ahead = dict[int, Future[Tensor]]()  # by step, one at most

    def batch(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """(ids, targets) of each micro-batch, int64 (sequences, train_seq_len)."""
        rows = (self.ahead.get(step) or self.reader.submit(self._read, step)).result()
        self.ahead = {step + 1: self.reader.submit(self._read, step + 1)}
        rows = rows.to(self.runtime.device, non_blocking=True).to(torch.int64)
        return [(part[:, :-1], part[:, 1:]) for part in rows.chunk(self.plan.grad_accum_steps)]

    def _read(self, step: int) -> Tensor:
        """This rank's sequences, each with the token after it: uint16 (rank_seqs, train_seq_len + 1)."""
        seq_len, seqs = self.config.train_seq_len, self.plan.rank_seqs
        first = (step * self.runtime.world_size + self.runtime.rank) * seqs
        sequences: Sequence[int] = range(first, first + seqs)
        if self.config.shuffle:
            count = max((len(self.stream) - 1) // seq_len, 1)
            sequences = [shuffled(position, count, self.config.seed) for position in sequences]
        rows = np.empty((seqs, seq_len + 1), np.uint16)
        for row in np.argsort(sequences):  # in the order of the disk
            rows[row] = self.stream.read(sequences[row] * seq_len, seq_len + 1)
        tokens = torch.from_numpy(rows)
        return tokens.pin_memory() if self.runtime.on_cuda else tokens

    def batch_failed(self, step: int) -> bool:
        if step not in self.ahead:
            self.ahead = {step: self.reader.submit(self._read, step)}
        return self.ahead[step].exception() is not None

    def close(self) -> None:
        self.reader.shutdown(cancel_futures=True)


def shuffled(position: int, count: int, seed: int) -> int:
    """Which of `count` sequences stands at a position of the training order; each pass has its own.

    A Feistel network, walked until it is in range (Black and Rogaway, 2002), permutes without a table.
    """
    epoch, value = divmod(position, count)
    half = 1 << ((count - 1).bit_length() + 1) // 2
    while True:
        left, right = divmod(value, half)
        for turn in range(4):
            mixed = hashlib.blake2b(f"{seed} {epoch} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(mixed, "little") % half
        value = left * half + right
        if value < count:
            return value


class BatchPlan(NamedTuple):
    rank_seqs: int  # a rank's sequences of a global batch
    grad_accum_steps: int  # in how many equal micro-batches

    @classmethod
    def of(cls, config: Config, world_size: int) -> BatchPlan:
        """The fewest micro-batches within MICRO_BATCH_TOKENS. Raises ConfigError when ranks cannot share equally."""
        total, seq_len = config.train_batch_tokens, config.train_seq_len
        rank_seqs, left_over = divmod(total // seq_len, world_size)
        if left_over:
            fitting = max(rank_seqs, 1) * world_size * seq_len
            raise ConfigError(f"{world_size} ranks cannot share TRAIN_BATCH_TOKENS={total} equally; use {fitting}")
        largest = max(1, (config.micro_batch_tokens or MOST_TOKENS) // seq_len)
        steps = next(n for n in range(1, rank_seqs + 1) if rank_seqs % n == 0 and rank_seqs // n <= largest)
        return cls(rank_seqs, steps)


class TokenStream:
    """All shards of a split as one sequence of tokens, repeated without end."""

    CHECKED_AT_OPEN = 1_000_000  # tokens of a shard; batches are checked too

    def __init__(self, paths: Sequence[Path], vocab_size: int):
        self.paths, self.vocab_size = paths, vocab_size
        self.shards = [read_shard(path) for path in paths]
        for path, shard in zip(paths, self.shards):
            check_vocabulary(shard[: self.CHECKED_AT_OPEN], vocab_size, path)
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.identity = [shard_identity(path) for path in paths]
        self.modified_ns = [path.stat().st_mtime_ns for path in paths]
        if len(self) < 2:
            raise DataError(f"the train split in {paths[0].parent} is empty")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start … start+count-1, positions modulo the length: uint16 (count,)."""
        pieces = [np.empty(0, np.uint16)]
        while count > 0:
            start %= len(self)
            index = int(np.searchsorted(self.ends, start, side="right"))
            left = int(self.ends[index]) - start
            pieces.append(self._piece(index, len(self.shards[index]) - left, min(count, left)))
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)

    def _piece(self, index: int, offset: int, count: int) -> np.ndarray:
        """Read, not mapped: touching the map of a file that has shrunk kills the process. Raises DataError."""
        path, advice = self.paths[index], "restore it, and RESUME=auto goes on"
        try:
            same = path.stat().st_mtime_ns == self.modified_ns[index] or shard_identity(path) == self.identity[index]
            piece = np.fromfile(path, "<u2", count, offset=SHARD_HEADER_BYTES + 2 * offset)
        except OSError as error:
            raise DataError(f"cannot read the shard {path} any more: {error.strerror}; {advice}") from error
        if not same or len(piece) < count:
            raise DataError(f"{path} has changed during the run; {advice}")
        check_vocabulary(piece, self.vocab_size, path)
        return piece


def shard_identity(path: Path) -> list[Any]:
    """Name, bytes and a checksum of both ends. Raises OSError."""
    with path.open("rb") as file:
        head, size = file.read(2**16), file.seek(0, os.SEEK_END)
        file.seek(max(size - 2**16, 0))
        return [path.name, size, zlib.crc32(file.read(), zlib.crc32(head))]


class ValidationSet:
    """The validation split: tokens (N+1,) uint16 and the bytes of each of the N targets. Raises DataError."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        folder = config.data_path
        paths = find_shards(folder, "val")
        self.named_tokenizer = named = read_manifest(folder).get("tokenizer_hash")
        if named not in (None, tokenizer.digest):
            raise DataError(f"DATA_PATH={folder} needs tokenizer {named}, not {tokenizer.digest}; set TOKENIZER_PATH")
        tokens = np.concatenate([read_shard(path) for path in paths])
        check_vocabulary(tokens, config.vocab_size, folder)
        self.partial = 0 < config.val_tokens < len(tokens) - 1
        self.tokens = tokens[: config.val_tokens + 1] if self.partial else tokens
        self.bytes = tokenizer.target_bytes(self.tokens[:-1], self.tokens[1:])
        self.total_bytes = int(self.bytes.sum())
        if self.total_bytes == 0:
            raise DataError(f"the validation split in {folder} holds no text in {len(tokens)} tokens")
        self.digest = digest_of(self.tokens, self.bytes, tokenizer.digest)

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1


def read_manifest(folder: str) -> dict[str, Any]:
    """What the programs in data/ wrote of their shards; {} where they did not."""
    try:
        manifest = json.loads(Path(folder, "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


class Tokenizer:
    """How many bytes of text each token of a SentencePiece model stands for.

    Over whole documents (BOS, then tokens) they add up to the decoded text's UTF-8 size. Unknown tokens, whose text
    is lost, count nothing; what follows one is a new start.
    """

    def __init__(self, path: str, vocab_size: int, content: bytes | None = None):
        """`content`: the file's, if read already. Raises DataError, ConfigError (its size)."""
        sentencepiece = require("sentencepiece", "counting the bytes of the validation text")
        if not (content or os.path.isfile(path)):  # false for names that no system can hold
            raise DataError(f"no tokenizer at TOKENIZER_PATH={path}; {MAKE_DATA}")
        try:
            self.model = sentencepiece.SentencePieceProcessor(None if content else path, content)
            self.pieces = [self.model.id_to_piece(i) for i in range(self.model.vocab_size())]
        except (RuntimeError, OSError, ValueError) as error:  # ValueError: names that are no UTF-8
            raise DataError(f"TOKENIZER_PATH={path} is not a readable SentencePiece model") from error
        self.digest = digest_of("\n".join(self.pieces))[:16]
        if len(self.pieces) != vocab_size:
            raise ConfigError(f"TOKENIZER_PATH={path} has {len(self.pieces)} pieces, but VOCAB_SIZE={vocab_size}")
        if problem := self._make_byte_tables():
            raise DataError(f"{path}: its bytes cannot be counted: {problem}; try data/prepare.py --train-tokenizer")

    def _make_byte_tables(self) -> str:
        """Returns why they are wrong, "" where they are right."""
        model, space = self.model, self.model.piece_to_id("▁")
        bos = model.bos_id() if model.bos_id() >= 0 else model.piece_to_id("<s>")  # -1 unless of type control
        if bos != BOS_ID or model.is_unknown(bos):
            return f"its token {BOS_ID} is not BOS, which begins every document"
        if model.is_unknown(space):
            return "it has no piece ▁: a space is unknown, or three byte tokens"
        strips, self.strips_all = not model.decode([space]), not model.decode([space] * 3)  # leading: one, all
        ids = range(len(self.pieces))
        silent = [model.is_control(i) or model.is_unknown(i) or model.is_unused(i) or i == BOS_ID for i in ids]
        texts = [(piece.removeprefix("▁") if strips else piece).replace("▁", " ") for piece in self.pieces]
        sizes = [1 if model.is_byte(i) else len(texts[i].encode()) for i in ids]
        self.is_boundary = np.array(silent)
        self.base_bytes = np.where(silent, 0, sizes).astype(np.int16)
        self.has_leading_space = np.array([strips and p.startswith("▁") for p in self.pieces]) & ~self.is_boundary
        every = np.array([BOS_ID, space, *(i for i in ids if not (silent[i] or model.is_byte(i)))])
        counted = self.target_bytes(every[:-1], every[1:]).sum()
        decoded = len(model.decode(every[1:].tolist()).encode())
        return "" if counted == decoded else f"all its pieces decode to {decoded} bytes, by themselves to {counted}"

    def target_bytes(self, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """UTF-8 bytes, int16 (N,), of each target (N,) after its previous token (N,), in the order of the text.

        A leading space counts, except where a document starts and decoding strips it.
        """
        starts = self.is_boundary[previous]
        if self.strips_all:  # a space that was stripped leaves the start to the next one
            stripped = self.has_leading_space & (self.base_bytes == 0)
            for i in np.flatnonzero(stripped[previous[1:]] & self.has_leading_space[targets[1:]]).tolist():
                starts[i + 1] = starts[i]
        return self.base_bytes[targets] + (self.has_leading_space[targets] & ~starts)


def find_shards(folder: str, split: str) -> list[Path]:
    """Sorted. Raises DataError where there is none."""
    paths = sorted(Path(folder).glob(f"*_{split}_*.bin")) if os.path.isdir(folder) else []
    if not paths:
        raise DataError(f"no {split} shards (*_{split}_*.bin) in DATA_PATH={folder}; {MAKE_DATA}")
    return paths


def read_shard(path: Path) -> np.ndarray:
    """Memory-map a shard's tokens, uint16 (tokens,). Raises DataError."""
    try:
        size = path.stat().st_size
        found = np.fromfile(path, "<i4", 3).tolist()
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from error
    expected = [SHARD_MAGIC, SHARD_VERSION, (size - SHARD_HEADER_BYTES) / 2]
    if found != expected or size < SHARD_HEADER_BYTES:
        raise DataError(f"{path} is no whole shard: it begins {found}, its {size} bytes need {expected}; {MAKE_DATA}")
    return np.memmap(path, np.uint8, "r")[SHARD_HEADER_BYTES:].view("<u2")


def check_vocabulary(tokens: np.ndarray, vocab_size: int, source: object) -> None:
    """Raises DataError for a token id that has no embedding."""
    largest = int(tokens.max(initial=0))
    if largest >= vocab_size:
        raise DataError(f"{source} holds token id {largest}, but VOCAB_SIZE={vocab_size}; use its own tokenizer")


# 4. Grid and model ----
# In: token ids. Out: logits, losses, token scores. State-dict names are the earlier submissions'.
class Role(NamedTuple):
    """What is decided for one kind of parameter, in training, artifact and evaluation."""

    optimizer: str  # muon (banks) or adamw
    rate: str  # the field of Config with its learning rate
    codec: str  # bank, embedding: integers; by size: those only above 65,536 elements; absent: not in the artifact
    ttt_scopes: tuple[str, ...] = ("all",)  # values of TTT_SCOPE that train it at test time
    inputs: tuple[str, ...] = ()  # what a bank's parts are multiplied with, by the names that a probe sees


A_BANK = ("muon", "matrix_lr", "bank", ("all", "last"))
ROLES = {  # the largest bank first: gradients are reduced in this order
    "mlp_up_bank": Role(*A_BANK, ("mlp_in",)),
    "mlp_down_bank": Role(*A_BANK, ("mlp_hidden",)),
    "qo_bank": Role(*A_BANK, ("attn_in", "attn_out")),
    "kv_bank": Role(*A_BANK, ("attn_in", "attn_in")),
    "tied_embedding": Role("adamw", "tied_embed_lr", "embedding"),
    "untied_embedding": Role("adamw", "embed_lr", "embedding"),
    "output_head": Role("adamw", "head_lr", "embedding"),
    "table": Role("adamw", "tied_embed_lr", "by size"),
    "projection": Role("adamw", "scalar_lr", "by size"),
    "gain": Role("adamw", "scalar_lr", "by size", ("all", "last")),
    "mtp_head": Role("adamw", "head_lr", "absent", ()),
}
BANK_NAMES = tuple(name for name, role in ROLES.items() if role.optimizer == "muon")
PASSTHROUGH_MAX_ELEMENTS = 65_536  # smaller tensors are kept in fp16, vectors and scalars in fp32
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ATTENTION_BLOCK = 128  # queries
RMS_EPS = torch.finfo(torch.float32).eps
Rope = tuple[Tensor, Tensor]  # cos and sin, each (1, T, 1, rotated dimensions / 2)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B,T,H,Dh), k and v (B,T,Hkv,Dh) → (B,T,H,Dh), causal
Probe = Callable[[str, int, Tensor], None]  # (name of an input of matrices, layer, the input (B, T, in))


class GPT(nn.Module):
    """U-net GPT with its matrices in four banks (design: pull requests 1081, 977, 700).

    Banks are (rows of layers, out, in); `qo_bank` holds Q then output, `kv_bank` K then V. Master weights are fp32.
    """

    def __init__(self, config: Config, attend: Attention | None = None, initialize: bool = True):
        super().__init__()
        L, D, V = config.num_layers, config.model_dim, config.vocab_size
        self.config, self.attend = config, attend or blocked_attention
        self.compute_dtype = COMPUTE_DTYPES.get(config.compute_dtype)
        self.repeated = config.repeat_layers  # in training () before REPEAT_FROM
        self.adapters: dict[str, tuple[Tensor, Tensor]] = {}  # of a bank: (matrices, out, rank), (matrices, rank, in)
        self.skip_weights = nn.Parameter(torch.ones(L // 2, D))
        self.qo_bank = nn.Parameter(torch.empty(2 * L, D, D))
        self.kv_bank = nn.Parameter(torch.empty(2 * L, config.kv_dim, D))
        self.mlp_up_bank = nn.Parameter(torch.empty(L, config.mlp_dim, D))
        self.mlp_down_bank = nn.Parameter(torch.empty(L, D, config.mlp_dim))
        self.tok_emb = nn.Embedding(V, D)
        self.bigram = ProjectedTable(config.bigram_vocab_size, config.bigram_dim, D, 0.05)
        self.smear = SmearGate(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(L))
        if config.ve_layers:
            self.ve_shared = ProjectedTable(V, config.ve_dim, config.kv_dim, 0.1)
            self.ve_layer_scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in config.ve_layers)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(D, V, bias=False)
        self.mtp_heads = nn.ModuleList(nn.Linear(D, V, bias=False) for _ in range(config.mtp_num_heads))
        self.plan = export_plan(self)
        self.grids = {name: grid for name, codec in self.plan.items() if (grid := grid_of(name, codec, config))}
        if initialize:
            self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Of two factors at most one starts at zero: with both, neither would ever receive a gradient."""
        config, generator = self.config, torch.Generator().manual_seed(self.config.seed)
        mlp_down = () if config.zero_init_out else self.mlp_down_bank
        for matrix in itertools.chain(self.qo_bank, self.kv_bank, self.mlp_up_bank, mlp_down):
            nn.init.orthogonal_(matrix, generator=generator)
        for bank in (self.qo_bank[config.num_layers :], self.mlp_down_bank):
            if config.zero_init_out:
                bank.zero_()
            else:
                bank.div_(math.sqrt(2 * config.num_layers))
        self.tok_emb.weight.normal_(std=config.tied_embed_init_std, generator=generator)
        nn.init.orthogonal_(self.bigram.proj.weight, generator=generator)
        for weight in (self.bigram.embed.weight, *self.mtp_heads.parameters()):
            weight.zero_()
        if config.ve_layers:
            self.ve_shared.embed.weight.normal_(std=0.01, generator=generator)
            self.ve_shared.proj.weight.zero_()
        if not config.tie_embeddings:
            self.lm_head.weight.zero_()

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products: where COMPUTE_DTYPE is auto bf16 on CUDA, fp32 on a CPU."""
        return self.compute_dtype or (torch.bfloat16 if self.tok_emb.weight.is_cuda else torch.float32)

    def _weight(self, name: str, qat: bool) -> Tensor:
        """A matrix in the compute dtype; with QAT as the artifact would give it back."""
        weight = self.get_parameter(name)
        if qat and name in self.grids:
            weight = fake_quantize(weight, *self.grids[name])
        if name in self.adapters:
            left, right = self.adapters[name]
            weight = weight + left @ right
        return weight.to(self.dtype)

    def _layer_weights(self, qat: bool) -> list[LayerWeights]:
        """By unbind, whose backward writes a bank's gradient once (indexing's adds L full banks)."""
        L = self.config.num_layers
        up, down, qo, kv = (self._weight(name, qat).unbind() for name in BANK_NAMES)
        return [LayerWeights(*slices) for slices in zip(qo[:L], kv[:L], kv[L:], qo[L:], up, down)]

    def _rows(self, name: str, indices: Tensor, qat: bool) -> Tensor:
        """Rows of the table `bigram` or `ve_shared`, projected and scaled: indices (B, T) → (B, T, width)."""
        rows = F.embedding(indices, self._weight(f"{name}.embed.weight", qat))
        scale = self.get_parameter(f"{name}.scale").to(self.dtype)
        return F.linear(rows, self._weight(f"{name}.proj.weight", qat)) * scale

    def forward_hidden(self, ids: Tensor, qat: bool = False, probe: Probe | None = None) -> tuple[Tensor, Tensor]:
        """The trunk: ids (B, T) → normalised hidden states (B, T, D) and the output matrix (V, D)."""
        config, token_table = self.config, self._weight("tok_emb.weight", qat)
        pairs = self._rows("bigram", pair_buckets(ids, config), qat)
        x = self.smear(rms_norm(F.embedding(ids, token_table) + pairs), ids)
        x = self._run_layers(x, ids, rope_tables(config, ids.size(1), x), qat, probe)
        return x, token_table if config.tie_embeddings else self._weight("lm_head.weight", qat)

    def _run_layers(self, x: Tensor, ids: Tensor, rope: Rope, qat: bool, probe: Probe | None = None) -> Tensor:
        """All layers on x (B, T, D), and the last norm. The second half adds the first half's outputs."""
        config, x0 = self.config, x
        value_embeds: dict[int, Tensor] = {}
        if config.ve_layers:
            shared, scales = self._rows("ve_shared", ids, qat), zip(config.ve_layers, self.ve_layer_scales)
            value_embeds = {layer: shared * scale.to(x.dtype) for layer, scale in scales}
        weights, skip_weights = self._layer_weights(qat), self.skip_weights.to(x.dtype).unbind()
        skips: list[Tensor] = []
        for layer in range(config.num_layers):
            decoder_layer = layer - len(skip_weights)
            if decoder_layer >= 0 and skips:
                x = x + skip_weights[decoder_layer] * skips.pop()
            # REPEAT_LAYERS run again behind their last one, and have no skips then (pull request 1204).
            for each in (layer, *self.repeated) if layer in self.repeated[-1:] else (layer,):
                context = LayerContext(rope, value_embeds.get(each), self.attend, each, probe)
                x = self.blocks[each](x, x0, weights[each], context)
            if decoder_layer < 0:
                skips.append(x)
        return rms_norm(x)

    def _softcapped(self, hidden: Tensor, head: Tensor) -> Tensor:
        cap = self.config.logit_softcap
        return cap * torch.tanh(F.linear(hidden, head).float() / cap)

    def logits(self, ids: Tensor, qat: bool = False) -> Tensor:
        """ids (B, T) → softcapped logits (B, T, V), fp32."""
        return self._softcapped(*self.forward_hidden(ids, qat))

    def training_losses(
        self, ids: Tensor, targets: Tensor, qat: bool, token_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean main cross-entropy, the same with targets weighed by token_weights (V,), and the mean over MTP heads.

        In nats. Head k predicts k+1 further ahead.
        """
        hidden, head = self.forward_hidden(ids, qat)
        flat = targets.flatten()
        nll = F.cross_entropy(self._softcapped(hidden, head).flatten(0, 1), flat, reduction="none")
        main = nll.mean()
        weighted = main if token_weights is None else (nll * token_weights[flat]).mean()
        further = main.new_zeros(())
        for k in range(len(self.mtp_heads)):
            logits = self._softcapped(hidden[:, : -k - 1], self._weight(f"mtp_heads.{k}.weight", qat))
            further = further + F.cross_entropy(logits.flatten(0, 1), targets[:, k + 1 :].flatten())
        return main, weighted, further / max(1, len(self.mtp_heads))

    def crown_q(self) -> Tensor:
        """CROWN-Q (pull request 700): w²·δ²/12, the mean over all weights of the banks, δ = clip/qmax the row's step.

        δ is not detached: shrinking what sets it makes the row cheaper to round.
        """
        banks = [(self.get_parameter(name).float(), grid) for name, grid in self.grids.items() if name in BANK_NAMES]
        sums = [(w.square().sum(-1, keepdim=True) * (grid.clip(w) / grid.qmax).square()).sum() for w, grid in banks]
        return torch.stack(sums).sum() / (12 * sum(w.numel() for w, _ in banks))

    def token_scores(
        self, ids: Tensor, targets: Tensor, tail: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of the last `tail` targets and entropy there, (B, tail) fp32 in nats; all logp (B, tail, V).

        `temperature` is that of a certain prediction; a uniform one has 1.
        """
        hidden, head = self.forward_hidden(ids)
        logits = self._softcapped(hidden[:, -tail:], head)
        logp = F.log_softmax(logits, dim=-1)
        if temperature != 1.0:
            certainty = 1 + (logp.exp() * logp).sum(-1, keepdim=True) / math.log(self.config.vocab_size)
            logp = F.log_softmax(logits / (1 - (1 - temperature) * certainty).clamp(0.9, 1.05), dim=-1)
        chosen = logp.gather(-1, targets[:, -tail:, None])[..., 0]
        return chosen, -(logp.exp() * logp).sum(-1), logp

    def parameter_roles(self) -> dict[str, str]:
        """Each parameter's row of ROLES."""
        roles = {name: name for name in BANK_NAMES} | {"lm_head.weight": "output_head"}
        roles["tok_emb.weight"] = "tied_embedding" if self.config.tie_embeddings else "untied_embedding"
        for name in ("bigram", "ve_shared"):
            roles |= {f"{name}.embed.weight": "table", f"{name}.proj.weight": "projection"}
        roles |= {f"mtp_heads.{k}.weight": "mtp_head" for k in range(len(self.mtp_heads))}
        return {name: roles.get(name, "gain") for name, _ in self.named_parameters()}


class Block(nn.Module):
    """Attention then MLP, or both on one input (pull request 1204): normalised, with a learned gain per channel."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D = config.model_dim
        self.attn = SelfAttention(config, use_xsa=layer >= config.num_layers - config.xsa_last_n)
        self.attn_scale = nn.Parameter(torch.ones(D))
        self.mlp_scale = nn.Parameter(torch.ones(D))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(D), torch.zeros(D)]))
        self.norm_scale = 1 / math.sqrt(layer + 1) if config.ln_scale else 1.0
        self.leaky_slope, self.parallel = config.leaky_slope, layer >= config.parallel_residual_from

    def forward(self, x: Tensor, x0: Tensor, weights: LayerWeights, context: LayerContext) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        attn_in = rms_norm(x) * self.norm_scale
        x = x + self.attn_scale.to(x.dtype) * self.attn(attn_in, weights, context)
        mlp_in = attn_in if self.parallel else rms_norm(x) * self.norm_scale
        context.record("mlp_in", mlp_in)
        hidden = F.leaky_relu(F.linear(mlp_in, weights.up), self.leaky_slope).square()
        context.record("mlp_hidden", hidden)
        return x + self.mlp_scale.to(x.dtype) * F.linear(hidden, weights.down)


class SelfAttention(nn.Module):
    """One layer's attention; its matrices live in the banks."""

    def __init__(self, config: Config, use_xsa: bool):
        super().__init__()
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.head_dim, self.use_xsa = config.head_dim, use_xsa

    def forward(self, x: Tensor, weights: LayerWeights, context: LayerContext) -> Tensor:
        B, T, _ = x.shape
        context.record("attn_in", x)
        q, k, v = F.linear(x, weights.q), F.linear(x, weights.k), F.linear(x, weights.v)
        v = v if context.value_embed is None else v + context.value_embed
        q, k, v = (each.view(B, T, -1, self.head_dim) for each in (q, k, v))
        q = apply_rope(rms_norm(q), *context.rope) * self.q_gain.to(x.dtype)[:, None]
        k = apply_rope(rms_norm(k), *context.rope)
        y = context.attend(q, k, v)
        y = (remove_own_value(y, v) if self.use_xsa else y).reshape(B, T, -1)
        context.record("attn_out", y)
        return F.linear(y, weights.out)


class LayerWeights(NamedTuple):
    """One layer's slices of the banks, in the compute dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    up: Tensor
    down: Tensor


class LayerContext(NamedTuple):
    """What a layer needs besides input and weights."""

    rope: Rope
    value_embed: Tensor | None
    attend: Attention
    layer: int
    probe: Probe | None  # None leaves no trace in a compiled graph

    def record(self, name: str, x: Tensor) -> None:
        """Show the probe what a matrix will be multiplied with."""
        if self.probe is not None:
            self.probe(name, self.layer, x)


class ProjectedTable(nn.Module):
    def __init__(self, rows: int, row_dim: int, out_dim: int, scale: float):
        super().__init__()
        self.embed = nn.Embedding(rows, row_dim)
        self.proj = nn.Linear(row_dim, out_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(scale))


def pair_buckets(ids: Tensor, config: Config) -> Tensor:
    """The row of the bigram table for each (previous, current) pair of ids (B, T): a hash into all but the last.

    The last one is for position 0 alone, or position 0 takes its previous token for 0 (pull request 150).
    """
    last, narrow = config.bigram_vocab_size - 1, ids.to(torch.int32)
    mixed = torch.bitwise_xor(36313 * narrow, 27191 * F.pad(narrow[:, :-1], (1, 0))) % last
    return F.pad(mixed[:, 1:], (1, 0), value=last) if config.bigram_start_bucket else mixed


class SmearGate(nn.Module):
    """(1-g)·x[i] + g·x[i-1], a learned gate g per channel; nothing crosses a document's start."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.model_dim))
        self.bos_mask = config.smear_bos_mask

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate.to(x.dtype))
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        if self.bos_mask:
            previous = previous * (ids != BOS_ID)[..., None]
        return torch.lerp(x, previous, gate)


def rope_tables(config: Config, seq_len: int, like: Tensor) -> Rope:
    """Beyond ROPE_TRAIN_LEN the base grows (NTK-aware scaling)."""
    rotated, base = config.rope_dims or config.head_dim, config.rope_base
    if config.rope_train_len and seq_len > config.rope_train_len:
        base *= (seq_len / config.rope_train_len) ** (rotated / (rotated - 2))
    arange = partial(torch.arange, device=like.device, dtype=torch.float32)
    angles = torch.outer(arange(seq_len), base ** -(arange(0, rotated, 2) / rotated))[None, :, None]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


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


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def choose_attention(choice: str, device: torch.device) -> tuple[str, Attention]:
    """The backend's name and function, for "auto" the fastest. Raises ConfigError for one that cannot run here."""
    on_cuda, problems = device.type == "cuda", list[str]()
    hopper = on_cuda and torch.cuda.get_device_capability(device)[0] == 9
    for package in ("flash_attn_interface", "kernels"):
        if hopper and choice in ("auto", "fa3"):
            try:
                return "fa3", but_fp32(flash_attention(package))
            except (*MALFORMED, ImportError, OSError, RuntimeError) as error:  # whatever `kernels` makes of its cache
                problems.append(f"{package!r} ({error})")
    if (on_cuda and choice == "cudnn") or (hopper and choice == "auto" and torch.backends.cudnn.is_available()):
        return "cudnn", but_fp32(cudnn_attention)
    if choice == "blocks" or (choice == "auto" and not on_cuda):
        return "blocks", blocked_attention
    if choice in ("auto", "sdpa"):
        return "sdpa", sdpa_attention
    missing = f"needs the package {' or '.join(problems)}" if problems else f"cannot run on {device}"
    raise ConfigError(f"ATTENTION={choice} {missing} (fa3: on Hopper alone); use ATTENTION=auto")


def but_fp32(kernel: Attention) -> Attention:
    """SDPA has fp32, which a kernel for 16 bits lacks."""
    return lambda q, k, v: (sdpa_attention if q.dtype == torch.float32 else kernel)(q, k, v)


def flash_attention(package: str) -> Attention:
    """FlashAttention 3 of one of its packages; `kernels` may have it in its cache."""
    module = importlib.import_module(package)
    if package == "kernels":
        vars(importlib.import_module("huggingface_hub.constants"))["HF_HUB_OFFLINE"] = True  # nothing is downloaded
        module = module.get_kernel("kernels-community/flash-attn3", revision="v1")
    kernel = module.flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = kernel(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp too

    return attend


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN wants as many key heads as query heads."""
    k, v = (each.repeat_interleave(q.size(2) // each.size(2), 2) for each in (k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        return sdpa_attention(q, k, v)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A block of queries at a time against the keys up to its end: on a CPU faster than SDPA's kernel."""
    B, T, _, Dh = q.shape
    blocks: list[Tensor] = []
    q = q.view(B, T, k.size(2), -1, Dh).transpose(1, 2)
    k, v = (each.transpose(1, 2).flatten(0, 1) for each in (k, v))
    for begin in range(0, T, ATTENTION_BLOCK):
        block = q[:, :, begin : begin + ATTENTION_BLOCK]
        end = begin + block.size(2)
        mask = q.new_full((block.size(2), end), -math.inf).triu(begin + 1).repeat_interleave(block.size(3), 0)
        scores = torch.baddbmm(mask, block.reshape(len(k), -1, Dh), k[:, :end].mT, alpha=Dh**-0.5)
        blocks.append((scores.softmax(-1) @ v[:, :end]).view_as(block))
    return torch.cat(blocks, 2).transpose(1, 2).flatten(2, 3)


def export_plan(model: GPT) -> dict[str, str]:
    """How the artifact stores each tensor: `int5`…`int8`, `fp16` or `fp32`. QAT follows it."""
    config, plan = model.config, dict[str, str]()
    for name, role in model.parameter_roles().items():
        codec, weight = ROLES[role].codec, model.get_parameter(name)
        if codec == "bank":
            plan[name] = f"int{config.bank_bits[name]}"
        elif codec == "by size" and weight.numel() <= PASSTHROUGH_MAX_ELEMENTS:
            plan[name] = "fp32" if weight.ndim < 2 else "fp16"
        elif codec != "absent":
            plan[name] = "fp16" if config.embed_bits == 16 else f"int{config.embed_bits}"
    return plan


def grid_of(name: str, codec: str, config: Config) -> Grid | None:
    """None where no integers are stored."""
    clip_std = config.clip_std if name in BANK_NAMES else config.embed_clip_std
    return Grid(int(codec.removeprefix("int")), clip_std) if codec.startswith("int") else None


class Grid(NamedTuple):
    """Symmetric integers of `bits` bits with one fp16 scale for each row, which is the last axis."""

    bits: int
    clip_std: float = 0.0  # where rows are clipped, in standard deviations; 0: at their largest weight

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def clip(self, weight: Tensor) -> Tensor:
        """Where each row is clipped, (…, 1). A standard deviation is about zero, as the levels are."""
        # The clamp: at 0 the root has no gradient, and new banks have rows of zeros.
        if self.clip_std:
            return self.clip_std * weight.float().square().mean(dim=-1, keepdim=True).clamp_min(1e-30).sqrt()
        return weight.float().abs().amax(dim=-1, keepdim=True)

    def scale(self, clip: Tensor) -> Tensor:
        """fp16, above 0, for rows clipped at `clip` (…, 1), which lands on level qmax."""
        return (clip.float() / self.qmax).clamp(2.0**-24, 65_504.0).half()

    def encode(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Nearest levels (half to even), int8, same shape as `weight`; `scale` has shape (…, 1)."""
        return torch.round(weight.float() / scale.float()).clamp(-self.qmax, self.qmax).to(torch.int8)

    @staticmethod
    def decode(levels: Tensor, scale: Tensor) -> Tensor:
        return levels.float() * scale.float()

    def round_trip(self, weight: Tensor) -> Tensor:
        scale = self.scale(self.clip(weight))
        return self.decode(self.encode(weight, scale), scale)


@torch.library.custom_op("train_gpt::fake_quantize", mutates_args=())
def fake_quantize(weight: Tensor, bits: int, clip_std: float = 0.0) -> Tensor:
    """The weight as the artifact would hold it; the gradient passes straight through (arXiv 1308.3432).

    An operator, so that no compiler fuses the scale's rounding to fp16 away; w + (q - w).detach() would round too.
    """
    return Grid(bits, clip_std).round_trip(weight).to(weight.dtype)


fake_quantize.register_fake(lambda weight, *_: torch.empty_like(weight))
fake_quantize.register_autograd(lambda _, grad: (grad, None, None))


# 5. Optimizers ----
# In: gradients of this rank. Out: the same updated weights on every rank.
class Optimizers:
    """Banks under Muon, every other parameter under AdamW with one flat gradient buffer."""

    def __init__(self, model: GPT, config: Config, runtime: Runtime):
        self.config, self.runtime = config, runtime
        rest = dict(model.named_parameters())
        self.muon = Muon([rest.pop(name) for name in BANK_NAMES], config, runtime, model.dtype)
        self.flat_grad = flatten_gradients([*rest.values()])
        roles, by_rate = model.parameter_roles(), dict[str, list[nn.Parameter]]()
        for name, parameter in rest.items():
            by_rate.setdefault(ROLES[roles[name]].rate, []).append(parameter)
        groups = [dict(params=members, base_lr=getattr(config, rate)) for rate, members in by_rate.items()]
        betas = config.beta1, config.beta2
        self.adamw = torch.optim.AdamW(groups, 0.0, betas, config.adam_eps, config.adam_wd, fused=True)
        for p in rest.values():  # now, for a checkpoint to be copied into
            moments = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            self.adamw.state[p] = dict(step=p.new_zeros(()), **moments)
        self.skipped = torch.zeros(2, device=self.flat_grad.device)  # updates left out: in a row, in all

    @torch.no_grad()
    def step(self, lr_scale: float, muon_momentum: float, clip_norm: float) -> Tensor:
        """Sum gradients over ranks, clip by their global norm, update. Returns that norm (before clipping).

        The clip needs every gradient, so AdamW waits for the banks. A norm that is not finite leaves all as it is, on
        every rank, without asking the host.
        """
        shards = self.muon.shards
        split = shards if self.runtime.world_size > 1 else ()
        pending = [self.runtime.reduce_scatter(shard.own_grad, shard.grads) for shard in split]
        self.runtime.all_reduce_sum(self.flat_grad)
        for work in pending:
            work.wait()
        own = [shard.own_grad for shard in shards]
        bank_square = torch.stack([grad.square().sum() for grad in own]).sum()
        norm = (self.runtime.all_reduce_sum(bank_square) + self.flat_grad.square().sum()).sqrt()
        finite = torch.isfinite(norm)
        left_out = (~finite).float()
        self.skipped = torch.stack([(self.skipped[0] + 1) * left_out, self.skipped[1] + left_out])
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

    def state_dict(self) -> State:
        """Momentum of whole banks, moments of AdamW, updates left out. A collective."""
        momentum = {name: shard.whole_momentum(self.runtime) for name, shard in zip(BANK_NAMES, self.muon.shards)}
        return dict(muon=momentum, adamw=self.adamw.state_dict()["state"], skipped=self.skipped)


class Muon:
    """Parallel Muon (pull request 977): each rank owns 1/world_size of every bank's matrices."""

    def __init__(self, banks: Sequence[nn.Parameter], config: Config, runtime: Runtime, dtype: torch.dtype):
        self.runtime, self.config, self.dtype = runtime, config, dtype  # of the iteration's products
        self.shards = [BankShard(bank, runtime) for bank in banks]
        self.newton_schulz = compiled(newton_schulz, config, runtime)

    @torch.no_grad()
    def step(self, lr: float, momentum: float, finite: Tensor) -> None:
        """Update the owned slices; a bank is gathered while the next one is updated."""
        gathers = list[dist.Work]()
        for shard in self.shards:
            momentum_now = shard.momentum.mul(momentum).add_(shard.own_grad)
            shard.momentum = torch.where(finite, momentum_now, shard.momentum)
            nesterov = shard.own_grad.add(momentum_now, alpha=momentum)
            if self.config.muon_eq_rows:  # pull request 1217
                nesterov = F.normalize(nesterov, dim=-1)
            update = self.newton_schulz(nesterov.to(self.dtype), self.config.muon_steps).float()
            updated = (shard.own_values * (1 - lr * self.config.muon_wd)).add_(update, alpha=-lr * shard.lr_ratio)
            updated = torch.where(finite, updated, shard.own_values)
            if self.runtime.world_size > 1:
                gathers.append(self.runtime.all_gather(shard.values, updated))
            else:
                shard.own_values.copy_(updated)
        for work in gathers:
            work.wait()


class BankShard:
    """A bank and its gradient as views of buffers padded to the world size, for collectives without copies, and this
    rank's slice of both and of the momentum."""

    def __init__(self, parameter: nn.Parameter, runtime: Runtime):
        self.rows = parameter.size(0)
        per_rank = -(-self.rows // runtime.world_size)
        self.own_rows = slice(runtime.rank * per_rank, (runtime.rank + 1) * per_rank)
        self.values = parameter.new_zeros(per_rank * runtime.world_size, *parameter.shape[1:])
        self.values[: self.rows].copy_(parameter.detach())
        parameter.data = self.values[: self.rows]
        self.grads = torch.zeros_like(self.values)
        parameter.grad = self.grads[: self.rows]
        self.own_values = self.values[self.own_rows]
        self.own_grad = torch.zeros_like(self.own_values) if runtime.world_size > 1 else self.grads
        self.momentum = torch.zeros_like(self.own_values)
        self.lr_ratio = max(1.0, parameter.size(-2) / parameter.size(-1)) ** 0.5

    def whole_momentum(self, runtime: Runtime) -> Tensor:
        """All ranks' momentum, in the shape of the parameter."""
        whole = torch.zeros_like(self.values)
        whole[self.own_rows] = self.momentum
        return runtime.all_reduce_sum(whole)[: self.rows]


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Muon's quintic iteration (Keller Jordan, 2024): singular values of matrices (N, rows, cols) go towards 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(-2) > matrices.size(-1)
    X = matrices.mT if tall else matrices
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


def flatten_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One buffer of all the parameters' gradients, for a single all-reduce."""
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.zeros(sum(sizes), device=parameters[0].device)
    for parameter, part in zip(parameters, flat.split(sizes)):
        parameter.grad = part.view_as(parameter)
    return flat


def lr_scale_at(config: Config, step: int, elapsed_s: float) -> float:
    """1, then linear to MIN_LR over the last WARMDOWN_ITERS steps that iterations and, from step 5 on, time allow."""
    remaining = config.iterations - step
    if config.training_seconds and elapsed_s and step > 4:
        remaining = min(remaining, (config.training_seconds - elapsed_s) / (elapsed_s / step))
    return config.min_lr + (1 - config.min_lr) * min(1.0, max(remaining, 0.0) / max(config.warmdown_iters, 1))


def muon_momentum_at(config: Config, step: int) -> float:
    fraction = min(step / max(config.muon_momentum_warmup_steps, 1), 1.0)
    return (1 - fraction) * config.muon_momentum_warmup_start + fraction * config.muon_momentum


# 6. Training ----
# In: batches. Out: trained weights and their average.
def make_trainer(
    config: Config, runtime: Runtime, log: RunLog, tokenizer: Tokenizer, validation: ValidationSet,
    checkpoints: Checkpoints,
) -> Trainer:
    """A whole training run; logs how large it is."""
    stream = TokenStream(find_shards(config.data_path, "train"), config.vocab_size)
    loader = TokenLoader(stream, config, runtime)
    model = GPT(config, choose_attention(config.attention, runtime.device)[1]).to(runtime.device)
    importance = seed_embeddings(model, tokenizer, log) if config.kg_enabled else None
    log.row("train_shards", count=len(stream.shards), tokens=len(stream))
    log.row("model", parameters=sum(p.numel() for p in model.parameters()))
    log.row("batch", tokens=config.train_batch_tokens, grad_accum_steps=loader.plan.grad_accum_steps)
    graph = "" if importance is None else digest_of(importance.cpu().numpy())
    identity = {"tokenizer": tokenizer.digest, "knowledge_graph": graph, "train_shards": stream.identity}
    runtime.require_same("training shards (DATA_PATH) or knowledge graphs (KG_PATH)", json.dumps(identity))
    return Trainer(config, runtime, log, model, loader, validation, importance, checkpoints, identity)


@torch.no_grad()
def seed_embeddings(model: GPT, tokenizer: Tokenizer, log: RunLog) -> Tensor:
    """Scale the embeddings of important tokens; returns the importance of every token, (V,) in [0, 1].

    Lookups are normalised: this acts through the tied output head. Raises ConfigError for an odd or foreign blob.
    """
    config = model.config
    try:
        blob = kg_data.read_blob(config.kg_path) if config.kg_path else kg_data.BLOB
        entries = kg_data.decode(tokenizer.pieces, blob)
    except (OSError, ValueError) as error:
        raise ConfigError(f"KG_ENABLED=1, but the knowledge-graph blob cannot be used: {error}") from error
    importance = model.tok_emb.weight.new_tensor([entries.get(token, 0.0) for token in range(config.vocab_size)])
    model.tok_emb.weight.mul_(1 + config.kg_init_scale * importance[:, None])
    log.row("knowledge_graph", tokens=len(entries), init_scale=config.kg_init_scale, weight=config.kg_weight)
    return importance


@dataclass
class Trainer:
    """One training run: model, data, optimizers, and what changes from step to step."""

    config: Config
    runtime: Runtime
    log: RunLog
    model: GPT
    loader: TokenLoader
    validation: ValidationSet
    importance: Tensor | None = None  # (V,): 0 outside the knowledge graph
    checkpoints: Any = None  # a Checkpoints; single steps need none
    identity: dict[str, Any] = field(default_factory=dict)  # of data and tokenizer: a resumed run must have the same
    step: int = 0
    elapsed_s: float = 0.0
    saved_at_s: float = 0.0
    finished: bool = False
    loss_history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        self.optimizers = Optimizers(self.model, config, self.runtime)
        self.average = WeightAverage(self.model, config)
        self.clock = Clock(self.runtime)
        mtp_weight = config.mtp_loss_weight if config.mtp_num_heads else 0.0
        kg_weight = 0.0 if self.importance is None else config.kg_weight
        self.controls = Controls(False, kg_weight, mtp_weight, config.grad_clip_norm)
        self.swarm = swarm_agents.VotingMesh(config.swarm_every) if config.swarm_enabled else None
        self.losses = compiled(self.model.training_losses, config, self.runtime, True)
        self.crown_q = compiled(self.model.crown_q, config, self.runtime, True)
        self.train_loss = torch.zeros((), device=self.runtime.device)  # this rank's mean main cross-entropy
        self.crown_q_loss: Tensor | None = None  # CROWN_Q_LAMBDA times the penalty; None where QAT is off
        # `optimizers.skipped`, copied without waiting: on CUDA some steps old.
        self.skipped_on_host = torch.zeros(2, pin_memory=self.runtime.on_cuda)
        self.skipped_in_a_row = self.skipped_reported = 0.0  # as agreed on by all ranks

    def train(self) -> None:
        """Until ITERATIONS or the wallclock cap, validating on the way. Raises UserError, Stopped."""
        if self.finished:
            return
        self.warm_up()
        self.clock.start()
        while True:
            signalled, batch_failed = self.agree_with_ranks()
            self.set_depth()  # validation before a resumed run's first step needs it too
            capped = 0 < self.config.training_seconds <= self.elapsed_s
            last = self.step >= self.config.iterations or capped
            if last or (self.step and self.step % (self.config.val_loss_every or self.config.iterations) == 0):
                self.clock.pause()  # validation takes no training time
                self.elapsed_s = self.clock.agreed()[0]
                self.save()  # a stop in it loses nothing
                result = self.validation_score()
                self.log_step("step_validation", result.note, **result.headline(), **self._timing())
                if last:
                    break
                self.clock.start()
            checkpoint_due = 0 < self.config.checkpoint_seconds <= self.elapsed_s - self.saved_at_s
            if signalled or batch_failed or (checkpoint_due and not self.skipped_in_a_row):
                self.save()
            if signalled:
                self.checkpoints.say_stopped(signalled, step=self.step)
                self.runtime.from_main(0.0)  # a launcher ends the others when the first rank leaves
                raise Stopped(signalled)
            if batch_failed:
                self.loader.batch(self.step)  # raises where it is missing,
                self.clock.agreed()  # and here elsewhere: no GPU waits for a rank that is gone
            self.one_step()
        if capped:
            self.log.row("stopping_early: wallclock_cap", train_time_ms=1000 * self.elapsed_s, step=self.step)
        self.log.row("compilations_in_timed_window", count=self.clock.compilations)
        if self.swarm:
            self.log.line("\n".join(self.swarm.summary()))
        self.finished = True
        self.save()

    def one_step(self) -> None:
        """Train, average, vote and log when due."""
        config = self.config
        lr_scale = lr_scale_at(config, self.step, self.elapsed_s)
        if not self.controls.qat and self.qat_due(lr_scale):
            self.controls.qat = True
            self.log.row("qat_on", step=self.step, lr_scale=lr_scale, codec=config.bits_label)
        progress = self.set_depth()
        grad_norm = self.train_step(self.step, lr_scale)
        self.skipped_on_host.copy_(self.optimizers.skipped, non_blocking=True)
        self.step += 1
        self.average.update(self.step, lr_scale)
        if self.swarm and self.swarm.due(self.step):
            self.vote(self.swarm, grad_norm, lr_scale)
        self.runtime.progress(progress, f"step {self.step}, {self.elapsed_s:.0f} s")
        if self.step <= 10 or self.step % config.train_log_every == 0:
            self.elapsed_s = self.clock.agreed()[0]
            # With the votes a step's only host synchronisation.
            shown: dict[str, Any] = dict(train_loss=self.global_train_loss(), **self._timing(), lr_scale=lr_scale)
            shown |= dict(grad_norm=grad_norm.item(), **vars(self.controls)) | dict(qat=int(self.controls.qat))
            if self.crown_q_loss is not None:
                shown["crown_q"] = self.crown_q_loss.item()
            self.log_step("step", **shown)

    def set_depth(self) -> float:
        """Repeat layers from REPEAT_FROM on. Returns how much of the training is done, by steps or the clock."""
        config = self.config
        progress = max(self.step / config.iterations, self.elapsed_s / (config.training_seconds or math.inf))
        self.model.repeated = config.repeat_layers if progress >= config.repeat_from else ()
        return progress

    def train_step(self, step: int, lr_scale: float) -> Tensor:
        """Update on global batch `step`. Returns the gradient's global norm."""
        self.optimizers.zero_grad()
        batches = self.loader.batch(step)
        share = 1.0 / (len(batches) * self.runtime.world_size)
        token_weights = self.token_weights(batches)
        self.train_loss, self.crown_q_loss = torch.zeros_like(self.train_loss), None
        for ids, targets in batches:
            main, weighted, further = self.losses(ids, targets, self.controls.qat, token_weights)
            ((weighted + self.controls.mtp_weight * further) * share).backward()
            self.train_loss += main.detach() / len(batches)
            if self.step == 0 and self.clock.started_at and ids is batches[0][0]:
                self.foresee(len(batches))
        if self.controls.qat and self.config.crown_q_lambda > 0:
            penalty = self.config.crown_q_lambda * self.crown_q()
            (penalty / self.runtime.world_size).backward()
            self.crown_q_loss = penalty.detach()
        return self.optimizers.step(lr_scale, muon_momentum_at(self.config, step), self.controls.clip_norm)

    def foresee(self, micro_batches: int) -> None:
        """Say, after the run's first micro-batch, where the cap leaves next to no steps."""
        self.runtime.synchronize()
        step_s, cap_s = self.clock.now() * micro_batches, self.config.training_seconds
        if 0 < cap_s < 20 * step_s:
            note = "MAX_WALLCLOCK_SECONDS leaves hardly any; try RECIPE=laptop or RECIPE=demo"
            self.log.row("few_steps", note, expected=int(cap_s / step_s), step_s=step_s)

    def token_weights(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
        """1 + kg_weight · importance, divided by its mean over the global batch's targets; (V,) or None."""
        if self.importance is None:
            return None
        total = torch.stack([self.importance[targets].sum() for _, targets in batches]).sum()
        mean = self.runtime.all_reduce_sum(total) / self.config.train_batch_tokens
        return (1 + self.controls.kg_weight * self.importance) / (1 + self.controls.kg_weight * mean)

    def qat_due(self, lr_scale: float) -> bool:
        threshold = self.config.late_qat_threshold
        return self.config.qat_bits > 0 and (lr_scale < threshold or threshold == 1)

    def vote(self, mesh: swarm_agents.VotingMesh, grad_norm: Tensor, lr_scale: float) -> None:
        """Rank 0 votes, every rank applies the outcome."""
        config, controls = self.config, self.controls
        self.loss_history.append(self.global_train_loss())
        metrics = swarm_agents.TrainingMetrics(
            step=self.step, total_steps=config.iterations, train_loss=self.loss_history[-1],
            loss_history=tuple(self.loss_history), grad_norm=grad_norm.item(),
            elapsed_ms=1000 * self.elapsed_s, max_wallclock_ms=1000 * config.training_seconds,
            current_lr_scale=lr_scale, qat_enabled=controls.qat, kg_weight=controls.kg_weight,
            mtp_weight=controls.mtp_weight, clip_norm=controls.clip_norm, qat_available=config.qat_bits > 0,
        )
        values = vars(controls) | {decision.parameter: decision.new for decision in mesh.vote(metrics)}
        qat, *further = self.runtime.from_main(*values.values())
        self.controls = Controls(bool(qat), *further)
        self.log.line("\n".join(mesh.log_lines()))
        for row in mesh.rows():
            self.log.tell("vote", step=self.step, **row)

    def warm_up(self) -> None:
        """Compile every graph by steps with QAT off and on, then undo all that they changed."""
        config = self.config
        if not (config.warmup_steps and wants_compile(config, self.runtime)):
            return
        began, saved = time.perf_counter(), copied_to_cpu(self.state_dict())
        for step in range(config.warmup_steps):
            self.runtime.progress(step / config.warmup_steps, "warm-up")
            graphs = itertools.product({False, config.qat_bits > 0}, {(), config.repeat_layers})
            for self.controls.qat, self.model.repeated in graphs:
                self.train_step(step, lr_scale=1.0)
        self.load_state_dict(saved)
        self.log.row("warmup", steps=config.warmup_steps, time_s=time.perf_counter() - began)

    def agree_with_ranks(self) -> tuple[int, bool]:
        """The signal to stop for, or 0, and whether some rank lacks its next batch; the clock is agreed on too.

        Raises UserError when too many updates in a row were left out.
        """
        if 0 < self.config.training_seconds - self.elapsed_s < 3.0:
            self.runtime.synchronize()  # work still queued counts in the last seconds
        own = self.runtime.signal, self.loader.batch_failed(self.step), *self.skipped_on_host.tolist()
        self.elapsed_s, signalled, batch_failed, self.skipped_in_a_row, skipped = self.clock.agreed(*own)
        if skipped > self.skipped_reported:
            self.log.row("update_skipped", "gradient not finite", step=self.step, in_all=int(skipped))
        self.skipped_reported = skipped
        if self.skipped_in_a_row >= 5:
            self.checkpoints.finish()
            problem = f"{self.skipped_in_a_row:.0f} updates in a row had gradients not finite, at step {self.step}"
            advice = f"lower MATRIX_LR or GRAD_CLIP_NORM; last good checkpoint: {self.checkpoints.newest or 'none'}"
            raise UserError(f"{problem}; {advice}")
        return int(signalled), bool(batch_failed)

    def validation_score(self) -> Score:
        """Of the weights as they are, in windows without overlap."""
        scores = score_stream(self.model, self.config, self.runtime, self.validation, self.config.eval_seq_len)
        return score_of(scores.logp, self.validation)

    def log_step(self, event: str, note: str = "", **fields: Any) -> None:
        step, steps, tokens = self.step, self.config.iterations, self.step * self.config.train_batch_tokens
        told = dict(step=step, steps=steps, tokens_per_s=tokens / max(self.elapsed_s, 1e-9))
        self.log.row(event, note, f"step:{step}/{steps}", told, **fields)

    def _timing(self) -> dict[str, Any]:
        return dict(train_time_ms=1000 * self.elapsed_s, step_avg_ms=1000 * self.elapsed_s / max(self.step, 1))

    def global_train_loss(self) -> float:
        """The last step's main cross-entropy over all ranks, nats."""
        return self.runtime.all_reduce_sum(self.train_loss.clone()).item() / self.runtime.world_size

    def save(self) -> None:
        """A thread of rank 0 writes a copy of the state while training goes on."""
        began, self.saved_at_s = time.perf_counter(), self.elapsed_s
        self.checkpoints.save_step(self.step, self.state_dict(), began)

    def state_dict(self) -> State:
        """All that a resumed run needs. A collective, for the momentum."""
        return dict(
            model=self.model.state_dict(), optimizers=self.optimizers.state_dict(), average=self.average.state_dict(),
            swarm=self.swarm.state_dict() if self.swarm else {}, controls=asdict(self.controls),
            progress=dict(step=self.step, elapsed_s=self.elapsed_s, finished=self.finished, losses=self.loss_history),
            identity=self.identity, config=asdict(self.config), world_size=self.runtime.world_size,
        )

    def load_state_dict(self, state: State) -> None:
        """Stand where `state_dict` was taken, at any world size. Raises what odd content makes of itself."""
        own, found = flattened(self.state_dict() | {"config": {}, "identity": {}}), flattened(state)
        for path, leaf in own.items():
            if not isinstance(leaf, dict) and kind_of(found[path]) != kind_of(leaf):  # what is empty may hold anything
                raise TypeError(f"{path} is {kind_of(found[path])}, not {kind_of(leaf)}")
            if isinstance(leaf, Tensor):  # the very ones in use
                leaf.copy_(found[path])
        for name, shard in zip(BANK_NAMES, self.optimizers.muon.shards):
            own_momentum = state["optimizers"]["muon"][name][shard.own_rows]
            shard.momentum[: len(own_momentum)].copy_(own_momentum)
        self.average.count = state["average"]["count"]
        if self.swarm:
            self.swarm.load_state_dict(state["swarm"])
            self.swarm.summary()  # reads all of it
        self.controls = Controls(**state["controls"])
        progress = state["progress"]
        self.step, self.finished, self.loss_history = progress["step"], progress["finished"], progress["losses"]
        self.elapsed_s = self.saved_at_s = self.clock.total_s = progress["elapsed_s"]
        self.skipped_on_host.copy_(self.optimizers.skipped)
        self.skipped_reported = float(self.skipped_on_host[1])

    def resume(self, state: State, source: str) -> None:
        """Go on from a state. Raises ConfigError for one of other settings or data, CheckpointError for an odd one."""
        try:
            ours, stored = json.loads(self.config.to_json()), state["config"]
            names = [name for name in ours if not name.startswith(NOT_TRAINING) and ours[name] != stored[name]]
            dtype = stored["compute_dtype"]  # a run that goes on elsewhere keeps what it began with
            self.config = replace(self.config, compute_dtype=dtype)
            self.model.compute_dtype = self.optimizers.muon.dtype = COMPUTE_DTYPES[dtype]
            odd = [f"{name.upper()}={stored[name]} (now {ours[name]})" for name in names]
            odd += [name for name, value in self.identity.items() if state["identity"][name] != value]
            if not odd:
                self.load_state_dict(state)
                if not (0 <= self.step <= self.config.iterations and self.elapsed_s >= 0):
                    raise ValueError("impossible step or time")
        except (*MALFORMED, RuntimeError) as error:
            raise CheckpointError(f"{source} has unexpected content ({type(error).__name__}: {error})") from error
        if odd:
            problem = f"{source} was trained with another {', '.join(odd)}"
            raise ConfigError(f"{problem}; set them back, or RESUME= to train from the beginning")
        shown = {"step": self.step, "from": source, **self._timing()}
        self.log.row("resumed", **shown, saved_by_ranks=state["world_size"], compute_dtype=self.config.compute_dtype)


@dataclass
class Controls:
    """All that may change the training step while a run goes on."""

    qat: bool
    kg_weight: float  # 0 where there is no knowledge graph
    mtp_weight: float  # 0 where there are no MTP heads
    clip_norm: float


class WeightAverage:
    """EMA with a ramped decay, the mean of snapshots (SWA), or nothing; of what the artifact holds."""

    def __init__(self, model: GPT, config: Config):
        self.config, self.count, self.names = config, 0, [*model.plan]
        self.sources: list[Tensor] = [model.get_parameter(name) for name in self.names]
        self.shadow = [p.detach().clone() for p in self.sources] if config.weight_average != "none" else []

    @torch.no_grad()
    def update(self, step: int, lr_scale: float) -> None:
        """Take in the weights after `step` steps."""
        kind = self.config.weight_average
        if kind == "ema":
            decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        elif kind == "swa" and lr_scale < self.config.swa_start_scale and step % self.config.swa_every == 0:
            decay = self.count / (self.count + 1)
        else:
            return
        self.count += 1
        torch._foreach_lerp_(self.shadow, self.sources, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        if self.count:
            torch._foreach_copy_(self.sources, self.shadow)

    def state_dict(self) -> State:
        return dict(count=self.count, shadow=dict(zip(self.names, self.shadow)))


class Clock:
    """Training time, which stands still in validation, and the graphs compiled in it."""

    def __init__(self, runtime: Runtime):
        self.runtime, self.total_s, self.started_at, self.compilations = runtime, 0.0, None, 0

    def start(self) -> None:
        self.runtime.synchronize()
        self.compilations -= compile_count()
        self.started_at = time.perf_counter()

    def pause(self) -> None:
        self.runtime.synchronize()
        self.total_s, self.started_at = self.now(), None
        self.compilations += compile_count()

    def agreed(self, *largest: float) -> list[float]:
        """Rank 0's training time and the largest of each further number, on every rank."""
        return self.runtime.largest(self.now() if self.runtime.is_main else -math.inf, *largest)

    def now(self) -> float:
        return self.total_s + (0.0 if self.started_at is None else time.perf_counter() - self.started_at)


def compiled(function: Any, config: Config, runtime: Runtime, fullgraph: bool = False) -> Any:
    """With a graph for each shape, where compiling is wanted."""
    return torch.compile(function, dynamic=False, fullgraph=fullgraph) if wants_compile(config, runtime) else function


def wants_compile(config: Config, runtime: Runtime) -> bool:
    """Raises UserError where compiling is wanted and Triton is missing."""
    wanted = runtime.on_cuda if config.compile is None else config.compile
    if wanted and runtime.on_cuda:
        require("triton", "compiling for CUDA (COMPILE=0 runs without)")
    return wanted


def compile_count() -> int:
    import torch._dynamo.utils as dynamo_utils  # slow to import

    return dynamo_utils.counters["stats"]["unique_graphs"]


# 7. Artifact ----
# In: averaged weights, and training data where GPTQ is asked for. Out: one file under the limit that holds the
# model, and a model again from that file and this code alone. Nothing is ever unpickled.
ARTIFACT_NAME, ARTIFACT_FORMAT = "final_model.int6.ptz", 3
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
DAMPING = (0.01, 0.1, 1.0)  # of the mean diagonal, tried in turn
GPTQ_BLOCK = 128  # columns whose errors reach the later ones together
MAX_UNPACKED_BYTES = 2**30  # an artifact that claims more is not ours
BROTLI_MAGIC = b"\xce\xb2\xcf\x81"  # our own: brotli has none
SKIPPABLE_FRAME = b"P*M\x18" + (32).to_bytes(4, "little")  # zstd skips the 32 bytes behind it
SIZE_CLASSES = 48  # of levels: their expected size from 1/8 up in quarters of a doubling
ANS_BITS = 14  # probabilities are multiples of 2^-14
ANS_FLOOR = 2**16  # states lie in [2^16, 2^32); 16-bit words enter and leave
SMALLER_MODEL = "use fewer layers, a smaller MLP_MULT or BIGRAM_VOCAB_SIZE, or fewer QAT_BITS"
Hessians = Mapping[str, "HessianFactor"]  # by bank


def pack_artifact(
    model: GPT, tokenizer_digest: str, hessians: Hessians | None = None, log: RunLog | None = None
) -> bytes:
    """Raises ArtifactError where it cannot fit."""
    config, digests = model.config, dict(tokenizer=tokenizer_digest, code=code_digest())
    metadata = dict(format=ARTIFACT_FORMAT, config=config.portable().to_json(), plan=model.plan, **digests)
    make = partial(quantize, model.state_dict(), model.plan, hessians=hessians)
    pack = partial(pack_tensors, metadata=metadata, compressor=config.compressor)
    limit = SIZE_LIMIT_BYTES - code_bytes() if config.fit_bytes else sys.maxsize
    used, tensors, packed = fit_artifact(make, pack, config, limit, log)
    if log:
        entropy = order0_entropy_bytes(tensors)
        payload = len(packed) - len(pack({name: t for name, t in tensors.items() if t.dtype != torch.int8}))
        ratio = payload / max(entropy, 1.0)
        log.row("packing", payload=payload, order0_entropy=round(entropy), ratio=ratio, **used.coarseness)
        # The integers share a code: of the file each tensor gets what it has of all entropy and sizes.
        share = {name: order0_entropy_bytes({name: t}) or t.nbytes for name, t in tensors.items()}
        parts = [sum(share.get(name + end, 0) for end in ("", ".levels", ".scale")) for name in model.plan]
        ends = np.rint(np.cumsum([0, *parts]) * (len(packed) / sum(parts))).astype(int)
        log.tell("tensor_bytes", bytes=dict(zip(model.plan, np.diff(ends).tolist())), codec=model.plan)
    return packed


def write_artifact_file(path: Path, content: bytes) -> None:
    """Raises ArtifactError."""
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise ArtifactError(f"cannot write the artifact {path}: {error.strerror}; free space or set OUT_DIR") from error


def load_artifact(
    path: str | Path, attend: Attention | None = None, content: bytes | None = None
) -> tuple[GPT, Config, dict[str, Any]]:
    """The model, on the CPU, its config and the metadata; `content` spares reading the file. Raises ArtifactError."""
    try:
        stored, metadata = unpack_artifact(read_artifact(path) if content is None else content)
        if metadata["format"] != ARTIFACT_FORMAT:
            raise ValueError(f"it has format {metadata['format']}; this code reads {ARTIFACT_FORMAT}")
        if not all(isinstance(metadata[name], str) for name in ("tokenizer", "code")):
            raise TypeError("digests that are no text")
        config = Config.from_json(metadata["config"])
        with torch.device("meta"):  # shapes alone: a config that asks too much must cost nothing
            model = GPT(config, attend, initialize=False)
        if metadata["plan"] != model.plan:
            raise ValueError("it stores its tensors in another way than its config asks for")
        shapes = {name: model.get_parameter(name).shape for name in model.plan}
        if sum(shape.numel() for shape in shapes.values()) > MAX_UNPACKED_BYTES:
            raise ValueError(f"it claims more than {MAX_UNPACKED_BYTES} weights")
        arrays = {name: shuffle_bytes(tensor.numpy(), undo=True) for name, tensor in stored.items()}
        coded = {f"{name}.levels": shapes[name] for name, codec in model.plan.items() if codec.startswith("int")}
        arrays |= decode_levels(arrays, coded)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        model.load_state_dict(dequantize(tensors, model.plan), assign=True)
    except (*MALFORMED, RuntimeError) as error:
        advice = "it is truncated, altered, or no artifact of this version; train again or fetch it again"
        raise ArtifactError(f"{path} has unexpected content ({type(error).__name__}: {error}): {advice}") from error
    return model, config, metadata


def read_artifact(path: str | Path) -> bytes:
    """Raises ArtifactError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read the artifact {path} (ARTIFACT): {error.strerror}") from error


def code_digest() -> str:
    return digest_of(*code_paths())[:16]


def code_paths() -> list[Path]:
    """Those of CODE_FILES that are there: a record may have its siblings folded in."""
    return [CODE_DIR / name for name in CODE_FILES if (CODE_DIR / name).exists()]


def code_bytes() -> int:
    return sum(path.stat().st_size for path in code_paths())


def log_ledger(log: RunLog, artifact_bytes: int, label: str) -> None:
    """Log what counts against the limit. Raises ArtifactError, before any evaluation, above it."""
    code, files = code_bytes(), [path.name for path in code_paths()]
    total = code + artifact_bytes
    log.row("artifact_bytes", "", f"Serialized model {label}: {artifact_bytes} bytes", dict(bytes=artifact_bytes))
    log.row("code_bytes", "", f"Code size: {code} bytes", dict(bytes=code, files=files))
    told = dict(bytes=total, limit=SIZE_LIMIT_BYTES)
    log.row("total_bytes", "", f"Total submission size {label}: {total} bytes", told)
    if total > SIZE_LIMIT_BYTES:
        remedy = f"set FIT_BYTES=1 for coarser integers, or {SMALLER_MODEL}"
        raise ArtifactError(f"the submission is {total - SIZE_LIMIT_BYTES} bytes over {SIZE_LIMIT_BYTES}; {remedy}")


def fit_artifact(
    make: Callable[[Config], dict[str, Tensor]], pack: Callable[[Mapping[str, Tensor]], bytes],
    config: Config, limit: int, log: RunLog | None = None,
) -> tuple[Config, dict[str, Tensor], bytes]:
    """The finest config whose artifact has at most `limit` bytes, its tensors and their bytes.

    Candidates are `config`, wider clips, and the widest with more weights pruned; their entropy is compared, and only
    the choice is packed. Raises ArtifactError where none fits.
    """
    # A clip below about 5 deviations saves nothing: error and entropy both grow.
    ladder = [replace(config, clip_std=(config.clip_std or 5.0) * 1.01**rung) for rung in range(1, 101)]
    fractions = (percent / 100 for percent in range(1, 91))
    ladder += [replace(ladder[-1], prune_fraction=f) for f in fractions if f > config.prune_fraction]
    tensors, rung = make(config), -1
    packed = pack(tensors)
    while (excess := len(packed) - limit) > 0:
        if config == ladder[-1]:
            too_much = f"{excess} bytes too many of the {limit} left for the artifact"
            raise ArtifactError(f"FIT_BYTES=1 leaves {too_much} even with {config.coarseness}; {SMALLER_MODEL}")
        allowed = order0_entropy_bytes(tensors) - excess
        rung = bisect.bisect_left(ladder[:-1], -allowed, rung + 1, key=lambda c: -order0_entropy_bytes(make(c)))
        config = ladder[rung]
        tensors = make(config)
        packed = pack(tensors)
        if log:
            log.row("fit_bytes", before=limit + excess, after=len(packed), limit=limit, **config.coarseness)
    return config, tensors, packed


def order0_entropy_bytes(tensors: Mapping[str, Tensor]) -> float:
    """Order-0 entropy of the integers, by one histogram for each tensor, itself free of charge."""
    histograms = (np.bincount(t.numpy().reshape(-1).view(np.uint8)) for t in tensors.values() if t.dtype == torch.int8)
    return sum(float((h * np.log2(h.sum() / h.clip(min=1))).sum()) for h in histograms) / 8


@torch.no_grad()
def calibrate(trainer: Trainer) -> Hessians:
    """What GPTQ needs of each bank's Hessian X·Xᵀ, over all ranks, from the tokens after the last step's.

    It takes training time: no batch begins that, as long as the one before, would end after MAX_WALLCLOCK_SECONDS.
    Without any the result is empty: rounding stays plain.
    """
    config, runtime, clock = trainer.config, trainer.runtime, trainer.clock
    sums = dict[str, Tensor]()

    def probe(name: str, layer: int, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        if name not in sums:
            sums[name] = rows.new_zeros(config.num_layers, rows.size(-1), rows.size(-1))
        sums[name][layer].addmm_(rows.mT, rows)

    batches = map(trainer.loader.batch, itertools.count(trainer.step))  # whole steps, at any world size
    clock.start()
    began_s = now_s = clock.agreed()[0]
    batch_s, tokens = began_s / max(trainer.step, 1), 0  # a step takes longer than a forward pass
    while tokens < config.calibration_tokens and now_s + batch_s <= (config.max_wallclock_seconds or math.inf):
        for ids, _ in next(batches):
            trainer.model.forward_hidden(ids, probe=probe)
        tokens += config.train_batch_tokens
        runtime.synchronize()
        before_s, now_s = now_s, clock.agreed()[0]
        batch_s = now_s - before_s
    moments = {name: runtime.all_reduce_sum(total) / tokens for name, total in sums.items()}
    clock.pause()  # what follows reads no training data
    factors = {bank: factorize(torch.cat([moments[x] for x in ROLES[bank].inputs])) for bank in BANK_NAMES if tokens}
    trainer.log.row(
        "calibration", tokens=tokens, time_s=clock.total_s - began_s, train_and_calibration_s=clock.total_s,
        budget_s=config.max_wallclock_seconds,
        without_factor=sum(int(factor.damping.isinf().sum()) for factor in factors.values()),
    )
    return factors


@torch.no_grad()
def quantize(
    state: Mapping[str, Tensor], plan: Mapping[str, str], config: Config, hessians: Hessians | None = None
) -> dict[str, Tensor]:
    """The artifact's tensors, on the CPU: `<name>.levels` and `<name>.scale` where the plan says intN, else `<name>`.

    Banks are pruned; those with a Hessian are rounded by GPTQ, all else to the nearest level.
    """
    tensors = {}
    for name, codec in plan.items():
        weight = state[name].detach().float()
        grid = grid_of(name, codec, config)
        if grid is None:
            tensors[name] = weight.half() if codec == "fp16" else weight
            continue
        pruned = smallest(weight, config.prune_fraction if name in BANK_NAMES else 0.0)
        if hessians and name in hessians:
            rounding = partial(round_by_hessian, weight, grid=grid, pruned=pruned, factor=hessians[name])
        else:
            weight = weight.masked_fill(pruned, 0)
            rounding = partial(round_plainly, weight, grid=grid)
        tensors[f"{name}.levels"], tensors[f"{name}.scale"] = best_rounding(weight, grid, rounding)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def dequantize(tensors: Mapping[str, Tensor], plan: Mapping[str, str]) -> dict[str, Tensor]:
    """Undo `quantize`, in fp32. Raises KeyError for a missing tensor."""
    integers = [name for name, codec in plan.items() if codec.startswith("int")]
    state = {name: Grid.decode(tensors[f"{name}.levels"], tensors[f"{name}.scale"]) for name in integers}
    return state | {name: tensors[name].float() for name in plan if name not in state}


def smallest(weight: Tensor, fraction: float) -> Tensor:
    """Mask of the `fraction` of elements nearest zero."""
    sizes = weight.abs().flatten()
    chosen = sizes.topk(int(fraction * len(sizes)), largest=False, sorted=False).indices
    return torch.zeros_like(sizes, dtype=torch.bool).index_fill_(0, chosen, True).view_as(weight)


def best_rounding(weight: Tensor, grid: Grid, rounding: Callable[[Tensor], Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """(levels, scale), each row with the scale whose `rounding`, (levels, error (…, 1)), loses least."""
    best = list[Tensor]()  # error, levels, scale
    for scale in candidate_scales(weight, grid):
        levels, error = rounding(scale)
        tried = [error, levels, scale]
        best = [torch.where(error < best[0], *pair) for pair in zip(tried, best)] if best else tried
    return best[1], best[2]


def candidate_scales(weight: Tensor, grid: Grid) -> Iterator[Tensor]:
    """The fp16 scales (…, 1) a row may take: that of CLIP_STD, or one for each quantile of its sizes."""
    if grid.clip_std:
        yield grid.scale(grid.clip(weight))
        return
    ordered = weight.abs().sort(dim=-1).values
    last = ordered.size(-1) - 1
    for quantile in CLIP_QUANTILES:
        low = math.floor(quantile * last)
        clip = torch.lerp(ordered[..., low], ordered[..., min(low + 1, last)], quantile * last - low)
        yield grid.scale(clip.unsqueeze(-1))


def round_plainly(weight: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Nearest levels (`lite`), and each row's sum of square errors."""
    levels = grid.encode(weight, scale)
    return levels, (grid.decode(levels, scale) - weight).square().sum(-1, keepdim=True)


def round_by_hessian(
    weight: Tensor, scale: Tensor, grid: Grid, pruned: Tensor, factor: HessianFactor
) -> tuple[Tensor, Tensor]:
    """GPTQ (arXiv 2210.17323): round column by column, each error made good by the columns to come.

    `weight` and `pruned` (matrices, out, in), `scale` (matrices, out, 1). Errors are e·H·eᵀ, H the damped moments.
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
            error = (open_weights[..., here] - grid.decode(levels[..., here], scale)) / factor.upper[:, here, here]
            open_weights[..., column:stop] -= error * factor.upper[:, here, column:stop]
            errors[..., column - start] = error[..., 0]
        open_weights[..., stop:] -= errors @ factor.upper[:, start:stop, stop:]
        total += errors.square().sum(-1, keepdim=True)
    return torch.empty_like(levels).scatter_(-1, columns, levels), total


class HessianFactor(NamedTuple):
    """What GPTQ needs of the second moments of matrices' inputs."""

    order: Tensor  # (matrices, in): columns by descending second moment
    upper: Tensor  # (matrices, in, in): upper triangular U; UᵀU inverts the ordered, damped moments
    damping: Tensor  # (matrices,) in units of the mean diagonal; inf: none worked, and U = 1 is plain rounding


def factorize(moments: Tensor) -> HessianFactor:
    """Factor second moments (matrices, in, in); where fp32 fails, with more damping.

    With rows and columns reversed, moments = A·Aᵀ for an upper A, whose inverse is U.
    """
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    ordered = moments.take_along_dim(order.unsqueeze(-1), -2).take_along_dim(order.unsqueeze(-2), -1)
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


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], compressor: str) -> bytes:
    """The artifact's bytes, the same for the same tensors."""
    safetensors = require("safetensors.numpy", "packing the artifact")
    levels = {name: t.numpy() for name, t in tensors.items() if t.dtype == torch.int8}
    arrays = {name: t.numpy() for name, t in tensors.items() if name not in levels}
    arrays |= encode_levels(levels) if levels else {}
    payload = safetensors.save({name: shuffle_bytes(array) for name, array in arrays.items()}, as_metadata(metadata))
    return sealed(compress(payload, compressor) + SKIPPABLE_FRAME)


def unpack_artifact(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Undo `sealed` and `compress` of `pack_tensors`. Raises one of MALFORMED."""
    return read_safetensors(decompress(unseal(content).removesuffix(SKIPPABLE_FRAME)))


def shuffle_bytes(array: np.ndarray, undo: bool = False) -> np.ndarray:
    """Bytes of one significance side by side, which compresses better; same shape and type."""
    parts = array.reshape(-1).view(np.uint8).reshape((array.itemsize, -1) if undo else (-1, array.itemsize))
    return parts.T.copy().reshape(-1).view(array.dtype).reshape(array.shape)


def compress(payload: bytes, compressor: str) -> bytes:
    if compressor == "brotli":
        return BROTLI_MAGIC + require("brotli", "COMPRESSOR=brotli").compress(payload, quality=11, lgwin=24)
    return require("zstandard", "packing the artifact").ZstdCompressor(22, write_checksum=True).compress(payload)


def decompress(stream: bytes) -> bytes:
    """Undo `compress`. Raises ValueError, also above MAX_UNPACKED_BYTES."""
    most, brotli = MAX_UNPACKED_BYTES + 1, stream.startswith(BROTLI_MAGIC)
    library = require("brotli" if brotli else "zstandard", "reading this artifact")
    fault = library.error if brotli else library.ZstdError
    try:
        if brotli:
            payload = library.Decompressor().process(stream.removeprefix(BROTLI_MAGIC), output_buffer_limit=most)
        else:
            claimed = library.get_frame_parameters(stream).content_size
            payload = library.ZstdDecompressor().decompress(stream) if claimed < most else b""
    except fault as error:
        raise ValueError(str(error)) from error
    if not 0 < len(payload) < most:
        raise ValueError(f"it is empty, or claims more than {MAX_UNPACKED_BYTES} bytes of content")
    return payload


def encode_levels(levels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All levels (each (…, R, C) int8) as one code with a histogram for each size class, and the sizes.

    Range asymmetric numeral systems (arXiv 1311.2540) spend fractions of bits; thousands of interleaved lanes
    (arXiv 1402.3392) make each step one of numpy's.
    """
    arrays, keys = {}, []
    for name, level in sorted(levels.items()):
        energy = np.square(level, dtype=np.float32)
        for axis, side in ((-1, "rows"), (-2, "columns")):
            mean = energy.mean(axis, keepdims=True).clip(min=2.0**-6)
            arrays[f"{name}.{side}"] = (np.rint(2 * np.log2(mean)) + 12).astype(np.uint8)
            energy = energy / mean
        classes = size_classes(arrays[f"{name}.rows"], arrays[f"{name}.columns"])
        keys.append(classes << 8 | level.reshape(-1).view(np.uint8))
    key = np.concatenate(keys)
    counts = np.bincount(key, minlength=SIZE_CLASSES * 256).reshape(SIZE_CLASSES, 256)
    spare = 2**ANS_BITS - (counts > 0).sum(1, keepdims=True)
    frequencies = counts * spare // counts.sum(1, keepdims=True).clip(min=1) + (counts > 0)
    frequencies[np.arange(SIZE_CLASSES), counts.argmax(1)] += 2**ANS_BITS - frequencies.sum(1)
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
    classes, frequencies = np.concatenate([size_classes(*sides) for sides in sizes.values()]), arrays["ans.frequencies"]
    if (frequencies.sum(1) != 2**ANS_BITS).any():
        raise ValueError("the histograms of the levels do not add up")
    widths, starts = ans_tables(frequencies)
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


def size_classes(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Class of each level, flat, by the size codes of its row (…, R, 1) and, relative to that, column (…, 1, C)."""
    return (rows.astype(np.int16) + columns - 12).clip(0, SIZE_CLASSES - 1).astype(np.uint16).reshape(-1)


def ans_tables(frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Width and start of the slots of each class·256 + level byte."""
    widths = frequencies.astype(np.int64)
    return widths.reshape(-1), (widths.cumsum(1) - widths).reshape(-1)


# 8. Scoring ----
# In: a model and the validation tokens. Out: one stream of token scores in which every target stands exactly once.
def score_stream(model: GPT, config: Config, runtime: Runtime, validation: ValidationSet, stride: int) -> TokenScores:
    """The validation stream scored by a sliding window, whole on every rank."""
    windows = plan_windows(validation.num_targets, config.eval_seq_len, stride)
    scorer = WindowScorer(model, config, runtime, validation.tokens)
    scorer.score_all(windows, 0, len(windows.starts))
    return scorer.finish()


def score_then_adapt(
    model: GPT, config: Config, runtime: Runtime, validation: ValidationSet, log: RunLog | None = None
) -> TokenScores:
    """Legal TTT: score a chunk, then train a copy of the model on it; not on the last."""
    if config.ttt_rank:
        return adapt_by_document(model, config, runtime, validation)
    num_targets, chunk_tokens = validation.num_targets, config.ttt_chunk_tokens
    windows = plan_windows(num_targets, config.eval_seq_len, config.eval_stride, chunk_tokens)
    trainer = ChunkTrainer(copy.deepcopy(model), config, runtime, validation)
    scorer = WindowScorer(trainer.average, config, runtime, validation.tokens, config.ttt_temperature)
    chunk_starts = range(0, num_targets, chunk_tokens)
    so_far = np.zeros(2)  # bits and bytes
    for chunk, start in enumerate(chunk_starts):
        stop = min(start + chunk_tokens, num_targets)
        first, last = np.searchsorted(windows.starts + windows.length, (start, stop), side="right")
        logp = scorer.score_all(windows, int(first), int(last))
        lr = trainer.learning_rate(chunk, len(chunk_starts)) if stop < num_targets else 0.0
        if log:
            nats, size = -logp.sum(dtype=np.float64), validation.bytes[start:stop].sum()
            so_far += nats / math.log(2), size
            bpb, bpb_so_far = nats / math.log(2) / max(size, 1), so_far[0] / max(so_far[1], 1)
            told = dict(chunk=chunk + 1, chunks=len(chunk_starts), targets=stop, val_loss=nats / (stop - start))
            log.tell("ttt_chunk", **told, val_bpb=bpb, val_bpb_so_far=bpb_so_far, lr=lr)
        if stop < num_targets:
            trainer.train_on(scorer, range(start, stop), lr)
    return scorer.finish()


def adapt_by_document(model: GPT, config: Config, runtime: Runtime, validation: ValidationSet) -> TokenScores:
    """Legal TTT that forgets: score the next TTT_CHUNK_TOKENS targets of a document, then train its adapters on its
    scored targets in their window; each document begins with new ones (pull request 77).

    A rank takes the documents that begin in its share. All windows have one length, and where a document ends is
    looked up when that is scored: a score depends on what stands before it alone.
    """
    tokens, num_targets, length = validation.tokens, validation.num_targets, config.eval_seq_len
    chunk_tokens, share = min(config.ttt_chunk_tokens, length), runtime.share(num_targets)
    trainer = DocumentTrainer(model, config)
    scorer = WindowScorer(trainer.model, config, runtime, tokens, config.ttt_temperature)
    first = next((target for target in share if target == 0 or tokens[target] == BOS_ID), num_targets)
    while first < share.stop:
        trainer.begin()
        begin, more = first, True
        while more:
            stop = first + chunk_tokens
            start = max(stop - length, 0)
            ids, targets = scorer.sequences(np.array([start]), length)
            answer = [each[0] for each in scorer.compiled(ids, targets, length, scorer.temperature)]
            ends = first + 1 + np.flatnonzero(tokens[first + 1 : stop + 1] == BOS_ID)
            stop = int(min(stop, num_targets, *ends))
            scorer.keep(first, *(each[first - start : stop - start].detach() for each in answer))
            more = stop < num_targets and tokens[stop] != BOS_ID
            if more:
                trainer.learn(answer[0][max(begin - start, 0) : stop - start])
            first = stop
    runtime.all_reduce_sum(scorer.scores)
    return scorer.finish()


class DocumentTrainer:
    """Low-rank adapters (arXiv 2106.09685) beside the banks of a copy of the model, and their Adagrad.

    Of two factors the left one is drawn and stays (arXiv 2308.03303), the right one begins at 0.
    """

    def __init__(self, model: GPT, config: Config):
        self.model, self.rate = copy.deepcopy(model).requires_grad_(requires_grad=False), config.ttt_lr
        generator, rank = torch.Generator().manual_seed(model.config.seed), config.ttt_rank
        self.trained = list[Tensor]()
        for name in BANK_NAMES:
            bank = model.get_parameter(name)
            drawn = torch.randn(*bank.shape[:2], rank, generator=generator) / math.sqrt(rank)
            self.trained.append(bank.new_zeros(len(bank), rank, bank.size(2), requires_grad=True))
            self.model.adapters[name] = drawn.to(bank.device), self.trained[-1]

    def begin(self) -> None:
        torch._foreach_zero_([factor.detach() for factor in self.trained])
        self.optimizer = torch.optim.Adagrad(self.trained, self.rate)

    def learn(self, logp: Tensor) -> None:
        """A step on the mean loss of scored targets, logp (N,)."""
        self.optimizer.zero_grad()
        (-logp.mean()).backward()
        self.optimizer.step()


class ChunkTrainer:
    """Trains the model on text that is already scored (pull requests 1081 and 700).

    The first TTT_FREEZE_BLOCKS blocks keep their slices of the banks, and with TTT_SCOPE=all all they have. Ranks
    share each batch.
    """

    def __init__(self, model: GPT, config: Config, runtime: Runtime, validation: ValidationSet):
        self.model, self.config, self.runtime = model, config, runtime
        weights = validation.bytes if config.ttt_byte_weighted else np.ones_like(validation.bytes)
        self.weights = torch.from_numpy(weights.astype(np.float32)).to(runtime.device)
        frozen = tuple(f"blocks.{layer}." for layer in range(config.ttt_freeze_blocks) if config.ttt_scope == "all")
        for name, role in model.parameter_roles().items():
            moves = config.ttt_scope in ROLES[role].ttt_scopes and not name.startswith(frozen)
            model.get_parameter(name).requires_grad_(moves).grad = None
        trained = [p for p in model.parameters() if p.requires_grad]
        self.grads = flatten_gradients(trained)
        if config.ttt_optimizer == "sgd":
            self.optimizer = torch.optim.SGD(trained, config.ttt_lr, config.ttt_momentum)
        else:
            self.optimizer = torch.optim.AdamW(trained, config.ttt_lr, weight_decay=0.0)
        self.average = copy.deepcopy(model) if config.polyak_decay else model  # Polyak's, which scores
        self.trained = [p.detach() for p in trained]
        self.averaged = [p.detach() for p in self.average.parameters() if p.requires_grad]

    def learning_rate(self, chunk: int, num_chunks: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * chunk / max(num_chunks - 1, 1)))
        ramp = 1 + (self.config.ttt_lr_ramp - 1) * min(chunk / (0.3 * num_chunks), 1)
        return self.config.ttt_lr * cosine * ramp

    def train_on(self, scorer: WindowScorer, targets: range, lr: float) -> None:
        """TTT_EPOCHS passes over the whole sequences among these scored targets."""
        seq_len, batch_seqs = min(self.config.eval_seq_len, len(self.weights)), self.config.ttt_batch_seqs
        starts = np.arange(targets.start, targets.stop - seq_len + 1, seq_len)
        self.optimizer.param_groups[0]["lr"] = lr
        for _ in range(self.config.ttt_epochs):
            for first in range(0, len(starts), batch_seqs):
                self._step(scorer, starts[first : first + batch_seqs], seq_len)

    def _step(self, scorer: WindowScorer, starts: np.ndarray, seq_len: int) -> None:
        self.grads.zero_()
        weights = torch.stack([self.weights[start : start + seq_len] for start in starts.tolist()])
        share = self.runtime.share(len(starts))
        if len(share):
            ids, targets = scorer.sequences(starts[share.start : share.stop], seq_len)
            nll = F.cross_entropy(self.model.logits(ids).flatten(0, 1), targets.flatten(), reduction="none")
            ((nll * weights[share.start : share.stop].flatten()).sum() / weights.sum().clamp_min(1)).backward()
        self.runtime.all_reduce_sum(self.grads)
        self._zero_frozen_slices()
        if self.config.ttt_grad_clip > 0:
            self.grads.mul_((self.config.ttt_grad_clip / (self.grads.norm() + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        if self.config.polyak_decay:
            torch._foreach_lerp_(self.averaged, self.trained, 1 - self.config.polyak_decay)

    def _zero_frozen_slices(self) -> None:
        for name in BANK_NAMES:
            grad = self.model.get_parameter(name).grad
            assert grad is not None
            grad.unflatten(0, (-1, self.model.config.num_layers))[:, : self.config.ttt_freeze_blocks] = 0


class WindowScorer:
    """Scores windows with the model as it is now; compiled for full batches."""

    def __init__(self, model: GPT, config: Config, runtime: Runtime, tokens: np.ndarray, temperature: float = 1.0):
        self.model, self.runtime, self.temperature, self.kept = model, runtime, temperature, 0
        self.batch_seqs = config.eval_batch_seqs
        self.samples = sample_targets(len(tokens) - 1, config.sample_seed)
        self.sampled = torch.zeros(len(self.samples), config.vocab_size, device=runtime.device)
        self.scores = self.sampled.new_zeros(len(tokens) - 1, 2)
        self.tokens = F.pad(torch.from_numpy(tokens.astype(np.int32)), (0, config.eval_seq_len)).to(runtime.device)
        self.compiled = compiled(model.token_scores, config, runtime)

    def sequences(self, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        """ids and targets, each (len(starts), length) int64, of the sequences from `starts` on; 0 behind the end."""
        rows = torch.stack([self.tokens[start : start + length + 1] for start in starts.tolist()]).long()
        return rows[:, :-1], rows[:, 1:]

    @torch.inference_mode()
    def score_all(self, windows: Windows, first: int, stop: int) -> np.ndarray:
        """logp (N,) of windows first … stop-1, on every rank; each scores a contiguous part."""
        ends = windows.starts + windows.length
        share = self.runtime.share(stop - first)
        start, own_stop = first + share.start, first + share.stop
        while start < own_stop:
            tail, end = int(windows.tails[start]), start + 1
            while end < min(own_stop, start + self.batch_seqs) and windows.tails[end] == tail:
                end += 1
            forward = self.compiled if end - start == self.batch_seqs else self.model.token_scores
            ids, targets = self.sequences(windows.starts[start:end], windows.length)
            logp, entropy, every = forward(ids, targets, tail, self.temperature)
            self.keep(ends[start] - tail, logp.flatten(), entropy.flatten(), every.flatten(0, 1))
            start = end
        scored = self.scores[ends[first] - windows.tails[first] : ends[stop - 1]]
        return self.runtime.all_reduce_sum(scored)[:, 0].cpu().numpy()

    def keep(self, first: int, logp: Tensor, entropy: Tensor, every: Tensor) -> None:
        """Take the answers (N,), (N,) and (N, V) for targets from `first` on."""
        stop = first + len(logp)
        self.scores[first:stop] = torch.stack([logp, entropy], 1)
        low, high = np.searchsorted(self.samples, (first, stop))
        self.sampled[low:high] = every[self.samples[low:high] - first]
        self.kept += len(logp) * self.runtime.world_size
        self.runtime.progress(self.kept / len(self.scores), "scored")

    def finish(self) -> TokenScores:
        """The scores with the sampled predictions, until now on different ranks."""
        logp, entropy = self.scores.T.contiguous().cpu().numpy()
        self.runtime.progress()
        return TokenScores(logp, entropy, self.runtime.all_reduce_sum(self.sampled).cpu().numpy(), self.samples)


class Windows(NamedTuple):
    """Windows of `length` tokens; window i begins at starts[i] and scores its last tails[i] targets."""

    length: int
    starts: np.ndarray
    tails: np.ndarray


def plan_windows(num_targets: int, seq_len: int, stride: int, chunk: int = 0) -> Windows:
    """Full-length windows that score each target exactly once, in order: the first all it sees, each further
    one its last `stride`, or less where the stream or a chunk of `chunk` targets (0: no chunks) ends.
    """
    length = min(seq_len, num_targets)
    ends = np.append(np.arange(length, num_targets, stride), num_targets)
    if chunk:
        ends = np.union1d(ends, np.arange(-(-length // chunk) * chunk, num_targets, chunk))
    return Windows(length, ends - length, np.diff(ends, prepend=0))


class TokenScores(NamedTuple):
    """Per target, in stream order: log-probability and the prediction's entropy, nats, fp32, (targets,).

    `sampled` (S, V): whole predictions at the sampled `targets` (S,), ascending, to check validity by.
    """

    logp: np.ndarray
    entropy: np.ndarray
    sampled: np.ndarray
    targets: np.ndarray


def score_of(logp: np.ndarray | float, validation: ValidationSet, valid: bool = True) -> Score:
    """Of the targets' log-probabilities or their sum, in bits per byte: Σ nll / (ln 2 · Σ bytes)."""
    total_logp = float(np.sum(logp, dtype=np.float64))
    tokens, total_bytes = validation.num_targets, int(validation.bytes.sum())
    bpb = -total_logp / (math.log(2) * total_bytes)
    return Score(-total_logp / tokens, bpb, tokens, total_bytes, validation.partial, valid and math.isfinite(bpb))


class Score(NamedTuple):
    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    tokens: int
    bytes: int
    partial: bool  # VAL_TOKENS cut the validation split
    valid: bool  # false: the probabilities do not sum to 1, so this is no code length

    @property
    def note(self) -> str:
        return " ".join(["partial"] * self.partial + ["INVALID"] * (not self.valid))

    def headline(self) -> dict[str, Any]:
        return dict(val_loss=self.val_loss, val_bpb=self.val_bpb)


def sample_targets(num_targets: int, seed: int) -> np.ndarray:
    """Where the mixture is checked, ascending: a target drawn from each 64th of the stream, and the first 16,
    where a mixer that looks ahead stands out most.
    """
    starts, stops = (np.arange(64) + np.array([[0], [1]])) * num_targets // 64
    drawn = np.random.default_rng(seed).integers(starts, np.maximum(stops, starts + 1))
    return np.union1d(drawn, np.arange(min(16, num_targets)))


# 9. Counts and mixers ----
# In: the scored stream. Out: the mixed stream, and at sampled targets the whole mixture, which must add up to 1
# and give the token that came what the stream gave it.
HASH_MULTIPLIERS = (36313, 27191, 51647, 81929, 131071, 174763, 233017)  # PR 1094
Rows = tuple[list[np.ndarray], list[np.ndarray]]  # those of Evidence: expert, bucket


def log_mixed(mixer: Mixer, scores: TokenScores, runtime: Runtime, log: RunLog, validation: ValidationSet) -> Score:
    """Mix the stream on rank 0 and log the score with the mass that shows whether it is one."""
    began = time.perf_counter()
    sums = [0.0] * 4
    if runtime.is_main:
        probe = MassProbe(scores.targets + 1, scores.sampled, scores.entropy[scores.targets])
        tokens = torch.from_numpy(validation.tokens.astype(np.int64)).to(runtime.device)
        logp = mix_scores(mixer, tokens, scores.logp, scores.entropy, probe)
        sums = [logp.sum(), probe.mass.mean(), np.abs(probe.mass - 1).max(), probe.gap.max()]
    total_logp, mass, worst, gap = runtime.from_main(*sums)
    result = score_of(total_logp, validation, valid=worst <= MASS_TOLERANCE and gap <= GAP_TOLERANCE)
    seconds = time.perf_counter() - began
    log_result(log, "final_", "mixed", result, seconds, mass=mass, worst=worst, gap=gap, valid=result.valid)
    return result


def make_mixer(config: Config) -> Mixer | None:
    kinds = {"backoff": BackoffNgramMixer, "backoff-published": PublishedBackoffMixer, "hedge": HedgeMixer}
    return kinds.get(config.mixer, lambda _: None)(config)


def mix_scores(
    mixer: Mixer, tokens: Tensor, logp: np.ndarray, entropy: np.ndarray,
    probe: MassProbe | None = None, block: int = 2048,
) -> np.ndarray:
    """Mix the neural scores (N,) of targets tokens[1:], int64: float64 log-probabilities (N,) in nats.

    Each block is scored before the mixer learns from it.
    """
    if probe:
        probe.recount(mixer, tokens)
    kinds = mixer.experts(mixer.counts(tokens))
    evidence = Evidence(logp, entropy, *([row[1:] for row in rows] for rows in kinds))
    learned = np.empty(len(logp))
    for start in range(0, len(learned), block):
        part = evidence.part(slice(start, start + block))
        learned[start : start + block] = mixer.mix(part)
        if probe:
            probe.score(mixer, start, start + block)
        mixer.update(part)
    log_odds = guard(logp, learned) if mixer.guarded else np.full_like(learned, np.inf)
    mixed = blend(logp, learned, log_odds)
    if probe:
        probe.finish(log_odds, mixed)
    return mixed


def guard(neural: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Log-odds (N,) of `learned` against `neural` at each target, from the targets before it."""
    return np.concatenate([[0.0], np.cumsum(learned - neural)])[:-1]


def blend(neural: np.ndarray, learned: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
    """Log-probability of the two-model mixture at the given odds.

    With those of `guard` it is the exact Bayesian mixture of two sequence models, prior 1/2 each: on any text
    its summed loss exceeds neither model's by more than ln 2 nats.
    """
    return np.logaddexp(neural - np.logaddexp(0, log_odds), learned - np.logaddexp(0, -log_odds))


class MassProbe:
    """Counterfactual mass: every token in turn takes the place of a sampled target, and the answers add up.

    `position` (S,) ≥ 1 indexes tokens, ascending; `logp` (S, V) and `entropy` (S,) are the neural model's there. Counts
    are found anew, the rest is the mixer's own code. After `mix_scores` `distributions` (S, V) holds the answers and
    `mass` (S,) their sums, 1 if valid; `gap` (S,), 0 if valid, is how far, in nats, the stream's own score is off.
    """

    def __init__(self, position: np.ndarray, logp: np.ndarray, entropy: np.ndarray):
        self.position, self.logp, self.entropy = position, logp, entropy
        self.vocab_size = logp.shape[1]
        self.learned = np.empty(logp.shape)

    def recount(self, mixer: Mixer, tokens: Tensor) -> None:
        self.came = tokens.cpu().numpy()[self.position]
        kinds = mixer.experts(mixer.counts(tokens, self))
        every = ([np.broadcast_to(row, self.logp.shape).ravel() for row in rows] for rows in kinds)
        self.evidence = Evidence(self.logp.ravel(), self.entropy.repeat(self.vocab_size), *every)

    def score(self, mixer: Mixer, start: int, stop: int) -> None:
        """Let the mixer score every token at the samples among targets start..stop-1."""
        low, high = np.searchsorted(self.position, (start, stop), side="right")
        if low < high:
            part = self.evidence.part(slice(low * self.vocab_size, high * self.vocab_size))
            self.learned[low:high] = mixer.mix(part).reshape(-1, self.vocab_size)

    def finish(self, log_odds: np.ndarray, mixed: np.ndarray) -> None:
        """Blend at the stream's log-odds (N,), add up, compare with what the stream scored (N,)."""
        every = blend(self.logp, self.learned, log_odds[self.position - 1, None])
        self.distributions = np.exp(every)
        self.mass = self.distributions.sum(1)
        self.gap = np.abs(every[np.arange(len(every)), self.came] - mixed[self.position - 1])


class Evidence(NamedTuple):
    """Per target: the neural log-probability and entropy in nats (N,), and one row (N,) per n-gram expert.

    `expert` rows hold the target's probability; `bucket` rows depend on the context alone.
    """

    logp: np.ndarray
    entropy: np.ndarray
    expert: Any
    bucket: Any

    def part(self, span: slice) -> Evidence:
        rows = (np.array([row[span] for row in rows]) for rows in (self.expert, self.bucket))
        return Evidence(self.logp[span], self.entropy[span], *rows)


class Mixer:
    """`counts` and `experts` make the evidence; `mix` scores a block (B,), `update` then learns from it."""

    guarded = False  # by `guard`

    def __init__(self, config: Config):
        self.config = config

    def counts(self, tokens: Tensor, probe: MassProbe | None = None) -> Iterator[NgramCounts]:
        """With a probe those of every token at its positions: C (S, 1), F (S, V) and T (S, 1)."""
        config = self.config
        if config.ngram_counts == "hashed":
            return iter_hashed_counts(tokens, config.ngram_order, config.ngram_buckets, config.ngram_block, probe)
        return iter_ngram_counts(tokens, config.ngram_order, probe=probe)

    def experts(self, counts: Iterable[NgramCounts]) -> Rows:
        raise NotImplementedError

    def mix(self, block: Evidence) -> np.ndarray:
        raise NotImplementedError

    def update(self, block: Evidence) -> None:
        """Nothing to learn: the counts alone adapt."""


class BackoffNgramMixer(Mixer):
    """The default: a chain of two-way mixtures from the neural q_0 through orders 1 to NGRAM_ORDER.

    q_k = (1 - w) q_{k-1} + w F/C, and w = 0 where C = 0. Online EM learns w per order and bucket of C, T/C and
    neural entropy, all known before the target, so every q_k is a distribution.
    """

    guarded = True
    count_edges = (1, 2, 3, 5, 10, 30, 100, 1000)
    novelty_edges = (0.03, 0.1, 0.2, 0.35, 0.6, 1.0)
    entropy_edges = (1.0, 2.0, 3.0, 4.0, 5.0)
    novelty_bins = len(novelty_edges) + 2  # one more where T = C, one where T = 1

    def __init__(self, config: Config):
        super().__init__(config)
        shape = (config.ngram_order, (len(self.count_edges) + 1) * self.novelty_bins, len(self.entropy_edges) + 1)
        self.reached = np.full(shape, 1.1)  # targets that no higher order explained, and a prior
        self.taken = np.full(shape, 0.1)  # those of them that this order did, and a prior
        self.taken[:, : self.novelty_bins] = 0.0  # C = 0: nothing to take from

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
        chain = np.empty((orders + 1, len(block.logp)))
        chain[0] = np.exp(block.logp, dtype=np.float64)  # in fp32 it could be 0
        for k in range(orders):
            chain[k + 1] = chain[k] + weight[k] * (block.expert[k] - chain[k])
        return cell, weight, chain

    def mix(self, block: Evidence) -> np.ndarray:
        return np.log(self._chain(block)[2][-1])

    def update(self, block: Evidence) -> None:
        cell, weight, chain = self._chain(block)
        explained = weight * block.expert / chain[1:]  # posterior of order k for a target that reached it
        reached = np.ones_like(explained)
        reached[:-1] = np.cumprod(1 - explained[:0:-1], 0)[::-1]
        for tally, amount in ((self.reached, reached), (self.taken, reached * explained)):
            tally += np.bincount(cell.ravel(), amount.ravel(), tally.size).reshape(tally.shape)


class PublishedBackoffMixer(Mixer):
    """PR 1094: p = (1 - a) p_neural + a F/C of the highest order, 2..NGRAM_ORDER, with C >= NGRAM_MIN_COUNT.

    a = ALPHA_BASE + ALPHA_RANGE sigmoid(2 (H - ALPHA_CENTER)). With the published hashed counts, added every
    NGRAM_BLOCK targets, the result is no distribution.
    """

    def experts(self, counts: Iterable[NgramCounts]) -> Rows:
        total, followed, _ = next(counts := iter(counts))
        expert = (followed + 0.5) / (total + 0.5 * self.config.vocab_size)
        for seen, followed, _ in counts:
            share = np.minimum(followed, seen) / np.maximum(seen, 1)
            expert = np.where(seen >= self.config.ngram_min_count, share, expert)
        return [expert], []

    def mix(self, block: Evidence) -> np.ndarray:
        config = self.config
        alpha = config.alpha_base + config.alpha_range / (1 + np.exp(-2 * (block.entropy - config.alpha_center)))
        return np.log(np.maximum((1 - alpha) * np.exp(block.logp) + alpha * block.expert[0], 1e-12))


class HedgeMixer(Mixer):
    """PR 700: five experts weighted by exp(-MIXER_ETA · summed block-mean loss), neural alone for min_tokens.

    Neural model (log-weight 2 at the start), unigram and bigram (+0.1), trigram on 65,536 hashed rows (+0.01),
    and the Witten-Bell interpolation of orders 1-5. With ENTROPY_EXPERT the last is the neural entropy taken for a
    log-loss, as published, and the result no distribution.
    """

    min_tokens = 10_000

    def __init__(self, config: Config):
        super().__init__(config)
        self.log_weight = np.array([2.0, 0.0, 0.0, 0.0, 0.0])

    def counts(self, tokens: Tensor, probe: MassProbe | None = None) -> Iterator[NgramCounts]:
        row = torch.zeros_like(tokens)
        row[1:] = 27191 * tokens[:-1]
        row[2:] ^= 36313 * tokens[:-2]
        row &= 65535
        yield recount_group(tokens, row, probe) if probe else _count_order(tokens, _Groups.whole(tokens).split(row))[0]
        yield from iter_ngram_counts(tokens, 5, probe=probe)

    def experts(self, counts: Iterable[NgramCounts]) -> Rows:
        vocab_size = self.config.vocab_size
        trigram, *orders = counts
        smoothed = zip((0.1, 0.1, 0.01), (orders[0], orders[1], trigram))
        experts = [(followed + add) / (seen + add * vocab_size) for add, (seen, followed, _) in smoothed]
        fifth = np.asarray(1 / vocab_size)
        for seen, followed, distinct in orders:
            fifth = (followed + np.maximum(distinct, seen == 0) * fifth) / np.maximum(seen + distinct, 1)
        return [*experts, fifth], [orders[0].context_count >= self.min_tokens]

    def _losses(self, block: Evidence) -> np.ndarray:
        counted = -np.log(block.expert)
        return np.stack([-block.logp, *counted[:3], block.entropy if self.config.entropy_expert else counted[3]])

    def mix(self, block: Evidence) -> np.ndarray:
        log_weight = self.log_weight - np.logaddexp.reduce(self.log_weight)
        mixed = np.logaddexp.reduce(log_weight[:, None] - self._losses(block), 0)
        return np.where(block.bucket[0], mixed, block.logp)

    def update(self, block: Evidence) -> None:
        if block.bucket[0].all():
            self.log_weight -= self.config.mixer_eta * self._losses(block).mean(1)


def _bin(values: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    """How many of the edges each value reaches."""
    return np.add.reduce([values >= edge for edge in edges], 0, dtype=np.uint8)


class NgramCounts(NamedTuple):
    """What comes earlier says about each target under one n-gram order; (N,) int32 each."""

    context_count: np.ndarray  # C, occurrences of the target's context
    target_count: np.ndarray  # F, those of them that the target followed
    distinct: Any = None  # T, different tokens that followed; None for hashed counts


def iter_ngram_counts(tokens: Tensor, max_order: int, probe: MassProbe | None = None) -> Iterator[NgramCounts]:
    """Exact C, F and T of orders 1..max_order for every target tokens[i], int64, or for those of a probe.

    The context is the order-1 tokens before i; only earlier targets count. Targets with too few predecessors get
    zeros. Raises ConfigError where (context, token, position) exceeds 63 bits.
    """
    if probe:
        yield from recount_exact(tokens, max_order, probe)
        return
    contexts = _Groups.whole(tokens)
    for _ in range(max_order):
        counts, targets = _count_order(tokens, contexts)
        yield counts
        # A (context, token) is a context of the next order; one that came once never recurs.
        recurs = ~targets.head
        recurs[:-1] |= ~targets.head[1:]
        recurs &= targets.position < len(tokens) - 1
        contexts = _Groups(targets.position[recurs] + 1, targets.head[recurs])


def _count_order(tokens: Tensor, contexts: _Groups) -> tuple[NgramCounts, _Groups]:
    """C, F and T of the targets at contexts.position, and their groups by (context, target)."""
    targets = contexts.split(tokens)
    every = tokens.new_ones(1, dtype=torch.uint8).expand(len(tokens))
    new = torch.zeros_like(tokens, dtype=torch.uint8)
    new[targets.position] = targets.head.byte()
    seen, followed = contexts.earlier(every), targets.earlier(every)
    return NgramCounts(seen, followed, contexts.earlier(new)), targets


class _Groups(NamedTuple):
    """Positions (M,) int32 sorted by (group, position), and True where a group starts."""

    position: Tensor
    head: Tensor

    @classmethod
    def whole(cls, tokens: Tensor) -> _Groups:
        position = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)
        return cls(position, position == 0)

    def split(self, label: Tensor) -> _Groups:
        """Each group split by its positions' `label` (N,) ≥ 0. Raises ConfigError above 63 bits."""
        bits = len(label).bit_length()
        label_bits = int(label.max()).bit_length() if len(label) else 0
        if bits > 31 or int(self.head.sum()).bit_length() + label_bits + bits > 63:
            raise ConfigError(f"{len(label)} tokens of this vocabulary overflow 63-bit keys: set MIXER=none")
        key = self.head.cumsum(0).sub_(1)
        for part, width in ((label[self.position], label_bits), (self.position, bits)):
            key <<= width
            key |= part  # values alone are sorted: positions are their low bits
        key = _sorted(key)
        position = (key & ((1 << bits) - 1)).int()
        key >>= bits
        return _Groups(position, _heads(key))

    def earlier(self, weight: Tensor) -> np.ndarray:
        """Per position (N,), the `weight` (N,) of its group before it, int32; 0 elsewhere."""
        total = torch.zeros_like(weight, dtype=torch.int32)
        weight = weight[self.position]
        before = weight.cumsum(0, dtype=torch.int32) - weight
        total[self.position] = before - _at_start(before, self.head)
        return total.cpu().numpy()


def _sorted(keys: Tensor) -> Tensor:
    """Without the indices that torch would sort too, in three times the bytes, where NumPy can."""
    return keys.sort().values if keys.is_cuda else torch.from_numpy(np.sort(keys.numpy()))


def _heads(values: Tensor) -> Tensor:
    """True where a run of equal values starts."""
    head = torch.ones_like(values, dtype=torch.bool)
    head[1:] = values[1:] != values[:-1]
    return head


def _at_start(values: Tensor, head: Tensor) -> Tensor:
    """For each value the one at the start of its run."""
    return values[head][head.cumsum(0, dtype=torch.int32) - 1]


def recount_exact(tokens: Tensor, max_order: int, probe: MassProbe) -> Iterator[NgramCounts]:
    """Exact counts at the probe's positions by looking for each context: no sorting is trusted."""
    rows = []
    for position in probe.position.tolist():
        followers = [tokens[:position]]
        where = (tokens[: position - 1] == tokens[position - 1]).nonzero()[:, 0] + 1
        for order in range(2, max_order + 1):
            followers.append(tokens[where])
            where = where[where >= order]
            where = where[tokens[where - order] == tokens[max(position - order, 0)]]
        rows.append([torch.bincount(each, minlength=probe.vocab_size) for each in followers])
    return map(_tally, zip(*rows))


def recount_group(tokens: Tensor, group: Tensor, probe: MassProbe) -> NgramCounts:
    """The same where equal `group` (N,) means equal context."""
    followers = (tokens[:p][group[:p] == group[p]] for p in probe.position.tolist())
    return _tally([torch.bincount(each, minlength=probe.vocab_size) for each in followers])


def _tally(rows: Sequence[Tensor]) -> NgramCounts:
    """C (S, 1), F (S, V) and T (S, 1) from how often each token followed, S rows (V,)."""
    followed = torch.stack([*rows]).cpu().numpy()
    return NgramCounts(followed.sum(1, keepdims=True), followed, (followed > 0).sum(1, keepdims=True))


def iter_hashed_counts(
    tokens: Tensor, max_order: int, buckets: int, block: int, probe: MassProbe | None = None
) -> Iterator[NgramCounts]:
    """The colliding counts of PR 1094: C of context buckets, F of context+target buckets.

    Target tokens[i], i >= 1, is in block (i-1)//block; an n-gram within one block counts from the next on.
    """
    mask = buckets - 1
    block_of = torch.arange(-1, len(tokens) - 1, device=tokens.device).clamp_(min=0) // block
    where = probe.position[:, None] if probe else slice(None)
    target = torch.arange(probe.vocab_size, device=tokens.device) if probe else tokens
    for order in range(1, max_order + 1):
        context, multiplier = torch.zeros_like(tokens), HASH_MULTIPLIERS[(order - 1) % 7]
        for k in range(order - 1):  # what wraps around has no such context
            context ^= tokens.roll(order - 1 - k) * HASH_MULTIPLIERS[k % 7]
        counts, whole = [], block_of == block_of.roll(order - 1)
        whole[: order - 1] = False
        own = context[where]
        for added, asked in ((context, own), (context ^ tokens * multiplier, own ^ target * multiplier)):
            keys = _sorted(((added & mask) << 31 | block_of)[whole])  # a bucket's blocks side by side
            first = (asked & mask) << 31
            low, high = (torch.searchsorted(keys, key, out_int32=True) for key in (first, first | block_of[where]))
            counts.append((high - low).cpu().numpy())
        yield NgramCounts(*counts)


# 10. Machinery ----
# In: what is to be written, agreed on or survived. Out: the same answer on every rank, log lines, files that are whole
# or absent, and runs that go on where they stopped. One rank is a world without communication.
class Runtime:
    """Rank, device, collectives and signals of this process; as a context manager it joins and leaves the group."""

    GRACE_S = 25  # torchrun kills 30 s after its signal
    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, config: Config, environ: Mapping[str, str]):
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        place = (parse(name, environ.get(name, text), "int") for name, text in alone.items())
        self.rank, self.local_rank, self.world_size, self.local_world_size = place
        if not 0 <= self.rank < self.world_size:
            advice = "torchrun sets RANK from 0 to WORLD_SIZE - 1; unset both without it"
            raise ConfigError(f"RANK={self.rank} with WORLD_SIZE={self.world_size} cannot be: {advice}")
        self.attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "")
        self.timeout = datetime.timedelta(seconds=config.join_seconds)
        self.meeting_place = f"MASTER_ADDR={environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}"
        gpus = torch.cuda.device_count() if torch.cuda.is_available() and config.device != "cpu" else 0
        if config.device == "cuda" and not gpus:
            raise ConfigError("DEVICE=cuda, but torch finds no CUDA device; unset it or use DEVICE=cpu")
        if gpus and self.local_rank >= gpus:
            raise ConfigError(f"local rank {self.local_rank}, but {gpus} GPUs; lower --nproc_per_node")
        self.device = torch.device("cuda", self.local_rank) if gpus else torch.device("cpu")
        self.control_group: Any = None
        self.former_handlers = list[Any]()
        self.signal, self.signalled_at = 0, 0.0
        self.stop_at_once = False  # at a signal, where nothing worth saving is in the making

    @staticmethod
    def tell_error(text: str, environ: Mapping[str, str]) -> None:
        """The error in one line, with the rank where there are several; torchrun ends what it says with it."""
        rank = environ.get("RANK", "") * (environ.get("WORLD_SIZE", "1") != "1")
        when, line = datetime.datetime.now().timestamp(), f"error: {f'rank {rank}: ' * bool(rank)}{text}"
        if rank not in ("", "0"):  # rank 0 says what all find; its launcher ends the others
            time.sleep(2.0)
        sys.stderr.write(line + "\n")
        if path := environ.get("TORCHELASTIC_ERROR_FILE"):
            with suppress(OSError):
                Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": {"timestamp": when}}}))

    def __enter__(self) -> Runtime:
        if self.on_cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        else:
            keep_freed_memory()
        if self.world_size > 1:
            limit_s = self.timeout.total_seconds()
            text = f"rank {self.rank} waits for {self.world_size} ranks (WORLD_SIZE) at {self.meeting_place}, "
            text += f"{limit_s:g} s at most (JOIN_SECONDS)\n"
            announcement = threading.Timer(min(5.0, limit_s / 2), sys.stderr.write, [text])
            announcement.start()
            try:
                self._join()
            except (RuntimeError, OSError, ValueError) as error:
                advice = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose a network interface"
                raise UserError(f"cannot join the other ranks: {error}; {advice}") from error
            finally:
                announcement.cancel()
        self.former_handlers = [signal.signal(number, self._on_signal) for number in self.SIGNALS]
        return self

    def _join(self) -> None:
        backend, device_id = ("nccl", self.device) if self.on_cuda else ("gloo", None)
        # torchrun may keep its store over a restart, with addresses of the dead.
        store = dist.PrefixStore(f"attempt{self.attempt}", next(rendezvous("env://", timeout=self.timeout))[0])
        store.set(f"device{self.rank}", self.device.type)
        if len({store.get(f"device{rank}") for rank in range(self.world_size)}) > 1:  # waits for all of them
            advice = "DEVICE=cuda tells on which node CUDA fails, or use DEVICE=cpu on all"
            raise UserError(f"some ranks have a CUDA device, others none (this one: {self.device.type}); {advice}")
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world_size, device_id=device_id, timeout=self.timeout
        )
        # The clock travels over CPU: no rank waits for its GPU to learn what rank 0 decided.
        self.control_group = dist.group.WORLD if backend == "gloo" else dist.new_group(None, self.timeout, "gloo")

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        for number, handler in zip(self.SIGNALS, self.former_handlers):
            signal.signal(number, handler)
        if self.world_size > 1 and error is None:
            dist.barrier()  # no rank leaves while another still uses the connection
            self.control_group = None
            dist.destroy_process_group()
        elif self.world_size > 1 and not isinstance(error, (UserError, Stopped)):
            # Ranks that wait for this one go on only when its process is gone, so it does not wait for them.
            of_gloo = "gloo" in str(error)
            if isinstance(error, dist.DistError) or of_gloo:
                cause = "" if of_gloo else f", or: {' '.join(str(error).split())[:600]}"
                sys.stderr.write(f"rank {self.rank} stops: another rank has ended{cause}\n")
            else:
                traceback.print_exception(error)
                sys.stderr.write(f"error: rank {self.rank}: {type(error).__name__}: {error}\n")
            os._exit(1)

    def _on_signal(self, number: int, _frame: object) -> None:
        """Ask for a stop at the next boundary; a second signal ends the process at once.

        Under a launcher, which repeats signals, it comes a second later, and an alarm ends a rank that cannot stop.
        """
        if not (self.attempt or self.world_size > 1):
            for each in self.SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        elif not self.signal:
            signal.alarm(self.GRACE_S)
        elif time.monotonic() > self.signalled_at + 1:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self.signalled_at = number, time.monotonic()
        if self.stop_at_once:
            raise Stopped(number)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> Any:
        """Start summing `full` over ranks into this rank's `shard`; wait on the result before reading it."""
        return getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(shard, full, async_op=True)

    def all_gather(self, full: Tensor, shard: Tensor) -> Any:
        return getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(full, shard, async_op=True)  # torch 2.13

    def from_main(self, *values: float) -> list[float]:
        """Rank 0's numbers, on every rank."""
        return self.agree(partial(dist.broadcast, src=0), values)

    def largest(self, *values: float) -> list[float]:
        """The largest over all ranks of each number."""
        return self.agree(partial(dist.all_reduce, op=dist.ReduceOp.MAX), values)

    def agree(self, collective: Callable[..., Any], values: Sequence[float]) -> list[float]:
        carrier = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            collective(carrier, group=self.control_group)
        return carrier.tolist()

    def bytes_from_main(self, content: bytes) -> bytes:
        size = int(self.from_main(len(content))[0])
        if self.world_size == 1 or size == 0:
            return content
        carrier = torch.frombuffer(bytearray(content or size), dtype=torch.uint8)
        dist.broadcast(carrier, src=0, group=self.control_group)
        return carrier.numpy().tobytes()

    def require_same(self, what: str, text: str) -> None:
        """Raises ConfigError, on every rank, unless the text is the same on all."""
        number = int(digest_of(text)[:12], 16)
        if sum(self.largest(number, -number)):  # the largest less the smallest
            raise ConfigError(f"the ranks have different {what}; give every node the same variables, data and code")

    def progress(self, share: float = 0, text: str = "") -> None:
        """A bar on rank 0's terminal; without a text none."""
        if self.is_main and sys.stderr.isatty():
            bar = f"[{'#' * int(30 * share):.<30}] {text}"
            sys.stderr.write("\x1b[2K\r" + bar * bool(text))  # clears the line
            sys.stderr.flush()

    def share(self, count: int) -> range:
        """This rank's contiguous part of range(count)."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def describe(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.on_cuda else cpu_name()
        return dict(
            python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
            world_size=self.world_size, device=self.device.type, hardware=name, threads=torch.get_num_threads(),
        )

    def peak_memory(self) -> tuple[str, State]:
        """The log's line, and the same for machines."""
        told, text = dict(peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10), "(process, resident)"
        if self.on_cuda:
            told = dict(peak_mib=torch.cuda.max_memory_allocated() >> 20)
            told["reserved_mib"] = torch.cuda.max_memory_reserved() >> 20
            text = f"reserved: {told['reserved_mib']} MiB"
        return f"peak memory allocated: {told['peak_mib']} MiB {text}", told


def follow_machine(config: Config, runtime: Runtime, log: RunLog) -> Config:
    """The config with what the machine decides where nothing is set; the same on every rank."""
    [loses] = runtime.largest(float(not bf16_pays(runtime.device)))
    dtype = ("fp32" if loses else "bf16") if config.compute_dtype == "auto" else config.compute_dtype
    [negated_tokens] = runtime.largest(-fitting_tokens(config, runtime, COMPUTE_DTYPES[dtype].itemsize))
    tokens = config.micro_batch_tokens or int(-negated_tokens)
    log.row("machine", compute_dtype=dtype, bf16_pays=int(not loses), micro_batch_tokens=tokens)
    return replace(config, compute_dtype=dtype, micro_batch_tokens=tokens)


def bf16_pays(device: torch.device) -> bool:
    """Whether matrix products are much faster in bf16. A CPU is timed, as native bf16 may be slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    best_s = dict.fromkeys(COMPUTE_DTYPES.values(), math.inf)
    for dtype in [*best_s] * 4:
        rows, began = torch.ones(2048, 512, dtype=dtype), time.perf_counter()
        F.linear(rows, rows[:512])
        best_s[dtype] = min(best_s[dtype], time.perf_counter() - began)
    return 1.2 * best_s[torch.bfloat16] < best_s[torch.float32]


def fitting_tokens(config: Config, runtime: Runtime, itemsize: int) -> int:
    """Tokens whose forward and backward pass fits this rank's share of all memory, free or not, so always the same."""
    most, memory = 4096, 0.5 * cpu_memory() / runtime.local_world_size  # see docs/one_gpu.md
    if runtime.device.type == "cuda":
        most, memory = MOST_TOKENS, 0.9 * torch.cuda.get_device_properties(runtime.device).total_memory
    layers = config.num_layers + len(config.repeat_layers)
    per_token = layers * (24 * config.model_dim + 6 * config.mlp_dim) * itemsize
    per_token += (1 + config.mtp_num_heads) * config.vocab_size * 20
    return max(min(int(memory / per_token), most), config.train_seq_len)


def keep_freed_memory() -> None:
    """Have glibc keep it: to fetch it again takes a CPU 4 to 12 % of a step (bench/cpu_step.py)."""
    with suppress(AttributeError, TypeError):  # another C library
        for option, value in ((-1, -1), (-4, 0)):  # M_TRIM_THRESHOLD, M_MMAP_MAX
            ctypes.CDLL(None).mallopt(option, value)


def cpu_memory() -> float:
    """Bytes of this machine or of the container around it."""
    with suppress(OSError, ValueError):  # ValueError: a container without a limit
        return float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def cpu_name() -> str:
    with suppress(OSError):
        if named := re.search(r"^model name\s*:(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M):
            return named[1].strip()
    return platform.machine()


class RunLog:
    """Greppable `key:value` lines on the console and in logs/<run>.txt, and the same numbers as JSONL, by rank 0."""

    def __init__(self, config: Config, runtime: Runtime):
        self.runtime = runtime
        self.failed = set[str]()  # files not written
        self.run_id = ""  # names the logs and the folder of the checkpoints
        if not runtime.is_main:
            return
        folder = Path(config.out_dir) / "logs"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.run_id, self.text_file = claim_run(config, folder)
            self.json_file = (folder / f"{self.run_id}.jsonl").open("a", encoding="utf-8")
            for file in (self.text_file, self.json_file):  # they are this run's alone by now
                if os.path.isfile(file.name):  # cut a killed process's unfinished line
                    file.truncate(Path(file.name).read_bytes().rfind(b"\n") + 1)
                    file.seek(0, os.SEEK_END)
        except OSError as error:
            raise ConfigError(f"cannot write logs to {folder} (OUT_DIR, RUN_ID): {error.strerror}") from error
        if not self.text_file.tell():
            sources = [f"===== {path.name} =====\n{path.read_text(encoding='utf-8')}\n" for path in code_paths()]
            self._write(self.text_file, "".join(sources) + "===== log =====\n")

    def line(self, text: str) -> None:
        if self.runtime.is_main:
            self.runtime.progress()
            for file in (sys.stdout, self.text_file):
                self._write(file, text + "\n")

    def _write(self, stream: TextIO, text: str) -> None:
        """A log or console that cannot be written does not cost the run: it is said once."""
        encoding = stream.encoding or "utf-8"  # a path may hold what it cannot show
        try:
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()
        except OSError as error:
            if stream.name not in self.failed:
                self.failed.add(stream.name)
                self._write(sys.stderr, f"warning: cannot write the log {stream.name}: {error.strerror}; it goes on\n")

    def row(self, event: str, note: str = "", head: str = "", told: State | None = None, **fields: Any) -> None:
        """One event as `event key:value … note` and as JSON; `train_time_ms=1.0` shows `train_time:1ms`.

        The line begins with `head` where one is given; `told` is for machines alone.
        """
        shown = (_key_value(name, value, 8 if event.endswith("_exact") else 4) for name, value in fields.items())
        self.line(" ".join(filter(None, [head or event, *shown, note])))
        self.tell(event, **(told or {}), **fields, **({"note": note} if note else {}))

    def tell(self, event: str, **fields: Any) -> None:
        """One event as JSON alone."""
        if self.runtime.is_main:
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            self._write(self.json_file, json.dumps({"event": event, "time": now, **fields}) + "\n")

    def close(self) -> None:
        if self.runtime.is_main:
            self.runtime.progress()
            for file in (self.text_file, self.json_file):
                with suppress(OSError):  # already reported
                    file.close()


def _key_value(name: str, value: Any, digits: int) -> str:
    if name.endswith("_ms"):
        return f"{name[:-3]}:{value:.{2 if name == 'step_avg_ms' else 0}f}ms"
    if name.endswith("_s"):
        return f"{name[:-2]}:{value:.1f}s"
    if isinstance(value, float):
        tiny = 0 < abs(value) < 10.0**-digits
        return f"{name}:{value:.3g}" if tiny else f"{name}:{value:.{digits}f}"
    return f"{name}:{value}"


def claim_run(config: Config, folder: Path) -> tuple[str, TextIO]:
    """A name that no other run has, and its log in `folder`, locked; with RESUME those of the run that goes on.

    Without RUN_ID the name says recipe, seed and training settings; where it is taken a number follows. Raises OSError.
    """
    settings = config.without(*(name for name in vars(config) if name.startswith(NOT_TRAINING)))
    base = config.run_id or f"{config.recipe}_seed{config.seed}_{digest_of(settings.to_json())[:6]}"
    saved, logs = folder.parent / "checkpoints", list[Path]()
    if config.resume:
        owner = re.escape(Path(config.resume).parent.name)
        names = re.compile(re.escape(base) if config.run_id else owner or f"{re.escape(base)}(_[0-9]+)?")
        logs = [path for path in folder.glob("*.txt") if names.fullmatch(path.stem)]
        # First one that left something to go on from, then the newest.
        left = "evaluation_*" if config.eval_only else "*_step*"
        logs.sort(key=lambda path: (any((saved / path.stem).glob(left)), path.stat().st_mtime), reverse=True)
    numbered = (folder / f"{base}_{number}.txt" for number in itertools.count(2))
    for path in itertools.chain(logs, [folder / f"{base}.txt"], numbered):
        if config.resume or not (saved / path.stem).exists():
            with suppress(FileExistsError):
                file = path.open("a" if path in logs else "x", encoding="utf-8")
                if try_lock(file):
                    return path.stem, file
                file.close()  # that run goes on elsewhere
    raise AssertionError("some number is free")


def try_lock(file: TextIO) -> bool:
    """Lock a file until this process ends; false when another has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def replace_closed_streams() -> None:
    """A console that was closed before the start (`>&-`) takes nothing."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def digest_of(*parts: Any) -> str:
    """SHA-256 over files (Path), arrays, bytes and text."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part)
    return total.hexdigest()


State = dict[str, Any]  # tensors, numbers, text, lists and further states, by name
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # of odd JSON and tensors
SEAL = "~seal"  # a checkpoint's last tensor, 32 bytes: so the sealed file is still plain safetensors


class Checkpoints:
    """The checkpoints of this run, in OUT_DIR/checkpoints/<run>, written by a thread of rank 0.

    The newest CHECKPOINT_KEEP stay. What cannot be written is reported, and the run goes on.
    """

    def __init__(self, config: Config, runtime: Runtime, log: RunLog):
        self.config, self.runtime, self.log = config, runtime, log
        self.folder = Path(config.out_dir) / "checkpoints" / log.run_id
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None
        self.cost: dict[str, Any] = {}
        self.newest = ""  # path of the last one that is whole

    def numbered(self) -> list[Path]:
        """Training's files, `NNNNNN_stepS.safetensors`, in the order of writing."""
        return sorted(path for path in self.folder.glob("*") if re.fullmatch(r"\d+_step\d+\.safetensors", path.name))

    def save_step(self, step: int, state: State, began: float) -> None:
        """Save the state of training, for which the caller has waited since `began`."""
        self.finish()  # the file before has its number by then
        number = 1 + max((int(path.name.partition("_")[0]) for path in self.numbered()), default=0)
        self.save(self.folder / f"{number:06d}_step{step}.safetensors", state, began)

    def save(self, path: Path, state: State, began: float) -> None:
        """Begin to write on rank 0, once the file before is done."""
        if not self.runtime.is_main:
            return
        self.finish()
        copied = copied_to_cpu(state)  # the run goes on while the thread writes
        self.cost = dict(stall_ms=1000 * (time.perf_counter() - began), file=str(path))
        self.pending = self.writer.submit(self._write, path, copied)

    def _write(self, path: Path, state: State) -> None:
        began = time.perf_counter()
        with whole_file(path) as temporary:
            write_state(temporary, state)
        for old in self.numbered()[: -self.config.checkpoint_keep]:
            old.unlink()
        self.cost |= dict(bytes=path.stat().st_size, write_s=time.perf_counter() - began)

    def finish(self) -> None:
        """Wait for what is being written, and log what it cost."""
        if self.pending is None:
            return
        try:
            self.pending.result()
            self.newest = self.cost["file"]
            self.log.row("checkpoint", **self.cost)
        except OSError as error:
            self.log.row("checkpoint_failed", f"{error.strerror}: free space, or set OUT_DIR", file=self.cost["file"])
        self.pending = None

    def find(self, candidates: Iterable[Path]) -> State | None:
        """The first whole one of the files, on every rank; `newest` is its path.

        Raises CheckpointError when RESUME's own is not whole.
        """
        content, state = b"", None
        for path in candidates if self.runtime.is_main else ():
            try:
                found = path.read_bytes()
                state, content, self.newest = read_state(found, path), found, str(path)
                break
            except (OSError, CheckpointError) as error:
                text = f"cannot read {path} (RESUME): {error.strerror}" if isinstance(error, OSError) else str(error)
                if path == Path(self.config.resume):
                    raise CheckpointError(text) from error
                self.log.row("checkpoint_skipped", text)
        content = self.runtime.bytes_from_main(content)
        return state if self.runtime.is_main or not content else read_state(content, "rank 0's checkpoint")

    def say_stopped(self, number: int, **where: Any) -> None:
        self.finish()
        note = "RESUME=auto goes on from there"
        self.log.row("stopped", note, signal=signal.Signals(number).name, **where, checkpoint=self.newest or "none")


def copied_to_cpu(value: Any) -> Any:
    """A copy that later steps leave alone: tensors on the CPU, all else as JSON has it."""
    if isinstance(value, dict):
        return {name: copied_to_cpu(inner) for name, inner in value.items()}
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    return json.loads(json.dumps(value))


def write_state(path: Path, state: State) -> None:
    """A sealed safetensors file: tensors by their path in the state, all else as its metadata. Raises OSError."""
    library = require("safetensors.torch", "a checkpoint")
    leaves = flattened(state)
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    rest = {name: leaf for name, leaf in leaves.items() if name not in tensors}
    tensors[SEAL] = torch.zeros(32, dtype=torch.uint8)
    for left in (*path.parent.glob(".tmp*"), *path.parent.glob("*.partial")):  # of this run when it was killed
        left.unlink()
    try:
        library.save_file(tensors, path, as_metadata(rest))
    except importlib.import_module("safetensors").SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error
    digest = hashlib.sha256(np.memmap(path, np.uint8, "r")[:-32].data).digest()
    with path.open("rb+") as file:
        file.seek(-32, os.SEEK_END)
        file.write(digest)


def as_metadata(content: Mapping[str, Any]) -> dict[str, str]:
    """One entry: safetensors writes several in a random order, and files of one content would differ."""
    return {"train_gpt": json.dumps(content, sort_keys=True)}


def read_state(content: bytes, source: object) -> State:
    """Undo `write_state`. Raises CheckpointError when any byte is missing or altered."""
    try:
        unseal(content)
        tensors, rest = read_safetensors(content)
        del tensors[SEAL]
        return nested(tensors | rest)
    except MALFORMED:
        raise CheckpointError(f"{source} is torn, altered or no checkpoint of this project") from None


def unseal(content: bytes) -> bytes:
    """Undo `sealed`. Raises ValueError for what it did not make."""
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ValueError("it does not end in its own SHA-256")
    return content[:-32]


def sealed(content: bytes) -> bytes:
    """The content and its SHA-256, which tells every changed, missing or added byte."""
    return content + hashlib.sha256(content).digest()


def read_safetensors(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what `as_metadata` was given. Raises one of MALFORMED."""
    library = require("safetensors.torch", "reading artifacts and checkpoints")
    try:
        tensors = library.load(content)
    except importlib.import_module("safetensors").SafetensorError as error:
        raise ValueError(str(error)) from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, json.loads(header["__metadata__"]["train_gpt"])


def flattened(state: State, prefix: str = "") -> dict[str, Any]:
    """Every leaf, and every empty part, of a state by its path `outer/inner/name`."""
    leaves = dict[str, Any]()
    for name, value in state.items():
        inner = isinstance(value, dict) and value
        leaves |= flattened(value, f"{prefix}{name}/") if inner else {prefix + name: value}
    return leaves


def nested(leaves: Mapping[str, Any]) -> State:
    """Undo `flattened`; all names are text now. Raises one of MALFORMED."""
    state: State = {}
    for path, leaf in leaves.items():
        *outer, name = path.split("/")
        node = state
        for part in outer:
            node = node.setdefault(part, {})
        node[name] = leaf
    return state


def kind_of(leaf: Any) -> object:
    """What two leaves must share for one to take the other's place."""
    return f"tensor {[*leaf.shape]}" if isinstance(leaf, Tensor) else float if type(leaf) is int else type(leaf)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that is never seen in part, nor lost once it is there. Raises OSError."""
    path = Path(os.path.realpath(path))  # a symbolic link stays, and the file that it names is written
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


class FinishedStages:
    """Results of an evaluation's finished stages: a restart with RESUME does not repeat them.

    Kept, until all are, beside the run's checkpoints under `identity`: artifact, text, settings, code, world size.
    """

    def __init__(self, checkpoints: Checkpoints, identity: str):
        self.checkpoints = checkpoints
        self.path = checkpoints.folder / f"evaluation_{identity[:16]}.safetensors"
        state = checkpoints.find([self.path] if checkpoints.config.resume and self.path.exists() else [])
        self.results = list[list[float]]()  # summed logp and seconds of each finished stage
        self.scores: TokenScores  # of the last one
        if state is not None:  # of this code, as the file's name says
            self.results = state["results"]
            self.scores = TokenScores(**{name: tensor.numpy() for name, tensor in state["scores"].items()})
            checkpoints.log.row("resumed_evaluation", stages=len(self.results))

    def add(self, scores: TokenScores, seconds: float) -> None:
        began, self.scores = time.perf_counter(), scores
        self.results.append([float(scores.logp.sum(dtype=np.float64)), seconds])
        tensors = {name: torch.from_numpy(array) for name, array in scores._asdict().items()}
        self.checkpoints.save(self.path, dict(results=self.results, scores=tensors), began)

    @contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """Within it a signal ends the run where it stands, its finished stages written down."""
        runtime = self.checkpoints.runtime
        try:
            runtime.stop_at_once = True
            if runtime.signal:
                raise Stopped(runtime.signal)
            yield
        except Stopped as stop:
            runtime.stop_at_once = False  # a second signal must not end what follows
            self.checkpoints.say_stopped(stop.args[0], stage=len(self.results) + 1)
            raise
        finally:
            runtime.stop_at_once = False

    def forget(self) -> None:
        self.checkpoints.finish()
        if self.checkpoints.runtime.is_main:
            with suppress(OSError):
                self.path.unlink()
                self.path.parent.rmdir()  # fails where training has left something
                self.path.parent.parent.rmdir()


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # already reported
            stream.flush()
    os._exit(exit_code)  # gloo's threads can abort a process that ends by itself
