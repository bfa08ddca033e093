import chex
import cv2
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax import masks
from pconv_jax.data.mask_folder import MaskFolder, augment

KEY = jax.random.key(0)


def holes(mask):
    return int(np.sum(np.asarray(mask) == 0))


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def folder(tmp_path):
    """Two pictures: a white square of 16x16 on black, and one of 8x8."""
    for name, side in (("a.png", 16), ("b.png", 8)):
        image = np.zeros((32, 32), np.uint8)
        image[8 : 8 + side, 4 : 4 + side] = 255
        write(tmp_path / name, image)
    return tmp_path


def square_mask(size, side):
    mask = np.ones((size, size, 1), np.uint8)
    low = (size - side) // 2
    mask[low : low + side, low : low + side] = 0
    return mask


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


def test_touches_border_sees_the_outermost_pixels_only():
    mask = np.ones((5, 6, 7, 1), np.uint8)
    mask[0, 1:5, 1:6] = 0
    for i, pixel in enumerate(((0, 3), (5, 3), (2, 0), (2, 6)), start=1):
        mask[i][pixel] = 0
    np.testing.assert_array_equal(masks.touches_border(mask), [False] + 4 * [True])


def test_near_border_sees_the_outermost_fifty_of_512_pixels():
    mask = np.ones((4, 512, 512, 1))
    for i, (row, column) in enumerate([(50, 461), (49, 200), (462, 200), (200, 462)]):
        mask[i, row, column] = 0
    np.testing.assert_array_equal(masks.near_border(mask), [False, True, True, True])


# Random masks.

CASES = [
    # Few shapes, which other tests share: each line is a compilation.
    ("strokes", False, (64, 96)),
    ("strokes", True, (33, 57)),
    ("blobs", False, (64, 96)),
    ("blobs", True, (128, 128)),
    ("rectangles", False, (64, 96)),
    ("rectangles", True, (17, 24)),
    ("mixed", True, (48, 80)),
    ("mixed", None, (64, 64)),
    ("ragged", None, (64, 96)),
]


@pytest.mark.parametrize("kind, border, shape", CASES)
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
def test_whole_percents_are_counted_to_the_pixel(side):
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
def test_every_count_can_be_asked_for_as_a_ratio(pixels):
    expected = np.arange(1, pixels)
    ratios = expected / pixels
    counts = jax.jit(masks._whole_pixels, static_argnums=1)(ratios, pixels)
    np.testing.assert_array_equal(counts, expected)
    some = slice(0, None, 1 + pixels // 1000)
    counts = [masks._whole_pixels(ratio, pixels) for ratio in ratios[some]]
    np.testing.assert_array_equal(counts, expected[some])


def test_ratios_between_two_counts_are_rounded_down():
    # Those of the paper's range, at the sizes that it is mostly drawn in.
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
def test_what_no_count_meets_is_rounded_down_to_one_at_least(ratio, expected):
    mask = masks.random_mask(KEY, (8, 8), hole_ratio=ratio, kind="rectangles")
    assert holes(mask) == expected


def test_all_the_room_inside_the_border_can_be_asked_for():
    options = dict(kind="rectangles", border=False)
    # In floats, this is more than 1 less the share of the border.
    mask = masks.random_mask(KEY, (14, 14), hole_ratio=144 / 196, **options)
    assert holes(mask) == 144
    with pytest.raises(ValueError, match="room for 0.735"):
        masks.random_mask(KEY, (14, 14), hole_ratio=145 / 196, **options)


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    ratio=st.floats(0.01, 0.99),
    span=st.floats(0, 0.5),
)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_any_ratio_can_be_had(seed, ratio, span):
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


def test_ragged_holes_have_many_times_as_many_islands():
    """Islands of up to 4 pixels."""

    def islands(kind):
        valid = draw_batch(16, (64, 96), kind=kind, hole_ratio=0.3)
        areas = [
            cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)[2]
            for mask in valid
        ]
        return np.array([(a[1:, cv2.CC_STAT_AREA] <= 4).sum() for a in areas])

    mixed, ragged = islands("mixed"), islands("ragged")
    assert ragged.mean() > 5 * max(mixed.mean(), 1)
    assert (ragged < ragged.mean() / 4).any()  # Not all are.


def test_same_key_same_mask_and_other_keys_others():
    batch = draw_batch(8)
    np.testing.assert_array_equal(batch, draw_batch(8))
    for i, one in enumerate(batch):
        for other in batch[:i]:
            assert np.mean(one != other) > 0.01


