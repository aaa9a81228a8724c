"""This project's own score, as any other submission's: ARTIFACT names the file; lengths are cut for short streams.

ARTIFACT=final_model.int6.ptz python tools/audit.py --submission tools/adapters/this_project.py --seconds 600
"""

import dataclasses
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt

ARTIFACT = os.environ.get("ARTIFACT", "final_model.int6.ptz")
BLOCK = 32  # targets between two updates of a mixer

torch.set_num_threads(1)  # tensors this small are fastest on one thread
model, config, _ = train_gpt.load_artifact(ARTIFACT)
config = dataclasses.replace(
    config, eval_seq_len=32, eval_stride=16, eval_batch_seqs=8, ttt_chunk_tokens=64, ttt_batch_seqs=2,
    ngram_buckets=64, compile=False, eval_only=False,
).validate()  # fmt: skip
VOCAB_SIZE = config.vocab_size
LENGTHS = (200, 301)
runtime = train_gpt.Runtime(config, {})
model.to(runtime.device)


def score(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = len(tokens) - 1
    text: Any = types.SimpleNamespace(tokens=tokens, num_targets=count, bytes=np.ones(count, dtype=np.int16))
    if config.ttt_enabled:
        scores = train_gpt.score_then_adapt(model, config, runtime, text)
    else:
        scores = train_gpt.score_stream(model, config, runtime, text, config.eval_stride)
    logp, mixer = scores.logp, train_gpt.make_mixer(config)
    if mixer is not None:
        if isinstance(mixer, train_gpt.HedgeMixer):  # it leaves its first 10,000 targets to the neural model
            mixer.min_tokens = BLOCK
        logp = train_gpt.mix_scores(mixer, torch.from_numpy(tokens), logp, scores.entropy, block=BLOCK)
    return logp, np.arange(count)
