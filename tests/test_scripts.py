"""The shell scripts: command lines of run.sh, the ways through setup.sh, the scripts of the rows and of the tables."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from config import dump_config, load_config
from rows import Cell, all_cells
from runlog import RunLog

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
GENERAL = {"run.sh", "setup.sh", "test.sh", "quickstart.sh"}
ROWS = sorted(p for p in SCRIPTS.glob("*.sh") if p.name not in GENERAL and not p.name.startswith("table"))
TABLE_2 = [
    f"{model}_{method}"
    for model in ("deit_tiny", "deit_small", "deit_base", "swin_tiny", "swin_small")
    for method in ("fp", "int4", "microscaling", "tetrajet", "qema", "qramping")
]
CELLS = all_cells()


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}")
    path.chmod(0o755)
    return path


def clean_env(**extra: str | Path) -> dict[str, str]:
    """The environment without anything that run.sh and setup.sh read."""
    ours = (
        r"(PYTHON|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX|NPROC|NNODES|NODE_RANK|MASTER_\w+|DATA_PATH|OUTPUT_DIR|RUNS_DIR"
    )
    ours += r"|SLURM_\w+|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS)"
    env = {k: v for k, v in os.environ.items() if not re.fullmatch(ours, k)}
    return env | {k: str(v) for k, v in extra.items()}


def bash(script: Path, *args: str | Path, env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(script), *map(str, args)], env=env, cwd=cwd, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("script", [*sorted(SCRIPTS.glob("*.sh")), ROOT / ".ci/run"], ids=lambda p: p.name)
def test_bash_accepts_the_syntax(script: Path) -> None:
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


# ---------------------------------------------------------------------------------------------------------------------
# run.sh
# ---------------------------------------------------------------------------------------------------------------------


# A Python that answers what rows.py is asked and records every other command line, one word a line.
STUB = """\
case "$1" in */rows.py) exec "$REAL_PYTHON" "$@" ;; esac
printf "%s\\n" "$@" > "$RECORD"
exit "${STATUS:-0}"
"""


class Launcher:
    """run.sh with a Python that records its arguments instead of running them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "record"
        self.python = executable(folder / "my bin" / "python", STUB)
        self.path = f"{folder / 'my bin'}{os.pathsep}{os.environ['PATH']}"
        self.result: subprocess.CompletedProcess

    def __call__(self, *flags: str, config: str = "configs/a.yaml", **env: str) -> list[str]:
        self.record.unlink(missing_ok=True)
        real = {"REAL_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        full = clean_env(PYTHON=self.python, RECORD=self.record, PATH=self.path, **real, **env)
        self.result = bash(SCRIPTS / "run.sh", config, *flags, env=full, cwd=self.folder)
        return self.record.read_text().splitlines() if self.record.exists() else []


@pytest.fixture
def launch(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


MAIN = [str(ROOT / "main.py"), "--config", "configs/a.yaml", "--output_dir", str(ROOT / "runs/a")]
TORCHRUN = ["-m", "torch.distributed.run"]


def test_run_one_process(launch: Launcher) -> None:
    assert launch(NPROC="1") == [*MAIN, "--resume", "auto"]
    assert launch.result.returncode == 0


def test_run_keeps_the_exit_code_of_one_process(launch: Launcher) -> None:
    launch(NPROC="1", STATUS="143")
    assert launch.result.returncode == 143


def test_run_four_processes(launch: Launcher) -> None:
    assert launch(NPROC="4") == [*TORCHRUN, "--standalone", "--nproc-per-node", "4", *MAIN, "--resume", "auto"]


def test_run_two_nodes(launch: Launcher) -> None:
    def expected(rank: str, address: str, port: str) -> list[str]:
        nodes = ["--nnodes", "2", "--node-rank", rank, "--master-addr", address, "--master-port", port]
        return [*TORCHRUN, *nodes, "--nproc-per-node", "8", *MAIN, "--resume", "auto"]

    given = {"NPROC": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-a", "MASTER_PORT": "1234"}
    assert launch(**given) == expected("1", "node-a", "1234")
    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node-[a-b]"}
    executable(
        launch.python.parent / "scontrol", '[ "$*" = "show hostnames node-[a-b]" ] && printf "node-a\\nnode-b\\n"'
    )
    assert launch(NPROC="8", **slurm) == expected("1", "node-a", "29500")
    assert launch(**given, **slurm | {"SLURM_NNODES": "3"}) == expected("1", "node-a", "1234")  # ours win over Slurm's


def test_run_two_nodes_without_an_address(launch: Launcher) -> None:
    assert launch(NPROC="8", NNODES="2") == []
    assert launch.result.returncode == 2
    assert "MASTER_ADDR" in launch.result.stderr


@pytest.mark.parametrize("bad", [{"NPROC": "four"}, {"NPROC": "1", "NNODES": "0"}, {"NPROC": "-1"}])
def test_run_refuses_a_bad_number(launch: Launcher, bad: dict[str, str]) -> None:
    assert launch(**bad) == []
    assert launch.result.returncode == 2
    assert "must be whole numbers" in launch.result.stderr


def test_run_counts_gpus(launch: Launcher) -> None:
    """MIG instances are listed below their GPU and do not count; CUDA_VISIBLE_DEVICES does."""
    executable(launch.python.parent / "nvidia-smi", 'printf "GPU 0: A\\n  MIG 1g: b\\nGPU 1: A\\nGPU 2: A\\n"')
    assert launch()[:5] == [*TORCHRUN, "--standalone", "--nproc-per-node", "3"]
    assert launch(CUDA_VISIBLE_DEVICES="0,2")[:5] == [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    for one in ("1", "", "-1"):
        assert launch(CUDA_VISIBLE_DEVICES=one) == [*MAIN, "--resume", "auto"]
    executable(launch.python.parent / "nvidia-smi", "echo no driver; exit 9")
    assert launch() == [*MAIN, "--resume", "auto"]


@pytest.mark.parametrize(
    "flags",
    [["--smoke"], ["--resume", "x.pt"], ["--resume=x.pt"], ["--run.resume", "x.pt"], ["--run.resume=x.pt"]],
    ids=" ".join,
)
def test_run_leaves_resume_to_the_user(launch: Launcher, flags: list[str]) -> None:
    assert launch(*flags, NPROC="1") == [*MAIN, *flags]


@pytest.mark.parametrize("flag", ["--print-config", "--print_config", "--help", "-h"])
def test_run_prints_with_one_process(launch: Launcher, flag: str) -> None:
    assert launch(flag, NPROC="4") == [*MAIN, flag]


def test_run_passes_paths_and_flags_on(launch: Launcher) -> None:
    words = launch("--lr", "1e-3", "--output_dir", "third place", NPROC="1", DATA_PATH="my data", OUTPUT_DIR="my run")
    before = [*MAIN[:3], "--data-path", "my data", "--output_dir", "my run", "--resume", "auto"]
    assert words == [*before, "--lr", "1e-3", "--output_dir", "third place"]  # the user's flags come last and win


def test_run_finds_a_configuration_of_the_repository_from_anywhere(launch: Launcher) -> None:
    name = "configs/common/deit_90ep.yaml"
    assert launch(config=name, NPROC="1")[:3] == [*MAIN[:2], str(ROOT / name)]
    (launch.folder / "configs/common").mkdir(parents=True)
    (launch.folder / name).touch()
    assert launch(config=name, NPROC="1")[:3] == [*MAIN[:2], name]  # the folder one is in comes first


def test_run_a_row_of_a_table(launch: Launcher) -> None:
    """Its run is named by the row, or is the run that the row is the same as; from any folder."""
    table = "configs/ablations/table8.yaml"
    for row, name in (
        ("qema_default/deit_base", "table8_qema_default_deit_base"),
        ("tetrajet/swin_tiny", "swin_tiny_tetrajet"),
    ):
        words = launch("--lr", "1", config=f"{table}#{row}", NPROC="1")
        main = [MAIN[0], "--config", f"{ROOT / table}#{row}", "--output_dir", str(ROOT / "runs" / name)]
        assert words == [*main, "--resume", "auto", "--lr", "1"]
    assert launch(config=f"{table}#tetrajet/swin", NPROC="1") == []
    assert launch.result.returncode == 2
    assert launch.result.stderr.endswith("there is no column swin; did you mean swin_tiny?\n")


def test_run_in_a_folder_of_runs(launch: Launcher) -> None:
    assert launch(NPROC="1", RUNS_DIR="my runs") == [*MAIN[:4], "my runs/a", "--resume", "auto"]
    assert launch(NPROC="1", RUNS_DIR="my runs", OUTPUT_DIR="my run")[:5] == [*MAIN[:4], "my run"]


def test_run_without_a_configuration(launch: Launcher) -> None:
    assert launch(config="--smoke") == []
    assert launch.result.returncode == 2
    assert launch.result.stderr.startswith("usage:")


# ---------------------------------------------------------------------------------------------------------------------
# setup.sh
# ---------------------------------------------------------------------------------------------------------------------

# A Python that plays the parts setup.sh needs: it says its version, makes .venv with a copy of itself, and lets pip
# "install" by writing the file that the check of the pins looks for.
FAKE_PYTHON = r"""
here="$(cd "$(dirname "$0")" && pwd)"
case "$*" in
    *importlib.metadata*) [ -e "$here/met" ] || { echo "it has numpy 1.0, not ==2.0"; exit 1; } ;;
    *_base_executable*) echo "${FAKE_VERSION:-3.11} ${FAKE_ENSUREPIP:-yes} $here/$(basename "$0")" ;;
    *fcntl*) exec "$REAL_PYTHON" "$@" ;;
    *"-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo venv >> "$RECORD" ;;
    *"-m pip install"*)
        echo pip >> "$RECORD"
        sleep "${FAKE_PIP_SECONDS:-0}"
        [ -z "${FAKE_PIP_KILLED:-}" ] || kill -9 "$PPID"
        [ -z "${FAKE_PIP_FAILS:-}" ] || { echo "ERROR: no matching distribution"; exit 1; }
        touch "$here/met" ;;
esac
"""


class Checkout:
    """A copy of what setup.sh needs, in a folder with a space, and fake Pythons first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a check out"
        (self.root / "scripts").mkdir(parents=True)
        shutil.copy(SCRIPTS / "setup.sh", self.root / "scripts/setup.sh")
        for name in ("requirements.txt", "requirements-test.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.bin = folder / "bin"
        self.record = folder / "record"
        for name in ("python3", "python3.10", "python3.11", "python3.12", "python3.13", "python3.14"):
            executable(self.bin / name, FAKE_PYTHON)
        self.venv_python = str(self.root / ".venv/bin/python")

    def setup(self, *args: str, **extra: str | Path) -> subprocess.CompletedProcess:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        env = clean_env(PATH=path, RECORD=self.record, REAL_PYTHON=sys.executable, **extra)
        return bash(self.root / "scripts/setup.sh", *args, env=env, cwd=self.bin)

    def done(self) -> list[str]:
        """What was made since the last call."""
        words = self.record.read_text().split() if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        return words


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_setup_makes_the_environment_once(checkout: Checkout) -> None:
    first = checkout.setup()
    assert (first.returncode, first.stdout) == (0, f"{checkout.venv_python}\n"), first.stderr
    assert "making .venv" in first.stderr
    assert checkout.done() == ["venv", "pip"]
    again = checkout.setup()
    assert (again.returncode, again.stdout, again.stderr) == (0, f"{checkout.venv_python}\n", "")
    assert checkout.done() == []


def test_setup_installs_again_when_a_pin_changes(checkout: Checkout) -> None:
    checkout.setup()
    checkout.done()
    with (checkout.root / "requirements.txt").open("a") as file:
        file.write("six==1.17.0\n")
    assert checkout.setup().returncode == 0
    assert checkout.done() == ["pip"]
    assert checkout.setup("requirements-test.txt").stdout == f"{checkout.venv_python}\n"
    assert checkout.done() == []  # the stamp names every requirements file that is met


def test_setup_heals_an_interruption(checkout: Checkout) -> None:
    checkout.setup(FAKE_PIP_KILLED="1")
    assert checkout.done() == ["venv", "pip"]
    (checkout.root / ".venv/bin/met").touch()  # as if all metadata were there already
    assert checkout.setup().returncode == 0
    assert checkout.done() == ["venv", "pip"]  # made anew, not trusted
    assert checkout.setup().returncode == 0
    assert checkout.done() == []


def test_setup_distrusts_an_interrupted_environment_that_is_active(checkout: Checkout) -> None:
    checkout.setup(FAKE_PIP_KILLED="1")
    (checkout.root / ".venv/bin/met").touch()
    checkout.done()
    assert checkout.setup(VIRTUAL_ENV=checkout.root / ".venv").returncode == 0
    assert checkout.done() == ["venv", "pip"]


def test_two_setups_at_once_install_once(checkout: Checkout) -> None:
    """As when several nodes with one file system start a run: the second waits and finds the work done."""
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: checkout.setup(FAKE_PIP_SECONDS="0.5"), range(2)))
    assert [(r.returncode, r.stdout) for r in results] == [(0, f"{checkout.venv_python}\n")] * 2
    assert checkout.done() == ["venv", "pip"]
    assert sum("waiting for another set-up" in r.stderr for r in results) == 1


def test_setup_keeps_a_hand_made_environment(checkout: Checkout) -> None:
    mine = executable(checkout.root / ".venv/bin/python", FAKE_PYTHON).parent / "mine"
    mine.touch()
    assert checkout.setup(FAKE_PIP_FAILS="1").returncode == 1
    assert checkout.setup().stdout == f"{checkout.venv_python}\n"
    assert checkout.done() == ["pip", "pip"]
    assert mine.exists()


def test_setup_shows_why_pip_failed(checkout: Checkout) -> None:
    result = checkout.setup(FAKE_PIP_FAILS="1")
    assert (result.returncode, result.stdout) == (1, "")
    assert "ERROR: no matching distribution" in result.stderr
    assert "pip could not install requirements.txt" in result.stderr
    assert checkout.setup().returncode == 0


def test_setup_names_a_python_that_is_too_old(checkout: Checkout) -> None:
    result = checkout.setup(FAKE_VERSION="3.9")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("setup: Python 3.10 to 3.14 is needed and was not found (python3 is 3.9, ")
    assert len(result.stderr.splitlines()) == 1
    assert not (checkout.root / ".venv").exists()


def test_setup_looks_past_a_python3_that_is_too_old(checkout: Checkout) -> None:
    executable(checkout.bin / "python3", 'FAKE_VERSION=3.9; export FAKE_VERSION; exec "${0}.10" "$@"\n')
    executable(checkout.bin / "python3.12", "exit 127\n")  # a version manager's stand-in for a version not installed
    result = checkout.setup()
    assert result.returncode == 0
    assert f"making .venv with {checkout.bin}/python3.11" in result.stderr


def test_setup_names_the_missing_ensurepip(checkout: Checkout) -> None:
    result = checkout.setup(FAKE_ENSUREPIP="no")
    assert (result.returncode, result.stdout) == (2, "")
    assert "apt install python3.11-venv" in result.stderr


def test_setup_takes_PYTHON(checkout: Checkout, tmp_path: Path) -> None:  # noqa: N802
    chosen = executable(tmp_path / "my python", FAKE_PYTHON)
    assert f"making .venv with {chosen}" in checkout.setup(PYTHON=chosen).stderr
    old = checkout.setup(PYTHON=chosen, FAKE_VERSION="2.7")  # a mistake, though .venv is complete by now
    assert (old.returncode, old.stdout) == (2, "")
    assert f"({chosen} is 2.7)" in old.stderr
    missing = checkout.setup(PYTHON=tmp_path / "none")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "there is no Python at PYTHON=" in missing.stderr


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON", "python3"])
def test_setup_uses_an_environment_that_meets_the_pins(checkout: Checkout, tmp_path: Path, variable: str) -> None:
    python = executable(tmp_path / "env/bin/python", FAKE_PYTHON)
    (python.parent / "met").touch()
    extra = {variable: python if variable == "PYTHON" else tmp_path / "env"}
    if variable == "python3":
        python, extra = checkout.bin / "python3", {}
        (checkout.bin / "met").touch()
    result = checkout.setup(**extra)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{python}\n", "")
    assert checkout.done() == []
    (python.parent / "met").unlink()
    result = checkout.setup(**extra)
    assert result.stdout == f"{checkout.venv_python}\n"
    assert variable == "python3" or f"{python} is not used: it has numpy 1.0, not ==2.0" in result.stderr


def test_setup_without_the_requirements_file(checkout: Checkout) -> None:
    result = checkout.setup("no-such-file.txt")
    assert (result.returncode, result.stdout) == (2, "")
    assert "no-such-file.txt" in result.stderr


# The check of the pins itself, by the Python that runs this test, on metadata made for it.
PINS = """\
torch==2.11.0
torchvision==0.26.0  # a comment
numpy==2.4.6; python_version >= "3.10"
numpy==1.0; python_version < "3.10"
"""
MET = {"torch": "2.11.0", "torchvision": "0.26.0", "numpy": "2.4.6"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"torch": "2.11.0+cu128", "torchvision": "0.26.0+cu128"}, None),
        ({"torch": "2.11.0+cu130"}, None),  # the builds without a suffix are of CUDA 13.0
        ({"torch": "2.11.0+cu128"}, "different builds"),
        ({"torch": "2.11.0+cpu"}, "its torch (cpu) and torchvision (cu13) are different builds"),
        ({"torch": "2.11.1"}, "it has torch 2.11.1, not ==2.11.0"),
        ({"numpy": "1.0"}, "it has numpy 1.0, not ==2.4.6"),
    ],
    ids=str,
)
def test_check_of_the_pins(checkout: Checkout, tmp_path: Path, change: dict[str, str], reason: str | None) -> None:
    (checkout.root / "requirements.txt").write_text(PINS)
    for name, version in (MET | change).items():
        metadata = tmp_path / "site" / f"{name}-{version}.dist-info/METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    active = executable(tmp_path / "env/bin/python", f'PYTHONPATH="{tmp_path / "site"}" exec "{sys.executable}" "$@"\n')
    (checkout.root / "requirements-test.txt").write_text(
        f"-r requirements.txt\npytest=={importlib.metadata.version('pytest')}\n"
    )
    result = checkout.setup("requirements-test.txt", VIRTUAL_ENV=tmp_path / "env", FAKE_PIP_FAILS="1")
    if reason is None:
        assert (result.returncode, result.stdout, result.stderr) == (0, f"{active}\n", "")
    else:
        assert (result.returncode, result.stdout) == (1, "")
        assert f"{active} is not used: " in result.stderr
        assert reason in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The scripts and configurations of the rows
# ---------------------------------------------------------------------------------------------------------------------


def test_every_row_of_table_2_has_a_script() -> None:
    assert {*TABLE_2} <= {p.stem for p in ROWS}
    assert len(TABLE_2) == 30


@pytest.mark.parametrize("script", ROWS, ids=lambda p: p.stem)
def test_row_script_starts_its_own_configuration(script: Path, launch: Launcher, tmp_path: Path) -> None:
    config = ROOT / "configs" / f"{script.stem}.yaml"
    load_config(config)
    env = clean_env(PYTHON=launch.python, RECORD=launch.record, NPROC="1")
    result = bash(script, "--lr", "1", env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    words = launch.record.read_text().splitlines()
    assert words[words.index("--config") + 1] == str(config)
    assert words[words.index("--output_dir") + 1] == str(ROOT / "runs" / script.stem)
    assert words[-2:] == ["--lr", "1"]
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("name", TABLE_2)
def test_row_script_states_the_published_top1(name: str) -> None:
    paper = load_config(ROOT / f"configs/{name}.yaml").paper
    assert f"published top-1 {paper.top1:.2f} %" in (SCRIPTS / f"{name}.sh").read_text()
    assert "Table 2," in (SCRIPTS / f"{name}.sh").read_text()
    assert f"top-1 {paper.top1:.2f} %" in (ROOT / f"configs/{name}.yaml").read_text().splitlines()[0]


@pytest.mark.parametrize(
    "path", sorted({*ROOT.glob("configs/**/*.yaml")} - {*ROOT.glob("configs/ablations/*")}), ids=lambda p: p.stem
)
def test_configuration_loads(path: Path) -> None:
    load_config(path)


# ---------------------------------------------------------------------------------------------------------------------
# The scripts of the tables
# ---------------------------------------------------------------------------------------------------------------------


class Tables:
    """table<N>.sh with a Python that answers rows.py and records the runs: [configuration, folder, other words]."""

    def __init__(self, folder: Path) -> None:
        self.runs_dir = folder / "my runs"
        self.record = folder / "record"
        stub = STUB.replace('> "$RECORD"', '>> "$RECORD"; echo END >> "$RECORD"; ${THEN:-true}')
        self.python = executable(folder / "my bin" / "python", stub)
        self.result: subprocess.CompletedProcess

    def environment(self, **env: str) -> dict[str, str]:
        ours = {"PYTHON": self.python, "RECORD": self.record, "RUNS_DIR": self.runs_dir, "REAL_PYTHON": sys.executable}
        return clean_env(**{**ours, "NPROC": "1", **env})

    def __call__(self, number: int, *words: str, **env: str) -> list[list[str]]:
        self.record.unlink(missing_ok=True)
        self.result = bash(SCRIPTS / f"table{number}.sh", *words, env=self.environment(**env), cwd=self.runs_dir.parent)
        return self.started()

    def started(self) -> list[list[str]]:
        text = self.record.read_text() if self.record.exists() else ""
        runs = []
        for words in (part.split("\n")[:-1] for part in text.split("END\n")[:-1]):
            at = words.index("--config")
            assert words[at - 1 : at + 1] == [str(ROOT / "main.py"), "--config"] and words[at + 2] == "--output_dir"
            runs.append(
                [words[at + 1].removeprefix(f"{ROOT}/configs/"), words[at + 3], *words[: at - 1], *words[at + 4 :]]
            )
        return runs

    def run(self, name: str, config: str) -> list[str]:
        return [config, str(self.runs_dir / name), "--resume", "auto"]

    def make(self, name: str, reference: str, *overrides: str, epochs: int = 90) -> None:
        """A run directory with `epochs` evaluated epochs."""
        with RunLog(self.runs_dir / name) as log:
            log.write_config(dump_config(load_config(ROOT / "configs" / reference, overrides)))
            for epoch in range(epochs):
                log.log((epoch,), {"top1": 50.0}, tag="eval")


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    return Tables(tmp_path)


@pytest.mark.parametrize("number", range(1, 11))
def test_a_table_script_runs_a_row_of_its_table(tables: Tables, number: int) -> None:
    cell = [cell for cell in CELLS if cell.table == number][-1]
    config = cell.run_reference.removeprefix(f"{ROOT}/configs/")
    assert tables(number, cell.row, cell.column, "--lr", "1") == [[*tables.run(cell.run, config), "--lr", "1"]]
    assert tables.result.returncode == 0
    assert os.access(SCRIPTS / f"table{number}.sh", os.X_OK)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]], ids=str)
def test_a_table_script_lists_its_rows(tables: Tables, words: list[str]) -> None:
    assert tables(1, *words) == []
    lines = tables.result.stdout.splitlines()
    assert lines[0].startswith("Table 1: top-1 accuracy (%) with one quantizer active")
    assert "q1              deit_tiny   61.50  bash scripts/table1.sh q1 deit_tiny" in lines
    assert any(line.endswith("table1.sh full_precision deit_tiny   # the same run as deit_tiny_fp") for line in lines)
    assert len([line for line in lines if "bash scripts/table1.sh" in line]) == 16 + 2
    assert (tables.result.returncode, tables.result.stderr) == (0, "")


def test_a_row_on_several_gpus_and_nodes(tables: Tables) -> None:
    config, run = "ablations/table1.yaml#q1/deit_tiny", str(tables.runs_dir / "table1_q1_deit_tiny")
    several = [*TORCHRUN, "--standalone", "--nproc-per-node", "8"]
    assert tables(1, "q1", "deit_tiny", NPROC="8") == [[config, run, *several, "--resume", "auto"]]
    nodes = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "node-a", "--master-port", "29500"]
    given = {"NPROC": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-a"}
    several = [*TORCHRUN, *nodes, "--nproc-per-node", "8"]
    assert tables(1, "q1", "deit_tiny", **given) == [[config, run, *several, "--resume", "auto"]]


def test_a_row_of_several_models(tables: Tables) -> None:
    expected = [tables.run(f"table1_q1_{m}", f"ablations/table1.yaml#q1/{m}") for m in ("deit_tiny", "deit_small")]
    assert tables(1, "q1", "--", "--lr", "1") == [[*run, "--lr", "1"] for run in expected]


def test_a_row_that_is_the_same_run_as_another(tables: Tables) -> None:
    assert tables(4, "tetrajet_qema", "deit_small") == [tables.run("deit_small_qema", "deit_small_qema.yaml")]
    shared = tables.run("table8_qema_default_deit_base", "ablations/table8.yaml#qema_default/deit_base")
    assert tables(9, "decay_0.998") == [shared]


def test_one_folder_is_for_one_run(tables: Tables) -> None:
    assert [run[1] for run in tables(9, "decay_0.995", OUTPUT_DIR="mine")] == ["mine"]
    assert tables(1, "q1", OUTPUT_DIR="mine") == []
    assert (tables.result.returncode, tables.result.stderr) == (
        2,
        "error: OUTPUT_DIR and --output_dir are the folder of one run; RUNS_DIR is that of several.\n",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["q7"], "Table 1 has no row q7; did you mean q"),
        (["everything"], "Table 1 has no row everything; there are full_precision, q1, q2, q3, q4, q5, q6, all_quant"),
        (["q1", "deit_tny"], "Table 1 has no model deit_tny; did you mean deit_tiny?"),
        (["all", "swin_tiny"], "Table 1 has no model swin_tiny; did you mean deit_tiny?"),
        (
            ["q1", "deit_tiny", "deit_small"],
            "table1.sh takes ROW [MODEL], or all [MODEL]; got q1 deit_tiny deit_small.",
        ),
        (["--smoke"], "table1.sh takes ROW [MODEL], or all [MODEL] before the flags."),
        (["all", "--epoch", "3"], "There is no flag --epoch; did you mean --epochs?"),
    ],
)
def test_a_mistake_at_a_table_script(tables: Tables, words: list[str], message: str) -> None:
    assert tables(1, *words) == []
    assert (tables.result.returncode, tables.result.stdout) == (2, "")
    assert tables.result.stderr.startswith(f"error: {message}")
    assert len(tables.result.stderr.splitlines()) == 1


def test_all_runs_what_is_missing(tables: Tables) -> None:
    tables.make("deit_tiny_tetrajet", "deit_tiny_tetrajet.yaml")  # complete
    tables.make("table7_e2m1_e3m0_deit_tiny", "ablations/table7.yaml#e2m1/e3m0", epochs=89)
    tables.make(
        "table7_e3m0_e2m1_deit_tiny", "ablations/table7.yaml#e3m0/e2m1", "run.seed=1"
    )  # complete, but another run
    missing = [
        tables.run(f"table7_{row.replace('/', '_')}_deit_tiny", f"ablations/table7.yaml#{row}/deit_tiny")
        for row in ("e2m1/e3m0", "e3m0/e2m1", "e3m0/e3m0")
    ]
    assert tables(7, "all") == missing
    assert tables.result.stderr == f"{tables.runs_dir / 'deit_tiny_tetrajet'} is complete.\n"
    assert [line for line in tables.result.stdout.splitlines() if line.startswith("==")] == [
        f"== configs/ablations/table7.yaml#{row}/deit_tiny" for row in ("e2m1/e3m0", "e3m0/e2m1", "e3m0/e3m0")
    ]


def test_all_with_everything_complete(tables: Tables) -> None:
    for name in ("deit_base_tetrajet", "deit_base_qema", "deit_base_qramping"):
        tables.make(name, f"{name}.yaml")
    for row in ("without_wq", "without_wq_aq"):
        tables.make(f"table6_{row}_deit_base", f"ablations/table6.yaml#{row}")
    assert tables(6, "all") == []
    assert (tables.result.returncode, tables.result.stdout) == (0, "")
    assert len(tables.result.stderr.splitlines()) == 5


def test_a_failure_ends_a_table(tables: Tables) -> None:
    assert len(tables(1, "q1", STATUS="3")) == 1
    assert tables.result.returncode == 3
    assert tables.result.stderr.startswith(
        "table.sh: configs/ablations/table1.yaml#q1/deit_tiny ended with exit code 3;"
    )


def test_a_stopped_table_waits_for_its_run(tables: Tables, tmp_path: Path) -> None:
    """As from Slurm: the signal goes to all processes, and the run needs time to save its state."""
    saved = tmp_path / "saved"
    run = executable(tmp_path / "train", f'trap "sleep 0.5; touch {saved}; exit 143" TERM; sleep 60 & wait\n')
    command = ["bash", str(SCRIPTS / "table1.sh"), "q1"]
    env = tables.environment(THEN=f"exec bash {run}")
    process = subprocess.Popen(
        command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not tables.started() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    assert saved.exists()
    assert len(tables.started()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# For real: a few small ones, and all of them at full size. tests/test_paper_rows.py trains a spread without scripts.
# ---------------------------------------------------------------------------------------------------------------------


def smoke(script: Path, *words: str, cwd: Path) -> None:
    env = clean_env(PYTHON=sys.executable, NPROC="1", OMP_NUM_THREADS="1")
    command = ["bash", str(script), *words, "--smoke", "--device", "cpu"]
    result = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("smoke test passed")
    assert not list(cwd.iterdir())


@pytest.mark.parametrize("words", [["table1.sh", "q1", "deit_tiny"], ["deit_tiny_qramping.sh"], ["swin_tiny_int4.sh"]])
def test_a_script_for_real(words: list[str], tmp_path: Path) -> None:
    shape = "{depth: 1}" if "swin" not in words[0] else "{depths: [1, 1, 1, 1]}"
    smoke(SCRIPTS / words[0], *words[1:], "--input-size", "32", "--model.kwargs", shape, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE_2)
def test_every_script_of_table_2(name: str, tmp_path: Path) -> None:
    smoke(SCRIPTS / f"{name}.sh", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [c for c in CELLS if not c.same], ids=lambda c: f"{c.table}-{c.row}-{c.column}")
def test_every_row_with_a_run_of_its_own(cell: Cell, tmp_path: Path) -> None:
    """With the scripts of Table 2 all 75 runs. tests/test_paper_rows.py says that each other row starts one of them."""
    smoke(SCRIPTS / f"table{cell.table}.sh", cell.row, cell.column, cwd=tmp_path)
