"""Weights files to arrays, and arrays to trees."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file, save

from pconv_jax import _files
from pconv_jax.weights.formats import torch_file


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Reads every array of a weights file.

    Args:
      path: of a ``.safetensors``, ``.npz``, PyTorch's ``.pth``, ``.pt``, ``.ckpt``,
        ``.bin`` or ``.pth.tar`` (see `torch_file.read`), or Keras' ``.h5`` (which takes
        h5py).

    Returns:
      Arrays by name; where a file has folders, joined by ``/``.

    Raises:
      ValueError: if the file, which it names, is missing, damaged or of another kind,
        or is not the one whose hash is in its name, as in ``vgg16-397923af.pth``, or
        is known by its name, as Keras' VGGs are.
    """
    path = Path(path).expanduser()
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"weights must be a {', '.join(_READERS)} file, got {path}.")
    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}.")
    check_hash(path)
    if read is torch_file.read:  # Whose errors say this better.
        return read(path)
    try:
        return read(path)
    except Exception as error:  # Damaged files raise errors of every kind.
        raise ValueError(f"weights: {path} cannot be read: {error}") from error


def to_tree(
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, Any],
    source: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Returns a tree of some shapes, as float32.

    Args:
      arrays: by path, ``'conv1_1/kernel'``.
      shapes: the tree of what is expected, of anything with a ``shape``.
      source: where the arrays came from, for the error.
      names: of arrays, by path, as the source has them, for the error.
      strict: whether arrays that the tree has no place for are an error; else they are
        left out.

    Raises:
      ValueError: naming all that is missing, too much, mis-shaped or not finite.
    """
    flat, problems = {}, []
    names = names or {}
    expected = traverse_util.flatten_dict(shapes, sep="/")
    for path, wanted in expected.items():
        array, name = arrays.get(path), names.get(path, path)
        if array is None:
            problems.append(f"{name} is missing")
        elif array.shape != wanted.shape:
            problems.append(f"{name} is {array.shape}, not {wanted.shape}")
        elif issubclass(array.dtype.type, np.flexible):
            problems.append(f"{name} is of type {array.dtype}, not of numbers")
        elif not np.isfinite(array := _as_float32(array)).all():
            problems.append(f"{name} is not finite")
        else:
            flat[path] = array
    if strict:
        extra = [names.get(path, path) for path in arrays if path not in expected]
        problems += [f"{name} is not known" for name in extra]
    if problems:
        raise ValueError(f"weights: {source} does not fit: {'; '.join(problems)}.")
    return traverse_util.unflatten_dict(flat, sep="/")


def from_torch(array: np.ndarray) -> np.ndarray:
    """Returns weights with their axes in Flax's order: ``[H, W, in, out]``."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a ``.safetensors`` file, complete or not at all, and folders above it."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    _files.write_bytes(path, save(arrays, dict(metadata)))


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns a SHA-256 of arrays and their names, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _as_float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # It is found not to be finite then.
        return array.astype(np.float32, order="C")


def check_hash(path: Path, *, written_to: Path | None = None) -> None:
    """Compares a file with the hash in its name, a custom of torchvision and mmagic.

    Args:
      path: of the file.
      written_to: where it is, if it has yet to be given its name.

    Raises:
      ValueError: if it is another one.
    """
    kind, expected = "md5", _KERAS_MD5.get(path.name)
    if match := re.search(r"-([0-9a-f]{8})\.pth$", path.name):
        kind, expected = "sha256", match[1]
    if not expected:
        return
    with open(written_to or path, "rb") as file:
        actual = hashlib.file_digest(file, kind).hexdigest()
    if not actual.startswith(expected):
        raise ValueError(
            f"weights: {path} is not the file of that name, or is damaged: its "
            f"{kind.upper()} begins with {actual[:8]}, not with {expected[:8]}."
        )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    # NumPy leaves a damaged file open that it has opened itself.
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_h5(path: Path) -> dict[str, np.ndarray]:
    try:
        import h5py
    except ImportError:
        raise ValueError(
            "Keras' files take h5py: pip install 'pconv-jax[keras]'"
        ) from None
    arrays = {}

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "fiub":
            return
        # Keras does not compress: no dataset is larger than what the file has of it.
        if item.external or item.id.get_storage_size() < item.nbytes:
            raise ValueError(f"{name} is not stored in the file")
        arrays[name] = item[()]

    with h5py.File(path, "r") as file:
        file.visititems(visit)  # Which does not follow links to other files.
    return arrays


_READERS = {
    ".safetensors": load_file,
    ".npz": _read_npz,
    **dict.fromkeys((".pth", ".pt", ".ckpt", ".bin", ".tar"), torch_file.read),
    ".h5": _read_h5,
}

# As Keras itself has them, in keras.applications.
_KERAS_MD5 = {
    "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5": (
        "6d6bbae143d832006294945121d1f1fc"
    ),
    "vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5": (
        "253f8cb515780f3b799900260a226db6"
    ),
}
