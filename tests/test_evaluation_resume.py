"""An evaluation that is interrupted goes on at its last finished piece, with the same result to the bit."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Run, event, read_events, tiny_environ
from test_restarts import start

import train_gpt
from train_gpt import Progress, TestTimeTrainer, WindowScorer

STAGES = dict(TTT_CHUNK_TOKENS=200, TTT_EPOCHS=2, MIXER="backoff", EVAL_BATCH_SEQS=4, EVAL_ONLY=1, RESUME="auto")
ADAMW = dict(TTT_OPTIMIZER="adamw", TTT_LR=0.001, POLYAK_DECAY=0.9)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of eight windows, so that the tiny split has several in every stage."""
    monkeypatch.setattr(train_gpt, "PIECE_BATCHES", 2)


class Interruption(BaseException):
    """Stands for a kill: nothing handles it."""


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Every piece that is scored is noted."""
    noted: list[int] = []
    score_all = WindowScorer.score_all

    def counted(scorer: WindowScorer, *arguments: Any) -> Any:
        noted.append(len(noted))
        return score_all(scorer, *arguments)

    monkeypatch.setattr(WindowScorer, "score_all", counted)
    return noted


def interrupt_after(monkeypatch, pieces: int, how: str) -> None:
    """Kill or signal when so many pieces of the evaluation are done."""
    advance, done = Progress.advance, []

    def counted(progress: Progress, *arguments: Any) -> None:
        if progress.checkpoints is None:
            return advance(progress, *arguments)  # a validation, which is no part of the evaluation
        done.append(1)
        if len(done) == pieces and how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        advance(progress, *arguments)
        if len(done) == pieces and how == "kill":
            progress.checkpoints.finish()
            raise Interruption

    monkeypatch.setattr(Progress, "advance", counted)


def stages(environ: dict[str, str]) -> dict[str, Any]:
    rows = read_events(Path(environ["OUT_DIR"]) / "logs" / "run.jsonl")
    return {row["event"]: (row["val_loss"], row.get("mass")) for row in rows if "val_loss" in row}


# 35 windows without overlap are 5 pieces of 8, 135 of stride 8 are 17, 6 chunks of TTT follow.
@pytest.mark.parametrize("pieces", [1, 5, 12, 22, 23, 26, 28])
@pytest.mark.parametrize(("how", "options"), [("kill", {}), ("signal", ADAMW)])
def test_interrupted_evaluation(tiny_run: Run, tiny_data, run_main, tmp_path, monkeypatch, calls, how, options, pieces):
    settings = STAGES | options | dict(ARTIFACT=tiny_run.artifact)
    whole = tiny_environ(tiny_data, tmp_path / "whole", **settings)
    assert run_main(whole).returncode == 0
    total = len(calls)
    assert total == 5 + 17 + 6
    calls.clear()

    with monkeypatch.context() as patch:
        interrupt_after(patch, pieces, how)
        environ = tiny_environ(tiny_data, tmp_path / "cut", **settings, CHECKPOINT_SECONDS=1e-9)
        if how == "kill":
            with pytest.raises(Interruption):
                run_main(environ)
        else:
            outcome = run_main(environ)
            assert (outcome.returncode, outcome.stderr) == (143, "")
            assert f"pieces:{pieces if pieces <= 5 else pieces - 5 if pieces <= 22 else pieces - 22} " in outcome.stdout
    assert len(calls) == pieces
    outcome = run_main(environ)
    assert outcome.returncode == 0, outcome.stderr
    assert len(calls) == total  # nothing was scored twice
    assert stages(environ) == stages(whole)
    assert [path.name for path in Path(environ["OUT_DIR"]).iterdir()] == ["logs"]  # what served is gone


@pytest.mark.parametrize(
    "change", [dict(TTT_LR=0.003), dict(EVAL_STRIDE=16), dict(VAL_TOKENS=900), "artifact", "torn", "fresh"], ids=str
)
def test_progress_of_another_evaluation_is_not_used(tiny_run, tiny_data, run_main, tmp_path, monkeypatch, change):
    artifact = tmp_path / "model.ptz"
    artifact.write_bytes(tiny_run.artifact.read_bytes())
    settings = STAGES | dict(ARTIFACT=artifact, CHECKPOINT_SECONDS=1e-9)
    environ = tiny_environ(tiny_data, tmp_path / "cut", **settings)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 25, "signal")
        assert run_main(environ).returncode == 143
    progress = tmp_path / "cut" / "checkpoints" / "evaluation.safetensors"
    if change == "artifact":
        model, _, metadata = train_gpt.load_artifact(artifact)
        with torch.no_grad():
            model.smear.gate.add_(1)
        train_gpt.save_artifact(model, metadata["tokenizer"], artifact)
    elif change == "torn":
        progress.write_bytes(progress.read_bytes()[:-1])
    changed = settings | (change if isinstance(change, dict) else {}) | ({"RESUME": ""} if change == "fresh" else {})
    environ, plain = (tiny_environ(tiny_data, tmp_path / name, **changed) for name in ("cut", "plain"))
    outcome = run_main(environ)
    assert outcome.returncode == 0, outcome.stderr
    assert "resumed_evaluation" not in outcome.stdout
    assert run_main(plain).returncode == 0
    assert stages(plain).items() <= stages(environ).items()


AT_25TH_PIECE = """
train_gpt.PIECE_BATCHES = 2
advance, pieces = train_gpt.Progress.advance, []
def counted(progress, *arguments):
    pieces.append(progress)
    if (len(pieces), rank) == ({stop}, 1):
        os.kill(os.getpid(), signal.SIGTERM)
    advance(progress, *arguments)
