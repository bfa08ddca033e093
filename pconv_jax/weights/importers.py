"""Trained networks of other projects, as networks of this one.

What is particular to a project is data, in `PROJECTS`: how its weights are called, by
what its layers scale, and what its images look like. An imported network takes and
gives what all networks here do, RGB images in [-1, 1] (or fields in their own units),
unless what the original takes and gives is asked for.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pconv_jax.unet import (
    IMAGENET,
    Normalization,
    PConvUNet,
    Stage,
    unet_from_stages,
)
from pconv_jax.weights.formats.arrays import read_arrays, to_tree

# Flax's, by which the networks here normalize.
_EPSILON = 1e-5
_MAX_DEPTH = 12


class Imported(NamedTuple):
    """A network of another project.

    Attributes:
      project: where it is from.
      model: the same network here.
      variables: its ``params`` and ``batch_stats``, NumPy arrays.
      notes: what to know about it.
    """

    project: str
    model: PConvUNet
    variables: dict[str, Any]
    notes: tuple[str, ...]


class _Names(NamedTuple):
    """What a file calls its weights.

    Attributes:
      depth: number of encoder stages.
      keys: by our path, without the collection: ``{'pconv1/kernel': 'enc_1.conv...'}``.
      prefix: of all keys of the network, which other keys have not.
    """

    depth: int
    keys: dict[str, str]
    prefix: str = ""


class Project(NamedTuple):
    """How to read the weights of a project.

    Attributes:
      name: of its repository.
      find: returns the names of weights if these are keys of the project, else None.
      ignored: a pattern for keys that are no weights.
      layout: of kernels.
      sum_of_ones: what the layer takes for sum(1): one as in the paper's first version,
        the window ``k * k``, or as here and in the second all inputs, ``C_in * k * k``.
      decoder_slope: of the decoder's leaky ReLUs, the last one's apart.
      last_slope: of the last layer's; None for no activation.
      encoder_bias: whether an encoder stage without normalization has a bias.
      skip_first: whether a decoder stage has the encoder's features first.
      images: what the original takes and gives, where not RGB images in [-1, 1].
      bgr: whether these are BGR.
      epsilon: of batch normalization.
      normalization: of images in [-1, 1].
      sigmoid_head: see `PConvUNet`.
      notes: for people.
    """

    name: str
    find: Callable[[Iterable[str]], _Names | None]
    ignored: str = "$^"
    layout: Literal["OIHW", "HWIO"] = "OIHW"
    sum_of_ones: Literal["one", "window", "inputs"] = "inputs"
    decoder_slope: float = 0.2
    last_slope: float | None = None
    encoder_bias: bool = True
    skip_first: bool = False
    images: str | None = None
    bgr: bool = False
    epsilon: float = _EPSILON
    normalization: Normalization | None = None
    sigmoid_head: bool = False
    notes: tuple[str, ...] = ()


def import_network(
    weights: str | Path | Mapping[str, np.ndarray],
    source: str | Path = "what was given",
    *,
    raw: bool = False,
) -> Imported:
    """Recognises a network by the names of its weights, and converts it.

    It then takes and gives RGB images in [-1, 1], as all networks here do; or, with
    ``raw=True``, exactly what the original does, to compare the two: BGR in [-1, 1] for
    mmagic, RGB normalized as ImageNet's for naoto0804, RGB in [0, 1] for PConv-Keras.
    climatereconstructionAI's fields are in their own units either way.

    Args:
      weights: a file, or the arrays of one; see `read_arrays`.
      source: where arrays came from, for errors.
      raw: whether to keep the original's order of channels and range of values.

    Returns:
      The network, its variables, and what to know about them.

    Raises:
      ValueError: as `read_arrays`; if no project is recognised; or naming all that is
        missing, too much, mis-shaped (kernels being ``[H, W, in, out]``) or not finite.
    """
    if isinstance(weights, Mapping):
        arrays = weights
    else:
        source, arrays = weights, read_arrays(weights)
    for project in PROJECTS:
        names = project.find(arrays)
        if names and 0 < names.depth <= _MAX_DEPTH:
            project = _with_image_note(project, raw)
            if raw:
                project = project._replace(bgr=False, normalization=None)
            try:
                return _convert(project, names, arrays, source)
            except (TypeError, ZeroDivisionError, OverflowError) as error:
                raise ValueError(f"weights: {source} does not fit: {error}.") from error
    known = ", ".join(dict.fromkeys(project.name for project in PROJECTS))
    examples = ", ".join(list(arrays)[:3]) or "nothing"
    raise ValueError(
        f"weights: {source} is of no project that is known ({known}); it has {examples}"
        f"{', ...' if len(arrays) > 3 else ''}."
    )


def import_layers(
    weights: str | Path | Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Converts layers of NVIDIA/partialconv, or of plain PyTorch, one by one.

    For models of one's own: ``PartialConv2d`` and ``PartialConv3d``, with or without
    ``multi_channel``, compute what `layers.PartialConv` does with the same weights, and
    without a mask what `layers.PartialPadConv` does.

    Args:
      weights: a file, or the arrays of one, ``'block.conv.weight'``; kernels
        ``[out, in, *spatial]``.

    Returns:
      Every convolution, by the module's names: ``{'block': {'conv': {'kernel': ...,
      'bias': ...}}}``.
    """
    arrays = weights if isinstance(weights, Mapping) else read_arrays(weights)
    flat = {}
    for key, array in arrays.items():
        layer, _, leaf = key.rpartition(".")
        weight = arrays.get(f"{layer}.weight" if layer else "weight")
        if weight is None or not 3 <= weight.ndim <= 5:
            continue
        path = layer.replace(".", "/")
        if leaf == "weight":
            flat[f"{path}/kernel"] = np.moveaxis(array, (0, 1), (-1, -2))
        elif leaf == "bias":
            flat[f"{path}/bias"] = array
    return traverse_util.unflatten_dict(
        {path.strip("/"): np.ascontiguousarray(array) for path, array in flat.items()},
        sep="/",
    )


