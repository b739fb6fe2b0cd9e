"""Whole training steps on one GPU and on several under DistributedDataParallel, images/s, in one run.

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_scaling.py [--models deit_base] [--graphs]

Every GPU has the same batch in both cases, of noise that stays on the device; the step is that of main.py at 224x224.
Alone, the first GPU trains while the others wait. Times and ratios are those of a step of the first process.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence

import torch
import torch.distributed as dist
from bench_step import BASELINE, BATCH, GRAPHS
from common import MODELS, Results, command, make_batch, make_run, method_config, parse, parser_for, step_of, take_turns

from config import UserError
from training.processes import Processes


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for(__doc__, rounds=25)
    parser.add_argument("--models", nargs="+", default=["deit_base"], choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=["tetrajet"], help="rows of Table 2 (default: tetrajet)")
    parser.add_argument("--carriers", nargs="+", default=["bf16", "fp8"], choices=["bf16", "fp8"])
    parser.add_argument("--batch", type=int, help=f"images of a GPU's step (default: {BATCH})")
    parser.add_argument("--graphs", action="store_true", help="with passes recorded as CUDA graphs")
    options, device = parse(parser, argv)
    processes = Processes()
    processes.look_around()
    if processes.world_size < 2:
        raise UserError("This benchmark needs several processes; start it with torchrun --nproc-per-node 2.")
    with processes.group(device):
        measure(options, device, processes.rank, processes.world_size)


def measure(options: argparse.Namespace, device: torch.device, rank: int, world_size: int) -> None:
    results = Results("scaling", options, device) if rank == 0 else None
    for model in options.models:
        batch_size = 4 if options.quick else options.batch or BATCH[model]
        kind, graphs = (GRAPHS, ["run.cuda_graphs=true"]) if options.graphs else ("", [])
        variants = {BASELINE + kind: ("fp", graphs)}
        for method in options.methods:
            for carrier in options.carriers:
                name = method + ("" if carrier == "bf16" else f" {carrier}") + kind
                variants[name] = method, [f"quant.carrier={carrier}", *graphs]
        samples, baselines, images = {}, {}, {}
        for variant, (method, overrides) in variants.items():
            for processes in (1, world_size):
                name = f"{variant}, {processes} GPU" + "s" * (processes > 1)
                baselines[name], images[name] = f"{variant}, 1 GPU", processes * batch_size
                if rank < processes:
                    run = make_run(
                        method_config(model, method),
                        device,
                        batch=batch_size,
                        quick=options.quick,
                        overrides=overrides,
                        rank=rank,
                        world_size=processes,
                    )
                    step = step_of(run, make_batch(run))
                    samples |= take_turns({name: step}, device, options, kernels=False, uncounted=2, repeat=4)
                    if run.graphs is not None:
                        run.graphs.forget()
                    del run, step
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                dist.barrier()
        if results is not None:
            results.add(
                model,
                f"batch {batch_size} a GPU",
                samples,
                baselines,
                rate=lambda name, seconds, images=images: images[name] / seconds,
                rate_unit="images/s",
            )


if __name__ == "__main__":
    command(main)
