"""What becomes of runs that are killed, and of damaged input: a seeded campaign over the whole script.

    python bench/fault_campaign.py            # 50 kills, 5 of them of a rank under torchrun, and 500 damaged inputs
    python bench/fault_campaign.py --quick    # the test suite's share of it

Every case is a whole run of a tiny model in a process of its own, forked from one that has imported torch. A killed
run is started again, and perhaps killed again, until it ends; it must go on from the newest whole checkpoint that the
kill has left, and its artifact and scores must be those of a run that nobody disturbed. Damaged input must end in one
error line with exit code 2, or make no difference, or be valid input of another run (a token that has become another
token, say), whose score is then finite and has a mass of 1, or the label INVALID. A table for people, one JSON line
last; exit code 1 when any case is wrong, hangs, or ends in a traceback.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO, get_type_hints

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tools")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import build_kg  # noqa: E402  # isort: skip
import train_gpt  # noqa: E402
from bench import common  # noqa: E402
from bench.tiny import (  # noqa: E402
    SCRIPT,
    TINY_VOCAB,
    artifact_of,
    artifact_parts,
    make_documents,
    tiny_environ,
    tokenizer_pieces,
    torchrun,
    train_tokenizer,
    write_shard,
)

OUTCOMES = ("identical", "clear error", "valid input", "wrong", "hang", "traceback")
HANG_S = 90.0
MEMORY_BYTES = 12 * 2**30
SETTINGS: dict[str, Any] = dict(
    RECIPE="leaky", SWARM_ENABLED=1, SWARM_EVERY=3, LATE_QAT_THRESHOLD=0.5, MIXER="backoff", TTT_CHUNK_TOKENS=200,
    TTT_EPOCHS=1, EVAL_BATCH_SEQS=4, CHECKPOINT_SECONDS=1e-9, RESUME="auto", ITERATIONS=20,
)  # fmt: skip


class Ended(NamedTuple):
    """A process that has ended: code (None: it hung and was killed), what it printed, and its last scores."""

    code: int | None
    stdout: str
    stderr: str
    fingerprint: tuple[Any, ...]

    @property
    def clear_error(self) -> bool:
        return self.code == 2 and self.stderr.count("\n") == 1 and self.stderr.startswith("error: ")


def make_data(folder: Path) -> None:
    """A tokenizer, two training shards and one for validation, all tiny."""
    import sentencepiece

    folder.mkdir(parents=True)
    train_tokenizer(folder / "tokenizer.model", TINY_VOCAB)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for name, seed, count in (("train_000000", 1, 110), ("train_000001", 3, 110), ("val_000000", 2, 40)):
        tokens = [token for text in make_documents(seed, count) for token in (1, *tokenizer.encode(text))]
        write_shard(folder / f"tiny_{name}.bin", tokens)


def fork(environ: dict[str, str]) -> int:
    """Start the script in a child that has torch already; its output goes to files beside the run's folder."""
    out = Path(environ["OUT_DIR"])
    child = os.fork()
    if child:
        return child
    for number, suffix in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{out}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.environ.clear()
    os.environ.update(environ)
    code = 1
    try:
        code = train_gpt.main()
    except BaseException as error:  # noqa: BLE001 (a child of a fork must not return into its parent's code)
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, limit_s: float) -> int | None:
    """The child's exit code, or None when the time is over first."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def run(environ: dict[str, str]) -> Ended:
    """A whole run, to its end."""
    child = fork(environ)
    code = wait(child, HANG_S)
    if code is None:
        kill(child)
    out = Path(environ["OUT_DIR"])
    stdout, stderr = (Path(f"{out}.{suffix}").read_text(errors="replace") for suffix in ("stdout", "stderr"))
    return Ended(code, stdout, stderr, fingerprint(out, Path(environ["ARTIFACT"]) if "ARTIFACT" in environ else None))


def fingerprint(out: Path, artifact: Path | None = None) -> tuple[Any, ...]:
    """What must be the same however often a run was interrupted: artifact, losses, scores."""
    artifact = artifact or out / "final_model.int6.ptz"
    logs = list((out / "logs").glob("*.jsonl")) if (out / "logs").is_dir() else []
    rows = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
    losses = {row["step"]: row["train_loss"] for row in rows if "train_loss" in row}
    scores = {row["event"]: (row["val_loss"], row.get("mass")) for row in rows if row["event"].endswith("_exact")}
    return artifact.read_bytes() if artifact.is_file() else None, losses, scores


def sound(ended: Ended) -> bool:
    """Whether a run ended in a score, and one that is valid or labelled."""
    scores = ended.fingerprint[2]
    loss, _ = scores.get("final_int8_zlib_roundtrip_exact", (math.nan, None))
    masses = [mass for _, mass in scores.values() if mass is not None]
    valid = all(abs(mass - 1) < train_gpt.MASS_TOLERANCE for mass in masses)
    return 0 < loss < math.inf and (valid or "INVALID" in ended.stdout)


def classify(ended: Ended, expected: tuple[Any, ...] | None, tolerant: bool) -> str:
    """`tolerant`: the damage may have made valid input of another run."""
    if ended.code is None:
        return "hang"
    if "Traceback" in ended.stderr + ended.stdout or ended.code not in (0, 2):
        return "traceback"
    if ended.code == 2:
        return "clear error" if ended.clear_error else "wrong"
    if expected is not None and ended.fingerprint[2] == expected[2]:
        return "identical"
    return "valid input" if tolerant and sound(ended) else "wrong"


# ---- kills -------------------------------------------------------------------------------------------------------


def newest_step(out: Path) -> int | None:
    """The step of the newest whole checkpoint."""
    for path in sorted((out / "checkpoints").glob("*/*_step*.safetensors"), reverse=True):
        try:
            return train_gpt.read_state(path.read_bytes(), path)["progress"]["step"]
        except train_gpt.CheckpointError:
            continue
    return None


def kill_one(
    source: random.Random, environ: dict[str, str], expected: tuple[Any, ...], whole_s: float
) -> tuple[str, str]:
    """One to three kills of running processes at random moments, then a run to the end: its outcome, what it said."""
    kills, out = source.choice((1, 1, 2, 3)), Path(environ["OUT_DIR"])
    while kills:
        child = fork(environ)
        if wait(child, source.uniform(0, whole_s)) is None:
            kill(child)
            kills -= 1
    step = newest_step(out)
    ended = run(environ)
    if ended.code == 0:
        lost = step is not None and f"resumed step:{step} " not in ended.stdout
        same = ended.fingerprint == expected and not lost
        return "identical" if same else "wrong", f"{out} {step} {ended.stdout[-500:]}"
    return classify(ended, None, tolerant=False), f"{out} {ended.code} {ended.stderr[-2000:]}"


def start_ranks(environ: dict[str, str], stdout: TextIO, stderr: TextIO) -> subprocess.Popen:
    """A job of two ranks that may be restarted twice; returns when its training is about to begin."""
    process = subprocess.Popen(torchrun(2, SCRIPT, restarts=2), env=environ, stdout=stdout, stderr=stderr)
    while process.poll() is None and not (Path(environ["OUT_DIR"]) / "logs").is_dir():
        time.sleep(0.01)
    return process


def close_to(ours: dict[str, float], theirs: dict[str, float]) -> bool:
    """Two ranks add up in another order than one."""
    return ours.keys() == theirs.keys() and all(abs(value - theirs[name]) < 2e-3 for name, value in ours.items())


def kill_rank(source: random.Random, environ: dict[str, str], expected: tuple[Any, ...], work_s: float) -> str:
    """A rank of two dies at a random moment under torchrun, which starts the job again."""
    out, pids = Path(environ["OUT_DIR"]), []
    while not pids:  # a job that ended before its time gets another
        shutil.rmtree(out, ignore_errors=True)
        with open(f"{out}.stdout", "w") as stdout, open(f"{out}.stderr", "w") as stderr:
            process = start_ranks(environ, stdout, stderr)
            time.sleep(source.uniform(0, work_s))
            ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
            pids = [int(pid) for pid in ranks.stdout.split()]
            if pids:
                os.kill(source.choice(pids), signal.SIGKILL)
            try:
                code = process.wait(HANG_S)
            except subprocess.TimeoutExpired:
                process.kill()
                return "hang"
        if code:
            return "traceback"
    _, losses, scores = fingerprint(out)
    ours, theirs = ({name: loss for name, (loss, _) in each.items()} for each in (scores, expected[2]))
    return "identical" if close_to(losses, expected[1]) and close_to(ours, theirs) else "wrong"


# ---- damaged input -----------------------------------------------------------------------------------------------


def damage_bytes(source: random.Random, content: bytes) -> bytes:
    """Flip bits, cut, extend, zero, repeat, shuffle, or replace all of it."""
    how, size = source.randrange(9), max(len(content), 1)
    place = source.choice((source.randrange(size), min(source.randrange(200), size - 1)))
    span = source.choice((1, 4, 64, 1024))
    if how == 0:
        return content[:place]
    if how == 1:
        return content + source.randbytes(span)
    if how == 2:
        return content[:place] + bytes(span) + content[place + span :]
    if how == 3:
        return content[:place] + source.randbytes(span) + content[place + span :]
    if how == 4:
        return content[:place] + content[place + span :]
    if how == 5:
        return content[:place] + content[place : place + span] * 2 + content[place + span :]
    if how == 6:
        return source.choice((b"", b"\0" * size, b"{}", source.randbytes(size), b"\xff" * size, content[::-1]))
    flipped = bytearray(content or b"\0")
    for _ in range(1 if how == 7 else 20):
        flipped[source.randrange(len(flipped))] ^= 1 << source.randrange(8)
    return bytes(flipped)


ODD_VALUES = (
    "", " ", "nan", "inf", "-inf", "1e999", "-1", "0", "-0.0", "1", "2", "3", "7", "0x10", "1_000", "1,2", ",", "1,,2",
    "1e3", "9" * 30, "-" + "9" * 400, "true", "TRUE", "yes", "None", "null", "[]", "{}", "..", "/", "/dev/null",
    "a" * 5000, "\u221e",
    "\u0663", "\u00bd", "é\n", "'; --", "__import__('os')", "$(id)", "%s", "\udc80", "0.5", "auto",
)  # fmt: skip


def odd_setting(source: random.Random, environ: dict[str, str]) -> dict[str, str]:
    """One to three variables with values that nobody means."""
    untouched = {"run_id", "out_dir", "device", "resume", "artifact"}
    names = sorted(set(get_type_hints(train_gpt.Config)) - untouched)
    chosen = {name.upper(): source.choice(ODD_VALUES) for name in source.sample(names, source.choice((1, 1, 2, 3)))}
    if source.random() < 0.1:
        odd = source.choice(("MATRIXLR", "iterations", "ITERATION", "TTT_LRR"))
        chosen[odd] = "1"
    return environ | {name: value.replace("\0", "") for name, value in chosen.items()}


def forge(source: random.Random, value: Any) -> Any:
    """Another JSON value where some leaf or branch of this one is missing or of another kind."""
    if isinstance(value, dict) and value and source.random() < 0.8:
        name = source.choice(sorted(value))
        if source.random() < 0.3:
            return {key: entry for key, entry in value.items() if key != name}
        return value | {name: forge(source, value[name])}
    return source.choice((None, -1, 10**30, 1.5, "x", "../../../tmp/escape", [], [[]], {}, True, float("nan")))


def forge_tensors(source: random.Random, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Well-formed tensors that are missing, misshapen, misnamed or of another kind."""
    name, forged = source.choice(sorted(tensors)), dict(tensors)
    tensor, how = forged.pop(name), source.randrange(4)
    if how == 1:
        forged[name] = torch.cat([tensor.flatten(), tensor.flatten()[:1]])
    elif how == 2:
        forged[f"../{name}"] = tensor
    elif how == 3:
        forged[name] = tensor.flatten()[:0].clone()
    return forged


