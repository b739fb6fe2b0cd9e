"""What a probe leaves; apart from the probe, so that who writes or reads it does not depend on how it is made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Recording:
    """One recording: figures of the whole model and arrays, those of layers in the order of the array `layers`.

    `name` is that of its file. Arrays hold numbers and text alone, so that they load without pickle.
    """

    name: str
    figures: dict[str, float]
    arrays: dict[str, np.ndarray]
