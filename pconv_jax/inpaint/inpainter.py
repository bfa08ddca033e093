"""Repair of images of any size and kind, in Python.

For example::

    inpainter = Inpainter.from_pretrained()
    inpainter("photo.jpg", "mask.png").save("repaired.png")

In a mask **white is filled**, as in other image tools; see `hole_from_mask`.
"""

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import (
    Any,
    Literal,
    NamedTuple,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)

import jax
import jax.numpy as jnp
import numpy as np
from PIL import ExifTags, Image

from pconv_jax._errors import UserError
from pconv_jax.inpaint import image_io, modes, values
from pconv_jax.inpaint.blocks import fill_in_blocks
from pconv_jax.inpaint.detail import add_detail, refine_guide, regions
from pconv_jax.inpaint.fill import HoleFiller
from pconv_jax.inpaint.formats import MAX_PIXELS
from pconv_jax.inpaint.hole import (
    dilate_hole,
    hole_from_alpha,
    hole_from_mask,
    resize_hole,
)
from pconv_jax.inpaint.progress import Progress, ignore, share
from pconv_jax.unet import PConvUNet
from pconv_jax.weights import pretrained
from pconv_jax.weights.network_config import input_channels
from pconv_jax.weights.project_names import FIELD_PROJECTS

# Share of the network in the time of a repair with detail, for reports of progress.
_NETWORK_SHARE = 0.25

# Hole ratio above which a mask may be the wrong way round.
_SUSPICIOUS_RATIO = 0.6

# Files of measurements have numbers from 1e19 on, such as 1e20, for missing values.
_MISSING_VALUE = 1e19

_INVERTED = (
    "White is filled; if the hole is black here, invert the mask: --invert-mask, or in "
    "Python invert_mask=True."
)

PathLike = str | os.PathLike[str]
LoadedImage = Image.Image | np.ndarray | jax.Array
ImageLike = LoadedImage | PathLike
# Not Sequence[ImageLike], because a str is a sequence of str.
ImageSequence = (
    Sequence[LoadedImage | os.PathLike[str]] | list[str] | tuple[ImageLike, ...]
)
MaskLike = ImageLike | ImageSequence | None
ImageT = TypeVar("ImageT", Image.Image, np.ndarray, jax.Array)


class InpainterOptions(TypedDict, total=False):
    """Options of an inpainter; see `Inpainter`."""

    value_range: tuple[float, float] | None
    max_pixels: int
    detail: bool


class RepairOptions(TypedDict, total=False):
    """Options of a repair; see `Inpainter`."""

    invert_mask: bool
    resize_mask: bool
    dilate: int
    seed: int
    exclude: MaskLike
    progress: Progress


class _Options(NamedTuple):
    invert_mask: bool
    resize_mask: bool
    dilate: int
    seed: int
    exclude: MaskLike
    progress: Progress


