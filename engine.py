"""One epoch of training, one evaluation: the face of training/, which has the steps they are made of."""

from __future__ import annotations

import itertools
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError
from record.checkpoint import LAST
from training.ends import Lockstep, Stopped, StopSignal, TrainingError
from training.passes import EVALUATION_POSITION, PROBE_POSITION, forward_backward, seed_step, seek_noise
from training.run import Run
from training.state import EvaluationState
from training.step import settle, train_step

__all__ = [
    "EVALUATION_POSITION",
    "PROBE_POSITION",
    "Run",
    "StopSignal",
    "Stopped",
    "TrainingError",
    "evaluate",
    "forward_backward",
    "seed_step",
    "seek_noise",
    "settle",
    "train_one_epoch",
    "train_step",
]


def train_one_epoch(run: Run, max_steps: int | None = None) -> None:
    """Train from `run.step` to the end of epoch `run.epoch`, or for `max_steps`, or until a signal has been heard.

    Logs every `run.log_every` steps; checkpoints every `run.save_every` and at the end of the epoch, from where a
    resumed run goes on with its evaluation. The epoch's figures are in `run.meter`.
    Raises TrainingError.
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
                settle(run)
                now = time.monotonic()
                images = (run.step - logged_step) * cfg.optim.global_batch
                log_step(run, images_per_s=images / (now - logged_at))
                logged_at, logged_step = now, run.step
            save_due = cfg.run.save_every is not None and run.global_step % cfg.run.save_every == 0
            if save_due or run.step == total:  # what evaluation may lose is not the epoch
                settle(run)
                run.save(LAST)
        settle(run)


def log_step(run: Run, images_per_s: float) -> None:
    """The line of metrics of the last step, which has been settled."""

    def log(figures: dict, tag: str) -> None:
        run.log.log((run.epoch, run.step), figures, tag=tag, at=run.global_step)

    log({**run.figures, "images_per_s": images_per_s}, "train")
    if figures := run.stabilizer.figures():
        log(figures, "stabilizer")
    if (lost := run.blocks_below_window()) is not None:
        log({"blocks_below_window": lost}, "carrier")


@torch.no_grad()
def evaluate(
    run: EvaluationState, model: nn.Module, max_batches: int | None = None, stop: StopSignal | None = None
) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy in % of `model` over the evaluation set, exact on any number of processes.

    Raises UserError where there is no image, and Stopped within a batch of a signal that `stop` has heard.
    """
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=run.device)
    batches = itertools.islice(run.data.eval_batches(), max_batches)
    lockstep = Lockstep(stop or StopSignal(), run.world_size, run.device)
    for number in itertools.count():
        batch = next(batches, None)
        lockstep.tell(batch is not None)
        if batch is not None:
            seek_noise(model, EVALUATION_POSITION + number)
            totals += _scores(run, model, *batch)
        if not lockstep.go_on():
            break
    if run.world_size > 1:
        dist.all_reduce(totals)
    loss_sum, top1, top5, images_seen = totals.tolist()
    if not images_seen:
        raise UserError("The evaluation set has no image that can be read: check data.path.")
    return {"loss": loss_sum / images_seen, "top1": 100 * top1 / images_seen, "top5": 100 * top5 / images_seen}


def _scores(run: EvaluationState, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Sums over a batch, (4,) float64: loss, images right at first, images right among five, images."""
    with run.autocast():
        logits = model(images)
    logits = logits.float()
    loss = F.cross_entropy(logits, targets, reduction="sum")
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets.unsqueeze(1)
    return torch.stack([loss, ranked[:, 0].sum(), ranked.sum(), torch.full((), len(targets), device=run.device)])
