import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax import masks
from pconv_jax.runs.settings import MaskSettings
from pconv_jax.train import mask_sampling

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture
def marked_masks(monkeypatch):
    """Masks that say of which kind they are."""
    kinds = ("mixed", "thin", "wide")

    def draw(key, shape, *, hole_ratio, kind, border):
        assert hole_ratio == masks.HOLE_RATIOS.get(kind, (0.01, 0.6))
        return jnp.full((*shape, 1), kinds.index(kind))

    monkeypatch.setattr(masks, "random_mask", draw)


@pytest.mark.parametrize(
    ("thin", "wide"), [(0.0, 0.0), (0.25, 0.0), (0.25, 0.5), (1.0, 0.0), (0.0, 1.0)]
)
def test_thin_and_wide_masks_are_the_parts_that_are_asked_for(marked_masks, thin, wide):
    draw = mask_sampling.mask_sampler(MaskSettings(thin=thin, wide=wide), 8)
    drawn = jax.vmap(draw)(jax.random.split(jax.random.key(0), 2000))[:, 0, 0, 0]
    parts = np.bincount(drawn, minlength=3) / 2000
    # Four standard deviations of a fair coin are 0.045.
    np.testing.assert_allclose(parts, [1 - thin - wide, thin, wide], atol=0.045)
    for part, number in ((thin, 1), (wide, 2)):
        if part in (0, 1):
            assert parts[number] == part


def test_what_is_mixed_in_does_not_depend_on_the_mask_that_it_replaces(monkeypatch):
    def draw(key, shape, *, hole_ratio, kind, border):
        # The first number of each key that a mask splits its own into.
        numbers = jax.vmap(jax.random.normal)(jax.random.split(key, 2))
        return jnp.where(kind == "strokes", numbers, jnp.nan) * jnp.ones((8, 8, 1))

    monkeypatch.setattr(masks, "random_mask", draw)
    sample = mask_sampling.mask_sampler(MaskSettings(kind="strokes", wide=0.5), 8)
    drawn = jax.vmap(sample)(jax.random.split(jax.random.key(0), 2000))
    kept = np.asarray(drawn[:, 0, 0])
    kept = kept[np.isfinite(kept).all(axis=1)]
    assert 900 < len(kept) < 1100
    # Four standard deviations; the mean of the upper half would be 0.8.
    assert np.abs(kept.mean(axis=0)).max() < 4 / np.sqrt(len(kept))


def test_masks_are_those_of_the_kind_where_none_are_mixed_in():
    settings = MaskSettings(kind="rectangles", border="never")
    draw = mask_sampling.mask_sampler(settings, 16)
    expected = functools.partial(
        masks.random_mask,
        shape=(16, 16),
        hole_ratio=(0.01, 0.6),
        kind="rectangles",
        border=False,
    )
    for key in jax.random.split(jax.random.key(0), 3):
        np.testing.assert_array_equal(draw(key), expected(key))


def test_masks_of_a_pool_are_turned_and_mirrored_in_all_eight_ways():
    first = jnp.arange(16).reshape(4, 4, 1) == 1
    pool = jnp.stack([first, jnp.ones_like(first)])
    keys = jax.random.split(jax.random.key(0), 400)
    chosen = jax.vmap(functools.partial(mask_sampling.choose_mask, pool=pool))(keys)
    assert chosen.dtype == jnp.float32
    kinds, counts = np.unique(chosen.reshape(400, -1), axis=0, return_counts=True)
    turned = [np.rot90(x, k) for x in (first, first[:, ::-1]) for k in range(4)]
    expected = {tuple(map(bool, x.ravel())) for x in (*turned, np.ones(16))}
    assert set(map(tuple, kinds.astype(bool))) == expected and len(expected) == 9
    # Half of them are the second mask; four standard deviations are 0.1 and 0.05.
    parts = counts / 400
    assert abs(parts.max() - 0.5) < 0.1
    assert np.abs(np.sort(parts)[:-1] - 1 / 16).max() < 0.05


def test_a_pool_holds_masks_of_the_sampler():
    settings = MaskSettings(kind="rectangles")
    draw = jax.jit(mask_sampling.mask_sampler(settings, 16))
    pool = mask_sampling.draw_pool(jax.random.key(3), draw, count=70)
    assert pool.shape == (70, 16, 16, 1) and pool.dtype == bool
    for number, key in enumerate(jax.random.split(jax.random.key(3), 70)[:5]):
        np.testing.assert_array_equal(pool[number], draw(key) > 0)
    assert len({mask.tobytes() for mask in np.asarray(pool)}) == 70
