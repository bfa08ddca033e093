"""The geometry of convolutions: sizes, strides, dilation and padding of each axis."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax import lax

IntOrSequence = int | Sequence[int] | None
PaddingLike = str | int | Sequence[int | str | tuple[int, int]]

# Paddings that extend the inputs and their masks instead of adding holes, with their
# modes in jnp.pad.
_CONTINUATIONS = {"CIRCULAR": "wrap", "REFLECT": "reflect"}

_Pair = tuple[int, int]


class Window(NamedTuple):
    """The geometry of a convolution, one entry for each spatial axis.

    Inputs are first continued, then dilated, then surrounded by zeros.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    zeros: tuple[_Pair, ...]  # (low, high).
    continued: tuple[tuple[int, int, str | None], ...]  # (low, high, mode of jnp.pad)
    input_dilation: tuple[int, ...]


def make_window(
    spatial: Sequence[int],
    size: Sequence[int],
    strides: IntOrSequence,
    padding: PaddingLike,
    kernel_dilation: IntOrSequence,
    *,
    input_dilation: IntOrSequence = 1,
) -> Window:
    """Check the geometry of a convolution and bring it into one form.

    Args:
      spatial: Lengths of the spatial axes of the inputs.
      size: Size of the kernel along each spatial axis.
      strides: As in `ops.partial_conv`.
      padding: As in `ops.partial_conv`.
      kernel_dilation: As in `ops.partial_conv`.
      input_dilation: As in `ops.partial_conv`. The default is 1.

    Returns:
      The geometry, complete for each axis.

    Raises:
      ValueError: If an argument is invalid; the message names it.
    """
    ndim = _check_ndim(spatial, size)
    steps = _per_axis("strides", strides, ndim)
    dilation = _per_axis("kernel_dilation", kernel_dilation, ndim)
    spread = _per_axis("input_dilation", input_dilation, ndim)
    extents = [(k - 1) * d + 1 for k, d in zip(size, dilation)]
    pads = _parse_padding(padding, ndim, (*_CONTINUATIONS, "CAUSAL"))
    if isinstance(pads, str):
        dilated = [n if d == 1 else (n - 1) * d + 1 for n, d in zip(spatial, spread)]
        pads = lax.padtype_to_pads(dilated, extents, steps, pads)
    zeros, continued = [], []
    for pad, extent, step in zip(pads, extents, spread):
        mode = _CONTINUATIONS.get(pad) if isinstance(pad, str) else None
        around = ((extent - 1) // 2, extent // 2) if mode else (0, 0)
        continued.append((*around, mode))
        if pad == "CAUSAL":
            pad = ((extent - 1) * step, 0)
        zeros.append((0, 0) if isinstance(pad, str) else pad)
    return Window(tuple(size), steps, dilation, tuple(zeros), tuple(continued), spread)


def make_transposed_window(
    spatial: Sequence[int],
    size: Sequence[int],
    strides: IntOrSequence,
    padding: PaddingLike,
    kernel_dilation: IntOrSequence,
    *,
    transpose_kernel: bool,
) -> Window:
    """Check the geometry of a transposed convolution and bring it into one form.

    Args:
      spatial: Lengths of the spatial axes of the inputs.
      size: Size of the kernel along each spatial axis.
      strides: As in `ops.partial_conv_transpose`.
      padding: As in `ops.partial_conv_transpose`.
      kernel_dilation: As in `ops.partial_conv_transpose`.
      transpose_kernel: As in `ops.partial_conv_transpose`.

    Returns:
      The geometry of the same function as a convolution: its inputs are dilated by the
      strides.

    Raises:
      ValueError: If an argument is invalid; the message names it.
    """
    ndim = _check_ndim(spatial, size)
    steps = _per_axis("strides", strides, ndim)
    dilation = _per_axis("kernel_dilation", kernel_dilation, ndim)
    pads = _parse_padding(padding, ndim, ("CIRCULAR",))
    zeros, continued = [], []
    for pad, k, d, step in zip(
        [pads] * ndim if isinstance(pads, str) else pads, size, dilation, steps
    ):
        extent = (k - 1) * d + 1
        pair, around = _transposed_padding(pad, extent, step, transpose_kernel)
        zeros.append(pair)
        continued.append(around)
    ones = (1,) * ndim
    return Window(tuple(size), ones, dilation, tuple(zeros), tuple(continued), steps)


def _transposed_padding(
    pad: str | _Pair, extent: int, step: int, transpose_kernel: bool
) -> tuple[_Pair, tuple[int, int, str | None]]:
    """Compute the padding that `flax.linen.ConvTranspose` uses along one axis."""
    overlap = max(extent - step, 0)
    if pad == "SAME":
        total = extent + step - 2
        low = extent - 1 if step > extent - 1 else -(-total // 2)
        return (low, total - low), (0, 0, None)
    if pad == "VALID":
        return (extent - 1, step - 1 + overlap), (0, 0, None)
    if pad != "CIRCULAR":
        assert not isinstance(pad, str)
        return pad, (0, 0, None)
    # The first output sees the dilated inputs from -low on, and the last of n * step
    # outputs sees those up to (n - 1) * step + high.
    low = extent - 1 - (-(-overlap // 2) if transpose_kernel else overlap // 2)
    high = step + extent - 2 - low
    # Whole steps are continued; the rest of a step is cropped or lies between inputs.
    before, after = -(-low // step), high // step
    return (low - before * step, high - after * step), (before, after, "wrap")


def _check_ndim(spatial: Sequence[int], size: Sequence[int]) -> int:
    if not isinstance(size, Sequence):
        raise ValueError(f"kernel_size must be a number for each axis, got {size!r}.")
    if len(spatial) != len(size) or not 1 <= len(size) <= 3:
        raise ValueError(
            "inputs must have as many spatial axes as the kernel, one to three, got "
            f"{spatial} for a kernel of size {size}."
        )
    if not all(n > 0 for n in size):
        raise ValueError(f"kernel_size must be positive, got {tuple(size)}.")
    return len(size)


def _parse_padding(
    padding: PaddingLike, ndim: int, modes: Sequence[str]
) -> str | list[str | _Pair]:
    """Return 'SAME' or 'VALID', or a mode or a (low, high) pair for each axis."""
    pads: Sequence[int | str | _Pair]
    if isinstance(padding, str) and padding.upper() in ("SAME", "VALID"):
        return padding.upper()
    if isinstance(padding, str | int | np.integer):
        pads = (padding,) * ndim
    else:
        pads = padding
    try:
        if isinstance(padding, str) and padding.upper() == "CAUSAL" and ndim > 1:
            raise ValueError
        parsed: list[str | _Pair] = []
        for pad in pads:
            if isinstance(pad, str):
                parsed.append(modes[modes.index(pad.upper())])
            else:
                low, high = (pad, pad) if isinstance(pad, int | np.integer) else pad
                parsed.append((operator.index(low), operator.index(high)))
        if len(parsed) != ndim:
            raise ValueError
        return parsed
    except (TypeError, ValueError):
        names = [repr(m) for m in modes]
        alone = [repr(m) for m in modes if m != "CAUSAL" or ndim == 1]
        alone = ["'SAME'", "'VALID'", *alone]
        raise ValueError(
            f"padding must be {', '.join(alone)} or a "
            f"number; or, for each of {ndim} spatial axes, a number, a (low, high) "
            f"pair{', '.join(['', *names[:-1]])} or {names[-1]}; got {padding!r}."
        ) from None


def _per_axis(name: str, value: IntOrSequence, ndim: int) -> tuple[int, ...]:
    if value is None:  # Flax accepts None for 1.
        value = 1
    if isinstance(value, np.ndarray):
        values = tuple(np.atleast_1d(value))
    else:
        values = tuple(value) if isinstance(value, Sequence) else (value,) * ndim
    if len(values) != ndim or not all(is_int(v) and v > 0 for v in values):
        raise ValueError(
            f"{name} must be a positive number, or one for each of {ndim} spatial axes,"
            f" got {value!r}."
        )
    return values


def is_int(value: object) -> bool:
    """Return whether a value is an integer of Python or NumPy, not a symbolic size."""
    return isinstance(value, int | np.integer)
