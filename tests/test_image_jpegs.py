"""The GPU's JPEG decoder, watched, with stand-ins that refuse, fail, crawl or never answer."""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from data_helpers import assert_same, folder_config, make_config, make_data
from test_draws import photograph
from test_pipeline import FILES, GPU, folder  # noqa: F401 (a fixture)
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from images.decode import decode_plain
from images.gpu import Finisher
from images.jpegs import IN_A_ROW, TRIES, GpuDecoder
from images.packed import Draws
from images.parcel import JPEG, PIXELS, pack
from images.transforms import train_transform

CPU = torch.device("cpu")


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    photograph(number, 20, 30).save(stream, "JPEG")
    return stream.getvalue()


CONTENTS = [jpeg(number) for number in range(16)]


def files() -> list[Tensor]:
    return [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in CONTENTS]


@pytest.fixture
def stand_in(monkeypatch) -> Callable[[Callable[[list[Tensor]], None]], list[int]]:
    """Puts something before the decoder, which is told its files; the list that is returned has their number, call by
    call."""

    def put(before: Callable[[list[Tensor]], None]) -> list[int]:
        calls: list[int] = []

        def decode(files: list[Tensor], mode: ImageReadMode, device: torch.device) -> list[Tensor]:
            calls.append(len(files))
            before(files)
            return decode_jpeg(files, mode=mode)

        monkeypatch.setattr("images.jpegs.decode_jpeg", decode)
        return calls

    return put


def fail(_files: object) -> None:
    raise RuntimeError("Error while decoding JPEG images: Failed to decode batch: 6\nhere")


def missing(images: list[Tensor | None]) -> list[int]:
    return [place for place, image in enumerate(images) if image is None]


@pytest.mark.parametrize("refused", [[0], [15], [4], [0, 1], [3, 9, 15]])
def test_files_that_are_refused_are_pillows_and_no_others(stand_in, capsys, refused):
    """Which pixels an image has does not depend on its neighbours."""
    batch = files()

    def refuse(tried: list[Tensor]) -> None:
        if any(file is batch[place] for file in tried for place in refused):
            raise RuntimeError("nvjpegDecode failed: 4\nhere")

    calls = stand_in(refuse)
    images = GpuDecoder(CPU)(batch)
    assert missing(images) == refused and len(calls) <= 2 + 8 * len(refused)
    assert all(torch.equal(images[n], decode_jpeg(batch[n])) for n in range(16) if n not in refused)
    assert "(nvjpegDecode failed: 4) are decoded by Pillow" in capsys.readouterr().err


def test_a_failure_that_passes_changes_nothing_and_is_not_said(stand_in, capsys):
    number = itertools.count()
    calls = stand_in(lambda batch: fail(batch) if next(number) % 4 == 0 else None)
    decoder = GpuDecoder(CPU)
    for _ in range(3 * IN_A_ROW):
        assert missing(decoder(files())) == []
    assert set(calls) == {16} and not decoder.alone[0] and capsys.readouterr().err == ""


def test_a_decoder_that_always_fails_is_left_alone_and_that_is_said_once(stand_in, capsys):
    calls, decoder = stand_in(fail), GpuDecoder(CPU)
    for batch in range(10):
        assert missing(decoder(files())) == list(range(16))
        assert bool(decoder.alone[0]) == (batch >= IN_A_ROW - 1)
    assert len(calls) == IN_A_ROW * TRIES
    said = capsys.readouterr().err
    assert said.count("are decoded by Pillow") == said.count("left alone from now on") == 1 and said.count("\n") == 2
    assert "Failed to decode batch: 6" in said and "here" not in said


def test_a_decoder_that_crawls_is_left_alone(stand_in, capsys):
    """What it has made is taken."""
    calls, decoder = stand_in(lambda _: time.sleep(0.03)), GpuDecoder(CPU, slow=0.02)
    for batch in range(IN_A_ROW + 3):
        assert missing(decoder(files())) == (list(range(16)) if batch >= IN_A_ROW else [])
    assert len(calls) == IN_A_ROW and "(a batch took 0.0 s)" in capsys.readouterr().err


def test_batches_that_fail_now_and_then_leave_the_decoder_in_use(stand_in):
    batches = [files() for _ in range(5 * IN_A_ROW)]
    refused = {id(batch[7]) for place, batch in enumerate(batches) if place % IN_A_ROW}
    stand_in(lambda tried: fail(tried) if any(id(file) in refused for file in tried) else None)
    decoder = GpuDecoder(CPU)
    for batch in batches:
        assert missing(decoder(batch)) == ([7] if id(batch[7]) in refused else [])
    assert not decoder.alone[0]


