"""The five earlier submissions as recipes: their values, their checkpoints, and whole runs at a reduced size."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_support import REPO, make_config, tiny_recipe
from ranks import run_whole
from support import TINY_VOCAB, VAL_TARGETS, Run, event, tiny_environ

import train_gpt
from train_gpt import RECIPES, Config

sys.path.insert(0, str(REPO / "tools"))
import build_kg

# The design's table, row by row: fields, then their values for swarm, backoff, leaky, hedge and smear.
NAMES = ("swarm", "backoff", "leaky", "hedge", "smear")
PULL_REQUESTS = dict(swarm=1081, backoff=1094, leaky=977, hedge=700, smear=150)
ALIKE = object()  # as in the column before
TABLE: list[tuple[tuple[str, ...], tuple[Any, ...]]] = [
    (("num_kv_heads", "mlp_mult"), ((4, 3.0), (4, 3.0), (4, 3.0), (8, 3.5), (4, 3.0))),
    (("leaky_slope",), ((0.75,), (0.75,), (0.75,), (0.5,), (0.0,))),
    (("bigram_vocab_size",), ((2048,), (2048,), (2048,), (6144,), (2048,))),
    (
        ("xsa_last_n", "rope_dims", "ln_scale", "ve_layers"),
        ((4, 16, True, (9, 10)), ALIKE, ALIKE, (11, 16, True, (9, 10)), (0, 0, False, ())),
    ),
    (("rope_base",), ((10_000.0,), ALIKE, ALIKE, ALIKE, (50_000.0,))),
    (("matrix_lr", "warmdown_iters"), ((0.027, 3700), ALIKE, ALIKE, (0.025, 3500), (0.025, 3000))),
    (("mtp_num_heads", "mtp_loss_weight"), ((2, 0.1), (2, 0.1), (0, 0.1), (0, 0.1), (0, 0.1))),
    (("swarm_enabled", "kg_enabled"), ((True, True), (False, False), ALIKE, ALIKE, ALIKE)),
    (
        ("qat_bits", "late_qat_threshold", "crown_q_lambda"),
        ((6, 0.15, 0.0), ALIKE, ALIKE, (5, 0.5, 0.01), (6, 1.0, 0.0)),
    ),
    (
        ("weight_average", "ema_decay", "swa_every", "swa_start_scale"),
        (("ema", 0.997, 50, 0.5), ALIKE, ALIKE, ALIKE, ("swa", 0.997, 50, 0.5)),
    ),
    (
        ("quantizer", "embed_bits", "prune_fraction", "train_reserve_seconds"),
        (("lite", 8, 0.0, 0.0), ALIKE, ALIKE, ("gptq", 8, 0.03, 18.0), ("lite", 16, 0.0, 0.0)),
    ),
    (("ttt_enabled",), ((True,), (False,), (True,), (True,), (True,))),
    (
        ("ttt_optimizer", "ttt_lr", "ttt_epochs", "ttt_chunk_tokens", "ttt_freeze_blocks", "ttt_scope"),
        (("sgd", 0.002, 3, 32_768, 2, "all"), ALIKE, ALIKE, ("adamw", 1e-4, 4, 131_072, 9, "last"),
         ("sgd", 0.002, 3, 32_768, 2, "all")),
    ),
    (("ttt_momentum",), ((0.9,), ALIKE, ALIKE, ALIKE, ALIKE)),
    (
        ("polyak_decay", "ttt_lr_ramp", "ttt_byte_weighted", "ttt_temperature"),
        ((0.0, 1.0, False, 1.0), ALIKE, ALIKE, (0.998, 3.0, True, 0.98), (0.0, 1.0, False, 1.0)),
    ),
    (("mixer",), (("backoff",), ("backoff-published",), ("none",), ("hedge",), ("none",))),
    (("ngram_counts", "entropy_expert"), (("exact", False), ("hashed", False), ("exact", False), ALIKE, ALIKE)),
]  # fmt: skip


@pytest.mark.parametrize("recipe", NAMES)
def test_values_are_those_of_the_designs_table(recipe: str):
    config = Config.from_env({"RECIPE": recipe})
    for fields, row in TABLE:
        cells = list(row)
        for column, cell in enumerate(cells):
            cells[column] = cells[column - 1] if cell is ALIKE else cell
        assert tuple(getattr(config, name) for name in fields) == cells[NAMES.index(recipe)], fields
    assert config.fit_bytes  # a run of ten minutes on eight GPUs must not end at the ledger


def test_nothing_that_a_recipe_sets_is_missing_from_the_table():
    covered = {name for fields, _ in TABLE for name in fields} | {"fit_bytes"}
    of_smear_alone = {"bigram_start_bucket", "zero_init_out", "rope_train_len"}
    for recipe in NAMES:
        assert set(RECIPES[recipe]) <= covered | of_smear_alone, recipe
        defaults = Config()
        for name, value in RECIPES[recipe].items():
            assert value != getattr(defaults, name), f"{recipe} sets {name} to its default"
    assert set(RECIPES) == {*NAMES, "frontier", "laptop", "demo"}


def test_smears_projections_begin_orthogonal_and_scaled():
    model = train_gpt.GPT(make_config(dataclasses.asdict(tiny_recipe("smear"))))
    layers = model.config.num_layers
    for bank, first, scale in (
        (model.qo_bank, layers, 2 * layers), (model.mlp_down_bank, 0, 2 * layers), (model.qo_bank[:layers], 0, 1)
    ):  # fmt: skip
        for matrix in bank[first:]:
            gram = matrix @ matrix.mT if matrix.size(0) <= matrix.size(1) else matrix.mT @ matrix
            torch.testing.assert_close(gram, torch.eye(len(gram)) / scale, atol=1e-5, rtol=0)
    usual = train_gpt.GPT(tiny_recipe("leaky"))
    assert not usual.qo_bank[layers:].any()
    assert not usual.mlp_down_bank.any()


def test_smears_pairs_have_no_bucket_for_the_start():
    ids = torch.tensor([[5, 700, 700, 3], [900, 1, 2, 5]])
    buckets = 2048
    with_bucket = make_config(dict(bigram_vocab_size=buckets))
    without = make_config(dict(bigram_vocab_size=buckets, bigram_start_bucket=False))
    expected = [
        [((36313 * now) ^ (27191 * before)) % (buckets - 1) for before, now in zip([0, *row], row)]
        for row in ids.tolist()
    ]
    assert train_gpt.pair_buckets(ids, without).tolist() == expected
    assert train_gpt.pair_buckets(ids, with_bucket).tolist() == [[buckets - 1, *row[1:]] for row in expected]


def test_smear_never_rescales_rope_and_rotates_whole_heads():
    config = Config.from_env({"RECIPE": "smear"})
    cos, _ = train_gpt.rope_tables(config, 2048, torch.zeros(1))
    assert cos.shape == (1, 2048, 1, config.head_dim // 2)
    slowest = 50_000 ** -((config.head_dim - 2) / config.head_dim)
    assert cos[0, 2047, 0, -1].item() == pytest.approx(math.cos(2047 * slowest), abs=1e-5)


NUMBER = r"-?\d+\.\d+"
RESULT = rf"val_loss:{NUMBER} val_bpb:{NUMBER}"
EVERY_RECIPE = [rf"step:1/12 train_loss:{NUMBER} .*", rf"step:12/12 {RESULT} .*", r"Code size: \d+ bytes"]
TTT = [rf"legal_ttt {RESULT} .*", rf"legal_ttt_exact {RESULT} .*"]


def of_bits(bits: str) -> list[str]:
    names = [f"final_{bits}_roundtrip", f"final_{bits}_sliding_window"]
    return [rf"{name}{exact} {RESULT}.*" for name in names for exact in ("", "_exact")]


LINES = {  # what each submission printed, besides what all of them do
    "swarm": [
        *of_bits("int6"), *TTT, r"knowledge_graph tokens:\d+ .*", r"swarm cycle:1 .*",
        rf"DIAGNOSTIC post_ema {RESULT} .*",
        rf"final_mixed {RESULT} mass:1\.0000 .*valid:True .*",
    ],
    "backoff": [
        *of_bits("int6"), rf"DIAGNOSTIC post_ema {RESULT} .*",
        rf"final_mixed {RESULT} mass:{NUMBER} worst:{NUMBER} gap:{NUMBER} valid:False .*INVALID",
    ],
    "leaky": [*of_bits("int6"), *TTT, rf"DIAGNOSTIC post_ema {RESULT} .*"],
    "hedge": [
        *of_bits("int5"), *TTT, r"calibration tokens:[1-9]\d* time:.* train_and_calibration:.* budget:.*",
        rf"step:12/12 .* crown_q:{NUMBER}.*", r"quantization .*quantizer:gptq .*",
        rf"final_mixed {RESULT} mass:1\.0000 .*valid:True .*",
    ],
    "frontier": [
        *of_bits("int6"), *TTT, r"calibration tokens:[1-9]\d* time:.*", r"quantization .*quantizer:gptq .*",
        rf"final_mixed {RESULT} mass:1\.0000 .*valid:True .*",
    ],
    "smear": [*of_bits("int6"), *TTT, rf"DIAGNOSTIC post_swa {RESULT} .*", r"qat_on step:0 .*"],
}  # fmt: skip


def reduced(recipe: str, tiny_data: Path, out_dir: Path, blob: Path) -> dict[str, str]:
    """A recipe at the size of seconds: sizes and lengths alone are overridden, not what the recipe does."""
    full = Config.from_env({"RECIPE": recipe})
    sizes: dict[str, object] = dict(
        RECIPE=recipe, ITERATIONS=12, WARMDOWN_ITERS=6, MTP_NUM_HEADS=full.mtp_num_heads, MLP_MULT=full.mlp_mult,
        NUM_KV_HEADS=4 if full.num_kv_heads == full.num_heads else 2, XSA_LAST_N=min(full.xsa_last_n, 3),
        VE_LAYERS="1,2" if full.ve_layers else "", ROPE_DIMS=full.rope_dims and 4, EMA_DECAY=None,
        ROPE_TRAIN_LEN=full.rope_train_len and 16, TTT_CHUNK_TOKENS=256, TTT_FREEZE_BLOCKS=1, TTT_BATCH_SEQS=4,
        REPEAT_LAYERS="1,2" if full.repeat_layers else "", KG_PATH=blob, SWARM_EVERY=4, SWA_EVERY=2,
        MAX_WALLCLOCK_SECONDS=300, EVAL_STRIDE=16,
        NGRAM_BUCKETS=256, NGRAM_BLOCK=128,  # as crowded as 4,194,304 buckets by the whole split
    )  # fmt: skip
    return tiny_environ(tiny_data, out_dir, **sizes)


@pytest.fixture(scope="module")
def blob(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A knowledge-graph blob for the tests' tokenizer."""
    path = tmp_path_factory.mktemp("kg") / "blob.txt"
    pieces = train_gpt.Tokenizer(str(tiny_data / "tokenizer.model"), TINY_VOCAB).pieces
    path.write_text(build_kg.pack({token: token / TINY_VOCAB for token in range(1, TINY_VOCAB)}, pieces))
    return path


