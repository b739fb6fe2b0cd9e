"""images/tars.py and images/classes.py: a data set has one list of classes, whatever it is packed in."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import assert_same, folder_config, make_data, make_folder, spoil, user_error_of
from PIL import Image

from config import UserError
from images.classes import check_classes, class_difference

SPLITS = ("train", "val")
# What folders, tar readers and natural order see differently: numbers as names, folders inside a class, capitals, files
# that are no images, a dot in a name, an image beside the classes.
FILES = ["1/a.png", "10/10.png", "10/2.png", "10/sub/1.PNG", "2/img/x.png", "2/img/deep/y.png", "2/img.d/z.png"]
FILES += ["B/1.png", "a/1.png", "a/B/0.png", "a/notes.txt", "a.b/1.png", "beside.png"]
CLASSES = ("1", "10", "2", "B", "a", "a.b")


def make_tree(root: Path, files: list[str] = FILES) -> Path:
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for name in files:
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".txt":
                path.write_text("no image\n")
            else:
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path, "PNG")
    return root


def pack_files(tar_path: Path, folder: Path, prefix: str) -> None:
    """Files alone, in no order, without entries for their folders."""
    with tarfile.open(tar_path, "w") as tar:
        for path in sorted(folder.rglob("*"), key=lambda path: hash(path.name)):
            if path.is_file():
                tar.add(path, f"{prefix}{path.relative_to(folder)}")


def pack_with_folders(tar_path: Path, folder: Path, prefix: str) -> None:
    with tarfile.open(tar_path, "w") as tar:
        tar.add(folder, prefix)


def pack_a_class_each(target: Path, folder: Path, prefix: str) -> None:
    target.with_suffix("").mkdir()
    for entry in folder.iterdir():
        if entry.is_dir():
            pack_files(target.with_suffix("") / f"{entry.name}.tar", entry, prefix.format(entry.name))


def pack_both_splits(tar_path: Path, folder: Path, prefix: str) -> None:
    with tarfile.open(tar_path, "w") as tar:
        for split in SPLITS:
            tar.add(folder.parent / split, f"{prefix}{split}")


def pack_with_capitals(tar_path: Path, folder: Path, prefix: str) -> None:
    with tarfile.open(tar_path, "w") as tar:
        for split, name in zip(SPLITS, prefix.split(), strict=True):
            tar.add(folder.parent / split, name)


def pack_on_a_mac(tar_path: Path, folder: Path, prefix: str) -> None:
    """As macOS packs a folder: each file has a second one for what its file system knows of it."""
    with tarfile.open(tar_path, "w") as tar:
        tar.add(folder, prefix)
        for path in sorted(folder.rglob("*")):
            place = path.relative_to(folder)
            beside = place.with_name(f"._{place.name}")
            for name in (f"{prefix}/{beside}", f"__MACOSX/{prefix}/{beside}"):
                info = tarfile.TarInfo(name)
                info.size = 4
                tar.addfile(info, io.BytesIO(b"\0\5\x16\7"))


def pack_tars_in_a_tar(tar_path: Path, folder: Path, prefix: str) -> None:
    """As ImageNet's training images come."""
    with tarfile.open(tar_path, "w") as tar:
        for entry in folder.iterdir():
            if entry.is_dir():
                content = io.BytesIO()
                with tarfile.open(fileobj=content, mode="w") as inner:
                    inner.add(entry, prefix)
                info = tarfile.TarInfo(f"{entry.name}.tar")
                info.size = len(content.getvalue())
                tar.addfile(info, io.BytesIO(content.getvalue()))


