"""Metrics that need a network with trained weights.

LPIPS, FID, Inception Score, and a perceptual distance by VGG16.
"""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pconv_jax._errors import RunError, UserError
from pconv_jax.metrics import inception, lpips
from pconv_jax.runs import parallel
from pconv_jax.weights.inception import load_inception_params
from pconv_jax.weights.lpips import load_lpips_params
from pconv_jax.weights.vgg import load_vgg_params

_SMALLEST_LPIPS = lpips.NETWORKS["alex"].smallest
_FEATURES = 2048  # Inception's features; its logits follow them.


class LearnedMetrics:
    """The networks of learned metrics, for those whose weights are available.

    Attributes:
      left_out: A sentence about each metric that has no network.
      device_batch: See the argument.
      fingerprint: A digest of the weights.
    """

    def __init__(
        self,
        *,
        image_size: int,
        published: bool = True,
        vgg_weights: str | None = None,
        device_batch: int = 1,
    ):
        """Load the weights, downloading them if that is possible.

        Args:
          image_size: Side of the images, in pixels.
          published: Whether to compute all metrics whose published weights are
            available (the default).
          vgg_weights: Other weights than ImageNet's for `lpips.vgg_distance`, see
            `load_vgg_params`. None by default.
          device_batch: Number of images that a device computes at a time. The default
            is 1.

        Raises:
          UserError: If ``vgg_weights`` cannot be read.
        """
        self.left_out: list[str] = []
        self.device_batch = device_batch
        self._lpips = self._inception = None
        self._vgg = None if vgg_weights is None else load_vgg_params(vgg_weights)
        if published:
            self._load_published(image_size)
        digest = hashlib.blake2b(digest_size=16)
        for leaf in jax.tree.leaves([self._lpips, self._inception, self._vgg]):
            digest.update(np.asarray(leaf).tobytes())
        if device_batch > 1:  # It changes the last bits.
            digest.update(f"{device_batch} at a time".encode())
        self.fingerprint = digest.hexdigest()
        self._lpips = self._lpips and parallel.replicate(self._lpips)
        self._inception = self._inception and parallel.replicate(self._inception)
        self._vgg = self._vgg and parallel.replicate(self._vgg)

    def distances(self, images: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
        """Compute ``lpips`` and ``vgg_distance``, if their weights are available.

        Args:
          images: uint8 ``[N, H, W, 3]``.
          truth: True images of the same shape.

        Returns:
          The distances by name, ``[N]`` each.
        """
        pair = {"a": images, "b": truth}
        known = {
            "lpips": (lpips.distance, self._lpips),
            "vgg_distance": (lpips.vgg_distance, self._vgg),
        }
        return {
            name: _compile_distance(distance)(params, pair, at_a_time=self.device_batch)
            for name, (distance, params) in known.items()
            if params is not None
        }

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Compute ``features``, ``[N, F]``, for `set_metrics`; {} without weights.

        Args:
          images: uint8 ``[N, H, W, 3]``.
        """
        if self._inception is None:
            return {}
        step = functools.partial(_compile_inception(), at_a_time=self.device_batch)
        return {"features": step(self._inception, {"images": images})}

    def _load_published(self, image_size: int) -> None:
        if image_size < _SMALLEST_LPIPS:
            self.left_out.append(
                f"lpips: it needs images of at least {_SMALLEST_LPIPS} pixels, and "
                f"image_size is {image_size}."
            )
        else:
            self._lpips = self._load("lpips", load_lpips_params)
        self._inception = self._load("fid, inception_score", load_inception_params)
        if self._vgg is None:
            self._vgg = self._load("vgg_distance", load_vgg_params)

    def _load(
        self, name: str, load: Callable[[], Mapping[str, Any]]
    ) -> Mapping[str, Any] | None:
        try:
            return load()
        except (UserError, RunError) as error:
            self.left_out.append(f"{name}: {error}")
            return None


def set_metrics(features: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Compute the metrics of a set of images.

    Args:
      features: `LearnedMetrics.features` of the images, ``[N, F]``.
      truth: Those of the true images, ``[M, F]``.

    Returns:
      ``fid`` and ``inception_score``; {} if either set has fewer than two images.
    """
    if min(len(features), len(truth)) < 2:
        return {}
    # The definition of the metric has its warning about small sets.
    with _quiet(inception.__name__):
        distance = inception.frechet_distance(
            features[:, :_FEATURES], truth[:, :_FEATURES]
        )
    score, _ = inception.inception_score(features[:, _FEATURES:], splits=1)
    return {"fid": round(distance, 4), "inception_score": round(score, 4)}


@functools.cache
def _compile_distance(distance: Callable[..., jax.Array]) -> parallel.EvalStep:
    def step(params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
        a, b = (batch[name].astype(np.float32) / 255 for name in ("a", "b"))
        return distance(params, a, b)

    return parallel.compile_eval_step(step)


@functools.cache
def _compile_inception() -> parallel.EvalStep:
    def step(params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
        both = inception.features_and_logits(params, batch["images"])
        return jnp.concatenate(both, axis=-1)

    return parallel.compile_eval_step(step)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Disable a logger."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
