"""report.py tables: what counts for a cell of the paper, and the tables made of it."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import pytest
from quick import some

from config import UserError, dump_config, load_config
from config.rows import all_cells
from record.runlog import RunLog
from report import main
from results import tables as report_tables
from results.tables import as_csv, as_markdown, assign, find_runs, recovered, signed, table_lines

ROOT = Path(__file__).resolve().parent.parent
CELLS = all_cells()
REFERENCES = {cell.run: cell.run_reference for cell in CELLS}
# What the manifest of a run on ImageNet-1K says.
MANIFEST = {"classes": 1000, "steps_per_epoch": 1251}


def make_run(
    folder: Path,
    name: str,
    *overrides: str,
    top1: float = 50.0,
    epochs: int = 90,
    manifest: Any = None,
    **figures: float,
) -> Path:
    """The run `name` of the paper as main.py leaves it; its accuracy rises to `top1`, which the last epoch reaches."""
    manifest = manifest or {**MANIFEST, **({"steps_per_epoch": 2502} if "deit_base" in name else {})}
    with RunLog(folder, resume=True) as log:
        log.write_config(dump_config(load_config(REFERENCES.get(name, name), overrides)))
        log.write_manifest(manifest)
        for epoch in {*range(epochs)} & {0, epochs - 2, epochs - 1}:
            left = epochs - 1 - epoch
            log.log((epoch, 10), {"loss": 9.0}, tag="train", at=epoch)
            last = {} if left else figures
            log.log(
                (epoch,), {"loss": 3.0, "top1": top1 - left / 10, "top5": top1 + 20 - left / 10, **last}, tag="eval"
            )
        log.log((), {"top1": -1.0, "best_top1": 99.0, "epochs": epochs}, tag="final")
    return folder


def lines_of(*places: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The lines of all tables by (table, row, model, figure), from the CSV."""
    ours, _ = assign(find_runs(places) if places else [], CELLS)
    lines = list(csv.DictReader(as_csv(CELLS, ours).splitlines()))
    return {(line["table"], line["row"], line["model"], line["figure"]): line for line in lines}


def ours_of(line: dict[str, str]) -> tuple[str, ...]:
    return tuple(line[key] for key in ("ours", "spread", "seeds", "difference", "epochs"))


NOTHING = ("", "", "0", "", "")


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def test_without_runs_there_are_the_papers_figures_and_gaps() -> None:
    lines = lines_of()
    assert len(lines) == 131
    published = {(str(c.table), c.row, c.column, f): v for c in CELLS for f, v in c.published.items()}
    assert {key: float(line["published"]) for key, line in lines.items()} == published
    assert {ours_of(line) for line in lines.values()} == {NOTHING}


def test_a_run_counts_for_every_cell_that_it_is(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "deit_tiny_tetrajet", "data.path=/data", "data.batch_size=128", top1=59.5)
    lines = lines_of(tmp_path)
    expected = ("59.50", "", "1", "-0.25", "90/90")
    cells = ["1 all_quantizers", "2 tetrajet", "4 tetrajet", "7 e2m1/e2m1", "8 tetrajet"]
    for cell in [*cells, "5 stochastic/requantized/truncation_free"]:
        assert ours_of(lines.pop((*cell.split(), "deit_tiny", "top1"))) == expected
    top5 = lines.pop(("5", "stochastic/requantized/truncation_free", "deit_tiny", "top5"))
    assert ours_of(top5) == ("79.50", "", "1", "-3.17", "90/90")
    for figure in ("r_WQ", "r_Y"):  # which this run did not measure
        assert ours_of(lines.pop(("3", "tetrajet", "deit_tiny", figure))) == ("", "", "0", "", "90/90")
    assert {ours_of(line) for line in lines.values()} == {NOTHING}


def test_every_run_of_the_paper_is_recognised(tmp_path: Path) -> None:
    for name, reference in REFERENCES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "resolved.yaml").write_text(dump_config(load_config(reference)))
    ours, notes = assign(find_runs([tmp_path]), CELLS)
    assert {name: [run.directory.name for run in runs.unfinished] for name, runs in ours.items()} == {
        name: [name] for name in REFERENCES
    }
    assert notes == [f"{tmp_path / name}: {name}, unfinished: 0 of 90 epochs" for name in sorted(REFERENCES)]


