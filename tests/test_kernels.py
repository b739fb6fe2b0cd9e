"""The Triton kernel against the reference, bit for bit, on the CPU: in Triton's interpreter.

Triton decides at its import whether it compiles or interprets, and other test modules may have imported it by then (and
must not meet an interpreter). So the one test that pytest finds here by itself runs this module again in a process of
its own, with TRITON_INTERPRET=1, where the others are. `tests/test_gpu.py` compares on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from interpreter_helpers import Process, assert_passed, interpreting
from operand_helpers import ELEMENTS, PAPER_RULES, job_of

from quantization import PRESETS, LinearRecipe, QuantizerSpec, build_recipe, fake_quantize
from quantization.backends import choose, reference
from quantization.formats import FORMATS, ElementFormat
from quantization.job import (
    CARRIED,
    DENSE,
    E4M3,
    E5M2,
    NOTHING,
    PACKED,
    Carried,
    Operand,
    Packed,
    codes_shape,
    scales_shape,
    tensors_of,
    window,
)
from quantization.noise import Noise, uniform
from quantization.operands import LinearJobs, X, prepare, values_of
from quantization.spec import QUANTIZERS, ROUNDINGS
from quantization.stabilizers import qramping

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECS = [QuantizerSpec(*choice) for choice in itertools.product(ELEMENTS, PAPER_RULES, ROUNDINGS, (-1, 0))]
NOISE = Noise(torch.tensor([-123456789123456789, (5 << 32) | 0xFFFFFFF0]), 8 * 47 + 5)  # the low word carries
# numpy, which computes in the interpreter, warns of Inf and NaN, which some of our tensors hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def unequal(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements have other bits, the sign of zero included; any NaN equals any NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    same_bits = a.view(integer) == b.view(integer)
    both_nan = a.float().isnan() & b.float().isnan()
    return int((~(same_bits | both_nan)).sum())


@functools.cache
def awkward(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Numbers of many sizes, grid points and midpoints, zeros of both signs, subnormals, the largest, NaN and Inf."""
    g = torch.Generator().manual_seed(seed)
    smallest, largest = (-24, 15) if dtype == torch.float16 else (-149, 127)
    scale = torch.exp2(torch.randint(smallest, largest, shape[:-1], generator=g).double()).unsqueeze(-1)
    sizes = torch.exp2(torch.randint(-6, 1, shape, generator=g).double())
    x = torch.randn(shape, generator=g, dtype=torch.float64) * sizes
    eighths = torch.randint(-64, 65, shape, generator=g) / 8  # every grid point and every midpoint, once scaled
    x = (torch.where(torch.rand(shape, generator=g) < 0.5, eighths, x) * scale).to(dtype)
    flat = x.flatten()
    flat[3::17], flat[5::23] = 0.0, -0.0
    flat[0], flat[-1] = torch.finfo(dtype).max, -torch.finfo(dtype).smallest_normal / 2
    if flat.numel() > 600:
        flat[flat.numel() // 3], flat[flat.numel() // 2] = torch.nan, -torch.inf
    return flat.view(shape)


def noise_on(device: torch.device) -> Noise:
    return Noise(NOISE.state.to(device), NOISE.stream)


def differing(x: torch.Tensor, spec: QuantizerSpec, shadow: torch.Tensor | None = None) -> int:
    """How many elements of the kernel's result are not the reference's."""
    seed = noise_on(x.device) if spec.stochastic else None
    kernel, expected = (fake_quantize(x, spec, seed=seed, shadow=shadow, backend=b) for b in ("triton", "reference"))
    return unequal(kernel, expected)


class Prepared(NamedTuple):
    """What `operands.prepare` returned, and the blocks below the window that it counted."""

    operands: tuple[Operand | None, Operand | None]
    sums: torch.Tensor
    lost: int


@contextlib.contextmanager
def by(backend: str) -> Iterator[None]:
    """Operands are made and expanded by this backend."""
    before, choose.IN_LAYERS = choose.IN_LAYERS, backend
    try:
        yield
    finally:
        choose.IN_LAYERS = before


def prepared(x: torch.Tensor, backend: str, *args, shadow: torch.Tensor | None = None, **kwargs) -> Prepared:
    lost = torch.zeros((), dtype=torch.int64, device=x.device)
    with by(backend):
        *results, sums, _ = prepare(x, job_of(*args, sums=True, **kwargs), noise_on(x.device), shadow, lost)
    return Prepared(tuple(results), sums, int(lost))


def expanded(operand: Operand, backend: str, dtype: torch.dtype) -> torch.Tensor:
    with by(backend):
        return values_of(operand, dtype)


def differing_operands(
    x: torch.Tensor,
    row: QuantizerSpec | None,
    column: QuantizerSpec | None,
    forms: tuple[str, str],
    dtype: torch.dtype,
    fp8: torch.dtype = E4M3,
    **kwargs,
) -> int:
    """How many numbers, scales, factors and counts of the kernels' operands are not the reference's.

    Codes are compared as the numbers they expand to, by kernel and reference: those of a block that is not finite do
    not matter. Nor does a carried matrix's padding beside such a block. The sums may differ in the order of summation.
    """
    kernel, expected = (prepared(x, b, row, column, forms, dtype, fp8, **kwargs) for b in ("triton", "reference"))
    count = abs(kernel.lost - expected.lost)
    for ours, theirs, spec in zip(kernel.operands, expected.operands, (row, column), strict=True):
        assert (ours is None) == (theirs is None) == (spec is None)
        if ours is None:
            continue
        assert type(ours) is type(theirs)
        assert all(a.shape == b.shape for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True))
        if isinstance(ours, Packed):
            assert ours.codes.dtype == torch.uint8
            count += unequal(ours.scales, theirs.scales)
            if not (theirs.scales == reference.NAN_SCALE).any():
                count += unequal(ours.codes, theirs.codes)
            count += unequal(expanded(ours, "triton", dtype), expanded(theirs, "reference", dtype))
        elif isinstance(ours, Carried):
            length = x.shape[1] if spec.axis == -1 else x.shape[0]
            if x.isfinite().all():
                assert (ours.values[:, length:].float() == 0).all()
            count += unequal(*(operand.values[:, :length].contiguous() for operand in (ours, theirs)))
            count += unequal(ours.factor, theirs.factor)
        else:
            count += unequal(ours.values, theirs.values)
    exact, finite = x.double().sum(0), x.isfinite().all(0)
    error = (kernel.sums.double() - exact)[finite].abs()
    assert kernel.sums.shape == exact.shape and kernel.sums.dtype == torch.float32
    assert (error <= 1e-6 * x.double().abs().sum(0)[finite]).all()
    return count


