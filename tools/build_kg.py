"""Builds the knowledge graph, ranks its words, and packs the ranking as the token blob of kg_data.py.

Step 1, `graph`: edge lists (head TAB relation TAB tail) and text (JSON lines with a "text" field, or plain)
become one weighted graph of ten relation types; PageRank scores its words; the highest go to a table.
Step 2, `blob`: that table is spread over the pieces of any SentencePiece tokenizer and packed. It needs no
graph: the table is committed.

    python tools/build_kg.py graph --edges edges.tsv.zst --text english.jsonl.zst --out data/kg_words.tsv
    python tools/build_kg.py blob --tokenizer tokenizer.model                     # rewrites kg_data.py
    python tools/build_kg.py blob --tokenizer tokenizer.model --out kg_blob.txt   # for KG_PATH=kg_blob.txt

Files ending in .zst are decompressed on the way. Both steps print a report. Step 1 needs igraph.
"""

import argparse
import base64
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import struct
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from kg_text import CLOSED_CLASS, TextFacts, is_content, read_batch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, but kg_data.py is one level up

import kg_data  # noqa: E402
from bench.common import positive  # noqa: E402

KG_WORDS = ROOT / "data" / "kg_words.tsv"
KG_DATA = ROOT / "kg_data.py"


class BuildError(Exception):
    """What is wrong with the input, in one line for the person who called."""


# --- relations ------------------------------------------------------------------------------------------

RELATION_TYPES = (
    "CAUSES", "REQUIRES", "SOLVES", "CONTRADICTS", "ENABLES", "IMPROVES", "PART_OF", "TRADEOFF_OF",
    "ALTERNATIVE_TO", "CONNECTS_TO",
)  # fmt: skip

# Source relation -> type and weight. Identity (a word and its senses) weighs most, loose association least.
SOURCE_RELATIONS: dict[str, tuple[str, float]] = {
    # Open English WordNet
    "has_sense": ("CONNECTS_TO", 1.0),
    "in_synset": ("CONNECTS_TO", 1.0),
    "hypernym": ("PART_OF", 0.6),  # a kind is part of its class: the nearest of the ten
    "instance_hypernym": ("PART_OF", 0.4),
    "mero_part": ("PART_OF", 0.6),
    "mero_member": ("PART_OF", 0.3),  # mostly taxonomy: species of a genus
    "mero_substance": ("PART_OF", 0.6),
    "causes": ("CAUSES", 0.8),
    "result": ("CAUSES", 0.6),
    "entails": ("REQUIRES", 0.8),
    "uses": ("REQUIRES", 0.5),
    "material": ("REQUIRES", 0.5),
    "agent": ("ENABLES", 0.5),
    "by_means_of": ("ENABLES", 0.5),
    "instrument": ("ENABLES", 0.5),
    "vehicle": ("ENABLES", 0.5),
    "antonym": ("CONTRADICTS", 0.6),
    "similar": ("ALTERNATIVE_TO", 0.5),
    "also": ("CONNECTS_TO", 0.4),
    "attribute": ("CONNECTS_TO", 0.4),
    "body_part": ("CONNECTS_TO", 0.4),
    "derivation": ("CONNECTS_TO", 0.6),
    "destination": ("CONNECTS_TO", 0.4),
    "domain_region": ("CONNECTS_TO", 0.1),
    "domain_topic": ("CONNECTS_TO", 0.2),
    "event": ("CONNECTS_TO", 0.4),
    "exemplifies": ("CONNECTS_TO", 0.1),  # register of a sense, such as "slang"
    "location": ("CONNECTS_TO", 0.4),
    "participle": ("CONNECTS_TO", 0.6),
    "pertainym": ("CONNECTS_TO", 0.6),
    "property": ("CONNECTS_TO", 0.4),
    "state": ("CONNECTS_TO", 0.4),
    "undergoer": ("CONNECTS_TO", 0.4),
    # this tool: a word form in the text and its dictionary form
    "inflection": ("CONNECTS_TO", 1.0),
    # text, and edge lists that use the type names themselves
    **{name: (name, 0.5) for name in RELATION_TYPES},
}
NOT_A_NOUN = 0.2  # weight of a word form in the text that is no noun, where a noun has 1
BACKWARD_WEIGHT = 0.5  # a relation is also followed against its direction, at this share of its weight

