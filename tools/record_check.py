"""What a reviewer of a records folder would refuse, in the folder of anybody; `tools/record.py check` prints it.

Each finding is `ok`, `unknown` (the folder does not say) or `REFUSED`. What counts as code is train_gpt.py and what it
imports from the folder. Nothing of the folder is run but the import of its script, in a bare process.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import record_fold
from record_fold import LIMIT_BYTES, MODULES, PROGRAM, READABLE
from record_logs import (
    FINAL,
    LARGEST,
    RECORD_SEEDS,
    SIZE_LIMIT_BYTES,
    Finding,
    LogError,
    SeedRun,
    judge,
    ok,
    read_run,
    refused,
    unknown,
)

FOLDER_NAME = re.compile(r"(\d{4}-\d{2}-\d{2})_(\S+)")
NOT_IN_THE_IMAGE = ("zstandard", "brotli", "flash_attn", "flash_attn_interface")  # the contest's, with torch 2.9.1
TO_WRITE = "*To be written by the author.*"
TO_FILL_IN = "*`record.py finish` fills this in.*"
TOLERANCE = 1.01e-4  # between figures that were rounded to four decimals and the log's
SCORES = ("val_loss", "val_bpb")  # in the order of `SeedRun.scores`
OPTIONAL = (  # which most accepted rows have, beside those without which there is no row
    "github_id", "blurb", "track", "val_loss_std", "val_bpb_std", "seeds", "seed_results", "bytes_code", "hardware",
    "versions", "compliance", "technique_summary",
)  # fmt: skip


class RecordError(Exception):
    """Something that no record can be made from; the text says what was found, what was expected and what to do."""


def findings(folder: Path, track: str | None, with_import: bool) -> Iterator[Finding]:
    """All of them, in the order in which a reader meets the files. Raises RecordError where there is no folder."""
    if not folder.is_dir():
        raise RecordError(f"{folder} is no folder; name that of the submission, with {PROGRAM} in it")
    row, problems = submission_of(folder)
    track = track or track_of(folder) or str(row.get("track") or "")
    record = "non" not in track
    yield from check_files(folder, track)
    script = text_of(folder / PROGRAM)
    code = [*counted_code(folder)]
    if script is not None:
        yield from check_code(folder, script, code, with_import)
    yield from problems
    runs: list[SeedRun] = []
    for each in logs_of(folder):
        if isinstance(each, SeedRun):
            runs.append(each)
        else:
            yield each
    code_bytes = sum(path.stat().st_size for path in code)
    if runs:
        yield from judge(runs, record)
        yield from check_origin(runs, script)
        yield from check_sizes(runs, code_bytes)
    else:
        yield refused("logs", "there is no log of a run; add one for each seed, train_seed1337.log and so on")
    if row:
        yield from check_row(row, runs, record, code_bytes)


def track_of(folder: Path) -> str:
    """What the folder above says, which is named track_…; else empty."""
    name = folder.resolve().parent.name
    return name.removeprefix("track_") if name.startswith("track_") else ""


def text_of(path: Path) -> str | None:
    """A file's text; None where there is no such file, or no text in it."""
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def check_files(folder: Path, track: str) -> Iterator[Finding]:
    """The names that the contest expects."""
    if FOLDER_NAME.fullmatch(folder.resolve().name):
        yield ok("folder", folder.resolve().name)
    else:
        yield refused("folder", f"is named {folder.resolve().name}; rename it to YYYY-MM-DD_name")
    if track:
        yield ok("track", track)
    else:
        yield unknown("track", "neither submission.json nor the folder above (track_…) says; judged as a record")
    for name in (PROGRAM, "README.md", "submission.json"):
        if not (folder / name).is_file():
            yield refused(name, "is missing; a submission has it")
        elif text_of(folder / name) is None:
            yield refused(name, "is no UTF-8 text; save it as that")
    readme = text_of(folder / "README.md") or ""
    if TO_WRITE in readme or TO_FILL_IN in readme:
        todo = "the author's text" if TO_WRITE in readme else "the tables that `record.py finish` writes"
        yield refused("README.md", f"still has a placeholder; put {todo} in its place")
    elif readme.strip():
        yield ok("README.md", f"{len(readme.split()):,} words")


