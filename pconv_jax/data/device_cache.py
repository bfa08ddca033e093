"""Images in device memory, and random crops of them inside a program.

On an accelerator, decoding can take longer than the step. Here all images are decoded
once. A batch is then a few numbers: which images, and a random seed for each. As in the
pipeline, they depend on the seed and the number of the record alone.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from pconv_jax.data.base import ImageSource
from pconv_jax.data.decode import UnreadableImageError
from pconv_jax.data.pipeline import read_ahead
from pconv_jax.data.transforms import max_unreadable, too_many_unreadable

_MAX_ASPECT = 1.5  # Panoramas would make the array of all images large.


class DeviceCache(NamedTuple):
    """Images of several sizes in one array.

    Attributes:
      images: uint8 ``[M, H, W, 3]``; smaller images repeat their last row and column.
      sizes: int32 ``[M, 2]``, height and width of each image there.
      turned: bool ``[M]``, whether rows and columns of an image are exchanged. Upright
        images are turned, since squares that hold both kinds would be larger.
    """

    images: jax.Array | np.ndarray
    sizes: jax.Array | np.ndarray
    turned: jax.Array | np.ndarray


def read_cache(source: ImageSource, *, side: int) -> tuple[DeviceCache, list[str]]:
    """Read all images of a source into an array.

    Args:
      source: The images.
      side: Largest shorter side in pixels; larger images are shrunk to it. The longer
        side is cut to 1.5 times the shorter one, at both ends.

    Returns:
      The images, in the memory of this process, and the names of those that could not
      be read and are left out.

    Raises:
      UserError: If more than 5 % of the images cannot be read.
    """

    def read(index: int) -> np.ndarray | None:
        try:
            return _shrink(source[index], side)
        except UnreadableImageError:
            return None

    images, turned, unreadable = [], [], []
    for index, image in enumerate(read_ahead(read, range(len(source)))):
        if image is not None:
            turned.append(image.shape[0] > image.shape[1])
            images.append(image.swapaxes(0, 1) if turned[-1] else image)
            continue
        unreadable.append(source.name(index))
        logging.warning("%s cannot be read and is left out", unreadable[-1])
        if len(unreadable) > max_unreadable(source):
            raise too_many_unreadable(source, unreadable)
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    cache = np.empty((len(images), *sizes.max(0), 3), np.uint8)
    for place, image in zip(cache, images, strict=True):
        rest = np.subtract(place.shape, image.shape)[:2]
        place[:] = np.pad(image, ((0, rest[0]), (0, rest[1]), (0, 0)), "edge")
    return DeviceCache(cache, sizes, np.array(turned)), unreadable


def _shrink(image: np.ndarray, side: int) -> np.ndarray:
    height, width = image.shape[:2]
    longest = int(_MAX_ASPECT * min(height, width))
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    image = image[top : top + longest, left : left + longest]
    factor = side / min(height, width)
    if factor >= 1:
        return image
    rows, columns = (round(factor * n) for n in image.shape[:2])
    return cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA)


def random_crop(
    key: jax.Array,
    cache: DeviceCache,
    index: jax.Array,
    *,
    size: int,
    scale: tuple[float, float],
) -> jax.Array:
    """Crop a random square of an image, resize it, and mirror half of the squares.

    Args:
      key: PRNG key.
      cache: The images.
      index: Index of one of them.
      size: Side S of the result.
      scale: Range of the side of the square over the image's shorter side.

    Returns:
      uint8 ``[S, S, 3]``.
    """
    part, *place, coin = jax.random.uniform(key, (4,), jnp.float32)
    bounds = cache.sizes[index].astype(jnp.float32)
    side = (scale[0] + part * (scale[1] - scale[0])) * bounds.min()
    start = jnp.stack(place) * (bounds - side)
    crop = jax.image.scale_and_translate(
        cache.images[index].astype(jnp.float32),
        (size, size, 3),
        (0, 1),
        jnp.full(2, size / side),
        -start * size / side,
        method="cubic",  # With antialiasing where it shrinks.
    )
    crop = jnp.where(cache.turned[index], crop.swapaxes(0, 1), crop)
    crop = jnp.where(coin < 0.5, crop[:, ::-1], crop)
    return jnp.clip(jnp.round(crop), 0, 255).astype(jnp.uint8)


class IndexBatches(Iterator[dict[str, np.ndarray]]):
    """Endless batches of indices and seeds, reshuffled every epoch.

    Each is a dict with ``'index'``, int32 ``[B]``, and ``'seed'``, uint32 ``[B]``.
    B is ``batch_size // process_count``.

    Args:
      count: Number of images.
      batch_size: Global number of images in a batch, over all processes.
      seed: Seed of all randomness here, in [0, 2**32).
      start_step: Number of batches to skip, to resume. The default is 0.
      process_index: Index of this process in a multi-host run. The default is 0.
      process_count: Number of processes. The default is 1.

    Attributes:
      unreadable: Names of images that could not be read: none, since all were read
        before.
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.unreadable: list[str] = []
        self._count = count
        self._batch_size = batch_size
        self._seed = seed
        self._step = start_step
        self._share = slice(process_index, None, process_count)
        self._order = functools.lru_cache(2)(self._shuffle)

    def __next__(self) -> dict[str, np.ndarray]:
        first = self._step * self._batch_size
        records = range(first, first + self._batch_size)
        places = [divmod(record, self._count) for record in records]
        index = np.array([self._order(epoch)[place] for epoch, place in places])
        rng = np.random.default_rng((self._seed, 1, self._step))
        seed = rng.integers(2**32, size=self._batch_size, dtype=np.uint32)
        self._step += 1
        return {"index": index[self._share].astype(np.int32), "seed": seed[self._share]}

    def close(self) -> None:
        """Do nothing; here for batches that read files, which must be closed."""

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, 0, epoch)).permutation(self._count)
