"""The run directory: dllogger's lines, TensorBoard, manifest and configuration over restarts, progress, meters."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT

from config import UserError, load_config
from record import manifest as manifest_module
from record import progress as progress_module
from record.checkpoint import load_checkpoint, save_checkpoint
from record.manifest import git_state, manifest
from record.metrics import read_metrics
from record.progress import Meter, Progress
from record.runlog import RunLog

LOG_LINE = re.compile(
    r'DLLL \{"timestamp": "\d+\.\d+", "datetime": "\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{6})?", '
    r'"elapsedtime": "\d+\.\d+(e-\d+)?", "type": "LOG", "step": (\[\d*(, \d+)*\]|"PARAMETER"), "data": \{.*\}\}'
)


class FakeDllogger(types.ModuleType):
    """The part of dllogger's interface the run log uses, with its defaults: truncating files, verbosity 1."""

    class Verbosity:
        DEFAULT = 0

    class JSONStreamBackend:
        def __init__(self, verbosity: int, filename: str, append: bool = False) -> None:
            self.verbosity, self.file = verbosity, open(filename, "a" if append else "w")  # noqa: SIM115

    class Logger:
        def __init__(self, backends: list[Any]) -> None:
            self.backends = backends

        def log(self, step: Any, data: dict[str, Any], verbosity: int = 1) -> None:
            record = json.dumps({"type": "LOG", "step": step, "data": data, "by": "dllogger"})
            for backend in self.backends:
                if backend.verbosity >= verbosity:
                    backend.file.write(f"DLLL {record}\n")

        def flush(self) -> None:
            for backend in self.backends:
                backend.file.flush()


@pytest.fixture(autouse=True)
def _without_dllogger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dllogger", None)  # an import of it fails


@pytest.fixture
def dllogger(monkeypatch: pytest.MonkeyPatch, _without_dllogger: None) -> Iterator[FakeDllogger]:
    module = FakeDllogger("dllogger")
    monkeypatch.setitem(sys.modules, "dllogger", module)
    yield module


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.log").read_text().splitlines()


