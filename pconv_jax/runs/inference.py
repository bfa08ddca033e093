"""Pure functions that run and score a network on a batch."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pconv_jax import masks, metrics, ops
from pconv_jax.unet import PConvUNet

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def fill_step(
    variables: Mapping[str, Any], batch: Batch, *, model: PConvUNet
) -> dict[str, jax.Array]:
    """Fill the holes of a batch.

    Args:
      variables: ``params`` and ``batch_stats`` of the network.
      batch: ``image``, uint8 ``[N, H, W, C]``, and ``mask``, ``[N, H, W, 1]``.
      model: The network.

    Returns:
      ``output``, uint8 ``[N, H, W, C]``, the network's images, for valid pixels too;
      and ``finite``, bool ``[N]``, whether all values of an image were finite.
    """
    images, mask = prepare_batch(batch)
    output, _ = model.apply(variables, images, mask)
    return {
        "output": to_uint8(output),
        "finite": jnp.isfinite(output).all(axis=(1, 2, 3)),
    }


def score_step(batch: Batch) -> Metrics:
    """Compare filled images with the truth.

    Args:
      batch: ``image``, the truth, and ``output``, uint8 ``[N, H, W, 3]``; and ``mask``,
        ``[N, H, W, 1]``.

    Returns:
      ``[N]`` numbers for each of `pconv_jax.metrics`: of the composite, which takes
      valid pixels from the truth; of the output itself, with the prefix ``output_``;
      and the ``hole_ratio``.
    """
    truth, output, mask = batch["image"], batch["output"], batch["mask"]
    comp = ops.composite(output, truth, mask)
    truth, output, comp = (x.astype(jnp.float32) / 255 for x in (truth, output, comp))
    return {
        "l1": metrics.l1(comp, truth),
        "l1_hole": metrics.l1_hole(comp, truth, mask),
        "psnr": metrics.psnr(comp, truth),
        "ssim": metrics.ssim(comp, truth),
        "output_l1": metrics.l1(output, truth),
        "output_psnr": metrics.psnr(output, truth),
        "output_ssim": metrics.ssim(output, truth),
        "hole_ratio": masks.hole_ratio(mask),
    }


def prepare_batch(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Convert a batch to images in [-1, 1] and masks, both float32.

    Args:
      batch: ``image``, uint8 ``[N, H, W, C]``, and ``mask``, ``[N, H, W, 1]``.

    Raises:
      ValueError: If the images are not uint8.
    """
    images = batch["image"]
    if images.dtype != jnp.uint8:
        raise ValueError(f"image must be uint8, got {images.dtype}.")
    mask = ops.is_valid(batch["mask"])
    return images.astype(jnp.float32) / 127.5 - 1, mask.astype(jnp.float32)


def to_uint8(images: jax.Array) -> jax.Array:
    """Convert images from [-1, 1] to uint8; values outside the range are clipped."""
    return jnp.rint((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)
