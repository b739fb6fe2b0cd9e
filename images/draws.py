"""What timm draws for an image, written down in place of being done: crop, flip, operations, erased boxes.

`Drawing` runs the very transforms that `transforms.py` makes, on a stand-in that has a size and no pixels, so every
draw is timm's own, in timm's order. What the draws mean for pixels is in replay.py (by Pillow, image by image) and in
kernels.py (for a whole batch, on the device); both give Pillow's bits.
"""

from __future__ import annotations

import copy
import functools
import random
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as F

# Kinds of operations. The first look a pixel up in a table; STATISTICS of the whole image make the table of some.
TABLE, AUTO_CONTRAST, EQUALIZE, CONTRAST, COLOR, SHARPNESS, AFFINE, BLUR = range(1, 9)
VALUES = 6  # numbers that an operation has at most

TENSOR_STEPS = (MaybeToTensor, transforms.ToTensor, transforms.Normalize)
# timm's operations by their names, which may end in "Increasing" or "Original".
_STATISTICS = {"AutoContrast": AUTO_CONTRAST, "Equalize": EQUALIZE}
_FACTORS = {"Contrast": CONTRAST, "Color": COLOR, "Sharpness": SHARPNESS}
_POINTWISE = ("Invert", "Solarize", "SolarizeAdd", "Posterize", "Brightness")
_TRACED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel", "Rotate")
_TRACED += ("GaussianBlur", "GaussianBlurRand")
_RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None])  # every level once


_BICUBIC = {transforms.InterpolationMode.BICUBIC: True, transforms.InterpolationMode.BILINEAR: False}
_STEPS = (RandomResizedCropAndInterpolation, transforms.Resize, transforms.CenterCrop, transforms.RandomCrop)
_STEPS += (transforms.RandomHorizontalFlip, transforms.ColorJitter, RandomErasing, RandAugment, AutoAugment)


class Operation(NamedTuple):
    """A change of all pixels of the cropped image."""

    kind: int
    values: tuple[float, ...] = ()  # COLOR ...: factor; AFFINE: output to input coordinates; BLUR: radius in pixels
    table: bytes = b""  # TABLE: 256 levels, for each channel the same
    bicubic: bool = True  # AFFINE: the interpolation; else bilinear
    fill: tuple[int, int, int] = (0, 0, 0)  # AFFINE: what comes from outside of the image


class Crop(NamedTuple):
    """A box of the image, resized, of which a window is taken; the window mirrors what it lacks at the edges."""

    top: int
    left: int
    height: int
    width: int
    to_height: int  # the box is resized to this
    to_width: int
    down: int  # first row of the window in the resized box; below 0 where it sticks out
    right: int
    bicubic: bool


class Box(NamedTuple):
    """An erased area of the normalised image, and what is put there: (3, height, width), or (3, 1, 1) for all of it."""

    top: int
    left: int
    height: int
    width: int
    pixels: Tensor


class Drawn(NamedTuple):
    """All that augmentation does to an image."""

    crop: Crop
    flip: bool
    operations: tuple[Operation, ...]
    boxes: tuple[Box, ...]


class CannotDraw(Exception):  # noqa: N818
    """A transform draws something that has no record here; Pillow has to do it."""


class Drawing:
    """A transform of `transforms.py`, for what it draws.

    by_numpy: whether some of it comes from numpy's generator, as timm's choice of operations does.
    """

    def __init__(self, transform: transforms.Compose) -> None:
        steps = [copy.deepcopy(step) for step in transform.transforms]
        self._steps = [step for step in steps if not isinstance(step, TENSOR_STEPS)]
        for step in self._steps:
            if not isinstance(step, _STEPS):
                raise CannotDraw(type(step).__name__)
            for op in _augment_ops(step):
                name = op.name.removesuffix("Increasing").removesuffix("Original")
                op.aug_fn = functools.partial(_note, name, op.aug_fn)
        self._size = _output_size(self._steps)
        self.by_numpy = any(isinstance(step, RandAugment) for step in self._steps)

    def draw(self, height: int, width: int) -> Drawn:
        """The draws for an image of that size, from the process's generators. Raises CannotDraw."""
        sheet = _Sheet(height, width, self._size)
        for step in self._steps:
            _run(step, sheet)
        return Drawn(sheet.crop, sheet.flip, tuple(sheet.operations), tuple(sheet.boxes))


