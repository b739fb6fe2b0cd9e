"""Studies for the tests: a file of one, and a program that stands in for main.py and needs no torch."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import study
from config.files import Dumper
from record.runlog import RunLog
from studies import conduct

ROOT = Path(__file__).resolve().parent.parent

# Writes what a run leaves, epoch by epoch, each of EPOCH_S seconds; goes on where it was, saves on SIGTERM, and fails
# with the seed FAILING. Its top-1 is 50 + seed, so that each run has a figure of its own. Every epoch it trains is a
# line in the file `trained` of its folder.
STAND_IN = f"""
import json, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from config import dump_config, load_config
from config.flags import parse_flags

def main():
    options, overrides = parse_flags(sys.argv[1:])
    cfg = load_config(options.config, overrides)
    folder = Path(cfg.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resolved.yaml").write_text(dump_config(cfg))
    (folder / "process").write_text(str(os.getpid()))
    (folder / "environment").write_text(json.dumps(dict(os.environ)))
    git = {{"commit": "0123456789abcdef", "dirty": False}}
    (folder / "manifest.json").write_text(json.dumps({{
        "git": git, "versions": {{"torch": "2.11.0"}}, "device": {{"type": "cpu", "name": "x86_64"}}, "classes": 10,
        "steps_per_epoch": 22, "autocast": "None", "start_time": "2026-01-01T00:00:00+00:00",
    }}))

    def line(step, data):
        with (folder / "metrics.log").open("a") as file:
            file.write("DLLL " + json.dumps({{
                "timestamp": "1.0", "datetime": "x", "elapsedtime": "1.0", "type": "LOG", "step": step, "data": data
            }}) + "\\n")

    def save(number, frame):
        print("Stopped", flush=True)
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, save)
    if str(cfg.run.seed) == os.environ.get("FAILING"):
        print("error: made to fail.")
        raise SystemExit(1)
    done = len((folder / "metrics.log").read_text().splitlines()) if (folder / "metrics.log").exists() else 0
    scores = {{"top1": 50.0 + cfg.run.seed, "top5": 90.0, "loss": 1.5}}
    for epoch in range(done, cfg.schedule.epochs):
        time.sleep(float(os.environ.get("EPOCH_S", "0")))
        with (folder / "trained").open("a") as file:
            file.write(f"{{epoch}}\\n")
        seconds = {{"train.seconds": 2.0, "eval.seconds": 0.5, "eval.r_w": 0.25}}
        line([epoch], {{**{{f"eval.{{name}}": value for name, value in scores.items()}}, **seconds}})
    if "LINELESS" not in os.environ:
        line([], {{**{{f"final.{{name}}": value for name, value in scores.items()}}, "final.best_top1": 77.0,
                   "final.epochs": cfg.schedule.epochs}})

if __name__ == "__main__":
    main()
"""

# A program that is `study.py`, with the stand-in in the place of main.py.
STUDY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import studies.conduct
studies.conduct.MAIN = Path(sys.argv[1])
import study
study.main(sys.argv[2:])
"""

TWO = {
    "title": "two methods",
    "seeds": [0, 1],
    "set": {"schedule": {"epochs": 3}, "run": {"device": "cpu"}},
    "rows": {
        "full_precision": {"base": str(ROOT / "configs/digits_fp.yaml")},
        "tetrajet": {"base": str(ROOT / "configs/digits_tetrajet.yaml")},
    },
}


def write_study(folder: Path, name: str = "small", **changes: Any) -> Path:
    """A study's file: TWO with other values for its keys; those that are None are left out."""
    given = {key: value for key, value in {**TWO, **changes}.items() if value is not None}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.dump(given, Dumper=Dumper, sort_keys=False))
    return path


class Studies:
    """study.py in a folder of its own, as a process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output, self.results = folder, folder / "runs", folder / "results"
        self.program, self.stand_in = folder / "study_program.py", folder / "stand_in.py"
        self.program.write_text(STUDY)
        self.stand_in.write_text(STAND_IN)

    def words(self, command: str, file: Path, *words: str) -> list[str]:
        places = [] if command == "list" else ["--output", str(self.output), "--results", str(self.results)]
        own = [*words[: words.index("--")]] if "--" in words else [*words]
        flags = [*words[words.index("--") :]] if "--" in words else []
        return [sys.executable, str(self.program), str(self.stand_in), command, str(file), *own, *places, *flags]

    def start(self, file: Path, *words: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.words("run", file, *words),
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, command: str, file: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
        """The same in this process, which has torch already."""
        out, error = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(error),
        ):
            patch.setattr(conduct, "MAIN", self.stand_in)
            patch.setattr("studies.pool.can_fork", lambda: False)
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                study.main(self.words(command, file, *words)[3:])
                code = 0
            except SystemExit as end:
                code = end.code
        return subprocess.CompletedProcess([], code, out.getvalue(), error.getvalue())

    def trained(self, run: str) -> list[int]:
        """The epochs that the stand-in has trained of a run, in their order."""
        file = self.output / run / "trained"
        return [int(line) for line in file.read_text().split()] if file.exists() else []


def leave_epochs(folder: Path, count: int) -> None:
    """So many epochs of a run in its folder."""
    with RunLog(folder) as log:
        for epoch in range(count):
            log.log((epoch,), {"top1": 1.0}, tag="eval")
