"""Layers packed: 4-bit codes and one byte of scale a block in the place of float32 weights, and a layer made of them.

    layer = PackedLinear.from_quantized(quant_linear)     # 4.25 bits a weight of e2m1 in blocks of 32
    layer.codes       uint8 (C, half of D)       two codes to a byte, of two columns the left in the low half; a code is
                                                 the sign (8) and the index of the magnitude in the element format
    layer.scales      uint8 (C, D / block size)  E8M0: the exponent of the scale plus 127; 255, which is NaN, never

Both come from q2 as the layer itself asks it: the master weight, with Q-EMA's shadow where there is one. The forward
pass is that of the layer in evaluation, bit for bit: the same quantizer, the same products, of the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantization.backends.reference import NAN_SCALE, SCALE_BIAS, power_of_two, unpack
from quantization.job import CARRIED, NOTHING, PACKED, Carried, Dense, Job, Operand, Packed, codes_shape, scales_shape
from quantization.layers.int4 import Int4Linear
from quantization.layers.linear import QuantLinear
from quantization.operands import COLUMNS, LinearJobs, W, X, forms_of, multiply, prepare, values_of
from quantization.policy import Policy
from quantization.spec import QUANTIZERS, LinearRecipe, QuantizerSpec
from quantization.words import PRODUCTS

CODES, SCALES = "codes", "scales"  # the names of a packed layer's tensors, in a model and in a file
BEHIND_A_NIBBLE = 8  # magnitudes that three bits tell apart
LARGEST_BLOCK = 1024
_OF_NO_PACKED_LAYER = ("policy", *(f"rotate_{product}" for product in PRODUCTS))  # at their defaults: see unpackable


# ---------------------------------------------------------------------------------------------------------------------
# Weights and their recipes
# ---------------------------------------------------------------------------------------------------------------------


def unpackable(recipe: LinearRecipe) -> str | None:
    """Why a layer of this recipe has no packed form, in words; None where it has one."""
    if recipe.q2 is None:
        return "its weights are not quantized in the forward pass (q2 is off)"
    if any(spec is not None and spec.stochastic for spec in (recipe.q1, recipe.q2)):
        return "its forward pass rounds stochastically, so that it is another one at every call"
    if any(recipe.rotation(product) is not None for product in PRODUCTS):
        return "its products are rotated, which packed weights are not"
    if recipe.policy != Policy():
        return "its recipe leaves layers or products in high precision, which a packed file cannot say"
    if any(
        spec is not None and (spec.scale_format != "e8m0" or spec.block_rows > 1) for spec in (recipe.q1, recipe.q2)
    ):
        return "packed weights have E8M0 scales of blocks in a row, and its forward quantizers have others"
    if recipe.q2.factor != 1 or recipe.q2.scale_rule.startswith("rms"):
        return f"codes and scales alone do not say what its weights' quantizer ({recipe.q2}) gives"
    if len(recipe.q2.format.magnitudes) > BEHIND_A_NIBBLE:
        return f"its weights in {recipe.q2.element} need more than 4 bits"
    return None


def pack_weight(weight: Tensor, spec: QuantizerSpec, shadow: Tensor | None = None) -> Packed:
    """What q2 makes of a weight (C, D) as codes and scales. ValueError where a block of it is not finite."""
    job = Job(row=spec, column=None, row_form=PACKED, column_form=NOTHING, dtype=torch.float32)
    packed = prepare(weight.detach(), job, shadow=shadow).row
    if (packed.scales == NAN_SCALE).any():
        raise ValueError("it has weights that are not finite")
    return packed


def weight_fault(packed: Packed) -> str | None:
    """What is wrong with codes and scales that somebody else has made, in words; None if nothing is."""
    if (packed.scales == NAN_SCALE).any():
        return "has a block whose scale is NaN (code 255)"
    if not torch.isfinite(values_of(packed, torch.float32)).all():
        return "has numbers beyond float32's largest"
    return None


def recipe_words(recipe: LinearRecipe) -> dict[str, str | None]:
    """A recipe as words, which `recipe_of` reads back."""
    names = [field.name for field in dataclasses.fields(recipe) if field.name not in _OF_NO_PACKED_LAYER]
    values = {name: getattr(recipe, name) for name in names}
    return {name: value.text if isinstance(value, QuantizerSpec) else value for name, value in values.items()}


def recipe_of(words: Mapping[str, Any]) -> LinearRecipe:
    """The recipe of such words. Raises ValueError, in words, where they are not those of a recipe of a packed layer."""
    try:
        recipe = LinearRecipe(
            **{
                name: QuantizerSpec.parse(value) if name in QUANTIZERS and value is not None else value
                for name, value in words.items()
            }
        )
    except (TypeError, AttributeError) as error:
        raise ValueError(f"a recipe does not read ({error})") from None
    for name in recipe.active:
        if getattr(recipe, name).block_size > LARGEST_BLOCK:
            raise ValueError(f"{name} has blocks of more than {LARGEST_BLOCK}")
    if (reason := unpackable(recipe)) is not None:
        raise ValueError(f"no layer is packed by such a recipe: {reason}")
    return recipe


# ---------------------------------------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer whose weight is kept packed and expanded when it is called. For inference: it has no backward.

    Args:
        packed: the weight, as q2 has made it.
        recipe: of the layer that was trained.
        quantize_activations: by q1, as in training; else the layer multiplies X as it comes.

    Raises ValueError for a recipe that has no packed form and for tensors of other shapes.
    """

    def __init__(
        self, packed: Packed, bias: Tensor | None, recipe: LinearRecipe, quantize_activations: bool = True
    ) -> None:
        super().__init__()
        if (reason := unpackable(recipe)) is not None:
            raise ValueError(reason)
        self.out_features, self.in_features = packed.codes.shape[0], packed.columns
        own = codes_shape(*self.shape), scales_shape(*self.shape, recipe.q2)
        if (tuple(packed.codes.shape), tuple(packed.scales.shape)) != own:
            raise ValueError(f"codes of {tuple(packed.codes.shape)} and scales of {tuple(packed.scales.shape)}; {own}")
        self.recipe = recipe
        self.jobs = LinearJobs(recipe if quantize_activations else dataclasses.replace(recipe, q1=None), self.shape)
        self.register_buffer(CODES, packed.codes.detach())
        self.register_buffer(SCALES, packed.scales.detach().t().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_quantized(cls, layer: QuantLinear, quantize_activations: bool = True) -> PackedLinear:
        """The layer packed. Raises ValueError, in words, where it cannot be."""
        if (reason := unpackable(layer.recipe)) is not None:
            raise ValueError(reason)
        packed = pack_weight(layer.weight, layer.recipe.q2, layer.shadow)
        return cls(packed, layer.bias, layer.recipe, quantize_activations).train(layer.training)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: C, D."""
        return self.out_features, self.in_features

    @property
    def packed(self) -> Packed:
        """The weight in the form of quantization/job.py."""
        return Packed(self.codes, self.scales.t().contiguous(), self.recipe.q2, self.in_features)

    def quantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Q(w), (C, D)."""
        return values_of(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., C), in the dtype of autocast or of x. RuntimeError where a gradient is to pass."""
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a packed layer has no backward pass; call it under torch.no_grad(), or fine-tune")
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        X_ND = x.reshape(-1, x.shape[-1])
        x1 = prepare(X_ND, self.jobs.of(X, X_ND, dtype, column=False)).row
        bias_C = None if self.bias is None else self.bias.to(dtype)
        output = multiply(x1, self._operand(X_ND, dtype), (COLUMNS, COLUMNS), dtype, dtype, bias_C)
        return output.reshape(*x.shape[:-1], self.out_features)

    def _operand(self, X_ND: Tensor, dtype: torch.dtype) -> Operand:
        """The weight in the form that the layer's product takes."""
        forms = forms_of(self.jobs.recipe, self.shape, X_ND.is_cuda, X_ND.numel() == 0)
        if forms["q2"] != CARRIED:
            return Dense(values_of(self.packed, dtype))
        return carry(self.packed, self.jobs.of(W, X_ND, dtype, column=False))

    def extra_repr(self) -> str:
        activations = "" if self.jobs.recipe.q1 == self.recipe.q1 else ", activations left alone"
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.recipe}{activations}"
        )


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
    """Replace the quantized layers of `model` in place by packed ones. Returns the names of its packed layers.

    Raises ValueError, in words, where a layer has no packed form, and for a model without quantized layers.
    """
    made: dict[int, PackedLinear] = {}  # a layer may be shared by several places
    names = []
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, Int4Linear):
            raise ValueError(f"{name} is an INT4 layer, whose one step a tensor is no microscaling format")
        if isinstance(layer, QuantLinear):
            try:
                made[id(layer)] = made.get(id(layer)) or PackedLinear.from_quantized(layer)
            except ValueError as error:
                raise ValueError(f"{name} cannot be packed: {error}") from None
            put(model, name, made[id(layer)])
            names.append(name)
        elif isinstance(layer, PackedLinear):
            names.append(name)
    if not names:
        raise ValueError("the model has no layer in MXFP4")
    return names


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

    bfloat16 holds Q(w) exactly.
    """
    layers = packed_layers(model)
    state = {}
    for name, value in model.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if layer in layers and leaf == CODES:
            state[f"{layer}.weight"] = layers[layer].quantized_weight(dtype).cpu()
        elif layer not in layers or leaf != SCALES:
            state[name] = _as(value, dtype)
    return state


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().cpu().to(dtype if value.is_floating_point() else value.dtype).contiguous()