PACKINGS = {
    "files": (pack_files, ""),
    "files from ./": (pack_files, "./"),
    "files below the root": (pack_files, "/data/"),
    "folders": (pack_with_folders, "."),
    "an inner folder": (pack_with_folders, "my_images"),
    "the split inside": (pack_with_folders, "{split}"),
    "two inner folders": (pack_with_folders, "imagenet/{split}"),
    "files in an inner folder": (pack_files, "./imagenet/{split}/"),
    "both splits inside": (pack_both_splits, ""),
    "both splits in an inner folder": (pack_both_splits, "imagenet/"),
    "both splits, in capitals": (pack_with_capitals, "Train VAL"),
    "both splits, by other names": (pack_with_capitals, "training validation"),
    "on a Mac": (pack_on_a_mac, "."),
    "on a Mac, an inner folder": (pack_on_a_mac, "{split}"),
    "one tar a class": (pack_a_class_each, ""),
    "one tar a class, from ./": (pack_a_class_each, "./"),
    "tars in a tar": (pack_tars_in_a_tar, "."),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.mark.parametrize("packing", PACKINGS)
def test_classes_order_and_pixels_do_not_depend_on_the_packing(tree, tmp_path, packing):
    pack, prefix = PACKINGS[packing]
    for split in SPLITS:
        pack(tmp_path / f"{split}.tar", tree / split, prefix.format("", split=split))
    whole, packed = (make_data(base=folder_config(root), batch_size=4) for root in (tree, tmp_path))
    assert whole.classes == packed.classes == CLASSES
    assert packed.num_classes == 6 and packed.eval_size == whole.eval_size == 11
    assert_same(whole.train_batches(1), packed.train_batches(1))
    assert_same(whole.eval_batches(), packed.eval_batches())


@pytest.mark.parametrize("files", ["a/img/1.png b/img/1.png", "a/x/y/1.png b/1.png", "a/1.png b/a/1.png"])
@pytest.mark.parametrize("packing", ["files", "an inner folder", "one tar a class"])
def test_a_class_is_a_folder_of_the_first_level(tmp_path, files, packing):
    source, target = make_tree(tmp_path / "folder", files.split()), tmp_path / "packed"
    target.mkdir()
    pack, prefix = PACKINGS[packing]
    for split in SPLITS:
        pack(target / f"{split}.tar", source / split, prefix)
    for root in (source, target):
        data = make_data(base=folder_config(root), batch_size=2)
        assert data.classes == ("a", "b") and data.eval_size == 2


BOTH, MORE = "train/a train/b val/a val/b", "train/a train/b test/a more/a"


# Of a tar file that holds all splits, and nothing else, the right one is taken.
@pytest.mark.parametrize(("inside", "packed"), [(BOTH, False), (MORE, False), (MORE, True)])
def test_splits_in_the_place_of_classes_are_refused(tmp_path, inside, packed):
    """Each would be one class, of images of all of them."""
    source = make_tree(tmp_path / "folder", [f"{name}/1.png" for name in inside.split()])
    root = tmp_path / "packed" if packed else source
    root.mkdir(exist_ok=True)
    for split in SPLITS if packed else ():
        pack_with_folders(root / f"{split}.tar", source / split, ".")
    with pytest.raises(UserError, match=r"train.*, each with folders of its own, in the place of classes"):
        make_data(base=folder_config(root), batch_size=2)


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    source = make_tree(tmp_path / "folder", ["train/1.png", "test/1.png", "train/steam/2.png", "car/1.png"])
    assert make_data(base=folder_config(source), batch_size=2).classes == ("car", "test", "train")


def test_one_tar_a_class_with_the_folder_of_the_class_inside(tree, tmp_path):
    for split in SPLITS:
        pack_a_class_each(tmp_path / f"{split}.tar", tree / split, "{}/")
    whole, packed = (make_data(base=folder_config(root), batch_size=4) for root in (tree, tmp_path))
    assert packed.classes == CLASSES
    assert_same(whole.eval_batches(), packed.eval_batches())


def test_a_tar_is_read_by_processes_that_were_forked_after_it_was_used(tree, tmp_path):
    for split in SPLITS:
        pack_files(tmp_path / f"{split}.tar", tree / split, "")
    whole = make_data(base=folder_config(tree), batch_size=1)
    packed = make_data("data.num_workers=2", base=folder_config(tmp_path), batch_size=1)
    assert packed.eval_loader.dataset[3, 3, 0][0] is not None
    assert_same(whole.eval_batches(), packed.eval_batches())


def test_links_in_a_tar_are_the_files_they_lead_to(tree, tmp_path):
    for split in SPLITS:
        pack_files(tmp_path / f"{split}.tar", tree / split, "")
        with tarfile.open(tmp_path / f"{split}.tar", "a") as tar:
            for name, kind, target in (("B/2.png", tarfile.LNKTYPE, "B/1.png"), ("a/2.png", tarfile.SYMTYPE, "1.png")):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                tar.addfile(info)
    data = make_data(base=folder_config(tmp_path), batch_size=4)
    images = [data.eval_loader.dataset[index, 0, 0] for index in range(data.eval_size)]
    assert data.eval_size == 13
    places = [place for place, (_, label, _) in enumerate(images) if label == CLASSES.index("B")]
    assert len(places) == 2 and images[places[0]][0].equal(images[places[1]][0])


def test_nothing_is_written_beside_a_tar_nor_believed(tree, tmp_path):
    """timm's reader keeps a pickle beside tar files of more than 10 GB, which a read-only disk does not let it."""
    for split in SPLITS:
        pack_files(tmp_path / f"{split}.tar", tree / split, "")
        os.truncate(tmp_path / f"{split}.tar", 11 * 2**30)  # a hole
    for kept in (False, True):
        if kept:
            (tmp_path / "_train_tarinfos.pickle").write_bytes(b"not a pickle")
        assert make_data(base=folder_config(tmp_path), batch_size=4).classes == CLASSES
        assert len(list(tmp_path.iterdir())) == 2 + kept


def test_unreadable_image_in_a_tar_is_not_replaced_unasked(tmp_path):
    source = make_folder(tmp_path / "folder")
    spoil(source / "train/ant/2.png", "empty")
    for split in SPLITS:
        pack_files(tmp_path / f"{split}.tar", source / split, "")
    message = user_error_of(make_data(base=folder_config(tmp_path), batch_size=4).train_batches(0))
    assert message.startswith(f"{tmp_path}/train.tar/ant/2.jpg cannot be read (")


@pytest.mark.parametrize("damage", ["cut", "gzip", "text", "empty"])
def test_what_is_no_tar_file_is_said(tree, tmp_path, damage):
    for split in SPLITS:
        pack_files(tmp_path / f"{split}.tar", tree / split, "")
    path = tmp_path / "train.tar"
    content = path.read_bytes()
    damaged = {"cut": content[:1000], "gzip": gzip.compress(content), "text": b"text" * 500, "empty": b""}
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"train\.tar must hold one folder a class, each with at least one image: \w"):
        make_data(base=folder_config(tmp_path))


