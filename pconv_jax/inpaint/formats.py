"""The image files that can be read and written.

This module imports nothing heavy, so that a command's help can list them at once.
"""

import os
from pathlib import Path

from pconv_jax._errors import UserError

MAX_PIXELS = 100_000_000
"""Default limit of an image's number of pixels."""

SUFFIXES: tuple[str, ...] = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".webp", ".bmp", ".gif"),
    *(".avif", ".jp2", ".npy"),
)
"""Suffixes of the files that can be read and written."""


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Check that a file's suffix is one of `SUFFIXES`.

    Raises:
      UserError: If it is not.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{path}: images are written only as {', '.join(SUFFIXES)} files."
        )


def find_images(folder: Path) -> list[Path]:
    """Find the image files of a folder, except hidden ones, in alphabetical order.

    Raises:
      UserError: If the folder cannot be read.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read the folder {folder}: {reason}.") from error
    return [
        path
        for path in files
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]
