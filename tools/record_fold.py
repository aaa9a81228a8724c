"""One self-contained train_gpt.py out of the three code files: what a records folder counts as code.

Docstrings and comments leave blanks, so that every line keeps its number; the rest is compressed with bz2, which made
the smallest text of the standard library's three and gives the same bytes everywhere. Loaded, the file registers the
unpacked text in `linecache` under the readable files' paths: tracebacks, `inspect` and torch's compiler find source
text there, no file is written, and where the readable files lie beside it they say the same line for line.
"""

from __future__ import annotations

import ast
import base64
import bz2
import io
import json
import textwrap
import tokenize
from collections.abc import Mapping
from pathlib import Path

PROGRAM = "train_gpt.py"
MODULES = ("kg_data.py", "swarm_agents.py", PROGRAM)  # in the order of their imports
READABLE = "source"  # the subfolder of the readable files, which do not count
LIMIT_BYTES = 70_000
COLUMNS = 118

TEMPLATE = '''"""Parameter Golf record: {title}

    SEED=1337 torchrun --nproc_per_node=8 train_gpt.py    # here, with the data in ../../../data; without variables
    DATA_PATH=DIR TOKENIZER_PATH=FILE python train_gpt.py # the data elsewhere; one GPU, or a CPU
    EVAL_ONLY=1 ARTIFACT=final_model.int6.ptz python train_gpt.py
    python train_gpt.py --help                            # recipes and settings

Made by tools/record.py of {names}, which lie readable in {readable}/.
PAYLOAD is these files, line by line, without docstrings and comments; DEFAULTS replace the defaults of these fields of
Config. Everything that counts as code is in this file. Loading it writes nothing and starts nothing: the text is kept
in memory, where tracebacks and inspect find it under the names and line numbers of the readable files.
"""

import base64
import bz2
import json
import linecache
import os
import sys
import types

# What settings are where no variable says otherwise.
DEFAULTS = {defaults}


def unfold(payload):
    """Unpack the files, load all but the last as modules, and return the last one's code."""
    folder = os.path.dirname(os.path.abspath(__file__))
    files = json.loads(bz2.decompress(base64.b85decode("".join(payload.split()))))
    for name, text in files.items():
        path = os.path.join(folder, "{readable}", name)
        entry = (len(text), None, text.splitlines(keepends=True), path)
        linecache.cache[path] = entry
        code = compile(text, path, "exec", dont_inherit=True)
        if name != "{program}":
            module = types.ModuleType(name[:-3])
            module.__file__ = path
            sys.modules[module.__name__] = module
            exec(code, module.__dict__)
    if __name__ != "__main__":  # inspect looks for a class in its module's file
        linecache.cache[__file__] = entry
    return code


PAYLOAD = """
{payload}
"""

exec(unfold(PAYLOAD), globals())
'''


class FoldError(Exception):
    """Sources that cannot be folded; the text says which and why."""


def fold(sources: Mapping[str, str], title: str, defaults: Mapping[str, str]) -> str:
    """The text of the one file; `defaults` are values of Config's fields where no variable is set.

    Raises FoldError.
    """
    files = folded_sources(sources, defaults)
    plain = {ord("\n"): " ", ord('"'): "'", ord("\\"): "/"}  # it stands in a docstring
    packed = bz2.compress(json.dumps(files, ensure_ascii=False).encode())
    return TEMPLATE.format(
        title=title.translate(plain), names=", ".join(MODULES[::-1]), readable=READABLE, program=PROGRAM,
        defaults=json.dumps(defaults, indent=4),
        payload="\n".join(textwrap.wrap(base64.b85encode(packed).decode("ascii"), COLUMNS)),
    )  # fmt: skip


