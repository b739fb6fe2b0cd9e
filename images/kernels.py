"""Triton kernels that do to a batch of images what Pillow does to each: the same bits.

An image is a row of the parcel's table (columns: parcel.py), which says where its pixels are and how they lie. Between
the kernels images are planes, uint8, (2, B, 3, S, S): an operation reads one half and writes the other. Where Pillow
computes in doubles or floats, so do these, in its order and without fused multiply-adds, which launches switch off.
Loops of a length that is loaded are written with `while`, which the interpreter has too.
Pillow's arithmetic: libImaging/Resample.c, Geometry.c, Blend.c, Filter.c, BoxBlur.c, ImageOps.py, ImageEnhance.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from images import draws, parcel

_COLUMNS, _OF_OPERATION = tl.constexpr(parcel.COLUMNS), tl.constexpr(parcel.OF_OPERATION)
_START, _ROW, _PIXEL, _CHANNEL = (tl.constexpr(c) for c in (parcel.START, parcel.ROW, parcel.PIXEL, parcel.CHANNEL))
_TOP, _LEFT, _HEIGHT, _WIDTH = (tl.constexpr(c) for c in (parcel.TOP, parcel.LEFT, parcel.HEIGHT, parcel.WIDTH))
_TO_HEIGHT, _TO_WIDTH = tl.constexpr(parcel.TO_HEIGHT), tl.constexpr(parcel.TO_WIDTH)
_DOWN, _RIGHT, _BICUBIC = tl.constexpr(parcel.DOWN), tl.constexpr(parcel.RIGHT), tl.constexpr(parcel.BICUBIC)
_FLIP, _OPERATIONS, _BETWEEN = (tl.constexpr(c) for c in (parcel.FLIP, parcel.OPERATIONS, parcel.BETWEEN))
_COLUMNS_FIRST = tl.constexpr(parcel.COLUMNS_FIRST)
_FIRST_BOX, _BOXES, _OF_BOX = (tl.constexpr(c) for c in (parcel.FIRST_BOX, parcel.BOXES, parcel.OF_BOX))
_TABLE, _AUTO_CONTRAST, _EQUALIZE = (tl.constexpr(k) for k in (draws.TABLE, draws.AUTO_CONTRAST, draws.EQUALIZE))
_CONTRAST, _COLOR, _SHARPNESS = (tl.constexpr(k) for k in (draws.CONTRAST, draws.COLOR, draws.SHARPNESS))
_AFFINE, _BLUR, _VALUES = tl.constexpr(draws.AFFINE), tl.constexpr(draws.BLUR), tl.constexpr(draws.VALUES)
_BITS, _UNIT, _HALF = tl.constexpr(22), tl.constexpr(2.0**22), tl.constexpr(2**21)  # of a resized pixel's weights


@triton.jit
def _clip8(x):
    return tl.minimum(tl.maximum(x, 0), 255)


@triton.jit
def _filter(x, bicubic):
    """Pillow's bicubic (a = -0.5) or bilinear filter."""
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    cubic = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.where(bicubic != 0, cubic, tl.where(x < 1.0, 1.0 - x, 0.0))


@triton.jit
def weights_kernel(images, weights, bounds, S: tl.constexpr, TAPS, B: tl.constexpr):
    """weights (images, 2, TAPS, S) int32 and bounds (images, 2, S) int32, the first input place: rows, then columns."""
    n, axis = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image = images + n * _COLUMNS
    length = tl.load(image + _HEIGHT + axis)
    to = tl.load(image + _TO_HEIGHT + axis)
    bicubic = tl.load(image + _BICUBIC)
    x = tl.program_id(2) * B + tl.arange(0, B)
    place = tl.abs(x + tl.load(image + _DOWN + axis))
    place = tl.where(place >= to, 2 * (to - 1) - place, place)  # mirrored at the edges
    scale = length.to(tl.float64) / to.to(tl.float64)
    stretch = tl.where(scale < 1.0, 1.0, scale)
    support = tl.where(bicubic != 0, 2.0, 1.0).to(tl.float64) * stretch
    inverse = 1.0 / stretch
    center = (place.to(tl.float64) + 0.5) * scale
    first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
    count = tl.minimum((center + support + 0.5).to(tl.int32), length.to(tl.int32)) - first
    total = tl.zeros([B], tl.float64)
    k = 0
    while k < TAPS:
        w = _filter((k + first - center + 0.5) * inverse, bicubic)
        total += tl.where(k < count, w, 0.0)
        k += 1
    inside = x < S
    k = 0
    while k < TAPS:
        w = _filter((k + first - center + 0.5) * inverse, bicubic)
        w = tl.where(total != 0.0, w / total, w)
        fixed = w * _UNIT
        fixed = tl.where(fixed < 0, fixed - 0.5, fixed + 0.5).to(tl.int32)
        fixed = tl.where(k < count, fixed, 0)
        tl.store(weights + ((n * 2 + axis) * TAPS + k) * S + x, fixed, mask=inside)
        k += 1
    tl.store(bounds + (n * 2 + axis) * S + x, first, mask=inside)


