"""Masks for the photos of ``docs/photos``, drawn as a person would.

White is where to fill. Coordinates are in pixels of a photo, from its top left corner.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = (400, 400)  # Of all photos.
Point = tuple[int, int]
Box = tuple[int, int, int, int]


def draw() -> dict[str, dict[str, Image.Image]]:
    """Draw all masks, by the kind of damage and the name of the photo."""
    return {
        "scratches": {
            "college": scratches(seed=1, count=10),
            "man": scratches(seed=2, count=10),
            "house": scratches(seed=5, count=12),
            "girl": scratches(seed=11, count=10),
            "facades": scratches(seed=13, count=12),
            "mausoleum": scratches(seed=14, count=10),
        },
        "creases": {
            "blossom": creases(seed=21),
            "bench": creases(seed=22),
            "hall": creases(seed=23),
        },
        "text": {
            "koalas": text("SAMPLE", 80, (30, 160)),
            "alpacas": text("© photo archive", 34, (60, 60), lines=5),
            "monkeys": text("SAMPLE", 80, (30, 160)),
            "oranges": text("© photo archive", 34, (60, 60), lines=5),
            "baby": text("do not copy", 40, (40, 40), lines=5),
            "steak": text("12 08 '98", 34, (225, 350)),
            "cake": text("24 12 '03", 34, (225, 350)),
            "mist": text("7 3 '99", 34, (245, 350)),
        },
        "stains": {
            "freckles": stains(seed=31),
            "table": stains(seed=32),
            "temple": stains(seed=33),
        },
        "torn corners": {
            "garage": polygons(
                [(400, 250), (370, 270), (360, 300), (320, 320), (300, 360)]
                + [(260, 380), (250, 400), (400, 400)],
            ),
            "jeans": polygons(
                [(0, 0), (150, 0), (140, 25), (110, 40), (100, 70), (60, 85)]
                + [(40, 120), (0, 140)],
            ),
            "taxi": polygons(
                [(400, 0), (270, 0), (290, 30), (320, 40), (330, 75), (370, 90)]
                + [(400, 130)],
            ),
            "skyline": polygons(
                [(0, 400), (0, 280), (30, 295), (45, 320), (80, 330), (95, 370)]
                + [(130, 380), (140, 400)],
            ),
        },
        "small objects": {
            "ridge": ellipses((183, 107, 221, 145)),
            "lighthouse": ellipses((176, 38, 218, 88)),
            "tourist": polygons(
                [(136, 200), (150, 188), (166, 196), (172, 240), (168, 292)]
                + [(140, 294), (134, 250)],
            ),
            "surfer": polygons(
                [(258, 348), (278, 332), (300, 334), (314, 350), (302, 362)]
                + [(302, 398), (272, 398), (270, 368), (258, 362)],
            ),
            "church": polygons(
                [(246, 270), (256, 235), (264, 212), (272, 235), (290, 275)]
                + [(294, 306), (246, 306)],
            ),
            "kitchen": polygons([(242, 98), (336, 98), (336, 164), (242, 164)]),
            "flag": polygons(
                [(186, 175), (205, 110), (222, 48), (240, 50), (284, 118), (306, 150)]
                + [(298, 158), (274, 132), (245, 142), (218, 198), (194, 196)],
            ),
        },
        "objects": {
            "moon": ellipses((126, 19, 274, 166)),
            "glove": ellipses(
                (186, 76, 282, 162), (268, 66, 374, 144), (322, 40, 396, 112)
            ),
            "field": polygons(
                [(165, 275), (250, 275), (262, 352), (160, 352)],
                [(128, 232), (150, 222), (190, 222), (212, 250), (190, 284)]
                + [(150, 284)],
            ),
            "savanna": polygons(
                [(222, 228), (250, 192), (290, 183), (335, 195), (358, 228)]
                + [(345, 240), (340, 300), (240, 300), (230, 240)],
            ),
            "lions": polygons(
                [(0, 220), (30, 140), (130, 130), (145, 200), (145, 310), (0, 310)]
            ),
            "statue": polygons(
                [(60, 15), (112, 15), (132, 120), (168, 230), (190, 400), (0, 400)]
                + [(20, 260), (45, 130)],
            ),
            "player": polygons(
                [(222, 92), (295, 98), (305, 135), (350, 142), (395, 180), (395, 218)]
                + [(335, 210), (355, 265), (400, 290), (400, 335), (335, 310)]
                + [(330, 375), (235, 375), (240, 345), (270, 330), (250, 265)]
                + [(218, 250), (218, 170), (232, 160)],
            ),
            "street": polygons(
                [(163, 148), (208, 148), (214, 240), (206, 275), (330, 375)]
                + [(375, 400), (262, 400), (176, 300), (163, 240)],
            ),
            "tree": polygons(
                [(44, 60), (105, 8), (200, 8), (290, 30), (352, 100), (342, 190)]
                + [(270, 220), (218, 245), (207, 302), (148, 302), (126, 248)]
                + [(56, 218), (40, 150)],
            ),
            "forest": polygons(
                [(42, 290), (46, 235), (60, 208), (110, 190), (238, 190), (285, 222)]
                + [(340, 236), (348, 270), (340, 296), (322, 308), (150, 306)]
                + [(120, 320), (72, 320), (66, 300)],
            ),
            "court": polygons(
                [(286, 75), (318, 75), (320, 118), (340, 140), (334, 190), (322, 228)]
                + [(308, 240), (308, 294), (284, 294), (284, 250), (262, 262)]
                + [(250, 276), (230, 272), (240, 240), (244, 215), (232, 196)]
                + [(214, 194), (212, 176), (232, 140), (262, 112), (284, 108)],
            ),
            "cottage": polygons(
                [(52, 212), (54, 198), (118, 138), (290, 136), (330, 165), (346, 162)]
                + [(362, 215), (352, 246), (290, 250), (200, 262), (100, 272)]
                + [(60, 272)],
            ),
            "ball": ellipses((168, 104, 390, 292)),
            "burger": polygons(
                [(10, 130), (60, 90), (150, 82), (235, 110), (262, 180), (262, 250)]
                + [(245, 330), (60, 332), (10, 310), (5, 200)],
            ),
            "car": polygons(
                [(42, 190), (60, 182), (140, 165), (190, 142), (265, 142), (322, 185)]
                + [(326, 240), (310, 256), (268, 280), (180, 278), (62, 266)]
                + [(46, 235)],
            ),
            "pizza": polygons(
                [(100, 135), (130, 114), (220, 112), (296, 130), (296, 150)]
                + [(262, 240), (240, 330), (216, 368), (196, 362), (168, 310)]
                + [(150, 240)],
            ),
            "elephants": polygons(
                [(132, 330), (160, 328), (190, 325), (194, 300), (232, 298)]
                + [(236, 278), (272, 272), (270, 240), (282, 228), (314, 232)]
                + [(312, 262), (304, 300), (322, 310), (322, 355), (230, 362)]
                + [(132, 362)],
                [(0, 325), (98, 322), (98, 385), (0, 398)],
            ),
            "dancers": polygons(
                [(264, 140), (290, 102), (318, 106), (330, 140), (365, 118)]
                + [(400, 110), (400, 285), (262, 285), (262, 225)],
            ),
            "grasshopper": polygons(
                [(70, 172), (190, 168), (260, 155), (310, 110), (326, 112)]
                + [(322, 150), (345, 158), (342, 172), (292, 184), (302, 240)]
                + [(280, 240), (250, 215), (218, 222), (214, 262), (192, 262)]
                + [(188, 235), (105, 232), (70, 200)],
            ),
        },
    }


def scratches(*, seed: int, count: int) -> Image.Image:
    """Draw bent scratches and dust."""
    mask, draw = blank()
    rng = np.random.default_rng(seed)
    for _ in range(count):
        points = rng.uniform(-0.1, 1.1, (2, 2)) * SIZE
        bend = points.mean(0) + rng.normal(0, 12, 2)
        line = [tuple(points[0]), tuple(bend), tuple(points[1])]
        draw.line(line, fill=255, width=int(rng.integers(2, 6)), joint="curve")
    for _ in range(4 * count):
        x, y = rng.uniform(0, 1, 2) * SIZE
        radius = rng.uniform(1, 4)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


def creases(*, seed: int) -> Image.Image:
    """Draw the creases of a photo that was folded twice."""
    mask, draw = blank()
    rng = np.random.default_rng(seed)
    width, height = SIZE
    ends = rng.uniform(0.25, 0.75, (2, 2)) * SIZE  # Near the middle of each side.
    bends = ends.mean(0) + rng.normal(0, 6, 2)
    lines = (
        [(0, ends[0, 1]), (width / 2, bends[1]), (width, ends[1, 1])],
        [(ends[0, 0], 0), (bends[0], height / 2), (ends[1, 0], height)],
    )
    for line in lines:
        draw.line(line, fill=255, width=int(rng.integers(6, 11)), joint="curve")
    return mask


def stains(*, seed: int) -> Image.Image:
    """Draw stains, of four discs each."""
    mask, draw = blank()
    rng = np.random.default_rng(seed)
    for _ in range(5):
        center = rng.uniform(0.1, 0.9, 2) * SIZE
        for _ in range(4):
            (x, y), (a, b) = center + rng.normal(0, 14, 2), rng.uniform(8, 24, 2)
            draw.ellipse((x - a, y - b, x + a, y + b), fill=255)
    return mask


def text(line: str, height: int, place: Point, *, lines: int = 1) -> Image.Image:
    """Draw a line of text, also several times."""
    mask, draw = blank()
    font = ImageFont.load_default(height)
    for number in range(lines):
        start = place[0], place[1] + number * 1.6 * height
        draw.text(start, line, fill=255, font=font, stroke_width=1)
    return mask.point([255 * (value > 60) for value in range(256)])


def polygons(*shapes: list[Point], size: Point = SIZE) -> Image.Image:
    """Draw filled polygons."""
    mask, draw = blank(size)
    for shape in shapes:
        draw.polygon(shape, fill=255)
    return mask


def ellipses(*boxes: Box, size: Point = SIZE) -> Image.Image:
    """Draw filled ellipses, given by the boxes around them."""
    mask, draw = blank(size)
    for box in boxes:
        draw.ellipse(box, fill=255)
    return mask


def blank(size: Point = SIZE) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Make an empty mask, and what draws on it."""
    mask = Image.new("L", size)
    return mask, ImageDraw.Draw(mask)
