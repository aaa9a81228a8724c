"""What do test-time training and each mixer contribute, and which of the numbers are scores at all?

    python bench/mixing_quality.py --artifact FILE --data DIR --tokenizer FILE [--val-tokens 200000] [--plot FILE.png]

Scores one artifact by a sliding window and by score-first TTT, then mixes each stream with every mixer, valid and
published. Beside every figure stands the mass that the mixture's probabilities add up to at 64 sampled targets:
where it is not 1 the figure is no code length. Then the default mixer on the same text twice, and on random
tokens, where it must not lose. A table for people, a plot of running bits per byte, one JSON line last.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common

MIXERS: dict[str, dict[str, Any]] = {
    "neural": dict(mixer="none"),
    "backoff (default)": dict(mixer="backoff"),
    "published rule, exact counts": dict(mixer="backoff-published"),
    "published rule, hashed counts": dict(mixer="backoff-published", ngram_counts="hashed"),
    "hedge, five distributions": dict(mixer="hedge"),
    "hedge, entropy expert": dict(mixer="hedge", entropy_expert=True),
}


def mix(config: train_gpt.Config, tokens: np.ndarray, scores: train_gpt.TokenScores) -> tuple[np.ndarray, float, float]:
    """Mixed log-probabilities (N,), mean sampled mass, seconds."""
    began = time.perf_counter()
    mixer = train_gpt.make_mixer(config)
    if mixer is None:
        return scores.logp.astype(np.float64), float(np.exp(scores.sampled).sum(1).mean()), 0.0
    probe = train_gpt.MassProbe(scores.targets + 1, scores.sampled, scores.entropy[scores.targets])
    ids = torch.from_numpy(tokens.astype(np.int64))
    logp = train_gpt.mix_scores(mixer, ids, scores.logp, scores.entropy, probe)
    return logp, float(probe.mass.mean()), time.perf_counter() - began


def bits_per_byte(logp: np.ndarray, target_bytes: np.ndarray) -> float:
    return float(-logp.sum() / math.log(2) / target_bytes.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--artifact", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--val-tokens", type=common.positive, default=200_000)
    parser.add_argument("--ttt-epochs", type=int, default=1)
    parser.add_argument("--ttt-lr", type=float, default=0.002)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    try:
        model, config, _ = train_gpt.load_artifact(args.artifact)
        config = dataclasses.replace(
            config, data_path=args.data, tokenizer_path=args.tokenizer, val_tokens=args.val_tokens,
            eval_stride=config.eval_seq_len // 2, ttt_enabled=True, ttt_epochs=args.ttt_epochs, ttt_lr=args.ttt_lr,
            ttt_chunk_tokens=16 * config.eval_seq_len, ttt_freeze_blocks=min(2, config.num_layers - 1),
        ).validate()  # fmt: skip
        runtime = train_gpt.Runtime(config, {})
        validation = train_gpt.ValidationSet(config, train_gpt.Tokenizer(args.tokenizer, config.vocab_size))
    except train_gpt.UserError as error:
        parser.error(str(error))
    streams = {
        "sliding window": train_gpt.score_stream(model, config, runtime, validation, config.eval_stride),
        "score-first TTT": train_gpt.score_then_adapt(model, config, runtime, validation),
    }
    rows, curves = [], {}
    for stream, scores in streams.items():
        for name, settings in MIXERS.items():
            logp, mass, seconds = mix(dataclasses.replace(config, **settings), validation.tokens, scores)
            row = dict(stream=stream, mixer=name, bpb=bits_per_byte(logp, validation.bytes), mass=mass)
            rows.append(row | dict(valid=abs(mass - 1) <= train_gpt.MASS_TOLERANCE, seconds=seconds))
            curves[stream, name] = logp
    extremes = dict(twice=on_repeated_text(model, config, runtime, validation), random=on_random_tokens(config))
    print(f"{'scores':<16} {'mixer':<30} {'bpb':>8} {'mass':>10} valid")
    for row in rows:
        verdict = "yes" if row["valid"] else "INVALID"
        print(f"{row['stream']:<16} {row['mixer']:<30} {row['bpb']:>8.4f} {row['mass']:>10.4f} {verdict}")
    for name, result in extremes.items():
        print(f"{name}: neural {result['neural']:.4f}, default mixer {result['mixed']:.4f} {result['unit']}")
    if args.plot:
        plot(curves, validation.bytes, args.plot)
    targets, total_bytes = validation.num_targets, int(validation.bytes.sum())
    common.report("mixing_quality", [], None, 1, targets=targets, bytes=total_bytes, rows=rows, **extremes)


def on_repeated_text(
    model: train_gpt.GPT, config: train_gpt.Config, runtime: train_gpt.Runtime, validation: train_gpt.ValidationSet
) -> dict[str, Any]:
    """Bits per byte of the second copy when the first quarter of the text stands twice."""
    quarter = validation.tokens[: len(validation.tokens) // 4]
    tokens = np.concatenate([quarter, quarter])
    target_bytes = np.concatenate([validation.bytes[: len(quarter)], validation.bytes[: len(quarter) - 1]])
    twice: Any = types.SimpleNamespace(tokens=tokens, bytes=target_bytes, num_targets=len(tokens) - 1)
    scores = train_gpt.score_stream(model, config, runtime, twice, config.eval_stride)
    logp, _, _ = mix(dataclasses.replace(config, mixer="backoff"), tokens, scores)
    second = slice(len(quarter), None)
    neural = bits_per_byte(scores.logp[second].astype(np.float64), target_bytes[second])
    return dict(neural=neural, mixed=bits_per_byte(logp[second], target_bytes[second]), unit="bpb, second copy")


def on_random_tokens(config: train_gpt.Config, count: int = 200_000) -> dict[str, Any]:
    """Bits per token on uniformly random tokens that the model predicts as well as anything can: uniformly."""
    vocab_size = config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, count + 1)
    uniform = np.full(count, -math.log(vocab_size), np.float32)
    targets = train_gpt.sample_targets(count, seed=1)
    sampled = np.full((len(targets), vocab_size), -math.log(vocab_size), np.float32)
    scores = train_gpt.TokenScores(uniform, -uniform, sampled, targets)
    logp, _, _ = mix(dataclasses.replace(config, mixer="backoff"), tokens, scores)
    return dict(neural=math.log2(vocab_size), mixed=float(-logp.mean() / math.log(2)), unit="bits per token")


def plot(curves: dict[tuple[str, str], np.ndarray], target_bytes: np.ndarray, path: Path) -> None:
    """Running bits per byte over the tokens scored so far: a colour a mixer, the sliding window thin, TTT thick and
    pale, dashes where the figure is no code length. The axes begin where what is drawn does.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from tools import run_figures

    total_bytes = np.maximum(np.cumsum(target_bytes, dtype=np.float64), 1)
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    first = min(1000, len(target_bytes) // 10)  # before it the mean of a few targets swings
    scored = np.unique(np.geomspace(first + 1, len(target_bytes), 1000).astype(np.int64))
    for (stream, mixer), logp in curves.items():
        adapted = stream != "sliding window"
        if adapted and mixer not in ("neural", "backoff (default)"):
            continue
        invalid = mixer.endswith(("hashed counts", "entropy expert"))
        running = (-np.cumsum(logp) / math.log(2) / total_bytes)[scored - 1]
        axes.plot(
            scored, running, color=run_figures.style_of(list(MIXERS).index(mixer))[0],
            linestyle="--" if invalid else "-", linewidth=5.0 if adapted else 1.5, alpha=0.35 if adapted else 1.0,
            label=f"{stream}, {mixer}" + (" (INVALID)" if invalid else ""),
        )  # fmt: skip
    axes.set(xlabel="tokens scored", ylabel="bits per byte so far", xscale="log", xlim=(scored[0], scored[-1]))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper left", ncols=2, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