def forged_artifact(source: random.Random, content: bytes) -> bytes:
    """A sound frame around metadata or tensors that are not."""
    metadata, tensors = artifact_parts(content)
    if source.random() < 0.5:
        tensors = forge_tensors(source, tensors)
    elif source.random() < 0.5:
        metadata["config"] = json.dumps(forge(source, json.loads(metadata["config"])))
    else:
        metadata = forge(source, metadata)
    return artifact_of(metadata, tensors)


def forged_checkpoint(source: random.Random, content: bytes) -> bytes:
    """A sound checksum over content that is not what a run would write."""
    leaves = train_gpt.flattened(train_gpt.read_state(content, ""))
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}
    rest: Any = {name: leaf for name, leaf in leaves.items() if name not in tensors}
    if source.random() < 0.5:
        tensors = forge_tensors(source, tensors)
    else:
        forged = forge(source, rest)
        rest = forged if isinstance(forged, dict) else {"step": forged}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "forged"
        train_gpt.write_state(path, tensors | rest)
        return path.read_bytes()


class Bed(NamedTuple):
    """Whole runs whose files get damaged: folders, environments, and what each gave undamaged."""

    root: Path
    environ: dict[str, str]
    short: dict[str, str]
    score_only: dict[str, str]
    expected: dict[str, tuple[Any, ...]]


