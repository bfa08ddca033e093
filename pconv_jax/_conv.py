"""Convolution of one or several operands, by the fastest algorithm for each.

Contract of this module: arrays are channels-last, ``[N, *spatial, C]``, with one, two
or three spatial axes; kernels are ``[*kernel_size, C_in // groups, features]``. This
module does not use masks. Results equal those of ``lax.conv_general_dilated`` up to the
order of summation.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike, DTypeLike

from pconv_jax._window import Window, is_int, make_window

# The largest kernel, in taps, whose windows are copied if the map is smaller: 7 x 7.
_MOST_TAPS = 49

# The largest kernel, in taps, whose products with a map are in memory at once: 5 x 5 or
# 3 x 3 x 3. For larger kernels, moving the products takes longer than it saves.
_MOST_PRODUCTS = 27

# The largest number of values of windows that are copied at once.
_MOST_COPIED = 2**21

# The least number of channels for which convolutions in bfloat16 copy windows on CPUs.
# With fewer, copying takes longer than it saves.
_LEAST_CHANNELS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Upsampled:
    """An operand that stands for ``upsample(x)`` and is cheaper to convolve.

    In 2-D, a convolution of an upsampled map multiplies each pixel by each tap of the
    kernel four times, once for each copy of the pixel. Multiplying once, and then
    moving and adding the products, takes a quarter of the multiplications. With kernels
    of more than 27 taps, strides, dilated inputs, groups, spatial axes that are divided
    among devices, or any padding other than zeros to the same size, the map is repeated
    in memory instead.

    Attributes:
      x: Features or their mask, ``[N, *spatial, C]``.
    """

    x: ArrayLike


# An array of features or of a mask, after conversion from an `ArrayLike`.
Operand = jax.Array | Upsampled


def wide_dtype(dtype: DTypeLike) -> DTypeLike:
    """Return the dtype to sum in: that of the summands, but float32 if it is narrow."""
    dtype = jnp.dtype(dtype)
    wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if wide else jnp.dtype(jnp.float32)


def upsample(x: ArrayLike) -> jax.Array:
    """Double all spatial axes of ``[N, *spatial, C]`` by repeating pixels."""
    x = jnp.asarray(x)
    for axis in range(1, x.ndim - 1):
        x = jnp.repeat(x, 2, axis=axis)
    return x


def materialize(x: Operand) -> jax.Array:
    """Convert an operand to an array, upsampled if it is `Upsampled`."""
    return upsample(x.x) if isinstance(x, Upsampled) else x


def shape(x: ArrayLike | Upsampled) -> tuple[int, ...]:
    """Return the shape of an operand after upsampling."""
    if isinstance(x, Upsampled):
        batch, *spatial, channels = jnp.shape(x.x)
        return (batch, *(2 * length for length in spatial), channels)
    return jnp.shape(x)


def convolve(
    operands: Sequence[Operand],
    kernel: jax.Array,
    window: Window,
    *,
    groups: int,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Convolve each operand with its part of a kernel and add the results.

    Args:
      operands: Arrays of the dtype of the kernel that differ in their channels only.
        With groups, there must be exactly one operand.
      kernel: ``[*kernel_size, C_in // groups, features]``. Its input channels follow
        the order of the operands.
      window: Geometry, from `make_window`.
      groups: Number of groups of channels and of features.
      precision: As in ``lax.conv_general_dilated``.

    Returns:
      ``[N, *spatial', features]`` in the dtype of the kernel.
    """
    operands = [
        x if _stays_small(x, window, groups) else materialize(x) for x in operands
    ]
    arrays = [x for x in operands if not isinstance(x, Upsampled)]
    # The smaller of the two is copied: inputs to concatenate them, or the kernel to
    # split it. A single operand needs no copy, and one of symbolic size may be large.
    split = len(operands) == 1 or len(arrays) < len(operands)
    sizes = [x.size for x in arrays]
    split = split or not all(map(is_int, sizes)) or sum(sizes) > kernel.size
    kernels = [kernel]
    if groups > 1 or not split:
        operands = [jnp.concatenate(arrays, axis=-1)]
    elif len(operands) > 1:
        ends = np.cumsum([shape(x)[-1] for x in operands])
        kernels = jnp.split(kernel, ends[:-1], axis=-2)
    results = (
        _conv_by_method(jnp.asarray(x.x), w, _upsampled(w.dtype), window, precision)
        if isinstance(x, Upsampled)
        else _conv(x, w, window, groups, precision)
        for x, w in zip(operands, kernels)
    )
    return functools.reduce(operator.add, results)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Convolve by the fastest algorithm, as the function that `nn.Conv` calls."""
    del dimension_numbers  # Those of this module.
    window = make_window(
        lhs.shape[1:-1],
        rhs.shape[:-2],
        tuple(window_strides),
        tuple(padding),
        tuple(rhs_dilation),
        input_dilation=tuple(lhs_dilation),
    )
    return _conv(lhs, rhs, window, feature_group_count, precision)


def window_sum(counts: jax.Array, window: Window) -> jax.Array:
    """Sum over each window: ``[N, *spatial, C]`` to ``[N, *spatial', C]``."""
    # On CPUs, a box filter is about ten times faster as a reduction than as a
    # convolution with one channel. The barrier stops XLA from folding the filter of a
    # constant mask at compile time, which takes minutes.
    return lax.reduce_window(
        _continue(lax.optimization_barrier(counts), window),
        0.0,
        lax.add,
        window_dimensions=(1, *window.size, 1),
        window_strides=(1, *window.strides, 1),
        padding=_lax_padding(window) or ((0, 0), *window.zeros, (0, 0)),
        base_dilation=(1, *window.input_dilation, 1),
        window_dilation=(1, *window.dilation, 1),
    )


def window_total(
    spatial: Sequence[int],
    lengths: Sequence[int],
    window: Window,
    *,
    count_zeros: bool,
) -> jax.Array:
    """Count the inputs of one channel that each window has if all are valid.

    Args:
      spatial: Lengths of the spatial axes of the inputs.
      lengths: Lengths of the spatial axes of the outputs.
      window: Geometry, from `make_window` or `make_transposed_window`.
      count_zeros: Whether the zeros around the map count as inputs. Zeros between
        dilated inputs never do.

    Returns:
      float32 ``[1, *lengths, 1]``, with lengths of 1 if all windows have the same.
    """
    one = jnp.ones((1,) * (len(lengths) + 2), jnp.float32)
    if count_zeros and all(step == 1 for step in window.input_dilation):
        return one * math.prod(window.size)
    total = one
    for axis, (n, length, geometry) in enumerate(
        zip(spatial, lengths, zip(*window)), 1
    ):
        size, stride, dilation, (low, _), (before, after, _), step = geometry
        # With NumPy, the program has a constant for each axis instead of operations.
        xp = np if is_int(n) and is_int(length) else jnp
        start = xp.arange(length) * stride - low
        last = (n + before + after - 1) * step
        count = xp.zeros(length, np.float32)
        for position in (start + t * dilation for t in range(size)):
            counted = position % step == 0
            if not count_zeros:
                counted &= (position >= 0) & (position <= last)
            count += counted.astype(np.float32)
        total *= count.reshape([-1 if i == axis else 1 for i in range(total.ndim)])
    return total


def _continue(x: jax.Array, window: Window) -> jax.Array:
    """Pad the axes with circular or reflecting padding."""
    for axis, (low, high, mode) in enumerate(window.continued, start=1):
        if mode:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (low, high)
            x = jnp.pad(x, widths, mode=mode)
    return x


def _stays_small(x: Operand, window: Window, groups: int) -> bool:
    """Return whether an operand is convolved without repeating its pixels."""
    return (
        isinstance(x, Upsampled)
        and groups == 1
        and math.prod(window.size) <= _MOST_PRODUCTS
        and not _is_sharded(x.x)
        # The output is twice as long as the map, and all padding is zeros.
        and all(
            stride == step == 1 and low + high == (size - 1) * dilation and not mode
            for size, stride, dilation, (low, high), (_, _, mode), step in zip(*window)
        )
    )


def _is_sharded(x: ArrayLike) -> bool:
    """Return whether a spatial axis is divided among devices by an explicit mesh."""
    return any(jax.typeof(x).sharding.spec[1:-1])


def _output_lengths(x: jax.Array, window: Window) -> tuple[int, ...]:
    """Compute the lengths of the outputs of a map that is continued already."""
    return tuple(
        max(0, (n + low + high - (size - 1) * dilation - 1) // stride + 1)
        for n, size, stride, dilation, (low, high) in zip(x.shape[1:-1], *window[:4])
    )


# A function of a map, a kernel and their geometry, linear in each of the first two.
_Convolution = Callable[[jax.Array, jax.Array, Window, lax.PrecisionLike], jax.Array]


class _Method(NamedTuple):
    """Ways to compute a convolution, equal up to the order of summation.

    The gradients that JAX derives from a tangent are its transposes. So on CPUs the
    tangents are computed such that their transposes are fast.

    Attributes:
      outputs: Computes the outputs on CPUs.
      tangent_of_x: Computes the tangent with respect to the map on CPUs.
      tangent_of_kernel: Computes the tangent with respect to the kernel on CPUs.
      elsewhere: Computes all three on other platforms.
    """

    outputs: _Convolution
    tangent_of_x: _Convolution
    tangent_of_kernel: _Convolution
    elsewhere: _Convolution


def _conv(
    x: jax.Array,
    kernel: jax.Array,
    window: Window,
    groups: int,
    precision: lax.PrecisionLike,
) -> jax.Array:
    x = _continue(x, window)
    method = _choose_method(x, window, groups)
    if method is None:
        return _conv_by_xla(x, kernel, window, precision, groups=groups)
    return _conv_by_method(x, kernel, method, window, precision)


def _choose_method(x: jax.Array, window: Window, groups: int) -> _Method | None:
    """Choose how to convolve an array; None leaves the gradients to XLA too."""
    taps = math.prod(window.size)
    # The windows of large kernels would take much memory. The methods cut maps into
    # pieces, so sizes must not be symbolic, nor axes divided among devices.
    if groups > 1 or taps > _MOST_TAPS or any(d > 1 for d in window.input_dilation):
        return None
    if not all(map(is_int, x.shape[1:-1])) or _is_sharded(x):
        return None
    outputs = math.prod(_output_lengths(x, window))
    if outputs == 0:
        return None
    if outputs < taps:
        return _SMALL_MAPS
    if not all(map(is_int, x.shape)):
        return None
    narrow = x.dtype == jnp.bfloat16 and x.shape[-1] >= _LEAST_CHANNELS
    return _LARGE_BFLOAT16_MAPS if narrow else _LARGE_MAPS


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _conv_by_method(
    x: jax.Array,
    kernel: jax.Array,
    method: _Method,
    window: Window,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Convolve as is fastest on the platform, with gradients that are fast too."""
    return _by_platform(method.outputs, method.elsewhere, window, precision)(x, kernel)


@functools.partial(_conv_by_method.defjvp, symbolic_zeros=True)
def _conv_by_method_jvp(
    method: _Method,
    window: Window,
    precision: lax.PrecisionLike,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array | SymbolicZero, jax.Array | SymbolicZero],
) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _conv_by_method(x, kernel, method, window, precision)

    def tangent(on_cpu: _Convolution, x: jax.Array, kernel: jax.Array) -> jax.Array:
        convolve = _by_platform(on_cpu, method.elsewhere, window, precision)
        return jax.checkpoint(convolve, prevent_cse=False)(x, kernel)

    parts = []
    if not isinstance(dx, SymbolicZero):
        parts.append(tangent(method.tangent_of_x, dx, kernel))
    if not isinstance(dkernel, SymbolicZero):
        parts.append(tangent(method.tangent_of_kernel, x, dkernel))
    return y, functools.reduce(operator.add, parts) if parts else jnp.zeros_like(y)


@functools.cache
def _by_platform(
    cpu: _Convolution,
    elsewhere: _Convolution,
    window: Window,
    precision: lax.PrecisionLike,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return one convolution for CPUs and another for all other platforms.

    It is chosen when a program is compiled, which may be on another machine.
    """

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if cpu is elsewhere:
            return cpu(x, kernel, window, precision)
        return lax.platform_dependent(
            x,
            kernel,
            cpu=lambda x, kernel: cpu(x, kernel, window, precision),
            default=lambda x, kernel: elsewhere(x, kernel, window, precision),
        )

    return convolve


def _lax_padding(window: Window) -> str | None:
    """Return the name of the padding if it depends on a symbolic size.

    JAX takes numbers only, or the name. Only ``'SAME'`` depends on the size.
    """
    numbers = all(is_int(pad) for pair in window.zeros for pad in pair)
    return None if numbers else "SAME"


def _conv_by_xla(
    x: jax.Array,
    kernel: jax.Array,
    window: Window,
    precision: lax.PrecisionLike,
    *,
    groups: int = 1,
) -> jax.Array:
    spatial = "DHW"[-len(window.size) :]
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=window.strides,
        padding=_lax_padding(window) or window.zeros,
        lhs_dilation=window.input_dilation,
        rhs_dilation=window.dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
        precision=precision,
    )


def _conv_phases(
    x: jax.Array, kernel: jax.Array, window: Window, precision: lax.PrecisionLike
) -> jax.Array:
    """Convolve with strides as a sum of convolutions without, each of some pixels.

    XLA's gradient with respect to the map is a convolution too, of outputs with zeros
    between them, which is slow on CPUs. Those of the terms of this sum have no zeros.
    """
    lengths = _output_lengths(x, window)
    axes = zip(x.shape[1:-1], lengths, *window[:4])
    dilation = tuple(
        d // math.gcd(s, d) for s, d in zip(window.strides, window.dilation)
    )
    y = jnp.zeros((x.shape[0], *lengths, kernel.shape[-1]), x.dtype)
    for phase in itertools.product(*(_phases(*axis) for axis in axes)):
        pixels, taps, pads = zip(*phase)
        part = kernel[taps]
        ones = (1,) * len(taps)
        unstrided = Window(part.shape[:-2], ones, dilation, pads, (), ones)
        y += _conv_by_xla(x[:, *pixels], part, unstrided, precision)
    return y


def _phases(
    n: int, length: int, size: int, stride: int, dilation: int, pads: tuple[int, int]
) -> list[tuple[slice, slice, tuple[int, int]]]:
    """Split one axis into phases: pixels, taps, and the padding of the pixels.

    Tap t of output i falls on pixel ``stride * i + dilation * t - low``. So all taps
    whose positions have the same remainder modulo the stride meet only the pixels with
    that remainder.
    """
    phases = []
    step = stride // math.gcd(stride, dilation)
    for start in range(min(step, size)):
        taps = range(start, size, step)
        first, last = (t * dilation - pads[0] for t in (taps[0], taps[-1]))
        pixels = range(first % stride, n, stride)
        if pixels:
            padding = (-(first // stride), length + last // stride - len(pixels))
            pixels = slice(pixels.start, n, stride)
            phases.append((pixels, slice(start, size, step), padding))
    return phases


def _conv_strips(
    x: jax.Array, kernel: jax.Array, window: Window, precision: lax.PrecisionLike
) -> jax.Array:
    """Convolve strips of rows one after the other, each as one matrix product.

    XLA's gradient with respect to the kernel is a convolution with windows as large as
    the map, which is slow on CPUs. The transposes of these products are matrix products
    too; their sum is the gradient of the kernel. In bfloat16, the products are up to
    twice as fast on CPUs as XLA's convolution, which computes in float32.
    """
    rows, *others = _output_lengths(x, window)
    (size, *_), (stride, *_), (dilation, *_), ((low, _), *pads), *_ = window
    row = max(1, x.shape[0] * math.prod(others) * math.prod(kernel.shape[:-1]))
    count = -(-rows // max(1, _MOST_COPIED // row))
    strip = -(-rows // count)
    taken = (strip - 1) * stride + (size - 1) * dilation + 1
    high = (count - 1) * strip * stride + taken - low - x.shape[1]
    x = _pad(x, [(low, high)])
    window = window._replace(zeros=((0, 0), *pads))
    # The strips share the kernel: its dtype is the one that gradients are summed in.
    dtype, wide = kernel.dtype, wide_dtype(kernel.dtype)
    kernel = kernel.astype(wide)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # Keeps x, not its windows.
    def conv(i: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(x, i * strip * stride, taken, axis=1)
        kernel = kernel.astype(dtype)
        return _conv_patches(x, kernel, window, precision)

    y = lax.map(lambda i: conv(i, x, kernel), jnp.arange(count))
    y = jnp.moveaxis(y, 0, 1).reshape(x.shape[0], count * strip, *y.shape[3:])
    return y[:, :rows]


def _conv_patches(
    x: jax.Array, kernel: jax.Array, window: Window, precision: lax.PrecisionLike
) -> jax.Array:
    """Convolve as one matrix product of copies of all windows.

    If a map is smaller than the kernel, XLA swaps their roles, and the result or its
    gradients take tens of times longer on CPUs.
    """
    lengths = _output_lengths(x, window)
    x = _pad(x, window.zeros)
    ndim = len(lengths)
    for axis, (n, size, stride, dilation) in enumerate(zip(lengths, *window[:3]), 1):
        taps = [
            lax.slice_in_dim(x, start, start + (n - 1) * stride + 1, stride, axis)
            for start in range(0, size * dilation, dilation)
        ]
        x = jnp.stack(taps, axis=-2)  # Ends in [*kernel_size, C_in].
    return jnp.tensordot(x, kernel, ndim + 1, precision=precision)


def _conv_taps(
    x: jax.Array, kernel: jax.Array, window: Window, precision: lax.PrecisionLike
) -> jax.Array:
    """Convolve ``Upsampled(x)`` with one matrix product of ``x``.

    All pixels are multiplied by all taps, and the products moved and summed.
    """
    wide = wide_dtype(kernel.dtype)
    return _sum_taps(_tap_products(x, kernel, precision, wide), kernel, window)


def _conv_narrow_taps(
    x: jax.Array, kernel: jax.Array, window: Window, precision: lax.PrecisionLike
) -> jax.Array:
    """Do the same with products of the dtype of the kernel.

    The products that JAX derives for the gradients have the dtype of this one. In
    bfloat16 they are faster than in float32.
    """
    products = _tap_products(x, kernel, precision, kernel.dtype)
    return _sum_taps(products, kernel, window)


def _tap_products(
    x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike, dtype: DTypeLike
) -> jax.Array:
    """Multiply pixels by taps: ``[N, *spatial, *kernel_size, features]``."""
    channels = ((x.ndim - 1,), (kernel.ndim - 2,))
    return lax.dot_general(
        x,
        kernel,
        (channels, ((), ())),
        precision=precision,
        preferred_element_type=dtype,
    )


def _sum_taps(y: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Sum the products of pixels and taps at their outputs.

    Along one axis, tap t of output 2i + a (its phase a is 0 or 1) falls on pixel
    i + (a + t - low) // 2 of the map.
    """
    ndim = len(window.size)
    lengths = y.shape[1 : 1 + ndim]
    # The barrier stops XLA from fusing the sums into the product, which would slow the
    # product on CPUs.
    y = lax.optimization_barrier(y)
    y = y.astype(wide_dtype(y.dtype))
    for axis, (size, dilation, (low, _)) in enumerate(
        zip(window.size, window.dilation, window.zeros), 1
    ):
        taps = [lax.index_in_dim(y, t, ndim + 1, keepdims=False) for t in range(size)]
        phases = [
            functools.reduce(
                lax.add,  # Traced in a fraction of the time of the operator.
                (
                    _shift(tap, (a + t * dilation - low) // 2, axis)
                    for t, tap in enumerate(taps)
                ),
            )
            for a in (0, 1)
        ]
        y = jnp.stack(phases, axis + 1)
        y = y.reshape(*y.shape[:axis], 2 * lengths[axis - 1], *y.shape[axis + 2 :])
    return y.astype(kernel.dtype)


def _shift(x: jax.Array, by: int, axis: int) -> jax.Array:
    """Move pixels toward the beginning of an axis and fill the end with zeros."""
    return _pad(x, [(0, 0)] * (axis - 1) + [(-by, by)])


def _pad(x: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
    """Add zeros to the ends of the first spatial axes; negative numbers crop."""
    pads = [(0, 0), *pads, *[(0, 0)] * (x.ndim - 1 - len(pads))]
    return lax.pad(x, np.zeros((), x.dtype), [(low, high, 0) for low, high in pads])


# XLA's own convolution on all platforms; on CPUs, with other gradients.
_LARGE_MAPS = _Method(_conv_by_xla, _conv_phases, _conv_strips, _conv_by_xla)

# On CPUs with instructions for bfloat16, matrix products use them, and XLA's
# convolutions do not.
_LARGE_BFLOAT16_MAPS = _Method(_conv_strips, _conv_phases, _conv_strips, _conv_by_xla)

_SMALL_MAPS = _Method(_conv_patches, _conv_patches, _conv_patches, _conv_by_xla)

# Where the dtype is narrow, products in float32 are as fast on CPUs, and more exact.
_NARROW_UPSAMPLED = _Method(
    _conv_taps, _conv_narrow_taps, _conv_narrow_taps, _conv_narrow_taps
)
_UPSAMPLED = _Method(_conv_taps, _conv_taps, _conv_taps, _conv_taps)


def _upsampled(dtype: DTypeLike) -> _Method:
    """Return how to convolve an `Upsampled` map with a kernel of a dtype."""
    return _UPSAMPLED if wide_dtype(dtype) == dtype else _NARROW_UPSAMPLED
