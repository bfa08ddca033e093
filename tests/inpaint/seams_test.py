import numpy as np
import pytest

from pconv_jax.inpaint import seams
from pconv_jax.inpaint.scales import Scale
from pconv_jax.inpaint.seams import copy_pieces, join_pieces


def make_scale(image, *, rows=slice(8, 20), columns=slice(10, 24)):
    hole = np.zeros(image.shape[:2], bool)
    hole[rows, columns] = True
    image = np.where(hole[..., None], 128, image).astype(np.float32)
    return Scale(image, hole, ~hole)


def constant(scale, offset):
    return np.broadcast_to(offset, (*scale.hole.shape, 2))


def test_pieces_are_copied_from_sources_only():
    image = np.arange(30 * 40 * 2, dtype=np.float32).reshape(30, 40, 2)
    scale = make_scale(image)
    shifts = np.random.default_rng(0).integers(-25, 26, (30, 40, 2))
    copied = copy_pieces(scale, shifts)
    for row, column in np.argwhere(scale.hole):
        from_row, from_column = np.add((row, column), shifts[row, column])
        expected = [128, 128]  # The guide.
        if 0 <= from_row < 30 and 0 <= from_column < 40:
            if scale.source[from_row, from_column]:
                expected = image[from_row, from_column]
        np.testing.assert_array_equal(copied[row, column], expected)
    np.testing.assert_array_equal(copied[~scale.hole], image[~scale.hole])


def test_a_piece_takes_the_brightness_of_its_surroundings():
    """The gradients of a ramp are the same everywhere, but its colors are not."""
    y, x = np.mgrid[:30, :60]
    texture = np.random.default_rng(0).uniform(-9, 9, (30, 20)).repeat(3, axis=0)
    texture = np.tile(texture[:30], (1, 3))
    image = (60 + 2 * x + y + texture)[..., None]
    scale = make_scale(image, columns=slice(25, 35))
    shifts = constant(scale, (0, 20))
    assert np.abs(copy_pieces(scale, shifts) - image)[scale.hole].min() > 39
    joined = join_pieces(scale, shifts)
    # What is left is the part of the pieces' own colors.
    np.testing.assert_allclose(joined, image, atol=2)
    np.testing.assert_array_equal(joined[~scale.hole], scale.image[~scale.hole])


def two_pieces(difference):
    """The left half of a hole copies from the left, the right one from the right."""
    image = np.full((30, 60, 1), 100.0)
    image[:, 30:] += difference
    scale = make_scale(image, columns=slice(20, 40))
    shifts = np.zeros((30, 60, 2), int)
    shifts[:, :30, 1], shifts[:, 30:, 1] = -20, 20
    return scale, join_pieces(scale, shifts)


def test_an_edge_stays_an_edge_and_a_small_step_is_smoothed():
    _, joined = two_pieces(100)
    steps = np.diff(joined[14, 19:41, 0])
    assert steps[10] > 60 > 4 > np.delete(steps, 10).max()
    _, joined = two_pieces(4)
    assert np.abs(np.diff(joined[14, 18:42, 0])).max() < 1


@pytest.mark.parametrize("seed", range(3))
def test_the_result_solves_the_least_squares_problem(seed):
    """The same problem, with a row for each difference, solved as a dense one."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(0, 255, (14, 15, 2))
    scale = make_scale(image, rows=slice(0, 6), columns=slice(5, 10))  # At the border.
    shifts = rng.choice([(7, 0), (8, -2), (-3, 4)], (14, 15))
    copied = copy_pieces(scale, shifts)
    places = list(map(tuple, np.argwhere(scale.hole)))
    matrix, right = [], []

    def add(entries, value, weight):
        row = np.zeros(len(places))
        for place, factor in entries:
            row[places.index(place)] = factor
        matrix.append(row * weight**0.5)
        right.append(np.asarray(value) * weight**0.5)

    def is_source(place):
        inside = 0 <= place[0] < 14 and 0 <= place[1] < 15
        return inside and scale.source[tuple(place)]

    def add_difference(place, beside):
        wanted = []
        for owner in (place, beside):
            if scale.hole[owner]:
                ends = [tuple(np.add(x, shifts[owner])) for x in (place, beside)]
                if all(map(is_source, ends)):
                    wanted.append(scale.image[ends[0]] - scale.image[ends[1]])
        wanted = np.mean(wanted, axis=0) if wanted else np.zeros(2)
        jump = copied[place] - copied[beside] - wanted
        weight = 1 / (1 + np.mean(jump**2) / seams._EDGE**2)
        known = [(p, s) for p, s in ((place, 1), (beside, -1)) if scale.hole[p]]
        for p, s in ((place, 1), (beside, -1)):
            if not scale.hole[p]:
                wanted = wanted - s * scale.image[p]
        add(known, wanted, weight)

    for place in places:
        add([(place, 1)], copied[place], seams._ANCHOR)
    for row in range(14):
        for column in range(15):
            for beside in ((row + 1, column), (row, column + 1)):
                if beside[0] < 14 and beside[1] < 15:
                    if scale.hole[row, column] or scale.hole[beside]:
                        add_difference((row, column), beside)
    expected, *_ = np.linalg.lstsq(np.stack(matrix), np.stack(right))
    result = join_pieces(scale, shifts)[scale.hole]
    np.testing.assert_allclose(result, expected, atol=1e-3)