def _with_image_note(project: Project, raw: bool) -> Project:
    if project.images is None:
        return project
    note = f"It takes and gives {project.images}, as the original does."
    if not raw:
        note = f"It was trained on {project.images}, and takes RGB in [-1, 1] here."
    return project._replace(notes=(note, *project.notes))


def _convert(
    project: Project,
    names: _Names,
    arrays: Mapping[str, np.ndarray],
    source: str | Path,
) -> Imported:
    found = {path: arrays[key] for path, key in names.keys.items() if key in arrays}
    for path, kernel in found.items():
        if path.endswith("/kernel") and kernel.ndim == 4 and project.layout == "OIHW":
            found[path] = kernel.transpose(2, 3, 1, 0)
    stages = [_stage(project, names.depth, i, found) for i in _numbers(names.depth)]
    model = unet_from_stages(
        tuple(stages[: names.depth]),
        tuple(stages[names.depth :]),
        normalization=project.normalization,
        sigmoid_head=project.sigmoid_head,
    )
    first = found.get("pconv1/kernel", np.empty(0))
    expected = _expected(model, first.shape[2] if first.ndim == 4 else 3)
    for i, stage in enumerate(stages, 1):
        bias = f"pconv{i}/bias"
        if stage.batch_norm and bias in found:
            expected[bias] = jax.ShapeDtypeStruct((stage.features,), np.float32)
        elif not project.encoder_bias and i <= names.depth and bias not in found:
            expected.pop(bias, None)
    used = set(names.keys.values())
    for key in arrays:
        inside = key.startswith(names.prefix) and not re.search(project.ignored, key)
        if inside and key not in used:
            found[key] = arrays[key]  # Which is too much.
    flat = to_tree(found, expected, source, names=names.keys, strict=True)
    flat = traverse_util.flatten_dict(flat, sep="/")
    for i, stage in enumerate(stages, 1):
        _convert_stage(project, names.depth, i, stage, flat)
    return Imported(project.name, model, _to_variables(flat), project.notes)


def _numbers(depth: int) -> range:
    return range(1, 2 * depth + 1)


def _stage(
    project: Project, depth: int, number: int, found: Mapping[str, np.ndarray]
) -> Stage:
    """Returns what a file's weights say about a stage, or else the paper's."""
    kernel = found.get(f"pconv{number}/kernel")
    if kernel is None or kernel.ndim != 4:
        level = min(number - 1, 2 * depth - 1 - number)
        size = (7, 5, 5)[number - 1] if number <= 3 else 3
        kernel = np.empty((size, size, 1, 64 * 2 ** min(level, 3) if level >= 0 else 3))
    slope = 0.0 if number <= depth else project.decoder_slope
    return Stage(
        features=kernel.shape[-1],
        kernel_size=kernel.shape[0],
        batch_norm=any(path.startswith(f"bn{number}/") for path in found),
        negative_slope=slope if number < 2 * depth else project.last_slope,
    )


