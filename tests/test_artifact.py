"""The artifact: complete, the same after a round trip, refused when damaged or foreign, counted in full."""

import dataclasses
import errno
import gzip
import io
import json
import lzma
import os
import random
import stat
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import safetensors.numpy
import torch
import zstandard
from golden_support import make_runtime, random_ids, randomize, search_scale, tiny_config, tiny_recipe
from support import artifact_of, artifact_parts, artifact_payload, save_artifact, sealed
from torch import Tensor

import train_gpt

DIGEST = "0123456789abcdef"
COMPRESSORS = ("zstd", "brotli")
CHOICES: dict[str, dict[str, Any]] = {
    "everything": {},
    "5 bits, untied": dict(qat_bits=5, tie_embeddings=False),
    "no quantization-aware training": dict(qat_bits=0),
    "8 bits, plain": dict(qat_bits=8, ve_layers=(), xsa_last_n=0, mtp_num_heads=0, rope_dims=0),
    "one layer": dict(num_layers=1, ve_layers=(0,), xsa_last_n=1),
    "large tables": dict(vocab_size=600, bigram_vocab_size=8192, ve_dim=128, qat_bits=7),
}


def trained_like(config: train_gpt.Config) -> train_gpt.GPT:
    return randomize(train_gpt.GPT(config), seed=3)


@pytest.fixture(scope="module")
def model() -> train_gpt.GPT:
    return trained_like(tiny_config())