# --- reading --------------------------------------------------------------------------------------------


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its end) of a UTF-8 text file, decompressing .zst.

    Raises OSError, or BuildError naming the file when it is not what its name says.
    """
    if path.suffix == ".zst":
        import zstandard  # only compressed input needs it

        raw = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True)
        lines, fault = io.TextIOWrapper(raw, encoding="utf-8"), zstandard.ZstdError
    else:
        lines, fault = path.open(encoding="utf-8"), UnicodeDecodeError
    with lines:
        try:
            for number, line in enumerate(lines, 1):
                yield number, line.rstrip("\r\n")
        except (fault, UnicodeDecodeError) as error:
            raise BuildError(f"{path}: not UTF-8 text or damaged: {error}") from error


def read_edges(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (head, relation, tail) of a TSV edge list. Raises BuildError naming file, line and fault."""
    for number, line in read_lines(path):
        fields = line.split("\t")
        if len(fields) != 3:
            raise BuildError(f"{path}:{number}: {len(fields)} fields, not head TAB relation TAB tail")
        yield fields[0], fields[1], fields[2]


def read_texts(path: Path) -> Iterator[str]:
    """Yield documents: each line's "text" in .jsonl and .jsonl.zst, each line itself in any other file."""
    for number, line in read_lines(path):
        if ".jsonl" not in path.suffixes:
            yield line
            continue
        try:
            document = json.loads(line)
        except ValueError:
            document = None
        text = document.get("text") if isinstance(document, dict) else None
        if not isinstance(text, str):
            raise BuildError(f'{path}:{number}: not a JSON object with a "text" field')
        yield text


def batches(texts: Iterable[str], characters: int = 1 << 20) -> Iterator[list[str]]:
    """Group documents into lists of about `characters`."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    yield batch


def read_facts(paths: Sequence[Path], processes: int) -> TextFacts:
    """Return the facts of all text in `paths`; the number of processes makes no difference to them."""
    facts = TextFacts()
    texts = (text for path in paths for text in read_texts(path))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for part in pool.imap(read_batch, batches(texts)):
            facts.words.update(part.words)
            facts.relations.update(part.relations)
    return facts


# --- graph and ranking ----------------------------------------------------------------------------------


class Graph:
    """A directed graph whose nodes are strings and whose edges have a relation type and a weight."""

    def __init__(self) -> None:
        self.nodes: dict[str, int] = {}
        self.heads, self.tails, self.weights = array("i"), array("i"), array("d")
        self.edges_by_type: Counter[str] = Counter()

    def add(self, head: str, relation: str, tail: str, strength: float = 1.0) -> None:
        """Add an edge; its weight is that of the relation times `strength`. Raises BuildError if unknown."""
        if relation not in SOURCE_RELATIONS:
            raise BuildError(f"relation {relation!r} has no type and weight in SOURCE_RELATIONS")
        kind, weight = SOURCE_RELATIONS[relation]
        for node, column in ((head, self.heads), (tail, self.tails)):
            column.append(self.nodes.setdefault(node, len(self.nodes)))
        self.weights.append(weight * strength)
        self.edges_by_type[kind] += 1

    def pagerank(self, reset: np.ndarray | None = None, damping: float = 0.85) -> np.ndarray:
        """Return the PageRank of every node, summing to 1: (nodes,) float64, by igraph's PRPACK.

        A step follows an edge in proportion to its weight, or against its direction at `BACKWARD_WEIGHT` of
        it; with probability 1 - damping it starts anew from `reset` (nodes,), or from any node alike.
        """
        import igraph  # only this step needs it, and the blob step must run without

        heads, tails = np.frombuffer(self.heads, np.intc), np.frombuffer(self.tails, np.intc)
        weights = np.frombuffer(self.weights)
        ends = np.stack([np.concatenate([heads, tails]), np.concatenate([tails, heads])], axis=1)
        graph = igraph.Graph(n=len(self.nodes), edges=ends, directed=True)
        both = np.concatenate([weights, BACKWARD_WEIGHT * weights]).tolist()
        start = np.ones(len(self.nodes)).tolist() if reset is None else reset.tolist()
        return np.array(
            graph.personalized_pagerank(damping=damping, reset=start, weights=both, implementation="prpack")
        )


def base_forms(word: str) -> Iterator[str]:
    """Yield what `word` may be an inflection of, likeliest first: WordNet's rules of detachment."""
    for ending, bases in (
        ("ies", ("y",)), ("ches", ("ch",)), ("shes", ("sh",)), ("sses", ("ss",)), ("xes", ("x",)),
        ("ves", ("f", "fe")), ("men", ("man",)), ("s", ("",)), ("ied", ("y",)), ("ed", ("", "e")),
        ("ing", ("", "e")), ("ier", ("y",)), ("iest", ("y",)), ("er", ("", "e")), ("est", ("", "e")),
    ):  # fmt: skip
        if word.endswith(ending) and len(word) - len(ending) >= 2:
            stem = word[: -len(ending)]
            yield from (stem + base for base in bases)
            if ending in ("ed", "ing", "er", "est") and stem[-1] == stem[-2]:
                yield stem[:-1]


