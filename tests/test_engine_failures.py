"""What ends a run: values that are not finite, which are named, and data that ends early."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FULL, Box, before_step, break_weight, differences, exit_code, replace, tiny
from quick import some
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import engine
from datasets import Data, build_data
from engine import Run
from record.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("in_this_process")


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


def names(error: str, named: str, last: Path) -> bool:
    """Whether this is all that is said of `named`, broken in step 2 of epoch 1."""
    number = r"(nan|inf|[\d.]+)"
    sentence = (
        rf"error: Step 2 of epoch 1: the loss is {number} and the gradient norm {number}; the first that is not finite "
        rf"is {re.escape(named)}; the last good checkpoint is {re.escape(str(last))}\.\n"
    )
    return re.fullmatch(sentence, error) is not None


@pytest.mark.parametrize("quant", some(["mx", "none"], every=2))
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

    replace(monkeypatch, engine.train_step, before_step(6, act))
    assert exit_code(tiny(tmp_path / "run", "--quant.scheme", quant)) == 1
    last = tmp_path / "run" / "last.pt"
    assert names(capsys.readouterr().err, named, last)
    assert last.read_bytes() == saved[0]
    state = load_checkpoint(last)
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())


def test_the_first_step_may_fail_before_there_is_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = build_data

    def broken(*args: Any, **kwargs: Any) -> Any:
        data = build(*args, **kwargs)
        break_input(Box(data=data))
        return data

    replace(monkeypatch, build_data, broken)
    assert exit_code(tiny(tmp_path / "run")) == 1
    err = capsys.readouterr().err
    assert re.search(r"Step 0 of epoch 0: the loss is nan .*; the first that is not finite is the input; ", err)
    assert err.endswith(f"; there is no checkpoint in {tmp_path / 'run'} yet.\n")


@pytest.mark.parametrize("kept", [False, True], ids=["drawn again", "kept"])
def test_a_failed_step_is_repeated_on_what_it_was_fed(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def act(run: Run) -> None:
        if kept:
            replace(monkeypatch, IterableDataset, object)  # as if they came of a stream
            monkeypatch.setattr(run.data, "train_batches", None)
        run.model.patch_embed.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].clone()))
        run.model.head.register_forward_hook(lambda _m, _i, output: seen.append(output.detach().clone()))
        break_gradient_of_parameter(run)

    replace(monkeypatch, engine.train_step, before_step(2, act))
    assert exit_code(tiny(tmp_path / "run", *FULL, "--batch-size", "8")) == 1
    first, again = seen[:4], seen[4:]  # the input and the output of two micro-batches
    assert differences(first, again) == []
    assert differences(first[:2], first[2:])


def test_a_step_that_breaks_a_weight_leaves_the_checkpoint_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def overflow(run: Run) -> None:  # loss and gradients of this step are finite, and there may be no other step
        run.optimizer.register_step_post_hook(lambda *_: break_weight(run))

    replace(monkeypatch, engine.train_step, before_step(2, overflow))
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
    monkeypatch.setattr(Data, "train_batches", lambda *_args, **_kwargs: iter(()))
    assert exit_code(tiny(tmp_path / "run")) == 1
    assert capsys.readouterr().err == "error: The training data ended after 0 of the 4 steps of epoch 0.\n"


def test_data_that_ends_early_in_a_rehearsal_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a stream may that has fewer images than it says: here 3 of the 4 batches of every epoch."""
    build = build_data

    def short(*args: Any, **kwargs: Any) -> Any:
        data = build(*args, **kwargs)
        batches = data.train_batches
        data.train_batches = lambda epoch, start=0: itertools.islice(batches(epoch, start), max(3 - start, 0))
        return data

    replace(monkeypatch, build_data, short)
    flags = ["--quant.scheme", "mx", "--model.kwargs", "{embed_dim: 16, depth: 1, num_heads: 2}"]
    flags += ["--stabilizer.kind", "qramping", "--stabilizer.detect_steps"]
    assert exit_code(tiny(tmp_path / "run", *flags, "19")) == 1  # has 6 epochs to draw from
    assert capsys.readouterr().err == "error: The training data ended after 18 of 19 rehearsed steps in epoch 0.\n"
    assert exit_code(tiny(tmp_path / "other", *flags, "15")) == 1  # 5 epochs are enough, and the training is not
    assert capsys.readouterr().err == "error: The training data ended after 3 of the 4 steps of epoch 0.\n"
