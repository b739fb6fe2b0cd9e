"""Scale formats, their rounding and the quantizers that have them: against exact fractions, ml_dtypes, gfloat, torchao
and TransformerEngine's formula written out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from fractions import Fraction

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from quick import some
from test_reference import assert_same_bits, ulps

from quantization import QuantizerSpec, fake_quantize
from quantization.backends.reference import block_latents, block_scales, quantized
from quantization.backends.scales import OUTER_MIN, coded, largest_of, outer_exponent, scale_exponent
from quantization.formats import FORMATS, SCALE_FORMATS
from quantization.noise import Noise, uniform
from quantization.words import toward_zero

CODED = ("e8m3", "e4m3", "ue5m3", "ue5m3_61440")
TARGETS = (None, 4.0, 6 * 16 / 17, 6.072)
NOISE = Noise(torch.tensor([12345, 7 << 32]), 3)
NVFP4 = QuantizerSpec(block_size=16, scale_format="e4m3")


# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def codes_of(name: str) -> list[Fraction]:
    """Every number of a format in ascending order, zero first; of e8m3 some at both ends and in the middle."""
    if name == "e8m3":
        exponents = (*range(-126, -99), *range(-20, 21), *range(100, 128))
        return [Fraction(0)] + [Fraction(8 + f, 8) * Fraction(2) ** e for e in exponents for f in range(8)]
    fmt, codes, code = SCALE_FORMATS[name], [], 0
    while (value := fmt.value(code)) <= fmt.max:
        codes.append(Fraction(value))
        code += 1
    return codes


def test_e4m3_has_the_numbers_of_ml_dtypes_and_torch():
    ours = [float(c) for c in codes_of("e4m3")]
    assert ours == np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64).tolist()
    assert ours == torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()


def ue5m3_of_gfloat() -> gfloat.FormatInfo:
    return gfloat.FormatInfo(
        name="ue5m3",
        k=8,
        precision=4,
        bias=15,
        is_signed=False,
        domain=gfloat.Domain.Finite,
        has_nz=False,
        num_high_nans=1,
        has_subnormals=True,
        is_twos_complement=False,
    )


def test_ue5m3_has_the_numbers_of_gfloat():
    values = [gfloat.decode_float(ue5m3_of_gfloat(), code).fval for code in range(256)]
    assert [float(c) for c in codes_of("ue5m3")] == values[:255] and math.isnan(values[255])
    assert SCALE_FORMATS["ue5m3"].max == values[254] == 114688
    # The other definition reserves the top exponent: eight codes fewer.
    assert [float(c) for c in codes_of("ue5m3_61440")] == values[:248] and values[247] == 61440


def test_ue5m3_rounds_as_gfloat_on_all_codes_and_midpoints_and_next_to_them():
    codes = torch.tensor([float(c) for c in codes_of("ue5m3")])
    midpoints = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([x for y in (codes, midpoints) for x in (y, ulps(y, 1), ulps(y[1:], -1))])
    values = values[values >= 0]
    spec = QuantizerSpec(scale_format="ue5m3", target=1.0)
    ours = coded(values, spec, None, None)
    info, most = ue5m3_of_gfloat(), 114688.0
    expected = [gfloat.round_float(info, min(v, most), rnd=gfloat.RoundMode.TiesToEven) for v in values.tolist()]
    assert ours.tolist() == expected


def test_values_of_e4m3_are_torch_s_casts():
    values = torch.exp2(torch.empty(200_000).uniform_(-12, 9, generator=torch.Generator().manual_seed(0)))
    ours = coded(values, QuantizerSpec(scale_format="e4m3", target=1.0), None, None)
    assert torch.equal(ours, values.clamp(max=448).to(torch.float8_e4m3fn).float())


# ---------------------------------------------------------------------------------------------------------------------
# The scale of a block
# ---------------------------------------------------------------------------------------------------------------------


def oracle_code(ratio: Fraction, name: str, rounding: str, u: Fraction | None = None) -> Fraction:
    """The code of M / (P target), by trying all codes of the format."""
    codes = codes_of(name)
    ratio = min(ratio, codes[-1])
    below = max(c for c in codes if c <= ratio)
    above = min((c for c in codes if c >= ratio), default=below)
    if rounding == "up" or below == above:
        return above
    if rounding == "stochastic":
        return above if (ratio - below) / (above - below) + u > 1 else below
    if ratio - below != above - ratio:
        return below if ratio - below < above - ratio else above
    # A code's last bit is that of its place; e8m3 has zero before its first number of an even one, and a tie is zero.
    odd = codes.index(below) % 2 == (name != "e8m3") and below > 0
    return above if odd else below


def maxima(spec: QuantizerSpec) -> torch.Tensor:
    """Block maxima at and next to target times codes and midpoints between them, and others."""
    codes = codes_of(spec.scale_format)[:: 3 if spec.scale_format == "e8m3" else 1]
    numbers = [c for pair in itertools.pairwise(codes) for c in (pair[0], sum(pair) / 2)]
    largest = torch.finfo(torch.float32).max
    exact = torch.tensor([min(float(c * Fraction(spec.aim)), largest) for c in numbers], dtype=torch.float32)
    values = torch.cat([exact, ulps(exact, 1), ulps(exact[1:], -1)])
    return values[(values >= 0) & values.isfinite()]


@pytest.mark.parametrize("rounding", ["nearest", "up", "stochastic"])
@pytest.mark.parametrize("target", some(TARGETS, every=2))
@pytest.mark.parametrize("name", CODED)
def test_the_scale_is_the_code_of_the_exact_quotient(name, target, rounding):
    spec = QuantizerSpec(scale_format=name, target=target, scale_rounding=rounding)
    values = maxima(spec)
    values = values[values <= (spec.aim * 2.0**-101 if name == "e8m3" else 1e9)][::3]
    u = uniform((len(values),), NOISE)
    scales = coded(values, spec, None, u)
    aim = Fraction(spec.aim)
    pairs = zip(values.tolist(), u.tolist(), strict=True)
    expected = [float(oracle_code(Fraction(m) / aim, name, rounding, Fraction(v))) for m, v in pairs]
    assert scales.tolist() == expected


def test_targets_are_cut_to_float32_so_that_they_are_never_more():
    assert toward_zero(6 * 16 / 17) <= 6 * 16 / 17 < 6 * 16 / 17 + 1e-7
    assert Fraction(toward_zero(6 * 16 / 17)) <= Fraction(96, 17)
    assert all(toward_zero(x) == x for x in (6.0, 4.0, 1.5, 2.0**100))
    nearest = np.float32(6.072)
    assert toward_zero(6.072) in (float(nearest), float(np.nextafter(nearest, np.float32(0))))


@pytest.mark.parametrize(
    ("rule", "lowest", "highest", "closed"),
    [
        ("floor", 4, 8, "lowest"),
        ("truncation_free", 3, 6, "highest"),
        ("three_quarter", 4, 8, "lowest"),  # of M over the power of two; over 4/3 of it from 3 to 6
        ("even", 3.5, 7, "lowest"),
        ("overflow_aware", 3.625, 7.25, "highest"),
    ],
)
def test_a_rule_of_e8m0_brings_the_maximum_into_its_interval(rule, lowest, highest, closed):
    significands = torch.arange(1, 2, 2.0**-10)
    edges = torch.tensor([1.5, 1.75, 1.8125, 1.0])
    significands = torch.cat([significands, ulps(edges, 1), ulps(edges[:3], -1)])
    for exponent in (-100, -3, 0, 7, 100):
        m = significands * 2.0**exponent
        s = scale_exponent(m, FORMATS["e2m1"], rule)
        place = m.double() / torch.exp2(s.double())
        assert (place >= lowest).all() and (place <= highest).all()
        outside = (place == highest) if closed == "lowest" else (place == lowest)
        assert not outside.any()
    assert place.min() < lowest * 1.01 and place.max() > highest * 0.99  # the control: it is all used


def test_even_is_torchao_s():
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    scales, _ = to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.EVEN)
    ours = block_scales(x, QuantizerSpec(scale_rule="even"))[:, ::32]
    assert torch.equal(ours, scales.view(torch.uint8).double().sub(127).exp2().float().view(ours.shape))


@pytest.mark.parametrize("target_scale", [None, 256.0])
def test_the_outer_scale_is_the_smallest_power_of_two_that_reaches(target_scale):
    spec = dataclasses.replace(NVFP4, outer="pow2", target_scale=target_scale)
    reach = 6 * (target_scale or 448)
    edges = torch.tensor([reach * 2.0**e for e in (-60, -9, 0, 3, 90)])
    for a in torch.cat([edges, ulps(edges, 1), ulps(edges, -1)]):
        p = int(outer_exponent(a, spec))
        assert float(a) <= reach * 2.0**p and float(a) > reach * 2.0 ** (p - 1)
    assert int(outer_exponent(torch.tensor(0.0), spec)) == 0
    assert int(outer_exponent(torch.tensor(1e-38), spec)) == OUTER_MIN


# ---------------------------------------------------------------------------------------------------------------------
# Elements
# ---------------------------------------------------------------------------------------------------------------------


def oracle_element(x: float, scale: Fraction, fmt, rounding: str, u: float) -> float:
    """One element among multiples of its scale, in exact arithmetic."""
    if not scale:
        return math.copysign(0.0, x)
    grid = [Fraction(m) for m in fmt.magnitudes]
    latent = min(abs(Fraction(x)) / scale, grid[-1])
    a = max(g for g in grid if g <= latent)
    b = min((g for g in grid if g >= latent), default=a)
    if a == b:
        picked = a
    elif rounding == "stochastic":
        picked = b if (latent - a) / (b - a) + Fraction(u) > 1 else a
    elif latent - a != b - latent:
        picked = a if latent - a < b - latent else b
    else:
        even = a if grid.index(a) % 2 == 0 else b
        picked = {"nearest_even": even, "nearest_away": b, "nearest_up": b if x > 0 else a}[rounding]
    return math.copysign(float(picked * scale), x)


def boundary_bits(name: str) -> int:
    """The significant bits of magnitudes and of midpoints between them, of the one that has most."""
    numbers = [Fraction(m) for m in FORMATS[name].magnitudes]
    numerators = [n.numerator for n in (*numbers[1:], *(sum(pair) / 2 for pair in itertools.pairwise(numbers)))]
    return max((n // (n & -n)).bit_length() for n in numerators)


EXACT = [name for name in FORMATS if boundary_bits(name) <= 20]


def test_the_boundaries_of_elements_have_few_bits():
    assert {name: boundary_bits(name) for name in ("e2m1", "e3m0", "e1m2")} == {"e2m1": 3, "e3m0": 2, "e1m2": 4}
    assert set(EXACT) >= {"e2m1", "e3m0", "e1m2"}


@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "nearest_up", "stochastic"])
@pytest.mark.parametrize("element", EXACT)
@pytest.mark.parametrize(("name", "outer"), [("e4m3", "none"), ("ue5m3", "none"), ("e8m3", "none"), ("e4m3", "pow2")])
def test_every_decision_is_that_of_exact_arithmetic(name, outer, element, rounding):
    """On places of the grid, midpoints and neighbours of both, under scales of many sizes, and small numbers.

    Of elements whose boundaries have 20 significant bits at most: times the four of a scale they are float32 numbers.
    Thirds or quantiles, say, are rounded when a scale multiplies them, and so may be decided otherwise.
    """
    fmt = FORMATS[element]
    spec = QuantizerSpec(element, rounding=rounding, block_size=16, scale_format=name, outer=outer)
    g = torch.Generator().manual_seed(0)
    grid = torch.tensor(fmt.magnitudes)
    places = torch.cat([grid, (grid[1:] + grid[:-1]) / 2])
    scales = torch.tensor([float(c) for c in codes_of(name)[1::9]])[:16]
    x = places[torch.randint(len(places), (len(scales), 16), generator=g)] * scales[:, None]
    x = ulps(x, 0) * torch.randint(0, 2, x.shape, generator=g).mul(2).sub(1)
    moved = torch.where(x == 0, 0, torch.randint(-1, 2, x.shape, generator=g)).int()
    x = (x.view(torch.int32) + moved).view(torch.float32)
    x[:, 0] = fmt.max * scales  # which makes the scale that of `scales`, where it is a code
    u = uniform(x.shape, NOISE)
    ours = fake_quantize(x, spec, seed=NOISE)
    p = Fraction(2) ** int(outer_exponent(largest_of(x), spec)) if outer == "pow2" else Fraction(1)
    for row, values, draws in zip(ours.tolist(), x.tolist(), u.tolist(), strict=True):
        largest = max(abs(Fraction(v)) for v in values)
        scale = p * oracle_code(largest / p / Fraction(fmt.max), name, "nearest")
        assert row == [oracle_element(v, scale, fmt, rounding, d) for v, d in zip(values, draws, strict=True)]


def test_a_block_whose_scale_underflows_is_zeros_with_their_signs():
    x = torch.tensor([[-1.0, 2.0] + [0.5] * 14]) * 2.0**-11
    assert_same_bits(fake_quantize(x, NVFP4), torch.copysign(torch.zeros_like(x), x))
    assert (fake_quantize(x * 8, NVFP4) != 0).any()  # the control
    assert (fake_quantize(x, dataclasses.replace(NVFP4, scale_rounding="up")) != 0).any()


@pytest.mark.parametrize("spec", [NVFP4, dataclasses.replace(NVFP4, scale_format="fp32"), QuantizerSpec(block_size=16)])
def test_what_is_not_finite_makes_its_block_nan_and_no_other(spec):
    for value, rows in itertools.product((math.nan, math.inf, -math.inf), (1, 16)):
        x = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
        x[3, 20] = value
        q = fake_quantize(x, dataclasses.replace(spec, block_rows=rows))
        nan = torch.zeros_like(x, dtype=torch.bool)
        nan[(3 if rows == 1 else slice(16)), 16:] = True
        assert torch.equal(q.isnan(), nan)


def test_a_number_that_is_not_finite_moves_no_outer_scale():
    spec = dataclasses.replace(NVFP4, outer="pow2")
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    y = x.clone()
    y[0, 0] = math.inf
    assert torch.equal(fake_quantize(x, spec)[1:], fake_quantize(y, spec)[1:])


def test_e1m2_is_int4_over_four():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    spec = QuantizerSpec("e1m2", scale_format="e8m3")
    latent = fake_quantize(x, spec) / block_scales(x, spec) * 4
    expected = (x.double() / block_scales(x, spec).double() * 4).round().clamp(-7, 7)
    assert torch.equal(latent.double(), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Against torchao and TransformerEngine
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def tensors() -> list[torch.Tensor]:
    """A million and more bfloat16 values, of tensors of many sizes."""
    g = torch.Generator().manual_seed(5)
    sizes = torch.exp2(torch.linspace(-12, 12, 17))
    return [(torch.randn(256, 256, generator=g) * s).bfloat16().float() for s in sizes]


def numbers_of_torchao(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes of scales, elements) of nvfp4_quantize, both as float32."""
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    scales, packed = nvfp4_quantize(x, 16, scale)
    return scales.float().view(len(x), -1), f4_unpacked_to_f32(unpack_uint4(packed)).view(x.shape)


