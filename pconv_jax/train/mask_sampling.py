"""Masks for training: drawn for each example, or chosen from a pool drawn before."""

import jax
import jax.numpy as jnp
from jax import lax

from pconv_jax import masks
from pconv_jax.runs.settings import MaskSettings
from pconv_jax.train.step import DrawMask

_BORDERS = {"any": None, "always": True, "never": False}


def mask_sampler(settings: MaskSettings, size: int) -> DrawMask:
    """Make the function that draws a mask ``[size, size, 1]`` from a key."""

    def draw(key: jax.Array, kind: str, hole_ratio: tuple[float, float]) -> jax.Array:
        border = _BORDERS[settings.border]
        return masks.random_mask(
            key, (size, size), hole_ratio=hole_ratio, kind=kind, border=border
        )

    def draw_any(key: jax.Array) -> jax.Array:
        if not settings.thin and not settings.wide:
            return draw(key, settings.kind, settings.hole_ratio)
        coin_key, key = jax.random.split(key)
        coin = jax.random.uniform(coin_key, (), jnp.float32)
        # Of the masks, one is used: they may be drawn from the same key.
        mask = draw(key, settings.kind, settings.hole_ratio)
        for kind, part in (("thin", settings.thin), ("wide", settings.wide)):
            if part:
                other = draw(key, kind, masks.HOLE_RATIOS[kind])
                mask = jnp.where((0 <= coin) & (coin < part), other, mask)
                coin -= part
        return mask

    return draw_any


def draw_pool(key: jax.Array, draw_mask: DrawMask, *, count: int) -> jax.Array:
    """Draw masks to choose from, bool ``[count, S, S, 1]``."""

    @jax.jit
    def draw(keys):
        # A batch of them takes the memory of its fields in float32.
        return lax.map(lambda key: draw_mask(key) > 0, keys, batch_size=64)

    return draw(jax.random.split(key, count))


def choose_mask(key: jax.Array, *, pool: jax.Array) -> jax.Array:
    """Choose a mask ``[S, S, 1]``, and turn and mirror it at random.

    Args:
      key: PRNG key.
      pool: Masks ``[P, S, S, 1]``.

    Returns:
      Float32, 1 = valid, 0 = hole.
    """
    key, coin_key = jax.random.split(key)
    mask = pool[jax.random.randint(key, (), 0, len(pool), jnp.int32)]
    # These make all eight symmetries of a square.
    for coin, change in zip(
        jax.random.bernoulli(coin_key, shape=(3,)),
        (jnp.flipud, jnp.fliplr, lambda x: x.swapaxes(0, 1)),
        strict=True,
    ):
        mask = jnp.where(coin, change(mask), mask)
    return mask.astype(jnp.float32)
