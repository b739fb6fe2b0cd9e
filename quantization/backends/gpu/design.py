"""What the Triton kernels do to a tile beyond the paper: rotations, square blocks, scales that are no powers of two.

Why the bits are those of the reference:
- quotients by a number t of up to four bits (a target such as 6, the significand of a scale) are rounded correctly:
  with r = 1 / t and q = x r, two fused operations give e = q t - x and q - e r, which is the quotient's rounding for
  every x (the interpreter, which fuses nothing, divides). A quotient that is rounded correctly is on the same side of
  every number of up to five bits as the exact one: so it decides which scale is the nearest to M / 6, and which element
  to x / S;
- with another target the code of a scale is computed in integers;
- x over the power of two in a scale is exact where it matters;
- stochastic rounding compares |x| with s (a + (1 - u) (b - a)), both of which are exact;
- rotations are sums and differences of two numbers each, in the reference's order. Kernels of this file are compiled
  without contracting products and sums, since a product may be inexact here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantization.backends.gpu.tiles import (
    INFINITY,
    MAGNITUDE,
    NAN,
    PATCH_COLUMNS,
    PATCH_ROWS,
    SIGN,
    column_numbers,
    decoded,
    from_float32,
    in_blocks,
    in_patches,
    largest_of_blocks,
    philox,
    power_of_two,
    round_nearest,
    round_stochastic,
    row_numbers,
    scale_code,
)
from quantization.backends.scales import FLOAT32_MAX, OUTER_MIN, RMS_TARGET

_FRACTION = tl.constexpr((1 << 23) - 1)
_ONE = tl.constexpr(127 << 23)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_RMS_TARGET = tl.constexpr(RMS_TARGET)
_FLOAT32_MAX = tl.constexpr(FLOAT32_MAX)
_OUTER_MIN = tl.constexpr(OUTER_MIN)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """Narrow what may not be a number of the dtype, to nearest, ties to even. bfloat16 by its bits.

    A NaN of arithmetic has all bits set on a GPU: the rounding would carry into its sign, and leave a zero.
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = tl.where(x == x, bits + (0x7FFF + ((bits >> 16) & 1)), NAN)
        narrow = (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = from_float32(x, dtype)
    return narrow


# ---------------------------------------------------------------------------------------------------------------------
# Rotations
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _flipped(x, state_ptr, stream, TURN: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile in patches with the signs of a turn."""
    place = column_numbers(0, COLUMNS) if AXIS == 1 else row_numbers(0, ROWS)
    place = place & (TURN.size - 1)
    if TURN.signs == "fixed":
        word = tl.where(place < 32, TURN.words[0], TURN.words[1])
        if TURN.size > 64:
            word = tl.where(place < 64, word, tl.where(place < 96, TURN.words[2], TURN.words[3]))
    else:
        high, key = tl.load(state_ptr + 1) + stream, tl.load(state_ptr) & 0xFFFFFFFF
        zero = (key & 0).to(tl.uint32)
        w0, w1, w2, w3 = philox(
            key, zero, zero + TURN.product, (high & 0xFFFFFFFF).to(tl.uint32), ((high >> 32) & 0xFFFFFFFF).to(tl.uint32)
        )
        word = tl.where(place < 32, w0.to(tl.int32, bitcast=True), w1.to(tl.int32, bitcast=True))
        if TURN.size > 64:
            late = tl.where(place < 96, w2.to(tl.int32, bitcast=True), w3.to(tl.int32, bitcast=True))
            word = tl.where(place < 64, word, late)
    bit = (word >> (place & 31)) & 1
    return (x.to(tl.int32, bitcast=True) ^ (bit << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _sums_and_differences(x, PAIR: tl.constexpr):
    """a + b and a - b in the places of a and b, the two along dimension PAIR of six."""
    shape: tl.constexpr = (1,) * PAIR + (2,) + (1,) * (5 - PAIR)
    second = tl.reshape(tl.arange(0, 2), shape)
    if _INTERPRETED:  # to which xor_sum takes long
        other = tl.sum(tl.where(second == 0, x, 0.0), axis=PAIR, keep_dims=True)
        other = tl.where(second == 0, tl.sum(tl.where(second == 0, 0.0, x), axis=PAIR, keep_dims=True), other)
    else:
        bits = x.to(tl.int32, bitcast=True)
        other = (tl.xor_sum(bits, axis=PAIR, keep_dims=True) ^ bits).to(tl.float32, bitcast=True)
    return other + tl.where(second == 0, x, -x)


@triton.jit
def _with_pairs(x, OF: tl.constexpr, H: tl.constexpr, AXIS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """What OF makes of the pairs of numbers H apart along AXIS of a tile in patches."""
    if AXIS == 1:
        if H < 8:
            x = OF(tl.reshape(x, (C, R, 4 // H, 2, H, 4)), 3)
        else:
            x = OF(tl.reshape(x, (C * 4 // H, 2, H // 8, R, 8, 4)), 1)
    else:
        if H < 4:
            x = OF(tl.reshape(x, (C, R, 8, 2 // H, 2, H)), 4)
        else:
            x = OF(tl.reshape(x, (C, R * 2 // H, 2, H // 4, 8, 4)), 2)
    return tl.reshape(x, (C, R, 8, 4))


@triton.jit
def _butterflies(x, TURN: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x H over the root of the size along AXIS."""
    STAGES: tl.constexpr = TURN.stages
    for stage in tl.static_range(STAGES):
        x = _with_pairs(x, _sums_and_differences, 1 << stage, AXIS, ROWS // PATCH_ROWS, COLUMNS // PATCH_COLUMNS)
    return x * TURN.norm + 0.0  # which is no -0.0, whichever way the sums were made


@triton.jit
def rotated(x, state_ptr, stream, TURN: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x T along AXIS for a tile in patches, in which no group is cut."""
    if TURN.signs != "none":
        x = _flipped(x, state_ptr, stream, TURN, AXIS, ROWS, COLUMNS)
    return _butterflies(x, TURN, AXIS, ROWS, COLUMNS)


@triton.jit
def rotated_back(x, state_ptr, stream, TURN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x T^T along the rows of a tile in patches, in which no group is cut."""
    x = _butterflies(x, TURN, 1, ROWS, COLUMNS)
    if TURN.signs != "none":
        x = _flipped(x, state_ptr, stream, TURN, 1, ROWS, COLUMNS)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Scales
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _in_groups(x, SPEC: tl.constexpr, AXIS: tl.constexpr):
    """A tile in patches as `in_blocks` has it; of square blocks with the dimensions 1, 3, 4 and 5 those inside one.

    Nothing that has one number a block is reshaped: Triton knows no layout of it but one in which threads have numbers
    of each other's too, and may give this layout to the whole tile. Then each thread computes much of the tile or all
    of it, in more registers than there are, by a kernel that compiles for minutes.
    """
    if SPEC.square:
        DOWN: tl.constexpr = SPEC.block // PATCH_ROWS
        ACROSS: tl.constexpr = SPEC.block // PATCH_COLUMNS
        x = tl.reshape(x, (x.shape[0] // ACROSS, ACROSS, x.shape[1] // DOWN, DOWN, PATCH_COLUMNS, PATCH_ROWS))
    else:
        x = in_blocks(x, SPEC.block, AXIS)
    return x


@triton.jit
def _largest_of_groups(x, SPEC: tl.constexpr, AXIS: tl.constexpr):
    """`largest_of_blocks` of what `_in_groups` returns."""
    if SPEC.square:
        bits = x.to(tl.int32, bitcast=True) & MAGNITUDE
        bits = tl.max(tl.max(bits, axis=4, keep_dims=True), axis=5, keep_dims=True)  # of patches, which threads have
        largest = tl.max(tl.max(bits, axis=3, keep_dims=True), axis=1, keep_dims=True)
    else:
        largest = largest_of_blocks(x, AXIS)
    return largest


@triton.jit
def _sums_of_pairs(x, PAIR: tl.constexpr):
    """a + b in the places of a and b, the two along dimension PAIR of six."""
    return tl.broadcast_to(tl.sum(x, axis=PAIR, keep_dims=True), x.shape)


@triton.jit
def _block_sums(x, AXIS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Sums of blocks of 32 in the places of all their numbers, by pairs of neighbours; of a tile in patches."""
    for stage in tl.static_range(5):
        x = _with_pairs(x, _sums_of_pairs, 1 << stage, AXIS, R, C)
    return x


@triton.jit
def _rms_code(x, SPEC: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The E8M0 codes of scales by the standard deviation of blocks of a tile in patches, as `in_blocks` has maxima."""
    R: tl.constexpr = ROWS // PATCH_ROWS
    C: tl.constexpr = COLUMNS // PATCH_COLUMNS
    deviation = x - _block_sums(x, AXIS, R, C) * 0.03125
    squares = in_blocks(_block_sums(deviation * deviation, AXIS, R, C), SPEC.block, AXIS)
    square = largest_of_blocks(squares, AXIS).to(tl.float32, bitcast=True)  # of equal ones
    aim = tl.sqrt_rn(square * 0.03125) * _RMS_TARGET + 1e-8
    bits = tl.where(aim < _FLOAT32_MAX, aim, _FLOAT32_MAX).to(tl.int32, bitcast=True)
    return tl.minimum((bits + SPEC.rms_carry) >> 23, 254)


@triton.jit
def outer_exponent(peak, SPEC: tl.constexpr):
    """p of the outer scale 2^p from the bits of A."""
    p = ((peak + SPEC.outer_carry) >> 23) - 127 - SPEC.outer_exponent
    return tl.where(peak > 0, tl.maximum(p, _OUTER_MIN), 0)


@triton.jit
def _inverse(s):
    """1 / s of a number in [1, 2), to some 2^-22 of it: what a GPU has an instruction for."""
    if _INTERPRETED:
        inverse = 1.0 / s
    else:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [s], dtype=tl.float32, is_pure=True, pack=1
        )
    return inverse


@triton.jit
def _reciprocal(s):
    """1 / s for the significand of a scale, rounded correctly: by a step of Newton's method."""
    r = _inverse(s)
    if not _INTERPRETED:  # which rounds the quotient correctly, but not the fused operations
        r = tl.fma(tl.fma(-s, r, 1.0), r, r)
    return r


@triton.jit
def _quotient(x, s, reciprocal):
    """x / s for a scale's significand or a target of up to four bits, rounded correctly; of zero a zero of any sign."""
    if _INTERPRETED:
        q = tl.div_rn(x, s)
    else:
        q = x * reciprocal
        q = tl.fma(tl.fma(q, -s, x), reciprocal, q)
    return q


@triton.jit
def _code_by_quotient(largest, p, SPEC: tl.constexpr):
    """`_coded_scale` for a target of up to four bits, whose quotient is on the right side of every boundary."""
    m = largest.to(tl.float32, bitcast=True)
    if SPEC.outer:
        m = m * power_of_two(127 - p)
        if not SPEC.subnormal:
            m = tl.minimum(m, _FLOAT32_MAX)
    # Under the scale of an earlier tensor M / P may leave float32. Of Inf fused operations make a NaN.
    q = _quotient(m, SPEC.target_value, SPEC.target_reciprocal)
    if SPEC.subnormal:
        q = tl.minimum(q, SPEC.scale_max)  # also of a NaN
        LOWEST: tl.constexpr = (SPEC.emin + 127) << 23
        binade = tl.maximum(q.to(tl.int32, bitcast=True) & INFINITY, LOWEST).to(tl.float32, bitcast=True)
        anchor = binade * (1.5 * 2**20)
        code = (q + anchor) - anchor
        if SPEC.up:
            short = (code < q) | ((code == 0) & (largest > 0))  # also where M / P has become zero
            code = tl.minimum(tl.where(short, code + binade * 0.125, code), SPEC.scale_max)
    else:
        bits = q.to(tl.int32, bitcast=True)
        more = (1 << 20) - 1 if SPEC.up else (1 << 19) - 1 + ((bits >> 20) & 1)
        code = ((bits + more) & -(1 << 20)).to(tl.float32, bitcast=True)
        reached = largest > 0 if SPEC.up else m > SPEC.target_value * 2.0 ** (SPEC.emin - 1)
        least = tl.where(reached, 1 << 23, 0).to(tl.float32, bitcast=True)  # the smallest scale, 2^-126
        code = tl.minimum(tl.where(m < SPEC.target_value * 2.0**SPEC.emin, least, code), SPEC.scale_max)
    return code


@triton.jit
def _coded_scale(largest, p, SPEC: tl.constexpr):
    """The codes of scales, over 2^p, from the bits of blocks' largest magnitudes (finite): float32, zero or normal."""
    exponent = (largest >> 23) - 127
    if not SPEC.subnormal:  # whose scales reach so far down that M may be subnormal
        tiny = largest < (1 << 23)
        raised = (largest.to(tl.float32, bitcast=True) * 16777216.0).to(tl.int32, bitcast=True)
        largest = tl.where(tiny, raised, largest)
        exponent = tl.where(tiny, (largest >> 23) - 127 - 24, exponent)
    m = (largest & _FRACTION) | (1 << 23)
    smaller = (m < SPEC.target).to(tl.int32)
    k = exponent - p - SPEC.target_exponent - smaller
    m = m << (smaller + 4)  # 16 m / target lies in [16, 32)
    quotient = m // SPEC.target
    sticky = (m != quotient * SPEC.target).to(tl.int32)
    twice = 2 * quotient + sticky  # the code is a sixteenth of it, over 2^(emin - k) below the normal numbers
    below = tl.minimum(tl.maximum(SPEC.emin - k, 0), 8)
    if SPEC.up:
        n = (twice + ((4 << below) - 1)) >> (below + 2)
        if not SPEC.subnormal:
            n = tl.where(below > 0, 8, n)
    else:
        n = (twice + (2 << below) - 1 + ((twice >> (below + 2)) & 1)) >> (below + 2)
        if not SPEC.subnormal:
            n = tl.where(below > 0, tl.where((below == 1) & (twice > 32), 8, 0), n)
    n = tl.where(largest == 0, 0, n)
    k = tl.minimum(tl.maximum(k, SPEC.emin), 127)
    return tl.minimum((n.to(tl.float32) * 0.125) * power_of_two(k + 127), SPEC.scale_max)


# ---------------------------------------------------------------------------------------------------------------------
# Quantizing
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _signed(x, sign_of):
    bits = (x.to(tl.int32, bitcast=True) & MAGNITUDE) | (sign_of.to(tl.int32, bitcast=True) & SIGN)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _round_between_multiples(x, s, halves, SPEC: tl.constexpr):
    """Stochastic rounding of x between multiples of s, at most the largest of them: Q / s.

    The lower one a comes of |x| / s, to some 2^-20 of it, so it may be a neighbour of a where |x| is so close. But
    1 - u being from 2^-17 to 1 - 2^-17, both pairs of neighbours lead to the same one then. What decides is exact:
    whether |x| > s (a + (1 - u) (b - a)), where 1 - u is the place between the codes of a and b, as `coded` has them.
    """
    PLACE: tl.constexpr = 23 - SPEC.mantissa_bits
    inverse = _inverse(s) * tl.constexpr(2.0 ** (-126 - SPEC.bottom))
    lower = (tl.abs(x) * inverse).to(tl.int32, bitcast=True) & -(1 << PLACE)
    # 1 - u = (2^16 - half - 1/2) / 2^16 in the bits below PLACE.
    rest = (halves >> SPEC.mantissa_bits) ^ ((1 << PLACE) - (1 << (PLACE - 17)))
    threshold = (lower | rest).to(tl.float32, bitcast=True) * (s * tl.constexpr(2.0 ** (126 + SPEC.bottom)))
    code = tl.where(tl.abs(x) > threshold, lower + (1 << PLACE), lower)
    return _signed(tl.minimum(decoded(code, SPEC), SPEC.max), x)


@triton.jit
def quantized_tile(
    x,  # float32 in patches
    shadow,
    halves,
    peak_ptr,  # bits of A of the outer scale, or None
    SPEC: tl.constexpr,
    EXACT: tl.constexpr,  # whether results are numbers of bfloat16
    AXIS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize and dequantize a tile in blocks along AXIS.

    Returns its numbers, float32 in patches, without the spec's factor; and whether each was inside the range, int1.
    """
    tile = x
    x = _in_groups(x, SPEC, AXIS)
    largest = _largest_of_groups(x, SPEC, AXIS)
    broken = largest
    if shadow is not None:
        shadow = _in_groups(shadow, SPEC, AXIS)
        broken = tl.maximum(broken, _largest_of_groups(shadow, SPEC, AXIS))
    largest = tl.where(largest < INFINITY, largest, _ONE)
    if SPEC.stochastic:
        halves = _in_groups(halves, SPEC, AXIS)

    if SPEC.scale == "power" or SPEC.scale == "rms":
        code = _rms_code(tile, SPEC, AXIS, ROWS, COLUMNS) if SPEC.scale == "rms" else scale_code(largest, SPEC)
        scale = power_of_two(code)
        inverse = power_of_two(254 - code)
        latent = x * inverse
        if SPEC.quarters:
            latent = latent * 0.75
        within = tl.abs(latent) < SPEC.max
        if SPEC.stochastic:
            rounded = decoded(round_stochastic(latent, halves, SPEC), SPEC)
        else:
            if shadow is not None:
                shadow = shadow * inverse
                if SPEC.quarters:
                    shadow = shadow * 0.75
            rounded = round_nearest(latent, shadow, SPEC)
    else:
        if SPEC.scale == "coded":
            if SPEC.outer:
                p = outer_exponent(tl.load(peak_ptr), SPEC)
                scale = _code_by_quotient(largest, p, SPEC) if SPEC.short else _coded_scale(largest, p, SPEC)
                scale = scale * power_of_two(p + 127)
            else:
                scale = _code_by_quotient(largest, 0, SPEC) if SPEC.short else _coded_scale(largest, 0, SPEC)
            bits = scale.to(tl.int32, bitcast=True)
            inverse = power_of_two(254 - (bits >> 23))
            s = ((bits & _FRACTION) | _ONE).to(tl.float32, bitcast=True)
            most = s * SPEC.max
            x = x * inverse
            within = tl.abs(x) < most
            if not SPEC.stochastic:
                reciprocal = _reciprocal(s)
                latent = _quotient(tl.minimum(tl.abs(x), most), s, reciprocal)
                if SPEC.rounding == "nearest_up" or shadow is not None:  # else a sign changes nothing
                    latent = _signed(latent, x)
            if shadow is not None:
                latent_of_shadow = _quotient(tl.minimum(tl.abs(shadow * inverse), most), s, reciprocal)
                shadow = _signed(latent_of_shadow, shadow)
        else:
            scale = tl.div_rn(largest.to(tl.float32, bitcast=True), SPEC.target_value)
            divisor = tl.where(scale == 0, 1.0, scale)
            latent = tl.div_rn(x, divisor)
            within = tl.abs(latent) < SPEC.max
            latent = tl.minimum(tl.maximum(latent, -SPEC.max), SPEC.max)
            x, s = latent, tl.full(divisor.shape, 1.0, tl.float32)
            if shadow is not None:
                shadow = tl.minimum(tl.maximum(tl.div_rn(shadow, divisor), -SPEC.max), SPEC.max)
        if SPEC.stochastic:
            rounded = _round_between_multiples(x, s, halves, SPEC)
        else:
            rounded = round_nearest(latent, shadow, SPEC)
            if SPEC.scale == "coded":
                rounded = _signed(rounded, x)

    # A scale of zero leaves zeros with their signs. A number that is none is written as such at last: multiplied by it,
    # what comes of rounding to bfloat16 by bits might be none.
    if EXACT:
        kept = tl.where(broken < INFINITY, scale.to(tl.int32, bitcast=True), NAN)
        rounded = rounded * kept.to(tl.float32, bitcast=True)
    else:
        rounded = tl.where(broken < INFINITY, (rounded * scale).to(tl.int32, bitcast=True), NAN)
        rounded = rounded.to(tl.float32, bitcast=True)
    within = within | (broken >= INFINITY)
    return in_patches(rounded, ROWS, COLUMNS), in_patches(within, ROWS, COLUMNS)
