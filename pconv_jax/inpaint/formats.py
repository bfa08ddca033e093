"""The image files that can be read and written.

This module imports nothing heavy, so that a command's help can list them at once.
"""

import mimetypes
import os
from pathlib import Path

from pconv_jax import _files
from pconv_jax._errors import UserError

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
            f"cannot write {path}: its name must end in {', '.join(SUFFIXES[:-1])} or "
            f"{SUFFIXES[-1]}."
        )


def find_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """Find the image files of a folder, except hidden ones, in alphabetical order.

    Returns:
      The images; and folders, and files that may be images of other kinds.

    Raises:
      UserError: If the folder cannot be read.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        reason = _files.describe_error(error)
        raise UserError(f"cannot read the folder {folder}: {reason}.") from error
    images, others = [], []
    for path in files:
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in SUFFIXES and not path.is_dir():
            images.append(path)
        elif _may_be_image(path):
            others.append(path)
    return images, others


def variant_path(path: Path, number: int) -> Path:
    """Name the file of a variant: a.png, a-2.png, a-3.png, ... from number 0 on."""
    return path.with_stem(f"{path.stem}-{number + 1}") if number else path


def _may_be_image(path: Path) -> bool:
    kind, _ = mimetypes.guess_type(path.name)
    return path.is_dir() or kind is None or kind.startswith(("image/", "video/"))
