"""A study's file: what its runs are, in which order, as which command; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from study_helpers import ROOT, TWO, write_study

from config import UserError, load_config, recipe_identity
from config.flags import parse_flags
from config.rows import all_cells
from studies.grid import execution_flags, read_study

# Of the repository; a user's own may lie beside them.
STUDIES = [
    ROOT / f"configs/studies/{name}.yaml" for name in ("digits", "methods", "paper_small", "pipelines", "regime")
]
DEIT = str(ROOT / "configs/<value>_tetrajet.yaml")


def identity(reference: str | Path, *overrides: str) -> str:
    return recipe_identity(load_config(reference, overrides).model_dump(mode="json"))


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def test_seeds_come_first_and_rows_in_the_order_of_the_file(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path))
    names = [run.name for run in study.runs()]
    assert names == ["full_precision-seed0", "tetrajet-seed0", "full_precision-seed1", "tetrajet-seed1"]
    assert (study.name, study.title) == ("small", "two methods")


def test_what_the_first_table_needs_is_run_first(tmp_path: Path) -> None:
    """With all of its seeds, so that a study that is cut off has enough pairs to say something."""
    rows = {"floor": {"base": DEIT, "set": {"quant": {"scale_rule": "floor"}}}, "tetrajet": {"base": DEIT}}
    rows |= {"away": {"base": DEIT, "set": {"quant": {"rounding": {"forward": "nearest_away"}}}}}
    tables = [{"title": "ties", "rows": ["away", "tetrajet"], "against": "tetrajet", "values": ["deit_tiny"]}]
    tables += [{"title": "scales", "rows": ["floor", "tetrajet"], "against": "tetrajet", "values": ["deit_tiny"]}]
    values = {"deit_tiny": {}, "swin_tiny": {}}
    study = read_study(write_study(tmp_path, rows=rows, values=values, seeds=[0, 1], tables=tables))
    names = [run.name for run in study.runs(["*deit*"])]
    ties = ["tetrajet-deit_tiny", "away-deit_tiny"]
    assert names[:4] == [f"{name}-seed{seed}" for seed in (0, 1) for name in ties]
    assert names[4:] == ["floor-deit_tiny-seed0", "floor-deit_tiny-seed1"]
    rest = [run.name for run in study.runs()][6:]
    assert rest[:3] == ["floor-swin_tiny-seed0", "tetrajet-swin_tiny-seed0", "away-swin_tiny-seed0"] and len(rest) == 6


def test_a_row_may_have_seeds_of_its_own(tmp_path: Path) -> None:
    rows = {**TWO["rows"], "tetrajet": {**TWO["rows"]["tetrajet"], "seeds": [7]}}
    study = read_study(write_study(tmp_path, rows=rows))
    assert [run.name for run in study.runs()] == ["full_precision-seed0", "tetrajet-seed7", "full_precision-seed1"]
    assert [run.seed for run in study.runs(seeds=[5])] == [5, 5]


def test_every_row_is_run_with_every_value(tmp_path: Path) -> None:
    values = {"deit_tiny": {"set": {"optim": {"lr": 0.5}}}, "swin_tiny": {}}
    rows = {
        "tetrajet": {"base": DEIT},
        "q1": {"base": DEIT, "set": {"quant": {"active": ["q1"]}}, "values": ["deit_tiny"]},
    }
    study = read_study(write_study(tmp_path, values=values, rows=rows, seeds=[0]))
    assert [run.name for run in study.runs()] == [
        "tetrajet-deit_tiny-seed0",
        "q1-deit_tiny-seed0",
        "tetrajet-swin_tiny-seed0",
    ]
    deit, q1, swin = (cell.config for cell in study.cells)
    assert (deit.model.name[:4], swin.model.name[:4]) == ("deit", "swin")
    assert (deit.optim.lr, swin.optim.lr, q1.optim.lr) == (0.5, 5e-4, 0.5)
    assert q1.quant.active == ("q1",)
    assert {cell.config.schedule.epochs for cell in study.cells} == {3}


def test_a_row_that_changes_nothing_may_be_empty(tmp_path: Path) -> None:
    base = str(ROOT / "configs/digits_fp.yaml")
    study = read_study(write_study(tmp_path, base=base, rows={"a": None}, values={"v": None}))
    assert [cell.name for cell in study.cells] == ["a-v"]


def test_a_row_of_the_paper_is_a_base(tmp_path: Path) -> None:
    base = f"{ROOT}/configs/ablations/table1.yaml#q3/deit_tiny"
    cell = read_study(write_study(tmp_path, rows={"q3": {"base": base}})).cells[0]
    assert cell.config.quant.active == ("q3",) and cell.config.schedule.epochs == 3


def test_changes_of_the_study_the_value_and_the_row_are_made_in_this_order(tmp_path: Path) -> None:
    base = str(ROOT / "configs/digits_fp.yaml")
    study = read_study(
        write_study(
            tmp_path,
            set={"optim": {"lr": 0.1, "eps": 0.1, "weight_decay": 0.1}, "model": {"kwargs": {"depth": 5}}},
            values={"v": {"set": {"optim": {"eps": 0.2, "weight_decay": 0.2}, "model": {"kwargs": {"embed_dim": 32}}}}},
            rows={"a": {"base": base, "set": {"optim": {"weight_decay": 0.3}}}},
        )
    )
    cfg = study.cells[0].config
    assert (cfg.optim.lr, cfg.optim.eps, cfg.optim.weight_decay) == (0.1, 0.2, 0.3)
    assert cfg.model.kwargs == {"depth": 5, "embed_dim": 32, "num_heads": 2}


@pytest.mark.parametrize("file", STUDIES, ids=lambda p: p.stem)
def test_the_flags_of_a_run_make_its_configuration(file: Path) -> None:
    for cell in read_study(file).cells:
        options, overrides = parse_flags(["--config", cell.reference, *cell.flags(3)])
        cfg = load_config(options.config, overrides)
        assert cfg.run.seed == 3
        assert cfg.model_copy(update={"run": cell.config.run}) == cell.config, cell.name


def test_flags_of_every_kind_of_value(tmp_path: Path) -> None:
    changes = {
        "model": {"kwargs": {"embed_dim": 96}, "patch_size": None},
        "optim": {"unscale_lr": False, "lr": 1e-5, "betas": [0.9, 0.95], "opt": "lamb"},
        "aug": {"aa": None, "cutmix_minmax": [0.2, 0.8]},
        "probes": {"enabled": True},
    }
    cell = read_study(write_study(tmp_path, set=changes)).cells[0]
    _, overrides = parse_flags(cell.flags(0))
    cfg = load_config(cell.reference, overrides)
    assert cfg.model_copy(update={"run": cell.config.run}) == cell.config
    assert cfg.optim.betas == (0.9, 0.95) and cfg.model.kwargs["embed_dim"] == 96 and not cfg.optim.unscale_lr


def test_a_command_is_one_from_the_root_of_the_repository() -> None:
    run = read_study(ROOT / "configs/studies/digits.yaml").runs()[1]
    expected = "python main.py --config configs/digits_tetrajet.yaml --run.device=cpu --run.seed=0"
    assert run.command == expected


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["tetrajet"], ["tetrajet-seed0", "tetrajet-seed1"]),
        (["*-seed1"], ["full_precision-seed1", "tetrajet-seed1"]),
        (["full_precision-seed0", "tetra*"], ["full_precision-seed0", "tetrajet-seed0", "tetrajet-seed1"]),
    ],
    ids=str,
)
def test_a_filter_chooses_runs(tmp_path: Path, patterns: list[str], names: list[str]) -> None:
    study = read_study(write_study(tmp_path))
    assert [run.name for run in study.runs(patterns)] == names
    left = [run.name for run in study.runs() if run.name not in names]
    assert [run.name for run in study.runs(without=patterns)] == left
    assert [run.name for run in study.runs(["*-seed1"], without=["tetrajet"])] == ["full_precision-seed1"]


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_recipe_is_the_same_whatever_the_seed_and_the_machine() -> None:
    file = ROOT / "configs/digits_tetrajet.yaml"
    same = identity(file)
    for change in ("run.seed=3", "data.path=/data", "run.device=cuda", "data.num_workers=4", "data.batch_size=32"):
        assert identity(file, change) == same, change
    for change in ("optim.lr=0.1", "schedule.epochs=6", "quant.carrier=fp8", "model.kwargs={depth: 4}"):
        assert identity(file, change) != same, change
    assert len({identity(cell.run_reference) for cell in all_cells()}) == len({cell.run for cell in all_cells()})


def test_a_recipe_counts_only_what_is_not_the_default() -> None:
    cfg = load_config(ROOT / "configs/digits_tetrajet.yaml").model_dump(mode="json")
    assert recipe_identity(cfg) == identity(ROOT / "configs/digits_tetrajet.yaml", "data.num_images=1280")
    mixed = identity(ROOT / "configs/digits_fp.yaml", "aug.mixup=0.8", "data.batch_size=32")
    assert mixed != identity(ROOT / "configs/digits_fp.yaml", "aug.mixup=0.8", "data.batch_size=64")


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------

FP = str(ROOT / "configs/digits_fp.yaml")
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"titel": "a"}, "there is no key titel; did you mean title?"),
    ({"rows": {"a": {"base": FP, "sets": {}}}}, "there is no key rows.a.sets; did you mean set?"),
    ({"values": {"v": {"sett": {}}}}, "there is no key values.v.sett; did you mean set?"),
    ({"title": None}, "title is missing."),
    ({"seeds": []}, "seeds is []: list should have at least 1 item"),
    ({"seeds": [-1]}, "seeds.0 is -1: input should be greater than or equal to 0."),
    ({"seeds": [0, 1, 0]}, "seeds: seed 0 is there twice."),
    ({"rows": {"a": {"base": FP, "seeds": [7, 7]}}}, "rows.a.seeds: seed 7 is there twice."),
    ({"seeds": "0 1"}, 'seeds is "0 1": input should be a valid list.'),
    ({"rows": {"a/b": {"base": FP}}}, "rows.a/b: a name may have letters, digits"),
    ({"rows": {}}, "rows is {}: dictionary should have at least 1 item"),
    ({"rows": {"a": [1]}}, "rows.a is [1]: a mapping of keys to values was expected."),
    ({"rows": 3}, "rows is 3: a mapping of keys to values was expected."),
    ({"title": 3}, "title is 3: text was expected; put it in quotes."),
    ({"values": {}}, "values is {}: dictionary should have at least 1 item, not 0."),
    ({"rows": {"a": {"base": DEIT}}}, "rows.a: its base "),
    ({"rows": {"a": {}}}, "rows.a needs a base, or the study one for all rows."),
    ({"rows": {"a": {"base": FP, "values": ["x"]}}}, "rows.a.values: there is no value x; the study has no values."),
    (
        {"rows": {"a": {"base": FP, "set": {"optim": {"lrr": 1}}}}},
        "a: there is no key optim.lrr; did you mean optim.lr?",
    ),
    ({"rows": {"a": {"base": FP, "set": {"optim": {"lr": "x"}}}}}, "a: optim.lr is 'x': "),
    ({"rows": {"a": {"base": FP}, "b": {"base": FP}}}, "b is the same recipe as a; one of them is enough."),
    ({"rows": {"a": {"base": FP, "set": {"run": {"seed": 3}}}}}, "run.seed is the study's own to set, for each run."),
    ({"rows": {"a": {"base": str(ROOT / "configs/digits_ff.yaml")}}}, "small.yaml: a: There is no configuration"),
    ({"rows": {"a": {"base": f"{ROOT}/configs/ablations/table1.yaml#q9/deit_tiny"}}}, "small.yaml: a: "),
]


@pytest.mark.parametrize(("changes", "said"), MISTAKES, ids=[said[:40] for _, said in MISTAKES])
def test_a_mistake_in_a_study_is_one_sentence(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        read_study(write_study(tmp_path, **changes))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_no_file_and_no_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no configuration file"):
        read_study(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="named by letters, digits and _ alone"):
        read_study(write_study(tmp_path, "a-b"))
    with pytest.raises(UserError, match=r"has no run tetrajett; did you mean tetrajet\?"):
        read_study(write_study(tmp_path)).runs(["tetrajett"])
    with pytest.raises(UserError, match=r"has no run tetrajett; did you mean tetrajet\?"):
        read_study(write_study(tmp_path)).runs(without=["tetrajett"])
    with pytest.raises(UserError, match=r"is left without full_precision tetra\*"):
        read_study(write_study(tmp_path)).runs(without=["full_precision", "tetra*"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lr", "0.5"], "optim.lr 0.5 (here 0.004) would change what small trains"),
        (["--seed", "3"], "--run.seed is the study's own"),
        (["--output_dir", "x"], "--run.output_dir is the study's own"),
        (["--smoke"], "--config, --smoke and --print-config are main.py's"),
        (["--export", "x.safetensors"], "--export and --predict are main.py's"),
        (["--predict", "photo.jpg"], "--export and --predict are main.py's"),
        (["--epocs", "3"], "There is no flag --epocs; did you mean --epochs?"),
    ],
    ids=str,
)
def test_flags_may_not_say_what_is_trained(tmp_path: Path, flags: list[str], said: str) -> None:
    study = read_study(write_study(tmp_path))
    with pytest.raises(UserError) as error:
        execution_flags(study, flags)
    assert said in str(error.value)
    assert execution_flags(study, ["--data-path", "/data", "--no-cuda-graphs"]) == [
        "--data-path",
        "/data",
        "--no-cuda-graphs",
    ]


def test_flags_are_checked_for_every_run_and_by_what_a_line_is_found_by(tmp_path: Path) -> None:
    """Or runs would be trained to their end and be none of the study's."""
    values = {"plain": {}, "mixed": {"set": {"aug": {"mixup": 0.8}}}}
    for changes, flags, cell in (
        ({"values": values}, ["--batch-size", "32"], "data.batch_size for full_precision-mixed"),
        ({}, ["--amp", "none"], "run.amp for full_precision"),  # what auto means on this device
    ):
        study = read_study(write_study(tmp_path, **changes))
        with pytest.raises(UserError, match=f"{cell} would change what small trains"):
            execution_flags(study, flags)
    assert execution_flags(read_study(write_study(tmp_path)), ["--batch-size", "32"])  # the control


def test_the_studies_of_the_repository_say_how_to_run_them() -> None:
    for file in STUDIES:
        assert f"study.py run configs/studies/{file.name}" in file.read_text()
        assert yaml.safe_load(file.read_text())["title"]
