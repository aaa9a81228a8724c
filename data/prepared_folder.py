"""A prepared folder: what its manifest says, whether it is whole, and how a new one takes its place."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from knowledge_graph import KG_BLOB, decode_blob
from shards import TOKEN_DTYPE, DataError, Shard, atomic_file, read_tokens
from tokenizer import Tokenizer

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
STAGING = ".prepare-partial"
FORMAT = 1
SPLITS = ("train", "val")
CHECK_TOKENS = 1 << 22


@dataclass
class Counts:
    """What one split holds; bytes are UTF-8.

    `source_bytes` is the size of the text as it was read, of which normalisation leaves `changed_bytes` no more as
    they were. `text_bytes` is the size of the normalised text, `target_bytes` what the scorer's byte rule gives for the
    tokens. They are equal unless the tokenizer is lossy (then `unknown_tokens` is mostly not 0).
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    target_bytes: int = 0
    unknown_tokens: int = 0
    source_bytes: int = 0
    changed_bytes: int = 0

    def add(self, other: Counts) -> None:
        """Add another part of the same split."""
        for name, value in dataclasses.asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


# What the shards can be asked again; the rest is of the text, which is not in the folder.
MEASURED = {each.name for each in dataclasses.fields(Counts)} - {"text_bytes", "source_bytes", "changed_bytes"}


def shard_files(folder: Path) -> list[Path]:
    """Every file of a folder that the training program would take for a shard, sorted by name."""
    return sorted({path for split in SPLITS for path in folder.glob(f"*_{split}_*.bin")})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises DataError if it is missing or not a manifest."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if "splits" not in manifest and "source" in manifest:
            raise DataError(f"{path}: of data/fetch_fineweb.py, which checks what it has when it is run again")
        splits = [manifest["splits"][split] for split in SPLITS]
        names = {Shard(**shard).file for split in splits for shard in split["shards"]}
        known = manifest["format"] == FORMAT and {"name", "tokenizer_hash", "vocab_size"} <= set(manifest)
        known = known and all(set(split) >= MEASURED for split in splits)
    except FileNotFoundError as error:
        raise DataError(f"{folder}: no {MANIFEST}: not a complete folder; prepare it again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error!r}); prepare the folder again") from error
    if not (known and names):
        raise DataError(f"{path}: not a manifest of format {FORMAT}; prepare the folder again")
    return manifest


def check_file_names(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises DataError unless the shards in the folder are exactly those of its manifest."""
    listed = {shard["file"] for split in SPLITS for shard in manifest["splits"][split]["shards"]}
    present = {path.name for path in shard_files(folder)}
    if missing := sorted(listed - present):
        raise DataError(f"{folder / missing[0]}: missing, but {MANIFEST} lists it; prepare the folder again")
    if foreign := sorted(present - listed):
        raise DataError(
            f"{folder / foreign[0]}: not in {MANIFEST}; it would be read along, so move it elsewhere"
        )


def check_output(out: Path, name: str, tokenizer_hash: str | None, overwrite: bool) -> None:
    """Refuse an output folder whose content would be mixed with, or lost to, something else.

    `tokenizer_hash` is None as long as the tokenizer is still to be trained. A complete folder of the same
    `name` and tokenizer is fine: it is replaced as a whole. Raises DataError otherwise, unless `overwrite`.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file, expected a folder for --out; choose another path")
    if overwrite:
        return
    remedy = "choose another --out, or replace what is there with --overwrite"
    if not (out / MANIFEST).exists():
        if shard_files(out) or any((out / name).exists() for name in (TOKENIZER, KG_BLOB)):
            raise DataError(f"{out}: holds data without {MANIFEST}, unfinished or foreign; {remedy}")
        return
    try:
        manifest = read_manifest(out)
        check_file_names(out, manifest)
    except DataError as error:
        raise DataError(f"{error}; or {remedy}") from error
    if manifest["name"] != name:
        raise DataError(f"{out}: holds shards named {manifest['name']!r}, not {name!r}; {remedy}")
    if tokenizer_hash not in (None, manifest["tokenizer_hash"]):
        raise DataError(
            f"{out}: holds shards of tokenizer {manifest['tokenizer_hash']}, not {tokenizer_hash}; {remedy}"
        )


@contextlib.contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """Folder inside `out` for files in the making, gone afterwards; leftovers of a killed run go first."""
    staging = out / STAGING
    existed = out.exists()
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):  # not empty: the run succeeded
                out.rmdir()


