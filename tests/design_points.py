"""Points of the design space, drawn at random but the same each time, and the kernels compared with the reference."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import torch
from test_kernels import DTYPES, awkward, by, noise_on, unequal

from quantization import QuantizerSpec
from quantization.backends.choose import backend_of_int4
from quantization.formats import FORMATS, SCALE_FORMATS
from quantization.job import DENSE, NOTHING, PACKED, SCALED, Dense, Job, Packed
from quantization.noise import Noise
from quantization.operands import prepare, turned_back, values_of
from quantization.operands.forms import dense_form, packable
from quantization.rotation import SIGNS, SIZES, Rotation, Turn
from quantization.words import ROUNDINGS, SCALE_RULES

NOT_RMS = [rule for rule in SCALE_RULES if not rule.startswith("rms")]
SHAPES = ((34, 70), (49, 33), (1, 33), (64, 96), (66, 32), (32, 64), (128, 48), (7, 130), (96, 160))
TARGETS = (None, None, 4.0, 6 * 16 / 17, 6.072, 1.3)


class Point(NamedTuple):
    """What a matrix is quantized by, and the matrix."""

    job: Job
    shape: tuple[int, int]
    dtype: torch.dtype
    shadowed: bool
    seed: int

    def __str__(self) -> str:
        return f"{self.job.text} {self.shape} {self.dtype} shadow {self.shadowed}"


def spec_of(draw: random.Random, axis: int) -> QuantizerSpec:
    """Any quantizer that the kernels have."""
    name = draw.choice(("e8m0", "e8m0", "e8m3", "e4m3", "e4m3", "ue5m3", "ue5m3_61440", "fp32"))
    element = draw.choice(("e2m1", "e2m1", "e2m1", *FORMATS))
    size = draw.choice((16, 16, 32, 32, 8, 64))
    fmt, fields = SCALE_FORMATS[name], {"correction": draw.choice((1.0, 1.0, 1.009276))}
    if name == "e8m0":
        rules = SCALE_RULES if size == 32 and element == "e2m1" else NOT_RMS
        known = ("even",) if FORMATS[element].mantissa_bits is not None else ()
        fields["scale_rule"] = draw.choice(rules if element == "e2m1" else ("truncation_free", "floor", *known))
    else:
        fields |= {"target": draw.choice(TARGETS), "scale_rounding": draw.choice(("nearest", "nearest", "up"))}
        if fmt.subnormal and fmt.fraction and draw.random() < 0.6:
            fields |= {"outer": "pow2", "target_scale": draw.choice((None, min(256.0, fmt.max), 10.0))}
            fields["outer_delay"] = draw.choice((0, 0, 3))
    by_deviation = fields.get("scale_rule", "").startswith("rms")
    rows = size if size in (16, 32) and not by_deviation and draw.random() < 0.25 else 1
    return QuantizerSpec(
        element,
        rounding=draw.choice(ROUNDINGS),
        axis=axis,
        block_size=size,
        block_rows=rows,
        scale_format=name,
        **fields,
    )


def form_of(draw: random.Random, spec: QuantizerSpec | None) -> str:
    if spec is None:
        return NOTHING
    return draw.choice((PACKED, DENSE)) if packable(spec) else draw.choice((dense_form(spec), DENSE))


def point(number: int, again: int = 0) -> Point:
    """again: the same quantizers of other matrices, for which Triton compiles nothing new."""
    draw = random.Random(number)
    shape, which = draw.choice(SHAPES), draw.choice(("row", "column", "both", "both", "both"))
    row = spec_of(draw, -1) if which != "column" else None
    column = spec_of(draw, 0) if which != "row" else None
    turns = [
        Rotation(draw.choice(SIZES[1:]), draw.choice(SIGNS)).turn(length, product)
        if spec is not None and draw.random() < 0.5
        else None
        for spec, length, product in ((row, shape[1], 0), (column, shape[0], 2))
    ]
    stochastic = row is not None and row.stochastic
    mask = row is not None and not row.ruled and draw.random() < 0.2
    return Point(
        job=Job(
            row,
            column,
            form_of(draw, row),
            form_of(draw, column),
            draw.choice((torch.float32, torch.bfloat16)),
            chained=draw.random() < 0.5,
            sums=draw.random() < 0.3,
            row_stream=3,
            column_stream=5,
            row_turn=turns[0],
            column_turn=turns[1],
            mask=mask,
        ),
        shape=(shape[0] * (1, 3, 1)[again], shape[1] * (1, 1, 5)[again]),  # what divides them stays, of powers of two
        dtype=draw.choice(DTYPES),
        shadowed=row is not None and not stochastic and draw.random() < 0.25,
        seed=(draw.randrange(5) + again) % 5,
    )


def matrix_of(it: Point, device: torch.device) -> torch.Tensor:
    """Awkward numbers, for most points finite ones, else rotations and outer scales would see few others."""
    x = awkward(it.shape, it.dtype, it.seed)
    if it.seed % 4:
        x = torch.where(x.isfinite() & (x.abs() < 1e30), x, torch.ones_like(x))
    if it.seed % 2:
        g = torch.Generator().manual_seed(it.seed)
        x = (torch.randn(it.shape, generator=g) * torch.exp2(torch.randint(-3, 4, (it.shape[0], 1), generator=g))).to(x)
    return x.to(device)


def differences_at(it: Point, device: torch.device) -> list[str]:
    """What of the kernels' results is not the reference's: "row: 3 of 6144 numbers, first (0, 7): 1.5 for 2.0"."""
    x, job, noise = matrix_of(it, device), it.job, noise_on(device)
    noise = Noise(noise.state, noise.stream)
    shadow = None
    if it.shadowed:
        shadow = x.float() * (1 + torch.randn(it.shape, generator=torch.Generator().manual_seed(1)).to(device) / 4)
    results = []
    for backend in ("triton", "reference"):
        held = torch.tensor([0.7, 0.0], device=device).view(torch.int32)
        with by(backend):
            results.append((prepare(x, job, noise, shadow, held=held), held))
    (ours, held), (theirs, expected) = results
    pairs = {"held": (held, expected)}
    if job.mask:
        pairs["inside"] = (ours.inside, theirs.inside)
    for name, a, b in (("row", ours.row, theirs.row), ("column", ours.column, theirs.column)):
        if type(a) is not type(b):
            return [f"{name} is {type(a).__name__} for {type(b).__name__}"]
        if isinstance(a, Packed):
            pairs[f"{name}'s scales"] = (a.scales, b.scales)
            with by("reference"):
                pairs[name] = tuple(values_of(operand, job.dtype) for operand in (a, b))
        elif a is not None:
            pairs[name] = (a.values, b.values)
            if not isinstance(a, Dense):
                pairs[f"{name}'s factor"] = (a.factor, b.factor)
    found = [said for name, (a, b) in pairs.items() if (said := _difference(name, a, b))]
    if job.sums and x.isfinite().all():
        error, bound = (ours.sums.double() - x.double().sum(0)).abs(), 1e-6 * x.double().abs().sum(0)
        if (beyond := ~(error <= bound)).any():
            found.append(f"sums: {int(beyond.sum())} of {len(error)} beyond their bound, by {float(error.max()):g}")
    return found


def _difference(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    if not (count := unequal(ours, theirs)):
        return None
    apart = (ours != theirs) & ~(ours.isnan() & theirs.isnan())  # of what is left signs of zeros alone differ
    where = tuple(apart.nonzero()[0].tolist()) if apart.any() else None
    first = (
        "signs of zeros alone" if where is None else f"first {where}: {float(ours[where])} for {float(theirs[where])}"
    )
    return f"{name}: {count} of {ours.numel()} numbers, {first}"


def fault_at(it: Point, device: torch.device) -> str | None:
    """The point and what is wrong there, an exception too; None where nothing is."""
    try:
        found = differences_at(it, device)
    except Exception as error:  # of any kind: the other points are still to be looked at
        found = [f"{type(error).__name__}: {error}"]
    return f"{it}: {'; '.join(found)}" if found else None


__all__ = ["MANY_ROWS", "SCALED", "Point", "differences_at", "fault_at", "matrix_of", "point", "spec_of"]


MANY_ROWS = ((5000, 3),)  # so that weights of rows take more than one program


def int4_amiss(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    shapes: tuple[tuple[int, int], ...] = ((37, 130), (64, 96), (3, 7), (130, 33)),
) -> list[str]:
    """What INT4's kernels make otherwise than their formulas, of ties, their neighbours and what is not finite too."""
    faults, one = [], torch.ones((), device=device)
    for number, (dtype, shape) in enumerate(itertools.product(dtypes, shapes)):
        g = torch.Generator().manual_seed(number)
        x = torch.randint(-196, 197, shape, generator=g) / 2  # all ties among them, and what is next to them in float32
        x = (x.view(torch.int32) + torch.randint(-4, 5, shape, generator=g).int() * (x != 0)).view(torch.float32)
        x = torch.where(torch.rand(shape, generator=g) < 0.5, x, torch.randn(shape, generator=g))
        x[0, 0], x[-1, -1] = 98.0, -0.0
        x[:2, 1:3] = torch.tensor([[0.0, torch.nan], [torch.inf, -torch.inf]])
        v, product = (x / 7).to(device), torch.randn(shape, generator=g).to(dtype).to(device)
        weights = (torch.rand(2, shape[0], generator=g) * 3 - 1).clamp(min=0).to(device)  # of a third of the rows 0
        own = Noise(noise_on(device).state, 8 * number)
        results = []
        for backend in ("triton", "reference"):
            with by(backend):
                kernels = backend_of_int4(v)
            parts = kernels.split(x.to(dtype).to(device), one, 14, 6, own)
            levels = kernels.levels(v, -8, 7, dtype)
            rows = kernels.weighted_rows(*parts, weights, 14, dtype)
            sampled = [kernels.row_weights(score.to(device), shape[0], own) for score in _scores(shape[0], g)]
            results.append((*parts, levels, rows, *kernels.straight_through(product, 0.3 * one, v, -8, 7), *sampled))
        names = ("high", "low", "levels", "rows", "gradient", "of step", *(f"weights {kind}" for kind in _SCORES))
        for name, a, b in zip(names, *results, strict=True):
            if wrong := unequal(a, b):
                faults.append(f"{name} {shape} {dtype}: {wrong}")
    return faults


