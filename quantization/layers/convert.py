"""convert_linears: quantized layers take the place of a model's linears."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from quantization.layers.clock import NoiseClock
from quantization.layers.int4 import Int4Linear
from quantization.layers.linear import QuantLinear
from quantization.spec import Int4Recipe, LinearRecipe

# qkv, proj, fc1 and fc2 of every transformer block, as timm names them (paper, section 7.1).
BLOCK_LINEARS = re.compile(r"(^|\.)blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))$")


def convert_linears(
    model: nn.Module,
    recipe: LinearRecipe | Int4Recipe,
    names: Iterable[str] | None = None,
    *,
    seed: int | None = None,
) -> list[str]:
    """Replace linear layers of `model` in place by quantized layers that keep their parameters.

    Args:
        recipe: a LinearRecipe makes QuantLinear layers, an Int4Recipe makes Int4Linear layers.
        names: qualified names of the layers; None takes qkv, proj, fc1 and fc2 of every transformer block and leaves
            patch embedding, patch merging, norms and head in full precision.
        seed: of the noise of stochastic rounding, from 0 to 2^32 - 1; None draws one from torch's default generator, so
            that no two models, or parts of one converted in two calls, share their noise.

    Returns the names of the converted layers in the model's order.
    Raises ValueError where there is nothing to convert or a name is not that of a linear layer in the model.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if names is None:
        wanted = {name for name in linears if BLOCK_LINEARS.search(name)}
        if not wanted:
            raise ValueError(
                f"{type(model).__name__} has no transformer blocks with qkv, proj, fc1 and fc2; pass the names of the "
                "linear layers to convert"
            )
    else:
        wanted = set(names)
    for name in sorted(wanted - linears.keys()):
        near = difflib.get_close_matches(name, linears, n=1)
        raise ValueError(
            f"{name} is not a linear layer of {type(model).__name__}" + (f"; did you mean {near[0]}?" if near else "")
        )
    if "" in wanted:
        raise ValueError("the model is itself a linear layer; use QuantLinear.from_linear")

    clock = getattr(model, "noise", None)
    if not isinstance(clock, NoiseClock):
        clock = NoiseClock.unlike_others() if seed is None else NoiseClock(seed)
        clock.to(next(iter(linears.values())).weight.device)
        clock.attach(model)
    kind = Int4Linear if isinstance(recipe, Int4Recipe) else QuantLinear
    converted = [name for name in linears if name in wanted]
    for name in converted:
        parent, _, child = name.rpartition(".")
        quant = kind._take_over(linears[name], recipe)
        # The number of a layer is its place among all linear layers, so it does not depend on which are converted.
        quant.join(clock, list(linears).index(name))
        setattr(model.get_submodule(parent), child, quant)
    return converted
