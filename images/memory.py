"""What of the machine a process may still use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_UNKNOWN = 2**30  # where no system says


def available_bytes(root: Path = Path("/")) -> int:
    """What the machine has left and what the process's control groups (versions 1 and 2) leave it, whichever is less.

    Caches of files count as free: they make room. root: of the file system that tells.
    """
    limits = [*_machine(root / "proc/meminfo"), *_groups(root)]
    return max(0, min(limits, default=_UNKNOWN))


def processes_here() -> int:
    """The processes of the run that share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _machine(meminfo: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            yield int(fields["MemAvailable"].split()[0]) * 1024


def _groups(root: Path) -> Iterator[int]:
    """What each of the groups that the process is in leaves, those above it among them."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            mount = root / "sys/fs/cgroup"
            names = "memory.max", "memory.current", "inactive_file"
            if number != "0":
                if "memory" not in controllers.split(","):
                    continue
                mount /= "memory"
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            # A container may be told a path that its own view of the groups does not have; its group is the root then.
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(mount):
                    yield from _group(folder, *names)


def _group(folder: Path, limit: str, usage: str, cached: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):  # no such folder; "max"
        most, used = (int((folder / name).read_text()) for name in (limit, usage))
        with contextlib.suppress(OSError, ValueError):
            fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used -= int(fields.get(cached, 0))
        yield most - used
