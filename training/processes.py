"""The processes of a run: how many there are, their group, and how all of them end when one does.

A failure is said once. Under torchrun the processes share torchrun's own store, which outlives each of them: the first
one that fails leaves its exit code there, and the errors of communication that follow in the others are not worth
a word. On each machine torchrun ends a process that goes on waiting.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

import torch
import torch.distributed as dist

from config import UserError
from config.explain import one_line, out_of_reach
from images.workers import failure_of_workers
from training.compilers import failure_of_compilers
from training.ends import TrainingError

_FIRST_SPEAKS_WITHIN = datetime.timedelta(seconds=5)
_KNOWN_WITHIN = 30.0  # seconds


def environment_number(name: str, default: int) -> int:
    """A number that a launcher left in the environment. Raises UserError."""
    text = os.environ.get(name, "")
    if text.strip() and not text.strip().isdecimal():
        raise UserError(f"{name} is {text!r} in the environment; a launcher sets it to a number, or unset it.")
    return int(text) if text.strip() else default


def say(text: str) -> None:
    """Print to stdout, at once; characters that it cannot have, of file names say, as escapes. Raises UserError where
    nobody takes it: a pipe that was closed, a full disk."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, flush=True)
    except OSError as error:
        raise UserError(
            f"What this program prints cannot be written ({error.strerror}); a run's checkpoints are in its folder: go "
            "on with --resume auto."
        ) from None


class Processes:
    """This process among those of the run; one of one until `look_around`."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1
        self._store: dist.Store | None = None

    def look_around(self) -> None:
        """Take over what the launcher's environment says. Raises UserError."""
        self.rank, self.world_size = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
        environment_number("LOCAL_RANK", 0)
        if not environment_number("LOCAL_WORLD_SIZE", 1):
            raise UserError("LOCAL_WORLD_SIZE is 0 in the environment; it counts the processes of a node, or unset it.")
        if not self.rank < self.world_size:
            raise UserError(
                f"RANK is {self.rank} and WORLD_SIZE {self.world_size} in the environment; ranks count from 0 and are "
                "smaller than the size."
            )
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
        if self.world_size > 1 and address and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            try:
                _wait_for_name(address)
                store = dist.PrefixStore("main.py", dist.TCPStore(address, int(port), is_master=False))
            except (dist.DistError, OSError, ValueError) as error:
                raise self._cannot_meet(error) from None
            number = store.add(f"runs of process {self.rank}", 1)  # a process may have several, one after the other
            self._store = dist.PrefixStore(f"run {number}", store)

    @contextlib.contextmanager
    def group(self, device: torch.device) -> Iterator[None]:
        """The process group. A process that fails leaves it as it is: taking leave might wait for the others."""
        if self.world_size == 1:
            yield
            return
        try:
            _wait_for_name(os.environ.get("MASTER_ADDR"))
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError, socket.gaierror) as error:
            raise self._cannot_meet(error) from None
        try:
            yield
        except SystemExit:  # all of them end so; torchrun ends the others when the first has ended
            dist.barrier()
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()

    def _cannot_meet(self, error: Exception) -> UserError:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return UserError(
            f"The {self.world_size} processes of WORLD_SIZE cannot meet at {place} ({str(error).splitlines()[0]}); "
            "start them with torchrun."
        )

    def end_failed(self, error: Exception) -> NoReturn:
        """End with the exit code of a failure, said once and by one process. Raises SystemExit."""
        code, said = _sentence(error)
        with contextlib.suppress(dist.DistError):  # without the store each speaks for itself
            if self._store is not None and (first := self._first_code(self._store, code)) is not None:
                code, said = first, ""
        with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
            print(said, end="", file=sys.stderr)
        raise SystemExit(code) from None

    def _first_code(self, store: dist.Store, code: int) -> int | None:
        """The exit code of the process that failed first; None where it is this one. Where all meet the same mistake,
        process 0 is given the time to be the first."""
        if self.rank:
            with contextlib.suppress(dist.DistError):
                store.wait(["exit code"], _FIRST_SPEAKS_WITHIN)
        if store.add("failures", 1) > 1:
            return int(store.get("exit code"))
        store.set("exit code", str(code))
        return None


def _wait_for_name(address: str | None) -> None:
    """Wait for the name of a machine to be known, which in a cluster takes a while. Raises socket.gaierror if it is not
    in _KNOWN_WITHIN seconds, where torch would ask for half an hour."""
    until = time.monotonic() + _KNOWN_WITHIN
    while address:
        try:
            socket.getaddrinfo(address, None)
            return
        except socket.gaierror:
            if time.monotonic() > until:
                raise
        time.sleep(1)


def _sentence(error: Exception) -> tuple[int, str]:
    """The exit code of a failure, and what to say: a sentence or, where nobody has foreseen it, a traceback."""
    if isinstance(error, UserError):
        return 2, f"error: {one_line(error)}\n"
    if isinstance(error, TrainingError):
        return 1, f"error: {one_line(error)}\n"
    if isinstance(error, torch.OutOfMemoryError):
        reason = str(error).split(". ")[0]
        return 2, (
            f"error: The device has too little memory ({reason}); choose a smaller --batch-size, or --no-cuda-graphs, "
            "which leaves evaluation the memory of training.\n"
        )
    if (said := out_of_reach(error)) is not None:
        return 2, f"error: {one_line(said)}\n"
    if isinstance(error, RuntimeError) and (said := failure_of_workers(error)) is not None:
        return 2, f"error: {said}\n"
    if (said := failure_of_compilers(error)) is not None:
        return 2, f"error: {said}\n"
    return 1, "".join(traceback.format_exception(error))


def leave(code: int) -> NoReturn:
    """End this process now. After a failure the interpreter's own way out may wait for ever: for loader processes that
    do not listen, for a communicator with work outstanding, for a thread that writes."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for every one of them
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
