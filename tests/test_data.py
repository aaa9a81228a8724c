"""Data: shards, batches, byte counts and the validation split, against plain computations of the same thing."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import TINY_VOCAB, VAL_TARGETS, make_documents, shared_data, tiny_environ, train_tokenizer, write_shard

from train_gpt import (
    BatchPlan,
    Config,
    ConfigError,
    DataError,
    Tokenizer,
    TokenLoader,
    TokenStream,
    ValidationSet,
    find_shards,
    read_shard,
    shuffled,
)


def rank_of(world_size: int, rank: int):
    """What a loader asks of the runtime."""
    return SimpleNamespace(world_size=world_size, rank=rank, device=torch.device("cpu"), on_cuda=False)


# ---- shards ------------------------------------------------------------------------------------------------------


def test_a_shard_gives_its_tokens_back(tmp_path):
    tokens = [0, 1, 2, 255, 256, 65_534, 65_535]
    shard = read_shard(write_shard(tmp_path / "x_train_0.bin", tokens))
    assert shard.dtype == np.uint16
    assert shard.tolist() == tokens
    assert read_shard(write_shard(tmp_path / "empty_train_0.bin", [])).tolist() == []


def damaged(folder):
    """Every kind of damage, by name."""
    whole = write_shard(folder / "whole.bin", range(100)).read_bytes()
    write_shard(folder / "wrong_magic.bin", range(100), magic=20240521)
    write_shard(folder / "wrong_version.bin", range(100), version=2)
    write_shard(folder / "promises_more.bin", range(100), count=101)
    write_shard(folder / "promises_less.bin", range(100), count=99)
    write_shard(folder / "promises_negative.bin", range(100), count=-1)
    (folder / "truncated.bin").write_bytes(whole[:-2])
    (folder / "odd_bytes.bin").write_bytes(whole[:-1])
    (folder / "header_only.bin").write_bytes(whole[:1024])
    (folder / "half_a_header.bin").write_bytes(whole[:512])
    (folder / "three_bytes.bin").write_bytes(whole[:3])
    (folder / "one_number.bin").write_bytes(whole[:4])
    (folder / "empty_file.bin").write_bytes(b"")
    (folder / "text.bin").write_bytes(b"it was a dark and stormy night " * 100)
    (folder / "folder.bin").mkdir()
    (folder / "whole.bin").unlink()
    return sorted(folder.iterdir())


def test_every_damage_is_a_data_error_that_names_the_file(tmp_path):
    paths = [*damaged(tmp_path), tmp_path / "missing.bin"]
    assert len(paths) == 15
    for path in paths:
        with pytest.raises(DataError) as caught:
            read_shard(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_find_shards_sorts_and_keeps_the_splits_apart(tmp_path):
    for name in ("a_train_000001.bin", "a_train_000000.bin", "a_val_000000.bin", "a_train_000002.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in find_shards(str(tmp_path), "train")] == ["a_train_000000.bin", "a_train_000001.bin"]
    assert [p.name for p in find_shards(str(tmp_path), "val")] == ["a_val_000000.bin"]
    for folder in (tmp_path / "missing", tmp_path / "a_val_000000.bin"):
        with pytest.raises(DataError, match="no val shards") as caught:
            find_shards(str(folder), "val")
        assert str(folder) in str(caught.value)


# ---- the endless stream ------------------------------------------------------------------------------------------

shard_sizes = st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1)


@settings(max_examples=150, deadline=None)
@given(sizes=shard_sizes, start=st.integers(0, 200), count=st.integers(0, 90))
def test_stream_reads_what_the_repeated_concatenation_holds(tmp_path_factory, sizes, start, count):
    folder = tmp_path_factory.mktemp("stream")
    total = sum(sizes)
    tokens = 1000 + np.arange(total)
    pieces = np.split(tokens, np.cumsum(sizes)[:-1])
    paths = [write_shard(folder / f"x_train_{i}.bin", piece) for i, piece in enumerate(pieces)]
    stream = TokenStream(paths, vocab_size=1000 + total)
    assert len(stream) == total
    expected = np.tile(tokens, (start + count) // total + 1)[start : start + count]
    found = stream.read(start, count)
    assert found.dtype == np.uint16
    assert found.tolist() == expected.tolist()


def test_a_train_split_without_a_token_is_a_data_error(tmp_path):
    path = write_shard(tmp_path / "x_train_0.bin", [])
    with pytest.raises(DataError, match=r"train"):
        TokenStream([path], 10).read(0, 3)


def test_ids_beyond_the_vocabulary_are_found_wherever_they_are(tmp_path):
    good = write_shard(tmp_path / "x_train_0.bin", np.full(50, 9))
    early = write_shard(tmp_path / "x_train_1.bin", [3, 10, 3])
    with pytest.raises(DataError, match=r"x_train_1\.bin holds token id 10, but VOCAB_SIZE=10"):
        TokenStream([good, early], vocab_size=10)
    tokens = np.full(1_000_100, 9, dtype=np.uint16)
    tokens[1_000_050] = 11
    late = write_shard(tmp_path / "x_train_2.bin", tokens)
    stream = TokenStream([good, late], vocab_size=10)
    assert stream.read(1_000_000, 100).tolist() == [9] * 100  # the bad token is at 50 + 1,000,050
    with pytest.raises(DataError, match=r"x_train_2\.bin holds token id 11"):
        stream.read(1_000_090, 100)


def test_a_bad_id_reaches_the_trainer_through_the_reading_thread(tmp_path):
    tokens = np.full(1_000_300, 9, dtype=np.uint16)
    tokens[1_000_150] = 11
    stream = TokenStream([write_shard(tmp_path / "x_train_0.bin", tokens)], vocab_size=10)
    config = Config(train_seq_len=100, train_batch_tokens=100, micro_batch_tokens=100, shuffle=False)
    loader = TokenLoader(stream, config, rank_of(1, 0))  # pyright: ignore[reportArgumentType]
    assert [loader.batch_failed(step) for step in (10_000, 10_001)] == [False, True]  # of a start, too
    loader.batch(10_000)
    with pytest.raises(DataError, match="token id 11"):
        loader.batch(10_001)
    loader.close()


# ---- batches -----------------------------------------------------------------------------------------------------


@given(seqs=st.integers(1, 400), seq_len=st.integers(2, 64), world_size=st.integers(1, 16), micro=st.integers(1, 4000))
def test_batch_plan_is_the_fewest_equal_parts_within_the_limit(seqs, seq_len, world_size, micro):
    config = Config(train_batch_tokens=seqs * seq_len, train_seq_len=seq_len, micro_batch_tokens=micro)
    assume(seqs % world_size == 0)
    plan = BatchPlan.of(config, world_size)
    assert plan.rank_seqs * world_size == seqs
    assert plan.rank_seqs % plan.grad_accum_steps == 0

    def fits(steps: int) -> bool:
        return plan.rank_seqs % steps == 0 and plan.rank_seqs // steps * seq_len <= max(micro, seq_len)

    assert fits(plan.grad_accum_steps)
    assert not any(fits(steps) for steps in range(1, plan.grad_accum_steps))


@given(seqs=st.integers(1, 400), seq_len=st.integers(2, 64), world_size=st.integers(2, 16))
def test_a_batch_that_does_not_divide_names_one_that_does(seqs, seq_len, world_size):
    assume(seqs % world_size)
    config = Config(train_batch_tokens=seqs * seq_len, train_seq_len=seq_len)
    with pytest.raises(ConfigError, match=f"TRAIN_BATCH_TOKENS={seqs * seq_len} ") as caught:
        BatchPlan.of(config, world_size)
    advice = int(str(caught.value).rsplit("use ", 1)[1])
    better = Config(train_batch_tokens=advice, train_seq_len=seq_len).validate()
    assert BatchPlan.of(better, world_size).rank_seqs * world_size * seq_len == advice


def global_batch(stream: TokenStream, config: Config, world_size: int, steps: list[int]) -> torch.Tensor:
    """ids and targets of all ranks in rank order, shape (steps, 2, sequences, seq_len)."""
    found = []
    loaders = [TokenLoader(stream, config, rank_of(world_size, r)) for r in range(world_size)]  # pyright: ignore
    for step in steps:
        micro = [pair for loader in loaders for pair in loader.batch(step)]
        limit = max(config.micro_batch_tokens, config.train_seq_len)
        assert all(ids.numel() <= limit and ids.dtype == torch.int64 for ids, _ in micro)
        found.append(torch.stack([torch.cat([pair[part] for pair in micro]) for part in (0, 1)]))
    for loader in loaders:
        loader.close()
    return torch.stack(found)


@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, 50), seq_len=st.integers(2, 9), groups=st.integers(1, 2), micro=st.integers(1, 100))
def test_every_world_size_sees_the_same_global_batch(tmp_path_factory, first, seq_len, groups, micro):
    folder = tmp_path_factory.mktemp("batches")
    paths = [write_shard(folder / f"x_train_{i}.bin", np.arange(i, 500, 3)) for i in range(3)]
    stream = TokenStream(paths, vocab_size=500)
    batch = dict(train_batch_tokens=12 * groups * seq_len, train_seq_len=seq_len, micro_batch_tokens=micro)
    steps = [first, first + 1, first + 7]  # the second is read ahead, the third is not
    for shuffle in (False, True):
        config = Config(**batch, shuffle=shuffle)
        expected = torch.stack([_plain_batch(stream, step, config) for step in steps])
        for world_size in (1, 2, 3, 4, 6):
            assert torch.equal(global_batch(stream, config, world_size, steps), expected)


def _plain_batch(stream: TokenStream, step: int, config: Config) -> torch.Tensor:
    """A global batch cut out of the concatenated shards."""
    tokens = np.concatenate([np.asarray(shard) for shard in stream.shards]).astype(np.int64)
    seq_len = config.train_seq_len
    sequences = step * (config.train_batch_tokens // seq_len) + np.arange(config.train_batch_tokens // seq_len)
    if config.shuffle:
        sequences = np.array([shuffled(int(i), (len(tokens) - 1) // seq_len, config.seed) for i in sequences])
    positions = sequences[:, None] * seq_len + np.arange(seq_len + 1)
    rows = torch.from_numpy(tokens[positions % len(tokens)])
    return torch.stack([rows[:, :-1], rows[:, 1:]])


@given(count=st.integers(1, 700), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 5))
def test_every_sequence_comes_once_in_every_pass(count, seed, epoch):
    order = [shuffled(epoch * count + i, count, seed) for i in range(count)]
    assert sorted(order) == list(range(count))


def test_orders_of_seeds_and_passes_are_unlike_each_other_and_the_order_of_the_file():
    count = 5000
    orders = np.array([[shuffled(e * count + i, count, s) for i in range(count)] for s in (1, 2) for e in (0, 1)])
    spread = np.sqrt(1 / count)  # of the correlation of independent orders
    correlations = np.asarray(np.corrcoef([*orders, np.arange(count)]))[np.triu_indices(5, 1)]
    assert np.abs(correlations).max() < 4 * spread
    steps = np.diff(orders, axis=1)  # neighbours of a batch are no neighbours of the file
    assert (np.abs(steps) < 10).mean() < 0.01


def test_a_split_shorter_than_a_sequence_still_trains(tmp_path):
    stream = TokenStream([write_shard(tmp_path / "x_train_0.bin", np.arange(5))], vocab_size=5)
    config = Config(train_batch_tokens=16, train_seq_len=8, micro_batch_tokens=16)
    loader = TokenLoader(stream, config, rank_of(1, 0))  # pyright: ignore[reportArgumentType]
    [(ids, targets)] = loader.batch(3)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]] * 2
    assert targets.tolist() == [[1, 2, 3, 4, 0, 1, 2, 3]] * 2
    loader.close()


def test_the_batch_read_ahead_is_the_batch_read_directly(tmp_path):
    stream = TokenStream([write_shard(tmp_path / "x_train_0.bin", np.arange(997))], vocab_size=997)
    config = Config(train_batch_tokens=48, train_seq_len=8, micro_batch_tokens=16)
    ahead = TokenLoader(stream, config, rank_of(2, 1))  # pyright: ignore[reportArgumentType]
    for step in (0, 1, 2, 3, 4, 0, 1, 40, 41):
        fresh = TokenLoader(stream, config, rank_of(2, 1))  # pyright: ignore[reportArgumentType]
        for found, expected in zip(ahead.batch(step), fresh.batch(step), strict=True):
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
        fresh.close()
    ahead.close()


# ---- bytes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=[False, True], ids=["no_dummy_prefix", "dummy_prefix"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    """The tiny tokenizer, with and without the space that SentencePiece may put before a text."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(path, TINY_VOCAB, add_dummy_prefix=request.param)
    return Tokenizer(str(path), TINY_VOCAB)


