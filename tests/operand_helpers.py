"""Jobs for the tests of operands, kernels and layers."""

from __future__ import annotations

import torch

from quantization import QuantizerSpec
from quantization.job import E4M3, NOTHING, Job

STREAMS = (3, 5)
ELEMENTS, PAPER_RULES = ("e2m1", "e3m0"), ("truncation_free", "floor")  # those of the paper, which all forms have


def job_of(
    row: QuantizerSpec | None,
    column: QuantizerSpec | None,
    forms: tuple[str, str],
    dtype: torch.dtype,
    fp8: torch.dtype = E4M3,
    *,
    chained: bool = False,
    sums: bool = False,
) -> Job:
    """A job with the streams above; where there is no quantizer there is nothing."""
    row_form, column_form = (NOTHING if spec is None else form for spec, form in zip((row, column), forms, strict=True))
    return Job(row, column, row_form, column_form, dtype, fp8, chained, sums, *STREAMS)
