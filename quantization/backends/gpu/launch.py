"""From tensors to the kernels of `kernels.py`: outputs, tiles, launches. Import only where Triton is there.

What a call needs beside its tensors is planned once for equal arguments, since the host, and not the device, sets the
pace of small models.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantization.backends.gpu import design_launch
from quantization.backends.gpu.design_launch import by_design
from quantization.backends.gpu.kernels import (
    expand_kernel,
    prepare_kernel,
    survey_kernel,
    total_kernel,
)
from quantization.backends.gpu.launching import (
    INTERPRETED,
    PLANS,
    TOTAL_TILE,
    Launcher,
    Outputs,
    Tile,
    aligned,
    has_blocks_and_format,
    kernel_spec,
    on_device,
    stream_of,
    tiles_over,
)
from quantization.job import DENSE, NOTHING, Job, Packed, Prepared
from quantization.noise import Noise
from quantization.spec import QuantizerSpec

turn_back = design_launch.turn_back

# Measured, see docs/PERFORMANCE.md.
TILE, CARRIED_TILE = Tile(32, 32, 1, 96), Tile(32, 32, 1)  # of prepare_kernel, the second with fp8 outputs
if INTERPRETED:  # which takes long for each program; the tiles above are met on a GPU alone
    TILE = CARRIED_TILE = Tile(64, 64, 1)
SURVEY_TILE, EXPAND_TILE = Tile(128, 64, 4), Tile(32, 128, 2)


def serves(spec: QuantizerSpec) -> bool:
    """Whether the kernels have this quantizer: blocks of 1, 2, 4, ..., 128, and a format that is a small float."""
    return has_blocks_and_format(spec) and (spec.ruled or by_design(spec))


def serves_job(job: Job) -> bool:
    """Whether the kernels have all that a job asks for."""
    rotated_alone = (job.row is None and job.row_turn) or (job.column is None and job.column_turn)
    if rotated_alone or (job.mask and job.row.ruled):
        return False
    return all(serves(spec) for spec in (job.row, job.column) if spec is not None)


# ---------------------------------------------------------------------------------------------------------------------
# Launching
# ---------------------------------------------------------------------------------------------------------------------


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


class _Plan(NamedTuple):
    """What `prepare` decides once for equal arguments."""

    row: Outputs
    column: Outputs
    launch: Launcher
    survey: Launcher | None
    total: Launcher | None
    partial: tuple[int, int]  # shape of the sums of each tile


@functools.lru_cache(maxsize=PLANS)
def _plan(job: Job, rows: int, columns: int, *_compiled_alike: Any) -> _Plan:
    """_compiled_alike: what else Triton compiles for: dtypes and alignments; and the device."""
    block = max(32, *(spec.block_size for spec in (job.row, job.column) if spec is not None))
    warps = 1 if block <= 64 else 16  # with one a thread would have 512 numbers, and its kernel compile for a minute
    tile = Tile(block, block, warps) if block > 32 else CARRIED_TILE if job.carried else TILE
    row, column = (Outputs.shapes(job, spec, form, rows, columns) for spec, form in job.uses)
    strides = [1 if side.carried is None else side.carried[0][1] for side in (row, column)]
    specs = [None if spec is None else kernel_spec(spec) for spec in (job.row, job.column)]
    chained = job.chained and job.row is not None and job.column is not None
    window = job.window if job.carried else None
    partial_rows = tiles_over(rows, (SURVEY_TILE if job.carried else tile).rows)
    steps = tiles_over(partial_rows, TOTAL_TILE.rows)
    return _Plan(
        row=row,
        column=column,
        launch=Launcher(prepare_kernel, rows, columns, tile, rows, columns, *strides, *specs, chained, window),
        survey=Launcher(survey_kernel, rows, columns, SURVEY_TILE, rows, columns) if job.carried else None,
        total=Launcher(total_kernel, 1, columns, TOTAL_TILE, partial_rows, columns, steps) if job.sums else None,
        partial=(partial_rows, columns),
    )


def prepare(
    x: Tensor,
    job: Job,
    noise: Noise | None = None,
    shadow: Tensor | None = None,
    lost: Tensor | None = None,
    held: Tensor | None = None,
) -> Prepared:
    """`reference.prepare` for a matrix on a GPU: both quantizers in one pass."""
    if job.rotated or job.mask or any(spec is not None and not spec.ruled for spec in (job.row, job.column)):
        return design_launch.prepare(x, job, noise, shadow, held)
    x, device = x.contiguous(), x.device
    rows, columns = x.shape
    of_shadow = None
    if shadow is not None:
        shadow = shadow.contiguous()
        of_shadow = shadow.dtype, aligned(shadow)
    plan = _plan(job, rows, columns, x.dtype, aligned(x), of_shadow, lost is None, device)
    state, stream_of_noise = (None, 0) if noise is None else noise
    row, column = plan.row.make(device), plan.column.make(device)
    partial = sums = peak = factor = None
    if job.sums:
        partial = torch.empty(plan.partial, device=device)
        sums = torch.empty(columns, device=device)
    with on_device(device):
        stream = stream_of(device)
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
def _plan_expand(spec: QuantizerSpec, rows: int, columns: int, *_compiled_alike: Any) -> Launcher:
    axis = 0 if spec.axis == 0 else 1
    return Launcher(expand_kernel, rows, columns, EXPAND_TILE, rows, columns, kernel_spec(spec), axis)


def expand(packed: Packed, dtype: torch.dtype) -> Tensor:
    """`reference.expand` on a GPU."""
    codes, scales, spec, columns = packed
    rows, device = codes.shape[0], codes.device
    out = torch.empty((rows, columns), dtype=dtype, device=device)
    launch = _plan_expand(spec, rows, columns, dtype, aligned(codes), aligned(scales), device)
    with on_device(device):
        launch(stream_of(device), codes, scales, out)
    return out


def quantize(x: Tensor, spec: QuantizerSpec, noise: Noise | None = None, shadow: Tensor | None = None) -> Tensor:
    """`reference.quantize` on a GPU, along rows or along a matrix's columns: same bits (of a NaN: a NaN)."""
    along_rows = spec.axis in (-1, x.dim() - 1)
    matrix = x.reshape(-1, x.shape[-1])
    shadow = None if shadow is None else shadow.reshape(matrix.shape)
    job = Job(spec, None, DENSE, NOTHING, x.dtype) if along_rows else Job(None, spec, NOTHING, DENSE, x.dtype)
    prepared = prepare(matrix, job, noise, shadow)
    return (prepared.row if along_rows else prepared.column).values.reshape(x.shape)