def test_range_is_drawn_from_evenly():
    batch = draw_batch(300, (17, 24), kind="rectangles", border=True)
    counts, _ = np.histogram(masks.hole_ratio(batch), 6, (0.01, 0.6))
    assert counts.sum() == 300
    assert counts.min() > 25 and counts.max() < 75  # 50 each, standard deviation 6.5


def same_but_for_rounding(a, b):
    """Other fusions round differently, which may swap pixels at a hole's edge."""
    assert a.shape == b.shape
    assert holes(a) == holes(b)
    assert np.mean(np.asarray(a) != np.asarray(b)) < 0.005


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


def test_no_border_in_a_traced_ratio_that_does_not_fit_takes_what_fits():
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


# Mask folders.


def test_folder_polarity(folder):
    white, black = MaskFolder(folder), MaskFolder(folder, hole="black")
    assert len(white) == len(black) == 2
    for i, side in enumerate((16, 8)):
        chex.assert_shape(white[i], (32, 32, 1))
        assert white[i].dtype == np.uint8
        assert holes(white[i]) == side**2
        np.testing.assert_array_equal(white[i], 1 - black[i])
        assert white[i][8, 4, 0] == 0 and white[i][7, 4, 0] == 1


@pytest.mark.parametrize("threshold, hole_columns", [(0.3, 3), (0.6, 2), (0.9, 1)])
def test_folder_threshold(tmp_path, threshold, hole_columns):
    image = np.tile(np.array([0, 128, 192, 255], np.uint8), (4, 1))
    write(tmp_path / "a.png", image)
    mask = MaskFolder(tmp_path, threshold=threshold)[0]
    assert holes(mask) == 4 * hole_columns


def test_folder_is_recursive_and_sorted_and_reads_every_format(tmp_path, monkeypatch):
    names = ["b/1.jpg", "a.png", "b/0.webp", "c.JPEG", "b/c/2.png"]
    for i, name in enumerate(names):
        image = np.zeros((16, 16, 3), np.uint8)
        image[: 2 * i + 2] = 255
        write(tmp_path / name, image)
    (tmp_path / "notes.txt").write_text("not a mask")
    (tmp_path / "._a.png").write_text("what macOS leaves beside a file")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = MaskFolder("~")
    found = [path.relative_to(tmp_path).as_posix() for path in folder.paths]
    assert found == sorted(names)
    for name, mask in zip(found, folder, strict=True):
        assert holes(mask) == 16 * (2 * names.index(name) + 2)


@pytest.mark.parametrize("root", [".", ".hidden", ".hidden/below"])
def test_folder_leaves_out_what_is_hidden_below_it(tmp_path, root):
    root = tmp_path / root
    others = ["._a.png", ".ipynb_checkpoints/a-checkpoint.png", "b/.c/d/e.png"]
    for name in ("a.png", "b/1.png", *others):
        write(root / name, np.zeros((8, 8), np.uint8))
    assert MaskFolder(root).paths == [root / "a.png", root / "b/1.png"]


def test_folder_reads_linked_folders_once(tmp_path):
    write(tmp_path / "disk/1.png", np.zeros((8, 8), np.uint8))
    root = tmp_path / "masks"
    root.mkdir()
    for link, target in {"b": "disk", "a": "disk", "loop": "masks"}.items():
        (root / link).symlink_to(tmp_path / target)
    assert MaskFolder(root).paths == [root / "a/1.png"]


@pytest.mark.parametrize("content", [b"", b"not a picture", "truncated"])
def test_folder_names_the_file_that_cannot_be_read(folder, content):
    if content == "truncated":
        content = (folder / "a.png").read_bytes()[:40]
    (folder / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match="bad.png"):
        MaskFolder(folder)[2]


