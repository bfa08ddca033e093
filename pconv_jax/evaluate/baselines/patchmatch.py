"""Image completion with patches from elsewhere in the image.

The method is that of Wexler et al. 2007 ("Space-Time Completion of Video"), from coarse
to fine scales. It alternates two steps: each patch that overlaps the hole searches for
the most similar patch outside it, and each pixel of the hole becomes the weighted mean
of its values in these patches. The search is PatchMatch (Barnes et al. 2009, section
3): random search around a good match, and propagation of matches between neighbors.
All pixels are searched at once, so that NumPy can vectorize the search; matches are
propagated over 8, 4, 2 and 1 pixels instead of in one sweep.
"""

import cv2
import numpy as np

_PATCH = 7  # Side of the patches, in pixels.
_COARSEST = 24  # Smallest side of the coarsest scale, in pixels.
_ROUNDS = 5  # Search and vote rounds at the finest scale; each coarser one has 2 more.
_MOST_ROUNDS = 12
_FALLOFF = 1.3  # A patch that lies a pixel deeper in the hole has 1 / 1.3 the weight.


def complete(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Fill a hole with patches of 7 x 7 pixels from elsewhere in the image.

    If no patch of this size is free of the hole, smaller ones are used, down to 3.

    Args:
      image: uint8 ``[H, W, C]``. Its pixels in the hole do not matter.
      hole: bool ``[H, W]``.

    Returns:
      uint8 ``[H, W, C]``, with the valid pixels of ``image``.

    Raises:
      ValueError: If there is no patch of 3 x 3 valid pixels.
    """
    rng = np.random.default_rng(0)
    scales = [(np.where(hole[..., None], 0, image).astype(np.float32), hole)]
    while min(scales[-1][1].shape) >= 2 * _COARSEST:
        scale = _halve(*scales[-1])
        if not _has_patch(scale[1], 3):
            break
        scales.append(scale)
    estimate = matches = None
    for level, (known, missing) in reversed(list(enumerate(scales))):
        size = _fitting_size(missing)
        if estimate is None:
            estimate = _nearest_valid(known, missing)
        else:
            enlarged = cv2.resize(estimate, missing.shape[::-1])
            estimate = np.where(missing[..., None], enlarged, known)
        if not missing.any():
            matches = None
            continue
        rounds = min(_ROUNDS + 2 * level, _MOST_ROUNDS)
        field = _Field(known, missing, size, rng, matches)
        for _ in range(rounds):
            field.search(estimate)
            estimate = field.vote(estimate)
        matches = field.matches()
    filled = np.rint(np.clip(estimate, 0, 255)).astype(np.uint8)
    return np.where(hole[..., None], filled, image)


class _Field:
    """The best match found for each patch that overlaps the hole (a target).

    Matches are patches that do not overlap it (sources). Patches are identified by the
    number of their center pixel, in the image with a margin of half a patch, which
    repeats the border.
    """

    def __init__(
        self,
        known: np.ndarray,
        missing: np.ndarray,
        size: int,
        rng: np.random.Generator,
        coarser: np.ndarray | None,
    ):
        """Start from the matches of the coarser scale, or at random if it is None."""
        radius = size // 2
        self._radius, self._rng = radius, rng
        self._shape = missing.shape
        self._width = missing.shape[1] + 2 * radius
        step = np.arange(-radius, radius + 1)
        self._offsets = (step[:, None] * self._width + step).ravel()
        grown = cv2.dilate(missing.astype(np.uint8), np.ones((size, size)))
        self._targets = self._number(np.argwhere(grown))
        sources = np.argwhere(_free_centers(missing, size))
        self._sources = self._number(sources)
        pixels = (missing.shape[0] + 2 * radius) * self._width
        self._is_source = np.zeros(pixels, bool)
        self._is_source[self._sources] = True
        self._place = np.full(pixels, -1)  # Index of a pixel among the targets.
        self._place[self._targets] = np.arange(len(self._targets))
        self._patches = np.zeros((pixels, size * size * known.shape[-1]), np.uint8)
        self._patches[self._sources] = self._gather(known, self._sources)
        self._missing = np.zeros(pixels, bool)
        self._missing[self._number(np.argwhere(missing))] = True
        depth = cv2.distanceTransform(grown, cv2.DIST_L2, cv2.DIST_MASK_5)
        weight = _FALLOFF ** -self._pad(depth).ravel()[self._targets]
        self._weight = weight.astype(np.float32)
        self._match = rng.choice(self._sources, len(self._targets))
        if coarser is not None:
            self._start_from(coarser)

    def matches(self) -> np.ndarray:
        """Get each match's row and column, ``[H, W, 2]``; -1 where there is none."""
        field = np.full((*self._shape, 2), -1)
        rows, columns = self._rows_and_columns(self._targets)
        field[rows, columns] = np.stack(self._rows_and_columns(self._match), axis=-1)
        return field

    def search(self, estimate: np.ndarray) -> None:
        """Improve the matches, given an estimate of the image."""
        wanted = self._gather(estimate, self._targets).astype(np.float32)
        self._distance = self._distances(wanted, self._match)
        extent = max(self._shape)
        for stride in (8, 4, 2, 1):
            for shift in (stride, -stride, stride * self._width, -stride * self._width):
                neighbor = np.clip(self._targets - shift, 0, len(self._place) - 1)
                place = self._place[neighbor]
                self._try(wanted, np.where(place >= 0, self._match[place] + shift, -1))
            reach = max(1, extent * stride // 32)
            rows, columns = self._rng.integers(-reach, reach + 1, (2, len(wanted)))
            self._try(wanted, self._match + rows * self._width + columns)
        self._try(wanted, self._rng.choice(self._sources, len(wanted)))

    def vote(self, estimate: np.ndarray) -> np.ndarray:
        """Replace the hole of an estimate by the weighted mean of the matches."""
        spread = np.percentile(self._distance, 75) + 1
        weight = self._weight * np.exp(-self._distance / (2 * spread))
        padded = self._pad(estimate).reshape(len(self._place), -1)
        total = np.full((len(padded), 1), 1e-12, np.float32)
        votes = padded * total
        channels = padded.shape[-1]
        for i, offset in enumerate(self._offsets):
            pixel = self._targets + offset
            hit = self._missing[pixel]
            # Each pixel occurs at most once per offset, so += with an index is safe.
            vote = self._patches[self._match[hit], i * channels : (i + 1) * channels]
            votes[pixel[hit]] += weight[hit, None] * vote
            total[pixel[hit]] += weight[hit, None]
        voted = np.where(self._missing[:, None], votes / total, padded)
        r, (height, width) = self._radius, self._shape
        voted = voted.reshape(height + 2 * r, self._width, channels)
        return voted[r : r + height, r : r + width]

    def _start_from(self, coarser: np.ndarray) -> None:
        rows, columns = self._rows_and_columns(self._targets)
        limits = np.array(coarser.shape[:2]) - 1
        above = coarser[tuple(np.minimum([rows // 2, columns // 2], limits[:, None]))]
        found = (above >= 0).all(-1)
        match = 2 * above + np.stack([rows % 2, columns % 2], axis=-1)
        match = np.clip(match, 0, np.array(self._shape) - 1)
        number = self._number(match)
        found &= self._is_source[number]
        self._match = np.where(found, number, self._match)

    def _try(self, wanted: np.ndarray, match: np.ndarray) -> None:
        """Take matches that are valid and better than the present ones."""
        match = np.where((match >= 0) & (match < len(self._is_source)), match, 0)
        new = np.flatnonzero(self._is_source[match] & (match != self._match))
        match = match[new]
        distance = self._distances(wanted[new], match)
        better = distance < self._distance[new]
        new, match, distance = new[better], match[better], distance[better]
        self._match[new], self._distance[new] = match, distance

    def _distances(self, wanted: np.ndarray, match: np.ndarray) -> np.ndarray:
        difference = wanted - self._patches[match]
        return np.einsum("ij,ij->i", difference, difference)

    def _gather(self, image: np.ndarray, centers: np.ndarray) -> np.ndarray:
        padded = np.rint(self._pad(image)).astype(np.uint8)
        padded = padded.reshape(-1, image.shape[-1])
        patches = padded[centers[:, None] + self._offsets]
        return patches.reshape(len(centers), -1)

    def _pad(self, image: np.ndarray) -> np.ndarray:
        r = self._radius
        return cv2.copyMakeBorder(image, r, r, r, r, cv2.BORDER_REPLICATE)

    def _number(self, places: np.ndarray) -> np.ndarray:
        rows, columns = np.asarray(places).T + self._radius
        return rows * self._width + columns

    def _rows_and_columns(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = np.divmod(numbers, self._width)
        return rows - self._radius, columns - self._radius


def _halve(image: np.ndarray, hole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Halve the size of image and hole; only valid pixels contribute."""
    height, width = hole.shape
    size = ((width + 1) // 2, (height + 1) // 2)
    valid = np.where(hole, np.float32(0), np.float32(1))
    part = cv2.resize(valid, size, interpolation=cv2.INTER_AREA)
    total = cv2.resize(image * valid[..., None], size, interpolation=cv2.INTER_AREA)
    smaller = part < 0.5
    mean = total / np.maximum(part, 0.5)[..., None]
    return np.where(smaller[..., None], np.float32(0), mean), smaller


def _free_centers(hole: np.ndarray, size: int) -> np.ndarray:
    """Mark the centers of patches that contain neither hole nor margin."""
    free = cv2.erode(
        (~hole).astype(np.uint8),
        np.ones((size, size)),
        borderType=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    return free > 0


def _has_patch(hole: np.ndarray, size: int) -> bool:
    return bool(_free_centers(hole, size).any())


def _fitting_size(hole: np.ndarray) -> int:
    for size in range(_PATCH, 2, -2):
        if _has_patch(hole, size):
            return size
    raise ValueError(
        "mask must leave a patch of 3 x 3 valid pixels to copy from, but there is none."
    )


def _nearest_valid(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Replace each pixel of the hole by the nearest valid one."""
    _, labels = cv2.distanceTransformWithLabels(
        hole.astype(np.uint8),
        cv2.DIST_L2,
        cv2.DIST_MASK_5,
        labelType=cv2.DIST_LABEL_PIXEL,
    )
    labels = labels.astype(np.intp)
    colors = np.zeros((labels.max() + 1, image.shape[-1]), np.float32)
    colors[labels[~hole]] = image[~hole]
    return colors[labels]
