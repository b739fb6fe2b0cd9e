"""The folder of a run: held by one process, written without links, gone back in, mended after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ROOT,
    before_step,
    column,
    differences,
    environment,
    exit_code,
    killed,
    metrics,
    outcome,
    tiny,
    train,
)
from quick import some
from record_helpers import refused

import engine
import main
from config import dump_config, load_config
from engine import Run
from record import files
from record.checkpoint import load_checkpoint, save_checkpoint
from record.files import LOCK, FolderLock, atomic_write
from record.metrics import finished_epochs, read_metrics
from record.recordings import write_recording
from record.runlog import RunLog, check_new, mend_best
from training.ends import TrainingError

pytestmark = pytest.mark.usefixtures("in_this_process")


# One process at a time ------------------------------------------------------------------------------------------------


def in_a_process(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"from pathlib import Path\n{code}"],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes into tmp_path/run, with a child of its own as loader workers are."""
    (tmp_path / "run").mkdir()
    code = f"""import os, time
from record.files import FolderLock
lock = FolderLock(Path({str(tmp_path / "run")!r}))
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)"""
    process = in_a_process(code)
    child = int(process.stdout.readline())
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        os.kill(child, signal.SIGKILL)


def test_a_second_process_is_refused_until_the_first_is_gone(
    holder: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    sentence = (
        f"{folder} is the folder of a run in progress, written by process {holder.pid} on {os.uname().nodename}; wait "
        "until it has ended, or choose another --output_dir."
    )
    for resume in (False, True):
        assert refused(lambda resume=resume: RunLog(folder, resume=resume)) == sentence
    assert os.listdir(folder) == [".lock"]
    assert exit_code(tiny(folder, "--resume", "auto")) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
    RunLog(folder, enabled=False).close()  # other ranks do not ask for it
    holder.kill()
    holder.wait()
    RunLog(folder, resume=True).close()  # although a child of it still holds the lock
    assert ".lock" not in os.listdir(folder)


def test_a_folder_is_free_again_when_its_run_is_closed(tmp_path: Path) -> None:
    first = RunLog(tmp_path)
    assert f"process {os.getpid()} on" in refused(lambda: RunLog(tmp_path, resume=True))
    first.close()
    first.close()
    with RunLog(tmp_path, resume=True):
        pass
    assert ".lock" not in os.listdir(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    refused(lambda: RunLog(tmp_path, resume=True))
    FolderLock(tmp_path).release()  # a start that failed has let go


def test_a_file_system_without_locks_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with RunLog(tmp_path) as log:
        log.log((0,), {"a": 1})
    assert "has no locks (No locks available): see to it that no other run writes there." in capsys.readouterr().err
    assert read_metrics(tmp_path)


def test_temporaries_are_of_ones_own_and_stale_ones_go(tmp_path: Path) -> None:
    path, host = tmp_path / "last.pt", os.uname().nodename
    gone = in_a_process("pass")
    gone.communicate()
    kept = [f".last.pt.{host}.{os.getppid()}.abcd.tmp", ".last.pt.elsewhere.1.abcd.tmp", ".x.tmp", "x.tmp"]
    stale = [f".last.pt.{host}.{gone.pid}.abcd.tmp", "last.pt.tmp", ".best.pt.elsewhere.2.abcd.tmp"]
    for name in (*kept, *stale):
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / stale[2], (0, 0))

    def write(file: Any) -> None:
        inside.extend(os.listdir(tmp_path))
        file.write(b"new")

    inside: list[str] = []
    atomic_write(path, write)
    atomic_write(path, write)
    own = [name for name in inside if f".{os.getpid()}." in name]
    assert len(own) == len({*own}) == 2 and all(name.startswith(".last.pt.") for name in own)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "last.pt"])
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Links ----------------------------------------------------------------------------------------------------------------

FILES = ["last.pt", "best.pt", "manifest.json", "metrics.log", "resolved.yaml", "resolved.1.yaml", "last.pt.tmp"]
FILES += ["manifest.json.tmp", ".last.pt.a.1.b.tmp", ".lock"]
FOLDERS = ["probes", "tensorboard"]
INSIDE = ["probes/epoch_0001.npz", "probes/deep/x.npz", "tensorboard/events"]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs that was stopped after the first."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        killed(patch, folder, 5, "--probes")
    return folder


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("name", [*FILES, *FOLDERS, *INSIDE])
def test_a_link_in_a_runs_folder_is_refused_by_name(half: Path, tmp_path: Path, name: str, exists: bool) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(half, folder)
    path = folder / name
    if path.is_dir():
        shutil.copytree(path, outside) if exists else None
        shutil.rmtree(path)
    elif exists:
        outside.write_bytes(path.read_bytes() if path.exists() else b"precious")
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(outside)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    message = refused(lambda: RunLog(folder, resume=True))
    assert message.startswith(f"{path} is a link to {outside}, and a run writes into its own folder alone; ")
    assert exit_code(tiny(folder, "--probes", "--resume", "auto")) == 2 or (name == "last.pt" and not exists)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["metrics.log", "last.pt", "tensorboard/events"])
