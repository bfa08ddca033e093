"""Weights of other projects: files to arrays, and arrays to parameter trees."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Reads every array of a weights file.

    Args:
      path: of a ``.safetensors`` or an ``.npz`` file.

    Returns:
      Arrays by name.

    Raises:
      ValueError: if the file, which it names, is missing, damaged or of another kind.
    """
    path = Path(path).expanduser()
    readers = {".safetensors": load_file, ".npz": _load_npz}
    if path.suffix not in readers:
        raise ValueError(f"weights must be a {' or '.join(readers)} file, got {path}.")
    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}.")
    try:
        return readers[path.suffix](path)
    except (SafetensorError, OSError, ValueError, EOFError) as error:
        raise ValueError(f"weights: {path} cannot be read: {error}") from error


def to_tree(
    arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Any], source: str | Path
) -> dict[str, Any]:
    """Returns a parameter tree of some shapes, as float32.

    Args:
      arrays: by path, ``'conv1_1.kernel'``; what the tree has no place for is left out.
      shapes: the tree of what is expected, of anything with a ``shape``.
      source: where the arrays came from, for the error.

    Raises:
      ValueError: naming all that is missing, mis-shaped or not finite.
    """
    flat, problems = {}, []
    for name, expected in traverse_util.flatten_dict(shapes, sep=".").items():
        array = arrays.get(name)
        if array is None:
            problems.append(f"{name} is missing")
        elif array.shape != expected.shape:
            problems.append(f"{name} is {array.shape}, not {expected.shape}")
        elif not np.isfinite(array).all():
            problems.append(f"{name} is not finite")
        else:
            flat[name] = np.ascontiguousarray(array, np.float32)
    if problems:
        raise ValueError(f"weights: {source} does not fit: {'; '.join(problems)}.")
    return traverse_util.unflatten_dict(flat, sep=".")


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
