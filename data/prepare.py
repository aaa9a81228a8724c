"""Turn text into a tokenizer and token shards that `train_gpt.py` reads.

    python data/prepare.py corpus.jsonl.zst --out runs/corpus --train-tokenizer 1024
    python data/prepare.py train.parquet --val val.jsonl --tokenizer english.model --out runs/english
    python data/prepare.py --check runs/corpus

Without --val a share of the documents is taken for validation. A plain text file is one document; where that leaves
a split empty, long documents are cut at paragraph ends.

The folder then holds `tokenizer.model`, `{name}_train_000000.bin` …, `{name}_val_000000.bin` …, `kg_blob.txt`, the
knowledge graph for a tokenizer that kg_data.py is not for, and `manifest.json`, which is written last: a folder
without it is not complete. The result depends on the input and the settings alone, not on the number of worker
processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import heapq
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which an isolated start (python -I) leaves out
from documents import describe_passed_over, find_files, read_documents
from knowledge_graph import KG_BLOB, write_blob
from prepared_folder import (
    FORMAT,
    SPLITS,
    TOKENIZER,
    Counts,
    check,
    check_output,
    describe_blob,
    publish,
    staging_folder,
)
from shards import (
    MAX_TOKEN,
    ArgumentParser,
    DataError,
    ShardWriter,
    atomic_file,
    run_command,
    say,
)
from tokenizer import Tokenizer, train_tokenizer
from tqdm import tqdm

SPLIT_SEED = b"parameter-golf-split-v1"
DEFAULT_PIECES = 1024
DEFAULT_VAL_FRACTION = 0.02
SHARD_TOKENS = 100_000_000
SAMPLE_BYTES = 30_000_000
SAMPLE_BLOCK_CHARS = 1 << 16
BATCH_CHARS = 1 << 20
BATCHES_AHEAD = 3
PARTS = 200  # about as many parts are wanted where documents have to be cut, of so many characters at least and at most
PART_CHARS = (500, 20_000)
PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n\s*")


@dataclass(frozen=True)
class Settings:
    """What to prepare. `tokenizer` wins over `train_pieces`; `val` wins over `val_fraction`.

    `inputs` and `val` are files or folders, `shard_tokens` the length of a full shard, `text_field` the JSON
    field or Parquet column, `name` the start of every shard's file name. `keep_whitespace` trains a tokenizer that
    loses nothing; `skip_unreadable` goes on without files that cannot be read.
    """

    inputs: Sequence[Path]
    out: Path
    val: Sequence[Path] = ()
    tokenizer: Path | None = None
    train_pieces: int = DEFAULT_PIECES
    val_fraction: float = DEFAULT_VAL_FRACTION
    shard_tokens: int = SHARD_TOKENS
    text_field: str = "text"
    workers: int = 1
    name: str = "text"
    overwrite: bool = False
    keep_whitespace: bool = False
    skip_unreadable: bool = False

    def validate(self) -> None:
        """Raises DataError naming the first value that cannot be used."""
        if not self.inputs:
            raise DataError("no input given; name at least one file or folder of text")
        if not self.val and not 0 < self.val_fraction < 1:
            raise DataError(f"--val-fraction {self.val_fraction:g} is not between 0 and 1; use 0.02, say")
        if not 1 <= self.shard_tokens < 2**31:  # the header's count is an int32
            raise DataError(f"--shard-tokens {self.shard_tokens} is not between 1 and {2**31 - 1}")
        if self.keep_whitespace and self.tokenizer is not None:
            raise DataError("--keep-whitespace is for a tokenizer that is trained here; leave out --tokenizer")
        if self.workers < 1:
            raise DataError(f"--workers {self.workers} is too few; at least 1 is needed")
        if not 1 <= self.train_pieces <= MAX_TOKEN:
            raise DataError(f"--train-tokenizer {self.train_pieces} is not between 1 and {MAX_TOKEN}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise DataError(f"--name {self.name!r}: use letters, digits, dots, dashes and underscores only")
        if any(f"_{split}_" in f"{self.name}_" for split in SPLITS):
            raise DataError(f"--name {self.name!r} reads like a split of its own; leave out _train and _val")


@dataclass
class Encoded:
    """The part of one batch that belongs to one split: tokens (T,) and their counts."""

    tokens: np.ndarray
    counts: Counts
    empty_documents: int


def document_digest(text: str) -> bytes:
    """32 bytes that decide on which side a document falls; whitespace makes no difference to them."""
    return hashlib.sha256(SPLIT_SEED + " ".join(text.split()).encode("utf-8")).digest()


def falls_into_val(digest: bytes, val_fraction: float) -> bool:
    """Whether the document with this digest is one of the `val_fraction` for validation."""
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64


def cut_at_paragraphs(text: str, part_chars: int) -> list[str]:
    """Parts of at least `part_chars` characters (the last: half of that) which together are the text.

    A part ends with a paragraph, or with a line where the next paragraph's end is far; text without line breaks
    stays whole.
    """
    parts, start = [], 0
    latest = len(text) - part_chars // 2
    while start + part_chars < latest:
        paragraph = PARAGRAPH_END.search(text, start + part_chars, min(start + 4 * part_chars, latest))
        end = paragraph.end() if paragraph else text.find("\n", start + part_chars, latest) + 1
        if end == 0:
            break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


@dataclass
class DocumentStream:
    """All documents with their split, in a fixed order; documents without any text are left out.

    With explicit validation files those come first, so that training documents which also occur there can be
    dropped; otherwise copies of a document share a digest and so a side.
    """

    settings: Settings
    train_files: list[Path]
    val_files: list[Path]
    passed_over: Counter[str]
    dropped: dict[str, int] = field(default_factory=dict)
    unreadable: dict[Path, str] = field(default_factory=dict)  # files left out, from where on and why
    part_chars: int = 0  # documents are cut into parts of this size, 0: they stay whole
    chosen: dict[bytes, str] = field(default_factory=dict)  # the split of a digest, whatever its share says

    @classmethod
    def open(cls, settings: Settings) -> DocumentStream:
        """Find the files. Raises DataError if a path is missing or holds nothing to read."""
        train_files, train_others = find_files(settings.inputs)
        val_files, val_others = find_files(settings.val)
        return cls(settings, train_files, val_files, train_others + val_others)

    def fill_both_splits(self) -> str:
        """Cut long documents where else a split would get none; returns what to tell, "" where all stay whole."""
        if self.val_files:
            return ""
        splits, lengths = set(), []
        with contextlib.closing(self.read("counting documents")) as documents:
            for split, text, _ in documents:
                splits.add(split)
                lengths.append(len(text))
                if len(splits) == len(SPLITS):
                    return ""
        self.part_chars = min(max(sum(lengths) // PARTS, PART_CHARS[0]), PART_CHARS[1])
        parts = [(digest, split) for split, _, digest in self.read("cutting documents")]
        if len(parts) == len(lengths):  # nothing long enough, which the caller finds out by an empty split
            self.part_chars = 0
            return ""
        if len(dict(parts)) > 1 and "val" not in dict(parts).values():
            self.chosen = {min(parts)[0]: "val"}
        elif len(dict(parts)) > 1 and "train" not in dict(parts).values():
            self.chosen = {max(parts)[0]: "train"}
        return (
            f"{len(lengths)} document(s) would leave a split empty: long ones are cut at paragraph ends, "
            f"{len(parts)} parts in all"
        )

    def read(self, label: str) -> Generator[tuple[str, str, bytes]]:
        """(split, text, digest) of every document, with a progress bar on a terminal."""
        self.dropped = {"empty_documents": 0, "train_documents_also_in_val": 0}
        self.unreadable = {}
        val_digests: set[bytes] = set()
        total_bytes = sum(path.stat().st_size for path in [*self.val_files, *self.train_files])
        with tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, disable=None) as bar:
            for text, digest in self._documents(self.val_files, bar.update):
                val_digests.add(digest)
                yield "val", text, digest
            for text, digest in self._documents(self.train_files, bar.update):
                if digest in val_digests:
                    self.dropped["train_documents_also_in_val"] += 1
                else:
                    yield self._split_of(digest), text, digest

    def _split_of(self, digest: bytes) -> str:
        if digest in self.chosen:
            return self.chosen[digest]
        return "val" if not self.val_files and falls_into_val(digest, self.settings.val_fraction) else "train"

    def _documents(self, files: list[Path], on_bytes: Callable[[int], Any]) -> Iterator[tuple[str, bytes]]:
        for path in files:
            number = 0
            try:
                for text in read_documents(path, self.settings.text_field, on_bytes):
                    number += 1
                    for part in cut_at_paragraphs(text, self.part_chars) if self.part_chars else [text]:
                        if part and not part.isspace():
                            yield part, document_digest(part)
                        else:
                            self.dropped["empty_documents"] += 1
            except DataError as error:
                if not self.settings.skip_unreadable:
                    raise DataError(f"{error}; or leave such files out with --skip-unreadable") from error
                self.unreadable[path] = f"after {number} document(s): {error}" if number else str(error)


def sample_texts(documents: Iterable[tuple[str, bytes]], limit_bytes: int = SAMPLE_BYTES) -> list[str]:
    """Blocks of text, at most `limit_bytes` of UTF-8 in all, chosen by hash out of (text, digest) documents.

    The choice depends on the set of documents alone, not on their order. One block is kept in any case.
    """
    kept: list[tuple[int, str, int]] = []  # a heap whose first block is the next to give up
    kept_bytes = 0
    for text, digest in documents:
        for start in range(0, len(text), SAMPLE_BLOCK_CHARS):
            block = text[start : start + SAMPLE_BLOCK_CHARS]
            key = hashlib.sha256(digest + start.to_bytes(8, "big")).digest()
            size_bytes = len(block.encode("utf-8"))
            heapq.heappush(kept, (-int.from_bytes(key, "big"), block, size_bytes))
            kept_bytes += size_bytes
            while kept_bytes > limit_bytes and len(kept) > 1:
                kept_bytes -= heapq.heappop(kept)[2]
    return [block for _, block, _ in sorted(kept)]


def choose_tokenizer(settings: Settings, stream: DocumentStream) -> Tokenizer:
    """The given tokenizer, or one trained on the training split. Raises DataError if neither can be used."""
    if settings.tokenizer is not None:
        return Tokenizer.load(settings.tokenizer).require_countable()
    documents = stream.read("sampling for the tokenizer")
    with contextlib.closing(documents):
        texts = sample_texts((text, digest) for split, text, digest in documents if split == "train")
    if not texts:
        raise DataError(missing_split_message(settings, "train"))
    return train_tokenizer(texts, settings.train_pieces, settings.keep_whitespace).require_countable()


Batch = list[tuple[str, str]]


def make_batches(documents: Iterable[tuple[str, str, bytes]]) -> Iterator[Batch]:
    """Group (split, text) into batches of about `BATCH_CHARS`, enough work to outweigh sending it."""
    batch: Batch = []
    chars = 0
    for split, text, _ in documents:
        batch.append((split, text))
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def count_missing(before: bytes, after: bytes) -> int:
    """How many bytes of `before` are not in `after`, wherever they stand: what replacing and removing has cost."""
    histograms = [np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256) for text in (before, after)]
    return int((histograms[0] - histograms[1]).clip(min=0).sum())


def encode_batch(tokenizer: Tokenizer, batch: Batch) -> dict[str, Encoded]:
    """Tokens of a batch by split, each document with BOS before it; what they are scored as is not counted yet."""
    encoded: dict[str, Encoded] = {}
    for split in SPLITS:
        texts = [text for of_split, text in batch if of_split == split]
        documents = [(text, tokenizer.encode(text)) for text in texts]
        kept = [(text, tokens) for text, tokens in documents if tokens.size > 1]
        if not documents:
            continue
        tokens = np.concatenate([tokens for _, tokens in kept]) if kept else tokenizer.encode("")[:0]
        sources = [text.encode("utf-8") for text, _ in kept]
        normalized = [tokenizer.normalize(text).encode("utf-8") for text, _ in kept]
        counts = Counts(
            documents=len(kept),
            tokens=tokens.size,
            text_bytes=sum(map(len, normalized)),
            unknown_tokens=tokenizer.count_unknown(tokens),
            source_bytes=sum(map(len, sources)),
            changed_bytes=sum(map(count_missing, sources, normalized)),
        )
        encoded[split] = Encoded(tokens, counts, len(documents) - len(kept))
    return encoded


_worker_tokenizer: Tokenizer | None = None


def _start_worker(model: bytes) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer(model)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops the workers
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _encode_in_worker(batch: Batch) -> dict[str, Encoded]:
    assert _worker_tokenizer is not None
    return encode_batch(_worker_tokenizer, batch)


def encode_batches(
    tokenizer: Tokenizer, batches: Iterable[Batch], workers: int
) -> Generator[dict[str, Encoded]]:
    """Encode batches in order with `workers` processes (1: in this one), a few batches ahead of the consumer.

    Raises DataError if a worker process dies.
    """
    if workers == 1:
        yield from (encode_batch(tokenizer, batch) for batch in batches)
        return
    # spawn rather than fork: safe in a process with threads, and the same on every platform
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.model,))
    pending: deque[Future[dict[str, Encoded]]] = deque()
    try:
        for batch in batches:
            if len(pending) >= BATCHES_AHEAD * workers:
                yield pending.popleft().result()
            pending.append(pool.submit(_encode_in_worker, batch))
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, most likely for lack of memory; run again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def write_splits(
    settings: Settings, stream: DocumentStream, tokenizer: Tokenizer, folder: Path
) -> dict[str, dict[str, Any]]:
    """Encode all documents into shards in `folder`; returns counts and shards by split.

    Raises DataError if a split is left without documents.
    """
    counts = {split: Counts() for split in SPLITS}
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(folder, f"{settings.name}_{split}", settings.shard_tokens))
            for split in SPLITS
        }
        documents = stack.enter_context(contextlib.closing(stream.read("encoding")))
        results = encode_batches(tokenizer, make_batches(documents), settings.workers)
        for result in stack.enter_context(contextlib.closing(results)):
            for split, encoded in result.items():
                writers[split].append(encoded.tokens)
                counts[split].add(encoded.counts)
                counts[split].target_bytes += tokenizer.count_target_bytes(encoded.tokens)
                stream.dropped["empty_documents"] += encoded.empty_documents
    for split in SPLITS:
        if counts[split].documents == 0:
            raise DataError(missing_split_message(settings, split))
    return {
        split: {
            **dataclasses.asdict(counts[split]),
            "shards": [dataclasses.asdict(shard) for shard in writers[split].shards],
        }
        for split in SPLITS
    }


def missing_split_message(settings: Settings, split: str) -> str:
    """Why a split got no documents and what to do about it."""
    inputs = ", ".join(map(str, settings.val if split == "val" and settings.val else settings.inputs))
    if split == "val" and not settings.val:
        return (
            f"{inputs}: no document fell into the validation split at --val-fraction {settings.val_fraction:g}, and "
            "none has paragraphs enough to be cut; name validation files with --val, or give more text"
        )
    if split == "train" and settings.val:
        return f"{inputs}: no training documents, apart from copies of validation documents; give more text"
    if split == "train":
        return f"{inputs}: no documents with text for training; give more text or lower --val-fraction"
    return f"{inputs}: no documents with text for validation; give other --val files"


def prepare(settings: Settings) -> dict[str, Any]:
    """Make the tokenizer, its knowledge-graph blob and the shards of `settings.out`; returns the manifest.

    Nothing in the folder changes until everything is made. Raises DataError for unusable settings, input or
    output folder, and OSError where the disk refuses.
    """
    settings.validate()
    check_output(settings.out, settings.name, None, settings.overwrite)
    stream = DocumentStream.open(settings)
    if stream.passed_over:
        say(describe_passed_over(stream.passed_over))
    if cut := stream.fill_both_splits():
        say(cut)
    tokenizer = choose_tokenizer(settings, stream)
    check_output(settings.out, settings.name, tokenizer.hash, settings.overwrite)
    with staging_folder(settings.out) as staging:
        about_blob = write_blob(tokenizer, staging / KG_BLOB, settings.out / KG_BLOB)
        splits = write_splits(settings, stream, tokenizer, staging)
        for reason in stream.unreadable.values():
            say(f"left out: {reason}")
        with atomic_file(staging / TOKENIZER) as file:
            file.write(tokenizer.model)
        manifest = {
            "format": FORMAT,
            "name": settings.name,
            "tokenizer_hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "kg_blob": describe_blob(staging),
            "splits": splits,
            "dropped": stream.dropped,
            "left_out": [path.name for path in stream.unreadable],
            "part_chars": stream.part_chars,
            "settings": describe_settings(settings, stream),
        }
        publish(staging, settings.out, manifest)
    if about_blob:
        say(about_blob)
    return manifest


def describe_settings(settings: Settings, stream: DocumentStream) -> dict[str, Any]:
    """The settings that the result depends on; files by name and size, for folders differ by machine."""
    return {
        "inputs": [{"file": path.name, "bytes": path.stat().st_size} for path in stream.train_files],
        "val": [{"file": path.name, "bytes": path.stat().st_size} for path in stream.val_files],
        "val_fraction": None if settings.val else settings.val_fraction,
        "tokenizer": settings.tokenizer.name if settings.tokenizer else None,
        "train_tokenizer": None if settings.tokenizer else settings.train_pieces,
        "keep_whitespace": settings.keep_whitespace,
        "shard_tokens": settings.shard_tokens,
        "text_field": settings.text_field,
    }


def describe_split(split: str, counts: dict[str, Any]) -> str:
    """One line for people about a split."""
    line = (
        f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
        f"{counts['text_bytes']:,} bytes of text, {len(counts['shards'])} shard(s)"
    )
    if counts["target_bytes"] != counts["text_bytes"]:
        line += (
            f"; lossy tokenizer: {counts['unknown_tokens']:,} unknown tokens, "
            f"{counts['target_bytes']:,} bytes are scored"
        )
    return line


def describe_normalisation(settings: Settings, splits: dict[str, Any]) -> str:
    """One line for people about what of the text no model can learn, "" where that is nothing."""
    changed, source = (sum(splits[split][name] for split in SPLITS) for name in ("changed_bytes", "source_bytes"))
    if not changed:
        return ""
    line = f"the tokenizer's normalisation changes at least {changed:,} bytes of the text ({changed / source:.2%})"
    if settings.keep_whitespace:
        return line
    return f"{line}, line breaks and runs of blanks for the most part; --keep-whitespace trains one that keeps them"


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="prepare.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="*", type=Path, metavar="INPUT", help="file or folder of text")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for tokenizer, shards and manifest")
    parser.add_argument("--check", type=Path, metavar="DIR", help="verify a prepared folder and stop")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--val", nargs="+", type=Path, default=(), metavar="INPUT", help="validation text")
    split.add_argument(
        "--val-fraction",
        type=float,
        default=DEFAULT_VAL_FRACTION,
        help="share of the documents taken for validation, by hash (default %(default)s)",
    )
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model to use")
    vocabulary.add_argument(
        "--train-tokenizer",
        type=int,
        default=DEFAULT_PIECES,
        metavar="N_PIECES",
        help="train a byte-fallback BPE model on the training split (default %(default)s pieces)",
    )
    parser.add_argument(
        "--keep-whitespace",
        action="store_true",
        help="train a tokenizer that loses nothing: no normalisation, line breaks and runs of blanks are kept",
    )
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="list files that cannot be read, and go on without them"
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="N",
        help="shard length (default %(default)s)",
    )
    parser.add_argument("--text-field", default="text", help="JSON field or Parquet column (default: text)")
    parser.add_argument("--workers", type=int, default=usable_cpus(), help="processes (default: one a CPU)")
    parser.add_argument("--name", default="text", help="start of the shards' file names (default: text)")
    parser.add_argument("--overwrite", action="store_true", help="replace whatever data --out holds")
    return parser


def usable_cpus() -> int:
    """CPUs this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(options: Namespace) -> None:
    """What the command line asks for. Raises as `prepare` and `check`."""
    if options.check is not None:
        manifest = check(options.check)
        pieces = f"{manifest['vocab_size']} pieces"
        say(f"{options.check}: whole, tokenizer {manifest['tokenizer_hash']} ({pieces})")
        return
    if options.out is None:
        raise DataError("--out is missing; name a folder for the shards")
    settings = Settings(
        inputs=options.inputs,
        out=options.out,
        val=options.val,
        tokenizer=options.tokenizer,
        train_pieces=options.train_tokenizer,
        val_fraction=options.val_fraction,
        shard_tokens=options.shard_tokens,
        text_field=options.text_field,
        workers=options.workers,
        name=options.name,
        overwrite=options.overwrite,
        keep_whitespace=options.keep_whitespace,
        skip_unreadable=options.skip_unreadable,
    )
    start_s = time.perf_counter()
    manifest = prepare(settings)
    elapsed_s = time.perf_counter() - start_s
    for split in SPLITS:
        say(describe_split(split, manifest["splits"][split]))
    if line := describe_normalisation(settings, manifest["splits"]):
        say(line)
    vocab_size = manifest["vocab_size"]
    if settings.tokenizer is None and vocab_size < settings.train_pieces:
        say(f"the text gives {vocab_size} pieces only; a run takes their number from the manifest")
    megabytes = sum(manifest["splits"][split]["text_bytes"] for split in SPLITS) / 1e6
    say(
        f"{settings.out}: tokenizer {manifest['tokenizer_hash']} ({vocab_size} pieces), "
        f"{elapsed_s:.1f} s, {megabytes / elapsed_s / settings.workers:.2f} MB/s a process"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 after an error, with one line on stderr)."""
    return run_command(lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
