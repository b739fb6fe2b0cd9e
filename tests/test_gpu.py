"""What must hold on a CUDA device and cannot be seen on a CPU. Run with `bash scripts/test.sh -m gpu`."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from quantization import PRESETS, LinearRecipe, QuantizerSpec, QuantLinear, fake_quantize
from quantization.formats import FORMATS
from quantization.noise import Noise, uniform
from quantization.spec import ROUNDINGS, SCALE_RULES

pytestmark = pytest.mark.gpu

SPECS = [
    QuantizerSpec(element, rule, rounding, axis)
    for element, rule, rounding, axis in itertools.product(FORMATS, SCALE_RULES, ROUNDINGS, (-1, 0))
]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def awkward(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal draws over many scales, with zeros, subnormals, powers of two and a block that is not finite."""
    g = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30 if dtype == torch.float16 else -130, 12, shape, generator=g).float()
    x = torch.randn(shape, generator=g, dtype=torch.float64) * torch.exp2(exponents.double())
    flat = x.flatten()
    flat[::17] = 0.0
    flat[::19] = torch.exp2(exponents.double()).flatten()[::19]
    flat[-1] = torch.nan
    return flat.view(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s}/{s.axis}")
def test_the_same_bits_on_gpu_and_cpu(spec, dtype):
    for shape in ((197, 192), (33, 65), (1, 32)):
        x = awkward(shape, dtype)
        on_cpu = fake_quantize(x, spec, seed=7, backend="reference")
        on_gpu = fake_quantize(x.cuda(), spec, seed=7)
        assert torch.equal(bits(on_cpu), bits(on_gpu))


def test_shadow_gives_the_same_bits_on_gpu_and_cpu():
    w, shadow = torch.randn(96, 200), torch.randn(96, 200)
    for spec in (s for s in SPECS if not s.stochastic):
        on_gpu = fake_quantize(w.cuda(), spec, shadow=shadow.cuda())
        assert torch.equal(bits(fake_quantize(w, spec, shadow=shadow)), bits(on_gpu))


def test_the_same_noise_on_gpu_and_cpu():
    assert torch.equal(uniform((50, 33), Noise.from_seed(5)), uniform((50, 33), Noise.from_seed(5, "cuda")).cpu())


@pytest.mark.parametrize("shape", [(8, 197, 192), (3, 7, 7, 192), (5, 192)])
def test_all_quantizers_off_equals_linear_under_autocast(shape):
    linear = nn.Linear(192, 576).cuda()
    quant = QuantLinear.from_linear(linear, LinearRecipe())
    results = []
    for layer in (linear, quant):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).cuda().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_step_under_autocast_does_not_synchronise():
    linear = QuantLinear.from_linear(nn.Linear(192, 576).cuda(), PRESETS["tetrajet"])
    x = torch.randn(4, 197, 192, device="cuda", requires_grad=True)
    linear(x).sum().backward()  # the first call brings the formats' tables to the device
    linear.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = linear(x)
        y.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert y.dtype == torch.bfloat16 and linear.weight.grad.dtype == torch.float32
    assert torch.isfinite(linear.weight.grad).all()
