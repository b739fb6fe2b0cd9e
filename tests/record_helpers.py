"""Small models and the sentences of refusals, for the tests of checkpoints and weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from config import UserError

DISTILLED = "deit_tiny_distilled_patch16_224"


def small_vit(name: str = "deit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    torch.manual_seed(kwargs.pop("seed", 0))
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model(name, **{**size, **kwargs})


def small_swin(**kwargs: Any) -> nn.Module:
    torch.manual_seed(kwargs.pop("seed", 0))
    size = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", **{**size, "num_classes": 5, **kwargs})


def training_state(model: nn.Module) -> dict[str, Any]:
    """The state of a run after 3 of its 5 epochs and 2 of 4 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": None,
        "stabilizer": {},
        "probe": {},
        "epoch": 3,
        "step": 2,
        "steps_per_epoch": 4,
        "best_top1": 12.5,
        "meter": {"loss": [0.1 + 0.2, 2.0]},
        "config": "schedule: {epochs: 5}",
        "pair": (1, True),
    }


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(call: Callable[[], Any]) -> str:
    """The message of the UserError `call` must raise: one sentence, without a chain of tracebacks."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 400
    assert caught.value.__cause__ is None and (caught.value.__context__ is None or caught.value.__suppress_context__)
    return message


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run, (step, value) by tag, without times and rates."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith(("seconds", "_per_s"))]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
