"""Layers packed: 4-bit codes and the code of a scale a block in the place of float32 weights, and a layer made of them.

    layer = PackedLinear.from_quantized(quant_linear)     # 4.25 bits a weight of e2m1 in blocks of 32 with E8M0 scales
    layer.codes       uint8 (C, half of D)       two codes to a byte, of two columns the left in the low half; a code is
                                                 the sign (8) and the index of the magnitude in the element format
    layer.scales      (C, D / block size)        codes of scales: uint8 of e8m0, e4m3 and ue5m3, int16 of e8m3 (the bits
                                                 of a bfloat16), int32 of fp32 (of a float32); of square blocks a row
                                                 for each row of blocks
    layer.outer       int32 ()                   the bits of the outer scale P (float32), where there is one
    layer.held        int32 ()                   the bits of the largest activation (float32) that q1's outer scale
                                                 hangs from, where that is delayed; 0 for none yet

All come from q2 as the layer itself asks it: the master weight, with Q-EMA's shadow where there is one, rotated where
the product is. The forward pass is that of the layer in evaluation, bit for bit: the same quantizer, the same products,
of the same numbers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quantization.backends.reference import factor_of, pack, quantized, to_blocks, unpack
from quantization.backends.scales import (
    CODE_DTYPES,
    SCALE_BIAS,
    amax_of,
    codes_of_scales,
    no_scale,
    outer_exponent,
    power_of_two,
    scales_of,
)
from quantization.job import CARRIED, SCALED, Carried, Dense, Job, Operand, Packed, Scaled, codes_shape, scales_shape
from quantization.layers.int4 import Int4Linear
from quantization.layers.linear import QuantLinear
from quantization.operands import COLUMNS, LinearJobs, W, X, forms_of, multiply, prepare, values_of
from quantization.rotation import Turn, rotate, rotate_back
from quantization.spec import LinearRecipe, QuantizerSpec

CODES, SCALES, OUTER, HELD = "codes", "scales", "outer", "held"  # the names of a packed layer's tensors
BEHIND_A_NIBBLE = 8  # magnitudes that three bits tell apart


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def unpackable(recipe: LinearRecipe) -> str | None:
    """Why a layer of this recipe has no packed form, in words; None where it has one."""
    turn = recipe.rotation("output")
    if recipe.q2 is None:
        return "its weights are not quantized in the forward pass (q2 is off)"
    if any(spec is not None and spec.draws for spec in (recipe.q1, recipe.q2)):
        return "its forward pass rounds stochastically, so that it is another one at every call"
    if turn is not None and turn.signs == "fresh":
        return "its output is rotated with fresh signs, so that the quantized weight is another one at every call"
    if len(recipe.q2.format.magnitudes) > BEHIND_A_NIBBLE:
        return f"its weights in {recipe.q2.element} need more than 4 bits"
    return None


def left_alone(recipe: LinearRecipe) -> bool:
    """Whether the forward pass of a layer of this recipe is that of nn.Linear."""
    return recipe.q1 is None and recipe.q2 is None and recipe.rotation("output") is None


def stored(spec: QuantizerSpec) -> QuantizerSpec:
    """What codes and scales need of a quantizer to be read: its element, its blocks and the format of their scales."""
    return QuantizerSpec(
        element=spec.element,
        axis=spec.axis,
        block_size=spec.block_size,
        scale_format=spec.scale_format,
        block_rows=spec.block_rows,
    )


class PackedWeight(NamedTuple):
    """A quantized weight as codes and scales, and its outer scale (float32 scalar; None where there is none)."""

    packed: Packed
    outer: Tensor | None = None


def pack_weight(
    weight: Tensor, spec: QuantizerSpec, shadow: Tensor | None = None, amax: Tensor | None = None
) -> PackedWeight:
    """What q2 makes of a weight (C, D), given as q2 reads it, as codes and scales.

    amax: what a delayed outer scale hangs from; None for the weight's own. Raises ValueError where the weight is not
    finite, and where codes and scales would not give each bit of what q2 makes.
    """
    x = weight.detach().float()
    amax = amax_of(x, spec) if amax is None else amax
    result = quantized(x, spec, None, shadow, amax)
    if not result.finite.all():
        raise ValueError("it has weights that are not finite")
    scales = scales_of(to_blocks(x, spec).values, spec, amax)
    numbers, values, outer = scales.scale.squeeze(-1), result.values, scales.outer
    if spec.outer == "pow2":
        outer = power_of_two(outer_exponent(amax, spec))
        numbers, values = numbers / outer, values / outer
    codes = codes_of_scales(numbers.t().contiguous(), spec.scale)
    found = PackedWeight(Packed(pack(values, codes, stored(spec)), codes, stored(spec), x.shape[1]), outer)
    if (fault := weight_fault(found, spec)) is not None:
        raise ValueError(f"it {fault}")
    read = numbers_of(found, spec, torch.float32)
    if not torch.equal(read.view(torch.int32), result.values.view(torch.int32)):
        raise ValueError("4-bit codes and scales do not give each bit of its quantized weights")
    return found


def numbers_of(weight: PackedWeight, spec: QuantizerSpec, dtype: torch.dtype) -> Tensor:
    """The numbers (C, D) of a packed weight, but for a factor of the quantizer and an fp32 outer scale."""
    if spec.outer != "pow2":
        return values_of(weight.packed, dtype)
    return (values_of(weight.packed, torch.float32) * weight.outer).to(dtype)


def _factor(weight: PackedWeight, spec: QuantizerSpec, device: torch.device) -> Tensor | None:
    """What `numbers_of` leaves out (float32 scalar); None for 1."""
    return factor_of(spec, weight.outer if spec.outer == "fp32" else None, device)


def weight_fault(weight: PackedWeight, spec: QuantizerSpec) -> str | None:
    """What is wrong with codes and scales that somebody else has made, in words; None if nothing is."""
    packed, outer = weight
    amiss = no_scale(packed.scales, spec.scale)
    if amiss.any():
        code = packed.scales[amiss][0].item()
        return f"has a block whose scale is no number of {spec.scale_format} (code {code})"
    if outer is not None and not (torch.isfinite(outer) and outer > 0):
        return "has an outer scale that is no positive number"
    if spec.outer == "pow2" and torch.frexp(outer).mantissa != 0.5:
        return "has an outer scale that is no power of two"
    values, factor = numbers_of(weight, spec, torch.float32), _factor(weight, spec, packed.codes.device)
    if not torch.isfinite(values if factor is None else values * factor).all():
        return "has numbers beyond float32's largest"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer whose weight is kept packed and expanded when it is called. For inference: it has no backward.

    Args:
        weight: as q2 has made it.
        recipe: of the layer that was trained.
        quantize_activations: by q1, as in training; else the layer multiplies X as it comes (or is rotated).
        held: the bits of the largest activation (float32) that a delayed outer scale of q1 hangs from (int32 scalar);
            None or 0 for that of each X itself.

    Raises ValueError for a recipe that has no packed form and for tensors of other shapes.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None,
        recipe: LinearRecipe,
        quantize_activations: bool = True,
        held: Tensor | None = None,
    ) -> None:
        super().__init__()
        if (reason := unpackable(recipe)) is not None:
            raise ValueError(reason)
        packed, outer = weight
        self.out_features, self.in_features = packed.codes.shape[0], packed.columns
        given = {CODES: packed.codes.detach(), SCALES: packed.scales.detach().t().contiguous()}
        if outer is not None:
            given[OUTER] = outer.detach().float().view(torch.int32)
        if HELD in tensors_of_layer(recipe, self.shape):
            held = torch.zeros((), dtype=torch.int32, device=packed.codes.device) if held is None else held
            given[HELD] = held.clone()  # training renews its own
        shapes = {name: tuple(value.shape) for name, value in given.items()}
        own = {name: shape for name, (shape, _) in tensors_of_layer(recipe, self.shape).items()}
        if shapes != own:
            raise ValueError(f"a packed weight has tensors of {shapes}, and the recipe asks for {own}")
        self.recipe = recipe
        self.jobs = LinearJobs(recipe if quantize_activations else dataclasses.replace(recipe, q1=None), self.shape)
        for name in (CODES, SCALES, OUTER, HELD):
            self.register_buffer(name, given.get(name))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_quantized(cls, layer: QuantLinear, quantize_activations: bool = True) -> PackedLinear:
        """The layer packed. Raises ValueError, in words, where it cannot be."""
        if (reason := unpackable(layer.recipe)) is not None:
            raise ValueError(reason)
        turn, shadow = layer.weight_turn, layer.shadow
        if shadow is not None and turn is not None:
            shadow = rotate(shadow, -1, turn)
        weight = pack_weight(layer.turned_weight(), layer.recipe.q2, shadow, layer.weight_amax)
        held = None if layer.held is None else layer.held[0, 0]
        return cls(weight, layer.bias, layer.recipe, quantize_activations, held).train(layer.training)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: C, D."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> PackedWeight:
        """What q2 has made, in the form of quantization/job.py."""
        packed = Packed(self.codes, self.scales.t().contiguous(), stored(self.recipe.q2), self.in_features)
        return PackedWeight(packed, None if self.outer is None else self.outer.view(torch.float32))

    @property
    def turn(self) -> Turn | None:
        """The rotation of X and of the weight before they are quantized."""
        return self.jobs.turn("output", self.in_features)

    def quantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Q(w), (C, D), in the basis of W."""
        weight, q2 = self.weight, self.recipe.q2
        values, factor = numbers_of(weight, q2, torch.float32), _factor(weight, q2, self.codes.device)
        values = values if factor is None else values * factor
        return (values if self.turn is None else rotate_back(values, self.turn)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., C), in the dtype of autocast or of x. RuntimeError where a gradient is to pass."""
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a packed layer has no backward pass; call it under torch.no_grad(), or fine-tune")
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        X_ND = x.reshape(-1, x.shape[-1])
        held = None if self.held is None else -self.held.repeat(2)  # below 0: it stays
        x1 = prepare(X_ND, self.jobs.of(X, X_ND, dtype, column=False), held=held).row
        bias_C = None if self.bias is None else self.bias.to(dtype)
        output = multiply(x1, self._operand(X_ND, dtype), (COLUMNS, COLUMNS), dtype, dtype, bias_C)
        return output.reshape(*x.shape[:-1], self.out_features)

    def _operand(self, X_ND: Tensor, dtype: torch.dtype) -> Operand:
        """The weight in the form that the layer's product takes."""
        weight, q2 = self.weight, self.recipe.q2
        form = forms_of(self.jobs.recipe, self.shape, X_ND.is_cuda, X_ND.numel() == 0)["q2"]
        if form == CARRIED:
            return carry(weight.packed, self.jobs.of(W, X_ND, dtype, column=False))
        values = numbers_of(weight, q2, dtype)
        return Scaled(values, _factor(weight, q2, values.device), q2.known_factor) if form == SCALED else Dense(values)

    def extra_repr(self) -> str:
        activations = "" if self.jobs.recipe.q1 == self.recipe.q1 else ", activations left alone"
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.recipe}{activations}"
        )


