"""Irregular hole masks, drawn on the device, and their hole ratios.

Masks are binary and have one plane, ``[..., H, W, 1]``: 1 = valid, 0 = hole.

Liu et al. 2018 (section 3.2) take their holes from occlusions between video frames and
group them by hole-to-image area, with and without holes at the border. `random_mask`
draws similar holes inside jit, with exactly the requested area.
`pconv_jax.data.mask_folder.MaskFolder` reads mask images, such as those that the
authors published.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

HOLE_BINS: tuple[tuple[float, float], ...] = (
    (0.01, 0.1),
    (0.1, 0.2),
    (0.2, 0.3),
    (0.3, 0.4),
    (0.4, 0.5),
    (0.5, 0.6),
)
"""The hole ratios, each ``(low, high]``, by which Liu et al. group masks."""

HOLE_RATIOS: dict[str, tuple[float, float]] = {
    "thin": (0.005, 0.1),
    "wide": (0.06, 0.36),
}
"""The usual hole ratios of the kinds thin and wide of `random_mask`."""


def hole_ratio(mask: ArrayLike) -> jax.Array:
    """Compute the fraction of the pixels that are in the hole.

    Args:
      mask: ``[..., H, W, 1]``, 1 = valid, 0 = hole.

    Returns:
      Float32 ``[...]`` in [0, 1].
    """
    return 1 - jnp.mean(jnp.asarray(mask, jnp.float32), axis=(-3, -2, -1))


def hole_bin(ratio: ArrayLike) -> jax.Array:
    """Find the bin of a hole ratio.

    Upper ends belong to their bin. A ratio within 1e-6 of an end (one pixel in a
    million) counts as equal to it, so that float32 rounding does not change the bin.

    Args:
      ratio: Hole ratios ``[...]``.

    Returns:
      Int32 ``[...]``: the index into `HOLE_BINS`, or -1 outside all bins.
    """
    ratio = jnp.asarray(ratio)
    wide = jnp.promote_types(ratio.dtype, jnp.float32)
    low, high = jnp.asarray(HOLE_BINS, wide).T + 1e-6
    low, high = (end.reshape((1,) * ratio.ndim + (-1,)) for end in (low, high))
    ratio = ratio.astype(wide)[..., None]
    inside = (low < ratio) & (ratio <= high)
    return jnp.where(inside.any(-1), inside.argmax(-1), -1).astype(jnp.int32)


def touches_border(mask: ArrayLike) -> jax.Array:
    """Test whether the hole contains any of the outermost pixels.

    Args:
      mask: ``[..., H, W, 1]``, 1 = valid, 0 = hole.

    Returns:
      Bool ``[...]``.
    """
    hole = jnp.asarray(mask)[..., 0] == 0
    rim = jnp.broadcast_to(_rim(hole.shape[-2:], 1, 1), hole.shape)
    return jnp.any(hole & rim, axis=(-2, -1))


def near_border(mask: ArrayLike) -> jax.Array:
    """Test whether the hole reaches into the outermost 50/512 of any side.

    This criterion divides the published masks into those with and without holes at the
    border.

    Args:
      mask: ``[..., H, W, 1]``, 1 = valid, 0 = hole.

    Returns:
      Bool ``[...]``.
    """
    hole = jnp.asarray(mask)[..., 0] == 0
    rim = jnp.broadcast_to(_quiet_rim(hole.shape[-2:]), hole.shape)
    return jnp.any(hole & rim, axis=(-2, -1))


def random_mask(
    key: jax.Array,
    shape: Sequence[int],
    *,
    hole_ratio: float | tuple[float, float] = (0.01, 0.6),
    kind: str = "mixed",
    border: bool | None = None,
) -> jax.Array:
    """Draw an irregular mask whose hole has exactly the requested area.

    The function is pure; ``shape``, ``kind`` and ``border`` are static under jit. For a
    batch, vmap it over keys:
    ``jax.vmap(lambda k: random_mask(k, (256, 256)))(jax.random.split(key, 8))``.

    Args:
      key: PRNG key.
      shape: ``(H, W)``, each at least 8.
      hole_ratio: Either the fraction of the pixels that are in the hole, in (0, 1); the
        hole has exactly this area, rounded down to a whole pixel, but at least one. Or
        a range ``(low, high]``, such as one of `HOLE_BINS`, from which the number of
        pixels is drawn uniformly; if the range contains no whole number, as does
        (0.01, 0.012) of 8 x 8 pixels, its upper end is used as a single fraction. The
        default is (0.01, 0.6). A traced value is float32, whose rounding can add a
        pixel in a million.
      kind: ``'strokes'`` (lines of several pens), ``'blobs'`` (smooth noise),
        ``'rectangles'``, ``'mixed'`` (the default: all three, each with a random share
        of the area), ``'ragged'`` (the same with frayed rims and single valid pixels,
        like masks found by programs or stored in lossy files), ``'lines'`` (scratches,
        1 to 6 pixels wide), ``'text'`` (letters 10 to 40 pixels high), ``'dots'`` (of
        radius 1 to 4), ``'thin'`` (one of these three), or ``'wide'`` (one square,
        disc, corner or stripe). Thin shapes are added until the area is reached; if
        that is not enough, they grow.
      border: If True, the hole touches the border. If False, the outermost 50/512 of
        each side (whole pixels, at least one) are valid. If None (the default), chosen
        at random where the hole area allows both.

    Returns:
      Float32 ``[H, W, 1]``, 1 = valid, 0 = hole.

    Raises:
      ValueError: If an argument is out of its range.
    """
    shape = tuple(shape)
    if len(shape) != 2 or not all(
        isinstance(n, int | np.integer) and n >= 8 for n in shape
    ):
        raise ValueError(
            f"shape must be (height, width), integers of at least 8, got {shape}."
        )
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
    if border not in (True, False, None):
        raise ValueError(f"border must be True, False or None, got {border!r}.")
    bounds = hole_ratio if isinstance(hole_ratio, tuple | list) else (hole_ratio,) * 2
    if not any(isinstance(bound, Tracer) for bound in bounds):
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < 1:
            raise ValueError(
                "hole_ratio must be a number in (0, 1), or a range (low, high) with "
                f"0 < low <= high < 1, got {hole_ratio}."
            )
        inner = ~_quiet_rim(shape)
        if border is False and _whole_pixels(bounds[1], inner.size) > inner.sum():
            raise ValueError(
                f"hole_ratio reaches {bounds[1]}, but with border=False there is room "
                f"for {inner.mean():.3f} of {shape[0]}x{shape[1]} pixels at most."
            )
    first, last = (_whole_pixels(bound, math.prod(shape)) for bound in bounds)
    return _random_mask(key, first, last, shape=shape, kind=kind, border=border)


def _whole_pixels(
    ratio: float | jax.Array, pixels: int
) -> jax.Array | np.ndarray | np.int32:
    """Convert a ratio of the pixels to a number of pixels, rounded down.

    0.53 has no exact binary representation, so 0.53 * 100 may be slightly less than 53.
    A product that misses a whole number by no more than such rounding counts as equal
    to it.
    """
    if isinstance(ratio, float):
        return np.int32(math.floor(ratio * pixels + 1e-6))
    # In float32, the ratio and the product are each rounded by at most half an eps.
    xp = jnp if isinstance(ratio, Tracer) else np
    product = xp.float32(ratio) * pixels
    product += np.finfo(np.float32).eps * product
    return xp.floor(product).astype(xp.int32)


# Holes are grown rather than painted. Each kind draws a positive field over the pixels:
# the size to which its shapes must grow before they cover the pixel. The hole consists
# of the pixels where the field is smallest, so any area is met to the pixel.
# Lengths are in units of sqrt(H * W), so the same key looks similar at every size.
# Dtypes are given, so that masks are the same where JAX's defaults are 64 bits wide.


@functools.partial(jax.jit, static_argnames=("shape", "kind", "border"))
def _random_mask(
    key: jax.Array,
    first: jax.Array,
    last: jax.Array,
    *,
    shape: tuple[int, int],
    kind: str,
    border: bool | None,
) -> jax.Array:
    key, field_key = jax.random.split(key)
    area, coin = jax.random.uniform(key, (2,), jnp.float32)
    rim = _quiet_rim(shape)
    room = int(rim.size - rim.sum())
    count = last - jnp.floor(area * (last - first).astype(jnp.float32)).astype(
        jnp.int32
    )
    count = jnp.clip(count, 1, room if border is False else rim.size)
    if border is None:
        quiet = (coin < 0.5) & (count <= room)
    else:
        quiet = jnp.asarray(not border)

    scale = rim.size**-0.5
    y = (_numbers(shape[0])[:, None] + 0.5) * scale
    x = (_numbers(shape[1])[None, :] + 0.5) * scale

    def draw(key: jax.Array, kind: str) -> jax.Array:
        if kind in _FIELDS:
            field = _FIELDS[kind](key, y, x)
        elif kind == "wide":
            field = _wide(key, y, x, ~quiet)
        else:
            field = _paint((_THIN | {"thin": _thin})[kind](key, shape), shape)
        field = jnp.maximum(field, 1e-6)
        return jnp.where(quiet & rim, jnp.inf, field)

    if kind in ("mixed", "ragged"):
        share_key, *keys = jax.random.split(field_key, 1 + len(_FIELDS))
        # Strokes dominate, since most of the published masks look like strokes.
        logits = jnp.array([4.0, 0, 0], jnp.float32)
        logits += 2 * jax.random.normal(share_key, (3,), jnp.float32)
        shares = jax.nn.softmax(logits)
        # Smaller shares would be mere specks.
        shares = jnp.where(shares < 0.05, 0, shares)
        field = jnp.float32(jnp.inf)
        for key, name, share in zip(keys, _FIELDS, shares, strict=True):
            one = draw(key, name)
            # Scaled such that, at 1, this kind alone covers its share of the area. A
            # share of 0 is never covered.
            covered = jnp.ceil(share * count.astype(jnp.float32))
            unit = _kth_smallest(one, covered.astype(jnp.int32))
            field = jnp.minimum(field, one / unit)
    else:
        field = draw(field_key, kind)
    field = jnp.asarray(field)
    if kind == "ragged":
        field *= _fray(jax.random.fold_in(field_key, 1), y, x)
    # Thin and wide holes keep their shapes: they gain a pixel at most.
    reach = scale if kind in ("thin", "wide", *_THIN) else 0.1
    field = jnp.where(quiet, field, _pull_to_border(field, y, x, reach))
    return 1 - _smallest(field, count).astype(jnp.float32)[..., None]


def _strokes(
    key: jax.Array, y: jax.Array, x: jax.Array, *, pens: int = 28, steps: int = 10
) -> jax.Array:
    """Draw pens that start one after the other and walk with turns and gaps."""
    drawing, pen, step, width, start, gaps, roughness = _normals(
        key,
        (4,),
        (5, pens, 1),
        (2, pens, steps),
        (pens, steps + 1),
        (pens, 2),
        (pens, 1 + steps),
        _grid(y, x, 24),
    )
    # Fast pens in quick succession draw long thin lines; slow pens, short thick ones.
    walk, delay = jnp.exp(drawing[0] - 5.5), jnp.exp(drawing[1] - 6.7)
    heading, spread = jnp.pi * drawing[2], jnp.exp(0.7 * drawing[3])
    length = jnp.exp(0.6 * pen[0] + 0.3 * step[0] - 2.3)
    thinness = jnp.exp(0.35 * pen[1] + 0.15 * width)
    turn = 0.2 * pen[2] + jnp.exp(0.7 * pen[3] - 1.2) * step[1]
    angle = heading + spread * pen[4] + jnp.cumsum(turn, axis=1)
    move = length[..., None] * jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    stops = (_uniform(start) * _extent(y, x))[:, None] + jnp.cumsum(move, axis=1)
    gaps = _uniform(gaps)
    lifted = (gaps[:, 1:] < 0.5 * gaps[:, :1]).at[0, 0].set(False)
    birth = walk * _numbers(steps)[None, :] + delay * _numbers(pens)[:, None]
    birth = jnp.where(lifted, 1e3, birth)
    segments = (
        stops - move,
        move,
        thinness[:, :-1],
        jnp.diff(thinness, axis=1),
        birth,
    )

    def add(field: jax.Array, segment: Sequence[jax.Array]) -> tuple[jax.Array, None]:
        start, move, thinness, thinning, birth = segment
        dy, dx = y - start[0], x - start[1]
        along = jnp.clip((dy * move[0] + dx * move[1]) / (move @ move), 0, 1)
        # The 4-norm draws lines with blunt ends, like a dilation by a square.
        distance = jnp.sqrt((dy - along * move[0]) ** 4 + (dx - along * move[1]) ** 4)
        distance *= (thinness + along * thinning) ** 2
        return jnp.minimum(field, distance + (birth + along * walk) ** 2), None

    segments = [part.reshape(pens * steps, *part.shape[2:]) for part in segments]
    field, _ = lax.scan(add, jnp.full((y.size, x.size), jnp.inf, jnp.float32), segments)
    return jnp.sqrt(field) * jnp.exp(0.08 * _enlarge(roughness, y, x))


def _blobs(key: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Draw smooth noise of four octaves, with random weights."""
    grids = [_grid(y, x, 2 * 2**octave) for octave in range(4)]
    amplitude, *octaves = _normals(key, (4,), *grids)
    amplitude = jnp.exp(0.5 * amplitude) * jnp.float32(0.5) ** _numbers(4)
    octaves = [_enlarge(octave, y, x) for octave in octaves]
    field = jnp.asarray(
        sum(a * octave for a, octave in zip(amplitude, octaves, strict=True))
    )
    return field - field.min()


