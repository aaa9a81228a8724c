"""Run what is missing of a grid of settings × seeds, and say which settings are better, by how much and how surely.

    python tools/sweep.py --recipe swarm --set LEAKY_SLOPE=0.5,0.75 --set QK_GAIN_INIT=1.5,5 --out runs/sweep1
    python tools/sweep.py --variant "plain: RECIPE=leaky" --variant "swarm: RECIPE=swarm" --seeds 1,2 --out runs/two
    python tools/sweep.py --part QK_GAIN_INIT=5 --part "ema: EMA_DECAY=0.99" --out runs/ablation

Variants come from --set (the grid of all combinations; values that hold a comma go into --variant), --variant
("name: A=1 B=2", the name may be left out), --variants (a file of such lines; the line "*: A=1" is for all of them,
# begins a comment) and --part, for an ablation: nothing, each part alone, all parts, all parts but each. The first
variant is the baseline, or the one that --baseline names. --env sets what all have in common; settings in the
environment count too.

Every run is train_gpt.py in a process of its own with a folder of its own under --out. Started again after an
interruption the sweep goes on, also in the middle of a run, and it repeats what failed. report.md, report.json and
report.png in --out say mean ± sample deviation, the difference to the baseline, Welch's p and Holm's correction of it
for the number of comparisons, steps, seconds and bytes. With --equal-time every variant whose training took another
time than the baseline's, and was not ended by the clock, is run once more, with ITERATIONS and WARMDOWN_ITERS changed
so that it takes the same. On a machine with several GPUs each of --jobs has one of them.

Exit code 0; 1 when a run failed or is missing; 2, with one line, for a command or folder that cannot be used; 130 or
143 when interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn, TextIO

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(REPO))
import train_gpt  # noqa: E402
from bench.common import git_commit, positive  # noqa: E402
from tools.record_logs import LogError  # noqa: E402
from tools.sweep_report import (  # noqa: E402
    SAME_TIME,
    STAGES,
    Outcome,
    read_figures,
    scored_unlike,
    summarize,
    write_report,
)

SCRIPT = REPO / "train_gpt.py"
OWN = frozenset({"SEED", "RUN_ID", "OUT_DIR", "RESUME", "ARTIFACT", "EVAL_ONLY"})  # which the sweep sets by itself
PLACES = frozenset(name.upper() for name in train_gpt.PLACE_FIELDS)
FIELDS = frozenset(name.upper() for name in train_gpt.Config.__annotations__)
FINAL = "final_int8_zlib_roundtrip_exact"
EQUAL_TIME = " at equal time"


class SweepError(Exception):
    """A command or folder that no sweep can be made of; the text says what to do."""


@dataclass(frozen=True)
class Variant:
    """Settings under a name; whatever they do not set is common to all variants."""

    name: str
    settings: Mapping[str, str]


# ----------------------------------------------------------------------------------------------------------
# Which runs
# ----------------------------------------------------------------------------------------------------------
def parse_settings(words: Sequence[str], where: str) -> dict[str, str]:
    """`A=1` words as a mapping. Raises SweepError for anything else, and for what the sweep sets by itself."""
    settings: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise SweepError(f"{where}: {word!r} is no setting such as LEAKY_SLOPE=0.5")
        if name in OWN:
            raise SweepError(f"{where}: {name} is set by the sweep itself (--seeds, --out); leave it out")
        if name in settings:
            raise SweepError(f"{where}: {name} is set twice")
        settings[name] = value
    return settings


def parse_variant(text: str, where: str) -> Variant:
    """`name: A=1 B=2`, or the settings alone, which then are the name; quotes as in a shell. Raises SweepError."""
    name, colon, rest = text.partition(":")
    if not colon or "=" in name:
        name, rest = "", text
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise SweepError(f"{where}: {text!r} cannot be read ({error})") from error
    if not name.strip() and not words:
        raise SweepError(f"{where}: empty; expected name: A=1 B=2")
    return Variant(name.strip() or " ".join(words), parse_settings(words, where))


def grid(options: Sequence[str]) -> list[Variant]:
    """All combinations of `NAME=value,value,…`, the last option changing fastest. Raises SweepError."""
    axes = []
    for option in options:
        ((name, values),) = parse_settings([option], "--set").items()
        axes.append([f"{name}={value}" for value in values.split(",")])
    combinations = [parse_settings(words, "--set") for words in itertools.product(*axes)] if axes else []
    return [Variant(" ".join(f"{name}={value}" for name, value in each.items()), each) for each in combinations]


def ablation(parts: Sequence[Variant]) -> list[Variant]:
    """Nothing, each part alone, all parts, and all parts but each; what comes to the same is there once."""

    def together(name: str, chosen: Sequence[Variant]) -> Variant:
        return Variant(name, {key: value for part in chosen for key, value in part.settings.items()})

    if not parts:
        return []
    variants = [together("none", ()), *(together(f"{part.name} alone", [part]) for part in parts)]
    variants.append(together("all", parts))
    variants += [together(f"all but {part.name}", [each for each in parts if each is not part]) for part in parts]
    once: dict[tuple[tuple[str, str], ...], Variant] = {}
    for variant in variants:
        once.setdefault(tuple(sorted(variant.settings.items())), variant)
    return list(once.values())


def read_variants(path: Path) -> tuple[list[Variant], dict[str, str]]:
    """The variants of a file, and the settings that it has for all of them. Raises SweepError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(f"--variants {path}: cannot be read ({error})") from error
    texts = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, start=1)]
    found = [parse_variant(text, f"{path}:{number}") for number, text in texts if text]
    common = {name: value for each in found if each.name == "*" for name, value in each.settings.items()}
    return [each for each in found if each.name != "*"], common


