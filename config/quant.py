"""The section `quant` of a configuration: which products of which layers are quantized, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from config.keys import Entries, Float, Int, Section, key

Element = Literal["e2m1", "e3m0", "e1m2"]
Rounding = Literal["nearest_even", "nearest_away", "nearest_up", "stochastic"]
ScaleRule = Literal["truncation_free", "floor", "three_quarter", "even", "overflow_aware", "rms_floor", "rms_nearest"]
ScaleFormat = Literal["e8m0", "e8m3", "e4m3", "ue5m3", "ue5m3_61440", "fp32"]
ScaleRounding = Literal["nearest", "up", "stochastic"]
Outer = Literal["none", "pow2", "fp32"]
Arithmetic = Literal["exact", "te", "torchao"]
Operand = Literal["requantized", "original"]
Quantizer = Literal["q1", "q2", "q3", "q4", "q5", "q6"]
Product = Literal["output", "grad_input", "grad_weight"]


class NoQuant(Section):
    """Every product in full precision."""

    scheme: Literal["none"] = key("none", "none (full precision), mx (microscaling) or int4")


class ElementConfig(Section):
    activation_weight: Element = key("e2m1", "element format of q1 q2 q4 q6 (activations and weights)")
    gradient: Element = key("e2m1", "element format of q3 q5 (output gradients)")


class RoundingConfig(Section):
    forward: Rounding = key("nearest_even", "rounding of q1 q2")
    backward: Rounding = key("stochastic", "rounding of q3 q4 q5 q6")


class QuantizerConfig(Section):
    """What one quantizer has of its own; null: what the section says for all, where that goes with its own."""

    element: Element | None = None
    scale_rule: ScaleRule | None = None
    rounding: Rounding | None = None
    block_size: Int | None = key(None, "", ge=1, le=1024)
    scale_format: ScaleFormat | None = None
    scale_rounding: ScaleRounding | None = None
    block_rows: Int | None = key(None, "1, or block_size for square blocks", ge=1, le=1024)
    target: Float | None = key(None, "", gt=0)
    outer: Outer | None = None
    outer_delay: Int | None = key(None, "", ge=0, le=2**30)
    target_scale: Float | None = key(None, "", gt=0)
    arithmetic: Arithmetic | None = None
    correction: Float | None = key(None, "factor of the result", gt=0)
    gradient: Literal["ste", "mask"] | None = None


class RotationConfig(Section):
    """A Hadamard rotation."""

    size: Literal[2, 4, 8, 16, 32, 64, 128] = 32
    signs: Literal["none", "fixed", "fresh"] = "none"


class PolicyConfig(Section):
    first: Int = key(0, "transformer blocks at the beginning that stay in high precision", ge=0, le=10**4)
    last: Int = key(0, "transformer blocks at the end that stay in high precision", ge=0, le=10**4)
    spare: Annotated[dict[str, list[Product] | None], Entries] = key(
        {}, 'products in high precision by the names of layers, such as {"blocks.*.mlp.fc2": [grad_weight]}'
    )


class MXQuant(Section):
    """Quantization of the block linears: blocks of elements that share a scale, along the contracted dimension."""

    scheme: Literal["mx"] = key("mx", "none (full precision), mx (microscaling) or int4")
    active: tuple[Quantizer, ...] = key(
        ("q1", "q2", "q3", "q4", "q5", "q6"), "which quantizers are on; the others are the identity"
    )
    scale_rule: ScaleRule = key(
        "truncation_free",
        "e8m0 scales: truncation_free (TetraJet), floor (Microscaling), three_quarter, even, overflow_aware or, by the "
        "standard deviation, rms_floor and rms_nearest",
    )
    backward_operands: Operand = key(
        "requantized", "q4 and q6 read the outputs of q2 and q1 (requantized) or W and X (original)"
    )
    weight_operand: Literal["shared", "requantized", "original"] = key(
        "shared", "the same for q4 alone; shared: what backward_operands says"
    )
    activation_operand: Literal["shared", "requantized", "original"] = key("shared", "the same for q6 alone")
    block_size: Int = key(32, "elements that share a scale: 32 (MXFP4), 16 (NVFP4)", ge=1, le=1024)
    scale_format: ScaleFormat = key("e8m0", "format of scales: e8m0, or one with fraction bits and a target")
    scale_rounding: ScaleRounding = key("nearest", "rounding of a scale with fraction bits")
    target: Float | None = key(
        None, "what a block's largest magnitude becomes, not with e8m0; null: the largest of the element", gt=0
    )
    outer: Outer = key("none", "second scale of the whole tensor, over e4m3 or ue5m3: a power of two (pow2) or fp32")
    outer_delay: Int = key(
        0,
        "forward passes between looks at the tensor for the outer scale; 0: each; what has grown in between saturates "
        "but for the room that a target_scale leaves",
        ge=0,
        le=2**30,
    )
    target_scale: Float | None = key(
        None, "scale code that the block of the tensor's largest magnitude gets; null: the largest", gt=0
    )
    arithmetic: Arithmetic = key(
        "exact",
        "exact decisions, or the order of operations of TransformerEngine (te) or torchao, to compare with them",
    )
    quantizers: Annotated[dict[Quantizer, QuantizerConfig | None], Entries] = key(
        {}, "what single quantizers have of their own, such as {q5: {rounding: stochastic}, q2: {block_rows: 16}}"
    )
    rotation: Annotated[dict[Product, RotationConfig | None], Entries] = key(
        {},
        "Hadamard rotation of both operands of products, such as {grad_weight: {size: 16, signs: fixed}}; "
        "{grad_weight: null} takes one out that a file has, {} all of them",
    )
    policy: PolicyConfig = PolicyConfig()
    element: ElementConfig = ElementConfig()
    rounding: RoundingConfig = RoundingConfig()
    carrier: Literal["bf16", "fp8"] = key(
        "bf16", "operands inside the products: bf16 (the dtype of autocast) or fp8 (faster on Hopper, the same values)"
    )

    @model_validator(mode="after")
    def _no_repeats(self) -> MXQuant:
        if len(set(self.active)) != len(self.active):
            raise ValueError(f"active names a quantizer twice: {', '.join(self.active)}")
        return self


class Int4Quant(Section):
    """INT4 per-tensor quantization of the block linears (Xi et al. 2023)."""

    scheme: Literal["int4"]
    hadamard: bool = key(True, "rotate activations and weights by a block Hadamard matrix")
    sampling: bool = key(True, "leverage-score sampling of gradient rows")
    learned_step: bool = key(True, "learned step sizes (LSQ) in the forward pass")
