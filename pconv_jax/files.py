"""Files that appear complete or not at all."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
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


def write(path: Path, data: bytes) -> None:
    """Writes a file, complete or not at all, and the folders above it."""
    with replacing(path) as partial:
        partial.write_bytes(data)
