"""The shapes of random holes, as fields over the pixels; see `masks.random_mask`.

Holes are grown rather than painted. Each kind draws a positive field over the pixels:
the size to which its shapes must grow before they cover the pixel. The hole consists of
the pixels where the field is smallest, so any area is met to the pixel.

Lengths are in units of sqrt(H * W), so the same key looks similar at every size. Dtypes
are given, so that masks are the same where JAX's defaults are 64 bits wide.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def coordinates(shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Return the coordinates of pixels, ``[H, 1]`` and ``[1, W]``."""
    scale = math.prod(shape) ** -0.5
    y = (_numbers(shape[0])[:, None] + 0.5) * scale
    x = (_numbers(shape[1])[None, :] + 0.5) * scale
    return y, x


def draw(
    key: jax.Array, kind: str, y: jax.Array, x: jax.Array, *, at_border: jax.Array
) -> jax.Array:
    """Draw the field of a kind.

    Args:
      key: PRNG key.
      kind: One of `GROWN` or `THIN`, or ``'wide'``.
      y: Coordinates of the rows, ``[H, 1]``.
      x: Coordinates of the columns, ``[1, W]``.
      at_border: Whether the hole touches the border, which kind wide provides for.

    Returns:
      Positive float32 ``[H, W]``.
    """
    if kind in GROWN:
        field = GROWN[kind](key, y, x)
    elif kind == "wide":
        field = _wide(key, y, x, at_border)
    else:
        shape = y.size, x.size
        field = _paint(THIN[kind](key, shape), shape)
    return jnp.maximum(field, 1e-6)


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


def _thin(key: jax.Array, shape: tuple[int, int]) -> _Segments:
    """Draw the segments of one of the thin kinds."""
    coin, key = jax.random.split(key)
    kinds = [kind(key, shape) for kind in (_lines, _text, _dots)]
    number = jax.random.randint(coin, (), 0, len(kinds), jnp.int32)
    return jax.tree.map(lambda *x: jnp.stack(x)[number], *kinds)


THIN: dict[str, Callable[[jax.Array, tuple[int, int]], _Segments]] = {
    "lines": _lines,
    "text": _text,
    "dots": _dots,
    "thin": _thin,
}
"""Shapes that are drawn whole, and ``'thin'``, one of them."""


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


def fray(key: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Draw noise of four octaves, down to a pixel or two, with random strength."""
    grids = [_grid(y, x, 24 * 2**octave) for octave in range(4)]
    amount, *octaves = _normals(key, (), *grids)
    noise = sum(_enlarge(octave, y, x) for octave in octaves)
    return jnp.exp(jnp.exp(1.5 * amount - 3.5) * jnp.maximum(noise, 0) ** 2)


GROWN: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "strokes": _strokes,
    "blobs": _blobs,
    "rectangles": _rectangles,
}
"""Shapes that grow together."""


def _numbers(length: int) -> jax.Array:
    """Count from 0, in float32."""
    return jnp.arange(length, dtype=jnp.float32)


def _normals(key: jax.Array, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Draw normal numbers of several shapes at once, since each draw is compiled."""
    sizes = [math.prod(shape) for shape in shapes]
    numbers = jax.random.normal(key, (sum(sizes),), jnp.float32)
    # Without the barrier, XLA compiles the draw once more for each use of the numbers.
    parts = jnp.split(lax.optimization_barrier(numbers), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


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
