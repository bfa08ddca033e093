"""VGG's weights, from files of torchvision, timm and Keras, or from the Hub.

Arrays are named ``conv1_1/kernel``, ``conv1_1/bias``, ..., ``conv5_3/bias``. Kernels
are ``[H, W, in, out]``, for images as torchvision normalizes them.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import safe_open

from pconv_jax._errors import RunError
from pconv_jax._images import IMAGENET_MEAN, IMAGENET_STD
from pconv_jax.vgg import Params, VGG16Features, VGG19Features
from pconv_jax.weights.formats.arrays import (
    checksum,
    from_torch,
    read_arrays,
    to_tree,
    write_arrays,
)

_REPOSITORY = "timm/vgg16.tv_in1k"
_HUB_FILE = "model.safetensors"
VGG16_URL = f"https://huggingface.co/{_REPOSITORY}/resolve/main/{_HUB_FILE}"

# Of ImageNet's RGB values: torchvision divides (x / 255 - mean) by std, and Keras has
# Caffe's x - mean, in the order BGR.
_TORCH_MEAN = np.array(IMAGENET_MEAN) * 255
_TORCH_STD = np.array(IMAGENET_STD) * 255
_CAFFE_MEAN = np.array([123.68, 116.779, 103.939])

# torchvision counts ReLUs and poolings too.
_TORCH_BLOCKS = {"VGG16": (2, 2, 3, 3, 3), "VGG19": (2, 2, 4, 4, 4)}
_KERAS = re.compile(
    r"(?:.*/)?block(\d)_conv(\d)[/_](kernel|bias|W|b)(?:_\d+)?(?::\d+)?"
)

_MAX_HEADER = 10_000_000
# Where a cache has the checksum of its arrays, in its metadata.
_CHECKSUM = "arrays_sha256"

_logger = logging.getLogger(__name__)


def read_vgg(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the weights of a VGG from a file, and renames them.

    Keras' weights, which are Caffe's, are converted: from BGR to RGB, and to
    torchvision's normalization. That is exact but for the outermost pixels, where the
    zeros that pad differ in colour by up to half of a grey level.

    Args:
      path: of a file that `read_arrays` reads, with the names of torchvision, of Keras,
        or ``conv1_1_kernel`` and the like.

    Raises:
      ValueError: as `read_arrays`; or if the file was written by `write_cache` and is
        not what it was.
    """
    arrays = read_arrays(path)
    if Path(path).suffix == ".safetensors":
        _check_cache(Path(path).expanduser(), arrays)
    return _rename(arrays, path)


