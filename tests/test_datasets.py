"""datasets.py: what a run sees of its data, bit for bit, and what the user reads when the data is wrong."""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
import torchvision
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

import datasets
from config import Config, UserError, load_config
from datasets import Data, build_data, build_mixup, eval_transform, train_transform

RECIPE = ["data.set=generated", "data.num_images=40", "model.img_size=16", "model.num_classes=7"]


def make_config(*overrides: str, base: list[str] | None = None) -> Config:
    """A tiny generated set under the whole DeiT augmentation, in this process; later overrides win."""
    return load_config(overrides=[*(RECIPE if base is None else base), "data.num_workers=0", *overrides])


def make_data(*overrides: str, rank: int = 0, world_size: int = 1, batch_size: int = 8, **kwargs: list[str]) -> Data:
    return build_data(make_config(*overrides, **kwargs), rank=rank, world_size=world_size, batch_size=batch_size)


def make_folder(root: Path, train: int = 6, val: int = 4, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    """An image folder of `train` and `val` images a class, each of one colour of its own."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                colour = tuple(int(c) for c in rng.integers(0, 256, 3))
                Image.new("RGB", (24, 20), colour).save(folder / f"{i}.png")
    return root


def folder_config(root: Path, *overrides: str) -> list[str]:
    plain = ["aug.mixup=0", "aug.cutmix=0", "aug.repeats=1"]
    return ["data.set=imagenet", f"data.path={root}", "model.img_size=16", *plain, *overrides]


def stack(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


def assert_same(a, b) -> None:
    (images_a, targets_a), (images_b, targets_b) = stack(a), stack(b)
    assert torch.equal(images_a, images_b) and torch.equal(targets_a, targets_b)


def generator_states() -> tuple:
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().numpy().tobytes()


# --- Transforms -------------------------------------------------------------------------------------------------------


def kinds(transform: transforms.Compose) -> list[str]:
    return [type(t).__name__ for t in transform.transforms]


def test_deit_training_transform():
    crop, flip, policy, _, norm, erase = train_transform(load_config()).transforms
    assert isinstance(crop, RandomResizedCropAndInterpolation)
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation == transforms.InterpolationMode.BICUBIC
    assert flip.p == 0.5
    assert policy.num_layers == 2 and {(op.magnitude, op.magnitude_std) for op in policy.ops} == {(9, 0.5)}
    assert policy.ops[0].kwargs["fillcolor"] == (124, 116, 104)
    assert norm.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert isinstance(erase, RandomErasing) and (erase.probability, erase.per_pixel, erase.max_count) == (0.25, True, 1)


def test_colour_jitter_is_there_exactly_where_no_policy_replaces_it():
    swin = ["aug.color_jitter=0.4", "aug.repeats=1"]
    assert "ColorJitter" not in kinds(train_transform(load_config(overrides=swin)))
    (jitter,) = (
        t
        for t in train_transform(load_config(overrides=[*swin, "aug.aa=null"])).transforms
        if isinstance(t, transforms.ColorJitter)
    )
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == ((0.6, 1.4),) * 3 + (None,)
    off = load_config(overrides=["aug.color_jitter=0", "aug.aa=null"])
    assert "ColorJitter" not in kinds(train_transform(off))


def test_three_augment_is_one_of_three_then_jitter():
    transform = train_transform(load_config(overrides=["aug.three_augment=true", "aug.reprob=0"]))
    assert kinds(transform)[2:4] == ["AutoAugment", "ColorJitter"]
    three = transform.transforms[2]
    assert [[op.name for op in ops] for ops in three.policy] == [["Solarize"], ["Desaturate"], ["GaussianBlurRand"]]
    assert all(op.prob == 1.0 for ops in three.policy for op in ops)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    solarized, gray, _ = (np.asarray(ops[0](image)) for ops in three.policy)
    assert np.array_equal(solarized, np.where(pixels < 128, pixels, 255 - pixels))
    assert np.array_equal(gray[..., 0], gray[..., 1]) and np.array_equal(gray[..., 0], gray[..., 2])


def test_simple_random_crop_keeps_the_whole_image():
    cfg = load_config(overrides=["aug.crop=src", "model.img_size=32", "aug.aa=null", "aug.color_jitter=0"])
    resize, crop, flip = train_transform(cfg).transforms[:3]
    assert (resize.size, resize.interpolation) == (32, transforms.InterpolationMode.BICUBIC)
    assert (crop.size, crop.padding, crop.padding_mode) == ((32, 32), 4, "reflect")
    assert flip.p == 0.5
    assert train_transform(cfg)(Image.new("RGB", (50, 40))).shape == (3, 32, 32)


def test_evaluation_transform_resizes_to_256_and_crops_224():
    resize, crop, _, _ = eval_transform(load_config()).transforms
    assert (resize.size, crop.size) == (256, (224, 224))
    assert resize.interpolation == transforms.InterpolationMode.BICUBIC
    cifar = load_config(overrides=["model.img_size=32", "data.eval_crop_ratio=1.0"])
    assert eval_transform(cifar).transforms[0].size == 32


def test_unknown_policy_is_a_user_error():
    with pytest.raises(UserError, match=r"aug\.aa autumn is not one of timm's"):
        train_transform(load_config(overrides=["aug.aa=autumn"]))


def test_mixup_follows_the_configuration():
    mixup = build_mixup(load_config(overrides=["aug.mixup_prob=0.7", "loss.smoothing=0.2"]), 10)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.8, 1.0, 0.7, 0.5)
    assert (mixup.mode, mixup.label_smoothing, mixup.num_classes) == ("batch", 0.2, 10)
    off = ["aug.mixup=0", "aug.cutmix=0"]
    assert build_mixup(load_config(overrides=off), 10) is None
    assert build_mixup(load_config(overrides=[*off, "aug.cutmix_minmax=[0.2,0.8]"]), 10).cutmix_minmax == (0.2, 0.8)


def test_odd_batch_with_mixup_is_a_user_error():
    with pytest.raises(UserError, match="must be even, not 7"):
        make_data(batch_size=7)
    assert make_data("aug.mixup=0", "aug.cutmix=0", batch_size=7).batches_per_epoch == 5


# --- Determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_does_not_depend_on_workers_and_ambient_generators(repeats, workers):
    reference = list(make_data(f"aug.repeats={repeats}").train_batches(1))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    data = make_data(f"aug.repeats={repeats}", f"data.num_workers={workers}")
    assert len(reference) == data.batches_per_epoch == 5
    assert_same(reference, data.train_batches(1))
    assert_same(reference, data.train_batches(1))


@pytest.mark.parametrize("repeats", [1, 3])
def test_two_processes_see_the_samples_of_one(repeats):
    one = stack(make_data(f"aug.repeats={repeats}", batch_size=8).train_batches(2))
    halves = [
        stack(make_data(f"aug.repeats={repeats}", rank=rank, world_size=2, batch_size=4).train_batches(2))
        for rank in (0, 1)
    ]
    for whole, *parts in zip(one, *halves, strict=True):
        assert torch.equal(whole, torch.stack(parts, dim=1).flatten(0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_epoch_continues_where_it_stopped(workers):
    whole = list(make_data().train_batches(3))
    data = make_data(f"data.num_workers={workers}")
    before = list(itertools.islice(data.train_batches(3), 2))  # abandoned with batches still in the workers' queues
    assert_same(whole, [*before, *data.train_batches(3, start=2)])
    assert list(data.train_batches(3, start=5)) == []
    assert_same(whole, make_data(f"data.num_workers={workers}").train_batches(3))


def test_earlier_pass_cannot_go_on_once_another_has_begun():
    data = make_data("data.num_workers=1")
    first = data.train_batches(0)
    next(first)
    next(data.train_batches(0))
    with pytest.raises(AssertionError, match="taken the loader over"):
        next(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_generators_of_the_process_stay_untouched(workers):
    data = make_data(f"data.num_workers={workers}")
    before = generator_states()
    for _ in itertools.chain(data.train_batches(0), data.eval_batches(), data.train_batches(1, start=3)):
        assert generator_states() == before


def test_control_without_the_seeds_two_passes_differ(monkeypatch):
    monkeypatch.setattr(datasets, "_seeded", lambda *key: contextlib.nullcontext())
    data = make_data()
    assert not torch.equal(stack(data.train_batches(0))[0], stack(data.train_batches(0))[0])


@pytest.mark.parametrize("repeats", [1, 3])
def test_epochs_and_seeds_differ(repeats):
    passes = [
        stack(make_data(f"run.seed={seed}", f"aug.repeats={repeats}").train_batches(epoch))
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    for (images_a, targets_a), (images_b, targets_b) in itertools.combinations(passes, 2):
        assert not torch.equal(images_a, images_b)
        assert not torch.equal(targets_a, targets_b)  # the order of the samples, not only their augmentation


def test_repeats_of_an_image_are_augmented_differently():
    data = make_data("aug.repeats=3")
    keys = list(data.train_loader.sampler)
    assert [keys[i][0] for i in range(6)] == [keys[0][0]] * 3 + [keys[3][0]] * 3
    images, _ = next(data.train_batches(0))
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])
    same, _, _ = data.train_loader.dataset[keys[0]]
    assert torch.equal(images[0], same)


# --- Epochs and evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "batches"), [(40, 5), (255, 31), (300, 32)])
def test_epoch_of_repeated_augmentation(images, batches):
    """As many samples as the set has images: rounded down to 256s as in DeiT, except for sets smaller than that."""
    data = make_data("aug.repeats=3", f"data.num_images={images}")
    assert data.batches_per_epoch == batches
    assert sum(1 for _ in data.train_loader.sampler) // 8 == batches


@pytest.mark.parametrize("repeats", [1, 3])
def test_processes_take_equally_many_batches(repeats):
    parts = [make_data(f"aug.repeats={repeats}", "data.num_images=41", rank=r, world_size=3) for r in range(3)]
    assert {data.batches_per_epoch for data in parts} == {1}


def test_every_evaluation_image_comes_once(tmp_path):
    base = folder_config(make_folder(tmp_path, val=5))
    whole = stack(make_data(base=base, batch_size=2).eval_batches())
    assert len(torch.unique(whole[0].flatten(1), dim=0)) == len(whole[0]) == 10
    assert whole[1].tolist() == [0] * 5 + [1] * 5
    for workers in (0, 2):
        parts = [
            make_data(f"data.num_workers={workers}", base=base, rank=rank, world_size=3, batch_size=2)
            for rank in range(3)
        ]
        assert {data.eval_size for data in parts} == {10}
        shares = [stack(data.eval_batches()) for data in parts]
        assert [len(images) for images, _ in shares] == [4, 3, 3]
        for rank, (images, targets) in enumerate(shares):
            assert torch.equal(images, whole[0][rank::3]) and torch.equal(targets, whole[1][rank::3])


def test_evaluation_batches_are_larger():
    assert [len(images) for images, _ in make_data("data.num_images=200", batch_size=8).eval_batches()] == [12, 8]


def test_workers_are_this_process_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)), raising=False)
    unset = make_config("data.num_workers=null")
    assert datasets._num_workers(unset) == 10
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert datasets._num_workers(unset) == 4
    assert datasets._num_workers(make_config("data.num_workers=3")) == 3


def test_workers_live_through_an_interrupt():
    data = make_data("data.num_workers=1")
    batches = data.train_batches(0)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 4


# --- Unreadable images ------------------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> Path:
    """Replace an image by a .jpg that cannot be read."""
    path.unlink()
    path = path.with_suffix(".jpg")
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(content, "JPEG")
    path.write_bytes({"empty": b"", "truncated": content.getvalue()[:1500], "text": b"not an image\n"}[how])
    return path


def user_error_of(batches) -> str:
    """What pytest.raises would keep holds a cycle with the loader, whose workers then take 5 s to notice its end."""
    try:
        list(batches)
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["empty", "truncated", "text"])
def test_unreadable_image_stops_the_run_in_one_sentence(tmp_path, how, workers):
    base = folder_config(make_folder(tmp_path))
    bad_train = spoil(tmp_path / "train/ant/2.png", how)
    bad_val = spoil(tmp_path / "val/bee/0.png", how)
    data = make_data(f"data.num_workers={workers}", base=base, batch_size=4)
    for bad, batches in ((bad_train, data.train_batches(0)), (bad_val, data.eval_batches())):
        message = user_error_of(batches)
        assert message.startswith(f"{bad} cannot be read (") and "\n" not in message
        assert message.endswith(
            "): repair or remove it, or go on without such images by data.on_corrupt=skip (--on-corrupt skip)."
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_replaced_in_training_and_left_out_in_evaluation(tmp_path, workers):
    base = folder_config(make_folder(tmp_path), "aug.aa=null", "aug.color_jitter=0", "aug.reprob=0")
    for name, how in (("train/ant/2.png", "empty"), ("train/ant/3.png", "text"), ("val/bee/0.png", "truncated")):
        spoil(tmp_path / name, how)
    data = make_data("data.on_corrupt=skip", f"data.num_workers={workers}", base=base, batch_size=4)

    images, targets = stack(data.train_batches(0))
    assert data.corrupt == 2
    colours, counts = torch.unique(images.mean((2, 3)), dim=0, return_counts=True)
    assert sorted(counts.tolist()) == [1] * 9 + [3]  # ant/4, the next readable one, stands in for ant/2 and ant/3
    reader = torchvision.datasets.ImageFolder(tmp_path / "train", eval_transform(make_config(base=base)))
    stand_in = reader[4][0].mean((1, 2))
    assert torch.allclose(colours[counts.argmax()], stand_in, atol=1e-5)
    assert targets.bincount().tolist() == [6, 6]

    images, targets = stack(data.eval_batches())
    assert (data.eval_size, len(images), targets.tolist()) == (8, 7, [0] * 4 + [1] * 3)
    assert data.corrupt == 3


def test_evaluation_batch_without_a_readable_image_is_left_out(tmp_path):
    base = folder_config(make_folder(tmp_path, val=2))
    for i in range(2):
        spoil(tmp_path / f"val/ant/{i}.png", "text")
    data = make_data("data.on_corrupt=skip", base=base, batch_size=2)  # evaluates three at a time
    assert [targets.tolist() for _, targets in data.eval_batches()] == [[1], [1]]


def test_nothing_readable_at_all_ends_the_run_even_when_skipping(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_MAX_IN_A_ROW", 5)
    base = folder_config(make_folder(tmp_path))
    for path in (tmp_path / "train").rglob("*.png"):
        spoil(path, "text")
    with pytest.raises(UserError, match=r"cannot be read \(not an image\), nor can the 4 images after it"):
        list(make_data("data.on_corrupt=skip", base=base, batch_size=4).train_batches(0))


# --- Data sets --------------------------------------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all():
    cfg = make_config("data.set=digits", "model.num_classes=null", "aug.repeats=1")
    train, val = datasets._open(cfg, 8, 12)
    assert (len(train), len(val)) == (1437, 360)
    image, target = train[0]
    assert image.size == (8, 8) and image.mode == "RGB" and 0 <= target < 10
    assert np.asarray(image).max() == 255
    counts = np.bincount([target for _, target in val])
    assert counts.min() >= 34 and counts.max() <= 37 and len(counts) == 10
    assert [t for _, t in datasets._open(cfg, 8, 12)[1]] == [t for _, t in val]
    data = make_data("data.set=digits", "model.num_classes=null", "aug.repeats=1")
    assert (data.num_classes, data.batches_per_epoch, data.eval_size) == (10, 179, 360)


def test_generated_set():
    data = make_data("data.num_images=35")
    assert (data.num_classes, data.batches_per_epoch, data.eval_size) == (7, 4, 3)
    images, targets = next(data.train_batches(0))
    assert images.shape == (8, 3, 16, 16) and images.dtype == torch.float32 and targets.dtype == torch.int64
    train, val = datasets._open(make_config("data.num_images=5"), 8, 12)
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


@pytest.mark.parametrize("one_tar_a_class", [False, True])
def test_tar_files_give_what_the_folder_gives(tmp_path, one_tar_a_class):
    source, packed = make_folder(tmp_path / "folder"), tmp_path / "packed"
    packed.mkdir()
    for split in ("train", "val"):
        if one_tar_a_class:
            (packed / split).mkdir()
            for folder in (source / split).iterdir():
                with tarfile.open(packed / split / f"{folder.name}.tar", "w") as tar:
                    for path in folder.iterdir():
                        tar.add(path, path.name)
        else:
            with tarfile.open(packed / f"{split}.tar", "w") as tar:
                tar.add(source / split, "")
    for workers in (0, 2):
        a, b = (
            make_data(f"data.num_workers={workers}", base=folder_config(root), batch_size=4)
            for root in (source, packed)
        )
        colours = [{tuple(c.tolist()) for c in stack(d.eval_batches())[0][:, :, 0, 0]} for d in (a, b)]
        assert colours[0] == colours[1] and len(colours[0]) == 8
        assert stack(b.eval_batches())[1].bincount().tolist() == [4, 4]
        assert len(list(b.train_batches(0))) == 3


def test_unreadable_image_in_a_tar_is_not_replaced_unasked(tmp_path):
    """timm's own ImageDataset takes the next image and logs a warning."""
    source = make_folder(tmp_path / "folder")
    spoil(source / "train/ant/2.png", "empty")
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(source / split, "")
    with pytest.raises(UserError, match=r"train\.tar/ant/2\.jpg cannot be read"):
        list(make_data(base=folder_config(tmp_path), batch_size=4).train_batches(0))


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

    monkeypatch.setattr(datasets, "create_dataset", create)
    monkeypatch.setattr(datasets, "_find", lambda module: types.SimpleNamespace())
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
    monkeypatch.setattr(datasets.importlib.machinery.PathFinder, "find_spec", lambda *args: None)
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
    datasets._expose_hugging_face()
    exposed = sys.modules["datasets"]
    assert exposed is not datasets and exposed.load_dataset() is exposed.Image
    datasets._expose_hugging_face()
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


def test_fewer_images_than_a_batch():
    with pytest.raises(UserError, match=r"40 training images for each of 1 process\(es\), fewer than one batch of 64"):
        make_data(batch_size=64)
    with pytest.raises(UserError, match=r"10 training images for each of 4 process\(es\)"):
        make_data(batch_size=12, world_size=4)
