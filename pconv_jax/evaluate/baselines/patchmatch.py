"""Image completion by patches from elsewhere in the picture.

Wexler et al. 2007 ("Space-Time Completion of Video"): from coarse to fine, each patch
that meets the hole looks for the most similar patch that does not, and each pixel of
the hole becomes the weighted mean of what these patches say, by turns. The search is
PatchMatch (Barnes et al. 2009, section 3): random tries around a good match, and
neighbours that pass theirs on. All pixels are searched at once, so that NumPy does it;
matches are passed on over 8, 4, 2 and 1 pixels instead of in one sweep.
"""

import cv2
import numpy as np

_COARSEST = 24  # Pixels of the shorter side below which there is no coarser scale.
_ROUNDS = 5  # Of search and vote at the finest scale; two more at each coarser one.
_MOST_ROUNDS = 12
_FALLOFF = 1.3  # Of the weight of a patch, a pixel farther into the hole.


def complete(
    image: np.ndarray, hole: np.ndarray, *, patch_size: int = 7, seed: int = 0
) -> np.ndarray:
    """Fills a hole with what patches from elsewhere in the picture agree on.

    Args:
      image: uint8 ``[H, W, C]``. What it has in the hole does not matter.
      hole: bool ``[H, W]``.
      patch_size: side of the patches, odd. Where no patch of this size is free of the
        hole, smaller ones are taken, down to 3.
      seed: of the search.

    Returns:
      uint8 ``[H, W, C]``; valid pixels are those of `image`.

    Raises:
      ValueError: if there is not even a patch of 3 x 3 valid pixels.
    """
    rng = np.random.default_rng(seed)
    scales = [(np.where(hole[..., None], 0, image).astype(np.float32), hole)]
    while min(scales[-1][1].shape) >= 2 * _COARSEST:
        scale = _halve(*scales[-1])
        if not _has_patch(scale[1], 3):
            break
        scales.append(scale)
    estimate = matches = None
    for level, (known, missing) in reversed(list(enumerate(scales))):
        size = _fitting_size(missing, patch_size)
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
    """For each patch that meets the hole, the best patch found that does not.

    Pixels are numbered in the picture with a margin of half a patch, which repeats it.
    """

    def __init__(self, known, missing, size, rng, coarser):
        radius = size // 2
        self._radius, self._rng = radius, rng
        self._shape = missing.shape
        self._width = missing.shape[1] + 2 * radius
        step = np.arange(-radius, radius + 1)
        self._offsets = (step[:, None] * self._width + step).ravel()
        grown = cv2.dilate(missing.astype(np.uint8), np.ones((size, size)))
        self._targets = self._number(np.argwhere(grown))
        sources = np.argwhere(_free_centres(missing, size))
        self._sources = self._number(sources)
        pixels = (missing.shape[0] + 2 * radius) * self._width
        self._is_source = np.zeros(pixels, bool)
        self._is_source[self._sources] = True
        self._place = np.full(pixels, -1)  # Of a pixel among the targets.
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

    def matches(self):
        """Returns rows and columns of the matches ``[H, W, 2]``, -1 where none."""
        field = np.full((*self._shape, 2), -1)
        rows, columns = self._rows_and_columns(self._targets)
        field[rows, columns] = np.stack(self._rows_and_columns(self._match), axis=-1)
        return field

    def search(self, estimate):
        """Improves the matches of the patches of an estimate."""
        wanted = self._gather(estimate, self._targets).astype(np.float32)
        self._distance = self._distances(wanted, self._match)
        extent = max(self._shape)
        for stride in (8, 4, 2, 1):
            for shift in (stride, -stride, stride * self._width, -stride * self._width):
                neighbour = np.clip(self._targets - shift, 0, len(self._place) - 1)
                place = self._place[neighbour]
                self._try(wanted, np.where(place >= 0, self._match[place] + shift, -1))
            reach = max(1, extent * stride // 32)
            rows, columns = self._rng.integers(-reach, reach + 1, (2, len(wanted)))
            self._try(wanted, self._match + rows * self._width + columns)
        self._try(wanted, self._rng.choice(self._sources, len(wanted)))

    def vote(self, estimate):
        """Returns the estimate with the hole as the matches have it."""
        spread = np.percentile(self._distance, 75) + 1
        weight = self._weight * np.exp(-self._distance / (2 * spread))
        padded = self._pad(estimate).reshape(len(self._place), -1)
        total = np.full((len(padded), 1), 1e-12, np.float32)
        votes = padded * total
        channels = padded.shape[-1]
        for i, offset in enumerate(self._offsets):
            pixel = self._targets + offset
            hit = self._missing[pixel]
            # A pixel is met once for each offset: plain indexing adds up.
            said = self._patches[self._match[hit], i * channels : (i + 1) * channels]
            votes[pixel[hit]] += weight[hit, None] * said
            total[pixel[hit]] += weight[hit, None]
        voted = np.where(self._missing[:, None], votes / total, padded)
        r, (height, width) = self._radius, self._shape
        voted = voted.reshape(height + 2 * r, self._width, channels)
        return voted[r : r + height, r : r + width]

    def _start_from(self, coarser):
        rows, columns = self._rows_and_columns(self._targets)
        limits = np.array(coarser.shape[:2]) - 1
        above = coarser[tuple(np.minimum([rows // 2, columns // 2], limits[:, None]))]
        found = (above >= 0).all(-1)
        match = 2 * above + np.stack([rows % 2, columns % 2], axis=-1)
        match = np.clip(match, 0, np.array(self._shape) - 1)
        number = self._number(match)
        found &= self._is_source[number]
        self._match = np.where(found, number, self._match)

    def _try(self, wanted, match):
        match = np.where((match >= 0) & (match < len(self._is_source)), match, 0)
        new = np.flatnonzero(self._is_source[match] & (match != self._match))
        match = match[new]
        distance = self._distances(wanted[new], match)
        better = distance < self._distance[new]
        new, match, distance = new[better], match[better], distance[better]
        self._match[new], self._distance[new] = match, distance

    def _distances(self, wanted, match):
        difference = wanted - self._patches[match]
        return np.einsum("ij,ij->i", difference, difference)

    def _gather(self, image, centres):
        padded = np.rint(self._pad(image)).astype(np.uint8)
        padded = padded.reshape(-1, image.shape[-1])
        patches = padded[centres[:, None] + self._offsets]
        return patches.reshape(len(centres), -1)

    def _pad(self, image):
        return cv2.copyMakeBorder(image, *[self._radius] * 4, cv2.BORDER_REPLICATE)

    def _number(self, places):
        rows, columns = np.asarray(places).T + self._radius
        return rows * self._width + columns

    def _rows_and_columns(self, numbers):
        rows, columns = np.divmod(numbers, self._width)
        return rows - self._radius, columns - self._radius


def _halve(image, hole):
    """Returns picture and hole at half the size, of valid pixels alone."""
    height, width = hole.shape
    size = ((width + 1) // 2, (height + 1) // 2)
    valid = np.where(hole, np.float32(0), np.float32(1))
    part = cv2.resize(valid, size, interpolation=cv2.INTER_AREA)
    total = cv2.resize(image * valid[..., None], size, interpolation=cv2.INTER_AREA)
    smaller = part < 0.5
    mean = total / np.maximum(part, 0.5)[..., None]
    return np.where(smaller[..., None], np.float32(0), mean), smaller


def _free_centres(hole, size):
    """Returns where the centres of patches are that have neither hole nor margin."""
    free = cv2.erode(
        (~hole).astype(np.uint8),
        np.ones((size, size)),
        borderType=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    return free > 0


def _has_patch(hole, size):
    return _free_centres(hole, size).any()


def _fitting_size(hole, largest):
    for size in range(largest, 2, -2):
        if _has_patch(hole, size):
            return size
    raise ValueError(
        "mask must leave a patch of 3 x 3 valid pixels to copy from, but there is none."
    )


def _nearest_valid(image, hole):
    """Returns the picture with each pixel of the hole as the valid one next to it."""
    _, labels = cv2.distanceTransformWithLabels(
        hole.astype(np.uint8),
        cv2.DIST_L2,
        cv2.DIST_MASK_5,
        labelType=cv2.DIST_LABEL_PIXEL,
    )
    colours = np.zeros((labels.max() + 1, image.shape[-1]), np.float32)
    colours[labels[~hole]] = image[~hole]
    return colours[labels]