@triton.jit
def _taps(image, axis, TAPS):
    """How many weights the pixels along an axis have at most."""
    scale = tl.load(image + _HEIGHT + axis).to(tl.float64) / tl.load(image + _TO_HEIGHT + axis).to(tl.float64)
    support = tl.maximum(scale, 1.0) * tl.where(tl.load(image + _BICUBIC) != 0, 2.0, 1.0)
    return tl.minimum(2 * tl.ceil(support).to(tl.int32) + 1, TAPS)


@triton.jit
def lines_kernel(images, weights, bounds, between, total, S: tl.constexpr, TAPS, LINES: tl.constexpr, B: tl.constexpr):
    """The first pass: each row of an image's box (or column, where that is first) resized to S pixels.

    between: (3, lines of all images, S) uint8.
    """
    n = tl.program_id(0).to(tl.int64)
    image = images + n * _COLUMNS
    along = 1 - tl.load(image + _COLUMNS_FIRST)  # the axis that is resized: 1, or 0 for columns
    lines = tl.load(image + _HEIGHT + 1 - along)
    y = tl.program_id(1) * LINES + tl.arange(0, LINES)
    x = tl.program_id(2) * B + tl.arange(0, B)
    if tl.program_id(1) * LINES < lines:
        last = tl.load(image + _HEIGHT + along).to(tl.int32) - 1
        step, channel = tl.load(image + _ROW + along), tl.load(image + _CHANNEL)
        inside = x < S
        first = tl.load(bounds + (n * 2 + along) * S + x, mask=inside, other=0)
        starts = tl.load(image + _START) + (tl.load(image + _TOP + 1 - along) + y) * tl.load(image + _ROW + 1 - along)
        starts += tl.load(image + _TOP + along) * step
        mask = (y < lines)[:, None] & inside[None, :]
        red = tl.full([LINES, B], _HALF, tl.int32)
        green, blue = red, red
        taps = _taps(image, along, TAPS)
        k = 0
        while k < taps:
            w = tl.load(weights + ((n * 2 + along) * TAPS + k) * S + x, mask=inside, other=0)[None, :]
            at = tl.minimum(first + k, last)
            where = (starts[:, None] + (at * step)[None, :]).to(tl.pointer_type(tl.uint8))
            red += w * tl.load(where, mask=mask, other=0).to(tl.int32)
            green += w * tl.load(where + channel, mask=mask, other=0).to(tl.int32)
            blue += w * tl.load(where + 2 * channel, mask=mask, other=0).to(tl.int32)
            k += 1
        out = between + (tl.load(image + _BETWEEN) + y)[:, None] * S + x[None, :]
        tl.store(out, _clip8(red >> _BITS).to(tl.uint8), mask=mask)
        plane = tl.cast(total, tl.int64) * S  # batches with large images have more than 2**31 bytes
        tl.store(out + plane, _clip8(green >> _BITS).to(tl.uint8), mask=mask)
        tl.store(out + 2 * plane, _clip8(blue >> _BITS).to(tl.uint8), mask=mask)


