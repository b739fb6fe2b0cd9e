"""The statistics of Appendix A: by hand, against loops in float64, on planted weights, step by step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from quantization import QuantizerSpec, fake_quantize
from quantization.formats import FORMATS
from quantization.oscillation import (
    OSCILLATING,
    PathLengths,
    RateOfChange,
    latent_weight,
    oscillation_ratio,
    quantization_confidence,
    rate_of_change,
    signed_grid,
)


def walks(steps: int, *shape: int, seed: int = 0) -> Tensor:
    """Random walks (steps + 1, *shape) in float32."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(steps + 1, *shape, generator=draw).cumsum(0)


def loop(w_steps: Tensor, q_steps: Tensor) -> Tensor:
    """Appendix A.1 to the letter, number by number, in Python's own float64."""
    ratios = []
    for w, q in zip(*(x.reshape(len(x), -1).t().tolist() for x in (w_steps, q_steps)), strict=True):
        dist_w = sum(abs(w[t] - w[t - 1]) for t in range(1, len(w)))
        dist_q = sum(abs(q[t] - q[t - 1]) for t in range(1, len(q)))
        ratios.append(dist_q / dist_w if dist_w else math.inf if dist_q else 0.0)
    return torch.tensor(ratios, dtype=torch.float64).view(w_steps.shape[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Oscillation ratio (A.1)
# ---------------------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """Columns: one weight each. Rows: steps."""
    w = torch.tensor([[0.0, 1.0, 0.0, 2.0, 5.0], [1.0, 1.0, 0.25, 2.0, 4.0], [-1.0, 1.0, 0.0, 2.0, 3.5]])
    q = torch.tensor([[0.0, 0.0, 0.0, 2.0, 5.0], [1.0, 0.0, 4.0, 3.0, 5.0], [-2.0, 0.0, 0.0, 2.0, 5.0]])
    #  dist_W   1 + 2 = 3,  0,  .25 + .25 = .5,  0,        1 + .5
    #  dist_Q   1 + 3 = 4,  0,    4 + 4 = 8,     1 + 1,    0
    assert oscillation_ratio(w, q).tolist() == [float(torch.tensor(4.0) / 3), 0.0, 16.0, math.inf, 0.0]


@pytest.mark.parametrize("shape", [(), (7,), (5, 33), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("steps", [1, 30, 200])
def test_equals_a_loop_in_float64(steps: int, shape: tuple[int, ...]) -> None:
    w, q = walks(steps, *shape), walks(steps, *shape, seed=1) * 3
    ratio = oscillation_ratio(w, q)
    assert ratio.shape == shape and ratio.dtype == torch.float32
    torch.testing.assert_close(ratio.double(), loop(w, q), rtol=5e-6, atol=0)
    # The control: the way from end to end, and the largest distance, are something else where there are steps between.
    if steps > 1:
        for other in ((q[-1] - q[0]) / (w[-1] - w[0]), (q.amax(0) - q.amin(0)) / (w.amax(0) - w.amin(0))):
            assert ((other.abs() - ratio).abs() > 1e-3 * ratio).all()


def test_it_is_element_by_element() -> None:
    w, q = walks(30, 4, 6), walks(30, 4, 6, seed=1)
    ratio = oscillation_ratio(w, q)
    assert torch.equal(oscillation_ratio(w[:, 1, 2], q[:, 1, 2]), ratio[1, 2])
    assert torch.equal(oscillation_ratio(w.transpose(1, 2), q.transpose(1, 2)), ratio.t())


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_where_neither_moves_it_is_zero(value: float) -> None:
    still = torch.full((31, 3), value)
    assert oscillation_ratio(still, still * 2).tolist() == [0.0] * 3
    moved = still.clone()
    moved[7] += 1e-6
    assert oscillation_ratio(moved, still).tolist() == [0.0] * 3
    assert oscillation_ratio(still, moved).tolist() == [math.inf] * 3


def test_the_paths_of_bfloat16_values_are_added_up_in_float32() -> None:
    draw = torch.Generator().manual_seed(0)
    w = (torch.randn(201, 50, generator=draw) * 1e-3 + 1).bfloat16()
    q = torch.randn(201, 50, generator=draw).bfloat16()
    torch.testing.assert_close(oscillation_ratio(w, q).double(), loop(w, q), rtol=1e-5, atol=0)
    dist_w, dist_q = (sum((x[1:] - x[:-1]).abs()) for x in (w, q))
    naive = (dist_q / dist_w).double()  # sums in bfloat16 stop growing
    assert ((naive - loop(w, q)).abs() > 0.01 * loop(w, q)).any()


def test_float64_stays_float64() -> None:
    w, q = walks(200, 9).double(), walks(200, 9, seed=1).double()
    torch.testing.assert_close(oscillation_ratio(w, q), loop(w, q), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("w_shape", "q_shape"),
    [((31, 4), (31, 5)), ((31, 4), (30, 4)), ((31, 4), (31, 4, 1)), ((1, 4), (1, 4)), ((0, 4), (0, 4)), ((), ())],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(w_shape: tuple[int, ...], q_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"two trajectories of one shape \(T0 \+ 1, \.\.\.\) with T0 >= 1") as error:
        oscillation_ratio(torch.zeros(w_shape), torch.zeros(q_shape))
    assert str(w_shape) in str(error.value) and str(q_shape) in str(error.value)


def test_path_lengths_fed_step_by_step_are_the_same_statistic() -> None:
    w, q = walks(30, 5, 8), walks(30, 5, 8, seed=1)
    now_w, now_q = w[0].clone().requires_grad_(), q[0].clone()
    paths = PathLengths(now_w, now_q)
    assert torch.equal(paths.ratio(), torch.zeros(5, 8))
    for t in range(1, 31):
        with torch.no_grad():  # the tensors of a model change in place
            now_w.copy_(w[t])
            now_q.copy_(q[t])
        paths.add(now_w, now_q)
        assert torch.equal(paths.ratio(), oscillation_ratio(w[: t + 1], q[: t + 1])), t
    assert not paths.ratio().requires_grad


def test_a_planted_oscillation_stands_out_and_a_drift_does_not() -> None:
    """Weights of a block of scale 1 (its largest is 6); .75 and 2.5 are thresholds of the grid."""
    steps = torch.arange(31.0)
    w = torch.zeros(31, 32)
    w[:, 0] = 6.0
    w[:, 1] = 0.75 + 0.01 * (-1) ** steps  # crosses in every step: 30 * .5 / (30 * .02) = 25
    w[:, 2] = 0.70 + 0.01 * (-1) ** steps  # the same on one side of the threshold
    w[:, 3] = 0.1 * steps  # goes from 0 to 3: 3 / 3
    w[:, 4] = 0.01 * steps + 2.4  # crosses once: 1 / .3
    w[:, 5] = 0.75 + 0.01 * torch.sin(2 * math.pi * (steps + 0.5) / 10)  # six times in 30 steps: 3 / .12
    q = torch.stack([fake_quantize(row, QuantizerSpec()) for row in w])
    ratio = oscillation_ratio(w, q)
    assert ratio[:6].tolist() == pytest.approx([0, 25, 0, 1, 1 / 0.3, 25], rel=0.07)
    assert (ratio > OSCILLATING).nonzero().flatten().tolist() == [1, 5]
    assert torch.equal(ratio[6:], torch.zeros(26))


def test_lists_of_weights_share_an_accumulator_and_nothing_else() -> None:
    shapes = [(3, 8), (5,), (2, 2, 2)]
    w = [walks(10, *shape, seed=n) for n, shape in enumerate(shapes)]
    q = [walks(10, *shape, seed=n + 9) for n, shape in enumerate(shapes)]
    paths = PathLengths([x[0] for x in w], [x[0] for x in q])
    for t in range(1, 11):
        paths.add([x[t] for x in w], [x[t] for x in q])
    for ratio, one, other in zip(paths.ratio(), w, q, strict=True):
        assert torch.equal(ratio, oscillation_ratio(one, other))


def test_sums_are_taken_to_another_accumulator_that_goes_on_from_its_own_values() -> None:
    w, q = walks(20, 4, 6), walks(20, 4, 6, seed=1)
    paths, rate = PathLengths([w[0]], [q[0]]), RateOfChange([w[0]])
    for t in range(1, 8):
        paths.add([w[t]], [q[t]])
        rate.add([w[t]])
    state = {"paths": paths.state_dict(), "rate": rate.state_dict()}
    paths, rate = PathLengths([w[7]], [q[7]]), RateOfChange([w[7]])
    paths.load_state_dict(state["paths"])
    rate.load_state_dict(state["rate"])
    for t in range(8, 21):
        paths.add([w[t]], [q[t]])
        rate.add([w[t]])
    assert torch.equal(paths.ratio()[0], oscillation_ratio(w, q))
    assert torch.equal(rate.value()[0], rate_of_change(w))


# ---------------------------------------------------------------------------------------------------------------------
# Quantization confidence (A.2)
# ---------------------------------------------------------------------------------------------------------------------

THRESHOLDS = {"e2m1": [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], "e3m0": [0.125, 0.375, 0.75, 1.5, 3.0, 6.0, 12.0]}
# Of each cell of a magnitude: where the distance to the nearest threshold is largest, and that distance.
FAR = {
    "e2m1": [(0, 0.25), (0.5, 0.25), (1, 0.25), (1.5, 0.25), (2.125, 0.375), (3, 0.5), (4.25, 0.75), (6, 1)],
    "e3m0": [
        (0, 0.125),
        (0.25, 0.125),
        (0.5625, 0.1875),
        (1.125, 0.375),
        (2.25, 0.75),
        (4.5, 1.5),
        (9, 3),
        (16, 4),
    ],
}


def in_a_block(values: list[float], element: str, scale: float = 1.0) -> Tensor:
    """Latent `values` in blocks of 32 (one row each 31 of them) whose largest element fixes their scale S."""
    rows = [values[i : i + 31] for i in range(0, len(values), 31)]
    return torch.tensor([[FORMATS[element].max, *row, *[0.0] * (31 - len(row))] for row in rows]) * scale


def confidences(values: list[float], element: str, scale: float = 1.0) -> list[float]:
    confidence = quantization_confidence(in_a_block(values, element, scale), QuantizerSpec(element=element))
    return confidence[:, 1:].flatten().tolist()[: len(values)]


@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 2.0**20])
@pytest.mark.parametrize("element", ["e2m1", "e3m0"])
def test_confidence_is_0_at_every_threshold_and_1_at_the_far_point_of_every_cell(element: str, scale: float) -> None:
    signs = (1.0, -1.0)
    assert confidences([s * t for t in THRESHOLDS[element] for s in signs], element, scale) == [0.0] * 14
    far = [s * x for x, _ in FAR[element] for s in signs]
    assert confidences(far, element, scale) == [1.0] * 16
    # The control: a little off a far point it is less, on both sides of it.
    off = confidences([x * f for x in far[2:14] for f in (0.99, 1.01)], element, scale)
    assert all(0.5 < c < 1 for c in off)


def confidence_loop(values: list[float], element: str) -> list[float]:
    """Appendix A.2 to the letter for latent values within the grid, in Python's own float64: MaxDist by search."""
    thresholds = sorted({s * t for t in THRESHOLDS[element] for s in (1, -1)})
    largest = FORMATS[element].max

    def distance(x: float) -> float:
        return min(abs(x - t) for t in thresholds)

    confidence = []
    for x in values:
        cell = sum(x > t for t in thresholds)
        points = [n / 64 for n in range(round(-64 * largest), round(64 * largest) + 1)]
        confidence.append(distance(x) / max(distance(p) for p in points if sum(p > t for t in thresholds) == cell))
    return confidence


@pytest.mark.parametrize("element", ["e2m1", "e3m0"])
def test_confidence_equals_a_loop_in_float64(element: str) -> None:
    largest = FORMATS[element].max
    values = ((torch.rand(310, generator=torch.Generator().manual_seed(0)) * 2 - 1) * largest).tolist()
    expected = confidence_loop(values, element)
    assert confidences(values, element) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # The control: over the distance to the quantized value's own far end, as if it lay in the middle, it differs.
    grid = signed_grid(FORMATS[element], torch.device("cpu"))
    nearest = grid[(torch.tensor(values)[:, None] - grid).abs().argmin(1)]
    naive = 1 - (torch.tensor(values) - nearest).abs() / (largest / 2 + 0.0)
    assert (naive - torch.tensor(expected)).abs().max() > 0.1


def test_confidence_by_hand() -> None:
    #               below the first threshold, in a cell of unequal halves, in the outermost cell
    assert confidences([0.1, -2.0, 2.4, 4.0, -5.25, 5.75], "e2m1") == pytest.approx(
        [0.15 / 0.25, 0.25 / 0.375, 0.1 / 0.375, 0.5 / 0.75, 0.25, 0.75], rel=1e-6
    )


@pytest.mark.parametrize("axis", [-1, 0])
def test_confidence_follows_the_blocks_of_its_axis(axis: int) -> None:
    w = torch.randn(40, 70, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 70)
    by_row = quantization_confidence(w, QuantizerSpec(axis=-1))
    assert by_row.shape == w.shape and by_row.dtype == torch.float32
    assert bool((by_row >= 0).all()) and bool((by_row <= 1).all())
    by_axis = quantization_confidence(w.movedim(-1, axis), QuantizerSpec(axis=axis))
    assert torch.equal(by_axis.movedim(axis, -1), by_row)
    if axis == 0:  # the control: along the other dimension the blocks, and the scales, are others
        assert not torch.equal(quantization_confidence(w, QuantizerSpec(axis=0)), by_row)
    assert torch.equal(quantization_confidence(w * 2.0**-7, QuantizerSpec()), by_row)
    bf16 = w.bfloat16()
    assert torch.equal(
        quantization_confidence(bf16, QuantizerSpec()), quantization_confidence(bf16.float(), QuantizerSpec())
    )


def test_what_saturates_under_the_floor_rule_is_confident() -> None:
    w = torch.zeros(1, 32)
    w[0, :4] = torch.tensor([7.9, 6.0, -6.5, 5.5])  # S = 1: floor(log2 7.9) - 2 = 0
    floor = quantization_confidence(w, QuantizerSpec(scale_rule="floor"))[0, :4]
    assert floor.tolist() == [1.0, 1.0, 1.0, 0.5]
    free = quantization_confidence(w, QuantizerSpec())[0, :4]  # S = 2: 3.95, 3, -3.25, 2.75
    assert free.tolist() == pytest.approx([0.6, 1.0, 0.5, 0.5], rel=1e-5)


def test_confidence_of_what_is_not_finite_zero_or_empty() -> None:
    w = torch.ones(3, 64)
    w[0, 5], w[1, 40] = torch.nan, torch.inf
    confidence = quantization_confidence(w, QuantizerSpec())
    assert bool(confidence[0, :32].isnan().all()) and bool(confidence[1, 32:].isnan().all())
    assert bool(confidence[0, 32:].isfinite().all()) and bool(confidence[1, :32].isfinite().all())
    assert quantization_confidence(torch.zeros(2, 32), QuantizerSpec()).tolist() == [[1.0] * 32] * 2
    assert quantization_confidence(torch.zeros(0, 32), QuantizerSpec()).shape == (0, 32)
    with pytest.raises(ValueError, match=r"axis 2 is not a dimension of a tensor of shape \(3, 64\)"):
        quantization_confidence(w, QuantizerSpec(axis=2))


def test_the_latent_weight_is_the_weight_over_the_scale_of_its_block() -> None:
    w = torch.tensor([[12.0, -3.0, *[0.0] * 30, 0.75, 0.1]])
    assert latent_weight(w, QuantizerSpec())[0, [0, 1, 32]].tolist() == [6.0, -1.5, 6.0]  # S = 2 and 1/8
    # What is quantized is the latent weight: it lies in the cell of its quantized value.
    w = walks(1, 20, 96)[1]
    latent, scale = latent_weight(w, QuantizerSpec()), w / latent_weight(w, QuantizerSpec())
    quantized = fake_quantize(w, QuantizerSpec()) / scale
    grid = signed_grid(FORMATS["e2m1"], torch.device("cpu"))
    assert torch.equal((latent.unsqueeze(-1) - grid).abs().amin(-1), (latent - quantized).abs())


# ---------------------------------------------------------------------------------------------------------------------
# Rate of change (A.3)
# ---------------------------------------------------------------------------------------------------------------------


def rate_loop(x_steps: Tensor) -> float:
    """Appendix A.3 to the letter, in Python's own float64."""
    steps = x_steps.reshape(len(x_steps), -1).tolist()
    rates = []
    for before, now in itertools.pairwise(steps):
        change = math.sqrt(sum((b - a) ** 2 for a, b in zip(before, now, strict=True)))
        rates.append(change / math.sqrt(sum(a**2 for a in before)))
    return sum(rates) / len(rates)


def test_the_rate_of_change_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])  # norms 5 5 0 0; changes 0 5 0
    assert rate_of_change(x[:2]).item() == 0.0
    assert rate_of_change(x[:3]).item() == 0.5
    assert rate_of_change(x).item() == pytest.approx(1 / 3)
    assert rate_of_change(x.flip(0)).item() == math.inf  # from nothing to something
    assert rate_of_change(torch.tensor([2.0, 3.0, 1.5])).item() == 0.5  # of scalars: (1 / 2 + 1.5 / 3) / 2


@pytest.mark.parametrize("shape", [(), (7,), (5, 33), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("steps", [1, 30, 200])
def test_the_rate_of_change_equals_a_loop_in_float64(steps: int, shape: tuple[int, ...]) -> None:
    x = walks(steps, *shape)
    rate = rate_of_change(x)
    assert rate.shape == () and rate.dtype == torch.float32
    assert rate.item() == pytest.approx(rate_loop(x), rel=2e-6)
    assert rate_of_change(x.double()).item() == pytest.approx(rate_loop(x), rel=1e-13)
    assert rate_of_change(x * 2.0**7).item() == rate.item()  # a ratio
    if steps > 1:  # the controls: over the norm after the step, and from end to end
        after = torch.stack([(b - a).norm() / b.norm() for a, b in itertools.pairwise(x)]).mean()
        ends = (x[-1] - x[0]).norm() / x[0].norm()
        assert all(abs(other.item() - rate.item()) > 1e-3 * rate.item() for other in (after, ends))


def test_the_rate_of_change_of_bfloat16_is_computed_in_float32() -> None:
    x = (torch.randn(201, 50, generator=torch.Generator().manual_seed(0)) * 1e-2 + 1).bfloat16()
    assert rate_of_change(x).item() == pytest.approx(rate_loop(x), rel=1e-5)


def test_rates_fed_step_by_step_are_the_same_statistic_for_each_tensor_of_a_list() -> None:
    x, y = walks(30, 5, 8), walks(30, 3, seed=1)
    now_x, now_y = x[0].clone().requires_grad_(), y[0].clone()
    rates = RateOfChange([now_x, now_y])
    assert bool(rates.value().isnan().all())  # of no step
    for t in range(1, 31):
        with torch.no_grad():  # the tensors of a model change in place
            now_x.copy_(x[t])
            now_y.copy_(y[t])
        rates.add([now_x, now_y])
        assert rates.value().tolist() == [rate_of_change(x[: t + 1]).item(), rate_of_change(y[: t + 1]).item()], t
    assert rates.steps == 30 and not rates.value().requires_grad


@pytest.mark.parametrize("shape", [(), (0, 4), (1, 4)], ids=str)
def test_a_trajectory_without_a_step_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a trajectory \(T0 \+ 1, \.\.\.\) with T0 >= 1 is needed"):
        rate_of_change(torch.zeros(shape))


def test_a_planted_flipper_changes_the_quantized_weights_more_than_the_master_weights() -> None:
    """Section 4.1: small steps around a threshold are a high rate of change of Q(w). A weight that moves as far in the
    middle of its cell changes w alone."""
    steps = torch.arange(31.0)
    w = torch.zeros(31, 2, 32)
    w[:, :, 0] = 6.0
    w[:, 0, 1] = 0.75 + 0.01 * (-1) ** steps  # around the threshold
    w[:, 1, 1] = 1.00 + 0.01 * (-1) ** steps  # in the middle of the cell
    q = torch.stack([fake_quantize(x, QuantizerSpec()) for x in w])
    assert rate_of_change(w[:, 0]).item() == pytest.approx(0.02 / 6.05, rel=0.01)
    assert rate_of_change(w[:, 0]).item() == pytest.approx(rate_of_change(w[:, 1]).item(), rel=0.01)
    assert rate_of_change(q[:, 0]).item() == pytest.approx(0.5 / 6.05, rel=0.01)
    assert rate_of_change(q[:, 1]).item() == 0.0
    confidence = quantization_confidence(w, QuantizerSpec())
    assert bool((confidence[:, 0, 1] < 0.05).all()) and bool((confidence[:, 1, 1] > 0.95).all())
