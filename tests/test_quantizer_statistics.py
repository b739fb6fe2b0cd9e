"""The statistics of single quantizers: by themselves, in a model, in a run's recordings."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_kernels import noise_on
from test_methods import Blocks
from torch import nn

from quantization import PRESETS, LinearRecipe, QuantizerSpec, QuantLinear, convert_linears
from quantization.backends.reference import quantize
from quantization.backends.scales import amax_of
from quantization.watch.quantizers import PLACES, STATISTICS, Observer, quantizer_statistics, statistics_of

NVFP4 = QuantizerSpec(block_size=16, scale_format="e4m3")


def of(x: torch.Tensor, spec: QuantizerSpec) -> dict[str, float]:
    noise = noise_on(x.device)
    found = statistics_of(x, quantize(x, spec, noise), spec, amax_of(x, spec), noise)
    return dict(zip(STATISTICS, found.tolist(), strict=True))


def test_errors_and_gains_are_those_of_the_design_space():
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))
    assert of(x, NVFP4)["mse"] == pytest.approx(9.04e-3, rel=0.01)
    stochastic = dataclasses.replace(NVFP4, rounding="stochastic")
    assert of(x, stochastic)["gain"] == pytest.approx(1 - 0.0033, abs=3e-4)
    assert of(x, dataclasses.replace(NVFP4, correction=1.5))["gain"] == pytest.approx(1.5 * of(x, NVFP4)["gain"])


def test_underflow_and_saturation_are_counted():
    x = torch.ones(4, 32)
    x[0, :16] = 2.0**-12  # a scale of 2^-12 / 6 is none of e4m3's
    x[1] = 0.0  # blocks of zeros do not count
    assert of(x, NVFP4)["underflow"] == pytest.approx(1 / 6)
    assert of(x, dataclasses.replace(NVFP4, scale_format="ue5m3"))["underflow"] == 0
    x = torch.ones(1, 32)
    x[0, 3] = 7.0
    assert of(x, QuantizerSpec(scale_rule="floor"))["saturated"] == pytest.approx(1 / 32)
    assert of(x, QuantizerSpec())["saturated"] == 0


@pytest.mark.parametrize("scale_format", ["e4m3", "e8m3", "ue5m3"])
def test_a_scale_that_was_drawn_is_the_one_that_counts(scale_format):
    """By what the quantizer made: six times the scale of each block's largest number. With the nearest scale too."""
    spec = dataclasses.replace(NVFP4, scale_format=scale_format, scale_rounding="stochastic")
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(2))
    for it in (spec, dataclasses.replace(spec, scale_rounding="nearest")):
        q = quantize(x, it, noise_on(x.device))
        largest = q.view(256, -1, 16).abs().amax(-1, keepdim=True)
        beyond = float((x.view(256, -1, 16).abs() > largest).double().mean())
        found = of(x, it)
        assert found["saturated"] == pytest.approx(beyond) and found["saturated"] > 0.01 and found["underflow"] == 0
        small = x * 2.0**-10  # whose scales round, or are drawn, to none of e4m3's but zero
        gone = quantize(small, it, noise_on(x.device)).view(256, -1, 16).abs().amax(-1) == 0
        underflow = of(small, it)["underflow"]
        assert underflow == pytest.approx(float(gone.double().mean())) and (underflow > 0) == (scale_format == "e4m3")


class OneQuantizer:
    """A layer with the row quantizer of one role alone: by its product with the identity, what that has made."""

    def __init__(self, role: str, spec: QuantizerSpec) -> None:
        self.role, self.name = role, PLACES[role][0]
        self.layer = QuantLinear.from_linear(nn.Linear(32, 32, bias=False), LinearRecipe(**{self.name: spec}))
        self.x = torch.randn(32, 32, generator=torch.Generator().manual_seed(3))

    def made(self, size: float = 1.0) -> torch.Tensor:
        given = {name: torch.eye(32) for name in PLACES} | {self.role: size * self.x}
        self.layer.weight.data.copy_(given["W"])
        y = self.layer(given["X"].requires_grad_())
        (gradient,) = torch.autograd.grad(y, given["X"], given["G"])
        return {"X": y, "W": y.T, "G": gradient}[self.role].detach()

    def observed(self, size: float = 1.0) -> tuple[torch.Tensor, dict[str, float]]:
        self.layer.observer = Observer()
        made, found = self.made(size), self.layer.observer.found[self.name]
        self.layer.observer = None
        return made, dict(zip(STATISTICS, found.tolist(), strict=True))


