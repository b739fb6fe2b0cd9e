"""The three products of the quantized linear layer, against products written out by hand, and their expectation.

X, W and G have five significant bits and exponents close together, so that every product below is exact in float32,
whatever the order of its sum, and is compared bit for bit.
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from quick import some

from quantization import PRESETS, LinearRecipe, QuantizerSpec, build_recipe, fake_quantize
from quantization.layers.linear_fn import Call, QuantLinearFunction
from quantization.noise import Noise
from quantization.operands import LinearJobs
from quantization.spec import BACKWARD_OPERANDS, QUANTIZERS

STREAM = 8 * 5  # of the layer under test
LOST = torch.zeros((), dtype=torch.int64)  # blocks below fp8's window, counted
OPERANDS = ("requantized", "original")
SINGLES = [(name,) for name in QUANTIZERS]
PAIRS = [("q1", "q6"), ("q2", "q4"), ("q3", "q5"), ("q1", "q2"), ("q3", "q4"), ("q5", "q6"), ("q2", "q6"), ("q1", "q4")]
SETS = [*SINGLES, *PAIRS, ("q1", "q2", "q3"), ("q2", "q3", "q4", "q5", "q6"), QUANTIZERS]
# Which products each quantizer enters; the second set under requantized operands.
REACHES = {
    "q1": ({"output"}, {"output", "grad_weight"}),
    "q2": ({"output"}, {"output", "grad_input"}),
    "q3": ({"grad_input"}, {"grad_input"}),
    "q4": ({"grad_input"}, {"grad_input"}),
    "q5": ({"grad_weight"}, {"grad_weight"}),
    "q6": ({"grad_weight"}, {"grad_weight"}),
}
SHAPES = {"rank 2": (64,), "rank 3": (3, 17), "rank 4": (2, 5, 7), "one token": (1,), "rank 1": ()}


def state(position=3, seed=11):
    high = position << 32
    return torch.tensor([seed, high - 2**64 if high >= 2**63 else high], dtype=torch.int64)


def few_bits(*shape, seed):
    """Multiples of 1/16 below 2, halved and quartered by row and by column, so that blocks differ in their scales."""
    g = torch.Generator().manual_seed(seed)
    t = torch.randint(-31, 32, shape, generator=g) / 16
    return t * 0.5 ** torch.randint(3, (*shape[:-1], 1), generator=g) * 0.5 ** torch.randint(2, shape[-1:], generator=g)


@functools.cache
def tensors(lead, D, C):
    """X, W, b and G."""
    return (
        few_bits(*lead, D, seed=1),
        few_bits(C, D, seed=2) / 4,
        few_bits(C, seed=3),
        few_bits(*lead, C, seed=4) / 8,
    )


def by_hand(X, W, b, G, recipe, noise_state, stream, cast=lambda t: t):
    """The layer in full: SPEC, sections 1 and 4. `cast` is what autocast does to the operands of a product."""

    def q(i, operand):
        spec = getattr(recipe, f"q{i}")
        return operand if spec is None else fake_quantize(operand, spec, seed=Noise(noise_state, stream + i - 1))

    x, g = X.reshape(-1, X.shape[-1]), G.reshape(-1, G.shape[-1])
    x1, w2 = q(1, x), q(2, W)
    again = recipe.backward_operands == "requantized"
    g3, w4 = q(3, g), q(4, w2 if again else W)
    g5, x6 = q(5, g), q(6, x1 if again else x)
    output = cast(x1).double() @ cast(w2).double().t() + cast(b).double()
    return {
        "output": output.view(*X.shape[:-1], -1),
        "grad_input": (cast(g3).double() @ cast(w4).double()).view(X.shape),
        "grad_weight": cast(g5).double().t() @ cast(x6).double(),
        "grad_bias": g.double().sum(0),
    }


def call_of(recipe, W, stream=STREAM):
    return Call(LinearJobs(recipe, W.shape), stream)


def by_function(X, W, b, G, recipe, noise=None, *, shadow=None, autocast=False):
    X, W, b = (t.clone().requires_grad_() for t in (X, W, b))
    noise_state, stream = noise or Noise(state(), STREAM)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = QuantLinearFunction.apply(X, W, b, call_of(recipe, W, stream), noise_state, shadow, LOST)
    output.backward(G.to(output.dtype))
    return {"output": output.detach(), "grad_input": X.grad, "grad_weight": W.grad, "grad_bias": b.grad}


def assert_equal(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name].double(), value.double()), name


def recipe_of(active, operands, forward="nearest_even", backward="stochastic", scale_rule="truncation_free"):
    return build_recipe(active, backward_operands=operands, forward=forward, backward=backward, scale_rule=scale_rule)


@pytest.mark.parametrize("active", SETS, ids="+".join)
@pytest.mark.parametrize("operands", OPERANDS)
def test_every_set_of_quantizers_gives_the_products_written_out_by_hand(active, operands):
    data = tensors((3, 17), 48, 40)
    for forward, backward in itertools.product(("nearest_even", "stochastic"), repeat=2):
        recipe = recipe_of(active, operands, forward, backward)
        expected = by_hand(*data, recipe, state(), STREAM)
        assert_equal(by_function(*data, recipe), expected)


@pytest.mark.parametrize("active", SETS, ids="+".join)
@pytest.mark.parametrize("operands", OPERANDS)
def test_a_quantizer_changes_exactly_the_products_it_enters(active, operands):
    data = tensors((3, 17), 48, 40)
    plain = by_function(*data, PRESETS["full_precision"])
    actual = by_function(*data, recipe_of(active, operands))
    changed = {name for name in plain if not torch.equal(actual[name], plain[name])}
    assert changed == set().union(*(REACHES[name][operands == "requantized"] for name in active))


@pytest.mark.parametrize("lead", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("D", "C"), [(64, 32), (48, 40), (7, 33), (1, 1)])
def test_any_rank_and_any_number_of_tokens_inputs_and_outputs(lead, D, C):
    data = tensors(lead, D, C)
    for recipe in (PRESETS["tetrajet"], PRESETS["microscaling"]):
        actual = by_function(*data, recipe)
        assert_equal(actual, by_hand(*data, recipe, state(), STREAM))
        assert actual["output"].shape == (*lead, C) and actual["grad_input"].shape == (*lead, D)


def test_blocks_along_tokens_run_over_all_leading_dimensions():
    X, W, b, G = tensors((4, 16), 32, 32)
    recipe = recipe_of(("q5", "q6"), "original", backward="nearest_even")
    whole = by_function(X, W, b, G, recipe)["grad_weight"]
    flat = by_function(X.view(64, 32), W, b, G.view(64, 32), recipe)["grad_weight"]
    assert torch.equal(whole, flat)
    images = sum(by_function(x, W, b, g, recipe)["grad_weight"] for x, g in zip(X, G, strict=True))
    assert not torch.equal(whole, images)  # the control: 16 tokens to an image, so blocks do cross images


@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_an_empty_batch_has_an_empty_output_and_zero_gradients(shape, preset):
    X, W, b, G = tensors(shape, 48, 40)
    actual = by_function(X, W, b, G, PRESETS[preset])
    assert actual["output"].shape == (*shape, 40) and actual["grad_input"].shape == (*shape, 48)
    assert torch.equal(actual["grad_weight"], torch.zeros(40, 48))
    assert torch.equal(actual["grad_bias"], torch.zeros(40))


# What reads what ------------------------------------------------------------------------------------------------------


def differs_along_both_axes(t):
    """Whether quantizing along the rows first changes what quantizing along the columns gives."""
    row, column = QuantizerSpec(axis=-1), QuantizerSpec(axis=0)
    return not torch.equal(fake_quantize(fake_quantize(t, row), column), fake_quantize(t, column))


def test_q6_reads_the_output_of_q1_where_it_is_on_and_x_itself_where_it_is_off():
    X, W, b, G = tensors((64,), 48, 40)
    x6 = fake_quantize(X, QuantizerSpec(axis=0))
    for active, operands in ((("q6",), "requantized"), (("q6",), "original"), (("q1", "q6"), "original")):
        recipe = recipe_of(active, operands, backward="nearest_even")
        assert torch.equal(by_function(X, W, b, G, recipe)["grad_weight"], G.t() @ x6)
    recipe = recipe_of(("q1", "q6"), "requantized", backward="nearest_even")
    again = fake_quantize(fake_quantize(X, QuantizerSpec()), QuantizerSpec(axis=0))
    assert torch.equal(by_function(X, W, b, G, recipe)["grad_weight"], G.t() @ again)
    assert differs_along_both_axes(X)  # the control: the two are not the same


def test_with_q6_off_grad_weight_reads_the_output_of_q1_or_x_by_the_backward_operands():
    X, W, b, G = tensors((64,), 48, 40)
    requantized = by_function(X, W, b, G, recipe_of(("q1",), "requantized"))["grad_weight"]
    original = by_function(X, W, b, G, recipe_of(("q1",), "original"))["grad_weight"]
    assert torch.equal(requantized, G.t() @ fake_quantize(X, QuantizerSpec()))
    assert torch.equal(original, G.t() @ X)
    assert not torch.equal(requantized, original)


def test_q4_reads_the_output_of_q2_where_it_is_on_and_w_itself_where_it_is_off():
    X, W, b, G = tensors((64,), 48, 40)
    w4 = fake_quantize(W, QuantizerSpec(axis=0))
    for active, operands in ((("q4",), "requantized"), (("q4",), "original"), (("q2", "q4"), "original")):
        recipe = recipe_of(active, operands, backward="nearest_even")
        assert torch.equal(by_function(X, W, b, G, recipe)["grad_input"], G @ w4)
    recipe = recipe_of(("q2", "q4"), "requantized", backward="nearest_even")
    again = fake_quantize(fake_quantize(W, QuantizerSpec()), QuantizerSpec(axis=0))
    assert torch.equal(by_function(X, W, b, G, recipe)["grad_input"], G @ again)
    assert differs_along_both_axes(W)


def test_a_shadow_decides_q2_and_with_it_what_a_requantized_q4_reads():
    X, W, b, G = tensors((64,), 48, 40)
    shadow = W + few_bits(40, 48, seed=9) / 8
    w2 = fake_quantize(W, QuantizerSpec(), shadow=shadow)
    assert not torch.equal(w2, fake_quantize(W, QuantizerSpec()))
    for operands, source in (("requantized", w2), ("original", W)):
        recipe = recipe_of(("q2", "q4"), operands, backward="nearest_even")
        actual = by_function(X, W, b, G, recipe, shadow=shadow)
        assert torch.equal(actual["output"], X @ w2.t() + b)
        assert torch.equal(actual["grad_input"], G @ fake_quantize(source, QuantizerSpec(axis=0)))


def test_the_gradient_of_the_bias_sums_g_unquantized():
    X, W, b, G = tensors((64,), 48, 40)
    for recipe in PRESETS.values():
        assert torch.equal(by_function(X, W, b, G, recipe)["grad_bias"], G.sum(0))
    for axis in (0, -1):  # the control: quantized, it has another sum
        assert not torch.equal(fake_quantize(G, QuantizerSpec(axis=axis)).sum(0), G.sum(0))


@pytest.mark.parametrize("position", [0, 3, 2**31 - 1])
@pytest.mark.parametrize("stream", [0, 8, 8 * 47])
def test_noise_is_that_of_the_position_and_of_the_stream_of_the_layer(position, stream):
    data = tensors((64,), 48, 40)
    recipe = recipe_of(QUANTIZERS, "requantized", "stochastic")
    actual = by_function(*data, recipe, Noise(state(position), stream))
    assert_equal(actual, by_hand(*data, recipe, state(position), stream))
    for other in (
        by_hand(*data, recipe, state(position + 1), stream),
        by_hand(*data, recipe, state(position), stream + 8),
    ):
        for name in ("output", "grad_input", "grad_weight"):
            assert not torch.equal(actual[name].double(), other[name])


def test_parts_that_need_no_gradient_get_none_and_leave_the_others_alone():
    X, W, b, G = tensors((64,), 48, 40)
    expected = by_function(X, W, b, G, PRESETS["tetrajet"])
    names = ("grad_input", "grad_weight", "grad_bias")
    for needed in itertools.product((False, True), repeat=3):
        if not any(needed):
            continue
        leaves = [t.clone().requires_grad_(n) for t, n in zip((X, W, b), needed, strict=True)]
        QuantLinearFunction.apply(*leaves, call_of(PRESETS["tetrajet"], leaves[1]), state()).backward(G)
        for leaf, n, name in zip(leaves, needed, names, strict=True):
            assert torch.equal(leaf.grad, expected[name]) if n else leaf.grad is None
    without = [X.clone().requires_grad_(), W.clone().requires_grad_()]
    output = QuantLinearFunction.apply(*without, None, call_of(PRESETS["tetrajet"], without[1]), state())
    output.backward(G)
    assert torch.equal(output, expected["output"] - b)
    assert torch.equal(without[1].grad, expected["grad_weight"])


def test_a_second_derivative_is_refused_and_not_silently_wrong():
    X, W, b, _ = tensors((64,), 48, 40)
    X = X.clone().requires_grad_()
    output = QuantLinearFunction.apply(X, W, b, call_of(PRESETS["tetrajet"], W), state())
    (grad,) = torch.autograd.grad(output.square().sum(), X, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Dtypes and autocast --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", SETS, ids="+".join)
@pytest.mark.parametrize("operands", OPERANDS)
def test_under_bfloat16_autocast_products_run_in_bfloat16_and_gradients_leave_in_float32(active, operands):
    """X, W and G are exact in bfloat16 here, and so are sums up to their one rounding at the end."""
    data = tensors((3, 17), 48, 40)
    recipe = recipe_of(active, operands)
    actual = by_function(*data, recipe, autocast=True)
    expected = by_hand(*data, recipe, state(), STREAM)
    assert {name: t.dtype for name, t in actual.items()} == {
        "output": torch.bfloat16,
        "grad_input": torch.float32,
        "grad_weight": torch.float32,
        "grad_bias": torch.float32,
    }
    assert torch.equal(actual["grad_bias"], expected.pop("grad_bias").float())
    for name in ("grad_input", "grad_weight"):
        assert torch.equal(actual[name], expected[name].float().bfloat16().float()), name
    # The bias is added before or after the rounding of the product to bfloat16, as F.linear has it.
    torch.testing.assert_close(actual["output"].double(), expected["output"], rtol=2.0**-7, atol=2.0**-7)


def on_a_threshold(*shape):
    """Numbers in float32 each of whose blocks, along both axes, has a scale that its bfloat16 cast has not."""
    t = torch.randint(-20, 21, shape, generator=torch.Generator().manual_seed(6)) / 16
    return torch.where(t.abs() == 1.25, 1.5 * (1 + 2.0**-20) * t.sign(), t)


def threshold_control(t):
    for axis in (0, -1):
        spec = QuantizerSpec(axis=axis)
        assert not torch.equal(fake_quantize(t, spec), fake_quantize(t.bfloat16(), spec).float())


def test_q2_reads_the_float32_weight_and_not_its_bfloat16_cast():
    X, _, b, G = tensors((64,), 48, 40)
    W = on_a_threshold(40, 48)
    threshold_control(W)
    for operands in OPERANDS:
        actual = by_function(X, W, b, G, recipe_of(("q2",), operands), autocast=True)
        w2 = fake_quantize(W, QuantizerSpec())
        assert torch.equal(actual["output"], F.linear(X.bfloat16(), w2.bfloat16(), b.bfloat16()))
        assert not torch.equal(
            actual["output"], F.linear(X.bfloat16(), fake_quantize(W.bfloat16(), QuantizerSpec()), b.bfloat16())
        )


def test_under_autocast_q1_and_original_operands_read_what_they_are_given_and_not_a_cast():
    _, _, b, G = tensors((64,), 48, 40)
    X, W = on_a_threshold(64, 48), on_a_threshold(40, 48)
    threshold_control(X)
    recipe = recipe_of(QUANTIZERS, "original")
    actual = by_function(X, W, b, G, recipe, autocast=True)
    expected = by_hand(X, W, b, G, recipe, state(), STREAM)
    for name in ("grad_input", "grad_weight"):
        assert torch.equal(actual[name], expected[name].float().bfloat16().float()), name
    torch.testing.assert_close(actual["output"].double(), expected["output"], rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("operands", BACKWARD_OPERANDS)
def test_under_autocast_q6_and_q4_read_x_and_w_themselves_where_q1_and_q2_are_off(operands):
    _, _, b, G = tensors((64,), 48, 40)
    X, W = on_a_threshold(64, 48), on_a_threshold(40, 48)
    threshold_control(X)
    threshold_control(W)
    recipe = recipe_of(("q4", "q6"), operands, backward="nearest_even")
    actual = by_function(X, W, b, G, recipe, autocast=True)
    w4, x6 = fake_quantize(W, QuantizerSpec(axis=0)), fake_quantize(X, QuantizerSpec(axis=0))
    assert torch.equal(actual["grad_input"], (G @ w4).bfloat16().float())
    assert torch.equal(actual["grad_weight"], (G.t() @ x6).bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_autocast_everything_has_the_dtype_of_the_parameters(dtype):
    data = [t.to(dtype) for t in tensors((64,), 48, 40)]
    actual = by_function(*data, PRESETS["tetrajet"])
    expected = by_hand(*data, PRESETS["tetrajet"], state(), STREAM)
    for name, t in actual.items():
        assert t.dtype == dtype
        torch.testing.assert_close(t.double(), expected[name], rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("lead", SHAPES.values(), ids=SHAPES)
def test_an_empty_recipe_equals_a_plain_linear_bit_for_bit(lead):
    """In float32 all of it. Under bfloat16 autocast all but the bias gradient, which a plain linear sums to bfloat16
    and we to float32: there the tightest true claim is that ours rounds to theirs within one step of bfloat16."""
    g = torch.Generator().manual_seed(7)
    X, W, b, G = (torch.randn(s, generator=g) for s in ((*lead, 48), (40, 48), (40,), (*lead, 40)))
    for autocast in (False, True):
        leaves = [t.clone().requires_grad_() for t in (X, W, b)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = F.linear(*leaves)
        output.backward(G.to(output.dtype))
        plain = dict(zip(("grad_input", "grad_weight", "grad_bias"), (t.grad for t in leaves), strict=True))
        plain["output"] = output.detach()
        actual = by_function(X, W, b, G, LinearRecipe(), autocast=autocast)
        if autocast:
            theirs, ours = plain.pop("grad_bias"), actual.pop("grad_bias")
            torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=2.0**-7)
            exact = G.bfloat16().reshape(-1, 40).double().sum(0)
            torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
        for name, value in plain.items():
            assert torch.equal(actual[name], value) and actual[name].dtype == value.dtype, name


# The expectation of the gradients -------------------------------------------------------------------------------------

REPEATS = 800


@functools.cache
def smooth():
    g = torch.Generator().manual_seed(8)
    return [torch.randn(s, generator=g) for s in ((70, 48), (40, 48), (40,), (70, 40))]


@functools.cache
def straight_through():
    """Equations 8 and 9 of the paper: G q2(W) and G^T q1(X)."""
    X, W, _, G = (t.double() for t in smooth())
    x1, w2 = (fake_quantize(t.float(), QuantizerSpec()).double() for t in (X, W))
    return {"grad_input": G @ w2, "grad_weight": G.t() @ x1}


@functools.cache
def mean_and_error(**changes):
    """Mean of the gradients over many positions of the noise, and its standard error, element by element."""
    X, W, b, G = smooth()
    recipe = build_recipe(**changes)
    repeats = REPEATS if recipe.q3.stochastic else 1
    sums = {name: [0.0, 0.0] for name in straight_through()}
    X, W = X.clone().requires_grad_(), W.clone().requires_grad_()
    for position in range(repeats):
        output = QuantLinearFunction.apply(X, W, b, call_of(recipe, W), state(position))
        for name, grad in zip(sums, torch.autograd.grad(output, (X, W), G), strict=True):
            sums[name][0] += grad.double()
            sums[name][1] += grad.double().square()
    mean = {name: s / repeats for name, (s, _) in sums.items()}
    error = {name: ((s2 / repeats - mean[name] ** 2) / repeats).sqrt() for name, (_, s2) in sums.items()}
    return mean, error


def mean_square_z(name, **changes):
    """Mean over elements of the squared distance to equations 8 and 9, in standard errors of TetraJet's own mean."""
    mean, _ = mean_and_error(**changes)
    _, error = mean_and_error()
    return ((mean[name] - straight_through()[name]) / error[name]).square().mean().item()


