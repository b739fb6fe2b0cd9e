"""Checkpoints: written atomically, read without running code, and refused with one sentence where they do not fit.

    save_checkpoint(output_dir / LAST, {"model": model.state_dict(), "optimizer": ..., "epoch": 3})
    state = load_checkpoint(output_dir / LAST)   # --resume: the whole state

weights.py takes weights alone, from these files and those of other programs.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import re
import stat
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from config import UserError
from record.files import atomic_write
from record.schema import Checkpoint, check

FORMAT = 1  # of the files written here; raised when an older reader would misunderstand them
LAST = "last.pt"
BEST = "best.pt"

EXPECTED = "expected a checkpoint of this repository, or plain weights (.pt, .pth or .safetensors)"
_PLAIN = (Tensor, nn.Parameter, bool, int, float, str, type(None))


class _Beside:
    """Stands in for a value beside the weights of a file, such as a NumPy number or a Path: made, and not looked at."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _no_entries(*_: Any) -> OrderedDict[Any, Any]:
    """What a defaultdict is before its entries are set."""
    return OrderedDict()


def _no_items(*_: Any) -> list[Any]:
    """What a deque is before its items are set."""
    return []


# What other programs keep beside weights: nothing of it is imported or run.
_NUMPY = ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
_NUMPY_TYPES = (
    "ndarray",
    "dtype",
    "bool_",
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
)
# Of what they are: the kinds that a defaultdict makes are types of Python.
_BUILTIN = ("frozenset", "range", "slice", "complex", "list", "dict", "tuple", "int", "float", "str", "bool")
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_VALUES = [
    *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in _NUMPY),
    *(f"numpy.{name}" for name in _NUMPY_TYPES),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTIN),
    *(f"numpy.random._pickle.__{kind}_ctor" for kind in ("randomstate", "generator", "bit_generator")),
    *("numpy.random._mt19937.MT19937", "numpy.random._pcg64.PCG64", "numpy.random.bit_generator.SeedSequence"),
    *("numpy.random.bit_generator.__pyx_unpickle_SeedSequence", "numpy.ma.core._mareconstruct"),
    *("numpy.ma.MaskedArray", "numpy.ma.core.MaskedArray"),
    *("decimal.Decimal", "fractions.Fraction", "uuid.UUID", "uuid.SafeUUID"),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *("argparse.Namespace", "types.SimpleNamespace", "torch.torch_version.TorchVersion"),
]
_BESIDE: list[Any] = [(_Beside, name) for name in _VALUES]
_BESIDE += [(OrderedDict, "yacs.config.CfgNode"), (_no_entries, "collections.defaultdict")]  # of Swin; of some trainers
_BESIDE += [(_no_items, "collections.deque")]


def check_plain(value: Any, where: str) -> None:
    """TypeError for anything torch.load would refuse with weights_only=True: better now than on the day of a resume."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            check_plain(key, f"a key of {where}")
            check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]")
    elif type(value) not in _PLAIN:
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings and None")


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (nested dicts, lists and tuples of tensors, numbers, strings and None) and FORMAT, atomically.

    Raises UserError on a full disk or an unwritable folder, with the old checkpoint as it was.
    """
    check_plain(state, "state")
    atomic_write(Path(path), lambda file: torch.save({**state, "format": FORMAT}, file))


def find_last(output_dir: str | Path) -> Path | None:
    """The checkpoint `--resume auto` continues from, if there is one."""
    last = Path(output_dir) / LAST
    return last if last.is_file() else None


def _check_sums(path: Path) -> bool:
    """Whether every byte of a zip archive, as torch writes it, is what was written; False for a file of another kind.

    torch reads the archive without looking at its checksums. Raises BadZipFile for damage, and for contents that are
    larger than the file. An archive whose checksums are all 0 was saved without them.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise zipfile.BadZipFile("its contents are larger than the file")
        if any(member.CRC for member in members) and (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(damaged)
        return True


def _names(path: Path) -> Iterator[str]:
    """What the pickles of a file name for import, in their order, by reading the opcodes; nothing is run."""
    with contextlib.ExitStack() as stack, contextlib.suppress(Exception):  # the end of the file raises
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            file = stack.enter_context(archive.open(pickled))
        else:
            file = stack.enter_context(path.open("rb"))
        words = ["", ""]
        while True:  # torch's older format is several pickles in a row
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STACK_GLOBAL":
                    yield ".".join(words[-2:])
                elif opcode.name in ("GLOBAL", "INST") and re.fullmatch(r"[\w.]+ [\w.]+", str(argument)):
                    yield argument.replace(" ", ".")
                elif isinstance(argument, str):
                    words.append(argument)


def _named_code(path: Path, error: Exception) -> str | None:
    """What an intact file that was refused names for import and must not; None if it was refused for something else."""
    if (found := re.search(r"GLOBAL ([\w.]+)(?=\s|$)", str(error))) is not None:
        return found[1]
    known = {name for _, name in _BESIDE}
    foreign = (n for n in _names(path) if n not in known and not n.startswith(("torch.", "collections.", "_codecs.")))
    return next(foreign, None)


def _damaged(path: Path) -> UserError:
    """For a file that cannot be read, with the other checkpoint of its folder where that one is intact."""
    other = path.with_name(BEST if path.name == LAST else LAST)
    with contextlib.suppress(OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError):
        if path.name in (LAST, BEST) and _check_sums(other):
            return UserError(f"{path} is truncated or damaged; {other} beside it is intact: --resume {other}.")
    return UserError(f"{path} is truncated, damaged or not a checkpoint at all; {EXPECTED}.")


def read_file(path: Path, map_location: Any = "cpu") -> Any:
    """What a file holds, without running any code in it. Raises UserError."""
    if os.path.isdir(path):  # False where nobody may look
        raise UserError(
            f"{path} is a folder; a checkpoint file was expected, such as {find_last(path) or path / LAST}."
        )
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is no ordinary file; {EXPECTED}.")
        path.open("rb").close()
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint {path}; give the path of an existing file.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise UserError(f"The checkpoint {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    intact = False
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device=str(map_location))
        intact = _check_sums(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_BESIDE):
            warnings.simplefilter("ignore")  # torch warns about files that are refused below anyway
            return torch.load(path, map_location=map_location, weights_only=True)
    except torch.OutOfMemoryError:
        raise  # says nothing about the file
    except MemoryError:
        raise UserError(f"{path} needs more memory than there is, or is damaged.") from None
    except Exception as error:  # damaged files come out of the readers as nearly every kind of error, OSError included
        name = _named_code(path, error) if isinstance(error, pickle.UnpicklingError) else None
        if name is None:
            raise _damaged(path) from None
        or_damaged = "" if intact else " or is damaged"
        raise UserError(
            f"{path} would run code when loaded and was not loaded{or_damaged}: it names {name[:80]}; save it again "
            "with tensors, numbers and text alone, as torch.save({'model': model.state_dict()}, FILE)."
        ) from None


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The state `save_checkpoint` wrote. Raises UserError, one sentence each.

    Whether it is that of a run is for `check_state`, before any of it is used.
    """
    path = Path(path)
    state = read_file(path, map_location)
    held = isinstance(state, dict) and type(state.get("format")) is int
    if not held or any(key not in state for key in ("model", "optimizer")):
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


def check_state(state: dict[str, Any], path: str | Path) -> None:
    """Raises UserError where the state from `path` has not the form of a run's, schema.Checkpoint."""
    check(Checkpoint, state, f"{path} is no checkpoint of a run")
