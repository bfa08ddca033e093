"""Small networks, and settings that train one."""

import jax
import jax.numpy as jnp
import numpy as np

from pconv_jax.runs.config import default_config
from pconv_jax.unet import PConvUNet
from tests.helpers import reference


def norm_shapes(block, features):
    leaves = ("weight", "bias", "running_mean", "running_var")
    return [(f"{block}.bn.{leaf}", (features,)) for leaf in leaves]


def small_mmagic(depth=2, width=4, seed=0):
    """Make weights of a small network in mmagic's form."""
    features = [width * 2 ** min(i, 3) for i in range(depth)]
    channels = [3, *features[:-1]]
    shapes = []
    for i in range(depth):
        k = (7, 5)[i] if i < 2 else 3
        block = f"encoder.enc{i + 1}"
        shapes.append((f"{block}.conv.weight", (features[i], channels[i], k, k)))
        if i == 0:
            shapes.append((f"{block}.conv.bias", (features[i],)))
        else:
            shapes += norm_shapes(block, features[i])
    for i in reversed(range(depth)):
        block, out = f"decoder.dec{i + 1}", channels[i]
        shapes.append((f"{block}.conv.weight", (out, features[i] + channels[i], 3, 3)))
        if i == 0:
            shapes.append((f"{block}.conv.bias", (out,)))
        else:
            shapes += norm_shapes(block, out)
    return reference.recipe_weights(seed, shapes)


def make_network(channels=3, seed=0, **fields):
    """Make a small network, and variables of random numbers."""
    model = PConvUNet(**(dict(depth=2, width=4) | fields))
    images = jnp.zeros((1, 16, 16, channels))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, images[..., :1])
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(
        lambda s: rng.uniform(0.1, 1, s.shape).astype(s.dtype), shapes
    )


def train_config(path, **fields):
    config = default_config()
    config.update_from_flattened_dict(
        {
            "image_size": 16,
            "batch_size": 4,
            "model.depth": 2,
            "model.width": 4,
            "masks.kind": "rectangles",
            "vgg": None,
            "phase1.steps": 0,
            "phase2.steps": 1,
            "validation_examples": 1,
            "evaluation_examples": 1,
            "init_from": str(path) if path else None,
        }
        | fields
    )
    return config
