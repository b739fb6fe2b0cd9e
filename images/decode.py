"""Files to RGB images of 8 bits: which formats are opened, how wider pixels become bytes, why one cannot be read."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import EpsImagePlugin, Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

# What data sets hold. Pillow knows many more by their content, whatever a file is called; one starts Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")

EpsImagePlugin.gs_binary = False  # as if it were not installed: for packages that open images by themselves

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339


class Unreadable(OSError):  # noqa: N818
    """An image cannot be read; the text is why."""


def open_file(path: str | Path) -> IO[bytes]:
    """A file to read. Raises OSError, also for a pipe or a device, for which one could wait for ever."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder the system has its own words
        raise Unreadable("it is no regular file")
    return open(path, "rb")


def open_image(source: str | Path | IO[bytes]) -> Image.Image:
    """The RGB image in a file or stream. Raises whatever Pillow does where it cannot be decoded, which is a lot."""
    if not hasattr(source, "read"):
        with open_file(source) as file:
            return open_image(file)
    start = source.tell()
    try:
        image = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError:
        source.seek(start)
        raise UnidentifiedImageError(_what_is_it(source.read(64))) from None
    return to_rgb(image)


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its camera notes (EXIF), for those that people look at; sets are read as they are stored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # notes may be broken where the image is not
        return image


def plain_jpeg(content: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG file that all decoders read: YCbCr of 8 bits, and said to be that, not progressive,
    complete, colours sampled as is usual.

    None for everything else, which is Pillow's to read.
    """
    if not content.startswith(b"\xff\xd8") or not content.endswith(b"\xff\xd9"):
        return None
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG",))
    except Exception:  # as for all images
        return None
    info = image.info
    plain = image.mode == "RGB" and image.layers == 3 and image.bits == 8 and info.get("adobe_transform", 1) == 1
    plain &= "jfif" in info or [number for number, *_ in image.layer] == [1, 2, 3]  # "R", "G", "B": not converted
    samplings = [(horizontal, vertical) for _, horizontal, vertical, _ in image.layer]
    usual = (1, 1), (2, 1), (2, 2)  # of others the decoders differ by levels
    plain &= samplings[1:] == [(1, 1), (1, 1)] and samplings[0] in usual
    return (image.height, image.width) if plain and not info.get("progressive") else None


def decode_plain(content: bytes) -> np.ndarray:
    """A plain JPEG as (height, width, 3): libjpeg-turbo in torchvision, which takes less time than through Pillow, with
    the same bits. Raises whatever Pillow does."""
    try:
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return decode_jpeg(data, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
    except RuntimeError:
        return np.asarray(open_image(io.BytesIO(content)))


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, 8 bits a channel; those of 8 bits as Pillow converts them, alpha left out.

    Wider grey levels are scaled by their range: that of the format where it has one, else the least of 0 to 1 (floats),
    0 to 255 and 0 to 65535 that holds them. Raises ValueError for values outside of it and modes without a conversion.
    """
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I") or image.mode == "F":
        grey = Image.fromarray(_bytes(image)).convert("RGB")
        with contextlib.suppress(Exception):  # for `upright`, as Pillow's own conversions keep them
            grey.info["exif"] = image.getexif().tobytes()
        return grey
    if image.mode in ("La", "RGBa"):  # alpha multiplied in; Pillow converts these to their plain form alone
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return image.convert("RGB")


def _bytes(image: Image.Image) -> np.ndarray:
    """Grey levels of 16 or 32 bits or floats as uint8 (H, W). 16 bits keep their upper half, as Pillow's colours do."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    low, high = values.min().item(), values.max().item()
    bits = int(tags.get(_TIFF_BITS, (16,))[0]) - (2 in tags.get(_TIFF_SAMPLE_FORMAT, ()))  # 2: signed
    if image.mode == "F":
        top, expected = (1 if high <= 1 else 255), "0 to 1 or 0 to 255"
    else:
        top = 2**bits - 1 if bits <= 16 else 255 if high <= 255 else 65535
        expected = f"0 to {top}"
    if low < 0 or high > top:
        raise ValueError(f"its grey levels go from {low:g} to {high:g} and not within {expected}")
    if image.mode != "F":
        grey = (values.astype(np.int64) >> (top.bit_length() - 8)).astype(np.uint8)
    elif top == 1:
        grey = np.rint(values * 255).astype(np.uint8)
    else:
        grey = np.asarray(image.convert("L"))
    return 255 - grey if tags.get(_TIFF_PHOTOMETRIC) == 0 else grey  # 0: white is 0


def reason(error: Exception) -> str:
    """Why an image cannot be read, in one line; the type too where Pillow means to say nothing by it."""
    text = " ".join(str(error).split())
    if isinstance(error, (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)) and text:
        return text
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{name}: {text}" if text else name


def _what_is_it(head: bytes) -> str:
    """What a file that starts so is, if no image that can be opened."""
    Image.init()
    for name, (_, accept) in Image.OPEN.items():
        with contextlib.suppress(Exception):  # too little of a file for some
            if accept is not None and accept(head) is True:
                other = f"{name}, which is none of {', '.join(FORMATS)}"
                return f"not a {name} image that can be decoded" if name in FORMATS else other
    return "not an image"
