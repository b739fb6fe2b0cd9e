"""What the Triton kernels do to a tile: its numbers, its noise, its blocks, scales and rounding.

Why the bits are those of the reference:
- every multiplication is by a power of two and every sum is exact, or is far from where a decision changes; so
  contracting a product and a sum into one operation changes nothing either;
- block maxima are taken over the bits of |x| as integers, whose order is finite < Inf < NaN: a NaN cannot get lost;
- noise is Philox4x32-10 with the counters of `noise.py`, one call for eight elements.

A format's grid is that of a small float. Brought down by a power of two to where its smallest normal number is
float32's, 2^-126, a float32 number has the format's code in its highest bits, and below them its place on the way to
the next code, evenly from zero to the largest. There rounding is integer arithmetic, and needs no table.

A tile is cut into patches of 4 rows and 8 columns and has the dimensions (COLUMNS // 8, ROWS // 4, 8 columns, 4 rows).
Triton then gives each thread whole patches, whichever way a result is written: a row of a patch is one load and one
call of Philox, its maxima and sums begin in registers, and a transposed result needs no exchange between threads.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

SIGN = tl.constexpr(-(2**31))
MAGNITUDE = tl.constexpr(2**31 - 1)
_EXPONENT = tl.constexpr(0x7F800000)
INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)
NAN_SCALE = tl.constexpr(255)  # the E8M0 code of a block that is not finite
PATCH_ROWS, PATCH_COLUMNS = tl.constexpr(4), tl.constexpr(8)
_INTEGERS_ONLY = tl.constexpr(1.5 * 2.0**23)  # float32 numbers of this size have no fraction


class KernelSpec(NamedTuple):
    """A quantizer in the terms of the kernels."""

    emax: int
    carry: int  # added to the bits of the block's maximum, it reaches the exponent where the scale is one larger
    rounding: str
    mantissa_bits: int
    bottom: int  # exponent of the smallest normal number
    max: float
    saturates: bool
    block: int


@triton.jit
def row_numbers(first_row, ROWS: tl.constexpr):
    """The rows of a tile in patches: (1, ROWS // 4, 1, 4)."""
    patch, inside = tl.arange(0, ROWS // PATCH_ROWS)[None, :, None, None], tl.arange(0, PATCH_ROWS)[None, None, None]
    return first_row + patch * PATCH_ROWS + inside


@triton.jit
def column_numbers(first_column, COLUMNS: tl.constexpr, PATCH: tl.constexpr = PATCH_COLUMNS):
    """The columns of a tile in patches: (COLUMNS // PATCH, 1, PATCH, 1)."""
    patch, inside = tl.arange(0, COLUMNS // PATCH)[:, None, None, None], tl.arange(0, PATCH)[None, None, :, None]
    return first_column + patch * PATCH + inside


@triton.jit
def to_float32(x):
    """Widen. bfloat16 by its bits: Triton's interpreter, unlike a GPU, loses its subnormal numbers."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def from_float32(x, dtype: tl.constexpr):
    """Narrow. bfloat16 by its bits, here without any loss."""
    if dtype == tl.bfloat16:
        narrow = (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(dtype)
    return narrow


@triton.jit
def power_of_two(code):
    """2^(code - 127), code from 0 to 254: float32. 2^-127 is a subnormal number."""
    return tl.maximum(code << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def philox(key, c0, c1, c2, c3):
    """`noise.philox4x32`: `key` int64, the counter's words uint32. One multiplication gives both halves of a product,
    where tl.philox takes two."""
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def random_halves(state, stream, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The 16 bits that `noise.uniform` draws for each element of a tile in patches, shifted left by 7: int32."""
    high = tl.load(state + 1) + stream
    # In the order (4, ROWS // 4, COLUMNS // 8) Triton gives the calls of a patch to the thread that has the patch.
    patch, inside = tl.arange(0, ROWS // PATCH_ROWS)[None, :, None], tl.arange(0, PATCH_ROWS)[:, None, None]
    row = first_row + patch * PATCH_ROWS + inside
    call = first_column // 8 + tl.arange(0, COLUMNS // 8)[None, None, :]
    c0, c1 = tl.broadcast(call.to(tl.uint32), row.to(tl.uint32))
    c2, c3 = (high & 0xFFFFFFFF).to(tl.uint32), ((high >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox(tl.load(state), c0, c1, c2, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (..., 2, 2): word 2i + j at [..., i, j]
    halves = tl.join(words << 7, words >> 9)  # each word's low and high half
    halves = tl.permute((halves & 0x7FFF80).to(tl.int32, bitcast=True), (2, 1, 3, 4, 5, 0))
    return tl.reshape(halves, (COLUMNS // 8, ROWS // PATCH_ROWS, 8, PATCH_ROWS))


class DesignSpec(NamedTuple):
    """A quantizer beyond the paper's, see design.py. The first fields are those of KernelSpec."""

    emax: int
    carry: int
    rounding: str
    mantissa_bits: int
    bottom: int
    max: float
    saturates: bool
    block: int
    stochastic: bool
    square: bool  # blocks of as many rows
    factor: float  # of results
    scale: str  # power, rms (a power of two by the standard deviation), coded or fp32
    rms_carry: int  # added to the bits of what an rms scale is next to, as `carry` is to those of the maximum
    quarters: bool  # numbers are multiplied by 3/4 first
    target: int  # 24 bits of the target's significand, and its exponent and itself
    target_exponent: int
    target_value: float
    target_reciprocal: float  # float32's
    short: bool  # whether the target has four bits at most
    emin: int  # of a coded scale: exponent of the smallest normal, whether there are subnormal ones, the largest
    subnormal: bool
    scale_max: float
    up: bool  # whether scales are rounded up
    outer: bool
    outer_carry: int
    outer_exponent: int


class KernelTurn(NamedTuple):
    """A rotation in the terms of the kernels."""

    size: int
    stages: int  # log2 of it
    signs: str
    product: int
    words: tuple[int, int, int, int]  # the fixed signs, as int32
    norm: float


@triton.jit
def scale_code(block_max, SPEC: tl.constexpr):
    """The E8M0 code of the scale, its exponent + 127, from the bits of the block's largest magnitude; from 0 to 254."""
    code = tl.maximum(((block_max + SPEC.carry) >> 23) - SPEC.emax, 0)
    if SPEC.emax < 1:  # the largest scale is smaller than what float32 holds
        code = tl.minimum(code, 254)
    return code


@triton.jit
def nearest_integer(n):
    """The nearest integer, ties to even, of |n| < 2^22: the first sum rounds, the second is exact."""
    return (n + _INTEGERS_ONLY) - _INTEGERS_ONLY


@triton.jit
def round_nearest(latent, shadow, SPEC: tl.constexpr):
    """Round x / S to the grid: float32, the sign kept also at zero. `shadow` (over S) as in the reference, or None."""
    sign = latent.to(tl.int32, bitcast=True) & SIGN
    if SPEC.saturates:
        latent = tl.minimum(tl.maximum(latent, -SPEC.max), SPEC.max)

    # The gap of the grid is 2^(exponent - mantissa bits), the exponent being at least that of the smallest normal.
    BOTTOM: tl.constexpr = (SPEC.bottom + 127) << 23
    binade = tl.maximum(latent.to(tl.int32, bitcast=True) & _EXPONENT, BOTTOM)
    if SPEC.rounding == "nearest_even" and SPEC.mantissa_bits > 0 and shadow is None:
        # 1.5 * 2^23 gaps: the sum is a whole number of gaps, whose parity is that of the code.
        anchor = binade.to(tl.float32, bitcast=True) * (1.5 * 2 ** (23 - SPEC.mantissa_bits))
        rounded = (latent + anchor) - anchor
    else:
        gap = binade.to(tl.float32, bitcast=True) * (1.0 / (1 << SPEC.mantissa_bits))
        gaps_per_one = (-(binade - (SPEC.mantissa_bits << 23)) + (254 << 23)).to(tl.float32, bitcast=True)
        n = tl.abs(latent) * gaps_per_one
        # The integer below: n - 1 for odd n, from where each rounding then goes up to n. Where n - 0.5 is not exact
        # it lies between -0.5 and -0.25, and the integer is 0.
        lower = nearest_integer(n - 0.5)
        target = n
        if shadow is not None:
            lower += tl.where(n - lower == 1.0, 1.0, 0.0)  # here the pair must begin with n itself
            target = (shadow.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True) * gaps_per_one
        midpoint = lower + 0.5
        if SPEC.rounding == "nearest_away":
            up = target >= midpoint
        else:
            if SPEC.rounding == "nearest_up":
                tie_goes_up = sign == 0
            else:
                integer = (lower + _INTEGERS_ONLY).to(tl.int32, bitcast=True)  # in its lowest bits
                code = integer + (((binade - BOTTOM) >> 23) << SPEC.mantissa_bits)
                tie_goes_up = (code & 1) == 1
            up = (target > midpoint) | ((target == midpoint) & tie_goes_up)
        rounded = tl.where(up, lower + 1.0, lower) * gap
        if shadow is not None:
            rounded = tl.minimum(rounded, SPEC.max)  # the largest magnitude has no upper neighbour
    magnitude = rounded.to(tl.int32, bitcast=True) & MAGNITUDE
    return (magnitude | sign).to(tl.float32, bitcast=True)


@triton.jit
def coded(latent, SPEC: tl.constexpr):
    """Bring x / S down to where the smallest normal number is 2^-126: its bits, int32."""
    return (latent * tl.constexpr(2.0 ** (-126 - SPEC.bottom))).to(tl.int32, bitcast=True)


@triton.jit
def decoded(bits, SPEC: tl.constexpr):
    """Undo `coded`: float32."""
    return bits.to(tl.float32, bitcast=True) * tl.constexpr(2.0 ** (126 + SPEC.bottom))


@triton.jit
def round_stochastic(latent, halves, SPEC: tl.constexpr):
    """Round x / S up where place + u > 1, u = (half + 1/2) / 2^16; bits as `coded` has them."""
    if SPEC.saturates:
        latent = tl.minimum(tl.maximum(latent, -SPEC.max), SPEC.max)
    PLACE: tl.constexpr = 23 - SPEC.mantissa_bits  # bits of a float32 below the format's
    noise = (halves >> SPEC.mantissa_bits) | ((1 << (PLACE - 17)) - 1)
    return (coded(latent, SPEC) + noise) & -(1 << PLACE)


@triton.jit
def in_blocks(x, BLOCK: tl.constexpr, AXIS: tl.constexpr):
    """A tile in patches, with the dimensions 1 and 4 (AXIS 1) or 2 and 5 (AXIS 0) those inside a block."""
    SIDE: tl.constexpr = x.shape[2] if AXIS == 1 else x.shape[3]
    INNER: tl.constexpr = BLOCK if BLOCK < SIDE else SIDE
    OUTER: tl.constexpr = BLOCK // INNER
    if AXIS == 1:
        x = tl.reshape(x, (x.shape[0] // OUTER, OUTER, x.shape[1], SIDE // INNER, INNER, x.shape[3]))
    else:
        x = tl.reshape(x, (x.shape[0], x.shape[1] // OUTER, OUTER, x.shape[2], SIDE // INNER, INNER))
    return x


@triton.jit
def largest_of_blocks(x, AXIS: tl.constexpr):
    """Bits of the largest magnitude of each block of what `in_blocks` returns, a NaN being the largest of all."""
    bits = x.to(tl.int32, bitcast=True) & MAGNITUDE
    if AXIS == 1:
        return tl.max(tl.max(bits, axis=4, keep_dims=True), axis=1, keep_dims=True)
    else:
        return tl.max(tl.max(bits, axis=5, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def quantize_tile(x, shadow, halves, SPEC: tl.constexpr, AXIS: tl.constexpr, CODED: tl.constexpr):
    """Quantize a tile of float32 in patches, in blocks along AXIS.

    Returns Q(x) / S, or if CODED its bits as `coded` has them, the codes of the scales and the bits of each block's
    largest magnitude, all as `in_blocks` has them (dimensions inside a block being 1 of what there is one a block).
    """
    x = in_blocks(x, SPEC.block, AXIS)
    block_max = largest_of_blocks(x, AXIS)
    largest = block_max
    scale = scale_code(block_max, SPEC)
    to_latent = power_of_two(254 - scale)
    if shadow is not None:
        shadow = in_blocks(shadow, SPEC.block, AXIS)
        largest = tl.maximum(largest, largest_of_blocks(shadow, AXIS))
        shadow = shadow * to_latent
    if SPEC.rounding == "stochastic":
        rounded = round_stochastic(x * to_latent, in_blocks(halves, SPEC.block, AXIS), SPEC)
        if not CODED:
            rounded = decoded(rounded, SPEC)
    else:
        rounded = round_nearest(x * to_latent, shadow, SPEC)
        if CODED:
            rounded = coded(rounded, SPEC)
    return rounded, scale, largest


@triton.jit
def in_patches(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Undo `in_blocks`."""
    return tl.reshape(x, (COLUMNS // PATCH_COLUMNS, ROWS // PATCH_ROWS, PATCH_COLUMNS, PATCH_ROWS))


@triton.jit
def dequantize(
    rounded, scale, largest, SPEC: tl.constexpr, CODED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Dequantize: float32 in patches, NaN in blocks that are not finite."""
    power = tl.where(largest < INFINITY, power_of_two(scale).to(tl.int32, bitcast=True), NAN)
    if CODED:
        rounded = decoded(rounded, SPEC)
    return in_patches(rounded * power.to(tl.float32, bitcast=True), ROWS, COLUMNS)
