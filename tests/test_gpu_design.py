"""The design space on a GPU: kernels against the reference at random points of all of it, every method in a model."""

from __future__ import annotations

import itertools

import pytest
import torch
from design_points import fault_at, int4_amiss, point, turned_back_amiss
from test_kernels import by, unequal
from torch import nn

from quantization import PRESETS, LinearRecipe, QuantizerSpec, QuantLinear, convert_linears, fake_quantize
from quantization.formats import FORMATS

pytestmark = pytest.mark.gpu
QUANTIZERS, PART, MATRICES = 800, 20, 3
METHODS = [name for name in PRESETS if name not in ("full_precision", "tetrajet", "microscaling")]


@pytest.mark.parametrize("start", range(0, QUANTIZERS, PART))
def test_random_points_of_the_whole_space(start):
    """2,400 points: compiling the kernels of each takes seconds, so three matrices have them in common."""
    device, places = torch.device("cuda"), itertools.product(range(start, start + PART), range(MATRICES))
    faults = [f"{n}, matrix {again}: {said}" for n, again in places if (said := fault_at(point(n, again), device))]
    assert not faults, "\n".join(faults)


def test_gradients_are_turned_back_to_the_same_bits():
    assert turned_back_amiss(torch.device("cuda")) == []


def test_int4_s_kernels_give_the_bits_of_its_formulas():
    assert int4_amiss(torch.device("cuda")) == []


# Those of the small floats, all of which have kernels.
@pytest.mark.parametrize("element", [name for name, fmt in FORMATS.items() if fmt.mantissa_bits is not None])
def test_every_float32_significand_under_every_significand_of_a_scale(element):
    """The quotient by fused operations is rounded as a division, and no decision depends on it: all 2^23 numbers."""
    largest = FORMATS[element].max
    spec = QuantizerSpec(element, block_size=16, scale_format="e8m3")
    for exponent, scale in itertools.product((-3, 0, 1), torch.arange(8, 16).tolist()):
        bits = torch.arange(2**23, dtype=torch.int32, device="cuda") | ((127 + exponent) << 23)
        x = bits.view(torch.float32)
        x = torch.where(x > largest, x / 8, x).view(-1, 8)
        x = torch.cat([x, torch.full_like(x, largest * scale / 8)], dim=1)
        for rounding in ("nearest_even", "stochastic"):
            own = QuantizerSpec(element, rounding=rounding, block_size=16, scale_format=spec.scale_format)
            results = [fake_quantize(x, own, seed=1, backend=backend) for backend in ("triton", "reference")]
            assert unequal(*results) == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_of_each_method_is_the_same_with_kernels_and_reference(method):
    results = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        layer = QuantLinear.from_linear(nn.Linear(192, 384).cuda(), PRESETS[method])
        layer.noise.reseed(5, 0)
        x = torch.randn(256, 192, device="cuda").requires_grad_()
        with by(backend), torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
            y.float().square().mean().backward()
        results.append((y.detach(), x.grad, layer.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_each_method_is_recorded_as_a_cuda_graph(method):
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(192, 384).cuda(), PRESETS[method])
    x = torch.randn(256, 192, device="cuda")

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        layer.weight.grad = None
        y.float().square().mean().backward()
        return y

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    graph.replay()
    torch.cuda.synchronize()
    assert y.isfinite().all() and layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_kernels(method, recwarn):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Model().cuda()
    convert_linears(model, PRESETS[method], ["used"])
    model(torch.randn(64, 64, device="cuda")).sum().backward()
    assert not [w for w in recwarn if "have no kernel" in str(w.message)]


def test_what_has_no_kernel_is_said_in_a_sentence():
    spec = QuantizerSpec(block_size=16, scale_format="e4m3", scale_rounding="stochastic")
    layer = QuantLinear.from_linear(nn.Linear(64, 64).cuda(), LinearRecipe(q1=spec))
    with pytest.warns(UserWarning, match="some quantizers of this recipe have no kernel"):
        layer(torch.randn(64, 64, device="cuda"))
