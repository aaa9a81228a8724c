"""A stretch of text comes back from the bits that its score says it takes, and only where the score is honest."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import Run

import train_gpt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import audit
import audit_decode

MIXERS: dict[str, dict[str, Any]] = {
    "none": {"mixer": "none"},
    "backoff": {"mixer": "backoff"},
    "published": {"mixer": "backoff-published", "ngram_counts": "exact"},
    "hedge": {"mixer": "hedge"},
}
HASHED: dict[str, Any] = {"mixer": "backoff-published", "ngram_counts": "hashed"}
SLIDING: dict[str, Any] = {"ttt_enabled": False}


@pytest.fixture(scope="module")
def source(rehearsal: audit.Rehearsal) -> audit_decode.Source:
    return audit.own_source(rehearsal, rehearsal.validation())


@pytest.fixture(scope="module")
def long_source(config: train_gpt.Config, source: audit_decode.Source) -> audit_decode.Source:
    """Enough targets for Hedge to have learned from one of its blocks."""
    tokens = audit.make_stream(audit.zipf_material(config.vocab_size, 12_400, 4), 12_400)
    return source._replace(tokens=tokens)


def assert_decodes(model: train_gpt.GPT, source: audit_decode.Source, known: audit_decode.Known) -> None:
    """The very tokens come back, and the bits are as many as the run's own functions say, target by target."""
    scored = -audit_decode.own_scores(model, known, source.tokens)[known.start : known.stop].astype(np.float64)
    words, nats = audit_decode.encode(model, known, source.tokens)
    assert np.abs(nats - scored).max() < 1e-5
    bits = scored.sum() / np.log(2)
    assert abs(32 * len(words) - bits) <= 0.001 * bits + 32
    expected = source.tokens[known.start + 1 : known.stop + 1]
    assert audit_decode.decode(model, known, words).tolist() == expected.tolist()


# ---- what decodes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0.0, 0.49, 1.0], ids=["start", "middle", "end"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_sliding_window_decodes_with_every_mixer(
    model: train_gpt.GPT, config: train_gpt.Config, source: audit_decode.Source, mixer: str, place: float
) -> None:
    """Batches of windows, blocks of a mixer and the window that the end cuts short lie in these stretches."""
    config = dataclasses.replace(config, **SLIDING, **MIXERS[mixer])
    assert_decodes(model, source, source.stretch(config, place, 40, mix_block=16))


@pytest.mark.parametrize("place", [0.0, 0.49, 1.0], ids=["start", "middle", "end"])
def test_ttt_decodes_across_chunks(
    model: train_gpt.GPT, config: train_gpt.Config, source: audit_decode.Source, place: float
) -> None:
    """Training on a chunk begins once all its tokens have been decoded; each stretch crosses a border of two."""
    known = source.stretch(config, place, 60, mix_block=16)
    borders = range(0, known.num_targets, config.ttt_chunk_tokens)
    assert any(known.start < border < known.stop for border in borders)
    assert_decodes(model, source, known)


def test_ttt_that_weighs_by_bytes_decodes(
    model: train_gpt.GPT, config: train_gpt.Config, source: audit_decode.Source
) -> None:
    """The bytes of a target are known when the target is, with Polyak averages and a temperature besides."""
    options = dict(ttt_byte_weighted=True, polyak_decay=0.9, ttt_temperature=0.98, ttt_optimizer="adamw", ttt_lr=1e-3)
    assert_decodes(model, source, source.stretch(dataclasses.replace(config, **options), 0.3, 120))


def test_bf16_decodes(model: train_gpt.GPT, config: train_gpt.Config, source: audit_decode.Source) -> None:
    """Its rounding depends on the shape of a batch, so here the stretch is asked about in the run's own batches."""
    coarse = copy.deepcopy(model)
    coarse.compute_dtype = torch.bfloat16
    assert_decodes(coarse, source, source.stretch(config, 0.49, 40, mix_block=16))


