"""MXFP4 quantization of linear layers: formats, quantizers, the quantized linear layer."""

from quantization.layers.int4 import Int4Linear, Int4Recipe
from quantization.layers.linear import QuantLinear, convert_linears
from quantization.quantize import fake_quantize
from quantization.spec import PRESETS, LinearRecipe, QuantizerSpec, build_recipe, resolve

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
