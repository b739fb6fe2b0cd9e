"""Launches of the kernels of quantizers beyond the paper's, and of rotations. Import only where Triton is there."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantization.backends.gpu.design_kernels import design_kernel, turn_back_kernel
from quantization.backends.gpu.kernels import total_kernel
from quantization.backends.gpu.launching import (
    INTERPRETED,
    PLANS,
    TOTAL_TILE,
    Launcher,
    Outputs,
    Tile,
    aligned,
    kernel_spec,
    on_device,
    stream_of,
    tiles_over,
)
from quantization.backends.gpu.tiles import DesignSpec, KernelTurn
from quantization.backends.scales import ROOT_OF_2, hold
from quantization.formats import ScaleFormat
from quantization.job import SCALED, Job, Operand, Prepared, Scaled
from quantization.noise import Noise
from quantization.rotation import FIXED, STREAM, Turn
from quantization.spec import QuantizerSpec

SQUARES = (16, 32)  # sides of square blocks


def by_design(spec: QuantizerSpec) -> bool:
    """Whether `design_kernel` has the scales of this quantizer."""
    return (
        (spec.power_of_two or spec.scale.fraction is None or _has_codes_of(spec.scale))
        and spec.arithmetic == "exact"
        and spec.scale_rounding != "stochastic"
        and (not spec.scale_rule.startswith("rms") or (spec.block_size == 32 and spec.block_rows == 1))
        and spec.aim >= 1.125  # else a scale may leave float32
        and (spec.block_rows == 1 or spec.block_size in SQUARES)
    )


def _has_codes_of(fmt: ScaleFormat) -> bool:
    """Whether the kernels have the codes of a format: of three fraction bits, down to zero or as far as float32's."""
    return fmt.fraction == 3 and (fmt.max < 2.0**100 if fmt.subnormal else fmt.emin == -126)


def _parts(value: float) -> tuple[int, int]:
    """The significand (24 bits, cut) and the exponent of a number."""
    fraction, exponent = math.frexp(value)
    return math.floor(fraction * 2**24), exponent - 1


def design_spec(spec: QuantizerSpec) -> DesignSpec:
    kernel = kernel_spec(spec)
    significand, exponent = _parts(spec.aim)
    reach, reach_exponent = _parts(spec.reach)
    rms = spec.scale_rule.startswith("rms")
    scale = "rms" if rms else "power" if spec.power_of_two else "fp32" if spec.scale.fraction is None else "coded"
    return DesignSpec(
        *kernel._replace(saturates=kernel.saturates and scale in ("power", "rms")),
        stochastic=spec.stochastic,
        square=spec.block_rows > 1,
        factor=spec.factor,
        scale=scale,
        rms_carry=2**23 - 1 - ROOT_OF_2 if spec.scale_rule == "rms_nearest" else 0,
        quarters=spec.scale_rule == "three_quarter",
        target=significand,
        target_exponent=exponent,
        target_value=spec.aim,
        target_reciprocal=float(torch.tensor(1.0) / torch.tensor(spec.aim)),
        short=significand % (1 << 20) == 0,
        emin=spec.scale.emin,
        subnormal=spec.scale.subnormal,
        scale_max=spec.scale.max,
        up=spec.scale_rounding == "up",
        outer=spec.outer != "none",
        outer_carry=2**24 - 1 - reach,
        outer_exponent=reach_exponent,
    )


def kernel_turn(turn: Turn | None) -> KernelTurn | None:
    if turn is None:
        return None
    words = tuple(word - (word >> 31 << 32) for word in FIXED)
    return KernelTurn(turn.size, turn.size.bit_length() - 1, turn.signs, turn.product, words, turn.size**-0.5)


class _Plan(NamedTuple):
    """What `prepare` decides once for equal arguments."""

    row: Outputs
    column: Outputs
    launch: Launcher
    surveys: tuple[tuple[tuple[bool, bool], Launcher], ...]  # before it: whose peaks, and how they are found
    total: Launcher | None
    partial: tuple[int, int]  # shape of the sums of each tile


