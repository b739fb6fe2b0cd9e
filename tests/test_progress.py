"""Progress of an epoch and running means."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from record_helpers import small_vit, training_state

from record import progress as progress_module
from record.checkpoint import load_checkpoint, save_checkpoint
from record.progress import Meter, Progress
from record.runlog import RunLog


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: self.now)


def test_progress_prints_plain_lines_with_the_time_left_for_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with RunLog(tmp_path) as log:
        # Resumed in the middle of the third epoch of five; 10 s a step, and 100 s of evaluation after each epoch.
        for epoch, first in ((2, 5), (3, 0)):
            with log.progress(f"epoch {epoch + 1}/5", 5, epoch, first, 10) as progress:
                for _ in range(first, 10):
                    clock.now += 10
                    assert progress.update(64, loss=torch.tensor(0.5), lr=1e-3) == pytest.approx(6.4)
            clock.now += 100
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "epoch 3/5 8/10: 6.4 img/s, loss 0.5, lr 0.001, run ETA 03:40"  # 22 steps, no evaluation yet
    # Half an epoch and 3 steps took 50 + 100 + 30 s, so the 1.7 epochs left take 180 / 0.8 * 1.7 s.
    assert printed[1] == "epoch 4/5 3/10: 6.4 img/s, loss 0.5, lr 0.001, run ETA 06:22"
    assert len(printed) == 4  # one every 30 s of training, none for what is left over


def test_progress_reads_tensors_only_when_it_shows_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, reads = Clock(monkeypatch), []

    class OnDevice:
        def item(self) -> float:
            reads.append(1)
            return 2.0

    progress = Progress("test", None, 0, 0, 100)
    for _ in range(60):
        clock.now += 1
        progress.update(1, loss=OnDevice())
    assert len(reads) == 2 and "ETA" not in capsys.readouterr().err


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("epoch 1/1", 1, 0, 0, 4) as progress:
        for _ in range(4):
            progress.update(8, loss=0.25)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "epoch 1/1: 100%" in last and "4/4" in last and "loss 0.25" in last


def test_meter_is_restored_bit_for_bit(tmp_path: Path) -> None:
    meter, control = Meter(), Meter()
    values = [0.1 * i + 1e-9 / (i + 1) for i in range(100)]
    for i, value in enumerate(values):
        control.add("loss", value, 3)
        meter.add("loss", torch.tensor(value, dtype=torch.float64), 3)
        if i == 50:
            state = {**training_state(small_vit()), "step": 153, "steps_per_epoch": 200}
            save_checkpoint(tmp_path / "last.pt", {**state, "meter": meter.state_dict()})
            meter = Meter()
            meter.load_state_dict(load_checkpoint(tmp_path / "last.pt")["meter"])
    assert meter.mean("loss") == control.mean("loss") == sum(values) / 300
    meter.add("empty", 0.0, 0)
    assert math.isnan(meter.mean("empty"))
    with pytest.raises(KeyError):
        meter.mean("never added")
