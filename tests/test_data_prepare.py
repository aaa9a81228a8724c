"""data/prepare.py and what it is made of: shards, documents, tokenizer, splits, refusals."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import build_kg
import documents
import numpy as np
import prepare
import prepared_folder
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import shards
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shards import DataError
from support import assert_refused
from tokenizer import Tokenizer, train_tokenizer

import kg_data

SCRIPT = Path(prepare.__file__)
SENTENCE = "the river of time runs by old stone bridges while 1984 people sing über naïve cafés and 日本 🙂"


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng, words = random.Random(seed), SENTENCE.split()
    return [f"Document {i}.\n" + " ".join(rng.choices(words, k=rng.randint(5, 60))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def read_stream(folder: Path, split: str) -> np.ndarray:
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    return np.concatenate([shards.read_tokens(path) for path in paths])


def decode_documents(folder: Path, split: str) -> list[str]:
    """Documents of a split as text, cut apart at BOS."""
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    stream = read_stream(folder, split)
    starts = np.flatnonzero(stream == tokenizer.bos_id)
    assert starts[0] == 0
    return [tokenizer.decode(part[1:]) for part in np.split(stream, starts[1:])]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(make_texts(200), 340)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(tokenizer.model)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", make_texts(300))


# --- shards -------------------------------------------------------------------------------------------------


def test_shard_header_is_the_published_format(tmp_path: Path) -> None:
    shards.write_shard(tmp_path / "a.bin", [1, 2, 65535])
    raw = (tmp_path / "a.bin").read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert header[:3].tolist() == [20240520, 1, 3]
    assert not header[3:].any()
    assert np.frombuffer(raw[1024:], dtype="<u2").tolist() == [1, 2, 65535]
    assert shards.read_header(tmp_path / "a.bin") == 3
    assert shards.read_tokens(tmp_path / "a.bin").tolist() == [1, 2, 65535]
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_empty_shard_reads_as_no_tokens(tmp_path: Path) -> None:
    shards.write_shard(tmp_path / "a.bin", [])
    assert shards.read_tokens(tmp_path / "a.bin").size == 0


@pytest.mark.parametrize("tokens", [[-1], [65536], np.array([70000])])
def test_token_ids_that_do_not_fit_are_not_wrapped_around(tmp_path: Path, tokens: object) -> None:
    with pytest.raises(ValueError, match="uint16"):
        shards.write_shard(tmp_path / "a.bin", tokens)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw + b"\0\0", "truncated or damaged"),
        (lambda raw: raw[:100], "too few"),
        (lambda raw: b"\1\2\3\4" + raw[4:], "not a token shard"),
        (lambda raw: raw[:4] + b"\7\0\0\0" + raw[8:], "version 7"),
        (lambda raw: raw[:8] + b"\xff\xff\xff\xff" + raw[12:], "-1 tokens"),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, damage, word: str) -> None:
    path = tmp_path / "a.bin"
    shards.write_shard(path, range(10))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=word) as caught:
        shards.read_header(path)
    assert str(path) in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(pieces=st.lists(st.lists(st.integers(0, 65535), max_size=20)), shard_tokens=st.integers(1, 9))
def test_shard_writer_keeps_the_stream(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[list[int]], shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    with shards.ShardWriter(folder, "x_train", shard_tokens) as writer:
        for piece in pieces:
            writer.append(piece)
    stream = [token for piece in pieces for token in piece]
    read = [shards.read_tokens(folder / shard.file).tolist() for shard in writer.shards]
    assert [token for part in read for token in part] == stream
    assert all(len(part) == shard_tokens for part in read[:-1])
    assert [shard.tokens for shard in writer.shards] == [len(part) for part in read]
    assert sorted(path.name for path in folder.iterdir()) == [shard.file for shard in writer.shards]


def test_shard_writer_leaves_no_unfinished_file(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with shards.ShardWriter(tmp_path, "x_train", 4) as writer:
            writer.append(range(6))
            writer.append([-1])

    with pytest.raises(ValueError, match="uint16"):
        write_and_fail()
    assert [path.name for path in tmp_path.iterdir()] == ["x_train_000000.bin"]


# --- tokenizer and byte accounting --------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=80))
@example("\u2581\u2581x \u2581")
@example("\0\t<s>\ufffd </s> \u3000\u200b")
def test_round_trip_and_bytes_of_any_document(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    decoded = tokenizer.decode(tokens[1:])
    assert tokens[0] == tokenizer.bos_id
    assert tokenizer.bos_id not in tokens[1:]
    assert decoded == tokenizer.normalize(text)
    assert tokenizer.count_target_bytes(tokens) == len(decoded.encode("utf-8"))


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=6))
def test_bytes_of_a_stream_are_those_of_its_documents(tokenizer: Tokenizer, texts: list[str]) -> None:
    stream = np.concatenate([tokenizer.encode(text) for text in texts])
    sizes = [len(tokenizer.normalize(text).encode("utf-8")) for text in texts]
    assert tokenizer.count_target_bytes(stream) == sum(sizes)


def test_ascii_is_normalised_in_whitespace_only(tokenizer: Tokenizer) -> None:
    text = "  Two\n\nlines,\tsome #[code] = {1};  and 2 blanks \n"
    assert tokenizer.normalize(text) == " ".join(text.split())


def test_trained_tokenizer_has_the_contest_settings(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces[:4] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert sum(tokenizer.processor.is_byte(i) for i in range(tokenizer.vocab_size)) == 256
    assert not any(any(c.isdigit() for c in piece) for piece in tokenizer.pieces[260:] if len(piece) > 2)
    assert tokenizer.count_unknown(tokenizer.encode("字 ∞ \x7f")) == 0


def test_tokenizer_with_dummy_prefix_counts_the_same_bytes() -> None:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(50)), model_writer=out, model_type="bpe", vocab_size=340,
        byte_fallback=True, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    prefixed = Tokenizer(out.getvalue())
    tokens = prefixed.encode("the river runs")
    assert prefixed.normalize("the river runs") == "the river runs"
    assert prefixed.count_target_bytes(tokens) == len("the river runs")


def test_sample_is_bounded_and_independent_of_order() -> None:
    texts = [text * 30 for text in make_texts(40)]
    pairs = [(text, prepare.document_digest(text)) for text in texts]
    sample = prepare.sample_texts(pairs, 20_000)
    assert 10_000 < sum(len(text.encode()) for text in sample) <= 20_000
    assert prepare.sample_texts(reversed(pairs), 20_000) == sample
    assert set(sample) < set(texts)


# --- the whole program --------------------------------------------------------------------------------------


def test_documents_survive_in_order_and_counts_agree(tmp_path: Path, model: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    argv = [
        str(corpus),
        "--out",
        str(out),
        "--tokenizer",
        str(model),
        "--workers",
        "1",
        "--shard-tokens",
        "997",
    ]
    assert prepare.main([*argv, "--val-fraction", "0.2"]) == 0
    tokenizer = Tokenizer.load(model)
    texts = make_texts(300)
    found = {split: decode_documents(out, split) for split in ("train", "val")}
    expected = [tokenizer.normalize(text) for text in texts]
    assert sorted(found["train"] + found["val"]) == sorted(expected)
    assert not set(found["train"]) & set(found["val"])
    assert found["train"] == [text for text in expected if text in set(found["train"])]
    assert 30 <= len(found["val"]) <= 90
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tokenizer_hash"] == tokenizer.hash
    assert manifest["vocab_size"] == tokenizer.vocab_size
    for split in ("train", "val"):
        counts = manifest["splits"][split]
        size_bytes = sum(len(text.encode("utf-8")) for text in found[split])
        assert counts["documents"] == len(found[split])
        assert counts["tokens"] == read_stream(out, split).size
        assert counts["text_bytes"] == counts["target_bytes"] == size_bytes
        assert all(shard["tokens"] == 997 for shard in counts["shards"][:-1])
    assert len(manifest["splits"]["train"]["shards"]) > 2
    assert prepared_folder.check(out) == manifest


def test_number_of_workers_does_not_matter(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        prepare, "BATCH_CHARS", 3000
    )  # enough batches for the processes to overtake each other
    for workers in (1, 3):
        out = tmp_path / f"workers{workers}"
        argv = [str(corpus), "--out", str(out), "--train-tokenizer", "340", "--workers", str(workers)]
        assert prepare.main(argv) == 0
    assert folder_bytes(tmp_path / "workers1") == folder_bytes(tmp_path / "workers3")


def test_all_kinds_of_input_give_the_same_documents(tmp_path: Path, model: Path) -> None:
    texts = make_texts(6)
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "a.txt").write_text(texts[0], encoding="utf-8")
    (folder / "b" / "c.md").write_text("\ufeff" + texts[1], encoding="utf-8")
    write_jsonl(folder / "c.jsonl", [texts[2], "  \n "])
    lines = (
        json.dumps({"text": texts[3], "id": 1}).encode() + b"\n\n" + json.dumps({"text": texts[4]}).encode()
    )
    frames = zstandard.compress(lines[:30]) + zstandard.compress(lines[30:])
    (folder / "d.jsonl.zst").write_bytes(frames)
    pyarrow.parquet.write_table(pyarrow.table({"text": [texts[5]], "n": [1]}), folder / "e.parquet")
    (folder / "ignored.csv").write_text("x")
    (folder / ".hidden" / "f.txt").write_text("hidden")
    val = tmp_path / "val.txt"
    val.write_text("Validation text.")
    out = tmp_path / "out"
    argv = [folder, folder / "a.txt", "--val", val, "--out", out, "--tokenizer", model, "--workers", 1]
    assert prepare.main([str(arg) for arg in argv]) == 0
    tokenizer = Tokenizer.load(model)
    assert decode_documents(out, "train") == [tokenizer.normalize(text) for text in texts]
    assert decode_documents(out, "val") == ["Validation text."]
    assert prepared_folder.read_manifest(out)["dropped"]["empty_documents"] == 1


def found_texts(folder: Path) -> list[str]:
    """All documents of a folder, in the order in which they are read."""
    files, _ = documents.find_files([folder])
    return [text for path in files for text in documents.read_documents(path)]


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_with_a_long_window_is_read(tmp_path: Path, window_log: int) -> None:
    """As `zstd --long=31` writes it: here a frame of an ordinary window that claims to need a longer one."""
    parameters = zstandard.ZstdCompressionParameters(window_log=20, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = bytearray(packer.compress(b'{"text": "far away"}\n') + packer.flush())
    assert frame[5] == (20 - 10) << 3
    frame[5] = (window_log - 10) << 3
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    assert found_texts(tmp_path) == ["far away"]


def test_packed_files_and_upper_case_names_are_read(tmp_path: Path) -> None:
    row = b'{"text": "row"}\n'
    (tmp_path / "A.TXT").write_bytes(b"plain")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"pl") + gzip.compress(b"ain, packed") + b"\0" * 99)
    (tmp_path / "c.md.zst").write_bytes(zstandard.compress(b"marked"))
    (tmp_path / "d.Jsonl.GZ").write_bytes(gzip.compress(row + row))
    (tmp_path / "e.JSONL").write_bytes(row)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["cell"]}), tmp_path / "f.PARQUET")
    assert found_texts(tmp_path) == ["plain", "plain, packed", "marked", "row", "row", "row", "cell"]


def test_linked_folders_are_searched_once(tmp_path: Path) -> None:
    """Also those that lie elsewhere, and without end where a link leads back."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "in"
    elsewhere.mkdir()
    (folder / "deep").mkdir(parents=True)
    (elsewhere / "b.txt").write_text("linked")
    (folder / "deep" / "c.txt").write_text("deep")
    (folder / "a").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "deep" / "up").symlink_to(folder)
    (elsewhere / "self").symlink_to(elsewhere)
    (folder / "file.txt").symlink_to(elsewhere / "b.txt")
    (folder / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert found_texts(folder) == ["linked", "deep"]


def test_what_is_passed_over_is_counted(
    tmp_path: Path, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    (folder / ".git").mkdir(parents=True)
    corpus.rename(folder / corpus.name)
    for name in ("a.csv", "b.CSV", "c.py", "noname", ".hidden.txt", ".git/d.txt"):
        (folder / name).write_text("text")
    argv = [folder, "--out", tmp_path / "out", "--tokenizer", model, "--workers", 1]
    assert prepare.main([str(arg) for arg in argv]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "passed over" in line]
    for count in ("2 .csv", "1 .py", "2 hidden", "1 no suffix"):
        assert count in line


def test_what_an_earlier_run_made_inside_the_input_is_no_input(tmp_path: Path, model: Path, corpus: Path) -> None:
    folder, counts = tmp_path / "in", []
    folder.mkdir()
    corpus.rename(folder / corpus.name)
    for _ in range(2):
        argv = [folder, "--out", folder / "out", "--tokenizer", model, "--workers", 1]
        assert prepare.main([str(arg) for arg in argv]) == 0
        (folder / "out" / "kg_blob.txt").write_text("as most tokenizers have one")
        counts.append(prepared_folder.check(folder / "out")["splits"])
    assert counts[0] == counts[1]


def test_a_dotted_parquet_column_is_that_column(tmp_path: Path) -> None:
    """Not the field of a nested column whose path reads the same."""
    path = tmp_path / "a.parquet"
    nested = [{"en": "wrong"}, {"en": "wrong"}]
    pyarrow.parquet.write_table(pyarrow.table({"text": nested, "text.en": ["right", "right too"]}), path)
    assert list(documents.read_documents(path, "text.en")) == ["right", "right too"]


def test_progress_reaches_the_size_of_every_file(tmp_path: Path) -> None:
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": make_texts(1000)}), parquet)
    for path in (parquet, write_jsonl(tmp_path / "b.jsonl", make_texts(50))):
        seen: list[int] = []
        list(documents.read_documents(path, "text", seen.append))
        assert sum(seen) == pytest.approx(path.stat().st_size, rel=0.01)


def test_copies_of_a_document_fall_on_one_side(tmp_path: Path, model: Path) -> None:
    texts = make_texts(120)
    copies = texts + [f"  {text}\n" for text in texts] + [text.replace(" ", "\n") for text in texts]
    corpus = write_jsonl(tmp_path / "copies.jsonl", copies)
    out = tmp_path / "out"
    argv = [str(corpus), "--out", str(out), "--tokenizer", str(model), "--workers", "1"]
    assert prepare.main([*argv, "--val-fraction", "0.5"]) == 0
    train, val = (decode_documents(out, split) for split in ("train", "val"))
    assert len(train) + len(val) == 360
    assert min(len(train), len(val)) > 60
    assert not set(train) & set(val)


def test_side_of_a_document_depends_on_it_alone() -> None:
    digests = [prepare.document_digest(text) for text in make_texts(4000)]
    small = [prepare.falls_into_val(digest, 0.02) for digest in digests]
    large = [prepare.falls_into_val(digest, 0.1) for digest in digests]
    assert 40 <= sum(small) <= 130
    assert all(in_large for in_small, in_large in zip(small, large, strict=True) if in_small)


def test_training_copies_of_validation_documents_are_dropped(tmp_path: Path, model: Path) -> None:
    texts = make_texts(10)
    train = write_jsonl(tmp_path / "train.jsonl", texts)
    val = write_jsonl(tmp_path / "val.jsonl", [texts[3] + "\n", texts[7]])
    out = tmp_path / "out"
    manifest = prepare.prepare(prepare.Settings([train], out, val=[val], tokenizer=model))
    tokenizer = Tokenizer.load(model)
    assert decode_documents(out, "val") == [tokenizer.normalize(texts[i]) for i in (3, 7)]
    assert decode_documents(out, "train") == [
        tokenizer.normalize(text) for i, text in enumerate(texts) if i not in (3, 7)
    ]
    assert manifest["dropped"]["train_documents_also_in_val"] == 2


def test_tokenizer_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", make_texts(100))
    val = write_jsonl(tmp_path / "val.jsonl", ["zyzzyva quokka " * 500 + str(i) for i in range(50)])
    prepare.prepare(prepare.Settings([train], tmp_path / "out", val=[val], train_pieces=400))
    pieces = Tokenizer.load(tmp_path / "out" / "tokenizer.model").pieces
    assert any("bridge" in piece for piece in pieces)
    assert not any("zyzz" in piece or "quok" in piece for piece in pieces)


def test_a_lossy_tokenizer_is_said_to_be_lossy(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["plain words only"] * 9), model_prefix=str(tmp_path / "lossy"),
        model_type="bpe", vocab_size=40, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    argv = [corpus, "--out", tmp_path / "out", "--tokenizer", tmp_path / "lossy.model", "--workers", 1]
    assert prepare.main([str(arg) for arg in argv]) == 0
    assert "lossy tokenizer" in capsys.readouterr().out
    counts = prepared_folder.check(tmp_path / "out")["splits"]["train"]
    assert counts["unknown_tokens"] > 0
    assert counts["target_bytes"] < counts["text_bytes"]


def test_lone_surrogates_become_replacement_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude42"}\n')
    assert list(documents.read_documents(path)) == ["a\ufffdb 🙂"]


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", '{"text": "x"}'), ("b.txt", "x")):
        (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8")
        assert list(documents.read_documents(tmp_path / name)) == ["x"]


def test_runs_from_any_folder_and_refuses_without_traceback(
    tmp_path: Path, model: Path, corpus: Path
) -> None:
    command = [sys.executable, str(SCRIPT), corpus.name, "--out", "out", "--tokenizer", str(model)]
    good = subprocess.run(
        [*command, "--workers", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (good.returncode, good.stderr) == (0, "")
    bad = subprocess.run(
        [*command, "--name", "other"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: out: holds shards named 'text'")
    assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["prepare.py", "fetch_fineweb.py", "demo_corpus.py"])
def test_isolated_starts_find_the_siblings(tmp_path: Path, script: str) -> None:
    command = [sys.executable, "-I", str(SCRIPT.parent / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("streams", ["2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_a_console_that_takes_nothing_changes_nothing(
    tmp_path: Path, model: Path, corpus: Path, streams: str
) -> None:
    """Closed or full: exit codes and files are the same, and no file takes the place of a closed stream."""
    usual = prepare.Settings([corpus], tmp_path / "usual", tokenizer=model, workers=2)
    prepare.prepare(usual)

    def call(out: str, *more: str) -> int:
        command = [sys.executable, str(SCRIPT), str(corpus), "--out", out, "--tokenizer", str(model), "--workers", "2"]
        line = " ".join(shlex.quote(word) for word in [*command, *more])
        return subprocess.run(["sh", "-c", f"{line} {streams}"], cwd=tmp_path, timeout=60, check=False).returncode

    assert call("out") == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(usual.out)
    assert call("out", "--name", "other") == 2


def play(acts: int) -> str:
    """A text of `acts` paragraphs of verse, indented, with blank lines between them."""
    rng, names = random.Random(3), SENTENCE.split()
    verses = ["\n".join("  " * (i % 3) + " ".join(rng.choices(names, k=7)) for i in range(5)) for _ in range(acts)]
    return "\n\n".join(verses) + "\n"


@pytest.mark.parametrize(("files", "acts"), [(1, 12), (1, 400), (3, 30)])
def test_a_few_plain_files_are_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: int, acts: int
) -> None:
    """One document each: they are cut where paragraphs end, nothing is lost, and one line says so."""
    paths = [tmp_path / f"{i}.txt" for i in range(files)]
    for i, path in enumerate(paths):
        path.write_text(f"File {i}\n\n{play(acts)}", encoding="utf-8")
    argv = [*paths, "--out", tmp_path / "out", "--train-tokenizer", 340, "--keep-whitespace", "--workers", 1]
    assert prepare.main([str(arg) for arg in argv]) == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if "paragraph" in line]) == 1
    train, val = (decode_documents(tmp_path / "out", split) for split in ("train", "val"))
    assert len(val) < len(train)
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    assert sorted("".join(train + val)) == sorted(text)
    assert all(part.endswith("\n\n") or any(path.read_text("utf-8").endswith(part) for path in paths) for part in train)
    assert all(part in text and len(part) >= 250 for part in train + val)


def test_documents_stay_whole_where_both_splits_get_some(tmp_path: Path, model: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [f"{i}. {play(40)}" for i in range(200)])
    prepare.prepare(prepare.Settings([corpus], tmp_path / "out", tokenizer=model))
    assert sum(len(decode_documents(tmp_path / "out", split)) for split in ("train", "val")) == 200


def test_a_text_too_short_to_be_cut_is_named(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("One line.\n\nAnother.\n")
    argv = [path, "--out", tmp_path / "out", "--tokenizer", model, "--workers", 1]
    assert_refused(capsys, prepare.main, argv, str(path), "--val")


CODE = "def f(x):\n\tif x:\n\t\treturn  x   # ﬁne\r\n\n\n        return\0 None \n"


def test_keep_whitespace_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"# {i}\n{CODE}" for i in range(80)]
    corpus = write_jsonl(tmp_path / "code.jsonl", texts)
    argv = [str(corpus), "--out", str(tmp_path / "out"), "--train-tokenizer", "320", "--workers", "1"]
    assert prepare.main([*argv, "--val-fraction", "0.2", "--keep-whitespace"]) == 0
    assert "normalisation" not in capsys.readouterr().out
    train, val = (decode_documents(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    counted = sum(manifest["splits"][split]["target_bytes"] for split in ("train", "val"))
    assert counted == sum(len(text.encode()) for text in texts)
    pieces = Tokenizer.load(tmp_path / "out" / "tokenizer.model").pieces
    assert any(piece.startswith("\u2581" * 4) for piece in pieces)


def test_what_normalisation_changes_is_reported(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"{i} lines\nand blanks ﬁ" for i in range(1000, 1200)]  # a line break, a ligature of three bytes
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    argv = [str(corpus), "--out", str(tmp_path / "out"), "--tokenizer", str(model), "--workers", "1"]
    assert prepare.main([*argv, "--val-fraction", "0.2"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "--keep-whitespace" in line]
    assert "800 bytes" in line
    assert f"{4 / len(texts[0].encode()):.2%}" in line
    argv += ["--overwrite", "--keep-whitespace"]
    assert_refused(capsys, prepare.main, argv, "--keep-whitespace", "--tokenizer")


def test_unreadable_files_are_an_error_or_listed_and_left_out(
    tmp_path: Path, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    corpus.rename(folder / "b.jsonl")
    (folder / "a.txt").write_bytes(b"caf\xe9")
    (folder / "c.jsonl").write_text('{"text": "a good row"}\n{broken\n{"text": "never read"}\n')
    argv = [str(folder), "--out", str(tmp_path / "out"), "--tokenizer", str(model), "--workers", "1"]
    assert_refused(capsys, prepare.main, argv, str(folder / "a.txt"), "--skip-unreadable")
    assert prepare.main([*argv, "--skip-unreadable"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert len(lines) == 2
    assert f"{folder / 'a.txt'}: not UTF-8" in lines[0]
    assert f"after 1 document(s): {folder / 'c.jsonl'}:2:" in lines[1]
    found = [text for split in ("train", "val") for text in decode_documents(tmp_path / "out", split)]
    assert len(found) == 301
    assert prepared_folder.check(tmp_path / "out")["left_out"] == ["a.txt", "c.jsonl"]


# --- output folders -----------------------------------------------------------------------------------------


def test_same_name_and_tokenizer_replace_the_folder_as_a_whole(
    tmp_path: Path, model: Path, corpus: Path
) -> None:
    out = tmp_path / "out"
    prepare.prepare(prepare.Settings([corpus], out, tokenizer=model, shard_tokens=500))
    assert len(list(out.glob("*_train_*.bin"))) > 3
    smaller = write_jsonl(tmp_path / "smaller.jsonl", make_texts(150))
    prepare.prepare(prepare.Settings([smaller], out, tokenizer=model))
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json", "text_train_000000.bin", "text_val_000000.bin", "tokenizer.model",
    ]  # fmt: skip
    prepared_folder.check(out)


def test_a_failed_run_leaves_the_folder_as_it_was(
    tmp_path: Path, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare.prepare(prepare.Settings([corpus], out, tokenizer=model))
    before = folder_bytes(out)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(corpus.read_text() + "{broken\n")
    for target in (out, tmp_path / "new"):
        argv = [bad, "--out", target, "--tokenizer", model, "--workers", 1, "--shard-tokens", 300]
        assert_refused(capsys, prepare.main, argv, f"{bad}:301:", "JSON")
    assert folder_bytes(out) == before
    assert not (tmp_path / "new").exists()


def test_a_folder_half_replaced_is_known_to_be_incomplete(
    tmp_path: Path, model: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> list[Path]:
        raise OSError(errno.EIO, "Input/output error")

    out = tmp_path / "out"
    prepare.prepare(prepare.Settings([corpus], out, tokenizer=model))
    with monkeypatch.context() as patch:
        patch.setattr(prepared_folder, "shard_files", fail)
        with pytest.raises(OSError, match="Input/output"):
            prepare.prepare(prepare.Settings([corpus], out, tokenizer=model, overwrite=True))
    with pytest.raises(DataError, match="not a complete folder"):
        prepared_folder.check(out)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out, _: (out / "manifest.json").unlink(), ["without manifest.json", "--overwrite"]),
        (lambda out, _: (out / "manifest.json").write_text("{"), ["manifest.json", "damaged", "--overwrite"]),
        (
            lambda out, _: (out / "manifest.json").write_text("[]"),
            ["manifest.json", "damaged", "--overwrite"],
        ),
        (
            lambda out, _: shards.write_shard(out / "fineweb_train_000000.bin", [1]),
            ["fineweb_train_000000.bin"],
        ),
        (lambda out, _: (out / "text_val_000000.bin").unlink(), ["text_val_000000.bin", "missing"]),
        (lambda _, argv: argv.extend(["--name", "other"]), ["named 'text'", "'other'", "--overwrite"]),
        (lambda _, argv: argv.extend(["--train-tokenizer", "330"]), ["shards of tokenizer", "--overwrite"]),
    ],
)
def test_mixed_or_damaged_folders_are_refused(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], spoil, words: list[str]
) -> None:
    out = tmp_path / "out"
    argv = [str(corpus), "--out", str(out), "--workers", "1"]
    assert prepare.main([*argv, "--train-tokenizer", "340"]) == 0
    extra: list[str] = []
    spoil(out, extra)
    extra = extra if "--train-tokenizer" in extra else [*extra, "--train-tokenizer", "340"]
    before = folder_bytes(out)
    assert_refused(capsys, prepare.main, [*argv, *extra], str(out), *words)
    assert folder_bytes(out) == before
    assert prepare.main([*argv, *extra, "--overwrite"]) == 0
    prepared_folder.check(out)


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path, model: Path, corpus: Path) -> None:
    staging = tmp_path / "out" / prepared_folder.STAGING
    staging.mkdir(parents=True)
    shards.write_shard(staging / "text_train_000000.bin", [1])
    shards.write_shard(staging / "text_train_000009.bin", [1])
    prepare.prepare(prepare.Settings([corpus], tmp_path / "out", tokenizer=model))
    assert not staging.exists()
    assert len(prepared_folder.shard_files(tmp_path / "out")) == 2


def flip_last_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)


def edit_manifest(out: Path, key: str, value: object) -> None:
    """Of the validation split; None takes the key away."""
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["splits"]["val"][key] = value
    if value is None:
        del manifest["splits"]["val"][key]
    (out / "manifest.json").write_text(json.dumps(manifest))


def swap_tokenizer(out: Path) -> None:
    (out / "tokenizer.model").write_bytes(train_tokenizer(make_texts(30), 320).model)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out: flip_last_byte(out / "text_train_000000.bin"), ["text_train_000000.bin", "content"]),
        (lambda out: (out / "text_val_000000.bin").write_bytes(b"short"), ["text_val_000000.bin", "too few"]),
        (lambda out: (out / "text_val_000000.bin").unlink(), ["text_val_000000.bin", "missing"]),
        (lambda out: shards.write_shard(out / "z_val_000000.bin", [1]), ["z_val_000000.bin"]),
        (lambda out: shards.write_shard(out / "text_train_000000.bin", [1]), ["text_train_000000.bin"]),
        (lambda out: edit_manifest(out, "documents", 1), ["documents", "manifest.json says 1"]),
        (lambda out: edit_manifest(out, "target_bytes", 5), ["target_bytes", "manifest.json says 5"]),
        (lambda out: edit_manifest(out, "tokens", 5), ["tokens", "manifest.json says 5"]),
        (lambda out: edit_manifest(out, "shards", [{"file": "a", "tokens": 1}]), ["manifest.json", "damaged"]),
        (lambda out: edit_manifest(out, "shards", [dict.fromkeys(("file", "sha1"))]), ["manifest.json", "damaged"]),
        (lambda out: edit_manifest(out, "documents", None), ["manifest.json", "not a manifest"]),
        (lambda out: (out / "manifest.json").write_text('{"source": "hub"}'), ["manifest.json", "fetch_fineweb.py"]),
        (swap_tokenizer, ["tokenizer.model", "hash"]),
        (lambda out: (out / "tokenizer.model").write_bytes(b"nothing"), ["tokenizer.model"]),
        (lambda out: (out / "tokenizer.model").unlink(), ["tokenizer.model", "No such file"]),
        (lambda out: (out / "manifest.json").unlink(), ["manifest.json", "not a complete folder"]),
    ],
)
def test_check_finds_every_disagreement(
    tmp_path: Path, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str], spoil, words: list[str]
) -> None:
    out = tmp_path / "out"
    prepare.prepare(prepare.Settings([corpus], out, tokenizer=model))
    assert prepare.main(["--check", str(out)]) == 0
    spoil(out)
    assert_refused(capsys, prepare.main, ["--check", out], *words)


def test_check_refuses_tokens_beyond_the_vocabulary(tmp_path: Path, model: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare.prepare(prepare.Settings([corpus], out, tokenizer=model))
    with shards.ShardWriter(out, "text_val", 10**6) as writer:
        writer.append([1, 60000])
    manifest["splits"]["val"]["shards"] = [vars(shard) for shard in writer.shards]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="token 60000 is beyond"):
        prepared_folder.check(out)


# --- the knowledge-graph blob -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of the graph's own words: their tokenizer spells enough of them for a blob."""
    rng, words = random.Random(5), [word for word, _ in build_kg.read_words(build_kg.KG_WORDS)]
    texts = [" ".join(rng.choices(words, k=100)) for _ in range(200)]
    return write_jsonl(tmp_path_factory.mktemp("words") / "words.jsonl", texts)


@pytest.fixture(scope="module")
def words_model(words_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words_model") / "words.model"
    path.write_bytes(train_tokenizer(list(documents.read_documents(words_corpus)), 1024).model)
    return path


@pytest.mark.parametrize("given", [False, True])
def test_the_blob_is_that_of_the_tool_and_listed(
    tmp_path: Path, words_corpus: Path, words_model: Path, capsys: pytest.CaptureFixture[str], given: bool
) -> None:
    out = tmp_path / "out"
    argv = [str(words_corpus), "--out", str(out), "--workers", "1"]
    assert prepare.main([*argv, "--tokenizer", str(words_model)] if given else argv) == 0
    assert f"KG_PATH={out / 'kg_blob.txt'}" in capsys.readouterr().out
    tool = ["blob", "--tokenizer", str(out / "tokenizer.model"), "--out", str(tmp_path / "tool.txt")]
    assert build_kg.main(tool) == 0
    assert (out / "kg_blob.txt").read_bytes() == (tmp_path / "tool.txt").read_bytes()
    entry = prepared_folder.check(out)["kg_blob"]
    assert entry == {"file": "kg_blob.txt", "sha256": hashlib.sha256((out / "kg_blob.txt").read_bytes()).hexdigest()}


def test_text_too_odd_for_a_blob_costs_nobody_the_shards(
    tmp_path: Path, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare.main([str(corpus), "--out", str(out), "--tokenizer", str(model), "--workers", "1"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "KG_" in line]
    assert "KG_ENABLED=0" in line
    assert prepared_folder.check(out)["kg_blob"] is None
    assert not (out / "kg_blob.txt").exists()


def test_no_blob_is_made_or_left_where_kg_data_is_for_the_tokenizer(
    tmp_path: Path, words_corpus: Path, words_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    out = tmp_path / "out"
    argv = [str(words_corpus), "--out", str(out), "--tokenizer", str(words_model), "--workers", "1"]
    assert prepare.main(argv) == 0
    blob = kg_data.read_blob(str(out / "kg_blob.txt"))
    monkeypatch.setattr(kg_data.decode, "__defaults__", (blob,))
    capsys.readouterr()
    assert prepare.main(argv) == 0
    assert "KG_" not in capsys.readouterr().out
    assert prepared_folder.check(out)["kg_blob"] is None
    assert not (out / "kg_blob.txt").exists()


def test_a_failed_run_keeps_the_blob_and_a_stray_one_is_not_overwritten(
    tmp_path: Path, words_corpus: Path, words_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = [str(words_corpus), "--out", str(out), "--tokenizer", str(words_model), "--workers", "1"]
    assert prepare.main(argv) == 0
    before = folder_bytes(out)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(words_corpus.read_text() + "{broken\n")
    assert prepare.main([str(bad), *argv[1:]]) == 2
    assert folder_bytes(out) == before
    for name in before.keys() - {"kg_blob.txt"}:
        (out / name).unlink()
    capsys.readouterr()
    assert_refused(capsys, prepare.main, argv, str(out), "without manifest.json", "--overwrite")
    assert folder_bytes(out) == {"kg_blob.txt": before["kg_blob.txt"]}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path.unlink, ["No such file"]),
        (lambda path: path.write_text("nothing"), ["not 732 bytes"]),
        (lambda path: path.write_text(kg_data.BLOB), ["another tokenizer"]),
        (lambda path: path.write_bytes(path.read_bytes() + b"\n"), ["content", "manifest.json"]),
    ],
)
def test_check_finds_a_blob_that_is_not_the_listed_one(
    tmp_path: Path, words_corpus: Path, words_model: Path, capsys: pytest.CaptureFixture[str], spoil, words: list[str]
) -> None:
    out = tmp_path / "out"
    prepare.prepare(prepare.Settings([words_corpus], out, tokenizer=words_model))
    spoil(out / "kg_blob.txt")
    assert_refused(capsys, prepare.main, ["--check", out], "kg_blob.txt", *words)


def test_check_takes_a_folder_whose_manifest_knows_of_no_blob(tmp_path: Path, model: Path, corpus: Path) -> None:
    manifest = prepare.prepare(prepare.Settings([corpus], tmp_path / "out", tokenizer=model))
    del manifest["kg_blob"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    prepared_folder.check(tmp_path / "out")


# --- input that cannot be used ------------------------------------------------------------------------------


def bad_input(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


GZ = gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in make_texts(400)).encode())
ZST = zstandard.compress("".join(json.dumps({"text": t}) + "\n" for t in make_texts(400)).encode())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\nnot json\n', [":2:", "JSON"]),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}\n', [":3:", "'body'", "--text-field"]),
        ("a.jsonl", b'{"text": 7}\n', [":1:", "int"]),
        ("a.jsonl", b'["text"]\n', [":1:", "list"]),
        ("a.jsonl", b'{"text": "\xff"}\n', [":1:", "JSON"]),
        ("a.jsonl", b"[" * 100_000 + b"\n", [":1:", "JSON"]),
        ("a.jsonl", b"", ["no document"]),
        ("a.jsonl", b'{"text": " \\n"}\n{"text": "\\u0001"}\n', ["no document"]),
        ("a.txt", b"caf\xe9", ["UTF-8", "offset 3"]),
        ("a.csv", b"x", ["unknown kind"]),
        ("a.jsonl.zst", ZST[: len(ZST) // 2], ["truncated"]),
        ("a.jsonl.zst", ZST[:-1], ["truncated"]),
        ("a.jsonl.zst", b"no zstd at all", ["zstd"]),
        ("a.jsonl.zst", ZST + b"garbage after the frame", ["zstd"]),
        ("a.jsonl.gz", GZ[:-1], ["truncated"]),
        ("a.jsonl.gz", b"no gzip at all", ["gzip"]),
        ("a.jsonl.gz", GZ[:-8] + b"\0\0\0\0" + GZ[-4:], ["gzip"]),
        ("a.parquet", b"PAR1 nothing", ["Parquet"]),
    ],
)
def test_unusable_input_is_named(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    words: list[str],
) -> None:
    path = bad_input(tmp_path, name, content)
    argv = [path, "--out", tmp_path / "out", "--tokenizer", model, "--workers", 1]
    assert_refused(capsys, prepare.main, argv, str(path), *words)
    assert not (tmp_path / "out").exists()


def test_unusable_parquet_is_named(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.parquet"
    common = ["--out", tmp_path / "out", "--tokenizer", model, "--workers", 1]
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    assert_refused(capsys, prepare.main, [path, *common], str(path), "'body'", "--text-field")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    assert_refused(capsys, prepare.main, [path, *common], str(path), "row 2", "NoneType")
    pyarrow.parquet.write_table(pyarrow.table({"text": make_texts(500)}), path)
    path.write_bytes(path.read_bytes()[:-3000])
    assert_refused(capsys, prepare.main, [path, *common], str(path), "Parquet")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--val-fraction", "0"], ["--val-fraction"]),
        (["--val-fraction", "1.5"], ["--val-fraction"]),
        (["--val-fraction", "1e-9"], ["validation", "--val-fraction"]),
        (["--val-fraction", "0.999999999"], ["training"]),
        (["--val-fraction", "0.1", "--val", "x.txt"], ["--val"]),
        (["--val", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["--shard-tokens", "0"], ["--shard-tokens"]),
        (["--workers", "0"], ["--workers"]),
        (["--workers", "many"], ["--workers", "--help"]),
        (["--name", "a/b"], ["--name"]),
        (["--name", "a_val"], ["--name"]),
        (["--text-field", "body"], [":1:", "--text-field"]),
        (["--train-tokenizer", "65536"], ["65535"]),
        (["--train-tokenizer", "100"], ["100 pieces", "Vocabulary size"]),
        (["--tokenizer", "nowhere.model"], ["nowhere.model"]),
        (["--tokenizer", "x.model", "--train-tokenizer", "300"], ["--tokenizer"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
)
def test_unusable_options_are_named(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], extra: list[str], words: list[str]
) -> None:
    assert_refused(capsys, prepare.main, [corpus, "--out", tmp_path / "out", *extra], *words)
    assert not (tmp_path / "out").exists()


def test_missing_input_and_output_are_named(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(capsys, prepare.main, ["--out", tmp_path / "out"], "no input")
    assert_refused(capsys, prepare.main, [corpus], "--out")
    assert_refused(capsys, prepare.main, [tmp_path / "empty", "--out", tmp_path / "out"], "no input in this folder")
    assert_refused(capsys, prepare.main, [tmp_path / "gone", "--out", tmp_path / "out"], "no such file")
    assert_refused(capsys, prepare.main, [corpus, "--out", corpus], "is a file")
    assert_refused(capsys, prepare.main, ["--check", tmp_path / "gone"], "no such folder")


def test_vocabularies_beyond_uint16_are_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenizer.MAX_TOKEN", tokenizer.vocab_size - 1)
    with pytest.raises(DataError, match="pieces; uint16 shards"):
        Tokenizer(tokenizer.model, "big.model")


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path,
    model: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.ShardWriter, "_write", fail)
    argv = [corpus, "--out", tmp_path / "out", "--tokenizer", model, "--workers", 1]
    assert_refused(capsys, prepare.main, argv, "No space left on device", "free some space")
    assert not (tmp_path / "out").exists()


def test_a_dead_worker_is_reported() -> None:
    class Unusable:
        model = b"workers cannot load this"

    batches = [[("train", "text")]]
    with pytest.raises(DataError, match="worker process died"):
        list(prepare.encode_batches(Unusable(), batches, workers=2))  # pyright: ignore[reportArgumentType]
