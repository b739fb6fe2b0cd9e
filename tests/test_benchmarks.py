"""The benchmarks run, on a CPU in a tiny size; what they share times in turns and records what it says."""

from __future__ import annotations

import argparse
import csv
import importlib
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_design
import bench_images
import bench_linear
import bench_operands
import bench_packed
import bench_probe
import bench_quantize
import bench_scaling
import bench_stabilizers
import bench_step
import common
import pytest
import torch
from helpers import ROOT, environment
from PIL import Image

from config import UserError, load_config, recipe_differences
from quantization import QuantizerSpec, QuantLinear, fake_quantize

pytestmark = pytest.mark.usefixtures("in_this_process")

UNROTATED = "nvfp4 quant.rotation={} quant.policy.last=0"  # a method and keys
BENCHMARKS = {
    "design": (bench_design.main, ["--dtypes", "bfloat16", "--points", "nvfp4", "square"]),
    "images": (bench_images.main, ["--models", "deit_tiny", "--pipelines", "float", "cpu", "--loader", "--stages"]),
    "linear": (bench_linear.main, ["--models", "deit_base", "--layers", "qkv", "fc2"]),
    "operands": (bench_operands.main, ["--layers", "fc2"]),
    "packed": (bench_packed.main, ["--models", "deit_tiny"]),
    "probe": (bench_probe.main, []),
    "quantize": (bench_quantize.main, ["--dtypes", "bfloat16"]),
    "stabilizers": (bench_stabilizers.main, []),
    "step": (
        bench_step.main,
        ["--models", "deit_tiny", "swin_tiny", "--methods", "tetrajet", UNROTATED, "--compile"],
    ),
}
AXES = ("-1", "0", "both")
CASES = {  # the variants of every case, the baseline of each
    "design": [["copy", "nvfp4", "nvfp4 H16", "square", "square H16"]] * 4,
    "images": [
        [
            *("decode (Pillow)", "decode (torchvision)", "header", "crop and resize", "flip"),
            *("RandAugment", "to tensor", "normalise", "seeds, and putting them back", "draws", "pack 32 of them"),
        ],
        ["host", "until it is made"],
        ["float", "cpu"],
        ["resident (cpu)", "cpu"],
    ],
    "linear": [["bf16", "tetrajet", "microscaling"]] * 2,
    "operands": [["copy", "bf16", "fp8"]] * 3 + [["copy", "bf16"]] + [["bf16", "fp8"]] * 3,
    "packed": [["bf16", "fp32", "packed", "packed, plain activations", "packed, fp32"]] * 2,
    "probe": [["off", "on", "on, last epoch", "ending"]],
    "quantize": [
        ["copy", "ours"]
        + ["ours, columns packed"] * (axis == "both")
        + ["torchao compiled", "reference compiled"] * (rounding == "nearest_even")
        for rounding in ("nearest_even", "stochastic")
        for axis in AXES
    ],
    "stabilizers": [["none", "qema", "qramping", "dampen", "freeze"], ["adamw", "qramping"]],
    "step": [["bf16", "tetrajet", UNROTATED, "bf16 compiled", "tetrajet compiled", f"{UNROTATED} compiled"]] * 2,
}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_and_records_what_it_measured(
    name: str, no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile_(call: Any, *, backend: str, **_: Any) -> Any:  # torch's takes longer than all else here
        compiled.append(backend)
        return call

    monkeypatch.setattr(torch, "compile", compile_)
    main, flags = BENCHMARKS[name]
    main([*flags, "--quick", "--output", str(tmp_path / "new.csv"), "--commit", "abc"])
    rows, cases = rows_of(tmp_path / "new.csv"), CASES[name]
    assert [row["variant"] for row in rows] == [variant for case in cases for variant in case]
    assert len({(row["case"], row["shape"], row["variant"]) for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == common.FIELDS
        assert (row["benchmark"], row["gpu"], row["commit"], row["samples"]) == (name, "CPU", "abc", "2")
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        [base] = [r for r in rows if (r["case"], r["variant"]) == (row["case"], row["baseline"])]
        assert float(row["ratio"]) == pytest.approx(float(row["p50_ms"]) / float(base["p50_ms"]), rel=1e-3)
        assert row["baseline"].endswith("compiled") == (name == "step" and row["variant"].endswith("compiled"))
    assert set(compiled) == ({"eager"} if name in ("quantize", "step") else set())


def test_a_quick_run_is_not_recorded_by_itself(
    no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results.csv")
    main, flags = BENCHMARKS["operands"]
    main([*flags, "--quick"])
    assert "A quick run: nothing is recorded." in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_and_a_machine_without_a_gpu(name: str, no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    main, _ = BENCHMARKS[name]
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "--rounds" in shown and "--quick" in shown and f"bench_{name}.py" in shown
    if name == "packed":  # which a CPU runs in full
        return
    with pytest.raises(UserError) as caught:
        main([])
    assert str(caught.value) == NO_GPU


NO_GPU = "This benchmark needs a CUDA device and torch sees none; --quick runs a tiny one on the CPU."


def test_a_mistake_at_the_command_is_one_line_and_exit_code_2(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(ROOT / "benchmarks/bench_linear.py")
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert (end.value.code, *capsys.readouterr()) == (2, "", f"error: {NO_GPU}\n")


def test_too_little_memory_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def too_large(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 TiB. GPU 0 has")

    with pytest.raises(SystemExit) as end:
        common.command(too_large)
    assert end.value.code == 2
    said = "error: Out of device memory, so choose smaller sizes: CUDA out of memory.\n"
    assert capsys.readouterr().err == said


MISTAKES: dict[str, tuple[Callable[..., None], list[str], str]] = {
    "flag": (bench_step.main, ["--model", "deit_tiny"], "unrecognized arguments: --model deit_tiny; see --help."),
    "model": (bench_step.main, ["--models", "vit"], "argument --models: invalid choice: 'vit'"),
    "method": (bench_step.main, ["--methods", "qem"], "deit_tiny has no method qem; expected one of fp, int4, micro"),
    "carrier": (bench_linear.main, ["--carrier", "fp4"], "argument --carrier: invalid choice: 'fp4'"),
    "shape": (bench_quantize.main, ["--shapes", "64"], "argument --shapes: 64 is no shape, such as 25216x3072; see"),
    "folder": (bench_quantize.main, ["--peers", "--output", "."], ". cannot be written (Is a directory); choose"),
}


@pytest.mark.parametrize(("main", "flags", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_sentence(main: Callable[..., None], flags: list[str], said: str, no_gpu: None) -> None:
    with pytest.raises(UserError) as caught:
        main([*flags, "--quick"])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_of_rounds(no_gpu: None) -> None:
    for flags in (["--rounds", "1"], ["--warmup", "0"]):
        with pytest.raises(UserError, match="--rounds must be at least 2 and --warmup at least 1"):
            common.parse(common.parser_for("", rounds=5), flags)


def test_one_process_is_no_two(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", "--quick"])
    with pytest.raises(SystemExit) as end:
        common.command(bench_scaling.main)
    said = "error: This benchmark needs several processes; start it with torchrun --nproc-per-node 2.\n"
    assert (end.value.code, capsys.readouterr().err) == (2, said)


def test_two_processes_against_one(tmp_path: Path) -> None:
    script, out = str(ROOT / "benchmarks/bench_scaling.py"), tmp_path / "out.csv"
    flags = ["--models", "deit_tiny", "--carriers", "bf16", "--quick", "--output", str(out), "--commit", "abc"]
    env = {**environment(), "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, script, *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = rows_of(out)
    assert [row["variant"] for row in rows] == [f"{v}, {n}" for v in ("bf16", "tetrajet") for n in ("1 GPU", "2 GPUs")]
    for row in rows:  # four images each process and step
        images = 8 if row["variant"].endswith("2 GPUs") else 4
        assert float(row["rate"]) * float(row["p50_ms"]) / 1e3 == pytest.approx(images, rel=1e-3)


def test_a_device_is_busy_where_intervals_cover_the_time() -> None:
    assert common.union_of([]) == 0
    assert common.union_of([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0  # the last within another


# ---------------------------------------------------------------------------------------------------------------------
# What they share
# ---------------------------------------------------------------------------------------------------------------------


def options_of(**values: Any) -> argparse.Namespace:
    defaults = {"rounds": 4, "warmup": 2, "quick": False, "output": None, "commit": "abc"}
    return argparse.Namespace(**{**defaults, **values})


def test_variants_take_turns_and_each_round_begins_with_another() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    samples = common.take_turns(calls, torch.device("cpu"), options_of(), kernels=False)
    assert "".join(called) == "abc" + "bca" + "cab" + "abc" + "bca" + "cab"
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", 4)
    assert all(time > 0 for times in samples.values() for time in times)


def test_a_turn_may_begin_with_calls_that_do_not_count() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    samples = common.take_turns(calls, torch.device("cpu"), options_of(), kernels=False, uncounted=2)
    assert "".join(called) == ("aaabbb" + "bbbaaa") * 3
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("ab", 4)


def test_a_quick_run_takes_every_call_once_in_a_turn() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    options = options_of(rounds=2, warmup=1, quick=True)
    samples = common.take_turns(calls, torch.device("cpu"), options, kernels=False, uncounted=2, repeat=4)
    assert "".join(called) == "ab" + "ba" + "ab"
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("ab", 2)


def test_a_sample_may_be_the_mean_of_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 12))
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    called: list[str] = []
    calls = {"a": lambda: called.append("a")}
    samples = common.take_turns(calls, torch.device("cpu"), options_of(), kernels=False, uncounted=1, repeat=3)
    assert samples == {"a": [4000.0] * 4} and len(called) == 6 * 4


def test_percentiles_ratios_and_rates(tmp_path: Path) -> None:
    results = common.Results("made", options_of(output=tmp_path / "a.csv"), torch.device("cpu"))
    samples = {"base": [float(n) for n in range(11)], "other": [20.0, 20.0, 26.0, 10.0, 30.0]}
    baselines, peaks = {"base": "base", "other": "base"}, {"base": 1.23456789, "other": None}
    results.add("case", "2x3", samples, baselines, rate=lambda name, s: len(name) / s, rate_unit="x/s", peaks=peaks)
    assert len(rows_of(tmp_path / "a.csv")) == 2
    results.add("case", "2x3", samples, baselines, rate=lambda name, s: len(name) / s, rate_unit="x/s", peaks=peaks)
    rows = rows_of(tmp_path / "a.csv")
    assert len(rows) == 4 and rows[:2] == rows[2:]  # below the same header, and nothing twice
    figures = [[row[name] for name in ("p20_ms", "p50_ms", "p80_ms", "ratio", "rate", "peak_gib")] for row in rows[:2]]
    assert figures == [["2", "5", "8", "1", "800", "1.2346"], ["18", "20", "26.8", "4", "250", ""]]
    before = (tmp_path / "a.csv").read_text()
    (tmp_path / "b.csv").write_text("time,case\n")
    with pytest.raises(UserError, match=r"b\.csv has other columns than date, gpu, "):
        common.Results("made", options_of(output=tmp_path / "b.csv"), torch.device("cpu"))
    assert ((tmp_path / "b.csv").read_text(), (tmp_path / "a.csv").read_text()) == ("time,case\n", before)


def test_results_go_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results.csv")
    results = common.Results("made", options_of(), torch.device("cpu"))
    results.add("case", "1", {"a": [1.0, 1.0]}, {"a": "a"})
    assert len(rows_of(tmp_path / "results.csv")) == 1
    assert common.Results("made", options_of(commit=None), torch.device("cpu"))._where["commit"]


@pytest.mark.parametrize("model", common.MODELS)
def test_the_step_measured_is_that_of_the_recipe(model: str) -> None:
    """At full size nothing but the data, mixup, probes and autocast is set, and the model is the configured one."""
    config = common.method_config(model, "tetrajet")
    run = common.make_run(config, torch.device("cpu"), batch=2, quick=False)
    found = recipe_differences(load_config(config).model_dump(mode="json"), run.cfg.model_dump(mode="json"))
    allowed = {"optim.global_batch", "data.set", "data.num_images", "aug.repeats", "aug.mixup", "aug.cutmix"}
    assert {difference.split()[0] for difference in found} <= allowed
    quantized = sum(isinstance(module, QuantLinear) for module in run.model.modules())
    assert quantized == (96 if model == "swin_small" else 48) and run.wrapped.training and run.mixup is None
    assert run.amp == torch.bfloat16 and type(run.optimizer) is torch.optim.AdamW
    images, labels = common.make_batch(run)
    assert images.shape == (2, 3, 224, 224) and labels.tolist() == [0, 1]


def test_a_carrier_reaches_the_layers(no_gpu: None) -> None:
    parser = common.parser_for("", rounds=5)
    common.add_carrier(parser)
    carriers = {}
    for flags in ([], ["--carrier", "fp8"]):
        options, device = common.parse(parser, ["--quick", *flags])
        config = common.method_config("deit_tiny", "tetrajet")
        run = common.make_run(config, device, batch=2, quick=True, overrides=options.carrier_override)
        found = {module.recipe.carrier for module in run.model.modules() if isinstance(module, QuantLinear)}
        carriers[options.carrier_suffix] = found
    assert carriers == {"": {"bf16"}, " fp8": {"fp8"}}


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("rule", ["truncation_free", "floor"])
def test_the_peer_computes_the_same(rule: str, axis: int) -> None:
    x = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    spec = QuantizerSpec(scale_rule=rule, axis=axis)
    peer = bench_quantize.torchao_quantizer(spec)
    assert torch.equal(peer(x), fake_quantize(x, spec))
    assert not torch.equal(peer(x), fake_quantize(x, QuantizerSpec(scale_rule=rule, axis=-1 - axis)))  # the control
    assert bench_quantize.torchao_quantizer(QuantizerSpec(rounding="stochastic")) is None


def test_tensors_are_found_in_containers() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [len(t) for t in common.tensors_in([{"x": a, "n": 3}, (b, [c]), None])] == [1, 2, 3]


@pytest.mark.gpu
def test_the_peak_is_that_of_the_call_and_what_it_keeps() -> None:
    device, mib = torch.device("cuda"), 2**20
    other = torch.empty(64 * mib, dtype=torch.int8, device=device)
    kept = torch.empty(16 * mib, dtype=torch.int8, device=device)

    def call() -> None:
        torch.empty(32 * mib, dtype=torch.int8, device=device)

    assert common.peak_gib(call, [kept, kept.view(-1, 2)], device) == pytest.approx(48 / 1024)
    assert common.peak_gib(call, [kept, other], device) == pytest.approx(112 / 1024)


def test_the_peak_on_a_cpu_is_too() -> None:
    device, mib = torch.device("cpu"), 2**20
    kept = torch.empty(16 * mib, dtype=torch.int8)

    def call() -> None:
        torch.empty(32 * mib, dtype=torch.int8)
        torch.empty(8 * mib, dtype=torch.int8)

    assert common.peak_gib(call, [kept, kept.view(-1, 2)], device, on_cpu=True) == pytest.approx(48 / 1024, rel=1e-3)
    assert common.peak_gib(call, [kept], device) is None


def test_packed_models_are_measured_on_a_cpu_in_full_which_has_a_name(
    tmp_path: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = bench_packed.variants
    monkeypatch.setattr(bench_packed, "variants", lambda column, quick, device: variants(column, True, device))
    flags = ["--models", "deit_tiny", "--batches", "1", "--rounds", "2", "--warmup", "1", "--commit", "abc"]
    bench_packed.main([*flags, "--cpu", "--output", str(tmp_path / "new.csv")])
    rows = {row["variant"]: row for row in rows_of(tmp_path / "new.csv")}
    assert {row["gpu"] for row in rows.values()} == {rows["bf16"]["gpu"]}
    assert rows["bf16"]["gpu"].startswith("CPU ") and rows["bf16"]["gpu"].endswith(" threads")
    peaks = {variant: float(row["peak_gib"]) for variant, row in rows.items()}
    assert 0 < peaks["packed, plain activations"] < peaks["fp32"] and peaks["bf16"] < peaks["fp32"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("cpu.stat", "usage_usec 9\nthrottled_usec 2500\n"), ("cpu/cpu.stat", "nr_periods 3\nthrottled_time 2500000\n")],
)
def test_what_a_cpu_limit_has_taken(name: str, text: str, tmp_path: Path) -> None:
    assert bench_images.held_back_ms(tmp_path) == 0
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert bench_images.held_back_ms(tmp_path) == 2.5


def test_what_streams_do_in_a_step() -> None:
    model, images = [(0.0, 10.0), (10.5, 20.0), (26.0, 30.0)], [(9.0, 12.0), (22.0, 23.0)]
    said = bench_images.described({7: model, 13: images}, 2)
    assert said == (
        "the device works 12.5 ms a step, other streams than the model's 2.0; "
        "it rests 2 times for over a millisecond, 5.0 ms in 2 steps"
    )
    assert "rests 0 times" in bench_images.described({7: [(0.0, 1.0), (1.5, 2.0)]}, 1)


@pytest.mark.slow
def test_kernels_are_compared_with_pillow_and_controls_differ(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(bench_images.photograph(number, (64, 64)))
    flags = ["--data-path", str(tmp_path), "--images", "2", "--size", "24", "--quick"]
    env = {**environment(), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    script = str(ROOT / "benchmarks/check_images.py")
    done = subprocess.run([sys.executable, script, *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    largest = {name.removeprefix("| "): int(level) for name, level, *_ in rows}
    controls = {name for name in largest if name.startswith("control")}
    assert len(controls) == 2 and len(largest) == 14
    assert all((level > 0) == (name in controls) for name, level in largest.items()), largest


def test_what_is_no_photograph_is_left_out_by_its_name(tmp_path: Path) -> None:
    photograph = bench_images.photograph(0, (64, 64))
    (tmp_path / "text.jpg").write_bytes(b"no image")
    (tmp_path / "cut.jpg").write_bytes(photograph[:300])
    Image.new("RGB", (8, 8)).save(tmp_path / "other.jpg", "PNG")
    Image.new("L", (8, 8)).save(tmp_path / "grey.jpg")
    script = [sys.executable, str(ROOT / "benchmarks/check_images.py"), "--data-path", str(tmp_path), "--quick"]
    env = {**environment(), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "holds no JPEG files in colour" in done.stderr and "Traceback" not in done.stderr
    assert {Path(line.split()[2]).name for line in done.stderr.splitlines() if line.startswith("left out: ")} == {
        "text.jpg",
        "cut.jpg",
    }


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("check_images", ["--data-path", ".", "--images", "0"], "--images must be at least 1"),
        ("check_images", ["--data-path", ".", "--size", "-3"], "--size must be at least 1"),
        ("bench_images", ["--files", "0"], "--files must be at least 1"),
        ("bench_images", ["--steps", "-2"], "--steps must be at least 1"),
        ("bench_images", ["--models", "tiny_imagenet", "--pipelines", "gpu, nvjpeg"], "kept on the device"),
        ("bench_packed", ["--batches", "4", "0"], "--batches must be at least 1"),
        ("bench_probe", ["--batch", "0"], "--batch must be at least 1"),
        ("bench_scaling", ["--batch", "0"], "--batch must be at least 1"),
        ("bench_stabilizers", ["--batch", "0"], "--batch must be at least 1"),
        ("bench_step", ["--batch", "0"], "--batch must be at least 1"),
        ("bench_linear", ["--tokens", "0"], "--tokens must be at least 1"),
    ],
)
def test_numbers_that_count_nothing_are_told_of(name: str, flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        importlib.import_module(name).main([*flags, "--quick"])


def test_turns_that_cross_the_end_of_an_epoch_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(rounds=3, busy=False, quick=False, steps=16)
    bench_images.say_if_short(97, options)  # the first, and three turns of 16 and 16
    assert not capsys.readouterr().out
    bench_images.say_if_short(96, options)
    assert "97 batches are taken, and an epoch has 96" in capsys.readouterr().out


@pytest.mark.gpu
def test_a_device_is_as_busy_with_a_graph_as_with_its_kernels() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        x @ x
        with torch.cuda.graph(graph, stream=stream):
            x @ x
    alone, replayed, twice = (
        min(common.device_busy(call, device)) for call in (lambda: x @ x, graph.replay, lambda: x @ x @ x)
    )
    assert 0 < replayed == pytest.approx(alone, rel=0.2) and twice == pytest.approx(2 * alone, rel=0.2)
