"""Benchmarks and tools start from any folder, explain themselves, and say where and on what they measured."""

import dataclasses
import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from support import read_events, tiny_environ

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common, mixing_quality, run_all
from tools import demo_summary, report

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(REPO / "bench").glob("*.py"), *(REPO / "tools").glob("*.py"), *(REPO / "data").glob("*.py")])
PROGRAMS = [path for path in SCRIPTS if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]


# Each program in a fork of one process that has loaded torch already: a fresh start of each would take a minute in all.
HELP_OF_ALL = """
import contextlib, io, json, os, runpy, sys
import torch
for script in sys.argv[1:]:
    read, write = os.pipe()
    if os.fork() == 0:
        printed, code = io.StringIO(), None
        sys.argv, sys.path[0] = [script, "--help"], os.path.dirname(script)
        try:
            with contextlib.redirect_stdout(printed):
                runpy.run_path(script, run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code
        os.write(write, printed.getvalue()[:4000].encode())
        os._exit(0 if code in (0, None) else 1)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        printed = pipe.read().decode(errors="replace")
    print(json.dumps([script, os.waitstatus_to_exitcode(os.wait()[1]), printed]), flush=True)
"""


@pytest.fixture(scope="module")
def help_of_all(tmp_path_factory) -> tuple[dict[str, tuple[int, str]], str]:
    """Exit code and text of every program's --help, run from an empty folder, and what they wrote to stderr."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-c", HELP_OF_ALL, *map(str, PROGRAMS)]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert not list(folder.iterdir())
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    return {script: (code, text) for script, code, text in rows}, process.stderr


@pytest.mark.parametrize("script", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help_works_from_another_folder(script, help_of_all):
    code, text = help_of_all[0][str(script)]
    assert code == 0, help_of_all[1]
    assert text.startswith("usage:")


def run_quick(name: str, monkeypatch, capsys, *arguments: str) -> dict:
    """The last line of a benchmark's quick run in this process."""
    module = importlib.import_module(f"bench.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--device", "cpu", "--quick", "--threads", "1", *arguments])
    assert not module.main()
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize(("name", "option"), [("counts", "--tokens"), ("muon", "--worlds"), ("ttt", "--seqs")])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_a_size_of_nothing_is_one_line(name, option, value, monkeypatch, capsys):
    module = importlib.import_module(f"bench.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", option, value])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 2
    assert f"{option}: invalid positive value: '{value}'" in capsys.readouterr().err.splitlines()[-1]


QUICK_RUNS = [
    ("swarm_overhead", ()), ("counts", ()), ("artifact", ()), ("train_step", ()), ("evaluation", ()), ("ttt", ()),
    ("reading", ()), ("cpu_step", ()), ("forward_backward", ("--no-compile",)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), QUICK_RUNS, ids=[name for name, _ in QUICK_RUNS])
def test_the_last_line_says_what_was_measured_where_and_of_which_commit(name, arguments, monkeypatch, capsys):
    result = run_quick(name, monkeypatch, capsys, *arguments)
    assert result["bench"] == name
    assert result["commit"] == common.git_commit()
    assert {"device", "cpu", "cores", "threads", "python", "torch", "numpy", "load"} <= set(result["machine"])
    assert result["machine"]["torch"] == torch.__version__
    assert result["headlines"]
    for line in result["headlines"]:
        assert line["value"] > 0
        assert line["unit"]


def test_the_gpu_check_runs_on_a_cpu_and_says_what_it_left_out(monkeypatch, capsys):
    """`compiled` and `grid`, which compile for half a minute, are left to the GPU and to tests of their own."""
    names = ["golden", "fp32", "bf16", "attention", "step", "rates", "evaluation", "ttt", "counts"]
    module = importlib.import_module("bench.gpu_check")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--quick", "--threads", "1", "--only", *names])
    assert module.main() == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.strip().splitlines()[-1])
    expected = dict.fromkeys(names, "done") | {"fp32": "skipped"}
    assert {row["check"]: row["status"] for row in result["checks"]} == expected
    assert printed.count("SKIPPED attention") == 4  # fa3 and cudnn, in two checks
    assert {*re.findall(r"micro-batches of (\d[\d,]*\d)", printed)} == {"256", "512", "1,024"}
    assert "says nothing about a GPU" in printed
    assert set(names) | {"compiled", "grid"} == set(module.CHECKS)