texts = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40),
    st.text(alphabet=" aeiotn.\n\t▁é東😀", max_size=40),
    st.integers(0, 10_000).map(lambda seed: make_documents(seed, 1)[0]),
)


@settings(max_examples=300, deadline=None)
@given(documents=st.lists(texts, min_size=1, max_size=4))
def test_bytes_of_whole_documents_are_their_utf8_size(tokenizer, documents):
    """Each document begins with BOS, and the stream's first BOS is only ever a previous token."""
    encoded = [tokenizer.model.encode(text) for text in documents]
    tokens = np.array([token for ids in encoded for token in (1, *ids)], dtype=np.uint16)
    counted = tokenizer.target_bytes(tokens[:-1], tokens[1:])
    expected = sum(len(tokenizer.model.decode(ids).encode()) for ids in encoded)
    assert counted.shape == (len(tokens) - 1,)
    assert int(counted.sum()) == expected
    assert all(counted[tokens[1:] == 1] == 0)


def test_byte_rules_one_by_one(tokenizer):
    """Piece without its space, one more for the space unless a control token comes before, bytes 1, control 0."""
    model = tokenizer.model
    space = model.piece_to_id("▁")
    word = next(i for i in range(260, TINY_VOCAB) if len(model.id_to_piece(i)) > 2 and model.id_to_piece(i)[0] == "▁")
    inner = model.piece_to_id("e")
    byte = model.piece_to_id("<0xF0>")
    assert model.is_byte(byte)
    size = len(model.id_to_piece(word)) - 1
    pairs = {(inner, word): size + 1, (byte, word): size + 1, (inner, inner): 1, (1, inner): 1, (1, byte): 1}
    pairs |= {(inner, space): 1, (inner, byte): 1, (inner, 1): 0, (inner, 0): 0, (inner, 2): 0, (inner, 3): 0}
    pairs |= {(control, word): size for control in (0, 1, 2, 3)} | {(1, space): 0}
    previous, targets = np.array(list(pairs)).T
    assert tokenizer.target_bytes(previous, targets).tolist() == list(pairs.values())