def _rectangles(
    key: jax.Array, y: jax.Array, x: jax.Array, *, number: int = 16
) -> jax.Array:
    """Draw nearly upright rectangles that start one after the other."""
    delay, center, size, sides, angle = _normals(
        key, (), (number, 2), (number, 1), (number, 2), (number,)
    )
    delay, angle = jnp.exp(delay - 5), 0.1 * angle
    center = _uniform(center) * _extent(y, x)
    sides = jnp.exp(0.4 * size + 0.4 * sides)

    def add(field: jax.Array, rectangle: Sequence[jax.Array]) -> tuple[jax.Array, None]:
        center, sides, angle, birth = rectangle
        dy, dx = y - center[0], x - center[1]
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        across = jnp.abs(dy * cos - dx * sin) / sides[0]
        along = jnp.abs(dy * sin + dx * cos) / sides[1]
        return jnp.minimum(field, jnp.maximum(across, along) ** 2 + birth**2), None

    rectangles = (center, sides, angle, delay * _numbers(number))
    field, _ = lax.scan(
        add, jnp.full((y.size, x.size), jnp.inf, jnp.float32), rectangles
    )
    return jnp.sqrt(field)


# Thin shapes have sizes in pixels, and are drawn whole, one after the other, not grown
# together. Each kind draws the same number of line segments: their starts and moves in
# pixels, [n, 2], their widths, [n], and the order in which they appear, [n].
_SEGMENTS = 192
_Segments = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _lines(key: jax.Array, shape: tuple[int, int], *, steps: int = 8) -> _Segments:
    """Draw scratches that bend a little."""
    lines = _SEGMENTS // steps
    start, width, length, heading, turn = _normals(
        key, (lines, 2), (lines, 1), (lines, 1), (lines, 1), (lines, steps)
    )
    angle = jnp.pi * 2 * _uniform(heading) + jnp.cumsum(0.2 * turn, axis=1)
    length = 0.08 * math.sqrt(shape[0] * shape[1]) * jnp.exp(0.5 * length)
    moves = length[..., None] * jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    start = _uniform(start) * jnp.array([shape], jnp.float32)
    stops = start[:, None] + jnp.cumsum(moves, axis=1)
    widths = jnp.broadcast_to(1 + 5 * _uniform(width) ** 2, (lines, steps))
    order = jnp.broadcast_to(_numbers(lines)[:, None], (lines, steps))
    parts = stops - moves, moves, widths, order
    return _flat(*parts)


