import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax import vgg

pytestmark = pytest.mark.usefixtures("fast_compilation")


VGG16_CHANNELS = {
    "conv1_1": (3, 64),
    "conv1_2": (64, 64),
    "conv2_1": (64, 128),
    "conv2_2": (128, 128),
    "conv3_1": (128, 256),
    "conv3_2": (256, 256),
    "conv3_3": (256, 256),
}


@pytest.mark.parametrize(
    ("network", "channels"),
    [
        (vgg.VGG16Features(), VGG16_CHANNELS),
        (vgg.VGG19Features(), VGG16_CHANNELS | {"conv3_4": (256, 256)}),
    ],
    ids=["VGG16", "VGG19"],
)
def test_parameters_and_maps(network, channels):
    pools, variables = jax.eval_shape(
        network.init_with_output, jax.random.key(0), jnp.zeros((2, 48, 33, 3))
    )
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        name: {"kernel": (3, 3, *shape), "bias": shape[1:]}
        for name, shape in channels.items()
    }
    shapes = [(2, 24, 16, 64), (2, 12, 8, 128), (2, 6, 4, 256)]
    assert [p.shape for p in pools] == shapes


def identity_params(network):
    """Make parameters such that every convolution copies its first channels."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes["params"])
    for layer in params.values():
        channels = range(3)
        layer["kernel"][1, 1, channels, channels] = 1
    return params


@pytest.mark.parametrize(
    ("network", "features"),
    [
        (vgg.VGG16Features(), vgg.vgg16_features),
        (vgg.VGG19Features(), vgg.vgg19_features),
    ],
    ids=["VGG16", "VGG19"],
)
def test_identity_convolutions_leave_normalization_rectifier_and_pooling(
    network, features
):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3))
    images = images.astype(np.float32)
    # ImageNet's, as in torchvision.
    normalized = (images / 2 + 0.5 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pool = np.maximum(normalized, 0)
    for actual in features(identity_params(network), images):
        n, h, w, c = pool.shape
        pool = pool.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
        np.testing.assert_allclose(actual[..., :3], pool, atol=1e-5)
        assert not np.any(actual[..., 3:])


def test_convolutions_pad_by_zeros_after_the_normalization():
    network = vgg.VGGFeatures(convs=(1,))
    params = {
        "conv1_1": {
            "kernel": np.ones((3, 3, 3, 64), np.float32),
            "bias": np.full(64, 0.25, np.float32),
        }
    }
    (pool,) = network.apply({"params": params}, np.ones((1, 6, 6, 3)))
    white = ((1 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]).sum()
    # Every pooling has one window that lies inside the image.
    np.testing.assert_allclose(
        pool, np.full((1, 3, 3, 64), 9 * white + 0.25), rtol=1e-5
    )
    (pool,) = network.apply({"params": params}, np.ones((1, 2, 2, 3)))
    np.testing.assert_allclose(
        pool, np.full((1, 1, 1, 64), 4 * white + 0.25), rtol=1e-5
    )


def test_bfloat16():
    params = identity_params(vgg.VGG16Features())
    images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    half = vgg.vgg16_features(params, images, dtype=jnp.bfloat16)
    full = vgg.vgg16_features(params, images)
    for a, b in zip(half, full, strict=True):
        assert a.dtype == jnp.bfloat16 and b.dtype == np.float32
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "shape", [(1, 16, 16, 1), (1, 16, 16, 4), (16, 16, 3), (1, 7, 16, 3), (1, 16, 4, 3)]
)
def test_errors(shape):
    with pytest.raises(
        ValueError, match=r"images must be \[N, H, W, 3\] of at least 8"
    ):
        vgg.VGG16Features().init(jax.random.key(0), np.zeros(shape))


def test_gradient_of_pooling_is_that_of_the_maximum():
    x = np.random.default_rng(0).integers(0, 3, (2, 5, 6, 4)).astype(np.float32)

    def maximum(x):
        return x[:, :4].reshape(2, 2, 2, 3, 2, 4).max((2, 4))

    (y, pull_back), (expected, expected_pull_back) = (
        jax.vjp(f, x) for f in (vgg._max_pool, maximum)
    )
    np.testing.assert_array_equal(y, expected)
    # Equal largest pixels, which do occur here, share the gradient equally.
    np.testing.assert_array_equal(
        pull_back(jnp.cos(y))[0], expected_pull_back(jnp.cos(y))[0]
    )


def test_gradient_of_relu_is_that_of_flax():
    x = jnp.array([-2.0, -0.0, 0.0, 3.0, jnp.nan])
    (y, pull_back), (expected, expected_pull_back) = (
        jax.vjp(f, x) for f in (vgg._relu, nn.relu)
    )
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(pull_back(x + 1)[0], expected_pull_back(x + 1)[0])


@pytest.mark.slow  # Without XLA's optimizations, nothing is moved or kept.
def test_backward_pass_keeps_booleans_instead_of_floats(monkeypatch):
    images = jnp.zeros((1, 64, 64, 3))
    params = identity_params(vgg.VGG16Features())

    def temporary():
        def loss(images):
            return sum(map(jnp.sum, vgg.vgg16_features(params, images)))

        # A function of its own, since JAX caches traces.
        compiled = jax.jit(jax.grad(loss)).lower(images).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    kept = temporary()
    monkeypatch.setattr(vgg, "_relu", nn.relu)
    assert kept < 0.8 * temporary()
