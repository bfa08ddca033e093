import itertools
import tracemalloc

import numpy as np
import pytest

from pconv_jax.inpaint import shift_map
from pconv_jax.inpaint.detail import add_detail
from pconv_jax.inpaint.scales import Scale
from pconv_jax.inpaint.shift_map import fill_with_pieces, find_offsets


def tiles(height=120, width=140, channels=3, period=(12, 20)):
    """A random tile, again and again."""
    rng = np.random.default_rng(1)
    tile = rng.uniform(0, 255, (*period, channels)).astype(np.float32)
    repeats = -(-height // period[0]), -(-width // period[1]), 1
    return np.tile(tile, repeats)[:height, :width]


def with_hole(image, *, size=40, exclude=None):
    """An image whose guide is its mean color."""
    hole = np.zeros(image.shape[:2], bool)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    hole[top : top + size, left : left + size] = True
    guide = np.where(hole[..., None], image[~hole].mean(0), image)
    source = ~hole if exclude is None else ~hole & ~exclude
    return Scale(guide.astype(np.float32), hole, source)


def fill(scale, seed=0, **options):
    return fill_with_pieces(scale, np.random.default_rng(seed), **options)


def test_offsets_are_the_periods_of_the_image():
    offsets = find_offsets(with_hole(tiles()), np.random.default_rng(0))
    assert len(offsets) > 10
    np.testing.assert_array_equal(offsets % (12, 20), 0)
    assert (offsets != 0).any(1).all()


def test_too_small_an_image_has_no_offsets():
    for shape in ((7, 30), (16, 16)):
        image = tiles(*shape)
        hole = np.ones(shape, bool)
        hole[0] = False
        scale = Scale(image, hole, ~hole)
        assert find_offsets(scale, np.random.default_rng(0)).shape == (0, 2)
        assert fill(scale) is None


def test_matches_are_the_nearest_far_patches():
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(9, 11, 5)).astype(np.float32)
    usable = rng.random((9, 11)) < 0.8
    places = rng.permutation(np.argwhere(usable))[:30]
    found = shift_map._match(patches, usable, places, 3)
    rows, columns = np.mgrid[:9, :11]
    for (row, column), offset in zip(places, found, strict=True):
        distances = np.square(patches - patches[row, column]).sum(-1)
        near = np.maximum(abs(rows - row), abs(columns - column)) < 3
        distances[near | ~usable] = np.inf
        match = np.unravel_index(distances.argmin(), (9, 11))
        np.testing.assert_array_equal(offset, np.subtract(match, (row, column)))
    assert len(shift_map._match(patches, usable, places, 99)) == 0


