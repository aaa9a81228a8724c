"""Ways to be dishonest only where nobody looked: each is an edit of the record that the audit has to notice.

The edits here change the scorers within this process; those of the whole command are in test_audit_run.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import audit
import audit_run
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt

SEED = 11  # of what the audit draws: a fault at one target in forty is missed by one seed in twenty
EFFORT = audit.QUICK
mix_scores, score_stream, guard = train_gpt.mix_scores, train_gpt.score_stream, train_gpt.guard
Edit = Callable[[pytest.MonkeyPatch], None]


def conditions(report: audit.Report) -> set[str]:
    return {finding.condition for finding in report.violations}


@pytest.fixture
def on_short_streams(model: train_gpt.GPT, config: train_gpt.Config) -> Callable[..., set[str]]:
    """The conditions that one stage violates on streams as the audit draws them."""

    def ask(mixer: str = "none", ttt: bool = False) -> set[str]:
        report = audit.Report(seed=SEED)
        own = dataclasses.replace(config, mixer=mixer, ttt_enabled=ttt)
        stage = audit.last_stage(model, own)
        tokens = audit.make_stream(audit.zipf_material(config.vocab_size, 400, 3), audit.STREAM_TARGETS + 1, SEED)
        audit.audit_stages(report, [stage], own, tokens, EFFORT)
        return conditions(report)

    return ask


@pytest.fixture
def on_long_streams(model: train_gpt.GPT, config: train_gpt.Config, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The conditions violated on long streams, by one mixer or by TTT."""

    def ask(mixers: tuple[str, ...], ttt: bool) -> set[str]:
        report = audit.Report(seed=SEED)
        monkeypatch.setattr(audit, "MIXERS", mixers)
        effort = EFFORT._replace(long=2)
        audit.audit_long_streams(report, model, dataclasses.replace(config, ttt_enabled=ttt, ngram_block=8192), effort)
        return conditions(report)

    return ask


