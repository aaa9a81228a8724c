"""The audit passes what is valid, and names the condition that each known kind of invalid score breaks."""

from __future__ import annotations

import dataclasses
import functools
import html
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import train_gpt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import audit
import audit_page

EFFORT = audit.Effort(cuts=3, targets=1, strides=(), drawn=60, shorts=1)
VOCAB = 32


@pytest.fixture(scope="module")
def tokens(config: train_gpt.Config) -> np.ndarray:
    return audit.make_stream(audit.zipf_material(config.vocab_size, 400, 3), audit.STREAM_TARGETS + 1)


@pytest.fixture
def violated(config: train_gpt.Config, tokens: np.ndarray) -> Callable[..., set[str]]:
    """The conditions that the audit finds violated by one scorer."""

    def judge(score: audit.Score, name: str = "ttt", claims: Any = None) -> set[str]:
        report = audit.Report()
        stage = audit.Stage(name, score, config.vocab_size, claims)
        audit.audit_stages(report, [stage], config, tokens, EFFORT)
        return {finding.condition for finding in report.violations}

    return judge


@pytest.fixture
def sliding(model: train_gpt.GPT, config: train_gpt.Config) -> audit.Neural:
    return audit.Neural(model, config, ttt=False)


# ---- what is valid -----------------------------------------------------------------------------------------------


def test_valid_code_passes_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "audit.json", tmp_path / "audit.html"
    assert audit.main(["--quick", "--json", str(out), "--html", str(page)]) == 0
    streams = capsys.readouterr()
    table, shown = streams.out, html.unescape(page.read_text())
    result = json.loads(out.read_text())
    assert result["valid"]
    assert result["violated"] == []
    conditions = {finding["condition"] for finding in result["findings"]}
    expected = {audit.CAUSAL, audit.NORMALISED, audit.SCORE_FIRST, audit.SINGLE_PASS, audit.SIZE}
    assert conditions == expected | {audit.SELF_CONTAINED, audit.NO_VALIDATION, audit.DECODES, audit.TIME}
    for condition in conditions:
        assert f"-- {condition}" in table
        assert condition in shown
    for finding in result["findings"]:
        assert finding["figure"] in table
        assert finding["figure"] in shown
        assert f"{finding['check']}: {finding['subject']}" in streams.err  # where it stands, in a pipe too
        assert audit_page.ASKED[finding["check"]] in shown
    stages = {finding["subject"] for finding in result["findings"] if finding["condition"] == audit.NORMALISED}
    assert {"sliding", "ttt", "ttt+backoff", "sliding+backoff-published", "sliding+hedge"} <= stages


def test_uniform_predictions_are_valid(violated: Callable[..., set[str]], config: train_gpt.Config) -> None:
    """The audit asks for validity, not for quality, and needs no entropy and no stated distribution."""
    assert violated(lambda tokens: (np.full(len(tokens) - 1, -math.log(config.vocab_size)),)) == set()


# ---- known kinds of invalid scores -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"mixer": "backoff-published", "ngram_counts": "hashed"}, {"mixer": "hedge", "entropy_expert": True}]
)
def test_published_mixers_are_no_distributions(
    sliding: audit.Neural, config: train_gpt.Config, tokens: np.ndarray, options: dict[str, Any]
) -> None:
    """Hashed counts, and an expert that takes the entropy for a loss: nothing but the mass gives them away."""
    mixed = audit.Mixed(sliding, dataclasses.replace(config, **options))
    stage = audit.Stage("mixed", mixed.score, config.vocab_size, mixed.claims)
    report = audit.Report()
    interview = audit.Interview.draw(tokens, config.vocab_size, 8, report.rng(0))
    report.add("future", audit.CAUSAL, "mixed", lambda: audit.check_future(stage, tokens, [30, 99, 170]))
    audit.check_interviews(report, stage, lambda: [interview])
    assert [finding.condition for finding in report.violations] == [audit.NORMALISED]
    gap = float(report.violations[0].figure.partition("scored ")[2].split()[0])
    assert gap < 1e-12  # the distributions are the scorer's own, so that the run's label would say so too


