"""Convolutions of one or several sources, by the fastest way that there is for each.

Contract of this module: arrays are channels-last, ``[N, *spatial, C]``, with one, two
or three spatial axes; kernels are ``[*kernel_size, C_in // groups, features]``. Nothing
here knows of masks. What is computed is what ``lax.conv_general_dilated`` computes, but
for the order of the sums.
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

# Paddings that continue the inputs, and their masks, instead of adding holes.
_CONTINUATIONS = {"CIRCULAR": "wrap", "REFLECT": "reflect"}

# The largest kernel, in taps, whose windows are copied where the map is smaller: 7 x 7.
_MOST_TAPS = 49

# The largest kernel, in taps, whose products with a map are in memory at once, 5 x 5 or
# 3 x 3 x 3. With larger ones, moving them about takes longer than it saves.
_MOST_PRODUCTS = 27

# The most values that are copied at once for the gradient of a kernel.
_MOST_COPIED = 2**21


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


Operand = ArrayLike | Upsampled


def upsample(x: ArrayLike) -> jax.Array:
    """Doubles all spatial axes of ``[N, *spatial, C]`` by repeating pixels."""
    for axis in range(1, jnp.ndim(x) - 1):
        x = jnp.repeat(x, 2, axis=axis)
    return x


def repeat(x: Operand) -> jax.Array:
    """Returns what a source means."""
    return upsample(x.x) if isinstance(x, Upsampled) else x


def shape(x: Operand) -> tuple[int, ...]:
    """Returns the shape of what a source means."""
    if isinstance(x, Upsampled):
        batch, *spatial, channels = jnp.shape(x.x)
        return (batch, *(2 * length for length in spatial), channels)
    return jnp.shape(x)


class Window(NamedTuple):
    """Geometry of a convolution, one entry for each spatial axis."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    zeros: tuple[tuple[int, int], ...]  # (low, high); for masks it is a hole.
    continued: tuple[tuple[int, int, str | None], ...]  # (low, high, jnp.pad's mode)


def make_window(
    spatial: Sequence[int],
    size: Sequence[int],
    strides: IntOrSequence,
    padding: PaddingLike,
    kernel_dilation: IntOrSequence,
) -> Window:
    """Returns the geometry of a convolution.

    Args:
      spatial: lengths of the inputs' spatial axes.
      size: of the kernel, a number for each spatial axis.
      strides: as in `ops.partial_conv`, and so are the others.
      padding: see there.
      kernel_dilation: see there.

    Raises:
      ValueError: if they do not fit, naming which.
    """
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
    return Window(tuple(size), strides, dilation, tuple(zeros), tuple(continued))


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


