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
    input_dilation=1,
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
    strides, padding, input_dilation, kernel_dilation = (
        (v,) * ndim if isinstance(v, int | str) else v
        for v in (strides, padding, input_dilation, kernel_dilation)
    )
    taps = [
        _taps(*axis)
        for axis in zip(
            inputs.shape[1:-1], size, strides, padding, kernel_dilation, input_dilation
        )
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
                source = tuple(axis[t] for axis, t in zip(window, tap))
                if BETWEEN in source:
                    continue
                total += per_group
                if PADDING in source:
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


def partial_conv_transpose(
    inputs, mask, kernel, bias, *, strides, kernel_dilation, padding
):
    """Let each input add to the outputs that it reaches.

    Args:
      inputs: ``[N, *spatial, C]``.
      mask: ``[N, *spatial, C]``.
      kernel: ``[*kernel_size, C, features]``.
      bias: ``[features]``.
      strides: A number for each axis.
      kernel_dilation: A number for each axis.
      padding: For each axis, how many outputs are added before the first one that the
        last tap of the first input reaches, and after the last one that the first tap
        of the last input reaches.

    Returns:
      The outputs, their mask, and the fraction of valid inputs of each.
    """
    inputs, kernel = np.asarray(inputs, np.float64), np.asarray(kernel, np.float64)
    mask = np.broadcast_to(np.asarray(mask, bool), inputs.shape)
    size, (channels, features) = kernel.shape[:-2], kernel.shape[-2:]
    spatial = inputs.shape[1:-1]
    extents = [(k - 1) * d + 1 for k, d in zip(size, kernel_dilation)]
    lengths = [
        (n - 1) * s + 1 + low + high - (extent - 1)
        for n, s, extent, (low, high) in zip(spatial, strides, extents, padding)
    ]
    sums = np.zeros((len(inputs), *lengths, features))
    reached, valid = np.zeros(sums.shape[:-1]), np.zeros(sums.shape[:-1])
    for i, *position in np.ndindex(len(inputs), *spatial):
        for tap in np.ndindex(*size):
            to = [
                p * s + low - t * d
                for p, s, t, d, (low, _) in zip(
                    position, strides, tap, kernel_dilation, padding
                )
            ]
            if any(not 0 <= j < length for j, length in zip(to, lengths)):
                continue
            m, x = mask[(i, *position)], inputs[(i, *position)]
            reached[(i, *to)] += channels
            valid[(i, *to)] += m.sum()
            sums[(i, *to)] += x[m] @ kernel[tap][m]
    coverage = valid / np.maximum(reached, 1)
    new_mask = (valid > 0)[..., None]
    scale = (reached / np.maximum(valid, 1))[..., None]
    return np.where(new_mask, sums * scale + bias, 0), new_mask, coverage[..., None]


# What a tap may meet instead of an input.
PADDING, BETWEEN = "zero padding, a hole", "a zero between dilated inputs"


def _taps(length, size, stride, padding, dilation, input_dilation):
    """List what each output of one axis sees: inputs, `PADDING` or `BETWEEN`."""
    extent = (size - 1) * dilation + 1
    before = after = low = high = 0
    if padding == "SAME":
        dilated = (length - 1) * input_dilation + 1
        outputs = -(-dilated // stride)
        missing = max((outputs - 1) * stride + extent - dilated, 0)
        low, high = missing // 2, missing - missing // 2
    elif padding == "CAUSAL":
        before = extent - 1
    elif padding in ("CIRCULAR", "REFLECT"):
        before, after = (extent - 1) // 2, extent // 2
    elif isinstance(padding, int):
        low = high = padding
    elif padding != "VALID":
        low, high = padding

    def source(position):
        i, between = divmod(position, input_dilation)
        if between:
            return BETWEEN
        if 0 <= i < length:
            return i
        if padding == "CIRCULAR":
            return i % length
        if padding == "REFLECT":  # The border pixel is not repeated.
            i %= 2 * (length - 1)
            return min(i, 2 * (length - 1) - i)
        return PADDING

    first = -before * input_dilation - low
    last = (length - 1 + after) * input_dilation + high
    starts = range(first, last + 2 - extent, stride)
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
