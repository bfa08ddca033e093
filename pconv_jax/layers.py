"""Flax (Linen) layers of the partial convolution.

The parameters, ``kernel`` and ``bias``, are those of `flax.linen.Conv`: either layer
can use those of the other. The names of the fields are Flax's, too, but there are no
fields ``mask``, ``promote_dtype`` and ``conv_general_dilated``. In Flax the field
``mask`` masks weights; here the mask, 1 = valid and 0 = hole, is the second argument of
the call.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.typing import ArrayLike

from pconv_jax import _flax, ops


def _parameters(
    layer: "_PartialConvBase | PartialConvTranspose", kernel_shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array | None]:
    """Get the kernel and the bias of a layer; the bias is None if it has none."""
    dtype = layer.param_dtype
    kernel = layer.param("kernel", layer.kernel_init, kernel_shape, dtype)
    if not layer.use_bias:
        return kernel, None
    return kernel, layer.param("bias", layer.bias_init, (layer.features,), dtype)


class _PartialConvBase(nn.Module):
    """The fields of both layers, and the convolution they share."""

    features: int
    kernel_size: int | Sequence[int]
    strides: ops.IntOrSequence = 1
    padding: ops.PaddingLike = "SAME"
    input_dilation: ops.IntOrSequence = 1
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
        self,
        inputs: ops.ArrayOrSequence,
        mask: ops.MaskOrSequence,
        return_coverage: bool = False,
    ) -> tuple[jax.Array, ...]:
        kernel_size = _flax.kernel_size_of(self.kernel_size)
        channels = _flax.count_channels(inputs)
        groups = self.feature_group_count
        _flax.check_groups(groups, channels, self.features)
        kernel_shape = (*kernel_size, channels // groups, self.features)
        kernel, bias = _parameters(self, kernel_shape)
        return _flax.apply(
            ops.partial_conv,
            inputs,
            mask,
            kernel,
            bias,
            dtype=self.dtype,
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=groups,
            precision=self.precision,
            return_coverage=return_coverage,
        )


class PartialConv(_PartialConvBase):
    """A convolution of the valid inputs only (Liu et al. 2018, section 3.1).

    It returns the outputs and their mask, which is passed to the next layer::

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
        number, or for each axis a number, a ``(low, high)`` pair or a name, such as
        ``'CAUSAL'``; see `ops.partial_conv`. With strides, use ``k // 2`` to pad as the
        paper's code does; ``'SAME'`` pads differently.
      input_dilation: Step between inputs after zeros are put between them. The default
        is 1.
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
        self,
        inputs: ops.ArrayOrSequence,
        mask: ops.MaskOrSequence = None,
        *,
        return_coverage: bool = False,
    ) -> tuple[jax.Array, ...]:
        """Convolve the valid inputs and compute which outputs are valid.

        Args:
          inputs: ``[..., *spatial, C]`` with any number of batch axes, or a sequence of
            such arrays, treated as concatenated along C. `ops.Upsampled` arrays are
            treated as upsampled.
          mask: ``[..., *spatial, 1]`` or ``[..., *spatial, C]``, 1 = valid, 0 = hole; a
            sequence if ``inputs`` is one. None (the default), which may also be an item
            of the sequence, means that all of the input is valid.
          return_coverage: Whether to return sum(M) / sum(1) too. The default is False.

        Returns:
          Outputs ``[..., *spatial', features]`` and their mask, and the coverage if it
          is asked for; see `ops.partial_conv`.

        Raises:
          ValueError: If shapes do not fit.
        """
        return self._convolve(inputs, mask, return_coverage)


class PartialPadConv(_PartialConvBase):
    """A convolution like `flax.linen.Conv`, with partial convolution padding.

    Zero padding counts as a hole, so outputs at the border are scaled to the inputs
    that exist (Liu et al., "Partial Convolution based Padding", 2018,
    https://arxiv.org/abs/1811.11718). Fields and parameters are those of `PartialConv`.
    """

    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """Convolve ``[..., *spatial, C]`` to ``[..., *spatial', features]``."""
        return self._convolve(inputs, None)[0]


