"""The training loop: resuming bit for bit, signals, several processes, values that are not finite, losses, evaluation.

Runs are those of main.py on a tiny model (tests/helpers.py), so that what is tested is what users start.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import (
    FULL,
    PLAIN,
    ROOT,
    before_step,
    break_weight,
    column,
    differences,
    environment,
    exit_code,
    in_two_processes,
    killed,
    metrics,
    outcome,
    tiny,
    train,
    undisturbed,
)
from torch import Tensor, nn

import engine
import main
from checkpoint import load_checkpoint, load_weights
from config import Config, UserError, load_config
from datasets import build_data
from engine import Run, TrainingError, evaluate
from losses import Loss, build_loss
from models import create_model
from quantization.stabilizers import Plan, Stabilizer
from runlog import read_metrics


@pytest.fixture(scope="module", autouse=True)
def _process() -> Iterator[None]:
    with undisturbed():
        yield


class Box:
    """Stands in for an object of which only these attributes are needed."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------

SCHEDULES = ["epoch", "iteration"]
QRAMPING = ["--stabilizer.kind", "qramping", "--stabilizer.detect_steps", "5"]  # over the end of an epoch of 4
METHODS = {
    "qema": ["--stabilizer.kind", "qema", "--stabilizer.decay", "0.8"],
    "qramping": [*QRAMPING, "--stabilizer.k1", "0.5", "--stabilizer.update_period", "3", "--stabilizer.n_max", "4"],
    "dampen": ["--stabilizer.kind", "dampen", "--stabilizer.weight", "0.1"],
    "freeze": ["--stabilizer.kind", "freeze", "--stabilizer.momentum", "0.3", "--stabilizer.threshold_start", "0.2"],
    "int4": ["--quant.scheme", "int4"],
}


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
    monkeypatch.setattr(engine, part, lambda *_: None)
    torch.manual_seed(0)
    resumed = killed_then_resumed(monkeypatch, tmp_path / "run", 4)
    torch.manual_seed(0)
    assert differences(outcome(train(tmp_path / "straight", *FULL)), outcome(resumed))


def test_what_a_checkpoint_holds_is_needed(
    straight: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = main.load_checkpoint
    monkeypatch.setattr(main, "load_checkpoint", lambda path: {**load(path), "ema": None})
    resumed = killed_then_resumed(monkeypatch, tmp_path / "run", 4)
    found = differences(outcome(straight["epoch"]), outcome(resumed))
    assert found and all("ema" in where for where in found)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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
        patch.setattr(engine, "train_step", before_step(step, lambda _: os.kill(os.getpid(), number)))
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

    monkeypatch.setattr(engine, "train_step", before_step(0, signalled_twice))
    assert exit_code(tiny(tmp_path / "run")) == 143


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


def test_a_process_killed_then_terminated_then_resumed_equals_one_run_bit_for_bit(tmp_path: Path) -> None:
    flags = [*FULL, "--data.num_images", "320", "--save-every", "5", "--schedule.step_on", "iteration"]  # 20 steps
    output_dir = tmp_path / "run"
    main_py = [sys.executable, str(ROOT / "main.py"), *tiny(output_dir, *flags)]

    def lines(epoch: int) -> int:
        log = output_dir / "metrics.log"
        return log.read_text().count(f'"step": [{epoch}, ') if log.exists() else 0

    with started(main_py) as process:
        wait_for(lambda: (output_dir / "last.pt").exists() and lines(0) >= 7, process)
    assert process.returncode == -signal.SIGKILL
    seen = lines(0)
    assert load_checkpoint(output_dir / "last.pt")["step"] in range(5, 20, 5)

    with started([*main_py, "--resume", "auto"]) as process:
        wait_for(lambda: lines(0) > seen, process)
        process.terminate()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    state = load_checkpoint(output_dir / "last.pt")
    assert err.startswith(f"Stopped by SIGTERM at epoch {state['epoch']}, step {state['step']}; the state is in ")
    assert re.search(r"Continuing .*last\.pt at epoch 0, step \d+\.", out)
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
    monkeypatch.setattr(main, "load_checkpoint", lambda path: {**load(path), "steps_per_epoch": 5})  # more images then
    assert exit_code(tiny(tmp_path / "run", "--resume", "auto")) == 2
    assert "stopped inside an epoch of 5 steps and this run's have 4; resume it with the same data set" in (
        capsys.readouterr().err
    )


def random_states(model: nn.Module) -> tuple[Any, ...]:
    words = [torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()]
    return (*words, tuple(model.noise.state.tolist()))


def test_no_two_forward_passes_share_their_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, ...]] = []

    def watch(run: Run) -> None:
        run.model.patch_embed.register_forward_pre_hook(
            lambda *_: drawn.append(random_states(run.model)) if run.model.training else None
        )

    monkeypatch.setattr(engine, "train_step", before_step(0, watch))
    train(tmp_path / "run", *FULL, "--batch-size", "8")
    assert len(drawn) == 16  # two micro-batches in each of two times four steps
    assert [len(set(states)) for states in zip(*drawn, strict=True)] == [16, 16, 16, 16]


