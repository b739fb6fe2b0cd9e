"""Q-Ramping's detector: rehearsals that leave no trace, planted oscillations, when it detects."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PLAIN, differences, metrics, replace, train
from stabilizer_helpers import FLAGS, SMALL, block, build, captured, last, layer_of, stabilized
from torch import Tensor, nn

import engine
from engine import Run
from quantization.stabilizers import QRampingAdamW
from quantization.stabilizers.qramping import periods
from training.graphs import Pass

pytestmark = pytest.mark.usefixtures("in_this_process")


def generators() -> dict[str, Any]:
    name, *numpy = np.random.get_state()
    return {"python": random.getstate(), "numpy": [name, numpy[0].tolist(), *numpy[1:]], "torch": torch.get_rng_state()}


def everything(run: Run) -> dict[str, Any]:
    """All that a rehearsal must leave as it was."""
    rates = [group["lr"] for group in run.optimizer.param_groups]
    gradients = [p.grad for p in run.model.parameters()]
    place = [run.global_step, run.epoch, run.step, run.data.corrupt, run.model.training, run.figures]
    return copy.deepcopy(
        {**run.state_dict(), "rates": rates, "gradients": gradients, "place": place, "generators": generators()}
    )


def steps_of(run: Run, count: int) -> list[Any]:
    """Train for `count` steps within the epoch: the figures, the noise and the random state of each."""
    batches, found = run.upcoming_batches(), []
    for _ in range(count):
        figures = engine.train_step(run, batches)
        found.append([figures, run.model.noise.state.clone(), generators()])
    return found


@pytest.mark.parametrize("kind", ["qramping", "qema"])
def test_a_rehearsal_puts_everything_back_bit_for_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-epoch, amid accumulations, for more steps than this epoch and the next have; with unreadable images."""
    runs = []
    for name in ("rehearsing", "not"):
        run = captured(monkeypatch, tmp_path / name, *SMALL, *FLAGS[kind])

        def unreadable(*args: Any, batches: Any = run.data.train_batches, run: Run = run, **kwargs: Any) -> Any:
            for batch in batches(*args, **kwargs):
                run.data.corrupt += 1
                yield batch

        run.data.train_batches = unreadable
        if kind == "qramping":
            run.optimizer.set_periods([torch.arange(p.numel()).view(p.shape) % 4 + 1 for p in run.stabilizer.weights])
        steps_of(run, 2)
        runs.append(run)
    run, twin = runs
    before = everything(run)
    seen: list[list[str]] = []
    run.rehearse(7, lambda: seen.append(differences(before, everything(run))))
    assert differences(before, everything(run)) == []
    assert len(seen) == 7
    for found in seen:  # the control: the rehearsed steps change all of it
        for part in ("/model/", "/ema/", "/optimizer/", "/meter/", "/rates/", "/place/", "/generators/torch"):
            assert any(where.startswith(part) for where in found), part
    names = [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    shadows = [where for where in seen[0] if where.startswith("/model/") and where.endswith("shadow")]
    assert shadows == ([f"/model/{name}.shadow" for name in names] if kind == "qema" else [])
    if kind == "qramping":  # and a detection its accumulations and periods
        assert before["optimizer"]["ramping"]["count"].any()
        run.stabilizer.detect(run)
        assert differences(before, everything(run)) == []
    # What follows is what follows without it.
    run.data.corrupt = twin.data.corrupt
    assert differences(steps_of(twin, 2), steps_of(run, 2)) == []
    a, b = everything(twin), everything(run)
    del a["config"], b["config"]
    assert differences(a, b) == []


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, Any]]:
    """Of every forward pass of a run, by its position: batch, noise and generators after it; [of the training itself,
    of rehearsals]. A position rehearsed twice must be the same twice."""
    passes: list[dict[int, Any]] = [{}, {}]
    rehearse, forward_backward = Run.rehearse, engine.forward_backward
    rehearsing: list[bool] = []

    def note_rehearsal(run: Run, *args: Any) -> None:
        rehearsing.append(True)
        rehearse(run, *args)
        rehearsing.clear()

    def note(run: Run, model: nn.Module, images: Tensor, targets: Tensor, position: int, *which: Pass) -> Tensor:
        loss = forward_backward(run, model, images, targets, position, *which)
        this = [images.clone(), targets.clone(), run.model.noise.state.clone(), generators()]
        before = passes[len(rehearsing)].setdefault(position, this)
        assert differences(before, this) == [], position
        return loss

    monkeypatch.setattr(Run, "rehearse", note_rehearsal)
    replace(monkeypatch, engine.forward_backward, note)
    return passes