train_gpt.Progress.advance = counted
"""


def test_evaluation_of_two_ranks_goes_on_with_two_and_begins_again_with_one(tiny_run, tiny_data, run_main, tmp_path):
    """Pieces are cut by world size: those of two ranks are twice as large, 3 + 9 and 6 chunks of TTT."""
    settings = STAGES | dict(ARTIFACT=tiny_run.artifact, CHECKPOINT_SECONDS=1e-9)
    whole, cut, other = (tiny_environ(tiny_data, tmp_path / name, **settings) for name in ("whole", "cut", "other"))
    assert run_main(whole).returncode == 0
    process = start(cut, AT_25TH_PIECE.format(stop=15), tmp_path, nproc=2)
    stdout, _ = process.communicate(timeout=90)
    assert "stopped signal:SIGTERM stage:3 pieces:3 " in stdout
    shutil.copytree(cut["OUT_DIR"], other["OUT_DIR"])

    process = start(cut, AT_25TH_PIECE.format(stop=0), tmp_path, nproc=2)
    stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 0, stderr
    assert "resumed_evaluation stages:2 pieces:3" in stdout
    outcome = run_main(other)
    assert outcome.returncode == 0, outcome.stderr
    assert "resumed_evaluation" not in outcome.stdout
    assert stages(whole).items() <= stages(other).items()
    ours, theirs = stages(cut), stages(whole)
    assert ours.keys() == theirs.keys()
    for name, (loss, mass) in ours.items():
        assert loss == pytest.approx(theirs[name][0], abs=1e-5)
        assert mass == pytest.approx(theirs[name][1], abs=1e-6)


def test_time_before_a_restart_counts(tiny_run, tiny_data, run_main, tmp_path, monkeypatch):
    environ = tiny_environ(tiny_data, tmp_path, **STAGES, ARTIFACT=tiny_run.artifact)
    elapsed = Progress.elapsed_s
    with monkeypatch.context() as patch:
        interrupt_after(patch, 25, "signal")
        patch.setattr(Progress, "elapsed_s", lambda progress: 1000 * (len(progress.results) + 1) + elapsed(progress))
        assert run_main(environ).returncode == 143
    assert run_main(environ).returncode == 0
    rows = read_events(tmp_path / "logs" / "run.jsonl")
    assert event(rows, "evaluation")["total_s"] > 3000
    assert [row["eval_time_ms"] // 1e6 for row in rows if row["event"] == "legal_ttt"] == [1]


def test_a_whole_run_killed_in_evaluation_neither_trains_nor_quantizes_again(
    tiny_data, run_main, tmp_path, monkeypatch
):
    settings = dict(ITERATIONS=4, TTT_CHUNK_TOKENS=200, EVAL_BATCH_SEQS=4, RESUME="auto", CHECKPOINT_SECONDS=1e-9)
    whole, cut = (tiny_environ(tiny_data, tmp_path / name, **settings) for name in ("whole", "cut"))
    assert run_main(whole).returncode == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 25, "signal")
        assert run_main(cut).returncode == 143
    outcome = run_main(cut)
    assert outcome.returncode == 0, outcome.stderr
    assert "train_loss" not in outcome.stdout
    assert "reused:True" in outcome.stdout
    assert "resumed_evaluation stages:2 pieces:3" in outcome.stdout
    assert stages(cut) == stages(whole)


# ---- TTT leaves the model as it was, whatever happens ------------------------------------------------------------


@pytest.mark.parametrize("fails", ["", "train_on", "score_all"])
def test_ttt_restores_weights_gradients_and_flags(monkeypatch, fails):
    from test_ttt import CONFIG, STREAM, lively_model

    model = lively_model()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
        parameter.grad = torch.full_like(parameter, index) if index % 2 else None
    before = [(p.detach().clone(), p.requires_grad, p.grad) for p in model.parameters()]
    config = train_gpt.dataclasses.replace(CONFIG, polyak_decay=0.9)
    runtime = train_gpt.Runtime(config, {})
    if fails:
        owner = TestTimeTrainer if fails == "train_on" else WindowScorer
        original, count = getattr(owner, fails), []

        def failing(*arguments: Any) -> Any:
            count.append(1)
            if len(count) == 2:
                raise Interruption
            return original(*arguments)

        monkeypatch.setattr(owner, fails, failing)
        with pytest.raises(Interruption):
            train_gpt.score_then_adapt(model, config, runtime, STREAM)
    else:
        train_gpt.score_then_adapt(model, config, runtime, STREAM)
    for (value, flag, grad), parameter in zip(before, model.parameters()):
        assert torch.equal(value, parameter)
        assert flag == parameter.requires_grad
        assert grad is parameter.grad


def test_polyak_averaged_weights_are_taken_back_after_an_error():
    from test_ttt import trainer_of

    trainer = trainer_of(polyak_decay=0.9)
    trainer.polyak[0].add_(1)
    before = [tensor.clone() for tensor in trainer.trained]
    averaged = trainer.averaged()
    averaged.__enter__()
    assert not torch.equal(trainer.trained[0], before[0])
    with pytest.raises(Interruption):
        averaged.gen.throw(Interruption())  # pyright: ignore[reportAttributeAccessIssue]
    assert all(torch.equal(*pair) for pair in zip(before, trainer.trained))


def test_odd_progress_with_a_sound_checksum_is_refused(tiny_run, tiny_data, run_main, tmp_path, monkeypatch):
    environ = tiny_environ(tiny_data, tmp_path, **STAGES, ARTIFACT=tiny_run.artifact)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 25, "signal")
        assert run_main(environ).returncode == 143
    path = tmp_path / "checkpoints" / "evaluation.safetensors"
    tensors, meta = train_gpt.unpack_state(path.read_bytes(), path)
    for name in ("logp", "sampled", "trained/0"):
        train_gpt.write_state(path, {key: value for key, value in tensors.items() if key != name}, meta)
        outcome = run_main(environ)
        assert (outcome.returncode, outcome.stderr.count("\n")) == (2, 1)
        assert "evaluation.safetensors" in outcome.stderr


# ---- what a mixture's probabilities add up to --------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [False, True])
def test_one_wrong_prediction_makes_a_result_invalid(tiny_run, tiny_data, run_main, tmp_path, monkeypatch, wrong):
    """The mean of all masses would hide it: one of eighty that is 0.4 % too large moves it by 0.005 %."""
    log_mixed = train_gpt.log_mixed

    def with_one_wrong(mixer: Any, scores: train_gpt.TokenScores, *arguments: Any) -> train_gpt.Score:
        samples = train_gpt.sample_targets(len(scores.logp))
        mix, chosen = mixer.mix, scores.entropy[samples[30]]
        mixer.mix = lambda block: mix(block) + np.where(block.entropy == chosen, np.log1p(0.004 * wrong), 0)
        return log_mixed(mixer, scores, *arguments)

    monkeypatch.setattr(train_gpt, "log_mixed", with_one_wrong)
    settings = dict(EVAL_ONLY=1, ARTIFACT=tiny_run.artifact, MIXER="backoff-published", TTT_ENABLED=0)
    outcome = run_main(tiny_environ(tiny_data, tmp_path, **settings))
    assert outcome.returncode == 0, outcome.stderr
    row = event(read_events(tmp_path / "logs" / "run.jsonl"), "final_mixed")
    assert row["mass"] == pytest.approx(1, abs=1e-4)
    assert row["valid"] is not wrong
    last = outcome.stdout.splitlines()[-1]
    assert f"valid:{not wrong}" in last
    assert ("INVALID" in last) == wrong
