"""Methods against weight oscillation behind one small protocol; exactly one is active in a run.

| kind | what it does | source |
|---|---|---|
| none | nothing | |
| qema | the moving average of a weight decides its rounding | section 5, Algorithm 1 |
| qramping | oscillating weights are updated less often, with more gradient | section 6, Algorithm 2 |
| dampen | a loss that pulls weights to their quantized values | Nagel et al. 2022 |
| freeze | weights that flip too often are fixed for good | Nagel et al. 2022 |
"""

from __future__ import annotations

from typing import Any

from torch import nn

from quantization.layers.linear import QuantLinear
from quantization.stabilizers.base import Plan, Stabilizer, Trainer
from quantization.stabilizers.dampen import Dampen
from quantization.stabilizers.freeze import Freeze
from quantization.stabilizers.qema import QEma
from quantization.stabilizers.qramping import QRamping, QRampingAdamW

STABILIZERS: dict[str, type[Stabilizer]] = {
    "none": Stabilizer,
    "qema": QEma,
    "qramping": QRamping,
    "dampen": Dampen,
    "freeze": Freeze,
}


def build_stabilizer(cfg: Any, model: nn.Module, plan: Plan) -> Stabilizer:
    """The stabilizer of the `stabilizer` section of a configuration, for the quantized linears of `model`.

    Call it once the weights that the training starts from are in place.
    Raises ValueError where the model has no weights with one quantized value each.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    if cfg.kind != "none":
        if not layers:
            raise ValueError(f"stabilizer {cfg.kind} works on weights in MXFP4, and the model has none")
        for layer in layers.values():
            if layer.recipe.q2 is None or layer.recipe.q2.stochastic:
                raise ValueError(f"stabilizer {cfg.kind} needs q2 on, with a nearest rounding")
            if not layer.has_quantized_weight:
                raise ValueError(f"stabilizer {cfg.kind} needs a weight whose scale and rotation are not drawn anew")
            if cfg.kind == "freeze" and layer.weight_turn is not None:
                raise ValueError("stabilizer freeze fixes single weights, and rotated ones are quantized together")
    return STABILIZERS[cfg.kind](cfg, layers, plan)


__all__ = ["STABILIZERS", "Plan", "QRampingAdamW", "Stabilizer", "Trainer", "build_stabilizer"]
