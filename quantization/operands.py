"""What the products of a linear layer read: each of X, W and G quantized for the two products it enters, in one pass.

A quantized matrix comes in one of three forms:

    DENSE    numbers in the compute dtype, which holds every quantized value exactly
    PACKED   4-bit codes, two to a byte, and one byte of scale (E8M0) a block: what is kept for the backward pass
    PEAKED   packed, with the largest scale of the matrix: what an fp8 product is made from

The carrier is the dtype that operands have inside a product. `bf16` stands for the compute dtype. `fp8` multiplies in
E4M3 (X and W) and E5M2 (G): with P the largest exponent s of the matrix, its numbers are brought up by 2^(TOP - P),
where TOP is the largest s at which the dtype holds every code, and the product is multiplied by what undoes it. All
codes stay exact down to s = P - TOP + LOWEST: with e2m1, over 15 octaves of s in E4M3 and 29 in E5M2. A number below
that window is rounded to the dtype's grid (nearest, ties to even), and `lost_in_carrier` counts it. So the two
carriers compute the same sums, and differ in the order of accumulation and in those counted numbers alone.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantization import reference
from quantization.formats import ElementFormat
from quantization.noise import Noise
from quantization.quantize import DTYPES, fake_quantize, implementation_for
from quantization.spec import QUANTIZERS, LinearRecipe, QuantizerSpec

BACKEND = "auto"  # of the quantizers in a layer, as fake_quantize has it
NOTHING, DENSE, PACKED, PEAKED = "nothing", "dense", "packed", "peaked"
_TENSORS = {NOTHING: 0, DENSE: 1, PACKED: 2, PEAKED: 2}  # of each form; the peaks of row and column are one more
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_FP8 = {E4M3: (8, -9), E5M2: (15, -16)}  # exponents of the largest binade and of the smallest number
FP8_MULTIPLE = 16  # cuBLAS takes fp8 matrices whose sides are multiples of this


@functools.cache
def window(fmt: ElementFormat, dtype: torch.dtype) -> tuple[int, int]:
    """TOP and LOWEST: the exponents s of a scale between which an fp8 dtype holds every code times 2^s exactly."""
    largest, smallest = _FP8[dtype]
    return largest - fmt.emax, smallest - (math.frexp(fmt.magnitudes[1])[1] - 1)


@functools.cache
def lost_in_carrier(device: torch.device) -> Tensor:
    """How many numbers the fp8 carrier has rounded in this process so far: int64, on the device."""
    return torch.zeros((), dtype=torch.int64, device=device)


class Operand(NamedTuple):
    """A matrix as `prepare` leaves it: (values,), (codes, scales) or (codes, scales, peak), and what was applied."""

    tensors: tuple[Tensor, ...]
    spec: QuantizerSpec | None
    columns: int

    @property
    def peaked(self) -> bool:
        return len(self.tensors) == 3

    def values(self, dtype: torch.dtype) -> Tensor:
        """The numbers in the compute dtype, (rows, columns)."""
        if len(self.tensors) == 1:
            return self.tensors[0]
        return expand(*self.tensors[:2], None, self.spec, self.columns, dtype)[0]

    def carried(self, dtype: torch.dtype, over: int) -> tuple[Tensor, Tensor]:
        """In an fp8 dtype, with the summed dimension `over` last and padded; and the factor left out of it."""
        return expand(*self.tensors, self.spec, self.columns, dtype, transposed=over == 0, pad=FP8_MULTIPLE)


def _packable(spec: QuantizerSpec | None) -> bool:
    return spec is not None and spec.block_size == 32 and len(spec.format.magnitudes) == 8


def forms_of(recipe: LinearRecipe, x: Tensor, weight: Tensor) -> dict[str, str]:
    """The form of every quantizer's result in a linear layer, by the quantizer's name.

    A product is carried by fp8 where the recipe says so, both its operands are quantized to 4 bits and the layer's
    sides are multiples of 16. On a GPU, what q6 makes of X is kept packed.
    """
    forms = dict.fromkeys(QUANTIZERS, DENSE)
    if x.numel() == 0:
        return forms
    if (x.is_cuda or BACKEND == "triton") and _packable(recipe.q6):
        forms["q6"] = PACKED
    if recipe.carrier == "fp8" and all(side % FP8_MULTIPLE == 0 for side in weight.shape):
        for pair in (("q1", "q2"), ("q3", "q4"), ("q5", "q6")):
            if all(_packable(getattr(recipe, name)) for name in pair):
                forms.update(dict.fromkeys(pair, PEAKED))
    return forms


# ---------------------------------------------------------------------------------------------------------------------
# Making operands
# ---------------------------------------------------------------------------------------------------------------------


def prepare(
    x: Tensor,
    row: QuantizerSpec | None,
    column: QuantizerSpec | None,
    forms: tuple[str, str],
    dtype: torch.dtype,
    *,
    chained: bool = False,
    sums: bool = False,
    noise: Noise | None = None,
    streams: tuple[int, int] = (0, 0),
    shadow: Tensor | None = None,
) -> tuple[Operand | None, Operand | None, Tensor | None]:
    """Quantize a matrix along its rows (`row`, axis -1) and along its columns (`column`, axis 0), reading it once.

    Args:
        x: float32, bfloat16 or float16, (rows, columns).
        row, column: the quantizers; None where there is none.
        forms: the form of either result; NOTHING where it is not wanted.
        dtype: the compute dtype, of DENSE results.
        chained: the column quantizer reads what the row quantizer has made, and not x.
        sums: sum x over its rows too, in float32.
        noise, streams: of stochastic rounding, and what is added to its stream for either quantizer.
        shadow: shadow weight of x's shape, for the row quantizer.

    Returns the two operands and the sums, None for what was not wanted.
    Raises TypeError for another dtype of x.
    """
    if row is None and column is None:
        return None, None, x.sum(0, dtype=torch.float32) if sums else None
    if x.dtype not in DTYPES:
        raise TypeError(f"quantizers take float32, bfloat16 or float16; got {str(x.dtype).removeprefix('torch.')}")
    state, stream = noise if noise is not None else (None, 0)
    forms = tuple(NOTHING if spec is None else form for spec, form in zip((row, column), forms, strict=True))
    arguments = (x, shadow, state, stream + streams[0], stream + streams[1], _key(row), _key(column), *forms)
    implementation = torch.ops.mxfp4.prepare if torch.compiler.is_compiling() else _prepare
    tensors = implementation(*arguments, dtype, chained, sums)
    split = _TENSORS[forms[0]]
    own = [tensors[:split], tensors[split : split + _TENSORS[forms[1]]]]
    for index, form in enumerate(forms):
        if form == PEAKED:
            own[index].append(tensors[-1 - sums][index])
    operands = [Operand(tuple(t), spec, x.shape[1]) if t else None for t, spec in zip(own, (row, column), strict=True)]
    return operands[0], operands[1], tensors[-1] if sums else None


def expand(
    codes: Tensor,
    scales: Tensor,
    peak: Tensor | None,
    spec: QuantizerSpec,
    columns: int,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    pad: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The numbers of a packed matrix in `dtype`, the last dimension padded with zeros to a multiple of `pad`.

    Returns them and, where `peak` is given and `dtype` is an fp8 one, the float32 scalar to multiply them by.
    """
    implementation = torch.ops.mxfp4.expand if torch.compiler.is_compiling() else _expand
    tensors = implementation(codes, scales, peak, _key(spec), columns, dtype, transposed, pad)
    return tensors[0], None if peak is None else tensors[1]


