"""Holes: which pixels of a picture to fill, from masks, transparency or a color."""

import warnings
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageColor

from pconv_jax.inpaint.image_io import _alpha, _array_of, _as_fraction


def hole_from_mask(
    mask: Image.Image | np.ndarray, *, invert: bool = False
) -> np.ndarray:
    """Returns the hole that a mask tells of: **white, 255, 1 or True: fill this**.

    Args:
      mask: ``[H, W]``, or ``[H, W, C]`` with C = 1, 2, 3 or 4, or a Pillow image of
        any mode. Of colours counts the brightest channel. Where it has transparency,
        what is transparent is not to be filled; and if one colour is all that it shows,
        as where a layer was painted on, then all that is not transparent is.
      invert: whether black, 0 or False are to be filled instead.

    Returns:
      Bool ``[H, W]``. Values between black and white are taken as the nearer of both,
      and a warning tells so.

    Raises:
      ValueError: if it is not such an array.
    """
    array = _array_of(mask)
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (2,), (3,), (4,)):
        raise ValueError(
            "mask must be of shape [H, W] or [H, W, C] with C = 1, 2, 3 or 4, got "
            f"{list(array.shape)}."
        )
    if np.issubdtype(array.dtype, np.integer):
        most = array.max(initial=0)
        if most <= 1:
            array = array > 0
        elif most <= 255 and array.dtype == np.uint16:
            array = array.astype(np.uint8)
    grey = _as_fraction(array.reshape(*array.shape[:2], -1))
    if grey.min(initial=0) < 0 or grey.max(initial=0) > 1:
        raise ValueError(
            "mask must be of integers, 0 or 1 or up to 255, of bools, or of floats in "
            f"[0, 1], got {array.dtype} from {array.min()} to {array.max()}."
        )
    alpha = np.ones(grey.shape[:2], np.float32)
    if grey.shape[2] in (2, 4):
        alpha, grey = grey[..., -1], grey[..., :-1]
    shown = grey[alpha > 0.5]
    painted = (alpha <= 0.5).any() and shown.size and np.all(shown == shown[0])
    white = alpha if painted else grey.max(axis=-1) * alpha
    between = np.mean((white > 0) & (white < 1))
    if between:
        warnings.warn(
            f"{between:.1%} of the mask's pixels are neither black nor white; they are "
            "taken as the nearer of both. If the mask's edge leaves a rim, dilate it.",
            stacklevel=2,
        )
    return (white > 0.5) != invert


def hole_from_alpha(alpha: np.ndarray) -> np.ndarray:
    """Returns where an alpha channel ``[H, W]`` is more transparent than not."""
    return _as_fraction(alpha) <= 0.5


def hole_from_color(
    image: Image.Image | np.ndarray, color: str, *, tolerance: int = 0
) -> np.ndarray:
    """Returns where a picture is of a colour.

    Args:
      image: the picture.
      color: as CSS has them: ``'#ff00ff'``, ``'magenta'``.
      tolerance: by how much each of red, green and blue may differ, of 255. Where the
        picture was ever a JPEG file, 0 finds little.

    Raises:
      ValueError: if there is no such colour, or the picture is not of colours.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance}.")
    try:
        rgb = ImageColor.getrgb(color)[:3]
    except ValueError as error:
        raise ValueError(
            f"color must be one of CSS, such as '#ff00ff' or 'magenta', got {color!r}."
        ) from error
    array = _array_of(image)
    if array.shape[2:] not in ((), (1,), (2,), (3,), (4,)):
        raise ValueError(
            f"image must have colours, but it is of shape {list(array.shape)}."
        )
    values = _as_fraction(array.reshape(*array.shape[:2], -1)) * 255
    values = values[..., :-1] if _alpha(values) is not None else values
    # Float arithmetic is off by less than half a level.
    return np.all(np.abs(values - np.float32(rgb)) < tolerance + 0.5, axis=-1)


def dilate_hole(hole: np.ndarray, pixels: int) -> np.ndarray:
    """Returns a hole that reaches so many pixels further, in all directions."""
    if pixels < 0:
        raise ValueError(f"dilate must be 0 or more pixels, got {pixels}.")
    if not pixels:
        return hole
    distance = cv2.distanceTransform(
        (~hole).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    )
    return (distance <= pixels) & hole.any()


def resize_hole(hole: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Returns a hole of another height and width, by nearest neighbours."""
    size = (shape[1], shape[0])
    return cv2.resize(hole.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
