"""Holes: the pixels of an image to fill, from a mask, transparency or a color.

A hole is a bool array ``[H, W]``, True where the image is filled.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageColor

from pconv_jax._errors import UserError
from pconv_jax.inpaint.modes import alpha_of, as_array
from pconv_jax.inpaint.values import to_fraction, white

# Rows that are converted to floats at once.
_STRIP = 64

# Difference in brightness of pixels that one brush has painted, after compression.
_SAME = 0.25

# Brightness, as a fraction of white, from which on a brush is white, and below which it
# is compression's noise.
_BRIGHT, _FAINT = 0.9, 8 / 255

_LABELS = (
    "mask has {} and looks like a mask of labels: choose the label to fill with "
    "--mask-label (in Python, pass mask == label)."
)


def hole_from_mask(
    mask: Image.Image | np.ndarray, *, invert: bool = False
) -> np.ndarray:
    """Convert a mask image to a hole: **white, 255, 1 or True is filled**.

    Args:
      mask: ``[H, W]``, or ``[H, W, C]`` with C = 1, 2, 3 or 4, or a Pillow image of any
        mode. Of several colors, the brightest channel counts. Transparent pixels are
        not filled. If all opaque pixels have about the same brightness, as in a layer
        painted with one brush, every visible pixel is filled. If none is white, the
        brightest or the most opaque ones stand for white.
      invert: Whether black, 0 or False is filled instead. The default is False.

    Returns:
      Bool ``[H, W]``. Gray values are rounded to black or white, with a warning.

    Raises:
      UserError: If the mask has another shape, or values outside its range, or if it
        has labels instead of black and white.
    """
    if isinstance(mask, Image.Image) and _has_labels(mask):
        raise UserError(_LABELS.format("a palette of several colors"))
    array = as_array(mask)
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (2,), (3,), (4,)):
        raise UserError(
            "mask must have the shape [H, W] or [H, W, C] with C = 1, 2, 3 or 4, got "
            f"{list(array.shape)}."
        )
    array = _drop_opaque_alpha(array.reshape(*array.shape[:2], -1))
    scale = _find_white(array)
    _refuse_labels(array, scale)
    brush = _find_brush(array, scale)
    hole, between = np.empty(array.shape[:2], bool), 0
    for top, strip in zip(range(0, len(array), _STRIP), _strips(array)):
        gray, alpha = _to_gray(strip, scale)
        share = (alpha if brush.is_layer else gray * alpha) / brush.white
        hole[top : top + len(strip)] = share > 0.5
        between += np.count_nonzero((share > 0) & (share < 1))
    if between:
        warnings.warn(
            f"{between / hole.size:.1%} of the mask's pixels are neither black nor "
            "white; each is rounded to the nearer of the two. If a rim is left at the "
            "hole's edge, enlarge the hole: --dilate 2, or in Python dilate=2.",
            stacklevel=2,
        )
    return hole != invert


def hole_from_label(mask: Image.Image | np.ndarray, label: int) -> np.ndarray:
    """Find where a mask of labels, ``[H, W]`` or a Pillow image, has one of them.

    The channels of a gray mask ``[H, W, C]`` count as one.

    Raises:
      UserError: If the mask has several channels that differ, or no such label.
    """
    array = np.asarray(mask)
    if array.ndim == 3:
        array = _drop_opaque_alpha(array)
    if array.ndim == 3 and _is_gray(array):
        array = array[..., 0]
    if array.ndim != 2:
        raise UserError(
            f"mask must have one channel to have labels, got {list(array.shape)}."
        )
    hole = array == label
    if not hole.any():
        known = ", ".join(str(value) for value in np.unique(array)[:20])
        raise UserError(f"mask has no label {label}; it has {known}.")
    return hole


def _drop_opaque_alpha(mask: np.ndarray) -> np.ndarray:
    """Leave out the alpha of a mask ``[H, W, C]`` that is opaque everywhere.

    Its value of white says nothing about the colors, which may be labels, or 0 and 1.
    """
    alpha = alpha_of(mask)
    return mask if alpha is None or (alpha < white(mask)).any() else mask[..., :-1]


def _find_white(mask: np.ndarray) -> int:
    """Find the value of white in a mask ``[H, W, C]``: 1, 255 or 65535.

    Raises:
      UserError: If the mask has values outside its range.
    """
    if not mask.size:
        return 1
    least, largest = np.fmin.reduce(mask, None), np.fmax.reduce(mask, None)  # Not NaN.
    top = 1
    if np.issubdtype(mask.dtype, np.integer) and largest > 1:
        top = 65_535 if largest > 255 and mask.dtype == np.uint16 else 255
    if least < 0 or largest > top:
        raise UserError(
            "mask must have integers, 0 or 1 or up to 255, or bools, or floats in "
            f"[0, 1], got {mask.dtype} from {mask.min()} to {mask.max()}."
        )
    return top


def _refuse_labels(mask: np.ndarray, top: int) -> None:
    """Check that a mask ``[H, W, C]`` does not have labels instead of gray values.

    Args:
      mask: The mask.
      top: Its value of white.

    Raises:
      UserError: If it has.
    """
    if top == 1 or mask.shape[2] not in (1, 3) or not _is_gray(mask):
        return
    counts = np.zeros(top + 1, int)
    for strip in _strips(mask):
        counts += np.bincount(strip[..., 0].ravel(), minlength=top + 1)
    if _are_labels(counts):
        named = ", ".join(str(value) for value in np.flatnonzero(counts)[:20])
        raise UserError(_LABELS.format(f"the values {named}"))


def _strips(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Divide a mask: it may be as large as an image, and its floats larger."""
    return (mask[i : i + _STRIP] for i in range(0, len(mask), _STRIP))


