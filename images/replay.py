"""What was drawn for an image, done to it by Pillow: the reference of images/gpu.py, and its stand-in without a GPU."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from images.draws import (
    AFFINE,
    AUTO_CONTRAST,
    BLUR,
    COLOR,
    CONTRAST,
    EQUALIZE,
    SHARPNESS,
    TABLE,
    Box,
    Crop,
    Drawn,
    Operation,
)


def replay(image: Image.Image, drawn: Drawn, size: int) -> Image.Image:
    """An RGB image cropped to (size, size), flipped and changed by each operation, as timm would have done it."""
    image = crop(image, drawn.crop, size)
    if drawn.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation in drawn.operations:
        image = operate(image, operation)
    return image


def crop(image: Image.Image, crop: Crop, size: int) -> Image.Image:
    mode = Image.Resampling.BICUBIC if crop.bicubic else Image.Resampling.BILINEAR
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    resized = image.crop(box).resize((crop.to_width, crop.to_height), mode)
    rows = mirror(np.arange(crop.down, crop.down + size), crop.to_height)
    columns = mirror(np.arange(crop.right, crop.right + size), crop.to_width)
    return Image.fromarray(np.asarray(resized)[rows[:, None], columns])


def mirror(places: np.ndarray, length: int) -> np.ndarray:
    """Places in a row of that length; those outside of it are mirrored at its first and last place."""
    places = np.abs(places)
    return np.where(places >= length, 2 * (length - 1) - places, places)


def operate(image: Image.Image, operation: Operation) -> Image.Image:
    """An RGB image after one operation."""
    kind, values = operation.kind, operation.values
    if kind == TABLE:
        return image.point(list(operation.table) * 3)
    if kind == AUTO_CONTRAST:
        return ImageOps.autocontrast(image)
    if kind == EQUALIZE:
        return ImageOps.equalize(image)
    if kind == AFFINE:
        mode = Image.Resampling.BICUBIC if operation.bicubic else Image.Resampling.BILINEAR
        return image.transform(image.size, Image.Transform.AFFINE, values[:6], mode, fillcolor=operation.fill)
    if kind == BLUR:
        return image.filter(ImageFilter.GaussianBlur(values[0]))
    enhance = {CONTRAST: ImageEnhance.Contrast, COLOR: ImageEnhance.Color, SHARPNESS: ImageEnhance.Sharpness}[kind]
    return enhance(image).enhance(values[0])


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(..., 3, H, W) uint8 to float32, by the arithmetic of torchvision's ToTensor and Normalize."""
    mean, std = (torch.tensor(numbers, dtype=torch.float32)[:, None, None] for numbers in (mean, std))
    return pixels.to(torch.float32).div(255).sub_(mean).div_(std)


def erase(image: Tensor, boxes: tuple[Box, ...]) -> None:
    """Fill erased areas of a normalised image (3, H, W), in place."""
    for top, left, height, width, pixels in boxes:
        image[:, top : top + height, left : left + width] = pixels
