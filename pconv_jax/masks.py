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

from pconv_jax import _mask_fields, ops

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


KINDS: tuple[str, ...] = (
    *_mask_fields.GROWN,
    "mixed",
    "ragged",
    *_mask_fields.THIN,
    "wide",
)
"""The kinds of hole that `random_mask` draws."""


def hole_ratio(mask: ArrayLike) -> jax.Array:
    """Compute the fraction of the pixels that are in the hole.

    Args:
      mask: ``[..., H, W, 1]``, 1 = valid, 0 = hole.

    Returns:
      Float32 ``[...]`` in [0, 1].

    Raises:
      ValueError: If the mask has another shape.
    """
    return 1 - jnp.mean(_valid(mask).astype(jnp.float32), axis=(-2, -1))


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

    Raises:
      ValueError: If the mask has another shape.
    """
    valid = _valid(mask)
    rim = jnp.broadcast_to(_rim(valid.shape[-2:], 1, 1), valid.shape)
    return jnp.any(~valid & rim, axis=(-2, -1))


def near_border(mask: ArrayLike) -> jax.Array:
    """Test whether the hole reaches into the outermost 50/512 of any side.

    This criterion divides the published masks into those with and without holes at the
    border.

    Args:
      mask: ``[..., H, W, 1]``, 1 = valid, 0 = hole.

    Returns:
      Bool ``[...]``.

    Raises:
      ValueError: If the mask has another shape.
    """
    valid = _valid(mask)
    rim = jnp.broadcast_to(_quiet_rim(valid.shape[-2:]), valid.shape)
    return jnp.any(~valid & rim, axis=(-2, -1))


def _valid(mask: ArrayLike) -> jax.Array:
    """Find where a mask is valid, bool ``[..., H, W]``."""
    mask = jnp.asarray(mask)
    if mask.ndim < 3 or mask.shape[-1] != 1:
        raise ValueError(f"mask must be [..., H, W, 1], got {mask.shape}.")
    return ops.is_valid(mask)[..., 0]


def inner_pixels(shape: Sequence[int]) -> int:
    """Count the pixels that `random_mask` may draw holes in if ``border`` is False.

    Args:
      shape: ``(H, W)``.
    """
    return math.prod(max(0, n - 2 * _quiet_width(n)) for n in shape)


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
        pixels is drawn uniformly; if the range contains no whole number of pixels
        (0.01 to 0.012 of 8 x 8 pixels are 0.64 to 0.77), its upper end is used as a
        single fraction. The default is (0.01, 0.6). A traced value is float32, whose
        rounding can add a pixel in a million.
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
      Float32 ``[H, W, 1]``, 1 = valid, 0 = hole. `Inpainter` takes the opposite, which
      is ``mask == 0``.

    Raises:
      ValueError: If an argument is out of its range.
    """
    if np.shape(shape) != (2,) or not all(
        isinstance(n, int | np.integer) and n >= 8 for n in shape
    ):
        raise ValueError(
            f"shape must be (height, width), integers of at least 8, got {shape}."
        )
    shape = tuple(shape)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
    if border not in (True, False, None):
        raise ValueError(f"border must be True, False or None, got {border!r}.")
    border = None if border is None else bool(border)
    bounds = hole_ratio if isinstance(hole_ratio, tuple | list) else (hole_ratio,) * 2
    is_range = len(bounds) == 2 and not any(map(np.ndim, bounds))
    is_traced = any(isinstance(bound, Tracer) for bound in bounds)
    if not is_range or not (is_traced or 0 < bounds[0] <= bounds[1] < 1):
        raise ValueError(
            "hole_ratio must be a number in (0, 1), or a range (low, high) with "
            f"0 < low <= high < 1, got {hole_ratio}."
        )
    if not is_traced:
        pixels, room = math.prod(shape), inner_pixels(shape)
        if border is False and _whole_pixels(bounds[1], pixels) > room:
            raise ValueError(
                f"hole_ratio reaches {bounds[1]}, but with border=False there is room "
                f"for {room / pixels:.3f} of {shape[0]}x{shape[1]} pixels at most."
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
    rim, room = _quiet_rim(shape), inner_pixels(shape)
    count = last - jnp.floor(area * (last - first).astype(jnp.float32)).astype(
        jnp.int32
    )
    pixels = math.prod(shape)
    count = jnp.clip(count, 1, room if border is False else pixels)
    if border is None:
        quiet = (coin < 0.5) & (count <= room)
    else:
        quiet = jnp.asarray(not border)
    y, x = _mask_fields.coordinates(shape)

    def draw(key: jax.Array, kind: str) -> jax.Array:
        field = _mask_fields.draw(key, kind, y, x, at_border=~quiet)
        return jnp.where(quiet & rim, jnp.inf, field)

    if kind in ("mixed", "ragged"):
        *keys, fray_key = jax.random.split(field_key, 2 + len(_mask_fields.GROWN))
        field = _mix(keys, draw, count)
        if kind == "ragged":
            field *= _mask_fields.fray(fray_key, y, x)
    else:
        field = draw(field_key, kind)
    # Thin and wide holes keep their shapes: they gain a pixel at most.
    reach = pixels**-0.5 if kind in ("wide", *_mask_fields.THIN) else 0.1
    field = jnp.where(quiet, field, _pull_to_border(field, y, x, reach))
    return 1 - _smallest(field, count).astype(jnp.float32)[..., None]


def _mix(
    keys: Sequence[jax.Array],
    draw: Callable[[jax.Array, str], jax.Array],
    count: jax.Array,
) -> jax.Array:
    """Draw all kinds that grow, each with a random share of a number of pixels."""
    share_key, *keys = keys
    # Strokes dominate, since most of the published masks look like strokes.
    logits = jnp.array([4.0, 0, 0], jnp.float32)
    logits += 2 * jax.random.normal(share_key, (3,), jnp.float32)
    shares = jax.nn.softmax(logits)
    # Smaller shares would be mere specks.
    shares = jnp.where(shares < 0.05, 0, shares)
    field = jnp.float32(jnp.inf)
    for key, kind, share in zip(keys, _mask_fields.GROWN, shares, strict=True):
        one = draw(key, kind)
        # Scaled such that, at 1, this kind alone covers its share of the area. A share
        # of 0 is never covered.
        covered = jnp.ceil(share * count.astype(jnp.float32))
        unit = _kth_smallest(one, covered.astype(jnp.int32))
        field = jnp.minimum(field, one / unit)
    return jnp.asarray(field)


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


def _rim(shape: Sequence[int], rows: int, columns: int) -> jax.Array:
    """Mark the outermost rows and columns of an image."""
    y, x = (lax.broadcasted_iota(jnp.int32, tuple(shape), axis) for axis in (0, 1))
    height, width = shape
    rim_rows = (y < rows) | (y >= height - rows)
    return rim_rows | (x < columns) | (x >= width - columns)


def _quiet_rim(shape: Sequence[int]) -> jax.Array:
    """Mark the rim that half of the published masks leave valid."""
    return _rim(shape, *map(_quiet_width, shape))


def _quiet_width(length: int) -> int:
    """Return the width of this rim along an axis: 50 of 512 pixels, at least one."""
    return max(1, length * 50 // 512)
