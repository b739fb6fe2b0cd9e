"""Batches of images made on a GPU: Pillow's bits at the sizes of training, and what its JPEG decoder does."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest
import torch
from data_helpers import assert_same, folder_config, make_data, stack, user_error_of
from image_cases import CASES, drawn_batch, every_operation, extreme_batch, finished, smallest_batch, unequal
from PIL import Image
from test_draws import photograph
from test_pipeline import ALWAYS_PILLOWS, FILES, folder  # noqa: F401 (a fixture)
from torchvision.io import decode_jpeg

from images.jpegs import GpuDecoder
from images.parcel import JPEG
from images.slots import Slots
from images.workers import failure_of_workers

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [32, 64, 224])
def test_kernels_give_pillows_bits(case, size):
    count = 26 if size == 224 else 104
    assert unequal(drawn_batch(case, size, count, GPU), size, GPU) == []


@pytest.mark.parametrize("size", [17, 32, 100])
def test_kernels_give_pillows_bits_of_extreme_images(size):
    assert unequal(extreme_batch(size, GPU, every_operation()), size, GPU) == []


@pytest.mark.parametrize("size", [32, 224])
def test_kernels_give_pillows_bits_of_images_of_a_few_pixels(size):
    assert unequal(smallest_batch(size, 100, GPU), size, GPU) == []


def test_the_gpus_decoder_is_within_a_few_levels():
    batch = drawn_batch("const", 224, 60, GPU, files=True)
    images = finished(batch, 224, GPU)
    different = (images - batch.expected).abs() * (0.226 * 255)  # about levels
    decoded = torch.tensor([sample.kind == JPEG for sample in batch.samples])
    assert different[~decoded].max() == 0
    means = different[decoded].mean(dim=(1, 2, 3))
    assert 0 < means.max() < 1.5 and means.mean() < 1.0


def test_batches_of_a_run_are_the_loaders(folder):  # noqa: F811
    base = folder_config(folder)
    for more in (FILES, "data.resident=0.01"):
        for workers in (0, 2):
            options = [more, f"data.num_workers={workers}", "data.gpu_decode=0"]
            data = make_data(*options, base=base, batch_size=4, device="cuda")
            expected = make_data(base=base, batch_size=4)
            assert data.pipeline["training"]["pipeline"] == "gpu"
            for epoch in range(2):
                images, targets = stack(data.train_batches(epoch))
                assert images.is_cuda and targets.is_cuda
                assert_same(expected.train_batches(epoch), [(images.cpu(), targets.cpu())])
            images, targets = stack(data.eval_batches())
            assert_same(expected.eval_batches(), [(images.cpu(), targets.cpu())])
            data.close()


def test_the_loaders_pixels_are_normalised_on_the_device(folder):  # noqa: F811
    base = folder_config(folder)
    data = make_data("data.pipeline=cpu", "data.num_workers=2", base=base, batch_size=4, device="cuda")
    images, targets = stack(data.train_batches(0))
    assert_same(make_data(base=base, batch_size=4).train_batches(0), [(images.cpu(), targets.cpu())])


def test_an_abandoned_epoch_and_one_and_two_processes(folder):  # noqa: F811
    base = folder_config(folder)
    options = {"base": [*base, FILES, "data.gpu_decode=0.5"], "device": "cuda"}
    data = make_data("data.num_workers=2", batch_size=4, **options)
    before = list(itertools.islice(data.train_batches(2), 2))
    whole = stack(make_data("data.num_workers=1", batch_size=8, **options).train_batches(2))
    alone = make_data(batch_size=4, **options)
    assert_same(alone.train_batches(2), [*before, *data.train_batches(2, start=2)])
    for rank in range(2):
        part = stack(make_data(rank=rank, world_size=2, batch_size=4, **options).train_batches(2))
        assert torch.equal(part[0], whole[0][rank::2]) and torch.equal(part[1], whole[1][rank::2])


def test_a_file_that_the_gpu_cannot_decode_is_pillows(folder, monkeypatch, capsys):  # noqa: F811
    options = {"base": [*folder_config(folder), FILES, "data.gpu_decode=1"], "batch_size": 4}
    expected = make_data("data.gpu_decode=0", base=options["base"], batch_size=4)

    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("images.jpegs.decode_jpeg", fail)
    images, targets = stack(make_data(**options, device="cuda").train_batches(0))
    assert_same(expected.train_batches(0), [(images.cpu(), targets.cpu())])


def test_an_image_of_another_size_than_its_file_says_is_pillows(folder, monkeypatch):  # noqa: F811
    options = {"base": [*folder_config(folder), FILES, "data.gpu_decode=1"], "batch_size": 4}
    expected = make_data("data.gpu_decode=0", base=options["base"], batch_size=4)

    def cut(*args: object, **more: object) -> list[torch.Tensor]:
        images = decode_jpeg(*args, **more)
        return [image[:, : image.shape[1] - number % 2 * 3] for number, image in enumerate(images, 1)]

    monkeypatch.setattr("images.jpegs.decode_jpeg", cut)
    plain = stack(make_data(**options, device="cuda").train_batches(0))[0].cpu()
    same = [torch.equal(a, b) for a, b in zip(plain, stack(expected.train_batches(0))[0], strict=True)]
    assert any(same) and not all(same)  # those of the GPU's decoder differ by levels


def test_a_file_that_the_gpu_refuses_leaves_its_neighbours_alone(capsys):
    stream = io.BytesIO()
    photograph(1, 64, 80).save(stream, "JPEG")
    files = [torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8) for _ in range(3)]
    files[1] = torch.zeros(50, dtype=torch.uint8)
    images = GpuDecoder(GPU)(files)
    alone = decode_jpeg([files[0]], device=GPU)[0]
    assert images[1] is None and "are decoded by Pillow" in capsys.readouterr().err
    assert torch.equal(images[0], alone) and torch.equal(images[2], alone)


def test_the_decoder_waits_for_a_recording():
    stream = io.BytesIO()
    photograph(1, 64, 80).save(stream, "JPEG")
    files, numbers = [torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)] * 3, torch.zeros(8, device=GPU)
    decoder, graph, made = GpuDecoder(GPU), torch.cuda.CUDAGraph(), []
    thread = threading.Thread(target=lambda: made.extend(decoder(files)))
    with decoder.held, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        numbers += 1
        thread.start()
        thread.join(1.0)
        assert thread.is_alive() and not made
        numbers += 1
    thread.join(60)
    graph.replay()
    assert numbers.eq(2).all() and len(made) == 3 and all(image.shape == (3, 64, 80) for image in made)


def test_slots_are_pinned_anew_while_a_step_is_recorded():
    slots, numbers, graph = Slots(1, 2**22, pinned=True), torch.zeros(8, device=GPU), torch.cuda.CUDAGraph()
    slots.pin(0, 2**10)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        numbers += 1
        thread = threading.Thread(target=slots.pin, args=(0, 2**21))
        thread.start()
        thread.join()
        numbers += 1
    graph.replay()
    assert numbers.eq(2).all() and slots._registered == {0: 2**21 + 2**20}
    slots.memory(0, 2**21).fill_(7)
    assert slots.memory(0, 2**21).to(GPU, non_blocking=True).eq(7).all()


def test_memory_that_cannot_be_pinned_is_copied_all_the_same(capsys):
    slots, others = (Slots(2, 2**20, pinned=True) for _ in range(2))
    others._maps[:] = slots._maps
    others.pin(0, 2**16)
    slots.pin(0, 2**16)  # which is registered already
    assert "not pinned" in capsys.readouterr().err and not slots.pinned
    assert slots.memory(0, 2**10).fill_(3).to(GPU).add(1).eq(4).all()  # a kernel that nothing is said against


def test_a_run_that_is_dropped_in_mid_epoch(folder):  # noqa: F811
    base = {"base": [*folder_config(folder), FILES], "batch_size": 4}
    for _ in range(3):
        data = make_data("data.num_workers=2", **base, device="cuda")
        batches = data.train_batches(0)
        next(batches)
        del data, batches
    data = make_data("data.num_workers=2", **base, device="cuda")
    images, targets = stack(data.train_batches(1))
    assert_same(make_data(**base).train_batches(1), [(images.cpu(), targets.cpu())])
    data.close()


@pytest.mark.parametrize("kept", [FILES, "data.resident=0.01"])
def test_what_the_device_has_not_is_pillows(folder, kept):  # noqa: F811
    base = folder_config(folder, kept, ALWAYS_PILLOWS)
    data = make_data("data.num_workers=2", base=base, batch_size=4, device="cuda")
    images, targets = stack(data.train_batches(0))
    assert_same(make_data(base=base, batch_size=4).train_batches(0), [(images.cpu(), targets.cpu())])
    data.close()


def test_batches_are_on_the_device_without_triton(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr("images.pipeline._has_triton", lambda: False)
    base = folder_config(folder)
    data = make_data("data.num_workers=2", base=base, batch_size=4, device="cuda")
    assert data.pipeline["training"] == {"pipeline": "cpu"}
    images, targets = stack(data.train_batches(0))
    assert images.is_cuda and targets.is_cuda
    assert_same(make_data(base=base, batch_size=4).train_batches(0), [(images.cpu(), targets.cpu())])
    data.close()


def test_a_killed_loader_process_ends_the_epoch_with_a_sentence(folder):  # noqa: F811
    data = make_data("data.num_workers=2", base=folder_config(folder), batch_size=4, device="cuda")
    batches = data.train_batches(0)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    try:
        message = user_error_of(itertools.chain.from_iterable(data.train_batches(epoch) for epoch in range(1, 9)))
    except RuntimeError as error:  # torch may raise it wherever this process is; main.py makes a sentence of it
        message = failure_of_workers(error)
    assert "ended by the system (Killed)" in message


def test_an_error_in_a_loader_process_reaches_the_program(folder):  # noqa: F811
    root = {"base": folder_config(folder), "batch_size": 4, "device": "cuda"}
    data = make_data("data.num_workers=1", FILES, **root)
    data.train.loader.dataset._maker.open = None
    with pytest.raises(Exception, match=r"cannot be read|NoneType"):
        list(data.train_batches(0))


def test_the_gpu_decoder_and_pillow_agree_on_a_grey_image():
    """The control: where colours are not interpolated the two are close."""
    stream = io.BytesIO()
    grey = Image.fromarray(np.repeat(np.asarray(photograph(1, 64, 64))[:, :, :1], 3, 2))
    grey.save(stream, "JPEG", quality=95)
    data = torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)
    mine = decode_jpeg([data], device=GPU)[0].permute(1, 2, 0).cpu().int()
    assert (mine - torch.from_numpy(np.array(Image.open(stream))).int()).abs().max() <= 2
