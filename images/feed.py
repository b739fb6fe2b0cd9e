"""Batches from loader processes to the device: finished there by a thread of its own, some batches ahead."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from images.gpu import Decoded, Finisher
from images.order import Pieces
from images.packed import Told
from images.parcel import Parcel
from images.slots import Slot
from images.workers import Leash

AHEAD = 2  # finished batches that wait for the model
PATIENCE = 5.0  # seconds for a thread to end that may wait for a file
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

    order: of the samples, which `begin` sets to an epoch.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        finisher: Finisher | None,
        leash: Leash | None,
        order: Any,
    ) -> None:
        self.loader, self._device, self._finisher, self._leash, self.order = loader, device, finisher, leash, order
        self._streams: list[torch.cuda.Stream] = []
        self._thread: _Ahead | None = None
        self._copied: deque[tuple[torch.cuda.Event | None, Slot]] = deque()

    def __iter__(self) -> Iterator[Loaded]:
        self.stop()
        loaded = iter(self.loader)  # by the main thread, which torch tells of its processes' ends
        if self._leash is not None:
            self._leash.started()
        if self._finisher is None:
            for images, targets, unreadable, missing in loaded:
                yield Loaded(images.to(self._device), targets.to(self._device), unreadable, missing, targets)
            return
        batches = _whole(loaded, self.loader.batch_sampler)
        if self._device.type == "cpu" or not self.loader.num_workers:
            # A loader without processes draws from the generators of this one, which a thread would disturb.
            yield from (self._mend(self._finish(batch, None), batch) for batch in batches)
            return
        self._streams = self._streams or [torch.cuda.Stream(self._device, priority=PRIORITY) for _ in range(2)]
        # The GPU's decoder is waited for, by a thread that does nothing else.
        decoding = _Ahead(batches, self._decode, self._streams[0])
        self._thread = finishing = _Ahead(decoding, self._finish_decoded, self._streams[1], before=decoding)
        try:
            for (finished, batch), done in finishing:
                current = torch.cuda.current_stream(self._device)
                current.wait_event(done)
                if finished.loaded.images.is_cuda:  # else it is a batch of nothing
                    finished.loaded.images.record_stream(current)
                    finished.loaded.targets.record_stream(current)
                yield self._mend(finished, batch)
        finally:
            if self._thread is finishing:  # and not that of a later pass
                self.stop(PATIENCE)

    def held(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which the GPU's JPEG decoder waits: what its library does in the midst of a recording is not
        for us to say."""
        return contextlib.nullcontext() if self._finisher is None else self._finisher.decoder.held

    def stop(self, patience: float = math.inf) -> None:
        """End the threads of an earlier pass, if there are any, and wait for their copies out of slots.

        patience: seconds to wait for threads that wait for a loader process; then they end when they hear of it.
        """
        if self._thread is not None and self._thread.stop(patience):
            self._thread = None
        if self._thread is None:
            while self._copied:
                copied, slot = self._copied.popleft()
                if copied is not None:
                    with contextlib.suppress(RuntimeError):  # of a device that fails: nothing is copied any more
                        copied.synchronize()
                slot.free()

    def _decode(self, batch: _Batch) -> tuple[_Batch, Decoded]:
        return batch, self._finisher.decode(batch.parcels)

    def _finish_decoded(self, item: tuple[tuple[_Batch, Decoded], torch.cuda.Event]) -> tuple[_Finished, _Batch]:
        (batch, decoded), done = item
        self._streams[1].wait_event(done)
        for image in decoded.images.values():
            image.record_stream(self._streams[1])
        return self._finish(batch, decoded), batch

    def _finish(self, batch: _Batch, decoded: Decoded | None) -> _Finished:
        if not batch.parcels:
            nothing = torch.empty(0, dtype=torch.int64)
            return _Finished(Loaded(torch.empty(0), nothing, batch.unreadable, batch.missing, nothing), [])
        # The largest first: by the first of all the room of every slot is chosen.
        for parcel in sorted(batch.parcels, key=lambda parcel: -parcel.memory.numel()):
            if parcel.slot is not None and self._device.type == "cuda":
                parcel.slot.pin(parcel.memory.numel())
        try:
            images, targets, failed = self._finisher(batch.parcels, decoded)
            labels = torch.cat([parcel.targets for parcel in batch.parcels])
        finally:
            self._free(batch.parcels)  # copies may be under way even where it has failed
        return _Finished(Loaded(images, targets, batch.unreadable, batch.missing, labels), failed)

    def _free(self, parcels: list[Parcel]) -> None:
        """Let loader processes have the slots of parcels that have been copied, these as soon as they have been."""
        copied = None if self._device.type == "cpu" else torch.cuda.current_stream(self._device).record_event()
        self._copied += [(copied, parcel.slot) for parcel in parcels if parcel.slot is not None]
        while self._copied and (self._copied[0][0] is None or self._copied[0][0].query()):
            self._copied.popleft()[1].free()

    def _mend(self, finished: _Finished, batch: _Batch) -> Loaded:
        """Images that were not decoded to the size that their files say, replaced as any unreadable images are."""
        loaded = finished.loaded
        if not finished.failed:
            return loaded
        told, lost = list(batch.told), []
        places = [place for place, sample in enumerate(told) if sample.found]  # of the parcels' rows
        labels = loaded.labels.clone()
        for row in finished.failed:
            sample = told[places[row]]
            # The search starts anew: it meets what the loader process has replaced already, and that is said.
            image, label, problem = self.loader.dataset.whole(sample.key)
            told[places[row]] = sample._replace(problem=sample.problem or problem, found=image is not None)
            if image is None:
                lost.append(row)
            else:
                loaded.images[row] = image.to(self._device)
                labels[row] = label
        kept = torch.tensor([row for row in range(len(labels)) if row not in lost], dtype=torch.int64)
        images = loaded.images[kept.to(self._device)] if lost else loaded.images
        batch = _Batch(batch.parcels, told)
        return Loaded(images, labels[kept].to(self._device), batch.unreadable, batch.missing, labels[kept])


class _Batch(NamedTuple):
    """The pieces of a batch, as loader processes have made them."""

    parcels: list[Parcel]
    told: list[Told]

    @property
    def unreadable(self) -> list[str]:
        return [sample.problem for sample in self.told if sample.problem]

    @property
    def missing(self) -> int:
        return sum(not sample.found for sample in self.told)


def _whole(pieces: Iterator[Any], sampler: Any) -> Iterator[_Batch]:
    """Batches from their pieces, where a sampler has cut them up."""
    batch = _Batch([], [])
    for parcel, told in pieces:
        batch = _Batch(batch.parcels if parcel is None else [*batch.parcels, parcel], batch.told + told)
        if not isinstance(sampler, Pieces) or sampler.ends.popleft():
            yield batch
            batch = _Batch([], [])


class _Finished(NamedTuple):
    loaded: Loaded
    failed: list[int]  # rows of images that are to be replaced


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

    def stop(self, patience: float) -> bool:
        """End the thread and the one before it; what they have in hand is dropped. Whether they ended.

        patience: seconds to wait for each.
        """
        self._stopped.set()
        ended = self._before is None or self._before.stop(patience)
        end = time.monotonic() + patience
        while self._thread.is_alive() and time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)  # it may be waiting for room
        with contextlib.suppress(queue.Full):
            self._ready.put_nowait(None)  # and whoever waits for it, for this
        return ended and not self._thread.is_alive()

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
