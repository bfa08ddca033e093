"""The trained weights of Inception v3."""

import jax
import jax.numpy as jnp

from pconv_jax.metrics.inception import IMAGE_SIZE, InceptionV3, Params
from pconv_jax.weights import hub
from pconv_jax.weights.formats.arrays import flatten, from_torch, read_arrays, to_tree

_PUBLISHED = hub.Published(
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    name="pt_inception-2015-12-05-6726825d.pth",
    variable="PCONV_INCEPTION",
)

_TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def load_inception_params() -> Params:
    """Load the weights of 2015 that pytorch-fid published.

    The file with pytorch-fid's names is looked for where ``PCONV_INCEPTION`` says, then
    in the cache (``PCONV_CACHE``), and is otherwise downloaded (95 MB).

    Returns:
      Parameters for `features_and_logits`, as NumPy arrays.

    Raises:
      UserError: If there are no weights, with a line that says where to put which file;
        or if the file is another one, with a list of all arrays that are missing, of
        another shape or not finite.
    """
    (path,) = hub.find_published(_PUBLISHED)
    image = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)
    names = {name: _torch_name(name) for name in flatten(shapes)}
    stored = read_arrays(path)
    arrays = {
        name: from_torch(stored[torch_name])
        for name, torch_name in names.items()
        if torch_name in stored
    }
    return to_tree(arrays, shapes, path, names=names)


def _torch_name(path: str) -> str:
    _, *modules, leaf = path.split("/")
    return ".".join([*modules, _TORCH_LEAVES[leaf]])
