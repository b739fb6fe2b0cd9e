"""Dampen: its schedule, its gradient, its figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import differences, metrics
from stabilizer_helpers import block, build, layer_of, normal

pytestmark = pytest.mark.usefixtures("in_this_process")


def test_lambda_is_zero_for_a_quarter_and_then_a_cosine_up_to_its_weight() -> None:
    dampen = build("dampen", layer_of(block()), total=200, weight=0.3)
    strengths = [dampen.strength(step) for step in range(201)]
    assert strengths[:51] == [0.0] * 51
    by_hand = [0.3 * (1 - math.cos(math.pi * (step - 50) / 150)) / 2 for step in range(50, 201)]
    assert strengths[50:] == pytest.approx(by_hand, rel=1e-12, abs=1e-15)
    assert (strengths[125], strengths[200]) == (pytest.approx(0.15), pytest.approx(0.3))
    assert all(a < b for a, b in itertools.pairwise(strengths[50:]))
    assert build("dampen", layer_of(block()), total=200, weight=0.3, start=0).strength(1) > 0
    assert build("dampen", layer_of(block())).cfg.start == 0.25


def test_the_gradient_of_dampen_is_that_of_the_loss_written_out() -> None:
    layers = [layer_of(normal(40, 72, seed=3) * 0.02), layer_of(normal(8, 32, seed=4)), layer_of(normal(8, 32, seed=5))]
    dampen = build("dampen", *layers, total=100, weight=0.7)
    for step in (10, 25, 60, 99):
        strength = dampen.strength(step)
        task = [normal(*layer.weight.shape, seed=step + i) for i, layer in enumerate(layers)]
        for layer, gradient in zip(layers[:2], task, strict=False):
            layer.weight.grad = gradient.clone()
        layers[2].weight.grad = None  # has no part in the step
        written_out = sum(
            ((layer.weight - layer.quantized_weight().detach()) ** 2).sum() * strength for layer in layers[:2]
        )
        expected = torch.autograd.grad(written_out, [layer.weight for layer in layers[:2]])
        by_hand = [2 * strength * (layer.weight - layer.quantized_weight()).detach() for layer in layers]
        before = [layer.weight.detach().clone() for layer in layers]
        dampen.after_backward(step)
        for layer, own, more, double in zip(layers[:2], task, expected, by_hand, strict=False):
            torch.testing.assert_close(layer.weight.grad - own, more, rtol=1e-5, atol=5e-7)
            torch.testing.assert_close(layer.weight.grad - own, double, rtol=1e-5, atol=5e-7)
            assert torch.equal(layer.weight.grad, own) == (step in (10, 25))
        assert layers[2].weight.grad is None
        assert differences(before, [layer.weight.data for layer in layers]) == []
        # The loss itself, of all weights.
        loss = sum(((layer.weight - layer.quantized_weight()).double() ** 2).sum().item() for layer in layers)
        assert dampen.figures()["dampen_loss"].item() == pytest.approx(strength * loss, rel=1e-6)
    # The control: the same without the 2, and with the sign turned.
    assert not torch.allclose(layers[1].weight.grad - task[1], by_hand[1] / 2, rtol=0.1)
    assert not torch.allclose(layers[1].weight.grad - task[1], -by_hand[1], rtol=0.1)


def test_dampen_pulls_weights_to_the_grid() -> None:
    def distance(weight: float) -> float:
        layer = layer_of(normal(8, 32))
        dampen = build("dampen", layer, total=100, weight=weight, start=0)
        optimizer = torch.optim.SGD([layer.weight], lr=0.1)
        for step in range(100):
            layer.weight.grad = torch.zeros_like(layer.weight)
            dampen.after_backward(step)
            optimizer.step()
        return (layer.weight - layer.quantized_weight()).norm().item()

    assert distance(1.0) < 1e-3 * distance(0.0)


def test_the_dampening_term_is_logged(straight: Callable[[str], Path]) -> None:
    terms = [line["data"]["stabilizer.dampen_loss"] for line in metrics(straight("dampen")) if len(line["step"]) == 2]
    assert terms[:3] == [0.0] * 3 and min(terms[3:]) > 0 and len(terms) == 8  # a quarter is 2 of 8, where it is still 0
    norms, plain = (
        [line["data"]["train.grad_norm"] for line in metrics(straight(kind)) if len(line["step"]) == 2]
        for kind in ("dampen", "none")
    )
    assert norms[:3] == plain[:3] and norms[3] != plain[3]  # it is part of the gradient that is clipped