# ---- code -------------------------------------------------------------------------------------------------------
def imported(tree: ast.AST) -> Iterator[str]:
    """Names of the modules that a file imports, wherever in it, by statement or by a literal name.

    Of a relative import the name without the leading dots; what is no dotted name, such as a variable's, is left out.
    """
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module or ''}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and node.args and called_name(node).endswith("import_module"):
            named = getattr(node.args[0], "value", None)
            names = [named] if isinstance(named, str) else []
        for name in (each.lstrip(".") for each in names):
            if all(part.isidentifier() for part in name.split(".")):
                yield name


def called_name(call: ast.Call) -> str:
    """The last part of the name of what is called; empty where it has none."""
    return getattr(call.func, "attr", "") or getattr(call.func, "id", "")


def counted_code(folder: Path) -> Iterator[Path]:
    """train_gpt.py and every file of the folder that it imports, or that those import."""
    waiting, seen = [folder / PROGRAM], set()
    while waiting:
        path = waiting.pop(0)
        text = text_of(path)
        if path in seen or text is None:
            continue
        seen.add(path)
        yield path
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for name in imported(tree):
            parts = name.split(".")
            for count in range(1, len(parts) + 1):
                module = folder.joinpath(*parts[:count])
                places = (module.with_suffix(".py"), module / "__init__.py")
                waiting += [place for place in places if os.path.isfile(place)]  # False for a name that is too long


def check_code(folder: Path, script: str, code: Sequence[Path], with_import: bool) -> Iterator[Finding]:
    """Whether the script is Python for everybody, what counts, and whether it can be imported."""
    try:
        tree = ast.parse(script, feature_version=(3, 10))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        yield refused(PROGRAM, f"is no Python 3.10: {error}; correct it")
        return
    size, beside = sum(path.stat().st_size for path in code), [path.name for path in code[1:]]
    counted = f"{size:,} bytes of code, in {' and '.join([PROGRAM, *beside])}"
    if beside:
        yield refused("code", f"{counted}; put all code that counts into {PROGRAM}")
    else:
        yield ok("code", counted)
    other = sorted(path.name for path in folder.glob("*.py") if path not in code)
    if other:
        yield unknown("code", f"{', '.join(other)}: no import leads there, so not counted; whether anything uses it")
    yield from check_folded(folder, script)
    absent = sorted({name.partition(".")[0] for name in imported(tree)} & set(NOT_IN_THE_IMAGE))
    if absent and not (folder / "requirements.txt").is_file():
        yield unknown(
            "requirements.txt", f"is missing, while {PROGRAM} names {', '.join(absent)}: whether it needs that"
        )
    if not with_import:
        yield unknown("import", "not tried (--no-import)")
        return
    version = ".".join(map(str, sys.version_info[:3]))
    try:
        seconds = import_bare(code)["seconds"]
        yield ok("import", f"on Python {version} without CUDA in {seconds:.1f} s, in an empty folder")
    except RecordError as error:
        module = re.search(r"No module named '(\w+)", str(error))
        declared = (text_of(folder / "requirements.txt") or "").lower().replace("-", "_")
        if module and module[1].lower() in declared:
            yield unknown("import", f"{error}, which requirements.txt names; install it here and check again")
        else:
            advice = "import it where it is used, or name it in requirements.txt" if module else "correct that"
            yield refused("import", f"fails on Python {version} without CUDA: {error}; {advice}")


def check_folded(folder: Path, script: str) -> Iterator[Finding]:
    """Of a script that `record.py new` made: whether the readable sources are what it unpacks, and its size."""
    found = record_fold.unfolded(script)
    if found is None:
        return
    size = len(script.encode())
    if size > LIMIT_BYTES:
        yield refused(PROGRAM, f"{size:,} bytes, {LIMIT_BYTES:,} are wanted at most; fold it of shorter sources")
    files, defaults = found
    sources = {name: text_of(folder / READABLE / name) for name in MODULES}
    if missing := [name for name, text in sources.items() if text is None]:
        yield refused(READABLE, f"{missing[0]} is missing or no text; put the readable sources back")
        return
    try:
        same = record_fold.folded_sources({name: text or "" for name, text in sources.items()}, defaults) == files
    except record_fold.FoldError:
        same = False
    if same:
        yield ok(READABLE, f"what {PROGRAM} unpacks, but for docstrings, comments and the defaults in its header")
    else:
        yield refused(
            READABLE, f"is not what {PROGRAM} unpacks; fold it anew (`record.py new`), and run the seeds again"
        )


