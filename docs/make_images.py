"""Makes the images of the documentation: ``python docs/make_images.py``.

The photos are those that scikit-image brings along. Masks are drawn here, and the
bundled network fills them, as ``pconv inpaint`` does.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from pconv_jax import Inpainter

IMAGES = Path(__file__).parent / "images"
HEIGHT = 300
GAP = 6


def scratches(size: tuple[int, int]) -> Image.Image:
    """Draw a mask of scratches and of a line of text."""
    mask, draw = blank(size)
    rng = np.random.default_rng(4)
    for _ in range(9):
        points = rng.uniform(-0.1, 1.1, (2, 2)) * size
        bend = points.mean(0) + rng.normal(0, 12, 2)
        line = [tuple(points[0]), tuple(bend), tuple(points[1])]
        draw.line(line, fill=255, width=int(rng.integers(2, 6)), joint="curve")
    text = "SAMPLE PHOTO  "
    draw.text((18, size[1] - 70), text, fill=255, font=ImageFont.load_default(44))
    return mask.point(lambda value: 255 * (value > 127))


def polygons(size: tuple[int, int], *shapes: list[tuple[int, int]]) -> Image.Image:
    """Draw a mask of filled polygons."""
    mask, draw = blank(size)
    for shape in shapes:
        draw.polygon(shape, fill=255)
    return mask


def ellipses(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Image.Image:
    """Draw a mask of filled ellipses."""
    mask, draw = blank(size)
    for box in boxes:
        draw.ellipse(box, fill=255)
    return mask


def blank(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Make an empty mask, and what draws on it."""
    mask = Image.new("L", size)
    return mask, ImageDraw.Draw(mask)


def painted(photo: Image.Image, mask: Image.Image) -> Image.Image:
    """Show a hole as a brush of an image editor would."""
    return Image.composite(Image.new("RGB", photo.size, (255, 0, 255)), photo, mask)


def strip(images: list[Image.Image]) -> Image.Image:
    """Put images of equal height beside each other."""
    scaled = []
    for image in images:
        size = round(HEIGHT * image.width / image.height), HEIGHT
        scaled.append(image.convert("RGB").resize(size))
    width = sum(image.width for image in scaled) + GAP * (len(scaled) - 1)
    whole, x = Image.new("RGB", (width, HEIGHT), "white"), 0
    for image in scaled:
        whole.paste(image, (x, 0))
        x += image.width + GAP
    return whole


def stack(rows: list[Image.Image]) -> Image.Image:
    """Put rows below each other, all as wide as the narrowest."""
    width = min(row.width for row in rows)
    rows = [row.resize((width, round(row.height * width / row.width))) for row in rows]
    height = sum(row.height for row in rows) + GAP * (len(rows) - 1)
    whole, y = Image.new("RGB", (width, height), "white"), 0
    for row in rows:
        whole.paste(row, (0, y))
        y += row.height + GAP
    return whole


def main() -> None:
    """Write all images."""
    inpainter = Inpainter.from_pretrained()
    cat, astronaut, rocket, coffee = (
        Image.fromarray(photo)
        for photo in (data.chelsea(), data.astronaut(), data.rocket(), data.coffee())
    )
    masts = polygons(
        rocket.size,
        [(192, 112), (206, 112), (222, 400), (160, 400)],
        [(440, 112), (454, 112), (486, 400), (426, 400)],
    )
    patch = ellipses(astronaut.size, (126, 338, 216, 426))
    face = ellipses(astronaut.size, (176, 70, 276, 200))
    spoon = polygons(
        coffee.size,
        [
            (392, 70),
            (424, 62),
            (432, 84),
            (396, 220),
            (412, 250),
            (404, 300),
            (380, 332),
        ]
        + [(340, 336), (316, 310), (316, 270), (346, 236), (372, 214), (384, 150)],
    )

    def rows(*cases: tuple[Image.Image, Image.Image]) -> Image.Image:
        strips = [strip([painted(*case), inpainter(*case)]) for case in cases]
        return stack(strips)

    text = scratches(cat.size)
    images = {
        "repair": rows((cat, text), (rocket, masts)),
        "mask": strip([astronaut, patch, inpainter(astronaut, patch)]),
        "failures": rows((coffee, spoon), (astronaut, face)),
    }
    for name, image in images.items():
        image.save(IMAGES / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
