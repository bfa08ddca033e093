"""The loss of the paper, term by term.

Contract of this module: images are ``[N, H, W, C]`` in [-1, 1], masks ``[N, H, W, 1]``
with 1 = valid and 0 = hole. Every loss returns one number an example, ``[N]`` in
float32, and is normalized by N_I = C H W, the number of *all* values of the image, as
in version 2 of the paper. So the mean over a batch does not depend on how many devices
share it.

Reference: Liu et al. 2018, section 3.3, equations 3 to 7. `log_mse` is not the paper's.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pconv_jax import ops

# Maps images [N, H, W, C] to feature maps [N, h, w, c], e.g. pool1, pool2, pool3.
FeaturesFn = Callable[[jax.Array], Sequence[jax.Array]]


class LossWeights(NamedTuple):
    """Weights of the terms in the total: equation 7 of the paper, and `log_mse`."""

    valid: float = 1.0
    hole: float = 6.0
    perceptual: float = 0.05
    style_out: float = 120.0
    style_comp: float = 120.0
    total_variation: float = 0.1
    log_mse: float = 0.0


PAPER_WEIGHTS = LossWeights()


def inpainting_loss(
    output: ArrayLike,
    target: ArrayLike,
    mask: ArrayLike,
    *,
    features_fn: FeaturesFn | None,
    weights: LossWeights = PAPER_WEIGHTS,
) -> dict[str, jax.Array]:
    """Returns every term of the loss, and the weighted ``total`` (equation 7).

    Args:
      output: I_out, ``[N, H, W, C]`` in [-1, 1].
      target: I_gt, of the same shape.
      mask: ``[N, H, W, 1]``, 1 = valid, 0 = hole.
      features_fn: the network of the perceptual and style terms, e.g.
        ``functools.partial(vgg16_features, params)``. None leaves these terms out.
      weights: of the terms in the total.

    Returns:
      ``total`` and one entry for each field of `LossWeights`, each ``[N]``; ``log_mse``
      only if it has a weight.

    Raises:
      ValueError: if shapes do not fit.
    """
    output, target, mask = _check(output, target, mask)
    comp = ops.composite(output, target, mask)
    terms = {
        "valid": valid(output, target, mask),
        "hole": hole(output, target, mask),
        "total_variation": total_variation(comp, mask),
    }
    if weights.log_mse:
        terms["log_mse"] = log_mse(comp, target)
    if features_fn is not None:
        out_features, comp_features = features_fn(output), features_fn(comp)
        gt_features = lax.stop_gradient(features_fn(lax.stop_gradient(target)))
        terms["perceptual"] = perceptual(out_features, gt_features) + perceptual(
            comp_features, gt_features
        )
        terms["style_out"] = style(out_features, gt_features)
        terms["style_comp"] = style(comp_features, gt_features)
    total = sum(getattr(weights, name) * term for name, term in terms.items())
    return {"total": total, **terms}


def hole(output: ArrayLike, target: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Returns L_hole = |(1 - M) (I_out - I_gt)|_1 / N_I (equation 3), ``[N]``."""
    output, target, mask = _check(output, target, mask)
    return _mean(jnp.where(mask > 0.5, 0, jnp.abs(output - target)))


