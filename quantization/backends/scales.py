"""The scale of a block, from its numbers: every format and rule, plain torch, to be checked by hand.

M is the largest magnitude of a block, P the outer scale of the tensor (1 where there is none) and A the largest finite
magnitude of the tensor. With E8M0, S = 2^s follows from M by a rule. Any other scale is S = P code, and the code is
M / (P target) rounded to the scale format. That quotient is never computed: M / P is compared with the products of the
target and the numbers between two codes, which float64 holds exactly. TransformerEngine's and torchao's orders of
operations, in float32 with a division, are here for comparison with them alone.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from quantization.constants import constant
from quantization.formats import SCALE_FORMATS, SCALE_MAX, SCALE_MIN, ElementFormat, ScaleFormat
from quantization.noise import WORD, Noise
from quantization.spec import QuantizerSpec
from quantization.words import ScaleRule

_MANTISSA_BITS = 23
_EXPONENT_BIAS = 127
OUTER_MIN = -100  # exponent of the smallest outer scale: below, products of noise would leave float32
RMS_TARGET = 2.92247856 / 6  # of a standard deviation: the best for E2M1 of a normal distribution (2505.14669)
ROOT_OF_2 = math.floor((math.sqrt(2) - 1) * (1 << _MANTISSA_BITS))  # the last 23 bits of its significand
FLOAT32_MAX = torch.finfo(torch.float32).max
SCALE_BIAS, NAN_SCALE = 127, 255  # of E8M0 codes
CODE_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # of scales' codes, by their bytes


class Scales(NamedTuple):
    """What blocks are divided by; values have the blocks' shape, with 1 where there is one of a block.

    scale: S (float32), without the spec's factor and without an fp32 outer scale; 0 where a block is to be zeros.
    finite: whether the block is (bool). outer: an fp32 outer scale P, by which results are to be multiplied, or None.
    divisor: what numbers are divided by (torchao), or multiplied by (te), before they are rounded; None for S.
    """

    scale: Tensor
    finite: Tensor
    outer: Tensor | None = None
    divisor: Tensor | None = None


def power_of_two(n: Tensor) -> Tensor:
    """2^n in float32 for integers n in [-127, 127], exact: written as bits. 2^-127 is a subnormal number."""
    normal = (n + _EXPONENT_BIAS) << _MANTISSA_BITS
    return torch.where(n > -127, normal, 1 << (_MANTISSA_BITS - 1)).view(torch.float32)


def inverse(scale: Tensor) -> Tensor:
    """1 / S of powers of two from 2^-127 to 2^127, exact."""
    exponent = (scale.view(torch.int32) >> _MANTISSA_BITS) - _EXPONENT_BIAS  # -127 also of the subnormal 2^-127
    return power_of_two(-exponent)


def binade(scale: Tensor) -> Tensor:
    """The power of two in a scale (float32, zero or normal); 2^-127 for zero."""
    return power_of_two((scale.view(torch.int32) >> _MANTISSA_BITS) - _EXPONENT_BIAS)


def significand(scale: Tensor) -> Tensor:
    """The scale over its power of two: float32 in [1, 2); 1 for zero."""
    mantissa = scale.view(torch.int32) & ((1 << _MANTISSA_BITS) - 1)
    return (mantissa | (_EXPONENT_BIAS << _MANTISSA_BITS)).view(torch.float32)


@functools.cache
def _table(fmt: ScaleFormat) -> tuple[float, ...]:
    """The numbers of a format's codes of a byte, NaN behind the largest."""
    numbers = (fmt.value(code) for code in range(256))
    return tuple(number if number <= fmt.max else math.nan for number in numbers)


def scale_numbers(codes: Tensor, fmt: ScaleFormat) -> Tensor:
    """The numbers (float32) of scales' codes (one of CODE_DTYPES); of a code of a byte that is none, NaN."""
    if fmt.bias is None:
        return codes.view(torch.float32) if fmt.fraction is None else (codes.int() << 16).view(torch.float32)
    if not fmt.fraction:
        return torch.where(codes == NAN_SCALE, torch.nan, power_of_two(codes.int().clamp(max=254) - SCALE_BIAS))
    table = constant(_table(fmt), codes.device)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def codes_of_scales(numbers: Tensor, fmt: ScaleFormat) -> Tensor:
    """The codes of numbers (float32) of a scale format, which `scale_numbers` reads back."""
    bits = numbers.view(torch.int32)
    if fmt.bias is None:
        return bits.clone() if fmt.fraction is None else (bits >> 16).to(torch.int16)
    if not fmt.fraction:
        return (bits >> _MANTISSA_BITS).to(torch.uint8)
    table = torch.tensor([number for number in _table(fmt) if number <= fmt.max], device=numbers.device)
    return torch.bucketize(numbers, table).to(torch.uint8)


