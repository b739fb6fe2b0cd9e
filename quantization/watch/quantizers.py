"""What each quantizer of a model does to what it reads: its error, its gain, and where its scales do not reach.

| statistic | of a quantizer and what it reads, x |
|---|---|
| mse | mean of (Q(x) - x)^2 over that of x^2 |
| gain | <x, Q(x)> / <x, x>; 1 where it neither shrinks nor stretches |
| underflow | share of blocks that are not zeros and whose scale is |
| saturated | share of numbers beyond the largest magnitude times the scale |

They are of one forward and one backward pass on the probe's images. The loss is the mean of minus the logarithms of all
classes' probabilities, so that gradients have the size of a training step's, though not its direction. The pass is made
in eval mode, its gradients go nowhere, and the reference computes the statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from quantization.backends.reference import amax_of, block_latents, quantized, to_blocks
from quantization.backends.scales import scales_of
from quantization.job import Job
from quantization.layers.linear import QuantLinear
from quantization.noise import Noise
from quantization.rotation import rotate
from quantization.spec import QuantizerSpec
from quantization.words import QUANTIZERS

STATISTICS = ("mse", "gain", "underflow", "saturated")
PLACES = {"X": ("q1", "q6"), "W": ("q2", "q4"), "G": ("q3", "q5")}  # of the row and the column quantizer


def statistics_of(x: Tensor, q: Tensor, spec: QuantizerSpec, amax: Tensor | None) -> Tensor:
    """STATISTICS of a matrix and what its quantizer made of it (float32): (4,) float64. amax: of its outer scale."""
    a, b = x.double(), q.double()
    blocks = to_blocks(x, spec).values
    u = None
    if spec.scale_rounding == "stochastic":  # the scale that is nearest, then
        u = torch.full_like(blocks[..., :1], 0.5)
    held = blocks.abs().amax(-1, keepdim=True) > 0
    zero = (scales_of(blocks, spec, amax, u).scale == 0) & held
    beyond = block_latents(x, spec, amax).abs() > spec.format.max if u is None else torch.zeros_like(x)
    square = a.square().sum()
    return torch.stack(
        [
            (b - a).square().sum() / square,
            (a * b).sum() / square,
            zero.sum() / held.sum(),
            beyond.double().mean(),
        ]
    )


class Observer:
    """Takes down the statistics of the quantizers of one layer."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, role: str, x: Tensor, job: Job, noise: Noise, shadow: Tensor | None) -> None:
        """As reference.prepare, but for a delayed outer scale, in whose place the present one stands."""
        source = x_float32 = x.detach().float()
        sides = ((job.row, job.row_stream, job.row_turn), (job.column, job.column_stream, job.column_turn))
        for name, axis, (spec, stream, turn) in zip(PLACES[role], (-1, 0), sides, strict=True):
            turned = source if turn is None else rotate(source, axis, turn, noise)
            if shadow is not None and turn is not None:
                shadow = rotate(shadow, axis, turn, noise)
            values = turned
            if spec is not None and x.numel():
                own = Noise(noise.state, noise.stream + stream) if spec.draws else None
                result = quantized(turned, spec, own, shadow)
                values = result.values if result.factor is None else result.values * result.factor
                self.found[name] = statistics_of(turned, values, spec, amax_of(turned, spec))
            source, shadow = values if job.chained else x_float32, None


def quantizer_statistics(model: nn.Module, layers: Sequence[nn.Module], images: Tensor) -> dict[str, np.ndarray]:
    """Arrays of (layers, 6), NaN where a quantizer is off or is not asked: {"quantizer_mse": ..., ...}.

    `model` should be in eval mode, and under the autocast of a training step.
    """
    observers = {id(layer): Observer() for layer in layers if isinstance(layer, QuantLinear)}
    weights = []
    try:
        for layer in layers:
            if id(layer) in observers:
                layer.observer = observers[id(layer)]
                weights.append(layer.weight)
        with torch.enable_grad():
            outputs = model(images)
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs
            loss = -outputs.float().log_softmax(-1).mean()
            torch.autograd.grad(loss, weights, allow_unused=True)
    finally:
        for layer in layers:
            if id(layer) in observers:
                layer.observer = None
    table = np.full((len(STATISTICS), len(layers), len(QUANTIZERS)), np.nan)
    for row, layer in enumerate(layers):
        for name, values in observers[id(layer)].found.items() if id(layer) in observers else ():
            table[:, row, QUANTIZERS.index(name)] = values.cpu().numpy()
    return {f"quantizer_{name}": table[place] for place, name in enumerate(STATISTICS)}
