"""The configuration of a run: one frozen, typed object, built from defaults < extends < file < flags.

pydantic checks types, ranges and spelling. What is ours is the folding of files (`extends`, changed tags, `paper` never
inherited) and the wording of errors: each names the file or flag, the key and the nearest valid key.

    cfg = load_config("configs/deit_tiny_tetrajet.yaml", overrides=["quant.scale_rule=floor"])
    cfg.quant.scale_rule            # "floor"
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

Element = Literal["e2m1", "e3m0"]
Rounding = Literal["nearest_even", "nearest_away", "nearest_up", "stochastic"]
Quantizer = Literal["q1", "q2", "q3", "q4", "q5", "q6"]

# DeiT's spellings of data sets, kept working.
_DATA_SET_ALIASES = {"IMNET": "imagenet", "CIFAR": "cifar100", "CIFAR10": "cifar10"}


class UserError(Exception):
    """A mistake the user can mend: shown as one sentence, without a traceback, and exit code 2."""


def _key(default: Any, help: str, *flags: str, consts: dict[str, Any] | None = None, **constraints: Any) -> Any:
    """A key: default, help text, DeiT's name(s) of its flag, flags that set it to a constant, pydantic's ranges."""
    return Field(
        default, description=help, json_schema_extra={"flags": list(flags), "consts": consts or {}}, **constraints
    )


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


class ModelConfig(_Section):
    """Model: one of the five models of the paper, or any timm model with transformer blocks."""

    name: str = _key("deit_tiny_patch16_224", "timm model name", "--model")
    img_size: int = _key(224, "input resolution in pixels", "--input-size", ge=1)
    patch_size: int | None = _key(None, "patch size in pixels; null keeps the model's own", ge=1)
    num_classes: int | None = _key(None, "number of classes; null takes the data set's", "--nb-classes", ge=1)
    drop: float = _key(0.0, "dropout rate before the head", "--drop", ge=0, lt=1)
    drop_path: float = _key(0.1, "stochastic depth rate of the last block", "--drop-path", ge=0, lt=1)
    kwargs: dict[str, bool | int | float | str | list[int]] = _key(
        {}, "further arguments of the timm model, such as {embed_dim: 96, depth: 4}"
    )


class NoQuant(_Section):
    """Every product in full precision."""

    scheme: Literal["none"] = _key("none", "none (full precision), mx (microscaling) or int4")


class ElementConfig(_Section):
    activation_weight: Element = _key("e2m1", "element format of q1 q2 q4 q6 (activations and weights)")
    gradient: Element = _key("e2m1", "element format of q3 q5 (output gradients)")


class RoundingConfig(_Section):
    forward: Rounding = _key("nearest_even", "rounding of q1 q2")
    backward: Rounding = _key("stochastic", "rounding of q3 q4 q5 q6")


class MXQuant(_Section):
    """Quantization of the block linears: microscaling formats, blocks of 32 along the contracted dimension."""

    scheme: Literal["mx"] = _key("mx", "none (full precision), mx (microscaling) or int4")
    active: tuple[Quantizer, ...] = _key(
        ("q1", "q2", "q3", "q4", "q5", "q6"), "which quantizers are on; the others are the identity"
    )
    scale_rule: Literal["truncation_free", "floor"] = _key(
        "truncation_free", "shared scale: truncation_free (TetraJet) or floor (Microscaling)"
    )
    backward_operands: Literal["requantized", "original"] = _key(
        "requantized", "q4 and q6 read the outputs of q2 and q1 (requantized) or W and X (original)"
    )
    element: ElementConfig = ElementConfig()
    rounding: RoundingConfig = RoundingConfig()

    @model_validator(mode="after")
    def _no_repeats(self) -> MXQuant:
        if len(set(self.active)) != len(self.active):
            raise ValueError(f"active names a quantizer twice: {', '.join(self.active)}")
        return self


class Int4Quant(_Section):
    """INT4 per-tensor quantization of the block linears (Xi et al. 2023)."""

    scheme: Literal["int4"]
    hadamard: bool = _key(True, "rotate activations and weights by a block Hadamard matrix")
    sampling: bool = _key(True, "leverage-score sampling of gradient rows")
    learned_step: bool = _key(True, "learned step sizes (LSQ) in the forward pass")


class NoStabilizer(_Section):
    """Weight oscillation is left alone."""

    kind: Literal["none"] = _key("none", "method against weight oscillation")


class QEma(_Section):
    """Q-EMA: the moving average of a weight decides its rounding (section 5 of the paper)."""

    kind: Literal["qema"]
    decay: float = _key(0.998, "qema: decay of the shadow weights", ge=0, lt=1)


class QRamping(_Section):
    """Q-Ramping: oscillating weights are updated less often, with more gradient (section 6)."""

    kind: Literal["qramping"]
    k1: float = _key(16.0, "qramping: oscillation ratio of one ramp", gt=0)
    k2: int = _key(5, "qramping: steps added for each ramp", ge=0)
    detect_steps: int = _key(30, "qramping: training steps of a detection, undone afterwards", ge=1)
    update_period: int | None = _key(None, "qramping: steps between detections; null: one epoch", ge=1)
    n_max: int | None = _key(None, "qramping: longest period of an element; null: the steps of one epoch", ge=1)


class Dampen(_Section):
    """Dampen: a loss that pulls weights to their quantized values (Nagel et al. 2022)."""

    kind: Literal["dampen"]
    weight: float = _key(5e-3, "dampen: weight of the loss at the end of training", ge=0)
    start: float = _key(0.25, "dampen, freeze: share of training before which it is off", ge=0, lt=1)


class Freeze(_Section):
    """Freeze: weights that flip too often are fixed for good (Nagel et al. 2022)."""

    kind: Literal["freeze"]
    momentum: float = _key(0.001, "freeze: momentum of the moving averages", gt=0, le=1)
    threshold_start: float = _key(0.1, "freeze: flipping frequency that freezes, when it starts", gt=0)
    threshold_end: float = _key(0.01, "freeze: the same at the end of training", gt=0)
    start: float = _key(0.25, "dampen, freeze: share of training before which it is off", ge=0, lt=1)


class OptimConfig(_Section):
    """Optimizer. The global batch is part of the recipe; gradient accumulation follows from it."""

    opt: str = _key("adamw", "optimizer, by timm's name", "--opt")
    lr: float = _key(5e-4, "learning rate for a global batch of 512", "--lr", gt=0)
    unscale_lr: bool = _key(False, "use lr as it is instead of lr * global_batch / 512", "--unscale-lr")
    global_batch: int = _key(1024, "samples of one optimizer step over all processes", "--global-batch", ge=1)
    betas: tuple[float, float] | None = _key(
        (0.9, 0.999), "optimizer betas; null for the optimizer's own", "--opt-betas"
    )
    eps: float | None = _key(1e-8, "optimizer epsilon; null for the optimizer's own", "--opt-eps", gt=0)
    momentum: float = _key(0.9, "momentum, where the optimizer has one", "--momentum", ge=0, lt=1)
    weight_decay: float = _key(
        0.05, "decoupled weight decay; not on biases, norms and embeddings", "--weight-decay", ge=0
    )
    clip_grad: float | None = _key(
        None, "clip the gradient's global norm to this; null for no clipping", "--clip-grad", gt=0
    )


class ScheduleConfig(_Section):
    """Learning-rate schedule."""

    epochs: int = _key(90, "epochs to train", "--epochs", ge=1)
    sched: Literal["cosine", "step"] = _key("cosine", "shape of the schedule, from timm", "--sched")
    step_on: Literal["epoch", "iteration"] = _key(
        "epoch", "change the rate once an epoch (DeiT) or each iteration (Swin)"
    )
    warmup_epochs: int = _key(5, "epochs of linear warm-up", "--warmup-epochs", ge=0)
    warmup_lr: float = _key(1e-6, "learning rate the warm-up starts from", "--warmup-lr", ge=0)
    warmup_prefix: bool = _key(False, "start the cosine after the warm-up instead of under it")
    min_lr: float = _key(1e-5, "learning rate the schedule ends at", "--min-lr", ge=0)
    decay_epochs: float = _key(30, "epochs between steps of the step schedule", "--decay-epochs", gt=0)
    decay_rate: float = _key(0.1, "factor of each step of the step schedule", "--decay-rate", gt=0)


class AugConfig(_Section):
    """Augmentation of the training images, by timm."""

    crop: Literal["rrc", "src"] = _key(
        "rrc", "random resized crop (rrc) or DeiT III's simple random crop (src)", consts={"--src": "src"}
    )
    scale: tuple[float, float] = _key((0.08, 1.0), "area range of the random resized crop")
    hflip: float = _key(0.5, "probability of a horizontal flip", ge=0, le=1)
    color_jitter: float = _key(0.3, "colour jitter, where no AutoAugment replaces it", "--color-jitter", ge=0)
    aa: str | None = _key("rand-m9-mstd0.5-inc1", "AutoAugment policy, by timm's name; null for none", "--aa")
    three_augment: bool = _key(False, "DeiT III's 3-Augment in place of the AutoAugment policy", "--ThreeAugment")
    interpolation: Literal["bicubic", "bilinear", "random"] = _key(
        "bicubic", "interpolation of training images", "--train-interpolation"
    )
    repeats: int = _key(
        3,
        "repeated augmentation: views of an image in an epoch",
        consts={"--repeated-aug": 3, "--no-repeated-aug": 1},
        ge=1,
    )
    reprob: float = _key(0.25, "probability of random erasing", "--reprob", ge=0, le=1)
    remode: Literal["pixel", "rand", "const"] = _key("pixel", "filling of erased areas", "--remode")
    recount: int = _key(1, "erased areas an image", "--recount", ge=1)
    mixup: float = _key(0.8, "mixup alpha; 0 for none", "--mixup", ge=0)
    cutmix: float = _key(1.0, "cutmix alpha; 0 for none", "--cutmix", ge=0)
    cutmix_minmax: tuple[float, float] | None = _key(None, "cutmix area range in place of alpha", "--cutmix-minmax")
    mixup_prob: float = _key(1.0, "probability of mixup or cutmix on a batch", "--mixup-prob", ge=0, le=1)
    mixup_switch_prob: float = _key(0.5, "probability of cutmix where both are on", "--mixup-switch-prob", ge=0, le=1)
    mixup_mode: Literal["batch", "pair", "elem"] = _key("batch", "what mixup draws its weights for", "--mixup-mode")


class LossConfig(_Section):
    """Loss."""

    smoothing: float = _key(0.1, "label smoothing", "--smoothing", ge=0, lt=1)
    bce: bool = _key(False, "binary cross-entropy in place of cross-entropy", "--bce-loss")


class ModelEmaConfig(_Section):
    """Moving average of the whole model, evaluated beside it (not Q-EMA)."""

    enabled: bool = _key(False, "keep one", "--model-ema")
    decay: float = _key(0.99996, "its decay", "--model-ema-decay", ge=0, lt=1)


class DistillationConfig(_Section):
    """Distillation from a teacher; needs a model with a distillation token."""

    type: Literal["none", "soft", "hard"] = _key("none", "kind of distillation", "--distillation-type")
    teacher_model: str = _key("regnety_160", "timm name of the teacher", "--teacher-model")
    teacher_path: str | None = _key(None, "the teacher's checkpoint", "--teacher-path")
    alpha: float = _key(0.5, "weight of the distillation term", "--distillation-alpha", ge=0, le=1)
    tau: float = _key(1.0, "temperature of soft distillation", "--distillation-tau", gt=0)


class DataConfig(_Section):
    """Data."""

    set: Annotated[str, BeforeValidator(lambda v: _DATA_SET_ALIASES.get(v, v) if isinstance(v, str) else v)] = _key(
        "imagenet",
        "imagenet (any folder with train/ and val/), cifar10, cifar100, digits, generated, or a timm name with a slash",
        "--data-set",
    )
    path: str | None = _key(None, "folder of the data set", "--data-path")
    batch_size: int | None = _key(
        None, "samples of one process at a time; null fits the global batch, 256 at most", "--batch-size", ge=1
    )
    num_workers: int | None = _key(
        None, "loader processes of one process; null: its share of the cores, 10 at most", "--num_workers", ge=0
    )
    pin_mem: bool = _key(True, "pin host memory for copies to a GPU", "--pin-mem")
    eval_crop_ratio: float = _key(0.875, "evaluation: centre crop over resized side", "--eval-crop-ratio", gt=0, le=1)
    mean: tuple[float, float, float] = _key((0.485, 0.456, 0.406), "channel means for normalisation")
    std: tuple[float, float, float] = _key((0.229, 0.224, 0.225), "channel deviations for normalisation")
    on_corrupt: Literal["error", "skip"] = _key(
        "error", "an image that cannot be read stops the run (error) or is replaced and counted (skip)", "--on-corrupt"
    )
    num_images: int = _key(1280, "training images of the generated set (a tenth as many for evaluation)", ge=1)


class RunConfig(_Section):
    """The run itself."""

    output_dir: str | None = _key(None, "where the run is written; null: runs/<name of the config>", "--output_dir")
    seed: int = _key(
        0, "seed of initialisation, data order, augmentation and quantization noise", "--seed", ge=0, lt=2**32
    )
    device: str = _key("auto", "auto, cpu or cuda", "--device")
    amp: Literal["auto", "none", "bfloat16"] = _key("auto", "autocast; auto: bfloat16 on a GPU, none on a CPU", "--amp")
    eval: bool = _key(False, "evaluate only (the checkpoint of --resume)", "--eval")
    resume: str | None = _key(None, "checkpoint to continue from; auto: the last one in output_dir, if any", "--resume")
    finetune: str | None = _key(
        None, "checkpoint or safetensors file whose weights the training starts from", "--finetune"
    )
    save_every: int | None = _key(None, "also checkpoint every so many optimizer steps", "--save-every", ge=1)
    log_every: int = _key(50, "optimizer steps between logged lines", "--log-every", ge=1)


class PaperConfig(_Section):
    """The published figure this configuration reproduces."""

    table: int
    row: str
    column: str
    top1: float | None = None
    top5: float | None = None


Quant = Annotated[NoQuant | MXQuant | Int4Quant, Field(discriminator="scheme")]
Stabilizer = Annotated[NoStabilizer | QEma | QRamping | Dampen | Freeze, Field(discriminator="kind")]


class Config(_Section):
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
    paper: PaperConfig | None = None


def dump_config(cfg: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)


# Keys that say where and how a run is executed and not what it computes: a run may be resumed with others.
_EXECUTION = {
    *(f"run.{name}" for name in RunConfig.model_fields if name != "seed"),
    *(f"data.{name}" for name in ("path", "batch_size", "num_workers", "pin_mem", "on_corrupt")),
    "paper",
}


def recipe_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys in which two dumped configurations differ that change what is computed: "optim.lr 0.001 (here 0.0005)"."""

    def leaves(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in mapping.items():
            dotted = f"{prefix}{key}"
            if dotted not in _EXECUTION:
                found |= leaves(value, f"{dotted}.") if isinstance(value, dict) else {dotted: value}
        return found

    a, b = leaves(one), leaves(other)
    return [f"{key} {a.get(key)} (here {b.get(key)})" for key in {**a, **b} if a.get(key) != b.get(key)]


# ---------------------------------------------------------------------------------------------------------------------
# Folding: defaults < extends < file < flags
# ---------------------------------------------------------------------------------------------------------------------

_TAGGED = {"quant": "scheme", "stabilizer": "kind"}  # a changed tag replaces its mapping instead of merging into it


class _UniqueKeyLoader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a key given twice in one mapping; plain YAML lets the last one win."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"key '{key.value}' is given twice, in line {lines[key.value]} and again in line {line}"
                )
            lines[key.value] = line
        return node


