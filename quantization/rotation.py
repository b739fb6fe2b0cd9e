"""Hadamard rotations: along the dimension that a product sums over, in groups of d, both operands by the same matrix.

    x' = x T,   T = diag(s) H / sqrt(d),   T T^T = 1,   so that (A T) (B T)^T = A B^T

H is Sylvester's matrix of signs and s are d signs: none (all +1), fixed (the same in every layer and run) or fresh (a
function of run seed, position of the run, layer and product, and not of the process's rank). The sums are made as
butterflies of distance 1, 2, 4, ..., in float32 and one rounding each, and 1 / sqrt(d) is one multiplication at the
end; zeros have no sign. So every backend gives the same bits. The INT4 layer has one of its own, a matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantization.constants import constant
from quantization.noise import WORD, Noise, philox4x32

Signs = Literal["none", "fixed", "fresh"]
SIGNS = ("none", "fixed", "fresh")
SIZES = (2, 4, 8, 16, 32, 64, 128)
STREAM = 6  # of noise, within those of a layer: behind the quantizers'

# 128 signs as the bits of four words, a 1 for -1. The first 16 are TransformerEngine's
# (+ + + - + - - - - - - + - + - -), the others are Philox4x32-10 of counter 0 and key 0.
FIXED = (0x6627D7E8, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)

# ---------------------------------------------------------------------------------------------------------------------
# INT4's
# ---------------------------------------------------------------------------------------------------------------------

BLOCK = 32
_MATRIX = tuple(tuple((-1.0) ** (i & j).bit_count() for j in range(BLOCK)) for i in range(BLOCK))


def hadamard(x: Tensor) -> Tensor:
    """x H: (..., D) of any float dtype -> float32 (..., D rounded up to a multiple of 32)."""
    blocks = F.pad(x.to(torch.float32), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    with torch.autocast(x.device.type, enabled=False):
        return (blocks @ constant(_MATRIX, x.device)).flatten(-2) * BLOCK**-0.5


# ---------------------------------------------------------------------------------------------------------------------
# The quantizers'
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotation:
    """Groups of at most `size` elements, and their signs. Raises ValueError for other values."""

    size: int
    signs: Signs = "none"

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size not in SIZES:
            raise ValueError(f"the size of a rotation must be one of {', '.join(map(str, SIZES))}; got {self.size!r}")
        if not isinstance(self.signs, str) or self.signs not in SIGNS:
            raise ValueError(f"the signs of a rotation must be one of {', '.join(SIGNS)}; got {self.signs!r}")

    def turn(self, length: int, product: int) -> Turn | None:
        """The rotation of a dimension of this length in product number `product`; None where the length is odd.

        Groups are as large as a power of two that divides the length and is at most `size`.
        """
        size = min(self.size, length & -length) if length else 0
        return Turn(size, self.signs, product) if size > 1 else None

    def __str__(self) -> str:
        return f"hadamard {self.size} signs {self.signs}"


class Turn(NamedTuple):
    """A rotation of one matrix: size of a group, signs, and the product (0, 1, 2) it is for."""

    size: int
    signs: Signs
    product: int

    @property
    def text(self) -> str:
        return f"{self.size}:{self.signs}:{self.product}"

    @staticmethod
    def parse(text: str) -> Turn:
        size, signs, product = text.split(":")
        return Turn(int(size), signs, int(product))


def signs_of(turn: Turn, noise: Noise | None, device: torch.device) -> Tensor | None:
    """The signs (turn.size, float32, +1 or -1); None where all are +1. `noise`: the layer's first stream."""
    if turn.signs == "none":
        return None
    if turn.signs == "fixed":
        words = [constant((float(word >> 16), float(word & 0xFFFF)), device).long() for word in FIXED]
        words = [(high << 16) | low for high, low in words]
    else:
        high, key = noise.state[1] + (noise.stream + STREAM), noise.state[0] & WORD  # not the rank, which is above
        zero = torch.zeros_like(high)
        words = philox4x32((zero, zero + turn.product, high & WORD, (high >> 32) & WORD), (key, zero))
    index = torch.arange(turn.size, device=device)
    bit = (torch.stack(list(words))[index >> 5] >> (index & 31)) & 1
    return 1.0 - 2.0 * bit.float()


def _along(x: Tensor, axis: int) -> Tensor:
    return x if axis == -1 else x.t()


def _butterflies(groups: Tensor) -> Tensor:
    """H times every group: (..., d) float32, by sums and differences of numbers 1, 2, 4, ... apart."""
    size, distance = groups.shape[-1], 1
    while distance < size:
        pairs = groups.unflatten(-1, (-1, 2, distance))
        a, b = pairs.unbind(-2)
        groups = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        distance *= 2
    return groups * constant((size**-0.5,), groups.device) + 0.0


def rotate(x: Tensor, axis: int, turn: Turn, noise: Noise | None = None) -> Tensor:
    """x T along axis -1 or 0 of a matrix: float32, its shape."""
    groups = _along(x.to(torch.float32), axis).unflatten(-1, (-1, turn.size))
    signs = signs_of(turn, noise, x.device)
    turned = _butterflies(groups if signs is None else groups * signs)
    return _along(turned.flatten(-2), axis).contiguous()


def rotate_back(x: Tensor, turn: Turn, noise: Noise | None = None) -> Tensor:
    """x T^T along the last axis of a matrix: float32, its shape."""
    turned = _butterflies(x.to(torch.float32).unflatten(-1, (-1, turn.size)))
    signs = signs_of(turn, noise, x.device)
    return (turned if signs is None else turned * signs).flatten(-2)
