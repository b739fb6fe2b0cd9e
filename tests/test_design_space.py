"""The design space of quantizers: errors and biases as measured before, invariants, every word at its off value."""

from __future__ import annotations

import dataclasses
import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from test_reference import assert_same_bits

from quantization import QuantizerSpec, fake_quantize
from quantization.backends.reference import block_scales, to_blocks
from quantization.formats import FORMATS, SCALE_FORMATS, ElementFormat
from quantization.noise import Noise, uniform
from quantization.policy import Policy
from quantization.recipes import build_recipe
from quantization.spec import LinearRecipe, Rotation
from quantization.words import ROUNDINGS

B16 = QuantizerSpec(block_size=16)
NVFP4 = dataclasses.replace(B16, scale_format="e4m3", outer="pow2")
UNBIASED = {
    "truncation_free": QuantizerSpec(),
    "three_quarter": QuantizerSpec(scale_rule="three_quarter"),
    "e8m3 target 16/17": dataclasses.replace(B16, scale_format="e8m3", target=6 * 16 / 17),
    "nvfp4 target 16/17": dataclasses.replace(NVFP4, target=6 * 16 / 17),
    "fp32": dataclasses.replace(B16, scale_format="fp32"),
    "e4m3 up": dataclasses.replace(B16, scale_format="e4m3", scale_rounding="up"),
}
# 1000 times the mean squared error on N(0, 1), rounded to nearest and stochastically, to three digits.
ERRORS = {
    "floor 32": (QuantizerSpec(scale_rule="floor"), 13.2, 25.2),
    "truncation_free 32": (QuantizerSpec(), 13.3, 27.1),
    "three_quarter 32": (QuantizerSpec(scale_rule="three_quarter"), 13.9, 28.2),
    "even 32": (QuantizerSpec(scale_rule="even"), 12.5, 25.2),
    "overflow_aware 32": (QuantizerSpec(scale_rule="overflow_aware"), 12.5, 25.0),
    "e8m0 16": (B16, 12.7, 25.9),
    "nvfp4 16": (NVFP4, 9.04, 18.9),
    "e4m3 32": (QuantizerSpec(scale_format="e4m3"), 10.3, 21.3),
    "ue5m3 16": (dataclasses.replace(B16, scale_format="ue5m3"), 9.04, 18.9),
    "ue5m3 32": (QuantizerSpec(scale_format="ue5m3"), 10.3, 21.2),
    "fp32 16": (dataclasses.replace(B16, scale_format="fp32"), 8.86, 17.8),
    "fp32 32": (QuantizerSpec(scale_format="fp32"), 10.2, 20.6),
    "target 16/17": (dataclasses.replace(NVFP4, target=6 * 16 / 17), 10.6, 23.6),
    "16 x 16": (dataclasses.replace(NVFP4, block_rows=16), 12.4, None),
}


def stochastic(spec: QuantizerSpec) -> QuantizerSpec:
    return dataclasses.replace(spec, rounding="stochastic")


@pytest.fixture(scope="module")
def normal() -> torch.Tensor:
    return torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ERRORS)
