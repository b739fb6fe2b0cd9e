"""Functions in two processes of one group: the environment is torchrun's, without its seconds of start.

Processes are forked off one that has imported the program, once for all tests; with GPUs, whose drivers bear no fork,
each is started anew.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path

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


def _enter(work: Callable[[Path], None], folder: Path, rank: int, port: int) -> None:
    output = os.open(folder / f"output{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    work(folder)
    sys.stdout.flush()


def run_in_two(work: Callable[[Path], None], folder: Path, seconds: float = 400) -> None:
    """Call work(folder) in both and wait for them. An end with another exit code than 0, or none within `seconds`,
    fails, with what they wrote. `work` is a function of a module.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = _context()
    with pytest.MonkeyPatch.context() as patch:  # for the process that they are forked off
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS.parent / "benchmarks")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        processes = [context.Process(target=_enter, args=(work, folder, rank, port)) for rank in (0, 1)]
        for process in processes:
            process.start()
    end = time.monotonic() + seconds
    try:
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            assert time.monotonic() < end, f"no end within {seconds} s"
            processes[0].join(0.02) if processes[0].is_alive() else processes[1].join(0.02)
        outputs = [(folder / f"output{rank}.txt").read_text(errors="replace")[-5000:] for rank in (0, 1)]
        assert [p.exitcode for p in processes] == [0, 0], "\n".join(outputs)
    finally:
        for process in processes:
            process.kill()
            process.join()
