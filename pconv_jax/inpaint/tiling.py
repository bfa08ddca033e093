"""Division of a large image into the squares that a network repairs, and scaling."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

Box = tuple[slice, slice]
"""Slices of the rows and of the columns."""

# Sides in pixels of the squares in which images are repaired, rounded up to multiples
# that the network takes. There are few, because each is compiled.
SIDES = (128, 256, 384, 512, 768, 1024)
# The network sees a quarter of a hole's extent around it: at least the first, and at
# most the second number of pixels.
MARGINS = (64, 128)


class Square(NamedTuple):
    """A square that the network sees. It may reach beyond the image."""

    top: int
    left: int
    side: int


class Tile(NamedTuple):
    """A part of an image that is repaired at once.

    Attributes:
      box: Rows and columns that contain some of the hole.
      square: The square that the network sees, in which the box lies.
    """

    box: Box
    square: Square


def divide(hole: np.ndarray, sides: Sequence[int]) -> list[Tile]:
    """Divide an image into squares around its holes.

    A hole that does not fit into the largest square is divided. Smaller holes are
    divided where the squares of the parts have fewer pixels in all.

    Args:
      hole: Bool ``[H, W]``.
      sides: Sides of the squares in pixels, from small to large.

    Returns:
      Tiles. Their boxes do not overlap, and contain all of the hole.
    """
    height, width = hole.shape
    return _divide(hole, (slice(0, height), slice(0, width)), sides)


def _divide(hole: np.ndarray, box: Box, sides: Sequence[int]) -> list[Tile]:
    if not hole[box].any():
        return []
    box = _tighten(hole, box)
    square = _find_square(box, hole.shape, sides)
    parts = _cut(hole, box, force=square is None)
    tiles = [tile for part in parts for tile in _divide(hole, part, sides)]
    if square is None:
        return tiles
    if tiles and sum(tile.square.side**2 for tile in tiles) < square.side**2:
        return tiles
    return [Tile(box, square)]


def _tighten(hole: np.ndarray, box: Box) -> Box:
    """Shrink a box to the hole inside it."""
    part = hole[box]
    rows, columns = box
    return (
        _tighten_slice(rows, part.any(axis=1)),
        _tighten_slice(columns, part.any(axis=0)),
    )


def _tighten_slice(old: slice, used: np.ndarray) -> slice:
    first, last = np.flatnonzero(used)[[0, -1]]
    return slice(old.start + int(first), old.start + int(last) + 1)


def _find_square(box: Box, shape: Sequence[int], sides: Sequence[int]) -> Square | None:
    """Find the smallest square for a box and its margin; None if all are too small."""
    extents = [s.stop - s.start for s in box]
    margin = int(np.clip(max(extents) // 4, *MARGINS))
    needed = max(min(e + 2 * margin, n) for e, n in zip(extents, shape))
    side = next((side for side in sides if side >= needed), None)
    if side is None:
        return None
    middles = [(s.start + s.stop) // 2 for s in box]
    top, left = (max(min(m - side // 2, n - side), 0) for m, n in zip(middles, shape))
    return Square(top, left, side)


def _cut(hole: np.ndarray, box: Box, *, force: bool) -> tuple[Box, ...]:
    """Cut a box in two at the widest gap of its hole.

    Args:
      hole: Bool ``[H, W]``.
      box: The box.
      force: Whether to cut a box that has no gap, in its middle.

    Returns:
      The two boxes; none where there is no gap.
    """
    part = hole[box]
    gaps = []
    for axis in (0, 1):
        filled = np.flatnonzero(part.any(axis=1 - axis))
        steps = np.diff(filled)
        # A narrower gap saves little, because margins overlap.
        if steps.size and steps.max() > 2 * MARGINS[0]:
            widest = np.flatnonzero(steps == steps.max())
            i = widest[len(widest) // 2]  # The middle one, for parts of equal size.
            gaps.append((steps[i], axis, int(filled[i]) + 1))
    if gaps:
        _, axis, at = max(gaps)
    elif force:
        axis = int(part.shape[1] > part.shape[0])
        at = part.shape[axis] // 2
    else:
        return ()
    rows, columns = box
    if axis == 0:
        upper, lower = _cut_slice(rows, at)
        return (upper, columns), (lower, columns)
    left, right = _cut_slice(columns, at)
    return (rows, left), (rows, right)


def _cut_slice(old: slice, at: int) -> tuple[slice, slice]:
    return slice(old.start, old.start + at), slice(old.start + at, old.stop)


def halve(values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average the valid pixels of each 2 x 2 block.

    Args:
      values: Float ``[H, W, C]``.
      known: Bool ``[H, W]``, True where a pixel is valid.

    Returns:
      The image at half the size, rounded up, and where it has a valid pixel.
    """
    pads = [(0, n % 2) for n in known.shape]
    weights = np.pad(known, pads).astype(np.float32)[..., None]
    values = np.pad(values, [*pads, (0, 0)]) * weights
    count = _sum_blocks(weights)
    return _sum_blocks(values) / np.maximum(count, 1), count[..., 0] > 0


def _sum_blocks(x: np.ndarray) -> np.ndarray:
    return x[::2, ::2] + x[::2, 1::2] + x[1::2, ::2] + x[1::2, 1::2]


def double(
    array: np.ndarray, shape: Sequence[int], *, interpolation: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """Double the size of an array ``[H, W, ...]``, and crop it to a shape.

    Args:
      array: The array, of one channel or several.
      shape: Height and width of the result.
      interpolation: OpenCV's kind of interpolation. The default is linear.
    """
    height, width = array.shape[:2]
    planes = [
        cv2.resize(plane, (2 * width, 2 * height), interpolation=interpolation)
        for plane in np.moveaxis(np.atleast_3d(array), -1, 0)
    ]
    doubled = np.stack(planes, axis=-1).reshape(2 * height, 2 * width, *array.shape[2:])
    return doubled[: shape[0], : shape[1]]