def test_detection_with_periods_forced_to_1_leaves_no_trace(
    recorded: list[dict[int, Any]], straight: Callable[[str], Path], tmp_path: Path
) -> None:
    """Detections of 5 steps in epochs of 4, at steps 0, 3, 6: they go on into the next epochs and beyond the last."""
    plain = train(tmp_path / "plain", *SMALL)
    trained, rehearsed = ({**passes} for passes in recorded)
    assert (sorted(trained), rehearsed) == (list(range(8)), {})
    for passes in recorded:
        passes.clear()
    flags = stabilized("qramping", k1=0.5, k2=0, detect_steps=5, update_period=3)
    ramped = train(tmp_path / "ramped", *SMALL, *flags)
    assert (sorted(recorded[0]), sorted(recorded[1])) == (list(range(8)), list(range(11)))

    # The training's own batches and draws are those of a plain run, and those rehearsed are those that come next.
    assert differences(trained, recorded[0]) == []
    assert differences(trained, {position: recorded[1][position] for position in range(8)}) == []
    everywhere = {**recorded[0], **recorded[1]}
    assert len({value[0].sum().item() for value in everywhere.values()}) == 11  # the control: no two are alike

    one, other = last(plain), last(ramped)
    ramping = other["optimizer"].pop("ramping")
    assert ramping["period"].unique().tolist() == [1]
    optimizer = one.pop("optimizer"), other.pop("optimizer")
    assert differences(one, other) == []
    assert differences(*(state["param_groups"] for state in optimizer)) == []
    ours, theirs = optimizer[1]["state"], optimizer[0]["state"]
    assert len(ours) == len(theirs) - 4 and differences({key: theirs[key] for key in ours}, ours) == []
    moments = [theirs[key]["exp_avg"].flatten() for key in theirs if key not in ours]
    assert sorted(torch.cat(moments).tolist()) == sorted(ramping["exp_avg"].tolist())

    detections = [line for line in metrics(ramped) if "stabilizer.mean_period" in line["data"]]
    assert [line["step"] for line in detections] == [(0, 0), (0, 3), (1, 2)]
    assert all(line["data"]["stabilizer.mean_period"] == 1 for line in detections)
    lines = [
        {**line, "data": {name: value for name, value in line["data"].items() if not name.startswith("stabilizer.")}}
        for line in metrics(ramped)
    ]
    assert differences(metrics(plain), [line for line in lines if line["data"]]) == []
    rates = [line["data"]["train.lr"] for line in lines if len(line["step"]) == 2 and line["data"]]
    assert len(set(rates)) == 7  # as Swin's: the first two steps share one

    # The control: with other periods it is another run.
    assert any(line["data"].get("stabilizer.mean_period", 1) > 1 for line in metrics(straight("qramping")))
    assert differences(one["model"], last(straight("qramping"))["model"])


LR, UNIT = 0.005 * 2.0**-6, 2.0**-6  # Adam's step is a hundredth of the smallest step of the grid


