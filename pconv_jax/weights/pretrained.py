"""Weights files: a trained network in one file.

A weights file is a ``.safetensors`` file with the parameters and the statistics of
batch normalization. Its metadata describes the network, its origin, its training data
and its metrics. The file contains only numbers and text, and no code.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from safetensors import SafetensorError, safe_open

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax.unet import PConvUNet
from pconv_jax.weights import hub
from pconv_jax.weights.formats.arrays import (
    checksum,
    flatten,
    read_arrays,
    to_tree,
    write_arrays,
)
from pconv_jax.weights.network_config import (
    model_config,
    model_from_config,
    variable_shapes,
)

# The weights files in this package, by name.
BUNDLED: Mapping[str, Path] = {
    "photos": Path(__file__).parent / "bundled" / "photos.safetensors"
}

_HUB_FILE = "model.safetensors"
_KEY = "pconv_jax"
# In format 2, kernels may be int8, and have scales.
_FORMATS = (1, 2)
_SCALE = "_scale"

KernelDtype = Literal["float32", "float16", "int8"]


class Pretrained(NamedTuple):
    """A trained network.

    Attributes:
      model: The network. Image networks take and give images ``[N, H, W, C]`` in
        [-1, 1].
      variables: Its ``params`` and ``batch_stats``, as NumPy arrays.
      info: Facts about it, as for JSON: e.g. ``origin``, ``training_data``,
        ``metrics``, ``notes``.
    """

    model: PConvUNet
    variables: dict[str, Any]
    info: dict[str, Any]


def save_pretrained(
    path: str | Path,
    model: PConvUNet,
    variables: Mapping[str, Any],
    *,
    info: Mapping[str, Any] | None = None,
    kernels: KernelDtype = "float32",
) -> None:
    """Write a weights file, complete or not at all.

    Args:
      path: Path of the ``.safetensors`` file.
      model: The network.
      variables: Its ``params`` and ``batch_stats``, in float32.
      info: Facts about it, as for JSON. By default none.
      kernels: Type in which kernels are stored: ``'float32'`` (the default);
        ``'float16'``, with 11 of their 24 significant bits, which halves the file; or
        ``'int8'``, as multiples of 1/127 of the largest value of each feature, which
        halves it once more.

    Raises:
      UserError: If the variables are not float32; if they are not the network's, with a
        list of all arrays that are missing, unexpected, of another shape or not finite;
        if ``kernels`` is another type; or if ``info`` cannot be written as JSON.
      RunError: If the file cannot be written.
    """
    path = _check_suffix(path)
    if kernels not in get_args(KernelDtype):
        raise UserError(
            f"kernels must be {', '.join(get_args(KernelDtype))}, got {kernels!r}."
        )
    arrays = {n: np.ascontiguousarray(a) for n, a in flatten(variables).items()}
    others = [f"{n} is {a.dtype}" for n, a in arrays.items() if a.dtype != np.float32]
    if others:
        raise UserError(f"variables must be float32, but {'; '.join(others)}.")
    _to_variables(arrays, model, "variables")
    if kernels == "float16":
        arrays = {n: _halve(a) if _is_kernel(n) else a for n, a in arrays.items()}
    elif kernels == "int8":
        arrays = _quantize(arrays)
    header = {
        "format": 2 if kernels == "int8" else 1,
        "model": model_config(model),
        "info": dict(info or {}),
        "arrays_sha256": checksum(arrays),
    }
    try:
        metadata = {_KEY: json.dumps(header)}
    except TypeError as error:
        raise UserError(f"info must be writable as JSON, but: {error}.") from error
    write_arrays(path, arrays, metadata)


def from_pretrained(name_or_path: str | Path | None = None) -> Pretrained:
    """Read a weights file.

    Args:
      name_or_path: A ``.safetensors`` file; the name of a bundled file; or a repository
        on the Hugging Face Hub, ``user/name``, whose ``model.safetensors`` is
        downloaded, once. By default the first bundled file.

    Raises:
      UserError: If there is no such file, with a line that says how to get one; or if
        the file is damaged, of another kind, or not complete.
    """
    path = _find(next(iter(BUNDLED)) if name_or_path is None else name_or_path)
    header = _read_header(path)
    model = model_from_config(header.get("model"), path)
    info = _read_info(header, path)
    arrays = read_arrays(path)
    variables = _to_variables(_dequantize(arrays, path), model, path)
    expected = header.get("arrays_sha256")
    if expected and expected != checksum(arrays):
        raise UserError(
            f"{path} is damaged: its arrays are not those that it was written with."
        )
    return Pretrained(model, variables, info)


def is_weights_file(path: str | Path) -> bool:
    """Return whether a file is a weights file of this package, by its metadata."""
    try:
        _files.check_regular(path)
        with safe_open(path, framework="np") as file:
            return _KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _find(name_or_path: str | Path) -> Path:
    name, path = str(name_or_path), _files.as_path(name_or_path)
    if os.path.isfile(path):
        return _check_suffix(path)
    if name in BUNDLED:
        return BUNDLED[name]
    if os.path.isdir(path):
        raise UserError(
            f"weights: {name} is a folder. If it is the workdir of a run, 'pconv "
            f"convert {name} OUT.safetensors' makes a weights file."
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or os.path.exists(path):
        raise UserError(
            f"weights: there is no file {name}, nor a bundled file of that name "
            f"({', '.join(BUNDLED)}). Give the path of a .safetensors file, or a "
            "repository on the Hugging Face Hub, 'user/name'. 'pconv convert SOURCE "
            "OUT.safetensors' makes a weights file of a run or of another project's "
            "weights."
        )
    try:
        return hub.download_repository_file(name, _HUB_FILE)
    except hub.DownloadError as error:
        raise UserError(
            f"weights: there is no file {name}, and {_HUB_FILE} of the repository "
            f"of that name on the Hugging Face Hub cannot be downloaded ({error}). On "
            f"a machine with a network, fetch {hub.repository_url(name, _HUB_FILE)}, "
            "and give its path instead."
        ) from error


def _check_suffix(path: str | Path) -> Path:
    path = _files.as_path(path)
    if path.suffix != ".safetensors":
        raise UserError(
            f"a weights file is a .safetensors file, got {path}. 'pconv convert SOURCE "
            "OUT.safetensors' makes one of other projects' weights."
        )
    return path


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})[_KEY])
    except (OSError, SafetensorError) as error:
        reason = _files.describe_error(error)
        raise UserError(f"{path} cannot be read: {reason}.") from error
    except (KeyError, RecursionError, ValueError) as error:
        raise UserError(
            f"{path} is not a weights file of pconv_jax: its metadata lacks {_KEY!r}, "
            "or is damaged. If it is another project's, see 'pconv convert'."
        ) from error
    if not isinstance(header, dict) or header.get("format") not in _FORMATS:
        raise UserError(
            f"{path} is a weights file of another version of pconv_jax; this one reads "
            f"formats {' and '.join(map(str, _FORMATS))}."
        )
    return header


def _read_info(header: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Read the facts about a network, and check those that this package uses."""
    info = header.get("info", {})
    if not isinstance(info, dict):
        raise UserError(f"{path} is damaged: its info is {info!r:.50}, not an object.")
    for name in ("notes", "warnings"):
        texts = info.get(name, [])
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise UserError(
                f"{path} is damaged: the {name} of its info are {texts!r:.50}, not a "
                "list of strings."
            )
    return info


