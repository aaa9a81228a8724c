"""Turn a checkpoint of an earlier submission into an artifact that `EVAL_ONLY=1` scores.

    python tools/convert_checkpoint.py final_model.pt --recipe hedge --out hedge.ptz
    EVAL_ONLY=1 RECIPE=hedge ARTIFACT=hedge.ptz python train_gpt.py

Checkpoints of pull requests 1081, 1094 and 977 have their matrices in banks, those of 700 and 150 one matrix a layer.
A .pt file is read as weights alone (torch's weights-only loader, which runs no code from the file), a .safetensors file
by safetensors. Sizes are the recipe's; a variable such as NUM_LAYERS overrides them.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import train_gpt

BANK_PARTS = {  # bank → what its parts were called where every layer had its own matrices
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
}
RENAMED = {"bigram_hash.emb.": "bigram.embed.", "bigram_hash.": "bigram."}
WRAPPERS = ("module.", "_orig_mod.")  # what DDP and torch.compile put before every name


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name. Raises UserError for a file that is none or holds more than weights."""
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            return safetensors.torch.load(path.read_bytes())
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise train_gpt.UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        advice = "save the model's state_dict() alone, or as .safetensors"
        raise train_gpt.UserError(f"{path} holds more than weights, and nothing else is read: {advice}") from error
    except Exception as error:  # what torch and safetensors raise for damaged files has no common base
        raise train_gpt.UserError(f"{path} is no checkpoint ({type(error).__name__}: {error})") from error
    for wrapper in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise train_gpt.UserError(f"{path} is no state dict: expected tensors by name")
    return dict(content)


def to_banks(weights: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The same weights under this project's names, matrices of layers stacked into banks; no MTP heads."""
    state = {}
    for name, tensor in weights.items():
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper)
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if not name.startswith("mtp_heads."):
            state[name] = tensor
    for bank, parts in BANK_PARTS.items():
        names = [f"blocks.{layer}.{part}.weight" for part in parts for layer in range(num_layers)]
        if all(name in state for name in names):
            state[bank] = torch.stack([state.pop(name) for name in names])
    return state


def convert(checkpoint: Path, config: train_gpt.Config, out: Path) -> int:
    """Write the artifact of a checkpoint's weights; returns its bytes. Raises UserError."""
    tokenizer = train_gpt.Tokenizer(config.tokenizer_path, config.vocab_size)
    model = train_gpt.GPT(config.portable(), initialize=False)
    try:
        model.load_state_dict(to_banks(read_weights(checkpoint), config.num_layers))
    except RuntimeError as error:
        what = " ".join(str(error).split())
        raise train_gpt.UserError(f"{checkpoint} is of another model than RECIPE={config.recipe}: {what}") from error
    packed = train_gpt.pack_artifact(model, tokenizer.digest)
    train_gpt.write_artifact_file(out, packed)
    return len(packed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 after an error in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=".pt or .safetensors")
    parser.add_argument("--recipe", required=True, choices=list(train_gpt.RECIPES), help="which submission it is of")
    parser.add_argument("--out", type=Path, required=True, help="the artifact to write")
    options = parser.parse_args(argv)
    try:
        config = train_gpt.Config.from_env({**os.environ, "RECIPE": options.recipe})
        size = convert(options.checkpoint, config, options.out)
    except train_gpt.UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{options.out}: {size} bytes; EVAL_ONLY=1 RECIPE={options.recipe} ARTIFACT={options.out} scores it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
