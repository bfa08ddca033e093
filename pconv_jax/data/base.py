"""What every source of images has in common, and how an image is decoded."""

import abc
from typing import NamedTuple

import cv2
import numpy as np


class UnreadableImageError(ValueError):
    """A picture cannot be read: empty, truncated, not a picture, or no permission."""


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes a picture of any kind to 8-bit RGB, upright.

    Grey, palette and CMYK pictures become RGB, 16 bits become 8, EXIF orientation is
    applied and transparency dropped. Needs OpenCV 4.13: older ones return the readable
    part of a truncated JPEG, or ignore the orientation of a WebP.

    Args:
      data: The file's bytes: JPEG, PNG, WebP, BMP or TIFF.
      name: What to call the picture in an error.

    Returns:
      Uint8 `[H, W, 3]`.

    Raises:
      UnreadableImageError: If the bytes are not one whole picture.
    """
    image = None
    # Asked first because libpng prints to stderr when a file ends early.
    cut = data.startswith(b"\x89PNG") and data.rfind(b"IEND") < 0
    if data and not cut:
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        except cv2.error:  # such as more pixels than OpenCV allows
            pass
    if image is None:
        reason = "truncated or not a picture" if data else "it is empty"
        raise UnreadableImageError(f"cannot read {name}: {reason}")
    return image


class ImageSource(abc.ABC):
    """Random-access collection of pictures, picklable for worker processes.

    `source[i]` is picture i, uint8 `[H, W, 3]` RGB; it raises `UnreadableImageError`,
    which names the picture, if there is no reading it.
    """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of pictures, readable or not."""

    @abc.abstractmethod
    def read(self, index: int) -> bytes:
        """Encoded bytes of a picture."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Name of a picture, for people."""

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            data = self.read(index)
        except OSError as error:
            message = f"cannot read {self.name(index)}: {error.strerror or error}"
            raise UnreadableImageError(message) from error
        return decode_image(data, self.name(index))


class Span(NamedTuple):
    """Part of a file. Nothing stays open, so that it can be pickled and forked."""

    path: str
    offset: int
    size: int


def read_span(span: Span) -> bytes:
    """Reads part of a file."""
    with open(span.path, "rb") as file:
        file.seek(span.offset)
        return file.read(span.size)
