"""The trained weights of Inception v3."""

import jax
import jax.numpy as jnp
from flax import traverse_util

from pconv_jax.metrics.inception import IMAGE_SIZE, InceptionV3, Params
from pconv_jax.weights import hub
from pconv_jax.weights.formats.arrays import from_torch, read_arrays, to_tree

_PUBLISHED = hub.Published(
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    name="pt_inception-2015-12-05-6726825d.pth",
    variable="PCONV_INCEPTION",
)


def load_inception_params() -> Params:
    """Loads pytorch-fid's weights of the network, of 2015.

    They are looked for in the file that ``PCONV_INCEPTION`` names, with pytorch-fid's
    names of arrays, then in the cache (``PCONV_CACHE``), then where they were published
    (95 MB).

    Returns:
      Parameters for `features_and_logits`, as NumPy arrays.

    Raises:
      ValueError: If there are none, saying in a line where to put which file; or if it
        is another file, naming all that is missing, mis-shaped or not finite.
    """
    (path,) = hub.find_published(_PUBLISHED)
    arrays = read_arrays(path)
    image = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)
    names = {
        name: _torch_name(name) for name in traverse_util.flatten_dict(shapes, sep="/")
    }
    arrays = {
        name: from_torch(arrays[theirs])
        for name, theirs in names.items()
        if theirs in arrays
    }
    return to_tree(arrays, shapes, path, names=names)


def _torch_name(path):
    _, *modules, leaf = path.split("/")
    leaves = {
        "kernel": "weight",
        "scale": "weight",
        "mean": "running_mean",
        "var": "running_var",
    }
    return ".".join([*modules, leaves.get(leaf, leaf)])