def _parse_yaml(text: str, what: str) -> Any:
    """Raises UserError, `what` being the file or override the text is from."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(
            f"{what} is not valid YAML: {error.problem}, in line {mark.line + 1}, column {mark.column + 1}."
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date with a month of 13, say
        raise UserError(f"{what} is not valid YAML: {' '.join(str(error).split())}.") from None


def read_yaml(path: Path, child: Path | None = None) -> dict[str, Any]:
    """The mapping in a file, which `child` extends."""
    by = f" ({child} extends it)" if child else ""
    if path.is_dir():
        raise UserError(f"{path} is a folder{by}; a configuration file (.yaml) was expected.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"There is no configuration file {path}{by}.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration file {path}{by} cannot be read: {error}.") from None
    data = _parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        found = "a list" if isinstance(data, list) else f"just {data!r}"
        raise UserError(f"{path} must hold a mapping of keys to values, not {found}.")
    return data


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge, everything else replaces, and a mapping whose tag changes is replaced as a whole."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            tag = _TAGGED.get(key)
            changed = tag in old and tag in value and old[tag] != value[tag]
            value = value if changed else _merge(old, value)
        merged[key] = value
    return merged


def _paths(mapping: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of a mapping's keys, of its sections too."""
    for key, value in mapping.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def _read_config(path: Path, child: Path | None) -> dict[str, Any]:
    """What a file says, or a row of a table of runs: configs/ablations/table1.yaml#q1/deit_tiny."""
    import rows  # here, because it reads its files with this module

    data = {} if rows.is_row(path) else read_yaml(path, child)
    return rows.row_config(str(path)) if rows.is_row(path) or "rows" in data else data


