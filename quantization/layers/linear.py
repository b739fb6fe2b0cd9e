"""QuantLinear, an nn.Linear whose three products are quantized, and convert_linears, which puts it into a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantization.layers.int4 import Int4Linear, Int4Recipe
from quantization.layers.linear_fn import QuantLinearFunction
from quantization.noise import STREAMS_PER_LAYER, NoiseClock, NoisyLinear
from quantization.quantize import fake_quantize
from quantization.spec import LinearRecipe

# qkv, proj, fc1 and fc2 of every transformer block, as timm names them (paper, section 7.1).
BLOCK_LINEARS = re.compile(r"(^|\.)blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))$")


class QuantLinear(NoisyLinear):
    """A linear layer with quantized products; parameters, their names and their initialisation are nn.Linear's.

    Attributes:
        recipe: the six quantizers.
        noise: the clock of stochastic rounding, shared with the other layers of a converted model.
        layer: the layer's number, which keeps its noise apart from the others'.
        shadow: shadow weight (C x D, float32) that decides q2's rounding (Q-EMA), or None.
    """

    recipe: LinearRecipe

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: LinearRecipe) -> QuantLinear:
        """A quantized layer that takes over the parameters of `linear`; all quantizers off, it equals `linear`."""
        quant = cls._take_over(linear, recipe)
        NoiseClock().to(linear.weight.device).attach(quant)
        return quant

    @classmethod
    def _take_over(cls, linear: nn.Linear, recipe: LinearRecipe) -> QuantLinear:
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"QuantLinear is made from an nn.Linear; got {type(linear).__name__}")
        quant = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        quant.weight, quant.bias = linear.weight, linear.bias
        quant.recipe = recipe
        quant.register_buffer("shadow", None)
        return quant.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., C) for an input of any rank."""
        if not self.recipe.active:
            return F.linear(x, self.weight, self.bias)
        stream = STREAMS_PER_LAYER * self.layer
        differentiable = torch.is_grad_enabled()
        return QuantLinearFunction.apply(
            x, self.weight, self.bias, self.recipe, self.noise.state, stream, self.shadow, differentiable
        )

    def quantized_weight(self) -> Tensor:
        """Q(w): the weight as the output product sees it (C x D, the weight's dtype), rounded by the training's own q2.

        Raises ValueError where q2 is off or stochastic, since then there is no one quantized weight.
        """
        if self.recipe.q2 is None or self.recipe.q2.stochastic:
            raise ValueError("the weight has no quantized value: q2 is off or stochastic in this layer's recipe")
        return fake_quantize(self.weight, self.recipe.q2, shadow=self.shadow)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe}"


def convert_linears(
    model: nn.Module, recipe: LinearRecipe | Int4Recipe, names: Iterable[str] | None = None
) -> list[str]:
    """Replace linear layers of `model` in place by quantized layers that keep their parameters.

    Args:
        recipe: a LinearRecipe makes QuantLinear layers, an Int4Recipe makes Int4Linear layers.
        names: qualified names of the layers; None takes qkv, proj, fc1 and fc2 of every transformer block and leaves
            patch embedding, patch merging, norms and head in full precision.

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
        clock = NoiseClock()
        clock.to(next(iter(linears.values())).weight.device)
        clock.attach(model)
    kind = Int4Linear if isinstance(recipe, Int4Recipe) else QuantLinear
    converted = [name for name in linears if name in wanted]
    for name in converted:
        parent, _, child = name.rpartition(".")
        quant = kind._take_over(linears[name], recipe)
        # The number of a layer is its place among all linear layers, so it does not depend on which are converted.
        quant.layer = list(linears).index(name)
        quant.__dict__["noise"] = clock
        setattr(model.get_submodule(parent), child, quant)
    return converted
