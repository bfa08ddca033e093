"""Large images, filled block by block, so that their memory is bounded.

A block of the largest size, with a hole of a million pixels, takes 0.8 GB: the network
0.5, and then the search for detail. A block has a hole and as much of the image around
it as there is room for. A hole that is too large for a block is filled in its center
from the image at a lower resolution, and then at its rim in several blocks.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cv2
import numpy as np

from pconv_jax.inpaint.progress import Progress, ignore, share
from pconv_jax.inpaint.tiling import Box

BLOCK_PIXELS = 2_150_000
"""Largest number of pixels of a block; larger images are filled in several."""

# Fills, in place, the hole of colors [H, W, C], given where they are known, the hole,
# where not to copy detail from, and a report of progress; returns the fill depth.
Fill = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Progress], np.ndarray]

_MAX_CENTER = 600_000  # Pixels of all holes at the lower resolution.

_CELL = 64  # Side of the squares that a hole is divided into.
_GROUP = 1024  # Side of the squares whose holes share a block if they fit.
_MARGIN = 192  # Least width of what a block has around its hole.
_RIM = 128  # Width of the rim of a hole that is too large for a block.


class _Part(NamedTuple):
    """Cells of the hole, and the box of pixels that bounds them."""

    labels: list[int]
    top: int
    left: int
    bottom: int
    right: int


def fill_in_blocks(
    fill: Fill,
    colors: np.ndarray,
    known: np.ndarray,
    hole: np.ndarray,
    exclude: np.ndarray,
    *,
    progress: Progress = ignore,
) -> np.ndarray:
    """Fill a hole in place, in blocks if the image is large.

    Args:
      fill: Fills an image.
      colors: ``[H, W, C]``, in place filled in the hole.
      known: Bool ``[H, W]``, True where colors are valid. It grows by what is filled.
      hole: Bool ``[H, W]``, True where to fill.
      exclude: Bool ``[H, W]``, True where not to copy detail from.
      progress: Called with the fraction that is done. By default nothing is reported.

    Returns:
      The fill depth, uint8 ``[H, W]``.
    """
    if hole.size <= BLOCK_PIXELS:
        return fill(colors, known, hole, exclude, progress)
    depth = np.zeros(hole.shape, np.uint8)
    done, total = 0, np.count_nonzero(hole)

    def fill_block(box: Box, part: np.ndarray) -> None:
        nonlocal done
        if count := np.count_nonzero(part):
            task = share(progress, done, done + count, total=total)
            block = fill(colors[box], known[box], part, exclude[box], task)
            depth[box][part] = block[part]
            known[box] |= part
            done += count

    labels, parts = _find_parts(hole)
    large = [part for part in parts if not _fits(part)]
    if large:
        is_large = np.isin(labels, [n for part in large for n in part.labels])
        _fill_centers(fill, colors, known, hole, exclude, depth, is_large, progress)
        done = np.count_nonzero(known & hole)
    for part in parts:
        chosen = np.isin(labels, part.labels)
        cores = [part] if _fits(part) else _split(part)
        for core in cores:
            box = _expand(core, hole.shape)
            inside = hole[box] & _enlarge(chosen, box, _CELL) & ~known[box]
            outside = np.ones_like(inside)
            outside[
                core.top - box[0].start : core.bottom - box[0].start,
                core.left - box[1].start : core.right - box[1].start,
            ] = False
            fill_block(box, inside & ~outside)
    return depth


def _find_parts(hole: np.ndarray) -> tuple[np.ndarray, list[_Part]]:
    """Divide a hole into parts; return the label of each cell, and the parts."""
    rows, columns = (range(0, n, _CELL) for n in hole.shape)
    cells = np.logical_or.reduceat(hole, rows, axis=0)
    cells = np.logical_or.reduceat(cells, columns, axis=1)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        cells.astype(np.uint8), connectivity=8
    )
    groups: dict[tuple[int, int], list[_Part]] = {}
    for label in range(1, count):
        left, top, width, height = (int(n) * _CELL for n in stats[label][:4])
        bottom = min(top + height, hole.shape[0])
        right = min(left + width, hole.shape[1])
        place = (top + bottom) // 2 // _GROUP, (left + right) // 2 // _GROUP
        part = _Part([label], top, left, bottom, right)
        groups.setdefault(place, []).append(part)
    parts = []
    for group in groups.values():
        together = _Part(
            [label for part in group for label in part.labels],
            min(part.top for part in group),
            min(part.left for part in group),
            max(part.bottom for part in group),
            max(part.right for part in group),
        )
        parts += [together] if _fits(together) else group
    return labels, parts


def _fits(part: _Part) -> bool:
    height, width = part.bottom - part.top, part.right - part.left
    return (height + 2 * _MARGIN) * (width + 2 * _MARGIN) <= BLOCK_PIXELS


def _split(part: _Part) -> Iterator[_Part]:
    """Divide a part that does not fit into squares."""
    side = math.isqrt(BLOCK_PIXELS) - 2 * _MARGIN
    for top in range(part.top, part.bottom, side):
        for left in range(part.left, part.right, side):
            bottom, right = min(top + side, part.bottom), min(left + side, part.right)
            yield _Part(part.labels, top, left, bottom, right)


def _expand(part: _Part, shape: tuple[int, ...]) -> Box:
    """Get the box of a block: a part, and as much around it as there is room for."""
    height, width = part.bottom - part.top, part.right - part.left
    # Solves (height + 2 m) (width + 2 m) = BLOCK_PIXELS for the margin m.
    half = (height + width) / 2
    margin = int((math.sqrt(half**2 - height * width + BLOCK_PIXELS) - half) / 2)
    rows = slice(max(part.top - margin, 0), min(part.bottom + margin, shape[0]))
    columns = slice(max(part.left - margin, 0), min(part.right + margin, shape[1]))
    return rows, columns


def _enlarge(cells: np.ndarray, box: Box, side: int) -> np.ndarray:
    """Enlarge cells of a side to the pixels of a box."""
    rows, columns = (np.arange(part.start, part.stop) // side for part in box)
    return cells[np.ix_(rows, columns)]


def _fill_centers(
    fill: Fill,
    colors: np.ndarray,
    known: np.ndarray,
    hole: np.ndarray,
    exclude: np.ndarray,
    depth: np.ndarray,
    is_large: np.ndarray,
    progress: Progress,
) -> None:
    """Fill, in place, the centers of large holes from the image at a lower resolution.

    Args:
      fill: See `fill_in_blocks`, like the next four.
      colors: See there.
      known: See there.
      hole: See there.
      exclude: See there.
      depth: The fill depth, 0 everywhere; set where centers are filled.
      is_large: Bool, True for cells of holes that are too large for a block.
      progress: Called with the fraction of the whole hole that is filled.
    """
    ratio = max(hole.size / BLOCK_PIXELS, np.count_nonzero(hole) / _MAX_CENTER)
    factor = math.ceil(math.sqrt(ratio) + 0.05)
    strips = [
        slice(top, min(top + factor * _CELL, len(hole)))
        for top in range(0, len(hole), factor * _CELL)
    ]
    small = [_shrink(colors[s], known[s], factor) for s in strips]
    small_colors = np.concatenate([part for part, _ in small])
    small_known = np.concatenate([part for _, part in small])
    small_hole, small_exclude = (
        np.concatenate([_any(mask[s], factor) for s in strips])
        for mask in (hole, exclude)
    )
    small_hole &= ~small_known
    distance = cv2.distanceTransform(
        (~small_known).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    )
    small_center = distance > _RIM / factor
    if not small_center.any():
        return
    columns = slice(0, hole.shape[1])
    for strip in strips:  # The depth marks the centers, until it is known.
        center = _enlarge(small_center, (strip, columns), factor)
        center &= _enlarge(is_large, (strip, columns), _CELL)
        depth[strip] = center & hole[strip] & ~known[strip]
    count, total = np.count_nonzero(depth), np.count_nonzero(hole)
    task = share(progress, 0, count, total=total)
    small_depth = fill(small_colors, small_known, small_hole, small_exclude, task)
    small_depth += math.ceil(math.log2(factor))
    for strip in strips:
        rows, columns = where = np.nonzero(depth[strip])
        place = (rows + strip.start) // factor, columns // factor
        colors[strip][where] = small_colors[place]
        depth[strip][where] = small_depth[place]
        known[strip][where] = True


def _shrink(
    colors: np.ndarray, known: np.ndarray, factor: int
) -> tuple[np.ndarray, np.ndarray]:
    """Average the known colors of squares; return the averages and where they are."""
    weights = known.astype(np.float32)[..., None]
    sums = _sum(np.where(known[..., None], colors, 0).astype(np.float32), factor)
    counts = _sum(weights, factor)
    means = sums / np.maximum(counts, 1)
    if np.issubdtype(colors.dtype, np.integer):
        means = np.rint(means)
    return means.astype(colors.dtype), counts[..., 0] > 0


def _sum(values: np.ndarray, factor: int) -> np.ndarray:
    rows, columns = (range(0, n, factor) for n in values.shape[:2])
    return np.add.reduceat(np.add.reduceat(values, rows, axis=0), columns, axis=1)


def _any(mask: np.ndarray, factor: int) -> np.ndarray:
    rows, columns = (range(0, n, factor) for n in mask.shape)
    rows_any = np.logical_or.reduceat(mask, rows, axis=0)
    return np.logical_or.reduceat(rows_any, columns, axis=1)
