"""Small tables on a device, kept: a copy to a GPU waits for it, so once and not at every call."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Row = tuple[float, ...]


@functools.lru_cache(maxsize=256)
def _kept(values: Row | tuple[Row, ...], device: torch.device) -> Tensor:
    # A tensor made in inference mode would be one for ever, and no training could use it.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def constant(values: Row | tuple[Row, ...], device: torch.device) -> Tensor:
    """`values` as float32 on `device`; not to be written to.

    Under a mode that makes tensors of its own kind, such as FakeTensorMode, it is made anew and not kept.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return torch.tensor(values, dtype=torch.float32, device=device)
    return _kept(values, device)
