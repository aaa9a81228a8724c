"""What do the knowledge graph, the swarm and the MTP heads contribute at equal steps on real text?

    python bench/ablation.py --data DIR --tokenizer FILE --kg-blob FILE [--seeds 3] [--steps 250] [--jobs 2]

DIR holds shards made by data/prepare.py. Every variant trains the same small model for the same steps on the same
batches; only the named switches differ from the full recipe. The figure is the bits per byte of the averaged
weights before quantization and of the artifact, windows without overlap, mean ± sample standard deviation over
seeds. A table for people, one JSON line last.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common, small_runs

VARIANTS: dict[str, dict[str, Any]] = {
    "all on": {},
    "no KG init": dict(KG_INIT_SCALE=0),
    "no KG loss weight": dict(KG_WEIGHT=0),
    "no KG at all": dict(KG_ENABLED=0),
    "no swarm": dict(SWARM_ENABLED=0),
    "no MTP": dict(MTP_NUM_HEADS=0),
    "all off": dict(KG_ENABLED=0, SWARM_ENABLED=0, MTP_NUM_HEADS=0),
}


def main() -> None:
    parser = small_runs.arguments(__doc__, "runs/ablation")
    parser.add_argument("--kg-blob", required=True, help="file that tools/build_kg.py blob wrote for that tokenizer")
    args = parser.parse_args()
    swarm = dict(RECIPE="swarm", KG_PATH=Path(args.kg_blob).resolve(), SWARM_EVERY=max(1, args.steps // 10))
    found = small_runs.run_all({name: swarm | change for name, change in VARIANTS.items()}, args)
    small_runs.print_table(found, "variant")
    common.report("ablation", [], None, 1, seeds=args.seeds, steps=args.steps, bpb=found)


if __name__ == "__main__":
    main()
