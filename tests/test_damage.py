"""Files that are damaged, hold harmless things beside the weights, or an average of them."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import os
import pathlib
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from record_helpers import refused, same, small_swin, small_vit, snapshot, training_state

from record.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from record.weights import finetune_from, load_weights

READERS = [load_checkpoint, load_weights]


def with_flipped_bit(path: Path, data: bytes, bit: int) -> None:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / LAST
    save_checkpoint(path, training_state(small_vit(depth=1, embed_dim=8)))
    return path


@pytest.mark.parametrize("member", ["data.pkl", "data/0", "data/7", "version", "byteorder"])
def test_every_flipped_bit_of_the_contents_is_found(saved: Path, tmp_path: Path, member: str) -> None:
    data = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(f"/{member}"))
        start = data.index(archive.read(info), info.header_offset)
    path = tmp_path / "flipped.pt"
    for bit in range(8 * start, 8 * (start + info.file_size), max(1, 8 * info.file_size // 23)):
        with_flipped_bit(path, data, bit)
        for read in READERS:
            message = refused(lambda read=read: read(path))
            assert "damaged" in message and "code" not in message, bit


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(saved: Path, tmp_path: Path) -> None:
    data, whole, path = saved.read_bytes(), load_checkpoint(saved), tmp_path / "flipped.pt"
    torch.manual_seed(0)
    for bit in torch.randint(8 * len(data), (150,)).tolist():
        with_flipped_bit(path, data, bit)
        try:
            read = load_checkpoint(path)
        except Exception:
            assert "damaged" in refused(lambda: load_checkpoint(path))
        else:  # in the padding between the members, or in a date
            assert same(read["model"], whole["model"]) and read["epoch"] == whole["epoch"]


@pytest.mark.parametrize(("name", "other"), [(LAST, BEST), (BEST, LAST)])
def test_the_intact_neighbour_of_a_damaged_checkpoint_is_named(
    saved: Path, tmp_path: Path, name: str, other: str
) -> None:
    data = saved.read_bytes()
    middle = 8 * (len(data) // 2)
    with_flipped_bit(tmp_path / name, data, middle)
    assert other not in refused(lambda: load_checkpoint(tmp_path / name))
    with_flipped_bit(tmp_path / other, data, middle + 9)
    assert other not in refused(lambda: load_checkpoint(tmp_path / name))
    (tmp_path / other).write_bytes(data)
    beside = f"{tmp_path / other} beside it is intact: --resume {tmp_path / other}."
    assert beside in refused(lambda: load_checkpoint(tmp_path / name))
    (tmp_path / name).write_bytes(data[:1000])
    assert beside in refused(lambda: load_weights(tmp_path / name))


def test_an_archive_saved_without_checksums_is_read(tmp_path: Path) -> None:
    state = training_state(small_vit())
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint(tmp_path / LAST, state)
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(load_checkpoint(tmp_path / LAST)["model"], state["model"])


def test_an_archive_whose_contents_are_larger_than_the_file_is_refused(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for info in archive.infolist():
            packed.writestr(info.filename, archive.read(info))
        packed.writestr("archive/data/99", bytes(2**24))
    assert "damaged" in refused(lambda: load_weights(path))


@pytest.mark.parametrize("read", READERS)
def test_what_is_no_ordinary_file_is_refused_and_not_waited_for(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/zero")):
        assert "is no ordinary file" in refused(lambda path=path: read(path))
    for name in ("a\0b", "a" * 300):
        assert "cannot be read" in refused(lambda name=name: read(Path(name)))


# Beside the weights ---------------------------------------------------------------------------------------------------


class Settings(dict):
    """A mapping of a class of one's own, as configurations of other programs are."""


