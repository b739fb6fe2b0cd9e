"""Batches for the kernels of images/ and what Pillow makes of them."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from test_draws import POLICIES, photograph
from torch import Tensor

import models  # noqa: F401 (timm's patches)
from config import load_config
from images.draws import (
    AFFINE,
    AUTO_CONTRAST,
    BLUR,
    COLOR,
    CONTRAST,
    EQUALIZE,
    SHARPNESS,
    TABLE,
    Crop,
    Drawing,
    Drawn,
    Operation,
)
from images.gpu import Finisher
from images.order import AUGMENT, seeded
from images.packed import Draws
from images.parcel import JPEG, PIXELS, RESIDENT, Sample, pack
from images.replay import erase, normalise, replay
from images.resident import Decoded, Resident
from images.transforms import eval_transform, train_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CASES = [*POLICIES, "evaluation"]


class Batch(NamedTuple):
    samples: list[Sample]
    expected: Tensor  # (B, 3, size, size) float32, by Pillow
    resident: Resident


def finished(batch: Batch, size: int, device: torch.device) -> Tensor:
    pieces = [batch.samples[: len(batch.samples) // 3], batch.samples[len(batch.samples) // 3 :]]
    images, _, failed = Finisher(size, MEAN, STD, device, batch.resident)([pack(piece) for piece in pieces])
    assert not failed
    return images.cpu()


def unequal(batch: Batch, size: int, device: torch.device) -> list[tuple[int, list[int]]]:
    """(number, kinds of its operations) of the images that have other bits than Pillow's."""
    images = finished(batch, size, device)
    return [
        (number, [operation.kind for operation in sample.drawn.operations])
        for number, sample in enumerate(batch.samples)
        if not torch.equal(images[number], batch.expected[number])
    ]


def drawn_batch(case: str, size: int, count: int, device: torch.device, *, files: bool = False) -> Batch:
    """Images of many sizes under a policy; with `files` some of them JPEG files, which are decoded on the device."""
    if case == "evaluation":
        transform = eval_transform(load_config(None, [f"model.img_size={size}"]))
    else:
        transform = train_transform(load_config(None, [f"model.img_size={size}", *POLICIES[case]]))
    drawing, images, drawn = Drawing(transform), [], []
    for number in range(count):
        height, width = size + 11 * (number % 7), size + 13 * (number % 11) - 3 * (number % 2)
        if number % 13 == 5:
            height *= 3  # columns first, and many weights
        images.append(np.asarray(photograph(number, height, width)))
        with seeded(0, AUGMENT, 3, number):
            drawn.append(drawing.draw(height, width))
    return batch_of(images, drawn, size, device, files=files)


def batch_of(
    images: list[np.ndarray], drawn: list[Drawn], size: int, device: torch.device, *, files: bool = False
) -> Batch:
    samples, expected, kept = [], [], []
    for number, (pixels, one) in enumerate(zip(images, drawn, strict=True)):
        crop, kind = one.crop, number % 3 if files else (PIXELS, RESIDENT)[number % 2]
        place, placed = number, one
        if kind == PIXELS:
            place = pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
            placed = one._replace(crop=crop._replace(top=0, left=0))
        elif kind == JPEG:
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG", quality=90)
            place, pixels = stream.getvalue(), np.asarray(Image.open(stream))
        kept.append(pixels)
        samples.append(Sample(place, kind, placed, pixels.shape[:2]))
        changed = torch.from_numpy(np.array(replay(Image.fromarray(pixels), one, size))).permute(2, 0, 1)
        expected.append(normalise(changed, MEAN, STD))
        erase(expected[-1], one.boxes)
    resident = Resident(kept, device)
    for number, pixels in enumerate(kept):
        resident.add([number], Decoded(pixels.reshape(-1), np.array([pixels.shape[:2]]), np.zeros(1, np.int64), {}))
        if number % 5 == 4:
            resident.flush()
    resident.flush()
    return Batch(samples, torch.stack(expected), resident)


def extreme_images(size: int) -> list[np.ndarray]:
    """What photographs seldom are: of one colour, black, white, saturated, one pixel wide or high, of two levels."""
    rng = np.random.default_rng(0)
    two = rng.integers(0, 2, (size, size, 3), dtype=np.uint8) * 255
    images = [np.full((size, size, 3), level, np.uint8) for level in (0, 255, 127, 1)]
    images += [
        two,
        rng.integers(0, 256, (size, 1, 3), dtype=np.uint8),
        rng.integers(0, 256, (1, size, 3), dtype=np.uint8),
    ]
    images += [rng.integers(250, 256, (size, size, 3), dtype=np.uint8), two[:3, :3], two[:1, :1]]
    images.append(np.linspace(0, 255, size * size * 3).astype(np.uint8).reshape(size, size, 3))
    return [np.ascontiguousarray(image) for image in images]


def every_operation() -> list[Operation]:
    matrices = [(1, 0.3, 0, 0, 1, 0), (1, 0, 0, -0.27, 1, 0), (1, 0, 7.5, 0, 1, 0), (0.9, 0.4, -3, -0.4, 0.9, 2)]
    operations = [Operation(AUTO_CONTRAST), Operation(EQUALIZE)]
    operations += [Operation(TABLE, table=bytes(255 - level for level in range(256)))]
    for factor in (0.0, 0.1, 0.5, 1.0, 1.3, 1.9, 3.0):
        operations += [Operation(kind, (factor,)) for kind in (CONTRAST, COLOR, SHARPNESS)]
    for matrix in matrices:
        operations += [
            Operation(AFFINE, tuple(map(float, matrix)), bicubic=bicubic, fill=(124, 116, 104))
            for bicubic in (True, False)
        ]
    return operations + [Operation(BLUR, (radius,)) for radius in (0.1, 0.8, 1.9, 5.5)]


def extreme_batch(size: int, device: torch.device, operations: list[Operation]) -> Batch:
    """Each extreme image under each operation, after it has been resized."""
    pairs = [(image, operation) for image in extreme_images(size) for operation in operations]
    drawn = [
        Drawn(Crop(0, 0, *image.shape[:2], size, size, 0, 0, number % 2 == 0), number % 3 == 0, (operation,), ())
        for number, (image, operation) in enumerate(pairs)
    ]
    return batch_of([image for image, _ in pairs], drawn, size, device)


def smallest_batch(size: int, count: int, device: torch.device) -> Batch:
    """Images of a few pixels, some of them with a box of none to be cropped to, as loader processes leave them."""
    cfg = load_config(None, [f"model.img_size={size}", "aug.scale=[0.001,0.3]", "aug.aa=null", "aug.reprob=0.5"])
    transform = train_transform(cfg)
    maker, samples, expected = Draws(transform, size, 0.0), [], []
    for number in range(count):
        image = photograph(number, *((1, 1), (2, 2), (1, 9), (9, 1), (3, 5))[number % 5])
        with seeded(0, AUGMENT, 1, number):
            expected.append(transform(image))
        samples.append(maker.make(maker.open(image, number), 0, AUGMENT, 1, number))
    return Batch(samples, torch.stack(expected), Resident([], device))
