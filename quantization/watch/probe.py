"""The probe: records the statistics of Appendix A while a model trains, and changes nothing in the training.

A recording covers the last T0 optimizer steps of an epoch:

| name | what | of |
|---|---|---|
| r_w, r_WQ | rates of change of the master and the quantized weight (A.3) | each layer; their mean |
| r_Y | the same of the output of one transformer block, Y | a fixed batch in eval mode |
| r_Y_block | the same where the block reads what it read at first, so that it alone moves Y | that block |
| oscillating | weights with R_w > 16 (A.1): count, and share of all | each layer; all |
| confidence | quantization confidence (A.2) after the last step: mean and histogram | each layer; all |
| latent | histogram of w / S after the last step | each layer |
| quantizer | what each quantizer does to what it reads, see quantizers.py (option) | each layer's six |
| trajectory | latent and quantized value after every step of the run's last epoch | the most oscillating weights |

Layers are the block linears. A quantized weight is what the output product sees: Q(w) of the training's own q2, its
shadow included; under INT4 and a rotation both w and Q(w) are taken in the basis that is quantized. Where a layer has
no quantized weight (full precision, q2 off or stochastic), r_w, r_Y and r_Y_block alone are recorded.

Every process of a run computes the same, from weights that are the same. Nothing waits for the device but the end of a
recording, and the forward pass of the probe uses a noise position of its own and gives the clock back.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantization.backends.reference import block_scales
from quantization.layers import int4
from quantization.layers.clock import clock_of
from quantization.layers.convert import BLOCK_LINEARS
from quantization.layers.linear import QuantLinear
from quantization.oscillation import (
    OSCILLATING,
    PathLengths,
    RateOfChange,
    cell_confidence,
    latent_weight,
    signed_grid,
)
from quantization.stabilizers.base import Plan
from quantization.watch.quantizers import quantizer_statistics
from quantization.watch.recording import Recording

BLOCKS = re.compile(r"(^|\.)blocks\.\d+$")  # of all stages, in the model's order
DEFAULT_BLOCK = 9  # of the paper's Table 3
LATENT_BINS = 16  # a unit of the grid: every threshold is an edge
CONFIDENCE_BINS = 50


class Probe:
    """Records nothing: the probe of a run that has it off. Steps are optimizer steps of the run, from 0."""

    def before_step(self, step: int) -> None:
        """The weights are those that step `step` starts from."""

    def after_step(self, step: int) -> Recording | None:
        """Step `step` is done. Returns a recording where it was the last one of it."""
        return None

    def figures(self, epoch: int) -> dict[str, float]:
        """The figures recorded in `epoch` (from 0); empty where nothing was."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a recording that is under way needs to be continued."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; the model's weights are back already."""


class _MXWeight:
    """The weight of a QuantLinear in the basis that is quantized, S the scale of its block."""

    def __init__(self, layer: QuantLinear) -> None:
        self.layer, self.spec = layer, layer.recipe.q2
        fmt = self.spec.format
        self.limit = 2.0 ** (fmt.emax + 1) if self.spec.saturates else fmt.max

    def values(self) -> tuple[Tensor, Tensor]:
        """w and Q(w)."""
        return self.layer.turned_weight(), self.layer.quantized_turned_weight()

    def latents(self) -> tuple[Tensor, Tensor]:
        """w / S and Q(w) / S."""
        (w, q), amax = self.values(), self.layer.weight_amax
        scales = block_scales(w, self.spec, amax)
        return latent_weight(w, self.spec, amax), torch.where(scales == 0, 0.0, q.float() / scales)

    def grid(self) -> Tensor:
        return signed_grid(self.spec.format, self.layer.weight.device)


class _Int4Weight:
    """The weight of an Int4Linear in the basis that is quantized, S its learned step."""

    limit = float(-int4.LEVEL_MIN)

    def __init__(self, layer: int4.Int4Linear) -> None:
        self.layer = layer

    def _divided(self) -> tuple[Tensor, Tensor, Tensor]:
        w = int4.basis(self.layer.weight.detach(), self.layer.recipe)
        return w, *int4.divide(w, self.layer.step_w)

    def values(self) -> tuple[Tensor, Tensor]:
        w, v, step = self._divided()
        return w, int4.quantize(v) * step

    def latents(self) -> tuple[Tensor, Tensor]:
        _, v, _ = self._divided()
        return v, int4.quantize(v)

    def grid(self) -> Tensor:
        levels = range(int4.LEVEL_MIN, int4.LEVEL_MAX + 1)
        return torch.tensor(list(levels), dtype=torch.float32, device=self.layer.weight.device)


