"""Stopping a run and resuming it bit for bit: killed, signalled, with every method, on another recipe.

Runs are those of main.py on a tiny model (tests/helpers.py), so that what is tested is what users start.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import stabilizer_helpers
import torch
from helpers import (
    FULL,
    METHODS,
    QRAMPING,
    before_step,
    column,
    differences,
    exit_code,
    killed,
    outcome,
    replace,
    stop_itself,
    tiny,
    train,
)
from processes import start
from quick import some

import engine
import main
from config import load_config
from engine import Run
from record.checkpoint import load_checkpoint, save_checkpoint
from record.weights import load_weights
from training import passes

pytestmark = pytest.mark.usefixtures("in_this_process")

SCHEDULES = ["epoch", "iteration"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two epochs (8 steps) without a stop, by the schedule's `step_on`."""
    folder = tmp_path_factory.mktemp("straight")
    return {on: train(folder / on, *FULL, "--schedule.step_on", on) for on in SCHEDULES}


def killed_then_resumed(monkeypatch: pytest.MonkeyPatch, output_dir: Path, step: int, *flags: str) -> Path:
    """A run killed before its own optimizer step `step`, rehearsed ones aside, and then resumed."""
    killed(monkeypatch, output_dir, step, *FULL, *flags)
    return train(output_dir, *FULL, *flags, "--resume", "auto")


def test_the_runs_compared_use_everything_that_is_random_or_has_a_state(straight: dict[str, Path]) -> None:
    state = load_checkpoint(straight["epoch"] / "last.pt")
    cfg = load_config(straight["epoch"] / "resolved.yaml")
    assert (cfg.quant.scheme, cfg.quant.rounding.backward, cfg.model_ema.enabled) == ("mx", "stochastic", True)
    assert (cfg.model.drop, cfg.model.drop_path, cfg.aug.repeats) == (0.1, 0.3, 3)
    assert cfg.aug.mixup > 0 and cfg.aug.cutmix > 0 and cfg.aug.reprob > 0
    assert differences(state["model"], state["ema"])
    assert (state["epoch"], state["step"], len(column(straight["epoch"], "train.loss"))) == (2, 0, 8)
    assert all(value["step"] == 8 for value in state["optimizer"]["state"].values())


