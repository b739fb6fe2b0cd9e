"""Data: the batches of a run, the mixing of images, batches on the device. The face of images/.

images/ has what these are made of: sets.py what lies on disk, transforms.py, order.py (order and seeds), samples.py.

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

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import IterableImageDataset, Mixup
from torch import Tensor
from torch.utils.data import DataLoader

from config import Config, UserError
from images.classes import check_splits, class_names, count_classes
from images.feed import PATIENCE, Feed, Loaded
from images.memory import processes_here
from images.order import Key, Order
from images.pipeline import FeedMaker
from images.policies import check_policy
from images.samples import MAX_IN_A_ROW, BrokenStream, Images, Stream
from images.sets import open_sets
from images.transforms import eval_transform, train_transform
from images.workers import Leash, told

MAX_WORKERS = 16  # loader processes of one process, where data.num_workers does not say
Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W) float32, labels (B,) int64


@dataclass
class Data:
    """The training and evaluation batches of one process, made by `build_data`."""

    num_classes: int
    classes: tuple[str, ...]  # their names by label; empty where the set does not tell
    batches_per_epoch: int  # training micro-batches of this process; a last partial batch is dropped
    eval_size: int  # images of the whole evaluation set, all processes together
    train: Feed | None  # None in a run that only evaluates
    eval: Feed
    eval_images: Images | Stream  # as the evaluation's, finished one by one on the CPU
    skip_corrupt: bool
    leash: Leash | None  # of the loaders' processes, where there are any
    pipeline: dict[str, Any]  # how images become batches, for the manifest
    corrupt: int = 0  # unreadable images this process met so far: replaced in training, left out in evaluation
    _passes: int = 0
    _warned: bool = False
    _skipped: dict[str, Skipped] = field(default_factory=dict)  # of the present pass through a set, by its name

    @property
    def train_loader(self) -> DataLoader | None:
        return None if self.train is None else self.train.loader

    @property
    def eval_loader(self) -> DataLoader:
        return self.eval.loader

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The micro-batches of `epoch` from number `start` on, on the device: images (B, 3, H, W) float32, labels
        (B,) int64.

        A later call takes the loader over from an earlier one. Raises UserError as `_batches` does.
        """
        assert 0 <= start <= self.batches_per_epoch, f"micro-batch {start} of {self.batches_per_epoch}"
        self.train.stop()
        self.train.order.begin(epoch, start)
        self._passes = this = self._passes + 1
        self._tell_skipped()
        batches = self._batches(self.train, f"the training images of epoch {epoch + 1}")
        for batch in itertools.islice(batches, self.batches_per_epoch - start):
            assert this == self._passes, "a later call of train_batches has taken the loader over"
            yield batch

    def eval_batches(self) -> Iterator[Batch]:
        """This process's share of the evaluation set. Over all processes every image comes once; shares are uneven."""
        self._tell_skipped()
        yield from self._batches(self.eval, "the evaluation images")
        self._tell_skipped()

    def close(self) -> None:
        """End the loaders' processes and threads, if any; there are no more batches."""
        feeds = [feed for feed in (self.train, self.eval) if feed is not None]
        for feed in feeds:
            feed.stop(PATIENCE)
        if self.leash is not None:
            self.leash.close()
        for feed in feeds:
            feed.stop(2 * PATIENCE)  # what waited for a process hears of its end from torch, which looks every 5 s

    def _batches(self, feed: Feed, what: str) -> Iterator[Batch]:
        """What the workers sent, judged here: an exception out of a worker would reach the user with a traceback in it.

        Raises UserError for an image that cannot be read, unless such images are skipped, for an impossible label, and
        where a worker has died.
        """
        for images, targets, unreadable, missing, labels in self._loaded(feed):
            if unreadable and not self.skip_corrupt:
                raise UserError(
                    f"{unreadable[0]}: repair or remove it, or go on without such images by data.on_corrupt=skip "
                    "(--on-corrupt skip)."
                )
            if missing and feed is self.train:
                raise UserError(f"{unreadable[0]}, nor can the {MAX_IN_A_ROW - 1} images after it: check data.path.")
            if unreadable and not self._warned:
                self._warned = True
                _warn(f"{unreadable[0]}; the run goes on without such images (data.on_corrupt=skip).")
            self.corrupt += len(unreadable)
            self._skipped.setdefault(what, Skipped()).add(len(images) + missing, unreadable)
            if not len(images):
                continue
            low, high = int(labels.min()), int(labels.max())
            if not 0 <= low <= high < self.num_classes:
                raise UserError(
                    f"The data holds a label {low if low < 0 else high}, outside of its {self.num_classes} classes: "
                    "set model.num_classes to the number of classes."
                )
            yield images, targets

    def _loaded(self, feed: Feed) -> Iterator[Loaded]:
        try:
            with told(self.leash):
                yield from feed
        except BrokenStream as error:
            what = str(error).strip().splitlines()[-1].removeprefix(f"{BrokenStream.__module__}.BrokenStream: ")
            raise UserError(f"The stream {what}: check data.set and data.path.") from None

    def _tell_skipped(self) -> None:
        """Say what the last pass through a set has gone without."""
        for what, skipped in self._skipped.items():
            if skipped.unreadable:
                _warn(f"{skipped.share} of {what} could not be read: {skipped}.")
        self._skipped.clear()


