"""VGG features for the perceptual and style losses.

Only the first three blocks are built, up to ``pool3``. Images are ``[N, H, W, 3]`` RGB
in [-1, 1]; normalization to what the networks were trained on happens inside, so that
weights, which lie in the ordinary parameter tree ``{'conv1_1': {'kernel', 'bias'},
...}``, are those of torchvision, transposed.

Reference: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale
Image Recognition", 2015, https://arxiv.org/abs/1409.1556.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.typing import ArrayLike

from pconv_jax._images import IMAGENET_MEAN, IMAGENET_STD

Params = Mapping[str, Any]


class VGGFeatures(nn.Module):
    """The first blocks of a VGG network: 3x3 convolutions, ReLU, 2x2 max pooling.

    Attributes:
      convs: number of convolutions in each block; block b has ``64 * 2**(b - 1)``
        features.
      dtype: of the computation, e.g. bfloat16.
    """

    convs: Sequence[int]
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, images: ArrayLike) -> tuple[jax.Array, ...]:
        """Returns the output of each block's pooling, ``pool1``, ``pool2``, ...

        Args:
          images: ``[N, H, W, 3]`` RGB in [-1, 1].

        Returns:
          One map a block, ``[N, H // 2**b, W // 2**b, 64 * 2**(b - 1)]``.

        Raises:
          ValueError: if the images are not RGB, or too small for the last map.
        """
        smallest = 2 ** len(self.convs)
        shape = jnp.shape(images)
        if len(shape) != 4 or shape[-1] != 3 or min(shape[1:3]) < smallest:
            raise ValueError(
                f"images must be [N, H, W, 3] of at least {smallest} x {smallest} "
                f"pixels, got {shape}."
            )
        x = (jnp.asarray(images) + 1) / 2
        x = (x - jnp.array(IMAGENET_MEAN, x.dtype)) / jnp.array(IMAGENET_STD, x.dtype)
        pools = []
        for block, convs in enumerate(self.convs, 1):
            for conv in range(1, convs + 1):
                x = nn.Conv(
                    features=64 * 2 ** (block - 1),
                    kernel_size=(3, 3),
                    padding=1,
                    dtype=self.dtype,
                    kernel_init=nn.initializers.he_normal(),
                    name=f"conv{block}_{conv}",
                )(x)
                if conv == convs:
                    x = _max_pool(x)  # Before the ReLU, which then has less to do.
                x = nn.relu(x)
            pools.append(x)
        return tuple(pools)


class VGG16Features(VGGFeatures):
    """VGG16 up to ``pool3``, as the paper has it."""

    convs: Sequence[int] = (2, 2, 3)


class VGG19Features(VGGFeatures):
    """VGG19 up to ``pool3``."""

    convs: Sequence[int] = (2, 2, 4)


@jax.custom_jvp
def _max_pool(x: jax.Array) -> jax.Array:
    """Pools 2 x 2 pixels; an odd last row or column is left out.

    As a reduction of one axis the gradient is elementwise, which on CPUs is several
    times faster than that of `nn.max_pool`, and takes half of the memory.
    """
    return _squares(x).max((2, 4))


@_max_pool.defjvp
def _max_pool_jvp(primals, tangents):
    # The same gradient as that of max, which would keep which pixels are the largest as
    # floats. As booleans they take a quarter of the memory.
    (x,), (dx,) = primals, tangents
    y = _max_pool(x)
    largest = _squares(x) == y[:, :, None, :, None]
    count = largest.sum((2, 4)).astype(x.dtype)
    return y, jnp.where(largest, _squares(dx), 0).sum((2, 4)) / count


def _squares(x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels)


def vgg16_features(
    params: Params, images: ArrayLike, *, dtype: Dtype | None = None
) -> tuple[jax.Array, ...]:
    """Returns ``pool1``, ``pool2`` and ``pool3`` of a VGG16; see `VGGFeatures`."""
    return VGG16Features(dtype=dtype).apply({"params": params}, images)


def vgg19_features(
    params: Params, images: ArrayLike, *, dtype: Dtype | None = None
) -> tuple[jax.Array, ...]:
    """Returns ``pool1``, ``pool2`` and ``pool3`` of a VGG19; see `VGGFeatures`."""
    return VGG19Features(dtype=dtype).apply({"params": params}, images)


def feature_fn_for(params: Params) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns the function that the parameters are of: VGG16's or VGG19's."""
    return vgg19_features if "conv3_4" in params else vgg16_features


def random_params(key: jax.Array) -> Params:
    """Returns a VGG16 of random (He) weights.

    Its features make the loss well defined where nothing better is to be had, but they
    are no substitute for trained ones.
    """
    return VGG16Features().init(key, jnp.zeros((1, 8, 8, 3)))["params"]
