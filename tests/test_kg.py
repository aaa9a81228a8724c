"""Knowledge graph: extraction, ranking, tokens, blob. Run: python -m pytest tests/test_kg.py"""

import base64
import io
import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import build_kg  # noqa: E402
import kg_text  # noqa: E402

import kg_data  # noqa: E402

# Every relation of the WordNet edge list that data/kg_words.tsv was made from, under the source's names.
WORDNET_RELATIONS = [
    "has_sense", "in_synset", "hypernym", "derivation", "similar", "mero_member", "mero_part",
    "instance_hypernym", "exemplifies", "pertainym", "antonym", "event", "domain_topic", "also", "agent",
    "result", "domain_region", "attribute", "by_means_of", "undergoer", "mero_substance", "instrument",
    "uses", "state", "entails", "property", "location", "causes", "material", "vehicle", "participle",
    "body_part", "destination",
]  # fmt: skip
PIECES = [f"p{i}" for i in range(1024)]
HEADER_BYTES = kg_data.HEADER.size


def blob_of(importance: dict[int, float], pieces: list[str] = PIECES) -> str:
    return build_kg.pack(importance, pieces)


BLOB = blob_of({i: i / 1023 for i in range(1, 1024)})


# --- blob -----------------------------------------------------------------------------------------------


def test_committed_blob_has_the_format():
    raw = base64.b64decode(kg_data.BLOB, validate=True)
    assert len(kg_data.BLOB) == 976
    assert len(raw) == 732 == 16 + 358 * 2
    assert raw[:4] == kg_data.MAGIC
    assert int.from_bytes(raw[4:6], "little") == 358
    assert int.from_bytes(raw[6:8], "little") == 1024
    entries = np.frombuffer(raw[16:], "<u2")
    assert np.all(np.diff(entries >> 6) > 0)
    assert (entries & 63).max() == 63  # the highest importance is 1
    assert len((ROOT / "kg_data.py").read_text().splitlines()) <= 60
    assert "python tools/build_kg.py blob --words data/kg_words.tsv --tokenizer " in (kg_data.__doc__ or "")


def test_committed_blob_is_refused_for_another_tokenizer_with_the_command_that_helps():
    with pytest.raises(ValueError, match=r"another tokenizer.*python tools/build_kg\.py blob --tokenizer"):
        kg_data.decode(PIECES)


@pytest.mark.parametrize("pieces", [PIECES[:-1], [*PIECES, "x"], [*PIECES[:-2], "p1023", "p1022"], []])
def test_pieces_must_be_the_same_in_number_and_order(pieces: list[str]):
    with pytest.raises(ValueError, match="another tokenizer"):
        kg_data.decode(pieces, BLOB)


@given(st.integers(0, 2**32 - 1), st.integers(1024, 1500), st.floats(0.1, 30))
def test_blob_round_trips(seed: int, vocab_size: int, spread: float):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(vocab_size)[: rng.integers(700, vocab_size + 1)]
    scores = {
        int(i): float(score) for i, score in zip(ids, np.exp(spread * rng.normal(size=len(ids))), strict=True)
    }
    pieces = [chr(c) for c in rng.integers(0x21, 0xD7FF, vocab_size)]
    importance = kg_data.decode(pieces, blob_of(scores, pieces))
    kept = sorted((i for i in scores if i < 1024), key=lambda i: (-scores[i], i))[:358]
    assert list(importance) == sorted(kept)
    assert importance[kept[0]] == 1
    for i, value in importance.items():
        assert 1 / 64 <= value <= 1
        assert value == pytest.approx((scores[i] / scores[kept[0]]) ** 0.5, abs=1 / 64)


