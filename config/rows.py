"""The tables of the paper as runs: configs/ablations/table<N>.yaml, read, addressed and listed.

    load_config("configs/ablations/table1.yaml#q1/deit_tiny")     # FILE#ROW/COLUMN is a configuration like any other
    all_cells()[0].published                                      # {"top1": 63.73}

A cell is one row of a table for one model. It has a run of its own, or is the same run as a configuration in configs/
or another cell. table1.yaml says how the files are written. As a program, this is what the scripts ask:

    python study.py list TABLE                            # rows, published figures, commands
    python study.py plan TABLE ROW|all [MODEL] -- FLAGS   # the configurations to run, one a line
    python study.py name REFERENCE                        # the name of a configuration's run
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from config import UserError, load_config, read_yaml, recipe_differences
from config.flags import parse_flags
from config.schema import PaperConfig

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "configs/ablations"
FIGURES = ("top1", "top5", "r_WQ", "r_Y")  # what the paper publishes: accuracies in %, rates of change (Appendix A.3)


class _Row(BaseModel):
    """A row as its file has it; see configs/ablations/table1.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str | None = None
    set: dict[str, Any] = {}
    same_as: str | dict[str, str] | None = None
    top1: float | list[float] | None = None
    top5: float | list[float] | None = None
    r_WQ: float | list[float] | None = None  # noqa: N815
    r_Y: float | list[float] | None = None  # noqa: N815


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    table: int
    title: str
    columns: list[str]
    base: str | None = None
    rows: dict[str, _Row]


@dataclass(frozen=True)
class Cell:
    """One row of a table for one model."""

    file: Path
    table: int
    title: str
    row: str
    column: str
    published: dict[str, float]  # by names in FIGURES
    changes: dict[str, Any]  # what it sets in `base`; empty where it is the same run
    base: str  # the configuration it changes, or is
    same: bool

    @property
    def reference(self) -> str:
        """What load_config takes for this cell."""
        return f"{self.file}#{self.row}/{self.column}"

    @property
    def run_reference(self) -> str:
        """What load_config takes for the run that this cell is."""
        if not self.same:
            return self.reference
        return find_cell(self.base).run_reference if is_row(self.base) else self.base

    @property
    def run(self) -> str:
        """The name of its run, which is that of the run's folder below runs/."""
        return run_name(self.base) if self.same else f"{self.file.stem}_{self.row}_{self.column}".replace("/", "_")


def is_row(reference: str | Path) -> bool:
    """Whether a reference is FILE#ROW or FILE#ROW/COLUMN."""
    return re.search(r"\.ya?ml#", str(reference)) is not None


def _split(reference: str) -> tuple[Path, str]:
    file, suffix, row = re.split(r"(\.ya?ml)#", str(reference), maxsplit=1)
    return Path(file + suffix), row


def _did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The nearest valid name, or all of them."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."


def _read_table(file: Path) -> _Table:
    data = read_yaml(file)
    if "rows" not in data:
        raise UserError(f"{file} has no rows; name the file alone to load it.")
    try:
        table = _Table.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
    for name, row in table.rows.items():
        for figure in FIGURES:
            values = getattr(row, figure)
            if values is not None and len(_as_list(values)) != len(table.columns):
                raise UserError(
                    f"{file}: rows.{name}.{figure} needs one figure for each of {len(table.columns)} columns."
                )
    return table


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _cell(file: Path, table: _Table, name: str, column: str) -> Cell:
    row = table.rows[name]
    same_as = row.same_as.get(column) if isinstance(row.same_as, dict) else row.same_as
    base = same_as or row.base or table.base
    if base is None:
        raise UserError(f"{file}: rows.{name} needs base or same_as.")
    index = table.columns.index(column)
    figures = {figure: getattr(row, figure) for figure in FIGURES}
    return Cell(
        file=file,
        table=table.table,
        title=table.title,
        row=name,
        column=column,
        published={figure: _as_list(values)[index] for figure, values in figures.items() if values is not None},
        changes={} if same_as else row.set,
        base=os.path.normpath(file.absolute().parent / base.replace("<column>", column)),
        same=same_as is not None,
    )


def find_cell(reference: str) -> Cell:
    """The cell FILE#ROW/COLUMN; the column may be left out where there is only one. Raises UserError."""
    file, wanted = _split(reference)
    table = _read_table(file)
    name, slash, column = wanted, "", ""
    if wanted not in table.rows:  # a row may have slashes in its name
        name, slash, column = wanted.rpartition("/")
        if name not in table.rows:
            raise UserError(f"{file}: there is no row {wanted}; {_did_you_mean(name or wanted, table.rows)}")
    if not slash and len(table.columns) > 1:
        choices = ", ".join(f"{name}/{column}" for column in table.columns)
        raise UserError(f"{file}: {name} has several columns; choose one of {choices}.")
    if slash and column not in table.columns:
        raise UserError(f"{file}: there is no column {column}; {_did_you_mean(column, table.columns)}")
    return _cell(file, table, name, column or table.columns[0])


def row_config(reference: str) -> dict[str, Any]:
    """A row as a configuration file would have it: extends, the changed keys and its own `paper` entry."""
    if not is_row(reference):
        names = ", ".join(_read_table(Path(reference)).rows)
        raise UserError(f"{reference} is a table of runs; name one as {reference}#ROW or #ROW/COLUMN; rows: {names}.")
    cell = find_cell(reference)
    figures = {name: value for name, value in cell.published.items() if name in PaperConfig.model_fields}
    paper = {"table": cell.table, "row": cell.row, "column": cell.column, **figures}
    return {"extends": cell.base, **cell.changes, "paper": paper}


