"""manifest.json over restarts, and the state of git."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from config import load_config
from record import manifest as manifest_module
from record.manifest import git_state, manifest
from record.runlog import RunLog


def small_manifest(**changes: Any) -> dict[str, Any]:
    arguments = {
        "device": "cpu",
        "world_size": 1,
        "seed": 7,
        "patches": [{"name": "drop_path", "timm": "1.0.29"}],
        "quantizers": {"blocks.0.attn.qkv": {f"q{i}": "e2m1" for i in range(1, 6)} | {"q6": None}},
        "extra": {"parameters": 123},
    }
    return manifest(load_config(overrides=["run.seed=7"]), **{**arguments, **changes})


def test_manifest_says_what_was_run(tmp_path: Path) -> None:
    made = small_manifest()
    with RunLog(tmp_path) as log:
        log.write_manifest(made)
        log.write_manifest(made)  # writing again updates this start, and adds none
    read = json.loads((tmp_path / "manifest.json").read_text())
    sessions = read.pop("sessions")
    assert read == json.loads(json.dumps(made))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", read["start_time"])
    assert read["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(read["versions"]) == {
        "python", "torch", "torchvision", "timm", "triton", "numpy", "tensorboardX", "cuda"
    }  # fmt: skip
    assert read["parameters"] == 123 and read["seed"] == 7 and read["world_size"] == 1
    assert read["quantizers"]["blocks.0.attn.qkv"] == {**{f"q{i}": "e2m1" for i in range(1, 6)}, "q6": None}
    assert read["timm_patches"] == [{"name": "drop_path", "timm": "1.0.29"}]
    assert read["command_line"] and read["device"]["type"] == "cpu" and read["device"]["name"]
    assert len(sessions) == 1 and sessions[0]["command_line"] == read["command_line"]
    assert {"start_time", "command_line", "git", "versions", "world_size"} <= set(sessions[0])


def test_manifest_keeps_every_start(tmp_path: Path) -> None:
    tables = [{"a": {"q1": "e2m1"}}, {"a": {"q1": "e2m1"}}, {"a": {"q1": "e3m0"}}]
    for i, table in enumerate(tables):
        with RunLog(tmp_path, resume=i > 0) as log:
            for _ in range(2):
                log.write_manifest({**small_manifest(quantizers=table, world_size=i + 1), "start_time": f"start {i}"})
    read = json.loads((tmp_path / "manifest.json").read_text())
    assert [s["start_time"] for s in read["sessions"]] == ["start 0", "start 1", "start 2"]
    assert [s["world_size"] for s in read["sessions"]] == [1, 2, 3]
    # The third start changed the quantizers: the second one's are with it, the third one's at the top.
    assert [s.get("quantizers") for s in read["sessions"]] == [None, tables[1], None]
    assert read["quantizers"] == tables[2]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_git_commit_and_dirty_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "__file__", str(tmp_path / "record" / "manifest.py"))
    nothing = {"commit": None, "dirty": None}
    assert git_state() == nothing  # not a repository
    git(tmp_path, "init", "-q")
    assert git_state() == nothing  # no commit yet
    (tmp_path / "a.py").write_text("a")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "a")
    (tmp_path / "untracked.txt").write_text("a")
    assert git_state() == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a.py").write_text("b")
    assert git_state() == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": True}
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(manifest_module, "__file__", str(tmp_path / "inside" / "record" / "manifest.py"))
    assert git_state() == nothing  # somebody else's repository
    monkeypatch.setattr(manifest_module, "__file__", str(tmp_path / "record" / "manifest.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() == nothing  # no git
    monkeypatch.setenv("SOURCE_COMMIT", "main")
    assert git_state() == nothing  # no hash
    monkeypatch.setenv("SOURCE_COMMIT", "0123456789ab")
    assert git_state() == {"commit": "0123456789ab", "dirty": None}
    monkeypatch.undo()
    monkeypatch.setenv("SOURCE_COMMIT", "0123456789ab")
    assert git_state()["commit"] == git(Path(manifest_module.__file__).parent, "rev-parse", "HEAD")  # git knows better
