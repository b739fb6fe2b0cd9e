"""Which passes are recorded and which are computed eagerly, with a stand-in for CUDA graphs; those are in
test_gpu_graphs.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Box
from torch import Tensor, nn

from training import graphs
from training.graphs import WARM_UP, GraphedPasses, Pass

Compute = Callable[[Tensor, Tensor], Tensor]


class Recording(GraphedPasses):
    """Its graphs compute again what was recorded, on the tensors of the recording, as a CUDA graph does."""

    def _record(self, compute: Compute, images: Tensor, targets: Tensor, which: Pass) -> graphs._Recorded:
        images, targets, (parameter,) = images.clone(), targets.clone(), self.parameters
        if which.first:
            self.gradients = [torch.zeros_like(parameter)]
        (gradient,), loss = self.gradients, torch.zeros(())

        def replay() -> None:
            parameter.grad = None
            loss.copy_(compute(images, targets))
            gradient.copy_(parameter.grad if which.first else gradient + parameter.grad)
            parameter.grad = gradient
            self.replays += 1

        self.replays = getattr(self, "replays", 0)
        return graphs._Recorded(Box(replay=replay), images, targets, loss)


@pytest.fixture
def parameter() -> nn.Parameter:
    return nn.Parameter(torch.arange(1.0, 4.0))


def passes_of(parameter: nn.Parameter, recording: bool) -> Callable[[list[int]], tuple[Tensor, float]]:
    """A step of micro-batches with the given numbers of rows: its gradient and its loss."""
    passes, drawn = Recording([parameter]), torch.Generator().manual_seed(0)

    def compute(images: Tensor, targets: Tensor) -> Tensor:
        loss = ((images @ parameter) * targets).sum()
        loss.backward()
        return loss.detach()

    def step(rows: list[int]) -> tuple[Tensor, float]:
        total = 0.0
        for number, count in enumerate(rows):
            images, targets = (torch.randn(shape, generator=drawn) for shape in ((count, 3), (count,)))
            which = Pass(first=number == 0, last=number == len(rows) - 1)
            total += float(passes.run(compute, images, targets, which) if recording else compute(images, targets))
        gradient, parameter.grad = parameter.grad.clone(), None
        return gradient, total

    step.passes = passes
    return step


@pytest.mark.parametrize(
    ("rows", "recordings"),
    [([4], 1), ([4, 4], 2), ([4, 4, 4, 4], 3)],
    ids=["one micro-batch", "two", "four"],
)
def test_passes_are_recorded_after_the_warm_up_one_for_each_kind(
    rows: list[int], recordings: int, parameter: nn.Parameter
) -> None:
    expected, actual = passes_of(parameter, False), passes_of(parameter, True)
    for number in range(WARM_UP + 5):
        (gradient, loss), (wanted, total) = actual(rows), expected(rows)
        assert torch.equal(gradient, wanted) and loss == total
        assert len(actual.passes.recorded) == (recordings if number >= WARM_UP else 0)
    assert actual.passes.replays == 5 * len(rows)


@pytest.mark.parametrize("odd", [[2, 4], [4, 2], [2, 2]], ids=["the first of another shape", "the second", "both"])
def test_a_batch_of_another_shape_is_computed_eagerly(odd: list[int], parameter: nn.Parameter) -> None:
    expected, actual = passes_of(parameter, False), passes_of(parameter, True)
    for rows in [*[[4, 4]] * (WARM_UP + 2), odd, [4, 4], odd, [4, 4]]:
        (gradient, loss), (wanted, total) = actual(rows), expected(rows)
        assert torch.equal(gradient, wanted) and loss == pytest.approx(total)
    assert len(actual.passes.recorded) == 2
    assert actual.passes.replays == 4 * 2 + 2 * (odd == [4, 2])  # the second of a step goes on as the first began


def test_what_is_forgotten_is_recorded_anew(parameter: nn.Parameter) -> None:
    step: Any = passes_of(parameter, True)
    for _ in range(WARM_UP + 1):
        step([4])
    step.passes.forget()
    assert not step.passes.recorded and step.passes.shapes is None
    step([5])
    assert [one.images.shape for one in step.passes.recorded.values()] == [(5, 3)]


def test_a_recording_holds_back_whom_it_is_told_to(parameter: nn.Parameter) -> None:
    """And nothing else of a step does."""
    lock, seen = threading.Lock(), []

    class Seeing(Recording):
        def _record(self, *args: Any) -> graphs._Recorded:
            seen.append(lock.locked())
            return super()._record(*args)

    def compute(images: Tensor, targets: Tensor) -> Tensor:
        assert seen or not lock.locked()
        parameter.grad = torch.ones_like(parameter)
        return torch.zeros(())

    passes = Seeing([parameter], lambda: lock)
    for _ in range(WARM_UP + 2):
        passes.run(compute, torch.ones(1, 3), torch.ones(1), Pass(first=True, last=True))
        assert not lock.locked()
    assert seen == [True]
