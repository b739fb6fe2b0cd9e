"""The oscillation ratio of Appendix A.1: by hand, against a loop in float64, on planted weights, step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantization import QuantizerSpec, fake_quantize
from quantization.oscillation import OSCILLATING, PathLengths, oscillation_ratio


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