def test_a_failing_gpu_check_is_reported_and_the_next_one_runs(monkeypatch, capsys):
    module = importlib.import_module("bench.gpu_check")
    wrong = module.Finding.within("never within", float("nan"), 1.0)

    def raises(_bench):
        yield module.Finding("before the end", 1.0)
        raise RuntimeError("no such kernel")

    checks = {"wrong": lambda _bench: iter([wrong]), "raises": raises, "last": lambda _bench: iter(())}
    monkeypatch.setattr(module, "CHECKS", checks)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--quick", "--threads", "1"])
    assert module.main() == 1
    printed = capsys.readouterr().out
    result = json.loads(printed.strip().splitlines()[-1])
    assert result["failed"] == ["wrong", "raises"]
    assert [row["status"] for row in result["checks"]] == ["failed", "failed", "done"]
    assert "no such kernel" in printed
    assert result["checks"][1]["findings"][0]["what"] == "before the end"


def test_one_failing_benchmark_does_not_lose_the_rest(tmp_path):
    line = json.dumps(dict(bench="fine", headlines=[dict(what="speed", value=2.0, unit="x")]))
    (tmp_path / "fine.py").write_text(f"print('a table'); print({line!r})")
    (tmp_path / "broken.py").write_text("raise SystemExit('out of paper')")
    (tmp_path / "silent.py").write_text("")
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    (tmp_path / "over.py").write_text(f"print({line!r}); raise SystemExit(1)")
    names = ("broken", "absent", "silent", "slow", "over", "fine")
    rows = run_all.run_all(tuple(run_all.Job(name, 1.0) for name in names), [], tmp_path)
    outcome = {row["script"]: row for row in rows}
    assert list(outcome) == ["broken", "silent", "slow", "over", "fine"]
    assert "out of paper" in outcome["broken"]["error"]
    assert "no result line" in outcome["silent"]["error"]
    assert outcome["slow"]["error"] == "not done within 1 s"
    assert outcome["over"]["error"] == "exit code 1"
    assert outcome["over"]["result"] == outcome["fine"]["result"] == json.loads(line)
    assert "error" not in outcome["fine"]


def test_every_job_names_a_script_that_is_there():
    scripts = {path.stem for path in (REPO / "bench").glob("*.py")}
    for jobs in run_all.JOBS.values():
        assert {job.script for job in jobs} <= scripts
    shared = {"common", "golden", "run_all", "tiny"}
    studies = {"fault_campaign", "gpu_check", "mixing_quality", "mutations", "packing", "quantization"}
    studies |= {"lemmatizer", "ttt_gain"}  # which take their own time, as those above
    assert scripts - shared - studies == {job.script for job in run_all.JOBS["cpu"]}


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "kept"),
    [(2.0, 1.5, True, True), (1.0, 1.5, True, False), (1.0, 1.5, False, True), (2.0, 1.5, False, False)],
)
def test_a_limit_is_a_floor_or_a_ceiling(value, limit, at_least, kept):
    assert common.Headline("x", value, "s", limit, at_least).row()["kept"] is kept
    assert "kept" not in common.Headline("x", value, "s").row()


def test_spread_and_turns():
    assert common.spread([3.0, 1.0, 2.0]) == dict(median=2.0, min=1.0, max=3.0, repeats=3)
    calls: list[str] = []
    seconds = common.timed_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 1, 2)
    assert calls == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_flops_of_the_record_are_229_million_a_token():
    import train_gpt

    config = train_gpt.Config.from_env({"RECIPE": "swarm"})
    assert common.train_flops_per_token(config, 2048) == pytest.approx(229e6, rel=0.005)
    twice, deeper = dataclasses.replace(config, repeat_layers=(4, 5)), dataclasses.replace(config, num_layers=13)
    assert common.train_flops_per_token(twice, 2048) == common.train_flops_per_token(deeper, 2048)


