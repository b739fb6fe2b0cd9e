"""What the benchmarks share: their options, timing in turns, a run as main.py builds it, rows of results.csv."""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import math
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import UserError, load_config  # noqa: E402
from config.explain import fail  # noqa: E402
from engine import Run, train_step  # noqa: E402
from main import build_run  # noqa: E402
from models import ZOO  # noqa: E402
from record.manifest import git_state  # noqa: E402
from training.processes import environment_number  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results.csv"
MODELS = tuple(dict.fromkeys(model.column for model in ZOO))
FIELDS = [
    *("date", "gpu", "torch", "triton", "commit"),  # where
    *("benchmark", "case", "shape", "variant"),  # what
    *("p20_ms", "p50_ms", "p80_ms", "samples", "baseline", "ratio", "rate", "rate_unit", "peak_gib"),
]
# Models cut down to a narrow block a stage, for --quick.
TINY = {"deit": "{embed_dim: 64, depth: 1, num_heads: 2}"}
TINY["swin"] = "{embed_dim: 24, depths: [1, 1, 1, 1], num_heads: [1, 2, 4, 8]}"
CACHE_BYTES = 2**30  # many times the last-level cache of any GPU


# ---------------------------------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------------------------------


COUNTS = ("batch", "batches", "tokens", "files", "steps", "images", "size")  # options of some benchmarks


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"Command line: {message}; see --help.")


def parser_for(doc: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has; `doc`: the text of its --help."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"samples of each variant (default: {rounds})")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before those that count (default: 5)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes and 2 rounds, on a CPU where there is no GPU: shows that it works; not recorded by itself",
    )
    parser.add_argument(
        "--output", type=Path, help="CSV file that rows are appended to (default: benchmarks/results.csv)"
    )
    parser.add_argument("--commit", help="the commit measured, where git cannot tell (a copy without .git)")
    return parser


def add_carrier(parser: argparse.ArgumentParser) -> None:
    """--carrier, which `parse` also gives as options.carrier_override and options.carrier_suffix."""
    parser.add_argument(
        "--carrier", default="bf16", choices=["bf16", "fp8"], help="quant.carrier: dtype of the products' operands"
    )


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, on_cpu: bool = False
) -> tuple[argparse.Namespace, torch.device]:
    """(options, device). Raises UserError where there is no GPU to measure, or a number makes no sense.

    on_cpu: whether the benchmark means something on a CPU too, which is then taken where there is no GPU, or where its
    option --cpu says so.
    """
    options = parser.parse_args(argv)
    fp8 = getattr(options, "carrier", "bf16") == "fp8"
    options.carrier_override, options.carrier_suffix = (["quant.carrier=fp8"], " fp8") if fp8 else ([], "")
    if options.quick:
        options.rounds, options.warmup = 2, 1
    for name in COUNTS:
        given = getattr(options, name, None)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            raise UserError(f"Command line: --{name} must be at least 1.")
    if options.rounds < 2 or options.warmup < 1:
        raise UserError("Command line: --rounds must be at least 2 and --warmup at least 1.")
    if torch.cuda.is_available() and not getattr(options, "cpu", False):
        device = torch.device("cuda", environment_number("LOCAL_RANK", torch.cuda.current_device()))
        torch.cuda.set_device(device)
        return options, device
    if not options.quick and not on_cpu:
        raise UserError("This benchmark needs a CUDA device and torch sees none; --quick runs a tiny one on the CPU.")
    return options, torch.device("cpu")