def test_mean_squared_errors_on_a_normal_distribution(name, normal):
    spec, nearest, random = ERRORS[name]
    error = 1000 * float((fake_quantize(normal, spec) - normal).double().square().mean())
    assert error == pytest.approx(nearest, rel=0.01)
    if random is not None:
        error = 1000 * float((fake_quantize(normal, stochastic(spec), seed=1) - normal).double().square().mean())
        assert error == pytest.approx(random, rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Bias
# ---------------------------------------------------------------------------------------------------------------------


def gain(x: torch.Tensor, spec: QuantizerSpec) -> tuple[float, float]:
    """<x, Q(x)> / <x, x> - 1 under stochastic rounding and its standard error, which the noise alone makes."""
    x, q = x.double(), fake_quantize(x, stochastic(spec), seed=3).double()
    square = x.square().sum()
    return float((x * (q - x)).sum() / square), float((x * (q - x)).square().sum().sqrt() / square)


@pytest.mark.parametrize("name", UNBIASED)
def test_stochastic_rounding_without_clipping_has_no_gain(name, normal):
    value, error = gain(normal, UNBIASED[name])
    assert abs(value) < 4 * error and error < 2e-4


@pytest.mark.parametrize(
    ("spec", "expected", "digit"),
    [
        (NVFP4, -0.0033, 1e-4),  # the e4m3 scale rounds down and the largest number of a block is clipped
        (QuantizerSpec(scale_rule="floor"), -0.010, 1e-3),
        (QuantizerSpec(scale_rule="even"), -0.002, 1e-3),
    ],
    ids=str,
)
def test_stochastic_rounding_with_clipping_is_biased_by_so_much(spec, expected, digit, normal):
    value, error = gain(normal, spec)
    assert abs(value) > 10 * error and value == pytest.approx(expected, abs=digit / 2 + 4 * error)


@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_of_every_element_over_many_draws_is_the_element(name):  # T9
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(4)) * 3
    draws = 4096
    many = x.repeat(draws, 1)
    q = fake_quantize(many, stochastic(UNBIASED[name]), seed=9).double()
    error = q.std(dim=0) / math.sqrt(draws)
    z = (q.mean(0) - x[0].double()) / error.clamp(min=1e-7)
    assert z.abs().max() < 5
    # The control: where the largest number is clipped its mean is not that number.
    clipped = torch.full((draws, 16), 6.3)
    q = fake_quantize(clipped, stochastic(dataclasses.replace(NVFP4, outer="none")), seed=9)
    assert (q.mean(0) - 6.3).abs().min() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Invariants
# ---------------------------------------------------------------------------------------------------------------------

OFF = {
    "scale_format": "e8m0",
    "scale_rounding": "nearest",
    "block_rows": 1,
    "target": None,
    "outer": "none",
    "outer_delay": 0,
    "target_scale": None,
    "arithmetic": "exact",
    "correction": 1.0,
    "gradient": "ste",
}


def test_every_word_has_an_off_value_which_is_the_paper_s_quantizer():  # T2
    names = [f.name for f in dataclasses.fields(QuantizerSpec)][5:]
    assert set(names) == set(OFF)
    for name, value in OFF.items():
        spec = QuantizerSpec("e2m1", "floor", "stochastic", 0, 32, **{name: value})
        assert spec.plain and spec == QuantizerSpec("e2m1", "floor", "stochastic", 0, 32)
    assert not QuantizerSpec(scale_rule="even").plain
    assert not any(QuantizerSpec(**{name: value}).plain for name, value in (("correction", 1.5), ("block_rows", 32)))


@pytest.mark.parametrize("name", OFF)
def test_a_word_at_its_off_value_leaves_the_paper_s_bits(name, normal):  # T2, by ml_dtypes
    x = normal[:64]
    exponent = torch.frexp(x.view(64, -1, 32).abs().amax(-1, keepdim=True))[1] - 1 - 2  # floor of the logarithm
    latents = torch.ldexp(x.view(64, -1, 32), -exponent).numpy()
    codes = torch.from_numpy(latents.clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    spec = QuantizerSpec("e2m1", "floor", "nearest_even", -1, 32, **{name: OFF[name]})
    assert_same_bits(fake_quantize(x, spec), torch.ldexp(codes, exponent).view_as(x))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("element", FORMATS)
def test_every_code_is_rounded_to_itself(element, rounding):
    grid = torch.tensor(FORMATS[element].magnitudes)
    x = torch.cat([grid, -grid]).repeat(64, 1)  # under many draws
    for name, fmt in SCALE_FORMATS.items():
        spec = QuantizerSpec(element, rounding=rounding, block_size=x.shape[1], scale_format=name)
        step = 2.0 ** -(3 if fmt.fraction is None else fmt.fraction)
        for scale in (1.0, 2.0**-5) if fmt.fraction == 0 else (1.0, 1 + step, 2.0**-5 * (2 - step)):
            assert_same_bits(fake_quantize(x * scale, spec, seed=1), x * scale)


SCALED = [
    QuantizerSpec(scale_rule="even"),
    QuantizerSpec(scale_rule="three_quarter"),
    *(dataclasses.replace(B16, scale_format=name) for name in ("e8m3", "ue5m3", "fp32")),
    NVFP4,
    dataclasses.replace(NVFP4, target=6 * 16 / 17, block_rows=16),
]


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("spec", SCALED, ids=str)
def test_a_power_of_two_scales_the_result(spec, rounding):  # T4
    spec = dataclasses.replace(spec, rounding=rounding)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
    for k in (-3, 1, 5):
        assert torch.equal(fake_quantize(x * 2.0**k, spec, seed=1), fake_quantize(x, spec, seed=1) * 2.0**k)
    single = dataclasses.replace(B16, scale_format="e4m3", rounding=rounding)  # the control: its scales have subnormals
    assert not torch.equal(fake_quantize(x * 2.0**-9, single, seed=1), fake_quantize(x, single, seed=1) * 2.0**-9)


@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "stochastic"])
@pytest.mark.parametrize("spec", SCALED, ids=str)
def test_the_sign_of_a_number_is_that_of_its_result_and_nothing_more(spec, rounding):  # T5
    spec = dataclasses.replace(spec, rounding=rounding)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(6))
    assert torch.equal(fake_quantize(-x, spec, seed=1), -fake_quantize(x, spec, seed=1))


