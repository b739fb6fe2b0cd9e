"""INT4 training of a linear layer, one scale a tensor (Xi, Li, Chen, Zhu: Training Transformers with 4-bit Integers, 2023).

The per-tensor baseline of Table 2: another algorithm than microscaling, so another layer. With X_ND activation, W_CD
stored weight, G_NC output gradient dL/dY and H the block-diagonal normalised Hadamard matrix (blocks of 32, H = H^T =
H^-1; D is padded with zeros to whole blocks):

    X' = X H, W' = W H                                        spreads outliers over a block; X' W'^T = X W^T
    q(v; s) = s clamp(round(v / s), -8, 7)                    LSQ: one learned step s a tensor, ties to even
    output       Y = q(X'; s_X) q(W'; s_W)^T + b
    split        G ~ (14 high + low) max|G| / 98              G0 = G 98 / max|G|
                 high = clamp(round(G0 / 14), -6, 6), low = stochastic round of G0 - 14 high
    sampling     rows of the stack (14 high; low), 2N of them, are kept with probability p_i and divided by it
    grad_input   dX' = [in range] G~ q(W'),   dX = dX' H      p_i ~ ||g_i||
    grad_weight  dW' = [in range] G~^T q(X'), dW = dW' H      p_i ~ ||g_i|| ||x_i||
    grad_step    ds = sum of dL/dq (q / s - [in range] v / s), over sqrt(7 numel)
    grad_bias    db = sum of G over N, not quantized

The low part of an element with |G0| > 91 reaches 14, since `high` stops at 6: a fifth bit, where clamping would bias
the largest gradients. The two rows of the stack that come from one row of G meet the same row of X and give the same
row of dX, so they are added before the product: G~ = 14 high m_high / p_high + low m_low / p_low, N rows.

Operands enter the products as integers, exact in the compute dtype (autocast's, else X's); steps and max|G| / 98 are
multiplied on afterwards in float32, in which everything else is computed too. Sampled rows of G~ are no integers: in
bfloat16 they are rounded as any operand is. Dropped rows are rows of zeros: shapes are static and nothing syncs.
NaN and Inf stay visible: one in X or W makes its quantized element NaN, one in G makes every gradient not finite.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from quantization.noise import Noise, NoiseClock, uniform

LEVEL_MIN, LEVEL_MAX = -8, 7
HADAMARD_BLOCK = 32
SPLIT_BASE, SPLIT_RANGE, HIGH_MAX = 14, 98, 6
MIN_STEP = 1e-8  # where training drives a learned step to zero or below, or a tensor is all zeros
FILLING_ROUNDS = 8  # of the search for the sampling probabilities
# Streams of noise of a layer; numbers 3 to 7 stay unused (linear.STREAMS_PER_LAYER; that module may import this one).
STREAMS_PER_LAYER = 8
LOW, ROWS_OF_GRAD_INPUT, ROWS_OF_GRAD_WEIGHT = 0, 1, 2


@dataclass(frozen=True)
class Int4Recipe:
    """The three switches of the INT4 layer. Raises ValueError where one is not a bool.

    Args:
        hadamard: quantize X H and W H instead of X and W.
        sampling: keep N of the 2N rows of the split gradient, by leverage score; off, all of them.
        learned_step: steps are parameters (LSQ); off, 2 mean|.| / sqrt(7) of the tensor at each forward pass.
    """

    hadamard: bool = True
    sampling: bool = True
    learned_step: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(getattr(self, field.name), bool):
                raise ValueError(f"{field.name} must be true or false; got {getattr(self, field.name)!r}")

    @property
    def active(self) -> tuple[str, ...]:
        """What is quantized, whatever the switches."""
        return ("activation", "weight", "gradient")

    def table(self) -> dict[str, str]:
        """Every field as text, for manifests."""
        return {"scheme": "int4"} | {field.name: str(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        return " ".join(["int4", *(field.name for field in fields(self) if getattr(self, field.name))])


@functools.cache  # a copy to a GPU waits for it: once, not at every call
def _signs(device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix: entry (i, j) is the parity of i & j as a sign."""
    rows = [[1 - 2 * ((i & j).bit_count() & 1) for j in range(HADAMARD_BLOCK)] for i in range(HADAMARD_BLOCK)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def hadamard(x: Tensor) -> Tensor:
    """x H in float32 for x of any rank >= 1: (..., D) -> (..., D padded with zeros to a multiple of 32)."""
    blocks = F.pad(x.to(torch.float32), (0, -x.shape[-1] % HADAMARD_BLOCK)).unflatten(-1, (-1, HADAMARD_BLOCK))
    with torch.autocast(x.device.type, enabled=False):
        return (blocks @ _signs(x.device)).flatten(-2) * HADAMARD_BLOCK**-0.5


def default_step(x: Tensor) -> Tensor:
    """LSQ's initial step 2 mean|x| / sqrt(7), float32 scalar (Esser et al. 2020)."""
    return x.abs().mean(dtype=torch.float32) * (2 / math.sqrt(LEVEL_MAX))


class Quantized(NamedTuple):
    """A tensor in units of its step, before and after rounding (float32, the tensor's shape; NaN where not finite)."""

    latent: Tensor
    levels: Tensor


def quantize(x: Tensor, step: Tensor) -> Quantized:
    latent = x / step
    levels = latent.round().clamp(LEVEL_MIN, LEVEL_MAX)
    return Quantized(latent, levels.masked_fill(~torch.isfinite(x), torch.nan))


def quantize_backward(grad: Tensor, q: Quantized) -> tuple[Tensor, Tensor]:
    """Gradients of the tensor and of its step (scalar) from that of the quantized tensor, straight through rounding."""
    inside = (q.latent > LEVEL_MIN) & (q.latent < LEVEL_MAX)
    slope = q.levels - torch.where(inside, q.latent, 0.0)
    # A product, where a selection would swallow a NaN.
    return grad * inside, (grad * slope).sum() / math.sqrt(LEVEL_MAX * max(grad.numel(), 1))


class Split(NamedTuple):
    """G ~ (14 high + low) unit: integer values (N x C, float32) and max|G| / 98 (float32 scalar)."""

    high: Tensor
    low: Tensor
    unit: Tensor


def split_gradient(G_NC: Tensor, noise: Noise) -> Split:
    """Split a non-empty gradient into two parts. Unbiased: the rest is rounded down or up at random."""
    G_NC = G_NC.to(torch.float32)
    largest = G_NC.abs().amax()
    largest = torch.where(largest == 0, 1.0, largest)
    G0 = G_NC / largest * SPLIT_RANGE  # 98 / max|G| could overflow
    high = (G0 / SPLIT_BASE).round().clamp(-HIGH_MAX, HIGH_MAX)
    low = torch.floor(G0 - SPLIT_BASE * high + uniform(G0.shape, noise))
    return Split(high, low, largest / SPLIT_RANGE)


def keep_probability(score: Tensor, expected: int) -> Tensor:
    """p = min(1, rate * score) with the rate at which p sums to `expected`: water-filling; float32, the score's shape.

    Each round counts the rows that are certain and gives what they leave to the others. The rate rises to its limit;
    where it has not reached it, fewer rows are kept, still without bias. p is rounded up to a multiple of 2^-16, which
    a draw of 16 bits hits exactly. A score of 0 has p = 0.
    """
    certain = torch.zeros_like(score, dtype=torch.bool)
    rate = torch.zeros_like(score[0])
    for _ in range(FILLING_ROUNDS):
        # fmax: 0 / 0, where no score is left to share, keeps the rate as it is.
        rate = torch.fmax(rate, (expected - certain.sum()) / score.masked_fill(certain, 0.0).sum())
        certain = score * rate >= 1
    p = torch.ceil((score * rate).clamp(max=1.0) * 2.0**16) * 2.0**-16
    return torch.where(score > 0, p, 0.0)


def sampled(parts: Split, x_norm: Tensor | float, noise: Noise | None) -> Tensor:
    """G~ in units of `unit` (N x C, float32), rows sampled by ||g_i|| x_norm_i; without `noise` all rows are kept."""
    if noise is None:
        return SPLIT_BASE * parts.high + parts.low
    norms = torch.stack([SPLIT_BASE * parts.high.norm(dim=1), parts.low.norm(dim=1)])
    score = (norms * x_norm).flatten()
    p = keep_probability(score, expected=len(parts.high))
    weight = torch.where(uniform(p.shape, noise) < p, 1 / p, 0.0).view(2, -1, 1)
    return weight[0] * SPLIT_BASE * parts.high + weight[1] * parts.low


class Int4LinearFunction(torch.autograd.Function):
    """Y = X W^T + b with the three products of this module's docstring. Steps are positive float32 scalars."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        step_x: Tensor,
        step_w: Tensor,
        recipe: Int4Recipe,
        noise_state: Tensor,
        stream: int,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.basis = hadamard if recipe.hadamard else torch.Tensor.float
        step_x_, step_w_ = step_x.float().clamp(min=MIN_STEP), step_w.float().clamp(min=MIN_STEP)
        X_ND = x.reshape(-1, x.shape[-1])
        q1, q2 = quantize(ctx.basis(X_ND), step_x_), quantize(ctx.basis(weight), step_w_)
        output = F.linear(q1.levels.to(dtype), q2.levels.to(dtype)).float() * (step_x_ * step_w_)
        if bias is not None:
            output = output + bias.float()

        ctx.save_for_backward(X_ND, weight, step_x_, step_w_, noise_state)
        ctx.sampling, ctx.stream, ctx.compute_dtype = recipe.sampling, stream, dtype
        ctx.x_shape, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype
        ctx.step_dtypes = step_x.dtype, step_w.dtype
        return output.to(dtype).reshape(*x.shape[:-1], output.shape[-1])
