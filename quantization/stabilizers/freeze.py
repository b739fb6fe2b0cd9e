"""Freeze (Nagel et al. 2022): weights that flip too often are fixed for good.

On the signed code index c of q2 (quantized value = sign * magnitudes[|c|] * S), after every optimizer step:

    osc   1 where c changed in the direction opposite to its last change, else 0
    f  <- m * osc + (1 - m) * f            flipping frequency
    e  <- m * c   + (1 - m) * e            running average, from the first c on
    f > f_th(t)   freezes the weight at round(e) on the grid times its S at that moment

f_th falls along half a cosine from `threshold_start` to `threshold_end`, from the share `start` of training on; before,
f and e are tracked and nothing is frozen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quantization.backends.reference import block_scales, magnitudes_of
from quantization.layers.linear import QuantLinear
from quantization.stabilizers.base import Plan, Stabilizer


class Freeze(Stabilizer):
    """Keeps, for each quantized weight: code, direction (int8), frequency, average, value (float32), frozen (bool)."""

    def __init__(self, cfg: Any, layers: dict[str, QuantLinear], plan: Plan) -> None:
        super().__init__(cfg, layers, plan)
        if cfg.threshold_start < cfg.threshold_end:
            raise ValueError(
                f"Freeze's threshold falls, so threshold_start ({cfg.threshold_start:g}) must be at least "
                f"threshold_end ({cfg.threshold_end:g})"
            )
        self.state = {name: self._fresh(layer) for name, layer in layers.items()}

    @torch.no_grad()
    def _codes(self, layer: QuantLinear) -> tuple[Tensor, Tensor]:
        """Signed code indices of Q(w) (int8) and the scale S of each element (float32)."""
        spec = layer.recipe.q2
        scales = block_scales(layer.weight, spec, layer.weight_amax)
        latent = torch.where(scales == 0, 0.0, layer.quantized_weight().float() / scales)
        magnitudes = magnitudes_of(spec.format, latent.device)
        # Of the midpoints, since a scale that is no power of two may have been rounded.
        index = torch.bucketize(latent.abs(), (magnitudes[1:] + magnitudes[:-1]) / 2)
        return torch.where(latent < 0, -index, index).to(torch.int8), scales

    def _fresh(self, layer: QuantLinear) -> dict[str, Tensor]:
        code, _ = self._codes(layer)
        zeros = torch.zeros_like(layer.weight, dtype=torch.float32)
        return {
            "code": code,
            "direction": torch.zeros_like(code),
            "frequency": zeros,
            "average": code.float(),
            "frozen": torch.zeros_like(code, dtype=torch.bool),
            "value": zeros.clone(),
        }

    def threshold(self, step: int) -> float:
        """f_th(t); infinite before it starts."""
        progress = self.ramp_up(step, self.cfg.start)
        if progress is None:
            return math.inf
        first, last = self.cfg.threshold_start, self.cfg.threshold_end
        return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        m, threshold = self.cfg.momentum, self.threshold(step)
        for name, layer in self.layers.items():
            s = self.state[name]
            layer.weight.copy_(torch.where(s["frozen"], s["value"], layer.weight))
            code, scales = self._codes(layer)
            change = torch.sign(code - s["code"])
            oscillates = (change * s["direction"]) < 0
            s["direction"] = torch.where(change != 0, change, s["direction"])
            s["code"] = code
            s["frequency"].mul_(1 - m).add_(oscillates, alpha=m)
            s["average"].mul_(1 - m).add_(code, alpha=m)
            freezes = (s["frequency"] > threshold) & ~s["frozen"]
            grid = magnitudes_of(layer.recipe.q2.format, scales.device)
            rest = s["average"].round()
            s["value"] = torch.where(freezes, torch.sign(rest) * grid[rest.abs().long()] * scales, s["value"])
            s["frozen"] |= freezes
            layer.weight.copy_(torch.where(s["frozen"], s["value"], layer.weight))

    def figures(self) -> dict[str, Tensor]:
        """The share of frozen weights."""
        frozen = torch.stack([s["frozen"].sum() for s in self.state.values()]).sum()
        return {"frozen_share": frozen / sum(s["frozen"].numel() for s in self.state.values())}

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(s) for name, s in self.state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, s in self.state.items():
            self.state[name] = {key: state[name][key].to(value.device) for key, value in s.items()}
