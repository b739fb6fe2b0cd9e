"""datasets.py: what a run sees of its data, bit for bit, and what it does with images that cannot be read."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch
import torchvision
from data_helpers import (
    assert_same,
    folder_config,
    generator_states,
    make_config,
    make_data,
    make_folder,
    spoil,
    stack,
    user_error_of,
)
from helpers import exit_code, tiny, train
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

import datasets
from config import UserError, load_config
from datasets import build_mixup
from images import samples
from images.transforms import eval_transform, train_transform

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
    monkeypatch.setattr(samples, "seeded", lambda *key: contextlib.nullcontext())
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
    assert datasets._num_workers(unset) == 16
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


def test_fewer_images_than_a_batch():
    with pytest.raises(UserError, match=r"40 training images for each of 1 process\(es\), fewer than one batch of 64"):
        make_data(batch_size=64)
    with pytest.raises(UserError, match=r"10 training images for each of 4 process\(es\)"):
        make_data(batch_size=12, world_size=4)


# --- Unreadable images ------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(datasets, "MAX_IN_A_ROW", 5)
    base = folder_config(make_folder(tmp_path))
    for path in (tmp_path / "train").rglob("*.png"):
        spoil(path, "text")
    with pytest.raises(UserError, match=r"cannot be read \(not an image\), nor can the 4 images after it"):
        list(make_data("data.on_corrupt=skip", base=base, batch_size=4).train_batches(0))


def test_images_gone_without_are_said_at_once_and_after_each_pass(tmp_path, capsys):
    base = folder_config(make_folder(tmp_path, train=8))
    bad = {str(spoil(tmp_path / f"train/ant/{i}.png", "text")) for i in range(4)}
    bad_val = spoil(tmp_path / "val/bee/0.png", "empty")
    data = make_data("data.on_corrupt=skip", base=base, batch_size=4)

    def said() -> list[str]:
        return capsys.readouterr().err.splitlines()

    list(data.train_batches(0))
    first = said()
    assert len(first) == 1 and any(first[0].startswith(f"warning: {path} cannot be read (not an") for path in bad)
    assert first[0].endswith("; the run goes on without such images (data.on_corrupt=skip).")
    list(data.eval_batches())
    train, held_out = said()
    told = "warning: 4 of 16 (25 %) of the training images of epoch 1 could not be read: "
    assert train.startswith(told) and train.endswith(" and 1 more.")
    assert set(train.removeprefix(told).removesuffix(" and 1 more.").split(", ")) < bad
    assert held_out == f"warning: 1 of 8 (12 %) of the evaluation images could not be read: {bad_val}."
    list(data.train_batches(1))
    assert said() == []
    list(data.train_batches(2))
    assert said()[0].startswith("warning: 4 of 16 (25 %) of the training images of epoch 2 could not be read: ")


def test_nothing_is_said_of_sets_that_can_be_read(tmp_path, capsys):
    data = make_data("data.on_corrupt=skip", base=folder_config(make_folder(tmp_path)), batch_size=4)
    for epoch in range(2):
        list(data.train_batches(epoch))
        list(data.eval_batches())
    assert capsys.readouterr().err == ""


# --- Evaluation alone -------------------------------------------------------------------------------------------------


def test_evaluation_alone_needs_the_evaluation_set_alone(tmp_path):
    """No training set, no even batch for mixup, no batch that the training set could fill."""
    base = folder_config(make_folder(tmp_path), "aug.mixup=0.8", "aug.repeats=3")
    whole = make_data(base=base, batch_size=6)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    for batch_size in (6, 7, 512):
        data = make_data("run.eval=true", base=base, batch_size=batch_size)
        assert (data.train_loader, data.batches_per_epoch, data.eval_size) == (None, 0, 8)
        assert (data.num_classes, data.classes) == (2, ("ant", "bee"))
        assert_same(whole.eval_batches(), data.eval_batches())
    with pytest.raises(UserError, match="has no train/"):
        make_data(base=base, batch_size=6)


@pytest.mark.parametrize("name", ["digits", "generated"])
def test_evaluation_alone_of_sets_without_files(name):
    overrides = [f"data.set={name}", "model.num_classes=10"]
    whole, alone = (make_data(*overrides, *more, batch_size=30) for more in ([], ["run.eval=true"]))
    assert alone.train_loader is None
    assert_same(whole.eval_batches(), alone.eval_batches())


def test_program_evaluates_without_a_training_set(tmp_path, capsys):
    make_folder(tmp_path)
    flags = ["--data-set", "IMNET", "--data-path", str(tmp_path), "--nb-classes", "2", "--no-repeated-aug"]
    checkpoint = train(tmp_path / "run", *flags, "--global-batch", "6", "--epochs", "1") / "last.pt"
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    scores = []
    for more in ([], ["--global-batch", "64"], ["--global-batch", "1"], ["--batch-size", "3"]):
        capsys.readouterr()
        assert exit_code(tiny(tmp_path / "other", *flags, *more, "--eval", "--resume", str(checkpoint))) == 0
        scores.append(capsys.readouterr().out)
    assert len(set(scores)) == 1 and " on 8 images, quant.scheme none\n" in scores[0]
    assert not (tmp_path / "other").exists()
