"""Repair of images of any size and kind, in Python.

For example::

    inpainter = Inpainter.from_pretrained()
    inpainter("photo.jpg", "mask.png").save("repaired.png")

In a mask **white is filled**, as in other image tools; see `hole_from_mask`.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import (
    Any,
    Literal,
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
from PIL import Image

from pconv_jax._errors import UserError
from pconv_jax._files import MAX_PIXELS
from pconv_jax.inpaint import modes, values
from pconv_jax.inpaint.blocks import fill_in_blocks
from pconv_jax.inpaint.detail import add_detail, refine_guide, regions
from pconv_jax.inpaint.fill import HoleFiller
from pconv_jax.inpaint.inputs import (
    ImageLike,
    ImageSequence,
    InputReader,
    LoadedImage,
    MaskLike,
    Options,
    PathLike,
)
from pconv_jax.inpaint.progress import Progress, ignore, share
from pconv_jax.unet import PConvUNet
from pconv_jax.weights import pretrained
from pconv_jax.weights.network_config import input_channels
from pconv_jax.weights.project_names import FIELD_PROJECTS

# Share of the network in the time of a repair with detail, for reports of progress.
_NETWORK_SHARE = 0.25

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
    sharp: bool
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
            default is True. Without it, ``seed``, ``exclude`` and ``sharp`` have no
            effect. Data that are not images (see ``value_range``) never get it.

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
        if value_range is not None:
            low, high = value_range
            if not -np.inf < low < high < np.inf:
                raise UserError(
                    f"value_range must be (low, high), both finite, got {value_range}."
                )
        self.model = model
        self.info = dict(info or {})
        self._channels = channels
        self._value_range = value_range
        self._reader = InputReader(
            channels, value_range=value_range, max_pixels=max_pixels
        )
        self._detail = detail
        self._filler = HoleFiller(model, variables, trusted_depth=_trusted_depth(info))

    @property
    def trusted_depth(self) -> int:
        """The last encoder stage whose fillings are kept.

        What later stages close is filled at half the size.
        """
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
        sharp: bool = False,
        progress: Progress = ignore,
        return_depth: bool = False,
    ) -> Any:
        """Fill the hole of an image, or of each of several.

        Args:
          image: A Pillow image of (almost) any mode; an array ``[H, W]``, ``[H, W, C]``
            or ``[N, H, W, C]``, of uint8, uint16, bool, or floats in ``value_range``;
            the path of a file; or a sequence of these. One channel more than the
            network takes is alpha, but an array for a network of one channel has no
            alpha. A color network takes gray images, too. Floats that are not finite
            and the masked values of a masked array are part of the hole.
          mask: Mask, **white, 255, 1 or True where to fill**, of any kind that
            ``image`` can be (see `hole_from_mask`); for several images also
            ``[N, H, W]``. Masks of networks, losses and `random_mask` are the opposite:
            pass ``mask == 0`` of those. One mask for all images, or one for each. None
            (the default) fills where the image is transparent, which becomes opaque, or
            not finite.
          invert_mask: Whether to fill where the mask is black, 0 or False instead. The
            default is False.
          resize_mask: Whether to resize a mask to the image's size, by nearest
            neighbors. The default is False.
          dilate: Number of pixels by which to enlarge the hole, for example to remove a
            rim. The default is 0.
          seed: Seed of the search for detail. In wide holes, different seeds give
            visibly different results. The default is 0.
          exclude: Mask, **white where no detail may be copied from**, such as the rest
            of a removed object. Like ``mask``; by default there is none.
          sharp: Whether to fill wide holes with whole pieces of the image; see
            `add_detail`. They look more real, but are less accurate. The default is
            False; the command ``pconv inpaint`` and the page have True. Without detail
            there are no pieces either.
          progress: Called now and then with the fraction that is done. By default
            nothing is reported.
          return_depth: Whether to return the fill depth, too. The default is False.

        Returns:
          The image, of the same type, size and dtype. A file gives an upright Pillow
          image, or an array if Pillow has no mode for it (16-bit color, most float TIFF
          files, ``.npy`` files). A sequence gives a list. The EXIF orientation of a
          Pillow image is ignored.

          With ``return_depth``, also the fill depth, uint8 ``[H, W]``: the stage of the
          network's encoder at which a pixel becomes valid, or 0 outside the hole. Where
          the network does not close the hole, halving the image counts as a stage.

        Raises:
          UserError: If a mask is needed and missing, or has another size; if no pixel
            is valid, or values are out of range; or if a file cannot be read.
        """
        if seed < 0:
            raise UserError(f"seed must not be negative, got {seed}.")
        options = Options(
            invert_mask, resize_mask, dilate, seed, exclude, sharp, progress
        )
        if isinstance(image, Sequence) and not isinstance(image, str | bytes):
            result, depth = self._repair_sequence(image, mask, options)
        elif getattr(image, "ndim", 0) == 4:
            batch = cast(np.ndarray | jax.Array, image)
            result, depth = self._repair_batch(batch, mask, options)
        else:
            result, depth = self._repair(image, mask, options)
        return (result, depth) if return_depth else result

    def _repair_sequence(
        self, images: Sequence[ImageLike], mask: MaskLike, options: Options
    ) -> tuple[list[LoadedImage], list[np.ndarray]]:
        masks = _split_masks(mask, len(images), name="mask")
        excluded = _split_masks(options.exclude, len(images), name="exclude")
        pairs = []
        for number, (x, m, e) in enumerate(zip(images, masks, excluded)):
            task = share(options.progress, number, number + 1, total=len(images))
            own = options._replace(exclude=e, progress=task)
            pairs.append(self._repair(x, m, own))
        return [image for image, _ in pairs], [depth for _, depth in pairs]

    def _repair_batch(
        self, images: np.ndarray | jax.Array, mask: MaskLike, options: Options
    ) -> tuple[np.ndarray | jax.Array, np.ndarray]:
        if not len(images):
            return images, np.zeros(images.shape[:3], np.uint8)

        def split(mask: MaskLike) -> MaskLike:
            is_batch = getattr(mask, "shape", None) == images.shape[:3]
            return list(cast(np.ndarray, mask)) if is_batch else mask

        options = options._replace(exclude=split(options.exclude))
        results, depths = self._repair_sequence(list(images), split(mask), options)
        xp = jnp if isinstance(images, jax.Array) else np
        return xp.stack(cast(list[np.ndarray], results)), np.stack(depths)

    def _repair(
        self, image: ImageLike, mask: MaskLike, options: Options
    ) -> tuple[LoadedImage, np.ndarray]:
        """Fill the hole of one image, and compute the fill depth."""
        inputs = self._reader.read(image, mask, options)
        image, hole, known = inputs.image, inputs.hole, inputs.known
        if not hole.any():
            return image.copy(), np.zeros(hole.shape, np.uint8)
        exclude, shape = inputs.exclude, inputs.array.shape
        result = inputs.array.reshape(*hole.shape, -1).copy()
        colors = result[..., : inputs.channels]
        becomes_opaque = inputs.has_alpha and mask is None
        del inputs  # A large image is not held twice.
        fill = functools.partial(self._fill, seed=options.seed, sharp=options.sharp)
        depth = fill_in_blocks(
            fill, colors, known, hole, exclude, progress=options.progress
        )
        del known
        if becomes_opaque:
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
        sharp: bool,
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
            _add_detail(network_values, hole, exclude, seed, sharp, task)
        colors[hole] = self._from_network(network_values[hole], colors)
        return depth

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
    sharp: bool,
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
        guide = refine_guide(image, part)
        other = exclude[window] | (hole[window] & ~part)
        filled = add_detail(
            image,
            part,
            guide,
            seed=seed,
            exclude=other,
            sharp=sharp,
            progress=task,
        )
        network_values[window][part] = filled[part] / 127.5 - 1


def _split_masks(
    mask: MaskLike, count: int, *, name: str
) -> Sequence[ImageLike | None]:
    """Split masks for several images, or repeat one mask for all."""
    shape = getattr(mask, "shape", ())
    # The last axis of [H, W, C] has at most 4 channels, and that of [N, H, W] more.
    is_batch = len(shape) == 4 or (len(shape) == 3 and shape[-1] > 4)
    if isinstance(mask, list | tuple) or is_batch:
        masks = list(cast(Sequence[ImageLike], mask))
        if count and len(masks) != count:
            raise UserError(
                f"{name} must be one, or one for each of {count} images, got "
                f"{len(masks)}."
            )
        return masks
    return [cast(ImageLike | None, mask)] * count
