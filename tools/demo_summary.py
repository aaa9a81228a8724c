"""Say in three lines what a run reached, next to general-purpose compressors on the same text.

    python tools/demo_summary.py runs/demo

Reads the newest JSONL log in RUN/logs and the shards it names; the compressors see exactly the validation bytes
that the model was scored on, without any training text.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import sentencepiece
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt


def read_events(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of every event in a JSONL log."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["event"]: row for row in rows}


def validation_text(config: train_gpt.Config) -> bytes:
    """UTF-8 bytes of the validation tokens that were scored, documents joined by nothing."""
    tokenizer = train_gpt.Tokenizer(config.tokenizer_path, config.vocab_size)
    tokens = train_gpt.ValidationSet(config, tokenizer).tokens.tolist()
    model = sentencepiece.SentencePieceProcessor(model_file=config.tokenizer_path)
    documents: list[list[int]] = [[]]
    for token in tokens:
        if token == train_gpt.BOS_ID:
            documents.append([])
        else:
            documents[-1].append(token)
    return "".join(model.decode(document) for document in documents).encode()


def summarize_run(folder: Path) -> list[str]:
    """Three lines for a newcomer. Raises SystemExit with a readable message when there is nothing to read."""
    logs = sorted((folder / "logs").glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise SystemExit(f"no log in {folder / 'logs'}; run the training first")
    events = read_events(logs[-1])
    if "final_int8_zlib_roundtrip_exact" not in events:
        raise SystemExit(f"{logs[-1]} has no final line: the run did not end; run it again")
    fields = {name: value for name, value in events["config"].items() if name not in ("event", "time")}
    config = train_gpt.Config.from_json(json.dumps(fields))
    final = events["final_int8_zlib_roundtrip_exact"]["val_bpb"]
    text = validation_text(config)
    zstd = 8 * len(zstandard.ZstdCompressor(level=22).compress(text)) / len(text)
    xz = 8 * len(lzma.compress(text, preset=9)) / len(text)
    size = events["artifact_bytes"]["bytes"]
    before = events["diagnostic"]["val_bpb"]
    after = events[f"final_{config.bits_label}_roundtrip_exact"]["val_bpb"]
    return [
        f"Reached: {final:.3f} bits per byte on {len(text):,} bytes of text the model never saw.",
        f"The artifact is {size:,} bytes; quantization changed the score from {before:.4f} to {after:.4f}.",
        f"The same bytes cost {zstd:.3f} bits per byte with zstd-22 and {xz:.3f} with xz -9 (no training text).",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("run", type=Path, help="the OUT_DIR of a finished run")
    for line in summarize_run(parser.parse_args().run):
        print(line)


if __name__ == "__main__":
    main()