def test_draws_follow_from_seed_rank_and_position() -> None:
    cfg = load_config(
        overrides=["quant.scheme=mx", "model.img_size=8", "model.patch_size=4", "model.kwargs={depth: 1}"]
    )
    model = create_model(cfg, 4)

    def states(seed: int = 0, rank: int = 0, position: int = 0) -> tuple[Any, ...]:
        model.noise.reseed(seed, rank)
        engine.seed_step(Box(cfg=Box(run=Box(seed=seed)), rank=rank, model=model), position)
        model.noise.advance()
        return random_states(model)

    assert states() == states()
    for other in (states(seed=1), states(rank=1), states(position=1)):
        assert [a == b for a, b in zip(states(), other, strict=True)] == [False] * 4


def test_the_moving_average_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Run] = []
    weights: list[Tensor] = []

    def start(run: Run) -> None:
        runs.append(run)
        weight = run.model.blocks[0].attn.qkv.weight
        run.optimizer.register_step_post_hook(lambda *_: weights.append(weight.detach().clone()))

    monkeypatch.setattr(engine, "train_step", before_step(0, start))
    train(tmp_path / "run", "--model-ema", "--model-ema-decay", "0.9")
    average = weights[0]  # timm's begins with the weights after the first step
    for weight in weights[1:]:
        average = 0.9 * average + 0.1 * weight
    assert len(weights) == 8
    torch.testing.assert_close(runs[0].ema.module.blocks[0].attn.qkv.weight, average)
    saved = load_checkpoint(tmp_path / "run" / "last.pt")["ema"]
    assert differences(dict(runs[0].ema.module.state_dict()), dict(saved)) == []


# ---------------------------------------------------------------------------------------------------------------------
# Stabilizers and schemes in the loop
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "step"), [*((method, 3) for method in METHODS), ("qramping", 2)])
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


def test_a_stabilizer_is_called_at_every_step_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, int]] = []
    plans: list[Plan] = []

    class Spy(Stabilizer):
        def __init__(self, cfg: Any, model: nn.Module, plan: Plan) -> None:
            plans.append(plan)

        def before_step(self, step: int, trainer: Any) -> None:
            heard.append(("before_step", step))

        def after_backward(self, step: int) -> None:
            heard.append(("after_backward", step))

        def after_step(self, step: int) -> None:
            heard.append(("after_step", step))

    monkeypatch.setattr(main, "build_stabilizer", Spy)
    train(tmp_path / "run", "--batch-size", "8")
    points = ("before_step", "after_backward", "after_step")
    assert heard == [(point, step) for step in range(8) for point in points]
    assert plans == [Plan(steps_per_epoch=4, total_steps=8)]


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
# Micro-batches and processes
# ---------------------------------------------------------------------------------------------------------------------


