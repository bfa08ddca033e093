"""Confidence intervals by the bootstrap, with examples of one image kept together."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval, ``[low, high]``."""

    mean: float
    low: float
    high: float


def cluster_bootstrap(
    values: np.ndarray,
    images: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> Interval:
    """Compute a mean and its 95 % interval, by the percentile bootstrap.

    Images are resampled, not examples: examples of one image are not independent. If
    there are several training runs, these are resampled too.

    Args:
      values: Values of the examples, ``[N]``, or ``[R, N]`` for R training runs. NaN is
        a missing value.
      images: The image that each example shows, ``[N]``.
      seed: Seed of the resampling. The default is 0.
      resamples: Number of resamples. The default is 1000.

    Returns:
      The interval; all NaN if there is no value.
    """
    values = np.atleast_2d(values)
    known = np.isfinite(values)
    if not known.any():
        return Interval(math.nan, math.nan, math.nan)
    numbers, place = np.unique(images, return_inverse=True)
    sums, counts = (
        np.stack([np.bincount(place, row, len(numbers)) for row in rows])
        for rows in (np.where(known, values, 0), known)
    )
    runs, drawn = _draw(len(values), len(numbers), seed, resamples)
    # Each resample weights a run and an image by how often it was drawn.
    total, count = ((runs @ x * drawn).sum(axis=1) for x in (sums, counts))
    usable = count > 0
    low, high = np.percentile(total[usable] / count[usable], [2.5, 97.5])
    return Interval(float(values[known].mean()), float(low), float(high))


@functools.lru_cache(maxsize=32)
def _draw(
    runs: int, images: int, seed: int, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw how often each resample has each run and each image."""
    rng = np.random.default_rng(seed)
    draws = [
        rng.multinomial(n, np.full(n, 1 / n), resamples).astype(float)
        for n in (runs, images)
    ]
    return draws[0], draws[1]
