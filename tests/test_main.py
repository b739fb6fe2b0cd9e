"""The program: rates and parameter groups as the optimizer sees them, run directories, flags, and mistakes.

Each mistake ends with exit code 2 and one line on stderr, and leaves every file that was there as it was.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import TINY, column, exit_code, metrics, tiny, train, tree, undisturbed
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import engine
import main
from checkpoint import load_checkpoint, load_weights
from config import Config, UserError, load_config
from flags import build_parser
from main import build_optimizer, build_schedule, plan_batches
from models import create_model
from quantization.int4 import Int4Linear, hadamard
from quantization.stabilizers import Plan, build_stabilizer


@pytest.fixture(scope="module", autouse=True)
def _process() -> Iterator[None]:
    with undisturbed():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, for reading only."""
    return train(tmp_path_factory.mktemp("finished") / "run", "--quant.scheme", "mx", "--model-ema")


def words(flags: dict[str, str]) -> list[str]:
    return [word for pair in flags.items() for word in pair]


# ---------------------------------------------------------------------------------------------------------------------
# Learning rate
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def used_rates() -> Iterator[list[float]]:
    """Gains the rate of every optimizer step, read off the optimizer as it starts the step."""
    used: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
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
# The run directory
# ---------------------------------------------------------------------------------------------------------------------

MANIFEST = """start_time command_line git versions device world_size seed model paper timm_patches quantizers parameters
classes batch steps_per_epoch autocast resumed_from finetuned_from not_loaded_in_finetuning sessions"""


def test_what_a_run_leaves(finished: Path) -> None:
    files = {"manifest.json", "resolved.yaml", "metrics.log", "tensorboard", "last.pt", "best.pt"}
    assert {path.name for path in finished.iterdir()} == files
    assert all(path.stat().st_size for path in (finished / "tensorboard").iterdir())
    assert [path.name.startswith("events.out.tfevents.") for path in (finished / "tensorboard").iterdir()] == [True]
    assert load_config(finished / "resolved.yaml") == load_config(
        overrides=main.parse_flags(tiny(finished, "--quant.scheme", "mx", "--model-ema"))[1]
    )


def test_what_the_manifest_says(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert set(manifest) == set(MANIFEST.split())
    assert manifest["batch"] == {"process": 16, "accumulation": 1, "global": 16}
    assert (manifest["steps_per_epoch"], manifest["classes"], manifest["world_size"]) == (4, 4, 1)
    assert (manifest["autocast"], manifest["seed"], manifest["device"]["type"]) == ("None", 0, "cpu")
    assert manifest["parameters"] == sum(w.numel() for w in load_weights(finished / "last.pt").values())
    layers = [f"blocks.{n}.{layer}" for n in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert list(manifest["quantizers"]) == layers
    assert [patch["name"] for patch in manifest["timm_patches"]] == [patch.name for patch in main.PATCHES]


def test_what_the_metrics_say(finished: Path) -> None:
    lines = metrics(finished)
    epochs = [(0,), (1,)]
    steps = [[(epoch, n) for n in range(1, 5)] for epoch in (0, 1)]
    assert [line["step"] for line in lines] == [*steps[0], (0,), *steps[1], (1,), ()]
    losses = [line["data"]["train.loss"] for line in lines if len(line["step"]) == 2]
    means = [line["data"]["train.loss"] for line in lines if line["step"] in epochs]
    assert means == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4])
    accuracies = [line["data"]["eval.top1"] for line in lines if line["step"] in epochs]
    final = lines[-1]["data"]
    assert final["final.best_top1"] == max(accuracies) and final["final.epochs"] == 2
    assert {f"final.{name.split('.')[1]}" for name in lines[-2]["data"] if name.startswith("eval.")} <= set(final)


