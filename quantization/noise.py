"""The noise of stochastic rounding: counter-based, so that it is a function of where it is used and of nothing else.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011) maps a 128-bit counter
and a 64-bit key to four 32-bit words. We spend 16 bits an element, eight elements a call:

    key      = (run seed, rank)
    counter  = (column // 8, row, 2^17 * lap + 8 * layer + quantizer, position)

with row and column those of the stored tensor, its leading dimensions flattened. A position is a forward pass of the
run; a lap is a further use of layers within one position (layers/clock.py). Element (row, column) takes half
`column % 2` (low, high) of word `(column % 8) // 2`. No field overlaps another, so two calls never share a stream, and
a run resumed at a position continues its noise bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORD = 0xFFFFFFFF  # the bits of a word
_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ELEMENTS_PER_CALL = 8
STREAMS_PER_LAYER = 8  # quantizers of one layer, six of them rounded up
LAYERS = 2**14  # that a lap has room for
LAP = STREAMS_PER_LAYER * LAYERS  # streams of one lap
LAPS = 2**32 // LAP  # of one position


class Noise(NamedTuple):
    """One stream of noise: `state` (int64, 2: the key and the high half of the counter) and the stream's number.

    `stream` is added to the high half of the counter. The state lives on the device that draws: a new seed each step
    costs no synchronisation, and a compiled or captured step reads it afresh.
    """

    state: Tensor
    stream: int = 0

    @staticmethod
    def from_seed(seed: int, device: torch.device | str = "cpu") -> Noise:
        """The stream 0 of a plain integer seed, 64 bits of which count."""
        return Noise(torch.tensor([signed(seed), 0], dtype=torch.int64, device=device))


def signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits."""
    return ((word & (2**64 - 1)) ^ 2**63) - 2**63


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32: four words of counter and two of key in, four words out, all int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap around in int64, which leaves their bits as they should be.
        p0, p1 = c0 * _ROUND_MULTIPLIERS[0], c2 * _ROUND_MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & WORD, (k1 + _KEY_INCREMENTS[1]) & WORD
    return c0, c1, c2, c3


def uniform(shape: torch.Size | tuple[int, ...], noise: Noise, first_row: int = 0) -> Tensor:
    """Draws u = (bits + 1/2) / 2^16 in (0, 1), float32, one for each element of a tensor of `shape`.

    first_row: the number of the tensor's first row; draws of other rows are other draws.
    """
    columns = shape[-1]
    rows = 1
    for size in shape[:-1]:
        rows *= size
    device = noise.state.device
    key, high = noise.state[0], noise.state[1] + noise.stream
    column = torch.arange(-(-columns // ELEMENTS_PER_CALL), device=device)
    row = torch.arange(first_row, first_row + rows, device=device).unsqueeze(1)
    words = philox4x32((column, row, high & WORD, (high >> 32) & WORD), (key & WORD, (key >> 32) & WORD))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    bits = halves.reshape(rows, -1)[:, :columns].reshape(shape)
    return (bits.to(torch.float32) + 0.5) * 2.0**-16
