"""Scoring: every target once, with the context its window gives it, and the same numbers however it is computed."""

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_support import golden_arrays, golden_json, golden_model, golden_parameter
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import (
    GPT,
    Config,
    Runtime,
    TokenScores,
    Windows,
    WindowScorer,
    plan_windows,
    score_of,
    score_stream,
)

CONFIG = Config(
    vocab_size=61, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2, bigram_vocab_size=53,
    bigram_dim=8, xsa_last_n=1, rope_dims=4, rope_train_len=16, ve_dim=8, ve_layers=(1, 2), eval_seq_len=24,
    eval_stride=5, eval_batch_seqs=4, train_seq_len=24, train_batch_tokens=24, device="cpu",
).validate()  # fmt: skip


def lively_model(config: Config = CONFIG) -> GPT:
    """A model whose every parameter is non-zero, so that each part of it matters to a score."""
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if parameter.ndim < 2 else 0.0
            amp = 0.3 if parameter.ndim < 2 else math.sqrt(3 / parameter.shape[-1])
            parameter.copy_(golden_parameter(name, tuple(parameter.shape), center, amp))
    return model


def stream_of(tokens: np.ndarray, sizes: np.ndarray | None = None) -> Any:
    """A validation split of these tokens; every target stands for one byte unless sizes say otherwise."""
    sizes = np.ones(len(tokens) - 1, dtype=np.int16) if sizes is None else sizes
    return SimpleNamespace(tokens=tokens.astype(np.uint16), bytes=sizes, num_targets=len(tokens) - 1, partial=False)


def random_tokens(count: int, seed: int = 0, vocab_size: int = CONFIG.vocab_size) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def scores_of(model: GPT, config: Config, tokens: np.ndarray, stride: int) -> TokenScores:
    return score_stream(model, config, Runtime(config, {}), stream_of(tokens), stride)


# ---- windows -----------------------------------------------------------------------------------------------------


