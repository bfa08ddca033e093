"""The core under settings of JAX for dtypes: 64 bits by default, nothing implicit."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pconv_jax.nnx
from pconv_jax import PConvUNet, fill_depth, layers, losses, masks, ops, unet, vgg

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_compilation")]

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 8, 8, 4)).astype(np.float32)
IMAGES = RNG.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
MASK = (RNG.random((2, 8, 8, 1)) > 0.4).astype(np.float32)
HOLES = (RNG.random((2, 16, 16, 1)) > 0.4).astype(np.float32)
KERNEL = RNG.standard_normal((3, 3, 4, 6)).astype(np.float32)
BIAS = np.ones(6, np.float32)


@contextlib.contextmanager
def settings(x64, strict):
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(x64))
        if strict:
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        yield


# What the operations are called with.


def both_gradients(operation, **options):
    def loss(x, kernel):
        return jnp.sin(operation(x, MASK, kernel, BIAS, **options)[0]).sum()

    return jax.grad(loss, argnums=(0, 1))(X, KERNEL)


def upsampled(x, mask, *arguments):
    return ops.partial_conv(ops.Upsampled(x), ops.Upsampled(mask), *arguments)


def small(x, mask, *arguments):
    return ops.partial_conv(x[:, :2, :2], mask[:, :2, :2], *arguments)


def initialized(layer, *arguments, **options):
    return layer.init_with_output(jax.random.key(0), *arguments, **options)


# Each gives the same under all settings, in its documented dtypes.
CALLS = {
    "partial_conv": lambda: ops.partial_conv(
        X, MASK.astype(np.uint8), KERNEL, BIAS, input_dilation=2, return_coverage=True
    ),
    "groups": lambda: ops.partial_conv(
        [X, X], [MASK, None], KERNEL, BIAS, feature_group_count=2
    ),
    "transposed": lambda: ops.partial_conv_transpose(
        X, MASK, KERNEL, BIAS, strides=2, return_coverage=True
    ),
    "gradients": lambda: both_gradients(ops.partial_conv, strides=2),
    "gradients, transposed": lambda: both_gradients(
        ops.partial_conv_transpose, strides=2
    ),
    "gradients, upsampled": lambda: both_gradients(upsampled),
    "gradients, small maps": lambda: both_gradients(small),
    "masks": lambda: (
        ops.update_mask(MASK.astype(bool), (3, 3)),
        ops.mask_coverage(MASK, (3, 3), input_dilation=2),
        ops.composite(X, -X, MASK.astype(np.uint8)),
    ),
    "layers": lambda: [
        initialized(layers.PartialConv(4, (3, 3)), X, MASK),
        initialized(layers.PartialConv(4, (3, 3), dtype=jnp.bfloat16), X, MASK),
        initialized(layers.PartialPadConv(4, (3, 3)), X),
        initialized(layers.PartialConvTranspose(4, (3, 3), strides=(2, 2)), X, MASK),
    ],
    "nnx": lambda: [
        layer(4, 4, (3, 3), rngs=nnx.Rngs(0))(X, MASK)
        for layer in (pconv_jax.nnx.PartialConv, pconv_jax.nnx.PartialConvTranspose)
    ],
    "unet": lambda: initialized(
        PConvUNet(depth=2, width=4, normalization=unet.IMAGENET),
        IMAGES,
        HOLES,
        train=True,
    ),
    "standard unet": lambda: initialized(
        PConvUNet(depth=2, width=4, conv="standard", sigmoid_head=True), IMAGES, HOLES
    ),
    "fill_depth": lambda: fill_depth(PConvUNet(depth=2, width=4), HOLES),
    "vgg": lambda: vgg.vgg16_features(vgg.random_params(jax.random.key(0)), IMAGES),
    "losses": lambda: (
        losses.inpainting_loss(
            IMAGES, IMAGES[::-1], HOLES, features_fn=lambda x: [x[:, ::2, ::2]]
        ),
        losses.log_mse(IMAGES, IMAGES[::-1]),
    ),
    "hole classes": lambda: (
        masks.hole_ratio(HOLES),
        masks.hole_bin(masks.hole_ratio(HOLES)),
        masks.near_border(HOLES),
        masks.touches_border(HOLES),
    ),
    **{
        kind: lambda kind=kind: masks.random_mask(
            jax.random.key(0), (24, 32), kind=kind
        )
        for kind in masks.KINDS
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_the_settings(name):
    with settings(x64=False, strict=False):
        expected = jax.jit(CALLS[name])()
    for x64, strict in ((True, False), (True, True)):
        with settings(x64, strict):
            actual = jax.jit(CALLS[name])()
        chex.assert_trees_all_equal_dtypes(actual, expected)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operation", [ops.partial_conv, ops.partial_conv_transpose])
def test_float64_stays_float64(operation):
    with settings(x64=True, strict=True):
        arrays = (a.astype(np.float64) for a in (X, MASK, KERNEL, BIAS))
        y, new_mask, coverage = operation(*arrays, strides=2, return_coverage=True)
    assert (y.dtype, new_mask.dtype, coverage.dtype) == (
        "float64",
        "float64",
        "float32",
    )
