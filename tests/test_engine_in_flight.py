"""Steps whose figures are read one step later, so that the host does not wait for the device.

A GPU's fused AdamW makes a run do that; torch has it for a CPU too, so these tests need no GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FULL, METHODS, before_step, differences, exit_code, outcome, replace, stop_itself, tiny, train
from quick import some
from test_engine_failures import BROKEN, names
from torch import Tensor

import engine
from engine import Run
from record.checkpoint import load_checkpoint
from training.build import build_optimizer

pytestmark = pytest.mark.usefixtures("in_this_process")


def use_fused_optimizer(patch: pytest.MonkeyPatch, deferred: bool) -> None:
    """Runs get torch's fused AdamW on the CPU, with or without `found_inf`."""
    build = build_optimizer

    def fused(*args: Any) -> torch.optim.Optimizer:
        optimizer = build(*args)
        for group in optimizer.param_groups:
            group |= {"fused": True, "foreach": False}
        if deferred:
            optimizer.found_inf = torch.zeros(())
        return optimizer

    replace(patch, build_optimizer, fused)


def note_what_is_late(patch: pytest.MonkeyPatch) -> list[bool]:
    """For every step whether its figures were still to be read when it had been launched."""
    late: list[bool] = []
    step = engine.train_step

    def note(run: Run, batches: Any) -> dict[str, float]:
        figures = step(run, batches)
        late.append(run.in_flight is not None)
        return figures

    replace(patch, engine.train_step, note)
    return late


@pytest.mark.parametrize("method", some([*METHODS, "full"], every=2))
def test_a_run_is_the_same_bit_for_bit_with_its_figures_read_late(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = ["--data.num_images", "48", "--model.kwargs", "{embed_dim: 32, depth: 1, num_heads: 2}"]
    flags = FULL if method == "full" else ["--quant.scheme", "mx", *METHODS[method], *shallow]  # 2 epochs of 3 steps
    results, late = [], []
    for deferred in (False, True):
        with monkeypatch.context() as patch:
            use_fused_optimizer(patch, deferred)
            late.append(note_what_is_late(patch))
            run = train(tmp_path / str(deferred), *flags, "--log-every", "3", "--clip-grad", "1")
            results.append(outcome(run))
    assert differences(*results) == []
    assert not any(late[0])
    # The first step of a run, and the first that it rehearses, waits, since there are no other figures to show.
    assert len(late[1]) == len(late[0]) and not late[1][0]
    assert late[1].count(False) == (2 if method == "qramping" else 1)


@pytest.mark.parametrize(("action", "named"), some(BROKEN.values(), every=2, many=True), ids=BROKEN.keys())
@pytest.mark.parametrize(
    "flags",
    some([METHODS["qema"], ["--stabilizer.kind", "qramping", "--stabilizer.detect_steps", "2"]], every=2),
    ids=["qema", "qramping"],
)
def test_a_step_that_fails_is_named_a_step_later_and_changes_no_weight(
    action: Callable[[Run], None],
    named: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs: list[Run] = []
    weights: list[dict[str, Tensor]] = []

    def act(run: Run) -> None:
        action(run)
        runs.append(run)
        weights.append({name: p.detach().clone() for name, p in run.model.named_parameters()})

    use_fused_optimizer(monkeypatch, deferred=True)
    replace(monkeypatch, engine.train_step, before_step(6, act))
    late = note_what_is_late(monkeypatch)
    assert exit_code(tiny(tmp_path / "run", "--quant.scheme", "mx", *flags, "--log-every", "9")) == 1
    assert late[-1]  # the step that failed had been launched, and its failure was seen in the next one
    last = tmp_path / "run" / "last.pt"
    assert names(capsys.readouterr().err, named, last)
    for name, parameter in runs[0].model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[0][name], rtol=0, atol=0, equal_nan=True)


def test_without_the_guard_a_failed_step_would_spoil_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control: the optimizer is not told, and what is found first is a parameter that it broke itself."""

    def act(run: Run) -> None:
        BROKEN["gradient of a parameter"][0](run)
        run.optimizer.register_step_pre_hook(lambda optimizer, *_: setattr(optimizer, "found_inf", torch.zeros(())))

    use_fused_optimizer(monkeypatch, deferred=True)
    replace(monkeypatch, engine.train_step, before_step(6, act))
    assert exit_code(tiny(tmp_path / "run", "--quant.scheme", "mx", "--log-every", "9")) == 1
    assert "the first that is not finite is the parameter " in capsys.readouterr().err


def test_a_stopped_run_saves_the_step_after_the_signal_and_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fused_optimizer(monkeypatch, deferred=True)
    straight = train(tmp_path / "straight", *FULL)
    with monkeypatch.context() as patch:
        replace(patch, engine.train_step, before_step(5, stop_itself))
        assert exit_code(tiny(tmp_path / "run", *FULL, "--log-every", "9")) == 128 + 15
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 3)  # step 5 has been launched when it is heard, and step 6 ends it
    train(tmp_path / "run", *FULL, "--resume", "auto")
    assert differences(outcome(straight)["last.pt"], outcome(tmp_path / "run")["last.pt"]) == []


def test_a_checkpoint_of_another_device_is_resumed_with_this_one_s_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        replace(patch, engine.train_step, before_step(5, stop_itself))
        assert exit_code(tiny(tmp_path / "run")) == 128 + 15
    (group, *_) = load_checkpoint(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"]
    assert not group["fused"]
    use_fused_optimizer(monkeypatch, deferred=True)
    late = note_what_is_late(monkeypatch)
    train(tmp_path / "run", "--resume", "auto", "--log-every", "9")
    assert late == [False, True]
    assert load_checkpoint(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"][0]["fused"]


def test_nothing_is_recorded_of_an_epoch_whose_last_step_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fused_optimizer(monkeypatch, deferred=True)
    replace(monkeypatch, engine.train_step, before_step(7, BROKEN["gradient of a parameter"][0]))
    flags = ["--quant.scheme", "mx", "--probes", "--probes.steps", "2", "--log-every", "9"]
    assert exit_code(tiny(tmp_path / "run", *flags)) == 1
    assert [path.name for path in sorted((tmp_path / "run" / "probes").iterdir())] == ["epoch_0001.npz"]


def test_the_images_of_a_step_that_was_launched_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn again where the step turns out to have failed."""
    alive: list[int] = []
    drawn: list[weakref.ref[Tensor]] = []

    def watch(run: Run) -> None:
        batches = run.data.train_batches

        def noted(*args: Any, **kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
            for images, targets in batches(*args, **kwargs):
                drawn.append(weakref.ref(images))
                yield images, targets

        run.data.train_batches = noted
        run.optimizer.register_step_pre_hook(lambda *_: alive.append(sum(ref() is not None for ref in drawn)))

    use_fused_optimizer(monkeypatch, deferred=True)
    replace(monkeypatch, engine.train_step, before_step(0, watch))
    late = note_what_is_late(monkeypatch)
    train(tmp_path / "run", "--log-every", "9", "--batch-size", "4")
    assert any(late) and len(drawn) >= 28  # eight steps of four micro-batches, but for what was under way at the start
    assert max(alive) <= 3  # the present one, the one ahead on the device, the one from the loader
