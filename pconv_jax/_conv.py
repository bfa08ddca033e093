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
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

IntOrSequence = int | Sequence[int] | None
PaddingLike = str | int | Sequence[int | str | tuple[int, int]]

# Paddings that extend the inputs and their masks instead of adding holes, with their
# modes in jnp.pad.
_CONTINUATIONS = {"CIRCULAR": "wrap", "REFLECT": "reflect"}

# The largest kernel, in taps, whose windows are copied if the map is smaller: 7 x 7.
_MOST_TAPS = 49

# The largest kernel, in taps, whose products with a map are in memory at once: 5 x 5 or
# 3 x 3 x 3. For larger kernels, moving the products takes longer than it saves.
_MOST_PRODUCTS = 27

# The largest number of values that the gradient of a kernel copies at once.
_MOST_COPIED = 2**21


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Upsampled:
    """An operand that stands for ``upsample(x)`` and is cheaper to convolve.

    A convolution of an upsampled map multiplies each pixel by each tap of the kernel
    four times, once for each copy of the pixel. Multiplying once, then moving and
    summing the products for each copy, takes a quarter of the multiplications: for a
    3x3 kernel, 9 instead of 36 for four outputs. (The map is repeated in memory after
    all for kernels of more than 27 taps, strides, groups, and any padding other than
    zeros to the same size.)

    Attributes:
      x: Features or their mask, ``[N, *spatial, C]``.
    """

    x: ArrayLike


# An array of features or of a mask, after conversion from an `ArrayLike`.
Operand = jax.Array | Upsampled


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


