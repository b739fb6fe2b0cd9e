"""Recipes by the paper's axes of variation, and by name.

`build_recipe` is the only place that knows the paper's axes: which quantizers are on, what they share, and what q3 and
q5, which read gradients, have of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from quantization.policy import Policy
from quantization.rotation import Rotation
from quantization.spec import Int4Recipe, LinearRecipe, QuantizerSpec
from quantization.words import QUANTIZERS, BackwardOperands, Carrier, Rounding, ScaleRule, expect

_GRADIENT = ("q3", "q5")  # the quantizers that read G; the others read activations or weights
_FORWARD = ("q1", "q2")
# Keys of a configuration that are fields of every quantizer alike; scale_rule, element and rounding are build_recipe's.
_SHARED = (
    *("block_size", "scale_format", "scale_rounding", "target", "outer", "outer_delay", "target_scale", "arithmetic"),
)


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
        expect("a recipe", recipe, PRESETS)
        return PRESETS[recipe]
    if not isinstance(recipe, LinearRecipe | Int4Recipe):
        raise TypeError(
            f"a recipe is a LinearRecipe, an Int4Recipe or the name of a preset ({', '.join(PRESETS)}); got {recipe!r}"
        )
    return recipe


def resolve(quant: Any) -> LinearRecipe | Int4Recipe:
    """The recipe of the `quant` section of a configuration, by its scheme: none, mx or int4.

    Raises ValueError where its keys do not go together.
    """
    if quant.scheme == "none":
        return PRESETS["full_precision"]
    if quant.scheme == "int4":
        return Int4Recipe(hadamard=quant.hadamard, sampling=quant.sampling, learned_step=quant.learned_step)
    recipe = build_recipe(
        quant.active,
        scale_rule=quant.scale_rule,
        backward_operands=quant.backward_operands,
        activation_weight=quant.element.activation_weight,
        gradient=quant.element.gradient,
        forward=quant.rounding.forward,
        backward=quant.rounding.backward,
    )
    specs = {}
    for name in recipe.active:
        shared = {key: getattr(quant, key) for key in _SHARED}
        own = {} if name not in quant.quantizers else quant.quantizers[name].model_dump(exclude_none=True)
        specs[name] = dataclasses.replace(getattr(recipe, name), **shared | own)
    for name in quant.quantizers:
        if name not in recipe.active:
            raise ValueError(f"quant.quantizers names {name}, which quant.active does not")
    rotations = {f"rotate_{product}": Rotation(**given.model_dump()) for product, given in quant.rotation.items()}
    policy = Policy(quant.policy.first, quant.policy.last, tuple((k, tuple(v)) for k, v in quant.policy.off.items()))
    operands = {"weight_operand": quant.weight_operand, "activation_operand": quant.activation_operand}
    return dataclasses.replace(recipe, **specs, **operands, **rotations, policy=policy, carrier=quant.carrier)