def _expected(model: PConvUNet, channels: int) -> dict[str, Any]:
    """Returns shapes by path, without collections: their names do not collide."""
    size = model.size_multiple
    images, mask = (
        jax.ShapeDtypeStruct((1, size, size, n), jnp.float32) for n in (channels, 1)
    )
    variables = jax.eval_shape(model.init, jax.random.key(0), images, mask)
    flat = {}
    for tree in variables.values():
        flat |= traverse_util.flatten_dict(tree, sep="/")
    return flat


def _convert_stage(
    project: Project, depth: int, number: int, stage: Stage, flat: dict[str, np.ndarray]
) -> None:
    """Does to one stage, in place, what the project's quirks ask for."""
    kernel = flat[f"pconv{number}/kernel"]
    channels = kernel.shape[2]
    first, last = number == 1, number == 2 * depth
    # The encoder's features, of this size, that a decoder stage takes along.
    skip = 0
    if number > depth:
        skip = flat[f"pconv{2 * depth + 1 - number}/kernel"].shape[2]
    if project.skip_first:
        kernel = np.concatenate([kernel[:, :, skip:], kernel[:, :, :skip]], axis=2)
    if project.bgr and (first or last):
        images = skip if last else channels
        rest = channels - images
        kernel = np.concatenate(
            [kernel[:, :, :rest], kernel[:, :, rest:][:, :, ::-1]], axis=2
        )
        if last:
            kernel = kernel[..., ::-1]
            flat[f"pconv{number}/bias"] = flat[f"pconv{number}/bias"][::-1].copy()
    divisor = {
        "one": kernel[..., 0].size,
        "window": channels,
        "inputs": 1,
    }[project.sum_of_ones]
    flat[f"pconv{number}/kernel"] = np.ascontiguousarray(kernel / np.float32(divisor))
    if not stage.batch_norm:
        flat.setdefault(f"pconv{number}/bias", np.zeros(stage.features, np.float32))
        return
    # A bias before a normalization is no other than a smaller mean.
    bias = flat.pop(f"pconv{number}/bias", np.float32(0))
    flat[f"bn{number}/mean"] = flat[f"bn{number}/mean"] - bias
    var = flat[f"bn{number}/var"].astype(np.float64)
    ratio = np.sqrt((var + _EPSILON) / (var + project.epsilon))
    flat[f"bn{number}/scale"] = (flat[f"bn{number}/scale"] * ratio).astype(np.float32)


