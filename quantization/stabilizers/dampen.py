"""Dampen (Nagel et al. 2022, Overcoming Oscillations in Quantization-Aware Training; the paper's related work).

    loss + lambda_t * sum over layers ||w - Q(w)||_F^2,     Q(w) detached

Its gradient, 2 lambda_t (w - Q(w)), is added to the averaged gradients: no graph, and the same on every process.
lambda_t is 0 for the first share `start` of training and then rises to `weight` along half a cosine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantization.stabilizers.base import Stabilizer


class Dampen(Stabilizer):
    def strength(self, step: int) -> float:
        """lambda_t."""
        progress = self.ramp_up(step, self.cfg.start)
        return 0.0 if progress is None else self.cfg.weight * (1 - math.cos(math.pi * progress)) / 2

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        self._strength = self.strength(step)
        if self._strength:
            layers = [layer for layer in self.layers.values() if layer.weight.grad is not None]
            distances = [layer.weight - layer.quantized_weight() for layer in layers]
            torch._foreach_add_([layer.weight.grad for layer in layers], distances, alpha=2 * self._strength)

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """The dampening term of the loss, lambda_t included."""
        terms = [(layer.weight - layer.quantized_weight()).square().sum() for layer in self.layers.values()]
        return {"dampen_loss": getattr(self, "_strength", 0.0) * torch.stack(terms).sum()}
