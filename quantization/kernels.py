"""The quantizers as Triton kernels: what `reference.py` computes, bit for bit.

A tensor X, W or G feeds two products, one with blocks along its rows and one with blocks along its columns. `_prepare`
reads a tile of it once, quantizes it for either product or for both, and writes each result as numbers or packed: codes
of 4 bits, two to a byte, and a byte of scale a block. `_expand` turns packed tensors into what a product reads.

Why the bits are those of the reference:
- every multiplication is by a power of two and every sum is exact, or is far from where a decision changes; so
  contracting a product and a sum into one operation changes nothing either;
- block maxima are taken over the bits of |x| as integers, whose order is finite < Inf < NaN: a NaN cannot get lost;
- noise is Philox4x32-10 with the counters of `noise.py`, one call for eight elements.

A format's grid is that of a small float. Brought down by a power of two to where its smallest normal number is
float32's, 2^-126, a float32 number has the format's code in its highest bits, and below them its place on the way to
the next code, evenly from zero to the largest. There rounding is integer arithmetic, and needs no table.

Import this module only where Triton is there.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantization.formats import ElementFormat
from quantization.noise import Noise
from quantization.operands import DENSE, NOTHING, PEAKED, codes_shape, lost_in_carrier, scales_shape, window
from quantization.spec import QuantizerSpec, Rounding, ScaleRule

MAX_BLOCK_SIZE = 128
INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Python on the CPU: TRITON_INTERPRET=1

_SIGN = tl.constexpr(-(2**31))
_MAGNITUDE = tl.constexpr(2**31 - 1)
_EXPONENT = tl.constexpr(0x7F800000)
_INFINITY = tl.constexpr(0x7F800000)
_MANTISSA = tl.constexpr(0x7FFFFF)
_NAN = tl.constexpr(0x7FC00000)
_NAN_SCALE = tl.constexpr(255)  # the E8M0 code of a block that is not finite
_INTEGERS_ONLY = tl.constexpr(1.5 * 2.0**23)  # float32 numbers of this size have no fraction


TILE = (32, 64, 1)  # rows, columns and warps of _prepare; measured, see docs/PERFORMANCE.md
EXPAND_TILE = (32, 128, 2)  # of _expand; rows and columns change places where it transposes


class Grid(NamedTuple):
    """A quantizer in the terms of the kernels."""

    emax: int
    step_up_above: int  # the scale is one larger where the mantissa bits of the block's maximum exceed this
    rounding: str
    mantissa_bits: int
    bottom: int  # exponent of the smallest normal number
    max: float
    saturates: bool
    block: int


# ---------------------------------------------------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _to_float32(x):
    """Widen. bfloat16 by its bits: Triton's interpreter, unlike a GPU, loses its subnormal numbers."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _from_float32(x, dtype: tl.constexpr):
    """Narrow. bfloat16 by its bits, here without any loss."""
    if dtype == tl.bfloat16:
        narrow = (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(dtype)
    return narrow


@triton.jit
def _power_of_two(n):
    """2^n, n from -127 to 127, as bits: float32. 2^-127 is a subnormal number."""
    return tl.where(n > -127, (n + 127) << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def _philox(key, c0, c1, c2, c3):
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
def _random_halves(state, stream, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The 16-bit draws `noise.random_bits` makes for a tile, shifted left by 7: (ROWS, COLUMNS) int32."""
    high = tl.load(state + 1) + stream
    row = first_row + tl.arange(0, ROWS)
    call = first_column // 8 + tl.arange(0, COLUMNS // 8)
    c0, c1 = tl.broadcast(call[None, :].to(tl.uint32), row[:, None].to(tl.uint32))
    c2, c3 = (high & 0xFFFFFFFF).to(tl.uint32), ((high >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = _philox(tl.load(state), c0, c1, c2, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (ROWS, COLUMNS // 8, 2, 2): word 2i + j at [..., i, j]
    halves = tl.join(words << 7, words >> 9)  # each word's low and high half
    return tl.reshape((halves & 0x7FFF80).to(tl.int32, bitcast=True), (ROWS, COLUMNS))


@triton.jit
def _scale_exponent(block_max, GRID: tl.constexpr):
    """The exponent s of the scale, from the bits of the block's largest magnitude."""
    step_up = ((block_max & _MANTISSA) > GRID.step_up_above).to(tl.int32)
    s = (block_max >> 23) - 127 - GRID.emax + step_up
    return tl.minimum(tl.maximum(s, -127), 127)


@triton.jit
def _nearest_integer(n):
    """The nearest integer, ties to even, of |n| < 2^22: the first sum rounds, the second is exact."""
    return (n + _INTEGERS_ONLY) - _INTEGERS_ONLY


@triton.jit
def _round_nearest(latent, shadow, GRID: tl.constexpr):
    """Round x / S to the grid: float32, the sign kept also at zero. `shadow` (over S) as in the reference, or None."""
    sign = latent.to(tl.int32, bitcast=True) & _SIGN
    if GRID.saturates:
        latent = tl.minimum(tl.maximum(latent, -GRID.max), GRID.max)

    # The gap of the grid is 2^(exponent - mantissa bits), the exponent being at least that of the smallest normal.
    BOTTOM: tl.constexpr = (GRID.bottom + 127) << 23
    binade = tl.maximum(latent.to(tl.int32, bitcast=True) & _EXPONENT, BOTTOM)
    if GRID.rounding == "nearest_even" and GRID.mantissa_bits > 0 and shadow is None:
        # 1.5 * 2^23 gaps: the sum is a whole number of gaps, whose parity is that of the code.
        anchor = (binade + ((23 - GRID.mantissa_bits) * (1 << 23) + (1 << 22))).to(tl.float32, bitcast=True)
        rounded = (latent + anchor) - anchor
    else:
        gap = binade.to(tl.float32, bitcast=True) * (1.0 / (1 << GRID.mantissa_bits))
        gaps_per_one = (-(binade - (GRID.mantissa_bits << 23)) + (254 << 23)).to(tl.float32, bitcast=True)
        n = tl.abs(latent) * gaps_per_one
        # The integer below: n - 1 for odd n, from where each rounding then goes up to n. Where n - 0.5 is not exact
        # it lies between -0.5 and -0.25, and the integer is 0.
        lower = _nearest_integer(n - 0.5)
        target = n
        if shadow is not None:
            lower += tl.where(n - lower == 1.0, 1.0, 0.0)  # here the pair must begin with n itself
            target = (shadow.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True) * gaps_per_one
        midpoint = lower + 0.5
        if GRID.rounding == "nearest_away":
            up = target >= midpoint
        else:
            if GRID.rounding == "nearest_up":
                tie_goes_up = sign == 0
            else:
                integer = (lower + _INTEGERS_ONLY).to(tl.int32, bitcast=True)  # in its lowest bits
                code = integer + (((binade - BOTTOM) >> 23) << GRID.mantissa_bits)
                tie_goes_up = (code & 1) == 1
            up = (target > midpoint) | ((target == midpoint) & tie_goes_up)
        rounded = tl.where(up, lower + 1.0, lower) * gap
        if shadow is not None:
            rounded = tl.minimum(rounded, GRID.max)  # the largest magnitude has no upper neighbour
    magnitude = rounded.to(tl.int32, bitcast=True) & _MAGNITUDE
    return (magnitude | sign).to(tl.float32, bitcast=True)


@triton.jit
def _coded(latent, GRID: tl.constexpr):
    """Bring x / S down to where the smallest normal number is 2^-126: its bits, int32."""
    return (latent * tl.constexpr(2.0 ** (-126 - GRID.bottom))).to(tl.int32, bitcast=True)


@triton.jit
def _decoded(bits, GRID: tl.constexpr):
    """Undo `_coded`: float32."""
    return bits.to(tl.float32, bitcast=True) * tl.constexpr(2.0 ** (126 + GRID.bottom))


@triton.jit
def _round_stochastic(latent, halves, GRID: tl.constexpr):
    """Round x / S up where place + u > 1, u = (half + 1/2) / 2^16; bits as `_coded` has them."""
    if GRID.saturates:
        latent = tl.minimum(tl.maximum(latent, -GRID.max), GRID.max)
    PLACE: tl.constexpr = 23 - GRID.mantissa_bits  # bits of a float32 below the format's
    noise = (halves >> GRID.mantissa_bits) | ((1 << (PLACE - 17)) - 1)
    return (_coded(latent, GRID) + noise) & -(1 << PLACE)


@triton.jit
def _quantize_tile(
    x,
    shadow,
    halves,
    GRID: tl.constexpr,
    AXIS: tl.constexpr,
    CODED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize a tile (ROWS, COLUMNS) of float32 in blocks along AXIS.

    Returns Q(x) / S, or if CODED its bits as `_coded` has them, the exponents of the scales (a dimension of 1 where the
    block was) and whether each block is finite, all with blocks in a dimension of their own.
    """
    D0: tl.constexpr = ROWS // GRID.block if AXIS == 0 else ROWS
    D1: tl.constexpr = GRID.block if AXIS == 0 else COLUMNS // GRID.block
    D2: tl.constexpr = COLUMNS if AXIS == 0 else GRID.block
    ALONG: tl.constexpr = 1 if AXIS == 0 else 2
    x = tl.reshape(x, (D0, D1, D2))
    block_max = tl.max(x.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=ALONG, keep_dims=True)
    largest = block_max
    s = _scale_exponent(block_max, GRID)
    to_latent = _power_of_two(-s)
    if shadow is not None:
        shadow = tl.reshape(shadow, (D0, D1, D2))
        shadow_max = tl.max(shadow.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=ALONG, keep_dims=True)
        largest = tl.maximum(largest, shadow_max)
        shadow = shadow * to_latent
    if GRID.rounding == "stochastic":
        rounded = _round_stochastic(x * to_latent, tl.reshape(halves, (D0, D1, D2)), GRID)
        if not CODED:
            rounded = _decoded(rounded, GRID)
    else:
        rounded = _round_nearest(x * to_latent, shadow, GRID)
        if CODED:
            rounded = _coded(rounded, GRID)
    return rounded, s, largest < _INFINITY


@triton.jit
def _values(rounded, s, finite, GRID: tl.constexpr, CODED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Dequantize: (ROWS, COLUMNS) float32, NaN in blocks that are not finite."""
    scale = tl.where(finite, _power_of_two(s).to(tl.int32, bitcast=True), _NAN).to(tl.float32, bitcast=True)
    if CODED:
        rounded = _decoded(rounded, GRID)
    return tl.reshape(rounded * scale, (ROWS, COLUMNS))


@triton.jit
def _store_packed(
    bits,
    s,
    finite,
    codes_ptr,
    scales_ptr,
    peak_ptr,
    first_row,
    first_column,
    rows,
    columns,
    GRID: tl.constexpr,
    AXIS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write codes, (rows, half the columns) bytes, the left of two in the low half; and scales + 127, one row of bytes
    for all blocks with the same number along AXIS. `peak_ptr`, if not None: the largest s + 127 of finite blocks."""
    # A code's three bits come to bits 0 and 4, its sign first to SIGN and SIGN + 4, then to bits 3 and 7. The masks
    # keep a NaN, whose codes do not matter, out of its neighbour's.
    PLACE: tl.constexpr = 23 - GRID.mantissa_bits
    SIGN: tl.constexpr = 31 - PLACE
    left, right = tl.split(tl.reshape(bits.to(tl.uint32, bitcast=True), (ROWS, COLUMNS // 2, 2)))
    both = ((left >> PLACE) & (7 | (1 << SIGN))) | ((right >> (PLACE - 4)) & ((7 | (1 << SIGN)) << 4))
    two = (both & 0x77) | ((both >> (SIGN - 3)) & 0x88)
    row = first_row + tl.arange(0, ROWS)[:, None]
    pair = first_column // 2 + tl.arange(0, COLUMNS // 2)[None, :]
    half = (columns + 1) // 2
    inside = (row < rows) & (pair < half)
    tl.store(codes_ptr + row.to(tl.int64) * half + pair, two.to(tl.uint8), mask=inside)

    code = tl.where(finite, s + 127, _NAN_SCALE).to(tl.uint8)
    if AXIS == 0:
        block = first_row // GRID.block + tl.arange(0, ROWS // GRID.block)[:, None]
        place = first_column + tl.arange(0, COLUMNS)[None, :]
        here = (block < tl.cdiv(rows, GRID.block)) & (place < columns)
        code = tl.reshape(code, (ROWS // GRID.block, COLUMNS))
        length = columns
    else:
        block = first_column // GRID.block + tl.arange(0, COLUMNS // GRID.block)[None, :]
        place = first_row + tl.arange(0, ROWS)[:, None]
        here = (block < tl.cdiv(columns, GRID.block)) & (place < rows)
        code = tl.reshape(code, (ROWS, COLUMNS // GRID.block))
        length = rows
    tl.store(scales_ptr + block.to(tl.int64) * length + place, code, mask=here)
    if peak_ptr is not None:
        peak = tl.where(finite, s + 127, 0)
        tl.atomic_max(peak_ptr, tl.max(tl.max(tl.max(peak, axis=2), axis=1), axis=0), sem="relaxed")


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "row_stream", "column_stream"])
def _prepare(
    x_ptr,
    shadow_ptr,  # shadow weight, for the first quantizer there is, or None
    state_ptr,  # of the noise, or None
    row_stream,
    column_stream,
    row_values,  # each output is a pointer or None
    row_codes,
    row_scales,
    column_values,
    column_codes,
    column_scales,
    sums_ptr,
    peaks_ptr,
    rows,
    columns,
    ROW: tl.constexpr,  # Grid of the quantizer with blocks along rows, or None
    COLUMN: tl.constexpr,  # of that with blocks along columns, or None
    CHAINED: tl.constexpr,  # the column quantizer reads the row quantizer's output
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """One tile of (TILE_ROWS, TILE_COLUMNS), in which no block is cut; what lies outside the matrix counts as zero."""
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    tile_row = tl.program_id(0) // tiles_across
    first_row = tile_row * TILE_ROWS
    first_column = tl.program_id(0) % tiles_across * TILE_COLUMNS
    row = first_row + tl.arange(0, TILE_ROWS)[:, None]
    column = first_column + tl.arange(0, TILE_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    offset = row.to(tl.int64) * columns + column
    x = _to_float32(tl.load(x_ptr + offset, mask=inside, other=0.0))

    if sums_ptr is not None:
        place = first_column + tl.arange(0, TILE_COLUMNS)
        tl.store(sums_ptr + tile_row.to(tl.int64) * columns + place, tl.sum(x, axis=0), mask=place < columns)

    shadow = None
    if shadow_ptr is not None:
        shadow = _to_float32(tl.load(shadow_ptr + offset, mask=inside, other=0.0))

    if ROW is not None:
        halves = None
        if ROW.rounding == "stochastic":
            halves = _random_halves(state_ptr, row_stream, first_row, first_column, TILE_ROWS, TILE_COLUMNS)
        CODED: tl.constexpr = row_codes is not None
        rounded, s, finite = _quantize_tile(x, shadow, halves, ROW, 1, CODED, TILE_ROWS, TILE_COLUMNS)
        shadow = None
        if CODED:
            _store_packed(
                rounded, s, finite, row_codes, row_scales, peaks_ptr, first_row, first_column, rows, columns,
                ROW, 1, TILE_ROWS, TILE_COLUMNS,
            )  # fmt: skip
        if row_values is not None or CHAINED:
            y = _values(rounded, s, finite, ROW, CODED, TILE_ROWS, TILE_COLUMNS)
            if row_values is not None:
                tl.store(row_values + offset, _from_float32(y, row_values.dtype.element_ty), mask=inside)
            if CHAINED:
                x = y

    if COLUMN is not None:
        halves = None
        if COLUMN.rounding == "stochastic":
            halves = _random_halves(state_ptr, column_stream, first_row, first_column, TILE_ROWS, TILE_COLUMNS)
        CODED2: tl.constexpr = column_codes is not None
        rounded, s, finite = _quantize_tile(x, shadow, halves, COLUMN, 0, CODED2, TILE_ROWS, TILE_COLUMNS)
        if CODED2:
            peak = None if peaks_ptr is None else peaks_ptr + 1
            _store_packed(
                rounded, s, finite, column_codes, column_scales, peak, first_row, first_column, rows, columns,
                COLUMN, 0, TILE_ROWS, TILE_COLUMNS,
            )  # fmt: skip
        else:
            z = _values(rounded, s, finite, COLUMN, CODED2, TILE_ROWS, TILE_COLUMNS)
            tl.store(column_values + offset, _from_float32(z, column_values.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _expand(
    codes_ptr,
    scales_ptr,
    out_ptr,
    peak_ptr,  # with a window: the largest s + 127 of the tensor, or None
    factor_ptr,  # gets the power of two that the output is to be multiplied by
    lost_ptr,  # gets the count of elements that the window has changed added
    rows,
    columns,
    out_stride,  # from one row of the output to the next
    GRID: tl.constexpr,
    AXIS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TOP: tl.constexpr,  # the largest s that the output's dtype holds all codes of, and the smallest
    LOWEST: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Codes and scales to numbers of out's dtype; (rows, columns), or (columns, rows) if TRANSPOSED. Columns of the
    output beyond those get zeros, up to out_stride."""
    if TRANSPOSED:
        tiles_along = tl.cdiv(out_stride, TILE_ROWS)
        first_row = tl.program_id(0) % tiles_along * TILE_ROWS
        first_column = tl.program_id(0) // tiles_along * TILE_COLUMNS
    else:
        tiles_along = tl.cdiv(out_stride, TILE_COLUMNS)
        first_row = tl.program_id(0) // tiles_along * TILE_ROWS
        first_column = tl.program_id(0) % tiles_along * TILE_COLUMNS
    row = first_row + tl.arange(0, TILE_ROWS)[:, None]
    pair = first_column // 2 + tl.arange(0, TILE_COLUMNS // 2)[None, :]
    half = (columns + 1) // 2
    inside = (row < rows) & (pair < half)
    two = tl.load(codes_ptr + row.to(tl.int64) * half + pair, mask=inside, other=0).to(tl.int32)
    four = tl.reshape(tl.join(two & 15, two >> 4), (TILE_ROWS, TILE_COLUMNS))
    bits = ((four & 8) << 28) | ((four & 7) << (23 - GRID.mantissa_bits))

    if AXIS == 0:
        block = first_row // GRID.block + tl.arange(0, TILE_ROWS // GRID.block)[:, None]
        place = first_column + tl.arange(0, TILE_COLUMNS)[None, :]
        here = (block < tl.cdiv(rows, GRID.block)) & (place < columns)
        length = columns
    else:
        block = first_column // GRID.block + tl.arange(0, TILE_COLUMNS // GRID.block)[None, :]
        place = first_row + tl.arange(0, TILE_ROWS)[:, None]
        here = (block < tl.cdiv(columns, GRID.block)) & (place < rows)
        length = rows
    code = tl.load(scales_ptr + block.to(tl.int64) * length + place, mask=here, other=0).to(tl.int32)
    s = code - 127
    D0: tl.constexpr = TILE_ROWS // GRID.block if AXIS == 0 else TILE_ROWS
    D1: tl.constexpr = GRID.block if AXIS == 0 else TILE_COLUMNS // GRID.block
    D2: tl.constexpr = TILE_COLUMNS if AXIS == 0 else GRID.block
    if peak_ptr is not None:
        shift = TOP - (tl.load(peak_ptr) - 127)
        if tl.program_id(0) == 0:
            tl.store(factor_ptr, _power_of_two(tl.minimum(tl.maximum(-shift, -127), 127)))
        s = tl.minimum(tl.maximum(s + shift, -127), 127)
        if tl.min(tl.min(tl.where(here, s, 127), axis=1), axis=0) < LOWEST:
            # Count what the cast below will change: a whole number of the smallest steps is what it keeps.
            small = tl.reshape(tl.where(s < LOWEST, s - LOWEST, 0), (D0, D2 if AXIS == 0 else D1))
            small = tl.reshape(small, (D0, 1, D2) if AXIS == 0 else (D0, D1, 1))
            n = tl.abs(_decoded(tl.reshape(bits, (D0, D1, D2)), GRID))
            n = n * tl.constexpr(2.0 ** (GRID.mantissa_bits - GRID.bottom)) * _power_of_two(tl.maximum(small, -127))
            changed = (_nearest_integer(n) != n).to(tl.int64)
            tl.atomic_add(lost_ptr, tl.sum(tl.sum(tl.sum(changed, axis=2), axis=1), axis=0), sem="relaxed")
    scale = tl.where(code != _NAN_SCALE, _power_of_two(s).to(tl.int32, bitcast=True), _NAN)
    scale = tl.reshape(scale.to(tl.float32, bitcast=True), (D0, 1, D2) if AXIS == 0 else (D0, D1, 1))
    values = tl.reshape(_decoded(tl.reshape(bits, (D0, D1, D2)), GRID) * scale, (TILE_ROWS, TILE_COLUMNS))
    values = _from_float32(values, out_ptr.dtype.element_ty)
    if TRANSPOSED:
        out_row = first_column + tl.arange(0, TILE_COLUMNS)[:, None]
        out_column = first_row + tl.arange(0, TILE_ROWS)[None, :]
        mask = (out_row < columns) & (out_column < out_stride)
        tl.store(out_ptr + out_row.to(tl.int64) * out_stride + out_column, tl.trans(values), mask=mask)
    else:
        out_column = first_column + tl.arange(0, TILE_COLUMNS)[None, :]
        mask = (row < rows) & (out_column < out_stride)
        tl.store(out_ptr + row.to(tl.int64) * out_stride + out_column, values, mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Launching them
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _grid(fmt: ElementFormat, scale_rule: ScaleRule, rounding: Rounding, block_size: int) -> Grid:
    bits = fmt.mantissa_bits
    return Grid(
        emax=fmt.emax,
        step_up_above=round((fmt.max_significand - 1) * 2**23) if scale_rule == "truncation_free" else 2**23,
        rounding=rounding,
        mantissa_bits=bits,
        bottom=math.frexp(fmt.magnitudes[1])[1] - 1 + bits,
        max=float(fmt.max),
        saturates=scale_rule == "floor",
        block=block_size,
    )


def _grid_of(spec: QuantizerSpec) -> Grid:
    return _grid(spec.format, spec.scale_rule, spec.rounding, spec.block_size)


def supports(x: Tensor, fmt: ElementFormat, axis: int, block_size: int) -> bool:
    """Whether `quantize` takes these arguments: blocks of 1, 2, 4, ..., 128 along rows or along a matrix's columns."""
    along_rows = axis in (-1, x.dim() - 1)
    power_of_two = block_size & (block_size - 1) == 0
    return (
        (along_rows or x.dim() == 2)
        and power_of_two
        and block_size <= MAX_BLOCK_SIZE
        and fmt.emax >= 1  # else the largest scale is too small for float32
        and fmt.magnitudes[1] >= 2.0**-6  # else the smallest results are none of bfloat16's
        and fmt.mantissa_bits is not None
    )


def quantize(
    x: Tensor,
    fmt: ElementFormat,
    scale_rule: ScaleRule,
    rounding: Rounding,
    axis: int,
    block_size: int,
    noise: Noise | None = None,
    shadow: Tensor | None = None,
) -> Tensor:
    """`reference.quantize` on a GPU, for what `supports` admits: same arguments, same bits (of a NaN: a NaN)."""
    grid = _grid(fmt, scale_rule, rounding, block_size)
    row, column = (grid, None) if axis in (-1, x.dim() - 1) else (None, grid)
    state, stream = (None, 0) if noise is None else noise
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    outputs = (out, None, None, None, None, None) if row else (None, None, None, out, None, None)
    _launch(x, shadow, state, stream, stream, outputs, None, None, row, column, False)
    return out


def _launch(
    x: Tensor,
    shadow: Tensor | None,
    state: Tensor | None,
    row_stream: int,
    column_stream: int,
    outputs: tuple[Tensor | None, ...],
    sums: Tensor | None,
    peaks: Tensor | None,
    row: Grid | None,
    column: Grid | None,
    chained: bool,
) -> None:
    x = x.contiguous()
    shadow = None if shadow is None else shadow.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    block = max(32, row.block if row else 0, column.block if column else 0)
    tile_rows, tile_columns, warps = TILE if block == 32 else (block, block, 1)
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns),)
    with torch.cuda.device_of(x):
        _prepare[grid](
            x, shadow, state, row_stream, column_stream, *outputs, sums, peaks, rows, columns,
            row, column, chained, tile_rows, tile_columns, num_warps=warps,
        )  # fmt: skip


def prepare(
    x: Tensor,
    row: QuantizerSpec | None,
    column: QuantizerSpec | None,
    forms: tuple[str, str],
    dtype: torch.dtype,
    *,
    chained: bool = False,
    sums: bool = False,
    state: Tensor | None = None,
    streams: tuple[int, int] = (0, 0),
    shadow: Tensor | None = None,
) -> list[Tensor]:
    """`operands.prepare` for a matrix on a GPU: both quantizers in one pass."""
    (rows, columns), device = x.shape, x.device
    outputs: list[Tensor | None] = []
    for spec, form in ((row, forms[0]), (column, forms[1])):
        values = codes = scales = None
        if form == DENSE:
            values = torch.empty(rows, columns, dtype=dtype, device=device)
        elif form != NOTHING:
            codes = torch.empty(codes_shape(rows, columns), dtype=torch.uint8, device=device)
            scales = torch.empty(scales_shape(rows, columns, spec), dtype=torch.uint8, device=device)
        outputs += [values, codes, scales]
    peaks = torch.zeros(2, dtype=torch.int32, device=device) if PEAKED in forms else None
    partial = torch.empty(triton.cdiv(rows, TILE[0]), columns, device=device) if sums else None
    grids = [None if spec is None else _grid_of(spec) for spec in (row, column)]
    _launch(x, shadow, state, *streams, tuple(outputs), partial, peaks, *grids, chained)
    return [t for t in (*outputs, peaks, None if partial is None else partial.sum(0)) if t is not None]


def expand(
    codes: Tensor,
    scales: Tensor,
    peak: Tensor | None,
    spec: QuantizerSpec,
    columns: int,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    pad: int = 1,
) -> list[Tensor]:
    """`operands.expand` on a GPU."""
    rows, device = codes.shape[0], codes.device
    out_rows, length = (columns, rows) if transposed else (rows, columns)
    stride = triton.cdiv(length, pad) * pad
    out = torch.empty(out_rows, stride, dtype=dtype, device=device)
    factor = lost = None
    top = lowest = 0
    if peak is not None:
        factor, lost = torch.empty((), device=device), lost_in_carrier(device)
        top, lowest = window(spec.format, dtype)
    tile_rows, tile_columns, warps = EXPAND_TILE
    if transposed:
        tile_rows, tile_columns = tile_columns, tile_rows
        tiles = triton.cdiv(stride, tile_rows) * triton.cdiv(columns, tile_columns)
    else:
        tiles = triton.cdiv(rows, tile_rows) * triton.cdiv(stride, tile_columns)
    with torch.cuda.device_of(codes):
        _expand[(tiles,)](
            codes, scales, out, peak, factor, lost, rows, columns, stride, _grid_of(spec), 0 if spec.axis == 0 else 1,
            transposed, top, lowest, tile_rows, tile_columns, num_warps=warps,
        )  # fmt: skip
    return [out] if factor is None else [out, factor]
