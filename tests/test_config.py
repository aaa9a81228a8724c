"""Config: where a value comes from, how text becomes a value, and what is refused, in words that help."""

import dataclasses
import json
import math
import re
import typing

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from train_gpt import RECIPES, Config, ConfigError

# Every value that the design gives to all recipes; the table is copied by hand so that a changed default is seen.
SHARED_VALUES = dict(
    train_batch_tokens=786_432, train_seq_len=2048, eval_seq_len=2048, iterations=20_000, max_wallclock_seconds=600.0,
    warmup_steps=20, vocab_size=1024, num_layers=11, model_dim=512, num_heads=8, tie_embeddings=True,
    tied_embed_init_std=0.005, logit_softcap=30.0, qk_gain_init=1.5, tied_embed_lr=0.035, embed_lr=0.6, head_lr=0.008,
    scalar_lr=0.025, muon_momentum=0.99, muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500,
    muon_wd=0.04, adam_wd=0.04, beta1=0.9, beta2=0.95, adam_eps=1e-8, grad_clip_norm=0.3, eval_stride=64,
    bigram_dim=128, seed=1337, data_path="./data/datasets/fineweb10B_sp1024",
    tokenizer_path="./data/tokenizers/fineweb_1024_bpe.model", ve_dim=128, rope_train_len=1024, smear_bos_mask=True,
    val_tokens=0, out_dir=".", muon_steps=5, mtp_loss_weight=0.1,
)  # fmt: skip
LEAKY_VALUES = dict(
    num_kv_heads=4, mlp_mult=3.0, leaky_slope=0.75, bigram_vocab_size=2048, xsa_last_n=4, rope_dims=16, ln_scale=True,
    ve_layers=(9, 10), rope_base=10_000.0, matrix_lr=0.027, warmdown_iters=3700, mtp_num_heads=0, qat_bits=6,
    late_qat_threshold=0.15, weight_average="ema", ema_decay=0.997, swa_every=50,
)  # fmt: skip

ORDINARY_VARIABLES = (
    "PATH HOME LANG LC_ALL LANGUAGE PWD OLDPWD HOSTNAME HOST USER LOGNAME SHELL SHLVL TERM TMPDIR TZ DISPLAY EDITOR "
    "PAGER MAIL _ PYTHONPATH PYTHONHASHSEED PYTHONUNBUFFERED VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV "
    "LD_LIBRARY_PATH XDG_RUNTIME_DIR SSH_CONNECTION SSH_TTY OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS "
    "MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK "
    "ROLE_NAME ROLE_WORLD_SIZE TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID "
    "TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_LOGS TORCH_HOME "
    "TORCHINDUCTOR_CACHE_DIR NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_DISABLE GLOO_SOCKET_IFNAME CUDA_HOME "
    "CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING PYTORCH_CUDA_ALLOC_CONF NVIDIA_VISIBLE_DEVICES "
    "HF_HOME HF_TOKEN WANDB_API_KEY SLURM_JOB_ID SLURM_PROCID SLURM_NTASKS CI GITHUB_ACTIONS DEBUG VERBOSE"
)