@pytest.mark.parametrize("outer", ["none", "fp32"])
def test_nvfp4_in_torchao_s_arithmetic_is_torchao_s(outer):
    from torchao.prototype.mx_formats.nvfp4_tensor import per_tensor_amax_to_scale

    spec = dataclasses.replace(NVFP4, outer=outer, arithmetic="torchao")
    for x in tensors():
        scale = per_tensor_amax_to_scale(x.abs().max()) if outer == "fp32" else None
        scales, elements = numbers_of_torchao(x, scale)
        ours = quantized(x, spec)
        assert torch.equal(ours.values, elements * scales.repeat_interleave(16, 1))
        assert (ours.factor is None) == (scale is None) and (scale is None or torch.equal(ours.factor, scale))
    assert sum(x.numel() for x in tensors()) >= 10**6


def test_exact_decisions_differ_from_torchao_s_in_few_numbers_alone():
    """The control of the one above: its arithmetic is another one, by the reciprocals and the smallest code of 2^-6."""
    exact, theirs = NVFP4, dataclasses.replace(NVFP4, arithmetic="torchao")
    large = torch.cat([x for x in tensors() if x.abs().max() > 8])
    share = (fake_quantize(large, exact) != fake_quantize(large, theirs)).float().mean()
    assert share < 1e-3
    small = torch.cat([x for x in tensors() if x.abs().max() < 0.1])
    assert (fake_quantize(small, exact) != fake_quantize(small, theirs)).float().mean() > 0.1