def test_permuting_blocks_permutes_results():  # T6
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(7))
    order = torch.randperm(4, generator=torch.Generator().manual_seed(8))

    def permuted(y: torch.Tensor) -> torch.Tensor:
        return y.view(32, 4, 16)[:, order].reshape(32, 64)

    for spec in (NVFP4, dataclasses.replace(NVFP4, outer="fp32", arithmetic="te")):
        assert torch.equal(fake_quantize(permuted(x), spec), permuted(fake_quantize(x, spec)))


def test_a_block_whose_halves_have_equal_scales_is_two_blocks():  # T7
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(9))
    for name in ("e8m0", "e4m3", "ue5m3", "e8m3"):
        whole = QuantizerSpec(scale_format=name)
        halves = dataclasses.replace(whole, block_size=16)
        alike = (block_scales(x, whole) == block_scales(x, halves)).all(1)
        assert 10 < alike.sum() < 256
        for rounding in ("nearest_even", "stochastic"):
            one, two = (fake_quantize(x, dataclasses.replace(s, rounding=rounding), seed=2) for s in (whole, halves))
            assert torch.equal(one[alike], two[alike]) and not torch.equal(one, two)


def test_powers_of_two_over_17_octaves_are_e4m3_codes_times_one_power_of_two():  # T8
    fmt = SCALE_FORMATS["e4m3"]
    codes = {fmt.value(code) for code in range(0x7F)}
    octaves = [e for e in range(-30, 30) if 2.0**e in codes]
    assert octaves == list(range(-9, 9)) and octaves[-1] - octaves[0] == 17