class Inpainter:
    """Fills the holes of images with a network.

    All other pixels stay exactly as they are. Images may have any size and holes any
    width; the content of a hole does not matter. The network's output guides a search
    for patches of the same image, which add its detail; see `add_detail`.

    Attributes:
      model: The network.
      info: Facts about the network; see `pretrained.Pretrained`.
    """

    def __init__(
        self,
        model: PConvUNet,
        variables: Mapping[str, Any],
        *,
        info: Mapping[str, Any] | None = None,
        value_range: tuple[float, float] | None = (0.0, 1.0),
        max_pixels: int = MAX_PIXELS,
        detail: bool = True,
    ):
        """Prepare a network.

        Args:
          model: Network with as many output channels as input channels.
          variables: Its ``params`` and ``batch_stats``.
          info: Facts about the network. By default none.
          value_range: The values of float images that correspond to the network's -1
            and 1. The default is (0, 1). None gives the network floats as they are, for
            data that are not images.
          max_pixels: Largest number of pixels of an image file. The default is
            100,000,000.
          detail: Whether to add detail of the image to the network's output. The
            default is True. Data that are not images (see ``value_range``) never get
            it.

        Raises:
          UserError: If the channels of the network differ, the range is empty, or the
            network was trained on fields instead of images.
        """
        origin = (info or {}).get("origin")
        if origin in FIELD_PROJECTS:
            raise UserError(
                f"model is a network of {origin}, which fills fields of measurements. "
                "Inpainter is for images: it would scale their values, and fill them "
                "wrongly. Call the network itself, model.apply."
            )
        channels = input_channels(model, variables["params"]["pconv1"]["kernel"])
        features = model.decoder[-1].features
        if channels != features:
            raise UserError(
                "model must give as many channels as it takes, but it takes "
                f"{channels} and gives {features}."
            )
        if value_range is not None and not value_range[0] < value_range[1]:
            raise UserError(f"value_range must be (low, high), got {value_range}.")
        self.model = model
        self.info = dict(info or {})
        self._channels = channels
        self._value_range = value_range
        self._max_pixels = max_pixels
        self._detail = detail
        self._filler = HoleFiller(model, variables, trusted_depth=_trusted_depth(info))

    @property
    def trusted_depth(self) -> int:
        """The last encoder stage whose fillings are kept; see `HoleFiller`."""
        return self._filler.trusted_depth

    @classmethod
    def from_pretrained(
        cls, name_or_path: PathLike | None = None, **options: Unpack[InpainterOptions]
    ) -> Self:
        """Load a network from a weights file.

        Args:
          name_or_path: See `pretrained.from_pretrained`. By default the first weights
            file in this package.
          **options: See `Inpainter`.

        Raises:
          UserError: As `pretrained.from_pretrained` and `Inpainter`.
        """
        if isinstance(name_or_path, os.PathLike):
            name_or_path = os.fspath(name_or_path)
        network = pretrained.from_pretrained(name_or_path)
        return cls(network.model, network.variables, info=network.info, **options)

    @overload
    def __call__(
        self,
        image: ImageT,
        mask: MaskLike = None,
        *,
        return_depth: Literal[False] = False,
        **options: Unpack[RepairOptions],
    ) -> ImageT: ...
    @overload
    def __call__(
        self,
        image: PathLike,
        mask: ImageLike | None = None,
        *,
        return_depth: Literal[False] = False,
        **options: Unpack[RepairOptions],
    ) -> Image.Image | np.ndarray: ...
    @overload
    def __call__(
        self,
        image: ImageSequence,
        mask: MaskLike = None,
        *,
        return_depth: Literal[False] = False,
        **options: Unpack[RepairOptions],
    ) -> list[LoadedImage]: ...
    @overload
    def __call__(
        self,
        image: ImageT,
        mask: MaskLike = None,
        *,
        return_depth: Literal[True],
        **options: Unpack[RepairOptions],
    ) -> tuple[ImageT, np.ndarray]: ...
    @overload
    def __call__(
        self,
        image: PathLike,
        mask: ImageLike | None = None,
        *,
        return_depth: Literal[True],
        **options: Unpack[RepairOptions],
    ) -> tuple[Image.Image | np.ndarray, np.ndarray]: ...
    @overload
    def __call__(
        self,
        image: ImageSequence,
        mask: MaskLike = None,
        *,
        return_depth: Literal[True],
        **options: Unpack[RepairOptions],
    ) -> tuple[list[LoadedImage], list[np.ndarray]]: ...
    def __call__(
        self,
        image: ImageLike | ImageSequence,
        mask: MaskLike = None,
        *,
        invert_mask: bool = False,
        resize_mask: bool = False,
        dilate: int = 0,
        seed: int = 0,
        exclude: MaskLike = None,
        progress: Progress = ignore,
        return_depth: bool = False,
    ) -> Any:
        """Fill the hole of an image, or of each of several.

        Args:
          image: A Pillow image of (almost) any mode; an array ``[H, W]``, ``[H, W, C]``
            or ``[N, H, W, C]``, of uint8, uint16, bool, or floats in ``value_range``;
            the path of a file; or a sequence of these. One channel more than the
            network takes is alpha, but never for a network of one channel. A color
            network takes gray images, too. Floats that are not finite and the masked
            values of a masked array are part of the hole.
          mask: Mask, **white, 255, 1 or True where to fill**, of any kind that
            ``image`` can be (see `hole_from_mask`); for batches also ``[N, H, W]``. One
            mask for all images, or one for each. None (the default) fills where the
            image is transparent, which becomes opaque, or not finite.
          invert_mask: Whether to fill where the mask is black, 0 or False instead. The
            default is False.
          resize_mask: Whether to resize a mask to the image's size, by nearest
            neighbors. The default is False.
          dilate: Number of pixels by which to enlarge the hole, for example to remove a
            rim. The default is 0.
          seed: Seed of the search for detail. In wide holes, seeds give visibly
            different results. The default is 0.
          exclude: Mask, **white where no detail may be copied from**, such as the rest
            of a removed object. Like ``mask``; by default there is none.
          progress: Called now and then with the fraction that is done. By default
            nothing is reported.
          return_depth: Whether to return the fill depth, too. The default is False.

        Returns:
          The image, of the same type, size and dtype. A file gives an upright Pillow
          image, or an array if it has 16-bit color or is a ``.npy`` file. A sequence
          gives a list. The EXIF orientation of a Pillow image is ignored.

          With ``return_depth``, also the fill depth, uint8 ``[H, W]``: the stage of the
          network's encoder at which a pixel becomes valid, or 0 outside the hole. Where
          the network does not close the hole, halving the image counts as a stage.

        Raises:
          UserError: If a mask is needed and missing, or has another size; if no pixel
            is valid, or values are out of range; or if a file cannot be read.
        """
        options = _Options(invert_mask, resize_mask, dilate, seed, exclude, progress)
        if isinstance(image, Sequence) and not isinstance(image, str):
            result, depth = self._repair_sequence(image, mask, options)
        elif getattr(image, "ndim", 0) == 4:
            batch = cast(np.ndarray | jax.Array, image)
            result, depth = self._repair_batch(batch, mask, options)
        else:
            result, depth = self._repair(image, mask, options)
        return (result, depth) if return_depth else result

    def _repair_sequence(
        self, images: Sequence[ImageLike], mask: MaskLike, options: _Options
    ) -> tuple[list[LoadedImage], list[np.ndarray]]:
        masks = _split_masks(mask, len(images))
        excluded = _split_masks(options.exclude, len(images))
        pairs = []
        for number, (x, m, e) in enumerate(zip(images, masks, excluded)):
            task = share(options.progress, number, number + 1, total=len(images))
            own = options._replace(exclude=e, progress=task)
            pairs.append(self._repair(x, m, own))
        return [image for image, _ in pairs], [depth for _, depth in pairs]

    def _repair_batch(
        self, images: np.ndarray | jax.Array, mask: MaskLike, options: _Options
    ) -> tuple[np.ndarray | jax.Array, np.ndarray]:
        if not len(images):
            return images, np.zeros(images.shape[:3], np.uint8)
        if isinstance(mask, np.ndarray | jax.Array) and mask.shape == images.shape[:3]:
            mask = list(mask)  # One for each image.
        results, depths = self._repair_sequence(list(images), mask, options)
        xp = jnp if isinstance(images, jax.Array) else np
        return xp.stack(cast(list[np.ndarray], results)), np.stack(depths)

    def _repair(
        self, image: ImageLike, mask: MaskLike, options: _Options
    ) -> tuple[LoadedImage, np.ndarray]:
        """Fill the hole of one image, and compute the fill depth."""
        if isinstance(image, str | os.PathLike):
            image = image_io.read(image, max_pixels=self._max_pixels).image
        image, masked = _split_masked(image)
        array = _to_numpy(image)
        # In an array, a last axis of 2 may as well be another measurement.
        has_alpha = self._channels > 1 or isinstance(image, Image.Image)
        color, alpha = self._split_alpha(array, has_alpha=has_alpha)
        hole = self._find_hole(image, color, alpha, mask, options, masked)
        # The colors of transparent pixels are arbitrary: not filled, and not used.
        known = ~hole if alpha is None else ~hole & (alpha > 0)
        self._check_values(color, known)
        _check_hole(hole, known)
        if not hole.any():
            return image.copy(), np.zeros(hole.shape, np.uint8)
        exclude = np.broadcast_to(False, hole.shape)
        if options.exclude is not None:
            exclude = self._read_exclude(options, image, hole.shape)
        shape, channels = array.shape, color.shape[-1]
        result = array.reshape(*hole.shape, -1).copy()
        clear = alpha is not None and mask is None
        del array, color, alpha  # A large image is not held twice.
        fill = functools.partial(self._fill, seed=options.seed)
        colors, progress = result[..., :channels], options.progress
        depth = fill_in_blocks(fill, colors, known, hole, exclude, progress=progress)
        del known
        if clear:
            result[hole, -1] = values.white(result)
        result = result.reshape(shape)
        if isinstance(image, Image.Image):
            return modes.paste(image, result, hole), depth
        return (jnp.asarray(result) if isinstance(image, jax.Array) else result), depth

    def _fill(
        self,
        colors: np.ndarray,
        known: np.ndarray,
        hole: np.ndarray,
        exclude: np.ndarray,
        progress: Progress,
        *,
        seed: int,
    ) -> np.ndarray:
        """Fill the hole of colors in place; see `fill_in_blocks`."""
        network_values = self._to_network(colors, known)
        is_image = not values.is_float(colors) or self._value_range is not None
        with_detail = self._detail and is_image and known.any()
        end = _NETWORK_SHARE if with_detail else 1
        depth = self._filler.fill(
            network_values, known, hole, progress=share(progress, 0, end)
        )
        if with_detail:
            exclude = exclude | (~known & ~hole)
            task = share(progress, end, 1)
            _add_detail(network_values, hole, exclude, seed, task)
        colors[hole] = self._from_network(network_values[hole], colors)
        return depth

    def _check_values(self, color: np.ndarray, known: np.ndarray) -> None:
        """Check the range of floats, strip by strip, since a copy takes memory."""
        if not values.is_float(color):
            return
        for top in range(0, len(color), 64):
            part = color[top : top + 64][known[top : top + 64]]
            if not part.size:
                continue
            if self._value_range is not None:
                _check_range(part, self._value_range)
            else:
                _check_missing_values(part)

    def _split_alpha(
        self, array: np.ndarray, *, has_alpha: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Split an image into views of its colors ``[H, W, C]`` and its alpha."""
        shape, n = array.shape, self._channels
        if len(shape) == 2:
            array = array[..., None]
        channels = array.shape[2] if array.ndim == 3 and array.size else 0
        gray = {1, 2} if n == 3 else set()  # A color network takes gray images, too.
        if channels not in {n, n + has_alpha} | gray:
            hint = ", or alpha as one channel more," if has_alpha else ""
            raise UserError(
                f"image must have the shape [H, W, {n}]{hint} for this network, got "
                f"{list(shape)}."
            )
        if array.dtype not in (bool, np.uint8, np.uint16) and not values.is_float(
            array
        ):
            raise UserError(
                f"image must be uint8, uint16, bool or floats, got {array.dtype}."
            )
        if channels == n or channels == 1:
            return array, None
        color, alpha = array[..., :-1], array[..., -1]
        if values.is_float(alpha):
            alpha = alpha.astype(np.float32)  # NumPy's functions lack bfloat16.
            finite = alpha[np.isfinite(alpha)]  # NaN is transparent.
            if finite.min(initial=0) < 0 or finite.max(initial=0) > 1:
                raise UserError(
                    "image must have an alpha in [0, 1] if it has floats, got "
                    f"{finite.min():g} to {finite.max():g}."
                )
        return color, alpha

    def _find_hole(
        self,
        image: LoadedImage,
        color: np.ndarray,
        alpha: np.ndarray | None,
        mask: MaskLike,
        options: _Options,
        masked: np.ndarray | None,
    ) -> np.ndarray:
        """Find where to fill: in the mask, or where the image shows it."""
        missing = np.zeros(color.shape[:2], bool) if masked is None else masked
        if values.is_float(color):
            missing = missing | ~np.isfinite(color).all(axis=-1)
        if mask is not None:
            hole = self._read_mask(mask, options)
            if hole.shape != missing.shape:
                if not options.resize_mask:
                    raise UserError(_sizes_differ(image, hole.shape, missing.shape))
                hole = resize_hole(hole, missing.shape)
        elif options.invert_mask or options.resize_mask:
            raise UserError(
                "mask is needed for invert_mask and resize_mask: there is none."
            )
        elif alpha is not None:
            hole = hole_from_alpha(alpha)
        elif values.is_float(color) or masked is not None:
            hole = missing
        else:
            raise UserError(
                "mask is needed: the image has no transparency that would show where "
                "to fill."
            )
        return dilate_hole(hole, options.dilate) | missing

    def _read_mask(
        self, mask: ImageLike | ImageSequence, options: _Options
    ) -> np.ndarray:
        if isinstance(mask, str | os.PathLike):
            mask = image_io.read(mask, max_pixels=self._max_pixels).image
        if isinstance(mask, np.ma.MaskedArray):
            mask = mask.filled(0)  # Pixels that the mask leaves open are not filled.
        if not isinstance(mask, Image.Image):
            mask = np.asarray(mask)
            if values.is_float(mask):
                mask = mask.astype(np.float32)
        return hole_from_mask(mask, invert=options.invert_mask)

    def _read_exclude(
        self, options: _Options, image: LoadedImage, shape: tuple[int, ...]
    ) -> np.ndarray:
        exclude = self._read_mask(cast(ImageLike, options.exclude), options)
        if exclude.shape == shape:
            return exclude
        if not options.resize_mask:
            raise UserError(_sizes_differ(image, exclude.shape, shape, name="exclude"))
        return resize_hole(exclude, shape)

    def _to_network(self, color: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Convert colors to the network's input, float32 ``[H, W, C]``."""
        result = values.to_network(color, self._value_range)
        result[~known] = 0
        if result.shape[2] < self._channels:
            result = np.repeat(result, self._channels, axis=2)
        return result

    def _from_network(self, output: np.ndarray, color: np.ndarray) -> np.ndarray:
        """Convert the network's output ``[..., C]`` to an image's colors."""
        if color.shape[-1] < output.shape[-1]:
            output = output.mean(axis=-1, keepdims=True)
        return values.from_network(output, color.dtype, self._value_range)


def _trusted_depth(info: Mapping[str, Any] | None) -> int | None:
    """Get the depth that a weights file names, or None."""
    depth = (info or {}).get("trusted_depth")
    return depth if isinstance(depth, int) and depth > 0 else None


def _add_detail(
    network_values: np.ndarray,
    hole: np.ndarray,
    exclude: np.ndarray,
    seed: int,
    progress: Progress,
) -> None:
    """Add detail to a filled hole, in place, in one window after the other."""
    done, total = 0, np.count_nonzero(hole)
    for window, part in regions(hole):
        before, done = done, done + np.count_nonzero(part)
        task = share(progress, before, done, total=total)
        image = np.clip((network_values[window] + 1) * 127.5, 0, 255)
        # Gray images of a color network have equal channels; one of them is searched.
        if (image == image[..., :1]).all():
            image = image[..., :1]
        guide = refine_guide(image, part, image)
        other = exclude[window] | (hole[window] & ~part)
        filled = add_detail(image, part, guide, seed=seed, exclude=other, progress=task)
        network_values[window][part] = filled[part] / 127.5 - 1


def _to_numpy(image: LoadedImage) -> np.ndarray:
    if isinstance(image, Image.Image):
        return modes.to_array(image)
    return np.asarray(image)


def _split_masked(image: LoadedImage) -> tuple[LoadedImage, np.ndarray | None]:
    """Split a masked array into its values and what is masked, ``[H, W]``."""
    if not isinstance(image, np.ma.MaskedArray):
        return image, None
    masked = np.ma.getmaskarray(image)
    # The values under the mask do not count, and may be out of range.
    array = np.where(masked, np.zeros((), image.dtype), image.data)
    return array, masked if masked.ndim == 2 else masked.any(axis=-1)


def _split_masks(mask: MaskLike, count: int) -> Sequence[ImageLike | None]:
    """Split masks for several images, or repeat one mask for all."""
    if isinstance(mask, list | tuple) or len(getattr(mask, "shape", ())) == 4:
        masks = list(cast(Sequence[ImageLike], mask))
        if count and len(masks) != count:
            raise UserError(
                f"mask must be one, or one for each of {count} images, got "
                f"{len(masks)}."
            )
        return masks
    return [cast(ImageLike | None, mask)] * count


def _check_hole(hole: np.ndarray, known: np.ndarray) -> None:
    if not known.any():
        raise UserError(f"mask: no valid pixel is left to fill from. {_INVERTED}")
    if not hole.any():
        warnings.warn("There is nothing to fill.", stacklevel=4)
    ratio = hole.mean()
    if ratio > _SUSPICIOUS_RATIO:
        warnings.warn(f"{ratio:.0%} of the image is filled. {_INVERTED}", stacklevel=4)


def _check_range(known: np.ndarray, value_range: tuple[float, float]) -> None:
    """Check that valid values are in a range, except for rounding."""
    low, high = value_range
    known = known.astype(np.float32)
    least, most = known.min(), known.max()
    rounding = 1e-5 * (high - low)
    if least < low - rounding or most > high + rounding:
        raise UserError(
            f"image must have floats in [{low:g}, {high:g}], got {least:g} to "
            f"{most:g}; set value_range, or None for data that are not images."
        )


def _check_missing_values(known: np.ndarray) -> None:
    """Check that there are no large numbers, which stand for missing values."""
    if known.size and np.abs(known.astype(np.float32)).max() >= _MISSING_VALUE:
        raise UserError(
            f"image has values of {_MISSING_VALUE:g} and more, which stand for missing "
            "values in files of measurements: make them NaN, or give a mask."
        )


def _sizes_differ(
    image: LoadedImage,
    mask: tuple[int, ...],
    shape: tuple[int, ...],
    *,
    name: str = "mask",
) -> str:
    height, width = shape
    hint = "resize it: --resize-mask, or in Python resize_mask=True"
    if mask == (width, height):
        hint = f"turn the {name} by 90 degrees"
        if isinstance(image, Image.Image):
            if image.getexif().get(ExifTags.Base.Orientation, 1) > 4:
                hint = "PIL.ImageOps.exif_transpose turns the image upright"
    return (
        f"{name} has {mask[1]} x {mask[0]} pixels, and the image has {width} x "
        f"{height}; {hint}."
    )
