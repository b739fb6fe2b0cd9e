"""fake_quantize: properties of the quantizers, shapes, dtypes, non-finite values, the shadow weight, errors."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from helpers import environment
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import some

from quantization import QuantizerSpec, fake_quantize
from quantization.noise import Noise

NEAREST = ("nearest_even", "nearest_away", "nearest_up")
ROUNDINGS = (*NEAREST, "stochastic")
GRIDS = {"e2m1": (0, 0.5, 1, 1.5, 2, 3, 4, 6), "e3m0": (0, 0.25, 0.5, 1, 2, 4, 8, 16)}
SPECS = [
    QuantizerSpec(element, scale_rule, rounding)
    for element, scale_rule, rounding in itertools.product(GRIDS, ("truncation_free", "floor"), ROUNDINGS)
]
TRUNCATION_FREE = [spec for spec in SPECS if spec.scale_rule == "truncation_free"]
INT_OF = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
properties = settings(max_examples=30, deadline=None, derandomize=True)
magnitudes = st.floats(2.0**-140, 2.0**120, width=32) | st.sampled_from([0.0, 0.25, 1.0, 1.25, 2.5, 3.5, 5.0, 6.0])
blocks = st.lists(st.builds(math.copysign, magnitudes, st.sampled_from([-1.0, 1.0])), min_size=1, max_size=70).map(
    torch.tensor
)


def assert_same_bits(actual, expected):
    """Equal bit for bit, the sign of zero included; any NaN equals any NaN."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    a, b = (t.contiguous().view(INT_OF[t.dtype]) for t in (actual, expected))
    assert ((a == b) | (actual.isnan() & expected.isnan())).all()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_axis(spec, axis, block_size=32):
    return QuantizerSpec(spec.element, spec.scale_rule, spec.rounding, axis, block_size)


# Properties -----------------------------------------------------------------------------------------------------------


@every_spec
@properties
@given(x=blocks)
def test_quantizing_twice_is_quantizing_once(spec, x):
    """For both scale rules: the largest magnitude of a quantized block gets the same scale, or half of it, on whose
    grid the values lie too. Stochastic rounding included, whatever the second seed."""
    once = fake_quantize(x, spec, seed=1)
    assert_same_bits(fake_quantize(once, spec, seed=2), once)


def test_quantizing_again_along_the_other_axis_changes_values():
    """The control of the test above, and why double quantization needs a second quantizer."""
    x = fake_quantize(normal(64, 64), QuantizerSpec(axis=-1))
    assert not torch.equal(fake_quantize(x, QuantizerSpec(axis=0)), x)


@every_spec
@properties
@given(x=st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=1, max_size=70).map(torch.tensor))
def test_scaling_by_a_power_of_two_commutes(spec, x):
    x = torch.where(x.abs() < 2.0**-40, 0.0, x)
    expected = fake_quantize(x, spec, seed=1)
    for k in (-50, -1, 1, 7, 90):
        assert_same_bits(fake_quantize(x * 2.0**k, spec, seed=1), expected * 2.0**k)


def test_scaling_by_another_factor_does_not_commute():
    x = normal(8, 32)
    assert not torch.allclose(fake_quantize(3 * x, QuantizerSpec()), 3 * fake_quantize(x, QuantizerSpec()))


@pytest.mark.parametrize("spec", [s for s in SPECS if s.rounding != "nearest_up"], ids=str)
@properties
@given(x=blocks)
def test_the_quantizer_is_odd(spec, x):
    assert_same_bits(fake_quantize(-x, spec, seed=1), -fake_quantize(x, spec, seed=1))


def test_nearest_up_is_not_odd_in_ties():
    x = torch.tensor([6.0, 0.25, 2.5, 5.0, -0.25, -2.5, -5.0])
    up = torch.tensor([6.0, 0.5, 3.0, 6.0, -0.0, -2.0, -4.0])
    assert_same_bits(fake_quantize(x, QuantizerSpec(rounding="nearest_up")), up)
    assert not torch.equal(fake_quantize(-x, QuantizerSpec(rounding="nearest_up")), -up)


