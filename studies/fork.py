"""A program in a copy of this process, which has imported beforehand what the program imports: a run of a study is
spared those seconds, and is what it is in a process of its own.

    imported = warm_up(main)                               # once
    if can_fork() and imported == on_disk(imported):
        child = fork([str(main), "--config", ...], log)    # as `python main.py --config ...`; poll, terminate, wait

A copy has one thread, which is why this process may have no other, and none of CUDA, which does not survive in one. It
has the code of the time when that was imported, and a run says of which commit and versions it is by what lies on disk:
where that has changed since, no copy is made.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

from studies.leash import tie

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_TASKS, _OPEN = Path("/proc/self/task"), Path("/proc/self/fd")  # of Linux


class Forked:
    """A child of this process, as subprocess has them."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        return self._wait(0)

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


Files = dict[str, tuple[int, int] | None]  # when each was written, in ns, and its bytes; None where it is gone


def warm_up(program: Path) -> Files:
    """Import what a program imports; its part for `__main__` is not run. Returns the files that it came from."""
    runpy.run_path(str(program), run_name="imported")
    files = (getattr(module, "__file__", None) for module in [*sys.modules.values()])
    return on_disk([str(program), *(file for file in files if isinstance(file, str))])


def on_disk(files: Iterable[str]) -> Files:
    """What the files are now."""
    found: Files = dict.fromkeys(files)
    for file in found:
        with contextlib.suppress(OSError):
            status = os.stat(file)
            found[file] = status.st_mtime_ns, status.st_size
    return found


def can_fork() -> bool:
    """Whether a copy of this process is fit to run a program: it has one thread and does not use a GPU's driver. The
    driver's library alone, which some builds of torch load as they are imported, does no harm."""
    if sys.platform != "linux":
        return False
    try:
        return len([*_TASKS.iterdir()]) == 1 and not any(map(_of_a_gpu, [*_OPEN.iterdir()]))
    except OSError:
        return False


def _of_a_gpu(opened: Path) -> bool:
    with contextlib.suppress(OSError):  # closed by now, such as that of the listing
        return os.readlink(opened).startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri"))
    return False


def fork(words: Sequence[str], log: BinaryIO, environment: Mapping[str, str]) -> Forked:
    """Run a Python program and its arguments in a copy of this process, in a session of its own; what it writes goes to
    `log`. It ends with this process, by SIGTERM. Raises OSError where there can be no further process."""
    starter = os.getpid()
    _flush()  # or the copy would write it too
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the copy has handlers of its own
    try:
        pid = os.fork()
    finally:
        if os.getpid() == starter:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if pid:
        return Forked(pid)
    try:
        _become(words, log.fileno(), environment, starter, mask)
    finally:
        os._exit(1)


def _become(
    words: Sequence[str], log: int, environment: Mapping[str, str], starter: int, mask: set[signal.Signals]
) -> NoReturn:
    """The copy leaves behind what is of the process that it is a copy of, and ends as a program does."""
    os.setsid()
    for number, handler in zip(_SIGNALS, (signal.SIG_DFL, signal.default_int_handler), strict=True):
        signal.signal(number, handler)
    tie(starter)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # locks among them
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.orig_argv = [*words], [sys.executable, *words]
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    code = _run(words[0])
    threading._shutdown()
    atexit._run_exitfuncs()
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
            stream.flush()


def _run(program: str) -> int:
    """The exit code of a program, run as `python PROGRAM`."""
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
