"""Reference implementations: loops over windows and pixels in NumPy float64.

Written from the paper, without the library. Slow and simple on purpose.
"""

import itertools
import zlib

import numpy as np


def partial_conv(
    inputs,
    mask,
    kernel,
    bias=None,
    *,
    strides=1,
    padding="SAME",
    kernel_dilation=1,
    feature_group_count=1,
):
    """Compute equations 1 and 2 of the paper, for one input and a mask of its shape.

    Returns:
      The outputs and a mask of the same shape, i.e. one plane for each feature.
    """
    inputs, kernel = np.asarray(inputs, np.float64), np.asarray(kernel, np.float64)
    mask = np.broadcast_to(np.asarray(mask, bool), inputs.shape)
    size, (per_group, features) = kernel.shape[:-2], kernel.shape[-2:]
    ndim = len(size)
    strides, kernel_dilation = (
        (v,) * ndim if isinstance(v, int) else v for v in (strides, kernel_dilation)
    )
    if isinstance(padding, str | int):
        padding = (padding,) * ndim
    taps = [
        _taps(*axis)
        for axis in zip(inputs.shape[1:-1], size, strides, padding, kernel_dilation)
    ]
    outputs = np.zeros((len(inputs), *map(len, taps), features))
    new_mask = np.zeros(outputs.shape)
    per_group_out = features // feature_group_count
    for n, position in itertools.product(
        range(len(inputs)), np.ndindex(*map(len, taps))
    ):
        window = [axis[p] for axis, p in zip(taps, position)]
        for group in range(feature_group_count):
            ins = slice(group * per_group, (group + 1) * per_group)
            outs = slice(group * per_group_out, (group + 1) * per_group_out)
            result, valid, total = np.zeros(per_group_out), 0, 0
            for tap in np.ndindex(*size):
                total += per_group
                source = tuple(axis[t] for axis, t in zip(window, tap))
                if None in source:  # Zero padding.
                    continue
                m = mask[(n, *source)][ins]
                x = inputs[(n, *source)][ins]
                valid += m.sum()
                result += x[m] @ kernel[tap][m][:, outs]
            if valid:
                outputs[(n, *position)][outs] = result * total / valid
                if bias is not None:
                    outputs[(n, *position)][outs] += bias[outs]
                new_mask[(n, *position)][outs] = 1
    return outputs, new_mask


def _taps(length, size, stride, padding, dilation):
    """List the inputs that each output of one axis sees; None is padding."""
    extent = (size - 1) * dilation + 1
    if padding == "VALID":
        low = high = 0
    elif padding == "SAME":
        outputs = -(-length // stride)
        missing = max((outputs - 1) * stride + extent - length, 0)
        low, high = missing // 2, missing - missing // 2
    elif isinstance(padding, str):
        low, high = (extent - 1) // 2, extent // 2
    elif isinstance(padding, int):
        low = high = padding
    else:
        low, high = padding

    def source(i):
        if 0 <= i < length:
            return i
        if padding == "CIRCULAR":
            return i % length
        if padding == "REFLECT":  # The border pixel is not repeated.
            i %= 2 * (length - 1)
            return min(i, 2 * (length - 1) - i)
        return None

    starts = range(-low, length + high - extent + 1, stride)
    return [[source(i + t * dilation) for t in range(size)] for i in starts]


def total_variation(comp, mask):
    """Compute L_tv of one image ``[H, W, C]``, mask ``[H, W]``, pair by pair."""
    height, width = mask.shape

    def in_region(y, x):
        around = itertools.product((y - 1, y, y + 1), (x - 1, x, x + 1))
        return any(
            0 <= i < height and 0 <= j < width and not mask[i, j] for i, j in around
        )

    total = 0.0
    for y, x in np.ndindex(height, width):
        for p in ((y + 1, x), (y, x + 1)):
            inside = p[0] < height and p[1] < width
            if inside and in_region(y, x) and in_region(*p):
                total += np.abs(comp[y, x] - comp[p]).sum()
    return total / comp.size


def recipe_weights(seed, shapes):
    """Draw the weights of the golden arrays; see testdata/README.md.

    Args:
      seed: Seed of the case.
      shapes: Pairs of a PyTorch name and a shape.

    Returns:
      Arrays by name.
    """
    weights = {}
    for name, shape in shapes:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        a = rng.standard_normal(shape)
        if name.endswith("running_var"):
            a = 1 + 0.5 * np.abs(a)
        elif name.endswith("running_mean"):
            a *= 0.3
        elif a.ndim == 4:
            a *= np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith("weight"):
            a = 1 + 0.2 * a
        else:
            a *= 0.1
        weights[name] = a.astype(np.float32)
    return weights
