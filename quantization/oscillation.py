"""How much weights oscillate: the statistics of Appendix A of the paper."""

from __future__ import annotations

import torch
from torch import Tensor

OSCILLATING = 16.0  # a weight whose oscillation ratio exceeds this is called oscillating (section 7.2)


class PathLengths:
    """dist_W and dist_Q of Appendix A.1, element by element, fed one step at a time.

    Both are sums of |x_t - x_(t-1)| in float32, in float64 for values in float64; four tensors of the weight's shape
    are kept.
    """

    def __init__(self, w: Tensor, q: Tensor) -> None:
        """Start at the master weight `w` and its quantized value `q`, of one shape."""
        self._w, self._q = (x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in (w, q))
        self.dist_w, self.dist_q = torch.zeros_like(self._w), torch.zeros_like(self._q)

    def add(self, w: Tensor, q: Tensor) -> None:
        """Go on to the values after another step."""
        self.dist_w += (w.detach() - self._w).abs()
        self.dist_q += (q.detach() - self._q).abs()
        self._w.copy_(w.detach())
        self._q.copy_(q.detach())

    def ratio(self) -> Tensor:
        """R_w = dist_Q / dist_W (Appendix A.1); 0 where neither moved, Inf where only the quantized value did."""
        still = (self.dist_w == 0) & (self.dist_q == 0)
        return torch.where(still, 0.0, self.dist_q / self.dist_w)


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
