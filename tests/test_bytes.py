"""Bytes per token: for every kind of SentencePiece model they add up to the size of the text, or it is refused."""

from __future__ import annotations

import functools
import io
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import audit
import numpy as np
import prepare
import pytest
import sentencepiece
import tokenizer as data_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shards import DataError, read_tokens
from support import shared_data

import train_gpt

SENTENCE = "the river runs by old stone bridges  while 1984 people sing über naïve cafés: a, b, c; fox and dog 日本 🙂"
TEXT = (SENTENCE,) * 30
FRAGMENTS = (
    "", " ", "  ", "    ", "\u2581", "\u2581\u2581x", "\n", "\r\n", "\t", "\0", "\x07", "\x7f", "\u00a0", "\u3000",
    "\u200b", "\u200d", "\ufeff", "\ufffd", "<s>", "</s>", "<unk>", "<pad>", "<sep>", "<ctrl>", "<0x41>", "a b", "fox",
    " fox", "dog ", "The River", "STRASSE straße", "Ελλάδα", "Москва", "שלום", "العربية", "हिन्दी", "ไทย", "日本語",
    "한국어", "한", "👩‍👩‍👧", "👍🏽", "🇫🇷", "é", "e\u0301", "ﬁ", "½", "…", "¨", " ¨", "𝔘", "\U0010ffff",
    "a        b", "1984",
)  # fmt: skip
SYMBOLS = ["<sep>", "\u2581\u2581\u2581\u2581", "a b", "  ", "fox", "🙂"]


def words(count: int) -> list[str]:
    """Lines of invented words: enough of them for a vocabulary of thousands."""
    source = random.Random(5)
    syllables = [a + b for a, b in itertools.product("bdfgklmnprstvz", "aeiouéü")]
    names = ["".join(source.choices(syllables, k=source.randint(2, 4))) for _ in range(count // 4)]
    return [" ".join(source.choices(names, k=12)) for _ in range(count // 12)]


def train(texts: Iterable[str], **options: Any) -> bytes:
    """A SentencePiece model in the trainer's own default settings, but for those named."""
    out = io.BytesIO()
    chosen: dict[str, Any] = dict(vocab_size=330, hard_vocab_limit=False, num_threads=1, minloglevel=2) | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=out, **chosen)
    return out.getvalue()


def grid() -> dict[str, dict[str, Any]]:
    """Every type with bytes or without, with what it does to a document's start; the rest goes round in turn."""
    rules = itertools.cycle(("identity", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf", "nfkc"))
    suffix = itertools.cycle((False, False, True))
    models: dict[str, dict[str, Any]] = {}
    for kind, bytes_, prefix, removes in itertools.product(("bpe", "unigram", "char"), *[(False, True)] * 3):
        options = dict(
            model_type=kind, byte_fallback=bytes_, add_dummy_prefix=prefix, remove_extra_whitespaces=removes,
            normalization_rule_name=next(rules), treat_whitespace_as_suffix=next(suffix),
        )  # fmt: skip
        models[" ".join(str(value) for value in options.values())] = options
    return models


KEEPS: dict[str, Any] = dict(
    model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
)
COUNTED: dict[str, dict[str, Any]] = grid() | {
    "symbols": KEEPS | dict(user_defined_symbols=SYMBOLS, control_symbols=["<ctrl>"], vocab_size=400),
    "symbols, unigram": dict(model_type="unigram", user_defined_symbols=SYMBOLS, control_symbols=["<ctrl>"]),
    "BOS is user-defined": KEEPS | dict(user_defined_symbols=["<s>"]),
    "contest ids": KEEPS | dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, add_dummy_prefix=False),
    "no EOS": KEEPS | dict(eos_id=-1),
    "runs of blanks": KEEPS | dict(allow_whitespace_only_pieces=True, split_by_whitespace=False),
    "8192 pieces": dict(model_type="bpe", byte_fallback=True, vocab_size=8192),
    "8192 pieces, unigram, suffix": dict(model_type="unigram", vocab_size=8192, treat_whitespace_as_suffix=True),
}  # fmt: skip
T5: dict[str, Any] = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory):
    """Trains a model by its name in COUNTED, once, and opens it as a run does."""

    @functools.cache
    def open_model(name: str) -> train_gpt.Tokenizer:
        options = COUNTED[name]
        texts = words(20_000) if options.get("vocab_size", 0) > 1000 else TEXT
        return open_bytes(train(texts, **options), tmp_path_factory.mktemp("model") / "tokenizer.model")

    return open_model


def open_bytes(model: bytes, path: Path) -> train_gpt.Tokenizer:
    path.write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    return train_gpt.Tokenizer(str(path), pieces)


def count(tokenizer: train_gpt.Tokenizer, tokens: Sequence[int]) -> int:
    stream = np.array(tokens, dtype=np.uint16)
    return int(tokenizer.target_bytes(stream[:-1], stream[1:]).sum())


def decoded_bytes(model: Any, ids: Sequence[int]) -> int:
    """UTF-8 size of a document's text by SentencePiece's own decoder; unknown tokens, whose text is lost, cut it."""
    groups = itertools.groupby(ids, key=lambda token: token in (1, model.unk_id()))
    return sum(len(model.decode(list(group)).encode()) for cut, group in groups if not cut)


TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=6)), max_size=8).map("".join)


