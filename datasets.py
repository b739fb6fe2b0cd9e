"""Data: the transforms of a run's images (DeiT's, DeiT III's and Swin's, from timm), samplers and loaders.

image_sets.py opens the sets themselves.

Every random draw of augmentation is a function of (run seed, epoch, global position of the sample in the epoch's order)
and of nothing else: not of rank, world size, loader workers, nor of whether the run was interrupted. Two processes with
half the batch see the samples of one process pixel for pixel; an epoch resumed at micro-batch k continues as if it had
never stopped; the process's own generators stay untouched.

    data = build_data(cfg, rank=0, world_size=1, batch_size=256)
    for images, targets in data.train_batches(epoch=0):     # (256, 3, H, W) float32, (256,) int64
        ...

Streaming sets (wds/, tfds/, hfids/) are shuffled and split by timm's readers. They promise less: the order depends on
world size and workers, distributed evaluation may repeat or miss images, unreadable images are the reader's business,
and an epoch resumed in its middle starts anew from its first sample (only its length is kept).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import signal
import tarfile
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, IterableImageDataset, Mixup, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.readers.shared_count import SharedCount
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder

from config import Config, UserError
from images.policies import check_policy
from images.sets import count_classes, open_sets

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, tarfile.TarError, Image.DecompressionBombError)
_MAX_IN_A_ROW = 100  # unreadable images in a row: beyond this the disk is broken, not an image
_ORDER, _AUGMENT, _STREAM = range(3)  # first word of a seed's key, so that no two uses of a seed coincide

Key = tuple[int, int, int]  # index of an image, its global position in the epoch's order, epoch
Sample = tuple[Tensor | None, int, str | None]  # image (3, H, W) float32, label, what could not be read
Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W) float32, labels (B,) int64


@dataclass
class Data:
    """The training and evaluation batches of one process, made by `build_data`."""

    num_classes: int
    batches_per_epoch: int  # training micro-batches of this process; a last partial batch is dropped
    eval_size: int  # images of the whole evaluation set, all processes together
    train_loader: DataLoader
    eval_loader: DataLoader
    skip_corrupt: bool
    corrupt: int = 0  # unreadable images this process met so far: replaced in training, left out in evaluation
    _passes: int = 0

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The micro-batches of `epoch` from number `start` on: images (B, 3, H, W) float32, labels (B,) int64.

        A later call takes the loader over from an earlier one. Raises UserError as `_batches` does.
        """
        assert 0 <= start <= self.batches_per_epoch, f"micro-batch {start} of {self.batches_per_epoch}"
        loader = self.train_loader
        (loader.dataset if isinstance(loader.dataset, _Stream) else loader.sampler).begin(epoch, start)
        self._passes = this = self._passes + 1
        for batch in itertools.islice(self._batches(loader), self.batches_per_epoch - start):
            assert this == self._passes, "a later call of train_batches has taken the loader over"
            yield batch

    def eval_batches(self) -> Iterator[Batch]:
        """This process's share of the evaluation set. Over all processes every image comes once; shares are uneven."""
        return self._batches(self.eval_loader)

    def _batches(self, loader: DataLoader) -> Iterator[Batch]:
        """What the workers sent, judged here: an exception out of a worker would reach the user with a traceback in it.

        Raises UserError for an image that cannot be read, unless such images are skipped, and for an impossible label.
        """
        for images, targets, unreadable, missing in loader:
            if unreadable and not self.skip_corrupt:
                raise UserError(
                    f"{unreadable[0]}: repair or remove it, or go on without such images by data.on_corrupt=skip "
                    "(--on-corrupt skip)."
                )
            if missing and loader is self.train_loader:
                raise UserError(f"{unreadable[0]}, nor can the {_MAX_IN_A_ROW - 1} images after it: check data.path.")
            self.corrupt += len(unreadable)
            if not len(images):
                continue
            low, high = int(targets.min()), int(targets.max())
            if not 0 <= low <= high < self.num_classes:
                raise UserError(
                    f"The data holds a label {low if low < 0 else high}, outside of its {self.num_classes} classes: "
                    "set model.num_classes to the number of classes."
                )
            yield images, targets


