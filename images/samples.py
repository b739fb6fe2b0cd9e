"""Reading the samples of a set: in their order, under their seeds, with what could not be read reported.

All of this runs in the loader's worker processes, where there are any.
"""

from __future__ import annotations

import os
import signal
import tarfile
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, IterableImageDataset
from timm.data.readers.shared_count import SharedCount
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder

from images.order import AUGMENT, STREAM, Key, seeded

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, tarfile.TarError, Image.DecompressionBombError)
MAX_IN_A_ROW = 100  # unreadable images in a row: beyond this the disk is broken, not an image

Sample = tuple[Tensor | None, int, str | None]  # image (3, H, W) float32, label, what could not be read


class Images(Dataset[Sample]):
    """A set of (PIL image, label) read and then transformed under the sample's own seed.

    An unreadable image is replaced by the next readable one, up to `attempts` images in all, and reported.
    """

    def __init__(self, source: Any, transform: transforms.Compose, seed: int, attempts: int) -> None:
        self._source, self._transform, self._seed, self._attempts = source, transform, seed, attempts

    def __getitem__(self, key: Key) -> Sample:
        first, position, epoch = key
        problem = None
        for index in (i % len(self._source) for i in range(first, first + self._attempts)):
            try:
                image, target = self._read(index)
            except _DECODE_ERRORS as error:
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
                problem = problem or f"{self._name(index)} cannot be read ({reason})"
                continue
            with seeded(self._seed, AUGMENT, epoch, position):
                return self._transform(image), target, problem
        return None, -1, problem

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if isinstance(self._source, ImageDataset):  # past timm's own reading, which replaces unreadable images unasked
            stream, target = self._source.reader[index]
            with stream:
                return Image.open(stream).convert("RGB"), int(target)
        image, target = self._source[index]
        return (image if image.mode == "RGB" else image.convert("RGB")), int(target)

    def _name(self, index: int) -> str:
        if isinstance(self._source, ImageFolder):
            return self._source.samples[index][0]
        if isinstance(self._source, ImageDataset):
            name = self._source.filename(index, absolute=True) or f"image {index}"
            return os.path.join(self._source.reader.root or "", name)
        return f"image {index} of {type(self._source).__name__}"


class Stream(IterableDataset[Sample]):
    """A stream of timm's; augmentation is a function of (run seed, epoch, worker, place in the worker's stream)."""

    def __init__(self, source: IterableImageDataset, transform: transforms.Compose, seed: int, rank: int) -> None:
        self._source, self._transform, self._seed, self._rank = source, transform, seed, rank
        self._epoch = SharedCount()  # shared memory, for workers that outlive an epoch

    def begin(self, epoch: int, start: int) -> None:
        self._epoch.value = epoch  # a stream cannot be entered in its middle, so `start` is not used
        self._source.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        info = torch.utils.data.get_worker_info()
        worker = self._rank * info.num_workers + info.id if info else self._rank
        for position, (image, target) in enumerate(self._source):
            with seeded(self._seed, STREAM, self._epoch.value, worker, position):
                sample = self._transform(image), int(target), None
            yield sample


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str], int]:
    """Images (B, 3, H, W), labels (B,), what could not be read, and how many images the batch lacks for it."""
    found = [(image, target) for image, target, _ in samples if image is not None]
    images, targets = default_collate(found) if found else (torch.empty(0), torch.empty(0, dtype=torch.int64))
    return images, targets, [problem for *_, problem in samples if problem], len(samples) - len(found)


def outlive_signals(worker_id: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a group; the main one saves and then ends its workers.

    A second SIGTERM ends a worker: it is what the main process sends to one that does not leave by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
