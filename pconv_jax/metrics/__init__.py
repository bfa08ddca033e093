"""How alike images are: l1, PSNR, SSIM; `lpips`; and of sets of images, `inception`.

The metrics with networks are modules of their own, to be imported by name.
"""

from pconv_jax.metrics.image import l1 as l1
from pconv_jax.metrics.image import l1_hole as l1_hole
from pconv_jax.metrics.image import psnr as psnr
from pconv_jax.metrics.image import ssim as ssim
