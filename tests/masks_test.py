import functools

import chex
import cv2
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax import _mask_fields, masks
from tests.helpers.cases import mostly_slow

pytestmark = pytest.mark.usefixtures("fast_compilation")


KEY = jax.random.key(0)


def holes(mask):
    return int(np.sum(np.asarray(mask) == 0))


# Measures of a mask.


def test_hole_ratio_counts_holes_per_mask():
    mask = np.ones((2, 3, 4, 5, 1), np.float32)
    mask[0, 1, :2, :3] = 0
    expected = np.zeros((2, 3))
    expected[0, 1] = 6 / 20
    np.testing.assert_allclose(masks.hole_ratio(mask), expected, atol=1e-7)


@pytest.mark.parametrize("size", [(10, 10), (50, 70), (512, 500)])
def test_hole_bin_includes_its_upper_end_only(size):
    pixels = size[0] * size[1]
    for index, (low, high) in enumerate(masks.HOLE_BINS):
        first, last = round(low * pixels) + 1, round(high * pixels)
        for count, expected in ((first - 1, index - 1), (first, index), (last, index)):
            mask = np.ones(pixels, np.float32)
            mask[:count] = 0
            ratio = masks.hole_ratio(mask.reshape(*size, 1))
            assert masks.hole_bin(ratio) == expected, (count, pixels)


def test_hole_bin_outside_is_minus_one_and_keeps_the_shape():
    ratio = jnp.array([[0.0, 0.005, 0.01], [0.35, 0.61, 1.0]])
    np.testing.assert_array_equal(masks.hole_bin(ratio), [[-1, -1, -1], [3, -1, -1]])


def test_touches_border_tests_the_outermost_pixels_only():
    mask = np.ones((5, 6, 7, 1), np.uint8)
    mask[0, 1:5, 1:6] = 0
    for i, pixel in enumerate(((0, 3), (5, 3), (2, 0), (2, 6)), start=1):
        mask[i][pixel] = 0
    np.testing.assert_array_equal(masks.touches_border(mask), [False] + 4 * [True])


def test_near_border_tests_the_outermost_fifty_of_512_pixels():
    mask = np.ones((4, 512, 512, 1))
    for i, (row, column) in enumerate([(50, 461), (49, 200), (462, 200), (200, 462)]):
        mask[i, row, column] = 0
    np.testing.assert_array_equal(masks.near_border(mask), [False, True, True, True])


# Random masks.

CASES = [
    # Few shapes, shared with other tests, since each line is compiled.
    ("strokes", False, (64, 96)),
    ("strokes", True, (33, 57)),
    ("blobs", False, (64, 96)),
    ("blobs", True, (128, 128)),
    ("rectangles", False, (64, 96)),
    ("rectangles", True, (17, 24)),
    ("mixed", True, (48, 80)),
    ("mixed", None, (64, 64)),
    ("ragged", None, (64, 96)),
    ("lines", None, (64, 96)),
    ("text", False, (64, 96)),
    ("dots", True, (33, 57)),
    ("thin", True, (128, 128)),
    ("wide", None, (64, 96)),
]


@pytest.mark.parametrize("kind, border, shape", mostly_slow(CASES, every=4))
def test_hole_area_and_border_are_as_asked(kind, border, shape):
    height, width = shape
    pixels = height * width
    rim_y, rim_x = height * 50 // 512, width * 50 // 512
    ratios = [0.003, 0.01, 0.05, 0.1, 0.25, 0.4, 0.5, 0.6, *masks.HOLE_BINS]
    touching = set()
    for i, ratio in enumerate(ratios):
        key = jax.random.fold_in(KEY, i)
        mask = masks.random_mask(key, shape, hole_ratio=ratio, kind=kind, border=border)
        chex.assert_shape(mask, (*shape, 1))
        chex.assert_type(mask, jnp.float32)
        mask = np.asarray(mask)
        assert set(np.unique(mask)) == {0.0, 1.0}
        if isinstance(ratio, tuple):
            assert ratio[0] * pixels < holes(mask) <= ratio[1] * pixels
        else:
            assert abs(holes(mask) - max(1, ratio * pixels)) < 1
        touches = bool(masks.touches_border(mask))
        touching.add(touches)
        if not touches:
            inner = mask[rim_y : height - rim_y, rim_x : width - rim_x]
            assert holes(inner) == holes(mask)
    assert touching == ({True, False} if border is None else {border})


