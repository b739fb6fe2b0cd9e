"""images/chosen.py: a share of the training images held out, and classes in the order of a file."""

from __future__ import annotations

import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import assert_same, folder_config, make_config, make_data, make_folder, stack
from helpers import exit_code, tiny, train
from PIL import Image

from config import UserError, load_config, recipe_differences
from images.sets import open_sets

COUNTS = {"ant": 20, "bee": 10, "cow": 2, "dog": 7}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train/ alone, with another number of images in each class, one of them further down."""
    rng = np.random.default_rng(0)
    for name, count in COUNTS.items():
        for i in range(count):
            path = tmp_path / "data/train" / name / ("deep" if i == 1 else "") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def pack(root: Path, target: Path) -> Path:
    target.mkdir()
    with tarfile.open(target / "train.tar", "w") as tar:
        tar.add(root / "train", "train")
    return target


def names_of(source) -> list[tuple[str, int]]:
    """(class/file, label) of every image, wherever the set lies."""
    named = source.samples if hasattr(source, "loader") else [(member.path, label) for member, label in source.samples]
    return [(name.rpartition("train/")[2], label) for name, label in named]


def split(root: Path, *overrides: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    train, held_out = open_sets(make_config(base=folder_config(root, *overrides)), 4, 4)
    return names_of(train), names_of(held_out)


def listed(path: Path, *names: str) -> str:
    path.write_text("".join(f"{name}\n" for name in names))
    return f"data.class_map={path}"


# --- A share held out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.99])
def test_each_class_gives_its_share_and_no_image_is_in_both_or_lost(root: Path, share: float) -> None:
    train, held_out = split(root, f"data.val_split={share}")
    whole = names_of(open_sets(make_config(base=folder_config(with_val(root))), 4, 4)[0])
    assert sorted(train + held_out) == sorted(whole) and not set(train) & set(held_out)
    assert train == [s for s in whole if s in set(train)] and held_out == [s for s in whole if s in set(held_out)]
    for label, count in enumerate(COUNTS.values()):
        expected = min(max(1, round(share * count)), count - 1)
        assert sum(held == label for _, held in held_out) == expected


def with_val(root: Path) -> Path:
    shutil.copytree(root / "train", root / "val")
    return root


def test_the_images_held_out_stay_these(root: Path) -> None:
    """Written down: another version of this program or of a library must not move images between the parts."""
    held_out = split(root, "data.val_split=0.3")[1]
    assert [name for name, label in held_out if label == 1] == ["bee/3.png", "bee/8.png", "bee/9.png"]


def test_all_seeds_methods_and_packings_hold_out_the_same(root: Path, tmp_path: Path) -> None:
    expected = split(root, "data.val_split=0.3")
    assert split(root, "data.val_split=0.3", "run.seed=5", "quant.scheme=mx", "model.img_size=32") == expected
    assert split(pack(root, tmp_path / "packed"), "data.val_split=0.3") == expected
    state = torch.get_rng_state()
    np.random.seed(9)
    assert split(root, "data.val_split=0.3") == expected
    assert torch.equal(torch.get_rng_state(), state)
    shutil.rmtree(root / "train/dog")  # nor do other classes matter
    assert split(root, "data.val_split=0.3")[1] == [s for s in expected[1] if s[1] != 3]


def test_val_is_not_read_where_a_share_is_held_out(root: Path) -> None:
    alone = split(root, "data.val_split=0.3")
    (root / "val").mkdir()
    (root / "val/unlike").mkdir()
    assert split(root, "data.val_split=0.3") == alone


def test_a_folder_and_its_tar_give_the_same_batches_of_both_parts(root: Path, tmp_path: Path) -> None:
    roots = root, pack(root, tmp_path / "packed")
    whole, packed = (make_data(base=folder_config(r, "data.val_split=0.3"), batch_size=4) for r in roots)
    assert whole.eval_size == packed.eval_size == 6 + 3 + 1 + 2 and whole.batches_per_epoch == 27 // 4
    assert_same(whole.train_batches(1), packed.train_batches(1))
    assert_same(whole.eval_batches(), packed.eval_batches())


def test_evaluation_alone_scores_the_same_images(root: Path) -> None:
    both, alone = (
        make_data(base=folder_config(root, "data.val_split=0.3", f"run.eval={word}"), batch_size=4)
        for word in ("false", "true")
    )
    assert alone.train_loader is None
    assert_same(both.eval_batches(), alone.eval_batches())


def test_without_a_share_nothing_is_held_out(tmp_path: Path) -> None:
    train, held_out = open_sets(make_config(base=folder_config(make_folder(tmp_path))), 4, 4)
    assert (len(train), len(held_out)) == (12, 8)


def test_a_class_of_a_single_image_is_named(root: Path) -> None:
    shutil.rmtree(root / "train/cow/deep")
    with pytest.raises(UserError, match=r"images of every class, and cow has a single one: .* leave --val-split out"):
        split(root, "data.val_split=0.3")


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "1.5", "true", "some", "nan", "[0.1]"])
def test_a_share_out_of_range_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"data\.val_split is "):
        load_config(overrides=[f"data.val_split={value}"])


@pytest.mark.parametrize("name", ["digits", "generated", "cifar10", "torch/cifar10", "hfds/some", "wds/some"])
@pytest.mark.parametrize(
    ("key", "value", "flag"), [("val_split", "0.1", "--val-split"), ("class_map", "m", "--class-map")]
)
def test_sets_that_are_no_folders_have_neither(name: str, key: str, value: str, flag: str) -> None:
    cfg = make_config(f"data.set={name}", f"data.{key}={value}")
    with pytest.raises(UserError, match=rf"data\.{key} is for image folders .* data\.set is {name}: leave {flag} out"):
        open_sets(cfg, 4, 4)


@pytest.mark.parametrize("override", ["data.val_split=0.2", "data.class_map=names.txt"])
def test_both_are_part_of_the_recipe(override: str) -> None:
    one, other = (load_config(overrides=o).model_dump(mode="json") for o in ([], [override]))
    assert [d.split()[0] for d in recipe_differences(one, other)] == [override.split("=")[0]]
    del one["data"][override.split("=")[0].split(".")[1]]  # as runs of before the key have it
    assert not recipe_differences(one, load_config().model_dump(mode="json"))


# --- Classes in the order of a file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n\n"])
def test_labels_follow_the_file_and_images_their_names(root: Path, tmp_path: Path, packed: bool, end: str) -> None:
    order = ["dog", "ant", "cow", "bee"]
    path = tmp_path / "names.txt"
    path.write_bytes((("\r\n" if end == "\r\n" else "\n").join(order) + end).encode())
    base = folder_config(pack(root, tmp_path / "packed") if packed else root, "data.val_split=0.3")
    plain = make_data(base=base, batch_size=4)
    mapped = make_data(f"data.class_map={path}", base=base, batch_size=4)
    assert mapped.classes == tuple(order) and plain.classes == tuple(COUNTS)
    for one, other in (
        (plain.train_batches(0), mapped.train_batches(0)),
        (plain.eval_batches(), mapped.eval_batches()),
    ):
        (images, labels), (same_images, new_labels) = stack(one), stack(other)
        assert torch.equal(images, same_images)
        assert [order[label] for label in new_labels] == [list(COUNTS)[label] for label in labels]


def test_a_map_orders_train_and_val_alike(tmp_path: Path) -> None:
    make_folder(tmp_path / "data")
    data = make_data(listed(tmp_path / "m.txt", "bee", "ant"), base=folder_config(tmp_path / "data"), batch_size=4)
    assert data.classes == ("bee", "ant")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["ant", "bee", "cow"], "has the class dog, which data.class_map"),
        (["ant", "bee"], "has the class cow and 1 more, which data.class_map"),
        (["ant", "bee", "cow", "dog", "elk"], "names the class elk, of which"),
        (["elk", "ant", "bee", "cow", "fox", "dog"], "names the class elk and 1 more, of which"),
        (["ant", "bee", "cow", "dog", "ant"], "names ant twice, in lines 1 and 5"),
        (["ant", "", "bee", "cow", "dog"], "has no class name in line 2"),
        ([""], "has no class name in line 1"),
        ([], "has no class name in line 1"),
    ],
)
def test_names_and_folders_must_agree(
    root: Path, tmp_path: Path, packed: bool, names: list[str], sentence: str
) -> None:
    base = folder_config(pack(root, tmp_path / "packed") if packed else root, "data.val_split=0.3")
    with pytest.raises(UserError) as error:
        make_data(listed(tmp_path / "names.txt", *names), base=base)
    assert sentence in str(error.value) and str(tmp_path / "names.txt") in str(error.value)


@pytest.mark.parametrize(
    "what", ["missing", "folder", "pipe", "/dev/zero", "pickle", "names.pkl", "latin", "nul", "long"]
)
def test_what_is_no_class_map_is_said_in_a_sentence(root: Path, tmp_path: Path, what: str) -> None:
    path = (
        Path("/dev/zero") if what == "/dev/zero" else tmp_path / ("names.pkl" if what == "names.pkl" else "names.txt")
    )
    contents = {
        "pickle": pickle.dumps({"ant": 0, "bee": 1}),
        "names.pkl": b"ant\nbee\ncow\ndog\n",
        "latin": "b\xe4r\n".encode("latin-1"),
        "nul": b"ant\0\nbee\n",
        "long": b"a\n" * 2**23 + b"b\n",
    }
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what in contents:
        path.write_bytes(contents[what])
    with pytest.raises(
        UserError, match=rf"data\.class_map {path} .*expected was a text file with one class name a line"
    ):
        split(root, "data.val_split=0.3", f"data.class_map={path}")


@pytest.mark.parametrize("value", ["' '", "https://a.b/c.txt", '"a\\0b"'])
def test_a_class_map_is_a_path(value: str) -> None:
    with pytest.raises(UserError, match=r"data\.class_map: .*path"):
        load_config(overrides=[f"data.class_map={value}"])


# --- The program ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_this_process")
def test_a_run_trains_resumes_and_is_scored_on_the_same_images(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed(tmp_path / "names.txt", "dog", "ant", "cow", "bee")
    flags = ["--data-set", "IMNET", "--data-path", str(root), "--val-split", "0.3", "--global-batch", "4"]
    flags += ["--class-map", str(tmp_path / "names.txt"), "--nb-classes", "4", "--aug.repeats", "1"]
    run = train(tmp_path / "run", *flags, "--epochs", "1")
    train(run, *flags, "--epochs", "2", "--resume", "auto")
    assert exit_code(tiny(tmp_path / "scored", *flags, "--eval", "--resume", str(run / "last.pt"))) == 0
    capsys.readouterr()
    again = [*flags, "--val-split", "0.2", "--epochs", "3", "--resume", "auto"]
    assert exit_code(tiny(run, *again)) == 2
    assert "was trained with data.val_split 0.3 (here 0.2)" in capsys.readouterr().err
    assert exit_code(tiny(tmp_path / "smoke", *flags, "--smoke")) == 0
