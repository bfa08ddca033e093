"""Division of a large picture into the squares that a network repairs."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

# Pixels. A picture is repaired in squares of these sides, or of the next multiples that
# the network takes, so that no more than these are ever compiled.
SIDES = (128, 256, 384, 512, 768, 1024)
# What the network is at least shown around a hole: a quarter of its extent, and pixels
# from and to.
MARGINS = (64, 128)


class Tile(NamedTuple):
    """A part of a picture that is repaired at once.

    Attributes:
      box: slices of rows and of columns that hold some of the hole.
      window: top, left and side of the square that the network is shown of it. It may
        reach beyond the picture.
    """

    box: tuple[slice, slice]
    window: tuple[int, int, int]


def divide(hole: np.ndarray, sides: Sequence[int]) -> list[Tile]:
    """Divides a picture to squares around its holes.

    A hole is divided where it would not fit into the largest square; else where that
    makes fewer pixels in all.

    Args:
      hole: bool ``[H, W]``.
      sides: of the squares, in pixels, from small to large.

    Returns:
      Tiles. Their boxes do not overlap, and hold all of the hole.
    """
    return _divide(hole, tuple(slice(0, n) for n in hole.shape), sides)


def _divide(hole, box, sides):
    if not hole[box].any():
        return []
    box = _tighten(hole, box)
    window = _window(box, hole.shape, sides)
    parts = _cut(hole, box, force=window is None)
    if parts:
        tiles = [tile for part in parts for tile in _divide(hole, part, sides)]
        if window is None or sum(t.window[2] ** 2 for t in tiles) < window[2] ** 2:
            return tiles
    return [Tile(box, window)]


def _tighten(hole, box):
    """Returns the least box that has all of the hole in a box."""
    part = hole[box]
    bounds = [np.flatnonzero(part.any(axis=axis))[[0, -1]] for axis in (1, 0)]
    return tuple(
        slice(s.start + int(first), s.start + int(last) + 1)
        for s, (first, last) in zip(box, bounds)
    )


def _window(box, shape, sides):
    """Returns the least square that shows a box and its margin; None if none does."""
    extents = [s.stop - s.start for s in box]
    margin = int(np.clip(max(extents) // 4, *MARGINS))
    needed = max(min(e + 2 * margin, n) for e, n in zip(extents, shape))
    side = next((side for side in sides if side >= needed), None)
    if side is None:
        return None
    middles = [(s.start + s.stop) // 2 for s in box]
    starts = [max(min(m - side // 2, n - side), 0) for m, n in zip(middles, shape)]
    return (*starts, side)


def _cut(hole, box, force):
    """Returns a box in two: at the widest gap; at the middle, if one has to."""
    part = hole[box]
    gaps = []
    for axis in (0, 1):
        filled = np.flatnonzero(part.any(axis=1 - axis))
        steps = np.diff(filled)
        if steps.size and steps.max() > 2 * MARGINS[0]:  # Else little is gained.
            widest = np.flatnonzero(steps == steps.max())
            i = widest[len(widest) // 2]  # Of equal ones, so that parts are alike.
            gaps.append((steps[i], axis, int(filled[i]) + 1))
    if gaps:
        _, axis, at = max(gaps)
    elif force:
        axis = int(part.shape[1] > part.shape[0])
        at = part.shape[axis] // 2
    else:
        return None
    at += box[axis].start
    first, second = list(box), list(box)
    first[axis] = slice(box[axis].start, at)
    second[axis] = slice(at, box[axis].stop)
    return tuple(first), tuple(second)


def halve(values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages the valid pixels of each 2 x 2 block.

    Args:
      values: float ``[H, W, C]``.
      known: bool ``[H, W]``, True where a pixel is valid.

    Returns:
      The image at half the size, and where it has a valid pixel.
    """
    pads = [(0, n % 2) for n in known.shape]
    known = np.pad(known, pads).astype(np.float32)[..., None]
    values = np.pad(values, [*pads, (0, 0)]) * known
    count, total = (
        sum(x[i::2, j::2] for i in (0, 1) for j in (0, 1)) for x in (known, values)
    )
    return total / np.maximum(count, 1), count[..., 0] > 0


def double(
    array: np.ndarray, shape: Sequence[int], *, interpolation: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """Doubles the size of an array ``[H, W, ...]`` and cuts it to a shape."""
    height, width = array.shape[:2]
    planes = [
        cv2.resize(plane, (2 * width, 2 * height), interpolation=interpolation)
        for plane in np.moveaxis(np.atleast_3d(array), -1, 0)
    ]
    doubled = np.stack(planes, axis=-1).reshape(2 * height, 2 * width, *array.shape[2:])
    return doubled[: shape[0], : shape[1]]
