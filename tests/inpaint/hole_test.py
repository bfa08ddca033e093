import io
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from pconv_jax._errors import UserError
from pconv_jax.inpaint import modes
from pconv_jax.inpaint.hole import (
    dilate_hole,
    hole_from_alpha,
    hole_from_color,
    hole_from_label,
    hole_from_mask,
)


def noise(*shape, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


HOLE = np.zeros((12, 10), bool)
HOLE[3:7, 2:9] = True


WHITE = HOLE.astype(np.uint8) * 255


def painted(color, hidden=(0, 0, 0)):
    """A layer on which someone painted."""
    layer = np.zeros((12, 10, 4), np.uint8)
    layer[..., :3] = np.where(HOLE[..., None], color, hidden)
    layer[..., 3] = WHITE
    return layer


@pytest.mark.parametrize(
    "mask",
    [
        HOLE,
        HOLE[..., None],
        WHITE,
        WHITE.astype(np.int64),
        WHITE.astype(np.uint16) * 257,
        HOLE.astype(int),
        HOLE.astype(np.float64),
        np.stack([WHITE] * 3, -1),
        np.stack([WHITE, 0 * WHITE, 0 * WHITE], -1),  # Painted in red.
        np.stack([WHITE] * 3 + [0 * WHITE + 255], -1),
        np.stack([WHITE] * 4, -1),
        painted((0, 0, 0)),
        painted((0, 0, 0), hidden=(255, 255, 255)),
        painted((255, 0, 0)),
        Image.fromarray(HOLE),
        Image.fromarray(WHITE),
        Image.fromarray(WHITE).convert("P"),
        Image.fromarray(WHITE).convert("CMYK"),
        Image.fromarray(HOLE.astype(np.uint8)),
        Image.fromarray(WHITE.astype(np.uint16) * 257),
    ],
)
def test_masks_of_all_kinds(mask):
    np.testing.assert_array_equal(hole_from_mask(mask), HOLE)
    np.testing.assert_array_equal(hole_from_mask(mask, invert=True), ~HOLE)


def test_a_mask_of_8_bits_in_16():
    np.testing.assert_array_equal(hole_from_mask(WHITE.astype(np.uint16)), HOLE)


def test_gray_masks_are_binarized_with_a_warning():
    gray = cv2.GaussianBlur(WHITE, (3, 3), 0)
    file = io.BytesIO()
    Image.fromarray(np.kron(WHITE, np.ones((5, 5), np.uint8))).save(file, "JPEG")
    for mask, expected in [
        (gray, gray > 127),
        (gray / 255, gray > 127),
        (Image.open(file), np.kron(HOLE, np.ones((5, 5), bool))),
    ]:
        with pytest.warns(UserWarning, match="neither black nor white"):
            np.testing.assert_array_equal(hole_from_mask(mask), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hole_from_mask(WHITE)


def test_colors():
    image = noise(12, 10, 3) // 2
    image[HOLE] = (255, 0, 255)
    for color in ("#ff00ff", "magenta", "rgb(255,0,255)"):
        np.testing.assert_array_equal(hole_from_color(image, color), HOLE)
    image[4, 4] = (250, 3, 255)
    assert not hole_from_color(image, "#f0f")[4, 4]
    assert not hole_from_color(image, "#f0f", tolerance=4)[4, 4]
    assert hole_from_color(Image.fromarray(image), "#f0f", tolerance=5)[4, 4]
    alpha = np.dstack([image, WHITE])
    np.testing.assert_array_equal(hole_from_color(alpha, "magenta", tolerance=5), HOLE)
    deep = image.astype(np.uint16) * 257
    np.testing.assert_array_equal(hole_from_color(deep, "magenta", tolerance=5), HOLE)
    with pytest.raises(ValueError, match="color must be a CSS color, .* 'pinkish'"):
        hole_from_color(image, "pinkish")


def test_colors_are_found_only_in_images():
    with pytest.raises(ValueError, match="tolerance must be 0 or more, got -5"):
        hole_from_color(noise(4, 4, 3), "red", tolerance=-5)
    with pytest.raises(ValueError, match=r"must have colors, .* \[4, 4, 7\]"):
        hole_from_color(noise(4, 4, 7), "red")


def test_alpha():
    for alpha in (255 - WHITE, 65535 - 257 * WHITE.astype(np.uint16), 1.0 - HOLE):
        np.testing.assert_array_equal(hole_from_alpha(alpha), HOLE)
    palette = Image.fromarray(255 - WHITE).convert("P")
    palette.info["transparency"] = int(np.asarray(palette)[4, 4])
    alpha = modes.to_array(palette)[..., 3]
    np.testing.assert_array_equal(hole_from_alpha(alpha), HOLE)


def test_dilate():
    hole = np.zeros((15, 15), bool)
    hole[7, 7] = True
    y, x = np.mgrid[-7:8, -7:8]
    for n in (0, 1, 3):
        np.testing.assert_array_equal(dilate_hole(hole, n), np.hypot(y, x) <= n + 1e-6)
    assert not dilate_hole(np.zeros((3, 3), bool), 2).any()
    assert dilate_hole(np.ones((3, 3), bool), 2).all()
    with pytest.raises(ValueError, match="dilate must be 0 or more"):
        dilate_hole(hole, -1)


@pytest.mark.parametrize("color", [(0, 0, 0), (29, 60, 120), (220, 40, 40), (128,) * 3])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF"])
def test_a_soft_brush_of_any_color(color, kind):
    alpha = cv2.GaussianBlur(np.kron(WHITE, np.ones((8, 8), np.uint8)), (0, 0), 3)
    layer = np.zeros((*alpha.shape, 4), np.uint8)
    layer[..., :3] = np.where(alpha[..., None] > 0, color, 0)
    layer[..., 3] = alpha
    file = io.BytesIO()
    Image.fromarray(layer).save(file, kind, quality=80)
    with pytest.warns(UserWarning, match="neither black nor white"):
        hole = hole_from_mask(Image.open(file))
    assert np.mean(hole != (alpha > 127)) < (0.01 if kind == "PNG" else 0.03)


@pytest.mark.parametrize("color", [(33, 33, 33), (20, 30, 100), (128,) * 3])
@pytest.mark.parametrize("sigma", [0, 3])
@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("L", "PNG"), ("L", "JPEG")]
)
def test_a_dark_brush_on_black(color, sigma, kind, mode):
    hard = np.kron(WHITE, np.ones((8, 8), np.uint8))
    alpha = cv2.GaussianBlur(hard, (0, 0), sigma) if sigma else hard
    mask = np.rint(alpha[..., None] / 255 * np.array(color)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(mask).convert(mode).save(file, kind, quality=80)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hole = hole_from_mask(Image.open(file))
    assert np.mean(hole != (alpha > 127)) < (0.01 if kind == "PNG" else 0.03)


def test_a_brush_that_is_half_transparent():
    layer = painted((255, 0, 0))
    layer[..., 3] //= 3
    np.testing.assert_array_equal(hole_from_mask(layer), HOLE)


@pytest.mark.parametrize("values", [(0, 1, 255), (0, 2, 0), (0, 50, 100), (0, 15, 255)])
def test_labels_of_one_object_and_its_border(values):
    mask = np.full((12, 10), values[0], np.uint8)
    mask[HOLE], mask[0, :8] = values[1:]
    with pytest.raises(UserError, match="looks like a mask of labels"):
        hole_from_mask(mask)


def test_black_and_white_on_a_transparent_layer_is_not_one_brush():
    layer = np.zeros((12, 10, 4), np.uint8)
    layer[1:, 1:, 3] = 255
    layer[HOLE] = 255
    np.testing.assert_array_equal(hole_from_mask(layer), HOLE)


def labels(dtype=np.uint8):
    mask = np.zeros((12, 10), dtype)
    mask[HOLE], mask[0], mask[-1] = 2, 1, 3
    return mask


@pytest.mark.parametrize("border", [0, 255])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_labels_are_refused_and_chosen(dtype, border):
    mask = labels(dtype)
    mask[:, 0] = border
    with pytest.raises(UserError, match="the values 0, 1, 2, 3.* with --mask-label"):
        hole_from_mask(mask)
    np.testing.assert_array_equal(hole_from_label(mask, 2), HOLE)
    with pytest.raises(UserError, match="no label 9; it has 0, 1, 2, 3"):
        hole_from_label(mask, 9)
    three = np.stack([mask] * 3, -1)
    with pytest.raises(UserError, match="the values 0, 1, 2, 3"):
        hole_from_mask(three)
    np.testing.assert_array_equal(hole_from_label(three, 2), HOLE)
    three[0, 0, 0] = 7
    with pytest.raises(UserError, match="one channel to have labels"):
        hole_from_label(three, 2)


@pytest.mark.parametrize("channels", [2, 4])
def test_an_opaque_alpha_says_nothing_of_a_mask(channels):
    def with_alpha(mask):
        gray = np.stack([mask] * channels, axis=-1)
        gray[..., -1] = 255
        return gray

    with pytest.raises(UserError, match="the values 0, 1, 2, 3"):
        hole_from_mask(with_alpha(labels()))
    np.testing.assert_array_equal(hole_from_label(with_alpha(labels()), 2), HOLE)
    ones = with_alpha(HOLE.astype(np.uint8))
    np.testing.assert_array_equal(hole_from_mask(ones), HOLE)


def test_labels_in_a_palette():
    mask = Image.fromarray(labels()).convert("P")
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    with pytest.raises(UserError, match="palette of several colors"):
        hole_from_mask(mask)
    np.testing.assert_array_equal(hole_from_label(mask, 2), HOLE)
    mask.putpalette([0, 0, 0, 20, 0, 0, 255, 0, 0, 90, 0, 0])  # Shades of one color.
    with pytest.warns(UserWarning, match="neither black nor white"):
        np.testing.assert_array_equal(hole_from_mask(mask), HOLE)


def test_strips_make_no_difference():
    mask = noise(200, 30, 4)
    gray, alpha = mask[..., :3].max(axis=-1) / 255, mask[..., 3] / 255
    with pytest.warns(UserWarning, match="neither black nor white"):
        np.testing.assert_array_equal(hole_from_mask(mask), gray * alpha > 0.5)