def test_outside_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert common.git_commit(tmp_path) == "unknown"


def written_run(device: str, date: str, value: float, **extra) -> dict:
    machine = dict(cpu="A chip", cores=2, torch="2.13", threads=2)
    line = dict(what="speed", value=value, unit="tokens/s", limit=473.0, at_least=True, kept=value >= 473)
    scripts = [
        dict(script="fine", result=dict(headlines=[line], machine=machine)),
        dict(script="broken", error="not done within 9 s"),
    ]
    return dict(device=device, date=date, commit="abc", load_before=0.5, quick=False, scripts=scripts) | extra


def test_the_table_is_made_of_the_newest_whole_run_of_each_device(tmp_path):
    runs = [
        written_run("cpu", "2026-01-01T00:00:00", 100.0), written_run("cpu", "2026-02-01T00:00:00", 1234.5),
        written_run("cpu", "2026-03-01T00:00:00", 9.0, quick=True), written_run("cuda", "2026-01-05T00:00:00", 400.0),
        written_run("cpu", "2026-04-01T00:00:00", 9.0, only=["fine"]),
    ]  # fmt: skip
    for number, run in enumerate(runs):
        (tmp_path / f"{run['device']}-{number}.json").write_text(json.dumps(run))
    (tmp_path / "cpu-ablation.json").write_text(json.dumps(dict(bench="ablation")))
    text = "\n".join(report.performance(tmp_path))
    assert "| speed | 1,234 tokens/s | ≥ 473 | `bench/fine.py` |" in text
    assert "| speed | 400 tokens/s | ≥ 473, missed | `bench/fine.py` |" in text
    assert "9 tokens/s" not in text
    assert text.index("CPU: ") < text.index("CUDA: ")
    assert "`bench/broken.py` (not done within 9 s)" in text


MARKERS = ("<!-- x -->\n", "<!-- /x -->\n")


def test_lines_take_the_place_of_those_between_their_markers():
    assert report.filled("a\n{}old\n{}b\n".format(*MARKERS), "x", ["new"]) == "a\n{}new\n{}b\n".format(*MARKERS)


@pytest.mark.parametrize("text", ["", MARKERS[0], "".join(reversed(MARKERS)), "".join(MARKERS * 2)])
def test_a_page_without_one_pair_of_markers_is_refused(text):
    with pytest.raises(report.ReportError, match="x"):
        report.filled(text, "x", [])


def test_no_results_are_an_error_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(report.ReportError, match=r"run bench/run_all\.py"):
        report.performance(tmp_path)


def test_the_log_of_an_unfinished_run_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REPO", tmp_path)
    (tmp_path / "logs").mkdir()
    whole = sorted((REPO / "logs").glob("docs_*_seed*.jsonl"))[0]
    rows = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    copy = tmp_path / "logs" / whole.name
    copy.write_text("".join(rows), encoding="utf-8")
    assert [len(runs) for runs in report.committed_runs().values()] == [1]
    for kept in (0, 1, 3, len(rows) - 3):
        copy.write_text("".join(rows[:kept]), encoding="utf-8")
        with pytest.raises(report.ReportError, match=whole.name):
            report.committed_runs()


@pytest.mark.parametrize("damage", ["absent", "truncated", "another"])
def test_results_that_cannot_be_used_are_named_in_a_line(damage, tmp_path, monkeypatch, capsys):
    """A file that is away, ends early, or holds something else."""
    for path in report.RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    damaged = tmp_path / "cpu-ablation.json"
    text = damaged.read_text(encoding="utf-8")
    damaged.unlink()
    if damage != "absent":
        damaged.write_text(text[:100] if damage == "truncated" else "[1]")
    for words in ([], ["--write", "--folder", str(REPO)]):
        assert report.main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert "ablation" in said
        assert said.count("\n") == 1


