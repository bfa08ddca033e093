"""Flax (Linen) layers of the partial convolution.

The field names and the parameters, ``kernel`` and ``bias``, are those of
`flax.linen.Conv`: either layer can use the parameters of the other. In Flax a *field*
called ``mask`` masks weights; here the mask, 1 = valid and 0 = hole, is the second
argument of the call.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.typing import ArrayLike

from pconv_jax import _flax, ops


class _PartialConvBase(nn.Module):
    """The fields of both layers, and the convolution they share."""

    features: int
    kernel_size: int | Sequence[int]
    strides: ops.IntOrSequence = 1
    padding: ops.PaddingLike = "SAME"
    kernel_dilation: ops.IntOrSequence = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def _convolve(
        self, inputs: ops.ArrayOrSequence, mask: ops.ArrayOrSequence | None
    ) -> tuple[jax.Array, jax.Array]:
        kernel_size = _flax.kernel_size_of(self.kernel_size)
        channels = sum(jnp.shape(x)[-1] for x in jax.tree.leaves(inputs))
        groups = self.feature_group_count
        _flax.check_groups(groups, channels, self.features)
        kernel = self.param(
            "kernel",
            self.kernel_init,
            (*kernel_size, channels // groups, self.features),
            self.param_dtype,
        )
        bias = None
        if self.use_bias:
            bias = self.param(
                "bias", self.bias_init, (self.features,), self.param_dtype
            )
        outputs, new_mask = _flax.apply(
            ops.partial_conv,
            inputs,
            mask,
            kernel,
            bias,
            dtype=self.dtype,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=groups,
            precision=self.precision,
        )
        return outputs, new_mask


class PartialConv(_PartialConvBase):
    """A convolution of the valid inputs only (Liu et al. 2018, section 3.1).

    It returns the outputs and their mask, which the next layer takes::

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
      features: Number of output channels.
      kernel_size: Shape of the kernel. As in Flax, an int is a 1-D kernel.
      strides: Step between windows: one number, or one for each spatial axis. The
        default is 1.
      padding: ``'SAME'`` (the default), ``'VALID'``, ``'CIRCULAR'``, ``'REFLECT'``, a
        number, or one of these or a ``(low, high)`` pair for each axis; see
        `ops.partial_conv`. With strides, use ``k // 2`` to pad as the paper's code
        does; ``'SAME'`` pads differently.
      kernel_dilation: Step between inputs within a window. The default is 1.
      feature_group_count: Number of groups of channels; the mask is counted in each.
        The default is 1.
      use_bias: Whether to add a bias to valid outputs. The default is True.
      dtype: Dtype of the computation. None (the default) infers it from inputs and
        parameters. The mask is always counted in float32.
      param_dtype: Dtype of the parameters. The default is float32.
      precision: Precision of the convolution, as in `jax.lax.conv_general_dilated`.
      kernel_init: Initializer of the kernel. The default is LeCun normal.
      bias_init: Initializer of the bias. The default is zeros.
    """

    def __call__(
        self, inputs: ops.ArrayOrSequence, mask: ops.ArrayOrSequence | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Convolve the valid inputs and compute which outputs are valid.

        Args:
          inputs: ``[..., *spatial, C]`` with any number of batch axes, or a sequence of
            such arrays, treated as concatenated along C. `ops.Upsampled` arrays are
            treated as upsampled.
          mask: ``[..., *spatial, 1]`` or ``[..., *spatial, C]``, 1 = valid, 0 = hole; a
            sequence if ``inputs`` is one. None (the default) if only the padding is a
            hole.

        Returns:
          Outputs ``[..., *spatial', features]`` and their mask; see `ops.partial_conv`.

        Raises:
          ValueError: If shapes do not fit.
        """
        return self._convolve(inputs, mask)


class PartialPadConv(_PartialConvBase):
    """A drop-in for `flax.linen.Conv` with partial convolution based padding.

    Zero padding counts as a hole, so outputs at the border are scaled to the inputs
    that exist (Liu et al., "Partial Convolution based Padding", 2018,
    https://arxiv.org/abs/1811.11718). Fields and parameters are those of `PartialConv`.
    """

    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """Convolve ``[..., *spatial, C]`` to ``[..., *spatial', features]``."""
        return self._convolve(inputs, None)[0]
