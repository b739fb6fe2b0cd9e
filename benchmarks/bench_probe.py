"""What the probe costs: whole steps of engine.train_step without and with it, and its share of an epoch.

    python benchmarks/bench_probe.py [--model deit_tiny] [--method tetrajet] [--batch 256]

Steps are timed off (no probe), on (within a recording: the weights, and a forward pass of the fixed batch), on in the
last epoch (weights are followed too), and ending a recording (opened, ended and written, beside its step). The share is
that of the default schedule on this one GPU, where a step of the recipe is several micro-batches: T0 steps on of the
steps of an epoch of ImageNet-1K and one ending; in the last epoch all steps are followed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from common import MODELS, Results, command, make_batch, make_run, method_config, parse, parser_for, step_of, take_turns

from config import load_config
from engine import Run
from quantization.stabilizers import Plan
from record.runlog import RunLog

IMAGENET, EPOCHS = 1_281_167, 90


def probed(run: Run, step: Callable[[], object], number: int, log: RunLog) -> Callable[[], object]:
    """A step of a run with a probe, as optimizer step `number` of the run."""

    def call() -> None:
        run.probe.before_step(number)
        step()
        if (recording := run.probe.after_step(number)) is not None:
            log.write_recording(recording, at=number)

    return call


def main(argv: Sequence[str] | None) -> None:
    parser = parser_for(__doc__, rounds=20)
    parser.add_argument("--model", default="deit_tiny", choices=MODELS)
    parser.add_argument("--method", default="tetrajet", help="the rest of a configuration's name (default: tetrajet)")
    parser.add_argument("--batch", type=int, default=256, help="images of a micro-batch (default: 256)")
    options, device = parse(parser, argv)
    batch_size = 4 if options.quick else options.batch
    config = method_config(options.model, options.method)
    images = ["probes.enabled=true", f"data.num_images={max(batch_size, 640)}"]
    runs = {
        name: make_run(config, device, batch=batch_size, quick=options.quick, overrides=overrides)
        for name, overrides in (("off", []), ("on", images), ("on, last epoch", images), ("ending", images))
    }
    probe = runs["on"].probe
    global_batch = load_config(config).optim.global_batch
    epoch = IMAGENET // global_batch  # optimizer steps
    numbers = {"on": epoch - 2, "on, last epoch": EPOCHS * epoch - 2, "ending": epoch - 1}
    batch = make_batch(runs["off"])
    with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder) / "run") as log:
        calls = {"off": step_of(runs["off"], batch)}
        for name, number in numbers.items():
            runs[name].probe.plan, runs[name].probe.epochs = Plan(epoch, EPOCHS * epoch), EPOCHS
            calls[name] = probed(runs[name], step_of(runs[name], batch), number, log)
        samples = take_turns(calls, device, options, kernels=False)
    results = Results("probe", options, device)
    shape = f"batch {batch_size}, probe on {len(probe.images)} images, T0 {probe.cfg.steps}"
    results.add(f"{options.model} {options.method}", shape, samples, dict.fromkeys(samples, "off"))
    off, on, last, ending = (statistics.median(samples[name]) for name in samples)
    recipe = max(1, global_batch // batch_size) * off * epoch  # ms of an epoch's forward and backward passes
    share = (probe.cfg.steps * (on - off) + ending - off) / recipe
    at_last = (epoch * (last - off) + ending - off) / recipe
    print(f"share of an epoch of {epoch} steps of {global_batch} images: {share:.2%}; of the last epoch: {at_last:.2%}")


if __name__ == "__main__":
    command(main)
