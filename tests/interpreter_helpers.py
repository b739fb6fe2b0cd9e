"""Test files that run again in a process of their own, in which Triton interprets its kernels."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

Process = tuple[subprocess.Popen[bytes], IO[bytes]]


def interpreting(file: str) -> Process:
    """A test file in a process with the interpreter, and what it says."""
    output = tempfile.TemporaryFile()  # noqa: SIM115
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.Popen(command, cwd=Path(file).parent.parent, env=env, stdout=output, stderr=subprocess.STDOUT)
    atexit.register(process.kill)
    return process, output


def assert_passed(begun: Process) -> None:
    process, output = begun
    code = process.wait(600)
    output.seek(0)
    said = output.read().decode()
    assert code == 0 and " passed" in said, said[-7000:]
