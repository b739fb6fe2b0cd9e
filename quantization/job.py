"""What is asked of a backend: one matrix quantized for the two products it enters. And what comes back.

A quantized matrix has one of four forms:

    DENSE     numbers in the compute dtype, which holds every quantized value exactly (but for those of fp32 scales)
    SCALED    such numbers and a factor that the product is to be multiplied by
    PACKED    4-bit codes, two to a byte, and the code of a scale a block, a byte of E8M0: kept for the backward pass
    CARRIED   fp8 numbers, the summed dimension last, and a power of two they are to be multiplied by

A backend is a module with four functions:

    quantize(x, spec, noise, shadow)            a tensor quantized and back, in its own dtype
    prepare(x, job, noise, shadow, lost, held)  a matrix quantized as a Job says: Prepared
    expand(packed, dtype)                       the numbers of a Packed matrix
    turn_back(x, turn, noise)                   a matrix rotated back, in its own dtype
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantization.formats import ElementFormat
from quantization.rotation import Turn
from quantization.spec import QuantizerSpec

NOTHING, DENSE, SCALED, PACKED, CARRIED = "nothing", "dense", "scaled", "packed", "carried"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_FP8 = {E4M3: (8, -9), E5M2: (15, -16)}  # exponents of the largest binade and of the smallest number
FP8_MULTIPLE = 16  # cuBLAS takes fp8 matrices whose sides are multiples of this


# ---------------------------------------------------------------------------------------------------------------------
# What comes back
# ---------------------------------------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """`values` (rows, columns) in the compute dtype."""

    values: Tensor


class Scaled(NamedTuple):
    """`values` (rows, columns) in the compute dtype, which times `factor` (float32 scalar) are the numbers.

    known: the factor, where it does not depend on the matrix; else None.
    """

    values: Tensor
    factor: Tensor
    known: float | None


class Packed(NamedTuple):
    """`codes` (uint8) and `scales` (uint8, for e8m3 int16, for fp32 int32) of a matrix of `columns` columns; see
    codes_shape and scales_shape."""

    codes: Tensor
    scales: Tensor
    spec: QuantizerSpec
    columns: int


class Carried(NamedTuple):
    """`values` (fp8, see carried_shape), which times `factor` (float32 scalar, a power of two) are the numbers."""

    values: Tensor
    factor: Tensor


Operand = Dense | Scaled | Packed | Carried


def tensors_of(operand: Operand) -> tuple[Tensor, ...]:
    """What an operand holds; what follows in it is no tensor."""
    return operand[:2]


class Shell(NamedTuple):
    """An operand without its tensors, which a backward pass saves apart."""

    kind: type
    count: int
    rest: tuple[Any, ...]

    @staticmethod
    def of(operand: Operand) -> Shell:
        return Shell(type(operand), len(operand[:2]), operand[2:])

    def around(self, tensors: Sequence[Tensor]) -> Operand:
        """The operand again, of the first `count` of the tensors."""
        return self.kind(*tensors[: self.count], *self.rest)


class Prepared(NamedTuple):
    """A matrix as the row and as the column quantizer hand it on, and its sum over rows; None for what is not asked.

    inside: whether each number that the row quantizer saw was not beyond the largest magnitude (bool).
    """

    row: Operand | None = None
    column: Operand | None = None
    sums: Tensor | None = None
    inside: Tensor | None = None


def codes_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of the bytes of a packed matrix."""
    return rows, (columns + 1) // 2


