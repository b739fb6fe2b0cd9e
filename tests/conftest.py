"""Settings of every test: gpu-marked tests need a CUDA device, and torch takes two threads at most."""

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
