"""What the products of a linear layer read: each of X, W and G quantized for the two products it enters.

A quantized matrix has one of three forms:

    DENSE     numbers in the compute dtype, which holds every quantized value exactly
    PACKED    4-bit codes, two to a byte, and one byte of scale (E8M0) a block: kept for the backward pass
    CARRIED   fp8 numbers, the summed dimension last, and a power of two they are to be multiplied by

The carrier of a recipe is the dtype of operands inside a product: `bf16` stands for the compute dtype, `fp8` for E4M3
(X and W) and E5M2 (G). With P the exponent of the scale that the largest finite magnitude of the matrix calls for, and
TOP the largest s at which the dtype holds every code times 2^s, numbers are carried times 2^(TOP - P) and the product
is multiplied by what undoes it. Every code is exact down to the scale exponent P - TOP + LOWEST: with e2m1 over 15
octaves in E4M3, over 29 in E5M2. In a block below that window numbers are rounded to the fp8 grid (nearest, ties to
even), and `lost_in_carrier` counts the block. So the carriers compute the same sums, and differ in the order of
accumulation and in those counted blocks alone.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, impl, register_fake

from quantization.backends import reference
from quantization.formats import ElementFormat
from quantization.noise import Noise
from quantization.quantize import DTYPES, fake_quantize, implementation_for
from quantization.spec import QUANTIZERS, LinearRecipe, QuantizerSpec

BACKEND = "auto"  # of the quantizers in a layer, as fake_quantize has it
NOTHING, DENSE, PACKED, CARRIED = "nothing", "dense", "packed", "carried"
_TENSORS = {NOTHING: 0, DENSE: 1, PACKED: 2, CARRIED: 1}  # of each form; the power of two of carried ones is one more
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_FP8 = {E4M3: (8, -9), E5M2: (15, -16)}  # exponents of the largest binade and of the smallest number
FP8_MULTIPLE = 16  # cuBLAS takes fp8 matrices whose sides are multiples of this


class Operand(NamedTuple):
    """A matrix that `prepare` has made: (values,), (codes, scales) or (fp8 values, factor); spec None: unquantized."""

    tensors: tuple[Tensor, ...]
    spec: QuantizerSpec | None
    columns: int

    @property
    def carried(self) -> bool:
        return self.tensors[0].dtype in _FP8

    def values(self, dtype: torch.dtype) -> Tensor:
        """The numbers of a DENSE or PACKED operand in the compute dtype, (rows, columns)."""
        return self.tensors[0] if len(self.tensors) == 1 else expand(*self.tensors, self.spec, self.columns, dtype)


@functools.cache
def window(fmt: ElementFormat, fp8: torch.dtype) -> tuple[int, int]:
    """TOP and LOWEST: the exponents s of a scale between which an fp8 dtype holds every code times 2^s exactly."""
    largest, smallest = _FP8[fp8]
    return largest - fmt.emax, smallest - (math.frexp(fmt.magnitudes[1])[1] - 1)


@functools.cache
def lost_in_carrier(device: torch.device) -> Tensor:
    """How many blocks of this process were below the window of the fp8 carrier so far: int64, on the device."""
    return torch.zeros((), dtype=torch.int64, device=device)


def _packable(spec: QuantizerSpec | None) -> bool:
    return spec is not None and spec.block_size == 32 and len(spec.format.magnitudes) == 8


def forms_of(recipe: LinearRecipe, weight_shape: tuple[int, int], on_gpu: bool, empty: bool) -> dict[str, str]:
    """The form of every quantizer's result in a linear layer, by the quantizer's name.

    A product is carried by fp8 where the recipe says so, both its operands are quantized to 4 bits and the sides of the
    weight are multiples of 16; q1 and q2 only with q6 and q4 after them, which read theirs. On a GPU, what q6
    makes of X is kept packed.
    """
    forms = dict.fromkeys(QUANTIZERS, DENSE)
    if empty:
        return forms
    if on_gpu and _packable(recipe.q6):
        forms["q6"] = PACKED
    if recipe.carrier == "fp8" and all(side % FP8_MULTIPLE == 0 for side in weight_shape):
        for pair, needs in (("q1", "q2"), ("q4", "q6")), (("q3", "q4"), ()), (("q5", "q6"), ()):
            if all(_packable(getattr(recipe, name)) for name in (*pair, *needs)):
                forms.update(dict.fromkeys(pair, CARRIED))
    return forms


_remembered_forms = functools.lru_cache(maxsize=1024)(forms_of)


def forms_for(recipe: LinearRecipe, weight: Tensor, x: Tensor) -> dict[str, str]:
    """`forms_of` for the tensors of a layer."""
    get = forms_of if torch.compiler.is_compiling() else _remembered_forms  # torch.compile traces through a cache
    return get(recipe, tuple(weight.shape), x.is_cuda, x.numel() == 0)


# ---------------------------------------------------------------------------------------------------------------------
# Making operands
# ---------------------------------------------------------------------------------------------------------------------


def prepare(
    x: Tensor,
    row: QuantizerSpec | None,
    column: QuantizerSpec | None,
    forms: tuple[str, str],
    dtype: torch.dtype,
    fp8: torch.dtype = E4M3,
    *,
    chained: bool = False,
    sums: bool = False,
    noise: Noise | None = None,
    streams: tuple[int, int] = (0, 0),
    shadow: Tensor | None = None,
) -> tuple[Operand | None, Operand | None, Tensor | None]:
    """Quantize a matrix along its rows (`row`, axis -1) and along its columns (`column`, axis 0), reading it once.

    A carried result needs the largest magnitude first, and so a second look.

    Args:
        x: float32, bfloat16 or float16, (rows, columns).
        row, column: the quantizers, None for none; if both results are carried, of one element and scale rule.
        forms: the form of either result.
        dtype, fp8: of DENSE and of CARRIED results.
        chained: the column quantizer reads what the row quantizer has made, and not x.
        sums: sum x over its rows too, in float32.
        noise, streams: of stochastic rounding, and what is added to its stream for either quantizer.
        shadow: shadow weight of x's shape, for the row quantizer.

    Returns the two operands and the sums, None for what was not wanted. Raises TypeError for another dtype of x.
    """
    if row is None and column is None:
        return None, None, x.sum(0, dtype=torch.float32) if sums else None
    if x.dtype not in DTYPES:
        raise TypeError(f"quantizers take float32, bfloat16 or float16; got {str(x.dtype).removeprefix('torch.')}")
    state, stream = (None, 0) if noise is None else noise
    row_form, column_form = NOTHING if row is None else forms[0], NOTHING if column is None else forms[1]
    arguments = (x, shadow, state, stream + streams[0], stream + streams[1])
    if torch.compiler.is_compiling():
        keys = _key(row), _key(column)
        tensors = torch.ops.mxfp4.prepare(*arguments, *keys, row_form, column_form, dtype, fp8, chained, sums)
    else:
        tensors = _prepare(*arguments, row, column, row_form, column_form, dtype, fp8, chained, sums)
    operands, begin, columns = [], 0, x.shape[1]
    factor = _TENSORS[row_form] + _TENSORS[column_form]  # its place, if there is one
    for spec, form in ((row, row_form), (column, column_form)):
        end = begin + _TENSORS[form]
        own = (tensors[begin], tensors[factor]) if form == CARRIED else tuple(tensors[begin:end])
        operands.append(None if spec is None else Operand(own, spec, columns))
        begin = end
    return *operands, tensors[-1] if sums else None


def _prepare(
    x: Tensor,
    shadow: Tensor | None,
    state: Tensor | None,
    row_stream: int,
    column_stream: int,
    row: QuantizerSpec | None,
    column: QuantizerSpec | None,
    row_form: str,
    column_form: str,
    dtype: torch.dtype,
    fp8: torch.dtype,
    chained: bool,
    sums: bool,
) -> list[Tensor]:
    chained = chained and row is not None and column is not None
    kernels = _kernels_for(x, row, column)
    if kernels is not None:
        return kernels.prepare(
            x,
            row,
            column,
            (row_form, column_form),
            dtype,
            fp8,
            chained=chained,
            sums=sums,
            state=state,
            streams=(row_stream, column_stream),
            shadow=shadow,
        )
    x_float32 = x.float()  # what leaves float16's range in between is no matter of the results
    results, source, factor = [], x_float32, []
    for spec, form, stream in ((row, row_form, row_stream), (column, column_form, column_stream)):
        if spec is None:
            continue
        own_shadow = shadow if spec is row else None
        seed = Noise(state, stream) if spec.stochastic else None
        values = fake_quantize(source, spec, seed=seed, shadow=own_shadow, backend="reference")
        if form == DENSE:
            results.append(values.to(dtype))
        else:
            scales = reference.scale_codes(source, spec, own_shadow)
            codes = reference.pack(values, scales, spec)
        if form == PACKED:
            results += [codes, scales]
        if form == CARRIED:
            result, factor = _carry(reference.unpack(codes, scales, spec, x.shape[1]), scales, x, row or column, fp8)
            result = result if spec.axis == -1 else result.t()
            results.append(F.pad(result.float(), (0, -result.shape[1] % FP8_MULTIPLE)).to(fp8).contiguous())
        source = values if chained else x_float32
    return [*results, *factor, *([x.sum(0, dtype=torch.float32)] if sums else [])]


def _carry(
    exact: Tensor, scales: Tensor, x: Tensor, spec: QuantizerSpec, fp8: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Bring quantized values of x (float64) and their E8M0 codes into fp8's window; the factor that undoes it."""
    top, lowest = window(spec.format, fp8)
    largest = torch.where(torch.isfinite(x), x, 0.0).abs().amax().float()
    shift = (top - reference.scale_exponent(largest, spec.format, spec.scale_rule)).clamp(max=127)
    # Blocks of zeros, which have the smallest scale, do not count, nor the few others that have it.
    below = (scales > 0) & (scales.int() - reference.SCALE_BIAS + shift < lowest)
    lost_in_carrier(x.device).add_(below.sum())
    scaled = exact * reference.power_of_two(shift)
    return scaled.float().to(fp8), [reference.power_of_two(-shift)]


