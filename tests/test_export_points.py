"""Packed layers at points of the design space drawn at random: the bits of their layers, and of their own words."""

from __future__ import annotations

import random

import pytest
import torch
from design_points import spec_of
from torch import nn

from quantization import LinearRecipe, QuantLinear
from quantization.export import PackedLinear, unpackable
from quantization.rotation import Rotation

SHAPES = ((48, 64), (7, 45), (33, 96), (64, 130))


@pytest.mark.parametrize("number", range(60))
@torch.no_grad()
def test_a_packed_layer_keeps_the_bits_of_any_quantizer(number: int) -> None:
    draw = random.Random(number)
    shape, q1, q2 = draw.choice(SHAPES), *(spec_of(draw, -1) for _ in range(2))
    turn = Rotation(draw.choice((4, 16, 32, 128)), draw.choice(("none", "fixed"))) if draw.random() < 0.4 else None
    recipe = LinearRecipe(q1=draw.choice((None, q1)), q2=q2, rotate_output=turn)
    if unpackable(recipe) is not None:
        draws = any(spec is not None and spec.draws for spec in (recipe.q1, recipe.q2))
        assert draws or len(q2.format.magnitudes) > 8
        return
    torch.manual_seed(number)
    layer = QuantLinear.from_linear(nn.Linear(shape[1], shape[0]), recipe).eval()
    layer.weight.mul_(torch.exp2(torch.randint(-9, 9, (shape[0], 1))))
    layer.weight[::3, ::5] = 0
    layer.weight[1, ::2] = -0.0
    layer.weight[2] = 0
    if draw.random() < 0.4:
        layer.shadow = layer.weight * (1 + 0.3 * torch.randn(shape))
    if layer.held is not None:
        layer.held.view(torch.float32).fill_(draw.choice((0.0, 0.01, 30.0)))
    packed, x = PackedLinear.from_quantized(layer), torch.randn(3, 5, shape[1])
    assert torch.equal(packed.quantized_weight(), layer.quantized_weight())
    assert torch.equal(packed(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(packed(x), layer(x))
