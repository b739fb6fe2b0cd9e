"""docs/RESULTS.md and its picture, from results/*.csv and the studies' files alone: `python report.py results`."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import UserError
from config.rows import ROOT, table_cells
from record.lines import read_every_line
from results.choice import choice
from results.evidence import MODEL, RULE, Evidence, Verdict, total
from results.statistics import Compared
from results.style import COLOURS, DPI, picture, spoken
from results.tables import GAP, markdown_table, signed
from studies.grid import Study, read_study
from studies.questions import Table, published_figures

STUDIES, RESULTS = ROOT / "configs/studies", ROOT / "results"
PAGE, PICTURE = ROOT / "docs/RESULTS.md", ROOT / "docs/images/results.png"
FARTHEST = 4.0  # times as far as the next: a row whose dot would leave the others no room in the picture
WORDS = {"deit_tiny": "DeiT", "swin_tiny": "Swin", "top1": "top-1 (%)", "top5": "top-5 (%)", "": ""}
WORDS |= {
    "r_w": "r(W)",
    "r_WQ": "r(W_Q)",
    "r_Y": "r(Y)",
    "r_Y_block": "r(Y), the block's input fixed",
    "loss": "loss",
    "best_top1": "best top-1 (%)",
}


def worded(name: str) -> str:
    return WORDS.get(name, name)


def number(figure: str, value: float) -> str:
    return f"{value:.2f}" if figure in ("top1", "top5", "best_top1") else f"{value:.4f}"


def interval(figure: str, difference: Compared | None) -> str:
    """The mean with its interval: +1.05 [0.60, 1.50]."""
    if difference is None:
        return GAP
    low, high = (number(figure, end) for end in difference.interval)
    return f"{signed(number(figure, difference.mean))} [{low}, {high}]{' *' if difference.alone else ''}"


def probability(p: float | None) -> str:
    return GAP if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


# ---------------------------------------------------------------------------------------------------------------------
# The parts of the page
# ---------------------------------------------------------------------------------------------------------------------


def head(evidence: Evidence) -> str:
    """How many runs there are, and with what they were made."""
    study, lines = evidence.study, evidence.all
    planned = len(study.runs())
    changed = sum("+" in line.commit for line in lines)
    seconds = sum(line.seconds for line in lines)
    facts = [
        f"Runs that are done: {len(lines)}; the study has {planned}, with the seeds of its file.",
        f"Devices: {', '.join(total(lines, lambda line: line.device))}; autocast {lines[0].autocast}; "
        f"torch {', '.join(total(lines, lambda line: line.torch))}. "
        f"{seconds / 3600:.1f} hours of runs, several of them at a time.",
        f"Data: {lines[0].classes} classes. Commits: {', '.join(total(lines, lambda line: line.commit))}"
        + (f"; + stands for changes that were not committed ({changed} runs)." if changed else "."),
    ]
    if evidence.others:
        facts.append(
            f"{evidence.others} further lines, of recipes or seeds that the study's file does not have, do not count."
        )
    if evidence.twice:
        runs = ", ".join(
            dict.fromkeys(f"{line.row} {line.value} seed {line.seed}".replace("  ", " ") for line in evidence.twice)
        )
        facts.append(f"Done more than once, with other figures: {runs}. What was begun first counts.")
    for value in evidence.values:
        own = [line for (_, of), by_seed in evidence.lines.items() for line in by_seed.values() if of == value]
        if own:
            config = next(cell.config for cell in study.cells if cell.value == value)
            model = ", ".join(f"{key} {size}" for key, size in config.model.kwargs.items())
            patch = f", patches of {config.model.patch_size}" if config.model.patch_size else ""
            facts.append(
                f"{f'{worded(value)}: ' if value else ''}{config.model.name} of {config.model.img_size} pixels{patch}"
                f"{f' ({model})' if model else ''}, {own[0].epochs} epochs, {own[0].steps} steps of "
                f"{config.optim.global_batch} images."
            )
            if (error := evidence.error(value, "top1")) is not None:
                facts[-1] += f" Chance: {error.spread:.2f} points of top-1, on {error.dof} degrees of freedom."
    return "\n".join(f"- {fact}" for fact in facts)


def findings_table(verdicts: Sequence[Verdict]) -> str:
    header = ["finding", "model", "at this scale", "difference, 95 %", "pairs", "p", "Holm"]
    header += ["paired t", "sign flips", "published"]
    lines = []
    for one in verdicts:
        figure, difference = one.finding.figure, one.difference
        of_none = one.finding.within is None and not one.finding.beyond  # what is tested is that there is a difference
        lines.append(
            [
                one.finding.says,
                worded(one.value) or GAP,
                f"**{one.word}**{' so far' if one.preliminary and one.p is not None else ''}",
                interval(figure, difference),
                str(difference.n if difference else 0),
                probability(one.p),
                probability(one.adjusted),
                probability(one.paired.p if one.paired and of_none else None),
                probability(difference.p_flip if difference and of_none else None),
                GAP if one.published is None else signed(number(figure, one.published)),
            ]
        )
    return markdown_table(header, lines)


def results_table(evidence: Evidence, table: Table, value: str, figure: str, published: dict[str, float]) -> str:
    """A line a row: runs, mean, spread, difference to the row compared with, and what is published, by row, if any."""
    header = ["row", "seeds", "epochs", "mean", "spread", f"less {table.against}, 95 %", "p"]
    header += ["published", "published difference"] if published else []
    lines = []
    for theirs, row in table.names.items():
        values = [*evidence.figures(row, value, figure).values()]
        of_row = evidence.lines.get((row, value), {})
        difference = None
        if row != table.against:
            difference = evidence.compare([row], [table.against], value, figure)
        line = [
            theirs,
            str(len(values)),
            str(next(iter(of_row.values())).epochs) if of_row else GAP,
            number(figure, statistics.fmean(values)) if values else GAP,
            number(figure, statistics.stdev(values)) if len(values) > 1 else GAP,
            interval(figure, difference),
            probability(difference.p if difference else None),
        ]
        if published:
            differs = row != table.against and row in published and table.against in published
            line += [number(figure, published[row]) if row in published else GAP]
            line += [signed(number(figure, published[row] - published[table.against])) if differs else GAP]
        lines.append(line)
    return markdown_table(header, lines)


def table_part(evidence: Evidence, table: Table) -> list[str]:
    """The heading of a table and what it holds, value by value and figure by figure."""
    if table.table:
        of = f", {', '.join(map(worded, evidence.of_table(table)))}" if table.values else ""
        text = [f"### Table {table.table}{of}", f"In the paper: {table_cells(table.table)[0].title}."]
    else:
        text = [f"### {table.title[0].upper()}{table.title[1:]}"]
    if table.note:
        text.append(f"Here: {table.note}.")
    for value in evidence.of_table(table):
        in_paper = published_figures(table, value)
        for figure in table.figures:
            heading = ", ".join(filter(None, (worded(value), worded(figure))))
            published = {row: of[figure] for row, of in in_paper.items() if figure in of}
            text.append(f"{heading}{f'; published figures: {table.published_column(value)}' if published else ''}")
            if evidence.lines.get((table.against, value)) and not evidence.figures(table.against, value, figure):
                text.append(f"No run of {table.against}, with which the others are compared, has recorded it.")
            text.append(results_table(evidence, table, value, figure, published))
    return text


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def study_part(evidence: Evidence, shown: str | None) -> list[str]:
    """All of one study. shown: where its picture is, if it has one."""
    study, verdicts = evidence.study, evidence.verdicts()
    file = study.file.resolve()
    name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name
    text = [f"## {study.title[0].upper()}{study.title[1:]}", f"`{name}`, `results/{study.name}.csv`.", head(evidence)]
    if verdicts:
        tested = sum(one.p is not None for one in verdicts)
        text += [
            "### Findings",
            RULE,
            f"Tested: {tested} of {counted(len(verdicts), 'finding')}; p is adjusted for all of them. The tables "
            f"below show {counted(evidence.comparisons(), 'paired comparison')}, findings among them, whose p are not "
            "adjusted.",
            findings_table(verdicts),
        ]
    if shown is not None:
        against = _row(study.tables[0].against)
        text.append(f"![each row of the first table less {against}, seed by seed, with mean and interval]({shown})")
    for table in study.tables:
        text += table_part(evidence, table)
    return text


def page(evidences: Sequence[Evidence], choices: Sequence[tuple[Study, str]], shown: str) -> str:
    """The whole page. The same lines and studies give the same text, byte for byte.

    shown: where the picture is, from there.
    """
    text = [
        "# Results",
        "Made by `python report.py results` from the lines of finished runs in `results/` and the studies in "
        "`configs/studies/`; every change by hand is lost.",
        "No figure of ours is one of ImageNet. Published figures (arXiv 2502.20853) are of ImageNet-1K and 90 epochs: "
        "they stand beside ours for the sign of a difference and not for its size. Spread: sample standard deviation "
        f"over the seeds that a row has, as mean. {GAP} is a gap.",
        MODEL,
    ]
    if not evidences and not choices:
        text.append("There are no runs yet.")
    for evidence in evidences:
        text += study_part(evidence, shown if evidence is drawn(evidences) else None)
    for study, ranking in choices:
        text += [f"## How the scale was chosen: {study.title}", f"`{study.name}`, seeds of its own.", ranking]
    return "\n\n".join(text) + "\n"


def gather(studies: Path, results: Path) -> tuple[list[Evidence], list[tuple[Study, str]]]:
    """(evidence of the studies that ask something and have lines, those of the paper's tables first; rankings of those
    that choose and have lines)."""
    evidences, choices = [], []
    for file in sorted(studies.glob("*.yaml")):
        lines = read_every_line(results / f"{file.stem}.csv")
        if not lines:
            continue
        study = read_study(file)
        if study.choice:
            choices.append((study, choice(study, lines)))
        elif study.tables or study.findings:
            evidence = Evidence(study, lines)
            if evidence.all:
                evidences.append(evidence)
    return sorted(evidences, key=lambda one: all(table.table is None for table in one.study.tables)), choices


def drawn(evidences: Sequence[Evidence]) -> Evidence | None:
    """What the picture is of: the first study with a table."""
    return next((evidence for evidence in evidences if evidence.study.tables), None)


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------


def draw(evidence: Evidence, path: Path) -> None:
    """The first table of a study: each row's differences to the row compared with, seed by seed, their mean and its
    interval, and the published difference. What lies so far off that the others could not be told apart is written at
    the edge. Raises UserError where the picture cannot be written."""
    table = evidence.study.tables[0]
    rows = [row for row in table.names.values() if row != table.against]
    alike = [one for one in evidence.study.tables if one.table == table.table and one.names == table.names]
    values = [*dict.fromkeys(value for one in alike for value in evidence.of_table(one) if one.table or one is table)]
    values = [value for value in values if any(evidence.lines.get((row, value)) for row in rows)] or values[:1]
    with picture() as figure:
        figure.set_size_inches(4.2 * len(values) + 1, 0.45 * len(rows) + 1.6)
        axes = figure.subplots(1, len(values), squeeze=False, sharey=True)[0]
        for one, value in zip(axes, values, strict=True):
            _draw_value(one, evidence, table, value)
        axes[0].set_yticks(range(len(rows)), map(_row, rows))
        axes[0].set_ylim(len(rows) - 0.5, -0.5)  # the first row at the top, for all
        shown = {label: one for each in axes for one, label in zip(*each.get_legend_handles_labels(), strict=True)}
        figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=3)
        figure.supxlabel(f"{worded(table.figures[0])} less that of {_row(table.against)}", fontsize=9)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=DPI, format="png", metadata={"Software": None})
        except OSError as error:
            raise UserError(f"The picture {path} cannot be written ({error}).") from None


def _row(name: str) -> str:
    """A row as the paper writes it, where it is one of its methods."""
    try:
        return spoken(name)
    except (StopIteration, KeyError):
        return name.replace("_", " ")


def _draw_value(axes: Any, evidence: Evidence, table: Table, value: str) -> None:
    """One value's column. What lies outside of it is written at the edge that it lies beyond."""
    name = table.figures[0]
    published = published_figures(table, value)
    base = published.get(table.against, {}).get(name)
    rows = [row for row in table.names.values() if row != table.against]
    ours = {row: evidence.differences([row], [table.against], value, name) for row in rows}
    means = {row: mean for row in rows if (mean := evidence.compare([row], [table.against], value, name)) is not None}
    places = {row: abs(statistics.fmean(found)) for row, found in ours.items() if found}
    *_, second, farthest = [0.0, 0.0, *sorted(places.values())]
    near = {row for row in places if places[row] < farthest or farthest <= FARTHEST * second or not second}
    ends = [0.0, *(x for row in near for x in ours[row]), *(x for row in near & {*means} for x in means[row].interval)]
    low, high = min(ends), max(ends)
    margin = 0.15 * (high - low) or 1.0
    low, high = low - margin, high + margin
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.plot([], [], ".", color=COLOURS[2], alpha=0.4, label="one seed")
    axes.errorbar([], [], xerr=[], fmt="o", color=COLOURS[2], capsize=3, markersize=4, label="mean, 95 %")
    if base is not None:
        axes.plot([], [], "x", color=COLOURS[4], label="published, on ImageNet")

    def at_the_edge(difference: float, height: float, colour: str) -> None:
        left = difference < low
        text = f"\u2190 {difference:+.1f}" if left else f"{difference:+.1f} \u2192"
        axes.text(low if left else high, height, text, color=colour, fontsize=7, ha="left" if left else "right")

    for place, row in enumerate(rows):
        if row in places and row not in near:
            at_the_edge(statistics.fmean(ours[row]), place + 0.1, COLOURS[2])
        axes.plot(ours[row], [place] * len(ours[row]), ".", color=COLOURS[2], alpha=0.4)
        if row in near and row in means:
            mean = means[row].mean
            half = means[row].interval[1] - mean
            axes.errorbar(mean, place, xerr=half, fmt="o", color=COLOURS[2], capsize=3, markersize=4)
        if base is not None and name in published.get(row, {}):
            theirs = published[row][name] - base
            if low <= theirs <= high:
                axes.plot(theirs, place, "x", color=COLOURS[4])
            else:
                at_the_edge(theirs, place - 0.25, COLOURS[4])
    axes.set_xlim(low, high)
    axes.set_title(worded(value))
    axes.grid(axis="x", alpha=0.3)


def write_results(studies: Path, results: Path, out: Path, png: Path) -> None:
    """`report.py results`. Raises UserError for lines that cannot be read and files that cannot be written."""
    evidences, choices = gather(studies, results)
    text = page(evidences, choices, Path(os.path.relpath(png, out.parent)).as_posix())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}).") from None
    print(f"written: {out}")
    shown = {study.name for study in (*(evidence.study for evidence in evidences), *(study for study, _ in choices))}
    for file in sorted(results.glob("*.csv")):
        if file.stem not in shown:
            print(f"note: {file} has no lines of a study in {studies} that asks something.", file=sys.stderr)
    if (of := drawn(evidences)) is not None:
        draw(of, png)
        print(f"written: {png}")
