"""LPIPS, the learned perceptual distance of two images, version 0.1.

The distance compares features of a network trained on ImageNet, at five depths. The
network is AlexNet (``'alex'``, the usual one for evaluation) or VGG16 (``'vgg'``).
Features are scaled to unit length at every position. Their squared differences are
weighted, with weights fitted to human judgments of pairs of images, and averaged over
positions.

Reference: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric", 2018, https://arxiv.org/abs/1801.03924, equation 1.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pconv_jax._images import IMAGENET_MEAN, IMAGENET_STD
from pconv_jax.metrics.image import check_pair
from pconv_jax.vgg import apply_features_for

Params = Mapping[str, Any]


class _Conv(NamedTuple):
    name: str
    features: int
    size: int = 3
    stride: int = 1
    padding: int = 1


class _Stage(NamedTuple):
    """Optional max pooling of stride 2, then convolutions with ReLU: a feature map."""

    pool: int | None
    convs: tuple[_Conv, ...]


class _Network(NamedTuple):
    stages: tuple[_Stage, ...]
    smallest: int  # Side of the smallest image with a pixel at every depth.


NETWORKS = {
    "alex": _Network(
        stages=(
            _Stage(None, (_Conv("conv1", 64, size=11, stride=4, padding=2),)),
            _Stage(3, (_Conv("conv2", 192, size=5, padding=2),)),
            _Stage(3, (_Conv("conv3", 384),)),
            _Stage(None, (_Conv("conv4", 256),)),
            _Stage(None, (_Conv("conv5", 256),)),
        ),
        smallest=31,
    ),
    "vgg": _Network(
        stages=tuple(
            _Stage(
                2 if block > 1 else None,
                tuple(_Conv(f"conv{block}_{i}", features) for i in range(1, convs + 1)),
            )
            for block, features, convs in (
                (1, 64, 2),
                (2, 128, 2),
                (3, 256, 3),
                (4, 512, 3),
                (5, 512, 3),
            )
        ),
        smallest=16,
    ),
}


class LPIPS(nn.Module):
    """The network of the distance.

    Attributes:
      net: ``'alex'`` (the default) or ``'vgg'``.
    """

    net: str = "alex"

    @nn.compact
    def __call__(self, a: ArrayLike, b: ArrayLike) -> jax.Array:
        """Compute the distances ``[N]`` of images ``[N, H, W, 3]`` in [0, 1]."""
        if self.net not in NETWORKS:
            known = " or ".join(map(repr, NETWORKS))
            raise ValueError(f"net must be {known}, got {self.net!r}.")
        network = NETWORKS[self.net]
        a, b = check_pair(a, b)
        if a.shape[-1] != 3 or min(a.shape[1:3]) < network.smallest:
            raise ValueError(
                f"a and b must be RGB images of at least {network.smallest} x "
                f"{network.smallest} pixels, got shape {a.shape}."
            )
        # Equals the shift and scale of the original, which takes images in [-1, 1].
        mean, std = (jnp.array(x, a.dtype) for x in (IMAGENET_MEAN, IMAGENET_STD))
        x = (jnp.concatenate([a, b]) - mean) / std
        distance = jnp.zeros(len(a), a.dtype)
        for depth, (pool, convs) in enumerate(network.stages):
            if pool:
                x = nn.max_pool(x, (pool, pool), strides=(2, 2))
            for conv in convs:
                x = nn.Conv(
                    conv.features,
                    (conv.size, conv.size),
                    strides=conv.stride,
                    padding=conv.padding,
                    precision=jax.lax.Precision.HIGHEST,
                    name=conv.name,
                )(x)
                x = nn.relu(x)
            a_features, b_features = jnp.split(_to_unit_length(x), 2)
            weights = self.param(f"lin{depth}", nn.initializers.ones, x.shape[-1:])
            squares = jnp.square(a_features - b_features)
            difference = jnp.sum(weights * squares, axis=-1)
            distance += jnp.mean(difference, axis=(1, 2))
        return distance


def distance(params: Params, a: ArrayLike, b: ArrayLike) -> jax.Array:
    """Compute the LPIPS distance of each pair of images.

    Args:
      params: Parameters from `load_lpips_params`.
      a: Images ``[N, H, W, 3]``, RGB in [0, 1], at least 31 pixels high and wide, or 16
        with VGG16.
      b: Images of the same shape.

    Returns:
      Float32 ``[N]``, nonnegative; 0 for equal images.

    Raises:
      ValueError: If the shapes are not equal, not those of RGB images, or too small.
    """
    net = "vgg" if "conv1_1" in params else "alex"
    return cast(jax.Array, LPIPS(net).apply({"params": params}, a, b))


def vgg_distance(params: Params, a: ArrayLike, b: ArrayLike) -> jax.Array:
    """Compute a distance like LPIPS without learned weights of the features.

    The features are those of the training loss, ``pool1`` to ``pool3``, all with equal
    weights.

    Args:
      params: Parameters of a VGG16 or VGG19; see `load_vgg_params`.
      a: Images ``[N, H, W, 3]``, RGB in [0, 1], at least 8 pixels high and wide.
      b: Images of the same shape.

    Returns:
      Float32 ``[N]`` in [0, 6]; 0 for equal images.

    Raises:
      ValueError: If the shapes are not equal, not those of RGB images, or too small.
    """
    a, b = check_pair(a, b)
    with jax.default_matmul_precision("highest"):  # Equal numbers on all devices.
        pools = apply_features_for(params)(params, 2 * jnp.concatenate([a, b]) - 1)
    pairs = [jnp.split(_to_unit_length(x), 2) for x in pools]
    return jnp.asarray(
        sum(jnp.square(x - y).sum(axis=-1).mean(axis=(1, 2)) for x, y in pairs)
    )


def _to_unit_length(x: jax.Array) -> jax.Array:
    # The gradient of a root is infinite at 0, and the 1e-10 of the original is added
    # after the root.
    squares = jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-30)
    return x / (jnp.sqrt(squares) + 1e-10)
