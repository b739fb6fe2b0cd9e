"""MXFP4 quantization of linear layers: formats, quantizers, the quantized linear layer."""

from quantization.layers.convert import convert_linears
from quantization.layers.int4 import Int4Linear
from quantization.layers.linear import QuantLinear
from quantization.quantize import fake_quantize
from quantization.recipes import PRESETS, build_recipe, resolve
from quantization.spec import Int4Recipe, LinearRecipe, QuantizerSpec

__all__ = [
    "PRESETS",
    "Int4Linear",
    "Int4Recipe",
    "LinearRecipe",
    "QuantLinear",
    "QuantizerSpec",
    "build_recipe",
    "convert_linears",
    "fake_quantize",
    "resolve",
]