def _text(key: jax.Array, shape: tuple[int, int], *, letters: int = 8) -> _Segments:
    """Draw rows of letters."""
    strokes = _GLYPHS.shape[1]
    rows = _SEGMENTS // (letters * strokes)
    start, height, width, angle, glyph = _normals(
        key, (rows, 2), (rows, 1), (rows, 1), (rows, 1), (rows, letters)
    )
    height = jnp.broadcast_to(10 + 30 * _uniform(height) ** 2, (rows, letters))
    size = height[..., None, None, None] / 4  # Of a square of the grid of the glyphs.
    number = jnp.floor(_uniform(glyph) * len(_GLYPHS)).astype(jnp.int32)
    points = jnp.asarray(_GLYPHS, jnp.float32)[jnp.clip(number, 0, len(_GLYPHS) - 1)]
    # A letter is 2 squares wide, and the gap between two letters is 1.
    place = 3 * _numbers(letters)[:, None] * jnp.array([[0, 1]], jnp.float32)
    points = size * (
        points + place[None, :, None, None]
    )  # [row, letter, stroke, end, 2]
    sin, cos = (f(0.1 * angle[..., None, None]) for f in (jnp.sin, jnp.cos))
    y, x = points[..., 0], points[..., 1]
    points = jnp.stack([y * cos + x * sin, x * cos - y * sin], axis=-1)
    # Some rows begin left of the image.
    start = _uniform(start) - jnp.array([[0, 0.3]], jnp.float32)
    start *= jnp.array([shape], jnp.float32)
    points += start[:, None, None, None]
    starts, moves = points[..., 0, :], points[..., 1, :] - points[..., 0, :]
    widths = jnp.broadcast_to(2 + 2 * _uniform(width)[..., None], starts.shape[:-1])
    order = _numbers(rows * letters).reshape(rows, letters, 1)
    return _flat(starts, moves, widths, jnp.broadcast_to(order, starts.shape[:-1]))


