"""What a finished epoch of a run is: one rule for tables, curves and what is still to be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from record.metrics import METRICS, read_metrics


def finished_epochs(output_dir: Path, *, required: bool = True) -> dict[int, dict[str, Any]]:
    """The figures of every epoch that has been evaluated, by its number from 1.

    Raises UserError where there are no metrics and they are `required`.
    """
    if not required and not (output_dir / METRICS).is_file():
        return {}
    summaries = (line for line in read_metrics(output_dir) if len(line["step"]) == 1)
    return {line["step"][0] + 1: line["data"] for line in summaries if "eval.top1" in line["data"]}