def test_the_digest_is_that_of_the_pieces(tokenizer, tmp_path):
    again, other = tmp_path / "again.model", tmp_path / "other.model"
    again.write_bytes(tokenizer.model.serialized_model_proto())
    train_tokenizer(other, TINY_VOCAB - 5)
    assert len(tokenizer.digest) == 16
    assert tokenizer.digest == Tokenizer(str(again), TINY_VOCAB).digest
    assert tokenizer.digest != Tokenizer(str(other), TINY_VOCAB - 5).digest


def test_bytes_with_a_full_sized_tokenizer_are_utf8_sizes():
    path = shared_data("english_1024_bpe.model")
    if path is None:
        pytest.skip("needs english_1024_bpe.model (SHARED_DIR)")
    tokenizer = Tokenizer(str(path), 1024)
    for text in make_documents(5, 50):
        tokens = np.array([1, *tokenizer.model.encode(text)])
        counted = tokenizer.target_bytes(tokens[:-1], tokens[1:]).sum()
        assert counted == len(tokenizer.model.decode(tokens[1:].tolist()).encode())


# ---- the validation split ----------------------------------------------------------------------------------------


def validation(folder, tokenizer_folder, **settings_) -> ValidationSet:
    tokenizer = Tokenizer(str(tokenizer_folder / "tokenizer.model"), TINY_VOCAB)
    return ValidationSet(Config(data_path=str(folder), vocab_size=TINY_VOCAB, **settings_), tokenizer)


