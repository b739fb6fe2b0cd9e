"""Element formats against bit patterns and against ml_dtypes."""

import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest

from quantization.formats import FORMATS, SCALE_MAX, SCALE_MIN, ElementFormat


def decode(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """The magnitude of a code of a small floating-point format without infinities and NaN."""
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    assert exponent < 1 << exponent_bits
    return math.ldexp(fraction, 1 - bias) if exponent == 0 else math.ldexp(1 + fraction, exponent - bias)


def test_magnitudes_are_those_of_the_specification():
    assert FORMATS["e2m1"].magnitudes == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert FORMATS["e3m0"].magnitudes == (0, 0.25, 0.5, 1, 2, 4, 8, 16)
    assert FORMATS["e1m2"].magnitudes == (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75)
    assert set(FORMATS) == {"e2m1", "e3m0", "e1m2"}


def test_a_magnitude_stands_at_the_index_of_its_code():
    assert FORMATS["e2m1"].magnitudes == tuple(decode(code, 2, 1, bias=1) for code in range(8))
    assert FORMATS["e3m0"].magnitudes == tuple(decode(code, 3, 0, bias=3) for code in range(8))
    assert FORMATS["e1m2"].magnitudes == tuple(decode(code, 1, 2, bias=1) for code in range(8))


def test_e2m1_has_the_code_points_of_ml_dtypes():
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert FORMATS["e2m1"].magnitudes == tuple(values[:8])
    assert tuple(-m for m in FORMATS["e2m1"].magnitudes) == tuple(values[8:])


@pytest.mark.parametrize(("name", "largest", "emax", "significand"), [("e2m1", 6, 2, 1.5), ("e3m0", 16, 4, 1.0)])
def test_derived_numbers_of_the_largest_magnitude(name, largest, emax, significand):
    fmt = FORMATS[name]
    assert (fmt.max, fmt.emax, fmt.max_significand) == (largest, emax, significand)


@pytest.mark.parametrize(("name", "bits", "normal"), [("e2m1", 1, 1.0), ("e3m0", 0, 0.25)])
def test_mantissa_bits_and_the_smallest_normal_magnitude(name, bits, normal):
    assert (FORMATS[name].mantissa_bits, FORMATS[name].smallest_normal) == (bits, normal)


def test_a_grid_that_is_no_small_float_has_no_mantissa_bits():
    for magnitudes in ((0.0, 1.0, 3.0, 4.0), (0.0, 0.75, 1.5, 2.25)):
        odd = ElementFormat("odd", magnitudes)
        assert odd.mantissa_bits is None and odd.smallest_normal == 0
    assert ElementFormat("even", (0.0, 1.0, 2.0, 3.0)).mantissa_bits == 1


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_magnitudes_rise_from_zero_and_every_record_bears_its_key(fmt):
    assert fmt.magnitudes[0] == 0
    assert all(a < b for a, b in zip(fmt.magnitudes, fmt.magnitudes[1:], strict=False))
    assert FORMATS[fmt.name] is fmt


def test_scale_exponents_are_those_of_e8m0():
    scales = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert scales[0] == 2.0**SCALE_MIN and scales[254] == 2.0**SCALE_MAX
    assert np.isnan(scales[255])


def test_formats_are_frozen_and_hashable():
    fmt = ElementFormat("e2m1", (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
    assert fmt == FORMATS["e2m1"] and hash(fmt) == hash(FORMATS["e2m1"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.name = "other"