def _dots(key: jax.Array, shape: tuple[int, int]) -> _Segments:
    """Draw discs, which are segments of no length."""
    start, width = _normals(key, (_SEGMENTS, 2), (_SEGMENTS,))
    start = _uniform(start) * jnp.array([shape], jnp.float32)
    return start, 0 * start, 2 + 6 * _uniform(width) ** 2, _numbers(_SEGMENTS)


def _flat(
    starts: jax.Array, moves: jax.Array, widths: jax.Array, order: jax.Array
) -> _Segments:
    return (
        starts.reshape(-1, 2),
        moves.reshape(-1, 2),
        widths.reshape(-1),
        order.reshape(-1),
    )


def _thin(key: jax.Array, shape: tuple[int, int]) -> _Segments:
    """Draw the segments of one of the thin kinds."""
    coin, key = jax.random.split(key)
    kinds = [draw(key, shape) for draw in _THIN.values()]
    number = jax.random.randint(coin, (), 0, len(kinds), jnp.int32)
    return jax.tree.map(lambda *x: jnp.stack(x)[number], *kinds)


def _paint(segments: _Segments, shape: tuple[int, int]) -> jax.Array:
    """Make the field of segments: first their order, then the distance to them."""
    y = _numbers(shape[0])[:, None] + 0.5
    x = _numbers(shape[1])[None, :] + 0.5

    def add(field: jax.Array, segment: _Segments) -> tuple[jax.Array, None]:
        start, move, width, order = segment
        dy, dx = y - start[0], x - start[1]
        along = (dy * move[0] + dx * move[1]) / jnp.maximum(move @ move, 1e-6)
        along = jnp.clip(along, 0, 1)
        distance = jnp.hypot(dy - along * move[0], dx - along * move[1])
        inside = distance <= width / 2
        # Within a shape, pixels are filled from its middle outward.
        value = jnp.where(inside, order + 1 + distance / width, 1e4 + distance)
        return jnp.minimum(field, value), None

    field, _ = lax.scan(add, jnp.full(shape, jnp.inf, jnp.float32), segments)
    return field


