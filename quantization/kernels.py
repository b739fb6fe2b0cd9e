"""The quantizers as Triton kernels: what `reference.py` computes, bit for bit.

A tensor X, W or G feeds two products, one with blocks along its rows and one with blocks along its columns.
`prepare_kernel` reads a tile of it once, quantizes it for either product or for both, and writes each result as
numbers, as fp8 numbers within a window, or packed: codes of 4 bits, two to a byte, and a byte of scale a block.
`survey_kernel` finds the largest magnitude that the window hangs from, `expand_kernel` turns packed tensors into
numbers, `total_kernel` adds up the column sums of all tiles.

Why the bits are those of the reference:
- every multiplication is by a power of two and every sum is exact, or is far from where a decision changes; so
  contracting a product and a sum into one operation changes nothing either;
- block maxima are taken over the bits of |x| as integers, whose order is finite < Inf < NaN: a NaN cannot get lost;
- noise is Philox4x32-10 with the counters of `noise.py`, one call for eight elements.

A format's grid is that of a small float. Brought down by a power of two to where its smallest normal number is
float32's, 2^-126, a float32 number has the format's code in its highest bits, and below them its place on the way to
the next code, evenly from zero to the largest. There rounding is integer arithmetic, and needs no table.

In `prepare_kernel` a tile is cut into patches of 4 rows and 8 columns and has the dimensions (COLUMNS // 8, ROWS // 4,
8 columns, 4 rows). Triton then gives each thread whole patches, whichever way a result is written: a row of a patch is
one load and one call of Philox, its maxima and sums begin in registers, and a transposed result needs no exchange
between threads.

Import this module only where Triton is there; launch.py launches the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

_SIGN = tl.constexpr(-(2**31))
_MAGNITUDE = tl.constexpr(2**31 - 1)
_EXPONENT = tl.constexpr(0x7F800000)
_INFINITY = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_NAN_SCALE = tl.constexpr(255)  # the E8M0 code of a block that is not finite
_PATCH_ROWS, _PATCH_COLUMNS = tl.constexpr(4), tl.constexpr(8)
_INTEGERS_ONLY = tl.constexpr(1.5 * 2.0**23)  # float32 numbers of this size have no fraction


class Grid(NamedTuple):
    """A quantizer in the terms of the kernels."""

    emax: int
    carry: int  # added to the bits of the block's maximum, it reaches the exponent where the scale is one larger
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
def _row_numbers(first_row, ROWS: tl.constexpr):
    """The rows of a tile in patches: (1, ROWS // 4, 1, 4)."""
    patch, inside = tl.arange(0, ROWS // _PATCH_ROWS)[None, :, None, None], tl.arange(0, _PATCH_ROWS)[None, None, None]
    return first_row + patch * _PATCH_ROWS + inside


@triton.jit
def _column_numbers(first_column, COLUMNS: tl.constexpr, PATCH: tl.constexpr = _PATCH_COLUMNS):
    """The columns of a tile in patches: (COLUMNS // 8, 1, 8, 1)."""
    patch, inside = tl.arange(0, COLUMNS // PATCH)[:, None, None, None], tl.arange(0, PATCH)[None, None, :, None]
    return first_column + patch * PATCH + inside


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
def _power_of_two(code):
    """2^(code - 127), code from 0 to 254: float32. 2^-127 is a subnormal number."""
    return tl.maximum(code << 23, 1 << 22).to(tl.float32, bitcast=True)


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
    """The 16 bits that `noise.uniform` draws for each element of a tile in patches, shifted left by 7: int32."""
    high = tl.load(state + 1) + stream
    # In the order (4, ROWS // 4, COLUMNS // 8) Triton gives the calls of a patch to the thread that has the patch.
    patch, inside = tl.arange(0, ROWS // _PATCH_ROWS)[None, :, None], tl.arange(0, _PATCH_ROWS)[:, None, None]
    row = first_row + patch * _PATCH_ROWS + inside
    call = first_column // 8 + tl.arange(0, COLUMNS // 8)[None, None, :]
    c0, c1 = tl.broadcast(call.to(tl.uint32), row.to(tl.uint32))
    c2, c3 = (high & 0xFFFFFFFF).to(tl.uint32), ((high >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = _philox(tl.load(state), c0, c1, c2, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (..., 2, 2): word 2i + j at [..., i, j]
    halves = tl.join(words << 7, words >> 9)  # each word's low and high half
    halves = tl.permute((halves & 0x7FFF80).to(tl.int32, bitcast=True), (2, 1, 3, 4, 5, 0))
    return tl.reshape(halves, (COLUMNS // 8, ROWS // _PATCH_ROWS, 8, _PATCH_ROWS))


@triton.jit
def _scale_code(block_max, GRID: tl.constexpr):
    """The E8M0 code of the scale, its exponent + 127, from the bits of the block's largest magnitude; from 0 to 254."""
    return tl.maximum(((block_max + GRID.carry) >> 23) - GRID.emax, 0)


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
        anchor = binade.to(tl.float32, bitcast=True) * (1.5 * 2 ** (23 - GRID.mantissa_bits))
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
def _in_blocks(x, BLOCK: tl.constexpr, AXIS: tl.constexpr):
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
def _block_max(x, AXIS: tl.constexpr):
    """Bits of the largest magnitude of each block of what `_in_blocks` returns, a NaN being the largest of all."""
    bits = x.to(tl.int32, bitcast=True) & _MAGNITUDE
    if AXIS == 1:
        return tl.max(tl.max(bits, axis=4, keep_dims=True), axis=1, keep_dims=True)
    else:
        return tl.max(tl.max(bits, axis=5, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _quantize_tile(x, shadow, halves, GRID: tl.constexpr, AXIS: tl.constexpr, CODED: tl.constexpr):
    """Quantize a tile of float32 in patches, in blocks along AXIS.

    Returns Q(x) / S, or if CODED its bits as `_coded` has them, the codes of the scales and the bits of each block's
    largest magnitude, all as `_in_blocks` has them (dimensions inside a block being 1 of what there is one a block).
    """
    x = _in_blocks(x, GRID.block, AXIS)
    block_max = _block_max(x, AXIS)
    largest = block_max
    scale = _scale_code(block_max, GRID)
    to_latent = _power_of_two(254 - scale)
    if shadow is not None:
        shadow = _in_blocks(shadow, GRID.block, AXIS)
        largest = tl.maximum(largest, _block_max(shadow, AXIS))
        shadow = shadow * to_latent
    if GRID.rounding == "stochastic":
        rounded = _round_stochastic(x * to_latent, _in_blocks(halves, GRID.block, AXIS), GRID)
        if not CODED:
            rounded = _decoded(rounded, GRID)
    else:
        rounded = _round_nearest(x * to_latent, shadow, GRID)
        if CODED:
            rounded = _coded(rounded, GRID)
    return rounded, scale, largest


@triton.jit
def _in_patches(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Undo `_in_blocks`."""
    return tl.reshape(x, (COLUMNS // _PATCH_COLUMNS, ROWS // _PATCH_ROWS, _PATCH_COLUMNS, _PATCH_ROWS))


@triton.jit
def _values(
    rounded, scale, largest, GRID: tl.constexpr, CODED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Dequantize: float32 in patches, NaN in blocks that are not finite."""
    power = tl.where(largest < _INFINITY, _power_of_two(scale).to(tl.int32, bitcast=True), _NAN)
    if CODED:
        rounded = _decoded(rounded, GRID)
    return _in_patches(rounded * power.to(tl.float32, bitcast=True), ROWS, COLUMNS)


@triton.jit
def _store_packed(
    bits,
    scale,
    largest,
    codes_ptr,
    scales_ptr,
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
    for all blocks with the same number along AXIS."""
    # A code's three bits come to bits 0 and 4, its sign first to SIGN and SIGN + 4, then to bits 3 and 7. The masks
    # keep a NaN, whose codes do not matter, out of its neighbour's.
    PLACE: tl.constexpr = 23 - GRID.mantissa_bits
    SIGN: tl.constexpr = 31 - PLACE
    PAIRS: tl.constexpr = _PATCH_COLUMNS // 2  # of a row of a patch
    bits = bits.to(tl.uint32, bitcast=True)
    bits = tl.reshape(bits, (COLUMNS // _PATCH_COLUMNS, ROWS // _PATCH_ROWS, PAIRS, 2, _PATCH_ROWS))
    left, right = tl.split(tl.permute(bits, (0, 1, 2, 4, 3)))
    both = ((left >> PLACE) & (7 | (1 << SIGN))) | ((right >> (PLACE - 4)) & ((7 | (1 << SIGN)) << 4))
    two = (both & 0x77) | ((both >> (SIGN - 3)) & 0x88)
    row = _row_numbers(first_row, ROWS)
    pair = _column_numbers(first_column // 2, COLUMNS // 2, PAIRS)
    half = (columns + 1) // 2
    inside = (row < rows) & (pair < half)
    tl.store(codes_ptr + row.to(tl.int64) * half + pair, two.to(tl.uint8), mask=inside)

    code = tl.where(largest < _INFINITY, scale, _NAN_SCALE).to(tl.uint8)
    if AXIS == 0:
        BLOCKS: tl.constexpr = ROWS // GRID.block
        code = tl.reshape(code, (COLUMNS // _PATCH_COLUMNS, BLOCKS, _PATCH_COLUMNS, 1))
        block = first_row // GRID.block + tl.arange(0, BLOCKS)[None, :, None, None]
        place = _column_numbers(first_column, COLUMNS)
        here = (block < tl.cdiv(rows, GRID.block)) & (place < columns)
        length = columns
    else:
        BLOCKS: tl.constexpr = COLUMNS // GRID.block
        code = tl.reshape(code, (BLOCKS, ROWS // _PATCH_ROWS, 1, _PATCH_ROWS))
        block = first_column // GRID.block + tl.arange(0, BLOCKS)[:, None, None, None]
        place = row
        here = (block < tl.cdiv(columns, GRID.block)) & (place < rows)
        length = rows
    tl.store(scales_ptr + block.to(tl.int64) * length + place, code, mask=here)


@triton.jit
def _store_carried(
    values,
    out_ptr,
    first_row,
    first_column,
    rows,
    columns,
    out_stride,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile of float32 as fp8: (rows, out_stride), or (columns, out_stride) if TRANSPOSED."""
    narrow = values.to(out_ptr.dtype.element_ty)
    row, column = _row_numbers(first_row, ROWS), _column_numbers(first_column, COLUMNS)
    if TRANSPOSED:
        inside = (column < columns) & (row < out_stride)
        offset = column.to(tl.int64) * out_stride + row
    else:
        inside = (row < rows) & (column < out_stride)
        offset = row.to(tl.int64) * out_stride + column
    tl.store(out_ptr + offset, narrow, mask=inside)


@triton.jit
def _into_window(
    rounded,
    scale,
    largest,
    shift,
    lost_ptr,
    GRID: tl.constexpr,
    LOWEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Q(x) 2^shift in float32; counts the blocks below the window, which fp8 may change."""
    # Blocks of zeros, which have the smallest scale, do not count, nor the few others that have it.
    below = (scale > 0) & (scale < LOWEST + 127 - shift) & (largest < _INFINITY)
    count = below.to(tl.int32)
    for axis in tl.static_range(6):
        count = tl.sum(count, axis=5 - axis)
    if count > 0:
        tl.atomic_add(lost_ptr, count.to(tl.int64), sem="relaxed")
    return _values(rounded, tl.minimum(tl.maximum(scale + shift, 0), 254), largest, GRID, False, ROWS, COLUMNS)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "row_stream", "column_stream"])
def prepare_kernel(
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
    row_carried,
    column_carried,
    sums_ptr,
    peak_ptr,  # with carried outputs: bits of the largest finite magnitude
    factor_ptr,  # gets the power of two that carried outputs are to be multiplied by
    lost_ptr,  # has the count of blocks below the window added
    rows,
    columns,
    row_stride,  # of the carried outputs
    column_stride,
    ROW: tl.constexpr,  # Grid of the quantizer with blocks along rows, or None
    COLUMN: tl.constexpr,  # of that with blocks along columns, or None
    CHAINED: tl.constexpr,  # the column quantizer reads the row quantizer's output
    WINDOW: tl.constexpr,  # (TOP, LOWEST) of operands.window with carried outputs, or None
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """One tile of (TILE_ROWS, TILE_COLUMNS), in which no block is cut; what lies outside the matrix counts as zero."""
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    tile_row = tl.program_id(0) // tiles_across
    first_row = tile_row * TILE_ROWS
    first_column = tl.program_id(0) % tiles_across * TILE_COLUMNS
    row, column = _row_numbers(first_row, TILE_ROWS), _column_numbers(first_column, TILE_COLUMNS)
    inside = (row < rows) & (column < columns)
    offset = row.to(tl.int64) * columns + column
    x = _to_float32(tl.load(x_ptr + offset, mask=inside, other=0.0))

    if sums_ptr is not None:
        sums = tl.sum(tl.sum(x, axis=3, keep_dims=True), axis=1, keep_dims=True)
        tl.store(sums_ptr + tile_row.to(tl.int64) * columns + column, sums, mask=column < columns)

    shadow = None
    if shadow_ptr is not None:
        shadow = _to_float32(tl.load(shadow_ptr + offset, mask=inside, other=0.0))

    if peak_ptr is not None:
        FIRST: tl.constexpr = COLUMN if ROW is None else ROW
        # Above 127 the factor would be too small.
        shift = tl.minimum(WINDOW[0] + 127 - _scale_code(tl.load(peak_ptr), FIRST), 127)
        if tl.program_id(0) == 0:
            tl.store(factor_ptr, _power_of_two(127 - shift))

    if ROW is not None:
        halves = None
        if ROW.rounding == "stochastic":
            halves = _random_halves(state_ptr, row_stream, first_row, first_column, TILE_ROWS, TILE_COLUMNS)
        CODED: tl.constexpr = row_codes is not None
        rounded, scale, largest = _quantize_tile(x, shadow, halves, ROW, 1, CODED)
        shadow = None
        if CODED:
            _store_packed(
                rounded, scale, largest, row_codes, row_scales, first_row, first_column, rows, columns,
                ROW, 1, TILE_ROWS, TILE_COLUMNS,
            )  # fmt: skip
        if row_carried is not None:
            values = _into_window(rounded, scale, largest, shift, lost_ptr, ROW, WINDOW[1], TILE_ROWS, TILE_COLUMNS)
            _store_carried(
                values, row_carried, first_row, first_column, rows, columns, row_stride, False, TILE_ROWS, TILE_COLUMNS
            )
        if row_values is not None or CHAINED:
            y = _values(rounded, scale, largest, ROW, CODED, TILE_ROWS, TILE_COLUMNS)
            if row_values is not None:
                tl.store(row_values + offset, _from_float32(y, row_values.dtype.element_ty), mask=inside)
            if CHAINED:
                x = y

    if COLUMN is not None:
        halves = None
        if COLUMN.rounding == "stochastic":
            halves = _random_halves(state_ptr, column_stream, first_row, first_column, TILE_ROWS, TILE_COLUMNS)
        CODED2: tl.constexpr = column_codes is not None
        rounded, scale, largest = _quantize_tile(x, shadow, halves, COLUMN, 0, CODED2)
        if CODED2:
            _store_packed(
                rounded, scale, largest, column_codes, column_scales, first_row, first_column, rows, columns,
                COLUMN, 0, TILE_ROWS, TILE_COLUMNS,
            )  # fmt: skip
        elif column_carried is not None:
            values = _into_window(rounded, scale, largest, shift, lost_ptr, COLUMN, WINDOW[1], TILE_ROWS, TILE_COLUMNS)
            _store_carried(
                values, column_carried, first_row, first_column, rows, columns, column_stride, True,
                TILE_ROWS, TILE_COLUMNS,
            )  # fmt: skip
        else:
            z = _values(rounded, scale, largest, COLUMN, CODED2, TILE_ROWS, TILE_COLUMNS)
            tl.store(column_values + offset, _from_float32(z, column_values.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def survey_kernel(x_ptr, peak_ptr, sums_ptr, rows, columns, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """The bits of the largest finite magnitude (peak_ptr starts at 0), and sums over TILE_ROWS rows (or None)."""
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    tile_row = tl.program_id(0) // tiles_across
    first_column = tl.program_id(0) % tiles_across * TILE_COLUMNS
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    column = first_column + tl.arange(0, TILE_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    x = _to_float32(tl.load(x_ptr + row.to(tl.int64) * columns + column, mask=inside, other=0.0))
    bits = x.to(tl.int32, bitcast=True) & _MAGNITUDE
    finite = tl.reshape(tl.where(bits < _INFINITY, bits, 0), (TILE_ROWS * TILE_COLUMNS,), can_reorder=True)
    largest = tl.max(finite)
    if largest > tl.load(peak_ptr):  # most tiles need not wait for the others at one address
        tl.atomic_max(peak_ptr, largest, sem="relaxed")
    if sums_ptr is not None:
        place = first_column + tl.arange(0, TILE_COLUMNS)
        tl.store(sums_ptr + tile_row.to(tl.int64) * columns + place, tl.sum(x, axis=0), mask=place < columns)


@triton.jit(do_not_specialize=["rows"])
def total_kernel(
    x_ptr, out_ptr, rows, columns, STEPS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):
    """Sum of a float32 matrix over its rows, in an order that does not vary."""
    column = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    total = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for step in range(STEPS):  # not the rows: the interpreter takes no tensor there
        row = step * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
        inside = (row < rows) & (column < columns)
        total += tl.load(x_ptr + row * columns + column, mask=inside, other=0.0)
    place = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    tl.store(out_ptr + place, tl.sum(total, axis=0), mask=place < columns)


@triton.jit(do_not_specialize=["rows"])
def expand_kernel(
    codes_ptr,
    scales_ptr,
    out_ptr,
    rows,
    columns,
    GRID: tl.constexpr,
    AXIS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Codes and scales to numbers of out's dtype, (rows, columns)."""
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    first_row = tl.program_id(0) // tiles_across * TILE_ROWS
    first_column = tl.program_id(0) % tiles_across * TILE_COLUMNS
    row = first_row + tl.arange(0, TILE_ROWS)[:, None]
    pair = first_column // 2 + tl.arange(0, TILE_COLUMNS // 2)[None, :]
    half = (columns + 1) // 2
    two = tl.load(codes_ptr + row.to(tl.int64) * half + pair, mask=(row < rows) & (pair < half), other=0).to(tl.int32)
    four = tl.reshape(tl.join(two & 15, two >> 4), (TILE_ROWS, TILE_COLUMNS))
    bits = ((four & 8) << 28) | ((four & 7) << (23 - GRID.mantissa_bits))

    D0: tl.constexpr = TILE_ROWS // GRID.block if AXIS == 0 else TILE_ROWS
    D1: tl.constexpr = GRID.block if AXIS == 0 else TILE_COLUMNS // GRID.block
    D2: tl.constexpr = TILE_COLUMNS if AXIS == 0 else GRID.block
    if AXIS == 0:
        block = first_row // GRID.block + tl.arange(0, D0)[:, None]
        place = first_column + tl.arange(0, TILE_COLUMNS)[None, :]
        here = (block < tl.cdiv(rows, GRID.block)) & (place < columns)
        length = columns
    else:
        block = first_column // GRID.block + tl.arange(0, D1)[None, :]
        place = first_row + tl.arange(0, TILE_ROWS)[:, None]
        here = (block < tl.cdiv(columns, GRID.block)) & (place < rows)
        length = rows
    code = tl.load(scales_ptr + block.to(tl.int64) * length + place, mask=here, other=0).to(tl.int32)
    code = tl.reshape(code, (D0, 1, D2) if AXIS == 0 else (D0, D1, 1))
    power = tl.where(code != _NAN_SCALE, _power_of_two(code).to(tl.int32, bitcast=True), _NAN)
    values = _decoded(tl.reshape(bits, (D0, D1, D2)), GRID) * power.to(tl.float32, bitcast=True)
    values = tl.reshape(values, (TILE_ROWS, TILE_COLUMNS))
    column = first_column + tl.arange(0, TILE_COLUMNS)[None, :]
    offset = row.to(tl.int64) * columns + column
    inside = (row < rows) & (column < columns)
    tl.store(out_ptr + offset, _from_float32(values, out_ptr.dtype.element_ty), mask=inside)