def zeroed(content: bytes, at: int) -> bytes:
    return content[:at] + bytes(512) + content[at + 512 :]


DAMAGED = {  # what tarfile takes for the end, or passes by: of the content, and of where a later member begins
    "cut": lambda content, at: content[:at],
    "cut in a header": lambda content, at: content[: at + 100],
    "a flipped bit": lambda content, at: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
    "a zeroed block": zeroed,
    "two in one": lambda content, _: content + bytes(2**20) + content,
}


@pytest.mark.parametrize("packing", ["files", "one tar a class", "tars in a tar"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_tar_that_seems_to_end_before_its_last_image_is_refused(tree, tmp_path, damage, packing):
    """A run would train on what comes before, and nobody would know."""
    pack, prefix = PACKINGS[packing]
    for split in SPLITS:
        pack(tmp_path / f"{split}.tar", tree / split, prefix)
    path = tmp_path / "train/10.tar" if packing == "one tar a class" else tmp_path / "train.tar"
    content = path.read_bytes()
    assert make_data(base=folder_config(tmp_path), batch_size=4).classes == CLASSES
    with tarfile.open(path) as tar:
        later = tar.getmembers()[-1].offset
    path.write_bytes(DAMAGED[damage](content, later))
    with pytest.raises(
        UserError, match=f"{path.name} (is cut off or damaged at byte {later}$|ends at byte .* goes on)"
    ):
        make_data(base=folder_config(tmp_path), batch_size=4)


def test_a_damaged_tar_in_a_tar_is_refused_by_its_name(tree, tmp_path):
    for split in SPLITS:
        pack_tars_in_a_tar(tmp_path / f"{split}.tar", tree / split, ".")
    path = tmp_path / "train.tar"
    with tarfile.open(path) as tar:
        inner = tar.getmember("10.tar")
        with tarfile.open(fileobj=tar.extractfile(inner)) as opened:
            later = opened.getmembers()[-1].offset
    path.write_bytes(zeroed(path.read_bytes(), inner.offset_data + later))
    with pytest.raises(UserError, match=f"10\\.tar ends at byte {later} and goes on"):
        make_data(base=folder_config(tmp_path), batch_size=4)


def test_a_file_packed_without_its_zeros_is_refused(tree, tmp_path):
    """Its bytes are not where an image would be read from, and a bitmap would be another one."""
    for split in SPLITS:
        pack_files(tmp_path / f"{split}.tar", tree / split, "")
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        info = tarfile.TarInfo("1/b.ppm")
        info.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(info)
    with pytest.raises(UserError, match=r"1/b\.ppm was packed without its zeros"):
        make_data(base=folder_config(tmp_path), batch_size=4)


def test_class_without_an_image_in_a_tar(tree, tmp_path):
    for split in SPLITS:
        pack_with_folders(tmp_path / f"{split}.tar", tree / split, ".")
        with tarfile.open(tmp_path / f"{split}.tar", "a") as tar:
            info = tarfile.TarInfo("cow")
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
    with pytest.raises(UserError, match=r"each with at least one image: Found no valid file for the classes cow"):
        make_data(base=folder_config(tmp_path))


# --- How many, and which ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [None, "files", "the split inside", "one tar a class", "tars in a tar"])
def test_fewer_than_two_classes_are_refused(tmp_path, packing):
    source, target = make_tree(tmp_path / "folder", ["only/1.png", "only/2.png"]), tmp_path / "packed"
    target.mkdir()
    if packing is not None:
        pack, prefix = PACKINGS[packing]
        for split in SPLITS:
            pack(target / f"{split}.tar", source / split, prefix.format("", split=split))
    with pytest.raises(UserError, match=r"data\.set imagenet has 1 class \(only\), and .* fewer than two: check"):
        make_data(base=folder_config(target if packing else source))


def test_fewer_than_two_generated_classes_are_refused():
    with pytest.raises(UserError, match=r"generated has 1 class, and .*: raise model\.num_classes"):
        make_data("model.num_classes=1")


def test_names_of_classes():
    digits = make_data("data.set=digits", "model.num_classes=null", "aug.repeats=1")
    assert digits.classes == tuple("0123456789")
    assert make_data().classes == ()  # noise has no names


@pytest.mark.parametrize(
    ("then", "now", "difference"),
    [
        (["a", "b"], ("a", "b"), None),
        ([], ("a", "b"), None),
        (["a", "b"], (), None),
        (["a", "b"], ("a", "b", "c"), "2 classes and the data have 3"),
        (["a", "b"], ("b", "a"), "the same classes in another order: label 0 is a there and b in the data"),
        (
            ["1", "2", "10"],
            ("1", "10", "2"),
            "the same classes in another order: label 1 is 2 there",
        ),
        (["a", "b"], ("a", "c"), "1 other classes: label 1 is b there and c in the data"),
    ],
)
def test_difference_of_two_lists_of_classes(then, now, difference):
    found = class_difference(then, now)
    assert found == difference or found.startswith(difference)
    if difference is None:
        check_classes("last.pt", then, now)
    else:
        with pytest.raises(UserError, match=r"last\.pt has .*; give data\.path the data set that it was trained on"):
            check_classes("last.pt", then, now)
