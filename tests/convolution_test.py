import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax import convolution


def make_case(spatial, size, *, channels=4, features=6):
    """Returns random inputs and a random kernel."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *spatial, channels), np.float32)
    return x, rng.standard_normal((*size, channels, features), np.float32)


def make_window(spatial, size, *, strides=1, padding="SAME", kernel_dilation=1):
    return convolution.make_window(spatial, size, strides, padding, kernel_dilation)


def convolve(x, kernel, *, window):
    return convolution.convolve([x], kernel, window, groups=1, precision=None)


def reference(x, kernel, *, window):
    """The same by one call of XLA's convolution."""
    axes = "DHW"[-len(window.size) :]
    return jax.lax.conv_general_dilated(
        convolution._continue(x, window),
        kernel,
        window.strides,
        window.zeros,
        rhs_dilation=window.dilation,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )


def assert_close(actual, expected, tolerance=1e-5):
    """Compares trees, each array in terms of its largest value."""
    chex.assert_trees_all_equal_shapes(actual, expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    ("spatial", "size", "options"),
    [
        ((2, 2), (3, 3), dict(padding=1)),
        ((4, 4), (3, 3), dict(padding=1, strides=2)),
        ((5, 6), (7, 5), dict(padding=((4, 2), "CIRCULAR"), strides=(3, 2))),
        ((6, 4), (3, 2), dict(padding=((2, -1), (0, 1)), kernel_dilation=(3, 2))),
        ((3,), (4,), dict()),
        ((2, 3, 2), (3, 3, 3), dict(padding="SAME", strides=(1, 2, 1))),
    ],
    ids=str,
)
def test_maps_smaller_than_the_kernel_are_a_matrix_product(spatial, size, options):
    x, kernel = make_case(spatial, size)
    window = make_window(spatial, size, **options)
    ours = functools.partial(convolve, window=window)
    y, pull_back = jax.vjp(ours, x, kernel)
    expected, expected_pull_back = jax.vjp(
        functools.partial(reference, window=window), x, kernel
    )
    chex.assert_equal_shape([y, expected])
    assert_close(y, expected)
    assert_close(pull_back(jnp.sin(y)), expected_pull_back(jnp.sin(y)))
    lowered = jax.jit(jax.grad(lambda *a: ours(*a).sum())).lower(x, kernel).as_text()
    assert "stablehlo.convolution" not in lowered