def check_documented(run: Run) -> None:
    """Every row and every field of it stands in the table of docs/log.md."""
    table = (REPO / "docs" / "log.md").read_text(encoding="utf-8").splitlines()
    rows = [[set(re.findall(r"`([^`]+)`", cell)) for cell in line.split("|")[1:3]] for line in table if line[:1] == "|"]
    fields = {name: allowed for names, allowed in rows for name in names}
    for row in run.events:
        name = re.sub(r"_exact$", "", re.sub("int[5-8]_(?=r|s)", "int6_", row["event"]))
        allowed = fields.get(row["event"]) or fields[name]
        assert row["event"] == "config" or row.keys() <= allowed | {"event", "time", "note"}, row


def check_chunks(run: Run, config: Config) -> None:
    """The scores of the chunks of test-time training make up the whole stage's."""
    rows = [row for row in run.events if row["event"] == "ttt_chunk"]
    if not config.ttt_enabled or config.ttt_rank:
        assert not rows
        return
    ends = [min(end, VAL_TARGETS) for end in range(256, VAL_TARGETS + 256, 256)]
    assert [(row["chunk"], row["chunks"], row["targets"]) for row in rows] == [
        (number, len(ends), end) for number, end in enumerate(ends, start=1)
    ]
    stage = event(run.events, "legal_ttt_exact")
    nats = [row["val_loss"] * (end - start) for row, start, end in zip(rows, [0, *ends], ends)]
    assert sum(nats) / VAL_TARGETS == pytest.approx(stage["val_loss"])
    assert rows[-1]["val_bpb_so_far"] == pytest.approx(stage["val_bpb"])
    assert rows[0]["val_bpb_so_far"] == pytest.approx(rows[0]["val_bpb"])
    sizes = [row_nats / math.log(2) / row["val_bpb"] for row, row_nats in zip(rows, nats)]
    assert sum(sizes) == pytest.approx(event(run.events, "validation")["bytes"])
    assert rows[0]["lr"] == pytest.approx(config.ttt_lr)
    assert rows[-1]["lr"] == 0  # nothing is scored after it
    assert all(row["lr"] > 0 for row in rows[:-1])


