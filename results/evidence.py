"""What the lines of a study say to the questions it asks: rows in pairs, findings with a verdict by a stated rule."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from config import UserError
from record.lines import Line, once
from results.statistics import Compared, Error, additive_error, compared, holm, judged, paired_error
from studies.grid import Cell, Study
from studies.questions import Finding, Table, published_figures

ALPHA = 0.05  # of a verdict, all findings of a study together
FEWEST = 3  # pairs that a verdict is given on
SHOWS, NOT, NOISE, OPEN, FEW = "shows", "does not", "within noise", "undecided", "too few runs"
MODEL = """\
Differences are taken between runs of one seed, which have initial weights, order of images and augmentation in common;
a row with more seeds than the other has a mean of more runs than its difference.
Their standard error comes from all rows of a model together: the figure of a run is taken for the sum of what its row,
its seed and chance add to it, with chance of one variance for all rows; interval (95 %) and p are Student's t on the
degrees of freedom that are left. Rows whose differences vary more than the others' are judged by those differences
alone, and a * says so: three seeds may hide that a row varies more by nature, and then p is too small. The p of the
paired t test, which always takes those differences alone, stands beside, as does that of all sign flips, which takes
nothing for granted but symmetry: with n pairs it is 2 / 2^n at least. Both are of no difference, so they have a gap
beside a finding that is tested against a size or a margin."""
RULE = f"""\
A finding is the mean of the rows that the paper has higher less that of those it has lower. It **shows** at this scale
where the difference has the paper's sign and its p, adjusted for all findings (Holm), is below {ALPHA:g}; it
**does not** where that holds with the other sign; else it is **within noise**, and the interval says which differences
the runs do not rule out. A finding that names a size, such as a collapse, is tested against that size in place of 0,
and **does not** stands where the difference is below it. A finding of equality is tested against its margin: it shows
where the difference lies within by two one-sided t tests, and does not where it lies beyond, p adjusted alike. Either
is **undecided** else, which is no equality. Fewer than {FEWEST} pairs are too few, and so are runs that seeds do not
tell apart; "so far" stands where there are fewer than the study is to have."""


@dataclass(frozen=True)
class Verdict:
    """A finding for one value of its study. difference: None where fewer than two seeds have all of its rows."""

    finding: Finding
    value: str
    difference: Compared | None
    paired: Compared | None  # by the differences of the two sides alone
    published: float | None
    p: float | None = None  # of the test that the verdict is by
    adjusted: float | None = None
    word: str = FEW
    planned: int = 0  # pairs that there are to be

    @property
    def preliminary(self) -> bool:
        return (self.difference.n if self.difference else 0) < self.planned


class Evidence:
    """The lines of a study that are of its recipes and seeds as its file has them, by row, value and seed.

    Raises UserError for lines of one cell, or of one study, that are of different data or precision.
    """

    def __init__(self, study: Study, lines: Sequence[Line]) -> None:
        self.study = study
        self.cells: dict[tuple[str, str], Cell] = {(cell.row, cell.value): cell for cell in study.cells}
        self.values = [*dict.fromkeys(cell.value for cell in study.cells)]
        self.lines: dict[tuple[str, str], dict[int, Line]] = {key: {} for key in self.cells}
        self.others = 0  # lines of recipes and seeds that are not the study's
        lines, twice = once(lines)
        self.twice = [line for line in twice if self._counts(line)]  # further lines of a run, with other figures
        for line in lines:
            if self._counts(line):
                self.lines[line.row, line.value][line.seed] = line
            else:
                self.others += 1
        self.lines = {key: dict(sorted(by_seed.items())) for key, by_seed in self.lines.items()}
        self._errors: dict[tuple[str, str, tuple[str, ...]], Error | None] = {}
        self._check()

    def _counts(self, line: Line) -> bool:
        """Whether a line is of the study's recipes and seeds."""
        cell = self.cells.get((line.row, line.value))
        return cell is not None and cell.recipe == line.recipe and line.seed in cell.seeds

    def _check(self) -> None:
        def same(found: Iterable[object], name: str, where: str) -> None:
            found = sorted({*found})
            if len(found) > 1:
                text = " and ".join(map(str, found))
                raise UserError(f"results/{self.study.name}.csv: {where} has runs of {name} {text}; they are no pairs.")

        # Rows of one value see as many images in an epoch; how many steps that is follows from it and the batch.
        steps: dict[tuple[object, ...], dict[int, list[str]]] = {}
        for (row, value), by_seed in self.lines.items():
            config = self.cells[row, value].config
            schedule = (
                value,
                config.schedule.epochs,
                config.optim.global_batch,
                config.aug.repeats,
                config.data.val_split,
            )
            for line in by_seed.values():
                if line.epochs != config.schedule.epochs:
                    raise UserError(
                        f"results/{self.study.name}.csv: {row} {value} has a run of {line.epochs} epochs with the "
                        f"recipe of {config.schedule.epochs}; it is none of the study's."
                    )
                steps.setdefault(schedule, {}).setdefault(line.steps, []).append(row)
        for (value, *_), of in steps.items():
            odd = min(of.values(), key=len)[0]
            same(of, "steps", f"{odd} {value}".strip() if len(of) > 1 else "")
        for name in ("classes", "autocast"):
            same((getattr(line, name) for line in self.all), name, self.study.name)

    @property
    def all(self) -> list[Line]:
        return [line for by_seed in self.lines.values() for line in by_seed.values()]

    def figures(self, row: str, value: str, figure: str) -> dict[int, float]:
        """By seed; {} of a row that the study does not have with this value."""
        found = {seed: getattr(line, figure) for seed, line in self.lines.get((row, value), {}).items()}
        return {seed: number for seed, number in found.items() if number is not None}

    def differences(self, higher: Sequence[str], lower: Sequence[str], value: str, figure: str = "top1") -> list[float]:
        """Mean of the rows `higher` less mean of the rows `lower`, for each seed that all of them have."""
        sides = [[self.figures(row, value, figure) for row in rows] for rows in (higher, lower)]
        seeds = set.intersection(*({*by_seed} for side in sides for by_seed in side))
        means = [[statistics.fmean(by_seed[seed] for by_seed in side) for seed in sorted(seeds)] for side in sides]
        return [high - low for high, low in zip(*means, strict=True)]

    def error(self, value: str, figure: str, without: Sequence[str] = ()) -> Error | None:
        """What chance adds to a run of a value, by all of its rows but some."""
        key = value, figure, tuple(without)
        if key not in self._errors:
            rows = [self.figures(row, of, figure) for row, of in self.lines if of == value and row not in without]
            self._errors[key] = additive_error([row for row in rows if row])
        return self._errors[key]

    def compare(self, higher: Sequence[str], lower: Sequence[str], value: str, figure: str = "top1") -> Compared | None:
        """The difference of two sides; None where fewer than two seeds have all of their rows."""
        differences = self.differences(higher, lower, value, figure)
        of_others = self.error(value, figure, without=(*higher, *lower))
        return judged(differences, self.error(value, figure), of_others, 1 / len(higher) + 1 / len(lower))

    def of_table(self, table: Table) -> list[str]:
        """Its values, those that the study has."""
        return [value for value in table.values or self.values if value in self.values]

    def comparisons(self) -> int:
        """Paired comparisons in the tables, of which intervals are shown."""
        return sum(
            self.compare([row], [table.against], value, figure) is not None
            for table in self.study.tables
            for value in self.of_table(table)
            for figure in table.figures
            for row in table.names.values()
            if row != table.against
        )

    def _published(self, finding: Finding, value: str) -> float | None:
        """The difference that the paper has, where it has all of the rows."""
        if finding.table is None:
            return None
        table = next(table for table in self.study.tables if table.table == finding.table)
        figures = published_figures(table, value)
        sides = [[figures.get(row, {}).get(finding.figure) for row in rows] for rows in (finding.higher, finding.lower)]
        if None in sides[0] + sides[1]:
            return None
        return statistics.fmean(sides[0]) - statistics.fmean(sides[1])

    def verdicts(self) -> list[Verdict]:
        """All findings of the study, adjusted for their number; see RULE."""
        found = []
        for finding in self.study.findings:
            for value in finding.values or self.values:
                sides = finding.higher, finding.lower, value, finding.figure
                difference, alone = self.compare(*sides), self.differences(*sides)
                seeds = [{*self.cells[row, value].seeds} for row in (*finding.higher, *finding.lower)]
                one = Verdict(
                    finding,
                    value,
                    difference,
                    compared(alone, paired_error(alone)),
                    self._published(finding, value),
                    planned=len(set.intersection(*seeds)),
                )
                enough = difference is not None and difference.n >= FEWEST
                found.append(replace(one, p=_p(finding, difference)) if enough else one)
        # One that is not tested yet counts with the p of 1: its own p, when it comes, takes nothing from the others.
        adjusted = holm([1.0 if one.p is None else one.p for one in found])
        return [
            one if one.p is None else replace(one, adjusted=p, word=_word(one.finding, one.difference, p))
            for one, p in zip(found, adjusted, strict=True)
        ]


def _p(finding: Finding, difference: Compared) -> float:
    """p of what the verdict is on: that the difference is none or, against a margin, that it is on its other side."""
    if finding.within is None:
        return difference.p_other_than(finding.beyond)
    inside = abs(difference.mean) < finding.within
    return difference.p_within(finding.within) if inside else difference.p_beyond(finding.within)


def _word(finding: Finding, difference: Compared, adjusted: float) -> str:
    if adjusted >= ALPHA:
        return OPEN if finding.within or finding.beyond else NOISE
    holds = difference.mean > finding.beyond if finding.within is None else abs(difference.mean) < finding.within
    return SHOWS if holds else NOT


def total(lines: Sequence[Line], what: Callable[[Line], str]) -> list[str]:
    """What lines say of something, each once, with the number of lines where there is more than one kind."""
    said = [what(line) for line in lines]
    kinds = sorted({*said})
    return kinds if len(kinds) < 2 else [f"{kind} ({said.count(kind)})" for kind in kinds]
