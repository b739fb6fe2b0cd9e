"""metrics.log, written and read: what a run measured.

    read_metrics(output_dir)   # [{"step": (0, 50), "data": {"train.loss": 6.9, "train.lr": 0.001}}, ...]

metrics.log has the lines of NVIDIA's dllogger, written by dllogger where it is installed: "DLLL " and one JSON object,
whose step is [epoch, iteration] in training, [epoch] for an epoch's summary, [] for the run's and "PARAMETER" for
hyper-parameters. Floats read back bit for bit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from config import UserError

METRICS = "metrics.log"


class _JsonLines:
    """dllogger's Logger with its JSONStreamBackend, for where dllogger is not installed: the same calls and bytes."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")
        self.start = datetime.now()

    def _write(self, order: str, **fields: Any) -> None:
        now = datetime.now()
        times = {"timestamp": now.timestamp(), "datetime": now, "elapsedtime": (now - self.start).total_seconds()}
        record = {name: str(times[name]) for name in order.split()} | fields
        self.file.write(f"DLLL {json.dumps(record)}\n")

    def log(self, step: Any, data: Mapping[str, Any], verbosity: int = 0) -> None:
        self._write("timestamp datetime elapsedtime", type="LOG", step=step, data=data)

    def flush(self) -> None:
        self.file.flush()


def open_metrics(path: Path) -> tuple[Any, Any]:
    """(logger, its file), appending; dllogger's where it is installed and knows how to append."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:  # a line torn by a kill must not swallow the first line of this session
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    try:
        import dllogger

        backend = dllogger.JSONStreamBackend(dllogger.Verbosity.DEFAULT, str(path), append=True)
        return dllogger.Logger(backends=[backend]), backend.file
    except (ImportError, TypeError):  # not installed, or a release from before `append`, which would empty the file
        lines = _JsonLines(path)
        return lines, lines.file


def plain(value: Any) -> Any:
    """Tensors and NumPy scalars of one element as Python numbers, which JSON knows."""
    return value.item() if hasattr(value, "item") else value


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run in its order: [{"step": (epoch, iteration) | (epoch,) | (), "data": {"tag.name": value}}].

    Lines of one step are joined; where a killed run replayed a step, the later value wins. Torn lines are left out.
    Raises UserError if there is no metrics.log.
    """
    path = Path(output_dir) / METRICS
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"There are no metrics at {path} ({error.strerror}); give the directory of a run.") from None
    steps: dict[tuple[int, ...], dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line.removeprefix(b"DLLL "))
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("type") == "LOG" and isinstance(record.get("step"), list):
            steps.setdefault(tuple(record["step"]), {}).update(record["data"])
    # A summary follows the lines it sums up: (0, 50) before (0,), and () comes last.
    return [{"step": step, "data": steps[step]} for step in sorted(steps, key=lambda step: (*step, math.inf))]
