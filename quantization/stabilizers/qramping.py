"""Q-Ramping (section 6 of the paper, Algorithm 2): oscillating weights are updated less often, with more gradient.

Detection, at step 0 and every `update_period` steps: rehearse `detect_steps` ordinary AdamW steps, measure the
oscillation ratio R_w of every quantized weight (Appendix A.1), undo the steps, and set the period of each element:

    N_w = min(k2 * floor(R_w / k1) + 1, n_max)

Training: an element's gradients accumulate for N_w steps; then comes one AdamW update with their mean and the learning
rate N_w * lr. Decoupled weight decay stays per step, and bias correction counts the element's own updates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantization.layers.linear import QuantLinear
from quantization.oscillation import OSCILLATING, PathLengths
from quantization.stabilizers.base import Plan, Stabilizer, Trainer

OPTIMIZER = "qrampingadamw"  # its name in timm, which takes an underscore for a prefix
CHUNK = 2**23  # elements worked on at once: some 130 MB of temporaries, and few enough launches for the host


def _chunks(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Whole parameters in their order, in lists of CHUNK elements at most; a larger one is alone in its list."""
    chunk: list[Tensor] = []
    for p in parameters:
        if chunk and sum(q.numel() for q in chunk) + p.numel() > CHUNK:
            yield chunk
            chunk = []
        chunk.append(p)
    yield chunk