def test_a_pipe_in_a_runs_folder_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    assert f"{tmp_path / name} is no ordinary file" in refused(lambda: RunLog(tmp_path, resume=True))


def test_metrics_that_are_another_file_too_are_refused(half: Path, tmp_path: Path) -> None:
    shutil.copytree(half, tmp_path / "run")
    os.link(tmp_path / "run/metrics.log", tmp_path / "other.log")
    assert "metrics.log is a hard link" in refused(lambda: RunLog(tmp_path / "run", resume=True))


def test_a_lock_that_is_another_file_too_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    os.link(tmp_path / "mine", tmp_path / "run" / LOCK)
    assert f"{LOCK} is a hard link" in refused(lambda: FolderLock(tmp_path / "run"))
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_in_the_place_of_the_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "run" / "resolved.yaml").mkdir(parents=True)
    with RunLog(tmp_path / "run", resume=True) as log:
        said = refused(lambda: log.write_config("run: {}\n"))
    assert "resolved.yaml cannot be read (Is a directory); move it away" in said


def test_a_file_in_the_place_of_the_recordings_is_named_before_an_epoch_is_trained(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/probes").write_text("mine")
    assert exit_code(tiny(tmp_path / "run", "--probes", "--resume", "auto")) == 2
    assert f"{tmp_path / 'run/probes'} is no folder" in capsys.readouterr().err
    assert os.listdir(tmp_path / "run") == ["probes"]


def test_a_folder_of_recordings_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    said = refused(lambda: write_recording(tmp_path / "gone" / "probes", "epoch_0001", {}))
    assert said.startswith(f"{tmp_path}/gone/probes cannot be made (No such file or directory)")


def test_a_folder_that_is_a_link_is_the_users_own(half: Path, tmp_path: Path) -> None:
    shutil.copytree(half, tmp_path / "disk")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    train(tmp_path / "run", "--probes", "--resume", "auto")
    assert load_checkpoint(tmp_path / "disk/last.pt")["epoch"] == 2


# Begun, and gone back in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [["metrics.log"], ["best.pt"], ["best.pt", "metrics.log", "resolved.yaml"]])
def test_a_folder_without_last_pt_is_not_begun_anew(
    half: Path, tmp_path: Path, held: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in held:
        shutil.copy(half / name, folder)
    before = sorted(os.listdir(folder))
    assert exit_code(tiny(folder, "--probes", "--resume", "auto")) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {folder} has no last.pt to continue from and holds ")
    assert ("best.pt" in held) == ("best.pt" in message) and ("1 finished epochs in metrics.log" in message) == (
        "metrics.log" in held
    )
    assert sorted(os.listdir(folder)) == before
    if "best.pt" in held:  # and what the sentence advises works
        train(folder, "--probes", "--resume", str(folder / "best.pt"))


def test_a_run_stopped_before_its_first_epoch_begins_again_with_the_same_recipe_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    killed(monkeypatch, folder, 2)
    assert not (folder / "last.pt").exists() and len(column(folder, "train.loss")) == 2
    assert exit_code(tiny(folder, "--lr", "0.2", "--resume", "auto")) == 2
    said = f"{folder} was begun with optim.lr 0.1 (here 0.2), says resolved.yaml; start it with the same recipe, or"
    assert said in capsys.readouterr().err
    train(folder, "--resume", "auto")
    assert differences(outcome(train(tmp_path / "straight")), outcome(folder)) == []


def test_check_new_of_a_new_folder(tmp_path: Path) -> None:
    check_new(tmp_path / "none", load_config())
    (tmp_path / "resolved.yaml").write_text(dump_config(load_config()))
    check_new(tmp_path, load_config(overrides=["run.output_dir=elsewhere", "schedule.epochs=3"]))


def test_going_back_makes_void_what_came_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--probes", "--epochs", "4"]
    folder = train(tmp_path / "run", *flags)
    shutil.copy(folder / "last.pt", tmp_path / "whole.pt")
    with monkeypatch.context() as patch:
        killed(patch, tmp_path / "first", 5, *flags)  # last.pt after the first epoch
    shutil.copy(tmp_path / "first/last.pt", folder / "earlier.pt")
    before = (folder / "metrics.log").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "train_step", before_step(6, interrupt))
        main.main(tiny(folder, *flags, "--resume", str(folder / "earlier.pt")))
    assert (folder / "metrics.log").read_bytes().startswith(before)  # nothing is lost
    assert list(finished_epochs(folder)) == [1] and [line["step"] for line in read_metrics(folder)][-1] != ()
    assert load_checkpoint(folder / "last.pt")["epoch"] == 1  # what --resume auto continues is what the metrics say
    assert sorted(os.listdir(folder / "probes")) == [
        "abandoned_epoch_0003.npz",
        "abandoned_epoch_0004.npz",
        "epoch_0001.npz",
        "epoch_0002.npz",
    ]
    train(folder, *flags, "--resume", "auto")
    assert differences(load_checkpoint(folder / "last.pt"), load_checkpoint(tmp_path / "whole.pt")) == ["/config"]
    assert [line["step"] for line in metrics(folder) if len(line["step"]) == 1] == [(0,), (1,), (2,), (3,)]


def interrupt(_: Run) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("back", "kept"),
    [
        ((0, 0), []),
        ((0, 2), [(0, 1), (0, 2)]),
        ((0, 4), [(0, 1), (0, 2), (0, 4)]),
        ((1, 0), [(0, 1), (0, 2), (0, 4), (0,)]),
        ((1, 3), [(0, 1), (0, 2), (0, 4), (0,), (1, 3)]),
        ((2, 0), [(0, 1), (0, 2), (0, 4), (0,), (1, 3), (1, 4), (1,)]),
    ],
)
def test_what_is_void(tmp_path: Path, back: tuple[int, int], kept: list[tuple[int, ...]]) -> None:
    with RunLog(tmp_path) as log:
        for step in [(0, 1), (0, 2), (0, 4), (0,), (1, 3), (1, 4), (1,), ()]:
            log.log(step, {"a": 1}, at=1)
    for _ in range(2):
        with RunLog(tmp_path, resume=True) as log:
            log.go_back(*back)
        assert [line["step"] for line in read_metrics(tmp_path)] == kept
    lines = (tmp_path / "metrics.log").read_text().splitlines()
    assert len(lines) == 9 and '"type": "LOG", "step": "PARAMETER", "data": {"resumed.epoch"' in lines[-1]
    with RunLog(tmp_path, resume=True) as log:
        log.log((1, 4), {"b": 2}, at=8)
    assert read_metrics(tmp_path)[-1]["data"].get("b", 2) == 2


