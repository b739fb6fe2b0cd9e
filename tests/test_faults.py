"""A run that is killed at any moment, within a write too, and started again ends as one that was not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from fault_helpers import WRITES, run_until
from helpers import METHODS, differences, outcome, tiny
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
    found = sorted({*spread, *(others[k * len(others) // (count - half)] for k in range(count - half))})
    assert len(found) >= count
    return found


def check(method: str, count: int, folder: Path) -> None:
    straight = folder / "straight"
    code, met, said = run_until(tiny(straight, *flags_of(method)), None, folder)
    assert code == 0, said
    expected, drawn, held = outcome(straight), points(straight), recordings(straight)
    assert drawn and bool(held) == (method == "tetrajet")
    for number in chosen(met, count):
        run, where = folder / str(number), f"moment {number}: {met[number]}"
        code, moments, _ = run_until(tiny(run, *flags_of(method)), number, folder)
        assert (code, moments) == (-signal.SIGKILL, met[: number + 1]), where
        code, _, said = run_until(tiny(run, *flags_of(method)), None, folder)
        assert code == 0, (where, said)
        assert differences(expected, outcome(run)) == [], where
        assert points(run) == drawn, where
        assert recordings(run) == held, where
        assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp")], where


def test_a_run_killed_anywhere_ends_as_one_that_was_not(tmp_path: Path) -> None:
    check("qema", 4, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_every_method_killed_at_sixty_moments_ends_as_one_that_was_not(method: str, tmp_path: Path) -> None:
    check(method, 60, tmp_path)