@pytest.mark.parametrize("role", ["X", "W", "G"])
def test_an_observer_is_of_the_scales_that_the_layer_draws(role):
    one = OneQuantizer(role, dataclasses.replace(NVFP4, scale_rounding="stochastic"))
    of_positions = []
    for position in range(3):
        one.layer.noise.seek(position)
        q, found = one.observed()
        error = (q - one.x).double().square().sum() / one.x.square().sum()
        assert found["mse"] == pytest.approx(float(error))
        largest = q.view(32, 2, 16).abs().amax(-1, keepdim=True)
        assert found["saturated"] == pytest.approx(float((one.x.view(32, 2, 16).abs() > largest).double().mean()))
        of_positions.append(found["saturated"])
    assert len(set(of_positions)) == 3  # the control: the draws of another place saturate other numbers


@pytest.mark.parametrize("role", ["X", "W", "G"])
def test_a_delayed_outer_scale_is_the_layer_s(role):
    """What is read has grown a thousandfold since: all of it saturates, as it does in the layer."""
    one = OneQuantizer(role, dataclasses.replace(NVFP4, outer="pow2", outer_delay=50))
    layer, x = one.layer, one.x
    layer.noise.seek(0)
    one.made()
    held = layer.held.clone()
    for training, position in ((True, 1), (False, 1), (False, 50)):
        layer.train(training).noise.seek(position)
        q, found = one.observed(1000.0)
        layer.noise.seek(position)
        assert torch.equal(q, one.made(1000.0))  # whom nobody observes
        assert found["mse"] == pytest.approx(float((q - 1000 * x).double().square().sum() / (1000 * x).square().sum()))
        assert found["saturated"] > 0.9 and found["gain"] < 0.1
        assert torch.equal(layer.held, held)
    layer.train().noise.seek(50)
    _, found = one.observed(1000.0)
    # The control: renewed, nothing is amiss.
    assert found["saturated"] < 0.05 and found["gain"] == pytest.approx(1, abs=0.01)
    assert layer.held.view(torch.float32).max() == (1000 * x).abs().max()


@pytest.mark.parametrize("method", ["tetrajet", "nvfp4", "quartet", "mxfp4_tseng", "ue5m3"])
def test_every_quantizer_of_a_model_has_its_own_and_the_model_is_as_before(method):
    torch.manual_seed(0)
    model = Blocks()
    convert_linears(model, PRESETS[method], seed=1)
    model.eval()
    layers = [m for m in model.modules() if isinstance(m, QuantLinear | nn.Linear)]
    images = torch.randn(64, 32, requires_grad=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = quantizer_statistics(model, layers, images)
    assert set(found) == {f"quantizer_{name}" for name in STATISTICS}
    for row, layer in enumerate(layers):
        active = layer.recipe.active if isinstance(layer, QuantLinear) else ()
        for place, name in enumerate(("q1", "q2", "q3", "q4", "q5", "q6")):
            values = [array[row, place] for array in found.values()]
            assert np.isfinite(values).all() if name in active else np.isnan(values).all()
        assert layer.weight.grad is None and getattr(layer, "observer", None) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mse = found["quantizer_mse"]
    assert np.nanmin(mse[:, [0, 1, 2, 4]], initial=1.0) > 1e-3 and np.nanmax(mse) < 0.1  # q4 and q6 may change nothing
    assert np.nanmin(found["quantizer_gain"]) > 0.9 and np.nanmax(found["quantizer_gain"]) < 1.1


def test_a_layer_tells_what_its_quantizers_read():
    layer = QuantLinear.from_linear(nn.Linear(32, 48), LinearRecipe(q1=NVFP4, q5=NVFP4))
    seen = {}
    layer.observer = lambda role, x, *_: seen.update({role: x})
    x = torch.randn(16, 32)
    layer(x).backward(torch.full((16, 48), 2.0))
    assert torch.equal(seen["X"], x) and torch.equal(seen["W"], layer.weight) and (seen["G"] == 2).all()
