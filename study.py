"""Many runs: the paper's tables, as the scripts ask for them, and studies, rows x values x seeds from a file.

python study.py list FILE|TABLE                       # what there is: rows, published figures, commands
python study.py plan FILE                             # what a study has and what it needs
python study.py run FILE [--jobs N] -- FLAGS          # run what is not done yet, several at a time
python study.py collect FILE DIR [DIR ...]            # add finished runs of another machine to results/
python study.py plan TABLE ROW|all [MODEL] -- FLAGS   # the configurations to run, one a line
python study.py name REFERENCE                        # the name of a configuration's run
python study.py check REFERENCE PROCESSES -- FLAGS    # whether so many processes can start it

FLAGS are those of main.py. FILE is a study such as configs/studies/digits.yaml; studies/grid.py says how it is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from config import UserError
from config.explain import Parser, fail, out_of_reach
from config.rows import run_name
from studies.grid import execution_flags, read_study
from studies.plan import check, listing, runs_to_start, study_listing
from studies.pool import Pool, share_cores, visible_gpus


def build_parser() -> Parser:
    parser = Parser(prog="study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument(
        "--filter", nargs="+", default=[], metavar="NAME", help="rows, values or runs of the study, with * and ?"
    )
    chosen.add_argument("--without", nargs="+", default=[], metavar="NAME", help="the same, of what is left out")
    chosen.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="in place of the study's")
    placed = argparse.ArgumentParser(add_help=False)
    placed.add_argument("--output", type=Path, metavar="DIR", help="folder of the runs (default: runs/STUDY)")
    placed.add_argument(
        "--results", type=Path, metavar="DIR", help="folder of STUDY.csv, whose lines are done (default: results)"
    )

    listed = commands.add_parser("list", parents=[chosen], help="rows of a study or a table, commands")
    listed.add_argument("what", metavar="FILE|TABLE")
    planned = commands.add_parser("plan", parents=[chosen, placed], help="what is to be run; flags of main.py after --")
    planned.add_argument("what", metavar="FILE|TABLE")
    planned.add_argument("words", nargs="*", metavar="ROW|all [MODEL]", help="of a table")
    planned.add_argument("--runs-dir", type=Path, metavar="DIR", help="of a table (default: runs)")
    run = commands.add_parser("run", parents=[chosen, placed], help="run a study; flags of main.py after --")
    run.add_argument("what", metavar="FILE")
    run.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one, or one for each GPU)")
    run.add_argument("--limit-minutes", type=float, metavar="M", help="end by then, the runs in progress saved")
    collected = commands.add_parser("collect", parents=[chosen, placed], help="add the lines of finished runs")
    collected.add_argument("what", metavar="FILE")
    collected.add_argument("places", nargs="+", type=Path, metavar="DIR", help="runs, or folders of them")
    named = commands.add_parser("name", help="name of a configuration's run")
    named.add_argument("reference")
    checked = commands.add_parser("check", help="whether processes can start a run; flags of main.py after --")
    checked.add_argument("reference")
    checked.add_argument("processes", type=int)
    return parser


def refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raise UserError where an option is given that would be ignored."""
    if given := [name for name in names if getattr(options, name, None)]:
        word = " ".join(options.words) if given[0] == "words" else f"--{given[0].replace('_', '-')}"
        raise UserError(f"{word} is {why}.")


def of_table(options: argparse.Namespace, flags: Sequence[str]) -> None:
    """list and plan of a table of the paper."""
    refuse(options, ("filter", "without", "seeds", "output", "results"), "a study's; a table takes ROW|all [MODEL]")
    if options.command == "list" and flags:
        raise UserError(f"list takes no flags of main.py, such as {flags[0]}; plan does.")
    number = int(options.what)
    if options.command == "list":
        print(listing(number))
    else:
        for reference in runs_to_start(number, options.words, flags, options.runs_dir or Path("runs")):
            print(reference)


def pool_of(options: argparse.Namespace, runs: int) -> Pool:
    """The pool that a study asks for, of no more jobs than it has runs."""
    gpus = visible_gpus()
    jobs = max(1, len(gpus)) if options.jobs is None else options.jobs
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}; at least one run at a time was expected.")
    if options.limit_minutes is not None and not 0 < options.limit_minutes < float("inf"):
        raise UserError(f"--limit-minutes is {options.limit_minutes:g}; a time above 0 was expected.")
    jobs = min(jobs, runs)
    share_cores(jobs)
    return Pool(jobs, gpus)


def of_study(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """list, plan, run and collect of a study; returns the exit code."""
    if not Path(options.what).exists() and Path(options.what).suffix not in (".yaml", ".yml"):
        raise UserError(
            f"{options.what} is neither the number of a table nor a study's file, such as configs/studies/digits.yaml."
        )
    refuse(options, ("words", "runs_dir"), "a table's; runs of a study are chosen by --filter")
    study = read_study(Path(options.what))
    if (seed := next((seed for seed in options.seeds if not 0 <= seed < 2**32), None)) is not None:
        raise UserError(f"--seeds has {seed}; numbers from 0 to {2**32 - 1} were expected.")
    runs = study.runs(options.filter, options.seeds, options.without)
    if options.command == "list":
        print(study_listing(study, runs))
        return 0
    flags = execution_flags(study, flags)
    pool = pool_of(options, len(runs)) if options.command == "run" else None
    from studies.conduct import (
        Places,
        collect,
        run_study,
        states,
    )  # here, because it imports torch, which takes seconds

    places = Places.of(study, options.output, options.results)
    if pool is not None:
        return run_study(places, runs, pool, flags, options.limit_minutes and 60 * options.limit_minutes)
    for line in collect(places, runs, options.places) if options.command == "collect" else states(places, runs):
        print(line)
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    code = 0
    try:
        options = build_parser().parse_args(argv)
        if options.command == "check":
            check(options.reference, options.processes, flags)
        elif options.command == "name":
            print(run_name(options.reference))
        elif options.command in ("list", "plan") and options.what.isdecimal():
            of_table(options, flags)
        else:
            code = of_study(options, flags)
    except UserError as error:
        after = " Flags of main.py go after --." if str(error).startswith("There is no flag -") and not flags else ""
        fail(f"{error}{after}")
    except OSError as error:
        if (said := out_of_reach(error)) is None:
            raise
        fail(said)
    except KeyboardInterrupt:
        fail("ended at once; runs go on from where they were saved.", 130)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
