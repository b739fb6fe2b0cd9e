"""Weights into models: read from files of ours and of other programs, restored exactly or finetuned from.

    restore_model(model, load_weights(path), path)   # --eval, teachers: weights that must fit exactly
    finetune_from(model, load_weights(path), path)   # --finetune: other image size, classes

timm's and DeiT's layouts are read, bare state dicts and safetensors.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from config import UserError
from record.checkpoint import EXPECTED, read_file
from record.packed import config_of, is_packed, read_info
from record.schema import WithConfig, check, tensor_fault

_PLAIN = ("model", "state_dict")
_AVERAGES = ("ema", "model_ema", "state_dict_ema")  # of this program, DeiT, timm
_WRAPPERS = {"module", "model", "net", "network", "backbone"}  # of DDP, Lightning and others, around a whole model
_HEADS = ("head.", "head_dist.")  # the classifiers of DeiT, its distilled form and Swin (head.fc)


def load_weights(path: str | Path, *, average: bool = False) -> dict[str, Tensor]:
    """Model weights on the CPU from a checkpoint of ours, a timm or DeiT file, a bare state dict or safetensors.

    average: the moving average that the file keeps of them; without it those that were trained, and the average of a
    file that has nothing else. Prefixes that DDP, torch.compile and wrappers add to all names are taken off.
    Raises UserError.
    """
    held = read_file(Path(path))
    held = held if isinstance(held, Mapping) else {}
    plain, averaged = _find(held, _PLAIN), _find(held, _AVERAGES)
    if average and averaged is None:
        raise UserError(
            f"{path} holds no moving average of the weights; leave --model-ema or --use-ema away to take the weights."
        )
    weights = averaged if average or (plain is None and averaged is not None) else held if plain is None else plain
    if not weights or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise UserError(f"{path} holds no model weights; {EXPECTED}.")
    for name, value in weights.items():
        if (fault := tensor_fault(value)) is not None:
            raise UserError(f"{path} cannot be used: {name} {fault}; save the weights again as plain tensors.")
    weights = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    while (first := {name.partition(".")[0] for name in weights}) <= _WRAPPERS and len(first) == 1:
        if not all("." in name for name in weights):
            break
        weights = {name.partition(".")[2]: value for name, value in weights.items()}
    return weights


def saved_config(path: str | Path) -> dict[str, Any] | None:
    """The configuration that a checkpoint of ours was trained with; None for the files of others.

    Of a packed checkpoint: the sections it stands for, model among them. Raises UserError.
    """
    if is_packed(path):
        return config_of(read_info(path))
    held = read_file(Path(path))
    text = held.get("config") if isinstance(held, Mapping) else None
    if not isinstance(text, str):
        return None
    check(WithConfig, {"config": text}, f"{path} cannot be used")
    return yaml.safe_load(text)


def saved_classes(path: str | Path) -> list[str]:
    """The classes that a checkpoint of ours tells apart, by label; empty for the files of others. Raises UserError."""
    if is_packed(path):
        return read_info(path).classes
    held = read_file(Path(path))
    classes = held.get("classes", []) if isinstance(held, Mapping) else []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path} cannot be used: its classes are not a list of names; {EXPECTED}.")
    return classes


def _find(held: Mapping[str, Any], keys: tuple[str, ...]) -> Mapping[str, Any] | None:
    """The mapping under the first of `keys` that has one, and under a further one of them inside it."""
    found = None
    for key in keys:
        if isinstance(inner := (held if found is None else found).get(key), Mapping):
            found = inner
    return found


def _differences(own: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, what differs) for every entry that is missing, too much or of another shape, the model's own first."""
    for name, value in own.items():
        shape, other = (getattr(v, "shape", None) for v in (value, given.get(name)))
        if name not in given:
            yield name, f"{name} is not in the file"
        elif shape != other:
            here, there = ("x".join(map(str, s or ())) or "a scalar" for s in (shape, other))
            yield name, f"{name} is {here} here and {there} in the file"
    for name in given:
        if name not in own:
            yield name, f"{name} is only in the file"


