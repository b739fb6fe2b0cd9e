"""What a run trains with and how far it has come; what it does with that is in the modules beside this one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from config import Config
from datasets import Data
from quantization.layers.linear import blocks_below_window, held_magnitudes
from quantization.stabilizers import Stabilizer
from quantization.watch.probe import Probe
from record.checkpoint import find_last
from record.progress import Meter
from record.runlog import RunLog
from training.ends import StopSignal
from training.graphs import GraphedPasses
from training.losses import Loss


@dataclass(frozen=True)
class Setup:
    """What a run was told, and what follows from it and the machine. None of it changes while it trains."""

    cfg: Config
    rank: int
    world_size: int
    device: torch.device
    amp: torch.dtype | None  # of autocast; None for none
    batch_size: int  # samples of one process at a time
    accumulation: int  # micro-batches of an optimizer step
    steps_per_epoch: int  # optimizer steps


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done in the current epoch
    best_top1: float = -1.0  # below any accuracy: the first epoch is the best so far, whatever it reached
    meter: Meter = field(default_factory=Meter)  # figures of the current epoch
    figures: dict[str, float] = field(default_factory=dict)  # of the last step that has been settled
    origin: tuple[int, int] = (0, 0)  # optimizer steps and passes done when this session began
    blocks_undone: Tensor | int = 0  # that the layers have counted below fp8's window outside of the run's training


@dataclass(frozen=True)
class Step:
    """An optimizer step that the host has launched; the device may still be working on it."""

    epoch: int
    step: int
    lr: float
    figures: Tensor  # on the host once `ready`: loss, gradient norm, signals heard; means over the processes
    ready: torch.cuda.Event | None
    fed: list[tuple[Tensor, Tensor]] | None  # its micro-batches of a stream; others can be drawn again


def _held_by(record: str, name: str) -> property:
    """`run.NAME` for `run.RECORD.NAME`."""

    def write(state: EvaluationState, value: object) -> None:
        setattr(getattr(state, record), name, value)

    return property(lambda state: getattr(getattr(state, record), name), write)


@dataclass(kw_only=True)
class EvaluationState:
    """All that an evaluation reads. What `setup` holds is an attribute here too, as `run.device`."""

    setup: Setup
    model: nn.Module  # the bare model
    data: Data

    cfg = _held_by("setup", "cfg")
    rank = _held_by("setup", "rank")
    world_size = _held_by("setup", "world_size")
    device = _held_by("setup", "device")
    amp = _held_by("setup", "amp")
    batch_size = _held_by("setup", "batch_size")
    accumulation = _held_by("setup", "accumulation")
    steps_per_epoch = _held_by("setup", "steps_per_epoch")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)


@dataclass(kw_only=True)
class TrainingState(EvaluationState):
    """All that a step reads and changes. What `progress` holds is an attribute here too, as `run.step`."""

    wrapped: nn.Module  # the model, under DistributedDataParallel where there are several processes
    loss: Loss
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    mixup: Mixup | None
    ema: ModelEmaV3 | None
    stabilizer: Stabilizer
    probe: Probe
    log: RunLog
    graphs: GraphedPasses | None  # None: every pass is launched kernel by kernel
    not_loaded: list[str] = field(default_factory=list)  # what --finetune found no weights for
    stop: StopSignal = field(default_factory=StopSignal)
    progress: Progress = field(default_factory=Progress)
    in_flight: Step | None = None  # the last step, until `settle` has looked at its figures

    epoch = _held_by("progress", "epoch")
    step = _held_by("progress", "step")
    best_top1 = _held_by("progress", "best_top1")
    meter = _held_by("progress", "meter")
    figures = _held_by("progress", "figures")

    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the model, which stay the same ones: walking through its modules at every step takes time."""
        return list(self.model.parameters())

    @property
    def lr(self) -> float:
        """The rate of the schedule; with optim.layer_decay that of the head, of which blocks have their shares."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def global_step(self) -> int:
        """Optimizer steps done in the whole run."""
        return self.epoch * self.steps_per_epoch + self.step

    @functools.cached_property
    def held(self) -> list[Tensor]:
        """What delayed outer scales hang from, which stays the same tensors."""
        return held_magnitudes(self.model)

    def blocks_below_window(self) -> Tensor | None:
        """How many blocks of this process's training so far the fp8 carrier could not hold exactly (int64, on the
        device); None with another carrier."""
        counted = blocks_below_window(self.model)
        return None if counted is None else counted - self.progress.blocks_undone

    def last_good(self) -> str:
        """Which checkpoint a failed run can go back to, in words."""
        last = find_last(self.log.output_dir)
        return f"the last good checkpoint is {last}" if last else f"there is no checkpoint in {self.log.output_dir} yet"

    def upcoming_batches(self, epochs: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches from the present step to the end of this epoch and of those after it, on the device."""

        start = self.step * self.accumulation
        for epoch in range(self.epoch, self.epoch + epochs):
            yield from itertools.islice(
                self.data.train_batches(epoch, start=start), self.steps_per_epoch * self.accumulation - start
            )
            start = 0
