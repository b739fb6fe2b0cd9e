"""Batches made on the device: JPEG files decoded, images cropped, changed, normalised and erased, all at once.

The pixels are those of the same draws by Pillow (replay.py), bit for bit, but for JPEG files that the GPU decodes: its
decoder rounds and interpolates colours differently from libjpeg.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from images import parcel as columns
from images.decode import decode_plain, open_image
from images.jpegs import GpuDecoder
from images.parcel import JPEG, PIXELS, RESIDENT, Parcel, drawn_of, fill, merge, room_for
from images.replay import erase, normalise, replay
from images.resident import Resident

# Pixels of a program; fewer of an operation, since bicubic transforms take many registers.
PIXELS_AT_A_TIME, PIXELS_OF_AN_OPERATION = 1024, 256
THREADS = 8  # that decode what the GPU does not


class Decoded(NamedTuple):
    """JPEG files of a parcel: images by row, seen as (3, height, width) uint8, and rows that nothing decodes to
    the size that their files say."""

    images: dict[int, Tensor]
    failed: list[int]


class Finisher:
    """From parcels to batches on a device, by the kernels on a GPU and by Pillow on a CPU.

    pin: whether memory is pinned for copies to a GPU. decoder: of files that were left to the GPU.
    """

    def __init__(
        self,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        resident: Resident | None = None,
        *,
        pin: bool = True,
        decoder: GpuDecoder | None = None,
    ) -> None:
        self._size, self._mean, self._std, self._device, self._resident = size, mean, std, device, resident
        every_level = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
        self._pin, self.decoder = pin, decoder or GpuDecoder(device)
        self._levels = normalise(every_level, mean, std).reshape(3, 256).to(device)

    def __call__(self, parcels: Sequence[Parcel], decoded: Decoded | None = None) -> tuple[Tensor, Tensor, list[int]]:
        """(images (B, 3, size, size) float32, labels (B,) int64, both on the device, rows that could not be decoded, or
        not to the size that their files say, and hold anything) of a batch.

        decoded: what `decode` has made of it, if it was asked before.
        """
        if self._device.type == "cpu" and not _interpreted():
            return self._by_pillow(parcels)
        decoded = self.decode(parcels) if decoded is None else decoded
        merged, rests = merge(parcels)
        here = room_for(merged, rests, self._device)
        self._place(merged, here, decoded.images)
        fill(here, _pinned(merged) if self._device.type == "cuda" and self._pin else merged, rests)
        return augment(here, self._levels, self._size), here.targets.clone(), decoded.failed

    def _by_pillow(self, parcels: Sequence[Parcel]) -> tuple[Tensor, Tensor, list[int]]:
        places = _places(parcels)
        out, failed = torch.zeros(len(places), 3, self._size, self._size), []
        for number, (parcel, row) in enumerate(places):
            drawn = drawn_of(parcel, row)
            try:
                image = self._opened(parcel, row)
            except Exception:  # as for all images
                failed.append(number)
                continue
            pixels = torch.from_numpy(np.array(replay(image, drawn, self._size)))
            out[number] = normalise(pixels.permute(2, 0, 1), self._mean, self._std)
            erase(out[number], drawn.boxes)
        return out, torch.cat([parcel.targets for parcel in parcels]), failed

    def _opened(self, parcel: Parcel, row: int) -> Image.Image:
        image = parcel.images[row].tolist()
        start, kind = image[columns.START], image[columns.KIND]
        if kind == RESIDENT:
            return Image.fromarray(self._resident.array(start))
        content = parcel.source[start : start + image[columns.LENGTH]].numpy()
        if kind == JPEG:
            return open_image(io.BytesIO(content.tobytes()))
        return Image.fromarray(content.reshape(-1, image[columns.ROW] // 3, 3))

    def decode(self, parcels: Sequence[Parcel]) -> Decoded:
        """The JPEG files of a batch, decoded on the device; this waits for it."""
        places, before = [], 0
        for parcel in parcels:
            rows = (parcel.images[:, columns.KIND] == JPEG).nonzero().flatten().tolist()
            places += [(before + row, parcel, row) for row in rows]
            before += len(parcel)
        files = [_file(parcel, row) for _, parcel, row in places]
        shapes = [(3, *parcel.images[row, [columns.ROW, columns.PIXEL]].tolist()) for _, parcel, row in places]
        images = self.decoder(files) if self._device.type == "cuda" else [None] * len(files)
        # The kernels read as far as the file says that the image goes.
        fits = [image is not None and image.shape == shape for image, shape in zip(images, shapes, strict=True)]
        left = [file for file, fit in zip(files, fits, strict=True) if not fit]
        with ThreadPoolExecutor(THREADS) as threads:  # which it starts as it needs them
            others = threads.map(_by_libjpeg, left)
        decoded, failed = {}, []
        for (number, *_), shape, image, fit in zip(places, shapes, images, fits, strict=True):
            if not fit:
                image = next(others)
                if image is None or image.shape != shape:
                    image, failed = torch.zeros((), dtype=torch.uint8).expand(shape), [*failed, number]
                image = image.to(self._device)
            decoded[number] = image
        return Decoded(decoded, failed)

    def _place(self, merged: Parcel, here: Parcel, decoded: dict[int, Tensor]) -> None:
        """Addresses into the table of a batch: where on the device each image is, or will be."""
        images = merged.images
        kinds = images[:, columns.KIND]
        images[:, columns.START] += torch.where(kinds == PIXELS, here.memory.data_ptr() + here.layout["source"][0], 0)
        if self._resident is not None:
            resident = kinds == RESIDENT
            places = images[resident, columns.START]
            images[resident, columns.START] = self._resident.addresses[places]
            images[resident, columns.ROW] = 3 * self._resident.widths[places]
        for row, image in decoded.items():
            strides = image.stride()
            images[row, : columns.CHANNEL + 1] = torch.tensor([image.data_ptr(), strides[1], strides[2], strides[0]])


def _places(parcels: Sequence[Parcel]) -> list[tuple[Parcel, int]]:
    """(parcel, row in it) of each image of a batch."""
    return [(parcel, row) for parcel in parcels for row in range(len(parcel))]


def _file(parcel: Parcel, row: int) -> Tensor:
    """A file of a parcel, (bytes,) uint8."""
    start, length = parcel.images[row, [columns.START, columns.LENGTH]].tolist()
    return parcel.source[start : start + length]


def _by_libjpeg(file: Tensor) -> Tensor | None:
    """(3, height, width) of a JPEG file; None where it cannot be decoded."""
    try:
        return torch.from_numpy(decode_plain(file.numpy().tobytes())).permute(2, 0, 1)
    except Exception:  # as for all images
        return None


def _pinned(parcel: Parcel) -> Parcel:
    return Parcel(parcel.memory.pin_memory(), parcel.layout, parcel.extent)


def augment(parcel: Parcel, levels: Tensor, size: int) -> Tensor:
    """Images (B, 3, size, size) float32 of a parcel on the device whose table holds addresses."""
    k, count, device = _kernels(), len(parcel), parcel.memory.device
    images, extent = parcel.images, parcel.extent

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # The boxes resized, along one axis and along the other.
    taps = extent.taps
    weights, bounds = empty(count, 2, taps, size, dtype=torch.int32), empty(count, 2, size, dtype=torch.int32)
    between, planes = empty(3, extent.lines, size), empty(2, count, 3, size, size)
    wide, high = min(64, _power_of_two(size)), 8
    across = -(-size // wide)
    _launch(k.weights_kernel, (count, 2, across), images, weights, bounds, size, taps, wide)
    resizing = images, weights, bounds, between, extent.lines
    _launch(k.lines_kernel, (count, -(-extent.most // high), across), *resizing, size, taps, high, wide)
    _launch(k.across_kernel, (count, -(-size // high), 3 * across), *resizing, planes, size, taps, high, wide)

    # Operations, turn by turn, from one half of the planes to the other.
    block, few = (min(most, _power_of_two(size * size)) for most in (PIXELS_AT_A_TIME, PIXELS_OF_AN_OPERATION))
    blocks = -(-size * size // block)
    tables = empty(count, 3, 256)
    for turn in range(len(parcel.operations)):
        told, source, target = (parcel.operations[turn], parcel.values[turn]), planes[turn % 2], planes[1 - turn % 2]
        if turn in extent.looking:
            _launch(k.statistics_kernel, (count, 3), *told, source, tables, size, block)
        _launch(
            k.operate_kernel, (count, -(-size * size // few)), *told, parcel.tables, tables, source, target, size, few
        )
        if turn in extent.blurring:
            other = torch.empty_like(target)
            passes = [(source, other), *[(other, target), (target, other)] * 2, (other, target)]
            for number, (one, two) in enumerate(passes):
                steps = (1, size) if number < 3 else (size, 1)  # three along rows, three along columns
                _launch(k.blur_kernel, (count, blocks), *told, one, two, size, *steps, block)

    out, half = empty(count, 3, size, size, dtype=torch.float32), planes[0].numel()
    erasing = levels, parcel.boxes, parcel.noise, out
    _launch(k.finish_kernel, (count, 3, blocks), images, planes, half, *erasing, size, block)
    return out


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, enable_fp_fusion=False)


def _power_of_two(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


@functools.cache
def _kernels() -> ModuleType:
    """The kernels; imported where there is something for them to do, since there is no Triton for every machine."""
    from images import kernels

    return kernels


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
