"""Inputs that all frameworks are given alike, in NumPy."""

import numpy as np

HOLE_RATIO = 0.3


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Returns random numbers in float32."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def images(batch: int, size: int, *, seed: int = 0) -> np.ndarray:
    """Returns images in [-1, 1], ``[N, H, W, 3]`` in float32."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)


def mask(batch: int, size: int, hole_ratio: float = HOLE_RATIO) -> np.ndarray:
    """Returns masks of irregular holes, ``[N, H, W, 1]`` in float32, 1 = valid."""
    side = max(size // 32, 1)  # Of the squares that holes are made of.
    cells = -(-size // side)
    noise = np.random.default_rng(0).random((batch, cells, cells, 1))
    noise = noise.repeat(side, 1).repeat(side, 2)[:, :size, :size]
    threshold = np.quantile(noise, hole_ratio, axis=(1, 2, 3), keepdims=True)
    return (noise > threshold).astype(np.float32)
