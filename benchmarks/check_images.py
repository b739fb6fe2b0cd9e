"""How far batches made on a device are from Pillow's: each operation, the decoder, the whole chain, in grey levels.

    python benchmarks/check_images.py --data-path DIR [--images 500] [--size 224]

DIR holds JPEG files, in folders or not; those of other colours than RGB, and what is none by such a name, are left
out. Every image is cropped by the recipe's own draws; then each operation is done to it by the kernels and by Pillow.
`chain` is all that the recipe draws but erasing, decoded by libjpeg or by the GPU; `decoder` is the latter alone. The
last rows are controls: what a wrong filter and a swapped operation would look like. Prints a table in Markdown. On a
CPU (--quick) the kernels run in Triton's interpreter with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import io
import itertools
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from common import command, parse, parser_for
from PIL import Image
from torch import Tensor

import models  # noqa: F401 (timm's patches)
from config import UserError, load_config
from images.decode import reason
from images.draws import (
    AFFINE,
    AUTO_CONTRAST,
    BLUR,
    COLOR,
    CONTRAST,
    EQUALIZE,
    SHARPNESS,
    TABLE,
    Drawing,
    Drawn,
    Operation,
)
from images.gpu import Finisher
from images.order import AUGMENT, seeded
from images.parcel import JPEG, PIXELS, Sample, pack
from images.replay import replay
from images.transforms import train_transform

LEVELS = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # a normalisation that leaves grey levels
FILL = (124, 116, 104)
ROTATED = (0.906, 0.423, -9.0, -0.423, 0.906, 11.0)
INVERT = bytes(255 - level for level in range(256))
OPERATIONS = {
    "auto contrast": Operation(AUTO_CONTRAST),
    "equalize": Operation(EQUALIZE),
    "invert (posterize, solarize, brightness alike)": Operation(TABLE, table=INVERT),
    "contrast 1.7": Operation(CONTRAST, (1.7,)),
    "colour 0.3": Operation(COLOR, (0.3,)),
    "sharpness 1.8": Operation(SHARPNESS, (1.8,)),
    "shear 0.3, bicubic": Operation(AFFINE, (1.0, 0.3, 0.0, 0.0, 1.0, 0.0), fill=FILL),
    "translate 10.4, bicubic": Operation(AFFINE, (1.0, 0.0, 10.4, 0.0, 1.0, 0.0), fill=FILL),
    "rotate 25 degrees, bilinear": Operation(
        AFFINE, (0.906, 0.423, -9.0, -0.423, 0.906, 11.0), bicubic=False, fill=FILL
    ),
    "Gaussian blur 1.3": Operation(BLUR, (1.3,)),
}


def _pixels(image: Image.Image, drawn: Drawn, size: int) -> np.ndarray:
    return np.array(replay(image, drawn, size))


def pixels_of(images: Sequence[Image.Image], drawn: Sequence[Drawn], size: int, pool: ProcessPoolExecutor) -> Tensor:
    """By Pillow: (B, 3, size, size) float32, grey levels."""
    changed = pool.map(_pixels, images, drawn, itertools.repeat(size, len(images)), chunksize=8)
    return torch.from_numpy(np.stack([*changed])).permute(0, 3, 1, 2).float()


def on_device(samples: list[Sample], size: int, device: torch.device) -> Tensor:
    images, _, failed = Finisher(size, *LEVELS, device)([pack(samples)])
    assert not failed, f"{len(failed)} files could not be decoded"
    return images.cpu().round()


def report(name: str, mine: Tensor, theirs: Tensor) -> None:
    difference = (mine - theirs).abs()
    share = 100 * (difference > 0).float().mean()
    print(f"| {name} | {difference.max():.0f} | {difference.mean():.4f} | {share:.3f} % |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for(__doc__, rounds=2)
    parser.add_argument("--data-path", type=Path, required=True, help="JPEG files, in folders or not")
    parser.add_argument("--images", type=int, default=500, help="how many of them (default: 500)")
    parser.add_argument("--size", type=int, default=224, help="side of the cropped images (default: 224)")
    options, device = parse(parser, argv)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("On a CPU there is nothing to compare unless TRITON_INTERPRET=1 lets the kernels run.")
    files = sorted(p for p in options.data_path.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg") and p.is_file())
    contents, images = [], []
    for path in files[:: max(1, len(files) // options.images)][: options.images]:
        try:
            content = path.read_bytes()
            image = Image.open(io.BytesIO(content))
            pixels = image.convert("RGB")
        except Exception as error:  # Pillow raises any
            print(f"left out: {path} ({reason(error)})", file=sys.stderr)
            continue
        if (image.format, image.mode) == ("JPEG", "RGB"):
            contents.append(content)
            images.append(pixels)
    if not images:
        raise UserError(f"{options.data_path} holds no JPEG files in colour.")
    size = options.size
    drawing = Drawing(train_transform(load_config(None, [f"model.img_size={size}", "aug.reprob=0"])))
    drawn = []
    for number, image in enumerate(images):
        with seeded(0, AUGMENT, 0, number):
            drawn.append(drawing.draw(image.height, image.width))
    plain = [one._replace(operations=()) for one in drawn]

    def sampled(kind: int, what: Sequence[Drawn]) -> list[Sample]:
        places = contents if kind == JPEG else [np.asarray(image) for image in images]
        sizes = [(image.height, image.width) for image in images]
        return [Sample(place, kind, *of) for place, *of in zip(places, what, sizes, strict=True)]

    print(f"{len(images)} images of {options.data_path.name}, cropped to {size}x{size}\n")
    print("| | largest difference | mean | pixels that differ |\n|---|---|---|---|")
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        by_pillow = functools.partial(pixels_of, images, size=size, pool=pool)
        cropped, whole = by_pillow(plain), by_pillow(drawn)
        report("crop and resize, bicubic", on_device(sampled(PIXELS, plain), size, device), cropped)
        for name, operation in OPERATIONS.items():
            changed = [one._replace(operations=(operation,)) for one in plain]
            report(name, on_device(sampled(PIXELS, changed), size, device), by_pillow(changed))
    report("chain, decoded by libjpeg", on_device(sampled(PIXELS, drawn), size, device), whole)
    if device.type == "cuda":
        report("decoder, then crop and resize", on_device(sampled(JPEG, plain), size, device), cropped)
        report("chain, decoded by the GPU", on_device(sampled(JPEG, drawn), size, device), whole)
    wrong = [one._replace(crop=one.crop._replace(bicubic=False)) for one in drawn]
    report("control: bilinear crops", on_device(sampled(PIXELS, wrong), size, device), whole)
    swapped = [one._replace(operations=one.operations[::-1]) for one in drawn]
    several = [number for number, one in enumerate(drawn) if len(one.operations) > 1]
    mine = on_device([sample for n, sample in enumerate(sampled(PIXELS, swapped)) if n in several], size, device)
    report("control: operations in the wrong order, where there are two", mine, whole[several])


if __name__ == "__main__":
    command(main)
