"""What images may take: memory of the host by all that limits it, sets that are kept, photographs of any size."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import make_config, make_data
from PIL import Image
from quick import some
from test_draws import photograph
from torch.utils.data import DataLoader

from images.decode import open_image
from images.gpu import Finisher
from images.memory import available_bytes
from images.order import AUGMENT, seeded
from images.packed import Draws, most_bytes
from images.parcel import JPEG, PIXELS, RESIDENT, Sample, pack
from images.resident import keep, mean_bytes
from images.samples import Images
from images.transforms import eval_transform, train_transform

GIB = 2**30
UNLIMITED = 2**63 - 4096


def system(root: Path, available: int, groups: str, files: dict[str, int | str]) -> Path:
    """A file system that says so much."""
    files = {
        "proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {available // 1024} kB\n",
        "proc/self/cgroup": groups,
    } | files
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}")
    return root


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 64 * GIB),
        ("0::/\n", {f"{V2}/memory.max": "max", f"{V2}/memory.current": GIB}, 64 * GIB),
        ("0::/\n", {f"{V2}/memory.max": 8 * GIB, f"{V2}/memory.current": GIB}, 7 * GIB),
        (
            "0::/\n",
            {
                f"{V2}/memory.max": 8 * GIB,
                f"{V2}/memory.current": 6 * GIB,
                f"{V2}/memory.stat": f"file 9\ninactive_file {3 * GIB}\n",
            },
            5 * GIB,
        ),
        (
            "0::/jobs/one\n",  # the job may have more than its queue
            {
                f"{V2}/jobs/one/memory.max": 16 * GIB,
                f"{V2}/jobs/one/memory.current": GIB,
                f"{V2}/jobs/memory.max": 8 * GIB,
                f"{V2}/jobs/memory.current": 6 * GIB,
            },
            2 * GIB,
        ),
        (
            "5:cpu:/x\n4:cpu,memory:/docker/abc\n0::/\n",  # which a container does not see
            {
                f"{V1}/memory.limit_in_bytes": 4 * GIB,
                f"{V1}/memory.usage_in_bytes": 2 * GIB,
                f"{V1}/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
            },
            3 * GIB,
        ),
        ("4:memory:/\n", {f"{V1}/memory.limit_in_bytes": UNLIMITED, f"{V1}/memory.usage_in_bytes": GIB}, 64 * GIB),
        ("0::/\n", {f"{V2}/memory.max": GIB, f"{V2}/memory.current": 2 * GIB}, 0),
    ],
)
def test_memory_is_what_the_machine_and_its_groups_leave(tmp_path, groups, files, expected):
    assert available_bytes(system(tmp_path, 64 * GIB, groups, files)) == expected


def test_a_system_that_says_nothing_has_some_memory(tmp_path):
    assert 0 < available_bytes(tmp_path) <= 2**31


def kept(monkeypatch, available: int, *overrides: str, **where: int) -> dict:
    monkeypatch.setattr("images.pipeline.available_bytes", lambda: available)
    return make_data("data.pipeline=gpu", "data.resident=0.5", *overrides, **where).pipeline


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    needed = 40 * 16 * 16 * 3
    assert "kept" in kept(monkeypatch, 2 * needed + 2)["training"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "kept" not in kept(monkeypatch, 4 * needed - 2)["training"]
    assert "kept" in kept(monkeypatch, 4 * needed + 2)["training"]


def test_a_process_keeps_its_share_of_what_is_evaluated(monkeypatch):
    counts = [
        kept(monkeypatch, 2**30, "data.num_images=70", rank=rank, world_size=3, batch_size=2) for rank in range(3)
    ]
    assert [made["evaluation"]["kept"]["images"] for made in counts] == [3, 2, 2]
    assert [made["training"]["kept"]["images"] for made in counts] == [70] * 3


def load(decoding, collate, size):
    return DataLoader(decoding, batch_size=size, collate_fn=collate)


def test_a_device_with_its_own_memory_has_the_only_pixels(monkeypatch):
    """Loader processes read an image's file again where they need it."""
    images = make_data().train_loader.dataset

    monkeypatch.setattr("images.resident._BLOCK_BYTES", 1000)
    here, there = (keep(images, range(40), 1e9, torch.device(name), load) for name in ("cpu", "meta"))
    assert len(here) == len(there) == 40 and there.nbytes == here.nbytes == 40 * 16 * 16 * 3
    assert all(block.is_meta for block in there._blocks) and not there._gathered
    for index in range(40):
        assert np.array_equal(here.array(index), there.again(index)) and here.size(index) == there.size(index)
    assert len(pickle.dumps(here)) < here.nbytes / 2


