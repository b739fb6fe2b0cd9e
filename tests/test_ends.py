"""How a run ends before its last epoch: in evaluation, by a mistake of one process, by an error nobody foresaw, by
signals that come twice; and that nothing is lost by it.

Runs are those of main.py on a tiny model (tests/helpers.py).
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import make_folder
from helpers import (
    FULL,
    ROOT,
    Killed,
    before_step,
    differences,
    environment,
    exit_code,
    outcome,
    replace,
    tiny,
    train,
)
from quick import some

import engine
import main
from config import UserError
from engine import Run, TrainingError
from record.checkpoint import load_checkpoint, save_checkpoint
from record.runlog import RunLog
from training import ends, processes
from training.ends import StopSignal

pytestmark = pytest.mark.usefixtures("in_this_process")

# Four steps of twelve micro-batches; evaluates 9 images in three batches.
SMALL = [*FULL, "--model.kwargs", "{embed_dim: 16, depth: 1, num_heads: 2}", "--data.num_images", "96"]
SMALL += ["--global-batch", "24", "--batch-size", "2", "--epochs", "1"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("straight") / "run", *SMALL)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def in_evaluation(batch: int, action: Callable[[Run], object], average: bool = False) -> Callable[[Run], None]:
    """Does something in an evaluation, after batch number `batch` of the model or of its moving average."""

    def plant(run: Run) -> None:
        seen: list[int] = []

        def note(module: torch.nn.Module, *_: object) -> None:
            if not module.training:
                seen.append(1)
                if len(seen) == batch + 1:
                    action(run)

        (run.ema.module if average else run.model).register_forward_hook(note)

    return plant


FAILURES = [UserError("An image."), RuntimeError("nobody knows")]
MORE_FAILURES = [TrainingError("A figure."), MemoryError()]


@pytest.mark.parametrize(
    "failure",
    [*FAILURES, *(pytest.param(failure, marks=pytest.mark.slow) for failure in MORE_FAILURES)],
    ids=lambda failure: type(failure).__name__,
)
def test_an_epoch_outlives_a_failed_evaluation(
    failure: Exception, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(_run: Run) -> None:
        raise failure

    with monkeypatch.context() as patch:
        replace(patch, engine.train_step, before_step(1, in_evaluation(1, fail)))
        assert exit_code(tiny(tmp_path / "run", *SMALL)) == (2 if isinstance(failure, UserError) else 1)
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["step"]) == (0, 4)
    capsys.readouterr()
    train(tmp_path / "run", *SMALL, "--resume", "auto")
    assert "at epoch 0, step 4." in capsys.readouterr().out
    assert differences(outcome(straight), outcome(tmp_path / "run")) == []


def test_an_image_of_the_evaluation_set_that_cannot_be_read_costs_no_epoch(tmp_path: Path, capsys: Any) -> None:
    folder = make_folder(tmp_path / "images", train=8)
    flags = ["--data-set", "imagenet", "--data-path", str(folder), "--nb-classes", "2", "--no-repeated-aug"]
    whole = train(tmp_path / "straight", *flags)
    bad = folder / "val" / "bee" / "3.png"
    good = bad.read_bytes()
    bad.write_bytes(b"broken")
    for _ in range(2):
        assert exit_code(tiny(tmp_path / "run", *flags, "--resume", "auto")) == 2
        assert f"{bad} cannot be read" in capsys.readouterr().err
        assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1
    bad.write_bytes(good)
    train(tmp_path / "run", *flags, "--resume", "auto")
    assert differences(outcome(whole), outcome(tmp_path / "run")) == []


@pytest.mark.parametrize("average", [False, True], ids=["model", "moving average"])
@pytest.mark.parametrize("number", some([signal.SIGTERM, signal.SIGINT], every=2))
def test_a_signal_in_evaluation_is_answered_within_a_batch(
    number: signal.Signals,
    average: bool,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluated: list[int] = []

    def signalled(run: Run) -> None:
        os.kill(os.getpid(), number)
        (run.ema.module if average else run.model).register_forward_hook(lambda *_: evaluated.append(1))

    with monkeypatch.context() as patch:
        replace(patch, engine.train_step, before_step(1, in_evaluation(1, signalled, average)))
        assert exit_code(tiny(tmp_path / "run", *SMALL)) == 128 + number
    assert len(evaluated) <= 1  # of two that were left
    last = tmp_path / "run" / "last.pt"
    assert capsys.readouterr().err == (
        f"Stopped by {number.name} at epoch 0, step 4; the state is in {last}: go on with --resume auto.\n"
    )
    train(tmp_path / "run", *SMALL, "--resume", "auto")
    assert differences(outcome(straight), outcome(tmp_path / "run")) == []


@pytest.mark.parametrize("moment", ["best.pt", "last.pt", "final line"])
def test_a_run_killed_in_its_last_moments_is_finished_when_it_is_started_again(
    moment: str, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(path: Path, state: dict[str, Any]) -> None:
        if state["epoch"] == 1 and path.name == moment:
            raise Killed
        save_checkpoint(path, state)

    def log(run_log: RunLog, step: Any, *args: Any, **kwargs: Any) -> None:
        if step == () and moment == "final line":
            raise Killed
        write(run_log, step, *args, **kwargs)

    write = RunLog.log
    with monkeypatch.context() as patch, pytest.raises(Killed):
        replace(patch, save_checkpoint, save)
        patch.setattr(RunLog, "log", log)
        main.main(tiny(tmp_path / "run", *SMALL))
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["step"]) in ((0, 4), (1, 0))  # evaluated or not
    for _ in range(2):  # a run that is complete is left as it is
        train(tmp_path / "run", *SMALL, "--resume", "auto")
        assert differences(outcome(straight), outcome(tmp_path / "run")) == []
    assert sum('"step": []' in line for line in (tmp_path / "run" / "metrics.log").read_text().splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Signals that come twice
# ---------------------------------------------------------------------------------------------------------------------


def test_under_torchrun_a_signal_that_is_forwarded_too_is_one(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled_twice(_run: Run) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "none")
        replace(patch, engine.train_step, before_step(2, signalled_twice))
        assert exit_code(tiny(tmp_path / "run", *SMALL)) == 143
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3
    train(tmp_path / "run", *SMALL, "--resume", "auto")
    assert differences(outcome(straight), outcome(tmp_path / "run")) == []


def test_under_torchrun_a_later_signal_is_immediate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    sent: list[tuple[int, int, Any]] = []
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.heard == signal.SIGTERM
        monkeypatch.setattr(StopSignal, "FORWARDED", -1.0)
        kill = os.kill
        monkeypatch.setattr(ends.os, "kill", lambda pid, n: sent.append((pid, n, signal.getsignal(n))))
        kill(os.getpid(), signal.SIGTERM)
    assert sent == [(os.getpid(), signal.SIGTERM, signal.SIG_DFL)]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the test."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(), stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def test_processes_that_are_all_signalled_under_torchrun_leave_a_checkpoint(tmp_path: Path) -> None:
    """As a scheduler does: each process hears it twice, once by way of torchrun."""
    folder = tmp_path / "run"
    flags = tiny(folder, "--data.num_images", "4096", "--epochs", "50", "--num_workers", "1")
    log = folder / "metrics.log"
    with started([*TORCHRUN, str(ROOT / "main.py"), *flags]) as process:
        wait_for(lambda: log.exists() and log.read_text().count('"step": [0, ') > 2, process)
        for pid in [*children(process.pid), process.pid]:
            os.kill(pid, signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("Stopped by SIGTERM at epoch 0, step ") == 1
    assert load_checkpoint(folder / "last.pt")["step"] > 2


# ---------------------------------------------------------------------------------------------------------------------
# Failures of whole processes
# ---------------------------------------------------------------------------------------------------------------------

# main.py, in which process RANK meets what nobody has foreseen.
PLANTED = """
import os, runpy, sys
import training.step
compute, rank = training.step._update, int(sys.argv.pop(1))

