"""The tables of the paper as runs: configs/ablations/table<N>.yaml, read and addressed.

    load_config("configs/ablations/table1.yaml#q1/deit_tiny")     # FILE#ROW/COLUMN is a configuration like any other
    all_cells()[0].published                                      # {"top1": 63.73}

A cell is one row of a table for one model. It has a run of its own, or is the same run as a configuration in configs/
or another cell. table1.yaml says how the files are written.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from config.explain import UserError, did_you_mean
from config.files import read_yaml
from config.schema import PaperConfig

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "configs/ablations"
QUANTITIES = (
    "top1",
    "top5",
    "r_WQ",
    "r_Y",
)  # published: accuracies in %, rates of change (Appendix A.3)


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
    published: dict[str, float]  # by names in QUANTITIES
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
        return self._run[1]

    @property
    def run(self) -> str:
        """The name of its run, which is that of the run's folder below runs/."""
        return self._run[0]

    @property
    def _run(self) -> tuple[str, str]:
        """(name, reference) of its run, through every cell that it is the same as. Raises UserError for a circle."""
        cell, passed = self, [self.reference]
        while cell.same:
            if not is_row(cell.base):
                return Path(cell.base).stem, cell.base
            cell = find_cell(cell.base)
            if cell.reference in passed:
                raise UserError(f"{self.reference} is the same run as itself, by way of {' -> '.join(passed)}.")
            passed.append(cell.reference)
        return f"{cell.file.stem}_{cell.row}_{cell.column}".replace("/", "_"), cell.reference


def is_row(reference: str | Path) -> bool:
    """Whether a reference is FILE#ROW or FILE#ROW/COLUMN."""
    return re.search(r"\.ya?ml#", str(reference)) is not None


def _split(reference: str) -> tuple[Path, str]:
    file, suffix, row = re.split(r"(\.ya?ml)#", str(reference), maxsplit=1)
    return Path(file + suffix), row


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
        for figure in QUANTITIES:
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
    figures = {figure: getattr(row, figure) for figure in QUANTITIES}
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
            raise UserError(f"{file}: there is no row {wanted}; {did_you_mean(name or wanted, table.rows)}")
    if not slash and len(table.columns) > 1:
        choices = ", ".join(f"{name}/{column}" for column in table.columns)
        raise UserError(f"{file}: {name} has several columns; choose one of {choices}.")
    if slash and column not in table.columns:
        raise UserError(f"{file}: there is no column {column}; {did_you_mean(column, table.columns)}")
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
    if not file.exists() and (numbers := _numbers(folder)):
        raise UserError(f"There is no table {number}; there are {', '.join(map(str, numbers))}.")
    table = _read_table(file)
    return [_cell(file, table, name, column) for name in table.rows for column in table.columns]


def all_cells(folder: Path = TABLES) -> list[Cell]:
    """The cells of all tables, table by table and row by row."""
    return [cell for number in _numbers(folder) for cell in table_cells(number, folder)]


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("table")) for path in folder.glob("table*.yaml"))


def run_name(reference: str | Path) -> str:
    """The name of a configuration's run: the file's, or for a row table1_q1_deit_tiny; that of the run it is."""
    return find_cell(str(reference)).run if is_row(reference) else Path(reference).stem


def shown(figure: str, value: float) -> str:
    """A figure as the paper prints it: accuracies in % with two digits, rates of change with four."""
    return f"{value:.2f}" if figure.startswith("top") else f"{value:.4f}"