def test_four_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    flags = [*PLAIN, "--data.num_images", "128", "--global-batch", "64"]
    whole = train(tmp_path / "whole", *flags)
    parts = train(tmp_path / "parts", *flags, "--batch-size", "16")
    assert column(whole, "train.loss") == pytest.approx(column(parts, "train.loss"), rel=2e-6)
    assert column(whole, "train.grad_norm") == pytest.approx(column(parts, "train.grad_norm"), rel=1e-4)
    assert column(whole, "eval.loss", 1) == pytest.approx(column(parts, "eval.loss", 1), rel=1e-5)
    losses = column(whole, "train.loss")
    assert len(losses) == 4 and max(losses) - min(losses) > 0.01  # it is not that nothing happens


def test_two_processes(tmp_path: Path) -> None:
    """All that needs two processes, in one start of them: each run is a few steps."""
    plain = [*PLAIN, "--batch-size", "4"]  # two micro-batches for each of two processes
    tetrajet = [*PLAIN, "--quant.scheme", "mx"]

    def folder(name: str) -> Path:
        return tmp_path / name

    reports = in_two_processes(
        tmp_path,
        [
            {"argv": tiny(folder("plain"), *plain)},
            {"argv": tiny(folder("tetrajet"), *tetrajet)},
            {"argv": tiny(folder("stopped"), *tetrajet), "rank": 1, "step": 5, "action": "stop"},
            {"argv": tiny(folder("stopped"), *tetrajet, "--resume", "auto")},
            {"argv": tiny(folder("broken"), *plain), "rank": 1, "step": 5, "action": "break"},
            {"argv": tiny(folder("rehearsed"), *tetrajet, *QRAMPING, "--stabilizer.k2", "0")},
            {"argv": tiny(folder("ramped"), *tetrajet, *METHODS["qramping"])},
        ],
    )
    codes = [[report["code"] for report in run] for run in reports]
    assert codes == [[0, 0], [0, 0], [143, 143], [0, 0], [1, 1], [0, 0], [0, 0]]
    assert all(run[0]["weights"] == run[1]["weights"] for run in (*reports[:4], *reports[5:]))

    one = train(folder("one"), *plain)
    two = folder("plain")
    assert column(two, "train.loss") == pytest.approx(column(one, "train.loss"), rel=2e-6)
    assert column(two, "train.grad_norm") == pytest.approx(column(one, "train.grad_norm"), rel=1e-4)
    assert column(two, "eval.loss", 1) == pytest.approx(column(one, "eval.loss", 1), rel=1e-5)
    assert column(two, "eval.top1", 1) == column(one, "eval.top1", 1)

    # TetraJet: the same seed and positions on both ranks, another rank in the key, so another trajectory nearby.
    mask = 2**32 - 1
    keys, positions = ([[state[word] for state in report["noise"]] for report in reports[1]] for word in (0, 1))
    assert [{(key >> 32, key & mask) for key in rank} for rank in keys] == [{(0, 0)}, {(1, 0)}]
    assert positions[0] == positions[1] and len(set(positions[0])) == 8
    one, two = (
        column(train(folder("one_tetrajet"), *tetrajet), "train.loss"),
        column(folder("tetrajet"), "train.loss"),
    )
    assert two[0] == pytest.approx(one[0], rel=2e-6)  # no noise in the first forward pass
    assert two == pytest.approx(one, rel=0.02)
    assert two[1:] != pytest.approx(one[1:], rel=1e-5)

    # A signal that one process hears stops both after the same step, and they go on bit for bit.
    assert differences(outcome(folder("tetrajet")), outcome(folder("stopped"))) == []

    # Q-Ramping rehearses on both, without a trace where all periods are 1, and sets the same periods.
    weights = outcome(folder("tetrajet"))["last.pt"]["model"]
    assert differences(weights, outcome(folder("rehearsed"))["last.pt"]["model"]) == []
    assert differences(weights, outcome(folder("ramped"))["last.pt"]["model"])

    # What breaks on one process stops both; the first says where it was.
    said = reports[4][0]["stderr"]
    assert "is the parameter blocks.1.mlp.fc1.weight (process 1); the last good checkpoint is" in said
    assert (said.count("\n"), load_checkpoint(folder("broken") / "last.pt")["epoch"]) == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Values that are not finite
