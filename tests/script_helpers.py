"""For the tests of the shell scripts: where they are, how they are started, and a Python that stands in for another."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
TORCHRUN = ["-m", "torch.distributed.run"]

# A Python that answers what study.py is asked and records every other command line, one word a line.
STUB = """\
case "$1" in */study.py) exec "$REAL_PYTHON" "$@" ;; esac
printf "%s\\n" "$@" > "$RECORD"
exit "${STATUS:-0}"
"""


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}")
    path.chmod(0o755)
    return path


def clean_env(**extra: str | Path) -> dict[str, str]:
    """The environment without anything that run.sh and setup.sh read."""
    ours = (
        r"(PYTHON|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX|NPROC|NNODES|NODE_RANK|MASTER_\w+|DATA_PATH|OUTPUT_DIR|RUNS_DIR"
    )
    ours += r"|SLURM_\w+|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS)"
    env = {k: v for k, v in os.environ.items() if not re.fullmatch(ours, k)}
    return env | {k: str(v) for k, v in extra.items()}


def bash(script: Path, *args: str | Path, env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(script), *map(str, args)], env=env, cwd=cwd, capture_output=True, text=True, timeout=60
    )
