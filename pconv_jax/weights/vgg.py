"""The trained weights of VGG16 and VGG19.

They are read from files of torchvision, timm and Keras, or downloaded from the Hugging
Face Hub. Arrays are named ``conv1_1/kernel``, ``conv1_1/bias``, ..., ``conv5_3/bias``.
Kernels are ``[H, W, in, out]``, for images as torchvision normalizes them.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from pconv_jax import _files
from pconv_jax._errors import RunError, UserError
from pconv_jax._images import IMAGENET_MEAN, IMAGENET_STD
from pconv_jax.vgg import Params, VGG16Features, VGG19Features
from pconv_jax.weights import hub
from pconv_jax.weights.formats.arrays import (
    checksum,
    flatten,
    from_torch,
    is_real,
    read_arrays,
    to_tree,
    write_arrays,
)

_REPOSITORY = "timm/vgg16.tv_in1k"
_HUB_FILE = "model.safetensors"
# The commit with which timm's authors published the file, whose SHA-256 is
# 57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8.
_REVISION = "3394518cba29aee1ea82a49d971be90d2dd1dab7"
VGG16_URL = hub.repository_url(_REPOSITORY, _HUB_FILE, revision=_REVISION)
_CACHED_NAME = "vgg16.safetensors"

# Of ImageNet's RGB values in [0, 255]. torchvision's input is (x - mean) / std. Keras'
# is Caffe's, x - mean in the order BGR.
_TORCH_MEAN = np.array(IMAGENET_MEAN) * 255
_TORCH_STD = np.array(IMAGENET_STD) * 255
_CAFFE_MEAN = np.array([123.68, 116.779, 103.939])

# Convolutions in each block.
_BLOCKS = {"VGG16": (2, 2, 3, 3, 3), "VGG19": (2, 2, 4, 4, 4)}
_KERAS = re.compile(
    r"(?:.*/)?block(\d)_conv(\d)[/_](kernel|bias|W|b)(?:_\d+)?(?::\d+)?"
)

# Metadata in which a cached file has the checksum of its arrays.
_CHECKSUM = "arrays_sha256"

_logger = logging.getLogger(__name__)


def load_vgg_params(source: str | Path = "imagenet") -> Params:
    """Load the trained weights of a VGG16 or a VGG19.

    Args:
      source: A file (see `read_vgg`), or ``'imagenet'`` (the default): a VGG16 that is
        looked for in the file that ``PCONV_VGG16`` names, then in the cache
        (``PCONV_CACHE``, on Linux by default ``~/.cache/pconv_jax``), and is otherwise
        downloaded from the Hugging Face Hub (7 MB, once).

    Returns:
      The parameter tree of `VGG16Features` or `VGG19Features`, as NumPy arrays.

    Raises:
      UserError: If there are no weights, with a line that says where to put which file;
        or if it is not a VGG, with a list of all arrays that are missing, of another
        shape or not finite.
    """
    if source == "imagenet":
        source = hub.named_path("PCONV_VGG16") or source
    if source != "imagenet":
        return _to_params(read_vgg(source), source)
    path = hub.cache_path(_CACHED_NAME)
    if path.exists():
        return _to_params(read_vgg(path), path)
    try:
        arrays = download_vgg16()
    except hub.DownloadError as error:
        raise UserError(
            f"There are no VGG16 weights: {VGG16_URL} cannot be downloaded "
            f"({error}). On a machine with a network, fetch that file (550 MB), put "
            f"it here as {path}, or name it in PCONV_VGG16. torchvision's "
            "vgg16-397923af.pth, or Keras' vgg16_weights_tf_dim_ordering_tf_kernels_"
            "notop.h5, may be named there as well."
        ) from error
    params = _to_params(_rename(arrays, VGG16_URL), VGG16_URL)
    try:
        write_cache(path, flatten(params))
        hub.remember_arrays(_REPOSITORY, _HUB_FILE, arrays, revision=_REVISION)
    except RunError as error:
        _logger.warning("The VGG16 is not kept for the next time: %s", error)
    return params


def read_vgg(path: str | Path) -> dict[str, np.ndarray]:
    """Read the weights of a VGG from a file, and rename them.

    Keras' weights, which are Caffe's, are converted from BGR to RGB and to
    torchvision's normalization. The conversion is exact except for the outermost
    pixels, where the zeros of the padding differ in color by up to half a gray level.

    Args:
      path: A file that `read_arrays` reads, with the names of torchvision, of Keras, or
        ``conv1_1_kernel`` and so on.

    Returns:
      Arrays by name; see the module.

    Raises:
      UserError: As `read_arrays`; or if the file was written by `write_cache` and has
        changed since.
    """
    path = _files.as_path(path)
    arrays = read_arrays(path)
    if path.suffix == ".safetensors":
        _check_cache(path, arrays)
    return _rename(arrays, path)


def write_cache(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays with their checksum, for `read_vgg`."""
    write_arrays(path, arrays, {_CHECKSUM: checksum(arrays)})


