"""What each kind of file that a run leaves may hold: checked when it is read and before anything of it is used.

    check(Checkpoint, state, "last.pt")     # UserError: last.pt is no checkpoint of a run: epoch is 'three': ...

A file may come from elsewhere, from another version or from a damaged disk. Keys that are not listed pass, so that a
file of a newer version can be read where `format` says that nothing else has changed.
"""

from __future__ import annotations

import contextlib
import math
import reprlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import torch
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from config import UserError

MOST = 2**31 - 1  # of epochs, steps, classes, processes
LONGEST_CONFIG = 2**16  # characters
_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, where PyYAML was built with it


class Form(BaseModel):
    """Keys with their types, none of which is converted; further keys pass."""

    model_config = ConfigDict(strict=True, extra="allow", arbitrary_types_allowed=True, protected_namespaces=())


def check(form: type[Form], data: Any, what: str) -> None:
    """Raises UserError, one sentence that begins with `what`, for the first value of `data` that is not of the form."""
    try:
        form.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = str(first.get("ctx", {}).get("error") or first["msg"])
        if first["type"] == "missing":
            raise UserError(f"{what}: {where} is missing.") from None
        whole = isinstance(first["input"], dict) and first["type"] == "value_error"  # the reason names the entry
        shown = f"{where}: " if whole and where else f"{where} is {describe(first['input'])}: " if where else ""
        raise UserError(f"{what}: {shown}{reason[0].lower()}{reason[1:]}.") from None


