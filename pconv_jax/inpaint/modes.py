"""Conversion of Pillow images of any mode to arrays, and pasting of filled pixels."""

import numpy as np
from PIL import Image

from pconv_jax._errors import UserError

_STRIP = 256  # Rows that are pasted at once: copies of all would take memory.


def to_array(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to gray or RGB values, and alpha if it has any.

    Args:
      image: Image of any mode except Lab and premultiplied alpha.

    Returns:
      ``[H, W]`` or ``[H, W, C]`` with C = 2, 3 or 4: uint8, uint16 or float32.

    Raises:
      UserError: If the image has another mode.
    """
    mode = image.mode
    if mode in ("L", "LA", "RGB", "RGBA", "F"):
        return np.asarray(image)
    if mode == "1":
        return np.asarray(image.convert("L"))
    if mode in ("P", "PA"):
        alpha = mode == "PA" or "transparency" in image.info
        return np.asarray(image.convert("RGBA" if alpha else "RGB"))
    if mode in ("CMYK", "YCbCr", "HSV", "RGBX"):
        return np.asarray(image.convert("RGB"))
    if mode == "I" or mode.startswith("I;16"):
        array = np.asarray(image)
        if array.min(initial=0) >= 0 and array.max(initial=0) < 2**16:
            return array.astype(np.uint16)
    raise UserError(
        f"image has Pillow's mode {mode!r}, which cannot be repaired; convert it, "
        "e.g. image.convert('RGB')."
    )


def as_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """Convert an image to an array; see `to_array` for Pillow images."""
    return to_array(image) if isinstance(image, Image.Image) else np.asarray(image)


def alpha_of(array: np.ndarray) -> np.ndarray | None:
    """Get the alpha channel of an image ``[H, W, C]`` with C = 2 or 4, else None."""
    return array[..., -1] if array.shape[2:] in ((2,), (4,)) else None


def paste(image: Image.Image, array: np.ndarray, hole: np.ndarray) -> Image.Image:
    """Copy a Pillow image with other pixels in its hole.

    Args:
      image: The image. The copy has its mode, palette, metadata and other pixels.
      array: New pixels, as from `to_array`. They equal the image's outside the hole.
      hole: Bool ``[H, W]``.
    """
    if image.mode.startswith("I;16"):  # Pillow cannot paste into this mode.
        new = Image.fromarray(np.ascontiguousarray(array))
        new.info = dict(image.info)
        return new
    result = image.copy()
    for top in range(0, image.height, _STRIP):
        part = hole[top : top + _STRIP]
        if part.any():
            new = _to_mode_of(image, array[top : top + _STRIP])
            mask = Image.fromarray(part.astype(np.uint8) * 255)
            result.paste(new, (0, top), mask)
    return result


def _to_mode_of(image: Image.Image, array: np.ndarray) -> Image.Image:
    """Convert values, as from `to_array`, to what can be pasted into an image."""
    if image.mode == "I":
        array = array.astype(np.int32)
    new = Image.fromarray(np.ascontiguousarray(array))
    if image.mode == "1":
        return new.convert("1", dither=Image.Dither.NONE)
    return _to_palette(new, image) if image.mode == "P" else new.convert(image.mode)


def swap_red_and_blue(array: np.ndarray) -> np.ndarray:
    """Convert RGB to BGR, as OpenCV has it, or back; alpha stays the last channel."""
    order = [2, 1, 0, 3][: array.shape[2]]
    return np.ascontiguousarray(array[..., order])


def _to_palette(new: Image.Image, image: Image.Image) -> Image.Image:
    """Convert an image to the nearest colors of another image's palette.

    Only the most opaque colors of the palette are used, so that filled pixels are seen.

    Returns:
      An image of mode L with the indices of the colors.
    """
    palette = np.reshape(image.getpalette("RGB"), (-1, 3)).astype(np.uint8)
    alpha = np.full(len(palette), 255)
    clear = image.info.get("transparency", b"")
    if isinstance(clear, int):
        alpha[clear : clear + 1] = 0  # The index may be beyond the palette.
    else:  # A value for each of the first colors.
        alpha[: len(clear)] = list(clear)[: len(alpha)]
    # Fill all 256 places of a palette: the first colors come again.
    indices = np.resize(np.flatnonzero(alpha == alpha.max()), 256)
    opaque = Image.new("P", (1, 1))
    opaque.putpalette(palette[indices].tobytes())
    nearest = np.asarray(new.convert("RGB").quantize(palette=opaque))
    return Image.fromarray(indices[nearest].astype(np.uint8))
