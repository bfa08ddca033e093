"""Fréchet Inception Distance and Inception Score, and the network of both.

The network is the Inception v3 of 2015 that published numbers are of, in the form of
pytorch-fid: 1008 classes, average pooling that leaves padding out, and max pooling in
the last block. It differs from torchvision's.

References: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision",
2015, https://arxiv.org/abs/1512.00567; Heusel et al., "GANs Trained by a Two Time-Scale
Update Rule Converge to a Local Nash Equilibrium", 2017,
https://arxiv.org/abs/1706.08500; Salimans et al., "Improved Techniques for Training
GANs", 2016, https://arxiv.org/abs/1606.03498.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Params = Mapping[str, Any]
_SIZE = 299

_logger = logging.getLogger(__name__)


class _Conv(NamedTuple):
    """Convolution without bias, batch normalization, ReLU."""

    name: str
    features: int
    size: int | tuple[int, int]
    stride: int = 1
    padding: str = "SAME"


class _Pool(NamedTuple):
    """Pooling over 3x3."""

    function: Callable[..., jax.Array]
    stride: int = 1
    padding: str = "SAME"


_AVERAGE = _Pool(functools.partial(nn.avg_pool, count_include_pad=False))
_MAX = _Pool(nn.max_pool)
_HALVE = _Pool(nn.max_pool, 2, "VALID")


# A list of layers is a sequence; a tuple of lists is branches, to be concatenated.


def _mixed_5(pooled):
    return [
        (
            [_Conv("branch1x1", 64, 1)],
            [_Conv("branch5x5_1", 48, 1), _Conv("branch5x5_2", 64, 5)],
            [
                _Conv("branch3x3dbl_1", 64, 1),
                _Conv("branch3x3dbl_2", 96, 3),
                _Conv("branch3x3dbl_3", 96, 3),
            ],
            [_AVERAGE, _Conv("branch_pool", pooled, 1)],
        )
    ]


def _mixed_6(inner):
    return [
        (
            [_Conv("branch1x1", 192, 1)],
            [
                _Conv("branch7x7_1", inner, 1),
                _Conv("branch7x7_2", inner, (1, 7)),
                _Conv("branch7x7_3", 192, (7, 1)),
            ],
            [
                _Conv("branch7x7dbl_1", inner, 1),
                _Conv("branch7x7dbl_2", inner, (7, 1)),
                _Conv("branch7x7dbl_3", inner, (1, 7)),
                _Conv("branch7x7dbl_4", inner, (7, 1)),
                _Conv("branch7x7dbl_5", 192, (1, 7)),
            ],
            [_AVERAGE, _Conv("branch_pool", 192, 1)],
        )
    ]


def _mixed_7(pool):
    return [
        (
            [_Conv("branch1x1", 320, 1)],
            [
                _Conv("branch3x3_1", 384, 1),
                (
                    [_Conv("branch3x3_2a", 384, (1, 3))],
                    [_Conv("branch3x3_2b", 384, (3, 1))],
                ),
            ],
            [
                _Conv("branch3x3dbl_1", 448, 1),
                _Conv("branch3x3dbl_2", 384, 3),
                (
                    [_Conv("branch3x3dbl_3a", 384, (1, 3))],
                    [_Conv("branch3x3dbl_3b", 384, (3, 1))],
                ),
            ],
            [pool, _Conv("branch_pool", 192, 1)],
        )
    ]


_BLOCKS = {
    "": [
        _Conv("Conv2d_1a_3x3", 32, 3, 2, "VALID"),
        _Conv("Conv2d_2a_3x3", 32, 3, 1, "VALID"),
        _Conv("Conv2d_2b_3x3", 64, 3),
        _HALVE,
        _Conv("Conv2d_3b_1x1", 80, 1),
        _Conv("Conv2d_4a_3x3", 192, 3, 1, "VALID"),
        _HALVE,
    ],
    "Mixed_5b.": _mixed_5(32),
    "Mixed_5c.": _mixed_5(64),
    "Mixed_5d.": _mixed_5(64),
    "Mixed_6a.": [
        (
            [_Conv("branch3x3", 384, 3, 2, "VALID")],
            [
                _Conv("branch3x3dbl_1", 64, 1),
                _Conv("branch3x3dbl_2", 96, 3),
                _Conv("branch3x3dbl_3", 96, 3, 2, "VALID"),
            ],
            [_HALVE],
        )
    ],
    "Mixed_6b.": _mixed_6(128),
    "Mixed_6c.": _mixed_6(160),
    "Mixed_6d.": _mixed_6(160),
    "Mixed_6e.": _mixed_6(192),
    "Mixed_7a.": [
        (
            [_Conv("branch3x3_1", 192, 1), _Conv("branch3x3_2", 320, 3, 2, "VALID")],
            [
                _Conv("branch7x7x3_1", 192, 1),
                _Conv("branch7x7x3_2", 192, (1, 7)),
                _Conv("branch7x7x3_3", 192, (7, 1)),
                _Conv("branch7x7x3_4", 192, 3, 2, "VALID"),
            ],
            [_HALVE],
        )
    ],
    "Mixed_7b.": _mixed_7(_AVERAGE),
    "Mixed_7c.": _mixed_7(_MAX),
}


class InceptionV3(nn.Module):
    """The network. Names of parameters are those of pytorch-fid's file."""

    @nn.compact
    def __call__(self, images: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Returns features ``[N, 2048]`` and logits ``[N, 1008]``.

        Args:
          images: ``[N, 299, 299, 3]`` in [-1, 1]; other sizes from 75 pixels will do.
        """
        x = jnp.asarray(images)
        for prefix, layers in _BLOCKS.items():
            x = _run(layers, x, prefix)
        features = jnp.mean(x, axis=(1, 2))
        dense = nn.Dense(
            1008, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc"
        )
        return features, dense(features)


class _ConvUnit(nn.Module):
    conv: _Conv

    @nn.compact
    def __call__(self, x):
        _, features, size, stride, padding = self.conv
        x = nn.Conv(
            features,
            size if isinstance(size, tuple) else (size, size),
            strides=stride,
            padding=padding,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )(x)
        x = nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x)
        return nn.relu(x)


def _run(layers, x, prefix):
    """Applies layers, within a compact method."""
    for layer in layers:
        match layer:
            case _Conv():
                x = _ConvUnit(layer, name=prefix + layer.name)(x)
            case _Pool():
                strides = (layer.stride, layer.stride)
                x = layer.function(x, (3, 3), strides, layer.padding)
            case branches:
                x = jnp.concatenate([_run(b, x, prefix) for b in branches], axis=-1)
    return x


def features_and_logits(
    params: Params, images: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Returns what Fréchet Inception Distance and Inception Score are made of.

    Images are resized to 299 x 299 as pytorch-fid does: bilinear, pixels' centres
    aligned, without a filter against aliasing.

    Args:
      params: of `load_inception_params`.
      images: ``[N, H, W, 3]`` RGB, uint8, or float in [0, 1].

    Returns:
      Float32 features ``[N, 2048]``, the mean of the last block's; and logits
      ``[N, 1008]`` without the last layer's bias, which the code of Salimans et al.
      leaves out.

    Raises:
      ValueError: If the images are not such.
    """
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
        raise ValueError(f"images must be [N, H, W, 3], got shape {images.shape}")
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    elif not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be uint8 or float, got {images.dtype}")
    shape = (len(images), _SIZE, _SIZE, 3)
    images = jax.image.resize(
        images.astype(jnp.float32), shape, "bilinear", antialias=False
    )
    return InceptionV3().apply(params, 2 * images - 1)


def frechet_distance(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """Returns the Fréchet distance of Gaussians fitted to two sets of features.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with means m and covariances C;
    of Inception's features it is the FID. With C_a = X^T X of the centred features X,
    the eigenvalues of C_a C_b are those of X C_b X^T, and zeros. This is symmetric: the
    sum of their roots is the trace, and no root of a matrix is needed.

    Fewer samples give larger values, of the same distribution even: compare only values
    of as many. Where they are fewer than the features there is a warning in the log.

    Args:
      features_a: ``[n_a, D]``, at least 2 samples.
      features_b: ``[n_b, D]``.

    Returns:
      The distance, computed in float64.

    Raises:
      ValueError: If the features are not such, or not finite.
    """
    a, b = (
        _as_rows(x, name)
        for x, name in ((features_a, "features_a"), (features_b, "features_b"))
    )
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            "features_a and features_b must have the same number of features, got "
            f"shapes {a.shape} and {b.shape}"
        )
    samples = min(len(a), len(b))
    if samples < a.shape[1]:
        _logger.warning(
            "A Fréchet distance of %d samples of %d features lies far above that of "
            "many; compare it only with those of as many samples.",
            samples,
            a.shape[1],
        )
    offset = a.mean(axis=0) - b.mean(axis=0)
    a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b))
    if len(a) > a.shape[1]:
        a = np.linalg.qr(a, mode="r")  # Of which X^T X is the same.
    squares = np.linalg.eigvalsh(a @ (b.T @ b) @ a.T)
    cross = np.sqrt(squares.clip(0)).sum()
    distance = offset @ offset + np.sum(a * a) + np.sum(b * b) - 2 * cross
    return max(float(distance), 0.0)  # Rounding can make nothing less than that.


def inception_score(logits: ArrayLike, *, splits: int = 10) -> tuple[float, float]:
    """Returns the mean and the standard deviation over splits of the Inception Score.

    Of each split, in the order that the samples come in, exp(mean KL(p(y|x) || p(y))).

    Args:
      logits: ``[N, classes]``, see `features_and_logits`.
      splits: number of equal parts, 10 in the paper, which has 50,000 samples.

    Returns:
      Mean, from 1 to the number of classes, and (population) standard deviation,
      computed in float64.

    Raises:
      ValueError: If the logits are not such or not finite, or fewer than splits.
    """
    logits = _as_rows(logits, "logits")
    if not 1 <= splits <= len(logits):
        raise ValueError(
            f"splits must be between 1 and the number of samples, {len(logits)}, got "
            f"{splits}"
        )
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    scores = []
    ends = [i * len(logits) // splits for i in range(1, splits)]
    for part in np.split(log_p, ends):
        p = np.exp(part)
        # A class that no sample has any of: 0 log 0 = 0.
        marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp(np.mean(np.sum(p * (part - marginal), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def _as_rows(x, name):
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"{name} must be [samples >= 2, D], got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite")
    return x
