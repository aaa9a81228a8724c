"""The knowledge-graph blob of a tokenizer, as `tools/build_kg.py blob` makes it from the committed word table."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from shards import DataError, atomic_file
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
KG_BLOB = "kg_blob.txt"


def decode_blob(tokenizer: Tokenizer, path: Path | None = None) -> dict[int, float]:
    """Token id -> importance by the blob at `path`, or without a path by that of kg_data.py.

    Raises DataError where there is none, or none for this tokenizer.
    """
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    import kg_data

    try:
        return kg_data.decode(tokenizer.pieces, *([kg_data.read_blob(str(path))] if path else []))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it again") from error
    except ValueError as error:
        raise DataError(f"{path or 'kg_data.py'}: {error}") from error


def write_blob(tokenizer: Tokenizer, path: Path, final_path: Path | None = None) -> str:
    """Make a blob at `path` for a tokenizer that kg_data.py is not for; returns what to tell the user.

    That is "" where nothing is to do, and how to do without where the tokens are too few or too odd to make one of.
    It names `final_path` where the file is to be moved there. Raises OSError where the disk refuses.
    """
    with contextlib.suppress(DataError):
        decode_blob(tokenizer)
        return ""
    tools = str(ROOT / "tools")
    if tools not in sys.path:
        sys.path.insert(0, tools)  # first: bench/ has a program of the same name
    import build_kg

    try:
        words = build_kg.read_words(build_kg.KG_WORDS)
        scores = build_kg.token_scores(words, tokenizer.processor.encode, tokenizer.pieces)
        blob = build_kg.pack(scores, tokenizer.pieces)
    except build_kg.BuildError as error:
        return f"no knowledge-graph blob for this tokenizer ({error}); train with KG_ENABLED=0"
    with atomic_file(path) as file:
        file.write(blob.encode("ascii") + b"\n")
    return f"kg_data.py is for another tokenizer; that of this one is KG_PATH={final_path or path}"
