"""Test-time training by document: a plain loop's numbers, and what a score may depend on."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import audit
import audit_decode
import numpy as np
import pytest
import torch
from ranks import call_in_ranks
from support import Terminal
from test_ttt import CONFIG as WHOLE
from test_ttt import lively_model, make_stream, make_tokens
from torch import Tensor

import train_gpt
from train_gpt import GPT, Config, DocumentTrainer, Runtime, TokenScores

# 300 targets: documents of 40, 1, 49, 110 and 100 of them, chunks of 8, windows of 24.
CONFIG = dataclasses.replace(
    WHOLE, ttt_rank=3, ttt_chunk_tokens=8, ttt_lr=0.02, compute_dtype="fp32"
).validate()
BEGINS = [0, 40, 41, 90, 200]
DOCUMENTS = [range(*pair) for pair in itertools.pairwise([*BEGINS, 300])]
TOKENS = np.maximum(make_tokens(), train_gpt.BOS_ID + 1)
TOKENS[BEGINS] = train_gpt.BOS_ID


def adapt(config: Config = CONFIG, tokens: np.ndarray = TOKENS, model: GPT | None = None) -> TokenScores:
    return train_gpt.score_then_adapt(model or lively_model(config), config, Runtime(config, {}), make_stream(tokens))


@pytest.fixture(scope="module")
def scores() -> TokenScores:
    return adapt()


@pytest.mark.parametrize("config", [CONFIG, WHOLE], ids=["by document", "by chunks"])
def test_a_bar_fills_on_a_terminal_and_is_taken_away(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    adapt(config)
    filled = [bar.count("#") for bar in terminal.getvalue().split("\x1b[2K\r")[1:]]
    assert filled[-1] == 0
    assert filled[:-1] == sorted(filled[:-1])
    assert filled[0] <= 3
    assert filled[-2] == 30
    assert terminal.getvalue().endswith("\x1b[2K\r")


class Merged(GPT):
    """The model with a product of two thin matrices added to each matrix of its banks."""

    products: dict[str, tuple[Tensor, Tensor]]

    def _weight(self, name: str, qat: bool) -> Tensor:
        weight = super()._weight(name, qat)
        return weight + torch.einsum("moi,mij->moj", *self.products[name]) if name in self.products else weight


def plain_loop(config: Config) -> np.ndarray:
    """A document after the other, a window at a time, by torch's Adagrad: log-probabilities of all targets."""
    trainer = DocumentTrainer(lively_model(config), config)
    model, tokens, logp = Merged(config, initialize=False), torch.from_numpy(TOKENS.astype(np.int64)), np.zeros(300)
    model.load_state_dict(lively_model(config).state_dict())
    for document in DOCUMENTS:
        zeros = [torch.zeros_like(factor, requires_grad=True) for factor in trainer.trained]
        drawn = [left for left, _ in trainer.model.adapters.values()]
        model.products = dict(zip(train_gpt.BANK_NAMES, zip(drawn, zeros)))
        optimizer = torch.optim.Adagrad(zeros, config.ttt_lr)
        for start in range(document.start, document.stop, 8):
            begin, stop = max(start + 8 - 24, 0), min(start + 8, document.stop)
            ids, targets = tokens[None, begin:stop], tokens[None, begin + 1 : stop + 1]
            known = model.token_scores(ids, targets, stop - begin, config.ttt_temperature)[0][0]
            logp[start:stop] = known[start - begin :].detach()
            optimizer.zero_grad()
            (-known[max(document.start - begin, 0) :].mean()).backward()
            optimizer.step()
    return logp


