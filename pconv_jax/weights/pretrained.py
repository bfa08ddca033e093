"""Trained networks as single files: the form in which they are released.

A release is one ``.safetensors`` file with the parameters and the statistics of batch
normalization. Its metadata says what network they are of, and what is known about it:
where it is from, what it was trained on, how well it does. It holds arrays of numbers
and text, and nothing that could be run.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from pconv_jax.unet import PConvUNet, model_config, model_from_config
from pconv_jax.weights.formats.arrays import (
    checksum,
    read_arrays,
    to_tree,
    write_arrays,
)

# Releases that come with this package, by name.
BUNDLED: Mapping[str, Path] = {
    "photos": Path(__file__).parent / "bundled" / "photos.safetensors"
}

_HUB_FILE = "model.safetensors"
_KEY = "pconv_jax"
_FORMAT = 1


class Pretrained(NamedTuple):
    """A trained network.

    Attributes:
      model: takes and gives images ``[N, H, W, C]`` in [-1, 1], if it is of pictures.
      variables: its ``params`` and ``batch_stats``, NumPy arrays.
      info: what is known about it, JSON-able: e.g. ``origin``, ``training_data``,
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
    half: bool = False,
) -> None:
    """Writes a release.

    Args:
      path: of the ``.safetensors`` file. It appears when it is complete.
      model: the network.
      variables: its ``params`` and ``batch_stats``, in float32.
      info: what is known about it, JSON-able.
      half: whether to store kernels in float16, which halves the file, and takes 13 of
        their 24 bits.

    Raises:
      ValueError: if variables are not the network's, naming all that are missing, too
        much, mis-shaped or not finite, or not float32; if `info` is not JSON-able.
    """
    path = _check_suffix(path)
    arrays = traverse_util.flatten_dict(dict(variables), sep="/")
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    others = [f"{n} is {a.dtype}" for n, a in arrays.items() if a.dtype != np.float32]
    if others:
        raise ValueError(f"variables must be float32, but {'; '.join(others)}.")
    _to_variables(arrays, model, "what is to be saved")
    if half:
        arrays = {
            n: _halve(a) if n.endswith("/kernel") else a for n, a in arrays.items()
        }
    header = {
        "format": _FORMAT,
        "model": model_config(model),
        "info": dict(info or {}),
        "arrays_sha256": checksum(arrays),
    }
    try:
        metadata = {_KEY: json.dumps(header)}
    except TypeError as error:
        raise ValueError(f"info must be JSON-able, but: {error}.") from error
    write_arrays(path, arrays, metadata)


def from_pretrained(source: str | Path | None = None) -> Pretrained:
    """Reads a release.

    Args:
      source: a ``.safetensors`` file; the name of a bundled network; or a repository on
        the Hugging Face Hub, ``user/name``, whose ``model.safetensors`` is downloaded,
        once. By default the first of the bundled networks.

    Raises:
      ValueError: if there is none of that name, saying how to get one; if the file is
        damaged, of another kind, or has not all of the network.
    """
    if source is None:
        source = next(iter(BUNDLED))
    path = _find(source)
    header = _read_header(path)
    model = model_from_config(header.get("model"), path)
    arrays = read_arrays(path)
    variables = _to_variables(arrays, model, path)
    expected = header.get("arrays_sha256")
    if expected and expected != checksum(arrays):
        raise ValueError(
            f"{path} is damaged: its arrays are not those that it was written with."
        )
    return Pretrained(model, variables, header.get("info", {}))


def is_release(path: str | Path) -> bool:
    """Returns whether a file is a release of this package, by its metadata."""
    try:
        with safe_open(path, framework="np") as file:
            return _KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return _check_suffix(path)
    if str(source) in BUNDLED:
        return BUNDLED[str(source)]
    # A folder of that name is meant rather than the Hub.
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) or path.exists():
        raise ValueError(
            f"source: there is no file {source}, nor a bundled network of that name "
            f"({', '.join(BUNDLED)}). Give the path of a .safetensors file, or a "
            "repository on the Hugging Face Hub, 'user/name'; or make a file of a run "
            "or of another project's weights by 'pconv convert SOURCE OUT.safetensors'."
        )
    import huggingface_hub  # Not needed by those who have the file.

    try:
        cached = huggingface_hub.try_to_load_from_cache(str(source), _HUB_FILE)
        if isinstance(cached, str):
            return Path(cached)
        # Asked for first, because a download without a network retries for long.
        url = huggingface_hub.hf_hub_url(str(source), _HUB_FILE)
        huggingface_hub.get_hf_file_metadata(url, timeout=10)
        return Path(huggingface_hub.hf_hub_download(str(source), _HUB_FILE))
    except Exception as error:  # The HTTP client's errors are of many kinds.
        url = f"https://huggingface.co/{source}/resolve/main/{_HUB_FILE}"
        raise ValueError(
            f"source: there is no file {source}, and {_HUB_FILE} of the repository of "
            f"that name on the Hugging Face Hub cannot be downloaded "
            f"({type(error).__name__}). Where there is a network, fetch {url}, and "
            "give its path instead."
        ) from error


def _check_suffix(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(
            f"a release is a .safetensors file, got {path}. Weights of other projects "
            "are made one by 'pconv convert SOURCE OUT.safetensors'."
        )
    return path


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})[_KEY])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is no release of pconv_jax: its metadata lacks {_KEY!r}, or is "
            "damaged. If it is of another project, see 'pconv convert'."
        ) from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is a release of another version of pconv_jax; this one reads "
            f"format {_FORMAT}."
        )
    return header


def _to_variables(
    arrays: Mapping[str, np.ndarray], model: PConvUNet, source: str | Path
) -> dict[str, Any]:
    kernel = arrays.get("params/pconv1/kernel", np.empty(0))
    channels = kernel.shape[2] if kernel.ndim == 4 else 3
    channels -= model.conv == "standard"  # Which is given the mask, too.
    try:
        size = model.size_multiple
        images, mask = (
            jax.ShapeDtypeStruct((1, size, size, n), jnp.float32) for n in (channels, 1)
        )
        shapes = jax.eval_shape(model.init, jax.random.key(0), images, mask)
    except Exception as error:  # JAX's and Flax's are of many kinds.
        raise ValueError(f"{source} is of an impossible network: {error}") from error
    return to_tree(arrays, shapes, source, strict=True)


def _halve(kernel: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = kernel.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("half: there are kernels beyond 65504, float16's largest.")
    return half
