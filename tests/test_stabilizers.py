"""The methods against weight oscillation: Q-EMA, Q-Ramping, Dampen, Freeze.

Each by hand on planted weights of a single layer, and then in runs of main.py on a tiny model (tests/helpers.py).
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    FULL,
    PLAIN,
    ROOT,
    before_step,
    differences,
    environment,
    exit_code,
    metrics,
    outcome,
    tiny,
    train,
    undisturbed,
)
from torch import Tensor, nn

import engine
import main
from checkpoint import load_checkpoint, save_checkpoint
from config import UserError, load_config
from datasets import build_data
from engine import Run
from models import create_model
from quantization import PRESETS, LinearRecipe, QuantLinear, build_recipe
from quantization.stabilizers import STABILIZERS, Plan, QRampingAdamW, Stabilizer, build_stabilizer
from quantization.stabilizers.qramping import periods

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # the magnitudes of e2m1 by their codes
TETRAJET = PRESETS["tetrajet"]


@pytest.fixture(scope="module", autouse=True)
def _process() -> Iterator[None]:
    with undisturbed():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# A layer and its stabilizer
# ---------------------------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: Tensor, recipe: LinearRecipe = TETRAJET) -> QuantLinear:
    """A layer (bias 0) with the weight (C, D)."""
    layer = QuantLinear.from_linear(nn.Linear(weight.shape[1], weight.shape[0]), recipe)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_()
    return layer


def block(**latent: float) -> Tensor:
    """One row of 32 weights of scale 1: its largest, 6, and weights on the grid that stay where they are; `latent`:
    w3=0.7 sets weight 3."""
    weight = torch.full((1, 32), 2.0)
    weight[0, 0] = 6.0
    for name, value in latent.items():
        weight[0, int(name.removeprefix("w"))] = value
    return weight


def build(kind: str, *layers: nn.Module, total: int = 100, epoch: int = 10, **keys: Any) -> Any:
    """The stabilizer of a training of `total` steps in epochs of `epoch`, with further keys of its section."""
    section = ", ".join(f"{key}: {value}" for key, value in {"kind": kind, **keys}.items())
    cfg = load_config(overrides=["quant.scheme=mx", f"stabilizer={{{section}}}"]).stabilizer
    return build_stabilizer(cfg, nn.Sequential(*layers), Plan(epoch, total))


@torch.no_grad()
def put(layer: QuantLinear, column: int, value: float) -> None:
    """What an optimizer does: another value for weight (0, column)."""
    layer.weight[0, column] = value


def scale_by_hand(w: Sequence[float]) -> float:
    """The smallest power of two S with max |w| <= 6 S."""
    return next(2.0**s for s in range(-60, 60) if max(map(abs, w)) <= 6 * 2.0**s)


def nearest_code_by_hand(latent: float) -> int:
    """The signed index of the nearest value of the grid, ties to the even index."""
    index = min(range(8), key=lambda i: (abs(GRID[i] - abs(latent)), i % 2))
    return -index if latent < 0 else index


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------

# Two epochs of four steps of one block of 16 channels, with everything that is random or has a state.
SMALL = [*FULL, "--model.kwargs", "{embed_dim: 16, depth: 1, num_heads: 2}", "--data.num_images", "32"]
SMALL += ["--global-batch", "8", "--lr", "0.3", "--warmup-epochs", "0", "--schedule.step_on", "iteration"]
SMALL += ["--clip-grad", "1"]


def stabilized(kind: str, **keys: Any) -> list[str]:
    return [word for name, value in {"kind": kind, **keys}.items() for word in (f"--stabilizer.{name}", str(value))]


# Set so that eight steps suffice for each to act. A detection is longer than an epoch and not always at its start.
FLAGS = {
    "none": [],
    "qema": stabilized("qema", decay=0.8),
    "qramping": stabilized("qramping", k1=0.5, detect_steps=5, update_period=3),
    "dampen": stabilized("dampen", weight=0.1),
    "freeze": stabilized("freeze", momentum=0.3, threshold_start=0.2),
}
KINDS = [kind for kind in FLAGS if kind != "none"]


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of two epochs without a stop, by the kind of its stabilizer; trained once."""
    folder = tmp_path_factory.mktemp("straight")

    def run(kind: str) -> Path:
        return folder / kind if (folder / kind).exists() else train(folder / kind, *SMALL, *FLAGS[kind])

    return run


