"""The quantized linear layer: three matrix products, six quantizers. Read it beside section 3.3 of the paper.

X_ND activation, W_CD stored weight, G_NC output gradient dL/dY; N tokens, D inputs, C outputs.

    output       Y_NC = q1(X) q2(W)^T + b            equation 3
    grad_input   dX_ND = q3(G) q4(W')                equation 4 (requantized) or 6 (original)
    grad_weight  dW_CD = q5(G)^T q6(X')              equation 5 (requantized) or 7 (original)
    grad_bias    db_C = sum of G over N, not quantized

W' and X' are q2's and q1's outputs under `requantized` and W and X themselves under `original`. A quantizer that is
off is the identity. Each product runs in the compute dtype (autocast's, else X's), in which every quantized value is
exact; quantizers read X, W and G as they come, so q2 reads the float32 master weight and not a bfloat16 cast of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from quantization.noise import Noise
from quantization.quantize import fake_quantize
from quantization.spec import QUANTIZERS, LinearRecipe


def _quantizer(recipe: LinearRecipe, name: str, x: Tensor, noise: Noise, shadow: Tensor | None = None) -> Tensor:
    """Apply quantizer `name` (q1 ... q6), or nothing where it is off. Each has a stream of noise of its own."""
    spec = getattr(recipe, name)
    if spec is None:
        return x
    return fake_quantize(x, spec, seed=Noise(noise.state, noise.stream + QUANTIZERS.index(name)), shadow=shadow)


class QuantLinearFunction(torch.autograd.Function):
    """Y = X W^T + b with quantized operands in all three products."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        recipe: LinearRecipe,
        noise_state: Tensor,
        stream: int,
        shadow: Tensor | None,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        noise = Noise(noise_state, stream)
        X_ND = x.reshape(-1, x.shape[-1])
        x1 = _quantizer(recipe, "q1", X_ND, noise).to(dtype)
        w2 = _quantizer(recipe, "q2", weight, noise, shadow).to(dtype)
        output = F.linear(x1, w2, None if bias is None else bias.to(dtype))

        double = recipe.backward_operands == "requantized"
        # A quantizer that is off hands its operand on as it came, and not in the compute dtype.
        x_saved = x1 if double and (recipe.q1 or not recipe.q6) else X_ND
        w_saved = w2 if double and (recipe.q2 or not recipe.q4) else weight
        ctx.save_for_backward(x_saved, w_saved, noise_state)
        ctx.recipe, ctx.stream, ctx.compute_dtype = recipe, stream, dtype
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output.reshape(*x.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        X_ND, W_CD, noise_state = ctx.saved_tensors
        recipe, noise, dtype = ctx.recipe, Noise(noise_state, ctx.stream), ctx.compute_dtype
        G_NC = grad_output.reshape(-1, grad_output.shape[-1])

        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            g3 = _quantizer(recipe, "q3", G_NC, noise).to(dtype)
            w4 = _quantizer(recipe, "q4", W_CD, noise).to(dtype)
            grad_input = (g3 @ w4).to(ctx.x_dtype).reshape(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            g5 = _quantizer(recipe, "q5", G_NC, noise).to(dtype)
            x6 = _quantizer(recipe, "q6", X_ND, noise).to(dtype)
            grad_weight = (g5.t() @ x6).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = G_NC.sum(0, dtype=ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None, None, None
