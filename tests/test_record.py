"""tools/record.py: the folded script is the sources, its folder says what the logs say, and faults are refused."""

from __future__ import annotations

import ast
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_support import REPO, make_runtime
from scipy import stats
from support import Run, assert_refused, event, read_events, tiny_environ, train_rows

import train_gpt

sys.path.insert(0, str(REPO / "tools"))
import record
import record_fold

FINAL = "final_int8_zlib_roundtrip_exact"
LOSSES = {1337: 1.9021, 42: 1.9034, 2025: 1.9008}
ME = ["--blurb", "four agents", "--author", "A", "--github-id", "a-b"]
SOURCES = record_fold.read_sources(REPO)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `new` makes it, for tests to copy."""
    track = tmp_path_factory.mktemp("records") / "track_non_record_16mb"
    assert record.main(["new", str(track), "--recipe", "leaky", "--name", 'Tiny "GPT"', "--date", "2026-01-31"]) == 0
    return track / "2026-01-31_Tiny_GPT"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "track_non_record_16mb" / made.name))


@pytest.fixture(scope="module")
def ran(made: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a folder in which the folded script ran as a user starts it there: without RECIPE, OUT_DIR and RUN_ID."""
    track = tmp_path_factory.mktemp("ran") / "track_non_record_16mb"
    folder = Path(shutil.copytree(made, track / made.name))
    environ = tiny_environ(tiny_data, folder, RECIPE=None, OUT_DIR=None, RUN_ID=None, VAL_LOSS_EVERY=10)
    command = [sys.executable, "train_gpt.py"]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (folder / "console").write_text(done.stdout, encoding="utf-8")
    return folder


# ---- the folded script -------------------------------------------------------------------------------------------


def test_the_folded_script_gives_the_figures_of_the_sources(ran: Path, tiny_run: Run):
    ours = (ran / "console").read_text(encoding="utf-8").splitlines()
    assert ours[-1].startswith(FINAL)
    assert ours[-1] == tiny_run.process.stdout.splitlines()[-1]
    (path,) = (ran / "logs").glob("*.jsonl")
    rows = read_events(path)
    for kind in ("train_loss", "grad_norm"):
        figures = [row[kind] for row in train_rows(rows)]
        assert len(figures) == 20
        assert figures == [row[kind] for row in train_rows(tiny_run.events)]
    assert event(rows, "config")["recipe"] == "leaky"


def test_its_ledger_counts_itself_and_its_log_begins_with_it(ran: Path):
    script = (ran / "train_gpt.py").read_bytes()
    (path,) = (ran / "logs").glob("*.jsonl")
    counted = event(read_events(path), "code_bytes")
    assert (counted["bytes"], counted["files"]) == (len(script), ["train_gpt.py"])
    log = path.with_suffix(".txt").read_text(encoding="utf-8")
    assert log.startswith(f"===== train_gpt.py =====\n{script.decode()}\n===== log =====\n")


def test_the_fold_is_small_text_with_a_readable_head_and_always_the_same(made: Path):
    folded = (made / "train_gpt.py").read_bytes().decode("utf-8")
    assert len(folded.encode()) <= 70_000
    tree = ast.parse(folded, feature_version=(3, 10))
    head = folded[: folded.index("PAYLOAD = ")]
    assert len(head.splitlines()) < 60
    assert head.isascii()
    for word in ("torchrun --nproc_per_node=8 train_gpt.py", "source/", '"recipe": "leaky"', "swarm_agents.py"):
        assert word in head
    assert max(map(len, folded.splitlines())) <= 120
    assert "Tiny 'GPT'" in (ast.get_docstring(tree) or "")
    files, defaults = record_fold.unfolded(folded) or ({}, {})
    assert list(files) == ["kg_data.py", "swarm_agents.py", "train_gpt.py"]
    assert defaults["data_path"] == "../../../data/datasets/fineweb10B_sp1024"
    assert record_fold.fold(SOURCES, 'Tiny "GPT" (RECIPE=leaky)', defaults) == folded
    assert record_fold.unfolded(SOURCES["train_gpt.py"]) is None


def lines_of(text: str) -> list[tuple[str, int]]:
    """Every name and constant of a program that is no docstring, and its line."""
    tree = ast.parse(text)
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body
        and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    kinds = (ast.Name, ast.Constant, ast.arg)
    return [
        (ast.dump(node), node.lineno) for node in ast.walk(tree) if isinstance(node, kinds) and id(node) not in prose
    ]


@pytest.mark.parametrize("name", record_fold.MODULES)
def test_what_is_left_out_is_prose_and_every_line_keeps_its_number(name: str):
    short = record_fold.without_prose(SOURCES[name], name)
    assert lines_of(short) == lines_of(SOURCES[name])
    assert short.count("\n") == SOURCES[name].count("\n")
    assert not [node for node in ast.walk(ast.parse(short)) if isinstance(node, ast.Module) and ast.get_docstring(node)]


ODD = '''"""Docs.

é"""
x = "# no comment"  # é comment
y = """a
# kept
"""  # gone
class A(Exception):
    """Only docs, é."""
class B: "Docs beside."
def f():
    """More
    docs."""

    return f"{x!r:>4}"  # after
'''


def test_docstrings_and_comments_are_found_wherever_they_stand():
    short = record_fold.without_prose(ODD, "odd.py")
    names: dict[str, Any] = {}
    exec(short, names)
    assert (names["x"], names["y"], names["f"]()) == ("# no comment", "a\n# kept\n", "'# no comment'")
    assert issubclass(names["A"], Exception)
    assert all(word not in short for word in ("ocs", "gone", "é", "after"))
    assert short.splitlines()[12 - 1 :][2:] == ["", '    return f"{x!r:>4}"']
    with pytest.raises(record_fold.FoldError, match=r"odd\.py"):
        record_fold.without_prose("def f():\n    'docs'; return 1\n", "odd.py")


def test_sources_that_cannot_be_folded_are_named():
    with pytest.raises(record_fold.FoldError, match=r"kg_data\.py is missing"):
        record_fold.fold({"train_gpt.py": ""}, "", {})
    with pytest.raises(record_fold.FoldError, match=r"swarm_agents\.py is no Python"):
        record_fold.fold({**SOURCES, "swarm_agents.py": "def"}, "", {})
    with pytest.raises(record_fold.FoldError, match="no field 'no_such_field'"):
        record_fold.fold(SOURCES, "", {"no_such_field": "1"})
    with pytest.raises(record_fold.FoldError, match=r"'none' is unknown; choose one of .*leaky"):
        record_fold.fold(SOURCES, "", {"recipe": "none"})


