"""report.py choose: the rule by which a regime is chosen, on made-up lines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from study_helpers import TWO, write_study
from test_lines import line

import report
from config import UserError
from record.lines import Line, add_lines
from results.choice import candidates, choice
from studies.grid import Study, read_study

VALUES = {"kind": {}, "hard": {"set": {"optim": {"lr": 0.1}}}, "noisy": {"set": {"optim": {"lr": 0.2}}}}
# Top-1 by value, row and seed: gaps of 1, 3 and 6; spreads of 1, 1 and 8.
TOPS = {
    "kind": ([40.0, 42.0], [39.0, 41.0]),
    "hard": ([30.0, 32.0], [27.0, 29.0]),
    "noisy": ([30.0, 46.0], [24.0, 40.0]),
}


def lines_of(study: Study, tops: dict = TOPS, seconds: float = 50.0) -> list[Line]:
    cells = {(cell.row, cell.value): cell for cell in study.cells}
    found = []
    for value, rows in tops.items():
        for row, by_seed in zip(TWO["rows"], rows, strict=True):
            recipe = cells[row, value].recipe
            found += [
                line(study="small", row=row, value=value, seed=seed, recipe=recipe, top1=top1, seconds=seconds)
                for seed, top1 in enumerate(by_seed)
            ]
    return found


@pytest.fixture
def regimes(tmp_path: Path) -> Study:
    return read_study(write_study(tmp_path, values=VALUES, choice=True))


def test_the_largest_ratio_of_gap_to_spread_is_chosen(regimes: Study) -> None:
    ranked, without = candidates(regimes, lines_of(regimes))
    assert [one.name for one in ranked] == ["hard", "kind", "noisy"] and without == []
    spread = 2**0.5
    assert [(one.gap, one.spread, one.ratio) for one in ranked] == [
        (3.0, pytest.approx(spread), pytest.approx(3 / spread)),
        (1.0, pytest.approx(spread), pytest.approx(1 / spread)),
        (6.0, pytest.approx(8 * spread), pytest.approx(6 / spread / 8)),
    ]
    text = choice(regimes, lines_of(regimes))
    assert "Seconds: of runs, whatever ran beside them." in text and text.endswith("Chosen: hard, ratio 2.12.")


def test_only_runs_of_the_present_recipe_and_of_seeds_in_common_count(regimes: Study) -> None:
    lines = lines_of(regimes)
    stray = [dataclasses.replace(lines[0], top1=99.0, recipe="another", seed=7), dataclasses.replace(lines[0], seed=8)]
    assert candidates(regimes, [*lines, *stray]) == candidates(regimes, lines)


def test_values_without_runs_and_of_other_times_are_named(regimes: Study) -> None:
    few = {"kind": TOPS["kind"], "hard": ([30.0], [27.0])}
    lines = [dataclasses.replace(one, seconds=80.0) if one.value == "hard" else one for one in lines_of(regimes, few)]
    text = choice(regimes, lines)
    assert "Without runs of both rows: noisy." in text
    assert "Not of the same time as the first by more than 15 %: hard." in text
    row = next(row for row in text.splitlines() if row.startswith("| hard"))
    assert [word.strip() for word in row.split("|")[1:-1]] == [
        *("hard", "1", "30.00", "27.00", "+3.00", "-", "-", "80", "3", "2")
    ]
    assert text.endswith("Chosen so far, since not all runs are done: kind, ratio 0.71.")
    alone = choice(regimes, lines_of(regimes, {"hard": ([30.0], [27.0])}))
    assert alone.endswith("Chosen: nothing yet: there is no seed spread.")


def test_what_takes_longer_is_not_chosen(regimes: Study) -> None:
    def chosen(seconds: float) -> str:
        lines = [dataclasses.replace(one, seconds=seconds) if one.value == "hard" else one for one in lines_of(regimes)]
        return choice(regimes, lines).splitlines()[-1]

    assert chosen(58.0) == "Chosen: kind, ratio 0.71."
    assert chosen(57.0) == "Chosen: hard, ratio 2.12."  # the control
    assert chosen(20.0) == "Chosen: hard, ratio 2.12."


def test_the_time_is_that_of_the_device_where_the_file_gives_it(tmp_path: Path) -> None:
    def chosen(milliseconds: dict[str, float]) -> tuple[list[float], str]:
        study = read_study(write_study(tmp_path, values=VALUES, choice=True, milliseconds=milliseconds))
        lines = [dataclasses.replace(one, steps=2000) for one in lines_of(study, seconds=99.0)]
        assert "Seconds: the device's work" in choice(study, lines)
        return [one.seconds for one in candidates(study, lines)[0]], choice(study, lines).splitlines()[-1]

    times = {"kind": 3.0, "hard": 3.4, "noisy": 1.0}
    assert chosen(times) == ([6.8, 6.0, 2.0], "Chosen: hard, ratio 2.12.")
    assert chosen({**times, "hard": 3.5})[1] == "Chosen: kind, ratio 0.71."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"milliseconds": {"kind": 1.0, "hard": 1.0}}, "given of all values and of nothing else; see noisy"),
        (
            {"milliseconds": {**dict.fromkeys(VALUES, 1.0), "soft": 1.0}},
            "given of all values and of nothing else; see soft",
        ),
        ({"milliseconds": dict.fromkeys(VALUES, 0.0)}, r"milliseconds\.kind"),
        ({"milliseconds": dict.fromkeys(VALUES, 1.0), "choice": False}, "for a choice among the values"),
    ],
)
def test_the_time_of_every_value_is_given_or_of_none(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_study(write_study(tmp_path, values=VALUES, **{"choice": True, **changes}))


def test_other_seeds_than_the_studys_do_not_count(regimes: Study) -> None:
    lines = lines_of(regimes)
    others = [dataclasses.replace(one, seed=9, top1=9.0 * one.top1 / 10) for one in lines if one.seed == 1]
    assert choice(regimes, [*lines, *others]) == choice(regimes, lines)


def test_what_cannot_be_chosen(regimes: Study, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No value of small has runs of both rows yet"):
        choice(regimes, [])
    with pytest.raises(UserError, match="is not there to choose one of its values"):
        choice(read_study(write_study(tmp_path)), [])


def test_the_command(regimes: Study, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    add_lines(tmp_path / "small.csv", lines_of(regimes))
    report.main(["choose", str(regimes.file), "--results", str(tmp_path)])
    assert capsys.readouterr().out == choice(regimes, lines_of(regimes)) + "\n"
