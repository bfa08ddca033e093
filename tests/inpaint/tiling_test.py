import numpy as np
import pytest

from pconv_jax.inpaint.tiling import divide


def test_many_specks_in_a_strip_are_divided_evenly():
    hole = np.zeros((4, 140_000), bool)
    hole[0, ::131] = True
    tiles = divide(hole, [256])
    assert sum(hole[tile.box].sum() for tile in tiles) == hole.sum()


@pytest.mark.parametrize("seed", range(6))
def test_tiles_hold_all_of_the_hole_once(seed):
    rng = np.random.default_rng(seed)
    shape = (1500, 2100)
    hole = np.zeros(shape, bool)
    if seed < 3:  # Spots, few or many.
        for top, left in rng.integers(0, shape, (10 ** (seed + 1), 2)):
            hole[top : top + 5, left : left + 5] = True
    elif seed == 3:  # A scratch across.
        hole[np.arange(1500), np.arange(1500)] = True
    elif seed == 4:
        hole[100:1400, 50:1900] = True
    else:
        hole = np.ones(shape, bool)
    sides = (128, 256, 384, 512, 768, 1024)
    tiles = divide(hole, sides)
    count = np.zeros(shape, int)
    for (rows, columns), (top, left, side) in tiles:
        count[rows, columns] += 1
        assert side in sides
        assert top <= rows.start and rows.stop <= min(top + side, shape[0])
        assert left <= columns.start and columns.stop <= min(left + side, shape[1])
        # The network sees a margin, as far as the image goes.
        assert rows.start - top >= min(64, rows.start)
        assert left + side - columns.stop >= min(64, shape[1] - columns.stop)
    assert count.max() == 1 and np.all(count[hole] == 1)
    pixels = sum(side**2 for _, (_, _, side) in tiles)
    assert pixels <= [7e5, 6e6, 9e6, 3e6, 9e6, 9e6][seed]


def test_holes_far_apart_are_repaired_apart():
    hole = np.zeros((2000, 3000), bool)
    hole[10:14, 20:30] = hole[1700:1750, 2900:2950] = True
    hole[1990:, :3] = True
    sides = (128, 256, 384, 512, 768, 1024)
    assert [t.square for t in divide(hole, sides)] == [
        *((0, 0, 256), (1744, 0, 256), (1597, 2744, 256))
    ]
    assert not divide(np.zeros((3, 3), bool), sides)