def noun_shares(graph: Graph) -> dict[str, float]:
    """Return word -> share of its senses that are nouns, by WordNet's sense keys: LEMMA%1:... is a noun."""
    names = list(graph.nodes)
    senses: Counter[str] = Counter()
    nouns: Counter[str] = Counter()
    for head, tail in zip(graph.heads, graph.tails, strict=True):
        if names[head].startswith("word:") and "%" in names[tail]:
            word = names[head].removeprefix("word:")
            senses[word] += 1
            nouns[word] += names[tail].rpartition("%")[2].startswith("1")
    return {word: nouns[word] / count for word, count in senses.items()}


def add_text(graph: Graph, facts: TextFacts, min_count: int = 5) -> dict[int, float]:
    """Join word forms and relations of a text to the `word:` nodes of `graph`; return node -> start weight.

    A form that is no node itself but an inflection of one becomes a node, linked to its base. What is neither
    (function words, code, misspellings) is left out, and so are relations that mention it. Each form counts
    under the capitalisation that the dictionary has, or under the text's where the dictionary has both.

    The weight is the number of documents with the form, less for what is not a noun: nouns name the things
    that relations hold between, where "get" or "make" is in every text and says little about any.
    """
    forms: dict[str, Counter[str]] = {}
    for form, count in facts.words.items():
        forms.setdefault(form.lower(), Counter())[form] += count
    counts = {lowered: spellings.total() for lowered, spellings in forms.items()}
    known = frozenset(node.removeprefix("word:") for node in graph.nodes if node.startswith("word:"))
    shares = noun_shares(graph)
    names: dict[str, str] = {}
    weights: dict[int, float] = {}
    for lowered, count in sorted(counts.items()):
        if count < min_count or not is_content(lowered):
            continue
        capital = lowered.capitalize()
        mostly_capital = forms[lowered][capital] > 0.8 * count
        preferred = (capital, lowered) if mostly_capital else (lowered, capital)
        spelling = next((form for form in preferred if form in known), None)
        bases = [base for base in base_forms(lowered) if base in known and is_content(base)]
        if spelling:
            share = shares.get(spelling, 1.0)
        elif bases:
            spelling = lowered
            graph.add(f"word:{spelling}", "inflection", f"word:{bases[0]}")
            share = shares.get(bases[0], 1.0) if lowered.endswith(("s", "men")) else 0.0
        else:
            continue
        if lowered.endswith("ing") and any(counts.get(base, 0) > count for base in bases):
            share = 0.0  # "using" has a sense as a noun, but is a form of the commoner "use"
        names[lowered] = f"word:{spelling}"
        weights[graph.nodes[names[lowered]]] = count * (share + NOT_A_NOUN * (1 - share))
    for (head, relation, tail), times in sorted(facts.relations.items()):
        if head in names and tail in names:
            graph.add(names[head], relation, names[tail], math.log2(1 + times))
    return weights


def rank_words(graph: Graph, rank: np.ndarray, limit: int) -> list[tuple[str, float]]:
    """Return the highest words with their scores, the first 1: content words of two letters or more."""
    scores: dict[str, float] = {}
    for node, index in graph.nodes.items():
        word = node.removeprefix("word:")
        if word != node and is_content(word.lower()):
            scores[word] = float(rank[index])
    best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:limit]
    if not best:
        raise BuildError(
            "the graph has no words: nodes named word:LEMMA, as in the WordNet edge list, are needed"
        )
    return [(word, score / best[0][1]) for word, score in best]


def write_words(path: Path, words: Sequence[tuple[str, float]], notes: Sequence[str]) -> None:
    """Write the word table, with `notes` as a header of comments."""
    lines = [f"# {note}" for note in notes] + [f"{word}\t{score:.5f}" for word, score in words]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_words(path: Path) -> list[tuple[str, float]]:
    """Return the words and scores of a table. Raises BuildError naming file, line and fault."""
    words: list[tuple[str, float]] = []
    for number, line in read_lines(path):
        if not line.startswith("#"):
            word, _, score = line.partition("\t")
            try:
                words.append((word, float(score)))
            except ValueError as error:
                raise BuildError(f"{path}:{number}: not word TAB score") from error
    return words