def _tile(job: Job, shadowed: bool) -> Tile:
    sides = [spec.block_size for spec in (job.row, job.column) if spec is not None]
    sides += [turn.size for turn in (job.row_turn, job.column_turn) if turn is not None]
    side = max(64 if INTERPRETED else 32, *sides)
    specs = [spec for spec in (job.row, job.column) if spec is not None]
    simple = len(specs) == 1 and not shadowed and not specs[0].stochastic
    registers = None if side > 32 else 80 if simple else 128  # as many as most of them spill none of, and no more
    return Tile(side, side, side * side // 1024, registers, fused=False)


@functools.lru_cache(maxsize=PLANS)
def _plan(job: Job, rows: int, columns: int, shadowed: bool = False, *_compiled_alike: Any) -> _Plan:
    tile, specs = _tile(job, shadowed), (job.row, job.column)
    designs = tuple(spec is not None and not spec.ruled for spec in specs)
    kernel_specs = [
        None if spec is None else design_spec(spec) if design else kernel_spec(spec)
        for spec, design in zip(specs, designs, strict=True)
    ]
    chained = job.chained and job.row is not None and job.column is not None
    turns = kernel_turn(job.row_turn), kernel_turn(job.column_turn)
    bare = tuple(form == SCALED for _, form in job.uses)
    outer = tuple(spec is not None and spec.outer != "none" for spec in specs)

    def launcher(peaks: tuple[bool, bool]) -> Launcher:
        constants = *kernel_specs, designs, bare, chained, *turns, peaks
        return Launcher(design_kernel, rows, columns, tile, rows, columns, *constants)

    # What a chained column quantizer reads there is once the row quantizer's scale is known.
    passes = ((outer[0], False), (False, outer[1])) if chained else (outer,)
    partial_rows = tiles_over(rows, tile.rows)
    steps = tiles_over(partial_rows, TOTAL_TILE.rows)
    return _Plan(
        *(Outputs.shapes(job, spec, form, rows, columns) for spec, form in job.uses),
        launcher((False, False)),
        tuple((peaks, launcher(peaks)) for peaks in passes if any(peaks)),
        Launcher(total_kernel, 1, columns, TOTAL_TILE, partial_rows, columns, steps) if job.sums else None,
        (partial_rows, columns),
    )


def prepare(
    x: Tensor, job: Job, noise: Noise | None = None, shadow: Tensor | None = None, held: Tensor | None = None
) -> Prepared:
    """`reference.prepare` for a matrix on a GPU: both quantizers in one pass, after those that outer scales need."""
    x, device = x.contiguous(), x.device
    rows, columns = x.shape
    of_shadow = None
    if shadow is not None:
        shadow = shadow.contiguous()
        of_shadow = shadow.dtype, aligned(shadow)
    plan = _plan(job, rows, columns, shadow is not None, x.dtype, aligned(x), of_shadow, noise is None, device)
    state, base = (None, 0) if noise is None else noise
    streams = base + STREAM, base + job.row_stream, base + job.column_stream
    row, column = plan.row.make(device), plan.column.make(device)
    outputs = *row[:3], *column[:3]
    partial = sums = None
    if job.sums:
        partial, sums = torch.empty(plan.partial, device=device), torch.empty(columns, device=device)
    inside = torch.empty((rows, columns), dtype=torch.bool, device=device) if job.mask else None
    peaks = [None, None]
    if plan.surveys:
        memory = torch.zeros(8, dtype=torch.int32, device=device)
        peaks = [memory[0], memory[4]]  # both at addresses that are multiples of 16 bytes
    with on_device(device):
        stream = stream_of(device)
        for wanted, survey in plan.surveys:
            survey(stream, x, shadow, state, *streams, *[None] * 8, *peaks)
            for place, spec in enumerate((job.row, job.column)):
                if wanted[place] and held is not None and spec.outer_delay:
                    amax = hold(peaks[place].view(torch.float32), spec, noise, held[place])
                    peaks[place].copy_(amax.view(torch.int32))
        plan.launch(stream, x, shadow, state, *streams, *outputs, inside, partial, *peaks)
        if job.sums:
            plan.total(stream, partial, sums)
    (row_spec, row_form), (column_spec, column_form) = job.uses
    operands = _operand(row, row_spec, row_form, columns), _operand(column, column_spec, column_form, columns)
    return Prepared(*operands, sums, inside)


def _operand(outputs: Outputs, spec: QuantizerSpec | None, form: str, columns: int) -> Operand | None:
    if form == SCALED:
        factor = torch.full((), spec.factor, device=outputs.values.device)
        return Scaled(outputs.values, factor, spec.known_factor)
    return outputs.operand(spec, columns, None)


@functools.lru_cache(maxsize=PLANS)
def _turning(turn: Turn, rows: int, columns: int, *_compiled_alike: Any) -> Launcher:
    side = max(64 if INTERPRETED else 32, turn.size)
    tile = Tile(32, side, side // 32, fused=False)
    return Launcher(turn_back_kernel, rows, columns, tile, rows, columns, kernel_turn(turn))


def turn_back(x: Tensor, turn: Turn, noise: Noise) -> Tensor:
    """`reference.turn_back` for a matrix on a GPU."""
    x, device = x.contiguous(), x.device
    out = torch.empty_like(x)
    launch = _turning(turn, *x.shape, x.dtype, aligned(x), device)
    with on_device(device):
        launch(stream_of(device), x, noise.state, noise.stream + STREAM, out)
    return out
