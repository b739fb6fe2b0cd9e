"""Runs whose passes are recorded as CUDA graphs, against runs that launch every kernel: the same, bit for bit."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    FULL,
    METHODS,
    before_step,
    break_weight,
    differences,
    environment,
    exit_code,
    in_two_processes,
    outcome,
    replace,
    stop_itself,
    tiny,
    train,
)
from torch import nn

import engine
from quantization import QuantLinear, build_recipe
from quantization.layers.clock import NoiseClock
from training.graphs import WARM_UP, GraphedPasses

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("in_this_process")]

LONG = ["--device", "cuda", "--epochs", "6", "--log-every", "5"]  # 24 steps
MX = ["--quant.scheme", "mx"]
CASES = {
    "full precision": [],
    "everything, two micro-batches": [*FULL, "--batch-size", "8", "--clip-grad", "1"],
    "everything, four micro-batches": [*FULL, "--batch-size", "4"],
    "fp8": [*MX, "--quant.carrier", "fp8"],
    "compiled": [*MX, "--compile"],
    "probes": [*MX, "--probes", "--probes.steps", "3"],
    **{method: [*MX, *flags] for method, flags in METHODS.items()},
}
RECORDINGS = {"everything, two micro-batches": 2, "everything, four micro-batches": 3}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every recorded step, from 1."""
    steps: list[int] = []
    record = GraphedPasses._record

    def note(passes: GraphedPasses, *args: object) -> object:
        steps.append(passes.steps)
        return record(passes, *args)

    monkeypatch.setattr(GraphedPasses, "_record", note)
    return steps


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_bit_for_bit(case: str, recorded: list[int], tmp_path: Path) -> None:
    runs = [train(tmp_path / "eager", *LONG, *CASES[case], "--no-cuda-graphs")]
    assert not recorded
    runs.append(train(tmp_path / "graphs", *LONG, *CASES[case]))
    assert recorded == [WARM_UP + 1] * RECORDINGS.get(case, 1)
    assert differences(*map(outcome, runs)) == []


def test_noise_that_does_not_move_would_show(
    recorded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a clock that puts its position somewhere else in memory leaves a recorded pass with the old one."""

    def seek(clock: NoiseClock, position: int) -> None:
        clock.next_position, clock.sought = torch.full_like(clock.next_position, position), True

    monkeypatch.setattr(NoiseClock, "seek", seek)
    runs = [train(tmp_path / name, *LONG, *MX, *more) for name, more in {"a": ["--no-cuda-graphs"], "b": []}.items()]
    assert recorded and differences(*map(outcome, runs))


@pytest.mark.parametrize("step", [7, 14])
def test_a_stopped_run_goes_on_bit_for_bit(
    step: int, recorded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(tmp_path / "straight", *LONG, *FULL)
    with monkeypatch.context() as patch:
        replace(patch, engine.train_step, before_step(step, stop_itself))
        assert exit_code(tiny(tmp_path / "run", *LONG, *FULL)) == 128 + 15
    train(tmp_path / "run", *LONG, *FULL, "--resume", "auto")
    assert len(recorded) >= 2
    assert differences(outcome(straight)["last.pt"], outcome(tmp_path / "run")["last.pt"]) == []


def test_a_recorded_step_that_fails_is_named(
    recorded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(monkeypatch, engine.train_step, before_step(17, break_weight))
    assert exit_code(tiny(tmp_path / "run", *LONG, *MX)) == 1
    assert recorded
    error = capsys.readouterr().err
    assert re.match(r"error: Step 1 of epoch 4: .* is the parameter blocks\.1\.mlp\.fc1\.weight; the last good ", error)


def test_a_step_does_not_wait_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[bool] = []
    step = engine.train_step

    def watched(run: engine.Run, batches: object) -> dict[str, float]:
        torch.cuda.set_sync_debug_mode("error" if run.global_step > WARM_UP + 1 else "default")
        try:
            return step(run, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            late.append(run.in_flight is not None)

    replace(monkeypatch, engine.train_step, watched)
    train(tmp_path / "run", *LONG, *MX, "--mixup", "0", "--cutmix", "0")
    assert late == [False] + [True] * 23  # and no step waits for its own figures


def test_a_graph_of_one_s_own_draws_fresh_noise_at_every_replay() -> None:
    """Outside our training loop: torch.cuda.graph around a model, which moves its position on by itself."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        layer = QuantLinear.from_linear(nn.Linear(64, 64, device="cuda"), build_recipe(forward="stochastic"))
        x = torch.randn(32, 64, device="cuda")
        layer.noise.seek(0)
        eager = [layer(x) for _ in range(4)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = layer(x)
        layer.noise.seek(1)
        for expected in eager[1:]:
            graph.replay()
            assert torch.equal(y, expected)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(eager, 2))


STUBBORN = """
import sys
import engine
from helpers import before_step, exit_code, tiny

def wait(run):
    run.model.blocks[0].register_forward_hook(lambda _module, _inputs, output: output.sum().item() and None)

engine.train_step = before_step(0, wait)
sys.exit(exit_code(tiny(sys.argv[1], *sys.argv[2:])))
"""


def test_a_model_that_waits_for_the_device_is_refused_in_one_sentence(tmp_path: Path) -> None:
    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", STUBBORN, str(tmp_path / f"run{len(flags)}"), *LONG, *flags]
        there = environment()
        there["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parent}"
        return subprocess.run(command, env=there, capture_output=True, text=True, timeout=200)

    refused = run()
    assert refused.returncode == 2, refused.stderr
    last = [line for line in refused.stderr.splitlines() if line.strip()][-1]
    assert last.startswith("error: Forward and backward pass cannot be recorded as a CUDA graph (")
    assert "pass --no-cuda-graphs" in last and "Traceback" not in refused.stderr
    assert run("--no-cuda-graphs").returncode == 0


@pytest.mark.parametrize("flags", [[], [*FULL, "--batch-size", "4"]], ids=["plain", "two micro-batches"])
def test_two_gpus_train_the_same_bit_for_bit(flags: list[str], tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    runs = {"eager": ["--no-cuda-graphs"], "graphs": []}
    argvs = [tiny(tmp_path / name, *LONG, *MX, *flags, *more) for name, more in runs.items()]
    eager, graphs = in_two_processes(tmp_path, [{"argv": argv} for argv in argvs])
    for reports in (eager, graphs):
        assert [r["code"] for r in reports] == [0, 0], reports
        assert reports[0]["weights"] == reports[1]["weights"] and len(reports[0]["weights"]) == 24
    assert eager[0]["weights"] == graphs[0]["weights"]
    assert differences(outcome(tmp_path / "eager"), outcome(tmp_path / "graphs")) == []
