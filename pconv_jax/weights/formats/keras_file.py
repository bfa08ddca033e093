"""Keras' weights files, ``.h5``: arrays in the groups of an HDF5 file.

A group may hold itself, and a dataset may name other files, overlap others or say that
it is larger than memory. Memory use is at most a small multiple of the file's size.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pconv_jax._files import FileContentError, content_errors

# What h5py raises if a file is damaged. Not all is documented.
_LIBRARY_ERRORS = (
    *(AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError),
)

# Limits of time and memory.
_MAX_LINKS = 20_000
_MAX_DEPTH = 50


def read(path: Path) -> dict[str, np.ndarray]:
    """Read every array of a Keras file.

    Args:
      path: Path of the file.

    Returns:
      Arrays by name. A name joins the groups from the outermost to the innermost by
      ``/``.

    Raises:
      FileContentError: If the file is damaged, or no HDF5 file.
      OSError: If it cannot be read.
    """
    room = path.stat().st_size
    arrays: dict[str, np.ndarray] = {}
    with content_errors(*_LIBRARY_ERRORS):
        file = h5py.File(path, "r")
    try:
        for name, dataset in _find_arrays(file):
            with content_errors(*_LIBRARY_ERRORS):
                size, is_stored = dataset.nbytes, _is_stored(dataset)
            if not is_stored:
                raise FileContentError(
                    f"{name} is compressed, or not stored in the file"
                )
            room -= size
            if room < 0:
                raise FileContentError("its arrays overlap, or are too many")
            with content_errors(*_LIBRARY_ERRORS):
                arrays[name] = dataset[()]
    finally:
        with content_errors(*_LIBRARY_ERRORS):
            file.close()
    return arrays


def _find_arrays(file: h5py.File) -> Iterator[tuple[str, Any]]:
    """Yield the names and the datasets of arrays, in all groups."""
    groups: list[tuple[str, Any, int]] = [("", file, 0)]
    links = 0
    while groups:
        prefix, group, depth = groups.pop()
        with content_errors(*_LIBRARY_ERRORS):
            links += len(group)
        if depth > _MAX_DEPTH or links > _MAX_LINKS:
            raise FileContentError("its groups are nested too deeply, or have no end")
        with content_errors(*_LIBRARY_ERRORS):
            items = [(f"{prefix}{key}", group[key]) for key in sorted(_own_keys(group))]
        for name, item in items:
            if isinstance(item, h5py.Group):
                groups.append((f"{name}/", item, depth + 1))
                continue
            with content_errors(*_LIBRARY_ERRORS):
                is_array = _is_array(item)
            if is_array:
                yield name, item


def _own_keys(group: Any) -> Iterator[str]:
    """Yield the keys of a group that are no links to other files or names."""
    for key in group:
        if isinstance(group.get(key, getlink=True), h5py.HardLink):
            yield key


def _is_array(item: Any) -> bool:
    """Return whether an item has numbers, and not none at all."""
    return (
        hasattr(item, "dtype") and item.dtype.kind in "fiub" and item.shape is not None
    )


def _is_stored(dataset: Any) -> bool:
    """Return whether a dataset takes its part of the file: Keras does not compress."""
    inside = not dataset.external and not dataset.is_virtual
    return inside and dataset.id.get_storage_size() >= dataset.nbytes
