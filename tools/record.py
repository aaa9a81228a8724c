"""The records folder of a submission: make it, fill it in from the seeds' logs, say what a reviewer would refuse.

    python tools/record.py new records/track_10min_16mb --recipe swarm --name Swarm
    cd records/track_10min_16mb/2026-01-31_Swarm; SEED=1337 torchrun --nproc_per_node=8 train_gpt.py    # and two more
    python tools/record.py finish records/track_10min_16mb/2026-01-31_Swarm --blurb "what it is, in a sentence"
    python tools/record.py check records/track_10min_16mb/2026-01-31_Swarm
    python tools/record.py summary logs/a.jsonl logs/b.jsonl logs/c.jsonl --name NAME --blurb TEXT --date 2026-01-31

`new` folds train_gpt.py and its siblings into one file of at most 70,000 bytes, beside the readable sources in source/,
which do not count, requirements.txt and a README. `finish` takes the logs that the runs left in the folder or in its
logs/, copies them to train_seedN.log and .jsonl, writes submission.json and fills in the README's tables; every figure
is from the logs, and logs of other code, of mixed settings or of a broken rule are refused. Neither changes what it did
not write: files that were edited are left alone and named. `check` also takes folders that others made; it imports
their script in a bare process, unless --no-import. `summary` writes submission.json alone, from any logs.

Exit code 0; 1 where `check` refuses something or a file was left alone; 2 with one line where nothing can be done.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which an isolated start (python -I) leaves out
import record_check
import record_fold
import run_log
from record_check import FOLDER_NAME, TO_FILL_IN, TO_WRITE, RecordError, import_bare, track_of
from record_fold import LIMIT_BYTES, PROGRAM, READABLE
from record_logs import (
    BUDGET_S,
    OF_THE_RUN,
    RECORD_SEEDS,
    RECORD_TARGETS,
    SIZE_LIMIT_BYTES,
    LogError,
    SeedRun,
    judge,
    read_run,
)

REPO = Path(__file__).resolve().parents[1]
THRESHOLD_NATS = 0.005  # by which a record has to beat the one before
# Where the data lie, seen from records/TRACK/FOLDER of the contest's repository.
PLACES = {
    "data_path": "../../../data/datasets/fineweb10B_sp1024",
    "tokenizer_path": "../../../data/tokenizers/fineweb_1024_bpe.model",
}
NEEDED = ("torch", "numpy", "sentencepiece", "zstandard", "safetensors")  # by a run
# Settings that README's command leaves out: where and how a process runs, not what it computes. KG_PATH stays, since
# without it the run would take another graph, the one in kg_data.py.
NOT_IN_COMMAND = (OF_THE_RUN - {"kg_path"}) | {"recipe"}


# ---- the folder's files -------------------------------------------------------------------------------------------
class RecordFolder:
    """A folder and the digests of what was written to it, which source/record.json keeps."""

    def __init__(self, path: Path):
        self.path, self.left_alone = path, []
        self.facts: dict[str, str] = {}  # name, date, track, recipe
        self.settings: dict[str, Any] = {}  # those of the script that was written, where no variable is set
        self.written: dict[str, list[str]] = {}  # by file, and by part of README
        self.record = path / READABLE / "record.json"
        if not self.record.exists():
            return
        try:
            content = json.loads(self.record.read_text(encoding="utf-8"))
            self.facts, self.settings = dict(content["facts"]), dict(content["settings"])
            self.written = dict(content["written"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(
                f"{self.record} is damaged; take it from version control, or begin a new folder"
            ) from error

    def write(self, name: str, content: bytes) -> None:
        """Write a file, unless there is one that differs from what was written before."""
        target = self.path / name
        if target.exists() and not self._is_ours(name, target.read_bytes(), content):
            self.left_alone.append(f"{target} was not written by this program, or was edited since")
            return
        self._remember(name, content)
        write_whole(target, content)

    def write_part(self, name: str, part: str, text: str) -> None:
        """Replace what stands between a file's two markers of this part, unless it was edited."""
        target = self.path / name
        first, last = f"<!-- record:{part} -->\n", f"<!-- /record:{part} -->"
        head, _, rest = (record_check.text_of(target) or "").partition(first)
        inner, found, tail = rest.partition(last)
        if not found:
            self.left_alone.append(f"{target} has no lines {first.strip()} and {last} with a table between them")
        elif not self._is_ours(f"{name}#{part}", inner.encode(), text.encode()):
            self.left_alone.append(f"{target}: what stands between the markers {part!r} was edited")
        else:
            self._remember(f"{name}#{part}", text.encode())
            write_whole(target, (head + first + text + last + tail).encode())

    def _is_ours(self, name: str, found: bytes, new: bytes) -> bool:
        return found == new or digest(found) in self.written.get(name, [])

    def _remember(self, name: str, content: bytes) -> None:
        """Before it is written, so that a process that is killed in between leaves nothing that looks edited."""
        self.written[name] = [
            *[old for old in self.written.get(name, []) if old != digest(content)][-1:],
            digest(content),
        ]
        write_whole(self.record, as_json({"facts": self.facts, "settings": self.settings, "written": self.written}))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is never seen in part. Raises RecordError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror}") from error


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---- new ----------------------------------------------------------------------------------------------------------
README = """# {name}

{to_write} What is new, why it works, and what it builds on.

## Results

<!-- record:results -->
{results}<!-- /record:results -->

## Limits

<!-- record:limits -->
{limits}<!-- /record:limits -->

## How to run

From inside this folder, in `records/{track_folder}/{folder}` of the contest's repository, where the data are at
`../../../data` (`python3 data/cached_challenge_fineweb.py --variant sp1024` in the repository's root fetches them):

    pip install -r requirements.txt
<!-- record:command -->
{command}<!-- /record:command -->

From anywhere else `DATA_PATH` and `TOKENIZER_PATH` say where the shards and the SentencePiece model are. Logs go to
`logs/` (`OUT_DIR` moves them). `python train_gpt.py --help` lists all settings; each is an environment variable.

## Files

| file | what |
|---|---|
| `train_gpt.py` | all code that counts: the program and its two modules in one compressed, self-extracting file |
| `source/` | the same, readable, line for line; nothing imports it, so it does not count. Tracebacks name its lines |
| `train_seedN.log`, `train_seedN.jsonl` | one run each: source, settings, steps, scores; the same for machines |
| `submission.json` | the figures of these logs |
"""