def test_the_whole_split_is_all_shards_in_order(tiny_data):
    found = validation(tiny_data, tiny_data)
    tokens = np.concatenate([read_shard(tiny_data / f"tiny_val_00000{i}.bin") for i in (0, 1)])
    assert found.num_targets == len(found.bytes) == VAL_TARGETS
    assert found.tokens.tolist() == tokens.tolist()
    assert not found.partial
    model = sentencepiece.SentencePieceProcessor(model_file=str(tiny_data / "tokenizer.model"))
    documents = np.split(tokens, np.flatnonzero(tokens == 1))
    sizes = [len(model.decode([int(t) for t in ids if t != 1]).encode()) for ids in documents[:-1]]
    last = len(documents[-1])  # cut off somewhere, perhaps within a character
    assert int(found.bytes[: VAL_TARGETS + 1 - last].sum()) == sum(sizes)


@pytest.mark.parametrize("limit", [1, 2, 699, 700, VAL_TARGETS - 1])
def test_a_partial_split_is_the_beginning_and_says_so(tiny_data, limit):
    whole, part = validation(tiny_data, tiny_data), validation(tiny_data, tiny_data, val_tokens=limit)
    assert (part.partial, part.num_targets) == (True, limit)
    assert part.tokens.tolist() == whole.tokens[: limit + 1].tolist()
    assert part.bytes.tolist() == whole.bytes[:limit].tolist()


