"""The configuration of a network, which is stored with its weights as JSON.

A configuration says nothing about the images that a network takes. Their channels are
known from the kernel of its first layer.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pconv_jax import unet
from pconv_jax._errors import UserError
from pconv_jax._files import FileContentError
from pconv_jax.unet import Normalization, PConvUNet, Stage

_FIELDS = ("conv", "stages", "normalization", "sigmoid_head")
_MAX_STAGES = 16  # Of the encoder, and of the decoder: each halves the image.
_MAX_FEATURES = 2**20
_MAX_KERNEL_SIZE = 1000
_PADDINGS = ("SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")


def model_config(model: PConvUNet) -> dict[str, Any]:
    """Describe the function a network computes, as values that JSON can hold.

    Fields that affect only how it is computed, such as the dtype, are left out.
    """
    return {
        "conv": model.conv,
        "stages": [
            [stage._asdict() for stage in side]
            for side in (model.encoder, model.decoder)
        ],
        "normalization": model.normalization and model.normalization._asdict(),
        "sigmoid_head": model.sigmoid_head,
    }


def model_from_config(config: Any, source: str | Path) -> PConvUNet:
    """Make a network from its configuration.

    Args:
      config: Configuration from `model_config`, also after a round trip through JSON.
      source: The file it was read from, for the error message.

    Returns:
      The network.

    Raises:
      UserError: If it is not the configuration of a network.
    """
    try:
        fields = _check_fields(config, _FIELDS, needed={"stages", "normalization"})
        encoder, decoder = map(_read_stages, fields.pop("stages"))
        if fields["normalization"] is not None:
            names = Normalization._fields
            values = _check_fields(fields["normalization"], names, needed=names)
            fields["normalization"] = Normalization(**values)
        return PConvUNet(stages=(encoder, decoder), **fields)
    except FileContentError as error:
        raise UserError(
            f"{source} does not describe a network that pconv_jax knows: {error}."
        ) from error


def _read_stages(stages: Any) -> tuple[Stage, ...]:
    if not _is_list(stages) or not 0 < len(stages) <= _MAX_STAGES:
        raise FileContentError(
            f"expected 1 to {_MAX_STAGES} stages, got {stages!r:.50}"
        )
    needed = {"features", "kernel_size"}
    return tuple(
        Stage(**_check_fields(s, Stage._fields, needed=needed)) for s in stages
    )


def _check_fields(
    values: Any, known: Collection[str], *, needed: Collection[str]
) -> dict[str, Any]:
    """Check that values are a dict of known and complete names, of the right types."""
    if not isinstance(values, Mapping) or not set(needed) <= set(values) <= set(known):
        raise FileContentError(
            f"expected values named {', '.join(known)}, got {values!r:.100}"
        )
    for name, value in values.items():
        if not _IS_VALID[name](value):
            raise FileContentError(f"its {name} cannot be {value!r:.50}")
    return dict(values)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_size(value: Any, largest: int) -> bool:
    return type(value) is int and 0 < value <= largest


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e6  # NaN is not.


def _is_list_of_numbers(value: Any) -> bool:
    return _is_list(value) and all(map(_is_number, value))


def _is_padding(value: Any) -> bool:
    """Return whether a layer accepts the type of a padding; see `ops.PaddingLike`."""
    return value is None or all(map(_is_pad, value if _is_list(value) else [value]))


def _is_pad(value: Any) -> bool:
    if isinstance(value, str):
        return value.upper() in _PADDINGS
    pair = value if _is_list(value) else (value, value)
    return len(pair) == 2 and all(
        type(n) is int and abs(n) <= _MAX_KERNEL_SIZE for n in pair
    )


# Of all fields above, by name: networks themselves check how values fit together.
_IS_VALID: Mapping[str, Callable[[Any], bool]] = {
    "conv": lambda value: value in ("partial", "standard"),
    "stages": lambda value: _is_list(value) and len(value) == 2,
    "normalization": lambda value: value is None or isinstance(value, Mapping),
    "sigmoid_head": lambda value: isinstance(value, bool),
    "features": lambda value: _is_size(value, _MAX_FEATURES),
    "kernel_size": lambda value: _is_size(value, _MAX_KERNEL_SIZE),
    "batch_norm": lambda value: isinstance(value, bool),
    "negative_slope": lambda value: value is None or _is_number(value),
    "padding": _is_padding,
    "mean": _is_list_of_numbers,
    "std": _is_list_of_numbers,
}


def input_channels(model: PConvUNet, first_kernel: np.ndarray | jax.Array) -> int:
    """Count the channels of the images that a network takes.

    Args:
      model: The network.
      first_kernel: Kernel of its first layer, ``[H, W, C_in, features]``.
    """
    channels = first_kernel.shape[2]
    # The first standard convolution also takes the mask.
    return channels - 1 if model.conv == "standard" else channels


def variable_shapes(
    model: PConvUNet, first_kernel: np.ndarray | None, source: str | Path
) -> dict[str, Any]:
    """Compute the shapes of a network's variables.

    Args:
      model: The network.
      first_kernel: Kernel of its first layer, ``[H, W, C_in, features]``. If it is
        missing or of another rank, the network takes three channels.
      source: The file that describes the network, for the error message.

    Returns:
      A tree of `jax.ShapeDtypeStruct` like the variables that ``model.init`` makes.

    Raises:
      UserError: If there can be no such network.
    """
    channels = 3
    if first_kernel is not None and first_kernel.ndim == 4:
        channels = input_channels(model, first_kernel)
    if channels < 1:
        raise UserError(f"{source} describes a network that takes no image.")
    try:
        return unet.variable_shapes(model, channels)
    except ValueError as error:  # What a network raises whose parts do not fit.
        raise UserError(f"{source} describes an impossible network: {error}") from error


def model_differences(config: Mapping[str, Any] | None, model: PConvUNet) -> list[str]:
    """List the fields of a configuration in which a network differs from it.

    Args:
      config: Configuration from `model_config`, also after a round trip through JSON.
        None is equal to that of any network.
      model: The network.

    Returns:
      Names of fields; empty if there is no difference.
    """
    ours = json.loads(json.dumps(model_config(model)))
    theirs = ours if config is None else json.loads(json.dumps(config))
    return [name for name in ours if theirs.get(name) != ours[name]]
