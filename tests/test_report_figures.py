"""report.py figures: the paper's Figures 2 to 6 and Table 3 from runs with a probe."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import train, undisturbed
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from stabilizer_helpers import FLAGS, SMALL

from config import UserError
from report import main
from results import figures as report_figures
from results.figures import around_one_threshold, early_and_late, read_recordings
from results.style import COLOURS, labels, spoken

NAMES = ["figure2", "figure3", "figure4", "figure5", "figure6", "table3"]
RUNS = {"fp": ["--quant.scheme", "none"], "tetrajet": [], "qema": FLAGS["qema"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Real runs of three epochs, each recorded, and one without a probe."""
    folder = tmp_path_factory.mktemp("runs")
    with undisturbed():
        probed = {name: train(folder / name, *SMALL, *RUNS[name], "--epochs", "3", "--probes") for name in RUNS}
        yield {**probed, "plain": train(folder / "plain", *SMALL, "--epochs", "1")}


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are saved from here on, by the names of their files."""
    figures: dict[str, Figure] = {}
    save = Figure.savefig

    def keep(self: Figure, path: Path, *args: Any, **kwargs: Any) -> None:
        figures[Path(path).stem] = self
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def draw(out: Path, *directories: Path) -> None:
    main(["figures", *map(str, directories), "--out", str(out)])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def margin_is_white(path: Path) -> bool:
    picture = np.asarray(Image.open(path).convert("RGB"))
    return all((edge == 255).all() for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]))


def test_every_figure_is_a_picture_and_a_table_and_nothing_is_cut_off(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "new" / "folder", *(runs[name] for name in RUNS))
    out = tmp_path / "new" / "folder"
    assert sorted(p.name for p in out.iterdir()) == sorted(f"{n}.{kind}" for n in NAMES for kind in ("png", "csv"))
    for name in NAMES:
        picture = np.asarray(Image.open(out / f"{name}.png").convert("L"))
        assert picture.std() > 5 and picture.shape[1] >= 600 and margin_is_white(out / f"{name}.png"), name
        assert len(table(out / f"{name}.csv")) > 1
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == NAMES


def test_a_title_that_is_cut_off_would_be_seen(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the margin."""

    def too_long(self: Axes, *_: Any, **__: Any) -> None:
        self.text(0.8, 0.9, "\N{EM DASH}" * 60, transform=self.transAxes).set_in_layout(False)

    monkeypatch.setattr(Axes, "set_title", too_long)
    draw(tmp_path, runs["tetrajet"])
    assert not margin_is_white(tmp_path / "figure6.png")


def test_the_lines_and_the_tables_are_what_was_recorded(
    runs: dict[str, Path], tmp_path: Path, saved: dict[str, Figure]
) -> None:
    draw(tmp_path, *(runs[name] for name in RUNS))
    read = {name: read_recordings(runs[name]) for name in RUNS}
    rates = {
        (name, key): [float(r[key].mean()) for r in run.recordings if key in r]
        for name, run in read.items()
        for key in ("r_w", "r_WQ", "r_Y")
    }
    weights, output = saved["figure2"].axes
    shown = [("fp", "r_w"), ("tetrajet", "r_WQ"), ("tetrajet", "r_w"), ("qema", "r_WQ"), ("qema", "r_w")]
    assert [list(line.get_ydata()) for line in weights.lines] == [rates[key] for key in shown]
    assert [list(line.get_ydata()) for line in output.lines] == [rates[name, "r_Y"] for name in RUNS]
    assert all(list(line.get_xdata()) == [1, 2, 3] for line in (*weights.lines, *output.lines))
    rows = table(tmp_path / "figure2.csv")
    assert [float(row["r_Y"]) for row in rows if row["run"] == str(runs["qema"])] == rates["qema", "r_Y"]
    assert [row["r_WQ"] for row in rows if row["method"] == "full_precision"] == [""] * 3

    (axes,) = saved["figure6"].axes
    shares = [[100 * r["oscillating"].sum() / r["numel"].sum() for r in read[n].recordings] for n in RUNS if n != "fp"]
    assert [list(line.get_ydata()) for line in axes.lines] == shares
    for row in table(tmp_path / "figure5.csv"):
        counts = read[Path(row["run"]).name].last["confidence_counts"].sum(0)
        assert float(row["share"]) == pytest.approx(counts[round(float(row["from"]) * 50)] / counts.sum())
    latents = [r for r in table(tmp_path / "figure4.csv") if (r["method"], r["quantity"]) == ("tetrajet", "latent")]
    assert {row["epoch"] for row in latents} == {"1", "3"}
    assert sum(float(row["share"]) for row in latents) == pytest.approx(2)
    last = table(tmp_path / "table3.csv")
    assert [float(row["r_WQ"] or "nan") for row in last][1:] == [rates[n, "r_WQ"][-1] for n in ("tetrajet", "qema")]
    cells = [cell.get_text().get_text() for cell in saved["table3"].axes[0].tables[0].get_celld().values()]
    assert f"{rates['tetrajet', 'r_Y'][-1]:.4f}" in cells and "TetraJet + Q-EMA" in cells


