"""From an encoded image to an example: crop, resize, flip, mask."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from absl import logging

from pconv_jax._errors import UserError
from pconv_jax._images import central_square
from pconv_jax.data.base import ImageSource
from pconv_jax.data.decode import UnreadableImageError
from pconv_jax.data.mask_folder import MaskFolder

_MAX_UNREADABLE = 0.05  # As a fraction of a source.


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Turns the index of an image into a training record.

    Attributes:
      source: The images.
      image_size: Side of the crops in pixels.
      scale: Range of the side of the crop relative to the short side of the image.
      flip: Whether to mirror half of the crops.
      mask_folder: Masks to draw from; None for records without masks.
    """

    source: ImageSource
    image_size: int
    scale: tuple[float, float]
    flip: bool
    mask_folder: MaskFolder | None

    def __call__(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        """Make the record of an element, with random numbers of its own."""
        seed = rng.integers(2**32, dtype=np.uint32)
        used, image = _readable(self.source, element)
        square = _random_square(image, rng, self.scale)
        image = _resize(square, self.image_size)
        if rng.random() < 0.5 and self.flip:
            image = image[:, ::-1]
        record = {
            "image": image,
            "seed": seed,
            # These three are for TrainBatches, which removes them.
            "wanted": element,
            "used": used,
            "enlarged": len(square) < self.image_size,
        }
        if self.mask_folder is not None:
            record["mask"] = self.mask_folder.sample(rng, self.image_size)
        return record


def _readable(source: ImageSource, wanted: int) -> tuple[int, np.ndarray]:
    """Read an image or, if it is unreadable, the next readable one, and its index."""
    for index in candidates(source, wanted):
        with contextlib.suppress(UnreadableImageError):
            return index, source[index]
    raise AssertionError  # `candidates` raises first.


def candidates(source: ImageSource, wanted: int) -> Iterator[int]:
    """Yield the index of an image, and those that take its place if it is unreadable.

    Raises:
      UserError: If there are no more, since too many are unreadable.
    """
    last = wanted + max_unreadable(source)
    indices = [index % len(source) for index in range(wanted, last + 1)]
    yield from indices
    raise too_many_unreadable(source, [source.name(index) for index in indices])


def eval_example(
    source: ImageSource, image_size: int, num_examples: int, number: int
) -> dict[str, Any]:
    """Make the evaluation example of a number; see `pipeline.eval_batches`."""
    turn, wanted = divmod(number, len(source))
    index, image = _readable(source, wanted)
    if index != wanted:
        names = source.name(wanted), source.name(index)
        logging.warning("%s cannot be read, and %s takes its place", *names)
    if turn:
        rng = np.random.default_rng((turn, index))
        image = _random_square(image, rng, (0.5, 1.0))
    else:
        image = central_square(image)
    return {
        "image": _resize(image, image_size),
        "index": np.int32(number),
        "weight": np.float32(number < num_examples),
    }


def _random_square(
    image: np.ndarray, rng: np.random.Generator, scale: tuple[float, float]
) -> np.ndarray:
    height, width = image.shape[:2]
    side = max(1, round(rng.uniform(*scale) * min(height, width)))
    top, left = rng.integers((height - side + 1, width - side + 1))
    return image[top : top + side, left : left + side]


def _resize(square: np.ndarray, size: int) -> np.ndarray:
    # INTER_AREA averages when it shrinks, which avoids aliasing.
    method = cv2.INTER_AREA if len(square) > size else cv2.INTER_CUBIC
    return cv2.resize(square, (size, size), interpolation=method)


def max_unreadable(source: ImageSource) -> int:
    """Compute how many unreadable images a source may have."""
    return int(_MAX_UNREADABLE * len(source))


def too_many_unreadable(source: ImageSource, names: Sequence[str]) -> UserError:
    """Make the error for a source with too many unreadable images."""
    return UserError(
        f"{len(names)} of {len(source)} images cannot be read, and the limit is "
        f"{_MAX_UNREADABLE:.0%}; remove or repair them: {', '.join(names[:10])}."
    )