def fail(run, *args):
    if run.rank == rank and run.global_step == 2:
        raise LookupError("nobody has foreseen this")
    compute(run, *args)

training.step._update = fail
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    (tmp_path / "planted.py").write_text(PLANTED)
    return tmp_path / "planted.py"


def run_process(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("workers", some(["2", "0"], every=2))
def test_an_error_that_nobody_has_foreseen_ends_the_program(workers: str, planted: Path, tmp_path: Path) -> None:
    done = run_process(sys.executable, str(planted), "0", *tiny(tmp_path / "run", "--num_workers", workers))
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("LookupError: nobody has foreseen this\n")


def said_by_main(stderr: str) -> list[str]:
    """The lines of stderr that are not torchrun's own, which reports every process that fails."""
    return stderr.split('Traceback (most recent call last):\n  File "<frozen runpy>"')[0].splitlines()


@pytest.mark.slow  # as the mistake below, which CI tries
def test_an_error_of_one_process_ends_all_and_is_said_once(planted: Path, tmp_path: Path) -> None:
    done = run_process(*TORCHRUN, str(planted), "1", *tiny(tmp_path / "run", "--num_workers", "1"))
    assert done.returncode == 1
    assert done.stderr.count("LookupError: nobody has foreseen this") == 1
    assert "Connection" not in done.stderr and "RuntimeError" not in done.stderr


def test_a_mistake_that_one_process_meets_ends_all_and_is_said_once(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", train=8)
    (folder / "val" / "ant" / "1.png").write_bytes(b"broken")  # the second image is the second process's
    flags = ["--data-set", "imagenet", "--data-path", str(folder), "--nb-classes", "2", "--no-repeated-aug"]
    done = run_process(*TORCHRUN, str(ROOT / "main.py"), *tiny(tmp_path / "run", *flags))
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: ") == 1 and "1.png cannot be read" in done.stderr
    assert "Connection" not in done.stderr and "RuntimeError" not in done.stderr
    assert done.stderr.count("exitcode  : 2") >= 1


def test_a_mistake_that_all_processes_meet_is_said_once(tmp_path: Path) -> None:
    done = run_process(*TORCHRUN, str(ROOT / "main.py"), *tiny(tmp_path / "run", "--global-batch", "15"))
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: The global batch of 15 does not divide among 2 processes.\n") == 1


ENVIRONMENTS = {
    "size that is no number": ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment"),
    "rank that is no number": ({"WORLD_SIZE": "2", "RANK": "first"}, "RANK is 'first' in the environment"),
    "rank below 0": ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1' in the environment"),
    "rank beyond the size": ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2 in the environment"),
    "nowhere to meet": ({"WORLD_SIZE": "2", "RANK": "0"}, "2 processes of WORLD_SIZE cannot meet at None:None"),
    "no port": (
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
        "2 processes of WORLD_SIZE cannot meet at localhost:x",
    ),
    "a machine nobody knows": (
        {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "node.invalid", "MASTER_PORT": "29500"},
        "2 processes of WORLD_SIZE cannot meet at node.invalid:29500",
    ),
    "a machine torchrun does not know": (
        {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "node.invalid", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        "2 processes of WORLD_SIZE cannot meet at node.invalid:None",
    ),
    "torchrun's store nowhere": (
        {"WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        "2 processes of WORLD_SIZE cannot meet at None:None",
    ),
    "local rank that is no number": ({"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first' in the environment"),
    "local size that is no number": ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x' in the environment"),
    "local size of none": ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is 0 in the environment"),
}


@pytest.mark.parametrize(("variables", "sentence"), ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_a_mistake_in_the_environment_is_one_sentence(
    variables: dict[str, str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(processes, "_KNOWN_WITHIN", 0.0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert exit_code(tiny(tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and sentence in err


class Full(io.StringIO):
    """As a file on a full disk, or a pipe that nobody reads."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("flags", [["--print-config"], ["--epochs", "1"]], ids=" ".join)
def test_output_that_nobody_takes_is_one_sentence(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert exit_code(tiny(tmp_path / "run", *flags)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: What this program prints cannot be written (No space left") and err.count("\n") == 1
    if "--epochs" in flags:  # the epoch is saved
        assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1
        assert exit_code(tiny(tmp_path / "run", *flags, "--resume", "auto")) == 0
