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

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantization.constants import constant
from quantization.formats import SCALE_MAX, SCALE_MIN, ElementFormat
from quantization.job import DENSE, FP8_MULTIPLE, PACKED, Carried, Dense, Job, Packed, Prepared
from quantization.noise import Noise, uniform
from quantization.spec import QuantizerSpec, Rounding, ScaleRule

_MANTISSA_BITS = 23
_EXPONENT_BIAS = 127


def scale_exponent(block_max: Tensor, fmt: ElementFormat, scale_rule: ScaleRule) -> Tensor:
    """The exponent s of a block's scale S = 2^s from its largest magnitude M (float32, finite): int32, M's shape.

    floor:            s = floor(log2 M) - emax                              (paper, equation 2)
    truncation_free:  s = the smallest integer with M <= max * 2^s          (paper, section 3.2)
    """
    bits = block_max.view(torch.int32)
    exponent = (bits >> _MANTISSA_BITS) - _EXPONENT_BIAS  # subnormals count as -127, which the clamp below settles
    s = exponent - fmt.emax
    if scale_rule == "truncation_free":
        mantissa = bits & ((1 << _MANTISSA_BITS) - 1)
        s = s + (mantissa > round((fmt.max_significand - 1) * (1 << _MANTISSA_BITS))).int()
    return s.clamp(SCALE_MIN, SCALE_MAX)


def power_of_two(n: Tensor) -> Tensor:
    """2^n in float32 for integers n in [-127, 127], exact: written as bits. 2^-127 is a subnormal number."""
    normal = (n + _EXPONENT_BIAS) << _MANTISSA_BITS
    return torch.where(n > -127, normal, 1 << (_MANTISSA_BITS - 1)).view(torch.float32)


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


def neighbours(magnitude: Tensor, fmt: ElementFormat) -> Neighbours:
    """The neighbours on the grid of magnitudes (float32) that do not exceed the largest one."""
    grid = magnitudes_of(fmt, magnitude.device)
    lower_code = torch.zeros_like(magnitude, dtype=torch.int32)
    for value in fmt.magnitudes[1:]:
        lower_code += magnitude >= value
    upper_code = (lower_code + 1).clamp(max=len(fmt.magnitudes) - 1)
    lower, upper = (grid.index_select(0, code.flatten()).view(code.shape) for code in (lower_code, upper_code))
    return Neighbours(lower_code, lower, upper)


def rounds_up(
    latent: Tensor, pair: Neighbours, rounding: Rounding, *, u: Tensor | None = None, shadow: Tensor | None = None
) -> Tensor:
    """Whether each latent value x / S (float32) takes the neighbour of larger magnitude: bool, its shape.

    Stochastic rounding adds `u`, draws in (0, 1), to the place between the neighbours. With `shadow`, the shadow
    weight divided by the same S, this is Algorithm 1 (Q-EMA): the shadow is rounded instead of the weight, but to one
    of the weight's two neighbours.
    """
    lower, upper = pair.lower, pair.upper
    target = latent.abs() if shadow is None else torch.where(torch.signbit(latent), -shadow, shadow)
    target = target.clamp(lower, upper)
    if rounding == "stochastic":
        gap = torch.where(upper > lower, upper - lower, 1.0)
        return (target - lower) / gap > 1 - u
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
    """A tensor cut into blocks along one axis, and what is needed to put it together again."""

    values: Tensor  # (..., number of blocks, block size), the last block padded with zeros
    length: int  # of the axis before padding


def to_blocks(x: Tensor, axis: int, block_size: int) -> Blocks:
    moved = x.movedim(axis, -1)
    length = moved.shape[-1]
    padded = F.pad(moved, (0, -length % block_size))
    return Blocks(padded.unflatten(-1, (-1, block_size)).to(torch.float32), length)


def from_blocks(blocks: Blocks, axis: int) -> Tensor:
    return blocks.values.flatten(-2)[..., : blocks.length].movedim(-1, axis).contiguous()


def block_exponents(values: Tensor, spec: QuantizerSpec) -> tuple[Tensor, Tensor]:
    """The exponent s of each block's scale (int32) and whether the block is finite, s being that of 1 where it is not.

    `values` (float32) has blocks in its last dimension, which the results keep with size 1.
    """
    block_max = values.abs().amax(dim=-1, keepdim=True)
    finite = torch.isfinite(block_max)
    return scale_exponent(torch.where(finite, block_max, 1.0), spec.format, spec.scale_rule), finite


def block_scales(x: Tensor, spec: QuantizerSpec) -> Tensor:
    """The scale S of each element's block, in float32 and x's shape. The values must be finite."""
    blocks = to_blocks(x.detach(), spec.axis, spec.block_size)
    s, _ = block_exponents(blocks.values, spec)
    return from_blocks(Blocks(power_of_two(s).expand_as(blocks.values), blocks.length), spec.axis)


