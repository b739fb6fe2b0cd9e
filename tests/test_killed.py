"""A run killed at any moment of its writing, and started again, ends as if nothing had happened.

The run is a forked process that kills itself outright (SIGKILL) at its nth moment: before and after every rename and
sync, in the middle of a checkpoint, in the middle of a line of metrics, around TensorBoard's flushes.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FULL, METHODS, differences, exit_code, outcome, tiny, train
from record_helpers import points

from record import checkpoint, files
from record.metrics import METRICS
from record.runlog import RunLog

pytestmark = pytest.mark.usefixtures("in_this_process")

SMALL = [
    "--resume",
    "auto",
    "--data.num_images",
    "32",
    "--model.kwargs",
    "{embed_dim: 32, depth: 1, num_heads: 2}",
    "--save-every",
    "1",
]
RUNS = {"tetrajet": FULL, **{name: [*FULL, *flags] for name, flags in METHODS.items()}}
RUNS["probed"] = [*FULL, "--probes"]


class Moments:
    """Counts the moments of a process, and kills it at number `last`."""

    def __init__(self, last: int) -> None:
        self.last, self.count = last, 0

    def passed(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **more: Any) -> Any:
            self.passed()
            result = call(*arguments, **more)
            self.passed()
            return result

        return called

    def save(self, state: Any, file: Any) -> None:
        """torch.save in two halves."""
        whole = io.BytesIO()
        SAVE(state, whole)
        data = whole.getvalue()
        file.write(data[: len(data) // 2])
        file.flush()
        self.passed()
        file.write(data[len(data) // 2 :])

    def line(self, log: RunLog, step: Any, data: Any) -> None:
        """A line of metrics, of which half is in the file when the process is killed."""
        if self.count + 1 == self.last:
            with (log.output_dir / METRICS).open("a") as file:
                file.write('DLLL {"timestamp": "1.0", "type": "LOG", "step": [0')
        self.passed()
        WRITE(log, step, data)
        self.passed()


SAVE, WRITE = torch.save, RunLog._write


def killed_at(moment: int, folder: Path, *flags: str) -> int:
    """The moments that a run in a process of its own has lived; it is killed at number `moment` if it has so many."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            moments = Moments(moment)
            checkpoint.torch.save = moments.save
            files.os.replace, files.os.fsync = moments.around(os.replace), moments.around(os.fsync)
            RunLog._write = lambda log, step, data: moments.line(log, step, data)
            RunLog.flush = moments.around(RunLog.flush)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = exit_code(tiny(folder, *flags))
            os.write(writer, str(moments.count).encode() if code == 0 else b"0")
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        lived = pipe.read()
    _, status = os.waitpid(child, 0)
    assert bool(lived) != (os.waitstatus_to_exitcode(status) == -signal.SIGKILL)
    return int(lived or moment)


def seen(folder: Path) -> dict[str, Any]:
    """All that two equal runs share. A point of the very step that a run goes on from may be drawn twice, alike."""
    drawn = {tag: list(dict.fromkeys(p)) for tag, p in points(folder).items()}
    return {**outcome(folder), "points": drawn, "files": sorted(p.name for p in folder.iterdir())}


def check_kills(method: str, tmp_path: Path, at_least: int) -> None:
    flags = [*SMALL, *RUNS[method]]
    total = killed_at(0, tmp_path / "straight", *flags)
    assert total >= 60
    straight = seen(tmp_path / "straight")
    every = max(1, total // at_least)
    for moment in range(1, total + 1, every):
        folder = tmp_path / f"run_{moment}"
        killed_at(moment, folder, *flags)
        train(folder, *flags)
        assert differences(straight, seen(folder)) == [], moment


@pytest.mark.parametrize("method", ["tetrajet"])
def test_a_run_killed_at_a_few_moments_ends_the_same(method: str, tmp_path: Path) -> None:
    check_kills(method, tmp_path, 6)


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_a_run_killed_at_any_moment_ends_the_same(method: str, tmp_path: Path) -> None:
    check_kills(method, tmp_path, 60)
