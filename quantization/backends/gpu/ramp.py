"""Q-Ramping's AdamW in one pass over memory: `stabilizers/qramping.py` with its bits, a launch a parameter.

The bits are those of torch's kernels one after the other. Those of `lerp` and `addcmul` end in a fused multiply-add, as
written out below; everywhere else every operation rounds, for which the launch turns the fusing off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def ramp_kernel(
    weight,
    gradient,
    exp_avg,
    exp_avg_sq,
    grad_sum,
    count,
    updates,
    period,
    step_size,
    correction2_sqrt,
    found_inf,
    begin,
    numel,
    last,
    decay,
    lerp_weight,
    beta2,
    square_weight,
    eps,
    GUARDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < numel
    at = begin + i  # in the state, which is that of all parameters
    total = tl.load(grad_sum + at, there, 0.0) + tl.load(gradient + i, there, 0.0).to(tl.float32)
    steps = tl.load(count + at, there, 0) + 1
    n = tl.load(period + at, there, 1)
    due = steps >= n
    mean = tl.div_rn(total, steps.to(tl.float32))
    m = tl.load(exp_avg + at, there, 0.0)
    way = mean - m
    rest = 1.0 - lerp_weight
    new_m = tl.where(lerp_weight < 0.5, tl.fma(way, lerp_weight, m), tl.fma(way, -rest, mean))
    m = tl.where(due, new_m, m)
    v = tl.load(exp_avg_sq + at, there, 0.0)
    faded = v * beta2
    new_v = tl.where(square_weight == 1.0, tl.fma(mean, mean, faded), tl.fma(mean * mean, square_weight, faded))
    v = tl.where(due, new_v, v)
    own = tl.load(updates + at, there, 0) + due.to(tl.int32)

    place = tl.minimum(own, last)
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.load(correction2_sqrt + place)) + eps
    update = tl.div_rn(tl.load(step_size + place) * n.to(tl.float32) * m, denominator)
    if GUARDED:
        failed = tl.load(found_inf)
        decay = tl.where(failed > 0, 1.0, decay)
        update = tl.where(failed == 0, update, 0.0)
    w = tl.load(weight + i, there, 0.0) * decay + tl.where(due, update, 0.0)
    tl.store(weight + i, w, there)
    tl.store(exp_avg + at, m, there)
    tl.store(exp_avg_sq + at, v, there)
    tl.store(grad_sum + at, tl.where(due, 0.0, total), there)
    tl.store(count + at, tl.where(due, 0, steps), there)
    tl.store(updates + at, own, there)


def ramped_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: Mapping[str, Tensor],
    tables: tuple[Tensor, Tensor],
    numbers: Mapping[str, float],
    found_inf: Tensor | None,
) -> None:
    """One step in place.

    weights: contiguous, float32; gradients: theirs, contiguous. state: QRampingAdamW.ramping. tables: -lr over the
    first bias correction, and the root of the second, by the number of updates. numbers: the kernel's scalars by name.
    """
    step_size, correction2_sqrt = tables
    names = ("exp_avg", "exp_avg_sq", "grad_sum", "count", "updates", "period")
    begin = 0
    for weight, gradient in zip(weights, gradients, strict=True):
        numel = weight.numel()
        ramp_kernel[(triton.cdiv(numel, BLOCK),)](
            weight,
            gradient,
            *(state[name] for name in names),
            step_size,
            correction2_sqrt,
            step_size if found_inf is None else found_inf,
            begin,
            numel,
            len(step_size) - 1,
            **numbers,
            GUARDED=found_inf is not None,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
        begin += numel
