"""Shared memory for parcels that is used again and again, and that a GPU copies from without a detour.

A tensor that a loader process sends costs a connection to it, answered between its images, new pages, and a copy into
pinned memory, all of it one batch after the other. A slot costs a number. It is anonymous memory, so the size of
/dev/shm does not matter, and it takes memory only where it has been written.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import multiprocessing
import os
import struct
import sys
import weakref

import numpy as np
import torch
from torch import Tensor

MOST = 1024  # slots: a pipe, in which the numbers of all must have room, may have no more than a page
_NUMBER = struct.Struct("<H")
_ids = itertools.count()
_open: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()  # by id, for slots that are received


class Slots:
    """`count` stretches of shared memory of `size` bytes each, MOST at most, which loader processes are forked with.

    pinned: whether a GPU may copy from them while the program goes on. Raises OSError where there is no room for them.
    """

    def __init__(self, count: int, size: int, *, pinned: bool) -> None:
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._maps = [np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8) for _ in range(min(count, MOST))]
        self.pinned = pinned
        self._registered: dict[int, int] = {}  # bytes of a slot that a GPU knows
        self._room = 0  # bytes that are registered of a slot
        self._read, self._write = os.pipe()  # of the numbers of free slots: a killed reader can leave no lock behind
        ends = self._read, self._write, self._maps, self._registered
        self._close = weakref.finalize(self, _close, os.getpid(), *ends)
        self._close.atexit = False  # a thread may still be copying then; all of it goes with the process
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        for number in range(len(self._maps)):
            self.free(number)
        self.id = next(_ids)
        _open[self.id] = self

    def take(self, size: int) -> Slot | None:
        """A free slot, for a loader process; None where there is none of that size."""
        if size <= self._maps[0].size:
            with contextlib.suppress(BlockingIOError):
                return Slot(self, _NUMBER.unpack(os.read(self._read, _NUMBER.size))[0], received=False)
        return None

    def free(self, number: int) -> None:
        os.write(self._write, _NUMBER.pack(number))

    def memory(self, number: int, size: int) -> Tensor:
        """The first `size` bytes of a slot."""
        return torch.from_numpy(self._maps[number][:size])

    def pin(self, number: int, size: int) -> None:
        """Let a GPU copy so many bytes of a slot while the program goes on; else it copies them without.

        A registration takes milliseconds, in which the driver may let nobody launch. So the first one is of all slots,
        with room for larger pieces, and a slot that is outgrown all the same gets room for the largest of any slot.

        All or nothing: a copy from memory that is registered in part is refused. Nothing is waited for, since a slot
        comes back only when it has been copied, and the device may be recording the training step's graph.
        """
        if not self.pinned or self._registered.get(number, 0) >= size:
            return
        if size > self._room:
            self._room = min(size + size // 2, self._maps[number].size)
        if number in self._registered:
            del self._registered[number]
            torch.cuda.cudart().cudaHostUnregister(self._maps[number].ctypes.data)
        first = () if self._registered else range(len(self._maps))
        for one in dict.fromkeys((number, *first)):
            if self.pinned:
                self._register(one)

    def _register(self, number: int) -> None:
        error = torch.cuda.cudart().cudaHostRegister(self._maps[number].ctypes.data, self._room, 0)
        if int(error) == 0:
            self._registered[number] = self._room
        else:
            self.pinned = False  # by ulimit -l, say, and not to be asked for with every batch
            _forget_error()
            print(
                f"note: images are copied from memory that is not pinned, which is slower (CUDA error {int(error)}).",
                file=sys.stderr,
                flush=True,
            )


class Slot:
    """A slot in use. The process that has received it frees it, at the latest when it forgets it."""

    def __init__(self, slots: Slots, number: int, *, received: bool) -> None:
        self._slots, self._number, self._held = slots, number, received

    def memory(self, size: int) -> Tensor:
        return self._slots.memory(self._number, size)

    def pin(self, size: int) -> None:
        self._slots.pin(self._number, size)

    def free(self) -> None:
        if self._held:
            self._held = False
            with contextlib.suppress(OSError):  # at the end of the program
                self._slots.free(self._number)

    def __del__(self) -> None:
        self.free()

    def __reduce__(self) -> tuple:
        return _received, (self._slots.id, self._number)


def _received(slots: int, number: int) -> Slot:
    return Slot(_open[slots], number, received=True)


def _close(pid: int, read: int, write: int, maps: list[np.ndarray], registered: dict[int, int]) -> None:
    if os.getpid() == pid:  # not a copy in a forked process
        os.close(read)
        os.close(write)
        for number in registered:  # before the memory goes
            torch.cuda.cudart().cudaHostUnregister(maps[number].ctypes.data)


def _forget_error() -> None:
    """Take back the runtime's last error in this thread, which would be reported of the next kernel."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def can_share() -> bool:
    """Whether loader processes are forked, and so have the slots. The first of all ways to start one is the default."""
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return method == "fork"