@pytest.mark.parametrize("decisions", [0, 1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_minimum_cut_is_the_cheapest_set(seed, decisions, monkeypatch):
    monkeypatch.setattr(shift_map, "_DECISIONS", decisions)
    rng = np.random.default_rng(seed)
    change = rng.integers(-50, 50, 7).astype(float)
    first, second = np.array(list(itertools.combinations(range(7), 2))).T
    capacity = rng.integers(0, 20, len(first)).astype(float)

    def cost(chosen):
        return change[chosen].sum() + capacity[~chosen[first] & chosen[second]].sum()

    sets = [np.array(bits) for bits in itertools.product([False, True], repeat=7)]
    best = shift_map._minimize(change, first, second, capacity)
    assert cost(best) == min(map(cost, sets))


def small_labeling(seed=0, side=3):
    """A hole of a few pixels in noise, and offsets for them that are not the best."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(0, 255, (12, 13, 3)).astype(np.float32)
    hole = np.zeros(image.shape[:2], bool)
    hole[4 : 4 + side, 5 : 5 + side] = True
    scale = Scale(image, hole, ~hole)
    shifts = np.zeros((*hole.shape, 2), int)
    shifts[hole] = rng.choice([(-4, 0), (0, -4), (4, 1), (-2, 3)], hole.sum())
    return scale, shifts, shift_map._Labeling(shift_map._Costs(scale, 2), shifts)


def energy(scale, shifts, zoom):
    """The cost of a shift-map, computed pixel by pixel."""
    height, width = scale.hole.shape
    depth = shift_map.depth_in(scale.hole)
    low = shift_map.blur(scale.image, max(3 / zoom, 1))

    def copied(place, offset):
        row, column = np.add(place, offset)
        return min(max(row, 0), height - 1), min(max(column, 0), width - 1)

    def is_source(place):
        return (
            0 <= place[0] < height
            and 0 <= place[1] < width
            and scale.source[tuple(place)]
        )

    total = 0.0
    for place in map(tuple, np.argwhere(scale.hole)):
        offset = shifts[place]
        if not is_source(np.add(place, offset)):
            total += shift_map._FORBIDDEN
        else:
            weight = 0.5 * zoom * max(np.exp(-depth[place] * zoom / 16), 0.1)
            total += weight * np.linalg.norm(low[copied(place, offset)] - low[place])
            for side in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                beside = tuple(np.add(place, side))
                if not is_source(beside):
                    continue
                if is_source(np.add(beside, offset)):
                    color = scale.image[copied(beside, offset)]
                    total += 2 * np.linalg.norm(color - scale.image[beside])
                else:
                    total += 2 * 255 * 3**0.5
        for side in ((0, 1), (1, 0)):
            beside = tuple(np.add(place, side))
            if beside[0] < height and beside[1] < width and scale.hole[beside]:
                for pixel in (place, beside):
                    own, other = (copied(pixel, shifts[x]) for x in (place, beside))
                    total += np.linalg.norm(scale.image[own] - scale.image[other])
    return total


def total(labeling):
    """The same, as far as it is kept up to date."""
    pairs = np.arange(len(labeling._first))
    return labeling._cost.sum() + labeling._compute_seams(pairs).sum()


def test_an_energy_is_that_of_its_definition_after_every_expansion():
    scale, shifts, labeling = small_labeling()
    np.testing.assert_allclose(total(labeling), energy(scale, shifts, 2), rtol=1e-5)
    rng = np.random.default_rng(1)
    for _ in range(20):
        before = total(labeling)
        pixels = np.flatnonzero(rng.random(9) < 0.7)
        labeling.expand(rng.integers(-5, 6, 2), pixels)
        expected = energy(scale, labeling.shifts(), 2)
        np.testing.assert_allclose(total(labeling), expected, rtol=1e-5)
        assert total(labeling) <= before + 5  # The rounding of a minimum cut.


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pixels", [range(4), (0, 2, 3)])
def test_an_expansion_is_the_best_of_all(seed, pixels):
    scale, shifts, labeling = small_labeling(seed, side=2)
    offset = np.array([-3, 2])
    costs = []
    for bits in itertools.product([False, True], repeat=len(pixels)):
        own = shifts[scale.hole]
        own[np.array(pixels)[np.array(bits)]] = offset
        changed = shifts.copy()
        changed[scale.hole] = own
        costs.append(energy(scale, changed, 2))
    labeling.expand(offset, np.array(pixels))
    np.testing.assert_allclose(total(labeling), min(costs), atol=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_are_restored(channels):
    image = tiles(channels=channels)
    filled = fill(with_hole(image))
    assert filled.dtype == np.float32
    np.testing.assert_allclose(filled, image, atol=0.5)


def test_a_large_hole_is_refined_from_coarse_to_fine(monkeypatch):
    monkeypatch.setattr(shift_map, "_COARSE", 500)  # Two scales more.
    y, x = np.mgrid[:160, :160]
    image = np.stack([100 + 80 * np.sin(x / 4), 100 + 80 * np.sin(y / 4)], axis=-1)
    scale = with_hole(image, size=44)
    error = np.abs(fill(scale) - image)[scale.hole].mean()
    # No whole number of pixels is a period of these waves, of 25.1 pixels.
    assert error < 4
    monkeypatch.setattr(shift_map, "_FINE", 500)  # Nothing is refined.
    assert error < np.abs(fill(scale) - image)[scale.hole].mean() < 30


def test_nothing_else_is_copied():
    image = tiles()
    red = np.zeros(image.shape[:2], bool)
    red[:, 110:] = True
    image[red] = (255, 0, 0)
    scale = with_hole(image, exclude=red)
    filled = fill(scale)
    np.testing.assert_allclose(filled[scale.hole], tiles()[scale.hole], atol=0.5)


def test_a_seed_gives_the_same_again_and_another_one_not():
    image = np.random.default_rng(0).uniform(0, 255, (70, 70, 3))
    scale = with_hole(image, size=30)
    first, again, other = (fill(scale, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other)[scale.hole].any()
    np.testing.assert_array_equal(first[~scale.hole], scale.image[~scale.hole])
    assert first.min() >= 0 and first.max() <= 255


def test_progress_rises_to_one(monkeypatch):
    monkeypatch.setattr(shift_map, "_COARSE", 2500)
    noise = np.random.default_rng(0).uniform(0, 255, (200, 220, 3))
    fractions = []
    fill(with_hole(noise, size=90), progress=fractions.append)
    assert fractions == sorted(fractions) and fractions[-1] == 1
    assert len(fractions) > 10 and 0 < fractions[0] < 0.1


def test_only_wide_holes_are_filled_with_pieces():
    image = tiles().astype(np.uint8)
    hole = np.zeros(image.shape[:2], bool)
    hole[20:100, 10:18] = True  # Narrow.
    narrow = hole.copy()
    hole[30:80, 60:100] = True
    guide = np.where(hole[..., None], np.uint8(128), image)
    soft, sharp = (add_detail(image, hole, guide, sharp=s) for s in (False, True))
    assert sharp.dtype == np.uint8
    np.testing.assert_array_equal(sharp[~hole], image[~hole])
    np.testing.assert_array_equal(sharp[narrow], soft[narrow])
    wide = hole & ~narrow
    np.testing.assert_allclose(sharp[wide].astype(float), image[wide], atol=1)
    assert (soft != sharp)[wide].any()


def test_without_a_piece_to_copy_the_search_fills_a_wide_hole():
    image = tiles(40, 40)
    hole = np.ones(image.shape[:2], bool)
    hole[:6] = False  # Squares of 5 x 5 pixels are there, but none of 8 x 8.
    guide = np.where(hole[..., None], np.float32(128), image)
    soft, sharp = (add_detail(image, hole, guide, sharp=s) for s in (False, True))
    np.testing.assert_array_equal(soft, sharp)


def test_memory_is_bounded_where_a_long_crack_leads_through_a_wide_hole():
    image = np.random.default_rng(0).uniform(0, 255, (1200, 1300, 3))
    hole = np.zeros(image.shape[:2], bool)
    hole[600:640, 600:640] = True
    hole[10:1190, 620] = True
    scale = Scale(image.astype(np.float32), hole, ~hole)
    tracemalloc.start()
    try:
        filled = fill(scale)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # With all patches of the image, it was 4.8 GB.
    assert peak < 400 * 2**20
    assert (filled != scale.image)[hole].all()


@pytest.mark.parametrize("rows, has_pieces", [(24, True), (27, False)])
def test_no_pieces_where_more_than_a_quarter_is_missing(rows, has_pieces):
    image = tiles(96, 80).astype(np.uint8)
    hole = np.zeros(image.shape[:2], bool)
    hole[:rows] = True  # The window is the whole image.
    guide = np.where(hole[..., None], np.uint8(128), image)
    soft, sharp = (add_detail(image, hole, guide, sharp=s) for s in (False, True))
    assert (soft != sharp).any() == has_pieces
