"""Decoding of image files to 8-bit arrays, for training and evaluation."""

import cv2
import numpy as np

from pconv_jax._errors import UserError


class UnreadableImageError(UserError):
    """An image that cannot be read: empty, truncated, no image, or no permission."""


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode an image of any kind to 8-bit RGB, upright.

    Gray, palette and CMYK images become RGB, 16 bits become 8, the EXIF orientation is
    applied, and transparency is dropped. OpenCV 4.13 is required: older versions return
    the readable part of a truncated JPEG, or ignore the orientation of a WebP.

    Args:
      data: Bytes of the file: JPEG, PNG, WebP, BMP or TIFF.
      name: Name of the image for the error message.

    Returns:
      uint8 ``[H, W, 3]``.

    Raises:
      UnreadableImageError: If the bytes are not one complete image.
    """
    return _decode(data, name, cv2.IMREAD_COLOR_RGB)


def decode_gray(data: bytes, name: str) -> np.ndarray:
    """Decode an image of any kind to 8-bit gray, upright.

    Args:
      data: Bytes of the file, as for `decode_image`.
      name: Name of the image for the error message.

    Returns:
      uint8 ``[H, W]``.

    Raises:
      UnreadableImageError: If the bytes are not one complete image.
    """
    return _decode(data, name, cv2.IMREAD_GRAYSCALE)


def _decode(data: bytes, name: str, mode: int) -> np.ndarray:
    image = None
    # Checked here because libpng prints to stderr if a file ends early.
    truncated = data.startswith(b"\x89PNG") and data.rfind(b"IEND") < 0
    if data and not truncated:
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
        except cv2.error:  # Such as more pixels than OpenCV allows.
            pass
    if image is None:
        reason = "truncated or not an image" if data else "it is empty"
        raise UnreadableImageError(f"cannot read {name}: {reason}.")
    return image
