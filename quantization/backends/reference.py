"""The reference quantizer: plain torch, one step a line, to be checked by hand against SPEC and the paper.

Details that are easy to simplify wrongly:
- the scale comes from the exponent and mantissa bits of the block's maximum; a floating-point log2 is off next to
  powers of two, in bfloat16 for several percent of blocks;
- everything between input and output is float32, where scaling by a power of two and the distances to both neighbours
  on the grid are exact, so each rounding decision is;
- a NaN or Inf anywhere makes its block NaN; nothing non-finite is swallowed;
- the sign of zero survives: a small negative number rounds to -0.0;
- stochastic rounding sees numbers below the format's smallest normal one in fixed point, as kernels and hardware do.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantization.backends.scales import (
    NAN_SCALE,
    SCALE_BIAS,
    Scales,
    amax_of,
    binade,
    held_amax,
    inverse,
    power_of_two,
    scale_exponent,
    scale_numbers,
    scales_of,
    significand,
)
from quantization.constants import constant
from quantization.formats import ElementFormat
from quantization.job import DENSE, FP8_MULTIPLE, PACKED, SCALED, Carried, Dense, Job, Packed, Prepared, Scaled
from quantization.noise import Noise, uniform
from quantization.rotation import Turn, rotate, rotate_back
from quantization.spec import QuantizerSpec
from quantization.words import Rounding

_BLOCKS = 2**31  # the draws of scales are those of rows from this one on: no matrix has so many


class Neighbours(NamedTuple):
    """The grid values around a magnitude, lower <= magnitude <= upper (float32), and the code of the lower one (int32).

    On the grid, lower is the value itself and upper the next larger one; at the largest both are the largest.
    """

    lower_code: Tensor
    lower: Tensor
    upper: Tensor


def magnitudes_of(fmt: ElementFormat, device: torch.device) -> Tensor:
    """The magnitudes of a format by their codes, float32."""
    return constant(fmt.magnitudes, device)


def neighbours(magnitude: Tensor, fmt: ElementFormat, unit: Tensor | None = None) -> Neighbours:
    """The neighbours on the grid of magnitudes (float32) that do not exceed the largest one.

    unit: what the grid is multiplied by, exactly: the scales of blocks (1 in the last dimension); None for 1.
    """
    grid = magnitudes_of(fmt, magnitude.device)
    lower_code = torch.zeros_like(magnitude, dtype=torch.int32)
    for value in fmt.magnitudes[1:]:
        lower_code += magnitude >= (value if unit is None else value * unit)
    upper_code = (lower_code + 1).clamp(max=len(fmt.magnitudes) - 1)
    lower, upper = (grid.index_select(0, code.flatten()).view(code.shape) for code in (lower_code, upper_code))
    return Neighbours(lower_code, lower, upper) if unit is None else Neighbours(lower_code, lower * unit, upper * unit)


def rounds_up(
    latent: Tensor, pair: Neighbours, rounding: Rounding, *, u: Tensor | None = None, shadow: Tensor | None = None
) -> Tensor:
    """Whether each latent value x / S (float32) takes the neighbour of larger magnitude: bool, its shape.

    Or each x, between neighbours that are multiplied by S. Stochastic rounding adds `u`, draws in (0, 1), to the place
    between the neighbours: up where target - lower > (1 - u) gap, both of which are exact. With `shadow`, the shadow
    weight divided by the same S, this is Algorithm 1 (Q-EMA): the shadow is rounded instead of the weight, but to one
    of the weight's two neighbours.
    """
    lower, upper = pair.lower, pair.upper
    target = latent.abs() if shadow is None else torch.where(torch.signbit(latent), -shadow, shadow)
    target = target.clamp(lower, upper)
    if rounding == "stochastic":
        return target - lower > (1 - u) * (upper - lower)
    midpoint = (lower + upper) / 2
    if rounding == "nearest_away":
        return target >= midpoint
    tie_goes_up = ~torch.signbit(latent) if rounding == "nearest_up" else (pair.lower_code & 1).bool()
    return torch.where(tie_goes_up, target >= midpoint, target > midpoint)


def in_fixed_point(latent: Tensor, fmt: ElementFormat) -> Tensor:
    """Latent values (float32), those below the format's smallest normal number N rounded to multiples of 2^-23 N."""
    normal = fmt.smallest_normal
    magnitude = latent.abs()
    magnitude = torch.where(magnitude < normal, (magnitude + normal) - normal, magnitude)
    return torch.copysign(magnitude, latent)


