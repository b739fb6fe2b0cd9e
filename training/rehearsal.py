"""Steps that are trained and then undone: what a stabilizer measures before it decides how to train."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch

from training.ends import TrainingError
from training.state import TrainingState
from training.step import settle, train_step


def rehearse(run: TrainingState, steps: int, observe: Callable[[], None]) -> None:
    """Train for `steps` optimizer steps, call `observe` after each, and put everything back bit for bit.

    Iterators over the training data that were open before are not valid afterwards. Raises TrainingError.
    """
    settle(run)
    epoch = run.epoch
    with _undone(run):
        batches = run.upcoming_batches(epochs=2 + steps // run.steps_per_epoch)
        for done in range(steps):
            try:
                train_step(run, batches)
            except StopIteration:
                raise TrainingError(
                    f"The training data ended after {done} of {steps} rehearsed steps in epoch {epoch}."
                ) from None
            observe()
        settle(run)


@contextlib.contextmanager
def _undone(run: TrainingState) -> Iterator[None]:
    """Weights, optimizer, progress and generators as they were, unless what is in between fails.

    The learning rate comes back with the optimizer's groups; a schedule is a function of the step.
    """
    modules = [run.model] + ([] if run.ema is None else [run.ema.module])
    weights = copy.deepcopy([m.state_dict() for m in modules])
    optimizer = copy.deepcopy(run.optimizer.state_dict())
    progress, corrupt, blocks = run.progress, run.data.corrupt, run.blocks_below_window()
    run.progress = copy.deepcopy(progress)
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        yield
    for module, kept in zip(modules, weights, strict=True):
        module.load_state_dict(kept)
    run.optimizer.load_state_dict(optimizer)
    run.progress, run.data.corrupt = progress, corrupt
    if blocks is not None:
        progress.blocks_undone = progress.blocks_undone + run.blocks_below_window() - blocks
    random.setstate(python)
    np.random.set_state(numpy)
