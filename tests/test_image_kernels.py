"""The kernels of images/ against Pillow, bit for bit, on the CPU: in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")

if not INTERPRETED:

    def test_kernels_in_the_interpreter():
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        env.pop("PYTEST_XDIST_WORKER", None)
        root = Path(__file__).parent.parent
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-7000:]

else:
    import fast_interpreter
    from image_cases import drawn_batch, every_operation, extreme_batch, smallest_batch, unequal

    fast_interpreter.install()

    # More images of each on a GPU (tests/test_gpu_images.py).
    @pytest.mark.parametrize("case", ["deit", "weighted", "three", "jitter", "evaluation"])
    def test_kernels_give_pillows_bits(case):
        assert unequal(drawn_batch(case, 24, 4, CPU, files=True), 24, CPU) == []

    def test_kernels_give_pillows_bits_of_extreme_images():
        operations = every_operation()
        assert unequal(extreme_batch(12, CPU, operations[::16]), 12, CPU) == []

    def test_kernels_give_pillows_bits_of_images_of_a_few_pixels():
        assert unequal(smallest_batch(16, 8, CPU), 16, CPU) == []

    def test_another_operation_is_noticed():
        batch = drawn_batch("jitter", 16, 4, CPU)
        sample = batch.samples[0]
        others = tuple(operation._replace(kind=operation.kind ^ 1) for operation in sample.drawn.operations)
        batch.samples[0] = sample._replace(drawn=sample.drawn._replace(operations=others))
        assert [number for number, _ in unequal(batch, 16, CPU)] == [0]