# Variable, text, and what the message must say of the values allowed.
WRONG_VALUES = [
    ("RECIPE", "leeky", "leaky"),
    ("ITERATIONS", "many", "whole number"),
    ("ITERATIONS", "1.5", "whole number"),
    ("ITERATIONS", "1e3", "whole number"),
    ("ITERATIONS", "", "whole number"),
    ("ITERATIONS", "0", "from 1 to"),
    ("SEED", "-1", "from 0 to"),
    ("MATRIX_LR", "fast", "finite number"),
    ("MATRIX_LR", "nan", "finite number"),
    ("MATRIX_LR", "inf", "finite number"),
    ("MATRIX_LR", "-0.1", "from 0 to 1e+09"),
    ("MATRIX_LR", "2000000000", "from 0 to 1e+09"),
    ("BETA1", "1", "from 0 to 0.9999"),
    ("EMA_DECAY", "1", "from 0 to 0.999999"),
    ("TIE_EMBEDDINGS", "yes", "0, 1, true or false"),
    ("TIE_EMBEDDINGS", "2", "0, 1, true or false"),
    ("TIE_EMBEDDINGS", "", "0, 1, true or false"),
    ("TIE_EMBEDDINGS", "auto", "0, 1, true or false"),
    ("COMPILE", "maybe", "auto, 0 or 1"),
    ("VE_LAYERS", "nine", "whole numbers with commas"),
    ("VE_LAYERS", "9;10", "whole numbers with commas"),
    ("VE_LAYERS", "9,11", "from 0 to 10"),
    ("VE_LAYERS", "-1", "from 0 to 10"),
    ("DEVICE", "gpu", "auto, cpu, cuda"),
    ("ATTENTION", "flash", "auto, fa3, cudnn, sdpa, blocks"),
    ("WEIGHT_AVERAGE", "EMAX", "ema, swa, none"),
    ("QAT_BITS", "4", "0, 5, 6, 7, 8"),
    ("VOCAB_SIZE", "65536", "from 2 to 65535"),
    ("MODEL_DIM", "500", "multiple of NUM_HEADS=8"),
    ("NUM_KV_HEADS", "3", "divisor of NUM_HEADS=8"),
    ("MLP_MULT", "3.0001", "whole"),
    ("ROPE_DIMS", "7", "even number"),
    ("ROPE_DIMS", "2", "even number from 4 to 64"),
    ("ROPE_DIMS", "66", "even number from 4 to 64"),
    ("XSA_LAST_N", "12", "at most NUM_LAYERS=11"),
    ("EVAL_STRIDE", "2049", "at most EVAL_SEQ_LEN=2048"),
    ("EVAL_STRIDE", "0", "from 1 to"),
    ("TRAIN_BATCH_TOKENS", "786433", "multiple of TRAIN_SEQ_LEN=2048"),
    ("TRAIN_BATCH_TOKENS", "1024", "multiple of TRAIN_SEQ_LEN=2048"),
]

NEAR_MISSES = [
    ("MATRX_LR", "MATRIX_LR"),
    ("matrix_lr", "MATRIX_LR"),
    ("Matrix_Lr", "MATRIX_LR"),
    ("MATRIXLR", "MATRIX_LR"),
    ("ITERATION", "ITERATIONS"),
    ("ITERATOINS", "ITERATIONS"),
    ("recipe", "RECIPE"),
    ("RECIPES", "RECIPE"),
    ("NUMLAYERS", "NUM_LAYERS"),
    ("NUM_LAYER", "NUM_LAYERS"),
    ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
    ("EVALSTRIDE", "EVAL_STRIDE"),
    ("DATAPATH", "DATA_PATH"),
    ("OUTDIR", "OUT_DIR"),
    ("seed", "SEED"),
]


@pytest.fixture
def recipe(monkeypatch):
    """A recipe that sets two fields to values no default has."""
    monkeypatch.setitem(RECIPES, "test", dict(iterations=77, ve_layers=(0,)))
    return "test"


def test_environment_over_recipe_over_default(recipe):
    config = Config.from_env({"RECIPE": recipe, "VE_LAYERS": "1,2"})
    assert (config.recipe, config.iterations, config.ve_layers) == (recipe, 77, (1, 2))
    assert config.seed == 1337
    assert Config.from_env({"RECIPE": recipe, "ITERATIONS": "5"}).iterations == 5
    assert Config.from_env({"ITERATIONS": "5"}) == dataclasses.replace(Config.from_env({}), iterations=5)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_validates_and_says_its_name(name):
    config = Config.from_env({"RECIPE": name})
    assert config.recipe == name
    assert {key: getattr(config, key) for key in RECIPES[name]} == RECIPES[name]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_every_field_is_read_from_its_variable(name):
    """The text of a field's own value, under the field's name in capitals, gives that value back."""
    given_values = dict(Config.from_env({"RECIPE": "demo"}).__dict__, run_id="r", artifact="a", compile=True)
    value = given_values[name]
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    assert getattr(Config.from_env({"RECIPE": "demo", name.upper(): text}), name) == value


def test_defaults_are_the_designs():
    config = Config.from_env({"RECIPE": "leaky"})
    expected = SHARED_VALUES | LEAKY_VALUES
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("text", ["1", "true", "True", "TRUE", "tRuE", " 1 ", "0", "false", "False", "FALSE", "faLSE"])
def test_booleans_in_any_case(text):
    value = text.strip().lower() in ("1", "true")
    config = Config.from_env({"TIE_EMBEDDINGS": text, "COMPILE": text})
    assert (config.tie_embeddings, config.compile) == (value, value)


