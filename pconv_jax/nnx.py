"""Flax (NNX) layers of the partial convolution.

The parameters, defaults and names of arguments are those of `flax.nnx.Conv`, but there
are no arguments ``mask``, ``promote_dtype``, ``preferred_element_type`` and
``conv_general_dilated``. With the same arrays, a layer computes the same numbers as the
Linen layer of the same name in `pconv_jax.layers`. In Flax the argument ``mask`` of the
constructor masks weights; here the mask, 1 = valid and 0 = hole, is the second argument
of the call.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.typing import ArrayLike

from pconv_jax import _flax, ops

_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()
_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class _Layer(nnx.Module):
    """The parameters of all layers.

    Attributes:
      out_features: Number of output channels.
      kernel_shape: Shape of the kernel.
      use_bias: Whether there is a bias.
      param_dtype: Dtype of the parameters.
      kernel: The kernel.
      bias: The bias, or None.
    """

    out_features: int
    kernel_shape: tuple[int, ...]
    use_bias: bool
    param_dtype: Dtype
    kernel: nnx.Param[jax.Array]
    bias: nnx.Param[jax.Array] | None

    def _set_parameters(
        self,
        rngs: nnx.Rngs,
        kernel_init: Initializer,
        bias_init: Initializer,
        kernel_metadata: Mapping[str, Any],
        bias_metadata: Mapping[str, Any],
    ) -> None:
        # In the order of nnx.Conv, so that the same rngs give the same parameters.
        kernel = kernel_init(rngs.params(), self.kernel_shape, self.param_dtype)
        self.kernel = nnx.Param(kernel, **kernel_metadata)
        self.bias = nnx.data(None)
        if self.use_bias:
            bias = bias_init(rngs.params(), (self.out_features,), self.param_dtype)
            self.bias = nnx.Param(bias, **bias_metadata)


class _PartialConvBase(_Layer):
    """The settings of both layers, and the convolution they share."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: ops.IntOrSequence = 1,
        *,
        padding: ops.PaddingLike = "SAME",
        input_dilation: ops.IntOrSequence = 1,
        kernel_dilation: ops.IntOrSequence = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = _KERNEL_INIT,
        bias_init: Initializer = _BIAS_INIT,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
    ):
        _flax.check_groups(feature_group_count, in_features, out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = _flax.kernel_size_of(kernel_size)
        self.strides = strides
        self.padding = padding
        self.input_dilation = input_dilation
        self.kernel_dilation = kernel_dilation
        self.feature_group_count = feature_group_count
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.kernel_shape = (
            *self.kernel_size,
            in_features // feature_group_count,
            out_features,
        )
        self._set_parameters(
            rngs, kernel_init, bias_init, kernel_metadata, bias_metadata
        )

    def _convolve(
        self,
        inputs: ops.ArrayOrSequence,
        mask: ops.MaskOrSequence,
        return_coverage: bool = False,
    ) -> tuple[jax.Array, ...]:
        return _flax.apply(
            ops.partial_conv,
            inputs,
            mask,
            self.kernel[...],
            None if self.bias is None else self.bias[...],
            dtype=self.dtype,
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
            precision=self.precision,
            return_coverage=return_coverage,
        )


class PartialConv(_PartialConvBase):
    """A convolution of the valid inputs only (Liu et al. 2018, section 3.1).

    It returns the outputs and their mask, which is passed to the next layer::

      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from pconv_jax.nnx import PartialConv
      >>> images = jnp.ones((1, 32, 32, 3))
      >>> mask = jnp.ones((1, 32, 32, 1)).at[:, 8:24, 8:24].set(0)
      >>> layer = PartialConv(3, 64, (7, 7), strides=2, padding=3, rngs=nnx.Rngs(0))
      >>> outputs, new_mask = layer(images, mask)
      >>> outputs.shape, new_mask.shape
      ((1, 16, 16, 64), (1, 16, 16, 1))

    Args:
      in_features: Number of input channels; of a sequence of inputs, their sum.
      out_features: Number of output channels.
      kernel_size: Shape of the kernel. As in Flax, an int is a 1-D kernel.
      strides: Step between windows: one number, or one for each spatial axis. The
        default is 1.
      padding: As in `ops.partial_conv`. The default is ``'SAME'``. With strides, use
        ``k // 2`` to pad as the paper's code does; ``'SAME'`` pads differently.
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
      rngs: Random numbers for the initializers.
      kernel_metadata: Metadata of the kernel's `nnx.Param`, such as its sharding. Empty
        by default.
      bias_metadata: Metadata of the bias. Empty by default.

    Raises:
      ValueError: If the groups do not divide the numbers of channels.
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
          Outputs ``[..., *spatial', out_features]`` and their mask, and the coverage if
          it is asked for; see `ops.partial_conv`.

        Raises:
          ValueError: If shapes do not fit.
        """
        return self._convolve(inputs, mask, return_coverage)


class PartialPadConv(_PartialConvBase):
    """A convolution like `flax.nnx.Conv`, with partial convolution padding.

    Zero padding counts as a hole, so outputs at the border are scaled to the inputs
    that exist (Liu et al., "Partial Convolution based Padding", 2018,
    https://arxiv.org/abs/1811.11718). Arguments and parameters are those of
    `PartialConv`.
    """

    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """Convolve ``[..., *spatial, C]`` to ``[..., *spatial', out_features]``."""
        return self._convolve(inputs, None)[0]


class PartialConvTranspose(_Layer):
    """A transposed convolution of the valid inputs only.

    An output is valid if a valid input reaches it. It is scaled by the number of inputs
    that reach it, divided by the number of valid ones. The arguments and parameters are
    those of `flax.nnx.ConvTranspose`. Without holes, the outputs are equal as well,
    unless strides are longer than the kernel.

    Args:
      in_features: Number of input channels; of a sequence of inputs, their sum.
      out_features: Number of output channels.
      kernel_size: Shape of the kernel. As in Flax, an int is a 1-D kernel.
      strides: Step between the windows of neighboring inputs. None (the default) is 1.
      padding: As in `ops.partial_conv_transpose`. The default is ``'SAME'``.
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
      rngs: Random numbers for the initializers.
      kernel_metadata: Metadata of the kernel's `nnx.Param`, such as its sharding. Empty
        by default.
      bias_metadata: Metadata of the bias. Empty by default.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: ops.IntOrSequence = None,
        *,
        padding: ops.PaddingLike = "SAME",
        kernel_dilation: ops.IntOrSequence = None,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = _KERNEL_INIT,
        bias_init: Initializer = _BIAS_INIT,
        transpose_kernel: bool = False,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = _flax.kernel_size_of(kernel_size)
        self.strides = strides
        self.padding = padding
        self.kernel_dilation = kernel_dilation
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.transpose_kernel = transpose_kernel
        ends = in_features, out_features
        self.kernel_shape = (
            *self.kernel_size,
            *(ends[::-1] if transpose_kernel else ends),
        )
        self._set_parameters(
            rngs, kernel_init, bias_init, kernel_metadata, bias_metadata
        )

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
          Outputs ``[..., *spatial', out_features]`` and their mask, and the coverage if
          it is asked for; see `ops.partial_conv_transpose`.

        Raises:
          ValueError: If shapes do not fit.
        """
        return _flax.apply(
            ops.partial_conv_transpose,
            inputs,
            mask,
            self.kernel[...],
            None if self.bias is None else self.bias[...],
            dtype=self.dtype,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            return_coverage=return_coverage,
        )
