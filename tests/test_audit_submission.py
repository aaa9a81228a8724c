"""An adapter's scorer is judged by what it answers: honest ones pass, each kind of dishonest one fails its check."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import audit_submission
import numpy as np
import pytest
from support import REPO, Run

# What the adapters below have in common: predictions from counts of what was scored, mixed with a bigram's.
PRELUDE = """
import numpy as np

VOCAB_SIZE, LENGTHS = 6, (60, 120)


def rows(tokens):
    '''(N, V): the prediction for each target from the tokens before it.'''
    singles, pairs, found = np.ones(VOCAB_SIZE), np.full((VOCAB_SIZE, VOCAB_SIZE), 0.2), []
    for before, token in zip(tokens[:-1], tokens[1:]):
        found.append(0.3 * singles / singles.sum() + 0.7 * pairs[before] / pairs[before].sum())
        singles[token] += 1
        pairs[before, token] += 1
    return np.array(found)


def entries(table, tokens):
    return np.log(table[np.arange(len(table)), tokens[1:]]), np.arange(len(table))
"""
HONEST = "def score(tokens):\n    return entries(rows(tokens), tokens)\n"
LINEAR_TTT = """
def score(tokens):
    weights, logp = np.zeros((VOCAB_SIZE, VOCAB_SIZE)), []
    for start in range(0, len(tokens) - 1, 20):
        before, target = tokens[start:-1][:20], tokens[start + 1 :][:20]

        def predict():
            odds = np.exp(weights[before])
            return odds / odds.sum(1, keepdims=True)

        def adapt():
            for _ in range(3):
                error = np.eye(VOCAB_SIZE)[target] - predict()
                np.add.at(weights, before, 0.1 * error)

        STEPS
    return np.concatenate(logp), np.arange(len(tokens) - 1)
"""
SCORE_CHUNK = "logp.append(np.log(predict()[np.arange(len(target)), target]))"


class Result:
    """Exit code, findings by check, and both streams of an audit."""

    def __init__(self, code: int, findings: list[dict[str, Any]], out: str, err: str):
        self.code, self.out, self.err = code, out, err
        self.findings = {finding["check"]: finding for finding in findings}

    def failed(self) -> list[str]:
        return [name for name, finding in self.findings.items() if finding["result"] == "FAIL"]


@pytest.fixture
def examine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Audit an adapter of the given text, after the prelude, in few positions unless told otherwise."""

    def run(text: str, *options: str, prelude: str = PRELUDE) -> Result:
        path = tmp_path / "adapter.py"
        path.write_text(prelude + textwrap.dedent(text), encoding="utf-8")
        findings = tmp_path / "findings.json"
        findings.unlink(missing_ok=True)
        words = ["--submission", str(path), "--positions", "12", "--seed", "5", "--json", str(findings), *options]
        code = audit_submission.main(words)
        streams = capsys.readouterr()
        found = json.loads(findings.read_text(encoding="utf-8"))["findings"] if findings.exists() else []
        return Result(code, found, streams.out, streams.err)

    return run


# ---- honest scorers ----------------------------------------------------------------------------------------------


def test_honest_scorer_passes_at_every_position_that_was_asked_for(examine: Any) -> None:
    result = examine(HONEST, "--positions", "120")
    assert (result.code, result.failed()) == (0, [])
    assert {name for name, f in result.findings.items() if f["result"] == "PASS"} == {*result.findings} - {"bytes"}
    for name in ("mass", "causality"):
        assert "120 positions (a fault at 2.5% of them" in result.findings[name]["found"]


def test_score_first_adaptation_passes(examine: Any) -> None:
    result = examine(LINEAR_TTT.replace("STEPS", f"{SCORE_CHUNK}; adapt()"))
    assert (result.code, result.failed()) == (0, [])
    assert result.findings["mass"]["result"] == "PASS"


def test_order_of_scoring_is_free(examine: Any) -> None:
    result = examine("def score(tokens):\n    return [x[::-1] for x in entries(rows(tokens), tokens)]\n")
    assert (result.code, result.failed()) == (0, [])