@pytest.mark.parametrize("limit", [VAL_TARGETS, VAL_TARGETS + 1, 10**9])
def test_a_limit_that_cuts_nothing_is_not_partial(tiny_data, limit):
    found = validation(tiny_data, tiny_data, val_tokens=limit)
    assert (found.partial, found.num_targets) == (False, VAL_TARGETS)


@pytest.mark.parametrize("tokens", [[], [1], [270], [1, 1, 1, 1], [1, 0], [270, 1]])
def test_a_split_that_cannot_be_scored_is_a_data_error(tiny_data, tmp_path, tokens):
    write_shard(tmp_path / "x_val_0.bin", tokens)
    with pytest.raises(DataError, match="validation split") as caught:
        validation(tmp_path, tiny_data)
    assert str(tmp_path) in str(caught.value)


def test_one_target_is_enough(tiny_data, tmp_path):
    byte = 4 + ord("a")
    write_shard(tmp_path / "x_val_0.bin", [1])
    write_shard(tmp_path / "x_val_1.bin", [byte])
    found = validation(tmp_path, tiny_data)
    assert (found.num_targets, found.bytes.tolist()) == (1, [1])


def test_validation_ids_beyond_the_vocabulary(tiny_data, tmp_path):
    tokens = np.full(1_200_000, 270, dtype=np.uint16)
    tokens[-1] = TINY_VOCAB
    write_shard(tmp_path / "x_val_0.bin", tokens)
    with pytest.raises(DataError, match=f"token id {TINY_VOCAB}, but VOCAB_SIZE={TINY_VOCAB}"):
        validation(tmp_path, tiny_data)


def test_shards_of_another_tokenizer_are_refused(run_main, tiny_data, tmp_path):
    """Of the same number of pieces, so that every token id fits: both hashes are named, and what to do."""
    data, digest = tmp_path / "data", Tokenizer(str(tiny_data / "tokenizer.model"), TINY_VOCAB).digest
    shutil.copytree(tiny_data, data)
    (data / "manifest.json").write_text(json.dumps({"tokenizer_hash": "0123456789abcdef"}))
    outcome = run_main(tiny_environ(data, tmp_path))
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    for word in ("0123456789abcdef", digest, str(data), "TOKENIZER_PATH"):
        assert word in outcome.stderr


@pytest.mark.parametrize("content", [None, "{}", "[", '{"tokenizer_hash": "DIGEST"}'])
def test_the_log_says_when_the_tokenizer_of_shards_cannot_be_known(run_main, tiny_data, tmp_path, content):
    data, digest = tmp_path / "data", Tokenizer(str(tiny_data / "tokenizer.model"), TINY_VOCAB).digest
    shutil.copytree(tiny_data, data)
    if content is not None:
        (data / "manifest.json").write_text(content.replace("DIGEST", digest))
    outcome = run_main(tiny_environ(data, tmp_path, EVAL_ONLY=1))  # ends at the missing artifact
    assert outcome.returncode == 2
    assert (f"{data / 'manifest.json'} names no tokenizer" in outcome.stdout) == ("DIGEST" not in (content or ""))
