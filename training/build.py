"""A run at the start of training, from its configuration: device, batches, data, model and all that trains it."""

from __future__ import annotations

import functools
import itertools
import re
import sys
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from config import Config, UserError
from config.batches import MAX_BATCH, plan_batches
from datasets import Data, build_data, build_mixup
from images.classes import class_difference
from models import create_model
from quantization.layers.clock import clock_of
from quantization.stabilizers import Plan, Stabilizer, build_stabilizer
from quantization.watch.probe import OscillationProbe, Probe
from record.checkpoint import check_plain
from record.runlog import RunLog
from record.weights import finetune_from, saved_classes
from training.compilers import check_compilers
from training.given import load_rest, packed_model, start_weights
from training.graphs import GraphedPasses, leave_default_stream
from training.losses import build_loss
from training.passes import PROBE_POSITION
from training.processes import environment_number
from training.run import Run
from training.state import EvaluationState, Setup


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
        index = environment_number("LOCAL_RANK", 0) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(
                f"Process {index} of this node has no GPU: torch sees {torch.cuda.device_count()}; start at most one "
                "process a GPU."
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def check_carrier(cfg: Config, device: torch.device) -> None:
    """Raises UserError where products are to be in FP8 on a GPU that has none."""
    if cfg.quant.scheme != "mx" or cfg.quant.carrier != "fp8" or device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"quant.carrier is fp8 and {name} has no FP8 products; use --quant.carrier bf16.")


def check_layer_decay(cfg: Config) -> None:
    """Raises UserError where blocks are to have rates of their own under a method that needs one group of weights."""
    if cfg.optim.layer_decay is not None and cfg.stabilizer.kind == "qramping":
        raise UserError(
            "optim.layer_decay gives each block a parameter group of its own, and Q-Ramping needs its weights in one: "
            "leave --layer-decay out or take another stabilizer."
        )


