"""INT4's kernels: what `backends/int4.py` computes, bit for bit, and their launches.

Each is one pass over memory, but for the weights of rows, which take one of a row's score for each round of filling.

Import only where Triton is there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantization.backends.gpu.design import narrowed
from quantization.backends.gpu.launching import INTERPRETED, PLANS, Launcher, Tile, aligned, on_device, stream_of
from quantization.backends.gpu.tiles import (
    INFINITY,
    MAGNITUDE,
    SIGN,
    column_numbers,
    nearest_integer,
    philox,
    random_halves,
    row_numbers,
    to_float32,
)
from quantization.backends.int4 import FILLING_ROUNDS, SMALLEST_P
from quantization.noise import ELEMENTS_PER_CALL, Noise

TILE = Tile(64, 64, 1) if INTERPRETED else Tile(32, 32, 1)
ROWS = Tile(8, 1024, 4, fused=False) if INTERPRETED else Tile(8, 128, 4, fused=False)  # each with its weight
ROW = Tile(1, 4096 if INTERPRETED else 1024, 4)  # of numbers whose place does not matter


@triton.jit
def _nearest_level(v, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """The nearest integer from SMALLEST (below 0) to LARGEST, ties to even, the sign kept also at zero; NaN stays."""
    size = nearest_integer(tl.where(tl.abs(v) > 1024.0, 1024.0, tl.abs(v)))  # what is larger has no fraction to round
    most = tl.where(v < 0, -SMALLEST * 1.0, LARGEST * 1.0)
    size = tl.where(size > most, most, size)  # where a minimum might lose a NaN
    bits = size.to(tl.int32, bitcast=True) | (v.to(tl.int32, bitcast=True) & SIGN)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _level(v, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """The same, but NaN where v is not finite."""
    finite = (v.to(tl.int32, bitcast=True) & MAGNITUDE) < INFINITY
    return tl.where(finite, _nearest_level(v, SMALLEST, LARGEST), float("nan"))


@triton.jit(do_not_specialize=["numel"])
def levels_kernel(
    v_ptr,
    out_ptr,
    numel,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    _ROWS: tl.constexpr,
    MANY: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
    inside = place < numel
    level = _level(tl.load(v_ptr + place, mask=inside, other=0.0), SMALLEST, LARGEST)
    tl.store(out_ptr + place, level.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["numel"])
def straight_through_kernel(
    product_ptr,
    scale_ptr,
    v_ptr,
    gradient_ptr,
    of_step_ptr,
    numel,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    _ROWS: tl.constexpr,
    MANY: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
    there = place < numel
    v = tl.load(v_ptr + place, mask=there, other=0.0)
    gradient = to_float32(tl.load(product_ptr + place, mask=there, other=0.0)) * tl.load(scale_ptr)
    inside = (v > SMALLEST) & (v < LARGEST)
    slope = _level(v, SMALLEST, LARGEST) - tl.where(inside, v, 0.0)
    tl.store(gradient_ptr + place, gradient * inside.to(tl.float32), mask=there)
    tl.store(of_step_ptr + place, gradient * slope, mask=there)


@triton.jit(do_not_specialize=["rows", "stream"])
def split_kernel(
    x_ptr,
    unit_ptr,
    state_ptr,  # of the noise
    stream,
    high_ptr,
    low_ptr,
    rows,
    columns,
    BASE: tl.constexpr,
    HIGH_MAX: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """x / unit as BASE high + low: integers, high the nearest one, low drawn. The products are exact, so that it does
    not matter which of them are fused with sums."""
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    first_row = tl.program_id(0) // tiles_across * TILE_ROWS
    first_column = tl.program_id(0) % tiles_across * TILE_COLUMNS
    row, column = row_numbers(first_row, TILE_ROWS), column_numbers(first_column, TILE_COLUMNS)
    inside = (row < rows) & (column < columns)
    offset = row.to(tl.int64) * columns + column
    latent = tl.div_rn(to_float32(tl.load(x_ptr + offset, mask=inside, other=0.0)), tl.load(unit_ptr))
    high = _nearest_level(tl.div_rn(latent, BASE * 1.0), -HIGH_MAX, HIGH_MAX)
    halves = random_halves(state_ptr, stream, first_row, first_column, TILE_ROWS, TILE_COLUMNS)
    low = tl.floor(latent - BASE * high + (halves.to(tl.float32) + 64.0) * 2.0**-23)
    tl.store(high_ptr + offset, high, mask=inside)
    tl.store(low_ptr + offset, low, mask=inside)


@triton.jit
def _next_rate(rates_ptr, certain_ptr, rest_ptr, expected, ROUND: tl.constexpr):
    """The rate of water-filling after a round, from the rate, the certain rows and the rest of the one before."""
    rate, rest = tl.load(rates_ptr + ROUND), tl.load(rest_ptr)
    quotient = tl.div_rn((expected - tl.load(certain_ptr + ROUND)).to(tl.float32), rest)
    larger = tl.where(rate > quotient, rate, quotient)  # a quotient that is NaN
    return tl.where((rest == 0.0) | (rate != rate), rate, larger)


@triton.jit(do_not_specialize=["numel", "expected"])
def filling_kernel(
    score_ptr,
    rest_ptr,  # the sum of what this kernel wrote to others_ptr in the round before
    rates_ptr,  # of the rounds
    certain_ptr,  # numbers of certain rows
    others_ptr,
    numel,
    expected,
    ROUND: tl.constexpr,
    _ROWS: tl.constexpr,
    MANY: tl.constexpr,
):
    """A round of `keep_probability`: its rate, how many rows are certain, and the scores of the others."""
    rate = _next_rate(rates_ptr, certain_ptr, rest_ptr, expected, ROUND)
    if tl.program_id(0) == 0:
        tl.store(rates_ptr + ROUND + 1, rate)
    place = tl.program_id(0) * MANY + tl.arange(0, MANY)
    score = tl.load(score_ptr + place, mask=place < numel, other=0.0)
    certain = score * rate >= 1.0
    tl.store(others_ptr + place, tl.where(certain, 0.0, score), mask=place < numel)
    tl.atomic_add(certain_ptr + ROUND + 1, tl.sum((certain & (place < numel)).to(tl.int32)))


@triton.jit(do_not_specialize=["stream", "numel", "expected"])
def row_weights_kernel(
    score_ptr,
    rest_ptr,
    rates_ptr,
    certain_ptr,
    state_ptr,  # of the noise
    stream,
    out_ptr,
    numel,
    expected,
    ROUND: tl.constexpr,
    CALL: tl.constexpr,  # elements that share a call of Philox
    SMALLEST: tl.constexpr,
    _ROWS: tl.constexpr,
    MANY: tl.constexpr,
):
    rate = _next_rate(rates_ptr, certain_ptr, rest_ptr, expected, ROUND)
    place = tl.program_id(0) * MANY + tl.arange(0, MANY)
    latent = tl.load(score_ptr + place, mask=place < numel, other=0.0) * rate
    p = tl.ceil(tl.where(latent > 1.0, 1.0, latent) / SMALLEST) * SMALLEST  # a NaN stays

    call = (tl.program_id(0) * (MANY // CALL) + tl.arange(0, MANY // CALL)).to(tl.uint32)
    high = tl.load(state_ptr + 1) + stream
    c2, c3 = (high & 0xFFFFFFFF).to(tl.uint32), ((high >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox(tl.load(state_ptr), call, call * 0, c2, c3)  # of row 0
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # word 2i + j at [:, i, j]
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (MANY,)).to(tl.int32, bitcast=True)
    kept = (bits.to(tl.float32) + 0.5) * 2.0**-16 < p

    weight = tl.div_rn(tl.where(kept, 1.0, 0.0), tl.where(p < SMALLEST, SMALLEST, p))
    tl.store(out_ptr + place, weight, mask=place < numel)


@triton.jit(do_not_specialize=["rows"])
def weighted_rows_kernel(
    high_ptr,
    low_ptr,
    weights_ptr,
    out_ptr,
    rows,
    columns,
    BASE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """To be compiled without fused operations: every product is rounded."""
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    row = tl.program_id(0) // tiles_across * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    column = tl.program_id(0) % tiles_across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    offset = row.to(tl.int64) * columns + column
    of_high = tl.load(weights_ptr + row, mask=row < rows, other=0.0)
    of_low = tl.load(weights_ptr + rows + row, mask=row < rows, other=0.0)
    high = tl.load(high_ptr + offset, mask=inside, other=0.0) * BASE * of_high
    low = tl.load(low_ptr + offset, mask=inside, other=0.0) * of_low
    tl.store(out_ptr + offset, narrowed(high + low, out_ptr.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=PLANS)
def _plan(kernel: triton.JITFunction, tile: Tile, shape: tuple[int, ...], *more: Any) -> Launcher:
    """more: the kernel's last arguments, in a tuple, and what else Triton compiles for: dtypes, alignments, device."""
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    return Launcher(kernel, rows, columns, tile, *shape, *more[0])


