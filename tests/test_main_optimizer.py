"""The program: rates, parameter groups and batches as the optimizer sees them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import column, differences, exit_code, killed, outcome, tiny, train
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import main
from config import Config, UserError, load_config
from models import create_model
from quantization.stabilizers import Plan, build_stabilizer
from record.checkpoint import load_checkpoint
from training.build import build_optimizer, build_schedule, plan_batches

pytestmark = pytest.mark.usefixtures("in_this_process")


# ---------------------------------------------------------------------------------------------------------------------
# Learning rate
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def used_rates() -> Iterator[list[float]]:
    """Gains the rate of every optimizer step, read off the optimizer as it starts the step.

    Steps of zeros are those by which a resumed run finds out what an optimizer keeps.
    """
    used: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not any(p.grad is not None and p.grad.any() for group in optimizer.param_groups for p in group["params"]):
            return
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
        used.extend(rates)

    handle = register_optimizer_step_pre_hook(note)
    yield used
    handle.remove()


def deit_rate(epoch: int, *, epochs: int, warmup: int, lr: float, start: float, least: float) -> float:
    """DeiT calls scheduler.step(epoch) after the epoch of that number: an epoch trains at its predecessor's value."""
    t = max(epoch - 1, 0)
    if t < warmup:
        return start + t * (lr - start) / warmup
    return least + (lr - least) * (1 + math.cos(math.pi * t / epochs)) / 2


def swin_rate(step: int, *, steps: int, warmup: int, lr: float, start: float, least: float) -> float:
    """Swin calls step_update(step) after the step of that number; its cosine begins when the warm-up is over."""
    t = max(step - 1, 0)
    if t < warmup:
        return start + t * (lr - start) / warmup
    return least + (lr - least) * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))) / 2