@pytest.mark.parametrize("side", [10, 100, 512, 1000])
def test_whole_percents_are_exact_to_the_pixel(side):
    pixels = side * side
    percents = np.arange(1, 100)
    expected = percents * pixels // 100
    ratios = percents / 100
    for numbers in (ratios, ratios.tolist(), ratios.astype(np.float32)):
        counts = [masks._whole_pixels(ratio, pixels) for ratio in numbers]
        np.testing.assert_array_equal(counts, expected)
    counts = jax.jit(masks._whole_pixels, static_argnums=1)(ratios, pixels)
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("pixels", [64, 100, 4096, 12345, 10**6])
def test_every_count_can_be_requested_as_a_ratio(pixels):
    expected = np.arange(1, pixels)
    ratios = expected / pixels
    counts = jax.jit(masks._whole_pixels, static_argnums=1)(ratios, pixels)
    np.testing.assert_array_equal(counts, expected)
    some = slice(0, None, 1 + pixels // 1000)
    counts = [masks._whole_pixels(ratio, pixels) for ratio in ratios[some]]
    np.testing.assert_array_equal(counts, expected[some])


def test_ratios_between_two_counts_are_rounded_down():
    # The paper's range, at the most common sizes.
    for size, first, last in ((64, 40, 2457), (256, 655, 39321), (512, 2621, 157286)):
        for kind in (float, np.float32):
            assert masks._whole_pixels(kind(0.01), size**2) == first
            assert masks._whole_pixels(kind(0.6), size**2) == last
    assert masks._whole_pixels(0.9999, 100) == 99


@pytest.mark.parametrize("ratio", [0.53, 0.59])
def test_drawn_holes_are_exact_eager_jitted_and_traced(ratio):
    def draw(ratio):
        return masks.random_mask(KEY, (10, 10), hole_ratio=ratio, kind="rectangles")

    jitted, traced = jax.jit(lambda: draw(ratio)), jax.jit(draw)
    for mask in (draw(ratio), draw(np.float32(ratio)), jitted(), traced(ratio)):
        assert holes(mask) == round(ratio * 100)


@pytest.mark.parametrize(
    "ratio, expected",
    [((0.01, 0.012), 1), ((0.1, 0.105), 6), (0.001, 1), (0.1, 6)],
)
def test_ratios_are_rounded_down_to_at_least_one_pixel(ratio, expected):
    mask = masks.random_mask(KEY, (8, 8), hole_ratio=ratio, kind="rectangles")
    assert holes(mask) == expected


def test_the_hole_can_fill_the_interior():
    options = dict(kind="rectangles", border=False)
    # In floating point, this is more than 1 minus the share of the border.
    mask = masks.random_mask(KEY, (14, 14), hole_ratio=144 / 196, **options)
    assert holes(mask) == 144
    with pytest.raises(ValueError, match="room for 0.735"):
        masks.random_mask(KEY, (14, 14), hole_ratio=145 / 196, **options)


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    ratio=st.floats(0.01, 0.99),
    span=st.floats(0, 0.5),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_ratio_is_met(seed, ratio, span):
    high = min(ratio + span, 0.99)
    mask = masks.random_mask(
        jax.random.key(seed), (48, 80), hole_ratio=(ratio, high), border=True
    )
    assert ratio * 3840 - 1 <= holes(mask) <= high * 3840 + 1e-3
    assert masks.touches_border(mask)


def draw_batch(count, shape=(64, 64), **options):
    keys = jax.random.split(KEY, count)
    return np.stack([masks.random_mask(key, shape, **options) for key in keys])


def test_every_kind_draws_its_own_holes():
    def outline(kind):
        batch = draw_batch(16, (64, 96), kind=kind, hole_ratio=0.2, border=False)
        return sum(np.abs(np.diff(batch, axis=axis)).sum() for axis in (1, 2))

    strokes, blobs, rectangles = map(outline, ("strokes", "blobs", "rectangles"))
    assert strokes > 1.2 * rectangles > 1.2 * blobs


def test_holes_are_solid_rather_than_scattered_pixels():
    batch = draw_batch(16, hole_ratio=0.3)
    eroded = [cv2.dilate(mask, np.ones((3, 3))) for mask in batch]
    assert np.mean(np.equal(eroded, 0)) > 0.5 * 0.3


@pytest.mark.slow
def test_ragged_holes_have_many_times_as_many_islands():
    """Count the islands of up to 4 pixels."""

    def islands(kind):
        valid = draw_batch(16, (64, 96), kind=kind, hole_ratio=0.3)
        areas = [
            cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)[2]
            for mask in valid
        ]
        return np.array([(a[1:, cv2.CC_STAT_AREA] <= 4).sum() for a in areas])

    mixed, ragged = islands("mixed"), islands("ragged")
    assert ragged.mean() > 5 * max(mixed.mean(), 1)
    assert (ragged < ragged.mean() / 4).any()  # Not all are ragged.