class TrainingLoop:
    """Test-time training with its steps in any order."""

    def __init__(self, model: train_gpt.GPT, config: train_gpt.Config, first: str = "score", last_too: bool = False):
        self.model, self.config, self.first, self.last_too = model, config, first, last_too

    def __call__(self, tokens: np.ndarray) -> audit.Scores:
        config, stream, runtime = self.config, audit.Stream(tokens), train_gpt.Runtime(self.config, {})
        saved = {name: value.clone() for name, value in self.model.state_dict().items()}
        chunk = config.ttt_chunk_tokens
        windows = train_gpt.plan_windows(stream.num_targets, config.eval_seq_len, config.eval_stride, chunk)
        scorer = train_gpt.WindowScorer(self.model, config, runtime, tokens)
        trainer = train_gpt.ChunkTrainer(self.model, config, runtime, stream)  # pyright: ignore[reportArgumentType]
        ends = np.cumsum(windows.tails)
        for start in range(0, stream.num_targets, chunk):
            targets = range(start, min(start + chunk, stream.num_targets))
            span = np.searchsorted(ends, (targets.start, targets.stop), side="right")
            trains = targets.stop < stream.num_targets or self.last_too
            if trains and self.first == "train":
                trainer.train_on(scorer, targets, 0.01)
            scorer.score_all(windows, *map(int, span))
            if trains and self.first == "score":
                trainer.train_on(scorer, targets, 0.01)
        self.model.load_state_dict(saved)
        scores = scorer.finish()
        return scores.logp, scores.entropy


def test_training_before_scoring(violated: Callable[..., set[str]], model: train_gpt.GPT, config: Any) -> None:
    found = violated(TrainingLoop(model, config, first="train"))
    assert {audit.CAUSAL, audit.SCORE_FIRST} <= found
    assert audit.SINGLE_PASS not in found


def test_training_after_scoring_is_what_the_loop_above_breaks(
    violated: Callable[..., set[str]], model: train_gpt.GPT, config: Any
) -> None:
    assert violated(TrainingLoop(model, config)) == set()


def test_training_on_the_last_chunk(violated: Callable[..., set[str]], model: train_gpt.GPT, config: Any) -> None:
    assert violated(TrainingLoop(model, config, last_too=True)) == {audit.SCORE_FIRST}


def test_gate_that_looks_at_the_target(violated: Callable[..., set[str]], sliding: audit.Neural) -> None:
    """ "Is the next token a word start": the share of two valid experts follows the token that is scored."""

    def score(tokens: np.ndarray) -> audit.Scores:
        logp, entropy = sliding.recall(tokens)
        share = np.where(tokens[1:] % 3 == 0, 0.9, 0.1)
        return np.log(share * np.exp(logp) + (1 - share) / VOCAB), entropy

    assert violated(score) == {audit.NORMALISED}


def test_counts_that_include_the_target(violated: Callable[..., set[str]], config: train_gpt.Config) -> None:
    """A unigram cache that is updated with x_i before it predicts x_i."""

    def score(tokens: np.ndarray) -> audit.Scores:
        counts, logp = np.ones(config.vocab_size), []
        for token in tokens[1:]:
            counts[token] += 1
            logp.append(math.log(counts[token] / counts.sum()))
        return (np.array(logp),)

    assert violated(score) == {audit.NORMALISED}


def test_better_of_two_passes(
    violated: Callable[..., set[str]], model: train_gpt.GPT, config: train_gpt.Config, sliding: audit.Neural
) -> None:
    other = audit.Neural(model, dataclasses.replace(config, eval_stride=20), ttt=False)

    def score(tokens: np.ndarray) -> audit.Scores:
        (first, entropy), (second, _) = sliding.recall(tokens), other.recall(tokens)
        return np.maximum(first, second), entropy

    assert violated(score) == {audit.NORMALISED}


def test_tail_targets_scored_again(violated: Callable[..., set[str]], sliding: audit.Neural) -> None:
    """The last windows of the stream count the same targets again, as an earlier evaluation did."""

    def score(tokens: np.ndarray) -> audit.Scores:
        logp, entropy = sliding.recall(tokens)
        return np.concatenate([logp, logp[-9:]]), np.concatenate([entropy, entropy[-9:]])

    assert violated(score) == {audit.SINGLE_PASS}