# What tools that read source text do with the script: inspect, tracebacks, and the compiler's tracing.
INTROSPECTION = """
import inspect, json, sys, traceback
sys.path.insert(0, sys.argv[1])
import torch, train_gpt
things = dict(
    function=train_gpt.evaluate, method=train_gpt.GPT.logits, model=train_gpt.GPT, config=train_gpt.Config,
    agent=train_gpt.swarm_agents.QATTimingAgent, metrics=train_gpt.swarm_agents.TrainingMetrics,
    vote=train_gpt.swarm_agents.VotingMesh.vote, decoder=train_gpt.kg_data.decode,
)
texts = {name: inspect.getsource(thing) for name, thing in things.items()}
try:
    train_gpt.kg_data.decode([], "no blob")
except ValueError:
    shown = traceback.format_exc()
    frame = traceback.extract_tb(sys.exc_info()[2])[-1]
environ = dict(NUM_LAYERS="2", MODEL_DIM="16", NUM_HEADS="2", NUM_KV_HEADS="1", MLP_MULT="1", VOCAB_SIZE="64",
    BIGRAM_VOCAB_SIZE="16", BIGRAM_DIM="4", XSA_LAST_N="1", ROPE_DIMS="4", VE_DIM="4", VE_LAYERS="1",
    TTT_FREEZE_BLOCKS="0")
model, ids = train_gpt.GPT(train_gpt.Config.from_env(environ)), torch.arange(8)[None]
def loss(a, b):
    return model.training_losses(a, b, False)[0]
losses = [torch.compile(loss, fullgraph=True, backend="eager")(ids, ids).item(), loss(ids, ids).item()]
weight = torch.randn(4, 8)
same = bool((train_gpt.fake_quantize(weight, 6) == train_gpt.Grid(6, 0.0).round_trip(weight)).all())
print(json.dumps(dict(texts=texts, file=frame.filename, line=frame.lineno, shown=shown, losses=losses, same=same,
    help=train_gpt.help_text(),
    places=[train_gpt.Config.from_env(env).data_path for env in ({}, {"DATA_PATH": "x"})])))
"""