def tensors_of_layer(recipe: LinearRecipe, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of a packed layer's tensors, but for the bias, by their names; shape: of the weight."""
    q1, q2 = recipe.q1, recipe.q2
    found = {
        CODES: (codes_shape(*shape), torch.uint8),
        SCALES: (scales_shape(*shape, q2)[::-1], CODE_DTYPES[q2.scale.code_bytes]),
    }
    if q2.outer != "none":
        found[OUTER] = (), torch.int32
    if q1 is not None and q1.outer_delay:
        found[HELD] = (), torch.int32
    return found


def carry(packed: Packed, job: Job) -> Carried:
    """A packed weight as fp8 carries it (operands/forms.py), by the power of two that the weight itself had.

    The largest scale is that of the largest magnitude, which sets the window. The sides are multiples of 16.
    """
    shift = (job.window[0] - (packed.scales.max().int() - SCALE_BIAS)).clamp(max=127)
    values = (unpack(packed) * power_of_two(shift)).float().to(job.fp8)
    return Carried(values.contiguous(), power_of_two(-shift))


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def pack_linears(model: nn.Module) -> list[str]:
    """Replace the quantized layers of `model` in place by packed ones, and those that quantize nothing in the forward
    pass by linears. Returns the names of its packed layers.

    Raises ValueError, in words, where a layer has no packed form, and for a model without quantized weights.
    """
    made: dict[int, nn.Module] = {}  # a layer may be shared by several places
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, Int4Linear):
            raise ValueError(f"{name} is an INT4 layer, whose one step a tensor is no microscaling format")
        if isinstance(layer, QuantLinear):
            try:
                made[id(layer)] = made.get(id(layer)) or _packed_or_alone(layer)
            except ValueError as error:
                raise ValueError(f"{name} cannot be packed: {error}") from None
            put(model, name, made[id(layer)])
    if not (names := list(packed_layers(model))):
        reason = ": its layers quantize in the backward pass alone" if made else ""
        raise ValueError(f"the model has no layer with a weight in MXFP4{reason}")
    return names


def _packed_or_alone(layer: QuantLinear) -> nn.Module:
    if not left_alone(layer.recipe):
        return PackedLinear.from_quantized(layer)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear.train(layer.training)


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Let `layer` take the place `name` of the model."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by their names."""
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, PackedLinear)}


def packed_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a model of packed layers: codes and scales, and all other numbers in `dtype`, on the CPU."""
    return {name: _as(value, dtype) for name, value in model.state_dict().items()}


def dequantized_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the same model with nn.Linear in the place of packed layers: Q(w) and all else in `dtype`.

    bfloat16 holds Q(w) exactly, but for fp32 scales (outer ones too), a factor such as three_quarter's, and rotations.
    """
    layers = packed_layers(model)
    state = {}
    for name, value in model.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if layer in layers and leaf == CODES:
            state[f"{layer}.weight"] = layers[layer].quantized_weight(dtype).cpu()
        elif layer not in layers or leaf not in (SCALES, OUTER, HELD):
            state[name] = _as(value, dtype)
    return state


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().cpu().to(dtype if value.is_floating_point() else value.dtype).contiguous()
