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

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import IterableImageDataset, Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from config import Config, UserError
from images.order import Order
from images.samples import MAX_IN_A_ROW, Images, Stream, collate, outlive_signals
from images.sets import count_classes, open_sets
from images.transforms import eval_transform, train_transform

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
        (loader.dataset if isinstance(loader.dataset, Stream) else loader.sampler).begin(epoch, start)
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
                raise UserError(f"{unreadable[0]}, nor can the {MAX_IN_A_ROW - 1} images after it: check data.path.")
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
        train_images = Stream(train_set, train_transform(cfg), seed, rank)
        eval_images = Stream(eval_set, eval_transform(cfg), seed, rank)
        train_order = eval_order = None
        samples, eval_size = len(train_set), eval_set.reader.num_samples
    else:
        train_images = Images(train_set, train_transform(cfg), seed, attempts=MAX_IN_A_ROW)
        eval_images = Images(eval_set, eval_transform(cfg), seed, attempts=1)
        train_order = Order(train_set, cfg, rank, world_size, batch_size)
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
            collate_fn=collate,
            worker_init_fn=outlive_signals,
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


def to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
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


@functools.lru_cache(maxsize=16)  # one a device, of which a node has fewer
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders, since memory that a stream has had is kept for that stream."""
    return torch.cuda.Stream(device)


def _arrived(batch: Batch, copied: torch.cuda.Event | None) -> Batch:
    """A batch that the present stream may work on: it waits for the copy, not the host."""
    if copied is not None:
        stream = torch.cuda.current_stream()
        stream.wait_event(copied)
        for tensor in batch:
            tensor.record_stream(stream)  # else its memory could be another batch's before the work is done
    return batch
