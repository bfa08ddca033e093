import cv2
import numpy as np
import pytest
from skimage.restoration import inpaint

from pconv_jax._errors import UserError
from pconv_jax.inpaint import detail, patch_search
from pconv_jax.inpaint.detail import add_detail, refine_guide
from pconv_jax.inpaint.scales import Scale, blur


def stripes(height=128, width=128):
    """Diagonal stripes of two colors, four pixels wide."""
    y, x = np.mgrid[:height, :width]
    return np.where(((x + y) // 4 % 2)[..., None], (200, 120, 40), (40, 90, 160))


def square_hole(shape, size):
    hole = np.zeros(shape, bool)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    hole[top : top + size, left : left + size] = True
    return hole


def mean_guide(image, hole):
    """The guide of a network that knows nothing but the mean color."""
    return np.where(hole[..., None], image[~hole].mean(axis=0), image)


@pytest.fixture(scope="module")
def striped():
    """Stripes, a hole, and a guide of their mean color."""
    image = stripes().astype(np.uint8)
    hole = square_hole(image.shape[:2], 48)
    return image, hole, mean_guide(image, hole).astype(np.uint8)


def test_texture_is_continued(striped):
    image, hole, guide = striped
    filled = add_detail(image, hole, guide)
    assert filled.dtype == np.uint8
    np.testing.assert_array_equal(filled[~hole], image[~hole])
    error, error_of_guide = (
        np.abs(x[hole].astype(float) - image[hole]).mean() for x in (filled, guide)
    )
    assert error_of_guide > 40 and error < error_of_guide / 3


def test_the_same_seed_gives_the_same_and_another_one_not():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    hole = square_hole(image.shape[:2], 20)
    guide = mean_guide(image, hole).astype(np.uint8)
    first, again, other = (add_detail(image, hole, guide, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other)[hole].any()


def test_the_content_of_the_hole_does_not_matter(striped):
    image, hole, guide = striped
    other = np.where(hole[..., None], 255 - image, image)
    np.testing.assert_array_equal(
        add_detail(other, hole, guide), add_detail(image, hole, guide)
    )


def test_excluded_pixels_are_not_copied():
    """Red fits the guide best; without it, stripes have to do."""
    image = stripes().astype(np.uint8)
    image[:, :40] = (255, 0, 0)
    hole = square_hole(image.shape[:2], 12)
    guide = np.where(hole[..., None], np.uint8([255, 0, 0]), image)
    red = np.all(image == (255, 0, 0), axis=-1)
    with_red, without = (add_detail(image, hole, guide, exclude=e) for e in (None, red))
    distance, farther = (np.abs(x[hole] - [255.0, 0, 0]) for x in (with_red, without))
    assert distance.mean() < farther.mean()
    rng = np.random.default_rng(0)
    scale = Scale(guide.astype(np.float32), hole, ~hole & ~red)
    weight = detail._guide_weight(hole, 1)
    length = patch_search.find_length(hole.shape)
    _, matches = detail._refine_scale(
        scale, None, None, weight, 1.0, rng, length, vote_first=False
    )
    assert matches.columns[matches.rows >= 0].min() == 40 + 2


def test_without_a_patch_to_copy_the_guide_stays():
    image = np.full((20, 20, 3), 50, np.uint8)
    hole = np.ones((20, 20), bool)
    hole[:2] = False  # No square of 5 x 5 pixels is left.
    guide = np.where(hole[..., None], np.uint8(90), image)
    np.testing.assert_array_equal(add_detail(image, hole, guide), guide)


def test_holes_of_other_types_are_those_of_bools():
    image = stripes(40, 50).astype(np.uint8)
    hole, exclude = np.zeros((2, 40, 50), bool)
    hole[10:20, 10:30] = exclude[:, 40:] = True
    guide = np.where(hole[..., None], np.uint8(90), image)
    expected = add_detail(image, hole, guide, exclude=exclude)
    assert (expected[hole] != image[hole]).any()
    result = add_detail(image, hole.astype(int), guide, exclude=exclude.astype(int))
    np.testing.assert_array_equal(result, expected)
    expected = refine_guide(guide, hole)
    np.testing.assert_array_equal(refine_guide(guide, hole.astype(int)), expected)


def test_nothing_to_fill():
    image = stripes(30, 40).astype(np.float32)
    hole = np.zeros((30, 40), bool)
    np.testing.assert_array_equal(add_detail(image, hole, image), image)
    np.testing.assert_array_equal(refine_guide(image, hole), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_floats_and_gray_images(channels):
    image = stripes()[..., :channels].astype(np.float32)
    hole = square_hole(image.shape[:2], 48)
    guide = mean_guide(image, hole).astype(np.float32)
    filled = add_detail(image, hole, guide)
    assert filled.dtype == np.float32 and filled.shape == image.shape
    np.testing.assert_array_equal(filled[~hole], image[~hole])
    error, error_of_guide = (np.abs(x - image)[hole].mean() for x in (filled, guide))
    assert error < error_of_guide / 2


def test_holes_that_touch_the_border_of_the_image():
    image = stripes().astype(np.float32)
    hole = np.zeros(image.shape[:2], bool)
    hole[:20, :20] = hole[108:, 30:60] = hole[40:60, 108:] = True
    guide = mean_guide(image, hole).astype(np.float32)
    filled = add_detail(image, hole, guide)
    assert np.isfinite(filled).all()
    np.testing.assert_array_equal(filled[~hole], image[~hole])
    error, error_of_guide = (np.abs(x - image)[hole].mean() for x in (filled, guide))
    assert error < error_of_guide / 2


def test_every_pixel_of_a_hole_is_in_one_region():
    rng = np.random.default_rng(0)
    for shape in ((70, 130), (16, 16), (257, 33)):
        hole = rng.random(shape) < 0.002
        hole[3:9, 5:] = True
        count = np.zeros(shape, int)
        for window, part in detail.regions(hole):
            assert part.shape == hole[window].shape
            assert not part[~hole[window]].any()
            count[window] += part
        np.testing.assert_array_equal(count, hole)


def test_a_window_does_not_grow_with_the_image():
    hole = np.zeros((3000, 4000), bool)
    hole[1500:1520, 2000:2030] = hole[10, 10] = True
    sizes = [part.shape for _, part in detail.regions(hole)]
    assert len(sizes) == 2 and max(max(size) for size in sizes) < 200


def test_wide_holes_are_filled_to_the_middle():
    """Votes get weaker with the depth, but never so weak that they are lost."""
    image = np.full((420, 420, 1), 80, np.float32)
    hole = square_hole((420, 420), 400)
    filled = add_detail(image, hole, image)
    np.testing.assert_allclose(filled, image, atol=1e-2)


def test_matches_are_nearly_the_nearest():
    """Beside a search of all patches, on an image of noise."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 44, 1)).astype(np.float32)
    hole = square_hole((40, 44), 6)
    scale = Scale(image, hole, ~hole)
    weight = detail._guide_weight(hole, 1)
    length = patch_search.find_length(hole.shape)
    filled, matches = detail._refine_scale(
        scale, image, None, weight, 1.0, rng, length, vote_first=False
    )
    centers = detail._source_centers(~hole)
    rows, columns = np.nonzero(matches.rows >= 0)
    assert len(rows) == 10 * 10  # The hole and two pixels around it.
    found = matches.rows[rows, columns], matches.columns[rows, columns]
    assert centers[found].all()
    # The last search was for the estimate before the last vote, hence not exact.
    low = blur(image, 1.0)
    pad = [(2, 2), (2, 2), (0, 0)]
    patches = np.lib.stride_tricks.sliding_window_view(
        np.pad(np.where(hole[..., None], filled, image), pad, "edge"), (5, 5), (0, 1)
    )
    lows = np.lib.stride_tricks.sliding_window_view(
        np.pad(low, pad, "edge"), (5, 5), (0, 1)
    )[..., [0, 0, 2, 4, 4], [0, 4, 2, 0, 4]]
    distances = []
    for y, x, match in zip(rows, columns, zip(*found)):
        detail_distance = np.square(patches - patches[y, x]).sum((2, 3, 4))
        guide_distance = np.square(lows - lows[y, x]).sum((2, 3)) * 5
        distance = weight[y, x] * guide_distance + 0.36 * detail_distance
        best = distance[centers].min()
        distances.append(distance[match] / best)
    assert np.median(distances) < 1.5


def test_a_guide_that_is_smooth_stays():
    """A cubic polynomial has no bilaplacian."""
    y, x = np.mgrid[:60, :70] / 40
    image = 100 + 20 * np.stack([x**3 - y, x * y**2 + 1, 0 * x], axis=-1)
    hole = np.zeros((60, 70), bool)
    hole[10:40, 20:50] = True
    np.testing.assert_allclose(refine_guide(image, hole), image, atol=1e-3)


def test_a_narrow_hole_is_filled_almost_as_by_biharmonic_inpainting():
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.uniform(0, 255, (80, 80, 3)), (0, 0), 4)
    image = (image - image.mean()) * 4 + 128
    hole = np.zeros((80, 80), bool)
    hole[10:12, 5:75] = hole[20:70, 40:42] = True
    network = np.where(hole[..., None], image + 20, image)
    guide = refine_guide(network, hole)
    np.testing.assert_array_equal(guide[~hole], image[~hole])
    exact = inpaint.inpaint_biharmonic(image, hole, channel_axis=-1)
    assert np.abs(guide - exact)[hole].mean() < 1 < np.abs(network - exact)[hole].mean()


def test_the_middle_of_a_wide_hole_follows_the_network():
    image = np.full((80, 80, 3), 50.0)
    hole = np.zeros((80, 80), bool)
    hole[10:70, 10:70] = True
    network = np.where(hole[..., None], 200.0, image)
    guide = refine_guide(network, hole)
    np.testing.assert_allclose(guide[35:45, 35:45], 200, atol=1)
    assert np.abs(np.diff(guide[40, 5:20, 0])).max() < 75  # The step was 150.


def test_refined_guides_keep_their_dtype_and_channels():
    image = stripes(40, 50)[..., :1].astype(np.uint8)
    hole = np.zeros((40, 50), bool)
    hole[0, 0] = hole[30:, 45:] = True
    guide = refine_guide(image, hole)
    assert guide.dtype == np.uint8 and guide.shape == image.shape
    floats = refine_guide(image.astype(np.float32), hole)
    np.testing.assert_allclose(guide, floats, atol=0.51)


def test_the_guide_counts_less_in_wide_holes():
    """At equal depth, in pixels of the image, at any scale."""
    hole = np.zeros((256, 256), bool)
    hole[20:220, 20:120] = hole[20:220, 140:160] = True  # 100 and 20 pixels wide.
    weight = detail._guide_weight(hole, 1)
    assert weight[~hole].min() == 1
    np.testing.assert_allclose(weight[100, 140:149], weight[100, 159:150:-1])
    assert (weight[100, 26:30] < 0.7 * weight[100, 146:150]).all()
    assert weight[100, 70] == weight.min() == np.float32(0.15)
    assert weight[100, 150] > 0.2
    # Half the size halves the depth in pixels, not the weight.
    half = detail._guide_weight(hole[::2, ::2], 2)
    assert half[50, 13] == pytest.approx(weight[100, 27], rel=0.3)


def test_the_rim_follows_the_guide_and_the_middle_the_estimate():
    """Four fifths of the guide at the rim, and a fifth of its lows in the middle.

    Two channels tell apart low and high frequencies: in a constant difference there is
    nothing fine, and hardly anything else in a checkerboard.
    """
    hole = square_hole((280, 280), 120)
    y, x = np.mgrid[:280, :280]
    difference = np.stack([np.ones_like(x), (-1) ** (x + y)], axis=-1)
    guide = (100 + 10 * difference).astype(np.float32)
    scale = Scale(guide, hole, ~hole)
    result = detail._blend(np.full_like(guide, 100), scale, 1.0)
    np.testing.assert_allclose(result[80, 140] - 100, [8, 8], rtol=1e-5)
    np.testing.assert_allclose(result[140, 140] - 100, [2, 0], atol=0.02)


def test_little_to_copy_from_leaves_more_to_the_guide():
    hole = square_hole((60, 60), 50)
    guide = np.full((60, 60, 3), 110, np.float32)
    guide[::2, ::2] = 90
    estimate = np.full_like(guide, 100)
    errors = [
        np.abs(detail._blend(estimate, Scale(guide, hole, source), 1.0) - guide)
        for source in (np.ones_like(hole), ~hole)
    ]
    much, little = (error[hole].mean() for error in errors)
    assert little < 0.8 * much


def test_mistakes():
    image, hole = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30), bool)
    with pytest.raises(UserError, match=r"of one size, got .*\[20, 31\]"):
        add_detail(image, np.zeros((20, 31), bool), image)
    with pytest.raises(UserError, match=r"image and guide must be .*\[20, 30\]"):
        add_detail(image[..., 0], hole, image)
    with pytest.raises(UserError, match=r"exclude must be .* = \[20, 30\], got \[3\]"):
        add_detail(image, hole, image, exclude=np.zeros(3, bool))