def table_cells(number: int, folder: Path = TABLES) -> list[Cell]:
    """The cells of one table, row by row."""
    file = folder / f"table{number}.yaml"
    table = _read_table(file)
    return [_cell(file, table, name, column) for name in table.rows for column in table.columns]


def all_cells(folder: Path = TABLES) -> list[Cell]:
    """The cells of all tables, table by table and row by row."""
    numbers = sorted(int(path.stem.removeprefix("table")) for path in folder.glob("table*.yaml"))
    return [cell for number in numbers for cell in table_cells(number, folder)]


def run_name(reference: str | Path) -> str:
    """The name of a configuration's run: the file's, or for a row table1_q1_deit_tiny; that of the run it is."""
    return find_cell(str(reference)).run if is_row(reference) else Path(reference).stem


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts ask
# ---------------------------------------------------------------------------------------------------------------------


def shown(figure: str, value: float) -> str:
    """A figure as the paper prints it: accuracies in % with two digits, rates of change with four."""
    return f"{value:.2f}" if figure.startswith("top") else f"{value:.4f}"


def listing(number: int) -> str:
    """The cells of a table with published figures, command and, where it is another's run, which."""
    cells = table_cells(number)
    figures = [name for name in FIGURES if name in cells[0].published]
    lines = [["row", "model", *figures, "command"]]
    for cell in cells:
        command = f"bash scripts/table{number}.sh {cell.row} {cell.column}"
        same = f"   # the same run as {cell.run}" if cell.same else ""
        lines.append([cell.row, cell.column, *(shown(f, cell.published[f]) for f in figures), command + same])
    widths = [max(map(len, words)) for words in zip(*lines, strict=True)]
    text = [f"Table {number}: {cells[0].title}, as published.", ""]
    text += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    text += ["", "DATA_PATH=/path/to/imagenet goes before a command; flags of main.py, such as --smoke, go after it."]
    if len({cell.column for cell in cells}) > 1:
        text += [f"All models of a row: bash scripts/table{number}.sh ROW"]
    return "\n".join([*text, f"Every run that is not complete yet: bash scripts/table{number}.sh all"])


def epochs_done(directory: Path) -> int:
    """Epochs whose evaluation is in the metrics of a run; 0 where there is no run."""
    from record.metrics import METRICS, read_metrics  # here, because it takes seconds to import

    if not (directory / METRICS).is_file():
        return 0
    summaries = [line for line in read_metrics(directory) if len(line["step"]) == 1 and "eval.top1" in line["data"]]
    return max((line["step"][0] + 1 for line in summaries), default=0)


def _complete(directory: Path, reference: str, overrides: Sequence[str]) -> bool:
    """Whether a folder holds the finished run of a configuration, and not of another recipe."""
    done = epochs_done(directory)
    if not done:
        return False
    cfg = load_config(reference, overrides, source="the command line")
    if done < cfg.schedule.epochs:
        return False
    try:
        given = load_config(directory / "resolved.yaml")
    except UserError:
        return False
    differences = recipe_differences(given.model_dump(mode="json"), cfg.model_dump(mode="json"))
    return all(d.startswith("schedule.epochs ") for d in differences)


def plan(number: int, words: Sequence[str], flags: Sequence[str], runs: Path) -> list[str]:
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
        raise UserError(f"Table {number} has no row {row}; {_did_you_mean(row, names)}")
    for model in models:
        if model not in columns:
            raise UserError(f"Table {number} has no model {model}; {_did_you_mean(model, columns)}")
    cells = [cell for cell in cells if row in ("all", cell.row) and cell.column in (models or columns)]
    wanted = {cell.run: cell.run_reference for cell in cells}
    if {"-h", "--help"} & {*flags}:
        return list(wanted.values())[:1]
    options, overrides = parse_flags(flags)
    one_folder = os.environ.get("OUTPUT_DIR") or any(o.startswith("run.output_dir=") for o in overrides)
    if one_folder and (row == "all" or len(wanted) > 1):
        raise UserError("OUTPUT_DIR and --output_dir are the folder of one run; RUNS_DIR is that of several.")
    writes_nothing = options.smoke or options.print_config or "run.eval=true" in overrides
    if row == "all" and not writes_nothing:
        complete = [name for name, reference in wanted.items() if _complete(runs / name, reference, overrides)]
        for name in complete:
            print(f"{runs / name} is complete.", file=sys.stderr)
        wanted = {name: reference for name, reference in wanted.items() if name not in complete}
    return list(wanted.values())


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        prog="study.py", description="The tables of the paper as runs; see scripts/table.sh."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listed = commands.add_parser("list", help="rows of a table, published figures, commands")
    listed.add_argument("table", type=int)
    planned = commands.add_parser("plan", help="configurations to run, one a line; flags of main.py after --")
    planned.add_argument("table", type=int)
    planned.add_argument("words", nargs="*", metavar="ROW|all [MODEL]")
    planned.add_argument("--runs-dir", type=Path, default=Path("runs"))
    named = commands.add_parser("name", help="name of a configuration's run")
    named.add_argument("reference")
    options = parser.parse_args(argv)
    try:
        if options.command == "list":
            print(listing(options.table))
        elif options.command == "plan":
            for reference in plan(options.table, options.words, flags, options.runs_dir):
                print(reference)
        else:
            print(run_name(options.reference))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
