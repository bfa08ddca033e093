"""Flax (Linen) layers of the partial convolution.

Field names are those of `flax.linen.Conv`, and so are the parameters, ``kernel`` and
``bias``: either layer can use the other's. In Flax a *field* called ``mask`` masks
weights; here the mask is the second argument of the call, 1 = valid, 0 = hole.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.typing import ArrayLike

from pconv_jax import ops


class PartialConv(nn.Module):
    """A convolution that sees valid inputs alone (Liu et al. 2018, section 3.1).

    Returns a pair, the outputs and their mask, to be given to the next layer::

      >>> import jax, jax.numpy as jnp
      >>> from pconv_jax.layers import PartialConv
      >>> images = jnp.ones((1, 32, 32, 3))
      >>> mask = jnp.ones((1, 32, 32, 1)).at[:, 8:24, 8:24].set(0)
      >>> layer = PartialConv(features=64, kernel_size=(7, 7), strides=2, padding=3)
      >>> variables = layer.init(jax.random.key(0), images, mask)
      >>> outputs, new_mask = layer.apply(variables, images, mask)
      >>> outputs.shape, new_mask.shape
      ((1, 16, 16, 64), (1, 16, 16, 1))

    Attributes:
      features: number of output channels.
      kernel_size: shape of the kernel. As in Flax, a bare number is a 1-D kernel.
      strides: step from window to window, one number or one for each spatial axis.
      padding: ``'SAME'``, ``'VALID'``, ``'CIRCULAR'``, ``'REFLECT'``, a number, or one
        of these or a ``(low, high)`` pair for each axis; see `ops.partial_conv`. With
        strides, ``k // 2`` pads as the paper's code does, and ``'SAME'`` does not.
      kernel_dilation: step from input to input within a window.
      feature_group_count: number of groups of channels; the mask is counted in each.
      use_bias: whether to add a bias to valid outputs.
      dtype: of the computation; inferred from inputs and parameters if None. The mask
        is counted in float32 whatever the dtype.
      param_dtype: of the parameters.
      precision: of the convolution, as in `jax.lax.conv_general_dilated`.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: ops.PaddingLike = "SAME"
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, inputs: ops.ArrayOrSequence, mask: ops.ArrayOrSequence | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Applies the layer.

        Args:
          inputs: ``[..., *spatial, C]`` with any number of batch axes, or a sequence of
            such arrays that are concatenated along C in meaning; `ops.Upsampled` ones
            are upsampled in meaning.
          mask: ``[..., *spatial, 1]`` or ``[..., *spatial, C]``, 1 = valid, 0 = hole; a
            sequence where ``inputs`` is one; None if only the padding is a hole.

        Returns:
          Outputs ``[..., *spatial', features]`` and their mask; see `ops.partial_conv`.

        Raises:
          ValueError: if shapes do not fit or a mask is not binary.
        """
        kernel_size = self.kernel_size
        kernel_size = (kernel_size,) if isinstance(kernel_size, int) else kernel_size
        arrays, structure = jax.tree.flatten(inputs)
        channels = sum(jnp.shape(x)[-1] for x in arrays)
        groups = self.feature_group_count
        if groups < 1 or channels % groups or self.features % groups:
            raise ValueError(
                f"feature_group_count = {groups} must divide the "
                f"input channels, {channels}, and features = {self.features}."
            )
        kernel = self.param(
            "kernel",
            self.kernel_init,
            (*kernel_size, channels // self.feature_group_count, self.features),
            self.param_dtype,
        )
        bias = None
        if self.use_bias:
            bias = self.param(
                "bias", self.bias_init, (self.features,), self.param_dtype
            )
        *arrays, kernel, bias = promote_dtype(*arrays, kernel, bias, dtype=self.dtype)
        batch = arrays[0].shape[: -(len(kernel_size) + 1)]
        merge = functools.partial(_merge_batch, batch=batch)
        outputs, mask = ops.partial_conv(
            jax.tree.map(merge, jax.tree.unflatten(structure, arrays)),
            jax.tree.map(merge, mask),
            kernel,
            bias,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
            precision=self.precision,
        )
        return (
            outputs.reshape(*batch, *outputs.shape[1:]),
            mask.reshape(*batch, *mask.shape[1:]),
        )


class PartialPadConv(PartialConv):
    """A drop-in for `flax.linen.Conv` with partial convolution based padding.

    Zero padding is taken for what it is, a hole, so that outputs at the border are
    scaled to the inputs that they really have (Liu et al., "Partial Convolution based
    Padding", 2018, https://arxiv.org/abs/1811.11718). Fields and parameters are those
    of `PartialConv`.
    """

    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """Returns the outputs alone, ``[..., *spatial', features]``."""
        return super().__call__(inputs)[0]


def _merge_batch(x: ArrayLike, batch: tuple[int, ...]) -> jax.Array:
    """Makes one of the batch axes; an array with others is left, to be refused."""
    x = jnp.asarray(x)
    if x.shape[: len(batch)] != batch:
        return x
    return x.reshape(math.prod(batch), *x.shape[len(batch) :])
