"""INT4 training of a linear layer, one scale a tensor: Xi et al. 2023, Training Transformers with 4-bit Integers.

The per-tensor baseline of Table 2; another algorithm than microscaling, so another layer. X_ND activation, W_CD stored
weight, G_NC output gradient dL/dY; H the block-diagonal normalised Hadamard matrix, blocks of 32, H = H^T = H^-1; a
last partial block of D is padded with zeros.

    basis        X' = X H, W' = W H                             spreads outliers over a block; X' W'^T = X W^T
    q(v; s)      = s clamp(round(v / s), -8, 7)                 LSQ: one learned step s a tensor; ties to even
    output       Y = q(X'; s_X) q(W'; s_W)^T + b
    split        G ~ (14 high + low) max|G| / 98                with G0 = G 98 / max|G|
                 high = clamp(round(G0 / 14), -6, 6), low = stochastic round of G0 - 14 high
    sampling     of the 2N rows 14 high, low, each is kept with probability p and divided by it, else dropped
    grad_input   dX' = [inside] G~ q(W'),   dX = dX' H          p ~ ||g_i||
    grad_weight  dW' = [inside] G~^T q(X'), dW = dW' H          p ~ ||g_i|| ||x_i||
    grad_step    ds = sum of dL/dq (q / s - [inside] v / s) / sqrt(7 numel); inside: -8 < v / s < 7
    grad_bias    db_C = sum of G over N, not quantized

The low part of an element with |G0| > 91 reaches 14, since high stops at 6: a fifth bit, where clamping would bias
the largest gradients. The two rows that come from one row of G meet the same row of X and give the same row of dX, so
they are added before the product: G~ = 14 high m / p + low m' / p' has N rows.

Operands enter the products as integers, exact in the compute dtype (autocast's, else X's); steps and max|G| / 98
follow afterwards in float32, as all else. Sampled rows are no integers: bfloat16 rounds them like any operand.
Dropped rows are rows of zeros: shapes are static and nothing syncs. NaN and Inf stay visible: one in X or W makes the
quantized element (under H, its block) NaN, one in G makes every gradient but the bias's not finite.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.parallel import DistributedDataParallel

from quantization.backends.choose import backend_of_int4
from quantization.constants import constant
from quantization.layers.clock import NoiseClock, NoisyLinear
from quantization.noise import STREAMS_PER_LAYER, Noise
from quantization.recipes import as_recipe
from quantization.rotation import hadamard
from quantization.spec import Int4Recipe

LEVEL_MIN, LEVEL_MAX = -8, 7
BASE, RANGE, HIGH_MAX = 14, 98, 6  # of the split
MIN_STEP = 1e-8  # where training drives a step to zero or below, or a tensor is all zeros
LOW, ROWS_OF_GRAD_INPUT, ROWS_OF_GRAD_WEIGHT = range(3)  # streams of noise of a layer


def basis(x: Tensor, recipe: Int4Recipe) -> Tensor:
    """x in the basis that is quantized, or back from it; float32."""
    return hadamard(x) if recipe.hadamard else x.to(torch.float32)


def default_step(total: Tensor | float, count: int | float) -> Tensor | float:
    """LSQ's initial step 2 mean|x| / sqrt(7) (Esser et al. 2020) from the sum and the number of magnitudes."""
    return total / max(count, 1) * (2 / math.sqrt(LEVEL_MAX))


def divide(x: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor]:
    """v = x / s and s: the step, or LSQ's initial one for None; at least MIN_STEP, past which its gradient goes on."""
    step = default_step(x.abs().sum(), x.numel()) if step is None else step.detach().float()
    step = step.clamp(min=MIN_STEP)
    return x / step, step


