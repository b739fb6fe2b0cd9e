"""Draws written down against timm's own transforms: the same seed, the same pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import models  # noqa: F401 (timm's patches)
from config import load_config
from images.draws import TABLE, Box, CannotDraw, Crop, Drawing, Drawn
from images.order import AUGMENT, seeded
from images.parcel import JPEG, LENGTH, PIXELS, Sample, box_blur, drawn_of, pack
from images.replay import erase, normalise, replay
from images.transforms import eval_transform, train_transform

SIZE = 32
POLICIES = {
    "deit": (),
    "random interpolation": ("aug.interpolation=random",),
    "bilinear": ("aug.interpolation=bilinear",),
    "stronger": ("aug.aa=rand-m15-mstd3-inc1-mmax20-n4",),
    "uniform magnitudes": ("aug.aa=rand-m9-mstd101-inc0",),
    "weighted": ("aug.aa=rand-m9-n3-tweights",),
    "autoaugment": ("aug.aa=original-mstd0.5",),
    "autoaugment v0r": ("aug.aa=v0r",),
    "three": ("aug.three_augment=true", "aug.crop=src"),
    "jitter": ("aug.aa=null", "aug.color_jitter=0.4", "aug.reprob=0.7", "aug.recount=3"),
    "colours": ("aug.aa=null", "aug.color_jitter=0", "aug.reprob=1", "aug.remode=rand", "aug.hflip=1"),
    "const": ("aug.aa=null", "aug.reprob=1", "aug.remode=const", "aug.scale=[0.5,0.9]"),
}


def config(*overrides: str):
    return load_config(None, [f"model.img_size={SIZE}", "data.set=generated", *overrides])


def photograph(seed: int, height: int = 41, width: int = 53) -> Image.Image:
    """Smooth shapes and some noise, as in a photograph."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(small).astype(np.int64) + rng.integers(-9, 10, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("policy", POLICIES)
def test_numpy_s_generator_is_seeded_for_those_that_draw_from_it(policy):
    drawing = Drawing(train_transform(config(*POLICIES[policy])))
    with seeded(0, AUGMENT, 0, 0):
        before = np.random.get_state()[2]
        for _ in range(60):
            drawing.draw(41, 53)
        assert drawing.by_numpy is (np.random.get_state()[2] != before)


@pytest.mark.parametrize("policy", POLICIES)
def test_replayed_draws_are_timms_pixels(policy):
    cfg = config(*POLICIES[policy])
    transform = train_transform(cfg)
    drawing = Drawing(transform)
    drawn_ops = 0
    for number in range(60):
        image = photograph(number, 41 + number % 7, 53 - number % 11)
        with seeded(0, AUGMENT, 3, number):
            expected = transform(image)
        with seeded(0, AUGMENT, 3, number):
            drawn = drawing.draw(image.height, image.width)
            after = torch.rand(1), np.random.rand(), __import__("random").random()
        with seeded(0, AUGMENT, 3, number):
            transform(image)
            assert after == (torch.rand(1), np.random.rand(), __import__("random").random())
        pixels = torch.from_numpy(np.asarray(replay(image, drawn, SIZE)).copy()).permute(2, 0, 1)
        normalised = normalise(pixels, cfg.data.mean, cfg.data.std)
        erase(normalised, drawn.boxes)
        assert torch.equal(normalised, expected), number
        drawn_ops += len(drawn.operations)
    assert drawn_ops or policy in ("colours",) or "const" in policy


def test_evaluation_is_drawn_too():
    cfg = config("data.eval_crop_ratio=0.9")
    transform = eval_transform(cfg)
    for number, (height, width) in enumerate([(41, 53), (53, 41), (32, 32), (7, 90), (200, 33)]):
        image = photograph(number, height, width)
        drawn = Drawing(transform).draw(height, width)
        pixels = torch.from_numpy(np.asarray(replay(image, drawn, SIZE)).copy()).permute(2, 0, 1)
        assert torch.equal(normalise(pixels, cfg.data.mean, cfg.data.std), transform(image))


def test_a_box_of_nothing_is_pillows():
    drawing, empty = Drawing(train_transform(config("aug.scale=[0.001,0.3]"))), 0
    for number in range(40):
        with seeded(0, AUGMENT, 1, number):
            try:
                crop = drawing.draw(1, 1).crop
            except CannotDraw:
                empty += 1
            else:
                assert (crop.height, crop.width) == (1, 1)
    assert 0 < empty < 40


def test_what_has_no_record_is_refused():
    with pytest.raises(CannotDraw):
        Drawing(train_transform(config("aug.aa=augmix-m5-w4-d2"))).draw(40, 40)


def test_a_parcel_holds_what_was_drawn():
    drawings = [Drawing(train_transform(config(*POLICIES[name]))) for name in ("stronger", "three", "jitter")]
    samples, images = [], []
    for number in range(30):
        images.append(np.asarray(photograph(number)))
        with seeded(1, AUGMENT, 0, number):
            drawn = drawings[number % 3].draw(41, 53)
        kind = JPEG if number % 4 == 3 else PIXELS
        samples.append(Sample(bytes([number] * 7) if kind == JPEG else images[-1], kind, drawn, (41, 53)))
    parcel = pack(samples)
    assert len(parcel) == 30
    for row, sample in enumerate(samples):
        drawn = drawn_of(parcel, row)
        for mine, theirs in zip(drawn.operations, sample.drawn.operations, strict=True):
            assert mine.kind == theirs.kind and mine.values[: len(theirs.values)] == theirs.values
            assert (mine.table, mine.bicubic) == (theirs.table, theirs.bicubic)
            assert mine.fill == theirs.fill and (mine.table != b"") == (mine.kind == TABLE)
        assert drawn[:2] == sample.drawn[:2]
        for mine, theirs in zip(drawn.boxes, sample.drawn.boxes, strict=True):
            assert mine[:4] == theirs[:4] and torch.equal(mine.pixels, theirs.pixels)
        start, length = parcel.images[row, 0], parcel.images[row, LENGTH]
        content = bytes(parcel.source[start : start + length].tolist())
        assert content == (sample.place if sample.kind == JPEG else sample.place.tobytes())


@pytest.mark.parametrize(("height", "width"), [(0, 4), (4, 0), (1, 1), (2, 3)])
@pytest.mark.parametrize("each", [False, True])
def test_a_parcel_holds_boxes_of_few_pixels_or_none(height, width, each):
    """timm draws such ones in images of few pixels. One of them is the last, behind which there is no noise."""
    noise = torch.arange(3.0 * height * width).view(3, height, width) if each else torch.arange(3.0).view(3, 1, 1)
    crop = Crop(0, 0, 5, 5, 5, 5, 0, 0, bicubic=False)
    drawn = Drawn(crop, False, (), (Box(1, 1, height, width, noise),))
    parcel = pack([Sample(np.zeros((5, 5, 3), np.uint8), PIXELS, drawn)] * 2)
    for row in range(2):
        ((*place, pixels),) = drawn_of(parcel, row).boxes
        assert place == [1, 1, height, width]
        assert torch.equal(pixels.expand(3, height, width), noise.expand(3, height, width))


def test_weights_of_a_blur_are_of_2_to_the_24():
    for radius in (0.1, 0.5, 1.0, 1.7, 2.0, 7.3):
        whole, inner, edge = box_blur(radius)
        assert 2**24 - 2 <= inner * (2 * whole + 1) + 2 * edge <= 2**24
