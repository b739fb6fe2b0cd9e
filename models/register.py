"""The `mxfp4_` twin of every model of the zoo in timm's registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
from torch import nn

from models.zoo import PREFIX, ZOO, ZooModel
from quantization import LinearRecipe, convert_linears
from timm_patches import Patch


def entrypoint(model: ZooModel) -> Callable[..., nn.Module]:
    """The function that timm's registry calls for the `mxfp4_` twin of a model."""

    def create(pretrained: bool = False, recipe: LinearRecipe | str = "tetrajet", **kwargs: Any) -> nn.Module:
        net = timm.models.model_entrypoint(model.timm_name)(pretrained=pretrained, **kwargs)
        convert_linears(net, recipe)
        return net

    create.__name__ = create.__qualname__ = PREFIX + model.timm_name
    create.__doc__ = f"{model.timm_name} with its block linears in MXFP4 (`recipe`: one, or a preset's name)."
    return create


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
