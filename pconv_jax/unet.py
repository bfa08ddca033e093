"""The inpainting UNet of the paper, defined by a table of stages.

Images are ``[N, H, W, C]`` in [-1, 1]; masks ``[N, H, W, 1]``, 1 = valid, 0 = hole.

Reference: Liu et al. 2018, section 3.2 and table 5 of the supplement.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import typing as flax_typing
from flax.typing import Dtype, PrecisionLike
from jax.typing import ArrayLike

from pconv_jax import layers, ops
from pconv_jax._images import IMAGENET_MEAN, IMAGENET_STD
from pconv_jax._window import is_int

BATCH_NORM_EPSILON = 1e-5
"""Added to the variance in batch normalization; Flax's default."""


class Stage(NamedTuple):
    """One layer of the UNet: a convolution, then normalization and activation.

    Attributes:
      features: Number of output channels.
      kernel_size: Side of the square kernel.
      batch_norm: Whether batch normalization follows; if it does, the convolution has
        no bias. The default is True.
      negative_slope: Slope of the leaky ReLU below 0. The default, 0, is a ReLU; None
        is no activation.
      padding: Padding as in `ops.partial_conv`. None (the default) pads
        ``kernel_size // 2`` zeros, which count as holes, on each side.
    """

    features: int
    kernel_size: int
    batch_norm: bool = True
    negative_slope: float | None = 0.0
    padding: ops.PaddingLike | None = None

    @property
    def pads(self) -> ops.PaddingLike:
        """The padding, also where it is None."""
        return self.kernel_size // 2 if self.padding is None else self.padding


