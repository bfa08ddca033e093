"""What a repair works on: the colors of an image, and which of them to fill.

Images and masks come as files, Pillow images and arrays of many kinds. `InputReader`
converts and checks them.
"""

import os
import warnings
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import numpy as np
from PIL import ExifTags, Image

from pconv_jax._errors import UserError
from pconv_jax.inpaint import image_io, modes, values
from pconv_jax.inpaint.hole import (
    dilate_hole,
    hole_from_alpha,
    hole_from_mask,
    resize_hole,
)
from pconv_jax.inpaint.progress import Progress

# Hole ratio above which a mask may be inverted.
_SUSPICIOUS_RATIO = 0.6

# Files of measurements have numbers from 1e19 on, such as 1e20, for missing values.
_MISSING_VALUE = 1e19

_INVERTED = (
    "White is filled; if the hole is black here, invert the mask: --invert-mask, or in "
    "Python invert_mask=True."
)

PathLike = str | os.PathLike[str]
LoadedImage = Image.Image | np.ndarray | jax.Array
ImageLike = LoadedImage | PathLike
# Not Sequence[ImageLike], because a str is a sequence of str.
ImageSequence = (
    Sequence[LoadedImage | os.PathLike[str]] | list[str] | tuple[ImageLike, ...]
)
MaskLike = ImageLike | ImageSequence | None


class Options(NamedTuple):
    """Options of a repair; see `Inpainter`."""

    invert_mask: bool
    resize_mask: bool
    dilate: int
    seed: int
    exclude: MaskLike
    sharp: bool
    progress: Progress


class Inputs(NamedTuple):
    """An image, and what to fill in it.

    Attributes:
      image: The image as it was given, or as its file has it.
      array: The image as an array, ``[H, W]`` or ``[H, W, C]``.
      channels: Number of its color channels.
      has_alpha: Whether alpha is one channel more.
      hole: Bool ``[H, W]``, True where to fill.
      known: Bool ``[H, W]``, True where colors are valid: outside the hole, and not
        transparent.
      exclude: Bool ``[H, W]``, True where not to copy from.
    """

    image: LoadedImage
    array: np.ndarray
    channels: int
    has_alpha: bool
    hole: np.ndarray
    known: np.ndarray
    exclude: np.ndarray


