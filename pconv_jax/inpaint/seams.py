"""Joining of pieces of an image by their gradients, so that no seam shows.

The filled hole gets the differences between neighbors that its pieces have, and the
colors of the image at its rim: so a piece from the shade becomes as bright as the sun
around it (Pérez et al., "Poisson Image Editing", 2003). Where two pieces differ much
in color, the seam is an edge, such as that of a roof before the sky, and remains one.
"""

import numpy as np
from scipy import sparse
from scipy.sparse import linalg

from pconv_jax.inpaint.scales import NEIGHBORS, Scale

_EDGE = 24.0  # A jump in color across a seam by which its weight is halved.
_ANCHOR = 1e-3  # Weight of a piece's own colors, beside that of its gradients.


def copy_pieces(scale: Scale, shifts: np.ndarray) -> np.ndarray:
    """Copy the pixels that a shift-map points to.

    Args:
      scale: The image.
      shifts: Rows and columns from a pixel to the one it copies, int ``[H, W, 2]``.

    Returns:
      The filled image, float32 ``[H, W, C]``. Where an offset points to no source, the
      guide stays.
    """
    result = scale.image.copy()
    copied = np.argwhere(scale.hole) + shifts[scale.hole]
    result[scale.hole] = np.where(
        scale.is_source(copied)[:, None],
        scale.image[scale.clip(copied)],
        scale.image[scale.hole],
    )
    return result


def join_pieces(scale: Scale, shifts: np.ndarray) -> np.ndarray:
    """Copy the pixels that a shift-map points to, and join the pieces.

    Args:
      scale: The image.
      shifts: See `copy_pieces`.

    Returns:
      The filled image, float32 ``[H, W, C]``.
    """
    image, hole, _ = scale
    copied = copy_pieces(scale, shifts)
    places = np.argwhere(hole)
    count = len(places)
    number = np.full(hole.shape, -1)
    number[hole] = np.arange(count)
    # The normal equations of a least squares problem, with a row for each pixel.
    diagonal = np.full(count, _ANCHOR)
    right = _ANCHOR * copied[hole]
    entries = []
    for side in NEIGHBORS:
        others = scale.clip(places + side)
        own, other = copied[hole], copied[others]
        difference = _difference(scale, shifts, places, side)
        jump = np.sqrt(np.square(own - other - difference).mean(1))
        weight = 1 / (1 + (jump / _EDGE) ** 2)
        weight = np.where(scale.contains(places + side), weight, 0)
        right += weight[:, None] * difference
        diagonal += weight
        at_rim = number[others] < 0
        right += np.where(at_rim, weight, 0)[:, None] * other
        entries.append(
            (np.flatnonzero(~at_rim), number[others][~at_rim], -weight[~at_rim])
        )
    entries.append((np.arange(count), np.arange(count), diagonal))
    at, beside, values = (np.concatenate(x) for x in zip(*entries))
    matrix = sparse.csc_array((values, (at, beside)), shape=(count, count))
    result = copied.copy()
    result[hole] = linalg.splu(matrix).solve(right.astype(np.float64))
    return result


def _difference(
    scale: Scale, shifts: np.ndarray, places: np.ndarray, side: tuple[int, int]
) -> np.ndarray:
    """Compute how a pixel differs from its neighbor, by the pieces of both.

    Args:
      scale: The image.
      shifts: See `copy_pieces`.
      places: Rows and columns of the pixels of the hole, ``[N, 2]``.
      side: From a pixel to its neighbor.

    Returns:
      The mean of the differences within the two pieces, ``[N, C]``. A piece that has no
      such neighbor, or is the rim's, does not count.
    """
    total = np.zeros((len(places), scale.image.shape[2]), np.float32)
    weight = np.zeros(len(places), np.float32)
    neighbors = scale.clip(places + side)
    for shift, usable in (
        (shifts[scale.hole], np.ones(len(places), bool)),
        (shifts[neighbors], scale.hole[neighbors]),
    ):
        first, second = places + shift, places + shift + side
        usable = usable & scale.is_source(first) & scale.is_source(second)
        difference = scale.image[scale.clip(first)] - scale.image[scale.clip(second)]
        total += np.where(usable[:, None], difference, 0)
        weight += usable
    return total / np.maximum(weight, 1)[:, None]
