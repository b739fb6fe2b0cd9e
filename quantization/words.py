"""The words of quantizers and recipes, one for each idea, and what is said where another one stands."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal

Rounding = Literal["nearest_even", "nearest_away", "nearest_up", "stochastic"]
ScaleRule = Literal["truncation_free", "floor", "three_quarter", "even", "overflow_aware", "rms_floor", "rms_nearest"]
ScaleRounding = Literal["nearest", "up", "stochastic"]
Outer = Literal["none", "pow2", "fp32"]
Arithmetic = Literal["exact", "te", "torchao"]
Gradient = Literal["ste", "mask"]
BackwardOperands = Literal["requantized", "original"]
Operand = Literal["shared", "requantized", "original"]
Carrier = Literal["bf16", "fp8"]

SCALE_RULES = ("truncation_free", "floor", "three_quarter", "even", "overflow_aware", "rms_floor", "rms_nearest")
E2M1_RULES = ("three_quarter", "overflow_aware", "rms_floor", "rms_nearest")  # whose numbers are made for E2M1 alone
SCALE_ROUNDINGS = ("nearest", "up", "stochastic")
ROUNDINGS = ("nearest_even", "nearest_away", "nearest_up", "stochastic")
OUTERS = ("none", "pow2", "fp32")
ARITHMETICS = ("exact", "te", "torchao")
GRADIENTS = ("ste", "mask")
BACKWARD_OPERANDS = ("requantized", "original")
OPERANDS = ("shared", "requantized", "original")
CARRIERS = ("bf16", "fp8")
QUANTIZERS = ("q1", "q2", "q3", "q4", "q5", "q6")
AXES = {"q1": -1, "q2": -1, "q3": -1, "q4": 0, "q5": 0, "q6": 0}
PRODUCTS = {"output": ("q1", "q2"), "grad_input": ("q3", "q4"), "grad_weight": ("q5", "q6")}


def expect(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raises ValueError for a value that is not one of those allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def expect_whole(name: str, value: Any, least: int, most: int = 2**31 - 1) -> None:
    """Raises ValueError for what is no whole number between the two."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}; got {value!r}")


def expect_positive(name: str, value: Any) -> None:
    """Raises ValueError for what is no number, and for one whose float32 products may leave float32."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 2**-20 <= value <= 2**20:
        raise ValueError(f"{name} must be a positive number, from 2^-20 to 2^20; got {value!r}")


def toward_zero(value: float) -> float:
    """A positive number of at most 24 significant bits, float32's: the largest that does not exceed `value`."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(math.floor(fraction * 2**24), exponent - 24)