BESIDE = {
    "numpy_number": np.float64(71.2),
    "numpy_whole_number": np.int64(3),
    "numpy_truth": np.bool_(True),
    "numpy_array": np.zeros((2, 3)),
    "numpy_words": np.array(["a", "b"]),
    "numpy_objects": np.array([{"a": 1}, None], dtype=object),
    "numpy_type": np.dtype("float32"),
    "numpy_scalar_type": np.float32,
    "path": pathlib.Path("runs/a"),
    "pure_path": pathlib.PurePosixPath("a"),
    "windows_path": pathlib.PureWindowsPath("a"),
    "namespace": argparse.Namespace(output_dir=pathlib.Path("runs"), lr=np.float32(1e-3)),
    "date": datetime.datetime(2025, 1, 1, tzinfo=datetime.timezone.utc),
    "duration": datetime.timedelta(seconds=3),
    "ordered": collections.OrderedDict(a=np.float64(1)),
    "nested": {"history": [np.float64(1), {"best": (np.int64(2), pathlib.Path("x"))}]},
    "version": torch.torch_version.TorchVersion("2.1.0"),
    "size": torch.Size([2, 3]),
    "set": {1, 2},
    "complex": 1 + 2j,
    "frozen_set": frozenset({1, (2, "a")}),
    "range": range(3),
    "slice": slice(1, None),
    "lists": collections.defaultdict(list, a=[np.float64(1)]),
    "last_losses": collections.deque([0.5, np.float64(1)], maxlen=20),
    "decimal": decimal.Decimal("71.2"),
    "fraction": fractions.Fraction(1, 3),
    "run_id": uuid.UUID(int=1),
    "masked": np.ma.array([1, 2], mask=[True, False]),
    "numpy_random_states": [np.random.get_state(), np.random.RandomState(0), np.random.default_rng(0)],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_what_is_harmless_beside_the_weights_is_passed_over(tmp_path: Path, name: str, zipped: bool) -> None:
    weights = small_vit().state_dict()
    path = tmp_path / "file.pth"
    torch.save({"model": weights, name: BESIDE[name]}, path, _use_new_zipfile_serialization=zipped)
    assert same(load_weights(path), weights)


@pytest.mark.parametrize("value", [Settings(a=1), torch.nn.MSELoss(), RuntimeError("x")], ids=repr)
def test_another_type_is_named_with_how_to_save_again(tmp_path: Path, value: Any) -> None:
    torch.save({"model": small_vit().state_dict(), "config": value}, tmp_path / "file.pth")
    message = refused(lambda: load_weights(tmp_path / "file.pth"))
    assert (
        f"it names {type(value).__module__}.{type(value).__name__}"[:40].removeprefix("it names builtins.") in message
    )
    assert "would run code when loaded" in message and "torch.save({'model': model.state_dict()}, FILE)" in message


# The average, prefixes, heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["ema", "model_ema", "state_dict_ema"])
def test_the_average_is_taken_where_it_is_asked_for(tmp_path: Path, key: str) -> None:
    weights = small_vit().state_dict()
    average = {name: value + 1 for name, value in weights.items()}
    torch.save({"state_dict": weights, key: average}, tmp_path / "both.pth")
    assert same(load_weights(tmp_path / "both.pth"), weights)
    assert same(load_weights(tmp_path / "both.pth", average=True), average)
    torch.save({key: {f"module.{name}": value for name, value in average.items()}}, tmp_path / "only.pth")
    assert same(load_weights(tmp_path / "only.pth"), average)
    torch.save({"model": weights, key: None}, tmp_path / "none.pth")
    assert same(load_weights(tmp_path / "none.pth"), weights)
    assert "holds no moving average" in refused(lambda: load_weights(tmp_path / "none.pth", average=True))


@pytest.mark.parametrize(
    "prefix", ["model.", "module.model.", "net.", "backbone.", "model._orig_mod.", "module.module."]
)
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    weights = small_vit().state_dict()
    torch.save({"state_dict": {prefix + name: value for name, value in weights.items()}}, tmp_path / "a.pth")
    assert same(load_weights(tmp_path / "a.pth"), weights)
    torch.save({"state_dict": {**weights, prefix + "x": torch.zeros(1)}}, tmp_path / "b.pth")
    assert any(name.endswith("x") and "." in name for name in load_weights(tmp_path / "b.pth"))  # not of all names


@pytest.mark.parametrize("make", [small_vit, small_swin])
def test_weights_without_a_classifier_are_finetuned_from(tmp_path: Path, make: Callable[..., Any]) -> None:
    source, target = make(seed=1), make(seed=2)
    before = snapshot(target)
    headless = {name: value for name, value in source.state_dict().items() if not name.startswith("head")}
    left = finetune_from(target, headless, tmp_path / "a.pth")
    assert left and all(name.startswith("head") for name in left)
    after = target.state_dict()
    assert all(torch.equal(after[name], headless[name]) for name in headless)
    assert all(torch.equal(after[name], before[name]) for name in left)


def test_an_older_layout_of_swin_is_still_read(tmp_path: Path) -> None:
    """The authors' files name the downsampling after the stage before, and the classifier head."""
    source, target = small_swin(seed=1), small_swin(seed=2)
    old = {}
    for name, value in source.state_dict().items():
        old[name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head.")] = value
    assert old.keys() != source.state_dict().keys()
    assert finetune_from(target, old, tmp_path / "a.pth") == []
    assert same(target.state_dict(), source.state_dict())


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "stride_0": lambda t: torch.zeros(1).expand(t.shape),
    "overlapping": lambda t: torch.zeros(t.numel()).as_strided(t.shape, (1,) * t.dim()),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "nan": lambda t: torch.full_like(t, float("nan")),
    "inf": lambda t: torch.full_like(t, float("inf")),
}


@pytest.mark.parametrize("name", ["head.weight", "blocks.0.attn.qkv.weight", "pos_embed"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_no_weights_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    model = small_vit()
    before, path = snapshot(model), tmp_path / "a.pth"
    weights = {**small_vit(seed=1).state_dict()}
    weights[name] = KINDS[kind](weights[name])
    torch.save({"model": weights}, path)
    assert name in refused(lambda: finetune_from(model, load_weights(path), path))
    assert same(before, model.state_dict())


def test_weights_of_another_precision_or_order_in_memory_are_weights(tmp_path: Path) -> None:
    source, target = small_vit(seed=1), small_vit(seed=2)
    weights = {name: value.double() for name, value in source.state_dict().items()}
    weights["head.weight"] = weights["head.weight"].T.contiguous().T
    torch.save(weights, tmp_path / "a.pth")
    assert finetune_from(target, load_weights(tmp_path / "a.pth"), tmp_path / "a.pth") == []
    assert same(source.state_dict(), target.state_dict())
