"""Rules that the source itself keeps: size, language version, who reads the environment, what is never imported."""

import ast
import dataclasses
import sys
from collections.abc import Iterator

import pytest
from golden_support import REPO

import train_gpt

PATH = REPO / "train_gpt.py"
SOURCE = PATH.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)


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
    assert len(lines) <= 3700
    assert PATH.stat().st_size <= 195_000
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
                "reject_typos",  # of Config
            ), f"line {node.lineno} reads the environment in {owner or 'the module'}"
            assert name != "os.environ" or owner == "main", f"line {node.lineno}: {owner or 'module'} uses os.environ"
        if isinstance(node, ast.Call) and owner == "main":
            passed = [dotted(argument) for argument in (*node.args, *(k.value for k in node.keywords))]
            if "os.environ" in passed:
                receivers.add(dotted(node.func))
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "getenv"}
    assert receivers == {"Config.from_env", "Runtime", "Runtime.tell_error"}
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
            assert dotted(statement.value.func).endswith((".register_autograd", ".register_fake")), statement.lineno
        elif isinstance(statement, ast.Expr):
            assert isinstance(statement.value, ast.Constant), f"line {statement.lineno}"
        if isinstance(statement, ast.If):  # the start as a script, and the folder of the siblings
            assert ast.unparse(statement.test) in ("__name__ == '__main__'", "str(CODE_DIR) not in sys.path")


def test_no_blind_except_and_no_global_state():
    for node in ast.walk(TREE):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"line {node.lineno}"
        assert not isinstance(node, ast.Global), "a function changes a module's variable"


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        train_gpt.Config().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("recipe", train_gpt.RECIPES)
def test_every_recipe_is_valid_and_survives_json(recipe):
    config = train_gpt.Config.from_env({"RECIPE": recipe})
    assert config.recipe == recipe
    assert train_gpt.Config.from_json(config.to_json()) == config
