"""How much weights oscillate: the statistics of Appendix A of the paper.

| statistic | of | a whole trajectory | one step at a time |
|---|---|---|---|
| oscillation ratio R_w (A.1) | each weight | oscillation_ratio | PathLengths |
| quantization confidence (A.2) | each weight, at one moment | quantization_confidence | |
| rate of change r(X) (A.3) | a tensor | rate_of_change | RateOfChange |

The accumulators take one tensor, or a list of them which then share their launches, and never wait for the device.
probe.py records all three while a model trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantization.backends.reference import block_latents, magnitudes_of
from quantization.formats import ElementFormat
from quantization.spec import QuantizerSpec

OSCILLATING = 16.0  # a weight whose oscillation ratio exceeds this is called oscillating (section 7.2)

Tensors = Tensor | Sequence[Tensor]


def _now(x: Tensors) -> list[Tensor]:
    """The tensors as a list, apart from the graph, in float32 or, where they are, float64."""
    tensors = [x] if isinstance(x, Tensor) else x
    return [t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _copies(x: Tensors) -> list[Tensor]:
    return [t.clone(memory_format=torch.contiguous_format) for t in _now(x)]


class PathLengths:
    """dist_W and dist_Q of Appendix A.1, element by element, fed one step at a time.

    Both are sums of |x_t - x_(t-1)| in float32, in float64 for values in float64; four tensors of each weight's shape
    are kept.
    """

    def __init__(self, w: Tensors, q: Tensors) -> None:
        """Start at the master weight `w` and its quantized value `q`, of one shape; or at lists of them."""
        self._one = isinstance(w, Tensor)
        self._w, self._q = _copies(w), _copies(q)
        self.dist_w, self.dist_q = ([torch.zeros_like(t) for t in last] for last in (self._w, self._q))

    def add(self, w: Tensors, q: Tensors) -> None:
        """Go on to the values after another step."""
        for dist, last, now in ((self.dist_w, self._w, _now(w)), (self.dist_q, self._q, _now(q))):
            torch._foreach_add_(dist, torch._foreach_abs(torch._foreach_sub(now, last)))
            torch._foreach_copy_(last, now)

    def ratio(self) -> Any:
        """R_w = dist_Q / dist_W (Appendix A.1); 0 where neither moved, Inf where only the quantized value did.

        A tensor of the weight's shape; for lists of weights a list.
        """
        ratios = [torch.where((w == 0) & (q == 0), 0.0, q / w) for w, q in zip(self.dist_w, self.dist_q, strict=True)]
        return ratios[0] if self._one else ratios

    def state_dict(self) -> dict[str, Any]:
        """The sums. The values it stands at are not in it: it goes on from those it is made with."""
        return {"dist_w": self.dist_w, "dist_q": self.dist_q}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the sums."""
        torch._foreach_copy_(self.dist_w, [t.to(d.device) for t, d in zip(state["dist_w"], self.dist_w, strict=True)])
        torch._foreach_copy_(self.dist_q, [t.to(d.device) for t, d in zip(state["dist_q"], self.dist_q, strict=True)])


