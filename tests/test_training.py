"""Whole runs: the same on every world size and on every repeat, ended by the clock, and told truly by their logs."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_whole
from support import (
    REPO,
    VAL_TARGETS,
    Run,
    Terminal,
    artifact_of,
    artifact_parts,
    event,
    events_of,
    read_events,
    run_script,
    tiny_environ,
    train_rows,
)

import train_gpt
from train_gpt import BANK_NAMES, Config, load_artifact


def names_of(events: list[dict]) -> list[tuple[str, int | None]]:
    """What happened, and at which step."""
    return [(row["event"], row.get("step")) for row in events]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_artifact(folder / "final_model.int6.ptz")[0].state_dict()


def same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def trajectory(rows: list[dict]) -> list[tuple]:
    """What training computed, without what the clock says."""
    return [(row["step"], row["train_loss"], row["grad_norm"], row["lr_scale"], row["qat"]) for row in rows]


@pytest.fixture
def train(run_main, tiny_data, tmp_path):
    """Train in this process with the tiny settings, changed as asked; gives the events and the folder."""
    counter = itertools.count()

    def run(**overrides) -> tuple[list[dict], Path]:
        out_dir = tmp_path / str(next(counter))
        outcome = run_main(tiny_environ(tiny_data, out_dir, **overrides))
        assert outcome.returncode == 0, outcome.stderr
        return read_events(out_dir / "logs" / "run.jsonl"), out_dir

    return run


# ---- world sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nproc", [2, 3, 4])
def test_every_world_size_takes_the_same_steps(tiny_run: Run, tmp_path, nproc):
    """The batch is 12 sequences; micro-batches, bank padding and validation shares differ with each world size."""
    environ = {**tiny_run.environ, "OUT_DIR": str(tmp_path)}
    process = (run_script if nproc == 2 else run_whole)(environ, nproc)  # once by torchrun, as users do
    assert process.returncode == 0, process.stderr
    alone, together = tiny_run.events, events_of(environ)
    assert names_of(together) == names_of(alone)
    rows, expected = train_rows(together), train_rows(alone)
    assert len(rows) == 20
    for row, other in zip(rows, expected, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert (row["lr_scale"], row["qat"]) == (other["lr_scale"], other["qat"])
    for row, other in zip(together, alone, strict=True):
        if "val_bpb" in row:
            assert row["val_bpb"] == pytest.approx(other["val_bpb"], abs=1e-4), row["event"]
    assert f"world_size:{nproc} " in process.stdout
    micro = event(together, "batch")["grad_accum_steps"]
    assert micro == {2: 2, 3: 1, 4: 1}[nproc]
    assert process.stdout.count("final_int8_zlib_roundtrip_exact") == 1  # rank 0 alone speaks


def test_the_run_learns(tiny_run: Run):
    """Without this the comparisons of trajectories would mean nothing."""
    losses = [row["train_loss"] for row in train_rows(tiny_run.events)]
    assert losses[0] == pytest.approx(math.log(384), abs=0.05)
    assert losses[-1] < losses[0] - 1


# ---- repeats -----------------------------------------------------------------------------------------------------


def test_one_seed_gives_one_run_and_another_seed_another(run_main, tiny_data, tiny_run: Run, tmp_path):
    """Bit for bit, in this process and against the run in a process of its own."""
    trajectories, weights = [], []
    for number, seed in enumerate((1337, 1337, 1338)):
        environ = tiny_environ(tiny_data, tmp_path / str(number), SEED=seed, VAL_LOSS_EVERY=10)
        assert run_main(environ).returncode == 0
        trajectories.append(trajectory(train_rows(events_of(environ))))
        weights.append(weights_of(tmp_path / str(number)))
    assert trajectories[0] == trajectories[1] == trajectory(train_rows(tiny_run.events))
    assert same_weights(weights[0], weights[1])
    assert same_weights(weights[0], weights_of(tiny_run.out_dir))
    assert trajectories[0][0] != trajectories[2][0]
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in BANK_NAMES)


@pytest.mark.parametrize(
    "overrides",
    [
        {"WARMUP_STEPS": 2, "COMPILE": 1}, {"VAL_LOSS_EVERY": 3}, {"VAL_TOKENS": 100, "EVAL_STRIDE": 32},
        {"EVAL_BATCH_SEQS": 3},
    ],
    ids=["warmup", "validation", "less validation", "evaluation batch"],
)  # fmt: skip
def test_what_must_not_change_training(train, tiny_run: Run, overrides, monkeypatch):
    """Warm-up steps (with QAT on and off) are undone to the bit, and validation only looks."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # another sum's order is no warm-up's fault
    changed, folder = train(TTT_ENABLED=0, **overrides)
    assert trajectory(train_rows(changed)) == trajectory(train_rows(tiny_run.events))
    assert same_weights(weights_of(folder), weights_of(tiny_run.out_dir))
    if "WARMUP_STEPS" in overrides:
        assert event(changed, "warmup")["steps"] == 2
    if overrides.get("VAL_LOSS_EVERY"):
        steps = [row["step"] for row in changed if row["event"] == "step_validation"]
        assert steps == [3, 6, 9, 12, 15, 18, 20]


