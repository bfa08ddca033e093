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

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from pconv_jax import _conv
from pconv_jax._conv import (
    IntOrSequence,
    Operand,
    PaddingLike,
    Upsampled,
    upsample,
)

__all__ = [
    "PaddingLike",
    "Upsampled",
    "check_mask",
    "composite",
    "mask_coverage",
    "partial_conv",
    "update_mask",
    "upsample",
]

ArrayOrSequence = Operand | Sequence[Operand]


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
        inputs, masks = (
            [_conv.repeat(x) for x in inputs],
            [_conv.repeat(m) for m in masks],
        )
        masks = [jnp.broadcast_to(m, x.shape) for x, m in zip(inputs, masks)]
        inputs, masks = [jnp.concatenate(inputs, -1)], [jnp.concatenate(masks, -1)]
    kernel = jnp.asarray(kernel)
    channels = [_conv.shape(x)[-1] for x in inputs]
    _check_kernel(kernel, bias, channels, feature_group_count)
    window = _conv.make_window(
        _conv.shape(inputs[0])[1:-1],
        kernel.shape[:-2],
        strides,
        padding,
        kernel_dilation,
    )

    dtype = jnp.result_type(kernel, *jax.tree.leaves(inputs))
    # Selected, not multiplied: NaN * 0 is NaN.
    valid_inputs = jax.tree.map(
        lambda m, x: jnp.where(m, x.astype(dtype), 0), masks, inputs
    )
    outputs = _conv.convolve(
        valid_inputs,
        kernel.astype(dtype),
        window,
        groups=feature_group_count,
        precision=precision,
    )

    # bfloat16 cannot count past 256: the sums and their ratio are float32 or wider.
    wide = jnp.promote_types(dtype, jnp.float32)
    counts = sum(
        _conv.repeat(_count_valid(m, c, feature_group_count))
        for m, c in zip(masks, channels)
    )
    valid = _conv.window_sum(counts, window).astype(wide)
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
    window = _conv.make_window(
        mask.shape[1:-1], kernel_size, strides, padding, kernel_dilation
    )
    channels = mask.shape[-1]
    valid = _conv.window_sum(_count_valid(mask > 0.5, channels, 1), window)
    return valid / (math.prod(window.size) * channels)


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


def _count_valid(mask: Operand, channels: int, groups: int) -> Operand:
    """Counts the valid channels of each group, or of all groups that share a mask."""
    if isinstance(mask, Upsampled):
        return Upsampled(_count_valid(mask.x, channels, groups))
    if mask.shape[-1] == 1:
        return mask.astype(jnp.float32) * (channels // groups)
    mask = mask.reshape(*mask.shape[:-1], groups, channels // groups)
    return mask.sum(axis=-1, dtype=jnp.float32)


def _as_sources(inputs, mask):
    """Returns lists of inputs and of boolean masks, and the dtype of new masks."""
    many = isinstance(inputs, list | tuple)
    inputs = [jax.tree.map(jnp.asarray, x) for x in (inputs if many else [inputs])]
    if not inputs:
        raise ValueError("inputs must be an array or a sequence of at least one.")
    if any(isinstance(getattr(x, "x", x), Upsampled) for x in inputs):
        raise ValueError("inputs must be Upsampled once; use upsample for the first.")
    shapes = [_conv.shape(x) for x in inputs]
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
