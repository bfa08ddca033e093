"""VGG features for the perceptual and style losses.

The networks end after their third block, at ``pool3``. Images are ``[N, H, W, 3]`` RGB
in [-1, 1]. The networks normalize them by ImageNet's statistics, so the weights are
those of torchvision, transposed. They form a parameter tree,
``{'conv1_1': {'kernel', 'bias'}, ...}``.

Reference: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale
Image Recognition", 2015, https://arxiv.org/abs/1409.1556.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.typing import ArrayLike

from pconv_jax import _conv
from pconv_jax._images import IMAGENET_MEAN, IMAGENET_STD

Params = Mapping[str, Any]

# Maps parameters and images [N, H, W, 3] to feature maps [N, h, w, c], as
# `vgg16_features` does. With its parameters it is a `losses.FeaturesFn`.
ApplyFeatures = Callable[[Params, jax.Array], Sequence[jax.Array]]


class VGGFeatures(nn.Module):
    """The first blocks of a VGG network: 3x3 convolutions, ReLU, 2x2 max pooling.

    Attributes:
      convs: Number of convolutions in each block; block b has ``64 * 2**(b - 1)``
        features.
      dtype: Dtype of the computation, e.g. bfloat16. None (the default) infers it.
    """

    convs: Sequence[int]
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, images: ArrayLike) -> tuple[jax.Array, ...]:
        """Compute the output of each block's pooling, ``pool1``, ``pool2``, ...

        Args:
          images: ``[N, H, W, 3]`` RGB in [-1, 1].

        Returns:
          One map for each block b, ``[N, H // 2**b, W // 2**b, 64 * 2**(b - 1)]``.

        Raises:
          ValueError: If the images are not RGB, or too small for the last map.
        """
        smallest = 2 ** len(self.convs)
        shape = jnp.shape(images)
        if len(shape) != 4 or shape[-1] != 3 or min(shape[1:3]) < smallest:
            raise ValueError(
                f"images must be [N, H, W, 3] of at least {smallest} x {smallest} "
                f"pixels, got {shape}."
            )
        x = (jnp.asarray(images) + 1) / 2
        mean, std = (
            jnp.array(values, x.dtype).reshape(1, 1, 1, 3)
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        x = (x - mean) / std
        pools = []
        for block, convs in enumerate(self.convs, 1):
            for conv in range(1, convs + 1):
                x = nn.Conv(
                    features=64 * 2 ** (block - 1),
                    kernel_size=(3, 3),
                    padding=1,
                    dtype=self.dtype,
                    kernel_init=nn.initializers.he_normal(),
                    conv_general_dilated=_conv.conv_general_dilated,
                    name=f"conv{block}_{conv}",
                )(x)
                if conv == convs:
                    # Before the ReLU, which then has fewer values to process.
                    x = _max_pool(x)
                x = _relu(x)
            pools.append(x)
        return tuple(pools)


class VGG16Features(VGGFeatures):
    """VGG16 up to ``pool3``, the network of the paper."""

    convs: Sequence[int] = (2, 2, 3)


class VGG19Features(VGGFeatures):
    """VGG19 up to ``pool3``."""

    convs: Sequence[int] = (2, 2, 4)


@jax.custom_jvp
def _relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


@_relu.defjvp
def _relu_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    # The gradient of `nn.relu`. With the barrier, XLA keeps the booleans; without, it
    # compares in the backward pass, and keeps the floats for it.
    positive = lax.optimization_barrier(x > 0)
    return _relu(x), jnp.where(positive, dx, 0)


@jax.custom_jvp
def _max_pool(x: jax.Array) -> jax.Array:
    """Pool 2 x 2 pixels and drop an odd last row or column.

    The pixels of a window lie on axes of their own, so the gradient is elementwise. On
    CPUs this is several times faster than that of `nn.max_pool`, with half the memory.
    """
    return _squares(x).max((2, 4))


@_max_pool.defjvp
def _max_pool_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # The gradient of max, but with the positions of the largest pixels kept as booleans
    # instead of floats, in a quarter of the memory.
    (x,), (dx,) = primals, tangents
    y = _max_pool(x)
    largest = lax.optimization_barrier(_squares(x) == y[:, :, None, :, None])
    count = largest.sum((2, 4)).astype(x.dtype)
    return y, jnp.where(largest, _squares(dx), 0).sum((2, 4)) / count


def _squares(x: jax.Array) -> jax.Array:
    """Reshape ``[N, H, W, C]`` to windows, ``[N, H // 2, 2, W // 2, 2, C]``."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels)


def vgg16_features(
    params: Params, images: ArrayLike, *, dtype: Dtype | None = None
) -> tuple[jax.Array, ...]:
    """Compute ``pool1``, ``pool2`` and ``pool3`` of a VGG16; see `VGGFeatures`."""
    pools = VGG16Features(dtype=dtype).apply({"params": params}, images)
    return cast(tuple[jax.Array, ...], pools)  # apply has no precise type.


def vgg19_features(
    params: Params, images: ArrayLike, *, dtype: Dtype | None = None
) -> tuple[jax.Array, ...]:
    """Compute ``pool1``, ``pool2`` and ``pool3`` of a VGG19; see `VGGFeatures`."""
    pools = VGG19Features(dtype=dtype).apply({"params": params}, images)
    return cast(tuple[jax.Array, ...], pools)  # apply has no precise type.


def apply_features_for(params: Params, *, dtype: Dtype | None = None) -> ApplyFeatures:
    """Choose `vgg16_features` or `vgg19_features`, by the names of the parameters.

    Args:
      params: Parameters of either network.
      dtype: Dtype of the computation. None (the default) infers it.
    """
    features = vgg19_features if "conv3_4" in params else vgg16_features
    return functools.partial(features, dtype=dtype)


def random_params(key: jax.Array) -> Params:
    """Draw random (He) weights of a VGG16.

    Their features make the loss well defined if no trained weights are available, but
    they are no substitute for trained weights.
    """
    return VGG16Features().init(key, jnp.zeros((1, 8, 8, 3), jnp.float32))["params"]