def quantize(v: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The levels q(v) / s: integers from -8 to 7; NaN where v is not finite."""
    return backend_of_int4(v).levels(v, LEVEL_MIN, LEVEL_MAX, dtype)


def quantize_backward(product: Tensor, scale: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the step (scalar) from that of q(x), product scale, straight through the rounding."""
    grad, of_step = backend_of_int4(product).straight_through(product, scale, v, LEVEL_MIN, LEVEL_MAX)
    return grad, of_step.sum() / math.sqrt(LEVEL_MAX * max(v.numel(), 1))


def split_gradient(G_NC: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
    """(high, low, unit) with G ~ (14 high + low) unit: integers (N x C, float32) and max|G| / 98 (scalar)."""
    if not len(G_NC):
        G_NC = G_NC.to(torch.float32)
        return G_NC, G_NC, G_NC.sum()
    # A GPU takes a tensor over a number for a product with the reciprocal.
    unit = G_NC.abs().amax().to(torch.float32) / constant((RANGE,), G_NC.device)[0]
    unit = unit.clamp(min=torch.finfo(torch.float32).tiny)  # a zero gradient stays zero
    return *backend_of_int4(G_NC).split(G_NC, unit, BASE, HIGH_MAX, noise), unit


def sample_rows(
    high: Tensor, low: Tensor, x_norm: Tensor | float, noise: Noise, dtype: torch.dtype = torch.float32
) -> Tensor:
    """G~ in units of `unit` (N x C): each row of 14 high and of low kept with p ~ its norm times x_norm."""
    score = torch.stack([BASE * high.norm(dim=1), low.norm(dim=1)]) * x_norm
    backend = backend_of_int4(high)
    return backend.weighted_rows(high, low, backend.row_weights(score, len(high), noise), BASE, dtype)


class Int4LinearFunction(torch.autograd.Function):
    """Y = X W^T + b with the three products above. A step that is None is LSQ's initial step of its tensor."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        step_x: Tensor | None,
        step_w: Tensor | None,
        recipe: Int4Recipe,
        noise_state: Tensor,
        stream: int,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x_v, step_x = divide(basis(x.reshape(-1, x.shape[-1]), recipe), step_x)
        w_v, step_w = divide(basis(weight, recipe), step_w)
        output = F.linear(quantize(x_v, dtype), quantize(w_v, dtype)).float() * (step_x * step_w)
        output = output if bias is None else output + bias

        ctx.save_for_backward(x_v, w_v, step_x, step_w, noise_state)
        ctx.recipe, ctx.stream, ctx.compute_dtype = recipe, stream, dtype
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output.to(dtype).reshape(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x_v, w_v, step_x, step_w, noise_state = ctx.saved_tensors
        recipe, dtype, needs, D = ctx.recipe, ctx.compute_dtype, ctx.needs_input_grad, ctx.x_shape[-1]
        G_NC = grad_output.reshape(-1, grad_output.shape[-1])
        high, low, unit = split_gradient(G_NC, Noise(noise_state, ctx.stream + LOW))

        def sampled(x_norm: Tensor | float, use: int) -> Tensor:
            if not recipe.sampling or not len(G_NC):
                return (BASE * high + low).to(dtype)
            return sample_rows(high, low, x_norm, Noise(noise_state, ctx.stream + use), dtype)

        grad_input = grad_weight = grad_bias = grad_step_x = grad_step_w = None
        if needs[0] or needs[3]:
            product = sampled(1.0, ROWS_OF_GRAD_INPUT) @ quantize(w_v, dtype)
            grad, grad_step_x = quantize_backward(product, unit * step_w, x_v)
            grad_input = basis(grad, recipe)[:, :D].to(ctx.x_dtype).reshape(ctx.x_shape)
        if needs[1] or needs[4]:
            x_levels = quantize(x_v, dtype)
            x_norm = torch.linalg.vector_norm(x_levels, dim=1, dtype=torch.float32)
            product = sampled(x_norm, ROWS_OF_GRAD_WEIGHT).t() @ x_levels
            grad, grad_step_w = quantize_backward(product, unit * step_x, w_v)
            grad_weight = basis(grad, recipe)[:, :D].to(ctx.weight_dtype)
        if needs[2]:
            grad_bias = G_NC.sum(0, dtype=ctx.bias_dtype)
        # A step that is no parameter has no gradient.
        grad_step_x, grad_step_w = grad_step_x if needs[3] else None, grad_step_w if needs[4] else None
        return grad_input, grad_weight, grad_bias, grad_step_x, grad_step_w, None, None, None


class Int4Linear(NoisyLinear):
    """A linear layer whose three products are INT4. Weight and bias, their names and initialisation are nn.Linear's.

    With learned steps there are the parameters `step_x` and `step_w` (float32 scalars) too. step_w starts from the
    weights at conversion, step_x from the first training batch: under DistributedDataParallel, where all processes meet
    in a forward pass, from the batches of all of them, else from the process's own. Until then step_x is 1, the buffer
    `step_x_known` False, and evaluation takes the initial step of its own input. A state dict that has a weight without
    its steps, as one of a layer in full precision, starts both anew.

    `noise` is the clock and `layer` the layer's number in it, as for QuantLinear.
    """

    recipe: Int4Recipe

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Int4Recipe | str) -> Int4Linear:
        """A quantized layer that takes over the parameters of `linear`.

        recipe: or the name of the preset, int4. Raises TypeError for another module, and for a LinearRecipe.
        """
        recipe = as_recipe(recipe)
        if not isinstance(recipe, Int4Recipe):
            raise TypeError(f"Int4Linear takes an Int4Recipe; for {recipe} use QuantLinear.from_linear")
        quant = cls._take_over(linear, recipe)
        quant.join(NoiseClock.unlike_others().to(linear.weight.device), 0)
        quant.noise.attach(quant)
        return quant

    @classmethod
    def _take_over(cls, linear: nn.Linear, recipe: Int4Recipe) -> Int4Linear:
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"Int4Linear is made from an nn.Linear; got {type(linear).__name__}")
        quant = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        quant.weight, quant.bias, quant.recipe = linear.weight, linear.bias, recipe
        quant.step_x = quant.step_w = None
        quant._step_x_known = False  # on the host, so that asking does not wait for the device
        if recipe.learned_step:
            step = quant._first_step_w()
            quant.step_x, quant.step_w = nn.Parameter(torch.ones_like(step)), nn.Parameter(step)
            quant.register_buffer("step_x_known", torch.zeros_like(step, dtype=torch.bool))
        return quant.train(linear.training)

    def _first_step_w(self) -> Tensor:
        _, step = divide(basis(self.weight.detach(), self.recipe), None)
        return step

    @torch.compiler.disable  # the layer runs as it is, in between what torch.compile makes of the rest
    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., C) for an input of any rank."""
        if self.recipe.learned_step and not self._step_x_known:
            self._step_x_known = bool(self.step_x_known)  # a checkpoint or a moving average may have brought it
            if self.training and not self._step_x_known:
                self._start_step_x(x)
        step_x = self.step_x if self._step_x_known else None
        stream = STREAMS_PER_LAYER * self.layer
        return Int4LinearFunction.apply(
            x, self.weight, self.bias, step_x, self.step_w, self.recipe, self.draw_noise(), stream
        )

    @torch.no_grad()
    def _start_step_x(self, x: Tensor) -> None:
        """Set step_x from the finite values there are; where all are 0, leave that to a later pass. Synchronises."""
        magnitudes = basis(x, self.recipe).abs()
        total = torch.where(torch.isfinite(magnitudes), magnitudes, 0.0).sum()
        sums = torch.stack([total, torch.full_like(total, magnitudes.numel())])
        # Anywhere else some processes may be alone in their forward pass and would wait for the others for ever.
        parallel = DistributedDataParallel._get_active_ddp_module()
        if parallel is not None:
            torch.distributed.all_reduce(sums, group=parallel.process_group)
        total, count = sums.tolist()
        if 0 < total < math.inf:
            self.step_x.fill_(default_step(total, count))
            self.step_x_known.fill_(True)
            self._step_x_known = True

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)
        self._step_x_known = False  # to be looked up again
        if self.recipe.learned_step and f"{prefix}weight" in state_dict and f"{prefix}step_w" not in state_dict:
            own = {f"{prefix}{name}" for name in ("step_x", "step_w", "step_x_known")}
            missing[:] = [name for name in missing if name not in own]
            with torch.no_grad():  # what the steps were made for has gone
                self.step_w.copy_(self._first_step_w())
                self.step_x.fill_(1.0)
                self.step_x_known.fill_(False)

    @torch.no_grad()
    def quantized_weight(self) -> Tensor:
        """Q(w) = q(W H) H^T (C x D, the weight's dtype): the weight as the output product sees it, in W's own basis.

        X' q(W')^T = X Q(w)^T for every X. The levels are those of W', so with `hadamard` Q(w) lies on no grid.
        """
        v, step = divide(basis(self.weight, self.recipe), self.step_w)
        return basis(quantize(v) * step, self.recipe)[:, : self.in_features].to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe}"