def test_source_text_is_found_by_what_needs_it(made: Path, tmp_path: Path):
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    shutil.copy(made / "train_gpt.py", place)
    environ = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-B", "-c", INTROSPECTION, str(place)]
    done = subprocess.run(command, cwd=elsewhere, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # and nothing else was printed
    for name, start in (("function", "def evaluate("), ("model", "class GPT("), ("agent", "class QATTimingAgent(")):
        assert start in found["texts"][name].splitlines()[0]
    assert found["texts"]["config"].startswith("@dataclass(frozen=True, kw_only=True)\nclass Config:")
    assert found["texts"]["metrics"].startswith("@dataclass(frozen=True)\nclass TrainingMetrics:")
    assert found["texts"]["decoder"].startswith("def decode(")
    readable = SOURCES["kg_data.py"].splitlines()[found["line"] - 1].strip()
    assert readable in found["shown"]  # the line that raised, as the readable file has it
    assert Path(found["file"]) == place / "source" / "kg_data.py"
    assert found["losses"][0] == found["losses"][1]
    assert found["same"]
    assert "torchrun --nproc_per_node=8 train_gpt.py" in found["help"]
    assert found["places"] == ["../../../data/datasets/fineweb10B_sp1024", "x"]
    assert not list(elsewhere.iterdir())
    assert [path.name for path in place.iterdir()] == ["train_gpt.py"]


# ---- new ----------------------------------------------------------------------------------------------------------


def test_new_makes_a_folder_that_is_a_record(made: Path):
    assert {path.name for path in made.iterdir()} == {"train_gpt.py", "source", "requirements.txt", "README.md"}
    for name, text in SOURCES.items():
        assert (made / "source" / name).read_text(encoding="utf-8") == text
    needed = (made / "requirements.txt").read_text().splitlines()
    assert {line.partition(">=")[0] for line in needed} == {*record.NEEDED}
    assert set(needed) <= {
        line.partition("#")[0].strip() for line in (REPO / "requirements.txt").read_text().splitlines()
    }


def test_new_leaves_alone_what_others_wrote(folder: Path, capsys: pytest.CaptureFixture[str]):
    readme = (folder / "README.md").read_text(encoding="utf-8") + "mine\n"
    (folder / "README.md").write_text(readme, encoding="utf-8")
    (folder / "requirements.txt").write_text("mine\n")
    (folder / "source" / "kg_data.py").unlink()
    assert record.main(["new", str(folder), "--recipe", "smear"]) == 1
    said = capsys.readouterr().out
    assert "left alone" in said
    assert str(folder / "requirements.txt") in said
    assert (folder / "requirements.txt").read_text() == "mine\n"
    assert (folder / "README.md").read_text(encoding="utf-8") == readme
    assert (folder / "source" / "kg_data.py").read_text(encoding="utf-8") == SOURCES["kg_data.py"]
    assert '"recipe": "smear"' in (folder / "train_gpt.py").read_text(encoding="utf-8")


def test_new_refuses_what_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "2026-01-31_X").mkdir()
    (tmp_path / "2026-01-31_X" / "a").write_text("a")
    assert_refused(
        capsys, record.main, ["new", tmp_path / "2026-01-31_X"], "2026-01-31_X", "was not made by this program"
    )
    assert_refused(capsys, record.main, ["new", tmp_path / "2026-13-31_X"], "2026-13-31", "no date")
    (tmp_path / "2026-01-30_file").touch()
    assert_refused(capsys, record.main, ["new", tmp_path / "2026-01-30_file"], "2026-01-30_file")
    (tmp_path / "2026-01-30_file").unlink()
    assert_refused(
        capsys, record.main, ["new", tmp_path, "--recipe", "none", "--date", "2026-01-31"], "'none'", "leaky"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["2026-01-31_X"]
    broken = tmp_path / "2026-01-31_X" / "source" / "record.json"
    broken.parent.mkdir()
    broken.write_text("{}")
    assert_refused(capsys, record.main, ["new", tmp_path / "2026-01-31_X"], str(broken), "damaged")


# ---- finish -------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(ran: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ran, tmp_path / "track_non_record_16mb" / ran.name))


def finish(folder: Path, *more: object) -> int:
    return record.main(["finish", str(folder), *ME, *map(str, more)])


def test_finish_fills_the_folder_in_from_the_run(finished: Path, capsys: pytest.CaptureFixture[str]):
    (path,) = (finished / "logs").glob("*.jsonl")
    rows = read_events(path)
    assert finish(finished) == 0
    row = json.loads((finished / "submission.json").read_text(encoding="utf-8"))
    assert (row["val_loss"], row["val_bpb"]) == (rows[-1]["val_loss"], rows[-1]["val_bpb"])
    assert (row["seeds"], row["track"], row["date"]) == ([1337], "non_record_16mb", "2026-01-31")
    assert row["name"] == 'Tiny "GPT"'
    artifact = (finished / "final_model.int6.ptz").stat().st_size
    assert row["bytes_code"] == (finished / "train_gpt.py").stat().st_size
    assert row["bytes_total"] == row["bytes_code"] + artifact
    assert row["seed_results"]["1337"]["artifact_bytes"] == artifact
    assert row["seed_results"]["1337"]["steps"] == 20
    for suffix, origin in ((".jsonl", path), (".log", path.with_suffix(".txt"))):
        assert (finished / f"train_seed1337{suffix}").read_bytes() == origin.read_bytes()
    readme = (finished / "README.md").read_text(encoding="utf-8")
    assert f"| 1337 | {row['val_bpb']:.4f} |" in readme
    assert f"| `final_int6_roundtrip` | {event(rows, 'final_int6_roundtrip_exact')['val_bpb']:.4f} |" in readme
    assert "NUM_LAYERS=3" in readme  # the command runs it again, settings included
    assert "RECIPE=leaky" in row["technique_summary"]
    shutil.rmtree(finished / "logs")  # the copies are enough
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert record.main(["finish", str(finished)]) == 0
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    text = readme.replace(record.TO_WRITE, "New.")
    (finished / "README.md").write_text(text, encoding="utf-8")
    capsys.readouterr()
    assert record.main(["check", str(finished), "--no-import"]) == 0, capsys.readouterr().out


def test_finish_leaves_alone_what_was_edited(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert finish(finished) == 0
    row, readme = finished / "submission.json", finished / "README.md"
    row.write_text(row.read_text(encoding="utf-8").replace("four agents", "five"), encoding="utf-8")
    text = readme.read_text(encoding="utf-8").replace("| mean |", "| average |").replace(record.TO_WRITE, "Mine.")
    readme.write_text(text, encoding="utf-8")
    edited = row.read_bytes()
    capsys.readouterr()
    assert finish(finished, "--blurb", "six") == 1
    said = capsys.readouterr().out
    assert str(row) in said
    assert str(readme) in said
    assert "'results'" in said
    assert "'limits'" not in said
    assert (row.read_bytes(), readme.read_text(encoding="utf-8")) == (edited, text)
    row.unlink()
    readme.write_text("no markers\n")
    assert finish(finished) == 1
    assert "no lines <!-- record:results -->" in capsys.readouterr().out
    assert readme.read_text() == "no markers\n"
    assert json.loads(row.read_text(encoding="utf-8"))["blurb"] == "four agents"


EDITED = """import dataclasses
@dataclasses.dataclass
class Config:
    iterations: int = 7
    model_dim: int = 32
    from_env = classmethod(lambda cls, environ: cls())
"""


def test_the_command_is_that_of_a_script_edited_before_its_runs(finished: Path):
    (path,) = (finished / "logs").glob("*.jsonl")
    (finished / "train_gpt.py").write_text(EDITED)
    path.with_suffix(".txt").write_text(f"===== train_gpt.py =====\n{EDITED}\n===== log =====\n")
    assert finish(finished) == 0
    readme = (finished / "README.md").read_text(encoding="utf-8")
    assert "    ITERATIONS=20 SEED=1337 python train_gpt.py\n" in readme
    assert (finished / "train_gpt.py").read_text() == EDITED


def test_finish_refuses_logs_that_are_not_of_this_script(finished: Path, capsys: pytest.CaptureFixture[str]):
    (path,) = (finished / "logs").glob("*.jsonl")
    text, log = path.with_suffix(".txt"), path.with_suffix(".txt").read_text(encoding="utf-8")
    text.write_text(log.replace("Parameter Golf record", "Another record", 1), encoding="utf-8")
    assert_refused(capsys, record.main, ["finish", finished, *ME], str(path), "other code")
    text.unlink()
    assert_refused(capsys, record.main, ["finish", finished, *ME], str(path), "no text log")
    text.write_text(log, encoding="utf-8")
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:-1]))
    assert record.main(["finish", str(finished), *ME]) == 2
    streams = capsys.readouterr()
    assert f"left out: {path} did not finish" in streams.out
    assert "no log of a finished run" in streams.err
    path.write_text("".join(rows))
    shutil.copy(path, finished / "again.jsonl")  # the same run twice is one run
    assert_refused(capsys, record.main, ["finish", finished, "--author", "A", "--github-id", "a"], "--blurb")
    facts = finished / "source" / "record.json"
    facts.write_text(facts.read_text().replace("non_record_16mb", "10min_16mb"))
    assert_refused(capsys, record.main, ["finish", finished, *ME], "1,100 validation targets", "62,021,632")
    (finished / "source" / "record.json").unlink()
    assert_refused(capsys, record.main, ["finish", finished, *ME], "record.json", "record.py new")
    assert not (finished / "submission.json").exists()
    assert not list(finished.glob("train_seed*"))


# ---- summary: submission.json of logs alone -----------------------------------------------------------------------
SCRIPT = '"""A record."""\nx = 1\n'
Change = Callable[[list[dict[str, Any]]], Any]


