"""Hadamard rotations alone, and in the products of a layer."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import scipy.linalg
import torch
from timm.utils import ModelEmaV3
from torch import nn

from config import UserError
from quantization import PRESETS, LinearRecipe, QuantizerSpec, QuantLinear, fake_quantize
from quantization.noise import STREAMS_PER_LAYER, Noise
from quantization.rotation import FIXED, SIGNS, SIZES, Rotation, Turn, hadamard, rotate, rotate_back, signs_of
from record.weights import restore_model

NOISE = Noise(torch.tensor([(3 << 32) | 77, 5 << 32]), 8 * 4)
CPU = torch.device("cpu")
TE_SIGNS = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
NVFP4 = QuantizerSpec(block_size=16, scale_format="e4m3", outer="pow2")


def matrix(turn: Turn, noise: Noise | None = NOISE) -> torch.Tensor:
    """T in float64, by scipy."""
    h = torch.from_numpy(scipy.linalg.hadamard(turn.size)).double() * turn.size**-0.5
    signs = signs_of(turn, noise, CPU)
    return h if signs is None else signs.double()[:, None] * h


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_the_product_with_scipy_s_matrix(size, signs):
    x = torch.randn(2 * size, 3 * size, generator=torch.Generator().manual_seed(size))
    turn = Turn(size, signs, 2)
    t = matrix(turn)
    torch.testing.assert_close(t @ t.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-7)
    expected = (x.double().unflatten(1, (-1, size)) @ t).flatten(1)
    torch.testing.assert_close(rotate(x, -1, turn, NOISE).double(), expected, rtol=0, atol=1e-5)
    expected = (x.double().t().unflatten(1, (-1, size)) @ t).flatten(1).t()
    torch.testing.assert_close(rotate(x, 0, turn, NOISE).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate_back(rotate(x, -1, turn, NOISE), turn, NOISE), x, rtol=0, atol=1e-5)


def test_the_sums_are_butterflies_of_growing_distance():
    """In this order of roundings and no other: large numbers that cancel show it."""
    x = torch.tensor([[2.0**24, 1.0, -(2.0**24), 1.0]])
    a, b, c, d = x[0]
    expected = torch.stack([(a + b) + (c + d), (a - b) + (c - d), (a + b) - (c + d), (a - b) - (c - d)]) * 0.5
    assert torch.equal(rotate(x, -1, Turn(4, "none", 0))[0], expected)
    other = torch.stack([(a + c) + (b + d), (a + c) - (b + d), (a - c) + (b - d), (a - c) - (b - d)]) * 0.5
    assert not torch.equal(expected, other)  # the control


def test_a_constant_group_becomes_one_number_and_the_int4_rotation_is_the_same_matrix():
    x = torch.ones(1, 16)
    assert rotate(x, -1, Turn(16, "none", 0)).tolist() == [[4.0] + [0.0] * 15]
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rotate(x, -1, Turn(32, "none", 0)), hadamard(x), rtol=1e-5, atol=1e-6)


def test_fixed_signs_are_te_s_and_the_same_wherever():
    assert signs_of(Turn(16, "fixed", 0), None, CPU).tolist() == TE_SIGNS
    long = signs_of(Turn(128, "fixed", 1), NOISE, CPU)
    assert long[:16].tolist() == TE_SIGNS and len(FIXED) == 4
    assert abs(float(long.sum())) < 40  # neither all the same


def test_fresh_signs_are_of_seed_position_layer_and_product_and_not_of_the_rank():
    def signs(seed=77, rank=3, position=5, layer=4, product=2) -> tuple[float, ...]:
        noise = Noise(torch.tensor([(rank << 32) | seed, position << 32]), STREAMS_PER_LAYER * layer)
        return tuple(signs_of(Turn(64, "fresh", product), noise, CPU).tolist())

    assert signs() == signs(rank=0) == signs(rank=2**31 - 1)
    others = {signs(seed=78), signs(position=6), signs(layer=5), signs(product=1), signs()}
    assert len(others) == 5
    assert all(set(s) == {1.0, -1.0} for s in others)


@pytest.mark.parametrize(
    ("size", "length", "expected"),
    [
        (128, 192, 64),
        (128, 384, 128),
        (32, 96, 32),
        (128, 96, 32),
        (64, 25216, 64),
        (128, 49, None),
        (16, 16, 16),
        (8, 0, None),
    ],
)
def test_groups_are_the_largest_power_of_two_that_divides(size, length, expected):
    turn = Rotation(size).turn(length, 1)
    assert (turn and turn.size) == expected
    assert turn is None or Turn.parse(turn.text) == turn


@pytest.mark.parametrize("value", [0, 3, 256, True, "16"])
def test_other_sizes_are_refused(value):
    with pytest.raises(ValueError, match="size of a rotation must be one of"):
        Rotation(value)
    with pytest.raises(ValueError, match="signs of a rotation must be one of"):
        Rotation(16, "some")


# ---------------------------------------------------------------------------------------------------------------------
# In a layer
# ---------------------------------------------------------------------------------------------------------------------


def layer_of(recipe: LinearRecipe, d: int = 96, c: int = 48) -> tuple[QuantLinear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(d, c)
    layer = QuantLinear.from_linear(nn.Linear(d, c), recipe)
    layer.load_state_dict(plain.state_dict(), strict=False)
    return layer, plain


def results(layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]


ROTATIONS = [
    {"rotate_output": Rotation(32, "fixed")},
    {"rotate_grad_input": Rotation(16)},
    {"rotate_grad_weight": Rotation(16, "fresh")},
    {f"rotate_{p}": Rotation(64, "fresh") for p in ("output", "grad_input", "grad_weight")},
]


@pytest.mark.parametrize("operands", ["requantized", "original"])
@pytest.mark.parametrize("rotations", ROTATIONS, ids=lambda r: "+".join(r))
def test_rotated_products_without_quantizers_are_nn_linear_s_to_a_rounding(rotations, operands):
    layer, plain = layer_of(LinearRecipe(**rotations, backward_operands=operands))
    g = torch.Generator().manual_seed(2)
    x, grad = torch.randn(2, 40, 96, generator=g), torch.randn(2, 40, 48, generator=g)
    for ours, theirs in zip(results(layer, x, grad), results(plain, x, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    off, plain = layer_of(LinearRecipe(backward_operands=operands))
    assert all(map(torch.equal, results(off, x, grad), results(plain, x, grad)))


def by_hand(recipe: LinearRecipe, x, w, b, g, noise: Noise) -> list[torch.Tensor]:
    """The layer in matrices: float64 products of what is rotated by T and quantized."""

    def turned(y, product, number, axis):
        rotation = recipe.rotation(product)
        turn = None if rotation is None else rotation.turn(y.shape[axis], number)
        return (y if turn is None else rotate(y, axis, turn, noise)), turn

    def q(name, y):
        spec, stream = getattr(recipe, name), int(name[1]) - 1
        return y if spec is None else fake_quantize(y, spec, seed=Noise(noise.state, noise.stream + stream))

    x_turned, turn = turned(x, "output", 0, -1)
    x1, w2 = q("q1", x_turned), q("q2", turned(w, "output", 0, -1)[0])
    x_source = x1 if recipe.chained_activation else x
    w_source = w2 if recipe.chained_weight else w
    g3, w4 = q("q3", turned(g, "grad_input", 1, -1)[0]), q("q4", turned(w_source, "grad_input", 1, 0)[0])
    g5, x6 = q("q5", turned(g, "grad_weight", 2, 0)[0]), q("q6", turned(x_source, "grad_weight", 2, 0)[0])
    grad_x, grad_w = g3.double() @ w4.double(), g5.double().t() @ x6.double()
    back = [
        rotate_back(grad.float(), turn, noise) if turn is not None and chained else grad
        for grad, chained in ((grad_x, recipe.chained_weight), (grad_w, recipe.chained_activation))
    ]
    return [x1.double() @ w2.double().t() + b, *back, g.sum(0)]


HARD = [
    dataclasses.replace(PRESETS["tetrajet"], **ROTATIONS[3]),
    dataclasses.replace(PRESETS["microscaling"], **ROTATIONS[3]),
    LinearRecipe(
        q1=NVFP4,
        q2=dataclasses.replace(NVFP4, block_rows=16),
        q3=dataclasses.replace(NVFP4, rounding="stochastic"),
        q4=dataclasses.replace(NVFP4, block_rows=16),
        q5=dataclasses.replace(NVFP4, rounding="stochastic"),
        q6=NVFP4,
        backward_operands="original",
        rotate_grad_weight=Rotation(16, "fixed"),
    ),
    LinearRecipe(
        q3=QuantizerSpec(scale_rule="three_quarter", rounding="stochastic"),
        q4=QuantizerSpec(scale_rule="three_quarter", rounding="stochastic"),
        q5=QuantizerSpec(correction=1.25),
        weight_operand="original",
        rotate_grad_input=Rotation(8, "fresh"),
    ),
    dataclasses.replace(PRESETS["tetrajet"], q1=None, rotate_output=Rotation(16), rotate_grad_weight=Rotation(8)),
    dataclasses.replace(PRESETS["tetrajet"], q6=None, activation_operand="original", rotate_grad_weight=Rotation(8)),
]


@pytest.mark.parametrize("number", range(len(HARD)))
def test_a_layer_is_its_products_written_out(number):
    recipe = HARD[number]
    layer, plain = layer_of(recipe)
    g = torch.Generator().manual_seed(3)
    x, grad = torch.randn(80, 96, generator=g), torch.randn(80, 48, generator=g)
    ours = results(layer, x, grad)
    noise = Noise(layer.noise.state, 0)
    expected = by_hand(recipe, x, plain.weight.detach(), plain.bias.detach(), grad, noise)
    for name, a, b in zip(("output", "grad_input", "grad_weight", "grad_bias"), ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")
    # The control: without its rotations and rules it is another layer.
    wrong = by_hand(PRESETS["microscaling"], x, plain.weight.detach(), plain.bias.detach(), grad, noise)
    assert any((a.double() - b.double()).abs().max() > 1e-2 for a, b in zip(ours, wrong, strict=True))


def test_a_mask_stops_the_gradient_of_what_is_beyond_the_largest_magnitude():
    spec = QuantizerSpec(scale_rule="floor", gradient="mask")
    layer, _ = layer_of(LinearRecipe(q1=spec, q2=dataclasses.replace(spec, gradient="ste")))
    x = torch.ones(4, 96)
    x[:, 5] = 7.0  # floor's scale is 1: beyond 6
    ours = results(layer, x, torch.ones(4, 48))
    assert (ours[1][:, 5] == 0).all() and (ours[1][:, :5] != 0).all()
    ste, _ = layer_of(LinearRecipe(q1=QuantizerSpec(scale_rule="floor")))
    assert (results(ste, x, torch.ones(4, 48))[1][:, 5] != 0).all()  # the control


def test_a_mask_under_a_rotation_needs_requantized_operands():
    spec = QuantizerSpec(scale_rule="rms_floor", gradient="mask")
    LinearRecipe(q1=spec, q2=spec, rotate_output=Rotation(32))
    with pytest.raises(ValueError, match="needs requantized backward operands"):
        LinearRecipe(q1=spec, rotate_output=Rotation(32), backward_operands="original")
    with pytest.raises(ValueError, match="gradient mask is for q1 and q2"):
        LinearRecipe(q3=spec)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_any_number_of_tokens_trains(tokens):
    for recipe in HARD:
        layer, _ = layer_of(recipe)
        for result in results(layer, torch.ones(tokens, 96), torch.ones(tokens, 48)):
            assert result.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Outer scales of other steps; sums over micro-batches
# ---------------------------------------------------------------------------------------------------------------------


def test_a_delayed_outer_scale_is_that_of_the_latest_position_that_the_delay_divides():
    spec = dataclasses.replace(NVFP4, outer_delay=4)
    layer, _ = layer_of(LinearRecipe(q1=spec, q5=spec))
    assert layer.held.shape == (3, 2) and "held" in layer.state_dict()
    numbers = layer.held.view(torch.float32)
    seen = []
    for step in range(9):
        layer.noise.seek(step)
        x = torch.full((32, 96), 1.0 + step).requires_grad_()
        layer(x).sum().backward()
        seen.append(float(numbers[0, 0]))
        assert float(numbers[2, 1]) == 1.0 and float(numbers[1].sum()) == 0.0
    assert seen == [1.0] * 4 + [5.0] * 4 + [9.0]
    layer.eval()
    x = torch.full((32, 96), 100.0)
    found = []
    for position in (11, 12):
        layer.noise.seek(position)
        found.append(layer(x))
    assert float(numbers[0, 0]) == 9.0  # evaluation renews nothing
    assert torch.equal(*found)  # nor does it look at X


def test_what_delayed_outer_scales_hang_from_is_neither_cast_nor_averaged():
    spec = dataclasses.replace(NVFP4, outer_delay=4)
    layer, _ = layer_of(LinearRecipe(q1=spec, q2=spec))
    x = 1.2345678 * torch.ones(32, 96)
    average = ModelEmaV3(layer, decay=0.9)
    layer(x)
    average.update(layer)
    assert torch.equal(average.module.held, layer.held) and layer.held[:2, 0].all()
    assert not torch.equal(average.module.held, torch.zeros_like(layer.held))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = copy.deepcopy(layer).to(dtype)
        assert torch.equal(cast.held, layer.held) and cast.weight.dtype == dtype
        assert float(cast.held.view(torch.float32)[0, 0]) == float(x[0, 0])


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (torch.full((3, 2), 1.5), "float32"),
        (torch.full((3, 2), 2), "int64"),
        (torch.full((3, 2), torch.nan).view(torch.int32), "no finite magnitude"),
        (torch.full((3, 2), torch.inf).view(torch.int32), "no finite magnitude"),
        (torch.full((3, 2), -1.5).view(torch.int32), "no finite magnitude"),
    ],
    ids=["numbers", "int64", "nan", "inf", "negative"],
)
def test_magnitudes_that_are_no_bits_are_refused(held, said, tmp_path):
    layer, _ = layer_of(LinearRecipe(q1=dataclasses.replace(NVFP4, outer_delay=4)))
    model = nn.Sequential(layer)
    weights = {**model.state_dict(), "0.held": held}
    with pytest.raises(UserError, match=f"0.held .*{said}"):
        restore_model(model, weights, tmp_path / "last.pth")
    assert not layer.held.any()
    with pytest.raises(RuntimeError, match=f"0.held .*{said}"):
        model.load_state_dict(weights)
    restore_model(model, {**weights, "0.held": torch.full((3, 2), 1.5).view(torch.int32)}, tmp_path / "last.pth")
    assert (layer.held.view(torch.float32) == 1.5).all()


def test_a_delayed_outer_scale_of_a_resumed_run_is_the_checkpoint_s():
    spec = dataclasses.replace(NVFP4, outer_delay=3)
    x = torch.randn(5, 32, 96, generator=torch.Generator().manual_seed(4)) * torch.logspace(0, 4, 5).view(5, 1, 1)

    def outputs(layer: QuantLinear, first: int) -> list[torch.Tensor]:
        found = []
        for step in range(first, 5):
            layer.noise.seek(step)
            found.append(layer(x[step]).detach())
        return found

    layer, _ = layer_of(LinearRecipe(q1=spec))
    whole = outputs(layer, 0)
    first, _ = layer_of(LinearRecipe(q1=spec))
    for step in range(2):
        first.noise.seek(step)
        first(x[step])
    resumed, _ = layer_of(LinearRecipe(q1=spec))
    resumed.load_state_dict(first.state_dict())
    assert all(map(torch.equal, outputs(resumed, 2), whole[2:]))
    fresh, _ = layer_of(LinearRecipe(q1=spec))  # the control: without the state it is another run
    assert not all(map(torch.equal, outputs(fresh, 2), whole[2:]))


def test_grad_weight_of_micro_batches_adds_up_where_no_outer_scale_moves():  # T11
    g = torch.Generator().manual_seed(5)
    x, grad = torch.randn(64, 96, generator=g), torch.randn(64, 48, generator=g)
    grad[32:] *= 37
    for outer, arithmetic, equal in (("none", "exact", True), ("fp32", "te", False)):
        spec = QuantizerSpec(block_size=16, scale_format="e4m3", outer=outer, arithmetic=arithmetic)
        layer, _ = layer_of(LinearRecipe(q5=spec, q6=spec))
        whole = results(layer, x, grad)[2].clone()
        layer.weight.grad = None
        for part in (slice(0, 32), slice(32, 64)):
            results(layer, x[part], grad[part])
        assert torch.allclose(whole, layer.weight.grad, rtol=1e-5, atol=1e-4) is equal


@pytest.mark.parametrize(("size", "signs"), list(itertools.product((16, 32), ("fixed", "fresh"))))
def test_the_error_of_a_rotated_normal_distribution_is_that_of_itself(size, signs):
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(6))
    turned = rotate(x, -1, Turn(size, signs, 0), NOISE)
    errors = [(fake_quantize(y, NVFP4) - y).square().mean() for y in (x, turned)]
    assert float(errors[0]) == pytest.approx(float(errors[1]), rel=0.01)
