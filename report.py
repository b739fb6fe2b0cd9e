"""Runs in, pictures and tables out: `python report.py curves RUN [RUN ...] --png FILE`, `figures`, `tables`.

curves   a table (method, top-1, loss, time) and one picture of loss and accuracy over the epochs (results/curves.py)
figures  Figures 2 to 6 and Table 3 of the paper, from runs with a probe (results/figures.py)
tables   the paper's tables, published figures beside ours (results/tables.py)
choose   which value of a study tells its first two rows apart best (results/choice.py)
results  docs/RESULTS.md and its picture, from results/*.csv (results/page.py)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from config import UserError
from config.explain import Parser, fail, out_of_reach
from record.lines import read_lines
from results.choice import choice
from results.curves import write_curves
from results.figures import write_figures
from results.page import PAGE, PICTURE, RESULTS, STUDIES, write_results
from results.tables import write_tables
from studies.grid import read_study


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="report.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
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
    chosen = commands.add_parser("choose", help="which value of a study tells its first two rows apart best")
    chosen.add_argument("study", type=Path, metavar="FILE", help="such as configs/studies/regime.yaml")
    chosen.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="(default: results)")
    page = commands.add_parser("results", help="docs/RESULTS.md and its picture, from results/*.csv")
    page.add_argument("--studies", type=Path, default=STUDIES, metavar="DIR", help="(default: configs/studies)")
    page.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="(default: results)")
    page.add_argument("--out", type=Path, default=PAGE, metavar="FILE", help="(default: docs/RESULTS.md)")
    page.add_argument("--png", type=Path, default=PICTURE, metavar="FILE", help="(default: docs/images/results.png)")
    try:
        options = parser.parse_args(argv)
        if options.command == "curves":
            write_curves(options.runs, options.png)
        elif options.command == "figures":
            write_figures(options.runs, options.out)
        elif options.command == "results":
            write_results(options.studies, options.results, options.out, options.png)
        elif options.command == "choose":
            study = read_study(options.study)
            print(choice(study, read_lines(options.results / f"{study.name}.csv")))
        else:
            write_tables(options.runs, options.markdown, options.csv)
    except UserError as error:
        fail(error)
    except OSError as error:
        if (said := out_of_reach(error)) is None:
            raise
        fail(said)


if __name__ == "__main__":
    main()
