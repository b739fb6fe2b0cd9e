"""study.py with studies: run, stopped, killed, started again, cut off by time; no run is lost and none done twice."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from quick import some
from study_helpers import ROOT, TWO, Studies, leave_epochs, write_study
from test_study_pool import alive, until

import study
from config import UserError, load_config, recipe_identity
from config.flags import parse_flags
from record.lines import Line, add_lines, read_lines
from studies.conduct import Conduct, Places
from studies.grid import read_study
from studies.pool import Pool, threads

NAMES = ["full_precision-seed0", "tetrajet-seed0", "full_precision-seed1", "tetrajet-seed1"]


@pytest.fixture
def studies(tmp_path: Path) -> Studies:
    return Studies(tmp_path)


def lines_of(studies: Studies) -> list[Line]:
    return read_lines(studies.results / "small.csv")


def done(studies: Studies) -> list[str]:
    return [f"{line.row}-seed{line.seed}" for line in lines_of(studies)]


# ---------------------------------------------------------------------------------------------------------------------
# To the end
# ---------------------------------------------------------------------------------------------------------------------


def test_a_study_leaves_a_line_a_run(studies: Studies) -> None:
    file = write_study(studies.folder)
    result = studies("run", file, "--", "--data-path", "/data")
    assert (result.returncode, result.stderr) == (0, "")
    assert done(studies) == NAMES
    line = lines_of(studies)[3]
    run = read_study(file).runs()[3]
    assert line.key == run.key and line.command == run.command and "/data" not in line.command
    assert (line.study, line.top1, line.best_top1, line.epochs, line.steps) == ("small", 51.0, 77.0, 3, 66)
    assert (line.seconds, line.r_w, line.r_WQ, line.commit) == (7.5, 0.25, None, "0123456789ab")
    progress = result.stdout.splitlines()
    assert progress[0].startswith("[0/4] small: 4 to run, 1 at a time")
    assert [p.split(":")[0] for p in progress[1:5]] == [f"[{n}/4] {name}" for n, name in enumerate(NAMES, 1)]
    assert re.search(r"full_precision-seed0: top-1 50\.00 %, \d+ s, about \d+ s left", progress[1])
    assert progress[-1] == "[4/4] small"


def test_what_is_done_is_not_done_again(studies: Studies) -> None:
    file = write_study(studies.folder)
    studies("run", file, "--filter", "tetrajet")
    studies("run", file, "--jobs", "3")
    assert sorted(done(studies)) == sorted(NAMES)
    assert {name: studies.trained(name) for name in NAMES} == {name: [0, 1, 2] for name in NAMES}
    again = studies("run", file)
    assert again.stdout.splitlines()[0].startswith("[4/4] small: 0 to run")
    shutil.rmtree(studies.output)  # the line is enough
    assert studies("run", file).returncode == 0
    assert not (studies.output / "tetrajet-seed0").exists()
    assert len(done(studies)) == 4


def test_a_run_that_fails_is_named_and_the_others_go_on(studies: Studies) -> None:
    file = write_study(studies.folder)
    result = studies("run", file, "--jobs", "2", FAILING="0")
    assert result.returncode == 1
    assert sorted(done(studies)) == NAMES[2:]
    for name in NAMES[:2]:
        assert f"failed: {name}: made to fail. (exit code 1; {studies.output}/logs/{name}.log)" in result.stderr
    assert studies("run", file).returncode == 0
    assert sorted(done(studies)) == sorted(NAMES)


def test_a_run_that_ends_without_an_end_has_failed(studies: Studies) -> None:
    result = studies("run", write_study(studies.folder), "--filter", "tetrajet-seed0", LINELESS="1")
    assert result.returncode == 1 and "tetrajet-seed0: it said nothing (exit code 0" in result.stderr
    assert done(studies) == []


def test_a_run_that_is_finished_gets_the_line_it_lacks(studies: Studies) -> None:
    file = write_study(studies.folder)
    studies("run", file)
    before = lines_of(studies)
    (studies.results / "small.csv").unlink()
    planned = studies("plan", file).stdout.splitlines()
    assert planned[0] == "full_precision-seed0: finished, its line is to be written"
    assert studies("run", file).returncode == 0
    assert lines_of(studies) == before
    assert studies.trained("tetrajet-seed1") == [0, 1, 2]


def test_a_folder_with_another_recipe_is_left_alone(studies: Studies) -> None:
    studies("run", write_study(studies.folder), "--filter", "tetrajet-seed0")
    changed = write_study(studies.folder, set={"schedule": {"epochs": 2}, "run": {"device": "cpu"}})
    result = studies("run", changed)
    assert result.returncode == 1
    assert "tetrajet-seed0: " in result.stderr and "holds a run of another recipe or seed, says re" in result.stderr
    assert len(done(studies)) == 4 and len({line.recipe for line in lines_of(studies)}) == 3
    assert studies.trained("tetrajet-seed0") == [0, 1, 2]


def test_each_run_has_its_share_of_the_machine(studies: Studies) -> None:
    file = write_study(studies.folder, seeds=[0])
    studies("run", file, "--jobs", "2", CUDA_VISIBLE_DEVICES="4,5")
    seen = [json.loads((studies.output / name / "environment").read_text()) for name in NAMES[:2]]
    assert {environment["CUDA_VISIBLE_DEVICES"] for environment in seen} == {"4", "5"}


def test_what_is_started_is_the_run(tmp_path: Path) -> None:
    run = read_study(write_study(tmp_path, set={"data": {"num_workers": None}})).runs()[1]
    places = Places.of(read_study(write_study(tmp_path)), tmp_path / "my runs", tmp_path)
    words = Conduct(places, [run], Pool(2), ["--data-path", "/my data"], None).command(run)
    assert words[:2] == [sys.executable, str(ROOT / "main.py")]
    options, overrides = parse_flags(words[2:])
    cfg = load_config(options.config, overrides)
    assert recipe_identity(cfg.model_dump(mode="json")) == run.cell.recipe
    assert (cfg.run.seed, cfg.run.resume, cfg.data.path) == (run.seed, "auto", "/my data")
    assert cfg.run.output_dir == str(tmp_path / "my runs/tetrajet-seed0")
    assert cfg.data.num_workers == max(1, min(10, threads(2)))  # its share of the cores
    alone = Conduct(places, [run], Pool(1), [], None).command(run)
    assert not any("num_workers" in word for word in [*alone[:4], *alone[-4:]])


# ---------------------------------------------------------------------------------------------------------------------
# Stopped
# ---------------------------------------------------------------------------------------------------------------------


def begun(studies: Studies, *names: str) -> Callable[[], bool]:
    return lambda: all(studies.trained(name) for name in names)


@pytest.mark.parametrize("number", some([signal.SIGTERM, signal.SIGINT], every=2))
def test_a_stopped_study_goes_on(studies: Studies, number: int) -> None:
    file = write_study(studies.folder, set={"schedule": {"epochs": 6}, "run": {"device": "cpu"}})
    process = studies.start(file, "--jobs", "2", EPOCH_S="0.4")
    until(begun(studies, *NAMES[:2]))
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (128 + number, "")
    assert f"stopped by {signal.Signals(number).name}: 2 saved where they were, 2 not begun" in out
    assert done(studies) == []
    assert studies("run", file, "--jobs", "2").returncode == 0
    assert sorted(done(studies)) == sorted(NAMES)
    assert {name: studies.trained(name) for name in NAMES} == {name: [*range(6)] for name in NAMES}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_killed_study_goes_on_and_leaves_no_run_behind(studies: Studies) -> None:
    file = write_study(studies.folder, set={"schedule": {"epochs": 6}, "run": {"device": "cpu"}})
    process = studies.start(file, "--jobs", "2", EPOCH_S="0.4")
    until(begun(studies, *NAMES[:2]))
    process.kill()
    process.communicate()
    pids = [int((studies.output / name / "process").read_text()) for name in NAMES[:2]]
    until(lambda: not any(map(alive, pids)))
    assert done(studies) == []
    assert studies("run", file, "--jobs", "2").returncode == 0
    assert sorted(done(studies)) == sorted(NAMES)
    assert {name: studies.trained(name) for name in NAMES} == {name: [*range(6)] for name in NAMES}


def test_one_study_at_a_time_in_a_folder(studies: Studies) -> None:
    file = write_study(studies.folder)
    process = studies.start(file, EPOCH_S="5")
    until(lambda: (studies.output / NAMES[0] / "process").exists())
    second = studies("run", file)
    process.terminate()
    process.communicate()
    assert (
        second.returncode == 2
        and f"the folder of a study in progress, written by process {process.pid}" in second.stderr
    )
    assert second.stderr.endswith("choose another --output.\n")


def test_time_that_is_up(studies: Studies) -> None:
    file = write_study(studies.folder, set={"schedule": {"epochs": 30}, "run": {"device": "cpu"}})
    began = time.monotonic()
    result = studies("run", file, "--jobs", "2", "--limit-minutes", "0.05", EPOCH_S="0.5")
    assert result.returncode == 0 and time.monotonic() - began < 20
    assert "the time is up: 2 saved where they were, 2 not begun; the same command goes on." in result.stdout
    assert done(studies) == []


def test_a_run_that_went_on_took_longer_than_its_last_part(studies: Studies) -> None:
    file = write_study(studies.folder, rows={"tetrajet": TWO["rows"]["tetrajet"]})
    leave_epochs(studies.output / "tetrajet-seed0", 2)
    result = studies("run", file)
    said = r"tetrajet-seed0: top-1 50\.00 %, \d+ s, about 2 s left"  # 2.5 s for the whole, however long its last part
    assert re.search(said, result.stdout), result.stdout


def test_a_run_that_does_not_end_is_killed(studies: Studies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.conduct.LET_GO_S", 0.5)
    studies.stand_in.write_text("import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(60)")
    result = studies("run", write_study(studies.folder), "--limit-minutes", "0.02")
    assert result.returncode == 1 and "full_precision-seed0: it said nothing (signal 9;" in result.stderr


def test_no_more_jobs_than_runs(studies: Studies) -> None:
    result = studies("run", write_study(studies.folder), "--jobs", "64", "--filter", "tetrajet-seed0")
    assert "small: 1 to run, 1 at a time" in result.stdout
    environment = json.loads((studies.output / "tetrajet-seed0/environment").read_text())
    assert environment["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", str(threads(1)))


# ---------------------------------------------------------------------------------------------------------------------
# Other commands
# ---------------------------------------------------------------------------------------------------------------------


def test_runs_of_another_machine_are_collected(studies: Studies, tmp_path: Path) -> None:
    file = write_study(studies.folder)
    studies("run", file)
    lines = lines_of(studies)
    elsewhere = tmp_path / "elsewhere"
    studies.output.rename(elsewhere)
    (elsewhere / NAMES[0]).rename(elsewhere / "another_name")
    (elsewhere / NAMES[1] / "metrics.log").unlink()
    (studies.results / "small.csv").unlink()
    other = write_study(studies.folder, "other", seeds=[5])
    result = studies("collect", other, str(elsewhere))
    assert result.stdout.count(": no run of other") == 3 and not (studies.results / "other.csv").exists()
    result = studies("collect", file, str(elsewhere))
    assert result.stdout.splitlines() == [
        f"{elsewhere}/another_name: {NAMES[0]}",
        f"{elsewhere}/{NAMES[2]}: {NAMES[2]}",
        f"{elsewhere}/{NAMES[1]}: not finished",
        f"{elsewhere}/{NAMES[3]}: {NAMES[3]}",
    ]
    assert lines_of(studies) == [lines[0], lines[2], lines[3]]
    again = studies("collect", file, str(elsewhere))
    assert again.stdout.count("whose line was there") == 3 and len(lines_of(studies)) == 3
    nothing = studies("collect", file, str(studies.results))
    assert nothing.returncode == 2 and "There is no run at or below" in nothing.stderr


def test_a_plan_says_what_there_is_to_do(studies: Studies) -> None:
    file = write_study(studies.folder)
    assert studies("plan", file).stdout.splitlines()[:2] == [f"{name}: 0 of 3 epochs done" for name in NAMES[:2]]
    studies("run", file, "--seeds", "0")
    assert studies("plan", file).stdout.splitlines() == [
        f"{NAMES[0]}: done",
        f"{NAMES[1]}: done",
        f"{NAMES[2]}: 0 of 3 epochs done",
        f"{NAMES[3]}: 0 of 3 epochs done",
        f"2 of 4 runs are done ({studies.results}/small.csv).",
    ]


def run_here(*words: str) -> tuple[int, str, str]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            study.main(words)
            code = 0
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), error.getvalue()


def test_a_study_is_listed() -> None:
    code, out, _ = run_here("list", str(ROOT / "configs/studies/digits.yaml"), "--filter", "tetrajet")
    assert code == 0
    assert out.splitlines()[0] == "digits: full precision and TetraJet on handwritten digits; 3 runs."
    row = out.splitlines()[3].split(maxsplit=6)
    assert row[:5] == ["tetrajet", "-", "0", "1", "2"] and row[6].startswith("python main.py --config configs/digits")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "FILE", "--jobs", "0"], "--jobs is 0; at least one run at a time was expected."),
        (["run", "FILE", "--filter", "q1"], "has no run q1; "),
        (["run", "FILE", "--limit-minutes", "nan"], "--limit-minutes is nan; a time above 0 was expected."),
        (["run", "FILE", "--limit-minutes", "0"], "--limit-minutes is 0; a time above 0 was expected."),
        (["list", "FILE", "--seeds", "4294967296"], "--seeds has 4294967296; numbers from 0 to 4294967295"),
        (["plan", "FILE", "tetrajet", "all"], "tetrajet all is a table's; runs of a study are chosen by --filter."),
        (["plan", "FILE", "--runs-dir", "x"], "--runs-dir is a table's; "),
        (["list", "2", "--filter", "q1"], "--filter is a study's; a table takes ROW|all [MODEL]."),
        (["list", "2", "--without", "q1"], "--without is a study's; "),
        (["plan", "2", "all", "--seeds", "1"], "--seeds is a study's; "),
        (["plan", "2", "all", "--output", "x"], "--output is a study's; "),
        (["plan", "2", "all", "--results", "x"], "--results is a study's; "),
        (["list", "2", "--", "--lr", "3"], "list takes no flags of main.py, such as --lr; plan does."),
        (["run", "none.yaml"], "There is no configuration file none.yaml"),
        (["run", "FILE", "--lr", "2"], "Flags of main.py go after --."),
        (["run", "FILE", "--job", "2"], "There is no flag --job; did you mean --jobs?"),
        (["run", "FILE", "--", "--lr", "1"], "optim.lr 1.0 (here 0.004) would change what small trains"),
        (["run", "3"], "3 is neither the number of a table nor a study's file"),
        (["list", "77"], "There is no table 77; there are 1, 2"),
        (["plan", "1"], "table1.sh takes ROW [MODEL], or all [MODEL]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(tmp_path: Path, words: list[str], said: str) -> None:
    file = write_study(tmp_path)
    code, _, error = run_here(*(str(file) if word == "FILE" else word for word in words))
    assert code == 2 and said in error and error.count("\n") == 1


def test_lines_that_cannot_be_written_are_known_beforehand(studies: Studies) -> None:
    studies.results.write_text("a file")
    result = studies("run", write_study(studies.folder))
    assert result.returncode == 2 and "small.csv cannot be written (" in result.stderr
    assert not studies.output.exists()


def test_a_line_that_cannot_be_written_loses_no_run(studies: Studies, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, lines: list[Line]) -> list[Line]:
        if lines[0].seed == 0:
            raise UserError(f"The results {path} cannot be written: No space left on device.")
        return add_lines(path, lines)

    file = write_study(studies.folder)
    monkeypatch.setattr("studies.conduct.add_lines", full)
    result = studies("run", file, "--jobs", "2")
    assert result.returncode == 1 and result.stderr.count("No space left on device.") == 2
    assert sorted(done(studies)) == NAMES[2:]
    monkeypatch.setattr("studies.conduct.add_lines", add_lines)
    assert studies("run", file).returncode == 0
    assert sorted(done(studies)) == sorted(NAMES)
    assert {name: studies.trained(name) for name in NAMES} == {name: [0, 1, 2] for name in NAMES}


def test_a_folder_of_a_run_that_cannot_be_written_is_named(studies: Studies) -> None:
    (studies.output / NAMES[0]).mkdir(parents=True)
    (studies.output / NAMES[0] / ".lock").symlink_to("elsewhere")
    (studies.output / NAMES[0] / "elsewhere").write_text("")
    result = studies("run", write_study(studies.folder))
    assert result.returncode == 1 and f"{NAMES[0]} cannot be written (" in result.stderr
    assert sorted(done(studies)) == sorted(NAMES[1:])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    file = write_study(tmp_path, rows={"tetrajet": TWO["rows"]["tetrajet"]})
    code, _, error = run_here("run", str(file), "--output", str(tmp_path / "file"), "--results", str(tmp_path))
    assert code == 2 and "cannot be written (File exists); choose another --output." in error


# ---------------------------------------------------------------------------------------------------------------------
# For real
# ---------------------------------------------------------------------------------------------------------------------


def real(tmp_path: Path, *words: str) -> list[str]:
    places = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path)]
    return [sys.executable, str(ROOT / "study.py"), "run", str(ROOT / "configs/studies/digits.yaml"), *words, *places]


def processes_of(folder: Path) -> list[int]:
    """Those whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_a_study_of_digits_killed_and_started_again_loses_and_doubles_no_run(tmp_path: Path) -> None:
    began = time.monotonic()
    for moment in (12.0, 25.0):
        process = subprocess.Popen(real(tmp_path, "--jobs", "2"), stdout=subprocess.DEVNULL)
        time.sleep(moment)
        process.kill()
        process.wait()
        until(lambda: not processes_of(tmp_path / "runs"), 30)
    killed = read_lines(tmp_path / "digits.csv")
    assert len(killed) < 6
    spent = time.monotonic() - began
    result = subprocess.run(real(tmp_path, "--jobs", "2"), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    lines = read_lines(tmp_path / "digits.csv")
    assert sorted((line.row, line.seed) for line in lines) == [
        (row, seed) for row in ("full_precision", "tetrajet") for seed in (0, 1, 2)
    ]
    assert len((tmp_path / "digits.csv").read_text().splitlines()) == 7
    assert lines[: len(killed)] == killed
    assert time.monotonic() - began - spent < 240
    # A run that was killed and went on has the figures of one that was not, of as many threads.
    alone = tmp_path / "alone"
    subprocess.run(real(alone, "--filter", "*-seed0", "--jobs", "2"), check=True, stdout=subprocess.DEVNULL)
    for line in read_lines(alone / "digits.csv"):
        twin = next(one for one in lines if one.key == line.key)
        assert (twin.top1, twin.loss, twin.best_top1, twin.r_w) == (line.top1, line.loss, line.best_top1, line.r_w)
