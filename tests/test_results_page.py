"""report.py results: verdicts by their rule, the page from nothing but lines and studies, and what changes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from study_helpers import ROOT, write_study
from test_lines import line

import report
import results.page as page_module
from config import UserError
from record.lines import Line, add_lines, as_csv, read_lines
from results.evidence import FEW, NOISE, NOT, OPEN, SHOWS, Evidence
from results.page import PAGE, PICTURE, _draw_value, draw, drawn, gather, page
from results.statistics import compared, paired_error
from results.style import COLOURS
from studies.grid import Study, read_study

BASE = {"base": str(ROOT / "configs/<value>_tetrajet.yaml")}
ROWS = {
    "full_precision": {"base": str(ROOT / "configs/<value>_fp.yaml")},
    "tetrajet": BASE,
    "microscaling": {"base": str(ROOT / "configs/<value>_microscaling.yaml")},
    "fp8": {**BASE, "set": {"quant": {"carrier": "fp8"}}},
}
TABLES = [
    {"table": 2, "rows": ["full_precision", "tetrajet", "microscaling"], "against": "tetrajet"},
    {"title": "products in FP8", "rows": ["tetrajet", "fp8"], "against": "tetrajet", "figures": ["top1", "r_WQ"]},
]
FINDINGS = [
    {"says": "full precision is better", "higher": ["full_precision"], "lower": ["tetrajet"], "table": 2},
    {"says": "TetraJet is better", "higher": ["tetrajet"], "lower": ["microscaling"], "table": 2},
    {"says": "fp8 is the same", "higher": ["tetrajet"], "lower": ["fp8"], "within": 0.5},
]
SEEDS = [0, 1, 2, 3, 4]
# Top-1 by row, less what a seed adds to all rows: full precision is 2 points better, TetraJet as good as Microscaling.
TOPS = {"full_precision": 42.0, "tetrajet": 40.0, "microscaling": 40.0, "fp8": 40.0}
NOISES = {"full_precision": 0.1, "tetrajet": 0.0, "microscaling": 0.3, "fp8": 0.05}


def asked(folder: Path, **changes: Any) -> Study:
    given = {
        "values": {"deit_tiny": {}, "swin_tiny": {}},
        "rows": ROWS,
        "seeds": SEEDS,
        "tables": TABLES,
        "findings": FINDINGS,
        **changes,
    }
    return read_study(write_study(folder, **given))


def lines_of(study: Study, tops: dict[str, float] = TOPS, seeds: list[int] = SEEDS) -> list[Line]:
    """What each seed adds is common to all rows and large; what is each run's own is small and of a fixed pattern."""
    found = []
    for cell in study.cells:
        for seed in seeds:
            common = 3.0 * np.sin(7.0 * seed)
            own = NOISES[cell.row] * [1.0, -1.0, 0.5, -0.5, 0.0][seed % 5]
            top1 = float(tops[cell.row] + common + own)
            measured = {"top1": top1, "r_WQ": 0.01, "epochs": 3, "steps": 66}
            found.append(line(study="small", row=cell.row, value=cell.value, seed=seed, recipe=cell.recipe, **measured))
    return found


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return asked(tmp_path)


def words(study: Study, lines: list[Line]) -> list[str]:
    return [one.word for one in Evidence(study, lines).verdicts() if one.value == "deit_tiny"]


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------


def test_verdicts_are_by_their_rule(study: Study) -> None:
    assert words(study, lines_of(study)) == [SHOWS, NOISE, SHOWS]
    turned = {**TOPS, "full_precision": 38.0, "microscaling": 39.0, "fp8": 37.0}
    assert words(study, lines_of(study, turned)) == [NOT, SHOWS, NOT]
    assert words(study, lines_of(study, {**TOPS, "fp8": 39.5})) == [SHOWS, NOISE, OPEN]


def test_a_difference_of_a_size_is_tested_against_it(tmp_path: Path) -> None:
    """Two points are no collapse of ten: that would show by the test against none."""
    collapse = asked(tmp_path, findings=[{**FINDINGS[0], "beyond": 10.0}])
    for top, word in ((42.0, NOT), (49.99, OPEN), (55.0, SHOWS), (30.0, NOT)):
        [verdict, _] = Evidence(collapse, lines_of(collapse, {**TOPS, "full_precision": top})).verdicts()
        assert verdict.word == word, top
    ours = compared([1.8, 2.1, 2.3], paired_error([1.8, 2.1, 2.3]))
    theirs = stats.ttest_1samp([1.8, 2.1, 2.3], 2.5)
    assert ours.p_other_than(2.5) == pytest.approx(theirs.pvalue, rel=1e-9)


