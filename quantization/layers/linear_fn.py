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
fp8 (operands/). Quantizers read X, W and G as they come: q2 the float32 master weight, not a bfloat16 cast of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from quantization.job import Operand, Shell, tensors_of
from quantization.noise import Noise
from quantization.operands import COLUMNS, ROWS, G, LinearJobs, W, X, multiply, prepare


class Call(NamedTuple):
    """What a call of a layer has beside its tensors.

    stream: the first of the layer's streams of noise. differentiable: whether a backward pass may follow.
    """

    jobs: LinearJobs
    stream: int
    differentiable: bool = True


class QuantLinearFunction(torch.autograd.Function):
    """Y = X W^T + b with quantized operands in all three products."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
        noise_state: Tensor,
        shadow: Tensor | None = None,
        lost: Tensor | None = None,
    ) -> Tensor:
        """x (..., D), weight (C, D), bias (C,); lost: see operands/prepare.py."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        jobs, noise = call.jobs, Noise(noise_state, call.stream)
        X_ND = x.reshape(-1, x.shape[-1])
        for_input, for_weight, *_ = ctx.needs_input_grad if call.differentiable else (False, False)

        x1, x6, _ = prepare(X_ND, jobs.of(X, X_ND, dtype, column=for_weight), noise, lost=lost)
        w2, w4, _ = prepare(weight, jobs.of(W, X_ND, dtype, column=for_input), noise, shadow, lost)
        bias_C = None if bias is None else bias.to(dtype)
        output = multiply(x1, w2, (COLUMNS, COLUMNS), dtype, dtype, bias_C)

        kept = [operand for operand in (x6, w4) if operand is not None]
        ctx.save_for_backward(noise_state, *(tensor for operand in kept for tensor in tensors_of(operand)))
        ctx.kept = [Shell.of(operand) for operand in kept]
        ctx.call, ctx.lost, ctx.compute_dtype = call, lost, dtype
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        noise_state, *saved = ctx.saved_tensors
        kept: list[Operand] = []
        for shell in ctx.kept:
            kept.append(shell.around(saved))
            saved = saved[shell.count :]
        for_input, for_weight, for_bias = ctx.needs_input_grad[:3]
        dtype, noise = ctx.compute_dtype, Noise(noise_state, ctx.call.stream)
        G_NC = grad_output.reshape(-1, grad_output.shape[-1])

        job = ctx.call.jobs.of(G, G_NC, dtype, row=for_input, column=for_weight, sums=for_bias)
        g3, g5, grad_bias = prepare(G_NC, job, noise, lost=ctx.lost)
        grad_input = grad_weight = None
        if for_input:
            grad_input = multiply(g3, kept[-1], (COLUMNS, ROWS), dtype, ctx.x_dtype)
            grad_input = grad_input.reshape(ctx.x_shape)
        if for_weight:
            grad_weight = multiply(g5, kept[0], (ROWS, ROWS), dtype, ctx.weight_dtype)
        if for_bias:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None, None, None
