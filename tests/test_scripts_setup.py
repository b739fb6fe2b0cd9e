"""setup.sh: the ways through it, and its check of the pins."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from script_helpers import ROOT, SCRIPTS, bash, clean_env, executable

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
