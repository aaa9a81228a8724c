"""Edits of the whole command that the audit has to notice: in a copy of the record, which is run as it stands."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import audit
import audit_run
import audit_watch
import numpy as np
import pytest
from support import modules_replaced

import train_gpt

TARGETS = 300
Edit = Callable[[str], None]


@pytest.fixture
def small(rehearsal: audit.Rehearsal, model: train_gpt.GPT, tmp_path: Path) -> audit_run.Small:
    """A split on disk and what is true of it."""
    config, tokens = rehearsal.config, rehearsal.documents(seed=9, count=TARGETS + 1)
    stage = audit.last_stage(model, config)
    assert stage.claims is not None
    stated = stage.claims(tokens.astype(np.int64), np.arange(TARGETS))
    given = audit.Submission(config.artifact_path, config, rehearsal.tokenizer, Path(config.tokenizer_path), tokens)
    truth = audit_run.Truth.of(tokens, stated, given.text(tokens))
    small = audit_run.Small(tmp_path / "small", config.artifact_path, Path(config.tokenizer_path), config, truth)
    audit_run.write_split(audit_run.data_folder(small), tokens, rehearsal.tokenizer.digest)
    (small.folder / "out").mkdir()
    return small


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edit:
    """Have these lines stand at the end of the record, in a folder of its own."""
    folder = tmp_path / "record"
    folder.mkdir()
    for path in train_gpt.code_paths():
        shutil.copy(path, folder)
    source = (folder / "train_gpt.py").read_text(encoding="utf-8")
    monkeypatch.setattr(train_gpt, "CODE_DIR", folder)

    def edit(lines: str) -> None:
        imports = "import contextlib, os, socket, subprocess, sys, time, types\nimport numpy as np\n"
        changed = source.replace('if __name__ == "__main__":', imports + lines + '\n\nif __name__ == "__main__":')
        (folder / "train_gpt.py").write_text(changed, encoding="utf-8")

    return edit


def start_here(small: audit_run.Small, **more: str) -> audit_run.Said:
    """The command of the edited record within this process: a third of the time of a new one."""
    spec = importlib.util.spec_from_file_location("edited", train_gpt.CODE_DIR / "train_gpt.py")
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    arrivals = audit_run.Arrivals()
    environ = audit_run.environment(small, small.folder / "out", **more)
    printed: Any = redirect_stdout(arrivals)  # pyright: ignore[reportArgumentType]
    with patch.dict(os.environ, environ, clear=True), modules_replaced({"edited": module}), printed:
        spec.loader.exec_module(module)
        code = module.main()
    return audit_run.Said(arrivals.lines, code, "")


BETTER = """
def better(total_logp, validation, valid=True, honest=score_of):
    return honest(0.9 * total_logp, validation, valid)