def check_votes(run: Run) -> None:
    """A row for each proposal, with what every agent said of it, as the lines have it."""
    rows = [row for row in run.events if row["event"] == "vote"]
    made, said = [], []
    for row in rows:
        made.append("  {agent} {parameter} {old:g}->{new:g} {0}: {reason}".format(OUTCOME[row["passed"]], **row))
        for agent, vote in row["votes"].items():
            said.append("    {} {vote} ({confidence:.2f}): {reason}".format(agent, **vote))
    lines = run.process.stdout.splitlines()
    assert [line for line in lines if re.match(r"  \w+ \w+ \S+->", line)] == made
    assert [line for line in lines if line.startswith("    ")] == said
    assert len(said) == 4 * len(made)
    assert {row["step"] for row in rows} <= {4, 8, 12}
    assert bool(rows) == ("Swarm: " in run.process.stdout)


OUTCOME = {True: "passed", False: "rejected"}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("recipe", [*NAMES, "frontier"])
def test_whole_run_at_reduced_size(recipe: str, ranks: int, tiny_data: Path, tmp_path: Path, blob: Path):
    environ = reduced(recipe, tiny_data, tmp_path, blob)
    run = Run(environ, run_whole(environ, ranks))
    assert run.process.returncode == 0, run.process.stderr
    lines = run.process.stdout.splitlines()
    for pattern in (*EVERY_RECIPE, *LINES[recipe]):
        assert any(re.fullmatch(pattern, line) for line in lines), (pattern, lines)
    assert lines[-1].startswith("final_int8_zlib_roundtrip_exact ")
    assert ("INVALID" in lines[-1]) == (recipe == "backoff")
    assert event(run.events, "final_int8_zlib_roundtrip_exact")["valid"] == (recipe != "backoff")
    _, config, _ = train_gpt.load_artifact(run.artifact)
    check_documented(run)
    check_chunks(run, config)
    check_votes(run)
    assert config.recipe == recipe
    assert config.vocab_size == TINY_VOCAB
