"""What trained weights are handed on as: a model restored from any checkpoint, packed files, predictions."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from config import Config, UserError, load_config
from config.explain import shorten
from images.decode import open_image, reason, upright
from images.transforms import eval_transform
from models.packed import pack_model, save_dequantized, save_packed
from quantization.export import packed_layers
from quantization.stabilizers import Plan
from record.checkpoint import read_file
from record.files import open_ordinary
from record.manifest import read_manifest
from record.metrics import finished_epochs
from record.packed import Trained, is_packed, refuse_suffix
from record.weights import load_weights, restore_model, saved_classes, saved_config
from training.build import autocast_dtype, build_model, check_carrier, stabilize
from training.given import overrides_of, packed_model

BATCH = 32  # images of a prediction at a time
SHOWN = 5  # classes of an image


class Restored(NamedTuple):
    """A model as a file has it, in evaluation mode."""

    cfg: Config
    model: nn.Module
    classes: tuple[str, ...]  # by label; empty where nobody knows their names
    num_classes: int


def restore(path: Path, config: str | None, overrides: Sequence[str], device: torch.device) -> Restored:
    """The model of a checkpoint or a packed file, by its own configuration but for what the command says.

    `run.use_ema` takes the moving average of the weights. Raises UserError.
    """
    own = saved_config(path)
    kept = overrides_of(own or {}, whole=True)
    try:
        cfg = load_config(config, [*kept, *overrides], source="the command line")
    except UserError:
        load_config(None, kept, source=str(path))  # raises where it is the file's own fault
        raise
    classes = tuple(saved_classes(path))
    check_carrier(cfg, device)
    if is_packed(path):
        if cfg.run.use_ema:
            raise UserError(f"{path} is packed and holds no moving average; leave --use-ema away.")
        model = packed_model(cfg, path, device)
        return Restored(cfg, model, classes, model.packed_info.model.num_classes)
    weights = load_weights(path, average=cfg.run.use_ema)
    heads = [weights[name] for name in ("head.weight", "head.fc.weight") if name in weights]
    count = len(classes) or cfg.model.num_classes or (len(heads[0]) if heads and heads[0].dim() else 0)
    if not count:
        raise UserError(f"{path} does not tell how many classes its model has; give --nb-classes.")
    model = build_model(cfg, count, rank=0, device=device)
    stabilize(cfg, model, Plan(1, 1))
    restore_model(model, weights, path)
    return Restored(cfg, model.eval(), classes, count)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def export(restored: Restored, source: Path, target: Path, form: str, dtype: str | None) -> str:
    """Write the model of `source` to `target`, packed or dequantized; returns what was done, in a sentence.

    form: `packed`, or `dequantized` for plain timm. dtype: of all that is not packed; None: float32, or what the packed
    file had that the model comes from. Raises UserError.
    """
    refuse_suffix(target)
    model, as_it_was = restored.model, _as_it_was(source, restored.cfg)
    if is_packed(source):
        if not as_it_was:
            raise UserError(f"{source} is packed and written again as it is; leave flags that change its model away.")
    else:
        trained = provenance(source, restored.cfg.run.use_ema)
        if not as_it_was:  # the run's accuracy is that of another model
            trained = Trained(commit=trained.commit)
        model = pack_model(model, restored.cfg, restored.classes, restored.num_classes, trained)
    info = model.packed_info
    if form == "packed":
        save_packed(model, target, dtype)
        what = f"{len(packed_layers(model))} layers packed, the rest in {dtype or info.dtype}"
    else:
        save_dequantized(model, target, dtype or info.dtype)
        what = f"dequantized, in {dtype or info.dtype}"
    return f"{target}: {info.model.name}, {what}, {target.stat().st_size / 1e6:.2f} MB"


def _as_it_was(path: Path, cfg: Config) -> bool:
    """Whether the model of a file is evaluated by `cfg` as by the file's own configuration."""
    own = load_config(None, overrides_of(saved_config(path) or {}, whole=True))
    kept, used = (overrides_of(of.model_dump(mode="json"), whole=True) for of in (own, cfg))
    return kept == used


def provenance(path: Path, average: bool) -> Trained:
    """Where the weights of a checkpoint come from, as far as the files beside it tell."""
    held = read_file(path)
    held = held if isinstance(held, Mapping) else {}
    with contextlib.suppress(UserError, OSError):
        commit = read_manifest(path.parent).get("git", {}).get("commit")
        epoch = held.get("epoch") if held.get("step") == 0 else None
        figures = finished_epochs(path.parent, required=False).get(epoch, {})
        top1 = figures.get("eval.ema_top1" if average else "eval.top1")
        data: Any = (saved_config(path) or {}).get("data", {}) if top1 is not None else {}
        return Trained(commit=commit, top1=top1, data_set=data.get("set"), val_split=data.get("val_split"))
    return Trained()


# ---------------------------------------------------------------------------------------------------------------------
# Predictions
# ---------------------------------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """An image as the model was given it (before it is normalised), and its likeliest classes with probabilities."""

    path: Path
    image: Image.Image
    classes: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        return f"{self.path}: " + ", ".join(f"{shorten(name)} {100 * share:.1f} %" for name, share in self.classes)


@torch.no_grad()
def predict(restored: Restored, paths: Sequence[Path], device: torch.device) -> list[Prediction]:
    """What a model sees in image files. Raises UserError for one that cannot be read, and for logits that are none."""
    *crop, to_tensor, normalize = eval_transform(restored.cfg).transforms
    amp = autocast_dtype(restored.cfg, device)
    names = restored.classes or tuple(f"class {label}" for label in range(restored.num_classes))
    found = []
    for start in range(0, len(paths), BATCH):
        chunk = paths[start : start + BATCH]
        shown = [functools.reduce(lambda image, step: step(image), crop, _read(path)) for path in chunk]
        inputs = torch.stack([normalize(to_tensor(image)) for image in shown]).to(device)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits = restored.model(inputs)
        if not (finite := torch.isfinite(logits).all(-1)).all():
            image = chunk[int(finite.int().argmin())]
            raise UserError(f"What the model says of the image {image} is no number; its weights are not usable.")
        best = logits.float().softmax(-1).topk(min(SHOWN, logits.shape[-1]))
        for path, image, shares, labels in zip(chunk, shown, best.values.tolist(), best.indices.tolist(), strict=True):
            classes = tuple((names[label], share) for label, share in zip(labels, shares, strict=True))
            found.append(Prediction(path, image, classes))
    return found


def _read(path: Path) -> Image.Image:
    try:
        with open_ordinary(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # some cameras have as many pixels
            return upright(open_image(file))
    except Exception as error:  # Pillow's readers raise nearly every kind
        said = getattr(error, "strerror", None) or reason(error).rstrip(".")
        raise UserError(f"The image {path} cannot be read: {said}.") from None
