"""Checkpoints: atomic writing, reading that runs no code, one sentence for whatever does not fit."""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import ROOT
from record_helpers import refused, same, small_vit, training_state
from torch import nn

from record.checkpoint import FORMAT, LAST, atomic_write, find_last, load_checkpoint, save_checkpoint
from record.weights import load_weights


class RunsCode:
    """Unpickling it calls os.system: it creates `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


# Saving ---------------------------------------------------------------------------------------------------------------


def test_round_trip_is_exact(tmp_path: Path) -> None:
    state = training_state(small_vit())
    save_checkpoint(tmp_path / LAST, state)
    loaded = load_checkpoint(tmp_path / LAST)
    assert loaded["format"] == FORMAT and "format" not in state
    assert same(loaded["model"], state["model"])
    assert {k: loaded[k] for k in ("ema", "epoch", "meter", "config", "pair")} == {
        k: state[k] for k in ("ema", "epoch", "meter", "config", "pair")
    }
    restored = torch.optim.AdamW(small_vit().parameters())
    restored.load_state_dict(loaded["optimizer"])
    for index, moments in restored.state_dict()["state"].items():
        assert all(torch.equal(moments[k], state["optimizer"]["state"][index][k]) for k in moments)


def test_find_last(tmp_path: Path) -> None:
    assert find_last(tmp_path) is None
    (tmp_path / "last.pt").write_bytes(b"x")
    assert find_last(tmp_path) == tmp_path / "last.pt"


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Every write beyond `size` bytes of a file fails with an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 5_000, 200_000])
def test_full_disk_leaves_the_old_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / LAST
    save_checkpoint(path, {"model": {"w": torch.zeros(4)}})
    before = path.read_bytes()
    with file_size_limit(size):
        message = refused(lambda: save_checkpoint(path, {"model": {"w": torch.randn(300_000)}}))
    assert str(path) in message and "unchanged" in message
    assert path.read_bytes() == before and os.listdir(tmp_path) == [LAST]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("where", ["torch.save", "os.replace", "os.fsync"])
def test_a_save_cut_short_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]
) -> None:
    path = tmp_path / LAST
    save_checkpoint(path, {"model": {"w": torch.zeros(4)}})
    before = path.read_bytes()

    def half_a_save(_state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise error("cut short")

    def fail(*_: Any) -> None:
        raise error("cut short")

    owner, name = {"torch.save": (torch, "save"), "os.replace": (os, "replace"), "os.fsync": (os, "fsync")}[where]
    monkeypatch.setattr(owner, name, half_a_save if where == "torch.save" else fail)
    with pytest.raises(error, match="cut short"):
        save_checkpoint(path, {"model": {"w": torch.ones(4)}})
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == [LAST]


def test_a_save_killed_outright_leaves_the_old_file_and_the_next_one_works(tmp_path: Path) -> None:
    path = tmp_path / LAST
    atomic_write(path, lambda file: file.write(b"old"))
    kill = "import os; from pathlib import Path; from record.checkpoint import atomic_write\n"
    kill += f"atomic_write(Path({str(path)!r}), lambda f: (f.write(b'half'), f.flush(), os.kill(os.getpid(), 9)))"
    process = subprocess.run([sys.executable, "-c", kill], cwd=ROOT)
    assert process.returncode == -9
    assert path.read_bytes() == b"old"
    atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == [LAST]


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert "cannot be written" in refused(lambda: save_checkpoint(tmp_path / "file" / LAST, {}))
    assert "cannot be written" in refused(lambda: save_checkpoint(tmp_path / "missing" / LAST, {}))
    (tmp_path / LAST).mkdir()
    assert "cannot be written" in refused(lambda: save_checkpoint(tmp_path / LAST, {}))
    assert sorted(os.listdir(tmp_path)) == ["file", LAST]


@pytest.mark.parametrize("value", [Path("x"), torch.float32, {1}, argparse.Namespace(a=1), object()])
def test_state_that_could_not_be_read_back_is_not_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\]"):
        save_checkpoint(tmp_path / LAST, {"a": [1, value]})
    assert not os.listdir(tmp_path)


# Reading --------------------------------------------------------------------------------------------------------------

READERS = [load_checkpoint, load_weights]


@pytest.mark.parametrize("read", READERS)
def test_missing_file_and_folder(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    assert "There is no checkpoint" in refused(lambda: read(tmp_path / "none.pt"))
    assert "There is no checkpoint" in refused(lambda: read(tmp_path / "none.safetensors"))
    assert f"is a folder; a checkpoint file was expected, such as {tmp_path / LAST}" in refused(lambda: read(tmp_path))


@pytest.mark.parametrize("read", READERS)
def test_truncated_at_many_lengths(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    save_checkpoint(tmp_path / LAST, training_state(small_vit()))
    whole = (tmp_path / LAST).read_bytes()
    read(tmp_path / LAST)
    lengths = [0, 1, 2, 3, 4, 5, 30, 64, 100, 1000, *range(5000, len(whole), 20_011), len(whole) - 100, len(whole) - 1]
    for length in lengths:
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        message = refused(lambda: read(tmp_path / "cut.pt"))
        assert "is truncated, damaged or not a checkpoint" in message and "run code" not in message, length


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "content", [b"hello, this is text\n" * 20, b"config: deit\nlr: 1\n", b"\x89PNG\r\n\x1a\n" + bytes(64), b"\0" * 999]
)
def test_not_a_checkpoint_at_all(tmp_path: Path, read: Callable[[Path], Any], content: bytes) -> None:
    for name in ("file.pt", "file.safetensors"):
        (tmp_path / name).write_bytes(content)
        message = refused(lambda name=name: read(tmp_path / name))
        assert "is truncated, damaged or not a checkpoint" in message and "run code" not in message


def test_truncated_safetensors(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.randn(100)}, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for length in (0, 4, 8, 20, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        assert "is truncated, damaged" in refused(lambda: load_weights(tmp_path / "cut.safetensors"))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "layout", ["zip", "torch_legacy", *(f"pickle_{p}" for p in range(pickle.HIGHEST_PROTOCOL + 1))]
)
def test_pickled_code_is_refused_and_does_not_run(tmp_path: Path, read: Callable[[Path], Any], layout: str) -> None:
    path, ran = tmp_path / "evil.pt", tmp_path / "ran"
    evil = {"model": {"w": torch.zeros(2)}, "optimizer": RunsCode(ran), "format": FORMAT}
    if layout in ("zip", "torch_legacy"):
        torch.save(evil, path, _use_new_zipfile_serialization=layout == "zip")
    else:
        path.write_bytes(pickle.dumps(RunsCode(ran), protocol=int(layout[-1])))
    message = refused(lambda: read(path))
    assert "would run code when loaded and was not loaded" in message
    assert not ran.exists()
    # The control: the file does run code in a reader that is not careful.
    if layout.startswith("pickle"):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert ran.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    assert "would run code" in refused(lambda: load_weights(tmp_path / "module.pt"))


def test_checkpoints_of_other_kinds(tmp_path: Path) -> None:
    model = small_vit()
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    torch.save({"model": model.state_dict(), "epoch": 1}, tmp_path / "deit.pth")
    torch.save([1, 2], tmp_path / "list.pt")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    for name in ("bare.pth", "deit.pth", "list.pt", "w.safetensors"):
        message = refused(lambda name=name: load_checkpoint(tmp_path / name))
        assert "holds weights only, use --finetune to start from it" in message
    assert "holds no model weights" in refused(lambda: load_weights(tmp_path / "list.pt"))
    for content in ({"model": {"w": 1.0}}, {0: torch.zeros(1)}, {}, torch.zeros(1)):
        torch.save(content, tmp_path / "other.pt")
        assert "holds no model weights" in refused(lambda: load_weights(tmp_path / "other.pt"))
    torch.save({"model": {}, "optimizer": {}, "format": FORMAT + 1}, tmp_path / "newer.pt")
    assert f"format {FORMAT + 1}" in refused(lambda: load_checkpoint(tmp_path / "newer.pt"))
