"""The INT4 layer: shapes, dtypes, noise, copies, and training."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from int4_helpers import PLAIN, RECIPES, layer_of, normal, operand, run, state, tensors, transform
from torch import nn

from quantization import convert_linears
from quantization.layers import int4
from quantization.layers.int4 import Int4Linear, Int4LinearFunction
from quantization.spec import Int4Recipe


def step(made, X, autocast=False):
    X = X.clone().requires_grad_()
    made.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = made(X)
    output.float().square().mean().backward()
    return {"output": output.detach(), "grad_input": X.grad} | {n: p.grad.clone() for n, p in made.named_parameters()}


@pytest.mark.parametrize("recipe", [Int4Recipe(), PLAIN], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 4, 48), (0, 48), (2, 0, 48)], ids=str)
def test_inputs_of_any_rank_and_empty_batches(shape, autocast, recipe):
    made = layer_of(recipe)
    made(normal(9, 48))
    results = step(made, normal(*shape), autocast)
    assert results["output"].shape == (*shape[:-1], 40)
    assert results["output"].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert results["grad_input"].shape == shape
    assert results["weight"].dtype == results["bias"].dtype == torch.float32
    assert all(t.isfinite().all() for t in results.values() if t.numel() and 0 not in shape)
    if 0 in shape:
        assert not any(results[name].any() for name, _ in made.named_parameters())


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_bfloat16_autocast_is_close_to_float32(recipe):
    X, W, b, G = tensors(3, 17)
    G = G.bfloat16().float()  # as autocast does to it, which moves a few draws of the low part
    exact, rounded = run(X, W, b, G, recipe), run(X, W, b, G, recipe, autocast=True)
    assert rounded["output"].dtype == torch.bfloat16 and rounded["grad_weight"].dtype == torch.float32
    for name in ("output", "grad_input", "grad_weight"):
        error = (rounded[name].float() - exact[name]).norm() / exact[name].norm()
        assert 0 < error < 5e-3, (name, error)
    for name in exact:
        assert torch.allclose(rounded[name].float(), exact[name], rtol=2e-2, atol=2e-2 * exact[name].abs().max()), name


def test_4_bit_operands_are_exact_in_bfloat16():
    """Sums of one term, so only a rounding of the result can differ; that of dequantized operands does."""
    x, w = torch.arange(-8.0, 8).unsqueeze(1) * 0.3, torch.arange(-8.0, 8).unsqueeze(1) * 0.1
    data = (x, w, torch.zeros(16), normal(16, 16).bfloat16().float())
    exact, rounded = (run(*data, PLAIN, autocast=autocast)["output"] for autocast in (False, True))
    assert torch.equal(rounded, exact.bfloat16())
    dequantized = [t.double() for t in (operand(x, None, PLAIN)[1].bfloat16(), operand(w, None, PLAIN)[1].bfloat16())]
    assert not torch.equal((dequantized[0] @ dequantized[1].t()).bfloat16(), rounded)


def test_the_bias_s_gradient_is_not_quantized():
    X, W, b, G = tensors(3, 17)
    assert torch.equal(run(X, W, b, G, Int4Recipe())["grad_bias"], G.view(-1, 40).sum(0))
    assert "bias" not in step(layer_of(bias=False), X)


def test_zero_gradients_stay_zero_and_tiny_ones_do_not():
    X, W, b, G = tensors(3, 17)
    for recipe in (Int4Recipe(), PLAIN):
        zero = run(X, W, b, torch.zeros_like(G), recipe)
        assert not any(zero[name].any() for name in zero if name != "output")
        tiny = run(X, W, b, G * 1e-36, recipe)
        assert torch.allclose(tiny["grad_weight"] * 1e36, run(X, W, b, G, recipe)["grad_weight"], rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("recipe", [Int4Recipe(), PLAIN, Int4Recipe(hadamard=False)], ids=str)
def test_nothing_that_is_not_finite_is_swallowed(recipe, value):
    X, W, b, G = tensors(3, 17)
    bad = G.clone()
    bad[1, 2, 3] = value
    results = run(X, W, b, bad, recipe)
    assert not any(results[n].isfinite().any() for n in results if n not in ("output", "grad_bias"))
    assert not results["grad_bias"].isfinite().all()
    bad = X.clone()
    bad[1, 2, 3] = value
    results = run(bad, W, b, G, recipe)
    assert not results["output"][1, 2].isfinite().any() and not results["grad_weight"].isfinite().all()
    bad = W.clone()
    bad[4, 5] = value
    results = run(X, bad, b, G, recipe)
    assert not results["output"][..., 4].isfinite().any() and not results["grad_input"].isfinite().all()


def test_noise_differs_by_position_layer_and_use():
    X, W, b, G = tensors(3, 17)
    recipe = Int4Recipe(learned_step=False)
    leaves = [t.clone().requires_grad_() for t in (X, W)]

    def gradients(position, stream):
        output = Int4LinearFunction.apply(*leaves, b, None, None, recipe, state(position), stream)
        return torch.autograd.grad(output, leaves, G)

    again, one = gradients(3, 8), gradients(3, 8)
    for other in (gradients(4, 8), gradients(3, 16)):
        for i in range(2):
            assert torch.equal(one[i], again[i]) and not torch.equal(one[i], other[i])
    uses = (int4.LOW, int4.ROWS_OF_GRAD_INPUT, int4.ROWS_OF_GRAD_WEIGHT)
    assert len(set(uses)) == 3 and all(0 <= use < int4.STREAMS_PER_LAYER for use in uses)


def test_the_layer_is_the_autograd_function_on_its_own_stream():
    X, _, _, G = tensors(3, 17)
    made = layer_of()
    made(X)
    made.layer = 5
    made.noise.seek(4)
    expected = run(
        X,
        made.weight.detach(),
        made.bias.detach(),
        G,
        made.recipe,
        state(4, seed=5),
        (made.step_x.detach(), made.step_w.detach()),
    )
    output = made(X)
    made.zero_grad()
    output.backward(G)
    assert torch.equal(output, expected["output"])
    actual = {
        "grad_weight": made.weight,
        "grad_bias": made.bias,
        "grad_step_x": made.step_x,
        "grad_step_w": made.step_w,
    }
    assert all(torch.equal(p.grad, expected[name]) for name, p in actual.items())


def test_a_layer_takes_over_parameters_and_mode_of_the_linear():
    plain = nn.Linear(48, 40).eval()
    made = Int4Linear.from_linear(plain, Int4Recipe())
    assert made.weight is plain.weight and made.bias is plain.bias and isinstance(made, nn.Linear)
    assert (made.in_features, made.out_features, made.training) == (48, 40, False)
    assert "int4 hadamard sampling learned_step" in str(made)
    with pytest.raises(TypeError, match=r"made from an nn\.Linear; got Conv2d"):
        Int4Linear.from_linear(nn.Conv2d(3, 4, 1), Int4Recipe())


def test_what_needs_no_gradient_gets_none_and_the_rest_is_as_before():
    made, X = layer_of(), normal(33, 48)
    made(X)
    made.noise.seek(0)
    expected = step(made, X)
    made.weight.requires_grad_(False)
    made.step_w.requires_grad_(False)
    made.noise.seek(0)
    made.zero_grad()
    made(X).square().mean().backward()  # of a first layer: the input needs none
    assert made.weight.grad is None and made.step_w.grad is None
    assert torch.equal(made.step_x.grad, expected["step_x"]) and torch.equal(made.bias.grad, expected["bias"])
    with torch.no_grad():
        assert made(X).grad_fn is None


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("D", [64, 33])
def test_the_quantized_weight_is_the_one_of_the_output_product(recipe, D):
    made = layer_of(recipe, D=D, bias=False)
    X, H = normal(9, D), transform(D, recipe)
    output = made(X).detach().double()
    weight = made.quantized_weight()
    assert weight.shape == made.weight.shape and weight.dtype == torch.float32 and not weight.requires_grad
    x_t, x_q, _, _ = operand(X, made.step_x, recipe)
    _, w_q, _, _ = operand(made.weight.detach(), made.step_w, recipe)
    assert torch.allclose(output, x_q @ w_q.t(), atol=1e-5)
    assert torch.allclose(x_t @ w_q.t(), X.double() @ weight.double().t(), atol=1e-5)
    if len(H) == len(H.t()):  # without padding the quantized activation has a value in X's own basis too
        assert torch.allclose(output, x_q @ H.t() @ weight.double().t(), atol=1e-5)
    assert not torch.allclose(weight, made.weight, atol=1e-3)


def test_a_deep_copy_goes_its_own_way():
    made, X = layer_of(), normal(9, 48)
    made(X)
    twin = copy.deepcopy(made)
    for one in (twin, made):
        one.noise.reseed(0, rank=0)
    expected, actual = step(made, X), step(twin, X)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    assert not torch.equal(twin.step_x, made.step_x) and not torch.equal(twin.weight, made.weight)
    fresh = copy.deepcopy(layer_of())
    fresh(3 * X)
    assert fresh.step_x.item() == pytest.approx(3 * made.step_x.item(), rel=1e-5)


@pytest.mark.parametrize("recipe", [Int4Recipe(), PLAIN], ids=str)
def test_training_reduces_the_loss(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(
        Int4Linear.from_linear(nn.Linear(32, 64), recipe), nn.GELU(), Int4Linear.from_linear(nn.Linear(64, 8), recipe)
    )
    X = normal(128, 32)
    targets = (X @ normal(32, 8, seed=1)).argmax(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(X), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    if recipe.learned_step:
        assert all(m.step_x.item() > 0 and m.step_w.item() > 0 for m in (model[0], model[2]))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [Int4Recipe(), PLAIN], ids=str)
def test_a_step_after_the_first_does_not_synchronise(recipe):
    made, X = layer_of(recipe, D=192, C=576).cuda(), normal(4, 197, 192).cuda()
    made(X).sum().backward()
    X.requires_grad_()
    made.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = made(X)
        output.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.dtype == torch.bfloat16 and made.weight.grad.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in made.parameters()) and X.grad.isfinite().all()


def test_a_model_takes_a_state_of_full_precision_and_starts_its_steps_anew():
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 8))
    converted = copy.deepcopy(plain)
    convert_linears(converted, Int4Recipe(), ["0", "2"])
    x = torch.randn(16, 48)
    converted(x)
    assert converted[0].step_x_known
    other = nn.Sequential(nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 8))
    result = converted.load_state_dict(other.state_dict())  # strict
    assert result.missing_keys == result.unexpected_keys == []
    fresh = copy.deepcopy(other)
    convert_linears(fresh, Int4Recipe(), ["0", "2"])
    for ours, theirs in zip(converted.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(converted(x), fresh(x))
    with pytest.raises(RuntimeError, match="Missing key"):  # what else is missing is still missed
        converted.load_state_dict({"0.weight": other[0].weight})
