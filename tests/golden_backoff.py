"""Reference numbers of the published backoff mixer: text and logits by formula, results in a file."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

ARCHIVE = Path(__file__).resolve().parent / "golden" / "backoff.npz"
BLOCK = 1000  # targets between two updates of the counts
VOCAB_SIZE = 1024


def text(num_tokens: int = 20_001, state: int = 20240601) -> np.ndarray:
    """(num_tokens,) int64: a congruential generator drives Markov steps, fresh draws and repeats."""

    def draw() -> int:
        nonlocal state
        state = (6364136223846793005 * state + 1442695040888963407) % (1 << 64)
        return state >> 33

    tokens, previous = [], 1
    while len(tokens) < num_tokens:
        kind = draw() % 100
        if kind < 3 and len(tokens) > 64:
            length = 8 + draw() % 32
            start = draw() % (len(tokens) - length)
            tokens += tokens[start : start + length]
        elif kind < 90:
            tokens.append((37 * previous + 11 + 101 * (0, 0, 0, 0, 1, 1, 2, 3)[draw() % 8]) % VOCAB_SIZE)
        else:
            tokens.append(min(draw() % VOCAB_SIZE, draw() % VOCAB_SIZE))
        previous = tokens[-1]
    return np.array(tokens[:num_tokens])


def neural_scores(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability and entropy (N - 1,) of targets tokens[1:] under logits that a formula gives."""
    logp, entropy = [], []
    seed = zlib.crc32(b"stream.logits")
    for start in range(0, len(tokens) - 1, BLOCK):
        target = tokens[start + 1 : start + 1 + BLOCK]
        row = np.arange(start, start + len(target))
        x = (np.arange(start * VOCAB_SIZE, (start + len(target)) * VOCAB_SIZE) + seed) % (1 << 32)
        for _ in range(2):
            x = ((x ^ (x >> 16)) * 0x045D9F3B) % (1 << 32)
        logits = (4 * ((x ^ (x >> 16)) / 2.0**31 - 1)).reshape(len(target), VOCAB_SIZE)
        logits[np.arange(len(target)), target] += 3 * (row % 4)
        logits = logits.astype(np.float32).astype(np.float64)
        scores = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
        logp.append(scores[np.arange(len(target)), target])
        entropy.append(-(np.exp(scores) * scores).sum(1))
    return np.concatenate(logp), np.concatenate(entropy)
