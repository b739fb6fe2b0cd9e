"""The quantizer alone, there and back in the input's dtype, against a device copy of the same tensor.

    python benchmarks/bench_quantize.py [--shapes 25216x3072] [--dtypes bfloat16] [--roundings stochastic] [--axes 0]

Blocks run along axis -1, along axis 0, or `both`: two results of one tensor, as a linear layer needs them of X and G.
Peers that do the same work with nearest rounding: torchao's to_mx and to_dtype (axis 0 by way of two transpositions)
and our own reference, both under torch.compile. GB/s count what must be moved: the tensor once in, every result once
out.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
from collections.abc import Callable, Sequence

import torch
from common import Results, command, parse, parser_for, take_turns
from torch import Tensor

from config import UserError
from quantization import QuantizerSpec, fake_quantize
from quantization.job import DENSE, PACKED, Job
from quantization.noise import Noise
from quantization.operands import prepare

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHAPES = ["25216x3072", "25216x768", "50432x192"]  # fc2's and fc1's inputs of DeiT-B at batch 128, DeiT-T's at 256
BASELINE = "copy"
PEERS = ("torchao", "reference")
AXES = {"-1": (-1,), "0": (0,), "both": (-1, 0)}
Variants = dict[str, tuple[Callable[[], object], int]]


def torchao_quantizer(spec: QuantizerSpec) -> Callable[[Tensor], Tensor] | None:
    """torchao's quantizer of the same values, next to ties of the scale aside; None where it has none."""
    if spec.rounding != "nearest_even":
        return None
    try:
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
    except ImportError:
        raise UserError("The peer torchao is not installed: pip install torchao, or choose other --peers.") from None
    mode = {"truncation_free": ScaleCalculationMode.RCEIL, "floor": ScaleCalculationMode.FLOOR}[spec.scale_rule]
    fp4 = torch.float4_e2m1fn_x2

    def quantize(x: Tensor) -> Tensor:
        moved = x.movedim(spec.axis, -1).contiguous()
        scale, codes = to_mx(moved, fp4, spec.block_size, mode)
        return to_dtype(codes, scale, fp4, spec.block_size, x.dtype).movedim(-1, spec.axis).contiguous()

    return quantize


def variants_of(specs: Sequence[QuantizerSpec], x: Tensor, options: argparse.Namespace) -> Variants:
    """What takes turns, with the bytes that it must move: the copy, ours and its peers, each for all of `specs`."""
    noise = Noise.from_seed(0, x.device) if specs[0].stochastic else None
    out, size = torch.empty_like(x), x.numel() * x.element_size()
    variants: Variants = {BASELINE: (lambda: out.copy_(x), 2 * size)}

    def add(name: str, quantizers: Sequence[Callable[[Tensor], Tensor] | None]) -> None:
        if None not in quantizers:
            backend = "eager" if options.quick else "inductor"  # code generation takes a CPU minutes
            call = torch.compile(lambda x: [q(x) for q in quantizers], dynamic=False, backend=backend)
            variants[name] = (lambda: call(x), (1 + len(specs)) * size)

    if len(specs) == 1:
        variants["ours"] = (lambda: fake_quantize(x, specs[0], seed=noise), 2 * size)
    else:
        dense, columns_packed = (Job(*specs, DENSE, form, x.dtype, column_stream=1) for form in (DENSE, PACKED))
        packed = x.numel() * 17 // 32  # 4-bit codes and a byte of scale a block
        variants["ours"] = (lambda: prepare(x, dense, noise), 3 * size)
        variants["ours, columns packed"] = (lambda: prepare(x, columns_packed, noise), 2 * size + packed)
    if "torchao" in options.peers:
        add("torchao compiled", [torchao_quantizer(spec) for spec in specs])
    if "reference" in options.peers and not specs[0].stochastic:  # inductor does not compile the reference's Philox
        add(
            "reference compiled",
            [functools.partial(fake_quantize, spec=spec, seed=noise, backend="reference") for spec in specs],
        )
    return variants


def shape_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is no shape, such as 25216x3072")
    return int(match[1]), int(match[2])


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for(__doc__, rounds=50)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[shape_of(s) for s in SHAPES])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument(
        "--roundings", nargs="+", default=["nearest_even", "stochastic"], choices=["nearest_even", "stochastic"]
    )
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="none after the flag: ours alone")
    options, device = parse(parser, argv)
    shapes = [(64, 96)] if options.quick else options.shapes
    results = Results("quantize", options, device)
    for shape, dtype in itertools.product(shapes, options.dtypes):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=g).to(device, DTYPES[dtype])
        for rounding, axis in itertools.product(options.roundings, options.axes):
            torch.compiler.reset()
            variants = variants_of([QuantizerSpec(rounding=rounding, axis=a) for a in AXES[axis]], x, options)
            calls = {name: call for name, (call, _) in variants.items()}
            results.add(
                f"{rounding} axis {axis} {dtype}",
                "x".join(map(str, shape)),
                take_turns(calls, device, options, kernels=True),
                dict.fromkeys(calls, BASELINE),
                rate=lambda name, seconds, variants=variants: variants[name][1] / seconds / 1e9,
                rate_unit="GB/s",
            )


if __name__ == "__main__":
    command(main)
