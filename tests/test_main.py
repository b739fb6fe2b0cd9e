"""The program: run directories, evaluation and fine-tuning, flags, --print-config, --help and --smoke."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import TINY, column, exit_code, metrics, replace, tiny, train, tree
from torch import nn

import engine
import main
from config import Config, load_config
from config.flags import build_parser
from quantization.layers.int4 import Int4Linear, hadamard
from record.checkpoint import load_checkpoint
from record.weights import load_weights
from training.losses import build_loss

pytestmark = pytest.mark.usefixtures("in_this_process")


def words(flags: dict[str, str]) -> list[str]:
    return [word for pair in flags.items() for word in pair]


# ---------------------------------------------------------------------------------------------------------------------
# The run directory
# ---------------------------------------------------------------------------------------------------------------------

MANIFEST = """start_time command_line git versions device world_size seed model paper timm_patches quantizers parameters
classes class_names unquantized_block_linears
batch steps_per_epoch images autocast resumed_from finetuned_from not_loaded_in_finetuning sessions"""


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
    replace(monkeypatch, main.evaluate, lambda *_: {"loss": 1.0, "top1": 0.0, "top5": 0.0})
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
    assert capsys.readouterr().out == f"{last}: {figures} on 6 images, quant.scheme mx\n"
    assert tree(finished) == before and not (tmp_path / "none").exists()


def test_evaluation_of_the_best_checkpoint(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = finished / "best.pt"
    assert exit_code(tiny(finished, "--quant.scheme", "mx", "--eval", "--resume", str(best))) == 0
    logged = metrics(finished)
    accuracy = logged[-1]["data"]["final.best_top1"]
    losses = [line["data"]["eval.loss"] for line in logged if line["data"].get("eval.top1") == accuracy]
    assert f"loss {losses[0]:.4f}, top1 {accuracy:.2f} %" in capsys.readouterr().out


def test_fine_tuning_starts_from_weights_of_another_class_count(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, torch.Tensor]] = []
    build = build_loss

    def note(cfg: Config, model: nn.Module, **kwargs: Any) -> Any:
        started.append({name: value.clone() for name, value in model.state_dict().items()})
        return build(cfg, model, **kwargs)

    replace(monkeypatch, build_loss, note)
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
    replace(monkeypatch, main.train, lambda run, max_steps=None: runs.append(run))
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
--model --input-size --nb-classes --drop --drop-path --dr --opt --lr --unscale-lr --global-batch --opt-betas --opt-eps
--momentum --weight-decay --layer-decay --clip-grad --epochs --sched --warmup-epochs --warmup-lr --min-lr --decay-epochs
--decay-rate --src --color-jitter --aa --ThreeAugment --train-interpolation --repeated-aug --no-repeated-aug --reprob
--remode --recount --mixup --cutmix --cutmix-minmax --mixup-prob --mixup-switch-prob --mixup-mode --smoothing
--bce-loss --model-ema --model-ema-decay --distillation-type --teacher-model --teacher-path --distillation-alpha
--distillation-tau --data-set --data-path --batch-size --num_workers --pin-mem --eval-crop-ratio --on-corrupt
--output_dir --seed --device --amp --compile --grad-checkpointing --cuda-graphs --eval --resume --finetune --use-ema
--save-every --log-every --val-split --class-map --pretrained
"""
KEY_FLAGS = """
--model.name --model.img_size --model.patch_size --model.num_classes --model.drop --model.drop_path --model.kwargs
--quant.scheme --quant.active --quant.scale_rule --quant.backward_operands --quant.element.activation_weight
--quant.element.gradient --quant.rounding.forward --quant.rounding.backward --quant.hadamard --quant.sampling
--quant.learned_step --stabilizer.kind --stabilizer.decay --stabilizer.k1 --stabilizer.k2 --stabilizer.detect_steps
--stabilizer.update_period --stabilizer.n_max --stabilizer.weight --stabilizer.start --stabilizer.momentum
--stabilizer.threshold_start --stabilizer.threshold_end --optim.opt --optim.lr --optim.unscale_lr --optim.global_batch
--optim.betas --optim.eps --optim.momentum --optim.weight_decay --optim.layer_decay --optim.clip_grad
--schedule.epochs --schedule.sched
--schedule.step_on --schedule.warmup_epochs --schedule.warmup_lr --schedule.warmup_prefix --schedule.min_lr
--schedule.decay_epochs --schedule.decay_rate --aug.crop --aug.scale --aug.hflip --aug.color_jitter --aug.aa
--aug.three_augment --aug.interpolation --aug.repeats --aug.reprob --aug.remode --aug.recount --aug.mixup --aug.cutmix
--aug.cutmix_minmax --aug.mixup_prob --aug.mixup_switch_prob --aug.mixup_mode --loss.smoothing --loss.bce
--model_ema.enabled --model_ema.decay --distillation.type --distillation.teacher_model --distillation.teacher_path
--distillation.alpha --distillation.tau --data.set --data.path --data.val_split --data.class_map
--data.batch_size --data.num_workers --data.pin_mem --pipeline --data.pipeline --gpu-decode --data.gpu_decode
--resident --data.resident
--data.eval_crop_ratio --data.mean --data.std --data.on_corrupt --data.num_images --run.output_dir --run.seed
--run.device --run.amp --run.compile --run.grad_checkpointing --run.cuda_graphs --run.eval --run.resume
--run.finetune --run.use_ema --run.save_every
--run.log_every --quant.carrier --probes --probes.enabled --probes.steps --probes.every --probes.block --probes.images
--probes.trajectories --probes.quantizers --quant.weight_operand --quant.activation_operand --quant.block_size
--quant.scale_format --quant.scale_rounding --quant.target --quant.outer --quant.outer_delay --quant.target_scale
--quant.arithmetic --quant.quantizers --quant.rotation --quant.policy.first --quant.policy.last --quant.policy.spare
"""
SWITCHES = """
--unscale-lr --optim.unscale_lr --schedule.warmup_prefix --ThreeAugment --aug.three_augment --bce-loss --loss.bce
--model-ema --model_ema.enabled --pin-mem --data.pin_mem --compile --run.compile --cuda-graphs --grad-checkpointing
--run.grad_checkpointing --use-ema --run.use_ema
--run.cuda_graphs --eval --run.eval --quant.hadamard --quant.sampling --quant.learned_step --probes --probes.enabled
--probes.quantizers
"""


def test_the_flags_are_these() -> None:
    """A flag that comes, goes or changes its name is a change for everyone's scripts: note it in CHANGELOG.md."""
    own = ["-h", "--help", "--config", "--print-config", "--smoke"]
    own += ["--export", "--export-form", "--export-dtype", "--predict", "--png"]
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
    replace(monkeypatch, engine.train_step, lambda run, batches: taken.append(run.step) or step(run, batches))
    assert exit_code([*flags, "--smoke", *more]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "smoke test passed: 2 training steps and 1 evaluation batch of deit_tiny_patch16_224"
    assert len(taken) == steps
    assert list((tmp_path / "here").iterdir()) == list((tmp_path / "scratch").iterdir()) == []