IMPORT = """
import dataclasses, json, sys, time
sys.path.insert(0, sys.argv[1])
began = time.perf_counter()
import train_gpt
facts = {"seconds": time.perf_counter() - began}
if sys.argv[2]:
    facts["settings"] = dataclasses.asdict(train_gpt.Config.from_env({}))
print("\\n" + json.dumps(facts))
"""


def import_bare(code: Sequence[Path], with_settings: bool = False, timeout_s: float = 120) -> dict[str, Any]:
    """Import a script in a process without CUDA, environment or any file but the code; what it found.

    Raises RecordError: how the import ends where it does not succeed.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as elsewhere:
        for path in code:
            shutil.copy(path, folder)
        environ = {"PATH": os.defpath, "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-I", "-B", "-c", IMPORT, folder, "1" if with_settings else ""]
        try:
            done = subprocess.run(
                command, cwd=elsewhere, env=environ, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
                errors="replace", timeout=timeout_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RecordError(f"its import did not end in {timeout_s:.0f} s; does it start training?") from error
        if done.returncode:
            raise RecordError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        if left := sorted(os.listdir(elsewhere)):
            raise RecordError(f"its import leaves files behind: {', '.join(left)}")
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        facts = [found for line in lines if (found := facts_on(line))]
        if not facts:
            raise RecordError("its import ends the process")
        if len(lines) > 1:
            printed = next((line for line in lines if not facts_on(line)), lines[0])
            raise RecordError(f"its import prints {printed!r:.60}, and has to be quiet")
        return facts[0]


def facts_on(line: str) -> dict[str, Any]:
    """What IMPORT said on a line of its output; empty where the line is of anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("seconds"), float) else {}


# ---- logs -------------------------------------------------------------------------------------------------------
def logs_of(folder: Path) -> Iterator[SeedRun | Finding]:
    """The runs of a folder, or of its logs/ where it has none itself; JSONL counts before a text of the same name."""
    for place in (folder, folder / "logs"):
        paths = sorted(path for path in place.glob("*") if path.suffix in (".jsonl", ".log", ".txt") and path.is_file())
        paths = [path for path in paths if not path.name.startswith("requirements")]
        chosen = [p for p in paths if p.suffix == ".jsonl" or p.with_suffix(".jsonl") not in paths]
        found: list[SeedRun | Finding] = []
        for path in chosen:
            try:
                run = read_run(path)
            except LogError as error:
                own = '"event"' in (text_of(path) or '"event"')
                found.append(refused(path.name, f"{error}") if own else unknown(path.name, "is no log of a run"))
                continue
            is_run = run.finished or run.steps is not None
            found.append(run if is_run else unknown(path.name, "holds no step and no score: not looked at"))
        yield from found
        if any(isinstance(each, SeedRun) for each in found):
            return


def check_origin(runs: Sequence[SeedRun], script: str | None) -> Iterator[Finding]:
    """Whether each log begins with the very script of the folder."""
    for run in runs:
        if run.sources is None:
            yield unknown(run.path.name, f"whether it is of this {PROGRAM}: it does not begin with its source")
        elif script is not None and script.strip() in run.sources:
            yield ok(run.path.name, f"begins with the source of this {PROGRAM}")
        elif run.sources.startswith("====="):
            yield refused(
                run.path.name, f"begins with other source than {PROGRAM} here; run this script, or bring that one"
            )
        else:
            yield unknown(
                run.path.name, f"whether it is of this {PROGRAM}: it begins with other source, packed or older"
            )


def check_sizes(runs: Sequence[SeedRun], code_bytes: int) -> Iterator[Finding]:
    """All code of the folder and the largest artifact, whatever the logs add up themselves."""
    artifacts = [run.artifact_bytes for run in runs if run.artifact_bytes is not None]
    if not artifacts:
        yield unknown("bytes", "of the artifacts: no log says")
        return
    total = code_bytes + max(artifacts)
    shown = (
        f"{total:,} bytes: {code_bytes:,} of code here and {max(artifacts):,} of artifact, at most {SIZE_LIMIT_BYTES:,}"
    )
    over = f"{shown}; {total - SIZE_LIMIT_BYTES:,} have to go, of the model or of the code"
    yield refused("bytes", over) if total > SIZE_LIMIT_BYTES else ok("bytes", shown)