def valid(output: ArrayLike, target: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Returns L_valid = |M (I_out - I_gt)|_1 / N_I (equation 3), ``[N]``."""
    output, target, mask = _check(output, target, mask)
    return _mean(jnp.where(mask > 0.5, jnp.abs(output - target), 0))


def perceptual(
    features: Sequence[ArrayLike], target_features: Sequence[ArrayLike]
) -> jax.Array:
    """Returns one of the two sums of L_perceptual (equation 4), ``[N]``.

    That is sum_p |P_p(I) - P_p(I_gt)|_1 / N_p, with N_p the size of the p-th map; the
    paper adds those of I_out and I_comp.

    Args:
      features: the maps P_p(I), each ``[N, h, w, c]``.
      target_features: the maps P_p(I_gt), of the same shapes.

    Raises:
      ValueError: if shapes do not fit.
    """
    return sum(
        _mean(jnp.abs(_wide(a) - _wide(b)))
        for a, b in _pairs(features, target_features)
    )


def style(
    features: Sequence[ArrayLike], target_features: Sequence[ArrayLike]
) -> jax.Array:
    """Returns L_style of an image (equations 5 and 6), ``[N]``.

    That is sum_p 1/C_p^2 |K_p (G_p(I) - G_p(I_gt))|_1 with the Gram matrices G = P^T P,
    summed over positions, and K_p = 1 / (C_p H_p W_p).

    Args:
      features: the maps P_p(I), each ``[N, h, w, c]``.
      target_features: the maps P_p(I_gt), of the same shapes.

    Raises:
      ValueError: if shapes do not fit.
    """
    return sum(
        _mean(jnp.abs(gram(a) - gram(b))) for a, b in _pairs(features, target_features)
    )


def gram(features: ArrayLike) -> jax.Array:
    """Returns the scaled Gram matrix K P^T P, ``[N, c, c]`` in float32.

    Args:
      features: P, ``[N, h, w, c]``; K is 1 / (c h w).
    """
    features = jnp.asarray(features)
    if features.ndim != 4:
        raise ValueError(f"features must be [N, h, w, c], got {features.shape}.")
    height, width, channels = features.shape[1:]
    # Summed in float32 at least, at full precision: tf32 would do for the features, but
    # the loss is a difference of these sums.
    wide = jnp.promote_types(features.dtype, jnp.float32)
    product = jnp.einsum(
        "nhwc,nhwd->ncd",
        features,
        features,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=wide,
    )
    return product / (channels * height * width)


def total_variation(comp: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Returns L_tv, the smoothing penalty in and around the hole, ``[N]``.

    The sum of |I_comp(p) - I_comp(q)| / N_I over horizontal and vertical neighbours p
    and q that lie *both* in R, the hole dilated by one pixel.

    Args:
      comp: I_comp, ``[N, H, W, C]``.
      mask: ``[N, H, W, 1]``, 1 = valid, 0 = hole.

    Raises:
      ValueError: if shapes do not fit.
    """
    comp, mask = jnp.asarray(comp), jnp.asarray(mask)
    if comp.ndim != 4:
        raise ValueError(f"comp must be [N, H, W, C], got {comp.shape}.")
    _check(comp, comp, mask)
    # A window around a pixel holds a hole where a window of *holes* covers it.
    region = ops.update_mask(mask <= 0.5, (3, 3))
    size = comp[0].size
    wide = jnp.promote_types(comp.dtype, jnp.float32)
    total = 0
    for axis in (1, 2):
        length = comp.shape[axis]
        a, b = (lax.slice_in_dim(comp, i, length - 1 + i, axis=axis) for i in (0, 1))
        both = lax.slice_in_dim(region, 0, length - 1, axis=axis) & (
            lax.slice_in_dim(region, 1, length, axis=axis)
        )
        difference = jnp.where(both, jnp.abs(a - b), 0)
        total += difference.sum(axis=(1, 2, 3), dtype=wide) / size
    return total


def log_mse(comp: ArrayLike, target: ArrayLike, *, epsilon: float = 1e-5) -> jax.Array:
    """Returns ln(|I_comp - I_gt|_2^2 / N_I + epsilon), ``[N]``.

    But for a constant and epsilon that is -0.23 times the PSNR of the composite. So
    what counts is by what factor an error shrinks, and a small hole counts as much as a
    large one, which has most of the other terms' gradient. Not in the paper.

    Args:
      comp: I_comp, ``[N, H, W, C]``.
      target: I_gt, of the same shape.
      epsilon: what counts as no error; 1e-5 is a PSNR of 56 dB.

    Raises:
      ValueError: if shapes do not fit.
    """
    comp, target = jnp.asarray(comp), jnp.asarray(target)
    if comp.ndim != 4 or comp.shape != target.shape:
        raise ValueError(
            "comp and target must be [N, H, W, C] of one shape, got "
            f"{comp.shape} and {target.shape}."
        )
    return jnp.log(_mean((_wide(comp) - _wide(target)) ** 2) + epsilon)


def _check(output, target, mask) -> tuple[jax.Array, jax.Array, jax.Array]:
    output, target, mask = map(jnp.asarray, (output, target, mask))
    if output.ndim != 4 or output.shape != target.shape:
        raise ValueError(
            "output and target must be [N, H, W, C] of one shape, got "
            f"{output.shape} and {target.shape}."
        )
    if mask.shape != (*output.shape[:-1], 1):
        raise ValueError(
            f"mask must be of shape {(*output.shape[:-1], 1)}, got {mask.shape}."
        )
    return output, target, mask


def _pairs(features, target_features):
    shapes, target_shapes = ([x.shape for x in f] for f in (features, target_features))
    if shapes != target_shapes:
        raise ValueError(
            "features must be of target_features' shapes, got "
            f"{shapes} and {target_shapes}."
        )
    return zip(features, target_features)


def _wide(x: ArrayLike) -> jax.Array:
    """Returns float32, or wider: features may be bfloat16, their differences not."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _mean(x: jax.Array) -> jax.Array:
    return _wide(x).mean(axis=tuple(range(1, x.ndim)))
