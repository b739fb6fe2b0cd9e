"""What a stabilizer adds to a training step: whole steps of engine.train_step, against plain TetraJet.

    python benchmarks/bench_stabilizers.py [--model deit_tiny] [--batch 256]

Q-Ramping is timed without its detection, Dampen and Freeze as in the last three quarters of training, when they act.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import MODELS, Results, command, make_batch, make_run, method_config, parse, parser_for, step_of, take_turns

from engine import Run

KINDS = ("none", "qema", "qramping", "dampen", "freeze")


def spread_periods(run: Run) -> None:
    """Periods as a detection would spread them: one element in ten is ramped."""
    g = torch.Generator().manual_seed(0)
    shapes = [weight.shape for weight in run.stabilizer.weights]
    run.optimizer.set_periods([(1 + 5 * (torch.rand(s, generator=g) < 0.1).int()).to(run.device) for s in shapes])


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for(__doc__, rounds=20)
    parser.add_argument("--model", default="deit_tiny", choices=MODELS, help="one of the paper's (default: deit_tiny)")
    parser.add_argument("--batch", type=int, default=256, help="images of a step (default: 256)")
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
    results.write()


if __name__ == "__main__":
    command(main)