def optimizer_of(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(cfg, model, build_stabilizer(cfg.stabilizer, model, Plan(1, 1)), torch.device("cpu"))


def rates_of(cfg: Config, steps_per_epoch: int) -> list[float]:
    """The rate of every step of a whole run, from the schedule alone, driven as engine.py and main.py drive it."""
    optimizer = optimizer_of(cfg, nn.Linear(2, 2))
    schedule, rates = build_schedule(cfg, optimizer, steps_per_epoch), []
    for epoch in range(cfg.schedule.epochs):
        for step in range(steps_per_epoch):
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step_update(epoch * steps_per_epoch + step)
        schedule.step(epoch)
    return rates


# DeiT-T of the paper: 90 epochs, 5 of warm-up from 1e-6 to 1e-3, down to 1e-5.
GOLDEN = {
    0: 1e-6,
    1: 1e-6,
    2: 2.008e-4,
    3: 4.006e-4,
    4: 6.004e-4,
    5: 8.002e-4,
    6: 9.924798377e-4,
    7: 9.891830624e-4,
    10: 9.757729756e-4,
    20: 8.950653230e-4,
    45: 5.222752509e-4,
    46: 5.05e-4,
    60: 2.726115764e-4,
    89: 1.120579512e-5,
}


def test_the_rate_of_deit_over_90_epochs() -> None:
    cfg = load_config(main.__file__.replace("main.py", "configs/deit_tiny_tetrajet.yaml"))
    rates = rates_of(cfg, steps_per_epoch=3)
    assert [rates[3 * epoch] for epoch in GOLDEN] == pytest.approx(list(GOLDEN.values()), rel=1e-9)
    assert all(len({*rates[3 * epoch : 3 * epoch + 3]}) == 1 for epoch in range(90))  # it stays for an epoch
    formula = [deit_rate(e, epochs=90, warmup=5, lr=1e-3, start=1e-6, least=1e-5) for e in range(90)]
    assert rates[::3] == pytest.approx(formula, rel=1e-12)


SWIN = ["schedule.step_on=iteration", "schedule.warmup_epochs=20", "schedule.warmup_prefix=true", "optim.clip_grad=5"]


def test_the_rate_of_swin_over_90_epochs() -> None:
    steps = 1251  # of 1024 images in an epoch of ImageNet-1K
    rates = rates_of(load_config(overrides=SWIN), steps)
    numbers = {"steps": 90 * steps, "warmup": 20 * steps, "lr": 1e-3, "start": 1e-6, "least": 1e-5}
    assert rates == pytest.approx([swin_rate(step, **numbers) for step in range(90 * steps)], rel=1e-9)
    assert rates[:2] == [1e-6, 1e-6]
    assert max(rates) == rates[20 * steps + 1] == pytest.approx(1e-3)  # the warm-up ends where the cosine begins
    assert rates[55 * steps + 1] == pytest.approx(5.05e-4)  # half of the cosine
    assert rates[-1] == pytest.approx(1e-5, abs=1e-11)


def test_a_run_trains_at_the_rates_of_deit(used_rates: list[float], tmp_path: Path) -> None:
    few = ["--data.num_images", "8", "--global-batch", "4", "--epochs", "9", "--warmup-epochs", "5", "--lr", "1e-3"]
    train(tmp_path / "run", *few, "--unscale-lr")
    expected = [deit_rate(e, epochs=9, warmup=5, lr=1e-3, start=1e-6, least=1e-5) for e in range(9) for _ in range(2)]
    assert used_rates == pytest.approx(expected, rel=1e-12)
    assert column(tmp_path / "run", "train.lr") == used_rates
    assert column(tmp_path / "run", "train.lr", 1) == used_rates[::2]


def test_a_swin_trains_at_the_rates_of_swin(used_rates: list[float], tmp_path: Path) -> None:
    swin = ["--model", "swin_tiny_patch4_window7_224", "--input-size", "16", "--unscale-lr", "--lr", "1e-3"]
    swin += ["--model.kwargs", "{embed_dim: 32, depths: [1, 1], num_heads: [1, 2], window_size: 2}"]
    swin += ["--data.num_images", "16", "--global-batch", "4", "--epochs", "5", "--quant.scheme", "mx"]
    swin += ["--schedule.step_on", "iteration", "--warmup-epochs", "2", "--schedule.warmup_prefix", "--clip-grad", "5"]
    train(tmp_path / "run", *swin)
    numbers = {"steps": 20, "warmup": 8, "lr": 1e-3, "start": 1e-6, "least": 1e-5}
    assert used_rates == pytest.approx([swin_rate(step, **numbers) for step in range(20)], rel=1e-9)
    assert column(tmp_path / "run", "train.lr") == used_rates


@pytest.mark.parametrize("on", ["epoch", "iteration"])
def test_a_resumed_run_goes_on_at_the_same_rates(on: str, used_rates: list[float], tmp_path: Path) -> None:
    flags = ["--schedule.step_on", on, "--epochs"]
    train(tmp_path / "straight", *flags, "4")
    straight = used_rates.copy()
    used_rates.clear()
    # A shorter run has another curve; with more --epochs it goes on at the longer one's.
    short = load_checkpoint(train(tmp_path / "run", *flags, "2") / "last.pt")
    assert short["optimizer"]["param_groups"][0]["lr"] != straight[8]
    train(tmp_path / "run", *flags, "4", "--resume", "auto")
    assert used_rates[8:] == straight[8:]


def test_the_rate_scales_with_the_global_batch_unless_told_otherwise() -> None:
    def rate(*overrides: str) -> float:
        cfg = load_config(overrides=["optim.lr=4e-4", *overrides])
        return optimizer_of(cfg, nn.Linear(2, 2)).param_groups[0]["lr"]

    assert rate("optim.global_batch=512") == 4e-4
    assert rate("optim.global_batch=1024") == 8e-4
    assert rate("optim.global_batch=64", "data.batch_size=2") == 5e-5
    assert rate("optim.global_batch=64", "optim.unscale_lr=true") == 4e-4


# ---------------------------------------------------------------------------------------------------------------------
# Parameter groups and batches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["none", "mx"])
@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_weight_decay_is_on_weights_alone(name: str, quant: str) -> None:
    cfg = load_config(overrides=[f"model.name={name}", f"quant.scheme={quant}"])
    model = create_model(cfg, 1000)
    optimizer = optimizer_of(cfg, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    decays = [(names[id(parameter)], group["weight_decay"]) for group in groups for parameter in group["params"]]
    assert sorted(name for name, _ in decays) == sorted(names.values())  # each once
    embeddings = ("pos_embed", "cls_token", "dist_token")
    for name, decay in decays:
        free = name.endswith((".bias", "relative_position_bias_table")) or "norm" in name or name in embeddings
        assert decay == (0.0 if free else 0.05), name
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for group in groups)


@pytest.mark.parametrize(
    ("global_batch", "batch_size", "world_size", "plan"),
    [
        (1024, None, 8, (128, 1)),
        (1024, None, 1, (256, 4)),
        (1024, None, 3 * 8, None),
        (96, None, 3, (32, 1)),
        (600, None, 1, (200, 3)),
        (1024, 64, 4, (64, 4)),
        (1024, 100, 4, None),
        (512, 512, 1, (512, 1)),
        (512, 512, 2, None),
    ],
)
def test_batches_add_up_to_the_recipe(
    global_batch: int, batch_size: int | None, world_size: int, plan: tuple[int, int] | None
) -> None:
    size = "null" if batch_size is None else batch_size
    cfg = load_config(overrides=[f"optim.global_batch={global_batch}", f"data.batch_size={size}"])
    if plan is None:
        with pytest.raises(UserError, match=f"global batch of {global_batch} "):
            plan_batches(cfg, world_size)
    else:
        assert plan_batches(cfg, world_size) == plan


# ---------------------------------------------------------------------------------------------------------------------
# Layer decay
# ---------------------------------------------------------------------------------------------------------------------

DEEP = ["model.img_size=16", "model.patch_size=8", "model.kwargs={embed_dim: 32, depth: 3, num_heads: 1}"]


def rates_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Rate and weight decay of every parameter."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("quant", ["none", "mx", "int4"])
@pytest.mark.parametrize("on", ["epoch", "iteration"])
def test_layer_decay_gives_every_block_the_rate_that_timm_gives_it(quant: str, on: str) -> None:
    overrides = [*DEEP, f"quant.scheme={quant}", f"schedule.step_on={on}", "schedule.warmup_epochs=1"]
    cfg = load_config(overrides=[*overrides, "optim.layer_decay=0.5", "optim.unscale_lr=true"])
    model = create_model(cfg, 7)
    optimizer = optimizer_of(cfg, model)
    schedule = build_schedule(cfg, optimizer, 4)
    for epoch in range(2):  # out of the warm-up
        for step in range(4):
            schedule.step_update(4 * epoch + step)
        schedule.step(epoch + 1)
    found, groups = (
        rates_by_name(model, optimizer),
        param_groups_layer_decay(model, cfg.optim.weight_decay, model.no_weight_decay(), layer_decay=0.5),
    )
    names = {p: name for name, p in model.named_parameters()}
    head = found["head.weight"][0]
    assert found == {
        names[p]: (head * group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    shares = [found[f"blocks.{n}.attn.qkv.weight"][0] / head for n in range(3)]
    assert shares == pytest.approx([0.5**3, 0.5**2, 0.5])  # the head's layer has the last norm too
    assert found["patch_embed.proj.weight"][0] / head == pytest.approx(0.5**4)


def test_without_layer_decay_there_are_two_groups_of_one_rate() -> None:
    cfg = load_config(overrides=DEEP)
    groups = optimizer_of(cfg, create_model(cfg, 7)).param_groups
    assert len(groups) == 2 and not any("lr_scale" in group for group in groups)


def test_a_run_with_layer_decay_resumes_with_its_bits_and_logs_the_rate_of_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--data.num_images", "8", "--global-batch", "4", "--warmup-epochs", "1", "--lr", "1e-3", "--epochs", "3"]
    few += ["--quant.scheme", "mx", "--save-every", "1"]
    decayed = [*few, "--layer-decay", "0.5"]
    straight, plain = train(tmp_path / "straight", *decayed), train(tmp_path / "plain", *few)
    assert column(straight, "train.lr") == column(plain, "train.lr")
    killed(monkeypatch, tmp_path / "run", 3, *decayed)
    resumed = outcome(train(tmp_path / "run", *decayed, "--resume", "auto"))
    assert not differences(outcome(straight), resumed)
    assert len({group["lr"] for group in resumed["last.pt"]["optimizer"]["param_groups"]}) > 2
    assert differences(outcome(plain)["last.pt"]["model"], resumed["last.pt"]["model"])


def test_a_run_is_not_resumed_with_another_layer_decay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", "--layer-decay", "0.5", "--epochs", "1")
    capsys.readouterr()
    again = ["--layer-decay", "0.75", "--epochs", "2", "--resume", "auto"]
    assert exit_code(tiny(run, *again)) == 2
    assert "was trained with optim.layer_decay 0.5 (here 0.75)" in capsys.readouterr().err


@pytest.mark.parametrize("smoke", [[], ["--smoke"]])
def test_layer_decay_and_q_ramping_are_refused_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], smoke: list[str]
) -> None:
    flags = ["--quant.scheme", "mx", "--stabilizer.kind", "qramping", "--layer-decay", "0.75", *smoke]
    assert exit_code(tiny(tmp_path / "run", *flags)) == 2
    errors = capsys.readouterr().err
    assert "error: optim.layer_decay gives each block a parameter group of its own, and Q-Ramping" in errors
    assert "Traceback" not in errors and not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("value", ["0", "1.5", "-0.5", "true", "half", "[0.5]", "nan"])
def test_a_layer_decay_that_is_no_share_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"optim\.layer_decay is "):
        load_config(overrides=[f"optim.layer_decay={value}"])
