"""The inpainting UNet of the paper, as a table of stages.

Images are ``[N, H, W, C]`` in [-1, 1]; masks ``[N, H, W, 1]``, 1 = valid, 0 = hole.

Reference: Liu et al. 2018, section 3.2 and table 5 of the supplement.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, PrecisionLike
from jax.typing import ArrayLike

from pconv_jax import layers, ops
from pconv_jax._images import IMAGENET_MEAN, IMAGENET_STD


class Stage(NamedTuple):
    """One layer of the UNet: a convolution, then normalization and activation.

    Attributes:
      features: number of output channels.
      kernel_size: side of the square kernel.
      batch_norm: whether batch normalization follows; the convolution then has no bias.
      negative_slope: of the leaky ReLU; 0 is a ReLU, None no activation.
      padding: None for ``kernel_size // 2`` zeros (holes) on each side, else as in
        `ops.partial_conv`.
    """

    features: int
    kernel_size: int
    batch_norm: bool = True
    negative_slope: float | None = 0.0
    padding: ops.PaddingLike | None = None


class Normalization(NamedTuple):
    """What a network is given instead of images: ``(images - mean) / std``.

    Attributes:
      mean: of each channel, or one number for all.
      std: of each channel, or one number for all.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


# ImageNet's, for images in [-1, 1]. Rounded, since releases store and compare it.
IMAGENET = Normalization(
    mean=tuple(round(2 * mean - 1, 6) for mean in IMAGENET_MEAN),
    std=tuple(round(2 * std, 6) for std in IMAGENET_STD),
)


def paper_stages(
    *, depth: int = 8, width: int = 64, out_features: int = 3
) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """Returns the encoder's and the decoder's stages: PConv1..8 and PConv9..16.

    Args:
      depth: number of encoder stages, and of decoder stages. The paper has 8 for 512
        pixels; 7 are common for 256.
      width: features of the first stage. They double up to eight times as many.
      out_features: channels of the network's output.

    Raises:
      ValueError: if the depth or the width is not positive.
    """
    if depth < 1 or width < 1:
        raise ValueError(f"depth and width must be positive, got {depth} and {width}.")
    features = [width * 2 ** min(level, 3) for level in range(depth)]
    kernels = [7, 5, 5] + [3] * depth
    encoder = [
        Stage(f, k, batch_norm=level > 0)
        for level, (f, k) in enumerate(zip(features, kernels))
    ]
    decoder = [Stage(f, 3, negative_slope=0.2) for f in reversed(features[:-1])]
    decoder += [Stage(out_features, 3, batch_norm=False, negative_slope=None)]
    return tuple(encoder), tuple(decoder)


