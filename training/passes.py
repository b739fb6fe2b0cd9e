"""A forward and a backward pass of a micro-batch, and what it draws.

Every random draw of a pass (mixup, dropout, stochastic depth, quantization noise) is a function of the run's seed, the
process's rank and the pass's position, so a run that is stopped and resumed goes on bit for bit without storing any
generator.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

from quantization.layers.clock import clock_of
from training.graphs import Pass
from training.state import TrainingState

# Noise positions of evaluation and of the probe, which only matter where the forward pass rounds stochastically, lie
# above training's.
EVALUATION_POSITION, PROBE_POSITION = 2**31, 3 * 2**30


def seed_step(run: TrainingState, position: int) -> None:
    """Set all generators and the quantization noise for forward pass number `position` of the run on this rank."""
    words = np.random.SeedSequence([run.cfg.run.seed, run.rank, position]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
    seek_noise(run.model, position)


def seek_noise(model: nn.Module, position: int) -> None:
    """Let the next forward pass of a model with quantization noise be number `position`."""
    if (clock := clock_of(model)) is not None:
        clock.seek(position)


def position_of(run: TrainingState, micro: int) -> int:
    """The position of micro-batch number `micro` of the run's present step: how many passes of the run precede it.

    A session with another accumulation goes on above the positions of the one before.
    """
    steps, passes = run.progress.origin
    return passes + (run.global_step - steps) * run.accumulation + micro


def forward_backward(
    run: TrainingState, model: nn.Module, images: Tensor, targets: Tensor, position: int, which: Pass | None = None
) -> Tensor:
    """One micro-batch: its gradients are added to those there are. Returns its loss (scalar, detached).

    which: its place in the step, by which `run.graphs` knows it; None computes it eagerly.
    """
    seed_step(run, position)
    if run.mixup is not None:
        images, targets = run.mixup(images.clone(), targets)  # in place, and a failed step is repeated

    def compute(images: Tensor, targets: Tensor) -> Tensor:
        with run.autocast():
            loss = run.loss(images, model(images), targets)
        (loss / run.accumulation).backward()
        return loss.detach() / run.accumulation

    if run.graphs is None or which is None:
        return compute(images, targets)
    return run.graphs.run(compute, images, targets, which)
