"""The INT4 layer: its parts, its gradients against formulas written out by hand, their expectation, and its state."""

import copy
import functools
import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from quantization import int4
from quantization.int4 import Int4Linear, Int4LinearFunction, Int4Recipe, hadamard, keep_probability, split_gradient
from quantization.noise import Noise, uniform

STREAM = 8 * 5  # of the layer under test
PLAIN = Int4Recipe(hadamard=False, sampling=False, learned_step=False)
RECIPES = [Int4Recipe(*switches) for switches in itertools.product((False, True), repeat=3)]
STEP_X, STEP_W = torch.tensor(0.3), torch.tensor(0.1)  # so small that some values saturate


def state(position=3, seed=11):
    return torch.tensor([seed, position << 32])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(*lead, D=48, C=40):
    """X, W, b and G; the rows of X and G differ in size, as those of tokens do."""
    X, W, b, G = normal(*lead, D, seed=1), 0.3 * normal(C, D, seed=2), normal(C, seed=3), normal(*lead, C, seed=4)
    return X * normal(*lead, 1, seed=5).exp(), W, b, G * normal(*lead, 1, seed=6).exp()


def layer_of(recipe=None, D=48, C=40, bias=True):
    torch.manual_seed(0)
    made = Int4Linear.from_linear(nn.Linear(D, C, bias=bias), recipe or Int4Recipe())
    made.noise.reseed(5, 0)
    return made


def run(X, W, b, G, recipe, noise_state=None, steps=(STEP_X, STEP_W), autocast=False):
    leaves = [t.clone().requires_grad_() for t in (X, W, b)]
    steps = [t.clone().requires_grad_() for t in steps] if recipe.learned_step else [None, None]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = Int4LinearFunction.apply(
            *leaves, *steps, recipe, state() if noise_state is None else noise_state, STREAM
        )
    output.backward(G.to(output.dtype))
    names = ("grad_input", "grad_weight", "grad_bias", "grad_step_x", "grad_step_w")
    grads = {n: t.grad for n, t in zip(names, (*leaves, *steps), strict=True) if t is not None}
    return {"output": output.detach(), **grads}


# By hand, in float64 --------------------------------------------------------------------------------------------------