def contents(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


# Metrics --------------------------------------------------------------------------------------------------------------


def test_lines_have_dlloggers_format(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log("PARAMETER", {"lr": 0.001, "model": "deit_tiny"})
        log.log((0, 50), {"loss": 6.9, "lr": 1e-6}, tag="train", at=50)
        log.log((0,), {"top1": 1.5}, tag="val", at=100)
        log.log((), {"top1": 1.5}, tag="val")
    written = lines(tmp_path)
    assert len(written) == 4 and all(LOG_LINE.fullmatch(line) for line in written)
    assert not LOG_LINE.fullmatch(written[0].replace('"type"', '"kind"'))
    records = [json.loads(line.removeprefix("DLLL ")) for line in written]
    assert [r["step"] for r in records] == ["PARAMETER", [0, 50], [0], []]
    assert records[0]["data"] == {"lr": 0.001, "model": "deit_tiny"}
    assert records[1]["data"] == {"train.loss": 6.9, "train.lr": 1e-6}
    # Hyper-parameters are no metrics; summaries follow what they sum up.
    assert read_metrics(tmp_path) == [
        {"step": (0, 50), "data": {"train.loss": 6.9, "train.lr": 1e-6}},
        {"step": (0,), "data": {"val.top1": 1.5}},
        {"step": (), "data": {"val.top1": 1.5}},
    ]


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    random = [struct.unpack("<d", struct.pack("<q", x))[0] for x in torch.randint(-(2**62), 2**62, (300,)).tolist()]
    values = [0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, math.nan, math.inf, -math.inf, *random]
    with RunLog(tmp_path) as log:
        log.log((0,), {str(i): value for i, value in enumerate(values)})
    data = read_metrics(tmp_path)[0]["data"]
    for i, value in enumerate(values):
        assert math.isnan(data[str(i)]) if math.isnan(value) else bits(data[str(i)]) == bits(value)


def test_tensors_and_numpy_scalars_are_numbers(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log((0,), {"a": torch.tensor(0.1), "b": np.float32(0.5), "c": np.int64(3), "d": True, "e": "text"}, tag="t")
    assert read_metrics(tmp_path)[0]["data"] == {
        "t.a": torch.tensor(0.1).item(), "t.b": 0.5, "t.c": 3, "t.d": True, "t.e": "text"
    }  # fmt: skip


def test_every_line_is_on_its_way_at_once(tmp_path: Path) -> None:
    """A process that is killed outright has lost no line."""
    code = "import os; from pathlib import Path; from record.runlog import RunLog\n"
    code += f"log = RunLog(Path({str(tmp_path)!r})); log.log((0,), {{'x': 1.5}}); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert read_metrics(tmp_path) == [{"step": (0,), "data": {"x": 1.5}}]


def test_a_resumed_run_appends_and_its_lines_win(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in (10, 20, 30):
            log.log((0, step), {"loss": float(step), "gone": 1}, tag="train", at=step)
        log.log((0,), {"loss": 1.0}, tag="val")
    first = (tmp_path / "metrics.log").read_bytes()
    with RunLog(tmp_path, resume=True, purge_step=20) as log:
        for step in (20, 30, 40):
            log.log((0, step), {"loss": -float(step)}, tag="train", at=step)
        log.log((0,), {"loss": 2.0}, tag="train")
    assert (tmp_path / "metrics.log").read_bytes().startswith(first)
    read = read_metrics(tmp_path)
    assert [r["step"] for r in read] == [(0, 10), (0, 20), (0, 30), (0, 40), (0,)]
    assert [r["data"]["train.loss"] for r in read] == [10.0, -20.0, -30.0, -40.0, 2.0]
    assert read[-1]["data"]["val.loss"] == 1.0  # another tag of the same step stays


@pytest.mark.parametrize("cut", [1, 2, 10, 60, 120])
def test_a_torn_line_is_left_out_and_swallows_nothing(tmp_path: Path, cut: int) -> None:
    with RunLog(tmp_path) as log:
        log.log((0,), {"a": 1})
        log.log((1,), {"a": 2})
    path = tmp_path / "metrics.log"
    path.write_bytes(path.read_bytes()[:-cut])
    whole = cut == 1  # only the newline is missing
    expected = [{"step": (0,), "data": {"a": 1}}, *([{"step": (1,), "data": {"a": 2}}] if whole else [])]
    assert read_metrics(tmp_path) == expected
    with RunLog(tmp_path, resume=True) as log:
        log.log((2,), {"a": 3})
    assert read_metrics(tmp_path) == [*expected, {"step": (2,), "data": {"a": 3}}]


def test_read_metrics_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There are no metrics at"):
        read_metrics(tmp_path)


def test_a_training_line_needs_its_place(tmp_path: Path) -> None:
    for enabled in (True, False):
        log = RunLog(tmp_path / str(enabled), enabled=enabled)
        with pytest.raises(ValueError, match="needs `at`"):
            log.log((0, 1), {"loss": 1.0}, tag="train")
        log.close()


def test_a_full_disk_is_reported_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path)
    log._file.close()
    log._file = log._logger.file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics\.log cannot be written .*--resume auto\.$"):
        log.log((0,), {"a": 1})
    log.close()


def test_dllogger_is_used_where_it_is_installed(tmp_path: Path, dllogger: FakeDllogger) -> None:
    for resume in (False, True):
        with RunLog(tmp_path, resume=resume) as log:
            log.log((int(resume),), {"a": 1.5}, tag="val")
            assert len(lines(tmp_path)) == 1 + resume  # flushed
    assert len(lines(tmp_path)) == 2 and all('"by": "dllogger"' in line for line in lines(tmp_path))
    assert [r["step"] for r in read_metrics(tmp_path)] == [(0,), (1,)]


def test_a_dllogger_that_would_empty_the_file_is_not_used(
    tmp_path: Path, dllogger: FakeDllogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Old(FakeDllogger.JSONStreamBackend):
        def __init__(self, verbosity: int, filename: str) -> None:
            super().__init__(verbosity, filename)

    monkeypatch.setattr(dllogger, "JSONStreamBackend", Old, raising=False)
    with RunLog(tmp_path) as log:
        log.log((0,), {"a": 1})
    with RunLog(tmp_path, resume=True) as log:
        log.log((1,), {"a": 1})
    assert len(read_metrics(tmp_path)) == 2 and all(LOG_LINE.fullmatch(line) for line in lines(tmp_path))


# The directory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last.pt", "manifest.json", "metrics.log"])
def test_a_directory_that_holds_a_run_is_refused_untouched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    (tmp_path / "resolved.yaml").write_text("precious: 2")
    before, times = contents(tmp_path), os.stat(tmp_path).st_mtime_ns
    with pytest.raises(UserError) as caught:
        RunLog(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} already holds a run; pass --resume auto to continue it or choose another --output_dir."
    )
    assert contents(tmp_path) == before and os.stat(tmp_path).st_mtime_ns == times


def test_other_files_do_not_make_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunLog(tmp_path).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_directories_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"cannot be written .*choose another --output_dir\.$"):
            RunLog(path)
    (tmp_path / "run" / "manifest.json").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written"):
        RunLog(tmp_path / "run", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("[1]")
    with pytest.raises(UserError, match="is not a JSON object; move it away"):
        RunLog(tmp_path / "other", resume=True)


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "last.pt").write_text("of a run")  # and are not the ones to refuse it
    before = contents(tmp_path)
    with RunLog(tmp_path, enabled=False) as log:
        log.write_config("a: 1")
        log.write_manifest({"a": 1})
        log.log("PARAMETER", {"a": 1})
        log.log((0,), {"a": 1}, tag="val")
        with log.progress("epoch 1/1", 1, 0, 0, 2) as progress:
            progress.every = 0.0
            assert progress.update(8) > 0
        assert log.tensorboard is None
    assert contents(tmp_path) == before
    assert capsys.readouterr() == ("", "")


def test_no_configuration_is_lost(tmp_path: Path) -> None:
    texts = ["a: 1\n", "a: 2\n", "a: 1\n", "a: 3\n", "a: 2\n", "a: 3\n"]
    names = [
        "resolved.yaml",
        "resolved.1.yaml",
        "resolved.yaml",
        "resolved.2.yaml",
        "resolved.1.yaml",
        "resolved.2.yaml",
    ]
    for i, (text, name) in enumerate(zip(texts, names, strict=True)):
        with RunLog(tmp_path, resume=i > 0) as log:
            assert log.write_config(text) == tmp_path / name
            log.write_manifest({"start_time": str(i)})
    assert {p.name: p.read_text() for p in tmp_path.glob("*.yaml")} == {
        "resolved.yaml": "a: 1\n", "resolved.1.yaml": "a: 2\n", "resolved.2.yaml": "a: 3\n"
    }  # fmt: skip
    sessions = json.loads((tmp_path / "manifest.json").read_text())["sessions"]
    assert [s["config"] for s in sessions] == names


def small_manifest(**changes: Any) -> dict[str, Any]:
    arguments = {
        "device": "cpu",
        "world_size": 1,
        "seed": 7,
        "patches": [{"name": "drop_path", "timm": "1.0.29"}],
        "quantizers": {"blocks.0.attn.qkv": {f"q{i}": "e2m1" for i in range(1, 6)} | {"q6": None}},
        "extra": {"parameters": 123},
    }
    return manifest(load_config(overrides=["run.seed=7"]), **{**arguments, **changes})


def test_manifest_says_what_was_run(tmp_path: Path) -> None:
    made = small_manifest()
    with RunLog(tmp_path) as log:
        log.write_manifest(made)
        log.write_manifest(made)  # writing again updates this start, and adds none
    read = json.loads((tmp_path / "manifest.json").read_text())
    sessions = read.pop("sessions")
    assert read == json.loads(json.dumps(made))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", read["start_time"])
    assert read["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(read["versions"]) == {
        "python", "torch", "torchvision", "timm", "triton", "numpy", "tensorboardX", "cuda"
    }  # fmt: skip
    assert read["parameters"] == 123 and read["seed"] == 7 and read["world_size"] == 1
    assert read["quantizers"]["blocks.0.attn.qkv"] == {**{f"q{i}": "e2m1" for i in range(1, 6)}, "q6": None}
    assert read["timm_patches"] == [{"name": "drop_path", "timm": "1.0.29"}]
    assert read["command_line"] and read["device"]["type"] == "cpu" and read["device"]["name"]
    assert len(sessions) == 1 and sessions[0]["command_line"] == read["command_line"]
    assert {"start_time", "command_line", "git", "versions", "world_size"} <= set(sessions[0])


def test_manifest_keeps_every_start(tmp_path: Path) -> None:
    tables = [{"a": {"q1": "e2m1"}}, {"a": {"q1": "e2m1"}}, {"a": {"q1": "e3m0"}}]
    for i, table in enumerate(tables):
        with RunLog(tmp_path, resume=i > 0) as log:
            for _ in range(2):
                log.write_manifest({**small_manifest(quantizers=table, world_size=i + 1), "start_time": f"start {i}"})
    read = json.loads((tmp_path / "manifest.json").read_text())
    assert [s["start_time"] for s in read["sessions"]] == ["start 0", "start 1", "start 2"]
    assert [s["world_size"] for s in read["sessions"]] == [1, 2, 3]
    # The third start changed the quantizers: the second one's are with it, the third one's at the top.
    assert [s.get("quantizers") for s in read["sessions"]] == [None, tables[1], None]
    assert read["quantizers"] == tables[2]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_git_commit_and_dirty_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "__file__", str(tmp_path / "record" / "manifest.py"))
    nothing = {"commit": None, "dirty": None}
    assert git_state() == nothing  # not a repository
    git(tmp_path, "init", "-q")
    assert git_state() == nothing  # no commit yet
    (tmp_path / "a.py").write_text("a")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "a")
    (tmp_path / "untracked.txt").write_text("a")
    assert git_state() == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a.py").write_text("b")
    assert git_state() == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": True}
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(manifest_module, "__file__", str(tmp_path / "inside" / "record" / "manifest.py"))
    assert git_state() == nothing  # somebody else's repository
    monkeypatch.setattr(manifest_module, "__file__", str(tmp_path / "record" / "manifest.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() == nothing  # no git


# TensorBoard ----------------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_the_numbers(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        assert log.tensorboard is not None
        for step in (10, 20, 30):
            log.log((0, step), {"loss": step / 2, "phase": "warm-up"}, tag="train", at=step)
        log.log((4,), {"top1": 1.5}, tag="val")
        log.log((), {"top1": 1.5}, tag="run")
    assert scalars(tmp_path) == {"train/loss": [(10, 5.0), (20, 10.0), (30, 15.0)], "val/top1": [(4, 1.5)]}


def test_tensorboard_drops_what_a_killed_run_drew_beyond_its_checkpoint(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in (10, 20, 30):
            log.log((0, step), {"loss": 1.0}, tag="train", at=step)
    with RunLog(tmp_path, resume=True, purge_step=20) as log:  # within a second: the file names must still differ
        for step in (30, 40):
            log.log((0, step), {"loss": 2.0}, tag="train", at=step)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert scalars(tmp_path) == {"train/loss": [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]}


# Progress and meters --------------------------------------------------------------------------------------------------


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
            save_checkpoint(tmp_path / "last.pt", {"model": {}, "optimizer": {}, "meter": meter.state_dict()})
            meter = Meter()
            meter.load_state_dict(load_checkpoint(tmp_path / "last.pt")["meter"])
    assert bits(meter.mean("loss")) == bits(control.mean("loss")) == bits(sum(values) / 300)
    meter.add("empty", 0.0, 0)
    assert math.isnan(meter.mean("empty"))
    with pytest.raises(KeyError):
        meter.mean("never added")