def test_seed_repeats_an_audit(examine: Any) -> None:
    def figures(seed: str) -> list[str]:
        return [finding["found"] for finding in examine(ENDS_EARLY, "--seed", seed).findings.values()]

    assert figures("8") == figures("8") != figures("9")


# ---- dishonest and careless ones ---------------------------------------------------------------------------------

ENDS_EARLY = """
def score(tokens):  # leaves the last targets out
    logp, index = entries(rows(tokens), tokens)
    return logp[:-2], index[:-2]
"""
HASHED = """
def score(tokens):  # a context's count and that of context and target come from two tables, each with its collisions
    contexts, wholes, logp = np.zeros(4), np.zeros(4), []
    for before, token in zip(tokens[:-1], tokens[1:]):
        context, whole = before % 4, (5 * before ^ 3 * token) % 4
        ratio = min(wholes[whole], contexts[context]) / max(contexts[context], 1)
        logp.append(np.log(0.5 / VOCAB_SIZE + 0.5 * ratio))
        contexts[context] += 1
        wholes[whole] += 1
    return np.array(logp), np.arange(len(logp))
"""
ENTROPY = """
def score(tokens):  # the prediction's entropy, taken for the loss of one more expert
    table = rows(tokens)
    entropy = -(table * np.log(table)).sum(1)
    logp, index = entries(table, tokens)
    return np.log(0.5 * np.exp(logp) + 0.5 * np.exp(-entropy)), index
"""
END = """
def score(tokens):  # the stream's end helps from the start
    table = 0.9 * rows(tokens) + 0.1 * np.eye(VOCAB_SIZE)[tokens[-1]]
    return entries(table, tokens)
"""
TWO_PASSES = """
def score(tokens):  # the stream is scored, and then again with all that was learned from it
    table = rows(tokens)
    logp, index = entries(table, tokens)
    again, _ = entries(np.tile(table[-1], (len(table), 1)), tokens)
    return np.concatenate([logp, again]), np.concatenate([index, index])
"""
LAST_TWICE = """
def score(tokens):  # two windows end with the stream
    logp, index = entries(rows(tokens), tokens)
    return np.concatenate([logp, logp[-8:]]), np.concatenate([index, index[-8:]])
"""
REMEMBERS = """
seen = np.ones(VOCAB_SIZE)


def score(tokens):
    global seen
    table = 0.8 * rows(tokens) + 0.2 * seen / seen.sum()
    seen = seen + np.bincount(tokens, minlength=VOCAB_SIZE)
    return entries(table, tokens)
"""
RANDOM_START = """
start = np.random.default_rng().random(VOCAB_SIZE) + 1


def score(tokens):
    return entries(0.8 * rows(tokens) + 0.2 * start / start.sum(), tokens)
"""
NOT_A_NUMBER = """
def score(tokens):
    logp, index = entries(rows(tokens), tokens)
    logp[40] = np.nan
    return logp, index
"""


@pytest.mark.parametrize(
    ("text", "checks"),
    [
        (HASHED, ["mass"]),
        (ENTROPY, ["mass"]),
        (END, ["causality"]),
        (LINEAR_TTT.replace("STEPS", f"adapt(); {SCORE_CHUNK}"), ["causality", "mass"]),
        (LINEAR_TTT.replace("[:20]", "[:1]").replace("1, 20)", "1, 1)").replace("STEPS", f"adapt(); {SCORE_CHUNK}"),
         ["mass"]),
        (TWO_PASSES, ["every target once", "causality", "mass"]),
        (LAST_TWICE, ["every target once"]),
        (ENDS_EARLY, ["every target once"]),
        (REMEMBERS, ["determinism"]),
        (RANDOM_START, ["determinism"]),
        (NOT_A_NUMBER, ["log-probabilities"]),
    ],
    ids=["hashed", "entropy", "end", "chunk first", "token first", "two passes", "last twice", "ends early",
         "remembers", "random start", "not a number"],
)  # fmt: skip
def test_fault_fails_its_check(examine: Any, text: str, checks: list[str]) -> None:
    result = examine(text)
    assert result.code == 1
    assert set(checks) <= set(result.failed())
    if checks[0] not in ("log-probabilities", "determinism"):  # what fails beside these follows from them
        assert result.failed() == checks


