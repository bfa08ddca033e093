"""An image with a hole at one resolution, and what coarse-to-fine filling needs."""

import functools
from typing import NamedTuple

import cv2
import numpy as np

NEIGHBORS = ((0, 1), (0, -1), (1, 0), (-1, 0))
"""Rows and columns from a pixel to its neighbors."""


class Scale(NamedTuple):
    """An image at one resolution.

    Attributes:
      image: Float32 ``[H, W, C]``, with the guide in the hole.
      hole: Bool ``[H, W]``, True where to fill.
      source: Bool ``[H, W]``, True where to copy from.
    """

    image: np.ndarray
    hole: np.ndarray
    source: np.ndarray

    def clip(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index the pixels at rows and columns ``[N, 2]``, or the nearest ones."""
        height, width = self.hole.shape
        rows, columns = places.T
        return np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)

    def contains(self, places: np.ndarray) -> np.ndarray:
        """Compute whether rows and columns ``[N, 2]`` lie in the image."""
        height, width = self.hole.shape
        rows, columns = places.T
        return (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)

    def is_source(self, places: np.ndarray) -> np.ndarray:
        """Compute whether rows and columns ``[N, 2]`` are of pixels to copy from."""
        return self.contains(places) & self.source[self.clip(places)]


def halve(scale: Scale) -> Scale:
    """Halve an image.

    A pixel is in the hole if any of the pixels that it covers is, and a source only if
    all of them are.
    """
    size = tuple(-(-n // 2) for n in scale.hole.shape[::-1])
    shrink = functools.partial(cv2.resize, dsize=size, interpolation=cv2.INTER_AREA)
    return Scale(
        keep_channels(shrink(scale.image)),
        shrink(scale.hole.astype(np.float32)) > 0.01,
        shrink(scale.source.astype(np.float32)) > 0.99,
    )


def depth_in(hole: np.ndarray) -> np.ndarray:
    """Compute the distance of each pixel of a hole from its rim, in pixels."""
    return cv2.distanceTransform(hole.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Smooth an image ``[H, W, C]``; sigma is in pixels."""
    return keep_channels(cv2.GaussianBlur(image, (0, 0), sigma))


def keep_channels(image: np.ndarray) -> np.ndarray:
    """Restore the channel axis that OpenCV drops if there is one channel."""
    return image if image.ndim == 3 else image[..., None]
