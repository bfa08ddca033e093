"""Import of other projects' trained networks.

``PROJECTS`` is a table of how projects differ: the names of their weights, the scale of
their layers, the color order and range of their images. An imported network takes and
gives RGB images in [-1, 1], as all networks here do, or fields in their own units. With
``raw=True`` it takes and gives the same as the original.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from pconv_jax._errors import UserError
from pconv_jax.unet import (
    BATCH_NORM_EPSILON,
    IMAGENET,
    Normalization,
    PConvUNet,
    Stage,
)
from pconv_jax.weights import project_names
from pconv_jax.weights.formats.arrays import flatten, from_torch, read_arrays, to_tree
from pconv_jax.weights.network_config import variable_shapes

_MAX_DEPTH = 12


class Imported(NamedTuple):
    """A network of another project.

    Attributes:
      project: Name of the project.
      model: The same network as a `PConvUNet`.
      variables: Its ``params`` and ``batch_stats``, as NumPy arrays.
      notes: Remarks for people who use it.
    """

    project: str
    model: PConvUNet
    variables: dict[str, Any]
    notes: tuple[str, ...]


class _Names(NamedTuple):
    """The names of the weights in a file.

    Attributes:
      depth: Number of encoder stages.
      keys: Names by our path, without the collection:
        ``{'pconv1/kernel': 'enc_1.conv...'}``.
      prefix: Prefix that all names of the network have, and no others. The default is
        empty.
    """

    depth: int
    keys: dict[str, str]
    prefix: str = ""


class Project(NamedTuple):
    """How to read the weights of a project.

    Attributes:
      name: Name of its repository.
      find: Finds the names of the weights among the keys of a file. It returns None if
        the file is not from this project.
      ignored: Pattern of keys that are not weights. By default there are none.
      layout: Order of the kernels' axes. By default PyTorch's, ``'OIHW'``.
      sum_of_ones: The layer's value of sum(1): ``'one'`` is 1, as in version 1 of the
        paper; ``'window'`` is ``k * k``; ``'inputs'`` (the default) is
        ``C_in * k * k``, as here and in version 2.
      decoder_slope: Slope of the decoder's leaky ReLUs, except the last. The default is
        0.2, as in the paper.
      last_slope: Slope of the last layer's leaky ReLU. None (the default) is no
        activation.
      encoder_bias: Whether encoder stages without normalization have a bias. The
        default is True.
      skip_first: Whether decoder stages concatenate the encoder's features before the
        decoder's own. By default after them.
      images: Description of the images that the original takes and gives. None (the
        default) if they are RGB in [-1, 1].
      bgr: Whether these are BGR. The default is False.
      epsilon: Epsilon of batch normalization. By default Flax's, 1e-5.
      normalization: The mean that the original subtracts from images in [-1, 1], and
        the deviation that it divides them by. The default is None.
      sigmoid_head: See `PConvUNet`. The default is False.
      notes: Remarks for people. By default there are none.
    """

    name: str
    find: Callable[[Collection[str]], _Names | None]
    ignored: str = "$^"
    layout: Literal["OIHW", "HWIO"] = "OIHW"
    sum_of_ones: Literal["one", "window", "inputs"] = "inputs"
    decoder_slope: float = 0.2
    last_slope: float | None = None
    encoder_bias: bool = True
    skip_first: bool = False
    images: str | None = None
    bgr: bool = False
    epsilon: float = BATCH_NORM_EPSILON
    normalization: Normalization | None = None
    sigmoid_head: bool = False
    notes: tuple[str, ...] = ()


def import_network(
    weights: str | Path | Mapping[str, np.ndarray],
    source: str | Path = "the given arrays",
    *,
    raw: bool = False,
) -> Imported:
    """Recognize a network by the names of its weights, and convert it.

    The result takes and gives RGB images in [-1, 1], as all networks here do. With
    ``raw=True`` it takes and gives the same as the original, to compare the two: BGR
    in [-1, 1] for mmagic, RGB normalized by ImageNet's statistics for naoto0804, RGB in
    [0, 1] for PConv-Keras. climatereconstructionAI's fields are in their own units
    either way.

    Args:
      weights: A file, or its arrays by name; see `read_arrays`.
      source: Where arrays came from, for error messages. By default unknown.
      raw: Whether to keep the original's channel order and range of values. The default
        is False.

    Raises:
      UserError: As `read_arrays`; if no project is recognized; or if arrays are
        missing, unexpected, of another shape (for kernels ``[H, W, in, out]``) or not
        finite. The message lists all of them.
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
            return _convert(project, names, arrays, source)
    known = ", ".join(project_names.PROJECT_NAMES)
    examples = ", ".join(list(arrays)[:3]) or "nothing"
    raise UserError(
        f"weights: {source} is from no known project ({known}); it has {examples}"
        f"{', ...' if len(arrays) > 3 else ''}."
    )


