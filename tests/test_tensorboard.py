"""TensorBoard's files: what a run goes on without, and has once after a kill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, environment, killed, train
from record_helpers import points

from record import files
from record.metrics import read_metrics
from record.runlog import RunLog

pytestmark = pytest.mark.usefixtures("in_this_process")


def full_disk(log: RunLog) -> None:
    log.tensorboard._events._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115


@pytest.mark.parametrize("use", ["flush", "points", "histogram"])
def test_a_run_goes_on_without_tensorboard_and_says_so_once(
    tmp_path: Path, use: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path) as log:
        log.log((0, 1), {"a": 1.0}, at=1)
        full_disk(log)
        for step in range(2000):
            if use == "histogram":
                log.tensorboard.add_histogram("h", np.arange(101.0), np.ones(100, int), step)
            elif use == "points" or step < 3:
                log.log((0, step), {"a": 1.0}, at=step)
        for _ in range(2):
            log.flush()
    said = capsys.readouterr().err
    sentence = "cannot be written (No space left on device); the run goes on without TensorBoard."
    assert said == f"{tmp_path / 'tensorboard'} {sentence}\n"
    assert read_metrics(tmp_path)


def test_a_tensorboard_folder_that_cannot_be_made_stops_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with RunLog(tmp_path) as log:
        log.log((0, 1), {"a": 1.0}, at=1)
    assert "the run goes on without TensorBoard." in capsys.readouterr().err


def test_points_that_a_checkpoint_covers_outlive_a_kill(tmp_path: Path) -> None:
    code = f"""import os
from record.runlog import RunLog
log = RunLog(Path({str(tmp_path)!r}))
for step in range(5):
    log.log((0, step), {{"a": 1.0}}, at=step)
log.flush()
log.log((0, 5), {{"a": 1.0}}, at=5)
os.kill(os.getpid(), 9)"""
    code = f"from pathlib import Path\n{code}"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment()).returncode == -9
    assert points(tmp_path) == {"a": [(step, 1.0) for step in range(5)]}


@pytest.mark.parametrize("step", [2, 5, 7])
def test_a_run_killed_and_started_again_has_every_point_once(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(tmp_path / "straight")
    killed(monkeypatch, tmp_path / "run", step)
    train(tmp_path / "run", "--resume", "auto")
    assert points(tmp_path / "run") == points(straight)


def test_a_checkpoint_is_saved_after_the_points_it_covers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    flush, write = RunLog.flush, files.os.replace
    monkeypatch.setattr(RunLog, "flush", lambda log: (order.append("points"), flush(log)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append(Path(b).name), write(a, b)))
    train(tmp_path / "run", "--epochs", "1", "--save-every", "2")
    saved = [name for name in order if name != "manifest.json" and not name.startswith("resolved")]
    assert saved == ["points", "last.pt", "points", "last.pt", "points", "last.pt", "best.pt"]
