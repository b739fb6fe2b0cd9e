"""The `mxfp4_` twin of every model of the zoo in timm's registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import nn

from config import UserError
from models.packed import load_packed
from models.zoo import PREFIX, ZOO, ZooModel
from quantization import LinearRecipe, convert_linears
from record.packed import read_info
from timm_patches import Patch


def entrypoint(model: ZooModel) -> Callable[..., nn.Module]:
    """The function that timm's registry calls for the `mxfp4_` twin of a model."""

    def create(
        pretrained: bool = False,
        recipe: LinearRecipe | str = "tetrajet",
        packed: str | Path | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        if packed is not None:
            return _of_file(model, packed, kwargs)
        net = timm.models.model_entrypoint(model.timm_name)(pretrained=pretrained, **kwargs)
        convert_linears(net, recipe)
        return net

    create.__name__ = create.__qualname__ = PREFIX + model.timm_name
    create.__doc__ = (
        f"{model.timm_name} with its block linears in MXFP4 (`recipe`: one, or a preset's name; `packed`: a file of "
    )
    create.__doc__ += "main.py --export, from which the model comes whole, arguments and quantizers included)."
    return create


def _of_file(model: ZooModel, path: str | Path, kwargs: dict[str, Any]) -> nn.Module:
    """The model of a packed checkpoint. UserError where it is another one, or other arguments are given beside it."""
    info = read_info(path)
    if (name := info.model.name.removeprefix(PREFIX)) != model.timm_name:
        raise UserError(f"{path} holds {name}, and {PREFIX}{model.timm_name} was asked for.")
    own = {**info.model.model_dump(), **info.model.kwargs}
    for argument, value in kwargs.items():
        if value is not None and own.get(argument, value) != value:
            raise UserError(
                f"{path} was made with {argument} {own[argument]}, and {value} was asked for; leave it out."
            )
    return load_packed(path)


def _register() -> None:
    for model in ZOO:
        if not timm.is_model(PREFIX + model.timm_name):
            create = entrypoint(model)
            create.__module__ = __name__
            timm.models.register_model(create)


def _registered() -> bool:
    return {PREFIX + model.timm_name for model in ZOO} <= set(timm.list_models(f"{PREFIX}*"))


REGISTRATION = Patch(
    name="mxfp4_models",
    what="Registers mxfp4_<name> for every model of models.zoo.ZOO in timm's model registry.",
    why="timm.create_model and timm.list_models then know the quantized models.",
    timm_versions="==1.0.*",
    verified_by="timm.list_models('mxfp4_*') names them all.",
    apply=_register,
    verify=_registered,
)