@pytest.mark.parametrize("on", SCHEDULES)
def test_an_epoch_killed_and_resumed_equals_two_epochs_bit_for_bit(
    on: str, straight: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = killed_then_resumed(monkeypatch, tmp_path / "run", 4, "--schedule.step_on", on)
    assert differences(outcome(straight[on]), outcome(resumed)) == []


@pytest.mark.parametrize(("step", "on"), [(3, "iteration"), (6, "epoch"), (7, "iteration")])
def test_a_run_killed_in_mid_epoch_goes_on_from_the_step_saved_last(
    step: int, on: str, straight: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    flags = ["--schedule.step_on", on, "--save-every", "2"]
    resumed = killed_then_resumed(monkeypatch, tmp_path / "run", step, *flags)
    assert differences(outcome(straight[on]), outcome(resumed)) == []
    saved = step // 2 * 2
    assert f"at epoch {saved // 4}, step {saved % 4}." in capfd.readouterr().out


def test_a_step_of_several_micro_batches_is_resumed_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--batch-size", "8", "--save-every", "5", "--schedule.step_on", "iteration", "--clip-grad", "1"]
    resumed = killed_then_resumed(monkeypatch, tmp_path / "run", 5, *flags)
    assert differences(outcome(train(tmp_path / "straight", *FULL, *flags)), outcome(resumed)) == []


def test_another_seed_is_another_run(straight: dict[str, Path], tmp_path: Path) -> None:
    found = differences(outcome(straight["epoch"]), outcome(train(tmp_path / "run", *FULL, "--seed", "1")))
    assert any(where.startswith("/last.pt/model/") for where in found)
    assert any(where.startswith("/last.pt/optimizer/") for where in found)
    assert any(where.startswith("/metrics/") for where in found)


@pytest.mark.parametrize("part", ["seed_step", "seek_noise"])
def test_without_its_position_a_resumed_run_would_differ(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(monkeypatch, getattr(engine, part), lambda *_: None)
    torch.manual_seed(0)
    resumed = killed_then_resumed(monkeypatch, tmp_path / "run", 4)
    torch.manual_seed(0)
    assert differences(outcome(train(tmp_path / "straight", *FULL)), outcome(resumed))


def test_what_a_checkpoint_holds_is_needed(
    straight: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = main.load_checkpoint
    replace(monkeypatch, main.load_checkpoint, lambda path: {**(state := load(path)), "ema": state["model"]})
    resumed = killed_then_resumed(monkeypatch, tmp_path / "run", 4)
    found = differences(outcome(straight["epoch"]), outcome(resumed))
    assert found and all("ema" in where for where in found)


@pytest.mark.parametrize("number", some([signal.SIGTERM, signal.SIGINT], every=2))
@pytest.mark.parametrize("step", [1, 3, 4])  # in mid-epoch, in the last step of an epoch, in the first of the next
def test_a_signal_ends_the_run_after_its_step_with_the_state_saved(
    number: signal.Signals,
    step: int,
    straight: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [*FULL, "--schedule.step_on", "iteration"]
    with monkeypatch.context() as patch:
        replace(patch, engine.train_step, before_step(step, lambda _: os.kill(os.getpid(), number)))
        assert exit_code(tiny(tmp_path / "run", *flags)) == 128 + number
    epoch, done = divmod(step, 4)
    last = tmp_path / "run" / "last.pt"
    assert capsys.readouterr().err == (
        f"Stopped by {number.name} at epoch {epoch}, step {done + 1}; the state is in {last}: go on with "
        "--resume auto.\n"
    )
    state = load_checkpoint(last)
    assert (state["epoch"], state["step"]) == (epoch, done + 1)
    train(tmp_path / "run", *flags, "--resume", "auto")
    assert differences(outcome(straight["iteration"]), outcome(tmp_path / "run")) == []


def test_a_second_signal_is_immediate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled_twice(run: Run) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == run.stop._remember

    replace(monkeypatch, engine.train_step, before_step(0, signalled_twice))
    assert exit_code(tiny(tmp_path / "run")) == 143


def test_a_run_leaves_the_process_s_handlers_as_it_found_them(tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    train(tmp_path / "run", "--epochs", "1")
    assert [signal.getsignal(number) for number in numbers] == before


@contextlib.contextmanager
def started(argv: list[str], output: Path) -> Iterator[BaseProcess]:
    """main.py as a process that does not outlive the test."""
    process = start(main.command, argv, output=output)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], bool], process: BaseProcess, output: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_alive(), output.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_killed_then_terminated_then_resumed_equals_one_run_bit_for_bit(tmp_path: Path) -> None:
    flags = [*FULL, "--data.num_images", "320", "--save-every", "5", "--schedule.step_on", "iteration"]  # 20 steps
    output_dir, output = tmp_path / "run", tmp_path / "output.txt"
    argv = tiny(output_dir, *flags)

    def lines(epoch: int) -> int:
        log = output_dir / "metrics.log"
        return log.read_text().count(f'"step": [{epoch}, ') if log.exists() else 0

    with started(argv, output) as process:
        wait_for(lambda: (output_dir / "last.pt").exists() and lines(0) >= 7, process, output)
    assert process.exitcode == -signal.SIGKILL
    seen = lines(0)
    assert load_checkpoint(output_dir / "last.pt")["step"] in range(5, 20, 5)

    with started([*argv, "--resume", "auto"], output) as process:
        wait_for(lambda: lines(0) > seen, process, output)
        process.terminate()
        process.join(120)
        said = output.read_text()
        assert process.exitcode == 143, said
    state = load_checkpoint(output_dir / "last.pt")
    stopped = f"Stopped by SIGTERM at epoch {state['epoch']}, step {state['step']}; the state is in "
    assert re.search(f"^{re.escape(stopped)}", said, re.MULTILINE)
    assert re.search(r"Continuing .*last\.pt at epoch 0, step \d+\.", said)
    assert state["epoch"] * 20 + state["step"] < 40

    train(output_dir, *flags, "--resume", "auto")
    assert differences(outcome(train(tmp_path / "straight", *flags)), outcome(output_dir)) == []


def test_another_recipe_is_refused_on_resuming(straight: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    flags = [*FULL, "--epochs", "3", "--resume", str(straight["epoch"] / "last.pt")]
    assert exit_code(tiny(tmp_path / "run", *flags, "--seed", "1", "--quant.scale_rule", "floor")) == 2
    err = capsys.readouterr().err
    assert "was trained with quant.scale_rule truncation_free (here floor), run.seed 0 (here 1); resume with" in err
    train(tmp_path / "run", *flags)  # more epochs of the same recipe


def test_another_length_of_epoch_is_refused_in_mid_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(monkeypatch, tmp_path / "run", 3, "--save-every", "2")
    load = main.load_checkpoint
    replace(monkeypatch, main.load_checkpoint, lambda path: {**load(path), "steps_per_epoch": 5})  # more images then
    assert exit_code(tiny(tmp_path / "run", "--resume", "auto")) == 2
    assert "stopped inside an epoch of 5 steps and this run's have 4; resume it with the same data set" in (
        capsys.readouterr().err
    )


# ---------------------------------------------------------------------------------------------------------------------
# Stabilizers and schemes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "step"), some([("qramping", 2), *((method, 3) for method in METHODS)], every=2, many=True)
)
def test_every_method_is_resumed_bit_for_bit(
    method: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two epochs of two steps. Q-Ramping detects at steps 0 and 3: killed after a detection, and between two."""
    small = ["--data.num_images", "32", "--model.kwargs", "{embed_dim: 32, depth: 1, num_heads: 2}"]
    flags = [*FULL, *small, *METHODS[method], "--save-every", "1"]
    killed(monkeypatch, tmp_path / "run", step, *flags)
    stopped = load_checkpoint(tmp_path / "run" / "last.pt")
    assert 2 * stopped["epoch"] + stopped["step"] == step
    if method == "qramping":
        ramping = stopped["optimizer"]["ramping"]
        assert ramping["grad_sum"].any() and len(ramping["period"].unique()) > 1  # amid accumulations
    capfd.readouterr()
    resumed = train(tmp_path / "run", *flags, "--resume", "auto")
    assert f"at epoch {step // 2}, step {step % 2}." in capfd.readouterr().out  # it went on and did not begin anew
    assert differences(outcome(train(tmp_path / "straight", *flags)), outcome(resumed)) == []


def test_rehearsed_steps_leave_no_trace(straight: dict[str, Path], tmp_path: Path) -> None:
    """Q-Ramping whose periods all stay 1 is plain AdamW, but for the steps it rehearses."""
    ramped = outcome(
        train(tmp_path / "run", *FULL, *QRAMPING, "--stabilizer.k2", "0", "--stabilizer.update_period", "3")
    )
    plain = outcome(straight["epoch"])
    for part in ("model", "ema", "meter", "epoch", "best_top1"):
        assert differences(plain["last.pt"][part], ramped["last.pt"][part]) == []
    detected = [line["step"] for line in ramped["metrics"] if "stabilizer.mean_period" in line["data"]]
    assert detected == [(0, 0), (0, 3), (1, 2)]
    for line in ramped["metrics"]:
        line["data"] = {name: value for name, value in line["data"].items() if not name.startswith("stabilizer.")}
    assert differences(plain["metrics"], [line for line in ramped["metrics"] if line["data"]]) == []


# ---------------------------------------------------------------------------------------------------------------------
# Other micro-batches
# ---------------------------------------------------------------------------------------------------------------------


def drawn_by(monkeypatch: pytest.MonkeyPatch, *argv: str) -> list[tuple[int, bytes]]:
    """Of every training pass of a run: its position of noise, and the state that torch's generator is set to."""
    drawn: list[tuple[int, bytes]] = []
    seed = passes.seed_step

    def note(run: Run, position: int) -> None:
        seed(run, position)
        drawn.append((position, torch.get_rng_state().numpy().tobytes()))

    with monkeypatch.context() as patch:
        replace(patch, passes.seed_step, note)
        assert exit_code([*argv]) in (0, 143)
    return drawn


@pytest.mark.parametrize(
    "sizes", some([("4", "16", "8"), ("16", "8", "4"), ("8", "4", "16")], every=3), ids=lambda sizes: "_".join(sizes)
)
def test_a_session_with_other_micro_batches_draws_what_none_before_it_drew(
    sizes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, bytes]] = []
    for number, size in enumerate(sizes):
        with monkeypatch.context() as patch:
            replace(patch, engine.train_step, before_step(3 * number + 2, stop_itself))
            flags = ["--quant.scheme", "mx", "--batch-size", size, "--epochs", "3", "--resume", "auto"]
            session = drawn_by(monkeypatch, *tiny(tmp_path / "run", *flags))
        assert len(session) == 3 * 16 // int(size)
        drawn += session
    positions, states = zip(*drawn, strict=True)
    assert list(positions) == list(range(len(drawn)))
    assert len(set(states)) == len(drawn)


def test_a_checkpoint_that_counts_no_passes_goes_on_at_those_of_its_steps(
    straight: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those written before passes were counted."""
    killed(monkeypatch, tmp_path / "run", 6, *FULL, "--save-every", "1")
    last = tmp_path / "run" / "last.pt"
    state = load_checkpoint(last)
    assert state.pop("passes") == 6
    save_checkpoint(last, state)
    train(tmp_path / "run", *FULL, "--save-every", "1", "--resume", "auto")
    assert differences(outcome(straight["epoch"]), outcome(tmp_path / "run")) == []


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of earlier versions
# ---------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_written_before_passes_were_counted_ends_as_it_would_have_then(tmp_path: Path) -> None:
    """data/ has a run of Q-EMA as an earlier version saved it after six of its eight steps, and its weights at the end.

    On the kind of machine that it was written on, they are the same bit for bit; another may add in another order.
    """
    data = Path(__file__).parent / "data"
    flags = [*stabilizer_helpers.SMALL, *METHODS["qema"]]
    run = train(tmp_path / "run", *flags, "--resume", str(data / "qema_step_6.pt"))
    begun, ended, expected = (
        load_weights(path) for path in (data / "qema_step_6.pt", run / "last.pt", data / "qema_end.pt")
    )
    assert ended.keys() == expected.keys()
    for name, value in expected.items():
        off = (ended[name] - value).abs().mean()
        assert off <= 0.05 * (begun[name] - value).abs().mean(), name