# ---------------------------------------------------------------------------------------------------------------------


def break_input(run: Run) -> None:
    batches = run.data.train_batches

    def broken(*args: Any, **kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in batches(*args, **kwargs):
            images[0, 0, 0, 0] = torch.nan
            yield images, targets

    run.data.train_batches = broken


def overflow_activation(run: Run) -> None:
    run.model.blocks[1].mlp.fc1.weight.data.fill_(3e38)  # finite itself


def break_gradient_of_activation(run: Run) -> None:
    def plant(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * torch.inf)

    run.model.blocks[0].mlp.fc2.register_forward_hook(plant)


def break_gradient_of_parameter(run: Run) -> None:
    run.model.pos_embed.register_hook(lambda g: g * torch.nan)


BROKEN = {
    "parameter": (break_weight, "the parameter blocks.1.mlp.fc1.weight"),
    "activation": (overflow_activation, "the activation of blocks.1.mlp.fc1"),
    "gradient of an activation": (break_gradient_of_activation, "the gradient at the output of blocks.0.mlp.fc2"),
    "gradient of a parameter": (break_gradient_of_parameter, "the gradient of pos_embed"),
}


@pytest.mark.parametrize("quant", ["none", "mx"])
@pytest.mark.parametrize(("action", "named"), BROKEN.values(), ids=BROKEN.keys())
def test_a_value_that_is_not_finite_stops_the_run_and_is_named(
    action: Callable[[Run], None],
    named: str,
    quant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved: list[bytes] = []

    def act(run: Run) -> None:
        saved.append((tmp_path / "run" / "last.pt").read_bytes())
        action(run)

    monkeypatch.setattr(engine, "train_step", before_step(6, act))
    assert exit_code(tiny(tmp_path / "run", "--quant.scheme", quant)) == 1
    last = tmp_path / "run" / "last.pt"
    number = r"(nan|inf|[\d.]+)"
    assert re.fullmatch(
        rf"error: Step 2 of epoch 1: the loss is {number} and the gradient norm {number}; the first that is not finite "
        rf"is {re.escape(named)}; the last good checkpoint is {re.escape(str(last))}\.\n",
        capsys.readouterr().err,
    )
    assert last.read_bytes() == saved[0]
    state = load_checkpoint(last)
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())


def test_the_first_step_may_fail_before_there_is_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = main.build_data

    def broken(*args: Any, **kwargs: Any) -> Any:
        data = build(*args, **kwargs)
        break_input(Box(data=data))
        return data

    monkeypatch.setattr(main, "build_data", broken)
    assert exit_code(tiny(tmp_path / "run")) == 1
    err = capsys.readouterr().err
    assert re.search(r"Step 0 of epoch 0: the loss is nan .*; the first that is not finite is the input; ", err)
    assert err.endswith(f"; there is no checkpoint in {tmp_path / 'run'} yet.\n")


def test_a_failed_step_is_repeated_on_what_it_was_fed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def act(run: Run) -> None:
        run.model.patch_embed.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].clone()))
        run.model.head.register_forward_hook(lambda _m, _i, output: seen.append(output.detach().clone()))
        break_gradient_of_parameter(run)

    monkeypatch.setattr(engine, "train_step", before_step(2, act))
    assert exit_code(tiny(tmp_path / "run", *FULL, "--batch-size", "8")) == 1
    first, again = seen[:4], seen[4:]  # the input and the output of two micro-batches
    assert differences(first, again) == []
    assert differences(first[:2], first[2:])


def test_a_step_that_breaks_a_weight_leaves_the_checkpoint_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def overflow(run: Run) -> None:  # loss and gradients of this step are finite, and there may be no other step
        run.optimizer.register_step_post_hook(lambda *_: break_weight(run))

    monkeypatch.setattr(engine, "train_step", before_step(2, overflow))
    assert exit_code(tiny(tmp_path / "run", "--save-every", "1")) == 1
    last = tmp_path / "run" / "last.pt"
    assert capsys.readouterr().err == (
        "error: Step 3 of the run left the parameter blocks.1.mlp.fc1.weight not finite; the last good checkpoint is "
        f"{last}.\n"
    )
    state = load_checkpoint(last)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_data_that_ends_early_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "to_device", lambda *_: iter(()))
    assert exit_code(tiny(tmp_path / "run")) == 1
    assert capsys.readouterr().err == "error: The training data ended after 0 of the 4 steps of epoch 0.\n"


