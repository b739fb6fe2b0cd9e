"""Packed checkpoints: a safetensors file of codes, scales and the other tensors of a model, and what it says of itself.

    write_packed(path, PackedFile(info, tensors))
    file = read_packed(path)            # UserError, one sentence, for what is no such file
    is_packed(path)                     # whether it says that it is one

All it says is one JSON object, `Info` below, under the key `mxfp4` of the file's metadata: written with sorted keys, so
that the same model gives the same bytes. Which layers are packed, and by what quantizers, follows from the model and
the section `quant` in it. safetensors holds names, shapes and numbers: reading one runs no code, and takes no more
memory than the file is long. Whether the tensors are those of the model it names is for models/packed.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from config import UserError
from config.explain import shorten
from config.keys import Deviation, Mean
from record.files import atomic_write, open_ordinary
from record.schema import check

FORMAT = 2  # raised when an older reader would misunderstand a file
KEY = "mxfp4"
SUFFIX = ".safetensors"
LARGEST_HEADER = 2**24  # bytes; 10000 tensors and 100000 class names fit
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXPECTED = "expected a file of main.py --export"


class _Part(BaseModel):
    """Keys with their types; no others, so that nothing is lost when a file is written again."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class Model(_Part):
    """What timm makes the model of."""

    name: str
    img_size: Annotated[int, Field(ge=1)]
    patch_size: Annotated[int, Field(ge=1)] | None = None
    num_classes: Annotated[int, Field(ge=1, le=10**6)]
    kwargs: dict[str, bool | int | float | str | list[int]] = {}


class Images(_Part):
    """How an image becomes an input: shorter side to img_size / crop_ratio, centre crop, normalised."""

    mean: Annotated[list[Mean], Field(min_length=3, max_length=3)]
    std: Annotated[list[Deviation], Field(min_length=3, max_length=3)]
    crop_ratio: Annotated[float, Field(ge=0.1, le=1)]
    interpolation: Literal["bicubic"] = "bicubic"


class Trained(_Part):
    """Where the weights come from; null where nobody knows."""

    commit: str | None = None
    top1: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None  # in %, of these weights
    data_set: str | None = None  # that top1 was measured on
    val_split: float | None = None  # the share of its training images that was held out for it


class Info(_Part):
    """What a packed checkpoint says of itself.

    quant: the section of the configuration that its quantizers come from. dtype: of the tensors that are no codes and
    scales. classes: by label.
    """

    format: Annotated[int, Field(ge=1)] = FORMAT
    model: Model
    quant: dict[str, Any]
    dtype: Literal["float32", "bfloat16"] = "float32"
    classes: list[str] = []
    images: Images
    trained: Trained = Trained()


class PackedFile(NamedTuple):
    """A packed checkpoint as it is on disk."""

    info: Info
    tensors: dict[str, Tensor]


def refuse_suffix(path: Path) -> None:
    """Raises UserError for a name that readers would not take for safetensors."""
    if path.suffix != SUFFIX:
        raise UserError(f"{path} is to be a safetensors file; give it a name that ends in {SUFFIX}.")


def write_packed(path: Path, file: PackedFile) -> None:
    """Write the file, atomically. Raises UserError."""
    text = json.dumps(file.info.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    write_tensors(path, file.tensors, {KEY: text})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, atomically. A tensor that has several names is written under each. Raises UserError."""
    refuse_suffix(path)
    if (folder := os.path.isdir(path)) or not os.path.isdir(path.parent):
        raise UserError(f"{path} cannot be written: {'it' if folder else 'its folder'} is no place for a file.")
    seen: set[int] = set()
    apart = {}
    for name, value in tensors.items():
        apart[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    content = safetensors.torch.save(apart, metadata)
    atomic_write(path, lambda file: file.write(content), "give another name")


def is_packed(path: str | Path) -> bool:
    """Whether a file says that it is a packed checkpoint. Files that cannot be read are for others to refuse."""
    path = Path(path)
    if path.suffix != SUFFIX or not os.path.isfile(path):
        return False
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except Exception:  # the reader has an error for each kind of damage, some of them without a class of their own
        return False


def read_info(path: str | Path) -> Info:
    """What a packed checkpoint says of itself. Raises UserError."""
    path = Path(path)
    try:
        with open_ordinary(path) as file:
            length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UserError(f"There is no packed checkpoint {path}; give the path of an existing file.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The packed checkpoint {path} cannot be read: {reason}.") from None
    if LARGEST_HEADER < length <= size:
        raise UserError(f"{path} has a header of {length} bytes, and {LARGEST_HEADER} are the most that is read.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except Exception:  # as above
        raise UserError(f"{path} is truncated, damaged or not a packed checkpoint at all; {EXPECTED}.") from None
    if text is None:
        raise UserError(f"{path} is not a packed checkpoint; {EXPECTED}.")
    what = f"{path} cannot be used, what it says of itself is wrong"
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{what}: it is not valid JSON.") from None
    if isinstance(said, dict) and type(number := said.get("format", FORMAT)) is int and number != FORMAT:
        advice = "update" if number > FORMAT else "export it again"
        raise UserError(
            f"{path} has the packed format {shorten(str(number))}, and this version reads {FORMAT}; {advice}."
        )
    try:
        info = Info.model_validate(said)
    except ValidationError:
        check(Info, said, what)
        raise  # not reached
    _contradiction(info, what)
    return info


def _contradiction(info: Info, what: str) -> None:
    """Raises UserError where what a file says cannot be true of any."""
    if info.classes and len(info.classes) != info.model.num_classes:
        raise UserError(f"{what}: it names {len(info.classes)} classes for a model of {info.model.num_classes}.")


def read_packed(path: str | Path) -> PackedFile:
    """A packed checkpoint, its tensors on the CPU. Raises UserError."""
    info = read_info(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except Exception:  # as above
        raise UserError(f"{path} is truncated, damaged or not a packed checkpoint at all; {EXPECTED}.") from None
    for name, value in tensors.items():
        if value.is_floating_point():
            if value.dtype != DTYPES[info.dtype]:
                dtype = str(value.dtype).removeprefix("torch.")
                raise UserError(f"{path} cannot be used: {name[:80]} is {dtype}, and it says {info.dtype}.")
            if not torch.isfinite(value).all():
                raise UserError(f"{path} cannot be used: {name[:80]} holds values that are not finite.")
    return PackedFile(info, tensors)


def config_of(info: Info) -> dict[str, Any]:
    """The sections of a configuration that the file stands for, as a training checkpoint's configuration has them."""
    data = {"mean": info.images.mean, "std": info.images.std, "eval_crop_ratio": info.images.crop_ratio}
    if info.trained.data_set is not None:
        data |= {"set": info.trained.data_set, "val_split": info.trained.val_split}
    return {
        "model": info.model.model_dump(mode="json"),
        "quant": info.quant,
        "stabilizer": {"kind": "none"},
        "data": data,
    }
