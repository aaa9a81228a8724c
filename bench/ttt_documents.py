"""A prototype: what does test-time training of low-rank adapters gain, begun anew with each document?

    python bench/ttt_documents.py --artifact FILE --data DIR --tokenizer FILE [--targets 32768]
    python bench/ttt_documents.py ... --setting RANK,RATE,CHUNK,STEPS --setting 8,1e-3,128,1

Every matrix of the banks gets a product of two thin ones beside it, one drawn, one zero (arXiv 2106.09685), and both
begin anew with each document. CHUNK targets of a document are scored with what was learned from the earlier ones, then
Adam takes STEPS steps on the document's last window, all of whose targets are scored. The baseline takes no steps.
Beside the scores stands how many tokens were trained on for each target: score-first training on whole chunks
(bench/ttt_gain.py) takes TTT_EPOCHS. A row at a time is printed; the last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common

SETTINGS = (
    "8,3e-4,128,1", "8,1e-3,128,1", "8,2e-3,128,1", "2,1e-3,128,1", "32,1e-3,128,1", "8,1e-3,256,1", "8,1e-3,128,2",
)  # fmt: skip


class AdaptedGPT(train_gpt.GPT):
    """The model with adapters beside its banks: `down` (matrices, rows, rank), `up` (matrices, rank, columns)."""

    def adapt(self, rank: int) -> list[Tensor]:
        """Begin anew with adapters that change nothing yet; returns what is to be trained."""
        generator = torch.Generator().manual_seed(0)
        self.down: dict[str, Tensor] = {}
        self.up: dict[str, Tensor] = {}
        for name in train_gpt.BANK_NAMES:
            matrices, rows, columns = self.get_parameter(name).shape
            drawn = torch.randn(matrices, rows, rank, generator=generator) / math.sqrt(rank)
            self.down[name] = drawn.requires_grad_()
            self.up[name] = torch.zeros(matrices, rank, columns, requires_grad=True)
        return [*self.down.values(), *self.up.values()]

    def _weight(self, name: str, qat: bool) -> Tensor:
        weight = super()._weight(name, qat)
        return weight + (self.down[name] @ self.up[name]).to(weight.dtype) if name in self.down else weight


def documents(tokens: np.ndarray) -> list[range]:
    """The targets of each document: those behind a BOS up to the next one, which is its last."""
    starts = np.flatnonzero(tokens[:-1] == train_gpt.BOS_ID).tolist()
    ends = sorted({0, *starts, len(tokens) - 1})
    return [range(first, stop) for first, stop in itertools.pairwise(ends)]


def adapt_by_document(
    model: AdaptedGPT, tokens: Tensor, rank: int, rate: float, chunk: int, steps: int
) -> tuple[np.ndarray, int]:
    """Log-probabilities of all targets, in nats, each scored before it is trained on; and how many were trained on."""
    length, logp, trained = model.config.eval_seq_len, np.zeros(len(tokens) - 1), 0

    def losses(first: int, stop: int) -> Tensor:
        logits = model.logits(tokens[None, first:stop])
        return F.cross_entropy(logits[0].float(), tokens[first + 1 : stop + 1], reduction="none")

    for document in documents(tokens.numpy()):
        parameters = model.adapt(rank)
        optimizer = torch.optim.Adam(parameters, rate, betas=(0.9, 0.99))
        for start in range(document.start, document.stop, chunk):
            stop = min(start + chunk, document.stop)
            first = max(0, stop - length)
            with torch.inference_mode():
                logp[start:stop] = -losses(first, stop)[start - first :].double().numpy()
            if stop == document.stop:
                continue  # nothing of this document is left to be scored
            first = max(document.start, stop - length)
            for _ in range(steps):
                optimizer.zero_grad()
                losses(first, stop).mean().backward()
                optimizer.step()
                trained += stop - first
    return logp, trained


def main() -> None:
    parser = common.arguments(__doc__, threads=1)
    parser.add_argument("--artifact", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--targets", type=int, default=32_768)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--setting", action="append", help="RANK,RATE,CHUNK,STEPS (default: those of the study)")
    args = parser.parse_args()
    try:
        study(args)
    except (train_gpt.UserError, OSError, ValueError) as error:
        parser.error(str(error))


def study(args: argparse.Namespace) -> None:
    plain, config, _ = train_gpt.load_artifact(args.artifact)
    config = dataclasses.replace(
        config, data_path=args.data, tokenizer_path=args.tokenizer, val_tokens=args.targets, compute_dtype=args.dtype
    )
    runtime = common.open_runtime(args, config)
    validation = train_gpt.ValidationSet(config, train_gpt.Tokenizer(args.tokenizer, config.vocab_size))
    model = AdaptedGPT(config, initialize=False)
    model.load_state_dict(plain.state_dict())
    model.requires_grad_(requires_grad=False)
    tokens = torch.from_numpy(validation.tokens.astype(np.int64))
    rows: list[dict[str, Any]] = []
    for setting in args.setting or SETTINGS:
        rank, rate, chunk, steps = map(float, setting.split(","))
        scores, seconds, trained = [], [], 0
        for taken in (0, int(steps)):
            began = time.perf_counter()
            logp, trained = adapt_by_document(model, tokens, int(rank), rate, int(chunk), taken)
            scores.append(train_gpt.score_of(logp, validation).val_bpb)
            seconds.append(time.perf_counter() - began)
        row = dict(rank=rank, rate=rate, chunk=chunk, steps=steps, plain=scores[0], adapted=scores[1])
        row |= dict(gain=scores[0] - scores[1], trained_per_target=trained / validation.num_targets)
        rows.append(row | dict(plain_s=seconds[0], adapted_s=seconds[1]))
        print(f"{setting:<20} {scores[0]:.4f} {scores[1]:.4f} {row['gain']:+.4f} {seconds[1]:.0f} s", flush=True)
    scored = dict(targets=validation.num_targets, documents=len(documents(validation.tokens)), dtype=args.dtype)
    common.report("ttt_documents", [], runtime.device, args.threads, rows=rows, **scored)


if __name__ == "__main__":
    main()