@settings(max_examples=400)
@given(targets=st.integers(1, 700), seq_len=st.integers(1, 130), data=st.data())
def test_every_target_is_scored_once_in_order_by_full_windows(targets, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    windows = plan_windows(targets, seq_len, stride)
    assert windows.length == min(seq_len, targets)
    scored = []
    for start, tail in zip(windows.starts, windows.tails, strict=True):
        assert start >= 0
        assert start + windows.length <= targets  # full-length: it never runs out of the stream
        assert 1 <= tail <= windows.length
        scored.extend(range(start + windows.length - tail, start + windows.length))
    assert scored == list(range(targets))
    assert windows.tails[0] == windows.length
    assert all(windows.tails[1:-1] == stride)
    assert all(windows.tails[1:] <= stride)
    assert len(windows.starts) == 1 + max(0, math.ceil((targets - windows.length) / stride))


def test_windows_of_the_contests_split():
    windows = plan_windows(62_021_632, 2048, 64)
    assert windows.tails.sum() == 62_021_632
    assert len(windows.starts) == 1 + (62_021_632 - 2048) // 64
    assert set(windows.tails.tolist()) == {2048, 64}


# ---- scores against brute force ----------------------------------------------------------------------------------


@torch.no_grad()
def brute_force(model: GPT, tokens: np.ndarray, seq_len: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """log-probability and entropy of each target, each by a forward pass of its own over the window it belongs to.

    Written from the rule, not from plan_windows: target i < seq_len sees the stream's first window; any other one
    sees the window that ends with its group of `stride`, or with the stream where that comes first.
    """
    count = len(tokens) - 1
    length = min(seq_len, count)
    logp, entropy = np.zeros(count), np.zeros(count)
    for target in range(count):
        groups = 0 if target < length else (target - length) // stride + 1
        end = min(length + groups * stride, count)
        window = torch.from_numpy(tokens[end - length : end].astype(np.int64))[None]
        row = model.logits(window)[0, target - (end - length)].double()
        log_probs = F.log_softmax(row, dim=-1)
        logp[target] = log_probs[int(tokens[target + 1])]
        entropy[target] = -(log_probs.exp() * log_probs).sum()
    return logp, entropy


@pytest.mark.parametrize(
    ("count", "stride"),
    [(1, 5), (2, 5), (23, 5), (24, 5), (25, 5), (30, 24), (48, 24), (49, 24), (61, 1), (97, 7), (130, 24), (131, 5)],
)
def test_scores_equal_one_forward_pass_per_target(count, stride):
    model, tokens = lively_model(), random_tokens(count + 1, seed=count)
    found = scores_of(model, CONFIG, tokens, stride)
    logp, entropy = brute_force(model, tokens, CONFIG.eval_seq_len, stride)
    assert found.logp.dtype == found.entropy.dtype == np.float32
    assert found.logp.shape == found.entropy.shape == (count,)
    np.testing.assert_allclose(found.logp, logp, atol=2e-5)
    np.testing.assert_allclose(found.entropy, entropy, atol=2e-5)
    assert found.logp.std() > 0.05 or count < 3  # the model tells targets apart


def test_scores_do_not_depend_on_the_batch_size():
    """Batches change the shapes of matrix products, so the last bits may differ and no more."""
    model, tokens = lively_model(), random_tokens(300, seed=1)
    expected = scores_of(model, dataclasses.replace(CONFIG, eval_batch_seqs=1), tokens, 5)
    for batch in (2, 3, 4, 7, 1000):
        found = scores_of(model, dataclasses.replace(CONFIG, eval_batch_seqs=batch), tokens, 5)
        np.testing.assert_allclose(found.logp, expected.logp, atol=1e-5)
        np.testing.assert_allclose(found.entropy, expected.entropy, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_parts_of_the_windows_join_to_the_whole(ranks):
    """What each rank would score, put together in rank order, is what one rank scores."""
    model, tokens, runtime = lively_model(), random_tokens(213, seed=2), Runtime(CONFIG, {})
    windows = plan_windows(212, 24, 5)
    scorer = WindowScorer(model, CONFIG, runtime, tokens)
    edges = [len(windows.starts) * r // ranks for r in range(ranks + 1)]
    parts = [scorer.score_all(windows, a, b) for a, b in itertools.pairwise(edges)]
    expected = scores_of(model, CONFIG, tokens, 5).logp
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-5)
    assert scorer.score_all(windows, 3, 3).shape == (0,)


@pytest.mark.parametrize("stride", [1, 5, 24])
def test_a_changed_token_changes_no_earlier_score(stride):
    """Bit for bit. Position i is a target once and context afterwards; what was scored before it stays."""
    model, tokens = lively_model(), random_tokens(150, seed=3)
    before = scores_of(model, CONFIG, tokens, stride)
    for position in (1, 23, 24, 25, 80, 149):
        changed = tokens.copy()
        changed[position:] = random_tokens(150 - position, seed=position)
        changed[position] = (tokens[position] + 1) % CONFIG.vocab_size
        after = scores_of(model, CONFIG, changed, stride)
        scored_before = position - 1  # target i is token i+1
        np.testing.assert_array_equal(after.logp[:scored_before], before.logp[:scored_before])
        np.testing.assert_array_equal(after.entropy[:position], before.entropy[:position])
        assert after.logp[scored_before] != before.logp[scored_before]
        if position < 149:
            assert not np.array_equal(after.entropy[position:], before.entropy[position:])


def test_scoring_leaves_the_model_as_it_was():
    model, tokens = lively_model(), random_tokens(100)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = scores_of(model, CONFIG, tokens, 5), scores_of(model, CONFIG, tokens, 5)
    np.testing.assert_array_equal(first.logp, second.logp)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.logits(torch.ones(1, 4, dtype=torch.int64)).square().sum().backward()  # still trains


# ---- bits per byte -----------------------------------------------------------------------------------------------


def test_bits_per_byte_by_hand():
    """Half a bit, one bit and two bits over seven bytes."""
    logp = np.log(np.array([2**-0.5, 0.5, 0.25], dtype=np.float32))
    score = score_of(logp, stream_of(np.zeros(4), np.array([0, 3, 4], dtype=np.int16)))
    assert score.val_bpb == pytest.approx(3.5 / 7, rel=1e-6)
    assert score.val_loss == pytest.approx(3.5 * math.log(2) / 3, rel=1e-6)
    assert (score.tokens, score.bytes) == (3, 7)
    assert score.headline() == dict(val_loss=score.val_loss, val_bpb=score.val_bpb)


def test_a_score_that_is_no_number_is_not_valid():
    stream = stream_of(np.zeros(3), np.array([0, 3, 4], dtype=np.int16))
    for worst in (np.nan, -np.inf):
        score = score_of(np.array([-1.0, worst]), stream)
        assert not score.valid
        assert "INVALID" in score.note


def test_sums_are_exact_where_fp32_and_int16_would_not_be():
    count = 3_000_000
    logp = np.full(count, -1.1, dtype=np.float32)
    score = score_of(logp, stream_of(np.zeros(count + 1), np.full(count, 3, dtype=np.int16)))
    assert score.bytes == 3 * count
    assert score.val_loss == pytest.approx(float(np.float32(1.1)), rel=1e-12)
    assert score.val_bpb == pytest.approx(float(np.float32(1.1)) / math.log(2) / 3, rel=1e-12)


def test_a_model_that_knows_nothing_needs_log_v_nats_per_token():
    model = GPT(CONFIG)
    with torch.no_grad():
        model.tok_emb.weight.zero_()
    tokens = random_tokens(100)
    score = score_of(scores_of(model, CONFIG, tokens, 5).logp, stream_of(tokens))
    assert score.val_loss == pytest.approx(math.log(CONFIG.vocab_size), rel=1e-6)
    assert score.val_bpb == pytest.approx(math.log2(CONFIG.vocab_size), rel=1e-6)


# ---- golden ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> SimpleNamespace:
    """The reference model (without its MTP heads), its stream and its results."""
    arrays, result = golden_arrays("sliding"), golden_json("sliding")
    model = golden_model(
        mtp_num_heads=0, eval_seq_len=result["seq"], eval_stride=result["stride"], eval_batch_seqs=32
    )
    tokens = arrays["tokens"]
    spaces = arrays["has_leading_space"][tokens[1:]] & ~arrays["is_boundary"][tokens[:-1]]
    sizes = (arrays["base_bytes"][tokens[1:]] + spaces).astype(np.int16)
    return SimpleNamespace(config=model.config, model=model, stream=stream_of(tokens, sizes), result=result)


def score_windows(golden: SimpleNamespace, windows: Windows) -> np.ndarray:
    scorer = WindowScorer(golden.model, golden.config, Runtime(golden.config, {}), golden.stream.tokens)
    return scorer.score_all(windows, 0, len(windows.starts)).astype(np.float64)


def test_golden_sliding_with_the_references_last_window(golden):
    """Windows start at every multiple of the stride in the reference, so its last one (start 2912) has only 88
    tokens, of which the last 8 are new. Placed like that, the mean agrees to 2e-6 nats, fp32 sums of 96 terms."""
    ours = plan_windows(3000, 96, 16)
    logp = score_windows(golden, Windows(96, ours.starts[:-1], ours.tails[:-1]))
    assert len(logp) == 2992
    logp = np.concatenate([logp, score_windows(golden, Windows(88, np.array([2912]), np.array([8])))])
    once = golden.result["each_target_once"]
    assert len(logp) == once["token_count"]
    assert int(golden.stream.bytes.sum()) == once["byte_count"]
    assert -logp.mean() == pytest.approx(once["val_loss"], abs=2e-6)
    assert -logp.sum() / math.log(2) / once["byte_count"] == pytest.approx(once["val_bpb"], abs=1e-6)


def test_golden_sliding_through_score_stream(golden):
    """Ours moves the last window left to its full 96 tokens: 8 of 3,000 targets see 8 tokens more of context, and
    the mean moves by less than 1e-3 nats; the other 2,992 are the reference's."""
    scores = score_stream(golden.model, golden.config, Runtime(golden.config, {}), golden.stream, 16)
    score = score_of(scores.logp, golden.stream)
    once = golden.result["each_target_once"]
    assert (score.tokens, score.bytes) == (once["token_count"], once["byte_count"])
    assert score.val_loss == pytest.approx(once["val_loss"], abs=1e-3)
    ours = plan_windows(3000, 96, 16)
    references = score_windows(golden, Windows(96, ours.starts[:-1], ours.tails[:-1]))
    np.testing.assert_allclose(scores.logp[:2992], references, atol=1e-5)


def test_golden_without_overlap(golden):
    """31 whole windows of 96, as the reference's plain evaluation takes them."""
    windows = Windows(96, np.arange(31) * 96, np.full(31, 96))
    logp = score_windows(golden, windows)
    expected = golden.result["eval_val_nonoverlapping_31x96"]
    assert -logp.mean() == pytest.approx(expected["val_loss"], abs=2e-6)
    total_bytes = int(golden.stream.bytes[: 31 * 96].sum(dtype=np.int64))
    assert -logp.sum() / math.log(2) / total_bytes == pytest.approx(expected["val_bpb"], abs=1e-6)


def test_golden_result_with_its_tail_counted_again(golden):
    """The published figure scores 3,080 of 3,000 targets; adding its extra windows gives exactly that figure."""
    ours = plan_windows(3000, 96, 16)
    logp = [score_windows(golden, Windows(96, ours.starts[:-1], ours.tails[:-1]))]
    counted = list(range(2992))
    for start in range(2912, 3000, 16):
        length = 3000 - start
        tail = min(16, length)
        logp.append(score_windows(golden, Windows(length, np.array([start]), np.array([tail]))))
        counted.extend(range(3000 - tail, 3000))
    nll, reference = -np.concatenate(logp), golden.result["reference"]
    assert len(nll) == reference["token_count"]
    assert int(golden.stream.bytes[counted].sum()) == reference["byte_count"]
    assert nll.mean() == pytest.approx(reference["val_loss"], abs=2e-6)
    assert nll.sum() / math.log(2) / reference["byte_count"] == pytest.approx(reference["val_bpb"], abs=1e-6)
