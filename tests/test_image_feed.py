"""Slots and the threads before a device, without one: streams, events and CUDA's runtime are stood in for."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_helpers import make_config, make_data
from test_draws import photograph
from torch.utils.data import DataLoader

from images.draws import Box, Crop, Drawn
from images.feed import Feed, _Ahead
from images.gpu import Decoded, Finisher
from images.packed import Collate, Told
from images.parcel import BOXES, FIRST_BOX, LENGTH, PIXELS, RESIDENT, START, Sample, fill, merge, pack, room_for
from images.pipeline import FeedMaker
from images.samples import Images
from images.slots import MOST, Slots, can_share
from images.transforms import eval_transform, train_transform

DEVICE = torch.device("meta")  # which is not the CPU


class Event:
    done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


@pytest.fixture
def events(monkeypatch) -> list[Event]:
    """The events that a stream has recorded; nothing has happened yet by any of them."""
    recorded = []

    def record_event() -> Event:
        recorded.append(Event())
        return recorded[-1]

    def never(*_args: object) -> None:
        raise AssertionError("the training step may be recorded")

    stream = SimpleNamespace(record_event=record_event, wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_args, **_options: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", never)
    return recorded


def sample(number: int = 0, size: int = 4) -> Sample:
    pixels = np.full((size, size, 3), number, np.uint8)
    return Sample(pixels, PIXELS, Drawn(Crop(0, 0, size, size, size, size, 0, 0, False), False, (), ()))


# --- Slots ------------------------------------------------------------------------------------------------------------


def test_slots_are_as_many_as_a_pipe_holds_the_numbers_of():
    slots, taken = Slots(100_000, 4096, pinned=False), []
    while (slot := slots.take(4096)) is not None:
        taken.append(slot._number)
    assert taken == list(range(MOST)) and slots.take(1) is None
    for number in taken:
        slots.free(number)
    assert slots.take(4097) is None and slots.take(1)._number == 0


class Runtime:
    """Of CUDA: what it was asked, and what it answers to registrations."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.asked = error, []

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:  # noqa: N802
        self.asked.append(("register", pointer, size))
        return self.error

    def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802
        self.asked.append(("unregister", pointer))
        return 0


def test_a_slot_is_pinned_anew_without_waiting_for_the_device(monkeypatch, events):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    slots = Slots(1, 10_000, pinned=True)
    for size in (400, 600, 601, 9000, 10_000):
        slots.pin(0, size)
    place = slots.memory(0, 1).data_ptr()
    assert runtime.asked == [
        ("register", place, 600),
        ("unregister", place),
        ("register", place, 901),
        ("unregister", place),
        ("register", place, 10_000),
    ]
    del slots
    assert runtime.asked[-1] == ("unregister", place)


def test_all_slots_are_pinned_at_the_start_and_none_later(monkeypatch, events):
    """Pieces have other sizes each time. A registration in the midst of training holds up its launches."""
    runtime, sizes = Runtime(), np.random.default_rng(0).uniform(0.08, 1.0, (4000, 32)).sum(axis=1) * 1000
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    slots = Slots(112, 40_000, pinned=True)
    feed = Feed(None, torch.device("cuda"), Finishing(), None, None)
    for number in range(0, len(sizes), 4):
        made = [
            SimpleNamespace(memory=torch.empty(int(size)), slot=slots.take(1), source=torch.zeros(1), targets=sample)
            for size, sample in zip(sizes[number : number + 4], torch.zeros(4, 1), strict=True)
        ]
        for parcel in made:
            parcel.slot._held = True
        feed._finish(SimpleNamespace(parcels=made, unreadable=[], missing=0), None)
        assert [what for what, *_ in runtime.asked] == ["register"] * 112
        feed.stop()
    assert len({size for *_, size in runtime.asked}) == 1 and runtime.asked[0][2] < 1.6 * sizes[:4].max()


def test_a_slot_that_is_outgrown_gets_room_for_the_largest_piece_of_any(monkeypatch, events):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    slots = Slots(3, 10_000, pinned=True)
    for number, size in ((1, 100), (0, 1000), (2, 160), (2, 1500), (1, 1400)):
        slots.pin(number, size)
    assert [size for what, _, *size in runtime.asked if what == "register"] == [[150]] * 3 + [[1500]] * 3
    assert len(runtime.asked) == 9


def test_memory_that_cannot_be_pinned_is_not_asked_for_again(monkeypatch, events, capsys):
    """Nor is the error left for the next kernel."""
    runtime, forgotten = Runtime(error=2), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr("images.slots._forget_error", lambda: forgotten.append(1))
    slots = Slots(3, 1000, pinned=True)
    for number in range(3):
        slots.pin(number, 100)
    assert len(runtime.asked) == len(forgotten) == 1
    assert "not pinned, which is slower (CUDA error 2)" in capsys.readouterr().err
    del slots
    assert len(runtime.asked) == 1


