"""TensorBoard's files, written beside metrics.log, which a run can do without.

Events are written by the training process itself and not by a thread with a queue, which would die of a full disk and
then let the run wait for ever. Whatever fails is said once, and the run goes on without them.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import histogram_raw, scalar

FLUSH_SECS = 30.0


class TensorBoard:
    """The event file of one start of a run in `folder`, which is made.

    purge_step: TensorBoard drops what earlier starts drew at this step and after it; None: nothing.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self.folder = folder
        self._events: EventsWriter | None = None
        self._flushed_at = time.monotonic()
        try:
            folder.mkdir(exist_ok=True)
            suffix = f".{time.time_ns()}"  # else a restart within a second overwrites the file
            self._events = EventsWriter(str(folder / "events"), filename_suffix=suffix)
        except OSError as error:
            self._go_on_without(error)
        if purge_step is not None:
            start = SessionLog(status=SessionLog.SessionStatus.START)
            self._write(Event(wall_time=time.time(), step=purge_step, file_version="brain.Event:2"))
            self._write(Event(wall_time=time.time(), step=purge_step, session_log=start))
        self.flush()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._write_summary(scalar(tag, value), step)

    def add_histogram(self, tag: str, edges: np.ndarray, counts: np.ndarray, step: int) -> None:
        """edges: (bins + 1,), ascending; counts: (bins,)."""
        middles = (edges[1:] + edges[:-1]) / 2
        sums = {"num": counts.sum(), "sum": counts @ middles, "sum_squares": counts @ middles**2}
        limits = {"bucket_limits": edges[1:].tolist(), "bucket_counts": counts.tolist()}
        self._write_summary(histogram_raw(tag, min=edges[0], max=edges[-1], **sums, **limits), step)

    def _write_summary(self, summary: Summary, step: int) -> None:
        self._write(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed_at > FLUSH_SECS:
            self.flush()

    def _write(self, event: Event) -> None:
        if self._events is None:
            return
        try:
            self._events.write_event(event)
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            self._go_on_without(error)

    def flush(self) -> None:
        """Bring what was added so far to the disk."""
        self._flushed_at = time.monotonic()
        if self._events is None:
            return
        try:
            self._events.flush()
        except (OSError, ValueError) as error:
            self._go_on_without(error)

    def _go_on_without(self, error: Exception) -> None:
        self._events = None
        reason = getattr(error, "strerror", None) or error
        print(f"{self.folder} cannot be written ({reason}); the run goes on without TensorBoard.", file=sys.stderr)

    def close(self) -> None:
        """Bring everything to the disk; a second call does nothing."""
        self.flush()
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
            self._events = None
