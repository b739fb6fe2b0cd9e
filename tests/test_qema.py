"""Q-EMA: Algorithm 1 on blocks by hand, the shadow, and runs of main.py on a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import before_step, differences, exit_code, metrics, replace, tiny, train
from stabilizer_helpers import FLAGS, GRID, SMALL, block, build, captured, last, layer_of, normal, put, scale_by_hand
from torch import Tensor, nn

import engine
from config import load_config
from datasets import build_data
from engine import Run
from models import create_model
from quantization import QuantLinear
from quantization.stabilizers import Plan, build_stabilizer

pytestmark = pytest.mark.usefixtures("in_this_process")


def algorithm_1(w: Sequence[float], shadow: Sequence[float]) -> list[float]:
    """Appendix C.1 in float64, for blocks without ties and without weights on the grid.

    q1 and q2 are the values on both sides of W / S. (Just above 2 and 4, where the steps of the grid grow, the two of
    smallest distance would both be on one side.)
    """
    scale, quantized = scale_by_hand(w), []
    signed = sorted({sign * magnitude for magnitude in GRID for sign in (-1, 1)})
    for weight, average in zip(w, shadow, strict=True):
        q1 = max(q for q in signed if q <= weight / scale)
        q2 = min(q for q in signed if q >= weight / scale)
        quantized.append(scale * (q1 if abs(average / scale - q1) < abs(average / scale - q2) else q2))
    return quantized


def through(layer: QuantLinear) -> Tensor:
    """The weight the output product sees: what the layer makes of the unit vectors, which q1 leaves as they are."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)).t()


def test_algorithm_1_on_a_worked_block_through_a_layer() -> None:
    """weight, shadow, quantized weight; the largest is 6, so S = 1."""
    table = [
        (6.0, 6.0, 6.0),
        (0.70, 0.80, 1.0),  # between .5 and 1: the shadow is nearer to 1
        (0.80, 0.70, 0.5),  # and the other way round
        (0.70, 0.70, 0.5),
        (0.80, 5.00, 1.0),  # a shadow far away picks the end of the cell, not its own place
        (0.80, 0.00, 0.5),
        (-0.80, -0.70, -0.5),
        (-0.80, 3.00, -0.5),  # a shadow of the other sign picks the smaller magnitude
        (2.40, 2.60, 3.0),
        (2.60, 2.40, 2.0),
        (4.90, 5.10, 6.0),
        (-5.10, -4.90, -4.0),
        (0.20, 0.30, 0.5),
        (0.30, 0.20, 0.0),
    ]
    weight, shadow, expected = (torch.tensor(column) for column in zip(*table, strict=True))
    for scale in (1.0, 2.0**-7, 2.0**9):
        layer = layer_of(scale * weight.unsqueeze(0))
        layer.shadow = scale * shadow.unsqueeze(0)
        assert torch.equal(through(layer)[0], scale * expected)
        assert torch.equal(layer.quantized_weight()[0], scale * expected)
        layer.shadow = None  # the control: nearest rounding differs where weight and shadow are on different sides
        flips = (through(layer)[0] != scale * expected).nonzero().flatten().tolist()
        assert flips == [1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13]


def test_algorithm_1_on_random_blocks_through_a_layer() -> None:
    weight = normal(64, 32) * torch.logspace(-4, 1, 64)[:, None]
    for distance in (0.0, 0.02, 0.2, 2.0):
        layer = layer_of(weight)
        layer.shadow = weight + distance * weight.abs().amax(1, keepdim=True) * normal(64, 32, seed=1)
        by_hand = [algorithm_1(w, s) for w, s in zip(weight.tolist(), layer.shadow.tolist(), strict=True)]
        assert torch.equal(through(layer), torch.tensor(by_hand))
        nearest = layer_of(weight).quantized_weight()
        assert torch.equal(nearest, torch.tensor(by_hand)) == (distance == 0)
        swapped = [algorithm_1(s, w) for w, s in zip(weight.tolist(), layer.shadow.tolist(), strict=True)]
        assert (swapped == by_hand) == (distance == 0)