@pytest.mark.parametrize(
    "kind", mostly_slow(["lines", "text", "dots", "thin"], every=4)
)
def test_thin_holes_are_a_few_pixels_wide(kind):
    draw = functools.partial(
        masks.random_mask, shape=(128, 128), hole_ratio=0.02, kind=kind
    )
    batch = np.asarray(jax.vmap(draw)(jax.random.split(KEY, 16)))
    # No 10 x 10 square lies in a shape; few do where shapes cross.
    assert np.equal([cv2.dilate(m, np.ones((10, 10))) for m in batch], 0).mean() < 1e-4
    # Three quarters of the hole are within 2 pixels of valid ones.
    near = [cv2.erode(mask, np.ones((5, 5))) == 0 for mask in batch]
    deep = np.equal([cv2.dilate(m, np.ones((5, 5))) for m in batch], 0)
    assert np.mean(near) > 0.04 and deep.sum() < 0.1 * np.equal(batch, 0).sum()


@pytest.mark.slow
def test_letters_are_as_high_as_promised():
    """The first rows alone: 0.6 % of the pixels are less than eight letters."""
    draw = functools.partial(
        masks.random_mask, shape=(256, 256), kind="text", hole_ratio=0.006, border=False
    )
    heights = []
    for mask in np.asarray(jax.vmap(draw)(jax.random.split(KEY, 16))):
        hole = np.equal(mask, 0).astype(np.uint8)
        count, _, stats, _ = cv2.connectedComponentsWithStats(hole, connectivity=8)
        assert count > 1
        heights.append(stats[1:, cv2.CC_STAT_HEIGHT].max())
    # A row leans a little, strokes have ends, and letters may touch.
    assert 10 <= np.median(heights) <= 44 and np.ptp(heights) > 10


def test_a_wide_hole_is_one_piece_and_as_wide_as_can_be():
    batch = draw_batch(32, (64, 96), kind="wide", hole_ratio=(0.1, 0.36))
    for mask in batch:
        hole = np.equal(mask[..., 0], 0).astype(np.uint8)
        assert cv2.connectedComponents(hole, connectivity=4)[0] == 2
        radius = cv2.distanceTransform(np.pad(hole, 1, "edge"), cv2.DIST_L2, 5).max()
        # Of a corner, the inscribed circle has (2 - sqrt 2) / sqrt 2 = 0.41 of its
        # area's root; of a stripe of the whole height, less.
        assert radius > 0.12 * np.sqrt(hole.sum())


def test_equal_keys_give_equal_masks_and_other_keys_others():
    batch = draw_batch(8)
    np.testing.assert_array_equal(batch, draw_batch(8))
    for i, one in enumerate(batch):
        for other in batch[:i]:
            assert np.mean(one != other) > 0.01


def test_ratios_are_uniform_in_the_range():
    batch = draw_batch(300, (17, 24), kind="rectangles", border=True)
    counts, _ = np.histogram(masks.hole_ratio(batch), 6, (0.01, 0.6))
    assert counts.sum() == 300
    assert counts.min() > 25 and counts.max() < 75  # 50 each, standard deviation 6.5


def test_every_random_part_of_a_mask_has_a_key_of_its_own(monkeypatch):
    used = []

    def draw(key, kind, y, x, *, at_border):
        used.append(jax.random.key_data(key).tobytes())
        return jax.random.uniform(key, (y.size, x.size)) + 1

    def fray(key, y, x):
        return draw(key, "", y, x, at_border=False)

    monkeypatch.setattr(_mask_fields, "draw", draw)
    monkeypatch.setattr(_mask_fields, "fray", fray)
    with jax.disable_jit():
        masks.random_mask(KEY, (8, 8), kind="ragged", hole_ratio=0.3)
    assert len(used) == len(set(used)) == 4