@pytest.mark.parametrize("accumulated", [1, 2, 12])
def test_micro_batches_change_nothing(train, tiny_run: Run, accumulated):
    changed, _ = train(MICRO_BATCH_TOKENS=12 * 32 // accumulated, TTT_ENABLED=0)
    assert event(changed, "batch")["grad_accum_steps"] == accumulated
    for row, other in zip(train_rows(changed), train_rows(tiny_run.events), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)


# ---- the schedule ------------------------------------------------------------------------------------------------


def check_cap(events: list[dict], cap_ms: float) -> None:
    rows = train_rows(events)
    stop = event(events, "stopping_early: wallclock_cap")
    times = [0.0, *(row["train_time_ms"] for row in rows)]
    longest = max(after - before for before, after in itertools.pairwise(times))
    assert cap_ms <= stop["train_time_ms"] <= cap_ms + 1.5 * longest
    assert stop["step"] == len(rows)
    assert (rows[-1]["step"], rows[-1]["steps"]) == (stop["step"], 1_000_000)
    assert times[-2] < cap_ms  # the last step began inside the budget
    assert rows[0]["lr_scale"] == 1
    assert rows[-1]["lr_scale"] < 1  # the schedule ran down by the clock, far from the last iteration


def test_the_clock_ends_a_run_within_a_step(train):
    events, folder = train(MAX_WALLCLOCK_SECONDS=0.6, ITERATIONS=1_000_000, WARMDOWN_ITERS=5, VAL_LOSS_EVERY=4)
    check_cap(events, 600)
    assert (folder / "final_model.int6.ptz").exists()
    assert "val_bpb" in event(events, "final_int8_zlib_roundtrip_exact")


def test_the_clock_stands_still_while_validating(train, at_line):
    for step in (2, 4):
        at_line(f"step:{step}/6 val_loss:", lambda: time.sleep(0.7))
    events, _ = train(ITERATIONS=6, VAL_LOSS_EVERY=2, MAX_WALLCLOCK_SECONDS=60)
    assert all(row["train_time_ms"] < 700 for row in events if row["event"] in ("step", "step_validation"))


def test_two_ranks_stop_at_the_same_step(tiny_data, tmp_path):
    """Each asking its own clock, they would wait for each other for ever."""
    environ = tiny_environ(
        tiny_data, tmp_path, MAX_WALLCLOCK_SECONDS=0.6, ITERATIONS=1_000_000, WARMDOWN_ITERS=5, VAL_LOSS_EVERY=7
    )
    process = run_whole(environ, 2)
    assert process.returncode == 0, process.stderr
    check_cap(events_of(environ), 600)


def test_a_run_that_ends_by_iterations_does_not_claim_the_clock(tiny_run: Run):
    assert not [row for row in tiny_run.events if row["event"].startswith("stopping_early")]


def test_learning_rate_falls_to_zero_over_the_last_steps(tiny_run: Run):
    scales = [row["lr_scale"] for row in train_rows(tiny_run.events)]
    assert scales == pytest.approx([1.0] * 10 + [(10 - i) / 10 for i in range(10)])


def test_quantization_aware_training_begins_at_its_threshold(train):
    without, _ = train(LATE_QAT_THRESHOLD=0)
    late, _ = train(LATE_QAT_THRESHOLD=0.5)
    switched = event(late, "qat_on")
    assert (switched["step"], switched["codec"]) == (16, "int6")
    assert switched["lr_scale"] == pytest.approx(0.4)
    assert [row["qat"] for row in train_rows(late)] == [0] * 16 + [1] * 4
    losses, others = ([row["train_loss"] for row in train_rows(events)] for events in (late, without))
    assert losses[:16] == others[:16]
    assert losses[16] != others[16]  # the same weights, seen through the grid
    assert not [row for row in without if row["event"] == "qat_on"]
    assert {row["qat"] for row in train_rows(without)} == {0}


def test_quantization_aware_training_from_the_start(train):
    always, _ = train(LATE_QAT_THRESHOLD=1, WARMUP_STEPS=1)
    never, _ = train(LATE_QAT_THRESHOLD=1, QAT_BITS=0)
    assert {row["qat"] for row in train_rows(always)} == {1}
    assert {row["qat"] for row in train_rows(never)} == {0}


def test_weight_averages(train):
    """Each kind is named, is what gets exported, and differs from the last weights."""
    losses = {}
    cases = dict(
        ema=dict(WEIGHT_AVERAGE="ema"),
        swa=dict(WEIGHT_AVERAGE="swa", SWA_EVERY=2, SWA_START_SCALE=0.9),
        last=dict(WEIGHT_AVERAGE="none"),
        empty=dict(WEIGHT_AVERAGE="swa", SWA_EVERY=2, SWA_START_SCALE=0),
    )
    labels = dict(ema="post_ema", swa="post_swa", last="last_weights", empty="last_weights")
    for name, overrides in cases.items():
        events, _ = train(**overrides)
        losses[name] = event(events, "diagnostic")["val_loss"]
        assert event(events, "diagnostic")["weights"] == labels[name]
        last = next(row["val_loss"] for row in events if row["event"] == "step_validation" and row["step"] == 20)
        assert (losses[name] == last) == (name in ("last", "empty"))
        assert event(events, "final_int6_roundtrip")["val_loss"] == pytest.approx(losses[name], abs=0.02)
    assert losses["last"] == losses["empty"]
    assert len({losses["ema"], losses["swa"], losses["last"]}) == 3


@pytest.mark.parametrize(
    "overrides",
    [
        dict(NUM_LAYERS=1, VE_LAYERS="", TTT_FREEZE_BLOCKS=0),
        dict(TIE_EMBEDDINGS=0, MTP_NUM_HEADS=0),
        dict(MTP_NUM_HEADS=3, TRAIN_SEQ_LEN=4, EVAL_SEQ_LEN=7, EVAL_STRIDE=3),
        dict(ROPE_DIMS=0, XSA_LAST_N=3, SMEAR_BOS_MASK=0, LN_SCALE=0, LEAKY_SLOPE=0),
        dict(QAT_BITS=5, GRAD_CLIP_NORM=0, BIGRAM_VOCAB_SIZE=2),
        dict(EVAL_SEQ_LEN=5000, EVAL_STRIDE=5000),
    ],
)
def test_unusual_settings_run_to_the_end(train, overrides):
    events, _ = train(ITERATIONS=3, **overrides)
    final = events[-1]
    assert final["event"] == "final_int8_zlib_roundtrip_exact"
    assert math.isfinite(final["val_bpb"])
    assert f"final_int{overrides.get('QAT_BITS', 6)}_sliding_window" in {row["event"] for row in events}


# ---- the artifact, later and elsewhere ---------------------------------------------------------------------------


def test_the_artifact_scores_the_same_in_a_bare_new_process(tiny_run: Run, tmp_path):
    """Nothing of the training run but the file: no settings of the model, no training shards, another folder."""
    for name in ("tokenizer.model", "tiny_val_000000.bin", "tiny_val_000001.bin"):
        shutil.copy(Path(tiny_run.environ["DATA_PATH"]) / name, tmp_path / name)
    shutil.copy(tiny_run.artifact, tmp_path / "sent.ptz")
    kept = {name: value for name, value in tiny_run.environ.items() if name in ("PATH", "HOME", "OMP_NUM_THREADS")}
    settings = dict(RECIPE="leaky", EVAL_ONLY="1", ARTIFACT="sent.ptz", RUN_ID="run")
    settings |= dict(DATA_PATH=".", TOKENIZER_PATH="tokenizer.model")
    of_the_run = ("VOCAB_SIZE", "EVAL_SEQ_LEN", "EVAL_STRIDE", "DEVICE", "COMPUTE_DTYPE")
    settings |= {name: tiny_run.environ[name] for name in of_the_run}
    environ = {**kept, **settings, "OUT_DIR": str(tmp_path / "out"), "EVAL_BATCH_SEQS": "16"}
    process = run_script(environ, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    scored = events_of(environ)
    for name in ("final_int6_roundtrip_exact", "final_int6_sliding_window_exact", "final_int8_zlib_roundtrip_exact"):
        assert event(scored, name) | {"time": ""} == event(tiny_run.events, name) | {"time": ""}
    assert not train_rows(scored)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["logs"]


def test_a_part_of_the_split_says_so_wherever_a_result_is_shown(train):
    events, folder = train(VAL_TOKENS=500, ITERATIONS=3, VAL_LOSS_EVERY=2)
    results = [row for row in events if "val_bpb" in row and row["event"] != "ttt_chunk"]
    assert len(results) == 10
    assert all(row["note"] == "partial" for row in results)
    lines = (folder / "logs" / "run.txt").read_text(encoding="utf-8").split("===== log =====\n")[1].splitlines()
    shown = [line for line in lines if "val_bpb:" in line]
    assert len(shown) == 10
    assert all(line.split()[-1] == "partial" for line in shown)
    assert event(events, "validation")["targets"] == 500


# ---- logs --------------------------------------------------------------------------------------------------------


def test_the_log_is_the_source_then_what_the_console_showed(tiny_run: Run):
    names = ("train_gpt.py", "swarm_agents.py", "kg_data.py")
    sources = [f"===== {name} =====\n{(REPO / name).read_text(encoding='utf-8')}\n" for name in names]
    assert tiny_run.log == "".join([*sources, "===== log =====\n", tiny_run.process.stdout])
    assert tiny_run.process.stderr == ""
    assert tiny_run.log.endswith("\n")
    assert tiny_run.log.splitlines()[-1].startswith("final_int8_zlib_roundtrip_exact val_loss:")


def test_results_agree_with_each_other(tiny_run: Run):
    events = tiny_run.events
    final, sliding = events[-1], event(events, "final_int6_sliding_window_exact")
    assert final["event"] == "final_int8_zlib_roundtrip_exact"
    assert (final["val_loss"], final["val_bpb"]) == (sliding["val_loss"], sliding["val_bpb"])
    validation = event(events, "validation")
    assert validation["targets"] == VAL_TARGETS
    for row in events:
        if "val_bpb" in row:
            nats_per_byte = row["val_loss"] * validation["targets"] / validation["bytes"]
            assert row["val_bpb"] == pytest.approx(nats_per_byte / math.log(2))
    roundtrip = event(events, "final_int6_roundtrip_exact")
    assert sliding["val_loss"] != roundtrip["val_loss"]
    assert event(events, "diagnostic")["val_loss"] == pytest.approx(roundtrip["val_loss"], abs=0.02)


def test_the_ledger_is_what_lies_on_disk(tiny_run: Run):
    code = sum((REPO / name).stat().st_size for name in ("train_gpt.py", "swarm_agents.py", "kg_data.py")
               if (REPO / name).exists())  # fmt: skip
    size = tiny_run.artifact.stat().st_size
    for line in (
        rf"Serialized model int6\+zstd: {size} bytes",
        rf"Code size: {code} bytes",
        rf"Total submission size int6\+zstd: {code + size} bytes",
    ):
        assert re.search(f"^{line}$", tiny_run.process.stdout, re.MULTILINE), line


def test_the_limit_is_the_last_size_that_fits(run_main, tiny_data, tmp_path, monkeypatch):
    """The artifact of a run that goes on is counted as well."""
    environ = tiny_environ(tiny_data, tmp_path, ITERATIONS=1, TTT_ENABLED=0, RESUME="auto", FIT_BYTES=0)
    assert run_main(environ).returncode == 0
    total = event(read_events(tmp_path / "logs" / "run.jsonl"), "total_bytes")["bytes"]
    for limit, code in ((total, 0), (total - 1, 2)):
        monkeypatch.setattr(train_gpt, "SIZE_LIMIT_BYTES", limit)
        outcome = run_main(environ)
        assert outcome.returncode == code, outcome.stderr
        assert f"Total submission size int6+zstd: {total} bytes" in outcome.stdout
    assert re.search(rf"\b1 bytes over {total - 1}\b.*FIT_BYTES=1.*fewer layers", outcome.stderr)


def test_what_cannot_be_made_to_fit_is_packed_once(run_main, tiny_data, tmp_path, monkeypatch):
    packed, fit = [], train_gpt.fit_artifact
    monkeypatch.setattr(train_gpt, "SIZE_LIMIT_BYTES", train_gpt.code_bytes() + 100)
    monkeypatch.setattr(train_gpt, "fit_artifact", lambda *arguments: (packed.append(1), fit(*arguments))[1])
    outcome = run_main(tiny_environ(tiny_data, tmp_path, ITERATIONS=1, FIT_BYTES=1))
    assert (outcome.returncode, len(packed)) == (2, 1)
    assert outcome.stderr.startswith("error: FIT_BYTES=1 leaves ")


def test_too_large_ends_the_run_before_scoring_unless_it_may_be_made_to_fit(
    run_main, tiny_run: Run, tiny_data, tmp_path, monkeypatch
):
    """With another compressor than the default one, which the ledger names and the loader finds out by itself."""
    monkeypatch.setattr(train_gpt, "SIZE_LIMIT_BYTES", train_gpt.code_bytes() + tiny_run.artifact.stat().st_size - 2000)
    settings = dict(ITERATIONS=3, COMPRESSOR="brotli", FIT_BYTES=0)
    outcome = run_main(tiny_environ(tiny_data, tmp_path, **settings))
    assert outcome.returncode == 2
    assert "Serialized model int6+brotli" in outcome.stdout
    assert "final_int6" not in outcome.stdout
    assert re.fullmatch(r"error: the submission is \d+ bytes over \d+; set FIT_BYTES=1 .*\n", outcome.stderr)
    outcome = run_main(tiny_environ(tiny_data, tmp_path, **(settings | dict(FIT_BYTES=1, RUN_ID="fitted"))))
    assert outcome.returncode == 0, outcome.stderr
    events = read_events(tmp_path / "logs" / "fitted.jsonl")
    total, fitted = next(row for row in events if "limit" in row and "bytes" in row), event(events, "packing")
    assert total["bytes"] <= train_gpt.SIZE_LIMIT_BYTES
    assert fitted["clip_std"] > 3
    assert math.isfinite(event(events, "final_int8_zlib_roundtrip_exact")["val_bpb"])


def test_an_artifact_of_other_code_is_scored_with_a_note(run_main, tiny_run: Run, tiny_data, tmp_path):
    environ = tiny_environ(tiny_data, tmp_path, EVAL_ONLY=1, ARTIFACT=tiny_run.artifact)
    before = run_main(environ)
    metadata, tensors = artifact_parts(tiny_run.artifact.read_bytes())
    (tmp_path / "other.ptz").write_bytes(artifact_of(metadata | {"code": "0" * 16}, tensors))
    after = run_main(environ | {"ARTIFACT": str(tmp_path / "other.ptz")})
    assert before.returncode == after.returncode == 0
    assert "note: other code" not in before.stdout
    assert re.search(r"\nnote: other code wrote this artifact \(0{16}\) than reads it \([0-9a-f]{16}\)\n", after.stdout)
    assert before.stdout.splitlines()[-1] == after.stdout.splitlines()[-1]


NUMBER = r"\d+\.\d{4}"
EXACT = r"\d+\.\d{8}"
LINES = [
    r"environment python:\d+\.\d+\.\S+ torch:\S+ cuda:\S+ world_size:1 device:cpu .* attention:blocks",
    r"config recipe:leaky seed:1337 .*matrix_lr:0\.027.*",
    r"validation targets:\d+ bytes:\d+ digest:[0-9a-f]{16}",
    r"track:adaptive",
    r"train_shards count:2 tokens:\d+",
    r"model parameters:\d+",
    rf"step:7/20 train_loss:{NUMBER} train_time:\d+ms step_avg:\d+\.\d\dms .*",
    rf"step:10/20 val_loss:{NUMBER} val_bpb:{NUMBER} train_time:\d+ms step_avg:\d+\.\d\dms",
    rf"step:20/20 val_loss:{NUMBER} val_bpb:{NUMBER} train_time:\d+ms step_avg:\d+\.\d\dms",
    r"peak memory allocated: \d+ MiB.*",
    rf"DIAGNOSTIC post_ema val_loss:{NUMBER} val_bpb:{NUMBER} eval_time:\d+ms",
    rf"packing payload:\d+ order0_entropy:\d+ ratio:{NUMBER} clip_std:{NUMBER} .*prune_fraction:{NUMBER}",
    r"quantization time:\d+\.\ds .*",
    r"Serialized model int6\+zstd: \d+ bytes",
    r"Code size: \d+ bytes.*",
    r"Total submission size int6\+zstd: \d+ bytes.*",
    rf"final_int6_roundtrip val_loss:{NUMBER} val_bpb:{NUMBER} eval_time:\d+ms",
    rf"final_int6_roundtrip_exact val_loss:{EXACT} val_bpb:{EXACT}",
    r"evaluation_projected total:\d+\.\ds budget:600\.0s",
    rf"final_int6_sliding_window val_loss:{NUMBER} val_bpb:{NUMBER} stride:8 eval_time:\d+ms",
    rf"final_int6_sliding_window_exact val_loss:{EXACT} val_bpb:{EXACT} stride:8",
    rf"legal_ttt val_loss:{NUMBER} val_bpb:{NUMBER} rank:0 chunk:32768 eval_time:\d+ms",
    rf"legal_ttt_exact val_loss:{EXACT} val_bpb:{EXACT} rank:0 chunk:32768",
    r"evaluation total:\d+\.\ds budget:600\.0s",
    rf"final_int8_zlib_roundtrip_exact val_loss:{EXACT} val_bpb:{EXACT} valid:True",
]


def test_the_established_lines_are_there_once_each_and_in_order(tiny_run: Run):
    lines = tiny_run.process.stdout.splitlines()
    found = [[i for i, line in enumerate(lines) if re.fullmatch(pattern, line)] for pattern in LINES]
    assert [len(places) for places in found] == [1] * len(LINES), dict(zip(LINES, found, strict=True))
    assert found == sorted(found)


HEADS: dict[str, str] = {  # how the line of a row begins, where that is not the event's name
    "track": "track:{track}", "step": "step:{step}/{steps}", "step_validation": "step:{step}/{steps}",
    "diagnostic": "DIAGNOSTIC {weights}", "memory": "peak memory allocated: {peak_mib} MiB (process, resident)",
    "artifact_bytes": "Serialized model int6+zstd: {bytes} bytes", "code_bytes": "Code size: {bytes} bytes",
    "total_bytes": "Total submission size int6+zstd: {bytes} bytes",
}  # fmt: skip
UNSAID = ("ttt_chunk", "tensor_bytes", "vote")  # rows for machines alone
FOR_MACHINES = {"event", "time", "stage", "tokens_per_s", "limit", "files"}


def test_jsonl_has_the_numbers_of_the_log(tiny_run: Run):
    """Line by line, in its order: every field of every row is in its line, to the digits shown."""
    lines = [line for line in tiny_run.process.stdout.splitlines() if not line.startswith("note: ")]
    rows = [row for row in tiny_run.events if row["event"] not in UNSAID]
    compared = 0
    for row, line in zip(rows, lines, strict=True):
        head = HEADS.get(str(row["event"]), str(row["event"]))
        assert (line + " ").startswith(head.format(**row) + " ")
        fields = {key: row[key] for key in row.keys() - FOR_MACHINES - {*re.findall(r"{(\w+)}", head)}}
        if row["event"] == "config":
            assert fields == json.loads(json.dumps(dataclasses.asdict(Config.from_env(tiny_run.environ))))
            continue
        for key, value in fields.items():
            if key == "note" or value is None or isinstance(value, str | bool):
                assert str(value) in line
                continue
            shown = re.search(rf" {re.sub('_m?s$', '', key)}:(-?\d+\.?(\d*))(ms|s)?(?= |$)", line)
            assert shown, f"{key} is not in {line!r}"
            assert (shown[3] or "") == (re.findall("_(m?s)$", key) or [""])[0]
            assert abs(float(shown[1]) - value) <= 0.501 * 10 ** -len(shown[2])
            compared += 1
    assert compared > 150


def test_rows_say_when_they_were_written(tiny_run: Run):
    times = [row["time"] for row in tiny_run.events]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time) for time in times)
    assert times == sorted(times)
    ended = datetime.datetime.fromisoformat(times[-1].replace("Z", "+00:00")).timestamp()
    assert abs(ended - (tiny_run.out_dir / "logs" / "run.jsonl").stat().st_mtime) < 1  # in UTC, wherever it ran


