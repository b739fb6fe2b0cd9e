"""Kills runs of main.py at chosen moments, for test_faults.py."""

from __future__ import annotations

import functools
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import replace
from processes import start

import engine
import main
from record.runlog import RunLog

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


def run_watched(argv: list[str], die: int | None, path: Path) -> None:
    watch(Moments(path, die))
    main.command(argv)


def run_until(argv: list[str], die: int | None, folder: Path) -> tuple[int, list[str], str]:
    """A run in a process of its own that dies at moment `die`, or does not: its exit code, the names of the moments
    that it met, and what it wrote."""
    moments, output = folder / "moments.txt", folder / "output.txt"
    process = start(run_watched, argv, die, moments, output=output)
    process.join(300)
    process.kill()
    process.join()
    return process.exitcode, moments.read_text().splitlines(), output.read_text()
