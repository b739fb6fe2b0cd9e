"""Operands made and expanded: by kernels or by the reference, and under torch.compile as custom ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library, impl, register_fake

from quantization.backends.choose import DTYPES, backend_of_job, backend_of_packed, backend_of_turning
from quantization.job import DENSE, Dense, Job, Operand, Packed, Prepared, Scaled
from quantization.noise import Noise
from quantization.rotation import Turn
from quantization.spec import QuantizerSpec


def prepare(
    x: Tensor,
    job: Job,
    noise: Noise | None = None,
    shadow: Tensor | None = None,
    lost: Tensor | None = None,
    held: Tensor | None = None,
) -> Prepared:
    """Quantize a matrix for the two products it enters, reading it once (a carried result needs a second look).

    Args:
        x: float32, bfloat16 or float16, (rows, columns).
        noise: the layer's first stream: of stochastic rounding, fresh signs of rotations and delayed outer scales.
        shadow: shadow weight of x's shape, for the row quantizer.
        lost: int64 scalar to which the number of blocks below the window of carried results is added, or None.
        held: the largest magnitudes that delayed outer scales hang from, of the row and the column quantizer: the bits
            of float32 numbers (2, int32), renewed where it is time, or minus those that are to be kept; or None.

    Raises TypeError for another dtype of x.
    """
    if job.idle:
        prepared = Prepared(sums=x.sum(0, dtype=torch.float32) if job.sums else None)
    else:
        if x.dtype not in DTYPES:
            raise TypeError(f"quantizers take float32, bfloat16 or float16; got {str(x.dtype).removeprefix('torch.')}")
        if torch.compiler.is_compiling():
            state, stream = (None, 0) if noise is None else noise
            tensors = torch.ops.mxfp4.prepare(x, shadow, state, stream, lost, held, job.write())
            prepared = job.unflatten(tensors, x.shape[1])
        else:
            prepared = backend_of_job(x, job).prepare(x, job, noise, shadow, lost, held)
    if job.row is not None and job.column is not None:
        return prepared
    row, column, sums, inside = prepared
    if row is None and job.row_form == DENSE:
        row = Dense(x.to(job.dtype))
    if column is None and job.column is None and job.column_form == DENSE:
        column = row if job.chained else Dense(x.to(job.dtype))
    return Prepared(row, column, sums, inside)


def values_of(operand: Operand, dtype: torch.dtype) -> Tensor:
    """The numbers of a Dense or Packed operand, or those of a Scaled one but for its factor, in the compute dtype."""
    if isinstance(operand, Dense | Scaled):
        return operand.values
    if torch.compiler.is_compiling():
        codes, scales, spec, columns = operand
        return torch.ops.mxfp4.expand(codes, scales, spec.text, columns, dtype)
    return backend_of_packed(operand).expand(operand, dtype)


def turned_back(x: Tensor, turn: Turn, noise: Noise) -> Tensor:
    """x T^T along the last axis of a matrix: its shape and dtype, rounded to it once; with its bits also under
    torch.compile. noise: the layer's first stream."""
    if torch.compiler.is_compiling():
        return torch.ops.mxfp4.turn_back(x, turn.text, noise.state, noise.stream)
    return backend_of_turning(x).turn_back(x, turn, noise)


# ---------------------------------------------------------------------------------------------------------------------
# The same as custom ops, which torch.compile does not look into. Jobs and specs travel as text. That `lost` is added to
# and `held` renewed is not declared: nothing else in a graph reads them.
# ---------------------------------------------------------------------------------------------------------------------

_ops = Library("mxfp4", "DEF")
_ops.define(
    "prepare(Tensor x, Tensor? shadow, Tensor? state, SymInt stream, Tensor? lost, Tensor? held, str job) -> Tensor[]"
)
_ops.define("expand(Tensor codes, Tensor scales, str spec, SymInt columns, ScalarType dtype) -> Tensor")
_ops.define("turn_back(Tensor x, str turn, Tensor state, SymInt stream) -> Tensor")


@impl(_ops, "prepare", "CompositeExplicitAutograd")
def _prepare(
    x: Tensor,
    shadow: Tensor | None,
    state: Tensor | None,
    stream: int,
    lost: Tensor | None,
    held: Tensor | None,
    text: str,
) -> list[Tensor]:
    job, noise = Job.parse(text), None if state is None else Noise(state, stream)
    return job.flatten(backend_of_job(x, job).prepare(x, job, noise, shadow, lost, held))


@register_fake("mxfp4::prepare", lib=_ops)
def _shapes_of_prepare(
    x: Tensor,
    shadow: Tensor | None,
    state: Tensor | None,
    stream: int,
    lost: Tensor | None,
    held: Tensor | None,
    text: str,
) -> list[Tensor]:
    job = Job.parse(text)
    return job.flatten(job.empty(x))


@impl(_ops, "expand", "CompositeExplicitAutograd")
def _expand(codes: Tensor, scales: Tensor, spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    packed = Packed(codes, scales, QuantizerSpec.parse(spec), columns)
    return backend_of_packed(packed).expand(packed, dtype)


@register_fake("mxfp4::expand", lib=_ops)
def _shape_of_expand(codes: Tensor, scales: Tensor, spec: str, columns: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape[0], columns, dtype=dtype)


@impl(_ops, "turn_back", "CompositeExplicitAutograd")
def _turn_back(x: Tensor, turn: str, state: Tensor, stream: int) -> Tensor:
    return backend_of_turning(x).turn_back(x, Turn.parse(turn), Noise(state, stream))


@register_fake("mxfp4::turn_back", lib=_ops)
def _shape_of_turn_back(x: Tensor, turn: str, state: Tensor, stream: int) -> Tensor:
    return x.new_empty(x.shape)
