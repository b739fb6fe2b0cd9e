"""Freeze: its schedule and what it freezes, by hand, on planted weights, and in a run on a tiny model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import before_step, metrics, replace, train
from stabilizer_helpers import (
    FLAGS,
    GRID,
    SMALL,
    block,
    build,
    last,
    layer_of,
    nearest_code_by_hand,
    normal,
    put,
    scale_by_hand,
)
from torch import Tensor

import engine
from engine import Run

pytestmark = pytest.mark.usefixtures("in_this_process")


def test_the_threshold_is_off_for_a_quarter_and_then_falls_by_a_cosine() -> None:
    freeze = build("freeze", layer_of(block()), total=200)
    thresholds = [freeze.threshold(step) for step in range(201)]
    assert thresholds[:50] == [math.inf] * 50
    by_hand = [0.01 + 0.09 * (1 + math.cos(math.pi * (step - 50) / 150)) / 2 for step in range(50, 201)]
    assert thresholds[50:] == pytest.approx(by_hand, rel=1e-12)
    assert (thresholds[50], thresholds[125], thresholds[200]) == (
        pytest.approx(0.1),
        pytest.approx(0.055),
        pytest.approx(0.01),
    )
    other = build("freeze", layer_of(block()), total=200, start=0.5, threshold_start=0.4, threshold_end=0.2)
    assert (other.threshold(99), other.threshold(100), other.threshold(200)) == (math.inf, 0.4, pytest.approx(0.2))


def frozen_at(values: Sequence[float], **keys: Any) -> list[int]:
    """The steps (at most one) at which weight (0, 3) is frozen while an optimizer leads it through `values`."""
    layer = layer_of(block(w3=values[0]))
    freeze = build("freeze", layer, **keys)
    steps = []
    for step, value in enumerate(values[1:]):
        put(layer, 3, value)
        freeze.after_step(step)
        if freeze.state["0"]["frozen"][0, 3] and not steps:
            steps.append(step)
    assert freeze.state["0"]["frozen"].sum() == len(steps)  # and no other
    return steps


ON = {"start": 0, "threshold_start": 0.15, "threshold_end": 0.15}


def test_a_planted_flipper_is_frozen_and_a_drifter_is_not() -> None:
    flipper = [0.7, 0.8] * 20  # codes 1 and 2
    drifter = [0.1 * step for step in range(40)]  # codes 0 to 6, never back
    restless = [0.6 + 0.1 * (step % 2) for step in range(40)]  # moves as the flipper does, within one cell
    # A change at every step, the second of them the first to be opposite: f = .1, .19 > .15.
    assert frozen_at(flipper, momentum=0.1, **ON) == [2]
    assert frozen_at(drifter, momentum=0.1, **ON) == []
    assert frozen_at(restless, momentum=0.1, **ON) == []
    # f converges to how often it flips: each fourth step is .25, which exceeds .2 and not .3.
    seldom = [0.7, 0.7, 0.7, 0.7, 0.8, 0.8, 0.8, 0.8] * 30
    assert frozen_at(seldom, momentum=0.02, total=300, **{**ON, "threshold_start": 0.2, "threshold_end": 0.2})
    assert not frozen_at(seldom, momentum=0.02, total=300, **{**ON, "threshold_start": 0.3, "threshold_end": 0.3})


def test_the_first_change_has_no_direction_to_be_opposite_to() -> None:
    sensitive = {"start": 0, "momentum": 0.1, "threshold_start": 0.05, "threshold_end": 0.05}
    for sign in (1, -1):  # first upwards, and first downwards
        assert frozen_at([sign * 0.7, sign * 0.8, sign * 0.8, sign * 0.8], **sensitive) == []
        assert frozen_at([sign * 0.7, sign * 0.8, sign * 1.4, sign * 2.9], **sensitive) == []  # the same direction
        assert frozen_at([sign * 0.7, sign * 0.8, sign * 0.8, sign * 0.7], **sensitive) == [2]  # a pause between
        assert frozen_at([sign * 0.7, sign * 2.8, sign * 1.4], **sensitive) == [1]  # by more than one code
    assert frozen_at([0.2, 0.3, -0.3], **sensitive) == [1]  # over zero: codes 0, 1, -1
    assert frozen_at([-0.3, 0.2, 0.3], **sensitive) == []  # codes -1, 0, 1


def test_nothing_is_frozen_before_a_quarter_of_training() -> None:
    flipper = [0.7, 0.8] * 20
    assert frozen_at(flipper, total=40, momentum=0.5) == [10]  # tracked before
    assert frozen_at(flipper, total=40, momentum=0.5, start=0.5) == [20]
    assert frozen_at(flipper, total=40, momentum=0.5, start=0) == [1]


def test_a_frozen_weight_is_its_average_code_on_the_grid_times_its_scale_of_that_moment_for_good() -> None:
    """Weight 3 goes between -2.4 S and -2.6 S, codes -4 and -5. S is doubled in the step that freezes it: code -2."""
    momentum, unit = 0.25, 2.0**-5
    layer = layer_of(block(w3=-2.4) * unit)
    freeze = build("freeze", layer, momentum=momentum, start=0, threshold_start=0.5, threshold_end=0.5)
    average, frequency = -4.0, 0.0
    for step, (code, oscillates) in enumerate([(-5, 0), (-4, 1), (-5, 1), (-2, 1)]):
        put(layer, 3, (-2.6 if step % 2 == 0 else -2.4) * unit)
        if step == 3:
            put(layer, 0, 12.0 * unit)
        assert not freeze.state["0"]["frozen"].any()
        freeze.after_step(step)
        average = momentum * code + (1 - momentum) * average
        frequency = momentum * oscillates + (1 - momentum) * frequency
        assert freeze.state["0"]["average"][0, 3].item() == pytest.approx(average)
        assert freeze.state["0"]["frequency"][0, 3].item() == pytest.approx(frequency)
    assert freeze.state["0"]["frozen"].nonzero().tolist() == [[0, 3]]
    assert (round(average), round(frequency, 3)) == (-4, 0.578)
    value = -2.0 * (2 * unit)  # magnitude number 4 is 2; of its code alone it would be -1 * 2 S, of the old S -2 S
    assert layer.weight[0, 3].item() == value
    for step, (other, largest) in enumerate([(0.0, 12.0), (9.0, 12.0), (-2.6, 6.0), (3.0, 0.5)]):
        put(layer, 3, other * unit)  # the optimizer moves it, and the scale changes again
        put(layer, 0, largest * unit)
        freeze.after_step(4 + step)
        assert layer.weight[0, 3].item() == value
        assert layer.weight[0, 0].item() == largest * unit  # the control: another weight goes where it is put


def test_freeze_on_random_walks_is_its_definition_weight_by_weight() -> None:
    total, momentum = 60, 0.08
    layer = layer_of(normal(2, 64))
    freeze = build("freeze", layer, total=total, momentum=momentum, threshold_start=0.4, threshold_end=0.25)

    def codes(weight: Tensor) -> tuple[list[list[int]], list[list[float]]]:
        scales = [[scale_by_hand(row[j // 32 * 32 : j // 32 * 32 + 32]) for j in range(64)] for row in weight.tolist()]
        latents = zip(weight.tolist(), scales, strict=True)
        return [[nearest_code_by_hand(w / s) for w, s in zip(*row, strict=True)] for row in latents], scales

    weight = layer.weight.detach().clone()
    last_code, _ = codes(weight)
    cells = list(itertools.product(range(2), range(64)))
    direction, f = dict.fromkeys(cells, 0), dict.fromkeys(cells, 0.0)
    e, frozen = {(i, j): float(last_code[i][j]) for i, j in cells}, {}
    for step in range(total):
        moved = layer.weight.detach() + 0.15 * normal(2, 64, seed=step + 1)
        with torch.no_grad():
            layer.weight.copy_(moved)
        freeze.after_step(step)

        for cell, value in frozen.items():
            moved[cell] = value
        code, scales = codes(moved)
        threshold = math.inf
        if step >= 15:
            threshold = 0.25 + 0.15 * (1 + math.cos(math.pi * (step - 15) / 45)) / 2
        for i, j in cells:
            change = (code[i][j] > last_code[i][j]) - (code[i][j] < last_code[i][j])
            f[i, j] = momentum * (change * direction[i, j] < 0) + (1 - momentum) * f[i, j]
            e[i, j] = momentum * code[i][j] + (1 - momentum) * e[i, j]
            direction[i, j] = change or direction[i, j]
            if f[i, j] > threshold and (i, j) not in frozen:
                frozen[i, j] = math.copysign(GRID[abs(round(e[i, j]))], e[i, j]) * scales[i][j]
        for cell, value in frozen.items():
            moved[cell] = value
        last_code = code
        state = freeze.state["0"]
        assert torch.equal(layer.weight, moved), step
        assert {(i, j) for i, j in state["frozen"].nonzero().tolist()} == set(frozen), step
        assert freeze.figures()["frozen_share"].item() == pytest.approx(len(frozen) / 128)
        torch.testing.assert_close(state["frequency"].flatten(), torch.tensor([f[cell] for cell in cells]))
        torch.testing.assert_close(state["average"].flatten(), torch.tensor([e[cell] for cell in cells]))
    assert 20 < len(frozen) < 108


def test_frozen_weights_of_a_run_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history: list[dict[str, tuple[Tensor, Tensor, Tensor]]] = []

    def watch(run: Run) -> None:
        after_step = run.stabilizer.after_step

        def note(step: int) -> None:
            wanted = {name: layer.weight.detach().clone() for name, layer in run.stabilizer.layers.items()}
            after_step(step)
            now = {name: layer.weight.detach().clone() for name, layer in run.stabilizer.layers.items()}
            history.append({n: (wanted[n], now[n], run.stabilizer.state[n]["frozen"].clone()) for n in now})

        run.stabilizer.after_step = note

    replace(monkeypatch, engine.train_step, before_step(0, watch))
    folder = train(tmp_path / "run", *SMALL, *FLAGS["freeze"])
    state = last(folder)
    for name, saved in state["stabilizer"].items():
        end = state["model"][f"{name}.weight"]
        assert torch.equal(end[saved["frozen"]], saved["value"][saved["frozen"]])
        for (_, before, was), (wanted, now, _) in itertools.pairwise(step[name] for step in history):
            assert torch.equal(now[was], before[was])
            assert torch.equal(now[was], end[was])
            assert not was.any() or not torch.equal(wanted[was], before[was])  # the optimizer did move them
    shares = [line["data"]["stabilizer.frozen_share"] for line in metrics(folder) if len(line["step"]) == 2]
    assert shares[:2] == [0.0, 0.0] and shares == sorted(shares) and 0 < shares[-1] < 0.5
    assert len(set(shares)) > 3
