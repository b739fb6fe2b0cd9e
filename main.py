"""Train or evaluate a vision transformer in MXFP4 (section 7.1 of the paper): `python main.py --help`.

Configuration -> seeds -> data, model, optimizer -> epochs of training and evaluation -> the run's summary.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from config import Config, UserError, dump_config, load_config
from config.flags import parse_flags
from config.rows import run_name
from datasets import Data, build_data, build_mixup
from engine import PROBE_POSITION, Run, StopSignal, TrainingError, evaluate, train_one_epoch
from models import create_model, quantizer_table
from quantization.layers.clock import NoiseClock
from quantization.stabilizers import Plan, Stabilizer, build_stabilizer
from quantization.watch.probe import OscillationProbe, Probe
from record.checkpoint import BEST, LAST, find_last, load_checkpoint
from record.manifest import manifest
from record.runlog import RunLog
from record.weights import finetune_from, load_weights, restore_model
from timm_patches import PATCHES
from training.graphs import GraphedPasses, leave_default_stream
from training.losses import build_loss

MAX_BATCH = 256  # samples of one process at a time, where the configuration leaves it open
SMOKE_STEPS, SMOKE_BATCH = 2, 2


def plan_batches(cfg: Config, world_size: int) -> tuple[int, int]:
    """(samples of one process at a time, micro-batches of an optimizer step) for the recipe's global batch.

    Raises UserError where the global batch is not a multiple of processes x batch size.
    """
    global_batch, batch_size = cfg.optim.global_batch, cfg.data.batch_size
    if global_batch % world_size:
        raise UserError(f"The global batch of {global_batch} does not divide among {world_size} processes.")
    share = global_batch // world_size
    if batch_size is None:
        batch_size = next(b for b in range(min(share, MAX_BATCH), 0, -1) if share % b == 0)
    if share % batch_size:
        raise UserError(
            f"The global batch of {global_batch} is not a multiple of {world_size} process(es) x {batch_size} samples; "
            f"choose a --batch-size that divides {share}, or another --global-batch."
        )
    return batch_size, share // batch_size


def build_optimizer(
    cfg: Config, model: nn.Module, stabilizer: Stabilizer, device: torch.device
) -> torch.optim.Optimizer:
    """timm's optimizer with its parameter groups: no weight decay on biases, norms and what the model names."""
    o = cfg.optim
    lr = o.lr if o.unscale_lr else o.lr * o.global_batch / 512
    try:
        name = stabilizer.optimizer_name(o.opt)
        fused = True if device.type == "cuda" and name in ("adamw", "qrampingadamw") else None
        options = {"betas": o.betas, "eps": o.eps, "fused": fused}
        optimizer = create_optimizer_v2(
            model,
            opt=name,
            lr=lr,
            weight_decay=o.weight_decay,
            momentum=o.momentum,
            **{name: value for name, value in options.items() if value is not None},
        )
        if fused:
            optimizer.found_inf = torch.zeros((), device=device)  # it updates nothing where this is 1
        if getattr(optimizer, "is_second_order", False):
            raise ValueError("it needs second derivatives, which this program does not compute")
    except (ValueError, AssertionError, TypeError, IndexError) as error:
        raise UserError(
            f"The optimizer {o.opt} cannot be made: {error}; check --opt, --opt-betas and --opt-eps."
        ) from None
    stabilizer.bind(optimizer)
    return optimizer


