"""The trained weights of LPIPS."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pconv_jax._errors import UserError
from pconv_jax.metrics.lpips import LPIPS, NETWORKS, Params
from pconv_jax.weights import hub
from pconv_jax.weights.formats.arrays import from_torch, read_arrays, to_tree
from pconv_jax.weights.vgg import read_vgg

_LPIPS_URL = (
    "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1"
)

# The files of each network: its five linear heads, then the network itself.
_PUBLISHED = {
    "alex": (
        hub.Published(
            f"{_LPIPS_URL}/alex.pth",
            name="lpips_alex-df73285e.pth",
            variable="PCONV_LPIPS_ALEX",
        ),
        hub.Published(
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            name="alexnet-owt-7be5be79.pth",
            variable="PCONV_ALEXNET",
        ),
    ),
    "vgg": (
        hub.Published(
            f"{_LPIPS_URL}/vgg.pth",
            name="lpips_vgg-a78928a0.pth",
            variable="PCONV_LPIPS_VGG",
        ),
        hub.Published(
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            name="vgg16-397923af.pth",
            variable="PCONV_VGG16",
        ),
    ),
}

# torchvision's numbers count ReLUs and poolings, too.
_ALEX_INDICES = {"conv1": 0, "conv2": 3, "conv3": 6, "conv4": 8, "conv5": 10}


def load_lpips_params(net: str = "alex") -> Params:
    """Load the trained weights of a network and of its five linear heads.

    Each of the two files is looked for where an environment variable says
    (``PCONV_ALEXNET`` and ``PCONV_LPIPS_ALEX``, or ``PCONV_VGG16`` and
    ``PCONV_LPIPS_VGG``), then in the cache (``PCONV_CACHE``), and is otherwise
    downloaded: from torchvision (about 240 or 550 MB) and from the LPIPS project
    (6 kB).

    Args:
      net: ``'alex'`` (the default) or ``'vgg'``.

    Returns:
      Parameters for `distance`, as NumPy arrays.

    Raises:
      UserError: If ``net`` is another name; if a file cannot be downloaded, with a line
        that says where to put it; or if it is another file, with a list of all arrays
        that are missing, of another shape or not finite.
    """
    if net not in NETWORKS:
        raise UserError(f"net must be 'alex' or 'vgg', got {net!r}.")
    heads, trunk = hub.find_published(*_PUBLISHED[net])
    image = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(LPIPS(net).init, jax.random.key(0), image, image)["params"]
    weights = {name: shapes.pop(name) for name in list(shapes) if name[:3] == "lin"}
    arrays = read_vgg(trunk) if net == "vgg" else _read_alexnet(trunk)
    return to_tree(arrays, shapes, trunk) | to_tree(_read_heads(heads), weights, heads)


def _read_alexnet(path: Path) -> dict[str, np.ndarray]:
    arrays = read_arrays(path)
    for conv, index in _ALEX_INDICES.items():
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            if (array := arrays.get(f"features.{index}.{name}")) is not None:
                arrays[f"{conv}/{leaf}"] = from_torch(array)
    return arrays


def _read_heads(path: Path) -> dict[str, np.ndarray]:
    arrays = read_arrays(path)
    # Each is a 1x1 convolution after a dropout layer.
    return {
        name.removesuffix(".model.1.weight"): array.reshape(-1)
        for name, array in arrays.items()
    }
