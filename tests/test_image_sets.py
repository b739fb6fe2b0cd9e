"""images/sets.py: every kind of set, as a run reads it, and what the user reads when one cannot be opened."""

from __future__ import annotations

import io
import itertools
import pickle
import random
import re
import shutil
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
import torchvision
from data_helpers import (
    assert_same,
    folder_config,
    generator_states,
    make_config,
    make_data,
    make_folder,
    stack,
    user_error_of,
)
from PIL import Image

import datasets
from config import UserError
from images import sets as image_sets


def test_digits_are_split_once_and_for_all():
    cfg = make_config("data.set=digits", "model.num_classes=null", "aug.repeats=1")
    train, val = image_sets.open_sets(cfg, 8, 12)
    assert (len(train), len(val)) == (1437, 360)
    image, target = train[0]
    assert image.size == (8, 8) and image.mode == "RGB" and 0 <= target < 10
    assert np.asarray(image).max() == 255
    counts = np.bincount([target for _, target in val])
    assert counts.min() >= 34 and counts.max() <= 37 and len(counts) == 10
    assert [t for _, t in image_sets.open_sets(cfg, 8, 12)[1]] == [t for _, t in val]
    data = make_data("data.set=digits", "model.num_classes=null", "aug.repeats=1")
    assert (data.num_classes, data.batches_per_epoch, data.eval_size) == (10, 179, 360)