def rows_of(seed: int) -> list[dict[str, Any]]:
    """What a finished run's JSONL log says, as far as a submission needs it."""
    runtime = make_runtime(config := train_gpt.Config(seed=seed, run_id=f"seed{seed}", device="cpu"))
    settings = {name: getattr(config, name) for name in train_gpt.Config.__annotations__}
    loss, code = LOSSES.get(seed, 1.9), len(SCRIPT.encode())
    return [
        dict(event="environment", time=f"2026-01-31T00:00:{seed % 60:02}.000Z", **runtime.describe(), attention="sdpa"),
        dict(event="config", **settings),
        dict(event="validation", targets=62_021_632, bytes=151_069_000, digest="0123456789abcdef"),
        dict(event="track", track="adaptive"),
        dict(event="step", step=7000, steps=20000, train_loss=2.0, train_time_ms=598_000.0, step_avg_ms=85.4),
        dict(event="step_validation", step=7020, steps=20000, val_loss=2.0, train_time_ms=599_800.0, step_avg_ms=85.44),
        dict(event="artifact_bytes", bytes=15_800_000),
        dict(event="code_bytes", bytes=code),
        dict(event="total_bytes", bytes=15_800_000 + code, limit=16_000_000),
        dict(event="legal_ttt_exact", stage="ttt", val_loss=loss + 0.01, val_bpb=(loss + 0.01) / 1.69),
        dict(event="evaluation", total_s=412.5, budget_s=600.0),
        dict(event=FINAL, val_loss=loss, val_bpb=loss / 1.69, valid=True),
    ]


def write_log(folder: Path, seed: int, change: Change | None = None) -> Path:
    """That log, some rows changed, and beside it the text log with the source."""
    rows = rows_of(seed)
    if change:
        change(rows)
    path = folder / f"train_seed{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"===== train_gpt.py =====\n{SCRIPT}\n===== log =====\n"
    path.with_suffix(".log").write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def logs(tmp_path: Path) -> list[Path]:
    return [write_log(tmp_path, seed) for seed in LOSSES]


def summary_of(logs: list[Path], out: Path, *more: object) -> list[str]:
    options = [*ME, "--name", "Swarm", "--date", "2026-11-21"]
    return [str(item) for item in ("summary", *logs, *options, "--out", out, *more)]


NON_RECORD = ("--track", "non_record_16mb")


def summarize(logs: list[Path], out: Path, *more: object) -> dict[str, Any]:
    assert record.main(summary_of(logs, out, *more)) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_figure_comes_from_the_logs(logs: list[Path], tmp_path: Path):
    found = summarize(logs, tmp_path / "s.json")
    assert found["seeds"] == [42, 1337, 2025]
    code = len(SCRIPT.encode())
    for seed, loss in LOSSES.items():
        assert found["seed_results"][str(seed)] == dict(
            val_loss=loss, val_bpb=loss / 1.69, steps=7020, step_avg_ms=85.44, train_time_s=599.8, eval_time_s=412.5,
            artifact_bytes=15_800_000, bytes_total=15_800_000 + code, valid=True,
        )  # fmt: skip
    bpbs = [loss / 1.69 for loss in LOSSES.values()]
    assert found["val_loss"] == pytest.approx(statistics.fmean(LOSSES.values()), abs=1e-12)
    assert found["val_loss_std"] == pytest.approx(statistics.stdev(LOSSES.values()), rel=1e-9)
    assert found["val_bpb"] == pytest.approx(statistics.fmean(bpbs), abs=1e-12)
    assert found["val_bpb_std"] == pytest.approx(statistics.stdev(bpbs), rel=1e-9)
    assert (found["bytes_code"], found["bytes_total"]) == (code, 15_800_000 + code)
    assert (found["author"], found["github_id"], found["scoring"]) == ("A", "a-b", "adaptive")
    assert found["hardware"] == f"1 × {train_gpt.cpu_name()}"
    assert found["versions"]["torch"].startswith("2.")
    assert all(found["compliance"].values())
    assert "score_first_ttt" in found["compliance"]
    assert "comparison" not in found


def test_comparison_is_a_one_sided_welch_test_against_the_threshold(logs: list[Path], tmp_path: Path):
    baseline = [1.911, 1.9095, 1.9102, 1.912]
    found = summarize(logs, tmp_path / "s.json", "--baseline-nats", *baseline)["comparison"]
    ours = list(LOSSES.values())
    gap = statistics.fmean(baseline) - 0.005 - statistics.fmean(ours)
    variances = [statistics.variance(values) / len(values) for values in (ours, baseline)]
    degrees = sum(variances) ** 2 / (variances[0] ** 2 / 2 + variances[1] ** 2 / 3)
    assert found["welch_p"] == pytest.approx(stats.t.sf(gap / sum(variances) ** 0.5, degrees), rel=1e-9)
    assert found["gain_nats"] == pytest.approx(statistics.fmean(baseline) - statistics.fmean(ours))
    same = summarize(logs, tmp_path / "b.json", "--baseline", tmp_path / "s.json")["comparison"]
    assert same["gain_nats"] == pytest.approx(0)
    assert same["welch_p"] > 0.9


def test_calibration_counts_as_training(tmp_path: Path):
    logs = [
        write_log(tmp_path, seed, lambda rows: rows.insert(6, dict(event="calibration", train_and_calibration_s=599.9)))
        for seed in LOSSES
    ]
    assert summarize(logs, tmp_path / "s.json")["seed_results"]["42"]["train_time_s"] == 599.9


def test_fewer_seeds_and_partial_scores_are_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_log(tmp_path, 42, lambda rows: rows[-1].update(note="partial"))
    out = tmp_path / "s.json"
    found = summarize([path], out, *NON_RECORD)
    assert (found["track"], found["partial"], found["val_bpb_std"]) == ("non_record_16mb", True, None)
    assert (found["compliance"]["three_seeds"], found["compliance"]["full_validation"]) == (False, False)
    three = [path, *(write_log(tmp_path, seed, lambda rows: rows[-1].update(note="partial")) for seed in (1, 2))]
    assert_refused(capsys, record.main, summary_of(three, out), "train_seed", "VAL_TOKENS")
    two = [write_log(tmp_path, 1), write_log(tmp_path, 3)]
    assert_refused(capsys, record.main, summary_of(two, out), "2 given", "non_record_16mb")
    assert_refused(capsys, record.main, summary_of([path, two[0]], out, *NON_RECORD), "part of the validation split")


