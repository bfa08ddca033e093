"""Repair of image files, with the options of the command ``pconv inpaint``."""

import warnings
from pathlib import Path

from pconv_jax._errors import UserError
from pconv_jax.inpaint import image_io
from pconv_jax.inpaint.formats import MAX_PIXELS, find_images
from pconv_jax.inpaint.hole import hole_from_color
from pconv_jax.inpaint.inpainter import Inpainter


def repair_file(
    inpainter: Inpainter,
    image: Path,
    output: Path,
    *,
    mask: Path | None = None,
    mask_color: str | None = None,
    tolerance: int = 0,
    invert_mask: bool = False,
    resize_mask: bool = False,
    dilate: int = 0,
    seed: int = 0,
    exclude: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    force: bool = False,
) -> list[str]:
    """Fill the hole of an image file, and write the result with the file's metadata.

    The hole comes from a mask or a color. Without either, it is where the image is
    transparent, or not finite.

    Args:
      inpainter: Repairs the image.
      image: Path of the image.
      output: Path of the file to write.
      mask: Path of a mask, or of a folder with a mask of the image's name, with any
        suffix. By default there is none.
      mask_color: CSS color of the hole. By default there is none.
      tolerance: See `hole_from_color`. The default is 0.
      invert_mask: See `Inpainter`. The default is False.
      resize_mask: See `Inpainter`. The default is False.
      dilate: See `Inpainter`. The default is 0.
      seed: See `Inpainter`. The default is 0.
      exclude: Path of a mask, or of a folder of masks like ``mask``: white where not to
        copy detail from. By default there is none.
      max_pixels: Larger images are refused. The default is 100,000,000.
      force: Whether to replace an existing file. The default is False.

    Returns:
      Warnings, each once.

    Raises:
      UserError: If the image cannot be read or repaired, or the file exists.
      RunError: If the file cannot be written.
    """
    if output.exists() and not force:
        raise UserError(f"there is a file {output} already; --force replaces it.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = image_io.read(image, max_pixels=max_pixels)
        if mask_color is not None:
            hole = hole_from_color(file.image, mask_color, tolerance=tolerance)
        else:
            hole = _find_mask(image, mask)
        repaired = inpainter(
            file.image,
            hole,
            invert_mask=invert_mask,
            resize_mask=resize_mask,
            dilate=dilate,
            seed=seed,
            exclude=_find_mask(image, exclude),
        )
        image_io.write(output, file._replace(image=repaired))
    return list(dict.fromkeys(str(warning.message) for warning in caught))


def _find_mask(image: Path, mask: Path | None) -> Path | None:
    if mask is None or not mask.is_dir():
        return mask
    found = [path for path in find_images(mask) if path.stem == image.stem]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"there must be one mask {image.stem}.* in {mask}; found: {names}."
        )
    return found[0]