def test_figures_of_the_faults_are_right(examine: Any) -> None:
    assert "8 scored again (13.33%)" in examine(LAST_TWICE).findings["every target once"]["found"]
    assert "2 missing" in examine(ENDS_EARLY).findings["every target once"]["found"]
    uniform = f"def score(tokens):\n    return np.full(len(tokens) - 1, np.log(2.5 / VOCAB_SIZE)), {INDEX}\n"
    assert "mass 2.5 to 2.5, not 1 at 3 of 3" in examine(uniform).findings["mass"]["found"]


INDEX = "np.arange(len(tokens) - 1)"
AT_FEW = """
def score(tokens):  # {share} of all places, which no rule gives away
    table = rows(tokens)
    chosen = np.flatnonzero(np.random.default_rng(3).random(10_000)[: len(table)] < {share})
    {fault}
    return entries(table, tokens)
"""
PEEKS = "table[chosen, tokens[1:][chosen]] *= 1.2"
LOOKS_AHEAD = "table[chosen] = 0.9 * table[chosen] + 0.1 * np.eye(VOCAB_SIZE)[np.append(tokens, 0)[chosen + 2]]"


@pytest.mark.parametrize(("fault", "check"), [(PEEKS, "mass"), (LOOKS_AHEAD, "causality")], ids=["peeks", "ahead"])
def test_fault_at_few_positions_is_found(examine: Any, fault: str, check: str) -> None:
    """120 positions drawn at random miss a fault at 2.5 % of them five times in a hundred: never for these seeds."""
    for seed in ("1", "2"):
        result = examine(AT_FEW.format(share=0.05, fault=fault), "--seed", seed, "--positions", "120")
        assert result.failed() == [check]


def test_positions_drawn_find_a_rare_fault_as_often_as_said() -> None:
    """The draw alone, for faults at 10 of 400 targets and a thousand seeds."""
    facts = {"vocab_size": 4, "tolerance": 0.0, "lengths": [400], "draw_from": 0}
    hits = 0
    for seed in range(1000):
        auditor = audit_submission.Auditor(None, facts, seed, 120)  # type: ignore[arg-type]
        tokens = audit_submission.make_stream(400, 4, auditor.rng)
        auditor.bases.append(audit_submission.Base(tokens, np.zeros(400), np.arange(400)))
        hits += any(target % 40 == 7 for _, target in auditor.draw(last=0))
    assert hits >= 950


def test_border_of_the_last_windows_is_judged_by_its_share_of_the_split(examine: Any) -> None:
    honest = "SPLIT_TARGETS, CUT = 62_021_632, 32\n" + LAST_TWICE
    result = examine(honest)
    assert result.failed() == []
    assert "0.0004% of a split of 62,021,632" in result.findings["every target once"]["found"]
    assert examine(honest.replace("62_021_632", "620_216")).failed() == ["every target once"]
    assert examine(honest.replace("[-8:]", "[::12]")).failed() == ["every target once"]


def test_vocabulary_taken_from_the_text_is_reported(examine: Any) -> None:
    smoothed = """
    def score(tokens):
        size, counts, logp = tokens.max() + 1, np.zeros(VOCAB_SIZE), []
        for token in tokens[1:]:
            logp.append(np.log((counts[token] + 0.5) / (counts.sum() + 0.5 * size)))
            counts[token] += 1
        return logp, np.arange(len(logp))
    """
    result = examine(smoothed)
    assert (result.code, result.failed()) == (0, [])
    assert result.findings["vocabulary"]["result"] == "REPORTED"


def test_stated_distributions_are_held_against_the_scores(examine: Any) -> None:
    states = HONEST + "\n\ndef distributions(tokens):\n    return np.log({})\n"
    assert examine(states.format("rows(tokens)")).findings["stated distributions"]["result"] == "PASS"
    for other in ("1.01 * rows(tokens)", "np.full((len(tokens) - 1, VOCAB_SIZE), 1 / VOCAB_SIZE)"):
        assert examine(states.format(other)).failed() == ["stated distributions"]
    peeks = AT_FEW.format(share=0.3, fault=PEEKS + "; table /= table.sum(1, keepdims=True)")
    peeks += "\n\ndef distributions(tokens):\n    return np.log(table_of(tokens))\n"
    peeks = peeks.replace("    return entries(table, tokens)", "    return table").replace("def score", "def table_of")
    peeks += "\n\ndef score(tokens):\n    return entries(table_of(tokens), tokens)\n"
    assert "stated distributions" in examine(peeks).failed()


