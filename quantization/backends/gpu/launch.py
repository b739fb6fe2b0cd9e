"""From tensors to the kernels of `kernels.py`: outputs, tiles, launches. Import only where Triton is there.

What a call needs beside its tensors is planned once for equal arguments, since the host, and not the device, sets the
pace of small models.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from quantization.backends.gpu.kernels import expand_kernel, prepare_kernel, survey_kernel, total_kernel
from quantization.backends.gpu.tiles import KernelSpec
from quantization.job import (
    CARRIED,
    DENSE,
    NOTHING,
    PACKED,
    Carried,
    Dense,
    Job,
    Operand,
    Packed,
    Prepared,
    carried_shape,
    codes_shape,
    scales_shape,
)
from quantization.noise import Noise
from quantization.spec import QuantizerSpec

MAX_BLOCK_SIZE = 128
INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Python on the CPU: TRITON_INTERPRET=1
PLANS = 512  # kept at most: some for each shape of layer and batch


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


def kernel_spec(spec: QuantizerSpec) -> KernelSpec:
    fmt = spec.format
    return KernelSpec(
        emax=fmt.emax,
        carry=2**23 - 1 - round((fmt.max_significand - 1) * 2**23) if spec.scale_rule == "truncation_free" else 0,
        rounding=spec.rounding,
        mantissa_bits=fmt.mantissa_bits,
        bottom=math.frexp(fmt.smallest_normal)[1] - 1,
        max=float(fmt.max),
        saturates=spec.scale_rule == "floor",
        block=spec.block_size,
    )


def serves(spec: QuantizerSpec) -> bool:
    """Whether the kernels have this quantizer: blocks of 1, 2, 4, ..., 128, and a format that is a small float."""
    fmt = spec.format
    power_of_two = spec.block_size & (spec.block_size - 1) == 0
    return (
        spec.plain
        and power_of_two
        and spec.block_size <= MAX_BLOCK_SIZE
        and fmt.emax >= 1  # else the largest scale is too small for float32
        and fmt.magnitudes[1] >= 2.0**-6  # else the smallest results are none of bfloat16's
        and fmt.mantissa_bits is not None
        and fmt.smallest_normal <= 2.0  # else what undoes `_coded` is no float32 number
    )


def serves_job(job: Job) -> bool:
    """Whether the kernels have all that a job asks for."""
    specs = [spec for spec in (job.row, job.column) if spec is not None]
    return all(map(serves, specs)) and job.row_turn is None and job.column_turn is None and not job.mask


# ---------------------------------------------------------------------------------------------------------------------
# Launching
# ---------------------------------------------------------------------------------------------------------------------


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


_NOTHING_TO_DO = contextlib.nullcontext()


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a device the current one, which it mostly is."""
    if INTERPRETED or device.index == torch.cuda.current_device():
        return _NOTHING_TO_DO
    return torch.cuda.device(device)


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


@functools.lru_cache(maxsize=64)
def _zeros_of(device: torch.device, stream: int) -> _Zeros:
    return _Zeros()


# ---------------------------------------------------------------------------------------------------------------------
# Preparing
# ---------------------------------------------------------------------------------------------------------------------


class _Outputs(NamedTuple):
    """What one quantizer writes, or None each: as prepare_kernel has its arguments."""

    values: Any = None
    codes: Any = None
    scales: Any = None
    carried: Any = None

    @staticmethod
    def shapes(job: Job, spec: QuantizerSpec | None, form: str, rows: int, columns: int) -> _Outputs:
        """Shape and dtype of each."""
        if form == DENSE:
            return _Outputs(values=((rows, columns), job.dtype))
        if form == PACKED:
            codes, scales = codes_shape(rows, columns), scales_shape(rows, columns, spec)
            return _Outputs(codes=(codes, torch.uint8), scales=(scales, torch.uint8))
        return _Outputs(carried=(carried_shape(rows, columns, spec), job.fp8)) if form == CARRIED else _Outputs()

    def make(self, device: torch.device) -> _Outputs:
        """The tensors, of what `shapes` says."""
        return _Outputs(*[s if s is None else torch.empty(s[0], dtype=s[1], device=device) for s in self])

    def operand(self, spec: QuantizerSpec, columns: int, factor: Tensor | None) -> Operand | None:
        if self.values is not None:
            return Dense(self.values)
        if self.codes is not None:
            return Packed(self.codes, self.scales, spec, columns)
        return None if self.carried is None else Carried(self.carried, factor)


class _Plan(NamedTuple):
    """What `prepare` decides once for equal arguments."""

    row: _Outputs
    column: _Outputs
    launch: _Launcher
    survey: _Launcher | None
    total: _Launcher | None
    partial: tuple[int, int]  # shape of the sums of each tile


