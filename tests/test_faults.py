"""A run that is killed at any moment, within a write too, and started again ends as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fault_helpers import WRITES
from helpers import METHODS, differences, environment, outcome, tiny
from stabilizer_helpers import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PROBES = ["--probes", "--probes.steps", "2"]
RUNS = {
    "full precision": ["--quant.scheme", "none"],
    "tetrajet": PROBES,
    "microscaling": ["--quant.scale_rule", "floor", "--quant.backward_operands", "original"],
    **METHODS,
}


def flags_of(method: str) -> list[str]:
    return [*SMALL, *RUNS[method], "--save-every", "3", "--resume", "auto"]


def work_through(folder: Path, plan: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, str(Path(__file__).with_name("fault_helpers.py"))]
    there = environment()
    there["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parent}"
    done = subprocess.run(
        [*command, str(folder / "plan.json"), str(folder / "result.json")],
        env=there, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [{**result, "stderr": done.stderr} for result in json.loads((folder / "result.json").read_text())]


def points(folder: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's scalars by tag and step, without times and rates."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith(("seconds", "_per_s"))]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def recordings(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "probes").glob("epoch_*.npz"))


def chosen(moments: list[str], count: int) -> list[int]:
    """`count` moments spread over a run, half of them within writes."""
    within = [number for number, name in enumerate(moments) if name in WRITES]
    between = [number for number, name in enumerate(moments) if name not in WRITES]
    half = -(-count // 2)
    assert len(within) >= half and len(within) + len(between) >= count, (len(within), len(between))
    spread = [within[k * len(within) // half] for k in range(half)]
    others = [*between, *(number for number in within if number not in spread)][: max(count - half, len(between))]
    return sorted({*spread, *(others[k * len(others) // (count - half)] for k in range(count - half))})


def check(method: str, count: int, folder: Path) -> None:
    straight = folder / "straight"
    (whole,) = work_through(folder, [{"argv": tiny(straight, *flags_of(method)), "die": None}])
    assert whole["status"] == 0, whole["stderr"]
    expected, drawn, held = outcome(straight), points(straight), recordings(straight)
    assert drawn and bool(held) == (method == "tetrajet")
    moments = chosen(whole["moments"], count)
    assert len(moments) >= count
    starts = [
        {"argv": tiny(folder / str(number), *flags_of(method)), "die": die}
        for number in moments
        for die in (number, None)
    ]
    results = work_through(folder, starts)
    for number, killed, resumed in zip(moments, results[::2], results[1::2], strict=True):
        where = f"moment {number}: {whole['moments'][number]}"
        assert os.WIFSIGNALED(killed["status"]) and os.WTERMSIG(killed["status"]) == signal.SIGKILL, where
        assert killed["moments"][-1] == whole["moments"][number], where
        assert resumed["status"] == 0, (where, resumed["stderr"])
        run = folder / str(number)
        assert differences(expected, outcome(run)) == [], where
        assert points(run) == drawn, where
        assert recordings(run) == held, where
        assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp")], where


def test_a_run_killed_anywhere_ends_as_one_that_was_not(tmp_path: Path) -> None:
    check("qema", 8, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_every_method_killed_at_sixty_moments_ends_as_one_that_was_not(method: str, tmp_path: Path) -> None:
    check(method, 60, tmp_path)
