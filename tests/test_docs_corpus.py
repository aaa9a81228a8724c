"""data/docs_corpus.py against a small package index on this machine; no test reaches the network."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import docs_corpus
import pytest
from documents import read_documents
from support import assert_refused

PERMISSIVE = {
    "Apache-2.0", "Apache-2.0/BSD", "BSD-2-Clause", "BSD-3-Clause", "MIT", "MIT-CMU", "MIT/Apache-2.0",
    "Matplotlib-PSF", "Public-Domain", "ZPL-2.1",
}  # fmt: skip
SHARED = "This paragraph is long enough to count, and it stands word for word in the text of several of the packages."


def prose(subject: str) -> str:
    return (
        f"The documentation of {subject} says what it does and how it is to be used. It is written for people who have "
        f"not seen {subject} before, and it begins with the parts of {subject} that are easy to understand "
        "in a minute or two."
    )


def make_sdist(name: str, files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(f"{name}-1.0/{path}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Index:
    """A package index whose files are tests' own: what it holds, what was asked for, and how it misbehaves."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.missing: set[str] = set()
        self.damaged: Counter[str] = Counter()  # how often a file still arrives damaged
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kind, name = self.path.strip("/").split("/")[:2]
                if kind == "simple":
                    digest = hashlib.sha256(index.files.get(name, b"")).hexdigest()
                    links = f'<a href="../../files/{name}#sha256={digest}">x</a>'
                    content = f"<!DOCTYPE html><a>no target</a>{links}".encode()
                else:
                    index.asked[name] += 1
                    content = index.files[name]
                    if index.damaged[name]:
                        index.damaged[name] -= 1
                        content = content[:-20] + bytes(20)
                if name in index.missing:
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/simple"

    def table(self) -> str:
        rows = [
            f"{name} 1.0 MIT {'val' if name == 'vale' else 'train'} {hashlib.sha256(content).hexdigest()}"
            for name, content in self.files.items()
        ]
        return "\n".join(rows)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    index = Index()
    index.files = {
        "apple": make_sdist(
            "apple",
            {
                "docs/index.rst": f"Apple\n=====\n\n{prose('plum')}\n\n{prose('apple')}\n\n{SHARED}\n".encode(),
                "docs/again.md": f"# Again\n\n{prose('apple')}\n\n{prose('the pear')}\n".encode(),
                "docs/latin.txt": f"{prose('latin')} \xe9".encode("latin-1"),
                "src/apple.py": f"# {prose('source')}".encode(),
                "tests/data/a.txt": prose("a test").encode(),
                "src/_vendor/b/README.md": prose("a vendored package").encode(),
                "LICENSE.txt": prose("the licence").encode(),
                "apple.egg-info/long.txt": prose("metadata").encode(),
            },
        ),
        "birch": make_sdist("birch", {"README.rst": f"{prose('birch')}\n\n  {SHARED.upper()}".encode()}),
        "vale": make_sdist("vale", {"doc/a.txt": f"{SHARED}\n\n{prose('vale')}\n".encode()}),
    }
    monkeypatch.setattr(docs_corpus, "TABLE", index.table())
    monkeypatch.setattr(docs_corpus, "WAIT_S", 0.0)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    yield index
    index.server.shutdown()
    index.server.server_close()


def make(out: Path, *options: str) -> int:
    return docs_corpus.main(["--out", str(out), *options])


def texts(path: Path) -> set[str]:
    found = list(read_documents(path))
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.usefixtures("index")
def test_documents_are_cleaned_met_once_and_split_by_package(tmp_path: Path) -> None:
    assert make(tmp_path) == 0
    assert texts(tmp_path / "val.jsonl") == {f"{SHARED}\n\n{prose('vale')}"}
    assert texts(tmp_path / "train.jsonl") == {
        f"{prose('apple')}\n\n{prose('the pear')}", prose("plum"), prose("birch")
    }  # fmt: skip
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    rows = {row["name"]: row for row in manifest["packages"]}
    assert {name: (row["split"], row["licence"], row["documents"]) for name, row in rows.items()} == {
        "apple": ("train", "MIT", 2), "birch": ("train", "MIT", 1), "vale": ("val", "MIT", 1)
    }  # fmt: skip
    for split, about in manifest["splits"].items():
        path = tmp_path / f"{split}.jsonl"
        assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert about["bytes"] == sum(len(text.encode()) for text in texts(path))