@triton.jit
def across_kernel(
    images, weights, bounds, between, total, planes, S: tl.constexpr, TAPS, LINES: tl.constexpr, B: tl.constexpr
):
    """The second pass: the lines resized to S of them, and the image flipped: planes (B, 3, S, S) uint8."""
    n = tl.program_id(0).to(tl.int64)
    image = images + n * _COLUMNS
    along = tl.load(image + _COLUMNS_FIRST)
    y = tl.program_id(1) * LINES + tl.arange(0, LINES)
    c = tl.program_id(2) % 3
    x = tl.program_id(2) // 3 * B + tl.arange(0, B)
    last = tl.load(image + _HEIGHT + along).to(tl.int32) - 1
    first = tl.load(bounds + (n * 2 + along) * S + y, mask=y < S, other=0)
    start = between + (tl.cast(total, tl.int64) * c + tl.load(image + _BETWEEN)) * S
    mask = (y < S)[:, None] & (x < S)[None, :]
    sums = tl.full([LINES, B], _HALF, tl.int32)
    taps = _taps(image, along, TAPS)
    k = 0
    while k < taps:
        w = tl.load(weights + ((n * 2 + along) * TAPS + k) * S + y, mask=y < S, other=0)[:, None]
        at = tl.minimum(first + k, last)
        sums += w * tl.load(start + at[:, None] * S + x[None, :], mask=mask, other=0).to(tl.int32)
        k += 1
    row = tl.where(along != 0, x[None, :], y[:, None])
    column = tl.where(along != 0, y[:, None], x[None, :])
    column = tl.where(tl.load(image + _FLIP) != 0, S - 1 - column, column)
    out = planes + (n * 3 + c) * S * S + row * S + column
    tl.store(out, _clip8(sums >> _BITS).to(tl.uint8), mask=mask)


@triton.jit
def _grey(red, green, blue):
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit
def _blend(one, other, factor):
    """Pillow's Image.blend of levels (int32) by a float32 factor."""
    mixed = one.to(tl.float32) + factor * (other - one).to(tl.float32)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32).to(tl.uint8)


