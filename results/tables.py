"""The paper's tables, published figures beside ours: `python report.py tables [RUN_DIR ...]`.

A run counts for every cell whose configuration it has: all its resolved*.yaml equal the row's but for the seed, and its
manifest is of ImageNet-1K. Ours is the last epoch's figure, averaged over finished runs of different seeds. What does
not count is listed with the reason: another recipe, an unfinished run, a second run of a seed.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import UserError, load_config, recipe_differences
from config.fold import mixes, precision
from config.rows import QUANTITIES, ROOT, Cell, all_cells, shown
from record.manifest import read_manifest
from record.metrics import finished_epochs
from record.runlog import CONFIG
from results.curves import figure_of
from results.style import resolved

RUNS = ROOT / "runs"
METRICS = {name: f"eval.{name}" for name in QUANTITIES}  # what runs call the paper's figures
IMAGENET = {"classes": 1000, "images": 1_281_167}
GAP = "-"
HEADER = ["table", "row", "model", "figure", "published", "ours", "spread", "seeds", "difference", "epochs"]
# Table 2 measures how much of Microscaling's loss against full precision a method wins back.
RECOVERING = ("tetrajet", "tetrajet_qema", "tetrajet_qramping")


@dataclass(frozen=True)
class TableRun:
    """One run directory: every configuration it was trained with, epochs evaluated, figures of the last one."""

    directory: Path
    configs: list[dict[str, Any]]
    epochs: int
    figures: dict[str, float]
    manifest: dict[str, Any]

    def recorded(self, kind: type, *path: str) -> list[Any]:
        """What the manifest says of an entry that is of this kind: the values of all starts of the run."""
        found: dict[Any, None] = {}
        for entries in (*self.manifest.get("sessions", []), self.manifest):
            value: Any = entries
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if isinstance(value, kind):
                found[value] = None
        return list(found)

    @property
    def drawn_over(self) -> list[int]:
        """The images that mixup draws over, those of one process at a time; empty where it is off or not recorded."""
        if not mixes(self.configs[-1]):
            return []
        given = (cfg["data"]["batch_size"] for cfg in self.configs)
        return sorted({*self.recorded(int, "batch", "process"), *(size for size in given if size is not None)})

    def comparable(self, other: TableRun) -> bool:
        """Whether two runs of one row may be averaged as its seeds."""
        return not self.drawn_over or not other.drawn_over or self.drawn_over == other.drawn_over

    @property
    def seed(self) -> int:
        return self.configs[0]["run"]["seed"]

    def differences(self, cell_config: dict[str, Any]) -> list[str]:
        """How the run differs from a row of the paper, in words; empty if it is one."""
        found: dict[str, None] = {}
        for cfg in self.configs:
            for difference in recipe_differences(cfg, cell_config):
                if not difference.startswith("run.seed "):
                    found[difference.replace(" (here ", " (the row has ")] = None
            if cfg["run"]["finetune"] is not None:
                found[f"run.finetune {cfg['run']['finetune']}"] = None
        steps = IMAGENET["images"] // cell_config["optim"]["global_batch"]
        for classes in self.recorded(int, "classes"):
            if classes != IMAGENET["classes"]:
                found[f"{classes} classes"] = None
        for given in self.recorded(int, "steps_per_epoch"):
            if abs(given - steps) > 1:
                found[f"{given} steps an epoch (ImageNet-1K has {steps})"] = None
        for autocast in self.recorded(str, "autocast"):  # what run.amp, if it is auto, came to
            if autocast.lower() != precision(cell_config) and not any(d.startswith("run.amp ") for d in found):
                found.setdefault(f"autocast {autocast} (the row has {precision(cell_config)})")
        return list(found)


def read_table_run(directory: Path) -> TableRun:
    """Raises UserError where a file of the run cannot be read."""
    epochs = finished_epochs(directory, required=False)
    last = max(epochs, default=0)
    data = epochs.get(last, {})
    try:
        manifest = read_manifest(directory)
    except OSError as error:
        raise UserError(f"The manifest in {directory} cannot be read ({error.strerror or error}).") from None
    return TableRun(
        directory=directory,
        configs=[resolved(path).model_dump(mode="json") for path in sorted(directory.glob("resolved*.yaml"))],
        epochs=last,
        figures={name: value for name, key in METRICS.items() if math.isfinite(value := figure_of(data, key))},
        manifest=manifest,
    )


@dataclass
class Ours:
    """Our runs of one configuration of the paper."""

    total: int  # epochs of a finished run
    finished: list[TableRun] = field(default_factory=list)
    unfinished: list[TableRun] = field(default_factory=list)

    def values(self, figure: str) -> list[float]:
        return [run.figures[figure] for run in self.finished if figure in run.figures]

    @property
    def epochs(self) -> str:
        done = [f"{run.epochs}/{self.total}" for run in (*self.finished, *self.unfinished)]
        counts = {text: done.count(text) for text in done}
        return ", ".join(f"{text} x{n}" if n > 1 else text for text, n in counts.items()) or GAP


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The run directories at and below `places`. Raises UserError for a place without any."""
    found: dict[Path, None] = {}
    for place in places:
        below = sorted(path.parent for path in place.rglob(CONFIG))
        if not below:
            raise UserError(f"There is no run at or below {place}; give the --output_dir of runs or a folder of them.")
        found |= dict.fromkeys(below)
    return list(found)


@functools.cache
def paper_configs() -> dict[str, dict[str, Any]]:
    """The configuration of every run of the paper by its name."""
    references = {cell.run: cell.run_reference for cell in all_cells()}
    return {name: load_config(reference).model_dump(mode="json") for name, reference in references.items()}


