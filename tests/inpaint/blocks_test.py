import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pconv_jax.inpaint import blocks
from pconv_jax.inpaint.blocks import fill_in_blocks
from pconv_jax.inpaint.inpainter import Inpainter
from tests.helpers.networks import make_network


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_PIXELS", 90_000)
    monkeypatch.setattr(blocks, "_MARGIN", 48)
    monkeypatch.setattr(blocks, "_RIM", 32)
    monkeypatch.setattr(blocks, "_GROUP", 128)


class Recorder:
    """Fills with the mean of what is known, and records what it was given."""

    def __init__(self):
        self.sizes, self.filled = [], 0

    def __call__(self, colors, known, hole, exclude, progress):
        assert colors.shape[:2] == known.shape == hole.shape == exclude.shape
        assert known.any() and not (known & hole).any()
        self.sizes.append(hole.size)
        self.filled += np.count_nonzero(hole)
        colors[hole] = np.rint(colors[known].mean(axis=0))
        progress(0.5)
        progress(1)
        return np.where(hole, 2, 0).astype(np.uint8)


def holes(kind, shape=(700, 900)):
    hole = np.zeros(shape, bool)
    if kind == "small":
        hole[300:340, 400:480] = True
    if kind == "apart":
        hole[[0, 5, 350, 699], [0, 870, 450, 899]] = True
    if kind == "dots":
        hole[::31, ::29] = True
    if kind == "half":
        hole[:, :450] = True
    if kind == "all but the corner":
        hole[:] = True
        hole[:9, :9] = False
    if kind == "noise":
        hole = np.random.default_rng(0).random(shape) < 0.5
    return hole


@pytest.mark.parametrize(
    "kind", ["small", "apart", "dots", "half", "all but the corner", "noise", "none"]
)
def test_blocks_are_small_and_fill_everything(small_blocks, kind):
    hole = holes(kind)
    colors = np.full((*hole.shape, 3), 100, np.uint8)
    colors[hole] = 7
    known, fill = ~hole, Recorder()
    exclude = np.broadcast_to(False, hole.shape)
    fractions = []
    depth = fill_in_blocks(
        fill, colors, known, hole, exclude, progress=fractions.append
    )
    assert np.all(colors == 100) and known.all()
    assert fractions == sorted(fractions) and (fractions or [1])[-1] == 1
    np.testing.assert_array_equal(depth > 0, hole)
    assert max(fill.sizes, default=0) <= 1.1 * blocks.BLOCK_PIXELS
    if kind == "small":  # One block, with much around it.
        assert len(fill.sizes) == 1 and fill.sizes[0] > 0.9 * blocks.BLOCK_PIXELS


def test_what_is_neither_known_nor_filled_stays(small_blocks):
    hole = holes("half")
    colors = np.full((*hole.shape, 3), 100, np.uint8)
    clear = np.zeros(hole.shape, bool)
    clear[100:600, 500:800] = True
    colors[clear] = 5
    known, fill = ~hole & ~clear, Recorder()
    fill_in_blocks(fill, colors, known, hole, clear)
    assert np.all(colors[clear] == 5) and np.all(colors[~clear] == 100)
    np.testing.assert_array_equal(known, ~clear)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 40))
def test_any_hole_is_filled_once(seed, count):
    rng = np.random.default_rng(seed)
    hole = np.zeros((400, 500), bool)
    for _ in range(count):
        top, left = rng.integers(0, (400, 500))
        height, width = rng.integers(1, (200, 250))
        hole[top : top + height, left : left + width] = True
    hole[:5, :5] = False
    colors = np.where(hole, 0, 50)[..., None].astype(np.float32)
    fill = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_PIXELS", 40_000)
        patch.setattr(blocks, "_MARGIN", 40)
        patch.setattr(blocks, "_RIM", 20)
        exclude = np.broadcast_to(False, hole.shape)
        depth = fill_in_blocks(fill, colors, ~hole, hole, exclude)
    assert np.all(colors == 50)
    np.testing.assert_array_equal(depth > 0, hole)


@pytest.mark.slow
def test_a_large_image_is_repaired(small_blocks, fast_compilation):
    inpainter = Inpainter(*make_network(), detail=False)
    y, x = np.mgrid[:500, :600]
    image = np.stack([x // 3, y // 2, (x + y) // 5], axis=-1).astype(np.uint8)
    hole = holes("half", (500, 600)) | holes("small", (500, 600))
    hole[:, :100] = False
    damaged = np.where(hole[..., None], 0, image).astype(np.uint8)
    result, depth = inpainter(damaged, hole, return_depth=True)
    np.testing.assert_array_equal(result[~hole], image[~hole])
    np.testing.assert_array_equal(depth > 0, hole)
    # What is in the hole does not matter.
    damaged[hole] = 200
    np.testing.assert_array_equal(inpainter(damaged, hole), result)