def make_bed(root: Path) -> Bed:
    """Make the data and run everything once."""
    data = root / "data"
    make_data(data)
    pieces = tokenizer_pieces(data / "tokenizer.model")
    importance = {i: i / len(pieces) for i in range(4, len(pieces))}
    (data / "kg_blob.txt").write_text(build_kg.pack(importance, pieces))  # pyright: ignore[reportAttributeAccessIssue]
    graph = dict(KG_ENABLED=1, KG_PATH=data / "kg_blob.txt")
    environ = tiny_environ(data, root / "whole", **SETTINGS, **graph)
    brief = SETTINGS | graph | dict(ITERATIONS=4, CHECKPOINT_KEEP=3)
    short = tiny_environ(data, root / "short", **brief)
    artifact = root / "short" / "final_model.int6.ptz"
    score_only = tiny_environ(data, root / "scored", **brief | dict(EVAL_ONLY=1, ARTIFACT=artifact, TTT_ENABLED=0))
    expected = {}
    for name, each in (("whole", environ), ("short", short), ("scored", score_only)):
        ended = run(each)
        if ended.code != 0:
            raise SystemExit(f"the undamaged run ends with {ended.code}: {ended.stderr}")
        expected[name] = ended.fingerprint
    return Bed(root, environ, short, score_only, expected)