def step_of(layer: QuantLinear, x: Tensor) -> list[Tensor]:
    """Output and gradients of one forward and backward pass at noise position 5."""
    layer.noise.seek(5)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output = layer(x)
    output.square().mean().backward()
    return [output.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]


def test_a_shadow_equal_to_the_weight_is_plain_tetrajet_bit_for_bit() -> None:
    weight = normal(40, 72)  # a block is cut short
    plain, averaged = layer_of(weight), layer_of(weight)
    build("qema", averaged)
    x = normal(3, 7, 72, seed=1)
    assert averaged.shadow is not None and differences(step_of(plain, x), step_of(averaged, x)) == []
    averaged.shadow += 0.1 * normal(40, 72, seed=2)
    assert len(differences(step_of(plain, x), step_of(averaged, x))) == 4


@pytest.mark.parametrize("decay", [0.998, 0.9, 0.0])
def test_the_shadow_is_the_moving_average_bit_for_bit(decay: float) -> None:
    layer = layer_of(normal(33, 47))
    stabilizer = build("qema", layer, decay=decay)
    assert torch.equal(layer.shadow, layer.weight) and layer.shadow.data_ptr() != layer.weight.data_ptr()
    expected, exact = layer.weight.detach().clone(), layer.weight.detach().double()
    for step in range(200):
        with torch.no_grad():
            layer.weight += 0.1 * normal(33, 47, seed=step + 1)
        assert torch.equal(layer.shadow, expected)  # the optimizer's step alone changes nothing
        stabilizer.after_step(step)
        expected = torch.add(expected * decay, layer.weight.detach(), alpha=1 - decay)
        exact = decay * exact + (1 - decay) * layer.weight.detach().double()
        assert layer.shadow.dtype == torch.float32 and not layer.shadow.requires_grad
        assert torch.equal(layer.shadow, expected)
    torch.testing.assert_close(layer.shadow.double(), exact, rtol=0, atol=2e-5)
    if decay:  # the control: weight and average with their places changed
        assert (layer.shadow - layer.weight).abs().max() > 0.1


def test_the_shadow_of_a_bfloat16_weight_is_float32() -> None:
    layer = layer_of(normal(1, 32)).bfloat16()
    stabilizer = build("qema", layer, decay=0.999)
    before = layer.shadow.clone()
    with torch.no_grad():
        layer.weight += 0.5
    stabilizer.after_step(0)
    assert layer.shadow.dtype == torch.float32
    expected = torch.add(before * 0.999, layer.weight.detach().float(), alpha=1 - 0.999)
    assert torch.equal(layer.shadow, expected)
    assert not torch.equal(expected, expected.bfloat16().float())


def flips(weights: Sequence[float], kind: str, **keys: Any) -> list[int]:
    """The steps at which Q of weight (0, 3) changes while an optimizer leads it through `weights`."""
    layer = layer_of(block(w3=weights[0]))
    stabilizer = build(kind, layer, **keys)
    seen, changes = layer.quantized_weight()[0, 3].item(), []
    for step, weight in enumerate(weights[1:]):
        put(layer, 3, weight)
        stabilizer.after_step(step)
        now = layer.quantized_weight()[0, 3].item()
        changes += [step] if now != seen else []
        seen = now
    return changes


def test_an_oscillating_weight_stops_flipping_under_q_ema_and_a_moving_one_does_not() -> None:
    """0.75 is the threshold between .5 and 1."""
    around = [0.75 + (0.03 if step % 2 == 0 else -0.02) for step in range(100)]
    assert flips(around, "none") == list(range(99))
    assert flips(around, "qema", decay=0.998) == []
    assert flips(around, "qema", decay=0.9) == []
    assert flips(around, "qema", decay=0.0) == list(range(99))  # a shadow without memory is the weight
    there = [0.6] * 10 + [0.9] * 100  # crosses for good: so does the shadow, later
    assert flips(there, "none") == [9]
    after = math.ceil(math.log(0.5) / math.log(0.99))  # .9 - .3 * decay^n >= .75
    assert flips(there, "qema", decay=0.99) == [9 + after - 1]


