"""What a stabilizer adds to a training step: whole steps of engine.train_step, against plain TetraJet; and the step of
Q-Ramping's optimizer alone, against that of AdamW.

    python benchmarks/bench_stabilizers.py [--model deit_tiny] [--batch 256] [--optimizer-of deit_base]

Q-Ramping is timed without its detection, Dampen and Freeze as in the last three quarters of training, when they act.
The optimizer's peak counts weights, gradients and its state.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from common import (
    MODELS,
    Results,
    command,
    make_batch,
    make_run,
    method_config,
    parse,
    parser_for,
    peak_gib,
    step_of,
    take_turns,
)

from engine import Run

KINDS = ("none", "qema", "qramping", "dampen", "freeze")


def spread_periods(run: Run) -> None:
    """Periods as a detection would spread them: one element in ten is ramped."""
    g = torch.Generator().manual_seed(0)
    shapes = [weight.shape for weight in run.stabilizer.weights]
    run.optimizer.set_periods([(1 + 5 * (torch.rand(s, generator=g) < 0.1).int()).to(run.device) for s in shapes])


def bench_optimizers(options: argparse.Namespace, device: torch.device, results: Results) -> None:
    """Steps of the optimizers alone, several in a row: in training, too, the host is ahead of the device."""
    config, overrides = method_config(options.optimizer_of, "tetrajet"), {"adamw": "none", "qramping": "qramping"}
    runs = {
        name: make_run(config, device, batch=4, quick=options.quick, overrides=[f"stabilizer.kind={kind}"])
        for name, kind in overrides.items()
    }
    spread_periods(runs["qramping"])
    for run in runs.values():
        for p in run.model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
    steps = {name: run.optimizer.step for name, run in runs.items()}
    samples = take_turns(steps, device, options, kernels=False, repeat=5)
    peaks = {}
    for name, run in runs.items():
        parameters = list(run.model.parameters())
        own = [parameters, [p.grad for p in parameters], run.optimizer.state_dict()]
        peaks[name] = peak_gib(steps[name], own, device)
    ramped = sum(weight.numel() for weight in runs["qramping"].stabilizer.weights)
    shape = f"{sum(p.numel() for p in parameters)} elements, {ramped} of them ramped"
    results.add(f"{options.optimizer_of}, optimizer", shape, samples, dict.fromkeys(steps, "adamw"), peaks=peaks)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for(__doc__, rounds=20)
    parser.add_argument("--model", default="deit_tiny", choices=MODELS, help="one of the paper's (default: deit_tiny)")
    parser.add_argument("--batch", type=int, default=256, help="images of a step (default: 256)")
    parser.add_argument(
        "--optimizer-of", default="deit_base", choices=MODELS, help="the optimizer timed alone (default: deit_base)"
    )
    options, device = parse(parser, argv)
    batch_size = 4 if options.quick else options.batch
    results = Results("stabilizers", options, device)
    runs = {}
    for kind in KINDS:
        acting = ["stabilizer.start=0"] if kind in ("dampen", "freeze") else []
        overrides = [f"stabilizer.kind={kind}", *acting]
        config = method_config(options.model, "tetrajet")
        runs[kind] = make_run(config, device, batch=batch_size, quick=options.quick, overrides=overrides)
        runs[kind].step = 1  # of step 0 the strength of Dampen is 0 still
    spread_periods(runs["qramping"])
    batch = make_batch(runs["none"])
    samples = take_turns({kind: step_of(run, batch) for kind, run in runs.items()}, device, options, kernels=False)
    size = runs["none"].cfg.model.img_size
    shape = f"batch {batch_size} at {size}x{size}"
    results.add(options.model, shape, samples, dict.fromkeys(KINDS, "none"))
    del runs  # and their memory
    bench_optimizers(options, device, results)


if __name__ == "__main__":
    command(main)
