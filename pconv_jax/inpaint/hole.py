"""Holes: the pixels of an image to fill, from a mask, transparency or a color.

A hole is a bool array ``[H, W]``, True where the image is filled.
"""

import warnings
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageColor

from pconv_jax._errors import UserError
from pconv_jax.inpaint.image_io import alpha_of, as_array
from pconv_jax.inpaint.values import to_fraction


def hole_from_mask(
    mask: Image.Image | np.ndarray, *, invert: bool = False
) -> np.ndarray:
    """Convert a mask image to a hole: **white, 255, 1 or True is filled**.

    Args:
      mask: ``[H, W]``, or ``[H, W, C]`` with C = 1, 2, 3 or 4, or a Pillow image of any
        mode. Of several colors, the brightest channel counts. Transparent pixels are
        not filled. If all visible pixels have one color, as in a painted layer, every
        visible pixel is filled.
      invert: Whether black, 0 or False is filled instead. The default is False.

    Returns:
      Bool ``[H, W]``. Gray values are rounded to black or white, with a warning.

    Raises:
      UserError: If the mask has another shape, or values outside its range.
    """
    array = as_array(mask)
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (2,), (3,), (4,)):
        raise UserError(
            "mask must have the shape [H, W] or [H, W, C] with C = 1, 2, 3 or 4, got "
            f"{list(array.shape)}."
        )
    gray = _to_gray(array.reshape(*array.shape[:2], -1))
    alpha = np.ones(gray.shape[:2], np.float32)
    if gray.shape[2] in (2, 4):
        alpha, gray = gray[..., -1], gray[..., :-1]
    visible = gray[alpha > 0.5]
    painted = (alpha <= 0.5).any() and visible.size and np.all(visible == visible[0])
    white = alpha if painted else gray.max(axis=-1) * alpha
    between = np.mean((white > 0) & (white < 1))
    if between:
        warnings.warn(
            f"{between:.1%} of the mask's pixels are neither black nor white; they are "
            "rounded to the nearer of both. If a rim is left at the mask's edge, use "
            "dilate.",
            stacklevel=2,
        )
    return (white > 0.5) != invert


def _to_gray(mask: np.ndarray) -> np.ndarray:
    """Convert a mask's values to float32 in [0, 1]."""
    array = mask
    if np.issubdtype(array.dtype, np.integer):
        largest = array.max(initial=0)
        if largest <= 1:
            array = array > 0
        elif largest <= 255 and array.dtype == np.uint16:
            array = array.astype(np.uint8)
    gray = to_fraction(array)
    if gray.min(initial=0) < 0 or gray.max(initial=0) > 1:
        raise UserError(
            "mask must have integers, 0 or 1 or up to 255, or bools, or floats in "
            f"[0, 1], got {mask.dtype} from {mask.min()} to {mask.max()}."
        )
    return gray


def hole_from_alpha(alpha: np.ndarray) -> np.ndarray:
    """Find where an alpha channel ``[H, W]`` is more transparent than opaque."""
    return to_fraction(alpha) <= 0.5


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
    values = to_fraction(array.reshape(*array.shape[:2], -1)) * 255
    values = values[..., :-1] if alpha_of(values) is not None else values
    # Float arithmetic is off by less than half a level.
    difference = np.abs(values - np.asarray(rgb, np.float32))
    return np.all(difference < tolerance + 0.5, axis=-1)


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
