"""The training loop: what a step draws and calls, micro-batches and processes, evaluation.

Runs are those of main.py on a tiny model (tests/helpers.py), so that what is tested is what users start.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FULL,
    METHODS,
    PLAIN,
    QRAMPING,
    Box,
    before_step,
    column,
    differences,
    exit_code,
    in_two_processes,
    metrics,
    outcome,
    replace,
    tiny,
    train,
)
from quick import some
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import engine
from config import Config, UserError, load_config
from datasets import build_data
from engine import Run, evaluate
from models import create_model
from quantization.stabilizers import Plan, Stabilizer, build_stabilizer
from record.checkpoint import load_checkpoint
from record.metrics import read_metrics
from record.weights import load_weights

pytestmark = pytest.mark.usefixtures("in_this_process")


# ---------------------------------------------------------------------------------------------------------------------
# A step
# ---------------------------------------------------------------------------------------------------------------------


def random_states(model: nn.Module) -> tuple[Any, ...]:
    words = [torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()]
    return (*words, tuple(model.noise.state.tolist()))


def test_no_two_forward_passes_share_their_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, ...]] = []

    def watch(run: Run) -> None:
        run.model.patch_embed.register_forward_pre_hook(
            lambda *_: drawn.append(random_states(run.model)) if run.model.training else None
        )

    replace(monkeypatch, engine.train_step, before_step(0, watch))
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

    replace(monkeypatch, engine.train_step, before_step(0, start))
    train(tmp_path / "run", "--model-ema", "--model-ema-decay", "0.9")
    average = weights[0]  # timm's begins with the weights after the first step
    for weight in weights[1:]:
        average = 0.9 * average + 0.1 * weight
    assert len(weights) == 8
    torch.testing.assert_close(runs[0].ema.module.blocks[0].attn.qkv.weight, average)
    saved = load_checkpoint(tmp_path / "run" / "last.pt")["ema"]
    assert differences(dict(runs[0].ema.module.state_dict()), dict(saved)) == []


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

    replace(monkeypatch, build_stabilizer, Spy)
    train(tmp_path / "run", "--batch-size", "8")
    points = ("before_step", "after_backward", "after_step")
    assert heard == [(point, step) for step in range(8) for point in points]
    assert plans == [Plan(steps_per_epoch=4, total_steps=8)]


def test_a_run_carried_by_fp8_logs_the_blocks_below_the_window(tmp_path: Path) -> None:
    def logged(folder: Path) -> list[dict[str, Any]]:
        return [line["data"] for line in read_metrics(folder) if "carrier.blocks_below_window" in line["data"]]

    carried = train(tmp_path / "fp8", "--quant.scheme", "mx", "--quant.carrier", "fp8")
    assert [data["carrier.blocks_below_window"] >= 0 for data in logged(carried)] == [
        True
    ] * 8  # of 2 epochs of 4 steps
    assert not logged(train(tmp_path / "bf16", "--quant.scheme", "mx"))


@pytest.mark.parametrize(
    ("method", "fullgraph"),
    [
        pytest.param(["--quant.scheme", "mx", "--stabilizer.kind", "qema"], True, id="mx", marks=pytest.mark.slow),
        pytest.param(["--quant.scheme", "int4"], False, id="int4", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_run_trains_as_an_eager_one(
    method: list[str], fullgraph: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MXFP4 traced whole, without a graph break, INT4 around its layers; what the code generator makes of it is not
    tried: it takes a CPU minutes."""
    backends = []

    def compile_traced(model: nn.Module) -> None:
        model._compiled_call_impl = torch.compile(model._call_impl, backend="aot_eager", fullgraph=fullgraph)
        backends.append("aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_traced)
    flags = [*method, "--drop-path", "0", "--epochs", "1"]
    runs = [train(tmp_path / "eager", *flags), train(tmp_path / "compiled", *flags, "--compile")]
    assert backends == ["aot_eager"]
    eager, compiled = (load_checkpoint(run / "last.pt") for run in runs)
    assert not differences(eager["model"], compiled["model"])


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


DELAYED = ["--quant.scale_format", "e4m3", "--quant.outer", "pow2", "--quant.outer_delay", "100"]


def test_two_processes(tmp_path: Path) -> None:
    """All that needs two processes, in one start of them: each run is a few steps."""
    plain = [*PLAIN, "--batch-size", "4"]  # two micro-batches for each of two processes
    tetrajet = [*PLAIN, "--quant.scheme", "mx", "--data.num_images", "72"]  # evaluates 7

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
            {"argv": tiny(folder("evaluating"), *tetrajet), "rank": 1, "step": 3, "action": "stop in evaluation"},
            {"argv": tiny(folder("evaluating"), *tetrajet, "--resume", "auto")},
            {"argv": tiny(folder("delayed"), *tetrajet, *DELAYED)},
        ],
    )
    codes = [[report["code"] for report in run] for run in reports]
    assert codes == [[0, 0], [0, 0], [143, 143], [0, 0], [1, 1], [0, 0], [0, 0], [143, 143], [0, 0], [0, 0]]
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

    # So does one that it hears in evaluation, of which the shares are uneven.
    assert "at epoch 0, step 4; the state is in" in reports[7][0]["stderr"]
    assert differences(outcome(folder("tetrajet")), outcome(folder("evaluating"))) == []

    # What outer scales hang from is the same in both after each step, for the one checkpoint has it for both.
    held = [report["held"] for report in reports[9]]
    assert held[0] == held[1] and len(set(held[0])) == 1  # from the first step to the last

    # Q-Ramping rehearses on both, without a trace where all periods are 1, and sets the same periods.
    weights = outcome(folder("tetrajet"))["last.pt"]["model"]
    assert differences(weights, outcome(folder("rehearsed"))["last.pt"]["model"]) == []
    assert differences(weights, outcome(folder("ramped"))["last.pt"]["model"])

    # What breaks on one process stops both; the first says where it was.
    said = reports[4][0]["stderr"]
    assert "is the parameter blocks.1.mlp.fc1.weight (process 1); the last good checkpoint is" in said
    assert (said.count("\n"), load_checkpoint(folder("broken") / "last.pt")["epoch"]) == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Config, nn.Module, Path]:
    folder = train(tmp_path / "run", *FULL)
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
    with pytest.raises(UserError, match="no image"):
        evaluate(fixed_run([]), Fixed())


