"""A run knows the names of its classes: in manifest and checkpoint, compared on resume, eval and finetune."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import exit_code, tiny, train
from PIL import Image

from record.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("in_this_process")


def folder_of(root: Path, names: tuple[str, ...]) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(8):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / split / name / f"{i}.png")
    return root


def flags_for(root: Path) -> list[str]:
    return ["--data-set", "imagenet", "--data-path", str(root), "--nb-classes", "null", "--global-batch", "8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set abc and a run of one epoch on it."""
    root = tmp_path_factory.mktemp("classes")
    folder_of(root / "abc", ("a", "b", "c"))
    train(root / "run", *flags_for(root / "abc"), "--epochs", "1", "--no-repeated-aug")
    return root


OTHERS = {
    "another name": (("a", "b", "d"), "1 other classes: label 2 is c there and d in the data"),
    "other names": (("a", "b2", "c2"), "2 other classes: label 1 is b there and b2 in the data"),
}


def test_the_names_are_in_manifest_and_checkpoint(trained: Path) -> None:
    assert json.loads((trained / "run" / "manifest.json").read_text())["class_names"] == ["a", "b", "c"]
    assert load_checkpoint(trained / "run" / "last.pt")["classes"] == ["a", "b", "c"]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_classes_are_refused_in_resuming_and_evaluating_and_said_in_finetuning(
    trained: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names, said = OTHERS[kind]
    data, last = flags_for(folder_of(tmp_path / "data", names)), str(trained / "run" / "last.pt")
    before = (trained / "run" / "last.pt").read_bytes()
    common = [*data, "--no-repeated-aug", "--epochs", "2"]
    for more in (["--resume", last], ["--resume", last, "--eval"]):
        assert exit_code(tiny(tmp_path / "out", *common, *more)) == 2
        error = capsys.readouterr().err
        assert f"{last} has {said}; give data.path the data set that it was trained on." in error
    assert exit_code(tiny(tmp_path / "tuned", *common, "--epochs", "1", "--finetune", last)) == 0
    assert f"note: {last} has {said}." in capsys.readouterr().err
    assert (trained / "run" / "last.pt").read_bytes() == before


def test_the_same_classes_and_checkpoints_without_names_go_on(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, last = flags_for(trained / "abc"), trained / "run" / "last.pt"
    state = load_checkpoint(last)
    del state["classes"], state["format"]
    save_checkpoint(tmp_path / "old.pt", state)
    for path in (last, tmp_path / "old.pt"):
        assert exit_code(tiny(tmp_path / "out", *data, "--no-repeated-aug", "--resume", str(path), "--eval")) == 0
    train(tmp_path / "more", *data, "--no-repeated-aug", "--epochs", "2", "--resume", str(tmp_path / "old.pt"))
    assert "other classes" not in capsys.readouterr().err


def test_what_stays_unquantized_in_the_blocks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "pvt_v2_b0", "--input-size", "32", "--model.patch_size", "null", "--model.kwargs", "{}"]
    kwargs = "{depths: [1, 1, 1, 1], embed_dims: [8, 16, 16, 16], num_heads: [1, 1, 1, 1]}"
    model[-1] = kwargs
    train(tmp_path / "run", *model, "--quant.scheme", "mx", "--epochs", "1", "--data.num_images", "16")
    assert "note: not quantized in the blocks: stages.0.blocks.0.attn.q" in capsys.readouterr().err
    left = json.loads((tmp_path / "run" / "manifest.json").read_text())["unquantized_block_linears"]
    assert "stages.0.blocks.0.attn.kv" in left
