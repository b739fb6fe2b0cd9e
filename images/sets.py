"""The images of a run as they lie on disk: folders and tar files, CIFAR, digits, generated images, timm's sets.

A set is a sequence of (PIL image, label), timm's ImageDataset, or one of timm's streams; samples.py reads them.
classes.py says what classes it has.
"""

from __future__ import annotations

import difflib
import importlib.machinery
import importlib.util
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from config import Config, UserError
from images.chosen import hold_out, read_class_map, with_classes
from images.decode import open_image
from images.tars import ImageTar, refuse_splits, split_of

_SETS = ("imagenet", "cifar10", "cifar100", "digits", "generated", "torch/", "hfds/", "hfids/", "wds/", "tfds/")
_NEEDS = {  # optional packages: import name and what to pip install
    "digits": {"sklearn": "scikit-learn"},
    "hfds": {"datasets": "datasets"},
    "hfids": {"datasets": "datasets"},
    "wds": {"webdataset": "webdataset"},
    "tfds": {"tensorflow": "tensorflow", "tensorflow_datasets": "tensorflow-datasets"},
}


def open_sets(cfg: Config, batch_size: int, eval_batch_size: int) -> tuple[Any, Any]:
    """The training and the evaluation set; no training set for a run that only evaluates.

    Raises UserError where one cannot be opened.
    """
    name, size = cfg.data.set, cfg.model.img_size
    prefix, slash, _ = name.partition("/")
    if (prefix + slash) not in _SETS:
        near = difflib.get_close_matches(prefix + slash, _SETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(_SETS)} (a slash: timm's naming)."
        raise UserError(f"There is no data.set {name}: {hint}")
    if name == "imagenet":
        return _folders(cfg)
    for key, flag in (("val_split", "--val-split"), ("class_map", "--class-map")):
        if getattr(cfg.data, key) is not None:
            raise UserError(
                f"data.{key} is for image folders and tar files (data.set imagenet), and data.set is {name}: leave "
                f"{flag} out."
            )
    for module, package in _NEEDS.get(prefix, {}).items():
        if _find(module) is None:
            raise UserError(f"data.set {name} needs a package that is not installed: pip install {package}")
    if name == "digits":
        train, held_out = _digits()
        return (None if cfg.run.eval else train), held_out
    if prefix in ("torch", "wds"):
        _path(cfg, "the files of the data set")
    if prefix in ("hfds", "hfids"):
        _expose_hugging_face()

    def open_set(training: bool) -> Any:
        if name.startswith("cifar"):
            return _cifar(cfg, train=training)
        if name == "generated":
            length = cfg.data.num_images if training else max(1, cfg.data.num_images // 10)
            return _Generated(int(not training), length, size, cfg.model.num_classes or 1000)
        # Published sets name what they hold out in one of these ways.
        splits = ("train",) if training else ("validation", "val", "test")
        return _timm_set(cfg, splits, is_training=training, batch_size=batch_size if training else eval_batch_size)

    return (None if cfg.run.eval else open_set(True)), open_set(False)


def _path(cfg: Config, what: str) -> Path:
    """data.path, which must be given and, unless it is a URL, exist."""
    path = cfg.data.path
    if path is None:
        raise UserError(f"data.set {cfg.data.set} needs data.path (--data-path): {what}.")
    if "://" not in path and not Path(path).exists():
        raise UserError(f"data.path {path} does not exist: data.set {cfg.data.set} needs {what}.")
    return Path(path)


def _folders(cfg: Config) -> tuple[ImageFolder | ImageTar | None, ImageFolder | ImageTar]:
    """train/ and val/; or train/ in two parts, whether there is a val/ or not. The classes are those of a class map."""
    root = _path(cfg, "the folder that holds train/ and val/")
    class_map = cfg.data.class_map
    names = None if class_map is None else read_class_map(class_map)

    def open_split(split: str) -> ImageFolder | ImageTar:
        source = _image_folder(root, split)
        return source if names is None else with_classes(source, names, class_map, root / split)

    if cfg.data.val_split is None:
        return (None if cfg.run.eval else open_split("train")), open_split("val")
    train, held_out = hold_out(open_split("train"), cfg.data.val_split)
    return (None if cfg.run.eval else train), held_out


def _image_folder(root: Path, split: str) -> ImageFolder | ImageTar:
    """root/split with one folder a class; or that as root/split.tar; or one tar file a class in root/split."""
    folder, tar = root / split, root / f"{split}.tar"
    source = tar if tar.is_file() and not folder.is_dir() else folder
    packed = [root / f"{split}.{end}" for end in ("tar.gz", "tgz", "tar.bz2", "tar.xz", "tar.zst")]
    if not source.exists() and (found := next((path for path in packed if path.is_file()), None)) is not None:
        raise UserError(f"{found} is compressed, and images are read in place: decompress it to {tar.name}.")
    if not source.exists():
        entries = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []
        held = ", ".join(entries[:5]) + (f" and {len(entries) - 5} more" if len(entries) > 5 else "")
        raise UserError(
            f"{root} has no {split}/: data.set imagenet expects train/ and val/ there, each with one folder a class, "
            f"but it holds {held or 'nothing'}."
        )
    try:
        if source is tar or (any(folder.glob("*.tar")) and not any(entry.is_dir() for entry in folder.iterdir())):
            return ImageTar(source, split)
        refuse_splits(str(inner) for inner in folder.iterdir() if split_of(inner.name) and _holds_folders(inner))
        return ImageFolder(source, loader=open_image)
    except (OSError, AssertionError, ValueError, tarfile.TarError) as error:  # torchvision names the empty class
        raise UserError(
            f"{source} must hold one folder a class, each with at least one image: {_first_line(error)}"
        ) from None


def _holds_folders(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())


def _cifar(cfg: Config, *, train: bool) -> CIFAR10 | CIFAR100:
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[cfg.data.set]
    root, name = _path(cfg, f"the folder that holds {kind.base_folder}/"), kind.__name__
    try:
        return kind(root, train=train)
    except (RuntimeError, OSError):
        raise UserError(
            f"{root / kind.base_folder} is missing or incomplete: download it with python -c "
            f"\"from torchvision.datasets import {name}; {name}('{root}', download=True)\", or correct data.path."
        ) from None


class _Digits(list[tuple[Image.Image, int]]):
    class_to_idx = {str(digit): digit for digit in range(10)}  # noqa: RUF012


def _digits() -> tuple[_Digits, _Digits]:
    """scikit-learn's 1797 handwritten digits, 8x8 gray as RGB; always the same 1437 to train and 360 to evaluate."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # gray levels are 0 to 16
    samples = [(Image.fromarray(p).convert("RGB"), int(t)) for p, t in zip(pixels, digits.target, strict=True)]
    train, held_out = train_test_split(samples, test_size=360, stratify=digits.target, random_state=0)
    return _Digits(train), _Digits(held_out)


class _Generated(Dataset[tuple[Image.Image, int]]):
    """Noise with random labels, each image a function of (split, index). torchvision's FakeData would seed the GPUs."""

    def __init__(self, split: int, length: int, size: int, num_classes: int) -> None:
        self._split, self._length, self._size, self.num_classes = split, length, size, num_classes

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        rng = np.random.default_rng([self._split, index])
        pixels = rng.integers(0, 256, (self._size, self._size, 3), dtype=np.uint8)
        return Image.fromarray(pixels), int(rng.integers(self.num_classes))


def _timm_set(cfg: Config, splits: tuple[str, ...], *, is_training: bool, batch_size: int) -> Any:
    """A set by timm's naming, the first of `splits` that it has. Raises UserError with what the first one met."""
    name, path, problems = cfg.data.set, cfg.data.path, []
    hints = {"is_training": is_training, "batch_size": batch_size, "seed": cfg.run.seed}  # read by streams alone
    for split in splits:
        try:
            source = create_dataset(name, path, split, **hints)
        except Exception as error:  # anything the packages behind timm raise: files, splits, networks
            problems.append(f"{type(error).__name__}: {_first_line(error)}")
            continue
        if hasattr(source, "loader"):  # torchvision's way to name what opens an image
            source.loader = open_image
        return source
    raise UserError(f"data.set {name} has no usable split {' or '.join(splits)} under data.path {path}: {problems[0]}")


def _find(module: str) -> importlib.machinery.ModuleSpec | None:
    """The installed package of that name: no file of this repository, nor a mere folder (which has no origin)."""
    here = Path(__file__).resolve().parents[1]
    spec = importlib.machinery.PathFinder.find_spec(module, [p for p in sys.path if Path(p).resolve() != here])
    return spec if spec and spec.origin else None


def _expose_hugging_face() -> None:
    """Let `import datasets` in timm's hfds readers mean Hugging Face's package, which has the name of our datasets.py.

    Everything that needs datasets.py has imported it by then, and forked loader workers inherit it.
    """
    spec = _find("datasets")
    if getattr(sys.modules.get("datasets"), "__file__", None) != spec.origin:
        sys.modules["datasets"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["datasets"])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
