"""What this project adds to timm from PyPI, as records: what, why, for which versions of timm, and how it is verified.

Nothing of timm is copied or forked. `apply_patches` runs when `models` is imported; every run's manifest lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import timm
import timm.optim
from packaging.specifiers import SpecifierSet
from PIL import Image
from timm.data import auto_augment
from timm.optim import OptimInfo

from quantization.stabilizers.qramping import OPTIMIZER, QRampingAdamW


@dataclass(frozen=True)
class Patch:
    """One registration in or change of timm.

    Attributes:
        name, what, why: one sentence each.
        timm_versions: versions it is known to work with, as a PEP 440 specifier.
        verified_by: what `verify` looks at.
        apply: makes the change; applying twice changes nothing more.
        verify: whether the change is in place.
    """

    name: str
    what: str
    why: str
    timm_versions: str
    verified_by: str
    apply: Callable[[], None]
    verify: Callable[[], bool]

    def record(self) -> dict[str, str]:
        """The patch as text, for manifests."""
        return {key: value for key, value in asdict(self).items() if isinstance(value, str)}


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep > 0 else image.point(lambda value: 0)


def _posterize_to_black() -> None:
    auto_augment.NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing"), _posterize))


def _posterizes_to_black() -> bool:
    white = Image.new("RGB", (1, 1), "white")
    return auto_augment.NAME_TO_OP["PosterizeIncreasing"](white, 0).getpixel((0, 0)) == (0, 0, 0)


def _register_optimizer() -> None:
    if OPTIMIZER not in timm.optim.list_optimizers():
        info = OptimInfo(OPTIMIZER, QRampingAdamW, "AdamW with a period of steps for each element", has_betas=True)
        timm.optim._optim_factory.default_registry.register(info)


def _optimizer_registered() -> bool:
    return timm.optim.get_optimizer_class(OPTIMIZER, bind_defaults=False) is QRampingAdamW


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="posterize_to_0_bits",
        what="AutoAugment's Posterize and PosterizeIncreasing give a black image where 0 bits are to be kept.",
        why="rand-m9-mstd0.5 asks for 0 bits in one image of about 700, an error since Pillow 13.",
        timm_versions="==1.0.*",
        verified_by="PosterizeIncreasing of a white pixel to 0 bits is black.",
        apply=_posterize_to_black,
        verify=_posterizes_to_black,
    ),
    Patch(
        name="qrampingadamw",
        what="Registers qrampingadamw, the optimizer of Q-Ramping, in timm's optimizer factory.",
        why="timm.optim.create_optimizer_v2 then makes it with timm's parameter groups.",
        timm_versions="==1.0.*",
        verified_by="timm's factory gives its class.",
        apply=_register_optimizer,
        verify=_optimizer_registered,
    ),
)


def apply_patches(patches: Iterable[Patch] = PATCHES) -> None:
    """Apply each patch and verify it.

    Raises RuntimeError, naming the patch, where timm is of another version or the change does not take.
    """
    for patch in patches:
        if timm.__version__ not in SpecifierSet(patch.timm_versions, prereleases=True):
            raise RuntimeError(
                f"the patch {patch.name} is for timm {patch.timm_versions} and timm is {timm.__version__}; "
                "install the version in requirements.txt"
            )
        patch.apply()
        if not patch.verify():
            raise RuntimeError(f"the patch {patch.name} did not take with timm {timm.__version__}: {patch.what}")
