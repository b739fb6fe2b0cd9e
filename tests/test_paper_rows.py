"""The paper's tables as configurations: figures, what each row is, which rows are one run, and the recipes.

What is expected stands in tests/data (figures copied from the paper; the six quantizers of every run) and below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import exit_code, undisturbed
from quick import some

from config import Config, UserError, dump_config, load_config
from config.rows import Cell, all_cells, find_cell, run_name
from quantization import resolve
from record.runlog import RunLog
from studies.plan import listing, runs_to_start

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests/data"
PAPER = yaml.safe_load((DATA / "paper_tables.yaml").read_text())
MODELS = ("deit_tiny", "deit_small", "deit_base", "swin_tiny", "swin_small")
METHODS = {
    "full_precision": "fp",
    "int4": "int4",
    "microscaling": "microscaling",
    "tetrajet": "tetrajet",
    "tetrajet_qema": "qema",
    "tetrajet_qramping": "qramping",
}
CELLS = all_cells()
CONFIGS = {name: load_config(reference) for name, reference in {c.run: c.run_reference for c in CELLS}.items()}


def recipe(cfg: Config) -> str:
    """All but the published figure, as text."""
    return json.dumps({**cfg.model_dump(mode="json"), "paper": None})


def cell_id(cell: Cell) -> str:
    return f"{cell.table}-{cell.row}-{cell.column}"


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def published() -> Iterator[tuple[tuple[int, str, str], dict[str, float]]]:
    """(table, row, column) and its figures, from the copy of the paper."""
    for name, table in PAPER.items():
        number, columns = int(name.removeprefix("table")), table["columns"]
        for row, values in table.items():
            if row == "columns" or row.endswith(("_tuned_decay", "_tuned_k2")):
                continue
            figures = dict(zip(columns, values, strict=True))
            if number in (3, 5):  # their columns are figures, of DeiT-T
                yield (number, row, "deit_tiny"), figures
            else:
                yield from (((number, row, column), {"top1": value}) for column, value in figures.items())


def test_every_figure_of_the_paper_is_there() -> None:
    ours = {(cell.table, cell.row, cell.column): cell.published for cell in CELLS}
    assert ours == dict(published())
    assert list(ours) == sorted(ours, key=lambda key: key[0])
    # 115 cells with accuracies, of which the 8 of Table 5 have two; 4 with two rates of change.
    assert len(CELLS) == 119
    assert sum(len(cell.published) for cell in CELLS) == 131


def test_the_readme_has_the_figures_of_table_2() -> None:
    lines = [[word.strip(" `") for word in line.split("|")[2:-1]] for line in (ROOT / "README.md").open()]
    matrix = {method: figures for method, *figures in filter(None, lines) if method in ("METHOD", *METHODS.values())}
    figures = {method: [f"{value:.2f}" for value in PAPER["table2"][row]] for row, method in METHODS.items()}
    assert matrix == {"METHOD": [*MODELS], **figures}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("row", METHODS)
def test_a_configuration_of_table_2_carries_its_figure(row: str, model: str) -> None:
    paper = load_config(ROOT / f"configs/{model}_{METHODS[row]}.yaml").paper
    figure = PAPER["table2"][row][MODELS.index(model)]
    assert (paper.table, paper.row, paper.column, paper.top1) == (2, row, model, figure)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def test_there_are_75_runs() -> None:
    assert len(CONFIGS) == 75
    assert len({recipe(cfg) for cfg in CONFIGS.values()}) == 75  # and no two of them are the same
    # 30 of Table 2, and what the other tables add.
    added = {n: len({c.run for c in CELLS if c.table == n and not c.same}) for n in range(1, 11)}
    assert added == {1: 12, 2: 0, 3: 0, 4: 4, 5: 6, 6: 2, 7: 3, 8: 6, 9: 4, 10: 8}
    assert {f"{model}_{method}" for model in MODELS for method in METHODS.values()} < CONFIGS.keys()


@pytest.mark.parametrize("cell", CELLS, ids=cell_id)
def test_a_row_is_the_run_it_says(cell: Cell) -> None:
    """Same or not: the row, loaded by itself, computes what its run computes, and has its own paper entry."""
    cfg = load_config(cell.reference)
    assert recipe(cfg) == recipe(CONFIGS[cell.run])
    figures = {"top1": cell.published.get("top1"), "top5": cell.published.get("top5")}
    assert cfg.paper.model_dump() == {"table": cell.table, "row": cell.row, "column": cell.column, **figures}
    assert cfg.model.name.startswith(cell.column)
    assert cell.same == (cell.run_reference != cell.reference)


def test_one_run_has_one_figure() -> None:
    seen: dict[tuple[str, str], float] = {}
    for cell in CELLS:
        for figure, value in cell.published.items():
            assert seen.setdefault((cell.run, figure), value) == value, (cell, figure)


def leaves(mapping: dict[str, Any]) -> list[Any]:
    return [leaf for v in mapping.values() for leaf in (leaves(v) if isinstance(v, dict) else [v])]


@pytest.mark.parametrize("cell", [c for c in CELLS if not c.same], ids=cell_id)
def test_a_row_is_a_small_change_of_table_2(cell: Cell) -> None:
    assert load_config(cell.base).paper.table == 2
    assert 1 <= len(leaves(cell.changes)) <= 3
    assert recipe(load_config(cell.base)) != recipe(CONFIGS[cell.run])


def test_the_quantizers_of_every_run() -> None:
    golden = yaml.safe_load((DATA / "quantizer_tables.yaml").read_text())
    expected = {run: group["table"] for group in golden for run in group["runs"]}
    assert expected.keys() == CONFIGS.keys()
    for name, cfg in CONFIGS.items():
        table = cfg.quant.model_dump() if cfg.quant.scheme == "int4" else resolve(cfg.quant).table()
        assert table == expected[name], name


def test_the_stabilizers_of_every_run() -> None:
    """From the names of the rows and the tuned values that Table 8 prints."""
    tuned = {
        "qema": dict(zip(MODELS, PAPER["table8"]["qema_tuned_decay"], strict=True)),
        "qramping": dict(zip(MODELS, PAPER["table8"]["qramping_tuned_k2"], strict=True)),
    }
    for cell in CELLS:
        s = CONFIGS[cell.run].stabilizer
        numbers = [float(n) for n in re.findall(r"\d[\d.]*", cell.row)]
        if cell.row.startswith("decay_"):
            assert (s.kind, s.decay) == ("qema", *numbers)
        elif cell.row.startswith("k1_"):
            assert (s.kind, s.k1, s.k2) == ("qramping", numbers[1], numbers[3])
        elif (cell.row.endswith("qema") and "without" not in cell.row) or cell.row == "qema_tuned":
            assert (s.kind, s.decay) == ("qema", tuned["qema"][cell.column])
        elif cell.row == "qema_default":
            assert (s.kind, s.decay) == ("qema", 0.998)
        elif (cell.row.endswith("qramping") and "without" not in cell.row) or cell.row == "qramping_tuned":
            assert (s.kind, s.k1, s.k2) == ("qramping", 16, tuned["qramping"][cell.column])
        elif cell.row == "qramping_default":
            assert (s.kind, s.k1, s.k2) == ("qramping", 16, 5)
        else:
            kind = cell.row.removeprefix("tetrajet_") if cell.row.endswith(("dampen", "freeze")) else "none"
            assert s.kind == kind, cell


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------

COMMON = {
    "optim.opt": "adamw",
    "optim.betas": (0.9, 0.999),
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.05,
    "optim.unscale_lr": False,
    "schedule.epochs": 90,
    "schedule.sched": "cosine",
    "schedule.warmup_lr": 1e-6,
    "schedule.min_lr": 1e-5,
    "aug.crop": "rrc",
    "aug.aa": "rand-m9-mstd0.5-inc1",
    "aug.three_augment": False,
    "aug.interpolation": "bicubic",
    "aug.reprob": 0.25,
    "aug.remode": "pixel",
    "aug.recount": 1,
    "aug.mixup": 0.8,
    "aug.cutmix": 1.0,
    "aug.cutmix_minmax": None,
    "aug.mixup_prob": 1.0,
    "aug.mixup_switch_prob": 0.5,
    "aug.mixup_mode": "batch",
    "loss.smoothing": 0.1,
    "loss.bce": False,
    "model.img_size": 224,
    "model.patch_size": None,
    "model.num_classes": None,
    "model.drop": 0.0,
    "model.kwargs": {},
    "model_ema.enabled": False,
    "distillation.type": "none",
    "data.set": "imagenet",
    "data.eval_crop_ratio": 0.875,  # resized to 256 for a crop of 224
    "run.seed": 0,
    "run.finetune": None,
}
DEIT = {
    "model.drop_path": 0.1,
    "optim.global_batch": 1024,
    "optim.clip_grad": None,
    "schedule.step_on": "epoch",
    "schedule.warmup_epochs": 5,
    "schedule.warmup_prefix": False,
    "aug.color_jitter": 0.3,
    "aug.repeats": 3,
}
SWIN = {
    "model.drop_path": 0.2,
    "optim.global_batch": 1024,
    "optim.clip_grad": 5.0,
    "schedule.step_on": "iteration",
    "schedule.warmup_epochs": 20,
    "schedule.warmup_prefix": True,
    "aug.color_jitter": 0.4,
    "aug.repeats": 1,
}
RECIPES = {
    "deit_tiny": DEIT | {"model.name": "deit_tiny_patch16_224", "final lr": 1e-3},
    "deit_small": DEIT | {"model.name": "deit_small_patch16_224", "final lr": 1e-3},
    "deit_base": DEIT | {"model.name": "deit_base_patch16_224", "final lr": 2.5e-4, "optim.global_batch": 512},
    "swin_tiny": SWIN | {"model.name": "swin_tiny_patch4_window7_224", "final lr": 1e-3},
    "swin_small": SWIN | {"model.name": "swin_small_patch4_window7_224", "final lr": 1e-3, "model.drop_path": 0.3},
}


@pytest.mark.parametrize("model", MODELS)
def test_every_run_of_a_model_has_its_recipe(model: str) -> None:
    runs = {cell.run for cell in CELLS if cell.column == model}
    assert len(runs) >= 6
    for name in runs:
        cfg, expected = CONFIGS[name], COMMON | RECIPES[model]
        assert cfg.optim.lr * cfg.optim.global_batch / 512 == pytest.approx(expected.pop("final lr"), rel=1e-12)
        for key, value in expected.items():
            section, _, leaf = key.partition(".")
            assert getattr(getattr(cfg, section), leaf) == value, (name, key)


# ---------------------------------------------------------------------------------------------------------------------
# They train. tests/test_scripts.py has the whole of it, which takes long: every script, every row, at full size.
# ---------------------------------------------------------------------------------------------------------------------

SPREAD = [
    "deit_tiny_int4",
    "deit_tiny_qema",
    "deit_tiny_qramping",
    "swin_tiny_tetrajet",
    "swin_small_qramping",
    "table1_q1_deit_tiny",
    "table1_q6_deit_tiny",
    "table4_tetrajet_dampen_deit_tiny",
    "table4_tetrajet_freeze_deit_tiny",
    "table5_stochastic_original_floor_deit_tiny",
    "table6_without_wq_aq_deit_base",
    "table7_e3m0_e3m0_deit_tiny",
]


@pytest.mark.parametrize("name", some(SPREAD, every=2))
def test_a_row_trains(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two steps and an evaluation of a model cut down to one narrow block a stage."""
    [reference] = {cell.run_reference for cell in CELLS if cell.run == name}
    shape = "{embed_dim: 64, depth: 1, num_heads: 2}"
    if name.startswith("swin"):
        shape = "{embed_dim: 24, depths: [1, 1, 1, 1], num_heads: [1, 2, 4, 8]}"
    small = ["--smoke", "--device", "cpu", "--input-size", "32", "--model.kwargs", shape]
    with undisturbed():
        assert exit_code(["--config", reference, "--output_dir", str(tmp_path), *small]) == 0
    out = capsys.readouterr().out
    assert f"smoke test passed: 2 training steps and 1 evaluation batch of {CONFIGS[name].model.name}" in out