def test_a_decoder_that_never_answers_holds_nothing_up(stand_in, capsys):
    go_on = threading.Event()
    calls, decoder = stand_in(lambda _: go_on.wait(60)), GpuDecoder(CPU, patience=0.05)
    began = time.monotonic()
    for _ in range(3):
        assert missing(decoder(files())) == list(range(16))
    assert time.monotonic() - began < 5 and len(calls) == 1 and not decoder.held.locked()
    assert capsys.readouterr().err.count("(no answer in 0.05 s)") == 1
    go_on.set()


def test_a_decoder_that_is_held_back_waits_and_that_does_not_count(stand_in):
    calls, decoder, images = stand_in(lambda _: None), GpuDecoder(CPU, patience=5.0, slow=0.5), []
    with decoder.held:
        thread = threading.Thread(target=lambda: images.extend(decoder(files())))
        thread.start()
        thread.join(0.6)
        assert thread.is_alive() and not calls
    thread.join(10)
    assert missing(images) == [] and decoder._in_a_row == 0


def test_loader_processes_decode_what_a_decoder_that_is_left_alone_does_not(folder):  # noqa: F811
    """As soon as it is, though they were started before."""
    options = [GPU, FILES, "data.num_workers=1"]
    data = make_data(*options, base=folder_config(folder), batch_size=4)
    maker = data.train.loader.dataset._maker
    maker.share = 1.0
    seen, finish = [], data.train._finisher._by_pillow

    def look(parcels: list) -> tuple:
        seen.append(any((parcel.images[:, -2] == JPEG).any() for parcel in parcels))
        return finish(parcels)

    data.train._finisher._by_pillow = look
    expected = make_data(base=folder_config(folder), batch_size=4)
    assert_same(expected.train_batches(0), data.train_batches(0))
    assert any(seen)
    data.train._finisher.decoder.alone[0] = 1
    seen.clear()
    assert_same(expected.train_batches(1), data.train_batches(1))
    assert seen and not any(seen)
    data.close()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_opens_a_file_for_the_decoder(share):
    maker = Draws(train_transform(make_config()), 16, share)
    assert maker.open(CONTENTS[0], 0).kind == (JPEG if share else PIXELS)
    maker.alone = np.ones(1, np.uint8)
    assert maker.open(CONTENTS[0], 0).kind == PIXELS


def test_what_the_decoder_leaves_is_decoded_by_several_threads_in_order(monkeypatch):
    """Each waits for another; pixels are libjpeg's, and one that cannot be decoded is told."""
    maker = Draws(train_transform(make_config()), 16, 1.0)
    contents = [content if number != 5 else content[:40] + content[-2:] for number, content in enumerate(CONTENTS)]
    samples = [maker.make(maker.open(content, 0), 0, 0, 0, 0) for content in CONTENTS]
    samples = [sample._replace(place=content) for sample, content in zip(samples, contents, strict=True)]
    finisher, meeting, decode = Finisher(16, (0.5,) * 3, (0.5,) * 3, CPU), threading.Barrier(2), decode_plain
    monkeypatch.setattr("images.gpu.decode_plain", lambda content: (meeting.wait(20), decode(content))[1])
    decoded = finisher.decode([pack(samples[:7], [0] * 7), pack(samples[7:], [0] * 9)])
    assert decoded.failed == [5] and list(decoded.images) == list(range(16))
    for number in set(range(16)) - {5}:
        assert np.array_equal(decoded.images[number].permute(1, 2, 0).numpy(), decode(CONTENTS[number]))


@pytest.mark.parametrize("size", [(19, 30), (20, 31), (30, 20)])
def test_an_image_of_another_size_than_its_file_said_has_failed(size):
    """Kernels would read beside it; the failed image reads as zeros as far as the file said."""
    maker = Draws(train_transform(make_config()), 16, 1.0)
    sample = maker.make(maker.open(CONTENTS[0], 0), 0, 0, 0, 0)
    assert sample.size == (20, 30)
    decoded = Finisher(16, (0.5,) * 3, (0.5,) * 3, CPU).decode([pack([sample, sample._replace(size=size)], [0] * 2)])
    assert decoded.failed == [1] and decoded.images[0].any()
    assert decoded.images[1].shape == (3, *size) and not decoded.images[1].any()