def test_the_best_checkpoint_is_that_of_the_best_epoch(tmp_path: Path) -> None:
    # A rate of zero after the first epoch would tie; a later equal epoch does not replace the best one.
    train(tmp_path / "run", "--epochs", "4", "--lr", "0.3")
    accuracies = column(tmp_path / "run", "eval.top1", 1)
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1
    assert best["best_top1"] == max(accuracies)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 4


def test_a_run_that_never_gets_an_image_right_has_a_best_checkpoint_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "evaluate", lambda *_: {"loss": 1.0, "top1": 0.0, "top5": 0.0})
    train(tmp_path / "run", "--epochs", "1")
    assert load_checkpoint(tmp_path / "run" / "best.pt")["best_top1"] == 0.0


def test_a_finished_run_started_again_says_so_and_changes_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(finished)
    for last in ("auto", str(finished / "last.pt")):
        assert exit_code(tiny(finished, "--quant.scheme", "mx", "--model-ema", "--resume", last)) == 0
        out, err = capsys.readouterr()
        assert (out.count("\n"), err) == (1, "")
        assert out.startswith(f"{finished / 'last.pt'} is complete: 2 epochs, best top-1 ")
    assert tree(finished) == before


def test_a_run_is_continued_by_the_name_of_its_checkpoint_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", "--epochs", "1")
    monkeypatch.chdir(tmp_path)
    train(Path("run"), "--resume", str(tmp_path / "run" / "last.pt"))
    assert "at epoch 1, step 0." in capsys.readouterr().out
    assert len(json.loads(Path("run/manifest.json").read_text())["sessions"]) == 2
    assert len(column(Path("run"), "train.loss")) == 8


def test_a_run_can_be_continued_in_another_folder(finished: Path, tmp_path: Path) -> None:
    flags = ["--quant.scheme", "mx", "--model-ema", "--epochs", "3", "--resume", str(finished / "last.pt")]
    train(tmp_path / "run", *flags)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [*((2, n) for n in range(1, 5)), (2,), ()]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["resumed_from"] == str(finished / "last.pt")


def test_resume_auto_starts_a_run_where_there_is_none(tmp_path: Path) -> None:
    train(tmp_path / "run", "--epochs", "1", "--resume", "auto")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1