@pytest.mark.parametrize("name", ["grad_input", "grad_weight"])
def test_the_gradients_of_tetrajet_are_unbiased(name):
    """About 1 where there is no bias: the elements share draws, so it scatters more than a chi-square would."""
    mean, error = mean_and_error()
    assert 0.8 < mean_square_z(name) < 1.2
    z = (mean[name] - straight_through()[name]) / error[name]
    assert z.abs().max() < 5.5
    assert abs(z.mean()) < 0.3


@pytest.mark.parametrize("name", some(["grad_input", "grad_weight"], every=2))
@pytest.mark.parametrize(
    "changes",
    [{"scale_rule": "floor"}, {"backward_operands": "original"}, {"backward": "nearest_even"}],
    ids=lambda changes: next(iter(changes.values())),
)
def test_each_departure_from_tetrajet_biases_the_gradients(name, changes):
    """The controls of the test above. Under floor q1 and q2 change too, so the distance is to their own outputs."""
    if "scale_rule" in changes:
        X, W, _, G = smooth()
        spec = QuantizerSpec(scale_rule="floor")
        own = {"grad_input": G @ fake_quantize(W, spec), "grad_weight": G.t() @ fake_quantize(X, spec)}
        mean, error = mean_and_error(**changes)
        assert ((mean[name] - own[name]) / error[name]).square().mean() > 5
    else:
        assert mean_square_z(name, **changes) > 5
