"""QuantLinear: an nn.Linear whose three products are quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantization.backends.reference import quantize
from quantization.backends.scales import largest_of
from quantization.layers.clock import NoiseClock, NoisyLinear
from quantization.layers.linear_fn import Call, QuantLinearFunction
from quantization.noise import STREAMS_PER_LAYER
from quantization.operands import LinearJobs
from quantization.quantize import fake_quantize
from quantization.recipes import as_recipe
from quantization.rotation import Turn, rotate, rotate_back
from quantization.spec import LinearRecipe


class QuantLinear(NoisyLinear):
    """A linear layer with quantized products; parameters, their names and their initialisation are nn.Linear's.

    Attributes:
        recipe: the six quantizers.
        noise: the clock of stochastic rounding, shared with the other layers of a converted model.
        layer: the layer's number, which keeps its noise apart from the others'.
        shadow: shadow weight (C x D, float32) that decides q2's rounding (Q-EMA), or None.
        blocks_below_window: with the fp8 carrier, how many blocks of training passes it could not hold exactly (int64,
            on the device, see operands/forms.py); else None.
        held: with delayed outer scales, the largest magnitudes they hang from, of both quantizers of X, W and G (3, 2,
            0 for none yet), saved with the model; else None. Evaluation takes them as they are. They are the bits of
            float32 numbers, as int32, which no cast of the model rounds and no moving average of it mixes.
        observer: is told what quantizers read, see Call; mostly None.
    """

    observer: Callable[..., None] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: LinearRecipe | str) -> QuantLinear:
        """A quantized layer that takes over the parameters of `linear`; all quantizers off, it equals `linear`.

        recipe: or the name of a preset. Raises TypeError for another module, and for an Int4Recipe.
        """
        recipe = as_recipe(recipe)
        if not isinstance(recipe, LinearRecipe):
            raise TypeError(f"QuantLinear takes a LinearRecipe; for {recipe} use Int4Linear.from_linear")
        quant = cls._take_over(linear, recipe)
        quant.join(NoiseClock.unlike_others().to(linear.weight.device), 0)
        quant.noise.attach(quant)
        return quant

    @classmethod
    def _take_over(cls, linear: nn.Linear, recipe: LinearRecipe) -> QuantLinear:
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"QuantLinear is made from an nn.Linear; got {type(linear).__name__}")
        quant = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        quant.weight, quant.bias = linear.weight, linear.bias
        quant.jobs = LinearJobs(recipe, linear.weight.shape)
        quant.register_buffer("shadow", None)
        counter = None
        if recipe.carrier == "fp8":
            counter = torch.zeros((), dtype=torch.int64, device=linear.weight.device)
        quant.register_buffer("blocks_below_window", counter, persistent=False)
        held = torch.zeros(3, 2, dtype=torch.int32, device=linear.weight.device) if quant.jobs.delayed else None
        quant.register_buffer("held", held)
        return quant.train(linear.training)

    @property
    def recipe(self) -> LinearRecipe:
        return self.jobs.recipe

    def state_fault(self, state: Mapping[str, Any], prefix: str = "") -> str | None:
        """What is wrong, in words, with what a state dict has for `held`, which nothing else shows; None if nothing."""
        held = state.get(f"{prefix}held")
        if self.held is None or not isinstance(held, Tensor):
            return None
        if held.dtype != torch.int32:
            return (
                f"{prefix}held is {str(held.dtype).removeprefix('torch.')}, and int32, the bits of float32, is expected"
            )
        amiss = (held < 0).any() or not held.view(torch.float32).isfinite().all()
        return f"{prefix}held has bits of no finite magnitude" if amiss else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if (fault := self.state_fault(state_dict, prefix)) is not None:
            args[-1].append(fault)  # the errors that load_state_dict raises

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., C) for an input of any rank."""
        if not self.jobs.active:
            return F.linear(x, self.weight, self.bias)
        call = Call(self.jobs, STREAMS_PER_LAYER * self.layer, torch.is_grad_enabled(), self.observer)
        lost = self.blocks_below_window if self.training else None
        held = self.held if self.held is None or self.training else -self.held  # evaluation renews none
        return QuantLinearFunction.apply(x, self.weight, self.bias, call, self.draw_noise(), self.shadow, lost, held)

    @property
    def weight_turn(self) -> Turn | None:
        """The rotation of the weight before q2."""
        return self.jobs.turn("output", self.in_features)

    @property
    def has_quantized_weight(self) -> bool:
        """Whether the weight has one quantized value: q2 is on and nothing of it is drawn anew at each pass."""
        q2, turn = self.recipe.q2, self.weight_turn
        return q2 is not None and not q2.draws and (turn is None or turn.signs != "fresh")

    @property
    def weight_amax(self) -> Tensor | None:
        """The largest magnitude that q2's delayed outer scale hangs from (float32 scalar); None where it has none."""
        if self.held is None or self.recipe.q2 is None or not self.recipe.q2.outer_delay:
            return None
        held = self.held[1, 0].view(torch.float32)
        return torch.where(held > 0, held, largest_of(self.turned_weight()))

    def turned_weight(self) -> Tensor:
        """W as q2 reads it (C x D): itself, or in float32 as the output's rotation makes it."""
        turn = self.weight_turn
        return self.weight.detach() if turn is None else rotate(self.weight.detach(), -1, turn)

    def quantized_turned_weight(self) -> Tensor:
        """What q2 makes of it, rounded by the training's own q2. Raises ValueError as quantized_weight does."""
        if not self.has_quantized_weight:
            raise ValueError("the weight has no quantized value: q2 is off or stochastic in this layer's recipe")
        q2, turn, shadow = self.recipe.q2, self.weight_turn, self.shadow
        if shadow is not None and turn is not None:
            shadow = rotate(shadow, -1, turn)
        amax = self.weight_amax
        if amax is not None:
            return quantize(self.turned_weight(), q2, None, shadow, amax)
        return fake_quantize(self.turned_weight(), q2, shadow=shadow)

    def quantized_weight(self) -> Tensor:
        """Q(w): the weight as the output product sees it (C x D, the weight's dtype), rounded by the training's own q2.

        Under a rotation, in the basis of W. Raises ValueError where q2 is off, stochastic or rotated with fresh signs,
        since then there is no one quantized weight.
        """
        quantized, turn = self.quantized_turned_weight(), self.weight_turn
        return quantized if turn is None else rotate_back(quantized, turn).to(self.weight.dtype)

    def table(self) -> dict[str, str]:
        """The recipe's, and in what groups this layer is rotated; those of grad_weight divide the number of tokens."""
        table = self.recipe.table()
        for product, length in (("output", self.in_features), ("grad_input", self.out_features)):
            if self.recipe.rotation(product) is not None:
                turn = self.jobs.turn(product, length)
                table[f"rotate_{product}"] += f" in groups of {1 if turn is None else turn.size}"
        return table

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe}"


def blocks_below_window(model: nn.Module) -> Tensor | None:
    """The sum of the layers' `blocks_below_window` (int64, on the device); None where no layer counts."""
    counters = [m.blocks_below_window for m in model.modules() if isinstance(m, QuantLinear)]
    counters = [counter for counter in counters if counter is not None]
    return torch.stack(counters).sum() if counters else None


def held_magnitudes(model: nn.Module) -> list[Tensor]:
    """The layers' `held`, of those that have delayed outer scales."""
    return [m.held for m in model.modules() if isinstance(m, QuantLinear) and m.held is not None]
