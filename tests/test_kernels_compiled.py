"""The Triton kernels compiled and launched for an H100 that is not there: what the interpreter sees nothing of.

A driver that launches nothing stands for CUDA's. So the branches that only a GPU takes compile, the launcher asks the
driver for what it has, and passes a kernel the same arguments when Triton launches it and when it does itself.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantization import PRESETS, QuantizerSpec
from quantization.job import DENSE, NOTHING, Job
from quantization.noise import Noise
from quantization.operands import G, LinearJobs, W, X
from quantization.rotation import Turn

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import GPUDriver  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402
from triton.runtime import driver  # noqa: E402

from quantization.backends.gpu import design_launch, int4, launch  # noqa: E402
from quantization.backends.gpu.launching import Launcher  # noqa: E402

SHARED_MEMORY = 232448  # bytes of a multiprocessor that a program may have


class Driver(CudaDriver):
    """CUDA's, without a device."""

    def __init__(self, launches: list[tuple[Any, ...]]) -> None:
        GPUDriver.__init__(self)
        self.get_current_device, self.get_current_stream = (lambda: 0), (lambda device: 0)
        properties = {
            "max_shared_mem": SHARED_MEMORY,
            "max_num_regs": 65536,
            "multiprocessorCount": 132,
            "warpSize": 32,
        }
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024), get_device_properties=lambda device: properties
        )
        self.launcher_cls = lambda source, metadata: lambda *arguments: launches.append(arguments)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each launch: programs, stream, what Triton adds, and the kernel's own behind it."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(driver, "_active", Driver(found))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU
    return found


@pytest.mark.parametrize(
    ("preset", "role"), [("tetrajet", X), ("tetrajet", G), ("nvfp4", G), ("quartet", X), ("quartet", W)]
)
def test_kernels_compile_and_are_launched(preset, role, launches):
    x = torch.zeros(256, 192, dtype=torch.float32 if role == W else torch.bfloat16)
    job = LinearJobs(PRESETS[preset], (192, 192))._make(
        role, torch.bfloat16, True, False, tuple(x.shape), True, True, role == G
    )
    noise = Noise(torch.zeros(2, dtype=torch.int64), 0)
    counts = []
    for _ in range(2):
        launch.prepare(x, job, noise)
        counts.append([(arguments[:3], len(arguments)) for arguments in launches])
        launches.clear()
    by_triton, by_us = counts
    assert by_triton == by_us and by_us


@pytest.mark.parametrize("size", [2, 32, 128])
def test_what_turns_gradients_back_compiles_and_is_launched(size, launches, monkeypatch):
    launchers = []
    monkeypatch.setattr(design_launch, "Launcher", lambda *a: launchers.append(Launcher(*a)) or launchers[-1])
    design_launch._turning.cache_clear()
    x, noise = torch.zeros(70, 384, dtype=torch.bfloat16), Noise(torch.zeros(2, dtype=torch.int64), 0)
    for _ in range(2):
        assert launch.turn_back(x, Turn(size, "fresh", 0), noise).shape == x.shape
    (launcher,) = launchers
    assert launcher.tile.rows * launcher.tile.columns <= 32 * 32 * launcher.tile.warps
    by_triton, by_us = ((arguments[:3], len(arguments)) for arguments in launches)
    assert by_triton == by_us
    assert "st.local" not in launcher.compiled.asm["ptx"]


