"""Which layout of the quantized levels compresses best, how near that is to their entropy, and how long it takes.

    python bench/packing.py [--artifact final_model.int6.ptz] [--full-size] [--quick] [--coders] [--out FILE]

Levels of a trained artifact, and with --full-size those of the default 11-layer model whose weights are drawn
(independent normal numbers: nothing to exploit but their distribution, and the real sizes for the seconds). Each
layout is compressed with zstd-22, brotli-11 and lzma-9 (extreme); `ans` is what the artifact uses. Bytes are those of
the levels alone, with everything needed to decode them. Bounds are order-0 entropies, histograms free of charge: one
histogram a tensor, or one for all tensors of a role. Seconds are CPU time of this process, wall time beside it.

With --coders it compares instead the coder of train_gpt.py with that of the library `constriction` on the same levels
and size classes: bytes after zstd-22, seconds of repeats that take turns, and bytes that either adds to a record.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import lzma
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import safetensors
import safetensors.numpy
import torch
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common
from tools import record_fold

Levels = dict[str, np.ndarray]
SHORT = ("one byte a level", "bits packed", "ans")  # what is measured at full size, where brotli-11 takes a minute


def is_wide(levels: np.ndarray) -> bool:
    """Eight-bit levels, those of embeddings and tables; everything else here has at most six."""
    return bool(np.abs(levels.astype(np.int16)).max() > 31)


def each(transform: Callable[[np.ndarray], np.ndarray | tuple[np.ndarray, ...]]) -> Callable[[Levels], bytes]:
    """A layout that treats each tensor by itself; where it makes several streams, those of one kind lie together."""

    def layout(levels: Levels) -> bytes:
        made = [transform(q) for q in levels.values()]
        kinds = zip(*[streams if isinstance(streams, tuple) else (streams,) for streams in made])
        return b"".join(np.ascontiguousarray(stream).tobytes() for kind in kinds for stream in kind)

    return layout


def unsigned(q: np.ndarray) -> np.ndarray:
    return (q.reshape(-1).astype(np.int16) + (128 if is_wide(q) else 32)).astype(np.uint8)


def zigzag(q: np.ndarray) -> np.ndarray:
    wide = q.astype(np.int16)
    return (2 * np.abs(wide) - (wide > 0)).astype(np.uint8)


def delta(q: np.ndarray) -> np.ndarray:
    return np.diff(q, axis=-1, prepend=np.int8(0))


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    return np.packbits(np.unpackbits(values[:, None], axis=1)[:, 8 - bits :])


def bits_packed(q: np.ndarray) -> np.ndarray:
    return pack_bits(unsigned(q), 8 if is_wide(q) else 6)


def bit_planes(q: np.ndarray) -> np.ndarray:
    return np.packbits(np.unpackbits(unsigned(q)[:, None], axis=1)[:, 0 if is_wide(q) else 2 :].T, axis=1)


def sign_magnitude(q: np.ndarray) -> tuple[np.ndarray, ...]:
    flat = q.reshape(-1)
    return np.abs(flat.astype(np.int16)).astype(np.uint8), np.packbits((flat < 0)[flat != 0])


def nibbles(q: np.ndarray) -> tuple[np.ndarray, ...]:
    """Two high halves in a byte, and two low halves; an odd last level is followed by a zero."""
    values = np.pad(unsigned(q), (0, q.size % 2)).reshape(-1, 2)
    return tuple(half[:, 0] << 4 | half[:, 1] for half in (values >> 4, values & 15))


def low_bit_apart(q: np.ndarray) -> tuple[np.ndarray, ...]:
    values = unsigned(q)
    return values >> 1, pack_bits(values & 1, 1)


def alphabetical(levels: Levels) -> bytes:
    """As safetensors would order them: matrices and tables mixed."""
    return b"".join(levels[name].tobytes() for name in sorted(levels))


def by_layer(levels: Levels) -> bytes:
    """Matrices of one layer together, instead of one role together."""
    matrices = [(i / len(q), m) for q in levels.values() if q.ndim == 3 for i, m in enumerate(q)]
    tables = [q.tobytes() for q in levels.values() if q.ndim == 2]
    return b"".join([m.tobytes() for _, m in sorted(matrices, key=lambda pair: pair[0])] + tables)


def by_size_class(levels: Levels) -> bytes:
    """Levels sorted by the size class of their row and column, in front of them the codes of rows and columns."""
    arrays = train_gpt.encode_levels(levels)
    parts = []
    for name, q in levels.items():
        sides = arrays[f"{name}.rows"], arrays[f"{name}.columns"]
        parts += [side.tobytes() for side in sides]
        parts.append(q.reshape(-1)[np.argsort(train_gpt.size_classes(*sides), kind="stable")].tobytes())
    return b"".join(parts)


def ans(levels: Levels) -> bytes:
    arrays = train_gpt.encode_levels(levels)
    return b"".join(train_gpt.shuffle_bytes(array).tobytes() for array in arrays.values())


LAYOUTS: dict[str, Callable[[Levels], bytes]] = {
    "one byte a level": each(lambda q: q),
    "unsigned": each(unsigned),
    "zigzag": each(zigzag),
    "delta along rows": each(delta),
    "column order": each(lambda q: q.swapaxes(-1, -2)),
    "alphabetical": alphabetical,
    "by layer": by_layer,
    "bits packed": each(bits_packed),
    "bit planes": each(bit_planes),
    "nibble planes": each(nibbles),
    "sign and magnitude": each(sign_magnitude),
    "low bit apart": each(low_bit_apart),
    "by size class": by_size_class,
    "ans": ans,
}
COMPRESSORS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "zstd": (lambda data: zstandard.compress(data, 22), zstandard.decompress),
    "brotli": (lambda data: brotli.compress(data, quality=11, lgwin=24), brotli.decompress),
    "lzma": (lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
}


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, CPU seconds, wall seconds)"""
    cpu, wall = time.process_time(), time.perf_counter()
    result = action()
    return result, round(time.process_time() - cpu, 3), round(time.perf_counter() - wall, 3)


