"""What a study asks, stated before it is run: the tables of the paper that it repeats, and findings to be tested.

In a study's file (studies/grid.py):
  tables     in order of importance, in which they are run; each: table (its number in the paper) or a title; rows, the
             names they have in the paper and in the study, one name where it is the same; against, the row that the
             others are compared with; values, its columns; published, the paper's column whose figures stand beside
             (where a value is not named after it); note, a sentence on what is not as in the paper; figures
  findings   each: says, a sentence; higher and lower, rows whose mean is expected to be so; figure; values, each of
             which is a finding of its own; beyond, by more than what; within, where the two are expected to be so
             near; table, which of those above has the paper's figures
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from config import UserError
from config.explain import did_you_mean
from config.rows import table_cells

Figure = Literal[
    "top1", "top5", "loss", "best_top1", "r_w", "r_WQ", "r_Y", "r_Y_block", "oscillating_share", "confidence"
]
Names = Annotated[list[str], Field(min_length=1)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Table(Part):
    """A table of the results."""

    table: int | None = None
    title: str | None = None
    rows: Names | Annotated[dict[str, str], Field(min_length=1)]
    against: str
    values: Names | None = None
    published: str | None = None
    note: str | None = None
    figures: list[Figure] = ["top1"]

    @property
    def names(self) -> dict[str, str]:
        """The study's rows by the paper's."""
        return self.rows if isinstance(self.rows, dict) else {name: name for name in self.rows}

    def has(self, row: str, value: str) -> bool:
        """Whether a row of the study with a value stands in it."""
        return row in self.names.values() and (self.values is None or value in self.values)

    def published_column(self, value: str) -> str:
        return self.published or value


class Finding(Part):
    """A sentence that runs can bear out or not."""

    says: str
    higher: Names
    lower: Names
    figure: Figure = "top1"
    values: Names | None = None
    beyond: Annotated[float, Field(ge=0)] = 0.0
    within: Annotated[float, Field(gt=0)] | None = None
    table: int | None = None


def published_figures(table: Table, value: str) -> dict[str, dict[str, float]]:
    """{the study's row: {figure: as published}} of a table's rows, for the column of a value."""
    if table.table is None:
        return {}
    column = table.published_column(value)
    found = {cell.row: cell.published for cell in table_cells(table.table) if cell.column == column}
    return {ours: found[theirs] for theirs, ours in table.names.items() if theirs in found}


def check_questions(
    tables: Sequence[Table], findings: Sequence[Finding], cells: Sequence[tuple[str, str]]
) -> str | None:
    """A sentence on the first mistake in what a study of these cells (row, value) asks; None if there is none."""
    rows = dict.fromkeys(row for row, _ in cells)
    values = dict.fromkeys(value for _, value in cells)

    def unknown(where: str, names: Sequence[str], among: Any, what: str) -> str | None:
        name = next((name for name in names if name not in among), None)
        if name is None:
            return None
        return f"{where}: there is no {what} {name}; {did_you_mean(name, among) if among else f'it has no {what}s.'}"

    for number, table in enumerate(tables):
        where = f"tables.{number}"
        if (table.table is None) == (table.title is None):
            return f"{where} needs the number of a table of the paper or a title, one of them."
        if table.note is not None and (not table.note.strip() or "\n" in table.note or table.note.endswith(".")):
            return f"{where}.note is to be one line of text without a full stop at its end."
        said = unknown(f"{where}.rows", [*table.names.values()], rows, "row")
        said = said or unknown(f"{where}.against", [table.against], [*table.names.values()], "row in it")
        said = said or unknown(f"{where}.values", table.values or [], values, "value")
        if said is None and table.table is not None:
            try:
                paper = table_cells(table.table)
            except UserError as error:
                return f"{where}: {error}"
            said = unknown(f"{where}.rows", [*table.names], {cell.row for cell in paper}, "row of the paper")
            columns = {cell.column for cell in paper}
            said = said or unknown(
                f"{where}.published", [table.published] if table.published else [], columns, "column"
            )
        if said:
            return said
    for number, finding in enumerate(findings):
        where = f"findings.{number}"
        sides = [*finding.higher, *finding.lower]
        said = unknown(where, sides, rows, "row")
        if said is None and (again := next((row for row in sides if sides.count(row) > 1), None)):
            said = f"{where}: {again} is there twice; a finding compares rows with others."
        said = said or unknown(f"{where}.values", finding.values or [], values, "value")
        if said is None and finding.beyond and finding.within:
            said = f"{where} has both beyond and within; a difference is expected or an equality."
        for value in [] if said else finding.values or values:
            if lacking := next((row for row in (*finding.higher, *finding.lower) if (row, value) not in cells), None):
                said = f"{where}: {lacking} is not run with {value}; name the finding's values."
        if finding.table is not None and finding.table not in [table.table for table in tables]:
            said = said or f"{where}: table {finding.table} is none of the study's tables."
        if said:
            return said
    return None
