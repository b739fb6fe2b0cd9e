"""Recipes by the paper's axes of variation, and by name: the paper's own and those of other FP4 methods.

`build_recipe` is the only place that knows the paper's axes: which quantizers are on, what they share, and what q3 and
q5, which read gradients, have of their own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from quantization.policy import Policy
from quantization.rotation import Rotation
from quantization.spec import Int4Recipe, LinearRecipe, QuantizerSpec, takes_outer
from quantization.words import QUANTIZERS, BackwardOperands, Carrier, Rounding, ScaleRule, expect

_GRADIENT = ("q3", "q5")  # the quantizers that read G; the others read activations or weights
_FORWARD = ("q1", "q2")
# Keys of a configuration that are fields of every quantizer alike.
_OF_CODED = ("scale_rounding", "target", "outer", "outer_delay", "target_scale", "arithmetic")  # of scales but e8m0
_SHARED = ("scale_rule", "block_size", "scale_format", *_OF_CODED)


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
    elements, roundings = (activation_weight, gradient), (forward, backward)
    specs = {name: QuantizerSpec(**_by_place(name, elements, roundings), scale_rule=scale_rule) for name in active}
    return LinearRecipe(**specs, backward_operands=backward_operands, carrier=carrier)


def _by_place(name: str, elements: tuple[str, str], roundings: tuple[Rounding, Rounding]) -> dict[str, str]:
    """What a quantizer has by what it reads, and by its pass."""
    return {"element": elements[name in _GRADIENT], "rounding": roundings[name not in _FORWARD]}


_E4M3 = QuantizerSpec(block_size=16, scale_format="e4m3", outer="pow2")  # NVFP4, its outer scale a power of two
_UE5M3 = QuantizerSpec(block_size=16, scale_format="ue5m3", outer="pow2", target_scale=448.0, outer_delay=50)
_EVEN = QuantizerSpec(scale_rule="even")
_QUARTERS = QuantizerSpec(scale_rule="three_quarter")
RTN_GAIN = 1.009276  # what rounding to nearest takes from a gradient, as Quartet publishes it


def _stochastic(spec: QuantizerSpec) -> QuantizerSpec:
    return replace(spec, rounding="stochastic")


def _square(spec: QuantizerSpec) -> QuantizerSpec:
    return replace(spec, block_rows=spec.block_size)


def _one_weight(spec: QuantizerSpec, **others: Any) -> LinearRecipe:
    """Square blocks for W, so that both products read one weight; stochastic gradients; q6 reads X, to nearest."""
    return LinearRecipe(
        q1=spec,
        q2=_square(spec),
        q3=_stochastic(spec),
        q4=_square(spec),
        q5=_stochastic(spec),
        q6=spec,
        backward_operands="original",
        **others,
    )


def _quartet(rule: ScaleRule, backward: QuantizerSpec) -> LinearRecipe:
    """Forward by the standard deviation with a mask for the gradient; both backward products rotated anew each time."""
    forward = QuantizerSpec(scale_rule=rule, gradient="mask")
    return LinearRecipe(
        forward,
        forward,
        *[backward] * 4,
        rotate_output=Rotation(32),
        rotate_grad_input=Rotation(32, "fresh"),
        rotate_grad_weight=Rotation(32, "fresh"),
    )


PRESETS: dict[str, LinearRecipe] = {
    "full_precision": build_recipe(()),
    "tetrajet": build_recipe(),
    "microscaling": build_recipe(scale_rule="floor", backward_operands="original", backward="nearest_even"),
    # 2509.25149: 16 x 16 blocks of W, rotated grad_weight, the last sixth of the blocks left alone.
    "nvfp4": _one_weight(_E4M3, rotate_grad_weight=Rotation(16, "fixed"), policy=Policy(last=2)),
    # 2502.20586: the backward pass alone.
    "mxfp4_tseng": LinearRecipe(
        **dict.fromkeys(("q3", "q4", "q5", "q6"), _stochastic(_QUARTERS)),
        backward_operands="original",
        rotate_grad_input=Rotation(64, "fresh"),
        rotate_grad_weight=Rotation(64, "fresh"),
    ),
    # 2505.14669, as the paper says it and as its code is.
    "quartet": _quartet("rms_nearest", QuantizerSpec(correction=RTN_GAIN)),
    "quartet_released": _quartet("rms_floor", _stochastic(_QUARTERS)),
    # 2510.27527 without outlier channels and the reset of oscillating weights.
    "tetrajet2": LinearRecipe(
        _E4M3,
        _E4M3,
        *[_stochastic(_E4M3)] * 4,
        rotate_grad_input=Rotation(16, "fresh"),
        rotate_grad_weight=Rotation(16, "fresh"),
    ),
    # 2505.19115.
    "fqt": LinearRecipe(
        q1=_E4M3,
        q2=_E4M3,
        q3=_stochastic(_E4M3),
        q4=_E4M3,
        q5=_stochastic(_E4M3),
        q6=_stochastic(_E4M3),
        backward_operands="original",
    ),
    # 2609.02846: no rotation, no layer left alone.
    "ue5m3": _one_weight(_UE5M3),
    # AMD's MXFP4 recipe (ALTO).
    "amd_mxfp4": _one_weight(_EVEN, rotate_grad_weight=Rotation(32, "fixed")),
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
    """The recipe of the `quant` section of a configuration, by its scheme: none, mx or int4.

    Raises ValueError where its keys do not go together, and says for which quantizer where it has keys of its own.
    """
    if quant.scheme == "none":
        return PRESETS["full_precision"]
    if quant.scheme == "int4":
        return Int4Recipe(hadamard=quant.hadamard, sampling=quant.sampling, learned_step=quant.learned_step)
    for name in quant.quantizers:
        if name not in quant.active:
            raise ValueError(f"quant.quantizers names {name}, which quant.active does not")
    specs = {name: _spec_of(name, quant) for name in quant.active}
    rotations = {f"rotate_{product}": Rotation(**given.model_dump()) for product, given in quant.rotation.items()}
    policy = Policy(quant.policy.first, quant.policy.last, tuple((k, tuple(v)) for k, v in quant.policy.spare.items()))
    operands = ("backward_operands", "weight_operand", "activation_operand")
    read = {operand: getattr(quant, operand) for operand in operands}
    return LinearRecipe(**specs, **read, **rotations, policy=policy, carrier=quant.carrier)


def _spec_of(name: str, quant: Any) -> QuantizerSpec:
    """A quantizer: what the section says for all, by its place, and what is its own. Raises ValueError."""
    own = quant.quantizers[name].model_dump(exclude_none=True) if name in quant.quantizers else {}
    elements = (quant.element.activation_weight, quant.element.gradient)
    section = _by_place(name, elements, (quant.rounding.forward, quant.rounding.backward))
    section |= {key: getattr(quant, key) for key in _SHARED}
    try:
        return QuantizerSpec(**{key: value for key, value in section.items() if key not in _void(quant, own)} | own)
    except ValueError as error:
        raise ValueError(f"for {name}, {error}" if own else f"{error}") from None


def _void(quant: Any, own: dict[str, Any]) -> set[str]:
    """Keys of the section that mean nothing under a quantizer's own scale format, or without an outer scale."""
    void = set()
    fmt = own.get("scale_format", quant.scale_format)
    if fmt != quant.scale_format:
        void |= set(_OF_CODED) if fmt == "e8m0" else {"scale_rule"}
        if not takes_outer(fmt):
            void |= {"outer", "arithmetic"}
    if "outer" in void or own.get("outer") == "none":
        void |= {"outer_delay", "target_scale"}
    return void
