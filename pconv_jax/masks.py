"""Irregular hole masks: drawn on the device, or read from a folder.

Masks are binary and have one plane, `[..., H, W, 1]`: 1 = valid, 0 = hole.

Liu et al. 2018 (section 3.2) take their holes from occlusions between video frames
and group them by hole-to-image area, with and without holes at the border.
`random_mask` draws holes of that kind inside jit, of exactly the area asked for;
`MaskFolder` reads mask pictures, such as those that the authors published.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

HOLE_BINS: tuple[tuple[float, float], ...] = (
    (0.01, 0.1),
    (0.1, 0.2),
    (0.2, 0.3),
    (0.3, 0.4),
    (0.4, 0.5),
    (0.5, 0.6),
)
"""Hole ratios by which Liu et al. group masks, each `(low, high]`."""


def hole_ratio(mask: ArrayLike) -> jax.Array:
    """Fraction of the pixels that are hole.

    Args:
      mask: `[..., H, W, 1]`, 1 = valid, 0 = hole.

    Returns:
      Float32 `[...]` in [0, 1].
    """
    return 1 - jnp.mean(jnp.asarray(mask, jnp.float32), axis=(-3, -2, -1))


def hole_bin(ratio: ArrayLike) -> jax.Array:
    """Index into `HOLE_BINS` of a hole ratio, -1 outside all of them.

    Upper ends belong to their bin. A ratio within 1e-6 of an end (a pixel in a million)
    counts as equal to it, so that float32 rounding does not change the bin.

    Args:
      ratio: Hole ratios `[...]`.

    Returns:
      Int32 `[...]`.
    """
    low, high = jnp.asarray(HOLE_BINS).T + 1e-6
    ratio = jnp.asarray(ratio)[..., None]
    inside = (low < ratio) & (ratio <= high)
    return jnp.where(inside.any(-1), inside.argmax(-1), -1)


def touches_border(mask: ArrayLike) -> jax.Array:
    """Whether any of the outermost pixels is hole.

    Args:
      mask: `[..., H, W, 1]`, 1 = valid, 0 = hole.

    Returns:
      Bool `[...]`.
    """
    hole = jnp.asarray(mask)[..., 0] == 0
    return jnp.any(hole & _rim(hole.shape[-2:], 1, 1), axis=(-2, -1))


def near_border(mask: ArrayLike) -> jax.Array:
    """Whether any pixel of the outermost 50/512 of a side is hole.

    This divides the published masks into those with and without holes at the border.

    Args:
      mask: `[..., H, W, 1]`, 1 = valid, 0 = hole.

    Returns:
      Bool `[...]`.
    """
    hole = jnp.asarray(mask)[..., 0] == 0
    return jnp.any(hole & _quiet_rim(hole.shape[-2:]), axis=(-2, -1))


def random_mask(
    key: jax.Array,
    shape: Sequence[int],
    *,
    hole_ratio: float | tuple[float, float] = (0.01, 0.6),
    kind: str = "mixed",
    border: bool | None = None,
) -> jax.Array:
    """Draws an irregular mask whose hole has exactly the area asked for.

    Pure; `shape`, `kind` and `border` are static under jit. For a batch, vmap it over
    keys: `jax.vmap(lambda k: random_mask(k, (256, 256)))(jax.random.split(key, 8))`.

    Args:
      key: PRNG key.
      shape: `(H, W)`, each at least 8.
      hole_ratio: Fraction of the pixels that are hole, in (0, 1); it is met to the
        pixel, rounded down, but to no less than one. Or a range `(low, high]`, such as
        one of `HOLE_BINS`, from which the number of pixels is drawn uniformly. If no
        whole number lies in it, as in (0.01, 0.012) of 8 x 8 pixels, its upper end is
        met as a single fraction would be. If traced, it is float32, whose rounding can
        add a pixel where there are a million.
      kind: 'strokes' (lines of several pens), 'blobs' (smooth noise), 'rectangles',
        'mixed' (all of them, each with a random share of the area), or 'ragged' (the
        same with frayed rims and single valid pixels, as masks have that programs
        found or lossy files hold).
      border: True = some hole touches the border; False = the outermost 50/512 of each
        side (whole pixels, at least one) is valid; None = one or the other, by a coin,
        as far as the area leaves room for both.

    Returns:
      Float32 `[H, W, 1]`, 1 = valid, 0 = hole.

    Raises:
      ValueError: If an argument is out of its range.
    """
    shape = tuple(shape)
    if len(shape) != 2 or not all(
        isinstance(n, int | np.integer) and n >= 8 for n in shape
    ):
        raise ValueError(
            f"shape must be (height, width), integers of at least 8, got {shape}"
        )
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if border not in (True, False, None):
        raise ValueError(f"border must be True, False or None, got {border!r}")
    bounds = hole_ratio if isinstance(hole_ratio, tuple | list) else (hole_ratio,) * 2
    if not any(isinstance(bound, jax.core.Tracer) for bound in bounds):
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < 1:
            raise ValueError(
                "hole_ratio must be a number in (0, 1), or a range (low, high) with "
                f"0 < low <= high < 1, got {hole_ratio}"
            )
        inner = ~_quiet_rim(shape)
        if border is False and _whole_pixels(bounds[1], inner.size) > inner.sum():
            raise ValueError(
                f"hole_ratio reaches {bounds[1]}, but with border=False there is room "
                f"for {inner.mean():.3f} of {shape[0]}x{shape[1]} pixels at most"
            )
    first, last = (_whole_pixels(bound, math.prod(shape)) for bound in bounds)
    return _random_mask(key, first, last, shape=shape, kind=kind, border=border)


def _whole_pixels(ratio, pixels):
    """How many of the pixels a ratio is, rounded down.

    No binary number is 0.53, so 0.53 * 100 may come out below 53. What misses a whole
    number by no more than such rounding counts as equal to it.
    """
    if isinstance(ratio, float):
        return np.int32(math.floor(ratio * pixels + 1e-6))
    # In float32, the ratio and the product are rounded, by half an eps at most each.
    xp = jnp if isinstance(ratio, jax.core.Tracer) else np
    product = xp.float32(ratio) * pixels
    product += np.finfo(np.float32).eps * product
    return xp.floor(product).astype(xp.int32)


# Holes are grown rather than painted. Each kind draws a positive field over the pixels:
# the size to which its shapes have to grow before they cover the pixel. The hole is
# where the field is smallest, so that every area can be had and is met to the pixel.
# Lengths are in units of sqrt(H * W): the same key looks alike at every size.


@functools.partial(jax.jit, static_argnames=("shape", "kind", "border"))
def _random_mask(key, first, last, *, shape, kind, border):
    key, field_key = jax.random.split(key)
    area, coin = jax.random.uniform(key, (2,))
    rim = _quiet_rim(shape)
    room = int(rim.size - rim.sum())
    count = last - jnp.floor(area * (last - first)).astype(jnp.int32)
    count = jnp.clip(count, 1, room if border is False else rim.size)
    if border is None:
        quiet = (coin < 0.5) & (count <= room)
    else:
        quiet = not border

    scale = rim.size**-0.5
    y = (jnp.arange(shape[0])[:, None] + 0.5) * scale
    x = (jnp.arange(shape[1])[None, :] + 0.5) * scale

    def draw(key, kind):
        field = jnp.maximum(_FIELDS[kind](key, y, x), 1e-6)
        return jnp.where(quiet & rim, jnp.inf, field)

    if kind in ("mixed", "ragged"):
        share_key, *keys = jax.random.split(field_key, 1 + len(_FIELDS))
        # Strokes are what most of the published masks look like.
        logits = jnp.array([4.0, 0, 0]) + 2 * jax.random.normal(share_key, (3,))
        shares = jax.nn.softmax(logits)
        shares = jnp.where(shares < 0.05, 0, shares)  # less would be mere specks
        field = jnp.inf
        for key, name, share in zip(keys, _FIELDS, shares, strict=True):
            one = draw(key, name)
            # At 1 this kind alone covers its share of the area; without one, never.
            unit = _kth_smallest(one, jnp.ceil(share * count))
            field = jnp.minimum(field, one / unit)
    else:
        field = draw(field_key, kind)
    if kind == "ragged":
        field *= _fray(jax.random.fold_in(field_key, 1), y, x)
    field = jnp.where(quiet, field, _pull_to_border(field, y, x))
    return 1 - _smallest(field, count).astype(jnp.float32)[..., None]


def _strokes(key, y, x, *, pens=28, steps=10):
    """Pens that start one after the other and walk with turns and gaps."""
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
    # Fast pens in quick succession draw long thin lines, slow ones short thick ones.
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
    birth = walk * jnp.arange(steps) + delay * jnp.arange(pens)[:, None]
    birth = jnp.where(lifted, 1e3, birth)
    segments = (
        stops - move,
        move,
        thinness[:, :-1],
        jnp.diff(thinness, axis=1),
        birth,
    )

    def add(field, segment):
        start, move, thinness, thinning, birth = segment
        dy, dx = y - start[0], x - start[1]
        along = jnp.clip((dy * move[0] + dx * move[1]) / (move @ move), 0, 1)
        # The 4-norm: lines with the blunt ends that a dilation by a square gives.
        distance = jnp.sqrt((dy - along * move[0]) ** 4 + (dx - along * move[1]) ** 4)
        distance *= (thinness + along * thinning) ** 2
        return jnp.minimum(field, distance + (birth + along * walk) ** 2), None

    segments = [part.reshape(pens * steps, *part.shape[2:]) for part in segments]
    field, _ = lax.scan(add, jnp.full((y.size, x.size), jnp.inf), segments)
    return jnp.sqrt(field) * jnp.exp(0.08 * _enlarge(roughness, y, x))


def _blobs(key, y, x):
    """Smooth noise of four octaves, now of one scale, now of many."""
    grids = [_grid(y, x, 2 * 2**octave) for octave in range(4)]
    amplitude, *octaves = _normals(key, (4,), *grids)
    amplitude = jnp.exp(0.5 * amplitude) * 0.5 ** jnp.arange(4)
    octaves = [_enlarge(octave, y, x) for octave in octaves]
    field = sum(a * octave for a, octave in zip(amplitude, octaves, strict=True))
    return field - field.min()


def _rectangles(key, y, x, *, number=16):
    """Rectangles, more or less upright, that start one after the other."""
    delay, centre, size, sides, angle = _normals(
        key, (), (number, 2), (number, 1), (number, 2), (number,)
    )
    delay, angle = jnp.exp(delay - 5), 0.1 * angle
    centre = _uniform(centre) * _extent(y, x)
    sides = jnp.exp(0.4 * size + 0.4 * sides)

    def add(field, rectangle):
        centre, sides, angle, birth = rectangle
        dy, dx = y - centre[0], x - centre[1]
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        across = jnp.abs(dy * cos - dx * sin) / sides[0]
        along = jnp.abs(dy * sin + dx * cos) / sides[1]
        return jnp.minimum(field, jnp.maximum(across, along) ** 2 + birth**2), None

    rectangles = (centre, sides, angle, delay * jnp.arange(number))
    field, _ = lax.scan(add, jnp.full((y.size, x.size), jnp.inf), rectangles)
    return jnp.sqrt(field)


def _fray(key, y, x):
    """Noise of four octaves down to a pixel or two, now next to none, now much."""
    grids = [_grid(y, x, 24 * 2**octave) for octave in range(4)]
    amount, *octaves = _normals(key, (), *grids)
    noise = sum(_enlarge(octave, y, x) for octave in octaves)
    return jnp.exp(jnp.exp(1.5 * amount - 3.5) * jnp.maximum(noise, 0) ** 2)


_FIELDS = {"strokes": _strokes, "blobs": _blobs, "rectangles": _rectangles}

KINDS: tuple[str, ...] = (*_FIELDS, "mixed", "ragged")
"""Kinds of hole that `random_mask` draws."""


def _normals(key, *shapes):
    """Normal numbers of several shapes in one draw: each costs time to compile."""
    sizes = [math.prod(shape) for shape in shapes]
    numbers = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(numbers, shapes, strict=True)]


def _uniform(normal):
    return jax.scipy.special.ndtr(normal)


def _extent(y, x):
    return jnp.stack([y[-1, 0], x[0, -1]])


def _grid(y, x, cells):
    """Shape of a coarse grid with `cells` cells per sqrt(H * W)."""
    scale = cells * (y.size * x.size) ** -0.5
    return tuple(1 + max(1, round(n * scale)) for n in (y.size, x.size))


def _enlarge(grid, y, x):
    return jax.image.resize(grid, (y.size, x.size), "cubic")


def _pull_to_border(field, y, x):
    """Lowers the field around its least pixel on the border, and there to zero."""
    least = jnp.argmin(jnp.where(_rim(field.shape, 1, 1), field, jnp.inf))
    row, column = jnp.unravel_index(least, field.shape)
    return field * jnp.minimum(1, jnp.hypot(y - y[row], x - x[:, column]) / 0.1)


def _kth_smallest(field, k):
    """The k-th smallest value of a positive field, or 0 for k = 0.

    Positive floats are ordered as their bits are, so the bits can be found one by one,
    which is fifteen times as fast as a sort.
    """
    bits = lax.bitcast_convert_type(field, jnp.int32)

    def add_bit(i, found):
        trial = found | (1 << (30 - i))
        return jnp.where(jnp.sum(bits < trial) < k, trial, found)

    return lax.bitcast_convert_type(lax.fori_loop(0, 31, add_bit, 0), jnp.float32)


def _smallest(field, k):
    """Marks the k smallest values; among equals, those that come first."""
    cut = _kth_smallest(field, k)
    below, tied = field < cut, field == cut
    place = jnp.cumsum(tied.ravel()).reshape(tied.shape)
    return below | (tied & (place <= k - jnp.sum(below)))


def _rim(shape, rows, columns):
    rim = np.ones(shape, bool)
    rim[rows:-rows, columns:-columns] = False
    return rim


def _quiet_rim(shape):
    """The rim that has no hole in half of the published masks: 50 of 512 pixels."""
    return _rim(shape, *(max(1, n * 50 // 512) for n in shape))