def same_but_for_rounding(a, b):
    """Compare masks. Other fusions round differently and may swap pixels at edges."""
    assert a.shape == b.shape
    assert holes(a) == holes(b)
    assert np.mean(np.asarray(a) != np.asarray(b)) < 0.005


@pytest.mark.slow
def test_eager_equals_jit():
    options = dict(hole_ratio=0.3, kind="rectangles", border=True)
    jitted = masks.random_mask(KEY, (17, 24), **options)
    with jax.disable_jit():
        same_but_for_rounding(masks.random_mask(KEY, (17, 24), **options), jitted)


def test_vmap_equals_loop():
    def draw(key, ratio):
        return masks.random_mask(
            key, (17, 24), hole_ratio=ratio, kind="rectangles", border=True
        )

    keys = jax.random.split(KEY, 4)
    ratios = jnp.array([0.05, 0.2, 0.4, 0.6])
    batch = jax.vmap(draw)(keys, ratios)
    chex.assert_shape(batch, (4, 17, 24, 1))
    for one, key, ratio in zip(batch, keys, ratios, strict=True):
        same_but_for_rounding(one, draw(key, ratio))


def test_one_trace_for_all_keys_and_ratios():
    def draw(key, ratio):
        return masks.random_mask(key, (16, 16), hole_ratio=ratio, kind="blobs")

    draw = jax.jit(chex.assert_max_traces(draw, n=1))
    for i in range(3):
        mask = draw(jax.random.fold_in(KEY, i), 0.1 + i / 4)
        assert abs(holes(mask) - (0.1 + i / 4) * 256) < 1


def test_a_traced_ratio_without_border_is_cut_to_the_interior():
    draw = jax.jit(
        lambda ratio: masks.random_mask(
            KEY, (16, 16), hole_ratio=ratio, kind="blobs", border=False
        )
    )
    mask = draw(0.9)
    assert holes(mask) == 14 * 14
    assert not masks.touches_border(mask)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(shape=(64,)), "shape must be"),
        (dict(shape=(4, 64, 64, 1)), "shape must be"),
        (dict(shape=(7, 64)), "at least 8"),
        (dict(shape=64), "at least 8"),
        (dict(shape=(64.0, 64.0)), "integers"),
        (dict(kind="circles"), "kind must be one of .*'strokes'.*'circles'"),
        (dict(hole_ratio=0.0), "hole_ratio"),
        (dict(hole_ratio=1.0), "hole_ratio"),
        (dict(hole_ratio=float("nan")), "hole_ratio"),
        (dict(hole_ratio=(0.3, 0.2)), "low <= high"),
        (dict(hole_ratio=(0.1, 0.2, 0.3)), "hole_ratio"),
        (dict(border="no"), "border"),
        (dict(hole_ratio=0.7, border=False), "room for 0.660"),
    ],
)
def test_random_mask_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        masks.random_mask(KEY, **{"shape": (64, 64), **options})


@pytest.mark.parametrize("size", [17, 32, 64, 100, 128, 256, 299, 512, 1024])
def test_quiet_border_has_room_for_the_largest_bin(size):
    room = (size - 2 * (size * 50 // 512)) ** 2 / size**2
    assert room > 0.6


def test_what_is_above_one_half_is_valid_everywhere():
    mask = np.zeros((2, 32, 32, 1), np.uint8)
    mask[:, 8:-8, 8:-8] = 1
    for same in (255 * mask, 0.3 * (1 - mask) + 0.9 * mask):
        for function in (masks.hole_ratio, masks.touches_border, masks.near_border):
            np.testing.assert_array_equal(function(same), function(mask))


@pytest.mark.parametrize(
    "function", [masks.hole_ratio, masks.touches_border, masks.near_border]
)
@pytest.mark.parametrize("shape", [(32, 32), (4, 32, 32)])
def test_masks_have_a_last_axis_of_one(function, shape):
    with pytest.raises(ValueError, match=r"mask must be \[..., H, W, 1\], got \("):
        function(np.ones(shape))


@pytest.mark.parametrize("border", [0, np.False_])
def test_false_of_any_type_keeps_the_border_valid(border):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="with border=False there is room for"):
        masks.random_mask(key, (16, 16), hole_ratio=0.9, border=border)
    for ratio in (np.array([0.1, 0.2]), (0.1, 0.2, 0.3), jnp.array([0.1, 0.2])):
        with pytest.raises(ValueError, match="hole_ratio must be a number"):
            masks.random_mask(key, (16, 16), hole_ratio=ratio)
