"""An optimizer step, whose figures are read before the optimizer acts on them (early) or a step later (late)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import IterableDataset

from training.diagnosis import first_non_finite
from training.ends import TrainingError
from training.graphs import Pass
from training.passes import forward_backward, position_of
from training.state import Step, TrainingState

Batches = Iterator[tuple[Tensor, Tensor]]


class _Gradients(NamedTuple):
    """What the passes of a step leave: gradients in the parameters, on the device."""

    parameters: list[nn.Parameter]  # those that have a gradient
    norm: Tensor
    figures: Tensor  # loss, gradient norm, signals heard; means over the processes
    fed: list[tuple[Tensor, Tensor]] | None  # the micro-batches, where they cannot be drawn again


def train_step(run: TrainingState, batches: Batches) -> dict[str, float]:
    """One optimizer step. Returns loss (mean over the global batch), gradient norm and learning rate.

    Where the optimizer has a `found_inf`, with which it leaves the weights as they are, the host does not wait for the
    device: the figures are those of the step before, and `settle` waits for this one's.

    Raises TrainingError for a loss or gradient that is not finite, by which the optimizer has changed no weight.
    """
    late = getattr(run.optimizer, "found_inf", None) is not None
    return (_train_step_late if late else _train_step_early)(run, batches)


def _train_step_early(run: TrainingState, batches: Batches) -> dict[str, float]:
    """The host waits for the figures of this step, and then lets the optimizer act."""
    gradients = _compute_gradients(run, batches)
    run.in_flight = _launched(run, gradients)
    settle(run)
    _update(run, gradients)
    return run.figures


def _train_step_late(run: TrainingState, batches: Batches) -> dict[str, float]:
    """The device tells the optimizer whether the step failed, while the host waits for the step before."""
    gradients = _compute_gradients(run, batches)
    failed = run.optimizer.found_inf  # 1 from the first step on that fails; the run ends when the host knows
    failed.copy_(torch.maximum(failed, (~torch.isfinite(gradients.figures)).any()))
    launched = _launched(run, gradients)
    _update(run, gradients)
    settle(run)  # the step before
    run.in_flight = launched
    return run.figures or settle(run)


def _compute_gradients(run: TrainingState, batches: Batches) -> _Gradients:
    loss = torch.zeros((), device=run.device)
    fed = [] if isinstance(run.data.train_loader.dataset, IterableDataset) else None
    for micro in range(run.accumulation):
        images, targets = next(batches)
        if fed is not None:
            fed.append((images, targets))
        which = Pass(first=micro == 0, last=micro == run.accumulation - 1)
        with contextlib.nullcontext() if which.last or run.world_size == 1 else run.wrapped.no_sync():
            loss += forward_backward(run, run.wrapped, images, targets, position_of(run, micro), which)

    if run.world_size > 1 and run.held:
        _agree_on_held(run.held)
    run.stabilizer.after_backward(run.global_step)
    parameters = [p for p in run.parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters])
    # Loss, norm and signals together, so that all processes decide alike.
    figures = torch.stack([loss, norm, torch.full_like(loss, float(run.stop.heard))])
    if run.world_size > 1:
        dist.all_reduce(figures)
    figures /= run.world_size
    return _Gradients(parameters, norm, figures, fed)


def _agree_on_held(held: list[Tensor]) -> None:
    """The largest magnitude of any process for all: there is one checkpoint, by which they go on bit for bit."""
    together = torch.stack(held)
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    torch._foreach_copy_(held, list(together.unbind()))


def _launched(run: TrainingState, gradients: _Gradients) -> Step:
    """The present step, with its figures on their way to the host, which sleeps until they are there."""
    ready = torch.cuda.Event(blocking=True) if run.device.type == "cuda" else None
    figures = gradients.figures.to("cpu", non_blocking=True)
    if ready is not None:
        ready.record()
    return Step(run.epoch, run.step, run.lr, figures, ready, gradients.fed)


def _update(run: TrainingState, gradients: _Gradients) -> None:
    """What follows from the gradients: weights, stabilizer, schedule, moving average."""
    if run.cfg.optim.clip_grad is not None:
        clip_grads_with_norm_(gradients.parameters, run.cfg.optim.clip_grad, gradients.norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.stabilizer.after_step(run.global_step)
    run.step += 1
    run.schedule.step_update(run.global_step - 1)  # as Swin: counted from 0; a schedule of epochs ignores it
    if run.ema is not None:
        run.ema.update(run.model, step=run.global_step)


def settle(run: TrainingState) -> dict[str, float]:
    """Wait for the figures of the step in flight, if there is one. Returns those of the last step.

    Raises TrainingError where they are not finite.
    """
    step, run.in_flight = run.in_flight, None
    if step is None:
        return run.figures
    if step.ready is not None:
        step.ready.synchronize()
    loss, grad_norm, run.stop.heard_anywhere = step.figures.tolist()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        run.epoch, run.step = step.epoch, step.step
        first = first_non_finite(run, step.fed)
        raise TrainingError(
            f"Step {step.step} of epoch {step.epoch}: the loss is {loss:g} and the gradient norm {grad_norm:g}; "
            f"the first that is not finite is {first}; {run.last_good()}."
        )
    run.meter.add("loss", loss, 1)
    run.figures = {"loss": loss, "grad_norm": grad_norm, "lr": step.lr}
    return run.figures