# After a kill ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("straight") / "run")


@pytest.mark.parametrize("number", some(range(1, 9), every=2))
def test_a_run_killed_at_any_write_of_its_checkpoints_ends_the_same(
    number: int, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed just before or after its nth rename of a checkpoint, and started again."""
    folder, replace, left = tmp_path / "run", os.replace, [number]

    def killing(source: Any, target: Any) -> None:
        if not str(target).endswith(".pt"):
            return replace(source, target)
        for moment in range(2):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            if moment == 0:
                replace(source, target)
        return None

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(files.os, "replace", killing)
        main.main(tiny(folder))
        raise SystemExit  # it writes fewer
    train(folder, "--resume", "auto")
    train(folder, "--resume", "auto")
    assert differences(outcome(straight), outcome(folder)) == []


def test_the_final_line_is_written_when_a_finished_run_is_started_again(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    log = folder / "metrics.log"
    lines = log.read_bytes().splitlines(keepends=True)
    assert b'"step": []' in lines[-1]
    log.write_bytes(b"".join(lines[:-1]))
    train(folder, "--resume", "auto")
    assert differences(outcome(straight), outcome(folder)) == []
    after = log.read_bytes()
    train(folder, "--resume", "auto")  # and once alone
    assert log.read_bytes() == after


@pytest.mark.parametrize("state", ["missing", "earlier", "damaged"])
def test_a_best_checkpoint_that_is_not_the_best_is_mended_or_said(
    state: str, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    last = load_checkpoint(folder / "last.pt")
    best = {"missing": None, "earlier": {**last, "best_top1": 0.0}, "damaged": b"PK"}[state]
    (folder / "best.pt").unlink()
    if isinstance(best, bytes):
        (folder / "best.pt").write_bytes(best)
    elif best is not None:
        save_checkpoint(folder / "best.pt", best)
    top1 = {n: figures["eval.top1"] for n, figures in finished_epochs(folder).items()}
    of_best = next(n for n in top1 if top1[n] == last["best_top1"])
    mend_best(folder, {**last, "epoch": of_best})
    if of_best == last["epoch"]:
        assert (folder / "best.pt").read_bytes() == (folder / "last.pt").read_bytes()
    assert capsys.readouterr().err == ""
    (folder / "best.pt").unlink()
    mend_best(folder, {**last, "epoch": 3 - of_best})
    assert f"{folder / 'best.pt'} is missing: the state of the best top-1 so far, " in capsys.readouterr().err
    assert not (folder / "best.pt").exists()


def test_a_moving_average_that_is_not_finite_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_average(run: Run) -> None:
        run.ema.module.blocks[0].attn.qkv.weight.data[0] = torch.nan

    monkeypatch.setattr(engine, "train_step", before_step(5, break_average))
    with pytest.raises(
        TrainingError, match=r"left the moving average of the parameter blocks\.0\.attn\.qkv\.weight not"
    ):
        main.main(tiny(tmp_path / "run", "--model-ema"))
    assert load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1