def test_a_piece_larger_than_a_slot_goes_without():
    slots = Slots(2, 5000, pinned=False)
    small, large = (Collate(slots)([(sample(7, size), 3, None, (0, 0, 0))])[0] for size in (4, 50))
    assert (small.slot is None, large.slot is None) == (False, True)
    for parcel, size in ((small, 4), (large, 50)):
        assert (parcel.source == 7).all() and len(parcel.source) == 3 * size * size and parcel.targets.tolist() == [3]


@pytest.mark.parametrize(("method", "all_of_them"), [("spawn", ["fork", "spawn"]), (None, ["forkserver", "fork"])])
def test_whether_slots_can_be_shared_fixes_nothing(monkeypatch, method, all_of_them):
    def start_method(allow_none: bool = False) -> str | None:
        assert allow_none, "would fix it"
        return method

    monkeypatch.setattr(multiprocessing, "get_start_method", start_method)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: all_of_them)
    assert not can_share()
    all_of_them[0], method = "fork", None
    assert can_share()


# --- Copies out of slots ----------------------------------------------------------------------------------------------


class Finishing:
    """A finisher that gives numbers back."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def decode(self, parcels: list) -> Decoded:
        return Decoded({}, [])

    def __call__(self, parcels: list, decoded: Decoded | None) -> tuple:
        if self._error is not None:
            raise self._error
        first = torch.cat([parcel.source[:: 3 * 4 * 4] for parcel in parcels]).float()
        return first, torch.cat([parcel.targets for parcel in parcels]), []


def feed_of(loader: object, finisher: Finishing) -> Feed:
    return Feed(loader, DEVICE, finisher, None, None)


def batch_in(slots: Slots) -> SimpleNamespace:
    parcel = pack([sample()], [0], slots)
    parcel.slot._held = True  # received
    return SimpleNamespace(parcels=[parcel], told=[Told(None, None, True)], unreadable=[], missing=0)


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA out of memory")])
def test_a_slot_is_nobodys_until_it_has_been_copied(events, error):
    slots = Slots(1, 5000, pinned=False)
    feed = feed_of(None, Finishing(error))
    with contextlib.nullcontext() if error is None else pytest.raises(RuntimeError):
        feed._finish(batch_in(slots), None)
    gc.collect()
    assert slots.take(1) is None and len(events) == 1
    feed.stop()
    assert events[0].done and slots.take(1) is not None


def loader_of(batches: object) -> SimpleNamespace:
    class Batches:
        num_workers, batch_sampler, dataset = 1, None, None

        def __iter__(self) -> object:
            return iter(batches())

    return Batches()


def parcels(count: int, slots: Slots | None = None) -> list:
    made = []
    for number in range(count):
        made.append((pack([sample(number)], [number], slots), [Told(None, None, True)]))
        if slots is not None:
            made[-1][0].slot._held = True
    return made


def test_a_pass_that_is_dropped_waits_for_its_copies(events):
    slots = Slots(6, 5000, pinned=False)
    feed = feed_of(loader_of(lambda: parcels(6, slots)), Finishing())
    batches = iter(feed)
    assert [int(next(batches).images) for _ in range(2)] == [0, 1]
    del batches
    gc.collect()
    assert feed._thread is None and not feed._copied
    assert sum(slots.take(1) is not None for _ in range(7)) == 6


def test_the_end_of_a_pass_leaves_a_later_one_alone(events):
    feed = feed_of(loader_of(lambda: parcels(9)), Finishing())
    earlier = iter(feed)
    next(earlier)
    later = iter(feed)
    assert int(next(later).images) == 0
    earlier.close()
    assert [int(loaded.images) for loaded in later] == list(range(1, 9))


def test_a_thread_that_waits_for_a_file_is_not_waited_for_longer_than_told(events):
    stuck, go_on = threading.Event(), threading.Event()

    def items() -> object:
        yield 1
        stuck.set()
        go_on.wait(60)
        yield 2

    before = _Ahead(items(), lambda item: item, torch.cuda.Stream())
    ahead = _Ahead(before, lambda item: item, torch.cuda.Stream(), before=before)
    assert stuck.wait(10)
    start = time.monotonic()
    assert not ahead.stop(0.1) and time.monotonic() - start < 5
    go_on.set()
    assert ahead.stop(10) and ahead.stop(0.0)


# --- What a device gets -----------------------------------------------------------------------------------------------


def test_batches_come_to_a_device_that_finishes_none():
    """CUDA without Triton."""
    loader = DataLoader([(torch.zeros(3, 4, 4), 1)] * 3, batch_size=2, collate_fn=lambda pairs: collated(pairs))
    for loaded in Feed(loader, DEVICE, None, None, None):
        assert loaded.images.is_meta and loaded.targets.is_meta and loaded.labels.tolist()[0] == 1


def collated(pairs: list) -> tuple:
    images, targets = zip(*pairs, strict=True)
    return torch.stack(images), torch.tensor(targets), [], 0


def maker(*overrides: str, workers: int = 0, largest: int = 64) -> FeedMaker:
    return FeedMaker(make_config(*overrides), torch.device("cpu"), workers, None, largest)


def test_the_manifest_says_who_makes_what():
    made = maker("data.pipeline=auto", "aug.aa=augmix-m5-w4-d2")
    made._name = "gpu"  # as on a GPU
    source = [(photograph(number), 0) for number in range(8)]
    for training, transform in ((True, train_transform), (False, eval_transform)):
        images = Images(source, transform(made._cfg), 0, 1)
        made.feed(images, 4, [(index, index, 0) for index in range(8)], training=training)
    kept = {"images": 8, "bytes": 8 * 41 * 53 * 3}
    assert made.described == {"training": {"pipeline": "cpu"}, "evaluation": {"pipeline": "gpu", "kept": kept}}


def test_training_and_evaluation_share_their_slots():
    made = maker("data.pipeline=gpu", "data.resident=0", "data.pin_mem=false", workers=1, largest=96)
    source = [(photograph(number), 0) for number in range(8)]
    images = Images(source, eval_transform(made._cfg), 0, 1)
    feeds = [made.feed(images, 4, [(0, 0, 0)], training=training) for training in (True, False)]
    one, other = (feed.loader.collate_fn._slots for feed in feeds)
    assert one is other and len(one._maps) == 4 + 8 * 3 and not one.pinned and not feeds[0]._finisher._pin


def test_batches_of_kept_sets_come_in_slots():
    data = make_data("data.pipeline=gpu", "data.resident=0.2", "data.num_workers=1", batch_size=8)
    assert "kept" in data.pipeline["training"]
    slots = [parcel.slot for parcel, _ in data.train.loader]
    assert len(slots) > 1 and None not in slots
    data.close()


# --- Batches of several parcels ---------------------------------------------------------------------------------------


def test_noise_and_images_are_found_where_they_are_copied_to():
    rng = np.random.default_rng(0)
    samples = []
    for number, (count, side) in enumerate(((0, 5), (2, 4), (1, 3), (3, 7), (0, 6))):
        shapes = [(3, 1 + k, 2) if k else (3, 1, 1) for k in range(count)]
        boxes = [Box(0, 0, 1 + k, 2, torch.randn(shape)) for k, shape in enumerate(shapes)]
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        drawn = sample(number, side).drawn
        place, kind = (number, RESIDENT) if number == 2 else (pixels, PIXELS)
        samples.append(Sample(place, kind, drawn._replace(boxes=tuple(boxes))))
    for cuts in ((0, 5), (0, 1, 5), (0, 2, 3, 5)):
        merged, rests = merge([pack(samples[one:two]) for one, two in itertools.pairwise(cuts)])
        here = room_for(merged, rests, torch.device("cpu"))
        fill(here, merged, rests)
        for row, one in enumerate(samples):
            start, length = here.images[row, [START, LENGTH]].tolist()
            if one.kind == RESIDENT:
                assert start == one.place
            else:
                assert here.source[start : start + length].tolist() == one.place.ravel().tolist()
            first, count = here.images[row, [FIRST_BOX, BOXES]].tolist()
            assert count == len(one.drawn.boxes)
            for box, (*area, pixels) in zip(here.boxes[first : first + count], one.drawn.boxes, strict=True):
                noise = here.noise[box[4] : box[4] + pixels.numel()]
                assert box[:4].tolist() == area and torch.equal(noise, pixels.ravel())


@pytest.mark.parametrize("pin", [True, False])
def test_memory_is_pinned_where_it_is_asked_for(monkeypatch, pin):
    copied = []
    monkeypatch.setattr("images.gpu._pinned", lambda parcel: copied.append(parcel) or parcel)
    monkeypatch.setattr("images.gpu.fill", lambda here, merged, rests: None)
    monkeypatch.setattr("images.gpu.augment", lambda here, levels, size: None)
    finisher = Finisher(4, (0.5,) * 3, (0.5,) * 3, torch.device("cpu"), pin=pin)
    finisher._device = SimpleNamespace(type="cuda")
    monkeypatch.setattr("images.gpu.room_for", lambda merged, rests, device: merged)
    finisher([pack([sample()], [0])], Decoded({}, []))
    assert len(copied) == pin


def test_batches_of_real_sizes_are_cut_into_pieces_of_one_size(monkeypatch):
    made = maker("data.pipeline=gpu", "data.resident=0")
    images = Images([(photograph(0), 0)] * 700, eval_transform(made._cfg), 0, 1)
    order = [(index, index, 0) for index in range(700)]
    for size, training, expected in (
        (256, True, [[32] * 8] * 2),
        (384, False, [[32] * 12, [31, 32, 31, 32, 31, 32, 31, 32, 32, 32]]),
        (100, True, [[25] * 4] * 7),
        (20, False, [[20]] * 35),
    ):
        sampler = made.feed(images, size, order, training=training).loader.batch_sampler
        pieces = list(sampler)
        assert list(itertools.chain(*pieces)) == order[: sum(map(sum, expected))]
        found, batch = [], []
        for piece, end in zip(pieces, sampler.ends, strict=True):
            batch.append(len(piece))
            if end:
                found.append(batch)
                batch = []
        assert [sorted(batch) for batch in found] == [sorted(batch) for batch in expected]
