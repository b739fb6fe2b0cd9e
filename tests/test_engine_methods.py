"""Runs of main.py by points of the design space: killed and resumed bit for bit, with probes and stabilizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FULL, differences, killed, outcome, train
from quick import some

from record.checkpoint import load_checkpoint
from record.recordings import read_recording

pytestmark = pytest.mark.usefixtures("in_this_process")

NVFP4 = ["--quant.block_size", "16", "--quant.scale_format", "e4m3", "--quant.outer", "pow2"]
DELAYED = [*NVFP4, "--quant.outer_delay", "3", "--quant.target_scale", "64"]
ROTATED = ["--quant.rotation", "{output: {size: 8}, grad_input: {signs: fresh}, grad_weight: {size: 16, signs: fresh}}"]
POINTS = {
    "delayed": DELAYED,
    "rotated, with Q-EMA": [*NVFP4, *ROTATED, "--stabilizer.kind", "qema"],
    "three quarters, checkpointed": ["--quant.scale_rule", "three_quarter", *ROTATED, "--grad-checkpointing"],
    "square, with Q-Ramping": [
        *NVFP4,
        *("--quant.quantizers", "{q2: {block_rows: 16}, q4: {block_rows: 16, rounding: nearest_even}}"),
        *("--quant.weight_operand", "original", "--stabilizer.kind", "qramping", "--stabilizer.detect_steps", "2"),
    ],
}


@pytest.mark.parametrize("point", some(POINTS, every=2))
def test_a_run_killed_and_resumed_goes_on_bit_for_bit(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*FULL, *POINTS[point], "--save-every", "2", "--schedule.step_on", "iteration"]
    straight = train(tmp_path / "straight", *flags)
    killed(monkeypatch, tmp_path / "run", 5, *flags)
    resumed = train(tmp_path / "run", *flags, "--resume", "auto")
    assert differences(outcome(straight), outcome(resumed)) == []
    if point == "delayed":
        held = {name: value for name, value in load_checkpoint(straight / "last.pt")["model"].items() if "held" in name}
        assert len(held) == 8 and all((value > 0).all() for value in held.values())


def test_quantizers_are_recorded_and_the_training_is_as_without(tmp_path: Path) -> None:
    flags = [*FULL, *DELAYED, "--probes"]
    without = train(tmp_path / "without", *flags)
    run = train(tmp_path / "with", *flags, "--probes.quantizers")
    first, second = (load_checkpoint(folder / "last.pt")["model"] for folder in (without, run))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    arrays = read_recording(sorted((run / "probes").glob("*.npz"))[-1])
    for name in ("mse", "gain", "underflow", "saturated"):
        values = arrays[f"quantizer_{name}"]
        assert values.shape == (len(arrays["layers"]), 6) and np.isfinite(values).all()
    assert "quantizer_mse" not in read_recording(sorted((without / "probes").glob("*.npz"))[-1])