# ---------------------------------------------------------------------------------------------------------------------
# References
# ---------------------------------------------------------------------------------------------------------------------

TABLE1 = ROOT / "configs/ablations/table1.yaml"


def test_names_of_runs() -> None:
    table = ROOT / "configs/ablations"
    assert run_name("configs/deit_tiny_fp.yaml") == "deit_tiny_fp"
    assert run_name(f"{TABLE1}#q1/deit_tiny") == "table1_q1_deit_tiny"
    assert run_name(f"{TABLE1}#all_quantizers/deit_tiny") == "deit_tiny_tetrajet"
    assert run_name(f"{table}/table5.yaml#nearest/original/floor") == "deit_tiny_microscaling"
    assert run_name(f"{table}/table5.yaml#nearest/requantized/floor") == "table5_nearest_requantized_floor_deit_tiny"
    assert run_name(f"{table}/table9.yaml#decay_0.998") == "table8_qema_default_deit_base"  # the same as a row's
    assert run_name(f"{table}/table8.yaml#qema_default/swin_small") == "swin_small_qema"  # in this column alone


def test_a_reference_by_hand_and_with_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    cfg = load_config("configs/ablations/table1.yaml#q1/deit_tiny", ["quant.scale_rule=floor"])
    assert (cfg.quant.active, cfg.quant.scale_rule, cfg.paper.top1) == (("q1",), "floor", 61.50)
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"extends: {TABLE1}#q1/deit_tiny\nschedule: {{epochs: 3}}\n")
    cfg = load_config(mine)
    assert (cfg.quant.active, cfg.schedule.epochs, cfg.paper) == (("q1",), 3, None)


