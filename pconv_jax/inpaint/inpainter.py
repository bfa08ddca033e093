"""Repairs pictures: of any size, of any kind, and nothing but their holes.

    inpainter = Inpainter.from_pretrained()
    inpainter("photo.jpg", "mask.png").save("repaired.png")

In a mask **white means: fill this**, as in other tools for pictures; see
`hole_from_mask`.
"""

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pconv_jax.inpaint import image_io
from pconv_jax.inpaint.hole import (
    dilate_hole,
    hole_from_alpha,
    hole_from_mask,
    resize_hole,
)
from pconv_jax.inpaint.tiling import SIDES, divide, double, halve
from pconv_jax.unet import PConvUNet, fill_depth
from pconv_jax.weights import pretrained

_MUCH = 0.6  # Of the picture: perhaps the mask is the wrong way round.

PictureLike = Image.Image | np.ndarray | jax.Array | str | os.PathLike[str]


class Inpainter:
    """Fills the holes of pictures by a network.

    What is not hole comes back bit for bit. It does not matter what is in the hole, nor
    how large the picture is: squares around the holes are cut from it, of a handful of
    sizes, so that few are ever compiled. Of a hole that only the network's innermost
    layer closes, or none, the middle is taken from the picture at half the size, and so
    on.

    Attributes:
      model: the network.
      info: what is known about it; see `pretrained.Pretrained`.
    """

    def __init__(
        self,
        model: PConvUNet,
        variables: Mapping[str, Any],
        *,
        info: Mapping[str, Any] | None = None,
        value_range: tuple[float, float] | None = (0.0, 1.0),
        max_pixels: int = image_io.MAX_PIXELS,
    ):
        """Takes a network.

        Args:
          model: it must give as many channels as it takes.
          variables: its ``params`` and ``batch_stats``.
          info: what is known about it.
          value_range: what the network's -1 and 1 are in pictures of floats. None is
            for data that is no picture: the network is given it as it is.
          max_pixels: files of larger pictures are refused.

        Raises:
          ValueError: if the network or the range is of no use.
        """
        channels = np.shape(variables["params"]["pconv1"]["kernel"])[-2]
        channels -= model.conv == "standard"  # Which is given the mask, too.
        features = model.decoder[-1].features
        if channels != features:
            raise ValueError(
                "model must give as many channels as it takes, but it takes "
                f"{channels} and gives {features}."
            )
        if value_range is not None and not value_range[0] < value_range[1]:
            raise ValueError(f"value_range must be (low, high), got {value_range}.")
        self.model = model
        self.info = dict(info or {})
        self._channels = channels
        self._value_range = value_range
        self._max_pixels = max_pixels
        # What the innermost layer alone closes, it sees so little of that it is left
        # with the mean of all pictures: grey. From half the size it is better.
        self._trusted = max(len(model.encoder) - 1, 1)
        step = model.size_multiple
        self._sides = sorted({-(-side // step) * step for side in SIDES})
        self._variables = jax.device_put(variables)
        self._run = jax.jit(functools.partial(_run, model))

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str] | None = None, **options: Any
    ) -> Self:
        """Takes a network of a file.

        Args:
          source: see `pretrained.from_pretrained`; by default the first of the networks
            that come with this package.
          **options: of `Inpainter`.

        Raises:
          ValueError: if there is none, saying how to get one.
        """
        network = pretrained.from_pretrained(source)
        return cls(network.model, network.variables, info=network.info, **options)

    def __call__(
        self,
        image: PictureLike | Sequence[PictureLike],
        mask: PictureLike | Sequence[PictureLike] | None = None,
        *,
        invert_mask: bool = False,
        resize_mask: bool = False,
        dilate: int = 0,
        return_depth: bool = False,
    ) -> Any:
        """Fills the hole of a picture, or of each of several.

        Args:
          image: a Pillow image of (almost) any mode; an array ``[H, W]``, ``[H, W, C]``
            or ``[N, H, W, C]``, of uint8, uint16 or bool, or of floats in the range
            that was said; the path of a file; or a sequence of such. A last channel
            more than the network takes is alpha; grey will do for a network of colour.
            Floats that are not finite are hole.
          mask: **white, 255, 1 or True where it is to be filled**; of the kinds of
            `image`, see `hole_from_mask`, and of batches also ``[N, H, W]``. One
            for all pictures, or one for each. If there is none, the hole is where the
            picture is transparent, or not finite, and comes back opaque.
          invert_mask: fill where the mask is black, 0 or False instead.
          resize_mask: give a mask of another size the picture's, by nearest neighbours.
          dilate: by how many pixels to enlarge the hole, such as to be rid of a rim.
          return_depth: whether to return the fill depth, too.

        Returns:
          The picture, of the type, size and dtype that it was; of a file, as a Pillow
          image that is upright, or as an array if it is of 16-bit colour or ``.npy``. A
          Pillow image is taken as its pixels lie, whatever its EXIF orientation says.

          With `return_depth`, a pair of it and uint8 ``[H, W]``, the layer of the
          network's encoder at which a pixel became valid; 0 where it was. Where the
          network could not close the hole, halving the picture counts as a layer.

        Raises:
          ValueError: if there is no mask where one is needed, or it is of another size;
            if nothing is valid, or values are out of range; if a file cannot be read.
        """
        options = dict(invert_mask=invert_mask, resize_mask=resize_mask, dilate=dilate)
        many = isinstance(image, Sequence) and not isinstance(image, str)
        if not many and getattr(image, "ndim", 0) != 4:
            result, depth = self._repair(image, mask, **options)
            return (result, depth) if return_depth else result
        masks = [mask] * len(image)
        if not len(image):
            depths = [] if many else np.zeros(image.shape[:3], np.uint8)
            return (image, depths) if return_depth else image
        shape = getattr(mask, "shape", ())
        batched = len(shape) == 4 or (not many and shape == image.shape[:3])
        if isinstance(mask, list | tuple) or batched:
            masks = mask
        if len(masks) != len(image):
            raise ValueError(
                f"mask must be one, or one for each of {len(image)} pictures, got "
                f"{len(masks)}."
            )
        pairs = [self._repair(x, m, **options) for x, m in zip(image, masks)]
        results, depths = [x for x, _ in pairs], [d for _, d in pairs]
        if not many:
            xp = jnp if isinstance(image, jax.Array) else np
            results, depths = xp.stack(results), np.stack(depths)
        return (results, depths) if return_depth else results

    def _repair(self, image, mask, **options):
        """Returns a picture repaired, and its fill depth."""
        if isinstance(image, str | os.PathLike):
            image = image_io.read(image, max_pixels=self._max_pixels).image
        pillow = isinstance(image, Image.Image)
        array = image_io.to_array(image) if pillow else np.asarray(image)
        colour, alpha = self._split(array)
        hole = self._hole(image, colour, alpha, mask, **options)
        # Colours that cannot be seen are anything. They are no hole, and no help.
        known = ~hole if alpha is None else ~hole & (alpha > 0)
        if not known.any():
            raise ValueError(
                "mask: no valid pixel is left, and nothing to go by. White is what is "
                "filled; if it is black here, invert the mask."
            )
        if not hole.any():
            warnings.warn("There is nothing to fill.", stacklevel=3)
            return image.copy(), np.zeros(hole.shape, np.uint8)
        ratio = hole.mean()
        if ratio > _MUCH:
            warnings.warn(
                f"{ratio:.0%} of the picture is to be filled. White is what is filled; "
                "if it is black here, invert the mask.",
                stacklevel=3,
            )
        values = self._to_values(colour, known)
        depth = self._fill(values, known, hole)
        result = array.reshape(*hole.shape, -1).copy()
        result[hole, : colour.shape[-1]] = self._to_pixels(values[hole], colour)
        if alpha is not None and mask is None:
            result[hole, -1] = 1 if _is_float(alpha) else np.iinfo(alpha.dtype).max
        result = result.reshape(np.shape(array))
        if pillow:
            return image_io.paste(image, result, hole), depth
        return (jnp.asarray(result) if isinstance(image, jax.Array) else result), depth

    def _split(self, array):
        """Returns views of a picture's colours, ``[H, W, C]``, and of its alpha."""
        shape, n = np.shape(array), self._channels
        if len(shape) == 2:
            array = array[..., None]
        channels = array.shape[2] if array.ndim == 3 and array.size else 0
        greys = {1, 2} if n == 3 else set()  # Grey will do for colour.
        if channels not in {n, n + 1} | greys:
            raise ValueError(
                f"image must be of shape [H, W, {n}], or have alpha as one channel "
                f"more, for this network, got {list(shape)}."
            )
        if array.dtype not in (bool, np.uint8, np.uint16) and not _is_float(array):
            raise ValueError(
                f"image must be uint8, uint16, bool or of floats, got {array.dtype}."
            )
        if channels == n or channels == 1:
            return array, None
        colour, alpha = array[..., :-1], array[..., -1]
        if _is_float(alpha):
            alpha = alpha.astype(np.float32)  # bfloat16 is none of NumPy's floats.
            finite = alpha[np.isfinite(alpha)]  # NaN is transparent.
            if finite.min(initial=0) < 0 or finite.max(initial=0) > 1:
                raise ValueError(
                    "image must have an alpha in [0, 1] where it is of floats, got "
                    f"{finite.min():g} to {finite.max():g}."
                )
        return colour, alpha

    def _hole(self, image, colour, alpha, mask, *, invert_mask, resize_mask, dilate):
        missing = np.zeros(colour.shape[:2], bool)
        if _is_float(colour):
            missing = ~np.isfinite(colour).all(axis=-1)
        if mask is None:
            if invert_mask or resize_mask:
                raise ValueError(
                    "mask is needed for invert_mask and resize_mask: there is none."
                )
            if alpha is None and not _is_float(colour):
                raise ValueError(
                    "mask is needed: the picture has no transparency that would show "
                    "what is to be filled."
                )
            hole = missing if alpha is None else hole_from_alpha(alpha)
        else:
            if isinstance(mask, str | os.PathLike):
                mask = image_io.read(mask, max_pixels=self._max_pixels).image
            elif isinstance(mask, jax.Array | np.ndarray):
                mask = np.asarray(mask)
                if _is_float(mask):
                    mask = mask.astype(np.float32)
            hole = hole_from_mask(mask, invert=invert_mask)
            if hole.shape != missing.shape:
                if not resize_mask:
                    raise ValueError(_sizes_differ(image, hole.shape, missing.shape))
                hole = resize_hole(hole, missing.shape)
        return dilate_hole(hole, dilate) | missing

    def _to_values(self, colour, known):
        """Returns what the network is given: float32 ``[H, W, C]``."""
        values = colour.astype(np.float32)
        if not _is_float(colour):
            top = 1 if colour.dtype == bool else np.iinfo(colour.dtype).max
            values *= 2 / top
            values -= 1
        elif self._value_range is not None:
            low, high = self._value_range
            least, most = values[known].min(), values[known].max()
            rounding = 1e-5 * (high - low)
            if least < low - rounding or most > high + rounding:
                raise ValueError(
                    f"image must be of floats in [{low:g}, {high:g}], got {least:g} to "
                    f"{most:g}; say another value_range, or None for data that is no "
                    "picture."
                )
            values = (values - low) * (2 / (high - low)) - 1
        values[~known] = 0
        if values.shape[2] < self._channels:
            values = np.repeat(values, self._channels, axis=2)
        return values

    def _to_pixels(self, values, colour):
        """Returns what a picture is given back: ``[..., C]`` of its dtype."""
        if colour.shape[-1] < values.shape[-1]:
            values = values.mean(axis=-1, keepdims=True)
        if _is_float(colour):
            if self._value_range is not None:
                low, high = self._value_range
                values = low + (np.clip(values, -1, 1) + 1) * ((high - low) / 2)
            return values.astype(colour.dtype)
        if colour.dtype == bool:
            return values > 0
        top = np.iinfo(colour.dtype).max
        return np.rint((np.clip(values, -1, 1) + 1) * (top / 2)).astype(colour.dtype)

    def _fill(self, values, known, hole):
        """Fills the hole in place, and returns the fill depth."""
        depth = np.zeros(hole.shape, np.uint8)
        tiles, known = divide(hole, self._sides), known.copy()
        valid = known.copy()  # In the beginning.
        wide = []
        for tile in tiles:
            output, levels = self._fill_tile(values, known, valid, tile)
            part = hole[tile.box]
            depth[tile.box][part] = levels[part]
            if levels[part].max() > self._trusted:
                wide.append(tile)
            else:
                values[tile.box][part] = output[part]
                known[tile.box] |= part  # So that the next tile joins on to it.
        if wide:
            middle = hole & (depth > self._trusted)
            half, half_known = halve(values, known)
            half_depth = self._fill(half, half_known, ~half_known)
            values[middle] = double(half, hole.shape)[middle]
            half_depth = double(half_depth, hole.shape, interpolation=cv2.INTER_NEAREST)
            depth[middle] = np.maximum(half_depth, self._trusted)[middle] + 1
            known |= middle
            for tile in wide:
                output, _ = self._fill_tile(values, known, valid, tile)
                part = hole[tile.box] & ~middle[tile.box]
                values[tile.box][part] = output[part]
                known[tile.box] |= part
        return depth

    def _fill_tile(self, values, known, valid, tile):
        """Returns the network's output in the box of a tile, and the fill depth."""
        top, left, side = tile.window
        window = np.s_[top : top + side, left : left + side]

        def cut(array):  # What is beyond the picture is hole.
            part = array[window]
            pads = [(0, side - n) for n in part.shape[:2]] + [(0, 0)] * (part.ndim - 2)
            return np.pad(part, pads)[None]

        masks = (cut(m).astype(np.float32)[..., None] for m in (known, valid))
        output, depth = jax.device_get(self._run(self._variables, cut(values), *masks))
        rows, columns = tile.box
        inside = np.s_[
            rows.start - top : rows.stop - top,
            columns.start - left : columns.stop - left,
        ]
        return output[inside], depth[inside]


def _run(model, variables, images, mask, valid):
    output, _ = model.apply(variables, images, mask)
    return output[0], fill_depth(model, valid)[0]


def _is_float(array):
    return jnp.issubdtype(array.dtype, jnp.floating)  # bfloat16 is one here.


def _sizes_differ(image, mask, shape):
    height, width = shape
    hint = "resize_mask makes it fit"
    if isinstance(image, Image.Image) and image.getexif().get(274, 1) > 4:
        if mask == (width, height):
            hint = "PIL.ImageOps.exif_transpose turns the picture upright"
    return (
        f"mask is of {mask[1]} x {mask[0]} pixels, and the picture of {width} x "
        f"{height}; {hint}."
    )
