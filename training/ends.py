"""What ends a run before its last epoch: a failure, or a signal."""

from __future__ import annotations

import contextlib
import signal


class TrainingError(Exception):
    """The run cannot go on: a loss or gradient that is not finite. One sentence; exit code 1."""


class StopSignal(contextlib.AbstractContextManager):
    """Remembers SIGTERM or SIGINT until the step in progress is done. A second one has its usual, immediate effect.

    It listens inside its `with` block, and leaves the process's handlers as it found them.
    """

    def __init__(self) -> None:
        self.heard = 0  # number of the signal this process has received
        self.heard_anywhere = 0.0  # not zero once all processes know that one of them has received a signal

    def __enter__(self) -> StopSignal:
        self._handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: object) -> None:
        self.heard = number
        signal.signal(number, signal.SIG_DFL)