def _kernel(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Callable[..., None] | None:
    """The step as a Triton kernel, of the same bits, for what it serves on a GPU; else None."""
    tensors = [*weights, *gradients]
    if not all(t.is_cuda and t.is_contiguous() and t.dtype == torch.float32 for t in tensors):
        return None
    try:
        from quantization.backends.gpu.ramp import ramped_step
    except ImportError:
        return None
    return ramped_step


def _step_in_chunks(
    weights: list[Tensor],
    gradients: list[Tensor],
    state: dict[str, Tensor],
    tables: tuple[Tensor, Tensor],
    numbers: dict[str, float],
    found_inf: Tensor | None,
) -> None:
    """One step in place by torch's own operations; see backends/gpu/ramp.py for what is given.

    But for a few launches over all at once it goes chunk by chunk, which bounds what it allocates.
    """
    decay = numbers["decay"]
    torch._foreach_mul_(weights, decay if found_inf is None else torch.where(found_inf > 0, 1.0, decay))
    sums = state["grad_sum"].split([w.numel() for w in weights])
    torch._foreach_add_([total.view_as(w) for total, w in zip(sums, weights, strict=True)], gradients)
    state["count"] += 1
    begin = 0
    for chunk in _chunks(weights):
        sizes = [w.numel() for w in chunk]
        part = {name: values.narrow(0, begin, sum(sizes)) for name, values in state.items()}
        update = _chunk_update(part, tables, numbers, found_inf).split(sizes)
        torch._foreach_add_(chunk, [u.view_as(w) for u, w in zip(update, chunk, strict=True)])
        begin += sum(sizes)


def _chunk_update(
    s: dict[str, Tensor], tables: tuple[Tensor, Tensor], numbers: dict[str, float], found_inf: Tensor | None
) -> Tensor:
    """What to add to the elements of a chunk, float32 (n,): 0 for those not due. s: their state, brought forward."""
    step_size, correction2_sqrt = tables
    due = s["count"] >= s["period"]
    mean = s["grad_sum"] / s["count"]
    torch.where(due, s["exp_avg"].lerp(mean, numbers["lerp_weight"]), s["exp_avg"], out=s["exp_avg"])
    exp_avg_sq = (s["exp_avg_sq"] * numbers["beta2"]).addcmul_(mean, mean, value=numbers["square_weight"])
    torch.where(due, exp_avg_sq, s["exp_avg_sq"], out=s["exp_avg_sq"])
    del mean, exp_avg_sq
    s["grad_sum"].masked_fill_(due, 0.0)
    s["count"].masked_fill_(due, 0)
    s["updates"] += due

    place = s["updates"].clamp(max=len(step_size) - 1)
    denominator = s["exp_avg_sq"].sqrt().div_(correction2_sqrt.index_select(0, place)).add_(numbers["eps"])
    update = step_size.index_select(0, place).mul_(s["period"]).mul_(s["exp_avg"]).div_(denominator)
    waits = ~due if found_inf is None else ~due | (found_inf != 0)
    return update.masked_fill_(waits, 0.0)


class QRampingAdamW(torch.optim.AdamW):
    """AdamW that updates each element of the parameters named by `ramp` once in its own period of steps.

    Other parameters are updated by torch.optim.AdamW. With all periods 1 the ramped ones are too, bit for bit on a CPU:
    the arithmetic below is that of its single-tensor path. The state of ramped parameters is kept flat, one tensor for
    all of them; `state_dict` holds it under "ramping".
    """

    def ramp(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every element of `parameters`, all of one parameter group, a period, 1 to begin with.

        Raises ValueError where they do not share a group.
        """
        ids = {id(p) for p in parameters}
        members = [{id(p) for p in group["params"]} for group in self.param_groups]
        groups = [number for number, own in enumerate(members) if ids & own]
        if len(groups) != 1 or not ids <= members[groups[0]]:
            raise ValueError("ramped parameters must all be in one parameter group")
        self._ramped = list(parameters)
        self._group = groups[0]  # its number: load_state_dict puts other groups in the place of these
        numel, device = sum(p.numel() for p in parameters), parameters[0].device
        floats = {name: torch.zeros(numel, device=device) for name in ("exp_avg", "exp_avg_sq", "grad_sum")}
        counts = {name: torch.zeros(numel, dtype=torch.int32, device=device) for name in ("count", "updates")}
        self.ramping = {**floats, **counts, "period": torch.ones(numel, dtype=torch.int32, device=device)}
        self._corrections: tuple[Any, ...] | None = None

    def set_periods(self, periods: Sequence[Tensor]) -> None:
        """The period N_w of every element of the ramped parameters: integer tensors of their shapes, 1 or more.

        An accumulation under way goes on: it ends as soon as it is as long as the new period.
        """
        self.ramping["period"] = torch.cat([n.flatten() for n in periods]).to(torch.int32)

    @contextlib.contextmanager
    def ordinary(self) -> Iterator[None]:
        """Ordinary AdamW steps: all periods 1 and nothing accumulated. The caller restores the optimizer's state."""
        kept = dict(self.ramping)
        self.ramping |= {name: torch.zeros_like(kept[name]) for name in ("grad_sum", "count")}
        self.ramping["period"] = torch.ones_like(kept["period"])
        try:
            yield
        finally:
            self.ramping |= {name: kept[name] for name in ("grad_sum", "count", "period")}

    def _bias_corrections(self, beta1: float, beta2: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """1 - beta1^n (float64) and sqrt(1 - beta2^n) (float32) by n, up to the n from which both are 1. By Python's
        own powers, as torch has them; element 0 is never used in an update."""
        key = (beta1, beta2, device)
        if self._corrections is None or self._corrections[0] != key:
            corrections = [(1.0, 1.0)]
            while min(corrections[-1]) < 1 or len(corrections) == 1:
                n = len(corrections)
                corrections.append((1 - beta1**n, (1 - beta2**n) ** 0.5))
            one, two = zip(*corrections, strict=True)
            float64, float32 = ({"dtype": dtype, "device": device} for dtype in (torch.float64, torch.float32))
            self._corrections = (key, torch.tensor(one, **float64), torch.tensor(two, **float32))
        return self._corrections[1], self._corrections[2]

    @torch.no_grad()
    def _ramped_step(self, gradients: list[Tensor]) -> None:
        group, failed = self.param_groups[self._group], getattr(self, "found_inf", None)
        (beta1, beta2), lr = group["betas"], group["lr"]
        correction1, correction2_sqrt = self._bias_corrections(beta1, beta2, self.ramping["period"].device)
        tables = (-lr / correction1).to(torch.float32), correction2_sqrt
        numbers = {
            **{"decay": 1 - lr * group["weight_decay"], "lerp_weight": 1 - beta1},
            **{"beta2": beta2, "square_weight": 1 - beta2, "eps": group["eps"]},
        }
        step = _kernel(self._ramped, gradients) or _step_in_chunks
        step(self._ramped, gradients, self.ramping, tables, numbers, failed)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of the run for all parameters. Raises ValueError for a ramped parameter without a gradient."""
        ramped = getattr(self, "_ramped", [])
        gradients = [p.grad for p in ramped]
        if any(g is None for g in gradients):
            raise ValueError("a ramped parameter has no gradient")
        for p in ramped:
            p.grad = None  # hidden from AdamW, which skips parameters without gradients
        loss = super().step(closure)
        for p, g in zip(ramped, gradients, strict=True):
            p.grad = g
        if ramped:
            self._ramped_step(gradients)
        return loss

    def state_dict(self) -> dict[str, Any]:
        ramping = {"ramping": dict(self.ramping)} if hasattr(self, "ramping") else {}
        return super().state_dict() | ramping

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises KeyError or ValueError for the state of another optimizer or other ramped parameters."""
        state_dict = dict(state_dict)
        ramping = state_dict.pop("ramping", None)
        if hasattr(self, "ramping"):
            if ramping is None or ramping["period"].numel() != self.ramping["period"].numel():
                raise ValueError("it holds no periods for these parameters")
            ramping = {name: ramping[name].to(old.device).clone() for name, old in self.ramping.items()}
        super().load_state_dict(state_dict)
        if hasattr(self, "ramping"):
            self.ramping = ramping


def periods(ratio: Tensor, k1: float, k2: int, n_max: int) -> Tensor:
    """N_w = min(k2 * floor(R_w / k1) + 1, n_max) (Algorithm 2), int32; an infinite ratio gives n_max."""
    ramps = torch.floor(ratio / k1).double()  # in which every int32 is exact
    return (k2 * ramps + 1).clamp(max=min(n_max, 2**31 - 1)).nan_to_num(1.0).to(torch.int32)


class QRamping(Stabilizer):
    """The detector. Its state is the optimizer's, in which the periods are kept."""

    def __init__(self, cfg: Any, layers: dict[str, QuantLinear], plan: Plan) -> None:
        super().__init__(cfg, layers, plan)
        self.update_period = cfg.update_period or plan.steps_per_epoch
        self.n_max = cfg.n_max or plan.steps_per_epoch

    @property
    def weights(self) -> list[nn.Parameter]:
        return [layer.weight for layer in self.layers.values()]

    def optimizer_name(self, name: str) -> str:
        if name not in ("adamw", OPTIMIZER):
            raise ValueError(f"qramping changes AdamW and cannot work with the optimizer {name}")
        return OPTIMIZER

    def bind(self, optimizer: QRampingAdamW) -> None:
        optimizer.ramp(self.weights)

    def before_step(self, step: int, trainer: Trainer) -> dict[str, float] | None:
        if step % self.update_period:
            return None
        ratios = self.detect(trainer)
        trainer.optimizer.set_periods([periods(r, self.cfg.k1, self.cfg.k2, self.n_max) for r in ratios])
        n = trainer.optimizer.ramping["period"]
        oscillating = sum(int((r > OSCILLATING).sum()) for r in ratios)
        return {"oscillating_share": oscillating / n.numel(), "mean_period": float(n.float().mean())}

    def detect(self, trainer: Trainer) -> list[Tensor]:
        """R_w of every quantized weight over `detect_steps` rehearsed steps, in the order of the layers."""
        layers = list(self.layers.values())
        paths = [PathLengths(layer.weight, layer.quantized_weight()) for layer in layers]

        def observe() -> None:
            for path, layer in zip(paths, layers, strict=True):
                path.add(layer.weight, layer.quantized_weight())

        with trainer.optimizer.ordinary():
            trainer.rehearse(self.cfg.detect_steps, observe)
        return [path.ratio() for path in paths]
