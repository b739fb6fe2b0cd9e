"""The loader's worker processes: what they outlive, what ends them, and what is said when one has died."""

from __future__ import annotations

import atexit
import contextlib
import errno
import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import os
import re
import select
import signal
import sys
import threading
import weakref
from collections.abc import Iterator

from config import UserError

NICENESS = 5  # of workers beside the main process: there are as many as cores, and a late launch leaves a GPU idle
CUT_OFF = ConnectionError, EOFError  # in the midst of a batch that a worker was sending
_OPEN_FILES = "Too many open files"
_SHARED_MEMORY = re.compile(r"out of shared memory|shared memory object|</torch_|Bus error")


class Leash:
    """What worker processes hang on: they end at once when their process closes it or ends, in whatever way.

    Ctrl-C and a scheduler's SIGTERM reach every process of a group, and the main process may need its workers until it
    has saved; so they ignore both. `multiprocessing` sends SIGTERM at the end of a program and then waits for ever: by
    then the leash has been closed.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._close = weakref.finalize(self, _close, self._read, self._write, os.getpid())

    def hold(self, worker_id: int) -> None:
        """Runs at the start of a worker: the `worker_init_fn` of a loader."""
        os.close(self._write)
        with contextlib.suppress(OSError):  # where a system forbids it
            os.nice(NICENESS)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.excepthook = lambda *_: None  # of threads whose connection the main process has dropped
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_cannot_send)
        threading.Thread(target=_end_with, args=(self._read,), daemon=True).start()

    def started(self) -> None:
        """A loader has just started its workers.

        At the end of the program the leash is then closed before anything else is done that has been registered so far:
        torch registers, for each worker of a loader that pins memory, to wait 5 s for it.
        """
        self._processes = multiprocessing.active_children()
        atexit.unregister(self._close)
        atexit.register(self._close)

    def exit_code(self, wait: float = 0.0) -> int | None:
        """That of a worker which has failed, as `multiprocessing` has it: negative for a signal; None if none has.

        wait: seconds to wait for the end of one.
        """
        with contextlib.suppress(RuntimeError):  # torch's own report on it, which comes a moment late
            ended = multiprocessing.connection.wait([process.sentinel for process in self._processes], wait)
            for process in self._processes:
                process.join(wait if process.sentinel in ended else 0)
        return next((process.exitcode for process in self._processes if process.exitcode), None)

    def close(self) -> None:
        """End all workers."""
        self._close()
        atexit.unregister(self._close)


def _close(read: int, write: int, pid: int) -> None:
    if os.getpid() != pid:  # a copy in a forked process
        return
    os.write(write, b".")  # besides closing it: processes that were forked since have it open too
    os.close(write)
    os.close(read)


def _end_with(read: int) -> None:
    """Wait for a byte or for the end of the pipe, and take nothing out of it: all workers look at the same one."""
    poll = select.poll()
    poll.register(read, select.POLLIN)
    poll.poll()
    os._exit(0)


def _cannot_send(error: Exception, _batch: object) -> None:
    """In place of dropping the batch, for which the main process would wait for ever."""
    text = f"{error}"
    if _OPEN_FILES in text:
        os._exit(errno.EMFILE)
    os._exit(errno.ENOSPC if _SHARED_MEMORY.search(text) or os.strerror(errno.ENOSPC) in text else 1)


@contextlib.contextmanager
def told(leash: Leash | None) -> Iterator[None]:
    """While batches are waited for: what is about the worker processes becomes a UserError, one sentence of it."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        exit_code = leash and leash.exit_code(wait=5.0 if isinstance(error, CUT_OFF) else 0.0)
        said = failure_of_workers(error, loading=leash is not None, exit_code=exit_code)
        if said is None:
            raise
        raise UserError(said) from None


def failure_of_workers(error: BaseException, *, loading: bool = False, exit_code: int | None = None) -> str | None:
    """What to tell the user where `error` is about the worker processes; None where it is about something else.

    loading: it was raised while a batch was waited for. Torch also raises in the midst of whatever else the main
    process does when a worker dies. exit_code: a worker's, where torch does not say what it was.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) and not (loading and isinstance(error, (OSError, EOFError))):
        return None
    if exit_code is not None and ("exited unexpectedly" in text or isinstance(error, CUT_OFF)):
        how = f"killed by signal: {signal.strsignal(-exit_code)}" if exit_code < 0 else f"with exit code {exit_code}"
        text = f"DataLoader worker (pid) exited unexpectedly {how}"
    code = re.search(r"exited unexpectedly.* with exit code (\d+)", text)
    number = int(code[1]) if code else getattr(error, "errno", None)
    if number == errno.EMFILE or _OPEN_FILES in text or "items of ancdata" in text:
        return (
            "The loader processes have no open files left (too many open files): raise the limit with ulimit -n, or "
            "lower data.num_workers (--num_workers)."
        )
    if number == errno.ENOSPC or _SHARED_MEMORY.search(text):
        return (
            "The loader processes have no shared memory left: /dev/shm is full or too small. Give a Docker container, "
            "which has 64 MB, more by --shm-size=8g or --ipc=host; or lower data.num_workers (--num_workers) or "
            "data.batch_size."
        )
    if isinstance(error, (OSError, EOFError)) and exit_code is None and not text.startswith("Caught "):
        return f"The loader processes cannot be started or reached ({error}): lower data.num_workers (--num_workers)."
    if not re.search(r"DataLoader worker \(pid", text):
        return None
    killed = re.search(r"killed by signal: ([\w ]+)", text)
    if killed is None:
        return "A loader process has ended without a word: set data.num_workers=0 (--num_workers 0) to see why."
    how = killed[1].strip()
    if how not in map(signal.strsignal, (signal.SIGKILL, signal.SIGBUS)):
        return f"A loader process was ended by a signal ({how}): set data.num_workers=0 (--num_workers 0) to see why."
    return (
        f"A loader process was ended by the system ({how}), most likely for want of memory: lower data.num_workers "
        "(--num_workers) or give the program more."
    )
