"""metrics.log: dllogger's lines, written at once and read back bit for bit."""

from __future__ import annotations

import json
import math
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

from config import UserError
from record.metrics import read_metrics
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


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


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