@dataclass
class Skipped:
    """The images that a pass through a set could not read."""

    seen: int = 0
    unreadable: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, seen: int, problems: list[str]) -> None:
        self.seen += seen
        self.unreadable += len(problems)
        self.first += problems[: 3 - len(self.first)]

    @property
    def share(self) -> str:
        return f"{self.unreadable} of {self.seen} ({100 * self.unreadable / self.seen:.0f} %)"

    def __str__(self) -> str:
        more = self.unreadable - len(self.first)
        names = [problem.split(" cannot be read (")[0] for problem in self.first]
        return ", ".join(names) + (f" and {more} more" if more else "")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def build_data(cfg: Config, *, rank: int, world_size: int, batch_size: int, device: torch.device | str = "cpu") -> Data:
    """The data of process `rank` of `world_size`, in training micro-batches of `batch_size` images a process, on its
    device.

    With run.eval there is no training set, nor need there be one. Raises UserError for what the user can mend: paths,
    missing packages, class counts, a batch that does not fit.
    """
    check_policy(cfg)
    if batch_size % 2 and _mixes(cfg) and not cfg.run.eval:
        raise UserError(f"mixup pairs the images of a batch, so data.batch_size must be even, not {batch_size}.")
    eval_batch_size = max(1, int(1.5 * batch_size))  # evaluation keeps no activations, so more fits
    train_set, eval_set = open_sets(cfg, batch_size, eval_batch_size)
    classes = class_names(eval_set)
    if train_set is not None:
        check_splits(cfg, class_names(train_set), classes)
    num_classes = count_classes(cfg, classes)
    workers = _num_workers(cfg)
    leash = Leash() if workers else None
    largest = eval_batch_size if train_set is None else max(batch_size, eval_batch_size)
    maker = FeedMaker(cfg, torch.device(device), workers, leash, largest)

    eval_images, eval_order, eval_size = _ordered_eval(cfg, eval_set, rank, world_size)
    train, samples = None, 0
    if train_set is not None:
        train_images, train_order, samples = _ordered_train(cfg, train_set, rank, world_size, batch_size)
        if samples < batch_size:
            raise UserError(
                f"An epoch of data.set {cfg.data.set} has {samples} training images for each of {world_size} "
                f"process(es), fewer than one batch of {batch_size}: lower data.batch_size or optim.global_batch."
            )
        train = maker.feed(train_images, batch_size, train_order, training=True)
        if cfg.data.gpu_decode and "decoded_by_gpu" not in maker.described["training"] and rank == 0:
            why = "the set is kept decoded" if "kept" in maker.described["training"] else "no GPU makes its batches"
            why = "a stream's images come decoded" if isinstance(train_images, Stream) else why
            print(f"note: data.gpu_decode is for nothing in this run: {why}.", file=sys.stderr, flush=True)
    return Data(
        num_classes=num_classes,
        classes=classes,
        batches_per_epoch=samples // batch_size,
        eval_size=eval_size,
        train=train,
        eval=maker.feed(eval_images, eval_batch_size, eval_order, training=False),
        eval_images=eval_images,
        skip_corrupt=cfg.data.on_corrupt == "skip",
        leash=leash,
        pipeline=maker.described,
    )


def _ordered_train(
    cfg: Config, source: Any, rank: int, world_size: int, batch_size: int
) -> tuple[Images | Stream, Order | None, int]:
    """The training images of one process, their order (None: the stream's own) and how many they are in an epoch."""
    if isinstance(source, IterableImageDataset):
        if cfg.aug.repeats > 1:
            raise UserError(f"data.set {cfg.data.set} is a stream and cannot repeat augmentation: set aug.repeats=1.")
        stream = _split_stream(cfg, source, rank, world_size)
        return Stream(stream, train_transform(cfg), cfg.run.seed, rank), None, len(stream)
    order = Order(source, cfg, rank, world_size, batch_size)
    return Images(source, train_transform(cfg), cfg.run.seed, attempts=MAX_IN_A_ROW), order, len(order)


def _ordered_eval(
    cfg: Config, source: Any, rank: int, world_size: int
) -> tuple[Images | Stream, list[Key] | None, int]:
    """The same for evaluation, but for the number, which is of the images of all processes."""
    if isinstance(source, IterableImageDataset):
        stream = _split_stream(cfg, source, rank, world_size)
        return Stream(stream, eval_transform(cfg), cfg.run.seed, rank), None, stream.reader.num_samples
    order = [(index, index, 0) for index in range(rank, len(source), world_size)]
    return Images(source, eval_transform(cfg), cfg.run.seed, attempts=1), order, len(source)


def _split_stream(cfg: Config, stream: IterableImageDataset, rank: int, world_size: int) -> IterableImageDataset:
    """The stream, told which part of it is this process's; its reader would ask an initialised torch.distributed."""
    stream.reader.dist_rank, stream.reader.dist_num_replicas = rank, world_size
    stream.set_loader_cfg(num_workers=max(1, _num_workers(cfg)))
    return stream


def _num_workers(cfg: Config) -> int:
    if cfg.data.num_workers is not None:
        return cfg.data.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores // processes_here())


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
