"""Rules that the source itself keeps: size, language version, who reads the environment, what is never imported."""

import ast
import dataclasses
import sys
import typing
from collections.abc import Iterator

import pytest
from golden_support import REPO

import train_gpt

PATH = REPO / "train_gpt.py"
SOURCE = PATH.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)

# Frozen on purpose: scripts and stored artifacts rely on these names. Add a new setting here, and to the README.
CONFIG_FIELDS = [
    "adam_eps",
    "adam_wd",
    "alpha_base",
    "alpha_center",
    "alpha_range",
    "artifact",
    "attention",
    "attn_bits",
    "beta1",
    "beta2",
    "bigram_dim",
    "bigram_start_bucket",
    "bigram_vocab_size",
    "calibration_tokens",
    "checkpoint_keep",
    "checkpoint_seconds",
    "clip_std",
    "compile",
    "compressor",
    "crown_q_lambda",
    "data_path",
    "device",
    "ema_decay",
    "embed_bits",
    "embed_clip_std",
    "embed_lr",
    "entropy_expert",
    "eval_batch_seqs",
    "eval_only",
    "eval_seq_len",
    "eval_stride",
    "fit_bytes",
    "grad_clip_norm",
    "head_lr",
    "iterations",
    "kg_enabled",
    "kg_init_scale",
    "kg_path",
    "kg_weight",
    "late_qat_threshold",
    "leaky_slope",
    "ln_scale",
    "logit_softcap",
    "matrix_lr",
    "max_wallclock_seconds",
    "micro_batch_tokens",
    "mixer",
    "mixer_eta",
    "mlp_bits",
    "mlp_mult",
    "model_dim",
    "mtp_loss_weight",
    "mtp_num_heads",
    "muon_momentum",
    "muon_momentum_warmup_start",
    "muon_momentum_warmup_steps",
    "muon_steps",
    "muon_wd",
    "ngram_block",
    "ngram_buckets",
    "ngram_counts",
    "ngram_min_count",
    "ngram_order",
    "num_heads",
    "num_kv_heads",
    "num_layers",
    "out_dir",
    "polyak_decay",
    "prune_fraction",
    "qat_bits",
    "qk_gain_init",
    "quantizer",
    "recipe",
    "resume",
    "rope_base",
    "rope_dims",
    "rope_train_len",
    "run_id",
    "scalar_lr",
    "seed",
    "smear_bos_mask",
    "swa_every",
    "swa_start_scale",
    "swarm_enabled",
    "swarm_every",
    "tie_embeddings",
    "tied_embed_init_std",
    "tied_embed_lr",
    "tokenizer_path",
    "train_batch_tokens",
    "train_log_every",
    "train_reserve_seconds",
    "train_seq_len",
    "ttt_batch_seqs",
    "ttt_byte_weighted",
    "ttt_chunk_tokens",
    "ttt_enabled",
    "ttt_epochs",
    "ttt_freeze_blocks",
    "ttt_grad_clip",
    "ttt_lr",
    "ttt_lr_ramp",
    "ttt_momentum",
    "ttt_optimizer",
    "ttt_scope",
    "ttt_temperature",
    "val_loss_every",
    "val_tokens",
    "ve_dim",
    "ve_layers",
    "vocab_size",
    "warmdown_iters",
    "warmup_steps",
    "weight_average",
    "xsa_last_n",
    "zero_init_out",
]


def nodes_with_owner() -> Iterator[tuple[ast.AST, str]]:
    """Every node with the name of the top-level function or class that it stands in ("" at module level)."""
    for statement in TREE.body:
        owner = statement.name if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) else ""
        for node in ast.walk(statement):
            yield node, owner


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def imported_modules() -> set[str]:
    """Modules imported anywhere in the file, by statement or by the two helpers that import by name."""
    found = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and dotted(node.func) in ("require", "importlib.import_module"):
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def test_file_is_short_enough_to_be_read():
    lines = SOURCE.splitlines()
    assert len(lines) <= 3830
    assert [number for number, line in enumerate(lines, start=1) if len(line) > 120] == []
    assert "\t" not in SOURCE
    assert SOURCE.endswith("\n")