def _values_amiss(own: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The first entry of another kind of number than the model's, or not finite where the model's is; None if none."""
    for name, value in own.items():
        other = given.get(name)
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            continue
        if value.is_floating_point() != other.is_floating_point() or (value.dtype == torch.bool) != (
            other.dtype == torch.bool
        ):
            here, there = (str(v.dtype).removeprefix("torch.") for v in (value, other))
            return f"{name} is {here} here and {there} in the file"
        if other.is_floating_point() and not other.to(value.dtype).isfinite().all() and value.isfinite().all():
            beyond = f", as {str(value.dtype).removeprefix('torch.')}" if other.isfinite().all() else ""
            return f"{name} holds values that are not finite{beyond}"
    return None


def _layers_amiss(model: nn.Module, given: Mapping[str, Any]) -> str | None:
    """The first fault that a layer finds in its own entries; None if there is none."""
    layers = ((f"{name}." if name else "", m) for name, m in model.named_modules() if hasattr(m, "state_fault"))
    faults = (layer.state_fault(given, prefix) for prefix, layer in layers)
    return next(filter(None, faults), None)


def restore_model(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Load weights that must fit exactly. Raises UserError with the first difference and leaves the model untouched."""
    own = model.state_dict()
    for _, difference in _differences(own, weights):
        raise UserError(
            f"{path} is the checkpoint of another model: {difference}; check --model, or start from its weights with "
            "--finetune."
        )
    if (amiss := _values_amiss(own, weights) or _layers_amiss(model, weights)) is not None:
        raise UserError(f"The weights in {path} cannot be used: {amiss}.")
    model.load_state_dict(weights)


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter with a value that is not finite; None if there is none. Waits for the device."""
    return next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)


def finetune_from(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> list[str]:
    """Load weights trained at another image size, patch size or class count, resampled by timm's own filters.

    Returns the names that were not loaded: a classifier that is missing or has another class count, which keeps its
    initialisation, and quantizer state that only one side keeps beside a layer's weight (a shadow, a learned step).
    Any other difference is a UserError, with the model untouched.
    """
    own = model.state_dict()
    given = dict(weights)
    if not any(name.startswith(_HEADS) for name in given) and given.keys() <= own.keys():
        # timm's filter for Swin takes a file without its classifier for one of an older layout, and renames layers.
        heads = {name: value for name, value in own.items() if name.startswith(_HEADS)}
    else:
        heads = {}

    def misfit(difference: str) -> UserError:
        return UserError(
            f"The weights in {path} do not fit the model: {difference}; check that --model is the model they belong to."
        )

    for cls in type(model).__mro__:  # timm keeps the filter of a model family in the module of its classes
        family = sys.modules[cls.__module__]
        if cls.__module__.startswith("timm.models.") and hasattr(family, "checkpoint_filter_fn"):
            resample = family.checkpoint_filter_fn
            # DeiT III's first files name their layer scales gamma_1 and gamma_2.
            gamma = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(resample).parameters else {}
            try:
                given = resample({**given, **heads}, model, **gamma)
            except Exception as error:  # the filters assume a file of their own family
                names = (text for name, text in _differences(own, given) if (name in own) != (name in given))
                difference = next(names, f"they cannot be resampled ({' '.join(str(error).split())})")
                raise misfit(difference) from None
            given = {name: value for name, value in given.items() if name not in heads}
            break
    if (amiss := _values_amiss(own, given) or _layers_amiss(model, given)) is not None:
        raise UserError(f"The weights in {path} cannot be used: {amiss}.")
    left = []
    for name, difference in _differences(own, given):
        layer, _, leaf = name.rpartition(".")
        weight = f"{layer}.weight"
        beside_weight = leaf != "bias" and weight in own and weight in given and not (name in own and name in given)
        if not name.startswith(_HEADS) and not beside_weight:
            raise misfit(difference)
        left.append(name)
    model.load_state_dict({name: value for name, value in given.items() if name not in left}, strict=False)
    return left