def test_generated_set():
    data = make_data("data.num_images=35")
    assert (data.num_classes, data.batches_per_epoch, data.eval_size) == (7, 4, 3)
    images, targets = next(data.train_batches(0))
    assert images.shape == (8, 3, 16, 16) and images.dtype == torch.float32 and targets.dtype == torch.int64
    train, val = image_sets.open_sets(make_config("data.num_images=5"), 8, 12)
    assert len(val) == 1
    assert train[0][0].tobytes() != train[1][0].tobytes() != val[0][0].tobytes() != train[0][0].tobytes()
    assert train[3][0].tobytes() == train[3][0].tobytes()
    assert make_data("model.num_classes=null").num_classes == 1000


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(tmp_path, monkeypatch, name, classes):
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    base = [f"data.set={name}", f"data.path={tmp_path}", "model.img_size=16", "aug.repeats=1"]
    with pytest.raises(UserError, match="is missing or incomplete: download it with python -c") as error:
        make_data(base=base)
    assert str(folder) in str(error.value)

    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    for file, _ in [*kind.train_list, *kind.test_list]:
        labels = [i % classes for i in range(10)]
        batch = {"data": np.zeros((10, 3072), dtype=np.uint8), "labels": labels, "fine_labels": labels}
        (folder / file).write_bytes(pickle.dumps(batch))
    names = [f"class {i:03}" for i in range(classes)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    data = make_data(base=base)
    assert (data.num_classes, data.eval_size) == (classes, 10)
    assert next(data.train_batches(0))[0].shape == (8, 3, 16, 16)
    with pytest.raises(UserError, match=f"{name} has {classes} classes but model.num_classes is 3"):
        make_data("model.num_classes=3", base=base)


def test_torchvision_sets_by_timms_naming(monkeypatch, tmp_path):
    class Gray(torch.utils.data.Dataset):
        class_to_idx = {"a": 0, "b": 1}  # noqa: RUF012

        def __init__(self, root, train, download):
            assert Path(root) == tmp_path and not download
            self.length = 16 if train else 4

        def __len__(self):
            return self.length

        def __getitem__(self, index):
            return Image.new("L", (20, 20), index), index % 2

    monkeypatch.setitem(timm.data.dataset_factory._TORCH_BASIC_DS, "mnist", Gray)
    base = ["data.set=torch/mnist", f"data.path={tmp_path}", "model.img_size=16", "aug.repeats=1"]
    data = make_data(base=base)
    assert (data.num_classes, data.batches_per_epoch, data.eval_size) == (2, 2, 4)
    assert next(data.train_batches(0))[0].shape == (8, 3, 16, 16)
    with pytest.raises(UserError, match=r"torch/mnits has no usable split train under .*: AssertionError: Unknown"):
        make_data("data.set=torch/mnits", base=base)


class Nameless(timm.data.readers.reader.Reader):
    """As timm's reader of Hugging Face's sets: bytes, and in place of a file's name its label."""

    class_to_idx = {"a": 0, "b": 1}  # noqa: RUF012

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        content = io.BytesIO()
        Image.new("RGB", (20, 20), (index * 10, 0, 0)).save(content, "PNG")
        return io.BytesIO(content.getvalue() if index != 5 else b"text"), index % 2

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> int:
        return index % 2


def test_unreadable_image_without_a_name(monkeypatch):
    monkeypatch.setattr(image_sets, "create_dataset", lambda *args, **hints: timm.data.ImageDataset("", Nameless()))
    monkeypatch.setattr(image_sets, "_find", lambda module: types.SimpleNamespace())
    monkeypatch.setattr(image_sets, "_expose_hugging_face", lambda: None)
    base = ["data.set=hfds/some", "model.img_size=16", "aug.repeats=1"]
    assert make_data(base=base).classes == ("a", "b")
    message = user_error_of(make_data(base=base).eval_batches())
    assert message.startswith("image 5 of ImageDataset cannot be read (not an image): repair")
    assert user_error_of(make_data("data.on_corrupt=skip", base=base).eval_batches()) == "no error"


class FakeReader:
    """A streaming reader with the protocol of timm's: rank and worker split, whole batches in training."""

    def __init__(self, is_training: bool, batch_size: int) -> None:
        self.num_samples, self.batch_size, self.is_training = (24, batch_size, True) if is_training else (6, 1, False)
        self.dist_rank, self.dist_num_replicas, self.num_workers = None, None, None
        self.epochs = timm.data.readers.shared_count.SharedCount()

    def set_epoch(self, epoch: int) -> None:
        self.epochs.value = epoch

    def set_loader_cfg(self, num_workers: int) -> None:
        self.num_workers = num_workers

    def _places(self) -> list[int]:
        info = torch.utils.data.get_worker_info()
        worker = self.dist_rank * self.num_workers + (info.id if info else 0)
        order = random.Random(self.epochs.value).sample(range(self.num_samples), self.num_samples)
        return order[worker :: self.dist_num_replicas * self.num_workers]

    def __iter__(self):
        places = self._places()
        for place in itertools.islice(itertools.cycle(places), len(self) // self.num_workers):
            yield Image.new("RGB", (20, 20), (place * 10, 0, 0)), place % 3

    def __len__(self) -> int:
        share = self.num_samples / (self.dist_num_replicas * self.num_workers)
        return int(-(-share // self.batch_size) * self.batch_size) * self.num_workers


@pytest.fixture
def stream(monkeypatch):
    """Streams made by a stand-in for webdataset; the overrides that choose them."""

    def create(name, root, split, is_training, batch_size, seed):
        if split in ("train", "val"):
            return timm.data.IterableImageDataset(root, reader=FakeReader(is_training, batch_size))
        raise RuntimeError(f"split {split} not found")

    monkeypatch.setattr(image_sets, "create_dataset", create)
    monkeypatch.setattr(image_sets, "_find", lambda module: types.SimpleNamespace())
    return ["data.set=wds/some", "data.path=/", "model.img_size=16", "aug.repeats=1", "model.num_classes=3"]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_epochs(stream, workers):
    data = make_data(f"data.num_workers={workers}", base=stream, batch_size=4)
    assert (data.num_classes, data.batches_per_epoch, data.eval_size) == (3, 6, 6)
    first, second = list(data.train_batches(0)), list(data.train_batches(1))
    assert len(first) == len(second) == 6
    assert not torch.equal(stack(first)[0], stack(second)[0])
    assert_same(first, data.train_batches(0))
    assert_same(first[:2], data.train_batches(0, start=4))  # starts anew and keeps the epoch's length
    before = generator_states()
    assert stack(data.eval_batches())[1].bincount().tolist() == [2, 2, 2]
    assert generator_states() == before


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [OSError("gone"), KeyError("png"), RuntimeError("two\nlines")])
@pytest.mark.parametrize("skip", ["error", "skip"])
def test_a_stream_that_breaks_off_is_one_sentence(stream, monkeypatch, workers, error, skip):
    def places(self):
        yield from range(6)
        raise error

    monkeypatch.setattr(FakeReader, "_places", places)
    monkeypatch.setattr(FakeReader, "__iter__", lambda self: ((Image.new("L", (20, 20)), 0) for _ in self._places()))
    data = make_data(f"data.num_workers={workers}", f"data.on_corrupt={skip}", base=stream, batch_size=4)
    message = user_error_of(data.train_batches(0))
    assert message.startswith("The stream FakeReader cannot be read any further (") and "\n" not in message
    assert message.endswith("): check data.set and data.path.")


def test_stream_errors(stream):
    with pytest.raises(UserError, match=r"does not tell how many classes it has: set model\.num_classes"):
        make_data("model.num_classes=null", base=stream)
    with pytest.raises(UserError, match=r"cannot repeat augmentation: set aug\.repeats=1"):
        make_data("aug.repeats=3", base=stream)
    with pytest.raises(UserError, match=r"a label 2, outside of its 2 classes: set model\.num_classes"):
        list(make_data("model.num_classes=2", base=stream).train_batches(0))


@pytest.mark.parametrize(
    ("name", "package"),
    [("wds/a", "webdataset"), ("hfds/a/b", "datasets"), ("hfids/a", "datasets"), ("digits", "scikit-learn")],
)
def test_missing_package_says_what_to_install(monkeypatch, name, package):
    monkeypatch.setattr(image_sets.importlib.machinery.PathFinder, "find_spec", lambda *args: None)
    with pytest.raises(UserError, match=f"{name} needs a package that is not installed: pip install {package}"):
        make_data(f"data.set={name}", "data.path=/")


def test_hugging_face_package_is_found_behind_this_file(tmp_path, monkeypatch):
    """timm's reader does `import datasets`, which without help would give this repository's file."""
    package = tmp_path / "datasets"
    package.mkdir()
    (package / "__init__.py").write_text("from datasets.inner import load_dataset\nclass Image: ...\n")
    (package / "inner.py").write_text("import datasets\ndef load_dataset(): return datasets.Image\n")
    monkeypatch.setitem(sys.modules, "datasets", datasets)  # put back afterwards
    monkeypatch.delitem(sys.modules, "datasets.inner", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(Path(datasets.__file__).parent), *sys.path])
    image_sets._expose_hugging_face()
    exposed = sys.modules["datasets"]
    assert exposed is not datasets and exposed.load_dataset() is exposed.Image
    image_sets._expose_hugging_face()
    assert sys.modules["datasets"] is exposed
    monkeypatch.delitem(sys.modules, "datasets.inner")
    assert len(list(make_data("data.num_workers=2").train_batches(0))) == 5  # workers do without the name


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [("imagnet", "imagenet"), ("cifar-10", "cifar10"), ("hfdss/x", "hfds/"), ("digit", "digits"), ("wds", "wds/")],
)
def test_unknown_set_names_the_nearest(name, near):
    with pytest.raises(UserError, match=f"There is no data.set {name}: did you mean {near}?"):
        make_data(f"data.set={name}")


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "torch/mnist"])
def test_path_is_needed_and_must_exist(name, tmp_path):
    with pytest.raises(UserError, match=rf"data\.set {name} needs data\.path \(--data-path\): the f"):
        make_data(f"data.set={name}")
    with pytest.raises(UserError, match=r"data\.path .*/nowhere does not exist"):
        make_data(f"data.set={name}", f"data.path={tmp_path}/nowhere")


