"""An evaluation that is interrupted repeats no stage that was finished, and comes to the same result to the bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from ranks import run_whole
from support import VAL_TARGETS, Run, event, events_of, read_events, save_artifact, tiny_environ
from test_restarts import start

import train_gpt
from train_gpt import ChunkTrainer, WindowScorer

SETTINGS = dict(TTT_ENABLED=1, TTT_CHUNK_TOKENS=400, TTT_EPOCHS=1, MIXER="backoff", EVAL_STRIDE=16, RESUME="auto")
STAGES = ("score_stream", "score_stream", "score_then_adapt", "log_mixed")  # the functions of the four stages


class Interruption(BaseException):
    """Stands for a kill: nothing handles it."""


def count_stages(monkeypatch: pytest.MonkeyPatch, interrupt: int = 0, how: str = "") -> list[str]:
    """Note every stage that begins; the one with that number is killed, or gets a signal, when its work is done."""
    begun: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def stage(*arguments: Any) -> Any:
            begun.append(name)
            number, result = len(begun), function(*arguments)
            if number == interrupt and how == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif number == interrupt:
                raise Interruption
            return result

        return stage

    for name in set(STAGES):
        monkeypatch.setattr(train_gpt, name, noted(name, getattr(train_gpt, name)))
    return begun


def results(environ: dict[str, str]) -> dict[str, Any]:
    rows = read_events(Path(environ["OUT_DIR"]) / "logs" / "run.jsonl")
    return {row["event"]: (row["val_loss"], row.get("mass")) for row in rows if "val_loss" in row}


@pytest.fixture(scope="module")
def settings(tiny_run: Run) -> dict[str, Any]:
    return SETTINGS | dict(EVAL_ONLY=1, ARTIFACT=tiny_run.artifact)


@pytest.fixture(scope="module")
def whole(settings, tiny_data, tmp_path_factory) -> dict[str, Any]:
    """The results of an evaluation that nothing disturbs."""
    environ = tiny_environ(tiny_data, tmp_path_factory.mktemp("whole"), **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", environ)
        assert train_gpt.main() == 0
    return results(environ)


def interrupted(run_main, environ: dict[str, str], stage: int, how: str, scored_before: int = 0) -> None:
    """Run until a stage's work is done; `scored_before` the evaluation, its training has scored so often."""
    with pytest.MonkeyPatch.context() as patch:
        count_stages(patch, scored_before + stage, how)
        if how == "kill":
            with pytest.raises(Interruption):
                run_main(environ)
            return
        outcome = run_main(environ)
        assert (outcome.returncode, outcome.stderr) == (143, "")
        assert f"stopped signal:SIGTERM stage:{stage} " in outcome.stdout


@pytest.mark.parametrize("how", ["kill", "signal"])
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_finished_stages_are_not_repeated(settings, whole, tiny_data, run_main, tmp_path, monkeypatch, stage, how):
    environ = tiny_environ(tiny_data, tmp_path, **settings)
    interrupted(run_main, environ, stage, how)
    begun = count_stages(monkeypatch)
    outcome = run_main(environ)
    assert outcome.returncode == 0, outcome.stderr
    assert tuple(begun) == STAGES[stage - 1 :]
    assert results(environ) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]  # what served is gone


@pytest.mark.parametrize(
    "change",
    [
        dict(TTT_LR=0.003), dict(EVAL_STRIDE=8), dict(VAL_TOKENS=900), dict(SAMPLE_SEED=5),
        "artifact", "torn", "odd", "fresh",
    ],
    ids=str,
)  # fmt: skip
def test_stages_of_another_evaluation_are_not_taken(
    tiny_run, tiny_data, settings, run_main, tmp_path, monkeypatch, change
):
    artifact = tmp_path / "model.ptz"
    artifact.write_bytes(tiny_run.artifact.read_bytes())
    settings = settings | dict(ARTIFACT=artifact)
    interrupted(run_main, tiny_environ(tiny_data, tmp_path, **settings), 3, "signal")
    (record,) = (tmp_path / "checkpoints").rglob("evaluation*.safetensors")
    if change == "artifact":
        model, _, metadata = train_gpt.load_artifact(artifact)
        with torch.no_grad():
            model.smear.gate.add_(1)
        save_artifact(model, metadata["tokenizer"], artifact)
    elif change == "torn":
        record.write_bytes(record.read_bytes()[:-1])
    elif change == "odd":  # whole, but what another version of the program might have written
        safetensors.torch.save_file({"scores/logp": torch.zeros(3)}, record, {"train_gpt": "{}"})
    begun = count_stages(monkeypatch)
    changed = settings | (change if isinstance(change, dict) else {}) | ({"RESUME": ""} if change == "fresh" else {})
    outcome = run_main(tiny_environ(tiny_data, tmp_path, **changed))
    assert outcome.returncode == 0, outcome.stderr
    assert tuple(begun) == STAGES
    assert "resumed_evaluation" not in outcome.stdout


