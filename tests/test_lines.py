"""results/STUDY.csv: what a line says, how lines are added and merged, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config import UserError, dump_config, load_config, recipe_identity
from record.lines import FIELDS, Line, add_lines, as_csv, check_writable, once, read_finished, read_lines
from record.manifest import git_state
from record.runlog import RunLog

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "configs/digits_tetrajet.yaml"


def line(**changes: Any) -> Line:
    first = Line(
        *("digits", "tetrajet", "", 0, "0123456789ab", 90.5, 99.0, 0.1 + 0.2, 91.0, 5, 110, 35.0),
        *(
            1e-3,
            None,
            0.02,
            0.01,
            0.5,
            None,
            10,
            "none",
            "x86_64",
            "2.11.0",
            "0123+",
            "2026-01-01",
            "python main.py, 'a'",
        ),
    )
    return dataclasses.replace(first, **changes)


def leave(folder: Path, *overrides: str, epochs: int = 5, final: bool = True, **manifest: Any) -> Path:
    """A run's folder as main.py leaves it."""
    with RunLog(folder, resume=True) as log:
        log.write_config(dump_config(load_config(DIGITS, overrides)))
        log.write_manifest({"classes": 10, "steps_per_epoch": 22, "autocast": "None", **manifest})
        for epoch in range(epochs):
            log.log((epoch,), {"seconds": 2.0}, tag="train", at=epoch)
            log.log((epoch,), {"top1": 80.0 + epoch, "seconds": 0.5, "r_w": 0.5}, tag="eval")
        scores = {"top1": 84.0, "top5": 99.0, "loss": 0.5, "best_top1": 84.5, "epochs": epochs}
        if final:
            log.log((), scores, tag="final")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# What a run has left
# ---------------------------------------------------------------------------------------------------------------------


def test_a_finished_run(tmp_path: Path) -> None:
    git = {"commit": "abcdef0123456789", "dirty": True}
    found = read_finished(leave(tmp_path / "run", "run.seed=3", device={"type": "cpu", "name": "a chip"}, git=git))
    assert (found.seed, found.recipe) == (3, recipe_identity(load_config(DIGITS).model_dump(mode="json")))
    figures = found.figures
    assert {name: figures[name] for name in ("top1", "top5", "loss", "best_top1")} == {
        "top1": 84.0,
        "top5": 99.0,
        "loss": 0.5,
        "best_top1": 84.5,
    }
    assert (figures["epochs"], figures["steps"], figures["seconds"]) == (5, 110, 12.5)
    assert (figures["r_w"], figures["r_Y"], figures["confidence"]) == (0.5, None, None)
    assert (figures["device"], figures["autocast"], figures["commit"]) == ("a chip", "none", "abcdef012345+")
    assert figures["torch"] == "unknown"


def test_a_run_that_went_on_elsewhere_says_so(tmp_path: Path) -> None:
    versions, dirty = {"torch": "2.11.0"}, {"commit": "1" * 40, "dirty": True}
    folder = tmp_path / "run"
    leave(folder, final=False, git={"commit": "0" * 40, "dirty": False}, device={"type": "cpu", "name": "a"})
    leave(folder, final=False, git=dirty, device={"type": "cpu", "name": "b"}, versions=versions)
    leave(folder, git=dirty, device={"type": "cpu", "name": "b"}, versions=versions)
    figures = read_finished(folder).figures
    assert (figures["device"], figures["torch"]) == ("a b", "unknown 2.11.0")
    assert figures["commit"] == f"{'0' * 12} {'1' * 12}+"


def test_what_is_not_finished(tmp_path: Path) -> None:
    assert read_finished(tmp_path) is None
    assert read_finished(leave(tmp_path / "killed", epochs=5, final=False)) is None
    assert read_finished(leave(tmp_path / "longer", "schedule.epochs=6", epochs=5)) is None
    assert read_finished(leave(tmp_path / "control")) is not None