def publish(staging: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Replace the data in `out` by the staged files; the manifest goes first and comes back last."""
    (out / MANIFEST).unlink(missing_ok=True)
    for path in [*shard_files(out), out / KG_BLOB]:
        path.unlink(missing_ok=True)
    for path in sorted(staging.iterdir()):
        path.replace(out / path.name)
    with atomic_file(out / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode("utf-8") + b"\n")


def check(folder: Path) -> dict[str, Any]:
    """Verify a prepared folder against its manifest: tokenizer and blob, headers, sizes, hashes, token ranges, counts.

    Returns the manifest; raises DataError for the first thing that does not agree.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the --out folder of an earlier run")
    manifest = read_manifest(folder)
    check_file_names(folder, manifest)
    tokenizer = Tokenizer.load(folder / TOKENIZER).require_countable()
    if tokenizer.hash != manifest["tokenizer_hash"]:
        raise DataError(
            f"{folder / TOKENIZER}: hash {tokenizer.hash}, {MANIFEST} says {manifest['tokenizer_hash']}; "
            "prepare the folder again"
        )
    if manifest.get("kg_blob") is not None:  # folders from before it was made have no such entry
        check_blob(folder / KG_BLOB, manifest["kg_blob"], tokenizer)
    for split in SPLITS:
        check_split(folder, manifest["splits"][split], tokenizer)
    return manifest


def describe_blob(folder: Path) -> dict[str, str] | None:
    """Name and SHA-256 of the knowledge-graph blob in `folder`, as the manifest lists them, or None without one."""
    path = folder / KG_BLOB
    return {"file": KG_BLOB, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} if path.exists() else None


def check_blob(path: Path, expected: dict[str, str], tokenizer: Tokenizer) -> None:
    """Verify the knowledge-graph blob against its entry in the manifest. Raises DataError."""
    decode_blob(tokenizer, path)
    if describe_blob(path.parent) != expected:
        raise DataError(f"{path}: content is not what {MANIFEST} lists; prepare the folder again")


def check_split(folder: Path, expected: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Verify the shards of one split against its entry in the manifest. Raises DataError."""
    found = Counts()
    last_token = np.empty(0, dtype=TOKEN_DTYPE)
    for shard in (Shard(**entry) for entry in expected["shards"]):
        path = folder / shard.file
        tokens = read_tokens(path)
        if tokens.size != shard.tokens or hashlib.sha256(tokens.data).hexdigest() != shard.sha256:
            raise DataError(f"{path}: content is not what {MANIFEST} lists; prepare the folder again")
        if tokens.max() >= tokenizer.vocab_size:
            raise DataError(
                f"{path}: token {tokens.max()} is beyond the tokenizer's {tokenizer.vocab_size} pieces; "
                "prepare the folder again"
            )
        for start in range(0, tokens.size, CHECK_TOKENS):
            piece = tokens[start : start + CHECK_TOKENS]
            found.target_bytes += tokenizer.count_target_bytes(piece, last_token)
            found.documents += int(np.count_nonzero(piece == tokenizer.bos_id))
            found.unknown_tokens += tokenizer.count_unknown(piece)
            last_token = piece[-1:]
        found.tokens += tokens.size
    for name in sorted(MEASURED):
        if getattr(found, name) != expected[name]:
            raise DataError(
                f"{folder}: shards give {name} {getattr(found, name)}, {MANIFEST} says {expected[name]}; "
                "prepare the folder again"
            )
