"""From tensors to the kernels of `kernels.py`: outputs, tiles, launches. Import only where Triton is there.

What a call needs beside its tensors is decided once for equal arguments, since the host, and not the device, sets the
pace of small models.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from quantization.backends.gpu.kernels import expand_kernel, prepare_kernel, survey_kernel, total_kernel
from quantization.backends.gpu.tiles import Grid
from quantization.noise import Noise
from quantization.operands.matrices import (
    CARRIED,
    DENSE,
    E4M3,
    NOTHING,
    PACKED,
    carried_shape,
    codes_shape,
    lost_in_carrier,
    scales_shape,
    window,
)
from quantization.spec import QuantizerSpec

MAX_BLOCK_SIZE = 128
INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Python on the CPU: TRITON_INTERPRET=1


class Tile(NamedTuple):
    """What a program works on, and with."""

    rows: int
    columns: int
    warps: int
    registers: int | None = None  # of a thread, at most


# Measured, see docs/PERFORMANCE.md.
TILE, CARRIED_TILE = Tile(32, 32, 1, 96), Tile(32, 32, 1)  # of prepare_kernel, the second with fp8 outputs
if INTERPRETED:  # which takes long for each program; the tiles above are met on a GPU alone
    TILE = CARRIED_TILE = Tile(64, 64, 1)
SURVEY_TILE, TOTAL_TILE, EXPAND_TILE = Tile(128, 64, 4), Tile(512, 8, 4), Tile(32, 128, 2)


@functools.cache
def _grid_of(spec: QuantizerSpec) -> Grid:
    fmt = spec.format
    return Grid(
        emax=fmt.emax,
        carry=2**23 - 1 - round((fmt.max_significand - 1) * 2**23) if spec.scale_rule == "truncation_free" else 0,
        rounding=spec.rounding,
        mantissa_bits=fmt.mantissa_bits,
        bottom=math.frexp(fmt.smallest_normal)[1] - 1,
        max=float(fmt.max),
        saturates=spec.scale_rule == "floor",
        block=spec.block_size,
    )


def supports(x: Tensor, spec: QuantizerSpec) -> bool:
    """Whether `quantize` takes these arguments: blocks of 1, 2, 4, ..., 128 along rows or along a matrix's columns."""
    fmt, along_rows = spec.format, spec.axis in (-1, x.dim() - 1)
    power_of_two = spec.block_size & (spec.block_size - 1) == 0
    return (
        (along_rows or x.dim() == 2)
        and power_of_two
        and spec.block_size <= MAX_BLOCK_SIZE
        and fmt.emax >= 1  # else the largest scale is too small for float32
        and fmt.magnitudes[1] >= 2.0**-6  # else the smallest results are none of bfloat16's
        and fmt.mantissa_bits is not None
        and fmt.smallest_normal <= 2.0  # else what undoes `_coded` is no float32 number
    )


class _Launcher:
    """A kernel for arguments that Triton compiles alike, in a number of programs of one tile each.

    Triton's own launch looks at every argument of every call, which takes the host longer than a small layer takes the
    device. `constants`: the last arguments, which are the same in every call; the sides of the tile come after them.
    """

    def __init__(self, kernel: triton.JITFunction, rows: int, columns: int, tile: Tile, *constants: Any) -> None:
        self.kernel, self.tile, self.compiled = kernel, tile, None
        self.constants = *constants, tile.rows, tile.columns
        self.programs = _tiles(rows, tile.rows) * _tiles(columns, tile.columns)

    def __call__(self, stream: int, *arguments: Tensor | int | None) -> None:
        tile, compiled = self.tile, self.compiled
        if compiled is not None:
            # Addresses, since the launcher asks the driver about every tensor.
            numbers = [a if a is None or type(a) is int else a.data_ptr() for a in arguments]
            compiled.run(
                self.programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *numbers, *self.constants,
            )  # fmt: skip
            return
        launch = functools.partial(self.kernel[(self.programs,)], *arguments, *self.constants, num_warps=tile.warps)
        if INTERPRETED:
            launch()
        else:
            self.compiled = launch(maxnreg=tile.registers)


