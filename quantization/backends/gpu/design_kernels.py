"""The kernels for what design.py does to a tile: rotations, scales that are no powers of two, outer scales.

As `prepare_kernel` it reads a tile once and quantizes it for both of its products. Where a scale of the whole matrix is
needed, `design_kernel` runs before, with PEAKS, and finds the largest magnitude of what a quantizer is to read: so what
this magnitude is of, the rotated matrix or the row quantizer's result, is computed by the same lines.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantization.backends.gpu.design import narrowed, quantized_tile, rotated, rotated_back
from quantization.backends.gpu.kernels import quantize_for_one
from quantization.backends.gpu.tiles import (
    INFINITY,
    MAGNITUDE,
    column_numbers,
    from_float32,
    random_halves,
    row_numbers,
    to_float32,
)


@triton.jit
def _find_peak(x, peak_ptr):
    """Raise the bits at peak_ptr, which start at 0, to those of the largest finite magnitude of a tile in patches."""
    bits = x.to(tl.int32, bitcast=True) & MAGNITUDE
    largest = tl.where(bits < INFINITY, bits, 0)
    for axis in tl.static_range(4):
        largest = tl.max(largest, axis=3 - axis)
    if largest > tl.load(peak_ptr):  # most tiles need not wait for the others at one address
        tl.atomic_max(peak_ptr, largest, sem="relaxed")


@triton.jit
def _quantize_by_design(
    x,
    shadow,
    state_ptr,
    stream,
    values_ptr,
    inside_ptr,
    peak_ptr,
    first_row,
    first_column,
    rows,
    columns,
    SPEC: tl.constexpr,
    BARE: tl.constexpr,  # whether the factor is left out of what is written
    AXIS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize a tile by a DesignSpec and return its numbers, float32.

    Written, where there is a pointer, are the numbers and whether each one was not beyond the largest magnitude.
    """
    halves = None
    if SPEC.stochastic:
        halves = random_halves(state_ptr, stream, first_row, first_column, ROWS, COLUMNS)
    EXACT: tl.constexpr = SPEC.scale != "fp32" and (BARE or SPEC.factor == 1.0)
    bare, within = quantized_tile(x, shadow, halves, peak_ptr, SPEC, EXACT, AXIS, ROWS, COLUMNS)
    values = bare
    if SPEC.factor != 1.0:
        values = bare * SPEC.factor
    row, column = row_numbers(first_row, ROWS), column_numbers(first_column, COLUMNS)
    offset = row.to(tl.int64) * columns + column
    inside = (row < rows) & (column < columns)
    if inside_ptr is not None:
        tl.store(inside_ptr + offset, within, mask=inside)
    if values_ptr is not None:
        if EXACT:
            written = from_float32(bare, values_ptr.dtype.element_ty)
        else:
            written = narrowed(bare if BARE else values, values_ptr.dtype.element_ty)
        tl.store(values_ptr + offset, written, mask=inside)
    return values