@functools.lru_cache(maxsize=PLANS)
def _plan(job: Job, rows: int, columns: int, *_compiled_alike: Any) -> _Plan:
    """_compiled_alike: what else Triton compiles for: dtypes and alignments; and the device."""
    block = max(32, *(spec.block_size for spec in (job.row, job.column) if spec is not None))
    tile = Tile(block, block, 1) if block > 32 else CARRIED_TILE if job.carried else TILE
    row, column = (_Outputs.shapes(job, spec, form, rows, columns) for spec, form in job.uses)
    strides = [1 if side.carried is None else side.carried[0][1] for side in (row, column)]
    specs = [None if spec is None else kernel_spec(spec) for spec in (job.row, job.column)]
    chained = job.chained and job.row is not None and job.column is not None
    window = job.window if job.carried else None
    partial_rows = _tiles(rows, (SURVEY_TILE if job.carried else tile).rows)
    steps = _tiles(partial_rows, TOTAL_TILE.rows)
    return _Plan(
        row=row,
        column=column,
        launch=_Launcher(prepare_kernel, rows, columns, tile, rows, columns, *strides, *specs, chained, window),
        survey=_Launcher(survey_kernel, rows, columns, SURVEY_TILE, rows, columns) if job.carried else None,
        total=_Launcher(total_kernel, 1, columns, TOTAL_TILE, partial_rows, columns, steps) if job.sums else None,
        partial=(partial_rows, columns),
    )


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


def prepare(
    x: Tensor,
    job: Job,
    noise: Noise | None = None,
    shadow: Tensor | None = None,
    lost: Tensor | None = None,
    held: Tensor | None = None,
) -> Prepared:
    """`reference.prepare` for a matrix on a GPU: both quantizers in one pass."""
    x, device = x.contiguous(), x.device
    rows, columns = x.shape
    of_shadow = None
    if shadow is not None:
        shadow = shadow.contiguous()
        of_shadow = shadow.dtype, _aligned(shadow)
    plan = _plan(job, rows, columns, x.dtype, _aligned(x), of_shadow, lost is None, device)
    state, stream_of_noise = (None, 0) if noise is None else noise
    row, column = plan.row.make(device), plan.column.make(device)
    partial = sums = peak = factor = None
    if job.sums:
        partial = torch.empty(plan.partial, device=device)
        sums = torch.empty(columns, device=device)
    with _on(device):
        stream = _stream(device)
        in_prepare = partial
        if plan.survey is not None:
            factor, in_prepare = torch.empty((), device=device), None
            if plan.launch.compiled is None or torch.cuda.is_current_stream_capturing():
                peak = torch.zeros((), dtype=torch.int32, device=device)
            else:
                _memory, peak = _zeros_of(device, stream).take(device)
            plan.survey(stream, x, peak, partial)
        plan.launch(
            stream, x, shadow, state, stream_of_noise + job.row_stream, stream_of_noise + job.column_stream,
            *row, *column, in_prepare, peak, factor, lost,
        )  # fmt: skip
        if job.sums:
            plan.total(stream, partial, sums)
    return Prepared(row.operand(job.row, columns, factor), column.operand(job.column, columns, factor), sums)


# ---------------------------------------------------------------------------------------------------------------------
# Expanding, and one quantizer alone
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=PLANS)
def _plan_expand(spec: QuantizerSpec, rows: int, columns: int, *_compiled_alike: Any) -> _Launcher:
    axis = 0 if spec.axis == 0 else 1
    return _Launcher(expand_kernel, rows, columns, EXPAND_TILE, rows, columns, kernel_spec(spec), axis)


def expand(packed: Packed, dtype: torch.dtype) -> Tensor:
    """`reference.expand` on a GPU."""
    codes, scales, spec, columns = packed
    rows, device = codes.shape[0], codes.device
    out = torch.empty((rows, columns), dtype=dtype, device=device)
    launch = _plan_expand(spec, rows, columns, dtype, _aligned(codes), _aligned(scales), device)
    with _on(device):
        launch(_stream(device), codes, scales, out)
    return out


def quantize(x: Tensor, spec: QuantizerSpec, noise: Noise | None = None, shadow: Tensor | None = None) -> Tensor:
    """`reference.quantize` on a GPU, along rows or along a matrix's columns: same bits (of a NaN: a NaN)."""
    along_rows = spec.axis in (-1, x.dim() - 1)
    matrix = x.reshape(-1, x.shape[-1])
    shadow = None if shadow is None else shadow.reshape(matrix.shape)
    job = Job(spec, None, DENSE, NOTHING, x.dtype) if along_rows else Job(None, spec, NOTHING, DENSE, x.dtype)
    prepared = prepare(matrix, job, noise, shadow)
    return (prepared.row if along_rows else prepared.column).values.reshape(x.shape)
