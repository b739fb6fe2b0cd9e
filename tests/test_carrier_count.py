"""`blocks_below_window`: how many blocks of a run's training the fp8 carrier could not hold exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import column, train
from stabilizer_helpers import captured
from torch import nn

import engine
import main
from engine import Run
from quantization import QuantLinear, build_recipe
from record.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("in_this_process")

FP8 = ["--quant.scheme", "mx", "--quant.carrier", "fp8", "--lr", "1e-12", "--unscale-lr", "--weight-decay", "0"]
FP8 += ["--warmup-lr", "0", "--min-lr", "0"]


def with_small_rows(run: Run) -> None:
    """Half the rows of one weight 30 octaves below the others."""
    with torch.no_grad():
        run.model.blocks[0].mlp.fc1.weight[:32] *= 2.0**-30


def a_run(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> Run:
    run = captured(monkeypatch, folder, *FP8, *flags)
    with_small_rows(run)
    run.wrapped.train()
    return run


def count(run: Run) -> int:
    return int(run.blocks_below_window())


def test_a_layer_counts_its_training_passes_alone() -> None:
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(64, 64), build_recipe(carrier="fp8"))
    with torch.no_grad():
        layer.weight[:32] *= 2.0**-30
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer(x)
    once = int(layer.blocks_below_window)
    assert once == 32 * 2 + 64  # two blocks in each small row, and those along columns of these rows
    layer(x)
    assert int(layer.blocks_below_window) == 2 * once
    layer.eval()(x)
    assert int(layer.blocks_below_window) == 2 * once
    other = QuantLinear.from_linear(nn.Linear(64, 64), build_recipe(carrier="fp8"))
    assert int(other.blocks_below_window) == 0 and "blocks_below_window" not in other.state_dict()
    assert QuantLinear.from_linear(nn.Linear(64, 64), build_recipe()).blocks_below_window is None


def test_evaluations_and_rehearsals_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(monkeypatch, tmp_path / "run")
    batches = run.upcoming_batches(epochs=2)
    assert count(run) == 0
    engine.train_step(run, batches)
    once = count(run)
    assert once > 0
    engine.evaluate(run, run.model)
    assert count(run) == once
    run.wrapped.train()
    run.rehearse(3, lambda: None)
    assert count(run) == once
    engine.train_step(run, run.upcoming_batches())
    assert count(run) > once


def test_a_run_starts_at_zero_whatever_ran_before_in_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for name in ("a", "b"):
        run = a_run(monkeypatch, tmp_path / name)
        engine.train_step(run, run.upcoming_batches())
        counts.append(count(run))
    assert counts[0] == counts[1] > 0


def test_a_resumed_run_goes_on_with_its_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = main.build_run

    def with_rows(*args: object, **kwargs: object) -> Run:
        run = build(*args, **kwargs)
        with_small_rows(run)
        return run

    monkeypatch.setattr(main, "build_run", with_rows)
    straight = train(tmp_path / "straight", *FP8)
    train(tmp_path / "resumed", *FP8, "--epochs", "1")
    saved = load_checkpoint(tmp_path / "resumed" / "last.pt")["blocks_below_window"]
    train(tmp_path / "resumed", *FP8, "--resume", "auto")
    counts = [column(folder, "carrier.blocks_below_window") for folder in (straight, tmp_path / "resumed")]
    assert counts[0] == counts[1] == sorted(set(counts[0]))
    assert saved == counts[0][3] > 0


def test_with_another_carrier_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(tmp_path / "run", "--quant.scheme", "mx", "--epochs", "1")
    assert captured(monkeypatch, tmp_path / "other", "--quant.scheme", "mx").blocks_below_window() is None
    assert "blocks_below_window" not in load_checkpoint(folder / "last.pt")
