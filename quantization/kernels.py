"""The quantizer as one Triton kernel: what `reference.quantize` computes, bit for bit, in one pass over memory.

A program takes a tile of the stored matrix, reads it once, finds the maximum of each block, its scale, rounds, and
writes once. Why the bits are those of the reference:
- every multiplication is by a power of two and every sum is exact, or is far from where a decision changes; so
  contracting a product and a sum into one operation changes nothing either;
- block maxima are taken over the bits of |x| as integers, whose order is finite < Inf < NaN: a NaN cannot get lost;
- noise is Philox4x32-10 with the counters of `noise.py`, one call for eight elements.

Along the grid of a small float the distance between neighbours is a power of two, read off the exponent of the number
itself. In units of that gap the grid is the integers 0, 1, 2, ...: so rounding is rounding to an integer, and needs no
table. Import this module only where Triton is there.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantization.formats import ElementFormat
from quantization.noise import Noise
from quantization.spec import Rounding, ScaleRule

MAX_BLOCK_SIZE = 128
INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Python on the CPU: TRITON_INTERPRET=1
_NAN_BITS = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}  # torch.nan in each dtype

_SIGN = tl.constexpr(-(2**31))
_MAGNITUDE = tl.constexpr(2**31 - 1)
_EXPONENT = tl.constexpr(0x7F800000)
_INFINITY = tl.constexpr(0x7F800000)
_MANTISSA = tl.constexpr(0x7FFFFF)
_INTEGERS_ONLY = tl.constexpr(1.5 * 2.0**23)  # float32 numbers of this size have no fraction


@triton.jit
def _to_float32(x):
    """Widen. bfloat16 by its bits: Triton's interpreter, unlike a GPU, loses its subnormal numbers."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _bits_of(x, dtype: tl.constexpr):
    """The bits of a result cast to dtype: int16 or int32. bfloat16 is a float32 cut short, here without any loss."""
    if dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
    elif dtype == tl.bfloat16:
        bits = (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
    else:
        bits = x.to(tl.float16).to(tl.int16, bitcast=True)
    return bits


@triton.jit
def _power_of_two(n):
    """2^n, n from -127 to 127, as bits: float32. 2^-127 is a subnormal number."""
    return tl.where(n > -127, (n + 127) << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def _uniform(state, stream, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The draws `noise.uniform` makes for a tile, (ROWS, COLUMNS) float32. One call of Philox feeds eight columns."""
    high = tl.load(state + 1) + stream
    row = first_row + tl.arange(0, ROWS)
    call = first_column // 8 + tl.arange(0, COLUMNS // 8)
    w0, w1, w2, w3 = tl.philox(
        tl.load(state), call[None, :], row[:, None], (high & 0xFFFFFFFF).to(tl.uint32), (high >> 32).to(tl.uint32)
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (ROWS, COLUMNS // 8, 2, 2): word 2i + j at [..., i, j]
    halves = tl.join(words << 7, words >> 9)  # each word's low and high half, in the bits 7 to 22
    one_and_u = ((halves & 0x7FFF80) | 0x3F800040).to(tl.float32, bitcast=True)  # 1 + (half + 1/2) / 2^16
    return tl.reshape(one_and_u - 1.0, (ROWS, COLUMNS))


@triton.jit
def _nearest_integer(n):
    """The nearest integer, ties to even, of |n| < 2^22: the first sum rounds, the second is exact."""
    return (n + _INTEGERS_ONLY) - _INTEGERS_ONLY


@triton.jit
def _round(
    latent,
    shadow,
    u,
    ROUNDING: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_NORMAL: tl.constexpr,
    MAX: tl.constexpr,
    SATURATES: tl.constexpr,
):
    """Round x / S to the grid: float32, the sign kept also at zero. `shadow` (over S) and `u` as in the reference."""
    sign = latent.to(tl.int32, bitcast=True) & _SIGN
    magnitude = tl.abs(latent)
    if SATURATES:
        magnitude = tl.minimum(magnitude, MAX)

    # The gap is 2^(exponent - mantissa bits), the exponent being at least that of MIN_NORMAL (here in bits).
    binade = tl.maximum(magnitude.to(tl.int32, bitcast=True) & _EXPONENT, MIN_NORMAL)
    gap = binade.to(tl.float32, bitcast=True) * (1.0 / (1 << MANTISSA_BITS))
    gaps_per_one = (-(binade - (MANTISSA_BITS << 23)) + (254 << 23)).to(tl.float32, bitcast=True)
    n = magnitude * gaps_per_one

    if ROUNDING == "nearest_even" and MANTISSA_BITS > 0 and shadow is None:
        steps = _nearest_integer(n)  # its parity is that of the code
    else:
        # The integer below: n - 1 for odd n, from where each rounding then goes up to n. Where n - 0.5 is not exact
        # it lies between -0.5 and -0.25, and the integer is 0.
        lower = _nearest_integer(n - 0.5)
        if ROUNDING == "stochastic":
            up = u < n - lower
        else:
            target = n
            if shadow is not None:
                lower += tl.where(n - lower == 1.0, 1.0, 0.0)  # here the pair must begin with n itself
                target = (shadow.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True) * gaps_per_one
            midpoint = lower + 0.5
            if ROUNDING == "nearest_away":
                up = target >= midpoint
            else:
                if ROUNDING == "nearest_up":
                    tie_goes_up = sign == 0
                else:
                    integer = (lower + _INTEGERS_ONLY).to(tl.int32, bitcast=True)  # in its lowest bits
                    code = integer + (((binade - MIN_NORMAL) >> 23) << MANTISSA_BITS)
                    tie_goes_up = (code & 1) == 1
                up = (target > midpoint) | ((target == midpoint) & tie_goes_up)
        steps = tl.where(up, lower + 1.0, lower)
    rounded = steps * gap
    if shadow is not None:
        rounded = tl.minimum(rounded, MAX)  # the largest magnitude has no upper neighbour
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "stream"])
def _quantize(
    x_ptr,
    out_ptr,
    shadow_ptr,  # or None
    state_ptr,  # of the noise, or None
    stream,
    rows,
    columns,
    EMAX: tl.constexpr,
    STEP_UP_ABOVE: tl.constexpr,
    ROUNDING: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_NORMAL: tl.constexpr,
    MAX: tl.constexpr,
    SATURATES: tl.constexpr,
    AXIS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    NAN_BITS: tl.constexpr,
):
    """One tile of (TILE_ROWS, TILE_COLUMNS), in which no block is cut; what lies outside the matrix counts as zero."""
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    first_row = tl.program_id(0) // tiles_across * TILE_ROWS
    first_column = tl.program_id(0) % tiles_across * TILE_COLUMNS
    row = first_row + tl.arange(0, TILE_ROWS)[:, None]
    column = first_column + tl.arange(0, TILE_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    offset = row.to(tl.int64) * columns + column

    # From here on blocks have a dimension of their own: (rows, blocks, BLOCK) or (blocks, BLOCK, columns).
    D0: tl.constexpr = TILE_ROWS // BLOCK if AXIS == 0 else TILE_ROWS
    D1: tl.constexpr = BLOCK if AXIS == 0 else TILE_COLUMNS // BLOCK
    D2: tl.constexpr = TILE_COLUMNS if AXIS == 0 else BLOCK
    ALONG: tl.constexpr = 1 if AXIS == 0 else 2
    x = tl.reshape(_to_float32(tl.load(x_ptr + offset, mask=inside, other=0.0)), (D0, D1, D2))

    block_max = tl.max(x.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=ALONG, keep_dims=True)
    largest = block_max
    s = (block_max >> 23) - 127 - EMAX + ((block_max & _MANTISSA) > STEP_UP_ABOVE).to(tl.int32)
    s = tl.minimum(tl.maximum(s, -127), 127)
    to_latent = _power_of_two(-s)

    shadow = None
    if shadow_ptr is not None:
        shadow = tl.reshape(_to_float32(tl.load(shadow_ptr + offset, mask=inside, other=0.0)), (D0, D1, D2))
        shadow_max = tl.max(shadow.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=ALONG, keep_dims=True)
        largest = tl.maximum(largest, shadow_max)
        shadow = shadow * to_latent
    u = None
    if state_ptr is not None:
        u = tl.reshape(_uniform(state_ptr, stream, first_row, first_column, TILE_ROWS, TILE_COLUMNS), (D0, D1, D2))

    rounded = _round(x * to_latent, shadow, u, ROUNDING, MANTISSA_BITS, MIN_NORMAL, MAX, SATURATES)
    bits = _bits_of(rounded * _power_of_two(s), out_ptr.dtype.element_ty)
    bits = tl.where(largest < _INFINITY, bits, NAN_BITS)  # as bits: devices differ in the NaN they compute
    values = tl.reshape(bits.to(out_ptr.dtype.element_ty, bitcast=True), (TILE_ROWS, TILE_COLUMNS))
    tl.store(out_ptr + offset, values, mask=inside)


@functools.cache
def mantissa_bits(fmt: ElementFormat) -> int | None:
    """The mantissa bits of a format that is a small float with subnormal numbers; None if it is not one."""
    count, smallest = len(fmt.magnitudes), fmt.magnitudes[1]
    if math.frexp(smallest)[0] != 0.5:
        return None
    for bits in range(8):
        per_binade = 1 << bits
        codes = [divmod(code, per_binade) for code in range(count)]
        grid = [smallest * (m if e == 0 else (per_binade + m) * 2.0 ** (e - 1)) for e, m in codes]
        if grid == list(fmt.magnitudes):
            return bits
    return None


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
        and mantissa_bits(fmt) is not None
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
    """`reference.quantize` on a GPU, for what `supports` admits: same arguments, same bits."""
    x = x.contiguous()
    out = torch.empty_like(x)
    columns = x.shape[-1]
    rows = x.numel() // columns
    along_columns = axis not in (-1, x.dim() - 1)
    if along_columns:
        tile_rows, tile_columns, warps = max(32, block_size), 64, 1
    else:
        tile_rows, tile_columns, warps = 32, max(64, block_size), 1
    bits = mantissa_bits(fmt)
    step_up_above = round((fmt.max_significand - 1) * 2**23) if scale_rule == "truncation_free" else 2**23
    with torch.cuda.device_of(x):
        _quantize[(triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns),)](
            x,
            out,
            None if shadow is None else shadow.contiguous(),
            None if noise is None else noise.state,
            0 if noise is None else noise.stream,
            rows,
            columns,
            EMAX=fmt.emax,
            STEP_UP_ABOVE=step_up_above,
            ROUNDING=rounding,
            MANTISSA_BITS=bits,
            MIN_NORMAL=(math.frexp(fmt.magnitudes[1])[1] + 126 + bits) << 23,
            MAX=float(fmt.max),
            SATURATES=scale_rule == "floor",
            AXIS=0 if along_columns else 1,
            BLOCK=block_size,
            TILE_ROWS=tile_rows,
            TILE_COLUMNS=tile_columns,
            NAN_BITS=_NAN_BITS[x.dtype],
            num_warps=warps,
        )
    return out
