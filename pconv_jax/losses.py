"""The terms of the paper's loss, and their weighted sum.

Contract of this module: images are ``[N, H, W, C]`` in [-1, 1], masks ``[N, H, W, 1]``
with 1 = valid and 0 = hole. Every loss returns one number per example, ``[N]`` in
float32 (float64 for images in float64). The pixel losses are divided by N_I = C H W,
the number of *all* values of the image, as in version 2 of the paper. So the mean over
a batch does not depend on the number of devices that share it.

Reference: Liu et al. 2018, section 3.3, equations 3 to 7. `log_mse` is not in the
paper.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from pconv_jax import ops

# Maps images [N, H, W, C] to feature maps [N, h, w, c], e.g. pool1, pool2, pool3.
FeaturesFn = Callable[[jax.Array], Sequence[jax.Array]]


class LossWeights(NamedTuple):
    """Weights of the terms in the total.

    The defaults are those of equation 7 of the paper; `log_mse` is left out.
    """

    valid: float = 1.0
    hole: float = 6.0
    perceptual: float = 0.05
    style_out: float = 120.0
    style_comp: float = 120.0
    total_variation: float = 0.1
    log_mse: float = 0.0


PAPER_WEIGHTS = LossWeights()
"""The weights of equation 7 of the paper."""


def inpainting_loss(
    output: ArrayLike,
    target: ArrayLike,
    mask: ArrayLike,
    *,
    features_fn: FeaturesFn | None,
    weights: LossWeights = PAPER_WEIGHTS,
) -> dict[str, jax.Array]:
    """Compute every term of the loss, and the weighted ``total`` (equation 7).

    Args:
      output: I_out, ``[N, H, W, C]`` in [-1, 1].
      target: I_gt, of the same shape.
      mask: ``[N, H, W, 1]``, 1 = valid, 0 = hole.
      features_fn: Network of the perceptual and style terms, e.g.
        ``functools.partial(vgg16_features, params)``. None leaves these terms out.
      weights: Weights of the terms in the total. The defaults are the paper's.

    Returns:
      ``total`` and each term that is computed, by its name in `LossWeights`, each
      ``[N]``: without ``features_fn`` there are no perceptual and style terms, and with
      a weight of 0 there is no ``log_mse``.

    Raises:
      ValueError: If shapes do not fit, or ``weights`` are no `LossWeights`.
    """
    if not isinstance(weights, LossWeights):
        raise ValueError(
            f"weights must be LossWeights({', '.join(LossWeights._fields)}), got "
            f"{weights!r}."
        )
    output, target, mask = _check(output, target, mask)
    comp = ops.composite(output, target, mask)
    terms = {
        "valid": valid(output, target, mask),
        "hole": hole(output, target, mask),
        "total_variation": total_variation(comp, mask),
    }
    # Under jit, a weight may be an array whose value is not known yet.
    if isinstance(weights.log_mse, jax.Array) or weights.log_mse:
        terms["log_mse"] = log_mse(comp, target)
    if features_fn is not None:
        terms |= feature_terms(output, comp, target, features_fn=features_fn)
    total = jnp.asarray(
        sum(getattr(weights, name) * term for name, term in terms.items())
    )
    return {"total": total, **terms}


def feature_terms(
    output: jax.Array, comp: jax.Array, target: jax.Array, *, features_fn: FeaturesFn
) -> dict[str, jax.Array]:
    """Compute the terms of `inpainting_loss` that compare features.

    Args:
      output: I_out, ``[N, H, W, C]`` in [-1, 1].
      comp: I_comp, of the same shape.
      target: I_gt, of the same shape.
      features_fn: As in `inpainting_loss`.

    Returns:
      ``perceptual``, ``style_out`` and ``style_comp``, each ``[N]``.
    """
    out_features, comp_features = features_fn(output), features_fn(comp)
    gt_features = lax.stop_gradient(features_fn(lax.stop_gradient(target)))
    return {
        "perceptual": perceptual(out_features, gt_features)
        + perceptual(comp_features, gt_features),
        "style_out": style(out_features, gt_features),
        "style_comp": style(comp_features, gt_features),
    }


def hole(output: ArrayLike, target: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Compute L_hole, ``|(1 - M) (I_out - I_gt)|_1 / N_I`` (equation 3), ``[N]``."""
    output, target, mask = _check(output, target, mask)
    return _mean(jnp.where(mask, 0, jnp.abs(_wide(output) - _wide(target))))