def write_cache(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays with their checksum, for `read_vgg`."""
    write_arrays(path, arrays, {_CHECKSUM: checksum(arrays)})


def download_vgg16() -> dict[str, np.ndarray]:
    """Fetches a VGG16's first three blocks, 7 MB of a file of 550, from the Hub.

    Raises:
      OSError: if that cannot be done.
    """
    import huggingface_hub  # Not needed by those who have the file.

    wanted = set(_torch_names(_TORCH_BLOCKS["VGG16"][:3]).values())
    url = huggingface_hub.hf_hub_url(_REPOSITORY, _HUB_FILE)
    try:
        session = huggingface_hub.get_session()
        read = _RangeReader(lambda **kwargs: session.get(url, timeout=30, **kwargs))
        return _rename(_read_remote(read, wanted), url)
    except Exception as error:  # The HTTP client's errors are no OSErrors.
        raise OSError(f"{type(error).__name__}: {error}") from error


class _RangeReader:
    """Reads parts of a remote file. A server that knows no parts is read once."""

    def __init__(self, get: Callable[..., Any]):
        self._get = get
        self._whole: bytes | None = None

    def __call__(self, start: int, stop: int) -> bytes:
        if self._whole is None:
            response = self._get(headers={"Range": f"bytes={start}-{stop - 1}"})
            response.raise_for_status()
            if response.status_code == 206:
                data = response.content
            else:
                self._whole = response.content
        if self._whole is not None:
            data = self._whole[start:stop]
        if len(data) != stop - start:
            raise ValueError(f"got {len(data)} bytes of {stop - start}")
        return data


def _read_remote(
    read: Callable[[int, int], bytes], wanted: set[str]
) -> dict[str, np.ndarray]:
    """Reads some arrays of a safetensors file."""
    size = int.from_bytes(read(0, 8), "little")
    if size > _MAX_HEADER:
        raise ValueError("it is no safetensors file")
    header = json.loads(read(8, 8 + size))
    arrays = {}
    for name in sorted(wanted & header.keys()):
        if header[name]["dtype"] != "F32":
            raise ValueError(f"{name} is of type {header[name]['dtype']}, not F32")
        start, stop = (8 + size + offset for offset in header[name]["data_offsets"])
        data = np.frombuffer(read(start, stop), "<f4")
        arrays[name] = data.reshape(header[name]["shape"])
    return arrays


def _check_cache(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with safe_open(path, framework="np") as file:
        expected = (file.metadata() or {}).get(_CHECKSUM)
    if expected and expected != checksum(arrays):
        raise ValueError(f"weights: {path} is damaged; delete it to have it made anew.")


def _rename(
    arrays: Mapping[str, np.ndarray], source: str | Path
) -> dict[str, np.ndarray]:
    if "features.0.weight" in arrays:
        return _from_torch(arrays)
    if any(map(_KERAS.fullmatch, arrays)):
        _logger.warning(
            "%s is of Keras: converted from BGR, and Caffe's means.", source
        )
        return _from_keras(arrays)
    return {re.sub(r"[_.](kernel|bias)$", r"/\1", n): a for n, a in arrays.items()}


def _from_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    kind = "VGG19" if "features.34.weight" in arrays else "VGG16"
    renamed = {}
    for path, name in _torch_names(_TORCH_BLOCKS[kind]).items():
        if name in arrays:
            renamed[path] = from_torch(arrays[name])
    return renamed


def _torch_names(blocks: tuple[int, ...]) -> dict[str, str]:
    names, index = {}, 0
    for block, convs in enumerate(blocks, 1):
        for conv in range(1, convs + 1):
            names[f"conv{block}_{conv}/kernel"] = f"features.{index}.weight"
            names[f"conv{block}_{conv}/bias"] = f"features.{index}.bias"
            index += 2
        index += 1
    return names


def _from_keras(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, array in arrays.items():
        if match := _KERAS.fullmatch(name):
            block, conv, leaf = match.groups()
            leaf = {"W": "kernel", "b": "bias"}.get(leaf, leaf)
            renamed[f"conv{block}_{conv}/{leaf}"] = array
    kernel, bias = renamed.get("conv1_1/kernel"), renamed.get("conv1_1/bias")
    if bias is not None and np.shape(kernel) == (3, 3, 3, len(bias)):
        kernel = kernel[:, :, ::-1].astype(np.float64)
        shift = np.einsum("hwio,i->o", kernel, _TORCH_MEAN - _CAFFE_MEAN)
        renamed["conv1_1/kernel"] = kernel * _TORCH_STD[:, None]
        renamed["conv1_1/bias"] = bias + shift
    return renamed


def load_vgg_params(source: str | Path = "imagenet") -> Params:
    """Loads trained weights, of a VGG16 or a VGG19.

    Args:
      source: a file, see `read_vgg`; or ``'imagenet'``, a VGG16 looked for in
        the file that ``PCONV_VGG16`` names, then in the cache (``PCONV_CACHE``, by
        default ``~/.cache/pconv_jax``), then on the Hugging Face Hub (7 MB, once).

    Returns:
      The parameter tree of `VGG16Features` or `VGG19Features`, as NumPy arrays.

    Raises:
      ValueError: if there are none, saying where to put which file; if the file is no
        VGG, naming all that is missing, mis-shaped or not finite.
    """
    if source == "imagenet":
        source = os.environ.get("PCONV_VGG16") or source
    if source != "imagenet":
        return _to_params(read_vgg(source), source)
    cache = Path(os.environ.get("PCONV_CACHE") or "~/.cache/pconv_jax").expanduser()
    path = cache / "vgg16.safetensors"
    if path.exists():
        return _to_params(read_vgg(path), path)
    try:
        arrays = download_vgg16()
    except OSError as error:
        raise ValueError(
            f"There are no VGG16 weights: {VGG16_URL} cannot be downloaded "
            f"({error}). On a machine with a network, fetch that file (550 MB), put "
            f"it here as {path}, or name it in PCONV_VGG16. torchvision's "
            "vgg16-397923af.pth, or Keras' vgg16_weights_tf_dim_ordering_tf_kernels_"
            "notop.h5, may be named there as well."
        ) from error
    params = _to_params(arrays, VGG16_URL)
    try:
        write_cache(path, traverse_util.flatten_dict(params, sep="/"))
    except (OSError, RunError) as error:
        logging.warning("The VGG16 is not kept for the next time: %s", error)
    return params


def _to_params(arrays: Mapping[str, Any], source: str | Path) -> Params:
    """Returns the parameter tree up to ``pool3`` from a file's arrays."""
    network = VGG19Features() if "conv3_4/kernel" in arrays else VGG16Features()
    shapes = jax.eval_shape(
        lambda: network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    )
    return to_tree(arrays, shapes, source)
