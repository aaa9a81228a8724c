"""SentencePiece models: loading, training, and what a token counts for in bytes."""

from __future__ import annotations

import functools
import hashlib
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece
from shards import MAX_TOKEN, TOKEN_DTYPE, DataError

if TYPE_CHECKING:
    import train_gpt

SPACE = "\u2581"
BOS_ID = 1
# SentencePiece passes over a whole training line that holds one of the marks it uses itself
RESERVED_MARKS = str.maketrans({SPACE: " ", "\u2585": " ", "\n": " ", "\r": " ", "\t": " "})
MAX_LINE_BYTES = 1 << 20


def tokenizer_hash(pieces: Sequence[str]) -> str:
    """First 16 hex digits of the SHA-256 over the pieces joined by newlines."""
    return hashlib.sha256("\n".join(pieces).encode("utf-8")).hexdigest()[:16]


class Tokenizer:
    """A SentencePiece model held in memory.

    `model` are the bytes of a .model file, `source` its name for messages. Raises DataError if it cannot be
    loaded or has more than 65,535 pieces.
    """

    bos_id = BOS_ID  # `require_countable` refuses models of another

    def __init__(self, model: bytes, source: str = "tokenizer") -> None:
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{source}: not a SentencePiece model, or damaged ({error}); give a whole .model file"
            ) from error
        self.model = model
        self.source = source
        self.vocab_size = self.processor.vocab_size()
        if self.vocab_size > MAX_TOKEN:
            raise DataError(f"{source}: {self.vocab_size} pieces; uint16 shards take at most {MAX_TOKEN}")
        self.pieces = [self.processor.id_to_piece(i) for i in range(self.vocab_size)]
        self.hash = tokenizer_hash(self.pieces)
        self._adds_prefix = self.processor.normalize("a").startswith(SPACE)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Load a .model file. Raises DataError if it is missing, unreadable or unusable."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); expected a SentencePiece .model file"
            ) from error
        return cls(model, str(path))

    def encode(self, text: str) -> np.ndarray:
        """BOS and the tokens of one document, uint16 (1 + T,); BOS alone if no text is left."""
        return np.array([BOS_ID, *self.processor.encode(text)], dtype=TOKEN_DTYPE)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of the tokens (T,) of one document."""
        return self.processor.decode(tokens.tolist())

    def normalize(self, text: str) -> str:
        """The text as the tokenizer sees it: what `decode` gives back, unless characters are unknown."""
        normalized = self.processor.normalize(text).replace(SPACE, " ")
        return normalized[1:] if self._adds_prefix and normalized else normalized

    @functools.cached_property
    def _scorer(self) -> train_gpt.Tokenizer:
        """The same model as the training program opens it, which alone knows the rule of bytes.

        Imported here, for it takes seconds and worker processes have no need of it. Raises DataError.
        """
        folder = str(Path(__file__).resolve().parents[1])
        if folder not in sys.path:
            sys.path.append(folder)
        import train_gpt

        try:
            return train_gpt.Tokenizer(self.source, self.vocab_size, self.model)
        except train_gpt.UserError as error:
            raise DataError(str(error)) from error

    def require_countable(self) -> Tokenizer:
        """This tokenizer; raises DataError, with the reason, if `train_gpt.py` cannot count its bytes."""
        _ = self._scorer
        return self

    def count_target_bytes(self, tokens: np.ndarray, before: np.ndarray | None = None) -> int:
        """UTF-8 bytes of text that the tokens (T,) stand for by the scorer's rule.

        `before` ends with the token before the first one; without it a document starts here. Raises DataError as
        `require_countable`.
        """
        first = [BOS_ID] if before is None or before.size == 0 else before[-1:]
        previous = np.concatenate((first, tokens[:-1])).astype(TOKEN_DTYPE)[: tokens.size]
        return int(self._scorer.target_bytes(previous, tokens).sum(dtype=np.int64))

    def count_unknown(self, tokens: np.ndarray) -> int:
        """How many of the tokens (T,) are the unknown token."""
        return int(np.count_nonzero(tokens == self.processor.unk_id()))


def train_tokenizer(texts: Iterable[str], vocab_size: int, keep_whitespace: bool = False) -> Tokenizer:
    """Train a BPE model with byte fallback in the settings of the contest: pad 0, bos 1, eos 2, unk 3.

    With `keep_whitespace` the model normalises nothing and has pieces for runs of blanks: it gives every text back,
    but for the mark U+2581, which it writes spaces with. The same texts in the same order give the same model, byte
    for byte. Small corpora may give fewer pieces than asked. Raises DataError if `vocab_size` is too small for the
    characters of the texts.
    """
    model = io.BytesIO()
    if keep_whitespace:  # line by line: no piece reaches across a line break, which is a byte token
        texts = (line for text in texts for line in text.split("\n") if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text.translate(RESERVED_MARKS) for text in texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity" if keep_whitespace else "nmt_nfkc",
            remove_extra_whitespaces=not keep_whitespace,
            allow_whitespace_only_pieces=keep_whitespace,
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            required_chars=SPACE,  # text without spaces would leave none, and a space become three byte tokens
            hard_vocab_limit=False,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=1,  # the number of threads is written into the model
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rsplit("] ", 1)[-1] or "no text left after normalisation"
        raise DataError(f"a tokenizer of {vocab_size} pieces cannot be trained: {reason}") from error
    return Tokenizer(model.getvalue(), "trained tokenizer")
