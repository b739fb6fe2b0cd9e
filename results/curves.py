"""Loss and accuracy over the epochs, as a table and a picture: `python report.py curves RUN ... --png FILE`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import UserError
from record.metrics import finished_epochs
from record.runlog import CONFIG
from results.style import DPI, check_run, labels, line_styles, method_name, picture, read_all, resolved

PARTS = ("train", "eval")  # of an epoch


@dataclass(frozen=True)
class RunFigures:
    """What one run directory says, epoch by epoch (from 1): losses, top-1 in %, and all seconds spent."""

    directory: Path
    method: str
    epochs: list[int]
    train_loss: list[float]
    eval_loss: list[float]
    top1: list[float]
    seconds: float


def figure_of(data: dict[str, Any], name: str) -> float:
    """A figure of an epoch; NaN where it is missing or no number."""
    value = data.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def read_run(directory: Path) -> RunFigures:
    """Raises UserError for a folder that is not a run or has no epoch yet."""
    check_run(directory)
    finished = finished_epochs(directory)
    if not finished:
        raise UserError(f"The run in {directory} has not finished an epoch yet.")
    epochs = finished.values()
    return RunFigures(
        directory=directory,
        method=method_name(resolved(directory / CONFIG)),
        epochs=list(finished),
        train_loss=[figure_of(data, "train.loss") for data in epochs],
        eval_loss=[figure_of(data, "eval.loss") for data in epochs],
        top1=[figure_of(data, "eval.top1") for data in epochs],
        seconds=sum(filter(math.isfinite, (figure_of(data, f"{part}.seconds") for data in epochs for part in PARTS))),
    )


def curves_table(runs: Sequence[RunFigures]) -> str:
    """The last epoch of each run: method, epochs, top-1, losses and time."""
    names = labels(runs, str)
    width = max(24, *(len(label) + 2 for label in names))
    lines = [f"{'method':<{width}}{'epochs':>8}{'top-1':>10}{'eval loss':>11}{'train loss':>12}{'time':>13}"]
    for run, label in zip(runs, names, strict=True):
        minutes, seconds = divmod(round(run.seconds), 60)
        lines.append(
            f"{label:<{width}}{run.epochs[-1]:>8}{run.top1[-1]:>8.2f} %{run.eval_loss[-1]:>11.4f}"
            f"{run.train_loss[-1]:>12.4f}{minutes:>6}:{seconds:02d} min"
        )
    return "\n".join(lines)


def draw_curves(runs: Sequence[RunFigures], path: Path) -> None:
    """Loss (evaluation; training thin) and top-1 over the epochs, one colour and line style a run.

    Raises UserError where the picture cannot be written.
    """
    with picture({}) as figure:
        figure.set_size_inches(10, 4)
        loss_axes, accuracy_axes = figure.subplots(1, 2)
        styles = line_styles([len(run.epochs) for run in runs])
        for run, label, style in zip(runs, labels(runs, str), styles, strict=True):
            loss_axes.plot(run.epochs, run.eval_loss, label=label, linewidth=2, **style)
            loss_axes.plot(run.epochs, run.train_loss, linewidth=0.8, alpha=0.6, **style)
            accuracy_axes.plot(run.epochs, run.top1, label=f"{label}: {run.top1[-1]:.2f} %", linewidth=2, **style)
        loss_axes.set(title="loss on the evaluation set (thin: in training)", xlabel="epoch", ylabel="loss")
        accuracy_axes.set(title="accuracy on the evaluation set", xlabel="epoch", ylabel="top-1 accuracy (%)")
        for axes in (loss_axes, accuracy_axes):
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
            axes.xaxis.get_major_locator().set_params(integer=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=DPI, format=path.suffix[1:] or "png")
        except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not write
            raise UserError(f"The picture {path} cannot be written ({error}); choose another --png.") from None


def write_curves(directories: Sequence[Path], png: Path) -> None:
    """`report.py curves`: the picture into `png`; prints the table. Raises UserError as `read_all`, `draw_curves`."""
    runs = read_all(directories, read_run)
    draw_curves(runs, png)
    print(curves_table(runs))
    print(f"\ncurves: {png}")
