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
from dataclasses import dataclass, field, fields
from typing import Any

from quantization.formats import FORMATS, SCALE_FORMATS, ElementFormat, ScaleFormat
from quantization.policy import Policy
from quantization.rotation import Rotation
from quantization.words import (
    ARITHMETICS,
    AXES,
    BACKWARD_OPERANDS,
    CARRIERS,
    E2M1_RULES,
    GRADIENTS,
    OPERANDS,
    OUTERS,
    PRODUCTS,
    QUANTIZERS,
    ROUNDINGS,
    SCALE_ROUNDINGS,
    SCALE_RULES,
    Arithmetic,
    BackwardOperands,
    Carrier,
    Gradient,
    Operand,
    Outer,
    Rounding,
    ScaleRounding,
    ScaleRule,
    expect,
    expect_positive,
    expect_whole,
    toward_zero,
)

_FP8_BITS = 4, 3  # significant bits of E4M3, which carries X and W, and of E5M2, which carries G


@dataclass(frozen=True)
class QuantizerSpec:
    """One block quantizer. The defaults are TetraJet's; every word below them leaves its bits as they are.

    Args:
        element: name of an element format in `quantization.formats.FORMATS`.
        scale_rule: of E8M0 scales, by the largest magnitude M of a block, for E2M1:
            `truncation_free` (TetraJet, section 3.2: the smallest scale at which nothing saturates, M/S in (3, 6]),
            `floor` (Microscaling, equation 2: elements beyond the largest magnitude saturate, [4, 8)),
            `three_quarter` (4/3 of floor's, [3, 6)), `even` ([3.5, 7)), `overflow_aware` ((3.625, 7.25]);
            or by the standard deviation: `rms_floor` and `rms_nearest`, powers of two below and next to 2.92 / 6 of it.
        rounding: `nearest_even`, `nearest_away`, `nearest_up` (they differ in ties alone) or `stochastic`.
        axis: dimension of the stored tensor along which blocks run.
        block_size: elements that share a scale; a last partial block is allowed.
        scale_format: name of a format in SCALE_FORMATS.
        scale_rounding: of M / target to a scale with fraction bits: `nearest` (ties to even), `up` or `stochastic`. An
            fp32 scale is M / target as float32 divides, whichever it is.
        block_rows: rows (across the axis) of a block: 1, or block_size for square tiles of a matrix.
        target: what M becomes; None for the largest magnitude. Not for E8M0, whose rules say it. Of more than float32's
            24 bits, which are cut.
        outer: a second scale P of the whole tensor, by its largest finite magnitude A: `none`, `pow2` (the smallest
            power of two from 2^-100 on with A <= target * target_scale * P) or `fp32`.
        outer_delay: 0: A is that of the present tensor; D: that of the latest position of a run that D divides. What
            has grown since then saturates, but for the room that a target_scale below the format's largest leaves.
        target_scale: the scale code that A's block gets; None for the format's largest.
        arithmetic: `exact` (every decision as if in exact arithmetic, given the scale), or the order of float32
            operations of TransformerEngine (`te`) or of torchao 0.16 (`torchao`), for comparison with them.
        correction: a factor of the result.
        gradient: `ste`, or `mask`: the gradient of what lies beyond the largest magnitude is 0.

    Raises ValueError for any other value, and for those that do not go together.
    """

    element: str = "e2m1"
    scale_rule: ScaleRule = "truncation_free"
    rounding: Rounding = "nearest_even"
    axis: int = -1
    block_size: int = 32
    scale_format: str = "e8m0"
    scale_rounding: ScaleRounding = "nearest"
    block_rows: int = 1
    target: float | None = None
    outer: Outer = "none"
    outer_delay: int = 0
    target_scale: float | None = None
    arithmetic: Arithmetic = "exact"
    correction: float = 1.0
    gradient: Gradient = "ste"

    def __post_init__(self) -> None:
        expect("element", self.element, FORMATS)
        expect("scale_rule", self.scale_rule, SCALE_RULES)
        expect("rounding", self.rounding, ROUNDINGS)
        expect_whole("axis", self.axis, -64, 63)
        expect_whole("block_size", self.block_size, 1)
        expect("scale_format", self.scale_format, SCALE_FORMATS)
        expect("scale_rounding", self.scale_rounding, SCALE_ROUNDINGS)
        expect("outer", self.outer, OUTERS)
        expect("arithmetic", self.arithmetic, ARITHMETICS)
        expect("gradient", self.gradient, GRADIENTS)
        if type(self.block_rows) is not int or self.block_rows not in (1, self.block_size):
            raise ValueError(f"block_rows must be 1 or block_size ({self.block_size}); got {self.block_rows!r}")
        expect_whole("outer_delay", self.outer_delay, 0)
        for name in ("correction", "target", "target_scale"):
            if (value := getattr(self, name)) is not None or name == "correction":
                expect_positive(name, value)
                object.__setattr__(self, name, float(value))  # numpy's floats are written otherwise
        if fault := self._contradiction():
            raise ValueError(fault)

    def _contradiction(self) -> str | None:
        """What does not go together, as a sentence; None where all does."""
        if self.scale_rule in E2M1_RULES and self.element != "e2m1":
            return f"scale_rule {self.scale_rule} is made for e2m1; got element {self.element}"
        if self.scale_rule == "even" and self.format.mantissa_bits is None:
            return f"scale_rule even needs an element whose next number is known; got element {self.element}"
        if self.scale_format == "e8m0":
            for name, off in (
                ("scale_rounding", "nearest"),
                ("target", None),
                ("outer", "none"),
                ("arithmetic", "exact"),
            ):
                if getattr(self, name) != off:
                    return (
                        f"{name} {getattr(self, name)} needs another scale_format than e8m0, whose scale_rule says all"
                    )
        elif self.scale_rule != "truncation_free":
            return f"scale_rule {self.scale_rule} is one of e8m0 scales; got scale_format {self.scale_format}"
        if self.outer != "none" and not takes_outer(self.scale_format):
            return f"an outer scale needs scales of a narrow range (e4m3 or ue5m3); got {self.scale_format}"
        if self.outer == "none" and (self.outer_delay or self.target_scale is not None):
            return "outer_delay and target_scale are of an outer scale, and outer is none"
        if self.target_scale is not None and self.target_scale > self.scale.max:
            return (
                f"target_scale is at most {self.scale.max:g}, {self.scale_format}'s largest; got {self.target_scale!r}"
            )
        if self.outer != "none" and self.reach < 4:
            return (
                f"target times target_scale must be at least 4, or an outer scale may leave float32; got {self.reach!r}"
            )
        if self.arithmetic == "exact":
            return "outer fp32 needs an arithmetic, te or torchao" if self.outer == "fp32" else None
        lone = self.element == "e2m1" and self.scale_format == "e4m3" and self.scale_rounding == "nearest"
        if not lone or self.target is not None or self.target_scale is not None or self.outer_delay:
            return f"arithmetic {self.arithmetic} goes with e2m1, nearest e4m3 scales, target 6 and no delay alone"
        if self.outer == "pow2" or (self.arithmetic == "te" and self.outer == "none"):
            return f"arithmetic {self.arithmetic} is that of an fp32 outer scale; got outer {self.outer}"
        return None

    @property
    def format(self) -> ElementFormat:
        return FORMATS[self.element]

    @property
    def scale(self) -> ScaleFormat:
        return SCALE_FORMATS[self.scale_format]

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def draws(self) -> bool:
        """Whether the quantizer needs noise."""
        return self.stochastic or self.scale_rounding == "stochastic"

    @property
    def power_of_two(self) -> bool:
        """Whether the scale is a power of two (with three_quarter, but for the factor 4/3)."""
        return self.scale_format == "e8m0"

    @property
    def plain(self) -> bool:
        """Whether it is one of the paper's: its scale rule is, and what the paper does not have is at its default."""
        return not self._others() and self.scale_rule in ("truncation_free", "floor")

    @property
    def ruled(self) -> bool:
        """Whether scales are powers of two by a rule of the largest magnitude, of blocks along the axis; no more."""
        return not self._others() and self.scale_rule in ("truncation_free", "floor", "even", "overflow_aware")

    @property
    def aim(self) -> float:
        """The target in float32's bits."""
        return self.format.max if self.target is None else toward_zero(self.target)

    @property
    def reach(self) -> float:
        """target * target_scale: what the outer scale brings the tensor's largest magnitude to."""
        return self.aim * (self.scale.max if self.target_scale is None else self.target_scale)

    def _unfit_for_fp8(self, bits: int) -> str | None:
        """What fp8 numbers of so many significant bits cannot carry exactly of it, in words."""
        if self.format.significant_bits > bits:
            return f"element {self.element} of {self.format.significant_bits} significant bits, more than {bits}"
        if not self.power_of_two:
            return f"{self.scale_format} scales"
        if self.factor != 1 or self.scale_rule.startswith("rms"):
            return f"scale_rule {self.scale_rule}" if self.correction == 1 else "a correction"
        return "square blocks" if self.block_rows > 1 else None

    @property
    def factor(self) -> float:
        """What results are to be multiplied by at last: 1 but for three_quarter and a correction."""
        return (4 / 3 if self.scale_rule == "three_quarter" else 1.0) * self.correction

    @property
    def known_factor(self) -> float | None:
        """The factor of results, where no outer scale takes part in it."""
        return None if self.outer == "fp32" else self.factor

    @property
    def saturates(self) -> bool:
        """Whether a number of a block may be larger than what the largest magnitude stands for."""
        if self.scale_format == "fp32":
            return False
        return not self.power_of_two or self.scale_rule not in ("truncation_free", "three_quarter")

    def _others(self) -> list[tuple[str, Any]]:
        """The fields behind the first five that are not at their defaults."""
        return [(f.name, getattr(self, f.name)) for f in fields(self)[5:] if getattr(self, f.name) != f.default]

    @property
    def text(self) -> str:
        """All of it as one word, which `parse` reads back."""
        first = f"{self.element}/{self.scale_rule}/{self.rounding}/{self.axis}/{self.block_size}"
        return first + "".join(f"/{name}={value!r}".replace("'", "") for name, value in self._others())

    @staticmethod
    def parse(text: str) -> QuantizerSpec:
        """The spec of a `text`."""
        element, scale_rule, rounding, axis, block_size, *others = text.split("/")
        read = {"block_rows": int, "outer_delay": int, "target": float, "target_scale": float, "correction": float}
        pairs = (other.split("=") for other in others)
        given = {name: read.get(name, str)(value) for name, value in pairs}
        return QuantizerSpec(element, scale_rule, rounding, int(axis), int(block_size), **given)

    def __str__(self) -> str:
        rule = self.scale_rule if self.power_of_two else self.scale_format
        others = [
            f"{name} {repr(value).removesuffix('.0')}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self._others()
            if name != "scale_format"
        ]
        return " ".join([f"{self.element}/{rule}/{self.rounding}", *others])