def test_square_blocks_take_no_more_instructions_than_blocks_in_a_row(launches, monkeypatch):
    """Else threads do the work of others too, in kernels that compile for minutes; of matrices that are widened."""
    launchers = []

    def launcher(*arguments) -> Launcher:
        launchers.append(Launcher(*arguments))
        return launchers[-1]

    monkeypatch.setattr(design_launch, "Launcher", launcher)
    for size, axis in itertools.product(design_launch.SQUARES, (-1, 0)):
        design_launch._plan.cache_clear()
        for rows in (size, 1):
            spec = QuantizerSpec(axis=axis, block_size=size, block_rows=rows, scale_format="e4m3")
            specs, forms = ((spec, None), (DENSE, NOTHING)) if axis else ((None, spec), (NOTHING, DENSE))
            launch.prepare(torch.zeros(64, 96, dtype=torch.bfloat16), Job(*specs, *forms, torch.bfloat16))
        square, in_a_row = (one.compiled.asm["ptx"].count(";\n") for one in launchers)
        assert square <= in_a_row
        launchers.clear()


@pytest.mark.parametrize("scale_format", ["e8m0", "e8m3"])
def test_a_thread_has_at_most_128_numbers(scale_format):
    """Else kernels compile for minutes too."""
    plan = launch._plan if scale_format == "e8m0" else design_launch._plan
    for size in (2**power for power in range(8)):
        row, column = (QuantizerSpec(axis=axis, block_size=size, scale_format=scale_format) for axis in (-1, 0))
        assert launch.serves(row) and launch.serves(column)
        tile = plan(Job(row, column, DENSE, DENSE, torch.bfloat16), 256, 256).launch.tile
        assert tile.rows * tile.columns <= 128 * 32 * tile.warps


@pytest.mark.parametrize(("axis", "shadowed"), [(-1, False), (0, False), (-1, True)])
def test_no_register_of_one_nvfp4_matrix_is_spilt(axis, shadowed, launches, monkeypatch, tmp_path):
    """Rounded to nearest it has few registers a thread, so that many programs run; a shadow takes more of them."""
    launchers = []
    monkeypatch.setattr(design_launch, "Launcher", lambda *a: launchers.append(Launcher(*a)) or launchers[-1])
    design_launch._plan.cache_clear()
    spec = QuantizerSpec(axis=axis, block_size=16, scale_format="e4m3", outer="pow2")
    specs, forms = ((spec, None), (DENSE, NOTHING)) if axis else ((None, spec), (NOTHING, DENSE))
    x = torch.zeros(64, 96, dtype=torch.bfloat16)
    design_launch.prepare(x, Job(*specs, *forms, x.dtype), shadow=x.clone() if shadowed else None)
    (tmp_path / "kernel.cubin").write_bytes(launchers[0].compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    said = subprocess.run([tool, "--dump-resource-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True)
    assert " STACK:0 " in said.stdout


@pytest.mark.parametrize("name", ["split", "levels", "straight_through", "weighted_rows", "row_weights"])
def test_int4_s_kernels_compile_and_are_launched(name, launches, monkeypatch):
    launchers = []
    monkeypatch.setattr(int4, "Launcher", lambda *a: launchers.append(Launcher(*a)) or launchers[-1])
    int4._plan.cache_clear()
    x, v, one = torch.zeros(70, 384, dtype=torch.bfloat16), torch.zeros(70, 384), torch.ones(())
    call = {
        "split": lambda: int4.split(x, one, 14, 6, Noise(torch.zeros(2).long(), 0)),
        "levels": lambda: (int4.levels(v, -8, 7, torch.bfloat16),),
        "weighted_rows": lambda: (int4.weighted_rows(v, v, torch.ones(2, 70), 14, torch.bfloat16),),
        "straight_through": lambda: int4.straight_through(x, one, v, -8, 7),
        "row_weights": lambda: (int4.row_weights(v, 70, Noise(torch.zeros(2).long(), 0)),),
    }[name]
    for _ in range(2):
        assert all(out.shape == x.shape for out in call())
    assert len(launchers) == (8 if name == "row_weights" else 1)  # a round each, and what is drawn
    told = [(arguments[:3], len(arguments)) for arguments in launches]
    assert told[: len(launchers)] == told[len(launchers) :]  # Triton's launches and ours
    assert all("st.local" not in launcher.compiled.asm["ptx"] for launcher in launchers)
