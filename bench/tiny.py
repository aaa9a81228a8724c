"""Whole runs of seconds: text, tokenizer and shards made here, tiny settings, and the command that starts ranks.

What the test suite and the fault campaign train on; neither needs a file that is not in the repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "train_gpt.py"
TINY_VOCAB = 384  # 4 control and 256 byte pieces leave 124 for letters and merges

WORD_TEXT = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what up its about "
    "model token byte stream window score language river mountain winter letter garden market history music science"
)
UNICODE_TEXT = "naïve Zürich façade Ελλάδα Москва 東京 日本語 € “quoted” 😀 👩‍👩‍👧 ½ ﬁne"
WORDS, UNICODE_WORDS = WORD_TEXT.split(), UNICODE_TEXT.split()


def make_documents(seed: int, count: int) -> list[str]:
    """English-like documents of some dozen words, a few of them not ASCII."""
    source = random.Random(seed)
    weights = [1 / (rank + 2) for rank in range(len(WORDS))]
    documents = []
    for _ in range(count):
        sentences = []
        for _ in range(source.randint(1, 5)):
            words = source.choices(WORDS, weights, k=source.randint(3, 12))
            if source.random() < 0.3:
                words.insert(source.randrange(len(words)), source.choice(UNICODE_WORDS))
            sentences.append(" ".join(words).capitalize() + source.choice((".", "?", "!")))
        documents.append(" ".join(sentences))
    return documents


def train_tokenizer(path: Path, vocab_size: int, **options: Any) -> None:
    """A byte-fallback BPE model with the ids that data/prepare.py uses: pad 0, BOS 1, EOS 2, unknown 3."""
    import sentencepiece

    settings: dict[str, Any] = dict(
        model_type="bpe", vocab_size=vocab_size, character_coverage=0.98, byte_fallback=True, split_digits=True,
        add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, num_threads=1, minloglevel=2,
    )  # fmt: skip
    with path.open("wb") as file:
        texts = iter(make_documents(7, 400))
        settings |= options
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=file, **settings)


def tokenizer_pieces(path: Path) -> list[str]:
    """The text of every id of a SentencePiece model."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [model.id_to_piece(i) for i in range(model.vocab_size())]


def write_shard(
    path: Path, tokens: Sequence[int] | np.ndarray, *, magic: int = 20240520, version: int = 1, count: int | None = None
) -> Path:
    """One token shard: 256 int32 (magic, version, count), then uint16 tokens."""
    tokens = np.asarray(tokens, dtype="<u2")
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return path


def tiny_environ(tiny_data: Path, out_dir: Path, **overrides: object) -> dict[str, str]:
    """The whole environment of a run of a few seconds on the CPU. An override of None unsets a variable."""
    settings: dict[str, object] = dict(
        RECIPE="leaky", RUN_ID="run", DEVICE="cpu", COMPUTE_DTYPE="fp32", DATA_PATH=tiny_data,
        TOKENIZER_PATH=tiny_data / "tokenizer.model", OUT_DIR=out_dir, VOCAB_SIZE=TINY_VOCAB,
        NUM_LAYERS=3, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, MLP_MULT=2,
        BIGRAM_VOCAB_SIZE=64, BIGRAM_DIM=8, XSA_LAST_N=1, ROPE_DIMS=4, ROPE_TRAIN_LEN=16, VE_DIM=8, VE_LAYERS="1,2",
        MTP_NUM_HEADS=1, TRAIN_SEQ_LEN=32, TRAIN_BATCH_TOKENS=12 * 32, MICRO_BATCH_TOKENS=4 * 32, ITERATIONS=20,
        WARMUP_STEPS=0, WARMDOWN_ITERS=10, MAX_WALLCLOCK_SECONDS=0, MUON_MOMENTUM_WARMUP_STEPS=10, EMA_DECAY=0.9,
        TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=0, EVAL_SEQ_LEN=32, EVAL_STRIDE=8, EVAL_BATCH_SEQS=16,
    )  # fmt: skip
    settings |= overrides
    machine = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT", "TMPDIR") if name in os.environ}
    machine |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"}
    return machine | {name: str(value) for name, value in settings.items() if value is not None}


def torchrun(nproc: int, *program: object, restarts: int = 0, options: Sequence[str] = ()) -> list[str]:
    """The command line that starts a program (a script and its arguments) as so many ranks on this machine.

    torchrun finds a free port by itself, so any number of jobs may start at the same time. `options` replace
    `--standalone` where several launchers are to meet.
    """
    command = [sys.executable, "-m", "torch.distributed.run", *(options or ["--standalone"]), "--local-addr=127.0.0.1"]
    return [*command, f"--nproc_per_node={nproc}", f"--max-restarts={restarts}", *map(str, program)]


def sealed(stream: bytes) -> bytes:
    """The stream, the head of a frame that zstd decoders skip, and the SHA-256 of both: how an artifact ends."""
    body = stream + b"\x50\x2a\x4d\x18" + (32).to_bytes(4, "little")
    return body + hashlib.sha256(body).digest()


def artifact_payload(content: bytes) -> bytes:
    """The safetensors file in an artifact of COMPRESSOR=zstd or brotli."""
    import brotli
    import zstandard

    stream, brotli_magic = content[:-40], b"\xce\xb2\xcf\x81"
    if stream.startswith(brotli_magic):
        return brotli.decompress(stream.removeprefix(brotli_magic))
    return zstandard.ZstdDecompressor().decompress(stream)


def artifact_parts(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and stored tensors of an artifact, as they are, for somebody to change."""
    import safetensors.torch

    payload = artifact_payload(content)
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    return json.loads(header["__metadata__"]["train_gpt"]), safetensors.torch.load(payload)


def save_artifact(model: Any, tokenizer_digest: str, path: Path, hessians: Any = None, log: Any = None) -> int:
    """Pack and write a model; returns the bytes of the file."""
    import train_gpt

    packed = train_gpt.pack_artifact(model, tokenizer_digest, hessians, log)
    train_gpt.write_artifact_file(path, packed)
    return len(packed)


def artifact_of(metadata: Any, tensors: dict[str, Any]) -> bytes:
    """A sound frame and checksum around these."""
    import safetensors.torch
    import zstandard

    payload = safetensors.torch.save(tensors, {"train_gpt": json.dumps(metadata)})
    return sealed(zstandard.ZstdCompressor(write_checksum=True).compress(payload))