def entropy_bytes(levels: Levels) -> float:
    return train_gpt.order0_entropy_bytes({name: torch.from_numpy(q) for name, q in levels.items()})


def compare_layouts(levels: Levels, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        stream, layout_cpu_s, _ = timed(lambda layout=LAYOUTS[name]: layout(levels))
        row: dict[str, Any] = {"layout": name, "layout_cpu_s": layout_cpu_s, "stream_bytes": len(stream)}
        for compressor, (compress, decompress) in COMPRESSORS.items():
            packed, row[f"{compressor}_cpu_s"], _ = timed(lambda f=compress, data=stream: f(data))
            again, row[f"{compressor}_undo_cpu_s"], _ = timed(lambda f=decompress, data=packed: f(data))
            assert again == stream
            row[f"{compressor}_bytes"] = len(packed)
        rows.append(row)
    return rows


def read_levels(path: Path) -> Levels:
    """The levels of an artifact, of this version or of format 1, which held them as they are."""
    packed = path.read_bytes()
    if train_gpt.sealed(packed[:-32]) != packed:
        arrays = safetensors.numpy.load(zstandard.decompress(packed))
        return {name: q for name, q in arrays.items() if name.endswith(".levels")}
    model, _, _ = train_gpt.load_artifact(path)
    stored = safetensors.numpy.load(train_gpt.decompress(packed[:-40]))
    arrays = {name: train_gpt.shuffle_bytes(array, undo=True) for name, array in stored.items()}
    plan = {f"{name}.levels": model.get_parameter(name).shape for name in model.plan if f"{name}.scale" in arrays}
    return train_gpt.decode_levels(arrays, plan)


def drawn_model(quick: bool) -> train_gpt.GPT:
    smaller: dict[str, Any] = dict(num_layers=2, ve_layers=(0, 1), xsa_last_n=2) if quick else {}
    model = train_gpt.GPT(train_gpt.Config(**smaller).validate(), initialize=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return model


def quantized(model: train_gpt.GPT) -> dict[str, torch.Tensor]:
    return train_gpt.quantize(model.state_dict(), model.plan, train_gpt.Config())


def drawn_levels(model: train_gpt.GPT) -> Levels:
    return {name: tensor.numpy() for name, tensor in quantized(model).items() if tensor.dtype == torch.int8}


def measure_artifact(model: train_gpt.GPT) -> dict[str, Any]:
    """The whole way from weights to file and back, with quantization."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ptz"
        tensors, quantize_cpu_s, _ = timed(lambda: quantized(model))
        _, pack_cpu_s, pack_wall_s = timed(lambda: train_gpt.pack_tensors(tensors, {}, "zstd"))
        size = path.write_bytes(train_gpt.pack_artifact(model, ""))
        _, load_cpu_s, load_wall_s = timed(lambda: train_gpt.load_artifact(path))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "artifact_bytes": size,
        "quantize_cpu_s": quantize_cpu_s,
        "pack_cpu_s": pack_cpu_s,
        "pack_wall_s": pack_wall_s,
        "load_cpu_s": load_cpu_s,
        "load_wall_s": load_wall_s,
    }


def describe(title: str, levels: Levels, names: list[str]) -> dict[str, Any]:
    """Measure and print one set of levels, matrices before tables."""
    levels = dict(sorted(levels.items(), key=lambda item: (is_wide(item[1]), item[0])))
    by_role: dict[bool, list[np.ndarray]] = {}
    for q in levels.values():
        by_role.setdefault(is_wide(q), []).append(q.reshape(-1))
    per_tensor = entropy_bytes(levels)
    per_role = entropy_bytes({str(role): np.concatenate(parts) for role, parts in by_role.items()})
    rows = compare_layouts(levels, names)
    count = sum(q.size for q in levels.values())
    print(f"\n{title}: {count:,} levels in {len(levels)} tensors")
    print(
        f"order-0 entropy: {per_tensor:,.0f} bytes with a histogram a tensor (of which the ratios below are), ", end=""
    )
    print(f"{per_role:,.0f} with one for all matrices and one for all tables")
    print(
        f"{'layout':20}" + "".join(f"{name + ' bytes':>14}{'ratio':>8}{'cpu s':>7}{'undo':>6}" for name in COMPRESSORS)
    )
    for row in rows:
        cells = "".join(
            f"{row[f'{name}_bytes']:>14,}{row[f'{name}_bytes'] / per_tensor:>8.4f}"
            f"{row[f'{name}_cpu_s']:>7.1f}{row[f'{name}_undo_cpu_s']:>6.2f}"
            for name in COMPRESSORS
        )
        print(f"{row['layout']:20}{cells}")
    own = next(row["zstd_bytes"] for row in rows if row["layout"] == "ans")
    plain = {name: next(r[f"{name}_bytes"] for r in rows if r["layout"] == "one byte a level") for name in COMPRESSORS}
    print(f"ans in zstd against one byte a level: {', '.join(f'{own / n:.4f} of {name}' for name, n in plain.items())}")
    return {
        "levels": count,
        "bound_per_tensor": round(per_tensor),
        "bound_per_role": round(per_role),
        "ans_ratio": round(own / per_tensor, 5),
        "layouts": rows,
    }


# ----------------------------------------------------------------------------------------------------------
# The own coder beside a library's.
# ----------------------------------------------------------------------------------------------------------
OWN_CODER = ("ANS_BITS", "ANS_FLOOR", "encode_levels", "decode_levels", "ans_tables")  # what the library would replace


def library_encode_levels(levels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `train_gpt.encode_levels` would be with the library: the same sizes and classes, the histograms exact."""
    stream = train_gpt.require("constriction", "packing the artifact").stream
    arrays, keys = {}, []
    for name, level in sorted(levels.items()):
        energy = np.square(level, dtype=np.float32)
        for axis, side in ((-1, "rows"), (-2, "columns")):
            mean = energy.mean(axis, keepdims=True).clip(min=2.0**-6)
            arrays[f"{name}.{side}"] = (np.rint(2 * np.log2(mean)) + 12).astype(np.uint8)
            energy = energy / mean
        classes = train_gpt.size_classes(arrays[f"{name}.rows"], arrays[f"{name}.columns"])
        keys.append(classes << 8 | level.reshape(-1).view(np.uint8))
    key = np.concatenate(keys)
    counts = np.bincount(key, minlength=train_gpt.SIZE_CLASSES * 256).reshape(train_gpt.SIZE_CLASSES, 256)
    symbols = (key[np.argsort(key >> 8, kind="stable")] & 255).astype(np.int32)
    coder = stream.stack.AnsCoder()
    for row, part in zip(counts[::-1], np.split(symbols, counts.sum(1).cumsum()[:-1])[::-1]):
        if len(part):
            coder.encode_reverse(part, stream.model.Categorical(row.astype(np.float32), perfect=False))
    return arrays | {"ans.counts": counts.astype(np.uint32), "ans.words": coder.get_compressed()}


def library_decode_levels(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, torch.Size]) -> dict[str, np.ndarray]:
    """Undo `library_encode_levels`. Raises KeyError or ValueError for what it cannot have made."""
    stream = train_gpt.require("constriction", "reading the artifact").stream
    sizes = {name: (arrays[f"{name}.rows"], arrays[f"{name}.columns"]) for name in sorted(shapes)}
    for name, (rows, columns) in sizes.items():
        if np.broadcast_shapes(rows.shape, columns.shape) != shapes[name]:
            raise ValueError(f"{name} has levels of another shape than the model")
    classes, counts = np.concatenate([train_gpt.size_classes(*sides) for sides in sizes.values()]), arrays["ans.counts"]
    if (np.bincount(classes, minlength=train_gpt.SIZE_CLASSES) != counts.sum(1)).any():
        raise ValueError("the histograms of the levels do not add up")
    coder, flat = stream.stack.AnsCoder(arrays["ans.words"]), np.empty(len(classes), np.uint8)
    used = (row for row in counts if row.any())
    models = ((stream.model.Categorical(row.astype(np.float32), perfect=False), int(row.sum())) for row in used)
    flat[np.argsort(classes, kind="stable")] = np.concatenate([coder.decode(*each) for each in models])
    if not coder.is_empty():
        raise ValueError("the code of the levels does not come out even")
    parts = np.split(flat.view(np.int8), np.cumsum([shapes[name].numel() for name in sizes])[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(sizes, parts)}


def without_coder(program: str) -> tuple[str, str]:
    """train_gpt.py without its coder, and the coder's lines. Raises ValueError where some of it is not found."""
    lines, cut, found = program.splitlines(keepends=True), [], set()
    for node in reversed(ast.parse(program).body):
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = [getattr(node, "name", ""), *(target.id for target in targets if isinstance(target, ast.Name))]
        if own := set(names) & set(OWN_CODER):
            found |= own
            span = slice(node.lineno - 1, node.end_lineno)
            cut[:0] = lines[span]
            lines[span] = []
    if missing := set(OWN_CODER) - found:
        raise ValueError(f"train_gpt.py has no {', '.join(sorted(missing))}; bring OWN_CODER up to date")
    return "".join(lines), "".join(cut)


def coder_bytes() -> dict[str, dict[str, int]]:
    """Of either coder: bytes of its source, the same without docstrings and comments, and bytes it adds to a record."""
    sources = record_fold.read_sources(common.REPO)
    rest, own = without_coder(sources[record_fold.PROGRAM])
    functions = (library_encode_levels, library_decode_levels)
    library = "\n\n".join(map(inspect.getsource, functions)).replace("train_gpt.", "").replace("library_", "")

    def folded(program: str) -> int:
        return len(record_fold.fold(sources | {record_fold.PROGRAM: program}, "", {}).encode())

    def code(source: str) -> int:
        lines = record_fold.without_prose(source, record_fold.PROGRAM).splitlines()
        return sum(len(line.encode()) + 1 for line in lines if line)

    bare = folded(rest)
    return {
        name: dict(source=len(source.encode()), code=code(source), record=folded(f"{rest}\n\n{source}") - bare)
        for name, source in (("own", own), ("library", library))
    }


def compare_coders(levels: Levels, repeats: int = 7) -> dict[str, Any]:
    """Bytes and CPU seconds of both coders, medians of repeats that take turns after one that does not count."""
    shapes = {name: torch.Size(q.shape) for name, q in levels.items()}
    coders = {
        "own": (train_gpt.encode_levels, train_gpt.decode_levels),
        "library": (library_encode_levels, library_decode_levels),
    }
    coded = {name: encode(levels) for name, (encode, _) in coders.items()}
    actions: dict[str, Callable[[], Any]] = {}
    for name, (encode, decode) in coders.items():
        assert all(np.array_equal(q, levels[key]) for key, q in decode(coded[name], shapes).items())
        actions[f"{name} encode"] = lambda encode=encode: encode(levels)
        actions[f"{name} decode"] = lambda decode=decode, arrays=coded[name]: decode(arrays, shapes)
    seconds = common.timed_in_turn(actions, burn_in=1, repeats=repeats)
    code, rows = coder_bytes(), []
    for name, arrays in coded.items():
        stream = b"".join(train_gpt.shuffle_bytes(array).tobytes() for array in arrays.values())
        row: dict[str, Any] = {"coder": name, "bytes": len(zstandard.compress(stream, 22))}
        row |= {f"{way}_cpu_s": round(statistics.median(seconds[f"{name} {way}"]), 3) for way in ("encode", "decode")}
        rows.append(row | {f"{kind}_bytes": count for kind, count in code[name].items()})
    ratios = {
        f"{way}_ratio": statistics.median(
            ours / theirs for ours, theirs in zip(seconds[f"own {way}"], seconds[f"library {way}"])
        )
        for way in ("encode", "decode")
    }
    print(common.table(rows))
    print("own seconds in those of the library, medians of pairs: ", end="")
    print(", ".join(f"{name.removesuffix('_ratio')} {ratio:.2f}" for name, ratio in ratios.items()))
    return {
        "levels": sum(q.size for q in levels.values()),
        "repeats": repeats,
        "rows": rows,
        **{name: round(ratio, 3) for name, ratio in ratios.items()},
        "constriction": metadata.version("constriction"),
    }


def surroundings() -> Mapping[str, str]:
    command = ["git", "-C", str(train_gpt.CODE_DIR), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": train_gpt.cpu_name(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "zstandard": zstandard.__version__,
        "brotli": brotli.__version__,
        "safetensors": safetensors.__version__,
        "commit": commit or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="a trained artifact whose levels are laid out")
    parser.add_argument("--full-size", action="store_true", help="also the default model, drawn (minutes)")
    parser.add_argument("--quick", action="store_true", help="instead of that a drawn model of two layers")
    parser.add_argument("--coders", action="store_true", help="the own coder beside a library's, instead of layouts")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    args = parser.parse_args()
    result: dict[str, Any] = {"bench": "packing", **surroundings()}
    if args.coders:
        result["coders"] = compare_coders(
            read_levels(args.artifact) if args.artifact else drawn_levels(drawn_model(quick=not args.full_size))
        )
    elif args.artifact:
        result["artifact"] = describe(str(args.artifact), read_levels(args.artifact), list(LAYOUTS))
    if not args.coders and (args.full_size or args.quick or not args.artifact):
        model = drawn_model(quick=not args.full_size)
        title = f"drawn weights, {model.config.num_layers} layers"
        result["drawn"] = describe(title, drawn_levels(model), list(SHORT)) | measure_artifact(model)
        shown = ("artifact_bytes", "quantize_cpu_s", "pack_cpu_s", "pack_wall_s", "load_cpu_s", "load_wall_s")
        print("  ".join(f"{name}: {result['drawn'][name]:,}" for name in shown))
    print(json.dumps(result), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