def test_seeds_of_one_row_by_the_clock_have_the_same_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REPO", tmp_path)
    (tmp_path / "logs").mkdir()
    for path in sorted((REPO / "logs").glob("clock_xeon_laptop_seed*.jsonl")):
        shutil.copy(path, tmp_path / "logs")
    assert len(report.by_the_clock()) == 3
    other = tmp_path / "logs" / "clock_xeon_laptop_seed42.jsonl"
    text = other.read_text(encoding="utf-8")
    other.write_text(re.sub(r'("parallel_residual_from"): \d+', r"\1: 9", text), encoding="utf-8")
    with pytest.raises(report.ReportError, match="parallel_residual_from"):
        report.by_the_clock()


def test_pages_that_are_out_of_date_are_written_again(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    for name, parts in report.PAGES.items():
        text = (REPO / name).read_text(encoding="utf-8")
        for part in parts:
            text = report.filled(text, part, ["of last year"])
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert report.main(["--write", "--folder", str(tmp_path)]) == 0
    for name in [*report.PAGES, "docs/settings.md"]:
        made, committed = ((folder / name).read_text(encoding="utf-8") for folder in (tmp_path, REPO))
        assert made == committed, f"{name}: run python tools/report.py --write"
    (tmp_path / "docs" / "faults.md").unlink()
    assert report.main(["--write", "--folder", str(tmp_path)]) == 2
    assert "docs/faults.md" in capsys.readouterr().err


def test_the_demo_summary_says_what_the_log_says(tiny_data, tmp_path, run_main, capfd):
    """Whatever the artifact's bits and the average are."""
    options = dict(ITERATIONS=3, ATTN_BITS=5, MLP_BITS=6, WEIGHT_AVERAGE="none", TTT_ENABLED=0)
    assert run_main(tiny_environ(tiny_data, tmp_path, **options)).returncode == 0
    rows = {row["event"]: row for row in read_events(tmp_path / "logs" / "run.jsonl")}
    names = ("final_int8_zlib_roundtrip_exact", "diagnostic", "final_int5_6_roundtrip_exact")
    final, before, after = (rows[name]["val_bpb"] for name in names)
    capfd.readouterr()
    demo_summary.main([str(tmp_path)])
    reached, artifact, compressed, drawn = capfd.readouterr().out.splitlines()
    assert str(tmp_path / "report.html") in drawn
    assert f"{final:.4f} bits per byte" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f" {final:.3f} bits per byte on " in reached
    assert artifact.endswith(f" from {before:.4f} to {after:.4f}.")
    assert f" {rows['artifact_bytes']['bytes']:,} bytes" in artifact
    zstd, xz = (float(word) for word in re.findall(r"(\d\.\d{3}) ", compressed))
    assert 1 < zstd < 8
    assert 1 < xz < 8


def test_the_plot_of_the_mixers_begins_where_its_curves_do(tmp_path):
    """Whatever the first targets cost, of which nothing is drawn."""
    logp = np.full(20_000, -1.0)
    logp[:200] = -8.0
    curves = {
        (stream, mixer): logp for stream in ("sliding window", "score-first TTT") for mixer in mixing_quality.MIXERS
    }
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        mixing_quality.plot(curves, np.ones(20_000), tmp_path / "plot.svg")
    ticks = re.findall(r"text-anchor: end[^>]*>([\d.]+)</text>", (tmp_path / "plot.svg").read_text(encoding="utf-8"))
    drawn = [200 * 8 + count - 200 for count in (1001, 20_000)]
    highest, lowest = (nats / count / math.log(2) for nats, count in zip(drawn, (1001, 20_000)))
    assert len(ticks) >= 3
    assert lowest - 0.15 < min(map(float, ticks)) < max(map(float, ticks)) < highest + 0.15


@pytest.mark.parametrize("path", sorted((REPO / "bench" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_results_name_their_commit_and_no_folder_of_that_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r'"(?:/|~|[A-Z]:)[^"]*/[^"]*"', text)
    assert re.fullmatch(r"[0-9a-f]{7,}", json.loads(text)["commit"])
    assert '"kept": false' not in text  # no limit is missed
