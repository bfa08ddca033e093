"""PNG files, and grids of images."""

import io
import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pconv_jax import _files

_GAP = 2  # Pixels between the images of a grid.
_CAPTION_HEIGHT = 18


def write_png(path: pathlib.Path, image: np.ndarray) -> None:
    """Write an image as PNG, complete or not at all.

    Args:
      path: The file.
      image: uint8 ``[H, W, 3]``.

    Raises:
      ValueError: If the image has another shape or dtype.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            "image must be uint8 of shape [H, W, 3], "
            f"got {image.dtype} of shape {list(image.shape)}."
        )
    png = io.BytesIO()
    Image.fromarray(image).save(png, format="PNG")
    _files.write_bytes(path, png.getvalue())


def image_grid(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Lay out images in a grid: a row for each example, under captioned columns.

    Args:
      columns: Images by caption, from left to right: uint8 ``[N, H, W, 3]``, all of one
        shape.

    Returns:
      uint8 ``[H', W', 3]``: a white image with a strip of captions on top.

    Raises:
      ValueError: If there is no column, or if an array differs in shape or is not uint8
        ``[N, H, W, 3]``.
    """
    images = {name: np.asarray(x) for name, x in columns.items()}
    shapes = {name: x.shape for name, x in images.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"columns must be images of one shape, got {shapes}.")
    if any(x.dtype != np.uint8 for x in images.values()):
        raise ValueError("columns must be images of uint8.")
    shape = next(iter(shapes.values()))
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"columns must be images [N, H, W, 3], got {list(shape)}.")
    height, width = shape[1:3]
    rows, count = shape[0], len(images)
    grid = np.full(
        (
            _CAPTION_HEIGHT + rows * (height + _GAP) - _GAP,
            count * (width + _GAP) - _GAP,
            3,
        ),
        255,
        np.uint8,
    )
    for column, (name, examples) in enumerate(images.items()):
        left = column * (width + _GAP)
        grid[:_CAPTION_HEIGHT, left : left + width] = _caption(name, width)
        for row, example in enumerate(examples):
            top = _CAPTION_HEIGHT + row * (height + _GAP)
            grid[top : top + height, left : left + width] = example
    return grid


def _caption(text: str, width: int) -> np.ndarray:
    """Draw black text on a white strip, as large as fits into its width."""
    strip = Image.new("RGB", (width, _CAPTION_HEIGHT), "white")
    draw = ImageDraw.Draw(strip)
    sizes = range(13, 6, -1)
    fonts = [ImageFont.load_default(size) for size in sizes]
    fitting = [font for font in fonts if font.getlength(text) <= width]
    middle = (width / 2, _CAPTION_HEIGHT / 2)
    draw.text(middle, text, "black", (fitting or fonts[-1:])[0], anchor="mm")
    return np.asarray(strip)
