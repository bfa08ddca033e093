"""Metrics by networks, as far as there are weights of these."""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from pconv_jax.metrics import inception, lpips
from pconv_jax.runs import parallel
from pconv_jax.weights.inception import load_inception_params
from pconv_jax.weights.lpips import load_lpips_params
from pconv_jax.weights.vgg import load_vgg_params

_SMALLEST_LPIPS = 31  # Pixels.
_FEATURES = 2048  # Of Inception; the logits come after them.


class Learned:
    """The networks of these metrics.

    Attributes:
      left_out: a line about each metric that there is no network for.
      fingerprint: a digest of the weights.
    """

    def __init__(
        self,
        *,
        image_size: int,
        published: bool = True,
        vgg_weights: str | None = None,
    ):
        """Looks for weights, and downloads them if they can be had.

        Args:
          image_size: side of the pictures, in pixels.
          published: whether to compute LPIPS, FID and Inception Score.
          vgg_weights: of `lpips.vgg_distance`, see `load_vgg_params`; or None.

        Raises:
          ValueError: if ``vgg_weights`` cannot be read.
        """
        self.left_out: list[str] = []
        self._lpips = self._inception = None
        self._vgg = None if vgg_weights is None else load_vgg_params(vgg_weights)
        if published:
            self._find_published(image_size)
        digest = hashlib.blake2b(digest_size=16)
        for leaf in jax.tree.leaves([self._lpips, self._inception, self._vgg]):
            digest.update(np.asarray(leaf).tobytes())
        self.fingerprint = digest.hexdigest()
        self._lpips = self._lpips and parallel.replicate(self._lpips)
        self._inception = self._inception and parallel.replicate(self._inception)
        self._vgg = self._vgg and parallel.replicate(self._vgg)

    def _find_published(self, image_size: int) -> None:
        if image_size < _SMALLEST_LPIPS:
            self.left_out.append(
                f"lpips: it takes pictures of {_SMALLEST_LPIPS} pixels and more, and "
                f"image_size is {image_size}."
            )
        else:
            self._lpips = self._load("lpips", load_lpips_params)
        self._inception = self._load("fid, inception_score", load_inception_params)

    def distances(self, images: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
        """Returns what there is of ``lpips`` and ``vgg_distance``, ``[N]`` each.

        Args:
          images: uint8 ``[N, H, W, 3]``.
          truth: of the same shape.
        """
        pair = {"a": images, "b": truth}
        found = {}
        if self._lpips is not None:
            found["lpips"] = _compile_distance(lpips.distance)(self._lpips, pair)
        if self._vgg is not None:
            found["vgg_distance"] = _compile_distance(lpips.vgg_distance)(
                self._vgg, pair
            )
        return found

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Returns ``features``, ``[N, F]``, for `set_metrics`; or nothing."""
        if self._inception is None:
            return {}
        return {"features": _compile_inception()(self._inception, {"images": images})}

    def _load(self, name, load):
        try:
            return load()
        except ValueError as error:
            self.left_out.append(f"{name}: {error}")
            return None


def set_metrics(features: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Returns metrics of a set of pictures.

    Args:
      features: of the pictures, `Learned.features`.
      truth: of the true ones.

    Returns:
      ``fid`` and ``inception_score``, if there are two of each at least.
    """
    if min(len(features), len(truth)) < 2:
        return {}
    with _quiet(inception.__name__):  # Its warning is in the metric's definition.
        pair = (x[:, :_FEATURES] for x in (features, truth))
        distance = inception.frechet_distance(*pair)
    score, _ = inception.inception_score(features[:, _FEATURES:], splits=1)
    return {"fid": round(distance, 4), "inception_score": round(score, 4)}


@functools.cache
def _compile_distance(distance: Callable[..., jax.Array]):
    def step(params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
        a, b = (batch[name].astype(np.float32) / 255 for name in ("a", "b"))
        return distance(params, a, b)

    return parallel.compile_eval_step(step)


@functools.cache
def _compile_inception():
    def step(params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
        both = inception.features_and_logits(params, batch["images"])
        return jax.numpy.concatenate(both, axis=-1)

    return parallel.compile_eval_step(step)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