def test_seeds_may_differ_in_where_files_lie_and_how_a_process_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (*train_gpt.PLACE_FIELDS, *train_gpt.PROCESS_FIELDS)

    def at(place: str, **more: str) -> Change:
        return lambda rows: row_of(rows, "config").update(dict.fromkeys(names, place) | more)

    out, logs = tmp_path / "s.json", [write_log(tmp_path, seed, at(f"disk{seed}")) for seed in LOSSES]
    assert summarize(logs, out)["seeds"] == [42, 1337, 2025]
    write_log(tmp_path, 2025, at("disk2025", kg_path=""))  # which is the graph in kg_data.py
    assert_refused(capsys, record.main, summary_of(logs, out), "train_seed2025", "KG_PATH=''", "'disk")


def row_of(rows: list[dict[str, Any]], event: str) -> dict[str, Any]:
    return next(row for row in rows if row["event"] == event)


def without(*events: str) -> Change:
    return lambda rows: rows.__setitem__(slice(None), [row for row in rows if row["event"] not in events])


SPOILT: dict[str, tuple[Change, tuple[str, ...]]] = {
    "verdict": (lambda rows: rows[-1].update(valid=False), ("valid:False", "do not sum to 1")),
    "mass": (lambda rows: rows[9].update(mass=1.01), ("mass off by 1.0e-02", "do not sum to 1")),
    "size": (lambda rows: row_of(rows, "total_bytes").update(bytes=16_000_001), ("16,000,001 bytes",)),
    "training": (lambda rows: rows[5].update(train_time_ms=600_200.0), ("600.2 s of training",)),
    "evaluation": (lambda rows: row_of(rows, "evaluation").update(total_s=601.0), ("601.0 s of evaluation",)),
    "hardware": (lambda rows: row_of(rows, "environment").update(hardware="TPU"), ("hardware=", "'TPU'")),
    "versions": (lambda rows: row_of(rows, "environment").update(torch="9.9"), ("torch=", "'9.9'")),
    "ranks": (lambda rows: row_of(rows, "environment").update(world_size=77), ("world_size=", "77")),
    "code": (lambda rows: row_of(rows, "code_bytes").update(bytes=7), ("code bytes=", "7")),
    "no number": (lambda rows: rows[-1].update(val_loss=math.nan), ("val_loss", "nan", "no finite number")),
    "text": (lambda rows: row_of(rows, "total_bytes").update(bytes="many"), ("bytes", "'many'", "no int")),
    "digits": (lambda rows: rows[5].update(train_time_ms=10**400), ("train_time_ms", "1000", "no finite number")),
    "setting": (lambda rows: row_of(rows, "config").update(matrix_lr=0.5), ("MATRIX_LR=", "0.5", "0.027")),
    "setting absent": (lambda rows: row_of(rows, "config").pop("beta1"), ("BETA1=", "0.9", "None")),
    "restart": (
        lambda rows: rows.insert(6, {**row_of(rows, "config"), "resume": "auto", "matrix_lr": 0.5}),
        ("train_seed42", "went on with other settings", "matrix_lr=0.5"),
    ),
    "unfinished": (lambda rows: rows.pop(), ("did not finish",)),
    "empty": (lambda rows: rows.clear(), ("did not finish",)),
    "no versions": (without("environment"), ("environment",)),
    "no config": (without("config"), ("config",)),
    "no steps": (without("step", "step_validation"), ("'step'",)),
    "other targets": (lambda rows: row_of(rows, "validation").update(targets=5087), ("5,087", "62,021,632")),
    "other bytes": (lambda rows: row_of(rows, "validation").update(bytes=77), ("validation bytes=", "77")),
    "other text": (lambda rows: row_of(rows, "validation").update(digest="f" * 16), ("digest=", "ffffffffffffffff")),
    "no digest": (lambda rows: row_of(rows, "validation").pop("digest"), ("no digest",)),
    "unknown text": (without("validation"), ("'validation'",)),
    "no size": (without("artifact_bytes"), ("artifact_bytes",)),
    "no evaluation": (without("evaluation"), ("evaluation",)),
}


@pytest.mark.parametrize("name", SPOILT)
def test_logs_that_make_no_submission_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    change, words = SPOILT[name]
    logs = [write_log(tmp_path, 1337), write_log(tmp_path, 2025), write_log(tmp_path, 42, change)]
    assert_refused(capsys, record.main, summary_of(logs, tmp_path / "s.json"), *words)
    assert not (tmp_path / "s.json").exists()


