"""The transforms of a run's images (DeiT's, DeiT III's and Swin's), from timm and torchvision."""

from __future__ import annotations

from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms

from config import Config, UserError


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