def test_folder_refuses(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has none.*empty"):
        MaskFolder(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such folder.*missing"):
        MaskFolder(tmp_path / "missing")
    with pytest.raises(ValueError, match="hole must be 'white' or 'black'"):
        MaskFolder(folder, hole="red")
    with pytest.raises(ValueError, match="threshold"):
        MaskFolder(folder, threshold=153)
    with pytest.raises(ValueError, match="hole_ratio must be .* got .0.3, 0.1."):
        MaskFolder(folder, hole_ratio=(0.3, 0.1))


def test_sample_keeps_to_the_range_and_else_takes_the_closest(folder):
    rng = np.random.default_rng(0)
    options = dict(dilate=None, rotate=False, shift=False, crop=False)
    # 16 x 16 of 32 x 32 is 0.25, 8 x 8 is 0.0625.
    for hole_ratio, area in (((0.1, 0.3), 256), ((0.5, 0.6), 256), ((0.01, 0.02), 64)):
        source = MaskFolder(folder, hole_ratio=hole_ratio)
        for _ in range(10):
            assert holes(source.sample(rng, 32, **options)) == area


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tries=0), "tries"),
        (dict(size=0), "size"),
        (dict(dilate=(9, 3)), "dilate"),
    ],
)
def test_sample_refuses(folder, options, message):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=message):
        MaskFolder(folder).sample(rng, **{"size": 32, **options})


OFF = dict(dilate=None, rotate=False, shift=False, crop=False)


@pytest.mark.parametrize("shape", [(32, 32, 1), (33, 33, 1)])
def test_augment_with_all_off_is_the_identity(shape):
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, shape, np.uint8)
    np.testing.assert_array_equal(augment(mask, shape[0], rng, **OFF), mask)


def test_augment_takes_the_central_square_and_scales():
    mask = np.ones((16, 24, 1), np.uint8)
    mask[4:8, 4:12] = 0
    scaled = augment(mask, 32, np.random.default_rng(0), **OFF)
    expected = np.ones((32, 32, 1), np.uint8)
    expected[8:16, :16] = 0
    np.testing.assert_array_equal(scaled, expected)


@pytest.mark.parametrize("size", [128, 256, 512])
def test_augment_dilates_by_the_diameter_asked_for_at_512(size):
    mask = square_mask(size, size // 4)
    options = {**OFF, "dilate": (40, 40)}
    mask = augment(mask, size, np.random.default_rng(0), **options)
    row = mask[size // 2, :, 0]
    assert abs(holes(row) - (size // 4 + 40 * size // 512)) <= 2


def test_augment_leaves_a_mask_without_holes_alone():
    mask = np.ones((32, 32, 1), np.uint8)
    for seed in range(5):
        out = augment(mask, 48, np.random.default_rng(seed))
        assert out.shape == (48, 48, 1) and out.all()


def test_what_augment_uncovers_is_valid():
    mask = np.zeros((64, 64, 1), np.uint8)
    rng = np.random.default_rng(0)
    shifted = augment(mask, 64, rng, **{**OFF, "shift": True})
    rows, columns = (shifted[..., 0] == 0).any(1), (shifted[..., 0] == 0).any(0)
    assert 48 <= rows.sum() < 64 or 48 <= columns.sum() < 64
    assert holes(shifted) == rows.sum() * columns.sum()
    turned = augment(mask, 64, rng, **{**OFF, "rotate": True})
    assert np.mean(turned == 0) < 0.97
    assert holes(turned[24:40, 24:40]) == 256


def test_augment_rotation_keeps_the_area_and_the_centre():
    mask = square_mask(128, 40)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        turned = augment(mask, 128, rng, **{**OFF, "rotate": True})
        assert abs(holes(turned) - 1600) < 80
        assert abs(np.argwhere(turned[..., 0] == 0).mean(0) - 63.5).max() < 0.5


def test_augment_crop_enlarges():
    mask = square_mask(128, 40)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        cropped = augment(mask, 128, rng, **{**OFF, "crop": True})
        assert 1500 <= holes(cropped) <= 4 * 1600 + 200


def test_augment_is_binary_and_follows_its_generator():
    mask = np.random.default_rng(1).integers(0, 2, (64, 80, 1), np.uint8)

    def draw(seed):
        return augment(mask, 48, np.random.default_rng(seed))

    for seed in range(5):
        out = draw(seed)
        assert out.shape == (48, 48, 1) and out.dtype == np.uint8
        assert set(np.unique(out)) <= {0, 1}
        np.testing.assert_array_equal(out, draw(seed))
    sparse = square_mask(64, 10)
    a, b = (augment(sparse, 48, np.random.default_rng(s)) for s in (0, 1))
    assert (a != b).any()


def test_augment_refuses_a_mask_without_its_channel():
    with pytest.raises(ValueError, match=r"mask must be \[H, W, 1\]"):
        augment(np.ones((8, 8)), 8, np.random.default_rng(0))