def test_bytes_are_held_against_the_text(examine: Any) -> None:
    counts = HONEST + "\nlong = np.array([1, 2, 3, 1, 1, 4])\n"
    counts += "\ndef bytes_of(tokens):\n    return {}\n"
    counts += "\ndef text_of(tokens):\n    return b''.join(b'x' * long[token] for token in tokens[1:])\n"
    assert examine(counts.format("long[tokens[1:]]")).findings["bytes"]["result"] == "PASS"
    assert examine(counts.format("long[tokens[:-1]]")).failed() == ["bytes"]


# ---- adapters that cannot be used --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def score(tokens):\n    return rows(tokens)[99999]\n", ["score(tokens of 61)", "IndexError", "(line "]),
        ("def score(tokens):\n    return rows(tokens)\n", ["score(tokens of 61)", "(60, 6)", "(logp, index)"]),
        (f"def score(tokens):\n    return [0.0], {INDEX}\n", ["(1,)", "(60,)", "one length"]),
        (f"def score(tokens):\n    return ['x'] * 60, {INDEX}\n", ["score(tokens of 61)", "expected floats"]),
        (f"def score(tokens):\n    return np.zeros(60), {INDEX} + 1\n", ["1 to 60", "expected 0 to 59"]),
        ("def score(tokens):\n    import os; os._exit(3)\n", ["score(tokens of 61)", "exit code 3"]),
        ("def score(tokens):\n    import os; os.kill(os.getpid(), 11)\n", ["SIGSEGV"]),
        ("def score(tokens:\n", ["import", "SyntaxError"]),
        ("import no_such_module\n", ["import", "ModuleNotFoundError", "no_such_module", "(line "]),
        ("raise SystemExit(0)\n", ["import", "SystemExit"]),
        ("VOCAB_SIZE = None\n" + HONEST, ["VOCAB_SIZE", "None", "an integer"]),
        ("LENGTHS = (3,)\n" + HONEST, ["LENGTHS", "(3,)", "at least 8"]),
        ("", ["no score", "expected score(tokens)"]),
    ],
)
def test_unusable_adapter_is_one_line(examine: Any, text: str, expected: list[str]) -> None:
    result = examine(text)
    (line,) = result.err.splitlines()
    assert result.code == 2
    for part in ["adapter.py", *expected]:
        assert part in line


@pytest.mark.parametrize("options", [[], ["--traceback"]])
def test_what_a_submission_says_cannot_steer_the_terminal(examine: Any, options: list[str]) -> None:
    hostile = "\\x1b[2Jno fault\\r found"
    result = examine(f"def score(tokens):\n    print('{hostile}')\n    raise ValueError('{hostile}')\n", *options)
    assert "no fault" in result.err
    assert not {"\x1b", "\r"} & {*result.err, *result.out}


def test_traceback_is_there_on_request(examine: Any) -> None:
    result = examine("def score(tokens):\n    print('said by it')\n    return 1 / 0\n", "--traceback")
    assert "said by it" in result.err
    assert "Traceback" in result.err
    assert "said by it" not in result.out


@pytest.mark.parametrize(
    "text",
    ["import time\ntime.sleep(60)\n", "import time\n\ndef score(tokens):\n    time.sleep(60)\n"],
    ids=["import", "score"],
)
def test_hanging_adapter_ends_at_the_time_limit(examine: Any, text: str) -> None:
    result = examine(text, "--seconds", "0.7")
    (line,) = result.err.splitlines()
    assert result.code == 2
    assert "gave no answer within the time limit" in line


def test_missing_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit_submission.main(["--submission", "no/such.py"]) == 2
    assert "no/such.py: no such file" in capsys.readouterr().err


