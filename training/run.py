"""A run: what it trains with, and its state as a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import UserError, dump_config, recipe_differences
from config.fold import CONTINUABLE, read_stored
from images.classes import check_classes
from record.checkpoint import check_state, save_checkpoint
from record.restore import restore_optimizer, restore_probe, restore_state
from record.weights import first_not_finite, restore_model
from training.ends import TrainingError
from training.passes import position_of
from training.rehearsal import rehearse
from training.state import TrainingState


class Run(TrainingState):
    """Everything a run trains with, and how far it has come; made by `training.build.build_run`."""

    def rehearse(self, steps: int, observe: Callable[[], None]) -> None:
        """Train for `steps` optimizer steps, call `observe` after each, and put everything back bit for bit."""
        rehearse(self, steps, observe)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: schedule, data order and noise follow from the steps done."""
        blocks = self.blocks_below_window()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "stabilizer": self.stabilizer.state_dict(),
            "probe": self.probe.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "passes": position_of(self, 0),
            "best_top1": self.best_top1,
            "meter": self.meter.state_dict(),
            "classes": list(self.data.classes),
            "config": dump_config(self.cfg),
            **({} if blocks is None else {"blocks_below_window": int(blocks)}),
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Raises UserError where the checkpoint is of another recipe or other classes, or its epochs of another length.

        What config.fold.CONTINUABLE names may change, and is said: a finished run can be given more epochs.
        """
        check_state(state, path)
        given = read_stored(state["config"], f"The configuration in {path}")
        differences = recipe_differences(given, self.cfg.model_dump(mode="json"))
        allowed = [d for d in differences if d.split()[0] in CONTINUABLE]
        differences = [d for d in differences if d not in allowed]
        for said in (d for d in allowed if not d.startswith("schedule.epochs ") and self.rank == 0):
            print(f"note: {path} was trained with {said}.", file=sys.stderr)
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
        check_classes(path, state.get("classes", ()), self.data.classes)
        restore_model(self.model, state["model"], path)
        done = state["epoch"] * state["steps_per_epoch"] + state["step"]
        without = restore_optimizer(self.optimizer, state["optimizer"], path, opt=self.cfg.optim.opt, steps=done)
        if without and self.rank == 0:
            print(
                f"note: {path} has no optimizer state of {len(without)} of {len(self.parameters)} parameters (number "
                f"{without[0]} is the first), which have had no gradient so far, or begin anew.",
                file=sys.stderr,
            )
        if self.ema is not None:
            if state["ema"] is None:
                raise UserError(f"{path} holds no moving average of the weights, which its run keeps (--model-ema).")
            restore_model(self.ema.module, state["ema"], path)
        restore_state(self.stabilizer, state["stabilizer"], path, "stabilizer")
        restore_probe(self.probe, state.get("probe", {}), path)
        self.epoch, self.step, self.best_top1 = state["epoch"], state["step"], state["best_top1"]
        self.progress.origin = self.global_step, state.get("passes", self.global_step * self.accumulation)
        self.meter.load_state_dict(state["meter"])
        self.progress.blocks_undone = -state.get("blocks_below_window", 0)
        # As DeiT: the rate of an epoch is the one its predecessor's end set, the first two share the start of warm-up.
        self.schedule.step(max(self.epoch - 1, 0))
        self.schedule.step_update(max(self.global_step - 1, 0))

    def save(self, *names: str) -> None:
        """Write the state to the run's folder under each of `names`; on the first process alone.

        Raises TrainingError, on all processes and with the files as they were, where the last step broke a weight or
        the moving average of one.
        """
        averages = [] if self.ema is None else [("the moving average of the parameter", self.ema.module)]
        for what, model in [("the parameter", self.model), *averages]:
            if (name := first_not_finite(model)) is not None:
                raise TrainingError(
                    f"Step {self.global_step} of the run left {what} {name} not finite; {self.last_good()}."
                )
        if self.log.enabled:
            self.log.flush()
            state = self.state_dict()
            for name in names:
                save_checkpoint(self.log.output_dir / name, state)