"""
# name: what is edited, and what of the environment the run has where it does not have the audit's
EDITS = {
    "sums in the evaluation": (BETTER + "score_of = better", {}),
    "sums of one stage": (
        BETTER + "def log_mixed(*given, honest=log_mixed):\n"
        "    return honest(*given)._replace(val_loss=1.0, val_bpb=0.7)",
        {},
    ),
    "the last line": (
        "def row(self, event, *given, honest=RunLog.row, **fields):\n"
        "    if event.startswith('final_int8'):\n"
        "        fields['val_bpb'] *= 0.99\n"
        "    honest(self, event, *given, **fields)\n"
        "RunLog.row = row",
        {},
    ),
    "a part of the split": (
        "def few(self, *given, honest=ValidationSet.__init__):\n"
        "    honest(self, *given)\n"
        "    self.tokens, self.bytes = self.tokens[:-9], self.bytes[:-9]\n"
        "ValidationSet.__init__ = few",
        {},
    ),
    "easy bytes": (
        "def more(self, *given, honest=Tokenizer.target_bytes):\n"
        "    return honest(self, *given) + (given[1] == 9).astype(np.int16)\n"
        "Tokenizer.target_bytes = more",
        {},
    ),
    "the environment": (BETTER + "if 'LOCAL_RANK' in os.environ:\n    score_of = better", {"LOCAL_RANK": "0"}),
}


def judge(said: audit_run.Said, small: audit_run.Small) -> bool:
    return audit_run.check_result(said, small, audit_run.SAME_ORDER)[0]


def test_honest_command_passes(small: audit_run.Small, edited: Edit) -> None:
    edited("")
    said = start_here(small)
    assert judge(said, small), audit_run.check_result(said, small, audit_run.SAME_ORDER)[1]
    assert audit_run.check_clock(said.lines, audit_run.EVALUATION, total=False)[0]
    assert judge(start_here(small, LOCAL_RANK="0"), small)  # once more, in the folder of the first


@pytest.mark.parametrize("name", EDITS)
def test_results_that_are_not_those_of_the_split(small: audit_run.Small, edited: Edit, name: str) -> None:
    lines, environ = EDITS[name]
    edited(lines)
    assert not judge(start_here(small, **environ), small)


def test_files_of_an_earlier_run(small: audit_run.Small, edited: Edit) -> None:
    """Honest in a clean folder; the second run there knows the text."""
    edited(
        BETTER + "def evaluate(model, config, *given, honest=evaluate):\n"
        "    if (seen := Path(config.out_dir, 'seen')).exists():\n"
        "        globals()['score_of'] = better\n"
        "    seen.touch()\n"
        "    return honest(model, config, *given)"
    )
    assert [judge(start_here(small), small) for _ in range(2)] == [True, False]


def test_command_that_is_not_audited_and_whose_clock_is_slow(small: audit_run.Small, edited: Edit) -> None:
    """Where no audit is loaded, in a process of its own, it is dishonest, and its seconds are long."""
    edited(
        BETTER + "if 'audit' not in sys.modules:\n"
        "    score_of, sleep, clock = better, time.sleep, time.perf_counter\n"
        "    time = types.SimpleNamespace(perf_counter=lambda: 0.3 * clock(), sleep=sleep)\n"
        "    def score_then_adapt(*given, honest=score_then_adapt):\n"
        "        sleep(1.5)\n"
        "        return honest(*given)"
    )
    assert judge(start_here(small), small)
    said = audit_run.start(audit_run.environment(small, small.folder / "out"), small.folder)
    assert said.returncode == 0, said.errors
    assert not judge(said, small)
    assert not audit_run.check_clock(said.lines, audit_run.EVALUATION, total=False)[0]


def test_files_modules_processes_and_networks(small: audit_run.Small, edited: Edit, tmp_path: Path) -> None:
    """At import and later, by an absolute path, beside the code, through a shell and by UDP; all fail silently."""
    hidden = tmp_path / "hints.npy"
    np.save(hidden, np.zeros(3))
    edited(
        "with contextlib.suppress(ImportError):\n"
        "    import extra\n"
        f"np.load({str(hidden)!r})\n"
        "def evaluate(*given, honest=evaluate):\n"
        "    with contextlib.suppress(OSError):\n"
        "        subprocess.run(['true'])\n"
        "    with contextlib.suppress(OSError):\n"
        "        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'hint', ('127.0.0.1', 9))\n"
        "    os.system('true')\n"
        "    return honest(*given)"
    )
    (train_gpt.CODE_DIR / "extra.py").write_text("")
    given = {name: Path(os.path.relpath(getattr(small, name))) for name in ("artifact", "tokenizer")}
    said, notes = audit_run.watched(small._replace(**given), small.folder / "out")
    assert said.returncode == 0, said.errors
    assert judge(said, small)
    assert {Path(note.split()[-1]).name.partition(".")[0] for note in notes.code} == {"extra"}
    seen = {note.split()[0] for note in notes.other}
    assert seen == {"open", "subprocess.Popen", "socket.sendto", "os.system"}
    assert any("hints.npy" in note for note in notes.other)


# What code may try while it is being imported, before any of its scoring, and go on without.
AT_IMPORT = {
    "a file": ("open({hints!r})", "hints"),
    "UDP": ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'?', ('127.0.0.1', 9))", "socket."),
    "another program": ("__import__('subprocess').run(['cat', {hints!r}])", "subprocess.Popen"),
}


@pytest.mark.parametrize("kind", AT_IMPORT)
def test_bare_process_that_reaches_outside_at_import(
    rehearsal: audit.Rehearsal, edited: Edit, tmp_path: Path, kind: str
) -> None:
    line, sign = AT_IMPORT[kind]
    edited(f"with contextlib.suppress(OSError):\n    {line.format(hints=str(tmp_path / 'hints'))}")
    tokens = audit.make_stream(audit.zipf_material(32, 400, 3), 100)
    ok, figure = audit.check_bare_process(rehearsal.config.artifact_path, rehearsal.config, tokens)
    assert not ok
    assert sign in figure


def test_watch_follows_links_and_leaves_libraries_alone(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.touch()
    (own / "link").symlink_to(other)
    watch = audit_watch.Watch([str(own)])
    assert watch.problem("open", (str(own / "new"), "w", 0)) == ""
    assert watch.problem("open", (np.__file__, "r", 0)) == ""
    assert watch.problem("open", (3, "r", 0)) == ""
    assert watch.problem("open", (str(own / "link"), "r", 0)) == f"open {other}"
    assert watch.problem("open", (f"{own}s", "r", 0)) == f"open {own}s"
    assert watch.problem("socket.sendto", (None, ("host", 9))) == "socket.sendto None ('host', 9)"


def test_log_that_leaves_out_a_part_of_the_split() -> None:
    rows = [
        {"event": "validation", "targets": 1000, "bytes": 2400},
        {"event": "final_int8_zlib_roundtrip_exact", "val_loss": 1.2 * np.log(2), "val_bpb": 0.5},
    ]
    assert audit.check_logged_split(rows, 1000, 2400)[0]
    ok, figure = audit.check_logged_split(rows, 1010, 2424)
    assert not ok
    assert "VAL_TOKENS" not in figure
    ok, figure = audit.check_logged_split([{**rows[0], "note": "partial"}, rows[1]], 1010, 2424)
    assert not ok
    assert "VAL_TOKENS" in figure
    rows[1]["val_bpb"] = 0.49
    assert not audit.check_logged_split(rows, 1000, 2400)[0]
    assert not audit.check_logged_split(rows[:1], 1000, 2400)[0]


def test_ranks_that_hang_end_with_their_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "import os, pathlib, time\npathlib.Path(f'pid{os.environ[\"RANK\"]}').write_text(str(os.getpid()))\n"
    (tmp_path / "train_gpt.py").write_text(f"{lines}print('begun', flush=True)\ntime.sleep(600)\n", encoding="utf-8")
    monkeypatch.setattr(train_gpt, "CODE_DIR", tmp_path)
    monkeypatch.setattr(audit_run, "TIMEOUT_S", 10.0)
    said = audit_run.start(os.environ, tmp_path, ranks=2)
    assert said.returncode != 0
    ranks = [int(path.read_text(encoding="utf-8")) for path in tmp_path.glob("pid*")]
    assert ranks, "none had begun"
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)
