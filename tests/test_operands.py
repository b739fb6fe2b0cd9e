"""The operands of a layer's products: their forms, fp8's window, and layers made of them.

The kernels that make operands on a GPU are compared with the plain torch here in `tests/test_kernels.py`.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from operand_helpers import ELEMENTS, PAPER_RULES, STREAMS, job_of
from quick import some
from test_linear_fn import LOST, STREAM, by_function, few_bits, state, tensors
from torch import Tensor, nn

from quantization import PRESETS, LinearRecipe, QuantizerSpec, build_recipe, fake_quantize
from quantization.backends.reference import NAN_SCALE, SCALE_BIAS, pack, scale_codes, unpack
from quantization.formats import FORMATS
from quantization.job import (
    CARRIED,
    DENSE,
    E4M3,
    E5M2,
    NOTHING,
    PACKED,
    Carried,
    Dense,
    Packed,
    carried_shape,
    codes_shape,
    scales_shape,
    window,
)
from quantization.noise import Noise
from quantization.operands import forms_of, prepare, values_of
from quantization.spec import QUANTIZERS, ROUNDINGS

NOISE = Noise(torch.tensor([12345, 7 << 32]), 40)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8 = (E4M3, E5M2)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, the sign of zero included; any NaN equals any NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


def numbers(*shape: int, dtype: torch.dtype = torch.float32, octaves: int = 3) -> Tensor:
    """Normal draws, each row of one of a few sizes; all scales are within fp8's window."""
    g = torch.Generator().manual_seed(sum(shape))
    sizes = torch.exp2(torch.randint(octaves, (*shape[:-1], 1), generator=g).float())
    x = torch.randn(shape, generator=g)
    return ((x + 0.1 * x.sign()) * sizes).to(dtype)


def lost() -> int:
    """Blocks counted since the last call."""
    count = int(LOST)
    LOST.zero_()
    return count