_THIN: dict[str, Callable[[jax.Array, tuple[int, int]], _Segments]] = {
    "lines": _lines,
    "text": _text,
    "dots": _dots,
}


def _read_glyphs(text: str) -> np.ndarray:
    """Read capitals, ``[letter, stroke, end, 2]``, rows and columns of a 5 x 3 grid.

    The points of the grid are a to o, row by row. A word is a letter; two characters
    are a stroke. Letters of fewer strokes repeat their first.
    """
    words = text.split()
    strokes = max(map(len, words)) // 2
    words = [word + word[:2] * (strokes - len(word) // 2) for word in words]
    points = np.array([[ord(c) - ord("a") for c in word] for word in words])
    return np.stack(divmod(points, 3), axis=-1).reshape(len(words), strokes, 2, 2)


_GLYPHS = _read_glyphs(
    # A, C, D, E, F, G, H, I, K, L, M, N
    "mbbogi caammo abbffllnnmma amacghmo amacgh caammooihi amcogi bn amgcgo ammo "
    "amahhcco amaoco "
    # O, P, R, S, T, U, V, W, X, Y, Z
    "accoomma amacciig amacciigho caaggiioom acbn ammooc annc ammhhooc aocm ahchhn "
    "accmmo"
)


def _wide(
    key: jax.Array, y: jax.Array, x: jax.Array, at_border: jax.Array
) -> jax.Array:
    """Draw one square, disc, corner or stripe."""
    center_key, axis_key, kind_key = jax.random.split(key, 3)
    center = jax.random.uniform(center_key, (2,), jnp.float32)
    extent = _extent(y, x)[0]
    axis = jax.random.permutation(axis_key, jnp.array([True, False]))
    center = jnp.where(at_border & axis, jnp.round(center), center) * extent
    dy, dx = jnp.abs(y - center[0]), jnp.abs(x - center[1])
    # The corner that the center is nearest to.
    bottom, right = center > extent / 2
    row = jnp.where(bottom, y[-1, 0] - y, y)
    column = jnp.where(right, x[0, -1] - x, x)
    flat = jnp.zeros_like(y + x)
    fields = [jnp.maximum(dy, dx), jnp.hypot(dy, dx), row + column, dx + flat]
    return jnp.stack(fields)[
        jax.random.randint(kind_key, (), 0, len(fields), jnp.int32)
    ]


def _fray(key: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Draw noise of four octaves, down to a pixel or two, with random strength."""
    grids = [_grid(y, x, 24 * 2**octave) for octave in range(4)]
    amount, *octaves = _normals(key, (), *grids)
    noise = sum(_enlarge(octave, y, x) for octave in octaves)
    return jnp.exp(jnp.exp(1.5 * amount - 3.5) * jnp.maximum(noise, 0) ** 2)


_FIELDS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "strokes": _strokes,
    "blobs": _blobs,
    "rectangles": _rectangles,
}

KINDS: tuple[str, ...] = (*_FIELDS, "mixed", "ragged", *_THIN, "thin", "wide")
"""The kinds of hole that `random_mask` draws."""


def _numbers(length: int) -> jax.Array:
    """Count from 0, in float32."""
    return jnp.arange(length, dtype=jnp.float32)


def _normals(key: jax.Array, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Draw normal numbers of several shapes at once, since each draw is compiled."""
    sizes = [math.prod(shape) for shape in shapes]
    numbers = jnp.split(
        jax.random.normal(key, (sum(sizes),), jnp.float32), np.cumsum(sizes)[:-1]
    )
    return [part.reshape(shape) for part, shape in zip(numbers, shapes, strict=True)]


def _uniform(normal: jax.Array) -> jax.Array:
    """Convert normal numbers to uniform numbers in [0, 1]."""
    return jax.scipy.special.ndtr(normal)


def _extent(y: jax.Array, x: jax.Array) -> jax.Array:
    """Return the largest coordinates, ``[1, 2]``."""
    return jnp.stack([y[-1:, 0], x[0, -1:]], axis=-1)


def _grid(y: jax.Array, x: jax.Array, cells: int) -> tuple[int, ...]:
    """Compute the shape of a coarse grid with a number of cells per sqrt(H * W)."""
    scale = cells * (y.size * x.size) ** -0.5
    return tuple(1 + max(1, round(n * scale)) for n in (y.size, x.size))


def _enlarge(grid: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    return jax.image.resize(grid, (y.size, x.size), "cubic")


def _pull_to_border(
    field: jax.Array, y: jax.Array, x: jax.Array, reach: float
) -> jax.Array:
    """Lower the field around its smallest pixel on the border, which becomes zero."""
    least = jnp.argmin(jnp.where(_rim(field.shape, 1, 1), field, jnp.inf))
    row, column = jnp.unravel_index(least, field.shape)
    distance = jnp.hypot(y - y[row, 0], x - x[0, column])
    return field * jnp.minimum(1, distance / reach)


def _kth_smallest(field: jax.Array, k: ArrayLike) -> jax.Array:
    """Find the k-th smallest value of a positive field, or 0 for k = 0.

    Positive floats have the same order as their bits, so the bits can be found one by
    one, fifteen times as fast as by sorting.
    """
    bits = lax.bitcast_convert_type(field, jnp.int32)

    def add_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        trial = found | (1 << (30 - i))
        return jnp.where(_count(bits < trial) < k, trial, found)

    found = lax.fori_loop(jnp.int32(0), jnp.int32(31), add_bit, jnp.int32(0))
    return lax.bitcast_convert_type(found, jnp.float32)


def _count(where: jax.Array) -> jax.Array:
    return jnp.sum(where, dtype=jnp.int32)


def _smallest(field: jax.Array, k: jax.Array) -> jax.Array:
    """Mark the k smallest values; among equal values, the first ones."""
    cut = _kth_smallest(field, k)
    below, tied = field < cut, field == cut
    place = jnp.cumsum(tied.ravel(), dtype=jnp.int32).reshape(tied.shape)
    return below | (tied & (place <= k - _count(below)))


def _rim(shape: tuple[int, ...], rows: int, columns: int) -> np.ndarray:
    """Mark the outermost rows and columns of an image."""
    rim = np.ones(shape, bool)
    rim[rows:-rows, columns:-columns] = False
    return rim


def _quiet_rim(shape: tuple[int, ...]) -> np.ndarray:
    """Mark the rim, 50 of 512 pixels, that half of the published masks leave valid."""
    return _rim(shape, *(max(1, n * 50 // 512) for n in shape))