def build_schedule(cfg: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's schedule; once an epoch as DeiT has it, or every iteration as Swin has it."""
    s = cfg.schedule
    if s.warmup_prefix and s.warmup_epochs >= s.epochs:
        raise UserError(
            f"With schedule.warmup_prefix the warm-up of {s.warmup_epochs} epochs must be shorter than the "
            f"{s.epochs} epochs of training; lower --warmup-epochs or raise --epochs."
        )
    return create_scheduler_v2(
        optimizer,
        sched=s.sched,
        num_epochs=s.epochs - (s.warmup_epochs if s.warmup_prefix else 0),
        decay_epochs=s.decay_epochs,
        decay_rate=s.decay_rate,
        min_lr=s.min_lr,
        warmup_lr=s.warmup_lr,
        warmup_epochs=s.warmup_epochs,
        warmup_prefix=s.warmup_prefix,
        step_on_epochs=s.step_on == "epoch",
        updates_per_epoch=steps_per_epoch,
    )[0]


def pick_device(cfg: Config) -> torch.device:
    """The device of this process; one GPU for each local rank."""
    name = cfg.run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d\d?)?", name):
        raise UserError(f"--device is {name!r}; expected auto, cpu, cuda or one GPU as in cuda:1.")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device is cuda and torch sees no CUDA device; use --device cpu or auto.")
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(
                f"Process {index} of this node has no GPU: torch sees {torch.cuda.device_count()}; start at most one "
                "process a GPU."
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def resume_path(cfg: Config, output_dir: Path) -> Path | None:
    """The checkpoint --resume asks for; None for a fresh start."""
    if cfg.run.resume == "auto":
        return find_last(output_dir)
    return None if cfg.run.resume is None else Path(cfg.run.resume)


def evaluate_only(cfg: Config, run: Run) -> None:
    """--eval: print loss and accuracy of a checkpoint's weights; writes nothing."""
    path = resume_path(cfg, run.log.output_dir) or (Path(cfg.run.finetune) if cfg.run.finetune else None)
    if path is None:
        raise UserError("--eval needs weights to evaluate; pass --resume CHECKPOINT.")
    restore_model(run.model, load_weights(path), path)
    figures = evaluate(run, run.model)
    if run.rank == 0:
        print(f"{path}: {describe(figures)} on {run.data.eval_size} images")


def describe(figures: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.4f}" if "loss" in name else f"{name} {value:.2f} %" for name, value in figures.items()
    )


