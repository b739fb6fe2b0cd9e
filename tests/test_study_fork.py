"""A program in a copy of a process: it is what it is in a process of its own, and ends with the one it is a copy of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_study_pool import alive, until

from studies import fork

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no copies are made")

# What a program sees of its process. Its first import takes long, or would if it were not done beforehand.
PROGRAM = """
import atexit, json, os, random, signal, sys, threading
import slow

def main():
    atexit.register(print, "at the end")
    said = {
        "argv": sys.argv[1:], "program": os.path.basename(sys.argv[0]), "original": sys.orig_argv[1:],
        "name": sys.modules["__main__"].__name__, "environment": dict(os.environ), "stdin": sys.stdin.read(),
        "open": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1],
        "handlers": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT)],
        "mask": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "leads": os.getsid(0) == os.getpid(),
    }
    print(json.dumps(said), flush=True)
    print("to stderr", file=sys.stderr)
    how = sys.argv[1]
    if how == "kill":
        os.kill(os.getpid(), 9)
    if how == "raise":
        raise ValueError("unforeseen")
    sys.exit({"none": None, "two": 2, "text": "a sentence"}[how])

if __name__ == "__main__":
    main()
"""
SLOW = "import os, pathlib\npathlib.Path(os.environ['IMPORTS']).open('a').write('.')\n"
# A study in small: handlers, an open file and text in its buffer are its own.
PARENT = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from studies.pool import Pool, Signals
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
lock = open(folder / "lock", "w")
print("of the parent", end="")
program = folder / "program.py"
with Signals(), Pool(1) as pool:
    if sys.argv[2] == "copy":
        pool.warm_up(program)
    for how in sys.argv[3:]:
        pool.start(how, [sys.executable, str(program), how], folder / f"{{how}}.log")
        while not (ended := pool.ended()):
            time.sleep(0.01)
        (folder / f"{{how}}.end").write_text(f"{{ended[0].code}} {{ended[0].said}}")
"""
ENDS = {"none": "0", "two": "2", "text": "1", "raise": "1", "kill": "-9"}


def ran(folder: Path, way: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """(what the parent wrote; logs and ends by how the program ended) of programs in copies or started anew."""
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    (folder / "slow.py").write_text(SLOW)
    environment = {**os.environ, "IMPORTS": str(folder / "imports"), "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", PARENT, str(folder), way, *ENDS]
    parent = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert parent.stderr == ""
    logs, ends = ({how: (folder / f"{how}.{what}").read_text() for how in ENDS} for what in ("log", "end"))
    return parent.stdout, logs, ends


def test_a_program_in_a_copy_is_what_it_is_in_a_process_of_its_own(tmp_path: Path) -> None:
    copies, anew = ran(tmp_path / "copies", "copy"), ran(tmp_path / "anew", "anew")
    assert copies[0] == anew[0] == "of the parent"
    assert len((tmp_path / "copies/imports").read_text()) == 1 and len((tmp_path / "anew/imports").read_text()) == 5
    for how, code in ENDS.items():
        one, other = (logs[how].splitlines() for logs in (copies[1], anew[1]))
        seen = [json.loads(next(line for line in log if line.startswith("{"))) for log in (one, other)]
        for said, place in zip(seen, ("copies", "anew"), strict=True):
            assert said.pop("original")[-2:] == [str(tmp_path / place / "program.py"), how]
            assert said["environment"].pop("IMPORTS") == str(tmp_path / place / "imports")
            said["environment"].pop("PYTHONPATH")
            assert (said["argv"], said["open"], said["stdin"], said["leads"]) == ([how], [0, 1, 2], "", True)
        assert seen[0] == seen[1]
        assert copies[2][how].split()[0] == anew[2][how].split()[0] == code
        for text in ("to stderr", "at the end", "a sentence", "ValueError: unforeseen"):
            assert (text in one) == (text in other), (how, text)
        assert ("at the end" in one) == (how != "kill")


def test_code_that_has_changed_is_imported_anew(tmp_path: Path) -> None:
    """A run says that it is of the code on disk, so it is of that."""
    (tmp_path / "program.py").write_text("import part\nif __name__ == '__main__': print(part.VALUE)")
    (tmp_path / "part.py").write_text("VALUE = 'old'\n")
    change = 'if how == "b": (folder / "part.py").write_text("VALUE = \'newer\'")\n        pool.start('
    program = PARENT.replace("pool.start(", change)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path), "copy", *"abc"], env=environment, check=True)
    assert [(tmp_path / f"{how}.end").read_text() for how in "abc"] == ["0 old", "0 newer", "0 newer"]


