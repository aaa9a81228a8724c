"""The artifact: complete, the same after a round trip, refused when damaged or foreign, counted in full."""

import errno
import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import zstandard
from golden_support import REPO, make_runtime, random_ids, randomize, search_scale, tiny_config, tiny_recipe
from torch import Tensor

import train_gpt

DIGEST = "0123456789abcdef"
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
    train_gpt.save_artifact(model, DIGEST, path)
    return path.read_bytes()


@pytest.fixture
def load(tmp_path):
    """Load an artifact from bytes."""

    def from_bytes(data: bytes) -> tuple[train_gpt.GPT, train_gpt.Config, dict[str, str]]:
        path = tmp_path / "some.ptz"
        path.write_bytes(data)
        return train_gpt.load_artifact(path)

    return from_bytes


def tensors_of(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file opened with the two libraries alone: tensors and metadata."""
    payload = zstandard.ZstdDecompressor().decompress(data)
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    return safetensors.torch.load(payload), json.loads(header["__metadata__"]["train_gpt"])


def pack(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> bytes:
    payload = safetensors.torch.save(tensors, {"train_gpt": json.dumps(metadata)})
    return zstandard.ZstdCompressor(write_checksum=True).compress(payload)


# Round trip -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("choice", CHOICES)
def test_a_loaded_model_scores_as_its_quantized_weights(choice, tmp_path):
    """Built by hand here: searched grid for the large matrices, half precision for small ones, fp32 for vectors."""
    config = tiny_config(**CHOICES[choice])
    model = trained_like(config)
    path = tmp_path / "folder" / "model.ptz"
    size = train_gpt.save_artifact(model, DIGEST, path)
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


@pytest.mark.parametrize("choice", CHOICES)
def test_dequantize_undoes_quantize_up_to_half_a_level(choice):
    model = trained_like(tiny_config(**CHOICES[choice]))
    plan = train_gpt.export_plan(model)
    tensors = train_gpt.quantize(model.state_dict(), plan, train_gpt.QuantizeOptions())
    state = train_gpt.dequantize(tensors, plan)
    assert set(state) == {name for name in model.state_dict() if not name.startswith("mtp_heads.")}
    for name, weight in state.items():
        assert weight.dtype == torch.float32
        original = model.state_dict()[name]
        if plan[name].startswith("int"):
            scale = tensors[f"{name}.scale"].float()
            inside = original.abs() <= scale * (2 ** (int(plan[name][3:]) - 1) - 1)
            assert inside.float().mean() > 0.9
            assert ((weight - original).abs() <= 0.501 * scale)[inside].all()
        else:
            torch.testing.assert_close(weight, original, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("recipe", train_gpt.RECIPES)
def test_every_recipe_survives_the_round_trip(recipe, tmp_path):
    config = tiny_recipe(recipe)
    model = trained_like(config)
    train_gpt.save_artifact(model, DIGEST, tmp_path / "a.ptz")
    loaded, stored, _ = train_gpt.load_artifact(tmp_path / "a.ptz")
    assert stored == config.portable()
    train_gpt.save_artifact(loaded, DIGEST, tmp_path / "b.ptz")
    again, _, _ = train_gpt.load_artifact(tmp_path / "b.ptz")
    ids = random_ids(config, 1, 24)
    with torch.no_grad():
        assert torch.isfinite(again.logits(ids)).all()


def test_multi_token_heads_stay_behind(model, good, load):
    assert any(name.startswith("mtp_heads.") for name in model.state_dict())
    tensors, metadata = tensors_of(good)
    assert not any("mtp" in name for name in tensors)
    assert not [name for name in metadata["plan"] if name.startswith("mtp_heads")]
    loaded, config, _ = load(good)
    assert len(loaded.mtp_heads) == config.mtp_num_heads == 0


def test_the_same_weights_make_the_same_file(model, tmp_path):
    files = set()
    for i in range(8):
        train_gpt.save_artifact(model, DIGEST, tmp_path / f"{i}.ptz")
        files.add((tmp_path / f"{i}.ptz").read_bytes())
    assert len(files) == 1


def test_levels_stay_in_their_bits_and_file_has_a_checksum(good):
    tensors, metadata = tensors_of(good)
    plan = metadata["plan"]
    for name in train_gpt.BANK_NAMES:
        assert plan[name] == "int6"
        assert tensors[f"{name}.levels"].dtype == torch.int8
        assert tensors[f"{name}.levels"].abs().max() == 31
        assert tensors[f"{name}.scale"].dtype == torch.float16
    assert zstandard.get_frame_parameters(good).has_checksum
    assert b"pickle" not in zstandard.ZstdDecompressor().decompress(good)


def test_a_bare_process_scores_to_the_same_numbers(good, load, tmp_path):
    path = tmp_path / "model.ptz"
    path.write_bytes(good)
    loaded, config, _ = load(good)
    ids = random_ids(config, 2, 25)
    with torch.no_grad():
        logp, entropy, _ = loaded.token_scores(ids[:, :-1], ids[:, 1:], 24)
    code = f"""
import json, sys
sys.path.insert(0, {str(REPO)!r})
import torch, train_gpt
torch.set_num_threads({torch.get_num_threads()})
model, config, metadata = train_gpt.load_artifact({str(path)!r})
ids = torch.tensor({ids.tolist()})
with torch.no_grad():
    logp, entropy, _ = model.token_scores(ids[:, :-1], ids[:, 1:], 24)
print(json.dumps([logp.tolist(), entropy.tolist(), metadata["tokenizer"]]))
"""
    other = tmp_path / "elsewhere"
    other.mkdir()
    environ = {"PATH": os.environ["PATH"]}
    result = subprocess.run([sys.executable, "-c", code], cwd=other, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [logp.tolist(), entropy.tolist(), DIGEST]
    assert not list(other.iterdir())


# Damage ---------------------------------------------------------------------------------------------------
def state_bytes(model: train_gpt.GPT) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("part", [0, 1, 3, 4, 8, 12, 0.25, 0.5, 0.75, -64, -5, -4, -1])
def test_a_truncated_file_is_refused(good, load, part):
    keep = int(len(good) * part) if isinstance(part, float) else part
    with pytest.raises(train_gpt.ArtifactError, match=r"some\.ptz"):
        load(good[:keep])


def test_flipped_bytes_never_pass_for_other_weights(good, load):
    """Fifty seeded flips, and each of the frame's first bytes: refused, or (an unused bit) the very same weights."""
    expected = state_bytes(load(good)[0])
    chooser = random.Random(1081)
    flips = [(chooser.randrange(len(good)), chooser.randrange(8)) for _ in range(50)]
    flips += [(position, bit) for position in range(12) for bit in range(8)]
    flips += [(len(good) - back, bit) for back in range(1, 5) for bit in (0, 7)]
    refused = 0
    for position, bit in flips:
        damaged = bytearray(good)
        damaged[position] ^= 1 << bit
        try:
            loaded, config, _ = load(bytes(damaged))
        except train_gpt.ArtifactError:
            refused += 1
        else:
            assert state_bytes(loaded) == expected, (position, bit)
            assert config == load(good)[1]
    assert refused >= len(flips) - 8


def test_bytes_added_or_cut_out_are_noticed(good, load):
    middle = len(good) // 2
    for data in (good + b"\0", good + good, good[:middle] + good[middle + 1 :], good[:middle] + b"x" + good[middle:]):
        with pytest.raises(train_gpt.ArtifactError):
            load(data)


def foreign_files() -> dict[str, bytes]:
    pickled = io.BytesIO()
    torch.save({"tok_emb.weight": torch.ones(3)}, pickled)
    plain = safetensors.torch.save({"tok_emb.weight": torch.ones(3)})
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
    with pytest.raises(train_gpt.ArtifactError, match=r"some\.ptz"):
        load(foreign_files()[kind])


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "absent.ptz", tmp_path):
        with pytest.raises(train_gpt.ArtifactError, match=path.name):
            train_gpt.load_artifact(path)


