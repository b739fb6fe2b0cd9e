"""Tiny ImageNet as train/CLASS/ and val/CLASS/, from one's own download; prepare_tiny_imagenet.sh calls it."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TRAIN_IMAGES, VAL_IMAGES = 500, 50  # of a class, as Stanford gives it away
CLASS = re.compile(r"n\d{8}")
_TRAIN = re.compile(r"(?:.*/)?train/(n\d{8})/images/([^/]+\.JPEG)")
_VAL = re.compile(r"(?:.*/)?val/images/([^/]+\.JPEG)")
_TEST = re.compile(r"(?:.*/)?test/images/([^/]+\.JPEG)")
_ANNOTATIONS = re.compile(r"(?:.*/)?val/val_annotations\.txt")


class Mistake(Exception):  # noqa: N818
    """Something that the user can mend: one sentence, exit code 2."""


@dataclass
class Download:
    """What was downloaded: how to read a file of it, and its images by where they belong, "train/CLASS/NAME"."""

    read: Callable[[str], bytes]
    images: dict[str, str]
    jpegs: list[str]  # all of its images, those without a label too

    def classes(self, split: str) -> dict[str, int]:
        """The number of images by class."""
        counts: dict[str, int] = {}
        for place in self.images:
            of, name, _ = place.split("/")
            if of == split:
                counts[name] = counts.get(name, 0) + 1
        return counts


@contextlib.contextmanager
def opened(source: Path) -> Iterator[Download]:
    """A zip or the folder that it was unpacked to. Raises Mistake."""
    if source.is_dir():
        names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
        yield _sorted_out(source, names, lambda name: (source / name).read_bytes())
        return
    try:
        with zipfile.ZipFile(source) as archive:
            yield _sorted_out(source, sorted(archive.namelist()), archive.read)
    except FileNotFoundError:
        raise Mistake(
            f"There is no {source}; give tiny-imagenet-200.zip or the folder that it was unpacked to."
        ) from None
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise Mistake(f"{source} is no whole zip file ({error}); download it again.") from None


def _sorted_out(source: Path, names: list[str], read: Callable[[str], bytes]) -> Download:
    annotations = [name for name in names if _ANNOTATIONS.fullmatch(name)]
    if not annotations:
        raise Mistake(f"{source} has no val/val_annotations.txt, so it is not, or not all of, tiny-imagenet-200.")
    rows = [line.split("\t") for line in read(annotations[0]).decode().splitlines() if line.strip()]
    class_of = {row[0]: row[1] for row in rows if len(row) > 1}
    images, there = {}, set()
    for name in names:
        if found := _TRAIN.fullmatch(name):
            images[f"train/{found[1]}/{found[2]}"] = name
        elif found := _VAL.fullmatch(name):
            there.add(found[1])
            if found[1] in class_of:
                images[f"val/{class_of[found[1]]}/{found[1]}"] = name
    if missing := sorted(class_of.keys() - there):
        raise Mistake(
            f"{source} lacks {len(missing)} of {len(class_of)} evaluation images, val/images/{missing[0]} first."
        )
    return Download(read, images, [name for name in names if any(of.fullmatch(name) for of in (_TRAIN, _VAL, _TEST))])


def read_classes(file: Path) -> list[str]:
    """The class folders that a text names, one a line: the first word that looks like one. Raises Mistake."""
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise Mistake(f"The classes in {file} cannot be read: {error}.") from None
    names = []
    for number, line in enumerate(lines, 1):
        word = next((word for word in line.split() if CLASS.fullmatch(word)), None)
        if word is None:
            raise Mistake(f"{file}, line {number}, names no class such as n01443537: {line[:60]!r}.")
        names.append(word)
    if not names or len({*names}) < len(names):
        raise Mistake(f"{file} names {'a class twice' if names else 'no class'}.")
    return names


def check(source: Path, download: Download, classes: list[str] | None, expected: dict[str, int]) -> list[str]:
    """The classes to take, each of them complete. Raises Mistake."""
    counts = {split: download.classes(split) for split in ("train", "val")}
    chosen = sorted(classes or {**counts["train"], **counts["val"]})
    for split, count in expected.items():
        for name in chosen:
            found = counts[split].get(name, 0)
            if found != count:
                raise Mistake(
                    f"{source} has {found} {split} images of class {name} and {count} were expected: it is incomplete."
                )
    return chosen


def first_of_each_class(download: Download, classes: list[str], first: int) -> set[str]:
    """Where the `first` training images of each class by number belong. Raises Mistake.

    A file whose bytes the download has more than once, under two labels or in two splits, is passed over.
    """
    if not any(map(_TEST.fullmatch, download.jpegs)):
        raise Mistake("The download has no test/images; --first looks for images that are there twice in them too.")
    digests = {name: hashlib.sha256(download.read(name)).digest() for name in download.jpegs}
    times = Counter(digests.values())
    by_class: dict[str, dict[int, str]] = {name: {} for name in classes}
    for place in download.images:
        split, of, name = place.split("/")
        if split == "train" and of in by_class:
            if not (number := re.fullmatch(r"n\d{8}_(\d+)\.JPEG", name)):
                raise Mistake(f"{place} is not named after its class with a number, by which --first chooses.")
            by_class[of][int(number[1])] = place
    kept: set[str] = set()
    twice = 0
    for of, places in by_class.items():
        once = [number for number in sorted(places) if times[digests[download.images[places[number]]]] == 1]
        if len(once) < first:
            raise Mistake(f"Class {of} has {len(once)} training images that are there once; --first is {first}.")
        kept |= {places[number] for number in once[:first]}
        twice += sum(number < once[first - 1] for number in places) - (first - 1)
    print(f"Training images passed over, since the download has their bytes more than once: {twice}.")
    return kept


def prepare(
    source: Path, target: Path, classes: list[str] | None, expected: dict[str, int], first: int | None = None
) -> int:
    """Write what `target` lacks; returns the number of images written. Raises Mistake."""
    with opened(source) as download:
        chosen = check(source, download, classes, expected)
        wanted = {place: name for place, name in download.images.items() if place.split("/")[1] in chosen}
        if first is not None:
            kept = first_of_each_class(download, chosen, first)
            wanted = {place: name for place, name in wanted.items() if place in kept or place.startswith("val/")}
        there = {
            path.relative_to(target).as_posix()
            for split in expected
            for path in (target / split).rglob("*")
            if path.is_file() and not path.name.endswith(".part")
        }
        if others := sorted(there - wanted.keys()):
            raise Mistake(
                f"{target} holds {len(others)} files that do not belong there, {others[0]} first; name another."
            )
        missing = [place for place in wanted if place not in there]
        for number, place in enumerate(missing, 1):
            data = download.read(wanted[place])
            if not data.startswith(b"\xff\xd8"):
                raise Mistake(f"{wanted[place]} in {source} is no JPEG image; download it again.")
            path = target / place
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.part")
            part.write_bytes(data)
            os.replace(part, path)
            if number % 10_000 == 0:
                print(f"{number} of {len(missing)} images", file=sys.stderr)
    for part in [path for split in expected for path in (target / split).rglob("*.part")]:
        part.unlink()  # of a call that was killed
    return len(missing)


def main() -> None:
    parser = argparse.ArgumentParser(prog="prepare_tiny_imagenet.sh", description="Tiny ImageNet as a tree of folders.")
    parser.add_argument("source", type=Path, help="tiny-imagenet-200.zip, or the folder that it was unpacked to")
    parser.add_argument("target", type=Path, help="folder for train/ and val/")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="text or TSV, a class a line (default: all)")
    parser.add_argument(
        "--first",
        type=int,
        metavar="N",
        help="take N training images of a class, those of the lowest numbers, none that is there twice (default: all)",
    )
    parser.add_argument(
        "--train-images", type=int, default=TRAIN_IMAGES, help="that the download has of a class (default: %(default)s)"
    )
    parser.add_argument("--val-images", type=int, default=VAL_IMAGES, help="likewise (default: %(default)s)")
    options = parser.parse_args()
    expected = {"train": options.train_images, "val": options.val_images}
    try:
        if options.first is not None and options.first < 1:
            raise Mistake(f"--first is a number of images of a class, at least 1, and not {options.first}.")
        classes = read_classes(options.classes) if options.classes else None
        written = prepare(options.source, options.target, classes, expected, options.first)
    except (Mistake, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{options.target}: {f'{written} images written' if written else 'complete'}; give it as --data-path.")


if __name__ == "__main__":
    main()
