"""Filling of holes of any size by a network, from coarse to fine."""

import functools
from collections.abc import Mapping
from typing import Any

import cv2
import jax
import numpy as np

from pconv_jax.inpaint.progress import Progress, ignore
from pconv_jax.inpaint.tiling import SIDES, Tile, divide, double, halve
from pconv_jax.unet import PConvUNet, fill_depth, fold_batch_norm

# Measured with the bundled network, of 2 to 6: the best PSNR and l1 in wide holes, at
# 512 and 1024 pixels, and the best l1 in the paper's masks.
_TRUSTED_DEPTH = 4

_RAMP = 24  # Pixels over which a level passes into the next coarser one.


class HoleFiller:
    """Fills the holes of images in a network's range of values.

    Squares around the holes are cut from the image and repaired one after the other.
    They have a few fixed sizes, so that the network is compiled only a few times. Where
    only a late encoder stage or none closes a hole, its center is filled at half the
    resolution, recursively.

    Attributes:
      trusted_depth: The last encoder stage whose fillings are kept.
    """

    def __init__(
        self,
        model: PConvUNet,
        variables: Mapping[str, Any],
        *,
        trusted_depth: int | None = None,
    ):
        """Prepare a network.

        Args:
          model: The network.
          variables: Its ``params`` and ``batch_stats``.
          trusted_depth: The last encoder stage whose fillings are kept. What later
            stages close is filled at half the size. By default 4, or the last stage
            but one of a smaller network.
        """
        # Late stages see so little of the image that they give the mean of all images,
        # gray. At half the size they see more.
        largest = max(len(model.encoder) - 1, 1)
        self.trusted_depth = min(trusted_depth or _TRUSTED_DEPTH, largest)
        step = model.size_multiple
        self._sides = sorted({-(-side // step) * step for side in SIDES})
        self._model, variables = fold_batch_norm(model, variables)
        # Arguments of the compiled program: as its constants, they would be in every
        # entry of a compilation cache.
        self._variables = jax.device_put(variables)

    def fill(
        self,
        values: np.ndarray,
        known: np.ndarray,
        hole: np.ndarray,
        *,
        progress: Progress = ignore,
    ) -> np.ndarray:
        """Fill a hole in place, and compute the fill depth.

        Args:
          values: Float32 ``[H, W, C]``, in place filled in the hole.
          known: Bool ``[H, W]``, True where values are valid.
          hole: Bool ``[H, W]``, True where to fill.
          progress: Called with the fraction that is done. By default nothing is
            reported.

        Returns:
          Uint8 ``[H, W]``: the encoder stage at which a pixel becomes valid; 0 outside
          the hole. Halving the image counts as a stage.
        """
        valid = known  # As given; below, `known` grows by what has been filled.
        known, depth = known.copy(), np.zeros(hole.shape, np.uint8)
        wide = []
        tiles = divide(hole, self._sides)
        for number, tile in enumerate(tiles, 1):
            output, levels = self._apply(values, known, valid, tile)
            part = hole[tile.box]
            depth[tile.box][part] = levels[part]
            if levels[part].max() > self.trusted_depth:
                wide.append(tile)
            else:
                values[tile.box][part] = output[part]
                known[tile.box] |= part  # The next tiles continue it without a seam.
            progress(0.5 * number / len(tiles))
        if wide:
            center, coarse = self._fill_center(values, known, hole, depth)
            distance = cv2.distanceTransform(
                (~center).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5
            )
            for number, tile in enumerate(wide, 1):
                output, _ = self._apply(values, known, valid, tile)
                part = hole[tile.box] & ~center[tile.box]
                # The levels differ slightly: without a ramp, their edge shows.
                weight = np.clip(1 - distance[tile.box][part] / _RAMP, 0, 1)[:, None]
                fine = output[part]
                values[tile.box][part] = fine + weight * (coarse[tile.box][part] - fine)
                known[tile.box] |= part
                progress(0.5 + 0.5 * number / len(wide))
        progress(1)
        return depth

    def _fill_center(
        self,
        values: np.ndarray,
        known: np.ndarray,
        hole: np.ndarray,
        depth: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fill, in place, where a hole is too deep, from the image at half the size.

        Returns:
          Where that is, bool ``[H, W]``, and the image filled at half the size,
          enlarged.
        """
        center = hole & (depth > self.trusted_depth)
        half, half_known = halve(values, known)
        half_depth = self.fill(half, half_known, ~half_known)
        coarse = double(half, hole.shape)
        values[center] = coarse[center]
        half_depth = double(half_depth, hole.shape, interpolation=cv2.INTER_NEAREST)
        depth[center] = np.maximum(half_depth, self.trusted_depth)[center] + 1
        known |= center
        return center, coarse

    def _apply(
        self, values: np.ndarray, known: np.ndarray, valid: np.ndarray, tile: Tile
    ) -> tuple[np.ndarray, np.ndarray]:
        """Apply the network to a tile.

        Args:
          values: Float32 ``[H, W, C]``.
          known: Bool ``[H, W]``, the network's mask.
          valid: Bool ``[H, W]``, the mask of the fill depth.
          tile: The tile.

        Returns:
          The network's output and the fill depth, in the tile's box.
        """
        top, left, side = tile.square
        window = np.s_[top : top + side, left : left + side]

        def cut(array: np.ndarray) -> np.ndarray:  # Outside the image all is hole.
            part = array[window]
            pads = [(0, side - n) for n in part.shape[:2]] + [(0, 0)] * (part.ndim - 2)
            return np.pad(part, pads)[None]

        masks = (cut(m)[..., None] for m in (known, valid))
        output, depth = jax.device_get(
            _run(self._model, self._variables, cut(values), *masks)
        )
        rows, columns = tile.box
        inside = np.s_[
            rows.start - top : rows.stop - top,
            columns.start - left : columns.stop - left,
        ]
        return output[inside], depth[inside]


@functools.partial(jax.jit, static_argnums=0)  # All instances share what is compiled.
def _run(
    model: PConvUNet,
    variables: Mapping[str, Any],
    images: jax.Array,
    mask: jax.Array,
    valid: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    output, _ = model.apply(variables, images, mask)
    return output[0], fill_depth(model, valid)[0]