class Blocks(NamedTuple):
    """A tensor cut into blocks, and what is needed to put it together again."""

    values: Tensor  # (..., number of blocks, elements of a block), blocks at the end padded with zeros
    shape: torch.Size  # of the tensor, the axis of blocks moved to the end


def to_blocks(x: Tensor, spec: QuantizerSpec) -> Blocks:
    """In float32. Square blocks are cut from matrices alone."""
    moved, size, rows = x.movedim(spec.axis, -1), spec.block_size, spec.block_rows
    across = (0, -moved.shape[-2] % rows) if rows > 1 else ()
    padded = F.pad(moved, (0, -moved.shape[-1] % size, *across))
    values = padded.unflatten(-1, (-1, size))
    if rows > 1:
        values = values.unflatten(-3, (-1, rows)).movedim(-3, -2).flatten(-2)
    return Blocks(values.to(torch.float32), moved.shape)


def from_blocks(blocks: Blocks, spec: QuantizerSpec) -> Tensor:
    """Undo `to_blocks`, of values of any dtype."""
    values, shape = blocks
    if spec.block_rows > 1:
        values = values.unflatten(-1, (spec.block_rows, spec.block_size)).movedim(-2, -3).flatten(-4, -3)
        values = values[..., : shape[-2], :, :]
    return values.flatten(-2)[..., : shape[-1]].movedim(-1, spec.axis).contiguous()


def block_exponents(values: Tensor, spec: QuantizerSpec) -> tuple[Tensor, Tensor]:
    """The exponent s of each block's scale (int32) and whether the block is finite, s being that of 1 where it is not.

    `values` (float32) has blocks in its last dimension, which the results keep with size 1. For powers of two by a rule
    of the largest magnitude.
    """
    block_max = values.abs().amax(dim=-1, keepdim=True)
    finite = torch.isfinite(block_max)
    return scale_exponent(torch.where(finite, block_max, 1.0), spec.format, spec.scale_rule), finite


def block_scales(x: Tensor, spec: QuantizerSpec, amax: Tensor | None = None) -> Tensor:
    """The scale S of each element's block, its factors included, in float32 and x's shape. The values must be finite.

    Where a block is all zeros by underflow of its scale S is 0. Raises ValueError for a stochastic scale.
    """
    if spec.scale_rounding == "stochastic":
        raise ValueError("a block has no one scale where scales are rounded stochastically")
    x = x.detach()
    blocks = to_blocks(x, spec)
    scales = scales_in(x, blocks, spec, amax)
    scale = _times(scales.scale, factor_of(spec, scales.outer, x.device))
    return from_blocks(Blocks(scale.expand_as(blocks.values), blocks.shape), spec)


def scales_in(
    x: Tensor, blocks: Blocks, spec: QuantizerSpec, amax: Tensor | None = None, noise: Noise | None = None
) -> Scales:
    """The scales of x, whose blocks are `blocks`. noise: the quantizer's stream, for scales rounded stochastically."""
    u = None
    if spec.scale_rounding == "stochastic":
        count = blocks.values.shape[:-1].numel()
        u = uniform((count, 1), noise, _BLOCKS).view(*blocks.values.shape[:-1], 1)
    return scales_of(blocks.values, spec, amax_of(x, spec) if amax is None else amax, u)


def block_latents(x: Tensor, spec: QuantizerSpec, amax: Tensor | None = None, noise: Noise | None = None) -> Tensor:
    """x over the scale of each element's block: float32, x's shape; NaN in blocks that are not finite.

    noise: the quantizer's stream, for scales rounded stochastically.
    """
    blocks = to_blocks(x, spec)
    scales = scales_in(x, blocks, spec, amax, noise)
    if _in_units_of_scale(spec):
        latent = torch.where(scales.scale == 0, 0.0, blocks.values / scales.scale)
    else:
        latent = _latent(blocks.values, spec, scales)
    return from_blocks(Blocks(latent.masked_fill(~scales.finite, torch.nan), blocks.shape), spec)


