"""Partial convolution and mask update as pure functions of arrays.

Contract of this module:

* Arrays are channels-last, ``[N, *spatial, C]``, with one, two or three spatial axes;
  kernels are ``[*kernel_size, C_in // groups, features]``.
* A mask is binary, **1 = valid and 0 = hole**, of any dtype. Its shape is
  ``[N, *spatial, 1]`` (one plane for all channels) or ``[N, *spatial, C]`` (one plane
  for each channel). Values in a hole, even NaN, affect neither outputs nor gradients.
* If a mask is not binary, values above 0.5 are valid and all others are holes, with and
  without ``jax.jit``. `check_binary` detects such a mask.
* Inputs and masks may be sequences of equal length. They are treated as concatenated
  along the channels, but copied only where that is cheap. Each item may be `Upsampled`,
  which is treated as if its pixels were repeated.

The cost of the mask is negligible. After a partial convolution all channels share one
mask, so only the *number* of valid channels at each position matters: the sum of M
over a window is a box filter over one plane of counts, for any number of channels.
Counts are integers, so the result equals the convolution of a full-width mask with
ones bit for bit.

Reference: Liu et al., "Image Inpainting for Irregular Holes Using Partial
Convolutions", ECCV 2018, https://arxiv.org/abs/1804.07723, section 3.1.
"""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.experimental import checkify
from jax.typing import ArrayLike, DTypeLike

from pconv_jax import _conv, _window
from pconv_jax._conv import Operand, Upsampled, upsample, wide_dtype
from pconv_jax._window import IntOrSequence, PaddingLike, is_int

__all__ = [
    "ArrayOrSequence",
    "IntOrSequence",
    "MaskOrSequence",
    "PaddingLike",
    "Upsampled",
    "check_binary",
    "check_mask",
    "composite",
    "is_valid",
    "mask_coverage",
    "partial_conv",
    "partial_conv_transpose",
    "update_mask",
    "upsample",
    "wide_dtype",
]

# Features: one array, or a sequence to be concatenated along the channels.
ArrayOrSequence = ArrayLike | Upsampled | Sequence[ArrayLike | Upsampled]

# Their masks. None stands for the mask of an input that is valid everywhere.
MaskOrSequence = ArrayLike | Upsampled | Sequence[ArrayLike | Upsampled | None] | None


def partial_conv(
    inputs: ArrayOrSequence,
    mask: MaskOrSequence,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: IntOrSequence = 1,
    padding: PaddingLike = "SAME",
    input_dilation: IntOrSequence = 1,
    kernel_dilation: IntOrSequence = 1,
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    return_coverage: bool = False,
) -> tuple[jax.Array, ...]:
    """Convolve the valid inputs and compute which outputs are valid.

    Equations 1 and 2 of the paper (version 2), for every window::

        x' = W^T (X * M) sum(1) / sum(M) + b  and  m' = 1   if sum(M) > 0
        x' = 0                                and  m' = 0   otherwise

    ``sum(1)`` is the number of inputs in the window over all channels, and ``sum(M)``
    the number of valid ones. Zero padding is a hole. Zeros between dilated inputs are
    not inputs, so they count in neither sum. With groups, both sums are taken within
    the group.

    Args:
      inputs: Features ``[N, *spatial, C_in]``, or a sequence of arrays whose channels
        add up to ``C_in``. Arrays may be `Upsampled` if their masks are too.
      mask: ``[N, *spatial, 1]`` or ``[N, *spatial, C_in]``, 1 = valid, 0 = hole; a
        sequence if ``inputs`` is one. None, which may also be an item of the sequence,
        means that all of the input is valid.
      kernel: ``[*kernel_size, C_in // feature_group_count, features]``. Its input
        channels follow the order of ``inputs``.
      bias: ``[features]``, added to valid outputs only. None (the default) for no bias.
      strides: Step between windows: one number, or one for each spatial axis. The
        default is 1.
      padding: ``'SAME'`` (the default), ``'VALID'``, ``'CIRCULAR'``, ``'REFLECT'`` or a
        number; or, for each spatial axis, a number, a ``(low, high)`` pair,
        ``'CIRCULAR'``, ``'REFLECT'`` or ``'CAUSAL'``. Circular and reflecting padding
        extend inputs and masks, so they add no hole. ``'CAUSAL'`` puts zeros before the
        inputs, so that no output sees later ones; with one spatial axis, the word alone
        is enough.
      input_dilation: Step between inputs after zeros are put between them: one number,
        or one for each spatial axis. The default is 1.
      kernel_dilation: Step between inputs within a window: one number, or one for each
        spatial axis. The default is 1.
      feature_group_count: Number of groups of channels and features. The default is 1.
      precision: Precision of the convolution, as in ``lax.conv_general_dilated``.
      return_coverage: Whether to return the coverage too. The default is False.

    Returns:
      The outputs, ``[N, *spatial', features]``, and the new mask. The mask is
      ``[N, *spatial', 1]``, or ``[N, *spatial', features]`` if the groups have
      different masks. It has the dtype of the first mask given, or float32 without one.
      With ``return_coverage``, also the coverage sum(M) / sum(1), in float32 and of the
      shape of the new mask; 0 where a window has no input.

    Raises:
      ValueError: If shapes do not fit.
    """
    operands, masks, mask_dtype = _as_operands(inputs, mask)
    if feature_group_count > 1 and len(operands) > 1:
        # A group may span several arrays, so they are concatenated.
        features = [_conv.materialize(x) for x in operands]
        planes = [
            jnp.broadcast_to(_conv.materialize(m), x.shape)
            for x, m in zip(features, masks)
        ]
        operands, masks = [jnp.concatenate(features, -1)], [jnp.concatenate(planes, -1)]
    kernel = jnp.asarray(kernel)
    _check_kernel(kernel, bias, operands, feature_group_count)
    window = _window.make_window(
        _conv.shape(operands[0])[1:-1],
        kernel.shape[:-2],
        strides,
        padding,
        kernel_dilation,
        input_dilation=input_dilation,
    )
    outputs, new_mask, *coverage = _convolve_valid(
        operands,
        masks,
        kernel,
        bias,
        window,
        groups=feature_group_count,
        zeros_are_holes=True,
        precision=precision,
        return_coverage=return_coverage,
    )
    return outputs, new_mask.astype(mask_dtype), *coverage