@pytest.mark.parametrize("text", ["auto", "AUTO", "Auto"])
def test_compile_may_be_auto(text):
    assert Config.from_env({"COMPILE": text}).compile is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("9,10", (9, 10)), (" 9 , 10 ", (9, 10)), ("10", (10,)), ("9,10,", (9, 10)), ("", ()), (" ", ())],
)
def test_tuples(text, value):
    assert Config.from_env({"VE_LAYERS": text}).ve_layers == value


@pytest.mark.parametrize(
    ("text", "value"), [("1e-2", 0.01), ("1E-2", 0.01), (".5", 0.5), ("2", 2.0), (" 0.25 ", 0.25), ("0", 0.0)]
)
def test_floats(text, value):
    found = Config.from_env({"MATRIX_LR": text}).matrix_lr
    assert found == value
    assert isinstance(found, float)


@pytest.mark.parametrize(("variable", "text", "allowed"), WRONG_VALUES)
def test_a_wrong_value_is_named_with_what_is_allowed(variable, text, allowed):
    with pytest.raises(ConfigError) as caught:
        Config.from_env({variable: text})
    message = str(caught.value)
    assert message.startswith(f"{variable}=")
    assert text in message.replace(" ", "")  # a tuple is shown with spaces
    assert allowed in message
    assert "\n" not in message


def test_heads_of_two_channels_cannot_rotate():
    with pytest.raises(ConfigError):
        Config.from_env({"MODEL_DIM": "16", "ROPE_DIMS": "0"})


def test_a_layer_named_twice_is_refused():
    with pytest.raises(ConfigError, match="VE_LAYERS"):
        Config.from_env({"VE_LAYERS": "9,9"})


def test_a_number_that_cannot_be_a_count_of_channels_is_named():
    with pytest.raises(ConfigError, match=r"^NUM_HEADS=8 .*even width"):
        Config.from_env({"MODEL_DIM": "40", "ROPE_DIMS": "0"})


def test_calibration_needs_a_reserve_and_training_the_rest():
    with pytest.raises(ConfigError, match=r"^TRAIN_RESERVE_SECONDS=600.0 .* less than MAX_WALLCLOCK_SECONDS=600"):
        Config.from_env({"TRAIN_RESERVE_SECONDS": "600"})
    with pytest.raises(ConfigError, match=r"^TRAIN_RESERVE_SECONDS=0.0 .* QUANTIZER=gptq"):
        Config.from_env({"QUANTIZER": "gptq"})
    config = Config.from_env({"QUANTIZER": "gptq", "TRAIN_RESERVE_SECONDS": "18"})
    assert config.training_seconds == 582
    assert Config.from_env({}).training_seconds == 600
    uncapped = Config.from_env({"QUANTIZER": "gptq", "TRAIN_RESERVE_SECONDS": "18", "MAX_WALLCLOCK_SECONDS": "0"})
    assert uncapped.training_seconds == 0


@pytest.mark.parametrize(
    "field", [f for f in dataclasses.fields(Config) if type(f.default) in (int, float)], ids=lambda field: field.name
)
def test_every_number_has_a_range_that_is_enforced_at_both_ends(field):
    """The range is that which the error for an impossible value states; a few numbers have a list of choices."""
    name, kind = field.name.upper(), type(field.default)

    def refused(value: float) -> str:
        with pytest.raises(ConfigError, match=rf"^{name}=.* expected ") as caught:
            Config.from_env({name: str(kind(value))})
        return str(caught.value).partition(" expected ")[2]

    allowed = refused(-1e30)
    if allowed.startswith("one of "):
        assert str(field.default) in allowed.removeprefix("one of ").split(", ")
        return
    low, high = map(float, re.fullmatch(r"a value from (\S+) to (\S+)", allowed).groups())  # pyright: ignore[reportOptionalMemberAccess]
    assert low <= field.default <= high
    for value in (low - 1 if kind is int else low - abs(low) / 2 - 1e-9, high * 1.01 + (kind is int)):
        assert refused(value) == allowed


@pytest.mark.parametrize(("given_name", "meant"), NEAR_MISSES)
def test_a_misspelt_variable_is_an_error(given_name, meant):
    with pytest.raises(ConfigError) as caught:
        Config.from_env({given_name: "1"})
    assert given_name in str(caught.value)
    assert f"did you mean {meant}?" in str(caught.value)


def test_a_misspelt_variable_is_an_error_beside_the_right_one():
    with pytest.raises(ConfigError, match="MATRX_LR"):
        Config.from_env({"MATRIX_LR": "0.02", "MATRX_LR": "0.03"})


