"""`fake_quantize`: the one door to a quantizer. It checks its arguments and picks the reference or a kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from quantization.backends.choose import BACKENDS, DTYPES, backend_of_tensor
from quantization.noise import Noise
from quantization.spec import QuantizerSpec


def fake_quantize(
    x: Tensor,
    spec: QuantizerSpec,
    *,
    seed: int | Noise | None = None,
    shadow: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Quantize to a microscaling format and back (paper, equation 1), in the shape and dtype of `x`.

    Args:
        x: float32, bfloat16 or float16, of rank >= 1; blocks of `spec.block_size` run along `spec.axis`.
        seed: noise of stochastic rounding: an integer, or a `Noise` stream that lives on x's device. The same seed
            gives the same bits on every device and backend. None draws one from torch's default CPU generator.
        shadow: shadow weight of x's shape (Q-EMA, Algorithm 1): picks between the two neighbours of each element of x.
            For nearest rounding only.
        backend: `reference`, `triton` (for CUDA tensors, or CPU tensors under TRITON_INTERPRET=1), or `auto`: the
            kernel where it can serve a CUDA tensor, else the reference. Both give the same bits.

    The gradient goes straight through: that of x is that of the result, unchanged, also where elements saturate (a
    spec's gradient mask is the linear layer's matter). A shadow gets none.

    A value that rounds beyond the largest number of x's dtype becomes Inf, as in any cast (e2m1, nearest: float16 from
    57344 on, float32 and bfloat16 from 2.98e38 on).

    Raises TypeError for another dtype and for what is no tensor, QuantizerSpec or seed, ValueError for shapes, axes and
    arguments that do not fit together.
    """
    if not isinstance(spec, QuantizerSpec):
        raise TypeError(f"expected a QuantizerSpec, such as QuantizerSpec(element='e2m1'); got {spec!r}")
    for name, tensor in (("x", x), ("shadow", x if shadow is None else shadow)):
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"fake_quantize takes a dense tensor as {name}; got {type(tensor).__name__}")
    if not isinstance(seed, int | Noise | None):
        raise TypeError(f"a seed is an integer or a Noise; got {seed!r}")
    if x.dtype not in DTYPES:
        raise TypeError(f"fake_quantize takes float32, bfloat16 or float16; got {str(x.dtype).removeprefix('torch.')}")
    if not -x.dim() <= spec.axis < x.dim():
        raise ValueError(f"axis {spec.axis} is not a dimension of a tensor of shape {tuple(x.shape)}")
    if spec.block_rows > 1 and x.dim() != 2:
        raise ValueError(f"square blocks are cut from a matrix; got a tensor of shape {tuple(x.shape)}")
    if shadow is not None and shadow.shape != x.shape:
        raise ValueError(f"the shadow has shape {tuple(shadow.shape)}, the weight {tuple(x.shape)}; they must be equal")
    if shadow is not None and spec.stochastic:
        raise ValueError("a shadow weight decides the rounding, so it needs a nearest rounding, not a stochastic one")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    implementation = backend_of_tensor(x, spec, backend)
    if x.numel() == 0:
        return x.clone()

    noise = None
    if spec.draws:
        if seed is None:
            draw = torch.randint(2**62, (1,), device="cpu")
            seed = Noise(torch.cat([draw, torch.zeros_like(draw)]).to(x.device))
        noise = seed if isinstance(seed, Noise) else Noise.from_seed(seed, x.device)
    result = implementation.quantize(x.detach(), spec, noise, None if shadow is None else shadow.detach())
    return _StraightThrough.apply(x, result)  # always: in forward mode x does not say that it has a derivative


class _StraightThrough(torch.autograd.Function):
    """`result`, as a function of x whose derivative is 1."""

    @staticmethod
    def forward(x: Tensor, result: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    @staticmethod
    def jvp(ctx: FunctionCtx, tangent: Tensor | None, _: Tensor | None) -> Tensor | None:
        return tangent if tangent is None else tangent.view_as(tangent)