def factor_of(spec: QuantizerSpec, outer: Tensor | None, device: torch.device) -> Tensor | None:
    """What results are to be multiplied by beside S (float32 scalar); None for 1. outer: an fp32 outer scale."""
    own = None if spec.factor == 1 else constant((spec.factor,), device).squeeze(0)
    return own if outer is None else _times(outer, own)


def _times(values: Tensor, factor: Tensor | None) -> Tensor:
    return values if factor is None else values * factor


class Quantized(NamedTuple):
    """A quantized tensor: `values` (float32, x's shape, exact but for fp32 scales) times `factor` (None for 1).

    finite: whether the element's block is (bool). inside: where asked for, whether the element was not beyond the
    largest magnitude, or its block is not finite.
    """

    values: Tensor
    finite: Tensor
    factor: Tensor | None
    inside: Tensor | None = None


def quantized(
    x: Tensor,
    spec: QuantizerSpec,
    noise: Noise | None = None,
    shadow: Tensor | None = None,
    amax: Tensor | None = None,
    *,
    inside: bool = False,
) -> Quantized:
    """Quantize a non-empty tensor in blocks along `spec.axis` (equation 1).

    amax: A of the outer scale; None for that of x.
    """
    fmt = spec.format
    blocks = to_blocks(x, spec)
    shadow_blocks = None if shadow is None else to_blocks(shadow, spec).values
    u = to_blocks(uniform(x.shape, noise), spec).values if spec.stochastic else None
    scales = scales_in(x, blocks, spec, amax, noise)
    finite = scales.finite
    if shadow_blocks is not None:
        finite = finite & torch.isfinite(shadow_blocks).all(dim=-1, keepdim=True)

    latent, shadow_latent = (_latent(values, spec, scales) for values in (blocks.values, shadow_blocks))
    unit = significand(scales.scale) if _in_units_of_scale(spec) else None
    if spec.stochastic and spec.power_of_two:
        latent = in_fixed_point(latent, fmt)
    # The clamp saturates; a truncation-free scale does not need it.
    largest = fmt.max if unit is None else fmt.max * unit
    pair = neighbours(latent.abs().clamp(max=largest), fmt, unit)
    up = rounds_up(latent, pair, spec.rounding, u=u, shadow=shadow_latent)
    values = torch.copysign(torch.where(up, pair.upper, pair.lower), latent)
    values = values * (scales.scale if unit is None else binade(scales.scale))
    values = torch.where(scales.scale == 0, torch.copysign(torch.zeros_like(latent), latent), values)
    within = from_blocks(Blocks((latent.abs() < largest) | ~finite, blocks.shape), spec) if inside else None
    return Quantized(
        from_blocks(Blocks(values, blocks.shape), spec),
        from_blocks(Blocks(finite.expand_as(values), blocks.shape), spec),
        factor_of(spec, scales.outer, x.device),
        within,
    )


def _in_units_of_scale(spec: QuantizerSpec) -> bool:
    """Whether numbers are rounded among multiples of S, which are exact, and not divided by S.

    Both over the power of two in S, so that no multiple leaves float32.
    """
    return not spec.power_of_two and spec.arithmetic == "exact" and spec.scale.fraction is not None


def _latent(values: Tensor | None, spec: QuantizerSpec, scales: Scales) -> Tensor | None:
    """What is rounded: x / S, or x over the power of two in S."""
    if values is None:
        return None
    if _in_units_of_scale(spec):
        return values * inverse(binade(scales.scale))
    if spec.power_of_two:
        latent = values * inverse(scales.scale)
        return latent * 0.75 if spec.scale_rule == "three_quarter" else latent
    if spec.arithmetic == "te":
        return values * scales.divisor
    divisor = scales.scale if scales.divisor is None else scales.divisor
    return values / torch.where(divisor == 0, 1.0, divisor)