def scales_shape(rows: int, columns: int, spec: QuantizerSpec) -> tuple[int, int]:
    """Of the scales of a packed matrix: a row for each number that a block has along its axis."""
    along, across = (rows, columns) if spec.axis == 0 else (columns, rows)
    return -(-along // spec.block_size), -(-across // spec.block_rows)


def carried_shape(rows: int, columns: int, spec: QuantizerSpec) -> tuple[int, int]:
    """Of a carried matrix: the summed dimension is last and padded (with zeros, or NaN beside a block that is NaN)."""
    across, along = (columns, rows) if spec.axis == 0 else (rows, columns)
    return across, -(-along // FP8_MULTIPLE) * FP8_MULTIPLE


# ---------------------------------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def window(fmt: ElementFormat, fp8: torch.dtype) -> tuple[int, int]:
    """TOP and LOWEST: the exponents s of a scale between which an fp8 dtype holds every code times 2^s exactly."""
    largest, smallest = _FP8[fp8]
    return largest - fmt.emax, smallest - (math.frexp(fmt.magnitudes[1])[1] - 1)


def share_a_window(one: QuantizerSpec, other: QuantizerSpec) -> bool:
    """Whether fp8 can carry what both make of one matrix, by the same power of two."""
    return (one.element, one.scale_rule) == (other.element, other.scale_rule)


@dataclass(frozen=True)
class Job:
    """What two quantizers, one with blocks along rows and one with blocks along columns, are to make of a matrix.

    Args:
        row, column: the quantizers, of axes -1 and 0; None for none.
        row_form, column_form: the form of either result. With no quantizer: NOTHING, or DENSE for the matrix itself
            (the row quantizer's result where they are chained).
        row_stream, column_stream: added to the stream of noise for either quantizer.
        dtype, fp8: of DENSE and of CARRIED results.
        chained: the column quantizer reads what the row quantizer has made, and not the matrix.
        sums: sum the matrix over its rows too, in float32.
        row_turn, column_turn: the rotation of what either quantizer reads; None for none. With a rotation and no
            quantizer a DENSE result is what was rotated.
        mask: say of each number whether it was inside the row quantizer's range.

    Hashed by its text, so that it is the same key in every process. Raises ValueError where two carried results are not
    of one element and scale rule.
    """

    row: QuantizerSpec | None
    column: QuantizerSpec | None
    row_form: str
    column_form: str
    dtype: torch.dtype
    fp8: torch.dtype = E4M3
    chained: bool = False
    sums: bool = False
    row_stream: int = 0
    column_stream: int = 0
    row_turn: Turn | None = None
    column_turn: Turn | None = None
    mask: bool = False

    def __post_init__(self) -> None:
        if self.row_form == self.column_form == CARRIED and not share_a_window(self.row, self.column):
            raise ValueError(f"fp8 cannot carry {self.row} and {self.column} of one matrix: they need two windows")

    @property
    def uses(self) -> tuple[tuple[QuantizerSpec | None, str], ...]:
        """Quantizer and form of both results; NOTHING where there is no quantizer."""
        return (
            (self.row, NOTHING if self.row is None and self.row_turn is None else self.row_form),
            (self.column, NOTHING if self.column is None and self.column_turn is None else self.column_form),
        )

    @property
    def idle(self) -> bool:
        """Whether there is neither a quantizer nor a rotation."""
        return self.row is None and self.column is None and not self.rotated

    @property
    def rotated(self) -> bool:
        return self.row_turn is not None or self.column_turn is not None

    @property
    def carried(self) -> bool:
        return any(form == CARRIED for _, form in self.uses)

    @property
    def window(self) -> tuple[int, int]:
        """That of the carried results."""
        return window((self.row or self.column).format, self.fp8)

    def __hash__(self) -> int:
        return hash(self.text)  # a str keeps its hash; asked for at every call

    @functools.cached_property
    def text(self) -> str:
        return self.write()

    def write(self) -> str:
        """The job as one line, which `parse` reads back."""
        return (
            f"{self.row.text if self.row is not None else '-'} {self.column.text if self.column is not None else '-'} "
            f"{self.row_form} {self.column_form} {_NAMES[self.dtype]} {_NAMES[self.fp8]} "
            f"{int(self.chained)} {int(self.sums)} {self.row_stream} {self.column_stream}"
            + "".join(f" {'-' if turn is None else turn.text}" for turn in (self.row_turn, self.column_turn))
            + f" {int(self.mask)}"
        )

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> Job:
        """The job of a line."""
        row, column, row_form, column_form, dtype, fp8, *numbers, row_turn, column_turn, mask = text.split(" ")
        specs = (None if word == "-" else QuantizerSpec.parse(word) for word in (row, column))
        chained, sums, row_stream, column_stream = map(int, numbers)
        dtypes = getattr(torch, dtype), getattr(torch, fp8)
        flags, streams = (bool(chained), bool(sums)), (row_stream, column_stream)
        turns = (None if word == "-" else Turn.parse(word) for word in (row_turn, column_turn))
        return Job(*specs, row_form, column_form, *dtypes, *flags, *streams, *turns, mask == "1")

    def flatten(self, prepared: Prepared) -> list[Tensor]:
        """The tensors of what comes back, each once (both carried results have one factor): for a custom op."""
        tensors, factor = [], []
        for operand in (prepared.row, prepared.column):
            if isinstance(operand, Carried):
                tensors.append(operand.values)
                factor = [operand.factor]
            elif operand is not None:
                tensors += tensors_of(operand)
        last = [tensor for tensor in (prepared.sums, prepared.inside) if tensor is not None]
        return [*tensors, *factor, *last]

    def unflatten(self, tensors: Sequence[Tensor], columns: int) -> Prepared:
        """What `flatten` was given."""
        rest = list(tensors)
        inside = rest.pop() if self.mask else None
        sums = rest.pop() if self.sums else None
        factor = rest.pop() if self.carried else None
        operands: list[Operand | None] = []
        for spec, form in self.uses:
            if form == PACKED:
                operands.append(Packed(rest.pop(0), rest.pop(0), spec, columns))
            elif form == CARRIED:
                operands.append(Carried(rest.pop(0), factor))
            elif form == SCALED:
                operands.append(Scaled(rest.pop(0), rest.pop(0), spec.known_factor))
            else:
                operands.append(Dense(rest.pop(0)) if form == DENSE else None)
        return Prepared(*operands, sums, inside)

    def empty(self, x: Tensor) -> Prepared:
        """Tensors of the shapes and dtypes of what comes back, uninitialised."""
        rows, columns = x.shape
        new: Any = functools.partial(torch.empty, device=x.device)
        factor = new((), dtype=torch.float32) if self.carried else None
        operands: list[Operand | None] = []
        for spec, form in self.uses:
            if form == PACKED:
                shapes = codes_shape(rows, columns), scales_shape(rows, columns, spec)
                operands.append(Packed(*(new(shape, dtype=torch.uint8) for shape in shapes), spec, columns))
            elif form == SCALED:
                values, own = new((rows, columns), dtype=self.dtype), new((), dtype=torch.float32)
                operands.append(Scaled(values, own, spec.known_factor))
            elif form == CARRIED:
                operands.append(Carried(new(carried_shape(rows, columns, spec), dtype=self.fp8), factor))
            else:
                operands.append(Dense(new((rows, columns), dtype=self.dtype)) if form == DENSE else None)
        sums = new(columns, dtype=torch.float32) if self.sums else None
        return Prepared(*operands, sums, new((rows, columns), dtype=torch.bool) if self.mask else None)


_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
    E4M3: "float8_e4m3fn",
    E5M2: "float8_e5m2",
}