def damaged_case(source: random.Random, kind: str, bed: Bed, folder: Path) -> tuple[dict[str, str], str, bool]:
    """Damage a copy of one input; the environment to run with, the run to compare with, and tolerance."""
    data = folder / "data"
    if kind == "settings":
        return odd_setting(source, bed.short | {"OUT_DIR": str(folder / "out"), "RESUME": ""}), "short", True
    if kind in ("shards", "knowledge graph"):
        shutil.copytree(bed.root / "data", data)
        names = ["kg_blob.txt"] if kind == "knowledge graph" else sorted(p.name for p in data.glob("*.bin"))
        path = data / source.choice(names)
        content = path.read_bytes()
        if kind == "knowledge graph" and source.random() < 0.5:
            content = base64.b64encode(damage_bytes(source, base64.b64decode(content)))
        else:
            content = damage_bytes(source, content)
        path.write_bytes(content)
        places = dict(DATA_PATH=str(data), KG_PATH=str(data / "kg_blob.txt"), OUT_DIR=str(folder / "out"), RESUME="")
        return bed.short | places, "short", True
    if kind == "tokenizers":
        path = folder / "tokenizer.model"
        path.write_bytes(damage_bytes(source, (bed.root / "data" / "tokenizer.model").read_bytes()))
        return bed.score_only | {"TOKENIZER_PATH": str(path), "OUT_DIR": str(folder / "out")}, "scored", False
    if kind == "artifacts":
        content, path = (bed.root / "short" / "final_model.int6.ptz").read_bytes(), folder / "model.ptz"
        change = source.choice((damage_bytes, forged_artifact))
        path.write_bytes(change(source, content))
        # Sealed anew with a setting that a model can have, it is another artifact, which nothing can tell.
        environ = bed.score_only | {"ARTIFACT": str(path), "OUT_DIR": str(folder / "out")}
        return environ, "scored", change is forged_artifact
    shutil.copytree(bed.root / "short" / "checkpoints", folder / "out" / "checkpoints")
    paths = sorted((folder / "out" / "checkpoints").glob("*/*_step*"))
    change = source.choice((damage_bytes, forged_checkpoint))
    for path in paths[source.randrange(len(paths)) :]:
        path.write_bytes(change(source, path.read_bytes()))
    resume = source.choice(("auto", "auto", str(paths[-1])))
    # A checksum that holds over fields of the right kind makes another checkpoint, which nothing can tell.
    return bed.short | {"OUT_DIR": str(folder / "out"), "RESUME": resume}, "short", change is forged_checkpoint


