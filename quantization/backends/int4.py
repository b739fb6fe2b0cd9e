"""What INT4 does number by number, in plain torch; gpu/int4.py has it as kernels, to the same bits.

The method is in layers/int4.py. A backend of it is a module with these functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantization.constants import constant
from quantization.noise import Noise, uniform

FILLING_ROUNDS = 8
SMALLEST_P = 2.0**-16  # above 0: probabilities are multiples of what 16 bits can tell


def levels(v: Tensor, smallest: int, largest: int, dtype: torch.dtype) -> Tensor:
    """The nearest integers from `smallest` to `largest`, ties to even, in `dtype`; NaN where v is not finite."""
    return v.round().clamp(smallest, largest).masked_fill(~torch.isfinite(v), torch.nan).to(dtype)


def straight_through(product: Tensor, scale: Tensor, v: Tensor, smallest: int, largest: int) -> tuple[Tensor, Tensor]:
    """With the gradient g = product scale of levels(v) (float32): g where v lies between the ends, else 0; and g times
    the slope of level s by the step s, which is level - v there and the level elsewhere."""
    gradient = product.to(torch.float32) * scale
    inside = (v > smallest) & (v < largest)
    slope = levels(v, smallest, largest, torch.float32) - torch.where(inside, v, 0.0)
    return gradient * inside, gradient * slope  # a product with the mask, where a selection would swallow a NaN


def keep_probability(score: Tensor, expected: int) -> Tensor:
    """p = min(1, rate * score) with the rate at which p sums to `expected`: water-filling; float32, the score's shape.

    Each round finds the rows that are certain and shares what they leave among the others. The rate rises to its limit;
    short of it, fewer rows are kept, still without bias. p is rounded up to a multiple of SMALLEST_P, which a draw
    meets exactly. A score of 0 has p = 0; a NaN makes every p NaN.
    """
    certain, rate = torch.zeros_like(score, dtype=torch.bool), torch.zeros_like(score[0])
    for _ in range(FILLING_ROUNDS):
        rest = score.masked_fill(certain, 0.0).sum()
        # Where nothing is left to share, or by rounding errors less than nothing, the rate stays.
        rate = torch.where(rest == 0, rate, torch.maximum(rate, (expected - certain.sum()) / rest))
        certain = score * rate >= 1
    return torch.ceil((score * rate).clamp(max=1.0) / SMALLEST_P) * SMALLEST_P


def row_weights(score: Tensor, expected: int, noise: Noise) -> Tensor:
    """(2 x N): 1 / p where a row is kept, which it is with probability p ~ its score (2 x N, float32), else 0."""
    p = keep_probability(score.flatten(), expected)
    return ((uniform(p.shape, noise) < p) / p.clamp(min=SMALLEST_P)).view(score.shape)


def weighted_rows(high: Tensor, low: Tensor, weights: Tensor, base: int, dtype: torch.dtype) -> Tensor:
    """base high + low (N x C), a row of either times its weight (2 x N): in `dtype`, rounded to it once."""
    of_high, of_low = weights.unsqueeze(-1)
    return (base * high * of_high + low * of_low).to(dtype)


def split(x: Tensor, unit: Tensor, base: int, high_max: int, noise: Noise) -> tuple[Tensor, Tensor]:
    """(high, low) with x / unit ~ base high + low: integers in float32, high the nearest one up to high_max, ties to
    even, and low what is left, rounded at random. x: a matrix; unit: float32 scalar."""
    latent = x.to(torch.float32) / unit
    # A GPU takes a tensor over a number for a product with the reciprocal.
    high = (latent / constant((base,), x.device)).round().clamp(-high_max, high_max)
    return high, torch.floor(latent - base * high + uniform(latent.shape, noise))
