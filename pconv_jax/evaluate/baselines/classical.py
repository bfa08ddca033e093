"""Classical baselines: methods that fill a hole from the same image, without a network.

Images are uint8 ``[H, W, 3]``; masks are ``[H, W]`` or ``[H, W, 1]``, 1 = valid and
0 = hole. No method sees the pixels in the hole. This module does not need JAX.

References: Bertalmio et al. 2001 (Navier-Stokes), Telea 2004, Damelin and Hoang 2018
(biharmonic), Barnes et al. 2009 (PatchMatch).
"""

from collections.abc import Callable, Mapping

import numpy as np

# Pixels around a hole that OpenCV's methods use; the radius in OpenCV's examples.
_RADIUS = 3


def fill(image: np.ndarray, mask: np.ndarray, *, method: str) -> np.ndarray:
    """Fill the hole of an image.

    Args:
      image: uint8 ``[H, W, 3]``. Its pixels in the hole do not matter.
      mask: ``[H, W]`` or ``[H, W, 1]``, 1 = valid and 0 = hole.
      method: One of `BASELINES`.

    Returns:
      uint8 ``[H, W, 3]``, with the valid pixels of ``image``.

    Raises:
      ValueError: If the method is unknown, shapes do not match, the image is all hole,
        or it has too few valid pixels for PatchMatch to copy from.
    """
    if method not in BASELINES:
        raise ValueError(
            f"method must be one of {', '.join(BASELINES)}, got {method!r}."
        )
    image, mask = np.asarray(image), np.asarray(mask)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}."
        )
    if mask.shape not in (image.shape[:2], (*image.shape[:2], 1)):
        raise ValueError(
            "mask must be [H, W] or [H, W, 1] and match the shape of image, "
            f"{list(image.shape)}, got {list(mask.shape)}."
        )
    hole = mask.reshape(image.shape[:2]) == 0
    if hole.all():
        raise ValueError("mask must have a valid pixel, but the image is all hole.")
    if not hole.any():
        return image.copy()
    # At the image border, OpenCV's methods do read pixels of the hole.
    holed = np.where(hole[..., None], np.uint8(0), image)
    filled = BASELINES[method](holed, hole)
    return np.where(hole[..., None], filled, image)


def versions() -> str:
    """List the versions of the libraries that the baselines use, in one line."""
    import cv2
    import scipy
    import skimage

    modules = (cv2, scipy, skimage)
    return " ".join(f"{module.__name__} {module.__version__}" for module in modules)


def _mean(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    return np.rint(image[~hole].mean(axis=0)).astype(np.uint8)


def _telea(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.inpaint(image, hole.astype(np.uint8), _RADIUS, cv2.INPAINT_TELEA)


def _navier_stokes(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.inpaint(image, hole.astype(np.uint8), _RADIUS, cv2.INPAINT_NS)


def _biharmonic(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    from skimage.restoration import inpaint_biharmonic

    # Splitting into regions gives the same equations, in many small systems.
    filled = inpaint_biharmonic(image, hole, split_into_regions=True, channel_axis=-1)
    return np.rint(np.clip(filled, 0, 1) * 255).astype(np.uint8)


def _patchmatch(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    from pconv_jax.evaluate.baselines import patchmatch

    return patchmatch.complete(image, hole)


BASELINES: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mean": _mean,
    "telea": _telea,
    "navier_stokes": _navier_stokes,
    "biharmonic": _biharmonic,
    "patchmatch": _patchmatch,
}
"""Functions of an image that is 0 in the hole, and of the hole, bool ``[H, W]``."""

DESCRIPTIONS: Mapping[str, str] = {
    "mean": "The mean of the valid pixels.",
    "telea": f"OpenCV's inpaint, Telea 2004, radius {_RADIUS}.",
    "navier_stokes": (
        f"OpenCV's inpaint, Bertalmio et al. 2001 (Navier-Stokes), radius {_RADIUS}."
    ),
    "biharmonic": "scikit-image's inpaint_biharmonic, Damelin and Hoang 2018.",
    "patchmatch": (
        "Patches of 7 x 7 pixels, matched by PatchMatch (Barnes et al. 2009), that "
        "vote at several scales (Wexler et al. 2007); this package's implementation."
    ),
}
"""A sentence about each of `BASELINES`."""
