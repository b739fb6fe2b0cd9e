"""INT4: gradients against formulas written out by hand, the parts, the expectation of the gradients, the recipe."""

import functools
import itertools
import math

import pytest
import torch
from int4_helpers import (
    PLAIN,
    RECIPES,
    STEP_W,
    STEP_X,
    assert_close,
    by_hand,
    layer_of,
    normal,
    run,
    state,
    tensors,
    water_filling,
)
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from quantization.backends import int4 as formulas
from quantization.backends.int4 import keep_probability
from quantization.layers import int4
from quantization.layers.int4 import split_gradient
from quantization.noise import Noise, uniform
from quantization.rotation import hadamard
from quantization.spec import Int4Recipe


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
    def sample_rows(high, low, x_norm, noise, dtype):
        norms = torch.stack([14 * high.norm(dim=1), low.norm(dim=1)])
        p = keep_probability((norms * x_norm).flatten(), len(high))
        weight = weight_of(uniform(p.shape, noise) < p, p).view(2, -1, 1)
        return (14 * high * weight[0] + low * weight[1]).to(dtype)

    return sample_rows


def _clamped_split(G_NC, noise):
    high, low, unit = split_gradient(G_NC, noise)
    return high, low.clamp(-8, 7), unit


MISTAKES = {
    "not divided by p": (int4, "sample_rows", _sampled_with(lambda kept, p: kept.float())),
    "divided by the mean p": (int4, "sample_rows", _sampled_with(lambda kept, p: kept.float() / p.mean())),
    "nearest low part": (formulas, "uniform", lambda shape, noise: torch.full(shape, 0.5)),
    "low part clamped to 4 bits": (int4, "split_gradient", _clamped_split),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_biases_the_gradients(monkeypatch, mistake):
    """The controls of the tests above: a quarter of their draws, in their standard errors, so 4 without bias."""
    recipe = Int4Recipe(sampling=MISTAKES[mistake][1] == "sample_rows")
    errors = mean_and_error(recipe)
    monkeypatch.setattr(*MISTAKES[mistake])
    figures = mean_and_error.__wrapped__(recipe, repeats=100)
    for name in ("grad_input", "grad_weight"):
        assert mean_square_z(figures, name, errors) > 20


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


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_gpu_and_cpu_agree(recipe):
    """Not in every bit: sums differ in order. The draws are the same, but for ties of theirs."""
    data = tensors(3, 17)
    on_cpu = run(*data, recipe)
    on_gpu = run(*(t.cuda() for t in data), recipe, state().cuda(), [s.cuda() for s in (STEP_X, STEP_W)])
    assert_close({n: t.cpu() for n, t in on_gpu.items()}, {n: t.double() for n, t in on_cpu.items()}, tolerance=1e-3)


@pytest.mark.gpu
def test_gpu_and_cpu_split_in_the_same_unit():
    """max|G| / 98 in every bit, which a product with the reciprocal misses at times: the control."""
    largest = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 1e-3
    units = [split_gradient(x.view(1, 1), Noise(state()))[2] for x in largest]
    on_gpu = [split_gradient(x.view(1, 1).cuda(), Noise(state().cuda()))[2].cpu() for x in largest]
    assert torch.equal(torch.stack(units), torch.stack(on_gpu))
    assert not torch.equal(torch.stack(units), largest * (torch.tensor(1.0) / 98))