def no_scale(codes: Tensor, fmt: ScaleFormat) -> Tensor:
    """Whether a scale's code is that of no number of its format (bool, its shape)."""
    numbers = scale_numbers(codes, fmt)
    bits = numbers.view(torch.int32)
    amiss = ~torch.isfinite(numbers) | (bits < 0)
    if fmt.bias is None and fmt.fraction is not None:  # what two bytes could hold beside the format's numbers
        amiss |= (bits & ((1 << (_MANTISSA_BITS - fmt.fraction)) - 1)) != 0
        amiss |= (bits > 0) & (bits < 1 << _MANTISSA_BITS)
    return amiss


def threshold(fmt: ElementFormat, rule: ScaleRule) -> int | None:
    """The last 23 bits of a float32 number, above which the exponent of a scale is one larger; None for never."""
    significand = {
        "truncation_free": fmt.max_significand,  # M <= max S
        "overflow_aware": 7.25 / 4,  # M <= 7.25 S
    }.get(rule)
    if rule == "even":  # from halfway between the largest magnitude and the next number of such a float on
        return round((1 - 2.0 ** -(fmt.mantissa_bits + 1)) * (1 << _MANTISSA_BITS)) - 1
    return None if significand is None else math.floor((significand - 1) * (1 << _MANTISSA_BITS))


def scale_exponent(block_max: Tensor, fmt: ElementFormat, scale_rule: ScaleRule) -> Tensor:
    """The exponent s of a block's scale S = 2^s from its largest magnitude M (float32, finite): int32, M's shape.

    floor, three_quarter:  s = floor(log2 M) - emax                              (paper, equation 2)
    truncation_free:       s = the smallest integer with M <= max * 2^s          (paper, section 3.2)
    even:                  s = floor(log2(8 M / 7)) - emax                       (for E2M1)
    overflow_aware:        s = the smallest integer with M <= 7.25 * 2^s
    """
    bits = block_max.view(torch.int32)
    exponent = (bits >> _MANTISSA_BITS) - _EXPONENT_BIAS  # subnormals count as -127, which the clamp below settles
    s = exponent - fmt.emax
    above = threshold(fmt, scale_rule)
    if above is not None:
        mantissa = bits & ((1 << _MANTISSA_BITS) - 1)
        s = s + (mantissa > above).int()
    return s.clamp(SCALE_MIN, SCALE_MAX)


def _tree_sum(x: Tensor) -> Tensor:
    """The sum over the last dimension (padded with zeros to a power of two), by pairs of neighbours; it stays, as 1."""
    length = x.shape[-1]
    x = torch.nn.functional.pad(x, (0, (1 << (length - 1).bit_length()) - length))
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x


def rms_exponent(values: Tensor, rule: ScaleRule) -> Tensor:
    """s from the standard deviation of blocks (finite, float32), the mean removed: int32, 1 in the last dimension.

    rms_floor: s = floor(log2(2.92 / 6 std + 1e-8)); rms_nearest: the nearest integer to that logarithm.
    """
    count = constant((1 / values.shape[-1],), values.device)
    deviation = values - _tree_sum(values) * count
    std = (_tree_sum(deviation * deviation) * count).sqrt()
    aim = std * constant((RMS_TARGET,), std.device) + 1e-8
    bits = torch.where(aim < FLOAT32_MAX, aim, FLOAT32_MAX).view(torch.int32)  # sums of huge numbers may be no number
    s = (bits >> _MANTISSA_BITS) - _EXPONENT_BIAS
    if rule == "rms_nearest":
        s = s + ((bits & ((1 << _MANTISSA_BITS) - 1)) > ROOT_OF_2).int()
    return s.clamp(SCALE_MIN, SCALE_MAX)


def largest_of(x: Tensor) -> Tensor:
    """A: the largest finite magnitude of a tensor (float32 scalar)."""
    return torch.where(torch.isfinite(x), x, 0.0).abs().amax().float()


def amax_of(x: Tensor, spec: QuantizerSpec) -> Tensor | None:
    """A of a tensor, where the spec has an outer scale."""
    return None if spec.outer == "none" else largest_of(x)


def held_amax(x: Tensor, spec: QuantizerSpec, noise: Noise | None, held: Tensor | None) -> Tensor | None:
    """A of a matrix's outer scale; with a delay, of the matrix at the latest position of the run that it divides.

    held: A as it was (see operands/prepare.py), which is renewed where it is time, or None.
    """
    amax = amax_of(x, spec)
    return amax if amax is None or held is None or not spec.outer_delay else hold(amax, spec, noise, held)


def hold(amax: Tensor, spec: QuantizerSpec, noise: Noise | None, held: Tensor) -> Tensor:
    """A to be used: that of the present matrix where `held` is to be renewed, which this does, else `held`.

    held: its bits (int32 scalar), 0 for none yet; below 0 minus them, for A at every position. noise: None where the
    pass is at no position of a run.
    """
    due = held == 0
    if noise is not None:
        due = due | ((held > 0) & (((noise.state[1] >> 32) & WORD) % spec.outer_delay == 0))
    amax = torch.where(due, amax, held.abs().view(torch.float32))
    held.copy_(amax.view(torch.int32))
    return amax