def _to_variables(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    variables = {"params": {}, "batch_stats": {}}
    for path, array in flat.items():
        collection = "batch_stats" if path.endswith(("/mean", "/var")) else "params"
        module, leaf = path.split("/")
        variables[collection].setdefault(module, {})[leaf] = array
    return variables


def _torch(
    encoder: str, decoder: str, conv: str, *, first: int = 1, mirrored: bool = True
) -> Callable[[Iterable[str]], _Names | None]:
    """Returns a `Project.find` for names that count their blocks.

    Args:
      encoder: name of an encoder's block, with ``{}`` for its number.
      decoder: of a decoder's block.
      conv: name of the convolution in a block, beside ``bn``.
      first: number of the first block.
      mirrored: whether decoder blocks are counted from the outermost one.
    """
    pattern = re.compile(
        rf"(.*?)({_any_number(encoder)}|{_any_number(decoder)})\.{re.escape(conv)}"
        r"\.weight"
    )
    leaves = {
        "kernel": f"{conv}.weight",
        "bias": f"{conv}.bias",
        "scale": "bn.weight",
        "bn_bias": "bn.bias",
        "mean": "bn.running_mean",
        "var": "bn.running_var",
    }

    def find(keys: Iterable[str]) -> _Names | None:
        matches = [match for match in map(pattern.fullmatch, keys) if match]
        if not matches:
            return None
        prefix = matches[-1][1]  # The last one saved, where there are several.
        numbers = [
            int(re.search(r"\d+", match[2])[0])
            for match in matches
            if match[1] == prefix
        ]
        depth = max(numbers) - first + 1
        if depth > _MAX_DEPTH:
            return None
        levels = range(first, first + depth)
        blocks = [encoder.format(level) for level in levels]
        blocks += [
            decoder.format(level)
            for level in (reversed(levels) if mirrored else levels)
        ]
        names = {}
        for i, block in enumerate(blocks, 1):
            for leaf, key in leaves.items():
                module = "pconv" if leaf in ("kernel", "bias") else "bn"
                path = f"{module}{i}/{leaf.removeprefix('bn_')}"
                names[path] = f"{prefix}{block}.{key}"
        return _Names(depth, names, prefix)

    return find


def _any_number(block: str) -> str:
    return re.escape(block).replace(re.escape("{}"), r"\d{1,3}")


def _keras(keys: Iterable[str]) -> _Names | None:
    """Finds what Keras has named by counting all layers of a session.

    Layers are ``p_conv2d_17`` ..., the encoder's normalizations ``EncBN1`` ..., the
    decoder's ``batch_normalization_3`` ..., and the head ``conv2d_5``, or, in later
    versions, ``outputs_img``.
    """
    layers = {"p_conv2d": {}, "EncBN": {}, "batch_normalization": {}, "conv2d": {}}
    pattern = (
        r"(?:.*/)?(p_conv2d|EncBN|batch_normalization|conv2d|outputs_img)_?(\d*)/(\w+)"
        r"(?::0)?"
    )
    for key in keys:
        match = re.fullmatch(pattern, key)
        if match and not key.startswith("optimizer_weights"):
            kind, number, leaf = match.groups()
            kind = "conv2d" if kind == "outputs_img" else kind
            layers[kind].setdefault(int(number or 0), {})[leaf] = key
    if not layers["p_conv2d"]:
        return None
    start = {kind: min(found, default=1) for kind, found in layers.items()}
    depth = (max(layers["p_conv2d"]) - start["p_conv2d"]) // 2 + 1
    names = {}

    def name(path: str, kind: str, number: int, leaf: str) -> None:
        layer = kind + ("" if kind == "EncBN" else "_") + str(number)
        found = layers[kind].get(number, {})
        names[path] = found.get(leaf, f"{layer}/{leaf}")

    for i in _numbers(min(depth, _MAX_DEPTH)):
        number = start["p_conv2d"] + i - 1
        name(f"pconv{i}/kernel", "p_conv2d", number, "img_kernel")
        name(f"pconv{i}/bias", "p_conv2d", number, "bias")
        if i in (1, 2 * depth):
            continue
        kind, number = "EncBN", i - 1
        if i > depth:
            kind = "batch_normalization"
            number = start[kind] + i - depth - 1
        name(f"bn{i}/scale", kind, number, "gamma")
        name(f"bn{i}/bias", kind, number, "beta")
        name(f"bn{i}/mean", kind, number, "moving_mean")
        name(f"bn{i}/var", kind, number, "moving_variance")
    for leaf in ("kernel", "bias"):
        name(f"head/{leaf}", "conv2d", start["conv2d"], leaf)
    return _Names(depth, names)


_NAOTO0804 = Project(
    name="naoto0804/pytorch-inpainting-with-partial-conv",
    find=_torch("enc_{}", "dec_{}", "conv.input_conv"),
    ignored=r"mask_conv\.weight$|num_batches_tracked$",
    sum_of_ones="one",
    encoder_bias=False,
    images="RGB normalized as ImageNet's",
    normalization=IMAGENET,
    notes=(
        "Its released weights were trained on masks that were made smaller "
        "bilinearly, and do best on such (its issue 38).",
    ),
)

PROJECTS = (
    Project(
        name="open-mmlab/mmagic",
        find=_torch("encoder.enc{}", "decoder.dec{}", "conv"),
        ignored=r"weight_mask_updater$|num_batches_tracked$",
        images="BGR in [-1, 1]",
        bgr=True,
    ),
    _NAOTO0804,
    _NAOTO0804._replace(  # Before 2018-06.
        find=_torch("enc_{}", "dec_{}", "conv.conv2d"),
        ignored=r"mask2d\.(weight|bias)$|num_batches_tracked$",
    ),
    Project(
        name="FREVA-CLINT/climatereconstructionAI",
        find=_torch(
            *("encoder.{}.partial_conv", "decoder.{}.partial_conv", "input_conv"),
            first=0,
            mirrored=False,
        ),
        ignored=r"mask_conv\.weight$|num_batches_tracked$",
        sum_of_ones="one",
        decoder_slope=0.01,
        encoder_bias=False,
        notes=(
            "It takes fields in the units that it was trained on.",
            "Zeros (holes) pad the fields. The file does not say whether the network "
            "was trained so, or with a longitude that is continued.",
        ),
    ),
    Project(
        name="MathiasGruber/PConv-Keras",
        find=_keras,
        ignored=r"^optimizer_weights",
        layout="HWIO",
        sum_of_ones="window",
        last_slope=0.2,
        skip_first=True,
        epsilon=1e-3,
        images="RGB in [0, 1]",
        normalization=Normalization(mean=(-1.0,), std=(2.0,)),
        sigmoid_head=True,
        notes=(
            "Where a hole is too wide to be closed the output is 0 here, and the "
            "image of a bias there.",
            "Weights of its first phase normalize by the statistics of the batch even "
            "when they are applied; here they take the running ones.",
        ),
    ),
)
