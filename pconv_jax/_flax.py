"""What the layers of both of Flax's APIs, Linen and NNX, do around the operation."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax.typing import ArrayLike

from pconv_jax import ops


def kernel_size_of(kernel_size: int | Sequence[int]) -> tuple[int, ...]:
    """Return the size for each spatial axis. As in Flax, an int is a 1-D kernel."""
    return (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)


def count_channels(inputs: ops.ArrayOrSequence) -> int:
    """Count the channels of inputs; of a sequence, their sum.

    Raises:
      ValueError: If there is no input.
    """
    arrays = jax.tree.leaves(inputs)
    if not arrays:
        raise ValueError("inputs must be an array or a non-empty sequence of arrays.")
    return sum(jnp.shape(x)[-1] for x in arrays)


def check_groups(groups: int, channels: int, features: int) -> None:
    """Check that groups divide the channels and the features.

    Raises:
      ValueError: If they do not.
    """
    if groups < 1 or channels % groups or features % groups:
        raise ValueError(
            f"feature_group_count = {groups} must divide the "
            f"input channels, {channels}, and features = {features}."
        )


def apply(
    operation: Callable[..., tuple[jax.Array, ...]],
    inputs: ops.ArrayOrSequence,
    mask: ops.MaskOrSequence,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    dtype: Dtype | None,
    **options: Any,
) -> tuple[jax.Array, ...]:
    """Apply an operation to inputs of any number of batch axes and any dtype.

    Args:
      operation: A function such as `ops.partial_conv`.
      inputs: ``[..., *spatial, C]``, or a sequence of such arrays.
      mask: Their masks; None for an input that is valid everywhere.
      kernel: ``[*kernel_size, ...]``.
      bias: ``[features]``, or None.
      dtype: Dtype of the computation. None infers it from inputs and parameters.
      **options: Other arguments of the operation.

    Returns:
      The results of the operation, with the batch axes of the inputs.

    Raises:
      ValueError: If masks have other batch axes.
    """
    arrays, structure = jax.tree.flatten(inputs)
    batch = jnp.shape(arrays[0])[: 1 - kernel.ndim]
    if len(batch) != 1:  # Else, the operation's own errors name the shapes as given.
        _check_masks(mask, batch, jnp.ndim(arrays[0]))
    *arrays, kernel, bias = promote_dtype(*arrays, kernel, bias, dtype=dtype)
    merge = functools.partial(_merge_batch, batch=batch)
    results = operation(
        jax.tree.map(merge, jax.tree.unflatten(structure, arrays)),
        jax.tree.map(merge, mask),
        kernel,
        bias,
        **options,
    )
    if len(batch) == 1:
        return results
    return tuple(x.reshape(*batch, *x.shape[1:]) for x in results)


def _check_masks(mask: ops.MaskOrSequence, batch: tuple[int, ...], ndim: int) -> None:
    """Check the batch axes of masks before they are merged."""
    for shape in map(jnp.shape, jax.tree.leaves(mask)):
        if len(shape) != ndim or shape[: len(batch)] != batch:
            raise ValueError(
                f"mask must have the batch axes of inputs, {batch}, and {ndim} axes in "
                f"all, got the shape {shape}."
            )


def _merge_batch(x: ArrayLike, batch: tuple[int, ...]) -> jax.Array:
    """Merge the batch axes into one; an input with others is left, to be refused."""
    x = jnp.asarray(x)
    if len(batch) == 1 or x.shape[: len(batch)] != batch:
        return x
    return x.reshape(math.prod(batch), *x.shape[len(batch) :])
