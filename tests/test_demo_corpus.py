"""data/demo_corpus.py: documentation out of source files, without importing them."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import demo_corpus
import pytest
from shards import DataError

SCRIPT = Path(demo_corpus.__file__)


def write_module(folder: Path, name: str, source: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


def test_docstrings_of_everything_defined_in_source_order(tmp_path: Path) -> None:
    path = write_module(
        tmp_path,
        "module.py",
        '''
        """About the module."""
        raise SystemExit("importing this would end the test")
        try:
            import fast
        except ImportError:
            def fallback(a, *rest, key=1):
                """Slower,
                but always there."""
        class Outer(Base):
            """A class."""
            async def method(self):
                """A coroutine."""
                def inner():
                    "Within."
            def silent(self): pass
            "no docstring, just a string"
        ''',
    )
    assert demo_corpus.read_docstrings(path) == [
        "About the module.",
        "fallback(a, *rest, key=1)\nSlower,\nbut always there.",
        "Outer\nA class.",
        "Outer.method(self)\nA coroutine.",
        "Outer.method.inner()\nWithin.",
    ]


def test_tests_and_foreign_packages_are_left_out(tmp_path: Path) -> None:
    names = ["b.py", "a.py", "a/z.py", "test/t.py", "x/tests/t.py", "site-packages/p.py", "idlelib/i.py"]
    for name in names:
        write_module(tmp_path, name, "")
    found = [path.relative_to(tmp_path).as_posix() for path in demo_corpus.stdlib_modules(tmp_path)]
    assert found == ["a/z.py", "a.py", "b.py"]


def test_texts_occur_once_and_sources_that_do_not_parse_are_passed_over(tmp_path: Path) -> None:
    same = '"""The very same explanation, long enough to be kept as a document."""\n'
    write_module(tmp_path, "a.py", same)
    write_module(tmp_path, "b.py", same)
    write_module(
        tmp_path, "bb.py", same + 'def own():\n    """And something else, explained here alone."""\n'
    )
    write_module(tmp_path, "c.py", "def broken(:\n")
    (tmp_path / "d.py").write_bytes(b'"""\xff\xfe"""\0')
    write_module(tmp_path, "e.py", '"""Short."""')
    topics = {"first": "A topic of the language, which is long enough.  \n\n\n\nIts end.\n"}
    assert demo_corpus.make_documents(tmp_path, topics) == [
        "The very same explanation, long enough to be kept as a document.",
        "own()\nAnd something else, explained here alone.",
        "A topic of the language, which is long enough.\n\nIts end.",
    ]


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no standard library"):
        demo_corpus.make_documents(tmp_path, {})


def test_a_python_without_topics_still_gives_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_module(tmp_path, "a.py", '"""One module with enough documentation to be kept."""')
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(demo_corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    out = tmp_path / "deep" / "corpus.jsonl"
    assert demo_corpus.main(["--out", str(out)]) == 0
    assert "no pydoc topics" in capsys.readouterr().err
    assert json.loads(out.read_text()) == {"text": "One module with enough documentation to be kept."}


def test_this_python_gives_the_same_large_corpus_every_time(tmp_path: Path) -> None:
    outs = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for out, seed in zip(outs, "12", strict=True):
        command = [sys.executable, str(SCRIPT), "--out", str(out)]
        result = subprocess.run(
            command, env={"PYTHONHASHSEED": seed}, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert (result.returncode, result.stderr) == (0, "")
    assert outs[0].read_bytes() == outs[1].read_bytes()
    texts = [json.loads(line)["text"] for line in outs[0].read_text(encoding="utf-8").splitlines()]
    assert len(set(texts)) == len(texts) > 300
    assert 1.5e6 < sum(len(text.encode("utf-8")) for text in texts) < 4e6
    assert any(text.startswith('The "while" statement') for text in texts)


@pytest.mark.parametrize("argv", [[], ["--out"], ["--out", "x", "y"]])
def test_a_wrong_command_line_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_corpus.main(argv) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_module(tmp_path, "a.py", '"""One module with enough documentation to be kept."""')
    monkeypatch.setattr(demo_corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    assert demo_corpus.main(["--out", str(tmp_path / "a.py" / "corpus.jsonl")]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert "a.py" in stderr
    assert stderr.count("\n") == 1