@given(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_any_changed_header_byte_is_noticed(position: int, flip: int):
    raw = bytearray(base64.b64decode(BLOB))
    raw[position] ^= flip
    with pytest.raises(ValueError, match="knowledge-graph blob"):
        kg_data.decode(PIECES, base64.b64encode(raw).decode())


def test_damage_to_the_order_of_entries_is_noticed():
    raw = bytearray(base64.b64decode(BLOB))
    raw[16:18], raw[18:20] = raw[18:20], raw[16:18]
    with pytest.raises(ValueError, match="damaged"):
        kg_data.decode(PIECES, base64.b64encode(raw).decode())
    pieces = PIECES[:1000]  # ids up to 999 may occur; 1023 may not
    header = kg_data.HEADER.pack(kg_data.MAGIC, 358, 1000, kg_data.fingerprint(pieces))
    with pytest.raises(ValueError, match="damaged"):
        kg_data.decode(pieces, base64.b64encode(header + base64.b64decode(BLOB)[16:]).decode())


@pytest.mark.parametrize("blob", ["", "x", BLOB[:-4], BLOB + "AAAA", BLOB[:-1] + "!", "ä" * 976, "AAAA"])
def test_what_is_no_blob_at_all_is_refused(blob: str):
    with pytest.raises(ValueError, match="not 732 bytes in base64"):
        kg_data.decode(PIECES, blob)


def test_blob_from_a_file(tmp_path: Path):
    path = tmp_path / "blob.txt"
    path.write_text(BLOB + "\n")
    assert kg_data.decode(PIECES, kg_data.read_blob(str(path))) == kg_data.decode(PIECES, BLOB)
    path.write_bytes(b"\xff\xfe\x00" * 500)
    with pytest.raises(ValueError, match="not 732 bytes"):
        kg_data.decode(PIECES, kg_data.read_blob(str(path)))


def test_rewriting_kg_data_changes_blob_and_command_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = tmp_path / "kg_data.py"
    before = build_kg.KG_DATA.read_text()
    copy.write_text(before)
    monkeypatch.setattr(build_kg, "KG_DATA", copy)
    command = "python tools/build_kg.py blob --tokenizer other.model"
    build_kg.rewrite_kg_data(BLOB, command)
    module = runpy.run_path(str(copy))
    assert module["BLOB"] == BLOB
    assert command in module["__doc__"]
    assert module["decode"](PIECES) == kg_data.decode(PIECES, BLOB)
    (line,) = [line for line in before.splitlines() if line.startswith("    python tools/build_kg.py")]
    build_kg.rewrite_kg_data(kg_data.BLOB, line.strip())
    assert copy.read_text() == before
    copy.write_text("BLOB = ''\n")
    with pytest.raises(build_kg.BuildError, match="has 0 places"):
        build_kg.rewrite_kg_data(BLOB, command)


def test_ids_beyond_ten_bits_and_too_few_tokens_are_said():
    many = [f"p{i}" for i in range(70_000)]
    scores = dict.fromkeys(range(2000), 1.0)
    assert max(kg_data.decode(many[:2000], blob_of(scores, many[:2000]))) < 1024
    with pytest.raises(build_kg.BuildError, match="only 24 tokens with an id below 1,024"):
        blob_of(dict.fromkeys(range(1000, 2000), 1.0), many[:2000])
    with pytest.raises(build_kg.BuildError, match="70000 pieces; the blob's header holds 65,535"):
        blob_of(scores, many)


# --- tokens ---------------------------------------------------------------------------------------------


def test_words_reach_tokens_by_their_encoding_and_whole_words_come_first():
    pieces = ["<unk>", "▁a", "▁people", "▁includ", "e", "ill", "▁w", "▁the", "▁f", "or", "▁for"]
    spelled = {"people": [2], "include": [3, 4], "will": [6, 5], "form": [10, 0], "the": [7], "for": [8, 9]}

    def encode(text: str) -> list[int]:
        assert text == "a" or text.startswith("a ")
        return [1] + (spelled[text[2:]] if text != "a" else [])

    words = [("people", 0.5), ("include", 1.0), ("form", 0.9)]
    scores = build_kg.token_scores(words, encode, pieces)
    assert scores[2] == 0.5
    assert scores[3] == pytest.approx((7 / 8) ** 3)  # "▁includ" is 7 of the 8 characters of "▁include"
    assert scores[4] == pytest.approx((1 / 8) ** 3)
    assert 5 not in scores  # no listed word has "ill"
    assert 10 not in scores  # "▁for" begins "form" here, but mostly is the function word


def test_tokenizer_that_joins_words_is_refused():
    with pytest.raises(build_kg.BuildError, match="does not split text at spaces"):
        build_kg.token_scores([("people", 1.0)], lambda text: [len(text)], PIECES)


def importance_of(pieces: list[str], blob: str) -> list[str]:
    importance = kg_data.decode(pieces, blob)
    return [pieces[i] for i in sorted(importance, key=lambda i: -importance[i])]


def test_blob_for_a_new_tokenizer_from_the_committed_words(tmp_path: Path):
    """The whole second step as a user runs it, for a tokenizer trained here on the listed words."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = build_kg.read_words(build_kg.KG_WORDS)
    text = [f"the {word} of the world" for word, score in words for _ in range(1 + int(30 * score))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=1024, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, minloglevel=2,
    )  # fmt: skip
    path, out = tmp_path / "own.model", tmp_path / "blob.txt"
    path.write_bytes(model.getvalue())
    command = [
        sys.executable,
        str(ROOT / "tools/build_kg.py"),
        "blob",
        "--tokenizer",
        str(path),
        "--out",
        str(out),
    ]
    outputs = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        outputs.append(out.read_text())
        assert "top tokens: ▁" in done.stdout
        assert "peak memory:" in done.stdout
    assert outputs[0] == outputs[1]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [tokenizer.id_to_piece(i) for i in range(1024)]
    best = importance_of(pieces, kg_data.read_blob(str(out)))
    listed = {f"▁{word}" for word, _ in words}
    assert set(best[:20]) <= listed
    assert not {"▁the", "▁of", "ill", "ong", "t", "i"} & set(best[:100])


def test_committed_words_are_content_words():
    words = build_kg.read_words(build_kg.KG_WORDS)
    scores = [score for _, score in words]
    assert len(words) == 4000
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 1.0
    assert scores[-1] > 0
    assert all(kg_text.is_content(word.lower()) for word, _ in words)
    assert {"people", "system", "time", "world", "information"} <= {word for word, _ in words[:200]}
    header = build_kg.KG_WORDS.read_text().split("\ntime", 1)[0]
    assert "CC BY 4.0" in header


# --- graph ----------------------------------------------------------------------------------------------


def dense_pagerank(graph: build_kg.Graph, reset: np.ndarray, damping: float) -> np.ndarray:
    """Reference: power iteration with a dense transition matrix."""
    n = len(graph.nodes)
    matrix = np.zeros((n, n))
    for head, tail, weight in zip(graph.heads, graph.tails, graph.weights, strict=True):
        matrix[tail, head] += weight
        matrix[head, tail] += build_kg.BACKWARD_WEIGHT * weight
    out = matrix.sum(0)
    start = reset / reset.sum()
    matrix = np.where(out > 0, matrix / np.where(out > 0, out, 1), start[:, None])
    rank = start
    for _ in range(300):
        rank = damping * matrix @ rank + (1 - damping) * start
    return rank


@pytest.mark.parametrize("seed", range(4))
def test_pagerank_agrees_with_dense_power_iteration(seed: int):
    rng = np.random.default_rng(seed)
    graph = build_kg.Graph()
    relations = sorted(build_kg.SOURCE_RELATIONS)
    for _ in range(120):
        head, tail = rng.choice(40, 2, replace=False)
        graph.add(f"n{head}", relations[rng.integers(len(relations))], f"n{tail}", rng.uniform(0.5, 3))
    reset = rng.uniform(0, 1, len(graph.nodes)) * (rng.uniform(size=len(graph.nodes)) < 0.7)
    rank = graph.pagerank(reset, damping=0.85)
    assert rank.sum() == pytest.approx(1)
    np.testing.assert_allclose(rank, dense_pagerank(graph, reset, 0.85), atol=1e-9)
    uniform = np.ones(len(graph.nodes))
    np.testing.assert_allclose(graph.pagerank(), dense_pagerank(graph, uniform, 0.85), atol=1e-9)


def test_relation_table_covers_wordnet_and_all_ten_types():
    assert len(WORDNET_RELATIONS) == len(set(WORDNET_RELATIONS)) == 33
    assert set(WORDNET_RELATIONS) <= set(build_kg.SOURCE_RELATIONS)
    assert len(build_kg.RELATION_TYPES) == len(set(build_kg.RELATION_TYPES)) == 10
    assert {kind for kind, _ in build_kg.SOURCE_RELATIONS.values()} == set(build_kg.RELATION_TYPES)
    assert all(0 < weight <= 1 for _, weight in build_kg.SOURCE_RELATIONS.values())
    assert {pattern.relation for pattern in kg_text.PATTERNS.values()} == set(build_kg.RELATION_TYPES)


@pytest.mark.parametrize(
    ("word", "base"),
    [("years", "year"), ("cities", "city"), ("boxes", "box"), ("making", "make"), ("stopped", "stop"),
     ("used", "use"), ("women", "woman"), ("larger", "large"), ("happiest", "happy"), ("wives", "wife")],
)  # fmt: skip
def test_base_forms(word: str, base: str):
    assert base in list(build_kg.base_forms(word))


def test_text_joins_the_words_of_the_graph():
    graph = build_kg.Graph()
    for word in (
        "year%1",
        "storm%1",
        "damage%1",
        "damage%2",
        "Paris%1",
        "march%2",
        "March%1",
        "use%1",
        "using%1",
    ):
        graph.add(f"word:{word[:-2]}", "has_sense", f"sense:{word}:00:00::")
    words = {"years": 7, "Years": 2, "storms": 9, "damage": 9, "paris": 9, "March": 9, "use": 20, "using": 10}
    facts = kg_text.TextFacts(
        Counter({**words, "the": 99, "qwx": 9, "year": 4}),
        Counter({("storms", "CAUSES", "damage"): 3, ("qwx", "CAUSES", "damage"): 9}),
    )
    weights = build_kg.add_text(graph, facts, min_count=5)
    names = list(graph.nodes)
    # half of the senses of "damage" are nouns; "using" is a noun too, but rarer than "use"
    half, none = 0.5 + 0.5 * build_kg.NOT_A_NOUN, build_kg.NOT_A_NOUN
    expected = {
        "years": 9,
        "storms": 9,
        "damage": 9 * half,
        "Paris": 9,
        "March": 9,
        "use": 20,
        "using": 10 * none,
    }
    assert {names[node].removeprefix("word:"): weight for node, weight in weights.items()} == expected
    assert graph.edges_by_type["CAUSES"] == 1
    assert graph.weights[-1] == pytest.approx(0.5 * 2)  # log2(1 + 3 times)
    ranked = build_kg.rank_words(graph, np.arange(len(graph.nodes), 0, -1.0), limit=3)
    assert ranked[0] == ("year", 1.0)
    assert len(ranked) == 3


# --- text -----------------------------------------------------------------------------------------------


def hand_checked() -> list[tuple[str, set[str]]]:
    lines = (ROOT / "tests/data/kg_sentences.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [(sentence, set() if stated == "-" else set(stated.split("; "))) for sentence, stated in rows]


def test_extraction_precision_and_recall_on_hand_checked_sentences():
    rows = hand_checked()
    assert len(rows) >= 60
    right = wrong = missed = 0
    for sentence, stated in rows:
        found = {" ".join(relation) for relation in kg_text.extract_relations(sentence)}
        right += len(found & stated)
        wrong += len(found - stated)
        missed += len(stated - found)
    assert right / (right + wrong) >= 0.95
    assert right / (right + missed) >= 0.90
    kinds = {relation.split()[1] for _, stated in rows for relation in stated}
    assert kinds == set(build_kg.RELATION_TYPES)


def test_sentences_that_state_nothing_yield_nothing():
    for sentence, stated in hand_checked():
        if not stated:
            assert kg_text.extract_relations(sentence) == [], sentence


def test_context_that_is_cut_off_is_no_clause_start():
    long = "the storm that " + "x" * kg_text.CONTEXT_CHARACTERS
    assert kg_text.extract_relations(f"{long} city caused damage.") == []
    assert kg_text.extract_relations(f"{long}\nRain caused damage.") == [("rain", "CAUSES", "damage")]


# --- command line ---------------------------------------------------------------------------------------


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/build_kg.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_graph_step_from_files_is_deterministic_and_independent_of_processes(tmp_path: Path):
    pytest.importorskip("igraph")
    edges, text = tmp_path / "edges.tsv.zst", tmp_path / "text.jsonl.zst"
    names = ["storm", "damage", "rain", "city", "people", "The", "of"]
    lines = [
        f"word:{name}\thas_sense\tsense:{name}\nsense:{name}\tin_synset\tsyn:{len(name)}\n" for name in names
    ]
    edges.write_bytes(zstandard.compress("".join(lines).encode()))
    documents = [{"text": f"Storms cause damage. The rain hit people in city {i}."} for i in range(30)]
    text.write_bytes(zstandard.compress("".join(json.dumps(d) + "\n" for d in documents).encode()))
    tables = []
    for processes in (1, 2):
        out = tmp_path / f"words{processes}.tsv"
        arguments = ("--edges", edges, "--text", text, "--source", "made up, CC0", "--processes", processes)
        done = run_tool("graph", *arguments, "--out", out)
        assert done.returncode == 0, done.stderr
        for line in ("nodes: 20", "edges: 16", "  CAUSES: 1", "top words: ", "seconds: ", "peak memory: "):
            assert f"\n{line}" in done.stdout
        tables.append(out.read_text().replace(out.name, ""))
        assert str(tmp_path) not in tables[-1]
    assert tables[0] == tables[1]
    assert "# Source: made up, CC0" in tables[0]
    assert {word for word, _ in build_kg.read_words(out)} == {
        "storm",
        "storms",
        "damage",
        "rain",
        "city",
        "people",
    }


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["graph", "--edges", "FILE"], "a\tb\n", "FILE:1: 2 fields, not head TAB relation TAB tail"),
        (["graph", "--edges", "FILE"], "a\tloves\tb\n", "relation 'loves' has no type and weight"),
        (["graph", "--edges", "FILE"], "a\tcauses\tb\n", "the graph has no words"),
        (["graph", "--edges", "FILE"], "", "no edge"),
        (["graph"], None, "no edge"),
        (["graph", "--edges", "FILE"], None, "No such file"),
        (["graph", "--text", "FILE"], '{"txt": 1}\n', 'FILE:1: not a JSON object with a "text" field'),
        (["graph", "--text", "FILE"], '{"text": 1}\n', 'FILE:1: not a JSON object with a "text" field'),
        (["graph", "--edges", "FILE.zst"], "not compressed\n", "FILE.zst: not UTF-8 text or damaged"),
        (["blob", "--tokenizer", "FILE"], None, "no tokenizer at FILE"),
        (["blob", "--tokenizer", "FILE"], "no model", "is no SentencePiece model"),
        (["blob", "--words", "FILE", "--tokenizer", "MODEL"], "word without score\n", "not word TAB score"),
    ],
)
def test_errors_are_one_clear_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], content: str | None, message: str
):
    file = tmp_path / "file.jsonl"
    if content is not None:
        file.write_text(content)
        Path(f"{file}.zst").write_text(content)
    named = [part.replace("FILE", str(file)) for part in arguments]
    assert build_kg.main([*named, "--out", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("build_kg: ")
    assert error.count("\n") == 1
    assert message.replace("FILE", str(file)) in error
    assert not (tmp_path / "out").exists()