def test_file_parses_as_python_3_10():
    ast.parse(SOURCE, feature_version=(3, 10))


def test_only_main_hands_out_the_environment_and_only_config_and_runtime_take_it():
    receivers = set()
    for node, owner in nodes_with_owner():
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = dotted(node)
            assert name not in ("os.getenv", "os.putenv", "os.environb", "environ", "getenv") or owner in (
                "Config",
                "Runtime",
                "_reject_misspelt",  # of Config
            ), f"line {node.lineno} reads the environment in {owner or 'the module'}"
            assert name != "os.environ" or owner == "main", f"line {node.lineno}: {owner or 'module'} uses os.environ"
        if isinstance(node, ast.Call) and owner == "main":
            passed = [dotted(argument) for argument in (*node.args, *(k.value for k in node.keywords))]
            if "os.environ" in passed:
                receivers.add(dotted(node.func))
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "getenv"}
    assert receivers == {"Config.from_env", "Runtime", "Runtime.label"}
    uses = [node for node, owner in nodes_with_owner() if owner == "main" and dotted(node) == "os.environ"]
    assert len(uses) == 3  # each of them as an argument of the calls above


def test_nothing_is_pickled_or_evaluated():
    assert imported_modules().isdisjoint({"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"})
    forbidden = {"torch.load", "torch.save", "np.load", "np.save", "numpy.load", "eval", "exec", "torch.hub.load"}
    object_collectives = {"dist.broadcast_object_list", "dist.all_gather_object", "dist.gather_object"}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Call):
            assert dotted(node.func) not in forbidden | object_collectives, f"line {node.lineno}"
            assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}
    assert "pickle" not in SOURCE.replace("unpickled", "").replace("no pickle", "")


def test_every_import_is_declared():
    third_party = {name.partition(".")[0] for name in imported_modules()} - set(sys.stdlib_module_names) - {"?"}
    third_party -= {"flash_attn", "flash_attn_interface", "triton", "brotli"}  # optional
    siblings = {name.removesuffix(".py") for name in train_gpt.CODE_FILES}
    declared = {
        line.split(">")[0].split("=")[0].split("#")[0].strip()
        for line in (REPO / "requirements.txt").read_text().splitlines()
    }
    assert third_party - siblings <= declared


def test_importing_runs_no_code_but_definitions():
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Expr, ast.If)
    for statement in TREE.body:
        assert isinstance(statement, allowed), f"line {statement.lineno}"
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            assert dotted(statement.value.func) == "torch.library.register_autograd", f"line {statement.lineno}"
        elif isinstance(statement, ast.Expr):
            assert isinstance(statement.value, ast.Constant), f"line {statement.lineno}"
        if isinstance(statement, ast.If):
            assert ast.unparse(statement.test) == "__name__ == '__main__'"


def test_no_blind_except_and_no_global_state():
    for node in ast.walk(TREE):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"line {node.lineno}"
        assert not isinstance(node, ast.Global), "a function changes a module's variable"


def test_config_fields_are_the_frozen_list():
    fields = sorted(typing.get_type_hints(train_gpt.Config))
    assert sorted(CONFIG_FIELDS) == CONFIG_FIELDS, "keep the list sorted"
    assert fields == CONFIG_FIELDS


def test_config_is_frozen_and_its_tables_name_its_fields():
    config = train_gpt.Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    fields = set(CONFIG_FIELDS)
    for table in (train_gpt.FIELD_RANGES, train_gpt.FIELD_CHOICES, *train_gpt.RECIPES.values()):
        assert set(table) <= fields
    kinds = typing.get_type_hints(train_gpt.Config)
    numbers = {name for name, kind in kinds.items() if kind in (int, float)}
    assert numbers <= {*train_gpt.FIELD_RANGES, *train_gpt.FIELD_CHOICES}, "a number without a range"


@pytest.mark.parametrize("recipe", train_gpt.RECIPES)
def test_every_recipe_is_valid_and_survives_json(recipe):
    config = train_gpt.Config.from_env({"RECIPE": recipe})
    assert config.recipe == recipe
    assert train_gpt.Config.from_json(config.to_json()) == config
