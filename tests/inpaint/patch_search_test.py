import chex
import jax
import numpy as np
import pytest

from pconv_jax.inpaint.patch_search import (
    RADIUS,
    Grid,
    find_length,
    make_problem,
    search_and_vote,
    vote,
)


def problem_of(image, hole, source):
    """Describe a search that goes by the estimate alone."""
    grid = Grid(*hole.shape, find_length(hole.shape))
    height, width = hole.shape
    rows, columns = np.nonzero(hole)  # Only patches whose center is missing vote.
    is_center = np.zeros_like(source)
    for row in range(RADIUS, height - RADIUS):
        for column in range(RADIUS, width - RADIUS):
            patch = source[row - RADIUS :, column - RADIUS :]
            is_center[row, column] = patch[: 2 * RADIUS + 1, : 2 * RADIUS + 1].all()
    problem = make_problem(
        grid,
        rows,
        columns,
        in_hole=hole[rows, columns],
        guide_weight=np.zeros(len(rows), np.float32),
        rim_weight=np.ones(len(rows), np.float32),
        low=image,
        is_center=is_center,
    )
    return grid, problem


def square_hole(shape=(40, 56), size=8):
    hole = np.zeros(shape, bool)
    hole[14 : 14 + size, 20 : 20 + size] = True
    return hole


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_gives_back_an_image(channels):
    image = np.random.default_rng(0).random((20, 31, channels)).astype(np.float32)
    grid = Grid(20, 31, find_length((20, 31)))
    flat = grid.flatten(image)
    chex.assert_shape(flat, (grid.length, channels))
    np.testing.assert_array_equal(grid.unflatten(flat), image)
    rows, columns = np.nonzero(image[..., 0] > 0.5)
    np.testing.assert_array_equal(
        flat[grid.number(rows, columns)], image[rows, columns]
    )
    np.testing.assert_array_equal(
        grid.place(grid.number(rows, columns)), (rows, columns)
    )


def test_votes_are_those_of_numpy():
    """The weighted mean of what each patch around a pixel copies to it, by loops."""
    rng = np.random.default_rng(1)
    image = rng.random((40, 56, 3)).astype(np.float32)
    hole = square_hole()
    grid, problem = problem_of(image, hole, ~hole)
    centers = np.flatnonzero(problem.is_center)
    count = problem.total
    match = rng.choice(centers, grid.length).astype(np.int32)
    weight = np.where(np.arange(grid.length) < count, rng.random(grid.length), 0)
    weight = weight.astype(np.float32)
    flat = grid.flatten(image)
    voted = grid.unflatten(np.asarray(vote(flat, match, weight, problem)))
    np.testing.assert_array_equal(voted[~hole], image[~hole])
    target_at = grid.unflatten(problem.target_at)
    for row, column in zip(*np.nonzero(hole)):
        colors, weights = [], []
        for down in range(-RADIUS, RADIUS + 1):
            for right in range(-RADIUS, RADIUS + 1):
                target = target_at[row + down, column + right]
                if target >= 0:
                    y, x = grid.place(match[target])
                    colors.append(image[y - down, x - right])
                    weights.append(weight[target])
        expected = np.average(colors, axis=0, weights=weights)
        np.testing.assert_allclose(voted[row, column], expected, rtol=1e-5)


@pytest.mark.parametrize("x64", [False, True])
def test_a_periodic_image_is_found(x64):
    """From an estimate that is nearly right, the search finds exact copies."""
    rng = np.random.default_rng(2)
    image = np.tile(rng.random((8, 8, 3)).astype(np.float32) * 255, (5, 7, 1))
    hole = square_hole()
    grid, problem = problem_of(image, hole, ~hole)
    noise = rng.normal(0, 10, image.shape).astype(np.float32)
    flat = grid.flatten(np.where(hole[..., None], image + noise, image))
    match = rng.choice(np.flatnonzero(problem.is_center), grid.length).astype(np.int32)
    done = []
    with jax.enable_x64(x64):
        found, match = search_and_vote(
            np.uint32(0), flat, match, problem, 8, progress=done.append
        )
    assert found.dtype == np.float32 and match.dtype == np.int32
    np.testing.assert_allclose(done, np.arange(1, 9) / 8)
    rows, columns = np.nonzero(hole)
    distances = np.subtract(grid.place(match[: problem.total]), (rows, columns))
    assert (distances % 8 == 0).all()
    np.testing.assert_allclose(grid.unflatten(found), image, atol=1e-3)
