"""prepare_tiny_imagenet.sh: from a download, made up here, to train/ and val/; what is incomplete is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from script_helpers import SCRIPTS, bash, clean_env
from torchvision.datasets import ImageFolder

CLASSES = ["n00000001", "n00000002", "n00000010"]
COUNTS = ["--train-images", "2", "--val-images", "2"]


def jpeg(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, shade, shade)).save(file, "JPEG")
    return file.getvalue()


def contents() -> dict[str, bytes]:
    """The files of a download of three classes, two images of each in either split."""
    files = {"wnids.txt": "\n".join(CLASSES).encode()}
    lines = []
    for c, name in enumerate(CLASSES):
        files[f"train/{name}/{name}_boxes.txt"] = b"0 0 1 1"
        for n in range(2):
            files[f"train/{name}/images/{name}_{n}.JPEG"] = jpeg(40 * c + n)
            files[f"val/images/val_{2 * c + n}.JPEG"] = jpeg(150 + 10 * c + n)
            lines.append(f"val_{2 * c + n}.JPEG\t{name}\t0\t0\t63\t63")
    files["val/val_annotations.txt"] = "\n".join(reversed(lines)).encode()
    files["test/images/test_0.JPEG"] = jpeg(0)
    return {f"tiny-imagenet-200/{name}": data for name, data in files.items()}


def zipped(folder: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    path = folder / "download.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder / "tiny-imagenet-200"


def prepare(source: Path, target: Path, *words: str) -> tuple[int, str]:
    result = bash(SCRIPTS / "prepare_tiny_imagenet.sh", source, target, *(words or COUNTS), env=clean_env())
    return result.returncode, (result.stdout + result.stderr).strip()


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(*classes: str) -> dict[str, bytes]:
    files, found = contents(), {}
    for name in classes:
        c = CLASSES.index(name)
        for n in range(2):
            train, val = f"{name}_{n}.JPEG", f"val_{2 * c + n}.JPEG"
            found[f"train/{name}/{train}"] = files[f"tiny-imagenet-200/train/{name}/images/{train}"]
            found[f"val/{name}/{val}"] = files[f"tiny-imagenet-200/val/images/{val}"]
    return found


@pytest.mark.parametrize("form", [zipped, unpacked])
def test_all_classes(tmp_path: Path, form) -> None:
    source = form(tmp_path, contents())
    assert prepare(source, tmp_path / "out") == (0, f"{tmp_path}/out: 12 images written; give it as --data-path.")
    assert tree(tmp_path / "out") == expected(*CLASSES)
    train, val = (ImageFolder(tmp_path / "out" / split) for split in ("train", "val"))
    assert train.classes == val.classes == CLASSES and len(train) == len(val) == 6


@pytest.mark.parametrize(
    "text",
    ["n00000010\nn00000001\n", "0\tn00000010\tgoldfish, gold\n1\tn00000001\tbird\n\n", "n00000001\ta\nn00000010\tb"],
)
def test_chosen_classes(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.tsv").write_text(text)
    source = zipped(tmp_path, contents())
    assert prepare(source, tmp_path / "out", *COUNTS, "--classes", str(tmp_path / "classes.tsv"))[0] == 0
    assert tree(tmp_path / "out") == expected("n00000001", "n00000010")


def with_a_tenth() -> dict[str, bytes]:
    """A third image of the first class for training, the 10th; its 0th is a test image too."""
    files = contents()
    folder = "tiny-imagenet-200/train/n00000001/images/n00000001"
    files[f"{folder}_10.JPEG"] = jpeg(200)
    return {**files, "tiny-imagenet-200/test/images/test_1.JPEG": files[f"{folder}_0.JPEG"]}


def first(source: Path, target: Path, number: str) -> tuple[int, str]:
    (target.parent / "classes").write_text("n00000001")
    of = ["--train-images", "3", "--val-images", "2", "--classes", str(target.parent / "classes")]
    return prepare(source, target, *of, f"--first={number}")


@pytest.mark.parametrize("form", [zipped, unpacked])
def test_the_first_images_of_a_class_are_by_number_and_none_is_there_twice(tmp_path: Path, form) -> None:
    source = form(tmp_path, with_a_tenth())
    one, two = (tmp_path / "tiny-imagenet-200" / name for name in ("one", "two"))  # in the folder of the download
    one.parent.mkdir(exist_ok=True)
    for written in ("3 images written", "complete"):  # started again too
        code, text = first(source, one, "1")
        assert code == 0 and "more than once: 1.\n" in text and f"\n{one}: {written}; give it as" in text
    assert {*tree(one)} == {"train/n00000001/n00000001_1.JPEG"} | {
        name for name in expected("n00000001") if name.startswith("val")
    }  # neither the 0th, a test image, nor the 10th
    assert first(source, two, "2")[0] == 0
    assert {*tree(two)} - {*tree(one)} == {"train/n00000001/n00000001_10.JPEG"}


def test_what_the_first_images_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    def said(files: dict[str, bytes], number: str = "2") -> str:
        code, text = first(zipped(tmp_path, files), tmp_path / "out", number)
        assert code == 2 and not (tmp_path / "out").exists()
        return text

    files = with_a_tenth()
    for number in ("0", "-1"):
        assert said(files, number) == f"error: --first is a number of images of a class, at least 1, and not {number}."
    assert said(files, "3") == "error: Class n00000001 has 2 training images that are there once; --first is 3."
    assert "has no test/images" in said({name: data for name, data in files.items() if "/test/" not in name})
    last = "tiny-imagenet-200/train/n00000001/images/n00000001_10"
    renamed = {name.replace(last, f"{last} (1)"): data for name, data in files.items()}
    assert "n00000001_10 (1).JPEG is not named after its class with a number" in said(renamed)


def test_the_classes_of_the_studies_are_a_list_it_takes(tmp_path: Path) -> None:
    file = SCRIPTS.parent / "configs/studies/tiny_imagenet_100.txt"
    names = file.read_text().split()
    assert len({*names}) == 100 and names == sorted(names)
    code, said = prepare(zipped(tmp_path, contents()), tmp_path / "out", *COUNTS, "--classes", str(file))
    assert code == 2 and f"has 0 train images of class {names[0]} and 2 were expected" in said


def test_started_again_it_writes_what_is_missing(tmp_path: Path) -> None:
    source, out = zipped(tmp_path, contents()), tmp_path / "out"
    prepare(source, out)
    assert prepare(source, out) == (0, f"{out}: complete; give it as --data-path.")
    (out / "train/n00000001/n00000001_1.JPEG").rename(out / "train/n00000001/n00000001_1.JPEG.part")
    assert prepare(source, out) == (0, f"{out}: 1 images written; give it as --data-path.")
    assert tree(out) == expected(*CLASSES)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    source, out = zipped(tmp_path, contents()), tmp_path / "out"
    prepare(source, out)
    (tmp_path / "classes").write_text("n00000001")
    code, said = prepare(source, out, *COUNTS, "--classes", str(tmp_path / "classes"))
    assert code == 2
    assert (
        said
        == f"error: {out} holds 8 files that do not belong there, train/n00000002/n00000002_0.JPEG first; name another."
    )
    assert tree(out) == expected(*CLASSES)


def without(*endings: str) -> dict[str, bytes]:
    return {name: data for name, data in contents().items() if not name.endswith(endings)}


INCOMPLETE = {
    "an image for training": (
        without("train/n00000002/images/n00000002_1.JPEG"),
        "has 1 train images of class n00000002 and 2 were expected: it is incomplete.",
    ),
    "a class for training": (
        without("n00000002_0.JPEG", "n00000002_1.JPEG"),
        "has 0 train images of class n00000002 and 2 were expected: it is incomplete.",
    ),
    "an image for evaluation": (without("val_3.JPEG"), "lacks 1 of 6 evaluation images, val/images/val_3.JPEG first."),
    "the labels": (without("val_annotations.txt"), "has no val/val_annotations.txt, so it is not, or not all of,"),
    "an image that is none": (
        {**contents(), "tiny-imagenet-200/train/n00000001/images/n00000001_0.JPEG": b"<html>"},
        "n00000001_0.JPEG in",
    ),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_what_is_incomplete_is_refused(tmp_path: Path, what: str) -> None:
    files, sentence = INCOMPLETE[what]
    code, said = prepare(zipped(tmp_path, files), tmp_path / "out")
    assert code == 2 and said.startswith("error: ") and sentence in said and "\n" not in said


def test_half_a_download_is_refused(tmp_path: Path) -> None:
    source = zipped(tmp_path, contents())
    source.write_bytes(source.read_bytes()[:-3000])
    code, said = prepare(source, tmp_path / "out")
    assert code == 2 and "is no whole zip file" in said and "\n" not in said
    source = zipped(tmp_path, contents(), zipfile.ZIP_DEFLATED)
    data = bytearray(source.read_bytes())
    name = b"val_annotations.txt"
    start = data.index(name) + len(name)
    data[start : start + 8] = b"\xff" * 8
    source.write_bytes(data)
    code, said = prepare(source, tmp_path / "out")
    assert code == 2 and "is no whole zip file" in said and "\n" not in said
    code, said = prepare(tmp_path / "none.zip", tmp_path / "out")
    assert code == 2 and said.startswith(f"error: There is no {tmp_path}/none.zip")


def test_the_real_one_has_500_and_50_images_of_a_class(tmp_path: Path) -> None:
    code, said = prepare(zipped(tmp_path, contents()), tmp_path / "out", "--classes", "/dev/null")
    assert code == 2 and said == "error: /dev/null names no class."
    (tmp_path / "classes").write_text("n00000001\ngoldfish\n")
    code, said = prepare(zipped(tmp_path, contents()), tmp_path / "out", "--classes", str(tmp_path / "classes"))
    assert code == 2 and said.endswith("line 2, names no class such as n01443537: 'goldfish'.")
    (tmp_path / "classes").write_text("n00000001\n")
    code, said = prepare(zipped(tmp_path, contents()), tmp_path / "out", "--classes", str(tmp_path / "classes"))
    assert code == 2 and "has 2 train images of class n00000001 and 500 were expected" in said