def test_figure_3_shows_the_trajectories_and_their_threshold(
    runs: dict[str, Path], tmp_path: Path, saved: dict[str, Figure]
) -> None:
    draw(tmp_path, *(runs[name] for name in RUNS))
    axes = np.array(saved["figure3"].axes).reshape(2, 2)
    for column, name in enumerate(("tetrajet", "qema")):
        arrays = read_recordings(runs[name]).last
        threshold, chosen = around_one_threshold(arrays)
        *lines, line = axes[1, column].lines
        assert list(line.get_ydata()) == [0, 0]
        distances = arrays["trajectory_latent"][:, chosen] - threshold
        assert [list(x.get_ydata()) for x in lines] == distances.T.tolist()
        quantized = [list(x.get_ydata()) for x in axes[0, column].lines]
        assert quantized == [arrays["trajectory_quantized"][:, k].tolist() for k in chosen]
        assert axes[1, column].get_title(loc="right") == f"threshold {threshold:g} (dashed)"


def test_figure_4_draws_every_threshold(runs: dict[str, Path], tmp_path: Path, saved: dict[str, Figure]) -> None:
    draw(tmp_path, runs["tetrajet"])
    top = saved["figure4"].axes[0]
    expected = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    assert [line.get_xdata()[0] for line in top.lines] == [-x for x in expected[::-1]] + expected


def test_axes_have_names_and_a_method_keeps_its_colour(
    runs: dict[str, Path], tmp_path: Path, saved: dict[str, Figure]
) -> None:
    draw(tmp_path, *(runs[name] for name in RUNS))
    for name in NAMES[:-1]:
        axes = saved[name].axes
        assert any(panel.get_ylabel() for panel in axes) and any(panel.get_xlabel() for panel in axes), name
        assert all(panel.get_title() or panel.get_xlabel() for panel in axes)
    output, oscillating = saved["figure2"].axes[1], saved["figure6"].axes[0]
    assert [line.get_color() for line in output.lines] == list(COLOURS[:3])
    assert [line.get_color() for line in oscillating.lines] == list(COLOURS[1:3])
    styles = [str(line._dash_pattern) for line in output.lines]
    assert len(set(styles)) == 3
    assert "$R_w$ > 16 (T0 = 4)" in oscillating.get_title()


def test_one_run_is_drawn_alone(runs: dict[str, Path], tmp_path: Path, saved: dict[str, Figure]) -> None:
    draw(tmp_path, runs["qema"])
    assert list(saved) == NAMES
    assert len(saved["figure2"].axes[1].lines) == 1 and len(saved["figure3"].axes) == 2


def test_full_precision_alone_has_rates_of_change_and_the_rest_is_said(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path, runs["fp"])
    assert {p.stem for p in tmp_path.iterdir()} == {"figure2", "table3"}
    out = capsys.readouterr().out.splitlines()
    assert out[1:5] == [
        f"figure{n}: no run has what it shows (quantized weights, followed to the last epoch)" for n in (3, 4, 5, 6)
    ]