@triton.jit
def statistics_kernel(operations, values, planes, tables, S: tl.constexpr, B: tl.constexpr):
    """tables (B, 3, 256) uint8 of the operations that look pixels up in what follows from the whole image."""
    n, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind = tl.load(operations + n * _OF_OPERATION)
    size: tl.constexpr = S * S
    image = planes + n * 3 * size
    at = tl.arange(0, 256)
    if kind == _AUTO_CONTRAST:
        low, high = tl.full([B], 255, tl.int32), tl.zeros([B], tl.int32)
        for start in range(0, size, B):
            p = start + tl.arange(0, B)
            level = tl.load(image + c * size + p, mask=p < size, other=0).to(tl.int32)
            low = tl.minimum(low, tl.where(p < size, level, 255))
            high = tl.maximum(high, level)
        lowest, highest = tl.min(low), tl.max(high)
        scale = 255.0 / tl.maximum(highest - lowest, 1).to(tl.float64)
        offset = -lowest.to(tl.float64) * scale
        stretched = (at.to(tl.float64) * scale + offset).to(tl.int32)
        table = tl.where(highest <= lowest, at, _clip8(stretched))
        tl.store(tables + (n * 3 + c) * 256 + at, table.to(tl.uint8))
    if kind == _EQUALIZE:
        counts = tl.zeros([256], tl.int32)
        for start in range(0, size, B):
            p = start + tl.arange(0, B)
            level = tl.load(image + c * size + p, mask=p < size, other=0).to(tl.int32)
            counts += tl.histogram(level, 256, mask=p < size)
        last = tl.max(tl.where(counts > 0, at, 0))
        step = (size - tl.sum(tl.where(at == last, counts, 0))) // 255
        before = tl.cumsum(counts, 0) - counts
        table = tl.where(step == 0, at, _clip8((step // 2 + before) // tl.maximum(step, 1)))
        tl.store(tables + (n * 3 + c) * 256 + at, table.to(tl.uint8))
    if kind == _CONTRAST:
        sums = tl.zeros([B], tl.int32)
        for start in range(0, size, B):
            p = start + tl.arange(0, B)
            red = tl.load(image + p, mask=p < size, other=0).to(tl.int32)
            green = tl.load(image + size + p, mask=p < size, other=0).to(tl.int32)
            blue = tl.load(image + 2 * size + p, mask=p < size, other=0).to(tl.int32)
            sums += tl.where(p < size, _grey(red, green, blue), 0)
        mean = (tl.sum(sums.to(tl.int64)).to(tl.float64) / size + 0.5).to(tl.int32)
        factor = tl.load(values + n * _VALUES).to(tl.float32)
        tl.store(tables + (n * 3 + c) * 256 + at, _blend(mean + 0 * at, at, factor))


@triton.jit
def _cubic(v1, v2, v3, v4, d):
    """Pillow's bicubic interpolation of its transforms (a = -1) in float64."""
    p2 = -v1 + v3
    p3 = 2 * (v1 - v2) + v3 - v4
    p4 = -v1 + v2 - v3 + v4
    return v2 + d * (p2 + d * (p3 + d * p4))


@triton.jit
def _level(image, y, x, mask, S: tl.constexpr):
    """Levels at clamped places, float64."""
    at = tl.minimum(tl.maximum(y, 0), S - 1) * S + tl.minimum(tl.maximum(x, 0), S - 1)
    return tl.load(image + at, mask=mask, other=0).to(tl.float64)


@triton.jit
def _along_row(image, y, x, d, mask, S: tl.constexpr):
    v1, v2 = _level(image, y, x - 1, mask, S), _level(image, y, x, mask, S)
    v3, v4 = _level(image, y, x + 1, mask, S), _level(image, y, x + 2, mask, S)
    return _cubic(v1, v2, v3, v4, d)


@triton.jit
def _neighbours(image, p, mask, S: tl.constexpr):
    """The sum of the 9 pixels around each place."""
    sums = tl.zeros(p.shape, tl.int32)
    for dy in tl.static_range(3):
        for dx in tl.static_range(3):
            sums += tl.load(image + p + (dy - 1) * S + dx - 1, mask=mask, other=0).to(tl.int32)
    return sums


@triton.jit
def operate_kernel(operations, values, lookups, tables, source, target, S: tl.constexpr, B: tl.constexpr):
    """One operation of each image, but for blurs: source, target (B, 3, S, S) uint8."""
    n = tl.program_id(0).to(tl.int64)
    kind = tl.load(operations + n * _OF_OPERATION)
    size: tl.constexpr = S * S
    p = tl.program_id(1) * B + tl.arange(0, B)
    mask = p < size
    image, out = source + n * 3 * size, target + n * 3 * size
    value = values + n * _VALUES
    if kind == _TABLE:
        table = lookups + tl.load(operations + n * _OF_OPERATION + 1) * 256
        for c in tl.static_range(3):
            level = tl.load(image + c * size + p, mask=mask, other=0).to(tl.int32)
            tl.store(out + c * size + p, tl.load(table + level), mask=mask)
    if (kind == _AUTO_CONTRAST) | (kind == _EQUALIZE) | (kind == _CONTRAST):
        for c in tl.static_range(3):
            level = tl.load(image + c * size + p, mask=mask, other=0).to(tl.int32)
            tl.store(out + c * size + p, tl.load(tables + (n * 3 + c) * 256 + level), mask=mask)
    if kind == _COLOR:
        factor = tl.load(value).to(tl.float32)
        red = tl.load(image + p, mask=mask, other=0).to(tl.int32)
        green = tl.load(image + size + p, mask=mask, other=0).to(tl.int32)
        blue = tl.load(image + 2 * size + p, mask=mask, other=0).to(tl.int32)
        grey = _grey(red, green, blue)
        tl.store(out + p, _blend(grey, red, factor), mask=mask)
        tl.store(out + size + p, _blend(grey, green, factor), mask=mask)
        tl.store(out + 2 * size + p, _blend(grey, blue, factor), mask=mask)
    if kind == _SHARPNESS:
        factor = tl.load(value).to(tl.float32)
        y, x = p // S, p % S
        inner = mask & (y > 0) & (y < S - 1) & (x > 0) & (x < S - 1)
        for c in tl.static_range(3):
            level = tl.load(image + c * size + p, mask=mask, other=0).to(tl.int32)
            total = _neighbours(image + c * size, p, inner, S) + 4 * level
            smooth = tl.where(inner, (2 * total + 13) // 26, level)  # of 13, rounded
            tl.store(out + c * size + p, _blend(smooth, level, factor), mask=mask)
    if kind == _AFFINE:
        y, x = (p // S).to(tl.float64) + 0.5, (p % S).to(tl.float64) + 0.5
        from_x = tl.load(value) * x + tl.load(value + 1) * y + tl.load(value + 2)
        from_y = tl.load(value + 3) * x + tl.load(value + 4) * y + tl.load(value + 5)
        inside = (from_x >= 0) & (from_x < S) & (from_y >= 0) & (from_y < S) & mask
        from_x, from_y = from_x - 0.5, from_y - 0.5
        whole_x, whole_y = tl.floor(from_x), tl.floor(from_y)
        dx, dy = from_x - whole_x, from_y - whole_y
        at_x, at_y = whole_x.to(tl.int32), whole_y.to(tl.int32)
        fill = tl.load(operations + n * _OF_OPERATION + 3)
        bicubic = tl.load(operations + n * _OF_OPERATION + 2)
        for c in tl.static_range(3):
            plane = image + c * size
            if bicubic != 0:
                v1 = _along_row(plane, at_y - 1, at_x, dx, inside, S)
                v2 = _along_row(plane, at_y, at_x, dx, inside, S)
                v3 = _along_row(plane, at_y + 1, at_x, dx, inside, S)
                v4 = _along_row(plane, at_y + 2, at_x, dx, inside, S)
                v = _cubic(v1, v2, v3, v4, dy)
            else:
                a, b = _level(plane, at_y, at_x, inside, S), _level(plane, at_y, at_x + 1, inside, S)
                v1 = a + (b - a) * dx
                a, b = _level(plane, at_y + 1, at_x, inside, S), _level(plane, at_y + 1, at_x + 1, inside, S)
                v2 = a + (b - a) * dx
                v = v1 + (v2 - v1) * dy
            level = tl.minimum(tl.maximum(v, 0.0), 255.0).to(tl.int32)
            level = tl.where(inside, level, (fill >> (16 - 8 * c)) & 255)
            tl.store(out + c * size + p, level.to(tl.uint8), mask=mask)


@triton.jit
def blur_kernel(
    operations, values, source, target, S: tl.constexpr, ALONG: tl.constexpr, ACROSS: tl.constexpr, B: tl.constexpr
):
    """One of the six passes of a blur, for the images that have one. ALONG: step between the pixels of a line."""
    n = tl.program_id(0).to(tl.int64)
    if tl.load(operations + n * _OF_OPERATION) == _BLUR:
        size: tl.constexpr = S * S
        radius = tl.load(values + n * _VALUES + 1).to(tl.int32)
        inner = tl.load(values + n * _VALUES + 2).to(tl.int64)
        edge = tl.load(values + n * _VALUES + 3).to(tl.int64)
        p = tl.program_id(1) * B + tl.arange(0, B)
        mask = p < size
        line, place = p // S, p % S
        for c in tl.static_range(3):
            pixels = source + (n * 3 + c) * size + line * ACROSS
            sums = tl.zeros([B], tl.int32)
            k = -radius
            while k < radius + 1:
                at = tl.minimum(tl.maximum(place + k, 0), S - 1)
                sums += tl.load(pixels + at * ALONG, mask=mask, other=0).to(tl.int32)
                k += 1
            before = tl.maximum(place - radius - 1, 0)
            after = tl.minimum(place + radius + 1, S - 1)
            ends = tl.load(pixels + before * ALONG, mask=mask, other=0).to(tl.int32)
            ends += tl.load(pixels + after * ALONG, mask=mask, other=0).to(tl.int32)
            blurred = (sums.to(tl.int64) * inner + ends.to(tl.int64) * edge + (1 << 23)) >> 24
            out = target + (n * 3 + c) * size + line * ACROSS + place * ALONG
            tl.store(out, blurred.to(tl.uint8), mask=mask)


@triton.jit
def finish_kernel(images, planes, half, levels, boxes, noise, out, S: tl.constexpr, B: tl.constexpr):
    """Normalise by `levels` (3, 256) float32 and erase: out (B, 3, S, S) float32. half: elements of half of planes."""
    n, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size: tl.constexpr = S * S
    image = images + n * _COLUMNS
    p = tl.program_id(2) * B + tl.arange(0, B)
    mask = p < size
    which = tl.load(image + _OPERATIONS) % 2
    level = tl.load(planes + which * half + (n * 3 + c) * size + p, mask=mask, other=0).to(tl.int32)
    value = tl.load(levels + c * 256 + level)
    y, x = p // S, p % S
    first = tl.load(image + _FIRST_BOX)
    k = 0
    count = tl.load(image + _BOXES)
    while k < count:
        box = boxes + (first + k) * _OF_BOX
        dy, dx = y - tl.load(box), x - tl.load(box + 1)
        height, width = tl.load(box + 2), tl.load(box + 3)
        inside = mask & (dy >= 0) & (dy < height) & (dx >= 0) & (dx < width)
        each = tl.load(box + 5)
        at = tl.load(box + 4) + tl.where(each != 0, (c * height + dy) * width + dx, c)
        value = tl.where(inside, tl.load(noise + at, mask=inside, other=0.0), value)
        k += 1
    tl.store(out + (n * 3 + c) * size + p, value, mask=mask)
