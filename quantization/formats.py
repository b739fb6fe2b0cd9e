"""Formats of the elements and of the scales of blocks, as records. To add one: a record in FORMATS or SCALE_FORMATS.

In the paper a block is 32 elements that share one E8M0 scale S = 2^s, s in [-127, 127] (section 3.1: X_i = P_i * 2^s).
The other scale formats are numbers without a sign that have fraction bits or are float32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

SCALE_MIN, SCALE_MAX = -127, 127  # exponents of an E8M0 scale; the code is s + 127 and code 255 is NaN


@dataclass(frozen=True)
class ElementFormat:
    """A sign bit and the magnitudes in the order of their codes: a magnitude's index is its code without the sign."""

    name: str
    magnitudes: tuple[float, ...]

    @property
    def max(self) -> float:
        """The largest magnitude, Q_p of the paper."""
        return self.magnitudes[-1]

    @property
    def emax(self) -> int:
        """The exponent of the largest magnitude: floor(log2(max))."""
        return math.frexp(self.max)[1] - 1

    @property
    def max_significand(self) -> float:
        """The significand of the largest magnitude, in [1, 2)."""
        return self.max / 2.0**self.emax

    @functools.cached_property
    def mantissa_bits(self) -> int | None:
        """The mantissa bits of a format that is a small float with subnormal numbers; None if it is not one."""
        count, smallest = len(self.magnitudes), self.magnitudes[1]
        if math.frexp(smallest)[0] != 0.5:
            return None
        for bits in range(6):
            codes = [divmod(code, 1 << bits) for code in range(count)]
            grid = [smallest * (m if e == 0 else ((1 << bits) + m) * 2.0 ** (e - 1)) for e, m in codes]
            if grid == list(self.magnitudes):
                return bits
        return None

    @property
    def significant_bits(self) -> int:
        """The binary digits from the first 1 of a magnitude to the last, of the magnitude that has most."""
        numerators = (magnitude.as_integer_ratio()[0] for magnitude in self.magnitudes[1:])
        return max((n // (n & -n)).bit_length() for n in numerators)

    @property
    def smallest_normal(self) -> float:
        """The smallest magnitude that is not subnormal; 0 in a format that is not a small float."""
        return 0.0 if self.mantissa_bits is None else self.magnitudes[1] * 2.0**self.mantissa_bits


FORMATS: dict[str, ElementFormat] = {
    f.name: f
    for f in (
        ElementFormat("e2m1", (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
        ElementFormat("e3m0", (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)),
        ElementFormat("e1m2", (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75)),  # INT4 from -7 to 7, over 4
    )
}


@dataclass(frozen=True)
class ScaleFormat:
    """What the scale of a block may be: c 2^e with `fraction` bits behind the first of c, and zero.

    Args:
        fraction: bits of the fraction; None for float32 itself.
        emin: exponent of the smallest normal number.
        subnormal: whether there are multiples of 2^(emin - fraction) below it.
        max: the largest number; what is larger becomes it.
        bias: of the exponent in a code of a byte, (exponent + bias) << fraction | fraction; None where codes are the
            first bytes of the float32 number, two where there are fraction bits, else all four.
    """

    name: str
    fraction: int | None
    emin: int
    subnormal: bool
    max: float
    bias: int | None = None

    @property
    def smallest(self) -> float:
        """The smallest number above zero."""
        return 2.0 ** (self.emin - (self.fraction or 0 if self.subnormal else 0))

    @property
    def code_bytes(self) -> int:
        """Of a code."""
        return 1 if self.bias is not None else 4 if self.fraction is None else 2

    def value(self, code: int) -> float:
        """The number of a code; meant for formats of three fraction bits with a bias."""
        exponent, fraction = divmod(code, 1 << self.fraction)
        if exponent == 0:
            return fraction * 2.0 ** (self.emin - self.fraction)
        return (fraction + (1 << self.fraction)) * 2.0 ** (exponent - self.bias - self.fraction)


# UE5M3 is defined in two ways: with NaN at 0xFF alone (AMD, Intel, PTX), or with the top exponent reserved (Graphcore).
SCALE_FORMATS: dict[str, ScaleFormat] = {
    f.name: f
    for f in (
        ScaleFormat("e8m0", 0, -127, False, 2.0**127, 127),
        ScaleFormat("e8m3", 3, -126, False, 1.875 * 2.0**127),
        ScaleFormat("e4m3", 3, -6, True, 448.0, 7),
        ScaleFormat("ue5m3", 3, -14, True, 114688.0, 15),
        ScaleFormat("ue5m3_61440", 3, -14, True, 61440.0, 15),
        ScaleFormat("fp32", None, -126, True, (2 - 2.0**-23) * 2.0**127),
    )
}