def _tiles(length: int, side: int) -> int:
    """How many of this side cover the length (triton.cdiv takes the host ten times as long)."""
    return -(-length // side)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a device the current one, which it mostly is."""
    if INTERPRETED or device.index == torch.cuda.current_device():
        return _NOTHING_TO_DO
    return torch.cuda.device(device)


_NOTHING_TO_DO = contextlib.nullcontext()


def _stream(device: torch.device) -> int:
    return 0 if INTERPRETED else triton.runtime.driver.active.get_current_stream(device.index)


class _Zeros:
    """Zeros for the surveys of one stream, 16 bytes each: made many at a time, each used once."""

    def __init__(self) -> None:
        self.free: list[tuple[Tensor, int]] = []

    def take(self, device: torch.device) -> tuple[Tensor, int]:
        """The memory, which must be kept until the kernels are launched, and an address in it."""
        try:
            return self.free.pop()
        except IndexError:
            memory = torch.zeros(4 * 256, dtype=torch.int32, device=device)
            first = memory.data_ptr()
            self.free.extend((memory, address) for address in range(first + 16, first + 16 * 256, 16))
            return memory, first


_zeros: dict[tuple[torch.device, int], _Zeros] = collections.defaultdict(_Zeros)


class _Plan(NamedTuple):
    """What `prepare` decides once for equal arguments."""

    outputs: tuple[tuple[int, tuple[int, int], torch.dtype], ...]  # place among the arguments, shape, dtype
    order: tuple[int, ...]  # the places in the order of the results
    launch: _Launcher
    survey: _Launcher | None
    total: _Launcher | None
    partial: tuple[int, int]  # shape of the sums of each tile
    specs: tuple[QuantizerSpec | None, QuantizerSpec | None]  # keeps the ids in the plan's key from being used again


_plans: dict[tuple, _Plan] = {}


def _plan(
    rows: int,
    columns: int,
    row: QuantizerSpec | None,
    column: QuantizerSpec | None,
    forms: tuple[str, str],
    dtype: torch.dtype,
    fp8: torch.dtype,
    chained: bool,
    sums: bool,
) -> _Plan:
    block = max(32, *(spec.block_size for spec in (row, column) if spec is not None))
    carried = CARRIED in forms
    tile = Tile(block, block, 1) if block > 32 else CARRIED_TILE if carried else TILE
    outputs, strides = [], [1, 1]
    for index, (spec, form) in enumerate(zip((row, column), forms, strict=True)):
        if form == DENSE:
            outputs.append((3 * index, (rows, columns), dtype))
        elif form == PACKED:
            outputs.append((3 * index + 1, codes_shape(rows, columns), torch.uint8))
            outputs.append((3 * index + 2, scales_shape(rows, columns, spec), torch.uint8))
        elif form == CARRIED:
            shape = carried_shape(rows, columns, spec)
            outputs.append((6 + index, shape, fp8))
            strides[index] = shape[1]
    fp8_window = window((row or column).format, fp8) if carried else None
    grids = [None if spec is None else _grid_of(spec) for spec in (row, column)]
    partial_rows = _tiles(rows, (SURVEY_TILE if carried else tile).rows)
    steps = _tiles(partial_rows, TOTAL_TILE.rows)
    places = {place for place, *_ in outputs}
    return _Plan(
        outputs=tuple(outputs),
        order=tuple(place for place in (0, 1, 2, 6, 3, 4, 5, 7) if place in places),
        launch=_Launcher(prepare_kernel, rows, columns, tile, rows, columns, *strides, *grids, chained, fp8_window),
        survey=_Launcher(survey_kernel, rows, columns, SURVEY_TILE, rows, columns) if carried else None,
        total=_Launcher(total_kernel, 1, columns, TOTAL_TILE, partial_rows, columns, steps) if sums else None,
        partial=(partial_rows, columns),
        specs=(row, column),
    )


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


def prepare(
    x: Tensor,
    row: QuantizerSpec | None,
    column: QuantizerSpec | None,
    forms: tuple[str, str],
    dtype: torch.dtype,
    fp8: torch.dtype,
    *,
    chained: bool = False,
    sums: bool = False,
    state: Tensor | None = None,
    streams: tuple[int, int] = (0, 0),
    shadow: Tensor | None = None,
) -> list[Tensor]:
    """`operands.prepare` for a matrix on a GPU: both quantizers in one pass."""
    x, device = x.contiguous(), x.device
    rows, columns = x.shape
    of_shadow = None
    if shadow is not None:
        shadow = shadow.contiguous()
        of_shadow = shadow.dtype, _aligned(shadow)
    key = id(row), id(column), forms, dtype, fp8, chained, sums, rows, columns, x.dtype, _aligned(x), of_shadow, device
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _plan(rows, columns, row, column, forms, dtype, fp8, chained, sums)

    outputs: list[Tensor | None] = [None] * 8
    for place, shape, out_dtype in plan.outputs:
        outputs[place] = torch.empty(shape, dtype=out_dtype, device=device)
    partial = total = peak = factor = lost = None
    if sums:
        partial = torch.empty(plan.partial, device=device)
        total = torch.empty(columns, device=device)
    with _on(device):
        stream = _stream(device)
        in_prepare = partial
        if plan.survey is not None:
            factor, lost, in_prepare = torch.empty((), device=device), lost_in_carrier(device), None
            if plan.launch.compiled is None or torch.cuda.is_current_stream_capturing():
                peak = torch.zeros((), dtype=torch.int32, device=device)
            else:
                _memory, peak = _zeros[device, stream].take(device)
            plan.survey(stream, x, peak, partial)
        plan.launch(stream, x, shadow, state, *streams, *outputs, in_prepare, peak, factor, lost)
        if sums:
            plan.total(stream, partial, total)
    results = [outputs[place] for place in plan.order]
    if factor is not None:
        results.append(factor)
    if sums:
        results.append(total)
    return results


_expansions: dict[tuple, tuple[_Launcher, QuantizerSpec]] = {}


def expand(codes: Tensor, scales: Tensor, spec: QuantizerSpec, columns: int, dtype: torch.dtype) -> Tensor:
    """`operands.expand` on a GPU."""
    rows, device = codes.shape[0], codes.device
    out = torch.empty((rows, columns), dtype=dtype, device=device)
    key = id(spec), rows, columns, dtype, _aligned(codes), _aligned(scales), device
    if key not in _expansions:
        axis = 0 if spec.axis == 0 else 1
        launch = _Launcher(expand_kernel, rows, columns, EXPAND_TILE, rows, columns, _grid_of(spec), axis)
        _expansions[key] = launch, spec
    with _on(device):
        _expansions[key][0](_stream(device), codes, scales, out)
    return out


def quantize(x: Tensor, spec: QuantizerSpec, noise: Noise | None = None, shadow: Tensor | None = None) -> Tensor:
    """`reference.quantize` on a GPU, for what `supports` admits: same arguments, same bits (of a NaN: a NaN)."""
    along_rows = spec.axis in (-1, x.dim() - 1)
    matrix = x.reshape(-1, x.shape[-1])
    shadow = None if shadow is None else shadow.reshape(matrix.shape)
    state, stream = (None, 0) if noise is None else noise
    row, column, forms = (spec, None, (DENSE, NOTHING)) if along_rows else (None, spec, (NOTHING, DENSE))
    (out,) = prepare(matrix, row, column, forms, x.dtype, E4M3, state=state, streams=(stream, stream), shadow=shadow)
    return out.reshape(x.shape)
