"""Which value of a study tells two of its rows apart best, by a rule fixed beforehand: `report.py choose FILE`.

A study's first two rows are compared, for each of its values:

    gap     mean top-1 of the first row less that of the second, over the seeds that both have
    spread  standard deviation over seeds, pooled over the two rows
    ratio   gap / spread: the largest is chosen

All values are to take the same time, or the slowest would win: one that takes longer than the first in the file by more
than EVEN is not chosen. Their time is that which a device works for the steps of a run, where the file says what one
takes, else the seconds that its runs took, which other runs beside them have lengthened. How many epochs of each would
take as long as the first is said beside. Neither a test nor a look at any other row enters the choice, nor do other
seeds than those of the file, and its seeds are not used again.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from config import UserError
from record.lines import Line, once
from results.statistics import pooled_spread
from results.tables import GAP, markdown_table
from studies.grid import Cell, Study

EVEN = 0.15  # values whose times differ by more than this share do not take the same time
HEADER = ["", "seeds", "{first}", "{second}", "gap", "spread", "ratio", "seconds", "epochs", "epochs for the same time"]


@dataclass(frozen=True)
class Candidate:
    """A value of the study with the figures of its two rows."""

    name: str
    epochs: int
    tops: tuple[tuple[float, ...], tuple[float, ...]]  # of either row, by seed
    seconds: float  # of a run, mean over both rows: of the device's work alone, where that is known

    @property
    def gap(self) -> float:
        return statistics.fmean(self.tops[0]) - statistics.fmean(self.tops[1])

    @property
    def spread(self) -> float | None:
        return pooled_spread(self.tops)

    @property
    def ratio(self) -> float | None:
        return self.gap / self.spread if self.spread else None


def candidates(study: Study, lines: Sequence[Line]) -> tuple[list[Candidate], list[str]]:
    """(values that have runs of both rows, the best first; names of those that have none).

    Raises UserError for a study that is not there to choose.
    """
    if not study.choice:
        raise UserError(f"{study.file} is not there to choose one of its values; such a study says choice: true.")
    rows = [*dict.fromkeys(cell.row for cell in study.cells)]
    values = [*dict.fromkeys(cell.value for cell in study.cells)]
    cells = {(cell.row, cell.value): cell for cell in study.cells}
    found, without = [], []
    for value in values:
        pair = [cells.get((row, value)) for row in rows[:2]]
        one = None if None in pair else _candidate(value, pair, lines, study.milliseconds.get(value))
        if one is None:
            without.append(value)
        else:
            found.append(one)
    return sorted(found, key=lambda one: -(one.ratio if one.ratio is not None else -float("inf"))), without


def _candidate(value: str, pair: Sequence[Cell], lines: Sequence[Line], milliseconds: float | None) -> Candidate | None:
    tops: list[dict[int, float]] = []
    seconds: list[float] = []
    for cell in pair:
        own = [
            line
            for line in once(lines)[0]
            if (line.row, line.value, line.recipe) == (cell.row, cell.value, cell.recipe) and line.seed in cell.seeds
        ]
        tops.append({line.seed: line.top1 for line in own})
        seconds += [line.seconds if milliseconds is None else line.steps * milliseconds / 1e3 for line in own]
    seeds = sorted(tops[0].keys() & tops[1].keys())
    if not seeds:
        return None
    first, second = (tuple(top[seed] for seed in seeds) for top in tops)
    return Candidate(value, pair[0].config.schedule.epochs, (first, second), statistics.fmean(seconds))


def choice(study: Study, lines: Sequence[Line]) -> str:
    """The ranking as Markdown, and what is chosen. Raises UserError as `candidates`, and where there is no run."""
    ranked, without = candidates(study, lines)
    if not ranked:
        raise UserError(f"No value of {study.name} has runs of both rows yet; run it with study.py.")
    rows = [*dict.fromkeys(cell.row for cell in study.cells)]
    order = [cell.value for cell in study.cells]
    goal = min(ranked, key=lambda one: order.index(one.name)).seconds
    table = []
    for one in ranked:
        means = [f"{statistics.fmean(top):.2f}" for top in one.tops]
        spread, ratio = (GAP if value is None else f"{value:.2f}" for value in (one.spread, one.ratio))
        same = round(one.epochs * goal / one.seconds) if one.seconds else one.epochs
        times = [f"{one.seconds:.0f}", str(one.epochs), str(same)]
        table.append([one.name, str(len(one.tops[0])), *means, f"{one.gap:+.2f}", spread, ratio, *times])
    header = [word.format(first=rows[0], second=rows[1]) for word in HEADER]
    text = [
        f"Ratio of the gap in top-1 (%), {rows[0]} less {rows[1]}, to the spread over seeds, pooled over both; the "
        "largest is chosen. Seconds: "
        + ("the device's work for the steps of a run." if study.milliseconds else "of runs, whatever ran beside them."),
        "",
        markdown_table(header, table),
    ]
    if without:
        text += ["", f"Without runs of both rows: {', '.join(without)}."]
    uneven = [one.name for one in ranked if goal and abs(one.seconds / goal - 1) > EVEN]
    if uneven:
        text += ["", f"Not of the same time as the first by more than {100 * EVEN:.0f} %: {', '.join(uneven)}."]
    able = [one for one in ranked if one.ratio is not None and one.seconds <= goal * (1 + EVEN)]
    if not able:
        why = "there is no seed spread" if ranked[0].ratio is None else "what has a seed spread takes longer"
        return "\n".join([*text, "", f"Chosen: nothing yet: {why}."])
    planned = len({cell.value for cell in study.cells}) * len(study.cells[0].seeds)
    so_far = " so far, since not all runs are done" if sum(len(one.tops[0]) for one in ranked) < planned else ""
    return "\n".join([*text, "", f"Chosen{so_far}: {able[0].name}, ratio {able[0].ratio:.2f}."])
