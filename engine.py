"""One epoch of training, one evaluation, and what a step does when a loss is not finite or a signal arrives.

Every random draw of a step (mixup, dropout, stochastic depth, quantization noise) is a function of the run's seed, the
process's rank and the step, so a run that is stopped and resumed goes on bit for bit without storing any generator.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from pydantic import ValidationError
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from config import Config, UserError, dump_config, recipe_differences
from datasets import Data, to_device
from quantization.layers.clock import NoiseClock
from quantization.layers.linear import blocks_below_window
from quantization.stabilizers import Stabilizer
from quantization.watch.probe import Probe
from record.checkpoint import LAST, find_last, save_checkpoint
from record.progress import Meter
from record.runlog import RunLog
from record.weights import restore_model
from training.diagnosis import first_non_finite
from training.graphs import GraphedPasses, Pass
from training.losses import Loss

# Noise positions of evaluation and of the probe, which only matter where the forward pass rounds stochastically, lie
# above training's.
EVALUATION_POSITION, PROBE_POSITION = 2**31, 3 * 2**30


class TrainingError(Exception):
    """The run cannot go on: a loss or gradient that is not finite. One sentence; exit code 1."""


class StopSignal:
    """Remembers SIGTERM or SIGINT until the step in progress is done. A second one has its usual, immediate effect."""

    def __init__(self) -> None:
        self.heard = 0  # number of the signal this process has received
        self.heard_anywhere = 0.0  # not zero once all processes know that one of them has received a signal

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: object) -> None:
        self.heard = number
        signal.signal(number, signal.SIG_DFL)


@dataclass(frozen=True)
class Step:
    """An optimizer step that the host has launched; the device may still be working on it."""

    epoch: int
    step: int
    lr: float
    figures: Tensor  # on the host once `ready`: loss, gradient norm, signals heard; means over the processes
    ready: torch.cuda.Event | None
    micro_batches: list[tuple[Tensor, Tensor]]


@dataclass
class Run:
    """Everything a run trains with, and how far it has come."""

    cfg: Config
    model: nn.Module  # the bare model
    wrapped: nn.Module  # the same under DistributedDataParallel where there are several processes
    loss: Loss
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    data: Data
    mixup: Mixup | None
    ema: ModelEmaV3 | None
    stabilizer: Stabilizer
    probe: Probe
    log: RunLog
    stop: StopSignal
    device: torch.device
    amp: torch.dtype | None  # of autocast; None for none
    rank: int
    world_size: int
    batch_size: int  # samples of one process at a time
    accumulation: int  # micro-batches of an optimizer step
    steps_per_epoch: int  # optimizer steps
    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done in the current epoch
    best_top1: float = -1.0  # below any accuracy: the first epoch is the best so far, whatever it reached
    meter: Meter = field(default_factory=Meter)  # figures of the current epoch
    graphs: GraphedPasses | None = None  # None: every pass is launched kernel by kernel
    in_flight: Step | None = None  # the last step, until `settle` has looked at its figures
    figures: dict[str, float] = field(default_factory=dict)  # of the last step that has been settled
    not_loaded: list[str] = field(default_factory=list)  # what --finetune found no weights for

    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the model, which stay the same ones: walking through its modules at every step takes time."""
        return list(self.model.parameters())

    @property
    def global_step(self) -> int:
        """Optimizer steps done in the whole run."""
        return self.epoch * self.steps_per_epoch + self.step

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def last_good(self) -> str:
        """Which checkpoint a failed run can go back to, in words."""
        last = find_last(self.log.output_dir)
        return f"the last good checkpoint is {last}" if last else f"there is no checkpoint in {self.log.output_dir} yet"

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: schedule, data order and noise follow from the steps done."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "stabilizer": self.stabilizer.state_dict(),
            "probe": self.probe.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "best_top1": self.best_top1,
            "meter": self.meter.state_dict(),
            "config": dump_config(self.cfg),
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Raises UserError where the checkpoint is of another recipe or its epochs have another length.

        The number of epochs may change: a finished run can be given more of them.
        """
        given = yaml.safe_load(state["config"])
        with contextlib.suppress(ValidationError):  # keys that are newer than the checkpoint get their defaults
            given = Config.model_validate(given).model_dump(mode="json")
        differences = recipe_differences(given, self.cfg.model_dump(mode="json"))
        differences = [d for d in differences if not d.startswith("schedule.epochs ")]
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise UserError(
                f"{path} was trained with {', '.join(differences[:3])}{more}; resume with the same recipe, or choose "
                "another --output_dir and start from its weights with --finetune."
            )
        if state["steps_per_epoch"] != self.steps_per_epoch and state["step"]:
            raise UserError(
                f"{path} stopped inside an epoch of {state['steps_per_epoch']} steps and this run's have "
                f"{self.steps_per_epoch}; resume it with the same data set and global batch."
            )
        restore_model(self.model, state["model"], path)
        saved, groups = state["optimizer"], self.optimizer.param_groups
        if len(saved["param_groups"]) == len(groups):  # how it is computed is this device's and not the checkpoint's
            own = [{key: group[key] for key in ("fused", "foreach") if key in group} for group in groups]
            saved = {**saved, "param_groups": [{**g, **o} for g, o in zip(saved["param_groups"], own, strict=True)]}
        try:
            self.optimizer.load_state_dict(saved)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"The optimizer state in {path} does not fit --opt {self.cfg.optim.opt}: {error}."
            ) from None
        if self.ema is not None:
            restore_model(self.ema.module, state["ema"] or state["model"], path)
        self.stabilizer.load_state_dict(state["stabilizer"])
        self.probe.load_state_dict(state.get("probe", {}))
        self.epoch, self.step, self.best_top1 = state["epoch"], state["step"], state["best_top1"]
        self.meter.load_state_dict(state["meter"])
        # As DeiT: the rate of an epoch is the one its predecessor's end set, the first two share the start of warm-up.
        self.schedule.step(max(self.epoch - 1, 0))
        self.schedule.step_update(max(self.global_step - 1, 0))

    def upcoming_batches(self, epochs: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches from the present step to the end of this epoch and of those after it, on the device."""

        def micro_batches() -> Iterator[tuple[Tensor, Tensor]]:
            start = self.step * self.accumulation
            for epoch in range(self.epoch, self.epoch + epochs):
                yield from itertools.islice(
                    self.data.train_batches(epoch, start=start), self.steps_per_epoch * self.accumulation - start
                )
                start = 0

        return to_device(micro_batches(), self.device)

    def rehearse(self, steps: int, observe: Callable[[], None]) -> None:
        """Train for `steps` optimizer steps, call `observe` after each, and put everything back bit for bit.

        Iterators over the training data that were open before are not valid afterwards.
        """
        settle(self)
        modules = [self.model] + ([] if self.ema is None else [self.ema.module])
        kept = copy.deepcopy([m.state_dict() for m in modules]), copy.deepcopy(self.optimizer.state_dict())
        place = self.epoch, self.step, self.data.corrupt, self.figures, self.meter.state_dict()
        python, numpy = random.getstate(), np.random.get_state()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            batches = self.upcoming_batches(epochs=2 + steps // self.steps_per_epoch)
            for done in range(steps):
                try:
                    train_step(self, batches)
                except StopIteration:
                    raise TrainingError(
                        f"The training data ended after {done} of {steps} rehearsed steps in epoch {place[0]}."
                    ) from None
                observe()
            settle(self)
        for module, weights in zip(modules, kept[0], strict=True):
            module.load_state_dict(weights)
        self.optimizer.load_state_dict(kept[1])
        self.epoch, self.step, self.data.corrupt, self.figures, meter = place
        self.meter.load_state_dict(meter)
        random.setstate(python)
        np.random.set_state(numpy)

    def save(self, *names: str) -> None:
        """Write the state to the run's folder under each of `names`; on the first process alone.

        Raises TrainingError, on all processes and with the files as they were, where the last step broke a weight.
        """
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise TrainingError(
                    f"Step {self.global_step} of the run left the parameter {name} not finite; {self.last_good()}."
                )
        if self.log.enabled:
            state = self.state_dict()
            for name in names:
                save_checkpoint(self.log.output_dir / name, state)


def seed_step(run: Run, position: int) -> None:
    """Set all generators and the quantization noise for forward pass number `position` of the run on this rank."""
    words = np.random.SeedSequence([run.cfg.run.seed, run.rank, position]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
    seek_noise(run.model, position)


def seek_noise(model: nn.Module, position: int) -> None:
    noise = getattr(model, "noise", None)
    if isinstance(noise, NoiseClock):
        noise.seek(position)


def forward_backward(
    run: Run, model: nn.Module, images: Tensor, targets: Tensor, position: int, which: Pass | None = None
) -> Tensor:
    """One micro-batch: its gradients are added to those there are. Returns its loss (scalar, detached).

    which: its place in the step, by which `run.graphs` knows it; None computes it eagerly.
    """
    seed_step(run, position)
    if run.mixup is not None:
        images, targets = run.mixup(images.clone(), targets)  # in place, and a failed step is repeated

    def compute(images: Tensor, targets: Tensor) -> Tensor:
        with run.autocast():
            loss = run.loss(images, model(images), targets)
        (loss / run.accumulation).backward()
        return loss.detach() / run.accumulation

    if run.graphs is None or which is None:
        return compute(images, targets)
    return run.graphs.run(compute, images, targets, which)


def train_step(run: Run, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """One optimizer step. Returns loss (mean over the global batch), gradient norm and learning rate.

    Where the optimizer has a `found_inf`, with which it leaves the weights as they are, the host does not wait for the
    device: the figures are those of the step before, and `settle` waits for this one's.

    Raises TrainingError for a loss or gradient that is not finite, by which the optimizer has changed no weight.
    """
    loss = torch.zeros((), device=run.device)
    micro_batches = []
    for micro in range(run.accumulation):
        micro_batches.append(next(batches))
        position = run.global_step * run.accumulation + micro
        which = Pass(first=micro == 0, last=micro == run.accumulation - 1)
        with contextlib.nullcontext() if which.last or run.world_size == 1 else run.wrapped.no_sync():
            loss += forward_backward(run, run.wrapped, *micro_batches[-1], position, which)

    run.stabilizer.after_backward(run.global_step)
    parameters = [p for p in run.parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters])
    # Loss, norm and signals together, so that all processes decide alike.
    figures = torch.stack([loss, norm, torch.full_like(loss, float(run.stop.heard))])
    if run.world_size > 1:
        dist.all_reduce(figures)
    figures /= run.world_size
    failed = getattr(run.optimizer, "found_inf", None)
    if failed is not None:  # 1 from the first step on that fails; the run ends when the host knows
        failed.copy_(torch.maximum(failed, (~torch.isfinite(figures)).any()))
    ready = torch.cuda.Event() if run.device.type == "cuda" else None
    lr = run.optimizer.param_groups[0]["lr"]
    launched = Step(run.epoch, run.step, lr, figures.to("cpu", non_blocking=True), ready, micro_batches)
    if ready is not None:
        ready.record()
    if failed is None:
        run.in_flight = launched
        settle(run)

    if run.cfg.optim.clip_grad is not None:
        clip_grads_with_norm_(parameters, run.cfg.optim.clip_grad, norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.stabilizer.after_step(run.global_step)
    run.step += 1
    run.schedule.step_update(run.global_step - 1)  # as Swin: counted from 0; a schedule of epochs ignores it
    if run.ema is not None:
        run.ema.update(run.model, step=run.global_step)
    if failed is not None:
        settle(run)  # the step before
        run.in_flight = launched
        if not run.figures:
            settle(run)
    return run.figures


def settle(run: Run) -> dict[str, float]:
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
        first = first_non_finite(run, step.micro_batches, forward_backward)
        raise TrainingError(
            f"Step {step.step} of epoch {step.epoch}: the loss is {loss:g} and the gradient norm {grad_norm:g}; "
            f"the first that is not finite is {first}; {run.last_good()}."
        )
    run.meter.add("loss", loss, 1)
    run.figures = {"loss": loss, "grad_norm": grad_norm, "lr": step.lr}
    return run.figures


def train_one_epoch(run: Run, max_steps: int | None = None) -> None:
    """Train from `run.step` to the end of epoch `run.epoch`, or for `max_steps`, or until a signal has been heard.

    Logs every `run.log_every` steps and checkpoints every `run.save_every`; the epoch's figures are in `run.meter`.
    """
    run.wrapped.train()
    cfg, total = run.cfg, run.steps_per_epoch
    end = total if max_steps is None else min(total, run.step + max_steps)
    batches = run.upcoming_batches()
    epochs = cfg.schedule.epochs
    logged_at, logged_step = time.monotonic(), run.step
    bar = run.log.progress(
        f"epoch {run.epoch + 1}/{epochs}", epochs=epochs, epoch=run.epoch, step=run.step, total=total
    )
    with bar:
        while run.step < end and not run.stop.heard_anywhere:
            detected = run.stabilizer.before_step(run.global_step, run)
            if detected is not None:
                run.log.log((run.epoch, run.step), detected, tag="stabilizer", at=run.global_step)
                batches = run.upcoming_batches()  # the rehearsed steps have used them
            run.probe.before_step(run.global_step)
            try:
                figures = train_step(run, batches)
            except StopIteration:
                raise TrainingError(
                    f"The training data ended after {run.step} of the {total} steps of epoch {run.epoch}."
                ) from None
            if (recording := run.probe.after_step(run.global_step - 1)) is not None:
                settle(run)
                run.log.write_recording(recording, at=run.global_step)
            bar.update(cfg.optim.global_batch, loss=figures["loss"], lr=figures["lr"])
            if run.step % cfg.run.log_every == 0:
                figures = settle(run)
                now = time.monotonic()
                images = (run.step - logged_step) * cfg.optim.global_batch
                shown = {**figures, "images_per_s": images / (now - logged_at)}
                run.log.log((run.epoch, run.step), shown, tag="train", at=run.global_step)
                if stabilizer_figures := run.stabilizer.figures():
                    run.log.log((run.epoch, run.step), stabilizer_figures, tag="stabilizer", at=run.global_step)
                if cfg.quant.scheme == "mx" and cfg.quant.carrier == "fp8":
                    lost = {"blocks_below_window": blocks_below_window(run.model)}  # of this process so far
                    run.log.log((run.epoch, run.step), lost, tag="carrier", at=run.global_step)
                logged_at, logged_step = now, run.step
            if cfg.run.save_every is not None and run.global_step % cfg.run.save_every == 0:
                settle(run)
                run.save(LAST)
        settle(run)


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, max_batches: int | None = None) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy in % of `model` over the evaluation set, exact on any number of processes."""
    model.eval()
    seek_noise(model, EVALUATION_POSITION)
    totals = torch.zeros(4, dtype=torch.float64, device=run.device)
    batches = itertools.islice(to_device(run.data.eval_batches(), run.device), max_batches)
    for images, targets in batches:
        with run.autocast():
            logits = model(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets.unsqueeze(1)
        totals += torch.stack([loss, ranked[:, 0].sum(), ranked.sum(), torch.tensor(len(targets), device=run.device)])
    if run.world_size > 1:
        dist.all_reduce(totals)
    loss_sum, top1, top5, images_seen = totals.tolist()
    if not images_seen:
        raise TrainingError("The evaluation set has no image that can be read.")
    return {"loss": loss_sum / images_seen, "top1": 100 * top1 / images_seen, "top5": 100 * top5 / images_seen}