def _view(layer: nn.Module) -> _MXWeight | _Int4Weight | None:
    """How to read the layer's weight; None where it has no quantized value."""
    if isinstance(layer, int4.Int4Linear):
        return _Int4Weight(layer)
    if isinstance(layer, QuantLinear) and layer.has_quantized_weight:
        return _MXWeight(layer)
    return None


class _Enough(Exception):  # noqa: N818 - it is no error
    """Ends a forward pass behind the block that is watched."""


class OscillationProbe(Probe):
    """The probe that is on. Raises ValueError for a model without transformer blocks or without the block asked for."""

    def __init__(
        self,
        cfg: Any,
        model: nn.Module,
        plan: Plan,
        *,
        images: Tensor,
        autocast: Callable[[], contextlib.AbstractContextManager],
        position: int,
    ) -> None:
        """cfg: the `probes` section; images: the fixed batch, on the model's device; position: of the probe's noise."""
        self.cfg, self.model, self.plan, self.images = cfg, model, plan, images
        self.autocast, self.position = autocast, position
        blocks = {name: module for name, module in model.named_modules() if BLOCKS.search(name)}
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, QuantLinear | int4.Int4Linear)
            or (isinstance(module, nn.Linear) and BLOCK_LINEARS.search(name))
        }
        if not blocks or not self.layers:
            raise ValueError("probes watch the linears of transformer blocks, and the model has none")
        number = cfg.block or min(DEFAULT_BLOCK, len(blocks))
        if number > len(blocks):
            raise ValueError(f"probes.block is {number}, and the model has {len(blocks)} transformer blocks")
        self.block_name, self.block = list(blocks.items())[number - 1]
        views = [_view(layer) for layer in self.layers.values()]
        self.views = views if all(views) else []
        self.epochs = plan.total_steps // plan.steps_per_epoch
        self.window: _Window | None = None
        self.tracks: _Tracks | None = None
        self.chosen: list[Tensor] | None = None  # the weights to follow: positions in each layer's flattened weight
        self._figures: tuple[int, dict[str, float]] = (-1, {})  # epoch and figures of the latest recording

    # -----------------------------------------------------------------------------------------------------------------
    # What is read at a moment
    # -----------------------------------------------------------------------------------------------------------------

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Master and quantized weights; of a model without quantized weights the masters and nothing."""
        if not self.views:
            return [layer.weight.detach() for layer in self.layers.values()], []
        w, q = zip(*(view.values() for view in self.views), strict=True)
        return list(w), list(q)

    @torch.no_grad()
    def output(self, given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """In eval mode: (Y, the output of the watched block on the fixed batch; X, what the block reads; its output for
        `given` in place of X, or for X again)."""
        seen: list[Tensor] = []

        def stop(block: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> None:
            x, *others = inputs
            seen.extend((output, x, block.forward(x if given is None else given, *others, **options)))
            raise _Enough

        handle = self.block.register_forward_hook(stop, with_kwargs=True)
        try:
            with self._as_it_was(), self.autocast(), contextlib.suppress(_Enough):
                self.model(self.images)
        finally:
            handle.remove()
        return tuple(seen)

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Eval mode and the probe's noise, the same at every call and on every process; both are put back."""
        modes = [(module, module.training) for module in self.model.modules()]
        clock = clock_of(self.model)
        elsewhere = contextlib.nullcontext() if clock is None else clock.elsewhere(self.position)
        self.model.eval()
        try:
            with elsewhere:
                yield
        finally:
            for module, training in modes:
                module.training = training

    # -----------------------------------------------------------------------------------------------------------------
    # The points of the training loop
    # -----------------------------------------------------------------------------------------------------------------

    def _recorded(self, epoch: int) -> bool:
        return (epoch + 1) % self.cfg.every == 0 or epoch >= self.epochs - 2

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        epoch, place = divmod(step, self.plan.steps_per_epoch)
        in_window = place >= self.plan.steps_per_epoch - min(self.cfg.steps, self.plan.steps_per_epoch)
        if self.window is None and in_window and self._recorded(epoch):
            self.window = _Window(self, step)
        if self.tracks is None and self.views and epoch == self.epochs - 1 and self.cfg.trajectories:
            if self.chosen is None:  # nothing has been recorded before: those nearest to a threshold
                self.chosen = self._choose([1 - cell_confidence(v.latents()[0], v.grid()) for v in self.views])
            self.tracks = _Tracks(self.views, self.chosen, step)

    @torch.no_grad()
    def after_step(self, step: int) -> Recording | None:
        if self.window is not None:
            self.window.add()
        if self.tracks is not None:
            self.tracks.add()
        epoch, place = divmod(step, self.plan.steps_per_epoch)
        if place < self.plan.steps_per_epoch - 1 or self.window is None:
            return None
        recording = self._record(epoch)
        self.window = self.tracks = None
        return recording

    def _choose(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """The weights of the highest scores, infinite ones aside: their positions, layer by layer."""
        flat = torch.cat([score.flatten() for score in scores])
        flat = torch.where(torch.isfinite(flat), flat, 0.0)
        best = flat.topk(min(self.cfg.trajectories, len(flat))).indices.sort().values
        chosen, first = [], 0
        for score in scores:
            chosen.append(best[(best >= first) & (best < first + score.numel())] - first)
            first += score.numel()
        return chosen

    def _record(self, epoch: int) -> Recording:
        window, arrays, figures = self.window, {}, {}
        arrays |= window.arrays()
        figures |= {name: float(arrays[name].mean()) for name in ("r_w", "r_Y", "r_Y_block")}
        if self.views:
            ratios = window.paths.ratio()
            arrays |= self._levels() | self._histograms()
            arrays["oscillating"] = torch.stack([(r > OSCILLATING).sum() for r in ratios]).cpu().numpy()
            arrays["numel"] = np.array([r.numel() for r in ratios])
            count, total = int(arrays["oscillating"].sum()), int(arrays["numel"].sum())
            figures["r_WQ"] = float(arrays["r_WQ"].mean())
            figures |= {"oscillating": count, "oscillating_share": count / total}
            figures["confidence"] = float(arrays["confidence"] @ arrays["numel"]) / total
            if self.tracks is not None:
                arrays |= self.tracks.arrays(ratios)
            self.chosen = self._choose(ratios) if self.cfg.trajectories else None
        if self.cfg.quantizers:
            layers = list(self.layers.values())
            with self._as_it_was(), self.autocast():
                arrays |= quantizer_statistics(self.model, layers, self.images)
        arrays["layers"] = np.array(list(self.layers))
        arrays["block"] = np.array(self.block_name)
        arrays["epoch"] = np.array(epoch + 1)
        self._figures = (epoch, figures)
        return Recording(f"epoch_{epoch + 1:04d}", figures, arrays)

    def _levels(self) -> dict[str, np.ndarray]:
        """The values that a latent weight is rounded to."""
        return {"grid": self.views[0].grid().cpu().numpy()}

    def _histograms(self) -> dict[str, np.ndarray]:
        """Counts of latent weights and of confidences, a row a layer; what is not finite is in the last bin."""
        limit = self.views[0].limit
        latent_bins = round(2 * limit * LATENT_BINS)
        latents, confidences, means = [], [], []
        for view in self.views:
            latent, _ = view.latents()
            confidence = cell_confidence(latent, view.grid())
            latents.append(_counts((latent + limit) * LATENT_BINS, latent_bins))
            confidences.append(_counts(confidence * CONFIDENCE_BINS, CONFIDENCE_BINS))
            means.append(confidence.mean(dtype=torch.float64))
        return {
            "latent_edges": np.arange(latent_bins + 1) / LATENT_BINS - limit,
            "latent_counts": torch.stack(latents).cpu().numpy(),
            "confidence_edges": np.arange(CONFIDENCE_BINS + 1) / CONFIDENCE_BINS,
            "confidence_counts": torch.stack(confidences).cpu().numpy(),
            "confidence": torch.stack(means).cpu().numpy(),
        }

    # -----------------------------------------------------------------------------------------------------------------
    # Stopped and continued
    # -----------------------------------------------------------------------------------------------------------------

    def figures(self, epoch: int) -> dict[str, float]:
        return self._figures[1] if self._figures[0] == epoch else {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "window": None if self.window is None else self.window.state_dict(),
            "tracks": None if self.tracks is None else self.tracks.state_dict(),
            "chosen": self.chosen,
            "figures": self._figures,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:  # of a run that had the probe off: it begins here
            return
        device = self.images.device
        self.chosen = None if state["chosen"] is None else [index.to(device) for index in state["chosen"]]
        self._figures = state["figures"]
        if state["window"] is not None:
            given = state["window"]["given"]
            if not isinstance(given, Tensor):
                raise ValueError(f"what {self.block_name} reads is no tensor")
            self.window = _Window(self, state["window"]["first_step"], given.to(device))
            self.window.load_state_dict(state["window"])
        if state["tracks"] is not None and self.chosen is not None:
            self.tracks = _Tracks(self.views, self.chosen, state["tracks"]["first_step"])
            self.tracks.load_state_dict(state["tracks"])


def _counts(places: Tensor, bins: int) -> Tensor:
    """How many of `places` lie in each of the bins [0, 1), [1, 2), ...; what lies beyond them in the outermost ones."""
    places = places.nan_to_num(nan=bins).clamp(0, bins - 1).long().flatten()
    return torch.bincount(places, minlength=bins)


class _Window:
    """The steps of one recording so far. given: what the block reads for r_Y_block; None: what it reads now."""

    def __init__(self, probe: OscillationProbe, first_step: int, given: Tensor | None = None) -> None:
        self.probe, self.first_step = probe, first_step
        w, q = probe.weights()
        y, x, y_of_given = probe.output(given)
        if given is not None and (given.shape, given.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"{probe.block_name} reads {tuple(x.shape)} {x.dtype}, not {tuple(given.shape)} {given.dtype}"
            )
        self.given = x.clone() if given is None else given
        self.r_w, self.r_Y, self.r_Y_block = (RateOfChange(x) for x in (w, y, y_of_given))
        self.r_WQ = RateOfChange(q) if q else None
        self.paths = PathLengths(w, q) if q else None

    def add(self) -> None:
        w, q = self.probe.weights()
        self.r_w.add(w)
        y, _, y_of_given = self.probe.output(self.given)
        self.r_Y.add(y)
        self.r_Y_block.add(y_of_given)
        if q:
            self.r_WQ.add(q)
            self.paths.add(w, q)

    def arrays(self) -> dict[str, np.ndarray]:
        rates = {name: rate.value().cpu().numpy() for name, rate in self._rates().items()}
        return {**rates, "first_step": np.array(self.first_step), "steps": np.array(self.r_w.steps)}

    def _rates(self) -> dict[str, RateOfChange]:
        rates = {"r_w": self.r_w, "r_WQ": self.r_WQ, "r_Y": self.r_Y, "r_Y_block": self.r_Y_block}
        return {name: rate for name, rate in rates.items() if rate is not None}

    def state_dict(self) -> dict[str, Any]:
        return {
            "first_step": self.first_step,
            "rates": {name: rate.state_dict() for name, rate in self._rates().items()},
            "paths": None if self.paths is None else self.paths.state_dict(),
            "given": self.given,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, rate in self._rates().items():
            rate.load_state_dict(state["rates"][name])
        if self.paths is not None:
            self.paths.load_state_dict(state["paths"])


class _Tracks:
    """Latent and quantized values of chosen weights, step by step."""

    def __init__(self, views: Sequence[_MXWeight | _Int4Weight], chosen: list[Tensor], first_step: int) -> None:
        self.parts = [(n, view, index) for n, (view, index) in enumerate(zip(views, chosen, strict=True)) if len(index)]
        self.first_step = first_step
        self.values: list[Tensor] = []  # (2, weights): latent, quantized; first those that the first step starts from
        self.add()

    def add(self) -> None:
        pairs = [torch.stack([values.flatten()[index] for values in view.latents()]) for _, view, index in self.parts]
        self.values.append(torch.cat(pairs, dim=1))

    def arrays(self, ratios: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """(steps + 1, weights) each of latent and quantized values, and which weights these are, by falling R_w."""
        values = torch.stack(self.values, dim=1).cpu().numpy()
        layer = np.concatenate([np.full(len(index), n) for n, _, index in self.parts])
        place = torch.cat([index for *_, index in self.parts]).cpu().numpy()
        ratio = torch.cat([ratios[n].flatten()[index] for n, _, index in self.parts]).cpu().numpy()
        columns = np.array([ratios[n].shape[-1] for n in layer])
        order = np.argsort(-ratio, kind="stable")
        return {
            "trajectory_latent": values[0][:, order],
            "trajectory_quantized": values[1][:, order],
            "trajectory_layer": layer[order],
            "trajectory_row": (place // columns)[order],
            "trajectory_column": (place % columns)[order],
            "trajectory_ratio": ratio[order],
            "trajectory_first_step": np.array(self.first_step),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"first_step": self.first_step, "values": torch.stack(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = list(state["values"].to(self.values[0].device).unbind())