# --- tokens ---------------------------------------------------------------------------------------------


def token_scores(
    words: Iterable[tuple[str, float]], encode: Callable[[str], list[int]], pieces: list[str]
) -> dict[int, float]:
    """Return token id -> score: of the words that the token helps to spell, the one it says most about.

    A word counts for each piece that its real encoding, space in front, has, times the cube of the share of
    the word that the piece covers. The maximum, and not the sum, over words keeps common fragments such as
    "ing" below whole words. A piece that spells a function word mostly stands for that, and gets none.
    """
    context = encode("a")  # tokenizers without a dummy prefix strip a space that nothing precedes
    scores: dict[int, float] = {}
    for word, score in words:
        ids = encode(f"a {word}")
        if ids[: len(context)] != context:
            raise BuildError("this tokenizer does not split text at spaces; the blob needs one that does")
        ids = ids[len(context) :]
        length = sum(len(pieces[i]) for i in ids)
        for i in ids:
            if pieces[i].lstrip("▁").lower() not in CLOSED_CLASS:
                scores[i] = max(scores.get(i, 0.0), score * (len(pieces[i]) / length) ** 3)
    return scores


def pack(scores: Mapping[int, float], pieces: list[str]) -> str:
    """Return the blob of the 358 highest tokens, importance the square root of score / highest score.

    Raises BuildError when the vocabulary is too large for the header or too few tokens can be stored.
    """
    if len(pieces) > 0xFFFF:
        raise BuildError(f"the vocabulary has {len(pieces)} pieces; the blob's header holds 65,535 at most")
    storable = {i: score for i, score in scores.items() if i < 1 << 10}
    if len(storable) < kg_data.COUNT:
        raise BuildError(
            f"only {len(storable)} tokens with an id below 1,024 spell a listed word; {kg_data.COUNT} needed"
        )
    best = sorted(storable, key=lambda i: (-storable[i], i))[: kg_data.COUNT]
    steps = {i: max(1, round(64 * math.sqrt(storable[i] / storable[best[0]]))) for i in best}
    header = kg_data.HEADER.pack(kg_data.MAGIC, kg_data.COUNT, len(pieces), kg_data.fingerprint(pieces))
    entries = [i << 6 | steps[i] - 1 for i in sorted(best)]
    return base64.b64encode(header + struct.pack(f"<{len(entries)}H", *entries)).decode()


def rewrite_kg_data(blob: str, command: str) -> None:
    """Put the blob and the command that made it into kg_data.py, atomically; the decoder there stays."""
    rows = [f'    "{blob[i : i + 104]}"' for i in range(0, len(blob), 104)]
    source = KG_DATA.read_text(encoding="utf-8")
    for pattern, text in (
        (r"^    python tools/build_kg\.py blob.*?$", f"    {command}"),
        (r"^BLOB = \(\n.*?^\)$", "\n".join(["BLOB = (", *rows, ")"])),
    ):
        source, places = re.subn(pattern, lambda _, text=text: text, source, flags=re.MULTILINE | re.DOTALL)
        if places != 1:
            raise BuildError(f"{KG_DATA} has {places} places for what matches {pattern!r}, not 1")
    temporary = KG_DATA.with_suffix(".tmp")
    temporary.write_text(source, encoding="utf-8")
    temporary.replace(KG_DATA)


# --- command line ---------------------------------------------------------------------------------------


