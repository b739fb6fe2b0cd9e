"""The tables of the paper as runs, as the scripts ask for them.

python study.py list TABLE                            # rows, published figures, commands
python study.py plan TABLE ROW|all [MODEL] -- FLAGS   # the configurations to run, one a line
python study.py name REFERENCE                        # the name of a configuration's run
python study.py check REFERENCE PROCESSES -- FLAGS    # whether so many processes can start it
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from config import UserError
from config.explain import Parser, fail
from config.rows import run_name
from studies.plan import check, listing, runs_to_start


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = Parser(prog="study.py", description="The tables of the paper as runs; see scripts/table.sh.")
    commands = parser.add_subparsers(dest="command", required=True)
    listed = commands.add_parser("list", help="rows of a table, published figures, commands")
    listed.add_argument("table", type=int)
    planned = commands.add_parser("plan", help="configurations to run, one a line; flags of main.py after --")
    planned.add_argument("table", type=int)
    planned.add_argument("words", nargs="*", metavar="ROW|all [MODEL]")
    planned.add_argument("--runs-dir", type=Path, default=Path("runs"))
    named = commands.add_parser("name", help="name of a configuration's run")
    named.add_argument("reference")
    checked = commands.add_parser("check", help="whether processes can start a run; flags of main.py after --")
    checked.add_argument("reference")
    checked.add_argument("processes", type=int)
    try:
        options = parser.parse_args(argv)
        if options.command == "list":
            print(listing(options.table))
        elif options.command == "plan":
            for reference in runs_to_start(options.table, options.words, flags, options.runs_dir):
                print(reference)
        elif options.command == "check":
            check(options.reference, options.processes, flags)
        else:
            print(run_name(options.reference))
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
