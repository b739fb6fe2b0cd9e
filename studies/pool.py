"""Several runs at a time: a process each, in a group of its own, spread over the GPUs; none outlives the pool.

with Pool(jobs=3, gpus=visible_gpus()) as pool:
    pool.start("tetrajet-seed0", [sys.executable, "main.py", ...], log)
    for ended in pool.ended(): ...
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from config import UserError
from studies.fork import Files, Forked, can_fork, fork, on_disk, warm_up

LEASH = Path(__file__).with_name("leash.py")


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code (negative for a signal), its seconds and the last sentence it wrote."""

    name: str
    code: int
    seconds: float
    said: str


@dataclass
class _Child:
    process: subprocess.Popen | Forked
    slot: int
    log: Path
    written: int  # bytes of the log before it
    began: float = field(default_factory=time.monotonic)

    def said(self) -> str:
        """The error that it ended with, or else its last line."""
        try:
            with self.log.open("rb") as file:
                file.seek(self.written)
                lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError as error:
            return f"what it said cannot be read ({error.strerror or error})"
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it said nothing"])[-1]


class Pool(contextlib.AbstractContextManager):
    """Up to `jobs` processes. At the end of its block those that are left are killed.

    gpus: what CUDA_VISIBLE_DEVICES may name. Where there are several, each process sees one of them, in turn.
    """

    def __init__(self, jobs: int, gpus: Sequence[str] = ()) -> None:
        self.jobs, self.gpus = jobs, gpus
        self._warm: Path | None = None
        self._imported: Files = {}
        self._children: dict[str, _Child] = {}

    @property
    def running(self) -> dict[str, float]:
        """The seconds that each process has been running, by its name."""
        return {name: time.monotonic() - child.began for name, child in self._children.items()}

    @property
    def full(self) -> bool:
        return len(self._children) >= self.jobs

    def warm_up(self, program: Path) -> None:
        """Import what a Python program needs, for it to begin at once in a copy of this process. Where there can be
        none, as in a process of several threads or after a file has changed, it is started anew."""
        if can_fork():
            self._warm, self._imported = program, warm_up(program)

    def start(self, name: str, command: Sequence[str], log: Path) -> None:
        """Start a program; what it writes is added to the file `log`. Raises UserError where it cannot be started."""
        slot = min({*range(self.jobs)} - {child.slot for child in self._children.values()})
        environment = {"OMP_NUM_THREADS": str(threads(self.jobs)), **os.environ}
        if len(self.gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                written = file.tell()
                process = self._begin(command, file, environment)
        except OSError as error:
            raise UserError(f"{name} cannot be started ({error.strerror or error}: {error.filename}).") from None
        self._children[name] = _Child(process, slot, log, written)

    def _begin(self, command: Sequence[str], log: BinaryIO, environment: dict[str, str]) -> subprocess.Popen | Forked:
        warm = [*command[:2]] == [sys.executable, str(self._warm)]
        if warm and can_fork() and on_disk(self._imported) == self._imported:
            return fork(command[1:], log, environment)
        return subprocess.Popen(
            [sys.executable, str(LEASH), str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the study alone, which tells its runs
        )

    def ended(self) -> list[Ended]:
        """The processes that have ended since the last call."""
        found = []
        for name, child in [*self._children.items()]:
            code = child.process.poll()
            if code is not None:
                del self._children[name]
                found.append(Ended(name, code, time.monotonic() - child.began, child.said()))
        return found

    def stop(self) -> None:
        """Ask all processes to save their state and to end."""
        for child in self._children.values():
            child.process.terminate()

    def kill(self) -> None:
        """End all processes, and what they have started, at once."""
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
            if child.process.poll() is None:  # a copy may not be in its own session yet
                os.kill(child.process.pid, signal.SIGKILL)

    def __exit__(self, *_: object) -> None:
        self.kill()
        for child in self._children.values():
            child.process.wait()
        self._children.clear()


class Signals(contextlib.AbstractContextManager):
    """Remembers SIGTERM or SIGINT inside its block, `heard`; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.heard = 0
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Signals:
        self._handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.heard:
            raise KeyboardInterrupt
        self.heard = number


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(jobs: int) -> int:
    """A process's share of the cores."""
    return max(1, cores() // jobs)


def share_cores(jobs: int) -> None:
    """Let what is imported from now on take its share of the cores in this process, as it would in those of a pool.

    numpy's own threads are left out: a process that has them is not copied, and runs have no work for them. They are
    read when numpy and torch are loaded, so there is nothing to do where that has happened.
    """
    if "numpy" not in sys.modules:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads(jobs)))
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def visible_gpus() -> list[str]:
    """The GPUs that runs may be given, as CUDA_VISIBLE_DEVICES names them; none where there are none."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]