def test_hedge_decodes_where_it_has_learned(
    model: train_gpt.GPT, config: train_gpt.Config, long_source: audit_decode.Source
) -> None:
    """It leaves 10,000 targets to the neural model; its first update falls into this stretch, at target 12,288."""
    options = dict(eval_stride=24, eval_batch_seqs=64, mixer="hedge", ngram_block=2048)
    config = dataclasses.replace(config, **SLIDING, **options)
    known = long_source.stretch(config, 12_270 / 12_399, 40)
    assert known.start < 12_288 < known.stop
    assert_decodes(model, long_source, known)


def test_users_own_run_decodes(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a bare process, on the artifact and the real split, under settings of the environment."""
    own = {"DEVICE": "cpu", "MIXER": "backoff", "EVAL_SEQ_LEN": "32", "EVAL_STRIDE": "8", "TTT_CHUNK_TOKENS": "256"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    data, tokenizer = tiny_run.environ["DATA_PATH"], tiny_run.environ["TOKENIZER_PATH"]
    out = tmp_path / "audit.json"
    given = ["--artifact", str(tiny_run.artifact), "--data", data, "--tokenizer", tokenizer, "--json", str(out)]
    assert audit.main([*given, "--decode", "--decode-at", "0.6", "--decode-tokens", "120"]) == 0
    said = capsys.readouterr().out
    assert "targets 660 to 779 of 1,100 (ttt+backoff) came back" in said
    (finding,) = json.loads(out.read_text())["findings"]
    assert finding["condition"] == audit.DECODES
    assert finding["ok"]


# ---- what does not -----------------------------------------------------------------------------------------------


def test_another_prefix_gives_another_text(
    model: train_gpt.GPT, config: train_gpt.Config, source: audit_decode.Source
) -> None:
    """The decoder depends on the tokens before the stretch: one changed, and the text does not come back."""
    known = source.stretch(config, 0.5, 60)
    words, _ = audit_decode.encode(model, known, source.tokens)
    prefix = known.prefix.copy()
    prefix[-1] = 4 + (prefix[-1] - 3) % (config.vocab_size - 4)
    assert prefix[-1] != known.prefix[-1]
    try:
        decoded = audit_decode.decode(model, dataclasses.replace(known, prefix=prefix), words)
    except audit_decode.DecodingError:
        return
    assert decoded.tolist() != source.tokens[known.start + 1 : known.stop + 1].tolist()


def test_hashed_counts_are_refused(
    config: train_gpt.Config, source: audit_decode.Source, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    known = source.stretch(dataclasses.replace(config, **SLIDING, **HASHED), 0.7, 20)
    ok, figure, _ = audit_decode.check_decoding(config.artifact_path, source, known)
    assert not ok
    assert "no distribution" in figure
    for name, value in {"MIXER": "backoff-published", "NGRAM_COUNTS": "hashed", "DEVICE": "cpu"}.items():
        monkeypatch.setenv(name, value)
    assert audit.main(["--decode"]) == 1
    assert "no distribution" in capsys.readouterr().out


def test_entropy_taken_for_a_loss_is_refused(
    model: train_gpt.GPT, config: train_gpt.Config, long_source: audit_decode.Source
) -> None:
    options = dict(eval_stride=24, eval_batch_seqs=64, mixer="hedge", entropy_expert=True)
    known = long_source.stretch(dataclasses.replace(config, **SLIDING, **options), 0.95, 20)
    with pytest.raises(audit_decode.DecodingError, match="no distribution"):
        audit_decode.encode(model, known, long_source.tokens)


@pytest.mark.parametrize("everywhere", [True, False])
def test_mixer_that_counts_its_own_target_is_flagged(
    config: train_gpt.Config, source: audit_decode.Source, monkeypatch: pytest.MonkeyPatch, everywhere: bool
) -> None:
    """In the stream alone, or also where every token is asked about."""
    honest = train_gpt.BackoffNgramMixer.counts

    def counts(self: Any, tokens: torch.Tensor, probe: train_gpt.MassProbe | None = None) -> Any:
        extra = int(everywhere or probe is None)
        for seen, followed, distinct in honest(self, tokens, probe):
            yield train_gpt.NgramCounts(seen + extra, followed + extra, np.maximum(distinct, extra))

    monkeypatch.setattr(train_gpt.BackoffNgramMixer, "counts", counts)
    known = source.stretch(dataclasses.replace(config, **SLIDING), 0.5, 20, mix_block=16)
    ok, figure, sentence = audit_decode.check_decoding(config.artifact_path, source, known)
    assert not ok
    assert "the run scored target" in figure or "no distribution" in figure
    assert sentence.startswith("No code length")


def test_odds_from_the_end_of_the_stream_are_flagged(
    config: train_gpt.Config, source: audit_decode.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start nobody can know yet whether the mixer or the neural model will win."""

    def guard(neural: np.ndarray, learned: np.ndarray) -> np.ndarray:
        return np.full_like(learned, (learned - neural).sum())

    monkeypatch.setattr(train_gpt, "guard", guard)
    known = source.stretch(dataclasses.replace(config, **SLIDING), 0.0, 20)
    ok, figure, _ = audit_decode.check_decoding(config.artifact_path, source, known)
    assert not ok
    assert "the run scored target" in figure


def test_ttt_that_looks_ahead_is_flagged(
    model: train_gpt.GPT, config: train_gpt.Config, source: audit_decode.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training on a chunk before it is scored: what the stream scored is not what the decoder can predict."""
    honest = train_gpt.ChunkTrainer.train_on

    def train_on(self: Any, scorer: Any, targets: range, lr: float) -> None:
        honest(self, scorer, range(targets.start, min(targets.stop + 50, source.tokens.size - 1)), lr)

    monkeypatch.setattr(train_gpt.ChunkTrainer, "train_on", train_on)
    known = source.stretch(dataclasses.replace(config, mixer="none", ttt_lr=0.01), 0.5, 60)
    scored = -audit_decode.own_scores(model, known, source.tokens)[known.start : known.stop]
    _, nats = audit_decode.encode(model, known, source.tokens)
    assert np.abs(nats - scored).max() > audit_decode.GAP_TOLERANCE


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("open({shard!r}, 'rb')", "may not do this: open"),
        ("open({elsewhere!r}, 'rb')", "may not do this: open"),  # it is no matter where the text lies
        ("open('/dev/shm/copy', 'rb')", "may not do this: open"),
        ("__import__('socket').create_connection(('127.0.0.1', 9))", "may not do this: socket"),
    ],
)
def test_decoder_reaches_neither_shards_nor_network(
    rehearsal: audit.Rehearsal, model: train_gpt.GPT, source: audit_decode.Source, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, line: str, words: str,
) -> None:  # fmt: skip
    """Code that tries to, in the place of the record, ends the decoder."""
    config = dataclasses.replace(rehearsal.config, **SLIDING)
    known = source.stretch(config, 0.5, 4)
    bits, _ = audit_decode.encode(model, known, source.tokens)
    (shard,) = map(str, rehearsal.folder.glob("*_val_*.bin"))
    elsewhere = str(shutil.copy(shard, tmp_path))
    (tmp_path / "train_gpt.py").write_text(line.format(shard=shard, elsewhere=elsewhere) + "\n")
    monkeypatch.setattr(train_gpt, "code_paths", lambda: [tmp_path / "train_gpt.py"])
    with pytest.raises(audit_decode.DecodingError, match=words):
        audit_decode.decode_in_bare_process(config.artifact_path, known, bits)


def test_text_is_not_cut_within_a_character() -> None:
    pieces = ["a", "<0xC3>", "<0xA9>", "b"]
    model = SimpleNamespace(is_byte=lambda token: token in (1, 2), id_to_piece=lambda token: pieces[token])
    tokenizer: Any = SimpleNamespace(model=model)
    lengths = [len(audit_decode.first_tokens(np.arange(4), count, tokenizer)) for count in range(5)]
    assert lengths == [0, 1, 1, 3, 4]


@pytest.mark.parametrize(
    "words", [["--decode-at", "1.5"], ["--decode-tokens", "0"], ["--artifact", "some.ptz"]], ids=lambda w: w[0]
)
def test_impossible_arguments_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        audit.main(["--decode", *words])
    assert exit_.value.code == 2