# ---------------------------------------------------------------------------------------------------------------------
# Activations computed again
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", some(["qema", "none", "int4", "qramping"], every=2))
def test_a_run_that_computes_its_activations_again_is_the_same_bit_for_bit(method: str, tmp_path: Path) -> None:
    flags = [*FULL, "--epochs", "1", "--batch-size", "8", *METHODS.get(method, [])]
    outcomes, calls = [], []
    for name, more in {"kept": [], "computed": ["--grad-checkpointing"]}.items():
        called: list[int] = []

        def count(run: Run, called: list[int] = called) -> None:
            run.model.blocks[0].attn.qkv.register_forward_hook(
                lambda layer, *_: called.append(1) if layer.training else None
            )

        with pytest.MonkeyPatch.context() as patch:
            replace(patch, engine.train_step, before_step(0, count))
            outcomes.append(outcome(train(tmp_path / name, *flags, *more)))
        calls.append(len(called))
    assert differences(*outcomes) == []
    assert calls[1] == 2 * calls[0] > 0


def test_a_model_that_cannot_compute_its_activations_again_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(model: nn.Module, enable: bool = True) -> None:
        assert not enable, "gradient checkpointing not supported"  # as timm's models do

    monkeypatch.setattr(VisionTransformer, "set_grad_checkpointing", refuse)
    assert exit_code(tiny(tmp_path / "run", "--grad-checkpointing")) == 2
    assert "cannot compute its activations again; leave --grad-checkpointing away" in capsys.readouterr().err
