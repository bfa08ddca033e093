import numpy as np
import pytest

from pconv_jax.runs.pictures import image_grid


def test_the_images_of_a_grid_are_where_they_belong():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2, 7, 30, 40, 3), dtype=np.uint8)
    grid = image_grid({"a": x, "b": y})
    assert grid.dtype == np.uint8
    assert grid.shape == (18 + 7 * 30 + 6 * 2, 40 + 2 + 40, 3)
    rest = grid.copy()
    for row in range(7):
        top = 18 + row * 32
        np.testing.assert_array_equal(grid[top : top + 30, :40], x[row])
        np.testing.assert_array_equal(grid[top : top + 30, 42:], y[row])
        rest[top : top + 30, :40] = 255
        rest[top : top + 30, 42:] = 255
    np.testing.assert_array_equal(rest[18:], 255)
    np.testing.assert_array_equal(rest[:, 40:42], 255)


@pytest.mark.parametrize(
    "name, width", [("input", 64), ("composite", 40), ("x" * 99, 9)]
)
def test_captions_are_centered_above_their_own_column(name, width):
    white = np.full((1, 4, width, 3), 255, np.uint8)
    grid = image_grid({"": white, name: white, " ": white})
    dark = np.flatnonzero((grid < 128).any(axis=(0, 2)))
    assert width + 2 <= dark.min() and dark.max() < 2 * width + 2
    assert abs((dark.min() + dark.max()) / 2 - (width + 2 + (width - 1) / 2)) <= 1.5
    assert not (grid[18:] < 255).any()


def test_grids_show_all_examples():
    for count in (1, 3, 9):
        x = np.zeros((count, 4, 5, 3), np.uint8)
        height = 18 + count * 4 + (count - 1) * 2
        assert image_grid({"a": x}).shape == (height, 5, 3)


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"a": np.zeros((2, 4, 4, 3), "u1"), "b": np.zeros((1, 4, 4, 3), "u1")},
        {"a": np.zeros((4, 4, 3), "u1")},
        {"a": np.zeros((1, 4, 4, 1), "u1")},
        {"a": np.zeros((0, 4, 4, 3), "u1")},
        {"a": np.zeros((1, 4, 4, 3))},
    ],
)
def test_columns_that_do_not_make_a_grid(columns):
    with pytest.raises(ValueError, match="columns must be images"):
        image_grid(columns)