def partial_conv_transpose(
    inputs: ArrayOrSequence,
    mask: MaskOrSequence,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: IntOrSequence = 1,
    padding: PaddingLike = "SAME",
    kernel_dilation: IntOrSequence = 1,
    transpose_kernel: bool = False,
    precision: lax.PrecisionLike = None,
    return_coverage: bool = False,
) -> tuple[jax.Array, ...]:
    """Apply a transposed convolution to the valid inputs.

    Every input adds to the outputs in a window around it. An output is valid if a valid
    input reaches it. It is scaled by the number of inputs that reach it, divided by the
    number of valid ones::

        x' = W^T (X * M) sum(1) / sum(M) + b  and  m' = 1   if sum(M) > 0
        x' = 0                                and  m' = 0   otherwise

    Unlike in `partial_conv`, padding is no hole. So without holes, this equals
    `flax.linen.ConvTranspose`, also at the border. The exceptions are outputs that no
    input reaches, where strides are longer than the kernel: they are holes, and thus 0
    instead of b.

    Args:
      inputs: As in `partial_conv`.
      mask: As in `partial_conv`.
      kernel: ``[*kernel_size, C_in, features]``, or with ``transpose_kernel``
        ``[*kernel_size, features, C_in]``. Its input channels follow the order of
        ``inputs``.
      bias: ``[features]``, added to valid outputs only. None (the default) for no bias.
      strides: Step between the windows of neighboring inputs: one number, or one for
        each spatial axis. The default is 1.
      padding: ``'SAME'`` (the default) for outputs ``strides`` times as long as the
        inputs, ``'VALID'`` for all outputs that an input reaches, ``'CIRCULAR'`` or a
        number; or, for each spatial axis, a number, a ``(low, high)`` pair or
        ``'CIRCULAR'``. As in Flax, numbers pad the inputs after dilation by the
        strides, and circular padding adds outputs past one end at the other.
      kernel_dilation: Step between the outputs that an input reaches: one number, or
        one for each spatial axis. The default is 1.
      transpose_kernel: Whether to flip the spatial axes of the kernel and to swap its
        channels, as the gradient of a convolution does. The default is False.
      precision: Precision of the convolution, as in ``lax.conv_general_dilated``.
      return_coverage: Whether to return the coverage too. The default is False.

    Returns:
      As `partial_conv`. The new mask is ``[N, *spatial', 1]``.

    Raises:
      ValueError: If shapes do not fit.
    """
    operands, masks, mask_dtype = _as_operands(inputs, mask)
    kernel = jnp.asarray(kernel)
    if transpose_kernel and kernel.ndim > 2:
        kernel = jnp.flip(kernel, range(kernel.ndim - 2)).swapaxes(-2, -1)
    _check_kernel(kernel, bias, operands, 1)
    window = _window.make_transposed_window(
        _conv.shape(operands[0])[1:-1],
        kernel.shape[:-2],
        strides,
        padding,
        kernel_dilation,
        transpose_kernel=transpose_kernel,
    )
    outputs, new_mask, *coverage = _convolve_valid(
        operands,
        masks,
        kernel,
        bias,
        window,
        groups=1,
        zeros_are_holes=False,
        precision=precision,
        return_coverage=return_coverage,
    )
    return outputs, new_mask.astype(mask_dtype), *coverage


