"""Do the own rules of tools/build_kg.py find a word's dictionary form as well as the library simplemma does?

    pip install simplemma
    python bench/lemmatizer.py --edges wordnet_edges.tsv.zst --forms en_ewt-ud-test.conllu \\
        --text english_train.jsonl.zst --tokenizer fineweb_1024_bpe.model

Judged on the forms that the graph step needs a dictionary form of: nouns, verbs, adjectives and adverbs of a treebank
(CoNLL-U) that are no word of WordNet, and whose lemma there is one. With --text and --tokenizer the graph is ranked
with either too, and the tokens of the two blobs are compared. The library's form counts where WordNet has it. Its
seconds hold the loading of its dictionary; the last row finds all that cached.
"""

import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
sys.path.append(str(REPO / "tools"))  # last: this folder has a build_kg.py too

import kg_data  # noqa: E402
import train_gpt  # noqa: E402
from bench import common  # noqa: E402
from tools import build_kg  # noqa: E402

Lemmas = Callable[[str], Iterator[str]]  # a form -> what it may be an inflection of, likeliest first


def lemmatizers() -> dict[str, Lemmas]:
    """The own rules, the library, and the library with the rules for what it does not know."""
    simplemma = train_gpt.require("simplemma", "comparing lemmatizers")
    own = build_kg.base_forms

    def library(form: str) -> Iterator[str]:
        lemma = simplemma.lemmatize(form, lang="en").lower()
        yield from [lemma] if lemma != form else []

    def both(form: str) -> Iterator[str]:
        yield from library(form)
        yield from own(form)

    return {"own": own, "library": library, "library, then own": both}


def treebank(paths: list[Path]) -> dict[str, Counter[str]]:
    """Lower-case form -> its lemmas with their number of tokens; without misspellings and abbreviations."""
    found: dict[str, Counter[str]] = {}
    for path in paths:
        for _, line in build_kg.read_lines(path):
            fields = line.split("\t")
            if len(fields) != 10 or fields[3] not in {"NOUN", "VERB", "ADJ", "ADV"}:
                continue
            if "Typo=Yes" not in fields[5] and "Abbr=Yes" not in fields[5]:
                found.setdefault(fields[1].lower(), Counter())[fields[2].lower()] += 1
    return found


def accuracy(name: str, lemmas: Lemmas, gold: Mapping[str, Counter[str]], known: frozenset[str]) -> dict[str, Any]:
    """How many of the forms get a lemma of the treebank, another word, or none."""
    began = time.process_time()
    found = {form: next((b for b in lemmas(form) if b in known and build_kg.is_content(b)), None) for form in gold}
    seconds = time.process_time() - began
    right = [form for form, lemma in found.items() if lemma in gold[form]]
    tokens = sum(gold[form].total() for form in right) / sum(lemmas.total() for lemmas in gold.values())
    none = sum(lemma is None for lemma in found.values())
    return dict(
        lemmatizer=name, right_forms=len(right) / len(gold), right_tokens=tokens, wrong=len(gold) - len(right) - none,
        none=none, cpu_s=seconds,
    )  # fmt: skip


def blob_of(
    lemmas: Lemmas, edges: list[tuple[str, str, str]], facts: build_kg.TextFacts, tokenizer: Any
) -> tuple[list[str], dict[int, float]]:
    """The words of the table, and token id -> importance, that the two steps of tools/build_kg.py make with this."""
    graph = build_kg.Graph()
    for edge in edges:
        graph.add(*edge)
    with mock.patch.object(build_kg, "base_forms", lemmas):
        starts = build_kg.add_text(graph, facts)
    reset = np.bincount(list(starts), list(starts.values()), len(graph.nodes))
    words = build_kg.rank_words(graph, graph.pagerank(reset), 4000)
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    scores = build_kg.token_scores(words, tokenizer.encode, pieces)
    return [word for word, _ in words], kg_data.decode(pieces, build_kg.pack(scores, pieces))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=Path, required=True, help="WordNet's edge list, as for tools/build_kg.py")
    parser.add_argument("--forms", type=Path, action="append", required=True, help="treebank, CoNLL-U; repeatable")
    parser.add_argument("--text", type=Path, action="append", default=[], help="as for tools/build_kg.py; repeatable")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model, with --text")
    args = parser.parse_args()
    try:
        edges = list(build_kg.read_edges(args.edges))
        words = treebank(args.forms)
        ways = lemmatizers()
    except (OSError, build_kg.BuildError, train_gpt.UserError) as error:
        parser.error(str(error))
    ends = (node for head, _, tail in edges for node in (head, tail))
    known = frozenset(node.removeprefix("word:") for node in ends if node.startswith("word:"))
    gold = {
        form: lemmas
        for form, lemmas in words.items()
        if build_kg.is_content(form) and not {form, form.capitalize()} & known and (lemmas.keys() - {form}) & known
    }
    if not gold:
        parser.error(f"no form in {', '.join(map(str, args.forms))} needs a dictionary form; is it CoNLL-U in English?")
    figures: dict[str, Any] = dict(forms=len(gold), accuracy=[accuracy(n, way, gold, known) for n, way in ways.items()])
    if args.text and args.tokenizer:
        import sentencepiece

        tokenizer = sentencepiece.SentencePieceProcessor()
        tokenizer.load(str(args.tokenizer))
        facts, made = build_kg.read_facts(args.text, processes=2), {}
        for name, way in ways.items():
            made[name] = blob_of(way, edges, facts, tokenizer)
        table, blob = made.pop("own")
        figures["effect"] = [
            dict(
                lemmatizer=name, words_shared=len(set(table) & set(other)), words=len(table),
                tokens_shared=len(blob.keys() & its.keys()), tokens=len(blob),
                steps_changed=sum(blob[i] != its[i] for i in blob.keys() & its.keys()),
                largest_new=max((its[i] for i in its.keys() - blob.keys()), default=0.0),
            )
            for name, (other, its) in made.items()
        ]  # fmt: skip
    common.report("lemmatizer", [], **figures)


if __name__ == "__main__":
    main()