def test_a_run_of_two_recipes_is_none_of_a_study(tmp_path: Path) -> None:
    folder = leave(tmp_path / "run", final=False)
    leave(folder, "optim.lr=0.5")
    with pytest.raises(UserError, match="trained by more than one recipe"):
        read_finished(folder)
    with pytest.raises(UserError, match="started from given weights"):
        read_finished(leave(tmp_path / "given", "run.finetune=x.pt"))
    elsewhere = leave(tmp_path / "elsewhere", final=False)
    assert read_finished(leave(elsewhere, "data.path=/other")) is not None  # the control: where it ran may change


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def test_lines_read_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "deep/digits.csv"
    lines = [line(), line(seed=1, loss=1 / 3), line(row="q1", value="v")]
    assert read_lines(path) == []
    assert add_lines(path, lines[:1]) == lines[:1]
    assert add_lines(path, lines[1:]) == lines[1:]
    assert read_lines(path) == lines
    assert path.read_text() == as_csv(lines)


def test_no_run_has_two_lines(tmp_path: Path) -> None:
    path = tmp_path / "digits.csv"
    assert len(add_lines(path, [line(), line(top1=1.0)])) == 1
    assert add_lines(path, [line(top1=2.0)]) == []
    assert [one.top1 for one in read_lines(path)] == [90.5]
    assert len(add_lines(path, [line(recipe="another")])) == 1  # the control


@pytest.mark.parametrize("left", [0, 1, 40, 150])
def test_half_a_line_is_cut_off(tmp_path: Path, left: int) -> None:
    path = tmp_path / "digits.csv"
    whole = as_csv([line()])
    torn = as_csv([line(seed=1)], head=False)[:left]
    path.write_text(whole + torn)
    assert add_lines(path, [line(seed=2)]) == [line(seed=2)]
    assert read_lines(path) == [line(), line(seed=2)]
    path.write_text(as_csv([])[: left + 1])  # and half a head
    add_lines(path, [line()])
    assert read_lines(path) == [line()]


@pytest.mark.parametrize("left", [1, 40, 150])
def test_half_a_line_is_not_read(tmp_path: Path, left: int) -> None:
    path = tmp_path / "digits.csv"
    path.write_text(as_csv([line()]) + as_csv([line(seed=1)], head=False)[:left])
    assert read_lines(path) == [line()]  # a study that is started again gets as far as to add its line
    path.write_text(as_csv([]) + as_csv([line()], head=False)[:left] + "\n" + as_csv([line(seed=1)], head=False))
    with pytest.raises(UserError, match=r"digits\.csv"):  # the control: half a line that is not the last one
        read_lines(path)


def test_a_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "digits.csv"
    last = line(seed=12, command="python main.py --run.seed=12")
    text = as_csv([line(), last]).rstrip("\n")
    path.write_text(text)
    assert add_lines(path, []) == [] and read_lines(path) == [line(), last]
    assert add_lines(path, [line(seed=2)]) == [line(seed=2)]
    assert path.read_text() == as_csv([line(), last, line(seed=2)])
    path.write_text(text[:-1])  # the control: a command that is cut off
    assert read_lines(path) == [line()]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(file: io.RawIOBase, data: bytes) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "digits.csv"
    add_lines(path, [line()])
    monkeypatch.setattr("record.lines._write", half)
    with pytest.raises(UserError, match="No space left"):
        add_lines(path, [line(seed=1)])
    assert path.read_text() == as_csv([line()])


def test_a_run_done_twice_counts_once_in_whichever_order(tmp_path: Path) -> None:
    first, second = line(started="2026-01-01", top1=1.0), line(started="2026-01-02", top1=2.0)
    alike = dataclasses.replace(first, top1=3.0)  # not even the time tells them apart
    for order in itertools.permutations([first, second, alike, first]):
        assert once(order)[0] == [first] and sorted(one.top1 for one in once(order)[1]) == [2.0, 3.0]
    path = tmp_path / "digits.csv"
    path.write_text(as_csv([second, line(seed=1), first]))
    assert {one.top1 for one in read_lines(path)} == {1.0, 90.5}


