"""Filling of a wide hole with whole pieces of the same image.

A *shift-map* gives each pixel of a hole the offset to the pixel that it copies. Pixels
that share an offset copy a whole piece of the image, with its structure: rows of
windows, bricks, a horizon. `fill_with_pieces` works in three steps.

1. Images repeat themselves at a few offsets, which matches of patches reveal (He and
   Sun, "Statistics of Patch Offsets for Image Completion", 2012).
2. Each pixel takes one of these offsets, so that pieces fit where they meet, fit the
   rim of the hole, and look roughly like the guide (Pritch et al., "Shift-Map Image
   Editing", 2009, with the seams of Kwatra et al., "Graphcut Textures", 2003). Minimum
   cuts find the offsets, by alpha-expansion (Boykov et al., "Fast Approximate Energy
   Minimization via Graph Cuts", 2001), at a coarse scale and then at finer ones.
3. The pieces are joined by their gradients instead of their colors (Pérez et al.,
   "Poisson Image Editing", 2003).
"""

import math

import cv2
import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from pconv_jax.inpaint.progress import Progress, ignore, share
from pconv_jax.inpaint.scales import NEIGHBORS, Scale, blur, depth_in, halve
from pconv_jax.inpaint.seams import copy_pieces, join_pieces

# Pixels of a hole at the coarsest scale, and at the finest at which offsets are refined
# and pieces joined. With more it takes longer.
_COARSE, _FINE = 3_000, 12_000

_LARGEST = 100_000  # Pixels of the window at the coarsest scale.

_PATCH = 8  # Side in pixels of the patches that are matched.
_COMPONENTS = 24  # Number of principal components that are compared.
_QUERIES = 2_000  # Number of patches, drawn at random, whose match is found.
_PEAK = 5  # Pixels around an offset without another.
_UNUSABLE = np.float32(1e30)  # More than any squared difference of patches.
_BATCH = 50  # Number of patches that are matched at a time.
_LEAST_DISTANCE = 0.12  # Between matches, in extents of the hole.
_OFFSETS = 120  # Largest number of offsets, the most frequent ones.

# Weight of the guide beside that of a seam. It falls by a factor of e over each so many
# pixels of depth in the hole, to the smallest weight.
_GUIDE_WEIGHT, _TRUSTED, _LEAST_WEIGHT = 0.5, 16.0, 0.1
# Standard deviation of the low-pass of the guide: in pixels of the image, and the least
# in pixels of the scale at hand.
_GUIDE_SIGMA, _LEAST_SIGMA = 3.0, 1.0
_COST_SIGMA = 1.5  # Of the low-pass of the costs at the start, in pixels.
_SWEEPS = 2  # Over all offsets in use, at the coarsest scale.
_STEPS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))  # Of an offset, at a finer scale.
_BAND = 2  # Pixels by which a piece may grow at a finer scale.
_REPORT = 10  # Offsets from one report of progress to the next.

# A color cannot differ by more. A cost is a sum of such differences.
_LARGEST_DIFFERENCE = 255 * 3**0.5
_FORBIDDEN = 20_000.0  # More than all other costs of a pixel.
_DECISIONS = 3  # Rounds in which nodes are decided without a cut.
_PARTS = 8  # A minimum cut takes integers: costs in parts.
_LARGEST_CUT = 2e9  # SciPy counts in 32 bits.