def test_wide_scales_and_a_power_of_two_give_the_same_elements():
    """e8m3, ue5m3 and e4m3 under a power of two are one quantizer where e4m3's scale is normal."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(10)) * torch.logspace(-1, 1, 64).unsqueeze(1)
    results = [
        fake_quantize(x, s) for s in (NVFP4, *(dataclasses.replace(B16, scale_format=n) for n in ("e8m3", "ue5m3")))
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    wide = x * torch.logspace(-6, 0, 64).unsqueeze(1)  # the control: subnormal scales are others
    assert not torch.equal(
        fake_quantize(wide, NVFP4), fake_quantize(wide, dataclasses.replace(B16, scale_format="e8m3"))
    )


@pytest.mark.parametrize(("size", "name", "outer"), [(16, "e4m3", "pow2"), (32, "e8m0", "none"), (16, "e8m3", "none")])
def test_square_blocks_make_one_weight_of_both_uses(size, name, outer):
    """q4 of W is q2 of W transposed, bit for bit; with long blocks it is not."""
    w = torch.randn(70, 50, generator=torch.Generator().manual_seed(11))
    for rows, equal in ((size, True), (1, False)):
        q2, q4 = (
            QuantizerSpec(block_size=size, block_rows=rows, scale_format=name, outer=outer, axis=axis)
            for axis in (-1, 0)
        )
        assert torch.equal(fake_quantize(w, q2), fake_quantize(w, q4)) is equal
        assert torch.equal(fake_quantize(w.t(), q4).t(), fake_quantize(w, q2))
    q2 = dataclasses.replace(q2, block_rows=size)
    assert to_blocks(w, q2).values.shape == (-(-70 // size), -(-50 // size), size * size)


def test_draws_of_scales_are_no_draws_of_elements():
    noise = Noise.from_seed(1)
    assert not torch.equal(uniform((4, 8), noise), uniform((4, 8), noise, 2**31))
    assert torch.equal(uniform((6, 8), noise)[2:], uniform((4, 8), noise, 2))


# ---------------------------------------------------------------------------------------------------------------------
# What does not go together
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"element": "e3m0", "scale_rule": "three_quarter"}, "scale_rule three_quarter is made for e2m1"),
        ({"target": 4.0}, "target 4.0 needs another scale_format than e8m0"),
        ({"outer": "pow2"}, "outer pow2 needs another scale_format"),
        ({"scale_format": "e4m3", "scale_rule": "floor"}, "scale_rule floor is one of e8m0 scales"),
        ({"scale_format": "e8m3", "outer": "pow2"}, "an outer scale needs scales of a narrow range"),
        ({"scale_format": "e4m3", "outer_delay": 3}, "outer is none"),
        ({"scale_format": "e4m3", "outer": "pow2", "target_scale": 449.0}, "target_scale is at most 448"),
        ({"scale_format": "e4m3", "outer": "fp32"}, "needs an arithmetic"),
        ({"scale_format": "e4m3", "arithmetic": "te"}, "that of an fp32 outer scale"),
        ({"scale_format": "ue5m3", "arithmetic": "torchao"}, "goes with e2m1, nearest e4m3 scales"),
        ({"block_rows": 8}, "block_rows must be 1 or block_size"),
        ({"scale_format": "e4m3", "target": 0.0}, "target must be a positive number"),
        ({"correction": math.inf}, "correction must be a positive number"),
        ({"outer_delay": -1}, "outer_delay must be a whole number"),
        ({"outer_delay": 2**40}, "outer_delay must be a whole number from 0 to"),
        ({"block_size": True}, "block_size must be a whole number"),
        ({"block_size": 16.0}, "block_size must be a whole number"),
        ({"axis": True}, "axis must be a whole number"),
        ({"block_size": 16, "block_rows": 16.0}, "block_rows must be 1 or block_size"),
        ({"element": ["e2m1"]}, "element must be one of"),
        ({"scale_format": {}}, "scale_format must be one of"),
        ({"correction": 1e300}, "correction must be a positive number, from"),
        ({"correction": None}, "correction must be a positive number"),
        ({"scale_format": "fp32", "target": 10**400}, "target must be a positive number, from"),
        ({"scale_format": "fp32", "target": 1e-320}, "target must be a positive number, from"),
        ({"scale_format": "e4m3", "outer": "pow2", "target_scale": 0.5}, "times target_scale must be at least 4"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        QuantizerSpec(**fields)


def test_an_added_element_is_asked_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = ElementFormat("levels", (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0))
    fine = ElementFormat("fine", (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.75))  # 4 significant bits, one more than E5M2
    monkeypatch.setitem(FORMATS, "levels", levels)
    monkeypatch.setitem(FORMATS, "fine", fine)
    assert [FORMATS[name].significant_bits for name in ("e2m1", "e3m0", "e1m2", "fine")] == [2, 1, 3, 4]
    with pytest.raises(ValueError, match="scale_rule even needs an element whose next number is known"):
        QuantizerSpec("levels", "even")
    assert fake_quantize(torch.ones(2, 32), QuantizerSpec("levels")).isfinite().all()
    with pytest.raises(ValueError, match="q1 has element levels of 53 significant bits, more than 4"):
        build_recipe(activation_weight="levels", carrier="fp8")
    with pytest.raises(ValueError, match="q3 has element fine of 4 significant bits, more than 3"):
        build_recipe(gradient="fine", carrier="fp8")
    assert build_recipe(activation_weight="fine", carrier="fp8").carrier == "fp8"


@pytest.mark.parametrize("target", [2.0**-20, 0.01, 1.0, 1.0625, 2.0**20])
@pytest.mark.parametrize("name", ["e4m3", "ue5m3", "e8m3", "fp32"])
def test_no_finite_number_becomes_nan_under_any_target(name, target):
    outer = "pow2" if name in ("e4m3", "ue5m3") and target >= 1 else "none"
    spec = QuantizerSpec(block_size=16, scale_format=name, outer=outer, target=target)
    largest = torch.finfo(torch.float32).max
    x = torch.full((3, 16), 1.0)
    x[:, 0] = torch.tensor([largest, -largest, largest * (1 - 2.0**-20)])
    for rounding, scales in itertools.product(("nearest_even", "stochastic"), ("nearest", "up")):
        own = dataclasses.replace(spec, rounding=rounding, scale_rounding=scales)
        assert not fake_quantize(x, own, seed=1).isnan().any()


def test_numbers_of_numpy_are_python_s_in_the_text_of_a_spec():
    spec = QuantizerSpec(scale_format="e4m3", target=np.float64(4.0), correction=np.float64(2.0))
    assert spec == QuantizerSpec(scale_format="e4m3", target=4, correction=2) == QuantizerSpec.parse(spec.text)
    assert type(spec.target) is type(spec.correction) is float


@pytest.mark.parametrize("size", [True, 16.0, "16", 3, None])
def test_the_size_of_a_rotation_is_a_power_of_two(size):
    with pytest.raises(ValueError, match="the size of a rotation must be one of"):
        Rotation(size)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"first": True}, "first must be a whole number"),
        ({"last": -1}, "last must be a whole number"),
        ({"spare": {"*.fc2": ("output",)}}, "spare must be a tuple of pairs"),
        ({"spare": "*.fc2"}, "spare must be a tuple of pairs"),
        ({"spare": ("*.fc2", ("output",))}, "spare must be a tuple of pairs"),
        ({"spare": (("*.fc2", "output"),)}, "spare must be a tuple of pairs"),
        ({"spare": (("*.fc2", ["output"]),)}, "spare must be a tuple of pairs"),
        ({"spare": (("*.fc2", ()),)}, "spare names no product of the layers"),
        ({"spare": (("*.fc2", ("backward",)),)}, "every product of spare must be one of"),
        ({"spare": (("", ("output",)),)}, "spare names layers by a pattern"),
    ],
)
def test_other_policies_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Policy(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"x": [1.0]}, "takes a dense tensor as x; got list"),
        ({"x": None}, "takes a dense tensor as x; got NoneType"),
        ({"shadow": [1.0]}, "takes a dense tensor as shadow; got list"),
        ({"seed": 1.5}, "a seed is an integer or a Noise; got 1.5"),
        ({"seed": "1"}, "a seed is an integer or a Noise"),
    ],
)
def test_what_is_no_tensor_or_no_seed_is_refused(fields, sentence):
    with pytest.raises(TypeError, match=sentence):
        fake_quantize(**{"x": torch.ones(2, 32), "spec": stochastic(QuantizerSpec()), **fields})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"q1": NVFP4}, "q1 has e4m3 scales"),
        ({"q5": QuantizerSpec(scale_rule="three_quarter")}, "q5 has scale_rule three_quarter"),
        ({"q2": QuantizerSpec(block_rows=32)}, "q2 has square blocks"),
        ({"q3": QuantizerSpec(correction=1.5)}, "q3 has a correction"),
        ({"rotate_grad_weight": Rotation(16)}, "goes with no rotation; grad_weight has one"),
    ],
)
def test_what_fp8_cannot_hold_exactly_is_refused(fields, sentence):
    LinearRecipe(**fields)
    with pytest.raises(ValueError, match=sentence):
        LinearRecipe(**fields, carrier="fp8")


@pytest.mark.parametrize("spec", [*SCALED, *UNBIASED.values(), dataclasses.replace(NVFP4, outer_delay=50)], ids=str)
def test_the_text_of_a_spec_is_read_back(spec):
    for axis, gradient in itertools.product((-1, 0), ("ste", "mask")):
        own = dataclasses.replace(spec, axis=axis, gradient=gradient, correction=1 / 3)
        assert QuantizerSpec.parse(own.text) == own and " " not in own.text
