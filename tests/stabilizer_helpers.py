"""Planted layers and tiny runs for the tests of the stabilizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FULL, replace, train
from torch import Tensor, nn

import main
from config import load_config
from engine import Run
from quantization import PRESETS, LinearRecipe, QuantLinear
from quantization.stabilizers import Plan, build_stabilizer
from record.checkpoint import load_checkpoint

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # the magnitudes of e2m1 by their codes
TETRAJET = PRESETS["tetrajet"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: Tensor, recipe: LinearRecipe = TETRAJET) -> QuantLinear:
    """A layer (bias 0) with the weight (C, D); all have the same noise."""
    layer = QuantLinear.from_linear(nn.Linear(weight.shape[1], weight.shape[0]), recipe)
    layer.noise.reseed(0, 0)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_()
    return layer


def block(**latent: float) -> Tensor:
    """One row of 32 weights of scale 1: its largest, 6, and weights on the grid that stay where they are; `latent`:
    w3=0.7 sets weight 3."""
    weight = torch.full((1, 32), 2.0)
    weight[0, 0] = 6.0
    for name, value in latent.items():
        weight[0, int(name.removeprefix("w"))] = value
    return weight


def build(kind: str, *layers: nn.Module, total: int = 100, epoch: int = 10, **keys: Any) -> Any:
    """The stabilizer of a training of `total` steps in epochs of `epoch`, with further keys of its section."""
    section = ", ".join(f"{key}: {value}" for key, value in {"kind": kind, **keys}.items())
    cfg = load_config(overrides=["quant.scheme=mx", f"stabilizer={{{section}}}"]).stabilizer
    return build_stabilizer(cfg, nn.Sequential(*layers), Plan(epoch, total))


@torch.no_grad()
def put(layer: QuantLinear, column: int, value: float) -> None:
    """What an optimizer does: another value for weight (0, column)."""
    layer.weight[0, column] = value


def scale_by_hand(w: Sequence[float]) -> float:
    """The smallest power of two S with max |w| <= 6 S."""
    return next(2.0**s for s in range(-60, 60) if max(map(abs, w)) <= 6 * 2.0**s)


def nearest_code_by_hand(latent: float) -> int:
    """The signed index of the nearest value of the grid, ties to the even index."""
    index = min(range(8), key=lambda i: (abs(GRID[i] - abs(latent)), i % 2))
    return -index if latent < 0 else index


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------

# Two epochs of four steps of one block of 16 channels, with everything that is random or has a state.
SMALL = [*FULL, "--model.kwargs", "{embed_dim: 16, depth: 1, num_heads: 2}", "--data.num_images", "32"]
SMALL += ["--global-batch", "8", "--lr", "0.3", "--warmup-epochs", "0", "--schedule.step_on", "iteration"]
SMALL += ["--clip-grad", "1"]


def stabilized(kind: str, **keys: Any) -> list[str]:
    return [word for name, value in {"kind": kind, **keys}.items() for word in (f"--stabilizer.{name}", str(value))]


# Set so that eight steps suffice for each to act. A detection is longer than an epoch and not always at its start.
FLAGS = {
    "none": [],
    "qema": stabilized("qema", decay=0.8),
    "qramping": stabilized("qramping", k1=0.5, detect_steps=5, update_period=3),
    "dampen": stabilized("dampen", weight=0.1),
    "freeze": stabilized("freeze", momentum=0.3, threshold_start=0.2),
}
KINDS = [kind for kind in FLAGS if kind != "none"]


def last(folder: Path) -> dict[str, Any]:
    """The last checkpoint without the configuration, which names the folder."""
    state = load_checkpoint(folder / "last.pt")
    del state["config"]
    return state


def captured(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> Run:
    """The run as main.py makes it, before its first step."""
    runs: list[Run] = []
    with monkeypatch.context() as patch:
        replace(patch, main.train, lambda run, max_steps=None: runs.append(run))
        train(folder, *flags)
    return runs[0]
