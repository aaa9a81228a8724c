"""Own code beside the library that could replace it: both must do the same before their figures mean anything."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from support import REPO

import train_gpt
from bench import lemmatizer, packing

EDGES = ["has_sense\tsense:{0}%1:00:00::", "has_sense\tsense:{0}%2:00:00::"]


def small_levels() -> packing.Levels:
    """Rows and columns of many sizes, a matrix of zeros and one of eight bits."""
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(size=(2, 64, 1))) * np.exp(rng.normal(size=(2, 1, 96)))
    narrow = np.rint(rng.normal(size=(2, 64, 96)) * 4 * spread).clip(-31, 31)
    wide = np.rint(rng.normal(size=(50, 32)) * 40).clip(-127, 127)
    return {name: q.astype(np.int8) for name, q in (("a", narrow), ("b", np.zeros((1, 8, 8))), ("c", wide))}


def test_both_coders_return_the_levels_in_about_as_many_bytes():
    pytest.importorskip("constriction")
    levels = small_levels()
    found = packing.compare_coders(levels, repeats=1)
    own, library = found["rows"]
    assert found["levels"] == sum(q.size for q in levels.values())
    assert 0.95 < own["bytes"] / library["bytes"] < 1.15  # the own coder's lanes cost most where levels are few
    for row in (own, library):
        assert 0 < row["record_bytes"] < row["code_bytes"] < row["source_bytes"]


def test_the_librarys_coder_refuses_what_it_did_not_write():
    pytest.importorskip("constriction")
    levels = small_levels()
    arrays = packing.library_encode_levels(levels)
    shapes = {name: torch.Size(q.shape) for name, q in levels.items()}
    longer = np.concatenate([arrays["ans.words"], np.ones(1, np.uint32)])
    fewer = arrays["ans.counts"].copy()
    fewer[fewer.sum(1).argmax(), 0] += 1
    for damaged in (dict(arrays, **{"ans.words": longer}), dict(arrays, **{"ans.counts": fewer})):
        with pytest.raises(ValueError, match=r"do not add up|does not come out even"):
            packing.library_decode_levels(damaged, shapes)


def test_a_program_without_the_coder_still_has_the_rest():
    program = (REPO / "train_gpt.py").read_text(encoding="utf-8")
    rest, coder = packing.without_coder(program)
    assert len(rest) + len(coder) == len(program)
    names = {}
    exec(compile(coder, "coder", "exec"), vars(train_gpt).copy(), names)
    assert set(names) == set(packing.OWN_CODER)
    with pytest.raises(ValueError, match="has no ANS_BITS"):
        packing.without_coder(rest)


def test_committed_coders_differ_by_less_than_a_thousandth_and_a_kilobyte_of_code():
    """The decision to keep the own coder rests on this, and on its being quicker to decode."""
    found = json.loads((REPO / "bench" / "results" / "cpu-packing_coders.json").read_text())["coders"]
    own, library = found["rows"]
    assert abs(own["bytes"] / library["bytes"] - 1) < 1e-3
    assert own["record_bytes"] - library["record_bytes"] < 1000
    assert found["decode_ratio"] < 1


def test_lemmatizers_are_judged_by_the_treebank(tmp_path: Path, monkeypatch, capsys):
    """With a stand-in for the library that knows one word: a lemma of the treebank is right, any other wrong."""
    words = ("child", "hope", "hop", "dog", "run")
    (tmp_path / "edges.tsv").write_text(
        "".join(f"word:{word}\t{edge.format(word)}\n" for word in words for edge in EDGES), encoding="utf-8"
    )
    forms = [("children", "child", "NOUN"), ("hoped", "hope", "VERB"), ("dogs", "dog", "NOUN"), ("ran", "run", "VERB")]
    rows = [f"{i}\t{form}\t{lemma}\t{kind}" + "\t_" * 6 for i, (form, lemma, kind) in enumerate(forms, 1)]
    (tmp_path / "forms.conllu").write_text("\n".join([*rows, *rows[:1], ""]), encoding="utf-8")
    known = {"children": "child"}
    stand_in = types.SimpleNamespace(lemmatize=lambda form, lang: known.get(form, form) if lang == "en" else form)
    monkeypatch.setitem(sys.modules, "simplemma", stand_in)
    arguments = ["lemmatizer.py", "--edges", str(tmp_path / "edges.tsv"), "--forms"]
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "forms.conllu")])
    lemmatizer.main()
    own, library, both = json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"]
    assert [own["right_forms"], library["right_forms"], both["right_forms"]] == [0.25, 0.25, 0.5]
    assert [own["right_tokens"], library["right_tokens"], both["right_tokens"]] == [0.2, 0.4, 0.6]
    assert [own["wrong"], library["wrong"], both["wrong"]] == [1, 0, 1]  # "hoped" is no form of "hop"
    assert [own["none"], library["none"], both["none"]] == [2, 3, 1]
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "absent.conllu")])
    with pytest.raises(SystemExit, match="2"):
        lemmatizer.main()
    assert "absent.conllu" in capsys.readouterr().err
