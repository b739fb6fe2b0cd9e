"""A small set decoded once and for all: its pixels in memory that loader processes share, and on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from images.decode import reason
from images.samples import Images

_ASKED = 64  # images whose sizes tell how large a set is


class Unreadable(OSError):  # noqa: N818
    """An image of a kept set could not be read; the text is why."""


class Resident:
    """The images of a set as (height, width, 3) uint8, one after the other; what could not be read has no pixels."""

    def __init__(self, decoded: Decoded, device: torch.device) -> None:
        self._decoded = decoded
        sizes = 3 * decoded.heights * decoded.widths
        self.widths, self.starts = decoded.widths, sizes.cumsum(0) - sizes
        self.on_device = decoded.pixels.to(device)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def nbytes(self) -> int:
        return self.on_device.nbytes

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of an image. Raises Unreadable."""
        if index in self._decoded.problems:
            raise Unreadable(self._decoded.problems[index])
        return int(self._decoded.heights[index]), int(self._decoded.widths[index])

    def label(self, index: int) -> int:
        return int(self._decoded.labels[index])

    def array(self, index: int) -> np.ndarray:
        """An image (height, width, 3)."""
        height, width = self.size(index)
        start = int(self.starts[index])
        return self._decoded.pixels[start : start + 3 * height * width].view(height, width, 3).numpy()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on_device": None}  # for loader processes that are not forked


class Decoded(NamedTuple):
    """A set, or a part of one: pixels (bytes,) uint8; heights, widths, labels (images,) int64; why some have none."""

    pixels: Tensor
    heights: Tensor
    widths: Tensor
    labels: Tensor
    problems: dict[int, str]


class _Decoding(Dataset[tuple[np.ndarray, int, str | None]]):
    def __init__(self, images: Images) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, str | None]:
        try:
            image, label = self._images.read(index)
        except Exception as error:  # as in Images
            return np.zeros((0, 0, 3), np.uint8), -1, reason(error)
        return np.asarray(image), label, None


def _collate(decoded: list[tuple[np.ndarray, int, str | None]]) -> Decoded:
    arrays, labels, reasons = zip(*decoded, strict=True)
    return Decoded(
        torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays])),
        torch.tensor([array.shape[0] for array in arrays]),
        torch.tensor([array.shape[1] for array in arrays]),
        torch.tensor(labels),
        {place: why for place, why in enumerate(reasons) if why is not None},
    )


def decoded_bytes(images: Images) -> float:
    """About how many bytes the pixels of a set take, by the sizes of some of its images."""
    decoding = _Decoding(images)
    indices = {n * len(images) // _ASKED for n in range(_ASKED)}
    sizes = [decoding[index][0].nbytes for index in sorted(indices)]
    return len(images) * sum(sizes) / max(1, len(sizes))


def keep(
    images: Images, limit: float, device: torch.device, loader: Callable[[Dataset, Any], DataLoader]
) -> Resident | None:
    """All images of a set, decoded and on the device; None where they would take more than `limit` bytes of it.

    loader: makes a loader of a set, for that collate function.
    """
    if not len(images) or decoded_bytes(images) > limit:
        return None
    parts, filled, bytes_so_far = [], 0, 0
    for part in loader(_Decoding(images), _collate):
        problems = {filled + place: why for place, why in part.problems.items()}
        parts.append(part._replace(problems=problems))
        filled += len(part.labels)
        bytes_so_far += part.pixels.nbytes
        if bytes_so_far > limit:
            return None
    pixels, heights, widths, labels = (torch.cat(tensors) for tensors in list(zip(*parts, strict=True))[:4])
    problems = {index: why for part in parts for index, why in part.problems.items()}
    return Resident(Decoded(pixels, heights, widths, labels, problems), device)
