"""A whole training step: MXFP4 against bfloat16 nn.Linear, eager and compiled, in turns on one device.

    python benchmarks/bench_step.py [--models deit_tiny deit_base] [--methods qema] [--graphs] [--compile]
                                    [--carrier fp8] [--busy]

The step is that of main.py: model, drop path, AdamW, clipping and bfloat16 autocast of the recipe, at 224x224, on a
batch of noise that stays on the device. A turn is two steps and then four that count, one after the other as in
training. Each variant is compared with bfloat16 of its own kind: eager, --compile, --graphs (passes as CUDA graphs,
which is how main.py trains) or both. Peak memory is that of a process with the one variant in it; of graphs it is all
they hold. --busy adds how long the device works in a step, whatever the host does: the union of kernels and copies in
torch.profiler's trace.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence

import torch
from common import (
    MODELS,
    Results,
    add_carrier,
    command,
    device_busy,
    make_batch,
    make_run,
    method_config,
    parse,
    parser_for,
    peak_gib,
    recorded_gib,
    state_of,
    step_of,
    take_turns,
)

from engine import Run

BATCH = {"deit_tiny": 256, "deit_small": 256, "deit_base": 128, "swin_tiny": 128, "swin_small": 128}
BASELINE, GRAPHS, COMPILED, BUSY = "bf16", " graphs", " compiled", ", device busy"


def compile_run(run: Run, quick: bool) -> None:
    """Put the model under torch.compile; in a quick run without its code generation, which takes a CPU minutes."""
    run.model.compile(backend="eager" if quick else "inductor")  # as main.py --compile does


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for(__doc__, rounds=20)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, help="default: all five")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["tetrajet"],
        help="such as tetrajet qema nvfp4 'nvfp4 quant.rotation={}', which is nvfp4 with that key (default: tetrajet)",
    )
    parser.add_argument("--batch", type=int, help=f"images of a step (default: {BATCH})")
    parser.add_argument("--graphs", action="store_true", help="also with passes recorded as CUDA graphs")
    parser.add_argument("--compile", action="store_true", help="also with the model under torch.compile")
    parser.add_argument("--busy", action="store_true", help="also how long the device works in a step")
    add_carrier(parser)
    options, device = parse(parser, argv)
    results = Results("step", options, device)
    for model in options.models:
        batch_size = 4 if options.quick else options.batch or BATCH[model]
        runs, baselines = {}, {}
        kinds = itertools.product([False, True][: 1 + options.compile], [False, True][: 1 + options.graphs])
        for compiled, graphed in kinds:
            suffix = COMPILED * compiled + GRAPHS * graphed
            for words in ["fp", *options.methods]:
                method, *keys = words.split()
                name = (BASELINE if method == "fp" else f"{words}{options.carrier_suffix}") + suffix
                more = [*keys, *([] if method == "fp" else options.carrier_override), f"run.cuda_graphs={graphed}"]
                config = method_config(model, method)
                runs[name] = make_run(config, device, batch=batch_size, quick=options.quick, overrides=more)
                if compiled:
                    compile_run(runs[name], options.quick)
                baselines[name] = BASELINE + suffix
        batch = make_batch(runs[BASELINE])
        steps = {name: step_of(run, batch) for name, run in runs.items()}
        samples = take_turns(steps, device, options, kernels=False, uncounted=2, repeat=4)
        peaks = {name: peak_gib(step, state_of(runs[name], batch), device) for name, step in steps.items()}
        if device.type == "cuda":
            peaks = {name: peak + recorded_gib(runs[name]) for name, peak in peaks.items()}
        if options.busy and device.type == "cuda":
            for name, step in steps.items():
                samples[name + BUSY] = device_busy(step, device)
                baselines[name + BUSY] = baselines[name] + BUSY
        size = runs[BASELINE].cfg.model.img_size
        results.add(
            model,
            f"batch {batch_size} at {size}x{size}",
            samples,
            baselines,
            rate=lambda _, seconds, images=batch_size: images / seconds,
            rate_unit="images/s",
            peaks=peaks,
        )
        del runs, steps, batch
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    command(main)