def test_time_that_does_not_reach_decides_nothing(examine: Any) -> None:
    many = f"VOCAB_SIZE = 400_000\n\ndef score(tokens):\n    return np.full(len(tokens) - 1, -np.log(4e5)), {INDEX}\n"
    result = examine(many, "--seconds", "3")
    assert result.code == 2
    assert result.failed() == []
    assert result.findings["mass"]["result"] == "NOT TESTED"
    assert "of 400,000 tokens sum to 0." in result.findings["mass"]["found"]
    many += "\ndef distributions(tokens):\n    return np.full((len(tokens) - 1, VOCAB_SIZE), -np.log(4e5))\n"
    many = many.replace("400_000", "8_000").replace("4e5", "8e3")
    result = examine(many, "--seconds", "60", "--positions", "3")
    assert result.code == 0
    assert result.findings["stated distributions"]["result"] == "PASS"


def test_mass_above_one_shows_before_the_vocabulary_is_through(examine: Any) -> None:
    many = "VOCAB_SIZE = 100_000\n\ndef score(tokens):\n    return np.full(len(tokens) - 1, np.log(0.01)), "
    result = examine(many + INDEX + "\n", "--seconds", "20")
    assert result.failed() == ["mass"]


# ---- the command -------------------------------------------------------------------------------------------------


