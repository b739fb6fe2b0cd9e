"""The state of a checkpoint into what a run is made of: the optimizer, the stabilizer, the probe.

The weights have been restored before (weights.restore_model).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from config import UserError
from record.schema import describe, tensor_fault

# Entries of a parameter group that the recipe or the device says and not the checkpoint.
_OF_THE_RUN = ("betas", "eps", "weight_decay", "momentum", "nesterov", "amsgrad", "maximize", "differentiable")
_OF_THE_RUN += ("capturable", "fused", "foreach", "decoupled_weight_decay", "lr_scale")
_LIKE_THE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq")  # means of squares, whose root is taken
_ON_THE_DEVICE = {"fused": None, "foreach": False, "capturable": False}


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> object: ...


def _form_differences(own: Any, given: Any, where: str) -> Iterator[str]:
    """Where `given` has other keys, lengths, types, shapes or dtypes than `own`, in words."""
    if isinstance(own, Tensor):
        if not isinstance(given, Tensor) or (own.shape, own.dtype) != (given.shape, given.dtype):
            yield f"{where} is {describe(own)} here and {describe(given)} in the file"
        elif (fault := tensor_fault(given)) is not None:
            yield f"{where} {fault}"
        elif given.is_floating_point() and given.isnan().any():
            yield f"{where} holds values that are not numbers"
    elif isinstance(own, Mapping):
        if not isinstance(given, Mapping):
            yield f"{where} is {describe(given)} in the file"
            return
        for key, value in own.items():
            if key not in given:
                yield f"{where}.{key} is not in the file"
            else:
                yield from _form_differences(value, given[key], f"{where}.{key}")
        yield from (f"{where}.{key} is only in the file" for key in given if key not in own)
    elif type(own) is not type(given):
        yield f"{where} is {describe(own)} here and {describe(given)} in the file"
    elif isinstance(own, list | tuple):
        if len(own) != len(given):
            yield f"{where} has {len(own)} entries here and {len(given)} in the file"
        for index, (a, b) in enumerate(zip(own, given, strict=False)):
            yield from _form_differences(a, b, f"{where}.{index}")


def restore_state(part: Stateful, state: dict[str, Any], path: str | Path, name: str) -> None:
    """`part.load_state_dict(state)`, which must have the form of the part's own state, for a part whose form is fixed.

    name: what the part is in the checkpoint, "stabilizer" say. Raises UserError and leaves the part untouched.
    """
    for difference in _form_differences(part.state_dict(), state, name):
        raise UserError(f"The state in {path} does not fit this run: {difference}.")
    part.load_state_dict(state)


def restore_probe(probe: Stateful, state: dict[str, Any], path: str | Path) -> None:
    """`probe.load_state_dict(state)` of a recording under way. Raises UserError where it is of another model."""
    try:
        probe.load_state_dict(state)
        if (
            state
            and probe.state_dict()
            and (misfit := next(_form_differences(probe.state_dict(), state, "probe"), None))
        ):
            raise ValueError(misfit)
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"The recording under way in {path} does not fit the model's layers ({reason}); continue with --no-probes."
        ) from None


def restore_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], path: str | Path, *, opt: str, steps: int
) -> list[int]:
    """Load the optimizer's state; how it is computed stays as this run's recipe and device have it.

    opt: its name. steps: the optimizer steps the run has done, which no count can exceed. Returns the numbers of the
    parameters that the file has no state of beside others that have one: they have had no gradient, or it is lost.
    Raises UserError.
    """

    def misfit(reason: Any) -> UserError:
        return UserError(f"The optimizer state in {path} does not fit --opt {opt}: {reason}.")

    groups = optimizer.param_groups
    if len(saved["param_groups"]) != len(groups):
        raise misfit(f"it has {len(saved['param_groups'])} parameter groups, and the model {len(groups)}")
    kept = []
    for number, (group, given) in enumerate(zip(groups, saved["param_groups"], strict=True)):
        own = {key: value for key, value in group.items() if key != "params"}
        for key, value in own.items():
            if key not in given:
                raise misfit(f"param_groups.{number}.{key} is missing")
            if key not in _OF_THE_RUN and not _alike(value, given[key]):
                raise misfit(f"param_groups.{number}.{key} is {describe(given[key])}")
        if not isinstance(given.get("params"), list) or len(given["params"]) != len(group["params"]):
            raise misfit(f"param_groups.{number}.params is not a list of {len(group['params'])} numbers")
        kept.append({**given, **{key: group[key] for key in _OF_THE_RUN if key in group}})
    numbers = [n for group in kept for n in group["params"]]
    if numbers != list(range(len(numbers))):
        raise misfit("its parameters are not numbered from 0")
    parameters: Sequence[Tensor] = [p for group in groups for p in group["params"]]
    expected = _expected_entries(optimizer) if saved["state"] else None
    for number, entries in saved["state"].items():
        if number >= len(parameters):
            raise misfit(f"it has a state for parameter {number}, and the model {len(parameters)} parameters")
        own = None if expected is None else expected[number]
        if (fault := _entries_fault(entries, parameters[number], steps, own)) is not None:
            raise misfit(f"state.{number}.{fault}")
    if not saved["state"] and steps and any("betas" in group for group in groups):
        raise misfit(f"it has no moving averages after {steps} steps")
    if expected is None and len({frozenset(entries) for entries in saved["state"].values()}) > 1:
        raise misfit("its parameters have states of different kinds")
    extra = {key: value for key, value in optimizer.state_dict().items() if key not in ("state", "param_groups")}
    extra = {key: value for key, value in extra.items() if key in saved}  # the optimizer says what it lacks
    for difference in _form_differences(extra, {key: saved[key] for key in extra}, "optimizer"):
        raise misfit(difference)
    try:
        optimizer.load_state_dict({**saved, "param_groups": kept})
    except (ValueError, KeyError) as error:
        raise misfit(error) from None
    elsewhere = not saved["state"] or bool(extra)  # Q-Ramping keeps the state of its weights in one piece
    return [] if elsewhere else [number for number in range(len(parameters)) if number not in saved["state"]]


def _expected_entries(optimizer: torch.optim.Optimizer) -> list[Mapping[str, Any]] | None:
    """The state of each parameter after two steps, found by taking them with zeros in their place; values mean nothing.

    None where an optimizer of this kind cannot be made from its groups (one around another, say). Which entries there
    are, and of which shapes, hangs from the optimizer, its options and the parameter's shape.
    """
    groups, places = [], []
    for group in optimizer.param_groups:
        zeros = {p.shape: nn.Parameter(torch.zeros(p.shape)) for p in group["params"]}
        groups.append({**group, **{k: v for k, v in _ON_THE_DEVICE.items() if k in group}, "params": [*zeros.values()]})
        places += [zeros[p.shape] for p in group["params"]]
    for place in places:
        place.grad = torch.zeros_like(place)
    for kind in type(optimizer).__mro__:
        if kind is torch.optim.Optimizer:
            break
        # An optimizer of another kind raises what it likes; one that draws at random leaves the run's numbers alone.
        with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):
            twin = kind([dict(group) for group in groups])
            twin.step()
            twin.step()
            return [twin.state[place] for place in places]
    return None


def _alike(own: Any, given: Any) -> bool:
    """Whether two entries of a parameter group are of one type; a number is one, whole or not, if it is finite."""
    if isinstance(own, bool) or not isinstance(own, int | float):
        return type(own) is type(given)
    return isinstance(given, int | float) and not isinstance(given, bool) and abs(given) < float("inf")


def _entries_fault(
    entries: Mapping[str, Any], parameter: Tensor, steps: int, expected: Mapping[str, Any] | None
) -> str | None:
    """What is wrong with the state of one parameter, in words; None if nothing is. expected: see _expected_entries."""
    for name, own in ({} if expected is None else expected).items():
        if name not in entries:
            return f"{name} is missing"
        if name != "step" and isinstance(own, Tensor) != isinstance(entries[name], Tensor):
            return f"{name} is {describe(entries[name])}"
    for name, value in entries.items():
        own = None if expected is None else expected.get(name)
        shape = own.shape if isinstance(own, Tensor) else parameter.shape if name in _LIKE_THE_PARAMETER else None
        if name == "step":
            number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            whole = isinstance(number, int | float) and not isinstance(number, bool) and number % 1 == 0
            if not whole or not 0 <= number <= steps or (isinstance(value, Tensor) and not value.is_floating_point()):
                return f"step is {describe(value)}, and the run has done {steps} steps"
        elif shape is not None and (not isinstance(value, Tensor) or value.shape != shape):
            size = "x".join(map(str, shape)) or "a scalar"
            of_it = "the parameter" if shape == parameter.shape else "the optimizer's own"
            return f"{name} is {describe(value)}, and {of_it} {size}"
        elif isinstance(value, Tensor) and not value.is_floating_point():
            return f"{name} is {describe(value)}"
        elif isinstance(value, Tensor) and not value.isfinite().all():
            return f"{name} holds values that are not finite"
        elif name in _SQUARES and (value < 0).any():
            return f"{name} holds negative values, and it is a mean of squares"
    return None
