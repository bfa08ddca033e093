"""Partial convolution and mask update as pure functions of arrays.

Contract of this module:

* Arrays are channels-last, ``[N, *spatial, C]``, with one, two or three spatial axes;
  kernels are ``[*kernel_size, C_in // groups, features]``.
* A mask is binary, **1 = valid and 0 = hole**, of shape ``[N, *spatial, 1]`` (one
  plane for all channels) or ``[N, *spatial, C]`` (a plane for each), of any dtype.
  What lies in a hole never matters, forward or backward, not even if it is NaN.
* Inputs and masks may be sequences of equal length: sources that are concatenated
  along the channels in meaning, and in memory only where they are small. A source may
  be `Upsampled`: its pixels are repeated in meaning.

The mask costs next to nothing here. After a partial convolution all channels share
one mask, so it is enough to know *how many* channels are valid at a position: the sum
of M over a window is a box filter over one plane of counts, however many channels the
features have. Counts are integers, so this equals the convolution of a full-width
mask with ones bit for bit.

Reference: Liu et al., "Image Inpainting for Irregular Holes Using Partial
Convolutions", ECCV 2018, https://arxiv.org/abs/1804.07723, section 3.1.
"""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

IntOrSequence = int | Sequence[int] | None
PaddingLike = str | int | Sequence[int | str | tuple[int, int]]

# Paddings that continue the inputs, and their masks, instead of adding holes.
_CONTINUATIONS = {"CIRCULAR": "wrap", "REFLECT": "reflect"}

# The largest kernel, in taps, whose windows are copied where the map is smaller: 7 x 7.
_MOST_TAPS = 49

# The largest kernel, in taps, whose products with a map are in memory at once, 5 x 5 or
# 3 x 3 x 3. With larger ones, moving them about takes longer than it saves.
_MOST_PRODUCTS = 27


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Upsampled:
    """A source of twice its size, ``upsample(x)``, without the cost of it.

    A convolution multiplies each pixel of an upsampled map by each tap of the kernel,
    and so does it with the pixel's three copies. Multiplied once, and only moved and
    summed for each copy, that takes a quarter of the multiplications: for a 3x3 kernel
    9 instead of 36 for four outputs. (Kernels of more than 27 taps, strides, groups and
    paddings other than zeros to the same size have the map repeated after all.)

    Attributes:
      x: features, or a mask of features, ``[N, *spatial, C]``.
    """

    x: ArrayLike


Source = ArrayLike | Upsampled
ArrayOrSequence = Source | Sequence[Source]


