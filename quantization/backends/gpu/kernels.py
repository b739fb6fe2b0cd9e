"""The quantizers as Triton kernels: what `reference.py` computes, bit for bit.

A tensor X, W or G feeds two products, one with blocks along its rows and one with blocks along its columns.
`prepare_kernel` reads a tile of it once, quantizes it for either product or for both, and writes each result as
numbers, as fp8 numbers within a window, or packed: codes of 4 bits, two to a byte, and a byte of scale a block.
`survey_kernel` finds the largest magnitude that the window hangs from, `expand_kernel` turns packed tensors into
numbers, `total_kernel` adds up the column sums of all tiles. What is done to a tile is in tiles.py.

Import this module only where Triton is there; launch.py launches the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantization.backends.gpu.tiles import (
    INFINITY,
    MAGNITUDE,
    NAN,
    NAN_SCALE,
    PATCH_COLUMNS,
    PATCH_ROWS,
    column_numbers,
    decoded,
    dequantize,
    from_float32,
    power_of_two,
    quantize_tile,
    random_halves,
    row_numbers,
    scale_code,
    to_float32,
)


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
    SPEC: tl.constexpr,
    AXIS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write codes, (rows, half the columns) bytes, the left of two in the low half; and the scales' codes, one row of
    bytes for all blocks with the same number along AXIS."""
    # A code's three bits come to bits 0 and 4, its sign first to SIGN and SIGN + 4, then to bits 3 and 7. The masks
    # keep a NaN, whose codes do not matter, out of its neighbour's.
    PLACE: tl.constexpr = 23 - SPEC.mantissa_bits
    SIGN: tl.constexpr = 31 - PLACE
    PAIRS: tl.constexpr = PATCH_COLUMNS // 2  # of a row of a patch
    bits = bits.to(tl.uint32, bitcast=True)
    bits = tl.reshape(bits, (COLUMNS // PATCH_COLUMNS, ROWS // PATCH_ROWS, PAIRS, 2, PATCH_ROWS))
    left, right = tl.split(tl.permute(bits, (0, 1, 2, 4, 3)))
    both = ((left >> PLACE) & (7 | (1 << SIGN))) | ((right >> (PLACE - 4)) & ((7 | (1 << SIGN)) << 4))
    two = (both & 0x77) | ((both >> (SIGN - 3)) & 0x88)
    row = row_numbers(first_row, ROWS)
    pair = column_numbers(first_column // 2, COLUMNS // 2, PAIRS)
    half = (columns + 1) // 2
    inside = (row < rows) & (pair < half)
    tl.store(codes_ptr + row.to(tl.int64) * half + pair, two.to(tl.uint8), mask=inside)

    code = tl.where(largest < INFINITY, scale, NAN_SCALE).to(tl.uint8)
    if AXIS == 0:
        BLOCKS: tl.constexpr = ROWS // SPEC.block
        code = tl.reshape(code, (COLUMNS // PATCH_COLUMNS, BLOCKS, PATCH_COLUMNS, 1))
        block = first_row // SPEC.block + tl.arange(0, BLOCKS)[None, :, None, None]
        place = column_numbers(first_column, COLUMNS)
        here = (block < tl.cdiv(rows, SPEC.block)) & (place < columns)
        length = columns
    else:
        BLOCKS: tl.constexpr = COLUMNS // SPEC.block
        code = tl.reshape(code, (BLOCKS, ROWS // PATCH_ROWS, 1, PATCH_ROWS))
        block = first_column // SPEC.block + tl.arange(0, BLOCKS)[:, None, None, None]
        place = row
        here = (block < tl.cdiv(columns, SPEC.block)) & (place < rows)
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
    row, column = row_numbers(first_row, ROWS), column_numbers(first_column, COLUMNS)
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
    SPEC: tl.constexpr,
    LOWEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Q(x) 2^shift in float32; counts the blocks below the window, which fp8 may change."""
    # Blocks of zeros, which have the smallest scale, do not count, nor the few others that have it.
    below = (scale > 0) & (scale < LOWEST + 127 - shift) & (largest < INFINITY)
    if lost_ptr is not None:
        count = below.to(tl.int32)
        for axis in tl.static_range(6):
            count = tl.sum(count, axis=5 - axis)
        if count > 0:
            tl.atomic_add(lost_ptr, count.to(tl.int64), sem="relaxed")
    return dequantize(rounded, tl.minimum(tl.maximum(scale + shift, 0), 254), largest, SPEC, False, ROWS, COLUMNS)


@triton.jit
def quantize_for_one(
    x,  # the tile, float32 in patches
    shadow,
    state_ptr,
    stream,
    values_ptr,  # each output is a pointer or None
    codes_ptr,
    scales_ptr,
    carried_ptr,
    carried_stride,
    lost_ptr,
    shift,
    first_row,
    first_column,
    rows,
    columns,
    SPEC: tl.constexpr,
    AXIS: tl.constexpr,
    NUMBERS: tl.constexpr,  # whether the result is wanted as float32 too
    LOWEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize a tile in blocks along AXIS and write it in the forms asked for; returns its numbers if NUMBERS."""
    halves = None
    if SPEC.rounding == "stochastic":
        halves = random_halves(state_ptr, stream, first_row, first_column, ROWS, COLUMNS)
    CODED: tl.constexpr = codes_ptr is not None
    rounded, scale, largest = quantize_tile(x, shadow, halves, SPEC, AXIS, CODED)
    if CODED:
        _store_packed(
            rounded, scale, largest, codes_ptr, scales_ptr, first_row, first_column, rows, columns,
            SPEC, AXIS, ROWS, COLUMNS,
        )  # fmt: skip
    if carried_ptr is not None:
        carried = _into_window(rounded, scale, largest, shift, lost_ptr, SPEC, LOWEST, ROWS, COLUMNS)
        _store_carried(
            carried, carried_ptr, first_row, first_column, rows, columns, carried_stride, AXIS == 0, ROWS, COLUMNS
        )
    if values_ptr is not None or NUMBERS:
        x = dequantize(rounded, scale, largest, SPEC, CODED, ROWS, COLUMNS)
        if values_ptr is not None:
            row, column = row_numbers(first_row, ROWS), column_numbers(first_column, COLUMNS)
            offset = row.to(tl.int64) * columns + column
            inside = (row < rows) & (column < columns)
            tl.store(values_ptr + offset, from_float32(x, values_ptr.dtype.element_ty), mask=inside)
    return x


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
    row_carried,
    column_values,
    column_codes,
    column_scales,
    column_carried,
    sums_ptr,
    peak_ptr,  # with carried outputs: bits of the largest finite magnitude
    factor_ptr,  # gets the power of two that carried outputs are to be multiplied by
    lost_ptr,  # has the count of blocks below the window added, or None
    rows,
    columns,
    row_stride,  # of the carried outputs
    column_stride,
    ROW: tl.constexpr,  # KernelSpec of the quantizer with blocks along rows, or None
    COLUMN: tl.constexpr,  # of that with blocks along columns, or None
    CHAINED: tl.constexpr,  # the column quantizer reads the row quantizer's output
    WINDOW: tl.constexpr,  # (TOP, LOWEST) of job.window with carried outputs, or None
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """One tile of (TILE_ROWS, TILE_COLUMNS), in which no block is cut; what lies outside the matrix counts as zero."""
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    tile_row = tl.program_id(0) // tiles_across
    first_row = tile_row * TILE_ROWS
    first_column = tl.program_id(0) % tiles_across * TILE_COLUMNS
    row, column = row_numbers(first_row, TILE_ROWS), column_numbers(first_column, TILE_COLUMNS)
    inside = (row < rows) & (column < columns)
    offset = row.to(tl.int64) * columns + column
    x = to_float32(tl.load(x_ptr + offset, mask=inside, other=0.0))

    if sums_ptr is not None:
        sums = tl.sum(tl.sum(x, axis=3, keep_dims=True), axis=1, keep_dims=True)
        tl.store(sums_ptr + tile_row.to(tl.int64) * columns + column, sums, mask=column < columns)

    shadow = None
    if shadow_ptr is not None:
        shadow = to_float32(tl.load(shadow_ptr + offset, mask=inside, other=0.0))

    shift = 0
    LOWEST: tl.constexpr = 0 if WINDOW is None else WINDOW[1]
    if peak_ptr is not None:
        FIRST: tl.constexpr = COLUMN if ROW is None else ROW
        # Above 127 the factor would be too small.
        shift = tl.minimum(WINDOW[0] + 127 - scale_code(tl.load(peak_ptr), FIRST), 127)
        if tl.program_id(0) == 0:
            tl.store(factor_ptr, power_of_two(127 - shift))

    if ROW is not None:
        y = quantize_for_one(
            x, shadow, state_ptr, row_stream, row_values, row_codes, row_scales, row_carried, row_stride, lost_ptr,
            shift, first_row, first_column, rows, columns, ROW, 1, CHAINED, LOWEST, TILE_ROWS, TILE_COLUMNS,
        )  # fmt: skip
        shadow = None
        if CHAINED:
            x = y
    if COLUMN is not None:
        quantize_for_one(
            x, shadow, state_ptr, column_stream, column_values, column_codes, column_scales, column_carried,
            column_stride, lost_ptr, shift, first_row, first_column, rows, columns, COLUMN, 0, False, LOWEST,
            TILE_ROWS, TILE_COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def survey_kernel(x_ptr, peak_ptr, sums_ptr, rows, columns, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """The bits of the largest finite magnitude (peak_ptr starts at 0), and sums over TILE_ROWS rows (or None)."""
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    tile_row = tl.program_id(0) // tiles_across
    first_column = tl.program_id(0) % tiles_across * TILE_COLUMNS
    row = tile_row * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    column = first_column + tl.arange(0, TILE_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    x = to_float32(tl.load(x_ptr + row.to(tl.int64) * columns + column, mask=inside, other=0.0))
    bits = x.to(tl.int32, bitcast=True) & MAGNITUDE
    finite = tl.reshape(tl.where(bits < INFINITY, bits, 0), (TILE_ROWS * TILE_COLUMNS,), can_reorder=True)
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
    SPEC: tl.constexpr,
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
    bits = ((four & 8) << 28) | ((four & 7) << (23 - SPEC.mantissa_bits))

    D0: tl.constexpr = TILE_ROWS // SPEC.block if AXIS == 0 else TILE_ROWS
    D1: tl.constexpr = SPEC.block if AXIS == 0 else TILE_COLUMNS // SPEC.block
    D2: tl.constexpr = TILE_COLUMNS if AXIS == 0 else SPEC.block
    if AXIS == 0:
        block = first_row // SPEC.block + tl.arange(0, D0)[:, None]
        place = first_column + tl.arange(0, TILE_COLUMNS)[None, :]
        here = (block < tl.cdiv(rows, SPEC.block)) & (place < columns)
        length = columns
    else:
        block = first_column // SPEC.block + tl.arange(0, D1)[None, :]
        place = first_row + tl.arange(0, TILE_ROWS)[:, None]
        here = (block < tl.cdiv(columns, SPEC.block)) & (place < rows)
        length = rows
    code = tl.load(scales_ptr + block.to(tl.int64) * length + place, mask=here, other=0).to(tl.int32)
    code = tl.reshape(code, (D0, 1, D2) if AXIS == 0 else (D0, D1, 1))
    power = tl.where(code != NAN_SCALE, power_of_two(code).to(tl.int32, bitcast=True), NAN)
    values = decoded(tl.reshape(bits, (D0, D1, D2)), SPEC) * power.to(tl.float32, bitcast=True)
    values = tl.reshape(values, (TILE_ROWS, TILE_COLUMNS))
    column = first_column + tl.arange(0, TILE_COLUMNS)[None, :]
    offset = row.to(tl.int64) * columns + column
    inside = (row < rows) & (column < columns)
    tl.store(out_ptr + offset, from_float32(values, out_ptr.dtype.element_ty), mask=inside)