def test_the_folder_is_named_after_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = words(TINY | {"--epochs": "1"})
    Path("mine.yaml").write_text("model: {drop: 0.1}\n")
    assert exit_code(["--config", "mine.yaml", *flags]) == 0
    assert exit_code(flags) == 0
    assert {path.name for path in Path("runs").iterdir()} == {"mine", "deit_tiny_patch16_224"}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and fine-tuning
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_evaluation_alone_prints_the_figures_of_the_run(
    flag: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(finished)
    last = finished / "last.pt"
    assert exit_code(tiny(tmp_path / "none", "--quant.scheme", "mx", "--eval", flag, str(last))) == 0
    logged = metrics(finished)[-2]["data"]
    figures = f"loss {logged['eval.loss']:.4f}, top1 {logged['eval.top1']:.2f} %, top5 {logged['eval.top5']:.2f} %"
    assert capsys.readouterr().out == f"{last}: {figures} on 6 images\n"
    assert tree(finished) == before and not (tmp_path / "none").exists()


def test_evaluation_of_the_best_checkpoint(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = finished / "best.pt"
    assert exit_code(tiny(finished, "--quant.scheme", "mx", "--eval", "--resume", str(best))) == 0
    logged = metrics(finished)
    accuracy = logged[-1]["data"]["final.best_top1"]
    losses = [line["data"]["eval.loss"] for line in logged if line["data"].get("eval.top1") == accuracy]
    assert f"loss {losses[0]:.4f}, top1 {accuracy:.2f} %" in capsys.readouterr().out


def test_a_quantized_checkpoint_evaluated_in_full_precision_gives_another_loss(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for quant in ("mx", "none"):
        assert exit_code(tiny(finished, "--quant.scheme", quant, "--eval", "--resume", str(finished / "last.pt"))) == 0
    one, other = capsys.readouterr().out.splitlines()
    assert one != other


def test_fine_tuning_starts_from_weights_of_another_class_count(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, torch.Tensor]] = []
    build = main.build_loss

    def note(cfg: Config, model: nn.Module, **kwargs: Any) -> Any:
        started.append({name: value.clone() for name, value in model.state_dict().items()})
        return build(cfg, model, **kwargs)

    monkeypatch.setattr(main, "build_loss", note)
    flags = ["--nb-classes", "7", "--epochs", "1", "--finetune", str(finished / "last.pt")]
    train(tmp_path / "run", *flags)
    given, ended = load_weights(finished / "last.pt"), load_weights(tmp_path / "run" / "last.pt")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["not_loaded_in_finetuning"] == ["head.weight", "head.bias"]
    assert manifest["finetuned_from"] == str(finished / "last.pt") and manifest["resumed_from"] is None
    assert started[0]["head.weight"].shape == (7, 32)
    assert all(torch.equal(value, given[name]) for name, value in started[0].items() if not name.startswith("head."))
    assert not torch.equal(ended["blocks.0.attn.qkv.weight"], given["blocks.0.attn.qkv.weight"])


def test_fine_tuning_in_int4_takes_its_steps_from_the_weights_that_were_loaded(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[engine.Run] = []
    monkeypatch.setattr(main, "train", lambda run, max_steps=None: runs.append(run))
    train(tmp_path / "run", "--quant.scheme", "int4", "--finetune", str(finished / "last.pt"))
    train(tmp_path / "fresh", "--quant.scheme", "int4")
    tuned, fresh = (dict(run.model.named_modules()) for run in runs)
    given = load_weights(finished / "last.pt")
    layers = [name for name, layer in tuned.items() if isinstance(layer, Int4Linear)]
    assert len(layers) == 8
    for name in layers:
        expected = 2 * hadamard(given[f"{name}.weight"]).abs().mean().item() / math.sqrt(7)
        assert tuned[name].step_w.item() == pytest.approx(expected, rel=1e-6)
        assert fresh[name].step_w.item() != pytest.approx(expected, rel=1e-3)  # the control: as it was at first


# ---------------------------------------------------------------------------------------------------------------------
# --print-config, --help, --smoke
# ---------------------------------------------------------------------------------------------------------------------


def test_the_printed_configuration_reads_back_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = tiny(tmp_path / "run", "--quant.scheme", "mx", "--quant.active", "q1", "q3", "--seed", "7", "--bce-loss")
    assert exit_code([*flags, "--print-config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.yaml") == load_config(overrides=main.parse_flags(flags)[1])
    assert exit_code(["--config", str(tmp_path / "printed.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == (tmp_path / "printed.yaml").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"printed.yaml"}


# Flags under DeiT's names, each beside the key it sets; every key is a flag under its own name too.
DEIT_FLAGS = """
--model --input-size --nb-classes --drop --drop-path --opt --lr --unscale-lr --global-batch --opt-betas --opt-eps
--momentum --weight-decay --clip-grad --epochs --sched --warmup-epochs --warmup-lr --min-lr --decay-epochs
--decay-rate --src --color-jitter --aa --ThreeAugment --train-interpolation --repeated-aug --no-repeated-aug --reprob
--remode --recount --mixup --cutmix --cutmix-minmax --mixup-prob --mixup-switch-prob --mixup-mode --smoothing
--bce-loss --model-ema --model-ema-decay --distillation-type --teacher-model --teacher-path --distillation-alpha
--distillation-tau --data-set --data-path --batch-size --num_workers --pin-mem --eval-crop-ratio --on-corrupt
--output_dir --seed --device --amp --compile --eval --resume --finetune --save-every --log-every
"""
KEY_FLAGS = """
--model.name --model.img_size --model.patch_size --model.num_classes --model.drop --model.drop_path --model.kwargs
--quant.scheme --quant.active --quant.scale_rule --quant.backward_operands --quant.element.activation_weight
--quant.element.gradient --quant.rounding.forward --quant.rounding.backward --quant.hadamard --quant.sampling
--quant.learned_step --stabilizer.kind --stabilizer.decay --stabilizer.k1 --stabilizer.k2 --stabilizer.detect_steps
--stabilizer.update_period --stabilizer.n_max --stabilizer.weight --stabilizer.start --stabilizer.momentum
--stabilizer.threshold_start --stabilizer.threshold_end --optim.opt --optim.lr --optim.unscale_lr --optim.global_batch
--optim.betas --optim.eps --optim.momentum --optim.weight_decay --optim.clip_grad --schedule.epochs --schedule.sched
--schedule.step_on --schedule.warmup_epochs --schedule.warmup_lr --schedule.warmup_prefix --schedule.min_lr
--schedule.decay_epochs --schedule.decay_rate --aug.crop --aug.scale --aug.hflip --aug.color_jitter --aug.aa
--aug.three_augment --aug.interpolation --aug.repeats --aug.reprob --aug.remode --aug.recount --aug.mixup --aug.cutmix
--aug.cutmix_minmax --aug.mixup_prob --aug.mixup_switch_prob --aug.mixup_mode --loss.smoothing --loss.bce
--model_ema.enabled --model_ema.decay --distillation.type --distillation.teacher_model --distillation.teacher_path
--distillation.alpha --distillation.tau --data.set --data.path --data.batch_size --data.num_workers --data.pin_mem
--data.eval_crop_ratio --data.mean --data.std --data.on_corrupt --data.num_images --run.output_dir --run.seed
--run.device --run.amp --run.compile --run.eval --run.resume --run.finetune --run.save_every --run.log_every
--quant.carrier --probes --probes.enabled --probes.steps --probes.every --probes.block --probes.images
--probes.trajectories
"""
SWITCHES = """
--unscale-lr --optim.unscale_lr --schedule.warmup_prefix --ThreeAugment --aug.three_augment --bce-loss --loss.bce
--model-ema --model_ema.enabled --pin-mem --data.pin_mem --compile --run.compile --eval --run.eval --quant.hadamard
--quant.sampling --quant.learned_step --probes --probes.enabled
"""


def test_the_flags_are_these() -> None:
    """A flag that comes, goes or changes its name is a change for everyone's scripts: note it in CHANGELOG.md."""
    own = ["-h", "--help", "--config", "--print-config", "--smoke"]
    expected = {*own, *DEIT_FLAGS.split(), *KEY_FLAGS.split(), *(f"--no-{name[2:]}" for name in SWITCHES.split())}
    assert set(build_parser()._option_string_actions) == expected


def test_help_names_the_flags_and_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--help"]) == 0
    out, err = capsys.readouterr()
    named = set(out.replace(",", " ").split())
    assert err == "" and {*DEIT_FLAGS.split(), *KEY_FLAGS.split()} <= named
    assert "Exit codes: 0 done, 1 the run failed, 2 a mistake" in " ".join(out.split())


@pytest.mark.parametrize("underscore", [False, True])
def test_dashes_and_underscores_are_alike_in_flags(underscore: bool, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = ("-", "_") if underscore else ("_", "-")
    flags = {"--drop-path": "0.25", "--output_dir": "a_b-c", "--num_workers": "3", "--model-ema-decay": "0.5"}
    argv = [word for flag, value in flags.items() for word in ("--" + flag[2:].replace(old, new), value)]
    assert exit_code([*argv, "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"]["drop_path"], printed["run"]["output_dir"]) == (0.25, "a_b-c")
    assert (printed["data"]["num_workers"], printed["model_ema"]["decay"]) == (3, 0.5)


OTHERS = ["--eval", "--resume", "auto", "--save-every", "1", "--epochs", "9", "--stabilizer.kind", "qramping"]


@pytest.mark.parametrize(("more", "steps"), [([], 2), (OTHERS, 3)])  # a detection of Q-Ramping rehearses 1 step
def test_a_smoke_test_needs_no_data_and_leaves_nothing(
    more: list[str], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path / "here")
    flags = words(TINY | {"--data-set": "imagenet", "--global-batch": "1024", "--quant.scheme": "mx"})
    taken: list[int] = []
    step = engine.train_step
    monkeypatch.setattr(engine, "train_step", lambda run, batches: taken.append(run.step) or step(run, batches))
    assert exit_code([*flags, "--smoke", *more]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "smoke test passed: 2 training steps and 1 evaluation batch of deit_tiny_patch16_224"
    assert len(taken) == steps
    assert list((tmp_path / "here").iterdir()) == list((tmp_path / "scratch").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


class Malice:
    """What a pickled file can hold: loading it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """A folder with all the files of the mistakes below; they run in it."""
    folder = tmp_path_factory.mktemp("given")
    texts = {
        "unclosed.yaml": "optim: {lr: [1\n",
        "twice.yaml": "optim: {lr: 1}\nschedule: {epochs: 3}\noptim: {opt: sgd}\n",
        "unknown_key.yaml": "schedule: {epoch: 3}\n",
        "unknown_section.yaml": "optimizer: {lr: 1}\n",
        "list.yaml": "- 1\n- 2\n",
        "wrong_type.yaml": "schedule: {epochs: many}\n",
        "mapping_for_number.yaml": "schedule: {epochs: {a: 1}}\n",
        "cycle_a.yaml": "extends: cycle_b.yaml\n",
        "cycle_b.yaml": "extends: cycle_a.yaml\n",
        "extends_nothing.yaml": "extends: missing_parent.yaml\n",
        "file": "not a folder\n",
        "text.pt": "these are no weights\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    shutil.copytree(finished, folder / "run")
    whole = (folder / "run" / "last.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(load_weights(folder / "run" / "last.pt"), folder / "weights.pt")
    torch.save({"model": {}, "optimizer": Malice(), "format": 1}, folder / "malice.pt")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for n in range(8):
                picture(folder / "images" / split / name / f"{n}.png", n)
                picture(folder / "corrupt" / split / name / f"{n}.png", n)
                picture(folder / "no_train" / "val" / name / f"{n}.png", n)
                picture(folder / "unlike" / split / (name if split == "train" else f"{name}s") / f"{n}.png", n)
    (folder / "corrupt" / "train" / "dog" / "3.png").write_bytes(b"\x89PNG but nothing else")
    return folder


IMAGES = ["--data-set", "imagenet", "--nb-classes", "2", "--no-repeated-aug", "--global-batch", "4", "--data-path"]
RUN = ["--resume", "run/last.pt", "--quant.scheme", "mx", "--model-ema"]
TOKEN = ["--model", "deit_tiny_distilled_patch16_224", "--distillation-type", "soft"]

# name: (flags, words that the sentence must have)
CONFIGURATION_MISTAKES = {
    "missing file": (["--config", "nowhere.yaml"], ["no configuration file nowhere.yaml"]),
    "misspelt file": (["--config", "wrong_tipe.yaml"], ["no configuration file", "Did you mean wrong_type.yaml?"]),
    "folder as file": (["--config", "images"], ["images is a folder", ".yaml"]),
    "no YAML": (["--config", "unclosed.yaml"], ["unclosed.yaml is not valid YAML", "line 2"]),
    "no mapping": (["--config", "list.yaml"], ["list.yaml must hold a mapping", "not a list"]),
    "key twice": (["--config", "twice.yaml"], ["twice.yaml", "'optim' is given twice", "line 1"]),
    "key unknown": (
        ["--config", "unknown_key.yaml"],
        ["unknown_key.yaml: there is no key schedule.epoch", "did you mean schedule.epochs?"],
    ),
    "section unknown": (
        ["--config", "unknown_section.yaml"],
        ["unknown_section.yaml: there is no key optimizer", "did you mean optim"],
    ),
    "type in file": (
        ["--config", "wrong_type.yaml"],
        ["wrong_type.yaml: schedule.epochs is 'many'", "valid integer"],
    ),
    "mapping for number": (["--config", "mapping_for_number.yaml"], ["schedule.epochs is {'a': 1}", "valid integer"]),
    "extends cycle": (["--config", "cycle_a.yaml"], ["extends itself", "cycle_a.yaml -> cycle_b.yaml"]),
    "extends nothing": (["--config", "extends_nothing.yaml"], ["no configuration file missing_parent.yaml"]),
    "flag unknown": (["--weight-decays", "1"], ["no flag --weight-decays", "did you mean --weight-decay?"]),
    "key as flag unknown": (["--optim.lrs", "1"], ["no flag --optim.lrs", "did you mean --optim.lr?"]),
    "flag without value": (["--lr"], ["--lr", "expected one argument"]),
    "word without flag": (["train"], ["train", "see --help"]),
    "type of flag": (["--lr", "fast"], ["the command line: optim.lr is 'fast'", "valid number"]),
    "switch for a number": (["--epochs", "true"], ["the command line: schedule.epochs is true", "valid integer"]),
    "switch in a list": (["--opt-betas", "0.9", "true"], ["optim.betas.1 is true", "valid number"]),
    "deviation of zero": (["--data.std", "0", "0", "0"], ["data.std.0 is 0", "greater than 0"]),
    "area": (["--aug.scale", "-1", "1"], ["aug.scale.0 is -1", "greater than or equal to 0"]),
    "crop ratio": (["--eval-crop-ratio", "1e-9"], ["data.eval_crop_ratio is", "greater than or equal to 0.1"]),
    "fraction of an epoch": (["--epochs", "1.5"], ["schedule.epochs is 1.5", "valid integer"]),
    "number for folder": (["--output_dir", "[1, 2]"], ["run.output_dir is [1, 2]", "valid string"]),
    "choice": (["--mixup-mode", "all"], ["aug.mixup_mode is 'all'", "'batch', 'pair' or 'elem'"]),
    "negative number": (["--lr", "-1"], ["optim.lr is -1", "greater than 0"]),
    "rate out of range": (["--drop-path", "1.0"], ["model.drop_path is 1.0", "less than 1"]),
    "scheme": (["--quant.scheme", "fp8"], ["quant.scheme is 'fp8'", "should be one of 'none', 'mx'"]),
    "key of another scheme": (
        ["--quant.scale_rule", "floor"],
        ["quant.scale_rule does not apply while quant.scheme is none"],
    ),
    "quantizer twice": (["--quant.scheme", "mx", "--quant.active", "q1", "q1"], ["names a quantizer twice: q1, q1"]),
    "seed": (["--seed", "-3"], ["run.seed is -3", "greater than or equal to 0"]),
}
RUN_MISTAKES = {
    "model unknown": (
        ["--model", "deit_tinny_patch16_224"],
        ["no model deit_tinny", "did you mean deit_tiny_patch16_224?"],
    ),
    "model arguments": (
        ["--model.kwargs", "{width: 3}"],
        ["timm cannot make deit_tiny", "width=3", "unexpected keyword"],
    ),
    "model sizes": (
        ["--model.kwargs", "{embed_dim: 33, depth: 2, num_heads: 2}"],
        ["timm cannot make deit_tiny", "embed_dim=33", "divisible by num_heads"],
    ),
    "data set unknown": (["--data-set", "imagnet"], ["no data.set imagnet", "did you mean imagenet?"]),
    "data path not given": (["--data-set", "imagenet"], ["needs data.path (--data-path)", "train/ and val/"]),
    "data path missing": ([*IMAGES, "nowhere"], ["data.path nowhere does not exist", "train/ and val/"]),
    "data path without train": ([*IMAGES, "no_train"], ["no_train has no train/", "it holds val"]),
    "classes differ": ([*IMAGES, "unlike"], ["need the same classes", "2 for training and 2 for evaluation", "cat"]),
    "class count": ([*IMAGES, "images", "--nb-classes", "3"], ["has 2 classes but model.num_classes is 3"]),
    "image corrupt": ([*IMAGES, "corrupt"], ["corrupt/train/dog/3.png cannot be read", "--on-corrupt skip"]),
    "policy unknown": (["--aa", "random"], ["aug.aa random is not one of timm's", "rand-m9-mstd0.5-inc1"]),
    "batch": (["--batch-size", "5"], ["global batch of 16", "1 process(es) x 5", "a --batch-size that divides 16"]),
    "global batch": (["--global-batch", "128"], ["64 training images", "fewer than one batch of 128", "lower"]),
    "global batch in parts": (
        ["--global-batch", "128", "--batch-size", "16"],
        ["fewer images than the global batch of 128"],
    ),
    "odd batch with mixup": (["--global-batch", "15"], ["mixup pairs the images", "must be even, not 15"]),
    "cutmix boxes of no range": (
        ["--cutmix-minmax", "0.5", "0.6"],  # of 8 pixels: from 4 to 4
        ["aug.cutmix_minmax gives cutmix boxes of 4 to 4 pixels in images of 8", "larger than the first"],
    ),
    "resume nothing": (["--resume", "nowhere.pt"], ["no checkpoint nowhere.pt"]),
    "resume folder": (["--resume", "run"], ["run is a folder", "run/last.pt"]),
    "resume another recipe": (
        [*RUN, "--weight-decay", "0"],
        ["run/last.pt was trained with optim.weight_decay 0.05 (here 0.0); resume with the same recipe", "--finetune"],
    ),
    "evaluate another model": (
        ["--eval", *RUN, "--model.kwargs", "{embed_dim: 64, depth: 2, num_heads: 2}"],
        ["run/last.pt is the checkpoint of another model", "1x1x64 here and 1x1x32 in the file", "--finetune"],
    ),
    "resume truncated": (["--resume", "truncated.pt"], ["truncated.pt is truncated, damaged or not a checkpoint"]),
    "resume text": (["--resume", "text.pt"], ["text.pt is truncated, damaged or not a checkpoint"]),
    "resume code": (["--resume", "malice.pt"], ["malice.pt would run code when loaded and was not loaded"]),
    "resume weights": (["--resume", "weights.pt"], ["weights.pt is no training checkpoint", "--finetune"]),
    "finetune another model": (
        ["--finetune", "weights.pt", "--model.kwargs", "{embed_dim: 64, depth: 2, num_heads: 2}"],
        ["weights in weights.pt do not fit the model", "--model"],
    ),
    "folder holds a run": (["--output_dir", "run"], ["run already holds a run", "--resume auto", "--output_dir"]),
    "folder below a file": (["--output_dir", "file/run"], ["file/run cannot be written", "another --output_dir"]),
    "evaluate nothing": (["--eval"], ["--eval needs weights", "--resume CHECKPOINT"]),
    "evaluate nothing yet": (["--eval", "--resume", "auto"], ["--eval needs weights", "--resume CHECKPOINT"]),
    "optimizer unknown": (["--opt", "adamzzz"], ["optimizer adamzzz cannot be made", "not found", "check --opt"]),
    "optimizer of second order": (
        ["--opt", "adahessian"],
        ["adahessian cannot be made", "second derivatives", "--opt"],
    ),
    "betas": (["--opt-betas", "2", "0.9"], ["optimizer adamw cannot be made", "beta", "--opt-betas"]),
    "too few betas": (["--opt", "adan"], ["optimizer adan cannot be made", "--opt-betas"]),
    "warm-up": (
        ["--schedule.warmup_prefix", "--warmup-epochs", "2"],
        ["warm-up of 2 epochs must be shorter than the 2 epochs of training", "--warmup-epochs"],
    ),
    "stabilizer without quantizers": (
        ["--stabilizer.kind", "qema"],
        ["stabilizer qema works on weights in MXFP4, and the model has none", "see quant and stabilizer"],
    ),
    "stabilizer with another optimizer": (
        ["--stabilizer.kind", "qramping", "--quant.scheme", "mx", "--opt", "sgd"],
        ["qramping changes AdamW and cannot work with the optimizer sgd", "--opt"],
    ),
    "no distillation token": (["--distillation-type", "hard"], ["needs a model with a distillation token"]),
    "no teacher given": (TOKEN, ["teacher's checkpoint", "--teacher-path FILE"]),
    "teacher missing": ([*TOKEN, "--teacher-path", "nowhere.pth"], ["no checkpoint nowhere.pth"]),
    "teacher unknown": ([*TOKEN, "--teacher-path", "weights.pt", "--teacher-model", "owl"], ["no teacher model owl"]),
    "teacher of another shape": (
        [*TOKEN, "--teacher-path", "weights.pt", "--teacher-model", "test_resnet"],
        ["weights.pt does not fit the teacher test_resnet with 4 classes", "--teacher-model"],
    ),
    "no GPU": (["--device", "cuda"], ["--device is cuda and torch sees no CUDA device", "--device cpu"]),
    "device unknown": (["--device", "mps"], ["--device is 'mps'", "expected auto, cpu, cuda"]),
}


def expect_mistake(argv: list[str], sentence: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree(folder)
    assert exit_code(argv) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert err[:-1].endswith((".", "?")), err
    for words in sentence:
        assert words in err, err
    assert out == ""
    after = tree(folder)
    assert {name: after.get(name) for name in before} == before


def table(mistakes: dict[str, tuple[list[str], list[str]]]) -> Any:
    ids = [name.replace(" ", "_") for name in mistakes]
    return pytest.mark.parametrize(("flags", "sentence"), mistakes.values(), ids=ids)


@table(CONFIGURATION_MISTAKES)
def test_a_mistake_in_the_configuration(
    flags: list[str], sentence: list[str], given: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(given)
    expect_mistake(flags, sentence, given, capfd)


@table(RUN_MISTAKES)
def test_a_mistake_in_what_is_run(
    flags: list[str],
    sentence: list[str],
    given: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect_mistake(tiny(tmp_path / "run", *flags), sentence, given, capfd)
    assert not (given / "ran").exists()
    if flags[-1] != "corrupt":  # found out only in training
        assert not (tmp_path / "run").exists()


def test_the_code_in_the_malicious_file_would_have_run(given: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.load(io.BytesIO((given / "malice.pt").read_bytes()), weights_only=False)
    assert Path("ran").is_dir()


def test_the_given_images_are_fine_without_the_mistake(given: Path, tmp_path: Path) -> None:
    flags = [*IMAGES, str(given / "images"), "--epochs", "1"]
    assert len(column(train(tmp_path / "run", *flags), "train.loss")) == 4


def test_corrupt_images_can_be_skipped_and_are_counted(given: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", *IMAGES, str(given / "corrupt"), "--epochs", "1", "--on-corrupt", "skip")
    assert column(tmp_path / "run", "train.corrupt_images", 1) == [1]


def test_fp8_products_need_a_gpu_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    fp8, bf16 = (load_config(None, ["quant.scheme=mx", f"quant.carrier={carrier}"]) for carrier in ("fp8", "bf16"))
    with pytest.raises(UserError, match="NVIDIA A100 has no FP8 products"):
        main.check_carrier(fp8, cuda)
    main.check_carrier(bf16, cuda)
    main.check_carrier(fp8, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    main.check_carrier(fp8, cuda)
