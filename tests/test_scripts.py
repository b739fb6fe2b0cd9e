"""The shell scripts: command lines of run.sh, the ways through setup.sh, and the scripts of the rows."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from config import load_config

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
GENERAL = {"run.sh", "setup.sh", "test.sh", "quickstart.sh"}
ROWS = sorted(p for p in SCRIPTS.glob("*.sh") if p.name not in GENERAL and not p.name.startswith("table"))

# Table 2 of arXiv 2502.20853: DeiT-T, DeiT-S, DeiT-B.
PUBLISHED = {
    "fp": ("full_precision", (63.73, 73.33, 75.57)),
    "microscaling": ("microscaling", (58.56, 70.10, 74.54)),
    "tetrajet": ("tetrajet", (59.75, 71.03, 74.91)),
}


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}")
    path.chmod(0o755)
    return path


def clean_env(**extra: str | Path) -> dict[str, str]:
    """The environment without anything that run.sh and setup.sh read."""
    ours = r"(PYTHON|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX|NPROC|NNODES|NODE_RANK|MASTER_\w+|DATA_PATH|OUTPUT_DIR"
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


class Launcher:
    """run.sh with a Python that records its arguments instead of running them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "record"
        self.python = executable(folder / "my bin" / "python", 'printf "%s\\n" "$@" > "$RECORD"; exit "${STATUS:-0}"\n')
        self.path = f"{folder / 'my bin'}{os.pathsep}{os.environ['PATH']}"
        self.result: subprocess.CompletedProcess

    def __call__(self, *flags: str, config: str = "configs/a.yaml", **env: str) -> list[str]:
        self.record.unlink(missing_ok=True)
        full = clean_env(PYTHON=self.python, RECORD=self.record, PATH=self.path, **env)
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


def test_every_row_of_the_three_schemes_has_a_script() -> None:
    names = {p.stem for p in ROWS}
    assert {f"deit_{size}_{method}" for size in ("tiny", "small", "base") for method in PUBLISHED} <= names


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


@pytest.mark.parametrize("script", [p for p in ROWS if p.stem.startswith("deit_")], ids=lambda p: p.stem)
def test_row_script_states_the_published_top1(script: Path) -> None:
    paper = load_config(ROOT / "configs" / f"{script.stem}.yaml").paper
    assert paper is not None
    assert f"published top-1 {paper.top1:.2f} %" in script.read_text()
    assert f"Table {paper.table}," in script.read_text()


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_configuration_carries_the_published_top1(size: str, method: str) -> None:
    row, figures = PUBLISHED[method]
    paper = load_config(ROOT / f"configs/deit_{size}_{method}.yaml").paper
    expected = (2, row, f"deit_{size}", figures[("tiny", "small", "base").index(size)])
    assert (paper.table, paper.row, paper.column, paper.top1) == expected


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: p.stem)
def test_configuration_loads(path: Path) -> None:
    load_config(path)