def _to_variables(
    arrays: Mapping[str, np.ndarray], model: PConvUNet, source: str | Path
) -> dict[str, Any]:
    shapes = variable_shapes(model, arrays.get("params/pconv1/kernel"), source)
    return to_tree(arrays, shapes, source, strict=True)


def _is_kernel(name: str) -> bool:
    return name.endswith("/kernel")


def _halve(kernel: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = kernel.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError("kernels: there are some beyond 65504, float16's largest.")
    return half


def _quantize(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replace kernels by int8 and the scales of their features, by name."""
    found = dict(arrays)
    for name in filter(_is_kernel, arrays):
        kernel = arrays[name]
        scale = np.abs(kernel).max(tuple(range(kernel.ndim - 1)), initial=0) / 127
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        found[name] = np.rint(kernel / scale).astype(np.int8)
        found[name + _SCALE] = scale
    return found


def _dequantize(
    arrays: Mapping[str, np.ndarray], source: Path
) -> dict[str, np.ndarray]:
    """Undo `_quantize`."""
    found = {n: a for n, a in arrays.items() if not n.endswith("/kernel" + _SCALE)}
    quantized = {n for n, a in found.items() if _is_kernel(n) and a.dtype == np.int8}
    for name in quantized | {
        n.removesuffix(_SCALE) for n in arrays.keys() - found.keys()
    }:
        scale = arrays.get(name + _SCALE)
        if (
            name not in quantized
            or scale is None
            or scale.dtype != np.float32
            or scale.shape != found[name].shape[-1:]
        ):
            raise UserError(f"{source} is damaged: {name} and its scale do not fit.")
        found[name] = found[name] * scale
    return found
