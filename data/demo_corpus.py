"""Write a small English corpus out of the documentation that ships inside every Python.

    python data/demo_corpus.py --out runs/demo/corpus.jsonl

One document for each standard-library module that has docstrings, and one for each topic of `pydoc`. The
modules are parsed, never imported. One Python always gives the same file; another version gives another text.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
import sysconfig
import warnings
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which an isolated start (python -I) leaves out
from shards import ArgumentParser, DataError, atomic_file, run_command, say

# tests and other people's packages are no documentation of the standard library
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
)
MIN_CHARS = 40
Documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def stdlib_modules(folder: Path) -> Iterator[Path]:
    """Source files of the standard library under `folder`, sorted by path."""
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).parts):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts[:-1]):
            yield path


def read_docstrings(path: Path) -> list[str]:
    """Docstrings of a module and of its classes and functions in source order, each under its name.

    A file that is no valid Python (templates, other encodings) has none. Raises OSError if it is unreadable.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's source
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    module_text = ast.get_docstring(tree)
    return [*([module_text] if module_text else []), *_docstrings_within(tree, "")]


def _docstrings_within(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Documented):
            name = prefix + child.name
            text = ast.get_docstring(child)
            if text:
                yield f"{name}{_signature(child)}\n{text}"
            yield from _docstrings_within(child, f"{name}.")
        elif not isinstance(child, ast.expr):  # definitions also stand inside if, try and with
            yield from _docstrings_within(child, prefix)


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        return ""
    return f"({ast.unparse(node.args)})"


def read_topics() -> dict[str, str]:
    """The language topics of `pydoc` by name; empty where a distribution leaves them out."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return {}
    return dict(sorted(topics.items()))


def clean_text(text: str) -> str:
    """Text without trailing blanks and with at most one empty line in a row."""
    lines = "\n".join(line.rstrip() for line in inspect.cleandoc(text).splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def make_documents(folder: Path, topics: dict[str, str]) -> list[str]:
    """Documents of the corpus: modules by path, then topics by name; each text occurs once.

    Raises DataError if `folder` holds no documented module, OSError if one cannot be read.
    """
    seen: set[str] = set()
    documents = []
    for path in stdlib_modules(folder):
        fresh = [text for text in map(clean_text, read_docstrings(path)) if text not in seen]
        seen.update(fresh)
        documents.append("\n\n".join(dict.fromkeys(fresh)))
    if not any(documents):
        raise DataError(f"{folder}: no standard library with source files here; install a full Python")
    documents += [text for text in map(clean_text, topics.values()) if text not in seen]
    return [text for text in dict.fromkeys(documents) if len(text) >= MIN_CHARS]


def write_corpus(out: Path, documents: Sequence[str]) -> int:
    """Write documents as JSON lines `{"text": …}`, atomically; returns their size in UTF-8 bytes of text."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as file:
        for text in documents:
            file.write(json.dumps({"text": text}, ensure_ascii=False).encode("utf-8") + b"\n")
    return sum(len(text.encode("utf-8")) for text in documents)


def run(options: Namespace) -> None:
    """Make the corpus. Raises as `make_documents`."""
    topics = read_topics()
    if not topics:
        say("note: this Python has no pydoc topics; the corpus has docstrings only", error=True)
    documents = make_documents(Path(sysconfig.get_path("stdlib")), topics)
    size_bytes = write_corpus(options.out, documents)
    say(f"{options.out}: {len(documents):,} documents, {size_bytes:,} bytes of text")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 after an error, with one line on stderr)."""
    parser = ArgumentParser(
        prog="demo_corpus.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL file to write")
    return run_command(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
