"""Helpers of the tests: shards and text on disk, settings of a run that takes seconds, and ways to start one."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "train_gpt.py"
TINY_VOCAB = 384  # 4 control and 256 byte pieces leave 124 for letters and merges
VAL_TARGETS = 1100  # targets of the tiny validation split; no multiple of any window or stride used here

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
        RECIPE="leaky", RUN_ID="run", DEVICE="cpu", DATA_PATH=tiny_data, TOKENIZER_PATH=tiny_data / "tokenizer.model",
        OUT_DIR=out_dir, VOCAB_SIZE=TINY_VOCAB, NUM_LAYERS=3, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, MLP_MULT=2,
        BIGRAM_VOCAB_SIZE=64, BIGRAM_DIM=8, XSA_LAST_N=1, ROPE_DIMS=4, ROPE_TRAIN_LEN=16, VE_DIM=8, VE_LAYERS="1,2",
        MTP_NUM_HEADS=1, TRAIN_SEQ_LEN=32, TRAIN_BATCH_TOKENS=12 * 32, MICRO_BATCH_TOKENS=4 * 32, ITERATIONS=20,
        WARMUP_STEPS=0, WARMDOWN_ITERS=10, MAX_WALLCLOCK_SECONDS=0, MUON_MOMENTUM_WARMUP_STEPS=10, EMA_DECAY=0.9,
        TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=0, EVAL_SEQ_LEN=32, EVAL_STRIDE=8, EVAL_BATCH_SEQS=16,
    )  # fmt: skip
    settings |= overrides
    machine = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT", "TMPDIR") if name in os.environ}
    machine |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"}
    return machine | {name: str(value) for name, value in settings.items() if value is not None}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_script(
    environ: dict[str, str], nproc: int = 1, timeout_s: float = 120, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run train_gpt.py as a user does: by itself, or for several ranks under torchrun on this machine."""
    command = [sys.executable]
    if nproc > 1:
        command += ["-m", "torch.distributed.run", "--nnodes=1", "--node_rank=0", "--master_addr=127.0.0.1"]
        command += [f"--master_port={free_port()}", f"--nproc_per_node={nproc}"]
    command.append(str(SCRIPT))
    return subprocess.run(
        command, env=environ, cwd=cwd, capture_output=True, encoding="utf-8", timeout=timeout_s, check=False
    )


def run_two_nodes(environs: Sequence[dict[str, str]], timeout_s: float = 120) -> list[subprocess.CompletedProcess[str]]:
    """One rank on each of two nodes that share no disk: two torchruns on this machine that meet at a port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", str(SCRIPT)]
    pipe, deadline = subprocess.PIPE, time.monotonic() + timeout_s
    nodes = [subprocess.Popen(command, env=e, stdout=pipe, stderr=pipe, encoding="utf-8") for e in environs]
    with ThreadPoolExecutor(len(nodes)) as pool:
        try:
            said = list(pool.map(lambda node: node.communicate(timeout=deadline - time.monotonic()), nodes))
        finally:
            for node in nodes:
                node.kill()
    return [subprocess.CompletedProcess(command, node.returncode, *texts) for node, texts in zip(nodes, said)]


class Run(NamedTuple):
    """A finished run: the environment it had and what its process left."""

    environ: dict[str, str]
    process: subprocess.CompletedProcess[str]

    @property
    def out_dir(self) -> Path:
        return Path(self.environ["OUT_DIR"])

    @property
    def artifact(self) -> Path:
        return self.out_dir / "final_model.int6.ptz"

    @property
    def log(self) -> str:
        return (self.out_dir / "logs" / "run.txt").read_text(encoding="utf-8")

    @property
    def events(self) -> list[dict[str, Any]]:
        return read_events(self.out_dir / "logs" / "run.jsonl")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def events_of(environ: dict[str, str]) -> list[dict]:
    return read_events(Path(environ["OUT_DIR"]) / "logs" / "run.jsonl")


def event(events: Iterable[dict[str, Any]], name: str) -> dict[str, Any]:
    """The only row of that name."""
    found = [row for row in events if row["event"] == name]
    assert len(found) == 1, f"{len(found)} rows {name!r}"
    return found[0]


def train_rows(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of training steps."""
    return [row for row in events if "train_loss" in row]


def formula_values(name: str, shape: Sequence[int], center: float | np.ndarray = 0.0, amp: float = 1.0) -> np.ndarray:
    """float32 numbers defined by a name alone, those that the golden vectors were made with."""
    x = (np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.uint64) + zlib.crc32(name.encode())) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x045D9F3B)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(16)
    uniform = x.astype(np.float64) / 2.0**31 - 1
    return np.asarray(center + amp * uniform.reshape(shape), dtype=np.float32)


def _shared_folders() -> list[Path]:
    """Where files may lie that are not part of the repository: $SHARED_DIR, or ../shared."""
    named = [Path(os.environ["SHARED_DIR"])] if "SHARED_DIR" in os.environ else []
    return [folder for root in (*named, REPO.parent / "shared") for folder in (root, root / "data", root.parent)]


def golden_folder() -> Path | None:
    """The reference vectors: beside the tests, or in a shared folder."""
    folders = [REPO / "tests" / "golden", *(folder / "golden" for folder in _shared_folders())]
    return next((folder for folder in folders if (folder / "sliding.json").exists()), None)


def shared_data(name: str) -> Path | None:
    """A data file that is not part of the repository."""
    return next((folder / name for folder in _shared_folders() if (folder / name).exists()), None)


def assert_refused(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], argv: Sequence[object], *words: str
) -> None:
    """The command ends with exit code 2 and one line on stderr that holds all of `words`."""
    capsys.readouterr()
    assert main([str(arg) for arg in argv]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr


def artifact_parts(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and stored tensors of an artifact, as they are, for a test to change."""
    import safetensors.torch

    import train_gpt

    payload = train_gpt.decompress(content[: -len(train_gpt.seal(b""))])
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    return json.loads(header["__metadata__"]["train_gpt"]), safetensors.torch.load(payload)


def artifact_of(metadata: Any, tensors: dict[str, Any]) -> bytes:
    """A sound frame and checksum around these."""
    import safetensors.torch

    import train_gpt

    payload = safetensors.torch.save(tensors, {"train_gpt": json.dumps(metadata)})
    return train_gpt.seal(train_gpt.compress(payload, "zstd"))