def test_missing_split_says_what_is_there_instead(tmp_path):
    with pytest.raises(UserError, match=r"has no train/: .* but it holds nothing\."):
        make_data(base=folder_config(tmp_path))
    make_folder(tmp_path)
    (tmp_path / "val").rename(tmp_path / "test")
    with pytest.raises(UserError, match=r"has no val/: .* but it holds test, train\."):
        make_data(base=folder_config(tmp_path))
    for i in range(7):
        (tmp_path / "train" / f"n{i}").mkdir()
    with pytest.raises(UserError, match="but it holds ant, bee, n0, n1, n2 and 4 more"):
        make_data(base=folder_config(tmp_path / "train"))


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tar_files_are_to_be_decompressed(tmp_path, mode):
    root = make_folder(tmp_path / "images")
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar.{mode}", f"w:{mode}") as tar:
            tar.add(root / split, ".")
        shutil.rmtree(root / split)
    said = f"train.tar.{mode} is compressed, and images are read in place: decompress it to train.tar."
    with pytest.raises(UserError, match=re.escape(said)):
        make_data(base=folder_config(root))
    for split in ("train", "val"):
        (root / f"{split}.tar.{mode}").rename(root / f"{split}.tar")
    with pytest.raises(UserError, match=r"train\.tar is compressed, and images are read in place: decompress it"):
        make_data(base=folder_config(root))


def test_class_folders(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match=r"train must hold one folder a class.*: Couldn't find any class folder"):
        make_data(base=folder_config(tmp_path))
    (tmp_path / "train").rmdir(), (tmp_path / "val").rmdir()
    make_folder(tmp_path)
    (tmp_path / "val/cow").mkdir()
    with pytest.raises(UserError, match=r"val must hold one folder a class.*: Found no valid file.* cow"):
        make_data(base=folder_config(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "val/cow/0.png")
    with pytest.raises(UserError, match=r"2 for training and 3 for evaluation \(only one of them has cow\)"):
        make_data(base=folder_config(tmp_path))


def test_number_of_classes(tmp_path):
    base = folder_config(make_folder(tmp_path))
    assert make_data(base=base).num_classes == 2
    assert make_data("model.num_classes=2", base=base).num_classes == 2
    with pytest.raises(UserError, match=r"imagenet has 2 classes but model\.num_classes is 10: leave"):
        make_data("model.num_classes=10", base=base)
