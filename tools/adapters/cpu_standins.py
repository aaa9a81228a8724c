"""What lets a script for CUDA run its evaluation on a CPU, unmodified, and tells which target got which loss.

script = load("…/train_gpt.py", {"MODEL_DIM": "32"})     import it: FlashAttention, compiling and CUDA are replaced
model = small_model(script.GPT, script.Hyperparameters())
with Tap(tokens, vocab_size) as tap:                     sees the windows that are read and the losses that are summed
    val_loss, _ = script.eval_val_sliding(…, tap.tokens, *tap.byte_tables, …)
logp, index = tap.scores(val_loss)
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """Attention of q (B, T, H, D) to k and v (B, T, K, D), of which each serves H / K heads, as FlashAttention has it.

    `window_size` is how many positions each query sees to the left and to the right, -1 for all.
    """
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    ahead = torch.arange(k.shape[2]) - torch.arange(q.shape[1])[:, None]
    left, right = window_size[0], 0 if causal else window_size[1]
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, seen, scale=softmax_scale).transpose(1, 2)


def compile_nothing(function: Any = None, **_: Any) -> Any:
    """In the place of torch.compile, as a call or as a decorator: the function as it is."""
    return function if function is not None else lambda decorated: decorated


def no_gradients(mode: bool = True) -> Any:
    """In the place of torch.inference_mode: what it caches (rotary angles) may be trained through later."""
    return torch.no_grad() if mode else contextlib.nullcontext()


class CpuAutocast(torch.autocast):
    """In the place of torch.autocast: the same for the CPU."""

    def __init__(self, device_type: str = "cpu", dtype: Any = torch.bfloat16, enabled: bool = True, **_: Any):
        del device_type
        super().__init__("cpu", dtype=dtype, enabled=enabled)


def on_cpu(value: Any) -> Any:
    """A CUDA device as the CPU, by name or as an object; anything else as it is."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


class OnCpu(TorchFunctionMode):
    """While it is entered, tensors that are asked for on a CUDA device are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*map(on_cpu, args), **{name: on_cpu(value) for name, value in (kwargs or {}).items()})


def install() -> None:
    """Put the stand-ins in the places of what needs CUDA, for this process."""
    for name in ("flash_attn_interface", "flash_attn", "flash_attn.flash_attn_interface"):
        module: Any = ModuleType(name)
        module.flash_attn_func = flash_attention
        sys.modules[name] = module
    patched: Any = torch
    patched.compile = compile_nothing
    patched.inference_mode = no_gradients
    patched.autocast = patched.amp.autocast = patched.cuda.amp.autocast = CpuAutocast
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device"):
        setattr(patched.cuda, name, lambda *_, **__: None)
    torch.set_num_threads(1)  # tensors this small are fastest on one thread


def load(script: str | Path, settings: Mapping[str, str]) -> Any:
    """The script as a module, imported with `settings` in its environment and its folder on the search path."""
    path = Path(script).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; set SCRIPT to the submission's script")
    install()
    os.environ.update(settings)
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("submission_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with OnCpu():
        spec.loader.exec_module(module)
    return module


def small_model(model_class: Any, settings: Any, std: float = 0.15, **given: Any) -> torch.nn.Module:
    """A model with random matrices. Arguments of the class are `given`, or attributes of `settings` of the same name.

    All matrices are drawn anew, with `std`: those that a script starts at zero would leave layers out. Raises
    ValueError for an argument that is neither given nor found.
    """
    arguments = dict(given)
    for name, parameter in inspect.signature(model_class).parameters.items():
        if name not in arguments and hasattr(settings, name):
            arguments[name] = getattr(settings, name)
        elif name not in arguments and parameter.default is parameter.empty:
            raise ValueError(f"{model_class.__name__} wants {name}, which the settings lack; give it to small_model")
    torch.manual_seed(0)
    with OnCpu(), torch.no_grad():
        model = model_class(**arguments)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, std)
    return model


class Tap(OnCpu):
    """Sees which windows of the tokens an evaluation reads, and the loss of each target that it sums.

    It fits evaluations that slice `tokens` once per window, sum the losses of the end of each window of a batch in
    the same order, and then look up the bytes of those targets in the first of `byte_tables`. Every target counts for
    one byte. Another kind of evaluation ends in a ValueError that says what was seen.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        super().__init__()
        self.tokens = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
        self.bytes = torch.ones(vocab_size, dtype=torch.int16)
        no = torch.zeros(vocab_size, dtype=torch.bool)
        self.byte_tables = self.bytes, no, no.clone()  # bytes, whether a space leads, whether it is a boundary
        self.windows: list[tuple[int, int]] = []  # read since the last batch was scored
        self.scored: list[tuple[torch.Tensor, torch.Tensor]] = []  # losses and target tokens of the batch
        self.summed: torch.Tensor | None = None
        self.logp: list[np.ndarray] = []
        self.index: list[np.ndarray] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            source, key = args
            if source is self.tokens and isinstance(key, slice):
                self.settle()
                self.windows.append(key.indices(len(self.tokens))[:2])
            elif source is self.bytes:
                self.note_scored(key)
        elif func is torch.Tensor.sum and len(args) == 1 and not kwargs and args[0].is_floating_point():
            self.summed = args[0].detach()
        return super().__torch_function__(func, types, args, kwargs)

    def note_scored(self, targets: Any) -> None:
        """The bytes of `targets` are looked up: the sum before it was that of their losses, unless it was of bytes."""
        losses, self.summed = self.summed, None
        if losses is None or losses.ndim != 1 or losses.shape != getattr(targets, "shape", None):
            return
        if not bool((losses == 1).all()):
            self.scored.append((losses.double(), targets))

    def settle(self) -> None:
        """The windows last read are those that were scored, each in its turn; training reads come before them."""
        if not self.scored:
            return
        windows = self.windows[-len(self.scored) :]
        if len(windows) < len(self.scored):
            raise ValueError(f"{len(self.scored)} sums of losses after {len(windows)} windows; the Tap does not fit")
        for (losses, targets), (start, stop) in zip(self.scored, windows):
            first = stop - len(losses)
            if first <= start or not torch.equal(self.tokens[first:stop], targets):
                raise ValueError(
                    f"{len(losses)} targets are not the end of window {start} to {stop}; the Tap does not fit"
                )
            self.logp.append(-losses.numpy())
            self.index.append(np.arange(first, stop) - 1)
        self.windows, self.scored = [], []

    def scores(self, mean_loss: float) -> tuple[np.ndarray, np.ndarray]:
        """logp and index in the order of scoring. `mean_loss`, in nats, is what the evaluation itself came to."""
        self.settle()
        if not self.logp:
            raise ValueError("no losses were seen; the Tap does not fit this evaluation")
        logp = np.concatenate(self.logp)
        if not abs(logp.mean() + mean_loss) <= 1e-6 * max(1.0, abs(mean_loss)):
            raise ValueError(f"the losses seen have mean {-logp.mean():.6f}, the evaluation {mean_loss:.6f}")
        return logp, np.concatenate(self.index)
