"""What a resumed run takes from its checkpoint: the state of any of timm's optimizers, whole, and of a possible run."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import exit_code, tiny, train
from record_helpers import refused
from timm.optim import create_optimizer_v2
from torch import nn

import report
from config import UserError
from record.checkpoint import load_checkpoint, save_checkpoint
from record.lines import read_every_line
from record.manifest import read_manifest
from record.metrics import read_metrics
from record.recordings import read_recording
from record.restore import restore_optimizer
from record.weights import restore_model

pytestmark = pytest.mark.usefixtures("in_this_process")

# Factored moments, moments of a layer, states of different kinds in one model, one optimizer around another.
OPTIMIZERS = ["adamw", "adafactor", "novograd", "muon", "lookahead_adamw", "lion", "sgd", "lamb", "madgrad", "adopt"]


def stepped(name: str) -> torch.optim.Optimizer:
    """One that has taken two steps on a small model of every kind of parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(8, 16), nn.LayerNorm(16))
    optimizer = create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.05)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_kind_of_optimizer_is_restored(name: str, tmp_path: Path) -> None:
    saved, other = stepped(name).state_dict(), stepped(name)
    save_checkpoint(tmp_path / "last.pt", {"model": {}, "optimizer": saved})
    held = load_checkpoint(tmp_path / "last.pt")["optimizer"]
    before = torch.random.get_rng_state()
    assert restore_optimizer(other, held, "last.pt", opt=name, steps=2) == []
    assert torch.equal(torch.random.get_rng_state(), before)
    assert other.state_dict()["state"].keys() == saved["state"].keys()


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lookahead_adamw"])
def test_every_entry_left_out_of_a_state_is_missed(name: str) -> None:
    for entry in [entry for entry in stepped(name).state_dict()["state"][0] if entry != "step"]:
        saved = stepped(name).state_dict()
        for entries in saved["state"].values():
            entries.pop(entry, None)
        restore = lambda saved=saved: restore_optimizer(stepped(name), saved, "last.pt", opt=name, steps=2)  # noqa: E731
        assert f"state.0.{entry} is missing" in refused(restore)


def test_a_state_that_parameters_lack_is_told_and_means_of_squares_are_not_negative() -> None:
    saved = stepped("adamw").state_dict()
    del saved["state"][3]
    assert restore_optimizer(stepped("adamw"), saved, "last.pt", opt="adamw", steps=2) == [3]
    saved["state"][1]["exp_avg_sq"] -= 1
    message = refused(lambda: restore_optimizer(stepped("adamw"), saved, "last.pt", opt="adamw", steps=2))
    assert "state.1.exp_avg_sq holds negative values" in message


def test_weights_beyond_the_models_precision_are_refused() -> None:
    model = nn.Linear(2, 2)
    weights = {name: value.double() * 1e300 for name, value in model.state_dict().items()}
    assert "weight holds values that are not finite, as float32" in refused(
        lambda: restore_model(model, weights, "last.pt")
    )
    assert all(math.isfinite(value) for value in model.weight.flatten().tolist())


def without(number: int) -> Callable[[dict[str, Any]], object]:
    return lambda state: state["optimizer"]["state"].pop(number)


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (
            lambda state: state.update(ema=None),
            2,
            "last.pt holds no moving average of the weights, which its run keeps",
        ),
        (lambda state: state.update(passes=0), 2, "passes is 0 at epoch 1, step 0"),
        (without(3), 0, "has no optimizer state of 1 of 32 parameters (number 3 is the first)"),
    ],
)
def test_what_a_run_has_left_is_not_replaced_in_silence(
    change: Callable[[dict[str, Any]], object], code: int, said: str, half: Path, tmp_path: Path, capsys: Any
) -> None:
    state = load_checkpoint(half)
    state.pop("format")
    change(state)
    save_checkpoint(tmp_path / "last.pt", state)
    capsys.readouterr()
    flags = ["--model-ema", "--resume", str(tmp_path / "last.pt")]
    assert exit_code(tiny(tmp_path / "run", *flags)) == code
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run after the first of two epochs."""
    return train(tmp_path_factory.mktemp("half"), "--model-ema", "--epochs", "1") / "last.pt"


def test_an_optimizer_whose_state_cannot_be_saved_is_refused_before_it_trains(tmp_path: Path, capsys: Any) -> None:
    assert exit_code(tiny(tmp_path / "run", "--opt", "adafactorbv")) == 2
    assert "The optimizer adafactorbv cannot be made: its state" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--eval"]])
def test_use_ema_without_a_file_it_is_about_is_refused(
    flags: list[str], half: Path, tmp_path: Path, capsys: Any
) -> None:
    resume = ["--resume", str(half)] if flags else []
    assert exit_code(tiny(tmp_path / "run", "--use-ema", *flags, *resume)) == 2
    assert "error: --use-ema" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda path: read_metrics(path.parent), "metrics.log"),
        (lambda path: read_manifest(path.parent), "manifest.json"),
        (read_recording, "epoch_0001.npz"),
        (read_every_line, "study.csv"),
    ],
)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(
    read: Callable[[Path], Any], name: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises((UserError, OSError), match="no ordinary file"):
        read(tmp_path / name)


def test_a_configuration_that_says_nothing_is_not_that_of_a_run_in_full_precision(
    half: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(half.parent, tmp_path / "run")
    (tmp_path / "run" / "resolved.yaml").write_text("")
    with pytest.raises(SystemExit) as end:
        report.main(["curves", str(tmp_path / "run"), "--png", str(tmp_path / "out.png")])
    assert end.value.code == 2
    assert "resolved.yaml is no resolved configuration: model is missing" in capsys.readouterr().err
