"""Recipes by the paper's axes of variation, and by name.

`build_recipe` is the only place that knows the paper's axes: which quantizers are on, what they share, and what q3 and
q5, which read gradients, have of their own.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from quantization.spec import (
    QUANTIZERS,
    BackwardOperands,
    Carrier,
    Int4Recipe,
    LinearRecipe,
    QuantizerSpec,
    Rounding,
    ScaleRule,
    expect,
)

_GRADIENT = ("q3", "q5")  # the quantizers that read G; the others read activations or weights
_FORWARD = ("q1", "q2")


def build_recipe(
    active: Collection[str] = QUANTIZERS,
    *,
    scale_rule: ScaleRule = "truncation_free",
    backward_operands: BackwardOperands = "requantized",
    activation_weight: str = "e2m1",
    gradient: str = "e2m1",
    forward: Rounding = "nearest_even",
    backward: Rounding = "stochastic",
    carrier: Carrier = "bf16",
) -> LinearRecipe:
    """Expand the paper's axes of variation into six quantizers; the defaults are TetraJet.

    Args:
        active: which quantizers are on (Tables 1 and 6).
        scale_rule, backward_operands: as in QuantizerSpec and LinearRecipe (Table 5).
        activation_weight, gradient: element formats of q1 q2 q4 q6 and of q3 q5 (Table 7).
        forward, backward: roundings of q1 q2 and of q3 q4 q5 q6 (Table 5).
        carrier: as in LinearRecipe.
    """
    for name in active:
        expect("every entry of active", name, QUANTIZERS)
    specs = {
        name: QuantizerSpec(
            element=gradient if name in _GRADIENT else activation_weight,
            scale_rule=scale_rule,
            rounding=forward if name in _FORWARD else backward,
        )
        for name in active
    }
    return LinearRecipe(**specs, backward_operands=backward_operands, carrier=carrier)


PRESETS: dict[str, LinearRecipe] = {
    "full_precision": build_recipe(()),
    "tetrajet": build_recipe(),
    "microscaling": build_recipe(scale_rule="floor", backward_operands="original", backward="nearest_even"),
}


def as_recipe(recipe: LinearRecipe | Int4Recipe | str) -> LinearRecipe | Int4Recipe:
    """A recipe, or that of a preset's name. Raises ValueError for another name, TypeError for anything else."""
    if isinstance(recipe, str):
        expect("a recipe", recipe, (*PRESETS, "int4"))
        return Int4Recipe() if recipe == "int4" else PRESETS[recipe]
    if not isinstance(recipe, LinearRecipe | Int4Recipe):
        raise TypeError(
            f"a recipe is a LinearRecipe, an Int4Recipe or the name of a preset ({', '.join(PRESETS)}, int4); got "
            f"{recipe!r}"
        )
    return recipe


def resolve(quant: Any) -> LinearRecipe | Int4Recipe:
    """The recipe of the `quant` section of a configuration, by its scheme: none, mx or int4."""
    if quant.scheme == "none":
        return PRESETS["full_precision"]
    if quant.scheme == "int4":
        return Int4Recipe(hadamard=quant.hadamard, sampling=quant.sampling, learned_step=quant.learned_step)
    return build_recipe(
        quant.active,
        scale_rule=quant.scale_rule,
        backward_operands=quant.backward_operands,
        activation_weight=quant.element.activation_weight,
        gradient=quant.element.gradient,
        forward=quant.rounding.forward,
        backward=quant.rounding.backward,
        carrier=quant.carrier,
    )