@settings(max_examples=600, deadline=None)
@given(name=st.sampled_from(sorted(COUNTED)), documents=st.lists(TEXTS, min_size=1, max_size=3))
def test_bytes_of_whole_documents_are_the_size_of_their_text(load, name: str, documents: list[str]):
    tokenizer = load(name)
    encoded = [tokenizer.model.encode(text) for text in documents]
    tokens = [token for ids in encoded for token in (1, *ids)]
    assert count(tokenizer, tokens) == sum(decoded_bytes(tokenizer.model, ids) for ids in encoded)


@pytest.mark.parametrize("name", COUNTED)
def test_every_fragment_with_every_model(load, name: str):
    tokenizer = load(name)
    for text in [*FRAGMENTS, *(a + b for a, b in itertools.pairwise(FRAGMENTS)), "".join(FRAGMENTS)]:
        ids = tokenizer.model.encode(text)
        assert count(tokenizer, [1, *ids]) == decoded_bytes(tokenizer.model, ids), repr(text)


def test_spaces_inside_a_piece_are_one_byte_each(tmp_path: Path):
    options = KEEPS | dict(user_defined_symbols=["a\u2581\u2581\u2581\u2581\u2581\u2581\u2581\u2581b"])
    tokenizer = open_bytes(train(TEXT, **options), tmp_path / "inner.model")
    assert count(tokenizer, [1, *tokenizer.model.encode("a        b")]) == 10


def test_leading_spaces_count_where_the_model_keeps_them(tmp_path: Path):
    keeps = open_bytes(train(TEXT, **KEEPS, add_dummy_prefix=False), tmp_path / "keeps.model")
    prefixed = open_bytes(train(TEXT, **KEEPS), tmp_path / "prefixed.model")
    for tokenizer in (keeps, prefixed):
        assert count(tokenizer, [1, *tokenizer.model.encode("    b")]) == 5
        assert count(tokenizer, [1, *tokenizer.model.encode("a b c")]) == 5


