"""NumPy inputs, equal for all frameworks."""

import numpy as np

HOLE_RATIO = 0.3


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Draw normally distributed numbers, float32."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def images(batch: int, size: int, *, seed: int = 0) -> np.ndarray:
    """Draw images in [-1, 1], float32 ``[N, H, W, 3]``."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)


def mask(batch: int, size: int, hole_ratio: float = HOLE_RATIO) -> np.ndarray:
    """Draw masks with irregular holes, float32 ``[N, H, W, 1]``, 1 = valid."""
    side = max(size // 32, 1)  # Holes consist of squares with this side.
    cells = -(-size // side)
    noise = np.random.default_rng(0).random((batch, cells, cells, 1))
    noise = noise.repeat(side, 1).repeat(side, 2)[:, :size, :size]
    threshold = np.quantile(noise, hole_ratio, axis=(1, 2, 3), keepdims=True)
    return (noise > threshold).astype(np.float32)
