"""What must hold on a CUDA device and cannot be seen on a CPU. Run with `bash scripts/test.sh -m gpu`."""

from __future__ import annotations

import functools
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


@functools.cache
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


def differing(x: torch.Tensor, spec: QuantizerSpec, shadow: torch.Tensor | None = None) -> int:
    """How many elements of the kernel's result have other bits than the reference's, both on the device."""
    noise = Noise(torch.tensor([-123456789123456789, (5 << 32) | 0xFFFFFFF0], device="cuda"), 8 * 47 + 5)
    seed = noise if spec.stochastic else None
    kernel, expected = (fake_quantize(x, spec, seed=seed, shadow=shadow, backend=b) for b in ("triton", "reference"))
    assert kernel.dtype == expected.dtype and kernel.shape == expected.shape and kernel.is_contiguous()
    integer = torch.int32 if x.dtype == torch.float32 else torch.int16
    return int((kernel.view(integer) != expected.view(integer)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s}/{s.axis}")
def test_kernel_and_reference_give_the_same_bits(spec, dtype):
    for shape in ((25216, 768), (197, 192), (77, 33), (1, 1), (1, 3072), (1000, 1)):
        x = awkward(shape, dtype).cuda()
        assert differing(x, spec) == 0
        if not spec.stochastic:
            assert differing(x, spec, torch.roll(x, 1, -1)) == 0
            assert differing(x, spec, x.float() * (1 + torch.randn(shape, device="cuda") / 4)) == 0


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("element", FORMATS)
def test_kernel_and_reference_on_every_bfloat16_of_a_block(element, rounding):
    largest = FORMATS[element].max
    x = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    x = x[x <= largest]
    x = torch.nn.functional.pad(torch.cat([x, -x]), (0, -2 * len(x) % 31)).view(-1, 31)
    x = torch.cat([torch.full((len(x), 1), largest, dtype=x.dtype), x], dim=1).cuda()
    for s in (0, -126, 100):
        assert differing((x.float() * 2.0**s).bfloat16(), QuantizerSpec(element, rounding=rounding)) == 0
        assert differing((x.float() * 2.0**s).t().contiguous(), QuantizerSpec(element, rounding=rounding, axis=0)) == 0


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 16, 64, 128])
@pytest.mark.parametrize("axis", [-1, 0])
def test_kernel_with_other_block_sizes_and_strides(axis, block_size):
    x = awkward((1000, 770), torch.float32).cuda()
    for rounding in ROUNDINGS:
        spec = QuantizerSpec(rounding=rounding, axis=axis, block_size=block_size)
        for view in (x, x.t(), x[::3, 1::2], x.bfloat16()[:, 1:]):
            assert differing(view, spec) == 0


def test_what_the_kernel_does_not_serve_the_reference_does():
    x = torch.randn(4, 50, 33, device="cuda")
    for spec in (QuantizerSpec(axis=1), QuantizerSpec(axis=0, rounding="stochastic"), QuantizerSpec(block_size=24)):
        expected = fake_quantize(x, spec, seed=1, backend="reference")
        assert torch.equal(fake_quantize(x, spec, seed=1), expected)
        with pytest.raises(ValueError, match="Triton kernel"):
            fake_quantize(x, spec, seed=1, backend="triton")


def test_kernel_beyond_two_to_the_31_elements():
    x = torch.randn(2**20 + 3, 2080, device="cuda", dtype=torch.bfloat16)
    for spec in (QuantizerSpec(), QuantizerSpec(axis=0, rounding="stochastic")):
        out = fake_quantize(x, spec, seed=Noise(torch.tensor([1, 2], device="cuda"), 3))
        assert torch.isfinite(out).all()
        if not spec.stochastic:  # whole rows, and blocks do not cross them
            assert torch.equal(out[-99:], fake_quantize(x[-99:], spec, backend="reference"))
        del out


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
