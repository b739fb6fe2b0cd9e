"""The quantized linear layer: three matrix products, six quantizers. Read it beside section 3.3 of the paper.

X_ND activation, W_CD stored weight, G_NC output gradient dL/dY; N tokens, D inputs, C outputs.

    output       Y_NC = q1(X) q2(W)^T + b            equation 3
    grad_input   dX_ND = q3(G) q4(W')                equation 4 (requantized) or 6 (original)
    grad_weight  dW_CD = q5(G)^T q6(X')              equation 5 (requantized) or 7 (original)
    grad_bias    db_C = sum of G over N, not quantized

W' and X' are q2's and q1's outputs under `requantized` and W and X themselves under `original`. A quantizer that is
off is the identity. Each of X, W and G is read once and quantized for the two products it enters: so q4 and q6 run in
the forward pass already, and the backward pass needs no more of W and X than their small results.

Products run in the compute dtype (autocast's, else X's), in which every quantized value is exact, or are carried by
fp8 (operands.py). Quantizers read X, W and G as they come: q2 the float32 master weight, not a bfloat16 cast of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from quantization.noise import Noise
from quantization.operands.matrices import E4M3, E5M2, Operand, forms_for, multiply, prepare
from quantization.spec import QUANTIZERS, LinearRecipe

ROWS, COLUMNS = 0, -1  # the dimension of a stored matrix that a product sums over
STREAMS = {name: number for number, name in enumerate(QUANTIZERS)}  # of noise, within those of a layer


def quantize_for_products(
    x: Tensor,
    names: tuple[str, str],
    wanted: tuple[bool, bool],
    recipe: LinearRecipe,
    forms: dict[str, str],
    dtype: torch.dtype,
    fp8: torch.dtype,
    noise: Noise,
    *,
    chained: bool = False,
    sums: bool = False,
    shadow: Tensor | None = None,
) -> tuple[Operand | None, Operand | None, Tensor | None]:
    """A matrix as the two quantizers `names` hand it on, and its sum over rows; None for what is not wanted."""
    along_rows, along_columns = names
    first, second, total = prepare(
        x,
        getattr(recipe, along_rows) if wanted[0] else None,
        getattr(recipe, along_columns) if wanted[1] else None,
        (forms[along_rows], forms[along_columns]),
        dtype,
        fp8,
        chained=chained,
        sums=sums,
        noise=noise,
        streams=(STREAMS[along_rows], STREAMS[along_columns]),
        shadow=shadow,
    )
    if wanted[0] and first is None:
        first = Operand((x.to(dtype),), None, x.shape[1])
    if wanted[1] and second is None:
        second = first if chained else Operand((x.to(dtype),), None, x.shape[1])
    return first, second, total


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
        differentiable: bool = True,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        noise, chained = Noise(noise_state, stream), recipe.backward_operands == "requantized"
        X_ND = x.reshape(-1, x.shape[-1])
        forms = forms_for(recipe, weight, x)
        for_input, for_weight, *_ = ctx.needs_input_grad if differentiable else (False, False)

        x1, x6, _ = quantize_for_products(
            X_ND, ("q1", "q6"), (True, for_weight), recipe, forms, dtype, E4M3, noise, chained=chained
        )
        w2, w4, _ = quantize_for_products(
            weight, ("q2", "q4"), (True, for_input), recipe, forms, dtype, E4M3, noise, chained=chained, shadow=shadow
        )
        bias_N = None if bias is None else bias.to(dtype)
        output = multiply(x1, w2, (COLUMNS, COLUMNS), dtype, dtype, bias_N)

        kept = [operand for operand in (x6, w4) if operand is not None]
        ctx.save_for_backward(noise_state, *(tensor for operand in kept for tensor in operand.tensors))
        ctx.kept = [(len(operand.tensors), operand.spec, operand.columns) for operand in kept]
        ctx.recipe, ctx.forms, ctx.stream, ctx.compute_dtype = recipe, forms, stream, dtype
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        noise_state, *saved = ctx.saved_tensors
        kept = []
        for count, spec, columns in ctx.kept:
            kept.append(Operand(tuple(saved[:count]), spec, columns))
            saved = saved[count:]
        for_input, for_weight, for_bias = ctx.needs_input_grad[:3]
        dtype, noise = ctx.compute_dtype, Noise(noise_state, ctx.stream)
        G_NC = grad_output.reshape(-1, grad_output.shape[-1])

        g3, g5, grad_bias = quantize_for_products(
            G_NC, ("q3", "q5"), (for_input, for_weight), ctx.recipe, ctx.forms, dtype, E5M2, noise, sums=for_bias
        )
        grad_input = grad_weight = None
        if for_input:
            grad_input = multiply(g3, kept[-1], (COLUMNS, ROWS), dtype, ctx.x_dtype)
            grad_input = grad_input.reshape(ctx.x_shape)
        if for_weight:
            grad_weight = multiply(g5, kept[0], (ROWS, ROWS), dtype, ctx.weight_dtype)
        if for_bias:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None