def test_model_asked_twice(sliding: audit.Neural, tokens: np.ndarray) -> None:
    """The same scores, but the model was asked for every target twice; or for all of them, backwards."""

    def twice(tokens: np.ndarray) -> audit.Scores:
        sliding.run(tokens)
        return sliding.score(tokens)

    def backwards(tokens: np.ndarray) -> audit.Scores:
        return tuple(column[::-1] for column in sliding.score(tokens[::-1].copy()))

    assert audit.check_single_pass(sliding.run, tokens, [30, 181])[0]
    assert audit.check_single_pass(twice, tokens, [30, 181]) == (False, "60 targets scored where there are 30")
    assert not audit.check_single_pass(backwards, tokens, [30])[0]


def test_looking_at_the_next_token(violated: Callable[..., set[str]], sliding: audit.Neural) -> None:
    def score(tokens: np.ndarray) -> audit.Scores:
        logp, entropy = sliding.recall(tokens)
        repeated = np.append(tokens[2:] == tokens[1:-1], False)
        return np.where(repeated, logp - 0.01, logp), entropy

    assert audit.CAUSAL in violated(score)  # its mass is off too where the stream repeats


def test_entropy_scaled_by_the_whole_stream(violated: Callable[..., set[str]], sliding: audit.Neural) -> None:
    """A mixer may use the entropy, so that may not know the future either."""

    def score(tokens: np.ndarray) -> audit.Scores:
        logp, entropy = sliding.recall(tokens)
        return logp, entropy / entropy.mean()

    assert violated(score) == {audit.CAUSAL, audit.SCORE_FIRST}


