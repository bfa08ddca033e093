"""Fréchet Inception Distance and Inception Score, and the network of both.

The network is the Inception v3 of 2015, with which published numbers are computed, in
the form of pytorch-fid: 1008 classes, average pooling that excludes padding, and max
pooling in the last block. It differs from torchvision's.

References: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision",
2015, https://arxiv.org/abs/1512.00567; Heusel et al., "GANs Trained by a Two Time-Scale
Update Rule Converge to a Local Nash Equilibrium", 2017,
https://arxiv.org/abs/1706.08500; Salimans et al., "Improved Techniques for Training
GANs", 2016, https://arxiv.org/abs/1606.03498.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Params = Mapping[str, Any]

IMAGE_SIZE = 299
"""Side of the images that the network was trained on, in pixels."""

_logger = logging.getLogger(__name__)


class _Conv(NamedTuple):
    """A convolution without bias, batch normalization, and ReLU."""

    name: str
    features: int
    size: int | tuple[int, int]
    stride: int = 1
    padding: str = "SAME"


class _Pool(NamedTuple):
    """A pooling over 3x3 pixels."""

    function: Callable[..., jax.Array]
    stride: int = 1
    padding: str = "SAME"


_AVERAGE = _Pool(functools.partial(nn.avg_pool, count_include_pad=False))
_MAX = _Pool(nn.max_pool)
_HALVE = _Pool(nn.max_pool, 2, "VALID")


# A list is a sequence of layers. A tuple holds branches, whose outputs are joined.
_Layers: TypeAlias = "list[_Conv | _Pool | tuple[_Layers, ...]]"


def _mixed_5(pooled: int) -> _Layers:
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


def _mixed_6(inner: int) -> _Layers:
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


def _mixed_7(pool: _Pool) -> _Layers:
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


_BLOCKS: dict[str, _Layers] = {
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
    """The network. The names of its parameters are those of pytorch-fid's file."""

    @nn.compact
    def __call__(self, images: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Compute features ``[N, 2048]`` and logits ``[N, 1008]``.

        Args:
          images: ``[N, 299, 299, 3]`` in [-1, 1]; other sizes of at least 75 pixels
            work too.
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
    def __call__(self, x: jax.Array) -> jax.Array:
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


def _run(layers: _Layers, x: jax.Array, prefix: str) -> jax.Array:
    """Apply layers; to be called within a compact method."""
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
    """Compute the inputs of the Fréchet Inception Distance and the Inception Score.

    Images are resized to 299 x 299 as by pytorch-fid: bilinear, with pixel centers
    aligned and without antialiasing.

    Args:
      params: Parameters from `load_inception_params`.
      images: ``[N, H, W, 3]`` RGB, uint8, or float in [0, 1].

    Returns:
      Float32 features ``[N, 2048]``, the mean of the last block over positions; and
      logits ``[N, 1008]`` without the bias of the last layer, as in the code of
      Salimans et al.

    Raises:
      ValueError: If the shape or the dtype of the images is wrong.
    """
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
        raise ValueError(f"images must be [N, H, W, 3], got shape {images.shape}.")
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    elif not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be uint8 or float, got {images.dtype}.")
    shape = (len(images), IMAGE_SIZE, IMAGE_SIZE, 3)
    images = jax.image.resize(
        images.astype(jnp.float32), shape, "bilinear", antialias=False
    )
    outputs = InceptionV3().apply(params, 2 * images - 1)
    return cast(tuple[jax.Array, jax.Array], outputs)  # apply has no precise type.


def frechet_distance(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """Compute the Fréchet distance of Gaussians fitted to two sets of features.

    The distance is ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, with means m
    and covariances C. For Inception features it is the FID. If ``C_a = X^T X`` for the
    centered features X, then ``C_a C_b`` has the eigenvalues of ``X C_b X^T``, and
    zeros. This matrix is symmetric, so the trace is the sum of the roots of its
    eigenvalues, and no matrix root is needed.

    Fewer samples give larger values, even for equal distributions, so compare only
    values of equal numbers of samples. If there are fewer samples than features, a
    warning is logged.

    Args:
      features_a: ``[n_a, D]``, at least 2 samples.
      features_b: ``[n_b, D]``, at least 2 samples.

    Returns:
      The distance, computed in float64.

    Raises:
      ValueError: If the shapes are wrong or the features are not finite.
    """
    a, b = (
        _as_rows(x, name)
        for x, name in ((features_a, "features_a"), (features_b, "features_b"))
    )
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            "features_a and features_b must have the same number of features, got "
            f"shapes {a.shape} and {b.shape}."
        )
    samples = min(len(a), len(b))
    if samples < a.shape[1]:
        _logger.warning(
            "The Fréchet distance of %d samples of %d features is far larger than that "
            "of many samples; compare it only with values of as many samples.",
            samples,
            a.shape[1],
        )
    offset = a.mean(axis=0) - b.mean(axis=0)
    a, b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b))
    if len(a) > a.shape[1]:
        a = np.linalg.qr(a, mode="r")  # Has the same X^T X.
    squares = np.linalg.eigvalsh(a @ (b.T @ b) @ a.T)
    cross = np.sqrt(squares.clip(0)).sum()
    distance = offset @ offset + np.sum(a * a) + np.sum(b * b) - 2 * cross
    return max(float(distance), 0.0)  # Rounding can make it negative.


def inception_score(logits: ArrayLike, *, splits: int = 10) -> tuple[float, float]:
    """Compute the Inception Score: its mean and standard deviation over splits.

    The score of a split is ``exp(mean KL(p(y|x) || p(y)))``. Splits are consecutive
    samples.

    Args:
      logits: ``[N, classes]``; see `features_and_logits`.
      splits: Number of equal parts. The default, 10, is the paper's, for 50,000
        samples.

    Returns:
      The mean, from 1 to the number of classes, and the (population) standard
      deviation, computed in float64.

    Raises:
      ValueError: If the shape is wrong, the logits are not finite, or there are fewer
        samples than splits.
    """
    rows = _as_rows(logits, "logits")
    if not 1 <= splits <= len(rows):
        raise ValueError(
            f"splits must be between 1 and the number of samples, {len(rows)}, got "
            f"{splits}."
        )
    log_p = rows - rows.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    scores = []
    ends = [i * len(rows) // splits for i in range(1, splits)]
    for part in np.split(log_p, ends):
        p = np.exp(part)
        # The maximum gives 0 log 0 = 0 for classes that no sample has.
        marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp(np.mean(np.sum(p * (part - marginal), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def _as_rows(x: ArrayLike, name: str) -> np.ndarray:
    rows = np.asarray(x, np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"{name} must be [samples >= 2, D], got shape {rows.shape}.")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} must be finite.")
    return rows