def test_rows_tell_machines_what_their_names_once_did(tiny_run: Run):
    for row in train_rows(tiny_run.events):
        assert row["tokens_per_s"] == pytest.approx(row["step"] * 12 * 32 / (row["train_time_ms"] / 1000))
    stages = [row["stage"] for row in tiny_run.events if row["event"].endswith("_exact") and "stage" in row]
    assert stages == ["roundtrip", "sliding_window", "ttt"]
    # A quarter of a window's targets are new and TTT trains on each chunk three times.
    first_s = event(tiny_run.events, "final_int6_roundtrip")["eval_time_ms"] / 1000
    assert event(tiny_run.events, "evaluation_projected")["total_s"] == pytest.approx(first_s * (1 + 4 + (4 + 3 * 3)))


def test_every_byte_of_the_artifact_belongs_to_a_tensor(tiny_run: Run):
    row = event(tiny_run.events, "tensor_bytes")
    model = load_artifact(tiny_run.artifact)[0]
    assert row["bytes"].keys() == row["codec"].keys() == dict(model.named_parameters()).keys()
    assert sum(row["bytes"].values()) == tiny_run.artifact.stat().st_size
    assert min(row["bytes"].values()) > 0
    assert {row["codec"][name] for name in BANK_NAMES} == {"int6"}


