"""Forward and backward pass of a micro-batch as CUDA graphs: recorded once, then launched as one.

Launching the kernels of a step one by one takes the host some time, whatever the size of the model, and a GPU that is
done with them sooner waits. A replayed graph does what the recorded pass did, on the same memory, with the present
parameters, batch, random state and noise position; so a run trains alike with graphs and without, bit for bit.

What must stay outside is what the host decides at every step: seeds, mixup, the optimizer, stabilizers. A layer that
waits for the device, or that the host tells something new at every pass, cannot be recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import UserError

# Steps before the recording: kernels are compiled and chosen in the first; DistributedDataParallel arranges its buckets
# after the first and times itself in the first ten, with events that cannot be recorded.
WARM_UP = 11


class Pass(NamedTuple):
    """Which micro-batch of an optimizer step it is: the first one sets the gradients, the others add to them."""

    first: bool
    last: bool  # after it DistributedDataParallel averages the gradients


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    images: Tensor
    targets: Tensor
    loss: Tensor


def leave_default_stream(device: torch.device) -> None:
    """Work on a stream of its own from now on: the default one cannot be recorded, nor what was set up on it."""
    if torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.default_stream(device))
        torch.cuda.set_stream(stream)


class GraphedPasses:
    """Runs passes: eagerly at first, then recorded ones, one recording for each kind of pass.

    All recordings are of one shape of batch. A batch of another shape is computed eagerly.
    parameters: those whose gradients a pass computes. held: makes a context for a recording, in which others wait that
    would disturb it, or it them.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        held: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.parameters, self._held = parameters, held
        self.steps = 0
        self.forget()

    def forget(self) -> None:
        """Drop the recordings and the memory they hold."""
        self.recorded: dict[Pass, _Recorded] = {}
        self.shapes: tuple[torch.Size, torch.Size] | None = None  # of images and targets
        self.gradients: list[Tensor | None] = []
        self.in_step = False  # whether the first pass of the present step was a recorded one

    def run(self, compute: Callable[[Tensor, Tensor], Tensor], images: Tensor, targets: Tensor, which: Pass) -> Tensor:
        """`compute(images, targets)`, which returns a loss (scalar) and leaves gradients in the parameters.

        Raises UserError where it cannot be recorded.
        """
        shapes = images.shape, targets.shape
        fits = self.shapes in (None, shapes)
        if which.first:
            self.steps += 1
            self.in_step = self.steps > WARM_UP and fits
        # Recorded passes add to the gradients where the first one put them; so does an eager one after a recorded one.
        if not (self.in_step and fits):
            return compute(images, targets)
        if which not in self.recorded:
            with self._held():
                self.recorded[which] = self._record(compute, images, targets, which)
            self.shapes = shapes
        recorded = self.recorded[which]
        recorded.images.copy_(images)
        recorded.targets.copy_(targets)
        recorded.graph.replay()
        if which.first:
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient
        return recorded.loss

    def _record(
        self, compute: Callable[[Tensor, Tensor], Tensor], images: Tensor, targets: Tensor, which: Pass
    ) -> _Recorded:
        if which.first:
            for parameter in self.parameters:
                parameter.grad = None
        images, targets = images.clone(), targets.clone()
        graph = torch.cuda.CUDAGraph()
        pool = next((other.graph.pool() for other in self.recorded.values()), None)
        try:
            # Other threads, such as the one that pins memory for batches, go on with what they do.
            with torch.cuda.graph(
                graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ):
                loss = compute(images, targets)
        except RuntimeError as error:
            for one in (error, error.__context__):  # leaving a recording that broke may fail on top
                if isinstance(one, torch.OutOfMemoryError):
                    raise one from None
            raise UserError(
                f"Forward and backward pass cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}); pass "
                "--no-cuda-graphs, or keep what waits for the device out of the model."
            ) from error
        if which.first:
            self.gradients = [parameter.grad for parameter in self.parameters]
        return _Recorded(graph, images, targets, loss)
