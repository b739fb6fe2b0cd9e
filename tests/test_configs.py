"""The files in configs/: published figures, recipes (section 7.1 of the paper) and methods."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from config import Config, load_config
from config.schema import ProbesConfig
from models import ZOO
from quantization import PRESETS, QuantizerSpec, resolve

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SMALL = ("digits", "tiny_imagenet")

# Table 2 of arXiv 2502.20853: top-1 accuracy (%) on ImageNet-1K after 90 epochs.
COLUMNS = ("deit_tiny", "deit_small", "deit_base", "swin_tiny", "swin_small")
TABLE_2 = {
    "full_precision": (63.73, 73.33, 75.57, 78.35, 80.44),
    "int4": (40.14, 60.07, 68.13, 74.22, 75.74),
    "microscaling": (58.56, 70.10, 74.54, 76.87, 79.45),
    "tetrajet": (59.75, 71.03, 74.91, 77.12, 79.51),
    "tetrajet_qema": (60.00, 72.25, 77.32, 77.30, 79.74),
    "tetrajet_qramping": (60.31, 71.32, 75.62, 77.33, 79.67),
}
ROW_OF = {  # of the end of a file's name
    "fp": "full_precision",
    "int4": "int4",
    "microscaling": "microscaling",
    "tetrajet": "tetrajet",
    "qema": "tetrajet_qema",
    "qramping": "tetrajet_qramping",
}
DECAY = dict(zip(COLUMNS, (0.9983, 0.9972, 0.999, 0.9975, 0.998), strict=True))  # Table 8, tuned
K2 = dict(zip(COLUMNS, (5, 5, 5, 3, 4), strict=True))
CELLS = [(column, method) for column in COLUMNS for method in ROW_OF]
# Those of the repository, beside which users put their own.
FILES = [CONFIGS / f"{column}_{method}.yaml" for column, method in CELLS]
FILES += [CONFIGS / f"{name}_{method}.yaml" for name in SMALL for method in ROW_OF if method != "int4"]

# The recipe of 90 epochs on ImageNet-1K; what Swin and the larger models have otherwise is below.
RECIPE = {
    "model": {"img_size": 224, "patch_size": None, "num_classes": None, "drop": 0.0, "drop_path": 0.1, "kwargs": {}},
    "optim": {
        "opt": "adamw",
        "lr": 5e-4,
        "unscale_lr": False,
        "global_batch": 1024,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.05,
        "clip_grad": None,
    },
    "schedule": {
        "epochs": 90,
        "sched": "cosine",
        "step_on": "epoch",
        "warmup_epochs": 5,
        "warmup_lr": 1e-6,
        "warmup_prefix": False,
        "min_lr": 1e-5,
    },
    "aug": {
        "crop": "rrc",
        "scale": (0.08, 1.0),
        "hflip": 0.5,
        "color_jitter": 0.3,
        "aa": "rand-m9-mstd0.5-inc1",
        "three_augment": False,
        "interpolation": "bicubic",
        "repeats": 3,
        "reprob": 0.25,
        "remode": "pixel",
        "recount": 1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "cutmix_minmax": None,
        "mixup_prob": 1.0,
        "mixup_switch_prob": 0.5,
        "mixup_mode": "batch",
    },
    "loss": {"smoothing": 0.1, "bce": False},
    "model_ema": {"enabled": False},
    "distillation": {"type": "none"},
    "data": {
        "set": "imagenet",
        "eval_crop_ratio": 0.875,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "on_corrupt": "error",
    },
    "run": {"seed": 0, "amp": "auto"},
}
SWIN = {
    "optim.clip_grad": 5.0,
    "schedule.step_on": "iteration",
    "schedule.warmup_epochs": 20,
    "schedule.warmup_prefix": True,
    "aug.color_jitter": 0.4,
    "aug.repeats": 1,
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "deit_tiny": {},
    "deit_small": {},
    "deit_base": {"optim.global_batch": 512, "optim.lr": 2.5e-4},
    "swin_tiny": {**SWIN, "model.drop_path": 0.2},
    "swin_small": {**SWIN, "model.drop_path": 0.3},
}
FINAL_LR = dict(zip(COLUMNS, (1e-3, 1e-3, 2.5e-4, 1e-3, 1e-3), strict=True))
NAMES = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
}


def load(column: str, method: str) -> Config:
    return load_config(CONFIGS / f"{column}_{method}.yaml")


def test_the_rows_of_table_2_and_those_of_small_sets_are_there() -> None:
    assert len(FILES) == 40 and all(path.is_file() for path in FILES)


@pytest.mark.parametrize(("column", "method"), CELLS)
def test_a_row_carries_its_published_figure(column: str, method: str) -> None:
    row = ROW_OF[method]
    top1 = TABLE_2[row][COLUMNS.index(column)]
    assert load(column, method).paper.model_dump() == {
        "table": 2,
        "row": row,
        "column": column,
        "top1": top1,
        "top5": None,
    }
    title = (CONFIGS / f"{column}_{method}.yaml").read_text().splitlines()[0]
    family, size = column.split("_")
    assert title.startswith(f"# Table 2, {'DeiT' if family == 'deit' else 'Swin'}-{size.capitalize()}, ")
    assert f"top-1 {top1:.2f} % " in title


@pytest.mark.parametrize(("column", "method"), CELLS)
def test_a_row_has_the_recipe_of_its_model(column: str, method: str) -> None:
    cfg = load(column, method).model_dump()
    expected = {f"{section}.{key}": value for section, keys in RECIPE.items() for key, value in keys.items()}
    expected |= OTHERWISE[column] | {"model.name": NAMES[column]}
    assert {key: cfg[key.partition(".")[0]][key.partition(".")[2]] for key in expected} == expected


@pytest.mark.parametrize(("column", "method"), CELLS)
def test_the_final_learning_rate_is_the_published_one(column: str, method: str) -> None:
    """Linear scaling by batch / 512, as in DeiT."""
    optim = load(column, method).optim
    assert not optim.unscale_lr
    assert optim.lr * optim.global_batch / 512 == FINAL_LR[column]


@pytest.mark.parametrize(("column", "method"), CELLS)
def test_a_row_has_its_method(column: str, method: str) -> None:
    cfg = load(column, method)
    if method == "int4":
        assert cfg.quant.model_dump() == {"scheme": "int4", "hadamard": True, "sampling": True, "learned_step": True}
    else:
        preset = {"fp": "full_precision", "microscaling": "microscaling"}.get(method, "tetrajet")
        assert resolve(cfg.quant) == PRESETS[preset]
    stabilizer = cfg.stabilizer.model_dump()
    if method == "qema":
        assert stabilizer == {"kind": "qema", "decay": DECAY[column]}
    elif method == "qramping":
        settings = {"k1": 16.0, "k2": K2[column], "detect_steps": 30, "update_period": None, "n_max": None}
        assert stabilizer == {"kind": "qramping", **settings}
    else:
        assert stabilizer == {"kind": "none"}


def test_the_presets_are_those_of_the_paper() -> None:
    """Sections 3.2 and 3.3: what Microscaling does otherwise than TetraJet."""
    tetrajet, microscaling = (resolve(load("deit_tiny", method).quant) for method in ("tetrajet", "microscaling"))
    assert tetrajet.q2 == QuantizerSpec("e2m1", "truncation_free", "nearest_even", -1)
    assert tetrajet.q4 == QuantizerSpec("e2m1", "truncation_free", "stochastic", 0)
    assert microscaling.q2 == QuantizerSpec("e2m1", "floor", "nearest_even", -1)
    assert microscaling.q4 == QuantizerSpec("e2m1", "floor", "nearest_even", 0)
    assert (tetrajet.backward_operands, microscaling.backward_operands) == ("requantized", "original")


@pytest.mark.parametrize("column", COLUMNS)
def test_the_methods_of_a_model_differ_in_the_method_alone(column: str) -> None:
    def rest(method: str) -> dict[str, Any]:
        return load(column, method).model_dump(exclude={"quant", "stabilizer", "paper"})

    assert all(rest(method) == rest("fp") for method in ROW_OF)


def test_without_a_file_the_recipe_is_that_of_deit_tiny_without_its_probes() -> None:
    assert load_config() == load_config(CONFIGS / "deit_tiny_fp.yaml", ["paper=null", "probes.enabled=false"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_run_has_its_probes_on_as_they_come(path: Path) -> None:
    """Figures 2 to 6 and Table 3 can be drawn from any of them."""
    assert load_config(path).probes == ProbesConfig(enabled=True)


@pytest.mark.parametrize("task", SMALL)
def test_the_smaller_tasks_compare_the_same_methods(task: str) -> None:
    cfgs = {method: load(task, method) for method in ("fp", "microscaling", "tetrajet")}
    for method, preset in (("fp", "full_precision"), ("microscaling", "microscaling"), ("tetrajet", "tetrajet")):
        assert resolve(cfgs[method].quant) == PRESETS[preset]
        assert cfgs[method].stabilizer.kind == "none"
        assert cfgs[method].paper is None  # not in the paper
    rest = [cfg.model_dump(exclude={"quant"}) for cfg in cfgs.values()]
    assert rest[0] == rest[1] == rest[2]
    for method in ("qema", "qramping"):
        cfg = load(task, method)
        assert cfg.stabilizer.kind == method and cfg.paper is None
        assert cfg.model_dump(exclude={"stabilizer"}) == cfgs["tetrajet"].model_dump(exclude={"stabilizer"})


def test_tiny_imagenet_is_the_recipe_of_deit_on_smaller_images() -> None:
    """Its global batch, and with it the learning rate, is a quarter; nothing else but the images' size differs."""

    def flat(cfg: Config) -> dict[str, Any]:
        return {f"{s}.{k}": v for s, keys in cfg.model_dump().items() if keys and s != "paper" for k, v in keys.items()}

    ours, imagenet = flat(load("tiny_imagenet", "fp")), flat(load("deit_tiny", "fp"))
    assert {key: value for key, value in ours.items() if value != imagenet[key]} == {
        "model.img_size": 64,
        "model.patch_size": 8,
        "optim.global_batch": 256,
        "aug.repeats": 1,
        "data.eval_crop_ratio": 1.0,
    }


