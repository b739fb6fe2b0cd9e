"""The kernels of the design space against the reference, bit for bit, in Triton's interpreter.

As in test_kernels.py the tests run in a process of their own. There, points of the whole space are drawn at random, the
same each time: formats, rules, targets, outer scales, square blocks, rotations, shapes, dtypes, forms, shadows. A part
of them here, all of them on a GPU, in tests/test_gpu_design.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os

import numpy as np
import pytest
import torch
from interpreter_helpers import Process, assert_passed, interpreting

from quantization import PRESETS, QuantizerSpec, fake_quantize
from quantization.backends import choose, int4, reference, scales
from quantization.backends.scales import hold, outer_exponent
from quantization.formats import FORMATS, SCALE_FORMATS, ScaleFormat
from quantization.job import DENSE, NOTHING, SCALED, Job
from quantization.noise import uniform
from quantization.rotation import Turn
from quantization.words import QUANTIZERS, SCALE_RULES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
POINTS = 80
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

if not INTERPRETED:

    @functools.cache
    def begin() -> Process:
        """This file in a process with the interpreter. conftest.py begins it before all tests."""
        return interpreting(__file__)

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        assert_passed(begin())

    @pytest.mark.parametrize("eighths", range(8, 16))
    def test_two_fused_operations_round_a_quotient_as_a_division(eighths):
        """And lies on the side of every number of five bits that the exact one lies on. On a GPU all numbers."""
        x = np.arange(2**23, 2**24, 17, dtype=np.int64)
        t = np.float32(eighths / 8)
        reciprocal = np.float32(1) / t
        q = x.astype(np.float32) * reciprocal
        # float64 holds the product and the sum, so that one rounding to float32 is what a fused operation does.
        e = (q.astype(np.float64) * float(t) - x).astype(np.float32)
        ours = (q.astype(np.float64) - e.astype(np.float64) * float(reciprocal)).astype(np.float32)
        assert (ours == x.astype(np.float32) / t).all()
        assert (q != ours).any() or eighths == 8  # the control: one multiplication is not enough
        boundaries = np.arange(2**22, 2**24, 2**18, dtype=np.int64)  # five bits
        for at in boundaries:
            exact = np.sign(8 * x - at * eighths)
            assert (np.sign(ours.astype(np.float64) - at) == exact).all()

else:
    import fast_interpreter
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    fast_interpreter.install()
    from design_points import (
        MANY_ROWS,
        Point,
        differences_at,
        fault_at,
        int4_amiss,
        matrix_of,
        point,
        turned_back_amiss,
    )
    from test_kernels import awkward, by, differing, noise_on, unequal
    from test_scales import NOISE, maxima

    from quantization.backends.gpu import design, design_launch
    from quantization.backends.gpu.launching import has_blocks_and_format

    # Formats that kernels have; of others there is the reference alone, and nothing to compare it with.
    ELEMENTS = [name for name in FORMATS if has_blocks_and_format(QuantizerSpec(name))]
    SCALES = [name for name in SCALE_FORMATS if design_launch.by_design(QuantizerSpec(scale_format=name))]

    @triton.jit
    def narrow_kernel(x_ptr, out_ptr, MANY: tl.constexpr):
        place = tl.program_id(0) * MANY + tl.arange(0, MANY)
        narrow = design.narrowed(tl.load(x_ptr + place), out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, narrow)

    def fused_by_numpy(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """a b + c in float32, rounded once: in float64 to odd before, which hides no bit from the second rounding."""
        product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        total = product + c
        part = total - product
        rest = (product - (total - part)) + (c - part)
        bits = total.view(np.int64)
        inexact = np.isfinite(rest) & (rest != 0) & (bits & 1 == 0)
        toward = np.where((rest > 0) == (total > 0), 1, -1)
        return np.where(inexact, bits + toward, bits).view(np.float64).astype(np.float32)

    def test_points_are_of_the_whole_space():
        jobs = [point(number).job for number in range(800)]  # which a GPU compares, three matrices of each
        specs = [spec for job in jobs for spec in (job.row, job.column) if spec is not None]
        assert {s.scale_format for s in specs} == set(SCALES) and {s.element for s in specs} >= set(ELEMENTS)
        assert {"e8m0", "e8m3", "e4m3", "ue5m3", "ue5m3_61440", "fp32"} <= set(SCALES)
        assert {"e2m1", "e3m0", "e1m2"} <= set(ELEMENTS)
        assert {s.scale_rule for s in specs} == set(SCALE_RULES)
        assert {s.block_size for s in specs if s.block_rows > 1} == {16, 32}
        for name, many in (("rounding", 4), ("element", 3), ("target", 5), ("target_scale", 3), ("scale_rounding", 2)):
            assert len({getattr(s, name) for s in specs}) >= many
        turns = [turn for job in jobs for turn in (job.row_turn, job.column_turn) if turn is not None]
        assert {turn.signs for turn in turns} == {"none", "fixed", "fresh"}
        assert {turn.size for turn in turns} >= {2, 4, 8, 16, 32, 64, 128}
        assert {(job.chained, job.sums) for job in jobs} == set(itertools.product((False, True), repeat=2))
        assert len({job.text for job in jobs}) > 760

    @pytest.mark.parametrize("start", range(0, POINTS, 40))
    def test_random_points(start):
        faults = [f"{n}: {said}" for n in range(start, start + 40) if (said := fault_at(point(n), CPU))]
        assert not faults, "\n".join(faults)

    @triton.jit
    def inverse(s):
        return 1.0 / s

    # Its outer scale is that of an earlier tensor, of 0.7, under which its largest block is none of float32's.
    OUTGROWN = Point(
        job=Job(
            QuantizerSpec(block_size=16, block_rows=16, scale_format="ue5m3", outer="pow2", outer_delay=3),
            QuantizerSpec(
                rounding="nearest_away",
                axis=0,
                block_size=16,
                scale_format="ue5m3",
                scale_rounding="up",
                outer="pow2",
                outer_delay=3,
                correction=1.009276,
            ),
            DENSE,
            SCALED,
            torch.float32,
            chained=True,
            row_stream=3,
            column_stream=5,
        ),
        shape=(7, 130),
        dtype=torch.float32,
        shadowed=False,
        seed=0,
    )

    def test_a_block_outgrows_its_delayed_outer_scale():
        spec, block = OUTGROWN.job.row, matrix_of(OUTGROWN, CPU)[:, :16]
        held = torch.tensor(0.7).view(torch.int32)  # that of differences_at
        assert hold(block.abs().max(), spec, noise_on(CPU), held) == torch.tensor(0.7)  # it is not renewed
        assert block.isfinite().all() and spec.block_rows >= len(block)
        outgrown = block.abs().max().double() / 2.0 ** int(outer_exponent(held.view(torch.float32), spec))
        assert outgrown > torch.finfo(torch.float32).max

    def test_random_points_by_the_arithmetic_of_a_gpu(monkeypatch):
        """By the kernels' own quotients there: fused operations, reciprocals that are off by two units, and the smaller
        of a number and a NaN is the number."""
        draw, fusions = np.random.default_rng(0), []

        def quotient(_self, a, b):
            off = draw.integers(-2, 3, a.data.shape, dtype=np.int32)
            return interpreter.TensorHandle(((a.data / b.data).view(np.int32) + off).view(np.float32), a.dtype.scalar)

        def fused(_self, a, b, c):
            fusions.append(a.data.size)
            return interpreter.TensorHandle(fused_by_numpy(a.data, b.data, c.data), a.dtype.scalar)

        def smaller(_self, a, b):
            return interpreter.TensorHandle(np.fmin(a.data, b.data), a.dtype.scalar)

        monkeypatch.setattr(design, "_INTERPRETED", tl.constexpr(False))
        monkeypatch.setattr(design, "_inverse", inverse)  # an instruction there, which the interpreter does not have
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fdiv", quotient)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_minnumf", smaller)
        points = [OUTGROWN, *[it for it in map(point, range(120, 240)) if not it.job.rotated][:20]]
        faults = [said for it in points if (said := fault_at(it, CPU))]
        assert len(points) == 21 and not faults and fusions, "\n".join(faults)

    def test_a_fault_says_which_point_it_is_and_what_differs(monkeypatch):
        it = point(3)
        assert fault_at(it, CPU) is None
        monkeypatch.setattr(reference, "quantized", None)
        said = fault_at(it, CPU)
        assert said.startswith(f"{it}: TypeError: ") and str(it.shape) in said

    def test_any_number_is_narrowed_as_torch_does_it():
        """Of a NaN every bit may be set, as on a GPU: rounding must not carry into its sign."""
        high = torch.arange(2**16, dtype=torch.int64).repeat_interleave(6)
        low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).repeat(2**16)
        x = ((high << 16) | low).to(torch.int32).view(torch.float32)
        ours = torch.empty_like(x, dtype=torch.bfloat16)
        narrow_kernel[(len(x) // 2**12,)](x, ours, 2**12)
        assert unequal(ours, x.to(torch.bfloat16)) == 0

    def test_every_point_is_a_kernel_s():
        for it in map(point, range(400)):
            if not {s.element for s in (it.job.row, it.job.column) if s is not None} <= set(ELEMENTS):
                continue
            with by("triton"):
                assert choose.backend_of_job(matrix_of(it, CPU), it.job) is not reference, str(it)

    @pytest.mark.parametrize("name", [name for name in SCALES if name != "e8m0"])
    def test_scales_at_and_next_to_every_boundary(name):
        for target, rounding in itertools.product((None, 6 * 16 / 17, 6.072), ("nearest", "up")):
            spec = QuantizerSpec(block_size=16, scale_format=name, target=target, scale_rounding=rounding)
            values = maxima(dataclasses.replace(spec, scale_format="e4m3" if name == "fp32" else name))
            x = torch.zeros(len(values), 16)
            x[:, 3], x[:, 9] = values, values / 3
            assert differing(x, spec) == 0

    @pytest.mark.parametrize("element", ELEMENTS)
    def test_elements_at_and_next_to_every_boundary_under_every_significand(element):
        g = torch.Generator().manual_seed(0)
        fmt = QuantizerSpec(element).format
        grid = torch.tensor(fmt.magnitudes)
        places = torch.cat([grid, (grid[1:] + grid[:-1]) / 2])
        scales = (1 + torch.arange(8) / 8).repeat_interleave(8) * torch.exp2(torch.randint(-80, 80, (64,), generator=g))
        x = places[torch.randint(len(places), (64, 32), generator=g)] * scales[:, None]
        x = (x.view(torch.int32) + torch.where(x == 0, 0, torch.randint(-1, 2, x.shape, generator=g)).int()).view(
            x.dtype
        )
        x[:, ::16] = fmt.max * scales[:, None]
        for rounding in ("nearest_even", "nearest_away", "nearest_up", "stochastic"):
            spec = QuantizerSpec(element, rounding=rounding, block_size=16, scale_format="e8m3")
            kernel, expected = (fake_quantize(x, spec, seed=NOISE, backend=b) for b in ("triton", "reference"))
            assert unequal(kernel, expected) == 0

    def test_what_is_not_finite_and_both_ends_of_the_range():
        for name, rows, outer in itertools.product(("e4m3", "e8m3", "fp32"), (1, 16), ("none", "pow2")):
            if outer == "none" or name == "e4m3":
                spec = QuantizerSpec(block_size=16, block_rows=rows, scale_format=name, outer=outer)
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    assert differing(awkward((70, 130), dtype, 3), spec) == 0

    def test_int4_s_kernels_give_the_bits_of_its_formulas(monkeypatch):
        assert int4_amiss(CPU) == []
        assert int4_amiss(CPU, (torch.float32,), MANY_ROWS) == []
        monkeypatch.setattr(int4, "uniform", lambda shape, noise: uniform(shape, noise, 1))  # the controls
        assert {fault.split()[0] for fault in int4_amiss(CPU)} == {"low", "rows", "weights"}
        right = int4.levels
        monkeypatch.setattr(int4, "levels", lambda v, *more: right((v.abs() + 0.5).floor().copysign(v), *more))
        assert {fault.split()[0] for fault in int4_amiss(CPU)} == {"low", "rows", "weights", "levels", "of"}
        monkeypatch.undo()
        monkeypatch.setattr(int4, "FILLING_ROUNDS", int4.FILLING_ROUNDS - 1)
        assert {" ".join(fault.split()[:2]) for fault in int4_amiss(CPU)} == {"weights uneven", "weights few"}

    def test_gradients_are_turned_back_to_the_same_bits(monkeypatch):
        assert turned_back_amiss(CPU, (2, 16, 128)) == []
        right = reference.turn_back  # the control: a reference that forgets the signs
        monkeypatch.setattr(reference, "turn_back", lambda x, turn, noise: right(x, turn._replace(signs="none"), noise))
        assert len(turned_back_amiss(CPU, (16,))) == 6

    @pytest.mark.parametrize("method", [name for name in PRESETS if name != "full_precision"])
    def test_a_layer_of_a_method_is_the_same_with_kernels_and_reference(method):
        from test_linear_fn import by_function, tensors

        results = []
        for backend in ("triton", "reference"):
            with by(backend):
                results.append(by_function(*tensors((64,), 64, 48), PRESETS[method]))
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), name

    def test_kernels_take_a_new_scale_format_where_it_has_three_fraction_bits(monkeypatch):
        x = awkward((64, 96), torch.float32, 1)
        for name, fraction, emin, most, served in (("less", 3, -6, 240.0, True), ("short", 2, -14, 57344.0, False)):
            monkeypatch.setitem(SCALE_FORMATS, name, ScaleFormat(name, fraction, emin, True, most, 1 - emin))
            for outer, target, rounding in itertools.product(
                ("none", "pow2"), (None, 5.0), ("nearest_even", "stochastic")
            ):
                spec = QuantizerSpec(scale_format=name, outer=outer, target=target, rounding=rounding, block_size=16)
                assert design_launch.by_design(spec) is served
                if served:
                    assert differing(x, spec) == 0

    def test_what_has_no_kernel_is_the_reference_s_work():
        spec = QuantizerSpec(block_size=16, scale_format="e4m3")
        without = [
            dataclasses.replace(spec, scale_rounding="stochastic"),
            dataclasses.replace(spec, outer="fp32", arithmetic="te"),
            dataclasses.replace(spec, target=0.5),
            QuantizerSpec(scale_rule="rms_nearest", block_size=16),
            QuantizerSpec(block_size=64, block_rows=64),
        ]
        x = torch.randn(64, 64)
        with by("triton"):
            for other in without:
                assert choose.backend_of_job(x, Job(other, None, DENSE, NOTHING, x.dtype)) is reference
            alone = Job(None, spec, NOTHING, DENSE, x.dtype, row_turn=Turn(16, "none", 0))
            assert choose.backend_of_job(x, alone) is reference
            assert choose.backend_of_job(x, Job(spec, None, DENSE, NOTHING, x.dtype)) is not reference
        for recipe in PRESETS.values():
            specs = [spec for q in QUANTIZERS if (spec := getattr(recipe, q)) is not None]
            assert all(spec.ruled or design_launch.by_design(spec) for spec in specs)

    def rotated_under_an_outer_scale(job: Job) -> bool:
        row = job.row
        return row is not None and row.outer == "pow2" and not row.outer_delay and job.row_turn is not None

    @pytest.mark.parametrize("what", ["significand", "sums", "peak"])
    def test_control_a_change_of_the_reference_is_seen(monkeypatch, what):
        it = next(p for p in map(point, range(3000)) if p.seed % 2 and rotated_under_an_outer_scale(p.job))
        assert differences_at(it, CPU) == []
        if what == "significand":
            monkeypatch.setattr(reference, "significand", lambda scale: torch.ones_like(scale))
        elif what == "peak":
            monkeypatch.setattr(scales, "largest_of", lambda x: x.abs().amax().float() * 2.0**-20)  # codes end
        else:
            rotate = reference.rotate

            def elsewhere(x: torch.Tensor, *arguments) -> torch.Tensor:
                return (rotate(x, *arguments).view(torch.int32) + 1024).view(torch.float32)

            monkeypatch.setattr(reference, "rotate", elsewhere)
        assert differences_at(it, CPU)
