"""The GPU's JPEG decoder, which is watched: it may refuse a file, fail for a while or for good, crawl, never return."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

PATIENCE = 30.0  # seconds for a batch to come back at all; the first call sets the decoder up
SLOW = 5.0  # seconds for a batch that are as bad as a failure: one core needs less
IN_A_ROW = 4  # failing batches after which the decoder is left alone
# Failing calls in a row after which a batch is given up: a few refused files of a thousand are found in less.
TRIES = 24


class GpuDecoder:
    """Decodes batches of files, for one thread at a time; a decoder that has failed too often is left alone for good.

    alone: (1,) uint8, whether it is left alone; in shared memory, so that loader processes that are forked see it.
    held: a lock that is held while it decodes; who holds it, to record a graph, say, holds it back.
    """

    def __init__(self, device: torch.device, *, patience: float = PATIENCE, slow: float = SLOW) -> None:
        self._device, self._patience, self._slow = device, patience, slow
        self.alone = np.frombuffer(mmap.mmap(-1, 1), np.uint8)
        self.held = threading.Lock()
        self._problem: Exception | None = None  # of the present batch
        self._in_a_row, self._said = 0, False

    def __call__(self, files: Sequence[Tensor]) -> list[Tensor | None]:
        """(3, height, width) uint8 on the device of JPEG files, (bytes,) uint8; None of those that are left to Pillow:
        files that the GPU refuses, whatever else is in the batch, and all where it fails."""
        images: list[Tensor | None] = [None] * len(files)
        parts = [range(len(files))] if files else []
        failing, again, self._problem = 0, True, None
        while parts and not self.alone[0]:
            part = parts.pop()
            made = self._tried([files[place] for place in part])
            if not isinstance(made, Exception):
                failing = 0
                for place, image in zip(part, made, strict=True):
                    images[place] = image
                continue
            failing += 1
            if failing == TRIES:
                self._say_once(made)
                break
            if again:  # most failures pass, and then nothing has changed
                parts, again = [part], False
            elif len(part) > 1:
                half = part.start + len(part) // 2
                parts += [range(half, part.stop), range(part.start, half)]
            else:
                self._say_once(made)
        if files and not self.alone[0]:
            self._in_a_row = 0 if self._problem is None else self._in_a_row + 1
            if self._in_a_row == IN_A_ROW:
                self._leave_alone(_line(self._problem))
        return images

    def _tried(self, files: list[Tensor]) -> list[Tensor] | Exception:
        """What the decoder makes of files, or why it made nothing; by a thread, since nothing can end its call."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        made: list[list[Tensor] | Exception] = []

        def call() -> None:
            try:
                with torch.cuda.stream(stream):  # None: of a CPU, which has none
                    made.append(decode_jpeg(files, mode=ImageReadMode.RGB, device=self._device))
            except Exception as error:
                made.append(error)

        with self.held:
            began = time.monotonic()
            thread = threading.Thread(target=call, name="jpegs", daemon=True)
            thread.start()
            thread.join(self._patience)
            seconds = time.monotonic() - began
        if not made:
            late = TimeoutError(f"no answer in {self._patience:g} s")
            self._leave_alone(_line(late))
            return late
        if isinstance(made[0], Exception):
            if not isinstance(made[0], RuntimeError):
                raise made[0]
            self._problem = made[0]
        elif seconds > self._slow:
            self._problem = TimeoutError(f"a batch took {seconds:.1f} s")
        return made[0]

    def _leave_alone(self, why: str) -> None:
        self.alone[0] = 1
        _note(f"the GPU's JPEG decoder is left alone from now on ({why}); loader processes decode all files.")

    def _say_once(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            _note(f"files that the GPU cannot decode ({_line(error)}) are decoded by Pillow.")


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
