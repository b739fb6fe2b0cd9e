"""Several processes at a time: how many, on which GPU, what they end with, and that none is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from config import UserError
from studies.pool import Ended, Pool, Signals, threads, visible_gpus

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable, "-c"]


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def all_ended(pool: Pool) -> list[Ended]:
    found: list[Ended] = []
    until(lambda: found.extend(pool.ended()) or not pool.running)
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_what_processes_end_with(tmp_path: Path) -> None:
    (tmp_path / "b.log").write_text("error: of an earlier start\n")
    with Pool(3) as pool:
        pool.start("a", [*PYTHON, "print('hello')"], tmp_path / "logs/a.log")
        pool.start("b", [*PYTHON, "print('error: no.\\nmore'); raise SystemExit(2)"], tmp_path / "b.log")
        pool.start("c", [*PYTHON, "import os; os.kill(os.getpid(), 9)"], tmp_path / "c.log")
        assert pool.full and {*pool.running} == {"a", "b", "c"}
        ended = {one.name: one for one in all_ended(pool)}
    assert {name: (one.code, one.said) for name, one in ended.items()} == {
        "a": (0, "hello"),
        "b": (2, "no."),
        "c": (-9, "it said nothing"),
    }
    assert all(0 < one.seconds < 20 for one in ended.values())
    assert (tmp_path / "b.log").read_text() == "error: of an earlier start\nerror: no.\nmore\n"


def test_each_process_has_one_of_several_gpus(tmp_path: Path) -> None:
    show = [*PYTHON, "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]

    def shown(gpus: list[str]) -> list[str]:
        with Pool(3, gpus) as pool:
            for name in "abc":
                pool.start(name, show, tmp_path / name)
            return [one.said for one in sorted(all_ended(pool), key=lambda one: one.name)]

    assert shown(["4", "5"]) == ["4", "5", "4"]
    assert len({*shown(["4"])}) == 1 and shown(["4"])[0] == str(os.environ.get("CUDA_VISIBLE_DEVICES"))


def test_a_gpu_that_is_free_again_is_the_next_ones(tmp_path: Path) -> None:
    with Pool(2, ["0", "1"]) as pool:
        pool.start("a", [*PYTHON, "import time; time.sleep(60)"], tmp_path / "a")
        for name in "bc":
            pool.start(name, [*PYTHON, "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"], tmp_path / name)
            found: list[Ended] = []
            until(lambda found=found: found.extend(pool.ended()) or found)
            assert found[0].said == "1"


def test_which_gpus_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3")
    assert visible_gpus() == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: a'\necho 'GPU 1: b'\n")
    smi.chmod(0o755)
    assert visible_gpus() == ["0", "1"]


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("studies.pool.cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads(jobs) for jobs in (1, 5, 20)] == [12, 2, 1]
    with Pool(3) as pool:
        pool.start("a", [*PYTHON, "import os; print(os.environ['OMP_NUM_THREADS'])"], tmp_path / "a")
        assert all_ended(pool)[0].said == "4"


def test_stopped_processes_may_save(tmp_path: Path) -> None:
    saves = (
        "import signal, sys, time\n"
        "def save(*_): print('saved'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(60)"
    )
    with Pool(1) as pool:
        pool.start("a", [*PYTHON, saves], tmp_path / "a")
        until(lambda: "ready\n" in (tmp_path / "a").read_text())
        pool.stop()
        ended = all_ended(pool)[0]
    assert (ended.code, ended.said) == (143, "saved")


def test_no_process_outlives_the_pool(tmp_path: Path) -> None:
    stubborn = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(os.getpid(), child.pid, flush=True); time.sleep(60)"
    )
    with Pool(1) as pool:
        pool.start("a", [*PYTHON, stubborn], tmp_path / "a")
        until(lambda: (tmp_path / "a").read_text().endswith("\n"))
        pids = [int(word) for word in (tmp_path / "a").read_text().split()]
        assert all(map(alive, pids))
        pool.stop()
    until(lambda: not any(map(alive, pids)))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_are_told_when_the_pool_is_killed(tmp_path: Path, number: int) -> None:
    program = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from studies.pool import Pool\n"
        "saves = '''import os, signal, sys, time\n"
        "def save(*_): print('saved', flush=True); os._exit(143)\n"
        "signal.signal(signal.SIGTERM, save); print(os.getpid(), flush=True); time.sleep(60)'''\n"
        f"pool = Pool(1); pool.start('a', [sys.executable, '-c', saves], Path({str(tmp_path / 'a')!r})); time.sleep(60)"
    )
    parent = subprocess.Popen([*PYTHON, program])
    until(lambda: (tmp_path / "a").exists() and (tmp_path / "a").read_text().endswith("\n"))
    pid = int((tmp_path / "a").read_text())
    assert alive(pid)
    parent.send_signal(number)
    parent.wait()
    until(lambda: not alive(pid))
    assert (tmp_path / "a").read_text().split() == [str(pid), "saved"]


def test_a_program_whose_starter_is_gone_is_not_begun(tmp_path: Path) -> None:
    leash = ROOT / "studies/leash.py"
    ended = subprocess.run([sys.executable, leash, "1", sys.executable, "-c", "print('begun')"], capture_output=True)
    assert (ended.returncode, ended.stdout) == (143, b"")


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with Pool(1) as pool, pytest.raises(UserError, match="a cannot be started"):
        pool.start("a", [*PYTHON, ""], tmp_path / "logs/a")


def test_a_second_signal_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.heard == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