KINDS = ("settings", "shards", "knowledge graph", "tokenizers", "artifacts", "checkpoints")


def same_artifact(ended: Ended, expected: tuple[Any, ...]) -> bool:
    return ended.fingerprint[0] == expected[0] and ended.fingerprint[2] == expected[2]


def damage(seed: int, count: int, bed: Bed, report: Callable[[str, str, str], None]) -> None:
    for number in range(count):
        source, kind = random.Random(f"{seed} {number}"), KINDS[number % len(KINDS)]
        folder = bed.root / f"case{number}"
        folder.mkdir()
        environ, name, tolerant = damaged_case(source, kind, bed, folder)
        ended = run(environ)
        outcome = classify(ended, bed.expected[name], tolerant)
        if kind == "checkpoints" and outcome == "identical" and not same_artifact(ended, bed.expected[name]):
            outcome = "wrong"
        report(kind, outcome, f"case {number}: {ended.code} {ended.stderr[-2000:]}")
        if outcome in OUTCOMES[:3]:
            shutil.rmtree(folder)


# ---- report ------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--kills", type=int, default=45, help="runs that are killed, some of them several times")
    parser.add_argument("--rank-kills", type=int, default=5, help="jobs of two ranks of which one is killed")
    parser.add_argument("--inputs", type=int, default=500, help="damaged inputs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="3 kills, 36 inputs")
    parser.add_argument("--keep", help="keep all files in this folder")
    args = parser.parse_args()
    if args.quick:
        args.kills, args.rank_kills, args.inputs = 3, 0, 36
    torch.set_num_threads(1)
    train_gpt.compile_count()  # imports what every child would import for itself
    for package in ("safetensors.torch", "sentencepiece", "zstandard"):
        train_gpt.require(package, "the campaign")
    began = time.perf_counter()
    table: dict[str, Counter[str]] = {}

    def report(kind: str, outcome: str, detail: str = "") -> None:
        table.setdefault(kind, Counter())[outcome] += 1
        if outcome in OUTCOMES[3:]:
            sys.stderr.write(f"{kind}: {outcome}: {detail}\n")

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.keep or temporary).resolve() / "campaign"
        root.mkdir(parents=True)
        bed = make_bed(root)
        source, run_began = random.Random(args.seed), time.perf_counter()
        again = run(bed.environ | {"OUT_DIR": str(root / "again")})
        whole_s = time.perf_counter() - run_began
        if again.fingerprint != bed.expected["whole"]:
            raise SystemExit("two undisturbed runs differ: nothing can be said about disturbed ones")
        for number in range(args.kills):
            environ = bed.environ | {"OUT_DIR": str(root / f"killed{number}")}
            report("kill -9", *kill_one(source, environ, bed.expected["whole"], whole_s))
        for number in range(args.rank_kills):
            environ = bed.environ | {"OUT_DIR": str(root / f"rank{number}")}
            outcome = kill_rank(source, environ, bed.expected["whole"], 2 * whole_s)
            report("kill -9 of a rank", outcome, environ["OUT_DIR"])
        damage(args.seed, args.inputs, bed, report)

    columns = [name for name in OUTCOMES if name in OUTCOMES[3:] or any(row[name] for row in table.values())]
    print(f"{'fault':<18} {'cases':>6} " + " ".join(f"{name:>12}" for name in columns))
    for kind, row in table.items():
        print(f"{kind:<18} {sum(row.values()):>6} " + " ".join(f"{row[name]:>12}" for name in columns))
    bad = sum(row[name] for row in table.values() for name in OUTCOMES[3:])
    machine = train_gpt.Runtime(train_gpt.Config(device="cpu"), {}).describe()
    print(json.dumps({
        "bench": "fault_campaign", "seed": args.seed, "seconds": round(time.perf_counter() - began, 1), "bad": bad,
        "cases": {kind: {name: row[name] for name in OUTCOMES} for kind, row in table.items()},
        "numpy": np.__version__, "machine": machine, "commit": common.git_commit(),
    }))  # fmt: skip
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