def suggest_sizes(size: int, multiple: int) -> str:
    """Returns the multiples next to a size, for an error message: ``'256 or 320'``."""
    below = size // multiple * multiple
    above = -(-size // multiple) * multiple or multiple
    return " or ".join(str(n) for n in sorted({below, above}) if n)


class PConvUNet(nn.Module):
    """UNet of partial convolutions (Liu et al. 2018, section 3.2).

    Every encoder stage halves the size. Every decoder stage doubles it by repeating
    pixels, of features and mask alike, and takes the encoder's input of the same size
    along; for the last one that is the image itself, with its hole. Submodules are
    ``pconv1``, ``pconv2``, ..., with ``bn1``, ``bn2``, ... where there are any::

      >>> import jax, jax.numpy as jnp
      >>> from pconv_jax.unet import PConvUNet
      >>> model = PConvUNet(depth=2, width=8)
      >>> images, mask = jnp.zeros((1, 32, 32, 3)), jnp.ones((1, 32, 32, 1))
      >>> variables = model.init(jax.random.key(0), images, mask)
      >>> outputs, new_mask = model.apply(variables, images, mask)
      >>> outputs.shape, new_mask.shape
      ((1, 32, 32, 3), (1, 32, 32, 1))

    Attributes:
      depth: number of encoder stages; sizes must be multiples of ``2**depth``.
      width: features of the first stage.
      out_features: channels of the output.
      conv: ``'partial'``, or ``'standard'`` for the same network of ordinary
        convolutions that the paper compares with: the mask is appended to the channels
        of its input, and its whole output counts as valid.
      stages: an encoder's and a decoder's stages, instead of `paper_stages`.
      normalization: done to the images inside, and undone to the output, for networks
        that were trained on images of another range.
      sigmoid_head: whether a 1x1 convolution, ``head``, and a sigmoid follow, as they
        do in MathiasGruber/PConv-Keras.
      dtype: of the computation, e.g. bfloat16. Mask counts and the statistics of batch
        normalization are float32 all the same, and so is the output.
      param_dtype: of the parameters.
      precision: of the convolutions.
      axis_name: of the mapped axis over which batch statistics are averaged.
    """

    depth: int = 8
    width: int = 64
    out_features: int = 3
    conv: Literal["partial", "standard"] = "partial"
    stages: tuple[Sequence[Stage], Sequence[Stage]] | None = None
    normalization: Normalization | None = None
    sigmoid_head: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    axis_name: str | None = None

    def __post_init__(self) -> None:
        # Functions are compiled for a network once, and found again by its hash.
        self.stages = _to_tuples(self.stages)
        self.normalization = _to_tuples(self.normalization)
        super().__post_init__()

    @property
    def encoder(self) -> Sequence[Stage]:
        """The encoder's stages."""
        return self._stages()[0]

    @property
    def decoder(self) -> Sequence[Stage]:
        """The decoder's stages."""
        return self._stages()[1]

    @property
    def size_multiple(self) -> int:
        """The number that heights and widths must be multiples of."""
        return 2 ** len(self.encoder)

    @property
    def encoder_norms(self) -> tuple[str, ...]:
        """Names of the encoder's normalizations, which the second phase freezes."""
        return tuple(
            f"bn{i}" for i, stage in enumerate(self.encoder, 1) if stage.batch_norm
        )

    @nn.compact
    def __call__(
        self,
        images: ArrayLike,
        mask: ArrayLike,
        *,
        train: bool = False,
        freeze_encoder_norm: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Fills holes.

        Args:
          images: ``[N, H, W, C]``, usually in [-1, 1]. What a hole holds is ignored.
          mask: ``[N, H, W, 1]`` or, unless convolutions are ``'standard'``,
            ``[N, H, W, C]``; 1 = valid, 0 = hole.
          train: whether to normalize by the statistics of the batch, and update the
            running ones (collection ``batch_stats``), rather than use the latter.
          freeze_encoder_norm: use the running statistics in the encoder even in
            training, as the second phase of the paper does: holes distort the
            statistics of the batch there.

        Returns:
          The output ``[N, H, W, out_features]`` in float32, for valid pixels too (see
          `ops.composite`), and its mask ``[N, H, W, 1]``: 0, and the output 0, where a
          hole was too wide to be closed.

        Raises:
          ValueError: if shapes do not fit the depth or a mask is not binary.
        """
        images, mask = jnp.asarray(images), jnp.asarray(mask)
        self._check(images, mask, train and not freeze_encoder_norm)
        if self.normalization:
            wide = jnp.promote_types(images.dtype, jnp.float32)  # Not x64's default.
            mean, std = (jnp.asarray(x, wide) for x in self.normalization)
            images = (images - mean) / std
        if self.conv == "standard":
            images = jnp.where(mask > 0.5, images, 0)
            images = jnp.concatenate([images, mask.astype(images.dtype)], axis=-1)

        h, m = images, mask
        skips = []
        for i, stage in enumerate(self.encoder, 1):
            skips.append((h, m))
            h, m = self._conv(f"pconv{i}", stage, h, m, strides=2)
            running = not train or freeze_encoder_norm
            h = self._norm_and_activation(f"bn{i}", stage, h, running)
        for i, stage in enumerate(self.decoder, len(self.encoder) + 1):
            skip, skip_mask = skips.pop()
            sources, masks = (ops.Upsampled(h), skip), (ops.Upsampled(m), skip_mask)
            h, m = self._conv(f"pconv{i}", stage, sources, masks)
            h = self._norm_and_activation(f"bn{i}", stage, h, not train)
        if self.sigmoid_head:
            head = nn.Conv(
                h.shape[-1], (1, 1), param_dtype=self.param_dtype, name="head"
            )
            h = jnp.where(m > 0, nn.sigmoid(head(h)), 0)
        h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
        if self.normalization:
            h = jnp.where(m > 0, h * std + mean, 0)
        return h, m

    def _stages(self):
        if self.stages is not None:
            return self.stages
        return paper_stages(
            depth=self.depth, width=self.width, out_features=self.out_features
        )

    def _conv(self, name, stage, inputs, mask, strides=1):
        pad = stage.kernel_size // 2 if stage.padding is None else stage.padding
        fields = dict(
            features=stage.features,
            kernel_size=(stage.kernel_size,) * 2,
            strides=strides,
            padding=pad,
            use_bias=not stage.batch_norm,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=nn.initializers.he_normal(),
            name=name,
        )
        if self.conv == "partial":
            return layers.PartialConv(**fields)(inputs, mask)
        if isinstance(inputs, tuple):
            up, skip = inputs
            inputs = jnp.concatenate([ops.upsample(up.x), skip], axis=-1)
        h = nn.Conv(**fields)(inputs)
        return h, jnp.ones((*h.shape[:-1], 1), jnp.float32)

    def _norm_and_activation(self, name, stage, h, use_running_average):
        if stage.batch_norm:
            h = nn.BatchNorm(
                use_running_average=use_running_average,
                momentum=0.9,
                epsilon=1e-5,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                axis_name=self.axis_name,
                name=name,
            )(h)
        if stage.negative_slope is None:
            return h
        return jax.nn.leaky_relu(h, stage.negative_slope)

    def _check(self, images, mask, train):
        if self.conv not in ("partial", "standard"):
            raise ValueError(
                f"conv must be 'partial' or 'standard', got {self.conv!r}."
            )
        if len(self.encoder) != len(self.decoder) or not self.encoder:
            raise ValueError(
                "stages must have as many decoder as encoder stages, got "
                f"{len(self.encoder)} and {len(self.decoder)}."
            )
        if images.ndim != 4:
            raise ValueError(f"images must be [N, H, W, C], got {images.shape}.")
        ops.check_mask(mask, images)
        if self.conv == "standard" and mask.shape[-1] != 1:
            raise ValueError(
                "mask must be [N, H, W, 1] for standard convolutions, which are given "
                f"it as a channel, got {mask.shape}; mask.min(-1, keepdims=True) is "
                "valid where all channels are."
            )
        height, width = images.shape[1:3]
        step = self.size_multiple
        if height % step or width % step or not height * width:
            raise ValueError(
                f"images of {height} x {width} cannot be halved {len(self.encoder)} "
                f"times: height and width must be multiples of {step}, e.g. a height "
                f"of {suggest_sizes(height, step)} and a width of "
                f"{suggest_sizes(width, step)}; or set a smaller depth."
            )
        values = images.shape[0] * (height // step) * (width // step)
        if train and self.encoder[-1].batch_norm and values == 1 and not self.axis_name:
            raise ValueError(
                "training needs more than one value a channel to normalize by, and the "
                f"innermost stage has 1 x 1 pixels of a batch of 1 for {height} x "
                f"{width} images at depth {len(self.encoder)}: use a larger batch or "
                "image, or a smaller depth."
            )


def _to_tuples(value: Any) -> Any:
    """Turns lists to tuples, within tuples too."""
    if not isinstance(value, list | tuple):
        return value
    items = map(_to_tuples, value)
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def make_network(
    stages: tuple[Sequence[Stage], Sequence[Stage]], **fields: Any
) -> PConvUNet:
    """Returns a network of given stages, with the depth and the width that these have.

    Args:
      stages: the encoder's and the decoder's.
      **fields: the others of `PConvUNet`.
    """
    encoder, decoder = stages
    return PConvUNet(
        depth=len(encoder),
        width=encoder[0].features,
        out_features=decoder[-1].features,
        stages=(encoder, decoder),
        **fields,
    )


def fill_depth(model: PConvUNet, mask: jax.typing.ArrayLike) -> jax.Array:
    """Returns at which layer of a network's encoder each pixel becomes valid.

    Args:
      model: the network.
      mask: ``[N, H, W, 1]``, 1 = valid, 0 = hole; H and W fit the network's depth.

    Returns:
      uint8 ``[N, H, W]``: 0 where it was valid, and one more than there are layers
      where it does not become so.
    """
    mask = jnp.asarray(mask)
    depth = jnp.where(mask > 0, 0, len(model.encoder) + 1)
    for level, stage in enumerate(model.encoder, 1):
        k = stage.kernel_size
        padding = k // 2 if stage.padding is None else stage.padding
        mask = ops.update_mask(mask, (k, k), strides=2, padding=padding)
        valid = mask > 0
        for axis in (1, 2):
            valid = jnp.repeat(valid, 2**level, axis=axis)
        depth = jnp.where(valid, jnp.minimum(depth, level), depth)
    return depth[..., 0].astype(jnp.uint8)


def model_config(model: PConvUNet) -> dict[str, Any]:
    """Returns what makes a network what it is, JSON-able. Two networks are compared so.

    What only says how it is computed, such as the dtype, is left out.
    """
    return {
        "conv": model.conv,
        "stages": [
            [stage._asdict() for stage in side]
            for side in (model.encoder, model.decoder)
        ],
        "normalization": model.normalization and model.normalization._asdict(),
        "sigmoid_head": model.sigmoid_head,
    }


def model_differences(config: Mapping[str, Any] | None, model: PConvUNet) -> list[str]:
    """Returns in what a network differs from the one that a `model_config` is of.

    Args:
      config: as JSON gives it back, too. None is of any network.
      model: the network.
    """
    ours = json.loads(json.dumps(model_config(model)))
    theirs = ours if config is None else json.loads(json.dumps(config))
    return [name for name in ours if theirs.get(name) != ours[name]]


def model_from_config(config: Mapping[str, Any], source: str | Path) -> PConvUNet:
    """Returns the network that `model_config` is of.

    Args:
      config: of a network.
      source: where it came from, for the error.

    Raises:
      ValueError: if it makes no sense.
    """
    try:
        fields = dict(config)
        stages = tuple(
            tuple(Stage(**stage) for stage in side) for side in fields.pop("stages")
        )
        if fields["normalization"]:
            fields["normalization"] = Normalization(**fields["normalization"])
        return make_network(stages, **fields)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{source} has the configuration of no network that is known here: {error}."
        ) from error
