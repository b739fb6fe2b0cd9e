"""What a run takes of an image folder or tar file: its classes in the order of a file, a share of it held out."""

from __future__ import annotations

import copy
import zlib
from pathlib import Path
from typing import TypeVar

import numpy as np
from torchvision.datasets import ImageFolder

from config import UserError
from images.tars import ImageTar

Source = TypeVar("Source", ImageFolder, ImageTar)

_MAX_BYTES = 2**24  # of a file of class names; ImageNet-21K's has 220,000


def read_class_map(path: str) -> tuple[str, ...]:
    """The names in a class map as timm has them: a text file with one class name a line, in the order of the labels.

    Raises UserError for what is no such file. timm's other format, a pickle, is not read.
    """
    wanted = "expected was a text file with one class name a line"
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"data.class_map {path} is no file: {wanted}.")
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"data.class_map {path} cannot be read ({error.strerror}): {wanted}.") from None
    except UnicodeDecodeError:
        raise UserError(f"data.class_map {path} is no text in UTF-8, and pickles are not read: {wanted}.") from None
    if len(content) > _MAX_BYTES or "\0" in text or Path(path).suffix.lower() in (".pkl", ".pickle"):
        raise UserError(f"data.class_map {path} is no list of classes, and pickles are not read: {wanted}.")
    names = tuple(line.strip() for line in text.rstrip().split("\n"))
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            raise UserError(f"data.class_map {path} has no class name in line {number}: {wanted}.")
        if first.setdefault(name, number) != number:
            raise UserError(f"data.class_map {path} names {name[:100]} twice, in lines {first[name]} and {number}.")
    return names


def with_classes(source: Source, names: tuple[str, ...], path: str, where: Path) -> Source:
    """The set with its images as they were and labels by the place of their class in `names`, read from `path`.

    Raises UserError where a class of the set under `where` is not among the names, or a name has no images there.
    """
    labels, before = {name: label for label, name in enumerate(names)}, source.class_to_idx
    if extra := sorted(before.keys() - labels.keys()):
        raise UserError(
            f"{where} has the class {_some(extra)}, which data.class_map {path} does not name: add it there."
        )
    if missing := [name for name in names if name not in before]:
        raise UserError(f"data.class_map {path} names the class {_some(missing)}, of which {where} has no images.")
    label_now = {before[name]: label for name, label in labels.items()}
    mapped = _with_samples(source, [(image, label_now[label]) for image, label in source.samples])
    mapped.class_to_idx = labels
    if isinstance(mapped, ImageFolder):
        mapped.classes = list(names)
    return mapped


def hold_out(source: Source, share: float) -> tuple[Source, Source]:
    """(the set without `share` of the images of each class, those images): at least one of a class, and never all.

    Which ones follows from the name of the class and the sorted list of its images alone, so that all runs hold out the
    same, whatever their seed and however the set is packed. Raises UserError for a class of a single image.
    """
    held_out: set[int] = set()
    of_class: dict[int, list[int]] = {}
    for index, (_, label) in enumerate(source.samples):
        of_class.setdefault(label, []).append(index)
    for name, label in source.class_to_idx.items():
        indices = of_class[label]
        if len(indices) < 2:
            raise UserError(
                f"data.val_split holds out images of every class, and {name} has a single one: add images, or leave "
                "--val-split out."
            )
        count = min(max(1, round(share * len(indices))), len(indices) - 1)
        # The stream of RandomState is the same in all versions of numpy.
        order = np.random.RandomState(zlib.crc32(name.encode(errors="surrogateescape"))).permutation(len(indices))
        held_out.update(indices[place] for place in order[:count])
    numbered = list(enumerate(source.samples))
    kept, held = ([s for index, s in numbered if (index in held_out) == out] for out in (False, True))
    return _with_samples(source, kept), _with_samples(source, held)


def _with_samples(source: Source, samples: list) -> Source:
    """The same set with other samples: (image, label) in a list."""
    changed = copy.copy(source)
    changed.samples = samples
    if isinstance(changed, ImageFolder):
        changed.imgs, changed.targets = samples, [label for _, label in samples]
    return changed


def _some(names: list[str]) -> str:
    return names[0][:100] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
