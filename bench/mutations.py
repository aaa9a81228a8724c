"""How many planted faults the tests notice: one node of train_gpt.py is changed, the tests run, and again.

    python bench/mutations.py [--root REPO] [--seed 7] [--count 40] [--out FILE] [--replay FILE] [--keep] [--list]

Faults are drawn from the sections in turn, and within one from the kinds by WEIGHTS: a comparison turned or moved by
its border, a term of a sum or factor of a product left out, two arguments of like kind exchanged, + for -, n + 1 for
a number n, min for max. PLANTED are always among them. What changes no behaviour is left alone: texts, annotations,
log lines, performance switches; and what compiles to the same bytecode. Each fault gets a copy of the repository, in
which pytest stops at the first failure: first of the section's own test files, then, where these pass, of the others,
but for NOT_RUN and tests marked slow. A test that fails twice, or a run past its time limit, has caught it.

`--replay` plants the faults of an earlier result in another version of the file: in the function of the same name,
else wherever the same statement stands. It names those that have no place any more, draws others in their stead, and
takes over an `equivalent` that somebody wrote beside a fault: the reason why it can change nothing. `--keep` goes on
where a run was broken off, or counts again after such a reason was written.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

PROGRAM = "train_gpt.py"


# Section: its functions and classes, and the test files that should notice a fault in them, likeliest first.
SECTIONS = {
    "model": (
        "blocked_attention rms_norm rope_tables apply_rope remove_own_value LayerContext ProjectedTable pair_buckets "
        "SmearGate SelfAttention Block GPT",
        "test_golden_model test_golden_model_700 test_model",
    ),
    "optimizers": (
        "newton_schulz BankShard Muon flatten_gradients Optimizers lr_scale_at muon_momentum_at WeightAverage",
        "test_optimizers test_training",
    ),
    "artifact": (
        "Grid fake_quantize export_plan grid_of candidate_scales best_rounding round_plainly factorize "
        "round_by_hessian smallest quantize dequantize calibrate size_classes ans_tables encode_levels decode_levels "
        "order0_entropy_bytes shuffle_bytes pack_tensors unpack_artifact fit_artifact pack_artifact load_artifact",
        "test_quantization test_gptq test_artifact",
    ),
    "scoring": (
        "Windows plan_windows TokenScores Score score_of sample_targets WindowScorer score_stream "
        "ChunkTrainer score_then_adapt DocumentTrainer adapt_by_document",
        "test_scoring test_golden_scoring test_ttt test_ttt_documents",
    ),
    "mixing": (
        "_heads _Groups iter_ngram_counts _count_order iter_hashed_counts Evidence _bin "
        "BackoffNgramMixer PublishedBackoffMixer HedgeMixer guard blend mix_scores MassProbe "
        "recount_exact recount_group _tally",
        "test_ngram_counts test_mixers test_golden_scoring",
    ),
}
# Faults that a test missed once: qualified name, what stands there, what is put there.
PLANTED = (
    ("WeightAverage.update", "(10 + step)", "(2 + step)"),
    ("BackoffNgramMixer.update", "np.cumprod(1 - explained[:0:-1], 0)[::-1]", "np.cumprod(1 - explained[1:], 0)"),
)
# Restarts, kills and signals in several processes; time; and what no fault in the sections above could change.
NOT_RUN = (
    "test_restarts", "test_nodes", "test_fault_campaign", "test_resume", "test_evaluation_resume", "test_bad_input",
    "test_audit", "test_audit_holes", "test_audit_run", "test_guards", "test_speed", "test_lint", "test_source",
    "test_readme", "test_bench",
    "test_demo_corpus", "test_fetch_fineweb", "test_data_prepare", "test_record", "test_kg", "test_swarm",
    "test_gpu", "test_mutations",
)  # fmt: skip
ATTEMPTS = 3  # a test that fails and then, by itself, passes has seen nothing: two ranks may lose a race for a port
TIME_LIMIT = "time limit"
LIMIT_S = 3600  # of one pytest process; all tests take about 200 s where nobody else works
NO_BEHAVIOUR = re.compile(r"log\.(row|line)|runtime\.progress|torch\.compile|perf_counter|pin_memory|on_cuda|lanes = ")
UNSEEN_FIELDS = {"annotation", "returns", "decorator_list", "type_comment", "msg", "exc", "cause"}
COMPARISONS = {"<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=",), "!=": ("==",)}
PAIRS = (("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("clamp_min", "clamp_max"))
OPPOSITE = dict(PAIRS) | {second: first for first, second in PAIRS}
SYMMETRIC = {*OPPOSITE, "isinstance", "logaddexp", "bitwise_xor", "broadcast_shapes"}
WEIGHTS = dict(comparison=3, term=3, sign=2, constant=2, minmax=1, arguments=1)  # exchanged arguments crash mostly
OUTCOMES = ("caught", "survived", "equivalent")


@dataclasses.dataclass(frozen=True)
class Fault:
    """One change; `segment` becomes `replacement` in the innermost statement (or head of a block) `statement`."""

    name: str  # qualified, of the function or class
    section: str
    kind: str
    statement: str
    segment: str
    replacement: str
    start: int = dataclasses.field(compare=False)  # in bytes
    end: int = dataclasses.field(compare=False)
    which: int = 0  # of the faults in this file that are alike in all of the above

    def put_into(self, source: bytes) -> bytes:
        return source[: self.start] + self.replacement.encode() + source[self.end :]

    def record(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("start", "end")}


class Finder:
    """Every fault that one file could be given."""

    def __init__(self, source: bytes):
        self.source = source
        self.line_starts = [0, *(match.end() for match in re.finditer(rb"\n", source))]
        self.section_of = {name: section for section, (names, _) in SECTIONS.items() for name in names.split()}
        tree = ast.parse(source)
        self.defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        found = [fault for node in tree.body for fault in self._inside(node, "", node)]
        alike = Counter[Fault]()
        self.faults = []
        for fault in found:
            self.faults.append(dataclasses.replace(fault, which=alike[fault]))
            alike[fault] += 1

    def _span(self, node: ast.AST) -> tuple[int, int]:
        at: Any = node
        starts = self.line_starts
        return starts[at.lineno - 1] + at.col_offset, starts[at.end_lineno - 1] + at.end_col_offset

    def _text(self, start: int, end: int) -> str:
        return self.source[start:end].decode()

    def _of(self, node: ast.AST) -> str:
        return self._text(*self._span(node))

    def _operand(self, node: ast.AST) -> str:
        simple = ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Call
        return self._of(node) if isinstance(node, simple) else f"({self._of(node)})"

    def _with(self, node: ast.AST, left: ast.AST, right: ast.AST, old: str, new: str) -> str:
        """The node's text with `new` for the `old` operator between two of its parts."""
        (start, end), low, high = self._span(node), self._span(left)[1], self._span(right)[0]
        return self._text(start, low) + self._text(low, high).replace(old, new, 1) + self._text(high, end)

    def _inside(self, node: ast.AST, name: str, statement: ast.stmt) -> Iterator[Fault]:
        """Faults in a node and all below it. A string, an error's text and a log line hold none."""
        if isinstance(node, (ast.JoinedStr, ast.Raise)):
            return
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = f"{name}.{node.name}".lstrip(".")
        if isinstance(node, ast.stmt):
            statement = node
        start, end = self._span(statement)
        body = getattr(statement, "body", None)
        head = flat(self._text(start, self._span(body[0])[0] if body else end))
        if NO_BEHAVIOUR.search(head):
            return
        section = self.section_of.get(name.partition(".")[0], "")
        if name:
            for kind, changed in self._changes(node):
                own = self._span(node)
                yield Fault(name, section, kind, head, self._text(*own), changed, *own)
            for place, old, new in PLANTED if isinstance(node, ast.stmt) and not body else ():
                if name == place and old in self._text(start, end):
                    at = start + self.source[start:end].index(old.encode())
                    yield Fault(name, section, "planted", head, old, new, at, at + len(old.encode()))
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and field not in UNSEEN_FIELDS:
                    yield from self._inside(child, name, statement)

    def _changes(self, node: ast.AST) -> Iterator[tuple[str, str]]:
        """(kind, new text) of everything that this one node could become."""
        if isinstance(node, ast.Compare):
            for left, right in itertools.pairwise([node.left, *node.comparators]):
                operator = re.search(r"[<>=!]=?|$", self._text(self._span(left)[1], self._span(right)[0]))
                old = operator[0] if operator else ""
                for new in COMPARISONS.get(old, ()):
                    yield "comparison", self._with(node, left, right, old, new)
        elif isinstance(node, (ast.BinOp, ast.AugAssign, ast.UnaryOp)):
            yield from self._changed_sums(node)
        elif isinstance(node, ast.Call):
            yield from self._changed_calls(node)
        elif is_number(node):
            yield "constant", repr(ast.literal_eval(node) + 1)

    def _changed_sums(self, node: ast.BinOp | ast.AugAssign | ast.UnaryOp) -> Iterator[tuple[str, str]]:
        signs = ("+", "-") if isinstance(node.op, ast.Add) else ("-", "+")
        if isinstance(node, ast.UnaryOp):
            if isinstance(node.op, ast.USub) and not is_number(node.operand):
                yield "sign", self._operand(node.operand)
        elif isinstance(node, ast.AugAssign):
            if isinstance(node.op, (ast.Add, ast.Sub)):
                yield "sign", self._with(node, node.target, node.value, *signs)
        elif isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
            if any(isinstance(side, (ast.JoinedStr, ast.List, ast.Tuple)) for side in (node.left, node.right)):
                return
            yield "term", self._operand(node.left)
            if isinstance(node.op, (ast.Add, ast.Mult)):
                yield "term", self._operand(node.right)
            if isinstance(node.op, (ast.Add, ast.Sub)):
                yield "sign", self._with(node, node.left, node.right, *signs)

    def _changed_calls(self, node: ast.Call) -> Iterator[tuple[str, str]]:
        (start, end), function = self._span(node), self._of(node.func)
        last = re.split(r"\W", function)[-1]
        if last in OPPOSITE:
            yield "minmax", function[: -len(last)] + OPPOSITE[last] + self._text(self._span(node.func)[1], end)
        for left, right in itertools.pairwise(node.args) if last not in SYMMETRIC else ():
            (a, b), (c, d) = self._span(left), self._span(right)
            if type(left) is type(right) and self._of(left) != self._of(right):
                parts = (start, a), (c, d), (b, c), (a, b), (d, end)
                yield "arguments", "".join(self._text(*part) for part in parts)

    def draw(self, seed: int, count: int, taken: Sequence[Fault]) -> list[Fault]:
        """`taken` and further faults up to `count`: sections in turn, a kind, then one of its faults."""
        drawn, chance = list(taken), random.Random(seed)
        drawn += [fault for fault in self.faults if fault.kind == "planted" and fault not in drawn]
        code = bytecode(compile(self.source, PROGRAM, "exec", dont_inherit=True))
        while len(drawn) < count:
            places, had = {(fault.name, fault.statement) for fault in drawn}, Counter(fault.section for fault in drawn)
            left = [fault for fault in self.faults if fault.section and (fault.name, fault.statement) not in places]
            if not left:
                break
            section = min(SECTIONS, key=lambda name: (all(fault.section != name for fault in left), had[name]))
            left = [fault for fault in left if fault.section == section]
            kinds = sorted({fault.kind for fault in left} & set(WEIGHTS))
            kind = chance.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
            fault = chance.choice([fault for fault in left if fault.kind == kind])
            if bytecode(compile(fault.put_into(self.source), PROGRAM, "exec", dont_inherit=True)) == code:
                self.faults.remove(fault)
            else:
                drawn.append(fault)
        return drawn

    def place(self, row: dict[str, Any]) -> Fault | None:
        """The recorded fault in this file, if it has a place here."""

        def like(columns: Sequence[str]) -> list[Fault]:
            same = [(key, flat(row[key])) for key in ("kind", "segment", "replacement", *columns)]
            return [fault for fault in self.faults if all(flat(getattr(fault, key)) == value for key, value in same)]

        for columns in (("name", "statement", "which"), ("name", "statement"), ("name",), ("statement",)):
            found = like(columns)
            if len(found) == 1 or (found and columns == ("name", "statement")):
                return dataclasses.replace(found[0], section=row["section"])
        return None


