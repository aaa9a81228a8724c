"""Text documents out of .txt, .md, .jsonl, .jsonl.zst and .parquet files, one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import zstandard
from shards import DataError

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.zst", ".parquet")
READ_BYTES = 1 << 17
PARQUET_ROWS = 256
SURROGATES = re.compile("[\ud800-\udfff]")

OnBytes = Callable[[int], None]


def find_files(inputs: Sequence[Path | str]) -> list[Path]:
    """Files to read: folders are searched recursively, sorted by path; a file named twice counts once.

    Hidden files and files of other kinds inside a folder are passed over. Raises DataError for a missing
    path, for a file named explicitly whose kind is not known, and for a folder without any readable file.
    """
    found: dict[Path, Path] = {}
    for entry in map(Path, inputs):
        if entry.is_dir():
            files = [path for path in sorted(entry.rglob("*")) if _is_input(path, entry)]
            if not files:
                raise DataError(f"{entry}: no input in this folder; expected files {', '.join(SUFFIXES)}")
        elif not entry.exists():
            raise DataError(f"{entry}: no such file or folder; give existing {', '.join(SUFFIXES)} inputs")
        elif not entry.name.endswith(SUFFIXES):
            raise DataError(f"{entry}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
        else:
            files = [entry]
        for path in files:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _is_input(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.name.endswith(SUFFIXES) and path.is_file()


def read_documents(path: Path, text_field: str = "text", on_bytes: OnBytes | None = None) -> Iterator[str]:
    """Documents of one file in file order; `on_bytes` is told how many bytes of the file were consumed.

    A .txt or .md file is one document. Lone surrogates in JSON escapes become U+FFFD, since they are no text.
    Raises DataError, with the line or row, for anything that is damaged or lacks `text_field`.
    """
    on_bytes = on_bytes or (lambda _: None)
    try:
        if path.name.endswith(".parquet"):
            yield from _read_parquet(path, text_field, on_bytes)
        elif path.name.endswith((".txt", ".md")):
            yield _read_plain(path, on_bytes)
        else:
            chunks = _file_chunks(path, on_bytes)
            if path.name.endswith(".zst"):
                chunks = _decompress(path, chunks)
            yield from _parse_jsonl(path, chunks, text_field)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_plain(path: Path, on_bytes: OnBytes) -> str:
    raw = path.read_bytes()
    on_bytes(len(raw))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {raw[error.start]:#04x} at offset {error.start}); convert it"
        ) from error


def _file_chunks(path: Path, on_bytes: OnBytes) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            on_bytes(len(chunk))
            yield chunk


def _decompress(path: Path, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Decompressed content of one or several zstd frames.

    zstandard's own file reader takes a truncated file for a shorter one, so the end of frame is checked here.
    """
    decoder = None
    try:
        for chunk in chunks:
            data = chunk
            while data:
                decoder = decoder or zstandard.ZstdDecompressor().decompressobj()
                yield decoder.decompress(data)
                data = b""
                if decoder.eof:
                    data, decoder = decoder.unused_data, None
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: damaged zstd data ({error}); fetch or compress the file again") from error
    if decoder is not None:
        raise DataError(f"{path}: truncated zstd file; fetch or compress the file again")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _parse_jsonl(path: Path, chunks: Iterable[bytes], text_field: str) -> Iterator[str]:
    for number, line in enumerate(_split_lines(chunks), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}: not a line of JSON ({error}); repair or remove the line"
            ) from error
        yield _text_of(row, text_field, f"{path}:{number}")


def _text_of(row: Any, text_field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: expected a JSON object with the field {text_field!r}, got {type(row).__name__}"
        )
    if text_field not in row:
        names = ", ".join(repr(name) for name in list(row)[:8]) or "none"
        raise DataError(f"{where}: no field {text_field!r} (fields: {names}); choose one with --text-field")
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} holds {type(text).__name__}, expected text")
    return SURROGATES.sub("\ufffd", text)


def _read_parquet(path: Path, text_field: str, on_bytes: OnBytes) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs pyarrow; install it with: pip install pyarrow") from error
    row_number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                names = ", ".join(repr(name) for name in file.schema_arrow.names[:8]) or "none"
                raise DataError(
                    f"{path}: no column {text_field!r} (columns: {names}); choose one with --text-field"
                )
            file_bytes, num_rows = path.stat().st_size, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
                on_bytes(file_bytes * batch.num_rows // num_rows)
                for value in batch.column(0).to_pylist():
                    row_number += 1
                    yield _text_of({text_field: value}, text_field, f"{path}: row {row_number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: unreadable, damaged or truncated Parquet file ({error}); fetch or write the file again"
        ) from error