# ---- submission.json --------------------------------------------------------------------------------------------
def submission_of(folder: Path) -> tuple[dict[str, Any], list[Finding]]:
    """What is in submission.json, and why it is nothing."""
    name = "submission.json"
    text = text_of(folder / name)
    if text is None:
        return {}, [unknown(name, "its fields: there is none to be read")]
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, [refused(name, f"is no JSON ({error}); correct it")]
    if not isinstance(row, dict):
        return {}, [refused(name, f"is a {type(row).__name__}, expected an object of fields; see accepted rows")]
    if not row:
        return {}, [refused(name, "is an empty object; see accepted rows for the fields that it needs")]
    return row, []


def plain_number(value: Any) -> float | None:
    """The value, if it is a number that can be a figure: no bool, none that is not finite or has hundreds of digits."""
    return value if type(value) in (int, float) and abs(value) < LARGEST else None


def check_row(row: dict[str, Any], runs: Sequence[SeedRun], record: bool, code_bytes: int) -> Iterator[Finding]:
    """The fields of submission.json, by themselves and against the logs."""
    name = "submission.json"
    for each in ("val_bpb", "val_loss", "bytes_total"):
        if each not in row:
            yield refused(name, f"{each} is missing; accepted rows have it as a plain number")
        elif plain_number(row[each]) is None:
            yield refused(name, f"{each} is {row[each]!r:.60}, expected a plain number, as accepted rows have it")
    for each in ("author", "name", "date"):
        if not isinstance(row.get(each), str) or not row[each].strip():
            yield refused(name, f"{each} is {row.get(each)!r:.60}, expected text; add it")
    if isinstance(row.get("date"), str) and not re.match(r"\d{4}-\d{2}-\d{2}(T|$)", row["date"]):
        yield refused(name, f"date is {row['date']!r:.40}, expected YYYY-MM-DD")
    if absent := [each for each in OPTIONAL if each not in row]:
        yield unknown(name, f"has no {', '.join(absent)}, which most accepted rows have")
    seeds, results = row.get("seeds"), row.get("seed_results")
    if seeds is not None and not (isinstance(seeds, list) and all(type(seed) is int for seed in seeds)):
        yield refused(name, f"seeds is {seeds!r:.60}, expected a list of whole numbers")
    elif record and seeds is not None and len(set(seeds)) < RECORD_SEEDS:
        yield refused(name, f"seeds has {len(set(seeds))}, a record has at least {RECORD_SEEDS}")
    if results is not None and not (isinstance(results, dict) and all(isinstance(r, dict) for r in results.values())):
        yield refused(name, f"seed_results is {results!r:.60}, expected an object with an entry for each seed")
        results = None
    if results and isinstance(seeds, list) and {str(seed) for seed in seeds} != set(results):
        yield refused(name, f"seeds {seeds} and the keys of seed_results, {', '.join(results)}, are not the same")
    for rule, kept in row["compliance"].items() if isinstance(row.get("compliance"), dict) else ():
        if kept is False and rule.startswith(("train_under", "eval_under", "artifact_under")):
            yield refused(name, f"compliance says {rule}: false; the limit has to be kept")
    yield from check_row_sizes(row, runs, code_bytes)
    yield from check_row_scores(row, results or {}, runs)


def check_row_sizes(row: dict[str, Any], runs: Sequence[SeedRun], code_bytes: int) -> Iterator[Finding]:
    name, total, counted = "submission.json", plain_number(row.get("bytes_total")), plain_number(row.get("bytes_code"))
    if counted is not None and counted != code_bytes:
        yield refused(name, f"bytes_code is {counted:,}, while the code that counts here has {code_bytes:,} bytes")
    least = code_bytes + max((run.artifact_bytes or 0 for run in runs), default=0)
    if total is None:
        return
    if total > SIZE_LIMIT_BYTES:
        yield refused(
            name, f"bytes_total is {total:,}, at most {SIZE_LIMIT_BYTES:,} are allowed; make the model smaller"
        )
    elif total < least:
        yield refused(name, f"bytes_total is {total:,}, while code here and the largest artifact have {least:,}")
    else:
        yield ok(name, f"bytes_total is {total:,}")


