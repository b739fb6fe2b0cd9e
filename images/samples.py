"""Reading the samples of a set: in their order, under their seeds, with what could not be read reported.

All of this runs in the loader's worker processes, where there are any.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset
from timm.data.readers.shared_count import SharedCount
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder

from images.decode import Unreadable, open_file, open_image, reason, to_rgb
from images.order import AUGMENT, STREAM, Key, seeded
from images.tars import ImageTar

MAX_IN_A_ROW = 100  # unreadable images in a row: beyond this the disk is broken, not an image

Sample = tuple[Tensor | None, int, str | None]  # image (3, H, W) float32, label, what could not be read


class Images(Dataset[Sample]):
    """A set of (PIL image, label) read and then transformed under the sample's own seed.

    An unreadable image is replaced by the next readable one, up to `attempts` images in all, and reported. The views
    that repeated augmentation makes of an image follow one another where few processes train: it is read once then.
    """

    def __init__(self, source: Any, transform: transforms.Compose, seed: int, attempts: int) -> None:
        self._source, self._transform, self._seed, self._attempts = source, transform, seed, attempts
        self._last: dict[Any, tuple[int, tuple[Any, int]]] = {}  # by form: the index that was read last, what it gave

    @property
    def transform(self) -> transforms.Compose:
        return self._transform

    def packed(self, kind: Any, maker: Any) -> Any:
        """The same images as a dataset of that kind, which has `maker` make its samples."""
        return kind(self._source, self._transform, self._seed, self._attempts, maker)

    def __getitem__(self, key: Key) -> Sample:
        first, position, epoch = key
        problem = None
        for index in (i % len(self._source) for i in range(first, first + self._attempts)):
            try:
                image, target = self._read_once(index, position)
            except Exception as error:  # Pillow has no list of what it raises for a damaged file
                problem = problem or self._problem(index, error)
                continue
            try:
                return self._made(image, AUGMENT, epoch, position), target, problem
            except Unreadable as error:
                problem = problem or self._problem(index, error)
        return None, -1, problem

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """(RGB image, label) number `index`. Raises whatever Pillow does."""
        if isinstance(self._source, ImageDataset):  # past timm's own reading, which replaces unreadable images unasked
            stream, target = self._source.reader[index]
            with stream:
                return open_image(stream), int(target)
        if isinstance(self._source, ImageFolder):
            path, target = self._source.samples[index]
            return open_image(path), int(target)
        image, target = self._source[index]
        return to_rgb(image), int(target)

    def content(self, index: int) -> tuple[bytes | Image.Image, int]:
        """(the bytes of the image's file, or the RGB image where there is no file, label) number `index`."""
        if isinstance(self._source, ImageFolder):
            path, target = self._source.samples[index]
            with open_file(path) as file:
                return file.read(), int(target)
        if isinstance(self._source, ImageTar):
            return self._source.content(index), self._source.samples[index][1]
        if isinstance(self._source, ImageDataset):
            stream, target = self._source.reader[index]
            with stream:
                return stream.read(), int(target)
        return self.read(index)

    def _read_once(self, index: int, position: int) -> tuple[Any, int]:
        form = self._form(position)
        last, read = self._last.pop(form, (None, None))
        if last != index:
            del read  # lets go of that image before there is another
            read = self._read(index, position)
        self._last[form] = index, read
        return read

    def _form(self, position: int) -> Any:
        """What `_read` depends on besides the index."""

    def _read(self, index: int, position: int) -> tuple[Any, int]:
        return self.read(index)

    def _made(self, image: Any, *key: int) -> Any:
        """What the sample is of an image that has been read, under the seed of that key. Raises Unreadable where only
        a look at its header had been taken."""
        with seeded(self._seed, *key):
            return self._transform(image)

    def _problem(self, index: int, error: Exception) -> str:
        return f"{self._name(index)} cannot be read ({reason(error)})"

    def _name(self, index: int) -> str:
        if isinstance(self._source, ImageFolder):
            return self._source.samples[index][0]
        if isinstance(self._source, ImageTar):
            return self._source.filename(index)
        if isinstance(self._source, ImageDataset):
            name = self._source.filename(index, absolute=True)
            if isinstance(name, str) and name:  # readers without names give a label or nothing
                return os.path.join(getattr(self._source.reader, "root", None) or "", name)
        return f"image {index} of {type(self._source).__name__}"


class BrokenStream(Exception):  # noqa: N818 (of one argument, so that torch can raise it again in the main process)
    """A stream ended in an error. What is broken is the last line of its text; a worker's traceback may precede it."""


class Stream(IterableDataset[Sample]):
    """A stream of timm's; augmentation is a function of (run seed, epoch, worker, place in the worker's stream)."""

    def __init__(self, source: IterableImageDataset, transform: transforms.Compose, seed: int, rank: int) -> None:
        self._source, self._transform, self._seed, self._rank = source, transform, seed, rank
        self._name = getattr(source.reader, "root", None) or type(source.reader).__name__
        self._epoch = SharedCount()  # shared memory, for workers that outlive an epoch

    @property
    def transform(self) -> transforms.Compose:
        return self._transform

    def packed(self, kind: Any, maker: Any) -> Any:
        """The same stream as a dataset of that kind, which has `maker` make its samples."""
        return kind(self._source, self._transform, self._seed, self._rank, maker)

    def begin(self, epoch: int, start: int) -> None:
        self._epoch.value = epoch  # a stream cannot be entered in its middle, so `start` is not used
        self._source.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        info = torch.utils.data.get_worker_info()
        worker = self._rank * info.num_workers + info.id if info else self._rank
        images = enumerate(self._source)
        while True:
            try:
                position, (image, target) = next(images)
                image = to_rgb(image)
            except StopIteration:
                return
            except Exception as error:  # whatever the packages behind timm raise; no image follows
                raise BrokenStream(f"{self._name} cannot be read any further ({reason(error)})") from None
            yield self._made(image, STREAM, self._epoch.value, worker, position), int(target), None

    def _made(self, image: Image.Image, *key: int) -> Any:
        with seeded(self._seed, *key):
            return self._transform(image)


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str], int]:
    """Images (B, 3, H, W), labels (B,), what could not be read, and how many images the batch lacks for it."""
    found = [(image, target) for image, target, _ in samples if image is not None]
    images, targets = default_collate(found) if found else (torch.empty(0), torch.empty(0, dtype=torch.int64))
    return images, targets, [problem for *_, problem in samples if problem], len(samples) - len(found)