def quantize(x: Tensor, spec: QuantizerSpec, noise: Noise | None = None, shadow: Tensor | None = None) -> Tensor:
    """Quantize a non-empty tensor in blocks along `spec.axis` and dequantize it, in its own dtype (equation 1)."""
    fmt, rounding, axis, block_size = spec.format, spec.rounding, spec.axis, spec.block_size
    blocks = to_blocks(x, axis, block_size)
    shadow_blocks = None if shadow is None else to_blocks(shadow, axis, block_size).values
    u = to_blocks(uniform(x.shape, noise), axis, block_size).values if spec.stochastic else None

    s, finite = block_exponents(blocks.values, spec)
    if shadow_blocks is not None:
        finite = finite & torch.isfinite(shadow_blocks).all(dim=-1, keepdim=True)
    to_latent = power_of_two(-s)

    latent = blocks.values * to_latent
    if spec.stochastic:
        latent = in_fixed_point(latent, fmt)
    pair = neighbours(latent.abs().clamp(max=fmt.max), fmt)  # the clamp saturates; only the floor rule needs it
    up = rounds_up(latent, pair, rounding, u=u, shadow=None if shadow_blocks is None else shadow_blocks * to_latent)
    values = (torch.copysign(torch.where(up, pair.upper, pair.lower), latent) * power_of_two(s)).to(x.dtype)
    values = values.masked_fill(~finite, torch.nan)  # after the cast: devices differ in the NaN they cast a NaN to
    return from_blocks(Blocks(values, blocks.length), axis)


# ---------------------------------------------------------------------------------------------------------------------
# Packed matrices: 4-bit codes and E8M0 scales
# ---------------------------------------------------------------------------------------------------------------------

SCALE_BIAS, NAN_SCALE = 127, 255


def scale_codes(x: Tensor, spec: QuantizerSpec, shadow: Tensor | None = None) -> Tensor:
    """The E8M0 codes s + 127 of a matrix's blocks, 255 where one is not finite: uint8, a row for each number a block
    has along `spec.axis`."""
    s, finite = block_exponents(to_blocks(x, spec.axis, spec.block_size).values, spec)
    if shadow is not None:
        shadow_blocks = to_blocks(shadow, spec.axis, spec.block_size).values
        finite = finite & torch.isfinite(shadow_blocks).all(dim=-1, keepdim=True)
    return torch.where(finite, s + SCALE_BIAS, NAN_SCALE).to(torch.uint8).squeeze(-1).t().contiguous()


def _scales_of_elements(scales: Tensor, spec: QuantizerSpec, shape: tuple[int, int]) -> Tensor:
    """E8M0 codes to float32 scales, one for each element."""
    values = torch.where(scales == NAN_SCALE, torch.nan, power_of_two(scales.int().clamp(max=254) - SCALE_BIAS))
    rows, columns = shape
    values = values.repeat_interleave(spec.block_size, dim=0)
    return values[:rows] if spec.axis == 0 else values[:columns].t()


def pack(values: Tensor, scales: Tensor, spec: QuantizerSpec) -> Tensor:
    """The codes of a quantized float32 or bfloat16 matrix (rows, columns) whose scales are `scales`.

    Returns uint8, (rows, half the columns). A code is the sign and the index of the magnitude in the format, 4 bits;
    of two columns the left is the low half.
    """
    beyond = 2.0**128  # the only magnitude that a finite float32 number is rounded to and that float32 does not hold
    values = torch.nan_to_num(values.double(), nan=0.0, posinf=beyond, neginf=-beyond)
    latent = torch.nan_to_num(values / _scales_of_elements(scales, spec, values.shape), nan=0.0).float()
    codes = neighbours(latent.abs(), spec.format).lower_code | (torch.signbit(latent).int() << 3)
    codes = F.pad(codes, (0, codes.shape[1] % 2)).to(torch.uint8)
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack(packed: Packed) -> Tensor:
    """The numbers that `pack` was given: (rows, columns) float64: a code times the largest scale may leave float32."""
    codes, scales, spec, columns = packed
    codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, :columns].int()
    magnitude = magnitudes_of(spec.format, codes.device)[codes & 7]
    latent = torch.where(codes & 8 > 0, -magnitude, magnitude)
    return latent.double() * _scales_of_elements(scales, spec, latent.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Operands
# ---------------------------------------------------------------------------------------------------------------------


def prepare(
    x: Tensor, job: Job, noise: Noise | None = None, shadow: Tensor | None = None, lost: Tensor | None = None
) -> Prepared:
    """Quantize a matrix as a job says; see operands/prepare.py. `shadow` is for the first quantizer there is."""
    x_float32 = x.float()  # what leaves float16's range in between is no matter of the results
    source, operands = x_float32, []
    shift = _shift_into_window(x, job) if job.carried else None
    for (spec, form), stream in zip(job.uses, (job.row_stream, job.column_stream), strict=True):
        if spec is None:
            operands.append(None)
            continue
        own = Noise(noise.state, noise.stream + stream) if spec.stochastic else None
        values = quantize(source, spec, own, shadow) if x.numel() else source.clone()
        if form == DENSE:
            operands.append(Dense(values.to(job.dtype)))
        else:
            scales = scale_codes(source, spec, shadow)
            packed = Packed(pack(values, scales, spec), scales, spec, x.shape[1])
            operands.append(packed if form == PACKED else _carry(packed, job, shift, lost))
        source, shadow = values if job.chained else x_float32, None
    return Prepared(*operands, x.sum(0, dtype=torch.float32) if job.sums else None)


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
    return unpack(packed).to(dtype)