def folded_sources(sources: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """What the payload has: the files without docstrings and comments, with the new defaults. Raises FoldError."""
    missing = [name for name in MODULES if name not in sources]
    if missing:
        raise FoldError(f"{missing[0]} is missing; a record is folded of {', '.join(MODULES)}")
    try:
        known = recipes_of(sources[PROGRAM])
        if "recipe" in defaults and defaults["recipe"] not in known:
            raise FoldError(f"recipe {defaults['recipe']!r} is unknown; choose one of {', '.join(known)}")
        changed = {**sources, PROGRAM: with_defaults(sources[PROGRAM], list(defaults))}
        return {name: without_prose(changed[name], name) for name in MODULES}
    except SyntaxError as error:
        raise FoldError(f"{error.filename or 'a source'} is no Python: {error}") from error


def unfolded(text: str) -> tuple[dict[str, str], dict[str, str]] | None:
    """Files and defaults in a folded text, without running it; None for any other text."""
    try:
        values = {
            ast.unparse(statement.targets[0]): ast.literal_eval(statement.value)
            for statement in ast.parse(text).body
            if isinstance(statement, ast.Assign)
        }
        files = json.loads(bz2.decompress(base64.b85decode("".join(values["PAYLOAD"].split()))))
        return (files, values["DEFAULTS"]) if list(files) == list(MODULES) else None
    except (SyntaxError, ValueError, KeyError, AttributeError, OSError, EOFError, TypeError):
        return None


def with_defaults(source: str, names: list[str]) -> str:
    """The program with DEFAULTS["name"] as the default of these fields of Config. Raises FoldError, SyntaxError."""
    tree = ast.parse(source, PROGRAM)
    lines = source.encode().split(b"\n")
    settings = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"), None)
    values = {
        node.target.id: node.value.args[0]
        for node in (settings.body if settings else ())
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Call) and node.value.args
    }  # fmt: skip
    for name in names:
        value = values.get(name)
        if not isinstance(value, ast.Constant) or value.lineno != value.end_lineno:
            raise FoldError(f"Config in {PROGRAM} has no field {name!r} whose default is a literal on one line")
        line = lines[value.lineno - 1]
        place = f'DEFAULTS["{name}"]'.encode()
        lines[value.lineno - 1] = line[: value.col_offset] + place + line[value.end_col_offset :]
    return b"\n".join(lines).decode()


def recipes_of(source: str) -> list[str]:
    """Names of the program's recipes, the keys of its table RECIPES. Raises SyntaxError."""
    for statement in ast.parse(source, PROGRAM).body:
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "RECIPES":
            keys = statement.value.keys if isinstance(statement.value, ast.Dict) else []
            return [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    return []


def without_prose(source: str, name: str) -> str:
    """The same program without docstrings and comments, each line at its number. Raises FoldError, SyntaxError."""
    tree = ast.parse(source, name)
    lines = source.encode().split(b"\n")
    for node in documented(tree):
        text, remains = node.body[0], isinstance(node, ast.Module) or len(node.body) > 1
        first, last = text.lineno - 1, (text.end_lineno or text.lineno) - 1
        head, tail = lines[first][: text.col_offset], lines[last][text.end_col_offset :]
        lines[first : last + 1] = [b""] * (last + 1 - first)
        lines[first] = (head + (b"" if remains else b"pass") + tail).rstrip()
    kept = b"\n".join(lines).decode().split("\n")
    for token in tokenize.generate_tokens(io.StringIO("\n".join(kept)).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            kept[row - 1] = kept[row - 1][:column].rstrip()
    result = "\n".join(kept)
    for node in documented(tree):
        node.body[:1] = [] if isinstance(node, ast.Module) or len(node.body) > 1 else [ast.Pass()]
    try:
        same = ast.dump(ast.parse(result)) == ast.dump(tree)
    except SyntaxError:
        same = False
    if not same:
        raise FoldError(f"{name} without its docstrings would be another program; put each on lines of its own")
    return result


def documented(tree: ast.Module) -> list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Everything in the tree that begins with a docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [node for node in nodes if ast.get_docstring(node, clean=False) is not None]


def read_sources(folder: Path) -> dict[str, str]:
    """The code files in a folder that are there. Raises FoldError for one that cannot be read."""
    found = {}
    for path in (folder / name for name in MODULES):
        try:
            if path.exists():
                found[path.name] = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FoldError(f"cannot read {path}: {error}") from error
    return found
