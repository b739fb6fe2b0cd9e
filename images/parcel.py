"""A batch on its way to the device: pixels or JPEG bytes, what was drawn for each image, all in one stretch of bytes.

A loader process packs it, so that the main process has one thing to receive, to pin and to copy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from images.draws import AUTO_CONTRAST, BLUR, CONTRAST, EQUALIZE, TABLE, VALUES, Box, Crop, Drawn, Operation
from images.slots import Slot, Slots

PIXELS, JPEG, RESIDENT = range(3)  # an image's pixels (height, width, 3); its file; its number in a Resident

# Columns of `images`, int64, a row for each image.
# Of the image's memory: first byte, and steps between rows, pixels, channels. Of a file: first byte, height, width.
START, ROW, PIXEL, CHANNEL = range(4)
TOP, LEFT, HEIGHT, WIDTH, TO_HEIGHT, TO_WIDTH, DOWN, RIGHT, BICUBIC = range(4, 13)  # Crop
FLIP, OPERATIONS, FIRST_BOX, BOXES, BETWEEN, COLUMNS_FIRST, KIND, LENGTH = range(13, 21)
COLUMNS = 21
# Columns of `operations`, int32: kind, row of `tables`, interpolation, fill as 0xRRGGBB.
OF_OPERATION = 4
# Columns of `boxes`, int64: top, left, height, width, first number of `noise`, whether there is one for each pixel.
OF_BOX = 6
# Sections that `merge` makes anew; behind them lie noise and source, which are most of a parcel.
_SMALL = ("images", "operations", "values", "boxes", "tables", "targets")


class Sample(NamedTuple):
    """An image as a loader process leaves it."""

    place: Any  # PIXELS: (height, width, 3) uint8, the crop's box alone; JPEG: bytes; RESIDENT: Resident's place
    kind: int
    drawn: Drawn
    size: tuple[int, int] | None = None  # JPEG: height and width, as the file says


class Extent(NamedTuple):
    """What sizes and turns the kernels are to be launched for."""

    lines: int  # of the half-resized boxes of all images
    most: int  # of one image
    taps: int  # the most pixels of a row or column that a resized pixel is made of
    looking: tuple[int, ...]  # turns with an operation that depends on the whole image
    blurring: tuple[int, ...]  # turns with a blur


@dataclass
class Parcel:
    """A batch of images, packed: its sections are attributes, views of `memory` (uint8) on whatever device that is.

    images, operations, values, boxes, tables, targets (B,) int64, noise, source: the images themselves.
    """

    memory: Tensor
    layout: dict[str, tuple[int, tuple[int, ...], torch.dtype]]  # section: first byte, shape, dtype
    extent: Extent
    slot: Slot | None = None  # whose memory it is, in a process that shares it

    def __getattr__(self, name: str) -> Tensor:
        try:
            start, shape, dtype = self.layout[name]
        except KeyError:
            raise AttributeError(name) from None
        count = math.prod(shape) * dtype.itemsize
        return self.memory[start : start + count].view(dtype).view(shape)

    @property
    def rest(self) -> Tensor:
        """Noise and source, (bytes,) uint8, of a parcel that `pack` has made."""
        return self.memory[self.layout["noise"][0] :]

    def __reduce__(self) -> tuple:
        if self.slot is None:
            return Parcel, (self.memory, self.layout, self.extent)
        return _unpacked, (self.slot, self.memory.numel(), self.layout, self.extent)

    def __len__(self) -> int:
        return self.layout["images"][1][0]


def _unpacked(slot: Slot, size: int, layout: dict, extent: Extent) -> Parcel:
    return Parcel(slot.memory(size), layout, extent, slot)


def pack(samples: Sequence[Sample], targets: Sequence[int] = (), slots: Slots | None = None) -> Parcel:
    """Samples to a parcel, in a slot if there is a free one. targets: their labels."""
    rounds = max((len(sample.drawn.operations) for sample in samples), default=0)
    images = np.zeros((len(samples), COLUMNS), np.int64)
    operations = np.zeros((rounds, len(samples), OF_OPERATION), np.int32)
    values = np.zeros((rounds, len(samples), VALUES), np.float64)
    tables: list[bytes] = []
    boxes: list[Box] = []
    for row, sample in enumerate(samples):
        drawn = sample.drawn
        images[row, TOP : BICUBIC + 1] = drawn.crop
        images[row, FLIP : BOXES + 1] = drawn.flip, len(drawn.operations), len(boxes), len(drawn.boxes)
        images[row, KIND] = sample.kind
        boxes += drawn.boxes
        for turn, operation in enumerate(drawn.operations):
            red, green, blue = operation.fill
            fill = red << 16 | green << 8 | blue
            operations[turn, row] = operation.kind, len(tables), operation.bicubic, fill
            if operation.table:
                tables.append(operation.table)
            numbers = operation.values
            if operation.kind == BLUR:
                numbers = *numbers, *box_blur(*numbers)
            values[turn, row, : len(numbers)] = numbers
    assert images[:, HEIGHT : WIDTH + 1].min(initial=1) > 0, "kernels would read beside a box of nothing"
    images[:, COLUMNS_FIRST] = _columns_first(images)
    lines = np.where(images[:, COLUMNS_FIRST], images[:, WIDTH], images[:, HEIGHT])
    images[:, BETWEEN] = np.cumsum(lines) - lines  # of the half-resized images before this one
    placed, noise = _place_boxes(boxes)
    pieces = _place_images(samples, images)
    looked_up = np.frombuffer(b"".join(tables), np.uint8).reshape(len(tables), 256)
    sections = {"images": images, "operations": operations, "values": values, "boxes": placed}
    sections |= {"tables": looked_up, "targets": np.array(targets, np.int64), "noise": noise}
    return _write(sections, pieces, _extent(images, operations, lines), slots)


def _extent(images: np.ndarray, operations: np.ndarray, lines: np.ndarray) -> Extent:
    boxes, to = images[:, HEIGHT : WIDTH + 1].astype(np.float64), images[:, TO_HEIGHT : TO_WIDTH + 1]
    support = np.maximum(boxes / to, 1) * (1 + images[:, BICUBIC, None])
    kinds = operations[:, :, 0]
    looking = np.isin(kinds, (AUTO_CONTRAST, EQUALIZE, CONTRAST)).any(axis=1).nonzero()[0]
    blurring = (kinds == BLUR).any(axis=1).nonzero()[0]
    return Extent(
        lines=int(lines.sum()),
        most=int(lines.max()),
        taps=2 * int(np.ceil(support.max())) + 1,
        looking=tuple(looking.tolist()),
        blurring=tuple(blurring.tolist()),
    )


def _columns_first(images: np.ndarray) -> np.ndarray:
    """Whether Pillow resizes the columns of a box before its rows: those that get much shorter, since Pillow 13."""
    less = images[:, HEIGHT : WIDTH + 1] - images[:, TO_HEIGHT : TO_WIDTH + 1]
    return _has_columns_first() & (less[:, 0] > 0) & (less[:, 0] > 2 * less[:, 1])


@functools.cache
def _has_columns_first() -> bool:
    """Whether the Pillow that is installed ever does so: by what it makes of noise."""
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 24)).astype(np.uint8))
    rows_first = noise.resize((16, 64), Image.Resampling.BICUBIC).resize((16, 16), Image.Resampling.BICUBIC)
    return np.asarray(noise.resize((16, 16), Image.Resampling.BICUBIC)).tobytes() != rows_first.tobytes()


def _place_boxes(boxes: list[Box]) -> tuple[np.ndarray, np.ndarray]:
    placed, noise, filled = np.zeros((len(boxes), OF_BOX), np.int64), [], 0
    for row, box in enumerate(boxes):
        placed[row] = *box[:4], filled, box.pixels.numel() != 3  # none, of a box of no pixels
        noise.append(box.pixels.numpy().ravel())
        filled += noise[-1].size
    return placed, np.concatenate(noise) if noise else np.zeros(0, np.float32)


def _place_images(samples: Sequence[Sample], images: np.ndarray) -> list[np.ndarray]:
    """The images' bytes in a row; where each begins, and how its pixels lie, goes into `images`."""
    pieces, filled = [], 0
    for row, sample in enumerate(samples):
        if sample.kind == RESIDENT:
            images[row, START] = sample.place
            images[row, [ROW, PIXEL, CHANNEL]] = 0, 3, 1  # the rows' length is where the pixels are
            continue
        piece = np.frombuffer(sample.place, np.uint8) if sample.kind == JPEG else sample.place.reshape(-1)
        images[row, START], images[row, LENGTH] = filled, piece.size
        lies = (*sample.size, 0) if sample.kind == JPEG else (3 * sample.place.shape[1], 3, 1)
        images[row, [ROW, PIXEL, CHANNEL]] = lies
        pieces.append(piece)
        filled += piece.size
    return pieces