def test_data_that_ends_early_in_a_rehearsal_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a stream may that has fewer images than it says: here 3 of the 4 batches of every epoch."""
    build = main.build_data

    def short(*args: Any, **kwargs: Any) -> Any:
        data = build(*args, **kwargs)
        batches = data.train_batches
        data.train_batches = lambda epoch, start=0: itertools.islice(batches(epoch, start), max(3 - start, 0))
        return data

    monkeypatch.setattr(main, "build_data", short)
    flags = ["--quant.scheme", "mx", "--model.kwargs", "{embed_dim: 16, depth: 1, num_heads: 2}"]
    flags += ["--stabilizer.kind", "qramping", "--stabilizer.detect_steps"]
    assert exit_code(tiny(tmp_path / "run", *flags, "19")) == 1  # has 6 epochs to draw from
    assert capsys.readouterr().err == "error: The training data ended after 18 of 19 rehearsed steps in epoch 0.\n"
    assert exit_code(tiny(tmp_path / "other", *flags, "15")) == 1  # 5 epochs are enough, and the training is not
    assert capsys.readouterr().err == "error: The training data ended after 3 of the 4 steps of epoch 0.\n"


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(straight: dict[str, Path]) -> tuple[Config, nn.Module, Path]:
    folder = straight["epoch"]
    cfg = load_config(folder / "resolved.yaml")
    model = create_model(cfg, 4)
    model.load_state_dict(load_weights(folder / "last.pt"))
    return cfg, model.eval(), folder


def test_evaluation_is_the_mean_over_all_images(trained: tuple[Config, nn.Module, Path]) -> None:
    cfg, model, folder = trained
    data = build_data(cfg, rank=0, world_size=1, batch_size=4)
    batches = list(data.eval_batches())
    logits, targets = torch.cat([model(images) for images, _ in batches]), torch.cat([t for _, t in batches])
    assert len(targets) == data.eval_size == 6
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)  # classes that are thought likelier than the right one
    logged = metrics(folder)[-2]["data"]
    assert logged["eval.loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    assert logged["eval.top1"] == pytest.approx(100 * (ranks < 1).double().mean().item())
    assert logged["eval.top5"] == 100.0  # four classes
    ema = create_model(cfg, 4)
    ema.load_state_dict(load_checkpoint(folder / "last.pt")["ema"])
    loss = F.cross_entropy(torch.cat([ema.eval()(images) for images, _ in batches]), targets)
    assert logged["eval.ema_loss"] == pytest.approx(loss.item(), rel=1e-6)


class Fixed(nn.Module):
    """Ranks class 0 first, class 1 second and so on, whatever the image."""

    def forward(self, images: Tensor) -> Tensor:
        return -torch.arange(10.0).expand(len(images), 10)


def fixed_run(targets: list[int]) -> Any:
    batches = [(torch.zeros(len(part), 3, 8, 8), torch.tensor(part)) for part in (targets[:3], targets[3:]) if part]
    return Box(
        data=Box(eval_batches=lambda: iter(batches)),
        device=torch.device("cpu"),
        autocast=lambda: torch.autocast("cpu", enabled=False),
        world_size=1,
    )


def test_top_1_and_top_5_count_what_they_say() -> None:
    figures = evaluate(fixed_run([0, 4, 5, 9, 0, 1]), Fixed())
    assert figures["top1"] == pytest.approx(100 * 2 / 6)
    assert figures["top5"] == pytest.approx(100 * 4 / 6)
    mean = (0 + 4 + 5 + 9 + 0 + 1) / 6 + math.log(sum(math.exp(-k) for k in range(10)))
    assert figures["loss"] == pytest.approx(mean)
    assert evaluate(fixed_run([0, 4, 5, 9, 0, 1]), Fixed(), max_batches=1)["top1"] == pytest.approx(100 / 3)


def test_an_evaluation_set_without_images_is_a_failure() -> None:
    with pytest.raises(TrainingError, match="no image"):
        evaluate(fixed_run([]), Fixed())


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def make_loss(*overrides: str, mixed: bool = False, teacher: nn.Module | None = None) -> Loss:
    return Loss(load_config(overrides=overrides), mixed_targets=mixed, teacher=teacher)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Logits (6, 5), labels (6,), soft targets (6, 5) as mixup makes them."""
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 5, generator=draw) * 3, torch.tensor([0, 4, 2, 2, 1, 3])
    smooth = F.one_hot(labels, 5) * 0.9 + 0.02
    return logits, labels, 0.3 * smooth + 0.7 * smooth.flip(0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_label_smoothing_is_that_of_torch(smoothing: float, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _ = batch
    ours = make_loss(f"loss.smoothing={smoothing}")(None, logits, labels)
    torch.testing.assert_close(ours, nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, labels))


def test_mixed_targets_give_the_cross_entropy_of_soft_targets(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, soft = batch
    by_hand = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(make_loss(mixed=True)(None, logits, soft), by_hand)
    torch.testing.assert_close(make_loss(mixed=True)(None, logits, soft), nn.CrossEntropyLoss()(logits, soft))


def by_hand_bce(logits: Tensor, targets: Tensor) -> Tensor:
    p = logits.sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()


def test_binary_cross_entropy(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, soft = batch
    hard = F.one_hot(labels, 5).float()
    bce = "loss.bce=true"
    torch.testing.assert_close(
        make_loss(bce, "loss.smoothing=0.1")(None, logits, labels), by_hand_bce(logits, hard * 0.9 + 0.02)
    )
    torch.testing.assert_close(make_loss(bce, "loss.smoothing=0")(None, logits, labels), by_hand_bce(logits, hard))
    torch.testing.assert_close(
        make_loss(bce, "loss.smoothing=0.1", mixed=True)(None, logits, soft), by_hand_bce(logits, soft)
    )
    mixed = 0.3 * hard + 0.7 * hard.flip(0)  # without smoothing, as in DeiT III: every class in the image is present
    torch.testing.assert_close(
        make_loss(bce, "loss.smoothing=0", mixed=True)(None, logits, mixed), by_hand_bce(logits, (mixed > 0).float())
    )


class Teacher(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :5].cos() * 4


def test_distillation_is_that_of_deit(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    class_logits, labels, _ = batch
    images = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    token_logits = class_logits.flip(1) * 0.5
    teacher = Teacher()(images)
    base = nn.CrossEntropyLoss(label_smoothing=0.1)(class_logits, labels)

    def loss(*overrides: str) -> Tensor:
        values = [f"distillation.{override}" for override in overrides]
        return make_loss(*values, teacher=Teacher())(images, (class_logits, token_logits), labels)

    hard = F.cross_entropy(token_logits, teacher.argmax(1))
    torch.testing.assert_close(loss("type=hard", "alpha=0.3"), 0.7 * base + 0.3 * hard)
    for tau in (1.0, 3.0):
        p = (teacher / tau).softmax(1)
        kl = (p * (p.log() - (token_logits / tau).log_softmax(1))).sum() * tau**2 / (6 * 5)
        torch.testing.assert_close(loss("type=soft", "alpha=0.3", f"tau={tau}"), 0.7 * base + 0.3 * kl)
    torch.testing.assert_close(loss("type=soft", "alpha=0"), base)


def test_losses_are_in_float32_whatever_the_outputs_are(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _ = batch
    assert make_loss()(None, logits.bfloat16(), labels).dtype == torch.float32
    pair = (logits.bfloat16(), logits.bfloat16())
    loss = make_loss("distillation.type=hard", teacher=Teacher())(torch.zeros(6, 3, 2, 2), pair, labels)
    assert loss.dtype == torch.float32


DISTILLED = ["--model", "deit_tiny_distilled_patch16_224", "--teacher-model", "test_resnet", "--lr", "0.001"]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": timm.create_model("test_resnet", num_classes=4).state_dict()}, path)
    return path


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_distilled_model_trains(kind: str, teacher_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    runs: list[Run] = []
    monkeypatch.setattr(engine, "train_step", before_step(0, runs.append))
    flags = [*FULL, *DISTILLED, "--epochs", "1", "--distillation-type", kind, "--teacher-path", str(teacher_file)]
    train(tmp_path / "run", *flags)
    model, teacher = runs[0].model, runs[0].loss.teacher
    torch.manual_seed(0)
    before = create_model(runs[0].cfg, 4).state_dict()
    for name in ("head.weight", "head_dist.weight", "dist_token", "blocks.0.attn.qkv.weight"):
        assert not torch.equal(model.state_dict()[name], before[name]), name
    assert not teacher.training
    assert differences(dict(teacher.state_dict()), load_weights(teacher_file)) == []
    assert all(math.isfinite(loss) for loss in column(tmp_path / "run", "train.loss"))
    model.eval()
    images = torch.zeros(2, 3, 8, 8)
    assert model(images).shape == (2, 4)  # evaluation takes the mean of the two heads


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.name=deit_tiny_patch16_224"],
            r"Distillation needs a model with a distillation token; deit_tiny_\S+ has ",
        ),
        (["distillation.teacher_path=null"], "pass --teacher-path FILE"),
        (["distillation.teacher_model=resnet1000"], "no teacher model resnet1000 in timm"),
        (["distillation.teacher_path=nowhere.pth"], "There is no checkpoint nowhere.pth"),
        (
            ["distillation.teacher_model=test_vit"],
            "does not fit the teacher test_vit with 4 classes; check --teacher-model",
        ),
    ],
)
def test_distillation_says_what_it_lacks(overrides: list[str], words: str, teacher_file: Path) -> None:
    given = ["distillation.type=soft", f"distillation.teacher_path={teacher_file}", "model.img_size=8"]
    given += ["model.name=deit_tiny_distilled_patch16_224", "distillation.teacher_model=test_resnet"]
    given += ["model.patch_size=4", "model.kwargs={embed_dim: 32, depth: 1, num_heads: 2}"]
    cfg = load_config(overrides=[*given, *overrides])
    with pytest.raises(UserError, match=words):
        build_loss(cfg, create_model(cfg, 4), num_classes=4, mixed_targets=False, device=torch.device("cpu"))


def test_a_run_carried_by_fp8_logs_the_blocks_below_the_window(tmp_path: Path) -> None:
    def logged(folder: Path) -> list[dict[str, Any]]:
        return [line["data"] for line in read_metrics(folder) if "carrier.blocks_below_window" in line["data"]]

    carried = train(tmp_path / "fp8", "--quant.scheme", "mx", "--quant.carrier", "fp8")
    assert [data["carrier.blocks_below_window"] >= 0 for data in logged(carried)] == [
        True
    ] * 8  # of 2 epochs of 4 steps
    assert not logged(train(tmp_path / "bf16", "--quant.scheme", "mx"))


def test_a_compiled_run_trains_as_an_eager_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole, without a graph break; what the code generator makes of it is not tried: it takes a CPU minutes."""
    backends = []

    def compile_traced(model: nn.Module) -> None:
        model._compiled_call_impl = torch.compile(model._call_impl, backend="aot_eager", fullgraph=True)
        backends.append("aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_traced)
    flags = ["--quant.scheme", "mx", "--stabilizer.kind", "qema", "--drop-path", "0", "--epochs", "1"]
    runs = [train(tmp_path / "eager", *flags), train(tmp_path / "compiled", *flags, "--compile")]
    assert backends == ["aot_eager"]
    eager, compiled = (load_checkpoint(run / "last.pt") for run in runs)
    assert not differences(eager["model"], compiled["model"])
