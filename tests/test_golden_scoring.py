"""Window scores and byte counts against the reference numbers of the earlier submissions."""

import math

import golden_backoff
import numpy as np
import pytest
import torch
from golden_support import golden_arrays, golden_config, golden_json, golden_model, make_runtime, shared_file

import train_gpt


def golden_validation(stream: np.ndarray | None = None) -> train_gpt.ValidationSet:
    """The reference stream, or another, with its byte counts, without files."""
    arrays = golden_arrays("sliding")
    stream = arrays["tokens"] if stream is None else stream
    tokens = stream.astype(np.int64)
    spaces = arrays["has_leading_space"][tokens[1:]] & ~arrays["is_boundary"][tokens[:-1]]
    validation = object.__new__(train_gpt.ValidationSet)
    validation.tokens, validation.partial = stream, False
    validation.bytes = arrays["base_bytes"][tokens[1:]] + spaces.astype(np.int16)
    return validation


@pytest.fixture(scope="module")
def model():
    return golden_model(mtp_num_heads=0)


def score(model, validation, stride, **overrides):
    config = golden_config(mtp_num_heads=0, eval_seq_len=96, eval_stride=16, **overrides)
    return train_gpt.score_stream(model, config, make_runtime(config), validation, stride)


def test_stream_scores_equal_one_window_at_a_time(model):
    """Each target's score is the model's own, given the window that the plan says."""
    validation = golden_validation()
    scores = score(model, validation, 16)
    windows = train_gpt.plan_windows(validation.num_targets, 96, 16)
    tokens = torch.from_numpy(validation.tokens.astype(np.int64))
    ends = np.cumsum(windows.tails)
    for i in (0, 1, 100, len(ends) - 1):
        window = tokens[windows.starts[i] : windows.starts[i] + 97][None]
        scored = slice(ends[i] - windows.tails[i], ends[i])
        with torch.no_grad():
            logp = torch.log_softmax(model.logits(window[:, :-1]), -1)[0, -windows.tails[i] :]
        expected = logp.gather(-1, window[0, -windows.tails[i] :, None])[:, 0].numpy()
        np.testing.assert_allclose(scores.logp[scored], expected, rtol=0, atol=1e-5)
    assert ends[-1] == 3000
    assert np.all((scores.entropy > 0) & (scores.entropy <= math.log(1024) + 1e-5))


@pytest.mark.parametrize("buckets", [0, 4096, 4194304])
def test_the_published_evaluation_as_a_whole(model, buckets: int):
    """Windows and hashed mixer of PR 1094, whose loop scores 80 targets of the tail again and counts them twice."""
    tokens = golden_backoff.text(9001, 77)
    validation = golden_validation(tokens.astype(np.uint16))
    scores = score(model, validation, 16)
    logp = scores.logp.astype(np.float64)
    if buckets:
        config = train_gpt.Config(ngram_counts="hashed", ngram_buckets=buckets, ngram_block=32 * 16)
        mixer, ids = train_gpt.PublishedBackoffMixer(config), torch.from_numpy(tokens)
        logp = train_gpt.mix_scores(mixer, ids, scores.logp, scores.entropy, block=32 * 16)
        # It left the neural model alone until the tables held 5,000 tokens.
        ready = next(train_gpt.iter_hashed_counts(ids, 1, buckets, 32 * 16)).context_count[1:] >= 5000
        logp = np.where(ready, logp, scores.logp)
    recorded = golden_json("sliding_1094")["sliding_1094/" + (f"buckets{buckets}" if buckets else "no_mixer")]
    tolerance = 4e-3 if buckets else 5e-4
    assert -logp.mean() == pytest.approx(recorded["val_loss"], rel=tolerance)
    bpb = -logp.sum() / math.log(2) / validation.bytes.sum()
    assert bpb == pytest.approx(recorded["val_bpb"], rel=tolerance)


def fineweb_tokenizer() -> train_gpt.Tokenizer:
    path = shared_file("data", "fineweb_1024_bpe.model")
    if not path.is_file():
        pytest.skip(f"the FineWeb tokenizer model is not at {path}; set SHARED_DIR to the folder that holds data/")
    return train_gpt.Tokenizer(str(path), 1024)


def test_byte_table_of_the_fineweb_tokenizer():
    tokenizer, arrays = fineweb_tokenizer(), golden_arrays("sliding")
    for name in ("base_bytes", "has_leading_space", "is_boundary"):
        np.testing.assert_array_equal(getattr(tokenizer, name), arrays[name], err_msg=name)


def test_target_bytes_of_the_reference_stream():
    tokenizer, validation = fineweb_tokenizer(), golden_validation()
    ours = tokenizer.target_bytes(validation.tokens[:-1], validation.tokens[1:])
    np.testing.assert_array_equal(ours, validation.bytes)
    assert int(ours.sum()) == golden_json("sliding")["each_target_once"]["byte_count"]
