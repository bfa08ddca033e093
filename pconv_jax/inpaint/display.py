"""Images as a page shows them, and what is painted on them."""

from typing import Any

import cv2
import numpy as np
from PIL import Image

from pconv_jax.inpaint.hole import dilate_hole, resize_hole
from pconv_jax.inpaint.modes import as_array
from pconv_jax.inpaint.values import to_uint8

SIDE = 1024  # Longest side in pixels of a shown image.
PAINT = (255, 45, 149)  # Where to fill.
KEEP_OUT = (0, 140, 255)  # Where not to copy from.


def shape_of(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """Return the height and the width of an image."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    height, width = image.shape[:2]
    return height, width


def shrink(image: Image.Image | np.ndarray) -> Image.Image:
    """Convert an image to 8-bit RGB at the page's size, on a white background."""
    if isinstance(image, Image.Image) and image.mode in ("L", "LA", "RGB", "RGBA"):
        scale = SIDE / max(image.size)
        if scale < 1:  # First, since copies of a large image take memory.
            width, height = (max(round(n * scale), 1) for n in image.size)
            image = image.resize((width, height), reducing_gap=2.0)
    shown = Image.fromarray(to_uint8(as_array(image)))
    if shown.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", shown.size, "white")
        shown = Image.alpha_composite(white, shown.convert("RGBA"))
    shown = shown.convert("RGB")
    shown.thumbnail((SIDE, SIDE))
    return shown


def painted_area(
    drawing: dict[str, Any] | None,
    color: tuple[int, int, int],
    shape: tuple[int, int],
    *,
    margin: int = 0,
) -> np.ndarray:
    """Find where one of the two colors is painted, at the image's size.

    Args:
      drawing: What was painted, as Gradio's editor gives it.
      color: The color, `PAINT` or `KEEP_OUT`. The browser mixes the two where strokes
        meet, and what is mixed counts as the nearer one.
      shape: Height and width of the image.
      margin: Number of pixels of the page by which the area grows. The default is 0.
    """
    other = KEEP_OUT if color == PAINT else PAINT
    found = np.zeros(shape, bool)
    for layer in (drawing or {}).get("layers") or ():
        pixels = np.asarray(layer.convert("RGBA")).astype(int)
        near, far = (np.abs(pixels[..., :3] - c).sum(-1) for c in (color, other))
        area = (pixels[..., 3] > 0) & (near < far)
        found |= resize_hole(dilate_hole(area, margin), shape)
    return found


def draw_depth(image: Image.Image, depth: np.ndarray) -> Image.Image:
    """Draw an image in gray, and its hole in the colors of the fill depth."""
    depth = cv2.resize(depth, image.size, interpolation=cv2.INTER_NEAREST)
    colors = _colors(int(depth.max(initial=1)))
    gray = np.asarray(image.convert("L").convert("RGB"))
    hole = (depth > 0)[..., None]
    mixed = 0.3 * gray + 0.7 * colors[np.maximum(depth, 1) - 1]
    return Image.fromarray(np.where(hole, mixed, gray).astype(np.uint8))


def depth_legend(depth: np.ndarray) -> str:
    """Explain the colors of `draw_depth`, in HTML."""
    colors = _colors(int(depth.max(initial=1)))
    chips = "".join(
        f"<span style='background: rgb({r}, {g}, {b})'>{level}</span>"
        for level, (r, g, b) in enumerate(colors, 1)
        if np.any(depth == level)
    )
    text = "encoder stage at which a pixel becomes valid"
    return f"<div class='legend'>{chips} {text}</div>"


def _colors(levels: int) -> np.ndarray:
    """Choose a color for each fill depth from 1 on, uint8 ``[levels, 3]``."""
    ramp = np.linspace(255, 40, levels).astype(np.uint8)[:, None]
    return cv2.applyColorMap(ramp, cv2.COLORMAP_PLASMA)[:, 0, ::-1]
