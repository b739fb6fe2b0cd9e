"""Quantizers of the design space against a copy: scales with fraction bits, outer scales, square blocks, rotations.

    python benchmarks/bench_design.py [--shapes 25216x3072 ...] [--dtypes bfloat16 float32] [--points nvfp4 ...]

A point is one quantizer of a matrix, as a linear layer asks for it: along rows or columns, rotated or not, its result
dense in the matrix's dtype. The rate counts one reading and one writing of the matrix, also where an outer scale makes
a point read it twice.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from bench_quantize import DTYPES, SHAPES, shape_of
from common import Results, command, parse, parser_for, take_turns

from quantization import QuantizerSpec
from quantization.job import DENSE, NOTHING, Job
from quantization.noise import Noise
from quantization.operands import prepare
from quantization.rotation import Rotation

NVFP4 = QuantizerSpec(block_size=16, scale_format="e4m3", outer="pow2")
SPECS = {
    "tetrajet": QuantizerSpec(),
    "e8m3": QuantizerSpec(block_size=16, scale_format="e8m3"),
    "nvfp4": NVFP4,
    "square": dataclasses.replace(NVFP4, block_rows=16),
    "even": QuantizerSpec(scale_rule="even"),
    "three_quarter": QuantizerSpec(scale_rule="three_quarter"),
    "fp32": QuantizerSpec(block_size=16, scale_format="fp32"),
}
BASELINE = "copy"
ROUNDINGS = ("nearest_even", "stochastic")


def job_of(spec: QuantizerSpec, shape: tuple[int, int], dtype: torch.dtype, rotated: int) -> Job:
    """A quantizer along rows or, as its axis says, columns, after a rotation in groups of `rotated` (0: none)."""
    axis = 0 if spec.axis == 0 else 1
    turn = Rotation(rotated, "fixed").turn(shape[axis], 2) if rotated else None
    if axis:
        return Job(spec, None, DENSE, NOTHING, dtype, row_turn=turn)
    return Job(None, spec, NOTHING, DENSE, dtype, column_turn=turn)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for(__doc__, rounds=50)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[shape_of(s) for s in SHAPES])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--points", nargs="+", default=list(SPECS), choices=SPECS)
    parser.add_argument("--rotations", nargs="+", type=int, default=[0, 16], help="sizes of groups; 0 for none")
    options, device = parse(parser, argv)
    shapes = [(64, 96)] if options.quick else options.shapes
    results = Results("design", options, device)
    for shape, dtype in itertools.product(shapes, options.dtypes):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, DTYPES[dtype])
        out, moved, noise = torch.empty_like(x), 2 * x.numel() * x.element_size(), Noise.from_seed(0, device)
        for rounding, axis in itertools.product(ROUNDINGS, (-1, 0)):
            calls = {BASELINE: lambda out=out, x=x: out.copy_(x)}
            for name, rotated in itertools.product(options.points, options.rotations):
                spec = dataclasses.replace(SPECS[name], rounding=rounding, axis=axis)
                job = job_of(spec, shape, x.dtype, rotated)
                label = f"{name} H{rotated}" if rotated else name
                calls[label] = lambda job=job, x=x, noise=noise: prepare(x, job, noise)
            results.add(
                f"{rounding} axis {axis} {dtype}",
                "x".join(map(str, shape)),
                take_turns(calls, device, options, kernels=True),
                dict.fromkeys(calls, BASELINE),
                rate=lambda _, seconds, moved=moved: moved / seconds / 1e9,
                rate_unit="GB/s",
            )


if __name__ == "__main__":
    command(main)
