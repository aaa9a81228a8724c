"""The prototype of test-time training by document: what it scores with has seen nothing of what it scores."""

import numpy as np
import pytest
import torch
from golden_support import random_ids, randomize, tiny_config

import train_gpt
from bench import ttt_documents

BEGINNINGS = (0, 20, 61)


@pytest.fixture(scope="module")
def model() -> ttt_documents.AdaptedGPT:
    config = tiny_config(mtp_num_heads=0, repeat_layers=(1, 2))
    model = ttt_documents.AdaptedGPT(config)
    randomize(model)
    return model.requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def tokens(model: ttt_documents.AdaptedGPT) -> torch.Tensor:
    ids = random_ids(model.config, 1, 90)[0]
    ids[list(BEGINNINGS)] = train_gpt.BOS_ID
    return ids


def scored(model: ttt_documents.AdaptedGPT, tokens: torch.Tensor, steps: int = 1) -> np.ndarray:
    return ttt_documents.adapt_by_document(model, tokens, rank=2, rate=0.05, chunk=8, steps=steps)[0]


def test_each_target_belongs_to_one_document(tokens: torch.Tensor):
    ranges = ttt_documents.documents(tokens.numpy())
    assert [target for each in ranges for target in each] == [*range(len(tokens) - 1)]
    assert [each.start for each in ranges] == [*BEGINNINGS]


def test_no_score_depends_on_its_own_chunks_training_or_on_later_tokens(model, tokens):
    before = scored(model, tokens)
    for position in (5, 19, 40, 70, 89):
        changed = tokens.clone()
        changed[position] = (tokens[position] - 2) % 90 + 3
        after = scored(model, changed)
        assert (after[: position - 1] == before[: position - 1]).all()
        assert after[position - 1] != before[position - 1]


def test_training_begins_anew_with_each_document_and_acts_within_it(model, tokens):
    plain, adapted = scored(model, tokens, steps=0), scored(model, tokens)
    for document in ttt_documents.documents(tokens.numpy()):
        first, rest = slice(document.start, document.start + 8), slice(document.start + 8, document.stop)
        np.testing.assert_array_equal(adapted[first], plain[first])
        assert (adapted[rest] != plain[rest]).any()