def convolve(
    sources: Sequence[Operand],
    kernel: jax.Array,
    window: Window,
    *,
    groups: int,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Convolves sources with their parts of a kernel, and adds up.

    Args:
      sources: alike in all axes but for the channels, and of the kernel's dtype; one
        alone if there are groups.
      kernel: ``[*kernel_size, C_in // groups, features]``. Its input channels follow
        the order of the sources.
      window: from `make_window`.
      groups: that channels and features fall into.
      precision: as in ``lax.conv_general_dilated``.

    Returns:
      ``[N, *spatial', features]`` in the kernel's dtype.
    """
    sources = [x if _stays_small(x, window, groups) else repeat(x) for x in sources]
    # What is smaller is copied: the inputs to join them, or the kernel to divide it. Of
    # a single source, whose size may be a symbol, it is neither.
    divide = len(sources) == 1 or any(isinstance(x, Upsampled) for x in sources)
    if groups == 1 and (divide or sum(x.size for x in sources) > kernel.size):
        ends = np.cumsum([shape(x)[-1] for x in sources])
        kernels = jnp.split(kernel, ends[:-1], axis=-2)
    else:
        sources, kernels = [jnp.concatenate(sources, axis=-1)], [kernel]
    return sum(
        _conv_upsampled(x.x, w, window, precision)
        if isinstance(x, Upsampled)
        else _conv(x, w, window, groups, precision)
        for x, w in zip(sources, kernels)
    )


def window_sum(counts: jax.Array, window: Window) -> jax.Array:
    """Sums over each window: ``[N, *spatial, C]`` -> ``[N, *spatial', C]``."""
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


def _continue(x: jax.Array, window: Window) -> jax.Array:
    for axis, (low, high, mode) in enumerate(window.continued, start=1):
        if mode:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (low, high)
            x = jnp.pad(x, widths, mode=mode)
    return x


def _stays_small(x: Operand, window: Window, groups: int) -> bool:
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


def _conv(x, kernel, window: Window, groups, precision) -> jax.Array:
    x = _continue(x, window)
    lengths = [
        max(0, (n + low + high - (size - 1) * dilation - 1) // stride + 1)
        for n, size, stride, dilation, (low, high), _ in zip(x.shape[1:-1], *window)
    ]
    # Large kernels are left to XLA: copying their windows would take much memory.
    taps, outputs = math.prod(window.size), math.prod(lengths)
    if groups == 1 and outputs > 0 and taps <= _MOST_TAPS:
        if outputs < taps:
            return _conv_patches(x, kernel, lengths, window, precision)
        # Others have fast gradients of their own. Symbols cannot be divided in strips.
        if jax.default_backend() == "cpu" and all(map(_is_int, x.shape)):
            return _conv_on_cpu(x, kernel, window, precision)
    return _conv_by_xla(x, kernel, window, groups, precision)


def _conv_by_xla(x, kernel, window: Window, groups, precision) -> jax.Array:
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
def _conv_on_cpu(x, kernel, window: Window, precision) -> jax.Array:
    """Convolves by XLA, and takes gradients that are fast on CPUs.

    Those of XLA are convolutions again: with respect to the kernel, one by windows as
    large as the map; with respect to the inputs, with strides, one of a map with zeros
    between its pixels. On CPUs these run at a fraction of the speed of others. So the
    tangents are computed in ways whose transposes, the gradients, are fast.
    """
    return _conv_by_xla(x, kernel, window, 1, precision)


@functools.partial(_conv_on_cpu.defjvp, symbolic_zeros=True)
def _conv_on_cpu_jvp(window, precision, primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _conv_on_cpu(x, kernel, window, precision)
    dy = jnp.zeros_like(y)
    if not isinstance(dx, SymbolicZero):
        dy += _conv_phases(dx, kernel, y.shape[1:-1], window, precision)
    if not isinstance(dkernel, SymbolicZero):
        dy += _conv_strips(x, dkernel, y.shape[1:-1], window, precision)
    return y, dy


def _conv_phases(x, kernel, lengths, window: Window, precision) -> jax.Array:
    """Convolves with strides as a sum of convolutions without, of a few pixels each."""
    axes = zip(x.shape[1:-1], lengths, *window[:4])
    dilation = tuple(
        d // math.gcd(s, d) for s, d in zip(window.strides, window.dilation)
    )
    y = 0
    for phase in itertools.product(*(_phases(*axis) for axis in axes)):
        pixels, taps, pads = zip(*phase)
        part = kernel[taps]
        without = Window(part.shape[:-2], (1,) * len(taps), dilation, pads, ())
        y += _conv_by_xla(x[:, *pixels], part, without, 1, precision)
    return y


def _phases(n, length, size, stride, dilation, pads):
    """Returns the phases of one axis: their pixels, taps, and padding of the pixels.

    Tap t of output i falls on pixel stride i + dilation t - low. So taps of the same
    remainder modulo stride meet pixels of one remainder, and no others.
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


def _conv_strips(x, kernel, lengths, window: Window, precision) -> jax.Array:
    """Convolves strips of rows one after the other, each as one matrix product.

    Their transposes, products as well, are summed to the kernel's gradient.
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
    # What strips share has the type that their gradients are summed in.
    dtype, wide = kernel.dtype, jnp.promote_types(kernel.dtype, jnp.float32)
    kernel = kernel.astype(wide)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # Keeps x, not its windows.
    def conv(i, x, kernel):
        x = lax.dynamic_slice_in_dim(x, i * strip * stride, taken, axis=1)
        kernel = kernel.astype(dtype)
        return _conv_patches(x, kernel, [strip, *others], window, precision)

    y = lax.map(lambda i: conv(i, x, kernel), jnp.arange(count))
    y = jnp.moveaxis(y, 0, 1).reshape(x.shape[0], -1, *y.shape[3:])
    return y[:, :rows]


def _conv_patches(x, kernel, lengths, window: Window, precision) -> jax.Array:
    """Convolves as one matrix product of copies of all windows.

    Where a map is smaller than the kernel, XLA takes one for the other, and its code
    for the result, or for its gradients, is some tens of times slower on CPUs.
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


def _conv_upsampled(x, kernel, window: Window, precision) -> jax.Array:
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
    return _pad(x, [(0, 0)] * (axis - 1) + [(-by, by)])


def _pad(x: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
    """Adds zeros to the ends of the first spatial axes, or takes pixels away."""
    pads = [(0, 0), *pads, *[(0, 0)] * (x.ndim - 1 - len(pads))]
    return lax.pad(x, jnp.zeros((), x.dtype), [(*ends, 0) for ends in pads])