def import_layers(
    weights: str | Path | Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Convert layers of NVIDIA/partialconv, or of plain PyTorch, one by one.

    Use this for models of your own. With the same weights, `layers.PartialConv`
    computes the same as ``PartialConv2d`` and ``PartialConv3d``, with or without
    ``multi_channel``; `layers.PartialPadConv` computes the same as these layers without
    a mask.

    Args:
      weights: A file, or its arrays by name, ``'block.conv.weight'``. Kernels are
        ``[out, in, *spatial]``.

    Returns:
      Every convolution, by the names of its modules: ``{'block': {'conv': {'kernel':
      ..., 'bias': ...}}}``.

    Raises:
      UserError: As `read_arrays`.
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
            found[path] = from_torch(kernel)
    stages = [_stage(project, names.depth, i, found) for i in _numbers(names.depth)]
    model = PConvUNet(
        stages=(stages[: names.depth], stages[names.depth :]),
        normalization=project.normalization,
        sigmoid_head=project.sigmoid_head,
    )
    expected = _expected_shapes(project, model, found, source)
    found |= _find_unexpected(project, names, arrays)  # `to_tree` reports them.
    flat = flatten(to_tree(found, expected, source, names=names.keys, strict=True))
    for i, stage in enumerate(stages, 1):
        _convert_stage(project, names.depth, i, stage, flat)
    return Imported(project.name, model, _to_variables(flat), project.notes)


def _find_unexpected(
    project: Project, names: _Names, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Find arrays of the network that have no place in it."""
    used = set(names.keys.values())
    return {
        key: array
        for key, array in arrays.items()
        if key.startswith(names.prefix)
        and key not in used
        and not re.search(project.ignored, key)
    }


def _numbers(depth: int) -> range:
    return range(1, 2 * depth + 1)


def _stage(
    project: Project, depth: int, number: int, found: Mapping[str, np.ndarray]
) -> Stage:
    """Describe a stage by the file's weights, or by the paper if they are missing."""
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


def _expected_shapes(
    project: Project,
    model: PConvUNet,
    found: Mapping[str, np.ndarray],
    source: str | Path,
) -> dict[str, Any]:
    """Compute the shapes of a project's arrays, by path without the collection."""
    kernel, expected = found.get("pconv1/kernel"), {}
    shapes = variable_shapes(model, kernel, source)
    for tree in shapes.values():  # Names of different collections differ.
        expected |= flatten(tree)
    for i, stage in enumerate((*model.encoder, *model.decoder), 1):
        bias = f"pconv{i}/bias"
        if stage.batch_norm and bias in found:
            expected[bias] = jax.ShapeDtypeStruct((stage.features,), np.float32)
        elif not project.encoder_bias and i <= model.depth and bias not in found:
            expected.pop(bias, None)
    return expected


def _convert_stage(
    project: Project, depth: int, number: int, stage: Stage, flat: dict[str, np.ndarray]
) -> None:
    """Convert a stage's arrays in place to the conventions of this package."""
    kernel = flat[f"pconv{number}/kernel"]
    channels = kernel.shape[2]
    first, last = number == 1, number == 2 * depth
    skip = 0  # Number of the encoder's features that a decoder stage concatenates.
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
    # A bias before a normalization is the same as a smaller mean.
    bias = flat.pop(f"pconv{number}/bias", np.float32(0))
    flat[f"bn{number}/mean"] = flat[f"bn{number}/mean"] - bias
    var = flat[f"bn{number}/var"].astype(np.float64)
    ratio = np.sqrt((var + BATCH_NORM_EPSILON) / (var + project.epsilon))
    flat[f"bn{number}/scale"] = (flat[f"bn{number}/scale"] * ratio).astype(np.float32)


def _to_variables(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for path, array in flat.items():
        collection = "batch_stats" if path.endswith(("/mean", "/var")) else "params"
        module, leaf = path.split("/")
        variables[collection].setdefault(module, {})[leaf] = array
    return variables


def _torch(
    encoder: str, decoder: str, conv: str, *, first: int = 1, mirrored: bool = True
) -> Callable[[Collection[str]], _Names | None]:
    """Make a `Project.find` for PyTorch networks with numbered blocks.

    Args:
      encoder: Name of an encoder block, with ``{}`` for its number.
      decoder: Name of a decoder block, with ``{}`` for its number.
      conv: Name of the convolution in a block. The normalization is ``bn``.
      first: Number of the first block. The default is 1.
      mirrored: Whether decoder blocks are numbered from the outermost one. The default
        is True.
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

    def find(keys: Collection[str]) -> _Names | None:
        matches = [match for match in map(pattern.fullmatch, keys) if match]
        if not matches:
            return None
        prefix = matches[-1][1]  # If several networks were saved, the last one.
        blocks = [match[2] for match in matches if match[1] == prefix]
        numbers = [int(n) for block in blocks for n in re.findall(r"\d+", block)[:1]]
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


def _keras(keys: Collection[str]) -> _Names | None:
    """Find the weights of PConv-Keras. Keras numbers all layers of a session.

    Convolutions are ``p_conv2d_17`` and so on, the encoder's normalizations ``EncBN1``
    and so on, the decoder's ``batch_normalization_3`` and so on. The head is
    ``conv2d_5`` or, in later versions, ``outputs_img``.
    """
    layers: dict[str, dict[int, dict[str, str]]]
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
    name=project_names.NAOTO0804,
    find=_torch("enc_{}", "dec_{}", "conv.input_conv"),
    ignored=r"mask_conv\.weight$|num_batches_tracked$",
    sum_of_ones="one",
    encoder_bias=False,
    images="RGB normalized by ImageNet's statistics",
    normalization=IMAGENET,
    notes=(
        "The published weights were trained with masks that were scaled down "
        "bilinearly, and work best with such masks (issue 38 of the project).",
    ),
)

PROJECTS = (
    Project(
        name=project_names.MMAGIC,
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
        name=project_names.CLIMATE_RECONSTRUCTION_AI,
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
            "Fields are padded by zeros (holes). The file does not say whether the "
            "network was trained that way, or with circular padding of the longitude.",
        ),
    ),
    Project(
        name=project_names.PCONV_KERAS,
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
            "Where a hole is too wide to be closed, the output is 0; that of the "
            "original is the color of its biases.",
            "Weights of the first training phase use the running statistics of batch "
            "normalization here; the original uses the batch's even in inference.",
        ),
    ),
)
