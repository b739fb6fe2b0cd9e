"""The five models of the paper as records, and how a configured model is made."""

from __future__ import annotations

import copy
import difflib
import traceback
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from config import Config, UserError
from quantization import Int4Linear, QuantLinear, convert_linears, resolve

PREFIX = "mxfp4_"

# Arguments of timm.create_model, beside the keys that set them.
_KEY_OF = {
    "img_size": "model.img_size",
    "patch_size": "model.patch_size",
    "num_classes": "model.num_classes",
    "drop_rate": "model.drop",
    "drop_path_rate": "model.drop_path",
    "device": "run.device",
}


@dataclass(frozen=True)
class ZooModel:
    """A model of the paper: its name in timm and its column in the paper's tables."""

    timm_name: str
    column: str


ZOO: tuple[ZooModel, ...] = (
    ZooModel("deit_tiny_patch16_224", "deit_tiny"),
    ZooModel("deit_small_patch16_224", "deit_small"),
    ZooModel("deit_base_patch16_224", "deit_base"),
    ZooModel("swin_tiny_patch4_window7_224", "swin_tiny"),
    ZooModel("swin_small_patch4_window7_224", "swin_small"),
    # Not in the paper: the same transformers with a distillation token, for --distillation-type.
    ZooModel("deit_tiny_distilled_patch16_224", "deit_tiny"),
    ZooModel("deit_small_distilled_patch16_224", "deit_small"),
    ZooModel("deit_base_distilled_patch16_224", "deit_base"),
)


def create_model(cfg: Config, num_classes: int) -> nn.Module:
    """The model of a configuration, initialised by timm, its block linears converted by the recipe of `cfg.quant`.

    Raises UserError for a model timm does not know or arguments it does not take.
    """
    name = cfg.model.name.removeprefix(PREFIX)
    if not timm.is_model(name):
        near = difflib.get_close_matches(cfg.model.name, timm.list_models(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; timm.list_models() names those there are."
        raise UserError(f"There is no model {cfg.model.name}{hint}")
    for argument in _KEY_OF.keys() & cfg.model.kwargs.keys():
        raise UserError(f"model.kwargs.{argument} is set by {_KEY_OF[argument]}; use that key.")
    if cfg.model.kwargs.get("in_chans", 3) != 3:
        raise UserError(
            f"model.kwargs.in_chans is {cfg.model.kwargs['in_chans']}, and images come with 3 channels, grey ones too; "
            "leave it out."
        )
    heads = cfg.model.kwargs.get("num_heads", 1)
    if any(isinstance(count, int) and count < 0 for count in (heads if isinstance(heads, list) else [heads])):
        raise UserError(f"model.kwargs.num_heads is {heads}, and a block has one head at least.")
    kwargs: dict[str, Any] = {"img_size": cfg.model.img_size, **cfg.model.kwargs}
    if cfg.model.patch_size is not None:
        kwargs["patch_size"] = cfg.model.patch_size
    given_anyway = {"num_classes": num_classes, "drop_rate": cfg.model.drop, "drop_path_rate": cfg.model.drop_path}
    try:
        try:
            model = timm.create_model(name, **given_anyway, **kwargs)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            del kwargs["img_size"]  # a model for images of any size
            model = timm.create_model(name, **given_anyway, **kwargs)
    except Exception as error:  # timm checks little: which error comes up depends on how far wrong arguments get
        given = ", ".join(f"{key}={value}" for key, value in kwargs.items())
        reason = " ".join("".join(traceback.format_exception_only(error)).split())
        raise UserError(f"timm cannot make {name} with {given}: {reason}.") from None
    if 0 in getattr(getattr(model, "patch_embed", None), "grid_size", ()):
        raise UserError(
            f"model.img_size of {cfg.model.img_size} is smaller than one patch of {name}; see model.patch_size."
        )
    embedding = getattr(model, "patch_embed", None)
    sides = getattr(embedding, "patch_size", ())
    cut = getattr(getattr(embedding, "proj", None), "stride", sides) == sides  # and not overlapping ones
    for patch in sides if isinstance(sides, tuple) and cut and not getattr(embedding, "dynamic_img_pad", False) else ():
        if cfg.model.img_size % patch:
            fitting = cfg.model.img_size // patch * patch
            raise UserError(
                f"model.img_size of {cfg.model.img_size} is no multiple of {name}'s patches of {patch} pixels, so that "
                f"the edge of images would be cut off; choose {fitting} or {fitting + patch}, or a model.patch_size."
            )
    _check_scores(model, name, cfg.model.img_size, num_classes)
    try:
        recipe = resolve(cfg.quant)
    except ValueError as error:
        raise UserError(f"The section quant does not fit together: {error}.") from None
    if recipe.active or getattr(recipe, "rotated", False):  # INT4's is a switch of its own
        try:
            convert_linears(model, recipe, seed=cfg.run.seed)
        except ValueError as error:
            raise UserError(f"{name} cannot be quantized: {error}.") from None
    return model


def _check_scores(model: nn.Module, name: str, side: int, num_classes: int) -> None:
    """Raises UserError where a model gives something else than a score for each class, as one without pooling does. A
    model that cannot be asked on the device of shapes is not."""
    try:
        with torch.no_grad():
            shapes = {id(t): t.detach().to("meta") for t in (*model.parameters(), *model.buffers())}  # in their places
            scores = copy.deepcopy(model, shapes).eval()(torch.empty(1, 3, side, side, device="meta"))
    except Exception:  # whatever such a model raises
        return
    if not isinstance(scores, Tensor) or scores.shape != (1, num_classes):
        given = "x".join(map(str, scores.shape)) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise UserError(
            f"{name} gives {given} for an image, and a score for each of {num_classes} classes was expected; see "
            "model.kwargs."
        )


def quantizer_table(model: nn.Module) -> dict[str, dict[str, str]]:
    """Layer by layer, the six quantizers and the backward operands (INT4: its switches), as manifests record them."""
    return {
        name: m.table() if isinstance(m, QuantLinear) else m.recipe.table()
        for name, m in model.named_modules()
        if isinstance(m, QuantLinear | Int4Linear)
    }
