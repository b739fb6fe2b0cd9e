"""report.py: what it reads from run directories, its table and its picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from config import UserError, dump_config, load_config
from record.runlog import RunLog
from report import main
from results.curves import curves_table, draw_curves, read_run
from results.style import COLOURS, labels, method_name

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def make_run(
    folder: Path, *overrides: str, config: str = "digits_tetrajet", epochs: Sequence[int] = (0, 1, 2), shift: float = 0
) -> Path:
    """A run directory as main.py leaves it; epoch n has evaluation loss 2 / (n + 1) + shift and top-1 50 + 10 n."""
    with RunLog(folder, resume=True) as log:
        log.write_config(dump_config(load_config(CONFIGS / f"{config}.yaml", overrides)))
        for n in epochs:
            log.log((n, 10), {"loss": 9.0, "lr": 1e-3}, tag="train", at=10 * n + 10)
            log.log((n,), {"loss": 2.5 / (n + 1) + shift, "lr": 1e-3, "seconds": 20.0}, tag="train", at=10 * n + 20)
            figures = {"loss": 2 / (n + 1) + shift, "top1": 50.0 + 10 * n, "top5": 99.0, "seconds": 1.5}
            log.log((n,), figures, tag="eval", at=10 * n + 20)
        log.log((), {"top1": 0.0, "epochs": len(epochs)}, tag="final")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / "fp", config="digits_fp"), make_run(tmp_path / "tj", epochs=range(5), shift=0.5)]


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_run(runs: list[Path]) -> None:
    run = read_run(runs[1])
    assert run.directory == runs[1] and run.method == "tetrajet"
    assert run.epochs == [1, 2, 3, 4, 5]
    assert run.train_loss == [2.5 / n + 0.5 for n in run.epochs]
    assert run.eval_loss == [2 / n + 0.5 for n in run.epochs]
    assert run.top1 == [50, 60, 70, 80, 90]
    assert run.seconds == 5 * 21.5


def test_an_epoch_replayed_after_a_kill_counts_once(tmp_path: Path) -> None:
    make_run(tmp_path / "run", epochs=[0, 1])
    run = read_run(make_run(tmp_path / "run", epochs=[1, 2], shift=0.25))
    assert run.epochs == [1, 2, 3] and run.eval_loss == [2.0, 1.25, 2 / 3 + 0.25]


def test_a_run_continued_in_another_folder_begins_at_its_epoch(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", epochs=[5, 6]))
    assert run.epochs == [6, 7]
    assert curves_table([run]).splitlines()[1].split()[1] == "7"


def test_an_epoch_that_has_not_been_evaluated_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=[0])
    with RunLog(folder, resume=True) as log:
        log.log((1, 0), {"loss": 1.0}, tag="train", at=11)
        log.log((1,), {"loss": 1.0, "seconds": 1.0}, tag="train", at=20)
    assert read_run(folder).epochs == [1]


@pytest.mark.parametrize(
    ("config", "overrides", "name"),
    [
        ("digits_fp", [], "full_precision"),
        ("digits_microscaling", [], "microscaling"),
        ("digits_tetrajet", [], "tetrajet"),
        ("digits_tetrajet", ["quant.scale_rule=floor"], "mx"),
        ("digits_tetrajet", ["quant.active=[]", "quant.scheme=mx"], "full_precision"),
        ("digits_tetrajet", ["stabilizer.kind=qema"], "tetrajet_qema"),
        ("digits_microscaling", ["stabilizer.kind=freeze"], "microscaling_freeze"),
        ("deit_tiny_int4", [], "int4"),
    ],
)
def test_a_method_goes_by_its_name_in_the_paper(config: str, overrides: list[str], name: str) -> None:
    assert method_name(load_config(CONFIGS / f"{config}.yaml", overrides)) == name


def test_what_is_no_run_or_has_no_epoch_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(
            UserError, match=r"is not a run: it holds no resolved\.yaml; give the --output_dir of a run"
        ):
            read_run(folder)
    with pytest.raises(UserError, match="has not finished an epoch yet"):
        read_run(make_run(tmp_path / "begun", epochs=[]))
    (tmp_path / "begun" / "metrics.log").unlink()
    with pytest.raises(UserError, match=r"There are no metrics at .*begun/metrics\.log"):
        read_run(tmp_path / "begun")


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def test_the_table(runs: list[Path]) -> None:
    assert curves_table([read_run(run) for run in runs]).splitlines() == [
        "method                    epochs     top-1  eval loss  train loss         time",
        "full_precision                 3   70.00 %     0.6667      0.8333     1:04 min",
        "tetrajet                       5   90.00 %     0.9000      1.0000     1:48 min",
    ]


def test_runs_of_one_method_are_told_apart_by_their_directories(runs: list[Path], tmp_path: Path) -> None:
    again = make_run(tmp_path / "a_directory_with_quite_a_long_name", "run.seed=1")
    figures = [read_run(run) for run in (*runs, again)]
    assert labels(figures, str) == ["full_precision", "tetrajet (tj)", "tetrajet (a_directory_with_quite_a_long_name)"]
    lines = curves_table(figures).splitlines()
    assert len({len(line) for line in lines}) == 1  # the columns stand below each other
    assert [line.split("  ")[0] for line in lines[1:]] == labels(figures, str)


def test_a_long_run_keeps_its_columns(runs: list[Path]) -> None:
    figures = read_run(runs[0])
    object.__setattr__(figures, "seconds", 90 * 1000.0)
    header, line = curves_table([figures]).splitlines()
    assert line.endswith(" 1500:00 min") and len(line) == len(header)


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def margin_is_white(picture: np.ndarray) -> bool:
    return all((edge == 255).all() for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]))


def has_colour(picture: np.ndarray, colour: str) -> bool:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(picture - rgb).max(axis=-1) < 8).sum() > 50


def test_the_picture_shows_every_run_in_both_halves_and_nothing_is_cut_off(runs: list[Path], tmp_path: Path) -> None:
    draw_curves([read_run(run) for run in (*runs, runs[0])], tmp_path / "new" / "a.png")
    picture = pixels(tmp_path / "new" / "a.png")
    assert picture.shape == (600, 1500, 3) and margin_is_white(picture)
    for half in (picture[:, :750], picture[:, 750:]):
        assert has_colour(half, COLOURS[1]) and has_colour(half, COLOURS[2])
        assert not has_colour(half, COLOURS[3])  # there is no fourth run


def test_a_label_that_is_cut_off_would_be_seen(runs: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    """The control of the margin."""
    write = Axes.set

    def set_long(self: Axes, **kwargs: Any) -> None:
        write(self, **kwargs | {"ylabel": "cross-entropy loss (thick: evaluation, thin: training), and then some"})

    monkeypatch.setattr(Axes, "set", set_long)
    draw_curves([read_run(run) for run in runs], tmp_path / "a.png")
    assert not margin_is_white(pixels(tmp_path / "a.png"))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from here on."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def test_the_curves_are_those_of_the_runs(runs: list[Path], tmp_path: Path, figures: list[Figure]) -> None:
    read = [read_run(run) for run in runs]
    draw_curves(read, tmp_path / "a.png")
    ((loss, accuracy),) = (figure.axes for figure in figures)
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in (*loss.lines, *accuracy.lines)]
    expected = [(run.epochs, values) for run in read for values in (run.eval_loss, run.train_loss)]
    assert lines == expected + [(run.epochs, run.top1) for run in read]
    assert [line.get_linewidth() for line in loss.lines] == [2, 0.8, 2, 0.8]
    assert "thin: in training" in loss.get_title() and (loss.get_xlabel(), loss.get_ylabel()) == ("epoch", "loss")
    assert accuracy.get_ylabel() == "top-1 accuracy (%)"
    assert [text.get_text() for text in loss.get_legend().texts] == ["full_precision", "tetrajet"]
    assert [text.get_text() for text in accuracy.get_legend().texts] == ["full_precision: 70.00 %", "tetrajet: 90.00 %"]


def test_curves_differ_in_colour_and_line_style(tmp_path: Path, figures: list[Figure]) -> None:
    run = make_run(tmp_path / "run")
    draw_curves([read_run(run)] * 7, tmp_path / "a.png")
    lines = figures[0].axes[1].lines
    assert len({line.get_color() for line in lines}) == len(lines) == 7
    assert len({str(line._dash_pattern) for line in lines}) == 7


def test_a_run_of_one_epoch_is_seen(tmp_path: Path) -> None:
    draw_curves([read_run(make_run(tmp_path / "run", epochs=[0]))], tmp_path / "a.png")
    middle = pixels(tmp_path / "a.png")[50:520, 380:450]  # of the left half, without its frame
    assert has_colour(middle, COLOURS[0])


@pytest.mark.parametrize("name", ["a.PNG", "a", "a.pdf"])
def test_the_kind_of_the_picture_follows_its_name(name: str, runs: list[Path], tmp_path: Path) -> None:
    draw_curves([read_run(run) for run in runs], tmp_path / name)
    begin = (tmp_path / name).read_bytes()[:8]
    assert begin.startswith(b"%PDF" if name == "a.pdf" else b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".", r"\[Errno 21\] Is a directory"),
        ("a.xyz", "Format 'xyz' is not supported"),
        ("fp/resolved.yaml/a.png", r"\[Errno (17|20)\] "),
    ],
)
def test_a_picture_that_cannot_be_written_is_named(name: str, reason: str, runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^The picture {re.escape(str(tmp_path / name))} cannot be written \({reason}"
    ):
        draw_curves([read_run(runs[0])], tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def test_curves_prints_the_table_and_writes_the_picture(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "curves.png"
    main(["curves", *map(str, runs), "--png", str(png)])
    out, err = capsys.readouterr()
    assert out == f"{curves_table([read_run(run) for run in runs])}\n\ncurves: {png}\n" and err == ""
    assert pixels(png).std() > 10


def test_the_picture_goes_to_the_current_folder_unless_told(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["curves", "fp"])
    assert (tmp_path / "curves.png").is_file()


def test_a_broken_run_is_named_and_the_others_are_shown(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "begun", epochs=[])
    for name, file, text in [
        ("config", "resolved.yaml", "optim: {lrr: 1}\n"),
        ("metrics", "metrics.log", 'DLLL {"step": [0]}\n'),
    ]:
        make_run(tmp_path / name)
        (tmp_path / name / file).write_text(text)
    main(["curves", "begun", "fp", "config", "metrics", "tj"])
    out, err = capsys.readouterr()
    assert out == f"{curves_table([read_run(run) for run in runs])}\n\ncurves: curves.png\n"
    said = err.splitlines()
    assert len(said) == 3 and all(line.startswith("left out: ") for line in said)
    assert [name in line for name, line in zip(("begun", "config", "metrics"), said, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["curves", "fp", "nowhere"],
            "error: nowhere is not a run: it holds no resolved.yaml; give the --output_dir of",
        ),
        (["curves", "nowhere", "begun"], "error: nowhere is not a run: it holds no resolved.yaml"),
        (["curves", "begun"], "error: The run in begun has not finished an epoch yet."),
        (
            ["curves", "fp", "--png", "a.xyz"],
            "error: The picture a.xyz cannot be written (Format 'xyz' is not supported",
        ),
        (["curves", "broken"], "error: broken/resolved.yaml: there is no key optim.lrr; did you mean optim.lr?"),
        (["curves"], "error: Command line: the following arguments are required: RUN; see --help."),
        ([], "error: Command line: the following arguments are required: command; see --help."),
        (["curve", "fp"], "error: Command line: argument command: invalid choice: 'curve'"),
        (["curves", "fp", "--pngs", "a.png"], "error: There is no flag --pngs; did you mean --png?"),
        (["curves", "fp", "--pn", "a.png"], "error: There is no flag --pn; did you mean --png?"),
        (["curves", "fp", "--out", "a.png"], "error: There is no flag --out; see --help."),
        (["curves", "fp", "--png"], "error: Command line: argument --png: expected one argument; see --help."),
    ],
)
def test_a_mistake_exits_with_2_and_writes_nothing(
    argv: list[str],
    sentence: str,
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "begun", epochs=[])
    make_run(tmp_path / "broken")
    (tmp_path / "broken" / "resolved.yaml").write_text("optim: {lrr: 1}\n")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        main(argv)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and err.startswith(sentence) and len(err.splitlines()) == 1
    assert set(tmp_path.rglob("*")) == before