def assign(directories: Iterable[Path], cells: Sequence[Cell]) -> tuple[dict[str, Ours], list[str]]:
    """(our runs by the name of the paper's run, a line for each run that does not count)."""
    configs = paper_configs()
    run_of = {(cell.table, cell.row, cell.column): cell.run for cell in cells}
    ours = {name: Ours(config["schedule"]["epochs"]) for name, config in configs.items()}
    notes: list[str] = []
    for directory in directories:
        try:
            run = read_table_run(directory)
        except UserError as error:
            notes.append(f"{directory}: cannot be read: {error}")
            continue
        name = next((name for name, config in configs.items() if not run.differences(config)), None)
        if name is not None:
            twin = next((other for other in ours[name].finished if other.seed == run.seed), None)
            if run.epochs < ours[name].total:
                ours[name].unfinished.append(run)
                notes.append(f"{directory}: {name}, unfinished: {run.epochs} of {ours[name].total} epochs")
            elif twin is not None:
                notes.append(f"{directory}: {name}, seed {run.seed} again, as {twin.directory}")
            elif (other := next((o for o in ours[name].finished if not o.comparable(run)), None)) is not None:
                drawn = [" and ".join(map(str, r.drawn_over)) for r in (run, other)]
                notes.append(
                    f"{directory}: {name}, mixup draws over {drawn[0]} images at a time and over {drawn[1]} in "
                    f"{other.directory}, so it is not averaged with it"
                )
            else:
                ours[name].finished.append(run)
            continue
        paper = run.configs[0]["paper"] or {}
        named = tuple(paper.get(key) for key in ("table", "row", "column"))
        if named not in run_of:
            notes.append(f"{directory}: no row of the paper")
        else:
            differences = ", ".join(run.differences(configs[run_of[named]]))
            notes.append(f"{directory}: Table {named[0]} {named[1]} {named[2]}, differs: {differences}")
    return ours, notes


def table_lines(cells: Sequence[Cell], ours: dict[str, Ours]) -> list[list[str]]:
    """One line for each published figure, as HEADER has it."""
    lines = []
    for cell in cells:
        for figure, published in cell.published.items():
            values = ours[cell.run].values(figure)
            mean = statistics.fmean(values) if values else None
            lines.append(
                [
                    str(cell.table),
                    cell.row,
                    cell.column,
                    figure,
                    shown(figure, published),
                    GAP if mean is None else shown(figure, mean),
                    shown(figure, statistics.stdev(values)) if len(values) > 1 else GAP,
                    str(len(values)),
                    GAP if mean is None else signed(shown(figure, mean - published)),
                    ours[cell.run].epochs,
                ]
            )
    return lines


def signed(number: str) -> str:
    """With its sign; a difference that rounds to nothing has none."""
    return number.replace("-", "") if not float(number) else number if number[0] == "-" else f"+{number}"


def recovered(cells: Sequence[Cell], ours: dict[str, Ours]) -> tuple[list[str], list[list[str]]]:
    """(header, lines): the share of Microscaling's degradation that a method wins back in Table 2."""
    table2 = {(cell.row, cell.column): cell for cell in cells if cell.table == 2}
    columns = list(dict.fromkeys(column for _, column in table2))

    def share(method: str, column: str, *, published: bool) -> str:
        three = [table2[row, column] for row in (method, "microscaling", "full_precision")]
        values = [[cell.published["top1"]] if published else ours[cell.run].values("top1") for cell in three]
        if not all(values):
            return GAP
        top1, floor, full = map(statistics.fmean, values)
        return GAP if full <= floor else f"{100 * (top1 - floor) / (full - floor):.0f}"

    lines = [
        [method, whose, *(share(method, column, published=whose == "published") for column in columns)]
        for method in RECOVERING
        for whose in ("published", "ours")
    ]
    return ["method", "", *columns], lines


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def as_markdown(cells: Sequence[Cell], ours: dict[str, Ours], notes: Sequence[str]) -> str:
    """All tables, the degradation recovered, and the runs that do not count."""
    lines = table_lines(cells, ours)
    parts = [
        "# The paper's tables, published and ours",
        "Published: arXiv 2502.20853. Ours: the last epoch of finished runs, mean over their seeds; spread: sample "
        f"standard deviation. {GAP} is a gap.",
    ]
    for number, title in dict.fromkeys((cell.table, cell.title) for cell in cells):
        parts.append(f"## Table {number}: {title}")
        parts.append(markdown_table(HEADER[1:], [line[1:] for line in lines if line[0] == str(number)]))
    parts.append("## Degradation recovered")
    parts.append(
        "(method - microscaling) / (full precision - microscaling) in %, from the top-1 accuracies of Table 2."
    )
    parts.append(markdown_table(*recovered(cells, ours)))
    if notes:
        parts += ["## Runs that do not count", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def as_csv(cells: Sequence[Cell], ours: dict[str, Ours]) -> str:
    """The lines of all tables, gaps empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows([["" if word == GAP else word for word in line] for line in table_lines(cells, ours)])
    return text.getvalue()


def write_tables(places: Sequence[Path], markdown: Path | None, csv_path: Path | None) -> None:
    """`report.py tables`. Raises UserError for a place without runs and a file that cannot be written."""
    cells = all_cells()
    directories = find_runs(places) if places else [path.parent for path in sorted(RUNS.rglob(CONFIG))]
    ours, notes = assign(directories, cells)
    for path, text in ((markdown, as_markdown(cells, ours, notes)), (csv_path, as_csv(cells, ours))):
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                print(f"written: {path}")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror or error}).") from None
    if markdown is None:
        print(as_markdown(cells, ours, notes), end="")