def test_bos_counts_nothing_whatever_its_type(load):
    tokenizer = load("BOS is user-defined")
    [fox], [dog] = (tokenizer.model.encode(word, add_bos=False)[-1:] for word in ("fox", "dog"))
    tokens = [1, *tokenizer.model.encode("fox"), 1, *tokenizer.model.encode("dog")]
    assert not tokenizer.model.is_control(1)
    assert {fox, dog} <= set(tokens)
    assert count(tokenizer, tokens) == 6


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no piece for the space": (dict(model_type="bpe", byte_fallback=True, add_dummy_prefix=False), "\u2581"),
    "no BOS": (dict(model_type="unigram", **T5), "BOS"),
    "BOS is 2": (dict(model_type="bpe", unk_id=0, eos_id=1, bos_id=2), "BOS"),
    "BOS is 0": (dict(model_type="bpe", bos_id=0, unk_id=1, eos_id=2), "BOS"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_counted_are_refused_in_every_program(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By the record, by data/prepare.py and by the audit's way to open one: with the reason, in one line."""
    options, word = REFUSED[name]
    texts = ["日本語の文章" * 9] * 30 if name == "no piece for the space" else TEXT
    model = train(texts, **options)
    path = tmp_path / "odd.model"
    with pytest.raises(train_gpt.DataError, match=word) as refusal:
        open_bytes(model, path)
    assert str(path) in str(refusal.value)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(SENTENCE)
    argv = [corpus, "--val", corpus, "--out", tmp_path / "out", "--tokenizer", path, "--workers", 1]
    assert prepare.main([str(arg) for arg in argv]) == 2
    error = capsys.readouterr().err
    assert word in error
    assert str(path) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_text_without_spaces_gives_a_tokenizer_that_can_be_counted(tmp_path: Path):
    """Chinese, say: its tokenizer has a piece for the space all the same."""
    trained = data_tokenizer.train_tokenizer(["日本語の文章を書く" * 30] * 10, 300)
    tokenizer = open_bytes(trained.model, tmp_path / "own.model")
    for text in ("日本語", "a b c", "文章 を 書く", ""):
        ids = tokenizer.model.encode(text)
        assert count(tokenizer, [1, *ids]) == len(text.encode()) == trained.count_target_bytes(np.array([1, *ids]))


@settings(max_examples=100, deadline=None)
@given(documents=st.lists(TEXTS, min_size=1, max_size=3))
@example(["    b", "a        b", "\u2581\u2581x"])
def test_the_data_programs_count_as_the_record_does(load, documents: list[str]):
    for name in ("symbols", "BOS is user-defined", "8192 pieces"):
        tokenizer = load(name)
        other = data_tokenizer.Tokenizer(tokenizer.model.serialized_model_proto())
        stream = np.concatenate([other.encode(text) for text in documents] + [other.encode("an end")])
        assert other.count_target_bytes(stream) == count(tokenizer, stream.tolist())
        halves = stream[: len(stream) // 2], stream[len(stream) // 2 :]
        in_two = other.count_target_bytes(halves[0]) + other.count_target_bytes(halves[1], halves[0][-1:])
        assert in_two == count(tokenizer, stream.tolist())


@pytest.mark.parametrize("name", ["fineweb_1024_bpe.model", "english_1024_bpe.model"])
def test_published_tokenizers_are_accepted(name: str):
    """The contest's has no byte pieces: what it does not know counts nothing, and is not taken for bytes."""
    path = shared_data(name)
    if path is None:
        pytest.skip(f"{name} is not part of the repository; set SHARED_DIR to the folder that holds data/")
    tokenizer = train_gpt.Tokenizer(str(path), 1024)
    for text in (SENTENCE, "plain words, and more of them", " two  spaces "):
        ids = tokenizer.model.encode(text)
        assert count(tokenizer, [1, *ids]) == decoded_bytes(tokenizer.model, ids)


def test_other_text_cannot_be_prepared_without_a_bos():
    with pytest.raises(DataError, match="BOS"):
        data_tokenizer.Tokenizer(train(TEXT, model_type="unigram", **T5)).count_target_bytes(np.array([1, 5]))


def test_a_user_defined_bos_can_be_prepared(tmp_path: Path):
    model, corpus = tmp_path / "bos.model", tmp_path / "corpus.jsonl"
    model.write_bytes(train(TEXT, **COUNTED["BOS is user-defined"]))
    corpus.write_text("".join(f'{{"text": "fox number {i}"}}\n' for i in range(60)))
    argv = [corpus, "--out", tmp_path / "out", "--tokenizer", model, "--val-fraction", "0.3", "--workers", "1"]
    assert prepare.main([str(arg) for arg in argv]) == 0
    assert prepare.main(["--check", str(tmp_path / "out")]) == 0
    split = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]
    assert split["target_bytes"] == split["text_bytes"] == sum(len(f"fox number {i}") for i in split_ids(tmp_path))


def split_ids(folder: Path) -> list[int]:
    """The numbers of the documents that fell into the training split."""
    tokens = np.concatenate([read_tokens(path) for path in sorted((folder / "out").glob("*_train_*.bin"))])
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "bos.model"))
    documents = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
    return [int(model.decode(document[1:].tolist()).split()[-1]) for document in documents]


@pytest.mark.parametrize("name", ["no piece for the space", "symbols", "bpe False False True nmt_nfkc False"])
def test_the_audit_sees_miscounted_bytes(load, name: str):
    """Its figure comes from decoding alone: right where the run counts right, another where a space is three bytes."""
    if name in COUNTED:
        tokenizer = load(name)
        model, text = tokenizer.model, "a fox 字  and ~ dog"
    else:
        out = train(["日本語の文章" * 9] * 30, **REFUSED[name][0])
        model, text = sentencepiece.SentencePieceProcessor(model_proto=out), "a b c"
    tokens = np.array([1, *model.encode(text), 1, *model.encode(" more of it")])
    validation = SimpleNamespace(tokens=tokens)
    decode = functools.partial(audit.decode_document, model)
    if name in COUNTED:
        validation.bytes = load(name).target_bytes(tokens[:-1], tokens[1:])
        assert audit.check_bytes(validation, decode)[0]
    else:  # as a rule that knows byte tokens only would count
        validation.bytes = np.array([int(model.is_byte(token)) for token in tokens[1:].tolist()])
        assert not audit.check_bytes(validation, decode)[0]
    validation.bytes[-1] += 1
    assert not audit.check_bytes(validation, decode)[0]