class Window(NamedTuple):
    """The geometry of a convolution, one entry for each spatial axis."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    zeros: tuple[tuple[int, int], ...]  # (low, high); these count as holes.
    continued: tuple[tuple[int, int, str | None], ...]  # (low, high, mode of jnp.pad)


def make_window(
    spatial: Sequence[int],
    size: Sequence[int],
    strides: IntOrSequence,
    padding: PaddingLike,
    kernel_dilation: IntOrSequence,
) -> Window:
    """Check the geometry of a convolution and bring it into one form.

    Args:
      spatial: Lengths of the spatial axes of the inputs.
      size: Size of the kernel along each spatial axis.
      strides: As in `ops.partial_conv`.
      padding: As in `ops.partial_conv`.
      kernel_dilation: As in `ops.partial_conv`.

    Returns:
      The geometry, complete for each axis.

    Raises:
      ValueError: If an argument is invalid; the message names it.
    """
    if not isinstance(size, Sequence):
        raise ValueError(f"kernel_size must be a number for each axis, got {size!r}.")
    ndim = len(size)
    if len(spatial) != ndim or not 1 <= ndim <= 3:
        raise ValueError(
            "inputs must have as many spatial axes as the kernel, one to three, got "
            f"{spatial} for a kernel of size {size}."
        )
    steps = _per_axis("strides", strides, ndim)
    dilation = _per_axis("kernel_dilation", kernel_dilation, ndim)
    extents = [(k - 1) * d + 1 for k, d in zip(size, dilation)]
    pads: Sequence[int | str | tuple[int, int]]
    if isinstance(padding, str) and padding.upper() in ("SAME", "VALID"):
        pads = lax.padtype_to_pads(spatial, extents, steps, padding.upper())
    elif isinstance(padding, str | int | np.integer):
        pads = (padding,) * ndim
    else:
        pads = padding
    zeros: list[tuple[int, int]] = []
    continued: list[tuple[int, int, str | None]] = []
    try:
        for pad, extent in zip(pads, extents, strict=True):
            if isinstance(pad, str):
                mode = _CONTINUATIONS[pad.upper()]
                zeros.append((0, 0))
                continued.append(((extent - 1) // 2, extent // 2, mode))
            else:
                low, high = (pad, pad) if isinstance(pad, int | np.integer) else pad
                zeros.append((operator.index(low), operator.index(high)))
                continued.append((0, 0, None))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            "padding must be 'SAME', 'VALID', 'CIRCULAR', 'REFLECT' or a number; or, "
            f"for each of {ndim} spatial axes, a number, a (low, high) pair, "
            f"'CIRCULAR' or 'REFLECT'; got {padding!r}."
        ) from None
    return Window(tuple(size), steps, dilation, tuple(zeros), tuple(continued))


def _per_axis(name: str, value: IntOrSequence, ndim: int) -> tuple[int, ...]:
    if value is None:  # Flax accepts None for 1.
        value = 1
    values = tuple(value) if isinstance(value, Sequence) else (value,) * ndim
    if len(values) != ndim or not all(_is_int(v) and v > 0 for v in values):
        raise ValueError(
            f"{name} must be a positive number, or one for each of {ndim} spatial axes,"
            f" got {value!r}."
        )
    return values


def _is_int(value: object) -> bool:
    """Return whether a value is an integer of Python or NumPy, not a symbolic size."""
    return isinstance(value, int | np.integer)


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
    # split it. A single operand, whose size may be symbolic, needs no copy.
    split = len(operands) == 1 or len(arrays) < len(operands)
    if groups == 1 and (split or sum(x.size for x in arrays) > kernel.size):
        ends = np.cumsum([shape(x)[-1] for x in operands])
        kernels = jnp.split(kernel, ends[:-1], axis=-2)
    else:
        operands, kernels = [jnp.concatenate(arrays, axis=-1)], [kernel]
    results = (
        _conv_upsampled(jnp.asarray(x.x), w, window, precision)
        if isinstance(x, Upsampled)
        else _conv(x, w, window, groups, precision)
        for x, w in zip(operands, kernels)
    )
    return functools.reduce(operator.add, results)


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
        padding=((0, 0), *window.zeros, (0, 0)),
        window_dilation=(1, *window.dilation, 1),
    )


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
        # The output is twice as long as the map, and all padding is zeros.
        and all(
            stride == 1 and low + high == (size - 1) * dilation and not mode
            for size, stride, dilation, (low, high), (_, _, mode) in zip(*window)
        )
    )


def _conv(
    x: jax.Array,
    kernel: jax.Array,
    window: Window,
    groups: int,
    precision: lax.PrecisionLike,
) -> jax.Array:
    x = _continue(x, window)
    lengths = [
        max(0, (n + low + high - (size - 1) * dilation - 1) // stride + 1)
        for n, size, stride, dilation, (low, high), _ in zip(x.shape[1:-1], *window)
    ]
    # Large kernels are left to XLA: copies of their windows would take much memory.
    taps, outputs = math.prod(window.size), math.prod(lengths)
    if groups == 1 and outputs > 0 and taps <= _MOST_TAPS:
        if outputs < taps:
            return _conv_patches(x, kernel, lengths, window, precision)
        # The custom gradients cut maps into strips, so sizes must not be symbolic.
        if jax.default_backend() == "cpu" and all(map(_is_int, x.shape)):
            return _conv_on_cpu(x, kernel, window, precision)
    return _conv_by_xla(x, kernel, window, groups, precision)


def _conv_by_xla(
    x: jax.Array,
    kernel: jax.Array,
    window: Window,
    groups: int,
    precision: lax.PrecisionLike,
) -> jax.Array:
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _conv_on_cpu(
    x: jax.Array, kernel: jax.Array, window: Window, precision: lax.PrecisionLike
) -> jax.Array:
    """Convolve with XLA, with gradients that are fast on CPUs.

    The gradients that JAX derives are convolutions too. With respect to the kernel, the
    windows are as large as the map. With respect to the inputs of a convolution with
    strides, the map has zeros between its pixels. Both are far slower on CPUs than
    other convolutions. The tangents here are computed such that their transposes, which
    are the gradients, are fast.
    """
    return _conv_by_xla(x, kernel, window, 1, precision)


@functools.partial(_conv_on_cpu.defjvp, symbolic_zeros=True)
def _conv_on_cpu_jvp(
    window: Window,
    precision: lax.PrecisionLike,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array | SymbolicZero, jax.Array | SymbolicZero],
) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _conv_on_cpu(x, kernel, window, precision)
    dy = jnp.zeros_like(y)
    if not isinstance(dx, SymbolicZero):
        dy += _conv_phases(dx, kernel, y.shape[1:-1], window, precision)
    if not isinstance(dkernel, SymbolicZero):
        dy += _conv_strips(x, dkernel, y.shape[1:-1], window, precision)
    return y, dy


def _conv_phases(
    x: jax.Array,
    kernel: jax.Array,
    lengths: Sequence[int],
    window: Window,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Convolve with strides as a sum of convolutions without, each of some pixels."""
    axes = zip(x.shape[1:-1], lengths, *window[:4])
    dilation = tuple(
        d // math.gcd(s, d) for s, d in zip(window.strides, window.dilation)
    )
    y = jnp.zeros((x.shape[0], *lengths, kernel.shape[-1]), x.dtype)
    for phase in itertools.product(*(_phases(*axis) for axis in axes)):
        pixels, taps, pads = zip(*phase)
        part = kernel[taps]
        unstrided = Window(part.shape[:-2], (1,) * len(taps), dilation, pads, ())
        y += _conv_by_xla(x[:, *pixels], part, unstrided, 1, precision)
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
    x: jax.Array,
    kernel: jax.Array,
    lengths: Sequence[int],
    window: Window,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Convolve strips of rows one after the other, each as one matrix product.

    The transposes of these products are matrix products too; their sum is the gradient
    of the kernel.
    """
    rows, *others = lengths
    (size, *_), (stride, *_), (dilation, *_), ((low, _), *pads), _ = window
    row = max(1, x.shape[0] * math.prod(others) * kernel[..., 0].size)
    count = -(-rows // max(1, _MOST_COPIED // row))
    strip = -(-rows // count)
    taken = (strip - 1) * stride + (size - 1) * dilation + 1
    high = (count - 1) * strip * stride + taken - low - x.shape[1]
    x = _pad(x, [(low, high)])
    window = window._replace(zeros=((0, 0), *pads))
    # The strips share the kernel: its dtype is the one that gradients are summed in.
    dtype, wide = kernel.dtype, jnp.promote_types(kernel.dtype, jnp.float32)
    kernel = kernel.astype(wide)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # Keeps x, not its windows.
    def conv(i: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(x, i * strip * stride, taken, axis=1)
        kernel = kernel.astype(dtype)
        return _conv_patches(x, kernel, [strip, *others], window, precision)

    y = lax.map(lambda i: conv(i, x, kernel), jnp.arange(count))
    y = jnp.moveaxis(y, 0, 1).reshape(x.shape[0], -1, *y.shape[3:])
    return y[:, :rows]


def _conv_patches(
    x: jax.Array,
    kernel: jax.Array,
    lengths: Sequence[int],
    window: Window,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Convolve as one matrix product of copies of all windows.

    If a map is smaller than the kernel, XLA swaps their roles, and the result or its
    gradients take tens of times longer on CPUs.
    """
    x = _pad(x, window.zeros)
    ndim = len(lengths)
    for axis, (n, size, stride, dilation) in enumerate(zip(lengths, *window[:3]), 1):
        taps = [
            lax.slice_in_dim(x, start, start + (n - 1) * stride + 1, stride, axis)
            for start in range(0, size * dilation, dilation)
        ]
        x = jnp.stack(taps, axis=-2)  # Ends in [*kernel_size, C_in].
    return jnp.tensordot(x, kernel, ndim + 1, precision=precision)


