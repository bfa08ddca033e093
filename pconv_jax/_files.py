"""Files: to write them complete or not at all, and to find them."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Makes a file appear complete or not at all, and the folders above it.

    Args:
      path: of the file. If there is one already, it stays until the new one is there,
        or if that fails.

    Yields:
      The path to write to, in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, as a name may be as long as names can be; and not by `tempfile`, whose
    # files nobody else may read.
    partial = path.parent / f".{uuid.uuid4().hex}.partial"
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file, complete or not at all, and the folders above it."""
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def iter_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Finds the files of a folder and of all folders below it, linked ones too.

    Hidden files and folders (`.name`) are left out. A folder that links lead to again
    is read once, where it is met first in alphabetical order: else one picture could be
    many, of which some are trained on and others evaluated.

    Args:
      folder: where to look; it may be hidden itself.

    Yields:
      Paths that start with `folder`.
    """
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(_is_visible, folders))  # The order of the walk.
        yield from (Path(place, name) for name in filter(_is_visible, names))


def _is_visible(name):
    return not name.startswith(".")