def quantize(
    x: Tensor,
    spec: QuantizerSpec,
    noise: Noise | None = None,
    shadow: Tensor | None = None,
    amax: Tensor | None = None,
) -> Tensor:
    """Quantize a non-empty tensor and dequantize it, in its own dtype (equation 1)."""
    result = quantized(x, spec, noise, shadow, amax)
    values = _times(result.values, result.factor).to(x.dtype)
    return values.masked_fill(~result.finite, torch.nan)  # after the cast: devices differ in the NaN they cast a NaN to


# ---------------------------------------------------------------------------------------------------------------------
# Packed matrices: 4-bit codes, and scales as codes of their format
# ---------------------------------------------------------------------------------------------------------------------


def scale_codes(x: Tensor, spec: QuantizerSpec, shadow: Tensor | None = None) -> Tensor:
    """The E8M0 codes s + 127 of a matrix's blocks, 255 where one is not finite: uint8, a row for each number a block
    has along `spec.axis`."""
    s, finite = block_exponents(to_blocks(x, spec).values, spec)
    if shadow is not None:
        shadow_blocks = to_blocks(shadow, spec).values
        finite = finite & torch.isfinite(shadow_blocks).all(dim=-1, keepdim=True)
    return torch.where(finite, s + SCALE_BIAS, NAN_SCALE).to(torch.uint8).squeeze(-1).t().contiguous()


def _scales_of_elements(scales: Tensor, spec: QuantizerSpec, shape: tuple[int, int]) -> Tensor:
    """Codes of scales to float32 scales, one for each element."""
    along, across = shape if spec.axis == 0 else shape[::-1]
    values = scale_numbers(scales, spec.scale).repeat_interleave(spec.block_size, dim=0)[:along]
    if spec.block_rows > 1:
        values = values.repeat_interleave(spec.block_rows, dim=1)[:, :across]
    return values if spec.axis == 0 else values.t()


def pack(values: Tensor, scales: Tensor, spec: QuantizerSpec) -> Tensor:
    """The codes of a quantized float32 or bfloat16 matrix (rows, columns) whose scales are `scales`.

    Returns uint8, (rows, half the columns). A code is the sign and the index of the magnitude in the format, 4 bits;
    of two columns the left is the low half.
    """
    beyond = 2.0**128  # the only magnitude that a finite float32 number is rounded to and that float32 does not hold
    values = torch.nan_to_num(values.double(), nan=0.0, posinf=beyond, neginf=-beyond)
    latent = torch.nan_to_num(values / _scales_of_elements(scales, spec, values.shape), nan=0.0).float()
    grid = magnitudes_of(spec.format, values.device)
    # By the midpoints: a number times an fp32 scale has been rounded. Where a scale is 0, latent has no sign.
    codes = torch.bucketize(latent.abs(), (grid[1:] + grid[:-1]) / 2) | (torch.signbit(values).int() << 3)
    codes = F.pad(codes, (0, codes.shape[1] % 2)).to(torch.uint8)
    return codes[:, ::2] | (codes[:, 1::2] << 4)


@functools.cache
def _pairs(fmt: ElementFormat) -> tuple[tuple[float, float], ...]:
    """The two numbers of each byte of codes."""
    padded = (*fmt.magnitudes, *[0.0] * (8 - len(fmt.magnitudes)))
    numbers = [*padded, *(-number for number in padded)]
    return tuple((numbers[byte & 15], numbers[byte >> 4]) for byte in range(256))


def _latents_and_scales(packed: Packed) -> tuple[Tensor, Tensor]:
    """The numbers of codes, and the scale of each: (rows, columns) float32."""
    codes, scales, spec, columns = packed
    pairs = constant(_pairs(spec.format), codes.device).index_select(0, codes.flatten().int())
    latents = pairs.view(codes.shape[0], -1)[:, :columns]
    return latents, _scales_of_elements(scales, spec, latents.shape)