_SCORES = ("even", "uneven", "few", "none", "infinite", "nan")


def _scores(rows: int, g: torch.Generator) -> list[torch.Tensor]:
    """Scores of rows (2 x N): those of which some are certain in any round, and what leaves nothing to share."""
    g = g.clone_state()  # the same for every backend
    even, uneven = torch.rand(2, rows, generator=g), torch.randn(2, rows, generator=g).mul(4).exp()
    few = uneven * (torch.rand(2, rows, generator=g) < 0.3)
    infinite, nan = even.clone(), even.clone()
    infinite[0, 1], nan[1, 0] = torch.inf, torch.nan
    return [even, uneven, few, torch.zeros(2, rows), infinite, nan]


def turned_back_amiss(device: torch.device, sizes: tuple[int, ...] = SIZES) -> list[str]:
    """Rotations after which the kernel's matrix is not the reference's."""
    faults = []
    for number, (size, signs, dtype) in enumerate(itertools.product(sizes, SIGNS, DTYPES)):
        turn, shape = Turn(size, signs, number % 3), (37 + number % 3, size * (1 + 2 * (number % 2)))
        x, results = awkward(shape, dtype, number).to(device), []
        for backend in ("triton", "reference"):
            with by(backend):
                results.append(turned_back(x, turn, noise_on(device)))
        if wrong := unequal(*results):
            faults.append(f"{turn.text} {shape} {dtype}: {wrong}")
    return faults
