"""The run directory: what is refused and kept in it, configurations over restarts, TensorBoard."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from config import UserError
from record.runlog import RunLog


def contents(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


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