class Erasing:
    """What timm's RandomErasing of a transform draws, if it has one."""

    def __init__(self, transform: transforms.Compose) -> None:
        self._erasing = next((step for step in transform.transforms if isinstance(step, RandomErasing)), None)

    def draw(self, size: int) -> tuple[Box, ...]:
        """The boxes of an image of that side, from the process's generators."""
        return () if self._erasing is None else tuple(_boxes(self._erasing, size))


class _Sheet(Image.Image):
    """An image to timm and Pillow, without pixels: what they would do to it is written down."""

    def __init__(self, height: int, width: int, size: int) -> None:
        super().__init__()
        self._mode, self._size = "RGB", (width, height)
        self.output = size
        self.crop: Crop | None = None
        self.flip = False
        self.operations: list[Operation] = []
        self.boxes: list[Box] = []

    def copy(self) -> _Sheet:
        return self

    def cropped(self, crop: Crop) -> None:
        self.crop, self._size = crop, (self.output, self.output)

    def transform(self, size: Any, method: Any, data: Any, resample: Any = 0, fill: Any = 1, **options: Any) -> _Sheet:
        bicubic, bilinear = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
        if tuple(size) != self.size or method != Image.Transform.AFFINE or resample not in (bicubic, bilinear):
            raise CannotDraw
        filled = options.pop("fillcolor", None) or (0, 0, 0)
        if options or len(filled) != 3:
            raise CannotDraw
        matrix = tuple(map(float, data))
        self.operations.append(Operation(AFFINE, matrix, bicubic=resample == bicubic, fill=tuple(filled)))
        return self

    def filter(self, filter: Any) -> _Sheet:
        if not isinstance(filter, ImageFilter.GaussianBlur):
            raise CannotDraw
        self.operations.append(Operation(BLUR, (float(filter.radius),)))
        return self

    def transpose(self, method: Any) -> _Sheet:
        raise CannotDraw

    def load(self) -> None:
        raise CannotDraw


def _augment_ops(step: Any) -> list[AugmentOp]:
    if isinstance(step, RandAugment):
        return list(step.ops)
    if isinstance(step, AutoAugment):
        return [op for policy in step.policy for op in policy]
    return []


def _output_size(steps: list[Any]) -> int:
    for step in steps:
        if isinstance(step, (RandomResizedCropAndInterpolation, transforms.RandomCrop, transforms.CenterCrop)):
            height, width = step.size
            if height == width:
                return int(height)
    raise CannotDraw