def expand(codes: Tensor, scales: Tensor, spec: QuantizerSpec, columns: int, dtype: torch.dtype) -> Tensor:
    """The numbers of a packed matrix in `dtype`, (rows, columns)."""
    if torch.compiler.is_compiling():
        return torch.ops.mxfp4.expand(codes, scales, _key(spec), columns, dtype)
    return _expand(codes, scales, spec, columns, dtype)


def _expand(codes: Tensor, scales: Tensor, spec: QuantizerSpec, columns: int, dtype: torch.dtype) -> Tensor:
    kernels = _kernels_for(codes, spec)
    if kernels is not None:
        return kernels.expand(codes, scales, spec, columns, dtype)
    return reference.unpack(codes, scales, spec, columns).to(dtype)


def _kernels_for(x: Tensor, *specs: QuantizerSpec | None) -> ModuleType | None:
    """The module of Triton kernels where they serve this matrix and these quantizers, else None."""
    if (BACKEND == "auto" and not x.is_cuda) or x.numel() == 0:
        return None
    return _kernels_for_specs(specs, BACKEND, x.device)


@functools.lru_cache(maxsize=1024)
def _kernels_for_specs(
    specs: tuple[QuantizerSpec | None, ...], backend: str, device: torch.device
) -> ModuleType | None:
    matrix = torch.empty((1, 1), device=device)
    modules = {implementation_for(matrix, s, backend) for s in specs if s is not None and s.block_size == 32}
    return modules.pop() if len(modules) == 1 and reference not in modules else None