def test_model_that_stays_adapted(
    model: train_gpt.GPT, config: train_gpt.Config, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that outlive a pass let the next one know its text already."""
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    neural = audit.Neural(model, config, ttt=True)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.copy, "deepcopy", lambda model: model)
        ok, figure = audit.check_future(audit.Stage("ttt", neural.score, VOCAB), tokens, [170])
    model.load_state_dict(saved)
    assert not ok
    assert "target 0 changes" in figure


def test_odds_that_include_the_target(
    sliding: audit.Neural, config: train_gpt.Config, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard between mixer and neural model, one target too early: only early targets show it."""
    monkeypatch.setattr(train_gpt, "guard", lambda neural, learned: np.cumsum(learned - neural))
    mixed = audit.Mixed(sliding, dataclasses.replace(config, mixer="backoff"))
    report = audit.Report()
    stage = audit.Stage("sliding+backoff", mixed.score, config.vocab_size, mixed.claims)
    audit.audit_stages(report, [stage], config, tokens, EFFORT)
    assert {finding.condition for finding in report.violations} == {audit.NORMALISED}


def test_stated_distribution_that_is_not_the_score(
    violated: Callable[..., set[str]], sliding: audit.Neural
) -> None:
    """The run's mass would be 1 all the same."""

    def score(tokens: np.ndarray) -> audit.Scores:
        logp, entropy = sliding.recall(tokens)
        return logp + 0.01, entropy

    assert violated(score, claims=sliding.claims) == {audit.NORMALISED}
    assert violated(sliding.score, claims=sliding.claims) == set()


@pytest.mark.parametrize("error", [AssertionError("odd"), subprocess.TimeoutExpired("score", 1), OSError("gone")])
def test_code_that_raises_anything_fails_its_check_alone(error: Exception) -> None:
    report = audit.Report()
    report.add("mass", audit.NORMALISED, "scorer", mock.Mock(side_effect=error))
    assert [finding.condition for finding in report.violations] == [audit.NORMALISED]


def test_scorer_that_breaks_down(violated: Callable[..., set[str]], sliding: audit.Neural) -> None:
    def score(tokens: np.ndarray) -> audit.Scores:
        if len(tokens) == 24:
            raise ValueError("no such length")
        return sliding.recall(tokens)

    assert violated(score) == {audit.SINGLE_PASS}


# ---- bytes, size, time -------------------------------------------------------------------------------------------


def test_wrong_bytes(rehearsal: audit.Rehearsal, sliding: audit.Neural, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leading spaces that nobody counts, and sums over something else than the targets."""
    validation = rehearsal.validation()
    decode = functools.partial(audit.decode_document, rehearsal.tokenizer.model)
    assert audit.check_bytes(validation, decode)[0]
    logp = sliding.score(validation.tokens.astype(np.int64))[0]
    assert audit.check_summary(logp, validation)[0]
    assert not audit.check_summary(np.append(logp, logp[-9:]), validation)[0]
    monkeypatch.setattr(rehearsal.tokenizer, "has_leading_space", np.zeros(VOCAB, dtype=bool))
    assert not audit.check_bytes(rehearsal.validation(), decode)[0]


def test_oversized_artifact(tmp_path: Path) -> None:
    code = sum(path.stat().st_size for path in train_gpt.code_paths())
    for size, allowed in ((train_gpt.SIZE_LIMIT_BYTES - code, True), (train_gpt.SIZE_LIMIT_BYTES - code + 1, False)):
        path = tmp_path / "artifact"
        with path.open("wb") as file:
            file.truncate(size)
        report = audit.Report()
        report.add("ledger", audit.SIZE, "", lambda path=path: audit.check_ledger(path, train_gpt.code_paths()))
        assert (audit.SIZE not in {f.condition for f in report.violations}) == allowed


def log_rows(**changes: float) -> list[dict[str, Any]]:
    """The rows of a run that keeps all limits, but for the changes."""
    values = dict(train_ms=600_060.0, evaluation_s=540.0, ttt_ms=300_000.0, bytes=15_900_000, mass=1.0) | changes
    return [
        {"event": "step", "step": 7000, "train_loss": 2.0, "train_time_ms": values["train_ms"], "step_avg_ms": 85.0},
        {"event": "calibration", "time_s": changes.get("calibration_s", 0.0)},
        {"event": "total_bytes", "bytes": values["bytes"]},
        {"event": "legal_ttt", "val_bpb": 1.1, "eval_time_ms": values["ttt_ms"]},
        {"event": "legal_ttt_exact", "val_bpb": 1.1},
        {"event": "final_mixed", "val_bpb": 1.1, "mass": values["mass"], "valid": abs(values["mass"] - 1) < 1e-4},
        {"event": "evaluation", "total_s": values["evaluation_s"]},
    ]


@pytest.mark.parametrize(
    ("changes", "condition"),
    [
        ({}, None),
        ({"train_ms": 600_086.0}, audit.TIME),  # more than the step that meets the limit
        ({"calibration_s": 1.0}, audit.TIME),
        ({"evaluation_s": 600.5}, audit.TIME),
        ({"ttt_ms": 601_000.0}, audit.TIME),
        ({"bytes": 16_000_001}, audit.SIZE),
        ({"mass": 1.001}, audit.NORMALISED),
    ],
)
def test_log(tmp_path: Path, changes: dict[str, float], condition: str | None) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in log_rows(**changes)))
    report = audit.Report()
    audit.audit_log(report, train_gpt.Config(), audit.parse_arguments(["--log", str(path)]))
    assert {finding.condition for finding in report.violations} == ({condition} if condition else set())


def test_log_of_a_resumed_run() -> None:
    """What was scored, and calibrated, again behind a restart stands there twice; the later row counts."""
    rows = [*log_rows(calibration_s=0.02)[:-1], *log_rows(calibration_s=0.02)]
    assert audit.check_evaluation_time(rows) == (True, "540.0 s in 1 stages")
    assert audit.check_training_time(rows)[0]


def test_log_with_a_mass_that_is_no_number() -> None:
    row = {"event": "final_mixed_exact", "mass": 1.0, "worst": math.nan}
    assert not audit.check_log_validity([*log_rows(), row])[0]


def test_log_of_a_run_that_did_not_end() -> None:
    assert not audit.check_evaluation_time(log_rows()[:-1])[0]


@pytest.mark.parametrize("recipe", train_gpt.RECIPES)
def test_every_recipe_can_be_rehearsed(tmp_path: Path, recipe: str) -> None:
    full = train_gpt.Config.from_env({"RECIPE": recipe, "DATA_PATH": "no such folder"})
    config = audit.Rehearsal.prepare(tmp_path, full).config
    assert bool(config.repeat_layers) == bool(full.repeat_layers)


# ---- the artifact by itself, and training ------------------------------------------------------------------------


def test_code_file_left_out(config: Any, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "CODE_FILES", ("train_gpt.py", "swarm_agents.py"))
    ok, figure = audit.check_bare_process(config.artifact_path, config, tokens)
    assert not ok
    assert "kg_data" in figure


def test_bare_process_that_scores_otherwise(config: Any, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has changed in memory is no part of the artifact."""
    monkeypatch.setattr(train_gpt, "RMS_EPS", 1e-3)
    ok, figure = audit.check_bare_process(config.artifact_path, config, tokens)
    assert not ok
    assert "other scores" in figure


def violated_by_training(rehearsal: audit.Rehearsal) -> set[str]:
    report = audit.Report()
    audit.audit_training(report, rehearsal)
    return {finding.check for finding in report.violations}


def test_training_that_opens_validation_shards(rehearsal: audit.Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    find = train_gpt.find_shards
    monkeypatch.setattr(train_gpt, "find_shards", lambda folder, split: [*find(folder, split), *find(folder, "val")])
    assert "files opened" in violated_by_training(rehearsal)


def test_training_on_validation_tokens_in_memory(rehearsal: audit.Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    original = train_gpt.Trainer.train

    def train(self: train_gpt.Trainer, *arguments: Any) -> None:
        tokens, stream = self.validation.tokens, self.loader.stream
        stream.shards, stream.ends = [tokens], np.array([len(tokens)])
        monkeypatch.setattr(stream, "_piece", lambda _, offset, count: tokens[offset : offset + count])
        original(self, *arguments)

    monkeypatch.setattr(train_gpt.Trainer, "train", train)
    assert violated_by_training(rehearsal) == {"other shards"}


def test_calibration_on_validation_tokens(rehearsal: audit.Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    original = train_gpt.calibrate

    def calibrate(trainer: train_gpt.Trainer) -> train_gpt.Hessians:
        ids = torch.from_numpy(trainer.validation.tokens[:480].astype(np.int64)).view(15, 32)
        monkeypatch.setattr(trainer.loader, "batch", lambda step: [(ids, ids)])  # noqa: ARG005
        return original(trainer)

    monkeypatch.setattr(train_gpt, "calibrate", calibrate)
    assert violated_by_training(rehearsal) == {"other shards"}


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [["--artifact", "no such file"], ["--artifact", __file__], ["--log", "no such file"], ["--log", __file__]],
)
def test_unusable_input_ends_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["--quick", *words]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
    assert words[1] in streams.err


def test_violation_ends_in_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "audit_own_model", lambda *_, **__: None)
    log, out = tmp_path / "run.jsonl", tmp_path / "audit.json"
    log.write_text("".join(json.dumps(row) + "\n" for row in log_rows(evaluation_s=601.0)))
    assert audit.main(["--log", str(log), "--json", str(out)]) == 1
    verdict = f"INVALID: 1 of 4 checks fail: {audit.TIME} ("
    assert capsys.readouterr().out.splitlines()[-1].startswith(verdict)
    assert json.loads(out.read_text())["violated"] == [audit.TIME]
    assert audit.main(["--log", str(log), "--json", str(tmp_path / "absent" / "audit.json")]) == 2
    printed, error = capsys.readouterr()
    assert printed.splitlines()[-1].startswith(verdict)
    assert error.splitlines()[-1].startswith("error: ")


def test_settings_of_the_artifact_and_of_the_environment(config: train_gpt.Config) -> None:
    changed = audit.overridden(config, {"MIXER": "hedge", "RECIPE": "leaky", "PATH": "/bin"})
    assert changed == dataclasses.replace(config, mixer="hedge")


def test_borders_are_among_the_cuts(config: train_gpt.Config) -> None:
    cuts = audit.pick_cuts(181, config, 32)
    assert {23, 30, 31, 49, 99, 149, 0, 179} <= set(cuts)
    assert max(cuts) == 179
    assert len(cuts) > 20


def test_material_repeats() -> None:
    """Counts of high orders are met, or the mixers would be idle."""
    tokens = audit.make_stream(audit.zipf_material(VOCAB, 400, 3), 182)
    counts = [*train_gpt.iter_ngram_counts(torch.as_tensor(tokens).long(), 6)]
    assert (counts[5].context_count[90:] > 0).mean() > 0.2
