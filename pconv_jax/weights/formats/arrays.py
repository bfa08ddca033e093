"""Weights files as arrays, and arrays as parameter trees."""

import hashlib
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax._files import FileContentError, content_errors
from pconv_jax.weights.formats import torch_file

# What safetensors, zipfile and NumPy raise if a file is damaged, or says that it holds
# what it does not. Not all is documented.
_LIBRARY_ERRORS = (
    *(SafetensorError, zipfile.BadZipFile, zlib.error, struct.error),
    *(tokenize.TokenError, SyntaxError, EOFError, OSError, RuntimeError),
    *(AttributeError, LookupError, MemoryError, TypeError, ValueError),
)

# Limits of time and memory, for files that are made to exceed them.
_MAX_ARRAYS = 20_000
_MAX_RATIO = 16


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read every array of a weights file.

    Args:
      path: A ``.safetensors`` or ``.npz`` file, a PyTorch file (``.pth``, ``.pt``,
        ``.ckpt``, ``.bin`` or ``.pth.tar``, see ``torch_file.read``), or a Keras file
        (``.h5``; h5py must be installed).

    Returns:
      Arrays by name. The names of nested groups are joined by ``/``.

    Raises:
      UserError: If the file is missing, damaged or of another kind, or if its hash is
        not the one in its name, as in ``vgg16-397923af.pth``, or the one that is known
        for its name, as for Keras' VGG files. The message names the file.
    """
    path = _files.as_path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise UserError(f"weights must be a {', '.join(_READERS)} file, got {path}.")
    if not path.is_file():
        raise UserError(f"weights: there is no file {path}.")
    check_hash(path)
    try:
        arrays = read(path)
    except (FileContentError, MemoryError, OSError) as error:
        reason = _files.describe_error(error)[:300]
        raise UserError(f"weights: {path} cannot be read: {reason}.") from error
    for name in arrays:
        if not _is_text(name):
            raise UserError(
                f"weights: {path} has an array whose name is not text: {name!r}."
            )
    return arrays


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a ``.safetensors`` file, complete or not at all, and its parent folders.

    Raises:
      RunError: If the file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    _files.write_bytes(path, save(arrays, dict(metadata)))


def to_tree(
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, Any],
    source: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Arrange arrays in a tree of the expected shapes, as float32.

    Args:
      arrays: Arrays by path, ``'conv1_1/kernel'``.
      shapes: Tree of the expected arrays. Its leaves have a ``shape``.
      source: Where the arrays came from, for the error message.
      names: Names of arrays in the source, by path, for the error message. By default
        the paths.
      strict: Whether arrays that are not in ``shapes`` are an error. By default they
        are left out.

    Raises:
      UserError: If arrays are missing, of another shape, not finite or, where strict,
        unexpected. The message lists all of them.
    """
    flat, problems = {}, []
    names = names or {}
    expected = flatten(shapes)
    for path, wanted in expected.items():
        array, name = arrays.get(path), names.get(path, path)
        if array is None:
            problems.append(f"{name} is missing")
        elif array.shape != wanted.shape:
            problems.append(f"{name} is {array.shape}, not {wanted.shape}")
        elif not is_real(array):
            problems.append(f"{name} has type {array.dtype}, not one of real numbers")
        elif not np.isfinite(array := _as_float32(array)).all():
            problems.append(f"{name} is not finite")
        else:
            flat[path] = array
    if strict:
        extra = [names.get(path, path) for path in arrays if path not in expected]
        problems += [f"{name} is not known" for name in extra]
    if problems:
        raise UserError(f"weights: {source} does not fit: {'; '.join(problems)}.")
    return traverse_util.unflatten_dict(flat, sep="/")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a tree to its leaves by path, ``{'conv1_1/kernel': leaf}``."""
    return cast(dict[str, Any], traverse_util.flatten_dict(dict(tree), sep="/"))


def is_real(array: np.ndarray) -> bool:
    """Return whether an array has bools, integers or floats, including bfloat16."""
    return np.can_cast(array.dtype, np.float64, "same_kind")


def from_torch(array: np.ndarray) -> np.ndarray:
    """Reorder the axes of PyTorch weights as in Flax: ``[H, W, in, out]``."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Compute the SHA-256 of arrays and their names, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def check_hash(path: Path, *, written_to: Path | None = None) -> None:
    """Compare a file with the hash in its name, a custom of torchvision and mmagic.

    Args:
      path: Path of the file.
      written_to: Where the file is now, if it does not have that name yet. By default
        ``path``.

    Raises:
      UserError: If the file has another hash.
    """
    kind, expected = "MD5", _KERAS_MD5.get(path.name)
    if match := re.search(r"-([0-9a-f]{8})\.pth$", path.name):
        kind, expected = "SHA-256", match[1]
    if not expected:
        return
    try:
        with open(written_to or path, "rb") as file:
            digest = hashlib.file_digest(file, kind.replace("-", "").lower())
            actual = digest.hexdigest()
    except OSError as error:
        reason = _files.describe_error(error)
        raise UserError(f"weights: {path} cannot be read: {reason}.") from error
    if not actual.startswith(expected):
        raise UserError(
            f"weights: {path} is not the file of that name, or is damaged: its "
            f"{kind} begins with {actual[:8]}, not with {expected[:8]}."
        )


def _as_float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # Such values become infinite, and are reported.
        return array.astype(np.float32, order="C")


def _is_text(name: str) -> bool:
    """Return whether a name has no bytes that are not UTF-8."""
    return name == name.encode("utf-8", "ignore").decode()


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with content_errors(*_LIBRARY_ERRORS):
        return load_file(path)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with content_errors(*_LIBRARY_ERRORS), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    total = sum(member.file_size for member in members)
    # Weights are noise, and compress little.
    if len(members) > _MAX_ARRAYS or total > _MAX_RATIO * path.stat().st_size + 2**20:
        raise FileContentError(
            f"its {len(members)} arrays of {total} bytes in all are too many for a "
            "file of its size"
        )
    # NumPy leaves a damaged file open that it has opened itself.
    with open(path, "rb") as file, content_errors(*_LIBRARY_ERRORS):
        with np.load(file, allow_pickle=False) as members:
            arrays = dict(members)
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise FileContentError(f"{name} is not an array")
    return arrays


def _read_h5(path: Path) -> dict[str, np.ndarray]:
    try:
        # Only Keras' files need h5py.
        from pconv_jax.weights.formats import keras_file
    except ModuleNotFoundError as error:
        if error.name != "h5py":
            raise
        raise FileContentError("Keras' files need h5py: pip install h5py") from None
    return keras_file.read(path)


_READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    **dict.fromkeys((".pth", ".pt", ".ckpt", ".bin", ".tar"), torch_file.read),
    ".h5": _read_h5,
}

# As in keras.applications.
_KERAS_MD5 = {
    "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5": (
        "6d6bbae143d832006294945121d1f1fc"
    ),
    "vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5": (
        "253f8cb515780f3b799900260a226db6"
    ),
}