def _run(step: Any, sheet: _Sheet) -> None:
    """What a step of the transform would do to an image, on a sheet."""
    if isinstance(step, RandomResizedCropAndInterpolation):
        top, left, height, width = step.get_params(sheet, step.scale, step.ratio)
        if not height or not width:  # of a tiny image; Pillow makes something of nothing
            raise CannotDraw
        mode = step.interpolation
        if isinstance(mode, (tuple, list)):
            mode = random.choice(mode)
        sheet.cropped(Crop(top, left, height, width, *step.size, 0, 0, _bicubic(mode)))
    elif isinstance(step, transforms.Resize):
        to_width, to_height = _resized(step, sheet)
        sheet.crop = Crop(0, 0, sheet.height, sheet.width, to_height, to_width, 0, 0, _bicubic(step.interpolation))
        sheet._size = (to_width, to_height)
    elif isinstance(step, transforms.CenterCrop):
        (height, width), (wide, high) = step.size, sheet.size
        if high < height or wide < width:
            raise CannotDraw
        down, right = round((high - height) / 2.0), round((wide - width) / 2.0)
        sheet.cropped(sheet.crop._replace(down=down, right=right))
    elif isinstance(step, transforms.RandomCrop):
        pad = step.padding
        if not isinstance(pad, int) or step.padding_mode != "reflect" or min(sheet.size) <= pad:
            raise CannotDraw
        sheet._size = (sheet.width + 2 * pad, sheet.height + 2 * pad)
        down, right, _, _ = step.get_params(sheet, step.size)
        sheet.cropped(sheet.crop._replace(down=down - pad, right=right - pad))
    elif isinstance(step, transforms.RandomHorizontalFlip):
        sheet.flip ^= bool(torch.rand(1) < step.p)
    elif isinstance(step, transforms.ColorJitter):
        sheet.operations += _jitter(step)
    elif isinstance(step, RandomErasing):
        sheet.boxes += _boxes(step, sheet.output)
    elif isinstance(step, (RandAugment, AutoAugment)):
        step(sheet)
    else:
        raise CannotDraw


def _bicubic(mode: Any) -> bool:
    if mode not in _BICUBIC:
        raise CannotDraw
    return _BICUBIC[mode]


def _resized(step: transforms.Resize, sheet: _Sheet) -> tuple[int, int]:
    """(width, height) that torchvision resizes an image to."""
    size = step.size if isinstance(step.size, int) else list(step.size)
    if not isinstance(size, int) and len(size) == 1:
        size = size[0]
    if not isinstance(size, int):
        return size[1], size[0]
    if step.max_size is not None:
        raise CannotDraw
    high, wide = F._compute_resized_output_size((sheet.height, sheet.width), [size])
    return wide, high


def _note(name: str, function: Any, sheet: _Sheet, *args: Any, **options: Any) -> _Sheet:
    """In place of an operation of timm's: what it would do."""
    if name in _STATISTICS:
        sheet.operations.append(Operation(_STATISTICS[name]))
    elif name in _FACTORS:
        sheet.operations.append(Operation(_FACTORS[name], (float(args[0]),)))
    elif name == "Desaturate":
        sheet.operations.append(Operation(COLOR, (min(1.0, max(0.0, 1.0 - args[0])),)))
    elif name in _POINTWISE:
        sheet.operations.append(_lookup(function, *args))
    elif name in _TRACED:
        function(sheet, *args, **options)
    else:
        raise CannotDraw
    return sheet


def _lookup(function: Any, *args: Any) -> Operation:
    """An operation that takes each level of each channel to another one, by what it makes of all levels."""
    return Operation(TABLE, table=np.asarray(function(_RAMP, *args)).tobytes())


def _jitter(step: transforms.ColorJitter) -> list[Operation]:
    order, brightness, contrast, saturation, hue = step.get_params(
        step.brightness, step.contrast, step.saturation, step.hue
    )
    if hue is not None:
        raise CannotDraw
    noted = {
        0: None if brightness is None else _lookup(_brightness, brightness),
        1: None if contrast is None else Operation(CONTRAST, (float(contrast),)),
        2: None if saturation is None else Operation(COLOR, (float(saturation),)),
    }
    return [noted[int(number)] for number in order if noted.get(int(number)) is not None]


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


class _Erased:
    """A normalised image to timm's RandomErasing; what is assigned to a part of it is kept."""

    dtype = torch.float32

    def __init__(self, size: int) -> None:
        self._size, self.boxes = size, []

    def size(self) -> tuple[int, int, int]:
        return 3, self._size, self._size

    def __setitem__(self, where: tuple[slice, slice, slice], pixels: Tensor) -> None:
        _, rows, columns = where
        area = rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start
        self.boxes.append(Box(*area, pixels))


def _boxes(erasing: RandomErasing, size: int) -> list[Box]:
    image = _Erased(size)
    erasing(image)
    return image.boxes