def test_two_ranks_go_on_with_two_and_begin_again_with_one(settings, whole, tiny_data, run_main, tmp_path):
    environ = tiny_environ(tiny_data, tmp_path, **settings)
    at_ttt = "train_gpt.score_then_adapt = lambda *arguments: (time.sleep(1), os.kill(os.getpid(), signal.SIGKILL))"
    start(environ, at_ttt, tmp_path, nproc=2).communicate(timeout=90)
    process = start(environ, "", tmp_path, nproc=2)
    stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 0, stderr
    assert "resumed_evaluation stages:2" in stdout
    for name, (loss, _) in results(environ).items():
        assert loss == pytest.approx(whole[name][0], abs=1e-5)
    start(environ, at_ttt, tmp_path, nproc=2).communicate(timeout=90)
    outcome = run_main(environ)
    assert outcome.returncode == 0, outcome.stderr
    assert "resumed_evaluation" not in outcome.stdout
    assert whole.items() <= results(environ).items()


def test_a_signal_that_arrives_twice_stops_once(settings, tiny_data, tmp_path):
    """As Ctrl-C does under a launcher: from the terminal, and passed on; the second while the first is being told."""
    environ = tiny_environ(tiny_data, tmp_path, **settings)
    twice = """
import threading
def again():
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    os.kill(os.getpid(), signal.SIGINT)
train_gpt.score_then_adapt = lambda *arguments: again()
finish = train_gpt.Checkpoints.finish
train_gpt.Checkpoints.finish = lambda checkpoints: (time.sleep(0.3), finish(checkpoints))
"""
    stdout, _ = start(environ, twice, tmp_path, nproc=2).communicate(timeout=90)
    assert stdout.count("stopped signal:SIGINT stage:3 ") == 1
    assert len(list((tmp_path / "checkpoints" / "run").glob("evaluation*.safetensors"))) == 1


def test_a_signal_while_a_finished_stage_is_saved_does_not_lose_it(settings, tiny_data, run_main, tmp_path):
    environ, save = tiny_environ(tiny_data, tmp_path, **settings), train_gpt.Checkpoints.save

    def interrupted_save(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Checkpoints, "save", interrupted_save)
        outcome = run_main(environ)
    assert outcome.returncode == 143
    assert "stopped signal:SIGTERM stage:2 " in outcome.stdout
    assert "resumed_evaluation stages:1" in run_main(environ).stdout


def test_time_before_a_restart_counts(settings, tiny_data, run_main, tmp_path):
    environ = tiny_environ(tiny_data, tmp_path, **settings)
    interrupted(run_main, environ, 3, "signal")
    assert run_main(environ).returncode == 0
    rows = read_events(tmp_path / "logs" / "run.jsonl")
    seconds: dict[str, list[float]] = {}
    for row in rows:
        if "eval_time_ms" in row:
            seconds.setdefault(row["event"], []).append(row["eval_time_ms"] / 1000)
    assert [len(times) for times in seconds.values()] == [2, 2, 1, 1]  # told again after the restart
    assert all(len(set(times)) == 1 for times in seconds.values())
    total_s = sum(times[0] for times in seconds.values())
    assert event(rows, "evaluation")["total_s"] == pytest.approx(total_s, abs=0.2)


def test_a_whole_run_killed_in_evaluation_does_not_train_again(tiny_data, run_main, tmp_path):
    settings = SETTINGS | dict(ITERATIONS=4)
    whole, cut = (tiny_environ(tiny_data, tmp_path / name, **settings) for name in ("whole", "cut"))
    assert run_main(whole).returncode == 0
    interrupted(run_main, cut, 3, "signal", scored_before=2)
    outcome = run_main(cut)
    assert outcome.returncode == 0, outcome.stderr
    assert "train_loss" not in outcome.stdout
    assert "resumed_evaluation stages:2" in outcome.stdout
    assert results(cut) == results(whole)


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
        owner = ChunkTrainer if fails == "train_on" else WindowScorer
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


