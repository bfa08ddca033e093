"""Detail for filled holes: patches of the same image, chosen by a guide.

A network knows what belongs in a hole, but not how this image's grass, grain or brick
looks. The image does. `add_detail` combines the two. From coarse to fine, every patch
that touches the hole searches for the most similar patch outside it (PatchMatch), and
every pixel of the hole becomes the weighted mean of what these patches suggest. Two
images decide which patches are similar:

* the low frequencies of the guide, which do not change;
* the current estimate, with all its detail.

The guide's weight falls with the distance from the rim of the hole. So narrow holes
follow the guide. In the middle of wide holes, where a network only knows a color, the
guide counts little, and the image is continued from coarse to fine.

With ``sharp``, whole pieces of the image fill wide holes instead; see `shift_map`.

Images are float32 ``[H, W, C]`` in [0, 255]; a *hole* is bool ``[H, W]``, True where to
fill.

References: Barnes et al., "PatchMatch", 2009, for the search; Wexler et al.,
"Space-Time Completion of Video", 2007, for the vote at several scales; Yang et al.,
"High-Resolution Image Inpainting using Multi-Scale Neural Patch Synthesis", 2017, for a
network's output as the guide; Damelin and Hoang, "On Surface Completion and Image
Inpainting by Biharmonic Functions", 2018, for the smoothing of the guide.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np

from pconv_jax._errors import UserError
from pconv_jax.inpaint.patch_search import (
    SIDE,
    Grid,
    find_length,
    make_problem,
    search_and_vote,
    vote,
)
from pconv_jax.inpaint.progress import Progress, ignore, share
from pconv_jax.inpaint.scales import Scale, blur, depth_in, halve, keep_channels
from pconv_jax.inpaint.tiling import Box

_ROUNDS = 8  # Searches and votes at each scale.
# With more patches than these, half as many: coarser scales have found most matches.
_MANY_TARGETS = 60_000
# Depth, in pixels of the image, from which on the guide's weight falls by a factor of e
# over each further such depth, in narrow and in wide holes; but at most _RIM pixels of
# the scale at hand.
_TRUSTED = (16.0, 4.0)
_RIM = 6.0
# The guide's weight in the middle of wide holes. With none, grass may fill a sky. With
# more, smooth patches fit best, and texture is lost.
_LEAST_WEIGHT = 0.15
_WIDE = 32.0  # Depth, in pixels of the image, from which on a hole is wide.
_RIM_DECAY = 1.3  # A vote loses this factor for each pixel of depth: rims are surer.
# Standard deviations of low-passes, in pixels. The guide is compared at finer
# frequencies in narrow holes, where it is accurate, than in wide ones, where it lacks
# texture.
_GUIDE_SIGMA = (0.8, 1.5)
_DEPTH_PER_SIGMA = 16  # Depth of a hole, in pixels, for a sigma of 1.
# The parts by which coarse detail moves toward the guide at the end: the larger one up
# to this depth, in pixels. From there on, the part falls by a factor of e over each
# further such depth, to the smaller one: with more of the guide, wide holes look soft.
_BLEND = (0.2, 0.8)
_BLEND_DEPTH = 16.0
# Shares of the window that may be copied: much, and little. With little, patches fit
# badly. Then coarse detail moves by the larger part at every depth, and fine detail by
# at least this one.
_MUCH, _LITTLE = 0.75, 0.5
_FINE_BLEND = 0.4
_MAX_DECAY = 30  # Pixels of depth from which on this factor stays the same.
_MIN_SIDE = 48  # Pixels. Smaller images are not halved.
_MIN_SOURCES = 64  # Patches to copy from. An image with fewer is not halved further.
_MIN_MARGIN = 64  # Pixels around a hole to copy from; at least its extent.
_SMOOTHING_STEPS = 10  # Of a guide. With 6 or 15, thin holes lose 0.05 to 0.1 dB.
# Depth of a hole, in pixels, from which on it is filled with pieces, and the largest
# share of its window that is missing or excluded. With more, pieces fit badly.
_SHARP_DEPTH, _SHARP_SHARE = 12, 0.25
_CELL = 16  # Pixels. Holes closer than this are filled together.


def add_detail(
    image: np.ndarray,
    hole: np.ndarray,
    guide: np.ndarray,
    *,
    seed: int = 0,
    exclude: np.ndarray | None = None,
    sharp: bool = False,
    progress: Progress = ignore,
) -> np.ndarray:
    """Fill a hole with detail of the image, guided by a smoother filling of it.

    The search looks at a window around each hole, so its cost and memory depend on the
    size of the holes, not of the image.

    Args:
      image: ``[H, W, C]`` in [0, 255], uint8 or float. Its values in the hole do not
        matter.
      hole: Bool ``[H, W]``, True where to fill.
      guide: Like ``image``, with the hole filled, such as by a network.
      seed: Seed of the search. In wide holes, different seeds give visibly different
        results.
      exclude: Bool ``[H, W]``, True where not to copy from. By default all pixels
        outside the hole may be copied.
      sharp: Whether to fill wide holes with whole pieces of the image; see
        `shift_map`. They look more real, but are further from the truth on average.
        Where more than a quarter of the surroundings is missing or excluded, pieces fit
        badly, and the search fills the hole. The default is False.
      progress: Called with the fraction that is done. By default nothing is reported.

    Returns:
      The filled image, of the dtype of ``image``. Pixels outside the hole are equal to
      those of ``image``. A hole without a patch to copy nearby is filled by the guide.

    Raises:
      UserError: If shapes differ.
    """
    image, hole, guide = np.asarray(image), np.asarray(hole, bool), np.asarray(guide)
    if image.ndim != 3 or hole.shape != image.shape[:2] or guide.shape != image.shape:
        raise UserError(
            "image and guide must be [H, W, C] and hole [H, W] of one size, got "
            f"{list(image.shape)}, {list(guide.shape)} and {list(hole.shape)}."
        )
    excluded = hole
    if exclude is not None:
        if np.shape(exclude) != hole.shape:
            raise UserError(
                f"exclude must be [H, W] = {list(hole.shape)}, got "
                f"{list(np.shape(exclude))}."
            )
        excluded = hole | np.asarray(exclude, bool)
    result = image.copy()
    done, total = 0, np.count_nonzero(hole)
    for number, (window, part) in enumerate(regions(hole)):
        before, done = done, done + np.count_nonzero(part)
        task = share(progress, before, done, total=total)
        start = np.where(hole[window][..., None], guide[window], image[window]).astype(
            np.float32
        )
        scale = Scale(start, part, ~excluded[window])
        if not _source_centers(scale.source).any():  # The guide is all there is.
            result[window][part] = guide[window][part]
            task(1)
            continue
        rng, filled = np.random.default_rng((seed, number)), None
        if (
            sharp
            and excluded[window].mean() <= _SHARP_SHARE
            and depth_in(part).max() >= _SHARP_DEPTH
        ):
            # SciPy takes 0.2 s to import.
            from pconv_jax.inpaint.shift_map import fill_with_pieces

            filled = fill_with_pieces(scale, rng, progress=task)
        if filled is None:
            filled = _fill_window(scale, rng, task)
        if image.dtype == np.uint8:
            filled = np.clip(np.rint(filled), 0, 255)
        result[window][part] = filled[part].astype(image.dtype)
    return result


def refine_guide(guide: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Smooth a network's output in a hole, above all at the rim.

    In holes of a few pixels, biharmonic inpainting (Damelin and Hoang 2018) is more
    accurate than a network, and in all others less. Ten steps of the method of
    conjugate gradients, from the network's output toward the biharmonic filling, are
    more accurate than both. In narrow holes they almost reach it. In wide ones they
    smooth the rim.

    Args:
      guide: ``[H, W, C]`` in [0, 255], uint8 or float: the image, with the hole filled
        by a network.
      hole: Bool ``[H, W]``, True where a network filled it.

    Returns:
      The new guide, of the dtype of ``guide``.
    """
    hole, result = np.asarray(hole, bool), guide.copy()
    for window, part in regions(hole):
        box = _bounding_box(part, margin=2)  # As far as the biharmonic stencil reaches.
        rows, columns = (
            slice(w.start + b.start, w.start + b.stop) for w, b in zip(window, box)
        )
        place, part = (rows, columns), part[box]
        filled = guide[place].astype(np.float32)
        smooth = np.clip(_toward_biharmonic(filled, part), 0, 255)
        if result.dtype == np.uint8:
            smooth = np.rint(smooth)
        result[place][part] = smooth[part].astype(result.dtype)
    return result


