"""Samples on their way to a device: what loader processes make of an image in place of finishing it.

`Pixels` lets timm do all of augmentation on 8-bit pixels and leaves normalisation to the device; `Draws` only draws,
and leaves all else. Both are packed into parcels.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision import transforms

from images.decode import Unreadable, decode_plain, open_image, plain_jpeg, reason
from images.draws import TENSOR_STEPS, CannotDraw, Crop, Drawing, Drawn, Erasing
from images.order import Key, reseed, seeded
from images.parcel import JPEG, PIXELS, RESIDENT, Parcel, Sample, pack
from images.resident import Resident
from images.samples import Images, Stream
from images.slots import Slots

MOST_BYTES = 2**20  # of the pixels that are sent to a device for one small image
_MOST_BYTES_OF_A_FILE = 2**22  # of the pixels of a file that a device decodes, which it does for whole batches
_LONGEST = 2**13  # side of a box that a device resizes: its kernels have memory for each line of a batch
_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly


def most_bytes(size: int) -> int:
    """Of the pixels that are sent to a device for one image of that side: what is cut from larger photographs is made
    smaller first."""
    return max(MOST_BYTES, 2 * 3 * size * size)


class Opened(NamedTuple):
    """An image of which the size is known: its file, its pixels (height, width, 3), or its number where it is kept."""

    kind: int
    place: Any
    height: int
    width: int


class Pixels:
    """A transform, but for normalisation: 8-bit pixels and the boxes that are to be erased."""

    def __init__(self, transform: transforms.Compose, size: int) -> None:
        steps = [step for step in transform.transforms if not isinstance(step, (*TENSOR_STEPS, RandomErasing))]
        self._transform, self._erasing, self._size = transforms.Compose(steps), Erasing(transform), size
        self._crop = Crop(0, 0, size, size, size, size, 0, 0, bicubic=False)

    def open(self, content: bytes | Image.Image, position: int) -> Image.Image:
        """An image from its file. Raises whatever Pillow does."""
        return open_image(io.BytesIO(content)) if isinstance(content, bytes) else content

    def make(self, image: Image.Image, seed: int, *key: int) -> Sample:
        """The sample of an image, under the seed of that key."""
        with _seeded(seed, *key):
            pixels = np.asarray(self._transform(image))
            return Sample(pixels, PIXELS, Drawn(self._crop, False, (), self._erasing.draw(self._size)))


class Draws:
    """What a transform draws; the image stays a file, where the device decodes it, or whole pixels.

    share: of the files that a GPU can decode, those that it is given. resident: where the images are already.
    alone: (1,), of a GpuDecoder, where it is given them no longer.
    """

    alone: np.ndarray | None = None

    def __init__(
        self, transform: transforms.Compose, size: int, share: float, resident: Resident | None = None
    ) -> None:
        self._pixels, self.share, self.resident = Pixels(transform, size), share, resident
        self._drawing, self._most_bytes = Drawing(transform), most_bytes(size)

    def kept(self, index: int) -> Opened:
        """Image number `index`, where all are kept. Raises Unreadable."""
        return Opened(RESIDENT, index, *self.resident.size(index))

    def left_to_gpu(self, position: int) -> bool:
        """Whether the sample at that position stays a file, if its file is one that a GPU can decode."""
        return position * _GOLDEN % 1 < self.share and (self.alone is None or not self.alone[0])

    def open(self, content: bytes | Image.Image, position: int) -> Opened:
        """An image from its file. Raises whatever Pillow does."""
        if isinstance(content, bytes):
            size = plain_jpeg(content) if content.startswith(b"\xff\xd8") else None
            small = size is not None and 3 * math.prod(size) <= _MOST_BYTES_OF_A_FILE
            if small and len(content) <= self._most_bytes and self.left_to_gpu(position):
                return Opened(JPEG, content, *size)
            pixels = decode_plain(content) if size is not None else np.asarray(open_image(io.BytesIO(content)))
        else:
            pixels = np.asarray(content)
        return Opened(PIXELS, pixels, *pixels.shape[:2])

    def make(self, opened: Opened, seed: int, *key: int) -> Sample:
        """The sample of an image, under the seed of that key: all of it by Pillow, where the device has no operation
        for it, or no room. Raises Unreadable where only then a file proves to be damaged."""
        kind, place, height, width = opened
        try:
            with _seeded(seed, *key, numpy=self._drawing.by_numpy):
                drawn = self._drawing.draw(height, width)
        except CannotDraw:  # a rotation by 180 degrees, say
            drawn = None
        if drawn is None or self._too_large(kind, drawn.crop):
            return self._pixels.make(self._image(opened), seed, *key)
        if kind == PIXELS:
            crop = drawn.crop
            box = place[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
            place = box.copy()  # lets go of all
            drawn = drawn._replace(crop=crop._replace(top=0, left=0))
        return Sample(place, kind, drawn, (height, width))

    def _too_large(self, kind: int, crop: Crop) -> bool:
        sent = 3 * crop.height * crop.width if kind == PIXELS else 0
        return sent > self._most_bytes or max(crop.height, crop.width) > _LONGEST

    def _image(self, opened: Opened) -> Image.Image:
        if opened.kind == PIXELS:
            return Image.fromarray(opened.place)
        try:
            return open_image(io.BytesIO(opened.place)) if opened.kind == JPEG else self.resident.again(opened.place)
        except Exception as error:  # as for all images
            raise Unreadable(reason(error)) from None


def _seeded(seed: int, *key: int, numpy: bool = True) -> contextlib.AbstractContextManager[None]:
    """Seeded generators; in a loader process nobody else needs them, so they are not put back."""
    if get_worker_info() is None:
        return seeded(seed, *key)
    reseed(seed, *key, numpy=numpy)
    return contextlib.nullcontext()


class Told(NamedTuple):
    """What the main process is told of a sample."""

    key: Key | None  # None: of a stream
    problem: str | None  # what could not be read for it
    found: bool  # whether it is in the parcel


class PackedImages(Images):
    """A set of images as samples for parcels, each with its key: (sample or None, label, problem, key)."""

    def __init__(self, source: Any, transform: transforms.Compose, seed: int, attempts: int, maker: Pixels | Draws):
        super().__init__(source, transform, seed, attempts)
        self._maker = maker

    def __getitem__(self, key: Key) -> tuple[Sample | None, int, str | None, Key]:
        return *super().__getitem__(key), key

    def whole(self, key: Key) -> tuple[Tensor | None, int, str | None]:
        """The sample finished by Pillow and timm alone, as (image, label, problem)."""
        return Images(self._source, self._transform, self._seed, self._attempts)[key]

    def _form(self, position: int) -> Any:
        return isinstance(self._maker, Draws) and self._maker.left_to_gpu(position)

    def _read(self, index: int, position: int) -> tuple[Any, int]:
        if isinstance(self._maker, Draws) and self._maker.resident is not None:
            return self._maker.kept(index), self._maker.resident.label(index)
        content, target = self.content(index)
        return self._maker.open(content, position), target

    def _made(self, image: Any, *key: int) -> Sample:
        return self._maker.make(image, self._seed, *key)


class PackedStream(Stream):
    """A stream as samples for parcels: (sample, label, None, None)."""

    def __init__(self, source: Any, transform: transforms.Compose, seed: int, rank: int, maker: Pixels | Draws) -> None:
        super().__init__(source, transform, seed, rank)
        self._maker = maker

    def __iter__(self) -> Iterator[tuple[Sample, int, None, None]]:
        return ((*sample, None) for sample in super().__iter__())

    def _made(self, image: Image.Image, *key: int) -> Sample:
        # In a loader process the maker does not put the generators back; a stream's readers, which may draw from them
        # between two images, find them as they were.
        with seeded(self._seed, *key):
            return self._maker.make(self._maker.open(image, 0), self._seed, *key)


class Collate:
    """Samples to (parcel or None of nothing, what is told of each of them)."""

    def __init__(self, slots: Slots | None = None) -> None:
        self._slots = slots

    def __call__(
        self, samples: list[tuple[Sample | None, int, str | None, Key | None]]
    ) -> tuple[Parcel | None, list[Told]]:
        found = [(sample, target) for sample, target, *_ in samples if sample is not None]
        parcel = None
        if found:
            parcel = pack([sample for sample, _ in found], [target for _, target in found], self._slots)
        return parcel, [Told(key, problem, sample is not None) for sample, _, problem, key in samples]
