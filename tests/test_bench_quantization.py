"""The benchmark of quantization runs to its end in seconds and reports what it was asked for."""

import json
import runpy
import statistics
import sys

import pytest
import torch
from golden_support import golden_tensor
from support import REPO

import train_gpt


@pytest.fixture(scope="module")
def result(tiny_data, tmp_path_factory):
    """One quick run within this process: the JSON that it wrote, which must be its last line too."""
    out = tmp_path_factory.mktemp("bench") / "result.json"
    arguments = ["quantization.py", "--data", tiny_data, "--tokenizer", tiny_data / "tokenizer.model", "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, arguments), "--quick"])
        runpy.run_path(str(REPO / "bench" / "quantization.py"), run_name="__main__")
    return json.loads(out.read_text())


def test_every_choice_has_its_row(result):
    names = ("qat", "crown_q_lambda", "soft_rounding", "bits", "quantizer")
    ways = [tuple(row[name] for name in names) for row in result["rows"]]
    lambdas = result["settings"]["crown_q"]
    trained = [(False, 0.0, False), *((True, crown_q_lambda, False) for crown_q_lambda in lambdas), (True, 0.0, True)]
    assert ways == [(*way, 6, quantizer) for way in trained for quantizer in ("lite", "gptq")]
    assert len(lambdas) == 3
    assert {"machine", "commit", "seconds", "branch_step"} <= set(result)
    assert {"python", "torch", "hardware", "threads"} <= set(result["machine"])


def test_branches_share_their_beginning_and_differ_in_their_end(result):
    """The penalty of the last choice is strong enough to be seen; the tax is the difference that it is said to be."""
    before = {(row["qat"], row["crown_q_lambda"], row["soft_rounding"]): row["before"] for row in result["rows"]}
    assert max(before.values()) - min(before.values()) < 0.1
    assert len(set(before.values())) == len(before)
    assert before[True, 0.0, False] == pytest.approx(before[True, 0.01, False], abs=1e-6)
    for row in result["rows"]:
        assert row["tax"] == row["after"] - row["before"]
        assert 0 != abs(row["tax"]) < 0.05
        assert row["artifact_bytes"] > 10_000
        assert 0 < row["divergence"] < 0.05
    for lite, gptq in zip(result["rows"][::2], result["rows"][1::2]):
        assert gptq["divergence"] < lite["divergence"]


def test_soft_rounding_is_the_recorded_one():
    quantization = runpy.run_path(str(REPO / "bench" / "quantization.py"))
    weight = golden_tensor("quant", "in/W1")
    scale = (torch.quantile(weight.abs(), 0.9995, dim=-1, keepdim=True) / 15).clamp_min(1 / 15)
    soft = quantization["soft_round"]((weight / scale).clamp(-15, 15), 8.0) * scale
    torch.testing.assert_close(soft, golden_tensor("quant", "fq/700_softround_int5_alpha8/w_eff"), rtol=0, atol=1e-5)
    assert (soft - weight).abs().max() > 0.01


def test_soft_rounding_becomes_the_grid_of_the_artifact():
    """Between the identity and rounding, with the gradient of what it computes; on a level it stays there."""
    quantization = runpy.run_path(str(REPO / "bench" / "quantization.py"))
    weight, grid = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), train_gpt.Grid(5)
    hard, rounding = grid.round_trip(weight), quantization["SoftRounding"]()
    errors = []
    for rounding.sharpness in (1e-3, 1.0, 16.0, 1e4):
        errors.append((rounding(weight, 5) - hard).abs().mean().item())
        torch.testing.assert_close(rounding(hard, 5), hard)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx((weight - hard).abs().mean().item(), rel=1e-3)
    assert errors[-1] < 1e-3 * errors[0]
    x = torch.linspace(-3.2, 3.3, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: quantization["soft_round"](x, 3.0), x)


def test_committed_figures_keep_the_limits():
    """At most 0.004 bpb by GPTQ and 0.008 by plain rounding."""
    found = json.loads((REPO / "bench" / "results" / "cpu-quantization.json").read_text())
    assert all(row["tax"] <= {"gptq": 0.004, "lite": 0.008}[row["quantizer"]] for row in found["rows"])
    trained = [row for row in found["rows"] if row["qat"] and not row["soft_rounding"] and row["crown_q_lambda"] == 0]
    means = [statistics.fmean(row["after"] for row in found["rows"] if row["soft_rounding"]),
             statistics.fmean(row["after"] for row in trained)]  # fmt: skip
    page = (REPO / "docs" / "results.md").read_text(encoding="utf-8")
    assert "its artifacts have {:.4f} bpb in the mean, straight-through QAT's {:.4f}.".format(*means) in page


def test_committed_packing_is_near_the_entropy_and_below_other_compressors():
    found = json.loads((REPO / "bench" / "results" / "cpu-packing.json").read_text())
    for levels in (found["artifact"], found["drawn"]):
        sizes = {row["layout"]: row for row in levels["layouts"]}
        ours = sizes.pop("ans")["zstd_bytes"]
        assert ours <= 1.01 * levels["bound_per_tensor"]
        assert ours <= min(row[name] for row in sizes.values() for name in ("zstd_bytes", "brotli_bytes", "lzma_bytes"))
