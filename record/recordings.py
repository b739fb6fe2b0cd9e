"""Recordings of a probe: probes/epoch_0001.npz and on, one NumPy archive each."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from config import UserError
from record.files import atomic_write, open_ordinary
from record.schema import Arrays, check

PROBES = "probes"
LARGEST = 2**28  # bytes of all arrays; those of the largest model take a few MB


def write_recording(folder: Path, name: str, arrays: dict[str, np.ndarray]) -> None:
    """Keep `arrays` as NAME.npz in `folder`, which is made. Raises UserError where the disk is full."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror or error}); free some space or choose another --output_dir."
        ) from None
    atomic_write(folder / f"{name}.npz", lambda file: np.savez_compressed(file, **arrays))


def read_recording(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a recording, of numbers and text, that belong together as schema.Arrays says.

    Raises UserError for a file that cannot be read, would grow beyond LARGEST or is not a recording.
    """
    try:
        with open_ordinary(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if (size := sum(member.file_size for member in members)) > LARGEST:
                raise ValueError(f"it unpacks to {size} bytes, and a recording has {LARGEST} at most")
            arrays = {member.filename.removesuffix(".npy"): _read_array(archive, member) for member in members}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        raise UserError(f"The recording {path} cannot be read ({reason}); move it away.") from None
    check(Arrays, arrays, f"{path} is no recording of a probe")
    return arrays


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array, whose header has to agree with the size of its file before memory is taken for it."""
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{member.filename} has format {version}")
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"Object arrays cannot be loaded: {member.filename}")
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError(f"{member.filename} is not as large as its header says")
    with archive.open(member) as file:
        return npy.read_array(file, allow_pickle=False)


def set_aside_recordings(folder: Path, epoch: int) -> None:
    """Give recordings of epochs (from 1) beyond `epoch` names by which they are not read any more."""
    for path in folder.glob("epoch_*.npz") if folder.is_dir() else ():
        number: Any = path.stem.removeprefix("epoch_")
        if number.isdigit() and int(number) > epoch:
            os.replace(path, path.with_name(f"abandoned_{path.name}"))