class Normalization(NamedTuple):
    """Normalization of the images that a network sees: ``(images - mean) / std``.

    Attributes:
      mean: Mean of each channel, or ``(mean,)`` for all channels.
      std: Standard deviation of each channel, or ``(std,)`` for all channels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


# ImageNet's, for images in [-1, 1]. Rounded, since weights files store it and loaders
# compare it.
IMAGENET = Normalization(
    mean=tuple(round(2 * mean - 1, 6) for mean in IMAGENET_MEAN),
    std=tuple(round(2 * std, 6) for std in IMAGENET_STD),
)


def paper_stages(
    *, depth: int = 8, width: int = 64, out_features: int = 3
) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """Make the stages of the encoder (PConv1..8) and of the decoder (PConv9..16).

    Args:
      depth: Number of encoder stages and of decoder stages. The default, 8, is the
        paper's for 512 pixels; 7 is common for 256.
      width: Features of the first stage. The default is 64. Each of the next three
        stages doubles them; later ones keep eight times the width.
      out_features: Channels of the network's output. The default is 3.

    Returns:
      The encoder's and the decoder's stages.

    Raises:
      ValueError: If the depth or the width is no positive integer.
    """
    if not all(is_int(n) and n > 0 for n in (depth, width)):
        raise ValueError(
            f"depth and width must be positive integers, got {depth} and {width}."
        )
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
    """List the multiples next to a size, for an error, as in ``'256 or 320'``."""
    below = size // multiple * multiple
    above = -(-size // multiple) * multiple or multiple
    return " or ".join(str(n) for n in sorted({below, above}) if n)


class PConvUNet(nn.Module):
    """UNet of partial convolutions (Liu et al. 2018, section 3.2).

    Every encoder stage halves the size. Every decoder stage doubles it by repeating the
    pixels of features and mask, and concatenates the input of the encoder stage of the
    same size; for the last decoder stage, that is the image with its hole. Submodules
    are called ``pconv1``, ``pconv2``, ... and, where a stage has batch normalization,
    ``bn1``, ``bn2``, ...::

      >>> import jax, jax.numpy as jnp
      >>> from pconv_jax.unet import PConvUNet
      >>> model = PConvUNet(depth=2, width=8)
      >>> images, mask = jnp.zeros((1, 32, 32, 3)), jnp.ones((1, 32, 32, 1))
      >>> variables = model.init(jax.random.key(0), images, mask)
      >>> outputs, new_mask = model.apply(variables, images, mask)
      >>> outputs.shape, new_mask.shape
      ((1, 32, 32, 3), (1, 32, 32, 1))

    Attributes:
      depth: Number of encoder stages. The default is 8. Heights and widths must be
        multiples of ``2**depth``.
      width: Features of the first stage. The default is 64.
      out_features: Channels of the output. The default is 3.
      conv: ``'partial'`` (the default), or ``'standard'`` for the same network of
        standard convolutions, the paper's baseline. It takes the mask as a further
        input channel, and its whole output counts as valid.
      stages: The encoder's and the decoder's stages, which then also set depth, width
        and out_features. None (the default) uses `paper_stages`.
      normalization: Normalization of the images inside the network, undone in the
        output; for networks trained on images of another range. None by default.
      sigmoid_head: Whether a 1x1 convolution, ``head``, and a sigmoid follow, as in
        MathiasGruber/PConv-Keras. The default is False.
      dtype: Dtype of the computation, e.g. bfloat16. None (the default) infers it. Mask
        counts, the statistics of batch normalization, the head and the output are
        always float32.
      param_dtype: Dtype of the parameters. The default is float32.
      precision: Precision of the convolutions, except the head's.
      axis_name: Name of the mapped axis over which batch statistics are averaged. None
        (the default) does not average.
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
        # Tuples are hashable: jax.jit caches functions by the hash of the network.
        self.stages = _to_tuples(self.stages)
        _check_stages(self.stages)
        if self.stages is not None and all(self.stages):
            encoder, decoder = self.stages
            self.depth, self.width = len(encoder), encoder[0].features
            self.out_features = decoder[-1].features
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
        """Names of the encoder's batch normalizations, frozen in the second phase."""
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
        """Fill holes.

        Args:
          images: ``[N, H, W, C]``, usually in [-1, 1]. Values in the hole are ignored.
          mask: ``[N, H, W, 1]`` or, unless ``conv`` is ``'standard'``,
            ``[N, H, W, C]``; 1 = valid, 0 = hole.
          train: Whether to normalize by the statistics of the batch and update the
            running statistics (collection ``batch_stats``). The default, False, uses
            the running statistics.
          freeze_encoder_norm: Whether the encoder uses the running statistics even in
            training, as in the second phase of the paper, because holes distort the
            statistics of the batch. The default is False.

        Returns:
          The output ``[N, H, W, out_features]`` in float32, for valid pixels too (see
          `ops.composite`), and its mask ``[N, H, W, 1]``. Where a hole was too wide to
          be closed, both are 0.

        Raises:
          ValueError: If shapes do not fit the depth, images are not floats, or the
            stages do not fit together.
        """
        if mask is None:
            raise ValueError(
                "mask must be [N, H, W, 1], 1 = valid and 0 = hole, got None."
            )
        images, mask = jnp.asarray(images), jnp.asarray(mask)
        self._check_fields()
        self._check_inputs(images, mask, train and not freeze_encoder_norm)
        mask_dtype, mask = mask.dtype, ops.is_valid(mask)
        mean_and_std = None
        if self.normalization:
            wide = ops.wide_dtype(images.dtype)  # Not x64's default.
            mean, std = (
                jnp.asarray(x, wide).reshape(1, 1, 1, -1) for x in self.normalization
            )
            mean_and_std = mean, std
            images = (images.astype(wide) - mean) / std
        if self.conv == "standard":
            images = jnp.where(mask, images, 0)
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
            if skip.shape[1:3] != (2 * h.shape[1], 2 * h.shape[2]):
                raise ValueError(
                    "stages must halve the size in the encoder and keep it in the "
                    f"decoder, but {h.shape[1:3]} comes before {skip.shape[1:3]} at "
                    f"pconv{i}: correct their padding."
                )
            inputs, masks = (ops.Upsampled(h), skip), (ops.Upsampled(m), skip_mask)
            h, m = self._conv(f"pconv{i}", stage, inputs, masks)
            h = self._norm_and_activation(f"bn{i}", stage, h, not train)
        if self.sigmoid_head:
            head = nn.Conv(
                h.shape[-1], (1, 1), param_dtype=self.param_dtype, name="head"
            )
            h = jnp.where(m, nn.sigmoid(head(h)), 0)
        h = h.astype(ops.wide_dtype(h.dtype))
        if mean_and_std is not None:
            mean, std = mean_and_std
            h = jnp.where(m, h * std + mean, 0)
        return h, m.astype(mask_dtype if self.conv == "partial" else jnp.float32)

    def _stages(self) -> tuple[Sequence[Stage], Sequence[Stage]]:
        if self.stages is not None:
            return self.stages
        return paper_stages(
            depth=self.depth, width=self.width, out_features=self.out_features
        )

    def _conv(
        self,
        name: str,
        stage: Stage,
        inputs: ops.ArrayOrSequence,
        mask: ops.ArrayOrSequence,
        strides: int = 1,
    ) -> tuple[jax.Array, jax.Array]:
        layer = layers.PartialConv if self.conv == "partial" else nn.Conv
        conv = layer(
            features=stage.features,
            kernel_size=(stage.kernel_size,) * 2,
            strides=strides,
            # nn.Conv knows fewer paddings, and refuses the others itself.
            padding=cast(flax_typing.PaddingLike, stage.pads),
            use_bias=not stage.batch_norm,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=nn.initializers.he_normal(),
            name=name,
        )
        if isinstance(conv, layers.PartialConv):
            h, m = conv(inputs, mask)
            return h, m
        if isinstance(inputs, tuple):
            arrays = (
                ops.upsample(x.x) if isinstance(x, ops.Upsampled) else x for x in inputs
            )
            inputs = jnp.concatenate(list(arrays), axis=-1)
        h = conv(inputs)
        return h, jnp.ones((*h.shape[:-1], 1), bool)

    def _norm_and_activation(
        self, name: str, stage: Stage, h: jax.Array, use_running_average: bool
    ) -> jax.Array:
        if stage.batch_norm:
            h = nn.BatchNorm(
                use_running_average=use_running_average,
                momentum=0.9,
                epsilon=BATCH_NORM_EPSILON,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                axis_name=self.axis_name,
                name=name,
            )(h)
        if stage.negative_slope is None:
            return h
        return jax.nn.leaky_relu(h, stage.negative_slope)

    def _check_fields(self) -> None:
        if self.conv not in ("partial", "standard"):
            raise ValueError(
                f"conv must be 'partial' or 'standard', got {self.conv!r}."
            )
        if len(self.encoder) != len(self.decoder) or not self.encoder:
            raise ValueError(
                "stages must have as many decoder as encoder stages, got "
                f"{len(self.encoder)} and {len(self.decoder)}."
            )
        if any(
            stage.features < 1 or stage.kernel_size < 1
            for stage in (*self.encoder, *self.decoder)
        ):
            raise ValueError(
                "stages must have positive features and kernel_size, got "
                f"{self.encoder} and {self.decoder}."
            )

    def _check_inputs(
        self, images: jax.Array, mask: jax.Array, batch_statistics: bool
    ) -> None:
        if images.ndim != 4:
            raise ValueError(f"images must be [N, H, W, C], got {images.shape}.")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images must be floats, usually in [-1, 1], got {images.dtype}."
            )
        channels = {images.shape[-1], self.decoder[-1].features}
        for values in self.normalization or ():
            if len(values) != 1 and channels != {len(values)}:
                raise ValueError(
                    "normalization must have one number, or one for each channel of "
                    f"input and output, got {self.normalization} for {channels}."
                )
        ops.check_mask(mask, images)
        if self.conv == "standard" and mask.shape[-1] != 1:
            raise ValueError(
                "mask must be [N, H, W, 1] for standard convolutions, which take it as "
                f"a channel, got {mask.shape}; mask.min(-1, keepdims=True) is valid "
                "where all channels are."
            )
        _check_size(self, images.shape)
        height, width = images.shape[1:3]
        step = self.size_multiple
        values = images.shape[0] * (height // step) * (width // step)
        normalized = batch_statistics and self.encoder[-1].batch_norm
        if normalized and values == 1 and not self.axis_name:
            raise ValueError(
                "training needs more than one value per channel to normalize by, but "
                f"the innermost stage has 1 x 1 pixels of a batch of 1 for {height} x "
                f"{width} images at depth {len(self.encoder)}: use a larger batch or "
                "image, or a smaller depth."
            )


def _check_stages(stages: Any) -> None:
    """Check that stages are None, or two tuples of `Stage`."""
    if stages is None:
        return
    is_pair = isinstance(stages, tuple) and len(stages) == 2
    if not is_pair or not all(
        isinstance(side, tuple) and all(isinstance(stage, Stage) for stage in side)
        for side in stages
    ):
        raise ValueError(
            "stages must be two sequences of Stage, the encoder's and the decoder's, "
            f"got {stages}."
        )


def _check_size(model: PConvUNet, shape: Sequence[int]) -> None:
    """Check that images or masks ``[N, H, W, C]`` can be halved by the encoder."""
    _, height, width, _ = shape
    step = model.size_multiple
    if height % step or width % step or not height * width:
        raise ValueError(
            f"images of {height} x {width} cannot be halved {len(model.encoder)} "
            f"times: height and width must be multiples of {step}, e.g. a height of "
            f"{suggest_sizes(height, step)} and a width of "
            f"{suggest_sizes(width, step)}; or set a smaller depth."
        )


def _to_tuples(value: Any) -> Any:
    """Turn lists into tuples, within tuples too."""
    if not isinstance(value, list | tuple):
        return value
    items = map(_to_tuples, value)
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def variable_shapes(model: PConvUNet, channels: int) -> dict[str, Any]:
    """Compute the shapes of a network's variables.

    Args:
      model: The network.
      channels: Number of channels of the images that it takes.

    Returns:
      A tree of `jax.ShapeDtypeStruct` like the variables that ``model.init`` makes.

    Raises:
      ValueError: If the parts of the network do not fit together.
    """
    model._check_fields()
    stages = (*model.encoder, *model.decoder)
    padded = all(s.padding is None and s.kernel_size % 2 for s in stages)
    if padded and model.conv == "partial" and not model.normalization:
        return _shapes_of_stages(model, channels)
    # Other networks are traced, which shows whether their parts fit.
    size = model.size_multiple
    images, mask = (
        jax.ShapeDtypeStruct((1, size, size, n), jnp.float32) for n in (channels, 1)
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(model.init, key, images, mask)


def _shapes_of_stages(model: PConvUNet, channels: int) -> dict[str, Any]:
    """Compute the shapes of the variables of a partial network without tracing it.

    When a process starts, tracing takes half a second.
    """
    stages, depth = (*model.encoder, *model.decoder), len(model.encoder)
    widths = [channels, *(stage.features for stage in stages)]
    inputs = widths[:-1]
    # A decoder stage also takes the input of the encoder stage of its size.
    for i, skip in enumerate(reversed(inputs[:depth])):
        inputs[depth + i] += skip

    def parameter(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, model.param_dtype)

    def convolution(size: int, inputs: int, features: int, *, bias: bool) -> Any:
        kernel = parameter(size, size, inputs, features)
        return {"kernel": kernel} | ({"bias": parameter(features)} if bias else {})

    params, statistics = {}, {}
    for i, (stage, n) in enumerate(zip(stages, inputs), 1):
        features, norm = stage.features, stage.batch_norm
        params[f"pconv{i}"] = convolution(stage.kernel_size, n, features, bias=not norm)
        if norm:
            params[f"bn{i}"] = {n: parameter(features) for n in ("scale", "bias")}
            statistic = jax.ShapeDtypeStruct((features,), jnp.float32)
            statistics[f"bn{i}"] = dict.fromkeys(("mean", "var"), statistic)
    if model.sigmoid_head:
        params["head"] = convolution(1, widths[-1], widths[-1], bias=True)
    collections = {"params": params, "batch_stats": statistics}
    return {name: tree for name, tree in collections.items() if tree}


def fill_depth(model: PConvUNet, mask: ArrayLike) -> jax.Array:
    """Compute at which encoder stage of a network each pixel becomes valid.

    Args:
      model: The network.
      mask: ``[N, H, W, 1]``, 1 = valid, 0 = hole. H and W must fit the depth.

    Returns:
      uint8 ``[N, H, W]``: 0 for valid pixels, the number of the stage for pixels of the
      hole, and the number of stages plus 1 if no stage makes the pixel valid.

    Raises:
      ValueError: If the mask has another shape.
    """
    mask = jnp.asarray(mask)
    if mask.ndim != 4 or mask.shape[-1] != 1:
        raise ValueError(f"mask must be [N, H, W, 1], got {mask.shape}.")
    _check_size(model, mask.shape)
    ops.check_mask(mask, mask)
    mask = ops.is_valid(mask)
    depth = jnp.where(mask, 0, len(model.encoder) + 1)
    for level, stage in enumerate(model.encoder, 1):
        k = stage.kernel_size
        mask = ops.update_mask(mask, (k, k), strides=2, padding=stage.pads)
        valid = mask
        for axis in (1, 2):
            valid = jnp.repeat(valid, 2**level, axis=axis)
        depth = jnp.where(valid, jnp.minimum(depth, level), depth)
    return depth[..., 0].astype(jnp.uint8)


def fold_batch_norm(
    model: PConvUNet, variables: Mapping[str, Any]
) -> tuple[PConvUNet, dict[str, Any]]:
    """Fold batch normalization into kernels and biases, for inference.

    Running statistics are constants, so a convolution and its normalization are one
    convolution with a bias. Outputs stay the same up to rounding, except in a hole that
    the last stage leaves open, if that stage is normalized: there they are 0.

    Args:
      model: The network.
      variables: Its ``params`` and ``batch_stats``.

    Returns:
      The same network without batch normalization, and its ``params`` as NumPy arrays.
    """
    params, statistics = dict(variables["params"]), variables.get("batch_stats", {})
    for i, stage in enumerate((*model.encoder, *model.decoder), 1):
        if not stage.batch_norm:
            continue
        norm = params.pop(f"bn{i}") | statistics[f"bn{i}"]
        norm = {name: np.asarray(x, np.float64) for name, x in norm.items()}
        factor = norm["scale"] / np.sqrt(norm["var"] + BATCH_NORM_EPSILON)
        kernel = np.asarray(params[f"pconv{i}"]["kernel"])
        params[f"pconv{i}"] = {
            "kernel": (kernel * factor).astype(kernel.dtype),
            "bias": (norm["bias"] - norm["mean"] * factor).astype(kernel.dtype),
        }
    encoder, decoder = (
        tuple(stage._replace(batch_norm=False) for stage in side)
        for side in (model.encoder, model.decoder)
    )
    return model.clone(stages=(encoder, decoder)), {"params": params}
