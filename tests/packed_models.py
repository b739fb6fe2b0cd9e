"""Small models as training would leave them, and their packed files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import load_config
from models import create_model, save_packed
from models.packed import pack_model
from record.packed import Trained

SMALL = "{name: deit_tiny_patch16_224, img_size: 32, kwargs: {embed_dim: 64, depth: 2, num_heads: 2}}"
SWIN = "{name: swin_tiny_patch4_window7_224, img_size: 56, kwargs: {embed_dim: 24, depths: [1, 2, 1, 1]}}"
DISTILLED = "{name: deit_tiny_distilled_patch16_224, img_size: 32, kwargs: {embed_dim: 64, depth: 1, num_heads: 2}}"
CLASSES = ("a", "b", "c")


def trained_model(
    model: str = SMALL, *overrides: str, classes: int = 3, config: str | Path | None = None
) -> tuple[nn.Module, Any]:
    """A model in MXFP4 (or by `config`), with shadows that change most roundings and delayed scales held."""
    quant = ["quant={scheme: mx}"] if config is None else []
    cfg = load_config(config, [f"model={model}", *quant, *overrides])
    torch.manual_seed(0)
    net = create_model(cfg, classes)
    for module in net.modules():
        if hasattr(module, "shadow"):
            module.shadow = module.weight.detach() * (1 + 0.2 * torch.randn(module.weight.shape))
            if module.held is not None:
                module.held.copy_(torch.tensor([[3.7, 0.0], [0.31, 0.0], [0.0, 0.0]]).view(torch.int32))
    return net.eval(), cfg


def packed_file(path: Path, net: nn.Module, cfg: Any, dtype: str | None = None) -> Path:
    trained = Trained(commit="abc", top1=12.5, data_set="digits", val_split=None)
    save_packed(pack_model(net, cfg, CLASSES, 3, trained), path, dtype)
    return path


def images_for(cfg: Any, count: int = 2) -> Tensor:
    return torch.randn(count, 3, cfg.model.img_size, cfg.model.img_size, generator=torch.Generator().manual_seed(1))
