"""A small network and its evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax.evaluate import runner
from pconv_jax.unet import PConvUNet
from tests.helpers.evaluation import SIZE, bundled

MODEL = PConvUNet(depth=2, width=4)


@pytest.fixture(scope="module")
def variables():
    images = jnp.zeros((1, SIZE, SIZE, 3))
    variables = jax.jit(MODEL.init)(jax.random.key(0), images, images[..., :1] + 1)
    return jax.tree.map(np.asarray, variables)


@pytest.fixture(scope="module")
def evaluation(variables):
    return runner.evaluate_network(
        MODEL, variables, bundled(), image_size=SIZE, examples=5, progress=False
    )
