"""A small set decoded once and for all: its pixels in shared memory, and on the device where there is one."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class Resident:
    """The images of a set as (height, width, 3) uint8, one after the other; what could not be read has no pixels."""

    def __init__(self, pixels: Tensor, heights: Tensor, widths: Tensor, device: torch.device) -> None:
        sizes = 3 * heights * widths
        self.heights, self.widths, self.starts = heights, widths, sizes.cumsum(0) - sizes
        self.pixels = pixels
        self.on_device = pixels if device.type == "cpu" else pixels.to(device)

    def array(self, index: int) -> np.ndarray:
        """An image (height, width, 3)."""
        start, height, width = (int(tensor[index]) for tensor in (self.starts, self.heights, self.widths))
        return self.pixels[start : start + 3 * height * width].view(height, width, 3).numpy()


def resident_of(images: Iterable[np.ndarray], device: torch.device) -> Resident:
    """From images in order."""
    arrays = list(images)
    heights = torch.tensor([array.shape[0] for array in arrays])
    widths = torch.tensor([array.shape[1] for array in arrays])
    pixels = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    return Resident(pixels, heights, widths, device)