def _convolve_valid(
    operands: Sequence[Operand],
    masks: Sequence[Operand],
    kernel: jax.Array,
    bias: ArrayLike | None,
    window: _window.Window,
    *,
    groups: int,
    zeros_are_holes: bool,
    precision: lax.PrecisionLike,
    return_coverage: bool,
) -> tuple[jax.Array, ...]:
    """Compute the outputs, the new mask as bool and, if asked to, the coverage."""
    dtype = functools.reduce(
        jnp.promote_types, (x.dtype for x in jax.tree.leaves(operands)), kernel.dtype
    )
    # Selected, not multiplied: NaN * 0 is NaN.
    valid_inputs = jax.tree.map(
        lambda m, x: jnp.where(m, x.astype(dtype), 0), masks, operands
    )
    if len(operands) > 1:
        # The kernel is split for several inputs. Without this dependency, XLA splits
        # the kernels of all layers first and keeps the parts in memory.
        _, kernel = lax.optimization_barrier((lax.stop_gradient(valid_inputs), kernel))
    outputs = _conv.convolve(
        valid_inputs, kernel.astype(dtype), window, groups=groups, precision=precision
    )

    # bfloat16 cannot count past 256, so the sums and their ratio are float32 or wider.
    wide = wide_dtype(dtype)
    shapes = [_conv.shape(x) for x in operands]
    counts = functools.reduce(
        operator.add,
        (_count_valid(m, shape[-1], groups) for m, shape in zip(masks, shapes)),
    )
    valid = _conv.window_sum(counts, window)
    total = _conv.window_total(
        shapes[0][1:-1], valid.shape[1:-1], window, count_zeros=zeros_are_holes
    )
    total *= sum(shape[-1] for shape in shapes) // groups
    if valid.shape[-1] > 1:  # One mask for each group, repeated over its features.
        valid = jnp.repeat(valid, kernel.shape[-1] // valid.shape[-1], axis=-1)
    new_mask = jnp.broadcast_to(valid > 0, outputs.shape[:-1] + valid.shape[-1:])
    scale = total.astype(wide) / jnp.maximum(valid.astype(wide), 1)
    outputs = outputs.astype(wide) * scale
    if bias is not None:
        outputs += (
            jnp.asarray(bias).astype(wide).reshape((1,) * (outputs.ndim - 1) + (-1,))
        )
    # Selected after the bias is added: outputs in a hole are 0, not b.
    outputs = jnp.where(new_mask, outputs, 0).astype(dtype)
    if not return_coverage:
        return outputs, new_mask
    coverage = valid / jnp.maximum(total, 1)
    return outputs, new_mask, jnp.broadcast_to(coverage, new_mask.shape)


def update_mask(
    mask: ArrayLike,
    kernel_size: Sequence[int],
    *,
    strides: IntOrSequence = 1,
    padding: PaddingLike = "SAME",
    input_dilation: IntOrSequence = 1,
    kernel_dilation: IntOrSequence = 1,
) -> jax.Array:
    """Compute the mask after a partial convolution (equation 2 of the paper).

    An output is valid if its window contains at least one valid input.

    Args:
      mask: ``[N, *spatial, C]``, 1 = valid, 0 = hole.
      kernel_size: Size of the kernel along each spatial axis.
      strides: As in `partial_conv`. The default is 1.
      padding: As in `partial_conv`. The default is ``'SAME'``.
      input_dilation: As in `partial_conv`. The default is 1.
      kernel_dilation: As in `partial_conv`. The default is 1.

    Returns:
      ``[N, *spatial', 1]`` in the dtype of ``mask``.

    Raises:
      ValueError: As in `partial_conv`.
    """
    valid, _ = _count_windows(
        mask, kernel_size, strides, padding, input_dilation, kernel_dilation
    )
    return (valid > 0).astype(jnp.asarray(mask).dtype)


def mask_coverage(
    mask: ArrayLike,
    kernel_size: Sequence[int],
    *,
    strides: IntOrSequence = 1,
    padding: PaddingLike = "SAME",
    input_dilation: IntOrSequence = 1,
    kernel_dilation: IntOrSequence = 1,
) -> jax.Array:
    """Compute the valid fraction of every window, sum(M) / sum(1).

    A partial convolution scales its outputs by the inverse of this fraction, and
    returns it too if asked to.

    Args:
      mask: ``[N, *spatial, C]``, 1 = valid, 0 = hole.
      kernel_size: Size of the kernel along each spatial axis.
      strides: As in `partial_conv`. The default is 1.
      padding: As in `partial_conv`. The default is ``'SAME'``.
      input_dilation: As in `partial_conv`. The default is 1.
      kernel_dilation: As in `partial_conv`. The default is 1.

    Returns:
      Fractions in [0, 1], ``[N, *spatial', 1]`` in float32; 0 where a window has no
      input.

    Raises:
      ValueError: As in `partial_conv`.
    """
    valid, total = _count_windows(
        mask, kernel_size, strides, padding, input_dilation, kernel_dilation
    )
    return valid / jnp.maximum(total, 1)


def _count_windows(
    mask: ArrayLike,
    kernel_size: Sequence[int],
    strides: IntOrSequence,
    padding: PaddingLike,
    input_dilation: IntOrSequence,
    kernel_dilation: IntOrSequence,
) -> tuple[jax.Array, jax.Array]:
    """Count the valid inputs of each window, and all of its inputs."""
    mask = jnp.asarray(mask)
    check_mask(mask, mask)
    spatial, channels = mask.shape[1:-1], mask.shape[-1]
    window = _window.make_window(
        spatial,
        kernel_size,
        strides,
        padding,
        kernel_dilation,
        input_dilation=input_dilation,
    )
    valid = _conv.window_sum(_count_valid(is_valid(mask), channels, 1), window)
    lengths = valid.shape[1:-1]
    total = _conv.window_total(spatial, lengths, window, count_zeros=True)
    return valid, total * channels


def composite(output: ArrayLike, target: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Compute I_comp: the target where it is valid, and the output in the hole.

    Args:
      output: ``[..., H, W, C]``.
      target: ``[..., H, W, C]``. Its values in the hole are ignored.
      mask: ``[..., H, W, 1]`` or ``[..., H, W, C]``, 1 = valid, 0 = hole.

    Returns:
      ``[..., H, W, C]``. Valid pixels equal those of ``target`` bit for bit.

    Raises:
      ValueError: If shapes do not fit.
    """
    output, target, mask = map(jnp.asarray, (output, target, mask))
    if output.shape != target.shape:
        raise ValueError(
            "output and target must have the same shape, got "
            f"{output.shape} and {target.shape}."
        )
    check_mask(mask, target)
    return jnp.where(is_valid(mask), target, output)


def check_mask(mask: ArrayLike, inputs: ArrayLike) -> None:
    """Check that the shape of a mask fits its inputs.

    Args:
      mask: ``[N, *spatial, 1]`` or ``[N, *spatial, C]``.
      inputs: ``[N, *spatial, C]``.

    Raises:
      ValueError: If it does not.
    """
    shape = jnp.shape(inputs)
    if jnp.shape(mask) not in (shape, (*shape[:-1], 1)):
        swapped = shape[-1:] == (1,) and jnp.shape(mask)[:-1] == shape[:-1]
        hint = "; are inputs and mask swapped?" if swapped else "."
        raise ValueError(
            f"mask must be of shape {(*shape[:-1], 1)} (one plane for all channels) or "
            f"{shape} (a plane for each), got {jnp.shape(mask)}{hint}"
        )


def check_binary(mask: ArrayLike) -> None:
    """Check that all values of a mask are 0 or 1.

    No function of this package calls it: a check makes calls of compiled functions
    slower, and keeps exported functions from being serialized. Values that JAX traces
    are checked under `jax.experimental.checkify`, and not at all without it::

      def apply(variables, images, mask):
          ops.check_binary(mask)
          return model.apply(variables, images, mask)

      checked = jax.jit(checkify.checkify(apply, errors=checkify.user_checks))
      error, (outputs, new_mask) = checked(variables, images, mask)
      error.throw()

    Args:
      mask: A mask of any shape and dtype.

    Raises:
      ValueError: If a value is neither 0 nor 1.
      jax.experimental.checkify.JaxRuntimeError: From ``error.throw()``, if a traced
        value is neither.
    """
    mask = jnp.asarray(mask)
    if mask.dtype == bool:
        return
    binary = jnp.all((mask == 0) | (mask == 1))
    message = (
        "mask must be binary, 1 = valid and 0 = hole; binarize it first, e.g. "
        "mask > 0.5."
    )
    if isinstance(binary, Tracer):
        checkify.debug_check(binary, message)
    elif not binary:
        raise ValueError(message)


def is_valid(mask: ArrayLike) -> jax.Array:
    """Return where a mask is valid, as bool: where it is above 0.5."""
    mask = jnp.asarray(mask)
    if mask.dtype == bool:
        return mask
    return mask > (0.5 if jnp.issubdtype(mask.dtype, jnp.floating) else 0)


def _count_valid(mask: Operand, channels: int, groups: int) -> jax.Array:
    """Count the valid channels of each group, or of any group if all share a mask."""
    if isinstance(mask, Upsampled):
        return _conv.upsample(_count_valid(jnp.asarray(mask.x), channels, groups))
    if mask.shape[-1] == 1:
        return mask.astype(jnp.float32) * (channels // groups)
    mask = mask.reshape(*mask.shape[:-1], groups, channels // groups)
    return mask.sum(axis=-1, dtype=jnp.float32)


def _as_operands(
    inputs: ArrayOrSequence, mask: MaskOrSequence
) -> tuple[list[Operand], list[Operand], DTypeLike]:
    """Convert inputs and masks to lists of arrays, masks to bool.

    Returns:
      The inputs, the boolean masks, and the dtype of the new mask.
    """
    many = isinstance(inputs, list | tuple)
    operands = [jax.tree.map(jnp.asarray, x) for x in (inputs if many else [inputs])]
    if not operands:
        raise ValueError("inputs must be an array or a non-empty sequence of arrays.")
    if any(isinstance(getattr(x, "x", x), Upsampled) for x in operands):
        raise ValueError("inputs must be Upsampled once; use upsample for the first.")
    shapes = [_conv.shape(x) for x in operands]
    for shape in shapes:
        if len(shape) < 3 or shape[:-1] != shapes[0][:-1]:
            raise ValueError(
                "inputs must be [N, *spatial, C] and differ in C only, got shapes "
                f"{shapes}."
            )
    if mask is None:
        mask = [None] * len(operands) if many else mask
    given = list(mask) if isinstance(mask, list | tuple) else [mask]
    if isinstance(mask, list | tuple) != many or len(given) != len(operands):
        raise ValueError(
            "mask must be a sequence as long as inputs if inputs is a sequence, and an "
            f"array otherwise; got {len(operands)} inputs and a mask of type "
            f"{type(mask).__name__}."
        )
    masks = []
    for x, m in zip(operands, given):
        if m is None:
            m = jax.tree.map(lambda x: jnp.ones((1, *x.shape[1:-1], 1), bool), x)
        elif isinstance(x, Upsampled) != isinstance(m, Upsampled):
            raise ValueError("mask must be Upsampled if and only if its input is.")
        else:
            jax.tree.map(check_mask, m, x)
        masks.append(jax.tree.map(is_valid, m))
    dtypes = [jnp.asarray(m).dtype for m in jax.tree.leaves(given)]
    return operands, masks, dtypes[0] if dtypes else jnp.dtype(jnp.float32)


def _check_kernel(
    kernel: jax.Array, bias: ArrayLike | None, operands: Sequence[Operand], groups: int
) -> None:
    channels = [_conv.shape(x)[-1] for x in operands]
    per_group, features = (0, 0, *kernel.shape)[-2:]
    fits = is_int(groups) and per_group * groups == sum(channels)
    if not fits or features % groups:
        raise ValueError(
            "kernel must be [*kernel_size, C_in // feature_group_count, features] with "
            f"C_in = {sum(channels)} and feature_group_count = {groups} dividing C_in "
            f"and features, got {kernel.shape}."
        )
    if bias is not None and jnp.shape(bias) != (features,):
        raise ValueError(f"bias must be of shape {(features,)}, got {jnp.shape(bias)}.")
