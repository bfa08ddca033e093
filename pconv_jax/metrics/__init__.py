"""Metrics of image quality.

This package exports the metrics of pairs of images: `l1`, `l1_hole`, `psnr`, `ssim`.
Metrics with networks are in modules of their own: `lpips` compares pairs of images, and
`inception` compares sets of images.
"""

from pconv_jax.metrics.image import l1 as l1
from pconv_jax.metrics.image import l1_hole as l1_hole
from pconv_jax.metrics.image import psnr as psnr
from pconv_jax.metrics.image import ssim as ssim
