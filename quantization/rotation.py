"""Hadamard rotations: H block-diagonal and normalised, H = H^T = H^-1, so that X H (W H)^T = X W^T."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quantization.constants import constant

BLOCK = 32
_SIGNS = tuple(tuple((-1.0) ** (i & j).bit_count() for j in range(BLOCK)) for i in range(BLOCK))


def hadamard(x: Tensor) -> Tensor:
    """x H: (..., D) of any float dtype -> float32 (..., D rounded up to a multiple of 32)."""
    blocks = F.pad(x.to(torch.float32), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    with torch.autocast(x.device.type, enabled=False):
        return (blocks @ constant(_SIGNS, x.device)).flatten(-2) * BLOCK**-0.5
