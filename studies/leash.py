"""Becomes another program that gets SIGTERM when the process which started it has ended, in whatever way.

    python studies/leash.py PID_OF_THE_STARTER PROGRAM [ARGUMENT ...]

A run that gets SIGTERM saves its state and ends: of a study that is killed no run is left behind. Linux alone can do
this; elsewhere runs go on to their end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; it outlives the exec below


def main() -> None:
    starter, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != starter:  # it ended before this process could ask to be told
        sys.exit(128 + signal.SIGTERM)
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