def new(args: argparse.Namespace) -> int:
    """Make the folder, or renew what is unchanged in it. Raises RecordError."""
    folder = RecordFolder(place_of(args))
    if folder.path.exists() and not folder.record.exists() and any(folder.path.iterdir()):
        raise RecordError(f"{folder.path} is there and was not made by this program; choose another --name or folder")
    date, name = found.groups() if (found := FOLDER_NAME.fullmatch(folder.path.name)) else ("", "")
    check_date(date, "the folder's date")
    sources = record_fold.read_sources(REPO)
    title = f"{args.name or name} (RECIPE={args.recipe})"
    text = record_fold.fold(sources, title, {"recipe": args.recipe, **PLACES})
    if len(text.encode()) > LIMIT_BYTES:
        raise RecordError(f"the folded {PROGRAM} has {len(text.encode())} bytes, at most {LIMIT_BYTES} are wanted")
    with tempfile.TemporaryDirectory() as trial:
        (Path(trial) / PROGRAM).write_text(text, encoding="utf-8")
        settings = import_bare([Path(trial) / PROGRAM], with_settings=True)["settings"]
    folder.settings = settings
    track = args.track or track_of(folder.path) or "10min_16mb"
    folder.facts |= dict(name=args.name or name, date=date, track=track, recipe=args.recipe)
    folder.write(PROGRAM, text.encode())
    for module, source in sources.items():
        folder.write(f"{READABLE}/{module}", source.encode())
    folder.write("requirements.txt", requirements(settings).encode())
    if not (folder.path / "README.md").exists():  # the author's, but for the parts that `finish` writes
        parts = dict(results=f"{TO_FILL_IN}\n", limits=f"{TO_FILL_IN}\n", command=command_of({}))
        folder.written |= {f"README.md#{part}": [digest(text.encode())] for part, text in parts.items()}
        names = dict(name=folder.facts["name"], folder=folder.path.name, track_folder=f"track_{track}")
        folder.write("README.md", README.format(to_write=TO_WRITE, **parts, **names).encode())
    size = len(text.encode())
    print(f"{folder.path}: {PROGRAM} has {size:,} bytes, all code that counts; run it there with three seeds")
    return say_left_alone(folder)


