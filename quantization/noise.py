"""The noise of stochastic rounding: counter-based, so that it is a function of where it is used and of nothing else.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011) maps a 128-bit counter
and a 64-bit key to four 32-bit words. We spend 16 bits an element, eight elements a call:

    key      = (run seed, rank)
    counter  = (column // 8, row, 8 * layer + quantizer, position)      position: forward passes of the run so far

with row and column those of the stored tensor, its leading dimensions flattened. Element (row, column) takes half
`column % 2` (low, high) of word `(column % 8) // 2`. No field overlaps another, so two calls never share a stream, and
a run resumed at a position continues its noise bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

_MASK = 0xFFFFFFFF
_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ELEMENTS_PER_CALL = 8
STREAMS_PER_LAYER = 8  # quantizers of one layer, six of them rounded up


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
        return Noise(torch.tensor([_signed(seed), 0], dtype=torch.int64, device=device))


def _signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits."""
    return ((word & (2**64 - 1)) ^ 2**63) - 2**63


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32: four words of counter and two of key in, four words out, all int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap around in int64, which leaves their bits as they should be.
        p0, p1 = c0 * _ROUND_MULTIPLIERS[0], c2 * _ROUND_MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def uniform(shape: torch.Size | tuple[int, ...], noise: Noise) -> Tensor:
    """Draws u = (bits + 1/2) / 2^16 in (0, 1), float32, one for each element of a tensor of `shape`."""
    columns = shape[-1]
    rows = 1
    for size in shape[:-1]:
        rows *= size
    device = noise.state.device
    key, high = noise.state[0], noise.state[1] + noise.stream
    column = torch.arange(-(-columns // ELEMENTS_PER_CALL), device=device)
    row = torch.arange(rows, device=device).unsqueeze(1)
    words = philox4x32((column, row, high & _MASK, (high >> 32) & _MASK), (key & _MASK, (key >> 32) & _MASK))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    bits = halves.reshape(rows, -1)[:, :columns].reshape(shape)
    return (bits.to(torch.float32) + 0.5) * 2.0**-16


class NoiseClock(nn.Module):
    """The noise state that all quantized layers of a model share, advanced by one position at every forward pass.

    `attach` advances the clock before each forward pass of the model, so that a model trains with fresh noise in any
    loop that calls the model itself (parts of it called on their own reuse the noise of the last whole pass). A
    training loop that resumes runs calls `seek` with the position.

    The clock is no child of the model: it takes no part in state dicts, nor in the copies of rank 0's buffers that
    DistributedDataParallel makes (noise must differ by rank). Its layers take it along to another device.
    """

    def __init__(self, seed: int | None = None, rank: int | None = None) -> None:
        super().__init__()
        self.register_buffer("next_position", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("state", torch.zeros(2, dtype=torch.int64), persistent=False)
        if rank is None:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.reseed(torch.initial_seed() & _MASK if seed is None else seed, rank)

    def reseed(self, seed: int, rank: int) -> None:
        """Start over at position 0 with another run seed and process rank, each from 0 to 2^32 - 1."""
        if not 0 <= seed <= _MASK or not 0 <= rank <= _MASK:
            raise ValueError(f"seed and rank must lie in [0, 2^32); got {seed} and {rank}")
        self.seed, self.rank = seed, rank
        self.seek(0)
        self.advance()
        self.seek(0)

    def seek(self, position: int) -> None:
        """The next forward pass is number `position` (0 to 2^32 - 1) of the run. Does not synchronise the device."""
        self.next_position.fill_(position)

    def advance(self) -> None:
        """Begin a forward pass. The state is a new tensor: a backward pass still to come keeps that of its forward.

        The position stays where it is in memory, so that a CUDA graph with this in it goes on from wherever it is set.
        """
        key = torch.full_like(self.next_position, _signed(self.rank << 32 | self.seed))
        self.state = torch.stack([key, self.next_position << 32])
        self.next_position.add_(1)

    def attach(self, model: nn.Module) -> None:
        """Advance before every forward pass of `model`, which refers to the clock as `model.noise`."""
        model.__dict__["noise"] = self  # not add_module: that would make it a child
        model.register_forward_pre_hook(_advance)

    def extra_repr(self) -> str:
        return f"seed={self.seed}, rank={self.rank}"


class NoisyLinear(nn.Linear):
    """A linear layer with a clock of noise and a number, `layer`, that keeps its noise apart from other layers'."""

    noise: NoiseClock
    layer: int = 0

    def _apply(self, fn: Callable, recurse: bool = True) -> NoisyLinear:
        """What .to(), .cuda() and their like do: the clock comes along."""
        super()._apply(fn, recurse)
        self.noise._apply(fn)
        return self


def _advance(model: nn.Module, _args: object) -> None:
    model.noise.advance()