def test_whether_lines_can_be_added_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep/digits.csv"
    check_writable(path)
    assert not path.exists()
    add_lines(path, [line()])
    check_writable(path)
    assert read_lines(path) == [line()]
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path, tmp_path / "file/digits.csv"):
        with pytest.raises(UserError, match=r"cannot be written \(.*\); choose another --results\."):
            check_writable(wrong)
    path.unlink()
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="Permission denied"):
        check_writable(path)


def test_files_of_two_machines_are_merged_by_git_without_a_conflict(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
        return subprocess.run(["git", *own, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    path = tmp_path / "results/digits.csv"
    git("init")
    (tmp_path / ".gitattributes").write_text((ROOT / ".gitattributes").read_text())
    add_lines(path, [line()])
    git("add", "."), git("commit", "-m", "one")
    git("checkout", "-b", "other")
    add_lines(path, [line(seed=1), line(seed=2)])
    git("commit", "-am", "two")
    git("checkout", "main")
    add_lines(path, [line(seed=2), line(seed=3)])
    git("commit", "-am", "three")
    git("merge", "other")
    assert sorted(one.seed for one in read_lines(path)) == [0, 1, 2, 3]


def test_several_processes_add_at_once(tmp_path: Path) -> None:
    path = tmp_path / "digits.csv"
    program = (
        "import sys; from pathlib import Path; from record.lines import *; import dataclasses\n"
        "first = read_lines(Path(sys.argv[1]))[0]\n"
        "for seed in range(int(sys.argv[2]), 40, 2):\n"
        "    add_lines(Path(sys.argv[1]), [dataclasses.replace(first, seed=seed)])"
    )
    add_lines(path, [line()])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", program, path, n], env=environment) for n in ("0", "1")]
    assert [process.wait(60) for process in started] == [0, 0]
    assert sorted(one.seed for one in read_lines(path)) == [*range(40)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "does not have the columns of finished runs"),
        (as_csv([line()]).replace("90.5", "many"), "line 2: top1 is 'many'; a finished run's number was expected"),
        (as_csv([line()]).replace("90.5", ""), "line 2: top1 is ''"),
        (as_csv([line()]).replace("90.5", "90.5,1"), "line 2, has too many columns"),
        (",".join(FIELDS) + "\ndigits\n", "line 2: row is missing; a finished run's text"),
        (as_csv([line()]).replace("90.5", "nan"), "line 2: top1 is 'nan'"),
        (as_csv([line()]).replace("90.5", "190.5"), "line 2: top1 is '190.5'"),
        (as_csv([line()]).replace(",110,", ",-1,"), "line 2: steps is '-1'; a finished run's whole number"),
        ("notes of mine", "does not have the columns of finished runs"),
    ],
    ids=lambda text: text[:30].replace("\n", " "),
)
def test_what_is_no_line_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "digits.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"digits\.csv") as error:
        read_lines(path)
    assert said in str(error.value)
    with pytest.raises(UserError):
        add_lines(path, [line(seed=9)])
    assert path.read_text() == text


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        add_lines(tmp_path, [line()])


def test_lines_are_no_change_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        own = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *own, *words], cwd=tmp_path, capture_output=True, check=True)

    for name in ("record/manifest.py", "results/digits.csv", "results/tables.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    git("init"), git("add", "."), git("commit", "-m", "one")
    monkeypatch.setattr("record.manifest.__file__", str(tmp_path / "record/manifest.py"))
    (tmp_path / "results/digits.csv").write_text("two")
    assert git_state()["dirty"] is False
    (tmp_path / "results/tables.py").write_text("two")
    assert git_state()["dirty"] is True
