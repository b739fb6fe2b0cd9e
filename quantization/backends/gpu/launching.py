"""What launches of kernels have in common: tiles, outputs, the launcher. Import only where Triton is there."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from quantization.backends.gpu.tiles import KernelSpec
from quantization.backends.scales import threshold
from quantization.job import (
    CARRIED,
    DENSE,
    PACKED,
    SCALED,
    Carried,
    Dense,
    Job,
    Operand,
    Packed,
    carried_shape,
    codes_shape,
    scales_shape,
)
from quantization.spec import QuantizerSpec

INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Python on the CPU: TRITON_INTERPRET=1
PLANS = 512  # kept at most: some for each shape of layer and batch


MAX_BLOCK_SIZE = 128


class Tile(NamedTuple):
    """What a program works on, and with."""

    rows: int
    columns: int
    warps: int
    registers: int | None = None  # of a thread, at most
    fused: bool = True  # whether products and sums may be contracted


TOTAL_TILE = Tile(512, 8, 4)


def kernel_spec(spec: QuantizerSpec) -> KernelSpec:
    fmt, above = spec.format, threshold(spec.format, spec.scale_rule)
    return KernelSpec(
        emax=fmt.emax,
        carry=0 if above is None else 2**23 - 1 - above,
        rounding=spec.rounding,
        mantissa_bits=fmt.mantissa_bits,
        bottom=math.frexp(fmt.smallest_normal)[1] - 1,
        max=float(fmt.max),
        saturates=spec.saturates or fmt.emax < 1,  # there the largest scale is too small
        block=spec.block_size,
    )


def has_blocks_and_format(spec: QuantizerSpec) -> bool:
    """Whether the kernels have the quantizer's blocks along its axis and its elements."""
    fmt = spec.format
    return (
        spec.block_size & (spec.block_size - 1) == 0
        and spec.block_size <= MAX_BLOCK_SIZE
        and fmt.emax >= 0  # else the largest scale would have to be larger than E8M0's
        and fmt.magnitudes[1] >= 2.0**-6  # else the smallest results are none of bfloat16's
        and fmt.mantissa_bits is not None
        and fmt.smallest_normal <= 2.0  # else what undoes `coded` is no float32 number
    )


def aligned(tensor: Tensor) -> bool:
    """Whether a tensor's address is one that Triton compiles quicker code for."""
    return tensor.data_ptr() % 16 == 0


class Launcher:
    """A kernel for arguments that Triton compiles alike, in a number of programs of one tile each.

    Triton's own launch looks at every argument of every call, which takes the host longer than a small layer takes the
    device. `constants`: the last arguments, which are the same in every call; the sides of the tile come after them.
    """

    def __init__(self, kernel: triton.JITFunction, rows: int, columns: int, tile: Tile, *constants: Any) -> None:
        self.kernel, self.tile, self.compiled = kernel, tile, None
        self.constants = *constants, tile.rows, tile.columns
        self.programs = tiles_over(rows, tile.rows) * tiles_over(columns, tile.columns)

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
            self.compiled = launch(maxnreg=tile.registers, **({} if tile.fused else {"enable_fp_fusion": False}))


def tiles_over(length: int, side: int) -> int:
    """How many of this side cover the length (triton.cdiv takes the host ten times as long)."""
    return -(-length // side)


_NOTHING_TO_DO = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a device the current one, which it mostly is."""
    if INTERPRETED or device.index == torch.cuda.current_device():
        return _NOTHING_TO_DO
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    return 0 if INTERPRETED else triton.runtime.driver.active.get_current_stream(device.index)


class Outputs(NamedTuple):
    """What one quantizer writes, or None each: as prepare_kernel has its arguments."""

    values: Any = None
    codes: Any = None
    scales: Any = None
    carried: Any = None

    @staticmethod
    def shapes(job: Job, spec: QuantizerSpec | None, form: str, rows: int, columns: int) -> Outputs:
        """Shape and dtype of each."""
        if form in (DENSE, SCALED):
            return Outputs(values=((rows, columns), job.dtype))
        if form == PACKED:
            codes, scales = codes_shape(rows, columns), scales_shape(rows, columns, spec)
            return Outputs(codes=(codes, torch.uint8), scales=(scales, torch.uint8))
        return Outputs(carried=(carried_shape(rows, columns, spec), job.fp8)) if form == CARRIED else Outputs()

    def make(self, device: torch.device) -> Outputs:
        """The tensors, of what `shapes` says."""
        return Outputs(*[s if s is None else torch.empty(s[0], dtype=s[1], device=device) for s in self])

    def operand(self, spec: QuantizerSpec, columns: int, factor: Tensor | None) -> Operand | None:
        if self.values is not None:
            return Dense(self.values)
        if self.codes is not None:
            return Packed(self.codes, self.scales, spec, columns)
        return None if self.carried is None else Carried(self.carried, factor)
