"""Each patch: timm before it (where that can be seen) and after, and that it is refused for other versions."""

from __future__ import annotations

import numpy as np
import pytest
import timm
from packaging.specifiers import SpecifierSet
from PIL import Image

from config import load_config
from images.transforms import train_transform
from models import PATCHES
from timm_patches import Patch, apply_patches


def test_every_patch_is_described_and_in_place():
    for patch in PATCHES:
        assert timm.__version__ in SpecifierSet(patch.timm_versions)
        assert patch.verify()
        assert all(patch.record().get(key) for key in ("name", "what", "why", "timm_versions", "verified_by"))
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)


def test_applying_twice_changes_nothing():
    before = timm.list_models()
    apply_patches(PATCHES)
    assert timm.list_models() == before


def test_another_timm_version_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(timm, "__version__", "2.0.0")
    with pytest.raises(RuntimeError, match=r"the patch mxfp4_models is for timm ==1\.0\.\* and timm is 2\.0\.0"):
        apply_patches(PATCHES)


def test_a_patch_that_does_not_take_is_named():
    broken = Patch("broken", "a", "b", "==1.0.*", "c", apply=lambda: None, verify=lambda: False)
    with pytest.raises(RuntimeError, match="the patch broken did not take"):
        apply_patches([broken])


def test_posterize_to_nothing_is_black():
    """Pillow 13 refuses to keep 0 bits, which timm asks of it at the magnitudes above 10 that the DeiT policy draws."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="bits must be between"):
        timm.data.auto_augment.posterize(image, 0)
    policy = train_transform(load_config()).transforms[2]
    (posterize,) = (op for op in policy.ops if op.name == "PosterizeIncreasing")
    posterize.prob, posterize.magnitude_std, posterize.magnitude = 1.0, 0, 10
    assert not np.asarray(posterize(image)).any()
    posterize.magnitude, posterize.magnitude_max = 15, 20  # -2 bits
    assert not np.asarray(posterize(image)).any()
    posterize.magnitude = 9
    assert np.array_equal(np.asarray(posterize(image)), np.asarray(image) & 0b1000_0000)
