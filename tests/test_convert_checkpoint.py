"""Checkpoints of the earlier submissions become artifacts: same weights, weights alone, clear refusals."""

from __future__ import annotations

import os
import re
from pathlib import Path

import convert_checkpoint
import pytest
import safetensors.torch
import torch
from golden_support import golden_state, tiny_recipe
from support import TINY_VOCAB, assert_refused, run_script, save_artifact, tiny_environ

import train_gpt

SIZES = dict(
    NUM_LAYERS=3, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, MLP_MULT=2, BIGRAM_VOCAB_SIZE=64, BIGRAM_DIM=8, VE_DIM=8,
    XSA_LAST_N=1, ROPE_DIMS=4, VOCAB_SIZE=TINY_VOCAB, TTT_FREEZE_BLOCKS=1, VE_LAYERS="1,2",
)  # fmt: skip
EARLIER = {"swarm": "banks", "backoff": "banks", "leaky": "banks", "hedge": "layers", "smear": "layers"}


def layered(state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A state dict with one matrix a layer, as pull requests 700 and 150 wrote them."""
    out = {name: tensor for name, tensor in state.items() if not name.endswith("_bank")}
    for bank, parts in convert_checkpoint.BANK_PARTS.items():
        for part, matrices in zip(parts, state[bank].split(layers)):
            out |= {f"blocks.{layer}.{part}.weight": matrix for layer, matrix in enumerate(matrices)}
    return out


def as_published(recipe: str, state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The state dict under the names that the submission gave its tensors."""
    if EARLIER[recipe] == "layers":
        state = layered(state, layers)
    if recipe != "smear":
        return state
    return {re.sub(r"^bigram\.(embed)?", lambda m: "bigram_hash." + ("emb" if m[1] else ""), k): v
            for k, v in state.items()}  # fmt: skip


@pytest.fixture
def variables(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of a tiny model, set in the environment as a user would."""
    for name, value in (SIZES | dict(TOKENIZER_PATH=tiny_data / "tokenizer.model")).items():
        monkeypatch.setenv(name, str(value))


def source_model(recipe: str) -> train_gpt.GPT:
    sizes = {name: str(value) for name, value in SIZES.items()} | ({"VE_LAYERS": ""} if recipe == "smear" else {})
    return train_gpt.GPT(train_gpt.Config.from_env(sizes | {"RECIPE": recipe}))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("recipe", EARLIER)
@pytest.mark.usefixtures("variables")
def test_a_converted_checkpoint_is_what_saving_its_model_gives(recipe, suffix, tmp_path, monkeypatch):
    source = source_model(recipe)
    monkeypatch.setenv("VE_LAYERS", ",".join(map(str, source.config.ve_layers)))
    state = as_published(recipe, source.state_dict(), source.config.num_layers)
    checkpoint, out = tmp_path / f"model{suffix}", tmp_path / "out.ptz"
    if suffix == ".pt":
        torch.save({"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}}, checkpoint)
    else:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, checkpoint)
    assert convert_checkpoint.main([str(checkpoint), "--recipe", recipe, "--out", str(out)]) == 0
    loaded, config, metadata = train_gpt.load_artifact(out)
    assert config.recipe == recipe
    expected = tmp_path / "expected.ptz"
    save_artifact(source, metadata["tokenizer"], expected)
    wanted = train_gpt.load_artifact(expected)[0].state_dict()
    assert list(loaded.state_dict()) == list(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.usefixtures("variables")
def test_a_converted_checkpoint_is_scored_by_the_record_command(tiny_data, tmp_path):
    source = source_model("leaky")
    torch.save(source.state_dict(), tmp_path / "model.pt")
    out = tmp_path / "out.ptz"
    assert convert_checkpoint.main([str(tmp_path / "model.pt"), "--recipe", "leaky", "--out", str(out)]) == 0
    process = run_script(tiny_environ(tiny_data, tmp_path, EVAL_ONLY=1, ARTIFACT=out, VAL_TOKENS=200, EVAL_STRIDE=32))
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].startswith("final_int8_zlib_roundtrip_exact ")


@pytest.mark.parametrize("spoil", ["blocks.1.attn.c_k.weight", "smear.gate", "extra", "shape"])
@pytest.mark.usefixtures("variables")
def test_a_checkpoint_of_another_model_is_refused(spoil, tmp_path, capsys):
    source = source_model("hedge")
    state = layered(source.state_dict(), source.config.num_layers)
    if spoil == "extra":
        state[spoil] = torch.zeros(3)
    elif spoil == "shape":
        state["smear.gate"] = torch.zeros(3)
    else:
        del state[spoil]
    torch.save(state, tmp_path / "model.pt")
    named = {"blocks.1.attn.c_k.weight": "kv_bank", "shape": "smear.gate"}.get(spoil, spoil)
    arguments = [tmp_path / "model.pt", "--recipe", "hedge", "--out", tmp_path / "out.ptz"]
    assert_refused(capsys, convert_checkpoint.main, arguments, "RECIPE=hedge", named)
    assert not (tmp_path / "out.ptz").exists()


class Payload:
    """Unpickling it makes a folder: proof that code of a file has run."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.usefixtures("variables")
def test_code_in_a_checkpoint_never_runs(tmp_path, capsys):
    torch.save({"model": Payload(tmp_path / "ran")}, tmp_path / "model.pt")
    arguments = [tmp_path / "model.pt", "--recipe", "leaky", "--out", tmp_path / "out.ptz"]
    assert_refused(capsys, convert_checkpoint.main, arguments, "model.pt", "weights")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint", b"PK\x03\x04torn"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.usefixtures("variables")
def test_what_is_no_checkpoint_is_refused_in_one_line(content, suffix, tmp_path, capsys):
    path = tmp_path / f"model{suffix}"
    if content is not None:
        path.write_bytes(content)
    assert_refused(capsys, convert_checkpoint.main, [path, "--recipe", "leaky", "--out", tmp_path / "o.ptz"], path.name)


@pytest.mark.usefixtures("variables")
def test_a_list_of_tensors_is_no_state_dict(tmp_path, capsys):
    torch.save([torch.zeros(3)], tmp_path / "model.pt")
    arguments = [tmp_path / "model.pt", "--recipe", "leaky", "--out", tmp_path / "out.ptz"]
    assert_refused(capsys, convert_checkpoint.main, arguments, "state dict")


def test_the_recorded_checkpoint_of_700_is_layered_and_fills_the_banks():
    state = convert_checkpoint.to_banks(golden_state("model_700"), 11)
    assert "blocks.10.mlp.proj.weight" in golden_state("model_700")
    expected = train_gpt.GPT(tiny_recipe("hedge")).state_dict()
    assert {name for name in state if name.endswith("_bank")} == {name for name in expected if name.endswith("_bank")}
