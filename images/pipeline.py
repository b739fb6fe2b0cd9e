"""Who makes batches of images: loader processes alone, or with the device; what of a set is kept there."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from config import Config, UserError
from images.draws import CannotDraw
from images.feed import AHEAD, Feed
from images.gpu import Finisher
from images.order import Key
from images.packed import Collate, Draws, PackedImages, PackedStream, Pixels
from images.resident import Resident, keep
from images.samples import Images, Stream, collate
from images.slots import Slots, can_share
from images.workers import Leash

# Images a second that a loader process and a GPU that trains decode beside each other (an H100 with 16 cores); by them
# the files are shared out where data.gpu_decode is null.
CORE_DECODES, GPU_DECODES = 220, 1500
TOGETHER = 3  # batches whose files a GPU decodes at a time, since each time has to wait for the model's kernels
IMAGE_BYTES = 2**20  # of an image in a slot, on average and at most; an image of 500x375 has 560 kB
DECODING_BATCH = 256  # images that a loader process decodes at a time for a set that is kept


class FeedMaker:
    """Makes the feeds of a run from its configuration; `described` says how, for the manifest."""

    def __init__(self, cfg: Config, device: torch.device, workers: int, leash: Leash | None) -> None:
        self._cfg, self._device, self._workers, self._leash = cfg, device, workers, leash
        self._name = choose_pipeline(cfg, device)
        self.described: dict[str, Any] = {"pipeline": self._name}

    def feed(self, images: Images | Stream, size: int, order: Any, *, training: bool) -> Feed:
        """The batches of `size` images, in that order."""
        maker, resident = self._maker(images, training)
        if maker is None:
            return Feed(self._loader(images, size, order, collate, drop=training), self._device, None, self._leash)
        cfg = self._cfg
        finisher = Finisher(cfg.model.img_size, cfg.data.mean, cfg.data.std, self._device, resident)
        packed = images.packed(PackedStream if isinstance(images, Stream) else PackedImages, maker)
        together = TOGETHER if isinstance(maker, Draws) and maker.share else 1
        slots = self._slots(size, together * (AHEAD + 1) + AHEAD + 4, training)
        loader = self._loader(packed, size, order, Collate(slots), drop=training)
        # Whole images are what evaluation is made of: it needs the more memory, for the shorter time.
        return Feed(loader, self._device, finisher, self._leash, together, None if training else slots)

    def _maker(self, images: Images | Stream, training: bool) -> tuple[Pixels | Draws | None, Resident | None]:
        cfg, size = self._cfg, self._cfg.model.img_size
        if self._name == "cpu":
            return (Pixels(images.transform, size) if self._device.type == "cuda" and _has_triton() else None), None
        try:
            draws = Draws(images.transform, size, 0.0)
        except CannotDraw as error:
            if cfg.data.pipeline == "gpu":
                raise UserError(
                    f"data.pipeline is gpu, and it has no {error}: set data.pipeline=cpu (--pipeline cpu) or auto."
                ) from None
            self.described["pipeline"] = "cpu"
            return Pixels(images.transform, size), None
        part = "training" if training else "evaluation"
        draws.resident = None if isinstance(images, Stream) else self._kept(images)
        if draws.resident is not None:
            self.described[f"{part}_set_kept"] = {"images": len(draws.resident), "bytes": draws.resident.nbytes}
        elif training and self._device.type == "cuda":
            draws.share = self.described["decoded_by_gpu"] = gpu_share(cfg, self._workers)
        return draws, draws.resident

    def _kept(self, images: Images) -> Resident | None:
        if not self._cfg.data.resident:
            return None
        limit = self._cfg.data.resident * _free_bytes(self._device)

        def loader(decoding: Dataset, collate: Any) -> DataLoader:
            return self._loader(decoding, DECODING_BATCH, None, collate, drop=False)

        return keep(images, limit, self._device, loader)

    def _slots(self, size: int, ahead: int, training: bool) -> Slots | None:
        """Memory for the parcels of batches of `size` images: those loader processes have in hand, and `ahead` more."""
        if not self._workers or not can_share():
            return None
        try:
            count = _prefetch(training) * self._workers + ahead
            return Slots(count, size * IMAGE_BYTES, pinned=self._cfg.data.pin_mem)
        except OSError:  # they go one by one then
            return None

    def _loader(
        self, images: Dataset, size: int, order: Sampler | list[Key] | None, collate: Any, *, drop: bool
    ) -> DataLoader:
        cfg, workers, once = self._cfg, self._workers, order is None and not isinstance(images, Stream)
        return DataLoader(
            images,
            size,
            sampler=order,
            drop_last=drop,
            num_workers=workers,
            persistent_workers=workers > 0 and not once,
            collate_fn=collate,
            worker_init_fn=self._leash and self._leash.hold,
            prefetch_factor=_prefetch(drop) if workers else None,
            # The seeds of its workers would come from the process's own generator.
            generator=torch.Generator().manual_seed(cfg.run.seed),
        )


def _prefetch(training: bool) -> int:
    """Batches that a loader process has in hand."""
    return 2 if training else 1


def choose_pipeline(cfg: Config, device: torch.device) -> str:
    """`cpu` or `gpu`. Raises UserError where the latter is asked for and cannot be had."""
    if cfg.data.pipeline == "auto":
        return "gpu" if device.type == "cuda" and _has_triton() else "cpu"
    if cfg.data.pipeline == "gpu" and device.type == "cuda" and not _has_triton():
        raise UserError("data.pipeline gpu needs the package triton, which is not installed: use --pipeline cpu.")
    return cfg.data.pipeline


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def gpu_share(cfg: Config, workers: int) -> float:
    """Of the JPEG files that a GPU can decode, the share that it is given.

    It follows from the configuration and the loader processes, never from how fast they turn out to be: which images
    the GPU decodes decides bits.
    """
    if cfg.data.gpu_decode is not None:
        return cfg.data.gpu_decode
    return round(GPU_DECODES / (GPU_DECODES + CORE_DECODES * max(workers, 1)), 2)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if sys.platform == "linux" else 2**30