def build_optimizer(
    cfg: Config, model: nn.Module, stabilizer: Stabilizer, device: torch.device
) -> torch.optim.Optimizer:
    """timm's optimizer with its parameter groups: no weight decay on biases, norms and what the model names.

    With optim.layer_decay there are two groups a block, with timm's `lr_scale`, which its schedules multiply by.
    """
    check_layer_decay(cfg)
    o = cfg.optim
    lr = o.lr if o.unscale_lr else o.lr * o.global_batch / 512
    try:
        name = stabilizer.optimizer_name(o.opt)
        fused = True if device.type == "cuda" and name in ("adamw", "qrampingadamw") else None
        options = {"betas": o.betas, "eps": o.eps, "fused": fused, "layer_decay": o.layer_decay}
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
        check_plain(optimizer.state_dict(), "its state")  # now, and not when the first epoch is to be saved
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
    peak = max(cfg.optim.lr, optimizer.param_groups[0]["lr"])  # --smoke and small batches scale it down below any end
    if s.sched == "cosine" and s.min_lr > peak:
        raise UserError(
            f"The schedule would rise from optim.lr {cfg.optim.lr:g} to schedule.min_lr {s.min_lr:g}; lower --min-lr."
        )
    if s.warmup_epochs and s.warmup_lr > peak:
        raise UserError(
            f"The warm-up would fall from schedule.warmup_lr {s.warmup_lr:g} to optim.lr {cfg.optim.lr:g}; lower "
            "--warmup-lr."
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


def fixed_images(data: Data, count: int) -> Tensor:
    """`count` evaluation images spread over the whole set, the same on all processes; of a stream its first ones."""
    images = data.eval_images
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
    if not cfg.probes.enabled:
        return Probe()
    device = next(model.parameters()).device
    images = fixed_images(data, cfg.probes.images).to(device)
    autocast = functools.partial(torch.autocast, device.type, dtype=amp, enabled=amp is not None)
    try:
        return OscillationProbe(cfg.probes, model, plan, images=images, autocast=autocast, position=PROBE_POSITION)
    except ValueError as error:
        raise UserError(f"{error}; see probes in the configuration.") from None


def build_model(cfg: Config, num_classes: int, *, rank: int, device: torch.device) -> nn.Module:
    """The model on its device, initialised by the run's seed."""
    torch.manual_seed(cfg.run.seed)  # the same initial weights on all processes
    model = create_model(cfg, num_classes).to(device)
    if (clock := clock_of(model)) is not None:
        clock.reseed(cfg.run.seed, rank)
    return model


def stabilize(cfg: Config, model: nn.Module, plan: Plan) -> Stabilizer:
    """The stabilizer, and in the model what it keeps there. Raises UserError."""
    try:
        return build_stabilizer(cfg.stabilizer, model, plan)
    except ValueError as error:
        raise UserError(f"{error}; see quant and stabilizer in the configuration.") from None


def checkpoint_activations(cfg: Config, model: nn.Module) -> None:
    """Let each block's activations be computed again in the backward pass. Raises UserError where timm cannot."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise UserError(
            f"The model {cfg.model.name} cannot compute its activations again; leave --grad-checkpointing away."
        ) from None


def autocast_dtype(cfg: Config, device: torch.device) -> torch.dtype | None:
    """bfloat16, or None for no autocast."""
    return torch.bfloat16 if cfg.run.amp == "bfloat16" or (cfg.run.amp == "auto" and device.type == "cuda") else None


def build_evaluation(
    cfg: Config, *, rank: int, world_size: int, device: torch.device, packed: Path | None = None
) -> EvaluationState:
    """The evaluation set and the model, with random weights: what --eval needs, and no more of the recipe.

    packed: a packed checkpoint, from which the model comes whole.
    """
    check_carrier(cfg, device)
    check_compilers(cfg, device)
    batch_size = cfg.data.batch_size or max(1, min(MAX_BATCH, cfg.optim.global_batch // world_size))
    data = build_data(cfg, rank=rank, world_size=world_size, batch_size=batch_size, device=device)
    if packed is None:
        model = build_model(cfg, data.num_classes, rank=rank, device=device)
        stabilize(cfg, model, Plan(1, 1))
    else:
        model = packed_model(cfg, packed, device)
    if cfg.run.compile:
        model.compile()
    setup = Setup(cfg, rank, world_size, device, autocast_dtype(cfg, device), batch_size, 1, 1)
    return EvaluationState(setup=setup, model=model, data=data)


def build_run(cfg: Config, output_dir: Path, *, rank: int, world_size: int, device: torch.device) -> Run:
    """Data, model, stabilizer, optimizer and the rest, at the start of training; nothing is written yet.

    The order of its stages matters. Raises UserError.
    """
    # 1. The device's stream, on which all that follows is made: what another one has made cannot be recorded.
    check_carrier(cfg, device)
    check_compilers(cfg, device)
    check_layer_decay(cfg)
    graphed = cfg.run.cuda_graphs and device.type == "cuda"
    if graphed:
        leave_default_stream(device)

    # 2. Data, which tells how many classes and steps there are.
    batch_size, accumulation = plan_batches(cfg, world_size)
    data = build_data(cfg, rank=rank, world_size=world_size, batch_size=batch_size, device=device)
    steps_per_epoch = data.batches_per_epoch // accumulation
    if not steps_per_epoch:
        raise UserError(f"The training set has fewer images than the global batch of {cfg.optim.global_batch}.")
    mixup = build_mixup(cfg, data.num_classes)
    setup = Setup(cfg, rank, world_size, device, autocast_dtype(cfg, device), batch_size, accumulation, steps_per_epoch)

    # 3. The model, with the weights that training starts from.
    model = build_model(cfg, data.num_classes, rank=rank, device=device)
    weights, not_loaded = {}, []
    if cfg.run.finetune:
        weights = start_weights(cfg.run.finetune, average=cfg.run.use_ema)
        difference = class_difference(saved_classes(cfg.run.finetune), data.classes)
        if difference is not None and rank == 0:
            print(f"note: {cfg.run.finetune} has {difference}.", file=sys.stderr)
        not_loaded = finetune_from(model, weights, cfg.run.finetune)

    # 4. What begins as a copy of those weights: a stabilizer's shadows, unless the file has them, and the moving
    #    average. The teacher's random initialisation draws after the model's.
    plan = Plan(steps_per_epoch, cfg.schedule.epochs * steps_per_epoch)
    stabilizer = stabilize(cfg, model, plan)
    not_loaded = load_rest(model, weights, not_loaded)
    loss = build_loss(cfg, model, num_classes=data.num_classes, mixed_targets=mixup is not None, device=device)
    ema = ModelEmaV3(model, decay=cfg.model_ema.decay) if cfg.model_ema.enabled else None

    # 5. The optimizer, by the stabilizer's choice, on the parameters of the bare model; then its schedule.
    optimizer = build_optimizer(cfg, model, stabilizer, device)

    # 6. Passes: what they keep, compiled in place, then wrapped: processes meet here, all or none.
    if cfg.run.grad_checkpointing:
        checkpoint_activations(cfg, model)
    if cfg.run.compile:
        model.compile()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if world_size > 1 else model

    return Run(
        setup=setup,
        model=model,
        wrapped=wrapped,
        loss=loss,
        optimizer=optimizer,
        schedule=build_schedule(cfg, optimizer, steps_per_epoch),
        data=data,
        mixup=mixup,
        ema=ema,
        stabilizer=stabilizer,
        probe=build_probe(cfg, model, plan, data, setup.amp),
        log=RunLog(output_dir, enabled=False),
        graphs=GraphedPasses(list(model.parameters()), data.train.held) if graphed else None,
        not_loaded=not_loaded,
    )