OPTIONS: list[dict[str, Any]] = [
    {}, {"ttt_temperature": 0.95}, {"ttt_rank": 1, "ttt_lr": 0.005}, {"repeat_layers": (1, 2), "ttt_lr": 0.005},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_scores_are_those_of_a_plain_loop(options: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **options)
    np.testing.assert_allclose(adapt(config).logp, plain_loop(config), rtol=0, atol=2e-4)


def test_an_artifact_scores_the_same_under_any_seed(scores: TokenScores) -> None:
    """What is drawn for the adapters goes with the seed in the artifact, not with that of the run that scores it."""
    again = adapt(dataclasses.replace(CONFIG, seed=CONFIG.seed + 1), model=lively_model(CONFIG))
    np.testing.assert_array_equal(again.logp, scores.logp)


def test_each_document_begins_with_the_artifact_itself(scores: TokenScores) -> None:
    """Its first chunk is scored as with a rate of 0, later ones are not."""
    still = adapt(dataclasses.replace(CONFIG, ttt_lr=0.0))
    for document in DOCUMENTS:
        first, rest = slice(document.start, document.start + 8), slice(document.start + 8, document.stop)
        np.testing.assert_array_equal(scores.logp[first], still.logp[first])
        assert len(document) <= 8 or not np.allclose(scores.logp[rest], still.logp[rest], atol=1e-3)


def test_repeated_text_is_learned() -> None:
    """A document that says the same again and again."""
    tokens = np.concatenate([[train_gpt.BOS_ID], np.tile(np.arange(5, 25), 15)])
    gains = adapt(CONFIG, tokens).logp - adapt(dataclasses.replace(CONFIG, ttt_lr=0.0), tokens).logp
    assert gains[100:].mean() > 0.3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_score_depends_on_what_stands_before_it_alone(dtype: str) -> None:
    """To the bit: neither on later tokens nor on where later documents begin."""
    config = dataclasses.replace(CONFIG, compute_dtype=dtype)
    before = adapt(config)
    for place, token in ((30, 7), (40, 9), (60, train_gpt.BOS_ID), (90, 9), (91, 5), (150, train_gpt.BOS_ID), (299, 6)):
        changed = TOKENS.copy()
        changed[place] = token
        after = adapt(config, changed)
        assert (after.logp[: place - 1] == before.logp[: place - 1]).all()
        assert (after.entropy[:place] == before.entropy[:place]).all()
        assert after.logp[place - 1] != before.logp[place - 1]


def test_nothing_is_carried_over_to_the_next_document(scores: TokenScores) -> None:
    """A document's scores are the same to the bit where earlier ones were not trained on: what moved is put back."""
    rounds = [0]

    class Late(DocumentTrainer):
        def learn(self, logp: Tensor) -> None:
            rounds[0] += 1
            if rounds[0] > 10:  # of 5, 1 and 7 chunks, the last of which is not trained on
                super().learn(logp)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "DocumentTrainer", Late)
        others = adapt()
    assert (others.logp[90:] == scores.logp[90:]).all()
    assert (others.logp[:90] != scores.logp[:90]).any()


def test_the_model_is_left_as_it_was(scores: TokenScores) -> None:
    model = lively_model(CONFIG)
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    np.testing.assert_array_equal(adapt(model=model).logp, scores.logp)
    for name, value in model.named_parameters():
        assert (value == before[name][0]).all()
        assert value.requires_grad == before[name][1]
        assert value.grad is None


@pytest.mark.parametrize("length", [1, 7, 8, 9, 24, 25, 41, 42, 300])
def test_any_length(scores: TokenScores, length: int) -> None:
    """The first targets score as they do in the whole stream; the sampled predictions are theirs, and distributions."""
    short = adapt(CONFIG, TOKENS[: length + 1])
    np.testing.assert_array_equal(short.logp, scores.logp[:length])
    np.testing.assert_allclose(np.exp(short.sampled.astype(np.float64)).sum(1), 1, atol=1e-5)
    chosen = short.sampled[np.arange(len(short.targets)), TOKENS[short.targets + 1]]
    np.testing.assert_array_equal(chosen, short.logp[short.targets])


def test_a_stream_without_document_starts_is_one_document() -> None:
    tokens = np.where(TOKENS == train_gpt.BOS_ID, 2, TOKENS)
    assert np.isfinite(adapt(CONFIG, tokens).logp).all()
    assert (adapt(CONFIG, tokens).logp[250:] != adapt(dataclasses.replace(CONFIG, ttt_lr=0.0), tokens).logp[250:]).any()