def test_seeds(tmp_path: Path) -> None:
    for seed, top1 in enumerate((59.0, 60.0, 61.5)):
        make_run(tmp_path / f"seed{seed}", "deit_tiny_qema", f"run.seed={seed}", top1=top1)
    make_run(tmp_path / "seed3", "deit_tiny_qema", "run.seed=3", top1=10.0, epochs=45)
    make_run(tmp_path / "again", "deit_tiny_qema", "run.seed=1", top1=99.0, epochs=90)
    line = lines_of(tmp_path)["2", "tetrajet_qema", "deit_tiny", "top1"]
    # `again` is the first in the order of names; the mean of 59, 99, 61.5 is 73.17 and their deviation 22.41.
    assert ours_of(line) == ("73.17", "22.41", "3", "+13.17", "90/90 x3, 45/90")
    _, notes = assign(find_runs([tmp_path]), CELLS)
    assert notes == [
        f"{tmp_path / 'seed1'}: deit_tiny_qema, seed 1 again, as {tmp_path / 'again'}",
        f"{tmp_path / 'seed3'}: deit_tiny_qema, unfinished: 45 of 90 epochs",
    ]


def test_rates_of_change_that_a_run_measured(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "table4_tetrajet_dampen_deit_tiny", r_WQ=0.0040, r_Y=0.05)
    lines = lines_of(tmp_path)
    assert ours_of(lines["3", "tetrajet_dampen", "deit_tiny", "r_WQ"]) == ("0.0040", "", "1", "-0.0004", "90/90")
    assert ours_of(lines["3", "tetrajet_dampen", "deit_tiny", "r_Y"]) == ("0.0500", "", "1", "+0.0106", "90/90")


@pytest.mark.parametrize(
    ("number", "text"), [("-0.00", "0.00"), ("0.00", "0.00"), ("0.10", "+0.10"), ("-0.10", "-0.10")]
)
def test_signs(number: str, text: str) -> None:
    assert signed(number) == text