def test_no_two_configurations_are_the_same_run() -> None:
    runs = {path.stem: load_config(path).model_dump_json(exclude={"paper"}) for path in FILES}
    same = [(a, b) for a, b in itertools.combinations(runs, 2) if runs[a] == runs[b]]
    assert same == []
    control = load_config(CONFIGS / "deit_tiny_tetrajet.yaml", ["quant.scheme=none"])
    assert control.model_dump_json(exclude={"paper"}) == runs["deit_tiny_fp"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_names_the_command_that_runs_it(path: Path) -> None:
    command = next(line for line in path.read_text().splitlines() if "bash scripts/" in line)
    if path.stem.startswith(COLUMNS):
        assert command == f"#   DATA_PATH=/path/to/imagenet bash scripts/{path.stem}.sh"
    else:
        assert command.endswith(f"bash scripts/run.sh configs/{path.name}")
    for script in re.findall(r"scripts/\w+\.sh", command):
        assert (CONFIGS.parent / script).is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_model_is_one_of_the_zoo_and_in_its_column(path: Path) -> None:
    cfg = load_config(path)
    (record,) = (model for model in ZOO if model.timm_name == cfg.model.name)
    assert cfg.paper is None or cfg.paper.column == record.column


@pytest.mark.parametrize("path", sorted((CONFIGS / "common").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_common_piece_is_used_and_is_a_configuration_without_a_figure(path: Path) -> None:
    assert load_config(path).paper is None
    extended = [yaml.safe_load(other.read_text()).get("extends", []) for other in CONFIGS.glob("*/*.yaml")]
    extended += [yaml.safe_load(other.read_text()).get("extends", []) for other in FILES]
    names = {Path(name).name for names in extended for name in ([names] if isinstance(names, str) else names)}
    assert path.name in names
