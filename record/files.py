"""Files of a run's folder: written in one step, by one process at a time, and nowhere but in the folder.

A run's folder may come from elsewhere and hold links, and two processes may be sent to it: what is written here goes
to temporary files of the process's own, follows no link, and is refused while another process holds the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import platform
import secrets
import stat
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from config import UserError

LOCK = ".lock"
_STALE_S = 24 * 3600  # age of a temporary file of another machine that nobody writes any more
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def open_ordinary(path: Path) -> BinaryIO:
    """An ordinary file, to be read. Raises OSError for a folder, a device or a pipe, which would be waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "It is no ordinary file", str(path))
    return open(descriptor, "rb")


def open_new(path: str | Path, flags: int = os.O_WRONLY) -> int:
    """A descriptor of `path`, which is made; FileExistsError where there is anything of the name, a link too."""
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def atomic_write(
    path: Path, write: Callable[[BinaryIO], object], elsewhere: str = "choose another --output_dir"
) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk and put it in the place of `path` in one step.

    Whatever happens, a reader finds the old file or the new one, complete. Raises UserError where the disk or the
    folder refuses, with advice on how to write `elsewhere`; other errors of `write` pass through. Both leave the old
    file as it was and no temporary behind; what a killed process left is removed.
    """
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        remove_stale(path.parent)
        with open(open_new(temporary, os.O_RDWR), "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # torch.save reports a failed write as a RuntimeError about positions, raised while handling the OSError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise UserError(
                f"{path} cannot be written ({cause.strerror or cause}), and what was there before is unchanged; "
                f"free some space or {elsewhere}."
            ) from None
        raise
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder; the file itself is safe
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_stale(folder: Path) -> None:
    """Remove the temporary files in a folder whose process is gone, and those of fixed names of earlier versions."""
    for entry in os.scandir(folder):
        host, *numbers = entry.name.rsplit(".", 3)  # .NAME.HOST.PID.TOKEN.tmp
        with contextlib.suppress(OSError):
            if entry.name in ("last.pt.tmp", "best.pt.tmp", "manifest.json.tmp"):
                stale = entry.is_file(follow_symlinks=False)
            elif host.startswith(".") and len(numbers) == 3 and numbers[0].isdigit() and numbers[2] == "tmp":
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                stale = not _alive(int(numbers[0])) if host.endswith(f".{platform.node()}") else age > _STALE_S
            else:
                stale = False
            if stale:
                os.unlink(entry.path)


def _alive(pid: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def refuse_links(folder: Path, files: tuple[str, ...], folders: tuple[str, ...]) -> None:
    """Raises UserError where one of a run's files (patterns) or folders is a link, or lies in them, or is no file.

    A run would write through it to a place outside of its folder, or wait for ever.
    """
    entries = [Path(e.path) for e in os.scandir(folder) if any(fnmatch(e.name, p) for p in (*files, *folders))]
    for name in folders:
        if not (folder / name).is_symlink():
            for root, inner, plain in os.walk(folder / name):
                entries += [Path(root) / entry for entry in (*inner, *plain)]
    for path in entries:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            kind = f"is a link to {os.readlink(path)}"
        elif stat.S_ISREG(status.st_mode) and status.st_nlink > 1 and path.suffix == ".log":
            kind = "is a hard link, by which another file would be written"
        elif not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            kind = "is no ordinary file"
        else:
            continue
        raise UserError(
            f"{path} {kind}, and a run writes into its own folder alone; remove it or put a copy in its place, or "
            "choose another --output_dir."
        )


def lock(file: io.RawIOBase) -> None:
    """Wait until no other process has a file locked, and lock it until it is closed. Where the file system has no locks
    there is nothing to wait for. Raises OSError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


class FolderLock:
    """Held by the one process that writes into a folder, from its making to `release`, or to the end of the process.

    of: what the folder is the folder of. flag: what chooses another one.

    Raises UserError where another process holds it, OSError where the folder cannot be written. Where the file system
    has no locks it says so on stderr and goes on.
    """

    def __init__(self, folder: Path, of: str = "run", flag: str = "--output_dir") -> None:
        self.path, self.of, self.flag = folder / LOCK, of, flag
        self._file: io.FileIO | None = None
        while self._file is None:
            file = io.FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    print(
                        f"The file system of {folder} has no locks ({error.strerror}): see to it that no other run "
                        "writes there.",
                        file=sys.stderr,
                    )
                    self._file = file
                    return
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                self._refuse_or_take_over(file, folder)
                continue
            with contextlib.suppress(OSError):  # ours only if the name still is that of the file which was locked
                if os.fstat(file.fileno()).st_ino == os.lstat(self.path).st_ino:
                    self._file = file
        if os.fstat(self._file.fileno()).st_nlink > 1:
            self._file.close()
            raise UserError(f"{self.path} is a hard link, by which another file would be written; remove it.")
        self._file.truncate()
        self._file.write(f"{os.getpid()} {platform.node()}\n".encode())

    def _refuse_or_take_over(self, file: io.FileIO, folder: Path) -> None:
        """Raises UserError naming the holder. A dead one left children, such as loader workers, that keep its lock
        until they notice: then the name is given to a new file."""
        words = file.read(300).decode(errors="replace").split()
        pid, host = (int(words[0]), words[1]) if len(words) == 2 and words[0].isdigit() else (None, "")
        if pid is not None and host == platform.node() and not _alive(pid):
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == os.lstat(self.path).st_ino:
                    self.path.unlink()
            return
        holder = f"process {pid} on {host}" if pid is not None else "another process"
        raise UserError(
            f"{folder} is the folder of a {self.of} in progress, written by {holder}; wait until it has ended, or "
            f"choose another {self.flag}."
        ) from None

    def release(self) -> None:
        """Let others have the folder; a second call does nothing."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                if os.fstat(self._file.fileno()).st_ino == os.lstat(self.path).st_ino:
                    self.path.unlink()
            self._file.close()
            self._file = None