# --- Photographs of any size ------------------------------------------------------------------------------------------


def jpeg(height: int, width: int) -> bytes:
    stream = io.BytesIO()
    photograph(1, height, width).save(stream, "JPEG", quality=80)
    return stream.getvalue()


def finished(sample: Sample, cfg) -> torch.Tensor:
    images, _, failed = Finisher(cfg.model.img_size, cfg.data.mean, cfg.data.std, torch.device("cpu"))([pack([sample])])
    assert not failed
    return images[0]


@pytest.mark.parametrize(("height", "width"), [(3000, 4000), (12000, 9)])
@pytest.mark.parametrize("share", some([0.0, 1.0], every=2))
def test_large_photographs_are_made_smaller_before_they_are_sent(height, width, share):
    """A batch has room for its pixels and the kernels for its lines; the bits are the same."""
    cfg = make_config("model.img_size=64", "data.mean=[0.4,0.5,0.6]")
    content = jpeg(height, width)
    image = open_image(io.BytesIO(content))
    for transform in (train_transform(cfg), eval_transform(cfg)):
        maker = Draws(transform, 64, share)
        opened = maker.open(content, 0)
        assert (opened.kind == JPEG) == (share == 1 and 3 * height * width < 2**22)
        for number in range(2):
            sample = maker.make(opened, 0, AUGMENT, 0, number)
            assert sample.drawn.crop.height <= 8192
            assert sample.kind == JPEG or sample.place.nbytes <= most_bytes(64) == 2**20
            with seeded(0, AUGMENT, 0, number):
                assert torch.equal(finished(sample, cfg), transform(image))


def test_large_images_get_more_room():
    """So that those of a recipe with large images are not all made by Pillow."""
    assert most_bytes(224) == 2**20 and most_bytes(1024) == 2 * 3 * 1024**2


def test_a_kept_image_that_is_too_long_is_pillows():
    source = [(photograph(1, 9000, 3), 0), (photograph(2, 40, 50), 1)]
    cfg = make_config()
    images = Images(source, eval_transform(cfg), 0, 1)
    resident = keep(images, [0, 1], 1e9, torch.device("cpu"), load)
    maker = Draws(images.transform, 16, 0.0, resident)
    long, other = (maker.make(maker.kept(index), 0, AUGMENT, 0, 0) for index in (0, 1))
    assert (long.kind, long.place.shape, other.kind) == (PIXELS, (16, 16, 3), RESIDENT)
    assert torch.equal(finished(long, cfg), images[0, 0, 0][0])


def test_a_gpu_decodes_neither_large_photographs_nor_large_files():
    def kind(image: Image.Image, more: bytes = b"") -> int:
        stream = io.BytesIO()
        image.save(stream, "JPEG", comment=more)
        content = stream.getvalue() + bytes(2**20) * bool(more) + b"\xff\xd9" * bool(more)
        return Draws(train_transform(make_config()), 16, 1.0).open(content, 0).kind

    assert kind(Image.new("RGB", (1000, 1000))) == kind(Image.new("RGB", (60, 60))) == JPEG
    assert kind(Image.new("RGB", (2000, 1000))) == kind(Image.new("RGB", (60, 60)), b"long") == PIXELS


def test_images_that_cannot_be_read_say_nothing_of_a_sets_size():
    source = [(photograph(number, 20, 30), 0) if number % 4 == 0 else (None, 0) for number in range(400)]
    images = Images(source, eval_transform(make_config()), 0, 1)
    assert mean_bytes(images, range(400)) == 20 * 30 * 3
    assert mean_bytes(images, [1, 2, 3]) == 0
