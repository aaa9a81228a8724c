"""The benchmark of quantization runs to its end in seconds and reports what it was asked for."""

import json
import runpy
import sys

import pytest
from support import REPO


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
    ways = [(row["qat"], row["crown_q_lambda"], row["bits"], row["quantizer"]) for row in result["rows"]]
    lambdas = result["settings"]["crown_q"]
    trained = [(False, 0.0), *((True, crown_q_lambda) for crown_q_lambda in lambdas)]
    assert ways == [(*way, 6, quantizer) for way in trained for quantizer in ("lite", "gptq")]
    assert len(lambdas) == 3
    assert {"machine", "commit", "seconds", "branch_step"} <= set(result)
    assert {"python", "torch", "hardware", "threads"} <= set(result["machine"])


def test_branches_share_their_beginning_and_differ_in_their_end(result):
    """The penalty of the last choice is strong enough to be seen; the tax is the difference that it is said to be."""
    before = {(row["qat"], row["crown_q_lambda"]): row["before"] for row in result["rows"]}
    assert max(before.values()) - min(before.values()) < 0.1
    assert before[False, 0.0] != before[True, 0.0] != before[True, 1e5]
    for row in result["rows"]:
        assert row["tax"] == row["after"] - row["before"]
        assert 0 != abs(row["tax"]) < 0.05
        assert row["artifact_bytes"] > 10_000
        assert 0 < row["divergence"] < 0.05
    for lite, gptq in zip(result["rows"][::2], result["rows"][1::2]):
        assert gptq["divergence"] < lite["divergence"]
