"""The pages say what is true: their commands run; settings, files, log lines and recipes that they name exist."""

from __future__ import annotations

import contextlib
import io
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

PAGES = {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8")
         for path in sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")])}  # fmt: skip
README, LOG_PAGE = PAGES["README.md"], PAGES["docs/log.md"]
MAKEFILE = (REPO / "Makefile").read_text(encoding="utf-8")

# What a run or a reader makes, what is downloaded, and what stood here once: named, not in the repository.
ELSEWHERE = {
    "final_model.int6.ptz", "final_model.pt", "wordnet_edges.tsv.zst", "english_train.jsonl.zst", "tokenizer.model",
    "data/tokenizers/fineweb_1024_bpe.model", "manifest.json", "report.html", "seeds.html", "audit.html", "ADAPTER.py",
    "COPY.py", "published_ttt.py", "source/train_gpt.py", "train_seedN.jsonl", "LOG.jsonl",
    "report.md", "report.json", "report.png", "console.txt", "source/", "logs/",
    "source/record.json", "OTHER/submission.json", "tools/make_submission.py", "bench/ablation.py",
    "bench/slope_sweep.py", "bench/small_runs.py", "YYYY-MM-DD_name/", "records/TRACK/YYYY-MM-DD_name/", "/",
}  # fmt: skip
MADE = re.compile(r"(runs|data/mine|\.\.)/|logs/[<abcR]")

# Words in capitals that are no settings: of the adapters, of torch and of the records folder.
OTHER_NAMES = {
    "VOCAB_SIZE", "DRAW_FROM", "SPLIT_TARGETS", "TORCHINDUCTOR_CACHE_DIR", "OMP_NUM_THREADS", "DEFAULTS", "NAME",
    "CUDA_VISIBLE_DEVICES", "PIP_INDEX_URL",
}  # fmt: skip
PROGRAMS = {"train_gpt.py", "data", "tools", "bench"}
OPTIONS_OF = {"tools/audit.py": ["tools/audit_submission.py"], "bench/run_all.py": ["bench/common.py"]}

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


@pytest.mark.parametrize("command", dict.fromkeys(line for page in PAGES.values() for line in commands(page)))
def test_scripts_options_settings_and_targets_of_a_command_exist(command):
    words = shlex.split(command.replace("…", ""))
    settings = {}
    while re.match(r"[A-Z][A-Z0-9_]*=", words[0]):
        name, _, settings[name] = words.pop(0).partition("=")
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert re.search(rf"^{targets[0]}:", MAKEFILE, re.MULTILINE)
        result = subprocess.run(["make", "-n", *words[1:]], cwd=REPO, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout
    scripts = [word for word in words if word.endswith(".py") and word.partition("/")[0] in PROGRAMS]
    for script in scripts[:1]:  # one that follows is an argument of it
        source = (REPO / script).read_text(encoding="utf-8")
        for other in OPTIONS_OF.get(script, []):
            source += (REPO / other).read_text(encoding="utf-8")
        for option in words[words.index(script) :]:
            name = option.partition("=")[0]
            assert name == "--help" or not name.startswith("--") or f'"{name}"' in source, f"{script} has no {name}"
    if "train_gpt.py" in scripts:
        assert train_gpt.Config.from_env(settings)


def test_ci_runs_what_a_newcomer_is_told_to_run():
    ci = (REPO / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {"make demo", "make test"} <= set(ci) & set(commands(README))


def own_text_commands(text: str) -> list[str]:
    """The two commands from a text to a scored model, whichever interpreter they name."""
    found = [line for line in commands(text) if re.search(r"--out data/mine|DATA_PATH=data/mine", line)]
    return [re.sub(r"\S*python3? ", "python ", line) for line in found]


def test_two_commands_are_the_same_wherever_they_are_told():
    ended = subprocess.run(["make", "-n", "demo"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    told = "\n".join(["", *re.findall(r'^echo "(    .+)"$', ended, re.MULTILINE)])
    assert own_text_commands(told) == own_text_commands(README) == own_text_commands(PAGES["docs/data.md"])


@pytest.fixture(scope="module")
def own_text_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The two commands for one's own text, run as README has them from a folder with texts; (console, log file).

    Tokenizer, its size and the blob are those of the folder that the first made.
    """
    folder = tmp_path_factory.mktemp("readme")
    (folder / "TEXT").mkdir()
    table = (REPO / "data" / "kg_words.tsv").read_text(encoding="utf-8").splitlines()
    vocabulary = [line.split("\t")[0] for line in table if not line.startswith("#")]
    source = random.Random(1)
    for number in range(200):
        text = " ".join(source.choices(vocabulary, k=100))
        (folder / "TEXT" / f"{number}.txt").write_text(text, encoding="utf-8")
    words = [shlex.split(command) for command in own_text_commands(README)]
    scripts = [word for line in words for word in line if word.endswith(".py")]
    assert scripts == ["data/prepare.py", "train_gpt.py"]
    small = tiny_environ(folder, folder, RECIPE=None, SWARM_EVERY=5, VAL_LOSS_EVERY=10, VOCAB_SIZE=None)
    small = {name: value for name, value in small.items() if name not in ("TOKENIZER_PATH", "KG_PATH", "KG_ENABLED")}
    small |= dict(word.split("=", 1) for word in words[1] if "=" in word)
    small |= dict(EVAL_STRIDE="32", VAL_TOKENS="600", MAX_WALLCLOCK_SECONDS="100", TTT_EPOCHS="1")
    small |= dict(CALIBRATION_TOKENS="384", TTT_CHUNK_TOKENS="200")
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
    """The lines of the log page's table: `…` stands for anything, N and M for numbers, [x] for with and without x."""
    cells = [row["line"] for row in table_after(LOG_PAGE, "# The log")]
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
    assert len(README.splitlines()) < 150


def names_in(text):
    return set(re.findall(r"(?<![\w/.-])([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|[A-Z][A-Z0-9]+(?==))(?![\w.])", text))


def test_variables_of_other_submissions_are_none_of_ours_and_what_takes_their_place_is():
    _, _, table = PAGES["docs/recipes.md"].partition("| there | here |")
    fields = {name.upper() for name in train_gpt.Config.__annotations__}
    theirs, ours = zip(*(map(names_in, row.strip("|").split("|")) for row in table.splitlines() if "_" in row))
    assert not set.union(*theirs) & fields
    assert set.union(*ours) <= fields
    assert len(set.union(*theirs)) > 15
    for name in set.union(*theirs):
        assert train_gpt.Config.from_env({name: "1"}) == train_gpt.Config.from_env({})


@pytest.mark.parametrize("page", PAGES)
def test_settings_named_are_settings(page):
    named = names_in(PAGES[page].partition("| there | here |")[0])
    fields = {name.upper() for name in train_gpt.Config.__annotations__}
    assert named <= fields | OTHER_NAMES | set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.MULTILINE))
    if page in ("README.md", "docs/recipes.md", "docs/one_gpu.md"):
        assert len(named & fields) > 5


def named_files(text: str) -> set[str]:
    code = [word for part in [*inline_code(text), *commands(text)] for word in FILE.findall(part)]
    return set(code)


@pytest.mark.parametrize("page", PAGES)
def test_files_named_and_linked_exist(page):
    home = (REPO / page).parent
    links = re.findall(r"\]\(([^)#:]+)\)", PAGES[page])
    assert not [link for link in links if not (home / link).exists()]
    folders = (REPO, home, *(REPO / name for name in ("data", "tools", "tools/adapters", "bench", "tests")))
    missing = {
        name
        for name in named_files(PAGES[page]) - ELSEWHERE
        if not MADE.match(name) and not name.startswith(".") and not any((folder / name).exists() for folder in folders)
    }
    assert not missing


def test_every_page_is_linked_from_readme_or_a_page_that_it_links():
    def linked(page: str) -> set[str]:
        home = (REPO / page).parent
        paths = [home / link for link in re.findall(r"\]\(([^)#:]+\.md)\)", PAGES[page])]
        return {path.resolve().relative_to(REPO.resolve()).as_posix() for path in paths}

    reached = linked("README.md")
    reached |= {further for page in list(reached) for further in linked(page)}
    assert set(PAGES) <= reached | {"README.md"}


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


@pytest.mark.parametrize(("page", "start"), [("README.md", "| `RECIPE=` |"), ("docs/recipes.md", "| recipe |")])
def test_every_recipe_has_its_sentence(page, start):
    rows = table_after(PAGES[page], start)
    assert [next(iter(row.values())).strip("`") for row in rows] == list(train_gpt.RECIPES)
    assert all(list(row.values())[-1] for row in rows)


def test_the_page_of_settings_is_what_the_fields_say():
    page = PAGES["docs/settings.md"]
    assert page == report.settings_page(), "python tools/report.py --write makes it"
    assert recipes_of(page) == train_gpt.RECIPES
    names = re.findall(r"^\| `([A-Z0-9_]+)` \|", page, re.M)
    assert names == [name.upper() for name in train_gpt.Config.__annotations__]


def test_the_picture_has_the_figures_of_the_table():
    picture = (REPO / report.PICTURE).read_text(encoding="utf-8")
    assert picture.startswith("<svg ")
    assert report.PICTURE in README
    rows = table_after(PAGES["docs/results.md"], "<!-- recipes -->")
    ends = [row["+ mixer"].removesuffix(" INVALID") or row["+ ttt"] for row in rows]
    assert "`laptop`" in [row["recipe"] for row in rows]
    assert all(figure in picture for figure in ends), "python tools/report.py --write draws it"


def test_faults_end_well_by_the_committed_campaign():
    rows = table_after(PAGES["docs/faults.md"], "| fault |")
    assert all(int(row["wrong"]) == int(row["hang"]) == int(row["traceback"]) == 0 for row in rows)
    assert sum(int(row["cases"]) for row in rows) >= 500
