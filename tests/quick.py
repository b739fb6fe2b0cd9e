"""Parameters of which the quick suite has some; the others are slow (pytest.ini), and run by scripts/test.sh -m ""."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], *, every: int, many: bool = False) -> list[Any]:
    """The values with all but each `every`-th marked slow. many: each is a tuple, of several parameters."""
    kept = list(values)
    return [
        value if place % every == 0 else pytest.param(*(value if many else (value,)), marks=pytest.mark.slow)
        for place, value in enumerate(kept)
    ]