def test_shadows_are_saved_with_the_model_and_follow_the_weights_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averages: dict[str, Tensor] = {}

    def start(run: Run) -> None:
        layers = {name: layer for name, layer in run.model.named_modules() if isinstance(layer, QuantLinear)}
        averages.update({name: layer.weight.detach().clone() for name, layer in layers.items()})

        def follow(*_: object) -> None:
            for name, layer in layers.items():
                averages[name] = torch.add(averages[name] * 0.8, layer.weight.detach(), alpha=1 - 0.8)

        run.optimizer.register_step_post_hook(follow)

    replace(monkeypatch, engine.train_step, before_step(0, start))
    state = last(train(tmp_path / "run", *SMALL, *FLAGS["qema"]))
    names = [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert list(averages) == names
    for part in ("model", "ema"):
        assert [key for key in state[part] if key.endswith("shadow")] == [f"{name}.shadow" for name in names]
    for name in names:
        shadow = state["model"][f"{name}.shadow"]
        assert shadow.dtype == torch.float32 and torch.equal(shadow, averages[name])
        assert not torch.equal(shadow, state["model"][f"{name}.weight"])
    assert state["stabilizer"] == {}


def test_step_0_of_a_run_is_plain_tetrajet(straight: Callable[[str], Path]) -> None:
    plain, averaged = (
        [line["data"] for line in metrics(straight(kind)) if len(line["step"]) == 2] for kind in ("none", "qema")
    )
    assert plain[0] == averaged[0]
    # The control: the shadows of the steps after it are not the weights.
    assert [a["train.loss"] == b["train.loss"] for a, b in zip(plain, averaged, strict=True)].count(True) < 8
    assert differences(last(straight("none"))["model"], last(straight("qema"))["model"])


@torch.no_grad()
def test_shadows_decide_in_evaluation_too(straight: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = straight("qema")
    cfg, state = load_config(folder / "resolved.yaml"), last(folder)
    logged = metrics(folder)[-2]["data"]["eval.loss"]
    data = build_data(cfg, rank=0, world_size=1, batch_size=8)
    batches = list(data.eval_batches())
    model = create_model(cfg, data.num_classes)
    build_stabilizer(cfg.stabilizer, model, Plan(4, 8))
    model.load_state_dict(state["model"])
    model.eval()

    def loss() -> float:
        total = sum(nn.functional.cross_entropy(model(x), y, reduction="sum").item() for x, y in batches)
        return total / data.eval_size

    assert loss() == pytest.approx(logged, rel=1e-6)
    capsys.readouterr()
    assert exit_code(tiny(folder, *SMALL, *FLAGS["qema"], "--eval", "--resume", str(folder / "last.pt"))) == 0
    assert f"last.pt: loss {logged:.4f}, " in capsys.readouterr().out
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.shadow = None
    assert loss() != pytest.approx(logged, rel=1e-4)  # the control


def test_the_shadow_starts_from_the_weights_the_training_starts_from(
    straight: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = straight("none") / "last.pt"
    run = captured(monkeypatch, tmp_path / "tuned", *SMALL, *FLAGS["qema"], "--finetune", str(source))
    weights = last(straight("none"))["model"]
    fresh = captured(monkeypatch, tmp_path / "fresh", *SMALL, *FLAGS["qema"])
    for name, layer in run.stabilizer.layers.items():
        assert torch.equal(layer.shadow, weights[f"{name}.weight"])
        assert torch.equal(layer.shadow, layer.weight)
        assert not torch.equal(layer.shadow, fresh.stabilizer.layers[name].shadow)


def test_fine_tuning_goes_on_with_the_shadows_of_a_file_that_has_them(
    straight: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = last(straight("qema"))["model"]
    flags = [*SMALL, *FLAGS["qema"], "--nb-classes", "3", "--model-ema"]
    run = captured(monkeypatch, tmp_path / "tuned", *flags, "--finetune", str(straight("qema") / "last.pt"))
    averaged = dict(run.ema.module.named_buffers())
    for name, layer in run.stabilizer.layers.items():
        assert torch.equal(layer.weight, given[f"{name}.weight"])
        assert torch.equal(layer.shadow, given[f"{name}.shadow"]) and not torch.equal(layer.shadow, layer.weight)
        assert torch.equal(averaged[f"{name}.shadow"], layer.shadow)
    assert run.not_loaded == ["head.weight", "head.bias"]
