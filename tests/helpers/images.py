"""Images, and files of them."""

import io
import tarfile

import cv2
import numpy as np
from PIL import Image


def encode(image, file_format="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def photo(height=40, width=60, seed=0):
    """A smooth colour picture, so that JPEG keeps it nearly as it is."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def write_tar(path, pictures, mode="w"):
    with tarfile.open(path, mode) as tar:
        for key, content in pictures.items():
            member = tarfile.TarInfo(key)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