@triton.jit(do_not_specialize=["rows", "stream", "row_stream", "column_stream"])
def design_kernel(
    x_ptr,
    shadow_ptr,  # shadow weight, for the first quantizer there is, or None
    state_ptr,  # of the noise, or None
    stream,  # of noise: that of rotations, and those of the quantizers
    row_stream,
    column_stream,
    row_values,  # each output is a pointer or None
    row_codes,
    row_scales,
    column_values,
    column_codes,
    column_scales,
    inside_ptr,  # whether what the row quantizer read was not beyond the largest magnitude, or None
    sums_ptr,
    row_peak,  # bits of the largest finite magnitude that either quantizer reads, or None
    column_peak,
    rows,
    columns,
    ROW: tl.constexpr,  # KernelSpec or DesignSpec of the quantizer with blocks along rows, or None
    COLUMN: tl.constexpr,
    DESIGNS: tl.constexpr,  # which of the two is a DesignSpec
    BARE: tl.constexpr,  # whose values are written without their factor
    CHAINED: tl.constexpr,  # the column quantizer reads the row quantizer's output
    ROW_TURN: tl.constexpr,  # KernelTurn of what either quantizer reads, or None
    COLUMN_TURN: tl.constexpr,
    PEAKS: tl.constexpr,  # which of the two peaks to find; if either, nothing is written
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """One tile, in which no block and no group of a rotation is cut; what lies outside the matrix counts as zero."""
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    tile = tl.program_id(0)
    if (row_peak is not None or column_peak is not None) and not (PEAKS[0] or PEAKS[1]):
        tile = tl.num_programs(0) - 1 - tile  # what was read last is most likely still in the cache
    tile_row = tile // tiles_across
    first_row = tile_row * TILE_ROWS
    first_column = tile % tiles_across * TILE_COLUMNS
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

    if ROW is not None:
        y = x
        if ROW_TURN is not None:
            y = rotated(y, state_ptr, stream, ROW_TURN, 1, TILE_ROWS, TILE_COLUMNS)
            if shadow_ptr is not None:
                shadow = rotated(shadow, state_ptr, stream, ROW_TURN, 1, TILE_ROWS, TILE_COLUMNS)
        if PEAKS[0]:
            _find_peak(y, row_peak)
        WRITES: tl.constexpr = not (PEAKS[0] or PEAKS[1])
        if WRITES or (CHAINED and PEAKS[1]):
            if DESIGNS[0]:
                y = _quantize_by_design(
                    y, shadow, state_ptr, row_stream, row_values, inside_ptr, row_peak, first_row, first_column, rows,
                    columns, ROW, BARE[0], 1, TILE_ROWS, TILE_COLUMNS,
                )  # fmt: skip
            else:
                y = quantize_for_one(
                    y, shadow, state_ptr, row_stream, row_values, row_codes, row_scales, None, 1, None, 0,
                    first_row, first_column, rows, columns, ROW, 1, CHAINED, 0, TILE_ROWS, TILE_COLUMNS,
                )  # fmt: skip
        shadow = None
        if CHAINED:
            x = y
    if COLUMN is not None:
        if COLUMN_TURN is not None:
            x = rotated(x, state_ptr, stream, COLUMN_TURN, 0, TILE_ROWS, TILE_COLUMNS)
            if shadow_ptr is not None and ROW is None:
                shadow = rotated(shadow, state_ptr, stream, COLUMN_TURN, 0, TILE_ROWS, TILE_COLUMNS)
        if PEAKS[1]:
            _find_peak(x, column_peak)
        if not (PEAKS[0] or PEAKS[1]):
            if DESIGNS[1]:
                _quantize_by_design(
                    x, shadow, state_ptr, column_stream, column_values, None, column_peak, first_row, first_column,
                    rows, columns, COLUMN, BARE[1], 0, TILE_ROWS, TILE_COLUMNS,
                )  # fmt: skip
            else:
                quantize_for_one(
                    x, shadow, state_ptr, column_stream, column_values, column_codes, column_scales, None, 1, None, 0,
                    first_row, first_column, rows, columns, COLUMN, 0, False, 0, TILE_ROWS, TILE_COLUMNS,
                )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "stream"])
def turn_back_kernel(
    x_ptr,
    state_ptr,  # of the noise
    stream,  # of noise: that of rotations
    out_ptr,
    rows,
    columns,
    TURN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """One tile of x T^T along the last axis, in which no group is cut."""
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    first_row = tl.program_id(0) // tiles_across * TILE_ROWS
    first_column = tl.program_id(0) % tiles_across * TILE_COLUMNS
    row, column = row_numbers(first_row, TILE_ROWS), column_numbers(first_column, TILE_COLUMNS)
    inside = (row < rows) & (column < columns)
    offset = row.to(tl.int64) * columns + column
    x = to_float32(tl.load(x_ptr + offset, mask=inside, other=0.0))
    turned = rotated_back(x, state_ptr, stream, TURN, TILE_ROWS, TILE_COLUMNS)
    tl.store(out_ptr + offset, narrowed(turned, out_ptr.dtype.element_ty), mask=inside)
