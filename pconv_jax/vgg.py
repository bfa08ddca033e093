"""VGG features for the perceptual and style losses.

Only the first three blocks are built, up to ``pool3``. Images are ``[N, H, W, 3]`` RGB
in [-1, 1]; normalization to what the networks were trained on happens inside, so that
weights, which lie in the ordinary parameter tree ``{'conv1_1': {'kernel', 'bias'},
...}``, are those of torchvision, transposed.

Reference: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale
Image Recognition", 2015, https://arxiv.org/abs/1409.1556.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.typing import ArrayLike

# Mean and standard deviation of ImageNet's RGB values in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
                x = nn.relu(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            pools.append(x)
        return tuple(pools)


class VGG16Features(VGGFeatures):
    """VGG16 up to ``pool3``, as the paper has it."""

    convs: Sequence[int] = (2, 2, 3)


class VGG19Features(VGGFeatures):
    """VGG19 up to ``pool3``."""

    convs: Sequence[int] = (2, 2, 4)


def vgg16_features(
    params: Mapping[str, Any], images: ArrayLike, *, dtype: Dtype | None = None
) -> tuple[jax.Array, ...]:
    """Returns ``pool1``, ``pool2`` and ``pool3`` of a VGG16; see `VGGFeatures`."""
    return VGG16Features(dtype=dtype).apply({"params": params}, images)


def vgg19_features(
    params: Mapping[str, Any], images: ArrayLike, *, dtype: Dtype | None = None
) -> tuple[jax.Array, ...]:
    """Returns ``pool1``, ``pool2`` and ``pool3`` of a VGG19; see `VGGFeatures`."""
    return VGG19Features(dtype=dtype).apply({"params": params}, images)