def place_of(args: argparse.Namespace) -> Path:
    """FOLDER itself where its name is YYYY-MM-DD_name, else one of that form in it."""
    if FOLDER_NAME.fullmatch(args.folder.name):
        return args.folder
    date = args.date or datetime.date.today().isoformat()
    return args.folder / f"{date}_{re.sub(r'[^A-Za-z0-9.+-]+', '_', args.name or args.recipe).strip('_')}"


def requirements(settings: Mapping[str, Any]) -> str:
    """requirements.txt of a folder: what a run imports, with this repository's lower bounds."""
    needed = {*NEEDED, settings["compressor"]} if settings["compressor"] == "brotli" else {*NEEDED}
    lines = [
        line.partition("#")[0].strip()
        for name in ("requirements.txt", "requirements-tools.txt")
        for line in (REPO / name).read_text(encoding="utf-8").splitlines()
    ]
    return "".join(f"{line}\n" for line in lines if line.partition(">=")[0] in needed)


def say_left_alone(folder: RecordFolder) -> int:
    for line in folder.left_alone:
        print(f"left alone: {line}; move it away to have it written anew")
    return 1 if folder.left_alone else 0


# ---- figures ------------------------------------------------------------------------------------------------------
# What submission.json needs of each run, and where a run's log has it.
FIGURES = {
    "settings": "a row 'config'", "environment": "a row 'environment' (versions and hardware)", "seed": "its seed",
    "text": "a row 'validation' (what was scored)", "val_loss": "its val_loss", "val_bpb": "its val_bpb",
    "valid": "whether it is valid", "steps": "a row 'step'", "step_avg_ms": "its step_avg_ms",
    "train_s": "its train_time_ms", "artifact_bytes": "a row 'artifact_bytes'", "code_bytes": "a row 'code_bytes'",
    "total_bytes": "a row 'total_bytes'", "eval_s": "a row 'evaluation'",
}  # fmt: skip


def require_sound(runs: Sequence[SeedRun], record: bool) -> None:
    """Raise RecordError for runs that make no submission: what is missing, broken, or mixed."""
    for run in runs:
        if not run.finished:
            raise RecordError(f"{run.path} does not end in its final score: the run did not finish")
        for name, where in FIGURES.items():
            if getattr(run, name) in (None, {}, []):
                raise RecordError(f"{run.path} does not have {where}; take the log as the run wrote it")
        if record and run.text.get("digest") is None:
            raise RecordError(f"{run.path} does not say which text it scored (no digest); a record has to")
        if record and run.text["targets"] != RECORD_TARGETS:
            advice = "score all of the published split, or submit to the track non_record_16mb"
            found = f"{run.path} scores {run.text['targets']:,} validation targets"
            raise RecordError(f"{found}, a record {RECORD_TARGETS:,}; {advice}")
    broken = next((each for each in judge(runs, record) if each.verdict == "REFUSED"), None)
    if broken:
        raise RecordError(f"{broken.what}: {broken.text}")