def test_nothing_of_this_project_is_needed_and_names_may_collide(tmp_path: Path) -> None:
    """The tool's own folder alone; beside the adapter stand modules that are named as this project's."""
    shutil.copytree(REPO / "tools", tmp_path / "copy" / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train_gpt", "swarm_agents", "kg_data", "report", "audit"):
        (tmp_path / f"{name}.py").write_text("OWN = True\n")
    text = "import train_gpt, swarm_agents, kg_data, report, audit\n" + PRELUDE + HONEST
    check = "assert all(m.OWN for m in (train_gpt, swarm_agents, kg_data, report, audit))\n"
    (tmp_path / "adapter.py").write_text(text + check)
    program = [sys.executable, str(tmp_path / "copy" / "tools" / "audit.py")]
    words = ["--submission", "adapter.py", "--positions", "5"]
    process = subprocess.run([*program, *words], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    seed = process.stdout.splitlines()[0].split("--seed ")[1]
    assert process.stdout.splitlines()[-1].endswith(f"--seed {seed})")


# ---- templates ---------------------------------------------------------------------------------------------------

SMALL = """
import math, os
import torch, torch.nn.functional as F
from torch import nn
from flash_attn_interface import flash_attn_func

class Hyperparameters:
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    width = int(os.environ.get("MODEL_DIM", 512))
    ttt_chunk = int(os.environ.get("TTT_CHUNK_TOKENS", 32768))

class GPT(nn.Module):
    def __init__(self, vocab_size, width, heads):
        super().__init__()
        self.heads, self.embed = heads, nn.Embedding(vocab_size, width)
        self.qkv, self.out = nn.Linear(width, 2 * width), nn.Linear(width, vocab_size)

    @torch.compile
    def forward_logits(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(x).split([x.shape[-1], x.shape[-1] // 2, x.shape[-1] // 2], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, x.shape[-1] // self.heads)) for part in (q, k, v))
        return self.out(x + flash_attn_func(q, k, v, causal=True).flatten(2))

def evaluate(h, model, tokens, tables, spans, batch, learn):
    sums = torch.zeros(2, device="cuda", dtype=torch.float64)
    forward = torch.compile(model.forward_logits, dynamic=False)
    for first in range(0, len(spans), batch):
        with torch.inference_mode():
            group = spans[first : first + batch]
            ids = torch.zeros(len(group), 33, dtype=torch.int64, device="cuda")
            for row, (start, _, stop) in enumerate(group):
                ids[row, : stop + 1 - start] = tokens[start : stop + 1].cuda()
            with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                logits = forward(ids[:, :-1])
            nll = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
            for row, (start, scored, stop) in enumerate(group):
                sums[0] += nll[row, scored - start : stop - start].to(torch.float64).sum()
                sums[1] += stop - scored
                targets = ids[row, scored - start + 1 : stop - start + 1]
                (tables[0][targets].double() + (tables[1][targets] & ~tables[2][targets]).double()).sum()
        torch.cuda.synchronize()
        learn(group[-1][2])
    return (sums[0] / sums[1]).item(), 0.0

def eval_val_sliding(h, model, rank, world, device, tokens, a, b, c, stride, batch_seqs, eval_seq_len):
    total, spans = len(tokens) - 1, []
    for start in range(0, total, stride):
        stop = min(start + eval_seq_len, total)
        spans.append((start, start if start == 0 else max(start, stop - stride), stop))
    return evaluate(h, model, tokens, (a, b, c), spans, batch_seqs, lambda done: None)

def eval_val_sliding_ttt(h, model, rank, world, device, tokens, a, b, c, stride, batch_seqs):
    def learn(done):
        piece = tokens[max(0, done - 32) : done + 1]
        loss = F.cross_entropy(model.forward_logits(piece[None, :-1])[0], piece[1:])
        parameters = list(model.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.data -= 0.5 * gradient
    total = len(tokens) - 1
    spans = [(max(0, at - 16), at, at + 16) for at in range(0, total, 16)]
    return evaluate(h, model, tokens, (a, b, c), spans, 4, learn)
"""


EDITS = {
    "GPT, settings)": "GPT, settings, heads=4)",
    "(256, 512)": "(64, 128)",
    'VOCAB_SIZE="32"': 'VOCAB_SIZE="8"',
    "VOCAB_SIZE = 32": "VOCAB_SIZE = 8",
}


@pytest.fixture
def examine_template(examine: Any, tmp_path: Path) -> Any:
    """Edit the lines that a reviewer edits, then audit; `script` is what was published."""

    def run(template: str, script: str, edits: dict[str, str]) -> Result:
        (tmp_path / "published.py").write_text(script)
        text = (REPO / "tools" / "adapters" / template).read_text(encoding="utf-8")
        text = text.replace("path/to/train_gpt.py", str(tmp_path / "published.py"))
        for old, new in {**EDITS, **edits}.items():
            assert old in text
            text = text.replace(old, new)
        return examine(text, "--positions", "3", prelude="")

    return run


def test_sliding_template_runs_a_script_for_cuda(examine_template: Any) -> None:
    edits = {"stride=32": "stride=8", "eval_seq_len=64": "eval_seq_len=32"}
    result = examine_template("published_sliding.py", SMALL, edits)
    assert (result.code, result.failed()) == (0, []), result.err
    assert "8 scored again (12.50%)" in result.findings["every target once"]["found"]
    assert "3 positions" in result.findings["mass"]["found"]


def test_ttt_template_tells_when_training_comes_first(examine_template: Any) -> None:
    result = examine_template("published_ttt.py", SMALL, {})
    assert (result.code, result.failed()) == (0, []), result.err
    learns, scores = "        learn(group[-1][2])\n", "        with torch.inference_mode():\n            group ="
    assert learns in SMALL
    assert scores in SMALL
    first = "        group = spans[first : first + batch]\n" + learns
    early = SMALL.replace(learns, "").replace(scores, first + scores)
    assert examine_template("published_ttt.py", early, {}).failed() == ["causality", "mass"]


def test_this_projects_own_artifact_passes(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter in this process, where everything that it imports is there already."""
    monkeypatch.setenv("ARTIFACT", str(tiny_run.artifact))
    path = REPO / "tools" / "adapters" / "this_project.py"
    adapter: Any = importlib.util.module_from_spec(importlib.util.spec_from_file_location("this_project", path))  # type: ignore[arg-type]
    adapter.__loader__.exec_module(adapter)
    tokens = audit_submission.make_stream(adapter.LENGTHS[0], adapter.VOCAB_SIZE, np.random.default_rng(1))
    logp, index = adapter.score(tokens)
    assert index.tolist() == list(range(adapter.LENGTHS[0]))
    assert np.isfinite(logp).all()
    assert adapter.score(tokens)[0].tolist() == logp.tolist()
    tokens[122:] = tokens[122:][::-1].copy()
    assert adapter.score(tokens)[0][:121].tolist() == logp[:121].tolist()