def flat(text: object) -> str:
    return " ".join(str(text).split())


def is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def bytecode(code: types.CodeType) -> tuple[Any, ...]:
    """What a compiled file does, without where its lines stand."""
    inner = tuple(bytecode(c) if isinstance(c, types.CodeType) else (type(c), repr(c)) for c in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, inner


def run_tests(folder: Path, tests: Sequence[str], seed: int) -> str:
    """The id of the first test that fails, TIME_LIMIT, or nothing where all pass. Raises SystemExit for no tests."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", "-m", "not gpu and not slow", f"--hypothesis-seed={seed}", *tests]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        printed = process.communicate(timeout=LIMIT_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it started
        process.communicate()
        return TIME_LIMIT
    if process.returncode == 0:
        return ""
    if process.returncode not in (1, 2) and process.returncode >= 0:
        raise SystemExit(f"pytest ended with {process.returncode}:\n{printed}")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", printed, re.MULTILINE)
    return failed[1] if failed else f"pytest ended with {process.returncode}"


def caught_by(root: Path, source: bytes, seed: int, section: str, own: bool) -> str:
    """What notices that the program is `source`, of a section's own test files or of all others."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        unwanted = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".hypothesis")
        shutil.copytree(root, folder, symlinks=True, ignore=unwanted)
        (folder / PROGRAM).write_bytes(source)
        present = sorted(path.stem for path in (folder / "tests").glob("test_*.py") if path.stem not in NOT_RUN)
        of_section = [name for name in SECTIONS[section][1].split() if name in present] if section else []
        files = of_section if own else [name for name in present if name not in of_section]
        paths = [f"tests/{name}.py" for name in files]
        for _ in range(ATTEMPTS if paths else 0):
            failed = run_tests(folder, paths, seed)
            if not failed or failed == TIME_LIMIT or run_tests(folder, [failed], seed):
                return failed
    return ""


def shown(row: dict[str, Any]) -> str:
    return flat(f"{row['name']}: {row['segment']} -> {row['replacement']}")


def outcome(row: dict[str, Any]) -> str:
    return "equivalent" if row["equivalent"] else "caught" if row["caught_by"] else "survived"


def tally(rows: Sequence[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """How many faults came out how, for each value of a column, and last for all."""
    values = sorted({row[by] for row in rows})
    table = {value: Counter(outcome(row) for row in rows if row[by] == value) for value in values}
    table["all"] = Counter(map(outcome, rows))
    return [{by: value, **{name: found[name] for name in OUTCOMES}} for value, found in table.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=common.REPO, help="the repository whose tests are tried")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--count", type=common.positive, default=40)
    parser.add_argument("--out", type=Path, default=common.REPO / "bench" / "results" / "cpu-mutations.json")
    parser.add_argument("--replay", type=Path, help="an earlier result, whose faults come first")
    parser.add_argument("--keep", action="store_true", help="run nothing again that --out has an outcome of already")
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    args = parser.parse_args()
    source = (args.root / PROGRAM).read_bytes()
    finder = Finder(source)
    print("in SECTIONS but not in the file:", sorted(set(finder.section_of) - finder.defined) or "nothing")
    earlier = json.loads(args.replay.read_text(encoding="utf-8"))["faults"] if args.replay else []
    placed = {id(row): finder.place(row) for row in earlier}
    unplaced = [row for row in earlier if placed[id(row)] is None]
    for row in unplaced:
        print("no place for", shown(row))
    reasons = {placed[id(row)]: row["equivalent"] for row in earlier}
    kept = json.loads(args.out.read_text(encoding="utf-8"))["faults"] if args.keep and args.out.exists() else []
    known = {finder.place(row): row for row in kept}
    faults = finder.draw(args.seed, args.count, [fault for fault in dict.fromkeys(placed.values()) if fault])
    if args.list:
        for fault in faults:
            print(f"{fault.section:<10} {fault.kind:<10} {shown(fault.record())}")
        return 0
    if failed := "" if kept else caught_by(args.root, source, args.seed, section="", own=False):
        raise SystemExit(f"{failed} fails without any fault: nothing can be said about the others")
    blank: dict[str, Any] = dict(caught_by="", equivalent="", tests="none", seconds=0.0)
    rows = [known.get(fault) or fault.record() | blank | dict(equivalent=reasons.get(fault, "")) for fault in faults]
    for tests in ("own", "all"):  # the likeliest first for every fault, since all of them take ten times as long
        left = [n for n, row in enumerate(rows) if outcome(row) == "survived" and row["tests"] not in (tests, "all")]
        for done, number in enumerate(left, start=1):
            fault, row, began = faults[number], rows[number], time.perf_counter()
            row["caught_by"] = caught_by(args.root, fault.put_into(source), args.seed, fault.section, tests == "own")
            row["tests"], row["seconds"] = tests, round(row["seconds"] + time.perf_counter() - began, 1)
            print(f"{tests} {done}/{len(left)} {shown(row)}: {row['caught_by'] or 'SURVIVED'}", flush=True)
            args.out.write_text(json.dumps(dict(faults=rows), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    figures = dict(
        seed=args.seed, tested_commit=common.git_commit(args.root), outcomes=tally(rows, "section")[-1],
        sections=tally(rows, "section"), kinds=tally(rows, "kind"), without_place=len(unplaced),
        survivors=[shown(row) for row in rows if outcome(row) == "survived"],
    )  # fmt: skip
    result = common.report("mutations", [], **figures) | dict(unplaced=unplaced, faults=rows)
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
