"""Images from files to the model: loader processes and device alone, and whole training against a resident batch.

    python benchmarks/bench_images.py [--models deit_tiny swin_tiny] [--pipelines cpu gpu] [--workers 16] [--loader]
                                      [--busy]
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_images.py [...]       # a GPU and its share of cores each

It makes its own JPEG files of ImageNet's size (500x375, about 70 kB; --files of them) in a temporary folder, and trains
from them with the recipe's augmentation, mixup included. `resident` is the same run on one batch that stays on the
device. Turns of --steps steps alternate; a sample is the mean step of a turn, after the batches are gone that were made
in the other's. All turns of a model lie in one epoch, if there are files enough: the first batch of the next is waited
for, which with ImageNet happens once in thousands of steps. Rows of `loader` are of the batches alone, with nothing
else on the device; `float` is what loader processes finish by themselves, as they did before there were pipelines. Rows
of `cpu` give what one core spends on an image, stage by stage, and rows of `finish` what the main process and the
device spend on a batch.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from bench_step import BATCH
from common import MODELS, TINY, Results, command, method_config, parse, parser_for, union_of
from PIL import Image

from config import UserError, load_config
from datasets import Data, build_data
from engine import Run, train_step
from images.draws import Drawing
from images.gpu import Finisher
from images.order import AUGMENT, seeded
from images.packed import Draws
from images.parcel import Parcel, pack
from images.pipeline import PIECE
from images.transforms import train_transform
from main import build_run
from training.processes import Processes, environment_number

SIZE, SMALL = (500, 375), (64, 64)
TINY_IMAGENET = "tiny_imagenet"  # DeiT-T at 64x64 pixels, on a set that is kept on the device
QUALITY = 90  # which with the noise below gives files of about 70 kB
AHEAD = 16  # steps until the batches are gone that were made while nobody waited
PIPELINES = {
    "float": [],
    "cpu": ["data.pipeline=cpu"],
    "gpu": ["data.pipeline=gpu"],
    "gpu, libjpeg": ["data.pipeline=gpu", "data.gpu_decode=0"],
    "gpu, nvjpeg": ["data.pipeline=gpu"],  # and --decode
}


def photograph(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG file with edges, gradients and grain."""
    rng = np.random.default_rng(seed)
    image = np.zeros((size[1], size[0], 3))
    for side, weight in ((4, 90.0), (12, 60.0), (40, 30.0)):
        small = rng.normal(0, weight, (side, side + side // 3, 3)).astype(np.float32)
        planes = [Image.fromarray(small[:, :, c]).resize(size, Image.Resampling.BICUBIC) for c in range(3)]
        image += np.stack([np.asarray(plane) for plane in planes], 2)
    grain = rng.normal(0, 7.0, (size[1], size[0], 1))
    stream = io.BytesIO()
    pixels = (image + grain + 120).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def _write(task: tuple[str, int, tuple[int, int]]) -> int:
    path, seed, size = task
    return Path(path).write_bytes(photograph(seed, size))


def make_files(root: Path, count: int, size: tuple[int, int] = SIZE) -> None:
    """An image folder of two classes: 64 different files, linked as often as it takes."""
    different = min(64, count)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
    originals = [(str(root / f"{seed}.jpg"), seed, size) for seed in range(different)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        sizes = list(pool.map(_write, originals, chunksize=4))
    print(f"{count} files of {size[0]}x{size[1]}, {sum(sizes) / len(sizes) / 1e3:.1f} kB on average")
    for number in range(count):
        os.link(originals[number % different][0], root / "train" / "ab"[number % 2] / f"{number:06}.jpg")
        if number < 8:
            os.link(originals[number][0], root / "val" / "ab"[number % 2] / f"{number}.jpg")


def config_of(model: str, root: Path, options: Any, pipeline: str) -> list[str]:
    batch = 4 if options.quick else BATCH.get(model, 256)
    kept = 0.25 if model == TINY_IMAGENET else 0
    smaller = ["model.img_size=32", f"model.kwargs={TINY['swin' if model.startswith('swin') else 'deit']}"]
    return [
        *("data.set=imagenet", f"data.path={root}", f"data.batch_size={batch}"),
        f"optim.global_batch={batch * options.world_size}",
        *("run.amp=bfloat16", "probes.enabled=false", f"data.num_workers={options.workers}"),
        *("schedule.epochs=90", f"data.resident={kept}"),
        *(["aug.repeats=1"] if options.each_once else []),
        *(smaller if options.quick else []),
        *PIPELINES[pipeline],
        *([f"data.gpu_decode={options.decode}"] if pipeline.endswith("nvjpeg") else []),
    ]


def endless(data: Data) -> Iterator[Any]:
    """The batches of a run, epoch after epoch."""
    for epoch in itertools.count():
        yield from data.train_batches(epoch)


def cpu_seconds() -> float:
    """What this process and its loader processes have used so far."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def held_back_ms(groups: Path = Path("/sys/fs/cgroup")) -> float:
    """How long a CPU limit of the container (control groups 1 or 2) has stopped its processes so far, all together."""
    for name, unit in (("cpu.stat", "throttled_usec"), ("cpu/cpu.stat", "throttled_time")):
        with contextlib.suppress(OSError, ValueError):
            fields = dict(line.split() for line in (groups / name).read_text().splitlines())
            if unit in fields:
                return int(fields[unit]) / (1e3 if unit == "throttled_usec" else 1e6)
    return 0.0


def shape_of(batch: int, options: Any) -> str:
    once = ", each once" if options.each_once else ""
    if options.world_size == 1:
        return f"batch {batch}, {options.workers} workers{once}"
    return f"{options.world_size} GPUs, each batch {batch} and {options.workers} workers{once}"


def loader_alone(results: Results, model: str, root: Path, options: Any, device: torch.device) -> None:
    """Batches as fast as they come."""
    samples, cores = {}, {}
    for name in options.pipelines:
        cfg = load_config(method_config(model, "tetrajet"), config_of(model, root, options, name))
        size = cfg.data.batch_size
        place = "cpu" if name == "float" else device
        data = build_data(cfg, rank=options.rank, world_size=options.world_size, batch_size=size, device=place)
        batches = endless(data)
        for _ in range(2 if options.quick else 3 * AHEAD):  # `float` has whole batches ahead for each loader process
            next(batches)
        samples[name], used = [], cpu_seconds()
        for _ in range(options.rounds):
            began = time.perf_counter()
            for _ in range(options.steps):
                images, _ = next(batches)
            if images.is_cuda:
                torch.cuda.synchronize(device)
            samples[name].append(1e3 * (time.perf_counter() - began) / options.steps)
        cores[name] = 1e3 * (cpu_seconds() - used) / (options.rounds * options.steps * size)
        batches.close()
        data.close()
        del data, batches
        gc.collect()
    results.add(
        f"loader {model}",
        shape_of(size, options),
        samples,
        dict.fromkeys(samples, next(iter(samples))),
        rate=lambda _, seconds: size * options.world_size / seconds,
        rate_unit="images/s",
    )
    print("  CPU ms an image: " + ", ".join(f"{name} {used:.2f}" for name, used in cores.items()))


def training(results: Results, model: str, root: Path, options: Any, device: torch.device) -> None:
    """Whole steps with files, and with a batch that stays."""
    samples, batch = {}, 0
    for name in [name for name in options.pipelines if name != "float"]:
        overrides = config_of(model, root, options, name)
        cfg = load_config(method_config(model, "tetrajet"), [*overrides, *options.carrier_override])
        batch = cfg.data.batch_size
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            run = build_run(cfg, output, rank=options.rank, world_size=options.world_size, device=device)
        run.wrapped.train()
        files = endless(run.data)
        kept = next(files)
        kept = tuple(tensor.clone() for tensor in kept)
        kept_source = itertools.repeat(kept)
        say_if_short(run.data.batches_per_epoch, options)
        turn(run, kept_source, 2 if options.quick else 14, device)  # graphs are recorded after eleven steps
        name = f"{name} {options.decode:.0%}" if name.endswith("nvjpeg") else name
        resident, held_back = f"resident ({name})", held_back_ms()
        for _ in range(options.rounds):
            samples.setdefault(resident, []).append(turn(run, kept_source, options.steps, device))
            turn(run, files, 2 if options.quick else AHEAD, device)
            samples.setdefault(name, []).append(turn(run, files, options.steps, device))
        if (held_back := held_back_ms() - held_back) > 0:
            print(f"  {name}: a CPU limit has stopped the processes for {held_back:.0f} ms: give fewer --workers")
        if options.busy and device.type == "cuda":
            for label, batches in ((resident, kept_source), (name, files)):
                turn(run, batches, AHEAD, device)
                work = work_of(functools.partial(turn, run, batches, options.steps, device))
                print(f"  {label}: {described(work, options.steps)}")
        files.close()
        run.data.close()
        if run.graphs is not None:  # they hold the process group's
            run.graphs.forget()
        del run, files, kept, kept_source
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    results.add(
        f"training {model}",
        shape_of(batch, options),
        samples,
        {name: name if name.startswith("resident") else f"resident ({name})" for name in samples},
        rate=lambda _, seconds: batch * options.world_size / seconds,
        rate_unit="images/s",
    )


def say_if_short(batches_per_epoch: int, options: Any) -> None:
    """Say so where the turns with files do not lie in one epoch."""
    turns = options.rounds + options.busy
    taken = 1 + turns * ((2 if options.quick else AHEAD) + options.steps)
    if taken > batches_per_epoch:
        print(f"  note: {taken} batches are taken, and an epoch has {batches_per_epoch}: give more --files, or samples")
        print("  hold the start of an epoch, whose first batch is waited for")


def work_of(call: Callable[[], object]) -> dict[int, list[tuple[float, float]]]:
    """When each stream of the device worked during a call, in milliseconds: kernels and copies, (begin, end) each."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
    streams: dict[int, list[tuple[float, float]]] = {}
    for event in profile.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            begin = event.start_ns() / 1e6
            streams.setdefault(event.device_resource_id(), []).append((begin, begin + event.duration_ns() / 1e6))
    return streams


def described(streams: dict[int, list[tuple[float, float]]], steps: int) -> str:
    """What the device does in a step. The model's stream is the one that works most."""
    everything = sorted(interval for intervals in streams.values() for interval in intervals)
    ends = itertools.accumulate((end for _, end in everything), max)
    rests = [begin - end for (begin, _), end in zip(everything[1:], ends, strict=False) if begin - end > 1]
    model = max(streams, key=lambda stream: union_of(streams[stream]))
    images = sum(union_of(intervals) for stream, intervals in streams.items() if stream != model) / steps
    text = f"the device works {union_of(everything) / steps:.1f} ms a step, other streams than the model's {images:.1f}"
    return f"{text}; it rests {len(rests)} times for over a millisecond, {sum(rests):.1f} ms in {steps} steps"


def turn(run: Run, batches: Iterator[Any], steps: int, device: torch.device) -> float:
    """Milliseconds a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        train_step(run, batches)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - began) / steps


def stages(results: Results, root: Path, options: Any) -> None:
    """Milliseconds of one core an image, stage by stage of DeiT's recipe."""
    torch.set_num_threads(1)
    cfg = load_config(method_config("deit_tiny", "tetrajet"), config_of("deit_tiny", root, options, "gpu"))
    content = (root / "0.jpg").read_bytes()
    transform, size = train_transform(cfg), cfg.model.img_size
    image = Image.open(io.BytesIO(content)).convert("RGB")
    crop, flip, policy, tensor, normalise, *_ = transform.transforms
    cropped, drawing, draws = crop(image), Drawing(transform), Draws(transform, size, 0.0)
    on_device = Draws(transform, size, 1.0)
    as_tensor = tensor(cropped)
    opened, kept = draws.open(content, 0), on_device.open(content, 0)
    packed = [draws.make(opened, 0, AUGMENT, 0, number) for number in range(32)]

    def seeds() -> None:
        with seeded(0, AUGMENT, 0, 1):
            pass

    calls: dict[str, Callable[[], object]] = {
        "decode (Pillow)": lambda: Image.open(io.BytesIO(content)).convert("RGB"),
        "decode (torchvision)": lambda: draws.open(content, 0),
        "header": lambda: on_device.open(content, 0),
        "crop and resize": lambda: crop(image),
        "flip": lambda: flip(cropped),
        "RandAugment": lambda: policy(cropped),
        "to tensor": lambda: tensor(cropped),
        "normalise": lambda: normalise(as_tensor),
        "seeds, and putting them back": seeds,
        "draws": lambda: drawing.draw(kept.height, kept.width),
        "pack 32 of them": lambda: pack(packed),
    }
    samples = {}
    for name, call in calls.items():
        samples[name] = []
        for _ in range(options.rounds):
            began = time.perf_counter()
            for _ in range(2 if options.quick else 50):
                call()
            samples[name].append(1e3 * (time.perf_counter() - began) / (2 if options.quick else 50))
    results.add("cpu deit_tiny", "1 core", samples, {name: name for name in samples})


def finish(results: Results, root: Path, options: Any, device: torch.device) -> None:
    """Milliseconds of a batch in pieces, as loader processes have packed it, with nothing else on the device."""
    cfg = load_config(method_config("deit_tiny", "tetrajet"), config_of("deit_tiny", root, options, "gpu"))
    size, count = cfg.model.img_size, cfg.data.batch_size
    draws = Draws(train_transform(cfg), size, 0.0)
    opened = [draws.open((root / f"{number % 8}.jpg").read_bytes(), 0) for number in range(8)]
    made = [draws.make(opened[number % 8], 0, AUGMENT, 0, number) for number in range(count)]
    cuts = [made[start : start + PIECE] for start in range(0, count, PIECE)]
    parcels = [pack(cut, [0] * len(cut)) for cut in cuts]
    if device.type == "cuda":
        parcels = [Parcel(one.memory.pin_memory(), one.layout, one.extent) for one in parcels]
    finisher = Finisher(size, cfg.data.mean, cfg.data.std, device)
    samples = {"host": [], "until it is made": []}
    for number in range(options.warmup + options.rounds):
        began = time.perf_counter()
        finisher(parcels)
        host = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= options.warmup:
            samples["host"].append(1e3 * (host - began))
            samples["until it is made"].append(1e3 * (time.perf_counter() - began))
    results.add("finish deit_tiny", f"batch {count}", samples, {name: name for name in samples})


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for(__doc__, rounds=4)
    parser.add_argument(
        "--models", nargs="+", default=MODELS, choices=[*MODELS, TINY_IMAGENET], help="default: all five"
    )
    parser.add_argument(
        "--pipelines", nargs="+", default=["float", "cpu", "gpu"], choices=PIPELINES, help="default: float cpu gpu"
    )
    parser.add_argument("--workers", type=int, help="loader processes (default: one a core)")
    parser.add_argument("--files", type=int, help="how many there are (default: 131072)")
    parser.add_argument("--steps", type=int, help="steps of a turn (default: 24)")
    parser.add_argument(
        "--each-once", action="store_true", help="aug.repeats=1: no file twice, as where 4 GPUs or more train"
    )
    parser.add_argument("--busy", action="store_true", help="also what the device does in a step, by torch.profiler")
    parser.add_argument("--loader", action="store_true", help="the batches alone as well")
    parser.add_argument("--no-training", action="store_true", help="not the training")
    parser.add_argument("--stages", action="store_true", help="stages of an image and of a batch as well")
    parser.add_argument("--decode", type=float, default=1.0, help="of `gpu, nvjpeg`, data.gpu_decode (default: 1)")
    parser.add_argument("--carrier", default="bf16", choices=["bf16", "fp8"], help="quant.carrier")
    options, device = parse(parser, argv)
    if TINY_IMAGENET in options.models and "gpu, nvjpeg" in options.pipelines:
        raise UserError(
            f"Command line: {TINY_IMAGENET} is kept on the device, so no file of it is the GPU's to decode."
        )
    if options.workers is None:
        cores = len(os.sched_getaffinity(0)) // environment_number("LOCAL_WORLD_SIZE", 1)
        options.workers = 0 if options.quick else max(1, cores)
    options.files = options.files or (64 if options.quick else 131072)
    options.steps = options.steps or (2 if options.quick else 24)
    processes = Processes()
    processes.look_around()
    options.rank, options.world_size = processes.rank, processes.world_size
    shown = sys.stdout if options.rank == 0 else io.StringIO()
    with processes.group(device), contextlib.redirect_stdout(shown):
        measure(options, device)


def measure(options: argparse.Namespace, device: torch.device) -> None:
    results = Results("images", options, device)
    with tempfile.TemporaryDirectory() as large, tempfile.TemporaryDirectory() as small:
        roots = [Path(large), Path(small)]
        if options.rank == 0:
            make_files(roots[0], options.files)
            if TINY_IMAGENET in options.models:
                make_files(roots[1], options.files, SMALL)
        if options.world_size > 1:
            dist.broadcast_object_list(roots, src=0)
        if options.stages:
            stages(results, roots[0], options)
            finish(results, roots[0], options, device)
        for model in options.models:
            root = roots[model == TINY_IMAGENET]
            if options.loader:
                loader_alone(results, model, root, options, device)
            if not options.no_training and {*options.pipelines} != {"float"}:  # which trains no more
                training(results, model, root, options, device)
        if options.world_size > 1:
            dist.barrier()  # the files are the first process's, and the others may still read


if __name__ == "__main__":
    command(main)
