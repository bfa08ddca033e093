"""Decoding of image files to 8-bit arrays, for training and evaluation."""

import io
import math
import struct
import threading
import tokenize
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from pconv_jax._errors import UserError
from pconv_jax._files import MAX_PIXELS, FileContentError, content_errors
from pconv_jax.data import tags as tags_lib

# Guards a global variable of Pillow; see `open_without_limit`.
_PILLOW_LIMIT = threading.Lock()

_FORMATS = ("WEBP", "BMP", "JPEG2000", "AVIF", "PPM")

# What Pillow, OpenCV, tifffile, zlib and NumPy raise for a file that is damaged or not
# an image, and for an image that a format cannot hold: WebP, for example, has at most
# 16,383 pixels a side. Many are not documented, but were found by changing files at
# random (tests/faults.py).
_CODEC_ERRORS = (
    *(cv2.error, struct.error, zlib.error, tokenize.TokenError, EOFError, OSError),
    *(ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError),
    *(SyntaxError, SystemError, TypeError, ValueError),
)


class UnreadableImageError(UserError):
    """An image that cannot be read: it is empty, damaged, or access is denied."""


def codec_errors() -> AbstractContextManager[None]:
    """Turn what a codec raises for the content of a file into ``FileContentError``.

    The body should contain calls of codecs only; see ``_files.content_errors``.
    """
    return content_errors(*_CODEC_ERRORS)


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
      UnreadableImageError: If the bytes are not one complete image, or one of more than
        100,000,000 pixels.
    """
    return _decode(data, name, cv2.IMREAD_COLOR_RGB, MAX_PIXELS)


def decode_gray(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image of any kind to 8-bit gray, upright.

    Args:
      data: Bytes of the file, as for `decode_image`.
      name: Name of the image for the error message.
      max_pixels: Limit of the number of pixels. The default is 100,000,000.

    Returns:
      uint8 ``[H, W]``.

    Raises:
      UnreadableImageError: If the bytes are not one complete image, or one of more
        pixels.
    """
    return _decode(data, name, cv2.IMREAD_GRAYSCALE, max_pixels)


def _decode(data: bytes, name: str, mode: int, max_pixels: int) -> np.ndarray:
    image = None
    # libpng prints to stderr if a file ends early, and OpenCV makes room for whatever
    # size a chunk says it has.
    truncated = data.startswith(b"\x89PNG") and not is_whole_png(data)
    width, height = (0, 0) if truncated else _read_size(data)
    if width * height > max_pixels:
        raise UnreadableImageError(
            f"cannot read {name}: it has {width} x {height} pixels, and the limit is "
            f"{max_pixels:,}."
        )
    if width * height > 0:
        if tags_lib.is_tiff(data):  # Other tags could be too much for libtiff.
            data = tags_lib.keep_layout(data, orientation=True)
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
        except cv2.error:  # Such as more pixels than OpenCV allows.
            pass
    if image is None:
        reason = "truncated or not an image" if data else "it is empty"
        raise UnreadableImageError(f"cannot read {name}: {reason}.")
    return image


def is_whole_png(data: bytes) -> bool:
    """Return whether a PNG file has all of its chunks, up to the last one."""
    at = 8
    while at + 12 <= len(data):
        kind = data[at + 4 : at + 8]
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        if kind == b"IEND":
            return at <= len(data)
    return False


def _read_size(data: bytes) -> tuple[int, int]:
    """Read the width and height of an image without decoding it; 0 for no image."""
    if data.startswith(b"\x89PNG"):
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data.startswith(b"\xff\xd8"):
        return _read_jpeg_size(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    if tags_lib.is_tiff(data):
        return _read_tiff_size(data)
    try:
        with open_without_limit(io.BytesIO(data), _FORMATS) as image:
            return image.size
    except FileContentError:
        return 0, 0


def open_without_limit(stream: io.BytesIO, formats: Sequence[str]) -> Image.Image:
    """Open an image of any size with Pillow, without decoding it.

    Pillow's own limit is a global variable, so all that change it do so here. The
    caller checks the size.

    Args:
      stream: The file.
      formats: Pillow's names of the formats to try. Those that this Pillow lacks, such
        as AVIF before version 11.3, are left out.

    Raises:
      FileContentError: If it is not an image, or damaged; or if the EXIF data of an
        AVIF file, of which Pillow reads all tags when it opens the file, take more
        memory than the file.
    """
    data = stream.getvalue()
    if data[4:8] == b"ftyp":
        tags_lib.check_exif_inside(data)
    Image.init()
    known = [name for name in formats if name in Image.OPEN]
    with _PILLOW_LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with codec_errors():
                return Image.open(stream, formats=known)
        except FileContentError as error:
            if isinstance(error.__cause__, UnidentifiedImageError):
                raise FileContentError("it is not an image") from error
            raise
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _read_tiff_size(data: bytes) -> tuple[int, int]:
    """Read the size of a TIFF file's image, or of its tiles if they are larger."""
    try:
        return max(tags_lib.sizes(tags_lib.read(data)), key=math.prod)
    except FileContentError:
        return 0, 0


def _read_jpeg_size(data: bytes) -> tuple[int, int]:
    at, frames = 2, {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
    while at + 9 <= len(data):
        if data[at] != 0xFF:  # Other readers skip what is between segments.
            at = data.find(b"\xff", at)
            if at < 0:
                break
        marker = data[at + 1]
        if marker in frames:
            height = int.from_bytes(data[at + 5 : at + 7], "big")
            return int.from_bytes(data[at + 7 : at + 9], "big"), height
        alone = marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        at += (1 if marker == 0xFF else 2) if alone else 2 + size
    return 0, 0