def levels(v: Tensor, smallest: int, largest: int, dtype: torch.dtype) -> Tensor:
    """`backends.int4.levels` on a GPU."""
    v = v.contiguous()
    out = torch.empty(v.shape, dtype=dtype, device=v.device)
    launch = _plan(levels_kernel, ROW, (v.numel(),), (smallest, largest), v.dtype, dtype, aligned(v), v.device)
    with on_device(v.device):
        launch(stream_of(v.device), v, out)
    return out


def straight_through(product: Tensor, scale: Tensor, v: Tensor, smallest: int, largest: int) -> tuple[Tensor, Tensor]:
    """`backends.int4.straight_through` on a GPU."""
    product, v = product.contiguous(), v.contiguous()
    gradient, of_step = (torch.empty(v.shape, device=v.device) for _ in range(2))
    alike = product.dtype, aligned(product), aligned(scale), aligned(v), v.device
    launch = _plan(straight_through_kernel, ROW, (v.numel(),), (smallest, largest), *alike)
    with on_device(v.device):
        launch(stream_of(v.device), product, scale, v, gradient, of_step)
    return gradient, of_step


def row_weights(score: Tensor, expected: int, noise: Noise) -> Tensor:
    """`backends.int4.row_weights` on a GPU. Sums of scores are torch's, whose order they are rounded in."""
    score = score.contiguous()
    numel, device = score.numel(), score.device
    others, out = torch.empty(numel, device=device), torch.empty(score.shape, device=device)
    certain = torch.zeros((2, FILLING_ROUNDS), dtype=torch.int32, device=device)
    rates, certain = certain[0].view(torch.float32), certain[1]
    rest = score.flatten().sum()
    alike = aligned(score), device  # the others are aligned, being new, or read number by number
    with on_device(device):
        for turn in range(FILLING_ROUNDS - 1):
            launch = _plan(filling_kernel, ROW, (numel,), (expected, turn), *alike)
            launch(stream_of(device), score, rest, rates, certain, others)
            rest = others.sum()
        last = expected, FILLING_ROUNDS - 1, ELEMENTS_PER_CALL, SMALLEST_P
        launch = _plan(row_weights_kernel, ROW, (numel,), last, *alike)
        launch(stream_of(device), score, rest, rates, certain, noise.state, noise.stream, out)
    return out


def weighted_rows(high: Tensor, low: Tensor, weights: Tensor, base: int, dtype: torch.dtype) -> Tensor:
    """`backends.int4.weighted_rows` on a GPU."""
    high, low, weights = high.contiguous(), low.contiguous(), weights.contiguous()
    out = torch.empty(high.shape, dtype=dtype, device=high.device)
    alike = dtype, aligned(high), aligned(low), aligned(weights), high.device
    launch = _plan(weighted_rows_kernel, ROWS, tuple(high.shape), (base,), *alike)
    with on_device(high.device):
        launch(stream_of(high.device), high, low, weights, out)
    return out


def split(x: Tensor, unit: Tensor, base: int, high_max: int, noise: Noise) -> tuple[Tensor, Tensor]:
    """`backends.int4.split` on a GPU."""
    x = x.contiguous()
    high, low = (torch.empty(x.shape, device=x.device) for _ in range(2))
    launch = _plan(split_kernel, TILE, tuple(x.shape), (base, high_max), x.dtype, aligned(x), aligned(unit), x.device)
    with on_device(x.device):
        launch(stream_of(x.device), x, unit, noise.state, noise.stream, high, low)
    return high, low