# Shapes -----------------------------------------------------------------------------------------------------------


def codes_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of the bytes of a packed matrix."""
    return rows, (columns + 1) // 2


def scales_shape(rows: int, columns: int, spec: QuantizerSpec) -> tuple[int, int]:
    """Of the scales of a packed matrix."""
    along, across = (rows, columns) if spec.axis == 0 else (columns, rows)
    return -(-along // spec.block_size), across


def carried_shape(rows: int, columns: int, spec: QuantizerSpec) -> tuple[int, int]:
    """Of a carried matrix: the summed dimension is last and padded (with zeros, or NaN beside a block that is NaN)."""
    across, along = (columns, rows) if spec.axis == 0 else (rows, columns)
    return across, -(-along // FP8_MULTIPLE) * FP8_MULTIPLE


# ---------------------------------------------------------------------------------------------------------------------
# The same as custom ops, which torch.compile does not look into. Specs travel as text.
# ---------------------------------------------------------------------------------------------------------------------


def _key(spec: QuantizerSpec | None) -> str:
    return "" if spec is None else f"{spec.element}/{spec.scale_rule}/{spec.rounding}/{spec.axis}/{spec.block_size}"


@functools.cache
def _spec(key: str) -> QuantizerSpec | None:
    if not key:
        return None
    element, scale_rule, rounding, axis, block_size = key.split("/")
    return QuantizerSpec(element, scale_rule, rounding, int(axis), int(block_size))


_ops = Library("mxfp4", "DEF")
_ops.define(
    "prepare(Tensor x, Tensor? shadow, Tensor? state, SymInt row_stream, SymInt column_stream, str row, str column, "
    "str row_form, str column_form, ScalarType dtype, ScalarType fp8, bool chained, bool sums) -> Tensor[]"
)
_ops.define("expand(Tensor codes, Tensor scales, str spec, SymInt columns, ScalarType dtype) -> Tensor")


@impl(_ops, "prepare", "CompositeExplicitAutograd")
def _(x, shadow, state, row_stream, column_stream, row, column, *rest):
    return _prepare(x, shadow, state, row_stream, column_stream, _spec(row), _spec(column), *rest)


@impl(_ops, "expand", "CompositeExplicitAutograd")
def _(codes, scales, spec, columns, dtype):
    return _expand(codes, scales, _spec(spec), columns, dtype)


@register_fake("mxfp4::prepare", lib=_ops)
def _(x, shadow, state, row_stream, column_stream, row, column, row_form, column_form, dtype, fp8, chained, sums):
    rows, columns = x.shape
    results = []
    for key, form in ((row, row_form), (column, column_form)):
        if form == DENSE:
            results.append(x.new_empty(rows, columns, dtype=dtype))
        elif form == CARRIED:
            results.append(x.new_empty(carried_shape(rows, columns, _spec(key)), dtype=fp8))
        elif form == PACKED:
            results.append(x.new_empty(codes_shape(rows, columns), dtype=torch.uint8))
            results.append(x.new_empty(scales_shape(rows, columns, _spec(key)), dtype=torch.uint8))
    if CARRIED in (row_form, column_form):
        results.append(x.new_empty((), dtype=torch.float32))
    return results + ([x.new_empty(columns, dtype=torch.float32)] if sums else [])


@register_fake("mxfp4::expand", lib=_ops)
def _(codes, scales, spec, columns, dtype):
    return codes.new_empty(codes.shape[0], columns, dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Multiplying them
# ---------------------------------------------------------------------------------------------------------------------


def multiply(
    a: Operand,
    b: Operand,
    over: tuple[int, int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """The product of two matrices, summed over dimension over[0] of a and over[1] of b (0 or -1), plus a bias.

    In fp8 if both are CARRIED, else in the compute dtype `dtype`.
    """
    if a.carried:
        (a_MK, a_factor), (b_NK, b_factor) = a.tensors, b.tensors
        if a_MK.is_cuda:
            within = None if out_dtype == torch.float32 else bias  # cuBLAS adds none to a float32 product
            product = torch._scaled_mm(a_MK, b_NK.t(), a_factor, b_factor, bias=within, out_dtype=out_dtype)
            return product if bias is None or within is not None else product + bias
        with torch.autocast(a_MK.device.type, enabled=False):
            product = (a_MK.float() @ b_NK.float().t()) * (a_factor * b_factor)
        return (product if bias is None else product + bias.float()).to(out_dtype)
    a_MK = a.values(dtype) if over[0] == -1 else a.values(dtype).t()
    b_NK = b.values(dtype) if over[1] == -1 else b.values(dtype).t()
    if bias is not None:
        return F.linear(a_MK, b_NK, bias).to(out_dtype)
    if a_MK.is_cuda and out_dtype == torch.float32 != dtype:  # without a rounding to the compute dtype in between
        return torch.mm(a_MK, b_NK.t(), out_dtype=out_dtype)
    return (a_MK @ b_NK.t()).to(out_dtype)