def te_in_numpy(x: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """TransformerEngine's formula, operation by operation in float32: codes of scales, elements, 1 / S_enc."""
    f = np.float32
    a = np.abs(x).max()
    encode = np.minimum(f(2688) / a, np.finfo(f).max)
    r, c = x.shape
    blocks = x.reshape(r // rows, rows, c // 16, 16)
    m = np.abs(blocks).max(axis=(1, 3), keepdims=True)
    code = np.minimum(m * (encode * f(1 / 6)), f(448)).astype(ml_dtypes.float8_e4m3fn).astype(f)
    decode = f(1) / encode
    with np.errstate(divide="ignore", over="ignore"):
        by = np.minimum(f(1) / (code * decode), np.finfo(f).max)
        scaled = np.clip(blocks * by, f(-6), f(6))
    elements = scaled.astype(ml_dtypes.float4_e2m1fn).astype(f)
    return np.broadcast_to(code, blocks.shape).reshape(r, c), elements.reshape(r, c), decode


@pytest.mark.parametrize("rows", [1, 16])
def test_nvfp4_in_te_s_arithmetic_is_its_formula(rows):
    spec = dataclasses.replace(NVFP4, outer="fp32", arithmetic="te", block_rows=rows)
    for x in tensors():
        codes, elements, decode = te_in_numpy(x.numpy(), rows)
        ours = quantized(x, spec)
        assert torch.equal(ours.values, torch.from_numpy(elements * codes))
        assert float(ours.factor) == decode
    # The control: torchao's order of operations gives other numbers.
    theirs = dataclasses.replace(NVFP4, outer="fp32", arithmetic="torchao", block_rows=rows)
    assert any(not torch.equal(quantized(x, theirs).values, quantized(x, spec).values) for x in tensors())


def test_elements_of_e2m1_are_rounded_as_ml_dtypes_rounds_them():
    x = torch.linspace(-6, 6, 96_001)[:96_000].view(-1, 15)
    x = torch.cat([torch.full((len(x), 1), 6.0), x], dim=1)
    expected = torch.from_numpy(x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    for name in (*CODED, "fp32", "e8m0"):
        q = fake_quantize(x, QuantizerSpec(block_size=16, scale_format=name))
        assert torch.equal(q, expected)


# ---------------------------------------------------------------------------------------------------------------------
# What reads scales
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("name", [*CODED, "fp32"])
def test_quantized_weights_over_their_scales_are_on_the_grid(name, rows):
    w = torch.randn(40, 50, generator=torch.Generator().manual_seed(6))
    spec = QuantizerSpec(block_size=16, scale_format=name, block_rows=rows)
    latent = fake_quantize(w, spec).double() / block_scales(w, spec).double()
    grid = torch.tensor(spec.format.magnitudes, dtype=torch.float64)
    distance = (latent.abs().unsqueeze(-1) - grid).abs().amin(-1)
    assert (distance < (1e-6 if name == "fp32" else 1e-30)).all()
    nearest = block_latents(w, spec).clamp(-6, 6)
    assert (latent - nearest).abs().max() <= 1.0 + 1e-6


def test_a_stochastic_scale_has_its_own_draws_and_no_one_scale():
    spec = dataclasses.replace(NVFP4, scale_rounding="stochastic")
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(7))
    a, b = fake_quantize(x, spec, seed=1), fake_quantize(x, spec, seed=2)
    assert not torch.equal(a, b) and torch.equal(a, fake_quantize(x, spec, seed=1))
    with pytest.raises(ValueError, match="no one scale"):
        block_scales(x, spec)