def test_differences_are_taken_seed_by_seed(study: Study) -> None:
    lines = lines_of(study)
    difference = Evidence(study, lines).verdicts()[0].difference
    assert (difference.n, difference.mean) == (5, pytest.approx(2.0))
    assert difference.dof == 3 * 4  # of four rows and five seeds
    assert difference.error < 0.1 < 1.0 < np.std([one.top1 for one in lines if one.row == "tetrajet"])
    # The control: the same figures, of other seeds than their own, are no pairs and show nothing.
    shuffled = [
        dataclasses.replace(one, seed=(2 * one.seed + 1) % 5) if one.row == "tetrajet" else one for one in lines
    ]
    assert words(study, shuffled)[0] == NOISE


def test_fewer_than_three_pairs_are_too_few(study: Study) -> None:
    assert words(study, lines_of(study, seeds=[0, 1])) == [FEW] * 3
    few = Evidence(study, lines_of(study, seeds=[0, 1, 2])).verdicts()[0]
    assert few.difference.n == 3 and few.planned == 5 and few.preliminary
    assert not Evidence(study, lines_of(study)).verdicts()[0].preliminary
    lines = [one for one in lines_of(study) if one.row != "fp8" or one.seed < 2]
    assert words(study, lines) == [SHOWS, NOISE, FEW]


def test_p_is_adjusted_for_the_number_of_findings(study: Study, tmp_path: Path) -> None:
    verdicts = Evidence(study, lines_of(study)).verdicts()
    assert len(verdicts) == 6
    smallest = min(verdicts, key=lambda one: one.p)
    assert smallest.adjusted == pytest.approx(6 * smallest.p)
    alone = asked(tmp_path, findings=[{**FINDINGS[0], "values": ["deit_tiny"]}])
    [one] = Evidence(alone, lines_of(alone)).verdicts()
    assert one.adjusted == one.p
    # One that cannot be tested yet counts too: the others' verdicts stay when it comes.
    without_fp8 = [one for one in lines_of(study) if one.row != "fp8"]
    verdicts = Evidence(study, without_fp8).verdicts()
    assert [one.p is None for one in verdicts] == [False] * 4 + [True] * 2
    smallest = min(verdicts[:4], key=lambda one: one.p)
    assert smallest.adjusted == pytest.approx(6 * smallest.p)


def test_published_differences_are_the_papers(study: Study) -> None:
    verdicts = Evidence(study, lines_of(study)).verdicts()
    found = {(one.finding.says, one.value): one.published for one in verdicts}
    assert found["full precision is better", "deit_tiny"] == pytest.approx(63.73 - 59.75)
    assert found["TetraJet is better", "swin_tiny"] == pytest.approx(77.12 - 76.87)
    assert found["fp8 is the same", "deit_tiny"] is None


def test_only_the_studys_recipes_and_seeds_count(study: Study) -> None:
    lines = lines_of(study)
    stray = [dataclasses.replace(lines[0], recipe="another", seed=1, top1=0.0), dataclasses.replace(lines[0], seed=9)]
    stray += [dataclasses.replace(lines[0], row="gone")]
    assert Evidence(study, [*lines, *stray]).verdicts() == Evidence(study, lines).verdicts()
    assert Evidence(study, [*lines, *stray]).others == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": 200}, "small has runs of classes 10 and 200; they are no pairs"),
        ({"autocast": "bfloat16"}, "small has runs of autocast bfloat16 and none; they are no pairs"),
        ({"steps": 99}, "full_precision deit_tiny has runs of steps 66 and 99; they are no pairs"),
    ],
    ids=str,
)
def test_runs_that_are_no_pairs_are_refused(study: Study, changes: dict[str, Any], said: str) -> None:
    lines = lines_of(study)
    with pytest.raises(UserError, match=said):
        Evidence(study, [dataclasses.replace(lines[0], **changes), *lines[1:]])


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