class PartialConvTranspose(nn.Module):
    """A transposed convolution of the valid inputs only.

    An output is valid if a valid input reaches it. It is scaled by the number of inputs
    that reach it, divided by the number of valid ones. The fields and parameters are
    those of `flax.linen.ConvTranspose`. Without holes, the outputs are equal as well,
    unless strides are longer than the kernel::

      >>> import jax, jax.numpy as jnp
      >>> from pconv_jax.layers import PartialConvTranspose
      >>> inputs = jnp.ones((1, 16, 16, 8))
      >>> mask = jnp.ones((1, 16, 16, 1)).at[:, 4:12, 4:12].set(0)
      >>> layer = PartialConvTranspose(features=4, kernel_size=(4, 4), strides=(2, 2))
      >>> variables = layer.init(jax.random.key(0), inputs, mask)
      >>> outputs, new_mask = layer.apply(variables, inputs, mask)
      >>> outputs.shape, new_mask.shape
      ((1, 32, 32, 4), (1, 32, 32, 1))

    Attributes:
      features: Number of output channels.
      kernel_size: Shape of the kernel. As in Flax, an int is a 1-D kernel.
      strides: Step between the windows of neighboring inputs. None (the default) is 1.
      padding: ``'SAME'`` (the default), ``'VALID'``, ``'CIRCULAR'``, a number, or a
        number or a ``(low, high)`` pair for each axis, which pad the dilated inputs;
        see `ops.partial_conv_transpose`.
      kernel_dilation: Step between the outputs that an input reaches. None (the
        default) is 1.
      use_bias: Whether to add a bias to valid outputs. The default is True.
      dtype: Dtype of the computation. None (the default) infers it from inputs and
        parameters. The mask is always counted in float32.
      param_dtype: Dtype of the parameters. The default is float32.
      precision: Precision of the convolution, as in `jax.lax.conv_transpose`.
      kernel_init: Initializer of the kernel. The default is LeCun normal.
      bias_init: Initializer of the bias. The default is zeros.
      transpose_kernel: Whether the kernel is that of a convolution, with features and
        input channels swapped and the spatial axes to be flipped. The default is False.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: ops.IntOrSequence = None
    padding: ops.PaddingLike = "SAME"
    kernel_dilation: ops.IntOrSequence = None
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    transpose_kernel: bool = False

    @nn.compact
    def __call__(
        self,
        inputs: ops.ArrayOrSequence,
        mask: ops.MaskOrSequence = None,
        *,
        return_coverage: bool = False,
    ) -> tuple[jax.Array, ...]:
        """Spread the valid inputs and compute which outputs are valid.

        Args:
          inputs: ``[..., *spatial, C]`` with any number of batch axes, or a sequence of
            such arrays, treated as concatenated along C. `ops.Upsampled` arrays are
            treated as upsampled.
          mask: ``[..., *spatial, 1]`` or ``[..., *spatial, C]``, 1 = valid, 0 = hole; a
            sequence if ``inputs`` is one. None (the default), which may also be an item
            of the sequence, means that all of the input is valid.
          return_coverage: Whether to return sum(M) / sum(1) too. The default is False.

        Returns:
          Outputs ``[..., *spatial', features]`` and their mask, and the coverage if it
          is asked for; see `ops.partial_conv_transpose`.

        Raises:
          ValueError: If shapes do not fit.
        """
        kernel_size = _flax.kernel_size_of(self.kernel_size)
        ends = _flax.count_channels(inputs), self.features
        kernel_shape = (*kernel_size, *(ends[::-1] if self.transpose_kernel else ends))
        kernel, bias = _parameters(self, kernel_shape)
        return _flax.apply(
            ops.partial_conv_transpose,
            inputs,
            mask,
            kernel,
            bias,
            dtype=self.dtype,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            return_coverage=return_coverage,
        )