def _conv_upsampled(
    x: jax.Array, kernel: jax.Array, window: Window, precision: lax.PrecisionLike
) -> jax.Array:
    """Convolve ``Upsampled(x)`` with one matrix product of ``x``.

    Along one axis, tap t of output 2i + a (its phase a is 0 or 1) falls on pixel
    i + (a + t - low) // 2 of ``x``. So all pixels are first multiplied by all taps;
    then the products are moved to their outputs and summed.
    """
    ndim = len(window.size)
    y = jnp.tensordot(x, kernel, ((-1,), (ndim,)), precision=precision)
    # Now [N, *spatial, *kernel_size, features]. The barrier stops XLA from fusing the
    # sums into the product, which would slow the product on CPUs.
    y = lax.optimization_barrier(y)
    # Of bfloat16 inputs, products and gradients are bfloat16, and sums are float32.
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    for axis, (size, dilation, (low, _)) in enumerate(
        zip(window.size, window.dilation, window.zeros), 1
    ):
        taps = [lax.index_in_dim(y, t, ndim + 1, keepdims=False) for t in range(size)]
        phases = [
            functools.reduce(
                operator.add,
                (
                    _shift(tap, (a + t * dilation - low) // 2, axis)
                    for t, tap in enumerate(taps)
                ),
            )
            for a in (0, 1)
        ]
        y = jnp.stack(phases, axis + 1)
        y = y.reshape(*y.shape[:axis], 2 * x.shape[axis], *y.shape[axis + 2 :])
    return y.astype(kernel.dtype)


def _shift(x: jax.Array, by: int, axis: int) -> jax.Array:
    """Move pixels toward the beginning of an axis and fill the end with zeros."""
    return _pad(x, [(0, 0)] * (axis - 1) + [(-by, by)])


def _pad(x: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
    """Add zeros to the ends of the first spatial axes; negative numbers crop."""
    pads = [(0, 0), *pads, *[(0, 0)] * (x.ndim - 1 - len(pads))]
    return lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) for low, high in pads])
