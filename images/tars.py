"""Image folders packed in tar files: the classes, samples and order of the folder that was packed."""

from __future__ import annotations

import errno
import io
import itertools
import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from images.decode import open_file, open_image

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


class Member(NamedTuple):
    """A file or folder inside a tar file."""

    path: str  # its place in the folder that was packed: "ant/1.png"
    tar: str  # where it is: the tar file on the disk,
    offset: int  # first byte,
    size: int  # bytes; -1 for a folder


class ImageTar(Dataset[tuple[Image.Image, int]]):
    """An image folder as one tar file or as a folder with one tar file a class, indexed like torchvision's ImageFolder.

    Classes are the folders of the first level, sorted, and what lies below one belongs to it. Around a single tar
    file's classes there may be further folders: "./", "train/", "imagenet/train/". A tar file inside a tar file counts
    as a folder. What macOS adds to its archives is left out. Nothing is unpacked, and nothing is written.

    Raises OSError or tarfile.TarError for what is no tar file, ValueError where splits stand in the place of classes,
    and FileNotFoundError where there is no class, or one without an image.
    """

    def __init__(self, root: Path, split: str) -> None:
        if root.is_file():
            members = list(_members(str(root)))
            top = _top({m.path for m in members if m.size < 0} | {posixpath.dirname(m.path) for m in members}, split)
        else:
            members, top = [m for tar in sorted(root.glob("*.tar")) for m in _members(str(tar), tar.stem)], ""
        classes, images = set(), {}
        within = f"{top}/" if top else ""
        for member in members:
            name, *below = member.path.removeprefix(within).split("/")
            if not member.path.startswith(within) or name == "." or (member.size >= 0 and not below):
                continue
            classes.add(name)
            if member.size >= 0 and member.path.lower().endswith(IMG_EXTENSIONS):
                images[(name, *posixpath.split(member.path))] = member  # of two with one path the later one counts
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {root}.")
        if empty := classes - {name for name, *_ in images}:
            raise FileNotFoundError(f"Found no valid file for the classes {', '.join(sorted(empty))}.")
        self.class_to_idx = {name: label for label, name in enumerate(sorted(classes))}
        self.samples = [(member, self.class_to_idx[key[0]]) for key, member in sorted(images.items())]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(io.BytesIO(self.content(index))), self.samples[index][1]

    def content(self, index: int) -> bytes:
        """The file of an image."""
        member, _ = self.samples[index]
        with open_file(member.tar) as file:
            file.seek(member.offset)
            return file.read(member.size)

    def filename(self, index: int) -> str:
        member, _ = self.samples[index]
        return f"{member.tar}/{member.path}"


def _members(tar: str, folder: str = "") -> Iterator[Member]:
    """The files and folders of a tar file, below `folder`; links to files are the files they lead to."""
    with open_file(tar) as file:
        if file.read(6).startswith(_COMPRESSED):
            raise tarfile.ReadError(f"{Path(tar).name} is compressed, and images are read in place: decompress it")
        file.seek(0)
        found = [Member(folder, tar, 0, -1)] if folder else []
        found += _scan(file, tar, folder, 0)
    files = {m.path: m for m in found if isinstance(m, Member)}
    for entry in found:
        if isinstance(entry, Member):
            yield entry
        elif (target := files.get(entry[1])) is not None:
            yield target._replace(path=entry[0])


def _scan(file: IO[bytes], tar: str, folder: str, base: int) -> Iterator[Member | tuple[str, str]]:
    """Members, and links as (path, path they lead to). base: where `file` begins on the disk."""
    with tarfile.open(fileobj=file, mode="r:") as opened:
        while (info := opened.next()) is not None:
            opened.members.clear()  # a million of them take a gigabyte
            path = posixpath.normpath(posixpath.join(folder, info.name.lstrip("/")))
            if "__MACOSX" in path.split("/") or posixpath.basename(path).startswith("._"):
                continue
            if info.isdir():
                yield Member(path, tar, 0, -1)
            elif info.issparse():
                raise tarfile.ReadError(f"{path} was packed without its zeros (--sparse), and images are read in place")
            elif info.isfile() and path.lower().endswith(".tar"):
                inside = path[: -len(".tar")]
                yield Member(inside, tar, 0, -1)
                yield from _scan(opened.extractfile(info), tar, inside, base + info.offset_data)
            elif info.isfile():
                yield Member(path, tar, base + info.offset_data, info.size)
            elif info.issym():
                yield path, posixpath.normpath(posixpath.join(posixpath.dirname(path), info.linkname))
            elif info.islnk():
                yield path, posixpath.normpath(posixpath.join(folder, info.linkname.lstrip("/")))
        _check_end(file, f"{folder}.tar" if folder else Path(tar).name, opened.offset)


def _check_end(file: IO[bytes], name: str, end: int) -> None:
    """Raises ReadError where the tar file is cut off or damaged at byte `end`, or goes on behind it: tarfile takes what
    it cannot read for the end, and the images that follow would be missing without a word."""
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"{name} is cut off or damaged at byte {end}")
    while _to_data(file) and (chunk := file.read(2**20)):
        if chunk != bytes(len(chunk)):
            raise tarfile.ReadError(f"{name} ends at byte {end} and goes on: damaged, or several put in one")


def _to_data(file: IO[bytes]) -> bool:
    """Pass over a hole of a file on the disk; False where nothing follows it."""
    if isinstance(file, tarfile.ExFileObject):
        return True
    try:
        file.seek(os.lseek(file.fileno(), file.tell(), os.SEEK_DATA))
    except OSError as error:
        return error.errno != errno.ENXIO  # others: a file system that does not tell
    return True


def _top(folders: set[str], split: str) -> str:
    """The folder whose folders are the classes: inside the only one, or the split's where others lie beside it."""
    children: dict[str, set[str]] = {}
    for folder in folders:
        places = list(itertools.accumulate(folder.split("/"), posixpath.join)) if folder not in ("", ".") else []
        for parent, child in zip(["", *places], places, strict=False):
            children.setdefault(parent, set()).add(child)
    top = ""
    while inside := sorted(children.get(top, ())):
        own = [folder for folder in inside if split_of(folder) == split]
        if len(own) == 1 and all(map(split_of, inside)):
            top = own[0]
        elif len(inside) == 1 and inside[0] in children:
            top = inside[0]
        else:
            refuse_splits(folder for folder in inside if folder in children)
            break
    return top


def split_of(folder: str) -> str | None:
    """The split (train, val, test) that a folder has its name from; None for another name."""
    name = posixpath.basename(folder).lower()
    return next((split for split, names in _SPLITS.items() if name in names), None)


def refuse_splits(folders: Iterable[str]) -> None:
    """Raises ValueError where several of the `folders`, each of which holds folders itself, have names of splits: the
    classes lie one level further down, and all of a split would be taken for one class."""
    splits = sorted(posixpath.basename(folder) for folder in folders if split_of(folder))
    if len(splits) > 1:
        raise ValueError(f"it holds {' and '.join(splits)}, each with folders of its own, in the place of classes")