@pytest.mark.parametrize("name", ORDINARY_VARIABLES.split())
def test_ordinary_variables_are_left_alone(name):
    assert Config.from_env({name: "whatever"}) == Config.from_env({})


@given(
    seed=st.integers(0, 2**63 - 1), matrix_lr=st.floats(0, 10), layers=st.sets(st.integers(0, 10)),
    run_id=st.text().filter(lambda name: not set(name) & set("/\\\0")), choice=st.sampled_from([None, True, False]),
)  # fmt: skip
def test_json_round_trip(seed, matrix_lr, layers, run_id, choice):
    changes = dict(seed=seed, matrix_lr=matrix_lr, ve_layers=tuple(sorted(layers)), run_id=run_id, compile=choice)
    config = dataclasses.replace(Config(), **changes)
    again = Config.from_json(config.to_json())
    assert again == config
    assert isinstance(again.ve_layers, tuple)
    assert again.to_json() == config.to_json()


def test_json_with_other_fields_is_refused():
    values = json.loads(Config().to_json())
    for changed in ({**values, "extra": 1}, {k: v for k, v in values.items() if k != "seed"}, [], "text", None):
        with pytest.raises(ConfigError, match="fields"):
            Config.from_json(json.dumps(changed))


def test_json_is_validated():
    values = json.loads(Config().to_json())
    with pytest.raises(ConfigError, match="EVAL_STRIDE=5000"):
        Config.from_json(json.dumps({**values, "eval_stride": 5000}))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
HINTS = typing.get_type_hints(Config)


def fits(value: object, kind: object) -> bool:
    """Whether JSON's `value` is of the annotation `kind`, said apart from the program."""
    if kind in (int, float):
        return not isinstance(value, bool) and isinstance(value, (int, float) if kind is float else int)
    if kind == bool | None:
        return value is None or isinstance(value, bool)
    if kind == tuple[int, ...]:
        return isinstance(value, list) and all(fits(item, int) for item in value)
    return isinstance(value, bool if kind is bool else str)


@given(name=st.sampled_from(sorted(HINTS)), value=JSON_VALUES)
@example(name="seed", value="1337")
@example(name="seed", value=True)
@example(name="seed", value=1.0)
@example(name="fit_bytes", value=1)
@example(name="num_layers", value=[11])
@example(name="ve_layers", value="9")
@example(name="ve_layers", value=[9.0])
@example(name="matrix_lr", value="0.02")
@example(name="matrix_lr", value=10**400)
@example(name="iterations", value=None)
@example(name="device", value=None)
@example(name="run_id", value=["x" * 10_000])
def test_json_values_are_read_as_variables_are_or_the_field_is_named(name, value):
    stored = {**json.loads(Config().to_json()), name: value}
    try:
        config, complaint = Config.from_json(json.dumps(stored)), ""
    except ConfigError as error:
        config, complaint = None, str(error)
    if config is None:
        assert name.upper() in complaint
        assert len(complaint) < 300
        assert fits(value, HINTS[name]) or "expected" in complaint
    else:
        held = getattr(config, name)
        held = list(held) if isinstance(held, tuple) else held
        assert fits(held, HINTS[name])
        assert held == value or not fits(value, HINTS[name])


@given(text=st.text(max_size=40))
@example(text="[" * 100_000)
@example(text='{"seed":')
@example(text="1" * 5000)
def test_json_that_is_no_stored_config_is_one_clear_error(text):
    with pytest.raises(ConfigError, match="the stored config"):
        Config.from_json(text)


@pytest.mark.parametrize("text", ["NaN", "Infinity"])
def test_json_with_a_number_that_is_none_is_refused(text):
    config_text = Config().to_json().replace('"matrix_lr": 0.027', f'"matrix_lr": {text}')
    assert not math.isfinite(json.loads(config_text)["matrix_lr"])
    with pytest.raises(ConfigError, match="MATRIX_LR"):
        Config.from_json(config_text)


def test_derived_sizes():
    config = Config(model_dim=96, num_heads=6, num_kv_heads=3, mlp_mult=3.5, ve_layers=())
    assert (config.head_dim, config.kv_dim, config.mlp_dim) == (16, 48, 336)
    assert str(dataclasses.replace(config, out_dir="x").artifact_path).replace("\\", "/") == "x/final_model.int6.ptz"
    assert str(dataclasses.replace(config, out_dir="x", artifact="y.ptz").artifact_path) == "y.ptz"