@functools.cache
def within_window(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Normal draws none of which is small, a few zeros: no block of them is below fp8's window.

    Triton's interpreter casts to fp8 by truncation below the window, and wrongly where there is a NaN.
    """
    g = torch.Generator().manual_seed(4)
    x = torch.randn(shape, generator=g)
    x = (x + 0.1 * x.sign()) * torch.exp2(torch.randint(3, (shape[0], 1), generator=g).float())
    x.view(-1)[3::17] = -0.0
    return x.to(dtype)


SHAPES = ((34, 70), (49, 33), (1, 33), (33, 1), (66, 31), (32, 64))


if not INTERPRETED:

    @functools.cache
    def begin() -> Process:
        """This file in a process with the interpreter. conftest.py begins it before all tests."""
        return interpreting(__file__)

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        assert_passed(begin())

    def test_cpu_tensors_need_the_interpreter():
        pytest.importorskip("triton")
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            fake_quantize(torch.ones(2, 32), QuantizerSpec(), backend="triton")

    def test_without_triton_a_demand_for_it_is_refused(monkeypatch):
        # What an import then raises is ImportError.
        monkeypatch.setattr(choose, "_kernels", choose._kernels.__wrapped__)
        monkeypatch.setitem(sys.modules, "quantization.backends.gpu.launch", None)
        monkeypatch.delattr("quantization.backends.gpu.launch", raising=False)
        with pytest.raises(ValueError, match="needs the package triton"):
            fake_quantize(torch.ones(2, 32), QuantizerSpec(), backend="triton")
        assert torch.equal(fake_quantize(torch.ones(2, 32), QuantizerSpec()), torch.ones(2, 32))

else:
    import fast_interpreter

    fast_interpreter.install()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s}/{s.axis}")
    def test_every_spec(spec, dtype):
        assert differing(awkward((33, 40), dtype), spec) == 0

    @pytest.mark.parametrize("spec", [s for s in SPECS if not s.stochastic], ids=lambda s: f"{s}/{s.axis}")
    def test_every_spec_with_a_shadow(spec):
        w = awkward((33, 40), torch.float32)
        near = w * (1 + torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) / 4)
        assert differing(w, spec, near) == 0
        assert unequal(fake_quantize(w, spec, backend="triton"), fake_quantize(w, spec, shadow=w)) == 0

    @pytest.mark.parametrize("axis", [-1, 0])
    def test_a_shadow_far_away_not_finite_and_of_another_dtype(axis):
        for w_dtype, shadow_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
            shadow = awkward((40, 70), shadow_dtype, seed=2)
            assert differing(awkward((40, 70), w_dtype, seed=1), QuantizerSpec(axis=axis), shadow) == 0

    @pytest.mark.parametrize("shape", [(1, 32), (1, 1), (197, 8), (31, 33), (2, 130), (70,), (2, 3, 33)], ids=str)
    def test_odd_shapes(shape):
        for rounding, axis in itertools.product(("nearest_even", "stochastic"), (-1, 0)):
            if axis == -1 or len(shape) < 3:
                assert differing(awkward(shape, torch.float32), QuantizerSpec(rounding=rounding, axis=axis)) == 0

    @pytest.mark.parametrize("block_size", [1, 2, 8, 16, 64, 128])
    def test_other_block_sizes(block_size):
        for rounding, axis in itertools.product(("nearest_away", "stochastic"), (-1, 0)):
            spec = QuantizerSpec(rounding=rounding, axis=axis, block_size=block_size)
            assert differing(awkward((130, 33), torch.bfloat16), spec) == 0

    def test_strided_input():
        for x in (awkward((40, 66), torch.float32).t(), awkward((40, 66), torch.float32)[::2, 1::2]):
            for axis in (-1, 0):
                assert differing(x, QuantizerSpec(rounding="stochastic", axis=axis)) == 0

    def test_noise_of_other_streams_and_positions():
        x = torch.randn(8, 48, generator=torch.Generator().manual_seed(3))
        spec = QuantizerSpec(rounding="stochastic")
        results = set()
        for key, position, stream in itertools.product((0, -1, 2**63 - 1), (0, 2**31, 2**32 - 1), (0, 1, 767)):
            noise = Noise(torch.tensor([key, position << 32 if position < 2**31 else (position - 2**32) << 32]), stream)
            kernel, expected = (fake_quantize(x, spec, seed=noise, backend=b) for b in ("triton", "reference"))
            assert torch.equal(kernel, expected)
            results.add(tuple(kernel.flatten().tolist()))
        assert len(results) == 27

    def test_every_bfloat16_of_the_blocks_of_one_size():
        """All numbers of eight significant bits from 2^-14 up to the largest of the block, of both signs."""
        x = torch.arange(0x3880, 0x40C1, dtype=torch.int16).view(torch.bfloat16)
        x = torch.nn.functional.pad(torch.cat([x, -x]), (0, -2 * len(x) % 31)).view(-1, 31)
        x = torch.cat([torch.full((len(x), 1), 6.0, dtype=x.dtype), x], dim=1)
        for rounding in ROUNDINGS:
            assert differing(x, QuantizerSpec(rounding=rounding)) == 0

    def test_another_small_float_is_served_and_another_grid_is_not(monkeypatch):
        monkeypatch.setitem(
            FORMATS, "e2m2", ElementFormat("e2m2", (*(i / 4 for i in range(8)), 2, 2.5, 3, 3.5, 4, 5, 6, 7))
        )
        monkeypatch.setitem(FORMATS, "int3", ElementFormat("int3", tuple(i / 2 for i in range(8))))
        monkeypatch.setitem(FORMATS, "large", ElementFormat("large", tuple(map(float, range(8)))))
        monkeypatch.setitem(FORMATS, "odd", ElementFormat("odd", (0.0, 1.0, 3.0, 4.0)))
        for element, rounding in itertools.product(("e2m2", "int3"), ROUNDINGS):
            assert differing(awkward((33, 40), torch.float32), QuantizerSpec(element, rounding=rounding)) == 0
        for element in ("large", "odd"):  # its smallest normal number is 4; it is no small float
            with pytest.raises(ValueError, match="Triton kernel"):
                fake_quantize(torch.ones(2, 32), QuantizerSpec(element), backend="triton")

    @pytest.mark.parametrize(
        ("shape", "spec"),
        [
            ((2, 3, 4), QuantizerSpec(axis=1)),
            ((2, 3, 4), QuantizerSpec(axis=0)),
            ((2, 48), QuantizerSpec(block_size=24)),
            ((2, 512), QuantizerSpec(block_size=256)),
        ],
    )
    def test_what_the_kernel_does_not_serve(shape, spec):
        with pytest.raises(ValueError, match="use backend='auto' or 'reference'"):
            fake_quantize(torch.ones(shape), spec, backend="triton")
        assert torch.equal(fake_quantize(torch.ones(shape), spec), torch.ones(shape))

    # Operands: both quantizers of a matrix in one pass

    @pytest.mark.parametrize("blocks", [(16, 16), (16, 32), (32, 128), (1, 64)], ids=str)
    def test_blocks_of_any_size_that_one_kernel_has_are_made_in_one_pass(blocks):
        row, column = QuantizerSpec(block_size=blocks[0]), QuantizerSpec("e2m1", "floor", "stochastic", 0, blocks[1])
        x = awkward((130, 70), torch.float32)
        with by("triton"):
            assert choose.backend_of_job(x, job_of(row, column, (DENSE, DENSE), x.dtype)) is not reference
        for chained in (False, True):
            assert differing_operands(x, row, column, (DENSE, DENSE), torch.float32, chained=chained) == 0

    @pytest.mark.parametrize("blocks", [(32, 48), (32, 256), (48, 32), (3, 3)], ids=str)
    def test_other_blocks_are_the_reference_s_work(blocks):
        row, column = (QuantizerSpec(axis=axis, block_size=size) for axis, size in zip((-1, 0), blocks, strict=True))
        x = awkward((130, 300), torch.float32)
        with by("triton"):
            assert choose.backend_of_job(x, job_of(row, column, (DENSE, DENSE), x.dtype)) is reference
        assert differing_operands(x, row, column, (DENSE, DENSE), torch.float32) == 0

    PAIRS = list(itertools.product(ELEMENTS, PAPER_RULES, ROUNDINGS, ROUNDINGS))
    FORMS = ((DENSE, DENSE), (PACKED, PACKED), (DENSE, PACKED), (PACKED, DENSE))

    @pytest.mark.parametrize("pair", PAIRS, ids="/".join)
    def test_both_quantizers_in_one_pass(pair):
        """Every pair of quantizers, chained and not; forms, dtypes and shapes take turns."""
        element, rule, forward, backward = pair
        row, column = QuantizerSpec(element, rule, forward), QuantizerSpec(element, rule, backward, axis=0)
        turn = PAIRS.index(pair)
        for chained in (False, True):
            turn += 1
            x = awkward(SHAPES[turn % 6], DTYPES[turn % 3 - 1])
            dtype = DTYPES[:2][turn // 2 % 2]
            assert differing_operands(x, row, column, FORMS[turn // 3 % 4], dtype, chained=chained) == 0

    @pytest.mark.parametrize("shape", [*SHAPES, (33, 130)], ids=str)
    def test_odd_shapes_in_every_form(shape):
        row, column = QuantizerSpec(rounding="stochastic"), QuantizerSpec(axis=0)
        for forms in FORMS:
            assert differing_operands(awkward(shape, torch.float32), row, column, forms, torch.float32) == 0

    @pytest.mark.parametrize("form", [DENSE, PACKED, CARRIED])
    def test_one_quantizer_alone(form):
        x = within_window((70, 46), torch.float32)
        for rounding in ("nearest_even", "stochastic"):
            row, column = QuantizerSpec(rounding=rounding), QuantizerSpec(rounding=rounding, axis=0)
            assert differing_operands(x, row, None, (form, NOTHING), torch.bfloat16) == 0
            assert differing_operands(x, None, column, (NOTHING, form), torch.bfloat16) == 0

    def test_the_shadow_is_the_row_quantizer_s_and_its_result_the_column_quantizer_s():
        w = awkward((34, 70), torch.float32)
        shadow = w * (1 + torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) / 4)
        row, column = QuantizerSpec(), QuantizerSpec(rounding="stochastic", axis=0)
        for chained, forms in itertools.product((False, True), FORMS[:2]):
            assert differing_operands(w, row, column, forms, torch.float32, chained=chained, shadow=shadow) == 0

    def test_every_code_under_every_scale_expands_to_its_number():
        """And those next to the ends of a matrix of odd sides, along both axes; codes of no matrix we made."""
        g = torch.Generator().manual_seed(0)
        for element, axis, (rows, columns) in itertools.product(ELEMENTS, (-1, 0), ((256, 33), (33, 257), (1, 1))):
            spec = QuantizerSpec(element, axis=axis)
            codes = torch.randint(256, codes_shape(rows, columns), generator=g, dtype=torch.uint8)
            scales = torch.arange(512).to(torch.uint8).flip(0)
            blocks, across = scales_shape(rows, columns, spec)
            scales = torch.stack([scales.roll(i) for i in range(blocks)])[:, :across].contiguous()
            for dtype in (torch.float32, torch.bfloat16):
                packed = Packed(codes, scales, spec, columns)
                assert unequal(*(expanded(packed, backend, dtype) for backend in ("triton", "reference"))) == 0

    @pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=str)
    @pytest.mark.parametrize("element", ELEMENTS)
    def test_carried_operands_within_the_window(element, fp8):
        roundings = (("nearest_even", "stochastic"), ("stochastic", "stochastic"), ("nearest_away", "nearest_up"))
        for turn, (forward, backward) in enumerate(roundings):
            rule = PAPER_RULES[turn % 2]
            row, column = QuantizerSpec(element, rule, forward), QuantizerSpec(element, rule, backward, axis=0)
            for chained in (False, True):
                x = within_window(SHAPES[turn], DTYPES[turn])
                assert (
                    prepared(x, "reference", row, column, (CARRIED, CARRIED), x.dtype, fp8, chained=chained).lost == 0
                )
                assert differing_operands(x, row, column, (CARRIED, CARRIED), x.dtype, fp8, chained=chained) == 0
                assert differing_operands(x, row, column, (CARRIED, PACKED), x.dtype, fp8, chained=chained) == 0

    def test_the_factor_at_the_ends_of_the_range_and_without_a_finite_number():
        spec = QuantizerSpec()
        sizes = (2.0**-149, 2.0**-126, 2.0**-118, 2.0**-112, 1.0, 2.0**125)
        matrices = [within_window((3, 64), torch.float32).clamp(-1.9, 1.9) * size for size in sizes]
        for x, fp8 in itertools.product([*matrices, torch.zeros(3, 64)], (E4M3, E5M2)):
            assert differing_operands(x, spec, None, (CARRIED, NOTHING), torch.float32, fp8) == 0
            (operand, _), _, _ = prepared(x, "triton", spec, None, (CARRIED, NOTHING), torch.float32, fp8)
            values, factor = operand
            assert unequal(values.float() * factor, fake_quantize(x, spec)) == 0 and factor.isfinite() and factor > 0
        x = torch.full((3, 64), torch.inf)
        factors = [
            prepared(x, b, spec, None, (CARRIED, NOTHING), x.dtype).operands[0].factor for b in ("triton", "reference")
        ]
        assert torch.equal(*factors)

    @pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=str)
    @pytest.mark.parametrize("element", ELEMENTS)
    def test_blocks_below_the_window_are_counted(element, fp8):
        top, lowest = window(FORMATS[element], fp8)
        octaves = top - lowest + 1
        x = torch.exp2(-torch.arange(octaves + 9).float()).unsqueeze(1).repeat(1, 70)
        x[4] = 0.0
        row, column = QuantizerSpec(element), QuantizerSpec(element, axis=0)
        for matrix, specs, forms in (
            (x, (row, None), (CARRIED, NOTHING)),
            (x.t().contiguous(), (None, column), (NOTHING, CARRIED)),
        ):
            for backend in ("triton", "reference"):
                assert prepared(matrix, backend, *specs, forms, torch.float32, fp8).lost == 9 * 3
                inside = matrix[:octaves] if specs[0] else matrix[:, :octaves]
                assert prepared(inside, backend, *specs, forms, torch.float32, fp8).lost == 0
        x[octaves] = torch.nan  # a block that is not finite is not one below
        for backend in ("triton", "reference"):
            assert prepared(x, backend, row, None, (CARRIED, NOTHING), torch.float32, fp8).lost == 8 * 3
            shadow = x.clone()
            shadow[:, 0] = torch.inf  # nor is one whose shadow is not: the first of the three in every row
            results = prepared(x, backend, row, None, (CARRIED, NOTHING), torch.float32, fp8, shadow=shadow)
            assert results.lost == 8 * 2

    @pytest.mark.parametrize("active", [QUANTIZERS, ("q2", "q4", "q5"), ("q1", "q3", "q6")], ids="+".join)
    def test_a_layer_is_the_same_with_kernels_and_reference(active):
        from test_linear_fn import by_function, tensors

        for preset, carrier in itertools.product(("tetrajet", "microscaling"), ("bf16", "fp8")):
            specs = {name: getattr(PRESETS[preset], name) for name in active}
            recipe = LinearRecipe(**specs, backward_operands=PRESETS[preset].backward_operands, carrier=carrier)
            results = []
            for backend in ("triton", "reference"):
                with by(backend):
                    results.append(by_function(*tensors((49,), 48, 32), recipe))
            for name, value in results[0].items():
                assert torch.equal(value, results[1][name]), (preset, carrier, name)

    @pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
    @pytest.mark.parametrize("form", [DENSE, PACKED, CARRIED])
    def test_control_one_place_in_the_reference_is_seen_in_operands(monkeypatch, form, rounding):
        rounds_up = reference.rounds_up
        spec = QuantizerSpec(rounding=rounding)
        if rounding == "stochastic":
            own = Noise(NOISE.state, NOISE.stream + 3)
            x = (1 - uniform((33, 64), own)) / 2  # so that the place between 0 and 1/2 and the draw add up to 1
        else:
            x = torch.randint(-64, 65, (33, 64), generator=torch.Generator().manual_seed(1)) / 8
            x = x.clamp(-6, 6)
        x[:, ::32] = 6.0
        assert differing_operands(x, spec, None, (form, NOTHING), torch.float32) == 0

        def with_moved_thresholds(latent, *args, **kwargs):
            return rounds_up((latent.view(torch.int32) + 1).view(torch.float32), *args, **kwargs)

        monkeypatch.setattr(reference, "rounds_up", with_moved_thresholds)
        assert differing_operands(x, spec, None, (form, NOTHING), torch.float32) > 0

    @pytest.mark.parametrize("rounding", ROUNDINGS)
    def test_control_one_place_in_the_reference_is_seen(monkeypatch, rounding):
        """A threshold moved by one float32 number makes the comparison fail: ties, and a place and draw of sum 1."""
        x, spec = awkward((33, 40), torch.float32).clone(), QuantizerSpec(rounding=rounding)
        if rounding == "stochastic":
            x = (1 - uniform(x.shape, NOISE)) / 2  # so that the place between 0 and 1/2 and the draw add up to 1
            x[:, ::32] = 6.0
        assert differing(x, spec) == 0
        rounds_up, places = reference.rounds_up, -1 if rounding == "nearest_away" else 1

        def with_moved_thresholds(latent, *args, **kwargs):
            return rounds_up((latent.view(torch.int32) + places).view(torch.float32), *args, **kwargs)

        monkeypatch.setattr(reference, "rounds_up", with_moved_thresholds)
        assert differing(x, spec) > 0

    @pytest.mark.parametrize(("betas", "guarded"), [((0.9, 0.999), True), ((0.3, 0.0), False)], ids=str)
    def test_a_ramped_step_is_torch_s(betas, guarded):
        """To a rounding: the interpreter fuses no multiply-add. On a GPU bit for bit, in tests/test_qramping.py."""
        from test_qramping import ramped_steps

        from quantization.backends.gpu.ramp import ramped_step

        *floats, counts = ramped_steps(ramped_step, torch.device("cpu"), betas, guarded)
        *expected, expected_counts = ramped_steps(qramping._step_in_chunks, torch.device("cpu"), betas, guarded)
        torch.testing.assert_close(floats, expected, rtol=2e-6, atol=1e-6, equal_nan=True)
        assert all(map(torch.equal, counts, expected_counts))


def test_plans_are_kept_by_value_and_not_without_end():
    launch = pytest.importorskip("quantization.backends.gpu.launch")
    launch._plan.cache_clear()
    launch._plan_expand.cache_clear()
    recipes = [build_recipe() for _ in range(40)]
    jobs = [LinearJobs(recipe, (48, 64)).of(X, torch.ones(8, 64), torch.float32) for recipe in recipes]
    assert len({id(launch._plan(job, 8, 64, torch.float32)) for job in jobs}) == 1
    assert launch._plan.cache_info().currsize == 1
    for plan, key in ((launch._plan, jobs[0]), (launch._plan_expand, recipes[0].q6)):
        for rows in range(1, launch.PLANS + 50):
            plan(key, rows, 64, torch.float32)
        assert plan.cache_info().currsize == launch.PLANS
    launch._plan.cache_clear()
    launch._plan_expand.cache_clear()