def _fold_file(path: Path, origins: dict[str, str], chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One file with everything it extends. `origins` gains, for every key, the file it was last set in."""
    if path.resolve() in [p.resolve() for p in chain]:
        raise UserError(f"{path} extends itself by way of {' -> '.join(p.name for p in chain)}.")
    data = _read_config(path, chain[-1] if chain else None)
    parents = data.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise UserError(f"{path}: extends must be a file name or a list of file names.")
    folded: dict[str, Any] = {}
    for parent in parents:
        folded = _merge(folded, _fold_file(path.parent / parent, origins, (*chain, path)))
    folded.pop("paper", None)  # a published figure belongs to the file that states it and to no other
    origins.update(dict.fromkeys(_paths(data), str(path)))
    return _merge(folded, data)


def _fold_overrides(overrides: Sequence[str], origins: dict[str, str], source: str) -> dict[str, Any]:
    folded: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        parts = dotted.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"The override '{override}' must be of the form key=value, such as schedule.epochs=10.")
        value = _parse_yaml(text, f"{source}: {override}")
        for part in reversed(parts):
            value = {part: value}
        folded = _merge(folded, value)
        origins.update(dict.fromkeys(_paths(value), source))
    return folded


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), *, source: str = "an override"
) -> Config:
    """Fold defaults, `path` with what it extends, and `overrides` ("section.key=value") into one frozen Config.

    Raises UserError, one sentence that names the file (or `source`), the key and the nearest valid key.
    """
    origins: dict[str, str] = {}
    folded = _fold_file(Path(path), origins) if path is not None else {}
    folded = _merge(folded, _fold_overrides(overrides, origins, source))
    model = folded.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    # An mxfp4_ model is quantized unless the user says not.
    tags = {"quant": "mx" if str(name).startswith("mxfp4_") else "none", "stabilizer": "none"}
    for section, tag in _TAGGED.items():
        if isinstance(given := folded.get(section, {}), dict):
            folded[section] = {tag: tags[section], **given}
    try:
        return Config.model_validate(folded)
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0], origins)) from None


def sections_in(annotation: Any) -> list[type[_Section]]:
    """The section classes in a field's annotation: itself, or the members of a union of them."""
    if isinstance(annotation, type) and issubclass(annotation, _Section):
        return [annotation]
    if typing.get_origin(annotation) in (Annotated, Union, types.UnionType):
        return [m for arg in typing.get_args(annotation) for m in sections_in(arg)]
    return []


def iter_keys(section: type[_Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf key of the configuration as ("section.key", field), a key shared by several tags once for each."""
    for name, field in section.model_fields.items():
        children = sections_in(field.annotation)
        if not children:
            yield f"{prefix}{name}", field
        for child in children:
            yield from iter_keys(child, f"{prefix}{name}.")


def _nearest(dotted: str, keys: Iterable[str]) -> str | None:
    """The key of the same name in another section; else the one of a like name in its own or, if very like, in any."""
    scope, _, name = dotted.rpartition(".")
    anywhere = {key.rpartition(".")[2]: key for key in keys}
    inside = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == scope}
    near = difflib.get_close_matches(name, inside, n=1) if name not in anywhere else []
    if near:
        return inside[near[0]]
    near = difflib.get_close_matches(name, anywhere, n=1, cutoff=0.8)
    return anywhere[near[0]] if near else None


def _explain(error: Any, origins: dict[str, str]) -> str:
    """One sentence for a pydantic error: where, which key, what is wrong and what was expected."""
    loc = [str(part) for part in error["loc"]]
    tag = None
    if len(loc) > 1 and loc[0] in _TAGGED and len(sections_in(Config.model_fields[loc[0]].annotation)) > 1:
        tag = loc.pop(1)  # pydantic puts the tag of a union into the location; it is not part of the key
    if loc[:2] == ["model", "kwargs"]:
        del loc[3:]  # and the first of the types that a value may have
    if error["type"] == "union_tag_invalid":
        loc.append(_TAGGED[loc[0]])
    dotted = ".".join(loc)
    known = [".".join(loc[:n]) for n in range(len(loc), 0, -1) if ".".join(loc[:n]) in origins]
    where = origins[known[0]] if known else "the configuration"
    given, message = error.get("input"), error["msg"]
    shown = "null" if given is None else str(given).lower() if isinstance(given, bool) else repr(given)
    if error["type"] in ("extra_forbidden", "invalid_key"):
        keys = {name for name, _ in iter_keys()}
        if any(f"{key}.".startswith(f"{dotted}.") for key in keys):
            return f"{where}: {dotted} does not apply while {loc[0]}.{_TAGGED[loc[0]]} is {tag}."
        if near := _nearest(dotted, sorted(keys | Config.model_fields.keys())):
            return f"{where}: there is no key {dotted}; did you mean {near}?"
        scope = "".join(f"{part}." for part in loc[:-1])
        valid = sorted({key.removeprefix(scope).split(".")[0] for key in keys if key.startswith(scope)})
        return f"{where}: there is no key {dotted}; valid keys here: {', '.join(valid)}."
    if error["type"] == "missing":
        if loc[-1].isdigit():
            return f"{where}: {'.'.join(loc[:-1])} is {shown}: it needs more values."
        return f"{where}: {dotted} is missing."
    if error["type"] == "union_tag_invalid":
        return f"{where}: {dotted} is {error['ctx']['tag']!r}: input should be one of {error['ctx']['expected_tags']}."
    if error["type"] == "value_error":
        return f"{where}: {dotted}: {error['ctx']['error']}."
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "a mapping of keys to values was expected"
    elif loc[:2] == ["model", "kwargs"]:
        message = "true, false, a number, a text or a list of whole numbers was expected"
    elif error["type"] == "string_type" and given is not None and not isinstance(given, list | dict):
        message += "; put it in quotes"
    message = message[0].lower() + message[1:].replace(" after validation", "")
    return f"{where}: {dotted} is {shown}: {message.replace('tuple', 'list')}."  # a tuple is a list in YAML