def test_damaged_and_missing_logs_are_refused(logs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "s.json"
    twice = [*logs[:2], logs[1]]
    assert_refused(capsys, record.main, summary_of(twice, out), "seed 42", "more than once")
    assert_refused(capsys, record.main, summary_of([*logs[:2], tmp_path / "gone.jsonl"], out), "gone.jsonl")
    whole = logs[2].read_text()
    for damage in (whole[:-40], whole.replace("{", "[", 1), whole + "3\n"):
        logs[2].write_text(damage)
        assert_refused(capsys, record.main, summary_of(logs, out), f"{logs[2]}:")
    logs[2].write_bytes(b"\xff\xfe")
    assert_refused(capsys, record.main, summary_of(logs, out), str(logs[2]), "UTF-8")
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    nowhere = summary_of(logs[:2], bad / "s.json", *NON_RECORD)
    assert_refused(capsys, record.main, nowhere, "cannot write")
    assert_refused(capsys, record.main, summary_of(logs[:2], out, *NON_RECORD, "--baseline", bad), "bad.json")
    for date in ("today", "2026-99-99", "2026-1-3", "20260131"):
        assert_refused(capsys, record.main, [*summary_of(logs[:2], out, *NON_RECORD), "--date", date], date)


def test_author_is_never_invented(logs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    settings = tmp_path / "gitconfig"
    settings.write_text("[user]\n\tname = Some One\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    monkeypatch.chdir(tmp_path)
    options = ["--name", "N", "--date", "2026-11-21", "--blurb", "b", "--out", str(tmp_path / "s.json")]
    argv = ["summary", *map(str, logs), *options]
    assert_refused(capsys, record.main, argv, "--github-id", "github.user")
    subprocess.run(["git", "config", "--file", settings, "github.user", "someone"], check=True)
    assert record.main(argv) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["author"], found["github_id"]) == ("Some One", "someone")


def test_the_committed_submission_is_that_of_the_committed_logs(tmp_path: Path):
    committed = json.loads((REPO / "submission.json").read_text(encoding="utf-8"))
    argv = ["summary", *(str(REPO / path) for path in committed["logs"])]
    for option in ("author", "name", "blurb", "date", "track"):
        argv += [f"--{option}", committed[option]]
    argv += ["--github-id", committed["github_id"], "--technique", committed["technique_summary"]]
    assert record.main([*argv, "--out", str(tmp_path / "s.json")]) == 0
    again = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert again | {"logs": committed["logs"]} == committed


# ---- check --------------------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A record that nothing is wrong with."""
    folder = tmp_path / "track_10min_16mb" / "2026-11-21_Swarm"
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_text(SCRIPT, encoding="utf-8")
    (folder / "README.md").write_text("# Swarm\n\nFour agents.\n")
    logs = [write_log(folder, seed) for seed in LOSSES]
    assert record.main(summary_of(logs, folder / "submission.json")) == 0
    return folder


def check(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, list[str], list[str]]:
    """Exit code, and the lines that refuse and that do not know."""
    capsys.readouterr()
    code = record.main(["check", str(folder), "--no-import", *more])
    lines = capsys.readouterr().out.splitlines()
    refusals, unknowns = ([line for line in lines if line.startswith(verdict)] for verdict in ("REFUSED", "unknown"))
    return code, refusals, unknowns


def test_a_good_folder_passes(good: Path, capsys: pytest.CaptureFixture[str]):
    code, refusals, unknowns = check(good, capsys)
    assert (code, refusals) == (0, [])
    assert [line.split()[1] for line in unknowns] == ["import:"]


def edit_row(**changes: Any) -> Callable[[Path], Any]:
    """Change fields of submission.json; None takes one out."""

    def edit(folder: Path) -> None:
        path = folder / "submission.json"
        row = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps({name: value for name, value in row.items() if value is not None}))

    return edit


def results_with(**figures: Any) -> dict[str, dict[str, Any]]:
    """seed_results with the right val_bpb, and these figures."""
    return {str(seed): {"val_bpb": loss / 1.69, **figures} for seed, loss in LOSSES.items()}


def edit_log(seed: int, change: Change) -> Callable[[Path], Any]:
    return lambda folder: write_log(folder, seed, change)


def sized_script(count: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / "train_gpt.py").write_text(SCRIPT + "#" * count)


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def put(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


FAULTS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no README": (remove("README.md"), ("README.md", "missing")),
    "placeholder": (put("README.md", record.TO_WRITE), ("README.md", "placeholder")),
    "no submission.json": (remove("submission.json"), ("submission.json", "missing")),
    "no script": (remove("train_gpt.py"), ("train_gpt.py", "missing")),
    "no text": (lambda folder: (folder / "train_gpt.py").write_bytes(b"\xff"), ("train_gpt.py", "UTF-8")),
    "no Python": (put("train_gpt.py", "def"), ("train_gpt.py", "no Python 3.10")),
    "newer Python": (put("train_gpt.py", "try: x = 1\nexcept* OSError: pass\n"), ("train_gpt.py", "no Python 3.10")),
    "code beside": (
        lambda folder: (put("more.py", "y = 1\n")(folder), put("train_gpt.py", SCRIPT + "import more\n")(folder)),
        ("code", "more.py", "put all code that counts into train_gpt.py"),
    ),
    "code too large": (sized_script(250_000), ("bytes", "16,050,02", "at most 16,000,000")),
    "no JSON": (put("submission.json", "{"), ("submission.json", "no JSON")),
    "list": (put("submission.json", "[]"), ("submission.json", "a list")),
    "no field": (put("submission.json", "{}"), ("submission.json", "empty object")),
    "nested score": (edit_row(val_bpb={"mean": 1.1}), ("val_bpb is {'mean': 1.1}", "plain number")),
    "score as text": (edit_row(val_loss="1.9"), ("val_loss is '1.9'", "plain number")),
    "score of 400 digits": (edit_row(val_loss=10**400), ("val_loss is 1000", "plain number")),
    "no score": (edit_row(val_bpb=None), ("val_bpb is missing",)),
    "no author": (edit_row(author=None), ("author is None", "text")),
    "date": (edit_row(date="21 November"), ("date is '21 November'", "YYYY-MM-DD")),
    "seeds by name": (edit_row(seeds={"1": 1.1}), ("seeds is {'1': 1.1}", "a list")),
    "two seeds claimed": (edit_row(seeds=[42, 1337]), ("seeds has 2", "at least 3")),
    "other seeds": (edit_row(seeds=[1, 2, 3]), ("seeds [1, 2, 3]", "42, 1337, 2025")),
    "results as list": (edit_row(seed_results=[1]), ("seed_results is [1]",)),
    "another score": (edit_row(val_bpb=1.1), ("val_bpb is 1.1", "the mean over the seeds 1.125")),
    "another loss": (edit_row(val_loss=1.8), ("val_loss is 1.8", "the mean over the seeds 1.902")),
    "a seed's score": (
        edit_row(seed_results={str(seed): {"val_bpb": 1.1} for seed in LOSSES}),
        ("seed 42 has val_bpb 1.1", "its log 1.126"),
    ),
    "a seed's loss": (
        edit_row(seed_results=results_with(val_loss=1.8)),
        ("seed 42 has val_loss 1.8", "its log 1.9034"),
    ),
    "a seed's loss as text": (
        edit_row(seed_results=results_with(val_loss="1.9")),
        ("seed_results[42] has val_loss '1.9'", "no plain number"),
    ),
    "the best seed's score": (
        edit_row(seed_results=None, val_bpb=min(LOSSES.values()) / 1.69),
        ("val_bpb is 1.1247", "the mean over the seeds 1.125"),
    ),
    "the best seed's loss": (
        edit_row(seed_results=None, val_loss=min(LOSSES.values())),
        ("val_loss is 1.9008", "the mean over the seeds 1.902"),
    ),
    "a stage of one seed": (
        edit_row(seed_results=None, val_bpb=(min(LOSSES.values()) + 0.01) / 1.69),
        ("val_bpb is 1.1306", "the mean over the seeds 1.125"),
    ),
    "a seed left out": (
        lambda folder: write_log(folder, 7),
        ("train_seed7.jsonl is of seed 7", "seed_results leaves out"),
    ),
    "a seed left out of seeds": (
        lambda folder: (write_log(folder, 7), edit_row(seed_results=None)(folder)),
        ("train_seed7.jsonl is of seed 7", "seeds leaves out"),
    ),
    "bytes claimed": (edit_row(bytes_total=15_000_000), ("bytes_total is 15,000,000", "have 15,800,022")),
    "code claimed": (edit_row(bytes_code=3), ("bytes_code is 3", "22 bytes")),
    "too many claimed": (edit_row(bytes_total=16_000_001), ("bytes_total is 16,000,001", "16,000,000")),
    "compliance": (edit_row(compliance={"eval_under_600s": False}), ("eval_under_600s: false",)),
    "no logs": (
        lambda folder: [path.unlink() for path in folder.glob("train_seed*")],
        ("logs", "no log of a run", "train_seed1337.log"),
    ),
    "a log too few": (
        lambda folder: [path.unlink() for path in folder.glob("train_seed42.*")],
        ("seeds", "2 given", "at least 3"),
    ),
    "damaged log": (put("train_seed42.jsonl", '{"event": "step"\n'), ("train_seed42.jsonl", "no JSON")),
    "other code": (put("train_gpt.py", SCRIPT + "y = 2\n"), ("train_seed42.jsonl", "other source")),
    "unfinished": (edit_log(42, lambda rows: rows.pop()), ("train_seed42.jsonl", "did not finish")),
    **{
        name: (edit_log(42, SPOILT[name][0]), SPOILT[name][1])
        for name in ("verdict", "mass", "digits", "training", "evaluation", "hardware", "setting", "restart",
                     "other targets", "other bytes", "other text", "code")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_reviewer_would_refuse_is_refused(name: str, good: Path, capsys: pytest.CaptureFixture[str]):
    spoil, words = FAULTS[name]
    spoil(good)
    code, refusals, _ = check(good, capsys)
    assert code == 1
    assert [line for line in refusals if all(word in line for word in words)], refusals


def test_a_stage_may_be_claimed_as_the_mean_of_all_seeds_or_of_the_only_one(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_row(seed_results=None)(good)
    for losses in ([*LOSSES.values()], [LOSSES[1337]]):
        for seed in set(LOSSES) - {1337} if len(losses) == 1 else ():
            (good / f"train_seed{seed}.jsonl").unlink()
            (good / f"train_seed{seed}.log").unlink()
        for loss in (statistics.fmean(losses), statistics.fmean(losses) + 0.01):
            edit_row(val_loss=loss, val_bpb=loss / 1.69)(good)
            assert check(good, capsys, *NON_RECORD)[:2] == (0, [])
        edit_row(val_loss=losses[0] - 0.01)(good)
        assert check(good, capsys, *NON_RECORD)[0] == 1


def test_what_the_folder_does_not_say_is_unknown(good: Path, capsys: pytest.CaptureFixture[str]):
    (good / "other.py").write_text("")
    (good / "notes.txt").write_text("nothing\n")
    (good / "train_seed42.log").unlink()
    for seed in LOSSES:
        write_log(good, seed, without("evaluation", "validation"))
    (good / "train_seed42.log").unlink()
    edit_row(blurb=None)(good)
    code, refusals, unknowns = check(good, capsys)
    assert (code, refusals) == (0, [])
    for words in (
        ("other.py", "not counted"), ("notes.txt",), ("s of evaluation",), ("how many targets",), ("no blurb",),
        ("train_seed42.jsonl", "does not begin with its source"), ("import", "--no-import"), ("validation text",),
    ):  # fmt: skip
        assert [line for line in unknowns if all(word in line for word in words)], (words, unknowns)


def test_a_folder_is_named_and_placed_as_the_contest_has_it(good: Path, capsys: pytest.CaptureFixture[str]):
    moved = good.rename(good.parents[1] / "mine")
    edit_row(track=None)(moved)
    code, refusals, unknowns = check(moved, capsys)
    assert code == 1
    assert [line for line in refusals if "YYYY-MM-DD_name" in line]
    assert [line for line in unknowns if line.split()[1] == "track:"]
    (moved / "train_seed42.jsonl").unlink()
    (moved / "train_seed42.log").unlink()
    assert [line for line in check(moved, capsys)[1] if "2 given" in line]
    assert not [line for line in check(moved, capsys, *NON_RECORD)[1] if "2 given" in line]
    assert_refused(capsys, record.main, ["check", moved / "no such"], "no such", "no folder")


# A log as other scripts of the contest write it: source, versions, settings, steps, results.
FOREIGN = """import torch
print(f"val_loader:shards pattern={{files}} tokens:{{count}}")
{rule}
Running PyTorch 2.9.1+cu128
{rule}
val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:{targets}
tie_embeddings:True embed_lr:0.035 matrix_lr:{lr}
seed:{seed}
warmup_step:1/20
step:1/9000 train_loss:6.9326 train_time:131ms step_avg:130.97ms
step:7412/9000 val_loss:1.9303 val_bpb:1.1432 train_time:{train_ms}ms step_avg:80.95ms
stopping_early: wallclock_cap train_time:{train_ms}ms step:7412/9000
Serialized model: 105783807 bytes
Code size: 64415 bytes
Serialized model int6+zstd: {artifact} bytes
Total submission size int6+zstd: {total} bytes
final_int6_roundtrip val_loss:1.9490 val_bpb:1.1543 eval_time:5932ms
final_int6_roundtrip_exact val_loss:1.94903166 val_bpb:1.15432633
final_int6_sliding_window val_loss:1.9110 val_bpb:1.1318 stride:64 eval_time:{eval_ms}ms
final_int6_sliding_window_exact val_loss:1.91095901 val_bpb:{bpb}
"""
USUAL = dict(targets=62021632, lr=0.025, train_ms=600001, artifact=15624965, total=15689380, eval_ms=68889)


def foreign(folder: Path, **changes: Any) -> Path:
    """The good folder, as somebody else would have made it: text logs alone, and few fields; one seed changed."""
    for path in folder.glob("train_seed*"):
        path.unlink()
    for seed, bpb in ((1337, 1.13178056), (42, 1.132), (7, 1.1315)):
        facts: dict[str, Any] = dict(rule="=" * 100, seed=seed, bpb=bpb) | USUAL | (changes if seed == 7 else {})
        (folder / f"train_seed{seed}.log").write_text(FOREIGN.format(**facts))
    row = dict(
        author="A", github_id="a", name="N", blurb="b", date="2026-03-20T08:45:00Z", val_loss=1.91095901,
        val_bpb=1.1318, bytes_total=15689380, bytes_code=22,
    )  # fmt: skip
    (folder / "submission.json").write_text(json.dumps(row))
    return folder


def test_a_folder_of_somebody_else_is_read_by_the_usual_lines(good: Path, capsys: pytest.CaptureFixture[str]):
    code, refusals, unknowns = check(foreign(good), capsys)
    assert (code, refusals) == (0, [])
    for words in (("sum to 1",), ("seed_results",), ("train_seed7.log", "whether it is of this train_gpt.py")):
        assert [line for line in unknowns if all(word in line for word in words)], (words, unknowns)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(targets=1000), ("1,000 validation targets", "62,021,632")),
        (dict(lr=0.03), ("MATRIX_LR='0.03'",)),
        (dict(train_ms=601000), ("601.0 s of training",)),
        (dict(eval_ms=595000), ("600.9 s of evaluation",)),
        (dict(artifact=16000000), ("16,000,022 bytes",)),
        (dict(total=16000001), ("16,000,001 bytes in all",)),
        (dict(seed=42), ("seed 42 more than once",)),
    ],
)
def test_faults_of_somebody_elses_logs_are_refused(change, words, good: Path, capsys: pytest.CaptureFixture[str]):
    code, refusals, _ = check(foreign(good, **change), capsys)
    assert code == 1
    assert [line for line in refusals if all(word in line for word in words)], refusals


def test_what_a_folder_says_steers_no_terminal(good: Path, capsys: pytest.CaptureFixture[str]):
    red = "\x1b[31m"
    edit_row(seed_results={red: {}}, compliance={red: False}, track=red)(good)
    edit_log(42, lambda rows: row_of(rows, "config").update({red: red}))(good)
    code, refusals, _ = check(good, capsys)
    assert code == 1
    assert sum("[31m" in line for line in refusals) >= 3
    assert not any("\x1b" in line for line in refusals)


ODD_VALUES = (None, True, -1, 1e400, "text", [], [1, "a"], {}, {"a": 1}, 10**30, math.nan, 10**400)


@pytest.mark.parametrize("seed", range(60))
def test_odd_values_end_in_a_line_and_not_in_a_traceback(seed: int, good: Path, capsys: pytest.CaptureFixture[str]):
    source = random.Random(seed)
    path = source.choice(sorted(good.glob("*.json*")))
    texts = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
    rows = [json.loads(text) for text in texts]
    for _ in range(source.choice((1, 1, 3))):
        row = source.choice(rows)
        row[source.choice([name for name in row if name != "event"] or ["event"])] = source.choice(ODD_VALUES)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check(good, capsys)[0] in (0, 1)
    assert record.main(summary_of(sorted(good.glob("*.jsonl")), good / "again.json")) in (0, 2)


ODD_LOG = f"""seed:abc
step:1/2 train_time:1.1.1ms
step:{"9" * 9000}/2 train_time:2ms
Code size: {"9" * 9000} bytes
odd_exact val_loss:1..2 val_bpb:1.
odd_exact val_loss:1.2 val_bpb:1.3
"""


def test_files_of_any_content_end_in_a_line_and_not_in_a_traceback(good: Path, capsys: pytest.CaptureFixture[str]):
    odd_step = f'{{"event": "step:{"9" * 5000}/2"}}'
    for text in ("[" * 100_000, "null", "", "\0", "x = " + "(" * 5000, '{"event": 1}', odd_step, ODD_LOG):
        for name in ("submission.json", "train_seed42.jsonl", "train_seed7.log", "train_gpt.py", "README.md"):
            before = (good / name).read_bytes() if (good / name).exists() else b""
            (good / name).write_text(text)
            assert check(good, capsys)[0] in (0, 1)
            (good / name).write_bytes(before)


@pytest.mark.parametrize(
    "line",
    ["import_module(name)", "import_module(a.name)", "import_module('/')", "import_module('..')", "from . import x",
     f"import {'x' * 400}"],
)  # fmt: skip
def test_an_import_that_names_no_file_leads_to_none(
    line: str, good: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{SCRIPT}def f(import_module, name, a):\n    {line}\n"
    (good / "train_gpt.py").write_text(text)
    monkeypatch.chdir(good)
    for folder in (".", str(good)):
        assert record.main(["check", folder, "--no-import"]) == 1  # the logs begin with other source
        assert f"ok       code: {len(text):,} bytes of code, in train_gpt.py\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "verdict", "words"),
    [
        ("x = 1\n", "ok", ("without CUDA",)),
        ("import no_such_package\n", "REFUSED", ("no_such_package", "requirements.txt")),
        ("import declared_package\n", "unknown", ("declared_package", "install it here")),
        ("open('left', 'w').close()\n", "REFUSED", ("leaves files behind: left",)),
        ("raise SystemExit(0)\n", "REFUSED", ("ends the process",)),
        ("print('hello')\n", "REFUSED", ("prints 'hello'",)),
        ("print('hello')\nraise SystemExit(0)\n", "REFUSED", ("ends the process",)),
        ("import atexit\natexit.register(print, 1)\n", "REFUSED", ("prints '1'",)),
        ("import os\nos.environ['DATA_PATH']\n", "REFUSED", ("KeyError", "DATA_PATH")),
    ],
)
def test_the_script_is_imported_in_a_bare_process(script, verdict, words, good, capsys, monkeypatch):
    monkeypatch.setenv("DATA_PATH", "somewhere")
    (good / "train_gpt.py").write_text(script)
    (good / "requirements.txt").write_text("declared-package>=1\n")
    assert record.main(["check", str(good)]) in (0, 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " import: " in line]
    assert line.startswith(verdict)
    assert all(word in line for word in words)


def test_readable_sources_are_what_the_script_unpacks(folder: Path, capsys: pytest.CaptureFixture[str]):
    def about_sources() -> list[str]:
        return [line for line in check(folder, capsys)[1] if " source: " in line]

    path = folder / "source" / "swarm_agents.py"
    path.write_text(path.read_text(encoding="utf-8").replace("LARGE_GRAD_NORM = 2.0", "LARGE_GRAD_NORM = 3.0"))
    assert about_sources()
    text = SOURCES["swarm_agents.py"].replace("LARGE_GRAD_NORM = 2.0", "LARGE_GRAD_NORM = 2.0  # a comment")
    path.write_text(text, encoding="utf-8")
    assert not about_sources()
    path.unlink()
    assert [line for line in about_sources() if "swarm_agents.py is missing" in line]
