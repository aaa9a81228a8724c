"""README says what is true: its commands run, and the settings, files, log lines and recipes that it names exist."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shlex
import subprocess
from collections.abc import Iterator
from typing import Any
from unittest import mock

import prepare
import pytest
from support import REPO, tiny_environ

import train_gpt
from tools import report

README = (REPO / "README.md").read_text(encoding="utf-8")
MAKEFILE = (REPO / "Makefile").read_text(encoding="utf-8")

# What a run or a reader makes, and what is downloaded: named in README, not in the repository.
ELSEWHERE = {
    "final_model.int6.ptz", "wordnet_edges.tsv.zst", "english_train.jsonl.zst", "fineweb_1024_bpe.model",
    "data/tokenizers/fineweb_1024_bpe.model", "texts/",
}  # fmt: skip
MADE = re.compile(r"(runs|data/mine)/|logs/[<abc]")

COMMAND = re.compile(r"(?:[A-Z][A-Z0-9_]*=\S* )*(?:make|pip|pytest|python3?|torchrun)(?: |$)")
FILE = re.compile(
    r"(?<![\w/.*-])[\w<>.-]*(?:/[\w<>.-]+)*(?:/|\.(?:py|md|txt|json|jsonl|tsv|toml|zst|png|ptz|model))(?=$|\s)"
)


def code_blocks(text: str) -> Iterator[str]:
    """The lines of code blocks, fenced or indented, without prompts; continued lines are joined."""
    fenced, lines, before = False, [], ""
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (not before.strip() or before.startswith("    "))):
            lines.append(line.strip().removeprefix("$ "))
        before = line
    yield from filter(None, lines)


def inline_code(text: str) -> list[str]:
    """What stands between backticks in prose; a line may break in it."""
    return [" ".join(found.split()) for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def commands(text: str) -> list[str]:
    """Every line of a code block but comments, and inline code that begins like a command line."""
    block = [re.sub(r"\s+#.*$", "", line) for line in code_blocks(text) if not line.startswith("#")]
    inline = [code for code in inline_code(text) if COMMAND.match(code) and " " in code]
    return [" ".join(line.split()) for line in block + inline]


def table_after(text: str, start: str) -> list[dict[str, str]]:
    """The rows of the first table after `start`, by column name in lower case."""
    lines = text[text.index(start) :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    names = [name.lower() for name in rows[0]]
    return [dict(zip(names, row)) for row in rows[2:]]


def test_commands_are_found_however_they_are_written():
    text = "t\n\n    $ make a  # why\n    # comment\n\n```bash\nX=1 python b.py \\\n  --c\n```\n`make d=1`, `make`\n"
    assert commands(text) == ["make a", "X=1 python b.py --c", "make d=1"]


@pytest.mark.parametrize("command", dict.fromkeys(commands(README)))
def test_scripts_options_settings_and_targets_of_a_command_exist(command):
    words = shlex.split(command)
    settings = {}
    while re.match(r"[A-Z][A-Z0-9_]*=", words[0]):
        name, _, settings[name] = words.pop(0).partition("=")
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert re.search(rf"^{targets[0]}:", MAKEFILE, re.MULTILINE)
        result = subprocess.run(["make", "-n", *words[1:]], cwd=REPO, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout
    scripts = [word for word in words if word.endswith(".py")]
    for script in scripts:
        source = (REPO / script).read_text(encoding="utf-8")
        for option in words[words.index(script) :]:
            name = option.partition("=")[0]
            assert not name.startswith("--") or f'"{name}"' in source, f"{script} has no {name}"
    if "train_gpt.py" in scripts:
        assert train_gpt.Config.from_env(settings)


def test_ci_runs_what_a_newcomer_is_told_to_run():
    ci = (REPO / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {"make demo", "make test"} <= set(ci) & set(commands(README))


@pytest.fixture(scope="module")
def own_text_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The two commands for one's own text, run as README has them from a folder with texts; (console, log file)."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "texts").mkdir()
    table = (REPO / "data" / "kg_words.tsv").read_text(encoding="utf-8").splitlines()
    vocabulary = [line.split("\t")[0] for line in table if not line.startswith("#")]
    source = random.Random(1)
    for number in range(200):
        text = " ".join(source.choices(vocabulary, k=100))
        (folder / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    words = [shlex.split(command) for command in commands(README) if "data/mine" in command]
    scripts = [word for line in words for word in line if word.endswith(".py")]
    assert scripts == ["data/prepare.py", "train_gpt.py"]
    small = tiny_environ(folder, folder, RECIPE=None, KG_ENABLED=1, SWARM_EVERY=5, VAL_LOSS_EVERY=10, VOCAB_SIZE=1024)
    small |= dict(word.split("=", 1) for word in words[1] if "=" in word)
    small |= dict(EVAL_STRIDE="32", VAL_TOKENS="600", MAX_WALLCLOCK_SECONDS="100", TTT_EPOCHS="1")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert prepare.main([*words[0][2:], "--workers", "1"]) == 0
        with mock.patch.dict(os.environ, small, clear=True), contextlib.redirect_stdout(io.StringIO()) as console:
            assert train_gpt.main() == 0
    return console.getvalue(), (folder / "logs" / "run.txt").read_text(encoding="utf-8")


def test_own_text_is_trained_on_and_scored(own_text_run):
    console, log = own_text_run
    last = console.splitlines()[-1]
    assert last.startswith("final_int8_zlib_roundtrip_exact")
    assert log.endswith(console.splitlines()[-1] + "\n")


def log_patterns() -> list[str]:
    """The lines of README's log table: `…` stands for anything, N and M for numbers, [x] for with and without x."""
    cells = [row["line"] for row in table_after(README, "## How to read the log")]
    lines = [line for cell in cells for line in inline_code(cell)]
    forms = [form for line in lines for form in (re.sub(r"\[.*?\]", "", line), re.sub(r"[\[\]]", "", line))]
    return list(dict.fromkeys(forms))


