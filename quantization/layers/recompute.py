"""Activation checkpointing computes a forward pass again: its layers must then draw the noise they drew first.

torch.utils.checkpoint keeps the random state of torch's generators for that, which our noise does not come from. So a
layer that is called within a checkpointed region leaves its noise with the region, and takes it from there when the
region is computed again, whatever other passes came in between. A region is the object in which torch.utils.checkpoint
keeps its own; it is found on the call stack, for torch offers no way to ask. Both kinds of checkpoints, reentrant or
not, are known, also within each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

_FILE = checkpoint.CheckpointFunction.forward.__code__.co_filename
_KEPT = "_mxfp4_noise"  # the attribute of a region


def may_be_checkpointed() -> bool:
    """Whether the present forward pass could belong to a checkpointed region; quick to say that it does not."""
    if not torch.is_grad_enabled():
        return not torch.is_inference_mode_enabled()  # the first pass of a reentrant checkpoint runs without gradients
    return (
        torch._C._current_graph_task_id() != -1  # within a backward pass
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def _regions() -> Iterator[tuple[Any, int | None]]:
    """The checkpointed regions around the caller, innermost first; with each, where it is computed again, for which
    backward pass, else None."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _FILE:
            name, variables = frame.f_code.co_name, frame.f_locals
            if name == "checkpoint" and variables.get("gen") is not None:
                yield variables["gen"].gi_frame.f_locals["new_frame"], None
            elif name == "unpack_hook":
                yield variables["frame"], variables["gid"]
            elif name == "forward" and "run_function" in variables:
                yield variables["ctx"], None
            elif name == "backward" and "detached_inputs" in variables:
                yield variables["ctx"], torch._C._current_graph_task_id()
        frame = frame.f_back


def computed_again() -> bool:
    """Whether the caller is computed again for a backward pass."""
    return may_be_checkpointed() and any(task is not None for _, task in _regions())


class _Kept:
    """What layers left with a region."""

    def __init__(self) -> None:
        self.states: dict[int, list[Tensor]] = {}  # by layer, in the order of its calls
        self.task: int | None = None
        self.taken: dict[int, int] = {}  # calls computed again so far for the backward pass `task`

    def again(self, layer: int, task: int) -> Tensor | None:
        if self.task != task:
            self.task, self.taken = task, {}
        place = self.taken.get(layer, 0)
        self.taken[layer] = place + 1
        states = self.states.get(layer, [])
        return states[place] if place < len(states) else None


def noise_of_call(layer: nn.Module, draw: Callable[[], Tensor]) -> Tensor:
    """The noise state of a call of `layer`: that of the call it repeats, or if it repeats none a new one by `draw`."""
    state, first = None, []
    for region, task in _regions():
        kept = region.__dict__.setdefault(_KEPT, _Kept())
        if task is None:
            first.append(kept)
        elif state is None:
            state = kept.again(id(layer), task)
    if state is None:
        state = draw()
    for kept in first:
        kept.states.setdefault(id(layer), []).append(state)
    return state