def changed_stream(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Edit:
    """An edit of the sliding window: `change` gets its log-probabilities (N,) and the tokens (N + 1,)."""

    def edit(patch: pytest.MonkeyPatch) -> None:
        def score(model: Any, config: Any, runtime: Any, validation: Any, stride: int) -> train_gpt.TokenScores:
            scores = score_stream(model, config, runtime, validation, stride)
            return scores._replace(logp=change(scores.logp.copy(), validation.tokens))

        patch.setattr(train_gpt, "score_stream", score)

    return edit


def at_one_in_forty(count: int) -> np.ndarray:
    """Whether a target is among 2.5 %, which have no order."""
    return np.arange(count) * 2_654_435_761 % 2**32 < 0.025 * 2**32


# ---- positions and lengths ---------------------------------------------------------------------------------------


def at_few(logp: np.ndarray, _: np.ndarray) -> np.ndarray:
    return np.where(at_one_in_forty(len(logp)), logp * 0.5, logp)


def on_short_ones(logp: np.ndarray, _: np.ndarray) -> np.ndarray:
    return logp * 0.9 if len(logp) <= 60 else logp


def next_token_at_few(logp: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """At 2.5 % of targets the score tells one bit of the token after."""
    hint = np.append(tokens[2:] % 2, 0) * 1e-3
    return np.where(at_one_in_forty(len(logp)), logp - hint, logp).astype(np.float32)


@pytest.mark.parametrize("change", [at_few, on_short_ones, next_token_at_few])
def test_dishonest_at_some_positions_or_lengths(
    on_short_streams: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    changed_stream(change)(monkeypatch)
    assert audit.NORMALISED in on_short_streams()


def test_honest_only_where_the_run_writes_its_distributions_down(
    on_short_streams: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = train_gpt.WindowScorer.finish

    def finish(self: train_gpt.WindowScorer) -> train_gpt.TokenScores:
        scores = honest(self)
        boosted = scores.logp * 0.9
        boosted[self.samples] = scores.logp[self.samples]
        return scores._replace(logp=boosted)

    monkeypatch.setattr(train_gpt.WindowScorer, "finish", finish)
    assert audit.NORMALISED in on_short_streams()


def test_few_targets_in_their_own_distributions(
    on_short_streams: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peeks at 2.5 % of targets, normalised and written down as if it were the prediction: mass 1, gap 0."""
    honest = train_gpt.GPT.token_scores

    def token_scores(self: train_gpt.GPT, ids: torch.Tensor, targets: torch.Tensor, tail: int, *rest: Any) -> Any:
        _, entropy, every = honest(self, ids, targets, tail, *rest)
        came = targets[:, -tail:, None]
        few = (ids + 3 * F.pad(ids[:, :-1], (1, 0)))[:, -tail:] % 40 == 0
        bonus = torch.zeros_like(every).scatter(2, came, 0.5) * few[..., None]
        every = torch.log_softmax(every + bonus, -1)
        return every.gather(2, came).squeeze(2), entropy, every

    monkeypatch.setattr(train_gpt.GPT, "token_scores", token_scores)
    assert on_short_streams() == {audit.NORMALISED}


# ---- what has been seen, and what is still to come ---------------------------------------------------------------


def counts_with_the_target(after: int) -> Edit:
    """From so many targets on, the unigram and all higher counts include the target itself."""

    def edit(patch: pytest.MonkeyPatch) -> None:
        honest = train_gpt.iter_ngram_counts

        def counts(tokens: Any, max_order: int, probe: Any = None) -> Any:
            for each in honest(tokens, max_order, probe):
                seen, followed, distinct = each
                late = (np.arange(len(seen)) > after) if probe is None else (probe.position > after)[:, None]
                yield train_gpt.NgramCounts(seen + late, followed + late, np.maximum(distinct, late))

        patch.setattr(train_gpt, "iter_ngram_counts", counts)

    return edit


def weights_of_the_end(patch: pytest.MonkeyPatch) -> None:
    """The mixer goes over the stream twice and scores it with what it has learned by its end."""

    def mix(mixer: Any, tokens: Any, logp: Any, entropy: Any, probe: Any = None, block: int = 2048) -> Any:
        mix_scores(mixer, tokens, logp, entropy, None, block)
        return mix_scores(mixer, tokens, logp, entropy, probe, block)

    patch.setattr(train_gpt, "mix_scores", mix)


def odds_of_the_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(train_gpt, "guard", lambda a, b: np.full_like(b, np.clip((b - a).sum(dtype=np.float64), -30, 30)))


@pytest.mark.parametrize(
    ("edit", "condition"),
    [
        (counts_with_the_target(13_000), audit.NORMALISED),
        (counts_with_the_target(20_000), audit.NORMALISED),
        (weights_of_the_end, audit.CAUSAL),
        (odds_of_the_end, audit.CAUSAL),
    ],
    ids=["counts after 13,000", "counts after 20,000", "weights of the end", "odds of the end"],
)
def test_mixers_that_know_too_much(
    on_long_streams: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch, edit: Edit, condition: str
) -> None:
    edit(monkeypatch)
    assert condition in on_long_streams(("backoff",), False)


def test_odds_of_the_end_that_every_future_confirms(
    on_short_streams: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign alone is taken from the end: which model wins in the whole."""
    monkeypatch.setattr(train_gpt, "guard", lambda a, b: np.full_like(b, 30 * np.sign((b - a).sum())))
    assert on_short_streams("backoff") & {audit.CAUSAL, audit.NORMALISED}


def test_ttt_that_looks_ahead(on_long_streams: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it trains on after a chunk lies 5,000 targets further on."""
    ahead = 5_000
    honest = train_gpt.ChunkTrainer.train_on

    def train_on(self: Any, scorer: Any, targets: range, lr: float) -> None:
        last = len(scorer.scores)
        honest(self, scorer, range(min(targets.start + ahead, last), min(targets.stop + ahead, last)), lr)

    monkeypatch.setattr(train_gpt.ChunkTrainer, "train_on", train_on)
    assert audit.CAUSAL in on_long_streams((), True)


# ---- a run's shapes ----------------------------------------------------------------------------------------------


@pytest.fixture
def in_a_runs_shape(model: train_gpt.GPT, config: train_gpt.Config, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The conditions violated with windows of 512 in full batches, compiled where the recipe has it so."""

    def ask(compiled: bool = False) -> set[str]:
        recipe = dataclasses.replace(config, eval_seq_len=512, eval_batch_seqs=8, eval_stride=64, compile=compiled)
        shaped, length = audit.run_shape(dataclasses.replace(config, ttt_enabled=False, mixer="none"), recipe)
        tokens = audit.make_stream(audit.zipf_material(config.vocab_size, length, 3), length + 1, SEED)
        report = audit.Report(seed=SEED)
        monkeypatch.setattr(audit, "audit_command", lambda *_: None)
        tokenizer = train_gpt.Tokenizer(config.tokenizer_path, config.vocab_size)
        given = audit.Submission(config.artifact_path, shaped, tokenizer, config.artifact_path, tokens)
        audit.audit_run_shape(report, given, model, EFFORT)
        return conditions(report)

    return ask


def peeking(scores: Any) -> Any:
    """A forward pass that gives the token that came 0.5 nats more."""
    return lambda *asked: ((answer := scores(*asked))[0] + 0.5, *answer[1:])


def test_long_windows_that_peek(in_a_runs_shape: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = train_gpt.GPT.token_scores

    def token_scores(self: train_gpt.GPT, ids: torch.Tensor, *rest: Any) -> Any:
        return (peeking(honest) if ids.shape[1] >= 512 else honest)(self, ids, *rest)

    assert in_a_runs_shape() == set()
    monkeypatch.setattr(train_gpt.GPT, "token_scores", token_scores)
    assert in_a_runs_shape() == {audit.NORMALISED}


def test_compiled_path_that_peeks(in_a_runs_shape: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is a stand-in that takes no minute; with it, full batches alone take another path."""
    monkeypatch.setattr(torch, "compile", lambda forward, **_: peeking(forward))
    assert in_a_runs_shape(compiled=False) == set()
    assert in_a_runs_shape(compiled=True) == {audit.NORMALISED}


# ---- training ----------------------------------------------------------------------------------------------------


def test_training_on_validation_text_after_step_100(
    rehearsal: audit.Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = train_gpt.Trainer.train_step

    def train_step(self: train_gpt.Trainer, step: int, lr_scale: float) -> torch.Tensor:
        if step >= 100:
            ids = torch.from_numpy(self.validation.tokens[:480].astype(np.int64)).view(15, 32)
            self.loader.batch = lambda _: [(ids, ids)]  # pyright: ignore[reportAttributeAccessIssue]
        return honest(self, step, lr_scale)

    monkeypatch.setattr(train_gpt.Trainer, "train_step", train_step)
    report = audit.Report()
    audit.audit_training(report, rehearsal)
    assert [finding.check for finding in report.violations] == ["other shards"]


def test_training_that_reads_another_file_and_a_slow_clock(
    rehearsal: audit.Rehearsal, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, now = tmp_path_factory.mktemp("elsewhere") / "hints.npy", train_gpt.Clock.now
    np.save(hidden, np.zeros(3))
    monkeypatch.setattr(train_gpt, "lr_scale_at", lambda *_: float(1 + np.load(hidden)[0]))
    monkeypatch.setattr(train_gpt.Clock, "now", lambda self: 0.5 * now(self))
    report = audit.Report()
    audit.audit_training(report, rehearsal)
    assert [finding.check for finding in report.violations] == ["files opened", "training seconds from outside"]
    assert "hints.npy" in report.violations[0].figure


@pytest.mark.parametrize(("claimed_s", "ok"), [(2.0, True), (1.9, True), (1.0, False)])
def test_clock_from_outside(claimed_s: float, ok: bool) -> None:
    lines = [
        (10.0, "final_int6_roundtrip val_loss:2.0 eval_time:700ms"),
        (11.0, f"legal_ttt val_loss:2.0 eval_time:{500 * claimed_s:.0f}ms"),
        (12.0, f"final_mixed val_loss:2.0 eval_time:{500 * claimed_s:.0f}ms valid:True"),
    ]
    assert audit_run.check_clock(lines, audit_run.EVALUATION, total=False)[0] is ok