def test_a_decompression_bomb_is_refused_unopened(good, load, monkeypatch):
    monkeypatch.setattr(train_gpt, "MAX_UNPACKED_BYTES", len(zstandard.ZstdDecompressor().decompress(good)) - 1)
    with pytest.raises(train_gpt.ArtifactError, match="claims more than"):
        load(good)


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
    tensors, metadata = tensors_of(good)
    with pytest.raises(train_gpt.ArtifactError):
        load(pack(tensors, metadata | changed_metadata()[kind]))


@pytest.mark.parametrize("key", ["format", "config", "plan"])
def test_missing_metadata_is_refused(key, good, load):
    tensors, metadata = tensors_of(good)
    del metadata[key]
    with pytest.raises(train_gpt.ArtifactError):
        load(pack(tensors, metadata))


def test_repacking_by_hand_is_what_the_refusals_above_start_from(good, load):
    tensors, metadata = tensors_of(good)
    assert state_bytes(load(pack(tensors, metadata))[0]) == state_bytes(load(good)[0])


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_wrong_tensors_are_refused(change, good, load):
    for name in tensors_of(good)[0]:
        tensors, metadata = tensors_of(good)
        tensor = tensors.pop(name)
        if change == "misshapen" and not name.endswith(".scale"):  # scales broadcast
            tensors[name] = torch.cat([tensor.flatten(), tensor.flatten()[:1]])
        with pytest.raises(train_gpt.ArtifactError):
            load(pack(tensors, metadata))