def download_vgg16() -> dict[str, np.ndarray]:
    """Download the first three blocks of a VGG16: 7 MB of a file of 550 MB.

    Returns:
      The arrays, by torchvision's names.

    Raises:
      DownloadError: If they cannot be downloaded.
    """
    names = _torch_names(_BLOCKS["VGG16"][:3]).values()
    return hub.read_repository_arrays(_REPOSITORY, _HUB_FILE, names, revision=_REVISION)


def _check_cache(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with safe_open(path, framework="np") as file:
        expected = (file.metadata() or {}).get(_CHECKSUM)
    if expected and expected != checksum(arrays):
        raise UserError(
            f"weights: {path} is damaged; delete it, and it is downloaded again."
        )


def _rename(
    arrays: Mapping[str, np.ndarray], source: str | Path
) -> dict[str, np.ndarray]:
    if "features.0.weight" in arrays:
        return _from_torch(arrays)
    if any(map(_KERAS.fullmatch, arrays)):
        _logger.warning(
            "%s has the weights of Keras: converted from BGR, and Caffe's means.",
            source,
        )
        return _from_keras(arrays)
    return {re.sub(r"[_.](kernel|bias)$", r"/\1", n): a for n, a in arrays.items()}


def _from_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    kind = "VGG19" if "features.34.weight" in arrays else "VGG16"
    return {
        path: from_torch(arrays[name])
        for path, name in _torch_names(_BLOCKS[kind]).items()
        if name in arrays
    }


def _torch_names(blocks: tuple[int, ...]) -> dict[str, str]:
    names, index = {}, 0
    for block, convs in enumerate(blocks, 1):
        for conv in range(1, convs + 1):
            names[f"conv{block}_{conv}/kernel"] = f"features.{index}.weight"
            names[f"conv{block}_{conv}/bias"] = f"features.{index}.bias"
            index += 2  # torchvision's numbers count the ReLU, too,
        index += 1  # and the pooling.
    return names


def _from_keras(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, array in arrays.items():
        if match := _KERAS.fullmatch(name):
            block, conv, leaf = match.groups()
            leaf = {"W": "kernel", "b": "bias"}.get(leaf, leaf)
            renamed[f"conv{block}_{conv}/{leaf}"] = array
    kernel, bias = renamed.get("conv1_1/kernel"), renamed.get("conv1_1/bias")
    if kernel is None or bias is None or kernel.shape != (3, 3, 3, *bias.shape):
        return renamed  # `to_tree` reports the problem.
    if not is_real(kernel) or not is_real(bias):
        return renamed  # `to_tree` reports the problem.
    kernel = kernel[:, :, ::-1].astype(np.float64)
    shift = np.einsum("hwio,i->o", kernel, _TORCH_MEAN - _CAFFE_MEAN)
    renamed["conv1_1/kernel"] = kernel * _TORCH_STD[:, None]
    renamed["conv1_1/bias"] = bias + shift
    return renamed


def _to_params(arrays: Mapping[str, np.ndarray], source: str | Path) -> Params:
    """Convert arrays to the parameter tree up to ``pool3``."""
    network = VGG19Features() if "conv3_4/kernel" in arrays else VGG16Features()
    shapes = jax.eval_shape(
        lambda: network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    )
    return to_tree(arrays, shapes, source)
