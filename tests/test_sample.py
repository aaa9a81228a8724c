"""tools/sample.py: an artifact writes what its model predicts, a token costs one position, errors are one line."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sample
import sentencepiece
import torch
from golden_support import random_ids, randomize, tiny_config, tiny_recipe
from support import REPO, TINY_VOCAB, assert_refused, save_artifact, train_tokenizer

import train_gpt

CONTEXT = 24  # longer than ROPE_TRAIN_LEN of these models, so the base is rescaled
VARIANTS: dict[str, train_gpt.Config] = {name: tiny_recipe(name) for name in train_gpt.RECIPES} | {
    "everything": tiny_config(),
    "untied head": tiny_config(tie_embeddings=False),
    "one key head": tiny_config(num_kv_heads=1, xsa_last_n=4),
    "full heads, odd layers": tiny_config(num_layers=3, num_kv_heads=4, rope_dims=0, ve_layers=(0, 2)),
    "one layer": tiny_config(num_layers=1, ve_layers=(), xsa_last_n=1),
    "nothing masked": tiny_config(smear_bos_mask=False, bigram_start_bucket=False, ln_scale=False),
}


# The cached pass ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pieces", [[1] * CONTEXT, [7, *[1] * 17], [CONTEXT], [1, 5, 1, 8, 9]])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_read_piece_by_piece_has_the_logits_of_the_whole_sequence(variant, pieces):
    config = VARIANTS[variant]
    model = randomize(train_gpt.GPT(config))
    ids = random_ids(config, 1, CONTEXT)
    ids[0, [0, 5, 6, 17]] = train_gpt.BOS_ID
    assert config.eval_seq_len == CONTEXT
    cached = sample.CachedGPT(model, torch.device("cpu"))
    for _ in range(2):  # nothing is left of what was read before
        cached.restart()
        logits = torch.cat([cached.read_on(piece) for piece in ids.split(pieces, 1)], 1)
        torch.testing.assert_close(logits, model.logits(ids), atol=1e-5, rtol=0)


# Files and commands -------------------------------------------------------------------------------------------
class Files:
    """An artifact and its tokenizer on disk."""

    def __init__(self, folder: Path, tokenizer: Path, shape: Callable[[train_gpt.GPT, Files], object]):
        self.tokenizer, self.artifact = tokenizer, folder / "model.ptz"
        self.text = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        config = tiny_config(vocab_size=TINY_VOCAB, tie_embeddings=False)
        model = train_gpt.GPT(config)
        with torch.no_grad():
            shape(model, self)
        save_artifact(model, train_gpt.Tokenizer(str(tokenizer), TINY_VOCAB).digest, self.artifact)

    def arguments(self, *more: object) -> list[str]:
        return [*map(str, ["--artifact", self.artifact, "--tokenizer", self.tokenizer, "--device", "cpu", *more])]

    def ids(self, pieces: Iterable[str]) -> list[int]:
        found = [self.text.piece_to_id(piece) for piece in pieces]
        assert self.text.unk_id() not in found
        return found


@pytest.fixture
def write(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command prints, the line's end left out."""

    def run(files: Files, *more: object) -> str:
        capsys.readouterr()
        assert sample.main(files.arguments(*more)) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out.endswith("\n")
        return captured.out[:-1]

    return run


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Path:
    return tiny_data / "tokenizer.model"