def test_sizes_are_numbers_in_the_jsonl(tiny_run: Run):
    """A machine finds a row by its name; a name that holds a number differs from run to run."""
    sizes = {name: event(tiny_run.events, name)["bytes"] for name in ("artifact_bytes", "code_bytes", "total_bytes")}
    assert sizes["artifact_bytes"] == tiny_run.artifact.stat().st_size
    assert sizes["total_bytes"] == sizes["artifact_bytes"] + sizes["code_bytes"]


def test_a_terminal_gets_a_bar_and_the_files_do_not(train, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    _, folder = train(ITERATIONS=12, TRAIN_LOG_EVERY=6, WARMUP_STEPS=1)
    drawn = terminal.getvalue()
    assert "\r[" in drawn
    assert "] step 12, " in drawn
    assert f"[{'#' * 30}] scored" in drawn
    assert drawn.endswith("\r")  # wiped, so that the shell's prompt begins on a clean line
    for path in (folder / "logs").iterdir():
        content = path.read_bytes()
        written = content.split(b"===== log =====\n")[-1]
        assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", written), path


def test_no_control_characters_without_a_terminal(tiny_run: Run):
    for path in (tiny_run.out_dir / "logs").iterdir():
        assert b"\r" not in path.read_bytes()
        assert b"\x1b" not in path.read_bytes()
    assert not re.search(r"[\r\x1b]", tiny_run.process.stdout + tiny_run.process.stderr)


def test_train_log_every(train):
    """The first ten steps and every n-th after them."""
    events, _ = train(TRAIN_LOG_EVERY=7)
    assert [row["step"] for row in train_rows(events)] == [*range(1, 11), 14]


def test_run_id_names_the_files(train, run_main, tiny_data, tmp_path):
    _, folder = train(ITERATIONS=1, RUN_ID="run")
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["run.jsonl", "run.txt"]
    assert run_main(tiny_environ(tiny_data, tmp_path, ITERATIONS=1, RUN_ID=None)).returncode == 0
    names = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert len(names) == 2
    assert all(re.fullmatch(r"leaky_seed1337_[0-9a-f]{6}\.(txt|jsonl)", name) for name in names)
