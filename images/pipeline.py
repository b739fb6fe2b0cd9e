"""Who makes batches of images: loader processes alone, or with the device; what of a set is kept there."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from config import Config, UserError
from images.draws import CannotDraw
from images.feed import AHEAD, Feed
from images.gpu import Finisher
from images.jpegs import GpuDecoder
from images.memory import available_bytes, processes_here
from images.order import Pieces
from images.packed import Collate, Draws, PackedImages, PackedStream, Pixels, most_bytes
from images.resident import Resident, keep
from images.samples import Images, Stream, collate
from images.slots import Slots, can_share
from images.workers import Leash, told

PIECE = 32  # samples that a loader process makes at a time: a batch is made by several
IN_HAND = 4  # pieces that each has in hand


class FeedMaker:
    """Makes the feeds of a run from its configuration.

    largest: images of a batch. described: how training and evaluation get theirs, for the manifest.
    """

    def __init__(self, cfg: Config, device: torch.device, workers: int, leash: Leash | None, largest: int) -> None:
        self._cfg, self._device, self._workers, self._leash = cfg, device, workers, leash
        self._name = choose_pipeline(cfg, device)
        self._pieces = -(-largest // PIECE)
        self.described: dict[str, dict[str, Any]] = {}

    def feed(self, images: Images | Stream, size: int, order: Any, *, training: bool) -> Feed:
        """The batches of `size` images, in that order."""
        cfg, whole = self._cfg, order if order is not None else images
        # Every epoch shuffles all of the training set anew; a process evaluates the same share of the other each time.
        kept = range(len(images)) if training and not isinstance(images, Stream) else [key[0] for key in order or ()]
        part = "training" if training else "evaluation"
        self.described[part] = {"pipeline": self._name}
        decoder = GpuDecoder(self._device)
        maker, resident = self._maker(images, kept, part)
        if maker is None:
            loader = self._loader(images, collate, batch_size=size, sampler=order, drop_last=training)
            return Feed(loader, self._device, None, self._leash, whole)
        pixels = cfg.model.img_size, cfg.data.mean, cfg.data.std
        finisher = Finisher(*pixels, self._device, resident, pin=cfg.data.pin_mem, decoder=decoder)
        if isinstance(maker, Draws):
            maker.alone = decoder.alone
        if isinstance(images, Stream):
            packed = images.packed(PackedStream, maker)
            loader = self._loader(packed, Collate(), batch_size=size, drop_last=training)
            return Feed(loader, self._device, finisher, self._leash, packed)
        pieces = Pieces(order, size, drop_last=training, size=PIECE if resident is None else size)
        loader = self._loader(images.packed(PackedImages, maker), Collate(self._slots), batch_sampler=pieces)
        return Feed(loader, self._device, finisher, self._leash, order)

    def _maker(
        self, images: Images | Stream, kept: Sequence[int], part: str
    ) -> tuple[Pixels | Draws | None, Resident | None]:
        """kept: numbers of the images that are to stay on the device, if they fit."""
        cfg, size, described = self._cfg, self._cfg.model.img_size, self.described[part]
        if self._name == "cpu":
            return (Pixels(images.transform, size) if self._device.type == "cuda" and _has_triton() else None), None
        try:
            draws = Draws(images.transform, size, 0.0)
        except CannotDraw as error:
            if cfg.data.pipeline == "gpu":
                raise UserError(
                    f"data.pipeline is gpu, and it has no {error}: set data.pipeline=cpu (--pipeline cpu) or auto."
                ) from None
            described["pipeline"] = "cpu"
            return Pixels(images.transform, size), None
        draws.resident = None if isinstance(images, Stream) else self._kept(images, kept)
        if draws.resident is not None:
            described["kept"] = {"images": len(draws.resident), "bytes": draws.resident.nbytes}
        elif part == "training" and self._device.type == "cuda" and not isinstance(images, Stream):
            draws.share = described["decoded_by_gpu"] = cfg.data.gpu_decode
        return draws, draws.resident

    def _kept(self, images: Images, indices: Sequence[int]) -> Resident | None:
        """Raises UserError where a loader process fails."""
        if not self._cfg.data.resident:
            return None
        limit = self._cfg.data.resident * _free_bytes(self._device)

        def load(decoding: Dataset, collate: Any, size: int) -> Iterator[Any]:
            with told(self._leash):
                loaded = iter(self._loader(decoding, collate, batch_size=size, once=True))
                if self._leash is not None:
                    self._leash.started()
                yield from loaded

        return keep(images, indices, limit, self._device, load)

    @functools.cached_property
    def _slots(self) -> Slots | None:
        """Memory for the pieces that loader processes have in hand, and for those of the batches that are ahead.

        Training and evaluation take turns with it: pinned memory is not the system's to take back.
        """
        if not self._workers or not can_share():
            return None
        try:
            count = IN_HAND * self._workers + (2 * AHEAD + 4) * self._pieces
            # A slot takes memory as it is filled; 32 images of 500x375 have 18 MB.
            return Slots(count, PIECE * most_bytes(self._cfg.model.img_size), pinned=self._cfg.data.pin_mem)
        except OSError:  # they go one by one then
            return None

    def _loader(self, images: Dataset, collate: Any, *, once: bool = False, **batches: Any) -> DataLoader:
        workers = self._workers
        return DataLoader(
            images,
            num_workers=workers,
            persistent_workers=workers > 0 and not once,
            prefetch_factor=IN_HAND if workers and "batch_sampler" in batches else None,
            collate_fn=collate,
            worker_init_fn=self._leash and self._leash.hold,
            # The seeds of its workers would come from the process's own generator.
            generator=torch.Generator().manual_seed(self._cfg.run.seed),
            **batches,
        )


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


def _free_bytes(device: torch.device) -> float:
    """The memory of a device that this process may count on."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes() / processes_here()