def unpack(packed: Packed) -> Tensor:
    """The numbers that `pack` was given: (rows, columns) float64: a code times the largest scale may leave float32."""
    latents, scales = _latents_and_scales(packed)
    return (latents * scales).double() if packed.spec.scale.fraction is None else latents.double() * scales


# ---------------------------------------------------------------------------------------------------------------------
# Operands
# ---------------------------------------------------------------------------------------------------------------------


def prepare(
    x: Tensor,
    job: Job,
    noise: Noise | None = None,
    shadow: Tensor | None = None,
    lost: Tensor | None = None,
    held: Tensor | None = None,
) -> Prepared:
    """Quantize a matrix as a job says; see operands/prepare.py. `shadow` is for the first quantizer there is."""
    x_float32 = x.float()  # what leaves float16's range in between is no matter of the results
    source, operands, inside = x_float32, [], None
    shift = _shift_into_window(x, job) if job.carried else None
    sides = zip(job.uses, (job.row_stream, job.column_stream), (job.row_turn, job.column_turn), (-1, 0), strict=True)
    for place, ((spec, form), stream, turn, axis) in enumerate(sides):
        turned = source if turn is None else rotate(source, axis, turn, noise)
        if shadow is not None and turn is not None:
            shadow = rotate(shadow, axis, turn, noise)
        if spec is None:
            operands.append(Dense(turned.to(job.dtype)) if form == DENSE else None)
            source = turned if job.chained else x_float32
            continue
        own = Noise(noise.state, noise.stream + stream) if spec.draws else None
        if x.numel():
            amax = held_amax(turned, spec, noise, None if held is None else held[place])
            result = quantized(turned, spec, own, shadow, amax, inside=job.mask and place == 0)
            values = result.values.masked_fill(~result.finite, torch.nan)
        else:
            result, values = Quantized(turned, turned, None, turned.bool()), turned.clone()
        inside = result.inside if place == 0 else inside
        factor = result.factor
        if form == SCALED:
            one = torch.ones((), device=x.device)
            own = one if factor is None else factor.expand(()).clone()
            operands.append(Scaled(values.to(job.dtype), own, spec.known_factor))
        elif form == DENSE:
            operands.append(Dense(_times(values, factor).to(job.dtype)))
        else:
            scales = scale_codes(turned, spec, shadow)
            packed = Packed(pack(values, scales, spec), scales, spec, x.shape[1])
            operands.append(packed if form == PACKED else _carry(packed, job, shift, lost))
        source, shadow = _times(values, factor) if job.chained else x_float32, None
    return Prepared(*operands, x.sum(0, dtype=torch.float32) if job.sums else None, inside if job.mask else None)


def _shift_into_window(x: Tensor, job: Job) -> Tensor:
    """The exponent that brings what is carried of x into fp8's window: int32 scalar."""
    spec = job.row or job.column
    largest = torch.where(torch.isfinite(x), x, 0.0).abs().amax().float()
    return (job.window[0] - scale_exponent(largest, spec.format, spec.scale_rule)).clamp(max=127)


def _carry(packed: Packed, job: Job, shift: Tensor, lost: Tensor | None) -> Carried:
    """A packed matrix as fp8 numbers times 2^-shift; counts the blocks below the window."""
    _, scales, spec, _ = packed
    # Blocks of zeros, which have the smallest scale, do not count, nor the few others that have it.
    below = (scales > 0) & (scales.int() - SCALE_BIAS + shift < job.window[1])
    if lost is not None:
        lost.add_(below.sum())
    values = (unpack(packed) * power_of_two(shift)).float().to(job.fp8)
    values = values if spec.axis == -1 else values.t()
    padded = F.pad(values.float(), (0, -values.shape[1] % FP8_MULTIPLE)).to(job.fp8)
    return Carried(padded.contiguous(), power_of_two(-shift))


def expand(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The numbers of a packed matrix in `dtype`, (rows, columns)."""
    latents, scales = _latents_and_scales(packed)
    return (latents * scales).to(dtype)


def turn_back(x: Tensor, turn: Turn, noise: Noise) -> Tensor:
    """x T^T along the last axis of a matrix: its dtype."""
    return rotate_back(x, turn, noise).to(x.dtype)
