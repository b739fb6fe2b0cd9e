"""Checkpoints: written atomically, read without running code, and refused with one sentence where they do not fit.

    save_checkpoint(output_dir / LAST, {"model": model.state_dict(), "optimizer": ..., "epoch": 3})
    state = load_checkpoint(output_dir / LAST)   # --resume: the whole state

weights.py takes weights alone, from these files and those of other programs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from config import UserError

FORMAT = 1  # of the files written here; raised when an older reader would misunderstand them
LAST = "last.pt"
BEST = "best.pt"

EXPECTED = "expected a checkpoint of this repository, or plain weights (.pt, .pth or .safetensors)"
_PLAIN = (Tensor, nn.Parameter, bool, int, float, str, type(None))


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk and put it in the place of `path` in one step.

    Whatever happens, a reader finds the old file or the new one, complete. Raises UserError where the disk or the
    folder refuses; other errors of `write` pass through. Both leave the old file as it was and no temporary behind.
    """
    temporary = path.with_name(
        f"{path.name}.tmp"
    )  # a fixed name: what a killed process left is overwritten, not added to
    try:
        with temporary.open("wb") as file:
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
                "free some space or choose another --output_dir."
            ) from None
        raise
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder; the file itself is safe
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _check_plain(value: Any, where: str) -> None:
    """TypeError for anything torch.load would refuse with weights_only=True: better now than on the day of a resume."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in _PLAIN:
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings and None")


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (nested dicts, lists and tuples of tensors, numbers, strings and None) and FORMAT, atomically.

    Raises UserError on a full disk or an unwritable folder, with the old checkpoint as it was.
    """
    _check_plain(state, "state")
    atomic_write(Path(path), lambda file: torch.save({**state, "format": FORMAT}, file))


def find_last(output_dir: str | Path) -> Path | None:
    """The checkpoint `--resume auto` continues from, if there is one."""
    last = Path(output_dir) / LAST
    return last if last.is_file() else None


def _names_code(path: Path) -> bool:
    """Whether a file that was refused holds pickled references to code, by reading its opcodes; nothing is run."""
    if zipfile.is_zipfile(path):
        return True  # an intact archive is refused for nothing else
    with contextlib.suppress(Exception), path.open("rb") as file:
        while True:  # torch's older format is several pickles in a row; the end of the file raises
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STACK_GLOBAL":
                    return True
                if opcode.name in ("GLOBAL", "INST") and re.fullmatch(r"[\w.]+ [\w.]+", str(argument)):
                    return True
    return False


def read_file(path: Path, map_location: Any = "cpu") -> Any:
    """What a file holds, without running any code in it. Raises UserError."""
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; a checkpoint file was expected, such as {find_last(path) or path / LAST}."
        )
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint {path}; give the path of an existing file.") from None
    except OSError as error:
        raise UserError(f"The checkpoint {path} cannot be read: {error.strerror or error}.") from None
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device=str(map_location))
        # DeiT's training script stores its flags as a Namespace, which holds values and runs nothing.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # torch warns about files that are refused below anyway
            return torch.load(path, map_location=map_location, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise  # says nothing about the file
    except Exception as error:  # damaged files come out of the readers as nearly every kind of error, OSError included
        if isinstance(error, pickle.UnpicklingError) and _names_code(path):
            raise UserError(f"{path} would run code when loaded and was not loaded; {EXPECTED}.") from None
        raise UserError(f"{path} is truncated, damaged or not a checkpoint at all; {EXPECTED}.") from None


def load_checkpoint(
    path: str | Path, map_location: Any = "cpu", *, required: Sequence[str] = ("model", "optimizer")
) -> dict[str, Any]:
    """The state `save_checkpoint` wrote, which must have the keys `required`. Raises UserError, one sentence each."""
    state = read_file(Path(path), map_location)
    if not isinstance(state, dict) or type(state.get("format")) is not int or any(key not in state for key in required):
        raise UserError(
            f"{path} is no training checkpoint of this repository; if it holds weights only, use --finetune to start "
            "from it."
        )
    if state["format"] > FORMAT:
        raise UserError(
            f"{path} has the checkpoint format {state['format']}, and this version reads up to {FORMAT}; "
            "update the repository."
        )
    return state
