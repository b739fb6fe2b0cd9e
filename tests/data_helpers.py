"""Tiny sets for the tests of images/ and datasets.py: configurations, image folders, images that cannot be read."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import Config, UserError, load_config
from datasets import Data, build_data

RECIPE = ["data.set=generated", "data.num_images=40", "model.img_size=16", "model.num_classes=7"]


def make_config(*overrides: str, base: list[str] | None = None) -> Config:
    """A tiny generated set under the whole DeiT augmentation, in this process; later overrides win."""
    return load_config(overrides=[*(RECIPE if base is None else base), "data.num_workers=0", *overrides])


def make_data(*overrides: str, base: list[str] | None = None, batch_size: int = 8, **where: int | str) -> Data:
    """where: rank, world_size, device; one process on the CPU unless they are given."""
    where = {"rank": 0, "world_size": 1, **where}
    return build_data(make_config(*overrides, base=base), batch_size=batch_size, **where)


def make_folder(root: Path, train: int = 6, val: int = 4, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    """An image folder of `train` and `val` images a class, each of one colour of its own."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                colour = tuple(int(c) for c in rng.integers(0, 256, 3))
                Image.new("RGB", (24, 20), colour).save(folder / f"{i}.png")
    return root


def folder_config(root: Path, *overrides: str) -> list[str]:
    plain = ["aug.mixup=0", "aug.cutmix=0", "aug.repeats=1"]
    return ["data.set=imagenet", f"data.path={root}", "model.img_size=16", *plain, *overrides]


def stack(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


def assert_same(a, b) -> None:
    (images_a, targets_a), (images_b, targets_b) = stack(a), stack(b)
    assert torch.equal(images_a, images_b) and torch.equal(targets_a, targets_b)


def generator_states() -> tuple:
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().numpy().tobytes()


def spoil(path: Path, how: str) -> Path:
    """Replace an image by a .jpg that cannot be read."""
    path.unlink()
    path = path.with_suffix(".jpg")
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(content, "JPEG")
    path.write_bytes({"empty": b"", "truncated": content.getvalue()[:1500], "text": b"not an image\n"}[how])
    return path


def user_error_of(batches) -> str:
    """What pytest.raises would keep holds a cycle with the loader, whose workers then take 5 s to notice its end."""
    try:
        list(batches)
    except UserError as error:
        return str(error)
    return "no error"
