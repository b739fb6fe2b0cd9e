"""Element formats of microscaling blocks, as records. To add a format, add a record to FORMATS.

A block is 32 elements that share one E8M0 scale S = 2^s, s in [-127, 127] (paper, section 3.1: X_i = P_i * 2^s).
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
    def smallest_normal(self) -> float:
        """The smallest magnitude that is not subnormal; 0 in a format that is not a small float."""
        return 0.0 if self.mantissa_bits is None else self.magnitudes[1] * 2.0**self.mantissa_bits


FORMATS: dict[str, ElementFormat] = {
    f.name: f
    for f in (
        ElementFormat("e2m1", (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
        ElementFormat("e3m0", (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)),
    )
}