def partial_conv(
    inputs: ArrayOrSequence,
    mask: ArrayOrSequence | None,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: IntOrSequence = 1,
    padding: PaddingLike = "SAME",
    kernel_dilation: IntOrSequence = 1,
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array]:
    """Convolves the valid inputs, and tells which outputs are valid.

    Equations 1 and 2 of the paper (version 2), for every window::

        x' = W^T (X * M) sum(1) / sum(M) + b   and   m' = 1   if sum(M) > 0
        x' = 0                                 and   m' = 0   otherwise

    ``sum(1)`` counts the inputs of the window over all channels, ``sum(M)`` the valid
    ones. Zero padding is a hole. With groups, both sums are taken within the group.

    Args:
      inputs: features ``[N, *spatial, C_in]``, or a sequence of sources whose channels
        add up to ``C_in``. A source may be `Upsampled`, and so is its mask then.
      mask: ``[N, *spatial, 1]`` or ``[N, *spatial, C_in]``, 1 = valid, 0 = hole; a
        sequence where ``inputs`` is one; ``None`` if only the padding is a hole.
      kernel: ``[*kernel_size, C_in // feature_group_count, features]``. Its input
        channels follow the order of the sources.
      bias: ``[features]``, added to valid outputs alone.
      strides: step from window to window: one number, or one for each spatial axis.
      padding: ``'SAME'``, ``'VALID'``, ``'CIRCULAR'``, ``'REFLECT'`` or a number; or,
        for each spatial axis, a number, a ``(low, high)`` pair, ``'CIRCULAR'`` or
        ``'REFLECT'``. These two continue inputs and masks, and so add no hole.
      kernel_dilation: step from input to input within a window.
      feature_group_count: number of groups that channels and features fall into.
      precision: of the convolution, as in ``lax.conv_general_dilated``.

    Returns:
      The outputs, ``[N, *spatial', features]``, and the new mask, in the dtype of the
      (first) mask, float32 if there was none: ``[N, *spatial', 1]``, or
      ``[N, *spatial', features]`` where the groups have masks of their own.

    Raises:
      ValueError: if shapes do not fit, or if a mask is not binary. (The values of a
        mask can be looked at, and are checked, outside of ``jax.jit`` alone.)
    """
    inputs, masks, mask_dtype = _as_sources(inputs, mask)
    if feature_group_count > 1 and len(inputs) > 1:
        # A group may take from several sources: only here they have to be joined.
        inputs, masks = [_repeat(x) for x in inputs], [_repeat(m) for m in masks]
        masks = [jnp.broadcast_to(m, x.shape) for x, m in zip(inputs, masks)]
        inputs, masks = [jnp.concatenate(inputs, -1)], [jnp.concatenate(masks, -1)]
    kernel = jnp.asarray(kernel)
    channels = [_shape(x)[-1] for x in inputs]
    _check_kernel(kernel, bias, channels, feature_group_count)
    window = _make_window(
        _shape(inputs[0])[1:-1], kernel.shape[:-2], strides, padding, kernel_dilation
    )

    dtype = jnp.result_type(kernel, *jax.tree.leaves(inputs))
    # Selected, not multiplied: NaN * 0 is NaN.
    valid_inputs = jax.tree.map(
        lambda m, x: jnp.where(m, x.astype(dtype), 0), masks, inputs
    )
    outputs = _conv_sources(
        valid_inputs, kernel.astype(dtype), window, feature_group_count, precision
    )

    # bfloat16 cannot count past 256: the sums and their ratio are float32 or wider.
    wide = jnp.promote_types(dtype, jnp.float32)
    counts = sum(
        _repeat(_count_valid(m, c, feature_group_count))
        for m, c in zip(masks, channels)
    )
    valid = _window_sum(counts, window).astype(wide)
    if valid.shape[-1] > 1:  # One mask a group: repeat it over the group's features.
        valid = jnp.repeat(valid, kernel.shape[-1] // valid.shape[-1], axis=-1)
    total = math.prod(window.size) * sum(channels) // feature_group_count
    outputs = outputs.astype(wide) * (total / jnp.maximum(valid, 1))
    if bias is not None:
        outputs += jnp.asarray(bias, wide)
    # Selected after the bias is added: a hole is 0, not b.
    outputs = jnp.where(valid > 0, outputs, 0).astype(dtype)
    new_mask = jnp.broadcast_to(valid > 0, outputs.shape[:-1] + valid.shape[-1:])
    return outputs, new_mask.astype(mask_dtype)


def update_mask(
    mask: ArrayLike,
    kernel_size: Sequence[int],
    *,
    strides: IntOrSequence = 1,
    padding: PaddingLike = "SAME",
    kernel_dilation: IntOrSequence = 1,
) -> jax.Array:
    """Returns the mask after a partial convolution: equation 2 of the paper.

    An output is valid where its window holds at least one valid input.

    Args:
      mask: ``[N, *spatial, C]``, 1 = valid, 0 = hole.
      kernel_size: of the convolution, a number for each spatial axis.
      strides: as in `partial_conv`.
      padding: as in `partial_conv`.
      kernel_dilation: as in `partial_conv`.

    Returns:
      ``[N, *spatial', 1]`` in the dtype of ``mask``.

    Raises:
      ValueError: as `partial_conv`.
    """
    coverage = mask_coverage(
        mask,
        kernel_size,
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
    )
    return (coverage > 0).astype(jnp.asarray(mask).dtype)


def mask_coverage(
    mask: ArrayLike,
    kernel_size: Sequence[int],
    *,
    strides: IntOrSequence = 1,
    padding: PaddingLike = "SAME",
    kernel_dilation: IntOrSequence = 1,
) -> jax.Array:
    """Returns the valid part of every window, sum(M) / sum(1).

    Its inverse is the factor by which a partial convolution scales.

    Args:
      mask: ``[N, *spatial, C]``, 1 = valid, 0 = hole.
      kernel_size: of the convolution, a number for each spatial axis.
      strides: as in `partial_conv`.
      padding: as in `partial_conv`.
      kernel_dilation: as in `partial_conv`.

    Returns:
      Fractions from 0 to 1, ``[N, *spatial', 1]`` in float32.

    Raises:
      ValueError: as `partial_conv`.
    """
    mask = jnp.asarray(mask)
    check_mask(mask, mask)
    window = _make_window(
        mask.shape[1:-1], kernel_size, strides, padding, kernel_dilation
    )
    channels = mask.shape[-1]
    valid = _window_sum(_count_valid(mask > 0.5, channels, 1), window)
    return valid / (math.prod(window.size) * channels)


def upsample(x: ArrayLike) -> jax.Array:
    """Doubles all spatial axes of ``[N, *spatial, C]`` by repeating pixels."""
    for axis in range(1, jnp.ndim(x) - 1):
        x = jnp.repeat(x, 2, axis=axis)
    return x


def composite(output: ArrayLike, target: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Returns I_comp: the target where it is valid, the output in the hole.

    Args:
      output: ``[..., H, W, C]``.
      target: ``[..., H, W, C]``; what it has in the hole does not matter.
      mask: ``[..., H, W, 1]`` or ``[..., H, W, C]``, 1 = valid, 0 = hole.

    Returns:
      ``[..., H, W, C]``; valid values are those of ``target``, bit for bit.

    Raises:
      ValueError: if shapes do not fit.
    """
    output, target, mask = map(jnp.asarray, (output, target, mask))
    if output.shape != target.shape:
        raise ValueError(
            "output and target must have one shape, got "
            f"{output.shape} and {target.shape}."
        )
    check_mask(mask, target)
    return jnp.where(mask > 0.5, target, output)


def check_mask(mask: ArrayLike, inputs: ArrayLike) -> None:
    """Checks that a mask fits its inputs and is binary.

    Args:
      mask: ``[N, *spatial, 1]`` or ``[N, *spatial, C]``. Its values can be looked at
        outside of ``jax.jit`` alone.
      inputs: ``[N, *spatial, C]``.

    Raises:
      ValueError: if it does not, or is not.
    """
    shape = jnp.shape(inputs)
    if jnp.shape(mask) not in (shape, (*shape[:-1], 1)):
        raise ValueError(
            f"mask must be of shape {(*shape[:-1], 1)} (one plane for all channels) or "
            f"{shape} (a plane for each), got {jnp.shape(mask)}."
        )
    if isinstance(mask, jax.core.Tracer):
        return
    # By NumPy: under jax.jit even operations on constants are traced.
    values = np.asarray(mask)
    if values.dtype != bool and not np.all((values == 0) | (values == 1)):
        raise ValueError(
            "mask must be binary, 1 = valid and 0 = hole, got values from "
            f"{values.min()} to {values.max()}; binarise it first, e.g. mask > 0.5."
        )


class _Window(NamedTuple):
    """Geometry of a convolution, one entry for each spatial axis."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    zeros: tuple[tuple[int, int], ...]  # Padding that is a hole.
    continued: tuple[tuple[int, int, str | None], ...]  # (low, high, jnp.pad's mode)


def _make_window(spatial, size, strides, padding, kernel_dilation) -> _Window:
    if not isinstance(size, Sequence):
        raise ValueError(f"kernel_size must be a number for each axis, got {size!r}.")
    ndim = len(size)
    if len(spatial) != ndim or not 1 <= ndim <= 3:
        raise ValueError(
            "inputs must have as many spatial axes as the kernel, one to three, got "
            f"{spatial} for a kernel of size {size}."
        )
    strides = _per_axis("strides", strides, ndim)
    dilation = _per_axis("kernel_dilation", kernel_dilation, ndim)
    extents = [(k - 1) * d + 1 for k, d in zip(size, dilation)]
    if isinstance(padding, str) and padding.upper() in ("SAME", "VALID"):
        padding = lax.padtype_to_pads(spatial, extents, strides, padding.upper())
    pads = (
        (padding,) * ndim if isinstance(padding, str) or _is_int(padding) else padding
    )
    zeros, continued = [], []
    try:
        for pad, extent in zip(pads, extents, strict=True):
            if isinstance(pad, str):
                mode = _CONTINUATIONS[pad.upper()]
                continued.append(((extent - 1) // 2, extent // 2, mode))
                zeros.append((0, 0))
            else:
                low, high = (pad, pad) if _is_int(pad) else pad
                zeros.append((operator.index(low), operator.index(high)))
                continued.append((0, 0, None))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            "padding must be 'SAME', 'VALID', 'CIRCULAR', 'REFLECT' or a number; or, "
            f"for each of {ndim} spatial axes, a number, a (low, high) pair, "
            f"'CIRCULAR' or 'REFLECT'; got {padding!r}."
        ) from None
    return _Window(tuple(size), strides, dilation, tuple(zeros), tuple(continued))


def _per_axis(name: str, value: IntOrSequence, ndim: int) -> tuple[int, ...]:
    if value is None:  # As Flax has it.
        value = 1
    values = tuple(value) if isinstance(value, Sequence) else (value,) * ndim
    if len(values) != ndim or not all(_is_int(v) and v > 0 for v in values):
        raise ValueError(
            f"{name} must be a positive number, or one for each of {ndim} spatial axes,"
            f" got {value!r}."
        )
    return values


def _is_int(value) -> bool:
    return isinstance(value, int | np.integer)


def _continue(x: jax.Array, window: _Window) -> jax.Array:
    for axis, (low, high, mode) in enumerate(window.continued, start=1):
        if mode:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (low, high)
            x = jnp.pad(x, widths, mode=mode)
    return x


def _conv_sources(sources, kernel, window, groups, precision) -> jax.Array:
    """Convolves sources with their parts of a kernel, and adds up."""
    sources = [x if _stays_small(x, window, groups) else _repeat(x) for x in sources]
    # What is smaller is copied: the inputs to join them, or the kernel to divide it. Of
    # a single source, whose size may be a symbol, it is neither.
    divide = len(sources) == 1 or any(isinstance(x, Upsampled) for x in sources)
    if groups == 1 and (divide or sum(x.size for x in sources) > kernel.size):
        ends = np.cumsum([_shape(x)[-1] for x in sources])
        kernels = jnp.split(kernel, ends[:-1], axis=-2)
    else:
        sources, kernels = [jnp.concatenate(sources, axis=-1)], [kernel]
    return sum(
        _conv_upsampled(x.x, w, window, precision)
        if isinstance(x, Upsampled)
        else _conv(x, w, window, groups, precision)
        for x, w in zip(sources, kernels)
    )


def _stays_small(x: Source, window: _Window, groups: int) -> bool:
    """Whether to convolve an upsampled source as it is, if it is one."""
    return (
        isinstance(x, Upsampled)
        and groups == 1
        and math.prod(window.size) <= _MOST_PRODUCTS
        # There are twice as many outputs as pixels, and no padding but of zeros.
        and all(
            stride == 1 and low + high == (size - 1) * dilation and not mode
            for size, stride, dilation, (low, high), (_, _, mode) in zip(*window)
        )
    )


def _conv(x, kernel, window: _Window, groups, precision) -> jax.Array:
    x = _continue(x, window)
    lengths = [
        max(0, (n + low + high - (size - 1) * dilation - 1) // stride + 1)
        for n, size, stride, dilation, (low, high), _ in zip(x.shape[1:-1], *window)
    ]
    # Large kernels are left to XLA: copying their windows would take much memory.
    taps = math.prod(window.size)
    if groups == 1 and 0 < math.prod(lengths) < taps <= _MOST_TAPS:
        return _conv_patches(x, kernel, lengths, window, precision)
    spatial = "DHW"[-len(window.size) :]
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=window.strides,
        padding=window.zeros,
        rhs_dilation=window.dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
        precision=precision,
    )


def _conv_patches(x, kernel, lengths, window: _Window, precision) -> jax.Array:
    """Convolves as one matrix product, for maps that are smaller than the kernel.

    XLA takes the kernel for the map there, and the map for the kernel, and its code for
    the result, or for its gradients, is some tens of times slower on CPUs.
    """
    pads = [(low, high, 0) for low, high in window.zeros]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    ndim = len(lengths)
    for axis, (n, size, stride, dilation) in enumerate(zip(lengths, *window[:3]), 1):
        taps = [
            lax.slice_in_dim(x, start, start + (n - 1) * stride + 1, stride, axis)
            for start in range(0, size * dilation, dilation)
        ]
        x = jnp.stack(taps, axis=-2)  # Ends in [*kernel_size, C_in].
    return jnp.tensordot(x, kernel, ndim + 1, precision=precision)


def _conv_upsampled(x, kernel, window: _Window, precision) -> jax.Array:
    """Convolves ``Upsampled(x)``, by one matrix product of ``x``.

    Along one axis, tap t of output 2i + a (its phase a is 0 or 1) falls on the pixel
    i + (a + t - low) // 2 of ``x``. So pixels are multiplied by all taps first, and
    what they give is moved to the outputs and summed then.
    """
    ndim = len(window.size)
    y = jnp.tensordot(x, kernel, ((-1,), (ndim,)), precision=precision)
    # Now [N, *spatial, *kernel_size, features]. The barrier keeps XLA from fusing sums
    # into the product, which slows that on CPUs.
    y = lax.optimization_barrier(y)
    # Products are bfloat16 if inputs are, so that their gradients are; their sums not.
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    for axis, (size, dilation, (low, _)) in enumerate(
        zip(window.size, window.dilation, window.zeros), 1
    ):
        taps = [lax.index_in_dim(y, t, ndim + 1, keepdims=False) for t in range(size)]
        phases = [
            sum(
                _shift(tap, (a + t * dilation - low) // 2, axis)
                for t, tap in enumerate(taps)
            )
            for a in (0, 1)
        ]
        y = jnp.stack(phases, axis + 1)
        y = y.reshape(*y.shape[:axis], 2 * x.shape[axis], *y.shape[axis + 2 :])
    return y.astype(kernel.dtype)


def _shift(x: jax.Array, by: int, axis: int) -> jax.Array:
    """Moves pixels towards the beginning of an axis; zeros follow."""
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (-by, by, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def _repeat(x: Source) -> jax.Array:
    """Returns what a source means."""
    return upsample(x.x) if isinstance(x, Upsampled) else x


def _shape(x: Source) -> tuple[int, ...]:
    if isinstance(x, Upsampled):
        batch, *spatial, channels = jnp.shape(x.x)
        return (batch, *(2 * length for length in spatial), channels)
    return jnp.shape(x)


def _count_valid(mask: Source, channels: int, groups: int) -> Source:
    """Counts the valid channels of each group, or of all groups that share a mask."""
    if isinstance(mask, Upsampled):
        return Upsampled(_count_valid(mask.x, channels, groups))
    if mask.shape[-1] == 1:
        return mask.astype(jnp.float32) * (channels // groups)
    mask = mask.reshape(*mask.shape[:-1], groups, channels // groups)
    return mask.sum(axis=-1, dtype=jnp.float32)


def _window_sum(counts: jax.Array, window: _Window) -> jax.Array:
    # A box filter as a reduction is some ten times faster on CPUs than as a convolution
    # with one channel. The barrier keeps XLA from folding the filter of a constant mask
    # at compile time, which takes it minutes.
    return lax.reduce_window(
        _continue(lax.optimization_barrier(counts), window),
        0.0,
        lax.add,
        window_dimensions=(1, *window.size, 1),
        window_strides=(1, *window.strides, 1),
        padding=((0, 0), *window.zeros, (0, 0)),
        window_dilation=(1, *window.dilation, 1),
    )


def _as_sources(inputs, mask):
    """Returns lists of inputs and of boolean masks, and the dtype of new masks."""
    many = isinstance(inputs, list | tuple)
    inputs = [jax.tree.map(jnp.asarray, x) for x in (inputs if many else [inputs])]
    if not inputs:
        raise ValueError("inputs must be an array or a sequence of at least one.")
    if any(isinstance(getattr(x, "x", x), Upsampled) for x in inputs):
        raise ValueError("inputs must be Upsampled once; use upsample for the first.")
    shapes = [_shape(x) for x in inputs]
    for shape in shapes:
        if len(shape) < 3 or shape[:-1] != shapes[0][:-1]:
            raise ValueError(
                "inputs must be [N, *spatial, C], and all sources alike but for C, got "
                f"{shapes}."
            )
    if mask is None:
        masks = jax.tree.map(lambda x: jnp.ones((1, *x.shape[1:-1], 1), bool), inputs)
        return inputs, masks, jnp.float32
    if many != isinstance(mask, list | tuple) or (many and len(mask) != len(inputs)):
        raise ValueError(
            "mask must be a sequence as long as inputs where inputs is a sequence, and "
            f"an array where it is not; got {len(inputs)} inputs and a mask of type "
            f"{type(mask).__name__}."
        )
    masks = [jax.tree.map(jnp.asarray, m) for m in (mask if many else [mask])]
    for x, m in zip(inputs, masks):
        if isinstance(x, Upsampled) != isinstance(m, Upsampled):
            raise ValueError(
                "mask must be Upsampled where its source is, and only there."
            )
        jax.tree.map(check_mask, m, x)
    dtype = jax.tree.leaves(masks)[0].dtype
    return inputs, jax.tree.map(lambda m: m > 0.5, masks), dtype


def _check_kernel(kernel, bias, channels, groups) -> None:
    per_group, features = (0, 0, *kernel.shape)[-2:]
    if per_group * groups != sum(channels) or features % groups:
        raise ValueError(
            "kernel must be [*kernel_size, C_in // feature_group_count, features] with "
            f"C_in = {sum(channels)} and feature_group_count = {groups} dividing C_in "
            f"and features, got {kernel.shape}."
        )
    if bias is not None and jnp.shape(bias) != (features,):
        raise ValueError(f"bias must be of shape {(features,)}, got {jnp.shape(bias)}.")