def test_the_column_may_be_left_out_where_there_is_one() -> None:
    reference = f"{ROOT}/configs/ablations/table7.yaml#e3m0/e2m1"
    assert find_cell(reference) == find_cell(f"{reference}/deit_tiny")
    assert load_config(reference).quant.element.activation_weight == "e3m0"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (f"{TABLE1}", r"is a table of runs; name one as .*table1\.yaml#ROW or #ROW/COLUMN; rows: full_precision, q1, "),
        (f"{TABLE1}#q1", r"q1 has several columns; choose one of q1/deit_tiny, q1/deit_small\."),
        (f"{TABLE1}#fullprecision/deit_tiny", r"no row fullprecision/deit_tiny; did you mean full_precision\?"),
        (f"{TABLE1}#x/deit_tiny", r"there is no row x/deit_tiny; there are full_precision, q1, q2, q3, "),
        (f"{TABLE1}#", r"there is no row ; there are full_precision, q1"),
        (f"{TABLE1}#q1/deit_tny", r"there is no column deit_tny; did you mean deit_tiny\?"),
        (f"{TABLE1.parent}/tabel1.yaml#q1/deit_tiny", r"no configuration file .*tabel1\.yaml\. Did you mean .*/table1"),
        (f"{ROOT}/configs/deit_tiny_fp.yaml#q1", r"deit_tiny_fp\.yaml has no rows; name the file alone to load it\."),
    ],
)
def test_a_reference_that_names_nothing(reference: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(reference)


TABLE = """\
table: 99
title: made up
columns: [a, b]
base: <column>.yaml
rows:
  one: {set: {schedule: {epochs: 1}}, top1: [1.0, 2.0]}
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "a.yaml").write_text("schedule: {epochs: 5}\npaper: {table: 2, row: x, column: a, top1: 9, top5: 10}\n")
    (tmp_path / "table99.yaml").write_text(TABLE)
    return tmp_path / "table99.yaml"


def test_a_table_by_hand(table: Path) -> None:
    cfg = load_config(f"{table}#one/a")
    assert cfg.schedule.epochs == 1
    assert cfg.paper.model_dump() == {
        "table": 99,
        "row": "one",
        "column": "a",
        "top1": 1.0,
        "top5": None,
    }  # no top5 of 2
    assert [cell.published for cell in all_cells(table.parent)] == [{"top1": 1.0}, {"top1": 2.0}]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[1.0, 2.0]", "[1.0]", r"table99\.yaml: rows\.one\.top1 needs one figure for each of 2 columns\."),
        ("top1:", "top2:", r"table99\.yaml: rows\.one\.top2: Extra inputs are not permitted\."),
        ("base: <column>.yaml\n", "", r"table99\.yaml: rows\.one needs base or same_as\."),
        ("<column>.yaml", "<column>s.yaml", r"no configuration file .*as\.yaml \(.*table99\.yaml#one/a extends it\)"),
        ("epochs", "epoch", r"table99\.yaml#one/a: there is no key schedule\.epoch; did you mean schedule\.epochs\?"),
        (
            "{set: {schedule: {epochs: 1}}",
            "{same_as: 'table99.yaml#one/<column>'",
            r"table99.yaml#one/a extends itself",
        ),
    ],
)
def test_a_mistake_in_a_table(table: Path, old: str, new: str, message: str) -> None:
    assert old in TABLE
    table.write_text(TABLE.replace(old, new))
    with pytest.raises(UserError, match=message):
        load_config(f"{table}#one/a")


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts ask
# ---------------------------------------------------------------------------------------------------------------------


def test_every_cell_is_planned_as_its_run() -> None:
    for cell in CELLS:
        assert runs_to_start(cell.table, [cell.row, cell.column], [], Path("none")) == [cell.run_reference]


def test_all_of_a_table_is_every_run_once() -> None:
    for number in range(1, 11):
        wanted = {cell.run: cell.run_reference for cell in CELLS if cell.table == number}
        assert runs_to_start(number, ["all"], [], Path("none")) == list(wanted.values())
    assert len(runs_to_start(8, ["all"], [], Path("none"))) == 21  # of 25 cells
    assert len(runs_to_start(8, ["all", "swin_small"], [], Path("none"))) == 4
    assert len(runs_to_start(8, ["qema_tuned"], [], Path("none"))) == 5


def test_all_leaves_out_what_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make(name: str, *overrides: str, epochs: int = 90) -> None:
        [reference] = {cell.run_reference for cell in CELLS if cell.run == name}
        with RunLog(tmp_path / name) as log:
            log.write_config(dump_config(load_config(reference, overrides)))
            for epoch in range(epochs):
                log.log((epoch,), {"top1": 50.0}, tag="eval")

    make("deit_tiny_tetrajet", "data.path=/imagenet", "run.device=cuda")
    make("table7_e2m1_e3m0_deit_tiny", epochs=89)
    make("table7_e3m0_e2m1_deit_tiny", "run.seed=1")  # complete, but another run
    everything = runs_to_start(7, ["all"], [], Path("none"))
    assert [path.rpartition("/")[2] for path in everything] == ["deit_tiny_tetrajet.yaml", *["deit_tiny"] * 3]
    assert runs_to_start(7, ["all"], [], tmp_path) == everything[1:]
    assert capsys.readouterr().err == f"{tmp_path / 'deit_tiny_tetrajet'} is complete.\n"
    assert runs_to_start(7, ["all"], ["--epochs", "91"], tmp_path) == everything
    assert runs_to_start(7, ["all"], ["--epochs", "89"], tmp_path) == everything[2:]
    for flag in (["--export", "a.safetensors"], ["--predict", "a.png"]):
        with pytest.raises(UserError, match="are of one checkpoint"):
            runs_to_start(7, ["all"], flag, tmp_path)
        assert len(runs_to_start(7, ["e2m1/e2m1", "deit_tiny"], flag, tmp_path)) == 1
    for flag in (["--smoke"], ["--print-config"], ["--eval"]):  # they write no run
        assert runs_to_start(7, ["all"], flag, tmp_path) == everything
    assert (
        runs_to_start(7, ["e2m1/e2m1"], [], tmp_path) == everything[:1]
    )  # asked for by name: main.py says what is done
    (tmp_path / "deit_tiny_tetrajet/resolved.yaml").unlink()
    assert runs_to_start(7, ["all"], [], tmp_path) == everything


def test_the_listing_names_every_cell() -> None:
    for number in range(1, 11):
        lines = listing(number).splitlines()
        for cell in (c for c in CELLS if c.table == number):
            [line] = [line for line in lines if line.split()[:2] == [cell.row, cell.column]]
            figures = [float(word) for word in line.split()[2 : 2 + len(cell.published)]]
            assert figures == list(cell.published.values())
            assert f"bash scripts/table{number}.sh {cell.row} {cell.column}" in line
            assert line.endswith(f"# the same run as {cell.run}") == cell.same