def valid(output: ArrayLike, target: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Compute L_valid, ``|M (I_out - I_gt)|_1 / N_I`` (equation 3), ``[N]``."""
    output, target, mask = _check(output, target, mask)
    return _mean(jnp.where(mask, jnp.abs(_wide(output) - _wide(target)), 0))


def perceptual(
    features: Sequence[ArrayLike], target_features: Sequence[ArrayLike]
) -> jax.Array:
    """Compute one of the two sums of L_perceptual (equation 4), ``[N]``.

    The sum is ``sum_p |P_p(I) - P_p(I_gt)|_1 / N_p``, where N_p is the size of the p-th
    map. The paper adds the sums of I_out and of I_comp.

    Args:
      features: The maps P_p(I), each ``[N, h, w, c]``.
      target_features: The maps P_p(I_gt), of the same shapes.

    Raises:
      ValueError: If shapes do not fit.
    """
    return jnp.asarray(
        sum(
            _mean(jnp.abs(_wide(a) - _wide(b)))
            for a, b in _pairs(features, target_features)
        )
    )


def style(
    features: Sequence[ArrayLike], target_features: Sequence[ArrayLike]
) -> jax.Array:
    """Compute L_style of an image (equations 5 and 6), ``[N]``.

    The loss is ``sum_p 1/C_p^2 |K_p (G_p(I) - G_p(I_gt))|_1``, where ``G = P^T P`` is
    the Gram matrix, summed over positions, and ``K_p = 1 / (C_p H_p W_p)``.

    Args:
      features: The maps P_p(I), each ``[N, h, w, c]``.
      target_features: The maps P_p(I_gt), of the same shapes.

    Raises:
      ValueError: If shapes do not fit.
    """
    return jnp.asarray(
        sum(
            _mean(jnp.abs(gram(a) - gram(b)))
            for a, b in _pairs(features, target_features)
        )
    )


def gram(features: ArrayLike) -> jax.Array:
    """Compute the scaled Gram matrix K P^T P, ``[N, c, c]`` in float32.

    Args:
      features: The map P, ``[N, h, w, c]``. The scale K is 1 / (c h w).

    Raises:
      ValueError: If the features do not have four axes.
    """
    features = jnp.asarray(features)
    if features.ndim != 4:
        raise ValueError(f"features must be [N, h, w, c], got {features.shape}.")
    height, width, channels = features.shape[1:]
    # The loss is a difference of these sums, so they have full precision in float32 or
    # wider. TF32 is enough for the features, not for the sums. Products of bfloat16 are
    # exact in float32 anyway, and full precision would be several times slower on GPUs.
    wide = ops.wide_dtype(features.dtype)
    product = jnp.einsum(
        "nhwc,nhwd->ncd",
        features,
        features,
        precision=lax.Precision.HIGHEST if wide == features.dtype else None,
        preferred_element_type=wide,
    )
    return product / (channels * height * width)


def total_variation(comp: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Compute L_tv, the smoothing penalty in and around the hole, ``[N]``.

    The penalty is the sum of ``|I_comp(p) - I_comp(q)| / N_I`` over horizontal and
    vertical neighbors p and q that *both* lie in R, the hole dilated by one pixel.

    Args:
      comp: I_comp, ``[N, H, W, C]``.
      mask: ``[N, H, W, 1]``, 1 = valid, 0 = hole.

    Raises:
      ValueError: If shapes do not fit.
    """
    comp = jnp.asarray(comp)
    if comp.ndim != 4:
        raise ValueError(f"comp must be [N, H, W, C], got {comp.shape}.")
    _, _, mask = _check(comp, comp, mask)
    # Updating the inverted mask dilates the hole: a pixel is in the region if the hole
    # reaches into the window around it.
    region = ops.update_mask(~mask, (3, 3))
    comp, size = _wide(comp), math.prod(comp.shape[1:])
    total = jnp.zeros((), comp.dtype)
    for axis in (1, 2):
        length = comp.shape[axis]
        a, b = (lax.slice_in_dim(comp, i, length - 1 + i, axis=axis) for i in (0, 1))
        both = lax.slice_in_dim(region, 0, length - 1, axis=axis) & (
            lax.slice_in_dim(region, 1, length, axis=axis)
        )
        difference = jnp.where(both, jnp.abs(a - b), 0)
        total += difference.sum(axis=(1, 2, 3)) / size
    return total


def log_mse(comp: ArrayLike, target: ArrayLike, *, epsilon: float = 1e-5) -> jax.Array:
    """Compute ``ln(|I_comp - I_gt|_2^2 / N_I + epsilon)``, ``[N]``.

    Up to a constant and epsilon, this is -0.23 times the PSNR of the composite. It
    rewards the factor by which an error shrinks, so small holes count as much as large
    ones, which dominate the gradient of the other terms. It is not in the paper.

    Args:
      comp: I_comp, ``[N, H, W, C]``.
      target: I_gt, of the same shape.
      epsilon: Mean squared error below which an improvement hardly counts. The default,
        1e-5, is a PSNR of 56 dB.

    Raises:
      ValueError: If shapes do not fit.
    """
    comp, target = jnp.asarray(comp), jnp.asarray(target)
    if comp.ndim != 4 or comp.shape != target.shape:
        raise ValueError(
            "comp and target must be [N, H, W, C] of the same shape, got "
            f"{comp.shape} and {target.shape}."
        )
    return jnp.log(_mean((_wide(comp) - _wide(target)) ** 2) + epsilon)


def _check(
    output: ArrayLike, target: ArrayLike, mask: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Convert images to arrays and their mask to bool."""
    output, target, mask = map(jnp.asarray, (output, target, mask))
    if output.ndim != 4 or output.shape != target.shape:
        raise ValueError(
            "output and target must be [N, H, W, C] of the same shape, got "
            f"{output.shape} and {target.shape}."
        )
    if mask.shape != (*output.shape[:-1], 1):
        raise ValueError(
            f"mask must be of shape {(*output.shape[:-1], 1)}, got {mask.shape}."
        )
    ops.check_mask(mask, output)
    return output, target, ops.is_valid(mask)


def _pairs(
    features: Sequence[ArrayLike], target_features: Sequence[ArrayLike]
) -> Iterator[tuple[ArrayLike, ArrayLike]]:
    shapes, target_shapes = (
        [jnp.shape(x) for x in f] for f in (features, target_features)
    )
    if shapes != target_shapes:
        raise ValueError(
            "features must be arrays of the same shapes as target_features, got "
            f"{shapes} and {target_shapes}."
        )
    return zip(features, target_features)


def _wide(x: ArrayLike) -> jax.Array:
    """Convert to float32 or wider, so that differences are not bfloat16."""
    x = jnp.asarray(x)
    return x.astype(ops.wide_dtype(x.dtype))


def _mean(x: jax.Array) -> jax.Array:
    """Average each example."""
    return _wide(x).mean(axis=tuple(range(1, x.ndim)))