# ---- what a mixture's probabilities add up to --------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [False, True])
def test_one_wrong_prediction_makes_a_result_invalid(tiny_run, tiny_data, run_main, tmp_path, monkeypatch, wrong):
    """The mean of all masses would hide it: one of eighty that is 0.4 % too large moves it by 0.005 %."""
    log_mixed = train_gpt.log_mixed

    def with_one_wrong(mixer: Any, scores: train_gpt.TokenScores, *arguments: Any) -> train_gpt.Score:
        mix, chosen = mixer.mix, scores.entropy[scores.targets[30]]
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


class SeesItsTarget(train_gpt.BackoffNgramMixer):
    """Counts each target before it is scored, and is honest where it is asked about every token."""

    def counts(self, tokens: torch.Tensor, probe: Any = None) -> Any:
        for seen, followed, distinct in super().counts(tokens, probe):
            yield train_gpt.NgramCounts(seen + (probe is None), followed + (probe is None), distinct)


def mixed(environ: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows about the targets that were looked at, and about what was found there."""
    return event(events_of(environ), "sampled_targets"), event(events_of(environ), "final_mixed")


def test_a_mixer_that_saw_its_target_is_caught_wherever_the_seed_looks(
    tiny_run, tiny_data, run_main, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_gpt, "BackoffNgramMixer", SeesItsTarget)
    found = []
    for seed in (1, 2):
        settings = dict(EVAL_ONLY=1, ARTIFACT=tiny_run.artifact, MIXER="backoff", TTT_ENABLED=0, SAMPLE_SEED=seed)
        environ = tiny_environ(tiny_data, tmp_path / str(seed), **settings)
        assert "INVALID" in run_main(environ).stdout.splitlines()[-1]
        looked, row = mixed(environ)
        assert looked["seed"] == seed
        assert 64 <= looked["count"] <= 80
        assert not row["valid"]
        assert row["worst"] < train_gpt.MASS_TOLERANCE
        assert row["gap"] > 1000 * train_gpt.GAP_TOLERANCE
        found.append((row["mass"], row["gap"]))
    assert found[0] != found[1]


def test_a_seed_means_the_same_targets_on_any_number_of_ranks(tiny_run, tiny_data, tmp_path):
    """Hashed counts have at each target a mass of its own, which tells where the run has looked."""
    hashed = dict(MIXER="backoff-published", NGRAM_COUNTS="hashed", NGRAM_BUCKETS=256, NGRAM_BLOCK=128)
    settings = hashed | dict(EVAL_ONLY=1, ARTIFACT=tiny_run.artifact, TTT_ENABLED=0)
    found = {}
    for name, ranks, seed in (("one", 1, 7), ("two", 2, 7), ("other", 1, 8), ("none", 1, 0), ("two, none", 2, None)):
        environ = tiny_environ(tiny_data, tmp_path / name, **settings, SAMPLE_SEED=seed)
        assert run_whole(environ, ranks).returncode == 0
        found[name] = mixed(environ)
    masses = {name: row["mass"] for name, (_, row) in found.items()}
    assert masses["one"] == pytest.approx(masses["two"], rel=1e-5)
    assert masses["none"] == pytest.approx(masses["two, none"], rel=1e-5)
    assert min(abs(masses["one"] / masses[name] - 1) for name in ("other", "none")) > 1e-3
    seeds = {name: looked["seed"] for name, (looked, _) in found.items()}
    assert (seeds["one"], seeds["two"], seeds["other"]) == (7, 7, 8)
    assert seeds["none"] == seeds["two, none"] > 0  # of the artifact and the text, so a restart's is the same


@pytest.mark.parametrize("count", [1, 15, 40, 100, VAL_TARGETS, 62_021_632])
def test_sampled_targets_are_spread_over_the_whole_stream(count):
    first, again, other = (train_gpt.sample_targets(count, seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) == (count < 64)
    for targets in (first, other):
        assert (np.diff(targets) > 0).all()
        assert set(range(min(16, count))) <= set(targets.tolist())
        assert 0 <= targets[0] <= targets[-1] < count
        assert np.diff([*targets, count]).max() <= 2 * count / 64 + 1
