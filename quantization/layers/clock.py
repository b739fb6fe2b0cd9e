"""The noise of quantized layers: a clock that the layers of a model share, and what a layer draws from it."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from quantization.layers.recompute import computed_again, may_be_checkpointed, noise_of_call
from quantization.noise import LAP, LAPS, LAYERS, WORD, signed


class NoiseClock(nn.Module):
    """The noise state that all quantized layers of a model share: position of the run and lap within it.

    `attach` advances the clock by one position before each forward pass of the model. A layer that draws a second time
    at one position, because a part of the model is called on its own or a layer is used twice, begins a new lap. So
    noise is fresh however a layer is reached. A training loop that resumes runs calls `seek` with the position.

    seed: from 0 to 2^32 - 1; None takes torch's initial seed. rank: of the process; None asks torch.distributed at
    every position, so it does not matter whether the model or the process group is made first.

    The clock is no child of the model: it takes no part in state dicts, nor in the copies of rank 0's buffers that
    DistributedDataParallel makes (noise must differ by rank). Its layers take it along to another device. A deep copy
    of a model has a clock of its own that goes on as the original's would; a deep copy of a part of a model or of
    a layer made alone, which may come to stand beside the original, has a clock with noise of its own.
    """

    _model: weakref.ref[nn.Module] | None = None  # that it is attached to; not known of a pickled one

    def __init__(self, seed: int | None = None, rank: int | None = None) -> None:
        super().__init__()
        self.register_buffer("next_position", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("laps", torch.zeros((), dtype=torch.int64), persistent=False)  # since the last position
        self.register_buffer("state", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.drawn: set[int] = set()  # the layers that have drawn in this lap
        self.reseed(torch.initial_seed() & WORD if seed is None else seed, rank)

    @staticmethod
    def unlike_others() -> NoiseClock:
        """A clock with a seed drawn from torch's default generator, so that no two that are made share their noise."""
        if _get_current_dispatch_mode() is not None:  # under FakeTensorMode, say, where no number can be drawn
            return NoiseClock()
        return NoiseClock(int(torch.randint(WORD + 1, (), device="cpu")))

    @property
    def rank(self) -> int:
        if self.given_rank is not None:
            return self.given_rank
        return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

    def reseed(self, seed: int, rank: int | None) -> None:
        """Start over at position 0 with another run seed and process rank, each from 0 to 2^32 - 1."""
        if not 0 <= seed <= WORD or not 0 <= (rank or 0) <= WORD:
            raise ValueError(f"seed and rank must lie in [0, 2^32); got {seed} and {rank}")
        self.seed, self.given_rank = seed, rank
        self.lapped = True  # whether `laps` may be other than 0
        self.seek(0)
        self.advance()
        self.seek(0)

    def seek(self, position: int) -> None:
        """The next forward pass is number `position` (0 to 2^32 - 1) of the run. Does not synchronise the device."""
        self.next_position.fill_(position)
        self.sought = True

    def advance(self) -> None:
        """Begin a forward pass. The state is a new tensor: a backward pass still to come keeps that of its forward.

        Positions stay where they are in memory: a CUDA graph with this in it goes on from wherever they are set.
        """
        if self.lapped:
            if not self.sought:
                self.next_position.add_(self.laps // LAPS)  # positions that laps have used up
            self.laps.zero_()
            self.lapped = False
        self.sought = False
        self._show(self.next_position << 32)
        self.next_position.add_(1)

    def lap(self) -> None:
        """Begin another lap within the present position."""
        self.laps.add_(1)
        self.lapped = True
        self._show(((self.next_position - 1) << 32) + self.laps * LAP)

    def _show(self, high: Tensor) -> None:
        key = torch.full_like(high, signed(self.rank << 32 | self.seed))
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            # A tensor made there could not be saved for any backward pass.
            with torch.inference_mode(False):
                self.state = torch.stack([key, high])
        else:
            self.state = torch.stack([key, high])
        self.drawn.clear()

    def draw(self, layer: int) -> Tensor:
        """The noise state of a call of layer number `layer`: (2,) int64, see `Noise`."""
        if self.sought:
            self.advance()
        elif layer in self.drawn:
            self.lap()
        self.drawn.add(layer)
        return self.state

    @contextlib.contextmanager
    def elsewhere(self, position: int, rank: int = 0) -> Iterator[None]:
        """Forward passes from `position` on with another rank's noise; afterwards the clock stands where it stood."""
        kept = self.given_rank, self.state, self.sought, self.lapped, self.drawn
        places = self.next_position.clone(), self.laps.clone()
        self.given_rank, self.drawn = rank, set()
        self.seek(position)
        try:
            yield
        finally:
            self.given_rank, self.state, self.sought, self.lapped, self.drawn = kept
            self.next_position.copy_(places[0])
            self.laps.copy_(places[1])

    def attach(self, model: nn.Module) -> None:
        """Advance before every forward pass of `model`, which refers to the clock as `model.noise`, unless it has an
        attribute of that name itself; `clock_of` finds it either way."""
        self._model = weakref.ref(model)
        model.__dict__[_CLOCK] = self  # not add_module: that would make it a child
        if not hasattr(model, "noise"):
            model.__dict__["noise"] = self
        model.register_forward_pre_hook(_advance)

    def _apply(self, fn: Callable, recurse: bool = True) -> NoiseClock:
        """What .to() and its like do, and to_empty(), which a model made on the device of shapes needs: that brings no
        values along, so those there were are put back, and where there were none the clock starts over."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, kept in before.items():
            now = getattr(self, name)
            if now is not kept and not kept.is_meta:
                now.copy_(kept)
        if before["state"].is_meta and not self.state.is_meta:
            self.reseed(self.seed, self.given_rank)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> NoiseClock:
        model = self._model and self._model()
        # A module is noted in `memo` before what it holds is copied.
        if isinstance(model, NoisyLinear) or (model is not None and id(model) not in memo):
            twin = memo[id(self)] = NoiseClock.unlike_others().to(self.state.device)
            twin.given_rank = self.given_rank
            return twin
        twin = memo[id(self)] = NoiseClock.__new__(NoiseClock)
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if model is not None:
            twin._model = weakref.ref(memo[id(model)])
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_model"}  # it cannot be pickled

    def extra_repr(self) -> str:
        return f"seed={self.seed}, rank={self.rank}"


_CLOCK = "_noise_clock"


def clock_of(model: nn.Module) -> NoiseClock | None:
    """The clock that is attached to a model; None where there is none."""
    return model.__dict__.get(_CLOCK)


def _advance(model: nn.Module, _args: object) -> None:
    if torch.compiler.is_compiling() or not computed_again():
        clock_of(model).advance()


class NoisyLinear(nn.Linear):
    """A linear layer with a clock of noise and a number, `layer`, that keeps its noise apart from other layers'."""

    noise: NoiseClock
    layer: int = 0

    def join(self, clock: NoiseClock, layer: int) -> None:
        """Draw from `clock` as its layer number `layer`. Raises ValueError where the clock has no room for it."""
        if not 0 <= layer < LAYERS:
            raise ValueError(f"a model has room for {LAYERS} linear layers with noise of their own; got number {layer}")
        self.__dict__["noise"] = clock  # not a child
        self.layer = layer

    def draw_noise(self) -> Tensor:
        """The noise state of this call, or of the call that this one repeats for a backward pass."""
        if self.noise.state.is_meta and not self.weight.is_meta:  # load_state_dict(assign=True) has filled such a model
            self.noise.to_empty(device=self.weight.device)
        if torch.compiler.is_compiling() or not may_be_checkpointed():
            return self.noise.draw(self.layer)
        return noise_of_call(self, lambda: self.noise.draw(self.layer))

    def _apply(self, fn: Callable, recurse: bool = True) -> NoisyLinear:
        """What .to(), .cuda() and their like do: the clock comes along."""
        super()._apply(fn, recurse)
        self.noise._apply(fn)
        return self
