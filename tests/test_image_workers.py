"""images/workers.py: every end of a program with loader processes is an end, with an exit code and one sentence.

Run as a script, it forks a process for each way to end and reports how they ended; see `ends`.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from data_helpers import make_data, user_error_of
from helpers import before_step, environment, exit_code, tiny

import engine
from config import UserError
from datasets import Data
from images import pipeline, resident
from images.workers import NICENESS, failure_of_workers

PATIENCE = 60.0  # seconds for a process to end; it takes one or two, and those that waited for ever still wait


def begin(**kwargs: int) -> tuple[Data, object]:
    """Loader processes in the midst of an epoch."""
    data = make_data("data.num_workers=2", "data.num_images=64", **kwargs)
    batches = data.train_batches(0)
    next(batches)
    return data, batches


def raise_unexpectedly() -> None:
    kept = begin()
    raise LookupError(f"nobody expects this with {len(kept)} things alive")


def leave_with_a_code() -> None:
    begin()
    sys.exit(3)


def leave_evaluation() -> None:
    data, kept = begin()
    evaluation = data.eval_batches()
    next(evaluation)
    raise LookupError(f"in evaluation, with {kept} and {evaluation}")


def raise_in_a_worker() -> None:
    data = make_data("data.num_workers=2")

    def fail(image):
        raise LookupError("in a loader process")

    data.train_loader.dataset._transform = fail
    list(data.train_batches(0))


def lose_a_worker(number: int, wait: bool) -> None:
    """A worker is killed while the program waits for a batch, or does something else."""
    _, batches = begin()
    os.kill(multiprocessing.active_children()[0].pid, number)
    if wait:
        list(batches)
    time.sleep(PATIENCE / 2)


def run_out_of_files() -> None:
    """In a worker, between reading images and sending them."""
    data = make_data("data.num_workers=1")
    transform = data.train_loader.dataset._transform

    def limited(image):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1,) * 2)
        return transform(image)

    data.train_loader.dataset._transform = limited
    list(data.train_batches(0))


def keep(count: int) -> Data:
    """A set that is decoded once, by loader processes that are needed for nothing else."""
    return make_data("data.num_workers=2", f"data.num_images={count}", "data.pipeline=gpu", "data.resident=0.5")


def keep_with_few_files() -> None:
    """However many parts a set comes in."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 24,) * 2)
    sys.exit(keep(3000).pipeline["training"]["kept"]["images"] != 3000)


def lose_a_worker_that_decodes() -> None:
    def decode(decoding, place):
        if torch.utils.data.get_worker_info() is not None and place >= 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(decoding, place)

    read, resident._Decoding.__getitem__ = resident._Decoding.__getitem__, decode
    keep(40)


def keep_too_much() -> None:
    """Images that only turn out to be large while they are decoded."""
    resident.mean_bytes, resident._PART = (lambda *_: 1.0), 8
    memory, pipeline.available_bytes = pipeline.available_bytes, lambda: 60_000
    data = keep(3000)
    pipeline.available_bytes = memory
    next(data.train_batches(0))
    sys.exit("kept" in data.pipeline["training"] or data.leash.exit_code() is not None)


def outlive_signals() -> None:
    """A signal to the whole group, several times, and an epoch that goes on."""
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    _, batches = begin()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        os.killpg(0, number)
        time.sleep(0.1)
    if len(list(batches)) != 7 or len(multiprocessing.active_children()) != 2:
        sys.exit(1)


def close_the_data() -> None:
    data, _ = begin()
    data.close()
    for child in multiprocessing.active_children():
        child.join(PATIENCE / 2)
    sys.exit(len(multiprocessing.active_children()))


def die() -> None:
    """The program itself is killed: its workers must not be left over."""
    kept = begin()
    print(*(child.pid for child in multiprocessing.active_children()), len(kept), file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


ENDS: dict[str, Callable[[], None]] = {
    "exception": raise_unexpectedly,
    "exit": leave_with_a_code,
    "exception in evaluation": leave_evaluation,
    "exception in a worker": raise_in_a_worker,
    "worker killed, batch awaited": lambda: lose_a_worker(signal.SIGKILL, wait=True),
    "worker killed, elsewhere": lambda: lose_a_worker(signal.SIGKILL, wait=False),
    "worker without shared memory": lambda: lose_a_worker(signal.SIGBUS, wait=True),
    "worker without open files": run_out_of_files,
    "few open files": keep_with_few_files,
    "worker killed, set decoded": lose_a_worker_that_decodes,
    "a set too large": keep_too_much,
    "signals to the group": outlive_signals,
    "closed": close_the_data,
    "killed": die,
}


def work(folder: Path) -> None:
    """Fork a process for each end, that ends as a program does; report on them."""
    pids, report = {}, {}
    for name, end in ENDS.items():
        pids[name] = os.fork()
        if not pids[name]:
            os.dup2(os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT), 2)
            _end(end)
    deadline = time.monotonic() + PATIENCE
    for name, pid in pids.items():
        while not (done := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.05)
        if not done[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        status = os.waitstatus_to_exitcode(done[1]) if done[0] else "never ended"
        report[name] = status, (folder / f"{name}.txt").read_text()
    (folder / "report.json").write_text(json.dumps(report))


def _end(end: Callable[[], None]) -> NoReturn:
    """Run `end` as main.py would, then all that runs at the end of a program, but for the slow clearing of modules."""
    code, kept = 0, None
    try:
        end()
    except SystemExit as error:
        code, kept = error.code, error
    except Exception as error:
        kept = error  # with the frames it has come through, as the interpreter keeps it
        said = str(error) if isinstance(error, UserError) else failure_of_workers(error)
        code = 1 if said is None else 2
        print("".join(traceback.format_exception(error)) if said is None else f"error: {said}", file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code if kept is not None else 0)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int | str, str]]:
    """(exit code, stderr) of each end."""
    folder = tmp_path_factory.mktemp("ends")
    subprocess.run([sys.executable, __file__, str(folder)], env=environment(), check=True, timeout=900)
    return json.loads((folder / "report.json").read_text())