def _bounding_box(hole: np.ndarray, *, margin: int) -> Box:
    """Return the smallest window around a hole with a margin, within the image."""
    left, top, width, height = cv2.boundingRect(hole.astype(np.uint8))
    return (
        slice(max(0, top - margin), top + height + margin),
        slice(max(0, left - margin), left + width + margin),
    )


def _toward_biharmonic(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Take a few steps of conjugate gradients that minimize the squared Laplacian."""

    def apply(x: np.ndarray) -> np.ndarray:
        laplacian = functools.partial(
            cv2.Laplacian, ddepth=-1, borderType=cv2.BORDER_REPLICATE
        )
        return np.where(inside, keep_channels(laplacian(laplacian(x))), 0)

    inside = hole[..., None]
    residual = -apply(image)
    direction, square = residual, np.square(residual).sum((0, 1))
    for _ in range(_SMOOTHING_STEPS):
        change = apply(direction)
        # A channel that is smooth already has a residual of 0.
        step = square / np.maximum((direction * change).sum((0, 1)), 1e-12)
        image = image + step * direction
        residual = residual - step * change
        new_square = np.square(residual).sum((0, 1))
        direction = residual + new_square / np.maximum(square, 1e-12) * direction
        square = new_square
    return image


class _Matches(NamedTuple):
    """For each pixel, the center of its patch's match, or -1: int ``[H, W]`` each."""

    rows: np.ndarray
    columns: np.ndarray


def regions(hole: np.ndarray) -> Iterator[tuple[Box, np.ndarray]]:
    """Divide a hole into parts that are filled one after the other.

    Yields:
      The window of the image that a part is filled from, and the part in the window.
    """
    pads = [(0, -n % _CELL) for n in hole.shape]
    cells = np.pad(hole, pads).reshape(
        -(-hole.shape[0] // _CELL), _CELL, -(-hole.shape[1] // _CELL), _CELL
    )
    occupied = cells.any(axis=(1, 3)).astype(np.uint8)
    number, labels, boxes, _ = cv2.connectedComponentsWithStats(occupied)
    for label in range(1, number):
        left, top, width, height = boxes[label, :4]
        mine = labels[top : top + height, left : left + width] == label
        mine = mine.repeat(_CELL, axis=0).repeat(_CELL, axis=1)
        top, left = top * _CELL, left * _CELL
        part = hole[top:, left:][: len(mine), : mine.shape[1]]
        part = part & mine[: len(part), : part.shape[1]]
        margin = max(_MIN_MARGIN, *part.shape)
        before = min(top, margin), min(left, margin)
        rows, columns = (
            slice(int(start - b), int(start + n + margin))
            for start, b, n in zip((top, left), before, part.shape)
        )
        window = rows, columns
        after = [n - b - m for n, b, m in zip(hole[window].shape, before, part.shape)]
        yield window, np.pad(part, list(zip(before, after)))


def _fill_window(
    scale: Scale, rng: np.random.Generator, progress: Progress
) -> np.ndarray:
    """Fill the hole of a window, from coarse to fine."""
    widest = float(depth_in(scale.hole).max())
    scales = [scale]
    # Halve until the hole is a few pixels wide.
    while widest > 2 ** len(scales) and min(scales[-1].hole.shape) >= _MIN_SIDE:
        smaller = halve(scales[-1])
        if _source_centers(smaller.source).sum() < _MIN_SOURCES:
            break
        scales.append(smaller)
    sigma = float(np.clip(widest / _DEPTH_PER_SIGMA, *_GUIDE_SIGMA))
    length = find_length(scale.hole.shape)  # One program serves all scales.
    estimate = matches = None
    for level, own in reversed(list(enumerate(scales))):
        weight = _guide_weight(own.hole, 2**level)
        estimate, matches = _refine_scale(
            own,
            estimate,
            matches,
            weight,
            sigma,
            rng,
            length,
            # An enlarged estimate lacks fine detail, so smooth patches fit it best. At
            # coarser scales a vote would cost accuracy.
            vote_first=level == 0 and estimate is not None,
            # Each scale has about four times the pixels of the one before.
            progress=share(progress, 0.25 ** (level + 1), 0.25**level),
        )
    assert estimate is not None
    return _blend(estimate, scale, sigma)


def _blend(estimate: np.ndarray, scale: Scale, sigma: float) -> np.ndarray:
    """Move the estimate toward the guide.

    Near the rim the guide is more accurate than the estimate. Further in, the mean of
    both is more accurate than either.
    """
    scarcity = np.clip((_MUCH - scale.source.mean()) / (_MUCH - _LITTLE), 0, 1)
    least, most = _BLEND
    depth = depth_in(scale.hole)[..., None]
    coarse_part = np.exp(1 - depth / _BLEND_DEPTH)
    coarse_part = np.clip(coarse_part, least + scarcity * (most - least), most)
    # In narrow holes, the guide's fine detail is more accurate than that of patches.
    # The rim has a depth of 1.
    fine_part = most * np.exp(1 - depth)
    fine_part = np.maximum(fine_part, scarcity * _FINE_BLEND)
    difference = scale.image - estimate
    coarse = blur(difference, sigma)
    return estimate + coarse_part * coarse + fine_part * (difference - coarse)


def _refine_scale(
    scale: Scale,
    estimate: np.ndarray | None,
    matches: _Matches | None,
    guide_weight: np.ndarray,
    sigma: float,
    rng: np.random.Generator,
    length: int,
    *,
    vote_first: bool,
    progress: Progress = ignore,
) -> tuple[np.ndarray, _Matches]:
    """Search and vote at one scale.

    Args:
      scale: The image at this scale.
      estimate: The filled image of the next coarser scale, or None at the coarsest.
      matches: The matches of that scale.
      guide_weight: Weight of differences from the guide, ``[H, W]``.
      sigma: Standard deviation of the low-pass of the guide, in pixels.
      rng: Source of random numbers.
      length: That of the arrays, P.
      vote_first: Whether the matches of the coarser scale vote before the first search.
      progress: Called with the fraction of this scale that is done.

    Returns:
      The filled image of this scale, and its matches.
    """
    image, hole, source = scale
    low = blur(image, sigma)
    if estimate is None:
        current = low  # The first search goes by the guide alone.
    else:
        size = image.shape[1::-1]
        current = keep_channels(
            cv2.resize(estimate, size, interpolation=cv2.INTER_CUBIC)
        )
    current = np.where(hole[..., None], current, image)
    touching = _target_centers(hole)
    rows, columns = np.nonzero(touching)
    is_center = _source_centers(source)
    grid = Grid(hole.shape[0], hole.shape[1], length)
    depth = np.minimum(depth_in(touching), _MAX_DECAY)
    problem = make_problem(
        grid,
        rows,
        columns,
        in_hole=hole[rows, columns],
        guide_weight=guide_weight[rows, columns],
        rim_weight=_RIM_DECAY ** -depth[rows, columns],
        low=low,
        is_center=is_center,
    )
    first = _first_matches(rows, columns, is_center, matches, rng)
    match, count = grid.fill_up(grid.number(*first)), len(rows)
    rounds = _ROUNDS if count <= _MANY_TARGETS else _ROUNDS // 2
    seed = np.uint32(rng.integers(2**32))
    flat = grid.flatten(current)
    if vote_first:
        weight = np.where(np.arange(length) < count, problem.targets.rim_weight, 0)
        flat = np.asarray(vote(flat, match, weight, problem))
    flat, match = search_and_vote(seed, flat, match, problem, rounds, progress=progress)
    rows_of_match, columns_of_match = grid.place(match[:count])
    found = _Matches(*(np.full(hole.shape, -1, np.int32) for _ in range(2)))
    found.rows[rows, columns] = rows_of_match
    found.columns[rows, columns] = columns_of_match
    return grid.unflatten(flat), found


def _first_matches(
    rows: np.ndarray,
    columns: np.ndarray,
    is_center: np.ndarray,
    coarser: _Matches | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Take the matches of the coarser scale, and random ones where there is none."""
    centers = np.flatnonzero(is_center)
    chosen = rng.choice(centers, len(rows))
    found = chosen // is_center.shape[1], chosen % is_center.shape[1]
    if coarser is None:
        return found
    height, width = is_center.shape
    above = tuple(
        np.minimum(x // 2, n - 1) for x, n in zip((rows, columns), coarser.rows.shape)
    )
    fine_rows = np.clip(2 * coarser.rows[above] + rows % 2, 0, height - 1)
    fine_columns = np.clip(2 * coarser.columns[above] + columns % 2, 0, width - 1)
    usable = (coarser.rows[above] >= 0) & is_center[fine_rows, fine_columns]
    return (
        np.where(usable, fine_rows, found[0]),
        np.where(usable, fine_columns, found[1]),
    )


def _source_centers(source: np.ndarray) -> np.ndarray:
    """Find the centers of the patches that lie in a source completely."""
    square = np.ones((SIDE, SIDE))
    border: dict[str, Any] = dict(borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return cv2.erode(source.astype(np.uint8), square, **border) > 0


def _guide_weight(hole: np.ndarray, zoom: int) -> np.ndarray:
    """Weigh the guide by the depth in a hole, at a scale of ``1 / zoom``."""
    depth = depth_in(hole)
    wide = depth * zoom >= _WIDE
    if wide.any():  # Around these pixels, up to the rim, the hole is wide.
        wide = depth_in(~wide) * zoom < _WIDE
    trusted = np.minimum(np.where(wide, *_TRUSTED[::-1]) / zoom, _RIM)
    weight = np.exp(-np.maximum(depth / trusted - 1, 0))
    return np.maximum(weight, _LEAST_WEIGHT).astype(np.float32)


def _target_centers(hole: np.ndarray) -> np.ndarray:
    """Find the centers of the patches that touch a hole."""
    return cv2.dilate(hole.astype(np.uint8), np.ones((SIDE, SIDE))) > 0