def build_data(cfg: Config, *, rank: int, world_size: int, batch_size: int) -> Data:
    """The data of process `rank` of `world_size`, in training micro-batches of `batch_size` images a process.

    Raises UserError for what the user can mend: paths, missing packages, class counts, a batch that does not fit.
    """
    check_policy(cfg)
    if batch_size % 2 and _mixes(cfg):
        raise UserError(f"mixup pairs the images of a batch, so data.batch_size must be even, not {batch_size}.")
    eval_batch_size = max(1, int(1.5 * batch_size))  # evaluation keeps no activations, so more fits
    train_set, eval_set = open_sets(cfg, batch_size, eval_batch_size)
    num_classes = count_classes(cfg, train_set, eval_set)
    workers, seed = _num_workers(cfg), cfg.run.seed

    if isinstance(train_set, IterableImageDataset):
        if cfg.aug.repeats > 1:
            raise UserError(f"data.set {cfg.data.set} is a stream and cannot repeat augmentation: set aug.repeats=1.")
        for stream in (train_set, eval_set):
            # The readers would take these from an initialised torch.distributed only.
            stream.reader.dist_rank, stream.reader.dist_num_replicas = rank, world_size
            stream.set_loader_cfg(num_workers=max(1, workers))
        train_images = _Stream(train_set, train_transform(cfg), seed, rank)
        eval_images = _Stream(eval_set, eval_transform(cfg), seed, rank)
        train_order = eval_order = None
        samples, eval_size = len(train_set), eval_set.reader.num_samples
    else:
        train_images = _Images(train_set, train_transform(cfg), seed, attempts=_MAX_IN_A_ROW)
        eval_images = _Images(eval_set, eval_transform(cfg), seed, attempts=1)
        train_order = _Order(train_set, cfg, rank, world_size, batch_size)
        eval_order = [(index, index, 0) for index in range(rank, len(eval_set), world_size)]
        samples, eval_size = len(train_order), len(eval_set)
    if samples < batch_size:
        raise UserError(
            f"An epoch of data.set {cfg.data.set} has {samples} training images for each of {world_size} process(es), "
            f"fewer than one batch of {batch_size}: lower data.batch_size or optim.global_batch."
        )

    def loader(images: Dataset, size: int, order: Any, drop_last: bool) -> DataLoader:
        return DataLoader(
            images,
            size,
            sampler=order,
            drop_last=drop_last,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
            worker_init_fn=_outlive_signals,
            pin_memory=cfg.data.pin_mem and cfg.run.device != "cpu" and torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(seed),  # its workers' seeds would come from the process's own
        )

    train_loader = loader(train_images, batch_size, train_order, True)
    eval_loader = loader(eval_images, eval_batch_size, eval_order, False)
    skip = cfg.data.on_corrupt == "skip"
    return Data(num_classes, samples // batch_size, eval_size, train_loader, eval_loader, skip)


def _num_workers(cfg: Config) -> int:
    if cfg.data.num_workers is not None:
        return cfg.data.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(10, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# --- Transforms -------------------------------------------------------------------------------------------------------


def train_transform(cfg: Config) -> transforms.Compose:
    """PIL image -> (3, img_size, img_size) float32: crop and flip, AutoAugment or 3-Augment, normalisation, erasing."""
    aug, size = cfg.aug, cfg.model.img_size
    policy = "3a" if aug.three_augment else aug.aa  # timm's 3a: grayscale, solarize or blur; colour jitter follows
    common = {"scale": aug.scale, "hflip": aug.hflip, "color_jitter": aug.color_jitter or None, "auto_augment": policy}
    erasing = {"re_prob": aug.reprob, "re_mode": aug.remode, "re_count": aug.recount}
    norm = {"mean": cfg.data.mean, "std": cfg.data.std}
    try:
        crop, colour, final = create_transform(
            size, is_training=True, separate=True, interpolation=aug.interpolation, **common, **erasing, **norm
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"aug.aa {policy} is not one of timm's, such as rand-m9-mstd0.5-inc1: {error}.") from None
    if aug.crop == "src":
        mode = str_to_interp_mode("bicubic" if aug.interpolation == "random" else aug.interpolation)
        pad_crop = transforms.RandomCrop(size, padding=4, padding_mode="reflect")
        crop = transforms.Compose([transforms.Resize(size, mode), pad_crop, transforms.RandomHorizontalFlip(aug.hflip)])
    return transforms.Compose([*crop.transforms, *colour.transforms, *final.transforms])


def eval_transform(cfg: Config) -> transforms.Compose:
    """PIL image -> (3, img_size, img_size) float32: shorter side to img_size / eval_crop_ratio, centre crop."""
    norm = {"mean": cfg.data.mean, "std": cfg.data.std}
    return create_transform(cfg.model.img_size, interpolation="bicubic", crop_pct=cfg.data.eval_crop_ratio, **norm)


def _mixes(cfg: Config) -> bool:
    return cfg.aug.mixup > 0 or cfg.aug.cutmix > 0 or cfg.aug.cutmix_minmax is not None


def build_mixup(cfg: Config, num_classes: int) -> Mixup | None:
    """timm's Mixup, with label smoothing; None where neither mixup nor cutmix is on.

    It works on whole batches in the training process and draws from numpy's global generator, which is the caller's.
    Raises UserError where the sides of cutmix boxes leave timm nothing to draw from.
    """
    aug, size = cfg.aug, cfg.model.img_size
    if not _mixes(cfg):
        return None
    if aug.cutmix_minmax is not None:
        shortest, longest = (int(size * side) for side in aug.cutmix_minmax)  # the second is never drawn
        if not shortest < longest:
            raise UserError(
                f"aug.cutmix_minmax gives cutmix boxes of {shortest} to {longest} pixels in images of {size}: the "
                "second number must be larger than the first, by a pixel at least."
            )
    probabilities = {"prob": aug.mixup_prob, "switch_prob": aug.mixup_switch_prob, "mode": aug.mixup_mode}
    target = {"label_smoothing": cfg.loss.smoothing, "num_classes": num_classes}
    return Mixup(aug.mixup, aug.cutmix, aug.cutmix_minmax, **probabilities, **target)


# --- Order, seeds and samples -----------------------------------------------------------------------------------------


def _words(seed: int, *key: int) -> list[int]:
    """Four 32-bit words, well mixed from the seed and every part of the key."""
    return np.random.SeedSequence(seed, spawn_key=key).generate_state(4).tolist()


@contextlib.contextmanager
def _seeded(seed: int, *key: int) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generator, all of which augmentation draws from, seeded from (seed, key).

    All three are put back: without loader workers this runs inside the training process.
    """
    words, python_state, numpy_state = _words(seed, *key), random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(words[0] << 32 | words[1])
        np.random.seed(words)
        torch.default_generator.manual_seed(words[2] << 32 | words[3])  # torch.manual_seed would seed the GPUs too
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class _Order(Sampler[Key]):
    """The training samples of one process, shuffled or shuffled and repeated, from a micro-batch of an epoch on."""

    def __init__(self, images: Sized, cfg: Config, rank: int, world_size: int, batch_size: int) -> None:
        self._seed, self._batch_size, self._rank, self._world_size = cfg.run.seed, batch_size, rank, world_size
        if cfg.aug.repeats > 1:
            # timm rounds an epoch down to whole 256s, as DeiT does; nothing would be left of a smaller set.
            rounding = 256 if len(images) >= 256 else 0
            repeats = {"num_repeats": cfg.aug.repeats, "selected_round": rounding}
            self._indices = RepeatAugSampler(images, world_size, rank, **repeats)
        else:
            self._indices = DistributedSampler(images, world_size, rank, drop_last=True)
        self.begin(0, 0)

    def begin(self, epoch: int, start: int) -> None:
        self._epoch, self._first = epoch, start * self._batch_size
        # timm shuffles by the epoch alone, torch by seed + epoch, where seed 0 in epoch 1 repeats seed 1 in epoch 0:
        # a number mixed from both, given as the epoch, serves either.
        self._indices.set_epoch(_words(self._seed, _ORDER, epoch)[0])

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Key]:
        places = itertools.count(self._rank, self._world_size)
        return itertools.islice(zip(self._indices, places, itertools.repeat(self._epoch)), self._first, None)


class _Images(Dataset[Sample]):
    """A set of (PIL image, label) read and then transformed under the sample's own seed.

    An unreadable image is replaced by the next readable one, up to `attempts` images in all, and reported.
    """

    def __init__(self, source: Any, transform: transforms.Compose, seed: int, attempts: int) -> None:
        self._source, self._transform, self._seed, self._attempts = source, transform, seed, attempts

    def __getitem__(self, key: Key) -> Sample:
        first, position, epoch = key
        problem = None
        for index in (i % len(self._source) for i in range(first, first + self._attempts)):
            try:
                image, target = self._read(index)
            except _DECODE_ERRORS as error:
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
                problem = problem or f"{self._name(index)} cannot be read ({reason})"
                continue
            with _seeded(self._seed, _AUGMENT, epoch, position):
                return self._transform(image), target, problem
        return None, -1, problem

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if isinstance(self._source, ImageDataset):  # past timm's own reading, which replaces unreadable images unasked
            stream, target = self._source.reader[index]
            with stream:
                return Image.open(stream).convert("RGB"), int(target)
        image, target = self._source[index]
        return (image if image.mode == "RGB" else image.convert("RGB")), int(target)

    def _name(self, index: int) -> str:
        if isinstance(self._source, ImageFolder):
            return self._source.samples[index][0]
        if isinstance(self._source, ImageDataset):
            name = self._source.filename(index, absolute=True) or f"image {index}"
            return os.path.join(self._source.reader.root or "", name)
        return f"image {index} of {type(self._source).__name__}"


class _Stream(IterableDataset[Sample]):
    """A stream of timm's; augmentation is a function of (run seed, epoch, worker, place in the worker's stream)."""

    def __init__(self, source: IterableImageDataset, transform: transforms.Compose, seed: int, rank: int) -> None:
        self._source, self._transform, self._seed, self._rank = source, transform, seed, rank
        self._epoch = SharedCount()  # shared memory, for workers that outlive an epoch

    def begin(self, epoch: int, start: int) -> None:
        self._epoch.value = epoch  # a stream cannot be entered in its middle, so `start` is not used
        self._source.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        info = torch.utils.data.get_worker_info()
        worker = self._rank * info.num_workers + info.id if info else self._rank
        for position, (image, target) in enumerate(self._source):
            with _seeded(self._seed, _STREAM, self._epoch.value, worker, position):
                sample = self._transform(image), int(target), None
            yield sample


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str], int]:
    """Images (B, 3, H, W), labels (B,), what could not be read, and how many images the batch lacks for it."""
    found = [(image, target) for image, target, _ in samples if image is not None]
    images, targets = default_collate(found) if found else (torch.empty(0), torch.empty(0, dtype=torch.int64))
    return images, targets, [problem for *_, problem in samples if problem], len(samples) - len(found)


def _outlive_signals(worker_id: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a group; the main one saves and then ends its workers.

    A second SIGTERM ends a worker: it is what the main process sends to one that does not leave by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def to_device(batches: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Move batches to the device one ahead and beside its work, so that none waits for its copy."""
    copies = _copy_stream(device) if device.type == "cuda" else None
    ahead = None
    for batch in batches:
        with contextlib.nullcontext() if copies is None else torch.cuda.stream(copies):
            batch = tuple(t.to(device, non_blocking=True) for t in batch)
            arrived = None if copies is None else copies.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = batch, arrived
    if ahead is not None:
        yield _arrived(*ahead)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders, since memory that a stream has had is kept for that stream."""
    return torch.cuda.Stream(device)


def _arrived(batch: tuple[Tensor, Tensor], copied: torch.cuda.Event | None) -> tuple[Tensor, Tensor]:
    """A batch that the present stream may work on: it waits for the copy, not the host."""
    if copied is not None:
        stream = torch.cuda.current_stream()
        stream.wait_event(copied)
        for tensor in batch:
            tensor.record_stream(stream)  # else its memory could be another batch's before the work is done
    return batch