@pytest.fixture(scope="module")
def good(model, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("artifact") / "good.ptz"
    save_artifact(model, DIGEST, path)
    return path.read_bytes()


@pytest.fixture
def load(tmp_path):
    """Load an artifact from bytes."""

    def from_bytes(data: bytes) -> tuple[train_gpt.GPT, train_gpt.Config, dict[str, str]]:
        path = tmp_path / "some.ptz"
        path.write_bytes(data)
        return train_gpt.load_artifact(path)

    return from_bytes


def arrays_of(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The file opened apart from the program: arrays (bytes of an element apart) and metadata."""
    metadata, tensors = artifact_parts(data)
    return {name: tensor.numpy() for name, tensor in tensors.items()}, metadata


def pack(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> bytes:
    """A file that is whole, whatever it holds."""
    return artifact_of(metadata, {name: torch.from_numpy(array) for name, array in arrays.items()})


def with_settings(model: train_gpt.GPT, **changes: Any) -> train_gpt.GPT:
    """The same weights under other settings."""
    other = train_gpt.GPT(dataclasses.replace(model.config, **changes))
    other.load_state_dict(model.state_dict())
    return other


# Round trip -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("choice", CHOICES)
def test_a_loaded_model_scores_as_its_quantized_weights(choice, tmp_path):
    """Built by hand here: searched grid for the large matrices, half precision for small ones, fp32 for vectors."""
    config = tiny_config(**CHOICES[choice])
    model = trained_like(config)
    path = tmp_path / "folder" / "model.ptz"
    size = save_artifact(model, DIGEST, path)
    assert size == path.stat().st_size
    assert [p.name for p in path.parent.iterdir()] == ["model.ptz"]
    loaded, stored, metadata = train_gpt.load_artifact(path)
    expected = {}
    for name, weight in model.state_dict().items():
        if name.startswith("mtp_heads."):
            continue
        bits = config.qat_bits or 6 if name in train_gpt.BANK_NAMES else 8
        embedding = name in ("tok_emb.weight", "lm_head.weight")
        if name in train_gpt.BANK_NAMES or embedding or weight.numel() > 65_536:
            grid = train_gpt.Grid(bits)
            scale = search_scale(weight, grid)
            expected[name] = grid.decode(grid.encode(weight, scale), scale)
        else:
            expected[name] = weight.half().float() if weight.ndim > 1 else weight
    assert list(loaded.state_dict()) == list(expected)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    twin = train_gpt.GPT(stored)
    twin.load_state_dict(expected)
    ids = random_ids(config, 2, 24)
    with torch.no_grad():
        assert torch.equal(loaded.logits(ids), twin.logits(ids))
        assert not torch.equal(loaded.logits(ids), model.logits(ids))
        assert (loaded.logits(ids) - model.logits(ids)).abs().max() < 16  # of ±30; random weights amplify the error
    assert metadata["tokenizer"] == DIGEST
    assert metadata["code"] == train_gpt.code_digest()


@pytest.mark.parametrize("recipe", train_gpt.RECIPES)
def test_every_recipe_survives_the_round_trip(recipe, tmp_path):
    config = tiny_recipe(recipe)
    model = trained_like(config)
    save_artifact(model, DIGEST, tmp_path / "a.ptz")
    loaded, stored, _ = train_gpt.load_artifact(tmp_path / "a.ptz")
    assert stored == config.portable()
    save_artifact(loaded, DIGEST, tmp_path / "b.ptz")
    again, _, _ = train_gpt.load_artifact(tmp_path / "b.ptz")
    ids = random_ids(config, 1, 24)
    with torch.no_grad():
        assert torch.isfinite(again.logits(ids)).all()


def test_multi_token_heads_stay_behind(model, good, load):
    assert any(name.startswith("mtp_heads.") for name in model.state_dict())
    arrays, metadata = arrays_of(good)
    assert not any("mtp" in name for name in arrays)
    assert not [name for name in metadata["plan"] if name.startswith("mtp_heads")]
    loaded, config, _ = load(good)
    assert len(loaded.mtp_heads) == config.mtp_num_heads == 0


def test_the_same_weights_make_the_same_file(model, tmp_path):
    files = set()
    for i in range(8):
        save_artifact(model, DIGEST, tmp_path / f"{i}.ptz")
        files.add((tmp_path / f"{i}.ptz").read_bytes())
    assert len(files) == 1


def test_levels_stay_in_their_bits_and_file_has_a_checksum(model, good):
    arrays, metadata = arrays_of(good)
    plan = metadata["plan"]
    shapes = {f"{name}.levels": model.get_parameter(name).shape for name in plan if plan[name].startswith("int")}
    levels = train_gpt.decode_levels({k: train_gpt.shuffle_bytes(v, undo=True) for k, v in arrays.items()}, shapes)
    for name in train_gpt.BANK_NAMES:
        assert plan[name] == "int6"
        assert levels[f"{name}.levels"].dtype == np.int8
        assert abs(levels[f"{name}.levels"]).max() == 31
        assert arrays[f"{name}.scale"].dtype == np.float16
    assert zstandard.get_frame_parameters(good).has_checksum
    assert b"pickle" not in zstandard.ZstdDecompressor().decompress(good)


# Damage ---------------------------------------------------------------------------------------------------
def state_bytes(model: train_gpt.GPT) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("part", [0, 1, 3, 4, 8, 12, 0.25, 0.5, 0.75, -64, -5, -4, -1])
def test_a_truncated_file_is_refused(good, load, part):
    keep = int(len(good) * part) if isinstance(part, float) else part
    with pytest.raises(train_gpt.ArtifactError, match=r"some\.ptz"):
        load(good[:keep])


def damaged(data: bytes, source: random.Random) -> bytes:
    """One byte changed, or the file cut short, anywhere."""
    position = source.randrange(len(data))
    if source.random() < 0.3:
        return data[:position]
    return data[:position] + bytes([data[position] ^ source.randrange(1, 256)]) + data[position + 1 :]


def outcomes(load, files, expected: dict[str, bytes]) -> dict[str, int]:
    """What became of damaged files. An exception of another kind than ArtifactError ends the test."""
    counts = dict(refused=0, harmless=0, changed=0)
    for data in files:
        try:
            loaded = load(data)[0]
        except train_gpt.ArtifactError:
            counts["refused"] += 1
        else:
            counts["harmless" if state_bytes(loaded) == expected else "changed"] += 1
    return counts


@pytest.mark.parametrize(("compressor", "trials"), [("zstd", 400), ("brotli", 200)])
def test_no_damaged_file_passes_for_other_weights(compressor, trials, model, tmp_path, load):
    """Seeded single-byte changes and truncations; and every bit of the first and last twelve bytes."""
    save_artifact(with_settings(model, compressor=compressor), DIGEST, tmp_path / "good.ptz")
    good, source = (tmp_path / "good.ptz").read_bytes(), random.Random(1081)
    files = [damaged(good, source) for _ in range(trials)]
    for position in (*range(12), *range(len(good) - 12, len(good))):
        files += [good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :] for bit in range(8)]
    assert outcomes(load, files, state_bytes(load(good)[0])) == dict(refused=len(files), harmless=0, changed=0)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_damage_under_a_right_digest_is_no_crash_either(compressor, model, tmp_path, load):
    """Somebody may compute the digest anew: then the decoders see the damage, and must still end in an error or load.

    Zstd carries a checksum of its own; what the compressors hold is damaged before compression as well.
    """
    save_artifact(with_settings(model, compressor=compressor), DIGEST, tmp_path / "good.ptz")
    stream, source = (tmp_path / "good.ptz").read_bytes()[: -len(sealed(b""))], random.Random(7)
    payload = artifact_payload(sealed(stream))
    files = [sealed(damaged(stream, source)) for _ in range(60)]
    files += [sealed(zstandard.compress(damaged(payload, source))) for _ in range(30)]
    counts = outcomes(load, files, state_bytes(load(sealed(stream))[0]))
    assert counts["refused"] > 60
    if compressor != "brotli":
        assert outcomes(load, files[:60], {})["refused"] == 60


def test_bytes_added_or_cut_out_are_noticed(good, load):
    middle = len(good) // 2
    for data in (good + b"\0", good + good, good[:middle] + good[middle + 1 :], good[:middle] + b"x" + good[middle:]):
        with pytest.raises(train_gpt.ArtifactError):
            load(data)


def foreign_files() -> dict[str, bytes]:
    pickled = io.BytesIO()
    torch.save({"tok_emb.weight": torch.ones(3)}, pickled)
    plain = safetensors.numpy.save({"tok_emb.weight": np.ones(3, np.float32)})
    compress = zstandard.ZstdCompressor().compress
    return {
        "empty": b"",
        "zeros": bytes(1000),
        "text": b"this is no artifact\n" * 100,
        "torch.save": pickled.getvalue(),
        "torch.save in zstd": compress(pickled.getvalue()),
        "gzip": gzip.compress(plain),
        "safetensors alone": plain,
        "safetensors without metadata": compress(plain),
        "zstd of nothing": compress(b""),
        "zstd of text": compress(b"hello world"),
        "zstd of a huge header length": compress(b"\xff" * 64),
        "zstd of a JSON list": compress((2).to_bytes(8, "little") + b"[]"),
        "zstd of deep JSON": compress((200_000).to_bytes(8, "little") + b"[" * 200_000),
        "skippable frame": b"\x50\x2a\x4d\x18\x04\0\0\0abcd",
        "frame without a size": zstandard.ZstdCompressor(write_content_size=False).compress(plain),
        "a petabyte claimed": b"\x28\xb5\x2f\xfd\xe0" + (2**50).to_bytes(8, "little") + bytes(64),
        "2 GiB of zeros claimed": b"\x28\xb5\x2f\xfd\xe0" + (2**31).to_bytes(8, "little") + b"\x01\x00\x00",
    }


@pytest.mark.parametrize("kind", foreign_files())
def test_a_foreign_file_is_refused(kind, load):
    """Also when it carries a right digest."""
    data = foreign_files()[kind]
    for file, reason in ((data, r"some\.ptz .*does not end in its own SHA-256"), (sealed(data), r"some\.ptz")):
        with pytest.raises(train_gpt.ArtifactError, match=reason):
            load(file)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "absent.ptz", tmp_path):
        with pytest.raises(train_gpt.ArtifactError, match=path.name):
            train_gpt.load_artifact(path)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_decompression_bomb_is_refused_half_opened_at_most(compressor, load, monkeypatch):
    zeros = bytes(1 << 26)
    bomb = {
        "zstd": lambda: zstandard.compress(zeros),
        "brotli": lambda: b"\xce\xb2\xcf\x81" + brotli.compress(zeros, quality=1),
    }[compressor]()
    assert len(bomb) < 20_000
    monkeypatch.setattr(train_gpt, "MAX_UNPACKED_BYTES", 1 << 20)
    tracemalloc.start()
    with pytest.raises(train_gpt.ArtifactError, match="claims more than 1048576 bytes"):
        load(sealed(bomb))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23


def test_a_config_that_asks_for_too_many_weights_is_refused_before_they_exist(good, load):
    arrays, metadata = arrays_of(good)
    huge = json.loads(metadata["config"]) | dict(model_dim=8192, num_layers=64, mlp_mult=16, vocab_size=65_000)
    model = train_gpt.Config.from_json(json.dumps(huge))
    with torch.device("meta"):
        plan = train_gpt.GPT(model, initialize=False).plan
    with pytest.raises(train_gpt.ArtifactError, match=r"claims more than \d+ weights"):
        load(pack(arrays, metadata | {"config": json.dumps(huge), "plan": plan}))


def changed_metadata() -> dict[str, dict[str, Any]]:
    """Metadata whose checksum is right and whose content is wrong."""
    config = json.loads(tiny_config(mtp_num_heads=0).to_json())
    return {
        "format of the future": {"format": 999},
        "config is text": {"config": "not json"},
        "config is a list": {"config": "[]"},
        "config lacks a field": {"config": json.dumps({k: v for k, v in config.items() if k != "seed"})},
        "config of another width": {"config": json.dumps(config | {"model_dim": 64})},
        "config out of range": {"config": json.dumps(config | {"num_layers": -1})},
        "config of wrong types": {"config": json.dumps(config | {"num_layers": "four"})},
        "config of nulls": {"config": json.dumps(dict.fromkeys(config))},
        "plan lacks a tensor": {"plan": {}},
        "plan is text": {"plan": "{"},
        "plan is a list": {"plan": []},
        "plan names an unknown tensor": {"plan": {"no.such.tensor": "fp16"}},
        "plan has an odd codec": {"plan": {"tok_emb.weight": "intx"}},
        "plan's codec is a number": {"plan": {"tok_emb.weight": 8}},
    }


@pytest.mark.parametrize("kind", changed_metadata())
def test_wrong_metadata_is_refused(kind, good, load):
    arrays, metadata = arrays_of(good)
    with pytest.raises(train_gpt.ArtifactError):
        load(pack(arrays, metadata | changed_metadata()[kind]))


@pytest.mark.parametrize("key", ["format", "config", "plan"])
def test_missing_metadata_is_refused(key, good, load):
    arrays, metadata = arrays_of(good)
    del metadata[key]
    with pytest.raises(train_gpt.ArtifactError):
        load(pack(arrays, metadata))


def test_repacking_by_hand_is_what_the_refusals_above_start_from(good, load):
    arrays, metadata = arrays_of(good)
    assert state_bytes(load(pack(arrays, metadata))[0]) == state_bytes(load(good)[0])


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_wrong_tensors_are_refused(change, good, load):
    for name in arrays_of(good)[0]:
        arrays, metadata = arrays_of(good)
        array = arrays.pop(name)
        if change == "misshapen":
            arrays[name] = np.concatenate([array.flatten(), array.flatten()[:1]])
        with pytest.raises(train_gpt.ArtifactError):
            load(pack(arrays, metadata))


@pytest.mark.parametrize("name", ["ans.frequencies", "ans.states", "ans.words", "qo_bank.levels.rows"])
def test_a_code_that_cannot_be_is_refused(name, good, load):
    arrays, metadata = arrays_of(good)
    for value in (0, 255):
        array = np.full_like(arrays[name], value)
        with pytest.raises(train_gpt.ArtifactError, match="unexpected content"):
            load(pack({**arrays, name: array}, metadata))


# Compressors ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_each_compressor_writes_what_any_setting_reads(compressor, model, good, load, tmp_path):
    files = []
    for name in ("a.ptz", "b.ptz"):
        save_artifact(with_settings(model, compressor=compressor), DIGEST, tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    loaded, config, _ = load(files[0])
    assert config.compressor == compressor
    assert state_bytes(loaded) == state_bytes(load(good)[0])
    magic = {"zstd": zstandard.FRAME_HEADER, "brotli": b"\xce\xb2\xcf\x81"}[compressor]
    assert files[0].startswith(magic)
    assert artifact_payload(files[0]).count(b"qo_bank") > 0


@pytest.mark.parametrize("compressor", ["brotli", "zstandard"])
def test_a_missing_compressor_is_named(compressor, model, tmp_path, monkeypatch):
    chosen = {"zstandard": "zstd"}.get(compressor, compressor)
    save_artifact(with_settings(model, compressor=chosen), DIGEST, tmp_path / "a.ptz")
    monkeypatch.setitem(sys.modules, compressor, None)
    with pytest.raises(train_gpt.UserError, match=f"needs the package '{compressor}'"):
        train_gpt.load_artifact(tmp_path / "a.ptz")
    with pytest.raises(train_gpt.UserError, match=f"needs the package '{compressor}'"):
        save_artifact(with_settings(model, compressor=chosen), DIGEST, tmp_path / "b.ptz")


def test_shuffled_bytes_come_back_and_lie_by_significance():
    words = np.array([[0x0102, 0x0304, 0x0506]], np.uint16)
    assert train_gpt.shuffle_bytes(words).tobytes() == bytes([2, 4, 6, 1, 3, 5])
    for array in (words, np.float32(3.5).reshape(()), np.zeros((0,), np.uint16), np.arange(6, dtype=np.uint8)):
        again = train_gpt.shuffle_bytes(train_gpt.shuffle_bytes(array), undo=True)
        assert (again.dtype, again.shape, again.tobytes()) == (array.dtype, array.shape, array.tobytes())


# Coding of levels -----------------------------------------------------------------------------------------
def some_levels(kind: str, source: np.random.Generator) -> np.ndarray:
    normal = source.standard_normal((3, 40, 70))
    uneven = normal * np.exp2(source.uniform(-3, 3, (3, 40, 1))) * np.exp2(source.uniform(-2, 2, (3, 1, 70)))
    return (
        {
            "normal": normal * 10,
            "uneven": uneven * 4,
            "heavy tails": source.standard_t(1.2, (3, 40, 70)) * 3,
            "uniform": source.uniform(-127, 127, (2, 300, 20)),
            "zeros": np.zeros((2, 5, 7)),
            "one value": np.full((2, 30, 30), -31),
            "extremes": source.choice([-127, 127], (4, 60, 10)),
            "one level": np.array([[[5]]]),
            "a column": source.standard_normal((1, 500, 1)) * 20,
            "one spike": np.pad([[[127]]], ((0, 0), (0, 99), (0, 999))),
            "a matrix": normal[0] * 10,
        }[kind]
        .clip(-127, 127)
        .round()
        .astype(np.int8)
    )


KINDS = ["normal", "uneven", "heavy tails", "uniform", "zeros", "one value", "extremes", "one level", "a column",
         "one spike", "a matrix"]  # fmt: skip


def shapes_of(levels: Mapping[str, np.ndarray]) -> dict[str, torch.Size]:
    return {name: torch.Size(array.shape) for name, array in levels.items()}


@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), KINDS], ids=[*KINDS, "all at once"])
def test_coded_levels_come_back(kinds):
    for seed in range(3):
        source = np.random.default_rng(seed)
        levels = {kind: some_levels(kind, source) for kind in kinds}
        back = train_gpt.decode_levels(train_gpt.encode_levels(levels), shapes_of(levels))
        for kind in kinds:
            assert back[kind].dtype == np.int8
            assert np.array_equal(back[kind], levels[kind]), kind


def decode_slowly(arrays: Mapping[str, np.ndarray], classes: np.ndarray) -> list[int]:
    """The decoder as the papers write it: one lane after the other, a search instead of a table."""
    states, words = [int(state) for state in arrays["ans.states"]], iter(arrays["ans.words"].tolist())
    levels = []
    for number, size_class in enumerate(classes):
        state, lane, byte = states[number % len(states)], number % len(states), 0
        slot, frequencies = state % 2**14, arrays["ans.frequencies"][size_class].tolist()
        start = 0
        while start + frequencies[byte] <= slot:
            start += frequencies[byte]
            byte += 1
        state = frequencies[byte] * (state // 2**14) + slot - start
        states[lane] = state if state >= 2**16 else state * 2**16 + next(words)
        levels.append(byte - 256 if byte > 127 else byte)
    assert set(states) == {2**16}
    assert not list(words)
    return levels


def test_a_decoder_written_from_the_papers_reads_the_code():
    levels = {"uneven": some_levels("uneven", np.random.default_rng(5))}
    arrays = train_gpt.encode_levels(levels)
    classes = train_gpt.size_classes(arrays["uneven.rows"], arrays["uneven.columns"])
    assert decode_slowly(arrays, classes) == levels["uneven"].reshape(-1).tolist()


def entropy_bytes(values: np.ndarray) -> float:
    share = np.unique(values, return_counts=True)[1] / values.size
    return float(-(share * np.log2(share)).sum() * values.size / 8)


def test_order0_entropy_is_that_of_each_tensor_by_itself():
    source = np.random.default_rng(0)
    levels = [some_levels(kind, source) for kind in KINDS]
    tensors = {str(i): torch.from_numpy(array) for i, array in enumerate(levels)} | {"scale": torch.ones(3)}
    assert train_gpt.order0_entropy_bytes(tensors) == pytest.approx(sum(map(entropy_bytes, levels)), rel=1e-9)
    four = {"four": torch.tensor([[0, 1, 2, 3]], dtype=torch.int8)}
    assert train_gpt.order0_entropy_bytes(four) == pytest.approx(1.0)


def test_the_code_is_as_long_as_the_entropy_within_the_size_classes():
    """And for rows and columns of different sizes clearly below the order-0 entropy, the size codes included."""
    source = np.random.default_rng(1)
    spread = np.exp2(source.uniform(-1.5, 1.5, (2, 600, 1))) * np.exp2(source.uniform(-1, 1, (2, 1, 500)))
    levels = (source.standard_normal((2, 600, 500)) * spread * 4).clip(-31, 31).round().astype(np.int8)
    arrays = train_gpt.encode_levels({"w": levels})
    classes = train_gpt.size_classes(arrays["w.rows"], arrays["w.columns"])
    within = sum(entropy_bytes(levels.reshape(-1)[classes == size]) for size in np.unique(classes))
    coded = arrays["ans.words"].nbytes + arrays["ans.states"].nbytes
    assert within < coded < 1.002 * within + 2 * arrays["ans.states"].nbytes
    assert coded + levels.shape[0] * (600 + 500) < 0.95 * entropy_bytes(levels)


def test_rows_of_one_size_cost_a_bit_a_level_however_large_or_small_they_are():
    """The row's size says all but the sign, up to the largest levels of 8 bits."""
    sizes = np.repeat([1, 2, 4, 8, 16, 32, 64, 127], 50)
    signs = np.random.default_rng(2).choice([-1, 1], (1, len(sizes), 1000))
    arrays = train_gpt.encode_levels({"w": (signs * sizes[:, None]).astype(np.int8)})
    assert 8 * arrays["ans.words"].nbytes < 1.01 * signs.size


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_the_payload_stays_near_the_order0_entropy_and_below_other_compressors(bits):
    """Plain normal rows, where there is nothing to gain: at most 1 % above, and no larger than lzma or brotli."""
    weight = torch.randn(2, 600, 512, generator=torch.Generator().manual_seed(bits))
    tensors = train_gpt.quantize({"qo_bank": weight}, {"qo_bank": f"int{bits}"}, train_gpt.Config())
    rest = {"qo_bank.scale": tensors["qo_bank.scale"]}
    payload = len(train_gpt.pack_tensors(tensors, {}, "zstd")) - len(train_gpt.pack_tensors(rest, {}, "zstd"))
    assert payload < 1.01 * train_gpt.order0_entropy_bytes(tensors)
    plain = tensors["qo_bank.levels"].numpy().tobytes()
    assert payload < len(lzma.compress(plain, preset=9))
    assert payload < len(brotli.compress(plain, quality=9))  # 11 takes seconds; bench/packing.py compares with it


# Writing --------------------------------------------------------------------------------------------------
def test_a_full_disk_leaves_the_old_artifact_whole(model, good, tmp_path, monkeypatch):
    path = tmp_path / "model.ptz"
    path.write_bytes(good)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(train_gpt.ArtifactError, match=r"model\.ptz: No space left on device"):
        save_artifact(model, "another digest", path)
    assert path.read_bytes() == good


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_after(model, tmp_path, monkeypatch):
    """Otherwise a machine that loses power could keep the name without the content, or lose a file that was there."""
    events, fsync = [], os.fsync

    def synced(descriptor: int) -> None:
        what = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content"
        events.append((what, (tmp_path / "f").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    save_artifact(model, DIGEST, tmp_path / "f")
    assert events == [("content", False), ("folder", True)]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_an_impossible_folder_is_a_clear_error(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(train_gpt.ArtifactError, match="OUT_DIR"):
        save_artifact(model, DIGEST, tmp_path / "file" / "model.ptz")


# Ledger ---------------------------------------------------------------------------------------------------
@pytest.fixture
def code_folder(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    for name, size in (("train_gpt.py", 1000), ("swarm_agents.py", 200), ("kg_data.py", 30), ("notes.py", 4000)):
        (folder / name).write_bytes(b"#" * size)
    monkeypatch.setattr(train_gpt, "CODE_DIR", folder)
    return folder


def test_every_code_file_that_is_there_counts(code_folder):
    assert train_gpt.SIZE_LIMIT_BYTES == 16_000_000
    assert train_gpt.code_bytes() == 1230
    (code_folder / "kg_data.py").unlink()
    assert train_gpt.code_bytes() == 1200


def test_the_code_digest_covers_every_code_file(code_folder):
    digests = [train_gpt.code_digest()]
    for name in ("train_gpt.py", "swarm_agents.py", "kg_data.py"):
        (code_folder / name).write_bytes(b"?")
        digests.append(train_gpt.code_digest())
    (code_folder / "notes.py").write_bytes(b"?")
    assert train_gpt.code_digest() == digests[-1]
    assert len(set(digests)) == 4


# FIT_BYTES ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def larger() -> train_gpt.GPT:
    """Large enough for its integers to be most of the artifact."""
    return trained_like(tiny_config(vocab_size=512, model_dim=96, ve_dim=32))


@pytest.fixture
def fit(larger, tmp_path, monkeypatch):
    """Save with FIT_BYTES=1 when so many bytes are left for the artifact; path, size and the log's rows."""

    def save(allowed: int) -> tuple[Path, int, list[dict[str, Any]]]:
        model = with_settings(larger, fit_bytes=True, out_dir=str(tmp_path), run_id="fit")
        monkeypatch.setattr(train_gpt, "SIZE_LIMIT_BYTES", train_gpt.code_bytes() + allowed)
        log = train_gpt.RunLog(model.config, make_runtime(model.config))
        size = save_artifact(model, DIGEST, tmp_path / "fit.ptz", log=log)
        log.close()
        rows = [json.loads(line) for line in (tmp_path / "logs" / "fit.jsonl").read_text().splitlines()]
        return tmp_path / "fit.ptz", size, rows

    return save


@pytest.fixture(scope="module")
def full_size(larger, tmp_path_factory) -> int:
    model = with_settings(larger, fit_bytes=True)
    return save_artifact(model, DIGEST, tmp_path_factory.mktemp("full") / "full.ptz")


def test_what_fits_is_left_alone(fit, full_size):
    _, size, rows = fit(full_size)
    assert size == full_size
    packing = rows[0]
    assert [row["event"] for row in rows[:1]] == ["packing"]
    assert packing["clip_std"] == packing["prune_fraction"] == 0
    assert packing["ratio"] == pytest.approx(packing["payload"] / packing["order0_entropy"], rel=1e-4)
    assert 0.9 < packing["ratio"] < 1.05
    assert 0 < packing["payload"] < size


def test_bytes_by_tensor_follow_what_each_holds(fit, full_size, larger):
    """Integers have about their own entropy of the file, whatever else shares the code with them."""
    shares = next(row["bytes"] for row in fit(full_size)[2] if row["event"] == "tensor_bytes")
    tensors = train_gpt.quantize(larger.state_dict(), larger.plan, larger.config)
    assert sum(shares.values()) == full_size
    for name in train_gpt.BANK_NAMES:
        _, counts = tensors[f"{name}.levels"].unique(return_counts=True)
        entropy_bytes = float(-(counts * (counts / counts.sum()).log2()).sum()) / 8
        assert shares[name] == pytest.approx(entropy_bytes, rel=0.1)


@pytest.mark.parametrize(("share", "pruned"), [(0.92, False), (0.7, True)])
def test_an_artifact_is_made_to_fit_by_clips_and_then_by_pruning(share, pruned, fit, full_size, larger):
    allowed = int(full_size * share)
    path, size, rows = fit(allowed)
    assert 0.97 * allowed < size <= allowed
    tried, (packing, tensors) = [row for row in rows if row["event"] == "fit_bytes"], rows[-2:]
    assert 1 <= len(tried) <= 4
    assert tried[0]["before"] == full_size
    assert tried[-1]["after"] == size
    assert all(row["limit"] == allowed for row in tried)
    assert (packing["event"], tensors["event"]) == ("packing", "tensor_bytes")
    assert sum(tensors["bytes"].values()) == size
    assert packing["clip_std"] == tried[-1]["clip_std"] > 3
    assert (packing["prune_fraction"] > 0) == pruned
    loaded, config, _ = train_gpt.load_artifact(path)
    weights = dict(larger.state_dict())
    zeros = (loaded.qo_bank == 0).float().mean()
    assert zeros > 0.99 * packing["prune_fraction"]
    ids = random_ids(config, 2, 25)
    with torch.no_grad():
        logp, _, _ = loaded.token_scores(ids[:, :-1], ids[:, 1:], 24)
        assert torch.isfinite(logp).all()
    error = (loaded.qo_bank - weights["qo_bank"]).square().mean() / weights["qo_bank"].square().mean()
    assert error < (0.5 if pruned else 0.02)
    first = path.read_bytes()
    assert fit(allowed)[0].read_bytes() == first


def test_what_cannot_fit_is_refused_with_numbers_and_without_a_file(fit, full_size, tmp_path):
    with pytest.raises(
        train_gpt.ArtifactError,
        match=r"FIT_BYTES=1 leaves \d+ bytes too many of the 5000 .*prune_fraction': 0\.9.*; use",
    ):
        fit(5000)
    assert not (tmp_path / "fit.ptz").exists()
    assert full_size > 5000


def test_fitting_packs_seldom_and_stays_within_three_rungs_of_the_finest_that_fits():
    """With sizes that are the entropy plus a part no estimate knows: found in three packs."""
    weight = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0))
    packs = []

    def make(options: train_gpt.Config) -> dict[str, Tensor]:
        return train_gpt.quantize({"qo_bank": weight}, {"qo_bank": "int6"}, options)

    def pack(tensors: Mapping[str, Tensor]) -> bytes:
        packs.append(1)
        return bytes(int(1.01 * train_gpt.order0_entropy_bytes(tensors)) + 700)

    for limit in (10_000, 9000, 7000, 6000):
        packs.clear()
        options, tensors, packed = train_gpt.fit_artifact(make, pack, train_gpt.Config(), limit)
        assert len(packs) <= 3
        assert len(packed) <= limit
        assert len(pack(tensors)) == len(packed)
        if options.prune_fraction:
            finer = dataclasses.replace(options, prune_fraction=options.prune_fraction - 0.03)
        else:
            finer = dataclasses.replace(options, clip_std=options.clip_std / 1.03)
        assert len(pack(make(finer))) > limit
    kept = train_gpt.Config(clip_std=5.0, prune_fraction=0.3)
    coarser = train_gpt.fit_artifact(make, pack, kept, 7000)[0]
    assert coarser.clip_std > 5
    assert coarser.prune_fraction >= 0.3
