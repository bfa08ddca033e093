"""Makes the images of the documentation: ``python docs/make_images.py``.

The photos are those of ``docs/photos`` and of scikit-image. For the README and the
guide to repair, the bundled network fills holes that are drawn by hand, as
``pconv inpaint`` does. For the guide to evaluation, random masks are filled by four
methods, as by ``pconv eval``.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import drawn_masks
from drawn_masks import ellipses, polygons
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from pconv_jax import Inpainter, evaluate_run
from pconv_jax.evaluate.runner import EvalData

IMAGES = Path(__file__).parent / "images"
PHOTOS = Path(__file__).parent / "photos"
HEIGHT = 220
GAP = 6
FIRST = (  # The photos of the README, row by row.
    ["college", "man", "house"]
    + ["koalas", "steak", "alpacas"]
    + ["field", "savanna", "player"]
    + ["kitchen", "dancers", "street"]
    + ["pizza", "car", "tree"]
)
# The repairs of `docs/fifty.md` that do not look right, judged by eye.
FAILED = (
    "glove lions tree forest court cottage ball burger car pizza grasshopper"
).split()


Repair = Callable[[Image.Image, Image.Image], Image.Image]


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


def examples() -> dict[str, Image.Image]:
    """Evaluate the bundled network, and take the median and the worst examples.

    The same as ``pconv eval --weights photos --images FOLDER --image-size 256
    --examples 5 --methods network,repair,sharp,telea --no-learned``.
    """
    with tempfile.TemporaryDirectory() as folder:
        photos, out = Path(folder, "photos"), Path(folder, "out")
        photos.mkdir()
        for name in ("astronaut", "chelsea", "coffee", "rocket"):
            Image.fromarray(getattr(data, name)()).save(photos / f"{name}.png")
        Image.fromarray(data.stereo_motorcycle()[0]).save(photos / "motorcycle.png")
        evaluate_run(
            weights="photos",
            methods=["network", "repair", "sharp", "telea"],
            data=EvalData(images=str(photos), image_size=256, examples=5),
            learned=False,
            out=out,
        )
        files = {"gallery": "pictures.png", "gallery-worst": "worst.png"}
        return {name: Image.open(out / file).copy() for name, file in files.items()}


def repairs(repair: Repair) -> dict[str, dict[str, Image.Image]]:
    """Repair the photos of ``docs/photos``: pairs of images, by kind and name."""
    return {
        kind: {name: pair(repair, name, mask) for name, mask in masks.items()}
        for kind, masks in drawn_masks.draw().items()
    }


def pair(repair: Repair, name: str, mask: Image.Image) -> Image.Image:
    """Show a photo with its hole, and filled."""
    photo = Image.open(PHOTOS / f"{name}.webp").convert("RGB")
    return strip([painted(photo, mask), repair(photo, mask)])


def labeled(name: str, image: Image.Image) -> Image.Image:
    """Write a name below an image, in red if the repair failed."""
    height = 24
    whole = Image.new("RGB", (image.width, image.height + height), "white")
    whole.paste(image)
    color = (200, 0, 0) if name in FAILED else (0, 0, 0)
    place = image.width / 2, image.height + height / 2
    font = ImageFont.load_default(16)
    ImageDraw.Draw(whole).text(place, name, fill=color, font=font, anchor="mm")
    return whole


def table(images: list[Image.Image], *, columns: int) -> Image.Image:
    """Put images of equal size in rows."""
    width = columns * images[0].width + (columns - 1) * GAP
    rows = []
    for start in range(0, len(images), columns):
        row = Image.new("RGB", (width, images[0].height), "white")
        for number, image in enumerate(images[start : start + columns]):
            row.paste(image, (number * (image.width + GAP), 0))
        rows.append(row)
    return stack(rows)


def main() -> None:
    """Write all images."""
    repair = functools.partial(Inpainter.from_pretrained(), sharp=True)
    astronaut, coffee = (
        Image.fromarray(photo) for photo in (data.astronaut(), data.coffee())
    )
    patch = ellipses((126, 338, 216, 426), size=astronaut.size)
    face = ellipses((176, 70, 276, 200), size=astronaut.size)
    spoon = polygons(
        [(392, 70), (424, 62), (432, 84), (396, 220), (412, 250), (404, 300)]
        + [(380, 332), (340, 336), (316, 310), (316, 270), (346, 236), (372, 214)]
        + [(384, 150)],
        size=coffee.size,
    )

    def rows(*cases: tuple[Image.Image, Image.Image]) -> Image.Image:
        strips = [strip([painted(*case), repair(*case)]) for case in cases]
        return stack(strips)

    by_kind = repairs(repair)
    by_name = {name: image for part in by_kind.values() for name, image in part.items()}
    images = {
        "repair": table([by_name[name] for name in FIRST], columns=3),
        "mask": strip([astronaut, patch, repair(astronaut, patch)]),
        "failures": rows((coffee, spoon), (astronaut, face)),
        **examples(),
    }
    for kind, part in by_kind.items():
        pairs = [labeled(name, image) for name, image in part.items()]
        images[f"fifty-{kind.replace(' ', '-')}"] = table(pairs, columns=2)
    for name, image in images.items():
        image.convert("RGB").save(IMAGES / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
