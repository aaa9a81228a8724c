"""Let an artifact that train_gpt.py wrote write text.

    python tools/sample.py --artifact final_model.int6.ptz --tokenizer tokenizer.model --prompt "The river"
    python tools/sample.py --artifact final_model.int6.ptz --tokenizer tokenizer.model --interactive

A prompt begins a document, and the whole document is printed, the prompt as its tokens give it back. Writing ends
after --tokens tokens, or where the model ends the document. The weights alone write: no test-time training, no mixer.

The context is the window that the artifact is scored with, EVAL_SEQ_LEN tokens, and from the first token on positions
are rotated as in a window of that length, so a short text is not read with the smaller RoPE base that a short sequence
would have. When the context is full, its oldest half is dropped and the rest is read anew, like a window that begins
within a document. Keys and values are kept, so any other token costs one position.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import train_gpt


class CachedGPT(train_gpt.GPT):
    """A model that reads a sequence piece by piece and keeps the keys and values of what it has read.

    A position's logits are those that `GPT.logits` gives it in a sequence of EVAL_SEQ_LEN tokens.
    """

    def __init__(self, model: train_gpt.GPT, device: torch.device):
        """Takes the model's weights over, in the dtype of its matrix products on that device."""
        config = model.config
        with torch.device("meta"):
            super().__init__(config, initialize=False)
        self.load_state_dict(model.state_dict(), assign=True)
        self.requires_grad_(False).to(device).to(self.dtype)
        self.attend = self._attend_to_all
        self.rope = train_gpt.rope_tables(config, config.eval_seq_len, self.tok_emb.weight)
        visits = config.num_layers + len(config.repeat_layers)
        shape = visits, 1, config.eval_seq_len, config.num_kv_heads, config.head_dim
        self.keys, self.values = (self.tok_emb.weight.new_empty(shape) for _ in range(2))
        self.restart()

    def restart(self) -> None:
        """Forget all that was read: the next position is the first."""
        self.read = 0  # positions whose keys and values are kept
        self.last_id = torch.zeros(1, 0, dtype=torch.long, device=self.tok_emb.weight.device)
        self.last_embedding = self.tok_emb.weight.new_empty(1, 0, self.config.model_dim)

    def read_on(self, ids: Tensor) -> Tensor:
        """Read the next T tokens, ids (1, T), of at most EVAL_SEQ_LEN in all; their logits (1, T, V), fp32."""
        config, length = self.config, ids.size(1)
        # The pair's bucket and the smear gate look one position back.
        recent = torch.cat([self.last_id, ids], 1)
        pairs = self._rows("bigram", train_gpt.pair_buckets(recent, config)[:, -length:], qat=False)
        embedded = train_gpt.rms_norm(F.embedding(ids, self.tok_emb.weight) + pairs)
        embedded = torch.cat([self.last_embedding, embedded], 1)
        x = self.smear(embedded, recent)[:, -length:]
        self.visit = 0  # of a layer: one that is run twice has two sets of keys and values
        cos, sin = (table[:, self.read : self.read + length] for table in self.rope)
        x = self._run_layers(x, ids, (cos, sin), qat=False)
        self.read += length
        self.last_id, self.last_embedding = ids[:, -1:], embedded[:, -1:]
        head = self.tok_emb if config.tie_embeddings else self.lm_head
        return self._softcapped(x, head.weight)

    def _attend_to_all(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of new positions, q (1, T, H, Dh), k and v (1, T, Hkv, Dh), to kept ones and themselves."""
        first, end = self.read, self.read + q.size(1)
        keys, values = self.keys[self.visit, :, :end], self.values[self.visit, :, :end]
        self.visit += 1
        keys[:, first:], values[:, first:] = k, v
        visible = torch.ones(q.size(1), end, dtype=torch.bool, device=q.device).tril(first)
        q, k, v = (each.transpose(1, 2) for each in (q, keys, values))
        return F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


class TextStream:
    """Turns a document's tokens into text as they come: a character appears when its last byte is there."""

    def __init__(self, tokenizer: train_gpt.Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.tokens = [train_gpt.BOS_ID]  # since the last one that has text

    def add(self, token: int) -> str:
        """What this token completes; U+FFFD for bytes that can be part of no character."""
        self.tokens.append(token)
        tokens = np.array(self.tokens)
        size = int(self.tokenizer.target_bytes(tokens[:-1], tokens[1:])[-1])  # knows which spaces are not text
        if size == 0:
            return ""
        self.tokens = [token]
        piece = self.tokenizer.pieces[token]
        if self.tokenizer.model.is_byte(token):
            return self.decoder.decode(bytes([int(piece.strip("<>"), 16)]))
        return self.decoder.decode(piece.replace("▁", " ").encode()[-size:])


class Writer:
    """An artifact's model and tokenizer, and how the next token is chosen."""

    def __init__(self, options: argparse.Namespace):
        """Raises UserError: an artifact or tokenizer that cannot be read, or that do not belong together."""
        if options.device == "cuda" and not torch.cuda.is_available():
            raise train_gpt.UserError("--device cuda, but torch finds no CUDA device; use auto or cpu")
        use_cuda = options.device != "cpu" and torch.cuda.is_available()
        model, config, metadata = train_gpt.load_artifact(options.artifact)
        self.tokenizer = own_tokenizer(options, config.vocab_size, metadata["tokenizer"])
        self.model = CachedGPT(model, torch.device("cuda" if use_cuda else "cpu"))
        self.context = config.eval_seq_len
        self.temperature, self.top_k = options.temperature, min(options.top_k or config.vocab_size, config.vocab_size)
        self.generator = torch.Generator().manual_seed(options.seed)

    def write(self, prompt: str, count: int) -> Iterator[str]:
        """The document that begins with the prompt, in pieces as they come. Raises UserError."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise train_gpt.UserError("the prompt is no UTF-8 text") from error
        document, stream = [train_gpt.BOS_ID, *self.tokenizer.model.encode(prompt)], TextStream(self.tokenizer)
        if len(document) > self.context:
            found = f"the prompt has {len(document)} tokens with its BOS"
            raise train_gpt.UserError(f"{found}, and the context has {self.context} (EVAL_SEQ_LEN); shorten it")
        yield "".join(map(stream.add, document[1:]))
        yield from map(stream.add, self.continued(document, count))

    def continued(self, window: list[int], count: int) -> Iterator[int]:
        """At most `count` tokens after those of the window, none behind the document's end."""
        ends = train_gpt.BOS_ID, self.tokenizer.model.eos_id()
        self.model.restart()
        new = window
        for _ in range(count):
            if len(window) > self.context:
                del window[: len(window) // 2]
                self.model.restart()
                new = window
            token = self.choose(self.model.read_on(torch.tensor([new], device=self.model.last_id.device))[0, -1])
            if token in ends:
                return
            yield token
            new = [token]
            window.append(token)

    def choose(self, logits: Tensor) -> int:
        """A token by its logits (V,): the likeliest at temperature 0, else one of the TOP_K likeliest by chance."""
        if not logits.isfinite().all():
            raise train_gpt.UserError("the model predicts what is no number: its training diverged; train again")
        best, tokens = logits.double().cpu().topk(self.top_k)
        if self.temperature == 0:
            return int(tokens[0])
        chances = torch.softmax((best - best[0]) / self.temperature, 0)
        return int(tokens[torch.multinomial(chances, 1, generator=self.generator)])


def own_tokenizer(options: argparse.Namespace, vocab_size: int, digest: str) -> train_gpt.Tokenizer:
    """The tokenizer, if it is the one that the artifact was trained with. Raises UserError."""
    foreign = f"{options.artifact} needs another tokenizer than {options.tokenizer}"
    try:
        tokenizer = train_gpt.Tokenizer(options.tokenizer, vocab_size)
    except train_gpt.ConfigError as error:  # of another size
        raise train_gpt.UserError(f"{foreign}: its vocabulary has {vocab_size} pieces") from error
    if tokenizer.digest != digest:
        raise train_gpt.UserError(f"{foreign}: use the one of its shards")
    return tokenizer


def prompts(options: argparse.Namespace) -> Iterator[str]:
    """The prompt given; in interactive use what is typed line by line until the end of input."""
    if options.prompt is not None or not options.interactive:
        yield options.prompt or ""
    with contextlib.suppress(EOFError):
        while options.interactive and sys.stdin is not None:  # None: closed before the start
            yield input("> " if sys.stdin.isatty() else "")


def run(options: argparse.Namespace) -> None:
    """Write every prompt's document. Raises UserError."""
    writer = Writer(options)
    for prompt in prompts(options):
        try:
            for text in writer.write(prompt, options.tokens):
                print(text, end="", flush=True)
            print(flush=True)
        except train_gpt.UserError as error:
            if not options.interactive:
                raise
            say_error(error)


def say_error(error: object) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


class ArgumentParser(argparse.ArgumentParser):
    """argparse, except that a wrong command line is a UserError: one line instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        raise train_gpt.UserError(f"{message}; --help lists the options")


def between(kind: Callable[[str], Any], low: float, high: float) -> Callable[[str], Any]:
    """A parser of numbers of that kind from low to high."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number from {low} to {high}")

    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", required=True, metavar="FILE", help="what train_gpt.py wrote")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="SentencePiece model that it was trained on")
    parser.add_argument("--prompt", metavar="TEXT", help="how the document begins; default: the model begins it")
    parser.add_argument(
        "--tokens", type=between(int, 1, 10**9), default=256, metavar="N", help="most tokens to write (default 256)"
    )
    parser.add_argument(
        "--temperature", type=between(float, 0, 100), default=0.8, metavar="X",
        help="below 1 likely tokens come more often than predicted; 0: always the likeliest (default 0.8)",
    )  # fmt: skip
    parser.add_argument(
        "--top-k", type=between(int, 0, 10**9), default=0, metavar="K", help="choose among the K likeliest; 0: all"
    )
    parser.add_argument(
        "--seed", type=between(int, 0, 2**63 - 1), default=1337, metavar="S", help="same seed, same text (default 1337)"
    )
    parser.add_argument(
        "--interactive", action="store_true", help="every line of the input is a prompt of its own, until its end"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 after an error in one line."""
    train_gpt.replace_closed_streams()
    # A console need not know every character, and a line that is no text is refused like such a prompt.
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        run(parse_arguments(argv))
    except train_gpt.UserError as error:
        say_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered goes nowhere
        if not isinstance(error, BrokenPipeError):  # whoever reads may have had enough
            say_error(f"the text cannot be written, or the input not read: {error.strerror}")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
