"""The order of the training samples, and the seeds that every random draw of augmentation comes from.

A draw is a function of (run seed, epoch, global position of the sample in the epoch's order) and of nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sized

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler

from config import Config

ORDER, AUGMENT, STREAM = range(3)  # first word of a seed's key, so that no two uses of a seed coincide

Key = tuple[int, int, int]  # index of an image, its global position in the epoch's order, epoch


def words(seed: int, *key: int) -> list[int]:
    """Four 32-bit words, well mixed from the seed and every part of the key."""
    return np.random.SeedSequence(seed, spawn_key=key).generate_state(4).tolist()


def reseed(seed: int, *key: int, numpy: bool = True) -> None:
    """Seed Python's, numpy's and torch's CPU generator, all of which augmentation draws from, from (seed, key).

    numpy: whether its generator too, whose seeding takes longer than either other's and which few transforms draw from.
    """
    mixed = words(seed, *key)
    random.seed(mixed[0] << 32 | mixed[1])
    if numpy:
        np.random.seed(mixed)
    torch.default_generator.manual_seed(mixed[2] << 32 | mixed[3])  # torch.manual_seed would seed the GPUs too


@contextlib.contextmanager
def seeded(seed: int, *key: int) -> Iterator[None]:
    """The three generators, seeded; they are put back: without loader workers this runs in the training process."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        reseed(seed, *key)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class Order(Sampler[Key]):
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
        self._indices.set_epoch(words(self._seed, ORDER, epoch)[0])

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Key]:
        places = itertools.count(self._rank, self._world_size)
        return itertools.islice(zip(self._indices, places, itertools.repeat(self._epoch)), self._first, None)


class Pieces(Sampler[list[Key]]):
    """Batches cut into pieces of about `size` samples, for loader processes to make a batch together.

    So that a batch takes them little longer than a piece, and they need the memory of few batches. ends: for each piece
    that was drawn, whether it is the last of its batch; who receives them takes them out.
    """

    def __init__(self, order: Iterable[Key], batch_size: int, *, drop_last: bool, size: int) -> None:
        self._order, self._batch_size, self._drop_last, self._size = order, batch_size, drop_last, size
        self.ends: deque[bool] = deque()

    def __iter__(self) -> Iterator[list[Key]]:
        self.ends.clear()
        keys = iter(self._order)
        while batch := list(itertools.islice(keys, self._batch_size)):
            if len(batch) < self._batch_size and self._drop_last:
                return
            count = -(-len(batch) // self._size)
            for number in range(count):
                self.ends.append(number == count - 1)
                yield batch[number * len(batch) // count : (number + 1) * len(batch) // count]
