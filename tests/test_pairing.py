"""Runs of one seed are pairs: whatever the method, the same initial weights, images, augmentation and mixing."""

from __future__ import annotations

import functools
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from quick import some
from torch import Tensor

from config import Config, load_config
from training.build import build_run
from training.passes import seed_step
from training.run import Run

ROOT = Path(__file__).resolve().parent.parent
# Augmented and mixed, stochastic depth on: all that a seed decides on.
RANDOM = [
    "aug.mixup=0.8",
    "aug.cutmix=1",
    "aug.hflip=0.5",
    "aug.reprob=0.5",
    "model.drop_path=0.3",
    "schedule.epochs=3",
]
METHODS = {
    "fp": [],
    "microscaling": [],
    "tetrajet": [],
    "qema": [],
    "qramping": [],
    "dampen": ["stabilizer={kind: dampen}"],
    "freeze": ["stabilizer={kind: freeze}"],
    "int4": ["quant={scheme: int4}"],
    "fp8": ["quant.carrier=fp8"],
}


def config(method: str, seed: int) -> Config:
    file = method if method in ("fp", "microscaling", "qema", "qramping") else "tetrajet"
    return load_config(ROOT / f"configs/digits_{file}.yaml", [*RANDOM, *METHODS[method], f"run.seed={seed}"])


@functools.cache
def built(method: str, seed: int) -> Run:
    return build_run(config(method, seed), Path("nowhere"), rank=0, world_size=1, device=torch.device("cpu"))


def weights(run: Run) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in run.model.named_parameters()}


def batches(run: Run, epoch: int, start: int = 0) -> list[Tensor]:
    """Three micro-batches of an epoch."""
    return [images for images, _ in itertools.islice(run.data.train_batches(epoch, start), 3)]


def draws(run: Run, position: int) -> tuple[float, float, float]:
    """What mixup, drop path and all else would draw in a pass."""
    seed_step(run, position)
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_from_the_weights_of_full_precision(method: str) -> None:
    ours, plain = weights(built(method, 1)), weights(built("fp", 1))
    assert plain.keys() <= ours.keys()
    assert [name for name, value in plain.items() if not torch.equal(value, ours[name])] == []


@pytest.mark.parametrize("method", some(METHODS, every=2))
def test_a_method_sees_the_images_of_full_precision(method: str) -> None:
    ours, plain = built(method, 1), built("fp", 1)
    for epoch, start in ((0, 0), (2, 19)):
        first, second = batches(ours, epoch, start), batches(plain, epoch, start)
        assert len(first) == len(second) == 3
        assert all(map(torch.equal, first, second))
    assert [draws(ours, p) for p in (0, 7)] == [draws(plain, p) for p in (0, 7)]
    images = next(iter(ours.data.train_batches(1)))
    mixed = []
    for run in (ours, plain):
        seed_step(run, 5)
        mixed.append(run.mixup(images[0].clone(), images[1]))
    assert torch.equal(mixed[0][0], mixed[1][0]) and torch.equal(mixed[0][1], mixed[1][1])


def test_another_seed_has_none_of_it_in_common() -> None:
    """The control."""
    one, other = built("fp", 1), built("fp", 2)
    a, b = weights(one), weights(other)
    assert not torch.equal(a["blocks.0.mlp.fc1.weight"], b["blocks.0.mlp.fc1.weight"])
    assert not torch.equal(batches(one, 0)[0], batches(other, 0)[0])
    assert not torch.equal(batches(one, 0)[0], batches(one, 1)[0])
    assert draws(one, 0) != draws(other, 0) and draws(one, 0) != draws(one, 1)