def plant(run: Run) -> Tensor:
    """The first row of the first layer becomes a block of scale UNIT: weight 1 is pulled to a threshold from both
    sides, weight 2 is pushed upwards over one, the others are left alone."""
    weight = run.model.blocks[0].attn.qkv.weight
    with torch.no_grad():
        weight[0] = 2.0 * UNIT
        weight[0, 0], weight[0, 1], weight[0, 2] = 6.0 * UNIT, 0.7501 * UNIT, 2.47 * UNIT

    def pull(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[0] = 0.0
        gradient[0, 1] = torch.sign(weight[0, 1] - 0.75 * UNIT)
        gradient[0, 2] = -1.0
        return gradient

    weight.register_hook(pull)
    return weight


def planted(monkeypatch: pytest.MonkeyPatch, folder: Path, **keys: Any) -> tuple[Run, Tensor]:
    """A run at a constant rate, with a planted row of 16 weights, in epochs of 24 steps; q2 alone is on, for speed."""
    flags = [*PLAIN, "--quant.scheme", "mx", "--quant.active", "[q2]", "--model.kwargs"]
    flags += ["{embed_dim: 16, depth: 1, num_heads: 2}", "--lr", str(LR), "--min-lr", str(LR), "--unscale-lr"]
    flags += ["--weight-decay", "0", "--global-batch", "2"]
    flags += ["--data.num_images", "48", "--no-repeated-aug", *stabilized("qramping", **keys)]
    run = captured(monkeypatch, folder, *flags)
    assert run.steps_per_epoch == 24
    return run, plant(run)


def changes(values: Sequence[float]) -> int:
    return sum(a != b for a, b in itertools.pairwise(values))


def test_a_planted_oscillation_is_found_and_a_moving_weight_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, weight = planted(monkeypatch, tmp_path / "run", k1=16, k2=5)
    layers = list(run.stabilizer.layers.values())
    paths: list[list[list[float]]] = [[], []]
    rehearse = run.rehearse

    def note() -> None:
        paths[0].append(weight[0].tolist())
        paths[1].append(layers[0].quantized_weight()[0].tolist())

    def watched(steps: int, observe: Callable[[], None]) -> None:
        assert steps == 30
        note()
        rehearse(steps, lambda: (observe(), note()))

    run.rehearse = watched
    before = everything(run)
    ratios = run.stabilizer.detect(run)
    assert differences(before, everything(run)) == []
    dist_w, dist_q = (
        [sum(abs(b - a) for a, b in itertools.pairwise(w)) for w in zip(*path, strict=True)] for path in paths
    )
    by_hand = [q / w if w else 0.0 for q, w in zip(dist_q, dist_w, strict=True)]
    assert ratios[0][0].tolist() == pytest.approx(by_hand, rel=1e-4)
    assert by_hand[1] > 32 and 1 < by_hand[2] < 10 and not any(by_hand[3:])
    assert [ratio.shape for ratio in ratios] == [layer.weight.shape for layer in layers]

    figures = run.stabilizer.before_step(0, run)
    n = min(5 * math.floor(by_hand[1] / 16) + 1, 24)
    period = run.optimizer.ramping["period"]
    assert period[:16].tolist() == [1, n] + [1] * 14 and n >= 11
    share = sum(int((ratio > 16).sum()) for ratio in ratios) / period.numel()
    assert figures == {"oscillating_share": share, "mean_period": pytest.approx(period.double().mean().item())}
    assert 0 < share < 0.5
    assert run.stabilizer.before_step(1, run) is None and run.stabilizer.before_step(23, run) is None


def test_a_planted_oscillation_flips_less_often_with_its_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flips, moves = {}, {}
    for k2 in (0, 5):
        run, weight = planted(monkeypatch, tmp_path / str(k2), k1=16, k2=k2)
        layer = run.model.blocks[0].attn.qkv
        run.stabilizer.before_step(0, run)
        values, quantized = [weight[0].tolist()], [layer.quantized_weight()[0, 1].item()]
        batches = run.upcoming_batches()
        for _ in range(24):
            engine.train_step(run, batches)
            values.append(weight[0].tolist())
            quantized.append(layer.quantized_weight()[0, 1].item())
        moves[k2] = [changes(value) for value in zip(*values, strict=True)][:4]
        flips[k2] = changes(quantized)
    n = run.optimizer.ramping["period"][1].item()
    assert moves == {0: [0, 24, 24, 0], 5: [0, 24 // n, 24, 0]} and n > 10
    assert flips[5] <= 24 // n < flips[0]


@pytest.mark.parametrize(("update_period", "steps"), [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 3, 6]), (None, [0, 4])])
def test_detection_is_at_step_0_and_every_update_period(update_period: int | None, steps: list[int]) -> None:
    found: list[tuple[int, int]] = []
    layer = layer_of(block())

    class Trainer:
        optimizer = QRampingAdamW(layer.parameters())

        def rehearse(self, count: int, observe: Callable[[], None]) -> None:
            assert self.optimizer.ramping["period"].unique().tolist() == [1]  # ordinary steps
            found.append((step, count))

    keys = {} if update_period is None else {"update_period": update_period}
    stabilizer = build("qramping", layer, epoch=4, total=8, detect_steps=7, **keys)
    stabilizer.bind(Trainer.optimizer)
    for step in range(8):
        Trainer.optimizer.set_periods([torch.full((1, 32), 3)])
        figures = stabilizer.before_step(step, Trainer())
        assert figures == (None if step not in steps else {"oscillating_share": 0.0, "mean_period": 1.0})
    assert found == [(step, 7) for step in steps]


@pytest.mark.parametrize("n_max", [5, 2**24 + 1, 2**31 - 1, 2**31, 2**40])
@pytest.mark.parametrize("k2", [0, 1, 5, 2**31, 2**62])
def test_no_period_leaves_the_numbers_that_there_are(k2: int, n_max: int) -> None:
    ramps = {0.0: 0, 1.0: 0, 15.9: 0, 16.0: 1, 1e3: 62, 1e30: 10**30, torch.inf: 10**60}
    found = periods(torch.tensor(list(ramps)), 16.0, k2, n_max)
    assert found.dtype == torch.int32 and (found >= 1).all()
    for number, floor in zip(found.tolist(), ramps.values(), strict=True):
        assert number == pytest.approx(min(k2 * floor + 1, n_max, 2**31 - 1), rel=1e-6)
