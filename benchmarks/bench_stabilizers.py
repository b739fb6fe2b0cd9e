"""What a stabilizer adds to a training step: whole steps of engine.train_step on one fixed batch, against none.

    python benchmarks/bench_stabilizers.py [--model NAME] [--batch N] [--rounds N]

Variants take turns, a step each, so that drifts of the machine meet all of them. Prints the median step and its ratio
to plain TetraJet in the same run. Q-Ramping is timed without its detection.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import load_config
from engine import Run, train_step
from main import build_run, pick_device

KINDS = ("none", "qema", "qramping", "dampen", "freeze")


def build(kind: str, model: str, batch: int, folder: Path) -> Run:
    cfg = load_config(
        None,
        [
            f"model.name={model}",
            "quant.scheme=mx",
            f"stabilizer.kind={kind}",
            "data.set=generated",
            f"data.num_images={4 * batch}",
            "data.num_workers=0",
            f"data.batch_size={batch}",
            f"optim.global_batch={batch}",
            "aug.repeats=1",
        ],
    )
    run = build_run(cfg, folder / kind, rank=0, world_size=1, device=pick_device(cfg))
    if kind == "qramping":  # periods as a detection would spread them: one element in ten is ramped
        g = torch.Generator().manual_seed(0)
        shapes = [w.shape for w in run.stabilizer.weights]
        run.optimizer.set_periods([(1 + 5 * (torch.rand(s, generator=g) < 0.1).int()).to(run.device) for s in shapes])
    run.wrapped.train()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {kind: build(kind, options.model, options.batch, Path(folder)) for kind in KINDS}
    device = runs["none"].device
    size = runs["none"].cfg.model.img_size
    batch = torch.randn(options.batch, 3, size, size, device=device), torch.arange(options.batch, device=device)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_ in range(3 + options.rounds):
        for kind, run in runs.items():
            began = time.perf_counter()
            train_step(run, itertools.repeat(batch))
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_ >= 3:
                seconds[kind].append(time.perf_counter() - began)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{options.model}, batch {options.batch}, {name}, torch {torch.__version__}, median of {options.rounds} steps"
    )
    base = statistics.median(seconds["none"])
    for kind in KINDS:
        median = statistics.median(seconds[kind])
        low, high = min(seconds[kind]), max(seconds[kind])
        print(f"{kind:<10}{1e3 * median:9.2f} ms  {median / base:6.3f}  ({1e3 * low:.2f} to {1e3 * high:.2f})")


if __name__ == "__main__":
    main()
