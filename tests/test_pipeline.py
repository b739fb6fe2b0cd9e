"""data.pipeline: the device makes the batches that loader processes make, to the bit, whatever the images lie in."""

from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import (
    assert_same,
    folder_config,
    generator_states,
    make_config,
    make_data,
    stack,
    user_error_of,
)
from PIL import Image
from quick import some
from test_draws import photograph

from images.decode import open_image, plain_jpeg
from images.packed import Draws, PackedImages
from images.pipeline import choose_pipeline
from images.samples import Images
from images.transforms import train_transform

GPU, FILES = "data.pipeline=gpu", "data.resident=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """JPEG files of every kind that ImageNet has, and of some that it has not, in two classes."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for split, count in (("train", 14), ("val", 9)):
        for label in ("ant", "bee"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                image = photograph(int(rng.integers(1 << 30)), int(rng.integers(18, 60)), int(rng.integers(18, 60)))
                how = ("plain", "grey", "cmyk", "progressive", "png", "alpha", "444", "tiny", "exif")[number % 9]
                save(image, root / split / label / f"{number:02}", how)
    return root


def save(image: Image.Image, path: Path, how: str) -> None:
    jpeg, options = path.with_suffix(".jpg"), {}
    if how == "exif":
        options["exif"] = Image.Exif()
        options["exif"][0x112] = 6  # turned by 90 degrees, which nobody heeds
    if how == "png":
        image.save(path.with_suffix(".png"))
    elif how == "alpha":
        image.convert("RGBA").save(path.with_suffix(".png"))
    elif how == "tiny":
        image.resize((1, 40)).save(jpeg)
    else:
        options |= {"progressive": {"progressive": True}, "444": {"subsampling": 0}}.get(how, {})
        image.convert({"grey": "L", "cmyk": "CMYK"}.get(how, "RGB")).save(jpeg, quality=92, **options)


def assert_pipelines_agree(*overrides: str, base: list[str], batch_size: int = 4) -> None:
    one = make_data("data.pipeline=cpu", *overrides, base=base, batch_size=batch_size)
    other = make_data(GPU, *overrides, base=base, batch_size=batch_size)
    assert other.pipeline["evaluation"]["pipeline"] == other.pipeline["training"]["pipeline"] == "gpu"
    for epoch in range(2):
        assert_same(*(itertools.islice(data.train_batches(epoch), 7) for data in (one, other)))
        assert_same(*(itertools.islice(data.eval_batches(), 5) for data in (one, other)))
    assert one.corrupt == other.corrupt
    for data in (one, other):
        data.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kept", [FILES, "data.resident=0.2"])
def test_folders(folder, kept, workers):
    assert_pipelines_agree(kept, f"data.num_workers={workers}", base=folder_config(folder))


def test_files_that_the_device_decodes(folder):
    data = make_data(GPU, FILES, base=folder_config(folder), batch_size=4)
    data.train.loader.dataset._maker.share = 1.0
    kinds = [sample.kind for sample, *_ in (data.train.loader.dataset[n, n, 0] for n in range(28))]
    assert 0 < kinds.count(1) < 14  # plain ones alone
    assert_same(make_data(base=folder_config(folder), batch_size=4).train_batches(0), data.train_batches(0))


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.set=digits", "model.num_classes=null", "aug.repeats=1"],
        ["data.set=generated", "data.num_images=40", "aug.three_augment=true", "aug.crop=src"],
        ["data.set=generated", "data.num_images=40", "aug.aa=null", "aug.color_jitter=0.4", "aug.remode=rand"],
        ["data.set=generated", "data.num_images=40", "aug.interpolation=random", "aug.repeats=3"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_sets_in_memory(overrides):
    base = ["model.img_size=16", "model.num_classes=7", *overrides]
    assert_pipelines_agree(FILES, base=base, batch_size=32)
    assert_pipelines_agree(base=base, batch_size=32)


@pytest.mark.parametrize("pipeline", [["data.pipeline=cpu"], [GPU, FILES], [GPU, FILES, "half"]], ids=" ".join)
def test_views_that_follow_one_another_are_of_an_image_that_is_read_once(folder, tmp_path, pipeline, monkeypatch):
    """With the bits and the notes of views that are read one by one, which is what processes of four have."""
    spoiled = {"train/ant/00.jpg": b"\xff\xd8 broken"}
    base = [*folder_config(copy_with(folder, tmp_path, spoiled)), "aug.repeats=3", "data.on_corrupt=skip"]
    reads, read = [], PackedImages._read

    def counted(self, index: int, position: int):
        reads.append(index)
        return read(self, index, position)

    monkeypatch.setattr(PackedImages, "_read", counted)
    monkeypatch.setattr(Images, "_read", lambda self, index, _: (reads.append(index), self.read(index))[1])
    found = []
    for world_size, once in ((1, True), (1, False), (4, True)):
        reads.clear()
        data = make_data(*pipeline[:2], base=base, batch_size=4, world_size=world_size)
        dataset = data.train.loader.dataset
        if pipeline[-1] == "half":
            dataset._maker.share = 0.5
        if not once:
            dataset._read_once = lambda *key, dataset=dataset: dataset._read(*key)
        found.append((stack(data.train_batches(1)), data.corrupt, len(reads)))
    (views, notes, few), (one_by_one, as_many_notes, many), (a_quarter, _, each) = found
    assert_same([views], [one_by_one])
    assert notes == as_many_notes > 0
    assert few < many if pipeline[-1] == "half" else 2 * few < many
    assert each >= len(a_quarter[1]), "no two views of an image are a process's"


def test_tars(folder, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(folder / split, arcname=".")
    packed = make_data(GPU, FILES, base=folder_config(tmp_path), batch_size=4)
    assert_same(make_data(base=folder_config(folder), batch_size=4).train_batches(1), packed.train_batches(1))


def test_sets_of_timm(folder):
    base = [*folder_config(folder), "data.set=torch/image_folder", "model.num_classes=2"]
    for split in ("train", "val"):
        assert (folder / split).is_dir()
    assert_pipelines_agree(FILES, base=[*base, f"data.path={folder / 'train'}"])


def test_one_and_two_processes_and_a_resumed_epoch(folder):
    base = folder_config(folder)
    whole = stack(make_data(GPU, base=base, batch_size=8).train_batches(2))
    parts = [
        stack(make_data(GPU, base=base, rank=rank, world_size=2, batch_size=4).train_batches(2)) for rank in range(2)
    ]
    for place, (image, label) in enumerate(zip(*whole, strict=True)):
        images, labels = parts[place % 2]
        assert torch.equal(image, images[place // 2]) and label == labels[place // 2]
    data = make_data(GPU, "data.num_workers=1", base=base, batch_size=4)
    before = list(itertools.islice(data.train_batches(2), 2))
    assert_same(make_data(GPU, base=base, batch_size=4).train_batches(2), [*before, *data.train_batches(2, start=2)])


def test_generators_of_the_process_stay_untouched(folder):
    data = make_data(GPU, base=folder_config(folder), batch_size=4)
    before = generator_states()
    list(data.train_batches(0))
    assert generator_states() == before


# --- Images that cannot be read ---------------------------------------------------------------------------------------


def copy_with(folder: Path, root: Path, spoiled: dict[str, bytes]) -> Path:
    for path in folder.rglob("*.*"):
        target = root / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    for name, content in spoiled.items():
        (root / name).write_bytes(content)
    return root


def damaged(folder: Path, how: str) -> bytes:
    content = (folder / "train/ant/00.jpg").read_bytes()
    return {
        "truncated": content[: len(content) // 2],
        "a header alone": content[:40],
        "without an end": content[:-2],
        "text": b"no image",
        "empty": b"",
        "no tables": content[:20] + content[-200:],
        "an end too soon": content[: len(content) // 2] + b"\xff\xd9",
        "noise inside": content[:-300] + np.random.default_rng(0).bytes(298) + b"\xff\xd9",
    }[how]


@pytest.mark.parametrize(
    "how",
    ["truncated", "a header alone", "without an end", "text", "empty", "no tables", "an end too soon", "noise inside"],
)
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("kept", some([FILES, "data.resident=0.2"], every=2))
def test_damaged_files_are_what_they_were(folder, tmp_path, how, share, kept):
    base = folder_config(copy_with(folder, tmp_path, {"train/ant/00.jpg": damaged(folder, how)}))
    outcomes = []
    for pipeline in ("data.pipeline=cpu", GPU):
        data = make_data(pipeline, kept, "data.on_corrupt=skip", base=base, batch_size=4)
        if pipeline == GPU:
            data.train.loader.dataset._maker.share = share
        outcomes.append((stack(data.train_batches(0)), data.corrupt))
    (one, count), (other, other_count) = outcomes
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and count == other_count
    messages = [
        user_error_of(make_data(pipeline, kept, base=base, batch_size=4).train_batches(0))
        for pipeline in ("data.pipeline=cpu", GPU)
    ]
    assert messages[0] == messages[1]


def undecodable(folder: Path) -> bytes:
    """A file whose header says a plain JPEG, and of which Pillow makes nothing."""
    content, rng = (folder / "train/ant/00.jpg").read_bytes(), np.random.default_rng(3)
    while True:
        changed = bytearray(content)
        changed[rng.integers(2, 600)] = rng.integers(256)
        if plain_jpeg(bytes(changed)) is not None:
            try:
                open_image(io.BytesIO(changed))
            except Exception:
                return bytes(changed)


ALWAYS_PILLOWS = "aug.aa=rand-m60-mstd0-mmax60-n2-p1.0"  # rotations by 180 degrees, mostly


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", ["aug.hflip=0.5", ALWAYS_PILLOWS])
@pytest.mark.parametrize("kept", [FILES, "data.resident=0.2"])
def test_files_that_only_their_pixels_give_away(folder, tmp_path, policy, workers, kept):
    """Several in a row, the device's and others: replaced, left out, counted and said as by loader processes alone."""
    spoiled, others = undecodable(folder), {"train/bee/00.jpg": b"", "val/ant/00.jpg": b"no image"}
    files = dict.fromkeys(("train/ant/00.jpg", "train/bee/01.jpg", "train/bee/02.jpg", "val/bee/00.jpg"), spoiled)
    for path in folder.glob("train/bee/0[12].*"):
        others[f"train/bee/{path.name}"] = spoiled
    base = folder_config(copy_with(folder, tmp_path, files | others), policy, f"data.num_workers={workers}")
    outcomes = []
    for pipeline in ("data.pipeline=cpu", GPU):
        data = make_data(pipeline, kept, "data.on_corrupt=skip", base=base, batch_size=4)
        if pipeline == GPU:
            data.train.loader.dataset._maker.share = 1.0
        batches = [*data.train_batches(0), *data.train_batches(1)]
        said = list(data._skipped.values())
        outcomes.append((stack([*batches, *data.eval_batches()]), data.corrupt, said))
        data.close()
    (one, count, said), (other, other_count, other_said) = outcomes
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert count == other_count >= 8 and said == other_said


def test_a_jpeg_of_red_green_and_blue_is_not_plain(folder):
    """Without a marker that says so, decoders differ in what they take its components for."""
    content = bytearray((folder / "train/ant/00.jpg").read_bytes())
    assert plain_jpeg(bytes(content)) is not None
    frame, scan = content.index(b"\xff\xc0") + 10, content.index(b"\xff\xda") + 5
    for number, name in enumerate(b"RGB"):
        assert content[frame + 3 * number] == content[scan + 2 * number] == number + 1
        content[frame + 3 * number] = content[scan + 2 * number] = name
    assert plain_jpeg(bytes(content)) is not None  # JFIF: YCbCr, whatever they are called
    length = int.from_bytes(content[4:6], "big")
    assert content[2:4] == b"\xff\xe0"
    del content[2 : 4 + length]
    open_image(io.BytesIO(content))
    assert plain_jpeg(bytes(content)) is None


@pytest.mark.parametrize(("sampling", "plain"), [("4:4:4", True), ("4:2:2", True), ("4:2:0", True), ("4:4:0", False)])
def test_plain_files_have_pillows_pixels_in_loader_processes(sampling, plain):
    """Decoders differ in how they interpolate the colours of a file that was turned by 90 degrees."""
    stream = io.BytesIO()
    turned = sampling == "4:4:0"
    photograph(2, 32, 32).save(stream, "JPEG", quality=80, subsampling="4:2:2" if turned else sampling)
    content = bytearray(stream.getvalue())
    if turned:
        factors = content.index(b"\xff\xc0") + 11
        assert content[factors] == 0x21
        content[factors] = 0x12
    opened = Draws(train_transform(make_config()), 16, 0.0).open(bytes(content), 0)
    assert np.array_equal(opened.place, np.asarray(open_image(io.BytesIO(content))))
    assert (plain_jpeg(bytes(content)) is not None) == plain


def test_a_file_that_vanishes_in_mid_epoch(folder, tmp_path):
    root = copy_with(folder, tmp_path, {})
    data = make_data(GPU, FILES, base=folder_config(root), batch_size=4)
    batches = data.train_batches(0)
    next(batches)
    for path in (root / "train" / "bee").iterdir():
        path.unlink()
    assert "No such file" in user_error_of(batches)


def test_a_thousand_damaged_files(tmp_path):
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    photograph(1, 20, 20).save(buffer, "JPEG")
    for label in ("ant", "bee"):
        for split in ("train", "val"):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "0000.jpg").write_bytes(buffer.getvalue())
        for number in range(1, 501):
            (tmp_path / "train" / label / f"{number:04}.jpg").write_bytes(buffer.getvalue()[: rng.integers(0, 500)])
    message = user_error_of(
        make_data(GPU, "data.on_corrupt=skip", base=folder_config(tmp_path), batch_size=4).train_batches(0)
    )
    assert message.endswith("nor can the 99 images after it: check data.path.")


# --- Which pipeline ---------------------------------------------------------------------------------------------------


def test_the_default_is_the_device_on_a_gpu_alone(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert (choose_pipeline(make_config(), cuda), choose_pipeline(make_config(), cpu)) == ("gpu", "cpu")
    assert choose_pipeline(make_config("data.pipeline=cpu"), cuda) == "cpu"
    assert choose_pipeline(make_config(GPU), cpu) == "gpu"
    monkeypatch.setattr("images.pipeline._has_triton", lambda: False)
    assert choose_pipeline(make_config(), cuda) == "cpu"
    with pytest.raises(Exception, match="needs the package triton"):
        choose_pipeline(make_config(GPU), cuda)


def test_what_the_device_has_not_is_left_to_pillow():
    assert "AugMixAugment" in user_error_of_building(GPU, "aug.aa=augmix-m5-w4-d2")
    assert_same(
        make_data(ALWAYS_PILLOWS).train_batches(0),
        make_data(GPU, ALWAYS_PILLOWS).train_batches(0),
    )


def user_error_of_building(*overrides: str) -> str:
    from config import UserError

    with pytest.raises(UserError) as raised:
        make_data(*overrides)
    return str(raised.value)


def test_a_batch_is_made_in_pieces(folder, monkeypatch):
    expected = make_data(base=folder_config(folder), batch_size=8)
    for size in (1, 3, 8, 50):
        monkeypatch.setattr("images.pipeline.PIECE", size)
        for workers in (0, 2):
            options = [GPU, FILES, f"data.num_workers={workers}"]
            data = make_data(*options, base=folder_config(folder), batch_size=8)
            assert [len(images) for images, _ in data.eval_batches()] == [12, 6]
            assert_same(expected.train_batches(1), data.train_batches(1))
            assert_same(expected.eval_batches(), data.eval_batches())


@pytest.mark.parametrize(("kept", "why"), [("0", "no GPU makes its batches"), ("0.2", "the set is kept decoded")])
def test_a_share_of_files_for_a_gpu_that_decodes_none_is_told_of(folder, kept, why, capsys):
    make_data(GPU, f"data.resident={kept}", base=folder_config(folder), batch_size=4)
    assert not capsys.readouterr().err
    make_data(GPU, f"data.resident={kept}", "data.gpu_decode=0.3", base=folder_config(folder), batch_size=4)
    assert capsys.readouterr().err == f"note: data.gpu_decode is for nothing in this run: {why}.\n"


def test_a_set_that_is_too_large_is_not_kept(folder):
    data = make_data(GPU, "data.resident=1e-9", base=folder_config(folder), batch_size=4)
    assert "kept" not in data.pipeline["training"]
    kept = make_data(GPU, base=folder_config(folder), batch_size=4).pipeline["training"]["kept"]
    assert kept["images"] == 28 and kept["bytes"] > 28 * 18 * 18


def test_a_wrong_filter_is_noticed(folder, monkeypatch):
    """The control of all comparisons here."""
    data = make_data(GPU, base=folder_config(folder), batch_size=4)
    expected = stack(make_data(base=folder_config(folder), batch_size=4).train_batches(0))[0]
    from images import gpu

    replay = gpu.replay
    monkeypatch.setattr(
        gpu,
        "replay",
        lambda image, drawn, size: replay(image, drawn._replace(crop=drawn.crop._replace(bicubic=False)), size),
    )
    assert not torch.equal(stack(data.train_batches(0))[0], expected)