class RateOfChange:
    """r(X) of Appendix A.3, fed one step at a time: the mean of ||X_t - X_(t-1)||_F / ||X_(t-1)||_F over the steps.

    Norms in float32, in float64 for values in float64; one tensor of each X's shape is kept. A step in which nothing
    moves counts 0, one that starts from a tensor of zeros Inf.
    """

    def __init__(self, x: Tensors) -> None:
        """Start at X_0; or at a list of tensors, each with a rate of its own."""
        self._one = isinstance(x, Tensor)
        self._last = _copies(x)
        self._norms = self._stacked_norms(self._last)
        self.total, self.steps = torch.zeros_like(self._norms), 0

    @staticmethod
    def _stacked_norms(tensors: list[Tensor]) -> Tensor:
        return torch.stack(list(torch._foreach_norm([t.flatten() for t in tensors])))

    def add(self, x: Tensors) -> None:
        """Go on to X after another step."""
        now = _now(x)
        changes = self._stacked_norms(torch._foreach_sub(now, self._last))
        self.total += torch.where(changes == 0, 0.0, changes / self._norms)
        self.steps += 1
        self._norms = self._stacked_norms(now)
        torch._foreach_copy_(self._last, now)

    def value(self) -> Tensor:
        """r(X) so far: a scalar; for a list of tensors one number each. NaN before the first step."""
        rates = self.total / self.steps if self.steps else torch.full_like(self.total, torch.nan)
        return rates[0] if self._one else rates

    def state_dict(self) -> dict[str, Any]:
        """The sums. The values it stands at are not in it: it goes on from those it is made with."""
        return {"total": self.total, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the sums."""
        self.total, self.steps = state["total"].to(self.total.device), state["steps"]


def oscillation_ratio(w_steps: Tensor, q_steps: Tensor) -> Tensor:
    """R_w = dist_Q / dist_W (Appendix A.1) of trajectories of master and quantized weights: (T0 + 1, *shape) -> shape.

    Raises ValueError where the shapes differ or there are fewer than two steps.
    """
    if w_steps.shape != q_steps.shape or w_steps.dim() < 1 or w_steps.shape[0] < 2:
        raise ValueError(
            f"two trajectories of one shape (T0 + 1, ...) with T0 >= 1 are needed; got {tuple(w_steps.shape)} and "
            f"{tuple(q_steps.shape)}"
        )
    paths = PathLengths(w_steps[0], q_steps[0])
    for w, q in zip(w_steps[1:], q_steps[1:], strict=True):
        paths.add(w, q)
    return paths.ratio()


def rate_of_change(x_steps: Tensor) -> Tensor:
    """r(X) = 1/T0 sum of ||X_t - X_(t-1)||_F / ||X_(t-1)||_F (Appendix A.3): (T0 + 1, *shape) -> scalar.

    A step in which nothing moves counts 0, one that starts from a tensor of zeros Inf.
    Raises ValueError where there are fewer than two steps.
    """
    if x_steps.dim() < 1 or x_steps.shape[0] < 2:
        raise ValueError(f"a trajectory (T0 + 1, ...) with T0 >= 1 is needed; got {tuple(x_steps.shape)}")
    rate = RateOfChange(x_steps[0])
    for x in x_steps[1:]:
        rate.add(x)
    return rate.value()


def signed_grid(fmt: ElementFormat, device: torch.device) -> Tensor:
    """All values of a format in ascending order, float32; its thresholds are the midpoints between neighbours."""
    magnitudes = magnitudes_of(fmt, device)
    return torch.cat([-magnitudes[1:].flip(0), magnitudes])


def latent_weight(w: Tensor, spec: QuantizerSpec, amax: Tensor | None = None) -> Tensor:
    """w / S with the scale S of each element's block under `spec` (section 4.1): float32, w's shape.

    Exact where S is a power of two, else a division with one rounding. A block with a NaN or Inf is NaN, and one whose
    scale is zero by underflow is zeros. amax: the largest magnitude that an outer scale hangs from; None for w's own.
    Raises ValueError where `spec.axis` is no dimension of `w`.
    """
    if not -w.dim() <= spec.axis < w.dim():
        raise ValueError(f"axis {spec.axis} is not a dimension of a tensor of shape {tuple(w.shape)}")
    if w.numel() == 0:
        return w.detach().to(torch.float32)
    return block_latents(w.detach(), spec, amax)


def cell_confidence(latent: Tensor, grid: Tensor) -> Tensor:
    """quantization_confidence of values on the scale of `grid` (n, ascending): float32, the shape of `latent`."""
    thresholds = (grid[1:] + grid[:-1]) / 2
    # An outermost cell has one threshold; mirrored at its end on the grid it is a cell like the others.
    ends = 2 * grid[[0, -1]] - thresholds[[0, -1]]
    edges = torch.cat([ends[:1], thresholds, ends[1:]])
    latent = latent.clamp(grid[0], grid[-1])
    cell = torch.bucketize(latent, thresholds)
    lower, upper = edges[cell], edges[cell + 1]
    return torch.minimum(latent - lower, upper - latent) / ((upper - lower) / 2)


def quantization_confidence(w: Tensor, spec: QuantizerSpec) -> Tensor:
    """QuantConf(w) = min_i |w - thrd_i| / MaxDist(w_FP4) (Appendix A.2) in units of S: float32 in [0, 1], w's shape.

    The thresholds are the midpoints of the grid and MaxDist is the largest distance to a threshold within w's own cell:
    half its width, or, in an outermost cell, which has one threshold and ends at the largest value of the grid, all of
    it (e2m1: from 5 to 6). What saturates beyond that end, under the scale rule `floor`, has confidence 1. The cell is
    that of the weight itself: `spec.rounding` and a shadow weight (Q-EMA) do not enter. A block with a NaN or Inf is
    NaN.

    Raises ValueError where `spec.axis` is no dimension of `w`.
    """
    return cell_confidence(latent_weight(w, spec), signed_grid(spec.format, w.device))
