"""Makes the images of the documentation: ``python docs/make_images.py``.

The photos are those of ``docs/photos`` and of scikit-image. For the guide to repair,
masks are drawn here, and the bundled network fills them, as ``pconv inpaint`` does. For
the guide to evaluation, random masks are filled by three methods, as by ``pconv eval``.
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from pconv_jax import Inpainter, evaluate_run
from pconv_jax.evaluate.runner import EvalData

IMAGES = Path(__file__).parent / "images"
PHOTOS = Path(__file__).parent / "photos"
HEIGHT = 220
GAP = 6


def scratches(size: tuple[int, int], *, seed: int, count: int) -> Image.Image:
    """Draw a mask of bent scratches and of dust."""
    mask, draw = blank(size)
    rng = np.random.default_rng(seed)
    for _ in range(count):
        points = rng.uniform(-0.1, 1.1, (2, 2)) * size
        bend = points.mean(0) + rng.normal(0, 12, 2)
        line = [tuple(points[0]), tuple(bend), tuple(points[1])]
        draw.line(line, fill=255, width=int(rng.integers(2, 6)), joint="curve")
    for _ in range(4 * count):
        x, y = rng.uniform(0, 1, 2) * size
        radius = rng.uniform(1, 4)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


def text(
    size: tuple[int, int],
    line: str,
    height: int,
    place: tuple[int, int],
    lines: int = 1,
) -> Image.Image:
    """Draw a mask of a line of text, also several times."""
    mask, draw = blank(size)
    font = ImageFont.load_default(height)
    for number in range(lines):
        start = place[0], place[1] + number * 1.6 * height
        draw.text(start, line, fill=255, font=font, stroke_width=1)
    return mask.point([255 * (value > 60) for value in range(256)])


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


def draw_masks(size: tuple[int, int]) -> dict[str, Image.Image]:
    """Draw a mask for each photo of ``docs/photos``, as a person would."""
    return {
        "college": scratches(size, seed=1, count=10),
        "man": scratches(size, seed=2, count=10),
        "house": scratches(size, seed=5, count=12),
        "koalas": text(size, "SAMPLE", 80, (30, 160)),
        "steak": text(size, "12 08 '98", 34, (225, 350)),
        "alpacas": text(size, "© photo archive", 34, (60, 60), lines=5),
        "moon": ellipses(size, (126, 19, 274, 166)),
        "glove": ellipses(
            size, (186, 76, 282, 162), (268, 66, 374, 144), (322, 40, 396, 112)
        ),
        "field": polygons(
            size,
            [(165, 275), (250, 275), (262, 352), (160, 352)],
            [(128, 232), (150, 222), (190, 222), (212, 250), (190, 284), (150, 284)],
        ),
        "savanna": polygons(
            size,
            [(222, 228), (250, 192), (290, 183), (335, 195), (358, 228), (345, 240)]
            + [(340, 300), (240, 300), (230, 240)],
        ),
        "lions": polygons(
            size, [(0, 220), (30, 140), (130, 130), (145, 200), (145, 310), (0, 310)]
        ),
        "statue": polygons(
            size,
            [(60, 15), (112, 15), (132, 120), (168, 230), (190, 400), (0, 400)]
            + [(20, 260), (45, 130)],
        ),
        "player": polygons(
            size,
            [(222, 92), (295, 98), (305, 135), (350, 142), (395, 180), (395, 218)]
            + [(335, 210), (355, 265), (400, 290), (400, 335), (335, 310), (330, 375)]
            + [(235, 375), (240, 345), (270, 330), (250, 265), (218, 250), (218, 170)]
            + [(232, 160)],
        ),
        "street": polygons(
            size,
            [(163, 148), (208, 148), (214, 240), (206, 275), (330, 375), (375, 400)]
            + [(262, 400), (176, 300), (163, 240)],
        ),
        "tree": polygons(
            size,
            [(44, 60), (105, 8), (200, 8), (290, 30), (352, 100), (342, 190)]
            + [(270, 220), (218, 245), (207, 302), (148, 302), (126, 248), (56, 218)]
            + [(40, 150)],
        ),
    }


def examples() -> dict[str, Image.Image]:
    """Evaluate the bundled network, and take the median and the worst examples.

    The same as ``pconv eval --weights photos --images FOLDER --image-size 256
    --examples 5 --methods network,repair,telea --no-learned``.
    """
    with tempfile.TemporaryDirectory() as folder:
        photos, out = Path(folder, "photos"), Path(folder, "out")
        photos.mkdir()
        for name in ("astronaut", "chelsea", "coffee", "rocket"):
            Image.fromarray(getattr(data, name)()).save(photos / f"{name}.png")
        Image.fromarray(data.stereo_motorcycle()[0]).save(photos / "motorcycle.png")
        evaluate_run(
            weights="photos",
            methods=["network", "repair", "telea"],
            data=EvalData(images=str(photos), image_size=256, examples=5),
            learned=False,
            out=out,
        )
        files = {"gallery": "pictures.png", "gallery-worst": "worst.png"}
        return {name: Image.open(out / file).copy() for name, file in files.items()}


def gallery(inpainter: Inpainter) -> Image.Image:
    """Repair the photos of ``docs/photos``, three pairs a row."""
    pairs = []
    for name, mask in draw_masks((400, 400)).items():
        photo = Image.open(PHOTOS / f"{name}.webp").convert("RGB")
        pairs.append(strip([painted(photo, mask), inpainter(photo, mask)]))
    starts = range(0, len(pairs), 3)
    return stack([strip(pairs[start : start + 3]) for start in starts])


def main() -> None:
    """Write all images."""
    inpainter = Inpainter.from_pretrained()
    astronaut, coffee = (
        Image.fromarray(photo) for photo in (data.astronaut(), data.coffee())
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

    images = {
        "repair": gallery(inpainter),
        "mask": strip([astronaut, patch, inpainter(astronaut, patch)]),
        "failures": rows((coffee, spoon), (astronaut, face)),
        **examples(),
    }
    for name, image in images.items():
        image.convert("RGB").save(IMAGES / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