def submission(runs: Sequence[SeedRun], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of submission.json, in the shape of the contest's accepted rows; figures from the logs alone."""
    losses, bpbs = ([getattr(run, name) for run in runs] for name in ("val_loss", "val_bpb"))
    environment, scoring = runs[0].environment, " and ".join(sorted({run.scoring for run in runs}))
    over_by_a_step = max(run.step_avg_ms or 0 for run in runs) / 1000
    compliance = dict(
        train_under_600s=all(run.train_s <= BUDGET_S + over_by_a_step for run in runs if run.train_s),
        eval_under_600s=all(run.eval_s <= BUDGET_S for run in runs if run.eval_s),
        artifact_under_16mb=all(run.largest_bytes <= SIZE_LIMIT_BYTES for run in runs),
        full_validation=all(run.text["targets"] == RECORD_TARGETS and not run.partial for run in runs),
        normalized_distribution=all(run.valid for run in runs), three_seeds=len(runs) >= RECORD_SEEDS,
    )  # fmt: skip
    if any("ttt" in stage for run in runs for stage in run.scores):
        compliance["score_first_ttt"] = True
    return dict(
        track=facts["track"], date=facts["date"], name=facts["name"], author=facts["author"],
        github_id=facts["github_id"], blurb=facts["blurb"], val_loss=statistics.fmean(losses),
        val_loss_std=spread(losses), val_bpb=statistics.fmean(bpbs), val_bpb_std=spread(bpbs),
        seeds=[run.seed for run in runs], seed_results={str(run.seed): seed_result(run) for run in runs},
        bytes_code=max(run.code_bytes or 0 for run in runs), bytes_total=max(run.largest_bytes for run in runs),
        hardware=f"{environment.get('world_size')} × {environment.get('hardware')}",
        versions={name: environment.get(name) for name in ("python", "torch", "cuda", "attention")},
        compliance=compliance, technique_summary=facts["technique"], scoring=scoring,
        recipe=runs[0].settings[0].get("recipe"), partial=runs[0].partial,
    )  # fmt: skip


def seed_result(run: SeedRun) -> dict[str, Any]:
    return dict(
        val_loss=run.val_loss, val_bpb=run.val_bpb, artifact_bytes=run.artifact_bytes, bytes_total=run.total_bytes,
        steps=run.steps, step_avg_ms=run.step_avg_ms, train_time_s=run.train_s, eval_time_s=run.eval_s, valid=run.valid,
    )  # fmt: skip


def spread(values: Sequence[float]) -> float | None:
    """The sample's standard deviation; of one value there is none."""
    return statistics.stdev(values) if len(values) > 1 else None


def baseline_losses(path: Path) -> list[float]:
    """val_loss of every seed in another submission.json. Raises RecordError."""
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
        return [float(seed["val_loss"]) for seed in other["seed_results"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path} is no submission.json with a val_loss for each seed") from error


def compare(losses: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """One-sided Welch test that the mean is more than THRESHOLD_NATS below the baseline's; losses in nats a token."""
    if min(len(losses), len(baseline)) < 2:
        raise RecordError("a comparison needs two seeds at least on both sides")
    shifted = [loss - THRESHOLD_NATS for loss in baseline]
    _, p_value = np.asarray(stats.ttest_ind(losses, shifted, equal_var=False, alternative="less"))
    return dict(
        baseline_mean=statistics.fmean(baseline), gain_nats=statistics.fmean(baseline) - statistics.fmean(losses),
        threshold_nats=THRESHOLD_NATS, welch_p=float(p_value),
    )  # fmt: skip


def with_comparison(content: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The content, and how it compares with the baseline that was named, if one was."""
    baseline = args.baseline_nats or (baseline_losses(args.baseline) if args.baseline else None)
    losses = [result["val_loss"] for result in content["seed_results"].values()]
    return content | ({"comparison": compare(losses, baseline)} if baseline else {})


def author_of(args: argparse.Namespace, earlier: Mapping[str, Any]) -> dict[str, str]:
    """Author and GitHub id: the options, else what was written before, else git's settings. Raises RecordError."""
    return dict(
        author=args.author or earlier.get("author") or from_git("user.name", "--author"),
        github_id=args.github_id or earlier.get("github_id") or from_git("github.user", "--github-id"),
    )


def from_git(setting: str, option: str) -> str:
    """git's setting. Raises RecordError: neither is ever invented."""
    try:
        done = subprocess.run(["git", "config", setting], capture_output=True, encoding="utf-8", check=False)
        found = done.stdout.strip()
    except OSError:
        found = ""
    if not found:
        raise RecordError(f"no {option}, and `git config {setting}` has none; name it with {option}")
    return found


def check_date(text: str, what: str) -> None:
    """Raise RecordError for anything but YYYY-MM-DD."""
    try:
        shown = datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        shown = ""
    if shown != text:
        raise RecordError(f"{what} {text!r} is no date like 2026-01-31")


def as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def technique_of(run: SeedRun, settings: Mapping[str, Any]) -> str:
    """The recipe, and the settings in which the run differs from the given ones."""
    return " ".join([f"RECIPE={run.settings[0].get('recipe')}", *changed_settings(run, settings)])


def changed_settings(run: SeedRun, settings: Mapping[str, Any]) -> list[str]:
    """As environment variables, what a run computed with that the given settings have otherwise."""
    values = {name: value for name, value in run.settings[0].items() if name not in NOT_IN_COMMAND}
    unlike = [name for name, value in values.items() if name in settings and settings[name] != value]
    return [f"{name.upper()}={as_variable(values[name])}" for name in unlike]


def as_variable(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "auto" if value is None else str(int(value)) if isinstance(value, bool) else str(value)


# ---- finish and summary -------------------------------------------------------------------------------------------
def finish(args: argparse.Namespace) -> int:
    """Logs → submission.json and the tables of README. Raises RecordError, LogError, and then has written nothing."""
    folder = RecordFolder(args.folder)
    if not folder.facts:
        raise RecordError(f"{args.folder} has no {READABLE}/record.json: `record.py new` makes such a folder")
    try:
        script = (args.folder / PROGRAM).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"cannot read {args.folder / PROGRAM}: {error}") from error
    record = not folder.facts["track"].startswith("non_record")
    runs = runs_in(args.folder, script)
    require_sound(runs, record)
    settings = folder.settings
    if digest(script.encode()) not in folder.written[PROGRAM][-1:]:  # it was edited before the runs
        settings = import_bare([args.folder / PROGRAM], with_settings=True)["settings"]
    earlier = earlier_submission(args.folder)
    facts = folder.facts | author_of(args, earlier)
    facts["blurb"] = args.blurb or earlier.get("blurb") or ""
    if not facts["blurb"]:
        raise RecordError("no --blurb: say in a sentence or two what it is")
    facts["technique"] = args.technique or earlier.get("technique_summary") or technique_of(runs[0], settings)
    content = with_comparison(submission(runs, facts), args)
    for run in runs:
        for suffix in (".jsonl", ".log"):
            text = run.path if suffix == ".jsonl" else text_beside(run.path)
            folder.write(f"train_seed{run.seed}{suffix}", text.read_bytes())
    folder.write("submission.json", as_json(content))
    folder.write_part("README.md", "results", results_table(runs))
    folder.write_part("README.md", "limits", limits_table(content, runs))
    changed = changed_settings(runs[0], settings)
    folder.write_part("README.md", "command", command_of(runs[0].environment, changed, [run.seed for run in runs]))
    if changed:
        print(f"note: {len(changed)} settings are not those of the recipe; README's command names them")
    if rest := [
        path.name for path in sorted(args.folder.glob("*")) if re.search(r"\.ptz$|^(logs|checkpoints)$", path.name)
    ]:
        print(f"note: {', '.join(rest)} are no part of a submission; leave them out of the commit")
    seeds = f"{len(runs)} seeds" if len(runs) > 1 else "one seed"
    print(f"{args.folder}: val_bpb {content['val_bpb']:.4f} over {seeds}, {content['bytes_total']:,} bytes")
    return say_left_alone(folder)


def runs_in(folder: Path, script: str) -> list[SeedRun]:
    """The finished runs of this script with logs in a folder or its logs/, by seed. Raises RecordError, LogError."""
    paths = [*sorted((folder / "logs").glob("*.jsonl")), *sorted(folder.glob("*.jsonl"))]
    runs, seen = [], set()
    for path in paths:
        content = digest(path.read_bytes())
        if content in seen:  # the copy that was made of it
            continue
        seen.add(content)
        run = read_run(path)
        if not run.finished:
            print(f"left out: {path} did not finish")
            continue
        if run.sources is None:
            text = path.with_suffix(".txt")
            raise RecordError(f"{path} has no text log beside it, which begins with the code; copy {text} as well")
        if run.sources != f"===== {PROGRAM} =====\n{script}\n":
            where = f"{path} is of other code than {folder / PROGRAM}"
            raise RecordError(f"{where}; run this script, or move logs of other code away")
        runs.append(run)
    if not runs:
        raise RecordError(f"{folder} and {folder / 'logs'} have no log of a finished run; run {PROGRAM} in the folder")
    return sorted(runs, key=lambda run: run.seed or 0)


def text_beside(path: Path) -> Path:
    """The text log of a JSONL log, which is there."""
    return next(other for suffix in (".log", ".txt") if (other := path.with_suffix(suffix)).is_file())


def earlier_submission(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def command_of(
    environment: Mapping[str, Any], changed: Sequence[str] = (), seeds: Sequence[int | None] = (1337,)
) -> str:
    """The lines that run the record again, as an indented block."""
    found = environment.get("world_size", 8)
    ranks = found if isinstance(found, int) else 1
    start = f"torchrun --nproc_per_node={ranks} {PROGRAM}" if ranks > 1 else f"python {PROGRAM}"
    return "".join(f"    {' '.join([*changed, f'SEED={seed}', start])}\n" for seed in seeds)


def results_table(runs: Sequence[SeedRun]) -> str:
    """One row a seed, mean and sample standard deviation; then the stages of the evaluation."""
    columns = ("seed", "val_bpb", "val_loss", "steps", "ms a step", "training", "evaluation", "artifact", "with code")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for run in runs:
        times = f"{run.steps:,} | {run.step_avg_ms:.1f} | {run.train_s:.1f} s | {run.eval_s:.1f} s"
        sizes = f"{run.artifact_bytes:,} | {run.total_bytes:,}"
        lines.append(f"| {run.seed} | {run.val_bpb:.4f} | {run.val_loss:.4f} | {times} | {sizes} |")
    bpb, loss = (with_spread([getattr(run, name) for run in runs]) for name in ("val_bpb", "val_loss"))
    lines += [f"| mean | **{bpb}** | {loss} |" + " |" * 6, "", "| stage | val_bpb |", "|---|---|"]
    for stage in runs[0].scores:
        found = [run.scores[stage][1] for run in runs if stage in run.scores]
        lines.append(f"| `{stage.removesuffix('_exact')}` | {with_spread(found)} |")
    return "\n".join(lines) + "\n"


def with_spread(values: Sequence[float]) -> str:
    deviation = spread(values)
    return f"{statistics.fmean(values):.4f}" + (f" ± {deviation:.4f}" if deviation is not None else "")


def limits_table(content: Mapping[str, Any], runs: Sequence[SeedRun]) -> str:
    """The contest's limits, and the worst of what the runs had."""
    text, valid = runs[0].text, "yes" if content["compliance"]["normalized_distribution"] else "no"
    rows = (
        ("code and artifact", f"{content['bytes_total']:,} bytes", f"{SIZE_LIMIT_BYTES:,}"),
        ("of which code", f"{content['bytes_code']:,} bytes", ""),
        ("training, with calibration", f"{max(run.train_s or 0 for run in runs):.1f} s", f"{BUDGET_S:.0f} s"),
        ("evaluation", f"{max(run.eval_s or 0 for run in runs):.1f} s", f"{BUDGET_S:.0f} s"),
        ("validation targets", f"{text['targets']:,} of {text['bytes']:,} bytes", f"{RECORD_TARGETS:,}"),
        ("digest of text and tokenizer", f"`{text.get('digest')}`", ""),
        ("probabilities sum to 1", valid, "yes"),
    )
    lines = ["| what | the runs had at most | limit |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def summary(args: argparse.Namespace) -> int:
    """submission.json of any logs. Raises RecordError, LogError."""
    check_date(args.date, "--date")
    runs = sorted((read_run(path) for path in args.logs), key=lambda run: run.seed or 0)
    require_sound(runs, record=not args.track.startswith("non_record"))
    facts = dict(track=args.track, date=args.date, name=args.name, blurb=args.blurb, **author_of(args, {}))
    facts["technique"] = args.technique or technique_of(runs[0], {})
    content = submission(runs, facts) | {"logs": [path.as_posix() for path in args.logs]}
    text = as_json(with_comparison(content, args))
    write_whole(args.out, text)
    print(text.decode(), end="")
    return 0


def check(args: argparse.Namespace) -> int:
    """Print what a reviewer would find; 1 where anything is refused. Raises RecordError."""
    findings = [*record_check.findings(args.folder, args.track, not args.no_import)]
    for each in findings:
        print(run_log.shown(str(each)))  # names in foreign files may steer a terminal
    counts = {verdict: sum(each.verdict == verdict for each in findings) for verdict in ("REFUSED", "unknown", "ok")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["REFUSED"] else 0


# ---- command line -------------------------------------------------------------------------------------------------
def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    made = commands.add_parser("new", help="make a records folder of the code as it is now")
    made.add_argument("folder", type=Path, metavar="FOLDER", help="YYYY-MM-DD_name, or the folder to make it in")
    made.add_argument("--recipe", default="swarm", help="what the script runs where RECIPE is not set")
    made.add_argument("--name", help="of the submission; without it the recipe or the folder's name")
    made.add_argument("--date", help="of the submission, YYYY-MM-DD; without it today")
    made.add_argument("--track", help="10min_16mb or non_record_16mb; without it what the folder above says")
    made.set_defaults(run=new)
    finished = commands.add_parser("finish", help="submission.json and README's tables out of the folder's logs")
    finished.add_argument("folder", type=Path, metavar="FOLDER")
    finished.set_defaults(run=finish)
    checked = commands.add_parser("check", help="what a reviewer would refuse, in anybody's folder")
    checked.add_argument("folder", type=Path, metavar="FOLDER")
    checked.add_argument("--track", help="where the folder does not say: 10min_16mb or non_record_16mb")
    checked.add_argument("--no-import", action="store_true", help="do not run the folder's code")
    checked.set_defaults(run=check)
    summed = commands.add_parser("summary", help="submission.json alone, of the logs that are named")
    summed.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="logs/RUN_ID.jsonl of each seed")
    summed.add_argument("--name", required=True)
    summed.add_argument("--date", required=True, help="of the submission, YYYY-MM-DD")
    summed.add_argument("--track", default="10min_16mb", help="non_record_16mb allows few seeds and partial validation")
    summed.add_argument("--out", type=Path, default=Path("submission.json"))
    summed.set_defaults(run=summary)
    for each in (finished, summed):
        each.add_argument("--blurb", required=each is summed, help="what it is, in a sentence or two")
        each.add_argument("--author", help="without it as before, or as git says")
        each.add_argument("--github-id", help="without it as before, or as git says")
        each.add_argument("--technique", help="technique_summary; without it the settings")
        each.add_argument("--baseline", type=Path, help="another submission.json to compare with, by Welch's test")
        each.add_argument("--baseline-nats", type=finite, nargs="+", help="or its val_loss of each seed")
    return top


def finite(text: str) -> float:
    """A number of the command line. Raises ValueError for one that JSON has no word for."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (RecordError, LogError, record_fold.FoldError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'the disk'}: {error.strerror or error}"
    sys.stderr.write(f"error: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
