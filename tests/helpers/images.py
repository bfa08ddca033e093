"""Images and image files."""

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
    """A smooth color image, which JPEG changes little."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for key, content in files.items():
            member = tarfile.TarInfo(key)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_folder(folder, files):
    for key, content in files.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder
