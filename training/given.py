"""Weights that a run is given: what --finetune starts from, what --eval scores and by which configuration."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import Config, UserError, load_config, recipe_differences
from models.packed import dequantized_weights, load_packed
from models.zoo import PREFIX
from quantization import LinearRecipe, resolve
from record.packed import is_packed
from record.weights import finetune_from, load_weights, restore_model, saved_config

_OF_THE_MODEL = ("name", "img_size", "patch_size", "num_classes", "kwargs")
# What decides how given weights score, beside the model itself.
_SCORED_BY = {"quant": None, "stabilizer": None, "data": ("mean", "std", "eval_crop_ratio")}
_HELD = ".held"  # the entry of a layer (QuantLinear)


def as_trained(
    path: Path, config: str | None, overrides: Sequence[str], source: str
) -> tuple[Config, dict[str, Any] | None, list[str]]:
    """The command's configuration (its file and overrides) for evaluating the weights in `path`.

    A checkpoint of ours is evaluated by its own quantizers, shadows, means, deviations and crop, but for what the
    overrides say; a packed one by its own model too. Returns also the checkpoint's whole configuration, if it has one,
    and a sentence for each way in which the result is not the command's or not the checkpoint's. Raises UserError.
    """
    asked = load_config(config, overrides, source=source)
    own = saved_config(path)
    if own is None:
        return asked, None, []
    kept = overrides_of(own, whole=is_packed(path))
    try:
        trained, used = (load_config(config, [*kept, *more], source=str(path)) for more in ([], overrides))
    except UserError as error:
        return asked, own, [f"{path} is evaluated by the command's configuration, since its own does not read: {error}"]
    said = []
    if differences := recipe_differences(_scored_by(used), _scored_by(asked)):
        said.append(f"{path} is evaluated by its own configuration, {_some(differences)}.")
    if differences := recipe_differences(_scored_by(trained), _scored_by(used)):
        said.append(f"{path} was trained with {_some(differences)}; it is evaluated as the command says.")
    said += _other_model(path, own, used)
    said += _other_images(path, own, used)
    return used, own, said


def _other_model(path: Path, own: Mapping[str, Any], used: Config) -> list[str]:
    """What to say where weights are put into another model than was trained, which their shapes may not tell: of other
    heads, say, or another activation. Another size of images is a matter of its own (`fit`)."""
    asked, differences = used.model_dump(mode="json"), []
    for section, keys in (("model", ("name", "patch_size", "kwargs")), ("run", ("amp",))):
        held = own.get(section)
        for key in keys if isinstance(held, Mapping) else ():
            theirs, ours = held.get(key, asked[section][key]), asked[section][key]
            if key == "name" and str(theirs).removeprefix(PREFIX) == ours.removeprefix(PREFIX):
                continue
            if theirs != ours:
                differences.append(f"{section}.{key} {theirs} (here {ours})")
    return (
        [f"{path} was trained with {_some(differences)}; it is evaluated as the command says."] if differences else []
    )


def _other_images(path: Path, own: Mapping[str, Any], used: Config) -> list[str]:
    """What to say where a run held out another share of its training images than the evaluation does."""
    data = own.get("data")
    if not isinstance(data, Mapping) or data.get("set", used.data.set) != used.data.set:
        return []
    theirs, ours = data.get("val_split"), used.data.val_split
    if theirs == ours or not isinstance(theirs, int | float | None):
        return []
    if ours is None:
        return [
            f"{path} was scored in training on the images of train/ held out by --val-split {theirs}, and is scored "
            f"here on those of val/; add --val-split {theirs} for the former."
        ]
    if theirs is None or theirs < ours:
        held_out = "without --val-split" if theirs is None else f"with --val-split {theirs}"
        return [f"{path} was trained {held_out}, so it has seen images that --val-split {ours} holds out."]
    return [f"{path} was trained with --val-split {theirs}, of whose images --val-split {ours} takes a part."]


def overrides_of(own: Mapping[str, Any], whole: bool = False) -> list[str]:
    """The part of a configuration that decides how weights score, as overrides of another; `whole`: and the model."""
    found = []
    for section, keys in (_SCORED_BY | ({"model": _OF_THE_MODEL} if whole else {})).items():
        held = own.get(section)
        if keys is None and held is not None:
            found.append(f"{section}={json.dumps(held)}")
        elif isinstance(held, Mapping):
            found += [f"{section}.{key}={json.dumps(held[key])}" for key in keys if key in held]
    return found


def _scored_by(cfg: Config) -> dict[str, Any]:
    dumped = cfg.model_dump(mode="json")
    return {
        section: dumped[section] if keys is None else {key: dumped[section][key] for key in keys}
        for section, keys in _SCORED_BY.items()
    }


def _some(differences: list[str]) -> str:
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return ", ".join(differences[:3]) + more


def fit(model: nn.Module, weights: Mapping[str, Tensor], path: Path, own: Mapping[str, Any] | None, size: int) -> bool:
    """Load weights for evaluation. Returns whether they were resampled, as for fine-tuning: to images of side `size`
    from those of their own configuration `own`, if they have one. Raises UserError where they do not fit otherwise.

    What delayed outer scales hang from may be of one side alone, since other quantizers than in training may be asked.
    """
    kept = {name: value for name, value in model.state_dict().items() if name.endswith(_HELD)}
    weights = {name: value for name, value in weights.items() if name in kept or not name.endswith(_HELD)}
    weights = {**kept, **weights}
    try:
        restore_model(model, weights, path)
        return False
    except UserError as error:
        misfit = error
    with contextlib.suppress(UserError, AttributeError):
        if own is not None and own.get("model", {}).get("img_size") == size:
            raise misfit
        if not finetune_from(model, weights, path):
            return True
    raise misfit


def load_rest(model: nn.Module, weights: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
    """Of the `names` that a file could not fill before, load those that the model has now. Returns the others."""
    own = model.state_dict()
    fit = [name for name in names if name in own and name in weights and own[name].shape == weights[name].shape]
    model.load_state_dict({name: weights[name] for name in fit}, strict=False)
    return [name for name in names if name not in fit]


# ---------------------------------------------------------------------------------------------------------------------
# Packed checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def start_weights(path: str | Path, *, average: bool) -> dict[str, Tensor]:
    """What --finetune starts from: weights of any file that load_weights reads, or of a packed checkpoint, expanded.

    average: the moving average of the weights. Raises UserError.
    """
    if not is_packed(path):
        return load_weights(path, average=average)
    _no_average(path, average)
    return dequantized_weights(path)


def packed_model(cfg: Config, path: Path, device: torch.device) -> nn.Module:
    """The model of a packed checkpoint, to be evaluated as the configuration says.

    Its activations are quantized as in training, or left alone where the configuration has q1 off. Raises UserError
    where the configuration asks for another model, other quantizers, or a moving average.
    """
    _no_average(path, cfg.model_ema.enabled)
    own = load_config(None, overrides_of(saved_config(path) or {}, whole=True), source=str(path))
    for key in _OF_THE_MODEL:
        asked, given = getattr(cfg.model, key), getattr(own.model, key)
        if asked != given:
            raise UserError(f"{path} was made with model.{key} {given}, and the command says {asked}; leave it away.")
    wanted, trained = resolve(cfg.quant), resolve(own.quant)
    if not isinstance(wanted, LinearRecipe) or not isinstance(trained, LinearRecipe):
        raise UserError(
            f"{path} holds weights in a microscaling format, and quant.scheme int4 is another; leave it away."
        )
    plain = wanted.q1 is None and trained.q1 is not None
    same = ("q2", "carrier", "rotate_output", "policy")
    alike = all(getattr(wanted, name) == getattr(trained, name) for name in same)
    if not alike or (wanted.q1 != trained.q1 and not plain):
        raise UserError(
            f"{path} holds weights that are quantized already, by {trained}: they are evaluated so, or with their "
            "activations left alone (--quant.scheme mx --quant.active q2)."
        )
    return load_packed(path, activations="plain" if plain else "quantized", device=device)


def _no_average(path: str | Path, average: bool) -> None:
    if average:
        raise UserError(f"{path} is packed and holds no moving average; leave --use-ema and --model-ema away.")