def codes_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of the bytes of a packed matrix."""
    return rows, (columns + 1) // 2


def scales_shape(rows: int, columns: int, spec: QuantizerSpec) -> tuple[int, int]:
    """Of the scales of a packed matrix."""
    along, across = (rows, columns) if spec.axis == 0 else (columns, rows)
    return -(-along // spec.block_size), across


# Specs travel through custom ops as text.


def _key(spec: QuantizerSpec | None) -> str:
    return "" if spec is None else f"{spec}/{spec.axis}/{spec.block_size}"


@functools.cache
def _spec(key: str) -> QuantizerSpec | None:
    if not key:
        return None
    element, scale_rule, rounding, axis, block_size = key.split("/")
    return QuantizerSpec(element, scale_rule, rounding, int(axis), int(block_size))


def _kernels_for(x: Tensor, *specs: QuantizerSpec | None) -> ModuleType | None:
    """The module of Triton kernels where they serve this matrix and these quantizers, else None."""
    served = x.numel() > 0 and all(s is None or s.block_size == 32 for s in specs)
    first = next(s for s in specs if s is not None)
    kernels = implementation_for(x, first, BACKEND) if served else reference
    return None if kernels is reference else kernels


def _prepare(
    x: Tensor,
    shadow: Tensor | None,
    state: Tensor | None,
    row_stream: int,
    column_stream: int,
    row: str,
    column: str,
    row_form: str,
    column_form: str,
    dtype: torch.dtype,
    chained: bool,
    sums: bool,
) -> list[Tensor]:
    row_spec, column_spec, forms = _spec(row), _spec(column), (row_form, column_form)
    chained = chained and row_spec is not None
    kernels = _kernels_for(x, row_spec, column_spec)
    if kernels is not None:
        return kernels.prepare(
            x,
            row_spec,
            column_spec,
            forms,
            dtype,
            chained=chained,
            sums=sums,
            state=state,
            streams=(row_stream, column_stream),
            shadow=shadow,
        )
    results, peaks, source = [], [], x
    for spec, form, stream in ((row_spec, row_form, row_stream), (column_spec, column_form, column_stream)):
        peaks.append(torch.zeros((), dtype=torch.int32, device=x.device))
        if spec is None:
            continue
        own_shadow = shadow if spec is row_spec else None
        seed = Noise(state, stream) if spec.stochastic else None
        values = fake_quantize(source, spec, seed=seed, shadow=own_shadow, backend="reference")
        if form == DENSE:
            results.append(values.to(dtype))
        elif form != NOTHING:
            scales = reference.scale_codes(source, spec, own_shadow)
            results += [reference.pack(values, scales, spec), scales]
            peaks[-1] = scales.masked_fill(scales == reference.NAN_SCALE, 0).amax().int()
        source = values if chained else x
    results += [torch.stack(peaks)] if PEAKED in forms else []
    return results + ([x.sum(0, dtype=torch.float32)] if sums else [])


def _expand(
    codes: Tensor,
    scales: Tensor,
    peak: Tensor | None,
    key: str,
    columns: int,
    dtype: torch.dtype,
    transposed: bool,
    pad: int,
) -> list[Tensor]:
    spec = _spec(key)
    kernels = _kernels_for(codes, spec)
    if kernels is not None:
        return kernels.expand(codes, scales, peak, spec, columns, dtype, transposed=transposed, pad=pad)
    values = reference.unpack(codes, scales, spec, columns)
    factor = []
    if peak is not None:
        shift = window(spec.format, dtype)[0] - (peak - reference.SCALE_BIAS)
        scaled = values * reference.power_of_two(shift.clamp(-127, 127))
        values, factor = scaled.float(), [reference.power_of_two((-shift).clamp(-127, 127))]
        kept = values.to(dtype).double()
        lost_in_carrier(codes.device).add_(((scaled != kept) & ~scaled.isnan()).sum())
    values = values.t() if transposed else values
    return [F.pad(values, (0, -values.shape[1] % pad)).to(dtype), *factor]


_library = torch.library.Library("mxfp4", "DEF")
_library.define(
    "prepare(Tensor x, Tensor? shadow, Tensor? state, SymInt row_stream, SymInt column_stream, str row, str column, "
    "str row_form, str column_form, ScalarType dtype, bool chained, bool sums) -> Tensor[]"
)
_library.define(
    "expand(Tensor codes, Tensor scales, Tensor? peak, str spec, SymInt columns, ScalarType dtype, bool transposed, "
    "int pad) -> Tensor[]"
)
_library.impl("prepare", _prepare, "CompositeExplicitAutograd")
_library.impl("expand", _expand, "CompositeExplicitAutograd")


@torch.library.register_fake("mxfp4::prepare", lib=_library)
def _(x, shadow, state, row_stream, column_stream, row, column, row_form, column_form, dtype, chained, sums):
    rows, columns = x.shape
    results = []
    for key, form in ((row, row_form), (column, column_form)):
        if form == DENSE:
            results.append(x.new_empty(rows, columns, dtype=dtype))
        elif form != NOTHING:
            results.append(x.new_empty(codes_shape(rows, columns), dtype=torch.uint8))
            results.append(x.new_empty(scales_shape(rows, columns, _spec(key)), dtype=torch.uint8))
    if PEAKED in (row_form, column_form):
        results.append(x.new_empty(2, dtype=torch.int32))
    return results + ([x.new_empty(columns, dtype=torch.float32)] if sums else [])


@torch.library.register_fake("mxfp4::expand", lib=_library)
def _(codes, scales, peak, spec, columns, dtype, transposed, pad):
    rows, length = (columns, codes.shape[0]) if transposed else (codes.shape[0], columns)
    values = codes.new_empty(rows, -(-length // pad) * pad, dtype=dtype)
    return [values] if peak is None else [values, codes.new_empty((), dtype=torch.float32)]


# ---------------------------------------------------------------------------------------------------------------------
# Multiplying them
# ---------------------------------------------------------------------------------------------------------------------


def multiply(
    a: Operand,
    b: Operand,
    over: tuple[int, int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    fp8: tuple[torch.dtype, torch.dtype] = (E4M3, E4M3),
) -> Tensor:
    """The product of two matrices, summed over dimension over[0] of a and over[1] of b (0 or -1), plus a bias.

    In fp8 dtypes where both operands are PEAKED, else in the compute dtype `dtype`.
    """
    if a.peaked and b.peaked:
        (a_KM, a_factor), (b_KM, b_factor) = a.carried(fp8[0], over[0]), b.carried(fp8[1], over[1])
        if a_KM.is_cuda:
            return torch._scaled_mm(a_KM, b_KM.t(), a_factor, b_factor, bias=bias, out_dtype=out_dtype)
        product = (a_KM.float() @ b_KM.float().t()) * (a_factor * b_factor)
        return (product if bias is None else product + bias.float()).to(out_dtype)
    a_MK, b_NK = (m.values(dtype) if o == -1 else m.values(dtype).t() for m, o in zip((a, b), over, strict=True))
    if bias is not None:
        return F.linear(a_MK, b_NK, bias).to(out_dtype)
    if a_MK.is_cuda and out_dtype == torch.float32 != dtype:  # without a rounding to the compute dtype in between
        return torch.mm(a_MK, b_NK.t(), out_dtype=out_dtype)
    return (a_MK @ b_NK.t()).to(out_dtype)