@pytest.fixture(scope="module")
def random_files(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A model with all its parts at random, whose likeliest token is always one with text."""

    def shape(model: train_gpt.GPT, files: Files) -> None:
        randomize(model)
        for token in range(TINY_VOCAB):
            if files.text.is_byte(token) or files.text.is_control(token) or files.text.is_unknown(token):
                model.lm_head.weight[token] = 0

    return Files(tmp_path_factory.mktemp("random"), tokenizer, shape)


def scripted(folder: Path, tokenizer: Path, script: Mapping[str, Mapping[str, float]]) -> Files:
    """A model whose logits hang on the last token alone: by piece, the pieces that may follow and their logits."""

    def shape(model: train_gpt.GPT, files: Files) -> None:
        model.smear.gate.fill_(-100)
        model.tok_emb.weight.copy_(torch.randn(model.tok_emb.weight.shape, generator=torch.Generator().manual_seed(0)))
        hidden = train_gpt.rms_norm(model.tok_emb.weight)
        width = hidden.size(1)
        model.lm_head.weight.zero_()
        for last, following in script.items():
            (row,) = files.ids([last])
            for piece, logit in following.items():
                model.lm_head.weight[files.ids([piece])[0]] += logit / width * hidden[row]

    return Files(folder, tokenizer, shape)


def chain(pieces: Iterable[str]) -> dict[str, dict[str, float]]:
    """A script in which each piece is followed by the next."""
    return {last: {following: 25.0} for last, following in itertools.pairwise(pieces)}


# What is written ----------------------------------------------------------------------------------------------
def greedy(files: Files, prompt: str, count: int) -> str:
    """The likeliest token, `count` times, by whole forward passes over windows of the context's length."""
    model = train_gpt.load_artifact(files.artifact)[0]
    document = [train_gpt.BOS_ID, *files.text.encode(prompt)]
    window = list(document)
    for _ in range(count):
        if len(window) > CONTEXT:
            window = window[len(window) // 2 :]
        padded = torch.tensor([window + [0] * (CONTEXT - len(window))])
        token = int(model.logits(padded)[0, len(window) - 1].argmax())
        window.append(token)
        document.append(token)
    return files.text.decode(document)


@pytest.mark.parametrize("prompt", ["", "the river", "the model of the wor"])
@pytest.mark.parametrize("count", [1, 15, 80])
def test_greedy_text_is_that_of_whole_forward_passes_also_beyond_the_context(prompt, count, random_files, write):
    expected = greedy(random_files, prompt, count)
    assert len(expected) > len(prompt)
    assert write(random_files, "--prompt", prompt, "--tokens", count, "--temperature", 0) == expected


def test_a_token_costs_one_position_until_the_context_is_full(random_files, write, monkeypatch):
    linear, lengths = torch.nn.functional.linear, []

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        lengths.append(x.size(-2))
        return linear(x, *rest)

    prompt = 1 + len(random_files.text.encode("the river"))
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    write(random_files, "--prompt", "the river", "--tokens", CONTEXT + 5, "--temperature", 0)
    assert [length for length, _ in itertools.groupby(lengths)] == [prompt, 1, CONTEXT // 2 + 1, 1]
    per_pass = lengths.count(prompt)
    assert len(lengths) == per_pass * (CONTEXT + 5)


def test_the_seed_decides_the_text(random_files, write):
    texts = [write(random_files, "--temperature", 1, "--tokens", 30, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_one_likeliest_token_is_greedy_at_any_temperature(random_files, write):
    likeliest = write(random_files, "--tokens", 30, "--temperature", 0)
    assert write(random_files, "--tokens", 30, "--temperature", 50, "--top-k", 1) == likeliest
    assert write(random_files, "--tokens", 30, "--temperature", 1e-300) == likeliest
    assert write(random_files, "--tokens", 30, "--temperature", 50) != likeliest


def test_temperature_and_top_k_decide_what_can_come(tokenizer, tmp_path, write):
    files = scripted(tmp_path, tokenizer, {"a": {"b": 20.0, "c": 19.0}})

    def seen(*options: object) -> set[str]:
        return {write(files, "--prompt", "a", "--tokens", 1, "--seed", seed, *options) for seed in range(8)}

    assert seen("--temperature", 0) == seen("--temperature", 0.02) == {"ab"}
    assert seen("--temperature", 1) == {"ab", "ac"}
    assert seen("--temperature", 100, "--top-k", 2) == {"ab", "ac"}
    assert len(seen("--temperature", 100)) > 4
    assert len(seen("--temperature", 100, "--top-k", 10**6)) > 4


@pytest.mark.parametrize("end", ["<s>", "</s>"])
def test_writing_ends_with_the_document(end, tokenizer, tmp_path, write):
    files = scripted(tmp_path, tokenizer, chain(["a", "b", "c", end, "d", "e"]))
    assert write(files, "--prompt", "a", "--temperature", 0, "--tokens", 20) == "abc"


def test_an_empty_prompt_begins_a_document(tokenizer, tmp_path, write):
    files = scripted(tmp_path, tokenizer, chain(["<s>", "c", "a", "</s>"]))
    assert write(files, "--temperature", 0) == write(files, "--temperature", 0, "--prompt", "") == "ca"


def test_a_character_is_written_when_its_last_byte_has_come(tokenizer, tmp_path, write):
    euro = ["<0xE2>", "<0x82>", "<0xAC>"]
    files = scripted(tmp_path, tokenizer, chain(["a", *euro, "b", "<0xF0>", "c", "</s>"]))
    texts = [write(files, "--prompt", "a", "--temperature", 0, "--tokens", count) for count in range(1, 9)]
    assert texts == ["a", "a", "a€", "a€b", "a€b", "a€b\N{REPLACEMENT CHARACTER}c", *2 * [texts[5]]]


@pytest.mark.parametrize("options", [{}, dict(add_dummy_prefix=True), dict(remove_extra_whitespaces=False)], ids=str)
def test_the_document_is_printed_as_its_tokens_give_it_back(options, tmp_path, write):
    tokenizer = tmp_path / "tokenizer.model"
    train_tokenizer(tokenizer, TINY_VOCAB, **options)
    files = scripted(tmp_path, tokenizer, chain(["<s>", "▁", "a", "</s>"]))
    for prompt in (" the river", "  naïve 東京 😀 a", "The  model", "x\ny"):
        text = files.text.decode(files.text.encode(prompt))
        assert write(files, "--prompt", prompt, "--temperature", 0, "--tokens", 1).startswith(text)
    assert write(files, "--temperature", 0) == files.text.decode(files.ids(["▁", "a"]))


def test_every_line_of_the_input_is_a_prompt(tokenizer, tmp_path, capsys, monkeypatch):
    files = scripted(tmp_path, tokenizer, chain(["<s>", "c", "a", "b", "</s>"]))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"a\n\n{'x ' * CONTEXT}\nc"))
    assert sample.main(files.arguments("--interactive", "--temperature", 0)) == 0
    captured = capsys.readouterr()
    assert captured.out == "ab\ncab\ncab\n"
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
    assert sample.main(files.arguments("--interactive", "--prompt", "c", "--temperature", 0)) == 0
    assert capsys.readouterr().out == "cab\nab\n"


def test_the_command_as_it_is_typed(random_files):
    machine = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    typed = [sys.executable, "tools/sample.py", *random_files.arguments("--tokens", 30, "--temperature", 0)]
    environ = machine | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(typed, env=environ, cwd=REPO, capture_output=True, timeout=100, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode().splitlines() == [greedy(random_files, "", 30)]


def test_whoever_reads_may_have_had_enough(random_files, capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert sample.main(random_files.arguments("--tokens", 30)) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(random_files, capsys, monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert_refused(capsys, sample.main, random_files.arguments("--tokens", 3), "written")


# What is refused ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        ["--tokens", "0"], ["--tokens", "many"], ["--tokens", "1.5"], ["--temperature", "-1"], ["--temperature", "nan"],
        ["--temperature", "inf"], ["--top-k", "-3"], ["--seed", "-1"], ["--seed", str(2**63)],
    ],
    ids=" ".join,
)  # fmt: skip
def test_numbers_out_of_range_are_refused(options, random_files, capsys):
    assert_refused(capsys, sample.main, random_files.arguments(*options), *options)


@pytest.mark.parametrize("argv", [[], ["--artifact", "a"], ["--artifact", "a", "--tokenizer", "b", "more"]], ids=str)
def test_a_wrong_command_line_is_refused(argv, capsys):
    assert_refused(capsys, sample.main, argv, "--help")


@pytest.mark.parametrize("content", [None, b"", b"no artifact"])
@pytest.mark.parametrize("option", ["--artifact", "--tokenizer"])
def test_files_that_cannot_be_read_are_refused(option, content, random_files, tmp_path, capsys):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    assert_refused(capsys, sample.main, random_files.arguments(option, path), str(path))


@pytest.mark.parametrize("pieces", [TINY_VOCAB, TINY_VOCAB + 8])
def test_a_foreign_tokenizer_is_refused(pieces, random_files, tmp_path, capsys):
    path = tmp_path / "foreign.model"
    train_tokenizer(path, pieces, user_defined_symbols=["another"])
    arguments = random_files.arguments("--tokenizer", path)
    assert_refused(capsys, sample.main, arguments, str(path), str(random_files.artifact), "another tokenizer")


def test_a_prompt_may_fill_the_context_and_no_more(random_files, write, capsys):
    fitting = "the " * (CONTEXT - 2)
    while len(random_files.text.encode(fitting)) > CONTEXT - 1:
        fitting = fitting[:-1]
    assert len(random_files.text.encode(fitting)) == CONTEXT - 1
    assert write(random_files, "--prompt", fitting, "--tokens", 3, "--temperature", 0)
    arguments = random_files.arguments("--prompt", fitting + " x")
    assert_refused(capsys, sample.main, arguments, "prompt", f"context has {CONTEXT}", "EVAL_SEQ_LEN")


def test_a_prompt_that_is_no_text_is_refused(random_files, capsys):
    assert_refused(capsys, sample.main, random_files.arguments("--prompt", "a\udcff"), "UTF-8")


def test_a_gpu_that_is_not_there_is_refused(random_files, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(capsys, sample.main, random_files.arguments("--device", "cuda"), "--device cuda")


def test_a_model_that_diverged_is_refused(tokenizer, tmp_path, capsys):
    files = Files(tmp_path, tokenizer, lambda model, _: model.smear.gate.fill_(float("nan")))
    assert_refused(capsys, sample.main, files.arguments(), "diverged")
