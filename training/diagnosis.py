"""What went wrong in a step whose loss or gradients are not finite."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.passes import forward_backward, position_of
from training.state import TrainingState


def first_non_finite(run: TrainingState, fed: list[tuple[Tensor, Tensor]] | None) -> str:
    """Name what first became NaN or Inf in the present step, which failed, by repeating it on the weights that the
    optimizer left alone. fed: its micro-batches; None: they are drawn again, each sample being a function of its place.

    A stabilizer's shadow or newly frozen weights may be a step or two further; that does not bring a value back.
    The order is that of computation: parameters, input, activations, gradients of activations, gradients of parameters.
    """
    found: list[str] = []
    if run.graphs is not None:
        run.graphs.forget()  # their memory is needed

    def look(what: str, value: object) -> None:
        if not found and isinstance(value, Tensor) and not torch.isfinite(value).all():
            found.append(what)

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def after_forward(_module: nn.Module, _inputs: object, output: object) -> None:
            look(f"the activation of {name}", output)
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: look(f"the gradient at the output of {name}", gradient))

        return after_forward

    for name, parameter in run.model.named_parameters():
        look(f"the parameter {name}", parameter)
    handles = [m.register_forward_hook(hook(n)) for n, m in run.model.named_modules() if n and not list(m.children())]
    run.optimizer.zero_grad()
    batches = run.upcoming_batches() if fed is None else fed
    for micro, (images, targets) in enumerate(itertools.islice(batches, run.accumulation)):
        look("the input", images)
        if not found:
            forward_backward(run, run.model, images, targets, position_of(run, micro))
    for name, parameter in run.model.named_parameters():
        look(f"the gradient of {name}", parameter.grad)
    for handle in handles:
        handle.remove()
    everywhere = [found]
    if run.world_size > 1:
        everywhere = [[] for _ in range(run.world_size)]
        dist.all_gather_object(everywhere, found)
    named = [f"{what[0]} (process {rank})" for rank, what in enumerate(everywhere) if what]
    return named[0].removesuffix(" (process 0)") if named else "not one of the layers' activations or gradients"
