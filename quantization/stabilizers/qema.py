"""Q-EMA (section 5 of the paper): the moving average of a weight decides which of its two neighbours it rounds to.

    shadow <- decay * shadow + (1 - decay) * w        after every optimizer step (equation 10)

The rounding itself, Algorithm 1, is `rounds_up` in quantization/backends/reference.py; a layer hands its shadow to q2.
"""

from __future__ import annotations

from typing import Any

import torch

from quantization.layers.linear import QuantLinear
from quantization.stabilizers.base import Plan, Stabilizer


class QEma(Stabilizer):
    """Shadows are float32 buffers of the layers: saved with the model, moved with it, used in evaluation too."""

    def __init__(self, cfg: Any, layers: dict[str, QuantLinear], plan: Plan) -> None:
        super().__init__(cfg, layers, plan)
        for layer in layers.values():
            layer.shadow = layer.weight.detach().float().clone()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        shadows = [layer.shadow for layer in self.layers.values()]
        torch._foreach_mul_(shadows, self.cfg.decay)
        torch._foreach_add_(shadows, [layer.weight for layer in self.layers.values()], alpha=1 - self.cfg.decay)
