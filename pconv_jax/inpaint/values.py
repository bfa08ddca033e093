"""Conversion of image values between bools, 8 and 16-bit integers, and floats."""

import jax.numpy as jnp
import numpy as np

ValueRange = tuple[float, float]


def is_float(array: np.ndarray) -> bool:
    """Return whether an array has floats, including bfloat16."""
    return jnp.issubdtype(array.dtype, jnp.floating)


def white(array: np.ndarray) -> int:
    """Get the value of white: 1 for bools and floats, else the dtype's largest."""
    if array.dtype == bool or is_float(array):
        return 1
    return np.iinfo(array.dtype).max


def to_fraction(array: np.ndarray) -> np.ndarray:
    """Convert values to float32 in [0, 1]; NaN becomes 0.

    Args:
      array: Bools, integers up to 255 (for uint16 up to 65535), or floats. Floats are
        not scaled.
    """
    top = 255
    if array.dtype == np.uint16 or array.dtype == bool or is_float(array):
        top = white(array)
    return np.nan_to_num(array.astype(np.float32)) / top


def to_uint8(array: np.ndarray) -> np.ndarray:
    """Convert bools, uint16 or floats in [0, 1] to uint8; uint8 stays as it is."""
    if array.dtype == np.uint8:
        return array
    fraction = np.clip(array / np.float32(white(array)), 0, 1)
    return np.rint(fraction * 255).astype(np.uint8)


def to_network(array: np.ndarray, value_range: ValueRange | None) -> np.ndarray:
    """Convert values to a network's range [-1, 1], as float32.

    Args:
      array: Bools, uint8, uint16 or floats.
      value_range: Floats that become -1 and 1. None leaves floats as they are.
    """
    values = array.astype(np.float32)
    if not is_float(array):
        values *= 2 / white(array)
        values -= 1
    elif value_range is not None:
        low, high = value_range
        values = (values - low) * (2 / (high - low)) - 1
    return values


def from_network(
    values: np.ndarray, dtype: np.dtype, value_range: ValueRange | None
) -> np.ndarray:
    """Convert a network's values back, the inverse of `to_network`.

    Args:
      values: Float32. Values outside [-1, 1] are clipped.
      dtype: Of the result: bool, uint8, uint16 or a float dtype.
      value_range: Floats for -1 and 1. None leaves floats as they are, and unclipped.
    """
    like = np.empty(0, dtype)
    if is_float(like):
        if value_range is not None:
            low, high = value_range
            values = low + (np.clip(values, -1, 1) + 1) * ((high - low) / 2)
        return values.astype(dtype)
    if like.dtype == bool:
        return values > 0
    return np.rint((np.clip(values, -1, 1) + 1) * (white(like) / 2)).astype(dtype)
