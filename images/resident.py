"""A small set decoded once and for all: its pixels on the device, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from images.decode import Unreadable, reason
from images.samples import Images

_ASKED = 64  # images whose sizes tell how large a set is
_PART, _PART_BYTES = 256, 2**23  # images that a loader process decodes at a time, and about the most bytes of them
_BLOCK_BYTES = 2**26  # that are gathered in the host's memory before they go to the device


class Decoded(NamedTuple):
    """A part of a set, as a loader process sends it: as bytes, since each tensor would hold a file open here."""

    pixels: np.ndarray  # (bytes,) uint8, the images in a row
    sizes: np.ndarray  # (images, 2) int64: heights and widths
    labels: np.ndarray  # (images,) int64
    problems: dict[int, str]  # why some have no pixels, by their place in the part


class Resident:
    """Images of a set as (height, width, 3) uint8 in blocks on the device; what could not be read has no pixels.

    All is by an image's number in the set; of numbers that are not kept nothing is known.
    """

    def __init__(self, images: Images, device: torch.device) -> None:
        self._images, self._device = images, device
        count = len(images)
        self.widths, self._heights, self._labels = (torch.zeros(count, dtype=torch.int64) for _ in range(3))
        self.addresses = torch.zeros(count, dtype=torch.int64)  # of an image's first byte on the device
        self._places = torch.full((count, 2), -1)  # its block, and its first byte there
        self._blocks: list[Tensor] = []
        self._gathered: list[np.ndarray] = []  # of the next block
        self._problems: dict[int, str] = {}
        self._count = self.nbytes = 0

    def __len__(self) -> int:
        return self._count

    def add(self, indices: Sequence[int], decoded: Decoded) -> None:
        """Keep these images of the set."""
        before = sum(pixels.size for pixels in self._gathered)
        numbers, sizes = torch.tensor(indices), torch.from_numpy(decoded.sizes)
        lengths = 3 * sizes.prod(dim=1)
        self._heights[numbers], self.widths[numbers] = sizes.unbind(dim=1)
        self._labels[numbers] = torch.from_numpy(decoded.labels)
        self._places[numbers, 0], self._places[numbers, 1] = len(self._blocks), before + lengths.cumsum(0) - lengths
        self._problems |= {indices[place]: why for place, why in decoded.problems.items()}
        self._gathered.append(decoded.pixels)
        self._count, self.nbytes = self._count + len(indices), self.nbytes + decoded.pixels.size
        if before + decoded.pixels.size >= _BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Bring to the device what has been gathered for it."""
        if self._gathered:
            block = torch.from_numpy(np.concatenate(self._gathered)).to(self._device)
            here = self._places[:, 0] == len(self._blocks)
            self.addresses[here] = block.data_ptr() + self._places[here, 1]
            self._blocks.append(block)
            self._gathered.clear()

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of an image. Raises Unreadable."""
        if index in self._problems:
            raise Unreadable(self._problems[index])
        return int(self._heights[index]), int(self.widths[index])

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def array(self, index: int) -> np.ndarray:
        """An image (height, width, 3), where the device is the CPU."""
        height, width = self.size(index)
        block, start = self._places[index].tolist()
        return self._blocks[block][start : start + 3 * height * width].view(height, width, 3).numpy()

    def again(self, index: int) -> Image.Image:
        """An image, from its file: loader processes have no other pixels of it. Raises whatever Pillow does."""
        return self._images.read(index)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": []}  # for loader processes that are not forked


class _Decoding(Dataset[tuple[np.ndarray, int, str | None]]):
    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self._images, self._indices = images, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> tuple[np.ndarray, int, str | None]:
        try:
            image, label = self._images.read(self._indices[place])
        except Exception as error:  # as in Images
            return np.zeros((0, 0, 3), np.uint8), -1, reason(error)
        return np.asarray(image), label, None


def _collate(decoded: list[tuple[np.ndarray, int, str | None]]) -> Decoded:
    arrays, labels, reasons = zip(*decoded, strict=True)
    return Decoded(
        np.concatenate([array.reshape(-1) for array in arrays]),
        np.array([array.shape[:2] for array in arrays], np.int64),
        np.array(labels, np.int64),
        {place: why for place, why in enumerate(reasons) if why is not None},
    )


def mean_bytes(images: Images, indices: Sequence[int]) -> float:
    """About how many bytes the pixels of one of these images take, by the sizes of some that can be read."""
    decoding = _Decoding(images, indices)
    asked = [decoding[place] for place in sorted({n * len(indices) // _ASKED for n in range(_ASKED)})]
    sizes = [pixels.nbytes for pixels, _, why in asked if why is None]
    return sum(sizes) / max(1, len(sizes))


def keep(
    images: Images,
    indices: Sequence[int],
    limit: float,
    device: torch.device,
    load: Callable[[Dataset, Any, int], Iterable[Decoded]],
) -> Resident | None:
    """These images of a set, decoded and on the device; None where they would take more than `limit` bytes of it.

    load: the batches of a set by a collate function, so many images each. Of the host's memory it takes little more
    than the loader processes have in hand, where the device has memory of its own.
    """
    if not indices or (mean := mean_bytes(images, indices)) * len(indices) > limit:
        return None
    resident = Resident(images, device)
    for part in load(_Decoding(images, indices), _collate, max(1, min(_PART, int(_PART_BYTES // max(1.0, mean))))):
        resident.add(indices[len(resident) : len(resident) + len(part.labels)], part)
        if resident.nbytes > limit:
            return None
    resident.flush()
    return resident
