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
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from config import UserError
from record.files import open_ordinary
from record.schema import MetricsLine, check

METRICS = "metrics.log"
_EVALUATED = re.compile("(ema_)?(loss|top1|top5)")  # what an evaluation gives, of all figures under its tag


VOID = ("resumed.epoch", "resumed.step")  # what a line names where a run went back: all beyond it is void
LARGEST = 2**30  # bytes


def _open_following_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


class _JsonLines:
    """dllogger's Logger with its JSONStreamBackend, for where dllogger is not installed: the same calls and bytes."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "a", opener=_open_following_no_link)  # noqa: SIM115 - closed by the run log
        self.start = datetime.now()

    def log(self, step: Any, data: Mapping[str, Any], verbosity: int = 0) -> None:
        now = datetime.now()
        times = {"timestamp": now.timestamp(), "datetime": now, "elapsedtime": (now - self.start).total_seconds()}
        record = {**{name: str(time) for name, time in times.items()}, "type": "LOG", "step": step, "data": data}
        self.file.write(f"DLLL {json.dumps(record)}\n")

    def flush(self) -> None:
        self.file.flush()


def open_metrics(path: Path) -> tuple[Any, Any]:
    """(logger, its file), appending; dllogger's where it is installed and knows how to append."""
    if path.exists() and path.stat().st_size:
        with open(
            path, "rb+", opener=_open_following_no_link
        ) as file:  # a line torn by a kill must not swallow the first line of this session
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

    Lines of one step are joined; where a killed run replayed a step, the later value wins. Torn lines are left out, and
    so is what lies beyond the point to which a run has gone back. Raises UserError if there is no metrics.log, or for a
    line that is not of the form schema.MetricsLine.
    """
    path = Path(output_dir) / METRICS
    try:
        with open_ordinary(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST:
                raise UserError(f"{path} is larger than {LARGEST} bytes and was not read; move it away.")
            lines = file.read().split(b"\n")
    except OSError as error:
        raise UserError(f"There are no metrics at {path} ({error.strerror}); give the directory of a run.") from None
    steps: dict[tuple[int, ...], dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.removeprefix(b"DLLL "))
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and record.get("type") == "METADATA":  # dllogger's, on units
            continue
        check(MetricsLine, record, f"Line {number} of {path} is no line of metrics")
        if record["step"] == "PARAMETER":
            if all(name in record["data"] for name in VOID):
                steps = {step: data for step, data in steps.items() if not is_void(step, _resumed(record["data"]))}
        else:
            steps.setdefault(tuple(record["step"]), {}).update(record["data"])
    # A summary follows the lines it sums up: (0, 50) before (0,), and () comes last.
    return [{"step": step, "data": steps[step]} for step in sorted(steps, key=lambda step: (*step, math.inf))]


def _resumed(data: Mapping[str, int]) -> tuple[int, int]:
    epoch, step = (data[name] for name in VOID)
    return epoch, step


def is_void(step: tuple[int, ...], resumed: tuple[int, int]) -> bool:
    """Whether a line of this step is beyond `resumed`: (epochs done, steps done in the epoch after them)."""
    return (*step, math.inf) > (*resumed, math.inf)


def missing_final(output_dir: Path, epochs: int) -> dict[str, Any] | None:
    """The figures of the last evaluation of a run of so many epochs whose final line is not in its metrics.

    None where it is, or where the metrics do not have that evaluation.
    """
    if not (output_dir / METRICS).is_file():
        return None
    data = {line["step"]: line["data"] for line in read_metrics(output_dir)}
    if data.get((), {}).get("final.epochs") == epochs:
        return None
    found = {name.removeprefix("eval."): value for name, value in data.get((epochs - 1,), {}).items()}
    return {name: value for name, value in found.items() if _EVALUATED.fullmatch(name)} or None


def finished_epochs(output_dir: Path, *, required: bool = True) -> dict[int, dict[str, Any]]:
    """The figures of every epoch that has been evaluated, by its number from 1.

    Raises UserError where there are no metrics and they are `required`.
    """
    if not required and not (output_dir / METRICS).is_file():
        return {}
    summaries = (line for line in read_metrics(output_dir) if len(line["step"]) == 1)
    return {line["step"][0] + 1: line["data"] for line in summaries if "eval.top1" in line["data"]}