def by_two_calls(
    x: Tensor, row: QuantizerSpec | None, column: QuantizerSpec | None, *, chained: bool, shadow: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    first = None if row is None else fake_quantize(x, row, seed=Noise(NOISE.state, 40 + STREAMS[0]), shadow=shadow)
    source = first if chained and row is not None else x
    second = None if column is None else fake_quantize(source, column, seed=Noise(NOISE.state, 40 + STREAMS[1]))
    return first, second


# Packed matrices ------------------------------------------------------------------------------------------------------


def every_code(columns: int, axis: int) -> tuple[Tensor, Tensor]:
    """Codes 0 to 15, 32 or `columns` of them along each block, under every scale: (codes, scales) as packed."""
    code = (torch.arange(256).unsqueeze(1) + torch.arange(columns)) % 16  # a scale a row: axis -1
    scales = torch.arange(256, dtype=torch.uint8).expand(-(-columns // 32), 256).contiguous()
    if axis == 0:
        code = code.t()
    padded = nn.functional.pad(code, (0, code.shape[1] % 2)).to(torch.uint8)
    return padded[:, ::2] | (padded[:, 1::2] << 4), scales


@pytest.mark.parametrize("length", [32, 33, 31, 1])
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_code_under_every_scale_is_its_number_and_packs_to_itself(element, axis, length):
    spec = QuantizerSpec(element, axis=axis)
    codes, scales = every_code(length, axis)
    columns = length if axis == -1 else 256
    values = unpack(Packed(codes, scales, spec, columns))
    by_scale = values if axis == -1 else values.t()
    for scale, row in enumerate(by_scale.tolist()):
        for place, number in enumerate(row):
            sign, magnitude = divmod((scale + place) % 16, 8)
            expected = (-1) ** sign * FORMATS[element].magnitudes[magnitude] * 2.0 ** (scale - SCALE_BIAS)
            assert number == expected or (scale == NAN_SCALE and number != number)
    again = pack(values.float(), scales, spec)
    assert again.shape == codes.shape
    fits = by_scale[:254].float().isfinite()  # the largest codes times the largest scales are no float32 numbers
    unpacked = unpack(Packed(again, scales, spec, columns))
    unpacked = unpacked if axis == -1 else unpacked.t()
    assert same(unpacked[:254][fits], by_scale[:254][fits]) and unpacked[NAN_SCALE].isnan().all()
    if length % 2 and axis == -1:
        assert (again[:, -1] >> 4 == 0).all()  # the half byte beyond the matrix


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("rule", PAPER_RULES)
def test_a_quantized_matrix_survives_packing_with_its_blocks_that_are_not_finite(rule, element, axis):
    spec = QuantizerSpec(element, rule, axis=axis)
    for shape in ((70, 33), (1, 1), (33, 64)):
        x = numbers(*shape, octaves=60)
        x.view(-1)[len(x.view(-1)) // 2 :: 71] = torch.nan
        x.view(-1)[::97] = -torch.inf
        values, scales = fake_quantize(x, spec), scale_codes(x, spec)
        assert scales.shape == scales_shape(*shape, spec) and scales.dtype == torch.uint8
        codes = pack(values, scales, spec)
        assert codes.shape == codes_shape(*shape) and codes.dtype == torch.uint8
        assert same(unpack(Packed(codes, scales, spec, shape[1])).float(), values)
        assert (scales == NAN_SCALE).any() and values.isnan().any()


def test_a_shadow_that_is_not_finite_makes_its_block_s_scale_nan():
    shadow = numbers(4, 96)
    shadow[1, 40] = torch.inf
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[1, 1] = True
    assert torch.equal(scale_codes(numbers(4, 96), QuantizerSpec(), shadow) == NAN_SCALE, expected)


# Preparing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("on", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_prepare_is_two_calls_of_the_quantizer_and_a_sum(on, chained, dtype):
    x = numbers(70, 33, dtype=dtype)
    for roundings in (("nearest_even", "stochastic"), ("stochastic", "stochastic"), ("nearest_up", "nearest_away")):
        row, column = (
            QuantizerSpec(rounding=rounding, axis=axis) if wanted else None
            for wanted, rounding, axis in zip(on, roundings, (-1, 0), strict=True)
        )
        expected = by_two_calls(x, row, column, chained=chained)
        for forms, sums in itertools.product(itertools.product((DENSE, PACKED), repeat=2), (False, True)):
            *actual, total, _ = prepare(x, job_of(row, column, forms, dtype, chained=chained, sums=sums), NOISE)
            for operand, value, spec, form in zip(actual, expected, (row, column), forms, strict=True):
                assert (operand is None) == (value is None)
                if operand is not None:
                    assert isinstance(operand, Dense if form == DENSE else Packed)
                    assert form == DENSE or operand.spec is spec
                    assert same(values_of(operand, dtype), value)
            if sums:
                assert total.dtype == torch.float32
                torch.testing.assert_close(total.double(), x.double().sum(0), rtol=1e-6, atol=1e-5)
            else:
                assert total is None
    if all(on):  # the control: what the column quantizer reads matters
        assert not same(expected[1], by_two_calls(x, row, column, chained=not chained)[1])


def test_prepare_gives_the_shadow_to_the_row_quantizer_alone():
    w, row, column = numbers(40, 48), QuantizerSpec(), QuantizerSpec(axis=0)
    shadow = w + numbers(40, 48, octaves=1).flip(0) / 4
    for chained, form in itertools.product((False, True), (DENSE, PACKED)):
        expected = by_two_calls(w, row, column, chained=chained, shadow=shadow)
        first, second, *_ = prepare(w, job_of(row, column, (form, form), w.dtype, chained=chained), shadow=shadow)
        assert same(values_of(first, w.dtype), expected[0]) and same(values_of(second, w.dtype), expected[1])
        assert not same(expected[0], by_two_calls(w, row, column, chained=chained)[0])


def test_values_come_in_the_compute_dtype():
    x = numbers(70, 33)
    for form in (DENSE, PACKED):
        job = job_of(QuantizerSpec(), QuantizerSpec(axis=0), (form, form), torch.bfloat16)
        first, second, *_ = prepare(x, job)
        for operand, spec in ((first, QuantizerSpec()), (second, QuantizerSpec(axis=0))):
            assert same(values_of(operand, torch.bfloat16), fake_quantize(x, spec).bfloat16())


@pytest.mark.parametrize("form", [DENSE, PACKED, CARRIED])
def test_other_dtypes_are_refused(form):
    with pytest.raises(TypeError, match="quantizers take float32, bfloat16 or float16; got float64"):
        prepare(torch.ones(2, 32, dtype=torch.float64), job_of(QuantizerSpec(), None, (form, NOTHING), torch.float32))


def test_another_dtype_in_a_layer_is_refused_only_where_a_quantizer_reads_it():
    X, W, b, G = (t.double() for t in tensors((64,), 48, 40))
    with pytest.raises(TypeError, match="got float64"):
        by_function(X, W, b, G, PRESETS["tetrajet"])
    assert by_function(X, W, b, G, LinearRecipe())["output"].dtype == torch.float64


# Which form -----------------------------------------------------------------------------------------------------------

TETRAJET_FP8 = build_recipe(carrier="fp8")
ALL_CARRIED = dict.fromkeys(QUANTIZERS, CARRIED)
ALL_DENSE = dict.fromkeys(QUANTIZERS, DENSE)


def carried(recipe: LinearRecipe, shape: tuple[int, int] = (48, 64), on_gpu: bool = False) -> set[str]:
    return {name for name, form in forms_of(recipe, shape, on_gpu, False).items() if form == CARRIED}


def test_fp8_carries_all_products_of_both_presets():
    for preset in ("tetrajet", "microscaling"):
        recipe = dataclasses.replace(PRESETS[preset], carrier="fp8")
        for on_gpu in (False, True):
            assert forms_of(recipe, (48, 64), on_gpu, False) == ALL_CARRIED


def test_without_fp8_operands_are_dense_and_on_a_gpu_what_is_kept_of_x_is_packed():
    for preset in ("tetrajet", "microscaling"):
        assert forms_of(PRESETS[preset], (48, 64), False, False) == ALL_DENSE
        assert forms_of(PRESETS[preset], (48, 64), True, False) == {**ALL_DENSE, "q6": PACKED}
    without_q6 = build_recipe(("q1", "q2", "q3", "q4", "q5"))
    assert forms_of(without_q6, (48, 64), True, False) == ALL_DENSE


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (1, 16)], ids=str)
def test_a_side_that_is_no_multiple_of_16_falls_back(shape):
    assert forms_of(TETRAJET_FP8, shape, False, False) == ALL_DENSE
    assert forms_of(TETRAJET_FP8, shape, True, False) == {**ALL_DENSE, "q6": PACKED}
    assert carried(TETRAJET_FP8, (16, 32)) == set(QUANTIZERS)  # the control


@pytest.mark.parametrize(
    ("off", "expected"),
    [
        ("q1", {"q3", "q4", "q5", "q6"}),
        ("q2", {"q3", "q4", "q5", "q6"}),
        ("q3", {"q1", "q2", "q5", "q6"}),
        ("q4", {"q5", "q6"}),
        ("q5", {"q1", "q2", "q3", "q4"}),
        ("q6", {"q3", "q4"}),
    ],
)
def test_a_product_is_carried_where_both_its_operands_are_quantized(off, expected):
    """With q4 or q6 off, grad_input or grad_weight reads q2's or q1's result, which then must not be carried."""
    active = [name for name in QUANTIZERS if name != off]
    for operands in ("requantized", "original"):
        assert carried(build_recipe(active, backward_operands=operands, carrier="fp8")) == expected


@pytest.mark.parametrize("active", list(itertools.combinations(QUANTIZERS, 4)), ids="+".join)
def test_every_set_of_quantizers_multiplies_operands_of_one_kind(active):
    """A carried operand never meets one that is not, and the layer trains."""
    X, W, b, G = tensors((32,), 48, 32)
    for operands in ("requantized", "original"):
        recipe = build_recipe(active, backward_operands=operands, carrier="fp8")
        forms = forms_of(recipe, (32, 48), False, False)
        for a, c in (("q1", "q2"), ("q3", "q4"), ("q5", "q6")):
            assert (forms[a] == CARRIED) == (forms[c] == CARRIED)
        plain = dataclasses.replace(recipe, carrier="bf16")
        for name, value in by_function(X, W, b, G, recipe).items():
            assert torch.equal(value, by_function(X, W, b, G, plain)[name]), name


def test_other_block_sizes_and_an_empty_batch_fall_back():
    specs = {name: getattr(TETRAJET_FP8, name) for name in QUANTIZERS}
    other = LinearRecipe(**{n: dataclasses.replace(s, block_size=16) for n, s in specs.items()}, carrier="fp8")
    for on_gpu in (False, True):
        assert forms_of(other, (48, 64), on_gpu, False) == ALL_DENSE
        assert forms_of(TETRAJET_FP8, (48, 64), on_gpu, True) == ALL_DENSE
    one = dataclasses.replace(TETRAJET_FP8, q5=dataclasses.replace(specs["q5"], block_size=16))
    assert carried(one) == {"q1", "q2", "q3", "q4"}


OTHER_ELEMENTS = list(itertools.product(ELEMENTS, repeat=6))[1::9]


@pytest.mark.parametrize("elements", OTHER_ELEMENTS, ids="+".join)
@pytest.mark.parametrize("operands", ["requantized", "original"])
def test_no_matrix_is_carried_by_two_windows_whatever_the_elements(operands, elements):
    """With e2m1 and e3m0 for the two uses of one matrix fp8 would overflow to NaN: such a product is not carried."""
    specs = {
        name: dataclasses.replace(getattr(TETRAJET_FP8, name), element=e)
        for name, e in zip(QUANTIZERS, elements, strict=True)
    }
    recipe = LinearRecipe(**specs, backward_operands=operands, carrier="fp8")
    forms = forms_of(recipe, (32, 48), False, False)
    for one, other in (("q1", "q6"), ("q2", "q4"), ("q3", "q5")):
        both = forms[one] == forms[other] == CARRIED
        assert not both or specs[one].element == specs[other].element
    for a, b in (("q1", "q2"), ("q3", "q4"), ("q5", "q6")):
        assert (forms[a] == CARRIED) == (forms[b] == CARRIED)
    data = tensors((32,), 48, 32)
    plain = by_function(*data, dataclasses.replace(recipe, carrier="bf16"))
    for name, value in by_function(*data, recipe).items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("rules", itertools.product(PAPER_RULES, repeat=2), ids="+".join)
def test_nor_whatever_the_scale_rules(rules):
    specs = {"q1": rules[0], "q2": rules[0], "q3": rules[1], "q4": rules[1], "q5": rules[0], "q6": rules[1]}
    recipe = LinearRecipe(
        **{n: dataclasses.replace(getattr(TETRAJET_FP8, n), scale_rule=r) for n, r in specs.items()}, carrier="fp8"
    )
    assert carried(recipe) == (set(QUANTIZERS) if len(set(rules)) == 1 else {"q1", "q2"})


def test_a_job_with_two_windows_is_refused():
    with pytest.raises(ValueError, match="fp8 cannot carry"):
        job_of(QuantizerSpec(), QuantizerSpec("e3m0", axis=0), (CARRIED, CARRIED), torch.float32)


# The window of fp8 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_code_is_exact_at_every_scale_of_the_window_and_not_beyond_its_ends(element, fp8):
    top, lowest = window(FORMATS[element], fp8)
    grid = torch.tensor(FORMATS[element].magnitudes)
    grid = torch.cat([grid, -grid])

    def exact(s: int) -> bool:
        values = grid * 2.0**s
        return torch.equal(values.to(fp8).float(), values)

    assert all(exact(s) for s in range(lowest, top + 1))
    assert not exact(top + 1) and not exact(lowest - 1)


def test_the_octaves_of_the_window():
    octaves = {(e, f): window(FORMATS[e], f)[0] - window(FORMATS[e], f)[1] + 1 for e in ELEMENTS for f in FP8}
    assert octaves == {("e2m1", E4M3): 15, ("e2m1", E5M2): 29, ("e3m0", E4M3): 12, ("e3m0", E5M2): 26}


def carried_pair(
    x: Tensor, row: QuantizerSpec | None, column: QuantizerSpec | None, fp8: torch.dtype, *, chained: bool = False
):
    """Both results times their factor, in float32 and in the layout of x."""
    job = job_of(row, column, (CARRIED, CARRIED), torch.bfloat16, fp8, chained=chained)
    first, second, *_ = prepare(x, job, NOISE, lost=LOST)
    results = []
    for operand, spec in ((first, row), (second, column)):
        if operand is None:
            results.append(None)
            continue
        assert isinstance(operand, Carried)
        values, factor = operand
        assert values.dtype == fp8 and factor.dtype == torch.float32 and factor.shape == ()
        assert values.shape == carried_shape(*x.shape, spec) and values.is_contiguous()
        along = x.shape[1] if operand is first else x.shape[0]
        assert (values[:, along:].float() == 0).all()  # the padding
        restored = values[:, :along].float() * factor
        results.append(restored if operand is first else restored.t())
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("rule", some(PAPER_RULES, every=2))
def test_carried_values_times_their_factor_are_the_dense_values(rule, element, fp8, dtype):
    x = numbers(70, 33, dtype=dtype)
    x[40:42] = 0.0
    lost()
    for forward, backward, chained in itertools.product(ROUNDINGS, ("nearest_even", "stochastic"), (False, True)):
        row, column = QuantizerSpec(element, rule, forward), QuantizerSpec(element, rule, backward, axis=0)
        for scale in (1.0, 2.0**-14 if dtype == torch.float16 else 2.0**-90, 2.0**10):
            scaled = x * scale
            expected = by_two_calls(scaled, row, column, chained=chained)
            actual = carried_pair(scaled, row, column, fp8, chained=chained)
            for a, b in zip(actual, expected, strict=True):
                assert same(a, b.float())
    assert lost() == 0


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("element", ELEMENTS)
def test_blocks_below_the_window_are_counted_and_rounded_to_the_grid_of_fp8(element, fp8):
    """Rows of blocks at every scale down to below the window: those from the first below it on are counted."""
    top, lowest = window(FORMATS[element], fp8)
    octaves = top - lowest + 1  # scales that are exact, counted from the largest
    rows, blocks = octaves + 9, 3
    largest = FORMATS[element].max * 2.0**20
    x = largest * torch.exp2(-torch.arange(rows).float()).unsqueeze(1).repeat(1, 32 * blocks)
    x[:, 1::2] *= FORMATS[element].magnitudes[1] / FORMATS[element].max  # the smallest code beside the largest
    spec = QuantizerSpec(element)
    lost()
    (actual, _), expected = carried_pair(x, spec, None, fp8), fake_quantize(x, spec)
    assert lost() == 9 * blocks
    assert torch.equal(actual[:octaves], expected[:octaves]) and not torch.equal(actual, expected)
    shift = 2.0 ** (top - 20)
    assert torch.equal(actual[octaves:], (expected[octaves:] * shift).to(fp8).float() / shift)
    carried_pair(x[: octaves + 1], spec, None, fp8)
    assert lost() == blocks
    carried_pair(x[:octaves], spec, None, fp8)
    assert lost() == 0
    carried_pair(x.t().contiguous(), None, dataclasses.replace(spec, axis=0), fp8)
    assert lost() == 9 * blocks


def test_both_results_count_their_blocks():
    x = torch.ones(64, 64)
    x[32:] = 2.0**-40
    lost()
    carried_pair(x, QuantizerSpec(), QuantizerSpec(axis=0), E4M3)
    assert lost() == 32 * 2 + 64


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_blocks_of_zeros_are_not_counted(fp8):
    for x in (torch.zeros(3, 64), torch.tensor([[1.0], [0.0], [-0.0]]).repeat(1, 64)):
        lost()
        actual, _ = carried_pair(x, QuantizerSpec(), None, fp8)
        assert lost() == 0 and same(actual, x)


def test_a_block_that_is_not_finite_is_nan_and_moves_no_window():
    x = numbers(40, 64)
    expected = fake_quantize(x, QuantizerSpec())
    x[3, 5], x[7, 40] = torch.inf, torch.nan
    lost()
    actual, _ = carried_pair(x, QuantizerSpec(), None, E4M3)
    not_finite = torch.zeros(40, 64, dtype=torch.bool)
    not_finite[3, :32] = not_finite[7, 32:] = True
    assert actual[not_finite].isnan().all() and lost() == 0
    assert torch.equal(actual[~not_finite], expected[~not_finite])


# Layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tetrajet", "microscaling"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lead", [(64,), (3, 17), (1,)], ids=str)
def test_the_carriers_give_the_same_layer_where_sums_are_exact(lead, autocast, preset):
    data = tensors(lead, 48, 32)
    recipe = PRESETS[preset]
    plain = by_function(*data, recipe, autocast=autocast)
    with_fp8 = by_function(*data, dataclasses.replace(recipe, carrier="fp8"), autocast=autocast)
    for name, value in plain.items():
        if autocast and name != "grad_bias":  # bf16's products are rounded to bfloat16, with and without the bias
            torch.testing.assert_close(with_fp8[name].double(), value.double(), rtol=2.0**-7, atol=2.0**-7)
        else:
            assert torch.equal(with_fp8[name], value), name
        assert with_fp8[name].dtype == value.dtype


@pytest.mark.parametrize("preset", ["tetrajet", "microscaling"])
def test_the_carriers_give_the_same_layer_up_to_the_order_of_sums(preset):
    g = torch.Generator().manual_seed(8)
    X, W, b, G = (torch.randn(s, generator=g) for s in ((70, 48), (32, 48), (32,), (70, 32)))
    recipe = PRESETS[preset]
    lost()
    plain, with_fp8 = (by_function(X, W, b, G, dataclasses.replace(recipe, carrier=c)) for c in ("bf16", "fp8"))
    assert lost() == 0
    for name, value in plain.items():
        torch.testing.assert_close(with_fp8[name], value, rtol=1e-5, atol=1e-4)
    other = by_function(
        X, W, b, G, recipe, Noise(state(position=4), STREAM)
    )  # the control: other noise is no order of sums
    assert preset == "microscaling" or (other["grad_weight"] - plain["grad_weight"]).abs().max() > 1e-2


def test_a_shadow_reaches_a_carried_layer():
    X, W, b, G = tensors((64,), 48, 32)
    shadow = W + few_bits(32, 48, seed=9) / 8
    recipe = build_recipe(backward="nearest_even")
    plain, with_fp8 = (
        by_function(X, W, b, G, dataclasses.replace(recipe, carrier=c), shadow=shadow) for c in ("bf16", "fp8")
    )
    for name, value in plain.items():
        assert torch.equal(with_fp8[name], value), name
    assert not torch.equal(plain["output"], by_function(X, W, b, G, recipe)["output"])


@pytest.mark.parametrize("shape", [(0,), (0, 5)], ids=str)
def test_an_empty_batch_trains_with_fp8(shape):
    X, W, b, G = tensors(shape, 48, 32)
    actual = by_function(X, W, b, G, TETRAJET_FP8)
    assert actual["output"].shape == (*shape, 32) and actual["grad_input"].shape == (*shape, 48)
    assert torch.equal(actual["grad_weight"], torch.zeros(32, 48))
    assert torch.equal(actual["grad_bias"], torch.zeros(32))