def command(benchmark: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run it, with a mistake of the user as one sentence and exit code 2."""
    try:
        benchmark(None)
    except UserError as error:
        fail(error)
    except torch.OutOfMemoryError as error:
        fail(f"Out of device memory, so choose smaller sizes: {str(error).split('. ')[0]}.")
    raise SystemExit(0)


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    options: argparse.Namespace,
    *,
    kernels: bool,
    uncounted: int = 0,
    repeat: int = 1,
) -> dict[str, list[float]]:
    """Milliseconds of every call, by its name, one sample a round.

    The calls take turns, and each round begins with another one, so that drifts of the machine meet all of them alike.
    On a GPU times are those between two events around a call.

    kernels: before each call a buffer larger than the cache is written, so that no call finds its input there, and
        nothing waits until the round is over: the first launches of a call are hidden by that writing. Otherwise each
        call begins on an idle device and ends when the device has finished, launches included.
    uncounted: calls before those that count in every turn, so that they follow their own kind, as in training.
    repeat: how many calls in a row count, without waiting for the device between them; a sample is their mean.

    In a quick run every call counts and is a sample.
    """
    uncounted, repeat = (0, 1) if options.quick else (uncounted, repeat)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    cuda = device.type == "cuda"
    cache = torch.empty(CACHE_BYTES if cuda and kernels else 0, dtype=torch.int8, device=device)
    for round_ in range(options.warmup + options.rounds):
        first = round_ % len(names)
        marks = {}
        for name in names[first:] + names[:first]:
            for _ in range(uncounted):
                calls[name]()
            if not cuda:
                began = time.perf_counter()
                for _ in range(repeat):
                    calls[name]()
                marks[name] = 1e3 * (time.perf_counter() - began) / repeat
                continue
            if not kernels:
                torch.cuda.synchronize(device)
            cache.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeat):
                calls[name]()
            end.record()
            if not kernels:
                end.synchronize()
            marks[name] = begin, end
        if cuda:
            torch.cuda.synchronize(device)
            marks = {name: begin.elapsed_time(end) / repeat for name, (begin, end) in marks.items()}
        if round_ >= options.warmup:
            for name, milliseconds in marks.items():
                samples[name].append(milliseconds)
    return samples


def device_busy(call: Callable[[], object], device: torch.device, times: int = 3) -> list[float]:
    """Milliseconds of each of `times` calls in which a GPU works: its kernels and copies, overlaps counted once."""
    samples = []
    for _ in range(times):
        torch.cuda.synchronize(device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            call()
            torch.cuda.synchronize(device)
        on_gpu = (e.time_range for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        samples.append(union_of((interval.start, interval.end) for interval in on_gpu) / 1e3)
    return samples


def union_of(intervals: Iterable[tuple[float, float]]) -> float:
    """How much of a line intervals (begin, end) cover."""
    covered, reached = 0.0, -math.inf
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def peak_gib(call: Callable[[], object], own: object, device: torch.device, *, on_cpu: bool = False) -> float | None:
    """The most device memory (GiB) that a process with nothing but this call in it would hold at once; None on a CPU.

    own: what the call keeps between calls, in containers of tensors: counted once, wherever else it is in use. on_cpu:
    measure a CPU too, what torch's allocator gives; what libraries take beside it is not seen.
    """
    if device.type != "cuda":
        return _peak_of_cpu(call, own) if on_cpu else None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(own) if t.is_cuda}
    return (torch.cuda.max_memory_allocated(device) - before + sum(storages.values())) / 2**30


def _peak_of_cpu(call: Callable[[], object], own: object) -> float:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events = sorted(events, key=lambda event: event.start_ns())
    held = itertools.accumulate((event.nbytes() for event in events), initial=0)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(own)}
    return (max(held) + sum(storages.values())) / 2**30


def recorded_gib(run: Run) -> float:
    """Device memory (GiB) that the CUDA graphs of a run hold: batch, activations, gradients and gaps between them."""
    if run.graphs is None:
        return 0.0
    recorded = run.graphs.recorded.values()
    pools = {tuple(one.graph.pool()) for one in recorded}
    segments = torch.cuda.memory_snapshot()
    held = sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) in pools)
    return (held + sum(t.nbytes for one in recorded for t in (one.images, one.targets))) / 2**30


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(tensors_in, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(tensors_in, value))


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def method_config(model: str, method: str) -> Path:
    """The configuration of a row of Table 2, or of another FP4 method. Raises UserError where there is none."""
    folders = (ROOT / "configs", ROOT / "configs/methods")
    for folder in folders:
        if (path := folder / f"{model}_{method}.yaml").is_file():
            return path
    methods = [p.stem.removeprefix(f"{model}_") for folder in folders for p in sorted(folder.glob(f"{model}_*.yaml"))]
    raise UserError(f"Command line: {model} has no method {method}; expected one of {', '.join(methods)}.")


def make_run(
    config: Path,
    device: torch.device,
    *,
    batch: int,
    quick: bool,
    overrides: Iterable[str] = (),
    rank: int = 0,
    world_size: int = 1,
) -> Run:
    """A run of a configuration at the start of training, as main.py builds it, `batch` generated images a process.

    Nothing but the data differs from the recipe, and there is no mixup: its targets would hide the cross-entropy.
    Passes are launched kernel by kernel unless `overrides` has run.cuda_graphs=true.
    """
    smaller = ["model.img_size=32", f"model.kwargs={TINY['swin' if config.stem.startswith('swin') else 'deit']}"]
    data = {
        "data.set": "generated",
        "data.num_images": batch * world_size,
        "data.num_workers": 0,
        "data.batch_size": batch,
        "optim.global_batch": batch * world_size,
        "aug.repeats": 1,
        "aug.mixup": 0,
        "aug.cutmix": 0,
        "probes.enabled": "false",
        "run.amp": "bfloat16",
        "run.cuda_graphs": "false",
    }
    common = [*(f"{key}={value}" for key, value in data.items()), *(smaller if quick else [])]
    cfg = load_config(config, [*common, *overrides], source="the command line")
    with tempfile.TemporaryDirectory() as folder:  # in which nothing is written
        run = build_run(cfg, Path(folder) / "run", rank=rank, world_size=world_size, device=device)
    run.wrapped.train()
    return run


def make_batch(run: Run) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) of noise and labels (B,) on the run's device, for steps of any run of this shape."""
    size, generator = run.cfg.model.img_size, torch.Generator().manual_seed(0)
    images = torch.randn(run.batch_size, 3, size, size, generator=generator)
    return images.to(run.device), torch.arange(run.batch_size, device=run.device) % run.data.num_classes


def step_of(run: Run, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """One whole training step of a run on `batch`: forward, backward, gradient norm, optimizer, stabilizer."""
    return lambda: train_step(run, itertools.repeat(batch))


def state_of(run: Run, batch: tuple[Tensor, Tensor]) -> list[object]:
    """All tensors that a run keeps from step to step, and the batch."""
    stabilizer = run.stabilizer.state_dict()
    return [list(run.model.parameters()), list(run.model.buffers()), run.optimizer.state_dict(), stabilizer, batch]


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """The rows of one benchmark, printed and appended to a CSV file as they come.

    benchmark: its name; options: those of `parse`, and of several processes their `rank`, of which the first writes.
    Raises UserError where the file is another's.
    """

    benchmark: str
    options: argparse.Namespace
    device: torch.device
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        git, cuda = git_state(), self.device.type == "cuda"
        commit = self.options.commit or (git["commit"] or "unknown")[:12] + ("+changes" if git["dirty"] else "")
        self._where = {
            "date": datetime.now(timezone.utc).date().isoformat(),
            "gpu": torch.cuda.get_device_name(self.device) if cuda else self._cpu(),
            "torch": torch.__version__,
            "triton": _triton_version(),
            "commit": commit,
        }
        print(
            ", ".join(f"{value}" if key == "gpu" else f"{key} {value}" for key, value in self._where.items() if value)
        )
        recorded = self.options.output or not self.options.quick
        print(f"rows go to {self.options.output or RESULTS}" if recorded else "A quick run: nothing is recorded.")
        self._write()  # a file that cannot be written is known before anything is measured

    def _cpu(self) -> str:
        """Quick runs, which show that a benchmark works, are of any CPU."""
        if self.options.quick:
            return "CPU"
        with contextlib.suppress(OSError):
            names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
            return f"CPU {names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
        return f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

    def add(
        self,
        case: str,
        shape: str,
        samples: Mapping[str, Sequence[float]],
        baselines: Mapping[str, str],
        *,
        rate: Callable[[str, float], float] | None = None,
        rate_unit: str = "",
        peaks: Mapping[str, float | None] | None = None,
    ) -> None:
        """Rows of one case.

        samples: milliseconds by variant. baselines: the variant that each is compared with: ratio is p50 over its p50.
        rate: (variant, seconds) -> how much of `rate_unit`. peaks: GiB by variant.
        """
        p50 = {variant: statistics.median(times) for variant, times in samples.items()}
        print(f"\n{case} ({shape})")
        for variant, times in samples.items():
            deciles = statistics.quantiles(times, n=10, method="inclusive")
            peak = (peaks or {}).get(variant)
            row = {
                **self._where,
                **{"benchmark": self.benchmark, "case": case, "shape": shape, "variant": variant},
                **{"p20_ms": deciles[1], "p50_ms": p50[variant], "p80_ms": deciles[7], "samples": len(times)},
                **{"baseline": baselines[variant], "ratio": p50[variant] / p50[baselines[variant]]},
                **{"rate": rate(variant, p50[variant] / 1e3) if rate else None, "rate_unit": rate_unit},
                "peak_gib": peak,
            }
            self.rows.append(row)
            figures = f"{row['p50_ms']:10.3f} ms ({row['p20_ms']:.3f} to {row['p80_ms']:.3f}) {row['ratio']:8.3f}"
            figures += f" {row['rate']:10.4g} {rate_unit}" if rate else ""
            figures += f" {peak:7.2f} GiB" if peak is not None else ""
            print(f"  {variant:<34}{figures}", flush=True)
        self._write()  # what has been measured outlives a failure of the next case

    def _write(self) -> None:
        """Append the rows since the last call; of a quick run only where --output says so.

        Raises UserError where the file is another's.
        """
        path = self.options.output or (None if self.options.quick else RESULTS)
        if path is None or getattr(self.options, "rank", 0):
            self.rows.clear()
            return
        header = f"{','.join(FIELDS)}\n"
        try:
            old = path.read_text(encoding="utf-8") if path.exists() else ""
            if old and not old.startswith(header):
                raise UserError(f"{path} has other columns than {', '.join(FIELDS)}; choose another --output.")
            with path.open("a", encoding="utf-8", newline="") as file:
                file.write("" if old else header)
                csv.DictWriter(file, FIELDS, lineterminator="\n").writerows(map(_as_text, self.rows))
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); choose another --output.") from None
        self.rows.clear()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:  # there is none for macOS, for example
        return ""
    return triton.__version__


def _as_text(row: Mapping[str, Any]) -> dict[str, Any]:
    """Five digits of every figure."""
    return {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}
