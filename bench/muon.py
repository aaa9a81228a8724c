"""Do Muon's state and work per rank fall as 1/world size?

    python bench/muon.py [--worlds 1 2 4] [--layers 8] [--dim 256] [--steps 3]

Each world is so many processes under gloo on this machine's CPU, one thread each. Bytes are those of the momentum and
of the gradient slices that a rank owns; work is the CPU time of one rank's update, collectives apart, so ranks that
wait for a busy core do not count as working. On CUDA run the training step by itself: `bench/train_step.py --world 8`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from bench import common


def run_rank(layers: int, dim: int, steps: int) -> None:
    """One rank, as its environment says; rank 0 prints what every rank measured."""
    torch.set_num_threads(1)
    config = train_gpt.Config(num_layers=layers, model_dim=dim, num_heads=4, num_kv_heads=2, ve_layers=(), device="cpu")
    with train_gpt.Runtime(config, os.environ) as runtime:
        model = train_gpt.GPT(config, initialize=False)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        banks = [model.get_parameter(name) for name in train_gpt.BANK_NAMES]
        muon = train_gpt.Muon(banks, config, runtime, torch.float32)
        for shard in muon.shards:
            shard.own_grad.normal_()
        state_bytes = sum(4 * shard.momentum.numel() for shard in muon.shards)
        spent = []
        for _ in range(steps + 1):
            began = time.process_time()
            for shard in muon.shards:
                muon.newton_schulz(shard.own_grad, config.muon_steps)
            spent.append(time.process_time() - began)
            muon.step(0.01, 0.9, torch.tensor(True))
        seconds = torch.zeros(runtime.world_size)
        seconds[runtime.rank] = min(spent[1:])
        ranks_s = runtime.all_reduce_sum(seconds).tolist()
        if runtime.is_main:
            print(json.dumps(dict(state_bytes=state_bytes, ranks_s=ranks_s)), flush=True)
    os._exit(0)  # gloo's threads can abort a process while the interpreter is taken down


def run_world(world: int, shape: list[str]) -> dict[str, Any]:
    """What rank 0 of so many processes reports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]), WORLD_SIZE=str(world))
    command = [sys.executable, __file__, "--as-rank", *shape]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **address, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return json.loads(printed[0].splitlines()[-1])


def main() -> None:
    parser = common.arguments(__doc__, threads=1)
    parser.add_argument("--worlds", type=common.positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=common.positive, default=8)
    parser.add_argument("--dim", type=common.positive, default=256)
    parser.add_argument("--steps", type=common.positive, default=3)
    parser.add_argument("--as-rank", action="store_true", help="for the processes that this script starts")
    args = parser.parse_args()
    if args.quick:
        args.worlds, args.layers, args.dim = [1, 2], 4, 64
    if args.as_rank:
        run_rank(args.layers, args.dim, args.steps)
    shape = [f"--layers={args.layers}", f"--dim={args.dim}", f"--steps={args.steps}"]
    rows = []
    for world in args.worlds:
        found = run_world(world, shape)
        state_mib, slowest_ms = found["state_bytes"] / 2**20, 1e3 * max(found["ranks_s"])
        rows.append(dict(world=world, state_mib=state_mib, ms_of_slowest_rank=slowest_ms))
    first, last = rows[0], rows[-1]
    growth = last["world"] / first["world"]
    headlines = [
        common.Headline(
            f"Muon state a rank × ranks, {last['world']} ranks against {first['world']}",
            growth * last["state_mib"] / first["state_mib"], "×", 1.05, at_least=False,
        ),
        common.Headline(
            f"Muon work a rank × ranks, {last['world']} ranks against {first['world']}",
            growth * last["ms_of_slowest_rank"] / first["ms_of_slowest_rank"], "×",
        ),
    ]  # fmt: skip
    common.report("muon", headlines, None, 1, layers=args.layers, dim=args.dim, worlds=rows)


if __name__ == "__main__":
    main()