def choose_variants(args: argparse.Namespace) -> list[Variant]:
    """All variants of the command line, each with all of its settings, baseline first. Raises SweepError."""
    variants, common = grid(args.set), {name: os.environ[name] for name in sorted(FIELDS - OWN) if name in os.environ}
    variants += [parse_variant(text, "--variant") for text in args.variant]
    if args.recipe:
        common["RECIPE"] = args.recipe
    for path in map(Path, args.variants):
        more, shared = read_variants(path)
        variants += more
        common |= shared
    variants += ablation([parse_variant(text, "--part") for text in args.part])
    common |= parse_settings(args.env, "--env")
    if not variants:
        raise SweepError("nothing to run; name variants with --set, --variant, --variants or --part")
    names = [variant.name for variant in variants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SweepError(f"the variant {twice!r} is there twice; give each a name of its own")
    baseline = args.baseline or names[0]
    if baseline not in names:
        raise SweepError(f"--baseline {baseline!r} is none of the variants: {', '.join(names)}")
    full = [Variant(variant.name, common | dict(variant.settings)) for variant in variants]
    return sorted(full, key=lambda variant: variant.name != baseline)


@dataclass
class Run:
    """One variant with one seed, and what its folder says about it."""

    variant: Variant
    seed: int
    folder: Path
    error: str = ""  # why it is not finished, after an attempt of this sweep

    @classmethod
    def of(cls, variant: Variant, seed: int, out: Path) -> Run:
        """The folder has the name of the variant and a digest of its settings, so that other settings get another."""
        settings = {name: value for name, value in variant.settings.items() if name not in PLACES}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        name = re.sub(r"[^A-Za-z0-9=.+-]+", "_", variant.name)[:60]
        return cls(variant, seed, out / f"{name}-{digest}" / f"seed{seed}")

    @property
    def log(self) -> Path:
        return self.folder / "logs" / "run.jsonl"

    @property
    def label(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    def record(self) -> dict[str, Any]:
        """What the sweep has written about earlier attempts: code, data, and seconds in all."""
        try:
            found = json.loads((self.folder / "sweep.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def wall_s(self) -> float:
        """Seconds that all attempts took together."""
        return self.record().get("wall_s", 0.0)

    def write_record(self, **change: Any) -> None:
        """Put something into the record. Raises OSError."""
        with train_gpt.whole_file(self.folder / "sweep.json") as path:
            path.write_text(json.dumps(self.record() | change, indent=1) + "\n", encoding="utf-8")

    def last_row(self) -> dict[str, Any]:
        """The last row of its log, {} where there is none or it is not whole."""
        try:
            row = json.loads(self.log.read_text(encoding="utf-8").rstrip("\n").rpartition("\n")[2])
            return row if isinstance(row, dict) else {}
        except (OSError, ValueError):
            return {}

    @property
    def has_results(self) -> bool:
        """Whether it is finished, or left a checkpoint to go on from; if neither, nothing of it reaches a table."""
        return self.state == "done" or any(path.is_file() for path in (self.folder / "checkpoints").rglob("*"))

    @property
    def state(self) -> str:
        """done, begun or missing."""
        return "done" if self.last_row().get("event") == FINAL else "begun" if self.log.exists() else "missing"

    def unusable(self) -> str:
        """Why there are no figures in the log of a finished run; empty where there are, or it is not finished."""
        if self.state == "done":
            try:
                read_figures(self.log, "final")
            except LogError as error:
                return str(error)
        return ""

    def set_aside(self) -> Path:
        """Rename the folder, so that the run is missing; returns what it is now. Raises OSError."""
        names = (self.folder.with_name(f"unusable{number}-{self.folder.name}") for number in itertools.count(1))
        return self.folder.rename(next(name for name in names if not name.exists()))


def runs_of(variants: Sequence[Variant], seeds: Sequence[int], out: Path) -> list[Run]:
    """Every variant with every seed. Raises SweepError where two variants would have one folder.

    That can be where they differ in nothing but places of files, and their names in no letter that a folder's has.
    """
    runs = [Run.of(variant, seed, out.resolve()) for seed in seeds for variant in variants]
    names: dict[Path, str] = {}
    for run in runs:
        other, own = names.setdefault(run.folder, run.variant.name), run.variant.name
        if other != own:
            where = f"the variants {other!r} and {own!r} would both be run in {run.folder.parent.name}"
            raise SweepError(f"{where}; give one of them a name that differs within the first 60 letters (--variant)")
    return runs


def runs_to_do(runs: Sequence[Run]) -> list[Run]:
    """Those that are not finished, and those with an unusable log, which is moved aside and said. Raises OSError."""
    for run in runs:
        if why := run.unusable():
            print(f"{run.label}: {why}; it is run again, what it left is in {run.set_aside()}", flush=True)
    return [run for run in runs if run.state != "done"]


def code_digest(script: Path) -> str:
    """As a run of the script calls its code: the first 16 hex digits of the SHA-256 over its files."""
    files = (script.parent / name for name in (script.name, *train_gpt.CODE_FILES[1:]))
    return train_gpt.digest_of(*(path for path in files if path.exists()))[:16]


def data_digest(settings: Mapping[str, str], script: Path) -> str:
    """What tells prepared data apart: manifest or shards (names and sizes), tokenizer and graph of the settings.

    Raises SweepError for settings that train_gpt.py refuses, unless the script is another.
    """
    try:
        config = train_gpt.Config.from_env(settings)
        names = [config.data_path, config.tokenizer_path, config.kg_path]
    except train_gpt.UserError as error:
        if script == SCRIPT:
            raise SweepError(str(error)) from error
        names = [settings.get(name, "") for name in ("DATA_PATH", "TOKENIZER_PATH", "KG_PATH")]
    digest = hashlib.sha256()
    for place in map(Path, filter(None, names)):
        if place.is_file():
            digest.update(place.read_bytes())
        elif (place / "manifest.json").is_file():
            digest.update((place / "manifest.json").read_bytes())
        else:
            digest.update(repr(sorted((shard.name, shard.stat().st_size) for shard in place.glob("*.bin"))).encode())
    return digest.hexdigest()[:16]


def require_inputs(variants: Sequence[Variant], script: Path) -> None:
    """Raises SweepError for a script, shards or a tokenizer without which every run would fail.

    What another script than train_gpt.py reads is not known here.
    """
    if not script.is_file():
        raise SweepError(f"--script {script}: no such file")
    try:
        configs = [train_gpt.Config.from_env(each.settings) for each in variants if script == SCRIPT]
        for folder in {config.data_path for config in configs}:
            for split in ("train", "val"):
                train_gpt.find_shards(folder, split)
        for path, vocab_size in {(config.tokenizer_path, config.vocab_size) for config in configs}:
            train_gpt.Tokenizer(path, vocab_size)
    except train_gpt.UserError as error:
        raise SweepError(str(error)) from error


# ----------------------------------------------------------------------------------------------------------
# Running them
# ----------------------------------------------------------------------------------------------------------
@dataclass
class Runner:
    """Runs processes of the script, some at a time, and ends them when the sweep is to end."""

    script: Path
    jobs: int
    threads: int
    lock: TextIO  # open in every run as well, so that it is held as long as one of them goes on
    keep_checkpoints: bool
    stopping: bool = False
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)  # by their places, 0 to jobs - 1
    guard: threading.Lock = field(default_factory=threading.Lock)

    def environ(self, run: Run, place: int) -> dict[str, str]:
        """The whole environment of one run; settings come from the variant alone, a GPU goes with the place."""
        machine = {name: value for name, value in os.environ.items() if name not in FIELDS}
        if gpus := visible_gpus():
            machine["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
        own = dict(SEED=str(run.seed), RUN_ID="run", OUT_DIR=os.path.relpath(run.folder), RESUME="auto")
        return machine | {"OMP_NUM_THREADS": str(self.threads)} | dict(run.variant.settings) | own

    def run_one(self, run: Run, code: str, data: str) -> Run:
        """Run, or go on with, one run; `error` of the run is "" afterwards if it finished.

        `code` and `data` are digests of when the sweep began: a run of others is not begun.
        """
        began, record = time.monotonic(), run.record() if run.has_results else {}
        try:
            run.error = self._changed_since(code, data, run.variant)
            if run.error:
                return run
            run.folder.mkdir(parents=True, exist_ok=True)
            run.write_record(
                name=run.variant.name, seed=run.seed, settings=dict(run.variant.settings),
                code=sorted({*record.get("code", []), code}), data=sorted({*record.get("data", []), data}),
            )  # fmt: skip
            with (run.folder / "console.txt").open("ab") as console:
                start = console.seek(0, os.SEEK_END)
                code_of_exit = self._wait_for(run, console)
            run.write_record(wall_s=run.wall_s + time.monotonic() - began)
            said = (run.folder / "console.txt").read_bytes()[start:].decode("utf-8", "replace").split("\n")
            last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
            ended = f"signal {-code_of_exit}" if code_of_exit < 0 else f"exit code {code_of_exit}"
            run.error = "" if code_of_exit == 0 and run.state == "done" else f"{ended}: {last}"
            if not run.error and not self.keep_checkpoints:  # they are for going on, which is over
                shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
        except OSError as error:
            run.error = f"{error.filename or run.folder}: {error.strerror or error}"
        return run

    def _changed_since(self, code: str, data: str, variant: Variant) -> str:
        """Whether what a run would execute or read now has other digests than these, in a sentence; else empty."""
        try:
            now = dict(code=(code, code_digest(self.script)), data=(data, data_digest(variant.settings, self.script)))
        except SweepError as error:
            return f"its data changed since the sweep began: {error}"
        changed = [f"{what} was {then}, now it is {found}" for what, (then, found) in now.items() if then != found]
        advice = "undo that and start again, or choose another --out, or --mixed to compare them all the same"
        return f"changed since the sweep began: {' and '.join(changed)}; {advice}" if changed else ""

    def _wait_for(self, run: Run, console: Any) -> int:
        with self.guard:
            if self.stopping:
                return -signal.SIGTERM
            # A session of its own, so that Ctrl-C reaches it once, by `stop`, and it can write a checkpoint.
            place = next(place for place in itertools.count() if place not in self.running)
            self.running[place] = process = subprocess.Popen(
                [sys.executable, str(self.script)], env=self.environ(run, place), stdin=subprocess.DEVNULL,
                stdout=console, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=(self.lock.fileno(),),
            )  # fmt: skip
        try:
            return process.wait()
        finally:
            with self.guard:
                del self.running[place]

    def stop(self) -> None:
        """Have every run write a checkpoint and end; no other one starts."""
        with self.guard:
            self.stopping = True
            for process in self.running.values():
                process.terminate()

    def run_all(self, runs: Sequence[Run], total: Sequence[Run], code: str, data: Mapping[str, str]) -> None:
        """Run all of `runs`, a line for each that ends. KeyboardInterrupt ends them first."""
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self.run_one, run, code, data[run.variant.name]) for run in runs]
            try:
                for number, future in enumerate(as_completed(futures), start=1):
                    run, left = future.result(), len(runs) - number
                    reached = f"{run.last_row().get('val_bpb', float('nan')):.4f} bpb, {run.wall_s:,.0f} s"
                    outcome = f"FAILED, {run.error}" if run.error else reached
                    outcome += time_left(total, left, self.jobs)
                    print(f"[{len(total) - left}/{len(total)}] {run.label}: {outcome}", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*map(str, range(torch.cuda.device_count()))] if named is None else [*filter(None, named.split(","))]


def time_left(runs: Sequence[Run], left: int, jobs: int) -> str:
    """What to say about it: runs that are left take what finished ones took in the mean."""
    seconds = [run.wall_s for run in runs if run.state == "done"]
    if not left or not seconds:
        return ""
    minutes = fmean(seconds) * left / min(jobs, left) / 60
    return f"; about {minutes:.0f} min left" if minutes < 90 else f"; about {minutes / 60:.1f} h left"


# ----------------------------------------------------------------------------------------------------------
# The sweep
# ----------------------------------------------------------------------------------------------------------
def outcomes_of(runs: Sequence[Run], stage: str) -> list[Outcome]:
    """The finished runs by variant; a run whose log cannot be used gets that as its error."""
    found: dict[str, Outcome] = {}
    for run in runs:
        outcome = found.setdefault(run.variant.name, Outcome(run.variant.name, run.variant.settings))
        if run.state == "done":
            try:
                outcome.seeds[run.seed] = read_figures(run.log, stage)
            except LogError as error:
                run.error = str(error)
    return list(found.values())


def check_alike(runs: Sequence[Run], code: str, data: Mapping[str, str]) -> list[str]:
    """Which runs that exist are of other code or data than the script and the folders have now, in sentences."""
    problems = []
    for run in filter(lambda run: run.has_results, runs):
        now = dict(code=code, data=data[run.variant.name])
        for what, present in now.items():
            others = [digest for digest in run.record().get(what, []) if digest != present]
            if others:
                problems.append(f"{run.label} has {what} {', '.join(others)}, now it is {present}")
    if len({*data.values()}) > 1:
        problems.append(f"the variants have different data: {', '.join(f'{n}: {d}' for n, d in data.items())}")
    return problems


def equal_time_variants(outcomes: Sequence[Outcome], baseline: str) -> list[Variant]:
    """Variants that took another time than the baseline, with the steps that take the baseline's time.

    What the clock ended had that time already, less a reserve; more steps would not be run.
    """
    base = next(each for each in outcomes if each.name == baseline)
    if not base.seeds:
        return []
    variants = []
    for each in outcomes:
        ratio = fmean(base.values("train_time_s")) / fmean(each.values("train_time_s")) if each.seeds else 1.0
        by_steps = all(figures["steps"] >= figures["iterations"] for figures in each.seeds.values())
        if by_steps and abs(ratio - 1) > SAME_TIME:
            steps, warmdown = (fmean(each.values(name)) * ratio for name in ("steps", "warmdown"))
            change = dict(ITERATIONS=str(max(1, round(steps))), WARMDOWN_ITERS=str(round(warmdown)))
            variants.append(Variant(each.name + EQUAL_TIME, dict(each.settings) | change))
    return variants


def make_report(runs: Sequence[Run], baseline: str, args: argparse.Namespace, mixed: Sequence[str]) -> str:
    """Write the reports of the finished runs; returns the table. Raises OSError."""
    outcomes = outcomes_of(runs, args.stage)
    rows = summarize(outcomes, baseline)
    missing = [": ".join(filter(None, (run.label, run.error))) for run in runs if run.error or run.state != "done"]
    finished = [figures for each in outcomes for figures in each.seeds.values()]
    differ = {kind: scored_unlike(outcomes, kind) for kind in ("validation", "environment")}
    notes = [f"{len(finished)} of {len(runs)} runs are finished; differences are to the first row, negative is better"]
    notes += [f"missing: {text}" for text in missing]
    notes += [f"MIXED: {text}" for text in mixed]
    notes += [f"MIXED: the runs do not score the same text, {text}" for text in differ["validation"]]
    notes += [f"the runs differ in their environment, {text}" for text in differ["environment"]]
    for each in outcomes:
        invalid = [seed for seed, figures in each.seeds.items() if figures["valid"] is not True]
        notes += [f"INVALID, no code length: {each.name}, seed {seed}" for seed in invalid]
    seconds = {row["name"]: row["train_time_s"] for row in rows}
    own = {name: value for name, value in seconds.items() if name + EQUAL_TIME not in seconds}
    base_s = seconds.get(baseline, math.nan)
    unequal = [f"{name} ({value:,.1f} s)" for name, value in own.items() if abs(value / base_s - 1) > SAME_TIME]
    if unequal:
        advice = "" if args.equal_time else "; --equal-time also compares at the same"
        notes.append(f"training took another time than the baseline's in {', '.join(unequal)}{advice}")
    code = sorted({digest for run in runs for digest in run.record().get("code", [])})
    about = dict(
        baseline=baseline, notes=notes, missing=missing, code=code,
        validation=finished[0]["validation"] if finished else None,
        environment=finished[0]["environment"] if finished else None, commit=git_commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip
    for row in rows:
        row["settings"] = {name: value for name, value in row["settings"].items() if name not in PLACES}
    return write_report(args.out, rows, args.stage, about)


def print_list(variants: Sequence[Variant], runs: Sequence[Run], notes: Sequence[str]) -> None:
    """What all variants have in common, what each has of its own, and which runs there are."""
    shared = set.intersection(*(set(variant.settings.items()) for variant in variants)) if len(variants) > 1 else set()

    def shown(variant: Variant, common: bool) -> str:
        chosen = [item for item in variant.settings.items() if (item in shared) == common]
        return " ".join("=".join(item) for item in chosen)

    print(f"all: {shown(variants[0], True)}")
    for run in runs:
        state = "unusable" if run.unusable() else run.state
        print(f"{state:<8} {run.label}: {shown(run.variant, False)}")
    print("\n".join([*notes, f"{sum(run.state == 'done' for run in runs)} of {len(runs)} runs are finished"]))


def sweep(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code. Raises SweepError, OSError and KeyboardInterrupt."""
    variants = choose_variants(args)
    script, baseline = args.script.resolve(), variants[0].name
    unknown = sorted({name for each in variants for name in each.settings} - FIELDS)
    passed_on = [f"no settings of train_gpt.py, handed on: {', '.join(unknown)}"] if unknown else []
    code, data = code_digest(script), {each.name: data_digest(each.settings, script) for each in variants}
    runs = runs_of(variants, args.seeds, args.out)
    mixed = check_alike(runs, code, data)
    if args.list:
        print_list(variants, runs, [*passed_on, *(f"MIXED: {text}" for text in mixed)])
        return 0
    require_inputs(variants, script)
    if mixed and not args.mixed:
        more = f" (and {len(mixed) - 1} more)" if len(mixed) > 1 else ""
        raise SweepError(f"{args.out}: {mixed[0]}{more}; choose another --out, or --mixed to compare them all the same")
    for note in passed_on:
        print(note, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "lock").open("a", encoding="utf-8") as lock:
        if not train_gpt.try_lock(lock):
            raise SweepError(f"{args.out}: a sweep, or a run that it started, goes on there; wait for it or end it")
        runner = Runner(script, args.jobs, args.threads, lock, args.keep_checkpoints)
        try:
            runner.run_all(runs_to_do(runs), runs, code, data)
            if args.equal_time:
                again = equal_time_variants(outcomes_of(runs, args.stage), baseline)
                data |= {each.name: data[each.name.removesuffix(EQUAL_TIME)] for each in again}  # only steps differ
                more_runs = runs_of(again, args.seeds, args.out)
                runs += more_runs
                runner.run_all(runs_to_do(more_runs), runs, code, data)
        finally:
            print(make_report(runs, baseline, args, mixed))
    return int(any(run.error or run.state != "done" for run in runs))


def numbers(text: str) -> list[int]:
    """`1,2,3` as numbers, each once."""
    found = [int(word) for word in text.split(",")]
    if len({*found}) < len(found) or min(found) < 0:
        raise ValueError(text)
    return found


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong command line is a SweepError."""

    def error(self, message: str) -> NoReturn:
        raise SweepError(f"{message}; --help lists the options")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs and of the report")
    parser.add_argument("--recipe", help="RECIPE of every variant that sets none")
    for option, metavar, what in (
        ("--set", "NAME=V,V", "an axis of the grid"), ("--variant", "'NAME: A=1 B=2'", "a variant"),
        ("--variants", "FILE", "file with a variant a line"), ("--part", "'NAME: A=1'", "a part of an ablation"),
    ):  # fmt: skip
        parser.add_argument(option, action="append", default=[], metavar=metavar, help=f"{what}; may be repeated")
    parser.add_argument("--baseline", metavar="NAME", help="variant to compare with (default: the first)")
    parser.add_argument("--env", nargs="+", action="extend", default=[], metavar="A=1", help="settings of all variants")
    parser.add_argument("--seeds", type=numbers, default=[1337, 42, 2025], help="default: 1337,42,2025")
    parser.add_argument("--stage", choices=STAGES, default="final", help="evaluation whose score is compared")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time (default %(default)s)")
    parser.add_argument("--threads", type=positive, help="threads of each run (default: CPUs divided by --jobs)")
    parser.add_argument("--equal-time", action="store_true", help="also compare at the baseline's training time")
    parser.add_argument("--list", action="store_true", help="say which runs are done and which are missing, and stop")
    parser.add_argument("--mixed", action="store_true", help="allow runs of other code or data, and say so")
    parser.add_argument("--keep-checkpoints", action="store_true", help="do not delete those of finished runs")
    parser.add_argument("--script", type=Path, default=SCRIPT, metavar="FILE", help="another train_gpt.py")
    return parser


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt(signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        args = build_parser().parse_args(argv)
        args.threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
        return sweep(args)
    except SweepError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'the disk'}: {error.strerror or error}; start the same command again"
    except KeyboardInterrupt as interrupt:
        sys.stderr.write("interrupted; the same command goes on from here\n")
        return 143 if interrupt.args else 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