def fixed_images(data: Data, count: int) -> Tensor:
    """`count` evaluation images spread over the whole set, the same on all processes; of a stream its first ones."""
    images = data.eval_loader.dataset
    if isinstance(images, IterableDataset):
        samples = itertools.islice(images, count)
    else:
        count = min(count, data.eval_size)
        samples = (images[index, index, 0] for index in (n * data.eval_size // count for n in range(count)))
    readable = [image for image, *_ in samples if image is not None]
    if not readable:
        raise UserError("The probe found no evaluation image that can be read; check data.path.")
    return torch.stack(readable)


def build_probe(cfg: Config, model: nn.Module, plan: Plan, data: Data, amp: torch.dtype | None) -> Probe:
    """The probe of the `probes` section."""
    if not cfg.probes.enabled or cfg.run.eval:
        return Probe()
    device = next(model.parameters()).device
    images = fixed_images(data, cfg.probes.images).to(device)
    autocast = functools.partial(torch.autocast, device.type, dtype=amp, enabled=amp is not None)
    try:
        return OscillationProbe(cfg.probes, model, plan, images=images, autocast=autocast, position=PROBE_POSITION)
    except ValueError as error:
        raise UserError(f"{error}; see probes in the configuration.") from None


def check_carrier(cfg: Config, device: torch.device) -> None:
    """Raises UserError where products are to be in FP8 on a GPU that has none."""
    if cfg.quant.scheme != "mx" or cfg.quant.carrier != "fp8" or device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"quant.carrier is fp8 and {name} has no FP8 products; use --quant.carrier bf16.")


def build_run(cfg: Config, output_dir: Path, *, rank: int, world_size: int, device: torch.device) -> Run:
    """Data, model, stabilizer, optimizer and the rest, at the start of training; nothing is written yet."""
    check_carrier(cfg, device)
    graphed = cfg.run.cuda_graphs and device.type == "cuda"
    if graphed:
        leave_default_stream(device)
    amp = torch.bfloat16 if cfg.run.amp == "bfloat16" or (cfg.run.amp == "auto" and device.type == "cuda") else None
    batch_size, accumulation = plan_batches(cfg, world_size)
    data = build_data(cfg, rank=rank, world_size=world_size, batch_size=batch_size)
    steps_per_epoch = data.batches_per_epoch // accumulation
    if not steps_per_epoch:
        raise UserError(f"The training set has fewer images than the global batch of {cfg.optim.global_batch}.")
    mixup = build_mixup(cfg, data.num_classes)

    torch.manual_seed(cfg.run.seed)  # the same initial weights on all processes
    model = create_model(cfg, data.num_classes).to(device)
    if isinstance(clock := getattr(model, "noise", None), NoiseClock):
        clock.reseed(cfg.run.seed, rank)
    not_loaded: list[str] = []
    if cfg.run.finetune and not cfg.run.eval:
        not_loaded = finetune_from(model, load_weights(Path(cfg.run.finetune)), Path(cfg.run.finetune))
    plan = Plan(steps_per_epoch, cfg.schedule.epochs * steps_per_epoch)
    try:
        stabilizer = build_stabilizer(cfg.stabilizer, model, plan)
    except ValueError as error:
        raise UserError(f"{error}; see quant and stabilizer in the configuration.") from None
    loss = build_loss(cfg, model, num_classes=data.num_classes, mixed_targets=mixup is not None, device=device)
    ema = ModelEmaV3(model, decay=cfg.model_ema.decay) if cfg.model_ema.enabled else None
    optimizer = build_optimizer(cfg, model, stabilizer, device)
    if cfg.run.compile:
        model.compile()
    return Run(
        cfg=cfg,
        model=model,
        wrapped=DistributedDataParallel(model, broadcast_buffers=False) if world_size > 1 else model,
        loss=loss,
        optimizer=optimizer,
        schedule=build_schedule(cfg, optimizer, steps_per_epoch),
        data=data,
        mixup=mixup,
        ema=ema,
        stabilizer=stabilizer,
        probe=build_probe(cfg, model, plan, data, amp),
        log=RunLog(output_dir, enabled=False),
        stop=StopSignal(),
        device=device,
        amp=amp,
        rank=rank,
        world_size=world_size,
        batch_size=batch_size,
        accumulation=accumulation,
        steps_per_epoch=steps_per_epoch,
        graphs=GraphedPasses(list(model.parameters())) if graphed else None,
        not_loaded=not_loaded,
    )


def describe_run(run: Run, resumed_from: Path | None) -> dict[str, Any]:
    """manifest.json of a run."""
    cfg = run.cfg
    return manifest(
        cfg,
        device=run.device,
        world_size=run.world_size,
        seed=cfg.run.seed,
        patches=[patch.record() for patch in PATCHES],
        quantizers=quantizer_table(run.model),
        extra={
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "classes": run.data.num_classes,
            "batch": {"process": run.batch_size, "accumulation": run.accumulation, "global": cfg.optim.global_batch},
            "steps_per_epoch": run.steps_per_epoch,
            "autocast": str(run.amp).removeprefix("torch."),
            "resumed_from": str(resumed_from) if resumed_from else None,
            "finetuned_from": cfg.run.finetune,
            "not_loaded_in_finetuning": run.not_loaded,
        },
    )


def run_training(
    cfg: Config, output_dir: Path, *, rank: int, world_size: int, device: torch.device, smoke: bool
) -> None:
    """A run from its configuration to its last epoch: fresh, resumed, or evaluation alone."""
    run = build_run(cfg, output_dir, rank=rank, world_size=world_size, device=device)
    if cfg.run.eval:
        evaluate_only(cfg, run)
        return
    resume = resume_path(cfg, output_dir)
    if resume is not None:
        run.load_state_dict(load_checkpoint(resume), resume)
        if run.epoch >= cfg.schedule.epochs:
            if rank == 0:
                print(f"{resume} is complete: {run.epoch} epochs, best top-1 {run.best_top1:.2f} %.")
            return
    run.log = RunLog(
        output_dir,
        enabled=rank == 0,
        resume=cfg.run.resume == "auto" or (resume is not None and resume.resolve().parent == output_dir.resolve()),
        purge_step=run.global_step if resume else None,
    )
    with run.log:
        run.log.write_config(dump_config(cfg))
        run.log.write_manifest(describe_run(run, resume))
        if resume and rank == 0:
            print(f"Continuing {resume} at epoch {run.epoch}, step {run.step}.")
        run.stop.install()
        try:
            train(run, max_steps=SMOKE_STEPS if smoke else None)
        finally:
            if run.graphs is not None:
                run.graphs.forget()  # before the communicator goes that they use


def train(run: Run, max_steps: int | None = None) -> None:
    """The epochs from where the run stands. Ends with exit code 128 + n where signal n stopped it, its state saved."""
    cfg, log = run.cfg, run.log
    while run.epoch < cfg.schedule.epochs:
        began = time.monotonic()
        first_step = run.step
        train_one_epoch(run, max_steps)
        trained = time.monotonic() - began
        if run.stop.heard_anywhere:
            run.save(LAST)
            number = run.stop.heard or signal.SIGTERM
            if run.rank == 0:
                print(
                    f"Stopped by {signal.Signals(number).name} at epoch {run.epoch}, step {run.step}; the state is in "
                    f"{log.output_dir / LAST}: go on with --resume auto.",
                    file=sys.stderr,
                )
            raise SystemExit(128 + number)
        images = (run.step - first_step) * cfg.optim.global_batch

        eval_batches = 1 if max_steps else None
        figures = evaluate(run, run.model, eval_batches)
        if run.ema is not None:
            figures |= {f"ema_{name}": value for name, value in evaluate(run, run.ema.module, eval_batches).items()}
        evaluated = time.monotonic() - began - trained
        lr = run.optimizer.param_groups[0]["lr"]
        train_figures = {"loss": run.meter.mean("loss"), "lr": lr, "images_per_s": images / trained, "seconds": trained}
        if run.data.corrupt:
            train_figures["corrupt_images"] = run.data.corrupt
        run.schedule.step(run.epoch)  # as DeiT: after the epoch, with the epoch's own number
        done = run.epoch
        run.epoch, run.step = run.epoch + 1, 0
        log.log((done,), train_figures, tag="train", at=run.global_step)
        log.log((done,), {**figures, "seconds": evaluated, **run.probe.figures(done)}, tag="eval", at=run.global_step)
        run.meter = type(run.meter)()
        is_best = figures["top1"] > run.best_top1
        run.best_top1 = max(run.best_top1, figures["top1"])
        run.save(*([LAST, BEST] if is_best else [LAST]))
        if run.rank == 0:
            print(
                f"epoch {run.epoch}/{cfg.schedule.epochs}: train loss {train_figures['loss']:.4f}, "
                f"{images / trained:.0f} images/s, {describe(figures)}, best {run.best_top1:.2f} %",
                flush=True,
            )
        if max_steps:
            break
    log.log((), {**figures, "best_top1": run.best_top1, "epochs": run.epoch}, tag="final")


def smoke_overrides(cfg: Config, world_size: int) -> list[str]:
    """What --smoke changes: a few generated images in the smallest batches, no worker processes."""
    images = 4 * SMOKE_STEPS * SMOKE_BATCH * world_size
    return [
        "data.set=generated",
        f"data.num_images={images}",
        f"data.batch_size={SMOKE_BATCH}",
        f"optim.global_batch={SMOKE_BATCH * world_size}",
        "data.num_workers=0",
        "schedule.epochs=1",
        "schedule.warmup_epochs=0",
        "run.log_every=1",
        "run.eval=false",
        "run.resume=null",
        "run.finetune=null",
        "distillation.type=none",
        *(["stabilizer.detect_steps=1"] if cfg.stabilizer.kind == "qramping" else []),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Raises UserError and TrainingError, which `command` turns into exit codes."""
    options, overrides = parse_flags(sys.argv[1:] if argv is None else argv)
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    cfg = load_config(options.config, overrides, source="the command line")
    if options.smoke:
        cfg = load_config(options.config, overrides + smoke_overrides(cfg, world_size), source="the command line")
    if options.print_config:
        print(dump_config(cfg), end="")
        return
    device = pick_device(cfg)
    name = run_name(options.config) if options.config else cfg.model.name
    output_dir = Path(cfg.run.output_dir or Path("runs") / name)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            output_dir = Path(scratch) / "smoke" if options.smoke else output_dir
            run_training(cfg, output_dir, rank=rank, world_size=world_size, device=device, smoke=options.smoke)
    finally:
        if world_size > 1:
            dist.destroy_process_group()
    if options.smoke and rank == 0:
        print(f"smoke test passed: {SMOKE_STEPS} training steps and 1 evaluation batch of {cfg.model.name}")


def command(argv: Sequence[str] | None = None) -> NoReturn:
    """`main`, with mistakes and failures as one sentence on stderr and an exit code."""
    try:
        main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except torch.OutOfMemoryError as error:
        said = str(error).split(". ")[0]
        print(
            f"error: The device has too little memory ({said}); choose a smaller --batch-size, or --no-cuda-graphs, "
            "which leaves evaluation the memory of training.",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    raise SystemExit(0)


if __name__ == "__main__":
    command()
