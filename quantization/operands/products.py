"""The products of a linear layer, of operands in any form."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from quantization.job import Carried, Dense, Operand, Scaled
from quantization.operands.prepare import values_of

ROWS, COLUMNS = 0, -1  # the dimension of a stored matrix that a product sums over


def multiply(
    a: Operand,
    b: Operand,
    over: tuple[int, int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """The product of two matrices, summed over dimension over[0] of a and over[1] of b (ROWS or COLUMNS), plus a bias.

    In fp8 if both are CARRIED, else in the compute dtype `dtype`. Factors of SCALED operands multiply the float32
    sums, before the bias.
    """
    if isinstance(a, Carried):
        (a_MK, a_factor), (b_NK, b_factor) = a, b
        if a_MK.is_cuda:
            within = None if out_dtype == torch.float32 else bias  # cuBLAS adds none to a float32 product
            product = torch._scaled_mm(a_MK, b_NK.t(), a_factor, b_factor, bias=within, out_dtype=out_dtype)
            return product if bias is None or within is not None else product + bias
        with torch.autocast(a_MK.device.type, enabled=False):
            product = (a_MK.float() @ b_NK.float().t()) * (a_factor * b_factor)
        return (product if bias is None else product + bias.float()).to(out_dtype)
    scaled = [operand for operand in (a, b) if isinstance(operand, Scaled)]
    if scaled:
        a, b = (Dense(operand.values) if isinstance(operand, Scaled) else operand for operand in (a, b))
        with torch.autocast(scaled[0].values.device.type, enabled=False):
            return _times_factors(a, b, over, (dtype, out_dtype), scaled, bias)
    a_MK, b_NK = values_of(a, dtype), values_of(b, dtype)
    a_MK, b_NK = a_MK if over[0] == COLUMNS else a_MK.t(), b_NK if over[1] == COLUMNS else b_NK.t()
    if bias is not None:
        return F.linear(a_MK, b_NK, bias).to(out_dtype)
    if a_MK.is_cuda and out_dtype == torch.float32 != dtype:  # without a rounding to the compute dtype in between
        return torch.mm(a_MK, b_NK.t(), out_dtype=out_dtype)
    return (a_MK @ b_NK.t()).to(out_dtype)


def _times_factors(
    a: Operand,
    b: Operand,
    over: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    scaled: list[Scaled],
    bias: Tensor | None,
) -> Tensor:
    """The product of what is left of scaled operands, times their factors: within it where they are known."""
    dtype, out_dtype = dtypes
    known = [operand.known for operand in scaled]
    if out_dtype == dtype and None not in known:
        a_MK, b_NK = values_of(a, dtype), values_of(b, dtype)
        a_MK, b_NK = a_MK if over[0] == COLUMNS else a_MK.t(), b_NK if over[1] == COLUMNS else b_NK.t()
        start, share = (a_MK.new_zeros(1), 0) if bias is None else (bias.to(dtype), 1)
        return torch.addmm(start, a_MK, b_NK.t(), beta=share, alpha=math.prod(known))
    factor = scaled[0].factor if len(scaled) == 1 else scaled[0].factor * scaled[1].factor
    product = multiply(a, b, over, dtype, torch.float32) * factor
    return (product if bias is None else product + bias.float()).to(out_dtype)