def check_row_scores(row: dict[str, Any], results: dict[str, Any], runs: Sequence[SeedRun]) -> Iterator[Finding]:
    """Every score that is claimed stands in a log, no seed with a log is left out, and the claimed means are means."""
    scored = [run for run in runs if run.val_bpb is not None]
    by_seed = {str(run.seed): run for run in scored}
    for seed, result in results.items():
        yield from check_seed_scores(seed, result, by_seed.get(seed))
    yield from check_seeds_left_out(row, results, scored)
    for figure in SCORES:
        yield from check_mean(figure, row, results, scored)


def check_seed_scores(seed: str, result: dict[str, Any], run: SeedRun | None) -> Iterator[Finding]:
    """Whether an entry of seed_results has the figures of that seed's log; it may leave val_loss out."""
    name = "submission.json"
    for figure in SCORES:
        if figure not in result and figure != "val_bpb":
            continue
        claimed = plain_number(result.get(figure))
        if claimed is None:
            yield refused(name, f"seed_results[{seed}] has {figure} {result.get(figure)!r:.40}, no plain number")
        elif run is None:
            yield unknown(name, f"seed {seed} with {figure} {claimed}: there is no log of it")
        elif all(abs(claimed - found) > TOLERANCE for found in scores_of(run, figure).values()):
            found = getattr(run, figure)
            yield refused(name, f"seed {seed} has {figure} {claimed}, its log {found}; take the log's figure")
        else:
            yield ok(name, f"{figure} of seed {seed} is its log's")


def check_seeds_left_out(row: dict[str, Any], results: dict[str, Any], scored: Sequence[SeedRun]) -> Iterator[Finding]:
    """Whether a log is of a seed that the row does not name: of more seeds than it counts, the best could be chosen."""
    name, seeds = "submission.json", row.get("seeds")
    field = "seed_results" if results else "seeds"
    named = set(results) or {str(seed) for seed in (seeds if isinstance(seeds, list) else [])}
    for run in scored if named else ():
        if run.seed is None:
            yield unknown(name, f"whether {run.path.name} is of one of its seeds: the log does not say")
        elif str(run.seed) not in named:
            advice = "count every seed that ran, and take out logs of anything else"
            yield refused(name, f"{run.path.name} is of seed {run.seed}, which {field} leaves out; {advice}")


def check_mean(
    figure: str, row: dict[str, Any], results: dict[str, Any], scored: Sequence[SeedRun]
) -> Iterator[Finding]:
    """Whether the row's figure is the mean of seed_results or, where these do not have it, of the logs."""
    name, claimed = "submission.json", plain_number(row.get(figure))
    if claimed is None:
        return
    told = [value for result in results.values() if (value := plain_number(result.get(figure))) is not None]
    counted = [run for run in scored if not results or str(run.seed) in results]
    if told and len(told) == len(results):
        means = [statistics.fmean(told)]
    else:
        means = means_of(counted, figure) if len(counted) >= len(results) else []
    if not means:
        yield unknown(name, f"{figure} {claimed}: not every seed has a figure to compare it with")
    elif all(abs(claimed - mean) > TOLERANCE for mean in means):
        yield refused(name, f"{figure} is {claimed}, the mean over the seeds {means[0]:.6f}; write the mean")
    else:
        yield ok(name, f"{figure} {claimed} is that of the seeds")


def means_of(runs: Sequence[SeedRun], figure: str) -> list[float]:
    """The means over all runs of their score, and of each stage that every one of them has: of one run its scores."""
    scores = [scores_of(run, figure) for run in runs]
    stages = [stage for stage in (scores[0] if scores else ()) if all(stage in each for each in scores)]
    return [statistics.fmean(each[stage] for each in scores) for stage in stages]


def scores_of(run: SeedRun, figure: str) -> dict[str, float]:
    """The run's score, under the name FINAL, and those of its stages."""
    pairs = {FINAL: (run.val_loss, run.val_bpb), **run.scores}
    place = SCORES.index(figure)
    return {stage: value for stage, pair in pairs.items() if (value := pair[place]) is not None}
