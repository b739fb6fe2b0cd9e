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

from torch import Tensor, nn

from config import UserError
from record.checkpoint import EXPECTED, read_file

_HEADS = ("head.", "head_dist.")  # the classifiers of DeiT, its distilled form and Swin (head.fc)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Model weights on the CPU from a checkpoint of ours, a timm or DeiT file, a bare state dict or safetensors.

    Prefixes that DDP ("module.") and torch.compile ("_orig_mod.") add to names are taken off. Raises UserError.
    """
    weights = read_file(Path(path))
    for key in ("model", "state_dict"):
        if isinstance(weights, Mapping) and isinstance(weights.get(key), Mapping):
            weights = weights[key]
    entries = weights.items() if isinstance(weights, Mapping) else []
    if not entries or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entries):
        raise UserError(f"{path} holds no model weights; {EXPECTED}.")
    return {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in entries}


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


def restore_model(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Load weights that must fit exactly. Raises UserError with the first difference and leaves the model untouched."""
    for _, difference in _differences(model.state_dict(), weights):
        raise UserError(
            f"{path} is the checkpoint of another model: {difference}; check --model, or start from its weights with "
            "--finetune."
        )
    model.load_state_dict(weights)


def finetune_from(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> list[str]:
    """Load weights trained at another image size, patch size or class count, resampled by timm's own filters.

    Returns the names that were not loaded: a classifier that is missing or has another class count, which keeps its
    initialisation, and quantizer state that only one side keeps beside a layer's weight (a shadow, a learned step).
    Any other difference is a UserError, with the model untouched.
    """
    own = model.state_dict()
    given = dict(weights)

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
                given = resample(given, model, **gamma)
            except Exception as error:  # the filters assume a file of their own family
                names = (text for name, text in _differences(own, given) if (name in own) != (name in given))
                difference = next(names, f"they cannot be resampled ({' '.join(str(error).split())})")
                raise misfit(difference) from None
            break
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
