"""Which form each quantizer's result has in a linear layer, and the jobs that follow from it.

The carrier of a recipe is the dtype of operands inside a product: `bf16` stands for the compute dtype, `fp8` for E4M3
(X and W) and E5M2 (G). With P the exponent of the scale that the largest finite magnitude of the matrix calls for, and
TOP the largest s at which the dtype holds every code times 2^s, numbers are carried times 2^(TOP - P) and the product
is multiplied by what undoes it. Every code is exact down to the scale exponent P - TOP + LOWEST: with e2m1 over 15
octaves in E4M3, over 29 in E5M2. In a block below that window numbers are rounded to the fp8 grid (nearest, ties to
even), and the block is counted. So the carriers compute the same sums, and differ in the order of accumulation and in
those counted blocks alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantization.job import CARRIED, DENSE, E4M3, E5M2, FP8_MULTIPLE, NOTHING, PACKED, SCALED, Job, share_a_window
from quantization.rotation import Turn
from quantization.spec import LinearRecipe, QuantizerSpec
from quantization.words import PRODUCTS, QUANTIZERS

X, W, G = "XWG"  # activation, weight, output gradient
STREAMS = {name: number for number, name in enumerate(QUANTIZERS)}  # of noise, within those of a layer


class Role(NamedTuple):
    """A matrix of a layer: its row and its column quantizer, the fp8 dtype that carries it, the products of both."""

    row: str
    column: str
    fp8: torch.dtype
    row_product: str
    column_product: str


ROLES = {
    X: Role("q1", "q6", E4M3, "output", "grad_weight"),
    W: Role("q2", "q4", E4M3, "output", "grad_input"),
    G: Role("q3", "q5", E5M2, "grad_input", "grad_weight"),
}
_PARTNER = {one: other for role in ROLES.values() for one, other in ((role.row, role.column), (role.column, role.row))}
# Products by their quantizers, and the quantizers that read what these two make.
NUMBERS = {product: number for number, product in enumerate(PRODUCTS)}  # of products, for the signs of rotations
_PRODUCTS = ((("q1", "q2"), ("q4", "q6")), (("q3", "q4"), ()), (("q5", "q6"), ()))


def packable(spec: QuantizerSpec | None) -> bool:
    return (
        spec is not None
        and spec.block_size == 32
        and spec.block_rows == 1
        and len(spec.format.magnitudes) == 8
        and spec.power_of_two
        and spec.factor == 1
        and not spec.scale_rule.startswith("rms")
    )


def dense_form(spec: QuantizerSpec | None) -> str:
    """The form of numbers: with a factor where they are no numbers of the compute dtype without one."""
    return SCALED if spec is not None and (spec.factor != 1 or spec.outer == "fp32") else DENSE


def forms_of(recipe: LinearRecipe, weight_shape: tuple[int, int], on_gpu: bool, empty: bool) -> dict[str, str]:
    """The form of every quantizer's result in a linear layer, by the quantizer's name.

    A product is carried by fp8 where the recipe says so, both its operands are quantized to 4 bits and the sides of the
    weight are multiples of 16; q1 and q2 only with q6 and q4 after them, which read theirs; and no matrix is carried
    twice by quantizers that would need two windows. On a GPU, what q6 makes of X is kept packed.
    """
    forms = {name: dense_form(getattr(recipe, name)) for name in QUANTIZERS}
    if empty:
        return forms
    if on_gpu and packable(recipe.q6):
        forms["q6"] = PACKED
    if recipe.carrier == "fp8" and all(side % FP8_MULTIPLE == 0 for side in weight_shape):
        for pair, readers in _PRODUCTS:
            carried = all(packable(getattr(recipe, name)) for name in (*pair, *readers))
            for name in pair:
                partner = _PARTNER[name]
                if carried and forms[partner] == CARRIED:
                    carried = share_a_window(getattr(recipe, name), getattr(recipe, partner))
            if carried:
                forms.update(dict.fromkeys(pair, CARRIED))
    return forms


class LinearJobs:
    """What a linear layer of `recipe` and a weight of `weight_shape` (C, D) asks of its backend, a Job for each matrix.

    Each is made once for every case that comes up; they follow from the recipe, which must not change.
    """

    def __init__(self, recipe: LinearRecipe, weight_shape: tuple[int, int]) -> None:
        self.recipe, self.weight_shape = recipe, tuple(weight_shape)
        self.active = bool(recipe.active) or recipe.rotated
        self.delayed = any(getattr(recipe, name).outer_delay for name in recipe.active)
        self._made: dict[tuple, Job] = {}

    def of(
        self, role: str, x: Tensor, dtype: torch.dtype, row: bool = True, column: bool = True, sums: bool = False
    ) -> Job:
        """The job for the matrix of a role, X, W or G, with products in `dtype`. x: the matrix; for W that of X.

        row, column: whether what the row and the column quantizer make is wanted; sums: whether the sum over rows is.
        """
        size = None  # which rotations alone depend on
        if self.recipe.rotated:
            size = self.weight_shape if role == W else tuple(x.shape)
        case = role, dtype, x.is_cuda, x.numel() == 0, size, row, column, sums
        if torch.compiler.is_compiling():  # which must not see what was made before
            return self._make(*case)
        if case not in self._made:
            self._made[case] = self._make(*case)
        return self._made[case]

    def turn(self, product: str, length: int) -> Turn | None:
        """The rotation of a product whose operands have this length along the dimension it sums over."""
        rotation = self.recipe.rotation(product)
        return None if rotation is None else rotation.turn(length, NUMBERS[product])

    def _make(
        self,
        role: str,
        dtype: torch.dtype,
        on_gpu: bool,
        empty: bool,
        size: tuple[int, int] | None,
        row: bool,
        column: bool,
        sums: bool,
    ) -> Job:
        rows, columns = size or (0, 0)
        forms, names = forms_of(self.recipe, self.weight_shape, on_gpu, empty), ROLES[role]
        chained = {X: self.recipe.chained_activation, W: self.recipe.chained_weight, G: False}[role]
        first = getattr(self.recipe, names.row)
        return Job(
            row=getattr(self.recipe, names.row) if row else None,
            column=getattr(self.recipe, names.column) if column else None,
            row_form=forms[names.row] if row else NOTHING,
            column_form=forms[names.column] if column else NOTHING,
            dtype=dtype,
            fp8=names.fp8,
            chained=chained,
            sums=sums,
            row_stream=STREAMS[names.row],
            column_stream=STREAMS[names.column],
            row_turn=self.turn(names.row_product, columns) if row else None,
            column_turn=self.turn(names.column_product, rows) if column else None,
            mask=row and first is not None and first.gradient == "mask",
        )