@pytest.mark.parametrize("line", log_patterns())
def test_lines_of_the_log_table_occur_in_a_run(line, own_text_run):
    pattern = re.escape(line).replace("N/M", r"\d+/\d+").replace("…", ".*")
    found = [row for row in own_text_run[0].splitlines() if re.match(pattern, row)]
    assert found, f"no line like {line!r} on the console"
    assert found[-1] in own_text_run[1]


def test_readme_is_short():
    assert len(README.splitlines()) < 300


def test_settings_named_are_settings():
    named = set(re.findall(r"\b([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|[A-Z][A-Z0-9]+(?==))", README))
    fields = {name.upper() for name in train_gpt.Config.__annotations__}
    assert len(named & fields) > 8
    assert named <= fields | set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.MULTILINE))


def named_files() -> set[str]:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    code = [word for text in [*inline_code(README), *commands(README)] for word in FILE.findall(text)]
    return {*links, *code} - {"/"}


def test_files_named_exist():
    named = named_files()
    assert {"train_gpt.py", "data/prepare.py", "bench/results/"} <= named
    folders = (REPO, REPO / "data", REPO / "tools", REPO / "bench", REPO / "tests")
    missing = {
        name
        for name in named - ELSEWHERE
        if not MADE.match(name) and not name.startswith(".") and not any((folder / name).exists() for folder in folders)
    }
    assert not missing


def recipes_of(text: str) -> dict[str, dict[str, Any]]:
    """What the column `sets beyond the defaults` of a table of recipes says, read as the environment would be."""
    found: dict[str, dict[str, Any]] = {}
    for row in table_after(text, "| recipe |"):
        recipe = row["recipe"].strip("`").split()[0]
        base = {"RECIPE": recipe if recipe in train_gpt.RECIPES else "leaky"}
        pairs = [item.partition("=")[::2] for item in inline_code(row["sets beyond the defaults"])]
        found[recipe] = {
            name.lower(): getattr(train_gpt.Config.from_env({**base, name: value}), name.lower())
            for name, value in pairs
        }
    return found


def test_generated_recipe_table_reads_back_as_the_recipes():
    assert recipes_of(report.recipe_table(train_gpt.RECIPES)) == train_gpt.RECIPES
    odd = {"odd": dict(ve_layers=(9, 10), compile=None, ln_scale=False, matrix_lr=1e-05, run_id="x")}
    assert recipes_of(report.recipe_table(odd)) == odd
    assert recipes_of(report.recipe_table({"odd": dict(ve_layers=())})) == {"odd": dict(ve_layers=())}


@pytest.mark.skipif("| recipe |" not in README, reason="README has no table of recipes")
def test_recipe_table_is_what_the_code_sets():
    assert recipes_of(README) == train_gpt.RECIPES, "python tools/report.py --recipes prints the column"


def test_the_page_of_settings_is_what_the_fields_say():
    page = (REPO / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == report.settings_page(), "python tools/report.py --write makes it"
    assert recipes_of(page) == train_gpt.RECIPES
    names = re.findall(r"^\| `([A-Z0-9_]+)` \|", page, re.M)
    assert names == [name.upper() for name in train_gpt.Config.__annotations__]


def test_the_table_of_faults_is_that_of_the_committed_campaign():
    path = REPO / "bench" / "results" / "cpu-fault_campaign.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    rows = table_after(README, "| fault |")
    assert [row["fault"] for row in rows] == list(cases)
    for row in rows:
        counts = cases[row["fault"]]
        assert {name: int(row[name]) for name in counts} == counts, row["fault"]
        assert int(row["cases"]) == sum(counts.values())
        assert counts["wrong"] == counts["hang"] == counts["traceback"] == 0
