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

from quantization.backends.reference import block_latents, quantized, scales_in, to_blocks
from quantization.backends.scales import held_amax
from quantization.job import Job
from quantization.layers.linear import QuantLinear
from quantization.noise import Noise
from quantization.rotation import rotate
from quantization.spec import QuantizerSpec
from quantization.words import QUANTIZERS

STATISTICS = ("mse", "gain", "underflow", "saturated")
PLACES = {"X": ("q1", "q6"), "W": ("q2", "q4"), "G": ("q3", "q5")}  # of the row and the column quantizer


def statistics_of(x: Tensor, q: Tensor, spec: QuantizerSpec, amax: Tensor | None, noise: Noise | None) -> Tensor:
    """STATISTICS of a matrix and what its quantizer made of it (float32): (4,) float64.

    amax: of its outer scale. noise: its stream, for scales that are drawn.
    """
    a, b = x.double(), q.double()
    blocks = to_blocks(x, spec)
    some = blocks.values.abs().amax(-1, keepdim=True) > 0
    zero = (scales_in(x, blocks, spec, amax, noise).scale == 0) & some
    beyond = block_latents(x, spec, amax, noise).abs() > spec.format.max
    square = a.square().sum()
    return torch.stack(
        [
            (b - a).square().sum() / square,
            (a * b).sum() / square,
            zero.sum() / some.sum(),
            beyond.double().mean(),
        ]
    )


class Observer:
    """Takes down the statistics of the quantizers of one layer."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, role: str, x: Tensor, job: Job, noise: Noise, shadow: Tensor | None, held: Tensor | None
    ) -> None:
        """As reference.prepare, but `held` stays as it is, which the layer's own call is to read."""
        source = x_float32 = x.detach().float()
        sides = ((job.row, job.row_stream, job.row_turn), (job.column, job.column_stream, job.column_turn))
        for place, (name, axis, (spec, stream, turn)) in enumerate(zip(PLACES[role], (-1, 0), sides, strict=True)):
            turned = source if turn is None else rotate(source, axis, turn, noise)
            if shadow is not None and turn is not None:
                shadow = rotate(shadow, axis, turn, noise)
            values = turned
            if spec is not None and x.numel():
                own = Noise(noise.state, noise.stream + stream) if spec.draws else None
                amax = held_amax(turned, spec, noise, None if held is None else held[place].clone())
                result = quantized(turned, spec, own, shadow, amax)
                values = result.values if result.factor is None else result.values * result.factor
                self.found[name] = statistics_of(turned, values, spec, amax, own)
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
