"""Measures the graph step of tools/build_kg.py on a generated graph of half a million nodes.

    python bench/build_kg.py [--nodes 500000] [--text-mb 20]

The graph has WordNet's shape: words, senses, a tree of synsets, cross links. One sentence in twenty of the
text states a relation. Both come from fixed seeds, so nothing has to be downloaded. The step runs as a user
runs it, in a process of its own; its report comes first.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

GOAL_S, GOAL_MIB = 60, 4096
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
VERBS = ("causes", "requires", "enables", "improves", "contains", "is part of", "depends on", "leads to")


def generated_word(number: int) -> str:
    """Return the word of a number: its digits in base 70 as syllables."""
    word = ""
    while True:
        number, digit = divmod(number, len(SYLLABLES))
        word += SYLLABLES[digit]
        if number == 0:
            return word + "n"


def generated_edges(nodes: int, seed: int = 1) -> Iterator[str]:
    """Yield the lines of an edge list of about `nodes` nodes: a third words, the rest senses and synsets."""
    rng = random.Random(seed)
    words, senses, synsets = nodes // 3, nodes * 2 // 5, nodes // 4
    for sense in range(senses):
        word = sense if sense < words else int(words * rng.random() ** 2)  # few words have most senses
        yield f"word:{generated_word(word)}\thas_sense\tsense:{sense}\n"
        yield f"sense:{sense}\tin_synset\tsyn:{sense if sense < synsets else rng.randrange(synsets)}\n"
        if sense % 3 == 0:
            yield f"sense:{sense}\tderivation\tsense:{rng.randrange(senses)}\n"
    for synset in range(1, synsets):
        yield f"syn:{synset}\thypernym\tsyn:{int(synset * rng.random() ** 2)}\n"


def generated_text(characters: int, words: int, seed: int = 2) -> Iterator[str]:
    """Yield JSON lines of sentences such as "The A of the B causes C.", words distributed by Zipf's law."""
    rng = random.Random(seed)
    written = 0
    while written < characters:
        sentences = []
        for _ in range(50):
            first, second, third = (generated_word(int(words ** rng.random()) - 1) for _ in range(3))
            verb = rng.choice(VERBS) if rng.random() < 0.05 else "meets"
            sentences.append(f"The {first} of the {second} {verb} {third}.")
        line = json.dumps({"text": " ".join(sentences)}) + "\n"
        written += len(line)
        yield line


def main() -> int:
    """Generate, build, report; exit code 1 when the step failed or took more than the goal."""
    parser = common.arguments(__doc__, threads=1)
    parser.add_argument("--nodes", type=common.positive, default=500_000, help="about how many (%(default)s)")
    parser.add_argument("--text-mb", type=float, default=20.0, help="megabytes of text as well (%(default)s)")
    args = parser.parse_args()
    if args.quick:
        args.nodes, args.text_mb = 20_000, 1.0
    with tempfile.TemporaryDirectory() as folder:
        edges, text, out = (Path(folder) / name for name in ("edges.tsv", "text.jsonl", "words.tsv"))
        with edges.open("w") as file:
            file.writelines(generated_edges(args.nodes))
        with text.open("w") as file:
            file.writelines(generated_text(int(args.text_mb * 1e6), args.nodes // 3))
        command = [sys.executable, str(common.REPO / "tools/build_kg.py"), "graph"]
        command += ["--edges", str(edges), "--text", str(text), "--out", str(out)]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - started
    print(done.stdout, done.stderr, sep="", end="")
    if done.returncode:
        return 1
    report = dict(line.strip().split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // unit
    what = f"knowledge graph of {int(report['nodes']):,} nodes and {args.text_mb:g} MB of text"
    headlines = [
        common.Headline(what, seconds, "s", GOAL_S, at_least=False),
        common.Headline(f"{what}, peak memory", peak_mib, "MiB", GOAL_MIB, at_least=False),
    ]
    common.report("build_kg", headlines, None, 1, nodes=int(report["nodes"]), edges=int(report["edges"]))
    return int(seconds > GOAL_S or peak_mib > GOAL_MIB)


if __name__ == "__main__":
    sys.exit(main())
