"""What is quantized, how and along which axis: one QuantizerSpec a quantizer, six of them a LinearRecipe.

With X (N tokens x D), W (C x D) and G = dL/dY (N x C) as they are stored, blocks always run along the dimension that
the product sums over (paper, equations 3 to 5):

    output      Y     = q1(X) q2(W)^T       sums over D:  q1, q2 along axis -1
    grad_input  dL/dX = q3(G) q4(W)         sums over C:  q3 along axis -1, q4 along axis 0
    grad_weight dL/dW = q5(G)^T q6(X)       sums over N:  q5, q6 along axis 0

A recipe owns these axes: whatever axis a quantizer comes with, in a recipe it has that of its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, Literal

from quantization.formats import FORMATS, ElementFormat

Rounding = Literal["nearest_even", "nearest_away", "nearest_up", "stochastic"]
ScaleRule = Literal["truncation_free", "floor"]
BackwardOperands = Literal["requantized", "original"]
Carrier = Literal["bf16", "fp8"]

SCALE_RULES = ("truncation_free", "floor")
ROUNDINGS = ("nearest_even", "nearest_away", "nearest_up", "stochastic")
BACKWARD_OPERANDS = ("requantized", "original")
CARRIERS = ("bf16", "fp8")
QUANTIZERS = ("q1", "q2", "q3", "q4", "q5", "q6")
AXES = {"q1": -1, "q2": -1, "q3": -1, "q4": 0, "q5": 0, "q6": 0}


def expect(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raises ValueError for a value that is not one of those allowed."""
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
        expect("element", self.element, FORMATS)
        expect("scale_rule", self.scale_rule, SCALE_RULES)
        expect("rounding", self.rounding, ROUNDINGS)
        if not isinstance(self.axis, int):
            raise ValueError(f"axis must be an integer; got {self.axis!r}")
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size must be a positive integer; got {self.block_size!r}")

    @property
    def format(self) -> ElementFormat:
        return FORMATS[self.element]

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def text(self) -> str:
        """All of it as one word, which `parse` reads back."""
        return f"{self.element}/{self.scale_rule}/{self.rounding}/{self.axis}/{self.block_size}"

    @staticmethod
    def parse(text: str) -> QuantizerSpec:
        """The spec of a `text`."""
        element, scale_rule, rounding, axis, block_size = text.split("/")
        return QuantizerSpec(element, scale_rule, rounding, int(axis), int(block_size))

    def __str__(self) -> str:
        return f"{self.element}/{self.scale_rule}/{self.rounding}"


@dataclass(frozen=True)
class LinearRecipe:
    """The six quantizers of a linear layer (None: the identity) and what q4 and q6 read.

    `q1` to `q6` get the axis of their place, see above.
    `backward_operands`: `requantized` (TetraJet's double quantization: q4 reads q2's output and q6 reads q1's) or
    `original` (Microscaling: q4 reads W and q6 reads X).
    `carrier`: the dtype of operands inside the products: `bf16` (the compute dtype) or `fp8` (see operands/).
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
            spec = getattr(self, name)
            if not isinstance(spec, QuantizerSpec | None):
                raise ValueError(f"{name} must be a QuantizerSpec or None; got {spec!r}")
            if spec is not None and spec.axis != AXES[name]:
                object.__setattr__(self, name, dataclasses.replace(spec, axis=AXES[name]))
        expect("backward_operands", self.backward_operands, BACKWARD_OPERANDS)
        expect("carrier", self.carrier, CARRIERS)

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


@dataclass(frozen=True)
class Int4Recipe:
    """The switches of the INT4 layer. Raises ValueError where one is not a bool.

    Args:
        hadamard: quantize X H and W H; off, X and W.
        sampling: keep N of the 2N rows of the split gradient by leverage score; off, all of them.
        learned_step: steps are parameters (LSQ); off, 2 mean|.| / sqrt(7) of the tensor at each forward pass.
    """

    hadamard: bool = True
    sampling: bool = True
    learned_step: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false; got {value!r}")

    @property
    def active(self) -> tuple[str, ...]:
        """What is quantized, whatever the switches."""
        return ("activation", "weight", "gradient")

    def table(self) -> dict[str, str]:
        """Every field as text, for manifests."""
        return {"scheme": "int4", **{f.name: str(getattr(self, f.name)) for f in fields(self)}}

    def __str__(self) -> str:
        return " ".join(["int4", *(f.name for f in fields(self) if getattr(self, f.name))])
