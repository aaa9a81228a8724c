"""SentencePiece models: loading, training, and what a token counts for in bytes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from shards import MAX_TOKEN, TOKEN_DTYPE, DataError

SPACE = "\u2581"
# SentencePiece passes over a whole training line that holds one of the marks it uses itself
RESERVED_MARKS = str.maketrans({SPACE: " ", "\u2585": " ", "\n": " ", "\r": " ", "\t": " "})
MAX_LINE_BYTES = 1 << 20


def tokenizer_hash(pieces: Sequence[str]) -> str:
    """First 16 hex digits of the SHA-256 over the pieces joined by newlines."""
    return hashlib.sha256("\n".join(pieces).encode("utf-8")).hexdigest()[:16]


class Tokenizer:
    """A SentencePiece model held in memory, with its tables of bytes per token.

    `model` are the bytes of a .model file, `source` its name for messages. Raises DataError if it cannot be
    loaded, has no BOS piece, or has more than 65,535 pieces.
    """

    def __init__(self, model: bytes, source: str = "tokenizer") -> None:
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{source}: not a SentencePiece model, or damaged ({error}); give a whole .model file"
            ) from error
        self.model = model
        self.vocab_size = self.processor.vocab_size()
        self.bos_id = self.processor.bos_id()
        if self.vocab_size > MAX_TOKEN:
            raise DataError(f"{source}: {self.vocab_size} pieces; uint16 shards take at most {MAX_TOKEN}")
        if self.bos_id < 0:
            raise DataError(f"{source}: has no BOS piece; train it with bos_id=1")
        self.pieces = [self.processor.id_to_piece(i) for i in range(self.vocab_size)]
        self.hash = tokenizer_hash(self.pieces)
        self._adds_prefix = self.processor.normalize("a").startswith(SPACE)
        self._base_bytes, self._has_space, self._is_boundary = self._byte_tables()

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

    def _byte_tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        base_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        has_space = np.zeros(self.vocab_size, dtype=bool)
        is_boundary = np.zeros(self.vocab_size, dtype=bool)
        sp = self.processor
        for token, piece in enumerate(self.pieces):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                is_boundary[token] = True
            elif sp.is_byte(token):
                base_bytes[token] = 1
            else:
                has_space[token] = piece.startswith(SPACE)
                base_bytes[token] = len(piece.removeprefix(SPACE).encode("utf-8"))
        return base_bytes, has_space, is_boundary

    def encode(self, text: str) -> np.ndarray:
        """BOS and the tokens of one document, uint16 (1 + T,); BOS alone if no text is left."""
        return np.array([self.bos_id, *self.processor.encode(text)], dtype=TOKEN_DTYPE)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of the tokens (T,) of one document."""
        return self.processor.decode(tokens.tolist())

    def normalize(self, text: str) -> str:
        """The text as the tokenizer sees it: what `decode` gives back, unless characters are unknown."""
        normalized = self.processor.normalize(text).replace(SPACE, " ")
        return normalized[1:] if self._adds_prefix and normalized else normalized

    def count_target_bytes(self, tokens: np.ndarray) -> int:
        """UTF-8 bytes that the tokens (T,) stand for when each is scored after the one before it.

        A token counts the bytes of its piece without the leading space mark, plus one if it has the mark and
        does not follow a control or unknown token; byte tokens 1; control and unknown tokens 0. The first
        token counts no space, for nothing is before it.
        """
        previous_is_boundary = np.concatenate(([True], self._is_boundary[tokens[:-1]]))
        spaces = self._has_space[tokens] & ~previous_is_boundary[: tokens.size]
        return int(self._base_bytes[tokens].sum() + spaces.sum())

    def count_unknown(self, tokens: np.ndarray) -> int:
        """How many of the tokens (T,) are the unknown token."""
        return int(np.count_nonzero(tokens == self.processor.unk_id()))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a BPE model with byte fallback in the settings of the contest: pad 0, bos 1, eos 2, unk 3.

    The same texts in the same order give the same model, byte for byte. Small corpora may give fewer pieces
    than asked. Raises DataError if `vocab_size` is too small for the characters of the texts.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text.translate(RESERVED_MARKS) for text in texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            hard_vocab_limit=False,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=1,  # the number of threads is written into the model
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rsplit("] ", 1)[-1] or "no text left after normalisation"
        raise DataError(f"a tokenizer of {vocab_size} pieces cannot be trained: {reason}") from error
    return Tokenizer(model.getvalue(), "trained tokenizer")
