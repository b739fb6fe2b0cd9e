"""Progress of an epoch on the console, and running means."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from record.metrics import plain


@dataclass
class Progress(contextlib.AbstractContextManager):
    """One epoch: a bar on a terminal, elsewhere a plain line at most every `every` seconds. Made by RunLog.progress.

    Shows iterations, images a second of this epoch, what update() was given, and the time left for the run: the time
    since `origin` (seconds, epochs) for the epochs done since, stretched over those to come, evaluation included.
    """

    desc: str
    epochs: int | None
    epoch: int
    done: int  # iterations of this epoch
    total: int
    every: float = 30.0
    enabled: bool = True

    def __post_init__(self) -> None:
        self.images = 0
        self._start = self._shown_at = time.monotonic()
        self.origin = (self._start, self._position())
        self._latest: dict[str, Any] = {}
        self._bar: tqdm | None = None
        if self.enabled and sys.stderr.isatty():
            self.every = 0.5
            self._bar = tqdm(total=self.total, desc=self.desc, initial=self.done, dynamic_ncols=True)

    def _position(self) -> float:
        return self.epoch + self.done / max(self.total, 1)

    def update(self, n_images: int, **shown: Any) -> float:
        """One iteration over `n_images` images of all processes; returns images a second since the epoch began here.

        `shown` stays until given anew. Values may be tensors on a device: they are read only when they are displayed.
        """
        self.done += 1
        self.images += n_images
        self._latest.update(shown)
        if self.enabled and time.monotonic() - self._shown_at >= self.every:
            self._show()
        return self._rate()

    def _rate(self) -> float:
        return self.images / max(time.monotonic() - self._start, 1e-9)

    def text(self) -> str:
        """The figures, as in "1024.0 img/s, loss 6.9, lr 0.001, run ETA 1:02:03"."""
        parts = [f"{self._rate():.1f} img/s"]
        for name, value in self._latest.items():
            number = plain(value)
            parts.append(f"{name} {f'{number:.4g}' if isinstance(number, float) else number}")
        began, origin = self.origin
        if self.epochs is not None and self._position() > origin:
            left = (time.monotonic() - began) * (self.epochs - self._position()) / (self._position() - origin)
            parts.append(f"run ETA {tqdm.format_interval(left)}")
        return ", ".join(parts)

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        if self._bar is None:
            print(f"{self.desc} {self.done}/{self.total}: {self.text()}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(self.text(), refresh=False)
            self._bar.update(self.done - self._bar.n)

    def close(self) -> None:
        """Show the last state of the bar and leave it."""
        if self._bar is not None:
            self._show()
            self._bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class Meter:
    """Running means as (sum, count) pairs of floats, saved with a checkpoint and restored bit for bit."""

    def __init__(self) -> None:
        self._totals: dict[str, list[float]] = {}

    def add(self, name: str, value_sum: float, count: float) -> None:
        """Add a sum over `count` samples."""
        total = self._totals.setdefault(name, [0.0, 0.0])
        total[0] += float(value_sum)
        total[1] += float(count)

    def mean(self, name: str) -> float:
        """Sum over count, NaN where nothing was counted. Raises KeyError for a name never added."""
        value_sum, count = self._totals[name]
        return value_sum / count if count else math.nan

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(total) for name, total in self._totals.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self._totals = {name: [float(value) for value in total] for name, total in state.items()}
