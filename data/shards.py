"""Token shards on disk, and what the programs of this folder share: errors, atomic files, exit codes.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros) followed by
that many little-endian uint16 tokens. It is the format of the published FineWeb shards.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
TOKEN_DTYPE = np.dtype("<u2")
MAX_TOKEN = 65535
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class DataError(Exception):
    """Something that the user can put right: says what is wrong, where, what was expected and what to do."""


@dataclass(frozen=True)
class Shard:
    """One finished shard: file name, number of tokens, SHA-256 over the token bytes (header excluded)."""

    file: str
    tokens: int
    sha256: str


def encode_header(num_tokens: int) -> bytes:
    """The 1,024 header bytes of a shard that holds `num_tokens` tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, num_tokens
    return header.tobytes()


def read_header(path: Path | str) -> int:
    """Check the header of a shard against its file size; returns the number of tokens.

    Raises DataError if the file is missing, unreadable, no shard, of another version, truncated or too long.
    """
    path = Path(path)
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) < HEADER_BYTES:
        raise DataError(
            f"{path}: {len(raw)} bytes are too few for a shard header of {HEADER_BYTES}; make the file again"
        )
    magic, version, num_tokens = (int(value) for value in np.frombuffer(raw, dtype="<i4")[:3])
    if magic != MAGIC:
        raise DataError(f"{path}: not a token shard (magic {magic}, expected {MAGIC}); make the file again")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}, expected {VERSION}; make the file again")
    expected_bytes = HEADER_BYTES + TOKEN_BYTES * num_tokens
    if num_tokens < 0 or size_bytes != expected_bytes:
        raise DataError(
            f"{path}: header says {num_tokens} tokens ({expected_bytes} bytes), "
            f"the file has {size_bytes} bytes: truncated or damaged; make the file again"
        )
    return num_tokens


def read_tokens(path: Path | str) -> np.ndarray:
    """Tokens of a shard as read-only uint16 (T,), mapped rather than loaded. Raises as `read_header`."""
    num_tokens = read_header(path)
    if num_tokens == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype=TOKEN_DTYPE)
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def to_token_array(tokens: Any) -> np.ndarray:
    """Any sequence of token ids as uint16 (T,). Raises ValueError for ids outside 0..65535."""
    array = np.asarray(tokens)
    if array.dtype != TOKEN_DTYPE and array.size and (array.min() < 0 or array.max() > MAX_TOKEN):
        raise ValueError(f"token ids {array.min()}..{array.max()} do not fit into uint16")
    return array.astype(TOKEN_DTYPE, copy=False).reshape(-1)


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[IO[bytes]]:
    """Binary file that appears under `path` only when it is whole; on an error nothing is left behind."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: Path | str, tokens: Any) -> None:
    """Write token ids (T,) as one shard, atomically. Raises ValueError for ids outside 0..65535."""
    array = to_token_array(tokens)
    with atomic_file(path) as file:
        file.write(encode_header(array.size))
        file.write(array.tobytes())


class ShardWriter:
    """Cuts a stream of tokens into `{prefix}_000000.bin`, `{prefix}_000001.bin`, … of `shard_tokens` each.

    A document may continue in the next shard, as in the published shards. Only the piece being appended is in
    memory. Use as a context manager: leaving it without an error completes the last shard.
    """

    def __init__(self, folder: Path, prefix: str, shard_tokens: int) -> None:
        self.folder = folder
        self.prefix = prefix
        self.shard_tokens = shard_tokens
        self.shards: list[Shard] = []
        self._files = contextlib.ExitStack()
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._filled = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._finish_shard()
        else:
            self._files.__exit__(*error)

    def append(self, tokens: Any) -> None:
        """Append token ids (T,). Raises ValueError for ids outside 0..65535."""
        array = to_token_array(tokens)
        while array.size:
            if self._file is None:
                self._start_shard()
            piece = array[: self.shard_tokens - self._filled]
            self._write(piece.tobytes())
            self._filled += piece.size
            array = array[piece.size :]
            if self._filled == self.shard_tokens:
                self._finish_shard()

    def _name(self) -> str:
        return f"{self.prefix}_{len(self.shards):06d}.bin"

    def _start_shard(self) -> None:
        self._file = self._files.enter_context(atomic_file(self.folder / self._name()))
        self._file.write(encode_header(0))

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(encode_header(self._filled))
        name = self._name()
        self._files.close()
        self.shards.append(Shard(name, self._filled, self._hash.hexdigest()))
        self._file, self._hash, self._filled = None, hashlib.sha256(), 0


class ArgumentParser(argparse.ArgumentParser):
    """argparse, except that a wrong command line is a DataError: one line instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; {self.prog} --help lists the options")


def describe_os_error(error: OSError) -> str:
    """One line for an operating-system error, with what to do where that is known."""
    remedies = {
        errno.ENOSPC: "free some space or choose another folder, then run the same command again",
        errno.EACCES: "choose a folder that you may write to, or change its permissions",
        errno.EROFS: "choose a folder on a writable file system",
    }
    where = f"{error.filename}: " if error.filename else ""
    remedy = remedies.get(error.errno or 0)
    return f"{where}{error.strerror or error}" + (f"; {remedy}" if remedy else "")


def open_closed_streams() -> None:
    """Let standard streams that the caller closed (`>&-`) lead nowhere.

    Otherwise the next file to be opened takes such a descriptor, and whatever a library writes to it.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (as long as the process)


def say(line: str, error: bool = False) -> None:
    """Print a line on stdout, or stderr for an `error`; a console that takes nothing more is no reason to end."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:  # full or gone: what is buffered goes nowhere, now and when the process ends
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2 if error else 1)
        os.close(nowhere)


def _raise_interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def interrupt_on_terminate() -> Iterator[None]:
    """Let SIGTERM clean up as Ctrl-C does (unfinished files, worker processes) while the body runs."""
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_command(command: Callable[[], None]) -> int:
    """Run a program's body; returns its exit code: 0, 2 after one line on stderr, or 130 when interrupted."""
    open_closed_streams()
    try:
        with interrupt_on_terminate():
            command()
    except DataError as error:
        message = str(error)
    except OSError as error:
        message = describe_os_error(error)
    except KeyboardInterrupt:
        say("interrupted; nothing half-written was kept", error=True)
        return EXIT_INTERRUPTED
    else:
        return 0
    say(f"error: {' '.join(message.split())}", error=True)
    return EXIT_ERROR