# Writing --------------------------------------------------------------------------------------------------
def test_a_full_disk_leaves_the_old_artifact_whole(model, good, tmp_path, monkeypatch):
    path = tmp_path / "model.ptz"
    path.write_bytes(good)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(train_gpt.ArtifactError, match=r"model\.ptz: No space left on device"):
        train_gpt.save_artifact(model, "another digest", path)
    assert path.read_bytes() == good


def test_an_impossible_folder_is_a_clear_error(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(train_gpt.ArtifactError, match="OUT_DIR"):
        train_gpt.save_artifact(model, DIGEST, tmp_path / "file" / "model.ptz")


# Ledger ---------------------------------------------------------------------------------------------------
@pytest.fixture
def code_folder(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    for name, size in (("train_gpt.py", 1000), ("swarm_agents.py", 200), ("kg_data.py", 30), ("notes.py", 4000)):
        (folder / name).write_bytes(b"#" * size)
    monkeypatch.setattr(train_gpt, "CODE_DIR", folder)
    return folder


def test_the_ledger_counts_every_code_file_and_stops_above_the_limit(code_folder, tmp_path, monkeypatch):
    assert train_gpt.SIZE_LIMIT_BYTES == 16_000_000
    assert set(train_gpt.CODE_FILES) >= {"train_gpt.py", "swarm_agents.py", "kg_data.py"}
    config = tiny_config(out_dir=str(tmp_path), run_id="ledger")
    log = train_gpt.RunLog(config, make_runtime(config))
    monkeypatch.setattr(train_gpt, "SIZE_LIMIT_BYTES", 6230)
    train_gpt.log_ledger(log, 5000, "int6+zstd")  # exactly at the limit
    with pytest.raises(train_gpt.ArtifactError, match=r"\b1 bytes over 6230"):
        train_gpt.log_ledger(log, 5001, "int6+zstd")
    (code_folder / "kg_data.py").unlink()
    train_gpt.log_ledger(log, 5030, "int6+zstd")
    log.close()
    text = (tmp_path / "logs" / "ledger.txt").read_text()
    for line in ("Serialized model int6+zstd: 5000 bytes", "Code size: 1230 bytes", "Code size: 1200 bytes"):
        assert line in text
    assert text.count("Total submission size int6+zstd: 6230 bytes") == 2
    assert "Total submission size int6+zstd: 6231 bytes" in text


def test_the_code_digest_covers_every_code_file(code_folder):
    digests = [train_gpt.code_digest()]
    for name in ("train_gpt.py", "swarm_agents.py", "kg_data.py"):
        (code_folder / name).write_bytes(b"?")
        digests.append(train_gpt.code_digest())
    (code_folder / "notes.py").write_bytes(b"?")
    assert train_gpt.code_digest() == digests[-1]
    assert len(set(digests)) == 4
