"""Image metrics, one number for each pair of images.

Images are float ``[N, H, W, C]`` with values in [0, 1], unless ``max_val`` is given;
masks are ``[N, H, W, 1]``, 1 = valid, 0 = hole. Every metric returns float32 ``[N]``.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pconv_jax import ops

SSIM_WINDOW = 11
"""Side of the windows of `ssim`, in pixels."""


def l1(a: ArrayLike, b: ArrayLike) -> jax.Array:
    """Compute the mean absolute error over all pixels and channels.

    Times 100, it is the "l1 (%)" of Liu et al. 2018, table 1.

    Args:
      a: Images ``[N, H, W, C]``.
      b: Images ``[N, H, W, C]``.

    Returns:
      Float32 ``[N]``, in units of the images.

    Raises:
      ValueError: If the shapes are not equal or do not have four axes.
    """
    a, b = check_pair(a, b)
    return jnp.mean(jnp.abs(a - b), axis=(1, 2, 3))


def l1_hole(a: ArrayLike, b: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Compute the mean absolute error over the pixels of the hole.

    Args:
      a: Images ``[N, H, W, C]``.
      b: Images ``[N, H, W, C]``.
      mask: ``[N, H, W, 1]``, 1 = valid, 0 = hole.

    Returns:
      Float32 ``[N]``, in units of the images; 0 where there is no hole.

    Raises:
      ValueError: If the shapes do not fit.
    """
    a, b = check_pair(a, b)
    mask = jnp.asarray(mask)
    if mask.shape != (*a.shape[:3], 1):
        raise ValueError(
            f"mask must have shape {(*a.shape[:3], 1)} for images of shape {a.shape}, "
            f"got {mask.shape}."
        )
    hole = ~ops.is_valid(mask)
    error = jnp.where(hole, jnp.abs(a - b), 0).sum(axis=(1, 2, 3))
    count = jnp.sum(hole, axis=(1, 2, 3)) * a.shape[-1]
    return error / jnp.maximum(count, 1)


def psnr(a: ArrayLike, b: ArrayLike, *, max_val: float = 1.0) -> jax.Array:
    """Compute the peak signal-to-noise ratio, 10 log10(max_val^2 / mean squared error).

    Args:
      a: Images ``[N, H, W, C]``.
      b: Images ``[N, H, W, C]``.
      max_val: Distance between the lowest and the highest possible value. The default
        is 1.

    Returns:
      Float32 ``[N]`` in dB, inf for equal images.

    Raises:
      ValueError: If the shapes are not equal or do not have four axes.
    """
    a, b = check_pair(a, b)
    error = jnp.mean(jnp.square(a - b), axis=(1, 2, 3))
    return 20 * jnp.log10(max_val) - 10 * jnp.log10(error)


def ssim(a: ArrayLike, b: ArrayLike, *, max_val: float = 1.0) -> jax.Array:
    """Compute the structural similarity (Wang et al. 2004) with their constants.

    Windows are Gaussian, of 11 pixels with sigma 1.5; K1 = 0.01 and K2 = 0.03. The
    result is the mean over channels and over all windows that lie inside the image. It
    equals scikit-image's ``structural_similarity`` with ``gaussian_weights=True`` and
    ``use_sample_covariance=False``.

    Args:
      a: Images ``[N, H, W, C]``, at least 11 pixels high and wide.
      b: Images ``[N, H, W, C]``.
      max_val: Distance between the lowest and the highest possible value. The default
        is 1.

    Returns:
      Float32 ``[N]`` in [-1, 1], 1 for equal images.

    Raises:
      ValueError: If the shapes are not equal, do not have four axes, or are too small.
    """
    a, b = check_pair(a, b)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"a and b must be at least {SSIM_WINDOW} pixels high and wide, the size of "
            f"the window, got {a.shape[1]}x{a.shape[2]}."
        )
    c1, c2 = (0.01 * max_val) ** 2, (0.03 * max_val) ** 2
    # Variances are differences of mean squares. Without the mean of the image, the
    # squares are small, so that float32 keeps the digits that matter.
    center = jnp.mean((a + b) / 2, axis=(1, 2), keepdims=True)
    a, b = a - center, b - center
    mean_a, mean_b, aa, bb, ab = _window_means(jnp.stack([a, b, a * a, b * b, a * b]))
    variances = aa - mean_a**2 + bb - mean_b**2
    covariance = ab - mean_a * mean_b
    mean_a, mean_b = mean_a + center, mean_b + center
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def check_pair(a: ArrayLike, b: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Convert two batches of images to float32.

    Raises:
      ValueError: If the shapes are not equal, do not have four axes, or the images are
        not float.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(
            "a and b must have the same shape [N, H, W, C], got "
            f"{a.shape} and {b.shape}."
        )
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (a, b)):
        raise ValueError(
            f"a and b must be float images, got {a.dtype} and {b.dtype}; divide uint8 "
            "images by 255."
        )
    return a.astype(jnp.float32), b.astype(jnp.float32)


def _window_means(images: jax.Array) -> jax.Array:
    """Compute Gaussian means over all 11 x 11 windows inside ``[..., H, W, C]``."""
    distance = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-0.5 * (distance / 1.5) ** 2)
    weights /= weights.sum()
    for axis in (-3, -2):
        size = images.shape[axis] - SSIM_WINDOW + 1
        # A sum of eleven shifted images, not a convolution: XLA fuses it, and it is
        # float32 on every device.
        images = jnp.asarray(
            sum(
                weight * jax.lax.slice_in_dim(images, i, i + size, axis=axis)
                for i, weight in enumerate(weights.tolist())
            )
        )
    return images