def fill_with_pieces(
    scale: Scale, rng: np.random.Generator, *, progress: Progress = ignore
) -> np.ndarray | None:
    """Fill the hole of an image with pieces of the image.

    Args:
      scale: The image, with the guide in its hole.
      rng: Draws the patches that are matched.
      progress: Called with the fraction that is done. By default nothing is reported.

    Returns:
      The filled image, float32 ``[H, W, C]``, or None if there is nothing to copy.
    """
    scales = [scale]
    while (
        np.count_nonzero(scales[-1].hole) > _COARSE or scales[-1].hole.size > _LARGEST
    ):
        scales.append(halve(scales[-1]))
    coarsest = len(scales) - 1
    finest = min(n for n, x in enumerate(scales) if np.count_nonzero(x.hole) <= _FINE)
    offsets = find_offsets(scales[-1], rng)
    if not len(offsets):
        return None
    shifts = _choose(scales[-1], offsets, 2**coarsest, share(progress, 0, 0.4))
    for level in range(coarsest - 1, finest - 1, -1):
        start, end = (1 - 0.6 * 0.5 ** (coarsest - level - n) for n in (1, 0))
        shifts = _double(shifts, scales[level].hole)
        task = share(progress, start, end)
        shifts = _refine(scales[level], shifts, 2**level, task)
    change = join_pieces(scales[finest], shifts) - copy_pieces(scales[finest], shifts)
    for level in range(finest - 1, -1, -1):
        shifts = _double(shifts, scales[level].hole)
        change = cv2.resize(change, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
        height, width = scales[level].hole.shape
        change = change[:height, :width].reshape(scales[level].image.shape)
    progress(1)
    filled = np.clip(copy_pieces(scale, shifts) + change, 0, 255)
    return np.where(scale.hole[..., None], filled, scale.image).astype(np.float32)


def find_offsets(scale: Scale, rng: np.random.Generator) -> np.ndarray:
    """Find the offsets at which the image around a hole repeats itself.

    Args:
      scale: The image.
      rng: Draws the patches that are matched.

    Returns:
      Rows and columns, int ``[K, 2]``; empty if there are too few patches.
    """
    image, hole, source = scale
    if min(hole.shape) < _PATCH:
        return np.zeros((0, 2), int)
    window = (_PATCH, _PATCH)
    patches = np.lib.stride_tricks.sliding_window_view(image, window, (0, 1))
    patches = patches.reshape(*patches.shape[:2], -1)
    usable = np.lib.stride_tricks.sliding_window_view(source, window).all((2, 3))
    places = np.argwhere(usable)
    if not len(places):
        return np.zeros((0, 2), int)
    # At most half of them, so that seeds differ.
    places = rng.permutation(places)[: min(_QUERIES, (len(places) + 1) // 2)]
    some = patches[tuple(places.T)]
    mean = some.mean(0)
    _, components = np.linalg.eigh((some - mean).T @ (some - mean))
    components = components[:, -_COMPONENTS:]
    patches = patches @ components - mean @ components
    extent = max(np.ptp(x) for x in np.nonzero(hole)) + 1
    least = math.ceil(_LEAST_DISTANCE * extent)
    found = _match(patches, usable, places, least)
    # How often each offset was found, in both directions, and a little around it.
    height, width = hole.shape
    counts = np.zeros((2 * height + 1, 2 * width + 1), np.float32)
    for sign in (1, -1):
        np.add.at(counts, tuple((sign * found + (height, width)).T), 1)
    counts = cv2.GaussianBlur(counts, (0, 0), 2**0.5)
    is_peak = (counts == cv2.dilate(counts, np.ones((_PEAK, _PEAK)))) & (counts > 0)
    peaks = np.argwhere(is_peak)
    peaks = peaks[np.argsort(-counts[is_peak], kind="stable")[:_OFFSETS]]
    return peaks - (height, width)


def _match(
    patches: np.ndarray, usable: np.ndarray, places: np.ndarray, least: int
) -> np.ndarray:
    """Find the patches that are most similar to some of them, but not near them.

    Args:
      patches: Float32 ``[H, W, D]``.
      usable: Bool ``[H, W]``, True for patches that may be a match.
      places: Rows and columns of the patches whose match is found, ``[Q, 2]``.
      least: The least number of rows or columns to a match.

    Returns:
      The offsets of the matches, int ``[Q, 2]``. What has no match is left out.
    """
    height, width, size = patches.shape
    flat = patches.reshape(-1, size)
    squares = np.where(usable.ravel(), np.square(flat).sum(1), _UNUSABLE)
    keys = np.column_stack([-2 * flat, squares])
    offsets = [np.zeros((0, 2), int)]
    for start in range(0, len(places), _BATCH):
        some = places[start : start + _BATCH]
        queries = patches[tuple(some.T)]
        queries = np.column_stack([queries, np.ones(len(some), np.float32)])
        # Of patches, squared, less the squares of the queries.
        differences = queries @ keys.T
        for grid, (row, column) in zip(differences.reshape(-1, height, width), some):
            above, left = max(row - least + 1, 0), max(column - least + 1, 0)
            grid[above : row + least, left : column + least] = _UNUSABLE
        best = differences.argmin(1)
        matched = differences[np.arange(len(some)), best] < _UNUSABLE / 2
        matches = np.stack(np.divmod(best, width), axis=1)
        offsets.append((matches - some)[matched])
    return np.concatenate(offsets)


def _choose(
    scale: Scale, offsets: np.ndarray, zoom: int, progress: Progress
) -> np.ndarray:
    """Choose among offsets for each pixel of a hole.

    Args:
      scale: The coarsest scale.
      offsets: Rows and columns, int ``[K, 2]``.
      zoom: The size of the image, in sizes of this scale.
      progress: Called with the fraction that is done.

    Returns:
      The shift-map, int ``[H, W, 2]``.
    """
    costs = _Costs(scale, zoom)
    shifts = np.zeros((*scale.hole.shape, 2), int)
    # To begin with, each pixel takes the offset that costs least around it, without
    # regard to seams.
    least = np.full(scale.hole.shape, np.inf)
    for offset in offsets:
        cost = np.zeros(scale.hole.shape)
        cost[scale.hole] = costs.compute(costs.everywhere, offset)
        cost = cv2.GaussianBlur(cost, (0, 0), _COST_SIGMA)
        shifts[cost < least] = offset
        least = np.minimum(least, cost)
    labeling = _Labeling(costs, shifts)
    for sweep in range(_SWEEPS):
        in_use = labeling.offsets_in_use()
        for number, offset in enumerate(in_use):
            labeling.expand(offset, costs.everywhere)
            if number % _REPORT == 0:
                progress((sweep + (number + 1) / len(in_use)) / _SWEEPS)
    return labeling.shifts()


def _double(shifts: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Double the size of a shift-map, to the size of a hole."""
    height, width = hole.shape
    return 2 * shifts.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]


def _refine(
    scale: Scale, shifts: np.ndarray, zoom: int, progress: Progress
) -> np.ndarray:
    """Move the rims of pieces, and pieces themselves by a pixel, so that they fit.

    Args:
      scale: The image.
      shifts: The shift-map of the next coarser scale, doubled.
      zoom: The size of the image, in sizes of this scale.
      progress: Called with the fraction that is done.

    Returns:
      The shift-map, int ``[H, W, 2]``.
    """
    costs = _Costs(scale, zoom)
    labeling = _Labeling(costs, shifts)
    offsets = labeling.offsets_in_use()
    rows, columns = costs.places.T
    for number, offset in enumerate(offsets):
        piece = np.zeros(scale.hole.shape, np.uint8)
        piece[rows, columns] = (np.abs(labeling.chosen - offset) <= 1).all(1)
        piece = cv2.dilate(piece, np.ones((2 * _BAND + 1, 2 * _BAND + 1)))
        may_take = piece[rows, columns] | labeling.is_forbidden()
        near = np.flatnonzero(may_take)
        for step in _STEPS:
            labeling.expand(offset + step, near)
        if number % _REPORT == 0:
            progress((number + 1) / len(offsets))
    return labeling.shifts()


class _Costs:
    """What the pixels of a hole cost with an offset, without seams.

    A pixel costs the difference between the guide and what it copies, after a low-pass,
    and, at the rim, between the image and what its offset would copy there.

    Attributes:
      scale: The image.
      places: Rows and columns of the N pixels of the hole, ``[N, 2]``.
      everywhere: The numbers of these pixels.
    """

    def __init__(self, scale: Scale, zoom: int):
        self.scale = scale
        self.places = np.argwhere(scale.hole)
        self.everywhere = np.arange(len(self.places))
        depth = depth_in(scale.hole)[scale.hole] * zoom
        trust = np.maximum(np.exp(-depth / _TRUSTED), _LEAST_WEIGHT)
        # A hole has fewer pixels per seam at coarse scales, and so each counts more.
        self._guide_weight = _GUIDE_WEIGHT * zoom * trust
        self._low = blur(scale.image, max(_GUIDE_SIGMA / zoom, _LEAST_SIGMA))

    def compute(self, pixels: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Compute what some pixels, by their numbers, cost with offsets, ``[N]``."""
        scale, own = self.scale, self.places[pixels]
        copied = own + offsets
        cost = self._guide_weight[pixels] * _distance(
            self._low[scale.clip(copied)], self._low[scale.clip(own)]
        )
        for side in NEIGHBORS:
            rim = np.flatnonzero(scale.is_source(own + side))
            beside = copied[rim] + side
            difference = _distance(
                scale.image[scale.clip(beside)],
                scale.image[scale.clip(own[rim] + side)],
            )
            cost[rim] += 2 * np.where(
                scale.is_source(beside), difference, _LARGEST_DIFFERENCE
            )
        return np.where(scale.is_source(copied), cost, _FORBIDDEN)


class _Labeling:
    """The offsets of the pixels of a hole, and their seams.

    Two neighbors with different offsets cost a seam: the differences between what both
    offsets copy, at both pixels.

    Attributes:
      chosen: The offsets of the pixels, int ``[N, 2]``.
    """

    def __init__(self, costs: _Costs, shifts: np.ndarray):
        self._costs, self._scale = costs, costs.scale
        hole, everywhere = self._scale.hole, costs.everywhere
        self.chosen = shifts[hole]
        number = np.full(np.add(hole.shape, 1), -1)  # A row and a column more.
        number[:-1, :-1][hole] = everywhere
        second = [number[tuple((costs.places + step).T)] for step in ((0, 1), (1, 0))]
        first, second = np.tile(everywhere, 2), np.concatenate(second)
        first, second = first[second >= 0], second[second >= 0]
        self._first, self._second = first, second  # The M pairs of neighbors.
        # What each pixel, and what its neighbor's offset, copies.
        self._color = self._copy(everywhere, self.chosen)
        self._first_by_second = self._copy(first, self.chosen[second])
        self._second_by_first = self._copy(second, self.chosen[first])
        self._cost = costs.compute(everywhere, self.chosen)

    def offsets_in_use(self) -> np.ndarray:
        """Return the different offsets, the most frequent first, int ``[K, 2]``."""
        offsets, counts = np.unique(self.chosen, axis=0, return_counts=True)
        return offsets[np.argsort(-counts, kind="stable")]

    def shifts(self) -> np.ndarray:
        """Return the shift-map, int ``[H, W, 2]``."""
        result = np.zeros((*self._scale.hole.shape, 2), int)
        result[self._scale.hole] = self.chosen
        return result

    def is_forbidden(self) -> np.ndarray:
        """Compute which pixels have an offset to no source, bool ``[N]``."""
        return self._cost >= _FORBIDDEN

    def expand(self, offset: np.ndarray, pixels: np.ndarray) -> None:
        """Let the best set of some pixels take an offset.

        Args:
          offset: Its row and column, int ``[2]``.
          pixels: Numbers of the pixels that may take it.
        """
        pixels = pixels[(self.chosen[pixels] != offset).any(1)]
        if not len(pixels):
            return
        number = np.full(len(self.chosen), -1)
        number[pixels] = np.arange(len(pixels))
        pairs = np.flatnonzero((number[self._first] >= 0) | (number[self._second] >= 0))
        first, second = number[self._first[pairs]], number[self._second[pairs]]
        none, only_first, only_second = self._compute_new_seams(pairs, offset)
        cost = self._costs.compute(pixels, offset)
        change = cost - self._cost[pixels]

        def add(numbers: np.ndarray, values: np.ndarray) -> None:
            change[:] += np.bincount(numbers, values, len(pixels))

        fixed_second, fixed_first = second < 0, first < 0
        add(first[fixed_second], (only_first - none)[fixed_second])
        add(second[fixed_first], (only_second - none)[fixed_first])
        # If both take the offset, there is no seam.
        both = ~fixed_first & ~fixed_second
        first, second = first[both], second[both]
        add(first, (only_first - none)[both])
        add(second, -only_first[both])
        # By the triangle inequality, this is negative only by rounding.
        capacity = np.maximum((only_first + only_second - none)[both], 0)
        moved = pixels[_minimize(change, first, second, capacity)]
        self._take(offset, moved, cost[number[moved]])

    def _take(self, offset: np.ndarray, moved: np.ndarray, cost: np.ndarray) -> None:
        self.chosen[moved], self._cost[moved] = offset, cost
        self._color[moved] = self._copy(moved, offset)
        is_moved = np.zeros(len(self.chosen), bool)
        is_moved[moved] = True
        by_second = np.flatnonzero(is_moved[self._second])
        self._first_by_second[by_second] = self._copy(self._first[by_second], offset)
        by_first = np.flatnonzero(is_moved[self._first])
        self._second_by_first[by_first] = self._copy(self._second[by_first], offset)

    def _copy(self, pixels: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        return self._scale.image[self._scale.clip(self._costs.places[pixels] + offsets)]

    def _compute_seams(self, pairs: np.ndarray) -> np.ndarray:
        first, second = self._first[pairs], self._second[pairs]
        seams = _distance(self._color[first], self._first_by_second[pairs])
        return seams + _distance(self._second_by_first[pairs], self._color[second])

    def _compute_new_seams(
        self, pairs: np.ndarray, offset: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compute seams if none, the first, or the second of a pair takes an offset."""
        first, second = self._first[pairs], self._second[pairs]
        new_first, new_second = self._copy(first, offset), self._copy(second, offset)
        only_first = _distance(new_first, self._first_by_second[pairs])
        only_first += _distance(new_second, self._color[second])
        only_second = _distance(self._color[first], new_first)
        only_second += _distance(self._second_by_first[pairs], new_second)
        return self._compute_seams(pairs), only_first, only_second


def _distance(colors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compute the Euclidean distances of colors ``[..., C]``."""
    differences = colors - others
    return np.sqrt(np.einsum("...c,...c->...", differences, differences))


def _minimize(
    change: np.ndarray, first: np.ndarray, second: np.ndarray, capacity: np.ndarray
) -> np.ndarray:
    """Find the cheapest set of nodes.

    Args:
      change: Cost of each node of the set, of any sign, ``[N]``.
      first: For each of the pairs, the number of a node.
      second: The number of another.
      capacity: What a pair costs if the second is in the set, and the first is not.

    Returns:
      Whether each node is in the set, bool ``[N]``.
    """
    chosen, is_open = np.zeros(len(change), bool), np.ones(len(change), bool)
    # Most nodes need no cut: they cost more than their pairs can save, or save more
    # than their pairs can cost. The cost of such a pair then depends on its other node.
    for _ in range(_DECISIONS):
        saved, lost = (np.bincount(x, capacity, len(change)) for x in (first, second))
        stays = is_open & (change >= saved)
        moves = is_open & (change <= -lost) & ~stays
        chosen |= moves
        is_open &= ~stays & ~moves
        paid = np.where(stays[first], capacity, 0)
        spared = np.where(moves[second], capacity, 0)
        change = change + np.bincount(second, paid, len(change))
        change -= np.bincount(first, spared, len(change))
        keep = is_open[first] & is_open[second]
        first, second, capacity = first[keep], second[keep], capacity[keep]
    if is_open.any():
        number = np.cumsum(is_open) - 1
        chosen[is_open] = _minimum_cut(
            change[is_open], number[first], number[second], capacity
        )
    return chosen


def _minimum_cut(
    change: np.ndarray, first: np.ndarray, second: np.ndarray, capacity: np.ndarray
) -> np.ndarray:
    """Find the cheapest set of nodes by a minimum cut; see `_minimize`."""
    count = len(change)
    outside, inside, nodes = count, count + 1, np.arange(count)
    costs = change > 0
    rows = np.concatenate([np.full(costs.sum(), outside), nodes[~costs], first])
    columns = np.concatenate([nodes[costs], np.full((~costs).sum(), inside), second])
    values = np.concatenate([change[costs], -change[~costs], capacity])
    parts = min(_PARTS, _LARGEST_CUT / max(np.abs(change).sum(), 1))
    values = np.rint(parts * np.minimum(values, _LARGEST_CUT / _PARTS)).astype(np.int32)
    graph = sparse.csr_array((values, (rows, columns)), shape=(count + 2, count + 2))
    residual = graph - csgraph.maximum_flow(graph, outside, inside).flow
    residual.data = np.maximum(residual.data, 0)
    residual.eliminate_zeros()
    reached = csgraph.breadth_first_order(residual, outside, return_predecessors=False)
    result = np.ones(count + 2, bool)
    result[reached] = False
    return result[:count]