def test_degradation_recovered(tmp_path: Path) -> None:
    for name, top1 in (("fp", 64.0), ("microscaling", 59.0), ("tetrajet", 60.0), ("qema", 61.5)):
        make_run(tmp_path / name, f"deit_tiny_{name}", top1=top1)
    make_run(tmp_path / "qr", "deit_tiny_qramping", top1=61.0, epochs=89)
    for name, top1 in (("fp", 59.0), ("microscaling", 60.0), ("tetrajet", 61.0)):  # nothing to win back
        make_run(tmp_path / f"small_{name}", f"deit_small_{name}", top1=top1)
    ours, _ = assign(find_runs([tmp_path]), CELLS)
    header, lines = recovered(CELLS, ours)
    assert header == ["method", "", "deit_tiny", "deit_small", "deit_base", "swin_tiny", "swin_small"]
    assert lines == [
        # (59.75 - 58.56) / (63.73 - 58.56) = 23 %, and so on; the abstract's "more than 50 %" is Q-EMA's.
        ["tetrajet", "published", "23", "29", "36", "17", "6"],
        ["tetrajet", "ours", "20", "-", "-", "-", "-"],
        ["tetrajet_qema", "published", "28", "67", "270", "29", "29"],
        ["tetrajet_qema", "ours", "50", "-", "-", "-", "-"],
        ["tetrajet_qramping", "published", "34", "38", "105", "31", "22"],
        ["tetrajet_qramping", "ours", "-", "-", "-", "-", "-"],
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Runs that do not count
# ---------------------------------------------------------------------------------------------------------------------

TINY_IMAGENET = {"classes": 200, "steps_per_epoch": 97}


@pytest.mark.parametrize(
    ("name", "overrides", "manifest", "note"),
    [
        (
            "deit_tiny_qema",
            ["optim.lr=1e-3"],
            None,
            "Table 2 tetrajet_qema deit_tiny, differs: optim.lr 0.001 (the row has 0.0005)",
        ),
        (
            "table1_q1_deit_small",
            ["quant.scale_rule=floor", "aug.repeats=1"],
            None,
            "Table 1 q1 deit_small, differs: quant.scale_rule floor (the row has truncation_free), "
            "aug.repeats 1 (the row has 3)",
        ),
        (
            "deit_tiny_fp",
            ["schedule.epochs=80"],
            None,
            "Table 2 full_precision deit_tiny, differs: schedule.epochs 80 (the row has 90)",
        ),
        (
            "deit_tiny_fp",
            ["run.finetune=w.pt"],
            None,
            "Table 2 full_precision deit_tiny, differs: run.finetune w.pt",
        ),
        (
            "deit_tiny_fp",
            [],
            TINY_IMAGENET,
            "Table 2 full_precision deit_tiny, differs: 200 classes, 97 steps an epoch (ImageNet-1K has 1251)",
        ),
        (str(ROOT / "configs/digits_fp.yaml"), [], None, "no row of the paper"),
    ],
    ids=["one key", "two keys", "epochs", "finetuned", "data", "no row"],
)
def test_a_run_that_is_no_row(
    tmp_path: Path, name: str, overrides: list[str], manifest: dict[str, int] | None, note: str
) -> None:
    make_run(tmp_path / "a", name, *overrides, manifest=manifest)
    ours, notes = assign([tmp_path / "a"], CELLS)
    assert notes == [f"{tmp_path / 'a'}: {note}"]
    assert {ours_of(line) for line in lines_of(tmp_path).values()} == {NOTHING}
    assert f"## Runs that do not count\n\n- {notes[0]}\n" in as_markdown(CELLS, ours, notes)


def test_a_run_continued_with_another_schedule_is_no_row(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "deit_tiny_fp", "schedule.epochs=2", epochs=2)
    make_run(tmp_path / "a", "deit_tiny_fp")
    assert (tmp_path / "a/resolved.1.yaml").is_file()
    _, notes = assign([tmp_path / "a"], CELLS)
    assert notes[0].endswith("differs: schedule.epochs 2 (the row has 90)")


def test_another_row_under_the_name_of_one_counts_as_what_it_is(tmp_path: Path) -> None:
    """The paper entry of a run is a name; what was computed decides."""
    make_run(tmp_path / "a", "deit_tiny_tetrajet", "quant.active=[q1]", top1=61.0)
    lines = lines_of(tmp_path)
    assert lines["1", "q1", "deit_tiny", "top1"]["ours"] == "61.00"
    assert lines["2", "tetrajet", "deit_tiny", "top1"]["ours"] == ""


def test_runs_of_another_precision_are_no_seeds(tmp_path: Path) -> None:
    make_run(tmp_path / "auto", "deit_tiny_qema", top1=60.0)
    make_run(tmp_path / "gpu", "deit_tiny_qema", "run.seed=1", "run.amp=bfloat16", top1=61.0)
    make_run(tmp_path / "none", "deit_tiny_qema", "run.seed=2", "run.amp=none", top1=99.0)
    make_run(tmp_path / "cpu", "deit_tiny_qema", "run.seed=3", top1=99.0, manifest={**MANIFEST, "autocast": "None"})
    recorded = {**MANIFEST, "autocast": "bfloat16"}
    make_run(tmp_path / "recorded", "deit_tiny_qema", "run.seed=4", top1=62.0, manifest=recorded)
    moved = {**recorded, "sessions": [{"autocast": "None"}, {}]}  # begun on a CPU, continued on a GPU
    run = make_run(tmp_path / "moved", "deit_tiny_qema", "run.seed=5", top1=99.0)
    (run / "manifest.json").write_text(json.dumps(moved))
    line = lines_of(tmp_path)["2", "tetrajet_qema", "deit_tiny", "top1"]
    assert (line["ours"], line["seeds"]) == ("61.00", "3")
    _, notes = assign(find_runs([tmp_path]), CELLS)
    row = "Table 2 tetrajet_qema deit_tiny, differs:"
    assert notes == [
        f"{tmp_path / 'cpu'}: {row} autocast None (the row has bfloat16)",
        f"{tmp_path / 'moved'}: {row} autocast None (the row has bfloat16)",
        f"{tmp_path / 'none'}: {row} run.amp none (the row has auto)",
    ]


def test_runs_whose_mixup_draws_over_other_batches_are_not_averaged(tmp_path: Path) -> None:
    def batch(size: int) -> dict[str, Any]:
        return {**MANIFEST, "batch": {"process": size, "accumulation": 1, "global": 1024}}

    make_run(tmp_path / "a", "deit_tiny_qema", top1=60.0, manifest=batch(128))
    make_run(tmp_path / "b", "deit_tiny_qema", "run.seed=1", "data.batch_size=128", top1=61.0)
    make_run(tmp_path / "c", "deit_tiny_qema", "run.seed=2", top1=99.0, manifest=batch(256))
    make_run(tmp_path / "d", "deit_tiny_qema", "run.seed=3", "data.batch_size=64", top1=99.0)
    make_run(tmp_path / "e", "deit_tiny_qema", "run.seed=4", top1=62.0)  # of which nothing is known
    line = lines_of(tmp_path)["2", "tetrajet_qema", "deit_tiny", "top1"]
    assert (line["ours"], line["seeds"]) == ("61.00", "3")
    _, notes = assign(find_runs([tmp_path]), CELLS)
    assert notes == [
        f"{tmp_path / name}: deit_tiny_qema, mixup draws over {size} images at a time and over 128 in "
        f"{tmp_path / 'a'}, so it is not averaged with it"
        for name, size in (("c", 256), ("d", 64))
    ]


LINE = 'DLLL {"type": "LOG", "step": %s, "data": %s}'
GARBAGE = {
    "resolved.yaml": ["", "text", "[1]", "a: &a [*a]\n", "\0", "optim: {lr: many}\n", "optim.lr: 3\n", "run: 3\n"],
    "manifest.json": [
        *("", "[]", "3", "null", "[" * 9999, '{"classes": "x"}', '{"sessions": 3}', '{"sessions": [3]}'),
        *('{"steps_per_epoch": null}', '{"autocast": 3}', '{"batch": {"process": []}}', '{"steps_per_epoch": [1]}'),
        *('{"batch": 3}', '{"sessions": [{"autocast": 3, "batch": 3, "classes": "x", "steps_per_epoch": []}]}'),
    ],
    "metrics.log": [
        *('DLLL {"type": "LOG", "step": [89]}', "DLLL 3", "\0\0", "[" * 9999, LINE % (3, "{}")),
        *(
            LINE % (step, '{"eval.top1": 3}')
            for step in ('["a"]', "[{}]", "[null]", "[-5]", "[[1]]", "[1e9]", "[1e999]")
        ),
        *(
            LINE % ("[89]", data)
            for data in ("3", "[]", *(json.dumps({"eval.top1": value}) for value in ("x", float("nan"), [], {})))
        ),
    ],
}


@pytest.mark.parametrize(
    ("name", "text"), some([(name, text) for name, texts in GARBAGE.items() for text in texts], every=5, many=True)
)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "after the others"])
def test_one_broken_run_does_not_end_the_report(
    name: str, text: str, added: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "good", "deit_tiny_fp", top1=63.5)
    broken = make_run(tmp_path / "broken", "deit_tiny_tetrajet", top1=60.0) / name
    broken.write_text((broken.read_text() + "\n" if added else "") + text)
    main(["tables", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| full_precision | deit_tiny | top1 | 63.73 | 63.50 | - | 1 | -0.23 | 90/90 |" in out
    assert "| nan" not in out
    for command in (["curves", str(tmp_path / "broken"), "--png", str(tmp_path / "a.png")],):
        with contextlib.suppress(SystemExit):
            main(command)
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["resolved.yaml", "manifest.json", "metrics.log"])
@pytest.mark.parametrize("kind", ["folder", "loop", "zero"])
def test_a_file_of_a_run_that_is_none(name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "good", "deit_tiny_fp", top1=63.5)
    path = make_run(tmp_path / "broken", "deit_tiny_tetrajet", epochs=3) / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif name == "resolved.yaml" or kind == "loop":
        path.symlink_to("/dev/zero" if kind == "zero" else path)
    main(["tables", str(tmp_path)])
    assert "| full_precision | deit_tiny | top1 | 63.73 | 63.50 |" in capsys.readouterr().out


def test_runs_that_cannot_be_read(tmp_path: Path) -> None:
    (make_run(tmp_path / "a", "deit_tiny_fp", epochs=1) / "manifest.json").write_text("{")
    (make_run(tmp_path / "b", "deit_tiny_fp", epochs=1) / "resolved.yaml").write_text("modell: {}\n")
    make_run(tmp_path / "c", "deit_tiny_fp", epochs=0)
    (tmp_path / "c/metrics.log").unlink()
    ours, (a, b, c) = assign(find_runs([tmp_path]), CELLS)
    assert a == f"{tmp_path / 'a'}: cannot be read: {tmp_path / 'a/manifest.json'} is not JSON."
    assert b.startswith(f"{tmp_path / 'b'}: cannot be read: {tmp_path / 'b/resolved.yaml'}: there is no key modell;")
    assert c == f"{tmp_path / 'c'}: deit_tiny_fp, unfinished: 0 of 90 epochs"
    assert [run.directory.name for run in ours["deit_tiny_fp"].unfinished] == ["c"]


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_tables_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against tests/data/report_tables.md, which has all ten tables."""
    make_run(tmp_path / "seed 0", "deit_tiny_tetrajet", top1=59.0)
    make_run(tmp_path / "more/seed1", "deit_tiny_tetrajet", "run.seed=1", top1=60.0)
    make_run(tmp_path / "ms", "deit_tiny_microscaling", top1=58.5)
    make_run(tmp_path / "fp", "deit_tiny_fp", top1=63.5)
    make_run(tmp_path / "wq", "table6_without_wq_deit_base", epochs=3)
    make_run(tmp_path / "lr", "deit_small_tetrajet", "optim.lr=1e-3")
    main(["tables", str(tmp_path)])
    out = capsys.readouterr().out.replace(f"{tmp_path}/", "")
    assert out == (ROOT / "tests/data/report_tables.md").read_text()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "runs/a", "deit_tiny_fp", top1=63.5)
    main(["tables", str(run)])
    from_run = capsys.readouterr().out
    monkeypatch.setattr(report_tables, "RUNS", tmp_path / "runs")
    main(["tables"])  # all below runs/
    assert capsys.readouterr().out == from_run
    assert "| full_precision | deit_tiny | top1 | 63.73 | 63.50 | - | 1 | -0.23 | 90/90 |" in from_run
    markdown, table = tmp_path / "new/tables.md", tmp_path / "tables.csv"
    main(["tables", str(run), "--markdown", str(markdown), "--csv", str(table)])
    assert capsys.readouterr().out == f"written: {markdown}\nwritten: {table}\n"
    assert markdown.read_text() == from_run
    lines = list(csv.reader(table.read_text().splitlines()))
    assert lines[0] == "table row model figure published ours spread seeds difference epochs".split()  # noqa: SIM905
    assert lines[1] == ["1", "full_precision", "deit_tiny", "top1", "63.73", "63.50", "", "1", "-0.23", "90/90"]
    assert len(lines) == 1 + len(table_lines(CELLS, assign([run], CELLS)[0]))


def test_the_command_without_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_tables, "RUNS", tmp_path / "none")
    main(["tables"])
    out = capsys.readouterr().out
    assert "| tetrajet_qema | deit_small | top1 | 72.25 | - | - | 0 | - | - |" in out
    assert "Runs that do not count" not in out


def test_mistakes_at_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["tables", str(tmp_path)])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"error: There is no run at or below {tmp_path}; give the --output_dir of runs or a folder of them.\n"
    )
    run = make_run(tmp_path / "a", "deit_tiny_fp", epochs=1)
    with pytest.raises(SystemExit) as end:
        main(["tables", str(run), "--csv", str(run)])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("cannot be written (Is a directory).\n")
    with pytest.raises(UserError):
        find_runs([tmp_path / "nowhere"])


def test_the_manifest_is_what_main_writes() -> None:
    """The words that report_tables looks for are main.py's."""
    text = (ROOT / "main.py").read_text()
    assert all(f'"{key}": ' in text for key in MANIFEST)
    assert json.dumps(MANIFEST)