def between_neighbours(x, spec):
    """Whether each quantized value of a block is the grid value next below or next above its original."""
    q = fake_quantize(x, spec, seed=1).double()
    top = x.abs().max().item()
    grid = GRIDS[spec.element]
    exponents = range(-127, 128)
    if spec.scale_rule == "truncation_free":
        s = next(s for s in exponents if top <= grid[-1] * 2.0**s)
    else:
        s = max((s for s in exponents if math.log2(grid[-1]) // 1 <= math.frexp(top)[1] - 1 - s), default=-127)
    signed = torch.tensor(sorted({sign * g * 2.0**s for g in grid for sign in (-1, 1)}), dtype=torch.float64)
    x = x.double()
    below = torch.stack([signed[signed <= v].max() if (signed <= v).any() else v.new_tensor(-math.inf) for v in x])
    above = torch.stack([signed[signed >= v].min() if (signed >= v).any() else v.new_tensor(math.inf) for v in x])
    return ((q == below) | (q == above)) & below.isfinite() & above.isfinite()


@pytest.mark.parametrize("spec", TRUNCATION_FREE, ids=str)
@properties
@given(x=blocks)
def test_truncation_free_keeps_every_value_between_its_neighbours(spec, x):
    assert between_neighbours(x[:32], spec).all()


def test_floor_saturates_where_truncation_free_does_not():
    """The paper's example (section 3.2): 31 / 4 = 7.75 is beyond 6, while 31 / 8 = 3.875 is not."""
    x = torch.tensor([31.0, 1.0, -29.0, 23.0])
    assert fake_quantize(x, QuantizerSpec(scale_rule="floor"))[0] == 24
    assert fake_quantize(x, QuantizerSpec(scale_rule="truncation_free"))[0] == 32
    assert between_neighbours(x, QuantizerSpec(scale_rule="floor")).tolist() == [False, True, False, True]
    assert between_neighbours(x, QuantizerSpec(scale_rule="truncation_free")).all()


@pytest.mark.parametrize("element", GRIDS)
def test_stochastic_rounding_is_unbiased_in_every_cell_of_the_grid(element):
    """z-test of the mean of 10^6 draws, half of them negative, at three tenths of each cell."""
    rows, scale = 33_000, 2.0**-9
    grid = GRIDS[element]
    sign = torch.tensor([1.0, -1.0]).repeat(rows // 2).unsqueeze(1)
    for i, (a, b) in enumerate(itertools.pairwise(grid)):
        x = torch.full((rows, 32), (a + 0.3 * (b - a)) * scale) * sign
        x[:, 0] = grid[-1] * scale  # keeps the scale
        target = x[0, 1].item()
        p = (target / scale - a) / (b - a)
        drawn = (fake_quantize(x, QuantizerSpec(element, rounding="stochastic"), seed=i) * sign)[:, 1:]
        assert drawn.numel() > 10**6
        assert ((drawn == a * scale) | (drawn == b * scale)).all()
        error = (b - a) * scale * math.sqrt(p * (1 - p) / drawn.numel())
        assert abs(drawn.double().mean().item() - target) < 4 * error
        nearest = (fake_quantize(x[:2], QuantizerSpec(element)) * sign[:2])[:, 1:]
        assert abs(nearest.double().mean().item() - target) > 100 * error  # the control: nearest rounding is biased


def test_stochastic_rounding_is_unbiased_over_whole_blocks_but_not_under_the_floor_rule():
    x = normal(1, 4096, seed=5).expand(256, -1).contiguous()
    z = {}
    for scale_rule in ("truncation_free", "floor"):
        q = fake_quantize(x, QuantizerSpec(scale_rule=scale_rule, rounding="stochastic"), seed=3).double()
        z[scale_rule] = ((q - x).mean(0) / (q.std(0) / 16 + 1e-3)).square().mean().item()
    assert z["truncation_free"] < 1.1
    assert z["floor"] > 10  # the control: saturated values are biased


@pytest.mark.parametrize("element", GRIDS)
@pytest.mark.parametrize("scale_rule", ["truncation_free", "floor"])
def test_stochastic_rounding_never_moves_a_value_on_the_grid(element, scale_rule):
    spec = QuantizerSpec(element, scale_rule, "stochastic")
    values = torch.tensor([sign * g for g in GRIDS[element] for sign in (1.0, -1.0)]) * 2.0**-7
    x = values.repeat(2).expand(30_000, -1)
    assert_same_bits(fake_quantize(x, spec, seed=8), x.contiguous())
    off = torch.where(x == 0, x, x * (1 - 2.0**-10))
    assert not torch.equal(fake_quantize(off, spec, seed=8), x)  # the control: next to the grid some do move


# Noise ----------------------------------------------------------------------------------------------------------------

STOCHASTIC = QuantizerSpec(rounding="stochastic")


def test_one_seed_gives_the_same_bits_and_another_seed_others():
    x = normal(16, 64)
    first = fake_quantize(x, STOCHASTIC, seed=7)
    assert_same_bits(fake_quantize(x, STOCHASTIC, seed=7), first)
    assert_same_bits(fake_quantize(x, STOCHASTIC, seed=Noise.from_seed(7)), first)
    for other in (8, 7 + 2**32, Noise(Noise.from_seed(7).state, 1)):
        assert not torch.equal(fake_quantize(x, STOCHASTIC, seed=other), first)


def test_without_a_seed_the_noise_follows_the_default_generator_of_torch():
    x = normal(16, 64)
    torch.manual_seed(3)
    first, second = fake_quantize(x, STOCHASTIC), fake_quantize(x, STOCHASTIC)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert_same_bits(fake_quantize(x, STOCHASTIC), first)


def test_nearest_rounding_uses_no_noise():
    x = normal(16, 64)
    state = torch.get_rng_state()
    assert_same_bits(fake_quantize(x, QuantizerSpec(), seed=1), fake_quantize(x, QuantizerSpec(), seed=2))
    assert_same_bits(fake_quantize(x, QuantizerSpec()), fake_quantize(x, QuantizerSpec(), seed=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_noise_of_an_element_does_not_depend_on_the_axis():
    x = normal(32, 32).clamp(-5, 5)
    x.fill_diagonal_(6.0)  # every row and every column has the scale 1
    rows = fake_quantize(x, with_axis(STOCHASTIC, -1), seed=4)
    assert_same_bits(fake_quantize(x, with_axis(STOCHASTIC, 0), seed=4), rows)
    transposed = fake_quantize(x.t(), with_axis(STOCHASTIC, 0), seed=4).t()
    assert not torch.equal(transposed, rows)  # the control: at another place an element has other noise


# Shapes and dtypes ----------------------------------------------------------------------------------------------------


@every_spec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_float32_with_a_cast_at_the_end(spec, dtype):
    """For every finite value as the largest of a block."""
    top = torch.arange(0x7C00 if dtype == torch.float16 else 0x7F80, dtype=torch.int32).to(torch.int16).view(dtype)
    x = (top.float().unsqueeze(1) * (torch.rand(len(top), 4, generator=torch.Generator().manual_seed(1)) * 2 - 1)).to(
        dtype
    )
    x[:, 0] = top
    actual = fake_quantize(x, spec, seed=1)
    assert actual.dtype == dtype
    expected = fake_quantize(x.float(), spec, seed=1)
    assert_same_bits(actual, expected.to(dtype))
    finite = actual.isfinite()
    assert torch.equal(actual[finite].float(), expected[finite])  # and the cast is exact wherever it is in range


@every_spec
def test_the_three_dtypes_agree_on_the_values_they_share(spec):
    g = torch.Generator().manual_seed(2)
    x = torch.randint(-127, 128, (500, 32), generator=g) * 2.0 ** torch.randint(-8, 8, (500, 1), generator=g)
    results = [fake_quantize(x.to(dtype), spec, seed=5) for dtype in INT_OF]
    assert [r.dtype for r in results] == list(INT_OF)
    for r in results[1:]:
        assert_same_bits(r.float(), results[0])


def test_a_result_beyond_the_largest_number_of_the_dtype_is_infinite_as_in_any_cast():
    """3.5 * 2^14 is a tie between 3 * 2^14 and 2^16, to even, and float16 ends at 65504; float32 ends below 2^128."""
    for dtype, top, lower in ((torch.float16, 2.0**16, 57312), (torch.bfloat16, 2.0**128, 1.7421875 * 2.0**127)):
        x = torch.tensor([[top * 7 / 8], [-top * 7 / 8], [lower]], dtype=dtype)
        expected = torch.tensor([[math.inf], [-math.inf], [top * 3 / 4]], dtype=dtype)
        assert_same_bits(fake_quantize(x, QuantizerSpec()), expected)
        assert fake_quantize(x, QuantizerSpec(scale_rule="floor")).abs().max() == top * 3 / 4  # floor saturates before
    largest = torch.tensor([torch.finfo(torch.float32).max])
    assert fake_quantize(largest, QuantizerSpec()).item() == math.inf


@every_spec
def test_memory_layout_does_not_matter(spec):
    x = normal(48, 80, seed=6)
    views = [x.t(), x[::3, 5:70:2], x[0].expand(40, -1), x.view(6, 8, 80).permute(2, 0, 1), x.flip(1)]
    for view, axis in itertools.product(views, (0, -1)):
        expected = fake_quantize(view.clone(memory_format=torch.contiguous_format), with_axis(spec, axis), seed=1)
        assert_same_bits(fake_quantize(view, with_axis(spec, axis), seed=1), expected)


@pytest.mark.parametrize("shape", [(70,), (5, 70), (40, 3), (2, 40, 5), (3, 2, 33, 4), (2, 1, 3, 35, 2)], ids=str)
def test_any_rank_and_axis_is_quantized_as_rows_of_blocks(shape):
    x = normal(*shape, seed=7)
    for axis in range(-x.dim(), x.dim()):
        actual = fake_quantize(x, QuantizerSpec(axis=axis))
        rows = x.movedim(axis, -1)
        expected = torch.empty_like(rows)
        for start in range(0, rows.shape[-1], 32):
            part = rows[..., start : start + 32]
            expected[..., start : start + 32] = fake_quantize(part.reshape(-1, part.shape[-1]), QuantizerSpec()).view(
                part.shape
            )
        assert_same_bits(actual, expected.movedim(-1, axis))


@every_spec
@pytest.mark.parametrize("length", [1, 31, 33, 50])
def test_a_partial_block_is_one_padded_with_zeros(spec, length):
    x = normal(length, length, seed=8)
    pad = -length % 32
    for axis, padding in ((-1, (0, pad)), (0, (0, 0, 0, pad))):
        padded = torch.nn.functional.pad(x, padding)
        expected = fake_quantize(padded, with_axis(spec, axis), seed=9)[:length, :length]
        assert_same_bits(fake_quantize(x, with_axis(spec, axis), seed=9), expected)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 1000])
def test_other_block_sizes_cut_other_blocks(block_size):
    x = normal(3, 130, seed=9).mul(3).exp()
    spec = QuantizerSpec(block_size=block_size)
    parts = x.split(block_size, dim=1)
    expected = torch.cat([fake_quantize(part, QuantizerSpec(block_size=130)) for part in parts], dim=1)
    assert_same_bits(fake_quantize(x, spec), expected)
    assert not torch.equal(fake_quantize(x, QuantizerSpec()), expected)


@every_spec
@pytest.mark.parametrize("shape", [(0,), (0, 32), (3, 0), (2, 0, 5), (0, 0)], ids=str)
def test_an_empty_tensor_stays_empty(spec, shape):
    for dtype, axis in itertools.product(INT_OF, (0, -1)):
        x = torch.empty(shape, dtype=dtype)
        q = fake_quantize(x, with_axis(spec, axis))
        assert q.shape == shape and q.dtype == dtype


def test_the_input_is_left_alone_and_the_result_is_a_new_tensor():
    x = normal(4, 64).requires_grad_()
    before = x.detach().clone()
    q = fake_quantize(x, QuantizerSpec())
    assert q.requires_grad
    with torch.no_grad():
        q.zero_()
    assert_same_bits(x.detach(), before)
    on_grid = torch.tensor([6.0, 1.0])
    assert fake_quantize(on_grid, QuantizerSpec()).data_ptr() != on_grid.data_ptr()


# Zeros and non-finite values ------------------------------------------------------------------------------------------


@every_spec
def test_a_block_of_zeros_stays_zeros_with_their_signs(spec):
    x = normal(4, 96)
    x[1, 32:64] = 0.0
    x[2, :32] = -0.0
    q = fake_quantize(x, spec, seed=1)
    assert_same_bits(q[1, 32:64], x[1, 32:64])
    assert_same_bits(q[2, :32], x[2, :32])
    assert (q[0] != 0).any() and q.isfinite().all()


@every_spec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_makes_exactly_its_block_nan(spec, bad):
    clean = normal(70, 70, seed=10)
    x = clean.clone()
    x[40, 69] = x[3, 33] = bad
    expected = {axis: fake_quantize(clean, with_axis(spec, axis), seed=1) for axis in (0, -1)}
    expected[-1][40, 64:] = expected[-1][3, 32:64] = math.nan
    expected[0][32:64, 69] = expected[0][:32, 33] = math.nan
    for axis in (0, -1):
        assert_same_bits(fake_quantize(x, with_axis(spec, axis), seed=1), expected[axis])


def test_a_block_of_nothing_but_infinities_or_nan_is_nan():
    for bad in (math.nan, math.inf):
        assert fake_quantize(torch.full((32,), bad), QuantizerSpec()).isnan().all()


# The shadow weight (Q-EMA, Algorithm 1) -------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.stochastic], ids=str)
@properties
@given(x=blocks)
def test_a_shadow_equal_to_the_weight_is_exactly_the_nearest_rounding(spec, x):
    assert_same_bits(fake_quantize(x, spec, shadow=x.clone()), fake_quantize(x, spec))


def test_a_worked_block_of_algorithm_1():
    """Largest magnitude 6, so S = 1: weight, shadow, and what Algorithm 1 gives by hand (nearest_even)."""
    table = [
        (6.0, 100.0, 6.0),  # the largest stays the largest; a large shadow changes neither S nor the pair
        (6.0, 0.1, 6.0),
        (-6.0, 3.0, -6.0),
        (1.2, 1.4, 1.5),  # the neighbours of 1.2 are 1 and 1.5; the shadow picks
        (1.2, 1.1, 1.0),
        (1.2, 5.0, 1.5),
        (1.2, 0.0, 1.0),
        (1.2, -3.0, 1.0),  # a shadow of the other sign picks the smaller magnitude
        (-1.2, -1.3, -1.5),
        (-1.2, -1.2, -1.0),
        (-1.2, 4.0, -1.0),
        (2.0, 2.4, 2.0),  # on the grid: the pair is 2 and the next larger magnitude, 3
        (2.0, 2.6, 3.0),
        (2.0, 1.0, 2.0),
        (-2.0, -9.0, -3.0),
        (-2.0, 9.0, -2.0),
        (4.9, 5.0, 4.0),  # a tie between 4 (code 6, even) and 6 (code 7)
        (4.9, 5.1, 6.0),
        (0.3, 0.25, 0.0),  # a tie between 0 (code 0) and 0.5 (code 1)
        (0.3, 0.26, 0.5),
        (0.6, 0.75, 1.0),  # a tie between 0.5 (code 1) and 1 (code 2)
        (0.0, 0.3, 0.5),  # the pair of 0 is 0 and 0.5
        (0.0, 0.2, 0.0),
        (0.0, -4.0, 0.0),
        (-0.1, -0.3, -0.5),
        (-0.1, 0.3, -0.0),
    ]
    w, shadow, expected = torch.tensor(table).unbind(1)
    assert_same_bits(fake_quantize(w, QuantizerSpec(), shadow=shadow), expected)
    for scale in (2.0**-11, 2.0**5):
        scaled = fake_quantize(scale * w, QuantizerSpec(), shadow=scale * shadow)
        assert_same_bits(scaled, scale * expected)
    assert not torch.equal(fake_quantize(w, QuantizerSpec()), expected)  # the control: without the shadow
    assert not torch.equal(fake_quantize(shadow, QuantizerSpec()), expected)  # nor is it the shadow that is quantized


@pytest.mark.parametrize("scale_rule", ["truncation_free", "floor"])
def test_ties_of_the_shadow_follow_the_rounding(scale_rule):
    w, shadow = torch.tensor([6.0, 1.1, -1.1, 1.6, -1.6]), torch.tensor([6.0, 1.25, -1.25, 1.75, -1.75])
    expected = {
        "nearest_even": [6.0, 1.0, -1.0, 2.0, -2.0],
        "nearest_away": [6.0, 1.5, -1.5, 2.0, -2.0],
        "nearest_up": [6.0, 1.5, -1.0, 2.0, -1.5],
    }
    for rounding, values in expected.items():
        actual = fake_quantize(w, QuantizerSpec("e2m1", scale_rule, rounding), shadow=shadow)
        assert actual.tolist() == values


@pytest.mark.parametrize("element", GRIDS)
def test_with_any_shadow_a_weight_rounds_to_one_of_its_own_neighbours(element):
    w = normal(400, 32, seed=11)
    w[:, 0] = GRIDS[element][-1]  # S = 1
    w[:, 1:] = (w[:, 1:] * 3).clamp(-GRIDS[element][-1], GRIDS[element][-1])
    grid = torch.tensor(GRIDS[element])
    lower = grid[torch.searchsorted(grid, w.abs(), right=True) - 1]
    upper = grid[torch.searchsorted(grid, w.abs(), right=True).clamp(max=len(grid) - 1)]
    for factor in (0.0, 0.5, 1.0, 30.0, -1.0):
        shadow = factor * w + normal(400, 32, seed=12)
        q = fake_quantize(w, QuantizerSpec(element), shadow=shadow).abs()
        assert ((q == lower) | (q == upper)).all()
        other_sign = (shadow * w < 0) & (w.abs() < grid[-1])
        assert torch.equal(q[other_sign], lower[other_sign])
        own = fake_quantize(shadow, QuantizerSpec(element)).abs()
        assert not ((own == lower) | (own == upper)).all()  # the control: rounding the shadow itself does not


def test_the_scale_comes_from_the_weight_and_not_from_its_shadow():
    w, shadow = torch.tensor([6.0, 1.2]), torch.tensor([50.0, 1.3])
    assert fake_quantize(w, QuantizerSpec(), shadow=shadow).tolist() == [6.0, 1.5]
    assert fake_quantize(shadow, QuantizerSpec()).tolist() == [48.0, 0.0]


def test_a_float32_shadow_decides_for_a_bfloat16_weight_in_float32():
    w = torch.tensor([6.0, 1.2], dtype=torch.bfloat16)
    just_above, just_below = torch.tensor([6.0, 1.25 + 2.0**-20]), torch.tensor([6.0, 1.25 - 2.0**-20])
    assert fake_quantize(w, QuantizerSpec(), shadow=just_above).tolist() == [6.0, 1.5]
    assert fake_quantize(w, QuantizerSpec(rounding="nearest_away"), shadow=just_below).tolist() == [6.0, 1.0]
    assert fake_quantize(w, QuantizerSpec(), shadow=just_above).dtype == torch.bfloat16


def test_a_shadow_along_the_other_axis_is_that_of_the_transposed_weight():
    w, shadow = normal(50, 40, seed=13), normal(50, 40, seed=14)
    rows = fake_quantize(w.t().contiguous(), QuantizerSpec(), shadow=shadow.t().contiguous()).t()
    assert_same_bits(fake_quantize(w, QuantizerSpec(axis=0), shadow=shadow), rows)


def test_a_shadow_that_is_not_finite_makes_its_block_nan():
    w, shadow = normal(2, 64), normal(2, 64)
    expected = fake_quantize(w, QuantizerSpec(), shadow=shadow)
    expected[1, :32] = math.nan
    shadow[1, 5] = math.inf
    assert_same_bits(fake_quantize(w, QuantizerSpec(), shadow=shadow), expected)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, torch.bool], ids=str)
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(TypeError, match=f"float32, bfloat16 or float16; got {str(dtype).removeprefix('torch.')}"):
        fake_quantize(torch.ones(4, dtype=dtype), QuantizerSpec())


@pytest.mark.parametrize(("shape", "axis"), [((), -1), ((), 0), ((4,), 1), ((4, 4), 2), ((4, 4), -3), ((0, 4), 5)])
def test_an_axis_out_of_range_is_refused(shape, axis):
    with pytest.raises(ValueError, match=f"axis {axis} is not a dimension"):
        fake_quantize(torch.ones(shape), QuantizerSpec(axis=axis))


def test_a_shadow_with_stochastic_rounding_or_of_another_shape_is_refused():
    w = normal(4, 32)
    with pytest.raises(ValueError, match="stochastic"):
        fake_quantize(w, STOCHASTIC, shadow=w, seed=1)
    for shape in ((32,), (4, 31), (4, 32, 1), (32, 4)):
        with pytest.raises(ValueError, match="shadow has shape"):
            fake_quantize(w, QuantizerSpec(), shadow=torch.ones(shape))


def test_the_reference_is_a_backend_by_name_and_an_unknown_one_is_refused():
    x = normal(4, 32)
    assert_same_bits(fake_quantize(x, QuantizerSpec(), backend="reference"), fake_quantize(x, QuantizerSpec()))
    with pytest.raises(ValueError, match="backend must be one of auto, reference, triton; got 'cuda'"):
        fake_quantize(x, QuantizerSpec(), backend="cuda")


@pytest.mark.parametrize("mode", some(["torch.inference_mode()", "FakeTensorMode()"], every=2))
def test_what_is_kept_does_not_outlive_the_mode_it_was_made_in(mode):
    """In a process of its own each, where nothing is kept yet."""
    code = f"""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from quantization import QuantizerSpec, fake_quantize
from quantization.oscillation import quantization_confidence
from quantization.rotation import hadamard

specs = [QuantizerSpec(element, rounding="stochastic") for element in ("e2m1", "e3m0")]
def results(x):
    of_specs = [f(x, spec) for spec in specs for f in (fake_quantize, quantization_confidence)]
    return [*of_specs, hadamard(x)]

with {mode}:
    results(torch.ones(3, 40))
x = torch.arange(120.0).view(3, 40)
for y in results(x):
    assert type(y) is torch.Tensor and not y.is_inference() and y.sum().item() > 0
w = torch.randn(4, 40, requires_grad=True)
(hadamard(w) * hadamard(x[:1])).sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The gradient ---------------------------------------------------------------------------------------------------------


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_goes_straight_through(spec, dtype):
    x = (8 * torch.randn(5, 70, generator=torch.Generator().manual_seed(0))).to(dtype)
    leaf, factors = x.clone().requires_grad_(), torch.arange(350.0).view(5, 70).to(dtype)
    y = fake_quantize(leaf, spec, seed=1)
    assert y.requires_grad and torch.equal(y.detach(), fake_quantize(x, spec, seed=1))
    (y * factors).sum().backward()
    assert torch.equal(leaf.grad, factors)
    assert not fake_quantize(x, spec, seed=1).requires_grad
    with torch.no_grad():
        assert not fake_quantize(leaf, spec, seed=1).requires_grad


@pytest.mark.parametrize("transform", ["grad", "jvp", "dual numbers"])
def test_the_derivative_goes_straight_through_in_every_mode_of_differentiation(transform):
    """In forward mode a tensor does not say that it requires a gradient."""
    x, factors = torch.randn(4, 40), torch.arange(160.0).view(4, 40)
    if transform == "grad":
        found, expected = torch.func.grad(lambda t: (fake_quantize(t, QuantizerSpec()) * factors).sum())(x), factors
    elif transform == "jvp":
        found, expected = torch.func.jvp(lambda t: fake_quantize(t, QuantizerSpec()), (x,), (factors,))[1], factors
    else:
        with torch.autograd.forward_ad.dual_level():
            y = fake_quantize(torch.autograd.forward_ad.make_dual(x, factors), QuantizerSpec())
            found, expected = torch.autograd.forward_ad.unpack_dual(y).tangent, factors
    assert torch.equal(found, expected)


def test_the_gradient_of_a_sum_reaches_all_its_terms():
    w, b = torch.randn(4, 32, requires_grad=True), torch.zeros(4, requires_grad=True)
    (fake_quantize(w, QuantizerSpec()).sum(1) + b).sum().backward()
    assert torch.equal(w.grad, torch.ones(4, 32)) and torch.equal(b.grad, torch.ones(4))


def test_a_shadow_gets_no_gradient():
    w, shadow = (torch.randn(4, 32, requires_grad=True) for _ in range(2))
    fake_quantize(w, QuantizerSpec(), shadow=shadow).sum().backward()
    assert torch.equal(w.grad, torch.ones(4, 32)) and shadow.grad is None


@pytest.mark.parametrize("given", ["e2m1", "tetrajet", None, {"element": "e2m1"}], ids=str)
def test_what_is_no_spec_is_refused_with_what_was_expected(given):
    with pytest.raises(TypeError, match=r"expected a QuantizerSpec, such as QuantizerSpec\(element='e2m1'\)"):
        fake_quantize(torch.ones(2, 32), given)