def sylvester(size):
    return (
        torch.ones(1, 1).double()
        if size == 1
        else torch.kron(torch.ones(2, 2).double(), sylvester(size // 2))
        * (torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.ones(size // 2, size // 2).double()))
    )


def transform(D, recipe):
    """The matrix from D inputs to what is quantized: D x D rounded up to a multiple of 32."""
    if not recipe.hadamard:
        return torch.eye(D).double()
    blocks = -(-D // 32)
    return torch.block_diag(*[sylvester(32) / math.sqrt(32)] * blocks)[:D]


def operand(x, step, recipe):
    """Transformed tensor, its quantized value, the step, and the mask of what lies inside the range."""
    t = x.double() @ transform(x.shape[-1], recipe)
    step = step.double() if recipe.learned_step else 2 * t.abs().mean() / math.sqrt(7)
    v = t / step
    return t, step * v.round().clamp(-8, 7), step, (v > -8) & (v < 7)


def water_filling(score, expected):
    """min(1, rate * score) by sorting: the largest rate * score that are above 1 give their rest to the others."""
    p = torch.zeros_like(score)
    order = score.argsort(descending=True)
    for place, i in enumerate(order):
        rest = score[order[place:]].sum()
        if score[i] == 0 or (expected - place) * score[i] < rest:
            p[order[place:]] = score[order[place:]] * (expected - place) / max(rest, 1e-30)
            break
        p[i] = 1.0
    return (p * 2**16).ceil() / 2**16


def by_hand(X, W, b, G, recipe, noise_state, steps=(STEP_X, STEP_W), exact_gradient=False):
    x, g = X.reshape(-1, X.shape[-1]), G.reshape(-1, G.shape[-1]).double()
    (x_t, x_q, s_x, x_in), (w_t, w_q, s_w, w_in) = (operand(t, s, recipe) for t, s in zip((x, W), steps, strict=True))
    stack, rows = g, [torch.eye(len(g)).double()] * 2  # the gradient to be summed, and which of its rows, how often
    if not exact_gradient:
        unit = g.abs().max() / 98
        high = (g / unit / 14).round().clamp(-6, 6)
        rest = g / unit - 14 * high
        low = rest.floor() + (rest - rest.floor() > 1 - uniform(G.reshape(g.shape).shape, Noise(noise_state, STREAM)))
        stack = torch.cat([14 * high, low]) * unit
        rows = [torch.eye(len(g)).double().repeat(1, 2)] * 2
        if recipe.sampling:
            for i, x_norm in enumerate((torch.ones(len(g)), x_q.norm(dim=1))):
                p = water_filling(stack.norm(dim=1) * x_norm.double().repeat(2), len(g))
                kept = uniform(p.shape, Noise(noise_state, STREAM + 1 + i)) < p
                rows[i] = rows[i] * torch.where(kept, 1 / p, 0.0)
    d_xq, d_wq = rows[0] @ stack @ w_q, (rows[1] @ stack).t() @ x_q
    return {
        "output": (x_q @ w_q.t() + b.double()).view(*X.shape[:-1], -1),
        "grad_input": (d_xq * x_in @ transform(X.shape[-1], recipe).t()).view(X.shape),
        "grad_weight": d_wq * w_in @ transform(X.shape[-1], recipe).t(),
        "grad_bias": g.sum(0),
        "grad_step_x": (d_xq * (x_q - x_t * x_in) / s_x).sum() / math.sqrt(7 * x_t.numel()),
        "grad_step_w": (d_wq * (w_q - w_t * w_in) / s_w).sum() / math.sqrt(7 * w_t.numel()),
    }


def assert_close(actual, expected, tolerance=1e-4):
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        error = (value.double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("lead", [(33,), (3, 17), (2, 5, 7), (1,), ()], ids=str)
def test_every_set_of_switches_gives_what_is_written_out_by_hand(recipe, lead):
    data = tensors(*lead)
    assert_close(run(*data, recipe), by_hand(*data, recipe, state()))


@pytest.mark.parametrize(("D", "C"), [(64, 32), (7, 33), (33, 5), (1, 1)])
def test_any_number_of_inputs_and_outputs(D, C):
    data = tensors(3, 17, D=D, C=C)
    assert_close(run(*data, Int4Recipe()), by_hand(*data, Int4Recipe(), state()))


def test_the_comparison_with_the_formulas_notices_each_switch():
    data = tensors(3, 17)
    for one, other in itertools.combinations(RECIPES, 2):
        with pytest.raises(AssertionError):
            assert_close(run(*data, one), by_hand(*data, other, state()))


# Parts ----------------------------------------------------------------------------------------------------------------


def test_hadamard_is_orthonormal_its_own_inverse_and_in_blocks_of_32():
    H = hadamard(torch.eye(64))
    assert torch.allclose(H @ H.t(), torch.eye(64), atol=1e-6)
    assert torch.equal(H, H.t())
    assert torch.equal(H != 0, torch.block_diag(torch.ones(32, 32), torch.ones(32, 32)) != 0)
    assert torch.allclose(H.abs()[:32, :32], torch.tensor(32**-0.5))
    X = normal(5, 3, 64)
    assert torch.allclose(hadamard(hadamard(X)), X, atol=1e-5)
    assert hadamard(X.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("D", [64, 48, 33, 1])
def test_hadamard_leaves_the_product_unchanged(D):
    X, W = normal(9, D, seed=1), normal(8, D, seed=2)
    assert torch.allclose(hadamard(X) @ hadamard(W).t(), X @ W.t(), atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = hadamard(X)
    assert torch.equal(under_autocast, hadamard(X))  # float32 there too


def test_hadamard_spreads_an_outlier_over_its_block():
    x = torch.zeros(64)
    x[40] = 32.0
    assert torch.allclose(hadamard(x)[32:].abs(), torch.tensor(32**0.5)) and not hadamard(x)[:32].any()


def test_levels_of_the_quantizer():
    v = torch.tensor([-100.0, -8.6, -8.0, -7.5, -0.5, -0.4, 0.0, 0.5, 1.5, 2.5, 6.51, 7.0, 7.4, 100.0])
    levels = torch.tensor([-8.0, -8.0, -8.0, -8.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 7.0, 7.0, 7.0, 7.0])
    assert torch.equal(int4.quantize(v), levels)
    assert int4.quantize(100 * normal(1000)).unique().tolist() == list(range(-8, 8))
    assert int4.quantize(torch.tensor([math.nan, math.inf, -math.inf])).isnan().all()


def test_the_split_reconstructs_the_gradient_within_its_bound():
    G = normal(400, 50)
    high, low, unit = split_gradient(G, Noise(state()))
    G0 = G / G.abs().max() * 98
    assert unit.item() == pytest.approx(G.abs().max().item() / 98)
    assert ((14 * high + low - G0).abs() < 1.0001).all()
    assert set(high.unique().tolist()) <= set(range(-6, 7)) and torch.equal(low, low.round())
    assert low[G0.abs() <= 91].abs().max() <= 7
    ends = torch.tensor([[98.0, -98.0, 92.0, 14.0, 7.0, 21.0, 0.0]])  # ties of high to even; exact: nothing is random
    high, low, _ = split_gradient(ends, Noise(state()))
    assert high.tolist() == [[6, -6, 6, 1, 0, 2, 0]] and low.tolist() == [[14, -14, 8, 0, 7, -7, 0]]


def test_the_low_part_is_rounded_at_random_without_bias():
    G = torch.tensor([[98.0, 3.25, -0.5, 24.9]]).repeat(20000, 1)
    _, low, _ = split_gradient(G, Noise(state()))
    expected, chance = torch.tensor([14.0, 3.25, -0.5, -3.1]), torch.tensor([0.0, 0.25, 0.5, 0.9])
    assert ((low.mean(0) - expected).abs() <= 4 * (chance * (1 - chance) / 20000).sqrt() + 1e-6).all()
    assert [len(column.unique()) for column in low.t()] == [1, 2, 2, 2]


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_probabilities_are_in_proportion_up_to_1_and_sum_to_the_expected_rows(spread):
    score = (spread * normal(512)).exp()
    p = keep_probability(score, 256)
    assert torch.allclose(p.double(), water_filling(score.double(), 256), atol=2.0**-15)
    assert p.sum().item() == pytest.approx(256, abs=0.05)
    assert p.max() <= 1 and p.min() > 0 and torch.equal(p * 2**16, (p * 2**16).round())


def test_probabilities_where_scores_are_zero_or_fewer_than_the_rows():
    assert keep_probability(torch.zeros(8), 4).tolist() == [0.0] * 8
    assert keep_probability(torch.tensor([5.0, 0, 0, 0]), 2).tolist() == [1, 0, 0, 0]
    assert keep_probability(torch.tensor([3.0, 3, 0, 0]), 2).tolist() == [1, 1, 0, 0]
    assert keep_probability(torch.tensor([1e4, 2e-3, 1e-3, 0]), 2).tolist() == pytest.approx(
        [1, 2 / 3, 1 / 3, 0], abs=1e-4
    )
    # Nothing is left for the last two in float32, and they keep a chance.
    assert keep_probability(torch.tensor([1.0, 1.0, 1e-9, 1e-9]), 2).tolist() == [1, 1, 2**-16, 2**-16]
    assert keep_probability(torch.tensor([1.0, math.nan]), 1).isnan().all()


def test_as_many_rows_are_kept_as_expected():
    high, low, _ = split_gradient(tensors(512, C=16)[3], Noise(state()))
    norms = torch.cat([14 * high.norm(dim=1), low.norm(dim=1)])
    p = keep_probability(norms, 512)
    assert (norms > 0).sum() > 600  # more than are kept
    kept = []
    for position in range(40):
        noise = Noise(state(position))
        rows = int4.sample_rows(high, low, 1.0, noise)
        weight = torch.where(uniform(p.shape, noise) < p, 1 / p, 0.0).view(2, -1, 1)
        assert torch.allclose(rows, 14 * high * weight[0] + low * weight[1])
        kept.append((weight > 0).sum().double())
    assert abs(torch.stack(kept).mean() - 512) < 4 * (p * (1 - p)).sum().sqrt() / math.sqrt(40)


# Expectation ----------------------------------------------------------------------------------------------------------


@functools.cache
def mean_and_error(recipe, repeats=400):
    """Mean of the gradients over positions of the noise and its standard error, and what they must be."""
    data = tensors(24, D=32, C=16)
    draws = [run(*data, recipe, state(position)) for position in range(repeats)]
    expected = by_hand(*data, recipe, state(), exact_gradient=True)
    names = [name for name in draws[0] if name not in ("output", "grad_bias")]
    all_draws = {name: torch.stack([d[name].double() for d in draws]) for name in names}
    return {n: (d.mean(0), d.std(0) / math.sqrt(repeats), expected[n]) for n, d in all_draws.items()}


def mean_square_z(figures, name, errors=None):
    mean, error, expected = figures[name]
    error = error if errors is None else errors[name][1]
    random = error > 1e-7 * expected.abs().max()  # elements outside the range are 0 always
    assert torch.allclose(mean[~random], expected[~random])
    return ((mean - expected) / error)[random].square().mean().item()


@pytest.mark.parametrize("recipe", [Int4Recipe(), Int4Recipe(sampling=False)], ids=str)
def test_gradients_are_unbiased(recipe):
    """About 1 without bias; the elements share draws of rows, so it scatters more than a chi-square would."""
    figures = mean_and_error(recipe)
    for name in ("grad_input", "grad_weight"):
        mean, error, expected = figures[name]
        assert 0.7 < mean_square_z(figures, name) < 1.4
        assert ((mean - expected).abs() < 5.5 * error + 1e-5).all()
    for name in ("grad_step_x", "grad_step_w"):
        assert mean_square_z(figures, name) < 4**2


def test_sampling_costs_variance():
    sampled, all_rows = (mean_and_error(Int4Recipe(sampling=switch)) for switch in (True, False))
    for name in ("grad_input", "grad_weight"):
        assert sampled[name][1].square().mean() > 2 * all_rows[name][1].square().mean()


def _sampled_with(weight_of):
    def sample_rows(high, low, x_norm, noise):
        norms = torch.stack([14 * high.norm(dim=1), low.norm(dim=1)])
        p = keep_probability((norms * x_norm).flatten(), len(high))
        weight = weight_of(uniform(p.shape, noise) < p, p).view(2, -1, 1)
        return 14 * high * weight[0] + low * weight[1]

    return sample_rows


def _clamped_split(G_NC, noise):
    high, low, unit = split_gradient(G_NC, noise)
    return high, low.clamp(-8, 7), unit


MISTAKES = {
    "not divided by p": ("sample_rows", _sampled_with(lambda kept, p: kept.float())),
    "divided by the mean p": ("sample_rows", _sampled_with(lambda kept, p: kept.float() / p.mean())),
    "nearest low part": ("uniform", lambda shape, noise: torch.full(shape, 0.5)),
    "low part clamped to 4 bits": ("split_gradient", _clamped_split),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_biases_the_gradients(monkeypatch, mistake):
    """The controls of the tests above: a quarter of their draws, in their standard errors, so 4 without bias."""
    recipe = Int4Recipe(sampling=MISTAKES[mistake][0] == "sample_rows")
    errors = mean_and_error(recipe)
    monkeypatch.setattr(int4, *MISTAKES[mistake])
    figures = mean_and_error.__wrapped__(recipe, repeats=100)
    for name in ("grad_input", "grad_weight"):
        assert mean_square_z(figures, name, errors) > 20


# The learned step -----------------------------------------------------------------------------------------------------


def exact_case():
    """X, W and a G of integers up to 98, whose split is exact whatever the noise."""
    g = torch.Generator().manual_seed(0)
    G = torch.randint(-98, 99, (20, 8), generator=g).float()
    G[0, 0] = 98
    return normal(20, 16, seed=1), 0.3 * normal(8, 16, seed=2), torch.zeros(8), G


def straight_through(x, step):
    """LSQ for autograd: clamp, then a rounding whose gradient is 1."""
    v = (x / step).clamp(-8, 7)
    return (v + (v.round() - v).detach()) * step


@pytest.mark.parametrize("hadamard_on", [False, True])
def test_gradients_equal_autograd_s_through_straight_through_rounding(hadamard_on):
    X, W, b, G = exact_case()
    recipe = Int4Recipe(hadamard=hadamard_on, sampling=False)
    actual = run(X, W, b, G, recipe)
    x, w, s_x, s_w = (t.double().requires_grad_() for t in (X, W, STEP_X, STEP_W))
    H = transform(16, recipe)
    output = straight_through(x @ H, s_x) @ straight_through(w @ H, s_w).t()
    output.backward(G.double())
    assert torch.allclose(actual["output"].double(), output, atol=1e-5)
    assert torch.allclose(actual["grad_input"].double(), x.grad, rtol=1e-5, atol=1e-3)
    assert torch.allclose(actual["grad_weight"].double(), w.grad, rtol=1e-5, atol=1e-3)
    for name, step, numel in (("grad_step_x", s_x, 20 * len(H[0])), ("grad_step_w", s_w, 8 * len(H[0]))):
        assert actual[name].item() == pytest.approx(step.grad.item() / math.sqrt(7 * numel), rel=1e-4)


def test_the_step_s_gradient_against_finite_differences_of_the_loss():
    """Between two jumps the loss is linear in s with slope sum of dL/dq q / s; LSQ takes dL/dq v / s off inside."""
    X, W, b, G = exact_case()
    recipe = Int4Recipe(hadamard=False, sampling=False)
    actual = run(X, W, b, G, recipe)
    x, w, g, s_x, s_w = (t.double() for t in (X, W, G, STEP_X, STEP_W))

    def quantized(t, s):
        return s * (t / s).round().clamp(-8, 7)

    eps = 1e-8  # no value lies so close to a threshold that it jumps
    for name, t, s, other in (
        ("grad_step_x", x, s_x, g @ quantized(w, s_w)),
        ("grad_step_w", w, s_w, g.t() @ quantized(x, s_x)),
    ):
        assert torch.equal((t / (s - eps)).round(), (t / (s + eps)).round())
        slope = ((quantized(t, s + eps) - quantized(t, s - eps)) * other).sum() / (2 * eps)
        inside = (t / s > -8) & (t / s < 7)
        assert 0 < inside.double().mean() < 1
        expected = (slope - (other * t / s)[inside].sum()) / math.sqrt(7 * t.numel())
        assert actual[name].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_gradient_is_masked_outside_the_range():
    X, W, b, G = exact_case()
    actual = run(X, W, b, G, Int4Recipe(hadamard=False, sampling=False))
    for name, t, step in (("grad_input", X, STEP_X), ("grad_weight", W, STEP_W)):
        inside = (t / step > -8) & (t / step < 7)
        assert 0 < inside.sum() < inside.numel()
        assert torch.equal(actual[name] != 0, inside)


def test_initial_steps():
    made = layer_of()
    assert made.step_w.item() == pytest.approx(2 * hadamard(made.weight).abs().mean().item() / math.sqrt(7), rel=1e-5)
    assert made.step_w.dtype == made.step_x.dtype == torch.float32 and made.step_w.shape == made.step_x.shape == ()
    plain = layer_of(Int4Recipe(hadamard=False))
    assert plain.step_w.item() == pytest.approx(2 * plain.weight.abs().mean().item() / math.sqrt(7), rel=1e-5)
    assert not hasattr(layer_of(PLAIN), "step_x_known") and list(layer_of(PLAIN).state_dict()) == ["weight", "bias"]


def test_step_x_starts_from_the_first_training_batch_once():
    made, X = layer_of(), 3 * normal(5, 9, 48)
    made.eval()
    before = made(X)
    assert made.step_x.item() == 1 and not made.step_x_known
    made.train()
    made(torch.zeros(5, 48))
    made(torch.zeros(0, 48))
    assert not made.step_x_known  # there was no data to start from
    output = made(X)
    first = made.step_x.item()
    assert first == pytest.approx(2 * hadamard(X).abs().mean().item() / math.sqrt(7), rel=1e-5)
    assert made.step_x_known and torch.equal(output, before)
    made(10 * X)
    made.eval()(10 * X)
    assert made.step_x.item() == first
    assert not torch.equal(made(10 * X), 10 * (made(X) - made.bias) + made.bias)  # with the step as it was


def test_step_x_starts_from_the_finite_values():
    made, X = layer_of(Int4Recipe(hadamard=False)), normal(20, 48)
    X[3, 5], X[7, 7] = math.nan, -math.inf
    output = made(X)
    finite = torch.where(torch.isfinite(X), X, 0.0)
    assert made.step_x.item() == pytest.approx(2 * finite.abs().mean().item() / math.sqrt(7), rel=1e-5)
    assert output.isnan().any(1).nonzero().flatten().tolist() == [3, 7]


def test_a_state_dict_brings_the_steps_and_that_they_are_known():
    made, X = layer_of(), normal(9, 48)
    fresh = copy.deepcopy(made.state_dict())
    made(X)
    assert list(made.state_dict()) == ["weight", "bias", "step_x", "step_w", "step_x_known"]
    other = layer_of()
    other.load_state_dict(made.state_dict())
    other(100 * X)
    assert torch.equal(other.step_x, made.step_x)
    assert torch.equal(other(X), made(X))
    other.load_state_dict(fresh)  # of a layer that has seen no data: to be started again
    other(100 * X)
    assert other.step_x.item() == pytest.approx(100 * made.step_x.item(), rel=1e-5)


@pytest.mark.parametrize("hadamard", [True, False])
def test_weights_without_steps_start_the_steps_anew(hadamard):
    """As --finetune loads them from a checkpoint in full precision."""
    made, X, recipe = layer_of(Int4Recipe(hadamard=hadamard)), normal(9, 48), Int4Recipe(hadamard=hadamard)
    made(X)
    old = made.step_w.item()
    weights = {"weight": 5 * normal(40, 48, seed=9), "bias": torch.zeros(40)}
    made.load_state_dict(weights, strict=False)
    linear = nn.Linear(48, 40)
    linear.load_state_dict(weights)
    fresh = Int4Linear.from_linear(linear, recipe)
    assert torch.equal(made.step_w, fresh.step_w) and made.step_w.item() > 10 * old
    assert not made.step_x_known and made.step_x.item() == 1
    made(100 * X), fresh(100 * X)
    assert torch.equal(made.step_x, fresh.step_x) and made.step_x_known
    made.load_state_dict({"bias": torch.ones(40)}, strict=False)  # the controls: what brings no weight changes no step
    assert torch.equal(made.step_w, fresh.step_w) and made.step_x_known
    made.load_state_dict({**weights, "step_w": torch.tensor(0.5)}, strict=False)
    assert made.step_w.item() == 0.5
    layer_of(PLAIN).load_state_dict(weights)  # nor is there one to change


def test_a_moving_average_made_before_the_first_step_uses_its_own_step_x():
    made, X = layer_of(), normal(9, 48)
    average = ModelEmaV3(made, decay=0.5)
    made(X)
    average.update(made)
    layer = average.module
    assert 0 < layer.step_x.item() < 1 and layer.step_x.item() != made.step_x.item()
    output = layer(100 * X)
    assert torch.equal(
        output,
        run(
            100 * X,
            *(p.detach() for p in (layer.weight, layer.bias)),
            output,
            layer.recipe,
            None,
            (layer.step_x.detach(), layer.step_w.detach()),
        )["output"],
    )


def test_step_x_is_the_same_on_all_processes(monkeypatch):
    """The other process has 3 values of magnitude 4 in all; `all_reduce` adds what it has."""
    made = layer_of(Int4Recipe(hadamard=False), D=2, C=2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda sums: sums.add_(torch.tensor([12.0, 3.0])))
    made(torch.tensor([[1.0, -2.0]]))
    assert made.step_x.item() == pytest.approx(2 * (15 / 5) / math.sqrt(7))
    monkeypatch.setattr(dist, "all_reduce", None)  # no further call
    made(torch.ones(3, 2))


def test_without_learned_steps_they_follow_the_tensors():
    made, X = layer_of(Int4Recipe(learned_step=False), bias=False), normal(9, 48)
    output = made(X)
    assert torch.allclose(made(8 * X), 8 * output)
    with torch.no_grad():
        made.weight *= 4
    assert torch.allclose(made(X), 4 * output)


def test_a_step_at_or_below_zero_keeps_a_gradient():
    X, W, b, G = exact_case()
    for step in (0.0, -1.0):
        results = run(X, W, b, G, Int4Recipe(), steps=(torch.tensor(step), STEP_W))
        assert all(t.isfinite().all() for t in results.values()) and results["grad_step_x"] != 0


# The layer ------------------------------------------------------------------------------------------------------------


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
        one.noise.seek(7)
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


# The recipe -----------------------------------------------------------------------------------------------------------


def test_the_recipe_as_text():
    assert str(Int4Recipe()) == "int4 hadamard sampling learned_step" and str(PLAIN) == "int4"
    assert Int4Recipe(sampling=False).table() == {
        "scheme": "int4",
        "hadamard": "True",
        "sampling": "False",
        "learned_step": "True",
    }
    assert all(recipe.active for recipe in RECIPES) and len({str(recipe) for recipe in RECIPES}) == 8


@pytest.mark.parametrize("name", ["hadamard", "sampling", "learned_step"])
def test_a_switch_is_true_or_false(name):
    with pytest.raises(ValueError, match=f"{name} must be true or false; got 'no'"):
        Int4Recipe(**{name: "no"})


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_no_value_decides_what_is_computed(recipe):
    """Tensors without values go through forward and backward, so that on a GPU nothing waits for them."""
    int4._signs.cache_clear()
    try:
        with FakeTensorMode():
            results = run(
                *(torch.randn(s) for s in ((3, 17, 48), (40, 48), (40,), (3, 17, 40))),
                recipe,
                torch.ones(2).long(),
                [torch.ones(())] * 2,
            )
            assert results["grad_weight"].shape == (40, 48)
            with pytest.raises(DataDependentOutputException):  # the control
                layer_of()._start_step_x(torch.randn(3, 48))
    finally:
        int4._signs.cache_clear()


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


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_gpu_and_cpu_agree(recipe):
    """Not in every bit: sums differ in order. The draws are the same, but for ties of theirs."""
    data = tensors(3, 17)
    on_cpu = run(*data, recipe)
    on_gpu = run(*(t.cuda() for t in data), recipe, state().cuda(), [s.cuda() for s in (STEP_X, STEP_W)])
    assert_close({n: t.cpu() for n, t in on_gpu.items()}, {n: t.double() for n, t in on_cpu.items()}, tolerance=1e-3)
