"""The quantized linear layer: three matrix products, six quantizers. Read it beside section 3.3 of the paper.

X_ND activation, W_CD stored weight, G_NC output gradient dL/dY; N tokens, D inputs, C outputs.

    output       Y_NC = q1(X) q2(W)^T + b            equation 3
    grad_input   dX_ND = q3(G) q4(W')                equation 4 (requantized) or 6 (original)
    grad_weight  dW_CD = q5(G)^T q6(X')              equation 5 (requantized) or 7 (original)
    grad_bias    db_C = sum of G over N, not quantized

W' and X' are q2's and q1's outputs under `requantized` and W and X themselves under `original`. A quantizer that is
off is the identity.

Where a product is rotated, both of its operands are multiplied by the same T before they are quantized (rotation.py).
What q1 and q2 make stays rotated by the output's T, and so do requantized backward operands: gradients that come of
them are multiplied by T^T at last.

Each of X, W and G is read once and quantized for the two products it enters: so q4 and q6 run in the forward pass
already, and the backward pass needs no more of W and X than their small results.

Products run in the compute dtype (autocast's, else X's), in which every quantized value is exact, or are carried by
fp8 (operands/). Quantizers read X, W and G as they come: q2 the float32 master weight, not a bfloat16 cast of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from quantization.job import Operand, Shell, tensors_of
from quantization.noise import Noise
from quantization.operands import COLUMNS, ROWS, G, LinearJobs, W, X, multiply, prepare, turned_back
from quantization.rotation import Turn


class Call(NamedTuple):
    """What a call of a layer has beside its tensors.

    stream: the first of the layer's streams of noise. differentiable: whether a backward pass may follow. observer: is
    told what quantizers read before they do: role, matrix, job, noise, shadow and held.
    """

    jobs: LinearJobs
    stream: int
    differentiable: bool = True
    observer: Callable[..., None] | None = None


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
        held: Tensor | None = None,
    ) -> Tensor:
        """x (..., D), weight (C, D), bias (C,); lost, and held (3, 2) for X, W and G: see operands/prepare.py."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        jobs, noise = call.jobs, Noise(noise_state, call.stream)
        X_ND = x.reshape(-1, x.shape[-1])
        for_input, for_weight, *_ = ctx.needs_input_grad if call.differentiable else (False, False)

        of_x, of_w, ctx.held = (None, None, None) if held is None else held.unbind()
        x_job, w_job = jobs.of(X, X_ND, dtype, column=for_weight), jobs.of(W, X_ND, dtype, column=for_input)
        if call.observer is not None:
            call.observer(X, X_ND, x_job, noise, None, of_x)
            call.observer(W, weight, w_job, noise, shadow, of_w)
        x1, x6, _, x_inside = prepare(X_ND, x_job, noise, None, lost, of_x)
        w2, w4, _, w_inside = prepare(weight, w_job, noise, shadow, lost, of_w)
        bias_C = None if bias is None else bias.to(dtype)
        output = multiply(x1, w2, (COLUMNS, COLUMNS), dtype, dtype, bias_C)

        kept = [operand for operand in (x6, w4) if operand is not None]
        inside = (x_inside if for_input else None, w_inside if for_weight else None)
        ctx.save_for_backward(noise_state, *inside, *(t for operand in kept for t in tensors_of(operand)))
        ctx.kept = [Shell.of(operand) for operand in kept]
        ctx.call, ctx.lost, ctx.compute_dtype = call, lost, dtype
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        noise_state, x_inside, w_inside, *saved = ctx.saved_tensors
        kept: list[Operand] = []
        for shell in ctx.kept:
            kept.append(shell.around(saved))
            saved = saved[shell.count :]
        for_input, for_weight, for_bias = ctx.needs_input_grad[:3]
        dtype, noise = ctx.compute_dtype, Noise(noise_state, ctx.call.stream)
        G_NC = grad_output.reshape(-1, grad_output.shape[-1])

        jobs = ctx.call.jobs
        job = jobs.of(G, G_NC, dtype, row=for_input, column=for_weight, sums=for_bias)
        if ctx.call.observer is not None:
            ctx.call.observer(G, G_NC, job, noise, None, ctx.held)
        g3, g5, grad_bias, _ = prepare(G_NC, job, noise, None, ctx.lost, ctx.held)
        turn = jobs.turn("output", ctx.x_shape[-1])
        chained = jobs.recipe.chained_weight, jobs.recipe.chained_activation
        of_input, of_weight = (turn if on else None for on in chained)
        grad_input = grad_weight = None
        if for_input:
            grad_input = multiply(g3, kept[-1], (COLUMNS, ROWS), dtype, ctx.x_dtype)
            grad_input = _in_own_basis(grad_input, x_inside, of_input, noise).reshape(ctx.x_shape)
        if for_weight:
            grad_weight = multiply(g5, kept[0], (ROWS, ROWS), dtype, ctx.weight_dtype)
            grad_weight = _in_own_basis(grad_weight, w_inside, of_weight, noise)
        if for_bias:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


def _in_own_basis(gradient: Tensor, inside: Tensor | None, turn: Turn | None, noise: Noise) -> Tensor:
    """The gradient of X or W from that of what q1 or q2 made of it: 0 where not inside, and rotated back."""
    if inside is not None:
        gradient = gradient * inside  # where a selection would swallow a NaN
    return gradient if turn is None else turned_back(gradient, turn, noise)