def _write(sections: dict[str, np.ndarray], pieces: list[np.ndarray], extent: Extent, slots: Slots | None) -> Parcel:
    layout, filled = {}, 0
    for name, array in sections.items():
        layout[name] = filled, array.shape, getattr(torch, array.dtype.name)
        filled += _aligned(array.nbytes)
    size = sum(piece.size for piece in pieces)
    layout["source"] = filled, (size,), torch.uint8
    slot = slots and slots.take(filled + size)
    memory = slot.memory(filled + size) if slot else torch.empty(filled + size, dtype=torch.uint8)
    written = memory.numpy()
    for name, array in sections.items():
        start = layout[name][0]
        written[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    for piece in pieces:
        written[filled : filled + piece.size] = piece
        filled += piece.size
    return Parcel(memory, layout, extent, slot or None)


def merge(parcels: Sequence[Parcel]) -> tuple[Parcel, list[Tensor]]:
    """(one parcel of several on the CPU, but for noise and source; the rests, which are to lie in a row behind it).

    A batch is packed by several loader processes. Places in the rests, boxes and tables are counted on.
    """
    arrays = {name: [getattr(one, name).numpy() for one in parcels] for name in _SMALL}
    images = np.concatenate(arrays["images"])
    rounds = max(len(turns) for turns in arrays["operations"])
    operations = np.zeros((rounds, len(images), OF_OPERATION), np.int32)
    values = np.zeros((rounds, len(images), VALUES), np.float64)
    boxes = np.concatenate(arrays["boxes"])
    row = box = lines = rest = table = 0
    for number, one in enumerate(parcels):
        rows, turns = slice(row, row + len(one)), len(arrays["operations"][number])
        before = rest + one.layout["source"][0] - one.layout["noise"][0]
        images[rows, START] += np.where(images[rows, KIND] == RESIDENT, 0, before)
        images[rows, FIRST_BOX] += box
        images[rows, BETWEEN] += lines
        operations[:turns, rows] = arrays["operations"][number]
        operations[:turns, rows, 1] += table
        values[:turns, rows] = arrays["values"][number]
        boxes[box : box + len(arrays["boxes"][number]), 4] += rest // torch.float32.itemsize
        row, box, lines = rows.stop, box + len(arrays["boxes"][number]), lines + one.extent.lines
        rest, table = rest + _aligned(one.rest.numel()), table + len(arrays["tables"][number])
    sections = {"images": images, "operations": operations, "values": values, "boxes": boxes}
    sections |= {name: np.concatenate(arrays[name]) for name in ("tables", "targets")}
    extents = [one.extent for one in parcels]
    extent = Extent(
        lines=lines,
        most=max(extent.most for extent in extents),
        taps=max(extent.taps for extent in extents),
        looking=tuple(sorted({turn for extent in extents for turn in extent.looking})),
        blurring=tuple(sorted({turn for extent in extents for turn in extent.blurring})),
    )
    return _write(sections, [], extent, None), [one.rest for one in parcels]


def room_for(merged: Parcel, rests: Sequence[Tensor], device: torch.device) -> Parcel:
    """Memory on a device for what `merge` has made; nothing is there yet."""
    start, size = merged.layout["source"][0], sum(_aligned(rest.numel()) for rest in rests)
    memory = torch.empty(start + size, dtype=torch.uint8, device=device)
    noise = start, (size // torch.float32.itemsize,), torch.float32  # and source are one, of which each has its parts
    return Parcel(memory, {**merged.layout, "noise": noise, "source": (start, (size,), torch.uint8)}, merged.extent)


def fill(here: Parcel, merged: Parcel, rests: Sequence[Tensor]) -> None:
    """Copy it there; from pinned memory while the program goes on."""
    begin = here.layout["source"][0]
    here.memory[:begin].copy_(merged.memory[:begin], non_blocking=True)
    for rest in rests:
        here.memory[begin : begin + rest.numel()].copy_(rest, non_blocking=True)
        begin += _aligned(rest.numel())


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


def drawn_of(parcel: Parcel, row: int) -> Drawn:
    """What was drawn for an image of a parcel on the CPU; `pack` backwards."""
    image = parcel.images[row].tolist()
    operations = []
    for turn in range(image[OPERATIONS]):
        kind, table, bicubic, fill = parcel.operations[turn, row].tolist()
        values = tuple(parcel.values[turn, row].tolist())
        colours = fill >> 16 & 255, fill >> 8 & 255, fill & 255
        looked_up = parcel.tables[table].numpy().tobytes() if kind == TABLE else b""
        operations.append(Operation(kind, values, looked_up, bool(bicubic), colours))
    boxes = []
    for top, left, height, width, start, each in parcel.boxes[image[FIRST_BOX] :][: image[BOXES]].tolist():
        shape = (3, height, width) if each else (3, 1, 1)
        boxes.append(Box(top, left, height, width, parcel.noise[start : start + math.prod(shape)].view(shape)))
    crop = Crop(*image[TOP:BICUBIC], bool(image[BICUBIC]))
    return Drawn(crop, bool(image[FLIP]), tuple(operations), tuple(boxes))


def box_blur(radius: float) -> tuple[int, int, int]:
    """(radius, inner weight, edge weight) of the box whose three passes are Pillow's Gaussian blur; its float32 steps.

    Weights are of 2**24; two pixels beyond the radius have the edge weight.
    """
    f = np.float32
    variance = f(f(radius) * f(radius) / f(3))
    length = f(math.sqrt(12.0 * float(variance) + 1.0))
    whole = f(math.floor((float(length) - 1.0) / 2.0))
    part = f((f(2) * whole + f(1)) * (whole * (whole + f(1)) - f(3) * variance))
    part = f(part / (f(6) * (variance - (whole + f(1)) * (whole + f(1)))))
    box = f(whole + part)
    inner = int(f(2**24) / (box * f(2) + f(1)))
    return int(box), inner, (2**24 - (int(box) * 2 + 1) * inner) // 2