def takes_outer(scale_format: str) -> bool:
    """Whether scales of the format have a range so narrow that they need one of the tensor over them."""
    scale = SCALE_FORMATS[scale_format]
    return scale.fraction is not None and bool(scale.subnormal)


@dataclass(frozen=True)
class LinearRecipe:
    """The six quantizers of a linear layer (None: the identity), what q4 and q6 read, and what is rotated.

    `q1` to `q6` get the axis of their place, see above.
    `backward_operands`: `requantized` (TetraJet's double quantization: q4 reads q2's output and q6 reads q1's) or
    `original` (Microscaling: q4 reads W and q6 reads X). `weight_operand` and `activation_operand`: the same for q4 and
    for q6 alone; `shared`: what backward_operands says.
    `carrier`: the dtype of operands inside the products: `bf16` (the compute dtype) or `fp8` (see operands/).
    `rotate_output`, `rotate_grad_input`, `rotate_grad_weight`: the rotation of both operands of a product.
    `policy`: which layers of a model it is for; convert_linears reads it.

    Raises ValueError for any other value, and for those that do not go together.
    """

    q1: QuantizerSpec | None = None
    q2: QuantizerSpec | None = None
    q3: QuantizerSpec | None = None
    q4: QuantizerSpec | None = None
    q5: QuantizerSpec | None = None
    q6: QuantizerSpec | None = None
    backward_operands: BackwardOperands = "requantized"
    carrier: Carrier = "bf16"
    weight_operand: Operand = "shared"
    activation_operand: Operand = "shared"
    rotate_output: Rotation | None = None
    rotate_grad_input: Rotation | None = None
    rotate_grad_weight: Rotation | None = None
    policy: Policy = field(default=Policy())

    def __post_init__(self) -> None:
        for name in QUANTIZERS:
            spec = getattr(self, name)
            if not isinstance(spec, QuantizerSpec | None):
                raise ValueError(f"{name} must be a QuantizerSpec or None; got {spec!r}")
            if spec is not None and spec.axis != AXES[name]:
                object.__setattr__(self, name, dataclasses.replace(spec, axis=AXES[name]))
        expect("backward_operands", self.backward_operands, BACKWARD_OPERANDS)
        expect("carrier", self.carrier, CARRIERS)
        for name in ("weight_operand", "activation_operand"):
            expect(name, getattr(self, name), OPERANDS)
        for product in PRODUCTS:
            if not isinstance(self.rotation(product), Rotation | None):
                raise ValueError(f"rotate_{product} must be a Rotation or None; got {self.rotation(product)!r}")
        if not isinstance(self.policy, Policy):
            raise ValueError(f"policy must be a Policy; got {self.policy!r}")
        if fault := self._contradiction():
            raise ValueError(fault)

    def _contradiction(self) -> str | None:
        """What does not go together, as a sentence; None where all does."""
        for name in QUANTIZERS[2:]:
            if (spec := getattr(self, name)) is not None and spec.gradient != "ste":
                return f"gradient {spec.gradient} is for q1 and q2, whose results have a gradient; got it for {name}"
        for name, chained in (("q1", self.chained_activation), ("q2", self.chained_weight)):
            masks = getattr(self, name) is not None and getattr(self, name).gradient == "mask"
            if masks and self.rotate_output is not None and not chained:
                return f"gradient mask of {name} under a rotation of the output needs requantized backward operands"
        if self.carrier == "fp8":
            for name in self.active:
                if unfit := getattr(self, name)._unfit_for_fp8(_FP8_BITS[name in ("q3", "q5")]):
                    return f"carrier fp8 holds elements times a power of two alone, and {name} has {unfit}"
            for product in PRODUCTS:
                if self.rotation(product) is not None:
                    return f"carrier fp8 goes with no rotation; {product} has one"
        return None

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the quantizers that are on."""
        return tuple(name for name in QUANTIZERS if getattr(self, name) is not None)

    @property
    def chained_weight(self) -> bool:
        """Whether q4 reads what q2 made."""
        own = self.weight_operand
        return (self.backward_operands if own == "shared" else own) == "requantized"

    @property
    def chained_activation(self) -> bool:
        """Whether q6 reads what q1 made."""
        own = self.activation_operand
        return (self.backward_operands if own == "shared" else own) == "requantized"

    def rotation(self, product: str) -> Rotation | None:
        """That of a product: output, grad_input or grad_weight."""
        return getattr(self, f"rotate_{product}")

    @property
    def rotated(self) -> bool:
        """Whether any product is."""
        return any(self.rotation(product) is not None for product in PRODUCTS)

    def table(self) -> dict[str, str]:
        """Every field as text, for manifests: {"q1": "e2m1/truncation_free/nearest_even axis -1 block 32", ...}.

        Fields that were added to the first eight are there where they are not at their defaults.
        """
        entries = {f.name: getattr(self, f.name) for f in fields(self)[:8]}
        entries |= {f.name: getattr(self, f.name) for f in fields(self)[8:] if getattr(self, f.name) != f.default}
        return {
            name: f"{value} axis {value.axis} block {value.block_size}"
            if isinstance(value, QuantizerSpec)
            else str(value)
            for name, value in entries.items()
        }

    def without(self, products: Collection[str]) -> LinearRecipe:
        """The recipe with these products in high precision, for any layer."""
        names = [name for product in products for name in PRODUCTS[product]]
        rotations = [f"rotate_{product}" for product in products]
        return dataclasses.replace(self, **dict.fromkeys([*names, *rotations]), policy=Policy())

    def __str__(self) -> str:
        """The quantizers, those that are alike named together, as `print(model)` shows them."""
        groups: dict[str, list[str]] = {}
        for name in self.active:
            spec = getattr(self, name)
            block = "" if spec.block_size == QuantizerSpec.block_size else f" block {spec.block_size}"
            groups.setdefault(f"{spec}{block}", []).append(name)
        rotations = [f"{p} {self.rotation(p)}" for p in PRODUCTS if self.rotation(p) is not None]
        if not groups and not rotations:
            return "full_precision"
        specs = [f"{' '.join(names)}: {spec}" for spec, names in groups.items()]
        own = [
            f"{name} {getattr(self, name)}"
            for name in ("weight_operand", "activation_operand")
            if getattr(self, name) != "shared"
        ]
        return ", ".join(
            [*specs, self.backward_operands, *own, *rotations, *(["fp8"] if self.carrier == "fp8" else [])]
        )


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
