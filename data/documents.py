"""Text documents out of plain text, JSON lines and Parquet files, one at a time."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import zstandard
from shards import DataError

PLAIN, ROWS = (".txt", ".md"), ".jsonl"
SUFFIXES = (*PLAIN, ROWS, *(kind + packed for kind in (*PLAIN, ROWS) for packed in (".zst", ".gz")), ".parquet")
KINDS = ".txt, .md, .jsonl (also with .zst or .gz), .parquet"
READ_BYTES = 1 << 17
PARQUET_ROWS = 256
MAX_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes; the library's own limit is 128 MiB
SURROGATES = re.compile("[\ud800-\udfff]")

OnBytes = Callable[[int], None]


def find_files(inputs: Sequence[Path | str]) -> tuple[list[Path], Counter[str]]:
    """Files to read, and how many were passed over by kind of name ("hidden", ".csv").

    Folders are searched recursively, also behind symbolic links, sorted by path; a file reached twice counts
    once. Raises DataError for a missing path, for a file named explicitly whose kind is not known, and for a folder
    without any readable file.
    """
    found: dict[Path, Path] = {}
    passed_over: Counter[str] = Counter()
    for entry in map(Path, inputs):
        if entry.is_dir():
            present = sorted(_walk(entry, passed_over))
            files = [path for path in present if _is_input(path)]
            passed_over.update(path.suffix.lower() or "no suffix" for path in present if not _is_input(path))
            if not files:
                others = f" ({describe_passed_over(passed_over)})" if passed_over else ""
                raise DataError(f"{entry}: no input in this folder{others}; expected files {KINDS}")
        elif not entry.exists():
            raise DataError(f"{entry}: no such file or folder; give existing {KINDS} inputs")
        elif not entry.name.lower().endswith(SUFFIXES):
            raise DataError(f"{entry}: unknown kind of file; expected one of {KINDS}")
        else:
            files = [entry]
        for path in files:
            found.setdefault(path.resolve(), path)
    return list(found.values()), passed_over


def _walk(folder: Path, passed_over: Counter[str]) -> Iterator[Path]:
    """Everything in a folder but what is hidden and earlier prepared shards.

    Each real folder comes once, since links may lead in a circle.
    """

    def fail(error: OSError) -> NoReturn:
        raise error

    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if "manifest.json" in files and any(name.endswith(".bin") for name in files):
            passed_over["prepared folder"] += 1  # of an earlier preparation, with a knowledge graph in a text file
            folders.clear()
            continue
        hidden = [name for name in (*folders, *files) if name.startswith(".")]
        if hidden:
            passed_over["hidden"] += len(hidden)
        folders[:] = sorted(name for name in folders if name not in hidden)
        yield from (Path(parent, name) for name in files if name not in hidden)


def _is_input(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def describe_passed_over(passed_over: Counter[str]) -> str:
    """One line for people."""
    kinds = ", ".join(f"{number} {kind}" for kind, number in passed_over.most_common(8))
    return f"passed over by name: {kinds}" + (", …" if len(passed_over) > 8 else "")


def read_documents(path: Path, text_field: str = "text", on_bytes: OnBytes | None = None) -> Iterator[str]:
    """Documents of one file in file order; `on_bytes` is told how many bytes of the file were consumed.

    A plain text file is one document. Lone surrogates in JSON escapes become U+FFFD, since they are no text.
    Raises DataError, with the line or row, for anything that is damaged or lacks `text_field`.
    """
    on_bytes = on_bytes or (lambda _: None)
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _read_parquet(path, text_field, on_bytes)
            return
        chunks = _file_chunks(path, on_bytes)
        if name.endswith(".zst"):
            chunks = _decompress(path, chunks, "zstd", _open_zstd)
        elif name.endswith(".gz"):
            chunks = _decompress(path, chunks, "gzip", _open_gzip)
        if name.removesuffix(".zst").removesuffix(".gz").endswith(PLAIN):
            yield _decode_plain(path, b"".join(chunks))
        else:
            yield from _parse_jsonl(path, chunks, text_field)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decode_plain(path: Path, raw: bytes) -> str:
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


class Decoder(Protocol):
    """What decompresses one zstd frame or gzip member."""

    @property
    def eof(self) -> bool:
        """Whether its end was reached."""
        ...

    @property
    def unused_data(self) -> bytes:
        """What followed its end."""
        ...

    def decompress(self, data: bytes, /) -> bytes:
        """What the next bytes give."""
        ...


def _open_zstd() -> Decoder:
    return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()


def _open_gzip() -> Decoder:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def _decompress(path: Path, chunks: Iterable[bytes], kind: str, new: Callable[[], Decoder]) -> Iterator[bytes]:
    """Decompressed content of one or several zstd frames or gzip members.

    zstandard's own file reader takes a truncated file for a shorter one, so the end of frame is checked here.
    """
    decoder = None
    try:
        for chunk in chunks:
            data = chunk
            while data:
                decoder = decoder or new()
                yield decoder.decompress(data)
                data = b""
                if decoder.eof:
                    data, decoder = decoder.unused_data, None
                    if kind == "gzip":  # may be padded with zeros
                        data = data.lstrip(b"\0")
    except (zstandard.ZstdError, zlib.error) as error:
        raise DataError(f"{path}: damaged {kind} data ({error}); fetch or compress the file again") from error
    if decoder is not None:
        raise DataError(f"{path}: truncated {kind} file; fetch or compress the file again")


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
            if file.schema_arrow.names.count(text_field) != 1:
                names = ", ".join(repr(name) for name in file.schema_arrow.names[:8]) or "none"
                found = "several columns" if text_field in file.schema_arrow.names else "no column"
                raise DataError(f"{path}: {found} {text_field!r} (columns: {names}); choose one with --text-field")
            file_bytes, num_rows = path.stat().st_size, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
                on_bytes(file_bytes * batch.num_rows // num_rows)
                # by name: a name with a dot also selects the field of a nested column, which may come first
                for value in batch.column(text_field).to_pylist():
                    row_number += 1
                    yield _text_of({text_field: value}, text_field, f"{path}: row {row_number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: unreadable, damaged or truncated Parquet file ({error}); fetch or write the file again"
        ) from error