def peak_memory_mib() -> tuple[int, int]:
    """Return the peak memory of this process and of its largest worker in MiB; zeros where unknown."""
    try:
        import resource  # absent on Windows
    except ImportError:
        return 0, 0
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    own, worker = (resource.getrusage(which).ru_maxrss // unit for which in who)
    return own, worker


def shown(path: Path) -> str:
    """Return a path as a record of the command gives it: relative inside the repository, else the name."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def print_costs(started: float) -> None:
    """Print the end of a report."""
    own, worker = peak_memory_mib()
    print(f"seconds: {time.monotonic() - started:.1f}")
    print(f"peak memory: {own} MiB, largest worker {worker} MiB")


def run_graph(args: argparse.Namespace) -> None:
    """Carry out step 1 and print its report."""
    started = time.monotonic()
    graph = Graph()
    for path in args.edges:
        for head, relation, tail in read_edges(path):
            graph.add(head, relation, tail)
    facts = read_facts(args.text, args.processes) if args.text else TextFacts()
    starts = add_text(graph, facts)
    if not graph.heads:
        raise BuildError("no edge in --edges or --text: there is no graph to rank words by")
    reset = np.bincount(list(starts), list(starts.values()), len(graph.nodes)) if starts else None
    print(f"read: {time.monotonic() - started:.1f} s, {len(facts.relations)} distinct relations in the text")
    words = rank_words(graph, graph.pagerank(reset), args.words)
    command = ["python", "tools/build_kg.py", "graph"]
    command += [part for path in args.edges for part in ("--edges", shown(path))]
    command += [part for path in args.text for part in ("--text", shown(path))]
    notes = [
        "Words by importance: PageRank in the knowledge graph of tools/build_kg.py, the highest scaled to 1.",
        *(f"Source: {source}" for source in args.source),
        f"Made by: {shlex.join([*command, '--words', str(args.words), '--out', shown(args.out)])}",
    ]
    write_words(args.out, words, notes)
    print(f"nodes: {len(graph.nodes)}")
    print(f"edges: {len(graph.weights)}")
    for kind in RELATION_TYPES:
        print(f"  {kind}: {graph.edges_by_type[kind]}")
    print("top words:", " ".join(word for word, _ in words[:40]))
    print(f"wrote {args.out}: {len(words)} words")
    print_costs(started)


def run_blob(args: argparse.Namespace) -> None:
    """Carry out step 2 and print its report."""
    import sentencepiece  # only this step needs it

    started = time.monotonic()
    words = read_words(args.words)
    if not args.tokenizer.is_file():
        raise BuildError(f"no tokenizer at {args.tokenizer}")
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.load(str(args.tokenizer))
    except RuntimeError as error:
        raise BuildError(f"{args.tokenizer} is no SentencePiece model") from error
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    scores = token_scores(words, tokenizer.encode, pieces)
    blob = pack(scores, pieces)
    importance = kg_data.decode(pieces, blob)
    if args.out:
        args.out.write_text(blob + "\n", encoding="ascii")
    else:
        command = ["python", "tools/build_kg.py", "blob"]
        command += ["--words", shown(args.words), "--tokenizer", shown(args.tokenizer)]
        rewrite_kg_data(blob, shlex.join(command))
    best = sorted(importance, key=lambda i: -scores[i])
    beyond = sum(i >= 1 << 10 for i in scores)
    print(f"words: {len(words)}")
    print(f"tokens that spell them: {len(scores)} of {len(pieces)}; kept: {len(importance)}")
    if beyond:
        print(f"left out: {beyond} tokens with an id of 1,024 or more, which 10 bits cannot hold")
    print("top tokens:", " ".join(pieces[i] for i in best[:40]))
    print(f"wrote {args.out or KG_DATA.name}: {len(blob)} characters")
    print_costs(started)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=form)
    steps = parser.add_subparsers(dest="step", required=True, metavar="graph|blob")
    graph = steps.add_parser("graph", help="edge lists and text -> word table")
    graph.add_argument("--edges", type=Path, action="append", default=[], help="TSV edge list; repeatable")
    graph.add_argument(
        "--text", type=Path, action="append", default=[], help="text or JSON lines; repeatable"
    )
    graph.add_argument("--source", action="append", default=[], help="source and licence, for the header")
    graph.add_argument("--words", type=positive, default=4000, help="how many words to keep (%(default)s)")
    graph.add_argument(
        "--processes", type=positive, default=os.cpu_count() or 1, help="for text (%(default)s)"
    )
    graph.add_argument("--out", type=Path, default=KG_WORDS, help="word table (data/kg_words.tsv)")
    graph.set_defaults(run=run_graph)
    blob = steps.add_parser("blob", help="word table -> blob for a tokenizer")
    blob.add_argument("--words", type=Path, default=KG_WORDS, help="word table (data/kg_words.tsv)")
    blob.add_argument("--tokenizer", type=Path, required=True, help="SentencePiece model")
    blob.add_argument("--out", type=Path, help="text file for the blob; without it kg_data.py is rewritten")
    blob.set_defaults(run=run_blob)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step; returns the exit code, 2 after a one-line error."""
    args = parse_arguments(argv)
    try:
        args.run(args)
    except (BuildError, OSError) as error:
        print(f"build_kg: {error}", file=sys.stderr)
    except ImportError as error:
        print(f"build_kg: this step needs {error.name}: pip install {error.name}", file=sys.stderr)
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