def test_a_run_without_a_probe_is_left_out_and_named(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path, runs["plain"], runs["fp"])
    sentence = f"The run in {runs['plain']} has no recordings of a probe; train it with --probes."
    assert capsys.readouterr().err == f"left out: {sentence}\n"
    with pytest.raises(SystemExit) as exit:
        draw(tmp_path / "none", runs["plain"])
    assert exit.value.code == 2 and capsys.readouterr().err == f"error: {sentence}\n"
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_read_or_written_is_named(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"is not a run: it holds no resolved\.yaml"):
        report_figures.write_figures([runs["fp"], tmp_path], tmp_path / "none")
    broken = tmp_path / "broken"
    (broken / "probes").mkdir(parents=True)
    (broken / "resolved.yaml").write_bytes((runs["fp"] / "resolved.yaml").read_bytes())
    (broken / "probes" / "epoch_0001.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"The recording .*epoch_0001\.npz cannot be read"):
        read_recordings(broken)
    np.savez(broken / "probes" / "epoch_0001.npz", layers=np.array([{"code": 1}], dtype=object))  # needs pickle
    with pytest.raises(UserError, match=r"cannot be read \(Object arrays cannot be loaded"):
        read_recordings(broken)
    draw(tmp_path / "drawn", runs["fp"], broken)
    said = capsys.readouterr().err
    assert said.startswith(f"left out: The recording {broken}") and len(said.splitlines()) == 1
    assert {p.stem for p in (tmp_path / "drawn").iterdir()} == {"figure2", "table3"}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*; choose another --out\."):
        report_figures.write_figures([runs["fp"]], tmp_path / "file")


def test_the_weights_of_figure_3_flip_around_one_threshold() -> None:
    grid = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    flip = np.array([0, 1, 0, 1, 0, 1])
    latent = np.stack(
        [0.70 + 0.1 * flip, 0.2 + 0.1 * flip, 0.7 + 0.1 * (np.arange(6) > 2), 3.0 * flip, 0.74 + 0 * flip]
    )
    quantized = np.stack([0.5 + 0.5 * flip, 0.5 * flip, [0.5] * 3 + [1.0] * 3, 0.5 + 0.5 * flip, [0.5] * 6])
    arrays = {"grid": grid, "trajectory_latent": latent.T, "trajectory_quantized": quantized.T}
    threshold, chosen = around_one_threshold(arrays)
    assert threshold == 0.75 and chosen == [0, 2]  # five and one change; 1 is elsewhere, 3 jumps, 4 does not change
    still = {name: arrays[name][..., [3, 4]] if name != "grid" else grid for name in arrays}
    assert around_one_threshold(still) == (0.75, [1, 0])  # nothing to see: then those that are there


def test_under_q_ema_a_weight_need_not_be_where_its_quantized_value_flips() -> None:
    grid = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    quantized = np.array([0.5, 1.0, 0.5, 1.0])[:, None]
    arrays = {"grid": grid, "trajectory_latent": np.full((4, 1), 0.1), "trajectory_quantized": quantized}
    assert around_one_threshold(arrays) == (0.75, [0])


@pytest.mark.parametrize(("epochs", "expected"), [([1], [1]), ([1, 2, 3], [1, 3]), (range(3, 91, 3), [30, 90])])
def test_early_is_a_third_of_the_way(epochs: Any, expected: list[int]) -> None:
    recordings = [{"epoch": np.array(n), "r_WQ": np.zeros(1)} for n in epochs]
    run = report_figures.ProbedRun(Path("run"), "tetrajet", recordings)
    assert [int(r["epoch"]) for r in early_and_late(run)] == expected


def test_methods_go_by_the_names_of_the_paper(runs: dict[str, Path]) -> None:
    assert spoken("tetrajet_qramping") == "TetraJet + Q-Ramping" and spoken("full_precision") == "full precision"
    assert spoken("microscaling_freeze") == "Microscaling + Freeze" and spoken("int4") == "INT4"
    assert spoken("mx_dampen") == "own recipe + Dampen"
    read = [read_recordings(runs[name]) for name in ("tetrajet", "qema", "tetrajet")]
    assert labels(read) == ["TetraJet (tetrajet)", "TetraJet + Q-EMA", "TetraJet (tetrajet)"]
