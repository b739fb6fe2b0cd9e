"""What must hold on a CUDA device and cannot be seen on a CPU. Run with `bash scripts/test.sh -m gpu`.

Each pair of specs, dtypes and divisibility of the columns is a kernel of its own, and takes about a second to compile:
tests take turns where the whole product would say nothing new.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from operand_helpers import ELEMENTS, job_of
from test_kernels import (
    DTYPES,
    SPECS,
    by,
    differing,
    differing_operands,
    expanded,
    noise_on,
    prepared,
    unequal,
    within_window,
)
from torch import nn

from quantization import PRESETS, LinearRecipe, QuantizerSpec, QuantLinear, fake_quantize
from quantization.formats import FORMATS
from quantization.job import CARRIED, DENSE, E4M3, E5M2, NOTHING, PACKED, Packed, codes_shape, scales_shape
from quantization.noise import Noise, uniform
from quantization.operands import forms_of, multiply, prepare
from quantization.spec import ROUNDINGS

pytestmark = pytest.mark.gpu

FP8 = (E4M3, E5M2)
TRAINED = [name for name in PRESETS if PRESETS[name].active]
CARRIERS = ("bf16", "fp8")
# The scales or rotations of the other presets are not for fp8.
RECIPES = {(name, "bf16"): PRESETS[name] for name in TRAINED} | {
    (name, "fp8"): dataclasses.replace(PRESETS[name], carrier="fp8") for name in ("tetrajet", "microscaling")
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=map("-".join, RECIPES))


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


# One quantizer --------------------------------------------------------------------------------------------------------


# Every spec in bfloat16, a half in float32 (the other half is below), a quarter in float16: loads and stores differ.
TAKEN = [(s, torch.bfloat16) for s in SPECS]
TAKEN += [(s, torch.float32) for s in SPECS if s.scale_rule == "truncation_free"]
TAKEN += [(s, torch.float16) for s in SPECS if s.scale_rule == "truncation_free" and s.element == "e2m1"]


@pytest.mark.parametrize(("spec", "dtype"), TAKEN, ids=str)
def test_the_kernel_s_bits_are_the_reference_s_on_this_device_and_on_the_cpu(spec, dtype):
    for shape in ((2521, 768), (197, 192), (33, 64), (1, 32)):
        assert differing(awkward(shape, dtype).cuda(), spec) == 0
    x = awkward((197, 192), dtype)
    assert unequal(fake_quantize(x.cuda(), spec, seed=7).cpu(), fake_quantize(x, spec, seed=7)) == 0


@pytest.mark.parametrize("spec", [s for s in SPECS if s.scale_rule == "floor"], ids=lambda s: f"{s}/{s.axis}")
def test_columns_that_are_no_multiple_of_16(spec):
    for shape in ((77, 33), (197, 65), (1000, 250)):
        assert differing(awkward(shape, torch.float32).cuda(), spec) == 0


@pytest.mark.parametrize("axis", [-1, 0])
def test_one_column_and_one_row(axis):
    for rounding, shape in itertools.product(("nearest_even", "stochastic"), ((1000, 1), (1, 1), (1, 3072))):
        assert differing(awkward(shape, torch.bfloat16).cuda(), QuantizerSpec(rounding=rounding, axis=axis)) == 0


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.stochastic], ids=lambda s: f"{s}/{s.axis}")
def test_a_shadow_gives_the_same_bits_on_this_device_and_on_the_cpu(spec):
    for shape in ((197, 192), (768, 3072)):
        w = awkward(shape, torch.float32)
        near = w * (1 + torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 4)
        for shadow in (near, torch.roll(w, 1, -1)):
            assert differing(w.cuda(), spec, shadow.cuda()) == 0
    w, shadow = w[:64], near[:64]
    assert (
        unequal(fake_quantize(w.cuda(), spec, shadow=shadow.cuda()).cpu(), fake_quantize(w, spec, shadow=shadow)) == 0
    )


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_bfloat16_of_a_block(element, rounding):
    largest = FORMATS[element].max
    x = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    x = x[x <= largest]
    x = F.pad(torch.cat([x, -x]), (0, -2 * len(x) % (31 * 16))).view(-1, 31)
    x = torch.cat([torch.full((len(x), 1), largest, dtype=x.dtype), x], dim=1).cuda()
    for s in (0, -126, 100):
        scaled = (x.float() * 2.0**s).bfloat16()
        assert differing(scaled, QuantizerSpec(element, rounding=rounding)) == 0
        assert differing(scaled.t().contiguous(), QuantizerSpec(element, rounding=rounding, axis=0)) == 0


@pytest.mark.parametrize("block_size", [1, 2, 8, 16, 64, 128])
@pytest.mark.parametrize("axis", [-1, 0])
def test_other_block_sizes(axis, block_size):
    rounding = ("stochastic", "nearest_away")[block_size in (2, 64)]
    assert differing(awkward((1000, 768), torch.float32).cuda(), QuantizerSpec("e2m1", "floor", rounding, axis)) == 0
    spec = QuantizerSpec(rounding=rounding, axis=axis, block_size=block_size)
    for shape in ((1000, 768), (130, 64)):
        assert differing(awkward(shape, torch.float32).cuda(), spec) == 0


@pytest.mark.parametrize("axis", [-1, 0])
def test_views_of_other_strides_and_of_another_alignment(axis):
    x, spec = awkward((768, 784), torch.bfloat16).cuda(), QuantizerSpec(rounding="stochastic", axis=axis)
    for view in (x.t(), x[::3, 1:785:2], x[:, 1:769], x.flatten()[1 : 1 + 64 * 768].view(64, 768)):
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


# Operands: both quantizers in one pass --------------------------------------------------------------------------------

SHAPES = ((2521, 192), (49, 768), (1, 64), (197, 3072))
FORMS = ((DENSE, DENSE), (PACKED, PACKED), (DENSE, PACKED), (PACKED, DENSE))


@pytest.mark.parametrize("backward", ROUNDINGS)
@pytest.mark.parametrize("forward", ROUNDINGS)
def test_both_quantizers_in_one_pass(forward, backward):
    """Every pair of roundings; elements, scale rules, chains, forms and dtypes take turns."""
    turn = ROUNDINGS.index(forward) * len(ROUNDINGS) + ROUNDINGS.index(backward)
    element, rule = ELEMENTS[turn % 2], ("truncation_free", "floor")[turn // 4 % 2]
    row, column = QuantizerSpec(element, rule, forward), QuantizerSpec(element, rule, backward, axis=0)
    forms, chained, dtype = FORMS[(turn + turn // 4) % 4], bool(turn // 2 % 2), DTYPES[turn % 3]
    for shape in SHAPES:
        x = awkward(shape, dtype).cuda()
        assert differing_operands(x, row, column, forms, torch.bfloat16, chained=chained) == 0


@pytest.mark.parametrize("forms", FORMS, ids="+".join)
def test_both_quantizers_on_odd_shapes(forms):
    row, column = QuantizerSpec(rounding="stochastic"), QuantizerSpec(axis=0)
    for shape in ((77, 33), (197, 131), (33, 65)):
        x = awkward(shape, torch.float32).cuda()
        assert differing_operands(x, row, column, forms, torch.bfloat16, chained=True) == 0


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("element", ELEMENTS)
def test_carried_operands_within_the_window_and_below_it_and_with_blocks_that_are_not_finite(element, fp8):
    rule, chained = (("truncation_free", False), ("floor", True))[FP8.index(fp8)]
    row, column = QuantizerSpec(element, rule), QuantizerSpec(element, rule, "stochastic", axis=0)
    arguments = (row, column, (CARRIED, CARRIED), torch.bfloat16, fp8)
    for shape in ((1970, 192), (49, 768), (1, 64)):
        inside = within_window(shape, torch.float32).cuda()
        assert differing_operands(inside, *arguments, chained=chained) == 0
        assert prepared(inside, "triton", *arguments, chained=chained).lost == 0
    rows = torch.exp2(-torch.arange(384.0) / 8).unsqueeze(1).cuda()
    spread = rows * torch.randn(384, 192, generator=torch.Generator().manual_seed(2)).cuda()
    assert differing_operands(spread, *arguments, chained=chained) == 0
    assert prepared(spread, "triton", *arguments, chained=chained).lost > 0
    spread[5, 7], spread[100, 100] = torch.inf, torch.nan
    assert differing_operands(spread, *arguments, chained=chained) == 0
    for size in (2.0**-140, 2.0**-118, 2.0**125):
        assert differing_operands(within_window((3, 64), torch.float32).cuda().clamp(-1.9, 1.9) * size, *arguments) == 0


def test_carried_operands_of_odd_shapes():
    row, column = QuantizerSpec(), QuantizerSpec(axis=0)
    for shape in ((77, 33), (197, 131)):
        x = within_window(shape, torch.float32).cuda()
        assert differing_operands(x, row, column, (CARRIED, CARRIED), torch.bfloat16) == 0
        assert differing_operands(x, row, column, (CARRIED, PACKED), torch.bfloat16) == 0


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_byte_of_codes_under_every_scale_expands_as_in_the_reference(element, axis):
    spec, g = QuantizerSpec(element, axis=axis), torch.Generator().manual_seed(0)
    rows, columns = 1000, 784
    codes = torch.randint(256, codes_shape(rows, columns), generator=g, dtype=torch.uint8).cuda()
    scales = torch.randint(256, scales_shape(rows, columns, spec), generator=g, dtype=torch.uint8).cuda()
    for dtype in (torch.float32, torch.bfloat16):
        packed = Packed(codes, scales, spec, columns)
        assert unequal(*(expanded(packed, backend, dtype) for backend in ("auto", "reference"))) == 0


@recipes
def test_the_operands_of_a_layer_are_the_reference_s(recipe):
    forms = forms_of(recipe, (576, 192), True, False)
    chained = recipe.backward_operands == "requantized"
    g = torch.Generator().manual_seed(3)
    x, w, grad = (torch.randn(s, generator=g).cuda() for s in ((4 * 197, 192), (576, 192), (4 * 197, 576)))
    for matrix, (row, column), fp8 in (
        (x.bfloat16(), ("q1", "q6"), E4M3),
        (w, ("q2", "q4"), E4M3),
        (grad.bfloat16(), ("q3", "q5"), E5M2),
    ):
        specs, both = (getattr(recipe, row), getattr(recipe, column)), (forms[row], forms[column])
        chain = chained and row != "q3"
        assert differing_operands(matrix, *specs, both, torch.bfloat16, fp8, chained=chain) == 0


@pytest.mark.parametrize(("tokens", "D", "C"), [(4 * 197, 192, 576), (50, 768, 3072), (1, 64, 16)])
def test_a_product_in_fp8_is_the_exact_sum_within_the_error_of_accumulation(tokens, D, C):
    g = torch.Generator().manual_seed(5)
    x, w, grad = (torch.randn(s, generator=g).cuda() for s in ((tokens, D), (C, D), (tokens, C)))
    row, column = QuantizerSpec(), QuantizerSpec(rounding="stochastic", axis=0)

    def both(matrix: torch.Tensor, fp8: torch.dtype):
        return [
            prepare(matrix, job_of(row, column, (form, form), torch.float32, fp8), noise_on(matrix.device))[:2]
            for form in (CARRIED, DENSE)
        ]

    (x1, x6), (x1_exact, x6_exact) = both(x, E4M3)
    (w2, w4), (w2_exact, w4_exact) = both(w, E4M3)
    (g3, g5), (g3_exact, g5_exact) = both(grad, E5M2)
    bias = torch.randn(C, generator=g).cuda().bfloat16()
    x1_ND, x6_ND, w2_CD, w4_CD, g3_NC, g5_NC = (
        m.values.double() for m in (x1_exact, x6_exact, w2_exact, w4_exact, g3_exact, g5_exact)
    )
    for (a, b, over), (left, right), out_dtype, shift in (
        ((x1, w2, (-1, -1)), (x1_ND, w2_CD.t()), torch.bfloat16, bias),
        ((g3, w4, (-1, 0)), (g3_NC, w4_CD), torch.bfloat16, None),
        ((g5, x6, (0, 0)), (g5_NC.t(), x6_ND), torch.float32, None),
    ):
        product = multiply(a, b, over, torch.bfloat16, out_dtype, shift)
        exact = left @ right + (0 if shift is None else shift.double())
        error = (product.double() - exact).abs()
        allowed = 2.0**-10 * (left.abs() @ right.abs()) + (2.0**-7 * exact.abs() if out_dtype == torch.bfloat16 else 0)
        assert product.dtype == out_dtype and product.shape == exact.shape
        assert (error <= allowed).all()
        assert not ((product.double() * 1.02 - exact).abs() <= allowed).all()  # the control


# Layers ---------------------------------------------------------------------------------------------------------------


def layer_and_input(recipe: LinearRecipe, shape: tuple[int, ...] = (4, 197, 192)) -> tuple[QuantLinear, torch.Tensor]:
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(192, 576).cuda(), recipe)
    layer.noise.reseed(5, 0)
    return layer, torch.randn(shape, generator=torch.Generator().manual_seed(1)).cuda().requires_grad_()


def trained(layer: nn.Module, call, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = call(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to("cuda", y.dtype))
    return {"output": y.detach(), "grad_input": x.grad, "grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}


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


@recipes
def test_a_layer_is_the_same_with_kernels_and_with_the_reference(recipe):
    results = []
    for backend in ("auto", "reference"):
        layer, x = layer_and_input(recipe)
        with by(backend):
            results.append(trained(layer, layer, x))
    ours, theirs = results
    torch.testing.assert_close(ours.pop("grad_bias"), theirs.pop("grad_bias"), rtol=1e-5, atol=1e-4)  # order of a sum
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@recipes
def test_a_layer_compiles_to_one_graph_and_trains_as_in_eager(recipe):
    """The operands are the same; what inductor makes of bias and casts may round to bfloat16 elsewhere."""
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        layer, x = layer_and_input(recipe)
        results.append(trained(layer, torch.compile(layer, fullgraph=True) if compiled else layer, x))
    for name, value in results[0].items():
        assert results[1][name].dtype == value.dtype
        torch.testing.assert_close(results[1][name], value, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_step_under_autocast_does_not_synchronise(carrier):
    layer, x = layer_and_input(dataclasses.replace(PRESETS["tetrajet"], carrier=carrier))
    trained(layer, layer, x)  # the first call compiles kernels and brings the formats' tables to the device
    layer.zero_grad()
    grad = torch.randn(4, 197, 576, device="cuda", dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = layer(x)
        y.backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    assert torch.isfinite(layer.weight.grad).all()
    with pytest.raises(RuntimeError, match="synchroniz"):  # the control
        torch.cuda.set_sync_debug_mode("error")
        try:
            y.sum().item()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("carrier", CARRIERS)
def test_an_empty_batch_and_a_single_token_train(carrier):
    for shape in ((0, 192), (1, 192)):
        layer, x = layer_and_input(dataclasses.replace(PRESETS["tetrajet"], carrier=carrier), shape)
        results = trained(layer, layer, x)
        assert results["output"].shape == (shape[0], 576) and results["grad_input"].shape == shape
        assert bool(results["grad_weight"].any()) == bool(shape[0]) and results["grad_weight"].isfinite().all()


def test_one_quantizer_alone_in_every_form():
    x = within_window((197, 192), torch.float32).cuda()
    for form in (DENSE, PACKED, CARRIED):
        assert differing_operands(x, QuantizerSpec(), None, (form, NOTHING), torch.bfloat16) == 0
        assert differing_operands(x, None, QuantizerSpec(axis=0), (NOTHING, form), torch.bfloat16) == 0
