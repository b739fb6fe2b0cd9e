"""What ends a run before its last epoch: a failure, or a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor


class TrainingError(Exception):
    """The run cannot go on: a loss or gradient that is not finite. One sentence; exit code 1."""


class Stopped(Exception):  # noqa: N818 (it is none)
    """A signal has been heard on one of the processes, and all of them know."""


class StopSignal(contextlib.AbstractContextManager):
    """Remembers SIGTERM or SIGINT until the step or the batch in progress is done.

    A second one has its usual, immediate effect. Under torchrun it has so only FORWARDED seconds after the first: what
    a scheduler sends to every process, torchrun sends to each of them once more.

    It listens inside its `with` block, and leaves the process's handlers as it found them.
    """

    FORWARDED = 10.0

    def __init__(self) -> None:
        self.heard = 0  # number of the signal this process has received
        self.heard_anywhere = 0.0  # not zero once all processes know that one of them has received a signal
        self._heard_at = 0.0
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        self._handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            if handler is not None:  # one that is not Python's cannot be put back
                signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if not self.heard:
            self.heard, self._heard_at = number, time.monotonic()
            if not dist.is_torchelastic_launched():
                signal.signal(number, signal.SIG_DFL)
        elif time.monotonic() - self._heard_at > self.FORWARDED:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Lockstep:
    """Lets processes with uneven numbers of batches leave a loop together, once all are done or one has heard a signal.

        while True:
            lockstep.tell(has_batch)
            ...                        # launch the work on the batch, if there is one
            if not lockstep.go_on():   # the host waits for what was launched before `tell`, not for the work
                break

    Raises Stopped, on all processes at the same batch.
    """

    def __init__(self, stop: StopSignal, world_size: int, device: torch.device) -> None:
        self.stop, self.world_size, self.device = stop, world_size, device
        self._told: Tensor | list[float] = []
        self._arrived: torch.cuda.Event | None = None

    def tell(self, has_batch: bool) -> None:
        """Say to all processes whether this one has work, and whether it has heard a signal."""
        self._told = [float(has_batch), float(self.stop.heard)]
        if self.world_size == 1:
            return
        told = torch.stack([torch.full((), value, device=self.device) for value in self._told])  # waits for nothing
        dist.all_reduce(told)
        self._told = told.to("cpu", non_blocking=True)
        if self.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def go_on(self) -> bool:
        """Whether any process has work. Raises Stopped where one had heard a signal when it told."""
        if self._arrived is not None:
            self._arrived.synchronize()
        working, self.stop.heard_anywhere = self._told.tolist() if isinstance(self._told, Tensor) else self._told
        if self.stop.heard_anywhere:
            raise Stopped
        return working > 0