def killed(monkeypatch: pytest.MonkeyPatch, folder: Path, step: int, *flags: str, rehearsing: bool = False) -> None:
    """A run that is killed before optimizer step `step`, of the training itself or of a rehearsal."""
    train_step, rehearse, rehearsals = engine.train_step, Run.rehearse, []

    def kill(run: Run, batches: Any) -> dict[str, float]:
        if run.global_step == step and bool(rehearsals) == rehearsing:
            raise Killed
        return train_step(run, batches)

    def note(run: Run, *args: Any) -> None:
        rehearsals.append(run.global_step)
        rehearse(run, *args)
        rehearsals.clear()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(engine, "train_step", kill)
        patch.setattr(Run, "rehearse", note)
        main.main(tiny(folder, *flags))


def last(folder: Path) -> dict[str, Any]:
    """The last checkpoint without the configuration, which names the folder."""
    state = load_checkpoint(folder / "last.pt")
    del state["config"]
    return state


def captured(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> Run:
    """The run as main.py makes it, before its first step."""
    runs: list[Run] = []
    with monkeypatch.context() as patch:
        patch.setattr(main, "train", lambda run, max_steps=None: runs.append(run))
        train(folder, *flags)
    return runs[0]


# ---------------------------------------------------------------------------------------------------------------------
# Which one, and errors
# ---------------------------------------------------------------------------------------------------------------------


def test_exactly_one_is_active_by_construction() -> None:
    keys = {kind: set(type(build(kind, layer_of(block())).cfg).model_fields) - {"kind"} for kind in STABILIZERS}
    assert set(keys) == set(FLAGS) and all(keys[kind] for kind in KINDS) and not keys["none"]
    for kind in STABILIZERS:
        assert type(build(kind, layer_of(block()))) is STABILIZERS[kind]
        for key in set().union(*keys.values()):
            overrides = [f"stabilizer.kind={kind}", f"stabilizer.{key}=1"]
            if key in keys[kind] and key not in ("decay", "start"):  # in which 1 is out of range
                load_config(overrides=overrides)
            elif key not in keys[kind]:
                with pytest.raises(UserError, match=f"{key} does not apply while stabilizer.kind is {kind}"):
                    load_config(overrides=overrides)
    with pytest.raises(UserError, match="input should be one of 'none', 'qema', 'qramping', 'dampen', 'freeze'"):
        load_config(overrides=["stabilizer.kind=[qema, freeze]"])


def test_keys_of_another_kind_end_the_run_before_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "both.yaml"
    config.write_text("quant: {scheme: mx}\nstabilizer: {kind: qema, decay: 0.9, k1: 16}\n")
    assert exit_code(["--config", str(config), *tiny(tmp_path / "run")]) == 2
    said = "stabilizer.k1 does not apply while stabilizer.kind is qema"
    assert capsys.readouterr().err == f"error: {config}: {said}.\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stabilizer_needs_weights_with_one_quantized_value(kind: str) -> None:
    with pytest.raises(ValueError, match=f"stabilizer {kind} works on weights in MXFP4, and the model has none"):
        build(kind, nn.Linear(32, 1))
    recipes = (build_recipe(("q1", "q3", "q4", "q5", "q6")), build_recipe(forward="stochastic"), LinearRecipe())
    for recipe in recipes:
        with pytest.raises(ValueError, match=f"stabilizer {kind} needs q2 on, with a nearest rounding"):
            build(kind, layer_of(block()), layer_of(block(), recipe))
        build("none", layer_of(block(), recipe))
    build(kind, layer_of(block()), layer_of(block(), build_recipe(("q2",), forward="nearest_away")))


MISTAKES = {
    "not quantized": ("none", [], "works on weights in MXFP4, and the model has none"),
    "int4": ("int4", [], "works on weights in MXFP4, and the model has none"),
    "q2 off": ("mx", ["--quant.active", "[q1, q3]"], "needs q2 on, with a nearest rounding"),
    "q2 stochastic": ("mx", ["--quant.rounding.forward", "stochastic"], "needs q2 on, with a nearest rounding"),
}


@pytest.mark.parametrize(("scheme", "flags", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_what_a_stabilizer_cannot_work_on_is_the_user_s_mistake(
    scheme: str, flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = tiny(tmp_path / "run", "--quant.scheme", scheme, *flags, "--stabilizer.kind")
    for kind in ("qema", "freeze"):
        assert exit_code([*argv, kind]) == 2
        err = f"error: stabilizer {kind} {said}; see quant and stabilizer in the configuration.\n"
        assert capsys.readouterr().err == err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("opt", ["sgd", "adam", "lookahead_adamw"])
def test_qramping_works_with_adamw_alone(opt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(tiny(tmp_path / "run", "--quant.scheme", "mx", *stabilized("qramping"), "--opt", opt)) == 2
    said = f"The optimizer {opt} cannot be made: qramping changes AdamW and cannot work with the optimizer {opt};"
    assert capsys.readouterr().err.startswith(f"error: {said}")
    stabilizer = build("qramping", layer_of(block()))
    assert stabilizer.optimizer_name("adamw") == "qrampingadamw"
    assert build("qema", layer_of(block())).optimizer_name(opt) == opt  # the control: others take any


# ---------------------------------------------------------------------------------------------------------------------
# Q-EMA
# ---------------------------------------------------------------------------------------------------------------------


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

    monkeypatch.setattr(engine, "train_step", before_step(0, start))
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


# ---------------------------------------------------------------------------------------------------------------------
# Q-Ramping: periods
# ---------------------------------------------------------------------------------------------------------------------


def below(value: float) -> float:
    """The float32 before `value`."""
    return float(np.nextafter(np.float32(value), np.float32(0)))


@pytest.mark.parametrize(
    ("ratio", "k1", "k2", "n_max", "n"),
    [
        (0.0, 16, 5, 100, 1),
        (1.0, 16, 5, 100, 1),
        (below(16), 16, 5, 100, 1),
        (16.0, 16, 5, 100, 6),
        (below(32), 16, 5, 100, 6),
        (32.0, 16, 5, 100, 11),
        (47.9, 16, 5, 100, 11),
        (48.0, 16, 5, 100, 16),
        (below(304), 16, 5, 100, 91),
        (304.0, 16, 5, 100, 96),
        (320.0, 16, 5, 100, 100),  # not 101
        (1e30, 16, 5, 100, 100),
        (math.inf, 16, 5, 100, 100),
        (math.inf, 16, 0, 100, 1),
        (1e30, 16, 0, 100, 1),
        (64.0, 16, 3, 1, 1),
        (64.0, 16, 3, 12, 12),
        (64.0, 16, 3, 13, 13),
        (64.0, 16, 3, 14, 13),
        (below(20), 20, 4, 100, 1),
        (20.0, 20, 4, 100, 5),
        (1.24, 0.5, 5, 100, 11),
    ],
)
def test_the_period_of_a_ratio(ratio: float, k1: float, k2: int, n_max: int, n: int) -> None:
    """N_w = min(k2 floor(R_w / k1) + 1, N_max)."""
    found = periods(torch.tensor([[ratio, 0.0], [0.0, ratio]]), k1, k2, n_max)
    assert found.dtype == torch.int32 and found.tolist() == [[n, 1], [1, n]]


def test_an_epoch_is_the_default_of_period_and_cap() -> None:
    def figures(**keys: int) -> tuple[int, int, float, int, int]:
        s = build("qramping", layer_of(block()), epoch=17, **keys)
        return s.update_period, s.n_max, s.cfg.k1, s.cfg.k2, s.cfg.detect_steps

    assert figures() == (17, 17, 16.0, 5, 30)
    assert figures(update_period=3, n_max=40) == (3, 40, 16.0, 5, 30)


# ---------------------------------------------------------------------------------------------------------------------
# Q-Ramping: the optimizer
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = [(7, 5), (33,), (16, 32), (3, 1)]  # the first three are ramped; the fourth has the same group, a fifth another


def two_optimizers(**options: Any) -> tuple[list[nn.Parameter], torch.optim.AdamW, list[nn.Parameter], QRampingAdamW]:
    """Equal parameters under torch's AdamW and ours: two groups, of which the first holds the ramped ones."""
    found: list[Any] = []
    for kind in (torch.optim.AdamW, QRampingAdamW):
        parameters = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate([*SHAPES, (11,)])]
        groups = [{"params": parameters[:4], "weight_decay": 0.1}, {"params": parameters[4:], "weight_decay": 0.0}]
        found += [parameters, kind(groups, **{"lr": 0.1, **options})]
    found[3].ramp(found[2][:3])
    return tuple(found)


def give_gradients(parameters: Sequence[nn.Parameter], step: int) -> None:
    for i, p in enumerate(parameters):
        p.grad = normal(*p.shape, seed=100 * step + i + 50) * (1 + i) + 0.3


@pytest.mark.parametrize(
    ("steps", "options", "reload"),
    [
        (50, {}, False),
        (50, {}, True),
        (50, {"betas": (0.8, 0.95), "eps": 1e-4}, True),
        (20, {"betas": (0.0, 0.5)}, False),
        (400, {}, False),
        (400, {"betas": (0.5, 0.9)}, False),  # 1 - .9^n is 1 from n = 349 on
    ],
    ids=str,
)
def test_with_period_1_it_is_torch_s_adamw_bit_for_bit(steps: int, options: dict[str, Any], reload: bool) -> None:
    """With weight decay, clipping, a rate that changes, and other parameters and groups beside the ramped ones."""
    theirs, adamw, ours, ramping = two_optimizers(**options)
    clipped = 0
    for step in range(steps):
        give_gradients(theirs, step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad.clone()
        for parameters, optimizer in ((theirs, adamw), (ours, ramping)):
            norm = nn.utils.clip_grad_norm_(parameters, 72.0)
            for n, group in enumerate(optimizer.param_groups):
                group["lr"] = (0.1, 0.01)[n] * (1.01 + math.cos(step / 7)) / 2
            optimizer.step()
            assert all(p.grad is not None for p in parameters)
            if reload and step % 10 == 4:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        clipped += bool(norm > 72)
        assert differences([p.data for p in theirs], [p.data for p in ours]) == [], step
    assert 0 < clipped < steps
    moments = torch.cat([adamw.state[p]["exp_avg_sq"].flatten() for p in theirs[:3]])
    assert torch.equal(moments, ramping.ramping["exp_avg_sq"])
    assert set(ramping.state) == set(ours[3:])
    assert ramping.ramping["updates"].unique().tolist() == [steps]
    # The control: one element of another period.
    n = [torch.ones(shape) for shape in SHAPES[:3]]
    n[1][7] = 2
    ramping.set_periods(n)
    for parameters, optimizer in ((theirs, adamw), (ours, ramping)):
        give_gradients(parameters, steps)
        optimizer.step()
    assert differences([p.data for p in theirs], [p.data for p in ours]) == ["/1"]
    assert (theirs[1] != ours[1]).nonzero().flatten().tolist() == [7]


def by_hand(
    w: float,
    gradients: Sequence[float],
    in_force: Sequence[int],
    rates: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    wrong: str = "",
) -> list[float]:
    """One weight, in float64: its values after every step. `in_force`: its period at each step."""
    values, total, count, n, m, v = [], 0.0, 0, 0, 0.0, 0.0
    for step, (g, period, rate) in enumerate(zip(gradients, in_force, rates, strict=True)):
        due = count + 1 >= period
        if wrong != "decay at updates" or due:
            w *= 1 - rate * decay
        total, count = total + g, count + 1
        if due:
            mean = g if wrong == "last gradient" else total if wrong == "sum" else total / count
            n += 1
            m = betas[0] * m + (1 - betas[0]) * mean
            v = betas[1] * v + (1 - betas[1]) * mean**2
            k = step + 1 if wrong == "correction by steps" else n
            scale = 1 if wrong == "rate not scaled" else period
            w -= scale * rate * (m / (1 - betas[0] ** k)) / (math.sqrt(v / (1 - betas[1] ** k)) + eps)
            total, count = 0.0, 0
        values.append(w)
    return values


WRONG = ["decay at updates", "last gradient", "sum", "correction by steps", "rate not scaled"]


def histories(steps: int) -> Tensor:
    """Periods in force (steps, 7, 5): mixed within the tensor, and changed at steps 11 and 29, amid accumulations."""
    draw = torch.Generator().manual_seed(3)
    first, second, third = (torch.randint(1, 10, (7, 5), generator=draw) for _ in range(3))
    first[0, 0], second[0, 0], third[0, 0] = 9, 2, 9  # shorter than the accumulation under way: ends at once
    first[0, 1], second[0, 1], third[0, 1] = 2, 9, 40  # longer: the one under way goes on
    return torch.stack([first if step < 11 else second if step < 29 else third for step in range(steps)])


@pytest.mark.parametrize("changing", [False, True], ids=["fixed periods", "changing periods"])
def test_a_period_is_an_accumulation_and_one_larger_step(changing: bool) -> None:
    steps = 60
    options = {"betas": (0.9, 0.97), "eps": 1e-3}
    _, _, parameters, optimizer = two_optimizers(**options)
    in_force = histories(steps) if changing else histories(steps)[:1].expand(steps, 7, 5)
    others = [torch.full(shape, n) for shape, n in ((SHAPES[1], 1), (SHAPES[2], 4))]
    rates = [0.02 * (1.1 + math.cos(step / 9)) for step in range(steps)]
    start = [p.detach().clone() for p in parameters]
    gradients, values = [], []
    for step in range(steps):
        give_gradients(parameters, step)
        gradients.append([p.grad.clone() for p in parameters])
        optimizer.param_groups[0]["lr"] = rates[step]
        if step == 0 or not torch.equal(in_force[step], in_force[step - 1]):
            assert bool(step and (optimizer.ramping["count"] > 0).any()) == bool(step)  # amid accumulations
            optimizer.set_periods([in_force[step], *others])
        optimizer.step()
        values.append([p.detach().clone() for p in parameters])

    def expected(i: int, index: tuple[int, ...], n: Sequence[int], wrong: str = "") -> Tensor:
        g = [step[i][index].item() for step in gradients]
        return torch.tensor(by_hand(start[i][index].item(), g, n, rates, **options, decay=0.1, wrong=wrong))

    def actual(i: int, index: tuple[int, ...]) -> Tensor:
        return torch.stack([step[i][index] for step in values])

    off = dict.fromkeys(WRONG, 0.0)
    for index in np.ndindex(7, 5):
        n = in_force[(slice(None), *index)].tolist()
        torch.testing.assert_close(actual(0, index), expected(0, index, n), rtol=0, atol=5e-6)
        for wrong in WRONG:
            off[wrong] = max(off[wrong], (actual(0, index) - expected(0, index, n, wrong)).abs().max().item())
    assert min(off.values()) > 1e-3, off  # the controls
    for i, index, period in ((1, (20,), 1), (2, (3, 30), 4)):
        torch.testing.assert_close(actual(i, index), expected(i, index, [period] * steps), rtol=0, atol=5e-6)


def test_an_element_stands_still_between_its_updates() -> None:
    _, _, parameters, optimizer = two_optimizers()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    n = torch.arange(35).view(7, 5) % 6 + 1
    optimizer.set_periods([n, *(torch.ones(shape) for shape in SHAPES[1:3])])
    moves = torch.zeros(7, 5, dtype=torch.int64)
    for step in range(60):
        before = parameters[0].detach().clone()
        give_gradients(parameters, step)
        optimizer.step()
        moved = parameters[0] != before
        assert torch.equal(moved, (step + 1) % n == 0)
        moves += moved
    assert torch.equal(moves, 60 // n)


def test_the_state_continues_bit_for_bit_amid_accumulations(tmp_path: Path) -> None:
    def continued(optimizer: QRampingAdamW, parameters: list[nn.Parameter]) -> list[Any]:
        for step in range(17, 40):
            give_gradients(parameters, step)
            optimizer.step()
        return [[p.detach().clone() for p in parameters], optimizer.state_dict()]

    def another(change: Callable[[dict[str, Any]], object] = lambda _: None) -> list[Any]:
        _, _, parameters, optimizer = two_optimizers(lr=0.5)  # the rate comes with the state
        state = load_checkpoint(tmp_path / "state.pt")
        change(state["optimizer"]["ramping"])
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for p, saved in zip(parameters, state["model"], strict=True):
                p.copy_(saved)
        return continued(optimizer, parameters)

    _, _, parameters, optimizer = two_optimizers()
    optimizer.set_periods([torch.arange(math.prod(shape)).view(shape) % 9 + 1 for shape in SHAPES[:3]])
    for step in range(17):
        give_gradients(parameters, step)
        optimizer.step()
    assert optimizer.ramping["count"].unique().tolist() == [0, 1, 2, 3, 5, 8]  # 17 modulo 1 ... 9
    save_checkpoint(tmp_path / "state.pt", {"model": [p.data for p in parameters], "optimizer": optimizer.state_dict()})
    whole = continued(optimizer, parameters)
    assert differences(whole, another()) == []
    for name in ("exp_avg", "exp_avg_sq", "grad_sum", "count", "updates", "period"):  # the controls
        assert differences(whole[0], another(lambda ramping, name=name: ramping[name].mul_(2))[0]), name


def test_a_loaded_state_is_a_copy() -> None:
    _, _, parameters, optimizer = two_optimizers()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    give_gradients(parameters, 0)
    optimizer.step()
    assert not any(value.any() for name, value in state["ramping"].items() if name != "period")


def test_what_it_cannot_do_is_refused() -> None:
    _, _, parameters, optimizer = two_optimizers()
    stranger = nn.Parameter(torch.zeros(2))
    for wrong in ([parameters[0], parameters[4]], [parameters[0], stranger], [stranger]):
        with pytest.raises(ValueError, match="ramped parameters must all be in one parameter group"):
            optimizer.ramp(wrong)

    give_gradients(parameters, 0)
    parameters[1].grad = None
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(ValueError, match="a ramped parameter has no gradient"):
        optimizer.step()
    assert differences(before, [p.data for p in parameters]) == []
    give_gradients(parameters, 0)
    parameters[3].grad = None  # others may lack theirs
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
    assert changed == [True, True, True, False, True]


def test_a_foreign_state_is_refused_and_changes_nothing() -> None:
    theirs, adamw, parameters, optimizer = two_optimizers()
    for each, one in ((theirs, adamw), (parameters, optimizer)):
        give_gradients(each, 0)
        one.step()
    before = copy.deepcopy(optimizer.state_dict())
    fewer = QRampingAdamW(parameters[:4])
    fewer.ramp(parameters[:2])
    one_group = QRampingAdamW(parameters)
    one_group.ramp(parameters[:3])
    for state in (adamw.state_dict(), fewer.state_dict(), one_group.state_dict()):
        with pytest.raises(ValueError, match=r"no periods for these parameters|different number of parameter groups"):
            optimizer.load_state_dict(state)
        assert differences(before, optimizer.state_dict()) == []
    optimizer.load_state_dict(before)


def test_a_checkpoint_without_periods_is_the_user_s_mistake(
    straight: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_checkpoint(straight("qramping") / "last.pt")
    del state["optimizer"]["ramping"]
    save_checkpoint(tmp_path / "cut.pt", state)
    capsys.readouterr()
    flags = [*SMALL, *FLAGS["qramping"], "--epochs", "3", "--resume", str(tmp_path / "cut.pt")]
    assert exit_code(tiny(tmp_path / "run", *flags)) == 2
    said = f"The optimizer state in {tmp_path / 'cut.pt'} does not fit --opt adamw: it holds no periods for these"
    assert capsys.readouterr().err == f"error: {said} parameters.\n"


# ---------------------------------------------------------------------------------------------------------------------
# Q-Ramping: the detector
# ---------------------------------------------------------------------------------------------------------------------


def generators() -> dict[str, Any]:
    name, *numpy = np.random.get_state()
    return {"python": random.getstate(), "numpy": [name, numpy[0].tolist(), *numpy[1:]], "torch": torch.get_rng_state()}


def everything(run: Run) -> dict[str, Any]:
    """All that a rehearsal must leave as it was."""
    rates = [group["lr"] for group in run.optimizer.param_groups]
    gradients = [p.grad for p in run.model.parameters()]
    place = [run.global_step, run.epoch, run.step, run.data.corrupt, run.model.training]
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

    def note(run: Run, model: nn.Module, images: Tensor, targets: Tensor, position: int) -> Tensor:
        loss = forward_backward(run, model, images, targets, position)
        this = [images.clone(), targets.clone(), run.model.noise.state.clone(), generators()]
        before = passes[len(rehearsing)].setdefault(position, this)
        assert differences(before, this) == [], position
        return loss

    monkeypatch.setattr(Run, "rehearse", note_rehearsal)
    monkeypatch.setattr(engine, "forward_backward", note)
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


# ---------------------------------------------------------------------------------------------------------------------
# Dampen
# ---------------------------------------------------------------------------------------------------------------------


def test_lambda_is_zero_for_a_quarter_and_then_a_cosine_up_to_its_weight() -> None:
    dampen = build("dampen", layer_of(block()), total=200, weight=0.3)
    strengths = [dampen.strength(step) for step in range(201)]
    assert strengths[:51] == [0.0] * 51
    by_hand = [0.3 * (1 - math.cos(math.pi * (step - 50) / 150)) / 2 for step in range(50, 201)]
    assert strengths[50:] == pytest.approx(by_hand, rel=1e-12, abs=1e-15)
    assert (strengths[125], strengths[200]) == (pytest.approx(0.15), pytest.approx(0.3))
    assert all(a < b for a, b in itertools.pairwise(strengths[50:]))
    assert build("dampen", layer_of(block()), total=200, weight=0.3, start=0).strength(1) > 0
    assert build("dampen", layer_of(block())).cfg.start == 0.25


def test_the_gradient_of_dampen_is_that_of_the_loss_written_out() -> None:
    layers = [layer_of(normal(40, 72, seed=3) * 0.02), layer_of(normal(8, 32, seed=4)), layer_of(normal(8, 32, seed=5))]
    dampen = build("dampen", *layers, total=100, weight=0.7)
    for step in (10, 25, 60, 99):
        strength = dampen.strength(step)
        task = [normal(*layer.weight.shape, seed=step + i) for i, layer in enumerate(layers)]
        for layer, gradient in zip(layers[:2], task, strict=False):
            layer.weight.grad = gradient.clone()
        layers[2].weight.grad = None  # has no part in the step
        written_out = sum(
            ((layer.weight - layer.quantized_weight().detach()) ** 2).sum() * strength for layer in layers[:2]
        )
        expected = torch.autograd.grad(written_out, [layer.weight for layer in layers[:2]])
        by_hand = [2 * strength * (layer.weight - layer.quantized_weight()).detach() for layer in layers]
        before = [layer.weight.detach().clone() for layer in layers]
        dampen.after_backward(step)
        for layer, own, more, double in zip(layers[:2], task, expected, by_hand, strict=False):
            torch.testing.assert_close(layer.weight.grad - own, more, rtol=1e-5, atol=5e-7)
            torch.testing.assert_close(layer.weight.grad - own, double, rtol=1e-5, atol=5e-7)
            assert torch.equal(layer.weight.grad, own) == (step in (10, 25))
        assert layers[2].weight.grad is None
        assert differences(before, [layer.weight.data for layer in layers]) == []
        # The loss itself, of all weights.
        loss = sum(((layer.weight - layer.quantized_weight()).double() ** 2).sum().item() for layer in layers)
        assert dampen.figures()["dampen_loss"].item() == pytest.approx(strength * loss, rel=1e-6)
    # The control: the same without the 2, and with the sign turned.
    assert not torch.allclose(layers[1].weight.grad - task[1], by_hand[1] / 2, rtol=0.1)
    assert not torch.allclose(layers[1].weight.grad - task[1], -by_hand[1], rtol=0.1)


def test_dampen_pulls_weights_to_the_grid() -> None:
    def distance(weight: float) -> float:
        layer = layer_of(normal(8, 32))
        dampen = build("dampen", layer, total=100, weight=weight, start=0)
        optimizer = torch.optim.SGD([layer.weight], lr=0.1)
        for step in range(100):
            layer.weight.grad = torch.zeros_like(layer.weight)
            dampen.after_backward(step)
            optimizer.step()
        return (layer.weight - layer.quantized_weight()).norm().item()

    assert distance(1.0) < 1e-3 * distance(0.0)


def test_the_dampening_term_is_logged(straight: Callable[[str], Path]) -> None:
    terms = [line["data"]["stabilizer.dampen_loss"] for line in metrics(straight("dampen")) if len(line["step"]) == 2]
    assert terms[:3] == [0.0] * 3 and min(terms[3:]) > 0 and len(terms) == 8  # a quarter is 2 of 8, where it is still 0
    norms, plain = (
        [line["data"]["train.grad_norm"] for line in metrics(straight(kind)) if len(line["step"]) == 2]
        for kind in ("dampen", "none")
    )
    assert norms[:3] == plain[:3] and norms[3] != plain[3]  # it is part of the gradient that is clipped


# ---------------------------------------------------------------------------------------------------------------------
# Freeze
# ---------------------------------------------------------------------------------------------------------------------


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

    monkeypatch.setattr(engine, "train_step", before_step(0, watch))
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


# ---------------------------------------------------------------------------------------------------------------------
# All of them: resuming, accumulation, processes
# ---------------------------------------------------------------------------------------------------------------------


def acts(kind: str, state: dict[str, Any]) -> bool:
    """Whether the checkpoint of a run shows that its stabilizer has been at work."""
    if kind == "qema":
        return any(
            not torch.equal(state["model"][key], state["model"][key.replace("shadow", "weight")])
            for key in state["model"]
            if key.endswith("shadow")
        )
    if kind == "qramping":
        ramping = state["optimizer"]["ramping"]
        return bool((ramping["period"] > 1).any() and (ramping["count"] > 0).any() and ramping["grad_sum"].any())
    if kind == "freeze":
        return any(s["frozen"].any() for s in state["stabilizer"].values())
    return state["stabilizer"] == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_after_its_first_epoch_goes_on_bit_for_bit(
    kind: str, straight: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    killed(monkeypatch, folder, 4, *SMALL, *FLAGS[kind])
    stopped = last(folder)
    assert (stopped["epoch"], stopped["step"]) == (1, 0)
    train(folder, *SMALL, *FLAGS[kind], "--resume", "auto")
    whole = outcome(straight(kind))
    assert differences(whole, outcome(folder)) == []
    assert differences(stopped["model"], whole["last.pt"]["model"])
    # The control: it is at work in what is compared, and another run than without it.
    assert acts(kind, stopped) and acts(kind, whole["last.pt"])
    weights = [key for key in whole["last.pt"]["model"] if not key.endswith("shadow")]
    plain = last(straight("none"))["model"]
    assert any(not torch.equal(whole["last.pt"]["model"][key], plain[key]) for key in weights)


def test_a_run_killed_in_a_rehearsal_goes_on_bit_for_bit(
    straight: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 7 as the detection at step 3 rehearses it; saved last was step 3, amid accumulations."""
    flags = [*SMALL, *FLAGS["qramping"], "--save-every", "3"]
    killed(monkeypatch, tmp_path / "run", 7, *flags, rehearsing=True)
    state = last(tmp_path / "run")
    assert (state["epoch"], state["step"]) == (0, 3) and acts("qramping", state)
    train(tmp_path / "run", *flags, "--resume", "auto")
    assert differences(outcome(straight("qramping")), outcome(tmp_path / "run")) == []


@pytest.mark.parametrize(("kind", "part"), [("qramping", "ramping"), ("freeze", "stabilizer"), ("qema", "shadow")])
def test_what_a_stabilizer_saves_is_needed(
    kind: str, part: str, straight: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of resuming: without its saved state a run goes on otherwise."""
    load = main.load_checkpoint

    def without(path: Path) -> dict[str, Any]:
        state = load(path)
        if part == "ramping":
            state["optimizer"]["ramping"] = {k: v.clamp(max=1) for k, v in state["optimizer"]["ramping"].items()}
        elif part == "stabilizer":
            state["stabilizer"] = {
                name: {k: torch.zeros_like(v) for k, v in s.items()} for name, s in state["stabilizer"].items()
            }
        else:
            shadows = [key for key in state["model"] if key.endswith("shadow")]
            state["model"].update({key: state["model"][key.replace("shadow", "weight")] for key in shadows})
        return state

    killed(monkeypatch, tmp_path / "run", 4, *SMALL, *FLAGS[kind])
    monkeypatch.setattr(main, "load_checkpoint", without)
    train(tmp_path / "run", *SMALL, *FLAGS[kind], "--resume", "auto")
    assert differences(last(straight(kind))["model"], last(tmp_path / "run")["model"])


@pytest.mark.parametrize("batch_size", [8, 4])
def test_a_stabilizer_is_called_once_an_optimizer_step(
    batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 x 8 samples or 2 x 4: as many updates."""
    called: list[tuple[str, int]] = []
    passes: list[int] = []

    class Counting(Stabilizer):
        def before_step(self, step: int, trainer: Any) -> None:
            called.append(("before", step))

        def after_backward(self, step: int) -> None:
            assert all(layer.weight.grad is not None for layer in self.layers.values())
            called.append(("gradients", step))

        def after_step(self, step: int) -> None:
            assert all(layer.weight.grad is None for layer in self.layers.values())
            called.append(("after", step))

    def count(run: Run) -> None:
        run.model.register_forward_hook(lambda model, *_: passes.append(1) if model.training else None)

    monkeypatch.setitem(STABILIZERS, "qema", Counting)
    monkeypatch.setattr(engine, "train_step", before_step(0, count))
    train(tmp_path / "run", *SMALL, *FLAGS["qema"], "--batch-size", str(batch_size))
    assert len(passes) == 8 * 8 // batch_size
    assert called == [(point, step) for step in range(8) for point in ("before", "gradients", "after")]


TWO_PROCESSES = """
import functools, json, os, sys
from pathlib import Path

import torch
import torch.distributed as dist

import main
from helpers import tiny

# One group serves all runs.
leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
dist.init_process_group = functools.cache(dist.init_process_group)
runs, train = [], main.train
main.train = lambda run, max_steps=None: (runs.append(run), train(run, max_steps))
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])


def tensors(value, name=""):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors(value[key], f"{name}/{key}")


def unlike(state):
    found, count = [], 0
    for name, value in tensors(state):
        mine = value.detach().contiguous().reshape(-1).view(torch.uint8).clone()
        theirs = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(theirs, mine)
        found += [] if torch.equal(*theirs) else [name]
        count += 1
    return found, count


report = {}
for kind, argv in json.loads((folder / "plan.json").read_text()).items():
    main.main(argv)
    run = runs.pop()
    found, count = unlike(run.state_dict())
    report[kind] = {"unlike": found, "tensors": count, "noise": unlike({"state": run.model.noise.state})[0]}
    report[kind]["steps"] = run.global_step
one = torch.ones(3)
one[1] += rank * 2.0**-23
report["control"] = unlike({"a": torch.ones(2), "b": one})[0]
if rank == 0:
    (folder / "report.json").write_text(json.dumps(report))
leave()
"""


def test_two_processes_keep_the_same_state(tmp_path: Path) -> None:
    """Each process has data, dropout and quantization noise of its own; weights, moments, shadows, periods,
    accumulations and frozen weights are the same bits on both."""
    flags = {kind: [*SMALL, *FLAGS[kind], "--epochs", "1"] for kind in KINDS}
    flags["dampen"] += ["--stabilizer.start", "0"]
    flags["freeze"] += ["--stabilizer.start", "0"]
    plan = {kind: tiny(tmp_path / kind, *flags[kind]) for kind in KINDS}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([*torchrun, str(script), str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.pop("control") == ["/b"]
    assert set(report) == set(KINDS)
    for kind, found in report.items():
        assert found["unlike"] == [] and found["tensors"] > 50, kind
        assert found["noise"] == ["/state"]  # the control: what is to differ does
        assert found["steps"] == 4
        assert acts(kind, last(tmp_path / kind)), kind