def test_the_order_of_the_table_makes_no_difference(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make(tmp_path / "one") == 0
    monkeypatch.setattr(docs_corpus, "TABLE", "\n".join(reversed(index.table().splitlines())))
    assert make(tmp_path / "two") == 0
    for name in ("train.jsonl", "val.jsonl", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_started_again_it_fetches_only_what_is_missing_or_damaged(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index.missing = {"birch"}
    assert make(tmp_path) == 2
    message = capsys.readouterr().err
    assert "simple/birch/" in message
    assert "503" in message or "Service Unavailable" in message
    assert message.count("\n") == 1
    assert index.asked == {"apple": 1, "vale": 1}
    index.missing.clear()
    assert make(tmp_path) == 0
    assert index.asked == {"apple": 1, "vale": 1, "birch": 1}
    before = (tmp_path / "train.jsonl").read_bytes()
    (source,) = (tmp_path / "sources").glob("apple*")
    source.write_bytes(source.read_bytes()[:100])
    assert make(tmp_path) == 0
    assert index.asked == {"apple": 2, "vale": 1, "birch": 1}
    assert (tmp_path / "train.jsonl").read_bytes() == before


def test_a_download_that_arrives_damaged_is_fetched_again(index: Index, tmp_path: Path) -> None:
    index.damaged["apple"] = 2
    assert make(tmp_path) == 0
    assert index.asked["apple"] == 3


def test_a_download_that_never_keeps_its_checksum_is_refused(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index.damaged["apple"] = 1000
    expected = hashlib.sha256(index.files["apple"]).hexdigest()
    assert_refused(capsys, docs_corpus.main, ["--out", tmp_path], "files/apple", expected)
    assert not [path for path in tmp_path.rglob("*") if "apple" in path.name or path.suffix == ".tmp"]
    assert not (tmp_path / "manifest.json").exists()


def test_an_index_without_the_pinned_file_is_refused(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index.files["birch"] += b"another release"
    assert_refused(capsys, docs_corpus.main, ["--out", tmp_path], "birch 1.0", "--index")


@pytest.mark.usefixtures("index")
def test_what_cannot_be_reached_or_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert_refused(capsys, docs_corpus.main, ["--out", out, "--index", "http://127.0.0.1:9/simple"], "the network")
    assert_refused(capsys, docs_corpus.main, ["--out", out, "--index", "nowhere"], "--index")
    assert make(out, "--index", "https://me:word@host/simple") == 2
    assert "word" not in capsys.readouterr().err.replace("password", "")
    (tmp_path / "file").write_text("in the way")
    assert_refused(capsys, docs_corpus.main, ["--out", tmp_path / "file"], "file")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert_refused(capsys, docs_corpus.main, ["--out", out], "No space left on device", "free some space")
    assert not list(out.rglob("*.tmp"))


def test_a_split_without_text_is_refused(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs_corpus, "TABLE", index.table().replace(" val ", " train "))
    assert_refused(capsys, docs_corpus.main, ["--out", tmp_path], "no val documents")


RST = """
.. _label:

=====
Title
=====

.. comment

See :ref:`the guide <guide>`, :class:`~a.b.Thing` and ``value`` of `a link <https://example.org>`__ for **bold** words::

    x = {1: 2, 3: [4, 5]}
    >>> f(x)

.. note:: This is a note that is kept since it is a text.
   :width: 3

:param x: The number that is to be used in the sum.
:maxdepth: 2

+-----+-----+
| one | two |
+-----+-----+

* The first item of a list that goes
  on in the next line
* The second item of the list
"""
MARKDOWN = """<!-- a comment
of two lines -->
## The title of a section

Text with [a link](https://example.org), ![an image](x.png) and `code` for <b>people</b> who read it.

```python
def f(x): return {"a": [x, 1], "b": (x * 2)}
```

Copyright 2020 by the author of the text.

Das ist ein Absatz in einer anderen Sprache, der nicht hierher passt und darum fehlen soll.
"""


def test_an_index_that_is_no_address_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, docs_corpus.main, ["--out", tmp_path, "--index", "http://["], "http://[")


def test_markup_goes_and_prose_stays() -> None:
    assert docs_corpus.clean_text(RST) == [
        "See the guide, a.b.Thing and value of a link for bold words:",
        "This is a note that is kept since it is a text.",
        "The number that is to be used in the sum.",
        "- The first item of a list that goes on in the next line\n- The second item of the list",
    ]
    assert docs_corpus.clean_text(MARKDOWN) == [
        "The title of a section",
        "Text with a link, and code for people who read it.",
    ]


def test_the_table_names_permissive_packages_of_both_splits_by_checksum() -> None:
    packages = docs_corpus.read_table(docs_corpus.TABLE)
    assert len({package.name.lower() for package in packages}) == len({p.sha256 for p in packages}) == len(packages)
    assert {package.licence for package in packages} <= PERMISSIVE
    assert {package.split for package in packages} == {"train", "val"}
    assert all(re.fullmatch(r"[0-9a-f]{64}", package.sha256) for package in packages)
