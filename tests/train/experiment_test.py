import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax import masks
from pconv_jax.runs.settings import MaskSettings
from pconv_jax.train import experiment


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
    draw = experiment.mask_sampler(MaskSettings(thin=thin, wide=wide), 8)
    drawn = jax.vmap(draw)(jax.random.split(jax.random.key(0), 2000))[:, 0, 0, 0]
    parts = np.bincount(drawn, minlength=3) / 2000
    # Four standard deviations of a fair coin are 0.045.
    np.testing.assert_allclose(parts, [1 - thin - wide, thin, wide], atol=0.045)
    for part, number in ((thin, 1), (wide, 2)):
        if part in (0, 1):
            assert parts[number] == part


def test_masks_are_those_of_the_kind_where_none_are_mixed_in():
    settings = MaskSettings(kind="rectangles", border="never")
    draw = experiment.mask_sampler(settings, 16)
    expected = functools.partial(
        masks.random_mask,
        shape=(16, 16),
        hole_ratio=(0.01, 0.6),
        kind="rectangles",
        border=False,
    )
    for key in jax.random.split(jax.random.key(0), 3):
        np.testing.assert_array_equal(draw(key), expected(key))
