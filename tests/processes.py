"""Functions in processes of their own, also in two of one group, without the seconds that a start takes.

Processes are forked off one that has imported the program, once for all tests; with GPUs, whose drivers bear no fork,
each is started anew.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).resolve().parent


@functools.cache
def _context() -> BaseContext:
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers"])
    return context


def _enter(work: Callable[..., object], args: tuple[Any, ...], output: Path, environment: dict[str, str]) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    torch.set_num_threads(1)
    work(*args)


def start(work: Callable[..., object], *args: Any, output: Path, **environment: str) -> BaseProcess:
    """A process that calls work(*args), a function of a module, and writes what it says into the file `output`."""
    path = [TESTS.parent, TESTS, TESTS.parent / "benchmarks"]
    with pytest.MonkeyPatch.context() as patch:  # for the process that it is forked off
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, path)))
        patch.setenv("OMP_NUM_THREADS", "1")
        process = _context().Process(target=_enter, args=(work, args, output, environment))
        process.start()
    return process


def run_in_two(work: Callable[[Path], object], folder: Path, seconds: float = 400) -> None:
    """Call work(folder) in two processes of one group and wait for them. An end with another exit code than 0, or none
    within `seconds`, fails, with what they wrote.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    outputs = [folder / f"output{rank}.txt" for rank in (0, 1)]
    processes = [
        start(work, folder, output=output, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank, output in enumerate(outputs)
    ]
    end = time.monotonic() + seconds
    try:
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            assert time.monotonic() < end, f"no end within {seconds} s"
            wait([p.sentinel for p in processes if p.is_alive()], timeout=1)
        said = "\n".join(output.read_text(errors="replace")[-5000:] for output in outputs)
        assert [p.exitcode for p in processes] == [0, 0], said
    finally:
        for process in processes:
            process.kill()
            process.join()
