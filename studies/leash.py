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


def tie(starter: int) -> None:
    """This process gets SIGTERM when the one that has started it ends; it ends now if that one has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != starter:  # it ended before this process could ask to be told
        os._exit(128 + signal.SIGTERM)


def main() -> None:
    tie(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