class InputReader:
    """Converts and checks what a caller gives for an image and its mask."""

    def __init__(
        self,
        channels: int,
        *,
        value_range: tuple[float, float] | None,
        max_pixels: int,
    ):
        """Describe the images that the network takes.

        Args:
          channels: Number of channels of the network.
          value_range: The range of float images, or None for data that are not images.
          max_pixels: Largest number of pixels of an image file.
        """
        self._channels = channels
        self._value_range = value_range
        self._max_pixels = max_pixels

    def read(self, image: ImageLike, mask: MaskLike, options: Options) -> Inputs:
        """Read one image and its mask.

        Raises:
          UserError: As `Inpainter`.
        """
        if isinstance(image, str | os.PathLike):
            image = image_io.read(image, max_pixels=self._max_pixels).image
        image, masked = _split_masked(image)
        if not isinstance(image, Image.Image) and not hasattr(image, "dtype"):
            raise UserError(
                "image must be a path, a Pillow image or an array, got an object of "
                f"type {type(image).__name__}."
            )
        array = _to_numpy(image)
        # In an array, a last axis of 2 may as well be another measurement.
        has_alpha = self._channels > 1 or isinstance(image, Image.Image)
        color, alpha = self._split_alpha(array, has_alpha=has_alpha)
        hole = self._find_hole(image, color, alpha, mask, options, masked)
        # The colors of transparent pixels are arbitrary: not filled, and not used.
        known = ~hole if alpha is None else ~hole & (alpha > 0)
        self._check_values(color, known)
        _check_hole(hole, known)
        exclude = np.broadcast_to(False, hole.shape)
        if options.exclude is not None and hole.any():
            exclude = self._read_exclude(options, image, hole.shape)
        return Inputs(
            image, array, color.shape[-1], alpha is not None, hole, known, exclude
        )

    def _check_values(self, color: np.ndarray, known: np.ndarray) -> None:
        """Check the range of floats, strip by strip, since a copy takes memory."""
        if not values.is_float(color):
            return
        for top in range(0, len(color), 64):
            part = color[top : top + 64][known[top : top + 64]]
            if not part.size:
                continue
            if self._value_range is not None:
                _check_range(part, self._value_range)
            else:
                _check_missing_values(part)

    def _split_alpha(
        self, array: np.ndarray, *, has_alpha: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Split an image into views of its colors ``[H, W, C]`` and its alpha."""
        shape, n = array.shape, self._channels
        if len(shape) == 2:
            array = array[..., None]
        channels = array.shape[2] if array.ndim == 3 and array.size else 0
        gray = {1, 2} if n == 3 else set()  # A color network takes gray images, too.
        if channels not in {n, n + has_alpha} | gray:
            hint = ", or alpha as one channel more," if has_alpha else ""
            raise UserError(
                f"image must have the shape [H, W, {n}]{hint} for this network, got "
                f"{list(shape)}."
            )
        if array.dtype not in (bool, np.uint8, np.uint16) and not values.is_float(
            array
        ):
            raise UserError(
                f"image must be uint8, uint16, bool or floats, got {array.dtype}."
            )
        if channels == n or channels == 1:
            return array, None
        color, alpha = array[..., :-1], array[..., -1]
        if values.is_float(alpha):
            alpha = alpha.astype(np.float32)  # NumPy's functions lack bfloat16.
            finite = alpha[np.isfinite(alpha)]  # NaN is transparent.
            if finite.min(initial=0) < 0 or finite.max(initial=0) > 1:
                raise UserError(
                    "image must have an alpha in [0, 1] if it has floats, got "
                    f"{finite.min():g} to {finite.max():g}."
                )
        return color, alpha

    def _find_hole(
        self,
        image: LoadedImage,
        color: np.ndarray,
        alpha: np.ndarray | None,
        mask: MaskLike,
        options: Options,
        masked: np.ndarray | None,
    ) -> np.ndarray:
        """Find where to fill: in the mask, or where the image shows it."""
        missing = np.zeros(color.shape[:2], bool) if masked is None else masked
        if values.is_float(color):
            missing = missing | ~np.isfinite(color).all(axis=-1)
        if mask is not None:
            hole = self._read_mask(mask, invert=options.invert_mask)
            if hole.shape != missing.shape:
                if not options.resize_mask:
                    raise UserError(_sizes_differ(image, hole.shape, missing.shape))
                hole = resize_hole(hole, missing.shape)
        elif options.invert_mask:
            raise UserError("mask is needed for invert_mask: there is none.")
        elif options.resize_mask and options.exclude is None:
            raise UserError("mask is needed for resize_mask: there is none.")
        elif alpha is not None:
            hole = hole_from_alpha(alpha)
        elif values.is_float(color) or masked is not None:
            hole = missing
        else:
            raise UserError(
                "mask is needed: the image has no transparency that would show where "
                "to fill."
            )
        return dilate_hole(hole, options.dilate) | missing

    def _read_mask(
        self, mask: ImageLike | ImageSequence, *, invert: bool = False
    ) -> np.ndarray:
        if isinstance(mask, str | os.PathLike):
            mask = image_io.read(mask, max_pixels=self._max_pixels).image
        mask, open_pixels = _split_masked(cast(LoadedImage, mask))
        if not isinstance(mask, Image.Image):
            mask = np.asarray(mask)
            if values.is_float(mask):
                mask = mask.astype(np.float32)
        hole = hole_from_mask(mask, invert=invert)
        # Pixels that the mask leaves open are not filled.
        return hole if open_pixels is None else hole & ~open_pixels

    def _read_exclude(
        self, options: Options, image: LoadedImage, shape: tuple[int, ...]
    ) -> np.ndarray:
        exclude = self._read_mask(cast(ImageLike, options.exclude))
        if exclude.shape == shape:
            return exclude
        if not options.resize_mask:
            raise UserError(_sizes_differ(image, exclude.shape, shape, name="exclude"))
        return resize_hole(exclude, shape)


def _to_numpy(image: LoadedImage) -> np.ndarray:
    if isinstance(image, Image.Image):
        return modes.to_array(image)
    return np.asarray(image)


def _split_masked(image: LoadedImage) -> tuple[LoadedImage, np.ndarray | None]:
    """Split a masked array into its values and what is masked, ``[H, W]``."""
    if not isinstance(image, np.ma.MaskedArray):
        return image, None
    masked = np.ma.getmaskarray(image)
    # The values under the mask do not count, and may be out of range.
    array = np.where(masked, np.zeros((), image.dtype), image.data)
    return array, masked if masked.ndim == 2 else masked.any(axis=-1)


def _check_hole(hole: np.ndarray, known: np.ndarray) -> None:
    if not hole.any():
        warnings.warn("There is nothing to fill.", stacklevel=5)
    elif not known.any():
        raise UserError(f"mask: no valid pixel is left to fill from. {_INVERTED}")
    ratio = hole.mean()
    if ratio > _SUSPICIOUS_RATIO:
        warnings.warn(f"{ratio:.0%} of the image is filled. {_INVERTED}", stacklevel=5)


def _check_range(known: np.ndarray, value_range: tuple[float, float]) -> None:
    """Check that valid values are in a range, except for rounding."""
    low, high = value_range
    known = known.astype(np.float32)
    least, most = known.min(), known.max()
    rounding = 1e-5 * (high - low)
    if least < low - rounding or most > high + rounding:
        raise UserError(
            f"image must have floats in [{low:g}, {high:g}], got {least:g} to "
            f"{most:g}; set value_range, or None for data that are not images."
        )


def _check_missing_values(known: np.ndarray) -> None:
    """Check that there are no large numbers, which stand for missing values."""
    if known.size and np.abs(known.astype(np.float32)).max() >= _MISSING_VALUE:
        raise UserError(
            f"image has values of {_MISSING_VALUE:g} and more, which stand for missing "
            "values in files of measurements: make them NaN, or give a mask."
        )


def _sizes_differ(
    image: LoadedImage,
    mask: tuple[int, ...],
    shape: tuple[int, ...],
    *,
    name: str = "mask",
) -> str:
    height, width = shape
    hint = "resize it: --resize-mask, or in Python resize_mask=True"
    if mask == (width, height):
        hint = f"turn the {name} by 90 degrees"
        if isinstance(image, Image.Image):
            if image.getexif().get(ExifTags.Base.Orientation, 1) > 4:
                hint = "PIL.ImageOps.exif_transpose turns the image upright"
    return (
        f"{name} has {mask[1]} x {mask[0]} pixels, and the image has {width} x "
        f"{height}; {hint}."
    )