STUBBORN = """
import os, signal, sys, time
def save(*_): print("saved", flush=True); os._exit(143)
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, save)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [9, 15])
def test_a_copy_is_told_when_its_parent_is_killed(tmp_path: Path, number: int) -> None:
    (tmp_path / "program.py").write_text(STUBBORN)
    log = tmp_path / "a.log"
    program = PARENT.replace("Signals(), ", "")
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), "copy", "a"], stdout=subprocess.DEVNULL)
    until(lambda: log.exists() and log.read_text().endswith("\n"))
    pid = int(log.read_text())
    assert alive(pid)
    parent.send_signal(number)
    parent.wait()
    until(lambda: not alive(pid))
    assert log.read_text().split() == [str(pid), "saved"]


def test_a_pool_kills_copies_that_have_no_session_yet(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(STUBBORN)
    program = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from studies.pool import Pool\n"
        "os.setsid = lambda: time.sleep(60)\n"
        "program = Path(sys.argv[1])\n"
        "with Pool(1) as pool:\n"
        "    pool.warm_up(program); pool.start('a', [sys.executable, str(program)], program.with_suffix('.log'))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "program.py")]
    assert subprocess.run(command, timeout=20, check=False).returncode == 0


def test_copies_are_made_of_what_is_fit_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "task/1").mkdir(parents=True)
    (tmp_path / "fd").mkdir()
    (tmp_path / "fd/0").symlink_to("/dev/null")
    monkeypatch.setattr(fork, "_TASKS", tmp_path / "task")
    monkeypatch.setattr(fork, "_OPEN", tmp_path / "fd")
    assert fork.can_fork()
    (tmp_path / "task/2").mkdir()
    assert not fork.can_fork()  # a second thread
    (tmp_path / "task/2").rmdir()
    (tmp_path / "fd/3").symlink_to("/dev/nvidiactl")
    assert not fork.can_fork()  # CUDA has been begun
    monkeypatch.undo()
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait)
    thread.start()
    assert not fork.can_fork()
    waiting.set()
    thread.join()


@pytest.mark.slow
def test_main_can_be_imported_for_copies() -> None:
    """It begins neither threads nor CUDA: of a process with either, no copy can be made."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from studies.pool import Pool, share_cores; share_cores(1)\n"
        "import torch\n"
        "def begun(*_): raise SystemExit('CUDA is begun')\n"
        "for name in ('_cuda_init', '_cuda_getDeviceCount'):\n"
        "    if hasattr(torch._C, name): setattr(torch._C, name, begun)\n"
        f"from pathlib import Path; pool = Pool(1); pool.warm_up(Path({str(ROOT / 'main.py')!r}))\n"
        "from studies.fork import can_fork; print(can_fork(), 'timm' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert said.stdout.split() == ["True", "True"], said.stderr


@pytest.mark.gpu
def test_runs_on_a_gpu_begin_in_copies(tmp_path: Path) -> None:
    program = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from studies.pool import Pool, share_cores, can_fork; share_cores(2)\n"
        f"main, folder = Path({str(ROOT / 'main.py')!r}), Path(sys.argv[1])\n"
        "flags = ['--config', str(main.parent / 'configs/digits_tetrajet.yaml'), '--run.device=cuda', '--smoke']\n"
        "with Pool(2) as pool:\n"
        "    pool.warm_up(main); print(can_fork())\n"
        "    for name in 'ab': pool.start(name, [sys.executable, str(main), *flags], folder / name)\n"
        "    ended = []\n"
        "    while pool.running: ended += pool.ended(); time.sleep(0.05)\n"
        "    print(*[one.code for one in ended], can_fork())"
    )
    said = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert said.stdout.split() == ["True", "0", "0", "True"], said.stderr + (tmp_path / "a").read_text()
