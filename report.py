"""Runs in, pictures and tables out: `python report.py curves RUN [RUN ...] --png FILE`, `figures`, `tables`.

curves   a table (method, top-1, loss, time) and one picture of loss and accuracy over the epochs
figures  Figures 2 to 6 and Table 3 of the paper, from runs with a probe (results/figures.py)
tables   the paper's tables, published figures beside ours (results/tables.py)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config import UserError, load_config
from record.metrics import read_metrics
from results.figures import COLOURS, STYLES, method_name, write_figures
from results.tables import write_tables


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


def read_run(directory: Path) -> RunFigures:
    """Raises UserError for a folder that is not a run or has no epoch yet."""
    if not (directory / "resolved.yaml").is_file():
        raise UserError(f"{directory} is not a run: it holds no resolved.yaml; give the --output_dir of a run.")
    summaries = {line["step"][0] + 1: line["data"] for line in read_metrics(directory) if len(line["step"]) == 1}
    finished = {n: data for n, data in summaries.items() if "train.loss" in data and "eval.top1" in data}
    if not finished:
        raise UserError(f"The run in {directory} has not finished an epoch yet.")
    epochs = finished.values()
    return RunFigures(
        directory=directory,
        method=method_name(load_config(directory / "resolved.yaml")),
        epochs=list(finished),
        train_loss=[data["train.loss"] for data in epochs],
        eval_loss=[data["eval.loss"] for data in epochs],
        top1=[data["eval.top1"] for data in epochs],
        seconds=sum(data["train.seconds"] + data["eval.seconds"] for data in epochs),
    )


def labels(runs: Sequence[RunFigures]) -> list[str]:
    """The methods, with the directory where two runs have the same."""
    methods = [run.method for run in runs]
    return [f"{run.method} ({run.directory.name})" if methods.count(run.method) > 1 else run.method for run in runs]


def curves_table(runs: Sequence[RunFigures]) -> str:
    """The last epoch of each run: method, epochs, top-1, losses and time."""
    width = max(24, *(len(label) + 2 for label in labels(runs)))
    lines = [f"{'method':<{width}}{'epochs':>8}{'top-1':>10}{'eval loss':>11}{'train loss':>12}{'time':>13}"]
    for run, label in zip(runs, labels(runs), strict=True):
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss_axes, accuracy_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}
        # A dot for a run of one epoch, which has no line.
        style["marker"] = "o" if len(run.epochs) == 1 else None
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
        figure.savefig(path, dpi=150, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not write
        raise UserError(f"The picture {path} cannot be written ({error}); choose another --png.") from None
    finally:
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    curves = commands.add_parser("curves", help="table and picture of loss and accuracy over the epochs")
    curves.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    curves.add_argument("--png", type=Path, default=Path("curves.png"), help="the picture (default: curves.png)")
    figures = commands.add_parser("figures", help="Figures 2 to 6 and Table 3 of the paper, from runs with a probe")
    figures.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="run directories")
    figures.add_argument("--out", type=Path, default=Path("figures"), metavar="FOLDER", help="(default: figures)")
    tables = commands.add_parser("tables", help="the paper's tables, published figures beside those of runs")
    tables.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN_DIR", help="runs or folders of them (default: runs/)"
    )
    tables.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here instead of printing them")
    tables.add_argument("--csv", type=Path, metavar="FILE", help="write them here as CSV too")
    options = parser.parse_args(argv)
    try:
        if options.command == "tables":
            write_tables(options.runs, options.markdown, options.csv)
            return
        if options.command == "figures":
            write_figures(options.runs, options.out)
            return
        runs = [read_run(directory) for directory in options.runs]
        draw_curves(runs, options.png)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(curves_table(runs))
    print(f"\ncurves: {options.png}")


if __name__ == "__main__":
    main()
