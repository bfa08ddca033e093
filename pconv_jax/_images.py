"""Conventions for image values that several modules share."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

ArrayT = TypeVar("ArrayT", np.ndarray, jax.Array)

# Mean and standard deviation of ImageNet's RGB values in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_uint8(images: ArrayT) -> ArrayT:
    """Convert images from [-1, 1] to uint8; values outside the range are clipped.

    Args:
      images: Float array of any shape, of NumPy or JAX, without NaN.

    Returns:
      A uint8 array of the same library and shape.
    """
    if isinstance(images, jax.Array):
        return jnp.rint((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def central_square(image: np.ndarray) -> np.ndarray:
    """Crop the largest central square of an image ``[H, W, ...]``, as a view."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]