def test_compiled_it_scores_the_same(scores: TokenScores, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all steps, and its backward pass: neither a document's end nor the stream's changes a shape."""
    graphs: list[Any] = []
    honest = torch.compile

    def compiled(function: Any, **options: Any) -> Any:
        def count(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        return honest(function, **options, backend=count)

    monkeypatch.setattr(torch, "compile", compiled)
    np.testing.assert_allclose(adapt(dataclasses.replace(CONFIG, compile=True)).logp, scores.logp, rtol=0, atol=1e-5)
    assert len(graphs) == 1


def test_a_chunk_is_no_longer_than_its_window() -> None:
    chunks = [dataclasses.replace(CONFIG, ttt_chunk_tokens=tokens).validate() for tokens in (24, 500)]
    whole, longer = map(adapt, chunks)
    np.testing.assert_array_equal(longer.logp, whole.logp)


def save_scores(folder: str) -> None:
    with Runtime(CONFIG, os.environ) as runtime:
        scores = train_gpt.score_then_adapt(lively_model(CONFIG), CONFIG, runtime, make_stream(TOKENS))
        np.savez(f"{folder}/{runtime.rank}.npz", **scores._asdict())


def test_any_number_of_ranks_scores_the_same(scores: TokenScores, tmp_path: Path) -> None:
    """To the bit. Of four ranks one has no document of its own."""
    ranks = call_in_ranks([os.environ] * 4, save_scores, str(tmp_path))
    assert [rank.returncode for rank in ranks] == [0] * 4, ranks
    for rank in range(4):
        with np.load(tmp_path / f"{rank}.npz") as together:
            for column, values in scores._asdict().items():
                np.testing.assert_array_equal(together[column], values, err_msg=column)


# ---- the audit of it ---------------------------------------------------------------------------------------------


DECODED: list[dict[str, Any]] = [
    {}, {"compute_dtype": "bf16"}, {"mixer": "backoff"}, {"ttt_chunk_tokens": 500}, {"ttt_enabled": False},
]  # fmt: skip


@pytest.mark.parametrize("options", DECODED)
@pytest.mark.parametrize("start", [0, 35, 240])
def test_it_decodes(start: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the bits and what stands before; a document's end is found by decoding it."""
    monkeypatch.setattr(audit_decode.Known, "target_bytes", lambda _, tokens: np.ones(len(tokens) - 1, np.int16))
    config = dataclasses.replace(CONFIG, **options)
    model = lively_model(config)
    tokens = TOKENS.astype(np.int64)
    known = audit_decode.Known(config, 300, tokens[: start + 1], 60, {})
    words, nats = audit_decode.encode(model, known, tokens)
    scored = -audit_decode.own_scores(model, known, tokens)[start : start + 60]
    assert np.abs(nats - scored).max() < 1e-5
    assert audit_decode.decode(model, known, words).tolist() == tokens[start + 1 : start + 61].tolist()


def neural_stage() -> audit.Stage:
    neural = audit.Neural(lively_model(CONFIG), CONFIG, ttt=True)
    return audit.Stage("ttt", neural.score, CONFIG.vocab_size, neural.claims)


def test_audit_of_honest_code() -> None:
    tokens = TOKENS.astype(np.int64)
    stage = neural_stage()
    for ok, figure in (
        audit.check_training_order(stage, tokens, 0),
        audit.check_kept_once(stage.score, tokens, [1, 8, 41, 300]),
        audit.check_future(stage, tokens, [39, 40, 130]),
    ):
        assert ok, figure


def test_audit_of_training_before_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step on the whole window, of which the chunk that comes next is a part: scores know their own targets."""
    honest, trainers = GPT.token_scores, list[DocumentTrainer]()

    class Known(DocumentTrainer):
        def begin(self) -> None:
            trainers.append(self)
            super().begin()

    def token_scores(self: GPT, *asked: Any) -> Any:
        if self.adapters:
            trainers[-1].learn(honest(self, *asked)[0][0])
        return honest(self, *asked)

    monkeypatch.setattr(train_gpt, "DocumentTrainer", Known)
    monkeypatch.setattr(GPT, "token_scores", token_scores)
    ok, figure = audit.check_training_order(neural_stage(), TOKENS.astype(np.int64), 0)
    assert (ok, figure) == (False, "trains on targets 0…23 before they are scored")
    assert not audit.check_future(neural_stage(), TOKENS.astype(np.int64), [39, 40, 130])[0]


def test_audit_of_scores_that_are_kept_twice() -> None:
    stage = neural_stage()
    twice = audit.check_kept_once(lambda tokens: (stage.score(tokens), stage.score(tokens))[0], TOKENS, [30])
    assert twice == (False, "60 scores kept, of 30 targets out of 30")


def test_audit_of_scores_that_are_left_out() -> None:
    stage = neural_stage()
    fewer = audit.check_kept_once(lambda tokens: stage.score(tokens[:-2]), TOKENS, [30])
    assert fewer == (False, "28 scores kept, of 28 targets out of 30")


def test_the_projection_counts_windows_of_chunks() -> None:
    """A pass over the stream, overlapping ones, and for each chunk a window that is scored and trained on."""
    config = dataclasses.replace(CONFIG, eval_stride=8)
    assert train_gpt.projected_seconds(config, 300, 2.0) == pytest.approx(2 * (1 + 3 + 4 * 3))
    longer = dataclasses.replace(config, ttt_chunk_tokens=500)
    assert train_gpt.projected_seconds(longer, 300, 2.0) == pytest.approx(2 * (1 + 3 + 4))