MEMORY = "error: A loader process was ended by the system (Killed), most likely for want of memory: lower data.num_wor"


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("exception", 1, "LookupError: nobody expects this"),
        ("exit", 3, ""),
        ("exception in evaluation", 1, "LookupError: in evaluation"),
        ("exception in a worker", 1, "LookupError: Caught LookupError in DataLoader worker process 0"),
        ("worker killed, batch awaited", 2, MEMORY),
        ("worker killed, elsewhere", 2, MEMORY),
        ("worker without shared memory", 2, "error: The loader processes have no shared memory left: /dev/shm is full"),
        (
            "worker without open files",
            2,
            "error: The loader processes have no open files left (too many",
        ),
        ("few open files", 0, ""),
        ("worker killed, set decoded", 2, MEMORY),
        ("a set too large", 0, ""),
        ("signals to the group", 0, ""),
        ("closed", 0, ""),
    ],
)
def test_every_end_is_an_end(ends, name, code, said):
    found, stderr = ends[name]
    assert found == code, stderr
    assert (said in stderr) if said else not stderr
    if code == 2:
        assert stderr.count("error:") == 1 and "Traceback" not in stderr


def test_workers_do_not_outlive_a_killed_program(ends):
    code, stderr = ends["killed"]
    assert code == -signal.SIGKILL
    pids, deadline = [int(word) for word in stderr.split()[:2]], time.monotonic() + PATIENCE

    def alive() -> list[int]:
        found = []
        for pid in pids:
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                found += [pid] if state != "Z" else []
        return found

    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_worker_ends_a_run_with_one_sentence(tmp_path, monkeypatch, capsys, step):
    def kill(run) -> None:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(PATIENCE / 2)  # until torch's handler of SIGCHLD raises, wherever the program may be

    monkeypatch.setattr(engine, "train_step", before_step(step, kill))
    assert exit_code(tiny(tmp_path / "run", "--num_workers", "1")) == 2
    stderr = capsys.readouterr().err
    assert MEMORY in stderr and "Traceback" not in stderr


# --- What torch says --------------------------------------------------------------------------------------------------

SHM = "unable to allocate shared memory(shm) for file </torch_12_34_5>: Resource temporarily unavailable (11)"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "was ended by the system (Killed)"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), "no shared memory left"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. "),
            "was ended by a signal (Segmentation fault): set data.num_workers=0",
        ),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "has ended without a word"),
        (RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details are"), "without a word"),
        (RuntimeError(f"DataLoader worker (pid 7) exited unexpectedly with exit code {errno.ENOSPC}."), "/dev/shm"),
        (RuntimeError(f"DataLoader worker (pid 7) exited unexpectedly with exit code {errno.EMFILE}."), "ulimit -n"),
        (RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\nTraceback:\n{SHM}"), "--shm-size"),
        (RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"), "--shm-size"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "ulimit -n"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENOSPC, "No space left on device"), "/dev/shm"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "cannot be started or reached"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be started or reached"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_reports_on_workers_become_sentences(error, said):
    sentence = failure_of_workers(error, loading=True)
    assert said in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("error", "loading"),
    [
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), True),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nin a transform"), True),
        (LookupError("DataLoader worker (pid 7)"), True),
        (OSError("Caught OSError in DataLoader worker process 0.\nin a transform"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),  # of a checkpoint, say
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_errors_are_left_alone(error, loading):
    assert failure_of_workers(error, loading=loading) is None


def test_workers_that_cannot_be_started_are_one_sentence(monkeypatch):
    def fail(self) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", fail)
    message = user_error_of(make_data("data.num_workers=1").train_batches(0))
    assert message.startswith("The loader processes cannot be started or reached ([Errno 11] Resource temporarily")


def test_workers_leave_the_processor_to_the_program_that_they_work_for():
    data, _ = begin()
    mine, theirs = (os.getpriority(os.PRIO_PROCESS, p.pid if p else 0) for p in (None, *data.leash._processes[:1]))
    data.close()
    assert theirs == min(19, mine + NICENESS) > mine or mine == 19


if __name__ == "__main__":
    work(Path(sys.argv[1]))