def outer_exponent(amax: Tensor, spec: QuantizerSpec) -> Tensor:
    """p of the outer scale 2^p, int32: the smallest from -100 on with A <= target * target_scale * 2^p; 0 for A = 0."""
    fraction, exponent = torch.frexp(amax.double())
    reach_fraction, reach_exponent = math.frexp(spec.reach)
    p = (exponent - reach_exponent + (fraction > reach_fraction).int()).clamp(min=OUTER_MIN)
    return torch.where(amax > 0, p, 0).int()


def coded(block_max: Tensor, spec: QuantizerSpec, outer: Tensor | None, u: Tensor | None) -> Tensor:
    """The scale S = P code of blocks (float32, M's shape) whose format has fraction bits.

    outer: P, a power of two, or None for 1. u: draws in (0, 1) of M's shape, for stochastic rounding.
    """
    fmt, target = spec.scale, spec.aim
    ratio = block_max.double() if outer is None else block_max.double() / outer.double()
    fraction, exponent = torch.frexp(ratio)
    target_fraction, target_exponent = math.frexp(target)
    exponent = (exponent - target_exponent - (fraction < target_fraction).int()).clamp(min=fmt.emin)
    unit = ((exponent.long() - fmt.fraction + 1023) << 52).view(torch.float64)  # between codes around the quotient
    place = ratio / unit  # a code c lies at c * target
    count = torch.zeros_like(exponent)
    for j in range(2 << fmt.fraction):
        if spec.scale_rounding == "up":
            count += place > target * j
        elif spec.scale_rounding == "nearest":
            count += (place > target * (j + 0.5)) | ((place == target * (j + 0.5)) & (j % 2 == 1))
        else:
            count += place >= target * (j + 1)
    if spec.scale_rounding == "stochastic":
        count += place - target * count > (1 - u.double()) * target
    if not fmt.subnormal:  # there is nothing between zero and the smallest normal number
        normal = 1 << fmt.fraction
        kept = {"up": place > 0, "nearest": place > target * normal / 2}.get(spec.scale_rounding)
        if kept is None:
            kept = place > (1 - u.double()) * (target * normal)
        count = torch.where(count < normal, torch.where(kept & (exponent == fmt.emin), normal, 0), count)
    code = (count * unit).clamp(max=fmt.max)
    # Under an outer scale a target near 1 brings the largest numbers of float32 to a scale beyond them.
    return (code if outer is None else (code * outer.double()).clamp(max=SCALE_FORMATS["e8m3"].max)).float()


def te_scales(block_max: Tensor, finite: Tensor, amax: Tensor) -> Scales:
    """TransformerEngine's: the divisor is what it multiplies by."""
    one = torch.ones_like(amax)  # torch takes a number over a tensor for a product with the reciprocal
    encode = (2688 * one / amax).clamp(max=FLOAT32_MAX)
    encode = torch.where((amax == 0) | (encode == 0), 1.0, encode)
    code = (block_max * (encode * constant((1 / 6,), amax.device))).clamp(max=448.0).to(torch.float8_e4m3fn).float()
    outer = one / encode
    return Scales(code, finite, outer, (one / (code * outer)).clamp(max=FLOAT32_MAX))


def torchao_scales(block_max: Tensor, finite: Tensor, amax: Tensor | None) -> Scales:
    """torchao's, of version 0.16: no code is below 2^-6; the divisor is what it divides by.

    Torch divides by a number on a CPU and multiplies by its reciprocal on a GPU, for torchao as here.
    """
    scale, outer = block_max / 6.0, None
    if amax is not None:
        outer = amax / 2688.0
        outer = torch.where(outer == 0, 1.0, outer)
        scale = scale / outer
    code = scale.clamp(min=2.0**-6, max=448.0).to(torch.float8_e4m3fn).float()
    return Scales(code, finite, outer, code if outer is None else outer * code)


def scales_of(values: Tensor, spec: QuantizerSpec, amax: Tensor | None = None, u: Tensor | None = None) -> Scales:
    """The scales of blocks (float32, in the last dimension of `values`), 1 where a block is not finite.

    amax: A, where the spec has an outer scale. u: draws for each block, for a stochastic scale.
    """
    block_max = values.abs().amax(dim=-1, keepdim=True)
    finite = torch.isfinite(block_max)
    block_max = torch.where(finite, block_max, 1.0)
    if spec.scale_rule.startswith("rms"):
        return Scales(power_of_two(rms_exponent(torch.where(finite, values, 0.0), spec.scale_rule)), finite)
    if spec.power_of_two:
        return Scales(power_of_two(scale_exponent(block_max, spec.format, spec.scale_rule)), finite)
    if spec.arithmetic == "te":
        return te_scales(block_max, finite, amax)
    if spec.arithmetic == "torchao":
        return torchao_scales(block_max, finite, amax)
    if spec.scale.fraction is None:
        scale = block_max / constant((spec.aim,), values.device)
        return Scales(scale.clamp(max=spec.scale.max), finite)
    outer = None if amax is None else power_of_two(outer_exponent(amax, spec))
    return Scales(coded(block_max, spec, outer, u), finite)
