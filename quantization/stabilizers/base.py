"""The protocol between the training loop and a method against weight oscillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quantization.layers.linear import QuantLinear


@dataclass(frozen=True)
class Plan:
    """How long the training is, in optimizer steps."""

    steps_per_epoch: int
    total_steps: int


class Trainer(Protocol):
    """What a stabilizer may ask of the training loop."""

    optimizer: torch.optim.Optimizer

    def rehearse(self, steps: int, observe: Callable[[], None]) -> None:
        """Train for `steps` steps, call `observe` after each, and put everything back bit for bit."""


class Stabilizer:
    """Does nothing; the others override the points they need. Steps are optimizer steps of the run, from 0.

    Every process of a run calls every point at the same steps, with gradients already averaged, so whatever follows
    from weights and gradients alone is the same on all of them. None of the points waits for the device.
    """

    def __init__(self, cfg: Any, layers: dict[str, QuantLinear], plan: Plan) -> None:
        """cfg: the `stabilizer` section; layers: the quantized linears by their names in the model."""
        self.cfg, self.layers, self.plan = cfg, layers, plan

    def optimizer_name(self, name: str) -> str:
        """The optimizer, by timm's name, to use where the configuration says `name`. ValueError where none fits."""
        return name

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer of the run has been made."""

    def before_step(self, step: int, trainer: Trainer) -> dict[str, float] | None:
        """Before the batches of a step are drawn. Returns figures to log where it rehearsed steps, else None."""
        return None

    def after_backward(self, step: int) -> None:
        """Gradients are complete and averaged; clipping and the optimizer come next."""

    def after_step(self, step: int) -> None:
        """The optimizer has updated the weights."""

    def figures(self) -> dict[str, Tensor]:
        """Scalars worth logging now, as tensors on the device."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside model and optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def ramp_up(self, step: int, start: float) -> float | None:
        """How far a schedule has come that begins after the share `start` of training: 0 to 1; None before."""
        begin = start * self.plan.total_steps
        return None if step < begin else (step - begin) / max(self.plan.total_steps - begin, 1)