def describe(value: Any) -> str:
    """A value in a few words, whatever its size."""
    if isinstance(value, Tensor | np.ndarray):
        size = "x".join(map(str, value.shape)) or "a scalar"
        return f"an array of {str(value.dtype).removeprefix('torch.')}, {size}"
    if isinstance(value, dict | list | tuple):
        return f"a {'mapping' if isinstance(value, dict) else type(value).__name__} of {len(value)}"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return " ".join(short.repr(value).split())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def tensor_fault(value: Tensor) -> str | None:
    """Why a tensor read from a file cannot be a weight or a state, in words; None where it can."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
        return "is no plain, dense tensor"
    if value.device.type == "meta":
        return "has no values"
    if value.is_complex():
        return f"holds complex numbers ({str(value.dtype).removeprefix('torch.')})"
    reach = 1  # elements from the first to the last of the dimensions so far, the finest first
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return f"repeats values in place of holding {value.numel()} of them (strides {value.stride()})"
            reach += stride * (size - 1)
    return None


def _plain(value: Tensor) -> Tensor:
    if (fault := tensor_fault(value)) is not None:
        raise ValueError(f"it {fault}")
    return value


def _number(value: Tensor) -> Tensor:
    if not value.is_floating_point() or value.isnan().any():
        raise ValueError("numbers were expected")
    return value


def _indices(value: Tensor) -> Tensor:
    if value.dtype != torch.int64 or value.dim() != 1 or (value < 0).any():
        raise ValueError("positions in a weight were expected")
    return value


def _config(text: Any) -> dict[str, Any]:
    """The sections of a configuration in YAML, without aliases, by which a short text can stand for a huge one."""
    if not isinstance(text, str):
        raise ValueError("a configuration was expected")
    if len(text) > LONGEST_CONFIG:
        raise ValueError(f"a configuration has at most {LONGEST_CONFIG} characters, and this has {len(text)}")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=_YamlLoader)):
            raise ValueError("a configuration has no aliases")
        sections = yaml.load(text, Loader=_YamlLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(sections, dict) or not all(isinstance(key, str) for key in sections):
        raise ValueError("a mapping of sections was expected")
    return sections


Count = Annotated[int, Field(ge=0, le=MOST)]
Many = Annotated[int, Field(ge=1, le=MOST)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
State = Annotated[Tensor, AfterValidator(_plain)]
Numbers = Annotated[State, AfterValidator(_number)]
Weights = Annotated[dict[str, State], Field(min_length=1)]


class _Optimizer(Form):
    state: dict[Count, dict[str, State | bool | int | float | str | None]]
    param_groups: Annotated[list[dict[str, Any]], Field(min_length=1)]


class _Rate(Form):
    total: Numbers
    steps: Count


class _Paths(Form):
    dist_w: list[Numbers]
    dist_q: list[Numbers]


class _Window(Form):
    first_step: Count
    rates: dict[str, _Rate]
    paths: _Paths | None


class _Tracks(Form):
    first_step: Count
    values: Numbers  # (steps + 1, 2, weights): latent and quantized


class _Probe(Form):
    window: _Window | None
    tracks: _Tracks | None
    chosen: list[Annotated[State, AfterValidator(_indices)]] | None
    figures: tuple[Annotated[int, Field(ge=-1, le=MOST)], dict[str, float]]

    @model_validator(mode="after")
    def _of_the_chosen(self) -> _Probe:
        if self.tracks is not None:
            followed = sum(map(len, self.chosen or ()))
            if self.tracks.values.shape[1:] != (2, followed):
                raise ValueError(
                    f"tracks.values is {describe(self.tracks.values)}, and {followed} weights are followed"
                )
        return self


class WithConfig(Form):
    """A file that says how it was trained."""

    config: Annotated[dict[str, Any], BeforeValidator(_config)]


class Checkpoint(WithConfig):
    """last.pt and best.pt: the state of a run."""

    format: Many = 1
    model: Weights
    optimizer: _Optimizer
    ema: Weights | None
    stabilizer: dict[str, Any]  # compared with the stabilizer's own when it is restored
    probe: Annotated[_Probe | None, BeforeValidator(lambda state: None if state == {} else state)] = None
    epoch: Count
    step: Count
    steps_per_epoch: Many
    passes: Annotated[int, Field(ge=0, lt=2**31)] = 0  # of one process; positions of noise beyond are evaluation's
    best_top1: Annotated[float, Field(ge=-1, le=100, allow_inf_nan=False)]
    meter: dict[str, Annotated[list[Finite], Field(min_length=2, max_length=2)]]
    classes: list[str] = Field([], max_length=MOST)  # by label; empty where nobody knows their names
    blocks_below_window: Annotated[int, Field(ge=0, lt=2**63)] = 0  # of a run whose products are in FP8

    @model_validator(mode="after")
    def _one_moment(self) -> Checkpoint:
        """What is counted is of one and the same moment of a run."""
        with contextlib.suppress(KeyError, TypeError):
            epochs = self.config["schedule"]["epochs"]
            if self.epoch > epochs:
                raise ValueError(f"epoch is {self.epoch}, and its run has {epochs} epochs")
            if self.step and self.epoch == epochs:
                raise ValueError(f"step is {self.step} after the last of its run's {epochs} epochs")
        if self.step > self.steps_per_epoch:
            raise ValueError(f"step is {self.step}, and its epochs have {self.steps_per_epoch} steps")
        if "passes" in self.model_fields_set and self.passes < self.epoch + self.step:  # epochs may grow between two
            raise ValueError(f"passes is {self.passes} at epoch {self.epoch}, step {self.step}")
        if (self.epoch > 0) != (self.best_top1 >= 0):
            raise ValueError(f"best_top1 is {self.best_top1} after {self.epoch} epochs")
        if self.step and "loss" not in self.meter:
            raise ValueError("meter.loss is missing")
        if any(not 0 <= count <= self.step for _, count in self.meter.values()):
            raise ValueError(f"meter counts more than the {self.step} steps of the epoch")
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and manifest
# ---------------------------------------------------------------------------------------------------------------------

_Percent = Annotated[float, Field(ge=0, le=1000)]  # generous: a slip of a digit is to be seen in the report
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Figures(Form):
    """Those of a metrics line that reports and resumed runs compute with."""

    train_loss: float = Field(0.0, alias="train.loss")
    eval_loss: float = Field(0.0, alias="eval.loss")
    eval_top1: _Percent = Field(0.0, alias="eval.top1")
    eval_top5: _Percent = Field(0.0, alias="eval.top5")
    train_seconds: _Seconds = Field(0.0, alias="train.seconds")
    eval_seconds: _Seconds = Field(0.0, alias="eval.seconds")
    r_wq: Annotated[float, Field(ge=0)] = Field(0.0, alias="eval.r_WQ")
    r_y: Annotated[float, Field(ge=0)] = Field(0.0, alias="eval.r_Y")
    best_top1: _Percent = Field(0.0, alias="final.best_top1")
    epochs: Count = Field(0, alias="final.epochs")
    void_epoch: Count = Field(0, alias="resumed.epoch")
    void_step: Count = Field(0, alias="resumed.step")


class MetricsLine(Form):
    """A line of metrics.log; [epoch, iteration], [epoch] or [] is its step, or "PARAMETER"."""

    type: Literal["LOG"]
    step: Annotated[list[Count], Field(max_length=2)] | Literal["PARAMETER"]
    data: Figures

    @model_validator(mode="before")
    @classmethod
    def _scalars(cls, line: Any) -> Any:
        data = line.get("data") if isinstance(line, dict) else None
        if isinstance(data, dict) and line.get("step") != "PARAMETER":
            for name, value in data.items():
                if isinstance(value, dict | list):
                    raise ValueError(f"data.{name} is {describe(value)}, and a figure is a number or a word")
        return line


class _Git(Form):
    commit: str | None
    dirty: bool | None


class _Device(Form):
    type: str
    name: str


class _Batch(Form):
    process: Many
    accumulation: Many
    all: Annotated[Many, Field(alias="global")]


class Manifest(Form):
    """manifest.json. A run of another version may lack any of it."""

    start_time: str = ""
    command_line: str = ""
    git: _Git | None = None
    versions: dict[str, str | None] = {}
    device: _Device | None = None
    world_size: Many = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: str = ""
    paper: dict[str, Any] | None = None
    timm_patches: list[dict[str, Any]] = []
    quantizers: dict[str, dict[str, str | None]] = {}
    parameters: Annotated[int, Field(ge=0)] = 0
    classes: Many = 1
    class_names: list[str] = []
    unquantized_block_linears: list[str] = []
    batch: _Batch | None = None
    steps_per_epoch: Many = 1
    images: dict[str, Any] = {}
    autocast: str = ""
    resumed_from: str | None = None
    finetuned_from: str | None = None
    not_loaded_in_finetuning: list[str] = []
    sessions: list[dict[str, Any]] = []


# ---------------------------------------------------------------------------------------------------------------------
# Recordings
# ---------------------------------------------------------------------------------------------------------------------


def _array(kinds: str, ndim: int, low: float = -math.inf, high: float = math.inf, *, finite: bool = True) -> Any:
    """The type of an array of these kinds of dtype and so many dimensions, none of them 0; values in [low, high]."""

    def fits(value: np.ndarray) -> np.ndarray:
        if value.dtype.kind not in kinds or value.ndim != ndim or not value.size:
            raise ValueError(f"{ndim} dimensions of {'text' if kinds == 'U' else 'numbers'} were expected")
        if value.dtype.kind != "U":
            if finite and not np.isfinite(value).all():
                raise ValueError("it holds values that are not finite")
            if not ((value >= low) & (value <= high)).all():  # false for NaN too
                raise ValueError(f"it holds values that are not from {low:g} to {high:g}")
        return value

    return Annotated[np.ndarray, AfterValidator(fits)]


_WHOLE, _REAL = "iu", "f"
_QUANTIZED = ("r_WQ", "grid", "latent_edges", "latent_counts", "confidence_edges", "confidence_counts", "confidence")
_QUANTIZED += ("oscillating", "numel")


class Arrays(Form):
    """probes/*.npz: see quantization/watch/probe.py. L layers, S steps, K weights that are followed."""

    layers: _array("U", 1)  # (L,)
    block: _array("U", 0)
    epoch: _array(_WHOLE, 0, 1, MOST)
    first_step: _array(_WHOLE, 0, 0, MOST)
    steps: _array(_WHOLE, 0, 1, MOST)
    r_w: _array(_REAL, 1, 0, finite=False)  # (L,); infinite where a weight leaves 0
    r_Y: _array(_REAL, 0, 0, finite=False)  # noqa: N815
    r_Y_block: _array(_REAL, 0, 0, finite=False) | None = None  # noqa: N815 - recordings of before have none
    r_WQ: _array(_REAL, 1, 0, finite=False) | None = None  # noqa: N815 - (L,), as all of _QUANTIZED or none of it
    grid: _array(_REAL, 1) | None = None
    latent_edges: _array(_REAL, 1) | None = None  # (bins + 1,)
    latent_counts: _array(_WHOLE, 2, 0) | None = None  # (L, bins)
    confidence_edges: _array(_REAL, 1) | None = None
    confidence_counts: _array(_WHOLE, 2, 0) | None = None
    confidence: _array(_REAL, 1, 0, 1 + 1e-6) | None = None  # (L,)
    oscillating: _array(_WHOLE, 1, 0) | None = None  # (L,), of `numel`
    numel: _array(_WHOLE, 1, 1) | None = None
    trajectory_latent: _array(_REAL, 2) | None = None  # (S + 1, K), as all of the trajectory or none of it
    trajectory_quantized: _array(_REAL, 2) | None = None
    trajectory_layer: _array(_WHOLE, 1, 0) | None = None  # (K,)
    trajectory_row: _array(_WHOLE, 1, 0) | None = None
    trajectory_column: _array(_WHOLE, 1, 0) | None = None
    trajectory_ratio: _array(_REAL, 1, 0, finite=False) | None = None
    trajectory_first_step: _array(_WHOLE, 0, 0, MOST) | None = None

    @model_validator(mode="after")
    def _of_one_recording(self) -> Arrays:
        if (fault := next(self._faults(), None)) is not None:
            raise ValueError(fault)
        return self

    def _faults(self) -> Iterator[str]:
        trajectory = [name for name in type(self).model_fields if name.startswith("trajectory_")]
        for group in (_QUANTIZED, trajectory):
            held = [name for name in group if getattr(self, name) is not None]
            if held and len(held) < len(group):
                yield f"{next(name for name in group if name not in held)} is missing beside {held[0]}"
                return
        layers = self.layers.size
        sizes = {"r_w": layers}
        if self.r_WQ is not None:
            sizes |= dict.fromkeys(("r_WQ", "confidence", "oscillating", "numel", "latent_counts"), layers)
            sizes |= {"confidence_counts": layers}
            for name in ("latent", "confidence"):
                edges, counts = getattr(self, f"{name}_edges"), getattr(self, f"{name}_counts")
                if edges.size != counts.shape[1] + 1 or not (np.diff(edges) > 0).all():
                    yield f"{name}_edges are no ascending edges of the {counts.shape[1]} bins of {name}_counts"
            if not (np.diff(self.grid) > 0).all():
                yield "grid is not ascending"
        if self.trajectory_latent is not None:
            followed = self.trajectory_latent.shape[1]
            sizes |= dict.fromkeys(trajectory[2:-1], followed)
            if self.trajectory_latent.shape != self.trajectory_quantized.shape or len(self.trajectory_latent) < 2:
                yield "trajectory_latent and trajectory_quantized are not two or more steps of the same weights"
            if self.trajectory_layer.max() >= layers:
                yield f"trajectory_layer names a layer beyond the {layers} there are"
        for name, size in sizes.items():
            if len(value := getattr(self, name)) != size:
                yield f"{name} has {len(value)} entries and {size} were expected"
        if self.numel is not None and (self.oscillating > self.numel).any():
            yield "oscillating counts more weights than there are"
