import jax.numpy as jnp
import numpy as np

from pconv_jax.runs import inference


def test_values_become_the_nearest_level():
    # The ends, what is outside, middles between two levels, and a level.
    values = [-1.0, 1.0, -3.0, 3.0, 0.0, 0.5, -127 / 127.5]
    levels = inference.to_uint8(jnp.array(values))
    assert levels.dtype == np.uint8
    np.testing.assert_array_equal(levels, [0, 255, 0, 255, 128, 191, 0])
    every = np.arange(256)
    np.testing.assert_array_equal(inference.to_uint8(every / 127.5 - 1), every)
