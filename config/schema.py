"""The schema of a configuration: every section and key with its type, range, default, help text and DeiT's flag.

A key stands here once: its validation (pydantic), its flag (flags.py), its line in --help and the name it is misspelt
from follow from the same field. fold.py builds a `Config` from files and flags.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field, field_validator
from pydantic.fields import FieldInfo

from config.keys import Deviation, Entries, Float, Int, Mean, Section, Share, ascending, key, path_on_disk
from config.quant import Int4Quant, MXQuant, NoQuant

# DeiT's spellings of data sets, kept working.
_DATA_SET_ALIASES = {"IMNET": "imagenet", "CIFAR": "cifar100", "CIFAR10": "cifar10"}


class ModelConfig(Section):
    """Model: one of the five models of the paper, or any timm model with transformer blocks."""

    name: str = key("deit_tiny_patch16_224", "timm model name", "--model")
    img_size: Int = key(224, "input resolution in pixels", "--input-size", ge=1, le=16384)
    patch_size: Int | None = key(None, "patch size in pixels; null keeps the model's own", ge=1, le=16384)
    num_classes: Int | None = key(None, "number of classes; null takes the data set's", "--nb-classes", ge=1, le=10**6)
    drop: Float = key(0.0, "dropout rate before the head", "--drop", ge=0, lt=1)
    drop_path: Float = key(0.1, "stochastic depth rate of the last block", "--drop-path", ge=0, lt=1)
    kwargs: Annotated[dict[str, bool | int | float | str | list[Int] | None], Entries] = key(
        {}, "further arguments of the timm model, such as {embed_dim: 96, depth: 4}"
    )

    @field_validator("kwargs")
    @classmethod
    def _no_hub(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        for name in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only"):
            if kwargs.get(name):
                raise ValueError(
                    f"{name} is not for this program, which makes models without the network and for training; to "
                    "start from weights give their file to --finetune"
                )
        return kwargs


class NoStabilizer(Section):
    """Weight oscillation is left alone."""

    kind: Literal["none"] = key("none", "method against weight oscillation")


class QEma(Section):
    """Q-EMA: the moving average of a weight decides its rounding (section 5 of the paper)."""

    kind: Literal["qema"]
    decay: Float = key(0.998, "qema: decay of the shadow weights", ge=0, lt=1)


class QRamping(Section):
    """Q-Ramping: oscillating weights are updated less often, with more gradient (section 6)."""

    kind: Literal["qramping"]
    k1: Float = key(16.0, "qramping: oscillation ratio of one ramp", gt=0)
    k2: Int = key(5, "qramping: steps added for each ramp", ge=0, le=2**30)
    detect_steps: Int = key(30, "qramping: training steps of a detection, undone afterwards", ge=1, le=10**5)
    update_period: Int | None = key(None, "qramping: steps between detections; null: one epoch", ge=1, le=2**30)
    n_max: Int | None = key(
        None, "qramping: longest period of an element; null: the steps of one epoch", ge=1, le=2**30
    )


class Dampen(Section):
    """Dampen: a loss that pulls weights to their quantized values (Nagel et al. 2022)."""

    kind: Literal["dampen"]
    weight: Float = key(5e-3, "dampen: weight of the loss at the end of training", ge=0)
    start: Float = key(0.25, "dampen, freeze: share of training before which it is off", ge=0, lt=1)


class Freeze(Section):
    """Freeze: weights that flip too often are fixed for good (Nagel et al. 2022)."""

    kind: Literal["freeze"]
    momentum: Float = key(0.001, "freeze: momentum of the moving averages", gt=0, le=1)
    threshold_start: Float = key(0.1, "freeze: flipping frequency that freezes, when it starts", gt=0)
    threshold_end: Float = key(0.01, "freeze: the same at the end of training", gt=0)
    start: Float = key(0.25, "dampen, freeze: share of training before which it is off", ge=0, lt=1)


class OptimConfig(Section):
    """Optimizer. The global batch is part of the recipe; gradient accumulation follows from it."""

    opt: str = key("adamw", "optimizer, by timm's name", "--opt")
    lr: Float = key(5e-4, "learning rate for a global batch of 512", "--lr", gt=0)
    unscale_lr: bool = key(False, "use lr as it is instead of lr * global_batch / 512", "--unscale-lr")
    global_batch: Int = key(1024, "samples of one optimizer step over all processes", "--global-batch", ge=1, le=2**20)
    betas: tuple[Float, Float] | None = key(
        (0.9, 0.999), "optimizer betas; null for the optimizer's own", "--opt-betas"
    )
    eps: Float | None = key(1e-8, "optimizer epsilon; null for the optimizer's own", "--opt-eps", gt=0)
    momentum: Float = key(0.9, "momentum, where the optimizer has one", "--momentum", ge=0, lt=1)
    weight_decay: Float = key(
        0.05, "decoupled weight decay; not on biases, norms and embeddings", "--weight-decay", ge=0
    )
    layer_decay: Float | None = key(
        None,
        "the rate of each block is that of the next one times this; null for one rate",
        "--layer-decay",
        gt=0,
        le=1,
    )
    clip_grad: Float | None = key(
        None, "clip the gradient's global norm to this; null for no clipping", "--clip-grad", gt=0
    )


class ScheduleConfig(Section):
    """Learning-rate schedule."""

    epochs: Int = key(90, "epochs to train", "--epochs", ge=1, le=10**5)
    sched: Literal["cosine", "step"] = key("cosine", "shape of the schedule, from timm", "--sched")
    step_on: Literal["epoch", "iteration"] = key(
        "epoch", "change the rate once an epoch (DeiT) or each iteration (Swin)"
    )
    warmup_epochs: Int = key(5, "epochs of linear warm-up", "--warmup-epochs", ge=0, le=10**5)
    warmup_lr: Float = key(1e-6, "learning rate the warm-up starts from", "--warmup-lr", ge=0)
    warmup_prefix: bool = key(False, "start the cosine after the warm-up instead of under it")
    min_lr: Float = key(1e-5, "learning rate the schedule ends at", "--min-lr", ge=0)
    decay_epochs: Float = key(30, "epochs between steps of the step schedule", "--decay-epochs", gt=0)
    decay_rate: Float = key(0.1, "factor of each step of the step schedule", "--decay-rate", "--dr", gt=0, le=1)


class AugConfig(Section):
    """Augmentation of the training images, by timm."""

    crop: Literal["rrc", "src"] = key(
        "rrc", "random resized crop (rrc) or DeiT III's simple random crop (src)", consts={"--src": "src"}
    )
    scale: tuple[Share, Share] = key((0.08, 1.0), "area range of the random resized crop")
    hflip: Float = key(0.5, "probability of a horizontal flip", ge=0, le=1)
    color_jitter: Float = key(0.3, "colour jitter, where no AutoAugment replaces it", "--color-jitter", ge=0)
    aa: str | None = key("rand-m9-mstd0.5-inc1", "AutoAugment policy, by timm's name; null for none", "--aa")
    three_augment: bool = key(False, "DeiT III's 3-Augment in place of the AutoAugment policy", "--ThreeAugment")
    interpolation: Literal["bicubic", "bilinear", "random"] = key(
        "bicubic", "interpolation of training images", "--train-interpolation"
    )
    repeats: Int = key(
        3,
        "repeated augmentation: views of an image in an epoch",
        consts={"--repeated-aug": 3, "--no-repeated-aug": 1},
        ge=1,
        le=100,
    )
    reprob: Float = key(0.25, "probability of random erasing", "--reprob", ge=0, le=1)
    remode: Literal["pixel", "rand", "const"] = key("pixel", "filling of erased areas", "--remode")
    recount: Int = key(1, "erased areas an image", "--recount", ge=1, le=100)
    mixup: Float = key(0.8, "mixup alpha; 0 for none", "--mixup", ge=0)
    cutmix: Float = key(1.0, "cutmix alpha; 0 for none", "--cutmix", ge=0)
    cutmix_minmax: tuple[Share, Share] | None = key(
        None, "shortest and longest side of cutmix boxes over the image's, in place of alpha", "--cutmix-minmax"
    )
    mixup_prob: Float = key(1.0, "probability of mixup or cutmix on a batch", "--mixup-prob", ge=0, le=1)
    mixup_switch_prob: Float = key(0.5, "probability of cutmix where both are on", "--mixup-switch-prob", ge=0, le=1)
    mixup_mode: Literal["batch", "pair", "elem"] = key("batch", "what mixup draws its weights for", "--mixup-mode")

    _ranges = field_validator("scale", "cutmix_minmax")(ascending)

    @field_validator("aa")
    @classmethod
    def _policy(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("the name of a policy was expected, or null for none")
        return value


class LossConfig(Section):
    """Loss."""

    smoothing: Float = key(0.1, "label smoothing", "--smoothing", ge=0, lt=1)
    bce: bool = key(False, "binary cross-entropy in place of cross-entropy", "--bce-loss")


class ModelEmaConfig(Section):
    """Moving average of the whole model, evaluated beside it (not Q-EMA)."""

    enabled: bool = key(False, "keep one", "--model-ema")
    decay: Float = key(0.99996, "its decay", "--model-ema-decay", ge=0, lt=1)


class DistillationConfig(Section):
    """Distillation from a teacher; needs a model with a distillation token."""

    type: Literal["none", "soft", "hard"] = key("none", "kind of distillation", "--distillation-type")
    teacher_model: str = key("regnety_160", "timm name of the teacher", "--teacher-model")
    teacher_path: str | None = key(None, "the teacher's checkpoint", "--teacher-path")
    alpha: Float = key(0.5, "weight of the distillation term", "--distillation-alpha", ge=0, le=1)
    tau: Float = key(1.0, "temperature of soft distillation", "--distillation-tau", gt=0)

    _paths = field_validator("teacher_path")(path_on_disk)


class DataConfig(Section):
    """Data."""

    set: Annotated[str, BeforeValidator(lambda v: _DATA_SET_ALIASES.get(v, v) if isinstance(v, str) else v)] = key(
        "imagenet",
        "imagenet (any folder with train/ and val/), cifar10, cifar100, digits, generated, or a timm name with a slash",
        "--data-set",
    )
    path: str | None = key(None, "folder of the data set", "--data-path")
    val_split: Float | None = key(
        None,
        "share of each class of train/ that is held out for evaluation, in place of val/; the same images in all runs",
        "--val-split",
        gt=0,
        lt=1,
    )
    class_map: str | None = key(
        None, "text file with one class folder a line, in the order of the labels; null sorts them", "--class-map"
    )
    batch_size: Int | None = key(
        None,
        "samples of one process at a time; null fits the global batch, 256 at most",
        "--batch-size",
        ge=1,
        le=2**20,
    )
    num_workers: Int | None = key(
        None,
        "loader processes of one process; null: its share of the cores, 16 at most",
        "--num_workers",
        ge=0,
        le=1024,
    )
    pin_mem: bool = key(True, "pin host memory for copies to a GPU", "--pin-mem")
    pipeline: Literal["auto", "cpu", "gpu"] = key(
        "auto",
        "who augments images: loader processes (cpu) or the device (gpu), by the same draws; auto: gpu on a GPU",
        "--pipeline",
    )
    gpu_decode: Share = key(
        0.0, "share of the JPEG files that the GPU decodes, which rounds otherwise than libjpeg", "--gpu-decode"
    )
    resident: Share = key(
        0.25,
        "share of the device's free memory for a set that is decoded once and kept there; 0: decode it every epoch",
        "--resident",
    )
    eval_crop_ratio: Float = key(0.875, "evaluation: centre crop over resized side", "--eval-crop-ratio", ge=0.1, le=1)
    mean: tuple[Mean, Mean, Mean] = key((0.485, 0.456, 0.406), "channel means for normalisation")
    std: tuple[Deviation, Deviation, Deviation] = key((0.229, 0.224, 0.225), "channel deviations for normalisation")
    on_corrupt: Literal["error", "skip"] = key(
        "error", "an image that cannot be read stops the run (error) or is replaced and counted (skip)", "--on-corrupt"
    )
    num_images: Int = key(1280, "training images of the generated set (a tenth as many for evaluation)", ge=1, le=10**9)

    _paths = field_validator("path", "class_map")(path_on_disk)


class RunConfig(Section):
    """The run itself."""

    output_dir: str | None = key(None, "where the run is written; null: runs/<name of the config>", "--output_dir")
    seed: Int = key(
        0, "seed of initialisation, data order, augmentation and quantization noise", "--seed", ge=0, lt=2**32
    )
    device: str = key("auto", "auto, cpu or cuda", "--device")
    amp: Literal["auto", "none", "bfloat16"] = key("auto", "autocast; auto: bfloat16 on a GPU, none on a CPU", "--amp")
    compile: bool = key(False, "run the model under torch.compile", "--compile")
    grad_checkpointing: bool = key(
        False, "compute activations again in the backward pass: less memory, more time", "--grad-checkpointing"
    )
    cuda_graphs: bool = key(True, "on a GPU, record forward and backward pass as CUDA graphs", "--cuda-graphs")
    eval: bool = key(False, "evaluate only (the checkpoint of --resume)", "--eval")
    resume: str | None = key(None, "checkpoint to continue from; auto: the last one in output_dir, if any", "--resume")
    finetune: str | None = key(
        None, "checkpoint or safetensors file whose weights the training starts from", "--finetune", "--pretrained"
    )
    use_ema: bool = key(False, "with --finetune, start from the file's moving average of the weights", "--use-ema")
    save_every: Int | None = key(None, "also checkpoint every so many optimizer steps", "--save-every", ge=1)
    log_every: Int = key(50, "optimizer steps between logged lines", "--log-every", ge=1)

    _paths = field_validator("output_dir", "resume", "finetune")(path_on_disk)


class ProbesConfig(Section):
    """Probes: how much weights oscillate (Appendix A of the paper), recorded while the training goes on unchanged."""

    enabled: bool = key(False, "record it, into TensorBoard and the folder probes/ of the run", "--probes")
    steps: Int = key(
        200, "T0: a recording covers so many optimizer steps, the last ones of its epoch (at most the epoch)", ge=1
    )
    every: Int = key(1, "epochs between recordings; the last two epochs are always recorded", ge=1)
    block: Int | None = key(
        None, "transformer block whose output is watched, from 1; null: the 9th, or the last of fewer", ge=1
    )
    images: Int = key(64, "evaluation images that output is computed on", ge=1)
    trajectories: Int = key(32, "weights that are followed through the last epoch, the most oscillating", ge=0)
    quantizers: bool = key(False, "also each quantizer's error, gain, underflow and saturation, on the same images")


class PaperConfig(Section):
    """The published figure this configuration reproduces."""

    table: Int
    row: str
    column: str
    top1: Float | None = None
    top5: Float | None = None


Quant = Annotated[NoQuant | MXQuant | Int4Quant, Field(discriminator="scheme")]
Stabilizer = Annotated[NoStabilizer | QEma | QRamping | Dampen | Freeze, Field(discriminator="kind")]


class Config(Section):
    """The whole configuration of a run."""

    model: ModelConfig = ModelConfig()
    quant: Quant = NoQuant()
    stabilizer: Stabilizer = NoStabilizer()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    aug: AugConfig = AugConfig()
    loss: LossConfig = LossConfig()
    model_ema: ModelEmaConfig = ModelEmaConfig()
    distillation: DistillationConfig = DistillationConfig()
    data: DataConfig = DataConfig()
    run: RunConfig = RunConfig()
    probes: ProbesConfig = ProbesConfig()
    paper: PaperConfig | None = None


TAGS = {"quant": "scheme", "stabilizer": "kind"}  # sections whose other keys depend on this one
# Mappings whose entries the user names.
ENTRIES = ("model.kwargs", "quant.quantizers", "quant.rotation", "quant.policy.spare")


def sections_in(annotation: Any) -> list[type[Section]]:
    """The section classes in a field's annotation: itself, or the members of a union of them."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) in (Annotated, Union, types.UnionType):
        return [m for arg in typing.get_args(annotation) for m in sections_in(arg)]
    return []


def iter_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf key of the configuration as ("section.key", field), a key shared by several tags once for each."""
    for name, field in section.model_fields.items():
        children = sections_in(field.annotation)
        if not children:
            yield f"{prefix}{name}", field
        for child in children:
            yield from iter_keys(child, f"{prefix}{name}.")