def _is_gray(mask: np.ndarray) -> bool:
    """Return whether all channels of a mask ``[H, W, C]`` are equal."""
    return all((strip == strip[..., :1]).all() for strip in _strips(mask))


def _are_labels(counts: np.ndarray) -> bool:
    """Return whether gray values, given how often each is there, are labels.

    Between black and its own gray, a brush has values at its rim only. Labels are a few
    values, or small numbers, each of an area.
    """
    top, values = len(counts) - 1, np.flatnonzero(counts)
    between = values[(values > 0) & (values < top)]
    if values[-1] > top // 2:
        if not between.size or between[-1] >= 64:
            return False
        return between[-1] == len(between) or counts[between].sum() > counts[top]
    if values[-1] < _FAINT * top:
        return values[-1] > 0
    rim = between[(between > 0.2 * values[-1]) & (between < 0.65 * values[-1])]
    share = counts[rim].sum() / counts[between].sum()
    return share > (0.7 if len(between) > 10 else 0.05)


def _has_labels(mask: Image.Image) -> bool:
    """Return whether a palette has colors of several hues, as for labels."""
    if mask.mode != "P":
        return False
    used = [index for index, count in enumerate(mask.histogram()[:256]) if count]
    palette = np.reshape(mask.getpalette("RGB"), (-1, 3))
    colors = palette[[index for index in used if index < len(palette)]].astype(int)
    chroma = colors - colors.min(axis=1, keepdims=True)
    strong = chroma[chroma.max(axis=1) > 64]
    hues = {tuple(np.rint(2 * hue / hue.max()).astype(int)) for hue in strong}
    return len(hues) > 1


class _Brush(NamedTuple):
    """What a mask was painted with.

    Attributes:
      is_layer: Whether it is a layer on which someone painted with one brush, so that
        opacity counts and not brightness.
      white: The brightness, or opacity, that stands for white.
    """

    is_layer: bool
    white: float


def _find_brush(mask: np.ndarray, scale: float) -> _Brush:
    clear, dark, bright, most, opacity = False, 1.0, 0.0, 0.0, 0.0
    for strip in _strips(mask):
        gray, alpha = _to_gray(strip, scale)
        clear = clear or bool((alpha <= 0.5).any())
        opaque = gray[alpha > 0.9]
        dark = min(dark, opaque.min(initial=1))
        bright = max(bright, opaque.max(initial=0))
        most = max(most, (gray * alpha).max(initial=0))
        opacity = max(opacity, alpha.max(initial=0))
    is_layer = clear and bright - dark <= _SAME
    level = float(opacity if is_layer else most)
    return _Brush(is_layer, level if _FAINT < level < _BRIGHT else 1.0)


def _to_gray(strip: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Convert a mask ``[H, W, C]`` to its brightest channel and alpha, in [0, 1]."""
    values = np.nan_to_num(strip.astype(np.float32)) / np.float32(scale)
    if values.shape[2] in (2, 4):
        return values[..., :-1].max(axis=-1), values[..., -1]
    return values.max(axis=-1), np.ones(values.shape[:2], np.float32)


def hole_from_alpha(alpha: np.ndarray) -> np.ndarray:
    """Find where an alpha channel ``[H, W]`` is more transparent than opaque."""
    hole = np.empty(alpha.shape, bool)
    for i in range(0, len(alpha), _STRIP):
        hole[i : i + _STRIP] = to_fraction(alpha[i : i + _STRIP]) <= 0.5
    return hole


def hole_from_color(
    image: Image.Image | np.ndarray, color: str, *, tolerance: int = 0
) -> np.ndarray:
    """Find where an image has a color.

    Args:
      image: The image.
      color: CSS color: ``'#ff00ff'``, ``'magenta'``.
      tolerance: Largest difference of each of red, green and blue, in units of 1/255.
        The default 0 finds little if the image was ever a JPEG file.

    Returns:
      Bool ``[H, W]``.

    Raises:
      UserError: If there is no such color, the image has no colors, or the tolerance is
        negative.
    """
    if tolerance < 0:
        raise UserError(f"tolerance must be 0 or more, got {tolerance}.")
    try:
        rgb = ImageColor.getrgb(color)[:3]
    except ValueError as error:
        raise UserError(
            f"color must be a CSS color, such as '#ff00ff' or 'magenta', got {color!r}."
        ) from error
    array = as_array(image)
    if array.shape[2:] not in ((), (1,), (2,), (3,), (4,)):
        raise UserError(
            f"image must have colors, but its shape is {list(array.shape)}."
        )
    array = array.reshape(*array.shape[:2], -1)
    array = array[..., :-1] if alpha_of(array) is not None else array
    hole = np.empty(array.shape[:2], bool)
    for i in range(0, len(array), _STRIP):
        values = to_fraction(array[i : i + _STRIP]) * 255
        # Float arithmetic is off by less than half a level.
        difference = np.abs(values - np.asarray(rgb, np.float32))
        hole[i : i + _STRIP] = np.all(difference < tolerance + 0.5, axis=-1)
    return hole


def dilate_hole(hole: np.ndarray, pixels: int) -> np.ndarray:
    """Enlarge a hole by a number of pixels in all directions.

    Raises:
      UserError: If the number is negative.
    """
    if pixels < 0:
        raise UserError(f"dilate must be 0 or more pixels, got {pixels}.")
    if not pixels:
        return hole
    distance = cv2.distanceTransform(
        (~hole).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    )
    return (distance <= pixels) & hole.any()


def resize_hole(hole: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Resize a hole to a height and width, by nearest neighbors."""
    size = (shape[1], shape[0])
    return cv2.resize(hole.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
