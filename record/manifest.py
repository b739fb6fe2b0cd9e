"""manifest.json: with what a run was made."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from config import Config, UserError
from record.files import open_ordinary
from record.schema import Manifest, check

MANIFEST = "manifest.json"
LARGEST = 2**26  # bytes
LINES = "results/*.csv"
COMMIT = "SOURCE_COMMIT"  # of the environment
_PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy", "tensorboardX")
# What the manifest keeps of every start of a run that was stopped and continued.
_OF_A_START = ("start_time", "command_line", "git", "versions", "device", "world_size")


def git_state() -> dict[str, Any]:
    """{"commit": hash, "dirty": whether tracked files differ from it}; both None without git or outside a checkout,
    where the environment may name the commit: SOURCE_COMMIT, 7 to 40 hexadecimal digits.

    The lines of finished runs that studies add to results/ change nothing that a run is made with.
    """
    root = Path(__file__).resolve().parents[1]
    command = ["git", "--no-optional-locks", "-C", str(root)]
    given = os.environ.get(COMMIT, "")
    told = {"commit": given if re.fullmatch(r"[0-9a-f]{7,40}", given) else None, "dirty": None}
    ask = functools.partial(subprocess.run, capture_output=True, text=True, check=True, timeout=30)
    try:
        top, commit = ask([*command, "rev-parse", "--show-toplevel", "HEAD"]).stdout.splitlines()
        changes = ask(
            [*command, "status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude,top){LINES}"]
        ).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return told
    if Path(top).resolve() != root:  # unpacked inside another repository, whose commit says nothing about this one
        return told
    return {"commit": commit, "dirty": bool(changes)}


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def manifest(
    cfg: Config,
    *,
    device: torch.device | str,
    world_size: int,
    seed: int,
    patches: Sequence[Mapping[str, Any]],
    quantizers: Mapping[str, Mapping[str, str | None]],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What manifest.json says about a run.

    patches: the timm patches in force. quantizers: layer name -> {"q1": ..., ..., "q6": ...}, a description or None
    each. extra: further entries, such as the parameter count. Unknown versions and an unknown commit are None.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "start_time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command_line": shlex.join(sys.orig_argv),
        "git": git_state(),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
            "cuda": torch.version.cuda,
        },
        "device": {"type": device.type, "name": name},
        "world_size": world_size,
        "seed": seed,
        "model": cfg.model.name,
        "paper": cfg.paper.model_dump(mode="json") if cfg.paper else None,
        "timm_patches": [dict(patch) for patch in patches],
        "quantizers": {layer: dict(table) for layer, table in quantizers.items()},
        **(extra or {}),
    }


def read_manifest(output_dir: Path) -> dict[str, Any]:
    """manifest.json of a run, of the form schema.Manifest; empty where there is none. Raises UserError, and OSError."""
    path = output_dir / MANIFEST
    try:
        with open_ordinary(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST:
                raise UserError(f"{path} is larger than {LARGEST} bytes and was not read; move it away.")
            read = json.loads(file.read())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON.") from None
    if not isinstance(read, dict):
        raise UserError(f"{path} is not a JSON object; move it away to continue the run.")
    check(Manifest, read, f"{path} is no manifest of a run")
    return read


def add_session(earlier: Mapping[str, Any], entries: Mapping[str, Any], config: str | None) -> dict[str, Any]:
    """`entries`, and under "sessions" those of the `earlier` manifest and one for this start, whose file is `config`.

    A value that this start changes stays in the entry of the start before.
    """
    new = json.loads(json.dumps(entries))  # as it will read back, to compare with what is there
    old = dict(earlier)
    sessions = [dict(session) for session in old.pop("sessions", [])]
    if sessions:
        sessions[-1].update({k: v for k, v in old.items() if k not in new or new[k] != v})
    sessions.append({**{k: new[k] for k in _OF_A_START if k in new}, "config": config})
    return {**new, "sessions": sessions}
