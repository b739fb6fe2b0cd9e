"""What is quantized, how and along which axis: one QuantizerSpec a quantizer, six of them a LinearRecipe.

`resolve` is the only place that knows the paper's axes. With X (N tokens x D), W (C x D) and G = dL/dY (N x C) as they
are stored, blocks of 32 always run along the dimension that the product sums over (paper, equations 3 to 5):

    output      Y     = q1(X) q2(W)^T       sums over D:  q1, q2 along axis -1
    grad_input  dL/dX = q3(G) q4(W)         sums over C:  q3 along axis -1, q4 along axis 0
    grad_weight dL/dW = q5(G)^T q6(X)       sums over N:  q5, q6 along axis 0
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, Literal

from quantization.formats import FORMATS, ElementFormat
from quantization.layers.int4 import Int4Recipe

Rounding = Literal["nearest_even", "nearest_away", "nearest_up", "stochastic"]
ScaleRule = Literal["truncation_free", "floor"]
BackwardOperands = Literal["requantized", "original"]
Carrier = Literal["bf16", "fp8"]

SCALE_RULES = ("truncation_free", "floor")
ROUNDINGS = ("nearest_even", "nearest_away", "nearest_up", "stochastic")
BACKWARD_OPERANDS = ("requantized", "original")
CARRIERS = ("bf16", "fp8")
QUANTIZERS = ("q1", "q2", "q3", "q4", "q5", "q6")
_AXIS = {"q1": -1, "q2": -1, "q3": -1, "q4": 0, "q5": 0, "q6": 0}
_GRADIENT = ("q3", "q5")  # the quantizers that read G; the others read activations or weights
_FORWARD = ("q1", "q2")


def _expect(name: str, value: Any, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


@dataclass(frozen=True)
class QuantizerSpec:
    """One microscaling quantizer.

    Args:
        element: name of an element format in `quantization.formats.FORMATS`.
        scale_rule: `truncation_free` (TetraJet, section 3.2: the smallest scale at which nothing saturates) or
            `floor` (Microscaling, equation 2: elements beyond the largest magnitude saturate).
        rounding: `nearest_even`, `nearest_away`, `nearest_up` (they differ in ties alone) or `stochastic`.
        axis: dimension of the stored tensor along which blocks run.
        block_size: elements that share a scale; a last partial block is allowed.

    Raises ValueError for any other value.
    """

    element: str = "e2m1"
    scale_rule: ScaleRule = "truncation_free"
    rounding: Rounding = "nearest_even"
    axis: int = -1
    block_size: int = 32

    def __post_init__(self) -> None:
        _expect("element", self.element, FORMATS)
        _expect("scale_rule", self.scale_rule, SCALE_RULES)
        _expect("rounding", self.rounding, ROUNDINGS)
        if not isinstance(self.axis, int):
            raise ValueError(f"axis must be an integer; got {self.axis!r}")
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size must be a positive integer; got {self.block_size!r}")

    def __hash__(self) -> int:
        return self._hash  # asked for several times in every layer

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    @property
    def format(self) -> ElementFormat:
        return FORMATS[self.element]

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    def __str__(self) -> str:
        return f"{self.element}/{self.scale_rule}/{self.rounding}"


@dataclass(frozen=True)
class LinearRecipe:
    """The six quantizers of a linear layer (None: the identity) and what q4 and q6 read.

    `backward_operands`: `requantized` (TetraJet's double quantization: q4 reads q2's output and q6 reads q1's) or
    `original` (Microscaling: q4 reads W and q6 reads X).
    `carrier`: the dtype of operands inside the products: `bf16` (the compute dtype) or `fp8` (see operands.py).
    """

    q1: QuantizerSpec | None = None
    q2: QuantizerSpec | None = None
    q3: QuantizerSpec | None = None
    q4: QuantizerSpec | None = None
    q5: QuantizerSpec | None = None
    q6: QuantizerSpec | None = None
    backward_operands: BackwardOperands = "requantized"
    carrier: Carrier = "bf16"

    def __post_init__(self) -> None:
        for name in QUANTIZERS:
            if not isinstance(getattr(self, name), QuantizerSpec | None):
                raise ValueError(f"{name} must be a QuantizerSpec or None; got {getattr(self, name)!r}")
        _expect("backward_operands", self.backward_operands, BACKWARD_OPERANDS)
        _expect("carrier", self.carrier, CARRIERS)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the quantizers that are on."""
        return tuple(name for name in QUANTIZERS if getattr(self, name) is not None)

    def table(self) -> dict[str, str]:
        """Every field as text, for manifests: {"q1": "e2m1/truncation_free/nearest_even axis -1 block 32", ...}."""
        entries = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: f"{value} axis {value.axis} block {value.block_size}"
            if isinstance(value, QuantizerSpec)
            else str(value)
            for name, value in entries.items()
        }

    def __str__(self) -> str:
        """The quantizers, those that are alike named together, as `print(model)` shows them."""
        groups: dict[str, list[str]] = {}
        for name in self.active:
            groups.setdefault(str(getattr(self, name)), []).append(name)
        if not groups:
            return "full_precision"
        specs = [f"{' '.join(names)}: {spec}" for spec, names in groups.items()]
        return ", ".join([*specs, self.backward_operands, *(["fp8"] if self.carrier == "fp8" else [])])


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
        _expect("every entry of active", name, QUANTIZERS)
    specs = {
        name: QuantizerSpec(
            element=gradient if name in _GRADIENT else activation_weight,
            scale_rule=scale_rule,
            rounding=forward if name in _FORWARD else backward,
            axis=_AXIS[name],
        )
        for name in active
    }
    return LinearRecipe(**specs, backward_operands=backward_operands, carrier=carrier)


PRESETS: dict[str, LinearRecipe] = {
    "full_precision": build_recipe(()),
    "tetrajet": build_recipe(),
    "microscaling": build_recipe(scale_rule="floor", backward_operands="original", backward="nearest_even"),
}


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
