"""What a reviewer tries first: import anywhere, build the default model, and every optional package missing in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from support import Run, modules_replaced, tiny_environ

import train_gpt

REPO = Path(__file__).resolve().parents[1]
OPTIONAL = (
    "flash_attn", "flash_attn_interface", "triton", "zstandard", "sentencepiece", "safetensors", "brotli", "lzma",
)  # fmt: skip

# Each step runs in one bare process, in which no optional package can be imported and torch finds no CUDA device.
REVIEW = f"""
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r} + ("_lzma",):
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(REPO)!r})
import torch
torch.set_num_threads(1)
import train_gpt
config = train_gpt.Config()
model = train_gpt.GPT(config)
with torch.no_grad():
    logits = model.logits(torch.arange(32)[None])
print(json.dumps(dict(
    shape=list(logits.shape),
    finite=bool(logits.isfinite().all()),
    parameters=sum(parameter.numel() for parameter in model.parameters()),
    code_bytes=train_gpt.code_bytes(),
    cuda=torch.cuda.is_available(),
    loaded=sorted({{name.partition(".")[0] for name in sys.modules}} & set({OPTIONAL!r})),
)))
"""


def bare_process(code: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environ}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=120, check=False)


def test_import_from_any_directory_prints_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); import train_gpt; assert 'sentencepiece' not in sys.modules"
    result = bare_process(code, tmp_path, RECIPE="no such recipe")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_default_model_runs_without_any_optional_package_or_gpu(tmp_path):
    result = bare_process(REVIEW, tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["shape"], found["finite"]) == ([1, 32, 1024], True)
    assert found["parameters"] > 26e6
    assert found["code_bytes"] == sum((REPO / name).stat().st_size for name in train_gpt.CODE_FILES)
    assert (found["cuda"], found["loaded"]) == (False, [])
    assert not list(tmp_path.iterdir())


def absent(*packages: str):
    """Blocks the import of these packages, loaded or not, in this process."""
    loaded = {name for name in sys.modules if name.partition(".")[0] in packages}
    return modules_replaced(dict.fromkeys({*loaded, *packages}))


@pytest.mark.parametrize(
    ("package", "changes"),
    [
        ("sentencepiece", {}),
        ("safetensors", {}),
        ("zstandard", {}),
        ("brotli", {"COMPRESSOR": "brotli"}),
    ],
)
def test_run_without_a_package_it_needs_ends_before_training(run_main, tiny_data, tmp_path, package, changes):
    with absent(package):
        outcome = run_main(tiny_environ(tiny_data, tmp_path, **changes))
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert f"needs the package {package!r}" in outcome.stderr
    assert f"pip install {package}\n" in outcome.stderr
    assert "train_loss" not in outcome.stdout
    assert not list(tmp_path.glob("*.ptz"))


@pytest.mark.parametrize("package", ["zstandard", "safetensors"])
def test_scoring_an_artifact_names_the_package_it_needs(run_main, tiny_run: Run, tmp_path, package):
    changes = dict(EVAL_ONLY="1", ARTIFACT=str(tiny_run.artifact), OUT_DIR=str(tmp_path))
    with absent(package):
        outcome = run_main(tiny_run.environ | changes)
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    assert f"needs the package {package!r}" in outcome.stderr


def test_packages_of_other_settings_are_not_needed(run_main, tiny_run: Run, tmp_path):
    changes = dict(EVAL_ONLY="1", ARTIFACT=str(tiny_run.artifact), OUT_DIR=str(tmp_path), TTT_ENABLED="0")
    with absent("flash_attn", "flash_attn_interface", "triton", "brotli"):
        outcome = run_main(tiny_run.environ | changes)
    assert (outcome.returncode, outcome.stderr) == (0, "")


def test_flash_attention_is_needed_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    device = torch.device("cuda", 0)
    with absent("flash_attn_interface", "kernels"):
        with pytest.raises(train_gpt.UserError, match="needs the package 'flash_attn_interface'"):
            train_gpt.choose_attention("fa3", device)
        assert train_gpt.choose_attention("auto", device)[0] == "sdpa"


class Kernels(types.ModuleType):
    """Stands for the package `kernels`: its cache of downloads, what it was asked for, and what it went to fetch."""

    def __init__(self, cached: types.ModuleType | Exception):
        super().__init__("kernels")
        self.cached, self.fetched, self.asked = cached, [], []
        self.hub = types.ModuleType("huggingface_hub.constants")
        vars(self.hub).update(HF_HUB_OFFLINE=False)

    def get_kernel(self, repository: str, **_: object) -> types.ModuleType:
        self.asked.append(repository)
        if not vars(self.hub)["HF_HUB_OFFLINE"]:
            self.fetched.append(repository)
        if isinstance(self.cached, Exception):
            raise self.cached
        return self.cached


def flash(answer: object) -> types.ModuleType:
    """A package with FlashAttention that gives this answer."""
    module = types.ModuleType("flash")
    vars(module)["flash_attn_func"] = lambda *_tensors, causal: answer if causal else None
    return module


@pytest.mark.parametrize("choice", ["auto", "fa3"])
@pytest.mark.parametrize(
    ("installed", "cached", "expected"),
    [
        (True, flash("cached"), ("fa3", "installed")),
        (False, flash("cached"), ("fa3", "cached")),
        (False, FileNotFoundError("no local snapshot"), ("sdpa", None)),
        (False, ValueError("no such version"), ("sdpa", None)),
        (False, ImportError("undefined symbol"), ("sdpa", None)),
        (False, RuntimeError("another architecture"), ("sdpa", None)),
    ],
)
def test_a_cached_kernel_comes_after_the_package_and_is_never_fetched(monkeypatch, choice, installed, cached, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    kernels = Kernels(cached)
    modules = {"kernels": kernels, "huggingface_hub.constants": kernels.hub}
    modules["flash_attn_interface"] = flash("installed") if installed else None
    device = torch.device("cuda", 0)
    with modules_replaced(modules):
        if choice == "fa3" and expected[0] != "fa3":
            with pytest.raises(train_gpt.UserError, match=f"'flash_attn_interface'.*'kernels' \\({cached}"):
                train_gpt.choose_attention(choice, device)
        else:
            backend, attend = train_gpt.choose_attention(choice, device)
            assert backend == expected[0]
            half, full = (torch.ones(3, 1, 2, 1, 8, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
            assert backend == "sdpa" or attend(*half) == expected[1]
            assert torch.equal(attend(*full), full[0])  # no kernel of 16 bits is asked for fp32
    assert kernels.fetched == []
    assert kernels.asked == ([] if installed else ["kernels-community/flash-attn3"])
    assert train_gpt.choose_attention("auto", torch.device("cpu"))[0] == "blocks"


def test_triton_is_needed_only_to_compile_for_cuda():
    runtime = train_gpt.Runtime(train_gpt.Config(device="cpu"), {})
    compiled, eager = train_gpt.Config(compile=True), train_gpt.Config(compile=False)
    with absent("triton"):
        assert train_gpt.wants_compile(compiled, runtime)
        assert not train_gpt.wants_compile(train_gpt.Config(), runtime)
        runtime.device = torch.device("cuda", 0)
        assert not train_gpt.wants_compile(eager, runtime)
        for config in (compiled, train_gpt.Config()):
            with pytest.raises(train_gpt.UserError, match=r"'triton'.*pip install triton"):
                train_gpt.wants_compile(config, runtime)
