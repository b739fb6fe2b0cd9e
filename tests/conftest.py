"""Settings of every test: gpu-marked tests need a CUDA device, and torch takes two threads at most. Shared fixtures."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from studies.pool import visible_gpus

torch.set_num_threads(min(2, torch.get_num_threads()))
# Several processes of tests begin with different GPUs of a machine; tests of two GPUs see them all.
_GPUS, _PROCESS = visible_gpus(), os.environ.get("PYTEST_XDIST_WORKER", "gw0")
if len(_GPUS) > 1:
    _FIRST = int(_PROCESS.removeprefix("gw")) % len(_GPUS)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(_GPUS[_FIRST:] + _GPUS[:_FIRST])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # First what takes longest: at the end one process would wait for the other.
    items.sort(key=lambda item: not item.name.endswith("in_the_interpreter"))


def pytest_collection_finish(session: pytest.Session) -> None:
    # What has been imported lives as long as the process: the collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    # The longest test is a process of its own, which one process of tests leaves a core to.
    alone = not hasattr(session.config, "workerinput")
    for item in session.items:
        if item.name == "test_in_the_interpreter" and alone:
            item.module.begin()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[None]:
    """For files whose tests call main.py as a function; see `undisturbed`."""
    from helpers import undisturbed

    with undisturbed():
        yield


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of two epochs without a stop, by the kind of its stabilizer; trained once."""
    from helpers import train
    from stabilizer_helpers import FLAGS, SMALL

    folder = tmp_path_factory.mktemp("straight")

    def run(kind: str) -> Path:
        if not (folder / kind).exists():
            with torch.enable_grad():  # whatever the test that asks first has switched off
                train(folder / kind, *SMALL, *FLAGS[kind])
        return folder / kind

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, for reading only."""
    from helpers import train, undisturbed

    with undisturbed():
        return train(tmp_path_factory.mktemp("finished") / "run", "--quant.scheme", "mx", "--model-ema")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(a="text", b="text") writes a.yaml and b.yaml and returns the path of the last."""

    def write(**texts: str) -> Path:
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return tmp_path / f"{list(texts)[-1]}.yaml"

    return write
