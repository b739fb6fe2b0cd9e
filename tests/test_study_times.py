"""What a study says of time: how long runs take, which are begun in the time left, and lines of progress."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from study_helpers import leave_epochs, write_study

from studies.conduct import Conduct, Durations, Places, say, spoken
from studies.grid import read_study
from studies.pool import Pool


def conduct_of(tmp_path: Path, jobs: int = 1, limit_s: float | None = None, **changes: Any) -> Conduct:
    """A study of four runs of three epochs, none of them begun."""
    tmp_path.mkdir(exist_ok=True)
    study = read_study(write_study(tmp_path, **changes))
    made = Conduct(Places.of(study, tmp_path / "runs", tmp_path), study.runs(), Pool(jobs), [], limit_s)
    made.waiting.extend(study.runs())
    return made


def test_a_run_is_begun_where_the_time_left_is_enough(tmp_path: Path) -> None:
    made = conduct_of(tmp_path, limit_s=60.0)
    first = made.waiting[0]
    assert made._in_time(first)  # nothing is known yet
    made.earlier.known.append((made.waiting[1], 9.0))
    for left, enough in ((10.0, True), (8.0, False)):
        made.deadline = time.monotonic() + left
        assert made._in_time(first) == enough
    leave_epochs(made.places.folder(first), 1)
    assert made._in_time(first)  # 6 s are left of it
    # One that no session of this length could hold goes on in each, or it would never be done.
    made = conduct_of(tmp_path / "short", limit_s=8.0)
    made.earlier.known.append((made.waiting[1], 9.0))
    made.deadline = time.monotonic() + 2
    assert made._in_time(made.waiting[0])


def test_what_is_left_is_that_of_runs_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = conduct_of(tmp_path, jobs=2)
    assert made.eta() is None
    made.earlier.known.append((made.waiting[0], 10.0))
    assert made.eta() == 20.0  # four runs, two at a time
    made.waiting.pop()
    assert made.eta() == 20.0  # the third begins when one of the first two has ended
    running = made.waiting.popleft()
    monkeypatch.setattr(Pool, "running", property(lambda _: {running.name: 3.0}))
    made.begun[running.name] = 0.0
    assert made.eta() == pytest.approx(17.0)  # 7 s of the first, then one of the others
    made.begun[running.name] = 0.5
    assert made.eta() == pytest.approx(12.0)  # 2 s of the first
    made.waiting.clear()
    assert made.eta() == pytest.approx(2.0)
    made.durations.known.append((running, 20.0))  # of this session: nearer
    assert made.eta() == pytest.approx(7.0)


def test_durations_are_those_of_the_nearest_runs(tmp_path: Path) -> None:
    values = {"small": {"set": {"optim": {"lr": 0.1}}}, "large": {}}
    runs = {run.name: run for run in read_study(write_study(tmp_path, values=values, seeds=[0, 1])).runs()}
    durations = Durations()
    wanted = runs["tetrajet-small-seed1"]
    assert durations.expected(wanted) is None
    durations.known += [(runs["full_precision-large-seed0"], 100.0)]
    assert durations.expected(wanted) == 100.0
    durations.known += [(runs["full_precision-small-seed0"], 20.0)]
    assert durations.expected(wanted) == 20.0
    durations.known += [(runs["tetrajet-small-seed0"], 30.0), (runs["tetrajet-small-seed0"], 40.0)]
    assert durations.expected(wanted) == 35.0


def test_times_are_spoken() -> None:
    assert [spoken(s) for s in (3.4, 119.0, 121.0, 7300.0)] == ["3 s", "119 s", "2 min", "2.0 h"]


def test_a_reader_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    monkeypatch.setattr(sys, "stdout", os.fdopen(theirs, "w"))
    broken = sys.stdout
    say("one")
    say("two")
    assert sys.stdout is not broken
    sys.stdout.close()
    with pytest.raises(BrokenPipeError):  # the control
        broken.close()
    say("three", error=True)
    assert capfd.readouterr().err == "three\n"
