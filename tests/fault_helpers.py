"""Kills runs of main.py at chosen moments, for test_faults.py.

Run as a script: `python fault_helpers.py PLAN.json RESULT.json` works through a list of {"argv": [...], "die": number
or null}, each in a process forked for it, which is ready at once and dies by SIGKILL as a whole process does. A result
is {"status": as of os.waitpid, "moments": the names of the moments met, in their order}.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = ("half a checkpoint", "half a line", "before fsync", "after fsync", "before replace", "after replace")


class Moments:
    """Counts the moments at which the process can die, and dies at number `die`; their names go to `path`."""

    def __init__(self, path: Path, die: int | None) -> None:
        self.file, self.die, self.count = path.open("w"), die, 0

    def now(self, name: str, last_act: Callable[[], Any] | None = None) -> None:
        self.file.write(f"{name}\n")
        self.file.flush()
        if self.count == self.die:
            if last_act is not None:
                last_act()
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def around(self, function: Callable[..., Any], name: str, *, after: bool = True) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.now(f"before {name}")
            result = function(*args, **kwargs)
            if after:
                self.now(f"after {name}")
            return result

        return watched


def watch(moments: Moments) -> None:
    """Let this process meet moments: within writes, and between the acts of a run."""
    import pytest
    import torch
    from helpers import replace

    import engine
    from record.runlog import RunLog

    save, write = torch.save, RunLog._write

    def save_watched(state: Any, file: Any) -> None:
        written = io.BytesIO()
        save(state, written)
        half = written.getvalue()[: written.tell() // 2]
        moments.now("half a checkpoint", lambda: (file.write(half), file.flush()))
        save(state, file)

    def write_watched(log: RunLog, step: Any, data: Any) -> None:
        moments.now("half a line", lambda: (log._file.write('DLLL {"timestamp": "17'), log._file.flush()))
        write(log, step, data)

    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "save", save_watched)
    patch.setattr(RunLog, "_write", write_watched)
    patch.setattr(os, "fsync", moments.around(os.fsync, "fsync"))
    patch.setattr(os, "replace", moments.around(os.replace, "replace"))
    replace(patch, engine.train_step, moments.around(engine.train_step, "step", after=False))
    replace(patch, engine.evaluate, moments.around(engine.evaluate, "evaluation"))


def work(argv: list[str], die: int | None, path: Path) -> None:
    import torch

    import main

    torch.set_num_threads(1)
    watch(Moments(path, die))
    code = 70
    try:
        main.command(argv)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main_program(plan: Path, result: Path) -> None:
    import main  # noqa: F401 (before the forks; nothing has been computed yet, which would start threads)

    found = []
    for job in json.loads(plan.read_text()):
        moments = result.with_suffix(".moments")
        if (pid := os.fork()) == 0:
            work(job["argv"], job["die"], moments)
        _, status = os.waitpid(pid, 0)
        found.append({"status": status, "moments": moments.read_text().splitlines()})
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main_program(Path(sys.argv[1]), Path(sys.argv[2]))
