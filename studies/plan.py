"""What runs there are: those of the paper's tables, with their published figures and which are still to be run, and
those of a study."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from config import UserError, load_config, recipe_differences
from config.batches import plan_batches
from config.explain import did_you_mean
from config.flags import parse_flags
from config.rows import QUANTITIES, shown, table_cells
from studies.grid import Study, StudyRun


def listing(number: int) -> str:
    """The cells of a table with published figures, command and, where it is another's run, which."""
    cells = table_cells(number)
    figures = [name for name in QUANTITIES if name in cells[0].published]
    lines = [["row", "model", *figures, "command"]]
    for cell in cells:
        command = f"bash scripts/table{number}.sh {cell.row} {cell.column}"
        same = f"   # the same run as {cell.run}" if cell.same else ""
        lines.append([cell.row, cell.column, *(shown(f, cell.published[f]) for f in figures), command + same])
    text = [f"Table {number}: {cells[0].title}, as published.", "", *_columns(lines)]
    text += ["", "DATA_PATH=/path/to/imagenet goes before a command; flags of main.py, such as --smoke, go after it."]
    if len({cell.column for cell in cells}) > 1:
        text += [f"All models of a row: bash scripts/table{number}.sh ROW"]
    return "\n".join([*text, f"Every run that is not complete yet: bash scripts/table{number}.sh all"])


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, words)) for words in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def study_listing(study: Study, runs: Sequence[StudyRun]) -> str:
    """The cells of a study with their seeds, recipes and the command of the first seed."""
    seeds: dict[str, list[str]] = {}
    first: dict[str, StudyRun] = {}
    for run in runs:
        seeds.setdefault(run.cell.name, []).append(str(run.seed))
        first.setdefault(run.cell.name, run)
    lines = [["row", "value", "seeds", "recipe", "command"]]
    for name, run in first.items():
        lines.append([run.cell.row, run.cell.value or "-", " ".join(seeds[name]), run.cell.recipe, run.command])
    return "\n".join([f"{study.name}: {study.title}; {len(runs)} runs.", "", *_columns(lines)])


def _complete(directory: Path, reference: str, overrides: Sequence[str]) -> bool:
    """Whether a folder holds the finished run of a configuration, and not of another recipe."""
    if not directory.is_dir():
        return False
    from record.metrics import finished_epochs  # here, because it imports torch, which takes seconds

    try:
        epochs = finished_epochs(directory, required=False)
    except UserError:  # main.py's to say, when it is asked to go on with such a run
        return False
    if not epochs:
        return False
    cfg = load_config(reference, overrides, source="the command line")
    if max(epochs) < cfg.schedule.epochs:
        return False
    try:
        given = load_config(directory / "resolved.yaml")
    except UserError:
        return False
    differences = recipe_differences(given.model_dump(mode="json"), cfg.model_dump(mode="json"))
    return given.run.finetune == cfg.run.finetune and all(d.startswith("schedule.epochs ") for d in differences)


def runs_to_start(number: int, words: Sequence[str], flags: Sequence[str], runs: Path) -> list[str]:
    """The configurations to run for `ROW [MODEL]` or `all [MODEL]`, each once; of `all`, complete ones are left out.

    Raises UserError for unknown names, bad flags, and one output folder for several runs.
    """
    if not 1 <= len(words) <= 2:
        given = f"; got {' '.join(words)}" if words else " before the flags"
        raise UserError(f"table{number}.sh takes ROW [MODEL], or all [MODEL]{given}.")
    row, *models = words
    cells = table_cells(number)
    names, columns = ({cell.row: None for cell in cells}, {cell.column: None for cell in cells})
    if row != "all" and row not in names:
        raise UserError(f"Table {number} has no row {row}; {did_you_mean(row, names)}")
    for model in models:
        if model not in columns:
            raise UserError(f"Table {number} has no model {model}; {did_you_mean(model, columns)}")
    cells = [cell for cell in cells if row in ("all", cell.row) and cell.column in (models or columns)]
    wanted = {cell.run: cell.run_reference for cell in cells}
    if {"-h", "--help"} & {*flags}:
        return list(wanted.values())[:1]
    options, overrides = parse_flags(flags, notes=False)
    for reference in list(wanted.values())[:1]:
        load_config(reference, overrides, source="the command line")  # a mistake is the same for every run
    one_folder = os.environ.get("OUTPUT_DIR") or any(o.startswith("run.output_dir=") for o in overrides)
    if one_folder and (row == "all" or len(wanted) > 1):
        raise UserError("OUTPUT_DIR and --output_dir are the folder of one run; RUNS_DIR is that of several.")
    if len(wanted) > 1 and (options.export is not None or options.predict is not None):
        raise UserError("--export and --predict are of one checkpoint; give the row and the model of its run.")
    writes_nothing = options.smoke or options.print_config or "run.eval=true" in overrides
    if row == "all" and not writes_nothing:
        complete = [name for name, reference in wanted.items() if _complete(runs / name, reference, overrides)]
        for name in complete:
            print(f"{runs / name} is complete.", file=sys.stderr)
        wanted = {name: reference for name, reference in wanted.items() if name not in complete}
    return list(wanted.values())


def check(reference: str, processes: int, flags: Sequence[str]) -> None:
    """Raises UserError where a run has a mistake that can be seen before torch and `processes` are started."""
    options, overrides = parse_flags(flags, notes=False)
    cfg = load_config(reference, overrides, source="the command line")
    if not options.smoke and not cfg.run.eval:
        plan_batches(cfg, processes)