class Place:
    """Studies and results in folders of their own."""

    def __init__(self, folder: Path) -> None:
        self.studies, self.results = folder / "studies", folder / "results"
        self.out, self.png = folder / "docs/RESULTS.md", folder / "docs/images/results.png"
        self.studies.mkdir()
        self.study = asked(self.studies)
        self.file = self.results / "small.csv"
        add_lines(self.file, lines_of(self.study))

    def build(self) -> str:
        places = ["--studies", str(self.studies), "--results", str(self.results)]
        report.main(["results", *places, "--out", str(self.out), "--png", str(self.png)])
        return self.out.read_text()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_page_comes_back_byte_for_byte(place: Place) -> None:
    first = place.build()
    pixels = np.asarray(Image.open(place.png))
    place.out.unlink()
    place.png.unlink()
    assert place.build() == first
    assert np.array_equal(np.asarray(Image.open(place.png)), pixels) and pixels.std() > 1
    backwards = as_csv(reversed(read_lines(place.file)))
    place.file.write_text(backwards)
    assert place.build() == first  # in whichever order days and machines have added to it


def test_a_planted_wrong_line_changes_the_page(place: Place) -> None:
    first = place.build()
    lines = read_lines(place.file)
    for number in (0, len(lines) // 2, len(lines) - 1):
        wrong = [dataclasses.replace(one, top1=one.top1 + 1.0) if n == number else one for n, one in enumerate(lines)]
        place.file.write_text(as_csv(wrong))
        assert place.build() != first
    place.file.write_text(as_csv(lines[:-1]))
    assert place.build() != first
    place.file.write_text(as_csv(lines))
    assert place.build() == first  # the control


def cells_of(text: str, start: str) -> list[str]:
    row = next(row for row in text.splitlines() if row.startswith(f"| {start} |"))
    return [word.strip() for word in row.split("|")[1:-1]]


def test_what_the_page_says(place: Place) -> None:
    text = place.build()
    assert "- Runs that are done: 40; the study has 40, with the seeds of its file." in text
    assert "Tested: 6 of 6 findings; p is adjusted for all of them. The tables below show 6 " in text
    assert "### Table 2\n\nIn the paper: top-1 accuracy (%) after 90 epochs of ImageNet-1K." in text
    assert "### Products in FP8" in text
    finding = cells_of(text, "full precision is better")
    assert finding[:3] == ["full precision is better", "DeiT", "**shows**"]
    assert finding[3] == "+2.00 [1.86, 2.14]" and finding[4] == "5" and finding[8:] == ["0.0625", "+3.98"]
    assert "-" not in finding[7:9]
    assert cells_of(text, "fp8 is the same")[7:9] == ["-", "-"]  # tests of no difference ask another question
    row = cells_of(text, "full_precision")
    assert row[:3] == ["full_precision", "5", "3"] and row[5] == finding[3] and row[7:] == ["63.73", "+3.98"]
    assert cells_of(text, "tetrajet")[5:] == ["-", "-", "59.75", "-"]
    assert cells_of(text, "microscaling")[5].endswith("] *")  # it varies more than the others do
    assert "28" not in finding[5] and "Chance: 0.10 points of top-1, on 12 degrees of freedom." in text


def test_gaps_are_shown_as_gaps(place: Place) -> None:
    lines = [one for one in read_lines(place.file) if one.row == "tetrajet" and one.seed < 1]
    place.file.write_text(as_csv(lines))
    text = place.build()
    assert cells_of(text, "full_precision") == ["full_precision", "0", "-", "-", "-", "-", "-", "63.73", "+3.98"]
    assert cells_of(text, "tetrajet")[:5] == ["tetrajet", "1", "3", text and f"{lines[0].top1:.2f}", "-"]
    assert cells_of(text, "full precision is better")[2:7] == ["**too few runs**", "-", "0", "-", "-"]


def test_a_table_says_what_is_not_as_in_the_paper_and_what_was_not_recorded(place: Place) -> None:
    tables = [{**TABLES[0], "figures": ["top1", "r_Y_block"], "note": "a decay of 0.998"}]
    asked(place.studies, tables=tables)
    unrecorded = "the block's input fixed\n\nNo run of tetrajet, with which the others are compared, has recorded it."
    lines = read_lines(place.file)
    for rows, count in (({"microscaling"}, 2), ({"microscaling", "tetrajet"}, 0)):
        place.file.write_text(
            as_csv(dataclasses.replace(one, r_Y_block=0.004 if one.row in rows else None) for one in lines)
        )
        text = place.build()
        assert "90 epochs of ImageNet-1K.\n\nHere: a decay of 0.998.\n\nDeiT" in text
        assert text.count(unrecorded) == count  # of both models
        assert text.count("| microscaling | 5 | 3 | 0.0040 | 0.0000 |") == 2  # what is recorded is shown
        assert text.count("| published difference |") == 2  # of top-1: the paper has no such figure


def test_runs_that_seeds_do_not_tell_apart_say_nothing(study: Study) -> None:
    alike = [dataclasses.replace(one, top1=TOPS[one.row]) for one in lines_of(study)]
    assert words(study, alike) == [FEW] * 3


def test_rows_of_one_value_are_of_the_same_images(study: Study) -> None:
    fewer = [dataclasses.replace(one, steps=60) if one.row == "fp8" else one for one in lines_of(study)]
    with pytest.raises(UserError, match="fp8 deit_tiny has runs of steps 60 and 66; they are no pairs"):
        Evidence(study, [one for one in fewer if one.value == "deit_tiny"])
    Evidence(
        study, [dataclasses.replace(one, steps=60) if one.value == "swin_tiny" else one for one in lines_of(study)]
    )
    lines = lines_of(study)
    with pytest.raises(UserError, match="has a run of 2 epochs with the recipe of 3"):
        Evidence(study, [dataclasses.replace(lines[0], epochs=2), *lines[1:]])


def test_a_run_done_twice_is_named(place: Place) -> None:
    first = place.build()
    lines = read_lines(place.file)
    later = dataclasses.replace(lines[3], top1=lines[3].top1 + 1.0, started="2027-01-01")
    pages = []
    for order in ([*lines, later], [later, *lines]):
        place.file.write_text(as_csv(order))
        pages.append(place.build())
    assert pages[0] == pages[1] != first
    assert f"Done more than once, with other figures: {later.row} {later.value} seed {later.seed}." in pages[0]
    [said] = [text for text in pages[0].splitlines() if text not in first.splitlines()]
    assert said.startswith("- Done more than once")  # and no figure has changed
    place.file.write_text(as_csv([*lines, lines[3]]))
    assert place.build() == first  # the control: the same line twice


def test_lines_that_no_study_asks_of_are_named(place: Place, capsys: pytest.CaptureFixture) -> None:
    first = place.build()
    assert capsys.readouterr().err == ""
    write_study(place.studies, "plain")
    for name in ("plain", "gone"):
        place.file.with_name(f"{name}.csv").write_text(place.file.read_text())
    place.file.with_name("empty.csv").write_text("")
    assert place.build() == first
    noted = capsys.readouterr().err.splitlines()
    assert [text.split(" has ")[0] for text in noted] == [
        f"note: {place.results}/{name}.csv" for name in ("empty", "gone", "plain")
    ]


def test_changes_that_were_not_committed_are_told(place: Place) -> None:
    lines = [dataclasses.replace(one, commit="a") for one in read_lines(place.file)]
    place.file.write_text(as_csv([dataclasses.replace(lines[0], commit="a+ b"), *lines[1:]]))
    assert "Commits: a (39), a+ b (1); + stands for changes that were not committed (1 runs)." in place.build()


def test_without_lines_there_is_an_empty_page(place: Place) -> None:
    place.file.unlink()
    assert place.build().endswith("There are no runs yet.\n")
    assert not place.png.exists()


def test_a_choice_stands_on_the_page(place: Place) -> None:
    rows = {name: ROWS[name] for name in ("full_precision", "tetrajet")}
    chooses = read_study(
        write_study(place.studies, "regime", choice=True, rows=rows, values={"deit_tiny": {}, "swin_tiny": {}})
    )
    add_lines(place.results / "regime.csv", lines_of(chooses, seeds=[0, 1]))
    assert "## How the scale was chosen: two methods" in place.build() and "Chosen: " in place.build()


def test_a_row_far_off_leaves_the_others_room(study: Study) -> None:
    far = {**TOPS, "full_precision": 41.0, "microscaling": 10.0}
    for tops, written in ((far, ["\u2190 -30.0"]), ({**far, "microscaling": 38.0}, [])):
        axes = Figure().subplots()
        _draw_value(axes, Evidence(study, lines_of(study, tops)), study.tables[0], "deit_tiny")
        low, high = axes.get_xlim()
        assert -5 < low < 0 < 1 < high
        ours = [text.get_text() for text in axes.texts if text.get_color() == COLOURS[2]]
        assert [text.replace("-29.9", "-30.0") for text in ours] == written


def test_the_picture_has_every_model_of_the_first_table(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    halves = [{**TABLES[0], "values": [value]} for value in ("deit_tiny", "swin_tiny")]
    (tmp_path / "halves").mkdir()
    split = asked(tmp_path / "halves", tables=[halves[0], TABLES[1], halves[1]])
    seen: list[str] = []
    monkeypatch.setattr(page_module, "_draw_value", lambda _axes, _evidence, _table, value: seen.append(value))
    lines = lines_of(split)
    draw(Evidence(split, lines), place.png)
    assert seen == ["deit_tiny", "swin_tiny"]
    draw(Evidence(split, [one for one in lines if one.value == "deit_tiny"]), place.png)
    assert seen[2:] == ["deit_tiny"]  # the other has not been begun


def test_the_papers_tables_come_first_and_are_drawn(place: Place) -> None:
    own = [{**TABLES[1], "title": "other methods"}]
    other = read_study(
        write_study(place.studies, "early", rows=ROWS, values={"deit_tiny": {}}, seeds=SEEDS, tables=own)
    )
    add_lines(place.results / "early.csv", lines_of(other))
    text = place.build()
    evidences, _ = gather(place.studies, place.results)
    assert [one.study.name for one in evidences] == ["small", "early"]
    assert drawn(evidences) is evidences[0]
    assert text.count("![") == 1 and "](images/results.png)" in text
    assert text.index("### Table 2") > text.index("![")
    assert text.index("### Other methods") > text.index("### Products in FP8")


def test_the_page_of_the_repository_is_up_to_date() -> None:
    out, shown = PAGE, PICTURE.relative_to(PAGE.parent).as_posix()
    evidences, choices = gather(ROOT / "configs/studies", ROOT / "results")
    if evidences or choices or out.exists():
        assert out.read_text() == page(evidences, choices, shown), "run python report.py results"


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------

MISTAKES = [
    ({"tables": [{**TABLES[0], "against": "x"}]}, "tables.0.against: there is no row in it x; "),
    ({"tables": [{**TABLES[0], "rows": ["x"]}]}, "tables.0.rows: there is no row x; "),
    ({"tables": [{**TABLES[0], "rows": {"x": "tetrajet"}}]}, "tables.0.rows: there is no row of the paper x; "),
    ({"tables": [{**TABLES[0], "table": 99}]}, "tables.0: There is no table 99; "),
    ({"tables": [{**TABLES[0], "published": "vit"}]}, "tables.0.published: there is no column vit; "),
    ({"tables": [{**TABLES[0], "values": ["x"]}]}, "tables.0.values: there is no value x; "),
    ({"tables": [{**TABLES[0], "title": "x"}]}, "tables.0 needs the number of a table of the paper or a title"),
    ({"tables": [{**TABLES[0], "figures": ["top2"]}]}, "tables.0.figures.0 is "),
    (
        {"tables": [{**TABLES[0], "note": "a decay of 0.998."}]},
        "tables.0.note is to be one line of text without a",
    ),
    ({"tables": [{**TABLES[0], "note": " "}]}, "tables.0.note is to be one line of text"),
    ({"tables": [{**TABLES[0], "row": []}]}, "there is no key tables.0.row; did you mean rows?"),
    ({"findings": [{**FINDINGS[0], "lower": ["x"]}]}, "findings.0: there is no row x; "),
    ({"findings": [{**FINDINGS[0], "lower": ["full_precision"]}]}, "findings.0: full_precision is there twice; "),
    ({"findings": [{**FINDINGS[0], "higher": ["fp8", "fp8"]}]}, "findings.0: fp8 is there twice; "),
    ({"findings": [{**FINDINGS[0], "table": 5}]}, "findings.0: table 5 is none of the study's tables."),
    ({"findings": [{**FINDINGS[0], "within": 0}]}, "findings.0.within is 0: "),
    (
        {"choice": True, "values": None, "rows": {"tetrajet": {"base": str(ROOT / "configs/digits_fp.yaml")}}},
        "choice is",
    ),
]


@pytest.mark.parametrize(("changes", "said"), MISTAKES, ids=[said[:50] for _, said in MISTAKES])
def test_a_mistake_in_what_is_asked_is_one_sentence(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        asked(tmp_path, **changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_row_that_a_value_does_not_have_is_a_mistake(tmp_path: Path) -> None:
    rows = {**ROWS, "fp8": {**ROWS["fp8"], "values": ["deit_tiny"]}}
    with pytest.raises(UserError, match=r"findings\.2: fp8 is not run with swin_tiny"):
        asked(tmp_path, rows=rows)
    asked(tmp_path, rows=rows, findings=[*FINDINGS[:2], {**FINDINGS[2], "values": ["deit_tiny"]}])  # the control
