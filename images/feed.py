"""Batches from loader processes to the device: finished there by a thread of its own, some batches ahead."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from images.gpu import Decoded, Finisher
from images.parcel import Parcel
from images.slots import Slot, Slots
from images.workers import Leash

AHEAD = 2  # finished batches that wait for the model
PRIORITY = -1  # of the stream: its small kernels go in between the model's, which are waiting for them


class Loaded(NamedTuple):
    """A batch, and what became of the images that it lacks."""

    images: Tensor  # (B, 3, H, W) float32
    targets: Tensor  # (B,) int64
    unreadable: list[str]  # what could not be read
    missing: int  # images that nothing was found to replace with
    labels: Tensor  # the targets, on the CPU


class Feed:
    """The batches of a loader on a device; without a finisher they are what the loader's processes have made.

    together: batches whose files the GPU decodes at a time. slots: memory to give back after a whole pass.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        finisher: Finisher | None,
        leash: Leash | None,
        together: int = 1,
        slots: Slots | None = None,
    ) -> None:
        self.loader, self._device, self._finisher, self._leash = loader, device, finisher, leash
        self._together, self._slots = together, slots
        self._streams: list[torch.cuda.Stream] = []
        self._thread: _Ahead | None = None
        self._copied: deque[tuple[torch.cuda.Event | None, Slot]] = deque()

    def __iter__(self) -> Iterator[Loaded]:
        self.stop()
        batches = iter(self.loader)  # by the main thread, which torch tells of its processes' ends
        if self._leash is not None:
            self._leash.started()
        if self._finisher is None:
            for images, targets, unreadable, missing in batches:
                yield Loaded(images, targets, unreadable, missing, targets)
            return
        if self._device.type == "cpu" or not self.loader.num_workers:
            # A loader without processes draws from the generators of this one, which a thread would disturb.
            yield from (self._mend(self._finish(batch, None), batch) for batch in batches)
            return
        self._streams = self._streams or [torch.cuda.Stream(self._device, priority=PRIORITY) for _ in range(2)]
        # The GPU's decoder is waited for, by a thread that does nothing else.
        decoding = _Ahead(_groups(batches, self._together), self._decode, self._streams[0])
        self._thread = finishing = _Ahead(_parts(decoding), self._finish_decoded, self._streams[1], before=decoding)
        try:
            for (finished, batch), done in finishing:
                current = torch.cuda.current_stream(self._device)
                current.wait_event(done)
                for tensor in (finished.loaded.images, finished.loaded.targets):
                    tensor.record_stream(current)
                yield self._mend(finished, batch)
        finally:
            finishing.stop()
        if self._slots is not None:
            torch.cuda.synchronize(self._device)
            self._copied.clear()
            self._slots.rest()

    def stop(self) -> None:
        """End the thread of an earlier pass, if there is one."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    def _decode(self, batches: list[Any]) -> list[tuple[Any, Decoded | None]]:
        decoded = iter(self._finisher.decode([parcel for parcel, *_ in batches if parcel is not None]))
        return [(batch, None if batch[0] is None else next(decoded)) for batch in batches]

    def _finish_decoded(self, item: tuple[Any, Decoded | None, torch.cuda.Event]) -> tuple[_Finished, Any]:
        batch, decoded, done = item
        self._streams[1].wait_event(done)
        for image in decoded.images.values() if decoded else ():
            image.record_stream(self._streams[1])
        return self._finish(batch, decoded), batch

    def _finish(self, batch: Any, decoded: Decoded | None) -> _Finished:
        parcel, unreadable, missing, _ = batch
        if parcel is None:
            nothing = torch.empty(0, dtype=torch.int64)
            return _Finished(Loaded(torch.empty(0), nothing, unreadable, missing, nothing), [])
        images, targets, failed = self._finisher(parcel, decoded)
        labels = parcel.targets.clone()
        self._free(parcel)
        return _Finished(Loaded(images, targets, unreadable, missing, labels), failed)

    def _free(self, parcel: Parcel) -> None:
        """Let loader processes have the slots of parcels that have been copied, this one's as soon as it has been."""
        if parcel.slot is None:
            return
        copied = None if self._device.type == "cpu" else torch.cuda.current_stream(self._device).record_event()
        self._copied.append((copied, parcel.slot))
        while self._copied and (self._copied[0][0] is None or self._copied[0][0].query()):
            self._copied.popleft()[1].free()

    def _mend(self, finished: _Finished, batch: Any) -> Loaded:
        """Images that neither the device nor Pillow could decode, replaced as any unreadable image is."""
        loaded = finished.loaded
        if not finished.failed:
            return loaded
        keys, lost, unreadable = batch[3], [], list(loaded.unreadable)
        labels = loaded.labels.clone()
        for row in finished.failed:
            image, label, problem = self.loader.dataset.whole(keys[row])
            unreadable += [problem] if problem else []
            if image is None:
                lost.append(row)
            else:
                loaded.images[row] = image.to(self._device)
                labels[row] = label
        kept = torch.tensor([row for row in range(len(labels)) if row not in lost], dtype=torch.int64)
        images = loaded.images[kept.to(self._device)] if lost else loaded.images
        labels = labels[kept]
        return Loaded(images, labels.to(self._device), unreadable, loaded.missing + len(lost), labels)


def _groups(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := list(itertools.islice(batches, size)):
        yield group


def _parts(decoding: _Ahead) -> Iterator[tuple[Any, Decoded | None, torch.cuda.Event]]:
    for group, done in decoding:
        for batch, decoded in group:
            yield batch, decoded, done


class _Finished(NamedTuple):
    loaded: Loaded
    failed: list[int]  # rows that could not be decoded


class _Ahead:
    """What a function makes of items, in a thread and on a stream, some items ahead: (made, when the stream has it)."""

    def __init__(
        self,
        items: Iterator[Any],
        function: Callable[[Any], Any],
        stream: torch.cuda.Stream,
        before: _Ahead | None = None,
    ) -> None:
        self._items, self._function, self._stream, self._before = items, function, stream, before
        self._ready: queue.Queue[Any] = queue.Queue(AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="images", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Any, torch.cuda.Event]]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def stop(self) -> None:
        """End the thread and the one before it; what they have in hand is dropped."""
        self._stopped.set()
        if self._before is not None:
            self._before.stop()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)  # it may be waiting for room
        with contextlib.suppress(queue.Full):
            self._ready.put_nowait(None)  # and whoever waits for it, for this

    def _work(self) -> None:
        try:
            with torch.cuda.stream(self._stream):
                for item in self._items:
                    if self._stopped.is_set():
                        break
                    made = self._function(item)
                    self._put((made, self._stream.record_event()))
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(item, timeout=1.0)
            except queue.Full:
                continue
